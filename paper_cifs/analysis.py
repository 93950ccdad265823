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
from paper_cifs.figures import channel_figure, figure_f2, masked_features, shown_classes
from paper_cifs.measures import Measurement, measure

MODELS = {"plain_natural": "natural training", "plain": "adversarial training", "cifs": "CIFS"}
"""What the checkpoints are needed of, and what the figures call it."""

# Of a data set; else ResNet-18.
NETWORKS = {"digits": "resnet", "fashion_small": "resnet", "fashion_mnist": "resnet10"}
EPS: dict[str, float | str] = {"digits": 0.2, "fashion_small": 0.1}  # else 8/255
ON_F, WORST = "pgd20/ce_f", "worst"


def experiment_of(on: str) -> tuple[str, str]:
    """Data set and network, with which stems begin, of a data set, such a pair or a whole stem."""
    found = re.match(r"(.+?)_((?:resnet|wrn)\d*(?:_\d+)?)(?:_|$)", on)
    return (found[1], found[2]) if found else (on, NETWORKS.get(on, "resnet18"))


def scope(on: str) -> tuple[str, str]:
    """With what stems begin, and the prefix of the methods."""
    base = "_".join(experiment_of(on))
    return base, f"{base}_"


def measure_runs(found: Found) -> None:
    """Measures the channels of every checkpoint there is."""
    measurements: dict[tuple[str, int], Measurement] = {}
    summaries: dict[tuple[str, int], dict[str, Any]] = {}
    channels: dict[str, dict[str, Any]] = {}
    eps = EPS.get(experiment_of(found.on)[0], "8/255")
    for (method, seed), (model, data) in found.load_runs(list(MODELS)).items():
        if images := found.test_split(data):
            one = measurements[method, seed] = measure(model, *images, data.num_classes, eps)
            numbers = summaries[method, seed] = one.summary()
            channels.setdefault(f"{found.prefix}{method}", {})[f"seed{seed}"] = numbers
            found.kept["class_names"] = tuple(data.class_names)
    found.kept |= {"measurements": measurements, "summaries": summaries}
    found.measured["channels"] = channels


def claims(found: Found) -> list[Claim]:
    """The five claims of the small-scale run."""

    def channels(method: str, number: str, feature: str = "penultimate") -> BySeed:
        return by_seed(found.kept["summaries"], method, "features", feature, number)

    at, natural = channels("plain", "cosine"), channels("plain_natural", "cosine")
    excess, excess_natural = (channels(m, "over_activation") for m in ("plain", "plain_natural"))
    before, after = (
        channels("cifs", "negative_share_adversarial", f"module2_{side}_by_class")
        for side in ("unmasked", "masked")
    )
    gains = {
        f"{first} - {second}, {title}": found.gain(first, second, metric)
        for first, second in (("cifs", "plain"), ("aux", "plain"), ("cifs", "aux"))
        for metric, title in ((ON_F, "on f"), (WORST, "worst case"))
    }
    return [
        judge(
            "a",
            "PGD-20 on f: accuracy of CIFS minus that of the plain network is positive, in points. "
            "Beside it: the same in each network's worst case, and aux, which has the probes and "
            "the joint loss but no mask: a gain it shares is not the mask's",
            found.gain("cifs", "plain", ON_F),
            found.seeds,
            above=0.0,
            beside=gains,
        ),
        judge(
            "b",
            "cosine(a_nat, a_adv), mean over classes: above 0.9 after adversarial training and "
            "below 0.9 after natural training; the smaller of the two margins is positive",
            combined(at, natural, lambda high, low: min(high - 0.9, 0.9 - low)),
            found.seeds,
            above=0.0,
            beside={"adversarial training": at, "natural training": natural},
        ),
        judge(
            "c",
            "over-activation of the quarter of lowest relevance, mean over classes: natural minus "
            "adversarial training is positive",
            minus(excess_natural, excess),
            found.seeds,
            above=0.0,
            beside={"natural training": excess_natural, "adversarial training": excess},
        ),
        judge(
            "d",
            "CAS under PGD-20: accuracy when f alone is attacked minus that when a probe is (the "
            "worse one) is above 15 points",
            minus(found.of("cas", ON_F), through_probes(found), 100.0),
            found.seeds,
            above=15.0,
        ),
        judge(
            "e",
            "adversarial images: the share of activation on channels of negative relevance to the "
            "class (second probe) falls by more than a third across the mask of CIFS module 2",
            combined(before, after, lambda unmasked, masked: 1 - masked / unmasked),
            found.seeds,
            above=1 / 3,
            beside={"share before the mask": before, "share after the mask": after},
        ),
    ]


def through_probes(found: Found) -> BySeed:
    """Accuracy of CAS when the worse of its probes is attacked, by seed."""
    lowest: BySeed = {}
    for (method, seed), numbers in found.metrics.items():
        attacks = [v for name, v in numbers.items() if re.match(r"(pgd20|adaptive)/ce_p\d", name)]
        if method == "cas" and attacks:
            lowest[seed] = min(attacks)
    return lowest


def figures(found: Found) -> dict[str, Figure | None]:
    """F1, F2 and F4 as far as checkpoints allow; F1 and F4 show the first complete seed."""
    natural, plain, cifs = (
        {seed: one for (owner, seed), one in found.kept["measurements"].items() if owner == method}
        for method in MODELS
    )
    names, dataset = found.kept.get("class_names", ()), found.prefix.partition("_")[0]
    pictures: dict[str, Figure | None] = {}
    for seed in [*(s for s in plain if s in natural), *plain, *natural][:1]:
        sides = {"plain_natural": natural, "plain": plain}
        models = {name: side[seed] for name, side in sides.items() if seed in side}
        robust = plain.get(seed, next(iter(models.values()))).robust
        columns = {MODELS[name]: one.channels["penultimate"] for name, one in models.items()}
        classes = shown_classes(dataset, robust, names)
        pictures["f1_channels"] = channel_figure(columns, classes, names)
    if plain:
        pictures["f2_classes"] = figure_f2(list(plain.values()), names)
    for seed in [*(s for s in cifs if s in plain), *cifs][:1]:
        # The classes of F1, so that the two can be compared.
        classes = shown_classes(dataset, plain.get(seed, cifs[seed]).robust, names)
        pictures["f4_masks"] = channel_figure(masked_features(cifs[seed]), classes, names)
    return pictures


ANALYSIS = Analysis(
    package="paper_cifs",
    claims=claims,
    measure=measure_runs,
    figures=figures,
    scope=scope,
    accuracy=WORST,
    accuracy_label="worst-case accuracy",
    compared=lambda method: not method.endswith("_natural"),
    needed=dict.fromkeys(("plain", "cifs", "aux"), (ON_F, WORST)) | {"cas": (ON_F,)},
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
