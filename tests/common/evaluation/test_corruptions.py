"""Common corruptions as entries of a suite, from small files in both layouts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from common.attacks.pgd import FGSM
from common.callbacks.robust_evaluation import RobustEvaluation
from common.classifier import RobustClassifier
from common.data.corruptions import TESTED, find_corrupted
from common.errors import UserError
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.__main__ import main
from common.evaluation.corruptions import Corruptions
from common.evaluation.runner import _Run
from common.objectives import Natural

NAMES, N, SIZE = ["fog", "snow"], 12, 8
LABELS = np.arange(N) // 4
SETTINGS = {"eps": 0.01, "progress": False, "batch_size": 5}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 3)).eval()


def write_arrays(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in NAMES:
        np.save(root / f"{name}.npy", rng.integers(0, 256, (5 * N, SIZE, SIZE, 3), np.uint8))
    np.save(root / "labels.npy", np.tile(LABELS, 5))
    return root


def write_folders(root: Path) -> Path:
    """The classes and files are not made in their order."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        for severity in range(1, 6):
            for row in reversed(range(N)):
                folder = root / name / str(severity) / f"n{LABELS[row]:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
                image.save(folder / f"ILSVRC2012_val_{row:08d}.JPEG")
    return root


def pixels(root: Path, name: str, severity: int) -> Tensor:
    """All images of a severity, read in another way."""
    if (root / "labels.npy").exists():
        block = np.load(root / f"{name}.npy")[N * (severity - 1) : N * severity]
    else:
        files = sorted((root / name / str(severity)).rglob("*.JPEG"))
        block = np.stack([np.array(Image.open(file)) for file in files])
    return torch.from_numpy(block.copy()).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(params=[write_arrays, write_folders], ids=["arrays", "folders"])
def root(request, tmp_path) -> Path:
    folder = tmp_path / "corrupted"
    folder.mkdir()
    return request.param(folder)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(N, 3, SIZE, SIZE), torch.from_numpy(LABELS)


def suite(root: Path, **settings) -> dict[str, SuiteEntry]:
    return {"c": SuiteEntry(Corruptions(str(root), NAMES, **settings))}


@pytest.mark.filterwarnings("ignore:.*about chance")
def test_accuracy_by_corruption_and_severity(
    root, data, tmp_path, monkeypatch, no_pictures
) -> None:
    fgsm = {"fgsm": SuiteEntry(FGSM(0.01))}
    expected = {
        (name, s): float((model()(pixels(root, name, s)).argmax(1) == data[1]).double().mean())
        for name in NAMES
        for s in range(1, 6)
    }
    assert len(set(expected.values())) > 3
    output = {"output": tmp_path / "out"}
    claim = tmp_path / "model_info.json"
    claim.write_text(json.dumps({"corruptions_acc": "99.99", "reported": "99.99"}))
    found = evaluate(model(), data, fgsm | suite(root), **SETTINGS, **output, claim=claim)
    metrics = found.metrics
    for (name, severity), accuracy in expected.items():
        assert metrics[f"c/{name}/severity={severity}"] == pytest.approx(accuracy)
    by_name = {name: fmean(expected[name, s] for s in range(1, 6)) for name in NAMES}
    for name in NAMES:
        assert metrics[f"c/{name}"] == pytest.approx(by_name[name])
    assert metrics["c/severity=2"] == pytest.approx(fmean(expected[name, 2] for name in NAMES))
    assert metrics["c"] == pytest.approx(fmean(expected.values()))
    assert metrics["c_error"] == pytest.approx(1 - metrics["c"])
    (compared,) = found.comparisons
    assert (compared.ours, compared.is_inside) == (metrics["c"], False)
    alone = evaluate(model(), data, fgsm, **SETTINGS)
    assert torch.equal(alone.robust, found.robust)
    assert f"{100 * metrics['c/snow/severity=5']:.2f}" in str(found)

    stated = {"fog": 0.5, "snow": 0.8}
    ran, attacked = [], _Run._attacked
    monkeypatch.setattr(_Run, "_attacked", lambda *a: (ran.append(a[1].key), attacked(*a))[1])
    found = evaluate(model(), data, fgsm | suite(root, baseline=stated), **SETTINGS, **output)
    assert not any(key.startswith("c/") for key in ran)  # it resumes
    mce = fmean((1 - by_name[name]) / stated[name] for name in NAMES)
    assert found.metrics["c_mce"] == pytest.approx(mce)
    given = {"baseline": str(tmp_path / "out/results.json"), "severities": [2, 4]}
    found = evaluate(model(), data, suite(root, **given), **SETTINGS)
    assert found.metrics["c_mce"] == pytest.approx(1.0)
    part = {"c": SuiteEntry(Corruptions(str(root), ["fog"], [3]), examples=6)}
    found = evaluate(model(), data, part, **SETTINGS)
    assert found.result["attacks"]["c/fog/severity=3"]["examples"] == 6
    assert "worst" not in found.metrics

    for file in root.rglob("*"):  # other images of the same size are not taken for the same
        if file.name == "fog.npy":
            np.save(file, 255 - np.load(file))
            found = evaluate(model(), data, suite(root), **SETTINGS, **output)
            assert found.metrics["c/fog"] != pytest.approx(by_name["fog"])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "spoil", "named"),
    [
        (write_arrays, lambda root: half(root / "snow.npy"), "snow.npy"),
        (write_arrays, lambda root: half(root / "labels.npy"), "labels.npy"),
        (write_arrays, lambda root: (root / "fog.npy").unlink(), "fog.npy"),
        (write_arrays, lambda root: np.save(root / "labels.npy", np.arange(60)), "labels.npy"),
        (write_arrays, lambda root: np.save(root / "labels.npy", np.tile(LABELS[::-1], 5)), ""),
        (write_folders, lambda root: shutil.rmtree(root / "snow/4"), "snow/4"),
        (write_folders, lambda root: shutil.rmtree(root / "snow/4/n00000001"), "snow/4"),
        (write_folders, lambda root: min(root.glob("fog/5/*/*")).unlink(), "val_00000000.JPEG"),
        (write_folders, lambda root: half(min(root.glob("fog/5/*/*"))), "val_00000000.JPEG"),
        (write_folders, shutil.rmtree, ""),
    ],
)
def test_files_that_do_not_fit_are_named_before_an_attack(
    tmp_path, data, monkeypatch, write, spoil, named
) -> None:
    root = tmp_path / "corrupted"
    root.mkdir()
    spoil(write(root))
    monkeypatch.setattr(_Run, "columns", lambda *_: pytest.fail("a step has run"))
    with pytest.raises(UserError) as caught:
        evaluate(model(), data, suite(root), **SETTINGS)
    assert str(root / named) in str(caught.value) or named.endswith("JPEG")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_of_another_size_order_or_number(root, data) -> None:
    x, y = data
    wide = nn.Sequential(nn.AdaptiveAvgPool2d(SIZE), model())
    more = torch.cat([x, x]), torch.cat([y, y])
    for given in ((torch.rand(N, 3, 9, 9), y), (x.flip(0), y.flip(0)), more):
        with pytest.raises(UserError, match=str(root)):
            evaluate(wide, given, suite(root), **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"severities": [0]}, "0"),
        ({"severities": []}, r"\[\]"),
        ({"corruptions": ["fog", "fog"]}, "fog"),
        ({"baseline": {"fog": 0.5}}, "snow"),
        ({"baseline": {"fog": 0.5, "snow": 0.0}}, "snow"),
        ({"baseline": {"fog": 0.5, "snow": 1.0}, "severities": [1, 2]}, r"\[1, 2\]"),
    ],
)
def test_settings_out_of_range(settings, value) -> None:
    with pytest.raises(UserError, match=value):
        Corruptions("anywhere", **{"corruptions": NAMES} | settings)
    for entry in ({"survivors_only": True}, {"sweep": {"severities": [1]}}, {"eot": 2}):
        with pytest.raises(UserError):
            SuiteEntry(Corruptions("anywhere"), **entry)


def test_a_baseline_of_other_corruptions(data, tmp_path) -> None:
    root = write_arrays(tmp_path)
    evaluate(model(), data, suite(root, severities=[1]), output=tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match="fog/severity=2"):
        evaluate(model(), data, suite(root, baseline=str(tmp_path / "out/results.json")))


MADE = f"""
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({3 * SIZE**2}, 3)).eval()
"""


def words(root: Path, data: tuple[Tensor, Tensor], folder: Path) -> list[str]:
    """Of the command, for these images as a folder of PNG files and a suite in YAML."""
    for row, image in enumerate(data[0]):
        path = folder / "clean" / f"n{LABELS[row]:08d}" / f"ILSVRC2012_val_{row:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    (folder / "made.py").write_text(MADE)
    init = {"root": str(root), "corruptions": NAMES, "severities": [1, 2]}
    entry = {"attack": {"class_path": f"{Corruptions.__module__}.Corruptions", "init_args": init}}
    text = yaml.safe_dump({"evaluation": {"suite": {"c": entry}}})
    (folder / "suite.yaml").write_text(text)
    options = {"model": "made:net", "data": folder / "clean", "suite": folder / "suite.yaml"}
    options |= {"device": "cpu", "batch_size": 5}
    return [f"--{name}={value}" for name, value in options.items()]


def test_the_command_and_the_callback(
    root, data, tmp_path, capsys, quiet_trainer, monkeypatch, no_pictures
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*words(root, data, tmp_path), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    filed = json.loads((tmp_path / "out/results.json").read_text())["checkpoints"]["model"]
    assert f"{filed['metrics']['c_error']:.4f}" in printed

    module = RobustClassifier(model(), Natural())
    batch = {"x": data[0], "y": data[1], "index": torch.arange(N)}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    callback = RobustEvaluation(suite(root, severities=[1, 2]))
    trainer = quiet_trainer(callback, default_root_dir=tmp_path)
    trainer.test(module, loader, verbose=False)
    theirs = json.loads((tmp_path / "results.json").read_text())["checkpoints"]["untrained"]
    assert len(theirs["attacks"]) == 4
    for key, step in theirs["attacks"].items():
        assert step["outcomes"] == filed["attacks"][key]["outcomes"]
    sys.modules.pop("made")


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path, data) -> None:
    (tmp_path / "corrupted").mkdir()
    options = words(write_folders(tmp_path / "corrupted"), data, tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    filed = []
    for launcher in ([], ["torch.distributed.run", "--nproc_per_node", "2", "-m"]):
        output = tmp_path / f"of{len(launcher)}"
        call = [sys.executable, "-m", *launcher, "common.evaluation", *options]
        call += ["--output", str(output)]
        subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, check=True)
        filed.append(json.loads((output / "results.json").read_text())["checkpoints"])
    assert filed[0] == filed[1]


def test_the_benchmark_has_fifteen_corruptions(tmp_path) -> None:
    assert len(TESTED) == 15
    assert Corruptions(str(tmp_path)).corruptions == list(TESTED)
    with pytest.raises(UserError, match=str(tmp_path)):
        find_corrupted(tmp_path / "missing")
