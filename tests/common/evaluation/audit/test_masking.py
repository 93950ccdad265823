"""Models that hide their weakness from gradients: an audit raises an alarm on each.

Every one has an attack that knows it and leaves next to nothing.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.attacks.pgd import PGD

pytestmark = pytest.mark.filterwarnings("ignore")


class Around(nn.Module):
    """A function of (model, images) around a network; the decoy's gradient leads nowhere."""

    calls = 0

    def __init__(self, net: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.decoy = net, nn.Linear(64, 10).requires_grad_(False)
        self.function = function
        self.images, self.scores = torch.zeros(0, 64), torch.zeros(0, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def faint(self, x: Tensor) -> Tensor:
        return 1e-3 * self.decoy(x.flatten(1))

    def hard(self, x: Tensor) -> Tensor:
        return 10 * F.one_hot(self.net(x).argmax(dim=1), 10).float()


def remembers(m: Around, x: Tensor) -> Tensor:
    """Images near one that was seen get its scores."""
    scores, flat = m.net(x), x.detach().flatten(1)
    is_near = torch.zeros(len(x), dtype=torch.bool)
    if len(m.images):
        distance, at = torch.cdist(flat, m.images, p=torch.inf).min(dim=1)
        is_near = distance < 0.41
        scores = torch.where(is_near[:, None], m.scores[at], scores)
    if len(m.images) < 500:
        m.images = torch.cat([m.images, flat[~is_near]])
        m.scores = torch.cat([m.scores, scores.detach()[~is_near]])
    return scores


def counts(m: Around, x: Tensor) -> Tensor:
    """Answers without information after the twentieth call."""
    m.calls += 1
    return m.net(x) if m.calls < 20 else m.hard(x) + m.faint(x)


def hides_threes(m: Around, x: Tensor) -> Tensor:
    scores = m.net(x)
    is_three = (scores.argmax(dim=1) == 3)[:, None]
    return torch.where(is_three, m.hard(x) + m.faint(x), scores)


AROUND = {
    "hard with decoy": lambda m, x: m.hard(x) + m.faint(x),
    "remembers": remembers,
    "counts": counts,
    "only three": hides_threes,
}


class Thermometer(nn.Module):
    """Pixels become ten thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels", torch.linspace(0.05, 0.95, 10).view(1, 10, 1, 1))
        torch.manual_seed(0)
        self.encoded = nn.Sequential(
            nn.Conv2d(10, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoded((x > self.levels).float())


class Routed(nn.Module):
    """The natural network chooses which of the linear experts answers; nothing is detached."""

    def __init__(self, lab, experts: int) -> None:
        super().__init__()
        self.net = lab.natural()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(experts)
        )
        x, _ = lab.images("train")
        for i, expert in enumerate(self.experts):
            rows = (self.chosen(x) == i).nonzero().flatten()
            lab.fitted(expert, PGD(0.2, steps=2), 12, rows)

    def chosen(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(dim=1) % len(self.experts)

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], dim=1)
        return answers[torch.arange(len(x)), self.chosen(x)]


MASKED = {
    name: lambda lab, around=around: Around(lab.natural(), around)
    for name, around in AROUND.items()
}
MASKED |= {
    "thermometer": lambda lab: lab.fitted(Thermometer()),
    "routed by 5": lambda lab: Routed(lab, 5),
}
QUICK = ("hard with decoy", "counts")
STATEFUL = ("remembers", "counts")
BLACK_BOX = {"decision_based", "black_box", "transfer", "random_search"}


def known_attack(lab, model: nn.Module) -> float:
    """Accuracy under an attack that knows the model: on the network inside, as a fresh model."""
    x, y = (part[:50] for part in lab.images("test"))
    inside = getattr(model, "net", None) or lab.natural()
    x_adv = PGD(0.2, steps=40)(label_loss(inside, y), x)
    with torch.no_grad():
        return float((model(x_adv).argmax(dim=1) == y).float().mean())


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKED],
)
def test_masked_models_raise_an_alarm(lab, name) -> None:
    torch.manual_seed(0)
    assert known_attack(lab, MASKED[name](lab)) <= 0.5  # a transfer attack on some of them
    # A class of ten is five images of fifty: too few to be told from chance.
    checks, outcomes = lab.audited(MASKED[name](lab), examples=100 if name == "only three" else 50)
    failed = {name for name, check in checks.items() if check["verdict"] == "fail"}
    if name in STATEFUL:
        assert "stateless" in failed
        return
    assert failed & BLACK_BOX
    counted = [key for key, line in outcomes.lines.items() if line.counts]
    met = outcomes.attacked["audit_fgsm"]
    worst = torch.stack([outcomes.correct[key][met] for key in counted]).all(dim=0)
    white = outcomes.correct["audit_restarts"][met]
    assert worst.float().mean() <= 0.1
    assert white.float().mean() > worst.float().mean()
