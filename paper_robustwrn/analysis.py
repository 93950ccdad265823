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
from typing import Any

from matplotlib.figure import Figure

from common.analysis.claims import BySeed, Claim, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.attacks.pgd import PGD
from common.networks.wide_resnet import WideResNet
from paper_robustwrn.figures import METRIC, lipschitz_figure, networks_of, scatter, stage_curves
from paper_robustwrn.measures import lipschitz_of

PLACES = {
    "digits_": {"early": "d3-1-1", "late": "d1-1-3"},
    "fashion_small_": {"early": "d4-1-1", "even": "d2-2-2", "late": "d1-1-4"},
}
"""Networks that differ in where their blocks are, by what stems begin with."""


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
    """What the small networks are held against.

    On the digits directions with the margins of the trial runs, and the bound; on all small images
    the paper's directions.
    """
    places = PLACES.get(found.prefix)
    if places is None:
        return []
    early, late, of = f"{places['early']}_sat", f"{places['late']}_sat", found.of

    def verdict(id: str, text: str, values: BySeed, **limits: Any) -> Claim:
        return judge(id, text, values, found.seeds, **limits)

    def ahead(id: str, base: str, what: str) -> Claim:
        beside = {"in clean accuracy": found.gain(early, f"{places[base]}_sat", "clean_acc")}
        return verdict(
            id,
            f"the paper's direction: PGD-20 of the early-heavy network minus that of the {what}, "
            "in points, is positive",
            found.gain(early, f"{places[base]}_sat", METRIC), above=0.0, beside=beside,
        )  # fmt: skip

    directions = [
        verdict(
            "e",
            "the paper's direction: the local Lipschitz constant of the early-heavy network minus "
            "that of the late-heavy one is negative",
            minus(of(early, "lipschitz"), of(late, "lipschitz")), below=0.0,
            beside={name: of(f"{name}_sat", "lipschitz") for name in places.values()},
        ),
        verdict(
            "f",
            "the paper's direction: stability of the early-heavy network minus that of the "
            "late-heavy one, in points, is positive",
            found.gain(early, late, "stability"), above=0.0,
        ),
        ahead("g", "late", "late-heavy one"),
        *([ahead("h", "even", "even one")] if "even" in places else []),
    ]  # fmt: skip
    if not found.is_digits:
        return directions
    lower = combined(of(early, "clean_acc"), of(late, "clean_acc"), min)
    first, last = (of(f"{name}_natural", METRIC) for name in places.values())
    natural = combined(first, last, max)
    share: BySeed = {}
    for (_, seed), numbers in found.kept["lipschitz"].items():
        share[seed] = max(share.get(seed, 0.0), numbers["largest"] / numbers["bound"])
    return [
        verdict(
            "a",
            "PGD-20: blocks in the first stage against blocks in the last, 2.6 times the "
            "parameters and equal MACs; the difference in points is above -3",
            found.gain(early, late, METRIC), above=-3.0,
            beside={f"parameters {n}": of(f"{n}_sat", "parameters") for n in places.values()},
        ),
        verdict(
            "b",
            "clean accuracy of both, the lower one, is above 97 %",
            {seed: 100 * value for seed, value in lower.items()}, above=97.0,
        ),
        verdict(
            "c",
            "PGD-20 after natural training of the same networks, the higher one, is below 20 %",
            {seed: 100 * value for seed, value in natural.items()}, below=20.0,
        ),
        verdict(
            "d",
            "no measured l2 ratio exceeds the upper bound: the largest share of the bound that "
            "any image of any network reaches is at most 1",
            share, below=1.0, every=True,
        ),
        *directions,
    ]  # fmt: skip


def figures(found: Found) -> dict[str, Figure | None]:
    """Scatter plots, stage-wise curves, and the Lipschitz bound."""
    networks = networks_of(found.results, found.prefix)
    trained = [one for one in networks if not one.name.endswith("natural")] or networks
    trained = [replace(one, name=found.label(one.name)) for one in trained]
    dataset = found.prefix.rstrip("_")
    measured: dict[str, list[Mapping[str, float]]] = {}
    for (name, _), numbers in found.kept["lipschitz"].items():
        measured.setdefault(found.label(name), []).append(numbers)
    sizes = ("parameters", "macs")
    return {
        **{size: scatter(trained, size, dataset) if trained else None for size in sizes},
        "stage_widths": stage_curves(networks, "w"),
        "stage_depths": stage_curves(networks, "d"),
        "lipschitz": lipschitz_figure(measured) if measured else None,
    }


ANALYSIS = Analysis(
    package="paper_robustwrn",
    claims=claims,
    measure=measure,
    figures=figures,
    accuracy=METRIC,
    accuracy_label="PGD-20 accuracy",
    compared=lambda method: not method.endswith("_natural"),
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
