import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation.audit.checks import Audit
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.steps import Outcomes, Threat
from common.results.validation import _check_audit

pytestmark = pytest.mark.filterwarnings("ignore:AutoAttack")
THREAT = Threat("linf", 0.2)
SMALL = {"examples": 40, "steps": 10, "restarts": 4, "square_queries": 150, "random_samples": 60}
SMALL |= {"decision_queries": 500}


def images(split):
    x, y = Digits().load(split)
    return x.float() / 255, y


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, 10),
    )


def trained(net: nn.Module, attack: PGD | None = None, epochs: int = 6) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    x, y = images("train")
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(64):
            x_adv, target = x[rows], y[rows]
            if attack is not None:
                net.eval()
                x_adv = attack(lambda x, y=target: cross_entropy(net(x), y), x_adv)
            net.train()
            optimizer.zero_grad()
            cross_entropy(net(x_adv), target).mean().backward()
            optimizer.step()
    return net.eval()


class Before(nn.Module):
    """Some function in front of a network."""

    def __init__(self, function, net):
        super().__init__()
        self.function, self.net = function, net

    def forward(self, x):
        return self.net(self.function(x))


class After(nn.Module):
    """Some function behind a network."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


def audited(net: nn.Module, threat: Threat = THREAT, data=None, classes: int = 10, **changes):
    """Checks by id, and the outcomes."""
    x, y = data or images("test")
    x, y = x[:60], y[:60]
    examples = {"x": x, "y": y, "index": torch.arange(len(y))}
    audit = Audit(**(SMALL | changes))
    model = net if hasattr(net, "adaptive_losses") else Victim(net, classes).eval()
    steps = audit.steps(model, threat, classes)
    outcomes = run_steps(model, examples, steps, seed=0, threat=threat)
    report = audit.report(outcomes, classes)
    _check_audit(report, "audit.")
    json.dumps(report, allow_nan=False)
    assert report["examples"] == min(audit.examples, len(y))
    return {check["id"]: check for check in report["checks"]}, outcomes


def failed(checks) -> set[str]:
    return {name for name, check in checks.items() if check["verdict"] == "fail"}


@pytest.fixture(scope="module")
def natural():
    return trained(cnn())


@pytest.fixture(scope="module")
def robust():
    return trained(cnn(), PGD(0.2, steps=3))


@pytest.fixture(scope="module")
def detached():
    return trained(Masked(), PGD(0.2, steps=3))


# --------------------------------------------------------------------------------- honest networks


def test_a_robust_network_passes_every_check(robust, natural):
    checks, outcomes = audited(robust, examples=60, transfer=natural)
    assert failed(checks) == set()
    assert all(check["verdict"] == "pass" for check in checks.values())
    assert checks["finite_differences"]["value"] > 0.999
    standing = outcomes.correct["audit_restarts"][:60].float().mean()
    assert 0.1 < standing < 0.9  # otherwise the comparisons would be idle


def test_a_natural_network_passes_every_check(natural):
    checks, _ = audited(natural)
    assert failed(checks) == set()
    assert checks["transfer"]["verdict"] == "pass"  # the surrogate is distilled


@pytest.mark.parametrize("threat", [Threat("l2", 1.0), Threat("l1", 4.0)])
def test_other_norms(robust, threat):
    checks, outcomes = audited(robust, threat, steps=20 if threat.norm == "l2" else 40)
    assert failed(checks) == set()
    for key, columns in outcomes.columns.items():
        if key.startswith("audit_") and "loss" in columns and "eps=" not in key:
            distance = columns[threat.norm].nan_to_num(0.0)
            assert distance.max() <= threat.radius * (1 + 1e-4)


@pytest.mark.parametrize("classes", [2, 10])
def test_random_weights_and_colours(classes):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, classes))
    x = torch.rand(40, 3, 8, 8)
    for y in (net(x).argmax(dim=1), torch.randint(classes, (40,))):
        checks, _ = audited(net, Threat("linf", "8/255"), (x, y), classes)
        assert failed(checks) == set()


def test_networks_that_insist_on_float32(robust):
    checks, _ = audited(Before(lambda x: x.float(), robust))
    assert failed(checks) == set()


def test_a_quantiser_with_a_useful_gradient_of_its_own():
    net = trained(Before(lambda x: x + ((x * 3).round() / 3 - x).detach(), cnn()))
    checks, _ = audited(net)
    assert failed(checks) == set()
    assert checks["finite_differences"]["verdict"] == "not applicable"


# --------------------------------------------------------------------------------- masked networks


class Masked(nn.Module):
    """Features times a mask that gives no gradient."""

    sharpness = 40.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.gate, self.output = nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x):
        h = self.features(x)
        return self.output(h * torch.sigmoid(self.sharpness * self.gate(h)).detach())


class Decoy(nn.Module):
    """All of the image is detached, but for a gradient that leads nowhere."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        torch.manual_seed(0)
        self.decoy = nn.Linear(64, 10)

    def forward(self, x):
        return self.net(x.detach()) + 1e-3 * self.decoy(x.flatten(1))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Zeroed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (3 * x).round() / 3

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Restless(nn.BatchNorm2d):
    """Batch statistics for ever."""

    def train(self, mode=True):
        return super().train(True)


NO_GRADIENT = {
    "black_box",
    "gradient_path",
    "finite_differences",
    "coarse_differences",
    "zero_gradients",
    "random_search",
}


@pytest.mark.parametrize(
    "quantise",
    [
        lambda x: (3 * x).round() / 3,
        lambda x: (15 * x).floor() / 15,
        Zeroed.apply,
        lambda x: ((255 * x).to(torch.uint8) // 64).float() / 3,
        lambda x: (x > 0.5).float(),
    ],
    ids=["round", "floor", "function", "bytes", "threshold"],
)
def test_steps_in_front_of_the_network(quantise):
    checks, _ = audited(trained(Before(quantise, cnn())))
    assert failed(checks) >= NO_GRADIENT - {"random_search", "black_box"}
    assert failed(checks) & {"random_search", "black_box"}
    assert checks["zero_gradients"]["value"] == 1.0


def test_a_forward_pass_without_gradient(natural):
    class Silent(Before):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    assert failed(audited(Silent(lambda x: x, natural))[0]) >= NO_GRADIENT


def test_a_detached_mask(detached):
    checks, _ = audited(detached, examples=60)
    assert failed(checks) >= {"finite_differences", "gradient_path"}
    assert 0.3 < checks["finite_differences"]["value"] < 0.98


def test_a_decoy(natural):
    found = failed(audited(Decoy(natural))[0])
    assert found >= {"gradient_path", "black_box", "random_search"}
    assert found >= {"finite_differences", "coarse_differences"}


@pytest.mark.parametrize(
    "chance",
    [lambda x: x + 0.2 * torch.randn_like(x), lambda x: F.dropout(x, 0.3, training=True)],
    ids=["noise", "dropout"],
)
def test_random_networks(robust, chance):
    found = failed(audited(Before(chance, robust))[0])
    assert found >= {"deterministic", "finite_differences"}


def test_predictions_that_depend_on_the_batch(robust):
    net = trained(nn.Sequential(nn.Conv2d(1, 8, 3), Restless(8), nn.Flatten(), nn.LazyLinear(10)))
    checks, _ = audited(net)
    assert failed(checks) >= {"deterministic"}


@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_saturated_logits(natural, factor):
    found = failed(audited(After(natural, lambda z: factor * z))[0])
    assert found >= {"zero_gradients", "logit_scale"}  # the targeted margin does not saturate


def test_saturated_activations(natural):
    found = failed(audited(After(natural, lambda z: 10 * torch.tanh(20 * z)))[0])
    assert found >= {"zero_gradients"}


def test_a_gradient_that_leads_the_wrong_way(robust):
    found = failed(audited(Before(Reversed.apply, robust))[0])
    assert found >= {"loss_rises", "finite_differences", "coarse_differences", "eps_to_chance"}


def test_a_ragged_loss_weakens_iterations_and_disagrees_at_a_distance():
    net = trained(Before(lambda x: x + 0.05 * torch.sin(300 * x), cnn()))
    checks, _ = audited(net)
    assert failed(checks) >= {"more_steps", "coarse_differences"}
    assert checks["finite_differences"]["verdict"] == "pass"


class Lottery(nn.Module):
    """Class 0, unless one pixel is in the top tenth of the ball; no gradient says so."""

    def forward(self, x):
        wins = (x[:, 0, 0, 0] > 0.66).float()
        return torch.stack([1 - wins, wins], dim=1)


def test_restarts_that_keep_finding_something():
    data = torch.full((60, 1, 8, 8), 0.5), torch.zeros(60, dtype=torch.long)
    checks, _ = audited(Lottery(), data=data, classes=2, examples=60, restarts=8)
    assert failed(checks) >= {"restarts"}


def test_a_surrogate_finds_what_gradients_miss(natural):
    checks, _ = audited(Before(lambda x: (15 * x).round() / 15, natural), transfer=natural)
    assert checks["transfer"]["verdict"] == "fail"


# --------------------------------------------------------------------------------------- the steps


def test_settings():
    for name in SMALL:
        with pytest.raises(ConfigurationError, match=name):
            Audit(**{name: 0})


def test_steps_have_names_and_settings_of_their_own(natural):
    steps = Audit().steps(Victim(natural, 10), THREAT, 10)
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


def test_steps_are_functions_of_their_examples(robust):
    first, second = audited(robust, examples=20)[1], audited(robust, examples=20)[1]
    for key, columns in first.columns.items():
        for name, column in columns.items():
            assert torch.equal(column.nan_to_num(-1), second.columns[key][name].nan_to_num(-1))


class Two(nn.Module):
    """Two losses, of which only one has a gradient."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((7 * x).round() / 7)

    def adaptive_losses(self):
        def hard(model, batch):
            return lambda x: cross_entropy(model(x), batch["y"])

        def soft(model, batch):
            return lambda x: cross_entropy(model.net(x), batch["y"])

        return {"ce_f": hard, "ce_soft": soft}


def test_attacks_keep_the_union_over_losses(natural):
    both, alone = audited(Two(natural)), audited(Two(natural), losses=["ce_f"])
    assert "eps_to_chance" in failed(alone[0])
    assert "eps_to_chance" not in failed(both[0])
    assert both[0]["zero_gradients"]["verdict"] == "pass"
    key = "audit_steps/steps=10"
    assert both[1].correct[key][:40].sum() < alone[1].correct[key][:40].sum()


def test_examples_wrong_from_the_start_leave_nothing_to_attack(natural):
    x, _ = images("test")
    checks, _ = audited(natural, data=(x, (natural(x).argmax(dim=1) + 1) % 10))
    assert failed(checks) == set()


def test_no_report_without_steps():
    nothing = Outcomes(torch.zeros(3, dtype=torch.long), {"clean": torch.ones(3).bool()}, {})
    assert Audit().report(nothing, 10) == {"examples": 0, "checks": []}
