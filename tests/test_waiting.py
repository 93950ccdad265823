"""Attacks and losses never ask a tensor for its value: on a GPU the host would wait for it.

They run on tensors without storage, where asking for a value is an error, and so is mixing tensors
of the host with those of a device, which need not be there. Only backward passes want a real one.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.attacks.engine import network as engine
from common.attacks.engine.folding import foldable
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import FGSM, MIM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.cli.main import RobustCLI
from common.data.extra import ExtraImages
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.modes import frozen
from common.networks.resnet import ResNet
from common.versions import FAKES_CUDA

ROOT = Path(__file__).parents[1]
DEVICES: list[Any] = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.backends.cuda.is_built() and (FAKES_CUDA or torch.cuda.is_available())),
            reason="torch without CUDA",
        ),
    ),
]


class NoCopies(TorchDispatchMode):
    """Copies between the host and a device wait for it, unless care is taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if source is not None and args[source].device != out.device:
            raise AssertionError(f"{func} from {args[source].device} to {out.device}")
        return out


@pytest.fixture(autouse=True)
def _no_backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on a device that is not there are zero, without a backward pass."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        zeros = lambda _, x, **__: (torch.zeros_like(x),)  # noqa: E731
        monkeypatch.setattr(torch.autograd, "grad", zeros)


ATTACKS: dict[str, Any] = {
    "fgsm": FGSM(0.1),
    "linf": PGD(0.1, 0.03, 2),
    "restarts": PGD(0.1, 0.03, 2, restarts=2),
    "l2": PGD(0.5, 0.2, 2, norm="l2"),
    "l1": PGD(5.0, 1.0, 2, norm="l1"),
    "mim": MIM(0.1, steps=2),
    "friendly": FriendlyPGD(0.1, 0.03, 3, tau={0: 1}),
}


@pytest.mark.parametrize(
    ("stem", "device"),
    [
        ("paper_cifs/digits_resnet_cifs", "cpu"),
        *(
            pytest.param(stem, "cuda", marks=DEVICES[1].marks)
            for stem in (
                *("paper_cifs/digits_resnet_cifs", "paper_cifs/digits_resnet_cas"),
                *("paper_robustwrn/digits_d1-1-3_sat", "paper_awnet/digits_awnet_mtard"),
            )
        ),
    ],
)
def test_a_training_step_asks_for_no_value(stem: str, device: str) -> None:
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
        with torch.device(device):
            cli = RobustCLI(package, arguments, run=False)
            batch = {
                "x": torch.zeros(4, *cli.datamodule.shape, dtype=torch.uint8),
                "y": torch.zeros(4, dtype=torch.long),
                "index": torch.arange(4),
            }
        model, data, adversary = cli.model, cli.datamodule, cli.config_init["adversary"]
        data.crop_padding, data.flip = 1, True
        adversary.attack.set_epoch(0)
        adversary.attack.steps = 2
        with frozen(model, adversary.mode), NoCopies():
            batch["x"] = data.augment(batch["x"], batch["index"], epoch=0)
            batch = data.on_after_batch_transfer(batch, 0)
            batch["x_adv"] = adversary.attack(
                model.objective.inner(model, batch),
                batch["x"],
                ExampleRandom(0, 0, batch["index"]),
                is_adversarial=lambda x: model(x).argmax(dim=1) != batch["y"],
            )
        assert batch["x_adv"].shape == batch["x"].shape
        assert batch["x_adv"].device.type == device
        loss = model.objective.outer(model, batch)
        assert loss.shape == ()
        if device == "cuda":
            return
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert sum(gradient is not None for gradient in gradients) > len(gradients) / 2


def attacked(
    attack: Any, device: str = "cpu", by: AttackEngine | None = None, asks: bool = False
) -> Tensor:
    with FakeTensorMode(), torch.device(device):
        net = ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2)).eval()
        x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

        def loss_fn(z: Tensor) -> Tensor:
            loss = cross_entropy(net(z), y)
            return loss * loss.sum().item() if asks else loss

        def is_adversarial(z: Tensor) -> Tensor:
            return net(z).argmax(dim=1) != y

        with frozen(net), NoCopies(), nullcontext() if by is None else by.applied(net, x):
            found: Tensor = attack(loss_fn, x, is_adversarial=is_adversarial)
            return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_asks_for_no_value(name: str, device: str) -> None:
    assert attacked(ATTACKS[name], device).device.type == device


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "32"), ("cpu", "bf16"), pytest.param("cuda", "32", marks=DEVICES[1].marks)],
)
def test_nor_does_an_engine(device, precision, monkeypatch: pytest.MonkeyPatch) -> None:
    # The trial, once per network, compares values.
    monkeypatch.setattr(engine, "_tried_out", lambda net, *_: (foldable(net), {}))
    found = attacked(ATTACKS["linf"], device, AttackEngine(precision=precision))
    assert found.device.type == device


def test_such_a_question_would_be_noticed() -> None:
    """Here, and so it would be in the attacks above."""
    with pytest.raises(DataDependentOutputException):
        attacked(ATTACKS["linf"], asks=True)


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "cuda"), ({"num_workers": 1}, "cpu"), ({"extra": ExtraImages()}, "cpu")],
    ids=["alone", "workers", "extra"],
)
@pytest.mark.parametrize("device", DEVICES[1:])
def test_images_stay_in_the_memory_of_a_gpu(
    settings: dict[str, Any], where: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    source = Digits()
    with FakeTensorMode():
        splits = {
            split: (torch.zeros(90, 1, 8, 8, dtype=torch.uint8), torch.arange(90) % 10)
            for split in ("train", "test")
        }
        monkeypatch.setattr(source, "load", splits.__getitem__)
        data = ImageDataModule(source, validate_on="test", **settings)
        strategy = SimpleNamespace(root_device=torch.device(device, 0))
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
        monkeypatch.setattr(ExtraImages, "load", lambda *_: splits["train"])
        data.setup("fit")
        batch = data.train_set.__getitems__([3, 1, 2])
        assert batch["x"].device.type == where
        assert batch["x"].shape == (3, 1, 8, 8)
        assert {batch["y"].device.type, batch["index"].device.type} == {"cpu"}
        assert data.train_set.y.device.type == "cpu"
        loader = data.val_dataloader()
        assert loader.pin_memory == (where == "cpu")  # what is there already cannot be pinned


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_copy_to_the_device_would_be_noticed(device: str) -> None:
    with FakeTensorMode(), NoCopies():
        x = torch.rand(3, device=device)
        with pytest.raises(AssertionError, match="_to_copy"):
            x.cpu()
        with pytest.raises(AssertionError, match="from cpu to cuda"):
            torch.tensor([1.0]).to(device)
