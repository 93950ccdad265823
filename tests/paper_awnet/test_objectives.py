"""Equations against slow rewrites; objectives: gradients, state, and what the attack sees."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.losses import kl_divergence
from common.errors import ConfigurationError
from common.objectives import TRADES
from paper_awnet.method import Detector, signal_statistics
from paper_awnet.networks import LAMBDAS, AWNet, DigitsStudent, OATNet, forced
from paper_awnet.objectives import (
    ARD,
    BMTARD,
    MTARD,
    OAT,
    RSLAD,
    HybridCE,
    RoutedTRADES,
    balanced,
    distillation,
    negative_entropy,
)
from paper_awnet.teachers import Teacher

N = 6


def take_step(objective: MTARD, net: nn.Module, batch: dict, is_over: bool = True) -> None:
    objective.outer(net, batch)
    objective.advance(is_over)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("scale", ["classmean", "batchmean"])
def test_distillation_is_what_it_says(scale, classes) -> None:
    q_logits, s_logits = torch.randn(4, classes), torch.randn(4, classes)
    total = 0.0
    for a, b in zip(q_logits.double().tolist(), s_logits.double().tolist(), strict=True):
        for va, vb in zip(a, b, strict=True):
            q, s = (math.exp(v) / sum(map(math.exp, vs)) for v, vs in ((va, a), (vb, b)))
            total += q * math.log(q + 1e-5) - q * math.log(s)
    slow = total / 4 if scale == "batchmean" else total / (4 * classes) * classes / 10
    assert distillation(q_logits, s_logits, scale).item() == pytest.approx(slow, rel=1e-4)
    student = q_logits.clone().requires_grad_()  # like its teacher: at rest
    q_logits.requires_grad_()
    loss = distillation(q_logits, student, scale)
    at_rest, of_teacher = torch.autograd.grad(loss, (student, q_logits), allow_unused=True)
    assert at_rest.abs().max() < 1e-6
    assert of_teacher is None


def test_balance() -> None:
    """Invariant 10."""
    half, first = torch.tensor(0.5), torch.tensor([0.4, 2.0])
    assert balanced(half, first, first, 0.025, 1.0) == 0.5
    # Both have fallen to a half of what they were: a fixed point.
    assert balanced(half, first / 2, first, 0.025, 1.0) == pytest.approx(0.5)
    # The clean loss has shrunk less, so it gets the larger weight.
    w = balanced(half, torch.tensor([0.36, 1.0]), first, 0.025, 1.0)
    r = (0.9, 0.5)
    assert w.item() == pytest.approx(0.5 - 0.025 * (0.5 - r[0] / sum(r)))
    assert w > 0.5
    squared = balanced(half, torch.tensor([0.36, 1.0]), first, 0.025, 2.0)
    assert squared > w
    w, first = half, torch.tensor([1.0, 1.0])  # stays inside (0, 1), also for extreme losses
    for losses in ([1e-30, 5.0], [0.0, 0.0], [9.0, 1e-12], [0.0, 3.0]) * 20:
        w = balanced(w, torch.tensor(losses), first, 0.025, 1.0)
        assert 0 < w < 1


def test_negative_entropy() -> None:
    flat, sharp = torch.full((3, 10), 0.1), torch.eye(10)[:3] * 0.9 + 0.01
    assert negative_entropy(flat).item() == pytest.approx(0.1 * math.log(0.1 + 1e-5))
    assert negative_entropy(flat) < negative_entropy(sharp) < 0


def test_signal_statistics() -> None:
    found = signal_statistics(
        torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.tensor([[3.0, 2.0], [3.0, 4.0]])
    )
    assert found == {"mean": 2.5, "std": 1.0, "shift": 1.0}  # shift: 2 and 0 of the two filters


def reach(net: AWNet, loss: torch.Tensor) -> dict[str, float]:
    """The largest gradient in each part."""
    parts = {"backbone": net.arch} | dict(net.router.named_children())
    found = {}
    for name, part in parts.items():
        parameters = list(part.parameters())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[name] = max((g.abs().max().item() for g in grads if g is not None), default=0.0)
    return found


def test_what_each_loss_reaches(digits, teachers, student) -> None:
    """Invariant 8: types train features and type head, distillation all but the type head."""
    net, objective = student(), MTARD(**teachers, lambda_type=0.0)
    loss = objective.outer(net, digits)
    found = reach(net, loss)
    assert found.pop("type_head") == 0.0
    assert min(found.values()) > 0
    of_types = reach(net, MTARD(**teachers).outer(net, digits) - loss)
    assert min(of_types["features"], of_types["type_head"]) > 1e-5
    assert of_types["backbone"] < 1e-6 * max(1, found["backbone"]) + 1e-6
    assert of_types["signal_heads"] < 1e-6
    loss.backward()  # without one, several processes would wait for gradients that never come
    assert all(p.grad is not None for p in net.parameters())
    net = student(init="zero")  # zero heads block the way to what they read
    found = reach(net, objective.outer(net, digits))
    assert found["features"] == 0.0 < found["signal_heads"]
    for init, moves in (("normal", True), ("zero", False)):
        net = student(Detector, init)
        assert (reach(net, objective.outer(net, digits))["type_head"] > 0) == moves


def test_outer_is_the_equation(digits, teachers, student) -> None:
    net = student().train()
    twin = copy.deepcopy(net)
    objective = MTARD(**teachers, lambda_type=0.7, scale="batchmean")
    types = torch.arange(2).repeat_interleave(N)
    out = twin.outputs(torch.cat([digits["x"], digits["x_adv"]]), types)
    nat = distillation(teachers["clean"](digits["x"]), out.logits[:N], "batchmean")
    adv = distillation(teachers["robust"](digits["x_adv"]), out.logits[N:], "batchmean")
    expected = (nat + adv) / 2 + 0.7 * F.cross_entropy(out.type_logits, types)
    torch.testing.assert_close(objective.outer(net, digits), expected)
    objective.advance()
    assert objective.w_nat == 0.5, "exactly, in the first step"
    assert torch.equal(objective.initial, torch.stack([nat, adv]).detach())
    assert objective.report["type_acc"] == (out.type_logits.argmax(1) == types).float().mean()
    assert {"omega1_std", "omega3_shift", "loss_nat", "w_nat"} <= set(objective.report)
    assert not any(v.requires_grad for v in objective.report.values())


def test_separate_passes_differ_through_the_routers_batch_norms_alone(
    digits, teachers, student
) -> None:
    net = student(init="zero")
    one, two = copy.deepcopy(net), copy.deepcopy(net)
    a = MTARD(**teachers, lambda_type=0.0).outer(one, digits)
    b = MTARD(**teachers, lambda_type=0.0, concat=False).outer(two, digits)
    torch.testing.assert_close(a, b, msg="signals are 1, so the router does not matter")
    norm = "router.features.0.bn.running_mean"
    assert not torch.allclose(one.state_dict()[norm], two.state_dict()[norm])
    assert one.router.features[0].bn.num_batches_tracked == 1
    assert two.router.features[0].bn.num_batches_tracked == 2


def test_weights_follow_the_losses_and_the_milestones(digits, teachers, student) -> None:
    net = student()
    objective = MTARD(**teachers, milestones=[2, 4], scale="batchmean")
    take_step(objective, net, digits)
    first = objective.initial.clone()
    steps = []
    for epoch in (0, 2, 4):
        objective.set_epoch(epoch)
        before = objective.w_nat.clone()
        with torch.no_grad():
            for p in net.arch.parameters():
                p.mul_(1.3)
        take_step(objective, net, digits)
        losses = torch.stack([objective.report["loss_nat"], objective.report["loss_adv"]])
        r = losses / first
        eta = 0.025 * {0: 1.0, 2: 0.1, 4: 0.01}[epoch]
        expected = before - eta * (before - r[0] / r.sum())
        torch.testing.assert_close(objective.w_nat, expected)
        steps.append((objective.w_nat - before).abs().item())
    assert torch.equal(objective.initial, first)
    assert steps[0] > steps[1] > steps[2] > 0


def test_what_it_remembers_survives_a_checkpoint_and_only_advance_moves_it(
    digits, teachers, student
) -> None:
    """Weight perturbation takes another look before every step; evaluation takes any number."""
    net, settings = student(), {"scale": "batchmean", "rate": 0.1}
    resting = BMTARD(**teachers).eval()
    take_step(resting, net, digits)
    assert not resting.has_begun
    objective = BMTARD(**teachers, **settings)
    for _ in range(3):
        take_step(objective, net, digits)
        nn.init.normal_(net.arch.head.linear.weight)
    twin, resumed = copy.deepcopy(objective), BMTARD(**teachers, **settings)
    resumed.load_state_dict(copy.deepcopy(objective.state_dict()))
    for _ in range(3):
        twin.outer(copy.deepcopy(net), digits)
    for one in (objective, twin, resumed):
        take_step(one, copy.deepcopy(net), digits)
        assert_same_state(objective, one)
    assert objective.w_nat != 0.5
    assert (objective.temperatures != 1.0).any()


@pytest.mark.parametrize("first", [4, 1])
def test_an_accumulated_step_moves_the_weights_as_a_large_one(
    digits, teachers, student, first
) -> None:
    """In evaluation mode of the network, for batch-norm sees less of it at once."""
    net = student().eval()
    net.arch.requires_grad_(False)
    parts = [{k: v[rows] for k, v in digits.items()} for rows in (slice(0, first), slice(first, 6))]
    whole = BMTARD(**teachers, scale="batchmean", rate=0.1, lambda_type=0.0)
    split = copy.deepcopy(whole)
    for scale in (1.0, 1.5, 2.0):
        net.arch.head.linear.weight.mul_(scale)
        take_step(whole, net, digits)
        for part, is_over in zip(parts, (False, True), strict=True):
            before = split.w_nat.clone()
            take_step(split, net, part, is_over)
            if not is_over:
                assert torch.equal(split.w_nat, before)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(split.state_dict()[name], value, msg=name)
    assert whole.w_nat != 0.5
    assert (whole.temperatures != 1.0).any()


def fixed(logits: torch.Tensor) -> Teacher:
    class Fixed(nn.Module):
        def forward(self, x):
            return logits.expand(len(x), -1)

    return Teacher(Fixed(), as_it_is=True)


@pytest.mark.parametrize("sharp", [3.0, 200.0])
def test_the_more_certain_teacher_is_softened(digits, student, sharp) -> None:
    """Invariant 11; at 200 the constant makes the certain one's entropy negative."""
    clean = fixed(torch.tensor([[sharp] + [0.0] * 9]))
    objective = BMTARD(clean, fixed(torch.zeros(1, 10)), rate=0.5)
    net, history = student(), []
    for _ in range(30):
        take_step(objective, net, digits)
        history.append(objective.temperatures.clone())
    clean_t, robust_t = torch.stack(history).T
    assert (clean_t.diff() >= 0).all()
    assert clean_t[0] == 1.5
    assert (robust_t == 1.0).all()
    assert clean_t[-1] == 10.0, "never beyond"
    z = torch.randn(3, 10)
    assert all(map(torch.equal, objective.targets(z, z), (z / 10, z)))


def test_hybrid_cross_entropy_sees_adversarial_images_first(digits) -> None:
    net = DigitsStudent()
    twin, y, seen = copy.deepcopy(net), digits["y"], []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = sum(F.cross_entropy(twin(digits[k]), y) / 2 for k in ("x_adv", "x"))
    torch.testing.assert_close(HybridCE().outer(net, digits), expected)
    assert all(torch.equal(x, digits[k]) for x, k in zip(seen, ("x_adv", "x"), strict=True))


def test_trades_is_the_common_one_where_there_are_no_types(digits) -> None:
    net = DigitsStudent().eval()
    found, expected = RoutedTRADES(4.0), TRADES(4.0)
    torch.testing.assert_close(found.outer(net, digits), expected.outer(net, digits))
    x = digits["x_adv"]
    torch.testing.assert_close(found.inner(net, digits)(x), expected.inner(net, digits)(x))


def test_rslad_asks_its_teacher_on_clean_images_alone(digits, teachers, student) -> None:
    net = DigitsStudent().eval()
    teacher, objective = teachers["robust"], RSLAD(teachers["robust"], scale="batchmean")
    q = teacher(digits["x"])
    expected = 5 / 6 * distillation(q, net(digits["x_adv"]), "batchmean")
    expected = expected + distillation(q, net(digits["x"]), "batchmean") / 6
    torch.testing.assert_close(objective.outer(net, digits), expected)
    inner = objective.inner(net, digits)
    torch.testing.assert_close(inner(digits["x_adv"]), kl_divergence(q, net(digits["x_adv"])))
    assert set(objective.teachers) == {"robust"}


def test_ard_softens_both_and_climbs_cross_entropy(digits, teachers) -> None:
    net, teacher = DigitsStudent().eval(), teachers["robust"]
    q, log_s = (logits / 5 for logits in (teacher(digits["x"]), net(digits["x_adv"])))
    expected = 25 * F.kl_div(log_s.log_softmax(1), q.softmax(1), reduction="batchmean")
    objective = ARD(teacher, temperature=5.0, scale="batchmean")
    torch.testing.assert_close(objective.outer(net, digits), expected, rtol=0, atol=5e-3)
    found = objective.inner(net, digits)(digits["x_adv"])
    label = F.cross_entropy(net(digits["x_adv"]), digits["y"], reduction="none")
    torch.testing.assert_close(found, label)
    with pytest.raises(ConfigurationError, match=r"0\.0"):
        ARD(teacher, temperature=0.0)


@pytest.mark.parametrize("make", [HybridCE, RoutedTRADES])
def test_the_attack_sees_the_deployed_network_or_one_branch(digits, student, make) -> None:
    net = student().eval()
    nn.init.normal_(net.arch.stem.bn.adv.bias)
    deployed, branch = net(digits["x_adv"]), forced(net, 1)(digits["x_adv"])
    assert (deployed - branch).abs().max() > 1e-3
    for kind, logits in (("soft", deployed), ("adv", branch)):
        found = make(branch=kind).inner(net, digits)(digits["x_adv"])
        if make is HybridCE:
            expected = F.cross_entropy(logits, digits["y"], reduction="none")
        else:
            expected = kl_divergence(net(digits["x"]), logits)
        torch.testing.assert_close(found, expected)


def oat_net(**settings) -> OATNet:
    net = OATNet(DigitsStudent(widths=(4, 6, 8)), hidden=3, **settings)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return net


def test_lambda_is_drawn_by_image_and_epoch() -> None:
    objective, index = OAT(), torch.arange(40)
    first = objective.drawn(index)
    assert torch.equal(first[5:9], objective.drawn(index[5:9]))
    assert {round(v, 1) for v in first.tolist()} == set(LAMBDAS)
    objective.set_epoch(1)
    assert not torch.equal(first, objective.drawn(index))


def test_oat_weighs_both_losses_by_the_lambda_of_the_attack(digits) -> None:
    net, objective = oat_net(), OAT()
    lam, y = objective.drawn(digits["index"]), digits["y"]
    types = torch.arange(2).repeat_interleave(N)
    out = net.at(torch.cat([digits["x"], digits["x_adv"]]), torch.cat([lam, lam]), types)
    clean, adv = (F.cross_entropy(z, y, reduction="none") for z in out.split(N))
    expected = ((1 - lam) * clean + lam * adv).mean()
    torch.testing.assert_close(objective.outer(net, digits), expected)
    net.eval()
    found = objective.inner(net, digits)(digits["x"])
    expected = F.cross_entropy(net.at(digits["x"], lam), y, reduction="none")
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigurationError, match=r"OATNet, got DigitsStudent"):
        objective.outer(DigitsStudent(), digits)
    with pytest.raises(ConfigurationError, match="AdversarialTraining"):
        HybridCE().outer(net, {"x": digits["x"], "y": y})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_type": -1.0}, "lambda_type.*-1.0"),
        ({"branch": "hard"}, "soft, adv.*hard"),
        ({"scale": "sum"}, "classmean, batchmean.*sum"),
        ({"eta_w": 2.0}, "eta_w.*2.0"),
        ({"beta": 0.0}, "beta.*0.0"),
        ({"milestones": [5, 3]}, r"milestones.*\[5, 3\]"),
    ],
)
def test_bad_settings(teachers, settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MTARD(**teachers, **settings)
