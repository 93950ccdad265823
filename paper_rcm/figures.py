"""The figures: what moves, what it gains, what it costs, and what the features look like.

Everything here draws numbers it is given; ``analysis.py`` finds them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from common.evaluation.drawing import (
    CYCLE,
    FONT,
    MARKERS,
    accuracy_curve,
    blank_figure,
    put_legend_above,
    tidy_axes,
)
from paper_rcm.measures import Embedding

AR = "pgd20/ce_f"
BUDGET = "budget/eps="


def simulation_figure(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Movement against the side of the map, and against the stride."""
    fig = blank_figure(7.0, 3.0)
    titles = {"side": "side of the map", "stride": "stride, 32x32 images"}
    for ax, (axis, pools) in zip(fig.subplots(1, 2), found.items(), strict=True):
        for i, (pool, line) in enumerate(pools.items()):
            style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 4}
            label = "average pooling, closed form" if pool == "predicted" else f"{pool} pooling"
            ax.plot(list(line), list(line.values()), label=label, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(titles[axis], fontsize=FONT)
        ax.set_ylabel("movement of the pooled feature (l2)", fontsize=FONT)
        tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def network_of(method: str) -> tuple[str, str, float]:
    """Strides, pooling and up-sampling factor of ``222_m2_avg``, ``resnet18_1122_at``."""
    parts = method.split("_")
    strides = next((part for part in parts if part.isdigit() and len(part) > 2), "")
    pool = "max" if "max" in parts else "avg"
    factor = next((part for part in parts if part[:1] == "m" and part[1:2].isdigit()), "m1")
    digits = "".join(c for c in factor[1:] if c.isdigit() or c == ".")
    return strides, pool, float(digits)


def map_side(method: str, image: int) -> float:
    """Side of the last map of a residual network."""
    strides, _, factor = network_of(method)
    side = round(image * factor)
    for stride in strides:
        side = -(-side // int(stride))
    return float(side)


def accuracy_figure(metrics: Mapping[tuple[str, int], Mapping[str, float]], image: int) -> Figure:
    """NA, CA and AR of every network, by the side of its last map (E5)."""
    names = sorted({m for m, _ in metrics}, key=lambda m: (network_of(m)[1], map_side(m, image)))
    fig = blank_figure(max(4.8, 0.9 * len(names) + 1.5), 3.3)
    ax = fig.subplots()
    for i, (key, label) in enumerate(
        (("clean_acc", "natural"), ("consistency", "consistency"), (AR, "robust"))
    ):
        values = {n: _values(metrics, name, key) for n, name in enumerate(names)}
        shown = {n: [100 * one for one in found] for n, found in values.items() if found}
        # Side by side, since consistency and robust accuracy are nearly equal.
        at = [n + 0.12 * (i - 1) for n in shown]
        style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 5}
        middle, spread = [fmean(v) for v in shown.values()], [_spread(v) for v in shown.values()]
        ax.errorbar(at, middle, spread, linestyle="", capsize=2, label=label, **style)
    sides = [f"{name}\n{map_side(name, image):.0f}x{map_side(name, image):.0f}" for name in names]
    ax.set_xticks(range(len(names)), sides, fontsize=FONT - 1)
    ax.set_ylabel("accuracy (%), ± sd over seeds", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def movement_figure(
    metrics: Mapping[tuple[str, int], Mapping[str, float]], image: int
) -> Figure | None:
    """Movement of the pooled feature of trained networks against the side of the map (E6)."""
    fig = blank_figure(7.0, 3.0)
    keys = {"pooled_change": "PGD-20", "pooled_change_noise": "uniform noise"}
    drawn = False
    for ax, (key, title) in zip(fig.subplots(1, 2), keys.items(), strict=True):
        for i, pool in enumerate(("avg", "max")):
            points: dict[float, list[float]] = {}
            for name in {m for m, _ in metrics}:
                values = _values(metrics, name, key)
                if network_of(name)[1] == pool and network_of(name)[2] == 1 and values:
                    points[map_side(name, image)] = values
            if points:
                drawn = True
                sides = sorted(points)
                style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 5}
                middle = [fmean(points[side]) for side in sides]
                spread = [_spread(points[side]) for side in sides]
                ax.errorbar(sides, middle, spread, capsize=2, label=f"{pool} pooling", **style)
        ax.set_xlabel(f"side of the last map ({title})", fontsize=FONT)
        ax.set_ylabel("movement (l2), ± sd over seeds", fontsize=FONT)
        ax.set_ylim(bottom=0)
        tidy_axes(ax)
    if not drawn:
        return None
    put_legend_above(fig, ax)
    return fig


def _values(
    metrics: Mapping[tuple[str, int], Mapping[str, float]], name: str, key: str
) -> list[float]:
    return [found[key] for (method, _), found in metrics.items() if method == name and key in found]


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def budget_figure(metrics: Mapping[tuple[str, int], Mapping[str, float]]) -> Figure | None:
    """Robust accuracy against the radius (E14); it has to reach 0."""
    lines: dict[str, dict[float, float]] = {}
    for name in sorted({m for m, _ in metrics}):
        for key in sorted({k for (m, _), found in metrics.items() if m == name for k in found}):
            radius = key.removeprefix(BUDGET)
            if key.startswith(BUDGET) and radius.replace(".", "", 1).isdigit():
                lines.setdefault(name, {})[float(radius)] = fmean(_values(metrics, name, key))
    radii = sorted({radius for line in lines.values() for radius in line})
    if not radii:
        return None
    series = {name: [line.get(r, float("nan")) for r in radii] for name, line in lines.items()}
    return accuracy_curve(radii, series, "radius, linf")


def cost_figure(costs: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Multiply-accumulates, peak memory and step time against the side of the last map (E4).

    Args:
        costs: By what stands after the data set in the stem; those of networks with average pooling
            that differ in strides or up-sampling.
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
            sides = sorted(points)
            values = [scale * costs[points[side]][key] for side in sides]
            style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 5}
            ax.plot(sides, values, label=how, **style)
        ax.set_xlabel("side of the last map", fontsize=FONT)
        ax.set_ylabel(label, fontsize=FONT)
        ax.set_ylim(bottom=0)
        tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def features_figure(embeddings: Mapping[str, Mapping[str, Embedding]]) -> Figure:
    """Pooled features in two dimensions, a column per network, clean above attacked (E8).

    Args:
        embeddings: By network, then by kind of image.
    """
    kinds = list(next(iter(embeddings.values())))
    fig = blank_figure(2.5 * len(embeddings), 2.7 * len(kinds))
    axes = fig.subplots(len(kinds), len(embeddings), squeeze=False)
    for column, (name, by_kind) in enumerate(embeddings.items()):
        for row, kind in enumerate(kinds):
            ax, found = axes[row][column], by_kind[kind]
            ax.scatter(*found.points.T, s=4, c=found.y, cmap="tab10", linewidths=0)
            ax.set_title(f"{name}, {kind}: {found.silhouette:.2f}", fontsize=FONT)
            ax.set_xticks([])
            ax.set_yticks([])
    return fig
