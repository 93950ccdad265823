"""Two processes train what one does: weights of the losses, temperatures, both batch-norms."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.attacks.pgd import PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.trainer import Trainer
from paper_awnet.method import Router
from paper_awnet.module import AWNetClassifier
from paper_awnet.networks import AWNet, DigitsStudent
from paper_awnet.objectives import BMTARD
from paper_awnet.teachers import Teacher


class Save(AdversarialTraining):
    """Hands the trained weights over by file, because forked processes share nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def setup(self, trainer, pl_module, stage) -> None: ...

    def on_train_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def weights(folder: Path, devices: int) -> dict[str, Tensor]:
    folder.mkdir()
    torch.manual_seed(0)
    router = partial(Router, widths=(4, 6, 8), type_hidden=5, init="normal")
    teachers = [Teacher(DigitsStudent(), as_it_is=True) for _ in range(2)]
    objective = BMTARD(*teachers, rate=0.1, scale="batchmean")
    net = AWNet(DigitsStudent(widths=(4, 6, 8)), router)
    model = AWNetClassifier(net, objective, partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision="64-true",
        max_steps=4,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[AdversarialTraining(PGD(0.2, 0.1, steps=2)), Save(folder / "weights.pt")],
    )
    trainer.fit(model, datamodule=ImageDataModule(Digits(size=8), batch_size=48))
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_two_processes_train_the_parameters_of_one(tmp_path) -> None:
    one, two = weights(tmp_path / "one", 1), weights(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-9, msg=name)
    assert one["objective.w_nat"] != 0.5
    assert (one["objective.temperatures"] != 1.0).any()
    clean, adv = (one[f"net.arch.stem.bn.{kind}.running_mean"] for kind in ("clean", "adv"))
    assert not torch.allclose(clean, adv)
