"""The tables beside the verdicts: amplification (E4) and adaptive checks (E6)."""

from statistics import fmean, stdev
from typing import Any

import torch

from common.analysis.claims import BySeed, by_seed
from common.analysis.report import Found
from paper_wm.figures import SCATTER, noise_key, scatter_points
from paper_wm.gathered import Gathered, methods_of
from paper_wm.measures import spearman


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
    got: Gathered = found.kept["gathered"]
    lines = []
    for method, label in methods_of(found).items():
        for name, title in ((method, label), (f"{method}_shuffled", f"{label}, values shuffled")):
            if not by_seed(got.summaries, name, "signal_gain"):
                continue
            cells = [by_seed(got.summaries, name, key) for key in AMPLIFICATION]
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
    points = scatter_points(found.metrics, got.summaries, noise)
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
    got: Gathered = found.kept["gathered"]
    lines = []
    for method, label in methods_of(found).items():
        cells = [spread(by_seed(found.metrics, method, key), 1, 100.0) for key in columns]
        here = {seed: a for (owner, seed), a in got.transferred.items() if owner == method}
        failed = {seed: ids for (owner, seed), ids in got.audits.items() if owner == method}
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
