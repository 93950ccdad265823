"""Nothing invented in the reference, and recipes as they were decided."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.cli.main import RobustCLI
from common.evaluation.suite import check_suite, resolve_losses, steps_of

PAPER = Path(__file__).parents[2] / "paper_awnet"
BACKBONES = {
    "cifar10_resnet18": 11.174,
    "cifar100_resnet18": 11.220,
    "tiny_resnet18": 11.271,
    "cifar10_mobilenetv2": 2.297,
    "cifar10_wrn34_8": 29.552,
    "cifar10_wrn34_10": 46.160,
    "cifar10_teacher_clean": 0.856,
    "cifar10_teacher_robust": 46.160,
    "cifar100_teacher_clean": 9.693,
    "cifar100_teacher_robust": 266.889,
}
SHORT = ("st", "at", "trades", "mart", "oat", "clean", "robust")


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_awnet")


@pytest.fixture(scope="module")
def reference(paper):
    return paper.reference


def test_the_ten_experiments_have_rows(reference) -> None:
    filled = {group for row in reference.rows.values() for group in row.groups}
    assert {f"E{i}" for i in range(1, 11)} < filled


def test_no_number_but_counted_parameters(reference) -> None:
    for stem, row in reference.rows.items():
        assert not row.selected
        known = {key: value for key, value in row.last.items() if value is not None}
        expected = next(
            (v for k, v in BACKBONES.items() if stem.startswith(k) and row.source == "M"), None
        )
        assert known == ({} if expected is None else {"parameters": expected}), stem
        if "awnet" in stem or stem.startswith("digits"):
            assert not known


def test_tags_of_the_notes_are_in_the_legend(paper) -> None:
    tags = paper.read("reference.yaml")["tags"]
    for group in paper.reference.groups:
        assert set(re.findall(r"\[([A-Z])\]", group.note)) <= set(tags)


def test_w_robust_stands_beside_every_attack_of_the_main_tables(reference) -> None:
    for group in reference.groups:
        if group.id in ("E1", "E2", "E3", "E4", "E5"):
            attacks = {m.key for m in group.metrics if "/" in m.key or m.key in ("aa", "worst")}
            weighted = [m.mean_of for m in group.metrics if m.mean_of]
            assert [m["clean_acc"] for m in weighted] == [0.5] * len(attacks)
            assert {key for m in weighted for key in m} == attacks | {"clean_acc"}


def test_the_recipe(paper) -> None:
    for stem in (stem for stem in paper.paths if not stem.startswith("digits")):
        config = paper.config(stem)
        model, trainer = config["model"]["init_args"], config["trainer"]
        rate = {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
        assert model["optimizer"]["init_args"] == rate
        is_short = stem.rpartition("_")[2] in SHORT and "awnet" not in stem
        epochs, milestones = (120, [90, 108]) if is_short else (300, [215, 260, 285])
        assert trainer["max_epochs"] == epochs, stem
        assert model["scheduler"]["init_args"] == {"milestones": milestones, "gamma": 0.1}
        assert config["checkpoint"]["monitor"] == "val/mean_acc"
        objective = model["objective"]
        if objective["class_path"].endswith("MTARD"):
            assert objective["init_args"]["milestones"] == milestones
            for kind in ("clean", "robust"):
                teacher = f"{stem.partition('_')[0]}_teacher_{kind}"
                asked = objective["init_args"][kind]
                assert asked["experiment"] == teacher
                assert asked["net"] == paper.config(teacher)["model"]["init_args"]["net"]
        if not objective["class_path"].endswith("Natural"):
            steps = 7 if stem.endswith("oat") else 10
            assert config["adversary"]["mode"] == "eval"
            assert config["adversary"]["attack"]["init_args"] == {
                "eps": "8/255", "step_size": "2/255", "steps": steps, "start": "gaussian",
                "project_start": False,
            }, stem  # fmt: skip
        # A network with a router is attacked through it.
        net = model["net"]["class_path"].rpartition(".")[2]
        suites = {"AWNet": "evaluation_dynamic", "OATNet": "evaluation_oat"}
        suite = f"configs/shared/{suites.get(net, 'evaluation')}.yaml"
        assert config["evaluation"] == paper.read(suite), stem


def test_the_digits_differ_in_the_network_alone(paper) -> None:
    students = {s: paper.config(s) for s in paper.paths if s.startswith("digits") and "mtard" in s}
    assert len(students) == 5
    nets = {s: c["model"]["init_args"].pop("net") for s, c in students.items()}
    static = students.pop("digits_static_mtard")
    assert static.pop("evaluation") == paper.read("configs/shared/evaluation_digits.yaml")
    suite = paper.read("configs/shared/evaluation_digits_dynamic.yaml")
    for config in students.values():
        assert config.pop("evaluation") == suite
        assert config == static
    mixed = {s: (n["init_args"].get("dynamic", True), n["init_args"].get("mixbn"))
             for s, n in nets.items() if "static" not in s}  # fmt: skip
    assert mixed == {
        "digits_awnet_mtard": (True, None),
        "digits_mixbn_mtard": (False, None),
        "digits_dynamic_mtard": (True, False),
        "digits_detector_mtard": (True, None),
    }
    assert static["trainer"]["max_epochs"] * 800 / 100 == pytest.approx(330, rel=0.02)


def command_line(stem: str, *options: str) -> RobustCLI:
    path = f"{PAPER}/configs/{stem}.yaml"
    return RobustCLI("paper_awnet", ["--config", path, *options], run=False)


def runs_of_pgd(suite: dict[str, Any], model: Any) -> int:
    """How many ascents behind the named PGD an image meets, at most."""
    total = 0
    for name in ("pgd20", "pgd_trades", "restarts", "adaptive"):
        if name in suite:
            entry = suite[name]
            total += entry.attack.restarts * len(resolve_losses(entry.losses, model))
    return total


@pytest.mark.parametrize(
    "stem", ["digits_static_mtard", "digits_awnet_mtard", "cifar10_resnet18_oat",
             "cifar10_resnet18_at", "tiny_resnet18_awnet_mtard"]
)  # fmt: skip
def test_every_network_meets_as_many_attacks(stem) -> None:
    with torch.device("meta"):
        cli = command_line(stem)
    suite = cli.config_init["evaluation"].suite
    check_suite(suite, cli.model)
    assert runs_of_pgd(suite, cli.model) == 16


@pytest.mark.parametrize("name", ["evaluation_adaptive", "evaluation_blackbox"])
def test_the_longer_suites_begin_with_the_usual_one(name, monkeypatch) -> None:
    from common.evaluation.transfer import Transfer

    monkeypatch.setattr(Transfer, "network", torch.nn.Linear(1, 1))
    suite_file = str(PAPER / f"configs/shared/{name}.yaml")
    with torch.device("meta"):
        cli = command_line("cifar10_resnet18_awnet_mtard", "--evaluation", suite_file)
    suite = cli.config_init["evaluation"].suite
    check_suite(suite, cli.model)
    steps = [step.key for step in steps_of(suite, cli.model, 10, 0)]
    assert steps[:4] == ["fgsm/ce_f", "pgd_sat/ce_f", "pgd_trades/ce_f", "cw30/cw_f"]
    wanted = {"each/joint_clean_0.1", "each/ce_branchadv", "each/misroute"}
    if name == "evaluation_blackbox":
        wanted = {"transfer_pgd", "transfer_cw", "square/square"}
    assert wanted <= set(steps)


def test_the_attacks_are_those_of_the_overlay_for_any_model(paper, entries_of) -> None:
    shared = paper.read("configs/shared/evaluation.yaml")["suite"]
    overlay = paper.read("../common/configs/paper-awnet.yaml")["evaluation"]["suite"]
    own = {name: entry for name, entry in shared.items() if name in overlay}
    assert entries_of(overlay, "8/255") == entries_of(own, "8/255")


def made(stem: str, *options: str) -> Any:
    return command_line(stem, *options).model


def test_signal_heads_may_learn_at_a_rate_of_their_own(paper) -> None:
    groups = '[{"parameters": ["net.router.signal_heads.*"], "lr_mult": 10}]'
    model = made("digits_awnet_mtard", "--model.groups", groups)
    rest, heads = model.configure_optimizers()["optimizer"].param_groups
    assert heads["lr"] == pytest.approx(10 * rest["lr"])
    count = sum(p.numel() for p in model.net.router.signal_heads.parameters())
    assert sum(p.numel() for p in heads["params"]) == count
    lr10 = paper.config("cifar10_resnet18_awnet_mtard_signallr10")["model"]["init_args"]
    assert lr10["groups"] == yaml.safe_load(groups)


def test_switches_on_the_command_line() -> None:
    model = made(
        "digits_awnet_mtard",
        *("--model.net.mixing", "hard", "--model.net.router.init", "normal"),
        *("--model.objective.lambda_type", "0", "--model.objective.robust.path", "elsewhere.ckpt"),
    )
    assert model.net.mixing == "hard"
    assert model.net.router.signal_heads[0].weight.std() > 0.5
    assert model.objective.lambda_type == 0.0
    assert model.objective.teachers["robust"].path == "elsewhere.ckpt"
    trained = {id(p) for g in model.configure_optimizers()["optimizer"].param_groups
               for p in g["params"]}  # fmt: skip
    assert trained == {id(p) for p in model.net.parameters()}, "no teacher among them"
