"""Variance amplification of a weight map: gains, signal-to-noise ratios, adaptivity [D].

How the paper measures it is not known. v1 speaks of the variance of noise, v2 of that of
activations: ``noise_gain`` and ``signal_gain``. "Adaptive" is read as: the gain differs between
units in a way that the map has learned. Filtering alone makes gains differ too, so every number
needs the same one with a frozen map, and with the map's values shuffled, beside it.

Batch-norm undoes the scale of a channel's map, so in front of it only the pattern within a channel
tells maps apart [M].
"""

import copy
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from common.attacks.losses import cross_entropy
from paper_wm.method import WeightMap, weight_maps
from paper_wm.theory import layer_noise_gain

GAIN_FLOOR, LOG_FLOOR = 1e-12, 1e-8


@dataclass(frozen=True)
class Units:
    """Numbers of every unit ``(c, i, j)`` of a layer, all ``(C, H, W)``.

    Attributes:
        variance: Of the clean input over images (unbiased).
        signal_gain: Variance of the clean output over that of the clean input (v2).
        noise_gain: The same of what noise changes (v1).
        weight: The map.
        sensitivity: Mean absolute gradient of the loss with respect to the input.
        snr_in: Clean variance over noise variance at the input, all units together; a number.
        snr_out: The same at the output.
    """

    variance: Tensor
    signal_gain: Tensor
    noise_gain: Tensor
    weight: Tensor
    sensitivity: Tensor
    snr_in: float
    snr_out: float


def gain(after: Tensor, before: Tensor) -> Tensor:
    """Variance over images of ``after`` over that of ``before``, ``(N, ...)`` to ``(...)``."""
    return after.var(dim=0) / (before.var(dim=0) + GAIN_FLOOR)


def measure_units(
    a: Tensor, a_noisy: Tensor, b: Tensor, b_noisy: Tensor, weight: Tensor, sensitivity: Tensor
) -> Units:
    """Gains and ratios from inputs and outputs of a layer.

    Args:
        a: Input for clean images, ``(N, C, H, W)``, N at least 2.
        a_noisy: Input for the same images with noise.
        b: Output for clean images.
        b_noisy: Output for noisy images.
        weight: The map, ``(C or 1, H, W)``.
        sensitivity: Mean absolute gradient at the input, ``(C, H, W)``.
    """
    a, a_noisy, b, b_noisy = (part.double() for part in (a, a_noisy, b, b_noisy))
    noise_in, noise_out = a_noisy - a, b_noisy - b

    def ratio(signal: Tensor, noise: Tensor) -> float:
        return float(signal.var(dim=0).sum() / (noise.var(dim=0).sum() + GAIN_FLOOR))

    return Units(
        variance=a.var(dim=0),
        signal_gain=gain(b, a),
        noise_gain=gain(noise_out, noise_in),
        weight=weight.detach().double().expand(a.shape[1:]),
        sensitivity=sensitivity.double(),
        snr_in=ratio(a, noise_in),
        snr_out=ratio(b, noise_out),
    )


def interior(values: Tensor, border: int) -> Tensor:
    """Units at least ``border`` from the edge, flat; all units if there is none."""
    height, width = values.shape[-2:]
    if 2 * border >= min(height, width):
        return values.flatten()
    return values[..., border : height - border, border : width - border].flatten()


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two flat tensors; ``None`` where one is constant or not finite."""
    return _correlation(pearsonr, x, y)


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's rank correlation of two flat tensors; ``None`` as for :func:`pearson`."""
    return _correlation(spearmanr, x, y)


def _correlation(test: Any, x: Tensor, y: Tensor) -> float | None:
    x, y = x.double(), y.double()
    scale = float(x.std(correction=0) * y.std(correction=0))
    if not math.isfinite(scale) or scale < 1e-12:
        return None
    return float(test(x.numpy(), y.numpy()).statistic)


def summarise(units: Units, border: int = 3) -> dict[str, float | None]:
    """The numbers of a table.

    Args:
        units: Of one layer.
        border: Units nearer to the edge are left out of medians and spreads.

    Returns:
        ``signal_gain`` and ``noise_gain`` (medians), their ``ratio``; ``signal_spread`` and
        ``noise_spread``, standard deviations of the logarithms over units; ``snr_in``,
        ``snr_out``, ``snr_ratio``; ``map_mean``, ``map_sd``; and correlations over units,
        ``pearson_*`` and ``spearman_*``: log variance with the map (``variance_map``), log
        variance with log signal gain (``variance_gain``; confounded, for the variance is its
        denominator), the map's magnitude with the sensitivity (``map_sensitivity``).
    """
    signal, noise = interior(units.signal_gain, border), interior(units.noise_gain, border)
    medians = float(signal.median()), float(noise.median())
    variance = (units.variance.flatten() + LOG_FLOOR).log()
    weight = units.weight.flatten()
    pairs = {
        "variance_map": (variance, weight),
        "variance_gain": (variance, (units.signal_gain.flatten() + LOG_FLOOR).log()),
        "map_sensitivity": (weight.abs(), units.sensitivity.flatten()),
    }
    found: dict[str, float | None] = {
        "signal_gain": medians[0],
        "noise_gain": medians[1],
        "ratio": medians[0] / max(medians[1], GAIN_FLOOR),
        "signal_spread": float((signal + LOG_FLOOR).log().std()),
        "noise_spread": float((noise + LOG_FLOOR).log().std()),
        "snr_in": units.snr_in,
        "snr_out": units.snr_out,
        "snr_ratio": units.snr_out / max(units.snr_in, GAIN_FLOOR),
        "map_mean": float(weight.mean()),
        "map_sd": float(weight.std()),
    }
    for name, (x, y) in pairs.items():
        found[f"pearson_{name}"] = pearson(x, y)
        found[f"spearman_{name}"] = spearman(x, y)
    return found


# -------------------------------------------------------------------------------- trained networks


def record(
    model: nn.Module, layer: WeightMap, x: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Input and output of a layer for images ``x``, on the CPU."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].detach().cpu(), output.detach().cpu()))

    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            for part in torch.split(x, batch_size):
                model(part)
    finally:
        handle.remove()
    return torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])


def sensitivity_at(model: nn.Module, layer: WeightMap, x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute gradient of the cross-entropy with respect to a layer's input, ``(C, H, W)``.

    Args:
        model: Images to logits, in evaluation mode.
        layer: One of its weight maps.
        x: Images, ``(N, C, H, W)``.
        y: Labels, ``(N,)``.
    """
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1],)

    handle = layer.register_forward_pre_hook(keep)
    try:
        with torch.enable_grad():
            loss = cross_entropy(model(x), y).sum()
            (gradient,) = torch.autograd.grad(loss, inputs[0])
    finally:
        handle.remove()
    return gradient.abs().mean(dim=0).cpu()


def measure_layer(
    model: nn.Module, layer: WeightMap, x: Tensor, y: Tensor, level: float = 0.2, seed: int = 1
) -> Units:
    """Gains of one layer of a trained network.

    Noise is uniform in [-level, level], one draw, and not clipped to the box [D].

    Args:
        model: Images to logits, in evaluation mode.
        layer: One of its weight maps.
        x: Clean images, ``(N, C, H, W)``.
        y: Labels, ``(N,)``.
        level: Of the noise.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = (2.0 * torch.rand(x.shape, generator=generator) - 1.0) * level
    noisy = x + noise.to(x)

    a, b = record(model, layer, x)
    a_noisy, b_noisy = record(model, layer, noisy)
    sensitivity = sensitivity_at(model, layer, x[:500], y[:500])
    return measure_units(a, a_noisy, b, b_noisy, layer.map.cpu(), sensitivity)


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
    """Noise gain by the closed form against white noise put through the layer.

    Args:
        layer: Not a ``subtract`` variant.
        draws: How many noise features.
        seed: Of them.

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
