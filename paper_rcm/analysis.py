"""The paper's figures and claims, from what has finished: ``python -m paper_rcm.analysis``.

- E1: the simulation next to the theorem, pooled features of a random convolution under noise.
- E5: natural, consistency and robust accuracy of every network by the side of its last map.
- E6: how far pooled features of trained networks move, average against max pooling.
- E12: a two-sample t-test over seeds, larger map against base.

The verdicts of the scaled-down run go to ``analysis.json``. Tags as in ``method.py``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from common.analysis import (
    BySeed,
    Expectation,
    by_seed,
    combined,
    conclude,
    plain_values,
    run_analysis,
)
from common.errors import ConfigurationError
from common.figures import (
    CYCLE,
    FONT,
    MARKERS,
    blank_figure,
    put_legend_above,
    save_figure,
    tidy_axes,
)
from common.results import load_results, write_json_atomically
from paper_rcm.theory import simulate

SIDES = (4, 8, 16, 32, 64)
STRIDES = (1, 2, 4, 8)
AR = "pgd20/ce_f"


# ------------------------------------------------------------------------------------ the figures


def simulation() -> dict[str, dict[str, dict[int, float]]]:
    """Movement of pooled features by side and by stride, for both poolings (E1, [choice])."""
    found: dict[str, dict[str, dict[int, float]]] = {"side": {}, "stride": {}}
    by_side = {side: simulate(side) for side in SIDES}
    by_stride = {stride: simulate(32, stride) for stride in STRIDES}
    for axis, movements in (("side", by_side), ("stride", by_stride)):
        for pool in ("avg", "max"):
            found[axis][pool] = {at: getattr(m, pool) for at, m in movements.items()}
    return found


def simulation_figure(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Movement against the side of the map, and against the stride."""
    fig = blank_figure(7.0, 3.0)
    titles = {"side": "side of the map", "stride": "stride, 32x32 images"}
    for ax, (axis, pools) in zip(fig.subplots(1, 2), found.items(), strict=True):
        for i, (pool, line) in enumerate(pools.items()):
            style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 4}
            ax.plot(list(line), list(line.values()), label=f"{pool} pooling", **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(titles[axis], fontsize=FONT)
        ax.set_ylabel("movement of the pooled feature (l2)", fontsize=FONT)
        tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def network_of(method: str) -> tuple[str, str, float]:
    """Strides, pooling and up-sampling factor of ``222_m2_avg``, ``resnet18_1122_at``."""
    parts = method.split("_")
    strides = next((part for part in parts if part.isdigit() and len(part) > 2), "")
    pool = "max" if "max" in parts else "avg"
    factor = next((part for part in parts if part[:1] == "m" and part[1:2].isdigit()), "m1")
    digits = "".join(c for c in factor[1:] if c.isdigit() or c == ".")
    return strides, pool, float(digits)


def map_side(method: str, image: int) -> float:
    """Side of the last map of a residual network."""
    strides, _, factor = network_of(method)
    side = round(image * factor)
    for stride in strides:
        side = -(-side // int(stride))
    return float(side)


def accuracy_figure(metrics: Mapping[tuple[str, int], Mapping[str, float]], image: int) -> Figure:
    """NA, CA and AR of every network, by the side of its last map (E5)."""
    names = sorted({m for m, _ in metrics}, key=lambda m: (network_of(m)[1], map_side(m, image)))
    fig = blank_figure(max(4.8, 0.9 * len(names) + 1.5), 3.3)
    ax = fig.subplots()
    for i, (key, label) in enumerate(
        (("clean_acc", "natural"), ("consistency", "consistency"), (AR, "robust"))
    ):
        values = [_mean(metrics, name, key) for name in names]
        at = [n for n, value in enumerate(values) if value is not None]
        shown = [100 * value for value in values if value is not None]
        style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 6}
        ax.plot(at, shown, linestyle="", label=label, **style)
    sides = [f"{name}\n{map_side(name, image):.0f}x{map_side(name, image):.0f}" for name in names]
    ax.set_xticks(range(len(names)), sides, fontsize=FONT - 1)
    ax.set_ylabel("accuracy (%)", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def movement_figure(
    metrics: Mapping[tuple[str, int], Mapping[str, float]], image: int
) -> Figure | None:
    """Movement of the pooled feature of trained networks against the side of the map (E6)."""
    fig = blank_figure(7.0, 3.0)
    keys = {"pooled_change": "PGD-20", "pooled_change_noise": "uniform noise"}
    drawn = False
    for ax, (key, title) in zip(fig.subplots(1, 2), keys.items(), strict=True):
        for i, pool in enumerate(("avg", "max")):
            points: dict[float, float] = {}
            for name in {m for m, _ in metrics}:
                value = _mean(metrics, name, key)
                if network_of(name)[1] == pool and network_of(name)[2] == 1 and value is not None:
                    points[map_side(name, image)] = value
            if points:
                drawn = True
                line = sorted(points.items())
                style: dict[str, Any] = {"color": CYCLE[i], "marker": MARKERS[i], "markersize": 5}
                ax.plot(*zip(*line, strict=True), label=f"{pool} pooling", **style)
        ax.set_xlabel(f"side of the last map ({title})", fontsize=FONT)
        ax.set_ylabel("movement (l2)", fontsize=FONT)
        tidy_axes(ax)
    if not drawn:
        return None
    put_legend_above(fig, ax)
    return fig


def _mean(
    metrics: Mapping[tuple[str, int], Mapping[str, float]], name: str, key: str
) -> float | None:
    values = [
        found[key] for (method, _), found in metrics.items() if method == name and key in found
    ]
    return fmean(values) if values else None


# ------------------------------------------------------------------------------- the expectations


def t_test(first: BySeed, second: BySeed) -> float | None:
    """P of Welch's two-sided two-sample t-test [choice]; ``None`` with fewer than two seeds."""
    if len(first) < 2 or len(second) < 2:
        return None
    return float(ttest_ind(list(first.values()), list(second.values()), equal_var=False).pvalue)


def evaluate_expectations(
    metrics: Mapping[tuple[str, int], Mapping[str, float]],
    simulated: Mapping[str, Mapping[str, Mapping[int, float]]],
    seeds: Sequence[int],
) -> list[Expectation]:
    """The claims R1 to R7 as far as the scaled-down run can judge them.

    Args:
        metrics: (what stands after ``digits_``, seed) -> metrics of its result.
        simulated: As from :func:`simulation`.
        seeds: All that a verdict needs.
    """

    def of(name: str, metric: str) -> BySeed:
        return by_seed(metrics, name, metric)

    def gain(larger: str, base: str, metric: str) -> BySeed:
        return combined(of(larger, metric), of(base, metric), lambda a, b: 100 * (a - b))

    def p(larger: str, base: str) -> dict[str, BySeed]:
        value = t_test(of(larger, AR), of(base, AR))
        return {"p of the t-test on AR": {} if value is None else {0: value}}

    average, largest = simulated["side"]["avg"], simulated["side"]["max"]
    sides = list(average)
    ratio_avg, ratio_max = (
        average[sides[-1]] / average[sides[0]],
        largest[sides[-1]] / largest[sides[0]],
    )
    every = dict.fromkeys(seeds, ratio_avg)
    r1 = conclude(
        "R1",
        f"simulation, average pooling: movement at side {sides[-1]} over that at side {sides[0]} "
        "is below 1",
        every,
        seeds,
        lambda value: value < 1.0,
        1.0,
    )
    r2 = conclude(
        "R2",
        "the same with max pooling is not below 1",
        dict.fromkeys(seeds, ratio_max),
        seeds,
        lambda value: value >= 1.0,
        1.0,
    )
    r3 = conclude(
        "R3",
        "smaller strides, 122 against 222: AR not worse by more than 1 point",
        gain("122_avg", "222_avg", AR),
        seeds,
        lambda value: value >= -1.0,
        -1.0,
        {"gain in NA": gain("122_avg", "222_avg", "clean_acc"), **p("122_avg", "222_avg")},
    )
    r4 = conclude(
        "R4",
        "up-sampling by 2, 222: AR improves",
        gain("222_m2_avg", "222_avg", AR),
        seeds,
        lambda value: value > 0.0,
        0.0,
        {"gain in NA": gain("222_m2_avg", "222_avg", "clean_acc"), **p("222_m2_avg", "222_avg")},
    )
    r5 = conclude(
        "R5",
        "saturation: from 122 to 112 AR gains less than a point",
        gain("112_avg", "122_avg", AR),
        seeds,
        lambda value: value < 1.0,
        1.0,
    )
    r6 = conclude(
        "R6",
        "equal map of 2x2: strides (122) at least as good as up-sampling (222, m = 2); not "
        "expected on 8x8 images, where the image is the bottleneck",
        gain("122_avg", "222_m2_avg", AR),
        seeds,
        lambda value: value >= 0.0,
        0.0,
    )
    r7 = conclude(
        "R7",
        "max pooling: from 122 to 112 AR gains less than a point",
        gain("112_max", "122_max", AR),
        seeds,
        lambda value: value < 1.0,
        1.0,
    )
    moved = combined(
        of("112_avg", "pooled_change_noise"),
        of("122_avg", "pooled_change_noise"),
        lambda a, b: a / b,
    )
    e6 = conclude(
        "E6",
        "trained networks, average pooling: movement under noise at a 4x4 map over that at 2x2 is "
        "below 1",
        moved,
        seeds,
        lambda value: value < 1.0,
        1.0,
        {
            "the same with max pooling": combined(
                of("112_max", "pooled_change_noise"),
                of("122_max", "pooled_change_noise"),
                lambda a, b: a / b,
            )
        },
    )
    return [r1, r2, r3, r4, r5, r6, r7, e6]


# ------------------------------------------------------------------------------------ the command


def analyse(
    runs: Path, results: Path, on: str, seeds: Sequence[int], device: str = "cpu"
) -> dict[str, Any]:
    """Draw what can be drawn and judge what can be judged.

    Args:
        runs: Unused: everything needed is in the result files.
        results: Where the result files are and the output goes.
        on: With what the stems begin.
        seeds: Which.
        device: Unused.

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is no result to work on.
    """
    dataset = on.partition("_")[0]
    found = [
        result
        for result in load_results(results)
        if result["experiment"].startswith(on) and result["seed"] in seeds
    ]
    if not found:
        raise ConfigurationError(
            f"nothing to analyse: no result {results}/{on}*-seed*.json for seeds "
            f"{', '.join(map(str, seeds))}; run make reproduce-rcm ON={on}"
        )
    metrics = {
        (result["experiment"].removeprefix(f"{dataset}_"), result["seed"]): dict(
            result["checkpoints"]["last"]["metrics"]
        )
        for result in found
        if "last" in result["checkpoints"]
    }
    simulated = simulation()
    image = 8 if dataset == "digits" else 32
    pictures = {"simulation": simulation_figure(simulated)}
    maps = {key: value for key, value in metrics.items() if network_of(key[0])[0]}
    if maps:
        pictures["accuracies"] = accuracy_figure(maps, image)
        if moved := movement_figure(maps, image):
            pictures["movement"] = moved
    judged = evaluate_expectations(metrics, simulated, seeds) if dataset == "digits" else []
    report: dict[str, Any] = {
        "on": on,
        "seeds": list(seeds),
        "expectations": [plain_values(asdict(one)) for one in judged],
        "simulation": plain_values(simulated),
        "missing": [],
    }
    path = results / ("analysis.json" if dataset == "digits" else f"analysis_{on}.json")
    write_json_atomically(path, report)
    prefix = "digits" if dataset == "digits" else on
    figures = [
        save_figure(figure, results / "figures" / f"{prefix}_{name}.png")
        for name, figure in pictures.items()
    ]
    return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 whichever way the expectations turn out, 2 where nothing can be done."""
    return run_analysis("paper_rcm", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
