"""The figures: what moves, what it gains, what it costs, and what the features look like."""

import re
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.analysis.claims import Metrics, by_seed
from common.analysis.figures import error_bars
from common.evaluation.drawing import (
    CYCLE,
    FONT,
    MARKERS,
    accuracy_curve,
    blank_figure,
    put_legend_above,
    tidy_axes,
)

AR = "pgd20/ce_f"
BUDGET = "budget/eps="


def network_of(method: str) -> tuple[str, str, float]:
    """Strides, pooling and up-sampling factor of ``222_m2_avg``, ``resnet18_1122_at``."""
    strides = re.search(r"(?:^|_)(\d{3,})(?:_|$)", method)
    factor = re.search(r"(?:^|_)m(\d[\d.]*)", method)
    pool = "max" if "max" in method.split("_") else "avg"
    return strides[1] if strides else "", pool, float(factor[1]) if factor else 1.0


def map_side(method: str, image: int) -> float:
    """Side of the last map of a residual network."""
    strides, _, factor = network_of(method)
    side = round(image * factor)
    for stride in strides:
        side = -(-side // int(stride))
    return float(side)


def map_name(method: str, image: int) -> str:
    """The last map as ``7x7``."""
    side = map_side(method, image)
    return f"{side:.0f}x{side:.0f}"


def _draw(ax: Axes, line: Mapping[Any, float], number: int, label: str) -> None:
    at = sorted(line)
    style: dict[str, Any] = {"color": CYCLE[number], "marker": MARKERS[number], "markersize": 5}
    ax.plot(at, [line[x] for x in at], label=label, **style)


def _finish(ax: Axes, xlabel: str, ylabel: str, **limits: Any) -> None:
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.set_ylabel(ylabel, fontsize=FONT)
    ax.set_ylim(**limits)
    tidy_axes(ax)


def simulation_figure(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Movement against the side of the map, and against the stride."""
    fig = blank_figure(7.0, 3.0)
    titles = {"side": "side of the map", "stride": "stride, 32x32 images"}
    for ax, (axis, pools) in zip(fig.subplots(1, 2), found.items(), strict=True):
        for i, (pool, line) in enumerate(pools.items()):
            closed = "average pooling, closed form"
            _draw(ax, line, i, closed if pool == "predicted" else f"{pool} pooling")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _finish(ax, titles[axis], "movement of the pooled feature (l2)")
    put_legend_above(fig, ax)
    return fig


def accuracy_figure(metrics: Metrics, image: int, label: Callable[[str], str]) -> Figure:
    """NA, CA and AR of every network, by the side of its last map (E5)."""
    names = sorted({m for m, _ in metrics}, key=lambda m: (network_of(m)[1], map_side(m, image), m))
    fig = blank_figure(max(4.8, 0.9 * len(names) + 1.5), 3.3)
    ax = fig.subplots()
    kinds = {"clean_acc": "natural", "consistency": "consistency", AR: "robust"}
    for i, (key, kind) in enumerate(kinds.items()):
        # Side by side, since consistency and robust accuracy are nearly equal.
        points = {
            n + 0.12 * (i - 1): [100 * one for one in values]
            for n, name in enumerate(names)
            if (values := by_seed(metrics, name, key).values())
        }
        error_bars(ax, points, i, kind, linestyle="")
    ticks = [f"{label(name)}, {map_name(name, image)}".replace(", ", "\n") for name in names]
    ax.set_xticks(range(len(names)), ticks, fontsize=FONT - 1)
    _finish(ax, "", "accuracy (%), ± sd over seeds")
    put_legend_above(fig, ax)
    return fig


def movement_figure(metrics: Metrics, image: int) -> Figure | None:
    """Movement of the pooled feature of trained networks against the side of the map (E6)."""
    fig = blank_figure(7.0, 3.0)
    keys = {"pooled_change": "PGD", "pooled_change_noise": "uniform noise"}
    drawn = False
    for ax, (key, title) in zip(fig.subplots(1, 2), keys.items(), strict=True):
        for i, pool in enumerate(("avg", "max")):
            points = {
                map_side(name, image): list(values)
                for name in sorted({m for m, _ in metrics})
                if network_of(name)[1:] == (pool, 1.0)
                and (values := by_seed(metrics, name, key).values())
            }
            if points:
                drawn = True
                error_bars(ax, points, i, f"{pool} pooling")
        label = f"side of the last map ({title})"
        _finish(ax, label, "movement (l2), ± sd over seeds", bottom=0)
    if not drawn:
        return None
    put_legend_above(fig, ax)
    return fig


def budget_figure(metrics: Metrics) -> Figure | None:
    """Robust accuracy against the radius (E14); it has to reach 0."""
    lines: dict[str, dict[float, float]] = {}
    for name, key in sorted({(m, key) for (m, _), found in metrics.items() for key in found}):
        if radius := re.fullmatch(rf"{BUDGET}([\d.]+)", key):
            values = by_seed(metrics, name, key).values()
            lines.setdefault(name, {})[float(radius[1])] = fmean(values)
    radii = sorted({radius for line in lines.values() for radius in line})
    if not radii:
        return None
    series = {name: [line.get(r, float("nan")) for r in radii] for name, line in lines.items()}
    return accuracy_curve(radii, series, "radius, linf")


def cost_figure(costs: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Multiply-accumulates, peak memory and step time against the side of the last map (E4).

    Of ``costs``, by method, those of average pooling and of other strides or up-sampling are drawn.
    """
    panels = {
        "macs": ("MACs (M)", 1e-6),
        "peak_memory": ("peak memory (MB)", 1e-6),
        "step_time": ("step time (× base)", 1.0),
    }
    lines: dict[str, dict[float, str]] = {"strides": {}, "up-sampling": {}}
    for name, cost in costs.items():
        strides, pool, factor = network_of(name)
        if pool != "avg" or not strides or not cost.get("map_side"):
            continue
        # The base network is where both lines begin; of strides with an equal product, those with
        # the ones first are the rule's.
        if factor == 1 and list(strides) == sorted(strides):
            lines["strides"][cost["map_side"]] = name
        if factor != 1 or cost.get("step_time") == 1.0:
            lines["up-sampling"][cost["map_side"]] = name
    if len(lines["strides"]) < 2:
        return None
    fig = blank_figure(8.4, 2.9)
    for ax, (key, (label, scale)) in zip(fig.subplots(1, 3), panels.items(), strict=True):
        for i, (how, points) in enumerate(lines.items()):
            _draw(ax, {side: scale * costs[name][key] for side, name in points.items()}, i, how)
        _finish(ax, "side of the last map", label, bottom=0)
    put_legend_above(fig, ax)
    return fig


def features_figure(embeddings: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Figure:
    """Points ``(N, 2)`` and labels ``(N,)``, a column per network, a panel per title (E8)."""
    rows = len(next(iter(embeddings.values())))
    fig = blank_figure(2.5 * len(embeddings), 2.7 * rows)
    axes = fig.subplots(rows, len(embeddings), squeeze=False)
    for column, panels in zip(axes.T, embeddings.values(), strict=True):
        for ax, (title, (points, y)) in zip(column, panels.items(), strict=True):
            ax.scatter(*points.T, s=4, c=y, cmap="tab10", linewidths=0)
            ax.set_title(title, fontsize=FONT)
            ax.set(xticks=[], yticks=[])
    return fig
