"""Readers of untrusted files: they run no code, bound the memory and say what is wrong.

A damaged file can fail at any depth of its reader, with exceptions of many kinds.
"""

import gzip
import hashlib
import os
import pickle
import secrets
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from common.errors import DataUnavailableError, listed
from common.files import expansion_of, most_unpacked


def check_folder(root: Path, name: str) -> None:
    """Refuse a root that is neither a folder that can be listed nor a place for a new one."""
    try:
        with os.scandir(root):
            pass
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not root.is_symlink():
            return
        what = f"not readable ({error.strerror or error})"
        if isinstance(error, NotADirectoryError):
            what = "a file" if root.is_file() else "below a file"
        raise DataUnavailableError(
            f"{root} is {what}, expected the folder that has, or will have, {name}: correct "
            "the root, or its permissions"
        ) from error


def one_line(error: BaseException) -> str:
    """Class and message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def md5_of(path: Path) -> str:
    """MD5 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists, strings and dictionaries only: any other pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = {"ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"}
        is_array = module.split(".")[0] == "numpy" and name in arrays
        if is_array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a set of images")


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of arrays and lists, without running anything that a pickle could run."""
    with path.open("rb") as file:
        entry = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}, expected a dictionary")
    # Python 2 wrote the official keys as text; Python 3 tools often write bytes.
    return {k.decode() if isinstance(k, bytes) else k: v for k, v in entry.items()}


def map_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, memory-mapped and read-only; none of them is read.

    A compressed one is unpacked once, into ``.<file>.<array>.<CRC-32>.npy`` beside the file.
    """
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename[:-4]: _mapped(archive, info, path) for info in members}


def _mapped(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        return _map_npy(_unpacked(archive, member, path), 0, member.file_size)
    with path.open("rb") as file:  # the lengths of a name and an extra field, before the content
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
    return _map_npy(path, member.header_offset + 30 + sum(lengths), member.file_size)


def _map_npy(path: Path, begin: int, size: int) -> NDArray[Any]:
    """An array in numpy's format that begins at this byte and takes ``size`` of them."""
    form = np.lib.format
    with path.open("rb") as file:
        file.seek(begin)
        headers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        shape, is_fortran, dtype = headers[form.read_magic(file)](file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only allow_pickle would read")
    found = np.memmap(path, dtype, "r", offset, shape, "F" if is_fortran else "C")
    if offset - begin + found.nbytes != size:
        raise ValueError(f"an array of {found.nbytes:,} bytes in {size:,} of the archive")
    return found


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Path:
    """The file that a compressed array is unpacked into, by one process at a time."""
    stem = f".{path.name}.{Path(member.filename).stem}.{member.CRC:08x}"
    target = path.with_name(f"{stem}.npy")
    temporary = path.with_name(f"{stem}-{secrets.token_hex(4)}.tmp")
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not target.is_file():
                try:
                    with archive.open(member) as packed, temporary.open("xb") as file:
                        shutil.copyfileobj(packed, file, 2**20)
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"it is compressed and cannot be unpacked beside it ({error.strerror}): make room "
            "there, or write it with numpy.savez"
        ) from error
    return target


def whole_numbers(values: Any) -> NDArray[Any]:
    """An array, or a list of numbers, as an array; nested lists could be longer than any memory."""
    is_list = isinstance(values, list) and all(isinstance(v, int | np.integer) for v in values)
    if not is_list and not isinstance(values, np.ndarray):
        raise ValueError(f"labels are a {type(values).__name__}, expected whole numbers")
    return np.asarray(values)


def read_unpacked(path: Path) -> bytes:
    """Content of a file, unpacked if it is a gzip file by content."""
    with path.open("rb") as plain:
        if plain.read(2) != b"\x1f\x8b":
            return path.read_bytes()
    with gzip.open(path) as file:
        content = file.read(most_unpacked(path) + 1)
    if problem := expansion_of(len(content), path):
        raise ValueError(problem)
    return content


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the IDX format: two zeros, type, rank, big-endian sizes, content."""
    content = read_unpacked(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} is no IDX file of bytes")
    sizes = np.frombuffer(content, dtype=">u4", count=content[3], offset=4).tolist()
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy()


def read_mat(path: Path, names: tuple[str, ...]) -> list[NDArray[Any]]:
    """Arrays of a MATLAB file up to version 7."""
    from scipy.io import loadmat, whosmat  # slow to import, and only needed here

    try:
        shapes = {name: shape for name, shape, _ in whosmat(path)}
        for name in names:
            if name not in shapes:
                raise ValueError(f"there is no {name} in it, only {listed(shapes)}")
            if problem := expansion_of(int(np.prod(shapes[name], dtype=float)), path):
                raise ValueError(problem)
        content = loadmat(path, variable_names=names)
    except NotImplementedError as error:  # HDF5
        raise ValueError("MATLAB's version 7.3; save it with -v7") from error
    return [content[name] for name in names]


def read_jpeg(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image as ``(3, H, W)`` that has this width and height.

    Nothing is decoded otherwise, and no other format is tried, since some run programs.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            if image.size != size:
                raise ValueError(f"{image.size[0]}x{image.size[1]}, not {size[0]}x{size[1]}")
            return np.array(image.convert("RGB")).transpose(2, 0, 1)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
