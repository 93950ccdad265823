"""The check of a model before an evaluation: what would make every result meaningless.

It takes a few forward passes of copies, so the model stays as it is.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from common.attacks.losses import classify
from common.attacks.pgd import input_gradient
from common.attacks.randomness import seeded
from common.errors import ConfigurationError
from common.evaluation.history import changed, copied, is_close, state_of
from common.evaluation.images import Examples
from common.evaluation.measures import cost
from common.modes import frozen
from common.objectives import Batch, InnerLoss

TOLERANCE = 1e-4
"""Scores that differ by less than this share of the largest are the same."""
ALONE = 1e-3
"""The same for an image on its own and in a batch, which are computed in another order."""
IMAGES = 64


@dataclass(frozen=True)
class Checked:
    """What is known of a model before it is attacked.

    ``has_gradient``: its scores or a loss can be differentiated by the images. ``state``: what
    depends on earlier calls, as a sentence; empty if nothing does. ``suspicions``: reasons to doubt
    the results, as sentences. ``cost``: see :func:`common.evaluation.measures.cost`.
    """

    classes: int
    has_gradient: bool = True
    state: str = ""
    suspicions: tuple[str, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict, compare=False)


def check_model(
    model: nn.Module,
    examples: Examples,
    num_classes: int | None = None,
    *,
    is_random_expected: bool = False,
    batch_size: int = IMAGES,
    device: torch.device | None = None,
) -> Checked:
    """Check a model, which is left as it is, in a few passes on ``device``.

    Raises:
        ConfigurationError: For modules in training mode, another number of classes, probabilities
            instead of logits, other outputs than ``(N, K)``, half precision, scores that are not
            finite on any image, predictions that depend on other images of a batch.
    """
    _check_parameters(model)
    x, y = examples["x"][:IMAGES].to(device), examples["y"]
    suspicions = []
    with torch.inference_mode(False):
        used = _Trial(model)
        logits = _first(used, x)
        classes = _check_logits(logits, len(x), y, num_classes)
        if any(map(is_lazy, model.parameters())):
            raise ConfigurationError(
                "the model has lazy layers without weights; load its weights, or call it once"
            )
        _check_modes(model, x)
        if not torch.isfinite(logits).all(dim=1).any():
            raise ConfigurationError(
                "the model's logits contain NaN or infinity for every clean image; where it masks "
                "classes, do so with a large negative number"
            )
        is_random, state = _repeats(model, used, x, logits)
        if is_random and not is_random_expected:
            suspicions.append(
                "two forward passes over the same images differ: the model draws random numbers. "
                "Attack it through their expectation (eot: 20 in the suite's entries, AutoAttack "
                "version rand), or its robustness is overestimated"
            )
        if not is_random and not state:
            _check_alone(used, x, examples["x"][:batch_size].to(device))
        batch = {"x": x, "y": y[: len(x)].to(x.device)}
        has_gradient = _has_gradient(_Trial(model), batch, classes)
        with seeded(0, x.device):
            found = cost(_Trial(model).model, x[0].clone())
    suspicions += _at_chance(logits, y[: len(x)], classes)
    state = "" if is_random_expected else state
    return Checked(classes, has_gradient, state, tuple(suspicions), found)


def _check_modes(model: nn.Module, x: Tensor) -> None:
    """Refuse modules that compute something else, or move their buffers, in training mode."""
    awake = [name for name, module in model.named_modules() if module.training]
    if not awake:
        return
    expected = _Trial(model)(x)
    if not _acts(model, awake, x, expected):
        return
    acting = (name for name in awake if _acts(model, [name], x, expected))
    names = [name or type(model).__name__ for name in itertools.islice(acting, 6)]
    raise ConfigurationError(
        f"layers of the model are in training mode ({', '.join(names[:5]) or 'all together'}"
        f"{', ...' if len(names) > 5 else ''}), so predictions would depend on the batch or on "
        "chance; call model.eval() first"
    )


def _acts(model: nn.Module, names: list[str], x: Tensor, expected: Tensor) -> bool:
    """Whether training mode of these modules changes scores or buffers of one pass."""
    trial = _Trial(model)
    before = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
    for name in names:
        trial.model.get_submodule(name).training = True
    try:
        found = trial(x)
    except ValueError:  # batch-norm refuses a single value per channel
        return True
    after = dict(trial.model.named_buffers())
    pairs = [(found, expected), *((before[name], after[name]) for name in before)]
    return not all(_same(one, other) for one, other in pairs)


class _Trial:
    """A copy of a model in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copied(model).eval()

    def __call__(self, x: Tensor, seed: int = 0) -> Any:
        """The scores of a pass with these random numbers."""
        with torch.no_grad(), seeded(seed, x.device):
            logits = self.model(x.clone())
        return logits.clone() if isinstance(logits, Tensor) else logits


def _check_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ConfigurationError(
                f"robustness is measured in float32 and the model's parameters are "
                f"{parameter.dtype}; call model.float()"
            )


def _first(used: _Trial, x: Tensor) -> Any:
    try:
        return used(x)
    except Exception as error:  # foreign code fails in any way
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigurationError(
            f"the model cannot take images of shape {'x'.join(map(str, x.shape[1:]))} "
            f"(channels x height x width) as float32 on {x.device}: {lines[0]}"
        ) from error


def _repeats(model: nn.Module, used: _Trial, x: Tensor, first: Tensor) -> tuple[bool, str]:
    """Whether scores depend on chance, and what depends on earlier calls, as a sentence."""
    again, other = used(x), used(x, seed=1)
    if not _same(first, again):
        if not _same(_Trial(model)(x), first):
            return True, ""
        return False, (
            "the scores for the same images change from one call to the next, by a memory or by a "
            "private random generator"
        )
    if not _same(again, other):
        return True, ""
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(x.shape[1:], generator=generator).sign().to(x)
    used((x + noise).clamp(0.0, 1.0))
    query = (x - noise).clamp(0.0, 1.0)
    fresh = _Trial(model)
    if not _same(used(query), fresh(query)):
        return False, "the scores for an image depend on the images before it"
    if places := changed(state_of(used.model), state_of(fresh.model), TOLERANCE):
        return False, f"{places[0]} depends on how often the model was called"
    return False, ""


def _same(one: Tensor, other: Tensor) -> bool:
    return is_close(one, other, TOLERANCE)


def _check_alone(used: _Trial, x: Tensor, chunk: Tensor) -> None:
    """Compare the scores of an image by itself, among few others and in a whole chunk."""
    batched = used(x)[:1]
    sizes = [x[:1], chunk] if len(chunk) > len(x) else [x[:1]]
    found = [used(part)[:1] for part in sizes]
    alone = next((z for z in found if not is_close(batched, z, ALONE)), batched)
    if not is_close(batched, alone, ALONE):
        raise ConfigurationError(
            "the prediction for an image depends on the images beside it "
            f"(logits differ by {(batched - alone).abs().max().item():.3g}); give batch-norm "
            "layers running statistics (track_running_stats=True)"
        )


def _has_gradient(trial: _Trial, batch: Batch, classes: int) -> bool:
    """Whether scores, or a loss that the model declares, can be differentiated by the images.

    A zero gradient counts as one: attacks notice it and report that they are no evidence.
    """
    x = batch["x"]
    weights = torch.arange(1, classes + 1, device=x.device).cos()
    model: Any = trial.model
    losses: list[InnerLoss] = [lambda m, _: lambda x: (m(x.clone()) * weights).sum(dim=1)]
    if hasattr(model, "adaptive_losses"):
        losses += model.adaptive_losses().values()
    with frozen(model), torch.enable_grad(), seeded(0, x.device):
        for inner in losses:
            try:
                input_gradient(inner(model, batch), x.clone())
                return True
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError):  # no_grad, inference mode, numpy
                continue
    return False


def _check_logits(logits: Any, n: int, y: Tensor, num_classes: int | None) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"the model must return logits of shape ({n}, K) for {n} images, got {what}; wrap it "
            "in a module that returns the logits alone"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        raise ConfigurationError(
            f"robustness is measured in float32 and the model's scores are {logits.dtype}; take "
            "autocast or half precision out of the model"
        )
    if logits.layout != torch.strided or logits.dtype == torch.bool or logits.is_complex():
        raise ConfigurationError(
            "the model must return logits as a dense tensor of real numbers, got "
            f"{logits.dtype} ({logits.layout})"
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
            f"{', or subtract 1 from labels that count from 1' if int(y.min()) == 1 else ''}"
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0.0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ConfigurationError(
            "the model returns probabilities (every row is non-negative and sums to 1), attacks "
            "need logits: gradients through a saturated softmax vanish and fake robustness; take "
            "the softmax off its end"
        )
    return classes


def _at_chance(logits: Tensor, y: Tensor, classes: int) -> Iterator[str]:
    """Whether the model may expect other images than it gets, as a sentence."""
    right = int((classify(logits).cpu() == y).sum())
    chance, n = 1.0 / classes, len(y)
    if n >= 32 and right <= n * chance + 2.0 * math.sqrt(n * chance * (1.0 - chance)):
        yield (
            f"only {right} of the first {n} clean images are classified correctly, which is about "
            "chance; does the model expect normalised images (put Normalize(mean=..., std=...) in "
            "front of it) or another order of the classes?"
        )
