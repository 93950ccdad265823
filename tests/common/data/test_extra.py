import contextlib
import errno
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from torch import Tensor

from common import files
from common.data import reading
from common.data.extra import ExtraImages, MixedSampler
from common.data.images import ImageDataModule
from common.data.sources import CIFAR10
from common.errors import ConfigurationError

CONFIGS = Path(__file__).parents[3] / "common" / "configs"
NAME = "ti_500K_pseudo_labeled.pickle"


def write_extra(root: Path, n: int = 60, classes: int = 10, size: int = 32, **changes: Any) -> Path:
    """A small file of the real format."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(4)
    content = {
        "data": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
        "extrapolated_targets": np.arange(n, dtype=np.int64) % classes,
    }
    (root / NAME).write_bytes(pickle.dumps(content | changes, protocol=4))
    return root


OPTIONS = {"batch_size": 16, "validate_on": "test", "crop_padding": 2, "flip": True, "seed": 1}


@pytest.fixture
def extra(tmp_path: Path) -> ExtraImages:
    return ExtraImages(str(write_extra(tmp_path / "extra", size=8)))


@pytest.fixture
def mixed(extra: ExtraImages, stub_trainer: Any, Memory: Any, module: Any) -> Callable[..., Any]:
    def mixed(n: int = 100, world_size: int = 1, rank: int = 0, **kwargs: Any) -> ImageDataModule:
        trainer, source = stub_trainer(world_size, rank, training=True), Memory(n, 23, classes=10)
        data: ImageDataModule = module(source, trainer, **(OPTIONS | {"extra": extra} | kwargs))
        return data

    return mixed


def batches_of(data: ImageDataModule, epoch: int = 0) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def order_of(data: ImageDataModule, epoch: int = 0) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches_of(data, epoch)]


# ---------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("labels", [list(range(7)), np.arange(7), np.arange(7, dtype=np.uint8)])
def test_images_and_labels_come_out_of_the_file(tmp_path, labels) -> None:
    root = write_extra(tmp_path, n=7, extrapolated_targets=labels)
    x, y = ExtraImages(str(root)).load(CIFAR10.spec)
    content = pickle.loads((root / NAME).read_bytes())
    assert x.dtype == np.uint8
    assert x.shape == (7, 3, 32, 32)
    assert y.tolist() == list(range(7))
    assert np.array_equal(x[3, 1], content["data"][3, :, :, 1])


def test_a_missing_file_says_what_it_is_and_where_to_get_it(tmp_path, error_of) -> None:
    message = error_of(lambda: ExtraImages(str(tmp_path)).load(CIFAR10.spec))
    for word in (str(tmp_path / NAME), "pseudo-labelled", "yaircarmon/semisup-adv", "withdrawn",
                 "--data.extra.root", "--data.extra null"):  # fmt: skip
        assert word in message


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": np.zeros((60, 32, 32, 3), dtype=np.float32)}, "float32"),
        ({"data": np.zeros((60, 16, 16, 3), dtype=np.uint8)}, "(3, 16, 16)"),
        ({"data": np.zeros((59, 32, 32, 3), dtype=np.uint8)}, "59 images and 60 labels"),
        ({"extrapolated_targets": np.arange(60)}, "labels run from 0 to 59"),
        ({"data": None}, "AttributeError"),
        ({"more": Bomb()}, "mkdir has no place in a set of images"),
        (None, "fetch it again"),
    ],
)
def test_a_file_that_does_not_fit_says_why(
    tmp_path, changes, reason, monkeypatch, error_of
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_extra(tmp_path, **(changes or {})) / NAME
    if changes is None:
        path.write_bytes(path.read_bytes()[:1000])
    assert reason in error_of(lambda: ExtraImages(str(tmp_path)).load(CIFAR10.spec))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_generated_images_are_mapped_and_not_read(tmp_path, save, Memory, stub_trainer) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    save(tmp_path / "1m.npz", first=np.zeros(3), image=images, label=labels)
    extra, source = ExtraImages(str(tmp_path), "1m.npz"), Memory(100, 23, classes=10)
    x, y = extra.load(source.spec)
    assert np.array_equal(x.transpose(0, 2, 3, 1), images)
    assert y.tolist() == [i % 10 for i in range(30)]
    data = ImageDataModule(source, extra=extra, **OPTIONS)
    data.trainer = stub_trainer(1, 0, training=True)
    data.setup("fit")
    for part in (x, y, *data._extra):
        assert is_mapped(part)
    dataset = data.train_dataloader().dataset
    assert is_mapped(dataset._x)
    assert is_mapped(dataset._y)
    batch = dataset.__getitems__([129, 0, 103])
    assert np.array_equal(batch["x"][[0, 2]], images[[29, 3]].transpose(0, 3, 1, 2))
    assert batch["y"][[0, 2]].tolist() == [9, 3]


def test_compressed_images_are_unpacked_once_and_never_half(
    tmp_path, monkeypatch, error_of
) -> None:
    path, spec = tmp_path / "1m.npz", CIFAR10.spec
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez_compressed(path, image=images, label=np.arange(30) % 10)
    with monkeypatch.context() as patch:
        patch.setattr(reading.shutil, "copyfileobj", full_disk)
        assert "numpy.savez" in error_of(lambda: ExtraImages(str(tmp_path), path.name).load(spec))
    assert not list(tmp_path.glob(".*.npy"))
    ExtraImages(str(tmp_path), path.name).load(spec)
    unpacked = set(tmp_path.glob(".*.npy"))
    assert len(unpacked) == 2
    monkeypatch.setattr(reading.shutil, "copyfileobj", full_disk)
    assert np.array_equal(
        ExtraImages(str(tmp_path), path.name).load(spec)[0][3, 1], images[3, :, :, 1]
    )
    monkeypatch.undo()
    np.savez_compressed(path, image=255 - images, label=np.arange(30) % 10)
    found, _ = ExtraImages(str(tmp_path), path.name).load(spec)
    assert np.array_equal(found[3, 1], 255 - images[3, :, :, 1])


def is_mapped(array: Any) -> bool:
    """Whether its content is that of a file, and no copy of it."""
    return array is not None and (isinstance(array, np.memmap) or is_mapped(array.base))


def full_disk(source: Any, target: Any, *_: Any) -> None:
    target.write(source.read(10))
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"x": np.zeros(3), "y": np.zeros(3)}, "it has x, y"),
        ({"image": np.array([{}], dtype=object), "label": np.zeros(1, np.int64)}, "allow_pickle"),
        ({"image": np.zeros((90, 32, 32, 3), np.uint8)}, "more than 50 times as many"),
        (b"\x1f\x8b" + bytes(99), "compressed by gzip"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_other_files_are_called_what_they_are(
    tmp_path, content, word, monkeypatch, error_of
) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = tmp_path / "1m.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez_compressed(path, **content)
    message = error_of(lambda: ExtraImages(str(tmp_path), "1m.npz").load(CIFAR10.spec))
    assert "is there but" in message
    assert word in message
    message = error_of(lambda: ExtraImages(str(path)).load(CIFAR10.spec))
    assert "is a file, expected the folder" in message


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
    sampler.set_epoch(0)
    assert torch.equal(sampler.order(), orders[0])
    assert not torch.equal(MixedSampler(400, 10, 40, 0.5, seed=1).order(), orders[1])
    # Over the epochs, every labelled example gets its turn about as often.
    seen = torch.bincount(torch.cat([o[o < 400] for o in orders]), minlength=400)
    assert abs(float(seen.double().mean()) - 25) < 1e-9
    assert int((seen - 25).abs().max()) < 5 * 3.6


def test_a_permutation_that_runs_out_leaves_room_for_extra_images() -> None:
    order = MixedSampler(82, 50, 20, 0.1, seed=0).order()
    assert (order < 82).sum(1).tolist() == [18, 18, 18, 18, 10]
    assert sorted(order[order < 82].tolist()) == list(range(82))


@pytest.mark.parametrize(("batch_size", "fraction"), [(1, 0.5), (4, 0.05), (4, 0.95)])
def test_a_batch_needs_both_kinds(batch_size, fraction) -> None:
    with pytest.raises(ConfigurationError, match=rf"extra_fraction {fraction} leaves a batch"):
        MixedSampler(100, 50, batch_size, fraction, seed=0)


# -------------------------------------------------------------------------------- the batches


def test_batches_hold_both_kinds_under_indices_that_never_meet(extra, mixed) -> None:
    data = mixed(n=100)
    labelled, pseudo = data.source.load("train"), extra.load(data.source.spec)
    batches = batches_of(data)
    assert len(batches) == len(data.train_dataloader()) == 7  # ceil(100 / 16)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        index = torch.cat([batch["index"] for batch in loader])
        assert sorted(index.tolist()) == list(range(23))
    for batch in batches:
        assert len(batch["index"]) == 16
        is_extra = batch["index"] >= 100
        assert int(is_extra.sum()) == 8
        assert batch["x"].dtype == torch.uint8
        known, found = batch["index"][~is_extra], batch["index"][is_extra] - 100
        assert torch.equal(batch["x"][~is_extra], labelled[0][known])
        assert torch.equal(batch["y"][~is_extra], labelled[1][known])
        assert np.array_equal(batch["x"][is_extra], pseudo[0][found])
        assert np.array_equal(batch["y"][is_extra], pseudo[1][found])
        moved = data.on_after_batch_transfer(dict(batch), 0)
        assert torch.equal(
            moved["x"], data.augment(batch["x"], batch["index"], epoch=0).float() / 255
        )


def test_limits_and_held_out_examples_move_the_first_extra_index(extra, mixed) -> None:
    held_out = mixed(validate_on="held-out", val_size=20)
    index = torch.cat([batch["index"] for batch in batches_of(held_out)])
    assert len(held_out.train_set) == 80
    assert int(index.max()) > 80
    assert len(index) == 80
    assert int((index < 80).sum()) == 40
    assert len(order_of(mixed(train_limit=30))) == 2
    # Every batch is full, so there is nothing to drop.
    assert len(order_of(mixed(train_limit=10, drop_last=True))) == 1


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("n", [100, 17])
def test_processes_share_the_batches_of_one(extra, world_size, n, mixed) -> None:
    for epoch in (0, 3):
        alone = order_of(mixed(n), epoch)
        shares = [order_of(mixed(n, world_size, rank), epoch) for rank in range(world_size)]
        assert [len(share) for share in shares] == [len(alone)] * world_size
        for b, batch in enumerate(alone):
            assert {len(share[b]) for share in shares} == {16 // world_size}
            assert sorted(i for share in shares for i in share[b]) == sorted(batch)


def test_missing_files_stop_fit_and_not_test(tmp_path, Memory, error_of) -> None:
    data = ImageDataModule(Memory(), extra=ExtraImages(str(tmp_path)))
    data.prepare_data()
    data.setup("test")
    assert "semisup-adv" in error_of(lambda: data.setup("fit"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_out_of_range(extra, fraction, Memory) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.extra_fraction must be .*{fraction}"):
        ImageDataModule(Memory(), extra=extra, extra_fraction=fraction)


# ------------------------------------------------------------------------- with a real trainer


@pytest.mark.parametrize("step", [3, 7])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path, extra, step, mixed, Memory, Recorder, InterruptAt
) -> None:
    def train(*callbacks: Any, **options: Any) -> list[Any]:
        recorder = Recorder()
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks), use_distributed_sampler=False, limit_val_batches=0,
            default_root_dir=tmp_path,
        )  # fmt: skip
        with contextlib.suppress(InterruptAt.Stopped):
            source = Memory(classes=10)
            trainer.fit(recorder, ImageDataModule(source, extra=extra, **OPTIONS), **options)
        return recorder.steps

    whole, first = train(), train(InterruptAt(tmp_path, step))
    assert len(first) == step
    joined = first + train(ckpt_path=str(tmp_path / "last.ckpt"))
    assert [s[:3] for s in joined] == [s[:3] for s in whole]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(joined, whole, strict=True))
    assert [s[2] for s in whole if s[1] == 2] == order_of(mixed(), 2)


# ------------------------------------------------------------------------------------- configs


def test_the_config_builds_its_data(tmp_path, write_cifar10) -> None:
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
