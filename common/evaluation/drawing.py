"""Plots that several papers share, without ``pyplot``: no display and no global state is needed.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with the common
colour-vision deficiencies can tell apart; words or markers always say the same as a colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from common.files import write_bytes_atomically

if TYPE_CHECKING:  # imported where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, GREY, RED = "#222222", "#6b6b6b", "#C00000"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}
FONT = 9.0
DPI = 100
CELL, LINE = 1.05, 0.14
"""Inches: the side of an image in a grid, and a line of small text."""


def blank_figure(width: float, height: float) -> Figure:
    """An empty white figure in inches with a constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def tidy_axes(ax: Axes, grid: bool = True) -> None:
    """Remove the top and right spines and draw faint horizontal grid lines behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=FONT - 1, colors=INK, length=3)
    if grid:
        ax.grid(axis="y", color="#e2e2e2", linewidth=0.6)
        ax.set_axisbelow(True)


def tidy_log_axis(axis: Axis) -> None:
    """Plain numbers far enough apart on a logarithmic axis, once its data is drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high / low < 60 else (1.0,)
    axis.set_major_locator(MaxNLocator(4) if high / low < 3 else LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save_figure(fig: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure atomically in the format of the suffix, and return the path.

    The same figure gives the same bytes: a PNG gets no date and no version.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    supported = fig.canvas.get_supported_filetypes()
    if kind not in supported:
        raise ValueError(f"a figure's suffix must be one of {sorted(supported)}, got {str(path)!r}")
    metadata = {"Software": None} if kind == "png" else None
    content = io.BytesIO()
    fig.savefig(content, format=kind, dpi=dpi, metadata=metadata)
    write_bytes_atomically(path, content.getbuffer())
    return path


def magnification(delta: Tensor) -> float:
    """Largest factor at which ``0.5 + factor * delta`` fits in [0, 1]; 1 for no difference.

    It is an integer from 1 on, otherwise a number with one decimal.
    """
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    if largest == 0.0:
        return 1.0
    fit = 0.5 / largest * (1 + 1e-4)  # differences are rounded: 0.1000001 still allows 5
    return float(int(fit)) if fit >= 1.0 else int(10.0 * fit) / 10.0


def adversarial_grid(
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    predicted: Tensor,
    predicted_adv: Tensor,
    class_names: Sequence[str],
    distances: Mapping[str, Tensor] | None = None,
    max_examples: int = 8,
) -> Figure:
    """Clean image + magnified perturbation = adversarial image, one column per image.

    Predictions stand above the images, red, bold and crossed where they are wrong. All
    perturbations are scaled by the factor in the label of their row and centred at grey.

    Args:
        x: Images in [0, 1], ``(N, C, H, W)`` with one or three channels.
        x_adv: The adversarial images.
        y: Labels, ``(N,)``.
        predicted: Predicted labels of ``x``, ``(N,)``.
        predicted_adv: Predicted labels of ``x_adv``, ``(N,)``.
        class_names: A name for each label.
        distances: Between ``x`` and ``x_adv``, ``(N,)``, by norm.
        max_examples: Only the first ones are shown.

    Raises:
        ValueError: If shapes disagree, or ``x_adv`` is NaN.
    """
    n = min(len(x), max_examples)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x_adv.shape != x.shape or n < 1:
        raise ValueError(
            f"images must be (N, 1 or 3, H, W) and alike, got {tuple(x.shape)} and "
            f"{tuple(x_adv.shape)}, of which {n} are shown"
        )
    x, x_adv = (images[:n].detach().float().cpu() for images in (x, x_adv))
    y, predicted, predicted_adv = (labels[:n] for labels in (y, predicted, predicted_adv))
    if not x_adv.isfinite().all():
        raise ValueError("adversarial images must be numbers, got NaN; show attacked images only")
    delta, distances = x_adv - x, distances or {}
    factor = magnification(delta)
    rows = {"clean": x, f"perturbation\n× {factor:g}": 0.5 + factor * delta, "adversarial": x_adv}
    tall = CELL * x.shape[2] / x.shape[3]
    above, below = (0.25, 0.05, 0.25), (0.05, 0.1 + LINE * len(distances), 0.1 + LINE)
    fig = blank_figure(0.7 + CELL * n, 3 * tall + sum(above) + sum(below))
    fig.set_layout_engine("none")  # everything has a place; finding one took half a second
    width, height = fig.get_size_inches()
    axes, top = [], height
    for (name, images), over, under in zip(rows.items(), above, below, strict=True):
        top -= over + tall
        ax = fig.add_axes((0.6 / width, top / height, CELL * n / width, tall / height))
        _draw_images(ax, images)
        ax.set_ylabel(name, fontsize=FONT, color=INK)
        axes.append(ax)
        top -= under
    _draw_predictions(axes[0], predicted, y, class_names)
    _draw_predictions(axes[2], predicted_adv, y, class_names)
    sizes = [[f"{NORM_NAMES[norm]} {d[i]:.3g}" for norm, d in distances.items()] for i in range(n)]
    _draw_below(axes[1], ["\n".join(lines) for lines in sizes])
    _draw_below(axes[2], [f"true: {_name(int(label), class_names)}" for label in y])
    return fig


def _draw_images(ax: Axes, images: Tensor) -> None:
    """Images beside each other, with white around them; image i is about ``ax``'s x = i."""
    margin = max(1, images.shape[3] // 16)
    framed = functional.pad(images.clamp(0, 1), (margin, margin, margin, margin), value=1.0)
    strip = torch.cat(list(framed), dim=2).permute(1, 2, 0).numpy()
    picture = strip[:, :, 0] if strip.shape[-1] == 1 else strip
    ends = (-0.5, len(images) - 0.5, 1.0, 0.0)
    ax.imshow(picture, "gray", aspect="auto", vmin=0, vmax=1, interpolation="nearest", extent=ends)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _draw_below(ax: Axes, texts: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        _write(ax, i, -0.03, text, va="top", fontsize=FONT - 1, color=GREY)


def _write(ax: Axes, i: int, height: float, text: str, **style: Any) -> None:
    """Text about image i, at a height that is 0 below the images and 1 above them."""
    ax.text(i, height, text, transform=ax.get_xaxis_transform(), ha="center", **style)


def _name(label: int, class_names: Sequence[str]) -> str:
    """Of a class, or its number; scores that are not finite give the class -1."""
    return class_names[label] if 0 <= label < len(class_names) else str(label)


def _draw_predictions(ax: Axes, predicted: Tensor, y: Tensor, class_names: Sequence[str]) -> None:
    for i, (label, truth) in enumerate(zip(predicted.tolist(), y.tolist(), strict=True)):
        is_wrong = label != truth
        text = f"{'✗ ' if is_wrong else ''}{_name(label, class_names)}"
        color, weight = (RED, "bold") if is_wrong else (INK, "normal")
        _write(ax, i, 1.02, text, va="bottom", fontsize=FONT, color=color, fontweight=weight)


def draw_per_class_bars(
    ax: Axes, series: Mapping[str, npt.ArrayLike], class_names: Sequence[str]
) -> None:
    """Draw a group of bars for each of the K classes.

    A series has one value per class ``(K,)`` or one row per repeat ``(R, K)``: then the bar is the
    mean and each repeat a dot.
    """
    k = len(class_names)
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        table = np.atleast_2d(np.asarray(values, dtype=float))
        if table.ndim != 2 or table.shape[1] != k:
            raise ValueError(f"{label!r} must have one value for each of {k} classes, got {table}")
        middle = np.arange(k) + (i - (len(series) - 1) / 2) * width
        ax.bar(middle, table.mean(0), 0.92 * width, color=CYCLE[i % len(CYCLE)], label=label)
        if len(table) > 1:
            for row in table:
                ax.plot(middle, row, "o", ms=2.6, mfc="white", mec=INK, mew=0.6, clip_on=False)
    ax.set_xticks(np.arange(k), class_names)
    if max(map(len, class_names)) > 3 and k > 6:
        ax.tick_params(axis="x", labelrotation=30)
    ax.set_xlim(-0.6, k - 0.4)
    tidy_axes(ax)


def per_class_bars(series: Mapping[str, npt.ArrayLike], class_names: Sequence[str]) -> Figure:
    """Accuracies in [0, 1] by class in percent: see :func:`draw_per_class_bars`."""
    fig = blank_figure(max(4.5, 0.55 * len(class_names) + 1.5), 2.9)
    ax = fig.subplots()
    shares = {label: 100.0 * np.asarray(v, dtype=float) for label, v in series.items()}
    draw_per_class_bars(ax, shares, class_names)
    ax.set_ylim(0, 100)
    ax.set_ylabel("accuracy (%)", fontsize=FONT)
    put_legend_above(fig, ax)
    return fig


def accuracy_curve(
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Accuracies in [0, 1] at ``xs`` in percent, one line for each label; NaN leaves a gap.

    ``intervals`` gives ``(low, high)`` for each of ``xs``, by label; they are drawn as a band.
    """
    fig = blank_figure(4.8, 3.1)
    ax = fig.subplots()
    for i, (label, ys) in enumerate(series.items()):
        style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)]}
        if label in (intervals or {}):
            low, high = 100.0 * np.asarray((intervals or {})[label], dtype=float).T
            ax.fill_between(xs, low, high, alpha=0.18, linewidth=0, **style)
        ax.plot(
            np.asarray(xs, dtype=float),
            100.0 * np.asarray(ys, dtype=float),
            marker=MARKERS[i % len(MARKERS)],
            markevery=max(1, len(xs) // 12),  # more markers would hide the line
            markersize=4,
            linewidth=1.5,
            label=label,
            **style,
        )
    ax.set_ylim(0, 100)
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.set_ylabel("accuracy (%)", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def confusion_matrix(counts: npt.ArrayLike, class_names: Sequence[str], title: str = "") -> Figure:
    """Confusion matrix: a row per true class, a column per predicted one, shaded by share of row.

    ``counts`` ``(K, K)`` are written into the cells up to 20 classes; axes show names up to 40.
    """
    table = np.asarray(counts)
    k = len(class_names)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = min(12.0, max(3.4, 0.42 * k + 1.2))
    fig = blank_figure(side, side)
    ax = fig.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if k <= 20:
        for (i, j), count in np.ndenumerate(table):
            color = "white" if share[i, j] > 0.5 else INK if count else GREY
            cell = ax.text(j, i, f"{count:g}", ha="center", va="center", color=color)
            cell.set(fontsize=FONT - 2, in_layout=False)  # it lies within the axes: half the time
    tidy_axes(ax, grid=False)
    if k <= 40:
        is_long = max(map(len, class_names)) > 3
        ax.set_xticks(np.arange(k), class_names, rotation=90 if is_long else 0)
        ax.set_yticks(np.arange(k), class_names)
    ax.set_xlabel("predicted", fontsize=FONT)
    ax.set_ylabel("true", fontsize=FONT)
    ax.set_title(title, fontsize=FONT, color=INK)
    return fig


def put_legend_above(fig: Figure, ax: Axes) -> None:
    """Put the legend of ``ax`` above the figure without a frame, in rows of up to four."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=FONT,
    )
