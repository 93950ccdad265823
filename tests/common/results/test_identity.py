"""Another network, another run or another protocol never passes for the one that is meant."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from common.cli.main import RobustCLI
from common.errors import ConfigurationError
from common.evaluation.models import load_run
from common.results.identity import SETTINGS, check_package
from common.results.provenance import weights_digest
from common.versions import SAVES_SWA

SCHEDULER = "--model.scheduler=torch.optim.lr_scheduler."
LONGER = ("--ckpt_path", "last", "--trainer.max_epochs", "4")


# ------------------------------------------------------------------------- another network or run


def test_a_checkpoint_is_not_used_with_another_network(tiny) -> None:
    """Shapes agree with other strides, blocks or activations; the function does not."""
    tiny.done("fit")
    for command, option, value, said in (
        ("test", "model.net.strides", "[1, 1]", "[1, 2] in the checkpoint, [1, 1] given"),
        ("validate", "model.net.activation", "torch.nn.SiLU", "model.net.activation: "),
        ("predict", "seed_everything", "4", "0 in the checkpoint, 4 given"),
    ):
        line = tiny.refused(command, "--ckpt_path", tiny.last, f"--{option}", value)
        assert f"{option}: " in line
        assert said in line
    given = ("--experiment", "other", "--data.source.size", "16")
    line = tiny.refused("test", "--ckpt_path", tiny.last, *given, package="paper_toy")
    assert "package: paper_tiny in the checkpoint, paper_toy given" in line
    assert "experiment: tiny in the checkpoint, other given" in line
    assert "data.source.size: 8 in the checkpoint, 16 given" in line
    assert not (tiny.run / "results.json").exists()
    tiny("test", "--ckpt_path", tiny.last, "--data.eval_batch_size", "7",
         "--trainer.max_epochs", "9", "--checkpoint.monitor", "val/clean_acc")  # fmt: skip


def test_a_config_of_another_paper_is_refused(tiny) -> None:
    config = Path(__file__).parents[3] / "paper_cifs/configs/digits_resnet_cifs.yaml"
    line = tiny.refused("fit", "--config", config, package="paper_rcm")
    assert "belongs to paper_cifs and this is paper_rcm; run python -m paper_cifs" in line
    check_package("paper_rcm", {"paper_rcm.method.X", "common.objectives.AT"}, ["a/b.yaml"])
    with pytest.raises(ConfigurationError, match="belongs to paper_wm"):
        check_package("paper_rcm", {"paper_wm.method.X"}, [])
    assert not Path("runs").exists()


def test_a_run_does_not_go_on_with_other_settings(tiny) -> None:
    tiny.done("fit")
    before = (tiny.run / "config.yaml").read_bytes(), tiny.last.read_bytes()
    changes = (
        ("model.optimizer.lr", "0.05", "0.1 in the checkpoint, 0.05 given"),
        ("data.batch_size", "10", "20 in the checkpoint, 10 given"),
        ("adversary.attack.eps", "0.2", "0.1 in the checkpoint, 0.2"),
        ("trainer.val_check_interval", "0.5", ""),
        ("model.objective", "common.objectives.TRADES", "common.objectives.AT in the checkpoint"),
    )
    given = [f"--{option}={value}" for option, value, _ in changes]
    line = tiny.refused("fit", *LONGER, *given)
    assert all(f"{option}: {said}" in line for option, _, said in changes)
    assert ((tiny.run / "config.yaml").read_bytes(), tiny.last.read_bytes()) == before


def test_what_does_not_change_a_run_may_change(tiny) -> None:
    tiny.done("fit")
    more = tiny.overlay(
        """
trainer:
  max_epochs: 3
  log_every_n_steps: 7
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary}]
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: elsewhere}}
data: {eval_batch_size: 7, test_limit: 5}
evaluation: {suite: {twice: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}}}
"""
    )
    tiny("fit", *more, "--ckpt_path", "last")
    assert tiny.checkpoint()["epoch"] == 2
    assert yaml.safe_load((tiny.run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_checkpoints_that_do_not_say_what_they_were_made_with(tiny) -> None:
    tiny.done("fit")
    checkpoint = tiny.checkpoint()
    del checkpoint[SETTINGS]
    torch.save(checkpoint, tiny.last)
    for command in ("test", "reproduce"):
        more = () if command == "reproduce" else ("--ckpt_path", "last")
        line = tiny.refused(command, *more)
        assert f"{tiny.last} does not say which settings" in line


def test_a_loaded_run_is_the_one_of_its_checkpoint(tiny) -> None:
    tiny.done("fit")
    path = tiny.run / "config.yaml"
    text = path.read_text().partition("\n")[2]
    edited = re.sub(r"strides:\n\s+- 1\n\s+- 2", "strides: [1, 1]", text)
    assert edited != text
    load_run(tiny.run)
    path.write_text(edited)
    with pytest.raises(RuntimeError, match=r"model.net.strides: \[1, 2\] in the checkpoint"):
        load_run(tiny.run)


# -------------------------------------------------------------------------------- longer schedules


def rates(tiny, *options: object) -> list[float]:
    """The learning rate in every epoch, written down by the run itself."""
    found = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_: object) -> None:
            found.append(trainer.optimizers[0].param_groups[0]["lr"])

    make = RobustCLI.instantiate_trainer

    def watched(self, **kwargs):
        trainer = make(self, **kwargs)
        trainer.callbacks.append(Watch())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RobustCLI, "instantiate_trainer", watched)
        tiny("fit", *options)
    return found


def test_a_longer_schedule_with_the_same_past_is_honoured(tiny) -> None:
    steps = SCHEDULER + "MultiStepLR", "--model.scheduler.gamma=0.1"
    late = (*steps, "--model.scheduler.milestones=[3]")
    whole = rates(tiny, *late, "--trainer.max_epochs", "4", "--runs", "whole")
    assert whole == pytest.approx([0.1] * 6 + [0.01] * 2)
    parts = rates(tiny, *steps, "--model.scheduler.milestones=[5]")
    parts += rates(tiny, *late, *LONGER)
    assert parts == whole
    one, two = tiny.checkpoint("whole"), tiny.checkpoint()
    assert weights_digest(one["state_dict"]) == weights_digest(two["state_dict"])
    assert one["lr_schedulers"][0]["milestones"] == two["lr_schedulers"][0]["milestones"]
    assert one[SETTINGS] == two[SETTINGS]


def test_a_schedule_may_begin_where_there_was_none(tiny) -> None:
    tiny.done("fit")  # two epochs of two steps
    found = rates(tiny, SCHEDULER + "StepLR", "--model.scheduler.step_size=3", *LONGER)
    assert found == pytest.approx([0.1] * 2 + [0.01] * 2)


def test_a_schedule_with_another_past_is_refused(tiny) -> None:
    cosine = SCHEDULER + "CosineAnnealingLR"
    tiny("fit", cosine, "--model.scheduler.T_max=2")
    before = (tiny.run / "config.yaml").read_bytes()
    go_on = ("fit", cosine, *LONGER)
    line = tiny.refused(*go_on, "--model.scheduler.T_max=4")
    assert "at step 1 0.05 in the checkpoint, 0.0853553 given" in line
    line = tiny.refused(*go_on, "--model.scheduler.T_max=2")
    assert "raises the learning rate again after 2 steps" in line
    assert (tiny.run / "config.yaml").read_bytes() == before


def test_one_cycle_is_as_long_as_its_run(tiny) -> None:
    cycle = (SCHEDULER + "OneCycleLR", "--model.scheduler.max_lr=0.1",
             "--model.scheduler_interval=step")  # fmt: skip
    short = (*cycle, "--model.scheduler.total_steps=4")
    line = tiny.refused("fit", *short, "--trainer.max_epochs", "4")
    assert "model.scheduler ends after 4 steps and the run has 8" in line
    tiny("fit", *short)
    line = tiny.refused("fit", *LONGER, *cycle, "--model.scheduler.total_steps=8")
    assert "the learning rates of the 4 steps done so far differ" in line


# ------------------------------------------------------------------------- files that settings name


def test_a_swapped_warm_start_is_another_run(tiny) -> None:
    """It has the same path and the same settings; its weights are others."""
    start, moved = (tiny.config.with_name(f"{name}.ckpt") for name in ("start", "moved"))
    tiny.done("fit")
    tiny.last.rename(start)
    shutil.rmtree(tiny.run)
    given = ("--warm_start.path", start)
    tiny("reproduce", *given)
    original = tiny.last.read_bytes()
    checkpoint = torch.load(start)
    checkpoint["state_dict"]["net.head.linear.bias"] += 1
    torch.save(checkpoint, start)
    longer = ("--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert "content of warm_start.path: " in tiny.refused("fit", *given, *longer)
    tiny("reproduce", *given)
    aside = tiny.run.with_name("seed0-replaced1")
    assert (aside / "checkpoints/last.ckpt").read_bytes() == original
    replaced = json.loads((aside / "results.json").read_text())
    digests = {r["provenance"]["last"]["config_digest"] for r in (replaced, tiny.result())}
    assert len(digests) == 2
    start.rename(moved)
    tiny("fit", "--warm_start.path", moved, *longer)


def test_a_warm_start_from_another_network_is_refused(tiny) -> None:
    tiny.done("fit")
    given = ("--warm_start.experiment", "tiny", "--warm_start.checkpoint", "last")
    line = tiny.refused("fit", "--experiment", "other", "--model.net.strides", "[1, 1]", *given)
    assert "model.net.strides: [1, 2] in the checkpoint, [1, 1] given" in line


AWNET = """
model:
  class_path: paper_awnet.module.AWNetClassifier
  init_args:
    net: {class_path: paper_awnet.networks.DigitsStudent, init_args: {widths: [4, 4, 4]}}
    objective:
      class_path: paper_awnet.objectives.MTARD
      init_args:
        clean: &teacher
          net: {class_path: common.networks.resnet.ResNet,
            init_args: {depths: [1, 1], widths: [4, 4], strides: [1, 2]}}
          experiment: teacher
        robust: *teacher
"""


@pytest.mark.slow
def test_a_swapped_teacher_is_another_run(tiny) -> None:
    paper = {"package": "paper_awnet"}
    tiny("fit", "--experiment", "teacher", "--trainer.max_epochs", "1", **paper)
    given = (*tiny.overlay(AWNET), "--experiment", "student")
    tiny("fit", *given, "--trainer.max_epochs", "1", **paper)
    again = ("fit", *given, "--ckpt_path", "last")
    line = tiny.refused(*again, "--model.objective.clean.net.strides", "[1, 1]", **paper)
    assert "model.objective.clean.net.strides: [1, 2] in the checkpoint, [1, 1] given" in line
    tiny("fit", "--experiment", "teacher", "--ckpt_path", "last", **paper)
    line = tiny.refused(*again, **paper)
    assert "content of model.objective.clean.experiment: " in line


# ----------------------------------------------------------------------------------- finished runs

EARLY = """trainer:
  max_epochs: 9
  callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping,
    init_args: {monitor: val/clean_acc, mode: max, patience: 1, min_delta: 1.0}}]
"""
STOPS = {
    "early stopping": EARLY,
    "time": "trainer: {max_epochs: 9999, max_time: '00:00:00:01'}",
    "steps": "trainer: {max_epochs: 9, max_steps: 3}",
    "within an epoch": f"{EARLY}  val_check_interval: 0.5\n",
}


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("early stopping", "time")),
        *("steps", "within an epoch"),
    ],
)
def test_a_finished_run_is_finished_however_it_ended(tiny, how) -> None:
    given = ("reproduce", *tiny.overlay(STOPS[how]))
    tiny(*given)
    assert tiny.checkpoint()["epoch"] < (9998 if how == "time" else 8)
    last, result = tiny.last.read_bytes(), tiny.result()
    tiny(*given)
    assert tiny.last.read_bytes() == last
    assert tiny.result()["checkpoints"] == result["checkpoints"]
    assert [path.name for path in tiny.run.parent.iterdir()] == ["seed0"]


def test_stochastic_weight_averaging_says_which_weights_are_where(tiny) -> None:
    more = tiny.overlay(
        """
trainer:
  max_epochs: 4
  callbacks: [{class_path: lightning.pytorch.callbacks.StochasticWeightAveraging,
    init_args: {swa_lrs: 0.05, swa_epoch_start: 2}}]
""",
    )
    if not SAVES_SWA:
        assert "StochasticWeightAveraging" in tiny.refused("fit", *more)
        return
    with pytest.warns(UserWarning, match="selected.ckpt holds the raw weights of its epoch"):
        tiny("reproduce", *more)
    origin = tiny.result()["provenance"]
    assert origin["last"]["weights"] == "averaged by StochasticWeightAveraging"
    assert origin["selected"]["weights"] in ("raw", "averaged by StochasticWeightAveraging")
    checkpoint = tiny.checkpoint()
    (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("Stochastic"))
    name = "net.head.linear.weight"
    assert torch.equal(checkpoint["state_dict"][name], state["average_model_state"][name])
    before = tiny.last.read_bytes()
    tiny("reproduce", *more)
    assert tiny.last.read_bytes() == before


# ---------------------------------------------------------------------------------------- protocols


def test_two_protocols_never_stand_in_one_file(tiny) -> None:
    """Checkpoints with suites of their own are one protocol; other test images are another."""
    averaging = "[{class_path: common.callbacks.averaging.WarmUpAveraging}]"
    fgsm = "attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}"
    late = f"{{fgsm: {{{fgsm}}}, late: {{{fgsm}, checkpoints: [last]}}}}"
    given = tiny.overlay(f"trainer: {{callbacks: {averaging}}}\nevaluation: {{suite: {late}}}")
    tiny("reproduce", *given)
    origin = tiny.result()["provenance"]
    assert {origin[k]["weights"] for k in origin} == {"averaged by WarmUpAveraging"}
    found = tiny.result()["checkpoints"]
    assert {name: list(entry["attacks"]) for name, entry in found.items()} == {
        "last": ["fgsm/ce_f", "late/ce_f"],
        "selected": ["fgsm/ce_f"],
    }
    tiny("test", *given, "--ckpt_path", "last")
    assert list(tiny.result()["checkpoints"]) == ["last", "selected"]
    with pytest.warns(UserWarning, match="held the checkpoint selected of other settings"):
        tiny("test", *given, "--ckpt_path", "last", "--data.test_limit", "10")
    assert list(tiny.result()["checkpoints"]) == ["last"]


def test_an_extended_run_is_one_run(tiny) -> None:
    """Its selected checkpoint may be from before it was extended."""
    tiny.done("fit")
    checkpoint = tiny.checkpoint()
    (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("Selected"))
    state["best_model_score"] = torch.tensor(2.0)
    torch.save(checkpoint, tiny.last)
    longer = ("--trainer.max_epochs", "3", "--ckpt_path")
    tiny("fit", *longer, "last")
    assert tiny.checkpoint()["epoch"] > tiny.checkpoint(name="selected")["epoch"]
    for name in ("last", "selected"):
        tiny("test", *longer, name)
    assert list(tiny.result()["checkpoints"]) == ["last", "selected"]


def test_a_given_folder_is_where_a_test_writes(tiny) -> None:
    tiny.done("fit")
    given = ("--trainer.default_root_dir", "elsewhere", "--ckpt_path", tiny.last)
    tiny("test", *given)
    assert Path("elsewhere/results.json").exists()
    assert not (tiny.run / "results.json").exists()
    tiny("fit", *given, "--trainer.max_epochs", "3")
    assert torch.load("elsewhere/checkpoints/last.ckpt")["epoch"] == 2
    assert tiny.checkpoint()["epoch"] == 1
