"""Models that hide their weakness from gradients: an audit raises an alarm on each.

Every one has an attack that knows it and leaves next to nothing.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import label_loss
from common.attacks.pgd import PGD

pytestmark = pytest.mark.filterwarnings("ignore")


class Around(nn.Module):
    """Something around the natural network; the decoy's gradient leads nowhere."""

    def __init__(self, lab) -> None:
        super().__init__()
        self.net = lab.natural()
        torch.manual_seed(0)
        self.decoy = nn.Linear(64, 10).requires_grad_(False)

    def faint(self, x: Tensor) -> Tensor:
        return 1e-3 * self.decoy(x.flatten(1))

    def hard(self, x: Tensor) -> Tensor:
        return 10 * F.one_hot(self.net(x).argmax(dim=1), 10).float()


class HardWithDecoy(Around):
    def forward(self, x):
        return self.hard(x) + self.faint(x)


class Hard(Around):
    def forward(self, x):
        return self.hard(x)


class Ranks(Around):
    def forward(self, x):
        return self.net(x).argsort(dim=1).argsort(dim=1).float() + self.faint(x).tanh()


class ByNumpy(Around):
    def forward(self, x):
        labels = self.net(x.detach()).numpy().argmax(axis=1)
        return 10 * torch.eye(10)[torch.from_numpy(labels)] + self.faint(x)


class Thermometer(nn.Module):
    def __init__(self, lab) -> None:
        super().__init__()
        self.register_buffer("levels", torch.linspace(0.05, 0.95, 10).view(1, 10, 1, 1))
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(10, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        )

    def forward(self, x):
        return self.net((x > self.levels).float())


class Table(Thermometer):
    """Pixels look up a row of a table."""

    def __init__(self, lab) -> None:
        super().__init__(lab)
        self.rows = nn.Embedding(17, 10)

    def forward(self, x):
        return self.net(self.rows((16 * x[:, 0]).long()).movedim(-1, 1))


class Routed(nn.Module):
    """The natural network chooses which of the linear experts answers; nothing is detached."""

    def __init__(self, lab, experts: int) -> None:
        super().__init__()
        self.router = lab.natural()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(experts)
        )
        x, _ = lab.images("train")
        for i, expert in enumerate(self.experts):
            rows = (self.chosen(x) == i).nonzero().flatten()
            lab.fitted(expert, PGD(0.2, steps=2), 12, rows)

    def chosen(self, x):
        return self.router(x).argmax(dim=1) % len(self.experts)

    def forward(self, x):
        answers = torch.stack([expert(x) for expert in self.experts], dim=1)
        return answers[torch.arange(len(x)), self.chosen(x)]


class Dispatched(Routed):
    """The same with each expert run on its own images."""

    def forward(self, x):
        chosen = self.chosen(x)
        out = x.new_zeros(len(x), 10)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out = out.index_put((rows,), expert(x[rows]))
        return out


class Remembers(Around):
    """Images near one that was seen get its scores."""

    def __init__(self, lab) -> None:
        super().__init__(lab)
        self.images, self.scores = torch.zeros(0, 64), torch.zeros(0, 10)

    def forward(self, x):
        scores, flat = self.net(x), x.detach().flatten(1)
        if len(self.images):
            distance, at = torch.cdist(flat, self.images, p=torch.inf).min(dim=1)
            is_near = distance < 0.41
            scores = torch.where(is_near[:, None], self.scores[at], scores)
        else:
            is_near = torch.zeros(len(x), dtype=torch.bool)
        if len(self.images) < 500:
            self.images = torch.cat([self.images, flat[~is_near]])
            self.scores = torch.cat([self.scores, scores.detach()[~is_near]])
        return scores


class Counts(Around):
    """Answers without information after the twentieth call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) if self.calls < 20 else self.hard(x) + self.faint(x)


class CountsInBuffer(Around):
    def __init__(self, lab) -> None:
        super().__init__(lab)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        shift = (self.calls * torch.arange(10)).cos()
        return self.net(x) + shift


class CountsInClosure(Around):
    def __init__(self, lab) -> None:
        super().__init__(lab)
        calls = [0]

        def is_odd() -> bool:
            calls[0] += 1
            return calls[0] % 2 == 1

        self.is_odd = is_odd

    def forward(self, x):
        return self.net(x) if self.is_odd() else self.net(x).detach() + self.faint(x)


CACHE: dict[tuple[int, ...], Tensor] = {}


class GlobalCache(Around):
    """What is equal after rounding gets the first scores."""

    def forward(self, x):
        keys = (2 * x.detach().flatten(1)[:, ::4]).round().int().tolist()
        scores = self.net(x).detach()
        known = [CACHE.setdefault(tuple(key), z) for key, z in zip(keys, scores, strict=True)]
        return torch.stack(known) + self.faint(x)


class AllButZero(Around):
    def is_masked(self, label):
        return label != 0

    def forward(self, x):
        scores = self.net(x)
        rows = self.is_masked(scores.argmax(dim=1))[:, None]
        return torch.where(rows, self.hard(x) + self.faint(x), scores)


class AllButZeroDetached(AllButZero):
    def forward(self, x):
        scores = self.net(x)
        rows = self.is_masked(scores.argmax(dim=1))[:, None]
        return torch.where(rows, scores.detach() + self.faint(x), scores)


class OnlyThree(AllButZero):
    def is_masked(self, label):
        return label == 3


MASKED = {
    "hard with decoy": HardWithDecoy,
    "hard": Hard,
    "ranks": Ranks,
    "numpy": ByNumpy,
    "thermometer": lambda lab: lab.fitted(Thermometer(lab)),
    "table": lambda lab: lab.fitted(Table(lab)),
    "routed by 5": lambda lab: Routed(lab, 5),
    "routed by 10": lambda lab: Routed(lab, 10),
    "dispatched": lambda lab: Dispatched(lab, 5),
    "remembers": Remembers,
    "counts": Counts,
    "counts in a buffer": CountsInBuffer,
    "counts in a closure": CountsInClosure,
    "global cache": GlobalCache,
    "all but zero": AllButZero,
    "all but zero, detached": AllButZeroDetached,
    "only three": OnlyThree,
}
QUICK = ("hard with decoy", "counts", "all but zero")
STATEFUL = ("remembers", "counts", "counts in a buffer", "counts in a closure", "global cache")
BLACK_BOX = {"decision_based", "black_box", "transfer", "random_search"}


def known_attack(lab, model: nn.Module) -> float:
    """Accuracy under an attack that knows the model: on the network inside, as a fresh model."""
    x, y = (part[:50] for part in lab.images("test"))
    inside = getattr(model, "net", None) or model.router
    if isinstance(model, Thermometer):
        inside = lab.natural()
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
    CACHE.clear()
    # A class of ten is five images of fifty: too few to be told from chance.
    checks, outcomes = lab.audited(MASKED[name](lab), examples=100 if name == "only three" else 50)
    CACHE.clear()
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
