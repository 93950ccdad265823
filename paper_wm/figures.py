"""The figures and tables of the analysis [D]; which figures the paper has is not known.

``metrics`` and ``summaries`` are by (method, seed), and ``labels`` are what the legends call
methods, in their order.
"""

import re
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import BySeed, Metrics, by_seed
from common.analysis.report import Found
from common.evaluation.drawing import (
    CYCLE,
    FONT,
    GREY,
    MARKERS,
    blank_figure,
    put_legend_above,
    tidy_axes,
    tidy_log_axis,
)
from paper_wm.measures import (
    WHITE_BOX,
    Evidence,
    Summaries,
    correlations,
    methods_of,
    of_method,
)

CURVES = ("base", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen", "unsharp_lam-0.5")
SCATTER = {"uniform/level=0.4": "uniform noise of 0.4", "uniform/level=0.1": "uniform noise of 0.1"}
NOISES = {
    "uniform/level=": "uniform noise, half width",
    "gaussian/level=": "Gaussian noise, standard deviation",
    "saltpepper/level=": "salt and pepper, share of pixels",
}
ATTACKS = {"pgd20/eps=": "radius of PGD-20, linf", "fgsm/eps=": "radius of FGSM, linf"}
GAINS = {
    "signal_gain": "signal gain (v2)",
    "noise_gain": "noise gain (v1)",
    "ratio": "signal gain / noise gain",
}


def curve(metrics: Metrics, method: str, prefix: str) -> dict[float, list[float]]:
    """Accuracies of a method by strength, one per seed, clean accuracy at 0.

    ``prefix`` is what stands before the number: ``uniform/level=``, ``pgd20/eps=``.
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


def draw_curves(ax: Axes, metrics: Metrics, labels: Mapping[str, str], prefix: str) -> None:
    """Mean accuracy by strength, one line per method, a band of one standard deviation over seeds.

    ``prefix`` is as in :func:`curve`.
    """
    for i, (method, label) in enumerate(labels.items()):
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
    tidy_axes(ax)


def curve_figure(metrics: Metrics, labels: Mapping[str, str], panels: Mapping[str, str]) -> Figure:
    """(1, 2) Accuracy against strength, a panel for each prefix with the label of its axis."""
    fig = blank_figure(3.0 + 2.0 * len(panels), 3.3)
    axes = fig.subplots(1, len(panels), sharey=True)
    for ax, (prefix, xlabel) in zip(axes, panels.items(), strict=True):
        draw_curves(ax, metrics, labels, prefix)
        ax.set_xlabel(xlabel, fontsize=FONT)
    axes[0].set_ylabel("accuracy (%)", fontsize=FONT)
    put_legend_above(fig, axes[0])
    return fig


def map_figure(maps: Mapping[str, Tensor], start: float = 1.0, channels: int = 8) -> Figure:
    """(3) Images of maps ``(C or 1, H, W)`` by label, a row per network.

    White is ``start``, the value of all maps before training.
    """
    shown = {label: m[:channels] for label, m in maps.items()}
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


def histogram_figure(maps: Mapping[str, Tensor], start: float = 1.0) -> Figure:
    """(4) The distribution of the values of maps by label; ``start`` is that before training."""
    fig = blank_figure(4.8, 3.0)
    ax = fig.subplots()
    every = torch.cat(list(maps.values()))
    low, high = float(every.min()), float(every.max())
    bins = np.linspace(low, max(high, low + 1e-3), 40).tolist()
    for (label, values), color in zip(maps.items(), CYCLE[2:], strict=False):
        style: dict[str, Any] = {"color": color, "linewidth": 1.4, "histtype": "step"}
        ax.hist(values.numpy(), bins=bins, density=True, label=label, **style)
    ax.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xlabel("value of the map (dotted: at the start)", fontsize=FONT)
    ax.set_ylabel("density", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def gains_and_accuracy(
    metrics: Metrics, summaries: Summaries, method: str, gain: str
) -> list[tuple[float, float]]:
    """A gain and the accuracy under :func:`noise_key`, for each seed of a method with both."""
    gains = by_seed(summaries, method, gain)
    accuracy = by_seed(metrics, method, noise_key(metrics))
    return [(gains[seed], accuracy[seed]) for seed in gains if seed in accuracy]


def scatter_figure(metrics: Metrics, summaries: Summaries, labels: Mapping[str, str]) -> Figure:
    """(5) Accuracy under noise against gains, a dot for each trained network."""
    fig = blank_figure(9.0, 3.6)
    axes = fig.subplots(1, 3, sharey=True)
    for ax, (gain, title) in zip(axes, GAINS.items(), strict=True):
        for i, (method, label) in enumerate(labels.items()):
            style: dict[str, Any] = {"color": CYCLE[i % 6], "marker": MARKERS[(i + i // 6) % 6]}
            style["markerfacecolor"] = "white" if i >= 6 else CYCLE[i % 6]
            points = gains_and_accuracy(metrics, summaries, method, gain)
            x, y = [at for at, _ in points], [100 * accuracy for _, accuracy in points]
            ax.plot(x, y, linestyle="", markersize=5, label=label, **style)
        ax.set_xscale("log")
        tidy_log_axis(ax.xaxis)
        ax.set_xlabel(f"median {title}", fontsize=FONT)
        tidy_axes(ax)
    axes[0].set_ylabel(f"accuracy under {SCATTER[noise_key(metrics)]} (%)", fontsize=FONT)
    put_legend_above(fig, axes[0])
    return fig


def noise_key(metrics: Metrics) -> str:
    """The noise of the scatter plot: the strongest of the usual ones that was measured."""
    return next((k for k in SCATTER if any(k in found for found in metrics.values())), "")


def figures(found: Found) -> dict[str, Figure | None]:
    """Figures (1) to (5) by name, as far as there is something to draw."""
    metrics, got = found.metrics, found.kept["evidence"]
    maps: dict[tuple[str, int], Tensor] = got.maps
    methods = methods_of(metrics)
    pictures: dict[str, Figure | None] = {}
    if shown := {method: methods[method] for method in CURVES if method in methods}:
        pictures["1_noise"] = curve_figure(metrics, shown, NOISES)
        pictures["2_attacks"] = curve_figure(metrics, shown, ATTACKS)
    seed = min((s for _, s in maps), default=0)
    if learned := [m for m in ("smoothing", "unsharp") if (m, seed) in maps]:
        pictures["3_maps"] = map_figure({m: maps[m, seed] for m in learned})
        every = {m: [v.flatten() for (n, _), v in maps.items() if n == m] for m in learned}
        pictures["4_histogram"] = histogram_figure({m: torch.cat(v) for m, v in every.items()})
    points = {m: gains_and_accuracy(metrics, got.summaries, m, "ratio") for m in methods}
    if labels := {method: label for method, label in methods.items() if points[method]}:
        pictures["5_scatter"] = scatter_figure(metrics, got.summaries, labels)
    return pictures


# -------------------------------------------------------------------------- tables of E4 and E6


def spread(values: BySeed, digits: int = 2, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds; empty where there is none."""
    found = [scale * value for value in values.values()]
    if not found:
        return ""
    error = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{error}"


AMPLIFICATION = {
    "signal_gain": "signal gain (v2)",
    "noise_gain": "noise gain (v1)",
    "ratio": "ratio",
    "signal_spread": "spread of log signal gain",
    "snr_in": "SNR in",
    "snr_out": "SNR out",
    "spearman_variance_gain": "variance, gain",
    "spearman_variance_map": "variance, map",
    "spearman_map_sensitivity": "map, gradient",
    "map_sd": "sd of the map",
    "white_noise_theory": "white noise, theory",
    "white_noise_measured": "measured",
}


def amplification_table(found: Found) -> dict[str, Any]:
    """E4: gains of the first map, with frozen and shuffled maps as controls."""
    summaries: Summaries = found.kept["evidence"].summaries
    lines, points = [], []
    for method, label in methods_of(found.metrics).items():
        for name, title in ((method, label), (f"{method}_shuffled", f"{label}, values shuffled")):
            if by_seed(summaries, name, "signal_gain"):
                cells = [spread(by_seed(summaries, name, key)) for key in AMPLIFICATION]
                lines.append([title, *cells])
        points += gains_and_accuracy(found.metrics, summaries, method, "ratio")
    note = (
        "Of trained networks, their first map. Gains are variances at the output over variances "
        "at the input, of clean test images (signal) and of what uniform noise of 0.2 changes "
        "(noise); medians over units off the border. SNR: clean variance over noise variance, all "
        "units. Rank correlations over units of input variance with gain (confounded: read it "
        "against the frozen map), of input variance with the map, of the map's magnitude with the "
        "gradient at its input. Before batch-norm the scale of a channel is undone, so absolute "
        "gains say little there. White noise: mean gain over units, by the closed form and put "
        "through the layer."
    )
    if len(points) > 2:
        link = correlations(*torch.tensor(points).T)["spearman"]
        if link is not None:
            note += (
                f" Across {len(points)} networks, the rank correlation of signal gain over noise "
                f"gain with accuracy under {SCATTER[noise_key(found.metrics)]} is {link:+.2f}."
            )
    header = ["map", *AMPLIFICATION.values()]
    return {"title": "E4: amplification", "note": note, "header": header, "lines": lines}


def checks_table(found: Found) -> dict[str, Any]:
    """E6: whether the accuracy under PGD-20 survives what should break masked gradients."""
    columns = {
        WHITE_BOX: "PGD-20",
        "pgd100": "PGD-100x3",
        "bypass/ce_bypass": "past the map",
        "aa": "AutoAttack",
        "deepfool": "DeepFool",
    }
    got: Evidence = found.kept["evidence"]
    lines = []
    for method, label in methods_of(found.metrics).items():
        cells = [spread(by_seed(found.metrics, method, key), 1, 100.0) for key in columns]
        failed = of_method(got.audits, method)
        words = "; ".join(f"seed {s}: {', '.join(ids)}" for s, ids in failed.items() if ids)
        moved = spread(of_method(got.transferred, method), 1, 100.0)
        lines.append([label, *cells, moved, words or ("none" if failed else "")])
    note = (
        "Accuracy in percent on the same examples of the test split, all at the radius of the "
        "threat model. Honest gradients: more steps and restarts, and AutoAttack, take little "
        "beyond PGD-20; gradients past the map and images made on the base network of the same "
        "seed attack worse. The last column: checks of the audit that failed."
    )
    header = ["network", *columns.values(), "transfer from base", "failed checks"]
    return {"title": "E6: adaptive checks", "note": note, "header": header, "lines": lines}
