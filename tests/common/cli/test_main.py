"""The command line as its user meets it."""

import csv
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from common.callbacks.monitoring import Monitoring
from common.cli.main import RobustCLI, main
from common.errors import ConfigurationError
from common.evaluation.models import load_run
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
        assert "delete the file" in line
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
    assert cli.model.net.normalize.mean.item() == pytest.approx(cli.datamodule.source.spec.mean[0])
    assert cli.model.net.normalize.std.item() == pytest.approx(cli.datamodule.source.spec.std[0])


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


def test_best_is_what_was_selected(tiny) -> None:
    tiny("fit")
    tiny("test", "--ckpt_path", "best")
    result = json.loads(Path("runs/paper_tiny/tiny/seed0/results.json").read_text())
    assert list(result["checkpoints"]) == ["selected"]


def test_commands_of_a_paper_are_subcommands(capsys, monkeypatch) -> None:
    given = []

    def command(words):
        given.append(words)
        return 3

    module = SimpleNamespace(__doc__="Says what it is given.\n\nMore.", main=command)
    monkeypatch.setitem(sys.modules, "its_command", module)
    commands = {"say": "its_command"}
    with pytest.raises(SystemExit, match="3"):
        main(["say", "--loud", "yes"], package="paper_tiny", commands=commands)
    assert given == [["--loud", "yes"]]
    with pytest.raises(SystemExit, match="0"):
        main(["--help"], package="paper_tiny", commands=commands)
    printed = capsys.readouterr().out
    assert re.search(r"say +Says what it is given\.", printed)
    assert re.search(r"fit +train; ", printed)
    with pytest.raises(SystemExit, match="2"):
        main(["sing"], package="paper_tiny", commands=commands)
    assert "'reproduce', 'say'" in capsys.readouterr().err
    module.main = lambda words: (_ for _ in ()).throw(ConfigurationError("too loud"))
    with pytest.raises(SystemExit, match="2"):
        main(["say"], package="paper_tiny", commands=commands)
    assert capsys.readouterr().err == "error: too loud\n"


def test_lightning_advertises_nothing(tiny, caplog) -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(caplog.handler)
    RobustCLI("paper_tiny", ["--config", str(tiny.config)], run=False)
    assert "GPU available" in caplog.text
    assert "Tip" not in caplog.text


def test_hyperparameters_begin_with_rate_radius_and_seed(tiny) -> None:
    cli = RobustCLI("paper_tiny", ["--config", str(tiny.config)], run=False)
    (monitoring,) = (c for c in cli.trainer.callbacks if isinstance(c, Monitoring))
    assert list(monitoring.hyperparameters.items())[:3] == [("lr", 0.1), ("eps", 0.1), ("seed", 0)]
