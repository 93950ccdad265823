"""Test data by name: a class of ``torchvision.datasets``, or a folder of images."""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.images import ImageDataModule
from common.errors import ConfigurationError, DataUnavailableError, UserError
from common.evaluation.images import READ
from common.evaluation.runner import Team

TORCHVISION = "torchvision:"
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

    def __init__(self, data: ImageDataModule) -> None:
        self.split: Any = data._dataset("test", None, None)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        batch = self.split[i]
        return batch["x"].float() / 255.0, batch["y"]


def is_named(data: str) -> bool:
    """Whether these data are of torchvision or in a folder."""
    return data.startswith(TORCHVISION) or Path(data).is_dir()


def named(data: str, root: str | None, resize: int | None, crop: int | None) -> NamedData:
    """The images of ``torchvision:NAME`` or of a folder with a folder for each class.

    Args:
        data: The name or folder.
        root: Folder of torchvision's files, by default ``data``.
        resize: The shorter side of the images after bilinear resizing; ``None`` keeps them.
        crop: The side of the centre that is cut out; ``None`` keeps all.

    Raises:
        ConfigurationError: If torchvision has no such class, or the sizes do not fit.
        DataUnavailableError: If the images are not there.
    """
    from torchvision import transforms

    for setting, size in (("data_resize", resize), ("data_crop", crop)):
        if size is not None and size < 1:
            raise ConfigurationError(f"{setting} must be at least 1 pixel, got {size}")
    if resize is not None and crop is not None and crop > resize:
        raise ConfigurationError(
            f"data_crop {crop} is larger than data_resize {resize}; choose a smaller one"
        )
    steps = [] if resize is None else [transforms.Resize(resize)]
    steps += [] if crop is None else [transforms.CenterCrop(crop)]
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    team, examples, problem = Team.of_processes(), None, None
    if team.rank == 0:  # fetches the files; all processes raise its error
        try:
            examples = _opened(data, root, transform)
        except UserError as error:
            problem = error
    for found in filter(None, team.gather(problem)):
        raise found
    examples = examples or _opened(data, root, transform)
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
