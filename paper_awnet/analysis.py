"""The paper's figures and claims, from what has finished: ``python -m paper_awnet.analysis``.

- C1, figure F1: filter weights of a standard against a robust network, and of two seeds.
- C2, C6: W-Robust of AW-Net and of its parts against the static network with the same loss.
- C5: the same under adaptive attacks.
- Figures F3 to F5 and those of section "gradients": signals, the router, the plane of trade-offs,
  gradient regularisation, and how training went.

The verdicts of the scaled-down run go to ``analysis.json``. Tags as in ``method.py``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.analysis.report import (
    Load,
    load_last,
    load_runs,
    load_test_split,
    plain_values,
    run_analysis,
)
from common.attacks.pgd import PGD
from common.data.subset import subset
from common.errors import ConfigurationError
from common.evaluation.drawing import save_figure
from common.files import write_sealed_json
from common.results.bases import comparable, last_of
from common.results.store import load_results
from paper_awnet import plots
from paper_awnet.claims import JOINT, Roles, evaluate_expectations, roles_of
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
"""So many test images are attacked here, of all classes in proportion."""

# ----------------------------------------------------------------------------- from checkpoints


Runs = Mapping[tuple[str, int], tuple[Any, Any]]


def weights(runs: Runs, names: Sequence[str], image: Tensor) -> dict[tuple[str, int], Any]:
    """The filters of every network of the given names."""
    return {key: filters(model.net, image) for key, (model, _) in runs.items() if key[0] in names}


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


# ------------------------------------------------------------------------------------ the command


def analyse(
    runs: Path,
    results: Path,
    on: str,
    seeds: Sequence[int],
    device: str = "cpu",
    load: Load = load_last,
) -> dict[str, Any]:
    """Draw what can be drawn and judge what can be judged.

    Args:
        runs: Run directories.
        results: Where the result files are and the output goes.
        on: ``digits``, or with what the stems of one backbone begin: ``cifar10_resnet18``.
        seeds: Which.
        device: Of the computations.
        load: Run directory to (classifier, data).

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is neither a result nor a run to work on.
    """
    roles = roles_of(on)
    found_results = [result for result in load_results(results) if result["seed"] in seeds]
    metrics, left_out = comparable(last_of(found_results, f"{roles.base}_"))
    names = (roles.standard, roles.robust, roles.full)
    loaded, missing = load_runs(runs, names, roles.base, seeds, load)
    missing += left_out
    if not metrics and not loaded:
        raise ConfigurationError(
            f"nothing to analyse: neither a result {results}/{roles.base}_*-seed*.json nor a run "
            f"in {runs}; run make reproduce-awnet ON={on}"
        )
    pictures: dict[str, Figure] = {}
    compared: dict[int, dict[str, Any]] = {}
    examined: dict[int, dict[str, Any]] = {}
    reach: dict[tuple[str, int], dict[str, float]] = {}
    if loaded:
        x, y = load_test_split(next(iter(loaded.values()))[1])
        rows = subset(y, IMAGES)
        x, y = x[rows].to(device), y[rows].to(device)
        for model, _ in loaded.values():
            model.to(device).eval()
        found = weights(loaded, (roles.standard, roles.robust), x[0])
        compared = compare_weights(found, roles, seeds)
        smooth = {key: smoothness(model, x, y, roles.eps) for key, (model, _) in loaded.items()}
        reach = {key: {"reach": float(s["reach"].median())} for key, s in smooth.items()}
        for (name, seed), (model, _) in loaded.items():
            if name == roles.full:
                examined[seed], blocks = examine(model, x, y, seed, roles.eps)
                if len(examined) == 1:
                    pictures |= full_figures(examined[seed], blocks, runs, roles, seed)
        pictures |= weight_figures(found, compared, examined, roles)
        first = min(seed for _, seed in loaded)
        shown = {n: s for (n, seed), s in smooth.items() if seed == first}
        pictures["gradients"] = plots.gradient_figure(shown)
    if points := plane(metrics, roles):
        pictures["trade_off"] = plots.trade_off(points)
    is_digits = roles.base == "digits"
    judged = evaluate_expectations(metrics, compared, examined, reach, seeds) if is_digits else []
    report: dict[str, Any] = {
        "on": on,
        "seeds": list(seeds),
        "expectations": [plain_values(asdict(one)) for one in judged],
        "weights": plain_values(compared),
        "router": plain_values({seed: without_tensors(e) for seed, e in examined.items()}),
        "reach": {f"{n} seed {s}": plain_values(r["reach"]) for (n, s), r in reach.items()},
        "missing": missing,
    }
    path = results / ("analysis.json" if is_digits else f"analysis_{on}.json")
    write_sealed_json(path, report)
    saved = [
        save_figure(figure, results / "figures" / f"{roles.base}_{name}.png")
        for name, figure in pictures.items()
    ]
    return {**report, "figures": [str(figure) for figure in saved], "path": str(path)}


def full_figures(
    found: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    runs: Path,
    roles: Roles,
    seed: int,
) -> dict[str, Figure]:
    """Those about one AW-Net: router, signals, training."""
    pictures = {"router": plots.router_histograms(found["routing"])}
    if blocks:
        pictures["signals"] = plots.signal_means(blocks)
    if curves := curves_of(runs / f"{roles.base}_{roles.full}" / f"seed{seed}"):
        pictures["training"] = plots.training_curves(curves)
    return pictures


def weight_figures(
    found: Mapping[tuple[str, int], Mapping[str, Filters]],
    compared: Mapping[int, Mapping[str, Any]],
    examined: Mapping[int, Mapping[str, Any]],
    roles: Roles,
) -> dict[str, Figure]:
    """Those about filters: histograms, and distances by layer."""
    if not compared:
        return {}
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
        "weights": plots.weight_histograms(pair, [layers[i] for i in shown]),
        "distances": plots.layer_distances(by_layer),
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


def without_tensors(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what is only drawn."""
    return {
        key: without_tensors(value) if isinstance(value, Mapping) else value
        for key, value in entry.items()
        if not isinstance(value, Tensor)
    }


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 whichever way the expectations turn out, 2 where nothing can be done."""
    return run_analysis("paper_awnet", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
