"""The forest plot that every paper has, and points with their spread over seeds."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.evaluation.drawing import BLUE, CYCLE, FONT, GREY, MARKERS, blank_figure, tidy_axes
from common.results.statistics import Difference


def error_bars(
    ax: Axes, points: Mapping[float, Sequence[float]], number: int = 0, label: str = "", **more: Any
) -> None:
    """Means with standard deviations over seeds, 0 with one seed, from left to right.

    Args:
        ax: Where to.
        points: At each place, the numbers of the seeds.
        number: Of the series, which decides colour and marker.
        label: Of the series.
        **more: As for ``Axes.errorbar``.
    """
    color, marker = CYCLE[number % len(CYCLE)], MARKERS[number % len(MARKERS)]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "capsize": 2}
    at = sorted(points)
    spread = [stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in at]
    middle = [fmean(points[x]) for x in at]
    ax.errorbar(at, middle, spread, label=label, **style, **more)


def forest_plot(differences: Mapping[str, Difference], baseline: str, accuracy: str) -> Figure:
    """Difference of each method to the baseline, in points, with its 95 % t interval.

    A filled marker is a significant difference, an open one is not. Intervals that reach far
    beyond the means and the median interval end in an arrow.

    Args:
        differences: By label, in the order from top to bottom.
        baseline: What the differences are to, in words.
        accuracy: Which accuracy, in words.

    Raises:
        ValueError: If there is no difference.
    """
    if not differences:
        raise ValueError("a forest plot needs at least one difference, got none")
    fig = blank_figure(7.2, 1.0 + 0.3 * len(differences))
    ax = fig.subplots()
    means = [abs(one.mean) for one in differences.values()]
    ends = [
        max(abs(one.low), abs(one.high)) if one.is_tested else abs(one.mean)
        for one in differences.values()
    ]
    reach = 1.05 * max(1.0, min(max(ends), 3 * max(median(ends), *means)))
    for row, one in enumerate(differences.values()):
        low, high = max(one.low, -reach), min(one.high, reach)
        if one.is_tested:
            ax.plot([low, high], [row, row], color=BLUE, linewidth=1.6, solid_capstyle="butt")
            for end, full, mark in ((low, one.low, "<"), (high, one.high, ">")):
                if end != full:
                    ax.plot(end, row, mark, color=BLUE, markersize=4, clip_on=False)
        is_clear = one.is_up or one.is_down
        face = BLUE if is_clear else "white"
        ax.plot(one.mean, row, "o", color=BLUE, markerfacecolor=face, markersize=6)
        ax.text(
            1.02, row, one.text(), transform=ax.get_yaxis_transform(), va="center", fontsize=FONT
        )
    ax.axvline(0.0, color=GREY, linewidth=0.9)
    ax.set_xlim(-reach, reach)
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.set_yticks(range(len(differences)), list(differences), fontsize=FONT)
    ax.set_xlabel(f"{accuracy}: difference to {baseline} in points, 95 % t interval", fontsize=FONT)
    tidy_axes(ax, grid=False)
    ax.grid(axis="x", color="#e2e2e2", linewidth=0.6)
    return fig
