"""Batch-norms of two branches: sizes, starts, and what a branch may change."""

import pytest
import torch
from torch import nn

from common.errors import ConfigurationError
from common.modes import batch_statistics_kept
from common.networks.resnet import DigitsResNet, ResNet18
from paper_rcm.method import EnlargedNetwork
from paper_rcm.networks import SplitBatchNorm2d, SplitResNet18, branch, split_batch_norm


def small() -> nn.Module:
    net = DigitsResNet()
    split_batch_norm(net)
    return net


def test_parameters_are_those_of_the_released_network() -> None:
    net = SplitResNet18()
    assert sum(p.numel() for p in net.parameters()) == 11_183_562
    shrunk = SplitResNet18(strides=(1, 1, 2, 2))
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in shrunk.state_dict().items()
    }


def test_both_branches_begin_as_the_plain_network() -> None:
    torch.manual_seed(0)
    plain = ResNet18(widths=(8, 8, 8, 8))
    torch.manual_seed(0)
    split = SplitResNet18(widths=(8, 8, 8, 8))
    x = torch.rand(4, 3, 16, 16)
    for net in (plain, split):
        net.eval()
    for name in ("base", "auto"):
        with branch(split, name):  # type: ignore[arg-type]
            assert torch.equal(split(x), plain(x))
    assert not any(type(m) is nn.BatchNorm2d for m in split.children())
    norms = [m for m in split.modules() if isinstance(m, SplitBatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) == 20
    split_batch_norm(split)  # a second time changes nothing
    assert len([m for m in split.modules() if isinstance(m, SplitBatchNorm2d)]) == len(norms)


def test_a_branch_keeps_its_statistics_and_gradients_to_itself() -> None:
    net = small().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with branch(net, "auto"):
        net(torch.rand(8, 1, 8, 8)).sum().backward()
    moved = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all(".auto." in name for name in moved)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (".base." in name), name


def test_the_base_branch_comes_back_after_an_exception() -> None:
    net = small()
    with pytest.raises(RuntimeError), branch(net, "auto"):
        raise RuntimeError
    assert all(m.branch == "base" for m in net.modules() if isinstance(m, SplitBatchNorm2d))
    with pytest.raises(ConfigurationError, match="one of base, auto"), branch(net, "other"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigurationError, match="SplitResNet18"), branch(DigitsResNet(), "auto"):
        pass


def test_it_can_be_enlarged() -> None:
    net = EnlargedNetwork(SplitResNet18(widths=(8, 8, 8, 8)), scale_factor=2).eval()
    x = torch.rand(2, 3, 16, 16)
    with branch(net, "auto"):
        assert net(x).shape == (2, 10)


def test_statistics_of_both_branches_can_be_kept() -> None:
    net = small().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with batch_statistics_kept(net), branch(net, "auto"):
        net(torch.rand(8, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
