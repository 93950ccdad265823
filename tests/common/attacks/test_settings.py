import copy
import json
import pickle

import pytest

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.noise import GaussianNoise, SaltAndPepperNoise, UniformNoise
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.errors import ConfigurationError

ATTACKS = {
    "pgd": PGD("8/255", steps=20, norm="l2"),
    "fgsm": FGSM(0.1),
    "mim": MIM("8/255", decay=0.5),
    "friendly": FriendlyPGD("8/255", "2/255", tau={0: 0, 50: 1}),
    "autoattack": AutoAttack(0.1, version="custom", attacks=["apgd-ce", "square"]),
    "deepfool": DeepFool("8/255", steps=20, clip=True),
    "cw": CarliniWagner(confidence=1.0),
    "gama": GAMAPGD("8/255", decay_at=(3, 5)),
    "uniform": UniformNoise([0.1, "8/255"], draws=3),
    "gaussian": GaussianNoise([0.1], seed=4),
    "salt": SaltAndPepperNoise([0.1]),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


def state(attack):
    return {name: value for name, value in vars(attack).items() if name != "_given"}


@pytest.mark.parametrize(("kind", "factor"), [(PGD, 2.5), (MIM, 1.0), (FriendlyPGD, 2.5)])
def test_another_radius_brings_another_default_step(kind, factor):
    other = kind("8/255", steps=5).but(eps=0.1)
    assert type(other) is kind
    assert other.eps == 0.1
    assert other.steps == 5
    assert other.step_size == pytest.approx(factor * 0.1 / 5)


def test_another_radius_keeps_a_step_that_was_given():
    assert PGD("8/255", 0.01).but(eps=0.1).step_size == 0.01
    assert FGSM("8/255", "l2").but(eps=0.1).step_size == 0.1
    assert GAMAPGD("8/255").but(eps=0.1).step_size == 0.2


@every_attack
def test_unchanged_is_the_same_and_the_original_stays(attack):
    before = copy.deepcopy(state(attack))
    assert state(attack.but()) == before
    assert attack.but().settings() == attack.settings()
    assert state(attack) == before


def test_changes_are_checked_like_any_setting():
    with pytest.raises(ConfigurationError, match="did you mean '8/255'"):
        PGD("4/255").but(eps=8)
    with pytest.raises(TypeError, match="radius"):
        PGD("4/255").but(radius=0.1)


@every_attack
@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack))]
)
def test_copies_are_alike_and_know_their_settings(attack, clone):
    other = clone(attack)
    assert type(other) is type(attack)
    assert state(other) == state(attack)
    assert repr(other) == repr(attack)
    assert other.settings() == attack.settings()
    assert state(other.but()) == state(attack)


@every_attack
def test_settings_are_plain_json(attack):
    written = attack.settings()
    assert json.loads(json.dumps(written)) == written
    assert written["class"] == f"{type(attack).__module__}.{type(attack).__name__}"


def test_settings_are_complete():
    assert PGD("8/255", steps=20).settings() == {
        "class": "common.attacks.pgd.PGD",
        "eps": "8/255",
        "step_size": None,
        "steps": 20,
        "start": "uniform",
        "norm": "linf",
        "momentum": None,
        "restarts": 1,
        "start_scale": 0.001,
        "l1_density": 0.01,
        "project_start": True,
    }
    assert FGSM(0.1).settings() == {"class": "common.attacks.pgd.FGSM", "eps": 0.1, "norm": "linf"}
    assert FriendlyPGD(0.1, tau={0: 0, 50: 1}).settings()["tau"] == {"0": 0, "50": 1}
    assert AutoAttack(0.1).settings()["version"] == "standard"
    assert GAMAPGD(0.1).settings()["decay_at"] == [60, 85]


def test_an_attack_in_position_and_by_name_are_the_same():
    assert PGD(0.1, 0.02, 7).settings() == PGD(steps=7, eps=0.1, step_size=0.02).settings()


@pytest.mark.parametrize(
    ("attack", "cost"),
    [
        (PGD(0.1, steps=20), 20),
        (PGD(0.1, steps=20, restarts=5), 100),
        (PGD(0.1, steps=0), 1),
        (FGSM(0.1), 1),
        (MIM(0.1, steps=4), 4),
        (DeepFool(steps=50, candidates=10), 450),
        (CarliniWagner(steps=100, binary_search_steps=3), 300),
        (GAMAPGD(0.1), 100),
    ],
    ids=repr,
)
def test_cost_counts_passes(attack, cost):
    assert attack.cost == cost
