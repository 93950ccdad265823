"""Noise gains, responses and norms of the layer: closed forms against its dense matrix."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from paper_wm.method import WeightMap
from paper_wm.theory import layer_noise_gain

# settings -> white-noise gain and response to ones, each interior, edge, corner
TABLE = {
    "sum": ({"variant": "smoothing"}, (9, 6, 4), (9, 6, 4)),
    "mean": (
        {"variant": "smoothing", "kernel_norm": "mean"},
        (1 / 9, 2 / 27, 4 / 81),
        (1, 2 / 3, 4 / 9),
    ),
    "unsharp": (
        {"variant": "unsharp", "lam": 1.0},
        (11 / 3, 98 / 27, 292 / 81),
        (1, 4 / 3, 14 / 9),
    ),
    "half": (
        {"variant": "unsharp", "lam": 0.5},
        (19 / 9, 2.10185, 2.09568),
        (1, 7 / 6, 23 / 18),
    ),
    "highpass": ({"variant": "highpass"}, (8 / 9, 23 / 27, 67 / 81), (0, 1 / 3, 5 / 9)),
}
PLACES = ((3, 3), (0, 3), (0, 0))
FILTERS = ("smoothing", "unsharp", "highpass", "scale")


def layer(shape=(2, 7, 7), random: bool = False, **settings) -> WeightMap:
    made = WeightMap(shape=shape, **settings).double()
    if random:
        made.map.data.normal_()
    return made


@torch.no_grad()
def dense_matrix(made: WeightMap) -> Tensor:
    """The layer as a matrix ``(CHW, CHW)``: all unit inputs at once."""
    size = math.prod(made.shape)
    units = torch.eye(size, dtype=torch.float64)
    return made(units.view(size, *made.shape)).flatten(1).T


@pytest.mark.parametrize("name", TABLE)
def test_gains_and_responses_are_the_exact_fractions(name) -> None:
    """Zeros around the map, divisor k^2 at the border too."""
    settings, gains, responses = TABLE[name]
    made = layer(**settings)
    white = layer_noise_gain(made)[0]
    constant = made(torch.ones(1, 2, 7, 7, dtype=torch.float64))[0, 0].detach()
    for (i, j), gain, response in zip(PLACES, gains, responses, strict=True):
        assert float(white[i, j]) == pytest.approx(gain, abs=5e-6)
        assert float(constant[i, j]) == pytest.approx(response, abs=1e-12)


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
    made = layer((2, 5, 4), random=True, variant=variant, order=order, **settings)
    rows = dense_matrix(made).square().sum(dim=1).view(2, 5, 4)
    torch.testing.assert_close(layer_noise_gain(made), rows)


@pytest.mark.parametrize(
    ("settings", "side", "expected"),
    [
        ({"variant": "smoothing"}, 8, 8.290859),
        ({"variant": "smoothing"}, 16, 8.796837),
        ({"variant": "unsharp", "lam": 1.0}, 8, 2.281343),
        ({"variant": "scale"}, 8, 1.0),
    ],
)
def test_operator_norms(settings, side, expected) -> None:
    matrix = dense_matrix(layer((1, side, side), **settings))
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(expected, abs=1e-6)


def test_subtracting_is_no_filter_of_the_weighted_map() -> None:
    with pytest.raises(ConfigurationError, match="subtract_summed"):
        layer_noise_gain(layer(variant="subtract_summed"))
