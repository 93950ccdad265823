"""Models that hide their weakness from gradients, with a known way to break each; honest ones.

Every masked model has an attack that knows it and leaves next to nothing; every audit has to raise
an alarm, and none on a network that hides nothing.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.evaluation.audit.checks import Audit
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.steps import Threat

pytestmark = pytest.mark.filterwarnings("ignore")
THREAT = Threat("linf", 0.2)
COST = {"steps": 10, "restarts": 2, "square_queries": 100, "random_samples": 30}
AUDIT = Audit(50, **COST, decision_queries=500)
AUDIT_OF_100 = Audit(100, **COST, decision_queries=500)


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    x, y = Digits().load(split)
    return x.float() / 255, y


def cnn(act=nn.ReLU, pool=nn.MaxPool2d, norm=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), norm(8), act(), pool(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), act(), nn.Flatten(), nn.Linear(256, 10)),
    )


def fitted(net: nn.Module, attack: PGD | None = None, epochs: int = 6, rows=slice(None)):
    torch.manual_seed(0)
    x, y = (part[rows] for part in images("train"))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(64):
            x_in, target = x[part], y[part]
            if attack is not None:
                net.eval()
                x_in = attack(lambda x, y=target: cross_entropy(net(x), y), x_in)
            net.train()
            optimizer.zero_grad()
            cross_entropy(net(x_in), target).mean().backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@cache
def natural() -> nn.Module:
    return fitted(cnn())


class Around(nn.Module):
    """Something around the natural network; the decoy's gradient leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = natural()
        torch.manual_seed(0)
        self.decoy = nn.Linear(64, 10).requires_grad_(False)

    def faint(self, x: Tensor) -> Tensor:
        return 1e-3 * self.decoy(x.flatten(1))

    def hard(self, x: Tensor) -> Tensor:
        return 10 * F.one_hot(self.net(x).argmax(dim=1), 10).float()


# ------------------------------------------------------------- scores that carry no information


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
    def __init__(self) -> None:
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

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(17, 10)

    def forward(self, x):
        return self.net(self.rows((16 * x[:, 0]).long()).movedim(-1, 1))


# ---------------------------------------------------------------------------------- hard routing


class Routed(nn.Module):
    """The natural network chooses which of the linear experts answers; nothing is detached."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = natural()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(experts)
        )
        x, _ = images("train")
        for i, expert in enumerate(self.experts):
            rows = (self.chosen(x) == i).nonzero().flatten()
            fitted(expert, PGD(0.2, steps=2), 12, rows)

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


# ------------------------------------------------------------ answers that depend on the past


class Remembers(Around):
    """Images near one that was seen get its scores."""

    def __init__(self) -> None:
        super().__init__()
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
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        shift = (self.calls * torch.arange(10)).cos()
        return self.net(x) + shift


class CountsInClosure(Around):
    def __init__(self) -> None:
        super().__init__()
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


# -------------------------------------------------------------------- some classes masked alone


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
    "thermometer": lambda: fitted(Thermometer()),
    "table": lambda: fitted(Table()),
    "routed by 5": lambda: Routed(5),
    "routed by 10": lambda: Routed(10),
    "dispatched": lambda: Dispatched(5),
    "remembers": Remembers,
    "counts": Counts,
    "counts in a buffer": CountsInBuffer,
    "counts in a closure": CountsInClosure,
    "global cache": GlobalCache,
    "all but zero": AllButZero,
    "all but zero, detached": AllButZeroDetached,
    "only three": OnlyThree,
}
QUICK = ("hard with decoy", "routed by 5", "counts", "all but zero")
STATEFUL = ("remembers", "counts", "counts in a buffer", "counts in a closure", "global cache")
BLACK_BOX = {"decision_based", "black_box", "transfer", "random_search"}


def audited(model: nn.Module, audit: Audit = AUDIT, threat: Threat = THREAT):
    """The checks that failed, and the outcomes."""
    x, y = (part[:100] for part in images("test"))
    examples = {"x": x, "y": y, "index": torch.arange(len(y))}
    victim = Victim(model, 10).eval()
    outcomes = run_steps(victim, examples, audit.steps(victim, threat, 10), seed=0, threat=threat)
    checks = audit.report(outcomes, 10)["checks"]
    return {check["id"] for check in checks if check["verdict"] == "fail"}, outcomes


def known_attack(model: nn.Module) -> float:
    """Accuracy under an attack that knows the model: on the network inside, as a fresh model."""
    x, y = (part[:50] for part in images("test"))
    inside = getattr(model, "net", None) or model.router
    if isinstance(model, Thermometer):
        inside = natural()
    x_adv = PGD(0.2, steps=40)(lambda x: cross_entropy(inside(x), y), x)
    with torch.no_grad():
        return float((model(x_adv).argmax(dim=1) == y).float().mean())


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKED],
)
def test_masked_models_raise_an_alarm(name) -> None:
    torch.manual_seed(0)
    assert known_attack(MASKED[name]()) <= 0.5  # a transfer attack on some of them
    CACHE.clear()
    # A class of ten is five images of fifty: too few to be told from chance.
    failed, outcomes = audited(MASKED[name](), AUDIT_OF_100 if name == "only three" else AUDIT)
    CACHE.clear()
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


# ------------------------------------------------------------------------------- honest networks


class TinyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layer(tokens).mean(dim=1))


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, function) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


AT = PGD(0.2, steps=3)
HONEST = {
    "linear": lambda: fitted(linear()),
    "linear, adversarially trained": lambda: fitted(linear(), AT),
    "MLP": lambda: fitted(mlp()),
    "CNN": natural,
    "CNN, adversarially trained": lambda: fitted(cnn(), AT),
    "max-pooling, no normalisation": lambda: fitted(cnn(norm=lambda _: nn.Identity()), AT),
    "softplus": lambda: fitted(cnn(nn.Softplus, nn.AvgPool2d)),
    "SiLU, adversarially trained": lambda: fitted(cnn(nn.SiLU, nn.AvgPool2d), AT),
    "ViT": lambda: fitted(TinyViT()),
    "temperature": lambda: Scaled(fitted(cnn(), AT), lambda z: z / 3),
    "log-softmax": lambda: Scaled(natural(), lambda z: z.log_softmax(dim=1)),
}
SOME = ("linear", "CNN, adversarially trained")


@pytest.mark.parametrize(
    "name",
    [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in HONEST],
)
@pytest.mark.parametrize("eps", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_honest_networks_raise_none(name, eps) -> None:
    failed, _ = audited(HONEST[name](), threat=Threat("linf", eps))
    assert failed == set()


@pytest.mark.slow
def test_black_box_attacks_do_not_depend_on_the_batch_size() -> None:
    """The surrogate is distilled in one batch, whatever the size of the others."""
    x, y = (part[:50] for part in images("test"))
    examples = {"x": x, "y": y, "index": torch.arange(50)}
    victim = Victim(natural(), 10).eval()
    keys = ("audit_transfer", "audit_decision")
    found = []
    for size in (50, 13):
        steps = [step for step in AUDIT.steps(victim, THREAT, 10) if step.key in keys]
        found.append(run_steps(victim, examples, steps, seed=0, batch_size=size, threat=THREAT))
    for key in keys:
        assert torch.equal(found[0].correct[key], found[1].correct[key])
