"""Gains and correlations against slow rewrites and cases known in closed form."""

import math

import pytest
import torch
from torch import nn

from paper_wm.measures import (
    interior,
    measure_layer,
    measure_units,
    pearson,
    record,
    sensitivity_at,
    shuffled,
    spearman,
    summarise,
    white_noise_check,
)
from paper_wm.method import WeightMap, insert_weight_maps, weight_maps


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 5))
    insert_weight_maps(made, ["0"], (1, 8, 8), "smoothing", init="normal")
    return made.eval()


def units_of(layer: WeightMap, a: torch.Tensor, noisy: torch.Tensor):
    with torch.no_grad():
        b, b_noisy = layer(a), layer(noisy)
    return measure_units(a, noisy, b, b_noisy, layer.map, torch.ones(a.shape[1:]))


def test_gains_are_ratios_of_variances_unit_by_unit() -> None:
    layer = WeightMap("unsharp", (2, 4, 5), init="normal")
    a, noise = torch.randn(7, 2, 4, 5), 0.1 * torch.randn(7, 2, 4, 5)
    found = units_of(layer, a, a + noise)
    with torch.no_grad():
        b, db = layer(a), layer(a + noise) - layer(a)
    for c, i, j in ((0, 0, 0), (1, 3, 4), (1, 2, 2)):
        of = [t[:, c, i, j].double() for t in (a, b, noise, db)]
        variance = [float(((v - v.mean()) ** 2).sum() / 6) for v in of]
        assert float(found.variance[c, i, j]) == pytest.approx(variance[0], rel=1e-5)
        assert float(found.signal_gain[c, i, j]) == pytest.approx(
            variance[1] / variance[0], rel=1e-4
        )
        assert float(found.noise_gain[c, i, j]) == pytest.approx(
            variance[3] / variance[2], rel=1e-3
        )
    total = a.double().var(0).sum() / noise.double().var(0).sum()
    assert found.snr_in == pytest.approx(float(total), rel=1e-4)
    assert found.weight.shape == (2, 4, 5)


def test_a_constant_signal_in_white_noise_gains_what_theory_says() -> None:
    """81 for the signal, 9 for the noise, so the ratio of the two grows ninefold."""
    torch.manual_seed(0)
    layer = WeightMap("smoothing", (1, 12, 12))
    level = torch.randn(3000, 1, 1, 1)
    a = level.expand(3000, 1, 12, 12)
    found = summarise(units_of(layer, a, a + 0.3 * torch.randn(3000, 1, 12, 12)))
    assert found["signal_gain"] == pytest.approx(81.0, rel=1e-4)
    assert found["noise_gain"] == pytest.approx(9.0, rel=0.03)
    assert found["ratio"] == pytest.approx(9.0, rel=0.03)
    assert found["snr_ratio"] == pytest.approx(9.0, rel=0.1)
    assert found["map_sd"] == 0.0
    assert found["spearman_variance_map"] is None, "a constant map correlates with nothing"


def test_a_map_that_follows_the_variance_is_found_out() -> None:
    torch.manual_seed(0)
    layer = WeightMap("scale", (1, 6, 6))
    scale = torch.rand(1, 6, 6) + 0.2
    layer.map.data.copy_(scale)
    a = torch.randn(500, 1, 6, 6) * scale
    found = summarise(units_of(layer, a, a + torch.randn_like(a)), border=1)
    assert found["spearman_variance_map"] > 0.95
    assert found["pearson_variance_gain"] > 0.9
    assert found["noise_gain"] == pytest.approx(
        float(interior(scale, 1).square().median()), rel=0.2
    )
    layer.map.data.copy_(1.0 / scale)
    assert (
        summarise(units_of(layer, a, a + 1.0 * torch.randn_like(a)))["spearman_variance_map"] < -0.9
    )


def test_interior_leaves_out_the_border() -> None:
    values = torch.arange(2 * 5 * 6).view(2, 5, 6)
    assert interior(values, 2).tolist() == [14, 15, 44, 45]
    assert len(interior(values, 3)) == 60, "all where none is so far inside"
    assert len(interior(values, 0)) == 60


def test_correlations_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 3.0 - 2.0 * x) == pytest.approx(-1.0)
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert pearson(x, x.exp()) < 0.95
    y = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert pearson(x, y) == pytest.approx(0.0)
    assert pearson(x, torch.ones(4)) is None
    assert spearman(torch.ones(4), x) is None
    assert pearson(x, torch.tensor([1.0, math.inf, 0.0, 0.0])) is None


def test_record_sees_what_goes_in_and_comes_out(net) -> None:
    (layer,) = weight_maps(net).values()
    x = torch.rand(5, 1, 8, 8)
    a, b = record(net, layer, x, batch_size=2)
    conv = net[0]
    inside = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(a, inside.detach())
    torch.testing.assert_close(b, layer(inside).detach())
    assert not layer._forward_hooks


def test_sensitivity_is_the_mean_magnitude_of_the_gradient(net) -> None:
    (layer,) = weight_maps(net).values()
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    found = sensitivity_at(net, layer, x, y)
    conv = net[0]
    z = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).detach().requires_grad_()
    loss = nn.functional.cross_entropy(net[2](layer(z).flatten(1)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found, gradient.abs().mean(0))
    assert not layer._forward_pre_hooks


def test_noise_of_a_network_is_drawn_by_its_seed_and_not_clipped(net) -> None:
    (layer,) = weight_maps(net).values()
    x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 5
    state = torch.random.get_rng_state()
    one, same, other = (measure_layer(net, layer, x, y, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.noise_gain, same.noise_gain)
    assert not torch.equal(one.noise_gain, other.noise_gain)
    # Blank images have no variance; unclipped noise has the same in every direction.
    assert one.snr_in == pytest.approx(0.0, abs=1e-9)
    assert (one.variance < 1e-12).all()


def test_shuffling_moves_values_and_nothing_else(net) -> None:
    twin = shuffled(net)
    (mine,), (theirs,) = weight_maps(net).values(), weight_maps(twin).values()
    assert not torch.equal(mine.map, theirs.map)
    assert torch.equal(mine.map.flatten().sort().values, theirs.map.flatten().sort().values)
    assert torch.equal(twin[0].weight, net[0].weight)
    assert torch.equal(shuffled(net)[0].weight_map.map, theirs.map)


@pytest.mark.parametrize("variant", ["smoothing", "unsharp", "highpass", "scale"])
def test_white_noise_measures_what_theory_says(variant) -> None:
    layer = WeightMap(variant, (2, 6, 6), init="normal")
    found = white_noise_check(layer, draws=4000)
    assert found["measured"] == pytest.approx(found["theory"], rel=0.03)
