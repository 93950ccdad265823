"""The command line as its user meets it."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from common.cli import RobustCLI, load_run, lock, main
from common.evaluation.ready import CONFIGS
from common.provenance import weights_digest

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
    overlays = Path(__file__).parents[2] / "common/configs"
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
    overlay = Path(__file__).parents[2] / "common/configs/ema.yaml"
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
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_compute(config, capsys, option, value, expected) -> None:
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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Lower data."),
        (MemoryError("no room"), "out of memory (no room)"),
        (OSError(28, "No space left on device", "events.out"), "Make room and run the same"),
    ],
)
def test_what_runs_out_is_one_line(config, capsys, monkeypatch, error, expected) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    assert expected in refused(capsys, "fit", "--config", config)


def test_other_errors_keep_their_traceback(config, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("common.classifier.RobustClassifier.training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        call("fit", "--config", config)
