"""Defences that hide a network's weakness from gradients, built on published ideas.

Each is a module with a method ``climbed``: the scores that an attacker who knows the defence climbs
in its place (without the mask, or with a smooth stand-in for it).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.audit.networks import EPS, cnn, fitted, images, natural, robust
from common.attacks.pgd import PGD

Encode = Callable[[Tensor], Tensor]


class Front(nn.Module):
    """Images are encoded before the network; an attacker gives that the gradient of x."""

    def __init__(self, net: nn.Module, encode: Encode) -> None:
        super().__init__()
        self.net, self.encode = net, encode

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.encode(x))
        return out

    def climbed(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            code = self.encode(x)
        out: Tensor = self.net(x + (code - x).detach())
        return out


class Behind(nn.Module):
    """``hide(scores, x)`` is what others see of the scores; an attacker leaves that out."""

    def __init__(self, net: nn.Module, hide: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.hide = net, hide

    def forward(self, x: Tensor) -> Tensor:
        return self.hide(self.net(x), x)

    def climbed(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def drawn(*shape: int) -> Tensor:
    """Fixed standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pixel_hash(x: Tensor) -> Tensor:
    """An integer ``(N,)`` that changes with any grey level."""
    weights = (1.0 + torch.arange(64.0).to(x)) ** 2
    return ((x * 255.0).floor().flatten(1) @ weights).long()


# ------------------------------------------------------------------------------ before the network


def rounded(x: Tensor) -> Tensor:
    """Four grey levels (feature squeezing, Xu et al. 2018)."""
    return (3.0 * x).round() / 3.0


def as_bytes(x: Tensor) -> Tensor:
    """Two bits per pixel, in numpy (Guo et al. 2018)."""
    levels = (255.0 * x.detach().numpy()).astype(np.uint8) >> 6
    return torch.from_numpy(levels / np.float32(3.0))


_FREQUENCY = torch.arange(8.0)
_DCT = torch.cos(torch.pi / 8.0 * (_FREQUENCY[None, :] + 0.5) * _FREQUENCY[:, None]) / 2.0
_DCT[0] /= 2.0**0.5
_STEPS = 0.1 * (1.0 + _FREQUENCY[:, None] + _FREQUENCY[None, :])


def compressed(x: Tensor) -> Tensor:
    """Cosine coefficients rounded, coarsely at high frequencies (JPEG; Das et al. 2017)."""
    d, steps = _DCT.to(x), _STEPS.to(x)
    return d.T @ ((d @ x @ d.T / steps).round() * steps) @ d


def shattered(x: Tensor) -> Tensor:
    """A fine ripple that dominates the gradient (shattered gradients, Athalye et al. 2018)."""
    return x + 0.05 * torch.sin(300.0 * x)


def scrambled(x: Tensor) -> Tensor:
    """The gradient has random signs, the value is x."""
    signs = drawn(*x.shape[1:]).sign().to(x)
    return x.detach() + signs * (x - x.detach())


def reversed_gradient(x: Tensor) -> Tensor:
    """The gradient points the other way, the value is x."""
    return 2.0 * x.detach() - x


def undefined(x: Tensor) -> Tensor:
    """The gradient is NaN, the value is x."""
    return x + 0.0 * (x - x.detach()).sqrt()


# ------------------------------------------------------------------------------- behind the network


def hard(scores: Tensor, x: Tensor) -> Tensor:
    """The label alone."""
    return 10.0 * F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(x)


def decoy(scores: Tensor, x: Tensor) -> Tensor:
    """The label, and a faint linear function whose gradient leads nowhere."""
    return hard(scores, x) + 1e-3 * x.flatten(1) @ drawn(64, 10).to(x)


def tempered(scores: Tensor, x: Tensor) -> Tensor:
    """A temperature whose steep dependence on the image dominates the gradient."""
    return scores * torch.exp(3.0 * torch.sin(x.flatten(1) @ drawn(64, 1).to(x)))


def trapped(scores: Tensor, x: Tensor) -> Tensor:
    """The margin is mirrored near the boundary, where an ascent stays in a local optimum."""
    top = scores.topk(2, dim=1)
    margin = top.values[:, :1] - top.values[:, 1:]
    shown = torch.where(margin < 1.5, 3.0 - margin, margin)
    return scores.scatter_add(1, top.indices[:, :1], shown - margin)


def hidden_threes(scores: Tensor, x: Tensor) -> Tensor:
    """One class shows a decoy."""
    is_three = (scores.argmax(dim=1) == 3)[:, None]
    return torch.where(is_three, decoy(scores, x), scores)


def hash_decoy(scores: Tensor, x: Tensor) -> Tensor:
    """The label, and one of 16 decoys that a hash of the pixels chooses."""
    directions = drawn(16, 64, 10).to(x)[pixel_hash(x) % 16]
    faint = torch.einsum("nd,ndk->nk", x.flatten(1), directions)
    return hard(scores, x) + 1e-2 * faint


def hidden_dark(scores: Tensor, x: Tensor) -> Tensor:
    """The two fifths of the images with the darkest centres show a decoy."""
    is_dark = _centre(x) < _centre(images("train")[0]).quantile(0.4)
    return torch.where(is_dark[:, None], decoy(scores, x), scores)


def _centre(x: Tensor) -> Tensor:
    return x[:, :, 2:6, 2:6].flatten(1).mean(dim=1)


def lying_detector(scores: Tensor, x: Tensor) -> Tensor:
    """Unusually rough images get the label alone (detectors, Metzen et al. 2017)."""
    inside = x.diff(dim=-1).abs().flatten(1).mean(dim=1)
    is_rough = inside > _roughest()
    return torch.where(is_rough[:, None], decoy(scores, x), scores)


def _roughest() -> Tensor:
    x, _ = images("train")
    return x.diff(dim=-1).abs().flatten(1).mean(dim=1).quantile(0.5)


# ----------------------------------------------------------------------------- inside the network


class Thermometer(nn.Module):
    """Grey levels become rows of a table of unary codes (Buckman et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tril(torch.ones(11, 11))[:, 1:].contiguous())
        self.net = cnn(in_channels=10)

    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        codes = F.embedding((10.0 * x).floor().long(), self.table)
        out: Tensor = self.net(codes.squeeze(1).permute(0, 3, 1, 2))
        return out

    def climbed(self, x: Tensor) -> Tensor:
        levels = torch.linspace(0.1, 1.0, 10).view(1, 10, 1, 1).to(x)
        out: Tensor = self.net(torch.sigmoid(20.0 * (x - levels)))
        return out


class Binary(nn.Module):
    """Signs, with a gradient in training only (low-precision layers, EMPIR, Sen et al. 2020)."""

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            clipped = h.clamp(-1.0, 1.0)
            return clipped + (h.sign() - clipped).detach()
        return h.sign()


class Winners(nn.Module):
    """The largest tenth of the activations; the others are 0 (Xiao et al. 2020)."""

    def forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(1)
        least = flat.topk(flat.shape[1] // 10, dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


class Gate(nn.Linear):
    """A mask computed from the features, through which no gradient passes."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(40.0 * super().forward(h)).detach()


class Codes(nn.Module):
    """Saturated bits compared with the code words of the classes (Verma & Swami 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.net[-1] = nn.Linear(256, 20)  # type: ignore[operator]
        self.register_buffer("words", drawn(10, 20).sign())

    words: Tensor

    def forward(self, x: Tensor) -> Tensor:
        slope = 1.0 if self.training else 200.0
        return torch.tanh(slope * self.net(x)) @ self.words.T

    def climbed(self, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.net(x)) @ self.words.T


class Votes(nn.Module):
    """Votes for copies with fixed noise (randomised smoothing, Cohen et al. 2019)."""

    def __init__(self, net: nn.Module, copies: int = 8, scale: float = 0.25) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("noise", scale * drawn(copies, 1, 1, 8, 8))

    noise: Tensor

    def _all(self, x: Tensor) -> Tensor:
        copies = (x + self.noise).flatten(0, 1)
        out: Tensor = self.net(copies).view(len(self.noise), len(x), 10)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self._all(x).argmax(dim=2), 10).to(x).sum(dim=0)

    def climbed(self, x: Tensor) -> Tensor:
        return self._all(x).softmax(dim=2).mean(dim=0).clamp_min(1e-6).log()


class Routed(nn.Module):
    """A network chooses which of several robust linear ones answers; no gradient reaches it."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.net, self.count = natural(), experts
        x, _ = images("train")
        parts = [(self._chosen(x) == i).nonzero().flatten() for i in range(experts)]
        self.experts = nn.ModuleList(
            fitted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), PGD(EPS, steps=2), 12, rows=rows)
            for rows in parts
        )

    def _chosen(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).argmax(dim=1) % self.count
        return out

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], dim=1)
        return answers[torch.arange(len(x)), self._chosen(x)]

    def climbed(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Hashed(nn.Module):
    """A hash of the pixels chooses one of several networks, each of which sees half of them."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        halves = (drawn(count, 1, 8, 8) > 0.0).float()
        self.nets = nn.ModuleList(
            fitted(Front(cnn(), half.mul), PGD(EPS, steps=2), 4) for half in halves
        )

    def _all(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets])

    def forward(self, x: Tensor) -> Tensor:
        return self._all(x)[pixel_hash(x) % len(self.nets), torch.arange(len(x))]

    def climbed(self, x: Tensor) -> Tensor:
        return self._all(x).softmax(dim=2).mean(dim=0).clamp_min(1e-6).log()


class Borrowed(nn.Module):
    """The label of one network with the scores of a robust one, two of which are swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = natural(), robust(cnn())

    def forward(self, x: Tensor) -> Tensor:
        scores, label = self.other(x), self.net(x).argmax(dim=1)
        pair = torch.stack([label, scores.argmax(dim=1)], dim=1)
        out: Tensor = scores.scatter(1, pair, scores.gather(1, pair.flip(1)))
        return out

    def climbed(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Nearest(nn.Module):
    """The label of the nearest training image."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.labels = images("train")

    def _distances(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(1), self.images.flatten(1).to(x))

    def forward(self, x: Tensor) -> Tensor:
        labels = self.labels[self._distances(x.detach()).argmin(dim=1)]
        return 10.0 * F.one_hot(labels, 10).to(x)

    def climbed(self, x: Tensor) -> Tensor:
        shares = (-5.0 * self._distances(x)).softmax(dim=1)
        return (shares @ F.one_hot(self.labels, 10).to(x)).clamp_min(1e-9).log()


# ------------------------------------------------------------------------------ random and stateful


def random_rounded(x: Tensor) -> Tensor:
    """Four grey levels, up or down at random (Raff et al. 2019, random discretisation)."""
    return (3.0 * x + torch.rand_like(x)).floor() / 3.0


def random_decoy(scores: Tensor, x: Tensor) -> Tensor:
    """The label, and another faint linear function in every call."""
    return hard(scores, x) + 1e-2 * x.flatten(1) @ torch.randn(64, 10).to(x)


class Fired(nn.Module):
    """Activations are 1 with a probability, without a gradient in evaluation mode."""

    def forward(self, h: Tensor) -> Tensor:
        probability = h.sigmoid()
        fired = (torch.rand_like(h) < probability).to(h)
        return fired + (probability - probability.detach() if self.training else 0.0)


class Remembers(Behind):
    """Images near one that was seen get its scores (stateful detection, Chen et al. 2020)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, hard)
        self.images, self.scores = torch.zeros(0, 64), torch.zeros(0, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores, flat = self.net(x), x.detach().flatten(1).float()
        is_near = torch.zeros(len(x), dtype=torch.bool)
        if len(self.images):
            distance, at = torch.cdist(flat, self.images, p=torch.inf).min(dim=1)
            is_near = distance < 2.05 * EPS
            scores = torch.where(is_near[:, None], self.scores[at].to(scores), scores)
        if len(self.images) < 500:
            self.images = torch.cat([self.images, flat[~is_near]])
            self.scores = torch.cat([self.scores, scores.detach()[~is_near].float()])
        out: Tensor = scores
        return out


class Counts(Behind):
    """The decoy alone from the second call on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, decoy)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.climbed(x) if self.calls <= 1 else super().forward(x)
