"""Operations and cells written out, and drop path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ConfigurationError
from paper_robustwrn.cells import (
    DARTS_V2,
    NASNET,
    Cell,
    FactorizedReduce,
    Genotype,
    drop_path,
    make_op,
)


def make_cell(genotype, reduction, after_reduction=False):
    ops, concat = (
        (genotype.reduce, genotype.reduce_concat)
        if reduction
        else (genotype.normal, genotype.normal_concat)
    )
    cell = Cell(ops, concat, 3, 5, 4, reduction, after_reduction).eval()
    larger = 16 if after_reduction else 8
    return cell, torch.rand(2, 3, larger, larger), torch.rand(2, 5, 8, 8)


@pytest.mark.parametrize("after_reduction", [False, True])
def test_normal_cell_of_darts_written_out(after_reduction):
    cell, x0, x1 = make_cell(DARTS_V2, False, after_reduction)
    assert isinstance(cell.input0, FactorizedReduce) == after_reduction
    s0, s1, op = cell.input0(x0), cell.input1(x1), cell.ops
    s2 = op[0](s0) + op[1](s1)
    s3 = op[2](s0) + op[3](s1)
    s4 = op[4](s1) + s0
    s5 = s0 + op[7](s2)
    assert torch.equal(cell(x0, x1), torch.cat([s2, s3, s4, s5], dim=1))
    assert cell.out_channels == 16


def test_reduction_cell_of_nasnet_written_out():
    cell, x0, x1 = make_cell(NASNET, True)
    s0, s1, op = cell.input0(x0), cell.input1(x1), cell.ops
    s2 = op[0](s1) + op[1](s0)
    s3 = F.max_pool2d(s1, 3, 2, 1) + op[3](s0)
    s4 = F.avg_pool2d(s1, 3, 2, 1, count_include_pad=False) + op[5](s0)
    s5 = s3 + F.avg_pool2d(s2, 3, 1, 1, count_include_pad=False)
    s6 = op[8](s2) + F.max_pool2d(s1, 3, 2, 1)
    assert torch.equal(cell(x0, x1), torch.cat([s4, s5, s6], dim=1))
    assert s6.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("sep_conv_5x5", "ReLU 5/2 1/1 BN ReLU 5/1 1/1 BN"),
        ("dil_conv_3x3", "ReLU 3/2 1/1 BN"),
        ("conv_7x1_1x7", "ReLU 7/2 1/1 BN"),
    ],
)
def test_operations(name, layers):
    op = make_op(name, 4, 2)
    short = {"BatchNorm2d": "BN"}
    found = [
        f"{m.kernel_size[1]}/{m.stride[1]}"
        if isinstance(m, nn.Conv2d)
        else short.get(type(m).__name__, type(m).__name__)
        for m in op
    ]
    assert " ".join(found) == layers
    assert all(m.bias is None for m in op if isinstance(m, nn.Conv2d))
    assert op(torch.rand(2, 4, 8, 8)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["sep_conv_7x7", "dil_conv_5x5", "skip_connect", "avg_pool_3x3"])
@pytest.mark.parametrize("side", [5, 6])
def test_operations_halve_the_map_rounded_up(name, side):
    assert make_op(name, 4, 1)(torch.rand(2, 4, side, side)).shape == (2, 4, side, side)
    assert make_op(name, 4, 2)(torch.rand(2, 4, side, side)).shape == (2, 4, 3, 3)


def test_factorized_reduction_reads_even_and_odd_pixels():
    op = FactorizedReduce(3, 4).eval()
    x = torch.randn(2, 3, 6, 6)
    even = torch.einsum("oc,nchw->nohw", op.even.weight[:, :, 0, 0], x.relu()[:, :, ::2, ::2])
    odd = torch.einsum("oc,nchw->nohw", op.odd.weight[:, :, 0, 0], x.relu()[:, :, 1::2, 1::2])
    assert torch.allclose(op(x), op.bn(torch.cat([even, odd], dim=1)), atol=1e-6)
    with pytest.raises(ConfigurationError, match="even number"):
        FactorizedReduce(3, 5)


def test_drop_path_zeroes_examples_and_keeps_the_mean():
    x = torch.ones(4000, 2, 1, 1)
    out = drop_path(x, 0.25)
    kept = out[:, 0, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75).view(-1, 1, 1, 1) * x)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_identities_are_never_dropped(monkeypatch):
    dropped = []

    def spy(x, probability):
        dropped.append(probability)
        return x

    monkeypatch.setattr("paper_robustwrn.cells.drop_path", spy)
    cell, x0, x1 = make_cell(DARTS_V2, False)
    cell.train()(x0, x1, 0.5)
    assert dropped == [0.5] * 6  # eight operations, two of them identities


@pytest.mark.parametrize(
    ("ops", "concat", "match"),
    [
        ([("none", 0), ("skip_connect", 0)], [2], "got 'none'"),
        ([("skip_connect", -1), ("skip_connect", 0)], [2], "operation 0 .* reads state -1"),
        ([("skip_connect", 0), ("skip_connect", 2)], [2], "operation 1 .* states 0 to 1 before"),
        ([("skip_connect", 0), ("skip_connect", 1)], [-1], r"0 to 2 to return, got \[-1\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [3], r"0 to 2 to return, got \[3\]"),
        ([("skip_connect", 0), ("skip_connect", 1)], [], "to return"),
    ],
)
def test_a_cell_has_the_states_that_it_reads_and_returns(ops, concat, match) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Genotype(ops, concat, DARTS_V2.reduce, DARTS_V2.reduce_concat)
