"""The paper's figures and claims, from what has finished: ``python -m paper_rcm.analysis``.

- E1: the simulation next to the theorem, pooled features of a random convolution under noise.
- E4: what the networks cost (measured on the digits; ``python -m paper_rcm costs`` for others).
- E5: natural, consistency and robust accuracy of every network by the side of its last map.
- E6: how far pooled features of trained networks move, average against max pooling.
- E8: how well pooled features separate the classes.
- E14: robust accuracy against the radius.

Tags as in ``method.py``.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from common.analysis.claims import BySeed, Claim, by_seed, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.attacks.pgd import PGD
from common.results.store import read_costs
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


def simulation() -> dict[str, dict[str, dict[int, float]]]:
    """Movement of pooled features by side and by stride, and its closed form (E1, [choice])."""
    found: dict[str, dict[str, dict[int, float]]] = {"side": {}, "stride": {}}
    by_side = {side: simulate(side) for side in SIDES}
    by_stride = {stride: simulate(32, stride) for stride in STRIDES}
    for axis, movements in (("side", by_side), ("stride", by_stride)):
        for pool in Movement._fields:
            found[axis][pool] = {at: getattr(m, pool) for at, m in movements.items()}
    return found


def measure(found: Found) -> None:
    """The simulation, costs on the digits, and how far classes are apart in the networks compared.

    Pictures of the embedded features are of the first seed.
    """
    dataset = found.prefix.rstrip("_")
    separated: dict[str, dict[str, float]] = {}
    embeddings: dict[str, dict[str, Embedding]] = {}
    attack = PGD(eps="0.15" if found.is_digits else "8/255", step_size="eps/4", steps=20)
    by_run: dict[tuple[str, int], dict[str, float]] = {}
    for (name, seed), (model, data) in found.load_runs(COMPARED.get(dataset, ())).items():
        if (images := found.test_split(data)) is None:
            continue
        x, y = (part[:EXAMPLES] for part in images)
        clean = pooled_features(model, x)
        kinds = {"clean": clean, "PGD-20": pooled_features(model, attacked(model, x, y, attack))}
        numbers: dict[str, float] = {}
        for kind, values in kinds.items():
            found_of = separation(values, y, clean)
            numbers[f"silhouette {kind}"] = found_of.silhouette
            numbers[f"class mean {kind}"] = found_of.class_mean_acc
        by_run[name, seed] = numbers
        separated[f"{name}, seed {seed}"] = numbers
        if seed == min(found.seeds):
            embeddings[name] = {kind: embed(values, y) for kind, values in kinds.items()}
    found.kept |= {"separated": by_run, "embeddings": embeddings}
    found.measured["features"] = separated
    if found.metrics:
        found.measured["simulation"] = simulation()
    if found.metrics and found.is_digits:
        measure_digits({result["experiment"] for result in found.results}, found.folder)


def measure_digits(stems: set[str], results: Path) -> None:
    """Costs of the networks that were trained; on the digits they take seconds."""
    configs = sorted((Path(__file__).parent / "configs").glob("digits*.yaml"))
    measure_costs([path for path in configs if path.stem in stems], results, DIGITS_BATCH)


def claims(found: Found) -> list[Claim]:
    """R1 to R7, E6, E8 and E14, as far as the scaled-down run can judge them."""
    if not found.is_digits or "simulation" not in found.measured:
        return []
    return [*simulated_claims(found), *accuracy_claims(found), *feature_claims(found)]


def simulated_claims(found: Found) -> list[Claim]:
    """R1 and R2; the simulation does not depend on the seed of a run."""

    def ratio(pool: str) -> BySeed:
        line = list(found.measured["simulation"]["side"][pool].values())
        return dict.fromkeys(found.seeds, line[-1] / line[0])

    return [
        judge(
            "R1",
            "simulation, average pooling: movement at the largest side over that at the smallest "
            "is below 1",
            ratio("avg"),
            found.seeds,
            below=1.0,
            every=True,
        ),
        judge(
            "R2", "the same with max pooling is not below 1", ratio("max"), found.seeds,
            above=1.0, every=True,
        ),
    ]  # fmt: skip


def accuracy_claims(found: Found) -> list[Claim]:
    """R3 to R7: robust accuracy (AR) of two networks, in points."""

    def gain(
        id: str, text: str, larger: str, base: str, above: float | None, below: float | None = None
    ) -> Claim:
        beside = {"gain in NA": found.gain(larger, base, "clean_acc")}
        values = found.gain(larger, base, AR)
        return judge(id, text, values, found.seeds, above=above, below=below, beside=beside)

    return [
        gain(
            "R3",
            "smaller strides, 122 against 222: AR not worse by 1 point or more",
            "122_avg", "222_avg", -1.0,
        ),
        gain("R4", "up-sampling by 2, 222: AR improves", "222_m2_avg", "222_avg", 0.0),
        gain(
            "R5",
            "saturation: from 122 to 112 AR gains less than a point",
            "112_avg", "122_avg", None, 1.0,
        ),
        gain(
            "R6",
            "equal map of 2x2: strides (122) better than up-sampling (222, m = 2); not expected on "
            "8x8 images, where the image is the bottleneck",
            "122_avg", "222_m2_avg", 0.0,
        ),
        gain(
            "R7",
            "max pooling: from 122 to 112 AR gains less than a point",
            "112_max", "122_max", None, 1.0,
        ),
    ]  # fmt: skip


def feature_claims(found: Found) -> list[Claim]:
    """E6, E8 and E14."""

    def moved(pool: str) -> BySeed:
        key = "pooled_change_noise"
        return combined(
            found.of(f"112_{pool}", key), found.of(f"122_{pool}", key), lambda a, b: a / b
        )

    def wider(key: str) -> BySeed:
        apart = found.kept["separated"]
        return minus(by_seed(apart, "122_avg", key), by_seed(apart, "222_avg", key))

    left: BySeed = {}
    for seed in {seed for _, seed in found.metrics}:
        every = [numbers for (_, s), numbers in found.metrics.items() if s == seed]
        if all(f"{BUDGET}1" in numbers for numbers in every):
            left[seed] = max(numbers[f"{BUDGET}1"] for numbers in every)
    return [
        judge(
            "E6",
            "trained networks, average pooling: movement under noise at a 4x4 map over that at 2x2 "
            "is below 1",
            moved("avg"),
            found.seeds,
            below=1.0,
            beside={"the same with max pooling": moved("max")},
        ),
        judge(
            "E8",
            "pooled features under PGD-20: silhouette of the classes with 122 minus that with 222 "
            "is positive",
            wider("silhouette PGD-20"),
            found.seeds,
            above=0.0,
            beside={
                "the same, clean": wider("silhouette clean"),
                "nearest class mean, PGD-20, difference": wider("class mean PGD-20"),
                "nearest class mean, clean, difference": wider("class mean clean"),
            },
        ),
        judge(
            "E14",
            "masking: at radius 1 PGD-20 leaves nothing of any network",
            left,
            found.seeds,
            below=0.0,
            every=True,
        ),
    ]


def figures(found: Found) -> dict[str, Figure | None]:
    """Simulation, accuracies, movement, costs, features and the budget."""
    image = 8 if found.is_digits else 32
    costs = {
        stem.removeprefix(found.prefix): cost
        for stem, cost in read_costs(found.folder).items()
        if stem.startswith(found.prefix) and (found.is_digits or stem.endswith("_at"))
    }
    maps = {key: value for key, value in found.metrics.items() if network_of(key[0])[0]}
    simulated = found.measured.get("simulation")
    embeddings = found.kept["embeddings"]
    return {
        "simulation": simulation_figure(simulated) if simulated else None,
        "accuracies": accuracy_figure(maps, image) if maps else None,
        "movement": movement_figure(maps, image),
        "cost": cost_figure({k: v for k, v in costs.items() if "resnet" in k or image == 8}),
        "features": features_figure(embeddings) if embeddings else None,
        "budget": budget_figure(found.metrics),
    }


ANALYSIS = Analysis(
    package="paper_rcm",
    claims=claims,
    measure=measure,
    figures=figures,
    baseline="222_avg",
    accuracy=AR,
    accuracy_label="PGD-20 accuracy",
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
