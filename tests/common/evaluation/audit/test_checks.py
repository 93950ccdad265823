"""The audit: no alarm on honest networks, one for each fault, and its steps."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.losses import label_loss
from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.evaluation.audit.checks import Audit
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.networks.vit import ViT
from common.results.lines import Outcomes, Threat

pytestmark = pytest.mark.filterwarnings("ignore")
THREAT = Threat("linf", 0.2)


def marked(table, *quick):
    """The names of a table, of which only these run by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in table]


def failed(checks) -> set[str]:
    return {name for name, check in checks.items() if check["verdict"] == "fail"}


class Chain(nn.Module):
    """Functions and networks one after another."""

    def __init__(self, *parts) -> None:
        super().__init__()
        self.parts = parts
        self.nets = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


# ------------------------------------------------------------------------------- honest networks


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(8, 2, dim=32, depth=1, heads=2, head_dim=16, mlp_dim=64, in_channels=1)


AT = PGD(0.2, steps=3)
HONEST = {
    "linear": lambda lab: lab.fitted(linear()),
    "CNN": lambda lab: lab.natural(),
    "CNN, adversarially trained": lambda lab: lab.robust(),
    "max-pooling, no normalisation": lambda lab: lab.fitted(
        lab.cnn(norm=lambda _: nn.Identity()), AT
    ),
    "softplus": lambda lab: lab.fitted(lab.cnn(nn.Softplus, nn.AvgPool2d)),
    "ViT": lambda lab: lab.fitted(vit()),
    "temperature": lambda lab: Chain(lab.robust(), lambda z: z / 3),
    "log-softmax": lambda lab: Chain(lab.natural(), lambda z: z.log_softmax(dim=1)),
    "float32 alone": lambda lab: Chain(lambda x: x.float(), lab.robust()),
}


@pytest.mark.parametrize("name", marked(HONEST, "linear"))
@pytest.mark.parametrize("eps", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_honest_networks_raise_none(lab, name, eps) -> None:
    assert failed(lab.audited(HONEST[name](lab), Threat("linf", eps))[0]) == set()


def test_a_robust_network_passes_every_check(lab):
    checks, outcomes = lab.audited(lab.robust(), examples=60, restarts=4, transfer=lab.natural())
    assert {check["verdict"] for check in checks.values()} == {"pass"}
    assert checks["finite_differences"]["value"] > 0.999
    standing = outcomes.correct["audit_restarts"][:60].float().mean()
    assert 0.1 < standing < 0.9  # otherwise the comparisons would be idle


def test_what_attacks_without_gradients_find_adds_up(lab):
    _, outcomes = lab.audited(lab.robust())
    keys = ("audit_fgsm", "audit_restarts", "audit_scale/margin=1", "audit_path/straight_through")
    counted = [key for key in outcomes.correct if key.startswith("audit_steps/")]
    standing = torch.stack([outcomes.correct[key] for key in (*keys, *counted)]).all(dim=0)
    rows = (standing & outcomes.attacked["audit_fgsm"]).nonzero().flatten()[:4]
    outcomes.correct["audit_square"][rows[:2]] = False
    outcomes.correct["audit_transfer"][rows[2:]] = False
    checks = {check["id"]: check for check in Audit(restarts=2).report(outcomes, 10)["checks"]}
    assert failed(checks) == {"gradient_free"}
    assert checks["gradient_free"]["value"] == 4 / 50


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Threat("l2", 1.0), Threat("l1", 4.0)])
def test_other_norms(lab, threat):
    checks, outcomes = lab.audited(lab.robust(), threat, steps=20 if threat.norm == "l2" else 40)
    assert failed(checks) == set()
    for key, columns in outcomes.columns.items():
        if key.startswith("audit_") and "loss" in columns and "eps=" not in key:
            distance = columns[threat.norm].nan_to_num(0.0)
            assert distance.max() <= threat.radius * (1 + 1e-4)


@pytest.mark.parametrize(
    ("classes", "is_right"), [(2, True), pytest.param(10, False, marks=pytest.mark.slow)]
)
def test_random_weights_and_colours(lab, classes, is_right):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, classes))
    x, drawn = torch.rand(30, 3, 8, 8), torch.randint(classes, (30,))
    y = net(x).argmax(dim=1) if is_right else drawn
    checks, _ = lab.audited(net, Threat("linf", "8/255"), (x, y), classes, decision_queries=50)
    assert failed(checks) == set()


@pytest.mark.slow
def test_a_quantiser_with_a_useful_gradient_of_its_own(lab):
    net = lab.fitted(Chain(lambda x: x + ((x * 3).round() / 3 - x).detach(), lab.cnn()))
    checks, _ = lab.audited(net)
    assert failed(checks) == set()
    assert checks["finite_differences"]["verdict"] == "not applicable"


# ------------------------------------------------------------------ faults and the checks they fail


class Gate(nn.Linear):
    """A mask that gives no gradient."""

    def forward(self, h):
        return h * torch.sigmoid(40.0 * super().forward(h)).detach()


def gated() -> nn.Module:
    torch.manual_seed(0)
    features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*features, Gate(512, 512), nn.Linear(512, 10))


class Restless(nn.BatchNorm2d):
    """Batch statistics for ever."""

    def train(self, mode=True):
        return super().train(True)


class Silent(Chain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def reversed_gradient(x):
    return 2 * x.detach() - x


NO_GRADIENT = {"gradient_path", "finite_differences", "coarse_differences", "zero_gradients"}


def quantised(function):
    return lambda lab: lab.fitted(Chain(function, lab.cnn()))


FAULTS = {
    "round": (quantised(lambda x: (3 * x).round() / 3), NO_GRADIENT),
    "bytes": (quantised(lambda x: ((255 * x).to(torch.uint8) // 64).float() / 3), NO_GRADIENT),
    "no_grad": (lambda lab: Silent(lab.natural()), NO_GRADIENT | {"black_box", "random_search"}),
    "mask": (lambda lab: lab.fitted(gated(), AT), {"finite_differences", "gradient_path"}),
    "noise": (
        lambda lab: Chain(lambda x: x + 0.2 * torch.randn_like(x), lab.robust()),
        {"deterministic", "finite_differences"},
    ),
    "batch statistics": (
        lambda lab: lab.fitted(
            nn.Sequential(nn.Conv2d(1, 8, 3), Restless(8), nn.Flatten(), nn.LazyLinear(10))
        ),
        {"deterministic"},
    ),
    # The targeted margin does not saturate.
    "large logits": (
        lambda lab: Chain(lab.natural(), lambda z: 1e3 * z),
        {"zero_gradients", "logit_scale"},
    ),
    "tanh": (
        lambda lab: Chain(lab.natural(), lambda z: 10 * torch.tanh(20 * z)),
        {"zero_gradients"},
    ),
    "reversed": (
        lambda lab: Chain(reversed_gradient, lab.robust()),
        {"loss_rises", "finite_differences", "coarse_differences", "eps_to_chance"},
    ),
    "ragged": (
        lambda lab: lab.fitted(Chain(lambda x: x + 0.05 * torch.sin(300 * x), lab.cnn())),
        {"more_steps", "coarse_differences"},
    ),
}


@pytest.mark.parametrize("name", marked(FAULTS, "no_grad", "noise", "reversed", "ragged"))
def test_a_fault_fails_its_checks(lab, name):
    make, expected = FAULTS[name]
    checks, _ = lab.audited(make(lab), restarts=4)
    assert failed(checks) >= expected
    if expected == NO_GRADIENT:
        assert failed(checks) & {"random_search", "black_box"}
        assert checks["zero_gradients"]["value"] == 1.0
    if name == "mask":
        assert 0.3 < checks["finite_differences"]["value"] < 0.98
    if name == "ragged":
        assert checks["finite_differences"]["verdict"] == "pass"


def test_restarts_that_keep_finding_something(lab):
    """Class 0, unless one pixel is in the top tenth of the ball; no gradient says so."""
    data = torch.full((60, 1, 8, 8), 0.5), torch.zeros(60, dtype=torch.long)
    lottery = Chain(lambda x: F.one_hot((x[:, 0, 0, 0] > 0.66).long(), 2).float())
    checks, _ = lab.audited(lottery, data=data, classes=2, examples=60, restarts=8)
    assert failed(checks) >= {"restarts"}


# --------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize(
    "name",
    ["examples", "steps", "restarts", "square_queries", "random_samples", "decision_queries"],
)
def test_settings_below_one_are_refused(name):
    with pytest.raises(ConfigurationError, match=name):
        Audit(**{name: 0})


def test_steps_have_different_names_and_settings(lab):
    steps = Audit().steps(Victim(lab.natural(), 10), THREAT, 10)
    keys = [step.key for step in steps]
    assert len(set(keys)) == len(keys)
    settings = [json.dumps([step.key, dict(step.settings)]) for step in steps]
    assert len(set(settings)) == len(settings)
    assert all(step.entry == step.key.split("/")[0] for step in steps)
    assert all(step.examples == 200 for step in steps)
    assert {"audit_steps/steps=1", "audit_steps/steps=200", "audit_eps/eps=1"} <= set(keys)
    probes = {step.key for step in steps if step.kind == "probe"}
    assert probes == {"audit_gradients", "audit_forward", "audit_memory"}
    assert all(step.threat is not None for step in steps if step.kind == "attack")


def test_steps_are_functions_of_their_examples(lab):
    cheap = {"examples": 10, "decision_queries": 20, "steps": 2}
    first, second = (lab.audited(lab.natural(), **cheap)[1] for _ in range(2))
    for key, columns in first.columns.items():
        for name, column in columns.items():
            assert torch.equal(column.nan_to_num(-1), second.columns[key][name].nan_to_num(-1))


class Two(Chain):
    """Two losses, of which only one has a gradient."""

    def __init__(self, net) -> None:
        super().__init__(lambda x: (7 * x).round() / 7, net)

    def adaptive_losses(self):
        return {
            "ce_f": lambda model, batch: label_loss(model, batch["y"]),
            "ce_soft": lambda model, batch: label_loss(model.parts[1], batch["y"]),
        }


def test_attacks_keep_the_union_over_losses(lab):
    cheap = {"examples": 40, "decision_queries": 10, "transfer": lab.natural()}
    both, alone = (
        lab.audited(Two(lab.natural()), losses=losses, **cheap) for losses in (None, ["ce_f"])
    )
    assert "eps_to_chance" in failed(alone[0])
    assert "eps_to_chance" not in failed(both[0])
    assert both[0]["zero_gradients"]["verdict"] == "pass"
    assert alone[0]["transfer"]["verdict"] == "fail", "the surrogate finds what gradients miss"
    key = "audit_steps/steps=6"
    assert both[1].correct[key][:40].sum() < alone[1].correct[key][:40].sum()


def test_examples_wrong_from_the_start_leave_nothing_to_attack(lab):
    x, _ = lab.images("test")
    checks, _ = lab.audited(lab.natural(), data=(x, (lab.natural()(x).argmax(dim=1) + 1) % 10))
    assert failed(checks) == set()


def test_no_report_without_steps():
    nothing = Outcomes(torch.zeros(3, dtype=torch.long), {"clean": torch.ones(3).bool()}, {})
    assert Audit().report(nothing, 10) == {"examples": 0, "checks": []}


@pytest.mark.slow
def test_black_box_attacks_do_not_depend_on_the_batch_size(lab) -> None:
    """The surrogate is distilled in one batch, whatever the size of the others."""
    x, y = (part[:50] for part in lab.images("test"))
    examples = {"x": x, "y": y, "index": torch.arange(50)}
    victim = Victim(lab.natural(), 10).eval()
    keys = ("audit_transfer", "audit_decision")
    steps = Audit(50, steps=10, decision_queries=500).steps(victim, THREAT, 10)
    steps = [step for step in steps if step.key in keys]
    found = [
        run_steps(victim, examples, steps, seed=0, batch_size=size, threat=THREAT)
        for size in (50, 13)
    ]
    for key in keys:
        assert torch.equal(found[0].correct[key], found[1].correct[key])
