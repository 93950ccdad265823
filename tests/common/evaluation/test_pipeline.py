"""One pipeline: the callback, the function and the command report the same, on any processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.attacks.noise import GaussianNoise
from common.attacks.pgd import FGSM, PGD
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.evaluation import Audit, SuiteEntry, evaluate
from common.evaluation.measures import LocalSmoothness
from common.networks.resnet import ResNet
from common.objectives import AT
from common.results.store import read_result

ROOT = Path(__file__).parents[3]
OF_THE_RUN = {"wall_time_s", "attack_seconds", "date", "weights", "protocol"}


def module() -> RobustClassifier:
    torch.manual_seed(0)
    net = ResNet((1, 1), (4, 4), (1, 2), in_channels=1)
    return RobustClassifier(net, AT(), torch.optim.SGD).eval()


def test_the_callback_and_the_function_report_the_same(
    tmp_path, no_pictures, quiet_trainer
) -> None:
    suite = {
        "fgsm": SuiteEntry(FGSM(0.02), ["ce_f", "cw_f"]),
        "noise": SuiteEntry(GaussianNoise(levels=[0.2])),
        "pgd": SuiteEntry(PGD(0.02, 0.01, 2), survivors_only=True),
    }
    audit = Audit(3, None, 2, 2, square_queries=2, random_samples=2, decision_queries=5)
    measures = {"smooth": LocalSmoothness(PGD(0.02, 0.01, 2))}
    data = ImageDataModule(Digits(), test_limit=32, eval_batch_size=20)
    evaluation = RobustEvaluation(suite, audit=audit, measures=measures, experiment="tiny")
    trainer = quiet_trainer(evaluation, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="about chance"):
        trainer.test(module(), datamodule=data, verbose=False)
    batch = data.test_set.__getitems__(range(len(data.test_set)))
    with pytest.warns(UserWarning, match="about chance"):
        evaluate(
            module(),
            (batch["x"].float() / 255, batch["y"]),
            suite,
            audit=audit,
            measures=measures,
            batch_size=20,
            output=tmp_path / "function",
            name="tiny",
            progress=False,
        )
    ours = read_result(tmp_path / "results.json")
    theirs = read_result(tmp_path / "function/results.json")
    one, other = ours["checkpoints"]["untrained"], theirs["checkpoints"]["model"]
    assert {"parameters", "macs", "stability", "worst"} <= set(one["metrics"])
    for key in sorted(set(one) | set(other)):
        assert one[key] == other[key], key
    made, made_by_function = ours["provenance"]["untrained"], theirs["provenance"]["model"]
    for key in (set(made) | set(made_by_function)) - OF_THE_RUN:
        assert made[key] == made_by_function[key], key
    for word in ("audit", "checks passed", "clean_acc"):
        assert word in evaluation.reports[0]


def test_a_checkpoint_that_no_attack_names_is_measured_without_one(tmp_path, quiet_trainer) -> None:
    suite = {"fgsm": SuiteEntry(FGSM(0.02), checkpoints=["last"])}
    evaluation = RobustEvaluation(suite, audit=Audit(checkpoints=["last"]), pictures=False)
    trainer = quiet_trainer(evaluation, default_root_dir=tmp_path)
    data = ImageDataModule(Digits(), test_limit=32)
    with pytest.warns(UserWarning, match="about chance"):
        trainer.test(module(), datamodule=data, verbose=False)
    entry = read_result(tmp_path / "results.json")["checkpoints"]["untrained"]
    assert entry["attacks"] == {}
    assert {"clean_acc", "parameters", "macs"} == set(entry["metrics"])
    assert "audit" not in entry


def test_examples_can_be_the_only_picture(tmp_path, quiet_trainer) -> None:
    suite = {
        "pgd": SuiteEntry(PGD(0.3, 0.1, 5)),
        "noise": SuiteEntry(GaussianNoise(levels=[0.1, 0.2])),
    }
    data = ImageDataModule(Digits(), test_limit=64)
    for pictures, drawn in (("examples", {"examples"}), (False, set()), (True, None)):
        folder = tmp_path / str(pictures)
        evaluation = RobustEvaluation(suite, pictures=pictures)
        trainer = quiet_trainer(evaluation, default_root_dir=folder)
        with pytest.warns(UserWarning, match="about chance"):
            trainer.test(module(), datamodule=data, verbose=False)
        names = {path.stem for path in folder.glob("figures/*.png")}
        if drawn is None:
            assert {"untrained_examples", "untrained_confusion", "untrained_noise_level"} <= names
        else:
            assert names == {f"untrained_{name}" for name in drawn}


def command(folder: Path, *launcher: str) -> dict:
    call = [
        *(sys.executable, "-m", *launcher, "common.evaluation"),
        *("--model", "common.networks.resnet:DigitsResNet", "--data", "digits"),
        *("--suite", str(folder / "suite.yaml"), "--examples", "50", "--batch_size", "8"),
        *("--device", "cpu", "--output", str(folder / f"of{len(launcher)}")),
        *("--audit", "--save-examples"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        call, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    return json.loads((folder / f"of{len(launcher)}/results.json").read_text())


@pytest.mark.slow
def test_the_command_on_two_processes_gives_the_result_of_one(tmp_path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "evaluation: {suite: {pgd: {attack: {class_path: common.attacks.pgd.PGD, init_args: "
        "{eps: 0.1, step_size: 0.05, steps: 2, start: uniform}}, losses: [ce_f, cw_f]}}, audit: "
        "{examples: 9, steps: 4, restarts: 2, square_queries: 5, random_samples: 5}}"
    )
    alone = command(tmp_path)
    shared = command(tmp_path, "torch.distributed.run", "--nproc_per_node", "2", "-m")
    assert shared["checkpoints"] == alone["checkpoints"]
    assert "audit" in alone["checkpoints"]["model"]
    images, of_two = (np.load(path) for path in sorted(tmp_path.glob("*/adversarial/x_adv.npy")))
    assert np.array_equal(images, of_two)
    assert [r["provenance"]["model"]["world_size"] for r in (alone, shared)] == [1, 2]


def test_each_name_of_the_evaluation_is_imported_alone_and_without_lightning() -> None:
    code = (
        "import sys\n"
        "from common.evaluation import __all__ as names\n"
        "for name in names:\n"
        "    for module in [m for m in sys.modules if m.partition('.')[0] == 'common']:\n"
        "        del sys.modules[module]\n"
        "    exec(f'from common.evaluation import {name}')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
