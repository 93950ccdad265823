"""The command line as its user meets it."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from common.classifier import RobustClassifier
from common.cli.main import RobustCLI, load_run, lock, main
from common.cli.messages import one_line
from common.evaluation.presets import CONFIGS
from common.results.provenance import weights_digest

SUITE = """
evaluation:
  pictures: true
  suite:
    fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}, losses: ["*"]}
    pgd2: {attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 0.1, steps: 2}}}
"""
TRANSFER = """
evaluation:
  suite:
    transfer:
      attack:
        class_path: common.evaluation.transfer.Transfer
        init_args:
          surrogate: again/paper_tiny/tiny/seed3/checkpoints/last.ckpt
          attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: threat}}
    white: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: threat}}}
"""


def test_fit_test_predict_and_rerun_from_the_saved_config(tiny) -> None:
    wide = ("--model.net.widths", "[4, 8]", "--seed_everything", "3")
    tiny("fit", *wide, "--trainer.logger", "true")
    run = tiny.run.with_name("seed3")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["experiment"] == "tiny"
    assert saved["model"]["init_args"]["net"]["init_args"]["num_classes"] == 10
    assert saved["model"]["init_args"]["net"]["init_args"]["in_channels"] == 1
    assert saved["trainer"]["logger"] is None
    assert list(run.glob("events.out.tfevents.*"))

    suite = (
        "evaluation: {pictures: true, suite: {fgsm: {losses: ['*']}, pgd2: {attack: {class_path: "
    )
    suite += "common.attacks.pgd.PGD, init_args: {eps: 0.1, steps: 2}}}}}"
    tiny("test", *wide, *tiny.overlay(suite), "--ckpt_path", "last")
    result = json.loads((run / "results.json").read_text())
    assert result["experiment"] == "tiny"
    assert result["seed"] == 3
    last = result["checkpoints"]["last"]
    assert last["epoch"] == 1
    assert last["global_step"] == 4
    assert list(last["attacks"]) == ["fgsm/ce_f", "fgsm/cw_f", "fgsm/model", "pgd2/ce_f"]
    assert last["metrics"]["worst"] == min(last["metrics"].values())
    assert {path.name for path in (run / "figures").iterdir()} >= {"last_confusion.png"}

    main(["predict", "--config", f"{run}/config.yaml", "--ckpt_path",
          f"{run}/checkpoints/last.ckpt"], package="paper_tiny")  # fmt: skip
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(20))
    accuracy = sum(row["label"] == row["predicted"] for row in rows) / 20
    assert accuracy == pytest.approx(last["metrics"]["clean_acc"])

    main(["fit", "--config", f"{run}/config.yaml", "--runs", "again"], package="paper_tiny")
    again = Path("again/paper_tiny/tiny/seed3/checkpoints/last.ckpt")
    one, two = (torch.load(p)["state_dict"] for p in (run / "checkpoints/last.ckpt", again))
    assert all(torch.equal(one[key], two[key]) for key in one)

    classifier, data = load_run(run)
    assert not classifier.training
    assert data.num_classes == 10

    # What was trained again attacks the first: the same weights, so as good as a white box.
    tiny("test", *wide, *tiny.overlay(TRANSFER), "--ckpt_path", "last",
         "--evaluation.results", "t.json")  # fmt: skip
    attacks = json.loads(Path("t.json").read_text())["checkpoints"]["last"]["attacks"]
    assert attacks["transfer"]["outcomes"] == attacks["white/ce_f"]["outcomes"]
    assert attacks["white/ce_f"]["eps"] == 0.1


def test_a_second_fit_leaves_the_first_alone_and_a_file_goes_on_in_its_run(tiny) -> None:
    for _ in range(2):
        tiny("fit", "--trainer.max_epochs", "1")
    second = tiny.run.with_name("seed0-v1")
    assert sorted(tiny.run.parent.iterdir()) == [tiny.run, second]
    first = tiny.last.read_bytes()
    tiny("fit", "--ckpt_path", second / "checkpoints/last.ckpt")
    assert tiny.last.read_bytes() == first
    assert torch.load(second / "checkpoints/last.ckpt")["epoch"] == 1


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tiny, monkeypatch) -> None:
    """The second half as a job that SLURM runs again, which needs no option."""
    tiny("fit", "--runs", "whole", "--trainer.max_epochs", "4")
    tiny("fit", "--trainer.max_epochs", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tiny("fit", "--trainer.max_epochs", "4")
    assert [path.name for path in tiny.run.parent.iterdir()] == ["seed0"]
    whole, parts = tiny.checkpoint("whole"), tiny.checkpoint()
    assert whole["global_step"] == parts["global_step"] == 8
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    momenta = (c["optimizer_states"][0]["state"] for c in (whole, parts))
    for one, two in zip(*(m.values() for m in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


def test_reproduce_tests_both_checkpoints_and_goes_on_with_what_is_there(tiny) -> None:
    tiny("reproduce")
    first = tiny.result()
    assert list(first["checkpoints"]) == ["last", "selected"]
    tiny("reproduce", "--checkpoint.every_n_train_steps", "1")  # that is the same experiment
    assert [path.name for path in tiny.run.parent.iterdir()] == ["seed0"], "it was not set aside"
    again = tiny.result()
    assert again["checkpoints"] == first["checkpoints"]
    digests = {r["provenance"]["last"]["config_digest"] for r in (first, again)}
    assert len(digests) == 1
    tiny("reproduce", "--trainer.max_epochs", "1")
    assert tiny.run.with_name("seed0-replaced1").joinpath("results.json").exists()
    assert tiny.result()["checkpoints"]["last"]["epoch"] == 0


def test_a_damaged_configuration_of_a_run_is_named(tiny) -> None:
    tiny("fit", "--trainer.max_epochs", "1")
    path = tiny.run / "config.yaml"
    content = path.read_bytes()
    flipped = content.replace(b"lr: 0.1", b"lr: 0.3")
    assert flipped != content
    for damaged in (b"", flipped):
        path.write_bytes(damaged)
        line = tiny.refused("reproduce")
        assert f"{path} is damaged" in line
        assert "delete the file, and the run goes on" in line
    line = tiny.refused("validate", "--config", path)
    assert f"{path} is damaged" in line
    assert "after an edit take that line out" in line
    path.unlink()
    tiny("fit", "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert yaml.safe_load(path.read_text())["trainer"]["max_epochs"] == 2


def test_awp_and_averaged_weights_are_one_overlay_away(tiny) -> None:
    configs = Path(__file__).parents[3] / "common/configs"
    tiny("reproduce", "--config", configs / "awp.yaml", "--config", configs / "ema.yaml")
    checkpoint = tiny.checkpoint()
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    name = "net.head.linear.weight"
    assert not torch.equal(averaged[name], current[name])
    assert torch.equal(load_run(tiny.run)[0].state_dict()[name], averaged[name])
    made_with = tiny.result()["provenance"]["last"]
    assert made_with["checkpoint_digest"] == weights_digest(averaged)


def test_weights_that_are_not_finite_do_not_replace_those_that_are(tiny) -> None:
    one_step = ("--data.train_limit", "20")
    tiny("fit", *one_step, "--trainer.max_epochs", "1")
    checkpoint = tiny.checkpoint()
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].fill_(float("inf"))
    torch.save(checkpoint, tiny.last)
    before = tiny.last.read_bytes()
    line = tiny.refused("fit", *one_step, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert "is not finite after epoch 1" in line
    assert tiny.last.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model.net.width", "[4, 4]", "unknown option model.net.width; did you mean widths?"),
        ("--trainer.max_epoch", "3", "did you mean trainer.max_epochs?"),
        ("--data.source", "common.data.sources.digits", "did you mean Digits?"),
        ("--model.objective", "common.objectives.Trades", "did you mean TRADES?"),
        ("--adversary.attack.eps", "8", "eps must lie in [0, 1] (pixels are in [0, 1]), got 8.0; "
         "did you mean '8/255'?"),
        ("--data.batch_size", "many", "data.batch_size: expected int, got many"),
        ("--adversary.attack", "null", "adversary.attack is null"),
        ("--model.objective", "common.objectives.Natural", "Natural never reads"),
        ("--evaluation.validation.losses", "[ce_probe]", "no loss of RobustClassifier matches "
         "'ce_probe'; it declares ce_f, cw_f, model"),
        ("--model.net.num_classes", "7", "model.net.num_classes is 7 and Digits has 10"),
        ("--model.net.in_channels", "2", "model.net.in_channels is 2 and Digits has 1"),
        ("--evaluation.validation", "null", "so nobody measures it"),
        ("--trainer.gradient_clip_algorithm", "nonsense", "error: "),
        ("--ckpt_path", "nothing.ckpt", "nothing.ckpt does not exist"),
        ("--ckpt_path", "best", "selected.ckpt does not exist"),
        ("--seed_everything", "true", "seed_everything: expected int, got True"),
        ("--seed_everything", "4294967296", "got 4294967296"),
        ("--trainer.precision", "bf16-true", "use bf16-mixed or 32-true"),
        ("--trainer.limit_val_batches", "abc", "trainer.limit_val_batches: expected "),
        ("--trainer.devices", "[0]", "`devices` selected with `CPUAccelerator`"),
        ("--trainer.max_epochs", "0", "trainer.max_epochs is 0, so nothing would be trained"),
        ("--trainer.max_epochs", "-1", "trainer.max_epochs is -1, so training would never end"),
        ("--trainer.accumulate_grad_batches", "0", "accumulate_grad_batches must be at least 1"),
        ("--trainer.gradient_clip_val", "-1", "gradient_clip_val must not be negative, got -1"),
        ("--trainer.val_check_interval", "100", "`val_check_interval` (100) must be less than"),
        ("--model.optimizer.lr", "-1", "model.optimizer: Invalid learning rate: -1.0"),
        ("--model.optimizer.momentums", "1", "model.optimizer.momentums; did you mean momen"),
        ("--model.optimizer", "torch.optim.SGDD", "no torch.optim.SGDD; did you mean SGD?"),
        ("--model.scheduler", "torch.optim.lr_scheduler.StepLR", "model.scheduler: the following "
         "arguments are required: step_size"),
        ("--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "val/robust_acc to "
         "become better, that is larger, and its mode is min; set model.scheduler.mode: max"),
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


def test_a_warm_start_needs_its_weights_where_results_go_into_tables(tiny) -> None:
    given = ("--warm_start.experiment", "other", "--trainer.max_epochs", "1")
    assert "train that experiment first" in tiny.refused("reproduce", *given)
    with pytest.warns(UserWarning, match="Starting from scratch instead"):
        tiny("fit", *given)
    tiny("fit", "--experiment", "other", "--trainer.max_epochs", "1")
    assert "began from scratch" in tiny.refused("reproduce", *given)
    tiny("reproduce", *given, "--warm_start.checkpoint", "last", "--model.optimizer.lr", "1e-30")
    cold = torch.load("runs/paper_tiny/other/seed0/checkpoints/last.ckpt")["state_dict"]
    name = "net.head.linear.weight"
    torch.testing.assert_close(cold[name], tiny.checkpoint()["state_dict"][name])


@pytest.mark.parametrize("seed", ["true", "-1", "null"])
def test_a_seed_in_a_file_is_a_number_too(tiny, seed) -> None:
    line = tiny.refused("fit", *tiny.overlay(f"seed_everything: {seed}"))
    assert "seed_everything" in line
    assert "whole number from 0 to 4294967295" in line or "expected int" in line


@pytest.mark.slow
def test_a_suite_of_a_paper_follows_the_threat_of_the_command_line(tiny) -> None:
    tiny("fit", "--trainer.max_epochs", "1")
    given = ("test", "--config", CONFIGS / "paper-wm.yaml", "--data.test_limit", "6",
             "--ckpt_path", "last")  # fmt: skip
    line = tiny.refused(*given, "--evaluation.threat", "{norm: l2, eps: 0.5}")
    assert "paper-wm.yaml attacks in linf, got --evaluation.threat.norm l2" in line
    tiny(*given, "--evaluation.threat.eps", "4/255")
    entry = tiny.result()["checkpoints"]["last"]
    assert entry["threat"] == {"norm": "linf", "eps": 4 / 255}
    for name in ("cw100/cw_f", "deepfool", "aa/apgd-ce", "pgd20/ce_f/eps=0.0156863"):
        assert entry["attacks"][name]["eps"] == 4 / 255
        assert entry["attacks"][name]["counts"]


def test_an_audit_without_a_threat_model_is_refused(tiny) -> None:
    settings = yaml.safe_load(tiny.text)
    noise = {"class_path": "common.attacks.noise.UniformNoise", "init_args": {"levels": [0.1]}}
    settings["evaluation"] = {"audit": {}, "suite": {"noise": {"attack": noise}}}
    tiny.config.write_text(yaml.safe_dump(settings))
    assert "evaluation.audit needs a threat model" in tiny.refused("test")


def test_an_empty_suite_is_refused(tiny) -> None:
    line = tiny.refused("test", "--evaluation.suite", "{}")
    assert "evaluation.suite is empty" in line
    assert "autoattack.yaml" in line


def test_checkpoints_are_checked_before_use(tiny) -> None:
    tiny("fit", "--trainer.max_epochs", "1")
    damaged = Path("damaged.ckpt")
    damaged.write_bytes(tiny.last.read_bytes()[:-2000])
    assert "cannot be read" in tiny.refused("test", "--ckpt_path", damaged)


def test_a_run_directory_belongs_to_one_process(tiny) -> None:
    held = lock(tiny.run)
    try:
        assert "another process is writing" in tiny.refused("fit")
    finally:
        held.release()


def test_results_that_cannot_be_written_are_found_first(tiny) -> None:
    Path("file").write_text("not a folder")
    assert "cannot write" in tiny.refused("test", "--evaluation.results", "file/results.json")
    assert "cannot be written" in tiny.refused("fit", "--runs", "file")


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tiny) -> None:
    jump = {"class_path": "torch.optim.lr_scheduler.MultiStepLR",
            "init_args": {"milestones": [1], "gamma": 1e30}}  # fmt: skip
    more = tiny.overlay({"model": {"init_args": {"scheduler": jump}}})
    line = tiny.refused("fit", *more, "--trainer.max_epochs", "3")
    assert "the training loss became" in line
    assert "epoch 1" in line
    assert tiny.checkpoint()["epoch"] == 0


def test_counts_reach_networks_that_pass_keywords_on(tiny) -> None:
    settings = yaml.safe_load(tiny.text)
    net = {"class_path": "common.networks.resnet.ResNet10"}
    settings["model"]["init_args"]["net"] = net | {"init_args": {"mean": "data", "std": "data"}}
    tiny.config.write_text(yaml.safe_dump(settings))
    cli = RobustCLI("paper_tiny", ["--config", str(tiny.config)], run=False)
    assert cli.model.net.stem.conv.in_channels == 1
    assert cli.model.net.normalize.mean.item() == pytest.approx(cli.datamodule.mean[0])
    assert cli.model.net.normalize.std.item() == pytest.approx(cli.datamodule.std[0])


LOGGERS = "lightning.pytorch.loggers."
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "trainer",
    [
        {"logger": [{"class_path": f"{LOGGERS}CSVLogger", "init_args": {"save_dir": "csv"}},
                    {"class_path": f"{LOGGERS}TensorBoardLogger", "init_args": {"save_dir": "t"}}]},
        {"logger": {"class_path": f"{LOGGERS}CSVLogger", "init_args": {"save_dir": "csv"}}},
        {"logger": False, "limit_train_batches": 2, "limit_val_batches": 1.0},
        {"logger": [], "devices": "1", "limit_train_batches": 0.7, "profiler": "simple"},
        {"devices": "auto", "callbacks": {"class_path": "lightning.pytorch.callbacks.Timer"}},
        {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelSummary"}],
         "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}},
    ],
)  # fmt: skip
def test_settings_of_several_types_take_each_of_them(tiny, capsys, trainer) -> None:
    settings = {"trainer": trainer | {"max_epochs": 1}, "evaluation": {"pictures": True}}
    tiny("reproduce", *tiny.overlay(settings))
    run = tiny.run
    assert capsys.readouterr().out.splitlines()[-1] == f"finished: reproduce, {run}/results.json"
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    assert bool(saved["logger"]) == bool(trainer.get("logger"))
    if isinstance(trainer.get("logger"), list) and trainer["logger"]:
        assert [one["class_path"] for one in saved["logger"]] == [
            one["class_path"] for one in trainer["logger"]
        ]
        assert list(Path("csv").rglob("metrics.csv"))
        assert list(Path("t").rglob("events*"))
        assert list(run.glob("figures/*.png"))
    assert RobustCLI("paper_tiny", ["--config", str(run / "config.yaml")], run=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file"),
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
    for option in (["--config", path], [f"--config={path}"]):
        line = tiny.refused("fit", *option)
        assert str(path) in line
        assert expected in line


@pytest.mark.parametrize("function", ["os._exit", "builtins.print"])
def test_functions_of_the_system_are_not_called(tiny, function) -> None:
    node = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": function}}
    line = tiny.refused("fit", *tiny.overlay({"model": {"init_args": {"scheduler": node}}}))
    assert "lr_lambda" in line
    assert function in line


def plateau(**more) -> dict:
    path = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    arguments = {
        "mode": "max",
        "factor": 0.1,
        "patience": 0,
        "threshold": 1.0,
        "threshold_mode": "abs",
    } | more
    if "monitor" in more:
        path = "lightning.pytorch.cli.ReduceLROnPlateau"
    return {"model": {"init_args": {"scheduler": {"class_path": path, "init_args": arguments}}}}


@pytest.mark.parametrize(
    "monitor", [None, *(pytest.param(f"val/{m}_acc", marks=slow) for m in ("clean", "mean"))]
)
def test_a_schedule_that_waits_for_a_metric_goes_on_after_an_interruption(tiny, monitor) -> None:
    more = {} if monitor is None else {"monitor": monitor}
    given = ("fit", *tiny.overlay(plateau(**more)))
    if monitor == "val/mean_acc":
        given += ("--checkpoint.monitor", monitor)
    tiny(*given, "--runs", "whole", "--trainer.max_epochs", "4")
    tiny(*given, "--runs", "parts", "--trainer.max_epochs", "2")
    tiny(*given, "--runs", "parts", "--trainer.max_epochs", "4", "--ckpt_path", "last")
    whole, parts = tiny.checkpoint("whole"), tiny.checkpoint("parts")
    # The threshold lets nothing pass for better than the first epoch.
    rates = [c["optimizer_states"][0]["param_groups"][0]["lr"] for c in (whole, parts)]
    assert rates == pytest.approx([0.1 * 0.1**3] * 2)
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


def test_best_is_what_was_selected(tiny) -> None:
    tiny("fit")
    tiny("test", "--ckpt_path", "best")
    result = json.loads(Path("runs/paper_tiny/tiny/seed0/results.json").read_text())
    assert list(result["checkpoints"]) == ["selected"]


@pytest.mark.parametrize("name", ["results.json", "outcomes"])
def test_reproduce_finds_what_it_cannot_write_before_it_trains(tiny, name) -> None:
    run = tiny.run
    run.mkdir(parents=True)
    (run / name).mkdir() if name == "results.json" else (run / name).write_text("in the way")
    assert name in tiny.refused("reproduce")
    assert not list(run.rglob("*.ckpt"))


def before(monkeypatch, method: str, accident, call_number: int = 1) -> None:
    """Have something happen before a method of the classifier runs."""
    original, calls = getattr(RobustClassifier, method), []

    def wrapped(self, *args, **kwargs):
        calls.append(method)
        if len(calls) == call_number:
            accident()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RobustClassifier, method, wrapped)


RUN = Path("runs/paper_tiny/tiny/seed0")


def removed() -> None:
    shutil.rmtree(RUN)


def moved() -> None:
    RUN.rename("elsewhere")


def emptied() -> None:
    for path in RUN.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("command", "method", "call_number", "accident", "logger"),
    [
        ("fit", "training_step", 2, removed, "true"),
        ("reproduce", "test_step", 1, removed, "false"),
        pytest.param("fit", "training_step", 2, moved, "false", marks=slow),
        pytest.param("reproduce", "training_step", 6, removed, "false", marks=slow),
        pytest.param("reproduce", "training_step", 6, emptied, "false", marks=slow),
        pytest.param("reproduce", "test_step", 1, moved, "true", marks=slow),
        pytest.param("reproduce", "test_step", 2, removed, "true", marks=slow),
        pytest.param("reproduce", "test_step", 2, emptied, "false", marks=slow),
    ],
)
def test_a_run_directory_that_goes_away_is_noticed(
    tiny, monkeypatch, command, method, call_number, accident, logger
) -> None:
    before(monkeypatch, method, accident, call_number)
    given = ("--trainer.logger", logger)
    line = tiny.refused(command, *given)
    if accident is not emptied:
        assert "runs/paper_tiny/tiny/seed0 was deleted or moved while this run wrote to it" in line
    assert "run the same command again" in line.lower()
    monkeypatch.undo()
    monkeypatch.chdir(tiny.config.parent)
    if accident is removed:
        tiny(command, *given)


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_that_code_of_the_experiment_ends_is_no_success(tiny, monkeypatch, status) -> None:
    before(monkeypatch, "training_step", lambda: sys.exit(status), 3)
    line = tiny.refused("reproduce")
    assert f"ended the process (exit status {status}) before the run was finished" in line
    monkeypatch.undo()
    monkeypatch.chdir(tiny.config.parent)
    assert tiny.checkpoint()["global_step"] == 2


def test_a_training_without_a_batch_is_no_success(tiny) -> None:
    line = tiny.refused("fit", "--trainer.max_time", "00:00:00:00")
    assert "last.ckpt is not there" in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Lower data."),
        (RuntimeError("could not create a primitive"), "out of memory (could not create"),
        (RuntimeError("unable to mmap 160 bytes from file </t>: Cannot allocate memory (12)"),
         "Lower data.batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
         "Lower data.batch_size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "Lower data.batch_size"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTrace\n"
                      "RuntimeError: std::bad_alloc"), "out of memory (RuntimeError: std::bad_al"),
        (OSError(12, "Cannot allocate memory"), "Lower data.batch_size"),
        (MemoryError("no room"), "out of memory (no room)"),
        (OSError(28, "No space left on device", "events.out"), "Make room and run the same"),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "),
         "Lower data.num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "Lower data.num_wor"),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible "
                      "that dataloader's workers are out of shared memory."), "no shared memory"),
    ],
)  # fmt: skip
def test_what_runs_out_is_one_line(error, expected) -> None:
    assert expected in one_line(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (PermissionError(13, "Permission denied", "logs/x"), "logs/x: Permission denied"),
        (ModuleNotFoundError("No module named 'psutil'"), "No module named 'psutil'; install"),
    ],
)
def test_what_stops_a_training_step_is_one_line(tiny, monkeypatch, error, expected) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    assert expected in tiny.refused("fit")


def test_a_killed_worker_is_one_line(tiny, monkeypatch) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    before(monkeypatch, "training_step", kill, 2)
    given = ("--data.num_workers", "1", "--data.batch_size", "4")
    line = tiny.refused("fit", *given)
    assert "a process that fetches batches was lost" in line


def test_other_errors_keep_their_traceback(tiny, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        tiny("fit")
