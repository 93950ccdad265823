"""The ready suites parse, follow the threat model, and go from cheap to dear."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.noise import Noise, UniformNoise
from common.attacks.pgd import FGSM, PGD
from common.errors import ConfigurationError
from common.evaluation import Audit, SuiteEntry, Threat, evaluate
from common.evaluation.models import Victim, as_victim
from common.evaluation.presets import (
    CONFIGS,
    chosen_threat,
    fill_threat,
    load_suite,
    threat_of,
)
from common.evaluation.runner import run_steps
from common.evaluation.suite import ball_of, steps_of
from common.packages import ready_suites

STEPS = {  # what the papers' protocols say at 8/255
    "paper-awnet": {"pgd_sat": 2 / 255, "pgd_trades": 0.003, "cw30": 2 / 255},
    "paper-cifs": {"pgd20": 0.8 / 255, "cw30": 0.8 / 255, "pgd100": 0.8 / 255},
    "paper-rcm": {"pgd20": 2 / 255, "pgd40": 0.8 / 255},
    "paper-robustwrn": {"pgd20": 0.8 / 255, "cw20": 0.8 / 255, "gama100": 16 / 255},
    "paper-wm": {"pgd20": 1 / 255, "pgd100": 0.4 / 255, "mim10": 0.8 / 255},
}


@pytest.mark.parametrize("name", ready_suites())
def test_every_suite_can_be_built_and_its_steps_scale_with_the_radius(name: str) -> None:
    suite, scale = load_suite(name, "4/255"), 0.5
    assert suite.threat == Threat("linf", "4/255")
    assert suite.entries or suite.audit
    assert {"quick", "autoattack", "audit", *STEPS} <= set(ready_suites())
    for key, entry in suite.entries.items():
        assert list(entry.variants())
        if not isinstance(entry.attack, Noise) and key != "cw_l2":  # l2 in a suite about linf
            assert entry.attack.eps == pytest.approx(4 / 255)
        if name == "paper-wm" and "steps" in entry.attack.settings() and entry.sweep:
            radii = [at["eps"] for _, at in entry.variants()]
            assert radii == pytest.approx([scale * n / 255 for n in (1, 2, 4, 8)])
    for key, step_size in STEPS.get(name, {}).items():
        assert suite.entries[key].attack.step_size == pytest.approx(scale * step_size, rel=1e-9)
    if name in STEPS:
        stated = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluation"]["threat"]
        assert stated == {"norm": "linf", "eps": "8/255"}


def test_quick_goes_from_cheap_to_dear_and_attacks_survivors_only() -> None:
    entries = load_suite("quick", 0.5, "l2").entries
    steps = steps_of(entries, Victim(nn.Identity(), 10), 10, 0)
    costs = [sum(sum(s.budget) for s in steps if s.entry == name) for name in entries]
    assert costs == sorted(costs)
    assert all(entry.survivors_only for entry in entries.values())
    assert {(entry.attack.norm, entry.attack.eps) for entry in entries.values()} == {("l2", 0.5)}
    assert entries["pgd20"].attack.step_size == 0.125


def test_multiples_of_the_radius() -> None:
    node = {"sweep": {"eps": ["threat/4", "threat", "threat*2", "threat * 100"]}}
    fill_threat(node, Threat("linf", 0.2))
    assert node == {"sweep": {"eps": [0.05, 0.2, 0.4, 1.0]}}
    for word, threat, match in (
        ("threat", None, "nothing says what the threat model is"),
        ("threat/0", Threat("linf", 0.2), "above 0"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            fill_threat({"eps": word}, threat)


def section(*arguments: dict, name: str = "pgd.PGD", **more) -> dict:
    """A section ``evaluation`` of attacks with these arguments."""
    path = f"common.attacks.{name}"
    entries = [{"attack": {"class_path": path, "init_args": given}} for given in arguments]
    return {"suite": {f"a{i}": entry for i, entry in enumerate(entries)}, **more}


@pytest.fixture
def written(tmp_path):
    """Writes a file of suites and returns its path."""

    def write(content: dict | bytes) -> Path:
        text = content if isinstance(content, bytes) else yaml.safe_dump({"evaluation": content})
        (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "mine.yaml"

    return write


def test_the_threat_is_stated_or_the_first_ball_or_the_adversarys() -> None:
    adversary = section({"eps": 0.2})["suite"]["a0"]
    stated = section({"eps": "8/255"}, threat={"norm": "l2", "eps": 0.5})
    assert threat_of(stated) == Threat("l2", 0.5)
    assert threat_of(section({"eps": "threat"}, {"eps": "4/255"}), adversary) == Threat(
        "linf", "4/255"
    )
    assert threat_of(section({"eps": "threat"}), adversary) == Threat("linf", 0.2)
    assert threat_of({}, {}) is None
    for name, norm in (
        ("minimum_norm.CarliniWagner", "l2"),
        ("minimum_norm.DeepFool", "linf"),
        ("gama.GAMAPGD", "linf"),
    ):
        assert threat_of(section({"eps": 0.5}, name=name)) == Threat(norm, 0.5)
    with pytest.raises(ConfigurationError, match="GAMAPGD attacks in linf"):
        fill_threat(section({"eps": "threat"}, name="gama.GAMAPGD"), Threat("l2", 0.5))
    with pytest.raises(ConfigurationError, match="PGDD cannot be imported"):
        threat_of(section({"eps": 0.5}, name="pgd.PGDD"))
    assert chosen_threat(Threat("l2", 0.5), 0.25, None) == Threat("l2", 0.25)
    assert chosen_threat(Threat("l2", 0.5), 0.1, "linf") == Threat("linf", 0.1)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"validation": None}, r"no evaluation\.suite"),
        (section({"eps": "threat", "stepz": 3}), r"mine\.yaml.*stepz"),
        (section({"eps": "threat", "norm": "l2"}), "PGD attacks in l2 with the radius of the th"),
        ({"audit": {"examples": 5}, "engine": {}}, r"evaluation\.engine, which has no use"),
        (b"evaluation: [", "it is no YAML"),
        (b"- 1", "has no"),
        (b"evaluation: [1]", "has no"),
        (b"evaluation: {suite: [1]}", "has no"),
        (b"\xff\xfe\x00", "it is no YAML"),
        (b"", "has no"),
    ],
)
def test_files_that_are_no_suites_are_refused_in_one_line(written, content, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as caught:
        load_suite(written(content), 0.1)
    assert "\n" not in str(caught.value)


def test_a_suite_that_follows_takes_the_norm_that_is_given(written) -> None:
    file = written(section({"eps": "threat", "norm": "l2"}))
    assert load_suite(file, 0.1, "l2").entries["a0"].attack.norm == "l2"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({"eps": "threat"}, {"eps": 0.5, "norm": "l2"}), Threat("linf", "8/255")),
        (({"eps": 0.5, "norm": "l2"}, {"eps": "threat"}), Threat("linf", "8/255")),
        (({"eps": 0.5, "norm": "l2"}, {"eps": 0.1}), Threat("l2", 0.5)),
        (({"eps": "2/255"}, {"eps": "4/255"}), Threat("linf", "2/255")),
    ],
)
def test_numbers_say_what_a_file_is_about_where_nothing_follows(
    written, arguments, expected
) -> None:
    assert load_suite(written(section(*arguments, name="pgd.FGSM"))).threat == expected


@pytest.fixture(scope="module")
def problem(linear) -> tuple[nn.Module, Tensor, Tensor]:
    model = linear(pixels=16).eval()
    x = 0.25 + 0.5 * torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    y[::8] = (y[::8] + 1) % 4
    return model, x, y


@pytest.mark.parametrize("name", [name for name in ready_suites() if name != "audit"])
def test_every_suite_finds_the_exact_robust_accuracy(problem, name) -> None:
    """Attacks are cut, and what takes long is left out: the rest finds the optimum as well."""
    model, x, y = problem
    suite = load_suite(name, "5/255")
    cut = {key: entry for key, entry in suite.entries.items() if key not in ("cw_l2", "pgd100")}
    for entry in cut.values():
        if isinstance(entry.attack, AutoAttack):
            entry.attack = entry.attack.but(steps=5, square_queries=5)
        elif isinstance(entry.attack, PGD) and entry.attack.steps > 10:
            entry.attack = entry.attack.but(steps=10)
    found = evaluate(model, (x, y), cut, eps=suite.threat.radius, progress=False)
    exact = model.exact(x, y, suite.threat.radius)
    assert 0 < exact.sum() < len(y)
    assert torch.equal(found.robust, exact)
    assert found.robust_acc == exact.double().mean().item()
    assert found.table().title.endswith(f"linf eps {suite.threat.radius:.5g}")


def test_without_a_radius_it_is_the_suites_own(problem) -> None:
    model, x, y = problem
    apgd = AutoAttack(0.03, version="custom", attacks=["apgd-t"], steps=20)
    found = evaluate(model, (x, y), {"apgd": SuiteEntry(apgd)}, progress=False)
    assert torch.equal(found.robust, model.exact(x, y, 0.03))
    assert "linf eps 0.03" in str(found)
    l2 = {"apgd": SuiteEntry(apgd.but(norm="l2"), sweep={"eps": [0.05, 0.1]})}
    found = evaluate(model, (x, y), l2, progress=False)
    assert torch.equal(found.robust, model.exact(x, y, 0.1, "l2"))
    assert "l2 eps 0.1" in str(found)
    assert load_suite("quick").threat == Threat("linf", "8/255")
    assert ball_of({"noise": SuiteEntry(UniformNoise([0.1]))}) is None


def test_rows_outside_the_threat_model_are_marked(problem) -> None:
    model, x, y = problem
    suite = {
        "inside": SuiteEntry(PGD(0.02, steps=10)),
        "larger": SuiteEntry(FGSM(0.1)),
        "other": SuiteEntry(FGSM(0.02, norm="l2")),
        "noise": SuiteEntry(UniformNoise([0.02])),
    }
    text = str(evaluate(model, (x, y), suite, eps=0.02, progress=False))
    for row in (
        "inside/ce_f ",
        "larger/ce_f (outside: linf eps 0.1)",
        "other/ce_f (outside: l2 eps 0.02)",
        "(noise)",
    ):
        assert row in text


def test_settings_that_cannot_work_are_refused(problem) -> None:
    model, x, y = problem
    noise, last = SuiteEntry(UniformNoise([0.1])), SuiteEntry(FGSM(0.1), checkpoints=["last"])
    for suite, given, match in (
        *((name, {"eps": 0.5, "norm": "l2"}, f"{name}' attacks in linf") for name in STEPS),
        ("quik", {}, "no suite 'quik'; did you mean quick"),
        ("quick", {"norm": "l2"}, "norm is l2 and eps is not given"),
        ({"n": noise}, {"engine": AttackEngine()}, "drop engine"),
        ({"p": last}, {}, "drop checkpoints"),
        ("quick", {"audit": Audit(checkpoints=["last"])}, "the audit is for the checkpoints last"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            evaluate(model, (x, y), suite, progress=False, **given)


def test_the_batch_size_reaches_autoattack_and_the_audit(problem) -> None:
    model, x, y = problem
    sizes: set[int] = set()
    suite = {"aa": SuiteEntry(AutoAttack(0.01, version="custom", attacks=["apgd-ce"], steps=2))}
    victim = as_victim(model, 4)
    square = Audit(square_queries=5).steps(victim, Threat("linf", 0.01), 4)
    steps = steps_of(suite, victim, 4, 0) + [s for s in square if s.key == "audit_square"]
    with model.register_forward_hook(lambda _, inputs, __: sizes.add(len(inputs[0]))):
        for size in (5, 9):
            sizes.clear()
            examples = {"x": x, "y": y, "index": torch.arange(len(y))}
            run_steps(model, examples, steps, seed=0, batch_size=size)
            assert max(sizes) == size
