"""A row for every experiment and no number in any; names, sizes and recipes of the configs."""

import re
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from common.evaluation.suite import SuiteEntry, check_suite, steps_of
from common.objectives import Natural
from common.parsing import load_named
from paper_wm.method import weight_maps
from paper_wm.module import WeightMapClassifier
from paper_wm.networks import SmallCNN, with_weight_maps

SHAPES = {"digits": (1, 16, 16), "mnist": (1, 28, 28), "fashion": (1, 28, 28)}
METHODS = ("scale", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen", "highpass")


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_wm")


@pytest.fixture(scope="module")
def reference(paper):
    return paper.reference


@pytest.fixture(scope="module")
def build(paper):
    """``build(stem)``: the network of a config, on the meta device; equal ones are made once."""

    def make(node: dict[str, Any], shape: tuple[int, ...], classes: int) -> Any:
        arguments, cls = dict(node.get("init_args", {})), load_named(node["class_path"])
        if "net" in arguments:
            inner = make(arguments["net"], shape, classes)
            return cls(**{**arguments, "net": inner, "image_shape": shape})
        arguments.pop("mean", None), arguments.pop("std", None)
        own = {"image_shape": shape} if cls is SmallCNN else {"in_channels": shape[0]}
        return cls(num_classes=classes, **own, **arguments)

    made: dict[str, torch.nn.Module] = {}

    def build(stem: str) -> torch.nn.Module:
        shape = SHAPES.get(stem.partition("_")[0], (3, 32, 32))
        what = paper.config(stem)["model"]["init_args"]["net"], shape
        what = (*what, 100 if stem.startswith("cifar100") else 10)
        key = re.sub(r"'(mean|std)': \[[^]]*\],? ?", "", repr(what))
        if key not in made:
            with torch.device("meta"):
                made[key] = make(*what)
        return made[key]

    return build


# --------------------------------------------------------------------------------------- reference


def test_no_number_of_the_paper_was_found(reference) -> None:
    for stem, row in reference.rows.items():
        assert (row.last, row.selected) == ({}, {}), stem
        assert row.source == "D", stem


@pytest.mark.parametrize("data", ["digits", "fashion", "grey", "colour", "colour_at"])
def test_columns_are_measured_by_the_suites(paper, reference, data: str) -> None:
    """A column that no row can ever fill is a mistake in its key."""
    section = paper.read(f"configs/shared/evaluation_{data}.yaml")
    groups = {
        group
        for stem, row in reference.rows.items()
        if paper.config(stem)["evaluation"] == section
        for group in row.groups
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--suite", type=dict[str, SuiteEntry])
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


def test_the_experiments_are_complete(reference) -> None:
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
    controls = {f"mnist_cnn3_{m}" for m in ("base", "scale", "smoothing_frozen", "wide")}
    assert lams | controls | {"mnist_cnn3_unsharp"} <= members["E5"]
    controls = {f"digits_cnn3_{m}" for m in (*METHODS, "base", "wide")}
    assert controls <= members["digits"]
    assert len(members["digits"]) == 12


# ----------------------------------------------------------------------------------------- configs


def test_a_config_says_what_it_is(paper, build) -> None:
    for stem, path in paper.paths.items():
        text, net = path.read_text(), build(stem)
        assert text.startswith("# WM (arXiv 1905.00568), a reconstruction [D]. ")
        total = sum(p.numel() for p in net.parameters())
        in_maps = sum(m.map.numel() for m in weight_maps(net).values())
        size = f"# {total:,} parameters" + (f", {in_maps:,} of them in maps" if in_maps else "")
        is_frozen = any(not m.map.requires_grad for m in weight_maps(net).values())
        assert text.splitlines()[2] == size + (", frozen" if is_frozen else "")
        assert is_frozen == ("frozen" in stem)


def test_the_name_is_that_of_the_network(paper, build) -> None:
    for stem in paper.paths:
        maps = weight_maps(build(stem))
        method = re.sub(r"^.*?_(cnn3|resnet18|wrn\d+_\d+)_", "", stem).removesuffix("_at")
        if method.startswith(("base", "wide")):
            assert not maps
            continue
        first = next(iter(maps.values()))
        variant = re.match(r"scale|smoothing|unsharp|highpass|subtract_summed|subtract", method)
        assert variant is not None
        assert first.variant == variant[0]
        assert ("_post" in method) == next(iter(maps)).endswith("act")
        count = {"all": 3, "stages": 5 if "resnet18" in stem else 4}
        part = next((p for p in count if f"_{p}" in method), "")
        assert len(maps) == count.get(part, 1), stem
        if lam := re.search(r"_lam(-?[\d.]+)", method):
            assert first.lam == float(lam[1])
        ends = method.rpartition("_")[2]
        found = (first.shared, first.kernel_norm, first.kernel_size, first.init, first.order)
        assert found == (
            "shared" in method,
            "mean" if "_mean" in method else "sum",
            5 if "_k5" in method else 3,
            ends if ends in ("uniform", "normal") else "constant",
            "reduce_then_weight" if "reduce_first" in method else "weight_then_reduce",
        ), stem
        (group,) = paper.config(stem)["model"]["init_args"]["groups"]
        assert group["lr_mult"] == (10.0 if "lr10" in method else 1.0)
        assert group["weight_decay"] == 0.0


def test_the_wide_controls_have_the_parameters_of_the_maps(paper, build) -> None:
    stems = [stem for stem in paper.paths if "_wide" in stem]
    assert len(stems) == 5
    for stem in stems:
        pair = (stem, stem.replace("wide", "smoothing"))
        wide, mapped = (sum(p.numel() for p in build(s).parameters()) for s in pair)
        assert wide / mapped == pytest.approx(1.0, abs=0.02), stem


def test_nothing_but_the_network_differs_within_a_comparison(paper) -> None:
    groups: dict[str, list[Any]] = {}
    for stem in paper.paths:
        config = paper.config(stem)
        config["model"]["init_args"].pop("net")
        config["model"]["init_args"]["groups"][0].pop("lr_mult")
        found = re.match(r"(.*?_(?:cnn3|resnet18|wrn\d+_\d+))_.*?(_at)?$", stem)
        assert found is not None
        groups.setdefault(found[1] + (found[2] or ""), []).append(config)
    assert len(groups) == 4 + 7 + 2
    for base, configs in groups.items():
        assert all(config == configs[0] for config in configs), base


def test_the_suite_of_the_rows_is_that_of_the_overlay(paper, entries_of) -> None:
    colour = paper.read("configs/shared/evaluation_colour.yaml")["suite"]
    overlay = paper.read("../common/configs/paper-wm.yaml")["evaluation"]["suite"]
    own = {name: entry for name, entry in colour.items() if name in overlay}
    swept = {name for name, entry in overlay.items() if "sweep" in entry}
    at8, at2 = entries_of(overlay, "8/255"), entries_of(overlay, "2/255")
    for name, found in entries_of(own, "2/255").items():  # the radius is ours, the curve is theirs
        assert found == (at8 if name in swept else at2)[name], name
