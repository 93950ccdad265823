"""E13, common corruptions: ``python -m paper_rcm corruptions --ckpt_path .../last.ckpt``.

The accuracy of a trained network on each of the 19 corruptions of CIFAR-10-C, all five severities
pooled [code], and their mean [choice]. Results go to ``corruptions.json`` in the run directory
after every corruption; a stopped run resumes, and corruptions measured with these weights are not
measured again.

Tags as in :mod:`paper_rcm.method`.
"""

import argparse
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.attacks.losses import classify
from common.checkpoints import load_checkpoint
from common.classifier import RobustClassifier
from common.cli.main import RobustCLI
from common.data.corruptions import CIFAR10C, CORRUPTIONS, SEVERITIES
from common.data.images import ImageDataModule
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation.models import load_run
from common.files import check_writable, read_sealed_json, write_sealed_json
from common.modes import network_of
from common.results.identity import check_evaluated, settings_in
from common.results.provenance import weights_digest
from common.weights import check_weights_fit


class Entry(TypedDict):
    """Results of one checkpoint."""

    network: str
    """Digest of architecture and weights."""
    images: int
    """Per corruption, severities together."""
    severities: dict[str, list[float]]
    """Accuracy by corruption and severity, in [0, 1]."""
    accuracy: dict[str, float]
    """Accuracy by corruption, severities pooled."""
    mean: float | None
    """Over all corruptions, once they are there."""


@torch.no_grad()
def correct_by_severity(
    model: nn.Module, data: CIFAR10C, name: str, batch_size: int = 250
) -> list[int]:
    """How many images of each severity a network classifies correctly.

    Args:
        model: Images in [0, 1] to logits; put into evaluation mode.
        data: The corrupted images.
        name: Corruption.
        batch_size: How many images go through the network at once.
    """
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    divisor = torch.full((), 255.0, device=device)  # as in training: see common.data.images
    found = []
    for severity in range(1, SEVERITIES + 1):
        correct = 0
        for x, y in data.batches(name, batch_size, severity):
            logits: Tensor = model(x.to(device).float() / divisor)
            correct += int((classify(logits).cpu() == y).sum())
        found.append(correct)
    return found


def evaluate_corruptions(
    model: nn.Module,
    data: CIFAR10C,
    results: str | Path,
    label: str,
    names: Sequence[str] = CORRUPTIONS,
    batch_size: int = 250,
    console: Console | None = None,
) -> Entry:
    """Measure the corruptions that are missing; write the file after each.

    Args:
        model: Images in [0, 1] to logits.
        data: The corrupted images.
        results: The file; other checkpoints in it stay.
        label: Of the checkpoint.
        names: Which corruptions.
        batch_size: How many images go through the network at once.
        console: Where progress is shown.

    Returns:
        All that is known about the checkpoint.

    Raises:
        ConfigurationError: There is no such corruption.
        DataUnavailableError: A file of images is missing or damaged.
        RunDirectoryError: Results cannot be read or written.
    """
    images = data.check(tuple(names))
    check_writable(results)
    network = network_digest(model)
    checkpoints = read_corruptions(results)
    entry = checkpoints.get(label)
    if entry is None or (entry["network"], entry["images"]) != (network, images):
        entry = Entry(network=network, images=images, severities={}, accuracy={}, mean=None)
    for name in names:
        if name not in entry["accuracy"]:
            correct = correct_by_severity(model, data, name, batch_size)
            entry["severities"][name] = [SEVERITIES * n / images for n in correct]
            entry["accuracy"][name] = sum(correct) / images
            entry = _in_order(entry)
            checkpoints[label] = entry
            write_sealed_json(results, {"schema": 1, "checkpoints": checkpoints})
        if console is not None:
            console.print(f"{name}: {100 * entry['accuracy'][name]:.2f}")
    return entry


def _in_order(entry: Entry) -> Entry:
    """Sorted as :data:`CORRUPTIONS`, with the mean once all are there."""
    names = [name for name in CORRUPTIONS if name in entry["accuracy"]]
    accuracy = {name: entry["accuracy"][name] for name in names}
    return {
        **entry,
        "severities": {name: entry["severities"][name] for name in names},
        "accuracy": accuracy,
        "mean": fmean(accuracy.values()) if len(names) == len(CORRUPTIONS) else None,
    }


def network_digest(model: nn.Module) -> str:
    """SHA-256 of weights and architecture; strides do not show in the weights [measured]."""
    net = network_of(model)
    return hashlib.sha256(f"{weights_digest(net.state_dict())} {net}".encode()).hexdigest()


def read_corruptions(path: str | Path) -> dict[str, Entry]:
    """Entries of a ``corruptions.json`` by checkpoint; none where there is no file.

    Raises:
        RunDirectoryError: If it cannot be read or is something else.
    """
    try:
        found = read_sealed_json(path)
        entries: dict[str, Entry] = dict(found["checkpoints"])
        for entry in entries.values():
            if set(entry) != set(Entry.__annotations__):
                raise ValueError(f"an entry has {', '.join(entry)}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} is no result of this command ({type(error).__name__}: {error}); move it "
            "away, or choose another file with --results"
        ) from error
    return entries


def corruption_table(entry: Entry) -> Table:
    """Accuracies in percent, with the mean below."""
    title = f"CIFAR-10-C, {entry['images']:,} images per corruption: percent, all and by severity"
    table = Table(title=title)
    table.add_column("corruption")
    for column in ("all", *map(str, range(1, SEVERITIES + 1))):
        table.add_column(column, justify="right")
    for name, accuracy in entry["accuracy"].items():
        cells = (accuracy, *entry["severities"][name])
        table.add_row(name, *(f"{100 * cell:.2f}" for cell in cells))
    if entry["mean"] is not None:
        columns = zip(*entry["severities"].values(), strict=True)
        cells = (entry["mean"], *map(fmean, columns))
        table.add_section()
        table.add_row("mean", *(f"{100 * cell:.2f}" for cell in cells))
    return table


# ------------------------------------------------------------------------------------ the command


def load(checkpoint: Path, config: str | None) -> tuple[RobustClassifier, ImageDataModule]:
    """The classifier behind a checkpoint, and its data.

    Args:
        checkpoint: A file; without ``config`` one in the ``checkpoints`` of a run directory.
        config: The experiment's file; ``None`` for what the run was trained with.

    Raises:
        UserError: If either is missing, damaged, or belongs to another network.
    """
    if config is None:
        if checkpoint.parent.name != "checkpoints":
            raise ConfigurationError(
                f"{checkpoint} is not in the checkpoints folder of a run, so its network is "
                "unknown; name the experiment's file with --config"
            )
        load_checkpoint(checkpoint)  # says which others there are
        return load_run(checkpoint.parent.parent, checkpoint.stem)
    if not Path(config).is_file():
        raise ConfigurationError(f"the configuration {config} does not exist; check the path")
    found = load_checkpoint(checkpoint)
    weights, made = found["state_dict"], settings_in(found, checkpoint)
    arguments = ["--config", config, "--trainer.logger", "false"]
    cli = RobustCLI(package="paper_rcm", args=arguments, run=False)
    check_evaluated(made, cli.settings, checkpoint)
    check_weights_fit(cli.model.state_dict(), weights, f"the checkpoint {checkpoint}")
    cli.model.load_state_dict(weights)
    return cli.model.eval(), cli.datamodule


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m paper_rcm corruptions",
        description="Accuracy of a trained network on CIFAR-10-C; finished corruptions are kept.",
    )
    parser.add_argument("--ckpt_path", required=True, type=Path, help="checkpoint of a run")
    parser.add_argument("--config", help="its experiment, where the run has no config.yaml")
    parser.add_argument("--root", help="folder that has CIFAR-10-C in it; by default the data's")
    parser.add_argument("--results", type=Path, help="by default corruptions.json in the run")
    parser.add_argument("--only", nargs="+", default=CORRUPTIONS, help="some of the corruptions")
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--subset", action="store_true", help="allow files with fewer than 50,000 images"
    )
    return parser


def main(args: list[str]) -> None:
    """Run the command."""
    given = _parser().parse_args(args)
    console = Console()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    checkpoint: Path = given.ckpt_path
    model, data = load(checkpoint, given.config)
    if data.num_classes != 10 or data.shape != (3, 32, 32):
        raise ConfigurationError(
            f"the network was made for {data.source.spec.name}, and CIFAR-10-C has 10 classes of "
            "3x32x32 images; give a checkpoint of a cifar10 experiment"
        )
    root = given.root or getattr(data.source, "root", "data")
    in_run = checkpoint.parent.name == "checkpoints"
    folder = checkpoint.parent.parent if in_run else checkpoint.parent
    results = given.results or folder / "corruptions.json"
    entry = evaluate_corruptions(
        model.to(given.device),
        CIFAR10C(root, verify=not given.subset),
        results,
        checkpoint.stem,
        given.only,
        given.batch_size,
        console,
    )
    console.print(corruption_table(entry))
    console.print(f"written to {results}")
