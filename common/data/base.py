"""Interface of image sources: a specification, and two splits as uint8 tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[Any]]


@dataclass(frozen=True)
class ImageSpec:
    """What is known about a data set before any file is read.

    ``shape`` is that of one image, ``(C, H, W)``; ``mean`` and ``std`` are of the training split,
    per channel, for pixels in [0, 1]; ``class_names`` are in the order of the labels.
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


class ImageSource(ABC):
    """A data set with a training and a test split, held in memory as uint8.

    A file that is missing, altered or cannot be read raises a DataUnavailableError.
    """

    spec: ImageSpec
    sizes: ClassVar[Mapping[Split, int]] = {}
    """Images of each split of the whole set, where they are known before a file is read."""

    @abstractmethod
    def prepare(self) -> None:
        """Fetches and checks the files; called by one process per machine."""

    @abstractmethod
    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images, uint8 ``(N, C, H, W)`` in [0, 255], and labels, int64 ``(N,)``."""


def check_arrays(images: NDArray[Any], labels: NDArray[Any], spec: ImageSpec) -> None:
    """Compare what a file held with the specification; a ValueError says what does not fit."""
    if images.dtype != np.uint8 or images.shape[1:] != spec.shape:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape[1:])}, expected uint8 {spec.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected whole numbers (N,)")
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, expected 0 to "
            f"{spec.num_classes - 1}"
        )


def as_tensors(
    images: NDArray[np.uint8], labels: NDArray[Any], spec: ImageSpec
) -> tuple[Tensor, Tensor]:
    """Arrays that fit the specification, see :func:`check_arrays`, as tensors."""
    check_arrays(images, labels, spec)
    y = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
    return torch.from_numpy(np.require(images, requirements=["C", "W"])), y
