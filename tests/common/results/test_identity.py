"""Another network, another run or another protocol never passes for the one that is meant."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from common.cli.main import load_run, main
from common.results.identity import SETTINGS, check_package
from common.results.provenance import weights_digest

CONFIG = """
model:
  class_path: common.classifier.RobustClassifier
  init_args:
    net:
      class_path: common.networks.resnet.ResNet
      init_args: {depths: [1, 1], widths: [4, 4], strides: [1, 2]}
    objective: common.objectives.AT
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
data: {source: common.data.sources.Digits, batch_size: 20, val_size: 60, train_limit: 40,
  val_limit: 20, test_limit: 20}
adversary: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
evaluation:
  pictures: false
  validation: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
  suite: {fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false,
  enable_model_summary: false}
"""
RUN = Path("runs/paper_tiny/tiny/seed0")
LAST = RUN / "checkpoints/last.ckpt"
SCHEDULER = "--model.scheduler=torch.optim.lr_scheduler."


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def call(*args: object, package: str = "paper_tiny") -> None:
    main([str(a) for a in args], package=package)


def refused(capsys, *args: object, package: str = "paper_tiny") -> str:
    """The one line a user gets for a command that cannot work."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*args, package=package)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def overlay(path: Path, text: str) -> Path:
    made = path.with_name("overlay.yaml")
    made.write_text(text)
    return made


# ------------------------------------------------------------------------- another network or run


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_checkpoint_is_not_used_with_another_network(config, capsys, command) -> None:
    """Shapes agree with other strides, blocks or activations; the function does not."""
    call("fit", "--config", config)
    for option, value, said in (
        ("strides", "[1, 1]", "model.net.strides: [1, 2] in the checkpoint, [1, 1] given"),
        ("activation", "torch.nn.SiLU", "model.net.activation: "),
    ):
        line = refused(capsys, command, "--config", config, "--ckpt_path", "last",
                       f"--model.net.{option}", value)  # fmt: skip
        assert said in line
        assert "config.yaml in its run directory" in line
    line = refused(capsys, command, "--config", config, "--ckpt_path", "last",
                   "--data.source.size", "16")  # fmt: skip
    assert "data.source.size: 8 in the checkpoint, 16 given" in line
    assert not (RUN / "results.json").exists()
    call(command, "--config", config, "--ckpt_path", LAST, "--data.eval_batch_size", "7",
         "--trainer.max_epochs", "9", "--checkpoint.monitor", "val/clean_acc")  # fmt: skip


def test_a_result_is_not_filed_under_another_experiment(config, capsys) -> None:
    other = config.with_name("other.yaml")
    other.write_text(CONFIG)
    call("fit", "--config", other)
    path = Path("runs/paper_tiny/other/seed0/checkpoints/last.ckpt")
    line = refused(capsys, "test", "--config", config, "--ckpt_path", path)
    assert "experiment: other in the checkpoint, tiny given" in line
    line = refused(capsys, "test", "--config", other, "--ckpt_path", path, package="paper_toy")
    assert "package: paper_tiny in the checkpoint, paper_toy given" in line
    line = refused(capsys, "test", "--config", other, "--ckpt_path", path,
                   "--seed_everything", "4")  # fmt: skip
    assert "seed_everything: 0 in the checkpoint, 4 given" in line
    assert not list(Path("runs").rglob("*.json"))


def test_a_config_of_another_paper_is_refused(config, capsys) -> None:
    configs = Path(__file__).parents[3] / "paper_cifs/configs"
    for stem in ("digits_resnet_cifs", "digits_resnet_plain"):
        line = refused(capsys, "fit", "--config", configs / f"{stem}.yaml", package="paper_rcm")
        assert "belongs to paper_cifs and this is paper_rcm; run python -m paper_cifs" in line
    check_package("paper_rcm", {"paper_rcm.method.X", "common.objectives.AT"}, ["a/b.yaml"])
    copied = config.with_name("copied.yaml")
    copied.write_text(CONFIG.replace("common.objectives.AT", "paper_wm.objectives.AT"))
    with pytest.raises(SystemExit):  # it cannot be imported, or is refused
        call("fit", "--config", copied, package="paper_rcm")
    assert not Path("runs").exists()


def test_a_run_does_not_go_on_with_other_settings(config, capsys) -> None:
    call("fit", "--config", config)
    before = (RUN / "config.yaml").read_bytes(), LAST.read_bytes()
    for option, value, said in (
        ("--model.net.activation", "torch.nn.SiLU", "model.net.activation"),
        ("--model.optimizer.lr", "0.05", "model.optimizer.lr: 0.1 in the checkpoint, 0.05 given"),
        ("--data.batch_size", "10", "data.batch_size: 20 in the checkpoint, 10 given"),
        ("--adversary.attack.eps", "0.2", "adversary.attack.eps: 0.1 in the checkpoint, 0.2"),
        ("--trainer.val_check_interval", "0.5", "trainer.val_check_interval"),
        ("--trainer.limit_train_batches", "1", "trainer.limit_train_batches"),
        (
            "--model.objective",
            "common.objectives.Natural",
            "model.objective: common.objectives.AT in the checkpoint",
        ),
    ):
        line = refused(capsys, "fit", "--config", config, "--ckpt_path", "last", option, value,
                       "--trainer.max_epochs", "3")  # fmt: skip
        assert said in line
        assert "begin a new run: fit without --ckpt_path" in line
    assert ((RUN / "config.yaml").read_bytes(), LAST.read_bytes()) == before


def test_what_does_not_change_a_run_may_change(config) -> None:
    call("fit", "--config", config)
    more = overlay(
        config,
        """
trainer:
  max_epochs: 3
  log_every_n_steps: 1
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary}]
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: elsewhere}}
data: {eval_batch_size: 7, test_limit: 5}
evaluation: {suite: {twice: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}}}
""",
    )
    call("fit", "--config", config, "--config", more, "--ckpt_path", "last")
    assert torch.load(LAST)["epoch"] == 2
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_checkpoints_that_do_not_say_what_they_were_made_with(config, capsys) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    checkpoint = torch.load(LAST)
    del checkpoint[SETTINGS]
    torch.save(checkpoint, LAST)
    for command in ("fit", "test", "validate", "predict"):
        line = refused(capsys, command, "--config", config, "--ckpt_path", "last")
        assert "does not say which settings" in line
        assert "python -m common.evaluation" in line
    assert "does not say which settings" in refused(capsys, "reproduce", "--config", config)


def test_a_loaded_run_is_the_one_of_its_checkpoint(config) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    path = RUN / "config.yaml"
    text = path.read_text().partition("\n")[2]
    edited = re.sub(r"strides:\n\s+- 1\n\s+- 2", "strides: [1, 1]", text)
    assert edited != text
    load_run(RUN)
    path.write_text(edited)
    with pytest.raises(RuntimeError, match=r"model.net.strides: \[1, 2\] in the checkpoint"):
        load_run(RUN)


# -------------------------------------------------------------------------------- longer schedules


def rates(*options: object) -> list[float]:
    """The learning rate in every epoch, written down by the run itself."""
    from lightning.pytorch import Callback

    found = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_: object) -> None:
            found.append(trainer.optimizers[0].param_groups[0]["lr"])

    from common.cli import main as cli

    make = cli.RobustCLI.instantiate_trainer

    def watched(self, **kwargs):
        trainer = make(self, **kwargs)
        trainer.callbacks.append(Watch())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.RobustCLI, "instantiate_trainer", watched)
        call("fit", *options)
    return found


def test_a_longer_schedule_with_the_same_past_is_honoured(config) -> None:
    steps = SCHEDULER + "MultiStepLR", "--model.scheduler.gamma=0.1"
    late = (*steps, "--model.scheduler.milestones=[3]")
    whole = rates("--config", config, *late, "--trainer.max_epochs", "4", "--runs", "whole")
    assert whole == pytest.approx([0.1] * 6 + [0.01] * 2)
    parts = rates("--config", config, *steps, "--model.scheduler.milestones=[5]")
    parts += rates("--config", config, *late, "--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert parts == whole
    one, two = (torch.load(f"{runs}/paper_tiny/tiny/seed0/checkpoints/last.ckpt")
                for runs in ("whole", "runs"))  # fmt: skip
    assert weights_digest(one["state_dict"]) == weights_digest(two["state_dict"])
    assert one["lr_schedulers"][0]["milestones"] == two["lr_schedulers"][0]["milestones"]
    assert one[SETTINGS] == two[SETTINGS]


def test_a_schedule_may_begin_where_there_was_none(config) -> None:
    parts = rates("--config", config)
    parts += rates("--config", config, SCHEDULER + "StepLR", "--model.scheduler.step_size=3",
                   "--trainer.max_epochs", "4", "--ckpt_path", "last")  # fmt: skip
    assert parts == pytest.approx([0.1] * 6 + [0.01] * 2)


def test_a_schedule_with_another_past_is_refused(config, capsys) -> None:
    cosine = SCHEDULER + "CosineAnnealingLR"
    call("fit", "--config", config, cosine, "--model.scheduler.T_max=2")
    before = (RUN / "config.yaml").read_bytes()
    go_on = ("fit", "--config", config, cosine, "--ckpt_path", "last", "--trainer.max_epochs", "4")
    line = refused(capsys, *go_on, "--model.scheduler.T_max=4")
    assert "at step 1 0.05 in the checkpoint, 0.0853553 given" in line
    line = refused(capsys, *go_on, "--model.scheduler.T_max=2")
    assert "raises the learning rate again after 2 steps" in line
    assert (RUN / "config.yaml").read_bytes() == before


def test_one_cycle_is_as_long_as_its_run(config, capsys) -> None:
    cycle = (SCHEDULER + "OneCycleLR", "--model.scheduler.max_lr=0.1",
             "--model.scheduler_interval=step")  # fmt: skip
    short = (*cycle, "--model.scheduler.total_steps=4")
    line = refused(capsys, "fit", "--config", config, *short, "--trainer.max_epochs", "4")
    assert "model.scheduler ends after 4 steps and the run has 8" in line
    call("fit", "--config", config, *short)
    go_on = ("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert "ends after 4 steps" in refused(capsys, *go_on, *short)
    line = refused(capsys, *go_on, *cycle, "--model.scheduler.total_steps=8")
    assert "the learning rates of the 4 steps done so far differ" in line


# ------------------------------------------------------------------------- files that settings name


def test_a_swapped_warm_start_is_another_run(config, capsys) -> None:
    """It has the same path and the same settings; its weights are others."""
    for name, epochs in (("first", 1), ("second", 2)):
        call("fit", "--config", config, "--experiment", name, "--trainer.max_epochs", epochs)
    first, second = (Path(f"runs/paper_tiny/{n}/seed0/checkpoints/last.ckpt")
                     for n in ("first", "second"))  # fmt: skip
    start = config.with_name("start.ckpt")
    start.write_bytes(first.read_bytes())
    given = ("--config", config, "--warm_start.path", start)
    call("reproduce", *given)
    original = LAST.read_bytes()
    call("reproduce", *given)
    assert LAST.read_bytes() == original
    start.write_bytes(second.read_bytes())
    line = refused(capsys, "fit", *given, "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert "content of warm_start.path: " in line
    call("reproduce", *given)
    assert (RUN.with_name("seed0-replaced1") / "checkpoints/last.ckpt").read_bytes() == original
    digests = [json.loads((RUN.with_name(name) / "results.json").read_text())["provenance"]["last"]
               for name in ("seed0", "seed0-replaced1")]  # fmt: skip
    assert digests[0]["config_digest"] != digests[1]["config_digest"]
    start.rename(config.with_name("moved.ckpt"))
    call("fit", "--config", config, "--warm_start.path", config.with_name("moved.ckpt"),
         "--ckpt_path", "last", "--trainer.max_epochs", "3")  # fmt: skip


def test_a_warm_start_from_another_network_is_refused(config, capsys) -> None:
    call("fit", "--config", config, "--experiment", "first", "--trainer.max_epochs", "1")
    line = refused(capsys, "fit", "--config", config, "--model.net.strides", "[1, 1]",
                   "--warm_start.experiment", "first",
                   "--warm_start.checkpoint", "last")  # fmt: skip
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


def test_a_swapped_teacher_is_another_run(config, capsys) -> None:
    paper = {"package": "paper_awnet"}
    call("fit", "--config", config, "--experiment", "teacher", "--trainer.max_epochs", "1", **paper)
    given = ("--config", config, "--config", overlay(config, AWNET), "--experiment", "student")
    call("fit", *given, "--trainer.max_epochs", "1", **paper)
    again = ("fit", *given, "--ckpt_path", "last")
    line = refused(capsys, *again, "--model.objective.clean.net.strides", "[1, 1]", **paper)
    assert "model.objective.clean.net.strides: [1, 2] in the checkpoint, [1, 1] given" in line
    call("fit", "--config", config, "--experiment", "teacher", "--ckpt_path", "last", **paper)
    line = refused(capsys, *again, **paper)
    assert "content of model.objective.clean.experiment: " in line


# ----------------------------------------------------------------------------------- finished runs

STOPS = {
    "early stopping": """
trainer:
  max_epochs: 9
  callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping,
    init_args: {monitor: val/clean_acc, mode: max, patience: 1, min_delta: 1.0}}]
""",
    "time": "trainer: {max_epochs: 9999, max_time: '00:00:00:01'}",
    "steps": "trainer: {max_epochs: 9, max_steps: 3}",
    "within an epoch": """
trainer:
  max_epochs: 9
  val_check_interval: 0.5
  callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping,
    init_args: {monitor: val/clean_acc, mode: max, patience: 2, min_delta: 1.0}}]
""",
}


@pytest.mark.parametrize("how", STOPS)
def test_a_finished_run_is_finished_however_it_ended(config, how) -> None:
    given = ("reproduce", "--config", config, "--config", overlay(config, STOPS[how]))
    call(*given)
    assert torch.load(LAST)["epoch"] < (9998 if how == "time" else 8)
    last, result = LAST.read_bytes(), json.loads((RUN / "results.json").read_text())
    for _ in range(2):
        call(*given)
    assert LAST.read_bytes() == last
    again = json.loads((RUN / "results.json").read_text())
    assert again["checkpoints"] == result["checkpoints"]
    assert [path.name for path in RUN.parent.iterdir()] == ["seed0"]


def test_stochastic_weight_averaging_says_which_weights_are_where(config) -> None:
    more = overlay(
        config,
        """
trainer:
  max_epochs: 4
  callbacks: [{class_path: lightning.pytorch.callbacks.StochasticWeightAveraging,
    init_args: {swa_lrs: 0.05, swa_epoch_start: 2}}]
""",
    )
    with pytest.warns(UserWarning, match="selected.ckpt holds the raw weights of its epoch"):
        call("reproduce", "--config", config, "--config", more)
    origin = json.loads((RUN / "results.json").read_text())["provenance"]
    assert origin["last"]["weights"] == "averaged by StochasticWeightAveraging"
    assert origin["selected"]["weights"] in ("raw", "averaged by StochasticWeightAveraging")
    checkpoint = torch.load(LAST)
    (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("Stochastic"))
    name = "net.head.linear.weight"
    assert torch.equal(checkpoint["state_dict"][name], state["average_model_state"][name])
    before = LAST.read_bytes()
    call("reproduce", "--config", config, "--config", more)
    assert LAST.read_bytes() == before


def test_the_average_of_lightnings_averaging_is_named(config) -> None:
    more = overlay(config, "trainer: {callbacks: "
                   "[{class_path: common.callbacks.averaging.WarmUpAveraging}]}")  # fmt: skip
    call("reproduce", "--config", config, "--config", more)
    origin = json.loads((RUN / "results.json").read_text())["provenance"]
    assert {origin[k]["weights"] for k in origin} == {"averaged by WarmUpAveraging"}


# ---------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    "other",
    [
        ("--data.test_limit", "10"),
        ("--trainer.limit_test_batches", "1"),
        ("--evaluation.suite.fgsm.attack.eps", "0.05"),
    ],
)
def test_two_protocols_never_stand_in_one_file(config, other) -> None:
    call("reproduce", "--config", config)
    path = RUN / "results.json"
    assert list(json.loads(path.read_text())["checkpoints"]) == ["last", "selected"]
    call("test", "--config", config, "--ckpt_path", "last")
    assert list(json.loads(path.read_text())["checkpoints"]) == ["last", "selected"]
    with pytest.warns(UserWarning, match="held the checkpoint selected of other settings"):
        call("test", "--config", config, "--ckpt_path", "last", *other)
    assert list(json.loads(path.read_text())["checkpoints"]) == ["last"]


def test_checkpoints_with_suites_of_their_own_are_one_protocol(config) -> None:
    more = overlay(
        config,
        """
evaluation: {suite: {
  fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}},
  late: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}},
    checkpoints: [last]}}}
""",
    )
    call("reproduce", "--config", config, "--config", more)
    found = json.loads((RUN / "results.json").read_text())["checkpoints"]
    assert {name: list(entry["attacks"]) for name, entry in found.items()} == {
        "last": ["fgsm/ce_f", "late/ce_f"],
        "selected": ["fgsm/ce_f"],
    }


def test_an_extended_run_is_one_run(config) -> None:
    """Its selected checkpoint may be from before it was extended."""
    call("fit", "--config", config, "--trainer.max_epochs", "1", "--checkpoint.mode", "min")
    more = ("--config", config, "--checkpoint.mode", "min", "--ckpt_path")
    call("fit", *more, "last")
    for name in ("last", "selected"):
        call("test", *more, name)
    assert list(json.loads((RUN / "results.json").read_text())["checkpoints"]) == [
        "last", "selected"]  # fmt: skip


# --------------------------------------------------------------------------------- unused settings


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--checkpoint.dirpath", "elsewhere", "unknown option"),
        ("--evaluation.experiment", "another", "unknown option"),
        ("--evaluation.config_digest", "abc", "unknown option"),
        ("--monitoring.hyperparameters", "{a: 1}", "unknown option"),
        ("--evaluation.validation.eot", "4", "drop eot, which is for entries of evaluation.suite"),
        ("--evaluation.validation.examples", "5", "drop examples"),
    ],
)
def test_what_would_not_be_used_is_refused(config, capsys, option, value, said) -> None:
    assert said in refused(capsys, "fit", "--config", config, option, value)


def test_a_given_folder_is_where_a_test_writes(config) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    given = ("--trainer.default_root_dir", "elsewhere")
    call("test", "--config", config, "--ckpt_path", LAST, *given)
    assert Path("elsewhere/results.json").exists()
    assert not (RUN / "results.json").exists()
    call("fit", "--config", config, "--ckpt_path", LAST, *given)
    assert torch.load("elsewhere/checkpoints/last.ckpt")["epoch"] == 1
    assert torch.load(LAST)["epoch"] == 0
