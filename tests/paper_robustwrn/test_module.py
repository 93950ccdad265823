"""The passes of a training step; the official margin attack and its number over all images."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.losses import hinge_margin
from common.attacks.pgd import PGD
from common.evaluation import SuiteEntry
from common.evaluation.runner import run_steps
from common.evaluation.suite import steps_of
from common.modes import frozen
from common.objectives import AT, MART, TRADES
from common.results.outcomes import checkpoint_entry
from paper_robustwrn.method import RobustWideResNet
from paper_robustwrn.module import RobustWRNClassifier, coupled_margin


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        score = 3 * x[:, 0, 0, 0] - x[:, 0, 0, 1]
        return torch.stack([score, -score], dim=1)


def batch(*pixels: tuple[float, float]) -> dict[str, Tensor]:
    x = torch.tensor(pixels).view(-1, 1, 1, 2)
    return {"x": x, "y": torch.zeros(len(x), dtype=torch.int64), "index": torch.arange(len(x))}


def test_value_and_gradient_are_those_of_the_batch_sum() -> None:
    model, b = Linear(), batch((0.5, 0.2), (0.3, 0.6), (0.6, 0.1))
    x = b["x"].clone().requires_grad_()
    ours = coupled_margin(model, b)(x).sum()
    (gradient,) = torch.autograd.grad(ours, x)
    logits = model(x)
    official = -torch.relu(logits[:, 0].sum() - logits[:, 1].sum())
    (expected,) = torch.autograd.grad(official, x)
    torch.testing.assert_close(ours, official)
    torch.testing.assert_close(gradient, expected)


def test_the_official_form_stalls_and_the_per_sample_form_does_not() -> None:
    """One image far on the wrong side silences the attack on all others (invariant 13)."""
    model, b = Linear(), batch((0.5, 0.4), (0.05, 0.9), (0.1, 0.9))
    attack = PGD(0.2, 0.05, 10, start="zero")
    stalled = attack(coupled_margin(model, b), b["x"])
    assert torch.equal(stalled, b["x"])
    moved = attack(lambda x: hinge_margin(model(x), b["y"]), b["x"])
    assert (moved - b["x"]).abs().max() > 0.19
    alone = {key: value[:1] for key, value in b.items()}
    assert not torch.equal(attack(coupled_margin(model, alone), alone["x"]), alone["x"])


def official_right(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Right under the attack, image by image, as a loop over the loader's batches computes it."""
    found = []
    for start in range(0, len(x), 8):
        image, label = x[start : start + 8], y[start : start + 8]
        moved = image.clone()
        for _ in range(steps):
            moved.requires_grad_()
            z = net(moved)
            others = z.scatter(1, label[:, None], -torch.inf).max(dim=1).values
            loss = -torch.relu(z.gather(1, label[:, None]).sum() - others.sum())
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + eps / 4 * gradient.sign()
            moved = torch.min(torch.max(moved, image - eps), image + eps).clamp(0, 1)
        found.append(net(moved).argmax(dim=1) == label)
    return torch.cat(found)


def test_the_official_number_is_that_of_the_official_loop() -> None:
    """Over all images in the loader's batches: those wrong without an attack are in the sum."""
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(16, 3)
    linear.weight.data = torch.randn(3, 16, generator=generator)
    net = nn.Sequential(nn.Flatten(), linear).eval()
    x = torch.rand(40, 1, 4, 4, generator=generator)
    y = net(x).argmax(dim=1)
    y[::3] = (y[::3] + 1) % 3
    model = RobustWRNClassifier(net, AT()).eval()
    examples = {"x": x, "y": y, "index": torch.arange(40)}
    attack = PGD(0.05, "eps/4", 10, start="zero")
    found = {}
    for name, all_images in (("official", True), ("repacked", False)):
        suite = {"cw": SuiteEntry(attack, ["cw_official"], all_images=all_images)}
        outcomes = run_steps(model, examples, steps_of(suite, model, 3, 0), seed=0, batch_size=8)
        found[name] = checkpoint_entry(outcomes)
    right = official_right(net, x, y, 0.05, 10)
    metrics = found["official"]["metrics"]
    assert metrics["cw/cw_official"] == right.double().mean().item()
    assert metrics["worst"] == (right & (net(x).argmax(dim=1) == y)).double().mean().item()
    assert metrics["cw/cw_official"] != found["repacked"]["metrics"]["cw/cw_official"]


def test_the_columns_called_official_attack_all_images(paper_of) -> None:
    suite = paper_of("paper_robustwrn").read("configs/shared/evaluation_cifar.yaml")["suite"]
    for name, entry in suite.items():
        assert bool(entry.get("all_images")) == name.endswith("_official")


@pytest.mark.parametrize(
    ("objective", "scale", "evaluated", "trained"),
    [
        pytest.param(AT(), "2/255", 10, 1, id="SAT"),
        pytest.param(TRADES(6.0), 0.001, 11, 2, id="TRADES"),
        pytest.param(MART(6.0), "2/255", 10, 2, id="MART"),
    ],
)
def test_a_step_costs_the_passes_of_the_official_code(objective, scale, evaluated, trained) -> None:
    """Section "Losses used for training" of the official code: [C], invariants 9 to 11."""
    torch.manual_seed(0)
    net = RobustWideResNet(depths=[1, 1, 1], channels=[4, 4, 8, 8], in_channels=1)
    model = RobustWRNClassifier(net, objective, torch.optim.SGD).train()
    passes = {True: 0, False: 0}

    def count(module, *_) -> None:
        passes[module.training] += 1

    net.register_forward_hook(count)
    batch = {"x": torch.rand(6, 1, 8, 8), "y": torch.arange(6), "index": torch.arange(6)}
    attack = PGD("8/255", "2/255", 10, start="gaussian", start_scale=scale, project_start=False)
    norm = net.head.norm
    before = norm.running_mean.clone()
    with frozen(model, "eval"):
        batch["x_adv"] = attack(objective.inner(model, batch), batch["x"])
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    delta = (batch["x_adv"] - batch["x"]).abs().max()
    assert 0 < delta <= 8 / 255 + 1e-6
    objective.outer(model, batch).backward()
    assert passes == {False: evaluated, True: trained}
    assert norm.num_batches_tracked == trained
    assert all(p.grad is not None for p in model.parameters())
