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
from common.evaluation.presets import CONFIGS
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
data:
  source: common.data.sources.Digits
  batch_size: 20
  val_size: 60
  val_limit: 40
  train_limit: 60
  test_limit: 50
adversary:
  attack:
    class_path: common.attacks.pgd.PGD
    init_args: {eps: 0.1, step_size: 0.05, steps: 2}
evaluation:
  validation: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
  suite:
    fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}, losses: ["*"]}
    pgd2:
      attack:
        class_path: common.attacks.pgd.PGD
        init_args: {eps: 0.1, step_size: 0.05, steps: 2}
trainer:
  max_epochs: 2
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
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


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def call(*args: str) -> None:
    main([str(a) for a in args], package="paper_tiny")


def refused(capsys, *args: str) -> str:
    """The one line a user gets for a command that cannot work."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_fit_test_predict_and_rerun_from_the_saved_config(config) -> None:
    call("fit", "--config", config, "--model.net.widths", "[4, 8]", "--seed_everything", "3")
    run = Path("runs/paper_tiny/tiny/seed3")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["experiment"] == "tiny"
    assert saved["model"]["init_args"]["net"]["init_args"]["num_classes"] == 10
    assert saved["model"]["init_args"]["net"]["init_args"]["in_channels"] == 1

    call("test", "--config", config, "--model.net.widths", "[4, 8]", "--seed_everything", "3",
         "--ckpt_path", "last")  # fmt: skip
    result = json.loads((run / "results.json").read_text())
    assert result["experiment"] == "tiny"
    assert result["seed"] == 3
    last = result["checkpoints"]["last"]
    assert last["epoch"] == 1
    assert last["global_step"] == 6
    assert list(last["attacks"]) == ["fgsm/ce_f", "fgsm/cw_f", "fgsm/model", "pgd2/ce_f"]
    assert last["metrics"]["worst"] == min(last["metrics"].values())

    call("validate", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints/last.ckpt")
    call("predict", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints/last.ckpt")
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(50))
    accuracy = sum(row["label"] == row["predicted"] for row in rows) / 50
    assert accuracy == pytest.approx(last["metrics"]["clean_acc"])

    call("fit", "--config", run / "config.yaml", "--runs", "again")
    one, two = (
        torch.load(folder / "paper_tiny/tiny/seed3/checkpoints/last.ckpt")["state_dict"]
        for folder in (Path("runs"), Path("again"))
    )
    assert all(torch.equal(one[key], two[key]) for key in one)

    classifier, data = load_run(run)
    assert not classifier.training
    assert data.num_classes == 10

    # What was trained again attacks the first: the same weights, so as good as a white box.
    overlay = config.with_name("overlay.yaml")
    overlay.write_text(TRANSFER)
    again = ["--config", config, "--config", overlay, "--model.net.widths", "[4, 8]"]
    again += ["--seed_everything", "3", "--ckpt_path", "last", "--evaluation.results", "t.json"]
    call("test", *again)
    found = json.loads(Path("t.json").read_text())
    assert found["seed"] == 3
    attacks = found["checkpoints"]["last"]["attacks"]
    assert attacks["transfer"]["outcomes"] == attacks["white/ce_f"]["outcomes"]
    assert attacks["white/ce_f"]["eps"] == 0.1
    assert {path.name for path in Path("figures").iterdir()} >= {"last_confusion.png"}


def test_a_second_fit_leaves_the_first_alone(config) -> None:
    for _ in range(3):
        call("fit", "--config", config, "--trainer.max_epochs", "1")
    names = sorted(p.name for p in Path("runs/paper_tiny/tiny").iterdir())
    assert names == ["seed0", "seed0-v1", "seed0-v2"]


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(config) -> None:
    call("fit", "--config", config, "--runs", "whole", "--trainer.max_epochs", "4")
    call("fit", "--config", config, "--runs", "parts", "--trainer.max_epochs", "2")
    call("fit", "--config", config, "--runs", "parts", "--trainer.max_epochs", "4",
         "--ckpt_path", "last")  # fmt: skip
    whole, parts = (
        torch.load(Path(folder) / "paper_tiny/tiny/seed0/checkpoints/last.ckpt")
        for folder in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    momenta = (c["optimizer_states"][0]["state"] for c in (whole, parts))
    for one, two in zip(*(m.values() for m in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


def test_reproduce_tests_both_checkpoints_and_goes_on_with_what_is_there(config) -> None:
    call("reproduce", "--config", config)
    path = Path("runs/paper_tiny/tiny/seed0/results.json")
    first = json.loads(path.read_text())
    assert list(first["checkpoints"]) == ["last", "selected"]
    call("reproduce", "--config", config)
    second = json.loads(path.read_text())
    assert second["checkpoints"] == first["checkpoints"]
    call("reproduce", "--config", config, "--trainer.max_epochs", "1")
    assert Path("runs/paper_tiny/tiny/seed0-replaced1/results.json").exists()
    assert json.loads(path.read_text())["checkpoints"]["last"]["epoch"] == 0


def test_a_damaged_configuration_of_a_run_is_named(config, capsys) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    path = Path("runs/paper_tiny/tiny/seed0/config.yaml")
    content = path.read_bytes()
    flipped = content.replace(b"lr: 0.1", b"lr: 0.3")
    assert flipped != content
    for damaged in (b"", content[: len(content) // 2], flipped):
        path.write_bytes(damaged)
        line = refused(capsys, "reproduce", "--config", config)
        assert f"{path} is damaged" in line
        assert "delete the file, and the run goes on" in line
    line = refused(capsys, "validate", "--config", path)
    assert line == (
        f"error: {path} is damaged: it does not have the SHA-256 that its first line says; after "
        "an edit take that line out"
    )
    path.unlink()
    call("fit", "--config", config, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert yaml.safe_load(path.read_text())["trainer"]["max_epochs"] == 2


def test_awp_and_averaged_weights_are_one_overlay_away(config) -> None:
    overlays = Path(__file__).parents[3] / "common/configs"
    call("fit", "--config", config, "--config", overlays / "awp.yaml",
         "--config", overlays / "ema.yaml")  # fmt: skip
    run = Path("runs/paper_tiny/tiny/seed0")
    checkpoint = torch.load(run / "checkpoints/last.ckpt")
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    name = "net.head.linear.weight"
    assert not torch.equal(averaged[name], current[name])
    classifier, _ = load_run(run)
    assert torch.equal(classifier.state_dict()[name], averaged[name])


def test_averaged_weights_are_what_reproduce_tests(config) -> None:
    overlay = Path(__file__).parents[3] / "common/configs/ema.yaml"
    call("reproduce", "--config", config, "--config", overlay)
    run = Path("runs/paper_tiny/tiny/seed0")
    averaged = torch.load(run / "checkpoints/last.ckpt")["state_dict"]
    made_with = json.loads((run / "results.json").read_text())["provenance"]["last"]
    assert made_with["checkpoint_digest"] == weights_digest(averaged)


def test_weights_that_are_not_finite_do_not_replace_those_that_are(config, capsys) -> None:
    one_step = ("--config", config, "--data.train_limit", "20")
    call("fit", *one_step, "--trainer.max_epochs", "1")
    path = Path("runs/paper_tiny/tiny/seed0/checkpoints/last.ckpt")
    checkpoint = torch.load(path)
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].fill_(float("inf"))
    torch.save(checkpoint, path)
    before = path.read_bytes()
    line = refused(capsys, "fit", *one_step, "--ckpt_path", "last",
                   "--trainer.max_epochs", "2")  # fmt: skip
    assert "is not finite after epoch 1" in line
    assert path.read_bytes() == before


def test_a_run_from_scratch_does_not_pass_for_a_warm_started_one(config, capsys) -> None:
    given = ("--config", config, "--warm_start.experiment", "other", "--trainer.max_epochs", "1")
    call("fit", *given)
    call("fit", "--config", config, "--experiment", "other")
    assert "began from scratch" in refused(capsys, "reproduce", *given)


def test_going_on_with_a_file_stays_in_its_run(config) -> None:
    for _ in range(2):
        call("fit", "--config", config, "--trainer.max_epochs", "1")
    runs = Path("runs/paper_tiny/tiny")
    first = (runs / "seed0/checkpoints/last.ckpt").read_bytes()
    call("fit", "--config", config, "--ckpt_path", runs / "seed0-v1/checkpoints/last.ckpt")
    assert (runs / "seed0/checkpoints/last.ckpt").read_bytes() == first
    assert torch.load(runs / "seed0-v1/checkpoints/last.ckpt")["epoch"] == 1


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
        ("--ckpt_path", "hpc", "hpc does not exist"),
        ("--seed_everything", "false", "seed_everything: expected int, got False"),
        ("--seed_everything", "true", "seed_everything: expected int, got True"),
        ("--seed_everything", "abc", "seed_everything: expected int, got abc"),
        ("--seed_everything", "-1", "to 4294967295, got -1"),
        ("--seed_everything", "4294967296", "got 4294967296"),
        ("--trainer.precision", "bf16-true", "use bf16-mixed or 32-true"),
        ("--trainer.precision", "16-true", "use bf16-mixed or 32-true"),
        ("--trainer.limit_val_batches", "abc", "trainer.limit_val_batches: expected "),
        ("--trainer.devices", "[0]", "`devices` selected with `CPUAccelerator`"),
        ("--trainer.max_epochs", "0", "trainer.max_epochs is 0, so nothing would be trained"),
        ("--trainer.max_epochs", "-1", "trainer.max_epochs is -1, so training would never end"),
        ("--trainer.accumulate_grad_batches", "0", "accumulate_grad_batches must be at least 1"),
        ("--trainer.gradient_clip_val", "-1", "gradient_clip_val must not be negative, got -1"),
        ("--trainer.val_check_interval", "100", "`val_check_interval` (100) must be less than"),
        ("--model.optimizer.lr", "abc", "model.optimizer.lr: expected float, got abc"),
        ("--model.optimizer.lr", "-1", "model.optimizer: Invalid learning rate: -1.0"),
        ("--model.optimizer.momentums", "1", "model.optimizer.momentums; did you mean momen"),
        ("--model.optimizer", "torch.optim.SGDD", "no torch.optim.SGDD; did you mean SGD?"),
        ("--model.scheduler", "torch.optim.lr_scheduler.StepLR", "model.scheduler: the following "
         "arguments are required: step_size"),
        ("--model.scheduler", "torch.optim.lr_scheduler.OneCycleLR", "model.scheduler: the foll"),
        ("--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "val/robust_acc to "
         "become better, that is larger, and its mode is min; set model.scheduler.mode: max"),
        ("--evaluation.results", "tiny.yaml/r.json", None),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_compute(config, capsys, option, value, expected) -> None:
    if expected is None:  # results are written by reproduce
        line, expected = refused(capsys, "reproduce", "--config", config, option, value), "cannot"
    else:
        line = refused(capsys, "fit", "--config", config, option, value)
    assert expected in line
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_warm_start_needs_its_weights_where_results_go_into_tables(config, capsys) -> None:
    given = ("--config", config, "--warm_start.experiment", "other", "--trainer.max_epochs", "1")
    assert "train that experiment first" in refused(capsys, "reproduce", *given)
    with pytest.warns(UserWarning, match="Starting from scratch instead"):
        call("fit", *given)
    call("fit", "--config", config, "--experiment", "other")
    call("reproduce", *given, "--warm_start.checkpoint", "last", "--model.optimizer.lr", "1e-30")
    cold, warm = (
        torch.load(f"runs/paper_tiny/{name}/seed0/checkpoints/last.ckpt")["state_dict"]
        for name in ("other", "tiny")
    )
    name = "net.head.linear.weight"
    torch.testing.assert_close(cold[name], warm[name])


@pytest.mark.parametrize("seed", ["false", "true", "-1", "null", "abc", "1.5", "[1]"])
def test_a_seed_in_a_file_is_a_number_too(config, capsys, seed) -> None:
    config.write_text(f"seed_everything: {seed}\n{CONFIG}")
    line = refused(capsys, "fit", "--config", config)
    assert "seed_everything" in line
    assert "whole number from 0 to 4294967295" in line or "expected int" in line


def test_bad_yaml_names_the_key(config, capsys) -> None:
    config.write_text(CONFIG.replace("batch_size", "batchsize"))
    assert "batch_size" in refused(capsys, "fit", "--config", config)


@pytest.mark.slow
def test_a_suite_of_a_paper_follows_the_threat_of_the_command_line(config, capsys) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    arguments = ["test", "--config", config, "--config", CONFIGS / "paper-wm.yaml"]
    arguments += ["--data.test_limit", "6", "--ckpt_path", "last"]
    line = refused(capsys, *arguments, "--evaluation.threat", "{norm: l2, eps: 0.5}")
    assert "paper-wm.yaml attacks in linf, got --evaluation.threat.norm l2" in line
    call(*arguments, "--evaluation.threat.eps", "4/255")
    result = json.loads(Path("runs/paper_tiny/tiny/seed0/results.json").read_text())
    entry = result["checkpoints"]["last"]
    assert entry["threat"] == {"norm": "linf", "eps": 4 / 255}
    for name in ("cw100/cw_f", "deepfool", "aa/apgd-ce", "pgd20/ce_f/eps=0.0156863"):
        assert entry["attacks"][name]["eps"] == 4 / 255
        assert entry["attacks"][name]["counts"]


def test_an_audit_without_a_threat_model_is_refused(config, capsys, tmp_path) -> None:
    noise = tmp_path / "noise.yaml"
    noise.write_text(
        CONFIG.partition("evaluation:")[0]
        + "evaluation:\n  audit: {}\n  suite: {noise: {attack: {class_path: "
        "common.attacks.noise.UniformNoise, init_args: {levels: [0.1]}}}}\n"
        + CONFIG[CONFIG.index("trainer:") :]
    )
    assert "evaluation.audit needs a threat model" in refused(capsys, "test", "--config", noise)


def test_an_empty_suite_is_refused(config, capsys) -> None:
    line = refused(capsys, "test", "--config", config, "--evaluation.suite", "{}")
    assert "evaluation.suite is empty" in line
    assert "autoattack.yaml" in line


def test_checkpoints_are_checked_before_use(config, capsys, tmp_path) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    path = Path("runs/paper_tiny/tiny/seed0/checkpoints/last.ckpt")
    line = refused(capsys, "test", "--config", config, "--ckpt_path", path,
                   "--model.net.widths", "[4, 8]")  # fmt: skip
    assert "model.net.widths: [4, 4] in the checkpoint, [4, 8] given" in line

    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(path.read_bytes()[:-2000])
    assert "cannot be read" in refused(capsys, "test", "--config", config, "--ckpt_path", damaged)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    assert "more than tensors" in refused(
        capsys, "test", "--config", config, "--ckpt_path", tmp_path / "evil.ckpt"
    )
    assert not (tmp_path / "touched").exists()


def test_a_run_directory_belongs_to_one_process(config, capsys) -> None:
    held = lock(Path("runs/paper_tiny/tiny/seed0"))
    try:
        assert "another process is writing" in refused(capsys, "fit", "--config", config)
    finally:
        held.release()


def test_results_that_cannot_be_written_are_found_first(config, capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = refused(capsys, "test", "--config", config, "--evaluation.results", "file/results.json")
    assert "cannot write" in line
    assert "cannot be written" in refused(capsys, "fit", "--config", config, "--runs", "file")


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(config, capsys) -> None:
    config.write_text(
        CONFIG.replace(
            "data:",
            """    scheduler:
      class_path: torch.optim.lr_scheduler.MultiStepLR
      init_args: {milestones: [1], gamma: 1.0e+30}
data:""",
            1,
        )
    )
    line = refused(capsys, "fit", "--config", config, "--trainer.max_epochs", "3")
    assert "the training loss became" in line
    assert "epoch 1" in line
    kept = torch.load("runs/paper_tiny/tiny/seed0/checkpoints/last.ckpt")
    assert kept["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


def test_counts_reach_networks_that_pass_keywords_on(config) -> None:
    settings = yaml.safe_load(CONFIG)
    settings["model"]["init_args"]["net"] = "common.networks.resnet.ResNet10"
    config.write_text(yaml.safe_dump(settings))
    cli = RobustCLI("paper_tiny", ["--config", str(config)], run=False)
    assert cli.model.net.stem.conv.in_channels == 1


def test_a_network_may_ask_for_the_statistics_of_the_data(config) -> None:
    arguments = ["--config", config, "--model.net.mean", "data", "--model.net.std", "data"]
    cli = RobustCLI("paper_tiny", [str(a) for a in arguments], run=False)
    assert cli.model.net.normalize.mean.item() == pytest.approx(cli.datamodule.mean[0])
    assert cli.model.net.normalize.std.item() == pytest.approx(cli.datamodule.std[0])


def test_saving_more_often_is_the_same_experiment(config) -> None:
    call("reproduce", "--config", config)
    run = Path("runs/paper_tiny/tiny/seed0")
    before = (run / "results.json").read_text()
    call("reproduce", "--config", config, "--checkpoint.every_n_train_steps", "1")
    assert [path.name for path in run.parent.iterdir()] == ["seed0"], "it was not set aside"
    digests = [
        json.loads(text)["provenance"]["last"]["config_digest"]
        for text in (before, (run / "results.json").read_text())
    ]
    assert digests[0] == digests[1]


def test_a_job_that_slurm_runs_again_goes_on(config, monkeypatch) -> None:
    call("fit", "--config", config, "--trainer.max_epochs", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    call("fit", "--config", config, "--trainer.max_epochs", "2")
    run = Path("runs/paper_tiny/tiny")
    assert [path.name for path in run.iterdir()] == ["seed0"]
    assert torch.load(run / "seed0/checkpoints/last.ckpt")["epoch"] == 1


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
def test_settings_of_several_types_take_each_of_them(config, capsys, trainer) -> None:
    overlay = config.with_name("overlay.yaml")
    overlay.write_text(yaml.safe_dump({"trainer": trainer | {"max_epochs": 1}}))
    call("reproduce", "--config", config, "--config", overlay)
    run = Path("runs/paper_tiny/tiny/seed0")
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
        (b"# nothing\n", "holds no settings"),
        (b"[1, 2]", "holds no settings"),
        (b"hello", "holds no settings"),
        (b"model: {a: [", "is no YAML"),
        (bytes(range(256)), "is no YAML"),
    ],
)
def test_files_that_are_no_configuration_are_named(config, capsys, content, expected) -> None:
    path = config.with_name("other.yaml")
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for option in (["--config", path], [f"--config={path}"], ["-c", path]):
        line = refused(capsys, "fit", "--config", config, *option)
        assert str(path) in line
        assert expected in line


@pytest.mark.parametrize("function", ["os._exit", "sys.exit", "builtins.print", "os.system"])
def test_functions_of_the_system_are_not_called(config, capsys, function) -> None:
    node = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": function}}
    overlay = config.with_name("overlay.yaml")
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"scheduler": node}}}))
    line = refused(capsys, "fit", "--config", config, "--config", overlay)
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
def test_a_schedule_that_waits_for_a_metric_goes_on_after_an_interruption(config, monitor) -> None:
    more = {} if monitor is None else {"monitor": monitor}
    overlay = config.with_name("overlay.yaml")
    overlay.write_text(yaml.safe_dump(plateau(**more)))
    given = ("fit", "--config", config, "--config", overlay)
    if monitor == "val/mean_acc":
        given += ("--checkpoint.monitor", monitor)
    call(*given, "--runs", "whole", "--trainer.max_epochs", "4")
    call(*given, "--runs", "parts", "--trainer.max_epochs", "2")
    call(*given, "--runs", "parts", "--trainer.max_epochs", "4", "--ckpt_path", "last")
    whole, parts = (
        torch.load(f"{folder}/paper_tiny/tiny/seed0/checkpoints/last.ckpt")
        for folder in ("whole", "parts")
    )
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
def test_what_cannot_work_is_one_line(config, capsys, overlay, expected) -> None:
    path = config.with_name("overlay.yaml")
    path.write_text(yaml.safe_dump(overlay))
    assert expected in refused(capsys, "fit", "--config", config, "--config", path)


def test_best_is_what_was_selected(config) -> None:
    call("fit", "--config", config)
    call("test", "--config", config, "--ckpt_path", "best", "--trainer.logger", "false")
    result = json.loads(Path("runs/paper_tiny/tiny/seed0/results.json").read_text())
    assert list(result["checkpoints"]) == ["selected"]


@pytest.mark.parametrize("name", ["results.json", "outcomes", "checkpoints"])
def test_reproduce_finds_what_it_cannot_write_before_it_trains(config, capsys, name) -> None:
    run = Path("runs/paper_tiny/tiny/seed0")
    run.mkdir(parents=True)
    (run / name).mkdir() if name == "results.json" else (run / name).write_text("in the way")
    assert name in refused(capsys, "reproduce", "--config", config)
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


def removed() -> None:
    shutil.rmtree("runs/paper_tiny/tiny/seed0")


def moved() -> None:
    Path("runs/paper_tiny/tiny/seed0").rename("elsewhere")


def emptied() -> None:
    for path in Path("runs/paper_tiny/tiny/seed0").iterdir():
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
    config, capsys, monkeypatch, command, method, call_number, accident, logger
) -> None:
    before(monkeypatch, method, accident, call_number)
    given = ("--config", config, "--trainer.logger", logger, "--evaluation.pictures", "false")
    line = refused(capsys, command, *given)
    if accident is not emptied:
        assert "runs/paper_tiny/tiny/seed0 was deleted or moved while this run wrote to it" in line
    assert "run the same command again" in line.lower()
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    if accident is removed:
        call(command, *given)


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_that_code_of_the_experiment_ends_is_no_success(
    config, capsys, monkeypatch, status
) -> None:
    before(monkeypatch, "training_step", lambda: sys.exit(status), 5)
    line = refused(capsys, "reproduce", "--config", config)
    assert f"ended the process (exit status {status}) before the run was finished" in line
    monkeypatch.undo()
    monkeypatch.chdir(config.parent)
    assert torch.load("runs/paper_tiny/tiny/seed0/checkpoints/last.ckpt")["global_step"] == 3


def test_a_training_without_a_batch_is_no_success(config, capsys) -> None:
    line = refused(capsys, "fit", "--config", config, "--trainer.max_time", "00:00:00:00")
    assert "last.ckpt is not there" in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
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
        (PermissionError(13, "Permission denied", "logs/x"), "logs/x: Permission denied"),
        (ModuleNotFoundError("No module named 'psutil'"), "No module named 'psutil'; install"),
    ],
)  # fmt: skip
def test_what_runs_out_is_one_line(config, capsys, monkeypatch, error, expected) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    assert expected in refused(capsys, "fit", "--config", config, "--trainer.logger", "false")


def test_a_killed_worker_is_one_line(config, capsys, monkeypatch) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    before(monkeypatch, "training_step", kill, 2)
    given = ("--data.num_workers", "1", "--data.batch_size", "4", "--trainer.logger", "false")
    line = refused(capsys, "fit", "--config", config, *given)
    assert "a process that fetches batches was lost" in line


def test_other_errors_keep_their_traceback(config, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        call("fit", "--config", config)
