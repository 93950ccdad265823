"""The images and labels of an evaluation, and what is wrong with them found at the start."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import ConfigurationError
from common.objectives import Batch

ROUNDING = 1e-5
"""Pixels this far outside [0, 1] are brought back without a word."""
OVERSHOOT = 0.25
"""Bicubic and Lanczos resampling leave [0, 1] by less than this."""


def collect(data: Any, limit: int | None = None) -> Batch:
    """All examples as one batch on the CPU.

    Args:
        data: ``(x, y)`` tensors, a data set of ``(image, label)``, or a loader of such batches or
            of dicts with ``x`` and ``y``.
        limit: Only the first so many.

    Raises:
        ConfigurationError: If that is not what it is, or there are no examples.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        batches: Iterable[Any] = [data]
    elif isinstance(data, Dataset):
        batches = DataLoader(data, batch_size=256)
    else:
        batches = data
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    count = 0
    for batch in batches:
        try:
            x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else batch[:2]
        except (KeyError, TypeError, ValueError, IndexError):
            x = y = None
        if not isinstance(x, Tensor):
            raise ConfigurationError(
                "data must be tensors (x, y), a data set of (image tensor, label), or a loader of "
                f"such batches or of dicts with x and y, got a {type(batch).__name__}; images need "
                "torchvision.transforms.ToTensor()"
            )
        xs.append(x.detach().cpu())
        ys.append(torch.as_tensor(y).detach().cpu())
        count += len(x)
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise ConfigurationError("data has no examples")
    x, y = check_examples(torch.cat(xs)[:limit], torch.cat(ys)[:limit])
    return {"x": x, "y": y, "index": torch.arange(len(y))}


def check_examples(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images in float32 and [0, 1], labels as int64.

    Rounding errors outside [0, 1] are clamped; labels may be whole numbers of any type.

    Raises:
        ConfigurationError: With what was found and what to do about it.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.squeeze(1)
    if x.ndim != 4 or len(x) != len(y) or y.ndim != 1:
        hint = "; are the labels one-hot? Give y.argmax(dim=1)" if y.ndim == 2 else ""
        raise ConfigurationError(
            "images must have the shape (N, C, H, W) and labels (N,), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}{hint}"
        )
    if not x.is_floating_point():
        raise ConfigurationError(
            f"images must be floating-point numbers in [0, 1], got {x.dtype}; divide bytes by 255"
        )
    if not torch.isfinite(x).all():
        raise ConfigurationError("images must be finite, found NaN or infinity")
    labels = y.long() if not y.is_complex() else torch.zeros(0)
    if not torch.equal(labels.to(y.dtype), y):
        raise ConfigurationError(f"labels must be whole numbers, got {y[:5].tolist()} ({y.dtype})")
    tolerance = max(ROUNDING, 2.0 * torch.finfo(x.dtype).eps)
    x = x.float()
    low, high = x.min().item(), x.max().item()
    if low < -tolerance or high > 1.0 + tolerance:
        raise ConfigurationError(
            f"images must lie in [0, 1], found values from {low:.6g} to {high:.6g}; "
            f"{_remedy(x, low, high)}"
        )
    if labels.min() < 0:
        raise ConfigurationError(f"labels must count from 0, found {int(labels.min())}")
    return x.clamp(0.0, 1.0), labels


def _remedy(x: Tensor, low: float, high: float) -> str:
    """What the range of the pixels suggests, and what to do about it."""
    resampled = (
        "resampling (bicubic, Lanczos) overshoots by as much: clamp images to [0, 1] after resizing"
    )
    if low < -OVERSHOOT or (low < 0.0 and high > 1.0 + OVERSHOOT):
        return (
            "they look normalised: take the normalisation out of the loader and put it in "
            "front of the network, nn.Sequential(Normalize(mean=..., std=...), net) with "
            "common.networks.normalize.Normalize; radii are in pixels"
        )
    if low < 0.0:
        shifted = "" if high > 1.0 else ", or a mean was subtracted, which belongs into the network"
        return resampled + shifted
    if high > 256.0:
        return "they look like integers of 16 bits: divide them by 65535"
    if high > 2.0:
        return "they look like bytes: divide them by 255"
    some = x.flatten()[:: max(x.numel() // 100_000, 1)]
    for divisor in range(254, 127, -1):
        if high * divisor < 255.5 and bool(((some * divisor).frac() - 0.5).abs().gt(0.499).all()):
            return f"they look like bytes divided by {divisor}: divide them by 255"
    if high > 1.0 + OVERSHOOT:
        return "scale them by their largest possible value"
    return f"{resampled}; if bytes were divided by less than 255, divide them by 255"
