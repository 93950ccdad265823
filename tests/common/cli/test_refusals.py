"""What cannot work is one line before anything is computed."""

from pathlib import Path

import pytest
import torch
import yaml

from common.cli.preconditions import check_limits
from common.cli.runs import lock
from common.errors import ConfigurationError

LOGGERS = "lightning.pytorch.loggers."
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--data.source", "common.data.sources.digits", "did you mean Digits?"),
        ("--adversary.attack.eps", "8", "did you mean '8/255'?"),
        ("--adversary.attack", "null", "adversary.attack is null"),
        ("--model.objective", "common.objectives.Natural", "Natural never reads"),
        ("--evaluation.validation.losses", "[ce_probe]", "'ce_probe'; it declares pm_f, ce_f"),
        ("--model.net.num_classes", "7", "model.net.num_classes is 7 and Digits has 10"),
        ("--evaluation.validation", "null", "so it is not measured"),
        ("--ckpt_path", "best", "selected.ckpt does not exist"),
        ("--seed_everything", "4294967296", "got 4294967296"),
        ("--trainer.precision", "bf16-true", "use bf16-mixed or 32-true"),
        ("--trainer.limit_val_batches", "abc", "trainer.limit_val_batches: expected "),
        ("--trainer.devices", "[0]", "`devices` selected with `CPUAccelerator`"),
        ("--trainer.max_epochs", "0", "trainer.max_epochs is 0, so nothing would be trained"),
        ("--trainer.val_check_interval", "100", "`val_check_interval` (100) must be less than"),
        ("--model.scheduler", "torch.optim.lr_scheduler.StepLR", "model.scheduler: the following "
         "arguments are required: step_size"),
        ("--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "val/robust_acc to "
         "become better, that is larger, and its mode is min; set model.scheduler.mode: max"),
        ("--checkpoint.dirpath", "elsewhere", "unknown option"),
        ("--monitoring.hyperparameters", "{a: 1}", "unknown option"),
        ("--evaluation.validation.eot", "4", "drop eot"),
        ("--evaluation.pictures", "exmples", "expected bool or one of ['examples']"),
        ("--evaluation.results", "tiny.yaml/r.json", None),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_compute(tiny, option, value, expected) -> None:
    if expected is None:  # results are written by reproduce
        line, expected = tiny.refused("reproduce", option, value), "cannot"
    else:
        line = tiny.refused("fit", option, value)
    assert expected in line
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_epochs": -1}, "max_epochs is -1"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch must be at least 1, got 0"),
        ({"gradient_clip_val": -1}, "gradient_clip_val must not be negative, got -1"),
    ],
)
def test_limits_under_which_training_never_ends_or_begins(settings, expected) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        check_limits(settings)
    check_limits({"max_epochs": -1, "callbacks": [{"class_path": "a.EarlyStopping"}]})


@pytest.mark.parametrize("seed", ["true", "null"])
def test_a_seed_in_a_file_is_a_number_too(tiny, seed) -> None:
    line = tiny.refused("fit", *tiny.overlay(f"seed_everything: {seed}"))
    assert "seed_everything" in line
    assert "4294967295" in line or "expected int" in line


def test_a_suite_is_needed_and_a_threat_model_for_an_audit(tiny) -> None:
    line = tiny.refused("test", "--evaluation.suite", "{}")
    assert "evaluation.suite is empty" in line
    assert "--config autoattack" in line
    settings = yaml.safe_load(tiny.text)
    noise = {"class_path": "common.attacks.noise.UniformNoise", "init_args": {"levels": [0.1]}}
    settings["evaluation"] = {"audit": {}, "suite": {"noise": {"attack": noise}}}
    tiny.config.write_text(yaml.safe_dump(settings))
    assert "evaluation.audit needs a threat model" in tiny.refused("test")


def test_files_and_folders_are_checked_before_use(tiny) -> None:
    damaged = Path("damaged.ckpt")
    torch.save({"state_dict": {"a": torch.ones(500)}}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    assert "cannot be read" in tiny.refused("test", "--ckpt_path", damaged)
    held = lock(tiny.run)
    try:
        assert "another process is writing" in tiny.refused("fit")
    finally:
        held.release()
    Path("file").write_text("not a folder")
    assert "cannot write" in tiny.refused("test", "--evaluation.results", "file/results.json")
    assert "cannot be written" in tiny.refused("fit", "--runs", "file")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist; did you mean tiny.yaml?"),
        ("folder", "cannot be read: it is a folder"),
        (b"", "is damaged: it is empty"),
        (b"[1, 2]", "holds no settings"),
        (b"model: {a: [", "is no YAML"),
    ],
)
def test_files_that_are_no_configuration_are_named(tiny, content, expected) -> None:
    path = Path("other.yaml").absolute()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    line = tiny.refused("fit", *([f"--config={path}"] if content is None else ["--config", path]))
    assert str(path) in line
    assert expected in line


def plateau(**more) -> dict:
    name = "lightning.pytorch.cli" if "monitor" in more else "torch.optim.lr_scheduler"
    arguments = {"mode": "max", "factor": 0.1, "patience": 0, "threshold": 1.0}
    scheduler = {
        "class_path": f"{name}.ReduceLROnPlateau",
        "init_args": arguments | {"threshold_mode": "abs"} | more,
    }
    return {"model": {"init_args": {"scheduler": scheduler}}}


@pytest.mark.parametrize(
    "monitor", [None, *(pytest.param(f"val/{m}_acc", marks=slow) for m in ("clean", "mean"))]
)
def test_a_schedule_that_waits_for_a_metric_can_be_resumed(tiny, monitor) -> None:
    more = {} if monitor is None else {"monitor": monitor}
    given = ("fit", *tiny.overlay(plateau(**more)))
    if monitor == "val/mean_acc":
        given += ("--checkpoint.monitor", monitor)
    tiny(*given, "--runs", "whole")
    tiny(*given, "--runs", "parts", "--trainer.max_epochs", "1")
    tiny(*given, "--runs", "parts", "--ckpt_path", "last")
    whole, parts = tiny.checkpoint("whole"), tiny.checkpoint("parts")
    # The threshold lets nothing pass for better than the first epoch.
    rates = [c["optimizer_states"][0]["param_groups"][0]["lr"] for c in (whole, parts)]
    assert rates == pytest.approx([0.1 * 0.1] * 2)
    assert whole["lr_schedulers"] == parts["lr_schedulers"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        (plateau(monitor="val/nothing"), "waits for val/nothing, which nothing logs"),
        (plateau() | {"trainer": {"limit_val_batches": 0}}, "nothing is validated"),
        ({"model": {"init_args": {"scheduler_interval": "step"} | plateau()["model"]["init_args"]}},
         "set model.scheduler_interval: epoch"),
        ({"model": {"init_args": {"scheduler": {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 0}
        }}}}, "model.scheduler fails after epoch 0: integer modulo by zero"),
        ({"model": {"init_args": {"scheduler": {
            "class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1.0}
        }}}}, "model.scheduler fails at the start: You must define either total_steps"),
        ({"trainer": {"callbacks": {"class_path": "lightning.pytorch.callbacks.EarlyStopping",
                                    "init_args": {"monitor": "nothing"}}}}, "`nothing` which is"),
        ({"trainer": {"logger": {"class_path": f"{LOGGERS}CSVLogger",
                                 "init_args": {"save_dir": "tiny.yaml"}}}}, "Not a directory"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(tiny, overlay, expected) -> None:
    assert expected in tiny.refused("fit", *tiny.overlay(overlay))


@pytest.mark.parametrize("name", ["results.json", "outcomes"])
def test_reproduce_finds_what_it_cannot_write_before_it_trains(tiny, name) -> None:
    run = tiny.run
    run.mkdir(parents=True)
    (run / name).mkdir() if name == "results.json" else (run / name).write_text("in the way")
    assert name in tiny.refused("reproduce")
    assert not list(run.rglob("*.ckpt"))
