"""E4, what a larger map costs: ``python -m paper_rcm costs --on cifar10_resnet18``.

For every network of the configurations: parameters, multiply-accumulates, side of the last map,
peak memory of a training step, and the time of a step of adversarial training relative to the same
network with its base strides and no up-sampling. Times are medians over rounds in which the two
take turns; they belong to a device and a batch size, which ``costs.json`` names.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from common.analysis.profiling import (
    Ratio,
    adversarial_training_step,
    peak_memory,
    relative_times,
)
from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.evaluation.drawing import save_figure
from common.evaluation.measures import cost
from common.files import read_sealed_json, write_sealed_json
from common.limits import read_yaml
from common.parsing import build, load_named
from common.results.provenance import device_name
from common.results.selection import select
from common.results.store import COSTS, read_costs
from paper_rcm.figures import cost_figure
from paper_rcm.method import BASE_STRIDES, parse_strides

CONFIGS = Path(__file__).parent / "configs"

DATA = {
    "digits": ((1, 8, 8), 10),
    "fashion": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "tiny": ((3, 64, 64), 200),
}
"""Shape of the images and number of classes, by what a stem begins with."""

MEMORY_BATCH = 128
"""Of the step whose memory is counted: that of the recipes."""

Section = dict[str, Any]
"""``{class_path, init_args}`` of an :class:`~paper_rcm.method.EnlargedNetwork`."""


def net_section(config: Path) -> Section:
    """The network of a configuration, as it is written, with the classes of its data."""
    try:
        section: Section = read_yaml(config)["model"]["init_args"]["net"]
        arguments = section["init_args"]["arch"].setdefault("init_args", {})
        arguments["num_classes"] = DATA[config.stem.partition("_")[0]][1]
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{config} cannot be read ({type(error).__name__}: {error}); its name has to begin "
            f"with {', '.join(DATA)}, its model.init_args.net to be an EnlargedNetwork with an arch"
        ) from error
    return section


def make(section: Section) -> Any:
    """The network of a section."""
    return build({"net": nn.Module}, {"net": section}).net


def base_section(section: Section) -> Section:
    """The same network with its base strides and no up-sampling."""
    found = copy.deepcopy(section)
    arguments = found["init_args"]
    if arguments.get("scale_factor", 1) != 1:
        arguments.pop("mode", None)
    arguments["scale_factor"] = 1
    arch, inner = load_named(arguments["arch"]["class_path"]), arguments["arch"]["init_args"]
    for cls, strides in BASE_STRIDES.items():
        if issubclass(arch, cls):
            inner["strides"] = list(parse_strides(strides))
    if "image_size" in inner:
        inner["image_size"] = 32
    return found


def _key(*settings: Section) -> str:
    """Of networks and settings, independent of the order of their arguments."""
    return json.dumps(settings, sort_keys=True)


def measure_costs(
    configs: Sequence[Path],
    results: str | Path,
    batch_size: int,
    device: str = "cpu",
    rounds: int = 20,
    console: Console | None = None,
) -> dict[str, Any]:
    """The costs of experiments, by stem, measured unless they are in ``results/costs.json``.

    Each is filed with the device and the batch size of its timed steps; other experiments stay.
    """
    path = Path(results) / COSTS
    # The first reading says what is wrong with a file.
    known = read_sealed_json(path)["experiments"] if read_costs(results) else {}
    timed = {"device": device_name(device), "batch_size": batch_size, "torch": torch.__version__}
    shared = {_key(one["network"], one["timed"]): one["metrics"] for one in known.values()}
    found: dict[str, Any] = {}
    for config in configs:
        section = net_section(config)
        key = _key(section, timed)
        if key not in shared:
            data = DATA[config.stem.partition("_")[0]]
            shared[key] = _measure(section, *data, batch_size, device, rounds)
        found[config.stem] = {"network": section, "timed": timed, "metrics": shared[key]}
        known = dict(sorted((known | found).items()))
        write_sealed_json(path, {"schema": 1, "experiments": known})
        if console is not None:
            console.print(f"{config.stem}: step time x {shared[key]['step_time']:.2f}")
    return found


def count(section: Section, shape: Sequence[int]) -> dict[str, float]:
    """``parameters``, ``macs`` of one image ``(C, H, W)`` and ``map_side``, 0 without maps."""
    with torch.device("meta"):
        net, image = make(section).eval(), torch.empty(*shape)
    features = net.features(image[None])
    side = features.shape[-1] if features.ndim == 4 else 0
    return {**cost(net, image), "map_side": float(side)}


def _measure(
    section: Section, shape: Sequence[int], classes: int, batch_size: int, device: str, rounds: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, *shape, generator=generator).to(device)
    y = torch.randint(0, classes, (batch_size,), generator=generator).to(device)
    attack, times = PGD(eps="8/255", step_size="2/255", steps=10), Ratio(1.0, 1.0, 1.0)
    base = base_section(section)
    if _key(section) != _key(base):
        steps = {
            name: adversarial_training_step(make(one).to(device), attack, x, y)
            for name, one in (("base", base), ("this", section))
        }
        times = relative_times(steps, "base", rounds, 2, device)["this"]
    return {
        **count(section, shape),
        "peak_memory": float(peak_memory(lambda: make(section), shape, MEMORY_BATCH)),
        "step_time": times.median,
        "step_time_lower": times.lower,
        "step_time_upper": times.upper,
    }


def show(entries: Mapping[str, Any]) -> Table:
    """The entries as a table for a terminal."""
    table = Table("experiment", title="Cost of a network", title_justify="left")
    for name in ("parameters (M)", "MACs (M)", "last map", "peak memory (MB)", "step time"):
        table.add_column(name, justify="right")
    for stem, entry in entries.items():
        of = entry["metrics"]
        millions = [f"{of[key] / 1e6:,.2f}" for key in ("parameters", "macs", "peak_memory")]
        time = f"{of['step_time']:.2f} ({of['step_time_lower']:.2f} to {of['step_time_upper']:.2f})"
        table.add_row(stem, *millions[:2], f"{of['map_side']:.0f}", millions[2], time)
    return table


def draw(results: Path, dataset: str) -> Figure | None:
    """E4's figure of a data set: the digits, or ResNet-18 in its ways to a larger map."""
    return cost_figure(
        {
            stem.removeprefix(f"{dataset}_"): metrics
            for stem, metrics in read_costs(results).items()
            if stem.startswith(f"{dataset}_")
            and (dataset == "digits" or ("_resnet18_" in stem and stem.endswith("_at")))
        }
    )


def main(args: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m paper_rcm costs", description=__doc__)
    parser.add_argument("--on", default="digits", metavar="PREFIX", help="only these experiments")
    parser.add_argument("--batch_size", type=int, default=128, help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    o = parser.parse_args(args)
    stems = select((path.stem for path in CONFIGS.glob("*.yaml")), o.on)
    if not stems:
        raise ConfigurationError(f"no configuration is meant by {o.on!r}")
    configs = [CONFIGS / f"{stem}.yaml" for stem in stems]
    results, console = Path("runs", "paper_rcm", "results"), Console()
    found = measure_costs(configs, results, o.batch_size, o.device, o.rounds, console)
    console.print(show(found))
    for dataset in sorted({stem.partition("_")[0] for stem in found}):
        if figure := draw(results, dataset):
            path = save_figure(figure, results / "figures" / f"{dataset}_cost.png")
            console.print(f"wrote {path}")
