"""The figures: accuracy against size, against one stage, and the Lipschitz bound."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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
LABELLED = {"cifar10": (50.0, 52.5)}
"""The paper writes names at networks up to the first and from the second number on [P]."""


# ----------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Network:
    """What the figures need of one experiment, means over seeds.

    Attributes:
        name: What tells it from others of its data set.
        accuracy: Under PGD-20, in percent, of the selected checkpoint where that was attacked so.
        spread: Standard deviation of ``accuracy`` over seeds; 0 with one seed.
        parameters: How many.
        macs: Multiply-accumulates per image.
        shape: ``d`` or ``w`` and the numbers of the stages, where the name has them.
    """

    name: str
    accuracy: float
    spread: float
    parameters: float
    macs: float
    shape: tuple[str, tuple[float, ...]] | None


def networks_of(results: Sequence[Result]) -> list[Network]:
    """One entry per experiment that has been measured, by parameters."""
    chosen = {}
    for result in results:
        for label in ("selected", "last"):
            checkpoint = result["checkpoints"].get(label)
            if checkpoint and {METRIC, "parameters", "macs"} <= set(checkpoint["metrics"]):
                chosen[result["experiment"], result["seed"]] = checkpoint
                break
    by_stem: dict[str, list[dict[str, float]]] = {}
    for (stem, _), metrics in comparable(chosen)[0].items():
        if {METRIC, "parameters", "macs"} <= set(metrics):
            by_stem.setdefault(stem, []).append(metrics)
    found = []
    for stem, every in by_stem.items():
        mean = {key: fmean(m[key] for m in every) for key in (METRIC, "parameters", "macs")}
        name = stem.partition("_")[2]
        spread = stdev(100 * m[METRIC] for m in every) if len(every) > 1 else 0.0
        numbers = (100 * mean[METRIC], spread, mean["parameters"], mean["macs"])
        found.append(Network(name, *numbers, shape_of(stem)))
    return sorted(found, key=lambda network: network.parameters)


def shape_of(stem: str) -> tuple[str, tuple[float, ...]] | None:
    """``("w", (10, 10, 8))`` of ``cifar10_grid_w10-10-8``."""
    found = re.search(r"_([dw])(\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)+)(?:_|$)", stem)
    return (found[1], tuple(float(n) for n in found[2].split("-"))) if found else None


# ------------------------------------------------------------------------------------ the figures


def scatter(networks: Sequence[Network], against: str, dataset: str) -> Figure:
    """Robust accuracy of every network against ``parameters`` or ``macs``."""
    unit, title = (1e-6, "parameters (M)") if against == "parameters" else (1e-9, "MACs (G)")
    if max(getattr(network, against) for network in networks) < 1e6 / (unit * 1e6):
        unit, title = unit * 1e3, title.replace("(M)", "(k)").replace("(G)", "(M)")
    fig = blank_figure(5.2, 3.4)
    ax = fig.subplots()
    low, high = LABELLED.get(dataset, (float("inf"), float("-inf")))
    for network in networks:
        at = (getattr(network, against) * unit, network.accuracy)
        ax.errorbar(*at, yerr=network.spread, fmt="o", color=CYCLE[0], markersize=4, capsize=2)
        if network.accuracy <= low or network.accuracy >= high:
            ax.annotate(network.name, at, (3, 3), textcoords="offset points", fontsize=FONT - 2)
    ax.margins(x=0.25, y=0.15)  # room for the names
    ax.set_xlabel(title, fontsize=FONT)
    ax.set_ylabel("PGD-20 accuracy (%), ± sd over seeds", fontsize=FONT)
    tidy_axes(ax)
    return fig


def stage_curves(networks: Sequence[Network], kind: str) -> Figure | None:
    """Accuracy against the width (``w``) or depth (``d``) of one stage, the others as they are.

    ``None`` without two networks that differ in one stage alone.
    """
    points: dict[tuple[float, ...], tuple[float, float]] = {}
    for network in networks:
        if network.shape is not None and network.shape[0] == kind:
            points[network.shape[1]] = network.accuracy, network.spread
    if len(points) < 2:
        return None

    def neighbours(base: tuple[float, ...], stage: int) -> dict[float, tuple[float, float]]:
        return {
            shape[stage]: point
            for shape, point in points.items()
            if len(shape) == len(base)
            and all(a == b for i, (a, b) in enumerate(zip(shape, base, strict=True)) if i != stage)
        }

    base = max(points, key=lambda s: sum(len(neighbours(s, i)) for i in range(len(s))))
    fig = blank_figure(4.8, 3.1)
    ax = fig.subplots()
    drawn = 0
    for stage in range(len(base)):
        line = sorted(neighbours(base, stage).items())
        if len(line) > 1:
            drawn += 1
            style: dict[str, Any] = {
                "color": CYCLE[stage % len(CYCLE)],
                "marker": MARKERS[stage % len(MARKERS)],
            }
            at = [x for x, _ in line]
            middle, spread = zip(*(point for _, point in line), strict=True)
            label = f"stage {stage + 1}"
            ax.errorbar(at, middle, spread, label=label, markersize=4, capsize=2, **style)
    if not drawn:
        return None
    ax.set_xlabel({"w": "widening factor", "d": "blocks"}[kind] + " of the stage", fontsize=FONT)
    ax.set_ylabel("PGD-20 accuracy (%), ± sd over seeds", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def lipschitz_figure(measured: Mapping[str, Mapping[str, float]]) -> Figure:
    """The bound, and the largest and the mean measured ratio, of every experiment."""
    fig = blank_figure(max(3.6, 1.1 * len(measured) + 1.5), 3.1)
    ax = fig.subplots()
    at = np.arange(len(measured))
    for key, label in (("bound", "bound"), ("largest", "largest ratio"), ("mean", "mean ratio")):
        values = [numbers[key] for numbers in measured.values()]
        style: dict[str, Any] = {"color": CYCLE[len(ax.lines)], "marker": MARKERS[len(ax.lines)]}
        ax.plot(at, values, linestyle="", markersize=6, label=label, **style)
    ax.set_yscale("log")
    ax.set_xticks(at, list(measured), fontsize=FONT - 1)
    ax.set_xlim(-0.5, len(measured) - 0.5)
    ax.set_ylabel("l2 stretch of the logits", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig
