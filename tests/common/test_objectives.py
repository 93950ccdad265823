import math

import pytest
import torch
from torch import Tensor, nn

from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.objectives import ALP, AT, MART, TRADES, Batch, Natural

ADVERSARIAL = [AT(), TRADES(), MART(), MART(variant="released"), ALP()]
ALL = [Natural(), *ADVERSARIAL]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        return self.layers(x)


def make() -> tuple[Counting, Batch]:
    torch.manual_seed(0)
    net = Counting().double().eval()
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    return net, {"x": x, "x_adv": x_adv, "y": torch.arange(6) % 5, "index": torch.arange(6)}


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def rewrite(net: nn.Module, batch: Batch, term: str) -> float:
    """The mean over examples of one term, in scalar arithmetic."""

    def value(z: list[float], z_adv: list[float], y: int) -> float:
        p, q = softmax(z), softmax(z_adv)
        pairs, unsure = list(zip(p, q, strict=True)), 1.0000001 - p[y]
        wrong = max(v for k, v in enumerate(q) if k != y)
        terms = {
            "clean": -math.log(p[y]),
            "adversarial": -math.log(q[y]),
            "kl": sum(a * math.log(a / b) for a, b in pairs),
            "boost": -math.log(1.0001 - wrong + 1e-12),
            "weighted_kl": unsure * sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in pairs),
            "released_boost": wrong - 1.0001,
            "released_kl": unsure * sum(b * math.log(b / a) for a, b in pairs),
            "pairing": sum((a - b) ** 2 for a, b in zip(z, z_adv, strict=True)) / len(z),
        }
        return terms[term]

    with torch.no_grad():
        columns = net(batch["x"]).tolist(), net(batch["x_adv"]).tolist(), batch["y"].tolist()
    values = [value(*row) for row in zip(*columns, strict=True)]
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        (Natural(), {"clean": 1.0}),
        (AT(), {"adversarial": 1.0}),
        (TRADES(beta=3.0), {"clean": 1.0, "kl": 3.0}),
        (MART(beta=2.0), {"adversarial": 1.0, "boost": 1.0, "weighted_kl": 2.0}),
        (
            MART(beta=2.0, variant="released"),
            {"adversarial": 1.0, "released_boost": 1.0, "released_kl": 2.0},
        ),
        (ALP(weight=0.7), {"clean": 1.0, "adversarial": 1.0, "pairing": 0.7}),
    ],
)
def test_outer_equals_a_rewrite_in_scalars(objective, terms):
    net, batch = make()
    expected = sum(weight * rewrite(net, batch, term) for term, weight in terms.items())
    assert objective.outer(net, batch).item() == pytest.approx(expected, rel=1e-10)


def test_trades_without_divergence_is_clean_training():
    net, batch = make()
    loss, clean = TRADES(beta=0.0).outer(net, batch), Natural().outer(net, dict(batch))
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    grads = [torch.autograd.grad(one, list(net.parameters())) for one in (loss, clean)]
    torch.testing.assert_close(*grads)


def test_identical_images_leave_no_regulariser():
    net, batch = make()
    batch["x_adv"] = batch["x"]
    clean = Natural().outer(net, batch)
    torch.testing.assert_close(TRADES().outer(net, batch), clean)
    torch.testing.assert_close(ALP().outer(net, batch), 2 * clean)
    torch.testing.assert_close(MART(beta=0.0).outer(net, batch), MART(beta=9.0).outer(net, batch))


def test_trades_and_alp_train_both_predictions():
    """Detaching the clean logits of the regulariser would give another gradient."""
    net, batch = make()
    for objective, regulariser in (
        (TRADES(1.0), lambda a, b: (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)),
        (ALP(1.0), lambda a, b: (a - b).square().mean(1)),
    ):
        parameters = list(net.parameters())
        with_it = torch.autograd.grad(objective.outer(net, batch), parameters)
        attribute = "beta" if isinstance(objective, TRADES) else "weight"
        setattr(objective, attribute, 0.0)
        without = torch.autograd.grad(objective.outer(net, batch), parameters)
        loss = regulariser(net(batch["x"]), net(batch["x_adv"])).mean()
        expected = torch.autograd.grad(loss, parameters)
        for a, b, c in zip(with_it, without, expected, strict=True):
            torch.testing.assert_close(a - b, c)


def test_mart_survives_certain_predictions():
    logits = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    batch = {"x": torch.zeros(1), "x_adv": torch.zeros(1), "y": torch.tensor([0])}
    loss = MART().outer(lambda _: logits * 1.0, batch)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(-1e-4, rel=0.1)  # log(1.0001), as in the official code
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("objective", ADVERSARIAL, ids=lambda o: type(o).__name__)
def test_a_missing_attack_is_named_before_any_forward_pass(objective):
    net, batch = make()
    del batch["x_adv"]
    with pytest.raises(ConfigurationError, match=r"AdversarialTraining.*set adversary\.attack"):
        objective.outer(net, batch)
    assert not net.calls


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_each_kind_of_image_is_seen_once(objective):
    """By batch-norm too; adversarial ones exactly when the objective says so."""
    net, batch = make()
    net.train()
    objective.outer(net, batch)
    assert objective.needs_x_adv == any(x is batch["x_adv"] for x in net.calls)
    updates = 1 if isinstance(objective, Natural | AT) else 2
    assert net.layers[1].num_batches_tracked.item() == updates == len(net.calls)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_inner_is_a_loss_per_example_with_gradient_to_the_images_alone(objective):
    net, batch = make()
    inner = objective.inner(net, batch)
    x = batch["x_adv"].clone().requires_grad_()
    loss = inner(x)
    assert loss.shape == (6,)
    (gradient,) = torch.autograd.grad(loss[2], x)
    assert gradient[2].abs().max() > 0
    assert gradient[[0, 1, 3, 4, 5]].abs().max() == 0
    kl = isinstance(objective, TRADES)
    name = "kl" if kl else "adversarial"
    assert loss.mean().item() == pytest.approx(rewrite(net, batch, name))


def test_trades_computes_the_clean_prediction_once_and_holds_it_constant():
    net, batch = make()
    inner = TRADES().inner(net, batch)
    for _ in range(3):
        inner(batch["x_adv"])
    assert sum(x is batch["x"] for x in net.calls) == 1
    # With x' = x the KL to a constant has zero gradient, also with respect to the parameters.
    gradients = torch.autograd.grad(inner(batch["x"]).sum(), list(net.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-12


@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_inner_can_be_attacked_in_inference_mode_with_tensors_made_there(objective):
    net, batch = make()
    attack = PGD(0.1, 0.05, 2, "gaussian")
    expected = attack(objective.inner(net, batch), batch["x"], torch.Generator().manual_seed(1))
    with torch.inference_mode():
        inside = {name: value.clone() for name, value in batch.items()}
        assert inside["y"].is_inference()
        loss_fn = objective.inner(net, inside)
        result = attack(loss_fn, inside["x"], torch.Generator().manual_seed(1))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [TRADES, MART, ALP])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(kind, value):
    with pytest.raises(ConfigurationError, match="at least 0, got"):
        kind(value)
