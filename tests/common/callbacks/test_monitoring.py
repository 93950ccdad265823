"""What a run writes for TensorBoard, read back from the event file."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.attacks.pgd import FGSM, PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.monitoring import Monitoring
from common.callbacks.robust_evaluation import RobustEvaluation
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.evaluation import SuiteEntry
from paper_cifs.method import CIFSResNet, JointCrossEntropy
from paper_cifs.module import CIFSClassifier


def events(folder: Path) -> EventAccumulator:
    sizes = {"images": 0, "scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


def test_a_run_can_be_read_back(tmp_path, quiet_trainer) -> None:
    torch.manual_seed(0)
    net = CIFSResNet(
        depths=(1, 1), widths=(4, 4), strides=(2, 2), in_channels=1, num_classes=10, hidden=4
    )
    module = CIFSClassifier(net, JointCrossEntropy(), partial(torch.optim.SGD, lr=0.01))
    entry = SuiteEntry(FGSM(0.1))
    trainer = quiet_trainer(
        AdversarialTraining(PGD(0.2, 0.1, 2)),
        RobustEvaluation({"fgsm": entry}, validation=entry),
        Monitoring(images=3, hyperparameters={"model": {"lr": 0.01, "net": "tiny"}}),
        LearningRateMonitor("step"),
        max_epochs=2,
        log_every_n_steps=2,
        logger=TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False),
    )
    data = ImageDataModule(
        Digits(), batch_size=20, val_size=60, train_limit=80, val_limit=40, test_limit=30
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)

    read = events(tmp_path)
    scalars = set(read.Tags()["scalars"])
    assert {
        "train/loss", "train/inner_loss_before", "train/inner_loss_after", "train/grad_norm",
        "lr-SGD", "train/clean_acc", "train/robust_acc", "val/clean_acc", "val/robust_acc",
    } <= scalars  # fmt: skip
    assert {f"val/robust_acc_per_class/{k}" for k in range(10)} <= scalars
    assert len(read.Scalars("train/loss")) == 4
    assert len(read.Scalars("val/robust_acc")) == 2
    for before, after in zip(
        read.Scalars("train/inner_loss_before"), read.Scalars("train/inner_loss_after"), strict=True
    ):
        assert after.value > before.value, "the attack must raise the loss it climbs"
    assert [round(event.value, 6) for event in read.Scalars("lr-SGD")] == [0.01] * 4
    (image,) = [i for i in read.Tags()["images"] if i == "val/examples"]
    assert len(read.Images(image)) == 2
    histograms = read.Tags()["histograms"]
    assert {f"val/masks/selections.{p}/{x}" for p in ("stages_0_0", "stages_1_0")
            for x in ("x", "x_adv")} <= set(histograms)  # fmt: skip
    assert any(tag.startswith("_hparams_") for tag in read.summary_metadata)
    assert any(tag == "hp/clean_acc" for tag in scalars)
