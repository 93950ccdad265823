import pytest
import torch

from common.attacks.noise import GaussianNoise, SaltAndPepperNoise, UniformNoise
from common.attacks.randomness import ExampleRandom, Stream
from common.errors import ConfigurationError

KINDS = [UniformNoise, GaussianNoise, SaltAndPepperNoise]
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(rows, step=0):
    return ExampleRandom(1, step, torch.as_tensor(rows), Stream.EVALUATION)


@pytest.mark.parametrize(
    ("kind", "level", "std", "shares"),
    [
        (UniformNoise, 0.3, 0.3 / 3**0.5, {0.03: 0.1, 0.15: 0.5, 0.27: 0.9, 0.3: 1.0}),
        (GaussianNoise, 0.05, 0.05, {0.05: 0.6827, 0.1: 0.9545, 0.15: 0.9973}),
    ],
)
def test_values_have_their_distribution(kind, level, std, shares):
    x = torch.full((40, 3, 16, 16), 0.5, dtype=torch.float64)
    delta = kind([level]).apply(x, level, random(range(40))) - x
    assert delta.mean().abs() < 0.03 * std  # five standard deviations
    assert delta.std().item() == pytest.approx(std, rel=0.02)
    for size, share in shares.items():
        assert (delta.abs() <= size).double().mean().item() == pytest.approx(share, abs=0.015)
    channels = torch.corrcoef(delta.transpose(0, 1).flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_salt_and_pepper_hits_whole_pixels_in_equal_parts(level):
    x = torch.full((40, 3, 32, 32), 0.4)
    noisy = SaltAndPepperNoise([level]).apply(x, level, random(range(40)))
    assert torch.equal(noisy, noisy[:, :1].expand_as(noisy))
    for value, share in ((0.0, level / 2), (1.0, level / 2), (0.4, 1 - level)):
        found = (noisy == torch.tensor(value)).float().mean().item()
        assert found == pytest.approx(share, abs=0.015)


@every_kind
def test_numbers_belong_to_the_example_and_every_draw_is_fresh(kind):
    x, noise, numbers = torch.full((2, 1, 8, 8), 0.5), kind([0.5]), random(range(2))
    first = noise.apply(x, 0.5, numbers)
    assert torch.equal(noise.apply(x, 0.5, random(range(2))), first)
    assert not torch.equal(noise.apply(x, 0.5, random(range(2), step=1)), first)
    assert not torch.equal(noise.apply(x, 0.5, numbers), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": []}, "at least one strength"),
        ({"levels": [0.1, "0.1"]}, "none twice"),
        ({"levels": [0.0]}, "above 0"),
        ({"levels": [-0.1]}, "a level must be a number of at least 0"),
        ({"levels": ["x"]}, "a level must be a number"),
        ({"levels": [0.1], "draws": 0}, "draws must be a whole number of at least 1"),
        ({"levels": [0.1], "seed": -1}, "seed must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        UniformNoise(**settings)


def test_levels_end_at_one_except_for_standard_deviations():
    for kind in (UniformNoise, SaltAndPepperNoise):
        with pytest.raises(ConfigurationError, match="above 0 and at most 1, got 8"):
            kind([8])
        with pytest.raises(ConfigurationError, match=r"at most 1, got 1\.5"):
            kind([0.1]).apply(torch.zeros(1, 1, 2, 2), 1.5, random([0]))
    assert GaussianNoise([2.0]).levels == [2.0]


@every_kind
def test_other_examples_and_other_types_are_refused(kind):
    with pytest.raises(ValueError, match="made for 3 examples and the batch has 2"):
        kind([0.1]).apply(torch.zeros(2, 1, 4, 4), 0.1, random(range(3)))
    with pytest.raises(ValueError, match="floating-point pixels"):
        kind([0.1]).apply(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0.1, random(range(2)))
