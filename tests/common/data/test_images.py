import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from common.attacks.randomness import ExampleRandom, Stream
from common.data.base import ImageSource, ImageSpec, Split
from common.data.images import ImageDataModule, Views, shift_and_flip
from common.data.sources import CIFAR10, Digits
from common.data.subset import subset
from common.errors import ConfigurationError, DataUnavailableError
from common.objectives import weighted

CONFIGS = Path(__file__).parents[3] / "common" / "configs"


class Memory(ImageSource):
    """Random images without a zero, so that the padding of a crop can be told from them."""

    def __init__(self, n: int = 100, n_test: int = 23, classes: int = 4) -> None:
        self.sizes: dict[Split, int] = {"train": n, "test": n_test}
        names = tuple("abcdefghij"[:classes])
        self.spec = ImageSpec("Memory", classes, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, names)
        self.prepared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        n = self.sizes[split]
        generator = torch.Generator().manual_seed(5)
        x = torch.randint(1, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return x, torch.arange(n) % self.spec.num_classes


def module(
    source: ImageSource | None = None, trainer: Any = None, **kwargs: Any
) -> ImageDataModule:
    data = ImageDataModule(source or Memory(), **kwargs)
    data.trainer = trainer  # type: ignore[assignment]
    data.setup()
    return data


# ------------------------------------------------------------------------------------- batches


def test_batches_keep_the_contract() -> None:
    data = module(batch_size=30, eval_batch_size=10, val_size=20)
    train = list(data.train_dataloader())
    assert [len(batch["y"]) for batch in train] == [30, 30, 20]
    x, y = Memory().load("test")
    for batch in data.test_dataloader():
        index = batch["index"]
        assert index.dtype == batch["y"].dtype == torch.int64
        assert batch["x"].dtype == torch.uint8  # bytes until they are on the device
        assert torch.equal(batch["y"], y[index])
        moved = data.on_after_batch_transfer(dict(batch), 0)
        assert moved["x"].dtype == torch.float32
        assert torch.equal(moved["x"], x[index] / 255)
        assert set(moved) == {"x", "y", "index"}


def test_every_byte_becomes_the_nearest_float() -> None:
    data = module()
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    out = data.on_after_batch_transfer({"x": x, "index": torch.zeros(1, dtype=torch.int64)}, 0)
    exact = (torch.arange(256, dtype=torch.float64) / 255).float()
    assert torch.equal(out["x"].flatten(), exact)
    assert out["x"].min() == 0
    assert out["x"].max() == 1


def test_double_precision_reaches_the_pixels(stub_trainer) -> None:
    trainer = stub_trainer()
    trainer.precision = "64-true"
    data = module(trainer=trainer)
    batch = next(iter(data.test_dataloader()))
    expected = batch["x"].double() / 255
    moved = data.on_after_batch_transfer(batch, 0)["x"]
    assert moved.dtype == torch.float64
    assert torch.equal(moved, expected)


def test_index_counts_within_each_split() -> None:
    data = module(batch_size=16, val_size=0.2)
    for loader, n in (
        (data.train_dataloader(), 80),
        (data.val_dataloader(), 20),
        (data.test_dataloader(), 23),
        (data.predict_dataloader(), 23),
    ):
        index = torch.cat([batch["index"] for batch in loader])
        assert sorted(index.tolist()) == list(range(n))


def test_one_example_is_a_row_of_a_batch() -> None:
    dataset = module().val_set
    assert dataset is not None
    single, several = dataset[3], dataset.__getitems__([5, 3])
    assert all(torch.equal(single[key], several[key][1]) for key in several)


def test_attributes_come_without_loading() -> None:
    data = ImageDataModule(CIFAR10(root="/nowhere"))
    assert (data.num_classes, data.shape) == (10, (3, 32, 32))
    assert data.class_names[3] == "cat"


def test_prepare_data_prepares_the_source() -> None:
    source = Memory()
    ImageDataModule(source).prepare_data()
    assert source.prepared == 1


def test_missing_files_surface_in_setup(tmp_path) -> None:
    with pytest.raises(DataUnavailableError):
        ImageDataModule(CIFAR10(root=str(tmp_path), download=False)).setup("fit")


def test_loader_before_setup_says_so() -> None:
    with pytest.raises(RuntimeError, match="setup"):
        ImageDataModule(Memory()).train_dataloader()


# -------------------------------------------------------------------------------------- splits


def test_digits_sizes() -> None:
    data = module(Digits(), val_size=297)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (800, 297, 700)
    counts = data.val_set.y.bincount()
    assert counts.max() - counts.min() <= 2
    # Another held-out part would make all published numbers incomparable.
    assert data.val_set.rows[:10].tolist() == [6, 8, 9, 16, 18, 19, 20, 22, 34, 36]


def test_held_out_examples_are_disjoint_and_proportional() -> None:
    data = module(Memory(n=101), val_size=20)
    train, val = set(data.train_set.rows.tolist()), set(data.val_set.rows.tolist())
    assert not train & val
    assert train | val == set(range(101))
    assert data.val_set.y.bincount().tolist() == [5, 5, 5, 5]


def test_held_out_part_ignores_the_training_seed() -> None:
    rows = module(seed=1).val_set.rows
    seed_everything(7)
    assert torch.equal(module(seed=2).val_set.rows, rows)
    assert torch.equal(module().val_set.rows, rows)
    assert not torch.equal(module(split_seed=1).val_set.rows, rows)


@pytest.mark.parametrize(("val_size", "expected"), [(0.25, 25), (7, 7), (0.001, 1), (1, 1)])
def test_val_size_is_a_count_or_a_fraction(val_size, expected) -> None:
    assert len(module(val_size=val_size).val_set) == expected


def test_validate_on_test_holds_nothing_out() -> None:
    data = module(validate_on="test")
    assert len(data.train_set) == 100
    assert torch.equal(data.val_set.y, data.test_set.y)
    first = next(iter(data.val_dataloader()))["x"]
    assert torch.equal(first, Memory().load("test")[0])


@pytest.mark.parametrize("validate_on", ["held-out", "test"])
@pytest.mark.parametrize("stages", [["fit", "test"], ["validate", "fit"], ["test", "validate"]])
def test_stages_in_any_order_give_the_same_sets(validate_on, stages) -> None:
    data = ImageDataModule(Memory(), validate_on=validate_on)
    for stage in stages:
        data.setup(stage)
    whole = module(validate_on=validate_on)
    for name in ("train_set", "val_set", "test_set"):
        mine, theirs = getattr(data, name), getattr(whole, name)
        assert mine is None or torch.equal(mine.rows, theirs.rows)
    assert data.train_set is not None or "fit" not in stages


def test_limits_take_examples_of_all_classes_in_proportion() -> None:
    whole = module()
    with pytest.warns(UserWarning, match="train split: the 3 examples taken of 10 have none of 1"):
        data = module(train_limit=11, val_limit=3, test_limit=1000)
    for mine, theirs, limit in (
        (data.train_set, whole.train_set, 11),
        (data.val_set, whole.val_set, 3),
    ):
        assert torch.equal(mine.rows, theirs.rows[subset(theirs.y, limit)])
    assert "have none of 1 of the 4 classes" in data.val_set.remarks[0]
    assert data.train_set.remarks == data.test_set.remarks == []
    assert len(data.test_set) == 23


# -------------------------------------------------------------------------------- augmentation


def mirrored(place: int, size: int) -> int:
    """Steps away from an edge, from there back into the image."""
    while not 0 <= place < size:
        place = -place if place < 0 else 2 * (size - 1) - place
    return place


def slow_shift_and_flip(
    x: Tensor, shift: Tensor, is_flipped: Tensor, padding: int, padding_mode: str = "zero"
) -> Tensor:
    out = torch.zeros_like(x)
    n, channels, height, width = x.shape
    for k in range(n):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    row = i + int(shift[k, 0]) - padding
                    column = j + int(shift[k, 1]) - padding
                    if padding_mode == "reflect":
                        row, column = mirrored(row, height), mirrored(column, width)
                    if 0 <= row < height and 0 <= column < width:
                        target = width - 1 - j if is_flipped[k] else j
                        out[k, c, i, target] = x[k, c, row, column]
    return out


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_shift_and_flip_against_loops(padding, shape) -> None:
    x = torch.randint(1, 256, (9, *shape), dtype=torch.uint8)
    shift = torch.randint(2 * padding + 1, (9, 2))
    is_flipped = torch.arange(9) % 2 == 0
    out = shift_and_flip(x, shift, is_flipped, padding)
    assert out.dtype == torch.uint8
    assert torch.equal(out, slow_shift_and_flip(x, shift, is_flipped, padding))
    assert torch.equal(shift_and_flip(x.float(), shift, is_flipped, padding), out.float())


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_reflected_padding_against_loops_and_torch(padding, shape) -> None:
    x = torch.randint(1, 256, (9, *shape), dtype=torch.uint8)
    shift = torch.randint(2 * padding + 1, (9, 2))
    is_flipped = torch.arange(9) % 2 == 0
    out = shift_and_flip(x, shift, is_flipped, padding, "reflect")
    assert out.dtype == torch.uint8
    assert torch.equal(out, slow_shift_and_flip(x, shift, is_flipped, padding, "reflect"))
    padded = torch.nn.functional.pad(x.float(), (padding,) * 4, mode="reflect")
    for k in range(9):
        top, left = shift[k].tolist()
        crop = padded[k, :, top : top + shape[1], left : left + shape[2]]
        assert torch.equal(out[k].float(), crop.flip(2) if is_flipped[k] else crop)


def test_reflected_padding_is_a_setting() -> None:
    x = torch.randint(1, 256, (40, 1, 4, 4), dtype=torch.uint8)
    index = torch.arange(40)
    zero = module(crop_padding=2, flip=True).augment(x, index, epoch=0)
    reflected = module(crop_padding=2, flip=True, crop_padding_mode="reflect")
    out = reflected.augment(x, index, epoch=0)
    assert (zero == 0).any()
    assert (out > 0).all()
    assert torch.equal(out[zero > 0], zero[zero > 0])  # cropped and flipped at the same places
    with pytest.raises(ConfigurationError, match="one of zero, reflect"):
        module(crop_padding_mode="mirror")
    with pytest.raises(ConfigurationError, match="has to mirror"):
        module(crop_padding=8, crop_padding_mode="reflect")


class Darker(Views):
    """Half and a quarter of the brightness, and a random bit."""

    def __call__(self, x: Tensor, random: ExampleRandom) -> list[Tensor]:
        bit = random.integers(2, (1, 1, 1)).to(torch.uint8)
        return [x // 2 + bit, x // 4]


def test_views_come_behind_the_images(stub_trainer) -> None:
    x, y = Memory().load("train")
    index = torch.arange(20)
    data = module(trainer=stub_trainer(epoch=1, training=True), views=Darker(), seed=3)
    plain = module(trainer=stub_trainer(epoch=1, training=True), seed=3)
    for crop in (0, 1):
        data.crop_padding = plain.crop_padding = crop
        batch = {"x": x[:20], "y": y[:20], "index": index}
        out = data.on_after_batch_transfer(dict(batch), 0)
        alone = plain.on_after_batch_transfer(dict(batch), 0)
        assert out["x"].shape == (60, *x.shape[1:])
        assert torch.equal(out["x"][:20], alone["x"])  # the image itself is as without views
        assert torch.equal(out["y"], y[:20].repeat(3))
        assert torch.equal(out["view"], torch.arange(3).repeat_interleave(20))
        assert torch.equal(out["index"][:20], index)
        assert len(out["index"].unique()) == 60
        again = data.on_after_batch_transfer({k: v[5:9] for k, v in batch.items()}, 0)
        for k in range(3):  # an example's versions do not depend on its batch
            assert torch.equal(again["x"][4 * k : 4 * k + 4], out["x"][20 * k + 5 : 20 * k + 9])
        if crop == 0:
            assert torch.equal(out["x"][40:], (x[:20] // 4).float() / 255)
            bits = (out["x"][20:40] * 255).round() - x[:20] // 2
            assert set(bits.flatten().tolist()) == {0.0, 1.0}


def test_views_are_for_training_only(stub_trainer) -> None:
    x, y = Memory().load("train")
    data = module(trainer=stub_trainer(epoch=1, training=False), views=Darker())
    out = data.on_after_batch_transfer({"x": x, "y": y, "index": torch.arange(len(y))}, 0)
    assert len(out["x"]) == len(x)
    assert "view" not in out


def decode(image: Tensor, original: Tensor, padding: int) -> tuple[int, int, bool]:
    """Which shift and flip made ``image`` out of ``original``: tried out, one by one."""
    found = [
        (top, left, flip)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for flip in (False, True)
        if torch.equal(
            slow_shift_and_flip(
                original[None], torch.tensor([[top, left]]), torch.tensor([flip]), padding
            )[0],
            image,
        )
    ]
    assert len(found) == 1
    return found[0]


def test_augmentation_is_a_crop_and_a_flip_of_each_example() -> None:
    data = module(crop_padding=1, flip=True)
    x = torch.randint(1, 256, (40, 1, 4, 4), dtype=torch.uint8)
    out = data.augment(x, torch.arange(40), epoch=0)
    seen = {decode(out[k], x[k], 1) for k in range(40)}
    assert len(seen) > 10  # of 18: examples are not treated alike
    assert {flip for *_, flip in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == {0, 1, 2}


def test_shifts_and_flips_are_uniform() -> None:
    data = module(crop_padding=1, flip=True)
    n = 3600
    x = torch.zeros(n, 1, 4, 4)
    x[:, :, 1:3, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # inside for every crop
    out = data.augment(x, torch.arange(n), epoch=3)[:, 0]
    is_flipped = torch.tensor([bool(row[(row == 1) | (row == 2)][0] == 2) for row in out])
    place = torch.stack([torch.nonzero(row)[0] for row in out])
    counts = torch.bincount(place[:, 0] * 3 + place[:, 1], minlength=9)
    assert (counts - n / 9).abs().max() < 4.5 * (n / 9 * 8 / 9) ** 0.5
    assert abs(int(is_flipped.sum()) - n / 2) < 4.5 * (n / 4) ** 0.5
    # Flips are independent of shifts.
    assert abs(int(is_flipped[place[:, 0] == 0].sum()) - n / 6) < 4.5 * (n / 12) ** 0.5


def test_augmentation_does_not_depend_on_the_batch() -> None:
    data = module(crop_padding=2, flip=True, seed=3)
    x, _ = Memory().load("train")
    index = torch.arange(100)
    whole = data.augment(x, index, epoch=4)
    for size in (1, 7, 50):
        parts = [
            data.augment(x[i : i + size], index[i : i + size], epoch=4) for i in range(0, 100, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(100)
    assert torch.equal(data.augment(x[order], index[order], epoch=4), whole[order])
    torch.manual_seed(123)
    assert torch.equal(data.augment(x, index, epoch=4), whole)


def test_augmentation_changes_with_epoch_and_seed_only_in_where_it_crops() -> None:
    x, _ = Memory().load("train")
    index = torch.arange(100)
    first = module(crop_padding=2, seed=3).augment(x, index, epoch=0)
    assert not torch.equal(module(crop_padding=2, seed=3).augment(x, index, epoch=1), first)
    assert not torch.equal(module(crop_padding=2, seed=4).augment(x, index, epoch=0), first)
    # Switching flips on leaves the crops where they were.
    both = module(crop_padding=2, flip=True, seed=3).augment(x, index, epoch=0)
    same = (both == first).flatten(1).all(1)
    assert 30 < int(same.sum()) < 70


def test_no_augmentation_leaves_the_bytes_alone() -> None:
    x, _ = Memory().load("train")
    assert module().augment(x, torch.arange(100), epoch=0) is x


def test_augmentation_leaves_the_random_state_alone() -> None:
    data = module(crop_padding=2, flip=True)
    before = torch.random.get_rng_state()
    for batch in data.train_dataloader():
        data.augment(batch["x"], batch["index"], epoch=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_only_training_batches_are_augmented(training, stub_trainer) -> None:
    data = module(trainer=stub_trainer(epoch=2, training=training), crop_padding=2, flip=True)
    x, _ = Memory().load("train")
    index = torch.arange(100)
    out = data.on_after_batch_transfer({"x": x, "index": index}, 0)["x"]
    expected = data.augment(x, index, epoch=2) if training else x
    assert torch.equal(out, expected / 255)


def test_the_runs_seed_is_the_default() -> None:
    x, _ = Memory().load("train")
    index = torch.arange(100)
    seed_everything(11)
    mine = module(crop_padding=2)
    explicit = module(crop_padding=2, seed=11)
    assert torch.equal(mine.augment(x, index, 0), explicit.augment(x, index, 0))
    assert order_of(mine) == order_of(explicit)
    assert order_of(mine) != order_of(module(seed=12))


# ---------------------------------------------------------------------------- several processes


def order_of(data: ImageDataModule, epoch: int = 0) -> list[list[int]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch["index"].tolist() for batch in loader]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("n", "drop_last"), [(80, False), (72, False), (79, True), (77, True), (80, True)]
)
def test_processes_share_the_batches_of_one(world_size, n, drop_last, stub_trainer) -> None:
    options: dict[str, Any] = {
        "batch_size": 16, "validate_on": "test", "train_limit": n, "drop_last": drop_last,
    }  # fmt: skip
    for epoch in (0, 3):
        alone = order_of(module(**options), epoch)
        shares = [
            order_of(module(trainer=stub_trainer(world_size, rank), **options), epoch)
            for rank in range(world_size)
        ]
        assert [len(share) for share in shares] == [len(alone)] * world_size
        for b, batch in enumerate(alone):
            together = [i for share in shares for i in share[b]]
            assert sorted(together) == sorted(batch)
    assert order_of(module(**options), 0) != order_of(module(**options), 3)


@pytest.mark.parametrize("batch_size", [16, 76])
def test_uneven_last_training_batch_is_shared_and_weighted(batch_size, stub_trainer) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "validate_on": "test", "train_limit": 86}
    shares = [
        list(module(trainer=stub_trainer(4, rank), **options).train_dataloader())
        for rank in range(4)
    ]
    alone = list(module(**options).train_dataloader())
    assert all("weight" not in batch for batch in alone)
    assert [len(share) for share in shares] == [len(alone)] * 4
    for b, batch in enumerate(alone):
        together = [share[b] for share in shares]
        found = torch.cat([part["index"] for part in together])
        assert sorted(found.tolist()) == sorted(batch["index"].tolist())
        # The mean over processes of their weighted means is the mean over all examples.
        value = (found % 7).double()
        parts = value.split([len(part["y"]) for part in together])
        means = [weighted(v.mean(), p) for v, p in zip(parts, together, strict=True)]
        torch.testing.assert_close(torch.stack(means).mean(), value.mean())
        is_last = b == len(alone) - 1
        assert all(("weight" in part) == is_last for part in together)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("accumulate", "n", "batches", "drop_last"),
    [
        *((3, 84, math.inf, False), (3, 87, math.inf, False), (4, 87, 6, False)),
        *((2, 87, 3, False), (7, 87, math.inf, True), (50, 87, math.inf, False)),
        (1, 87, math.inf, False),
    ],
)
def test_an_optimiser_step_is_the_mean_over_its_examples(
    world_size, accumulate, n, batches, drop_last, stub_trainer
) -> None:
    """Windows that an epoch's end cuts short, last batches that are not full, processes."""
    options: dict[str, Any] = {
        "batch_size": 12, "validate_on": "test", "train_limit": n, "drop_last": drop_last,
    }  # fmt: skip
    shares = []
    for rank in range(world_size):
        trainer = stub_trainer(world_size, rank, accumulate=accumulate, batches=batches)
        loader = iter(module(trainer=trainer, **options).train_dataloader())
        shares.append(list(islice(loader, None if batches == math.inf else int(batches))))
    for begin in range(0, len(shares[0]), accumulate):
        parts = [part for share in shares for part in share[begin : begin + accumulate]]
        values = [(part["index"] % 7).double() for part in parts]
        means = [
            weighted(weighted(value.mean(), part), part, "window")
            for value, part in zip(values, parts, strict=True)
        ]
        step = torch.stack(means).sum() / accumulate / world_size  # as Lightning and DDP do
        torch.testing.assert_close(step, torch.cat(values).mean())
    if accumulate == 1:
        assert not any("window" in part for share in shares for part in share)


def test_a_last_batch_with_fewer_examples_than_devices_is_refused(stub_trainer) -> None:
    options: dict[str, Any] = {"batch_size": 16, "validate_on": "test", "train_limit": 83}
    with pytest.raises(ConfigurationError, match=r"has 3 of the 83 .* 4 devices: set data\.drop"):
        module(trainer=stub_trainer(4), **options)
    dropped = module(trainer=stub_trainer(4), drop_last=True, **options).train_dataloader()
    assert [len(batch["y"]) for batch in dropped] == [4] * 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_sees_each_example_once(world_size, stage, stub_trainer) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        trainer = stub_trainer(world_size, rank)
        data = module(trainer=trainer, batch_size=12, eval_batch_size=5, val_size=11)
        for batch in getattr(data, f"{stage}_dataloader")():
            assert len(batch["y"]) <= 5
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(11 if stage == "val" else 23))


def test_batch_that_cannot_be_shared_is_refused(stub_trainer) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size 128 .* 3 .* 126 or 129"):
        module(trainer=stub_trainer(world_size=3), batch_size=128)
    with pytest.raises(ConfigurationError, match=r"choose 4, or another"):
        module(trainer=stub_trainer(world_size=4), batch_size=2)


def test_lightnings_sampler_is_refused_with_several_devices(stub_trainer) -> None:
    trainer = stub_trainer(world_size=2)
    trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(ConfigurationError, match="set it to false"):
        module(trainer=trainer)
    alone = stub_trainer(world_size=1)
    alone._accelerator_connector.use_distributed_sampler = True
    module(trainer=alone)


def test_too_few_examples_for_the_devices(stub_trainer) -> None:
    with pytest.raises(ConfigurationError, match="2 examples cannot be divided over 4"):
        module(trainer=stub_trainer(world_size=4), val_limit=2)


# ------------------------------------------------------------------------------ wrong settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("crop_padding", -1),
        ("train_limit", 0),
        ("val_limit", 0),
        ("test_limit", -5),
        ("num_workers", -1),
        ("val_size", 0),
        ("val_size", -3),
        ("val_size", 0.0),
        ("val_size", 1.0),
        ("val_size", float("nan")),
        ("validate_on", "train"),
    ],
)
def test_settings_out_of_range(setting, value) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.{setting} must be .*{value}"):
        ImageDataModule(Memory(), **{setting: value})


@pytest.mark.parametrize("val_size", [99, 100, 1000, 0.999])
def test_val_size_must_leave_every_class_an_example(val_size) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.val_size {val_size}: .*hold out fewer"):
        module(val_size=val_size)


def test_dropping_the_only_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="drop_last: false"):
        module(batch_size=128, drop_last=True)


# ------------------------------------------------------------------------- with a real trainer


def trainer_of(folder: Path, epochs: int, *callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        **kwargs,
    )


def data_of(**kwargs: Any) -> ImageDataModule:
    options = {"batch_size": 16, "val_size": 20, "crop_padding": 2, "flip": True, "seed": 1}
    return ImageDataModule(Memory(), **(options | kwargs))


def test_trainer_gets_the_order_and_augmentation_of_each_epoch(tmp_path, Recorder) -> None:
    recorder = Recorder()
    trainer_of(tmp_path, 2).fit(recorder, data_of())
    reference = module(batch_size=16, val_size=20, crop_padding=2, flip=True, seed=1)
    for epoch in (0, 1):
        steps = [s for s in recorder.steps if s[0] == "train" and s[1] == epoch]
        assert [index for _, _, index, _ in steps] == order_of(reference, epoch)
        for _, _, index, x in steps:
            batch = reference.train_set.__getitems__(index)
            random = ExampleRandom(1, epoch, batch["index"], stream=Stream.AUGMENTATION)
            shift = random.integers(5, (2,))
            is_flipped = random.integers(2, ()) == 1
            expected = slow_shift_and_flip(batch["x"], shift, is_flipped, 2) / 255
            assert torch.equal(x, expected)
    for stage, _, index, x in recorder.steps:
        if stage == "val":
            assert torch.equal(x, reference.val_set.__getitems__(index)["x"] / 255)


def test_trainer_tests_and_predicts_without_augmentation(tmp_path, Recorder) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, 1)
    trainer.test(recorder, data_of(eval_batch_size=7), verbose=False)
    assert torch.equal(torch.cat([x for *_, x in recorder.steps]), Memory().load("test")[0] / 255)
    predicted = trainer.predict(recorder, data_of(eval_batch_size=7))
    assert torch.cat(predicted).tolist() == list(range(23))


@pytest.mark.parametrize(("workers", "step"), [(0, 2), (0, 5), (0, 7), (0, 10), (1, 7)])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path, workers, step, Recorder, InterruptAt
) -> None:
    whole = Recorder()
    trainer_of(tmp_path, 3).fit(whole, data_of())
    first = Recorder()
    with pytest.raises(InterruptAt.Stopped):
        trainer_of(tmp_path, 3, InterruptAt(tmp_path, step)).fit(
            first, data_of(num_workers=workers)
        )
    second = Recorder()
    trainer_of(tmp_path, 3).fit(
        second, data_of(num_workers=workers), ckpt_path=str(tmp_path / "last.ckpt")
    )
    joined = [s for r in (first, second) for s in r.steps if s[0] == "train"]
    expected = [s for s in whole.steps if s[0] == "train"]
    assert [s[:3] for s in joined] == [s[:3] for s in expected]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(joined, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_longer_continues_with_the_next_epoch(tmp_path, workers, Recorder) -> None:
    whole = Recorder()
    trainer_of(tmp_path, 3).fit(whole, data_of())
    first, second = Recorder(), Recorder()
    trainer = trainer_of(tmp_path, 2)
    trainer.fit(first, data_of(num_workers=workers))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer_of(tmp_path, 3).fit(
        second, data_of(num_workers=workers), ckpt_path=str(tmp_path / "end.ckpt")
    )
    joined = [s[:3] for r in (first, second) for s in r.steps if s[0] == "train"]
    assert joined == [s[:3] for s in whole.steps if s[0] == "train"]


def test_loader_asked_for_during_training_starts_at_its_beginning(tmp_path, Recorder) -> None:
    lengths = []

    class Counting(Recorder):
        def on_train_batch_end(self, *_: Any) -> None:
            loader = self.trainer.datamodule.train_dataloader()
            lengths.append(sum(len(batch["y"]) for batch in loader))

    trainer_of(tmp_path, 1, limit_train_batches=3).fit(Counting(), data_of())
    assert lengths == [80, 80, 80]


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path, Recorder) -> None:
    class Writer(Recorder):
        """A recorder whose notes come back from another process as a file."""

        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.folder = str(folder)

        def write(self, stage: str) -> None:
            torch.save(self.steps, f"{self.folder}/{stage}{self.global_rank}.pt")

        def on_train_end(self) -> None:
            self.write("fit")

        def on_test_end(self) -> None:
            self.write("test")

    alone = Recorder()
    trainer_of(tmp_path, 2).fit(alone, data_of())
    trainer = trainer_of(tmp_path, 2, devices=2, strategy="ddp_fork")
    trainer.fit(Writer(tmp_path), data_of())
    shares = [torch.load(tmp_path / f"fit{rank}.pt") for rank in range(2)]
    train = [[s for s in share if s[0] == "train"] for share in [alone.steps, *shares]]
    assert len(train[0]) == len(train[1]) == len(train[2]) == 10
    for one, *two in zip(*train, strict=True):
        pixels = dict(zip(one[2], one[3], strict=True))
        assert sorted(one[2]) == sorted(two[0][2] + two[1][2])
        for _, epoch, index, x in two:
            assert epoch == one[1]
            assert all(torch.equal(pixels[i], x[k]) for k, i in enumerate(index))
    trainer_of(tmp_path, 1, devices=2, strategy="ddp_fork").test(
        Writer(tmp_path), data_of(), verbose=False
    )
    seen = [i for rank in range(2) for s in torch.load(tmp_path / f"test{rank}.pt") for i in s[2]]
    assert sorted(seen) == list(range(23))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_pixels_of_the_cpu(tmp_path, Recorder) -> None:
    runs = []
    for accelerator in ("cpu", "gpu"):
        recorder = Recorder()
        Trainer(
            max_epochs=1,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        ).fit(recorder, data_of(num_workers=1))
        runs.append(recorder.steps)
    for cpu, gpu in zip(*runs, strict=True):
        assert cpu[:3] == gpu[:3]
        assert torch.equal(cpu[3], gpu[3])


# ------------------------------------------------------------------------------------- configs


@pytest.fixture
def parse() -> Callable[..., ImageDataModule]:
    def parsed(*arguments: str) -> ImageDataModule:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(ImageDataModule, "data")
        data = parser.instantiate(parser.parse_args([*arguments])).data
        assert isinstance(data, ImageDataModule)
        return data

    return parsed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "Digits"),
        ("cifar10", "CIFAR-10"),
        ("cifar100", "CIFAR-100"),
        ("svhn", "SVHN"),
        ("mnist", "MNIST"),
        ("fashion_mnist", "Fashion-MNIST"),
        ("tiny_imagenet", "Tiny-ImageNet"),
    ],
)
def test_configs_build_their_data(parse, name, expected) -> None:
    data = parse("--data", str(CONFIGS / f"{name}.yaml"))
    assert data.source.spec.name == expected
    assert data.validate_on == "held-out"


def test_digits_config_gives_the_promised_sizes(parse) -> None:
    data = parse("--data", str(CONFIGS / "digits.yaml"))
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (800, 297, 700)
    assert len(data.train_dataloader()) == 8


def test_own_images_are_one_flag_away(parse, tmp_path, write_cifar10) -> None:
    root = write_cifar10(tmp_path / "data")
    arguments = ["--data", str(CONFIGS / "cifar10.yaml"), "--data.source.root", str(root)]
    with pytest.raises(DataUnavailableError, match=r"--data\.source\.verify false"):
        parse(*arguments).prepare_data()
    data = parse(*arguments, "--data.source.verify", "false", "--data.val_size", "0.3")
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (70, 30, 20)
