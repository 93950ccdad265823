"""Anybody's model as an evaluation needs it, and what is wrong with it found at the start."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, Dataset

from common.attacks.losses import cross_entropy, dlr, hinge_margin
from common.classifier import on_logits
from common.data.subset import lacking_classes, subset
from common.errors import ConfigurationError
from common.objectives import Batch, InnerLoss


class Victim(nn.Module):
    """A network with the losses that anybody can climb who sees its logits.

    Args:
        net: Images in [0, 1], ``(N, C, H, W)``, to logits ``(N, K)``.
        num_classes: K; the loss ``dlr_f`` exists from three classes on.
    """

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        logits: Tensor = self.net(x)
        return logits

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Cross-entropy, margin and difference of logits ratio; the network's own where it has.

        Anything with a method ``adaptive_losses`` (name to (model, batch) -> (x' -> loss)) declares
        what an attacker who knows it would climb; the model passed to them is the network.
        """
        losses = {"ce_f": on_logits(cross_entropy), "cw_f": on_logits(hinge_margin)}
        if self.num_classes >= 3:
            losses["dlr_f"] = on_logits(dlr)
        return losses


def as_victim(model: nn.Module, num_classes: int) -> nn.Module:
    """The model itself if it declares its losses, otherwise a :class:`Victim` around it."""
    return model if hasattr(model, "adaptive_losses") else Victim(model, num_classes)


# ------------------------------------------------------------------------------------------ data


def collect(data: Any, limit: int | None = None) -> Batch:
    """Examples as one batch on the CPU, with their ``position`` in the data.

    Args:
        data: ``(x, y)`` tensors, a data set of ``(image, label)``, or a loader of such batches or
            of dicts with ``x`` and ``y``.
        limit: Only so many, of all classes in proportion, see :func:`common.data.subset.subset`.
            Data with a length are passed through twice for it, so that no other images are kept;
            a stream gives its first ones.

    Raises:
        ConfigurationError: If that is not what it is, or there are no examples.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        batches: Iterable[Any] = [data]
    elif isinstance(data, Dataset):
        batches = DataLoader(data, batch_size=256)
    else:
        batches = data
    every = chosen = None
    if limit is not None and _is_finite(batches):
        every = torch.cat([torch.empty(0, dtype=torch.int64), *(y for _, y in _pairs(batches))])
        check_labels(every)
        chosen = subset(every, limit)
    x, y = _gathered(batches, chosen, limit)
    check_examples(x, y)
    if every is not None and chosen is not None:
        if bool((every[chosen] != y).any()):
            warnings.warn(
                f"the loader has another order every time, so that the {len(y)} examples taken are "
                "others for another model; give it shuffle=False",
                stacklevel=3,
            )
        elif lacking := lacking_classes(every, chosen):
            warnings.warn(lacking, stacklevel=3)
    elif limit is not None and len(y) == limit:
        warnings.warn(
            f"the {len(y)} examples taken are the first of a stream, of the classes "
            f"{', '.join(map(str, sorted(set(y.tolist()))))}; the rest may have others",
            stacklevel=3,
        )
    position = torch.arange(len(y)) if chosen is None else chosen
    return {"x": x.float(), "y": y.long(), "index": torch.arange(len(y)), "position": position}


def _gathered(
    batches: Iterable[Any], chosen: Tensor | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Images and labels at the chosen positions, or else the first ones."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    count = 0
    for x, y in _pairs(batches):
        begin, count = count, count + len(x)
        if chosen is not None:
            rows = chosen[(chosen >= begin) & (chosen < count)] - begin
            x, y = x[rows], y[rows]
        xs.append(x)
        ys.append(y)
        if chosen is None and limit is not None and count >= limit:
            break
    if count == 0:
        raise ConfigurationError("data has no examples")
    return torch.cat(xs)[:limit], torch.cat(ys)[:limit]


def _is_finite(batches: Any) -> bool:
    """Whether batches can be passed through again and come to an end."""
    try:
        return len(batches) >= 0 and iter(batches) is not batches
    except TypeError:
        return False


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
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
        yield x.detach().cpu(), torch.as_tensor(y).detach().cpu()


def check_examples(x: Tensor, y: Tensor) -> None:
    """Find images that are not in [0, 1] and labels that are not whole numbers.

    Raises:
        ConfigurationError: With what was found and what to do about it.
    """
    if x.ndim != 4 or len(x) != len(y) or y.ndim != 1:
        raise ConfigurationError(
            "images must have the shape (N, C, H, W) and labels (N,), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.is_floating_point():
        raise ConfigurationError(
            f"images must be floating-point numbers in [0, 1], got {x.dtype}; divide bytes by 255"
        )
    check_labels(y)
    if not torch.isfinite(x).all():
        raise ConfigurationError("images must be finite, found NaN or infinity")
    low, high = x.min().item(), x.max().item()
    if low < 0.0 or high > 1.0:
        if low >= 0.0:
            remedy = "they look like bytes: divide them by 255"
        else:
            remedy = (
                "they look normalised: take the normalisation out of the loader and put it in "
                "front of the network, nn.Sequential(Normalize(mean=..., std=...), net) with "
                "common.networks.normalize.Normalize; radii are in pixels"
            )
        raise ConfigurationError(
            f"images must lie in [0, 1], found values from {low:.4g} to {high:.4g}; {remedy}"
        )


def check_labels(y: Tensor) -> None:
    """Find labels that are not whole numbers from 0.

    Raises:
        ConfigurationError: With what was found.
    """
    if y.is_floating_point() or y.is_complex():
        raise ConfigurationError(f"labels must be whole numbers, got {y.dtype}")
    if len(y) and y.min() < 0:
        raise ConfigurationError(f"labels must count from 0, found {int(y.min())}")


# ----------------------------------------------------------------------------------------- model


def check_model(
    model: nn.Module,
    examples: Batch,
    num_classes: int | None = None,
    *,
    is_random_expected: bool = False,
    device: torch.device | None = None,
) -> int:
    """Find out in a few forward passes what would falsify every figure.

    Args:
        model: Images to logits.
        examples: ``x`` and ``y``.
        num_classes: How many classes the data have, where that is known.
        is_random_expected: Whether attacks average over a random forward pass.
        device: Where to compute.

    Returns:
        How many classes the model has.

    Raises:
        ConfigurationError: For layers in training mode, another number of classes, probabilities
            instead of logits, other outputs than ``(N, K)``, numbers that are not finite.
    """
    check_modes(model)
    x, y = examples["x"][:64].to(device), examples["y"]
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.dtype != torch.float32:
        raise ConfigurationError(
            f"robustness is measured in float32 and the model's parameters are {parameter.dtype}; "
            "call model.float()"
        )
    with torch.no_grad():
        try:
            logits = model(x)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"the model cannot take images of shape {'x'.join(map(str, x.shape[1:]))} "
                f"(channels x height x width) as float32 on {x.device}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        classes = _check_logits(logits, len(x), y, num_classes)
        again, alone = model(x), model(x[:1])
    if not torch.isfinite(logits).all():
        raise ConfigurationError("the model's logits contain NaN or infinity on clean images")
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5) and not is_random_expected:
        warnings.warn(
            "two forward passes over the same images differ by "
            f"{(logits - again).abs().max().item():.3g}: the model draws random numbers. Attack it "
            "through their expectation (eot: 20 in the suite's entries, AutoAttack version rand), "
            "or its robustness is overestimated",
            stacklevel=3,
        )
    elif not torch.allclose(logits[:1], alone, rtol=1e-3, atol=1e-3) and not is_random_expected:
        raise ConfigurationError(
            "the prediction for an image depends on the images beside it "
            f"(logits differ by {(logits[:1] - alone).abs().max().item():.3g}); give batch-norm "
            "layers running statistics (track_running_stats=True)"
        )
    _check_accuracy(logits, y[: len(x)], classes)
    return classes


def check_modes(model: nn.Module) -> None:
    """Find layers that would behave as in training.

    Raises:
        ConfigurationError: Naming them.
    """
    awake = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training and isinstance(module, _BatchNorm | _DropoutNd | nn.RReLU)
    ]
    if awake:
        raise ConfigurationError(
            f"layers of the model are in training mode ({', '.join(awake[:5])}"
            f"{', ...' if len(awake) > 5 else ''}), so predictions would depend on the batch or on "
            "chance; call model.eval() first"
        )


def _check_logits(logits: Any, n: int, y: Tensor, num_classes: int | None) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"the model must return logits of shape ({n}, K) for {n} images, got {what}; wrap it "
            "in a module that returns the logits alone"
        )
    classes = logits.shape[1]
    if num_classes is not None and classes != num_classes:
        raise ConfigurationError(
            f"the model returns {classes} scores per image and the data have {num_classes} "
            "classes; give the weights and data that belong together"
        )
    if classes <= int(y.max()):
        raise ConfigurationError(
            f"the model returns {classes} scores per image and there are labels up to "
            f"{int(y.max())}; give the weights and data that belong together"
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0.0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ConfigurationError(
            "the model returns probabilities (every row is non-negative and sums to 1), attacks "
            "need logits: gradients through a saturated softmax vanish and fake robustness; take "
            "the softmax off its end"
        )
    return classes


def _check_accuracy(logits: Tensor, y: Tensor, classes: int) -> None:
    """Warn where the model may be fed something other than it was trained on."""
    right = int((logits.argmax(dim=1).cpu() == y).sum())
    chance, n = 1.0 / classes, len(y)
    if n >= 32 and right <= n * chance + 2.0 * math.sqrt(n * chance * (1.0 - chance)):
        warnings.warn(
            f"only {right} of the first {n} clean images are classified correctly, which is about "
            "chance; does the model expect normalised images (put Normalize(mean=..., std=...) in "
            "front of it) or another order of the classes?",
            stacklevel=4,
        )


def class_names(names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """The names, or numbers where there are none."""
    return names if names is not None else [str(label) for label in range(num_classes)]
