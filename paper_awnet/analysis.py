"""The paper's claims, measures and figures: ``python -m paper_awnet.analysis``.

C1 and figure F1 compare filters of a standard and a robust network, C2 and C6 AW-Net and its parts
with the static network, C5 the same under adaptive attacks. Tags as in ``method.py``.
"""

import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import BySeed, Claim, by_seed, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.data.subset import subset
from common.errors import ConfigurationError
from common.results.bases import comparable, last_of
from common.results.outcomes import derived, is_audit
from common.results.schema import CheckpointResult
from paper_awnet import figures as pictures
from paper_awnet.measures import JOINT, compare_weights, curves_of, examine, filters, smoothness

IMAGES = 350
"""Number of test images that are attacked here, of all classes in proportion."""

SMALL = {"digits": 0.3, "fashion_small": 0.1}
"""Radius of the attacks on small networks, by what their stems begin with."""


class Roles(NamedTuple):
    """Which experiments play which part, by what stands after the common beginning."""

    base: str
    standard: str
    robust: str
    static: str
    full: str
    pgd: str
    eps: float


def small_of(on: str) -> str:
    """What stems of small networks begin with; empty for other networks."""
    return next((base for base in SMALL if on.startswith(base)), "")


def roles_of(on: str) -> Roles:
    """Of small networks the two teachers are compared, else ST and TRADES of one backbone."""
    if base := small_of(on):
        names = ("teacher_clean", "teacher_robust", "static_mtard", "awnet_mtard")
        return Roles(base, *names, "pgd20/ce_f", SMALL[base])
    return Roles(on, "st", "trades", "mtard", "awnet_mtard", "pgd_trades/ce_f", 8 / 255)


def w_robust(metrics: Mapping[str, float], attack: str, w: float = 0.5) -> float:
    """Weighted robust accuracy, w A_nat + (1 - w) A_adv [M][S], both of the attack's examples."""
    if not 0.0 <= w <= 1.0:
        raise ConfigurationError(f"w weighs the clean accuracy and lies in [0, 1], got {w}")
    return w * clean_beside(metrics, attack) + (1 - w) * metrics[attack]


def clean_beside(metrics: Mapping[str, float], attack: str) -> float:
    """Clean accuracy on the images of an attack."""
    return metrics.get(f"{attack.partition('/')[0]}_clean", metrics["clean_acc"])


def without_tensors(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what is only drawn."""
    return {
        key: without_tensors(value) if isinstance(value, Mapping) else value
        for key, value in entry.items()
        if not isinstance(value, Tensor)
    }


def without_audit(entry: CheckpointResult) -> CheckpointResult:
    """The same with the suite's attacks alone, which give every network equally many runs."""
    attacks = {name: one for name, one in entry["attacks"].items() if not is_audit(name)}
    return cast(CheckpointResult, entry | {"attacks": attacks} | derived(entry["clean"], attacks))


def measure(found: Found) -> None:
    """Filters, smoothness, and what an AW-Net does with clean and adversarial images."""
    roles = roles_of(found.on)
    examined: dict[int, dict[str, Any]] = {}
    blocks: dict[int, list[dict[str, Any]]] = {}
    smooth: dict[str, dict[int, Mapping[str, Tensor]]] = {}
    weights: dict[str, dict[int, Any]] = {roles.standard: {}, roles.robust: {}}
    loaded = found.load_runs((roles.standard, roles.robust, roles.full))
    images = found.test_split(next(iter(loaded.values()))[1]) if loaded else None
    if images is not None:
        rows = subset(images[1], IMAGES)
        x, y = images[0][rows], images[1][rows]
        for (name, seed), (model, _) in loaded.items():
            smooth.setdefault(name, {})[seed] = smoothness(model, x, y, roles.eps)
            if name == roles.full:
                examined[seed], blocks[seed] = examine(model, x, y, seed, roles.eps)
            else:
                weights[name][seed] = filters(model.net, x[0])
    compared = compare_weights(weights[roles.standard], weights[roles.robust], found.seeds)
    reach = {
        name: {seed: float(one["reach"].median()) for seed, one in by.items()}
        for name, by in smooth.items()
    }
    found.kept |= {"compared": compared, "examined": examined, "smooth": smooth}
    found.kept |= {"weights": weights, "blocks": blocks, "reach": reach}
    entries = last_of(found.results, found.prefix).items()
    found.kept["suite"], _ = comparable({key: without_audit(entry) for key, entry in entries})
    found.measured |= {
        "weights": compared,
        "router": {seed: without_tensors(entry) for seed, entry in examined.items()},
        "reach": {f"{name} seed {s}": v for name, by in reach.items() for s, v in by.items()},
    }


def claims(found: Found) -> list[Claim]:
    """C1, C2, C5, C6, F4 and two of the follow-up, as far as the small networks can judge them.

    Layers are counted on the digits, and only there are all parts trained.
    """
    if not small_of(found.on):
        return []
    every = [*accuracy_claims(found), *router_claims(found), *network_claims(found)]
    digits = {"C1a", "C1b", "C6b", "C6c"}
    return [one for one in every if found.is_digits or one.id not in digits]


def accuracy_claims(found: Found) -> list[Claim]:
    """C2, C5 and C6: AW-Net and its parts against the static network, in points."""
    roles = roles_of(found.on)

    def gain(name: str, attack: str) -> BySeed:
        weighted = {
            key: {"w": w_robust(numbers, attack)}
            for key, numbers in found.metrics.items()
            if attack in numbers and "clean_acc" in numbers
        }
        return minus(by_seed(weighted, name, "w"), by_seed(weighted, roles.static, "w"), 100.0)

    parts = {
        "C2": (roles.full, "AW-Net"),
        "C6a": ("mixbn_mtard", "MixBN alone"),
        "C6b": ("dynamic_mtard", "dynamic filters alone"),
        "C6c": ("detector_mtard", "the detector of versions 1 and 2"),
    }
    text = "against the static network, both MTARD: W-Robust (PGD-20) more than 2 points higher"
    verdicts = []
    for id, (name, what) in parts.items():
        beside = {"in the worst case": gain(name, "worst")}
        values = gain(name, roles.pgd)
        verdicts.append(judge(id, f"{what} {text}", values, found.seeds, above=2.0, beside=beside))
    text = (
        "AW-Net against the static network in the worst case over adaptive attacks and equal "
        "numbers of restarts: robust accuracy higher"
    )
    full, static = (
        by_seed(found.kept["suite"], one, "worst") for one in (roles.full, roles.static)
    )
    return [*verdicts, judge("C5", text, minus(full, static, 100.0), found.seeds, above=0.0)]


def router_claims(found: Found) -> list[Claim]:
    """F4: the router's types, and both forced types."""
    claim = partial(judge, seeds=found.seeds)
    examined = {("", seed): entry for seed, entry in found.kept["examined"].items()}

    def points(*keys: str) -> BySeed:
        return {seed: 100 * value for seed, value in by_seed(examined, "", *keys).items()}

    def types(name: str) -> BySeed:
        return points("routing", name, "type_acc")

    return [
        claim(
            "F4a",
            "the router finds the type of clean and of PGD images: accuracy of the worse above 95",
            combined(types("clean"), types("pgd"), min),
            above=95.0,
            beside={name: types(name) for name in JOINT},
        ),
        claim(
            "F4b",
            "P_type forced to clean: accuracy on PGD images of the deployed network below 10",
            points("forced", "pgd", "clean"),
            below=10.0,
            beside={
                "clean accuracy": points("forced", "clean", "clean"),
                "attacked by itself": points("forced", "pgd_clean", "clean"),
            },
        ),
        claim(
            "F4c",
            "P_type forced to adversarial: clean accuracy lost, in points, is above 2",
            minus(points("forced", "clean", "soft"), points("forced", "clean", "adv")),
            above=2.0,
            beside={
                "PGD accuracy": points("forced", "pgd", "adv"),
                "attacked by itself": points("forced", "pgd_adv", "adv"),
                "PGD accuracy, soft": points("forced", "pgd", "soft"),
            },
        ),
        claim(
            "2.8",
            "signals hardly move beside two batch-norms: shift between types below 0.05",
            by_seed(examined, "", "omega_shift"),
            below=0.05,
            beside={"std over images": by_seed(examined, "", "omega_std")},
        ),
    ]


def network_claims(found: Found) -> list[Claim]:
    """C1 and 7.5: filters of, and distances to the boundary of, the two teachers."""
    roles, claim = roles_of(found.on), partial(judge, seeds=found.seeds)
    compared = {("", seed): entry for seed, entry in found.kept["compared"].items()}
    standard, robust = (found.kept["reach"].get(n, {}) for n in (roles.standard, roles.robust))
    return [
        claim(
            "C1a",
            "layers of 9 whose folded weights are further from clean to robust teacher than "
            "between two seeds of the clean one: more than 6",
            by_seed(compared, "", "further"),
            above=6.0,
        ),
        claim(
            "C1b",
            "layers of 9 with smaller filters (l1, folded) in the robust teacher: more than 7",
            by_seed(compared, "", "smaller_l1"),
            above=7.0,
            beside={"layers with larger kurtosis (raw)": by_seed(compared, "", "larger_kurtosis")},
        ),
        claim(
            "7.5",
            "median first-order distance to the boundary: the robust teacher's over the clean "
            "one's is above 1",
            combined(robust, standard, lambda a, b: a / b),
            above=1.0,
            beside={"clean teacher": standard, "robust teacher": robust},
        ),
    ]


def figures(found: Found) -> dict[str, Figure | None]:
    """Weights, signals, router, training, gradients and the plane of trade-offs."""
    roles, kept = roles_of(found.on), found.kept
    drawn: dict[str, Figure | None] = {}
    for seed in sorted(kept["examined"])[:1]:
        run = found.runs / f"{found.prefix}{roles.full}" / f"seed{seed}"
        drawn["router"] = pictures.router_histograms(kept["examined"][seed]["routing"])
        drawn["signals"] = pictures.signal_means(kept["blocks"][seed])
        drawn["training"] = pictures.training_curves(curves_of(run))
    for seed in sorted(kept["compared"])[:1]:
        pair = {n: kept["weights"][getattr(roles, n)][seed] for n in ("standard", "robust")}
        compared = kept["compared"][seed]
        drawn["weights"] = pictures.weight_histograms(pair, list(compared["between"]))
        lines = {"standard / robust": compared["between"]}
        lines["two seeds of standard"] = compared.get("seeds", {})
        by_layer = {
            label: {layer: numbers["wasserstein"] for layer, numbers in line.items()}
            for label, line in lines.items()
        }
        by_layer["AW-Net: clean / adversarial"] = (
            kept["examined"].get(seed, {}).get("effective", {})
        )
        drawn["distances"] = pictures.layer_distances({k: v for k, v in by_layer.items() if v})
    first = min((seed for by in kept["smooth"].values() for seed in by), default=None)
    shown = {name: by[first] for name, by in kept["smooth"].items() if first in by}
    drawn["gradients"] = pictures.gradient_figure(shown)
    drawn["trade_off"] = pictures.trade_off(plane(found, roles))
    return drawn


def plane(found: Found, roles: Roles) -> dict[str, list[dict[str, pictures.Point]]]:
    """Clean accuracy with that under PGD, and with the worst case, of every model and seed.

    Both accuracies of a pair are of the images of the attack.
    """
    attacks = {"pgd": roles.pgd, "worst": "worst"}
    points: dict[str, list[dict[str, pictures.Point]]] = {}
    for (name, _), numbers in sorted(found.metrics.items()):
        if roles.pgd in numbers and not name.startswith("teacher"):
            pairs = {
                kind: (clean_beside(numbers, attack), numbers[attack])
                for kind, attack in attacks.items()
                if attack in numbers
            }
            points.setdefault(found.label(name).removesuffix(", MTARD"), []).append(pairs)
    return points


def scope(on: str) -> tuple[str, str]:
    """What stems begin with: the data set, and the backbone where what is asked for has one."""
    backbone = re.match(r"[a-z0-9]+_(?:resnet|wrn|mobilenetv)\d+(?:_\d+)?(?=_|$)", on)
    base = small_of(on) or (backbone[0] if backbone else on.partition("_")[0])
    return base, f"{base}_"


ANALYSIS = Analysis(
    package="paper_awnet",
    claims=claims,
    measure=measure,
    figures=figures,
    scope=scope,
    accuracy="worst",
    accuracy_label="worst-case accuracy",
    compared=lambda method: method.endswith("_mtard"),
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
