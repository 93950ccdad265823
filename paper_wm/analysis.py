"""Claims, amplification and adaptive checks: ``python -m paper_wm.analysis``.

- E4: gains of the maps of trained networks, beside frozen and shuffled maps, and theory (C6).
- E6: stronger attacks, attacks past the map, and images of the base network, beside PGD-20.
- The verdicts on C1 to C7, and the figures.

Everything goes to ``analysis.json``, from which the tables of the README are rendered. Tags as in
``method.py``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn

from common.analysis.report import (
    BySeed,
    Load,
    by_seed,
    load_last,
    plain_values,
    run_analysis,
    verdict_table,
)
from common.errors import ConfigurationError, check_choice
from common.evaluation.drawing import save_figure
from common.files import write_sealed_json
from common.networks.alexnet import AlexNet
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import ResNet18
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet
from paper_wm.figures import (
    Point,
    attack_figure,
    histogram_figure,
    map_figure,
    noise_figure,
    scatter_figure,
)
from paper_wm.gathered import LABELS, Found, base_of
from paper_wm.measures import spearman
from paper_wm.method import Variant, insert_weight_maps
from paper_wm.networks import SmallCNN
from paper_wm.verdicts import LEVELS, Metrics, judge_claims

JUDGED: tuple[Variant, ...] = ("smoothing", "unsharp", "subtract_summed")
CURVES = ("base", "smoothing", "smoothing_frozen", "unsharp", "unsharp_frozen", "unsharp_lam-0.5")
SCATTER = {"uniform/level=0.4": "uniform noise of 0.4", "uniform/level=0.1": "uniform noise of 0.1"}


# ---------------------------------------------------------------------- C1: into which networks


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "small CNN": (SmallCNN, (1, 28, 28)),
    "ResNet-18": (ResNet18, (3, 32, 32)),
    "PreActResNet-18": (PreActResNet18, (3, 32, 32)),
    "WRN-16-4": (lambda: WideResNet(16, 4), (3, 32, 32)),
    "VGG-16": (VGG, (3, 32, 32)),
    "AlexNet": (AlexNet, (3, 32, 32)),
    "torchvision ResNet-18": (lambda: torchvision.models.resnet18(), (3, 224, 224)),
    "torchvision MobileNetV2": (lambda: torchvision.models.mobilenet_v2(), (3, 224, 224)),
}


def try_insertions(variant: Variant) -> dict[str, bool]:
    """Whether one call puts a map behind the first convolution of each kind of network.

    It has worked if the logits keep their shape and no key of the base network's state dict is
    lost. On the meta device: shapes need no weights.
    """
    check_choice("variant", variant, Variant)
    found = {}
    for name, (make, shape) in ZOO.items():
        with torch.device("meta"):
            net, images = make().eval(), torch.empty(2, *shape)
            keys, before = set(net.state_dict()), net(images).shape
            convolutions = (n for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
            insert_weight_maps(net, [next(convolutions)], shape, variant)
            added = set(net.state_dict()) - keys
            kept = keys <= set(net.state_dict()) and len(added) == 1
            found[name] = kept and net(images).shape == before
    return found


# --------------------------------------------------------------------------------------- tables


def spread(values: BySeed, digits: int = 2, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds; empty where there is none."""
    found = [scale * value for value in values.values()]
    if not found:
        return ""
    error = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{error}"


AMPLIFICATION = {
    "signal_gain": "signal gain (v2)",
    "noise_gain": "noise gain (v1)",
    "ratio": "ratio",
    "signal_spread": "spread of log signal gain",
    "snr_in": "SNR in",
    "snr_out": "SNR out",
    "spearman_variance_gain": "variance, gain",
    "spearman_variance_map": "variance, map",
    "spearman_map_sensitivity": "map, gradient",
    "map_sd": "sd of the map",
    "white_noise_theory": "white noise, theory",
    "white_noise_measured": "measured",
}


def amplification_table(found: Found) -> dict[str, Any]:
    """E4: gains of the first map, with frozen and shuffled maps as controls."""
    lines = []
    for method, label in found.methods.items():
        for name, title in ((method, label), (f"{method}_shuffled", f"{label}, values shuffled")):
            if not by_seed(found.summaries, name, "signal_gain"):
                continue
            cells = [by_seed(found.summaries, name, key) for key in AMPLIFICATION]
            lines.append([title, *(spread(cell) for cell in cells)])
    note = (
        "Of trained networks, their first map. Gains are variances at the output over variances "
        "at the input, of clean test images (signal) and of what uniform noise of 0.2 changes "
        "(noise); medians over units off the border. SNR: clean variance over noise variance, all "
        "units. Rank correlations over units of input variance with gain (confounded: read it "
        "against the frozen map), of input variance with the map, of the map's magnitude with the "
        "gradient at its input. Before batch-norm the scale of a channel is undone, so absolute "
        "gains say little there. White noise: mean gain over units, by the closed form and put "
        "through the layer."
    )
    noise = noise_key(found.metrics)
    points = scatter_points(found.metrics, found.summaries, noise)
    if len(points) > 2:
        ratios = torch.tensor([p.gains[2] for p in points])
        link = spearman(ratios, torch.tensor([p.accuracy for p in points]))
        if link is not None:
            note += (
                f" Across {len(points)} networks, the rank correlation of signal gain over noise "
                f"gain with accuracy under {SCATTER[noise]} is {link:+.2f}."
            )
    header = ["map", *AMPLIFICATION.values()]
    return {"title": "E4: amplification", "note": note, "header": header, "lines": lines}


def checks_table(found: Found) -> dict[str, Any]:
    """E6: whether the accuracy under PGD-20 survives what should break masked gradients."""
    columns = {
        "bypass/ce_f": "PGD-20",
        "pgd100": "PGD-100x3",
        "bypass/ce_bypass": "past the map",
        "aa": "AutoAttack",
        "deepfool": "DeepFool",
    }
    lines = []
    for method, label in found.methods.items():
        cells = [spread(by_seed(found.metrics, method, key), 1, 100.0) for key in columns]
        here = {seed: a for (owner, seed), a in found.transferred.items() if owner == method}
        failed = {seed: ids for (owner, seed), ids in found.audits.items() if owner == method}
        words = "; ".join(f"seed {s}: {', '.join(ids)}" for s, ids in failed.items() if ids)
        checked = words or ("none" if failed else "")
        lines.append([label, *cells, spread(here, 1, 100.0), checked])
    note = (
        "Accuracy in percent on the same examples of the test split, all at the radius of the "
        "threat model. Honest gradients: more steps and restarts, and AutoAttack, take little "
        "beyond PGD-20; gradients past the map and images made on the base network of the same "
        "seed attack worse. The last column: checks of the audit that failed."
    )
    header = ["network", *columns.values(), "transfer from base", "failed checks"]
    return {"title": "E6: adaptive checks", "note": note, "header": header, "lines": lines}


# -------------------------------------------------------------------------------------- figures


def draw(found: Found) -> dict[str, Figure]:
    """Figures (1) to (5), as far as there is something to draw."""
    pictures: dict[str, Figure] = {}
    shown = {method: LABELS[method] for method in CURVES if method in found.methods}
    if shown:
        pictures["1_noise"] = noise_figure(found.metrics, shown)
        pictures["2_attacks"] = attack_figure(found.metrics, shown)
    seed = min((s for _, s in found.maps), default=None)
    learned = [m for m in ("smoothing", "unsharp") if (m, seed) in found.maps]
    if learned and seed is not None:
        firsts = {LABELS[m]: found.maps[m, seed] for m in learned}
        pictures["3_maps"] = map_figure(firsts, start=1.0)
        every = {
            LABELS[m]: torch.cat([v.flatten() for (n, _), v in found.maps.items() if n == m])
            for m in learned
        }
        pictures["4_histogram"] = histogram_figure(every, start=1.0)
    noise = noise_key(found.metrics)
    points = scatter_points(found.metrics, found.summaries, noise)
    if points:
        labels = {m: LABELS[m] for m in found.methods if any(p.method == m for p in points)}
        pictures["5_scatter"] = scatter_figure(points, labels, SCATTER[noise])
    return pictures


def noise_key(metrics: Metrics) -> str:
    """The noise of the scatter plot: the strongest of the usual ones that was measured."""
    return next((k for k in SCATTER if any(k in found for found in metrics.values())), "")


def scatter_points(
    metrics: Metrics, summaries: Mapping[tuple[str, int], Mapping[str, float | None]], noise: str
) -> list[Point]:
    """One for every trained network with a map and a result."""
    points = []
    for (method, seed), numbers in summaries.items():
        accuracy = metrics.get((method, seed), {}).get(noise)
        signal, noisy = numbers["signal_gain"], numbers["noise_gain"]
        if accuracy is not None and signal is not None and noisy is not None:
            points.append(Point(method, signal, noisy, accuracy))
    return points


# ---------------------------------------------------------------------------------- the command


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
        runs: Where the run directories ``<stem>/seed<k>`` are.
        results: Where the result files are and the output goes.
        on: A data set, whose small network is analysed, or data set and network.
        seeds: Which.
        device: Where the networks run.
        load: How a run is loaded.

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is no result to work on.
    """
    base = base_of(on)
    found = Found(base, seeds)
    found.read_results(results)
    if not found.metrics:
        raise ConfigurationError(
            f"nothing to analyse: no result {results}/{base}_*-seed*.json for seeds "
            f"{', '.join(map(str, seeds))}; run make reproduce-wm ON={base}"
        )
    found.measure_runs(runs, device, load)
    inserted = {str(variant): try_insertions(variant) for variant in JUDGED}
    claims = judge_claims(
        base, found.by_base, found.audits, found.transferred, found.summaries, inserted
    )
    note = (
        f"On {base}, by one rule: a level counts where the mean paired difference to base over "
        f"seeds exceeds two standard errors; {LEVELS} or more levels up and fewer down support a "
        "claim, the reverse contradicts it. Differences are in points, ± standard error; with "
        "three seeds two standard errors are a weak test, and levels are not independent. Controls "
        "are held against base too. What is tested is this reconstruction: a contradicted claim "
        "may be its fault."
    )
    report: dict[str, Any] = {
        "on": base,
        "seeds": list(seeds),
        "expectations": [],
        "claims": [asdict(claim) for claim in claims],
        "tables": [verdict_table(claims, note), amplification_table(found), checks_table(found)],
        "amplification": plain_values(found.layers),
        "inserted": inserted,
        "missing": found.missing,
    }
    is_digits = base == "digits_cnn3"
    path = results / ("analysis.json" if is_digits else f"analysis_{base}.json")
    write_sealed_json(path, report)
    figures = [
        save_figure(figure, results / "figures" / f"{base}_{name}.png")
        for name, figure in draw(found).items()
    ]
    return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 whichever way the verdicts turn out, 2 where nothing can be done."""
    return run_analysis("paper_wm", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
