"""A row for every experiment and no number in any; names, sizes and recipes of the configs."""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from common.cli.main import RobustCLI
from common.evaluation.suite import SuiteEntry, check_suite, steps_of
from common.objectives import Natural
from common.parsing import load_named
from common.results.tables import Reference, read_reference, render_table
from paper_wm.method import weight_maps
from paper_wm.module import WeightMapClassifier
from paper_wm.networks import SmallCNN, with_weight_maps

PAPER = Path(__file__).parents[2] / "paper_wm"
CONFIGS = {path.stem: path for path in (PAPER / "configs").glob("*.yaml")}
SHARED = PAPER / "configs/shared"
SHAPES = {"digits": (1, 16, 16), "mnist": (1, 28, 28), "fashion": (1, 28, 28)}
DIGITS = sorted(stem for stem in CONFIGS if stem.startswith("digits"))
METHODS = ("scale", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen", "highpass")


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that occurs twice is an error and not the last one's gain."""


def _mapping(loader: UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"{sorted(map(str, keys))} {node.start_mark}"
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)


@cache
def _loaded(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=UniqueKeys)


def load(path: Path) -> Any:
    return copy.deepcopy(_loaded(path))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return read_reference(PAPER / "reference.yaml")


@cache
def build(stem: str) -> torch.nn.Module:
    """The network of a config, on the meta device."""
    shape = SHAPES.get(stem.partition("_")[0], (3, 32, 32))
    classes = 100 if stem.startswith("cifar100") else 10

    def make(node: dict[str, Any]) -> Any:
        arguments = dict(node.get("init_args", {}))
        cls = load_named(node["class_path"])
        if "net" in arguments:
            return cls(**{**arguments, "net": make(arguments["net"]), "image_shape": shape})
        arguments.pop("mean", None), arguments.pop("std", None)
        own = {"image_shape": shape} if cls is SmallCNN else {"in_channels": shape[0]}
        return cls(num_classes=classes, **own, **arguments)

    with torch.device("meta"):
        return make(load(CONFIGS[stem])["model"]["init_args"]["net"])


# --------------------------------------------------------------------------------------- reference


def test_every_experiment_has_a_row_and_every_row_an_experiment(reference: Reference) -> None:
    assert set(CONFIGS) == set(reference.rows)
    filled = {group for row in reference.rows.values() for group in row.groups}
    assert filled == {group.id for group in reference.groups}


def test_no_number_of_the_paper_was_found(reference: Reference) -> None:
    for stem, row in reference.rows.items():
        assert (row.last, row.selected) == ({}, {}), stem
        assert row.source == "D", stem


def test_nothing_is_written_twice_and_tags_are_explained(reference: Reference) -> None:
    whole = load(PAPER / "reference.yaml")
    assert whole["arxiv"] == "1905.00568"
    assert set(whole["tags"]) == {"P1", "P2", "T", "S", "D", "M", "obs"}
    assert reference.checkpoints == ("last",)
    for path in (PAPER / "configs").rglob("*.yaml"):
        load(path)


def test_the_tables_render(reference: Reference) -> None:
    markdown = render_table("paper_wm").markdown
    for group in reference.groups:
        assert f"### {group.title}" in markdown


@pytest.mark.parametrize("data", ["digits", "grey", "colour", "colour_at"])
def test_columns_are_measured_by_the_suites(reference: Reference, data: str) -> None:
    """A column that no row can ever fill is a mistake in its key."""
    evaluation = f"shared/evaluation_{data}.yaml"
    groups = {
        group
        for stem, row in reference.rows.items()
        if load(CONFIGS[stem])["evaluation"] == evaluation
        for group in row.groups
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--suite", type=dict[str, SuiteEntry])
    section = load(PAPER / "configs" / evaluation)
    suite = parser.instantiate(parser.parse_object({"suite": section["suite"]})).suite
    net = with_weight_maps(SmallCNN((2, 2, 2)), "smoothing", image_shape=(1, 28, 28))
    model = WeightMapClassifier(net, Natural(), torch.optim.SGD)
    check_suite(suite, model)
    keys = {"clean_acc", "worst", "parameters"}
    for step in steps_of(suite, model, 10, 0):
        at = [f"{axis}={value:.6g}" for axis, value in step.at.items() if axis != "draw"]
        keys |= {step.key, "/".join([step.entry, *at])}
    assert groups
    for group in reference.groups:
        if group.id in groups:
            assert {metric.key for metric in group.metrics} <= keys, group.id
            assert set(group.compare or ()) <= {metric.key for metric in group.metrics}


def test_the_experiments_are_complete(reference: Reference) -> None:
    members = {
        g.id: {s for s, r in reference.rows.items() if g.id in r.groups} for g in reference.groups
    }
    grid = {
        f"mnist_cnn3_{m}{a}{p}" for m in METHODS for a in ("", "_all") for p in ("", "_post")
    }  # fmt: skip
    assert members["E1"] == grid | {"mnist_cnn3_base"}
    for data in ("fashion_mnist", "cifar10"):
        assert members[f"E2-{data}"] == {f"{data}_cnn3_{m}" for m in (*METHODS, "base", "wide")}
    residual = {"base", "scale", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen"}
    residual |= {"smoothing_stages"}
    pairs = [(d, n) for d in ("cifar10", "cifar100", "svhn") for n in ("resnet18", "wrn16_4")]
    for data, net in [*pairs, ("cifar10", "wrn28_10")]:
        assert members[f"E3-{data}-{net}"] == {f"{data}_{net}_{m}" for m in residual}
    for net in ("resnet18", "wrn16_4"):
        expected = {f"cifar10_{net}_{m}_at" for m in residual - {"scale"}}
        assert members[f"E7-{net}"] == expected
    lams = {f"mnist_cnn3_unsharp_lam{x}" for x in ("-1", "-0.5", "0", "0.5", "2")}
    assert lams | {"mnist_cnn3_unsharp", "mnist_cnn3_wide"} <= members["E5"]
    assert len(members["digits"]) == len(DIGITS) == 12


def test_every_comparison_has_its_controls(reference: Reference) -> None:
    for group in reference.groups:
        stems = {s for s, r in reference.rows.items() if group.id in r.groups}
        tail = "_at" if group.id.startswith("E7") else ""
        names = {s.removesuffix(tail).split("_", 1)[1] if tail else s for s in stems}
        for control in ("base", "smoothing_frozen"):
            assert any(name.endswith(control) for name in names), (group.id, control)
        if not tail:
            assert any(name.endswith("scale") for name in names), group.id


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("stem", sorted(CONFIGS))
def test_a_config_says_what_it_is(stem: str) -> None:
    text, config = CONFIGS[stem].read_text(), load(CONFIGS[stem])
    assert text.startswith("# WM (arXiv 1905.00568), a reconstruction [D]. ")
    assert not re.search("num_classes|in_channels|image_shape", text)
    net = build(stem)
    total = sum(p.numel() for p in net.parameters())
    in_maps = sum(m.map.numel() for m in weight_maps(net).values())
    size = f"# {total:,} parameters" + (f", {in_maps:,} of them in maps" if in_maps else "")
    is_frozen = any(not m.map.requires_grad for m in weight_maps(net).values())
    assert text.splitlines()[2] == size + (", frozen" if is_frozen else "")
    assert is_frozen == ("frozen" in stem)
    for section in ("data", "evaluation", "checkpoint"):
        assert (CONFIGS[stem].parent / config[section]).resolve().is_file()


@pytest.mark.parametrize("stem", sorted(CONFIGS))
def test_the_name_is_that_of_the_network(stem: str) -> None:
    maps = weight_maps(build(stem))
    method = re.sub(r"^.*?_(cnn3|resnet18|wrn\d+_\d+)_", "", stem).removesuffix("_at")
    if method.startswith(("base", "wide")):
        assert not maps
        return
    first = next(iter(maps.values()))
    variant = re.match(r"scale|smoothing|unsharp|highpass|subtract_summed|subtract", method)
    assert variant is not None
    assert first.variant == variant[0]
    assert ("_post" in method) == next(iter(maps)).endswith("act")
    count = {"all": 3, "stages": 5 if "resnet18" in stem else 4}
    part = next((p for p in count if f"_{p}" in method), "")
    assert len(maps) == count.get(part, 1)
    if lam := re.search(r"_lam(-?[\d.]+)", method):
        assert first.lam == float(lam[1])
    assert first.shared == ("shared" in method)
    assert first.kernel_norm == ("mean" if "_mean" in method else "sum")
    assert first.kernel_size == (5 if "_k5" in method else 3)
    ends = method.rpartition("_")[2]
    assert first.init == (ends if ends in ("uniform", "normal") else "constant")
    assert (first.order == "reduce_then_weight") == ("reduce_first" in method)
    (group,) = load(CONFIGS[stem])["model"]["init_args"]["groups"]
    assert group["lr_mult"] == (10.0 if "lr10" in method else 1.0)
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("stem", "other"),
    [
        ("digits_cnn3_wide", "digits_cnn3_smoothing"),
        ("mnist_cnn3_wide", "mnist_cnn3_smoothing"),
        ("mnist_cnn3_wide_all", "mnist_cnn3_smoothing_all"),
        ("fashion_mnist_cnn3_wide", "fashion_mnist_cnn3_smoothing"),
        ("cifar10_cnn3_wide", "cifar10_cnn3_smoothing"),
    ],
)
def test_the_wide_control_has_the_parameters_of_the_maps(stem: str, other: str) -> None:
    sizes = [sum(p.numel() for p in build(s).parameters()) for s in (stem, other)]
    assert sizes[0] / sizes[1] == pytest.approx(1.0, abs=0.02)


def test_nothing_but_the_network_differs_within_a_comparison() -> None:
    groups: dict[str, list[Any]] = {}
    for stem in CONFIGS:
        config = load(CONFIGS[stem])
        config["model"]["init_args"].pop("net")
        config["model"]["init_args"]["groups"][0].pop("lr_mult")
        found = re.match(r"(.*?_(?:cnn3|resnet18|wrn\d+_\d+))_.*?(_at)?$", stem)
        assert found is not None
        groups.setdefault(found[1] + (found[2] or ""), []).append(config)
    assert len(groups) == 4 + 7 + 2
    for base, configs in groups.items():
        assert all(config == configs[0] for config in configs), base


def test_recipes() -> None:
    def of(stem: str) -> tuple[Any, Any, int]:
        config = load(CONFIGS[stem])
        model = config["model"]["init_args"]
        scheduler = model.get("scheduler", {}).get("init_args")
        return model["optimizer"]["init_args"], scheduler, config["trainer"]["max_epochs"]

    adam = {"lr": 1e-3}
    assert of("mnist_cnn3_base") == of("fashion_mnist_cnn3_base") == (adam, None, 20)
    assert of("cifar10_cnn3_base") == (adam, {"milestones": [30, 45], "gamma": 0.1}, 60)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    for stem in ("cifar10_resnet18_base", "svhn_wrn16_4_unsharp", "cifar10_wrn28_10_smoothing"):
        assert of(stem) == (sgd, {"T_max": 100}, 100)
    # 12 epochs of 21 steps in the trial runs; here an epoch has 13.
    assert of("digits_cnn3_base") == (adam, None, 20)
    digits = load(SHARED / "digits.yaml")
    assert (digits["batch_size"], digits["source"]["init_args"]) == (64, {"size": 16})
    attack = load(CONFIGS["cifar10_resnet18_smoothing_at"])["adversary"]["attack"]["init_args"]
    assert attack == {"eps": "8/255", "step_size": "2/255", "steps": 10, "start": "uniform"}
    assert load(SHARED / "last_epoch.yaml")["from_epoch"] > 100


def test_suites_have_every_noise_and_attack(entries_of) -> None:
    wanted = {"uniform", "gaussian", "saltpepper", "fgsm", "mim10", "pgd20", "pgd100", "deepfool"}
    wanted |= {"bypass", "aa"}
    for name in ("digits", "grey", "colour"):
        section = load(SHARED / f"evaluation_{name}.yaml")
        assert wanted <= set(section["suite"])
        assert section["audit"] is not None
        for noise in ("uniform", "gaussian", "saltpepper"):
            settings = section["suite"][noise]["attack"]["init_args"]
            assert (settings["draws"], settings["seed"]) == (3, 1), "the same for every network"
    grey, colour = (load(SHARED / f"evaluation_{n}.yaml")["suite"] for n in ("grey", "colour"))
    assert grey["uniform"]["attack"]["init_args"]["levels"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert grey["pgd20"]["sweep"] == {"eps": [0.05, 0.1, 0.2, 0.3]}
    assert colour["uniform"]["attack"]["init_args"]["levels"] == [0.02, 0.05, 0.1, 0.15, 0.2]
    assert colour["pgd20"]["sweep"] == {"eps": ["1/255", "2/255", "4/255", "8/255"]}
    overlay = load(PAPER.parent / "common/configs/paper-wm.yaml")["evaluation"]["suite"]
    own = {name: entry for name, entry in colour.items() if name in overlay}
    swept = {name for name, entry in overlay.items() if "sweep" in entry}
    at8, at2 = entries_of(overlay, "8/255"), entries_of(overlay, "2/255")
    for name, found in entries_of(own, "2/255").items():  # the radius is ours, the curve is theirs
        assert found == (at8 if name in swept else at2)[name], name


def test_the_command_line_fills_in_shape_and_classes() -> None:
    stem = "digits_cnn3_smoothing_all"
    cli = RobustCLI("paper_wm", ["--config", str(CONFIGS[stem])], run=False)
    check_suite(cli.config_init["evaluation"].suite, cli.model)
    shapes = [m.shape for m in weight_maps(cli.model).values()]
    assert shapes == [(8, 16, 16), (16, 8, 8), (16, 4, 4)]
    assert {"ce_f", "ce_bypass"} <= set(cli.model.adaptive_losses())
