"""The order of examples: over epochs, processes, interrupted and resumed runs."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from common.attacks.randomness import ExampleRandom, Stream
from common.data.images import ImageDataModule
from common.errors import ConfigurationError
from common.objectives import weighted

# ---------------------------------------------------------------------------- several processes


def order_of(data: ImageDataModule, epoch: int = 0) -> list[list[int]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch["index"].tolist() for batch in loader]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("n", "drop_last"), [(80, False), (72, False), (79, True), (77, True), (80, True)]
)
def test_processes_share_the_batches_of_one(world_size, n, drop_last, stub_trainer, module) -> None:
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
def test_uneven_last_training_batch_is_shared_and_weighted(
    batch_size, stub_trainer, module
) -> None:
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
    world_size, accumulate, n, batches, drop_last, stub_trainer, module
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


def test_a_last_batch_with_fewer_examples_than_devices_is_refused(stub_trainer, module) -> None:
    options: dict[str, Any] = {"batch_size": 16, "validate_on": "test", "train_limit": 83}
    with pytest.raises(ConfigurationError, match=r"has 3 of the 83 .* 4 devices: set data\.drop"):
        module(trainer=stub_trainer(4), **options)
    dropped = module(trainer=stub_trainer(4), drop_last=True, **options).train_dataloader()
    assert [len(batch["y"]) for batch in dropped] == [4] * 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_sees_each_example_once(world_size, stage, stub_trainer, module) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        trainer = stub_trainer(world_size, rank)
        data = module(trainer=trainer, batch_size=12, eval_batch_size=5, val_size=11)
        for batch in getattr(data, f"{stage}_dataloader")():
            assert len(batch["y"]) <= 5
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(11 if stage == "val" else 23))


def test_examples_that_cannot_be_shared_are_refused(stub_trainer, module) -> None:
    with pytest.raises(ConfigurationError, match="2 examples cannot be divided over 4"):
        module(trainer=stub_trainer(world_size=4), val_limit=2)
    with pytest.raises(ConfigurationError, match=r"batch_size 128 .* 3 .* 126 or 129"):
        module(trainer=stub_trainer(world_size=3), batch_size=128)
    with pytest.raises(ConfigurationError, match=r"choose 4, or another"):
        module(trainer=stub_trainer(world_size=4), batch_size=2)


def test_lightnings_sampler_is_refused_with_several_devices(stub_trainer, module) -> None:
    trainer = stub_trainer(world_size=2)
    trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(ConfigurationError, match="set it to false"):
        module(trainer=trainer)
    alone = stub_trainer(world_size=1)
    alone._accelerator_connector.use_distributed_sampler = True
    module(trainer=alone)


def test_the_runs_seed_is_the_default(Memory, module) -> None:
    x, _ = Memory().load("train")
    index = torch.arange(100)
    seed_everything(11)
    mine = module(crop_padding=2)
    explicit = module(crop_padding=2, seed=11)
    assert torch.equal(mine.augment(x, index, 0), explicit.augment(x, index, 0))
    assert order_of(mine) == order_of(explicit)
    assert order_of(mine) != order_of(module(seed=12))


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


@pytest.fixture
def data_of(Memory) -> Callable[..., ImageDataModule]:
    def make(**kwargs: Any) -> ImageDataModule:
        options = {"batch_size": 16, "val_size": 20, "crop_padding": 2, "flip": True, "seed": 1}
        return ImageDataModule(Memory(), **(options | kwargs))

    return make


def test_trainer_gets_the_order_and_augmentation_of_each_epoch(
    tmp_path, Recorder, module, slow_shift_and_flip, data_of
) -> None:
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


def test_trainer_tests_and_predicts_without_augmentation(
    tmp_path, Recorder, Memory, data_of
) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, 1)
    trainer.test(recorder, data_of(eval_batch_size=7), verbose=False)
    assert torch.equal(torch.cat([x for *_, x in recorder.steps]), Memory().load("test")[0] / 255)
    predicted = trainer.predict(recorder, data_of(eval_batch_size=7))
    assert torch.cat(predicted).tolist() == list(range(23))


@pytest.mark.parametrize(("workers", "step"), [(0, 5), (0, 7), (1, 7)])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path, workers, step, Recorder, InterruptAt, data_of
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


def test_loader_asked_for_during_training_starts_at_its_beginning(
    tmp_path, Recorder, data_of
) -> None:
    lengths = []

    class Counting(Recorder):
        def on_train_batch_end(self, *_: Any) -> None:
            loader = self.trainer.datamodule.train_dataloader()
            lengths.append(sum(len(batch["y"]) for batch in loader))

    trainer_of(tmp_path, 1, limit_train_batches=3).fit(Counting(), data_of())
    assert lengths == [80, 80, 80]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_pixels_of_the_cpu(tmp_path, Recorder, data_of) -> None:
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
