"""The paper's figures and claims, from what has finished: ``python -m paper_rcm.analysis``.

- E1: the simulation next to the theorem, pooled features of a random convolution under noise.
- E4: what the networks cost (measured on the digits; ``python -m paper_rcm costs`` for others).
- E5: natural, consistency and robust accuracy of every network by the side of its last map.
- E6: how far pooled features of trained networks move, average against max pooling.
- E8: how well pooled features separate the classes.
- E12: a two-sample t-test over seeds, larger map against base; in full under the tables.
- E14: robust accuracy against the radius.

The verdicts of the scaled-down run go to ``analysis.json``. Tags as in ``method.py``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.analysis.report import (
    BySeed,
    Expectation,
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
from common.errors import ConfigurationError
from common.evaluation.drawing import save_figure
from common.files import write_sealed_json
from common.results.bases import comparable, last_of
from common.results.reference import select
from common.results.statistics import welch_t_test
from common.results.store import load_results, read_costs
from paper_rcm.costs import measure_costs
from paper_rcm.figures import (
    AR,
    BUDGET,
    accuracy_figure,
    budget_figure,
    cost_figure,
    features_figure,
    movement_figure,
    network_of,
    simulation_figure,
)
from paper_rcm.measures import Embedding, attacked, embed, pooled_features, separation
from paper_rcm.theory import Movement, simulate

SIDES = (4, 8, 16, 32, 64)
STRIDES = (1, 2, 4, 8)
COMPARED = {"digits": ("222_avg", "122_avg"), "cifar10": ("resnet18_1222_at", "resnet18_1122_at")}
"""Networks whose features are set side by side (E8)."""

DIGITS_BATCH = 50
"""Of the steps that are timed on the digits: that of their recipe."""

EXAMPLES = 2000
"""Images whose features are embedded."""


# ------------------------------------------------------------------------------------ what is drawn


def simulation() -> dict[str, dict[str, dict[int, float]]]:
    """Movement of pooled features by side and by stride, and its closed form (E1, [choice])."""
    found: dict[str, dict[str, dict[int, float]]] = {"side": {}, "stride": {}}
    by_side = {side: simulate(side) for side in SIDES}
    by_stride = {stride: simulate(32, stride) for stride in STRIDES}
    for axis, movements in (("side", by_side), ("stride", by_stride)):
        for pool in Movement._fields:
            found[axis][pool] = {at: getattr(m, pool) for at, m in movements.items()}
    return found


def features(
    runs: Path, dataset: str, seeds: Sequence[int], device: str
) -> tuple[dict[tuple[str, int], dict[str, float]], Figure | None, list[str]]:
    """Separation of the classes in the networks compared, and the picture of the first seed.

    Args:
        runs: Where the paper's runs are.
        dataset: With what the stems begin.
        seeds: Which.
        device: Where networks run.

    Returns:
        Numbers by (network, seed), the picture, and what is missing, in words.
    """
    names = COMPARED.get(dataset, ())
    loaded, missing = load_runs(runs, names, dataset, seeds, load_last)
    found: dict[tuple[str, int], dict[str, float]] = {}
    embeddings: dict[str, dict[str, Embedding]] = {}
    eps = "0.15" if dataset == "digits" else "8/255"
    attack = PGD(eps=eps, step_size="eps/4", steps=20)
    for (name, seed), (model, data) in loaded.items():
        model.to(device)
        x, y = (part[:EXAMPLES].to(device) for part in load_test_split(data))
        clean = pooled_features(model, x)
        kinds = {"clean": clean, "PGD-20": pooled_features(model, attacked(model, x, y, attack))}
        numbers: dict[str, float] = {}
        for kind, values in kinds.items():
            found_of = separation(values, y, clean)
            numbers[f"silhouette {kind}"] = found_of.silhouette
            numbers[f"class mean {kind}"] = found_of.class_mean_acc
        found[name, seed] = numbers
        if seed == min(seeds):
            embeddings[name] = {kind: embed(values, y) for kind, values in kinds.items()}
    return found, features_figure(embeddings) if embeddings else None, missing


# ------------------------------------------------------------------------------- the expectations


def evaluate_expectations(
    metrics: Mapping[tuple[str, int], Mapping[str, float]],
    simulated: Mapping[str, Mapping[str, Mapping[int, float]]],
    seeds: Sequence[int],
    separated: Mapping[tuple[str, int], Mapping[str, float]] | None = None,
) -> list[Expectation]:
    """The claims R1 to R7 as far as the scaled-down run can judge them.

    Args:
        metrics: (what stands after ``digits_``, seed) -> metrics of its result.
        simulated: As from :func:`simulation`.
        seeds: All that a verdict needs.
        separated: As from :func:`features`.
    """

    def of(name: str, metric: str) -> BySeed:
        return by_seed(metrics, name, metric)

    def gain(larger: str, base: str, metric: str) -> BySeed:
        return combined(of(larger, metric), of(base, metric), lambda a, b: 100 * (a - b))

    def p(larger: str, base: str) -> dict[str, BySeed]:
        value = welch_t_test(list(of(larger, AR).values()), list(of(base, AR).values()))
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
    apart = separated or {}

    def wider(key: str) -> BySeed:
        return combined(
            by_seed(apart, "122_avg", key), by_seed(apart, "222_avg", key), lambda a, b: a - b
        )

    e8 = conclude(
        "E8",
        "pooled features under PGD-20: silhouette of the classes with 122 minus that with 222 is "
        "positive",
        wider("silhouette PGD-20"),
        seeds,
        lambda value: value > 0.0,
        0.0,
        {
            "the same, clean": wider("silhouette clean"),
            "nearest class mean, PGD-20, difference": wider("class mean PGD-20"),
            "nearest class mean, clean, difference": wider("class mean clean"),
        },
    )
    largest_radius = {
        seed: max(found[f"{BUDGET}1"] for (_, s), found in metrics.items() if s == seed)
        for seed in {seed for _, seed in metrics}
        if all(f"{BUDGET}1" in found for (_, s), found in metrics.items() if s == seed)
    }
    e14 = conclude(
        "E14",
        "masking: at radius 1 PGD-20 leaves nothing of any network",
        largest_radius,
        seeds,
        lambda value: value == 0.0,
        0.0,
    )
    return [r1, r2, r3, r4, r5, r6, r7, e6, e8, e14]


# ------------------------------------------------------------------------------------ the command


def analyse(
    runs: Path, results: Path, on: str, seeds: Sequence[int], device: str = "cpu"
) -> dict[str, Any]:
    """Draw what can be drawn and judge what can be judged.

    Args:
        runs: Where the paper's runs are, whose checkpoints features are read from.
        results: Where the result files are and the output goes.
        on: With what the stems begin.
        seeds: Which.
        device: Where networks run.

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is no result to work on.
    """
    dataset = on.partition("_")[0]
    found = [
        result
        for result in load_results(results)
        if select([result["experiment"]], on) and result["seed"] in seeds
    ]
    if not found:
        raise ConfigurationError(
            f"nothing to analyse: no result {results}/{on}*-seed*.json for seeds "
            f"{', '.join(map(str, seeds))}; run make reproduce-rcm ON={on}"
        )
    metrics, left_out = comparable(last_of(found, f"{dataset}_"))
    simulated = simulation()
    image = 8 if dataset == "digits" else 32
    if dataset == "digits":
        _measure_digits({result["experiment"] for result in found}, results)
    costs = {
        stem.removeprefix(f"{dataset}_"): cost
        for stem, cost in read_costs(results).items()
        if stem.startswith(f"{dataset}_") and (dataset == "digits" or stem.endswith("_at"))
    }
    separated, embedded, missing = features(runs, dataset, seeds, device)
    maps = {key: value for key, value in metrics.items() if network_of(key[0])[0]}
    drawn = {
        "simulation": simulation_figure(simulated),
        "accuracies": accuracy_figure(maps, image) if maps else None,
        "movement": movement_figure(maps, image),
        "cost": cost_figure({k: v for k, v in costs.items() if "resnet" in k or image == 8}),
        "features": embedded,
        "budget": budget_figure(metrics),
    }
    judged = (
        evaluate_expectations(metrics, simulated, seeds, separated) if dataset == "digits" else []
    )
    report: dict[str, Any] = {
        "on": on,
        "seeds": list(seeds),
        "expectations": [plain_values(asdict(one)) for one in judged],
        "simulation": plain_values(simulated),
        "features": {
            f"{name}, seed {seed}": plain_values(numbers)
            for (name, seed), numbers in separated.items()
        },
        "missing": missing + left_out,
    }
    path = results / ("analysis.json" if dataset == "digits" else f"analysis_{on}.json")
    write_sealed_json(path, report)
    prefix = "digits" if dataset == "digits" else on
    figures = [
        save_figure(figure, results / "figures" / f"{prefix}_{name}.png")
        for name, figure in drawn.items()
        if figure is not None
    ]
    return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}


def _measure_digits(stems: set[str], results: Path) -> None:
    """Costs of the networks that were trained; on the digits they take seconds."""
    configs = sorted((Path(__file__).parent / "configs").glob("digits*.yaml"))
    wanted = [path for path in configs if path.stem in stems]
    measure_costs(wanted, results, DIGITS_BATCH)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 whichever way the expectations turn out, 2 where nothing can be done."""
    return run_analysis("paper_rcm", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
