"""Test images under common corruptions, from the files of CIFAR-10-C, ImageNet-C and the like."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.reading import check_folder, one_line, read_jpeg
from common.errors import ConfigurationError, DataUnavailableError, listed
from common.files import file_digest, strangeness_of

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "frost", "fog", "brightness", "spatter"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
)
FOR_VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
TESTED = tuple(name for name in CORRUPTIONS if name not in FOR_VALIDATION)
"""The 15 corruptions of the benchmark (Hendrycks & Dietterich 2019, Section 4.1)."""
SEVERITIES = 5


class Corrupted(ABC):
    """N test images under corruptions, each at severities from 1 to 5, in one order.

    What is missing, damaged or does not fit raises a DataUnavailableError.

    Args:
        folder: Of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def labels(self, name: str, severity: int) -> NDArray[np.int64]:
        """Of the N images, after a check that all of them are there."""

    @abstractmethod
    def read(self, name: str, severity: int, rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """The images in these rows, uint8 ``(len(rows), *shape)``, shape ``(C, H, W)``."""

    @abstractmethod
    def digest(self, name: str, severity: int) -> str:
        """Of what decides the images."""

    def _unavailable(self, path: Path, what: str) -> DataUnavailableError:
        return DataUnavailableError(f"{path} {what}: copy or unpack the corrupted images again")


def find_corrupted(root: str | Path) -> Corrupted:
    """The corrupted images in a folder: arrays if it has ``labels.npy``, else folders of JPEGs."""
    folder = Path(root).expanduser().absolute()
    if not folder.is_dir():
        check_folder(folder, "corrupted images")
        raise DataUnavailableError(
            f"{folder} is missing, expected a folder of <corruption>.npy and labels.npy, or of "
            "<corruption>/<severity>/<class>/*.JPEG: correct the root"
        )
    return CorruptedArrays(folder) if any(folder.glob("*.npy")) else CorruptedFolders(folder)


class CorruptedArrays(Corrupted):
    """The layout of CIFAR-10-C.

    A file ``<corruption>.npy``, uint8 ``(5 N, H, W, C)``, has the test images five times, in the
    order of severity; ``labels.npy`` has their 5 N labels. Rows are read when they are asked for.
    """

    def labels(self, name: str, severity: int) -> NDArray[np.int64]:
        """See :meth:`Corrupted.labels`."""
        y = self._labels()
        self._images(name)
        return y[: len(y) // SEVERITIES].astype(np.int64)

    def read(self, name: str, severity: int, rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """See :meth:`Corrupted.read`."""
        x = self._images(name)  # mapped anew: pages that were read do not stay in memory
        expected = (*shape[1:], shape[0])
        if x.shape[1:] != expected:
            what = f"has images of {x.shape[1:]}, and the data {expected} (H, W, C)"
            raise DataUnavailableError(f"{self._path(name)} {what}: give data of this size")
        at = np.asarray(rows, dtype=np.int64) + (severity - 1) * (len(x) // SEVERITIES)
        return torch.from_numpy(np.array(x[at].transpose(0, 3, 1, 2), order="C"))

    def digest(self, name: str, severity: int) -> str:
        """SHA-256 of the file."""
        path = self._path(name)
        return _file_digest(path, path.stat().st_mtime_ns)

    def _labels(self) -> NDArray[Any]:
        y = self._read("labels")
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not len(y) or y.min() < 0:
            raise self._unavailable(
                self._path("labels"), f"holds {y.dtype} {y.shape}, not labels from 0 (5 N,)"
            )
        blocks = y.reshape(SEVERITIES, -1) if len(y) % SEVERITIES == 0 else y[:0]
        if not len(blocks) or (blocks != blocks[0]).any():
            raise self._unavailable(
                self._path("labels"),
                f"has {len(y):,} labels, expected those of the test images five times over",
            )
        return y

    def _images(self, name: str) -> NDArray[Any]:
        x, count = self._read(name), len(self._labels())
        if x.dtype != np.uint8 or x.ndim != 4 or len(x) != count:
            raise self._unavailable(
                self._path(name), f"holds {x.dtype} {x.shape}, expected uint8 ({count}, H, W, C)"
            )
        return x

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _read(self, name: str) -> NDArray[Any]:
        path = self._path(name)
        if strangeness := strangeness_of(path):
            raise self._unavailable(path, f"is {strangeness}")
        try:
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged file can fail at any depth of its reader
            raise self._unavailable(path, f"cannot be read ({one_line(error)})") from error
        if not isinstance(found, np.ndarray) or found.ndim == 0:
            raise self._unavailable(path, "holds no array of images or labels")
        return found


class CorruptedFolders(Corrupted):
    """The layout of ImageNet-C: ``<corruption>/<severity>/<class>/*.JPEG``.

    Classes are numbered and images ordered by name, as ``torchvision.datasets.ImageFolder`` does.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files: list[str] = []
        self._digests: dict[tuple[str, int], str] = {}

    def labels(self, name: str, severity: int) -> NDArray[np.int64]:
        """See :meth:`Corrupted.labels`."""
        self.digest(name, severity)
        classes = [file.partition("/")[0] for file in self._files]
        return np.unique(classes, return_inverse=True)[1].astype(np.int64)

    def read(self, name: str, severity: int, rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """See :meth:`Corrupted.read`."""
        files = [self.folder / name / str(severity) / self._files[row] for row in rows]
        with ThreadPoolExecutor() as pool:  # the decoder releases the interpreter lock
            images = list(pool.map(partial(self._decode, shape=shape), files))
        return torch.from_numpy(np.stack(images))

    def digest(self, name: str, severity: int) -> str:
        """SHA-256 of the names and sizes of all files: to read them all would take hours."""
        key = name, severity
        if key not in self._digests:
            self._digests[key] = self._listed(name, severity)
        return self._digests[key]

    def _decode(self, path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        try:
            return read_jpeg(path, (shape[2], shape[1]))
        except Exception as error:  # a damaged file can fail at any depth of its decoder
            what = f"cannot be shown to this model ({strangeness_of(path) or one_line(error)})"
            raise self._unavailable(path, what) from error

    def _listed(self, name: str, severity: int) -> str:
        """Compare the files with those of the first folder that was listed; their digest."""
        folder = self.folder / name / str(severity)
        try:
            found = {
                f"{part.name}/{file.name}": file.stat().st_size
                for part in folder.iterdir()
                if part.is_dir()
                for file in part.iterdir()
                if file.suffix.lower() in (".jpeg", ".jpg") and not file.name.startswith(".")
            }
        except OSError as error:
            raise self._unavailable(folder, f"cannot be listed ({one_line(error)})") from error
        # Class by class: names of classes may be the beginnings of others.
        names = sorted(found, key=lambda file: file.split("/"))
        self._files = self._files or names
        if not names:
            raise self._unavailable(folder, "has no <class>/*.JPEG")
        if names != self._files:
            differing = sorted(set(names) ^ set(self._files))
            what = f"and a folder before it differ in {len(differing):,} images"
            raise self._unavailable(folder, f"{what}, {listed(differing, 1)}")
        return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


@cache
def _file_digest(path: Path, _: int) -> str:
    return file_digest(path)


class CIFAR10C(CorruptedArrays):
    """CIFAR-10-C, as published: the 10,000 test images of CIFAR-10 under 19 corruptions.

    They are read a batch at a time. A file that is missing, damaged or something else raises a
    DataUnavailableError.

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
        super().__init__(self.root if is_inner else self.root / self.FOLDER)
        self.verify = verify

    def check(self, names: tuple[str, ...] = CORRUPTIONS) -> int:
        """Open the files of these corruptions, and count the images that each has."""
        count = len(self._labels())
        for name in names:
            self._images(name)
        return count

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
        x, y = self._images(name), self._labels()
        block = len(y) // SEVERITIES
        first, last = ((severity - 1) * block, severity * block) if severity else (0, len(y))
        for begin in range(first, last, size):
            rows = slice(begin, min(begin + size, last))
            images = np.ascontiguousarray(x[rows].transpose(0, 3, 1, 2))
            yield torch.from_numpy(images), torch.from_numpy(y[rows].astype(np.int64))

    def _labels(self) -> NDArray[Any]:
        check_folder(self.root, self.FOLDER)
        y = super()._labels()
        if self.verify and len(y) != self.SIZE:
            what = f"holds {y.dtype} {y.shape}, expected {self.SIZE:,} whole numbers"
            raise self._unavailable(self._path("labels"), what)
        if y.max() > 9:
            what = f"has labels up to {y.max()}, not 0 to 9"
            raise self._unavailable(self._path("labels"), what)
        return y

    def _images(self, name: str) -> NDArray[Any]:
        if name not in CORRUPTIONS:
            raise ConfigurationError(
                f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}"
            )
        x = super()._images(name)
        if x.shape[1:] != self.SHAPE:
            what = f"has images of {x.shape[1:]}, expected uint8 (N, 32, 32, 3)"
            raise self._unavailable(self._path(name), what)
        return x

    def _unavailable(self, path: Path, what: str) -> DataUnavailableError:
        archive = self.root / f"{self.FOLDER}.tar"
        is_there = archive.is_file()
        way = (
            f"{archive} is there:" if is_there else f"fetch {archive.name} from {self.ADDRESS} and"
        )
        return DataUnavailableError(
            f"{path} {what}. It belongs to CIFAR-10-C, the 10,000 test images "
            f"under {len(CORRUPTIONS)} corruptions with {SEVERITIES} severities (2.9 GB): {way} "
            f"unpack it in {self.root}"
        )
