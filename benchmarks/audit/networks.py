"""Small networks on the embedded digits, trained in seconds."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from common.attacks.losses import cross_entropy, kl_divergence, label_loss
from common.attacks.pgd import PGD
from common.data.base import Split
from common.data.sources import Digits

EPS = 0.2
"""Radius in linf of the threat model."""


@cache
def images(split: Split) -> tuple[Tensor, Tensor]:
    """Digits in [0, 1], ``(N, 1, 8, 8)``, and labels."""
    x, y = Digits().load(split)
    return x.float() / 255.0, y.long()


def cnn(
    act: Callable[[], nn.Module] = nn.ReLU,
    pool: Callable[[int], nn.Module] = nn.MaxPool2d,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    in_channels: int = 1,
    width: int = 8,
) -> nn.Module:
    """Two convolutions and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(in_channels, width, 3, padding=1), norm(width), act(), pool(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), act()),
        *(nn.Flatten(), nn.Linear(32 * width, 10)),
    )


def fitted(
    net: nn.Module,
    attack: PGD | None = None,
    epochs: int = 6,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    rows: Tensor | None = None,
    beta: float = 0.0,
    rate: float = 5e-3,
) -> nn.Module:
    """The network after training, in evaluation mode.

    With an ``attack`` on its images (adversarial training); with ``beta`` on clean ones and this
    times the divergence to attacked ones (TRADES). ``rows`` is the part of the images used.
    """
    torch.manual_seed(0)
    x, y = (part if rows is None else part[rows] for part in images("train"))
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(y)), 64):
            clean, target = x[part], y[part]
            attacked = clean
            if attack is not None:
                net.eval()
                attacked = attack(label_loss(net, target), clean)
            net.train()
            optimizer.zero_grad()
            if beta > 0.0:
                scores = net(clean)
                loss = loss_fn(scores, target) + beta * kl_divergence(scores, net(attacked))
            else:
                loss = loss_fn(net(attacked), target)
            loss.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval().requires_grad_(False)


def robust(net: nn.Module, epochs: int = 10, beta: float = 0.0, rate: float = 5e-3) -> nn.Module:
    """The network after adversarial training."""
    return fitted(net, PGD(EPS, steps=4), epochs, beta=beta, rate=rate)


@cache
def natural() -> nn.Module:
    """A network trained on clean images; hardly any withstands an attack."""
    return fitted(cnn())
