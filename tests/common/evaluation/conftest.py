"""Networks trained on the digits, and an audit of them small enough for tests."""

import importlib
import json
from functools import cache, partial

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from common.attacks.losses import cross_entropy, label_loss
from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.evaluation.audit.checks import Audit
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.transfer import DistilledTransfer
from common.objectives import OnLogits
from common.results.lines import Threat
from common.results.schema import AuditResult

THREAT = Threat("linf", 0.2)
COST = {"steps": 6, "restarts": 2, "square_queries": 60, "random_samples": 20}
COST |= {"decision_queries": 120}


class Lab:
    """The digits, a small network trained on them, and its audit."""

    @staticmethod
    @cache
    def images(split: str) -> tuple[Tensor, Tensor]:
        x, y = Digits().load(split)
        return x.float() / 255, y

    @staticmethod
    def cnn(act=nn.ReLU, pool=nn.MaxPool2d, norm=nn.BatchNorm2d) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), norm(8), act(), pool(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), act(), nn.Flatten(), nn.Linear(256, 10)),
        )

    @staticmethod
    def fitted(net: nn.Module, attack: PGD | None = None, epochs: int = 4, rows=slice(None)):
        torch.manual_seed(0)
        x, y = (part[rows] for part in Lab.images("train"))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(epochs):
            for part in torch.randperm(len(y)).split(64):
                x_in, target = x[part], y[part]
                if attack is not None:
                    net.eval()
                    x_in = attack(label_loss(net, target), x_in)
                net.train()
                optimizer.zero_grad()
                cross_entropy(net(x_in), target).mean().backward()
                optimizer.step()
        return net.eval().requires_grad_(False)

    @staticmethod
    @cache
    def natural() -> nn.Module:
        return Lab.fitted(Lab.cnn())

    @staticmethod
    @cache
    def robust() -> nn.Module:
        return Lab.fitted(Lab.cnn(), PGD(0.2, steps=3))

    @staticmethod
    def audited(net, threat=THREAT, data=None, classes=10, examples=50, **changes):
        """Checks by id, and the outcomes."""
        x, y = (part[: max(60, examples)] for part in data or Lab.images("test"))
        audit = Audit(examples, **(COST | changes))
        model = net if hasattr(net, "adaptive_losses") else Victim(net, classes).eval()
        batch = {"x": x, "y": y, "index": torch.arange(len(y))}
        steps = audit.steps(model, threat, classes)
        outcomes = run_steps(model, batch, steps, seed=0, threat=threat)
        report = audit.report(outcomes, classes)
        TypeAdapter(AuditResult).validate_python(report)
        json.dumps(report, allow_nan=False)
        assert report["examples"] == min(examples, len(y))
        return {check["id"]: check for check in report["checks"]}, outcomes


class Linear(nn.Module):
    """Four classes, linear in the pixels around 0.5: its robust accuracy is known exactly.

    ``scale`` 0 leaves no gradient, large ones saturate the softmax.
    """

    def __init__(self, scale: float = 1.0, pixels: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, pixels, generator=generator))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T * self.scale

    @torch.no_grad()
    def exact(self, x: Tensor, y: Tensor, eps: float, norm: str = "linf") -> Tensor:
        """Which images no perturbation of that size breaks, while none leaves the box."""
        dual, rows = {"linf": 1, "l2": 2}[norm], torch.arange(len(y))
        z = self(x) / self.scale
        gap = z[rows, y][:, None] - z
        length = (self.weight[y][:, None] - self.weight).norm(p=dual, dim=2)
        gap[rows, y], length[rows, y] = 1.0, 0.0
        return (gap > eps * length).all(dim=1)


class Around(nn.Module):
    """A linear network of which ``function(model, x)`` makes something else."""

    def __init__(self, function, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.function = net or Linear(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.fixture(autouse=True)
def _short_attacks_by_labels(monkeypatch) -> None:
    short = partial(DistilledTransfer, steps=50)
    monkeypatch.setattr("common.evaluation.audit.checks.DistilledTransfer", short)
    monkeypatch.setattr("common.evaluation.confirm.QUERIES", 300)


@pytest.fixture(scope="session")
def linear() -> type[Linear]:
    return Linear


@pytest.fixture(scope="session")
def around():
    """``around(function, net)``: an :class:`Around` in evaluation mode."""
    return lambda *parts: Around(*parts).eval()


@pytest.fixture
def data(linear) -> tuple[Tensor, Tensor]:
    """40 images away from the edges of the box, with the labels that the linear network gives."""
    x = 0.35 + 0.3 * torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, linear()(x).argmax(1)


@pytest.fixture
def past_forward():
    """``past_forward(has_logits)``: the cross-entropy by a model's ``net``, past its forward."""

    def made(has_logits: bool = False):
        own = OnLogits(cross_entropy)

        def loss(model, batch):
            return own(model.net, batch)

        if has_logits:
            loss.with_logits = lambda model, batch: own.with_logits(model.net, batch)
        return loss

    return made


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(
        importlib.import_module("common.evaluation.pipeline"), "draw", lambda *_: {}
    )


@pytest.fixture(scope="session")
def lab() -> type[Lab]:
    return Lab
