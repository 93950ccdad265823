"""Nothing invented in the reference, and recipes as they were decided."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import yaml

from common.cli.main import RobustCLI
from common.evaluation.presets import load_suite
from common.evaluation.suite import check_suite, resolve_losses, steps_of
from common.evaluation.transfer import Transfer
from common.networks.resnet import ResNet
from common.objectives import Natural
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import AWNet, OATNet

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

SMALL = ("digits", "fashion_small")


# Clean, FGSM, PGD-sat, PGD-trades, C&W, black-box PGD-20 and C&W, Square.
SIBLINGS = {
    "cifar10_resnet18_at": [84.20, 55.59, 45.95, 48.12, 45.97, 64.74, 64.88, 71.30],
    "cifar10_resnet18_ard": [84.11, 58.40, 50.93, 52.96, 50.15, 63.59, 62.78, 73.30],
    "cifar10_resnet18_mtard": [87.36, 61.20, 50.73, 53.60, 48.57, 65.17, 64.65, 79.99],
    "cifar100_resnet18_st": [75.18, 7.96, 0.0, 0.0, 0.0],
    "cifar100_resnet18_rslad": [58.25, 34.73, 31.19, 32.05, 28.21, 39.93, 39.67, 45.34],
    "cifar100_resnet18_mtard": [64.30, 31.49, 24.95, 26.75, 23.42, 41.39, 41.03, None],
}


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_awnet")


@pytest.fixture(scope="module")
def reference(paper):
    return paper.reference


def test_no_cell_of_the_paper_was_found_and_every_experiment_has_rows(reference) -> None:
    filled = {group for row in reference.rows.values() for group in row.groups}
    assert {f"E{i}" for i in range(1, 11)} < filled
    for stem, row in reference.rows.items():
        assert bool(row.selected) == (row.source in ("E", "E2")), stem
        assert not (row.selected and re.search("awnet|tiny|small|digits", stem)), stem
        known = {key: value for key, value in row.last.items() if value is not None}
        has_size = row.source in ("M", "E", "E2")
        expected = next((v for k, v in BACKBONES.items() if stem.startswith(k) and has_size), None)
        assert known == ({} if expected is None else {"parameters": expected}), stem
        assert not (known and ("awnet" in stem or stem.startswith(SMALL)))


def test_numbers_of_the_sibling_papers(reference) -> None:
    for stem, numbers in SIBLINGS.items():
        assert list(reference.rows[stem].selected.values()) == numbers, stem


def test_groups_explain_their_tags_and_weigh_every_attack(paper, reference) -> None:
    tags = paper.read("reference.yaml")["tags"]
    for group in reference.groups:
        assert set(re.findall(r"\[([A-Z]\d?)\]", group.note)) <= set(tags)
        if group.id in ("E1", "E2", "E3", "E4", "E5"):
            attacks = {m.key for m in group.metrics if "/" in m.key or m.key in ("aa", "worst")}
            weighted = [m.mean_of for m in group.metrics if m.mean_of]
            assert [m["clean_acc"] for m in weighted] == [0.5] * len(attacks)
            assert {key for m in weighted for key in m} == attacks | {"clean_acc"}


def test_students_ask_the_teachers_of_their_data_and_routers_are_attacked(paper) -> None:
    suites = {"AWNet": "evaluation_dynamic", "OATNet": "evaluation_oat"}
    for stem in (stem for stem in paper.paths if not stem.startswith(SMALL)):
        config = paper.config(stem)
        model = config["model"]["init_args"]
        arguments = model["objective"].get("init_args", {})
        for kind in {"clean", "robust"} & arguments.keys():
            teacher = f"{stem.partition('_')[0]}_teacher_{kind}"
            assert arguments[kind]["experiment"] == teacher
            assert arguments[kind]["net"] == paper.config(teacher)["model"]["init_args"]["net"]
        net = model["net"]["class_path"].rpartition(".")[2]
        suite = f"configs/shared/{suites.get(net, 'evaluation')}.yaml"
        assert config["evaluation"] == paper.read(suite), stem


@pytest.mark.parametrize(
    ("data", "images", "batch", "updates", "parts"),
    [
        ("digits", 800, 100, 330, {"awnet", "mixbn", "dynamic", "detector"}),
        ("fashion_small", 58_800, 128, 1380, {"awnet", "mixbn"}),
    ],
)
def test_small_students_differ_in_the_network_alone(
    paper, data, images, batch, updates, parts
) -> None:
    stems = [stem for stem in paper.paths if stem.startswith(data) and "mtard" in stem]
    students = {stem: paper.config(stem) for stem in stems}
    assert set(students) == {f"{data}_{name}_mtard" for name in parts | {"static"}}
    nets = {s: c["model"]["init_args"].pop("net") for s, c in students.items()}
    static = students.pop(f"{data}_static_mtard")
    assert static.pop("evaluation") == paper.read(f"configs/shared/evaluation_{data}.yaml")
    suite = paper.read(f"configs/shared/evaluation_{data}_dynamic.yaml")
    for config in students.values():
        assert config.pop("evaluation") == suite
        assert config == static
    for kind, teacher in static["model"]["init_args"]["objective"]["init_args"].items():
        if kind in ("clean", "robust"):
            trained = paper.config(f"{data}_teacher_{kind}")["model"]["init_args"]["net"]
            assert teacher == {"net": trained, "experiment": f"{data}_teacher_{kind}"}
    mixed = {s: (n["init_args"].get("dynamic", True), n["init_args"].get("mixbn"))
             for s, n in nets.items() if "static" not in s}  # fmt: skip
    expected = {
        "awnet": (True, None),
        "mixbn": (False, None),
        "dynamic": (True, False),
        "detector": (True, None),
    }
    assert mixed == {f"{data}_{name}_mtard": expected[name] for name in parts}
    made = static["trainer"]["max_epochs"] * images / batch
    assert made == pytest.approx(updates, rel=0.02)


STATIC = partial(ResNet, (1,), (4,), (1,))


@pytest.fixture
def suite_of(paper, tmp_path):
    """``suite_of(file)``: the entries of a shared suite."""

    def entries(file: str) -> dict[str, Any]:
        section = paper.read(f"configs/shared/{file}.yaml")
        path = tmp_path / f"{file}.yaml"
        evaluation = {"suite": section["suite"]}
        path.write_text(yaml.safe_dump({"evaluation": evaluation}, sort_keys=False))
        return load_suite(path, section["threat"]["eps"]).entries

    return entries


@pytest.mark.parametrize(
    ("file", "net"),
    [
        ("evaluation", STATIC),
        ("evaluation_dynamic", lambda: AWNet(STATIC())),
        ("evaluation_oat", lambda: OATNet(STATIC())),
        ("evaluation_digits", STATIC),
        ("evaluation_digits_dynamic", lambda: AWNet(STATIC())),
        ("evaluation_fashion_small", STATIC),
        ("evaluation_fashion_small_dynamic", lambda: AWNet(STATIC())),
    ],
)
def test_every_network_meets_as_many_attacks(suite_of, file, net) -> None:
    """Sixteen ascents behind the named PGD, at most."""
    model, suite = AWNetClassifier(net(), Natural(), torch.optim.SGD), suite_of(file)
    check_suite(suite, model)
    entries = [suite[n] for n in ("pgd20", "pgd_trades", "restarts", "adaptive") if n in suite]
    assert sum(e.attack.restarts * len(resolve_losses(e.losses, model)) for e in entries) == 16


@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("evaluation_adaptive", set()),
        ("evaluation_blackbox", {"transfer_pgd", "transfer_cw", "square/square"}),
    ],
)
def test_the_longer_suites_begin_with_the_usual_one(suite_of, monkeypatch, file, more) -> None:
    monkeypatch.setattr(Transfer, "network", torch.nn.Linear(1, 1))
    model = AWNetClassifier(AWNet(STATIC()), Natural(), torch.optim.SGD)
    suite = suite_of(file)
    check_suite(suite, model)
    steps = [step.key for step in steps_of(suite, model, 10, 0)]
    assert steps[:4] == ["fgsm/ce_f", "pgd_sat/ce_f", "pgd_trades/ce_f", "cw30/cw_f"]
    adaptive = {"each/joint_clean_0.1", "each/ce_branchadv", "each/misroute"}
    assert (more or adaptive) <= set(steps)


def test_the_attacks_are_those_of_the_overlay_for_any_model(paper, entries_of) -> None:
    shared = paper.read("configs/shared/evaluation.yaml")["suite"]
    overlay = paper.read("../common/configs/paper-awnet.yaml")["evaluation"]["suite"]
    own = {name: entry for name, entry in shared.items() if name in overlay}
    assert entries_of(overlay, "8/255") == entries_of(own, "8/255")


def test_switches_on_the_command_line(paper) -> None:
    groups = '[{"parameters": ["net.router.signal_heads.*"], "lr_mult": 10}]'
    lr10 = paper.config("cifar10_resnet18_awnet_mtard_signallr10")["model"]["init_args"]
    assert lr10["groups"] == yaml.safe_load(groups)
    options = {"groups": groups, "net.mixing": "hard", "net.router.init": "normal"}
    options |= {"objective.lambda_type": "0", "objective.robust.path": "elsewhere.ckpt"}
    more = [part for key, value in options.items() for part in (f"--model.{key}", value)]
    config = str(paper.paths["digits_awnet_mtard"])
    model = RobustCLI("paper_awnet", ["--config", config, *more], run=False).model
    assert model.net.mixing == "hard"
    assert model.net.router.signal_heads[0].weight.std() > 0.5
    assert model.objective.lambda_type == 0.0
    assert model.objective.teachers["robust"].path == "elsewhere.ckpt"
    rest, heads = model.configure_optimizers()["optimizer"].param_groups
    assert heads["lr"] == pytest.approx(10 * rest["lr"])
    assert {id(p) for p in heads["params"]} == {
        id(p) for p in model.net.router.signal_heads.parameters()
    }
    trained = {id(p) for group in (rest, heads) for p in group["params"]}
    assert trained == {id(p) for p in model.net.parameters()}, "no teacher among them"
