"""CIFAR-10-C: the test images of CIFAR-10 under 19 common corruptions, from its published files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.reading import check_folder, one_line
from common.errors import ConfigurationError, DataUnavailableError
from common.files import strangeness_of

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "frost", "fog", "brightness", "spatter"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
)
SEVERITIES = 5


class CIFAR10C:
    """Corrupted CIFAR-10 (Hendrycks & Dietterich 2019, "Benchmarking neural network robustness").

    A file for each corruption has the 10,000 test images five times, in the order of severity; one
    more has the labels. They are read a batch at a time. A file that is missing, damaged or
    something else raises a DataUnavailableError.

    Args:
        root: Folder that has ``CIFAR-10-C`` in it, or this folder itself.
        verify: Whether a file must have all 50,000 images. Switch it off for a subset, which is
            five equal blocks all the same.
    """

    FOLDER = "CIFAR-10-C"
    ADDRESS = "https://zenodo.org/records/2535967"
    SHAPE = (32, 32, 3)
    SIZE = 50_000

    def __init__(self, root: str | Path = "data", verify: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        is_inner = not strangeness_of(self.root / "labels.npy")
        self.folder = self.root if is_inner else self.root / self.FOLDER
        self.verify = verify

    def check(self, names: tuple[str, ...] = CORRUPTIONS) -> int:
        """Open the files of these corruptions, and count the images that each has."""
        labels = self._labels()
        for name in names:
            self._images(name, len(labels))
        return len(labels)

    def batches(
        self, name: str, size: int = 250, severity: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, uint8 ``(N, 3, 32, 32)``, and labels, int64 ``(N,)``, batch by batch.

        Args:
            name: Corruption.
            size: Of a batch.
            severity: From 1 to 5; ``None`` goes through all.
        """
        if severity is not None and not 1 <= severity <= SEVERITIES:
            raise ConfigurationError(f"severity goes from 1 to {SEVERITIES}, got {severity}")
        if size < 1:
            raise ConfigurationError(f"the size of a batch must be at least 1, got {size}")
        y = self._labels()
        x = self._images(name, len(y))
        block = len(y) // SEVERITIES
        first, last = ((severity - 1) * block, severity * block) if severity else (0, len(y))
        for begin in range(first, last, size):
            rows = slice(begin, min(begin + size, last))
            images = np.ascontiguousarray(x[rows].transpose(0, 3, 1, 2))
            yield torch.from_numpy(images), torch.from_numpy(y[rows].astype(np.int64))

    def _labels(self) -> NDArray[Any]:
        check_folder(self.root, "CIFAR-10-C")
        y = self._read("labels")
        wanted = f"{self.SIZE:,}" if self.verify else f"a multiple of {SEVERITIES}"
        is_whole = len(y) == self.SIZE if self.verify else len(y) and len(y) % SEVERITIES == 0
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not is_whole:
            what = f"holds {y.dtype} {y.shape}, expected {wanted} whole numbers"
            raise self._unavailable("labels", what)
        if y.min() < 0 or y.max() > 9:
            raise self._unavailable("labels", f"has labels from {y.min()} to {y.max()}, not 0 to 9")
        return y

    def _images(self, name: str, count: int) -> NDArray[Any]:
        if name not in CORRUPTIONS:
            raise ConfigurationError(
                f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}"
            )
        x = self._read(name)
        expected = (count, *self.SHAPE)
        if x.dtype != np.uint8 or x.shape != expected:
            raise self._unavailable(name, f"holds {x.dtype} {x.shape}, expected uint8 {expected}")
        return x

    def _read(self, name: str) -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        if strangeness := strangeness_of(path):
            raise self._unavailable(name, f"is {strangeness}")
        try:
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged file can fail at any depth of its reader
            raise self._unavailable(name, f"cannot be read ({one_line(error)})") from error
        if not isinstance(found, np.ndarray) or found.ndim == 0:
            raise self._unavailable(name, "holds no array of images or labels")
        return found

    def _unavailable(self, name: str, what: str) -> DataUnavailableError:
        archive = self.root / f"{self.FOLDER}.tar"
        is_there = archive.is_file()
        way = (
            f"{archive} is there:" if is_there else f"fetch {archive.name} from {self.ADDRESS} and"
        )
        return DataUnavailableError(
            f"{self.folder / name}.npy {what}. It belongs to CIFAR-10-C, the 10,000 test images "
            f"under {len(CORRUPTIONS)} corruptions with {SEVERITIES} severities (2.9 GB): {way} "
            f"unpack it in {self.root}"
        )
