"""The figures of the analysis; what they show is computed elsewhere."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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


def weight_histograms(
    networks: Mapping[str, Mapping[str, Filters]], layers: Sequence[str]
) -> Figure:
    """Folded weights of two networks, layer by layer (F1).

    Args:
        networks: By label, exactly two.
        layers: Which.
    """
    fig = blank_figure(2.4 * len(layers) + 0.6, 2.7)
    labels = list(networks)
    for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        pair = [networks[label][layer].folded for label in labels]
        if pair[0] is None or pair[1] is None:
            continue
        *counts, bound = histograms(pair[0], pair[1], 41)
        edges = torch.linspace(-bound, bound, 42)
        for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
            ax.stairs(count.numpy(), edges.numpy(), color=CYCLE[i], label=label, linewidth=1.3)
        ax.set_title(layer, fontsize=FONT - 1)
        ax.set_xlabel("folded weight", fontsize=FONT)
        tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def layer_distances(distances: Mapping[str, Mapping[str, float]]) -> Figure:
    """A distance by layer for several pairs of networks (F1, F3).

    Args:
        distances: By label of the pair and layer.
    """
    layers = list(next(iter(distances.values())))
    fig = blank_figure(max(5.0, 0.55 * len(layers) + 1.5), 3.4)
    ax = fig.subplots()
    for i, (label, found) in enumerate(distances.items()):
        at = [n for n, layer in enumerate(layers) if layer in found]
        values = [found[layers[n]] for n in at]
        ax.plot(at, values, MARKERS[i], color=CYCLE[i], label=label, markersize=5)
    ax.set_yscale("log")
    ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=FONT - 2)
    ax.set_ylabel("1-Wasserstein, folded weights", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def signal_means(blocks: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean signal of every filter for each type, by block (F3)."""
    fig = blank_figure(2.3 * len(blocks) + 0.5, 2.6)
    for j, (ax, block) in enumerate(
        zip(fig.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True), 1
    ):
        for i, (kind, label) in enumerate((("mean_clean", "clean"), ("mean_adv", "adversarial"))):
            values: Tensor = block[kind]
            ax.plot(values.tolist(), MARKERS[i], color=CYCLE[i], markersize=3, label=label)
        ax.axhline(1.0, color=GREY, linewidth=0.6)
        ax.set_title(f"block {j}, shift {block['shift']:.3f}", fontsize=FONT - 1)
        ax.set_xlabel("filter", fontsize=FONT)
        tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def router_histograms(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """P_type(adversarial) of clean and each kind of adversarial images (F4)."""
    fig = blank_figure(5.4, 3.0)
    ax = fig.subplots()
    for i, (name, one) in enumerate(found.items()):
        values: Tensor = one["p_adv"]
        ax.hist(
            values.tolist(),
            bins=25,
            range=(0.0, 1.0),
            histtype="step",
            color=CYCLE[i % len(CYCLE)],
            label=name.replace("_", " "),
        )
    ax.set_yscale("symlog")
    ax.set_xlabel("P_type(adversarial)", fontsize=FONT)
    ax.set_ylabel("images", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def trade_off(points: Mapping[str, Sequence[tuple[float, float, float | None]]]) -> Figure:
    """Robust against clean accuracy, with lines of equal W-Robust (F5).

    Args:
        points: By label and seed: clean accuracy, accuracy under PGD, and in the worst case.
    """
    fig = blank_figure(6.2, 4.0)
    ax = fig.subplots()
    drawn = [p for group in points.values() for p in group]
    for i, (label, group) in enumerate(points.items()):
        style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "linestyle": ""}
        mark = MARKERS[(i + i // len(CYCLE)) % len(MARKERS)]
        xs = [100 * p[0] for p in group]
        ax.plot(xs, [100 * p[1] for p in group], marker=mark, label=label, **style)
        worst = [(x, 100 * p[2]) for x, p in zip(xs, group, strict=True) if p[2] is not None]
        if worst:
            ax.plot(*zip(*worst, strict=True), marker=mark, markerfacecolor="white", **style)
    if drawn:
        left, right = 100 * min(p[0] for p in drawn) - 1, 100 * max(p[0] for p in drawn) + 1
        for total in range(10, 200, 20):
            ax.plot([left, right], [total - left, total - right], color=GREY, linewidth=0.4)
        ax.set_xlim(left, right)
        ax.set_ylim(-2, 100 * max(p[1] for p in drawn) + 5)
    ax.set_xlabel("clean accuracy (%); grey: equal W-Robust, 10 points apart", fontsize=FONT)
    ax.set_ylabel("PGD (filled), worst case (open), %", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def gradient_figure(found: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Rise of the loss against its first order, and the first-order distance to the boundary."""
    fig = blank_figure(7.4, 3.2)
    left, right = fig.subplots(1, 2)
    for i, (label, one) in enumerate(found.items()):
        style: dict[str, Any] = {"color": CYCLE[i], "label": label}
        left.plot(one["predicted"], one["rise"], ".", markersize=3, **style)
        reach = one["reach"].clamp(-0.2, 1.0)
        right.hist(reach.tolist(), bins=40, histtype="step", **style)
    left.plot([1e-4, 10], [1e-4, 10], color=GREY, linewidth=0.6)
    left.set_xscale("symlog", linthresh=0.01)
    left.set_yscale("symlog", linthresh=0.01)
    left.set_xlabel("eps |gradient of CE|, l1", fontsize=FONT)
    left.set_ylabel("CE at the FGSM image minus CE", fontsize=FONT)
    right.set_xlabel("margin / |gradient of margin|, l1", fontsize=FONT)
    right.set_ylabel("images", fontsize=FONT)
    for ax in (left, right):
        tidy_axes(ax)
    put_legend_above(fig, right)
    return fig


WORDS = {"w_nat": "weight of clean images", "type_acc": "type accuracy"}


def in_words(name: str) -> str:
    """A logged number as a label: ``omega1_shift`` is ``block 1``, ``loss_adv`` is ``loss adv``."""
    found = re.fullmatch(r"omega(\d+)_(?:shift|std)", name)
    return f"block {found[1]}" if found else WORDS.get(name, name.replace("_", " "))


def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Losses, weights, type accuracy and signals against the step (7.6)."""
    panels = {
        "loss": [n for n in curves if n.startswith("loss")],
        "weight, type accuracy": [n for n in curves if n in ("w_nat", "type_acc")],
        "signals: shift between types": [n for n in curves if n.endswith("_shift")],
        "signals: std over images": [n for n in curves if n.endswith("_std")],
    }
    shown = {title: names for title, names in panels.items() if names}
    fig = blank_figure(2.7 * len(shown) + 0.4, 2.9)
    for ax, (title, names) in zip(
        fig.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for i, name in enumerate(names):
            steps, values = zip(*curves[name], strict=True)
            ax.plot(steps, values, color=CYCLE[i % len(CYCLE)], label=in_words(name), linewidth=1.2)
        ax.set_title(title, fontsize=FONT - 1)
        ax.set_xlabel("step", fontsize=FONT)
        ax.legend(frameon=False, fontsize=FONT - 2)
        tidy_axes(ax)
    return fig
