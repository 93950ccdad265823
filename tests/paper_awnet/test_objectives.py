"""Objectives: which gradient reaches what, what is remembered, what the attack sees."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.losses import kl_divergence
from common.errors import ConfigurationError
from common.objectives import TRADES
from paper_awnet.losses import distillation
from paper_awnet.method import Detector, Router
from paper_awnet.networks import AWNet, DigitsStudent
from paper_awnet.objectives import (
    BMTARD,
    MTARD,
    RSLAD,
    HybridCE,
    RoutedTRADES,
    forced,
)
from paper_awnet.teachers import Teacher

N = 6


def student(kind=Router, init="normal", **settings) -> AWNet:
    router = partial(kind, widths=(4, 6, 8), type_hidden=5, init=init)
    return AWNet(DigitsStudent(widths=(4, 6, 8)), router, **settings)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    x = torch.rand(N, 1, 8, 8)
    x_adv = (x + 0.3 * torch.rand_like(x).sub(0.5).sign()).clamp(0, 1)
    y = torch.randint(10, (N,))
    return {"x": x, "x_adv": x_adv, "y": y, "index": torch.arange(N)}


@pytest.fixture
def teachers() -> dict[str, Teacher]:
    return {n: Teacher(DigitsStudent(), as_it_is=True) for n in ("clean", "robust")}


def parts(net: AWNet) -> dict[str, list[nn.Parameter]]:
    return {
        "backbone": list(net.arch.parameters()),
        "features": list(net.router.features.parameters()),
        "type_head": list(net.router.type_head.parameters()),
        "signal_heads": list(net.router.signal_heads.parameters()),
    }


def reach(net: AWNet, loss: torch.Tensor) -> dict[str, float]:
    """The largest gradient in each part."""
    found = {}
    for name, parameters in parts(net).items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[name] = max((g.abs().max().item() for g in grads if g is not None), default=0.0)
    return found


# --------------------------------------------------------------------- invariant 8: gradients


def test_the_type_loss_reaches_features_and_type_head_alone(batch, teachers) -> None:
    net = student()
    only = MTARD(**teachers, lambda_type=1.0)
    none = MTARD(**teachers, lambda_type=0.0)
    penalty = only.outer(net, batch) - copy.deepcopy(none).outer(net, batch)
    found = reach(net, penalty)
    assert found["features"] > 1e-5
    assert found["type_head"] > 1e-5
    assert found["backbone"] < 1e-6 * max(1, reach(net, none.outer(net, batch))["backbone"]) + 1e-6
    assert found["signal_heads"] < 1e-6


def test_distillation_never_reaches_the_routers_type_head(batch, teachers) -> None:
    net = student()
    found = reach(net, MTARD(**teachers, lambda_type=0.0).outer(net, batch))
    assert found["type_head"] == 0.0
    assert min(found["backbone"], found["features"], found["signal_heads"]) > 0


def test_zero_heads_block_the_features_and_move_themselves(batch, teachers) -> None:
    net = student(init="zero")
    found = reach(net, MTARD(**teachers, lambda_type=0.0).outer(net, batch))
    assert found["features"] == 0.0
    assert found["signal_heads"] > 0


@pytest.mark.parametrize(("init", "is_reached"), [("normal", True), ("zero", False)])
def test_distillation_reaches_a_detectors_head_once_signals_move(
    batch, teachers, init, is_reached
) -> None:
    net = student(Detector, init)
    found = reach(net, MTARD(**teachers, lambda_type=0.0).outer(net, batch))
    assert (found["type_head"] > 0) == is_reached


def test_every_parameter_gets_a_gradient_even_without_type_loss(batch, teachers) -> None:
    """Otherwise several processes would wait for gradients that never come."""
    net = student()
    MTARD(**teachers, lambda_type=0.0).outer(net, batch).backward()
    assert all(p.grad is not None for p in net.parameters())


# ------------------------------------------------------------------------------------- MTARD


def test_outer_is_the_equation(batch, teachers) -> None:
    net = student().train()
    twin = copy.deepcopy(net)
    objective = MTARD(**teachers, lambda_type=0.7, scale="batchmean")
    types = torch.arange(2).repeat_interleave(N)
    out = twin.outputs(torch.cat([batch["x"], batch["x_adv"]]), types)
    nat = distillation(teachers["clean"](batch["x"]), out.logits[:N], "batchmean")
    adv = distillation(teachers["robust"](batch["x_adv"]), out.logits[N:], "batchmean")
    expected = (nat + adv) / 2 + 0.7 * F.cross_entropy(out.type_logits, types)
    torch.testing.assert_close(objective.outer(net, batch), expected)
    objective.advance()
    assert objective.w_nat == 0.5, "exactly, in the first step"
    assert torch.equal(objective.initial, torch.stack([nat, adv]).detach())
    assert objective.report["type_acc"] == (out.type_logits.argmax(1) == types).float().mean()
    assert {"omega1_std", "omega3_shift", "loss_nat", "w_nat"} <= set(objective.report)
    assert not any(v.requires_grad for v in objective.report.values())


def test_a_static_network_has_two_passes_the_adversarial_one_first(batch, teachers) -> None:
    net, seen = DigitsStudent(), []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    MTARD(**teachers).outer(net, batch)
    assert [torch.equal(a, batch[k]) for a, k in zip(seen, ("x_adv", "x"), strict=True)]
    assert torch.equal(seen[0], batch["x_adv"])


def test_separate_passes_differ_through_the_routers_batch_norms_alone(batch, teachers) -> None:
    net = student(init="zero")
    one, two = copy.deepcopy(net), copy.deepcopy(net)
    a = MTARD(**teachers, lambda_type=0.0).outer(one, batch)
    b = MTARD(**teachers, lambda_type=0.0, concat=False).outer(two, batch)
    torch.testing.assert_close(a, b, msg="signals are 1, so the router does not matter")
    norm = "router.features.0.bn.running_mean"
    assert not torch.allclose(one.state_dict()[norm], two.state_dict()[norm])
    assert one.router.features[0].bn.num_batches_tracked == 1
    assert two.router.features[0].bn.num_batches_tracked == 2


def test_weights_follow_the_losses_and_the_milestones(batch, teachers) -> None:
    net = student()
    objective = MTARD(**teachers, milestones=[2, 4], scale="batchmean")
    objective.outer(net, batch)
    objective.advance()
    first = objective.initial.clone()
    steps = []
    for epoch in (0, 2, 4):
        objective.set_epoch(epoch)
        before = objective.w_nat.clone()
        with torch.no_grad():
            for p in net.arch.parameters():
                p.mul_(1.3)
        objective.outer(net, batch)
        objective.advance()
        losses = torch.stack([objective.report["loss_nat"], objective.report["loss_adv"]])
        r = losses / first
        eta = 0.025 * {0: 1.0, 2: 0.1, 4: 0.01}[epoch]
        expected = before - eta * (before - r[0] / r.sum())
        torch.testing.assert_close(objective.w_nat, expected)
        steps.append((objective.w_nat - before).abs().item())
    assert torch.equal(objective.initial, first)
    assert steps[0] > steps[1] > steps[2] > 0


def test_what_it_remembers_survives_a_checkpoint(batch, teachers) -> None:
    net = student()
    objective = BMTARD(**teachers, scale="batchmean", rate=0.1)
    for _ in range(3):
        objective.outer(net, batch)
        objective.advance()
        nn.init.normal_(net.arch.head.linear.weight)
    saved = {k: v.clone() for k, v in objective.state_dict().items()}
    assert all(torch.isfinite(v).all() for v in saved.values() if v.is_floating_point())
    resumed = BMTARD(**teachers, scale="batchmean", rate=0.1)
    resumed.load_state_dict(saved)
    for one in (objective, resumed):
        torch.manual_seed(0)
        one.outer(copy.deepcopy(net), batch)
        one.advance()
    for name, value in objective.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert objective.w_nat != 0.5
    assert (objective.temperatures != 1.0).any()


def test_another_look_at_the_loss_moves_nothing(batch, teachers) -> None:
    """Weight perturbation has one before every step."""
    net = student()
    objective = BMTARD(**teachers, scale="batchmean", rate=0.1)
    objective.outer(net, batch)
    objective.advance()
    nn.init.normal_(net.arch.head.linear.weight)
    twin = copy.deepcopy(objective)
    for _ in range(3):
        twin.outer(copy.deepcopy(net), batch)
    for one in (objective, twin):
        torch.testing.assert_close(
            one.w_nat, torch.tensor(0.5), msg="only advance moves it for good"
        )
        one.outer(copy.deepcopy(net), batch)
        one.advance()
    for name, value in objective.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert objective.w_nat != 0.5


@pytest.mark.parametrize("first", [3, 4, 1])
def test_an_accumulated_step_moves_the_weights_as_a_large_one(batch, teachers, first) -> None:
    """In evaluation mode of the network, for batch-norm sees less of it at once."""
    net = student().eval()
    net.arch.requires_grad_(False)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, first), slice(first, 6))]
    whole = BMTARD(**teachers, scale="batchmean", rate=0.1, lambda_type=0.0)
    split = copy.deepcopy(whole)
    for scale in (1.0, 1.5, 2.0):
        net.arch.head.linear.weight.mul_(scale)
        whole.outer(net, batch)
        whole.advance()
        for part, is_over in zip(parts, (False, True), strict=True):
            before = split.w_nat.clone()
            split.outer(net, part)
            split.advance(is_over)
            if not is_over:
                assert torch.equal(split.w_nat, before)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(split.state_dict()[name], value, msg=name)
    assert whole.w_nat != 0.5
    assert (whole.temperatures != 1.0).any()


def test_nothing_moves_outside_of_training(batch, teachers) -> None:
    objective = BMTARD(**teachers).eval()
    objective.outer(student(), batch)
    objective.advance()
    assert not objective.has_begun
    assert torch.equal(objective.temperatures, torch.ones(2))


# ------------------------------------------------------------------------------------ B-MTARD


def fixed(logits: torch.Tensor) -> Teacher:
    class Fixed(nn.Module):
        def forward(self, x):
            return logits.expand(len(x), -1)

    return Teacher(Fixed(), as_it_is=True)


@pytest.mark.parametrize("sharp", [3.0, 200.0])
def test_the_more_certain_teacher_is_softened(batch, sharp) -> None:
    """Invariant 11; at 200 the constant makes the certain one's entropy negative."""
    clean = fixed(torch.tensor([[sharp] + [0.0] * 9]))
    objective = BMTARD(clean, fixed(torch.zeros(1, 10)), rate=0.5)
    net, history = student(), []
    for _ in range(30):
        objective.outer(net, batch)
        objective.advance()
        history.append(objective.temperatures.clone())
    clean_t, robust_t = torch.stack(history).T
    assert (clean_t.diff() >= 0).all()
    assert clean_t[0] == 1.5
    assert (robust_t == 1.0).all()
    assert clean_t[-1] == 10.0, "never beyond"


def test_temperatures_divide_the_teachers_alone(batch, teachers) -> None:
    plain, soft = MTARD(**teachers), BMTARD(**teachers)
    net = student()
    twin = copy.deepcopy(net)
    torch.testing.assert_close(plain.outer(net, batch), soft.outer(twin, batch))
    soft.temperatures = torch.tensor([2.0, 4.0])
    a, b = torch.randn(3, 10), torch.randn(3, 10)
    found = soft.targets(a, b)
    assert torch.equal(found[0], a / 2)
    assert torch.equal(found[1], b / 4)


# ------------------------------------------------------------------------------ other objectives


def test_hybrid_cross_entropy(batch) -> None:
    net = DigitsStudent()
    twin, y = copy.deepcopy(net), batch["y"]
    expected = (
        F.cross_entropy(twin(batch["x_adv"]), y) / 2 + F.cross_entropy(twin(batch["x"]), y) / 2
    )
    torch.testing.assert_close(HybridCE().outer(net, batch), expected)


def test_trades_is_the_common_one_where_there_are_no_types(batch) -> None:
    net = DigitsStudent().eval()
    found, expected = RoutedTRADES(4.0), TRADES(4.0)
    torch.testing.assert_close(found.outer(net, dict(batch)), expected.outer(net, dict(batch)))
    x = batch["x_adv"]
    torch.testing.assert_close(found.inner(net, batch)(x), expected.inner(net, batch)(x))


def test_rslad_asks_its_teacher_on_clean_images_alone(batch, teachers) -> None:
    net = DigitsStudent().eval()
    teacher, objective = teachers["robust"], RSLAD(teachers["robust"], scale="batchmean")
    q = teacher(batch["x"])
    expected = 5 / 6 * distillation(q, net(batch["x_adv"]), "batchmean")
    expected = expected + distillation(q, net(batch["x"]), "batchmean") / 6
    torch.testing.assert_close(objective.outer(net, batch), expected)
    inner = objective.inner(net, batch)
    torch.testing.assert_close(inner(batch["x_adv"]), kl_divergence(q, net(batch["x_adv"])))
    assert set(objective.teachers) == {"robust"}


# ------------------------------------------------------------------------------ the inner problem


@pytest.mark.parametrize("make", [HybridCE, RoutedTRADES])
def test_the_attack_sees_the_deployed_network_or_one_branch(batch, make) -> None:
    net = student().eval()
    nn.init.normal_(net.arch.stem.bn.adv.bias)
    deployed, branch = net(batch["x_adv"]), forced(net, 1)(batch["x_adv"])
    assert (deployed - branch).abs().max() > 1e-3
    for kind, logits in (("soft", deployed), ("adv", branch)):
        found = make(branch=kind).inner(net, batch)(batch["x_adv"])
        if make is HybridCE:
            expected = F.cross_entropy(logits, batch["y"], reduction="none")
        else:
            expected = kl_divergence(net(batch["x"]), logits)
        torch.testing.assert_close(found, expected)


def test_gradients_of_the_attack_run_through_the_router(batch) -> None:
    """Invariant 12, last part."""
    net = student().eval()
    nn.init.normal_(net.arch.stem.bn.adv.bias)
    x = batch["x"].clone().requires_grad_()
    (live,) = torch.autograd.grad(HybridCE().inner(net, batch)(x).sum(), x)
    out = net.outputs(batch["x"])
    signals = [s.detach() for s in out.signals]
    logits = net.outputs(x, p=out.p.detach(), signals=signals).logits
    (cut,) = torch.autograd.grad(F.cross_entropy(logits, batch["y"], reduction="sum"), x)
    assert (live - cut).abs().max() > 1e-3 * live.abs().max()


# -------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_type": -1.0}, "lambda_type weighs.*got -1.0"),
        ({"branch": "hard"}, "branch must be one of soft, adv, got 'hard'"),
        ({"scale": "sum"}, "scale must be one of classmean, batchmean, got 'sum'"),
        ({"eta_w": 2.0}, r"eta_w is a rate in \[0, 1\], got 2.0"),
        ({"beta": 0.0}, "beta is an exponent above 0, got 0.0"),
        ({"milestones": [5, 3]}, r"increasing order, got \[5, 3\]"),
    ],
)
def test_bad_settings(teachers, settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MTARD(**teachers, **settings)


def test_missing_adversarial_images_are_named(batch, teachers) -> None:
    del batch["x_adv"]
    with pytest.raises(ConfigurationError, match="AdversarialTraining"):
        MTARD(**teachers).outer(student(), batch)
