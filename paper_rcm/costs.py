"""E4, what a larger map costs: ``python -m paper_rcm costs --on cifar10_resnet18``.

For every network of the configurations: parameters, multiply-accumulates, side of the last map,
peak memory of a training step, and the time of a step of adversarial training relative to the same
network with its base strides and no up-sampling. Times are medians over rounds in which the two
take turns, so they need no idle machine; they belong to a device and a batch size, which
``results/costs.json`` names.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from common.analysis.profiling import (
    adversarial_training_step,
    device_name,
    peak_memory,
    relative_times,
)
from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.evaluation.drawing import save_figure
from common.evaluation.measures import cost
from common.files import read_sealed_json, write_sealed_json
from common.limits import read_yaml
from common.parsing import build
from common.results.store import COSTS, read_costs
from paper_rcm.figures import cost_figure
from paper_rcm.method import BASE_STRIDES, DigitsNet, parse_strides

DATA = {
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny": ((3, 64, 64), 200),
}
"""Shape and classes, by what a stem begins with."""

MEMORY_BATCH = 128
"""Of the step whose memory is counted: that of the recipes."""

Section = dict[str, Any]


def net_section(config: str | Path) -> Section:
    """The network of a configuration, as it is written, with the classes of its data."""
    config = Path(config)
    try:
        section: Section = read_yaml(config)["model"]["init_args"]["net"]
        arguments = section["init_args"]["arch"].setdefault("init_args", {})
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{config} cannot be read ({type(error).__name__}: {error}); its model.init_args.net "
            "has to be an EnlargedNetwork with an arch"
        ) from error
    _, arguments["num_classes"] = data_of(config.stem)
    return section


def data_of(stem: str) -> tuple[tuple[int, int, int], int]:
    """Shape of the images and number of classes of an experiment.

    Raises:
        ConfigurationError: If its data are unknown.
    """
    name = stem.partition("_")[0]
    if name not in DATA:
        raise ConfigurationError(f"{stem!r} begins with none of {', '.join(DATA)}")
    return DATA[name]


def make(section: Mapping[str, Any]) -> nn.Module:
    """The network of a section ``{class_path, init_args}``."""
    net: nn.Module = build({"net": nn.Module}, {"net": dict(section)}).net
    return net


def base_section(section: Mapping[str, Any]) -> Section:
    """The same network with its base strides and no up-sampling."""
    found: Section = copy.deepcopy(dict(section))
    arguments = found["init_args"]
    if arguments.get("scale_factor", 1) != 1:
        arguments.pop("mode", None)
    arguments["scale_factor"] = 1
    with torch.device("meta"):
        net: Any = make(section)
    inner = arguments["arch"]["init_args"]
    bases: dict[type[nn.Module], str] = {DigitsNet: "222", **BASE_STRIDES}
    strides = next((text for cls, text in bases.items() if isinstance(net.arch, cls)), None)
    if strides is not None:
        inner["strides"] = list(parse_strides(strides))
    if "image_size" in inner:
        inner["image_size"] = 32
    return found


def digest(section: Mapping[str, Any]) -> str:
    """A key for a network or setting, independent of the order of its arguments."""
    return json.dumps(section, sort_keys=True)


def measure_costs(
    configs: Sequence[Path],
    results: str | Path,
    batch_size: int,
    device: str = "cpu",
    rounds: int = 20,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what has not been measured on this device, and file it network by network.

    Args:
        configs: Of the experiments.
        results: Folder for ``costs.json``; other experiments in it stay.
        batch_size: Of the steps that are timed.
        device: Where they run.
        rounds: How often.
        console: Where progress is shown.

    Returns:
        The entries of these experiments, by stem.
    """
    path = Path(results) / COSTS
    known: dict[str, Any] = {}
    if path.is_file():
        read_costs(results)  # says what is wrong with it
        known = read_sealed_json(path)["experiments"]
    setting = {"device": device_name(device), "batch_size": batch_size, "torch": torch.__version__}
    shared = {
        (digest(entry["network"]), digest(entry["timed"])): entry["metrics"]
        for entry in known.values()
    }
    found: dict[str, Any] = {}
    for config in configs:
        section = net_section(config)
        key = (digest(section), digest(setting))
        if key not in shared:
            shared[key] = _measure(section, config.stem, batch_size, device, rounds)
        found[config.stem] = {"network": section, "timed": setting, "metrics": shared[key]}
        known[config.stem] = found[config.stem]
        entries = {stem: known[stem] for stem in sorted(known)}
        write_sealed_json(path, {"schema": 1, "experiments": entries})
        if console is not None:
            ratio = shared[key]["step_time"]
            console.print(f"{config.stem}: step time x {ratio:.2f}")
    return found


def count(section: Section, shape: Sequence[int]) -> dict[str, float]:
    """``parameters``, ``macs`` of one image and ``map_side``, 0 for networks without maps.

    Nothing is computed: the network is on the meta device.

    Args:
        section: Of the network.
        shape: Of the image, ``(C, H, W)``.
    """
    with torch.device("meta"):
        net: Any = make(section).eval()
        image = torch.empty(*shape)
        features = net.features(image[None])
        side = features.shape[-1] if features.ndim == 4 else 0
        return {**cost(net, image), "map_side": float(side)}


def _measure(
    section: Section, stem: str, batch_size: int, device: str, rounds: int
) -> dict[str, float]:
    shape, classes = data_of(stem)
    counted = count(section, shape)
    memory = peak_memory(lambda: make(section), shape, MEMORY_BATCH, classes)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, *shape, generator=generator).to(device)
    y = torch.randint(0, classes, (batch_size,), generator=generator).to(device)
    attack = PGD(eps="8/255", step_size="2/255", steps=10)
    steps = {
        name: adversarial_training_step(make(one).to(device), attack, x, y)
        for name, one in (("base", base_section(section)), ("this", section))
    }
    is_base = digest(section) == digest(base_section(section))
    times = None if is_base else relative_times(steps, "base", rounds, 2, device)["this"]
    return {
        **counted,
        "peak_memory": float(memory),
        "step_time": 1.0 if times is None else times.median,
        "step_time_lower": 1.0 if times is None else times.lower,
        "step_time_upper": 1.0 if times is None else times.upper,
    }


def show(entries: Mapping[str, Any]) -> Table:
    """The entries as a table for a terminal."""
    table = Table(title="Cost of a network", title_justify="left")
    table.add_column("experiment")
    for name in (
        "parameters",
        "MACs (M)",
        "last map",
        "peak memory (MB)",
        "step time",
        "quartiles",
    ):
        table.add_column(name, justify="right")
    for stem, entry in entries.items():
        of = entry["metrics"]
        table.add_row(
            stem,
            f"{of['parameters']:,.0f}",
            f"{of['macs'] / 1e6:,.2f}",
            f"{of['map_side']:.0f}" if of["map_side"] else "",
            f"{of['peak_memory'] / 1e6:,.1f}",
            f"{of['step_time']:.2f}",
            f"{of['step_time_lower']:.2f} to {of['step_time_upper']:.2f}",
        )
    return table


def draw(entries: Mapping[str, Any], folder: Path) -> list[Path]:
    """E4's figure for each data set: the digits, or ResNet-18 in its ways to a larger map."""
    written = []
    for dataset in DATA:
        stems = [stem for stem in entries if stem.startswith(f"{dataset}_")]
        if dataset != "digits":
            stems = [stem for stem in stems if "_resnet18_" in stem and stem.endswith("_at")]
        costs = {stem.removeprefix(f"{dataset}_"): entries[stem]["metrics"] for stem in stems}
        if figure := cost_figure(costs):
            written.append(save_figure(figure, folder / f"{dataset}_cost.png"))
    return written


def main(args: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m paper_rcm costs", description=__doc__)
    parser.add_argument("--on", default="digits", metavar="PREFIX", help="only these experiments")
    parser.add_argument("--batch_size", type=int, default=128, help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    o = parser.parse_args(args)
    folder = Path(__file__).parent
    configs = sorted((folder / "configs").glob(f"{o.on}*.yaml"))
    if not configs:
        raise ConfigurationError(f"no configuration begins with {o.on!r}")
    console = Console()
    found = measure_costs(configs, folder / "results", o.batch_size, o.device, o.rounds, console)
    console.print(show(found))
    for path in draw(found, folder / "results" / "figures"):
        console.print(f"wrote {path}")
