"""Shared by tests of the data modules: a stand-in for a trainer, and a model that takes notes."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from common.data.base import ImageSource, ImageSpec, Split
from common.data.images import ImageDataModule
from common.data.sources import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from common.errors import DataUnavailableError


def _stub_trainer(
    world_size: int = 1,
    rank: int = 0,
    epoch: int = 0,
    training: bool = False,
    accumulate: int = 1,
    batches: float = math.inf,
) -> SimpleNamespace:
    """As much of a trainer as the data module looks at."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    return SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        current_epoch=epoch,
        training=training,
        accumulate_grad_batches=accumulate,
        num_training_batches=batches,
        precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(restarting=False, batch_progress=progress)
        ),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )


class _Recorder(LightningModule):
    """Writes down what each step is given, and learns nothing of use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[tuple[str, int, list[int], Tensor]] = []

    def note(self, stage: str, batch: dict[str, Tensor]) -> None:
        self.steps.append((stage, self.current_epoch, batch["index"].tolist(), batch["x"].cpu()))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.note("train", batch)
        return self.weight * batch["x"].mean()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.note("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note("test", batch)

    def predict_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _InterruptAt(ModelCheckpoint):
    """Saves after every step, and stops the run at one of them."""

    class Stopped(Exception):  # noqa: N818
        """The run was interrupted."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(dirpath=folder, save_last=True, every_n_train_steps=1)
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.step:
            raise self.Stopped


@pytest.fixture
def stub_trainer() -> Any:
    return _stub_trainer


@pytest.fixture
def Recorder() -> Any:  # noqa: N802
    return _Recorder


@pytest.fixture
def InterruptAt() -> Any:  # noqa: N802
    return _InterruptAt


def _error_of(call: Callable[[], object]) -> str:
    """The message of the DataUnavailableError that the call raises: always a single line."""
    with pytest.raises(DataUnavailableError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def error_of() -> Callable[[Callable[[], object]], str]:
    return _error_of


@pytest.fixture
def stranger() -> Iterator[None]:
    """The test runs without the permissions of root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that anybody may list and write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


FAKES = {
    CIFAR10: "fake_cifar10",
    CIFAR100: "fake_cifar100",
    SVHN: "fake_svhn",
    MNIST: "fake_mnist",
    FashionMNIST: "fake_fashion_mnist",
}


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Path:
    """The folder of a small set in the format of the data set ``cls`` of the test."""
    folder: Path = request.getfixturevalue(FAKES[request.getfixturevalue("cls")])
    return folder


class _Memory(ImageSource):
    """Random images without a zero, so that the padding of a crop can be told from them."""

    def __init__(self, n: int = 100, n_test: int = 23, classes: int = 4) -> None:
        self.sizes: dict[Split, int] = {"train": n, "test": n_test}
        names = tuple("abcdefghij"[:classes])
        self.spec = ImageSpec("Memory", classes, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, names)

    def prepare(self) -> None:
        pass

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        n = self.sizes[split]
        generator = torch.Generator().manual_seed(5)
        x = torch.randint(1, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return x, torch.arange(n) % self.spec.num_classes


def _module(
    source: ImageSource | None = None, trainer: Any = None, **kwargs: Any
) -> ImageDataModule:
    data = ImageDataModule(source or _Memory(), **kwargs)
    data.trainer = trainer  # type: ignore[assignment]
    data.setup()
    return data


def _slow_shift_and_flip(
    x: Tensor, shift: Tensor, is_flipped: Tensor, padding: int, padding_mode: str = "zero"
) -> Tensor:
    mode = "constant" if padding_mode == "zero" else padding_mode
    padded = F.pad(x.float(), (padding,) * 4, mode=mode)
    out = []
    for k, (top, left) in enumerate(shift.tolist()):
        crop = padded[k, :, top : top + x.shape[2], left : left + x.shape[3]]
        out.append(crop.flip(2) if is_flipped[k] else crop)
    return torch.stack(out).to(x.dtype)


@pytest.fixture
def Memory() -> type[ImageSource]:  # noqa: N802
    """A source of random images without a zero."""
    return _Memory


@pytest.fixture
def module() -> Callable[..., ImageDataModule]:
    """``module(source=None, trainer=None, **settings)``: a data module that has been set up."""
    return _module


@pytest.fixture
def slow_shift_and_flip() -> Callable[..., Tensor]:
    """Crop and flip by padding and slicing, image by image."""
    return _slow_shift_and_flip
