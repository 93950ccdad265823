"""Plots of a paper's results, as plotly takes them: plain dictionaries.

Texts are escaped, since plotly reads them as HTML.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any, NamedTuple

from common.results.bases import Key, ball_text, bases, comparable, usual
from common.results.markdown import one_line
from common.results.outcomes import group_of
from common.results.reference import Reference
from common.results.schema import CheckpointResult, Result

COLORS = (
    *("#4477aa", "#ee6677", "#228833", "#b58900", "#66ccee", "#aa3377"),
    *("#ee7733", "#009988", "#cc3311", "#8866cc", "#999999", "#dd88bb"),
)
"""After Paul Tol's bright and vibrant schemes; readable on white and on black."""
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagon")
AXES = {"eps": "eps", "steps": "steps", "level": "noise level"}
_AT = re.compile(r"(?:^|/)(steps)=(\d+)$")  # steps of an audit are in its name alone

_Points = dict[float, dict[int, float]]  # accuracies by place and seed


class Plot(NamedTuple):
    """A plot with its heading; ``figure`` has plotly's ``data`` and ``layout``."""

    title: str
    note: str
    figure: dict[str, Any]


def plots_of(
    reference: Reference, results: Sequence[Result], costs: Mapping[str, Mapping[str, float]]
) -> list[Plot]:
    """Curves, trade-off and cost of the last checkpoints, for each data set and threat model.

    Args:
        reference: Names the rows.
        results: Ours.
        costs: Of training, by experiment and metric.
    """
    stems = {result["experiment"] for result in results}
    found: dict[str, dict[Key, CheckpointResult]] = {}
    for result in results:
        if (entry := result["checkpoints"].get("last")) is not None:
            name = result["experiment"].partition("_")[0]
            if (threat := entry["threat"]) is not None:
                name += f", {ball_text(**threat)}"
            found.setdefault(name, {})[result["experiment"], result["seed"]] = entry
    made = {stem: reference.rows[stem].label for stem in reference.rows if stem in stems}
    times = Counter(made.values())
    labels = {stem: label if times[label] == 1 else stem for stem, label in made.items()}
    return [
        plot
        for name, checkpoints in found.items()
        for plot in (
            *_scatters(checkpoints, labels, name, costs),
            *_curves(checkpoints, labels, name),
        )
    ]


def text(raw: str, most: int = 32) -> str:
    """A label for plotly: one line, not too long, as text."""
    raw = one_line(raw)
    return escape(raw if len(raw) <= most else f"{raw[: most - 1]}…")


# --------------------------------------------------------------------------------------- curves


def _curves(
    checkpoints: Mapping[Key, CheckpointResult], labels: Mapping[str, str], name: str
) -> Iterator[Plot]:
    """Accuracy against radius, steps or noise level: a plot for each sweep, a line for each row."""
    sweeps: dict[tuple[str, str], dict[str, _Points]] = {}
    sizes: dict[tuple[str, str], set[int]] = {}
    for (stem, seed), entry in checkpoints.items():
        for step, attack in entry["attacks"].items():
            for axis, at in _places(step, attack["at"]).items():
                metric = group_of(step, attack) if attack["at"] else step
                if metric not in entry["metrics"]:
                    continue
                sweep = step.partition("/")[0], axis
                sizes.setdefault(sweep, set()).add(attack["examples"])
                points = sweeps.setdefault(sweep, {}).setdefault(stem, {})
                points.setdefault(at, {})[seed] = 100 * entry["metrics"][metric]
    for (entry_name, axis), by_row in sweeps.items():
        images = ", ".join(f"{size:,}" for size in sorted(sizes[entry_name, axis]))
        traces = [
            _trace(i, labels.get(stem, stem), points, f"{AXES[axis]} %{{x}}")
            for i, (stem, points) in enumerate(by_row.items())
        ]
        title = f"{name}: {entry_name}, accuracy against {AXES[axis]}"
        note = f"Last checkpoints on {images} images; mean over seeds."
        kind = "log" if axis == "steps" else "linear"
        yield Plot(title, note, _figure(traces, AXES[axis], "accuracy (%)", kind))


def _places(step: str, at: Mapping[str, float]) -> dict[str, float]:
    """The place of a step on the axis of its sweep, if it has one; of a noise the first draw."""
    if at.get("draw"):
        return {}
    found = {axis: float(value) for axis, value in at.items() if axis in AXES}
    if not at and (match := _AT.search(step)):
        found[match[1]] = float(match[2])
    return found if len(found) == 1 else {}


def _trace(i: int, label: str, points: _Points, place: str) -> dict[str, Any]:
    xs = sorted(points)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text(label),
        "x": xs,
        "y": [fmean(points[x].values()) for x in xs],
        "customdata": [_by_seed(points[x]) for x in xs],
        "hovertemplate": f"%{{fullData.name}}<br>{place}: %{{y:.2f}} %<br>"
        "%{customdata}<extra></extra>",
        **_style(i),
    }


def _by_seed(values: Mapping[int, float]) -> str:
    return ", ".join(f"seed {seed} {value:.2f}" for seed, value in sorted(values.items()))


def _style(i: int) -> dict[str, Any]:
    color, symbol = COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)]
    return {
        "marker": {"color": color, "symbol": symbol, "size": 8},
        "line": {"color": color, "width": 2},
    }


# ------------------------------------------------------------------------------------- scatters


def _scatters(
    checkpoints: Mapping[Key, CheckpointResult],
    labels: Mapping[str, str],
    name: str,
    costs: Mapping[str, Mapping[str, float]],
) -> Iterator[Plot]:
    """Worst case against clean accuracy and costs: a point for each seed."""
    metrics, _ = comparable(checkpoints)
    having = {key: one for key, one in checkpoints.items() if "worst" in one["metrics"]}
    sizes = [bases(one)["worst"].size for one in having.values()]
    others = (stem for stem, seed in having if "worst" not in metrics[stem, seed])
    left_out = list(dict.fromkeys(others))
    kinds = {
        "clean_acc": ("trade-off", "clean accuracy (%)", 100.0, ".2f"),
        "macs": ("cost", "multiply-accumulates", 1.0, ","),
        "parameters": ("size", "parameters", 1.0, ","),
        "step_time": ("time", "time of a training step, relative", 1.0, ".2f"),
    }
    for key, (what, title, scale, number) in kinds.items():
        rows: dict[str, dict[int, tuple[float, float]]] = {}
        for (stem, seed), found in metrics.items():
            known = {**costs.get(stem, {}), **found}
            if "worst" in found and key in known:
                rows.setdefault(stem, {})[seed] = scale * known[key], 100 * found["worst"]
        if len(rows) < 2:
            continue
        note = f"Worst case on {usual(sizes):,} images, last checkpoints, a point for each seed."
        if left_out:
            note += f" Left out, since measured on other images: {', '.join(left_out)}."
        traces = [
            _cloud(i, labels.get(stem, stem), points, f"{title}: %{{x:{number}}}")
            for i, (stem, points) in enumerate(rows.items())
        ]
        figure = _figure(traces, title, "worst case (%)", "log" if number == "," else "linear")
        yield Plot(f"{name}: {what}, worst case against {title}", note, figure)


def _cloud(
    i: int, label: str, points: Mapping[int, tuple[float, float]], place: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text(label),
        "x": [x for x, _ in points.values()],
        "y": [y for _, y in points.values()],
        "customdata": list(points),
        "hovertemplate": f"%{{fullData.name}}, seed %{{customdata}}<br>{place}<br>"
        "worst case: %{y:.2f} %<extra></extra>",
        **_style(i),
    }


def _figure(traces: list[dict[str, Any]], x: str, y: str, kind: str) -> dict[str, Any]:
    axis = {"automargin": True, "zeroline": False, "linewidth": 1}
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": x}, "type": kind, **axis},
            "yaxis": {"title": {"text": y}, **axis},
        },
    }
