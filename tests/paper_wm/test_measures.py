"""Gains and correlations against slow rewrites and cases known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from paper_wm.measures import (
    correlations,
    interior,
    measure_layer,
    record,
    sensitivity_at,
    shuffled,
    summarise,
    white_noise_check,
)
from paper_wm.method import WeightMap, insert_weight_maps, weight_maps


@pytest.fixture
def net() -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 5))
    insert_weight_maps(made, ["0"], (1, 8, 8), "smoothing", init="normal")
    return made.eval()


@torch.no_grad()
def numbers_of(layer: WeightMap, a: torch.Tensor, noisy: torch.Tensor, border: int = 3):
    sensitivity = torch.ones(a.shape[1:])
    return summarise(a, noisy, layer(a), layer(noisy), layer.map, sensitivity, border)


def test_gains_are_medians_of_ratios_of_variances_unit_by_unit() -> None:
    layer = WeightMap("unsharp", (2, 4, 5), init="normal")
    a, noise = torch.randn(7, 2, 4, 5), 0.1 * torch.randn(7, 2, 4, 5)
    found = numbers_of(layer, a, a + noise, border=1)
    parts = (a, layer(a).detach(), noise, (layer(a + noise) - layer(a)).detach())
    before, after, noise_in, noise_out = (np.var(p.double().numpy(), 0, ddof=1) for p in parts)
    signal, of_noise = after / before, noise_out / noise_in
    inside = np.s_[:, 1:-1, 1:-1]
    assert found["signal_gain"] == pytest.approx(np.sort(signal[inside].flat)[5], rel=1e-4)
    assert found["noise_gain"] == pytest.approx(np.sort(of_noise[inside].flat)[5], rel=1e-3)
    assert found["ratio"] == pytest.approx(found["signal_gain"] / found["noise_gain"])
    assert found["signal_spread"] == pytest.approx(np.log(signal[inside]).std(ddof=1), rel=1e-3)
    assert found["noise_spread"] == pytest.approx(np.log(of_noise[inside]).std(ddof=1), rel=1e-3)
    assert found["snr_in"] == pytest.approx(before.sum() / noise_in.sum(), rel=1e-4)
    assert found["snr_out"] == pytest.approx(after.sum() / noise_out.sum(), rel=1e-3)
    weight = layer.map.detach().double().numpy()
    assert (found["map_mean"], found["map_sd"]) == pytest.approx(
        (weight.mean(), weight.std(ddof=1))
    )
    link = np.corrcoef(np.log(before).flat, np.log(signal).flat)[0, 1]
    assert found["pearson_variance_gain"] == pytest.approx(link, abs=1e-4)


def test_a_constant_signal_in_white_noise_gains_what_theory_says() -> None:
    """81 for the signal, 9 for the noise, so the ratio of the two grows ninefold."""
    layer = WeightMap("smoothing", (1, 12, 12))
    a = torch.randn(3000, 1, 1, 1).expand(3000, 1, 12, 12)
    found = numbers_of(layer, a, a + 0.3 * torch.randn(3000, 1, 12, 12))
    assert found["signal_gain"] == pytest.approx(81.0, rel=1e-4)
    assert found["noise_gain"] == pytest.approx(9.0, rel=0.1)
    assert found["snr_ratio"] == pytest.approx(9.0, rel=0.1)
    assert found["map_sd"] == 0.0
    assert found["spearman_variance_map"] is None, "a constant map correlates with nothing"


def test_a_map_that_follows_the_variance_is_found_out() -> None:
    layer = WeightMap("scale", (1, 6, 6))
    scale = torch.rand(1, 6, 6) + 0.2
    a = torch.randn(500, 1, 6, 6) * scale
    for weight, sign in ((scale, 1.0), (1.0 / scale, -1.0)):
        layer.map.data.copy_(weight)
        found = numbers_of(layer, a, a + torch.randn_like(a), border=1)
        assert sign * found["spearman_variance_map"] > 0.9


def test_interior_leaves_out_the_border() -> None:
    values = torch.arange(2 * 5 * 6).view(2, 5, 6)
    assert interior(values, 2).tolist() == [14, 15, 44, 45]
    assert len(interior(values, 3)) == 60, "all where none is so far inside"
    assert len(interior(values, 0)) == 60


def test_correlations_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlations(x, 3.0 - 2.0 * x) == pytest.approx({"pearson": -1.0, "spearman": -1.0})
    curved = correlations(x, x.exp())
    assert curved["spearman"] == pytest.approx(1.0)
    assert curved["pearson"] < 0.95
    for y in (torch.ones(4), torch.tensor([1.0, math.inf, 0.0, 0.0])):
        assert correlations(x, y) == correlations(y, x) == {"pearson": None, "spearman": None}


def test_a_layer_is_recorded_and_differentiated_where_it_stands(net) -> None:
    (layer,) = weight_maps(net).values()
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    inside = nn.functional.conv2d(x, net[0].weight, net[0].bias, padding=1).detach()
    a, b = record(net, layer, x, batch_size=2)
    torch.testing.assert_close((a, b), (inside, layer(inside).detach()))
    z = inside.requires_grad_()
    loss = nn.functional.cross_entropy(net[2](layer(z).flatten(1)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(sensitivity_at(net, layer, x, y), gradient.abs().mean(0))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_noise_of_a_network_is_drawn_by_its_seed_and_not_clipped(net) -> None:
    (layer,) = weight_maps(net).values()
    x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 5
    state = torch.random.get_rng_state()
    one, same, other = (measure_layer(net, layer, x, y, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one == same
    assert one["noise_gain"] != other["noise_gain"]
    # Blank images have no variance; clipped noise would move the mean.
    assert one["snr_in"] == pytest.approx(0.0, abs=1e-9)


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
