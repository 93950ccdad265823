"""Crops, flips and views of training images."""

import pytest
import torch
from torch import Tensor

from common.attacks.randomness import ExampleRandom
from common.data.images import Views, shift_and_flip
from common.errors import ConfigurationError


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_shift_and_flip_against_slices(padding, shape, mode, slow_shift_and_flip) -> None:
    x = torch.randint(1, 256, (9, *shape), dtype=torch.uint8)
    shift = torch.randint(2 * padding + 1, (9, 2))
    is_flipped = torch.arange(9) % 2 == 0
    out = shift_and_flip(x, shift, is_flipped, padding, mode)
    assert out.dtype == torch.uint8
    assert torch.equal(out, slow_shift_and_flip(x, shift, is_flipped, padding, mode))
    assert torch.equal(shift_and_flip(x.float(), shift, is_flipped, padding, mode), out.float())


def test_reflected_padding_is_a_setting(module) -> None:
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


def test_views_come_behind_the_images(stub_trainer, Memory, module) -> None:
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


def test_shifts_and_flips_are_uniform(module) -> None:
    data = module(crop_padding=1, flip=True)
    n = 3600
    x = torch.zeros(n, 1, 4, 4)
    x[:, :, 1:3, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # inside for every crop
    out = data.augment(x, torch.arange(n), epoch=3)[:, 0]
    one, two = ((out == value).flatten(1).int().argmax(1) for value in (1, 2))
    is_flipped = two < one
    first = torch.minimum(one, two)
    place = torch.stack([first // 4, first % 4], dim=1)
    counts = torch.bincount(place[:, 0] * 3 + place[:, 1], minlength=9)
    assert (counts - n / 9).abs().max() < 4.5 * (n / 9 * 8 / 9) ** 0.5
    assert abs(int(is_flipped.sum()) - n / 2) < 4.5 * (n / 4) ** 0.5
    # Flips are independent of shifts, and examples are not treated alike.
    assert abs(int(is_flipped[place[:, 0] == 0].sum()) - n / 6) < 4.5 * (n / 12) ** 0.5


def test_augmentation_does_not_depend_on_the_batch(Memory, module) -> None:
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


def test_augmentation_changes_with_epoch_and_seed_only_in_where_it_crops(Memory, module) -> None:
    x, _ = Memory().load("train")
    index = torch.arange(100)
    first = module(crop_padding=2, seed=3).augment(x, index, epoch=0)
    assert not torch.equal(module(crop_padding=2, seed=3).augment(x, index, epoch=1), first)
    assert not torch.equal(module(crop_padding=2, seed=4).augment(x, index, epoch=0), first)
    # Switching flips on leaves the crops where they were.
    both = module(crop_padding=2, flip=True, seed=3).augment(x, index, epoch=0)
    same = (both == first).flatten(1).all(1)
    assert 30 < int(same.sum()) < 70


def test_augmentation_leaves_the_random_state_alone(module) -> None:
    data = module(crop_padding=2, flip=True)
    before = torch.random.get_rng_state()
    for batch in data.train_dataloader():
        data.augment(batch["x"], batch["index"], epoch=0)
        assert module().augment(batch["x"], batch["index"], epoch=0) is batch["x"]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_only_training_batches_are_augmented(training, stub_trainer, Memory, module) -> None:
    trainer = stub_trainer(epoch=2, training=training)
    data = module(trainer=trainer, crop_padding=2, flip=True, views=None if training else Darker())
    x, _ = Memory().load("train")
    index = torch.arange(100)
    out = data.on_after_batch_transfer({"x": x, "index": index}, 0)
    expected = data.augment(x, index, epoch=2) if training else x
    assert torch.equal(out["x"], expected / 255)
    assert "view" not in out
