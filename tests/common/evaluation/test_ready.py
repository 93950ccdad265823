"""The ready suites parse, follow the threat model, and go from cheap to dear."""

import pytest
import yaml

from common.attacks.autoattack import AutoAttack
from common.errors import ConfigurationError
from common.evaluation import Threat
from common.evaluation.ready import CONFIGS, fill_threat, load_suite, ready_suites, threat_of


def test_every_suite_that_is_promised_is_there() -> None:
    papers = {f"paper-{name}" for name in ("awnet", "cifs", "rcm", "robustwrn", "wm")}
    assert {"quick", "autoattack", "audit"} | papers <= set(ready_suites())


@pytest.mark.parametrize("name", ready_suites())
def test_every_suite_can_be_built(name: str) -> None:
    suite = load_suite(name, Threat("linf", "4/255"))
    assert suite.entries or suite.audit
    for entry in suite.entries.values():
        assert entry.cost > 0
        assert list(entry.variants())
        if not name.startswith("paper-"):  # those keep to their paper's radius
            assert entry.attack.eps == pytest.approx(4 / 255)


def test_quick_goes_from_cheap_to_dear_and_attacks_survivors_only() -> None:
    entries = list(load_suite("quick", Threat("linf", 0.1)).entries.values())
    costs = [entry.cost for entry in entries]
    assert costs == sorted(costs)
    assert all(entry.survivors_only for entry in entries)


def test_an_attack_follows_radius_and_norm_of_the_threat() -> None:
    entries = load_suite("quick", Threat("l2", 0.5)).entries
    assert {(entry.attack.norm, entry.attack.eps) for entry in entries.values()} == {("l2", 0.5)}
    assert entries["pgd20"].attack.step_size == 0.125


def test_multiples_of_the_radius() -> None:
    node = {"sweep": {"eps": ["threat/4", "threat", "threat*2", "threat * 100"]}}
    fill_threat(node, Threat("linf", 0.2))
    assert node == {"sweep": {"eps": [0.05, 0.2, 0.4, 1.0]}}
    with pytest.raises(ConfigurationError, match="nothing says what the threat model is"):
        fill_threat({"eps": "threat"}, None)


def test_the_threat_is_stated_or_the_first_ball_or_the_adversarys() -> None:
    def attack(**arguments):
        return {"attack": {"class_path": "common.attacks.pgd.PGD", "init_args": arguments}}

    stated = {"threat": {"norm": "l2", "eps": 0.5}, "suite": {"a": attack(eps="8/255")}}
    assert threat_of(stated) == Threat("l2", 0.5)
    suite = {"suite": {"a": attack(eps="threat"), "b": attack(eps="4/255")}}
    assert threat_of(suite, attack(eps=0.2)) == Threat("linf", "4/255")
    assert threat_of({"suite": {"a": attack(eps="threat")}}, attack(eps=0.2)) == Threat("linf", 0.2)
    assert threat_of({}, {}) is None


def test_unknown_suites_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="no suite 'quik'; there are audit, autoattack"):
        load_suite("quik", Threat("linf", 0.1))
    file = tmp_path / "mine.yaml"
    file.write_text("evaluation: {validation: null}")
    with pytest.raises(ConfigurationError, match=r"no evaluation\.suite"):
        load_suite(file, Threat("linf", 0.1))
    file.write_text(
        "evaluation: {suite: {a: {attack: {class_path: common.attacks.pgd.PGD, "
        "init_args: {eps: threat, stepz: 3}}}}}"
    )
    with pytest.raises(ConfigurationError, match=r"mine\.yaml.*stepz"):
        load_suite(file, Threat("linf", 0.1))


def test_the_papers_radii_are_those_of_their_threat() -> None:
    for name in ready_suites():
        if name.startswith("paper-"):
            section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluation"]
            assert section["threat"] == {"norm": "linf", "eps": "8/255"}
            entries = load_suite(name, Threat("linf", "8/255")).entries
            assert any(isinstance(entry.attack, AutoAttack) for entry in entries.values())
