"""Plots that several papers share, drawn with matplotlib objects alone.

No function here touches ``pyplot``: figures need no display, share no global state and can be
collected when they go out of scope. Each is also accepted by ``SummaryWriter.add_figure``. Colours
are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart under the common
colour-vision deficiencies; wherever colour carries a meaning, words or markers carry it too.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.files import write_bytes_atomically

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
FONT = 9.0
DPI = 100


def blank_figure(width: float, height: float) -> Figure:
    """An empty white figure of ``width`` by ``height`` inches that lays itself out."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def tidy_axes(ax: Axes, grid: bool = True) -> None:
    """Takes the frame off the top and the right, and rules faint lines behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=FONT - 1, colors=INK, length=3)
    if grid:
        ax.grid(axis="y", color="#e2e2e2", linewidth=0.6)
        ax.set_axisbelow(True)


def save_figure(fig: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Writes ``fig`` to ``path``, whole or not at all, in the format its suffix names.

    The same figure gives the same bytes: no date and no version is written into a PNG.

    Args:
        fig: The figure.
        path: Where to; missing folders are made.
        dpi: Pixels per inch of figure size.

    Returns:
        ``path``.

    Raises:
        ValueError: If the suffix names no format matplotlib can write.
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
    """Largest round factor at which ``0.5 + factor * delta`` still fits in [0, 1].

    Args:
        delta: Differences of images in [0, 1], any shape.

    Returns:
        A whole number where one fits, otherwise one decimal; 1 for no difference at all.
    """
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    if largest == 0.0:
        return 1.0
    fit = 0.5 / largest * (1 + 1e-4)  # differences are rounded: 0.1000001 still allows 5
    return float(int(fit)) if fit >= 1.0 else int(10.0 * fit) / 10.0


def example_grid(
    clean: Tensor,
    adversarial: Tensor,
    predicted_clean: Tensor,
    predicted_adv: Tensor,
    y: Tensor,
    class_names: Sequence[str],
    max_examples: int = 8,
) -> Figure:
    """Clean images, adversarial images and their magnified difference, with what was predicted.

    One column per image. The difference is centred at grey and scaled by one factor for the whole
    figure, given in the row's label. A wrong prediction is red, bold and crossed.

    Args:
        clean: Images in [0, 1], ``(N, C, H, W)`` with one or three channels.
        adversarial: The same images attacked.
        predicted_clean: Predicted labels of ``clean``, ``(N,)``.
        predicted_adv: Predicted labels of ``adversarial``, ``(N,)``.
        y: True labels, ``(N,)``.
        class_names: A name for each label.
        max_examples: Show the first so many.

    Returns:
        The figure.

    Raises:
        ValueError: If there is nothing to show, or shapes disagree, or C is neither 1 nor 3.
    """
    labels = {"predicted_clean": predicted_clean, "predicted_adv": predicted_adv, "y": y}
    clean, adversarial = _first_images(clean, adversarial, labels, max_examples)
    delta = adversarial - clean
    factor = magnification(delta)
    fig = blank_figure(1.05 * len(clean) + 0.9, 3.9)
    grid = fig.subplots(3, len(clean), squeeze=False)
    for axes, images in zip(grid, (clean, adversarial, 0.5 + factor * delta), strict=True):
        _draw_images(axes, images)
    for axes, predicted in ((grid[0], predicted_clean), (grid[1], predicted_adv)):
        _draw_predictions(axes, predicted, y, class_names)
    for ax, label in zip(grid[2], y.tolist(), strict=False):
        ax.set_xlabel(f"true: {class_names[label]}", fontsize=FONT - 1, color=GREY)
    for axes, name in zip(grid, ("clean", "adversarial", f"difference\n× {factor:g}"), strict=True):
        axes[0].set_ylabel(name, fontsize=FONT, color=INK)
    return fig


NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}


def adversarial_grid(
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    predicted: Tensor,
    distances: Mapping[str, Tensor],
    class_names: Sequence[str],
    max_examples: int = 8,
) -> Figure:
    """Clean image + magnified perturbation = adversarial image, with how far apart they are.

    One column per image: above the true class, under the perturbation its size, and below what was
    predicted, red, bold and crossed where it is wrong. The perturbation is centred at grey and
    scaled by one factor for the whole figure, given in the row's label.

    Args:
        x: Images in [0, 1], ``(N, C, H, W)`` with one or three channels.
        x_adv: The same images attacked.
        y: True labels, ``(N,)``.
        predicted: Predicted labels of ``x_adv``, ``(N,)``.
        distances: Between ``x`` and ``x_adv``, ``(N,)``, by norm (``linf``, ``l2``, ``l1``).
        class_names: A name for each label.
        max_examples: Show the first so many.

    Returns:
        The figure.

    Raises:
        ValueError: If there is nothing to show, or shapes disagree, or C is neither 1 nor 3.
    """
    labels = {"predicted": predicted, "y": y, **distances}
    x, x_adv = _first_images(x, x_adv, labels, max_examples)
    delta = x_adv - x
    factor = magnification(delta)
    fig = blank_figure(1.05 * len(x) + 0.9, 3.9 + 0.14 * len(distances))
    grid = fig.subplots(3, len(x), squeeze=False)
    for axes, images in zip(grid, (x, 0.5 + factor * delta, x_adv), strict=True):
        _draw_images(axes, images)
    _draw_predictions(grid[0], y, y, class_names)
    _draw_predictions(grid[2], predicted, y, class_names)
    for i, ax in enumerate(grid[1]):
        sizes = [f"{NORM_NAMES.get(norm, norm)} {d[i]:.3g}" for norm, d in distances.items()]
        ax.set_xlabel("\n".join(sizes), fontsize=FONT - 1, color=GREY)
    for axes, name in zip(
        grid, ("clean, true class", f"perturbation\n× {factor:g}", "adversarial"), strict=True
    ):
        axes[0].set_ylabel(name, fontsize=FONT, color=INK)
    return fig


def _first_images(
    clean: Tensor, adversarial: Tensor, labels: Mapping[str, Tensor], max_examples: int
) -> tuple[Tensor, Tensor]:
    """The first images of both on the CPU, once everything is found to fit together."""
    if clean.ndim != 4 or clean.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(clean.shape)}")
    if adversarial.shape != clean.shape:
        raise ValueError(
            f"adversarial images must have the clean images' shape {tuple(clean.shape)}, "
            f"got {tuple(adversarial.shape)}"
        )
    for name, values in labels.items():
        if values.shape != (len(clean),):
            raise ValueError(
                f"{name} must hold one value for each of {len(clean)} images, "
                f"got {tuple(values.shape)}"
            )
    n = min(len(clean), max_examples)
    if n < 1:
        raise ValueError(f"at least one image is needed, got {len(clean)}, max_examples {n}")
    clean, adversarial = clean[:n].detach().float().cpu(), adversarial[:n].detach().float().cpu()
    if not adversarial.isfinite().all():
        raise ValueError("adversarial images must be numbers, got NaN; show attacked images only")
    return clean, adversarial


def _draw_images(axes: npt.NDArray[np.object_], images: Tensor) -> None:
    """One image per axes, without anything around it."""
    pixels = images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for ax, image in zip(axes, pixels, strict=True):
        picture = image[:, :, 0] if image.shape[-1] == 1 else image
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)


def _draw_predictions(
    axes: npt.NDArray[np.object_], predicted: Tensor, y: Tensor, class_names: Sequence[str]
) -> None:
    """The predicted class above each image, red, bold and crossed where it is wrong."""
    for ax, label, truth in zip(axes, predicted.tolist(), y.tolist(), strict=False):
        is_wrong = label != truth
        ax.set_title(
            f"{'✗ ' if is_wrong else ''}{class_names[int(label)]}",
            fontsize=FONT,
            color=RED if is_wrong else INK,
            fontweight="bold" if is_wrong else "normal",
            pad=3,
        )


def draw_per_class_bars(
    ax: Axes, series: Mapping[str, npt.ArrayLike], class_names: Sequence[str]
) -> None:
    """Draws a group of bars for each class into ``ax``.

    Args:
        ax: Where to.
        series: For each label, one value per class ``(K,)`` or one row per repeat ``(R, K)``: then
            the bar is the mean and each repeat a dot.
        class_names: The K names.

    Raises:
        ValueError: If there is no series or one does not have K columns.
    """
    k = len(class_names)
    if not series:
        raise ValueError("at least one series is needed, got none")
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


def per_class_bars(
    series: Mapping[str, npt.ArrayLike],
    class_names: Sequence[str],
    ylabel: str = "accuracy (%)",
    percent: bool = True,
) -> Figure:
    """Bars for each class, one colour for each label.

    Args:
        series: As in :func:`draw_per_class_bars`.
        class_names: The K names.
        ylabel: What the height is.
        percent: Whether the values are fractions in [0, 1] to be shown on an axis from 0 to 100.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no series or one does not have K columns.
    """
    fig = blank_figure(max(4.5, 0.55 * len(class_names) + 1.5), 2.9)
    ax = fig.subplots()
    scale = 100.0 if percent else 1.0
    draw_per_class_bars(
        ax, {label: scale * np.asarray(v, dtype=float) for label, v in series.items()}, class_names
    )
    if percent:
        ax.set_ylim(0, 100)
    ax.set_ylabel(ylabel, fontsize=FONT)
    put_legend_above(fig, ax)
    return fig


def accuracy_curve(
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Accuracy against something, one line for each label.

    Args:
        xs: Where the accuracy was measured, for instance radii or epochs.
        series: For each label, one accuracy in [0, 1] for each of ``xs``; NaN leaves a gap.
        xlabel: What ``xs`` is, with its unit.
        intervals: For any of the labels, both ends of an interval for each of ``xs``, drawn as a
            band behind the line; NaN leaves a gap.

    Returns:
        The figure; the axis runs from 0 to 100 percent.

    Raises:
        ValueError: If there is no series, one is not as long as ``xs``, or a band has no line.
    """
    if not series:
        raise ValueError("at least one series is needed, got none")
    intervals = intervals or {}
    if lost := sorted(set(intervals) - set(series)):
        raise ValueError(f"intervals of {lost} belong to no series; there are {sorted(series)}")
    fig = blank_figure(4.8, 3.1)
    ax = fig.subplots()
    # With many points the markers would hide the line.
    every = max(1, len(xs) // 12)
    for i, (label, ys) in enumerate(series.items()):
        if len(ys) != len(xs):
            raise ValueError(f"{label!r} must have {len(xs)} values, one per x, got {len(ys)}")
        if label in intervals:
            ends = 100.0 * np.asarray(intervals[label], dtype=float)
            if ends.shape != (len(xs), 2):
                raise ValueError(
                    f"the intervals of {label!r} must have the shape {(len(xs), 2)}, "
                    f"got {ends.shape}"
                )
            # Lines of one figure may cross, so their bands let each other shine through.
            ax.fill_between(xs, *ends.T, color=CYCLE[i % len(CYCLE)], alpha=0.18, linewidth=0)
        ax.plot(
            np.asarray(xs, dtype=float),
            100.0 * np.asarray(ys, dtype=float),
            color=CYCLE[i % len(CYCLE)],
            marker=MARKERS[i % len(MARKERS)],
            markevery=every,
            markersize=4,
            linewidth=1.5,
            label=label,
        )
    ax.set_ylim(0, 100)
    ax.set_xlabel(xlabel, fontsize=FONT)
    ax.set_ylabel("accuracy (%)", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def confusion_matrix(counts: npt.ArrayLike, class_names: Sequence[str], title: str = "") -> Figure:
    """Which classes are taken for which: a row per true class, a column per predicted one.

    A cell is as dark as its share of the row is large. Up to 20 classes have the counts written in,
    up to 40 have their names; beyond that there is no room, and the axes carry numbers.

    Args:
        counts: How many examples of class i were taken for class j, ``(K, K)``.
        class_names: The K names.
        title: Heading; may be empty.

    Returns:
        The figure.

    Raises:
        ValueError: If there is not a row and a column for each class.
    """
    table = np.asarray(counts)
    k = len(class_names)
    if table.shape != (k, k) or k < 1:
        raise ValueError(f"counts must have the shape {(k, k)}, got {table.shape}")
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = min(12.0, max(3.4, 0.42 * k + 1.2))
    fig = blank_figure(side, side)
    ax = fig.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if k <= 20:
        for (i, j), count in np.ndenumerate(table):
            color = "white" if share[i, j] > 0.5 else INK if count else GREY
            ax.text(j, i, f"{count:g}", ha="center", va="center", fontsize=FONT - 2, color=color)
    tidy_axes(ax, grid=False)
    if k <= 40:
        is_long = max(map(len, class_names)) > 3
        ax.set_xticks(np.arange(k), class_names, rotation=90 if is_long else 0)
        ax.set_yticks(np.arange(k), class_names)
    ax.set_xlabel("predicted", fontsize=FONT)
    ax.set_ylabel("true", fontsize=FONT)
    if title:
        ax.set_title(title, fontsize=FONT, color=INK)
    return fig


def put_legend_above(fig: Figure, ax: Axes) -> None:
    """Puts the legend of ``ax`` in one frameless row over the figure, where it hides no data."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=FONT,
    )
