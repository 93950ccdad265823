"""Attacks and losses never ask a tensor for its value: on a GPU the host would wait for it.

They run on tensors without storage, where asking for a value is an error.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.attacks import engine
from common.attacks.engine import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.callbacks.modes import frozen
from common.cli import RobustCLI
from common.networks.resnet import ResNet

ROOT = Path(__file__).parents[1]
STEMS = [
    *("paper_cifs/digits_resnet_plain", "paper_cifs/digits_resnet_cifs"),
    *("paper_cifs/digits_resnet_cas", "paper_robustwrn/digits_d1-1-3_sat"),
    *("paper_rcm/digits_112_avg", "paper_awnet/digits_awnet_mtard"),
    *("paper_awnet/digits_detector_mtard",),
]
ATTACKS: dict[str, Any] = {
    "fgsm": FGSM(0.1),
    "linf": PGD(0.1, 0.03, 2),
    "restarts": PGD(0.1, 0.03, 2, restarts=2),
    "l2": PGD(0.5, 0.2, 2, norm="l2"),
    "l1": PGD(5.0, 1.0, 2, norm="l1"),
    "mim": MIM(0.1, steps=2),
    "friendly": FriendlyPGD(0.1, 0.03, 3, tau={0: 1}),
}


@pytest.mark.parametrize("stem", STEMS)
def test_a_training_step_asks_for_no_value(stem: str) -> None:
    package, _, name = stem.partition("/")
    path = ROOT / package / "configs" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    arguments = ["--config", str(path), "--trainer.logger", "false"]
    if config["model"]["init_args"].get("channels_last"):
        arguments += ["--model.channels_last", "false"]  # a module of such tensors cannot convert
    for option, value in config["model"]["init_args"]["objective"].get("init_args", {}).items():
        if isinstance(value, dict) and "experiment" in value:
            arguments += [f"--model.objective.{option}.as_it_is", "true"]
    with FakeTensorMode():
        cli = RobustCLI(package, arguments, run=False)
        model, adversary = cli.model, cli.config_init["adversary"]
        batch = {
            "x": torch.rand(4, *cli.datamodule.shape),
            "y": torch.zeros(4, dtype=torch.long),
            "index": torch.arange(4),
        }
        adversary.attack.set_epoch(0)
        with frozen(model, adversary.mode):
            batch["x_adv"] = adversary.attack(
                model.objective.inner(model, batch),
                batch["x"],
                ExampleRandom(0, 0, batch["index"]),
                is_adversarial=lambda x: model(x).argmax(dim=1) != batch["y"],
            )
        assert batch["x_adv"].shape == batch["x"].shape
        if package == "paper_awnet":  # it sorts clean from adversarial examples, once a step
            return
        model.objective.outer(model, batch).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert sum(gradient is not None for gradient in gradients) > len(gradients) / 2


def attacked(attack: Any, by: AttackEngine | None = None, asks: bool = False) -> Tensor:
    with FakeTensorMode():
        net = ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2)).eval()
        x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

        def loss_fn(z: Tensor) -> Tensor:
            loss = cross_entropy(net(z), y)
            return loss * loss.sum().item() if asks else loss

        def is_adversarial(z: Tensor) -> Tensor:
            return net(z).argmax(dim=1) != y

        with frozen(net), nullcontext() if by is None else by.applied(net, x):
            found: Tensor = attack(loss_fn, x, is_adversarial=is_adversarial)
            return found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_asks_for_no_value(name: str) -> None:
    assert attacked(ATTACKS[name]).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_nor_does_an_engine(precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_equal", lambda *_: True)  # a trial, once per network
    assert attacked(ATTACKS["linf"], AttackEngine(precision=precision)).shape == (4, 3, 8, 8)


def test_such_a_question_would_be_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        attacked(ATTACKS["linf"], asks=True)
