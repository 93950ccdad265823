"""The paper's claims, measures and figures: ``python -m paper_cifs.analysis``.

F1 shows what each channel of the penultimate feature does on natural and on adversarial images,
beside its relevance to the class; F2 how robust each class is and whether its channels are aligned;
F4 what the masks of CIFS change.
"""

import re
import sys
from typing import Any

from matplotlib.figure import Figure

from common.analysis.claims import BySeed, Claim, by_seed, combined, judge, minus
from common.analysis.report import Analysis, Found
from paper_cifs.figures import MODELS, figure_f1, figure_f2, figure_f4, shown_classes
from paper_cifs.measures import Measurement, measure

NETWORKS = {"digits": "resnet", "fashion_mnist": "resnet10"}  # what a data set alone stands for
USUAL_NETWORK = "resnet18"
EPS: dict[str, float | str] = {"digits": 0.2}
USUAL_EPS = "8/255"
ON_F, WORST = "pgd20/ce_f", "pgd20"

METRICS = {
    "plain": (ON_F, WORST),
    "cifs": (ON_F, WORST),
    "aux": (ON_F, WORST),
    "cas": (ON_F, "pgd20/ce_p1"),
}
"""What the result files are needed of, and which of their metrics."""


def experiment_of(on: str) -> tuple[str, str]:
    """Data set and network, with which stems begin, of a data set, such a pair or a whole stem."""
    found = re.match(r"(.+?)_((?:resnet|wrn)\d*(?:_\d+)?)(?:_|$)", on)
    return (found[1], found[2]) if found else (on, NETWORKS.get(on, USUAL_NETWORK))


def scope(on: str) -> tuple[str, str]:
    """With what stems begin, and the prefix of the methods."""
    base = "_".join(experiment_of(on))
    return base, f"{base}_"


def measure_runs(found: Found) -> None:
    """Measures the channels of every checkpoint there is."""
    measurements: dict[tuple[str, int], Measurement] = {}
    channels: dict[str, dict[str, Any]] = {}
    dataset = next((name for name in EPS if found.prefix.startswith(f"{name}_")), "")
    summaries = {}
    for (method, seed), (model, data) in found.load_runs(list(MODELS)).items():
        if images := found.test_split(data):
            one = measure(model, *images, data.num_classes, EPS.get(dataset, USUAL_EPS))
            measurements[method, seed], summaries[method, seed] = one, one.summary()
            entry = channels.setdefault(f"{found.prefix}{method}", {})
            entry[f"seed{seed}"] = summaries[method, seed]
            found.kept["class_names"] = tuple(data.class_names)
    found.kept |= {"measurements": measurements, "summaries": summaries}
    found.measured["channels"] = channels


def claims(found: Found) -> list[Claim]:
    """The five claims of the small-scale run."""
    summaries = found.kept["summaries"]
    seeds = found.seeds

    def channels(method: str, number: str, feature: str = "penultimate") -> BySeed:
        return by_seed(summaries, method, "features", feature, number)

    after_at, after_natural = channels("plain", "cosine"), channels("plain_natural", "cosine")
    excess, excess_natural = (
        channels(method, "over_activation") for method in ("plain", "plain_natural")
    )
    share = "negative_share_adversarial"
    before = channels("cifs", share, "module2_unmasked_by_class")
    after = channels("cifs", share, "module2_masked_by_class")
    return [
        judge(
            "a",
            "PGD-20 on f: accuracy of CIFS minus that of the plain network is positive, in points. "
            "Beside it: the same with each network's worst loss, and aux, which has the probes and "
            "the joint loss but no mask: a gain it shares is not the mask's",
            found.gain("cifs", "plain", ON_F),
            seeds,
            above=0.0,
            beside={
                f"{first} - {second}, {title}": found.gain(first, second, metric)
                for first, second in (("cifs", "plain"), ("aux", "plain"), ("cifs", "aux"))
                for metric, title in ((ON_F, "on f"), (WORST, "worst loss"))
            },
        ),
        judge(
            "b",
            "cosine(a_nat, a_adv), mean over classes: above 0.9 after adversarial training and "
            "below 0.9 after natural training; the smaller of the two margins is positive",
            combined(after_at, after_natural, lambda at, natural: min(at - 0.9, 0.9 - natural)),
            seeds,
            above=0.0,
            beside={"adversarial training": after_at, "natural training": after_natural},
        ),
        judge(
            "c",
            "over-activation of the quarter of lowest relevance, mean over classes: natural minus "
            "adversarial training is positive",
            minus(excess_natural, excess),
            seeds,
            above=0.0,
            beside={"natural training": excess_natural, "adversarial training": excess},
        ),
        judge(
            "d",
            "CAS under PGD-20: accuracy when f alone is attacked minus that when a probe is (the "
            "worse one) is above 15 points",
            minus(found.of("cas", ON_F), through_probes(found), 100.0),
            seeds,
            above=15.0,
        ),
        judge(
            "e",
            "adversarial images: the share of activation on channels of negative relevance to the "
            "class (second probe) falls by more than a third across the mask of CIFS module 2",
            combined(before, after, lambda unmasked, masked: 1 - masked / unmasked),
            seeds,
            above=1 / 3,
            beside={"share before the mask": before, "share after the mask": after},
        ),
    ]


def through_probes(found: Found) -> BySeed:
    """Accuracy of CAS when the worse of its probes is attacked, by seed."""
    lowest: BySeed = {}
    for (method, seed), numbers in found.metrics.items():
        attacks = [value for name, value in numbers.items() if name.startswith("pgd20/ce_p")]
        if method == "cas" and attacks:
            lowest[seed] = min(attacks)
    return lowest


def figures(found: Found) -> dict[str, Figure | None]:
    """F1, F2 and F4 as far as checkpoints allow; F1 and F4 show the first complete seed."""
    of: dict[str, dict[int, Measurement]] = {method: {} for method in MODELS}
    for (method, seed), one in found.kept["measurements"].items():
        of[method][seed] = one
    natural, plain, cifs = of["plain_natural"], of["plain"], of["cifs"]
    names = found.kept.get("class_names", ())
    dataset = found.prefix.partition("_")[0]
    pictures: dict[str, Figure | None] = {}
    for seed in [*(s for s in plain if s in natural), *plain, *natural][:1]:
        sides = (("plain_natural", natural), ("plain", plain))
        models = {name: side[seed] for name, side in sides if seed in side}
        robust = plain.get(seed, next(iter(models.values()))).robust
        pictures["f1_channels"] = figure_f1(models, shown_classes(dataset, robust, names), names)
    if plain:
        pictures["f2_classes"] = figure_f2(list(plain.values()), names)
    for seed in [*(s for s in cifs if s in plain), *cifs][:1]:
        # The classes of F1, so that the two can be compared.
        classes = shown_classes(dataset, plain.get(seed, cifs[seed]).robust, names)
        pictures["f4_masks"] = figure_f4(cifs[seed], classes, names)
    return pictures


ANALYSIS = Analysis(
    package="paper_cifs",
    claims=claims,
    measure=measure_runs,
    figures=figures,
    scope=scope,
    baseline="plain",
    accuracy=WORST,
    accuracy_label="PGD-20 accuracy, worst loss",
    compared=lambda method: not method.endswith("_natural"),
    needed=METRICS,
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
