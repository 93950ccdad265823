"""The figures of the channels: F1, F2 and F4."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.evaluation.drawing import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    VERMILION,
    blank_figure,
    draw_per_class_bars,
    put_legend_above,
    tidy_axes,
)
from paper_cifs.measures import Channels, Measurement, correlation

SHOWN = {"cifar10": ("automobile", "cat")}  # a robust and a non-robust class, as published [R0]

MODELS = {"plain_natural": "natural training", "plain": "adversarial training", "cifs": "CIFS"}
"""What the checkpoints are needed of, and what the figures call it."""


def smoothed(curve: Tensor) -> Tensor:
    """Mean of each channel and its two neighbours; the published curves look like it [C]."""
    padded = F.pad(curve[None, None], (1, 1), mode="replicate")
    return F.avg_pool1d(padded, 3, stride=1)[0, 0]


def draw_channels(top: Axes, bottom: Axes, channels: Channels, c: int) -> None:
    """F1 for one class: activations above, relevance below, channels by descending relevance.

    Activations are divided by their common maximum, the relevance by its largest magnitude. A
    dotted line separates positive from negative relevance.
    """
    relevance = channels.relevance[c]
    order = relevance.argsort(descending=True, stable=True)
    curves = [smoothed(a[c][order]) for a in (channels.natural, channels.adversarial)]
    highest = max(float(curve.max()) for curve in curves) or 1.0
    index = np.arange(len(order))
    looks = (("natural", BLUE, 0.85), ("adversarial (PGD-20)", VERMILION, 0.65))
    for curve, (label, colour, alpha) in zip(curves, looks, strict=True):
        height = (curve / highest).numpy()
        top.fill_between(index, height, color=colour, alpha=alpha, linewidth=0, label=label)
    largest = float(relevance.abs().max()) or 1.0
    bottom.fill_between(
        index, (relevance[order] / largest).numpy(), color=GREEN, linewidth=0, label="relevance"
    )
    boundary = float((relevance >= 0).sum()) - 0.5
    for ax in (top, bottom):
        ax.axvline(boundary, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_xlim(0, len(order) - 1)
        tidy_axes(ax, grid=False)
    top.set(ylim=(0, 1), yticks=[0, 1])
    top.tick_params(labelbottom=False)
    bottom.set(ylim=(-1, 1), yticks=[-1, 0, 1])


def channel_figure(panels: Sequence[Sequence[tuple[str, Channels, int]]]) -> Figure:
    """A grid of F1 panels.

    Titles give the cosine of the two curves, and the share of each on channels of negative
    relevance (NR), first natural, then adversarial.

    Args:
        panels: Rows of (title, channels, class).
    """
    rows, columns = len(panels), len(panels[0])
    fig = blank_figure(0.5 + (3.3 if columns < 3 else 2.45) * columns, 0.5 + 2.45 * rows)
    axes = fig.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.7, 1.0] * rows)
    for i, row in enumerate(panels):
        for j, (title, channels, c) in enumerate(row):
            top, bottom = axes[2 * i, j], axes[2 * i + 1, j]
            draw_channels(top, bottom, channels, c)
            numbers = {key: float(value[c]) for key, value in channels.numbers().items()}
            shares = (numbers[f"negative_share_{kind}"] for kind in ("natural", "adversarial"))
            note = f"cosine {numbers['cosine']:.2f}, NR share " + " → ".join(
                f"{share:.2f}" for share in shares
            )
            top.set_title(f"{title}\n{note}", fontsize=FONT - 1)
        axes[2 * i, 0].set_ylabel("activation", fontsize=FONT - 1)
        axes[2 * i + 1, 0].set_ylabel("relevance", fontsize=FONT - 1)
    for ax in axes[-1]:
        ax.set_xlabel("channels by relevance", fontsize=FONT - 1)
    put_legend_above(fig, axes[0, 0])
    return fig


def shown_classes(dataset: str, robust: Tensor, class_names: Sequence[str]) -> tuple[int, int]:
    """A robust and a non-robust class: the published ones, or else those of extreme accuracy."""
    names = SHOWN.get(dataset, ())
    if names and all(name in class_names for name in names):
        first, second = (list(class_names).index(name) for name in names)
        return first, second
    return int(robust.argmax()), int(robust.argmin())


def figure_f1(
    models: Mapping[str, Measurement], classes: Sequence[int], class_names: Sequence[str]
) -> Figure:
    """F1: natural beside adversarial training, a row per class."""
    return channel_figure(
        [
            [
                (f"{MODELS[name]}, class {class_names[c]}", found.channels["penultimate"], c)
                for name, found in models.items()
            ]
            for c in classes
        ]
    )


def figure_f2(found: Sequence[Measurement], class_names: Sequence[str]) -> Figure:
    """F2: accuracy of each class, and below it how well its channels are aligned.

    Classes come in the order of robust accuracy; with several seeds bars are means, dots seeds.
    """
    clean, robust = (torch.stack([getattr(m, key) for m in found]) for key in ("clean", "robust"))
    alignment = torch.stack([m.channels["penultimate"].alignment() for m in found])
    order = robust.mean(0).argsort(descending=True, stable=True)
    names = [class_names[c] for c in order.tolist()]
    fig = blank_figure(max(5.0, 0.55 * len(names) + 1.5), 4.4)
    top, bottom = fig.subplots(2, 1, height_ratios=[1.5, 1.0])
    draw_per_class_bars(
        top,
        {
            "natural": 100 * clean[:, order].numpy(),
            "PGD-20": 100 * robust[:, order].numpy(),
        },
        names,
    )
    draw_per_class_bars(bottom, {"corr(a_nat, W[c, :])": alignment[:, order].numpy()}, names)
    for bar in bottom.patches:
        bar.set_color(GREEN)
    bottom.axhline(0, color=GREY, linewidth=0.8)
    links = correlation(robust, alignment)
    top.set(ylim=(0, 100))
    top.set_ylabel("accuracy (%)", fontsize=FONT)
    bottom.set_ylabel("corr($a_{nat}$, W[c, :])", fontsize=FONT)
    bottom.set_title(
        "correlation with PGD-20 accuracy across classes: "
        + ", ".join(f"{float(link):+.2f}" for link in links),
        fontsize=FONT - 1,
    )
    bottom.set_xlabel("class", fontsize=FONT)
    put_legend_above(fig, top)
    return fig


def figure_f4(found: Measurement, classes: Sequence[int], class_names: Sequence[str]) -> Figure:
    """F4: the four features around the two masks of CIFS, a row per class.

    The relevance is each module's g, and W of the final layer for the last masked feature, which is
    the penultimate one.
    """
    last = max(name for name in found.channels if name.endswith("_masked"))
    features = [name for name in found.channels if name.endswith("masked") and name != last]
    titles = {name: name.replace("_", ", ").replace("module", "module ") for name in features}
    titles["penultimate"] = f"{last.replace('_', ', ').replace('module', 'module ')} (W)"
    return channel_figure(
        [
            [
                (f"{title}, class {class_names[c]}", found.channels[n], c)
                for n, title in titles.items()
            ]
            for c in classes
        ]
    )
