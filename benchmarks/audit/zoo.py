"""The zoo: masked networks, which the audit should flag, and honest ones, which it should not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.audit import masks
from benchmarks.audit.masks import Behind, Front
from benchmarks.audit.networks import EPS, cnn, fitted, images, natural, robust
from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.networks.resnet import DigitsResNet
from common.networks.vit import ViT

Half = Literal["design", "held out"]


@dataclass(frozen=True)
class Case:
    """A network of the zoo.

    Args:
        name: As in the table.
        make: Trains it.
        is_masked: Whether it hides its weakness.
        half: Whether the audit was developed with it.
        draws: Random passes of which the most frequent label counts; 1 for a fixed function.
        is_stateful: Whether answers depend on earlier calls.
    """

    name: str
    make: Callable[[], nn.Module]
    is_masked: bool
    half: Half
    draws: int = 1
    is_stateful: bool = False


def _front(encode: masks.Encode) -> Callable[[], nn.Module]:
    return lambda: fitted(Front(cnn(), encode))


def _behind(hide: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Behind(natural(), hide).eval()


def _before(encode: masks.Encode) -> Callable[[], nn.Module]:
    return lambda: Front(natural(), encode).eval()


def distilled(temperature: float = 100.0) -> nn.Module:
    """Trained on a teacher's soft labels, both at a temperature (Papernot et al. 2016)."""

    def tempered(scores: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(scores / temperature, y)

    teacher = fitted(cnn(), epochs=20, loss_fn=tempered)
    x, _ = images("train")
    with torch.no_grad():
        soft = (teacher(x) / temperature).softmax(dim=1)
    torch.manual_seed(1)
    student = cnn()
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    student.train()
    for _ in range(20):
        for part in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            loss = -(soft[part] * (student(x[part]) / temperature).log_softmax(dim=1)).sum(dim=1)
            loss.mean().backward()
            optimizer.step()
    return student.eval().requires_grad_(False)


def gated() -> nn.Module:
    """Adversarially trained with a mask that gives no gradient."""
    torch.manual_seed(0)
    features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    return robust(nn.Sequential(*features, masks.Gate(512, 512), nn.Linear(512, 10)), epochs=4)


MASKED: dict[str, Callable[[], nn.Module]] = {
    "four grey levels": _front(masks.rounded),
    "bytes in numpy": _front(masks.as_bytes),
    "rounded cosine coefficients": _front(masks.compressed),
    "shattered": _front(masks.shattered),
    "reversed gradient": _before(masks.reversed_gradient),
    "undefined gradient": _before(masks.undefined),
    "thermometer with a table": lambda: fitted(masks.Thermometer()),
    "scrambled gradient": _before(masks.scrambled),
    "binary activations": lambda: fitted(cnn(masks.Binary), epochs=12),
    "detached gate": gated,
    "error-correcting codes": lambda: fitted(masks.Codes()),
    "defensive distillation": distilled,
    "label alone": _behind(masks.hard),
    "decoy shell": _behind(masks.decoy),
    "decoys chosen by a hash": _behind(masks.hash_decoy),
    "temperature of the image": _behind(masks.tempered),
    "lying detector": _behind(masks.lying_detector),
    "one class hidden": _behind(masks.hidden_threes),
    "votes under fixed noise": lambda: masks.Votes(natural()).eval(),
    "routed to experts": masks.Routed,
    "random rounding": _front(masks.random_rounded),
    "random decoys": _behind(masks.random_decoy),
    "random activations": lambda: fitted(cnn(masks.Fired), epochs=12),
    "remembers images": lambda: masks.Remembers(natural()).eval(),
    "counts calls": lambda: masks.Counts(natural()).eval(),
    "k winners take all": lambda: robust(cnn(masks.Winners)),
    "dark images hidden": _behind(masks.hidden_dark),
    "networks chosen by a hash": lambda: masks.Hashed().eval(),
    "scores of another network": lambda: masks.Borrowed().eval(),
    "nearest neighbour": lambda: masks.Nearest().eval(),
    "local optimum before the boundary": lambda: Behind(robust(cnn()), masks.trapped).eval(),
}
RANDOM = ("random rounding", "random decoys", "random activations")
STATEFUL = ("remembers images", "counts calls")


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, 10)
    )


def _strided() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(8, 2, dim=32, depth=1, heads=2, head_dim=16, mlp_dim=64, in_channels=1)


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return DigitsResNet()


class _Binary(nn.Conv2d):
    """Weights of one size and two signs."""

    def forward(self, h: Tensor) -> Tensor:
        binary = self.weight.sign() * self.weight.abs().mean()
        weight = self.weight + (binary - self.weight).detach()
        return nn.functional.conv2d(h, weight, self.bias, padding=self.padding)


def _binary() -> nn.Module:
    net: Any = cnn()
    net[4] = _Binary(8, 16, 3, padding=1)
    return robust(net)


class _Half(nn.Module):
    """Computes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = robust(cnn())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.net(x)
        return out.float()


class _Ensemble(nn.Module):
    """The mean of the probabilities of two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([robust(cnn()), robust(cnn(nn.GELU))])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x).softmax(dim=1) for net in self.nets]).mean(dim=0).log()


def _median(x: Tensor) -> Tensor:
    """The median of each pixel and its neighbours."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    around = nn.functional.unfold(padded, 3).view(len(x), 9, *x.shape[1:])
    return around.median(dim=1).values


class _Largest(nn.Module):
    """The larger one of every two channels (maxout, Goodfellow et al. 2013)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.view(len(h), -1, 2, *h.shape[2:]).amax(dim=2)


def _maxout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), _Largest(), nn.Conv2d(8, 32, 3, padding=1), _Largest()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )


def _scaled(factor: float) -> Callable[[], nn.Module]:
    return lambda: Behind(robust(cnn()), lambda scores, _: factor * scores).eval()


HONEST: dict[str, Callable[[], nn.Module]] = {
    "CNN": lambda: robust(cnn()),
    "CNN, natural training": natural,
    "CNN, TRADES": lambda: robust(cnn(), beta=4.0),
    "CNN, GELU": lambda: robust(cnn(nn.GELU)),
    "CNN, softplus and average pooling": lambda: robust(cnn(nn.Softplus, nn.AvgPool2d)),
    "CNN, strides": lambda: robust(_strided()),
    "CNN, small logits": _scaled(0.03),
    "CNN, temperature": _scaled(3.0),
    "ResNet": lambda: robust(_resnet(), epochs=4),
    "ViT": lambda: fitted(_vit(), PGD(EPS, steps=2), 15, beta=1.0, rate=2e-3),
    "MLP, layer norm": lambda: robust(_mlp()),
    "CNN, bfloat16 inside": lambda: _Half().eval(),
    "CNN, binary weights": _binary,
    "CNN, median filter": lambda: robust(Front(cnn(), _median)),
    "two CNNs": lambda: _Ensemble().eval(),
    "CNN, wide": lambda: robust(cnn(width=24), epochs=6),
    "CNN, maxout": lambda: robust(_maxout()),
}


def _half(position: int) -> Half:
    return "held out" if position % 2 else "design"


ZOO = [
    *(
        Case(name, make, True, _half(i), 11 if name in RANDOM else 1, name in STATEFUL)
        for i, (name, make) in enumerate(MASKED.items())
    ),
    *(Case(name, make, False, _half(i)) for i, (name, make) in enumerate(HONEST.items())),
]
"""Every second network of each kind is held out."""
