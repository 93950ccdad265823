"""The figures of the channels: F1 and F4, which show single channels, and F2."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d
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


def draw_channels(top: Axes, bottom: Axes, channels: Channels, c: int) -> None:
    """F1 for one class: activations above, relevance below, channels by descending relevance.

    Activations are means over a channel and its two neighbours, which the published curves look
    like [C], divided by their common maximum; the relevance is divided by its largest magnitude. A
    dotted line separates positive from negative relevance.
    """
    relevance = channels.relevance[c]
    order = relevance.argsort(descending=True, stable=True)
    curves = [
        uniform_filter1d(a[c][order].numpy(), 3, mode="nearest")
        for a in (channels.natural, channels.adversarial)
    ]
    highest = max(curve.max() for curve in curves) or 1.0
    index = np.arange(len(order))
    looks = (("natural", BLUE, 0.85), ("adversarial (PGD-20)", VERMILION, 0.65))
    for curve, (label, colour, alpha) in zip(curves, looks, strict=True):
        top.fill_between(
            index, curve / highest, color=colour, alpha=alpha, linewidth=0, label=label
        )
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


def channel_figure(
    columns: Mapping[str, Channels], classes: Sequence[int], class_names: Sequence[str]
) -> Figure:
    """A grid of F1 panels, a row per class.

    Titles give the cosine of the two curves, and the share of each on channels of negative
    relevance (NR), first natural, then adversarial.
    """
    width = 3.3 if len(columns) < 3 else 2.45
    fig = blank_figure(0.5 + width * len(columns), 0.5 + 2.45 * len(classes))
    ratios = [1.7, 1.0] * len(classes)
    axes = fig.subplots(len(ratios), len(columns), squeeze=False, height_ratios=ratios)
    for i, c in enumerate(classes):
        for j, (title, channels) in enumerate(columns.items()):
            top = axes[2 * i, j]
            draw_channels(top, axes[2 * i + 1, j], channels, c)
            numbers = {key: float(value[c]) for key, value in channels.numbers().items()}
            top.set_title(
                f"{title}, class {class_names[c]}\ncosine {numbers['cosine']:.2f}, NR share "
                f"{numbers['negative_share_natural']:.2f} → "
                f"{numbers['negative_share_adversarial']:.2f}",
                fontsize=FONT - 1,
            )
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


def masked_features(found: Measurement) -> dict[str, Channels]:
    """The columns of F4: the features around the masks of CIFS.

    The relevance is each module's g, and W of the final layer for the last masked feature, which is
    the penultimate one.
    """
    names = [name for name in found.channels if name.endswith("masked")]
    words = {name: name.replace("_", ", ").replace("module", "module ") for name in names}
    columns = {words[name]: found.channels[name] for name in names[:-1]}
    return columns | {f"{words[names[-1]]} (W)": found.channels["penultimate"]}


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
    accuracies = {"natural": 100 * clean, "PGD-20": 100 * robust}
    draw_per_class_bars(top, {k: v[:, order].numpy() for k, v in accuracies.items()}, names)
    draw_per_class_bars(bottom, {"alignment": alignment[:, order].numpy()}, names)
    for bar in bottom.patches:
        bar.set_color(GREEN)
    bottom.axhline(0, color=GREY, linewidth=0.8)
    links = ", ".join(f"{float(link):+.2f}" for link in correlation(robust, alignment))
    top.set(ylim=(0, 100))
    top.set_ylabel("accuracy (%)", fontsize=FONT)
    bottom.set_ylabel("corr($a_{nat}$, W[c, :])", fontsize=FONT)
    bottom.set_title(f"correlation with PGD-20 accuracy across classes: {links}", fontsize=FONT - 1)
    bottom.set_xlabel("class", fontsize=FONT)
    put_legend_above(fig, top)
    return fig
