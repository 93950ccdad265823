"""The figures: accuracy against size, against one stage, and the Lipschitz bound."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.analysis.figures import error_bars
from common.evaluation.drawing import (
    CYCLE,
    FONT,
    MARKERS,
    blank_figure,
    put_legend_above,
    tidy_axes,
)
from common.results.bases import comparable
from common.results.schema import Result

METRIC = "pgd20/ce_f"
NEEDED = (METRIC, "parameters", "macs")
LABELLED = {"cifar10": (50.0, 52.5)}
"""The paper writes names at networks up to the first and from the second number on [P]."""


@dataclass(frozen=True)
class Network:
    """What the figures need of one experiment.

    ``accuracies``, by seed, are under PGD-20, in percent, of the selected checkpoint where that
    was attacked so; ``macs`` are per image.
    """

    name: str
    accuracies: Sequence[float]
    parameters: float
    macs: float


def networks_of(results: Sequence[Result], prefix: str) -> list[Network]:
    """One entry per experiment that has been measured, by parameters, named without ``prefix``."""
    chosen = {}
    for result in results:
        for label in ("selected", "last"):
            checkpoint = result["checkpoints"].get(label)
            if checkpoint and set(NEEDED) <= set(checkpoint["metrics"]):
                chosen[result["experiment"], result["seed"]] = checkpoint
                break
    by_stem: dict[str, list[tuple[float, ...]]] = {}
    for (stem, _), metrics in comparable(chosen)[0].items():
        if set(NEEDED) <= set(metrics):
            by_stem.setdefault(stem, []).append(tuple(metrics[key] for key in NEEDED))
    found = []
    for stem, every in by_stem.items():
        accuracies, parameters, macs = zip(*every, strict=True)
        percent = [100 * value for value in accuracies]
        found.append(Network(stem.removeprefix(prefix), percent, fmean(parameters), fmean(macs)))
    return sorted(found, key=lambda network: network.parameters)


def shape_of(name: str) -> tuple[str, tuple[float, ...]] | None:
    """``("w", (10, 10, 8))`` of ``grid_w10-10-8``."""
    found = re.search(r"(?:^|_)([dw])(\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)+)(?:_|$)", name)
    return (found[1], tuple(float(n) for n in found[2].split("-"))) if found else None


def _finish(ax: Axes, xlabel: str, ylabel: str = "PGD-20 accuracy (%), ± sd over seeds") -> None:
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.set_ylabel(ylabel, fontsize=FONT)
    tidy_axes(ax)


def scatter(networks: Sequence[Network], against: str, dataset: str) -> Figure:
    """Robust accuracy of every network against ``parameters`` or ``macs``."""
    unit, title = (1e-6, "parameters (M)") if against == "parameters" else (1e-9, "MACs (G)")
    if max(getattr(network, against) for network in networks) < 1 / unit:
        unit, title = unit * 1e3, title.replace("(M)", "(k)").replace("(G)", "(M)")
    fig = blank_figure(5.2, 3.4)
    ax = fig.subplots()
    low, high = LABELLED.get(dataset, (float("inf"), float("-inf")))
    for network in networks:
        x, accuracy = getattr(network, against) * unit, fmean(network.accuracies)
        error_bars(ax, {x: network.accuracies})
        if accuracy <= low or accuracy >= high:
            place: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points"}
            ax.annotate(network.name, (x, accuracy), fontsize=FONT - 2, **place)
    ax.margins(x=0.25, y=0.15)  # room for the names
    _finish(ax, title)
    return fig


def stage_curves(networks: Sequence[Network], kind: str) -> Figure | None:
    """Accuracy against the width (``w``) or depth (``d``) of one stage, the others as they are.

    ``None`` without two networks that differ in one stage alone.
    """
    points: dict[tuple[float, ...], Sequence[float]] = {}
    for network in networks:
        if (shape := shape_of(network.name)) and shape[0] == kind:
            points[shape[1]] = network.accuracies

    def lines(base: tuple[float, ...]) -> dict[int, dict[float, Sequence[float]]]:
        found = {}
        for i in range(len(base)):
            rest = (base[:i], base[i + 1 :])
            line = {s[i]: p for s, p in points.items() if (s[:i], s[i + 1 :]) == rest}
            if len(line) > 1:
                found[i] = line
        return found

    def neighbours(found: dict[int, dict[float, Sequence[float]]]) -> int:
        return sum(len(points) - 1 for points in found.values())

    drawn = max(map(lines, points), key=neighbours, default={})
    if not drawn:
        return None
    fig = blank_figure(4.8, 3.1)
    ax = fig.subplots()
    for stage, found in drawn.items():
        error_bars(ax, found, stage, f"stage {stage + 1}")
    _finish(ax, {"w": "widening factor", "d": "blocks"}[kind] + " of the stage")
    put_legend_above(fig, ax)
    return fig


def lipschitz_figure(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """The bound, the largest and the mean measured ratio of every experiment, means over seeds."""
    fig = blank_figure(max(3.6, 1.1 * len(measured) + 1.5), 3.1)
    ax = fig.subplots()
    labels = {"bound": "bound", "largest": "largest ratio", "mean": "mean ratio"}
    for i, (key, label) in enumerate(labels.items()):
        values = [fmean(numbers[key] for numbers in runs) for runs in measured.values()]
        ax.plot(values, MARKERS[i], color=CYCLE[i], markersize=6, label=label)
    ax.set_yscale("log")
    names = [name.replace(", ", ",\n") for name in measured]
    ax.set_xticks(range(len(measured)), names, fontsize=FONT - 1)
    ax.set_xlim(-0.5, len(measured) - 0.5)
    _finish(ax, "", "l2 stretch of the logits")
    put_legend_above(fig, ax)
    return fig
