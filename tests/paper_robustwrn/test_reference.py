"""The published numbers, typed a second time where it matters, and a row for every experiment."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.parsing import load_named
from common.results.tables import Reference, read_reference, render_table
from paper_robustwrn.method import EQUAL_BUDGET, NETWORKS, STAGE_GRID, Configuration, named

PAPER = Path(__file__).parents[2] / "paper_robustwrn"
CONFIGS = {path.stem: path for path in (PAPER / "configs").glob("*.yaml")}
SPECIAL = {"cifar10_wrn34_12": "WRN-34-12", "cifar10_wrn34r": "WRN-34-R"}
LONG = [stem for stem in CONFIGS if "500k" in stem]
WIDE = "paper_robustwrn.method.RobustWideResNet"

# (stem, metric) -> what was published of the selected checkpoint
PUBLISHED = {
    ("cifar10_wrn34r_trades_500k", "clean_acc"): 90.56,
    ("cifar10_wrn34r_trades_500k", "aa"): 61.56,
    ("cifar10_wrn34r_trades_500k_ema", "clean_acc"): 91.23,
    ("cifar10_wrn34r_trades_500k_ema", "aa"): 62.54,
    ("cifar10_wrn34_12_trades_500k", "aa"): None,
    ("cifar10_wrn34r_sat", "pgd20/ce_f"): None,
    ("cifar10_wrn34r_mart", "aa"): None,
    ("cifar10_wrn34_12_sat", "pgd20/ce_f"): 52.85,
    ("cifar10_wrn34_12_sat", "cw40/cw_f"): 51.36,
    ("cifar10_wrn34_12_mart", "pgd20/ce_f"): 57.40,
    ("cifar10_wrn34_12_mart", "cw40/cw_f"): 53.11,
    ("cifar10_wrn34_12_trades", "clean_acc"): 84.93,
    ("cifar10_wrn34_12_trades", "pgd20/ce_f"): 56.01,
    ("cifar10_wrn34_12_trades", "cw40/cw_f"): 53.53,
    ("cifar10_wrn34_12_trades", "aa"): 51.97,
    ("cifar10_wrn34r_trades", "clean_acc"): 85.80,
    ("cifar10_wrn34r_trades", "pgd20/ce_f"): 57.35,
    ("cifar10_wrn34r_trades", "cw40/cw_f"): 54.77,
    ("cifar10_wrn34r_trades", "aa"): 53.23,
    ("cifar10_wrn28_10_trades", "clean_acc"): 84.62,
    ("cifar10_wrn28_10_trades", "aa"): 51.66,
    ("cifar10_wrn70_16_trades", "pgd20/ce_f"): 56.78,
    ("cifar10_wrn70_16_trades", "cw40/cw_f"): 54.52,
    ("cifar100_wrn34_12_trades", "clean_acc"): 56.08,
    ("cifar100_wrn34_12_trades", "aa"): 25.47,
    ("cifar100_wrn34r_trades", "pgd20/ce_f"): 31.17,
    ("cifar100_wrn34r_trades", "cw40/cw_f"): 27.33,
    ("cifar10_d4-4-4-w11-13-6_trades", "pgd20/ce_f"): 56.89,
    ("cifar10_w13-16-7_trades", "cw40/cw_f"): 54.29,
    ("cifar10_d5-5-2_trades", "pgd20/ce_f"): 56.05,
    ("cifar10_d6-6-3-w12-12-12_trades", "cw40/cw_f"): 53.91,
    ("cifar10_grid_w10-10-4", "parameters"): 17.051,
    ("cifar10_grid_d5-5-1", "macs"): 4.771,
    ("cifar10_grid_w4-4-13", "parameters"): 58.915,
    ("cifar10_grid_d5-5-4", "pgd20/ce_f"): None,
    ("cifar10_vgg16_reduced_sat", "parameters"): 9.334,
}


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that occurs twice is an error and not the last one's gain."""


def _mapping(loader: UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"{sorted(map(str, keys))} {node.start_mark}"
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return read_reference(PAPER / "reference.yaml")


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=UniqueKeys)


def net_of(stem: str) -> Any:
    return load(CONFIGS[stem])["model"]["init_args"]["net"]


def configuration_of(stem: str) -> Configuration:
    settings = net_of(stem)["init_args"]
    return Configuration(tuple(settings["depths"]), tuple(settings["widths"]))


WIDE_ROWS = sorted(
    s for s in CONFIGS if not s.startswith("digits") and net_of(s)["class_path"] == WIDE
)


# --------------------------------------------------------------------------------------- reference


def test_every_experiment_has_a_row_and_every_row_an_experiment(reference: Reference) -> None:
    assert set(CONFIGS) == set(reference.rows)
    filled = {group for row in reference.rows.values() for group in row.groups}
    assert filled == {group.id for group in reference.groups}


@pytest.mark.parametrize(("stem", "metric"), PUBLISHED)
def test_published_numbers(reference: Reference, stem: str, metric: str) -> None:
    numbers = reference.rows[stem].selected
    assert metric in numbers, "not found is written as null, not left out"
    assert numbers[metric] == PUBLISHED[stem, metric]


def test_nothing_is_written_twice() -> None:
    assert load(PAPER / "reference.yaml")["arxiv"] == "2110.03825"
    for path in (PAPER / "configs").rglob("*.yaml"):
        load(path)


def test_every_source_is_in_the_legend(reference: Reference) -> None:
    tags = load(PAPER / "reference.yaml")["tags"]
    assert {row.source for row in reference.rows.values()} <= set(tags)
    for stem, row in reference.rows.items():
        assert not row.last, f"{stem}: nobody published the end of training"
        accuracies = {k: v for k, v in row.selected.items() if k not in ("parameters", "macs")}
        if any(value is not None for value in accuracies.values()):
            assert row.source in ("P", "F"), f"{stem} has numbers without a public source"
        elif any(value is not None for value in row.selected.values()):
            assert row.source in ("C", "F"), stem
        known = {key for key, value in accuracies.items() if value is not None}
        assert row.source != "P" or known <= {"clean_acc", "aa"}


def test_numbers_are_percentages_and_sizes_are_those_of_the_networks(reference: Reference) -> None:
    checked = 0
    for stem, row in reference.rows.items():
        for key, number in row.selected.items():
            if number is None:
                continue
            assert isinstance(number, float | int)
            if key not in ("parameters", "macs"):
                assert 20.0 < number < 100.0
            elif stem in WIDE_ROWS:
                network = configuration_of(stem)
                exact = network.parameters() / 1e6 if key == "parameters" else network.macs() / 1e9
                digits = 3 if row.source == "C" else 0.015 * exact
                tolerance = 0.0006 if digits == 3 else digits
                assert abs(number - exact) <= tolerance, (stem, key)
                checked += 1
    assert checked > 60


def test_a_ball_that_is_harder_to_hold_is_held_less(reference: Reference) -> None:
    order = ("clean_acc", "pgd20/ce_f", "cw40/cw_f", "aa")
    for stem, row in reference.rows.items():
        values = [row.selected[key] for key in order if row.selected.get(key) is not None]
        assert values == sorted(values, reverse=True), stem  # type: ignore[type-var]


def test_columns_of_sizes_have_their_units(reference: Reference) -> None:
    for group in reference.groups:
        for metric in group.metrics:
            if metric.key == "lipschitz":
                assert metric.unit == "plain"
            elif metric.key in ("parameters", "macs"):
                assert metric.unit != "percent"
            else:
                assert metric.unit == "percent"


def test_digits_were_never_published(reference: Reference) -> None:
    digits = [row for stem, row in reference.rows.items() if stem.startswith("digits_")]
    assert len(digits) == 7
    assert not any(row.last or row.selected for row in digits)


def test_the_tables_render(reference: Reference) -> None:
    markdown = render_table("paper_robustwrn").markdown
    for group in reference.groups:
        assert f"### {group.title}" in markdown
    assert "| 85.80 | 57.35 |" in markdown


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("stem", sorted(CONFIGS))
def test_a_config_says_what_it_is_and_points_to_what_exists(stem: str) -> None:
    path = CONFIGS[stem]
    text, config = path.read_text(), load(path)
    assert text.startswith("# Robust WRN"), "which row, expected numbers, cost"
    for section in ("data", "evaluation"):
        assert (path.parent / config[section]).resolve().is_file()
    is_natural = config["adversary"]["attack"] is None
    objective = config["model"]["init_args"]["objective"]["class_path"]
    assert load_named(objective).needs_x_adv != is_natural
    assert ("natural" in stem) == is_natural
    assert "num_classes" not in text
    assert "in_channels" not in text


@pytest.mark.parametrize("stem", WIDE_ROWS)
def test_the_name_is_that_of_the_network(stem: str) -> None:
    network = configuration_of(stem)
    if found := re.match(r"cifar\d+_(?:grid_)?([dw]\d[\d\-dw]*)(?:_trades)?$", stem):
        assert network == named(found[1])
        assert network.name == found[1]
    else:
        label = re.match(r"cifar\d+_wrn(\d+)(?:r|_(\d+))", stem)
        assert label is not None
        special = "WRN-34-R" if label[2] is None else f"WRN-{label[1]}-{label[2]}"
        width = 0 if label[2] is None else int(label[2])
        depth = (int(label[1]) - 4) // 6
        usual = Configuration((depth,) * 3, (width,) * 3) if width else None
        assert network == NETWORKS.get(special, usual)
    millions = re.search(
        r"^# ([\d.]+) M parameters, ([\d.]+) G MACs", CONFIGS[stem].read_text(), re.M
    )
    assert millions is not None
    classes = 100 if stem.startswith("cifar100") else 10
    assert float(millions[1]) == round(network.parameters(classes) / 1e6, 1)
    assert float(millions[2]) == round(network.macs(classes) / 1e9, 2)


@pytest.mark.parametrize("stem", sorted(s for s in CONFIGS if s.startswith("cifar")))
def test_the_official_recipe(stem: str) -> None:
    config = load(CONFIGS[stem])
    model, attack = config["model"]["init_args"], config["adversary"]["attack"]["init_args"]
    scale = 0.001 if "trades" in stem else "2/255"
    assert attack == {
        "eps": "8/255", "step_size": "2/255", "steps": 10, "start": "gaussian",
        "start_scale": scale, "project_start": False,
    }  # fmt: skip
    assert config["adversary"]["mode"] == "eval"
    objective = model["objective"]
    if "trades" in stem or "mart" in stem:
        assert objective["init_args"] == {"beta": 6.0}
    is_long = stem in LONG
    epochs = 400 if is_long else 100
    assert config["trainer"]["max_epochs"] == epochs
    assert config["checkpoint"] == {"from_epoch": epochs // 2}
    assert config["trainer"].get("gradient_clip_val") == (None if is_long else 5.0)
    decay = 5e-4 if is_long else 2e-4
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": decay}
    schedule = model["scheduler"]["init_args"]
    assert schedule == ({"epochs": 400} if is_long else {"milestones": [75, 90], "gamma": 0.1})
    data = load(CONFIGS[stem].parent / config["data"])
    assert data["batch_size"] == data["eval_batch_size"] == (256 if is_long else 128)
    assert data["validate_on"] == "test"
    assert data["drop_last"] is True
    assert ("extra" in data) == is_long
    assert data["source"]["class_path"].endswith("CIFAR100" if "cifar100" in stem else "CIFAR10")
    averaged = [entry["class_path"] for entry in config["trainer"].get("callbacks", [])]
    assert averaged == (
        ["common.callbacks.averaging.WarmUpAveraging"] if stem.endswith("_ema") else []
    )


@pytest.mark.parametrize("stem", sorted(s for s in CONFIGS if s.startswith("digits")))
def test_the_recipe_on_digits(stem: str) -> None:
    config = load(CONFIGS[stem])
    model = config["model"]["init_args"]
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    epochs = config["trainer"]["max_epochs"]
    milestones = model["scheduler"]["init_args"]["milestones"]
    assert milestones == [round(0.75 * epochs), round(0.9 * epochs)]
    assert config["checkpoint"]["from_epoch"] == epochs // 2
    assert config["trainer"]["gradient_clip_val"] == 5.0
    assert load(CONFIGS[stem].parent / config["data"])["batch_size"] == 64
    channels = model["net"]["init_args"]["channels"]
    name = re.match(r"digits_(?:d([\d-]+)|w([\d-]+))_(?:sat|natural)$", stem)
    assert name is not None
    if name[1]:
        assert "-".join(map(str, model["net"]["init_args"]["depths"])) == name[1]
        assert channels == [4, 12, 24, 48]
    else:
        assert channels[0] == 4
        assert "-".join(map(str, channels[1:])) == name[2]
    if "natural" not in stem:
        attack = config["adversary"]["attack"]["init_args"]
        assert (attack["eps"], attack["step_size"], attack["steps"]) == (0.2, "eps/4", 5)
        assert (attack["start"], attack["start_scale"]) == ("gaussian", 0.05)


def test_the_sweeps_are_complete(reference: Reference) -> None:
    grid = {stem.removeprefix("cifar10_grid_") for stem in CONFIGS if "_grid_" in stem}
    assert {network.name for network in STAGE_GRID} <= grid
    assert len(STAGE_GRID) == 25
    rows = {network.name for network in EQUAL_BUDGET} - {"w12-12-12", "w20-20-8"}
    assert rows == {"w10-20-8", "w4-10-12", "w4-4-13"}
    assert rows <= grid
    members = {g.id: {s for s, r in reference.rows.items() if g.id in r.groups}
               for g in reference.groups}  # fmt: skip
    assert len(members["X4-widths"] | members["X4-depths"]) == 25
    assert len(members["X5"]) == 5
    for partner in ("sat", "trades", "mart", "trades_500k"):
        assert {f"{network}_{partner}" for network in SPECIAL} <= members["T2"]
    assert len(members["T2"]) == 9
