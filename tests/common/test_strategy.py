"""One process or two: the same verdicts; ``tests/test_devices.py`` is about the parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.noise import GaussianNoise
from common.attacks.pgd import PGD
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.evaluation import Audit, SuiteEntry
from common.networks.resnet import DigitsResNet
from common.objectives import AT, Natural
from common.results.store import read_result
from common.strategy import DeviceInvariantDDP, GlobalBatchNorm, GlobalBatchNormSync


@pytest.fixture
def evaluate(tmp_path, quiet_trainer) -> Callable[..., dict]:
    """The entries of a result that a number of processes find."""

    def call(devices: int, *, is_distilled: bool) -> dict:
        torch.manual_seed(0)
        surrogate = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        data = ImageDataModule(Digits(), batch_size=48, eval_batch_size=8, test_limit=23)
        data.setup("fit")
        train = data.train_set.__getitems__(list(range(len(data.train_set))))
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        adam = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(30):
            adam.zero_grad()
            nn.functional.cross_entropy(net(train["x"] / 255), train["y"]).backward()
            adam.step()
        parts = {"version": "custom", "attacks": ["apgd-ce", "square"], "square_queries": 5}
        aa = AutoAttack(0.1, batch_size=8, steps=3, **parts)
        suite = {
            "pgd2": SuiteEntry(PGD(0.1, 0.05, steps=2, start="uniform"), ["ce_f", "cw_f"]),
            "noise": SuiteEntry(GaussianNoise(levels=[0.2])),
            "aa": SuiteEntry(aa),
            "late": SuiteEntry(PGD(0.1, 0.02, steps=3, restarts=2), survivors_only=True),
        }
        sizes = {"square_queries": 5, "random_samples": 5, "decision_queries": 20}
        audit = Audit(9, None, 4, 2, **sizes, transfer=None if is_distilled else surrogate)
        folder = tmp_path / str(devices)
        trainer = quiet_trainer(
            RobustEvaluation(suite, audit=audit, pictures=False),
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            default_root_dir=folder,
        )
        trainer.test(RobustClassifier(net, AT()), datamodule=data, verbose=False)
        return read_result(folder / "results.json")["checkpoints"]

    return call


@pytest.mark.parametrize(
    ("devices", "is_distilled"), [pytest.param(2, True, marks=pytest.mark.slow), (3, False)]
)
def test_processes_reach_the_verdicts_of_one_on_an_uneven_split(
    evaluate, devices, is_distilled
) -> None:
    """The official AutoAttack included, whose random numbers belong to a batch."""
    one = evaluate(1, is_distilled=is_distilled)
    assert one["untrained"]["examples"] == 23
    assert 0 < one["untrained"]["metrics"]["worst"] < one["untrained"]["metrics"]["clean_acc"]
    assert evaluate(devices, is_distilled=is_distilled) == one


def test_a_batch_that_does_not_divide_is_refused(quiet_trainer) -> None:
    trainer = quiet_trainer(devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match=r"batch_size 49.*2"):
        trainer.fit(
            RobustClassifier(DigitsResNet(), Natural()),
            datamodule=ImageDataModule(Digits(), batch_size=49),
        )


def test_auto_with_several_devices_is_the_device_invariant_strategy() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, DeviceInvariantDDP)


def _batch_norm_rank(rank: int, folder: Path, x: Tensor) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    norm = nn.BatchNorm2d(3).double()
    GlobalBatchNormSync().apply(norm)
    assert isinstance(norm, GlobalBatchNorm)
    part = x.chunk(2)[rank].clone().requires_grad_()
    output = norm(part)
    (output**3).sum().backward()
    torch.save(
        {"output": output.detach(), "grad": part.grad, "state": norm.state_dict()},
        folder / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_global_batch_norm_is_batch_norm_of_the_global_batch(tmp_path) -> None:
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    torch.multiprocessing.start_processes(
        _batch_norm_rank, (tmp_path, x), nprocs=2, start_method="fork"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    norm = nn.BatchNorm2d(3).double()
    whole = x.clone().requires_grad_()
    output = norm(whole)
    (output**3).sum().backward()
    torch.testing.assert_close(torch.cat([p["output"] for p in parts]), output.detach())
    torch.testing.assert_close(torch.cat([p["grad"] for p in parts]), whole.grad)
    for part in parts:
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(part["state"][name], value)


def test_synchronised_layers_get_their_own_class_back() -> None:
    net = DigitsResNet()
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    sync = GlobalBatchNormSync()
    sync.apply(net)
    assert any(isinstance(m, GlobalBatchNorm) for m in net.modules())
    assert list(net.state_dict()) == keys
    sync.revert(net)
    assert [type(m) for m in net.modules()] == classes
