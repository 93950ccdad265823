"""CIFAR-10-C: accuracies by severity, and measurements that resume and are kept."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.cli.start import main as run
from common.data.corruptions import CIFAR10C, CORRUPTIONS
from common.errors import ConfigurationError, DataUnavailableError, RunDirectoryError, UserError
from paper_rcm import corruptions
from paper_rcm.corruptions import evaluate_corruptions, main, network_digest, read_corruptions
from paper_rcm.method import DigitsNet, EnlargedNetwork


@pytest.fixture
def write(write_cifar10c):
    return partial(write_cifar10c, per_severity=3)


@pytest.fixture
def data(tmp_path: Path, write) -> CIFAR10C:
    return CIFAR10C(write(tmp_path), verify=False)


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


def test_accuracy_by_severity_and_pooled(tmp_path: Path, write) -> None:
    root = write(tmp_path, per_severity=4)
    path = root / "CIFAR-10-C" / "fog.npy"
    images, labels = np.load(path), np.load(path.with_name("labels.npy"))
    images[:] = ((labels + 5) * 25.5 + 12)[:, None, None, None].astype(np.uint8)  # all wrong
    right = [0, 1, 2, 3, 4, 5, 8, 19]  # all of severity 1, two of 2, one of 3, one of 5
    images[right] = (labels[right] * 25.5 + 12)[:, None, None, None].astype(np.uint8)
    np.save(path, images)
    data = CIFAR10C(root, verify=False)
    entry = evaluate_corruptions(Brightness(), data, tmp_path / "c.json", "last", ["fog"], 3)
    assert entry["severities"]["fog"] == [1.0, 0.5, 0.25, 0.0, 0.25]
    assert entry["accuracy"] == {"fog": 8 / 20}
    assert entry["mean"] is None


def test_a_stopped_run_resumes_and_finished_corruptions_are_kept(
    tmp_path: Path, data: CIFAR10C, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, model = tmp_path / "run" / "c.json", Brightness()
    evaluate_corruptions(model, data, results, "last", ["snow", "fog"])
    assert model.seen == 2 * 15
    honest, calls = corruptions.correct_by_severity, []

    def stopped(model: nn.Module, data: CIFAR10C, name: str, size: int) -> list[int]:
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return honest(model, data, name, size)

    monkeypatch.setattr(corruptions, "correct_by_severity", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(model, data, results, "last")
    assert set(read_corruptions(results)["last"]["accuracy"]) == {"snow", "fog", *calls[:7]}
    entry = evaluate_corruptions(model, data, results, "last")
    assert model.seen == 19 * 15
    assert list(entry["accuracy"]) == list(entry["severities"]) == list(CORRUPTIONS)
    assert entry["mean"] == pytest.approx(sum(entry["accuracy"].values()) / 19)
    assert read_corruptions(results) == {"last": entry}
    assert evaluate_corruptions(model, data, results, "last") == entry
    assert model.seen == 19 * 15
    assert evaluate_corruptions(model, data, tmp_path / "other.json", "last") == entry


def test_other_weights_strides_or_files_are_measured_again(
    tmp_path: Path, data: CIFAR10C, write
) -> None:
    first = EnlargedNetwork(DigitsNet((1, 2, 2), in_channels=3))
    other = EnlargedNetwork(DigitsNet((1, 1, 2), in_channels=3))
    other.load_state_dict(first.state_dict())  # which nothing complains about
    digests = [network_digest(net) for net in (first, other, EnlargedNetwork(first.arch, 2))]
    assert len(set(digests)) == 3
    results = tmp_path / "c.json"
    found = [evaluate_corruptions(net, data, results, "last", ["fog"]) for net in (first, other)]
    assert [entry["network"] for entry in found] == digests[:2]
    assert read_corruptions(results) == {"last": found[1]}
    evaluate_corruptions(first, data, results, "selected", ["fog"])
    assert set(read_corruptions(results)) == {"last", "selected"}
    write(tmp_path, per_severity=4)
    assert evaluate_corruptions(other, data, results, "last", ["fog"])["images"] == 20


def test_what_is_missing_is_found_before_anything_is_computed(
    tmp_path: Path, data: CIFAR10C
) -> None:
    model = Brightness()
    (data.folder / f"{CORRUPTIONS[-1]}.npy").unlink()
    with pytest.raises(DataUnavailableError, match=CORRUPTIONS[-1]):
        evaluate_corruptions(model, data, tmp_path / "c.json", "last")
    assert model.seen == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"checkpoints": {"last": {}}}'])
def test_other_files_are_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(RunDirectoryError, match="--results"):
        read_corruptions(path)


def test_the_command(
    tiny: Any, fake_cifar10: Path, write, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ("--data.source", "common.data.sources.CIFAR10", "--data.source.root", fake_cifar10)
    tiny("fit", *source, "--data.val_size", 20, "--trainer.max_epochs", 1, package="paper_rcm")
    path = Path("runs/paper_rcm/tiny/seed0/checkpoints/last.ckpt")
    arguments = ["--ckpt_path", str(path), "--device", "cpu"]
    for more, message in (
        ([], "zenodo"),
        (["--only", "rain"], "zenodo"),
        (["--config", "none.yaml"], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main([*arguments, *more])
    write(fake_cifar10)
    capsys.readouterr()
    main([*arguments, "--subset"])
    printed = capsys.readouterr().out.replace("\n", "")
    assert all(name in printed for name in (*CORRUPTIONS, "mean", "15 images per corruption"))
    found = json.loads((path.parents[1] / "corruptions.json").read_text())
    entry = found["checkpoints"]["last"]
    assert set(entry["accuracy"]) == set(CORRUPTIONS)
    # Elsewhere, with the experiment's file: the same network, so the same numbers.
    moved = Path("moved.ckpt")
    moved.write_bytes(path.read_bytes())
    arguments = ["--ckpt_path", "moved.ckpt", "--device", "cpu", "--subset"]
    with pytest.raises(ConfigurationError, match="--config"):
        main(arguments)
    config = path.parents[1] / "config.yaml"
    main([*arguments, "--config", str(config), "--only", "fog", "snow"])
    other = read_corruptions("corruptions.json")["moved"]
    assert other["accuracy"] == {name: entry["accuracy"][name] for name in ("snow", "fog")}
    classes = "common.data.images.ImageDataModule.num_classes"
    monkeypatch.setattr(classes, property(lambda self: 100))
    with pytest.raises(ConfigurationError, match="cifar10 experiment"):
        main(["--ckpt_path", str(path), "--device", "cpu"])
    # Through the package, as a user would.
    with pytest.raises(SystemExit, match="2"):
        run(
            ["corruptions", "--ckpt_path", "nowhere.ckpt"],
            "paper_rcm",
            {"corruptions": "paper_rcm.corruptions"},
        )
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
