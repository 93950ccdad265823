import math
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from common import files
from common.data.base import ImageSource, ImageSpec, Split
from common.data.extra import ExtraImages, MixedSampler
from common.data.images import ImageDataModule
from common.data.sources import CIFAR10
from common.errors import ConfigurationError, DataUnavailableError

CONFIGS = Path(__file__).parents[3] / "common" / "configs"
NAME = "ti_500K_pseudo_labeled.pickle"


def write_extra(root: Path, n: int = 60, classes: int = 10, size: int = 32, **changes: Any) -> Path:
    """A small file of the real format; its pixels are even and those of :class:`Odd` are odd."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(4)
    content = {
        "data": 2 * rng.integers(0, 128, (n, size, size, 3), dtype=np.uint8),
        "extrapolated_targets": np.arange(n, dtype=np.int64) % classes,
    }
    (root / NAME).write_bytes(pickle.dumps(content | changes, protocol=4))
    return root


class Odd(ImageSource):
    """Labelled images with odd pixels."""

    def __init__(self, n: int = 100) -> None:
        self.n = n
        self.spec = ImageSpec("Odd", 10, (3, 8, 8), (0.5,) * 3, (0.2,) * 3, tuple("abcdefghij"))

    def prepare(self) -> None:
        pass

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        x = torch.randint(128, (self.n, 3, 8, 8), generator=generator, dtype=torch.uint8) * 2 + 1
        return x, torch.arange(self.n) % 10


@pytest.fixture
def extra(tmp_path: Path) -> ExtraImages:
    return ExtraImages(str(write_extra(tmp_path / "extra", size=8)))


def module(
    extra: ExtraImages, n: int = 100, world_size: int = 1, rank: int = 0, **kwargs: Any
) -> ImageDataModule:
    options = {"batch_size": 16, "validate_on": "test", "crop_padding": 2, "flip": True, "seed": 1}
    data = ImageDataModule(Odd(n), extra=extra, **(options | kwargs))
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size,
        global_rank=rank,
        current_epoch=0,
        training=True,
        accumulate_grad_batches=1,
        num_training_batches=math.inf,
        precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(restarting=False, batch_progress=progress)
        ),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    data.setup()
    return data


def batches_of(data: ImageDataModule, epoch: int = 0) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def order_of(data: ImageDataModule, epoch: int = 0) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches_of(data, epoch)]


# ---------------------------------------------------------------------------------- the file


def test_images_and_labels_come_out_of_the_file(tmp_path: Path) -> None:
    root = write_extra(tmp_path, n=7)
    x, y = ExtraImages(str(root)).load(CIFAR10.spec)
    content = pickle.loads((root / NAME).read_bytes())
    assert x.dtype == torch.uint8
    assert x.shape == (7, 3, 32, 32)
    assert y.tolist() == list(range(7))
    assert np.array_equal(x[3, 1], content["data"][3, :, :, 1])


@pytest.mark.parametrize("labels", [list(range(7)), np.arange(7, dtype=np.uint8)])
def test_labels_of_any_whole_type(tmp_path: Path, labels: Any) -> None:
    root = write_extra(tmp_path, n=7, extrapolated_targets=labels)
    assert ExtraImages(str(root)).load(CIFAR10.spec)[1].tolist() == list(range(7))


def test_a_missing_file_says_what_it_is_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError) as raised:
        ExtraImages(str(tmp_path)).load(CIFAR10.spec)
    for word in (str(tmp_path / NAME), "pseudo-labelled", "yaircarmon/semisup-adv", "withdrawn",
                 "--data.extra.root", "--data.extra null"):  # fmt: skip
        assert word in str(raised.value)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_extra(tmp_path, n=7, more=Bomb())
    with pytest.raises(DataUnavailableError, match="mkdir has no place in a set of images"):
        ExtraImages(str(root)).load(CIFAR10.spec)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": np.zeros((60, 32, 32, 3), dtype=np.float32)}, "float32"),
        ({"data": np.zeros((60, 16, 16, 3), dtype=np.uint8)}, r"\(3, 16, 16\)"),
        ({"data": np.zeros((59, 32, 32, 3), dtype=np.uint8)}, "59 images and 60 labels"),
        ({"extrapolated_targets": np.arange(60)}, "labels run from 0 to 59"),
        ({"data": None}, "AttributeError"),
    ],
)
def test_a_file_that_does_not_fit_says_why(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    root = write_extra(tmp_path, **changes)
    with pytest.raises(DataUnavailableError, match=reason):
        ExtraImages(str(root)).load(CIFAR10.spec)


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path = write_extra(tmp_path) / NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataUnavailableError, match=r"fetch it again"):
        ExtraImages(str(tmp_path)).load(CIFAR10.spec)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_generated_images_as_they_are_published(tmp_path: Path, save: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    save(tmp_path / "1m.npz", image=images, label=np.arange(30) % 10)
    x, y = ExtraImages(str(tmp_path), "1m.npz").load(CIFAR10.spec)
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), images)
    assert y.tolist() == [i % 10 for i in range(30)]


@pytest.mark.parametrize("kind", ["keys", "object", "bomb", "page", "packed", "folder"])
def test_other_files_are_called_what_they_are(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = tmp_path / "1m.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "keys":
        np.savez(path, x=np.zeros(3), y=np.zeros(3))
    elif kind == "object":
        np.savez(path, image=np.array([{}], dtype=object), label=np.zeros(1, np.int64))
    elif kind == "bomb":
        np.savez_compressed(path, image=np.zeros((90, 32, 32, 3), np.uint8))
    elif kind == "packed":
        path.write_bytes(b"\x1f\x8b" + bytes(99))
    else:
        path.write_bytes(b"<!DOCTYPE html><html></html>")
    word = {"keys": "it has x, y", "object": "allow_pickle", "bomb": "more than 50 times as many",
            "page": "a web page", "packed": "compressed by gzip", "folder": "a folder"}  # fmt: skip
    with pytest.raises(DataUnavailableError, match=word[kind]) as caught:
        ExtraImages(str(tmp_path), "1m.npz").load(CIFAR10.spec)
    assert "is there but" in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind != "folder":
        with pytest.raises(DataUnavailableError, match="is a file, expected the folder"):
            ExtraImages(str(path)).load(CIFAR10.spec)


# ------------------------------------------------------------------------------- the sampler


def test_an_epoch_of_cifar10_as_published() -> None:
    """196 batches of 256, half labelled: 25,088 different labelled images."""
    order = MixedSampler(50_000, 500_000, 256, 0.5, seed=0).order()
    assert order.shape == (196, 256)
    is_extra = order >= 50_000
    assert (is_extra.sum(1) == 128).all()
    assert len(order[~is_extra].unique()) == 25_088
    assert int(order.min()) >= 0
    assert int(order.max()) < 550_000
    # Shuffled: half of each half on either side, give or take five standard deviations.
    assert abs(int(is_extra[:, :128].sum()) - 98 * 128) < 5 * (196 * 64 * 0.5) ** 0.5
    # With replacement, uniformly: as many collisions as the birthday problem has, 630 or so.
    collisions = 25_088 - len(order[is_extra].unique())
    assert abs(collisions - 25_088**2 / 1e6) < 5 * 25


def test_extra_images_are_drawn_uniformly_and_anew_in_each_epoch() -> None:
    sampler = MixedSampler(400, 10, 40, 0.5, seed=2)
    counts, orders = Counter(), []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        orders.append(sampler.order())
        counts.update(orders[-1][orders[-1] >= 400].tolist())
    assert set(counts) == set(range(400, 410))
    assert max(abs(count - 1000) for count in counts.values()) < 5 * 30
    assert not torch.equal(orders[0], orders[1])
    # Over the epochs, every labelled example gets its turn about as often.
    seen = torch.bincount(torch.cat([o[o < 400] for o in orders]), minlength=400)
    assert abs(float(seen.double().mean()) - 25) < 1e-9
    assert int((seen - 25).abs().max()) < 5 * 3.6


def test_a_permutation_that_runs_out_leaves_room_for_extra_images() -> None:
    order = MixedSampler(82, 50, 20, 0.1, seed=0).order()
    assert (order < 82).sum(1).tolist() == [18, 18, 18, 18, 10]
    assert sorted(order[order < 82].tolist()) == list(range(82))


def test_seeds_and_epochs_do_not_meet() -> None:
    def order(seed: int, epoch: int) -> Tensor:
        sampler = MixedSampler(100, 50, 20, 0.5, seed)
        sampler.set_epoch(epoch)
        return sampler.order()

    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 1), order(1, 0))
    assert not torch.equal(order(0, 1), order(0, 0))


@pytest.mark.parametrize(("batch_size", "fraction"), [(1, 0.5), (4, 0.05), (4, 0.95)])
def test_a_batch_needs_both_kinds(batch_size: int, fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"extra_fraction {fraction} leaves a batch"):
        MixedSampler(100, 50, batch_size, fraction, seed=0)


# -------------------------------------------------------------------------------- the batches


def test_batches_hold_both_kinds_under_indices_that_never_meet(extra: ExtraImages) -> None:
    data = module(extra, n=100)
    labelled, pseudo = Odd().load("train"), extra.load(Odd().spec)
    batches = batches_of(data)
    assert len(batches) == len(data.train_dataloader()) == 7  # ceil(100 / 16)
    for batch in batches:
        assert len(batch["index"]) == 16
        is_extra = batch["index"] >= 100
        assert int(is_extra.sum()) == 8
        assert batch["x"].dtype == torch.uint8
        assert (batch["x"][is_extra] % 2 == 0).all()
        known, found = batch["index"][~is_extra], batch["index"][is_extra] - 100
        assert torch.equal(batch["x"][~is_extra], labelled[0][known])
        assert torch.equal(batch["y"][~is_extra], labelled[1][known])
        assert torch.equal(batch["x"][is_extra], pseudo[0][found])
        assert torch.equal(batch["y"][is_extra], pseudo[1][found])
        moved = data.on_after_batch_transfer(dict(batch), 0)
        assert torch.equal(
            moved["x"], data.augment(batch["x"], batch["index"], epoch=0).float() / 255
        )


def test_evaluation_knows_nothing_of_extra_images(extra: ExtraImages) -> None:
    data = module(extra)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        index = torch.cat([batch["index"] for batch in loader])
        assert sorted(index.tolist()) == list(range(100))


def test_limits_and_held_out_examples_move_the_first_extra_index(extra: ExtraImages) -> None:
    held_out = module(extra, validate_on="held-out", val_size=20)
    index = torch.cat([batch["index"] for batch in batches_of(held_out)])
    assert len(held_out.train_set) == 80
    assert int(index.max()) > 80
    assert len(index) == 80
    assert int((index < 80).sum()) == 40
    assert len(order_of(module(extra, train_limit=30))) == 2
    # Every batch is full, so there is nothing to drop.
    assert len(order_of(module(extra, train_limit=10, drop_last=True))) == 1


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("n", [100, 17])
def test_processes_share_the_batches_of_one(extra: ExtraImages, world_size: int, n: int) -> None:
    for epoch in (0, 3):
        alone = order_of(module(extra, n), epoch)
        shares = [order_of(module(extra, n, world_size, rank), epoch) for rank in range(world_size)]
        assert [len(share) for share in shares] == [len(alone)] * world_size
        for b, batch in enumerate(alone):
            assert {len(share[b]) for share in shares} == {16 // world_size}
            assert sorted(i for share in shares for i in share[b]) == sorted(batch)


def test_missing_files_stop_fit_and_not_test(tmp_path: Path) -> None:
    data = ImageDataModule(Odd(), extra=ExtraImages(str(tmp_path)))
    data.prepare_data()
    data.setup("test")
    with pytest.raises(DataUnavailableError, match="semisup-adv"):
        data.setup("fit")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_out_of_range(extra: ExtraImages, fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.extra_fraction must be .*{fraction}"):
        ImageDataModule(Odd(), extra=extra, extra_fraction=fraction)


# ------------------------------------------------------------------------- with a real trainer


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[tuple[int, list[int], Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.steps.append((self.current_epoch, batch["index"].tolist(), batch["x"]))
        return self.weight * batch["x"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InterruptionError(Exception):
    pass


class InterruptAt(ModelCheckpoint):
    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(dirpath=folder, save_last=True, every_n_train_steps=1)
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.step:
            raise InterruptionError


def train(
    folder: Path, recorder: Recorder, extra: ExtraImages, *callbacks: Any, **options: Any
) -> None:
    data = ImageDataModule(
        Odd(), batch_size=16, validate_on="test", crop_padding=2, flip=True, seed=1, extra=extra
    )
    Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=folder,
    ).fit(recorder, data, **options)


@pytest.mark.parametrize("step", [3, 7, 10])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, extra: ExtraImages, step: int
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    train(tmp_path, whole, extra)
    with pytest.raises(InterruptionError):
        train(tmp_path, first, extra, InterruptAt(tmp_path, step))
    train(tmp_path, second, extra, ckpt_path=str(tmp_path / "last.ckpt"))
    joined = first.steps + second.steps
    assert [s[:2] for s in joined] == [s[:2] for s in whole.steps]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(joined, whole.steps, strict=True))
    assert [s[1] for s in whole.steps if s[0] == 2] == order_of(module(extra), 2)


# ------------------------------------------------------------------------------------- configs


def test_the_config_builds_its_data(tmp_path: Path, write_cifar10: Callable[..., Path]) -> None:
    root = write_extra(write_cifar10(tmp_path))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    data = parser.instantiate(
        parser.parse_args(
            ["--data", str(CONFIGS / "cifar10_500k.yaml"), "--data.source.root", str(root),
             "--data.source.verify", "false", "--data.extra.root", str(root),
             "--data.val_size", "10", "--data.batch_size", "8"]
        )
    ).data  # fmt: skip
    assert data.extra_fraction == 0.5
    data.prepare_data()
    data.setup("fit")
    index = torch.cat([batch["index"] for batch in data.train_dataloader()])
    assert int((index >= 90).sum()) == int((index < 90).sum()) == 48
