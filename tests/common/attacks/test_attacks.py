"""What every attack keeps to, in one table, and the settings of all of them."""

import copy
import json
import math
import pickle

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from common.attacks.autoattack import AutoAttack
from common.attacks.decision import DecisionBased
from common.attacks.gama import GAMAPGD
from common.attacks.minimum_norm import CarliniWagner, DeepFool, MinimumNorm
from common.attacks.noise import GaussianNoise, Noise, SaltAndPepperNoise, UniformNoise
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import ConfigurationError

CW = CarliniWagner(steps=20, step_size=0.05, binary_search_steps=3, initial_const=0.1)
AA = AutoAttack(0.1, version="custom", attacks=["apgd-ce"], steps=3, square_queries=20)
ATTACKS = {
    "pgd": PGD("8/255", "2/255", 4),
    "pgd-gaussian": PGD("8/255", "2/255", 4, "gaussian", start_scale="16/255"),
    "pgd-restarts": PGD(0.1, 0.04, 3, restarts=3),
    "pgd-l2": PGD(0.6, 0.2, 4, norm="l2"),
    "pgd-l1": PGD(3.0, 1.0, 4, norm="l1", l1_density=0.05),
    "pgd-momentum": PGD(0.1, 0.04, 3, momentum=0.7),
    "pgd-unprojected": PGD(0.6, 0.2, 4, "gaussian", "l2", start_scale=0.1, project_start=False),
    "fgsm": FGSM("8/255"),
    "mim": MIM("8/255", decay=0.5),
    "friendly": FriendlyPGD(0.2, 0.06, 5, tau={0: 1, 50: 2}),
    "friendly-noise": FriendlyPGD(0.2, 0.06, 5, tau=1, noise=0.01),
    "gama": GAMAPGD("8/255", steps=8, decay_at=(4, 6), relaxed_steps=3),
    "gama-unprojected": GAMAPGD("8/255", steps=8, decay_at=(4, 6), relaxed_steps=3, project=False),
    "deepfool": DeepFool(),
    "deepfool-l2": DeepFool(norm="l2", candidates=3),
    "deepfool-clip": DeepFool(0.1, clip=True),
    "cw": CW,
    "decision": DecisionBased(0.1, queries=60),
    "decision-l2": DecisionBased("8/255", "l2", 100),
    "apgd": AA,
    "fab": AA.but(attacks=["fab"]),
    "square": AA.but(attacks=["square"]),
    "uniform": UniformNoise([0.1, "8/255"], draws=3),
    "gaussian": GaussianNoise([0.1], seed=4),
    "salt": SaltAndPepperNoise([0.1]),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
every_gradient = pytest.mark.parametrize(
    "attack",
    [a for a in ATTACKS.values() if isinstance(a, PGD | GAMAPGD | MinimumNorm)],
    ids=lambda attack: type(attack).__name__,
)
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def run(attack, task, rows: Tensor | None = None, seed: int = 1) -> Tensor:
    rows = torch.arange(len(task.x)) if rows is None else rows
    x, y = task.x[rows].clone(), task.y[rows].clone()
    random = ExampleRandom(seed, 0, task.index[rows])

    if isinstance(attack, PGD):
        with torch.inference_mode(False):
            loss, wrong = task.of(rows)
        return attack(loss, x, random, is_adversarial=wrong)
    if isinstance(attack, Noise):
        return attack.apply(x, attack.levels[0], random)
    if isinstance(attack, AutoAttack):
        return attack.step(attack.attacks[0], task.net, x, y)[0]
    if isinstance(attack, DecisionBased):
        return attack(lambda x: task.net(x).argmax(dim=1), x, y, random)
    return attack(task.net, x, y, *([random] if isinstance(attack, GAMAPGD) else []))


def bound(attack) -> tuple[str, float]:
    """Norm and radius that the images keep to."""
    if isinstance(attack, UniformNoise):
        return "linf", attack.levels[0]
    is_projected = getattr(attack, "clip", True) and getattr(attack, "project", True)
    if is_projected and isinstance(attack, PGD | GAMAPGD | DeepFool | AutoAttack):
        return attack.norm, attack.eps
    return "linf", 1.0


@every_attack
def test_images_stay_in_the_box_and_the_ball_and_get_worse(attack, task):
    x_adv = run(attack, task)
    assert x_adv.shape == task.x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    norm, eps = bound(attack)
    size = torch.linalg.vector_norm((x_adv - task.x).flatten(1), ORDER[norm], dim=1)
    assert 0 < size.max() <= eps * (1 + 1e-5) + 1e-6
    if not isinstance(attack, Noise):
        with torch.no_grad():
            assert task.loss(x_adv).mean() > task.loss(task.x).mean()


@every_attack
def test_everything_else_is_left_alone(attack, task):
    for parameter in task.net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    if not isinstance(attack, AutoAttack):
        task.net[3].train()
        task.net[3].p = 0.0

    def everything() -> list[Tensor]:
        modes = torch.tensor([module.training for module in task.net.modules()])
        return [torch.get_rng_state(), task.x, task.y, modes, *task.net.state_dict().values()]

    before = copy.deepcopy(everything())
    run(attack, task)
    assert all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    assert all((p.grad == 7.0).all() and p.requires_grad for p in task.net.parameters())


@every_attack
def test_the_result_is_the_same_in_any_gradient_mode(attack, task):
    expected = run(attack, task)
    with torch.no_grad():
        assert torch.equal(run(attack, task), expected)
    with torch.inference_mode():
        result = run(attack, task)
    assert torch.equal(result, expected)
    assert result.is_inference() is isinstance(attack, Noise | DecisionBased)


@pytest.mark.parametrize(
    "attack",
    [a for a in ATTACKS.values() if not isinstance(a, AutoAttack)],  # its noise belongs to a batch
    ids=lambda attack: type(attack).__name__,
)
def test_an_example_does_not_depend_on_its_batch(attack, task64):
    together = run(attack, task64)
    assert together.dtype == torch.float64
    for rows in (torch.tensor([4, 1, 3]), torch.tensor([2])):
        torch.testing.assert_close(run(attack, task64, rows), together[rows], rtol=0, atol=1e-9)


@every_gradient
def test_under_autocast_pixels_are_float32(attack, task):
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = run(attack, task)
    assert x_adv.dtype == torch.float32
    assert torch.isfinite(x_adv).all()


@every_gradient
def test_an_empty_batch_stays_empty(attack, task):
    assert run(attack, task, torch.arange(0)).shape == (0, 3, 8, 8)


@every_gradient
def test_inputs_that_cannot_be_attacked_are_refused(attack, task):
    net = task.net
    task.net = lambda x: net(x).detach()
    with pytest.raises(ValueError, match="no gradient to"):
        run(attack, task)
    task.x = (task.x * 255).to(torch.uint8)
    with pytest.raises(ValueError, match="floating-point pixels"):
        run(attack, task)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_gradient
def test_gpu_equals_cpu(attack, task64):
    expected = run(attack, task64)
    task64.net.cuda()
    task64.x, task64.y, task64.index = task64.x.cuda(), task64.y.cuda(), task64.index.cuda()
    result = run(attack, task64, torch.arange(6, device="cuda"))
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-6)


# Settings


def state(attack) -> dict:
    return {name: value for name, value in vars(attack).items() if name != "_given"}


@pytest.mark.parametrize(
    ("attack", "step_size"),
    [
        (PGD("8/255", steps=5), 0.05),
        (FriendlyPGD("8/255", steps=5), 0.05),
        (MIM("8/255", steps=5), 0.02),
        (PGD("8/255", 0.01), 0.01),
        (PGD("8/255", "eps/4"), 0.025),
        (FGSM("8/255", "l2"), 0.1),
        (GAMAPGD("8/255"), 0.2),
    ],
)
def test_another_radius_brings_another_default_step(attack, step_size):
    other = attack.but(eps=0.1)
    assert type(other) is type(attack)
    assert other.eps == 0.1
    assert other.step_size == pytest.approx(step_size)


@every_attack
def test_copies_are_alike_and_know_their_settings(attack):
    attack = attack.but()  # without what a call has left
    before = copy.deepcopy(state(attack))
    assert attack.but().settings() == attack.settings()
    for other in (copy.copy(attack), copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert type(other) is type(attack)
        assert repr(other) == repr(attack)
        assert other.settings() == attack.settings()
        assert state(other) == state(other.but()) == state(attack) == before


@every_attack
def test_settings_are_plain_json_and_make_the_attack_from_the_command_line(attack):
    written = attack.settings()
    assert json.loads(json.dumps(written)) == written
    name = written.pop("class")
    assert name == f"{type(attack).__module__}.{type(attack).__name__}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Settings, "attack")
    given = json.dumps({"class_path": name, "init_args": written})
    made = parser.instantiate(parser.parse_args([f"--attack={given}"])).attack
    assert state(made) == state(attack.but())


def test_settings_say_how_an_attack_was_made():
    assert FriendlyPGD(0.1, tau={0: 0, 50: 1}).settings()["tau"] == {"0": 0, "50": 1}
    assert PGD(0.1, 0.02, 7).settings() == PGD(steps=7, eps=0.1, step_size=0.02).settings()
    with pytest.raises(TypeError, match="radius"):
        PGD("4/255").but(radius=0.1)
    assert repr(PGD("8/255", steps=20)) == "PGD(eps='8/255', steps=20)"


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (PGD("8/255", steps=20), (20, 20)),
        (PGD(0.1, steps=20, restarts=5), (110, 100)),
        (FriendlyPGD(0.1, steps=7), (14, 7)),
        (PGD(0.1, steps=0, start="gaussian", project_start=False), (0, 0)),
        (DeepFool("8/255", candidates=10), (52, 450)),
        (CarliniWagner(confidence=5.0, steps=100, binary_search_steps=3), (301, 300)),
        (GAMAPGD("8/255"), (101, 100)),
        (DecisionBased("8/255", "l2", 200), (200, 0)),
    ],
    ids=repr,
)
def test_a_budget_counts_passes(attack, passes):
    assert attack.budget == passes


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *(
            (kind, {"eps": 8}, "did you mean '8/255'")
            for kind in (PGD, GAMAPGD, DeepFool, DecisionBased, AutoAttack)
        ),
        (PGD, {"step_size": 2}, r"step_size .* '2/255'"),
        (PGD, {"step_size": "eps/0"}, "divides by zero"),
        (PGD, {"steps": -1}, "steps .* at least 0, got -1"),
        (PGD, {"restarts": 0}, "restarts"),
        (PGD, {"restarts": 2, "start": "zero"}, "uniform or gaussian"),
        (PGD, {"start": "random"}, "start .* zero, uniform, gaussian"),
        (PGD, {"norm": "l3"}, "norm"),
        (PGD, {"momentum": -1.0}, "momentum"),
        (PGD, {"l1_density": 0.0}, "l1_density"),
        (FriendlyPGD, {"noise_form": "inside"}, "noise_form .* added, scaled"),
        *((FriendlyPGD, {"tau": t}, "tau") for t in ({}, {1: 0}, {0: -1}, {-1: 0, 0: 1}, -1)),
        (GAMAPGD, {"decay_at": (-1,)}, "decay_at"),
        (DeepFool, {"norm": "l1"}, "norm .* linf, l2"),
        (DeepFool, {"candidates": 1}, "candidates .* at least 2"),
        (DeepFool, {"overshoot": -0.1}, "overshoot .* at least 0"),
        (DeepFool, {"eps": None, "clip": True}, "clip"),
        (CarliniWagner, {"eps": -1.0}, "eps .* at least 0"),
        (CarliniWagner, {"step_size": 0.0}, "step_size .* above 0"),
        (DecisionBased, {"queries": 0}, "queries"),
        (AutoAttack, {"version": "full"}, "version"),
        (AutoAttack, {"version": "custom"}, "attacks .* custom"),
        (AutoAttack, {"attacks": ["square"]}, r"attacks .* \['square'\]"),
        (AutoAttack, {"version": "custom", "attacks": ["pgd"]}, "attacks .* 'pgd'"),
        (AutoAttack, {"version": "custom", "attacks": ["fab", "fab"]}, "different"),
        (AutoAttack, {"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        kind(**{"eps": 0.1, **settings})
