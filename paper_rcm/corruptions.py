"""E13, common corruptions: ``python -m paper_rcm corruptions --ckpt_path .../last.ckpt``.

The accuracy of a trained network on each of the 19 corruptions of CIFAR-10-C, all five severities
pooled [code], and their mean [choice]. Results go to ``corruptions.json`` in the run directory
after every corruption; a stopped run resumes, and corruptions measured with these weights are not
measured again. Tags as in :mod:`paper_rcm.method`.
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
from common.cli.start import experiments
from common.data.corruptions import CIFAR10C, CORRUPTIONS, SEVERITIES
from common.data.images import ImageDataModule
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation.models import device_of, load_run
from common.files import check_writable, read_sealed_json, write_sealed_json
from common.modes import network_of
from common.packages import file_named
from common.results.identity import check_evaluated, settings_in
from common.results.provenance import weights_digest
from common.weights import check_weights_fit


class Entry(TypedDict):
    """Results of one checkpoint.

    ``network`` is a digest of architecture and weights, ``images`` the number per corruption,
    ``severities`` and ``accuracy`` are accuracies in [0, 1] by corruption, of each severity and
    pooled, and ``mean`` is over all corruptions, once they are there.
    """

    network: str
    images: int
    severities: dict[str, list[float]]
    accuracy: dict[str, float]
    mean: float | None


@torch.no_grad()
def correct_by_severity(
    model: nn.Module, data: CIFAR10C, name: str, batch_size: int = 250
) -> list[int]:
    """How many images of each severity of a corruption a network classifies correctly."""
    model.eval()
    device = device_of(model)
    divisor = torch.full((), 255.0, device=device)  # as in training: see common.data.images
    found = [0] * SEVERITIES
    for severity in range(SEVERITIES):
        for x, y in data.batches(name, batch_size, severity + 1):
            logits: Tensor = model(x.to(device).float() / divisor)
            found[severity] += int((classify(logits).cpu() == y).sum())
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
    """Measure the corruptions that the file ``results`` lacks of a checkpoint; write after each.

    Raises:
        UserError: There is no such corruption, or a file cannot be read or written.
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
            severities = entry["severities"] | {name: [SEVERITIES * n / images for n in correct]}
            accuracy = entry["accuracy"] | {name: sum(correct) / images}
            entry["severities"] = {key: severities[key] for key in CORRUPTIONS if key in severities}
            entry["accuracy"] = {key: accuracy[key] for key in CORRUPTIONS if key in accuracy}
            if len(accuracy) == len(CORRUPTIONS):
                entry["mean"] = fmean(entry["accuracy"].values())
            checkpoints[label] = entry
            write_sealed_json(results, {"schema": 1, "checkpoints": checkpoints})
        if console is not None:
            console.print(f"{name}: {100 * entry['accuracy'][name]:.2f}")
    return entry


def network_digest(model: nn.Module) -> str:
    """SHA-256 of weights and architecture; strides do not show in the weights [measured]."""
    net = network_of(model)
    return hashlib.sha256(f"{weights_digest(net.state_dict())} {net}".encode()).hexdigest()


def read_corruptions(path: str | Path) -> dict[str, Entry]:
    """Entries of a ``corruptions.json`` by checkpoint; none where there is no file."""
    try:
        entries: dict[str, Entry] = dict(read_sealed_json(path)["checkpoints"])
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
    table = Table("corruption", title=title)
    for column in ("all", *map(str, range(1, SEVERITIES + 1))):
        table.add_column(column, justify="right")
    rows = {name: [a, *entry["severities"][name]] for name, a in entry["accuracy"].items()}
    for name, cells in rows.items():
        table.add_row(name, *(f"{100 * cell:.2f}" for cell in cells))
    if entry["mean"] is not None:
        table.add_section()
        means = map(fmean, zip(*rows.values(), strict=True))
        table.add_row("mean", *(f"{100 * cell:.2f}" for cell in means))
    return table


# ------------------------------------------------------------------------------------ the command


def load(checkpoint: Path, config: str | None) -> tuple[RobustClassifier, ImageDataModule]:
    """The classifier behind a checkpoint, and its data.

    Without ``config``, the experiment's file, the checkpoint lies in a run directory.
    """
    found = load_checkpoint(checkpoint)  # says which others there are
    if config is None:
        if checkpoint.parent.name != "checkpoints":
            raise ConfigurationError(
                f"{checkpoint} is not in the checkpoints folder of a run, so its network is "
                "unknown; name the experiment's file with --config"
            )
        return load_run(checkpoint.parent.parent, checkpoint.stem)
    path = file_named(config, experiments("paper_rcm"), "experiment")
    arguments = ["--config", str(path), "--trainer.logger", "false"]
    cli = RobustCLI(package="paper_rcm", args=arguments, run=False)
    check_evaluated(settings_in(found, checkpoint), cli.settings, checkpoint)
    weights = found["state_dict"]
    check_weights_fit(cli.model.state_dict(), weights, f"the checkpoint {checkpoint}")
    cli.model.load_state_dict(weights)
    return cli.model.eval(), cli.datamodule


def main(args: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m paper_rcm corruptions",
        description="Accuracy of a trained network on CIFAR-10-C; finished corruptions are kept.",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, type=Path, help="checkpoint of a run")
    add("--config", help="its experiment, where the run has no config.yaml")
    add("--root", help="folder that has CIFAR-10-C in it; by default the data's")
    add("--results", type=Path, help="by default corruptions.json in the run")
    add("--only", nargs="+", default=CORRUPTIONS, help="some of the corruptions")
    add("--batch_size", type=int, default=250)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--subset", action="store_true", help="allow files with fewer than 50,000 images")
    given = parser.parse_args(args)
    console, checkpoint = Console(), given.ckpt_path
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    model, data = load(checkpoint, given.config)
    if data.num_classes != 10 or data.shape != (3, 32, 32):
        raise ConfigurationError(
            f"the network was made for {data.source.spec.name}, and CIFAR-10-C has 10 classes of "
            "3x32x32 images; give a checkpoint of a cifar10 experiment"
        )
    images = CIFAR10C(given.root or getattr(data.source, "root", "data"), verify=not given.subset)
    in_run = checkpoint.parent.name == "checkpoints"
    folder = checkpoint.parent.parent if in_run else checkpoint.parent
    results = given.results or folder / "corruptions.json"
    entry = evaluate_corruptions(
        model.to(given.device),
        images,
        results,
        checkpoint.stem,
        given.only,
        given.batch_size,
        console,
    )
    console.print(corruption_table(entry))
    console.print(f"written to {results}")
