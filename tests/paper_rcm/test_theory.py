"""The statements D1 to D4 against autograd and sampling; average falls and maximum does not."""

import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from common.errors import ConfigurationError
from paper_rcm.method import DigitsNet, EnlargedNetwork, enlarge, parse_strides
from paper_rcm.theory import (
    averaged_convolution,
    effective_kernel,
    effective_norms,
    gamma_avg,
    gamma_max,
    max_bound,
    movement,
    overlap,
    random_movement,
    simulate,
)


def kernels(k: int = 3, count: int = 8) -> Tensor:
    return torch.randn(count, 3, k, k, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- D1


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_closed_norms_equal_those_of_the_gradient(k, stride):
    weight = kernels(k)
    w = effective_kernel(weight, 8, stride).flatten(1)
    l1, l2 = effective_norms(weight, 8, stride)
    assert torch.allclose(l1, w.abs().sum(1), rtol=1e-12)
    assert torch.allclose(l2, w.norm(dim=1), rtol=1e-12)


def test_the_effective_kernel_gives_the_movement_of_the_average():
    weight, x = kernels(), torch.rand(5, 3, 8, 8, dtype=torch.float64)
    delta = torch.randn_like(x)
    for circular in (True, False):
        w = effective_kernel(weight, 8, 2, circular)
        moved = averaged_convolution(x + delta, weight, 2, circular)
        moved = moved - averaged_convolution(x, weight, 2, circular)
        assert torch.allclose(moved, delta.flatten(1) @ w.flatten(1).T, atol=1e-12)


def test_refining_the_stride_raises_neither_norm():
    weight = kernels(count=200)
    norms = [effective_norms(weight, 16, s) for s in (8, 4, 2, 1)]
    for (coarse1, coarse2), (fine1, fine2) in itertools.pairwise(norms):
        assert (fine1 <= coarse1 + 1e-12).all()
        assert (fine2 <= coarse2 + 1e-12).all()
    ratio = norms[3][1].square().mean() / norms[2][1].square().mean()
    assert ratio.sqrt().item() == pytest.approx(0.5, abs=0.05)  # 2 -> 1, generic kernel


@pytest.mark.parametrize("stride", [1, 2])
def test_twice_the_side_halves_the_l2_norm_and_keeps_the_l1_norm(stride):
    weight = kernels()
    (l1, l2), (same, half) = (effective_norms(weight, side, stride) for side in (8, 16))
    assert torch.allclose(same, l1, rtol=1e-12)
    assert torch.allclose(half, l2 / 2, rtol=1e-12)


def test_noise_moves_the_average_by_the_l2_norm():
    weight = kernels(count=1)
    delta = torch.randn(20_000, 3, 8, 8, dtype=torch.float64)
    spread = averaged_convolution(delta, weight, 2).std().item()
    assert spread == pytest.approx(effective_norms(weight, 8, 2)[1].item(), rel=0.03)


def test_the_closed_form_needs_a_stride_that_divides_the_side():
    with pytest.raises(ConfigurationError, match="divides the side, got 3 and 8"):
        effective_norms(kernels(), 8, 3)


# ------------------------------------------------------------------------------------ D2 and D3


@pytest.mark.parametrize("n", [4, 64, 1024])
def test_radii_hold_with_their_probability(n):
    zeta = torch.randn(4000, n)  # of sub-Gaussian scale 1
    for p in (0.5, 0.9):
        assert max_bound(zeta).quantile(p) > 0.5 * gamma_max(n, p)  # and say something
        assert zeta.mean(1).abs().quantile(p) > 0.3 * gamma_avg(n, p)
        assert (zeta.mean(1).abs() <= gamma_avg(n, p)).float().mean() >= p
        assert (max_bound(zeta) <= gamma_max(n, p)).float().mean() >= p


def test_radii_grow_and_fall_with_the_map():
    sizes = [1, 4, 16, 64, 256]
    avg, top = [gamma_avg(n, 0.9) for n in sizes], [gamma_max(n, 0.9) for n in sizes]
    assert all(small > large for small, large in itertools.pairwise(avg))
    assert all(small < large for small, large in itertools.pairwise(top))
    assert gamma_avg(1, 0.9) == gamma_max(1, 0.9)  # one position: the same function
    assert gamma_avg(64, 0.9, bound=3.0) == pytest.approx(3 * gamma_avg(64, 0.9))
    assert gamma_avg(64, 0.9, overlap=4) == pytest.approx(gamma_avg(16, 0.9))


def test_overlap():
    assert [overlap(3, s) for s in (1, 2, 3, 4)] == [9, 4, 1, 1]


def test_responses_to_independent_pixels_have_the_scale_of_the_l2_norm():
    weight, eps, n = kernels(count=1), 0.03, 64
    delta = (2 * torch.rand(1000, 3, 8, 8, dtype=torch.float64) - 1) * eps
    zeta = F.conv2d(F.pad(delta, (1, 1, 1, 1), mode="circular"), weight).flatten(1)
    scale = eps * weight.norm().item()
    radius = gamma_avg(n, 0.9, scale, overlap(3, 1))
    assert (zeta.mean(1).abs() <= radius).double().mean() >= 0.9
    assert (max_bound(zeta) <= gamma_max(n, 0.9, scale)).double().mean() >= 0.9
    assert gamma_max(n, 0.9, scale) < eps * weight.abs().sum()


@pytest.mark.parametrize("gamma", [gamma_avg, gamma_max])
def test_radii_refuse_what_is_none(gamma):
    with pytest.raises(ConfigurationError, match="positions"):
        gamma(0, 0.5)
    with pytest.raises(ConfigurationError, match="probability"):
        gamma(4, 1.0)


def test_a_maximum_moves_by_at_most_the_largest_movement():
    z, zeta = torch.randn(2, 500, 30, dtype=torch.float64)
    moved = ((z + zeta).amax(1) - z.amax(1)).abs()
    assert (moved <= max_bound(zeta) + 1e-12).all()
    flat = ((0 * z + zeta.abs()).amax(1) - 0).abs()
    assert torch.equal(flat, max_bound(zeta))  # tight on a flat map
    more = [max_bound(zeta[:, :n]) for n in (1, 5, 30)]
    assert (more[0] <= more[1]).all()
    assert (more[1] <= more[2]).all()


# ------------------------------------------------------------------------------------------- D4


@pytest.mark.parametrize(("m", "stride"), [(2, 1), (2, 2), (4, 2), (3, 3)])
def test_up_sampling_is_a_finer_stride_for_one_circular_convolution(m, stride):
    weight, x = kernels(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    up = averaged_convolution(enlarge(x, m), weight, stride)
    assert torch.allclose(up, averaged_convolution(x, weight), atol=1e-12)
    assert torch.allclose(up, x.mean((2, 3)) @ weight.sum((2, 3)).T, atol=1e-12)


def test_up_sampling_is_something_else_with_zeros_around():
    weight, x = kernels(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    up = averaged_convolution(enlarge(x, 2), weight, 2, circular=False)
    assert (up - averaged_convolution(x, weight, circular=False)).abs().max() > 1e-3


# ----------------------------------------------------------------------------------- simulation


def test_average_falls_with_the_map_and_maximum_does_not():
    found = [simulate(side) for side in (4, 8, 16, 32)]
    avg = [m.avg for m in found]
    assert avg == pytest.approx([0.0374, 0.0225, 0.0099, 0.0058], rel=0.25)
    assert [m.max for m in found] == pytest.approx([0.151, 0.171, 0.186, 0.189], rel=0.25)
    assert avg[0] > 1.2 * avg[1] > 1.5 * avg[2] > 2 * avg[3]
    assert found[3].max > 0.95 * found[0].max


def test_maximum_grows_on_black_images():
    found = [simulate(side, images="zero") for side in (4, 8, 16, 32)]
    assert [m.max for m in found] == sorted(m.max for m in found)
    assert found[3].max > 1.5 * found[0].max


def test_average_grows_with_the_stride():
    found = [simulate(32, stride) for stride in (1, 2, 4, 8)]
    assert [m.avg for m in found] == pytest.approx([0.0050, 0.0114, 0.0252, 0.0442], rel=0.25)


def test_smooth_images_and_rectified_maps():
    smooth = [simulate(side, images="smooth").avg for side in (4, 16)]
    assert smooth[0] > 2 * smooth[1]
    flat = [simulate(side, images="zero", rectified=True).avg for side in (4, 16)]
    assert flat[1] > 0.9 * flat[0]  # the mean of rectified noise does not average out


def test_a_simulation_can_be_repeated():
    assert simulate(4, examples=2) == simulate(4, examples=2)
    assert simulate(4, examples=2) != simulate(4, examples=2, seed=1)
    with pytest.raises(ConfigurationError, match="images must be one of iid, smooth, zero"):
        simulate(4, images="grey")


# ------------------------------------------------------------------- the network before training


@pytest.fixture(scope="module")
def test_images() -> Tensor:
    digits = load_digits()
    rows = range(len(digits.images))
    split = train_test_split(rows, test_size=497, stratify=digits.target, random_state=0)
    return torch.tensor(digits.images[split[1]] / 16, dtype=torch.float32)[:, None]


# Means over ten seeds as measured; their own standard deviation is a third of that of one seed.
UNTRAINED = {
    "avg": {"222": 0.206, "122": 0.195, "112": 0.133, "111": 0.094},
    "max": {"222": 0.206, "122": 0.486, "112": 0.635},
}


def test_untrained_averages_move_less_and_maxima_more_on_larger_maps(test_images):
    found: dict[str, dict[str, float]] = {}
    for pool, expected in UNTRAINED.items():
        found[pool] = {
            strides: statistics.mean(random_movement(test_images, parse_strides(strides), pool))
            for strides in expected
        }
        assert found[pool] == pytest.approx(expected, abs=0.06 if pool == "avg" else 0.12)
    avg, top = found["avg"], found["max"]
    assert avg["122"] > 1.2 * avg["112"] > 1.2 * 1.2 * avg["111"]
    assert top["112"] > 1.1 * top["122"] > 1.1 * 1.5 * top["222"]
    assert avg["222"] == pytest.approx(top["222"])  # one pixel: the same function


def test_untrained_averages_move_less_on_larger_images(test_images):
    means = [
        statistics.mean(random_movement(test_images[:200], (1, 2, 2), scale_factor=m))
        for m in (1, 2)
    ]
    assert means == pytest.approx([0.195, 0.132], abs=0.06)
    assert means[0] > 1.2 * means[1]


def test_movement_is_the_mean_distance_of_pooled_features(test_images):
    net, x = EnlargedNetwork(DigitsNet((1, 2, 2))).eval(), test_images[:6]
    noise = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - 1) * 0.1
    with torch.no_grad():
        expected = F.pairwise_distance(net.pooled(x + noise), net.pooled(x), eps=0).mean()
    assert movement(net, x, 0.1, seed=3) == pytest.approx(expected.item(), rel=1e-5)
    assert movement(net, x, 0.0) == 0


def test_calibrated_networks_keep_the_signs(test_images):
    x = test_images[:200]
    avg = [random_movement(x, s, seeds=range(3), calibration=x) for s in ((2, 2, 2), (1, 1, 2))]
    assert statistics.mean(avg[0]) > 2 * statistics.mean(avg[1])


def test_measuring_leaves_the_random_state_alone(test_images):
    state = torch.get_rng_state()
    random_movement(test_images[:2], (2, 2, 2), seeds=[5])
    assert torch.equal(torch.get_rng_state(), state)
