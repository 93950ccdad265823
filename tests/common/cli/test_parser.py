"""What configurations leave to be inferred from the data, and which settings decide what."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from common.attacks.engine.network import AttackEngine
from common.cli.main import RobustCLI
from common.cli.parser import fill_from_data, protocol_digest
from common.errors import ConfigurationError
from common.packages import CONFIGS
from common.results.identity import decisive

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


def made(class_path: str, **init_args: Any) -> Namespace:
    return Namespace(class_path=class_path, init_args=Namespace(**init_args))


def filled(net: Namespace, size: int = 8, **more: Any) -> Namespace:
    """The arguments of a model on digits of this size."""
    model = made("common.classifier.RobustClassifier", net=net, **more)
    source = made("common.data.sources.Digits", size=size)
    fill_from_data(Namespace(model=model, data=Namespace(source=source)))
    return model.init_args


@pytest.mark.parametrize("inner", [{"num_classes": 3, "image_shape": [1, 28, 28]},
                                   {"num_classes": 10, "image_shape": (1, 16, 16)}])  # fmt: skip
def test_shape_and_classes_are_those_of_the_data(inner) -> None:
    """Through a function that takes a network too; defaults give way."""
    net = made("toy_nets.Shaped", **inner)
    around = filled(made("toy_nets.wrapped", net=net, image_shape=None), 16).net.init_args
    assert around.image_shape == around.net.init_args.image_shape == [1, 16, 16]
    assert around.net.init_args.num_classes == 10


def test_another_shape_is_refused_and_what_takes_none_gets_none() -> None:
    net = made("toy_nets.Shaped", num_classes=3)
    with pytest.raises(
        ConfigurationError, match=r"model.net.image_shape is \[1, 8, 8\] and Digits has \[1, 16, 1"
    ):
        filled(made("toy_nets.wrapped", net=net, image_shape=[1, 8, 8]), 16)
    around = filled(made("toy_nets.wrapped", net=net), 16).net.init_args
    assert "image_shape" not in around
    assert around.net.init_args.num_classes == 3, "not a network without channels"


def test_networks_inside_dataclasses_learn_classes_and_channels_too() -> None:
    """An objective may hold networks in dataclasses, which have no class path."""
    nets = [made("common.networks.resnet.ResNet18", num_classes=None, in_channels=None)
            for _ in range(2)]  # fmt: skip
    filled(nets[0], objective=made("x.Distillation", teacher=Namespace(net=nets[1], path="a")))
    for net in nets:
        assert (net.init_args.num_classes, net.init_args.in_channels) == (10, 1)


def test_what_decides_weights_and_what_a_protocol() -> None:
    engine = {"class_path": "common.attacks.engine.network.AttackEngine"}
    settings: dict[str, Any] = {"adversary": {"engine": None}, "evaluation": {"engine": None}}
    before = decisive(settings)
    assert decisive({**settings, "evaluation": {"engine": engine}}) == before
    assert decisive({**settings, "adversary": {"engine": engine}}) != before

    settings = {"evaluation": {"suite": {"fgsm": {"eps": 0.1}}}, "data": {"root": "here"}}
    digest = protocol_digest(settings)
    assert protocol_digest({**settings, "data": {"root": "there"}}) == digest
    for change in (
        {"evaluation": {"suite": {"fgsm": {"eps": 0.2}}}},
        {"data": {"root": "here", "test_limit": 5}},
        {"trainer": {"limit_test_batches": 1}},
    ):
        assert protocol_digest({**settings, **change}) != digest


@pytest.mark.parametrize(("overlay", "precision"), [("fast", "32"), ("fast_bf16", "bf16")])
def test_overlays_bring_an_engine_to_training_and_evaluation(overlay: str, precision: str) -> None:
    experiment = Path(__file__).parents[3] / "paper_robustwrn/configs/digits_d3-1-1_sat.yaml"
    arguments = ["--config", str(experiment), "--config", str(CONFIGS / f"{overlay}.yaml")]
    cli = RobustCLI("paper_robustwrn", [*arguments, "--trainer.logger", "false"], run=False)
    found = [c.engine.settings() for c in cli.trainer.callbacks if hasattr(c, "engine")]
    assert found == 2 * [AttackEngine(precision=precision).settings()]
