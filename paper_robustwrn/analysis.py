"""The paper's claims, measures and figures: ``python -m paper_robustwrn.analysis``.

- Scatter (X2, X3): a point per network, robust accuracy against parameters and against MACs, since
  equal parameters is not equal compute.
- Stage-wise curves (X4): one stage's width or depth changes, the others stay.
- Lipschitz (X9, X10): measured local constants, and the upper bound of ``measures.py``, which no
  measured l2 ratio may exceed.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import BySeed, Claim, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream
from common.modes import frozen
from common.networks.wide_resnet import WideResNet
from paper_robustwrn.figures import METRIC, lipschitz_figure, networks_of, scatter, stage_curves
from paper_robustwrn.measures import L2Ratio, upper_bound

EARLY, LATE = "d3-1-1", "d1-1-3"


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


def measure(found: Found) -> None:
    """Bound and ratios of every finished run of a wide residual network, on the digits."""
    measured: dict[tuple[str, int], dict[str, float]] = {}
    found.kept["lipschitz"] = measured
    if not found.is_digits:
        return
    names = sorted({r["experiment"].removeprefix(found.prefix) for r in found.results})
    attack = PGD(0.2, "eps/10", 20)
    for key, (model, data) in found.load_runs(names).items():
        if isinstance(model.net, WideResNet) and (images := found.test_split(data)):
            measured[key] = lipschitz_of(model, *images, attack)
    found.measured["lipschitz"] = {
        f"{name}-seed{seed}": numbers for (name, seed), numbers in measured.items()
    }


def claims(found: Found) -> list[Claim]:
    """What the scaled-down run is held against: directions, with the margins of the trial runs."""
    if not found.is_digits:
        return []
    early, late, seeds, of = f"{EARLY}_sat", f"{LATE}_sat", found.seeds, found.of
    lower = combined(of(early, "clean_acc"), of(late, "clean_acc"), min)
    natural = combined(of(f"{EARLY}_natural", METRIC), of(f"{LATE}_natural", METRIC), max)
    share: BySeed = {}
    for (_, seed), numbers in found.kept["lipschitz"].items():
        share[seed] = max(share.get(seed, 0.0), numbers["largest"] / numbers["bound"])
    return [
        judge(
            "a",
            "PGD-20: blocks in the first stage against blocks in the last, 2.6 times the "
            "parameters and equal MACs; the difference in points is above -3",
            found.gain(early, late, METRIC),
            seeds,
            above=-3.0,
            beside={f"parameters {n}": of(f"{n}_sat", "parameters") for n in (EARLY, LATE)},
        ),
        judge(
            "b",
            "clean accuracy of both, the lower one, is above 97 %",
            {seed: 100 * value for seed, value in lower.items()},
            seeds,
            above=97.0,
        ),
        judge(
            "c",
            "PGD-20 after natural training of the same networks, the higher one, is below 20 %",
            {seed: 100 * value for seed, value in natural.items()},
            seeds,
            below=20.0,
        ),
        judge(
            "d",
            "no measured l2 ratio exceeds the upper bound: the largest share of the bound that "
            "any image of any network reaches is at most 1",
            share,
            seeds,
            below=1.0,
            every=True,
        ),
        judge(
            "e",
            "the paper's direction: the local Lipschitz constant of the early-heavy network minus "
            "that of the late-heavy one is negative",
            minus(of(early, "lipschitz"), of(late, "lipschitz")),
            seeds,
            below=0.0,
            beside={EARLY: of(early, "lipschitz"), LATE: of(late, "lipschitz")},
        ),
        judge(
            "f",
            "the paper's direction: stability of the early-heavy network minus that of the "
            "late-heavy one, in points, is positive",
            found.gain(early, late, "stability"),
            seeds,
            above=0.0,
        ),
    ]


def figures(found: Found) -> dict[str, Figure | None]:
    """Scatter plots, stage-wise curves, and the Lipschitz bound."""
    networks = networks_of(found.results)
    trained = [one for one in networks if not one.name.endswith("natural")] or networks
    trained = [replace(one, name=found.label(one.name)) for one in trained]
    dataset = found.prefix.rstrip("_")
    pictures: dict[str, Figure | None] = {
        name: scatter(trained, name, dataset) if trained else None
        for name in ("parameters", "macs")
    }
    pictures |= {
        f"stage_{name}": stage_curves(networks, kind)
        for kind, name in (("w", "widths"), ("d", "depths"))
    }
    measured: Mapping[tuple[str, int], Mapping[str, float]] = found.kept["lipschitz"]
    means = {
        found.label(name): {
            key: fmean(numbers[key] for (n, _), numbers in measured.items() if n == name)
            for key in ("bound", "largest", "mean")
        }
        for name, _ in measured
    }
    pictures["lipschitz"] = lipschitz_figure(means) if means else None
    return pictures


ANALYSIS = Analysis(
    package="paper_robustwrn",
    claims=claims,
    measure=measure,
    figures=figures,
    baseline=f"{LATE}_sat",
    accuracy=METRIC,
    accuracy_label="PGD-20 accuracy",
    compared=lambda method: not method.endswith("_natural"),
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
