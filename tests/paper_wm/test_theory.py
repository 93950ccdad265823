"""Closed forms against dense matrices, autograd and tables of exact fractions."""

import math

import pytest
import torch

from common.errors import ConfigurationError
from paper_wm.method import WeightMap
from paper_wm.theory import (
    box_eigenvalues,
    constant_response,
    dense_matrix,
    input_gradient,
    interior_gain,
    kernel,
    kernel_of,
    layer_noise_gain,
    map_gradient,
    noise_gain,
    operator_norm,
)

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


@pytest.mark.parametrize("name", TABLE)
def test_gains_and_responses_are_the_exact_fractions(name) -> None:
    """Invariants 9 and 10: zeros around the map, divisor k^2 at the border too."""
    settings, gains, responses = TABLE[name]
    weights = kernel(**settings)
    white = noise_gain(weights, torch.ones(1, 7, 7))[0]
    constant = constant_response(weights, 7, 7)
    made = layer(**settings)
    measured = made(torch.ones(1, 2, 7, 7, dtype=torch.float64))[0, 0].detach()
    for (i, j), gain, response in zip(PLACES, gains, responses, strict=True):
        assert float(white[i, j]) == pytest.approx(gain, abs=5e-6)
        assert float(constant[i, j]) == pytest.approx(response, abs=1e-12)
        assert float(measured[i, j]) == pytest.approx(response, abs=1e-12)
    assert interior_gain(**settings) == pytest.approx(gains[0])


@pytest.mark.parametrize("order", ["weight_then_reduce", "reduce_then_weight"])
@pytest.mark.parametrize("variant", FILTERS)
def test_noise_gains_of_any_map_are_row_sums_of_squares(variant, order) -> None:
    """Invariant 9, exactly, from the dense matrix."""
    made = layer((2, 5, 4), random=True, variant=variant, order=order, kernel_size=3)
    rows = dense_matrix(made).square().sum(dim=1).view(2, 5, 4)
    torch.testing.assert_close(layer_noise_gain(made), rows)


def test_noise_gain_of_a_shared_map() -> None:
    made = layer((2, 5, 4), random=True, variant="smoothing", shared=True)
    rows = dense_matrix(made).square().sum(dim=1).view(2, 5, 4)
    torch.testing.assert_close(layer_noise_gain(made), rows)


@pytest.mark.parametrize("lam", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("k", [3, 5])
def test_the_interior_gain_of_unsharp(k, lam) -> None:
    expected = (1 + lam * (1 - 1 / k**2)) ** 2 + lam**2 * (k**2 - 1) / k**4
    assert interior_gain("unsharp", k, lam=lam) == pytest.approx(expected)
    assert interior_gain("smoothing", k) == k**2


@pytest.mark.parametrize(
    ("settings", "side", "expected"),
    [
        ({"variant": "smoothing"}, 8, 8.290859),
        ({"variant": "smoothing"}, 16, 8.796837),
        ({"variant": "unsharp", "lam": 1.0}, 8, 2.281343),
        ({"variant": "unsharp", "lam": 1.0}, 16, 2.318327),
        ({"variant": "smoothing", "kernel_norm": "mean"}, 8, 8.290859 / 9),
        ({"variant": "scale"}, 8, 1.0),
    ],
)
def test_operator_norms(settings, side, expected) -> None:
    """Invariant 8."""
    assert operator_norm(height=side, width=side, **settings) == pytest.approx(expected, abs=1e-6)
    matrix = dense_matrix(layer((1, side, side), **settings))
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", FILTERS)
@pytest.mark.parametrize("k", [3, 5])
def test_operator_norms_of_other_sizes_match_the_matrix(variant, k) -> None:
    matrix = dense_matrix(layer((1, 7, 4), variant=variant, kernel_size=k))
    found = operator_norm(variant, 7, 4, k)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_eigenvalues_are_those_of_the_matrix(k) -> None:
    matrix = dense_matrix(layer((1, 5, 4), variant="smoothing", kernel_size=k))
    torch.testing.assert_close(matrix, matrix.T, msg="the box is its own transpose")
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(box_eigenvalues(5, 4, k).flatten().sort().values, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("variant", FILTERS)
def test_gradients_have_their_closed_forms(variant, shared) -> None:
    """Invariant 7."""
    made = layer((2, 5, 4), random=True, variant=variant, shared=shared)
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    y = made(x)
    to_x, to_map = torch.autograd.grad(y, (x, made.map), upstream)
    torch.testing.assert_close(to_x, input_gradient(made, upstream))
    torch.testing.assert_close(to_map, map_gradient(made, x, upstream))
    through, back = (y * upstream).sum().item(), (x * to_x).sum().item()
    assert math.isclose(through, back, rel_tol=1e-9), "adjoint"


def test_subtracting_is_no_filter_of_the_weighted_map() -> None:
    with pytest.raises(ConfigurationError, match="subtract_summed adds the unweighted input"):
        kernel_of(layer(variant="subtract_summed"))
    with pytest.raises(ConfigurationError, match="choose smoothing"):
        operator_norm("subtract", 8, 8)
