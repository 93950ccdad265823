"""The comparison of all methods: its grid, its budget, and that its rows differ in nothing else."""

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.robustness.cost import RelativeCost
from common.attacks.randomness import ExampleRandom
from common.errors import ConfigurationError
from common.evaluation.measures import cost
from common.networks.resnet import ResNet
from common.parsing import load_named

METHODS = ("plain", "cifs", "smoothing", "unsharp", "input", "maps", "rule", "mixbn", "router")
OBJECTIVES = {
    "at": {"class_path": "common.objectives.AT"},
    "trades": {"class_path": "common.objectives.TRADES", "init_args": {"beta": 6.0}},
    "mart": {"class_path": "common.objectives.MART", "init_args": {"beta": 5.0}},
    "atawp": {"class_path": "common.objectives.AT"},
}
NARROWER = ("input", "maps")
NETWORKS = [*METHODS, *(f"{name}_equal" for name in NARROWER)]
SHAPES = {"digits": (1, 8, 8), "fashion_small": (1, 28, 28)}
NEAR = 0.05
"""How far from the budget a network of the tables at equal cost may be."""


@pytest.fixture(params=SHAPES)
def dataset(request) -> str:
    return request.param


@pytest.fixture
def comparison(paper_of) -> Any:
    return paper_of("benchmarks/robustness")


def test_the_grid_is_complete(comparison) -> None:
    expected = {
        f"{dataset}_resnet_{network}_{objective}"
        for dataset in SHAPES
        for network, objective in itertools.product(NETWORKS, OBJECTIVES)
    }
    assert set(comparison.paths) == expected


def test_rows_differ_in_network_objective_and_weight_perturbation_alone(comparison, dataset):
    whole = comparison.config(f"{dataset}_resnet_plain_at")
    for network, objective in itertools.product(NETWORKS, OBJECTIVES):
        config = comparison.config(f"{dataset}_resnet_{network}_{objective}")
        awp = {"weight_perturbation": {"gamma": 0.005}} if objective == "atawp" else {}
        model = whole["model"]["init_args"] | {
            "net": comparison.read(f"configs/shared/net_{dataset}_{network}.yaml"),
            "objective": OBJECTIVES[objective],
        }
        assert config == whole | {"model": whole["model"] | {"init_args": model}} | awp, network


def made(value: Any, filled: dict[str, Any]) -> Any:
    """What settings describe; selections and routers are made by the network around them."""
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: made(part, filled) for key, part in value.items()}
    target = load_named(value["class_path"])
    given = made(value.get("init_args", {}), filled)
    if target.__name__ in ("CIFS", "Router"):
        return partial(target, **given)
    known = inspect.signature(target).parameters
    return target(**{key: part for key, part in filled.items() if key in known}, **given)


def network(comparison, dataset: str, name: str) -> nn.Module:
    settings = comparison.read(f"configs/shared/net_{dataset}_{name}.yaml")
    with torch.device("meta"):
        return made(settings, {"image_shape": SHAPES[dataset], "in_channels": 1}).eval()


def test_the_budget_is_that_of_the_backbone_and_equal_rows_are_near_it(comparison, dataset) -> None:
    measure = comparison.config(f"{dataset}_resnet_plain_at")["evaluation"]["measures"]["cost"]
    image = torch.empty(SHAPES[dataset], device="meta")
    costs = {name: cost(network(comparison, dataset, name), image)["macs"] for name in NETWORKS}
    budget = costs["plain"]
    assert measure["init_args"] == {"budget": budget}
    near = {name for name, macs in costs.items() if abs(macs / budget - 1) <= NEAR}
    assert set(costs) - near == set(NARROWER)
    tables = (dataset.removesuffix("_small"), f"{dataset.removesuffix('_small')}_equal")
    for stem, row in comparison.reference.rows.items():
        if stem.startswith(dataset):
            name = stem.removeprefix(f"{dataset}_resnet_").rpartition("_")[0]
            fits = (not name.endswith("_equal"), name in near)
            assert row.groups == list(itertools.compress(tables, fits)), stem


def test_all_that_may_break_an_image_runs_on_the_same_images(comparison, dataset) -> None:
    """Otherwise the worst case of a row that only the audit breaks is about other images."""
    evaluation = comparison.config(f"{dataset}_resnet_plain_at")["evaluation"]
    entries = [*evaluation["suite"].values(), evaluation["audit"]]
    assert len({entry["examples"] for entry in entries if "examples" in entry}) == 1


def test_every_method_is_in_the_same_backbone(comparison, dataset) -> None:
    (backbone,) = backbones(comparison.read(f"configs/shared/net_{dataset}_plain.yaml"))
    narrower = backbone | {"init_args": backbone["init_args"] | {"widths": [7, 14, 30]}}
    for name in METHODS:
        # The rule rounds costs up, on networks as small as those of the digits by a fifth.
        expected = narrower if (dataset, name) == ("digits", "rule") else backbone
        found = backbones(comparison.read(f"configs/shared/net_{dataset}_{name}.yaml"))
        assert found == [expected], name


def backbones(settings: dict[str, Any]) -> list[dict[str, Any]]:
    inner = settings["init_args"].get("net")
    return [settings] if inner is None else backbones(inner)


def test_cost_is_relative_to_the_budget() -> None:
    net = ResNet(depths=[1], widths=[4], strides=[1], num_classes=2, in_channels=1).eval()
    batch = {"x": torch.rand(3, 1, 8, 8), "y": torch.zeros(3, dtype=torch.long)}
    macs = int(cost(net, batch["x"][0])["macs"])
    found = RelativeCost(2 * macs)(net, batch, ExampleRandom(0, 0, torch.arange(3)))
    assert found["relative_macs"].tolist() == [0.5] * 3
    with pytest.raises(ConfigurationError, match="0"):
        RelativeCost(0)
