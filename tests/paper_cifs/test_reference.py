"""The paper's numbers: typed a second time where it matters, and a row for every experiment."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.parsing import load_named
from common.results.tables import Reference, read_reference, render_table

PAPER = Path(__file__).parents[2] / "paper_cifs"
CONFIGS = {path.stem: path for path in (PAPER / "configs").glob("*.yaml")}
CIFAR = "cifar10_resnet18"

# (stem, checkpoint, metric) -> what the published tables say
PUBLISHED = {
    (f"{CIFAR}_plain", "last", "clean_acc"): 84.56,
    (f"{CIFAR}_plain", "last", "pgd20"): 46.62,
    (f"{CIFAR}_plain", "last", "pgd100"): 44.72,
    (f"{CIFAR}_cas", "last", "clean_acc"): 86.73,
    (f"{CIFAR}_cas", "last", "pgd20/ce_joint0.1"): 61.34,
    (f"{CIFAR}_cas", "last", "pgd20"): 47.06,
    (f"{CIFAR}_cas", "last", "cw30/cw_joint10"): 49.35,
    (f"{CIFAR}_cas", "last", "pgd100/ce_joint1"): 53.68,
    (f"{CIFAR}_cifs", "last", "clean_acc"): 83.86,
    (f"{CIFAR}_cifs", "last", "fgsm"): 59.35,
    (f"{CIFAR}_cifs", "last", "pgd20/ce_joint1000"): 51.45,
    (f"{CIFAR}_cifs", "last", "cw30"): 50.70,
    (f"{CIFAR}_cifs", "last", "pgd100"): 48.70,
    (f"{CIFAR}_cifs", "last", "pgd100_random/ce_joint10"): 48.71,
    (f"{CIFAR}_cifs", "last", "apgd_square/square"): [46.20, 46.10],
    (f"{CIFAR}_cifs", "selected", "apgd_square/apgd-ce"): [49.65, 49.40],
    (f"{CIFAR}_plain", "selected", "apgd_square/square"): [48.75, 48.85],
    (f"{CIFAR}_cas", "selected", "apgd_square_clean"): 85.80,
    (f"{CIFAR}_cifs_scale1", "selected", "pgd20/ce_joint2"): 51.58,
    (f"{CIFAR}_cifs_beta0.1", "last", "pgd100/ce_joint1"): 46.28,
    (f"{CIFAR}_cifs_beta1", "last", "pgd20/ce_p1"): 53.57,
    (f"{CIFAR}_cifs_beta10", "last", "fgsm/ce_f"): 60.40,
    (f"{CIFAR}_cifs_beta100", "last", "pgd100/ce_p2"): 50.92,
    (f"{CIFAR}_cifs_beta100", "last", "fgsm"): 52.82,
    (f"{CIFAR}_trades", "last", "pgd100"): 48.83,
    (f"{CIFAR}_trades_cifs", "last", "pgd20/ce_joint1"): 46.15,
    (f"{CIFAR}_plain_natural_full", "last", "clean_acc"): 94.81,
    (f"{CIFAR}_cifs_natural", "selected", "clean_acc"): 87.88,
    ("cifar10_wrn28_10_cifs", "last", "apgd_square/apgd-ce"): 50.90,
    ("cifar10_wrn28_10_plain", "last", "apgd_square/square"): None,
    ("svhn_resnet18_cas", "last", "apgd_square/square"): [39.30, 39.60],
    ("svhn_resnet18_cifs", "selected", "apgd_square_clean"): 93.35,
    ("fashion_mnist_resnet10_cifs", "last", "pgd20"): None,
    (f"{CIFAR}_cifs", "last", "pgd20/ce_f"): None,
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


def test_every_experiment_has_a_row_and_every_row_an_experiment(reference: Reference) -> None:
    assert set(CONFIGS) == set(reference.rows)


@pytest.mark.parametrize(("stem", "checkpoint", "metric"), PUBLISHED)
def test_published_numbers(reference: Reference, stem: str, checkpoint: str, metric: str) -> None:
    row = reference.rows[stem]
    numbers = row.last if checkpoint == "last" else row.selected
    assert metric in numbers, "not found is written as null, not left out"
    assert numbers[metric] == PUBLISHED[stem, checkpoint, metric]


def test_nothing_is_written_twice() -> None:
    assert load(PAPER / "reference.yaml")["arxiv"] == "2102.05311"
    for path in (PAPER / "configs").rglob("*.yaml"):
        load(path)


def test_every_source_is_in_the_legend() -> None:
    data = load(PAPER / "reference.yaml")
    assert {row["source"] for row in data["rows"].values()} <= {*data["tags"], None}
    for stem, row in data["rows"].items():
        printed = [*row.get("last", {}).values(), *row.get("selected", {}).values()]
        if any(number is not None for number in printed):
            assert row["source"] in ("R", "R0"), f"{stem} has numbers without a public source"


def test_numbers_are_percentages(reference: Reference) -> None:
    for row in reference.rows.values():
        for number in (*row.last.values(), *row.selected.values()):
            values = number if isinstance(number, list) else [number]
            assert all(value is None or 20.0 < value < 100.0 for value in values)


def test_the_lowest_number_is_the_lowest_of_its_losses(reference: Reference) -> None:
    checked = 0
    for stem, row in reference.rows.items():
        for attack in ("fgsm", "pgd20", "cw30", "pgd100"):
            losses = [v for k, v in row.last.items() if k.startswith(f"{attack}/") and v]
            if losses:
                assert row.last.get(attack, min(losses)) == min(losses), (stem, attack)
                checked += 1
    assert checked > 20


def test_digits_were_never_published(reference: Reference) -> None:
    digits = [row for stem, row in reference.rows.items() if stem.startswith("digits_")]
    assert len(digits) == 8
    assert not any(row.last or row.selected for row in digits)


def test_the_tables_render(reference: Reference) -> None:
    markdown = render_table("paper_cifs").markdown
    for group in reference.groups:
        assert f"### {group.title}" in markdown
    assert "| 48.20 / 48.10 | 46.20 / 46.10 |" in markdown


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("stem", sorted(CONFIGS))
def test_a_config_says_what_it_is_and_points_to_what_exists(stem: str) -> None:
    path = CONFIGS[stem]
    text, config = path.read_text(), load(path)
    assert text.startswith("# CIFS"), "which row, expected numbers, cost"
    for section in ("data", "evaluation"):
        assert (path.parent / config[section]).resolve().is_file()
    if "warm_start" in config:
        start = config["warm_start"]["experiment"]
        assert load(CONFIGS[start])["adversary"] == {"attack": None}, "a warm start is clean"
        assert (
            load(CONFIGS[start])["model"]["init_args"]["net"]["class_path"]
            == (config["model"]["init_args"]["net"]["class_path"])
        )
    is_natural = config["adversary"]["attack"] is None
    objective = config["model"]["init_args"]["objective"]["class_path"]
    assert load_named(objective).needs_x_adv != is_natural
    assert ("natural" in stem) == is_natural
    assert "num_classes" not in text
    assert "in_channels" not in text


@pytest.mark.parametrize("stem", sorted(stem for stem in CONFIGS if "natural" not in stem))
def test_recipes_of_adversarial_training(stem: str) -> None:
    config = load(CONFIGS[stem])
    model = config["model"]["init_args"]
    attack = config["adversary"]["attack"]["init_args"]
    schedule = model["scheduler"]["init_args"]
    assert config["adversary"]["mode"] == "eval"
    assert schedule["gamma"] == 0.1
    if stem.startswith("digits"):
        assert (attack["eps"], attack["step_size"], attack["steps"]) == (0.2, "1/15", 5)
        assert schedule["milestones"] == [19, 25]
        assert config["trainer"]["max_epochs"] == 30
        return
    assert (attack["eps"], attack["step_size"], attack["steps"]) == ("8/255", "2/255", 10)
    assert attack["start"] == ("gaussian" if "trades" in stem else "uniform")
    assert schedule["milestones"] == [75, 90]
    assert config["trainer"]["max_epochs"] == (110 if "wrn" in stem else 120)
    lr = 0.01 if stem.startswith("svhn") else 0.1
    assert model["optimizer"]["init_args"] == {"lr": lr, "momentum": 0.9, "weight_decay": 2e-4}


def _masks(stem: str) -> list[tuple[str, dict[str, Any]]]:
    """Class and settings of each mask, in forward order."""
    net = load(CONFIGS[f"{CIFAR}_cifs_{stem}"])["model"]["init_args"]["net"]
    masks = [entry["init_args"]["mask"] for entry in net["init_args"]["selections"].values()]
    return [(mask["class_path"].rpartition(".")[2], mask.get("init_args", {})) for mask in masks]


@pytest.mark.parametrize(
    ("stem", "name", "settings"),
    [
        ("scale1", "SoftmaxMask", {"scale": 1.0}),
        ("temperature0.5", "SoftmaxMask", {"scale": 2.0, "temperature": 0.5}),
        ("temperature24", "SoftmaxMask", {"scale": 2.0, "temperature": 24.0}),
        ("sigmoid0.1", "SigmoidMask", {"alpha": 0.1}),
        ("sigmoid1_shift5", "SigmoidMask", {"alpha": 1.0, "shift": 5.0}),
        ("sigmoid2_shift3", "SigmoidMask", {"alpha": 2.0, "shift": 3.0}),
        ("softplus5", "SoftplusMask", {"alpha": 5.0}),
        ("softplus10_power0.5", "SoftplusMask", {"alpha": 10.0, "power": 0.5}),
        ("softplus20_power0.25", "SoftplusMask", {"alpha": 20.0, "power": 0.25}),
        ("relu", "ReluMask", {}),
        ("magnitude", "MagnitudeMask", {"scale": 2.0}),
        ("summed", "SummedSoftmaxMask", {"scale": 1.0}),
    ],
)
def test_masks_of_the_ablations(stem: str, name: str, settings: dict[str, float]) -> None:
    assert _masks(stem) == [(name, settings)] * 2


def test_the_families_are_complete() -> None:
    def family(word: str) -> set[str]:
        stems = {stem for stem in CONFIGS if "natural" not in stem}
        return {stem.removeprefix(f"{CIFAR}_cifs_{word}") for stem in stems if f"_{word}" in stem}

    assert family("beta") == {"0.1", "1", "10", "100"}
    assert family("temperature") == {"0.5", "4", "8", "10", "12", "16", "24"}
    assert family("sigmoid") == {"0.1", "1", "5", "10", "15", "1_shift5", "2_shift3"}
    assert family("softplus") == {"5", "10_power0.5", "20_power0.25"}
    assert family("top") == {"1", "3", "2_top1", "3_top1"}
    assert family("stage3") == family("block1") == family("block2") == {"_linear", "_nonlinear"}
    assert family("hidden") == {"64", "256"}
