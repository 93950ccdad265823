"""Variance amplification of a weight map: gains, signal-to-noise ratios, adaptivity [D].

How the paper measures it is not known. v1 speaks of the variance of noise, v2 of that of
activations: ``noise_gain`` and ``signal_gain``. "Adaptive" is read as: the gain differs between
units in a way that the map has learned. Filtering alone makes gains differ too, so every number
stands beside the same with a frozen map, and with the map's values shuffled.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from common.analysis.claims import Metrics
from common.analysis.report import Found
from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.data.subset import subset
from common.evaluation.transfer import Transfer
from common.modes import frozen
from common.results.bases import bases, comparable
from common.results.outcomes import positions
from common.results.schema import CheckpointResult
from paper_wm.method import WeightMap, weight_maps
from paper_wm.theory import layer_noise_gain

GAIN_FLOOR, LOG_FLOOR = 1e-12, 1e-8
CORRELATIONS = {"pearson": pearsonr, "spearman": spearmanr}

WHITE_BOX = "bypass/ce_f"
STRONGER = {
    "pgd100": "PGD-100 with restarts",
    "bypass/ce_bypass": "gradients past the map",
    "aa": "AutoAttack",
}
"""What may not take much more than the white box, and how a reason calls it."""

SMALL, SCALED_UP = "cnn3", ("resnet18", "wrn16_4", "wrn28_10")
RADIUS = {"digits": 0.05, "mnist": 0.1, "fashion_mnist": 0.1}  # of transferred images; else 2/255
LIMIT = 1000  # test images that gains are measured on

Summaries = Mapping[tuple[str, int], Mapping[str, float | None]]
"""Numbers of :func:`paper_wm.measures.summarise` by (method, seed)."""

ORDER = (
    *("base", "wide", "scale", "smoothing", "smoothing_frozen", "smoothing_post", "smoothing_all"),
    *("smoothing_all_post", "smoothing_stages", "unsharp", "unsharp_frozen", "unsharp_post"),
    *("unsharp_all", "unsharp_lam-0.5", "highpass", "subtract_summed"),
)

# --------------------------------------------------------------------------------- names of runs


def split_stem(stem: str) -> tuple[str, str]:
    """``mnist_cnn3_smoothing_post`` -> ``mnist_cnn3`` and ``smoothing_post``."""
    for network in (SMALL, *SCALED_UP):
        before, found, after = stem.partition(f"_{network}_")
        if found:
            return f"{before}_{network}", after
    return stem, ""


def scope(on: str) -> tuple[str, str]:
    """Data set and network, and the prefix of the methods.

    Args:
        on: A data set (its small network), such a pair, or a whole stem.
    """
    base, _ = split_stem(f"{on.rstrip('_')}_")
    if not base.endswith((SMALL, *SCALED_UP)):
        base = f"{on.rstrip('_')}_{SMALL}"
    return base, f"{base}_"


def label_of(method: str) -> str:
    """What a method is called: what stands behind data set and network in the stems, in words."""
    if method == "subtract_summed":
        return "summed map subtracted"
    return method.replace("_", ", ").replace("lam", "lam ")


def methods_of(metrics: Metrics) -> dict[str, str]:
    """Methods with results and what they are called, the known ones first."""
    having = {method for method, _ in metrics}
    known = [method for method in ORDER if method in having]
    return {method: label_of(method) for method in (*known, *sorted(having - set(known)))}


def of_method(values: Mapping[tuple[str, int], Any], method: str) -> dict[int, Any]:
    """The values of a method, by seed."""
    return {seed: value for (owner, seed), value in values.items() if owner == method}


# ---------------------------------------------------------------------------------------- one map


def interior(values: Tensor, border: int) -> Tensor:
    """Units at least ``border`` from the edge, flat; all units if there is none."""
    height, width = values.shape[-2:]
    if 2 * border >= min(height, width):
        return values.flatten()
    return values[..., border : height - border, border : width - border].flatten()


def correlations(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Of two tensors, flattened; ``None`` where one is constant or not finite."""
    x, y = x.flatten().double(), y.flatten().double()
    scale = float(x.std(correction=0) * y.std(correction=0))
    if not math.isfinite(scale) or scale < 1e-12:
        return dict.fromkeys(CORRELATIONS)
    return {k: float(test(x.numpy(), y.numpy()).statistic) for k, test in CORRELATIONS.items()}


def summarise(
    a: Tensor,
    a_noisy: Tensor,
    b: Tensor,
    b_noisy: Tensor,
    weight: Tensor,
    sensitivity: Tensor,
    border: int = 3,
) -> dict[str, float | None]:
    """The numbers of a layer from its inputs ``a`` and outputs ``b``, ``(N, C, H, W)``, N > 1.

    A unit is a position ``(c, i, j)``; those nearer to the edge than ``border`` are left out of
    medians and spreads. ``weight`` is the map, ``sensitivity`` that of :func:`sensitivity_at`.

    Returns:
        ``signal_gain`` and ``noise_gain``, medians over units of the variance over images at the
        output over that at the input, of clean images and of what noise changes; their ``ratio``;
        ``signal_spread`` and ``noise_spread``, standard deviations of the logarithms over units;
        ``snr_in`` and ``snr_out``, clean variance over noise variance of all units together, and
        ``snr_ratio``; ``map_mean``, ``map_sd``; and correlations over units, ``pearson_*`` and
        ``spearman_*``: log input variance with the map (``variance_map``), with log signal gain
        (``variance_gain``; confounded, for the variance is its denominator), the map's magnitude
        with the sensitivity (``map_sensitivity``).
    """
    a, a_noisy, b, b_noisy = (part.double() for part in (a, a_noisy, b, b_noisy))
    before, after = a.var(dim=0), b.var(dim=0)
    noise_before, noise_after = (a_noisy - a).var(dim=0), (b_noisy - b).var(dim=0)
    gains = after / (before + GAIN_FLOOR)
    signal = interior(gains, border)
    noise = interior(noise_after / (noise_before + GAIN_FLOOR), border)
    median, noise_median = float(signal.median()), float(noise.median())
    snr_in = float(before.sum() / (noise_before.sum() + GAIN_FLOOR))
    snr_out = float(after.sum() / (noise_after.sum() + GAIN_FLOOR))
    weight = weight.detach().double().expand(a.shape[1:])
    variance = (before + LOG_FLOOR).log()
    pairs = {
        "variance_map": (variance, weight),
        "variance_gain": (variance, (gains + LOG_FLOOR).log()),
        "map_sensitivity": (weight.abs(), sensitivity),
    }
    return {
        "signal_gain": median,
        "noise_gain": noise_median,
        "ratio": median / max(noise_median, GAIN_FLOOR),
        "signal_spread": float((signal + LOG_FLOOR).log().std()),
        "noise_spread": float((noise + LOG_FLOOR).log().std()),
        "snr_in": snr_in,
        "snr_out": snr_out,
        "snr_ratio": snr_out / max(snr_in, GAIN_FLOOR),
        "map_mean": float(weight.mean()),
        "map_sd": float(weight.std()),
    } | {
        f"{kind}_{name}": value
        for name, (x, y) in pairs.items()
        for kind, value in correlations(x, y).items()
    }


# -------------------------------------------------------------------------------- trained networks


def record(
    model: nn.Module, layer: WeightMap, x: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Input and output of a layer for images ``x``, on the CPU."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].detach().cpu(), output.detach().cpu()))

    with layer.register_forward_hook(hook), torch.no_grad():
        for part in torch.split(x, batch_size):
            model(part)
    return torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])


def sensitivity_at(model: nn.Module, layer: WeightMap, x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute gradient of the cross-entropy by a layer's input, ``(C, H, W)``."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1],)

    with layer.register_forward_pre_hook(keep), torch.enable_grad():
        (gradient,) = torch.autograd.grad(cross_entropy(model(x), y).sum(), inputs[0])
    return gradient.abs().mean(dim=0).cpu()


def measure_layer(
    model: nn.Module, layer: WeightMap, x: Tensor, y: Tensor, level: float = 0.2, seed: int = 1
) -> dict[str, float | None]:
    """:func:`summarise` for a weight map of a network in evaluation mode, on images and labels.

    Noise is uniform in [-level, level], one draw, and not clipped to the box [D].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = (2.0 * torch.rand(x.shape, generator=generator) - 1.0) * level
    (a, b), (a_noisy, b_noisy) = (record(model, layer, part) for part in (x, x + noise.to(x)))
    sensitivity = sensitivity_at(model, layer, x[:500], y[:500])
    return summarise(a, a_noisy, b, b_noisy, layer.map.cpu(), sensitivity, layer.kernel_size)


def shuffled(model: nn.Module, seed: int = 1) -> nn.Module:
    """A copy with the values of each map in random places: the random-map control [D]."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight_map in weight_maps(twin).values():
        values = weight_map.map.data
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        weight_map.map.data = values.flatten()[order].view_as(values)
    return twin


def white_noise_check(layer: WeightMap, draws: int = 2000, seed: int = 1) -> dict[str, float]:
    """Noise gain by the closed form, and of 500 to ``draws`` noise features put through the layer.

    Returns:
        Means over units: ``theory`` and ``measured``.
    """
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(layer).cpu()
    measured = []
    with torch.no_grad():
        for _ in range(max(draws // 500, 1)):
            noise = torch.randn(500, *layer.shape, generator=generator)
            measured.append(float(twin(noise).double().square().mean()))
    return {"theory": float(layer_noise_gain(layer).mean()), "measured": fmean(measured)}


def transfer(source: nn.Module, victim: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Accuracy of ``victim`` under PGD-20 images made on ``source``, in [0, 1]."""
    part = {"x": x, "y": y, "index": torch.arange(len(x))}
    attack = Transfer(PGD(eps, eps / 8, 20, "uniform"), source)
    found = attack.run(victim, part, ExampleRandom(0, 0, part["index"]))
    return float(found["correct"].float().mean())


# ---------------------------------------------------------------------------------------- evidence


@dataclass
class Evidence:
    """What claims and figures rest on, by (method, seed) unless stated otherwise.

    Attributes:
        by_base: Metrics, of every data set and network in the results.
        audits: Checks for gradient masking that failed.
        attacked: Positions of the test images that PGD-20 attacked beside the other checks.
        transferred: Accuracy under images made on base.
        summaries: Numbers of the first map, ``<method>_shuffled`` too.
        layers: Numbers of every map by stem, seed and module.
        maps: First maps.
    """

    by_base: dict[str, dict[tuple[str, int], dict[str, float]]] = field(default_factory=dict)
    audits: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    attacked: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    transferred: dict[tuple[str, int], float] = field(default_factory=dict)
    summaries: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    maps: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def read(found: Found) -> Evidence:
    """Metrics of all data sets and networks, and failed checks."""
    got = Evidence()
    last: dict[str, dict[tuple[str, int], CheckpointResult]] = {}
    for result in found.everything:
        base, method = split_stem(result["experiment"])
        if "last" not in result["checkpoints"]:
            continue
        checkpoint, key = result["checkpoints"]["last"], (method, result["seed"])
        last.setdefault(base, {})[key] = checkpoint
        if base == found.on and WHITE_BOX in checkpoint["metrics"]:
            got.attacked[key] = positions(checkpoint, WHITE_BOX)
        if base == found.on and "audit" in checkpoint:
            checks = checkpoint["audit"]["checks"]
            got.audits[key] = [check["id"] for check in checks if check["verdict"] == "fail"]
    for base, checkpoints in last.items():
        got.by_base[base], _ = comparable(checkpoints)
        for key, checkpoint in checkpoints.items():
            of = bases(checkpoint)
            for name in (*STRONGER, "deepfool"):
                if WHITE_BOX in of and of.get(name, of[WHITE_BOX]) != of[WHITE_BOX]:
                    got.by_base[base][key].pop(name, None)
                    if base == found.on:
                        found.missing.append(f"{name} of {key[0]} seed {key[1]}: on other images")
    return got


def measure_runs(found: Found) -> None:
    """Gains of every map, and what images of the base network do to every other."""
    got = found.kept["evidence"] = read(found)
    found.metrics = got.by_base.get(found.on, {})
    found.measured["amplification"] = got.layers
    surrogates = {seed: model for (_, seed), (model, _) in found.load_runs(["base"]).items()}
    eps = RADIUS.get(found.on.partition(f"_{SMALL}")[0], 2 / 255)
    for method in methods_of(found.metrics):
        if method.partition("_")[0] in ("base", "wide"):
            continue
        for key, (model, data) in found.load_runs([method]).items():
            if (images := found.test_split(data)) is None:
                continue
            x, y = images
            some = subset(y, LIMIT)
            measure_maps(got, found.prefix, key, model, x[some], y[some])
            if key[1] in surrogates and (rows := got.attacked.get(key)):
                got.transferred[key] = transfer(surrogates[key[1]], model, x[rows], y[rows], eps)


def measure_maps(
    got: Evidence, prefix: str, key: tuple[str, int], model: nn.Module, x: Tensor, y: Tensor
) -> None:
    """Numbers of every map of a network; the first one stands for the method in tables."""
    method, seed = key
    twins, maps = {method: model}, list(weight_maps(model).values())
    if any(weight_map.map.requires_grad for weight_map in maps):
        twins[f"{method}_shuffled"] = shuffled(model)
    if maps:
        got.maps[key] = maps[0].map.detach().cpu()
    with frozen(model, "eval"):
        for name, twin in twins.items():
            places = got.layers.setdefault(f"{prefix}{name}", {}).setdefault(f"seed{seed}", {})
            for place, layer in weight_maps(twin.eval()).items():
                numbers = measure_layer(twin, layer, x, y)
                if twin is model and not layer.variant.startswith("subtract"):
                    checked = white_noise_check(layer)
                    numbers |= {f"white_noise_{key}": value for key, value in checked.items()}
                places[place] = numbers
                got.summaries.setdefault((name, seed), numbers)
