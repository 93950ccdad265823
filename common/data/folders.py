"""Data sets of JPEG files in a folder for each class: listed, decoded once, pixels kept."""

import hashlib
import io
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.base import ImageSource, Split
from common.data.reading import check_folder, one_line, read_jpeg
from common.errors import DataUnavailableError, RunDirectoryError, check_choice
from common.files import damage_of, strangeness_of, write_sealed

Listing = tuple[list[Path], list[int]]


class FolderSource(ImageSource):
    """Images ``train/<class>/images/*.JPEG`` and ``val/images/*.JPEG`` with their annotations.

    Images may be directly in their class's folder; those for validation, the test split, may be
    sorted into such folders, and need no ``val_annotations.txt`` then. Training images are ordered
    by their rank within the class, those for validation as annotated, or else by the number in
    their names. The decoded pixels are kept beside the folder as ``.<folder>.<split>.decoded.pt``:
    delete these files after editing an image in place.

    Args:
        root: Folder that has the data set's folder in it, or this folder itself.
        verify: Whether all images must be there. Switch it off for a subset.
    """

    folder: ClassVar[str]
    address: ClassVar[str]

    def __init__(self, root: str = "data", verify: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        self.verify = verify

    def prepare(self) -> None:
        """Checks the folder and decodes it, so that other processes find the pixels ready."""
        for split in self.sizes:
            self.load(split)

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        check_choice("split", split, Split)
        try:
            folder = self._find()
            files, labels = self._list(folder, split)
        except OSError as error:
            raise self._unavailable(f"{self.root} cannot be read ({one_line(error)})") from error
        except (KeyError, ValueError) as error:
            raise self._unavailable(
                f"{self.root} has an unknown class or a damaged annotation ({one_line(error)})"
            ) from error
        if not files:
            raise self._unavailable(f"{folder} has no image of the {split} split")
        if self.verify and len(files) != self.sizes[split]:
            raise self._unavailable(
                f"{folder} has {len(files):,} images of the {split} split, expected "
                f"{self.sizes[split]:,}",
                more="; for a subset set --data.source.verify false",
            )
        names = "\n".join(
            f"{self.folder}/{path.relative_to(folder)} {y}"
            for path, y in zip(files, labels, strict=True)
        )
        digest = hashlib.sha256(names.encode()).hexdigest()
        cache = folder.with_name(f".{folder.name}.{split}.decoded.pt")
        x = self._cached(cache, digest, len(files))
        if x is None:
            x = self._decode(files)
            self._keep(cache, {"x": x, "digest": digest})
        return x, torch.tensor(labels, dtype=torch.int64)

    def _find(self) -> Path:
        """The folder that has ``train`` and ``val``."""
        check_folder(self.root, self.spec.name)
        usual = self.root / self.folder
        for folder in (usual, self.root, usual / self.folder):
            if (folder / "train").is_dir() and (folder / "val").is_dir():
                return folder
        archive = self.root / f"{self.folder}.zip"
        if archive.is_file():
            if zipfile.is_zipfile(archive) and zipfile.ZipFile(archive).namelist():
                way = f"unzip {archive} -d {self.root}"
                raise self._unavailable(f"{archive} is there but not unpacked", way)
            raise self._unavailable(f"{archive} is there but damaged")
        if usual.is_dir():
            parts = " and ".join(p for p in ("train", "val") if not (usual / p).is_dir())
            raise self._unavailable(f"{usual} is not complete ({parts} missing)")
        raise self._unavailable(f"{usual} is {'a file' if usual.exists() else 'missing'}")

    def _list(self, folder: Path, split: Split) -> Listing:
        """Image files and their labels, in the order of the split."""
        annotations = folder / "val" / "val_annotations.txt"
        if split == "test" and annotations.is_file():
            lines = annotations.read_text(encoding="utf-8").splitlines()
            if any(line.strip() for line in lines):
                return self._annotated(folder / "val", lines)
        listing = self._sorted(folder / ("train" if split == "train" else "val"))
        if split == "test" and not listing[0]:
            state = "is empty" if annotations.is_file() else "is missing"
            raise self._unavailable(f"{annotations} {state}: nothing else has the labels")
        return listing

    def _sorted(self, folder: Path) -> Listing:
        """Images in a folder for each class: by rank for training, else by their number."""
        found: list[tuple[int, int, Path]] = []
        for path in sorted(folder.iterdir()):
            if not path.is_dir() or path.name.startswith(".") or path.name == "images":
                continue
            parts = [part for part in (path, path / "images") if part.is_dir()]
            files = [file for part in parts for file in sorted(part.iterdir())]
            for rank, file in enumerate(file for file in files if _is_jpeg(file)):
                place = rank if folder.name != "val" else _number(file)
                found.append((place, self._labels[path.name], file))
        found.sort(key=lambda item: item[:2])
        return [path for *_, path in found], [label for _, label, _ in found]

    def _annotated(self, folder: Path, lines: list[str]) -> Listing:
        """Images as annotated, in one folder or sorted into those of their classes."""
        files, labels = [], []
        for line in filter(str.strip, lines):
            name, label, *_ = line.split("\t")
            if not name or name == ".." or name != Path(name).name:
                raise ValueError(f"{name!r} is no name of a file in the folder")
            labels.append(self._labels[label])
            usual = folder / "images" / name
            places = (usual, folder / label / "images" / name, folder / label / name)
            files.append(next((path for path in places if path.is_file()), usual))
        lost = [path for path in files if not path.is_file()]
        if lost:
            raise self._unavailable(
                f"{lost[0]} is missing, one of {len(lost):,} images that are annotated"
            )
        return files, labels

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.spec.class_names)}

    def _unavailable(self, what: str, way: str = "", more: str = "") -> DataUnavailableError:
        way = way or f"fetch {self.address} and unpack it in {self.root}"
        return DataUnavailableError(f"{self.spec.name}: {what}: {way}{more}")

    def _decode(self, files: list[Path]) -> Tensor:
        x = torch.empty((len(files), *self.spec.shape), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # the decoder releases the interpreter lock
            for row, image in enumerate(pool.map(self._decode_one, files)):
                x[row] = torch.from_numpy(image)
        return x

    def _decode_one(self, path: Path) -> NDArray[np.uint8]:
        try:
            return read_jpeg(path, self.spec.shape[:0:-1])
        except Exception as error:  # a damaged file can fail at any depth of its decoder
            what = strangeness_of(path) or one_line(error)
            what = f"{path} is a damaged image or none of this set ({what})"
            raise self._unavailable(what) from error

    def _cached(self, cache: Path, digest: str, count: int) -> Tensor | None:
        """The kept pixels, or None where there are none of these very files."""
        if not cache.is_file():
            return None
        try:
            if damage := damage_of(cache):
                raise ValueError(damage)
            content = torch.load(cache, weights_only=True)
            x: Tensor = content["x"]
            is_fit = x.shape == (count, *self.spec.shape) and x.dtype == torch.uint8
            if content["digest"] == digest and is_fit:
                return x
        except Exception as error:  # the images are decoded again in any case
            what = f"{cache} is damaged ({one_line(error)}); the images are decoded again"
            warnings.warn(what, stacklevel=2)
        return None

    def _keep(self, cache: Path, content: dict[str, Any]) -> None:
        archive = io.BytesIO()
        torch.save(content, archive)
        try:
            write_sealed(cache, archive)
        except RunDirectoryError as error:
            what = f"the decoded images could not be kept as {cache} ({error})"
            warnings.warn(f"{what}; every run will decode them again", stacklevel=2)


def _is_jpeg(path: Path) -> bool:
    """Whether it is named so, and does not only describe another file on a Mac."""
    return path.suffix.lower() in (".jpeg", ".jpg") and not path.name.startswith(".")


def _number(path: Path) -> int:
    """The last number in a file's name, such as 17 of ``val_17.JPEG``."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0
