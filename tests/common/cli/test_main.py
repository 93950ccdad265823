"""The command line from configurations to results."""

import csv
import json
import logging
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from common.callbacks.monitoring import Monitoring
from common.cli.main import RobustCLI
from common.cli.start import main
from common.errors import ConfigurationError
from common.evaluation.models import load_run
from common.packages import CONFIGS
from common.results.provenance import weights_digest

slow = pytest.mark.slow
FGSM = {"class_path": "common.attacks.pgd.FGSM", "init_args": {"eps": "threat"}}
SUITE = {
    "fgsm": {"attack": FGSM, "losses": ["*"]},
    "pgd2": {"attack": {"class_path": "common.attacks.pgd.PGD",
                        "init_args": {"eps": 0.1, "steps": 2}}},
    "transfer": {"attack": {
        "class_path": "common.evaluation.transfer.Transfer",
        "init_args": {"surrogate": "again/paper_tiny/tiny/seed3/checkpoints/last.ckpt",
                      "attack": FGSM},
    }},
}  # fmt: skip
ONE_EPOCH = ("--trainer.max_epochs", "1")


def assert_same_weights(one: Path, other: Path) -> None:
    states = [torch.load(path)["state_dict"] for path in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_fit_test_predict_and_rerun_from_the_saved_config(tiny) -> None:
    wide = ("--model.net.widths", "[4, 8]", "--seed_everything", "3")
    tiny("fit", *wide, *ONE_EPOCH, "--trainer.logger", "true")
    run = tiny.run.with_name("seed3")
    last = run / "checkpoints/last.ckpt"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["experiment"] == "tiny"
    assert saved["model"]["init_args"]["net"]["init_args"]["num_classes"] == 10
    assert saved["model"]["init_args"]["net"]["init_args"]["in_channels"] == 1
    assert saved["trainer"]["logger"] is None
    assert list(run.glob("events.out.tfevents.*"))

    config = ["--config", f"{run}/config.yaml"]
    main(["fit", *config, "--runs", "again"], package="paper_tiny")
    assert_same_weights(last, Path("again/paper_tiny/tiny/seed3/checkpoints/last.ckpt"))
    classifier, data = load_run(run)
    assert not classifier.training
    assert data.num_classes == 10

    suite = tiny.overlay({"evaluation": {"suite": SUITE}})
    tiny("test", *wide, *suite, "--ckpt_path", "last")
    result = json.loads((run / "results.json").read_text())
    assert (result["experiment"], result["seed"]) == ("tiny", 3)
    entry = result["checkpoints"]["last"]
    assert (entry["epoch"], entry["global_step"]) == (0, 2)
    attacks = entry["attacks"]
    names = ["fgsm/pm_f", "fgsm/ce_f", "fgsm/cw_f", "fgsm/model", "pgd2/ce_f", "transfer"]
    assert list(attacks) == names
    assert entry["metrics"]["worst"] == min(entry["metrics"].values())
    # What was trained again attacks the first: the same weights, so as good as a white box.
    assert attacks["transfer"]["outcomes"] == attacks["fgsm/ce_f"]["outcomes"]
    assert attacks["fgsm/ce_f"]["eps"] == 0.1

    main(["predict", *config, "--ckpt_path", str(last)], package="paper_tiny")
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(20))
    accuracy = sum(row["label"] == row["predicted"] for row in rows) / 20
    assert accuracy == pytest.approx(entry["metrics"]["clean_acc"])


def test_a_second_fit_leaves_the_first_alone_and_a_file_is_resumed_in_its_run(tiny) -> None:
    tiny.done("fit")
    tiny("fit", *ONE_EPOCH)
    second = tiny.run.with_name("seed0-v1")
    assert sorted(tiny.run.parent.iterdir()) == [tiny.run, second]
    first = tiny.last.read_bytes()
    tiny("fit", "--ckpt_path", second / "checkpoints/last.ckpt")
    assert tiny.last.read_bytes() == first
    assert torch.load(second / "checkpoints/last.ckpt")["epoch"] == 1


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tiny, monkeypatch) -> None:
    """The second half as a job that SLURM runs again, which needs no option."""
    tiny.done("fit")
    Path("runs").rename("whole")
    tiny.done("fit", *ONE_EPOCH)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tiny("fit")
    assert [path.name for path in tiny.run.parent.iterdir()] == ["seed0"]
    whole, parts = tiny.checkpoint("whole"), tiny.checkpoint()
    assert whole["global_step"] == parts["global_step"] == 4
    assert_same_weights(Path("whole", *tiny.last.parts[1:]), tiny.last)
    momenta = (c["optimizer_states"][0]["state"] for c in (whole, parts))
    for one, two in zip(*(m.values() for m in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


def test_reproduce_tests_both_checkpoints_and_resumes_what_is_there(tiny) -> None:
    tiny.done("reproduce")
    first = tiny.result()
    assert list(first["checkpoints"]) == ["last", "selected"]
    # The number of saves belongs to the same experiment.
    tiny("reproduce", "--checkpoint.every_n_train_steps", "1")
    assert [path.name for path in tiny.run.parent.iterdir()] == ["seed0"], "it was not set aside"
    again = tiny.result()
    assert again["checkpoints"] == first["checkpoints"]
    digests = {r["provenance"]["last"]["config_digest"] for r in (first, again)}
    assert len(digests) == 1
    tiny("test", "--ckpt_path", "best", "--evaluation.results", "best.json")
    assert list(json.loads(Path("best.json").read_text())["checkpoints"]) == ["selected"]
    tiny("reproduce", *ONE_EPOCH, "--data.train_limit", "20")
    assert tiny.run.with_name("seed0-replaced1").joinpath("results.json").exists()
    assert tiny.result()["checkpoints"]["last"]["global_step"] == 1


def test_a_damaged_configuration_of_a_run_is_named(tiny) -> None:
    tiny.done("fit", *ONE_EPOCH)
    path = tiny.run / "config.yaml"
    flipped = path.read_bytes().replace(b"lr: 0.1", b"lr: 0.3")
    for damaged in (b"", flipped):
        path.write_bytes(damaged)
        line = tiny.refused("reproduce")
        assert f"{path} is damaged" in line
    assert f"{path} is damaged" in tiny.refused("validate", "--config", path)
    path.unlink()
    tiny("fit", "--ckpt_path", "last")
    assert yaml.safe_load(path.read_text())["trainer"]["max_epochs"] == 2


def test_awp_and_averaged_weights_are_one_overlay_away(tiny) -> None:
    overlays = ("--config", CONFIGS / "awp.yaml", "--config", CONFIGS / "ema.yaml")
    tiny("reproduce", *overlays, *ONE_EPOCH)
    checkpoint = tiny.checkpoint()
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    name = "net.head.linear.weight"
    assert not torch.equal(averaged[name], current[name])
    assert torch.equal(load_run(tiny.run)[0].state_dict()[name], averaged[name])
    made_with = tiny.result()["provenance"]["last"]
    assert made_with["checkpoint_digest"] == weights_digest(averaged)


def test_weights_that_are_not_finite_do_not_replace_those_that_are(tiny) -> None:
    one_step = ("--data.train_limit", "20")
    tiny("fit", *one_step, *ONE_EPOCH)
    checkpoint = tiny.checkpoint()
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].fill_(float("inf"))
    torch.save(checkpoint, tiny.last)
    before = tiny.last.read_bytes()
    assert "is not finite after epoch 1" in tiny.refused("fit", *one_step, "--ckpt_path", "last")
    assert tiny.last.read_bytes() == before


def test_a_warm_start_needs_its_weights_where_results_go_into_tables(tiny) -> None:
    given = ("--experiment", "mine", "--warm_start.experiment", "tiny", *ONE_EPOCH)
    assert "train that experiment first" in tiny.refused("reproduce", *given)
    with pytest.warns(UserWarning, match="Starting from scratch instead"):
        tiny("fit", *given)
    tiny.done("fit")
    assert "began from scratch" in tiny.refused("reproduce", *given)
    tiny("reproduce", *given, "--warm_start.checkpoint", "last", "--model.optimizer.lr", "1e-30")
    warm = torch.load("runs/paper_tiny/mine/seed0/checkpoints/last.ckpt")["state_dict"]
    name = "net.head.linear.weight"
    torch.testing.assert_close(warm[name], tiny.checkpoint()["state_dict"][name])


@slow
def test_a_suite_of_a_paper_follows_the_threat_of_the_command_line(tiny) -> None:
    tiny.done("fit")
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
    line = tiny.refused("fit", *more)
    assert "the training loss became" in line
    assert "epoch 1" in line
    assert tiny.checkpoint()["epoch"] == 0


LOGGERS = "lightning.pytorch.loggers."
CSV = {"class_path": f"{LOGGERS}CSVLogger", "init_args": {"save_dir": "csv"}}
BOARD = {"class_path": f"{LOGGERS}TensorBoardLogger", "init_args": {"save_dir": "t"}}


@pytest.mark.parametrize(
    ("command", "trainer"),
    [
        ("reproduce", {"logger": [CSV, BOARD]}),
        ("fit", {"logger": CSV, "limit_train_batches": 2, "limit_val_batches": 1.0,
                 "callbacks": {"class_path": "lightning.pytorch.callbacks.Timer"},
                 "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}}),
        ("fit", {"logger": [], "devices": "1", "limit_train_batches": 0.7, "profiler": "simple",
                 "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelSummary"}]}),
    ],
)  # fmt: skip
def test_settings_of_several_types_take_each_of_them(tiny, capsys, command, trainer) -> None:
    pictures = {"pictures": command == "reproduce"}
    settings = {"trainer": trainer | {"max_epochs": 1}, "evaluation": pictures}
    tiny(command, *tiny.overlay(settings))
    result = "results.json" if command == "reproduce" else "checkpoints/last.ckpt"
    assert capsys.readouterr().out.splitlines()[-1] == f"finished: {command}, {tiny.run}/{result}"
    saved = yaml.safe_load((tiny.run / "config.yaml").read_text())["trainer"]
    assert bool(saved["logger"]) == bool(trainer.get("logger"))
    if command == "reproduce":
        assert [one["class_path"] for one in saved["logger"]] == [
            one["class_path"] for one in trainer["logger"]
        ]
        assert list(Path("csv").rglob("metrics.csv"))
        assert list(Path("t").rglob("events*"))
        assert {path.name for path in tiny.run.glob("figures/*.png")} >= {"last_confusion.png"}
    assert RobustCLI("paper_tiny", ["--config", str(tiny.run / "config.yaml")], run=False)


def test_commands_of_a_paper_are_subcommands(capsys, monkeypatch, tmp_path) -> None:
    text = "def main(words):\n    raise SystemExit(str(words))"
    (tmp_path / "its_command.py").write_text(f'"""Says what it is given.\n\nMore."""\n{text}')
    monkeypatch.syspath_prepend(tmp_path)

    def ended(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(words, package="paper_tiny", commands={"say": "its_command"})
        return (caught.value.code, *capsys.readouterr())

    assert ended("say", "--loud", "yes")[0] == "['--loud', 'yes']"
    main(["--help"], package="paper_tiny", commands={"say": "its_command"})
    printed = capsys.readouterr().out
    assert re.search(r"say +Says what it is given\.", printed)
    assert re.search(r"fit +train; ", printed)
    status, _, told = ended("sing")
    assert status == 2
    assert "reproduce, say" in told
    refuse = Mock(side_effect=ConfigurationError("too loud"))
    monkeypatch.setattr("its_command.main", refuse)
    assert ended("say") == (2, "", "error: too loud\n")


def test_a_configuration_is_printed_whole_instead_of_run(tiny, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        tiny("fit", *ONE_EPOCH, "--print_config")
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["trainer"]["max_epochs"], printed["checkpoint"]["mode"]) == (1, "max")
    assert not Path("runs").exists()


def test_what_the_command_line_fills_in_and_leaves_out(tiny, caplog) -> None:
    """Class counts through keywords, statistics of the data, hyper-parameters; no adverts."""
    settings = yaml.safe_load(tiny.text)
    net = {"class_path": "common.networks.resnet.ResNet10"}
    settings["model"]["init_args"]["net"] = net | {"init_args": {"mean": "data", "std": "data"}}
    tiny.config.write_text(yaml.safe_dump(settings))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(caplog.handler)
    cli = RobustCLI("paper_tiny", ["--config", str(tiny.config)], run=False)
    assert cli.model.net.stem.conv.in_channels == 1
    spec = cli.datamodule.source.spec
    assert cli.model.net.normalize.mean.item() == pytest.approx(spec.mean[0])
    assert cli.model.net.normalize.std.item() == pytest.approx(spec.std[0])
    assert "GPU available" in caplog.text
    assert "Tip" not in caplog.text
    (monitoring,) = (c for c in cli.trainer.callbacks if isinstance(c, Monitoring))
    assert list(monitoring.hyperparameters.items())[:3] == [("lr", 0.1), ("eps", 0.1), ("seed", 0)]
