"""The images and labels of an evaluation, and their check."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from common.data.subset import lacking_classes, subset
from common.errors import ConfigurationError, UserError
from common.evaluation.images import READ, Examples, Gathering, Images

ROUNDING = 1e-5
"""Pixels this far outside [0, 1] are clamped silently."""
OVERSHOOT = 0.25
"""Bicubic and Lanczos resampling leave [0, 1] by less than this."""


def collect(data: Any, limit: int | None = None) -> Examples:
    """Examples on the CPU, with their ``position`` in the data.

    Tensors stay as they are. Of other data, images are kept in memory up to
    :data:`common.evaluation.images.IN_MEMORY`; more are read by rows, see
    :mod:`common.evaluation.images`.

    Args:
        data: Tensors ``(x, y)`` or in a dict with ``x`` and ``y``, a data set of such examples, or
            a loader of such batches.
        limit: This number, of all classes in proportion, see :func:`common.data.subset.subset`.
            Data with a length are read twice for it, so that no other images are kept; a stream
            gives its first ones.

    Raises:
        ConfigurationError: If the data have another form, or no examples.
    """
    is_pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)
    is_set = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    batches: Iterable[Any] = data
    if is_pair or isinstance(data, Mapping):
        batches = [data]
    elif isinstance(data, Dataset):
        batches = DataLoader(data, batch_size=READ)
    every = chosen = None
    if limit is not None and _is_finite(batches):
        every = torch.cat([torch.empty(0, dtype=torch.int64), *(y for _, y in _pairs(batches))])
        chosen = subset(every, limit)
    x: Tensor | Images
    if is_pair or isinstance(data, Mapping):
        given, y = pair_of(data)
        if chosen is not None and len(given) == len(y):
            given, y = given[chosen], y[chosen]
        x = check_examples(given, y)
    elif is_set:
        examples = data if chosen is None else Subset(data, chosen.tolist())
        x, y = _gathered(DataLoader(examples, batch_size=READ), None, None, examples)
    else:
        x, y = _gathered(batches, chosen, limit)
    for remark in filter(None, [_remark(y, every, chosen, limit)]):
        warnings.warn(remark, stacklevel=3)
    position = torch.arange(len(y)) if chosen is None else chosen
    return {"x": x, "y": y, "index": torch.arange(len(y)), "position": position}


def _remark(y: Tensor, every: Tensor | None, chosen: Tensor | None, limit: int | None) -> str:
    """What the examples taken say nothing about, as a sentence; empty if nothing is to be said."""
    if every is not None and chosen is not None:
        if not torch.equal(every[chosen], y):
            return (
                f"the loader has another order every time, so that the {len(y)} examples taken are "
                "others for another model; give it shuffle=False"
            )
        return lacking_classes(every, chosen)
    if limit is not None and len(y) == limit:
        return (
            f"the {len(y)} examples taken are the first of a stream, of the classes "
            f"{', '.join(map(str, sorted(set(y.tolist()))))}; the rest may have others"
        )
    return ""


def _gathered(
    batches: Iterable[Any],
    chosen: Tensor | None,
    limit: int | None,
    examples: Dataset[Any] | None = None,
) -> tuple[Tensor | Images, Tensor]:
    """Images and labels at the chosen positions, or else the first ones; of a data set, if any."""
    images = Gathering(None if examples is None else partial(_read, examples))
    labels: list[Tensor] = []
    count = taken = 0
    for x, y in _pairs(batches):
        begin, count = count, count + len(x)
        if chosen is not None:
            rows = chosen[(chosen >= begin) & (chosen < count)] - begin
            x, y = x[rows], y[rows]
        elif limit is not None:
            x, y = x[: limit - taken], y[: limit - taken]
        if len(x):
            images.add(check_examples(x, y))
            labels.append(y)
            taken += len(y)
        if chosen is None and taken == limit:
            break
    return images.images(), torch.cat(labels)


def _read(examples: Dataset[Any], rows: list[int]) -> Tensor:
    """Images of a data set at these positions."""
    # With a generator of its own the loader draws no number from torch's.
    loader = DataLoader(Subset(examples, rows), len(rows), generator=torch.Generator())
    ((x, y),) = _pairs(loader)
    return check_examples(x, y)


def _is_finite(batches: Any) -> bool:
    """Whether batches can be passed through again and come to an end."""
    try:
        return len(batches) >= 0 and iter(batches) is not batches
    except TypeError:
        return False


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of every batch; an error of a reader becomes one line."""
    try:
        for batch in batches:
            yield pair_of(batch)
    except UserError:
        raise
    except Exception as error:  # foreign code fails in any way
        reason = (str(error).splitlines() or [""])[-1]  # a worker's ends with the error itself
        remedy = "; images need torchvision.transforms.ToTensor()" if "PIL" in reason else ""
        raise ConfigurationError(
            f"the data cannot be read: {type(error).__name__}: {reason}{remedy}"
        ) from error


def pair_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch on the CPU; a ConfigurationError if it has another form."""
    x = y = None
    if isinstance(batch, Mapping):
        x, y = batch.get("x"), batch.get("y")
    elif isinstance(batch, tuple | list) and len(batch) >= 2:
        x, y = batch[:2]
    if not isinstance(x, Tensor) or x.ndim != 4:
        found = f"images of the shape {tuple(getattr(x, 'shape', ()))}"
        if not isinstance(x, Tensor):
            kind = type(batch if x is None else x).__name__
            found = f"a {kind}; images need torchvision.transforms.ToTensor()"
        raise ConfigurationError(
            "data must be tensors (x, y) with x of the shape (N, C, H, W), a data set of "
            "(image tensor, label), or a loader of such batches or of dicts with x and y, got "
            f"{found}"
        )
    try:
        labels = torch.as_tensor(y).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigurationError(f"labels must be whole numbers, got {y!r:.80}") from None
    return x.detach().cpu(), as_labels(labels)


def check_examples(x: Tensor, y: Tensor) -> Tensor:
    """Images in float32; values outside [0, 1] by no more than rounding are clamped.

    Images that need no change are returned as they are, not copied.
    """
    if x.ndim != 4 or len(x) != len(y) or x.numel() == 0:
        raise ConfigurationError(
            "images must have the shape (N, C, H, W) and labels (N,), none of them empty, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.is_floating_point():
        raise ConfigurationError(
            f"images must be floating-point numbers in [0, 1], got {x.dtype}; divide bytes by 255"
        )
    if x.layout != torch.strided:
        raise ConfigurationError(f"images must be dense, got {x.layout}; give x.to_dense()")
    tolerance = max(ROUNDING, 2.0 * torch.finfo(x.dtype).eps)
    low, high = (bound.item() for bound in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigurationError("images must be finite, found NaN or infinity")
    x = x.float()
    if low < -tolerance or high > 1.0 + tolerance:
        raise ConfigurationError(
            f"images must lie in [0, 1], found values from {low:.6g} to {high:.6g}; "
            f"{_remedy(x, low, high)}"
        )
    return x if low >= 0.0 and high <= 1.0 else x.clamp(0.0, 1.0)


def as_labels(y: Tensor) -> Tensor:
    """Labels as int64 ``(N,)``, from whole numbers of any type, ``(N,)`` or ``(N, 1)``."""
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        hint = "; if they are one-hot, give y.argmax(dim=1)" if y.ndim == 2 else ""
        raise ConfigurationError(f"labels must have the shape (N,), got {tuple(y.shape)}{hint}")
    labels = torch.zeros_like(y, dtype=torch.int64) if y.is_complex() else y.long()
    if not torch.equal(labels.to(y.dtype), y):
        raise ConfigurationError(f"labels must be whole numbers, got {y[:5].tolist()} ({y.dtype})")
    if len(y) and labels.min() < 0:
        raise ConfigurationError(f"labels must count from 0, found {int(labels.min())}")
    return labels


def _remedy(x: Tensor, low: float, high: float) -> str:
    """What to do about pixels of this range."""
    resampled = "resampling (bicubic, Lanczos) overshoots: clamp images to [0, 1] after resizing"
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
