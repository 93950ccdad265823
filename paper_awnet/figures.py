"""The figures of the analysis; what they show is computed elsewhere.

Each takes what there is to show, by label or name, and is ``None`` where there is nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.evaluation.drawing import (
    CYCLE,
    FONT,
    GREY,
    MARKERS,
    blank_figure,
    put_legend_above,
    tidy_axes,
)
from paper_awnet.measures import Filters, histograms

Point = tuple[float, float]
"""Clean accuracy and accuracy under an attack."""


def panels(
    titles: Sequence[str], x: str, width: float = 2.4, height: float = 2.7
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, side by side; ``x`` is the label of their x axes."""
    fig = blank_figure(width * len(titles) + 0.5, height)
    axes = list(fig.subplots(1, len(titles), squeeze=False)[0])
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=FONT - 1)
        ax.set_xlabel(x, fontsize=FONT)
        tidy_axes(ax)
    return fig, axes


def weight_histograms(
    networks: Mapping[str, Mapping[str, Filters]], layers: Sequence[str]
) -> Figure:
    """Folded weights of two networks in the first, a middle and the last of some layers (F1)."""
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    fig, axes = panels(shown, "folded weight")
    for ax, layer in zip(axes, shown, strict=True):
        first, second = (found[layer].folded for found in networks.values())
        if first is None or second is None:
            continue
        *counts, bound = histograms(first, second, 41)
        edges = torch.linspace(-bound, bound, 42)
        for i, (label, count) in enumerate(zip(networks, counts, strict=True)):
            ax.stairs(count.numpy(), edges.numpy(), color=CYCLE[i], label=label, linewidth=1.3)
    put_legend_above(fig, axes[-1])
    return fig


def layer_distances(distances: Mapping[str, Mapping[str, float]]) -> Figure:
    """A distance by layer for several pairs of networks (F1, F3)."""
    layers = list(next(iter(distances.values())))
    fig, (ax,) = panels([""], "", max(4.5, 0.55 * len(layers) + 1.0), 3.4)
    for i, (label, found) in enumerate(distances.items()):
        values = [found.get(layer, math.nan) for layer in layers]
        ax.plot(range(len(layers)), values, MARKERS[i], color=CYCLE[i], label=label, markersize=5)
    ax.set_yscale("log")
    ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=FONT - 2)
    ax.set_ylabel("1-Wasserstein, folded weights", fontsize=FONT)
    put_legend_above(fig, ax)
    return fig


def signal_means(blocks: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Mean signal of every filter for each type, by block (F3)."""
    if not blocks:
        return None
    titles = [f"block {j}, shift {block['shift']:.3f}" for j, block in enumerate(blocks, 1)]
    fig, axes = panels(titles, "filter")
    for ax, block in zip(axes, blocks, strict=True):
        for i, (kind, label) in enumerate((("mean_clean", "clean"), ("mean_adv", "adversarial"))):
            values = block[kind].tolist()
            ax.plot(values, MARKERS[i], color=CYCLE[i], markersize=3, label=label)
        ax.axhline(1.0, color=GREY, linewidth=0.6)
    put_legend_above(fig, axes[-1])
    return fig


def router_histograms(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """P_type(adversarial) of clean and each kind of adversarial images (F4)."""
    fig, (ax,) = panels([""], "P_type(adversarial)", 4.9, 3.0)
    for i, (name, one) in enumerate(found.items()):
        style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "label": name.replace("_", " ")}
        ax.hist(one["p_adv"].tolist(), bins=25, range=(0.0, 1.0), histtype="step", **style)
    ax.set_yscale("symlog")
    ax.set_ylabel("images", fontsize=FONT)
    put_legend_above(fig, ax)
    return fig


def trade_off(points: Mapping[str, Sequence[Mapping[str, Point]]]) -> Figure | None:
    """Robust against clean accuracy, with lines of equal W-Robust (F5).

    Args:
        points: By label and seed: those under PGD (``pgd``) and in the worst case (``worst``), if
            it is known.
    """
    if not points:
        return None
    x = "clean accuracy on the attacked images (%); grey: equal W-Robust, 10 points apart"
    fig, (ax,) = panels([""], x, 5.7, 4.0)
    for i, (label, group) in enumerate(points.items()):
        style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "linestyle": ""}
        style["marker"] = MARKERS[(i + i // len(CYCLE)) % len(MARKERS)]
        looks = {"pgd": {"label": label}, "worst": {"markerfacecolor": "white"}}
        for kind, look in looks.items():
            pairs = [pair[kind] for pair in group if kind in pair]
            ax.plot([100 * p[0] for p in pairs], [100 * p[1] for p in pairs], **(style | look))
    drawn = [pair for group in points.values() for pairs in group for pair in pairs.values()]
    left, right = 100 * min(p[0] for p in drawn) - 1, 100 * max(p[0] for p in drawn) + 1
    for total in range(10, 200, 20):
        ax.plot([left, right], [total - left, total - right], color=GREY, linewidth=0.4)
    ax.set_xlim(left, right)
    ax.set_ylim(-2, 100 * max(p[1] for p in drawn) + 5)
    ax.set_ylabel("PGD (filled), worst case (open), %", fontsize=FONT)
    put_legend_above(fig, ax)
    return fig


def gradient_figure(found: Mapping[str, Mapping[str, Tensor]]) -> Figure | None:
    """Rise of the loss against its first order, and the first-order distance to the boundary."""
    if not found:
        return None
    fig, (left, right) = panels(["", ""], "", 3.45, 3.2)
    for i, (label, one) in enumerate(found.items()):
        style: dict[str, Any] = {"color": CYCLE[i], "label": label}
        left.plot(one["predicted"], one["rise"], ".", markersize=3, **style)
        right.hist(one["reach"].clamp(-0.2, 1.0).tolist(), bins=40, histtype="step", **style)
    left.plot([1e-4, 10], [1e-4, 10], color=GREY, linewidth=0.6)
    left.set_xscale("symlog", linthresh=0.01)
    left.set_yscale("symlog", linthresh=0.01)
    left.set_xlabel("eps |gradient of CE|, l1", fontsize=FONT)
    left.set_ylabel("CE at the FGSM image minus CE", fontsize=FONT)
    right.set_xlabel("margin / |gradient of margin|, l1", fontsize=FONT)
    right.set_ylabel("images", fontsize=FONT)
    put_legend_above(fig, right)
    return fig


WORDS = {"w_nat": "weight of clean images", "type_acc": "type accuracy"}


def in_words(name: str) -> str:
    """A logged number as a label: ``omega1_shift`` is ``block 1``, ``loss_adv`` is ``loss adv``."""
    found = re.fullmatch(r"omega(\d+)_(?:shift|std)", name)
    return f"block {found[1]}" if found else WORDS.get(name, name.replace("_", " "))


def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure | None:
    """Losses, weights, type accuracy and signals against the step (7.6)."""
    patterns = {
        "loss": "loss.*",
        "weight, type accuracy": "w_nat|type_acc",
        "signals: shift between types": ".*_shift",
        "signals: std over images": ".*_std",
    }
    named = {title: [n for n in curves if re.fullmatch(p, n)] for title, p in patterns.items()}
    shown = {title: names for title, names in named.items() if names}
    if not shown:
        return None
    fig, axes = panels(list(shown), "step", 2.7, 2.9)
    for ax, names in zip(axes, shown.values(), strict=True):
        for i, name in enumerate(names):
            steps, values = zip(*curves[name], strict=True)
            ax.plot(steps, values, color=CYCLE[i % len(CYCLE)], label=in_words(name), linewidth=1.2)
        ax.legend(frameon=False, fontsize=FONT - 2)
    return fig
