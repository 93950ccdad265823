"""The paper's claims, measures and figures: ``python -m paper_awnet.analysis``.

- C1, figure F1: filter weights of a standard against a robust network, and of two seeds.
- C2, C6: W-Robust of AW-Net and of its parts against the static network with the same loss.
- C5: the same under adaptive attacks.
- Figures F3 to F5 and those of section "gradients": signals, the router, the plane of trade-offs,
  gradient regularisation, and the course of training.

Tags as in ``method.py``.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.claims import BySeed, Claim, by_seed, combined, judge, minus
from common.analysis.report import Analysis, Found
from common.attacks.pgd import PGD
from common.data.subset import subset
from common.errors import ConfigurationError
from paper_awnet import figures as pictures
from paper_awnet.measures import (
    Filters,
    attacked,
    distances,
    filters,
    forced_accuracies,
    mean_scales,
    routing,
    shape_of,
    signal_summary,
    smoothness,
)
from paper_awnet.networks import AWNet

IMAGES = 350
"""Number of test images that are attacked here, of all classes in proportion."""

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


def compare_weights(
    found: Mapping[tuple[str, int], Mapping[str, Filters]], roles: Roles, seeds: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """C1 by seed: standard against robust, and standard against the next seed's standard [D]."""
    compared: dict[int, dict[str, Any]] = {}
    for i, seed in enumerate(seeds):
        one, other = found.get((roles.standard, seed)), found.get((roles.robust, seed))
        if one is None or other is None:
            continue
        between = distances(one, other)
        twin = found.get((roles.standard, seeds[(i + 1) % len(seeds)]))
        entry: dict[str, Any] = {"layers": len(between), "between": between}
        if len(seeds) > 1 and twin is not None:
            entry["seeds"] = distances(one, twin)
            entry["further"] = sum(
                between[n]["wasserstein"] > entry["seeds"][n]["wasserstein"] for n in between
            )
        shapes = {
            n: (shape_of(a), shape_of(b))
            for n in between
            if (a := one[n].folded) is not None and (b := other[n].folded) is not None
        }
        raw = {n: (shape_of(one[n].raw), shape_of(other[n].raw)) for n in between}
        entry["smaller_l1"] = sum(b.l1 < a.l1 for a, b in shapes.values())
        entry["larger_kurtosis"] = sum(b.kurtosis > a.kurtosis for a, b in raw.values())
        entry["shapes"] = {n: [a._asdict(), b._asdict()] for n, (a, b) in shapes.items()}
        compared[seed] = entry
    return compared


def examine(
    model: Any, x: Tensor, y: Tensor, seed: int, eps: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Routing, forced accuracies, signals and effective weights of an AW-Net."""
    net: AWNet = model.net
    batch = {"x": x, "y": y, "index": torch.arange(len(y), device=y.device)}
    losses = model.adaptive_losses()
    pgd = PGD(eps, eps / 10, 20)
    images = {"clean": x, "pgd": attacked(model, losses["ce_f"], pgd, batch, seed)}
    images |= {name: attacked(model, losses[name], pgd, batch, seed) for name in JOINT}
    routed = routing(net, images)
    # Each of the two networks with a forced P_type, attacked by itself.
    own = {n: attacked(model, losses[f"ce_branch{n}"], pgd, batch, seed) for n in ("clean", "adv")}
    shown = {k: images[k] for k in ("clean", "pgd")} | {f"pgd_{n}": i for n, i in own.items()}
    found: dict[str, Any] = {
        "routing": routed,
        "forced": forced_accuracies(net, shown, y),
    }
    blocks = signal_summary(net, x, images["pgd"])
    if blocks:
        found["omega_std"] = max(block["std"] for block in blocks)
        found["omega_shift"] = max(block["shift"] for block in blocks)
    with torch.no_grad():
        one, other = (
            filters(net, x[0], kind, mean_scales(net, net.outputs(images[name]).signals))
            for kind, name in (("clean", "clean"), ("adv", "pgd"))
        )
    found["effective"] = {n: d["wasserstein"] for n, d in distances(one, other).items()}
    return found, blocks


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What training logged, from TensorBoard's files; empty where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    if not run.is_dir():
        return {}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]
    return {
        tag.removeprefix("train/"): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags
    }


def without_tensors(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what is only drawn."""
    return {
        key: without_tensors(value) if isinstance(value, Mapping) else value
        for key, value in entry.items()
        if not isinstance(value, Tensor)
    }


def measure(found: Found) -> None:
    """Filters, smoothness, and what an AW-Net does with clean and adversarial images."""
    roles = roles_of(found.on)
    compared: dict[int, dict[str, Any]] = {}
    examined: dict[int, dict[str, Any]] = {}
    smooth: dict[tuple[str, int], Mapping[str, Tensor]] = {}
    weights: dict[tuple[str, int], Any] = {}
    blocks: dict[int, list[dict[str, Any]]] = {}
    loaded = found.load_runs((roles.standard, roles.robust, roles.full))
    images = found.test_split(next(iter(loaded.values()))[1]) if loaded else None
    if images is not None:
        rows = subset(images[1], IMAGES)
        x, y = images[0][rows], images[1][rows]
        for (name, seed), (model, _) in loaded.items():
            smooth[name, seed] = smoothness(model, x, y, roles.eps)
            if name == roles.full:
                examined[seed], blocks[seed] = examine(model, x, y, seed, roles.eps)
            else:
                weights[name, seed] = filters(model.net, x[0])
        compared = compare_weights(weights, roles, found.seeds)
    reach = {key: {"reach": float(one["reach"].median())} for key, one in smooth.items()}
    found.kept |= {"compared": compared, "examined": examined, "smooth": smooth}
    found.kept |= {"weights": weights, "blocks": blocks, "reach": reach}
    found.measured |= {
        "weights": compared,
        "router": {seed: without_tensors(entry) for seed, entry in examined.items()},
        "reach": {f"{n} seed {s}": numbers["reach"] for (n, s), numbers in reach.items()},
    }


def claims(found: Found) -> list[Claim]:
    """C1, C2, C5, C6, F4 and two of the follow-up, as far as the scaled-down run can judge them."""
    if not found.is_digits:
        return []
    return [*accuracy_claims(found), *router_claims(found), *network_claims(found)]


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

    parts = (
        ("C2", roles.full, "AW-Net"),
        ("C6a", "mixbn_mtard", "MixBN alone"),
        ("C6b", "dynamic_mtard", "dynamic filters alone"),
        ("C6c", "detector_mtard", "the detector of versions 1 and 2"),
    )
    verdicts = [
        judge(
            id,
            f"{what} against the static network, both MTARD: W-Robust (PGD-20) more than 2 points "
            "higher",
            gain(name, roles.pgd),
            found.seeds,
            above=2.0,
            beside={"in the worst case": gain(name, "worst")},
        )
        for id, name, what in parts
    ]
    text = (
        "AW-Net against the static network in the worst case over adaptive attacks and equal "
        "numbers of restarts: robust accuracy higher"
    )
    values = found.gain(roles.full, roles.static, "worst")
    return [*verdicts, judge("C5", text, values, found.seeds, above=0.0)]


def router_claims(found: Found) -> list[Claim]:
    """F4: the router's types, and both forced types."""
    examined = {("", seed): entry for seed, entry in found.kept["examined"].items()}

    def points(*keys: str) -> BySeed:
        return {seed: 100 * value for seed, value in by_seed(examined, "", *keys).items()}

    types = [points("routing", kind, "type_acc") for kind in ("clean", "pgd")]
    return [
        judge(
            "F4a",
            "the router finds the type of clean and of PGD images: accuracy of the worse above 95",
            combined(types[0], types[1], min),
            found.seeds,
            above=95.0,
            beside={name: points("routing", name, "type_acc") for name in JOINT},
        ),
        judge(
            "F4b",
            "P_type forced to clean: accuracy on PGD images of the deployed network below 10",
            points("forced", "pgd", "clean"),
            found.seeds,
            below=10.0,
            beside={
                "clean accuracy": points("forced", "clean", "clean"),
                "attacked by itself": points("forced", "pgd_clean", "clean"),
            },
        ),
        judge(
            "F4c",
            "P_type forced to adversarial: clean accuracy lost, in points, is above 2",
            minus(points("forced", "clean", "soft"), points("forced", "clean", "adv")),
            found.seeds,
            above=2.0,
            beside={
                "PGD accuracy": points("forced", "pgd", "adv"),
                "attacked by itself": points("forced", "pgd_adv", "adv"),
                "PGD accuracy, soft": points("forced", "pgd", "soft"),
            },
        ),
        judge(
            "2.8",
            "signals hardly move beside two batch-norms: shift between types below 0.05",
            by_seed(examined, "", "omega_shift"),
            found.seeds,
            below=0.05,
            beside={"std over images": by_seed(examined, "", "omega_std")},
        ),
    ]


def network_claims(found: Found) -> list[Claim]:
    """C1 and 7.5: filters of, and distances to the boundary of, the two teachers."""
    roles = roles_of(found.on)
    compared, reach = found.kept["compared"], found.kept["reach"]

    def count(key: str) -> BySeed:
        return {seed: float(entry[key]) for seed, entry in compared.items() if key in entry}

    standard, robust = (by_seed(reach, n, "reach") for n in (roles.standard, roles.robust))
    return [
        judge(
            "C1a",
            "layers of 9 whose folded weights are further from clean to robust teacher than "
            "between two seeds of the clean one: more than 6",
            count("further"),
            found.seeds,
            above=6.0,
        ),
        judge(
            "C1b",
            "layers of 9 with smaller filters (l1, folded) in the robust teacher: more than 7",
            count("smaller_l1"),
            found.seeds,
            above=7.0,
            beside={"layers with larger kurtosis (raw)": count("larger_kurtosis")},
        ),
        judge(
            "7.5",
            "median first-order distance to the boundary: the robust teacher's over the clean "
            "one's is above 1",
            combined(robust, standard, lambda a, b: a / b),
            found.seeds,
            above=1.0,
            beside={"clean teacher": standard, "robust teacher": robust},
        ),
    ]


def figures(found: Found) -> dict[str, Figure | None]:
    """Weights, signals, router, training, gradients and the plane of trade-offs."""
    roles = roles_of(found.on)
    examined, compared, smooth = (found.kept[k] for k in ("examined", "compared", "smooth"))
    drawn: dict[str, Figure | None] = {}
    if examined:
        seed = min(examined)
        run = found.runs / f"{found.prefix}{roles.full}" / f"seed{seed}"
        drawn["router"] = pictures.router_histograms(examined[seed]["routing"])
        if found.kept["blocks"][seed]:
            drawn["signals"] = pictures.signal_means(found.kept["blocks"][seed])
        if curves := curves_of(run):
            drawn["training"] = pictures.training_curves(curves)
    if compared:
        drawn |= weight_figures(found.kept["weights"], compared, examined, roles)
    if smooth:
        first = min(seed for _, seed in smooth)
        shown = {name: one for (name, seed), one in smooth.items() if seed == first}
        drawn["gradients"] = pictures.gradient_figure(shown)
    if points := plane(found.metrics, roles):
        drawn["trade_off"] = pictures.trade_off(points)
    return drawn


def weight_figures(
    found: Mapping[tuple[str, int], Mapping[str, Filters]],
    compared: Mapping[int, Mapping[str, Any]],
    examined: Mapping[int, Mapping[str, Any]],
    roles: Roles,
) -> dict[str, Figure | None]:
    """Those about filters: histograms, and distances by layer."""
    seed = min(compared)
    layers = list(compared[seed]["between"])
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    pair = {
        "standard": found[roles.standard, seed],
        "robust": found[roles.robust, seed],
    }
    lines = {"standard / robust": compared[seed]["between"]}
    if "seeds" in compared[seed]:
        lines["two seeds of standard"] = compared[seed]["seeds"]
    by_layer = {
        label: {n: d["wasserstein"] for n, d in line.items()} for label, line in lines.items()
    }
    if seed in examined:
        by_layer["AW-Net: clean / adversarial"] = examined[seed]["effective"]
    return {
        "weights": pictures.weight_histograms(pair, [layers[i] for i in shown]),
        "distances": pictures.layer_distances(by_layer),
    }


def plane(
    metrics: Mapping[tuple[str, int], Mapping[str, float]], roles: Roles
) -> dict[str, list[tuple[float, float, float | None]]]:
    """Clean accuracy, PGD accuracy and worst case of every model and seed."""
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for (name, _), found in sorted(metrics.items()):
        if roles.pgd in found and not name.startswith("teacher"):
            # A worst case of a part of the images has no place beside accuracies of all.
            worst = None if "worst_clean" in found else found.get("worst")
            point = (found["clean_acc"], found[roles.pgd], worst)
            points.setdefault(name.replace("_mtard", ""), []).append(point)
    return points


def scope(on: str) -> tuple[str, str]:
    """What stems begin with: the digits, or the data set and backbone as asked for."""
    base = roles_of(on).base
    return base, f"{base}_"


ANALYSIS = Analysis(
    package="paper_awnet",
    claims=claims,
    measure=measure,
    figures=figures,
    scope=scope,
    baseline="static_mtard",
    accuracy="worst",
    accuracy_label="worst-case accuracy",
    compared=lambda method: method.endswith("_mtard"),
)

if __name__ == "__main__":
    sys.exit(ANALYSIS.main())
