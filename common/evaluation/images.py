"""Images of an evaluation that are too many for memory, read by rows.

A data set with ``__getitem__`` is read anew whenever rows of it are needed. Anything that can only
be iterated is written once to a temporary file.
"""

import ctypes
import hashlib
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigurationError, RunDirectoryError

Examples = Mapping[str, Any]
"""``x`` (a tensor or :class:`Images`, float32 in [0, 1]), ``y``, ``index`` and maybe ``position``,
tensors ``(N,)``."""

IN_MEMORY = 2**28
"""Bytes of images in float32 up to which all of them stay in memory."""
READ = 64
"""Images that are read together where no chunk is asked for."""

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Images:
    """Images ``(N, C, H, W)``, float32 in [0, 1]; indexed by rows or a slice they give a tensor.

    ``digest`` is that of all values, see :func:`digest_of`.
    """

    shape: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Tensor:
        _give_back_memory()
        return self._read(torch.arange(len(self))[rows].tolist())

    def _read(self, rows: list[int]) -> Tensor:
        raise NotImplementedError


class FromDataset(Images):
    """Reads a data set whenever it is asked, and refuses images that differ from the first reading.

    Args:
        read: Positions in the data set to images.
        shape: Of all images.
        sums: CRC-32 of every image.
        digest: Of all images.
    """

    def __init__(
        self,
        read: Callable[[list[int]], Tensor],
        shape: tuple[int, ...],
        sums: Sequence[int],
        digest: str,
    ) -> None:
        self.read, self.shape, self.digest = read, shape, digest
        self._sums = np.array(sums, dtype=np.uint32)

    def _read(self, rows: list[int]) -> Tensor:
        if not rows:
            return torch.empty(0, *self.shape[1:])
        x = self.read(rows)
        for row, found in zip(rows, sums_of(x), strict=True):
            if found != self._sums[row]:
                raise ConfigurationError(
                    f"image {row} of the data set differs from its first reading, so attacks would "
                    "be about different images; use transforms without random numbers, or pass a "
                    "DataLoader, which is read once"
                )
        return x


class Stored(Images):
    """Images in a temporary file, as bytes where all pixels are multiples of 1/255."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = (0, *shape)
        self._at: list[tuple[int, type[Any]]] = []
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _unwritable(error) from error

    def add(self, x: Tensor) -> None:
        """Append images."""
        for image in x.numpy():
            codes = np.rint(image * 255).astype(np.uint8)
            kept = codes if np.array_equal(_decoded(codes), image) else np.ascontiguousarray(image)
            try:
                os.pwrite(self._file.fileno(), kept.tobytes(), self._end)
            except OSError as error:
                raise _unwritable(error) from error
            self._at.append((self._end, kept.dtype.type))
            self._end += kept.nbytes
        self.shape = (len(self._at), *self.shape[1:])

    def _read(self, rows: list[int]) -> Tensor:
        shape = self.shape[1:]
        x = np.empty((len(rows), *shape), dtype=np.float32)
        for image, row in zip(x, rows, strict=True):
            offset, kind = self._at[row]
            size = image.size * np.dtype(kind).itemsize
            found = np.frombuffer(os.pread(self._file.fileno(), size, offset), kind).reshape(shape)
            image[:] = _decoded(found) if kind is np.uint8 else found
        return torch.from_numpy(x)


class Gathering:
    """Collects images batch by batch.

    Args:
        read: Positions to images, for a data set that can be read again; ``None`` for a stream.
    """

    def __init__(self, read: Callable[[list[int]], Tensor] | None = None) -> None:
        self._read = read
        self._digest = hashlib.sha256()
        self._sums: list[int] = []
        self._parts: list[Tensor] = []
        self._stored: Stored | None = None
        self._shape: tuple[int, ...] = ()
        self._bytes = 0

    def add(self, x: Tensor) -> None:
        """Append images, float32; a ConfigurationError if they have another shape."""
        self._shape = self._shape or tuple(x.shape[1:])
        if tuple(x.shape[1:]) != self._shape:
            shapes = sorted({self._shape, tuple(x.shape[1:])})
            raise ConfigurationError(
                f"all images must have one shape, got {', '.join(map(str, shapes))}; resize or "
                "crop them"
            )
        _update(self._digest, x)
        self._bytes += 4 * x.numel()
        if self._read is not None:
            if not self._sums and not torch.equal(self._read(list(range(len(x)))), x):
                self._read = None  # it draws random numbers: what was read first is kept
            self._sums += sums_of(x)
        self._parts.append(x)
        if self._bytes <= IN_MEMORY:
            return
        if self._read is None:
            self._stored = self._stored or Stored(self._shape)
            for part in self._parts:
                self._stored.add(part)
        self._parts = []
        _give_back_memory()

    def images(self) -> Tensor | Images:
        """All of them; a ConfigurationError if there are none."""
        if not self._bytes:
            raise ConfigurationError("data has no examples")
        if self._bytes <= IN_MEMORY:
            return torch.cat(self._parts)
        if self._read is not None:
            shape = (len(self._sums), *self._shape)
            return FromDataset(self._read, shape, self._sums, self._digest.hexdigest())
        stored = self._stored or Stored(self._shape)
        stored.digest = self._digest.hexdigest()
        return stored


def _give_back_memory() -> None:
    """Return freed memory to the system.

    glibc keeps what lies below a block that is still used; over many chunks that adds up to more
    than the images would take.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def chunks_of(x: Any, size: int = READ) -> Iterator[Tensor]:
    """The images ``(N, C, H, W)`` in order, in chunks."""
    return (x[begin : begin + size] for begin in range(0, len(x), size))


def digest_of(x: Tensor | Images) -> str:
    """SHA-256 of all pixels in float32, the same for every form of the images."""
    if isinstance(x, Images):
        return x.digest
    digest = hashlib.sha256()
    for part in chunks_of(x):
        _update(digest, part)
    return digest.hexdigest()


def sums_of(x: Tensor) -> list[int]:
    """CRC-32 of each image."""
    return [zlib.crc32(np.ascontiguousarray(image).data) for image in x.numpy()]


def _update(digest: Any, x: Tensor) -> None:
    digest.update(np.ascontiguousarray(x.detach().cpu().float().numpy()).data)


def _decoded(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    return codes.astype(np.float32) / np.float32(255.0)


def _unwritable(error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"the images cannot be kept in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a "
        "folder with free space, or pass a data set with __getitem__, which is read again instead"
    )
