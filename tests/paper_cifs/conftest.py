"""Small networks, images and channels for the tests of CIFS."""

import pytest
import torch

from common.networks.resnet import ResNet
from paper_cifs.measures import Channels
from paper_cifs.method import CIFSResNet, Probe

K = 3
SETTINGS = {
    "depths": (1, 1),
    "widths": (4, 8),
    "strides": (1, 2),
    "num_classes": K,
    "in_channels": 1,
}


def _plain_network(seed=0):
    torch.manual_seed(seed)
    return ResNet(**SETTINGS).eval()


def _cifs_network(seed=0, **settings):
    torch.manual_seed(seed)
    return CIFSResNet(**{**SETTINGS, "hidden": 5, **settings}).eval()


def _images(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return x, torch.arange(n) % K


def _random_channels(classes=K, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nat, adv = torch.rand(2, classes, channels, generator=generator, dtype=torch.float64)
    relevance = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    return Channels(nat, adv, relevance)


def _sharpen(net, factor=5.0):
    """Scale probes up, so that masks are far from uniform and classes are well apart."""
    for module in net.modules():
        if isinstance(module, Probe):
            module.output.weight.data *= factor
    return net


@pytest.fixture
def plain_network():
    return _plain_network


@pytest.fixture
def cifs_network():
    return _cifs_network


@pytest.fixture
def images():
    return _images


@pytest.fixture
def random_channels():
    return _random_channels


@pytest.fixture
def sharpen():
    return _sharpen
