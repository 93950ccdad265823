"""D1 and D4 against autograd and sampling; the average falls with the map, the maximum does not."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigurationError
from paper_rcm.method import enlarge
from paper_rcm.theory import effective_norms, simulate


def kernels(k: int = 3, count: int = 8) -> Tensor:
    return torch.randn(count, 3, k, k, dtype=torch.float64)


def averages(x: Tensor, weight: Tensor, stride: int = 1, mode: str = "circular") -> Tensor:
    p = weight.shape[-1] // 2
    return F.conv2d(F.pad(x, (p, p, p, p), mode=mode), weight, stride=stride).mean((2, 3))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_closed_norms_equal_those_of_the_gradient(k, stride):
    weight = kernels(k)
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    w = torch.autograd.functional.jacobian(lambda z: averages(z, weight, stride)[0], x).flatten(1)
    l1, l2 = effective_norms(weight, 8, stride)
    assert torch.allclose(l1, w.abs().sum(1), rtol=1e-12)
    assert torch.allclose(l2, w.norm(dim=1), rtol=1e-12)


def test_refining_the_stride_raises_neither_norm():
    weight = kernels(count=200)
    norms = [effective_norms(weight, 16, s) for s in (8, 4, 2, 1)]
    for (coarse1, coarse2), (fine1, fine2) in itertools.pairwise(norms):
        assert (fine1 <= coarse1 + 1e-12).all()
        assert (fine2 <= coarse2 + 1e-12).all()
    ratio = norms[3][1].square().mean() / norms[2][1].square().mean()
    assert ratio.sqrt().item() == pytest.approx(0.5, abs=0.05)  # 2 -> 1, generic kernel
    same, half = effective_norms(weight, 32, 1)  # of twice the side
    assert torch.allclose(same, norms[3][0], rtol=1e-12)
    assert torch.allclose(half, norms[3][1] / 2, rtol=1e-12)
    with pytest.raises(ConfigurationError, match="got 3 and 8"):
        effective_norms(weight, 8, 3)


@pytest.mark.parametrize(("m", "stride"), [(2, 1), (2, 2), (4, 2), (3, 3)])
def test_up_sampling_is_a_finer_stride_for_one_circular_convolution(m, stride):
    weight, x = kernels(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    up = averages(enlarge(x, m), weight, stride)
    assert torch.allclose(up, averages(x, weight), atol=1e-12)
    assert torch.allclose(up, x.mean((2, 3)) @ weight.sum((2, 3)).T, atol=1e-12)
    zeros = averages(enlarge(x, m), weight, stride, "constant")
    assert (zeros - averages(x, weight, mode="constant")).abs().max() > 1e-3


def test_average_falls_with_the_map_and_maximum_does_not():
    found = [simulate(side) for side in (4, 8, 16, 32)]
    avg, top, predicted = ([one[key] for one in found] for key in ("avg", "max", "predicted"))
    assert avg == pytest.approx([0.0374, 0.0225, 0.0099, 0.0058], rel=0.25)
    assert top == pytest.approx([0.151, 0.171, 0.186, 0.189], rel=0.25)
    assert avg == pytest.approx(predicted, rel=0.25)
    assert avg[0] > 1.2 * avg[1] > 1.5 * avg[2] > 2 * avg[3]
    assert top[3] > 0.95 * top[0]
    coarse = [simulate(32, stride) for stride in (1, 2, 4, 8)]
    avg, predicted = ([one[key] for one in coarse] for key in ("avg", "predicted"))
    assert avg == pytest.approx([0.0050, 0.0114, 0.0252, 0.0442], rel=0.25)
    assert avg == pytest.approx(predicted, rel=0.15)
    assert simulate(4, examples=2) == simulate(4, examples=2)
    assert simulate(4, examples=2) != simulate(4, examples=2, seed=1)
