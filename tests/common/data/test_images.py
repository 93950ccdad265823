"""Batches, splits and settings of the data module, and the data configurations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything

from common.data.images import ImageDataModule
from common.data.sources import CIFAR10, Digits
from common.data.subset import subset
from common.errors import ConfigurationError, DataUnavailableError

CONFIGS = Path(__file__).parents[3] / "common" / "configs"

# ------------------------------------------------------------------------------------- batches


def test_batches_keep_the_contract(Memory, module) -> None:
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


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_every_byte_becomes_the_nearest_float(precision, stub_trainer, module) -> None:
    data = module(trainer=stub_trainer())
    data.trainer.precision = precision
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    out = data.on_after_batch_transfer({"x": x, "index": torch.zeros(1, dtype=torch.int64)}, 0)
    exact = torch.arange(256, dtype=torch.float64) / 255
    assert torch.equal(out["x"].flatten(), exact if precision == "64-true" else exact.float())


def test_index_counts_within_each_split(module) -> None:
    data = module(batch_size=16, val_size=0.2)
    for loader, n in (
        (data.train_dataloader(), 80),
        (data.val_dataloader(), 20),
        (data.test_dataloader(), 23),
        (data.predict_dataloader(), 23),
    ):
        index = torch.cat([batch["index"] for batch in loader])
        assert sorted(index.tolist()) == list(range(n))


def test_one_example_is_a_row_of_a_batch(module) -> None:
    dataset = module().val_set
    assert dataset is not None
    single, several = dataset[3], dataset.__getitems__([5, 3])
    assert all(torch.equal(single[key], several[key][1]) for key in several)


def test_what_is_known_before_a_file_is_read(tmp_path) -> None:
    data = ImageDataModule(CIFAR10(root=str(tmp_path), download=False))
    assert (data.num_classes, data.shape, data.class_names[3]) == (10, (3, 32, 32), "cat")
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()
    with pytest.raises(DataUnavailableError):
        data.setup("fit")


@pytest.mark.parametrize(
    "settings",
    [
        {"val_size": 0.25},
        {"val_size": 297, "drop_last": True, "test_limit": 50},
        {"validate_on": "test", "train_limit": 500, "val_limit": 70},
    ],
)
def test_counts_are_those_of_the_sets_though_no_file_is_read(settings) -> None:
    data = ImageDataModule(Digits(), batch_size=100, **settings)
    counts = data.counts()
    data.setup()
    trained = sum(len(batch["y"]) for batch in data.train_dataloader())
    assert counts == {"train": trained, "val": len(data.val_set), "test": len(data.test_set)}


# -------------------------------------------------------------------------------------- splits


def test_held_out_examples_are_disjoint_and_proportional(Memory, module) -> None:
    data = module(Memory(n=101), val_size=20)
    train, val = set(data.train_set.rows.tolist()), set(data.val_set.rows.tolist())
    assert not train & val
    assert train | val == set(range(101))
    assert data.val_set.y.bincount().tolist() == [5, 5, 5, 5]


def test_held_out_part_ignores_the_training_seed(module) -> None:
    rows = module(seed=1).val_set.rows
    seed_everything(7)
    assert torch.equal(module(seed=2).val_set.rows, rows)
    assert torch.equal(module().val_set.rows, rows)
    assert not torch.equal(module(split_seed=1).val_set.rows, rows)


@pytest.mark.parametrize(("val_size", "expected"), [(0.25, 25), (7, 7), (0.001, 1), (1, 1)])
def test_val_size_is_a_count_or_a_fraction(val_size, expected, module) -> None:
    assert len(module(val_size=val_size).val_set) == expected


def test_validate_on_test_holds_nothing_out(Memory, module) -> None:
    data = module(validate_on="test")
    assert len(data.train_set) == 100
    assert torch.equal(data.val_set.y, data.test_set.y)
    first = next(iter(data.val_dataloader()))["x"]
    assert torch.equal(first, Memory().load("test")[0])


@pytest.mark.parametrize("validate_on", ["held-out", "test"])
@pytest.mark.parametrize("stages", [["fit", "test"], ["validate", "fit"], ["test", "validate"]])
def test_stages_in_any_order_give_the_same_sets(validate_on, stages, Memory, module) -> None:
    data = ImageDataModule(Memory(), validate_on=validate_on)
    for stage in stages:
        data.setup(stage)
    whole = module(validate_on=validate_on)
    for name in ("train_set", "val_set", "test_set"):
        mine, theirs = getattr(data, name), getattr(whole, name)
        assert mine is None or torch.equal(mine.rows, theirs.rows)
    assert data.train_set is not None or "fit" not in stages


def test_limits_take_examples_of_all_classes_in_proportion(module) -> None:
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


# ------------------------------------------------------------------------------ wrong settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("batch_size", 0), ("eval_batch_size", 0), ("crop_padding", -1), ("num_workers", -1)),
        *(("train_limit", 0), ("val_limit", 0), ("test_limit", -5), ("validate_on", "train")),
        *(("val_size", value) for value in (0, -3, 0.0, 1.0, float("nan"))),
    ],
)
def test_settings_out_of_range(setting, value, Memory) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.{setting} must be .*{value}"):
        ImageDataModule(Memory(), **{setting: value})


@pytest.mark.parametrize("val_size", [99, 1000, 0.999])
def test_val_size_must_leave_every_class_an_example(val_size, module) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.val_size {val_size}: .*hold out fewer"):
        module(val_size=val_size)


def test_dropping_the_only_batch_is_refused(module) -> None:
    with pytest.raises(ConfigurationError, match="drop_last: false"):
        module(batch_size=128, drop_last=True)


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


def test_digits_config_gives_the_promised_split(parse) -> None:
    data = parse("--data", str(CONFIGS / "digits.yaml"))
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (800, 297, 700)
    assert len(data.train_dataloader()) == 8
    counts = data.val_set.y.bincount()
    assert counts.max() - counts.min() <= 2
    # Another held-out part would make all published numbers incomparable.
    assert data.val_set.rows[:10].tolist() == [6, 8, 9, 16, 18, 19, 20, 22, 34, 36]


def test_own_images_are_one_flag_away(parse, tmp_path, write_cifar10) -> None:
    root = write_cifar10(tmp_path / "data")
    arguments = ["--data", str(CONFIGS / "cifar10.yaml"), "--data.source.root", str(root)]
    with pytest.raises(DataUnavailableError, match=r"--data\.source\.verify false"):
        parse(*arguments).prepare_data()
    data = parse(*arguments, "--data.source.verify", "false", "--data.val_size", "0.3")
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (70, 30, 20)
