"""Suites: outcomes per example, the worst case, and the file they go to."""

import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.losses import cross_entropy, hinge_margin
from common.attacks.minimum_norm import DeepFool
from common.attacks.noise import UniformNoise
from common.attacks.pgd import FGSM, PGD
from common.attacks.randomness import ExampleRandom, Stream
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, Transfer, check_suite, resolve_losses
from common.evaluation.audit.checks import Audit
from common.evaluation.runner import run_steps
from common.evaluation.steps import judged
from common.evaluation.suite import steps_of
from common.networks.resnet import ResNet
from common.objectives import AT, OnLogits
from common.results.lines import Outcomes, Threat
from common.results.outcomes import checkpoint_entry
from common.results.packing import unpack_outcomes
from common.results.store import read_result


class Threshold(nn.Module):
    """Class 1 where the mean pixel exceeds a half: its robustness is known in closed form."""

    def forward(self, x: Tensor) -> Tensor:
        score = 20 * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-score, score], dim=1)


def useless(logits: Tensor, y: Tensor) -> Tensor:
    return -cross_entropy(logits, y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Threshold()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def adaptive_losses(self):
        return {"ce_f": OnLogits(cross_entropy), "none": OnLogits(useless)}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Mean pixels 0.30, 0.35, ..., 0.75; class 1 above a half; the last label is wrong."""
    means = torch.arange(0.30, 0.76, 0.05)
    y = (means > 0.5).long()
    y[-1] = 0
    x = means[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return {"x": x, "y": y, "index": torch.arange(len(y))}


def run(batch: dict[str, Tensor], size: int = 100, **entries: SuiteEntry) -> Outcomes:
    check_suite(entries, Model())
    steps = steps_of(entries, Model(), 2, seed=0)
    return run_steps(Model(), batch, steps, seed=0, batch_size=size)


def test_a_weak_loss_does_not_hide_a_strong_one(batch) -> None:
    found = run(batch, pgd=SuiteEntry(PGD(0.12, 0.03, 10, start="zero"), ["none", "ce_f"]))
    assert found.correct["pgd/none"].sum() == 9
    assert found.correct["pgd/ce_f"].sum() < 9


def test_batches_and_their_order_change_nothing(batch) -> None:
    pgd = SuiteEntry(PGD(0.12, 0.01, 3, start="uniform"), ["*"])
    whole = run(batch, pgd=pgd)
    shuffled = {key: value.flip(0) for key, value in batch.items()}
    for other in (run(batch, 3, pgd=pgd), run(shuffled, 5, pgd=pgd)):
        for name in whole.correct:
            assert torch.equal(whole.correct[name], other.correct[name]), name


def test_repeated_or_missing_examples_are_an_error(batch) -> None:
    for index in (torch.zeros(10, dtype=torch.int64), torch.arange(10) + 1):
        with pytest.raises(RuntimeError, match=r"each of 0\.\.n-1 once"):
            run({**batch, "index": index}, a=SuiteEntry(FGSM(0.1)))


def test_suite_mistakes_are_found_before_the_first_attack() -> None:
    aa = SuiteEntry(AutoAttack(0.1), ["*"])
    for mistake, match in (
        (lambda: check_suite({}, Model()), "empty"),
        (lambda: resolve_losses(["ce_probe*"], Model()), "declares .*ce_f, none"),
        (lambda: check_suite({"a/b": SuiteEntry(FGSM(0.1))}, Model()), "'a/b'"),
        (lambda: check_suite({"aa": aa}, Model()), "'aa' has .*ce_f, none"),
        (lambda: SuiteEntry(FGSM(0.1), losses=[]), "attacks nothing"),
        (lambda: SuiteEntry(FGSM(0.1), examples=0), "examples .* got 0"),
        (lambda: RobustEvaluation(validation=SuiteEntry(AutoAttack(eps=0.1))), "got AutoAttack"),
        (lambda: SuiteEntry(PGD(0.12), sweep={"radius": [1]}), "got radius"),
        (lambda: SuiteEntry(AutoAttack(0.1), eot=4), "eot 4.*AutoAttack"),
        (lambda: SuiteEntry(GAMAPGD(0.1), eot=4), "drop eot"),
        (lambda: SuiteEntry(DeepFool(0.1), ["cw_f"]), "drop losses.*DeepFool"),
        (lambda: SuiteEntry(UniformNoise([0.1]), survivors_only=True), "drop survivors_only"),
        (lambda: SuiteEntry(PGD(0.1), survivors_only=True, all_images=True), "survivors_only"),
        (lambda: SuiteEntry(AutoAttack(0.1), all_images=True), "drop all_images"),
        (lambda: Transfer(PGD(0.1), Model(), "dlr"), "got 'dlr'"),
        (lambda: SuiteEntry(FGSM(0.1), checkpoints=["lst"]), "entry .* last, selected, got 'lst'"),
        (lambda: SuiteEntry(FGSM(0.1), checkpoints=[]), "for no checkpoint.*drop checkpoints"),
        (lambda: Audit(checkpoints=["best"]), "audit .* last, selected, got 'best'"),
        (lambda: Audit(checkpoints=[]), "for no checkpoint.*drop checkpoints"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            mistake()


def test_a_larger_ball_or_another_norm_is_reported_and_does_not_count(batch) -> None:
    found = run(
        batch,
        small=SuiteEntry(PGD(0.05, 0.05, 2)),
        large=SuiteEntry(PGD(0.5, 0.1, 10)),
        l2=SuiteEntry(PGD(3.0, 1.0, 10, norm="l2")),
        smaller=SuiteEntry(FGSM(0.01)),
    )
    counts = {line.entry: line.counts for line in found.lines.values()}
    assert counts == {"small": True, "large": False, "l2": False, "smaller": True}
    assert not found.correct["large/ce_f"].any()
    entry = checkpoint_entry(found)
    assert entry["metrics"]["worst"] == entry["metrics"]["small/ce_f"]
    assert entry["threat"] == {"norm": "linf", "eps": 0.05}


def test_a_sweep_is_a_curve_of_the_closed_form(batch) -> None:
    entry = SuiteEntry(PGD(0.12, steps=10), sweep={"eps": [0.01, "0.08", 0.12, 0.08, 0.3]})
    assert [at["eps"] for _, at in entry.variants()] == [0.01, 0.08, 0.12, 0.3]
    found = run(batch, pgd=entry)
    assert torch.equal(found.correct["clean"], torch.tensor([True] * 9 + [False]))
    margins = (batch["x"].mean(dim=(1, 2, 3)) - 0.5).abs()
    for eps in (0.01, 0.08, 0.12, 0.3):  # an attack moves the mean by eps
        held = found.correct[f"pgd/ce_f/eps={eps}"]
        assert torch.equal(held, found.correct["clean"] & (margins > eps)), eps
        assert found.lines[f"pgd/ce_f/eps={eps}"].at == {"eps": eps}


def test_noise_meets_every_example_and_never_counts(batch) -> None:
    noise = UniformNoise(levels=[0.05, 0.5], draws=2)
    found = run(batch, noise=SuiteEntry(noise), fgsm=SuiteEntry(FGSM(0.06)))
    keys = [f"noise/level={level}/draw={draw}" for level in (0.05, 0.5) for draw in (0, 1)]
    assert list(found.lines) == [*keys, "fgsm/ce_f"]
    assert not any(found.lines[key].counts for key in keys)
    assert all(found.attacked[key].all() for key in keys)
    first, second = (found.columns[f"noise/level=0.5/draw={draw}"]["x_adv"] for draw in (0, 1))
    assert not torch.equal(first, second)


def test_transfer_shows_the_surrogates_images_to_the_model(batch) -> None:
    pgd = PGD(0.12, 0.03, 10)
    white = run(batch, pgd=SuiteEntry(pgd)).correct["pgd/ce_f"]
    same = run(batch, t=SuiteEntry(Transfer(pgd, Model())))
    assert torch.equal(same.correct["t"], white)

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Threshold()(x * 0 + 0.2 * x.detach() + x[:, :, :1, :1] * 1e-3)

    useless = Transfer(PGD(0.12, 0.03, 1, start="zero"), Blind())
    assert run(batch, t=SuiteEntry(useless)).correct["t"].sum() > white.sum()
    net, (random, again) = (
        Model(),
        (ExampleRandom(0, 0, batch["index"], Stream.EVALUATION) for _ in range(2)),
    )
    margin = Transfer(pgd, Model(), "margin")
    x_adv = pgd(lambda x: hinge_margin(net(x), batch["y"]), batch["x"], random)
    assert torch.equal(margin.run(net, batch, again)["x_adv"], x_adv)
    assert margin.settings() != Transfer(pgd, Model()).settings()


def test_expectation_over_transformation_averages_the_loss(batch) -> None:
    def standing(eot: int) -> int:
        factors, model = itertools.cycle([-1.0, -1.0, 3.0]), Model()
        model.adaptive_losses = lambda: {
            "ce_f": lambda m, b: lambda x: next(factors) * cross_entropy(m(x), b["y"])
        }
        steps = steps_of({"a": SuiteEntry(FGSM(0.12), eot=eot)}, model, 2, seed=0)
        return run_steps(model, batch, steps, seed=0).correct["a/ce_f"].sum()

    assert standing(eot=1) == 9, "the only draw points the wrong way"
    assert standing(eot=3) < 9


def test_an_image_outside_the_ball_breaks_nothing(batch) -> None:
    found = judged(Model(), batch, torch.ones_like(batch["x"]), Threat("linf", 0.26))
    allowed = batch["x"].amax(dim=(1, 2, 3)) >= 0.74
    assert found["correct"][~allowed].all()
    outside = judged(Model(), batch, batch["x"] + 1.0, None)
    assert outside["correct"].all()


def tiny() -> RobustClassifier:
    torch.manual_seed(0)
    return RobustClassifier(ResNet((1,), (4,), (2,), in_channels=1), AT(), torch.optim.SGD)


def test_weights_that_were_tested_are_not_tested_again(
    tmp_path, monkeypatch, quiet_trainer
) -> None:
    calls = []
    attacked = PGD.__call__

    def counted(self, *args, **kwargs):
        calls.append(self)
        return attacked(self, *args, **kwargs)

    monkeypatch.setattr(PGD, "__call__", counted)
    elsewhere = SuiteEntry(FGSM(0.1), checkpoints=["last"])
    entries = {"fgsm": SuiteEntry(FGSM(0.02), ["c*", "model"]), "other": elsewhere}
    trainer = quiet_trainer(RobustEvaluation(entries, pictures=False), default_root_dir=tmp_path)
    module, data = tiny(), ImageDataModule(Digits(), test_limit=30)
    trainer.test(module, datamodule=data, verbose=False)
    assert len(calls) == 3
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "selected.ckpt")
    trainer.test(module, datamodule=data, ckpt_path=tmp_path / "selected.ckpt", verbose=False)
    assert len(calls) == 3
    found = read_result(tmp_path / "results.json")["checkpoints"]
    assert set(found["selected"]["attacks"]) == {"fgsm/ce_f", "fgsm/cw_f", "fgsm/model"}
    for name, entry in found["selected"]["attacks"].items():
        assert entry == found["untrained"]["attacks"][name]
    with torch.no_grad():
        module.net.head.linear.bias += 1
    trainer.test(module, datamodule=data, verbose=False)
    assert len(calls) > 3


def test_the_result_file_holds_every_outcome(tmp_path, quiet_trainer) -> None:
    aa = AutoAttack(eps=0.02, version="custom", attacks=["apgd-ce"], steps=5)
    entries = {
        "fgsm": SuiteEntry(FGSM(0.02), ["ce_f", "cw_f"]),
        "aa": SuiteEntry(aa, survivors_only=True, examples=20),
    }
    evaluation = RobustEvaluation(entries, experiment="tiny", paper="paper_tiny", pictures=False)
    trainer = quiet_trainer(evaluation, default_root_dir=tmp_path)
    data = ImageDataModule(Digits(), test_limit=30, eval_batch_size=12)
    trainer.test(tiny(), datamodule=data, verbose=False)
    result = read_result(tmp_path / "results.json")
    entry = result["checkpoints"]["untrained"]
    assert list(entry["attacks"]) == ["fgsm/ce_f", "fgsm/cw_f", "aa/apgd-ce"]
    assert [a["examples"] for a in entry["attacks"].values()] == [30, 30, 20]
    clean = unpack_outcomes(entry["clean"]["outcomes"], 30)
    assert sum(clean) == entry["clean"]["correct"] == round(30 * entry["metrics"]["clean_acc"])
    made_with = result["provenance"]["untrained"]
    assert len(made_with["checkpoint_digest"]) == 64
    assert made_with["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert {"test/clean_acc", "test/fgsm", "test/worst_on_20"} <= set(trainer.callback_metrics)
    assert "test/worst" not in trainer.callback_metrics, "it is about 20 of 30 examples"


def test_gama_without_projection_is_reported_and_does_not_count(batch) -> None:
    gama = GAMAPGD(0.1, steps=4, decay_at=(2, 3))
    official = gama.but(project=False)
    found = run(batch, gama=SuiteEntry(gama), official=SuiteEntry(official))
    assert found.lines["gama"].counts
    assert not found.lines["official"].counts
    assert found.columns["gama"]["linf"].nan_to_num().max() <= 0.1 + 1e-6
    assert found.correct["official"].sum() <= found.correct["gama"].sum()


@pytest.mark.parametrize("all_images", [False, True])
def test_an_entry_may_attack_wrong_images_and_none_of_them_is_robust(batch, all_images) -> None:
    """The loss pulls towards the label, as a loss over a batch may: a wrong image turns right."""
    batch["x"][-1] = 0.51  # wrong, and right after a small step
    found = run(batch, a=SuiteEntry(PGD(0.05, 0.05, 2, "zero"), ["none"], all_images=all_images))
    assert found.columns["a/none"]["linf"][-1].isnan() != all_images
    attack = dict.fromkeys(("a/none", "a", "a_union"), 1.0 if all_images else 0.9)
    assert checkpoint_entry(found)["metrics"] == {"clean_acc": 0.9, "worst": 0.9} | attack
