"""The figures of the analysis [D]; which figures the paper has is not known."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import Metrics, by_seed
from common.analysis.report import Found
from common.evaluation.drawing import (
    CYCLE,
    FONT,
    MARKERS,
    blank_figure,
    put_legend_above,
    tidy_axes,
)
from paper_wm.gathered import LABELS, Gathered, methods_of

CURVES = ("base", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen", "unsharp_lam-0.5")
SCATTER = {"uniform/level=0.4": "uniform noise of 0.4", "uniform/level=0.1": "uniform noise of 0.1"}
NOISES = {
    "uniform": "uniform noise, half width",
    "gaussian": "Gaussian noise, standard deviation",
    "saltpepper": "salt and pepper, share of pixels",
}


@dataclass(frozen=True)
class Point:
    """One trained network in the scatter plot.

    Attributes:
        method: Whose.
        signal_gain: Median over units.
        noise_gain: Median over units.
        accuracy: Under noise, in [0, 1].
    """

    method: str
    signal_gain: float
    noise_gain: float
    accuracy: float

    @property
    def gains(self) -> tuple[float, float, float]:
        """Signal gain, noise gain, and the first over the second."""
        ratio = self.signal_gain / max(self.noise_gain, 1e-12)
        return self.signal_gain, self.noise_gain, ratio


def curve(metrics: Metrics, method: str, prefix: str) -> dict[float, list[float]]:
    """Accuracies of a method by strength, one per seed, clean accuracy at 0.

    Args:
        metrics: (method, seed) -> metrics.
        method: Whose.
        prefix: What stands before the number: ``uniform/level=``, ``pgd20/eps=``.
    """
    keys = {
        float(match[1]): key
        for found in metrics.values()
        for key in found
        if (match := re.fullmatch(re.escape(prefix) + r"([\d.e-]+)", key))
    }
    found = {
        at: list(by_seed(metrics, method, key).values())
        for at, key in sorted({0.0: "clean_acc", **keys}.items())
    }
    return {at: values for at, values in found.items() if values} if keys else {}


def draw_curves(
    ax: Axes, metrics: Metrics, methods: Mapping[str, str], prefix: str, xlabel: str
) -> None:
    """Mean accuracy by strength, one line per method, a band of one standard deviation over seeds.

    Args:
        ax: Where to.
        metrics: (method, seed) -> metrics.
        methods: Method -> label.
        prefix: As in :func:`curve`.
        xlabel: Of the axis.
    """
    for i, (method, label) in enumerate(methods.items()):
        found = curve(metrics, method, prefix)
        if not found:
            continue
        at = np.array(list(found))
        middle = 100 * np.array([fmean(values) for values in found.values()])
        spread = 100 * np.array([stdev(v) if len(v) > 1 else 0.0 for v in found.values()])
        color = CYCLE[i % len(CYCLE)]
        # Where a control hides behind its method, its dashes show.
        style: dict[str, Any] = {"linestyle": "--" if "frozen" in method else "-", "color": color}
        ax.fill_between(at, middle - spread, middle + spread, color=color, alpha=0.15, linewidth=0)
        ax.plot(at, middle, marker=MARKERS[i % 6], markersize=3.5, label=label, **style)
    ax.set_ylim(0, 101)
    ax.set_xlabel(xlabel, fontsize=FONT)
    tidy_axes(ax)


def noise_figure(metrics: Metrics, methods: Mapping[str, str]) -> Figure:
    """(1) Accuracy against the strength of noise, a panel for each kind."""
    fig = blank_figure(9.0, 3.3)
    axes = fig.subplots(1, len(NOISES), sharey=True)
    for ax, (name, xlabel) in zip(axes, NOISES.items(), strict=True):
        draw_curves(ax, metrics, methods, f"{name}/level=", xlabel)
    axes[0].set_ylabel("accuracy (%)", fontsize=FONT)
    put_legend_above(fig, axes[0])
    return fig


def attack_figure(metrics: Metrics, methods: Mapping[str, str]) -> Figure:
    """(2) Accuracy against the radius of PGD-20, and of FGSM beside it."""
    fig = blank_figure(7.0, 3.3)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (prefix, name) in zip(axes, (("pgd20", "PGD-20"), ("fgsm", "FGSM")), strict=True):
        draw_curves(ax, metrics, methods, f"{prefix}/eps=", f"radius of {name}, linf")
    axes[0].set_ylabel("accuracy (%)", fontsize=FONT)
    put_legend_above(fig, axes[0])
    return fig


def map_figure(maps: Mapping[str, Tensor], start: float, channels: int = 8) -> Figure:
    """(3) Images of maps, a row per network, one colour scale around the value at the start.

    Args:
        maps: Label -> map, ``(C or 1, H, W)``.
        start: The value of all maps before training, white in the picture.
        channels: Show the first so many.
    """
    shown = {label: m.detach().cpu()[:channels] for label, m in maps.items()}
    reach = max(float((m - start).abs().max()) for m in shown.values()) or 1e-3
    columns = max(len(m) for m in shown.values())
    fig = blank_figure(0.95 * columns + 1.3, 1.0 * len(shown) + 0.5)
    grid = fig.subplots(len(shown), columns, squeeze=False)
    norm = TwoSlopeNorm(start, start - reach, start + reach)
    for axes, (label, images) in zip(grid, shown.items(), strict=True):
        for i, ax in enumerate(axes):
            ax.set(xticks=[], yticks=[])
            if i < len(images):
                picture = ax.imshow(images[i].numpy(), cmap="RdBu_r", norm=norm)
            else:
                ax.set_visible(False)
        axes[0].set_ylabel(label, fontsize=FONT)
    for i, ax in enumerate(grid[0]):
        ax.set_title(f"channel {i}", fontsize=FONT - 1)
    fig.colorbar(picture, ax=grid.ravel().tolist(), shrink=0.8)
    return fig


def histogram_figure(maps: Mapping[str, Tensor], start: float) -> Figure:
    """(4) How the values of maps are distributed, all seeds together.

    Args:
        maps: Label -> values, any shape.
        start: The value before training.
    """
    fig = blank_figure(4.8, 3.0)
    ax = fig.subplots()
    values = {label: m.detach().cpu().flatten().numpy() for label, m in maps.items()}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    bins = np.linspace(low, max(high, low + 1e-3), 40)
    for i, (label, v) in enumerate(values.items()):
        style: dict[str, Any] = {"color": CYCLE[(i + 2) % len(CYCLE)], "linewidth": 1.4}
        ax.hist(v, bins=bins.tolist(), histtype="step", density=True, label=label, **style)
    ax.axvline(start, color="#6b6b6b", linewidth=0.8, linestyle=":")
    ax.set_xlabel("value of the map (dotted: at the start)", fontsize=FONT)
    ax.set_ylabel("density", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def scatter_figure(points: Sequence[Point], labels: Mapping[str, str], noise: str) -> Figure:
    """(5) Accuracy under noise against gains, a dot for each trained network.

    Args:
        points: The networks.
        labels: Method -> label, in the order of the legend.
        noise: What the accuracy is under.
    """
    fig = blank_figure(9.0, 3.6)
    axes = fig.subplots(1, 3, sharey=True)
    titles = ("signal gain (v2)", "noise gain (v1)", "signal gain / noise gain")
    for panel, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for i, (method, label) in enumerate(labels.items()):
            mine = [p for p in points if p.method == method]
            style: dict[str, Any] = {"color": CYCLE[i % 6], "marker": MARKERS[(i + i // 6) % 6]}
            style["markerfacecolor"] = "white" if i >= 6 else CYCLE[i % 6]
            x, y = [p.gains[panel] for p in mine], [100 * p.accuracy for p in mine]
            ax.plot(x, y, linestyle="", markersize=5, label=label, **style)
        ax.set_xscale("log")
        ax.set_xlabel(f"median {title}", fontsize=FONT)
        tidy_axes(ax)
    axes[0].set_ylabel(f"accuracy under {noise} (%)", fontsize=FONT)
    put_legend_above(fig, axes[0])
    return fig


def figures(found: Found) -> dict[str, Figure | None]:
    """Figures (1) to (5), as far as there is something to draw."""
    got: Gathered = found.kept["gathered"]
    pictures: dict[str, Figure | None] = {}
    methods = methods_of(found)
    shown = {method: LABELS[method] for method in CURVES if method in methods}
    if shown:
        pictures["1_noise"] = noise_figure(found.metrics, shown)
        pictures["2_attacks"] = attack_figure(found.metrics, shown)
    seed = min((s for _, s in got.maps), default=None)
    learned = [m for m in ("smoothing", "unsharp") if (m, seed) in got.maps]
    if learned and seed is not None:
        firsts = {LABELS[m]: got.maps[m, seed] for m in learned}
        pictures["3_maps"] = map_figure(firsts, start=1.0)
        every = {
            LABELS[m]: torch.cat([v.flatten() for (n, _), v in got.maps.items() if n == m])
            for m in learned
        }
        pictures["4_histogram"] = histogram_figure(every, start=1.0)
    noise = noise_key(found.metrics)
    points = scatter_points(found.metrics, got.summaries, noise)
    if points:
        labels = {m: LABELS[m] for m in methods if any(p.method == m for p in points)}
        pictures["5_scatter"] = scatter_figure(points, labels, SCATTER[noise])
    return pictures


def noise_key(metrics: Metrics) -> str:
    """The noise of the scatter plot: the strongest of the usual ones that was measured."""
    return next((k for k in SCATTER if any(k in found for found in metrics.values())), "")


def scatter_points(
    metrics: Metrics, summaries: Mapping[tuple[str, int], Mapping[str, float | None]], noise: str
) -> list[Point]:
    """One for every trained network with a map and a result."""
    points = []
    for (method, seed), numbers in summaries.items():
        accuracy = metrics.get((method, seed), {}).get(noise)
        signal, noisy = numbers["signal_gain"], numbers["noise_gain"]
        if accuracy is not None and signal is not None and noisy is not None:
            points.append(Point(method, signal, noisy, accuracy))
    return points
