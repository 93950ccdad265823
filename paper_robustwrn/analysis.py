"""The paper's figures and claims, from what has finished: ``python -m paper_robustwrn.analysis``.

- Scatter (X2, X3): a point per network, robust accuracy against parameters and against MACs, since
  equal parameters is not equal compute.
- Stage-wise curves (X4): one stage's width or depth changes, the others stay.
- Lipschitz (X9, X10): measured local constants, and the upper bound of ``measures.py``, which no
  measured l2 ratio may exceed.

The verdicts of the scaled-down run go to ``analysis.json``.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.report import (
    BySeed,
    Expectation,
    Load,
    by_seed,
    combined,
    conclude,
    load_last,
    load_runs,
    load_test_split,
    plain_values,
    run_analysis,
)
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream
from common.errors import ConfigurationError
from common.evaluation.drawing import (
    CYCLE,
    FONT,
    MARKERS,
    blank_figure,
    put_legend_above,
    save_figure,
    tidy_axes,
)
from common.files import write_sealed_json
from common.modes import frozen
from common.networks.wide_resnet import WideResNet
from common.results.bases import comparable, last_of
from common.results.reference import select
from common.results.store import Result, load_results
from paper_robustwrn.measures import L2Ratio, upper_bound

METRIC = "pgd20/ce_f"
LABELLED = {"cifar10": (50.0, 52.5)}
"""The paper writes names at networks up to the first and from the second number on [P]."""

EARLY, LATE = "d3-1-1", "d1-1-3"


# ----------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Network:
    """What the figures need of one experiment, means over seeds.

    Attributes:
        name: What tells it from others of its data set.
        accuracy: Under PGD-20, in percent, of the selected checkpoint where that was attacked so.
        parameters: How many.
        macs: Multiply-accumulates per image.
        shape: ``d`` or ``w`` and the numbers of the stages, where the name has them.
    """

    name: str
    accuracy: float
    parameters: float
    macs: float
    shape: tuple[str, tuple[float, ...]] | None


def networks_of(results: Sequence[Result]) -> list[Network]:
    """One entry per experiment that has been measured, by parameters."""
    chosen = {}
    for result in results:
        for label in ("selected", "last"):
            checkpoint = result["checkpoints"].get(label)
            if checkpoint and {METRIC, "parameters", "macs"} <= set(checkpoint["metrics"]):
                chosen[result["experiment"], result["seed"]] = checkpoint
                break
    by_stem: dict[str, list[dict[str, float]]] = {}
    for (stem, _), metrics in comparable(chosen)[0].items():
        if {METRIC, "parameters", "macs"} <= set(metrics):
            by_stem.setdefault(stem, []).append(metrics)
    found = []
    for stem, every in by_stem.items():
        mean = {key: fmean(m[key] for m in every) for key in (METRIC, "parameters", "macs")}
        name = stem.partition("_")[2]
        numbers = (100 * mean[METRIC], mean["parameters"], mean["macs"])
        found.append(Network(name, *numbers, shape_of(stem)))
    return sorted(found, key=lambda network: network.parameters)


def shape_of(stem: str) -> tuple[str, tuple[float, ...]] | None:
    """``("w", (10, 10, 8))`` of ``cifar10_grid_w10-10-8``."""
    found = re.search(r"_([dw])(\d+(?:\.\d+)?(?:-\d+(?:\.\d+)?)+)(?:_|$)", stem)
    return (found[1], tuple(float(n) for n in found[2].split("-"))) if found else None


# ------------------------------------------------------------------------------------ the figures


def scatter(networks: Sequence[Network], against: str, dataset: str) -> Figure:
    """Robust accuracy of every network against ``parameters`` or ``macs``."""
    unit, title = (1e-6, "parameters (M)") if against == "parameters" else (1e-9, "MACs (G)")
    if max(getattr(network, against) for network in networks) < 1e6 / (unit * 1e6):
        unit, title = unit * 1e3, title.replace("(M)", "(k)").replace("(G)", "(M)")
    fig = blank_figure(5.2, 3.4)
    ax = fig.subplots()
    low, high = LABELLED.get(dataset, (float("inf"), float("-inf")))
    for network in networks:
        at = (getattr(network, against) * unit, network.accuracy)
        ax.plot(*at, "o", color=CYCLE[0], markersize=4)
        if network.accuracy <= low or network.accuracy >= high:
            ax.annotate(network.name, at, (3, 3), textcoords="offset points", fontsize=FONT - 2)
    ax.margins(x=0.25, y=0.15)  # room for the names
    ax.set_xlabel(title, fontsize=FONT)
    ax.set_ylabel("PGD-20 accuracy (%)", fontsize=FONT)
    tidy_axes(ax)
    return fig


def stage_curves(networks: Sequence[Network], kind: str) -> Figure | None:
    """Accuracy against the width (``w``) or depth (``d``) of one stage, the others as they are.

    ``None`` without two networks that differ in one stage alone.
    """
    points: dict[tuple[float, ...], float] = {}
    for network in networks:
        if network.shape is not None and network.shape[0] == kind:
            points[network.shape[1]] = network.accuracy
    if len(points) < 2:
        return None

    def neighbours(base: tuple[float, ...], stage: int) -> dict[float, float]:
        return {
            shape[stage]: accuracy
            for shape, accuracy in points.items()
            if len(shape) == len(base)
            and all(a == b for i, (a, b) in enumerate(zip(shape, base, strict=True)) if i != stage)
        }

    base = max(points, key=lambda s: sum(len(neighbours(s, i)) for i in range(len(s))))
    fig = blank_figure(4.8, 3.1)
    ax = fig.subplots()
    drawn = 0
    for stage in range(len(base)):
        line = sorted(neighbours(base, stage).items())
        if len(line) > 1:
            drawn += 1
            style: dict[str, Any] = {
                "color": CYCLE[stage % len(CYCLE)],
                "marker": MARKERS[stage % len(MARKERS)],
            }
            ax.plot(*zip(*line, strict=True), label=f"stage {stage + 1}", markersize=4, **style)
    if not drawn:
        return None
    ax.set_xlabel({"w": "widening factor", "d": "blocks"}[kind] + " of the stage", fontsize=FONT)
    ax.set_ylabel("PGD-20 accuracy (%)", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


def lipschitz_figure(measured: Mapping[str, Mapping[str, float]]) -> Figure:
    """The bound, and the largest and the mean measured ratio, of every experiment."""
    fig = blank_figure(max(3.6, 1.1 * len(measured) + 1.5), 3.1)
    ax = fig.subplots()
    at = np.arange(len(measured))
    for key, label in (("bound", "bound"), ("largest", "largest ratio"), ("mean", "mean ratio")):
        values = [numbers[key] for numbers in measured.values()]
        style: dict[str, Any] = {"color": CYCLE[len(ax.lines)], "marker": MARKERS[len(ax.lines)]}
        ax.plot(at, values, linestyle="", markersize=6, label=label, **style)
    ax.set_yscale("log")
    ax.set_xticks(at, list(measured), fontsize=FONT - 1)
    ax.set_xlim(-0.5, len(measured) - 0.5)
    ax.set_ylabel("l2 stretch of the logits", fontsize=FONT)
    tidy_axes(ax)
    put_legend_above(fig, ax)
    return fig


# --------------------------------------------------------------------------------- the Lipschitz


def lipschitz_of(model: Any, x: Tensor, y: Tensor, attack: PGD) -> dict[str, float]:
    """Bound, largest and mean measured l2 ratio of a trained classifier.

    Args:
        model: A classifier whose ``net`` is a WideResNet.
        x: Images ``(N, C, H, W)``.
        y: Labels ``(N,)``.
        attack: Makes the pairs of images.
    """
    batch = {"x": x, "y": y, "index": torch.arange(len(y))}
    random = ExampleRandom(0, 0, batch["index"], Stream.EVALUATION)
    with frozen(model, "eval"):
        ratios = L2Ratio(attack)(model, batch, random)["l2_ratio"]
        bound = upper_bound(model.net, (x.shape[1], x.shape[2], x.shape[3]))
    return {
        "bound": bound["total"],
        "largest": ratios.max().item(),
        "mean": ratios.mean().item(),
        **{f"bound_{part}": value for part, value in bound.items() if part != "total"},
    }


# ------------------------------------------------------------------------------- the expectations


def evaluate_expectations(
    metrics: Mapping[tuple[str, int], Mapping[str, float]],
    lipschitz: Mapping[tuple[str, int], Mapping[str, float]],
    seeds: Sequence[int],
) -> list[Expectation]:
    """What the scaled-down run is held against (directions, with the margins of the trial runs).

    Args:
        metrics: (what stands after ``digits_`` in the stem, seed) -> metrics of its result.
        lipschitz: The same -> :func:`lipschitz_of`.
        seeds: All that a verdict needs.
    """

    def of(name: str, metric: str) -> BySeed:
        return by_seed(metrics, name, metric)

    early, late = f"{EARLY}_sat", f"{LATE}_sat"
    a = conclude(
        "a",
        "PGD-20: blocks in the first stage against blocks in the last, 2.6 times the parameters "
        "and equal MACs; the difference in points is no less than -3",
        combined(of(early, METRIC), of(late, METRIC), lambda one, other: 100 * (one - other)),
        seeds,
        lambda value: value >= -3.0,
        -3.0,
        {
            f"parameters {EARLY}": of(early, "parameters"),
            f"parameters {LATE}": of(late, "parameters"),
        },
    )
    cleans = combined(
        of(early, "clean_acc"), of(late, "clean_acc"), lambda one, other: 100 * min(one, other)
    )
    b = conclude(
        "b", "clean accuracy of both, the lower one", cleans, seeds, lambda v: v >= 97.0, 97.0
    )
    natural = combined(
        of(f"{EARLY}_natural", METRIC),
        of(f"{LATE}_natural", METRIC),
        lambda one, other: 100 * max(one, other),
    )
    c = conclude(
        "c",
        "PGD-20 after natural training of the same networks, the higher one, stays below 20",
        natural,
        seeds,
        lambda value: value < 20.0,
        20.0,
    )
    slack: BySeed = {}
    for (_, seed), found in lipschitz.items():
        slack[seed] = max(slack.get(seed, 0.0), found["largest"] / found["bound"])
    d = conclude(
        "d",
        "no measured l2 ratio exceeds the upper bound: the largest share of the bound that any "
        "image of any network reaches",
        slack,
        seeds,
        lambda value: value <= 1.0,
        1.0,
    )
    e = conclude(
        "e",
        "the paper's direction: the local Lipschitz constant of the early-heavy network minus "
        "that of the late-heavy one is negative",
        combined(of(early, "lipschitz"), of(late, "lipschitz"), lambda one, other: one - other),
        seeds,
        lambda value: value < 0.0,
        0.0,
        {EARLY: of(early, "lipschitz"), LATE: of(late, "lipschitz")},
    )
    f = conclude(
        "f",
        "the paper's direction: stability of the early-heavy network minus that of the late-heavy "
        "one, in points, is positive",
        combined(
            of(early, "stability"), of(late, "stability"), lambda one, other: 100 * (one - other)
        ),
        seeds,
        lambda value: value > 0.0,
        0.0,
    )
    return [a, b, c, d, e, f]


# ------------------------------------------------------------------------------------ the command


def analyse(
    runs: Path,
    results: Path,
    on: str,
    seeds: Sequence[int],
    device: str = "cpu",
    load: Load = load_last,
) -> dict[str, Any]:
    """Draw what can be drawn and judge what can be judged.

    Args:
        runs: Where the run directories ``<stem>/seed<k>`` are.
        results: Where the result files are and the output goes.
        on: With what the stems begin.
        seeds: Which.
        device: Where networks run.
        load: How a run is loaded.

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is no result to work on.
    """
    found = [
        result
        for result in load_results(results)
        if select([result["experiment"]], on) and result["seed"] in seeds
    ]
    networks = networks_of(found)
    if not networks:
        raise ConfigurationError(
            f"nothing to analyse: no result {results}/{on}*-seed*.json with {METRIC} for seeds "
            f"{', '.join(map(str, seeds))}; run make reproduce-robustwrn ON={on}"
        )
    dataset = on.partition("_")[0]
    folder = results / "figures"
    trained = [one for one in networks if not one.name.endswith("natural")] or networks
    pictures = {name: scatter(trained, name, dataset) for name in ("parameters", "macs")}
    for kind, name in (("w", "widths"), ("d", "depths")):
        if curves := stage_curves(networks, kind):
            pictures[f"stage_{name}"] = curves
    report: dict[str, Any] = {"on": on, "seeds": list(seeds)}
    missing: list[str] = []
    if dataset == "digits":
        metrics, left_out = comparable(last_of(found, "digits_"))
        lipschitz, missing = _lipschitz_of_runs(runs, found, seeds, device, load)
        missing += left_out
        if lipschitz:
            pictures["lipschitz"] = lipschitz_figure(_means(lipschitz))
        judged = evaluate_expectations(metrics, lipschitz, seeds)
        report["expectations"] = [plain_values(asdict(one)) for one in judged]
        report["lipschitz"] = plain_values(
            {f"{name}-seed{seed}": numbers for (name, seed), numbers in lipschitz.items()}
        )
    else:
        report["expectations"] = []
    report["missing"] = missing
    path = results / ("analysis.json" if dataset == "digits" else f"analysis_{on}.json")
    write_sealed_json(path, report)
    prefix = "digits" if dataset == "digits" else on
    figures = [
        save_figure(figure, folder / f"{prefix}_{name}.png") for name, figure in pictures.items()
    ]
    return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}


def _lipschitz_of_runs(
    runs: Path, found: Sequence[Result], seeds: Sequence[int], device: str, load: Load
) -> tuple[dict[tuple[str, int], dict[str, float]], list[str]]:
    """Bound and ratios of every finished run of a wide residual network."""
    names = sorted({result["experiment"].removeprefix("digits_") for result in found})
    loaded, missing = load_runs(runs, names, "digits", seeds, load)
    attack = PGD(0.2, "eps/10", 20)
    measured: dict[tuple[str, int], dict[str, float]] = {}
    for key, (classifier, data) in loaded.items():
        if isinstance(classifier.net, WideResNet):
            x, y = load_test_split(data)
            measured[key] = lipschitz_of(classifier.to(device), x.to(device), y.to(device), attack)
    return measured, missing


def _means(
    lipschitz: Mapping[tuple[str, int], Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for name, _ in lipschitz)
    keys = ("bound", "largest", "mean")
    return {
        name: {k: fmean(v[k] for (n, _), v in lipschitz.items() if n == name) for k in keys}
        for name in names
    }


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 whichever way the expectations turn out, 2 where nothing can be done."""
    return run_analysis("paper_robustwrn", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
