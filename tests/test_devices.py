"""One process, two or three: the same parameters, the same selected checkpoint, in float64.

A row of the table is a model with its objective and callbacks; to hold another method to it, add a
row. Most rows carry the marker ``faults``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import FGSM, PGD, FriendlyPGD
from common.attacks.randomness import ExampleRandom
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.averaging import LateAveraging, WarmUpAveraging
from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule, Views
from common.data.sources import Digits
from common.evaluation import SuiteEntry
from common.networks.resnet import ResNet
from common.objectives import ALP, AT, MART, TRADES
from paper_awnet.method import Router
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import AWNet, DigitsStudent, OATNet
from paper_awnet.objectives import BMTARD, OAT, HybridCE, RoutedTRADES
from paper_awnet.teachers import Teacher
from paper_cifs.method import CIFSResNet, JointCrossEntropy
from paper_cifs.module import CIFSClassifier
from paper_rcm.networks import split_batch_norm
from paper_rcm.objectives import DAJAT
from paper_wm.module import WeightMapClassifier
from paper_wm.networks import SmallCNN, with_weight_maps

BATCH = 48
EPOCHS = 2
IMAGES = 96


def plain(objective: Any) -> Callable[[], RobustClassifier]:
    """A small residual network with this objective."""

    def make() -> RobustClassifier:
        net = ResNet(depths=[1, 1], widths=[4, 4], strides=[1, 2], in_channels=1, num_classes=10)
        return RobustClassifier(net, objective, partial(torch.optim.SGD, lr=0.05, momentum=0.9))

    return make


def cifs() -> RobustClassifier:
    net = CIFSResNet(
        depths=(1, 1), widths=(4, 4), strides=(2, 2), in_channels=1, num_classes=10, hidden=4
    )
    return CIFSClassifier(net, JointCrossEntropy(), partial(torch.optim.SGD, lr=0.05))


def awnet(objective: Callable[[], Any] | None = None) -> Callable[[], RobustClassifier]:
    """Router, two batch-norms, and B-MTARD with two teachers unless told otherwise."""

    def bmtard() -> BMTARD:
        teachers = [Teacher(DigitsStudent(widths=(4, 4, 4)), as_it_is=True) for _ in range(2)]
        return BMTARD(*teachers, rate=0.1, scale="batchmean")

    def make() -> RobustClassifier:
        router = partial(Router, widths=(4, 6, 8), type_hidden=5, init="normal")
        net = AWNet(DigitsStudent(widths=(4, 6, 8)), router)
        optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        return AWNetClassifier(net, (objective or bmtard)(), optimizer)

    return make


def oat() -> RobustClassifier:
    net = OATNet(ResNet((1, 1), (4, 4), (1, 2), in_channels=1, num_classes=10), hidden=4)
    return AWNetClassifier(net, OAT(), partial(torch.optim.SGD, lr=0.05))


def dajat() -> RobustClassifier:
    net = ResNet(depths=[1, 1], widths=[4, 4], strides=[1, 2], in_channels=1, num_classes=10)
    split_batch_norm(net)
    return RobustClassifier(net, DAJAT(), partial(torch.optim.SGD, lr=0.05))


def weight_map() -> RobustClassifier:
    shape = (1, 8, 8)
    net = SmallCNN(widths=(4, 4, 4), image_shape=shape)
    net = with_weight_maps(net, "smoothing", "all", "post", image_shape=shape)
    return WeightMapClassifier(net, AT(), partial(torch.optim.SGD, lr=0.05))


class Shifted(Views):
    """Each image once more, moved by a random number of rows, twice."""

    def __call__(self, x: Tensor, random: ExampleRandom) -> list[Tensor]:
        """Two versions."""
        rows = random.integers(3, (2,))
        return [
            torch.stack([a.roll(int(r), 1) for a, r in zip(x, some, strict=True)])
            for some in rows.unbind(1)
        ]


@dataclass(frozen=True)
class Row:
    """What is trained, and with what beside it."""

    make: Callable[[], RobustClassifier]
    attack: PGD = field(default_factory=lambda: PGD(0.2, 0.1, steps=2))
    callbacks: Callable[[], list[Callback]] = list
    accumulate: int = 1
    engine: AttackEngine | None = None
    views: Views | None = None
    images: int = IMAGES


def awp() -> list[Callback]:
    return [AdversarialWeightPerturbation(gamma=0.01)]


def averaged() -> list[Callback]:
    return [WarmUpAveraging(decay=0.9)]


def awp_and_late() -> list[Callback]:
    return [AdversarialWeightPerturbation(gamma=0.01), LateAveraging(decay=0.8, from_epoch=1)]


def lightnings() -> list[Callback]:
    return [EMAWeightAveraging(decay=0.9)]


slow = pytest.mark.faults
UNEVEN = 101  # the last batch has 5 examples: 3 and 2, or 2, 2 and 1
TABLE = [
    pytest.param(Row(plain(TRADES(6.0)), callbacks=averaged, accumulate=2), 3, id="TRADES+EMA"),
    pytest.param(Row(awnet(), callbacks=awp, images=UNEVEN), 2, id="AW-Net+AWP, uneven"),
]
METHODS = {
    "AT": plain(AT()), "TRADES": plain(TRADES(6.0)), "MART": plain(MART(5.0)), "CIFS": cifs,
    "AW-Net": awnet(),
}  # fmt: skip
for name, make in METHODS.items():
    for extra in (list, awp, averaged, awp_and_late, lightnings):
        for accumulate in (1, 2):
            row = Row(make, callbacks=extra, accumulate=accumulate)
            label = f"{name}-{extra.__name__}-x{accumulate}"
            for devices in (2, 3):
                TABLE.append(pytest.param(row, devices, id=f"{label}-{devices}", marks=slow))
OTHERS = {
    "FAT": Row(plain(AT()), FriendlyPGD(0.2, 0.1, 3, tau=1)),
    "FAT+CIFS": Row(cifs, FriendlyPGD(0.2, 0.1, 3, tau=1)),
    "restarts": Row(plain(AT()), PGD(0.2, 0.1, 2, start="uniform", restarts=2)),
    "engine": Row(plain(AT()), engine=AttackEngine()),
    "engine+AW-Net": Row(awnet(), engine=AttackEngine()),
    "ALP": Row(plain(ALP())),
    "AW-Net+TRADES": Row(awnet(RoutedTRADES)),
    "AW-Net+CE": Row(awnet(HybridCE), accumulate=2),
    "OAT": Row(oat),
    "DAJAT": Row(dajat, callbacks=awp_and_late, views=Shifted()),
    "WM": Row(weight_map),
}
for name, row in OTHERS.items():
    for images in (IMAGES, UNEVEN):
        for devices in (2, 3):
            label = f"{name}-{images}-{devices}"
            param = pytest.param(replace(row, images=images), devices, id=label, marks=slow)
            TABLE.append(param)
for name, make in METHODS.items():
    row = Row(make, callbacks=awp, accumulate=2, images=UNEVEN)
    TABLE.append(pytest.param(row, 3, id=f"{name}-uneven", marks=slow))


class Report(Callback):
    """Hands over what each process has, by file: forked processes share nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Weights of rank zero; of every rank, what it thinks was selected."""
        rank = trainer.global_rank
        torch.save(pl_module.state_dict(), self.folder / f"weights{rank}.pt")
        (selected,) = [c for c in trainer.callbacks if isinstance(c, SelectedCheckpoint)]
        score = selected.best_model_score
        found = [None if score is None else score.item(), Path(selected.best_model_path).name]
        (self.folder / f"selected{rank}.json").write_text(json.dumps(found))


def train(row: Row, devices: int, folder: Path, precision: Any = "64-true") -> None:
    """Two epochs on a few digits."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = row.make()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision=precision,
        max_epochs=EPOCHS,
        accumulate_grad_batches=row.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[
            AdversarialTraining(row.attack, engine=row.engine),
            *row.callbacks(),
            RobustEvaluation(validation=SuiteEntry(FGSM(0.1))),
            Report(folder),
            LastCheckpoint(str(folder)),
            SelectedCheckpoint(dirpath=str(folder)),
        ],
    )
    data = ImageDataModule(
        Digits(),
        BATCH // row.accumulate,
        eval_batch_size=13,
        train_limit=row.images,
        val_limit=50,
        views=row.views,
    )
    trainer.fit(model, datamodule=data)


def result(folder: Path, rank: int = 0) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    """Weights, what was selected, and the selected file."""
    selected = json.loads((folder / f"selected{rank}.json").read_text())
    return torch.load(folder / f"weights{rank}.pt"), selected, torch.load(folder / "selected.ckpt")


@pytest.mark.parametrize(("row", "devices"), TABLE)
def test_processes_train_the_parameters_of_one(tmp_path: Path, row: Row, devices: int) -> None:
    train(row, 1, tmp_path / "one")
    train(row, devices, tmp_path / "more")
    one, chosen, file = result(tmp_path / "one")
    for rank in range(devices):
        more, other, other_file = result(tmp_path / "more", rank)
        assert one.keys() == more.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, more[name], rtol=1e-6, atol=1e-6, msg=name)
        assert other[1] == chosen[1] == "selected.ckpt", "every rank selects the same"
        assert other[0] == pytest.approx(chosen[0], abs=1e-6)
        assert other_file["global_step"] == file["global_step"]
    untrained = untrained_weights(row)
    moved = [(one[name] - untrained[name]).abs().max() for name in one if name.endswith("weight")]
    assert max(moved) > 1e-4, "something was trained"


def untrained_weights(row: Row) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return row.make().double().state_dict()


@pytest.mark.faults
@pytest.mark.parametrize("devices", [2, 3])
def test_in_float32_sums_round_otherwise_and_no_more(tmp_path: Path, devices: int) -> None:
    """The README's tolerance, without kinks: where rounding turns one over, gradients jump."""

    def smooth() -> RobustClassifier:
        blocks = [
            layer
            for width in (1, 4)
            for layer in (nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus())
        ]
        net = nn.Sequential(*blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 10))
        return RobustClassifier(net, TRADES(6.0), partial(torch.optim.SGD, lr=0.05, momentum=0.9))

    ten_steps = 5 * BATCH
    row = Row(smooth, PGD(0.2, 0.1, steps=2, norm="l2"), images=ten_steps)
    train(row, 1, tmp_path / "one", "32-true")
    train(row, devices, tmp_path / "more", "32-true")
    one, more = (result(tmp_path / name)[0] for name in ("one", "more"))
    for name, value in one.items():
        torch.testing.assert_close(value, more[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("images", [IMAGES, pytest.param(UNEVEN, marks=slow)])
def test_an_accumulated_step_is_one_of_the_same_global_batch(tmp_path: Path, images: int) -> None:
    """Without batch-norm, whose statistics are those of a forward pass."""

    def make() -> RobustClassifier:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return RobustClassifier(net, TRADES(6.0), partial(torch.optim.SGD, lr=0.05))

    for accumulate, devices in ((1, 1), (2, 1), (4, 1), (4, 2)):
        row = Row(make, accumulate=accumulate, images=images)
        train(row, devices, tmp_path / f"{accumulate}{devices}")
    one, *others = (result(tmp_path / name)[0] for name in ("11", "21", "41", "42"))
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-10, msg=name)
