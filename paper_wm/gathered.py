"""What the analysis works on: results of all rows, and measurements of the runs there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.analysis.report import Load, load_runs, load_test_split
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.data.subset import subset
from common.errors import UserError
from common.evaluation.transfer import Transfer
from common.modes import frozen
from common.results.bases import bases, comparable
from common.results.outcomes import positions
from common.results.store import CheckpointResult, load_results
from paper_wm.measures import measure_layer, shuffled, summarise, white_noise_check
from paper_wm.method import weight_maps

LABELS = {
    "base": "base",
    "wide": "wide",
    "scale": "scale",
    "smoothing": "smoothing",
    "smoothing_frozen": "smoothing, frozen",
    "smoothing_post": "smoothing, post",
    "smoothing_all": "smoothing, all",
    "smoothing_all_post": "smoothing, all, post",
    "smoothing_stages": "smoothing, stages",
    "unsharp": "unsharp",
    "unsharp_frozen": "unsharp, frozen",
    "unsharp_post": "unsharp, post",
    "unsharp_all": "unsharp, all",
    "unsharp_lam-0.5": "unsharp, lam -0.5",
    "highpass": "highpass",
    "subtract_summed": "summed map subtracted",
}
"""What methods are called: what stands behind data set and network in the stems."""

NETWORKS = ("cnn3", "resnet18", "wrn16_4", "wrn28_10")
RADIUS = {"digits": 0.05, "mnist": 0.1, "fashion_mnist": 0.1}  # of the transferred images
LIMIT = 1000  # test images that gains are measured on
WHITE_BOX = "bypass/ce_f"
CHECKS = ("bypass/ce_bypass", "pgd100", "aa", "deepfool")  # what it is compared with


@dataclass
class Found:
    """What could be had of the runs and results of a data set and network.

    Attributes:
        base: Both, ``digits_cnn3``.
        seeds: Those asked for.
        by_base: Metrics by (method, seed), of every data set and network in the results.
        audits: Failed checks for gradient masking by (method, seed).
        attacked: The test images that PGD-20 met beside the other checks, by (method, seed).
        summaries: Numbers of the first map by (method, seed), ``<method>_shuffled`` too.
        layers: Numbers of every map by stem, seed and module.
        transferred: Accuracy under images made on base, by (method, seed).
        maps: First maps by (method, seed).
        missing: In words.
    """

    base: str
    seeds: Sequence[int]
    by_base: dict[str, dict[tuple[str, int], dict[str, float]]] = field(default_factory=dict)
    audits: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    attacked: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    summaries: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    transferred: dict[tuple[str, int], float] = field(default_factory=dict)
    maps: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[tuple[str, int], dict[str, float]]:
        """Of ``base``."""
        return self.by_base.get(self.base, {})

    @property
    def methods(self) -> dict[str, str]:
        """Those with results and what they are called, the best known first."""
        having = sorted({method for method, _ in self.metrics})
        known = {method: label for method, label in LABELS.items() if method in having}
        return known | {m: m.replace("_", ", ") for m in having if m not in known}

    def read_results(self, folder: Path) -> None:
        """Metrics of the last checkpoints, and failed checks."""
        last: dict[str, dict[tuple[str, int], CheckpointResult]] = {}
        for result in load_results(folder):
            base, method = split_stem(result["experiment"])
            if result["seed"] not in self.seeds or "last" not in result["checkpoints"]:
                continue
            checkpoint = result["checkpoints"]["last"]
            last.setdefault(base, {})[method, result["seed"]] = checkpoint
            if base == self.base and WHITE_BOX in checkpoint["metrics"]:
                self.attacked[method, result["seed"]] = positions(checkpoint, WHITE_BOX)
            if base == self.base and "audit" in checkpoint:
                self.audits[method, result["seed"]] = [
                    check["id"]
                    for check in checkpoint["audit"]["checks"]
                    if check["verdict"] == "fail"
                ]

        for base, checkpoints in last.items():
            self.by_base[base], left_out = comparable(checkpoints)
            for key, checkpoint in checkpoints.items():
                of = bases(checkpoint)
                for name in CHECKS:  # which verdicts hold against the white box
                    if WHITE_BOX in of and of.get(name, of[WHITE_BOX]) != of[WHITE_BOX]:
                        self.by_base[base][key].pop(name, None)
                        left_out.append(f"{name} of {key[0]} seed {key[1]}: on other images")
            self.missing += left_out if base == self.base else []

    def measure_runs(self, runs: Path, device: str, load: Load) -> None:
        """Gains of every map, and what images of the base network do to every other."""
        mapped = [m for m in self.methods if m.partition("_")[0] not in ("base", "wide")]
        bases, missing = load_runs(runs, ["base"], self.base, self.seeds, load)
        self.missing += missing
        surrogates = {seed: model.to(device) for (_, seed), (model, _) in bases.items()}
        for method in mapped:
            found, missing = load_runs(runs, [method], self.base, self.seeds, load)
            self.missing += missing
            for (_, seed), (model, data) in found.items():
                try:
                    x, y = load_test_split(data)
                except (UserError, RuntimeError, OSError) as error:
                    self.missing.append(f"data of {self.base}_{method}, seed {seed}: {error}")
                    continue
                x, y = x.to(device), y.to(device)
                some = subset(y, LIMIT)
                self._measure(method, seed, model.to(device), x[some], y[some])
                if seed in surrogates and (rows := self.attacked.get((method, seed))):
                    dataset = self.base.partition("_cnn3")[0]
                    eps = RADIUS.get(dataset, 2 / 255)
                    accuracy = transfer(surrogates[seed], model, x[rows], y[rows], eps)
                    self.transferred[method, seed] = accuracy

    def _measure(self, method: str, seed: int, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Numbers of every map of a network; the first one stands for the method in tables."""
        twins = {method: model}
        maps = weight_maps(model)
        if any(m.map.requires_grad for m in maps.values()):
            twins[f"{method}_shuffled"] = shuffled(model)
        with frozen(model, "eval"):
            for name, twin in twins.items():
                for i, (place, layer) in enumerate(weight_maps(twin.eval()).items()):
                    units = measure_layer(twin, layer, x, y)
                    numbers = summarise(units, border=layer.kernel_size)
                    if twin is model and not layer.variant.startswith("subtract"):
                        checked = white_noise_check(layer)
                        numbers |= {f"white_noise_{key}": v for key, v in checked.items()}
                    stem = self.layers.setdefault(f"{self.base}_{name}", {})
                    stem.setdefault(f"seed{seed}", {})[place] = numbers
                    if i == 0:
                        self.summaries[name, seed] = numbers
        if maps:
            self.maps[method, seed] = next(iter(maps.values())).map.detach().cpu()


def split_stem(stem: str) -> tuple[str, str]:
    """``mnist_cnn3_smoothing_post`` -> ``mnist_cnn3`` and ``smoothing_post``."""
    for network in NETWORKS:
        before, found, after = stem.partition(f"_{network}_")
        if found:
            return f"{before}_{network}", after
    return stem, ""


def base_of(on: str) -> str:
    """Data set and network of a data set (its small network), of such a pair or of a whole stem."""
    base, _ = split_stem(f"{on.rstrip('_')}_")
    return base if base.endswith(NETWORKS) else f"{on.rstrip('_')}_cnn3"


def transfer(source: nn.Module, victim: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Accuracy of ``victim`` under PGD-20 images made on ``source``."""
    part = {"x": x, "y": y, "index": torch.arange(len(x))}
    attack = Transfer(PGD(eps, eps / 8, 20, "uniform"), source)
    found = attack.run(victim, part, ExampleRandom(0, 0, part["index"]))
    return float(found["correct"].float().mean())
