"""Test data by name: a data section, a class of ``torchvision.datasets``, a folder of images."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import ConfigurationError, DataUnavailableError
from common.evaluation.images import READ
from common.evaluation.models import build_sections
from common.evaluation.names import TORCHVISION, is_stream
from common.evaluation.runner import Team
from common.limits import read_yaml
from common.packages import data_sections, file_named
from common.parsing import load_named

if TYPE_CHECKING:  # it imports Lightning
    from common.data.images import ImageDataModule

SPLITS = ("test", "val")
WORTH_WORKERS = 2000
"""Images from which on processes are started to decode them."""


@dataclass(frozen=True)
class NamedData:
    """Images as :func:`common.evaluation.inputs.collect` takes them, and their classes."""

    examples: Any
    num_classes: int | None = None
    class_names: Sequence[str] | None = None


class Pixels(Dataset[tuple[Tensor, Tensor]]):
    """The test split of a data module, images in float32 in [0, 1]."""

    def __init__(self, data: "ImageDataModule") -> None:
        self.split: Any = data._dataset("test", None, None)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        batch = self.split[i]
        return batch["x"].float() / 255.0, batch["y"]


def find_data(
    name: str, root: str | None = None, resize: int | None = None, crop: int | None = None
) -> NamedData:
    """Test images by name.

    Args:
        name: A data section, a YAML file of one, ``torchvision:CLASS``, or a folder with a folder
            of images for each class.
        root: Folder of the files, for data that have some.
        resize: The shorter side of the images after bilinear resizing; ``None`` keeps them. This
            and ``crop`` are for torchvision's data and folders.
        crop: The side of the centre that is cut out; ``None`` keeps all.

    Raises:
        ConfigurationError: If there are no such data, or a setting does not fit them.
        DataUnavailableError: If the images are not there and cannot be fetched.
    """
    if is_stream(name):
        return _streamed(name, root, _transform(resize, crop))
    if resize is not None or crop is not None:
        raise ConfigurationError(
            f"data_resize and data_crop are for torchvision's data and folders, not {name!r}; "
            "drop them"
        )
    return of_module(load_section(name, root))


def load_section(name: str, root: str | None = None) -> "ImageDataModule":
    """The data module of a section ``common/configs/NAME.yaml`` or of a file.

    Raises:
        ConfigurationError: If there is none.
    """
    path = file_named(name, data_sections(), "data section")
    section = read_yaml(path)
    if root is not None:
        _set_root(section, root, path)
    data: ImageDataModule = build_sections({"data": section}, path).data
    return data


def of_module(data: "ImageDataModule") -> NamedData:
    """The test images of a data module; the first process fetches them.

    Raises:
        DataUnavailableError: If the files are not there and cannot be fetched.
    """
    Team.of_processes().first(data.prepare_data)
    data.setup("test")
    return NamedData(Pixels(data), data.num_classes, data.class_names)


def _set_root(section: Any, root: str, path: Path) -> None:
    """Put the folder of the files into a data section."""
    source = section.get("source") if isinstance(section, dict) else None
    source = {"class_path": source} if isinstance(source, str) else source
    if not isinstance(source, dict) or not _has_root(source["class_path"]):
        raise ConfigurationError(
            f"--data_root is {root}, and the data {str(path)!r} have no files; drop --data_root"
        )
    section["source"] = source | {"init_args": {**(source.get("init_args") or {}), "root": root}}


def _has_root(class_path: str) -> bool:
    return "root" in inspect.signature(load_named(class_path)).parameters


def _transform(resize: int | None, crop: int | None) -> Callable[[Any], Tensor]:
    """A picture to a tensor, after resizing and cutting."""
    from torchvision import transforms

    for setting, size in (("data_resize", resize), ("data_crop", crop)):
        if size is not None and size < 1:
            raise ConfigurationError(f"{setting} must be at least 1 pixel, got {size}")
    if resize is not None and crop is not None and crop > resize:
        raise ConfigurationError(
            f"data_crop {crop} is larger than data_resize {resize}; choose a smaller one"
        )
    steps = [] if resize is None else [transforms.Resize(resize)]
    steps += [] if crop is None else [partial(_cut, crop)]
    transform: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.ToTensor()])
    return transform


def _cut(side: int, image: Any) -> Any:
    """The centre of a picture."""
    from torchvision.transforms.functional import center_crop

    if min(image.size) < side:  # it would be padded with black
        width, height = image.size
        raise ValueError(f"data_crop is {side} and an image has {width}x{height} pixels")
    return center_crop(image, [side, side])


def _streamed(name: str, root: str | None, transform: Callable[[Any], Tensor]) -> NamedData:
    """Images that are decoded when they are read; the first process fetches them."""
    examples = Team.of_processes().first(lambda: _opened(name, root, transform))
    examples = examples or _opened(name, root, transform)
    classes = getattr(examples, "classes", None)
    names = [str(name) for name in classes] if isinstance(classes, list) else None
    workers = min(8, os.cpu_count() or 1) if len(examples) > WORTH_WORKERS else 0
    loader = DataLoader(examples, batch_size=READ, num_workers=workers)
    return NamedData(loader, len(names) if names else None, names)


def _opened(data: str, root: str | None, transform: Any) -> Any:
    """The data set of torchvision, at its test split, or else that for validation."""
    from torchvision import datasets

    if not data.startswith(TORCHVISION):
        if root is not None:
            raise ConfigurationError(f"--data_root is {root}, and {data} is a folder; drop it")
        name, folder = "ImageFolder", data
    else:
        name, folder = data.removeprefix(TORCHVISION), root or "data"
    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or not isinstance(kind, type):
        raise ConfigurationError(
            f"torchvision.datasets has no {name!r}; it has {', '.join(sorted(datasets.__all__))}"
        )
    taken = inspect.signature(kind).parameters
    choices: list[dict[str, Any]] = [{}]
    if "train" in taken:
        choices = [{"train": False}]
    elif "split" in taken:
        choices = [{"split": split} for split in SPLITS]
    settings = {"root": folder, "download": True}
    given = {key: value for key, value in settings.items() if key in taken}
    problem: Exception | None = None
    for choice in choices:
        try:
            return kind(**given, **choice, transform=transform)
        except ValueError as error:  # it has no such split
            problem = error
        except Exception as error:  # foreign code fails in any way
            problem = error
            break
    reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    raise DataUnavailableError(f"{data} cannot be opened: {reason}") from problem
