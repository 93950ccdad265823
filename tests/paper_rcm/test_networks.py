"""Batch-norms of two branches: sizes, starts, and what a branch may change."""

import pytest
import torch
from torch import nn

from common.errors import ConfigurationError
from common.modes import batch_statistics_kept
from common.networks.resnet import DigitsResNet, ResNet18
from paper_rcm.networks import SplitBatchNorm2d, SplitResNet18, branch, split_batch_norm


@pytest.fixture
def net() -> nn.Module:
    net = DigitsResNet()
    split_batch_norm(net)
    return net.train()


def test_parameters_are_those_of_the_released_network() -> None:
    with torch.device("meta"):
        nets = [SplitResNet18(), SplitResNet18(strides=(1, 1, 2, 2))]
    assert sum(p.numel() for p in nets[0].parameters()) == 11_183_562
    first, second = ({k: v.shape for k, v in net.state_dict().items()} for net in nets)
    assert first == second


def test_both_branches_begin_as_the_plain_network() -> None:
    torch.manual_seed(0)
    plain = ResNet18(widths=(8, 8, 8, 8)).eval()
    torch.manual_seed(0)
    split = SplitResNet18(widths=(8, 8, 8, 8)).eval()
    x = torch.rand(4, 3, 16, 16)
    for name in ("base", "auto"):
        with branch(split, name):  # type: ignore[arg-type]
            assert torch.equal(split(x), plain(x))
    norms = [m for m in split.modules() if isinstance(m, SplitBatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) == 20
    split_batch_norm(split)  # a second time changes nothing
    assert [m for m in split.modules() if isinstance(m, SplitBatchNorm2d)] == norms


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_branch_keeps_its_statistics_and_gradients_to_itself(net, is_kept) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(8, 1, 8, 8)
    if is_kept:
        with batch_statistics_kept(net), branch(net, "auto"):
            net(x)
    else:
        with branch(net, "auto"):
            net(x).sum().backward()
        for name, parameter in net.named_parameters():
            assert (parameter.grad is None) == (".base." in name), name
    moved = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
    assert bool(moved) != is_kept
    assert all(".auto." in name for name in moved)


def test_the_base_branch_comes_back_after_an_exception(net) -> None:
    with pytest.raises(RuntimeError), branch(net, "auto"):
        raise RuntimeError
    assert all(m.branch == "base" for m in net.modules() if isinstance(m, SplitBatchNorm2d))
    with pytest.raises(ConfigurationError, match="'other'"), branch(net, "other"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigurationError, match="SplitResNet18"), branch(DigitsResNet(), "auto"):
        pass
