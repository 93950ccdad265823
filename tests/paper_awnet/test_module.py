"""The classifier: adaptive attacks, attacks that leave no trace, teachers at fit."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.attacks.pgd import PGD
from common.cli.start import main
from common.evaluation.suite import resolve_losses
from common.modes import frozen
from common.networks.resnet import ResNet
from common.objectives import Natural
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import LAMBDAS, OATNet, forced
from paper_awnet.objectives import HybridCE

CONFIGS = Path(__file__).parents[2] / "paper_awnet/configs"
KNOWS = {
    "ce_routerdetached",
    "ce_routerfrozen",
    *(f"joint_{kind}_{w}" for kind in ("clean", "adv") for w in (0.1, 1, 10)),
    "ce_branchclean",
    "ce_branchadv",
    "misroute",
}


@pytest.fixture
def model(student, shake) -> AWNetClassifier:
    return AWNetClassifier(shake(student()), HybridCE(), torch.optim.SGD).eval()


def test_which_attacks_there_are(model, digits) -> None:
    assert set(model.adaptive_losses()) == {"ce_f", "cw_f"} | KNOWS
    plain = AWNetClassifier(ResNet((1,), (4,), (1,)), Natural(), torch.optim.SGD)
    assert set(plain.adaptive_losses()) == {"ce_f", "cw_f"}
    oat = OATNet(ResNet((1,), (4,), (1,), in_channels=1), 0.2)
    nn.init.normal_(oat.arch.stem.bn.film[2].weight)
    oat = AWNetClassifier(oat, Natural(), torch.optim.SGD).eval()
    knobs = oat.adaptive_losses()
    assert set(knobs) == {"ce_f", "cw_f", *(f"ce_knob_{v:g}" for v in LAMBDAS)}
    for lam, is_deployed in ((0.2, True), (1.0, False)):
        loss = knobs[f"ce_knob_{lam:g}"](oat, digits)(digits["x"])
        assert torch.allclose(loss, knobs["ce_f"](oat, digits)(digits["x"])) == is_deployed
    patterns = ["ce_router*", "joint_*", "ce_branch*", "misroute"]
    assert set(resolve_losses(patterns, model)) == KNOWS


def gradient(loss, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def losses(model, digits, name):
    return model.adaptive_losses()[name](model, digits)


def test_every_attack_has_a_gradient_and_depends_on_its_own_image_alone(model, digits) -> None:
    for name in KNOWS:
        loss = losses(model, digits, name)
        assert loss(digits["x"]).shape == (6,)
        assert (gradient(loss, digits["x"]).flatten(1).abs().amax(1) > 0).all(), name
        moved = digits["x"].clone()
        moved[0] = torch.rand(1, 8, 8)
        torch.testing.assert_close(loss(moved)[1:], loss(digits["x"])[1:])


@pytest.mark.parametrize(("name", "kind"), [("clean", 0), ("adv", 1)])
def test_what_each_attack_climbs(model, digits, name, kind) -> None:
    x, y, out = digits["x"], digits["y"], model.net.outputs(digits["x"])
    looks = F.cross_entropy(out.type_logits, torch.full_like(y, kind), reduction="none")
    wrong = F.cross_entropy(out.logits, y, reduction="none")
    branch = F.cross_entropy(forced(model.net, kind)(x), y, reduction="none")
    expected = {f"joint_{name}_10": wrong - 10 * looks, f"ce_branch{name}": branch}  # A3, A4
    expected |= {"ce_routerdetached": wrong} | ({"misroute": looks} if kind == 0 else {})  # A1, A5
    for key, values in expected.items():
        torch.testing.assert_close(losses(model, digits, key)(x), values)
    live, cut = (gradient(losses(model, digits, k), x) for k in ("ce_f", "ce_routerdetached"))
    assert (live - cut).abs().max() > 1e-3 * live.abs().max()
    other = torch.rand_like(x)  # A2 keeps the route of the clean image
    kept = model.net.outputs(other, p=out.p, signals=out.signals).logits
    found = losses(model, digits, "ce_routerfrozen")(other)
    torch.testing.assert_close(found, F.cross_entropy(kept, y, reduction="none"))
    assert not torch.allclose(found, losses(model, digits, "ce_f")(other))


def test_attacks_work_inside_inference_mode(model, digits) -> None:
    with torch.inference_mode():
        batch = {key: value.clone() for key, value in digits.items()}
        for name in ("ce_routerfrozen", "ce_routerdetached", "joint_clean_1"):
            with torch.inference_mode(False):
                part = {key: value.clone() for key, value in batch.items()}
                x_adv = PGD(0.3, 0.1, 2)(losses(model, part, name), part["x"])
            assert (x_adv - part["x"]).abs().max() > 0.05


def test_an_attack_leaves_no_trace(model, digits) -> None:
    """Invariant 12: buffers, gradients, flags; ball and box."""
    model.train()
    model.net.arch.stem.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    with frozen(model, "eval"):
        x_adv = PGD(0.3, 0.1, 3)(model.objective.inner(model, digits), digits["x"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert modes == [m.training for m in model.modules()]
    assert (x_adv - digits["x"]).abs().max() <= 0.3 + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


def test_histograms_of_the_route(model, digits) -> None:
    added = {}
    model.log_histograms(lambda name, values: added.update({name: values}), digits)
    names = ("p_adv", "omega1", "omega2", "omega3")
    assert set(added) == {f"{name}/{kind}" for name in names for kind in ("x", "x_adv")}


def run(command: str, stem: str, *more: str) -> None:
    small = {
        "data.train_limit": 128,
        "data.val_limit": 8,
        "data.test_limit": 8,
        "adversary.attack.steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.check_val_every_n_epoch": 1,
    }
    if "teacher_clean" in stem:
        del small["adversary.attack.steps"]
    options = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    path = CONFIGS / f"{stem}.yaml"
    main([command, "--config", str(path), *options, *more], package="paper_awnet")


def test_a_missing_teacher_is_told_with_the_command_that_trains_it(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run("fit", "digits_awnet_mtard", "--seed_everything", "7")
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert "the teacher digits_teacher_clean has not been trained" in line
    assert "--config digits_teacher_clean --seed_everything 7" in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_teachers_student_interruption_and_test(tmp_path, monkeypatch) -> None:
    """Trained by their own configs, found, frozen; interrupted and resumed equals uninterrupted."""
    monkeypatch.chdir(tmp_path)
    for name in ("clean", "robust"):
        run("fit", f"digits_teacher_{name}", "--trainer.max_epochs", "1")
    runs = tmp_path / "runs/paper_awnet"
    before = (runs / "digits_teacher_robust/seed0/checkpoints/last.ckpt").read_bytes()
    stem = "digits_awnet_mtard"
    run("fit", stem, "--trainer.max_epochs", "3", "--experiment", "whole")
    run("fit", stem, "--trainer.max_epochs", "2", "--experiment", "cut")
    run("fit", stem, "--trainer.max_epochs", "3", "--experiment", "cut", "--ckpt_path", "last")
    whole, cut = (
        torch.load(runs / f"{n}/seed0/checkpoints/last.ckpt")["state_dict"]
        for n in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert {"objective.w_nat", "objective.initial", "objective.has_begun"} <= whole.keys()
    assert not any("teacher" in k or k.startswith("objective.clean") for k in whole)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert whole["objective.w_nat"] != 0.5
    assert (runs / "digits_teacher_robust/seed0/checkpoints/last.ckpt").read_bytes() == before
    for name in ("clean", "robust"):  # a test asks no teacher
        (runs / f"digits_teacher_{name}/seed0/checkpoints/last.ckpt").unlink()
    run("test", stem, "--experiment", "whole", "--ckpt_path", "last")
    assert (runs / "whole/seed0/results.json").is_file()
