"""Outcomes per example, the worst case over a suite, and the file they go to."""

import json

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.losses import cross_entropy
from common.attacks.pgd import FGSM, PGD
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, SuiteRun, check_suite, resolve_losses
from common.networks.resnet import ResNet
from common.objectives import AT
from common.results import read_result, unpack_outcomes
from common.trainer import Trainer


class Threshold(nn.Module):
    """Class 1 where the mean pixel exceeds a half: its robustness is known in closed form."""

    def forward(self, x: Tensor) -> Tensor:
        score = 20 * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-score, score], dim=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Threshold()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def adaptive_losses(self):
        def climb(model, batch):
            return lambda x: cross_entropy(model(x), batch["y"])

        def useless(model, batch):
            return lambda x: 0 * cross_entropy(model(x), batch["y"])

        return {"ce_f": climb, "none": useless}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Mean pixels 0.30, 0.35, ..., 0.75; class 1 above a half; the last label is wrong."""
    means = torch.arange(0.30, 0.76, 0.05)
    y = (means > 0.5).long()
    y[-1] = 0
    x = means[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return {"x": x, "y": y, "index": torch.arange(len(y))}


def suite(**entries: SuiteEntry) -> dict[str, SuiteEntry]:
    return entries


def run(batch: dict[str, Tensor], entries: dict[str, SuiteEntry], parts: int = 1):
    check_suite(entries, Model())
    state = SuiteRun(Model(), entries, seed=0)
    for rows in torch.arange(len(batch["y"])).chunk(parts):
        state.attack({key: value[rows] for key, value in batch.items()})
    return state.gathered(lambda mine: [mine])


def test_outcomes_are_those_of_the_closed_form(batch) -> None:
    """An l-inf attack of radius eps moves the mean by eps: margins below it fall."""
    found = run(batch, suite(pgd=SuiteEntry(PGD(0.12, 0.03, 10))))
    margins = (batch["x"].mean(dim=(1, 2, 3)) - 0.5).abs()
    is_right = torch.tensor([True] * 9 + [False])
    assert torch.equal(found.correct["clean"], is_right)
    assert torch.equal(found.correct["pgd/ce_f"], is_right & (margins > 0.12))


def test_a_weak_loss_does_not_hide_a_strong_one(batch) -> None:
    found = run(batch, suite(pgd=SuiteEntry(PGD(0.12, 0.03, 10, start="zero"), ["none", "ce_f"])))
    assert found.correct["pgd/none"].sum() == 9
    assert found.correct["pgd/ce_f"].sum() < 9


def test_survivors_only_is_cumulative(batch) -> None:
    strong, weak = PGD(0.22, 0.05, 10), FGSM(0.01)
    entries = suite(
        a=SuiteEntry(strong), b=SuiteEntry(weak, survivors_only=True), c=SuiteEntry(weak)
    )
    found = run(batch, entries)
    assert torch.equal(found.correct["b/ce_f"], found.correct["a/ce_f"])
    assert found.correct["c/ce_f"].sum() > found.correct["a/ce_f"].sum()


def test_only_the_first_examples_are_attacked_where_the_entry_says_so(batch) -> None:
    found = run(batch, suite(pgd=SuiteEntry(PGD(0.5, 0.1, 10), examples=4)), parts=3)
    assert found.attacked["pgd/ce_f"].tolist() == [True] * 4 + [False] * 6
    assert not found.correct["pgd/ce_f"][:4].any()


def test_batches_and_their_order_change_nothing(batch) -> None:
    entries = suite(pgd=SuiteEntry(PGD(0.12, 0.01, 3, start="uniform"), ["*"]))
    whole, parts = run(batch, entries), run(batch, entries, parts=4)
    shuffled = {key: value.flip(0) for key, value in batch.items()}
    for other in (parts, run(shuffled, entries, parts=2)):
        for name in whole.correct:
            assert torch.equal(whole.correct[name], other.correct[name]), name


def test_repeated_or_missing_examples_are_an_error(batch) -> None:
    for index in (torch.zeros(10, dtype=torch.int64), torch.arange(10) + 1):
        with pytest.raises(RuntimeError, match=r"each of 0\.\.n-1 once"):
            run({**batch, "index": index}, suite(a=SuiteEntry(FGSM(0.1))))


def test_suite_mistakes_are_found_before_the_first_attack() -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        check_suite({}, Model())
    with pytest.raises(ConfigurationError, match="declares ce_f, none"):
        resolve_losses(["ce_probe*"], Model())
    with pytest.raises(ConfigurationError, match="contains '/'"):
        check_suite({"a/b": SuiteEntry(FGSM(0.1))}, Model())
    with pytest.raises(ConfigurationError, match="attacks nothing"):
        SuiteEntry(FGSM(0.1), losses=[])
    with pytest.raises(ConfigurationError, match="at least 1"):
        SuiteEntry(FGSM(0.1), examples=0)
    with pytest.raises(ConfigurationError, match="cannot be AutoAttack"):
        RobustEvaluation(validation=SuiteEntry(AutoAttack(eps=0.1)))


def test_equal_weights_are_attacked_once(tmp_path, monkeypatch) -> None:
    calls = []
    attack = SuiteRun.attack
    monkeypatch.setattr(SuiteRun, "attack", lambda self, batch: calls.append(attack(self, batch)))
    net = ResNet((1,), (4,), (2,), in_channels=1)
    module = RobustClassifier(net, AT(), torch.optim.SGD)
    evaluation = RobustEvaluation(
        suite(
            fgsm=SuiteEntry(FGSM(0.02), ["*"]),
            other=SuiteEntry(FGSM(0.1), checkpoints=["untrained"]),
        )
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[evaluation],
    )
    data = ImageDataModule(Digits(), test_limit=20)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "selected.ckpt")
    trainer.test(module, datamodule=data, ckpt_path=tmp_path / "selected.ckpt", verbose=False)
    assert len(calls) == 1
    found = read_result(tmp_path / "results.json")["checkpoints"]
    assert set(found["selected"]["attacks"]) == {"fgsm/ce_f", "fgsm/cw_f", "fgsm/model"}
    for name, entry in found["selected"]["attacks"].items():
        assert entry == found["untrained"]["attacks"][name]
    with torch.no_grad():
        module.net.head.linear.bias += 1
    trainer.test(module, datamodule=data, verbose=False)
    assert len(calls) == 2


def test_the_result_file_holds_every_outcome(tmp_path) -> None:
    torch.manual_seed(0)
    net = ResNet((1, 1), (4, 4), (1, 2), in_channels=1)
    aa = AutoAttack(eps=0.02, version="custom", attacks=["apgd-ce"])
    entries = suite(
        fgsm=SuiteEntry(FGSM(0.02), ["ce_f", "cw_f"]),
        aa=SuiteEntry(aa, survivors_only=True, examples=20),
    )
    evaluation = RobustEvaluation(entries, experiment="tiny", paper="paper_tiny")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[evaluation],
    )
    module = RobustClassifier(net, AT(), torch.optim.SGD)
    data = ImageDataModule(Digits(), test_limit=30, eval_batch_size=12)
    trainer.test(module, datamodule=data, verbose=False)
    result = read_result(tmp_path / "results.json")
    entry = result["checkpoints"]["untrained"]
    assert list(entry["attacks"]) == ["fgsm/ce_f", "fgsm/cw_f", "aa/apgd-ce"]
    assert [a["examples"] for a in entry["attacks"].values()] == [30, 30, 20]
    clean = unpack_outcomes(entry["clean"]["outcomes"], 30)
    assert sum(clean) == entry["clean"]["correct"] == round(30 * entry["metrics"]["clean_acc"])
    for attack in entry["attacks"].values():
        held = unpack_outcomes(attack["outcomes"], attack["examples"])
        assert all(c or not h for c, h in zip(clean, held, strict=False))
    made_with = result["provenance"]["untrained"]
    assert len(made_with["checkpoint_digest"]) == 64
    assert made_with["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "results.json").read_text()) == result
