"""What configurations leave to be inferred from the data."""

from typing import Any

import pytest
from jsonargparse import Namespace, dict_to_namespace

from common.cli.parser import fill_from_data
from common.errors import ConfigurationError

NETS = """
from torch import nn

class Shaped(nn.Module):
    def __init__(self, num_classes: int = 3, image_shape=(1, 28, 28)):
        super().__init__()

def wrapped(net: nn.Module, image_shape: list[int] | None = None) -> nn.Module:
    return net
"""


@pytest.fixture(autouse=True)
def _nets(tmp_path, monkeypatch) -> None:
    (tmp_path / "toy_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))


def config(inner: dict[str, Any], outer: dict[str, Any]) -> Namespace:
    net = {"class_path": "toy_nets.Shaped", "init_args": inner}
    around = {"class_path": "toy_nets.wrapped", "init_args": {"net": net, **outer}}
    source = {"class_path": "common.data.sources.Digits", "init_args": {"size": 16}}
    model = {"class_path": "common.classifier.RobustClassifier", "init_args": {"net": around}}
    return dict_to_namespace({"model": model, "data": {"source": source}})


@pytest.mark.parametrize("inner", [{"num_classes": 3, "image_shape": [1, 28, 28]},
                                   {"num_classes": 10, "image_shape": (1, 16, 16)}])  # fmt: skip
def test_shape_and_classes_are_those_of_the_data(inner) -> None:
    """Through a function that takes a network too; defaults give way."""
    made = config(inner, {"image_shape": None})
    fill_from_data(made)
    around = made.model.init_args.net.init_args
    assert around.image_shape == [1, 16, 16]
    assert around.net.init_args.image_shape == [1, 16, 16]
    assert around.net.init_args.num_classes == 10


def test_another_shape_is_refused() -> None:
    made = config({"num_classes": 3, "image_shape": None}, {"image_shape": [1, 8, 8]})
    with pytest.raises(
        ConfigurationError,
        match=r"model.net.image_shape is \[1, 8, 8\] and Digits has \[1, 16, 16\]; drop",
    ):
        fill_from_data(made)


def test_what_takes_no_shape_gets_none() -> None:
    made = config({"num_classes": 3}, {})
    fill_from_data(made)
    assert "image_shape" not in made.model.init_args.net.init_args
    assert made.model.init_args.net.init_args.net.init_args.num_classes == 3, (
        "not a network without channels"
    )


NET = {"class_path": "common.networks.resnet.ResNet18", "init_args": {"num_classes": None,
       "in_channels": None}}  # fmt: skip


def test_networks_inside_dataclasses_learn_classes_and_channels_too() -> None:
    """An objective may hold networks in dataclasses, which have no class path of their own."""
    objective = {
        "class_path": "x.Distillation",
        "init_args": {"teacher": {"net": NET, "path": "a"}},
    }
    model = {"class_path": "x.Model", "init_args": {"net": NET, "objective": objective}}
    source = {"class_path": "common.data.sources.Digits", "init_args": {}}
    config = dict_to_namespace({"model": model, "data": {"source": source}})
    fill_from_data(config)
    arguments = config.model.init_args
    for net in (arguments.net, arguments.objective.init_args.teacher.net):
        assert (net.init_args.num_classes, net.init_args.in_channels) == (10, 1)
