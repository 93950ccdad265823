import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.cli.main import main as train
from common.data.corruptions import CIFAR10C, CORRUPTIONS
from common.errors import (
    ConfigurationError,
    DataUnavailableError,
    RunDirectoryError,
    UserError,
)
from paper_rcm import corruptions
from paper_rcm.corruptions import (
    evaluate_corruptions,
    main,
    network_digest,
    read_corruptions,
)
from paper_rcm.method import DigitsNet, EnlargedNetwork

CONFIG = """\
model:
  class_path: paper_rcm.module.RCMClassifier
  init_args:
    net:
      class_path: paper_rcm.method.EnlargedNetwork
      init_args:
        arch:
          class_path: paper_rcm.method.DigitsNet
          init_args: {strides: [1, 2, 2]}
        scale_factor: 1
    objective: {class_path: common.objectives.AT}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  source: {class_path: common.data.sources.CIFAR10, init_args: {root: ROOT}}
  val_size: 20
  batch_size: 40
adversary:
  attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 8/255, steps: 1}}
evaluation:
  validation:
    attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 8/255, steps: 1}}
trainer:
  max_epochs: 1
  logger: false
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
"""


def write(root: Path, names: tuple[str, ...] = CORRUPTIONS, per_severity: int = 3) -> Path:
    """Files in the published format, cut down."""
    folder = root / "CIFAR-10-C"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        images = rng.integers(0, 256, (5 * per_severity, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(per_severity, dtype=np.uint8), 5))
    return root


class Brightness(nn.Module):
    """Predicts the tenth that the mean pixel falls into; counts images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert 0.0 <= x.min() <= x.max() <= 1.0
        assert not self.training
        self.seen += len(x)
        return nn.functional.one_hot((x.mean((1, 2, 3)) * 10).long().clamp(max=9), 10).float()


def test_accuracy_by_severity_and_pooled(tmp_path: Path) -> None:
    root = write(tmp_path, per_severity=4)
    path = root / "CIFAR-10-C" / "fog.npy"
    images = np.load(path)
    labels = np.load(root / "CIFAR-10-C" / "labels.npy")
    images[:] = ((labels + 5) * 25.5 + 12)[:, None, None, None].astype(np.uint8)  # all wrong
    right = [0, 1, 2, 3, 4, 5, 8, 19]  # all of severity 1, two of 2, one of 3, one of 5
    images[right] = (labels[right] * 25.5 + 12)[:, None, None, None].astype(np.uint8)
    np.save(path, images)
    data = CIFAR10C(root, verify=False)
    entry = evaluate_corruptions(Brightness(), data, tmp_path / "c.json", "last", ["fog"], 3)
    assert entry["severities"]["fog"] == [1.0, 0.5, 0.25, 0.0, 0.25]
    assert entry["accuracy"] == {"fog": 8 / 20}
    assert entry["mean"] is None


def test_finished_corruptions_are_kept_and_the_mean_comes_last(tmp_path: Path) -> None:
    data, results = CIFAR10C(write(tmp_path), verify=False), tmp_path / "run" / "c.json"
    model = Brightness()
    evaluate_corruptions(model, data, results, "last", ["snow", "fog"])
    assert model.seen == 2 * 15
    entry = evaluate_corruptions(model, data, results, "last")
    assert model.seen == 19 * 15
    assert list(entry["accuracy"]) == list(CORRUPTIONS)
    assert entry["mean"] == pytest.approx(sum(entry["accuracy"].values()) / 19)
    assert read_corruptions(results) == {"last": entry}
    assert evaluate_corruptions(model, data, results, "last") == entry
    assert model.seen == 19 * 15


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = CIFAR10C(write(tmp_path), verify=False), tmp_path / "c.json"
    honest, calls = corruptions.correct_by_severity, []

    def stopped(model: nn.Module, data: CIFAR10C, name: str, size: int) -> list[int]:
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return honest(model, data, name, size)

    monkeypatch.setattr(corruptions, "correct_by_severity", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(Brightness(), data, results, "last")
    assert list(read_corruptions(results)["last"]["accuracy"]) == calls[:7]
    entry = evaluate_corruptions(Brightness(), data, results, "last")
    assert calls[8:] == list(CORRUPTIONS[7:])
    whole = evaluate_corruptions(Brightness(), data, tmp_path / "other.json", "last")
    assert entry == whole


def test_other_weights_strides_or_files_are_measured_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = EnlargedNetwork(DigitsNet((1, 2, 2), in_channels=3))
    other = EnlargedNetwork(DigitsNet((1, 1, 2), in_channels=3))
    other.load_state_dict(first.state_dict())  # which nothing complains about
    twice = EnlargedNetwork(first.arch, 2)
    digests = [network_digest(net) for net in (first, other, twice)]
    assert len(set(digests)) == 3
    results = tmp_path / "c.json"
    data = CIFAR10C(write(tmp_path), verify=False)
    found = [evaluate_corruptions(net, data, results, "last", ["fog"]) for net in (first, other)]
    assert [entry["network"] for entry in found] == digests[:2]
    assert read_corruptions(results) == {"last": found[1]}
    evaluate_corruptions(first, data, results, "selected", ["fog"])
    assert set(read_corruptions(results)) == {"last", "selected"}
    more = CIFAR10C(write(tmp_path, per_severity=4), verify=False)
    assert evaluate_corruptions(other, more, results, "last", ["fog"])["images"] == 20


def test_what_is_missing_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    root, model = write(tmp_path), Brightness()
    (root / "CIFAR-10-C" / f"{CORRUPTIONS[-1]}.npy").unlink()
    with pytest.raises(DataUnavailableError, match=CORRUPTIONS[-1]):
        evaluate_corruptions(model, CIFAR10C(root, verify=False), tmp_path / "c.json", "last")
    assert model.seen == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"checkpoints": {"last": {}}}'])
def test_other_files_are_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(RunDirectoryError, match="--results"):
        read_corruptions(path)
    assert path.read_text() == text


@pytest.fixture
def checkpoint(
    tmp_path: Path, fake_cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """The last checkpoint of a tiny run, and its configuration."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "cifar10_tiny.yaml"
    config.write_text(CONFIG.replace("ROOT", str(fake_cifar10)))
    train(["fit", "--config", str(config)], package="paper_rcm")
    return tmp_path / "runs/paper_rcm/cifar10_tiny/seed0/checkpoints/last.ckpt", config


def test_the_command(
    checkpoint: tuple[Path, Path], fake_cifar10: Path, capsys: Any, tmp_path: Path
) -> None:
    path, config = checkpoint
    write(fake_cifar10)
    main(["--ckpt_path", str(path), "--subset", "--device", "cpu"])
    results = path.parents[1] / "corruptions.json"
    printed = capsys.readouterr().out.replace("\n", "")
    assert all(name in printed for name in (*CORRUPTIONS, "mean", "15 images per corruption"))
    entry = json.loads(results.read_text())["checkpoints"]["last"]
    assert set(entry["accuracy"]) == set(CORRUPTIONS)
    # Elsewhere, with the experiment's file: the same network, so the same numbers.
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(path.read_bytes())
    arguments = ["--ckpt_path", str(moved), "--device", "cpu", "--subset"]
    with pytest.raises(ConfigurationError, match="--config"):
        main(arguments)
    main([*arguments, "--config", str(config), "--only", "fog", "snow"])
    other = read_corruptions(tmp_path / "corruptions.json")["moved"]
    assert other["accuracy"] == {k: entry["accuracy"][k] for k in CORRUPTIONS if k in
                                 ("fog", "snow")}  # fmt: skip
    # Through the package, as a user would.
    commands = {"corruptions": "paper_rcm.corruptions"}
    with pytest.raises(SystemExit, match="2"):
        train(["corruptions", "--ckpt_path", "nowhere.ckpt"], "paper_rcm", commands)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_missing_files_and_other_data_are_refused(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = checkpoint
    arguments = ["--ckpt_path", str(path), "--device", "cpu"]
    for more, message in (
        ([], "zenodo"),
        (["--only", "rain"], "zenodo"),
        (["--config", "none.yaml"], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main([*arguments, *more])
    monkeypatch.setattr(
        "common.data.images.ImageDataModule.num_classes", property(lambda self: 100)
    )
    with pytest.raises(ConfigurationError, match="cifar10 experiment"):
        main(arguments)
