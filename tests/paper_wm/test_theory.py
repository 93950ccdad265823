"""Noise gains and responses of the layer: closed forms against its dense matrix."""

import math

import pytest
import torch

from common.errors import ConfigurationError
from paper_wm.method import WeightMap
from paper_wm.theory import layer_noise_gain

# settings -> white-noise gain and response to ones, each interior, edge, corner
TABLE = [
    ({"variant": "smoothing"}, (9, 6, 4), (9, 6, 4)),
    (
        {"variant": "smoothing", "kernel_norm": "mean"},
        (1 / 9, 2 / 27, 4 / 81),
        (1, 2 / 3, 4 / 9),
    ),
    ({"variant": "unsharp", "lam": 1.0}, (11 / 3, 98 / 27, 292 / 81), (1, 4 / 3, 14 / 9)),
    ({"variant": "unsharp", "lam": 0.5}, (19 / 9, 2.10185, 2.09568), (1, 7 / 6, 23 / 18)),
    ({"variant": "highpass"}, (8 / 9, 23 / 27, 67 / 81), (0, 1 / 3, 5 / 9)),
]


@pytest.mark.parametrize(("settings", "gains", "responses"), TABLE)
def test_gains_and_responses_are_the_exact_fractions(settings, gains, responses) -> None:
    """Zeros around the map, divisor k^2 at the border too."""
    made = WeightMap(shape=(2, 7, 7), **settings).double()
    white = layer_noise_gain(made)[0]
    constant = made(torch.ones(1, 2, 7, 7, dtype=torch.float64))[0, 0].detach()
    for place, gain, response in zip(((3, 3), (0, 3), (0, 0)), gains, responses, strict=True):
        assert float(white[place]) == pytest.approx(gain, abs=5e-6)
        assert float(constant[place]) == pytest.approx(response, abs=1e-12)


@pytest.mark.parametrize("order", ["weight_then_reduce", "reduce_then_weight"])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("smoothing", {}),
        ("smoothing", {"shared": True, "kernel_size": 5}),
        ("unsharp", {"lam": 2.0}),
        ("highpass", {}),
        ("scale", {}),
    ],
)
def test_noise_gains_of_any_map_are_row_sums_of_squares(variant, settings, order) -> None:
    made = WeightMap(variant, (2, 5, 4), order=order, **settings).double()
    made.map.data.normal_()
    size = math.prod(made.shape)
    units = torch.eye(size, dtype=torch.float64).view(size, *made.shape)
    matrix = made(units).detach().flatten(1).T
    torch.testing.assert_close(layer_noise_gain(made), matrix.square().sum(1).view(made.shape))


def test_subtracting_is_no_filter_of_the_weighted_map() -> None:
    with pytest.raises(ConfigurationError, match="subtract_summed"):
        layer_noise_gain(WeightMap("subtract_summed", (2, 5, 4)))
