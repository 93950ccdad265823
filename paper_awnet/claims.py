"""What a run can say of the paper's claims; tags as in ``method.py``."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.analysis.report import BySeed, Expectation, by_seed, combined, conclude
from common.errors import ConfigurationError

JOINT = ("joint_clean_0.1", "joint_clean_1", "joint_clean_10")
"""Attacks on class and type at once, in which the router is to be misled."""


class Roles(NamedTuple):
    """Which experiments play which part, by what stands after the common beginning."""

    base: str
    standard: str
    robust: str
    static: str
    full: str
    pgd: str
    eps: float


def roles_of(on: str) -> Roles:
    """On the digits the two teachers are compared, elsewhere ST and TRADES of one backbone."""
    if on.partition("_")[0] == "digits":
        names = ("teacher_clean", "teacher_robust", "static_mtard", "awnet_mtard")
        return Roles("digits", *names, "pgd20/ce_f", 0.3)
    return Roles(on, "st", "trades", "mtard", "awnet_mtard", "pgd_trades/ce_f", 8 / 255)


def w_robust(metrics: Mapping[str, float], attack: str, w: float = 0.5) -> float:
    """Weighted robust accuracy, w A_nat + (1 - w) A_adv [M][S], both of the attack's examples.

    Raises:
        ConfigurationError: If w is no weight in [0, 1].
    """
    if not 0.0 <= w <= 1.0:
        raise ConfigurationError(f"w weighs the clean accuracy and lies in [0, 1], got {w}")
    clean = metrics.get(f"{attack.partition('/')[0]}_clean", metrics["clean_acc"])
    return w * clean + (1 - w) * metrics[attack]


def evaluate_expectations(
    metrics: Mapping[tuple[str, int], Mapping[str, float]],
    compared: Mapping[int, Mapping[str, Any]],
    examined: Mapping[int, Mapping[str, Any]],
    reach: Mapping[tuple[str, int], Mapping[str, float]],
    seeds: Sequence[int],
) -> list[Expectation]:
    """What the scaled-down run can say of the claims."""
    roles = roles_of("digits")

    def gain(name: str, attack: str) -> BySeed:
        weighted = {
            key: {"w": w_robust(found, attack)}
            for key, found in metrics.items()
            if attack in found and "clean_acc" in found
        }
        both = by_seed(weighted, name, "w"), by_seed(weighted, roles.static, "w")
        return combined(*both, lambda a, b: 100 * (a - b))

    def count(key: str) -> BySeed:
        return {s: float(entry[key]) for s, entry in compared.items() if key in entry}

    def seen(*keys: str) -> BySeed:
        return by_seed({("", s): entry for s, entry in examined.items()}, "", *keys)

    def points(*keys: str) -> BySeed:
        return {seed: 100 * value for seed, value in seen(*keys).items()}

    verdicts = [
        conclude(
            id,
            f"{what} against the static network, both MTARD: W-Robust (PGD-20) at least 2 points "
            "higher",
            gain(name, roles.pgd),
            seeds,
            lambda value: value >= 2.0,
            2.0,
            {"in the worst case": gain(name, "worst")},
        )
        for id, name, what in (
            ("C2", roles.full, "AW-Net"),
            ("C6a", "mixbn_mtard", "MixBN alone"),
            ("C6b", "dynamic_mtard", "dynamic filters alone"),
            ("C6c", "detector_mtard", "the detector of versions 1 and 2"),
        )
    ]
    verdicts.append(
        conclude(
            "C5",
            "AW-Net against the static network in the worst case over adaptive attacks and as "
            "many restarts: robust accuracy higher",
            combined(
                by_seed(metrics, roles.full, "worst"),
                by_seed(metrics, roles.static, "worst"),
                lambda a, b: 100 * (a - b),
            ),
            seeds,
            lambda value: value > 0.0,
            0.0,
        )
    )
    types = combined(
        points("routing", "clean", "type_acc"), points("routing", "pgd", "type_acc"), min
    )
    verdicts += [
        conclude(
            "F4a",
            "the router finds the type of clean and of PGD images: accuracy of the worse above 95",
            types,
            seeds,
            lambda value: value > 95.0,
            95.0,
            {name: points("routing", name, "type_acc") for name in JOINT},
        ),
        conclude(
            "F4b",
            "P_type forced to clean: accuracy on PGD images of the deployed network below 10",
            points("forced", "pgd", "clean"),
            seeds,
            lambda value: value < 10.0,
            10.0,
            {
                "clean accuracy": points("forced", "clean", "clean"),
                "attacked by itself": points("forced", "pgd_clean", "clean"),
            },
        ),
        conclude(
            "F4c",
            "P_type forced to adversarial: clean accuracy lost, in points, is above 2",
            combined(
                points("forced", "clean", "soft"),
                points("forced", "clean", "adv"),
                lambda a, b: a - b,
            ),
            seeds,
            lambda value: value > 2.0,
            2.0,
            {
                "PGD accuracy": points("forced", "pgd", "adv"),
                "attacked by itself": points("forced", "pgd_adv", "adv"),
                "PGD accuracy, soft": points("forced", "pgd", "soft"),
            },
        ),
        conclude(
            "C1a",
            "layers of 9 whose folded weights are further from clean to robust teacher than "
            "between two seeds of the clean one: at least 6",
            count("further"),
            seeds,
            lambda value: value >= 6.0,
            6.0,
        ),
        conclude(
            "C1b",
            "layers of 9 with smaller filters (l1, folded) in the robust teacher: at least 7",
            count("smaller_l1"),
            seeds,
            lambda value: value >= 7.0,
            7.0,
            {"layers with larger kurtosis (raw)": count("larger_kurtosis")},
        ),
        conclude(
            "7.5",
            "median first-order distance to the boundary: the robust teacher's over the clean "
            "one's is above 1",
            combined(
                by_seed(reach, roles.robust, "reach"),
                by_seed(reach, roles.standard, "reach"),
                lambda a, b: a / b,
            ),
            seeds,
            lambda value: value > 1.0,
            1.0,
            {
                "clean teacher": by_seed(reach, roles.standard, "reach"),
                "robust teacher": by_seed(reach, roles.robust, "reach"),
            },
        ),
        conclude(
            "2.8",
            "signals hardly move beside two batch-norms: shift between types below 0.05",
            seen("omega_shift"),
            seeds,
            lambda value: value < 0.05,
            0.05,
            {"std over images": seen("omega_std")},
        ),
    ]
    return verdicts
