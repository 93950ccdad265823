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
from typing import Any

from matplotlib.figure import Figure

from common.analysis.claims import BySeed, Claim, by_seed, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.attacks.pgd import PGD
from paper_rcm.costs import CONFIGS, draw, measure_costs
from paper_rcm.figures import (
    AR,
    BUDGET,
    accuracy_figure,
    budget_figure,
    features_figure,
    map_name,
    movement_figure,
    network_of,
    simulation_figure,
)
from paper_rcm.measures import attacked, embed, pooled_features, separation
from paper_rcm.theory import simulation

SIDES = (4, 8, 16, 32, 64)
STRIDES = (1, 2, 4, 8)
COMPARED = {
    "digits": ("222_avg", "122_avg"),
    "fashion_small": ("222_avg", "122_avg"),
    "cifar10": ("resnet18_1222_at", "resnet18_1122_at"),
}
"""Networks whose features are set side by side (E8)."""

EPS: dict[str, float | str] = {"digits": 0.15, "fashion_small": 0.1}  # else 8/255

SIDES_OF_IMAGES = {"digits": 8, "fashion_small": 28, "tiny": 64}  # else 32

DIGITS_BATCH = 50
"""Of the steps that are timed on the digits: that of their recipe."""

EXAMPLES = 2000
"""Images whose features are embedded."""


def dataset_of(found: Found) -> str:
    """The data set as stems name it."""
    return found.prefix.rstrip("_")


def image_side(found: Found) -> int:
    """Of the images of the data set, in pixels."""
    return SIDES_OF_IMAGES.get(dataset_of(found), 32)


def measure(found: Found) -> None:
    """The simulation, costs on the digits, and how far classes are apart in the networks compared.

    Pictures of the embedded features are of the first seed.
    """
    dataset = dataset_of(found)
    compared = COMPARED.get(dataset, ())
    embeddings: dict[str, dict[str, Any]] = {}
    separated: dict[tuple[str, int], dict[str, float]] = {}
    attack = PGD(eps=EPS.get(dataset, "8/255"), step_size="eps/4", steps=20)
    for (name, seed), (model, data) in found.load_runs(compared).items():
        if (images := found.test_split(data)) is None:
            continue
        x, y = (part[:EXAMPLES] for part in images)
        clean = pooled_features(model, x)
        kinds = {"clean": clean, "PGD-20": pooled_features(model, attacked(model, x, y, attack))}
        apart = separated[name, seed] = {
            f"{number} {kind}": value
            for kind, features in kinds.items()
            for number, value in separation(features, y, clean).items()
        }
        if seed == min(found.seeds):
            embeddings[name] = {
                f"{found.label(name)}, {kind}: {apart[f'silhouette {kind}']:.2f}": (
                    embed(features),
                    y.cpu(),
                )
                for kind, features in kinds.items()
            }
    found.kept |= {"separated": separated, "embeddings": embeddings}
    found.measured["features"] = {
        f"{name}, seed {seed}": numbers for (name, seed), numbers in separated.items()
    }
    if found.metrics:
        found.measured["simulation"] = simulation(SIDES, STRIDES)
    if found.metrics and found.is_digits:
        measure_digits({result["experiment"] for result in found.results}, found.folder)


def measure_digits(stems: set[str], results: Path) -> None:
    """Costs of the networks that were trained; on the digits they take seconds."""
    configs = [path for path in sorted(CONFIGS.glob("digits*.yaml")) if path.stem in stems]
    measure_costs(configs, results, DIGITS_BATCH)


def claims(found: Found) -> list[Claim]:
    """R1 to R7, E6, E8 and E14, as far as the small networks can judge them.

    The simulation is of no data set and is judged with the digits, as are claims about networks
    that only the digits have.
    """
    digits = {"R1", "R2", "R5", "R7", "E6", "E14"}
    small = ("digits", "fashion_small")
    if dataset_of(found) not in small or "simulation" not in found.measured:
        return []
    side = map_name("122_avg", image_side(found))
    beforehand = (
        "; not expected on 8x8 images, where the image is the bottleneck" if found.is_digits else ""
    )

    def verdict(id: str, text: str, values: BySeed, **limits: Any) -> Claim:
        return judge(id, text, values, found.seeds, **limits)

    def grown(pool: str) -> BySeed:  # the simulation does not depend on the seed of a run
        line = list(found.measured["simulation"]["side"][pool].values())
        return dict.fromkeys(found.seeds, line[-1] / line[0])

    def gain(id: str, text: str, larger: str, base: str, **limits: float) -> Claim:
        beside = {"gain in NA": found.gain(larger, base, "clean_acc")}
        return verdict(id, text, found.gain(larger, base, AR), beside=beside, **limits)

    def moved(pool: str) -> BySeed:
        larger, base = (found.of(f"{s}_{pool}", "pooled_change_noise") for s in ("112", "122"))
        return combined(larger, base, lambda a, b: a / b)

    def wider(key: str) -> BySeed:
        apart = found.kept["separated"]
        return minus(by_seed(apart, "122_avg", key), by_seed(apart, "222_avg", key))

    judged = [
        verdict(
            "R1",
            "simulation, average pooling: movement at the largest side over that at the smallest "
            "is below 1",
            grown("avg"), below=1.0, every=True,
        ),
        verdict(
            "R2", "the same with max pooling is not below 1", grown("max"), above=1.0, every=True
        ),
        gain(
            "R3",
            "smaller strides, 122 against 222: AR not worse by 1 point or more",
            "122_avg", "222_avg", above=-1.0,
        ),
        gain("R4", "up-sampling by 2, 222: AR improves", "222_m2_avg", "222_avg", above=0.0),
        gain(
            "R5",
            "saturation: from 122 to 112 AR gains less than a point",
            "112_avg", "122_avg", below=1.0,
        ),
        gain(
            "R6",
            f"equal map of {side}: strides (122) better than up-sampling (222, m = 2){beforehand}",
            "122_avg", "222_m2_avg", above=0.0,
        ),
        gain(
            "R7",
            "max pooling: from 122 to 112 AR gains less than a point",
            "112_max", "122_max", below=1.0,
        ),
        verdict(
            "E6",
            "trained networks, average pooling: movement under noise at a 4x4 map over that at 2x2 "
            "is below 1",
            moved("avg"), below=1.0, beside={"the same with max pooling": moved("max")},
        ),
        verdict(
            "E8",
            "pooled features under PGD-20: silhouette of the classes with 122 minus that with 222 "
            "is positive",
            wider("silhouette PGD-20"), above=0.0,
            beside={
                "the same, clean": wider("silhouette clean"),
                "nearest class mean, PGD-20, difference": wider("class mean PGD-20"),
                "nearest class mean, clean, difference": wider("class mean clean"),
            },
        ),
        verdict(
            "E14",
            "masking: at radius 1 PGD-20 leaves nothing of any network",
            left_at_one(found), below=0.0, every=True,
        ),
    ]  # fmt: skip
    return [one for one in judged if found.is_digits or one.id not in digits]


def left_at_one(found: Found) -> BySeed:
    """The best network's accuracy at radius 1, for the seeds in which all were attacked so."""
    key, left = f"{BUDGET}1", {}
    for seed in {seed for _, seed in found.metrics}:
        every = [numbers.get(key) for (_, s), numbers in found.metrics.items() if s == seed]
        if None not in every:
            left[seed] = max(value for value in every if value is not None)
    return left


def figures(found: Found) -> dict[str, Figure | None]:
    """Simulation, accuracies, movement, costs, features and the budget."""
    image = image_side(found)
    maps = {key: value for key, value in found.metrics.items() if network_of(key[0])[0]}
    simulated = found.measured.get("simulation")
    embeddings = found.kept["embeddings"]
    return {
        "simulation": simulation_figure(simulated) if simulated else None,
        "accuracies": accuracy_figure(maps, image, found.label) if maps else None,
        "movement": movement_figure(maps, image),
        "cost": draw(found.folder, dataset_of(found)),
        "features": features_figure(embeddings) if embeddings else None,
        "budget": budget_figure({(found.label(m), s): v for (m, s), v in found.metrics.items()}),
    }


ANALYSIS = Analysis(
    package="paper_rcm",
    claims=claims,
    measure=measure,
    figures=figures,
    accuracy=AR,
    accuracy_label="PGD-20 accuracy",
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
