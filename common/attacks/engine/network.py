"""The attack-side network: the model's function, cheaper to differentiate by x.

During an attack a network's weights are fixed. Its convolutions are replaced by stand-ins with
batch-norm folded in, another memory layout, bfloat16 weights, or, on a CPU, computed by products of
matrices; afterwards it is restored.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.attacks.engine.choices import Choice, choices_of
from common.attacks.engine.compiled import Compiled, CompileMode
from common.attacks.engine.factors import FactorConv2d, geometry_of, takes_factors
from common.attacks.engine.folding import (
    NORMS,
    Pair,
    aside,
    check_mode,
    foldable,
    folded_weights,
    has_hooks,
    settings_of,
)
from common.attacks.engine.products import ProductConv2d
from common.attacks.settings import Settings
from common.errors import ConfigurationError, check_choice

Precision = Literal["32", "bf16"]

_LOG = logging.getLogger(__name__)


class AttackEngine(Settings):
    """How the forward and backward passes of an attack are computed.

    In float32 the results are those of the plain network up to rounding. In ``bf16`` some gradient
    signs differ (4 % on an untrained ResNet-18): training gives other weights, and an evaluation
    has to confirm successes (:mod:`common.evaluation.confirm`).

    Args:
        fold: Fold eval-mode batch-norm into the convolution before it, where that feeds nothing
            else.
        channels_last: Keep the stand-ins' weights, and so the activations, in the layout ``NHWC``;
            on a CPU, in float32 and float64, convolutions of small maps are then matrix products.
        precision: ``32`` uses the network's type or that of the surrounding autocast; ``bf16``
            keeps weights and activations in bfloat16, pixels and losses in float32, which is faster
            on hardware with bfloat16 units.
        compile: Mode in which the attack's passes are compiled; ``None`` for none. The first step
            then takes from half a minute to several.
        winograd: On a CPU, in float32 and float64, compute wide 3x3 convolutions with fewer
            multiplications and up to six times the rounding error.
    """

    def __init__(
        self,
        fold: bool = True,
        channels_last: bool = True,
        precision: Precision = "32",
        compile: CompileMode | None = None,
        winograd: bool = True,
    ) -> None:
        check_choice("precision of an attack engine", precision, Precision)
        if compile is not None:
            check_choice("compile", compile, CompileMode)
        self.fold = fold
        self.channels_last = channels_last
        self.precision: Precision = precision
        self.compile: CompileMode | None = compile
        self.winograd = winograd
        self._plans = _Plans()

    @property
    def is_reduced(self) -> bool:
        """Whether results have to be confirmed in float32."""
        return self.precision != "32"

    def in_float32(self) -> "AttackEngine":
        """The same engine in float32; itself if it is not reduced."""
        if not self.is_reduced:
            return self
        if self._plans.full is None:
            self._plans.full = self.but(precision="32")
        return self._plans.full

    @contextmanager
    def applied(self, model: nn.Module, x: Tensor) -> Iterator[None]:
        """Let the model compute by the attack-side network until the end of the block.

        The model is in eval mode, and its parameters require no gradients. A new network is tested
        on the first two images of x ``(N, C, H, W)``.

        Raises:
            ValueError: If a batch-norm to be folded is in training mode.
            ConfigurationError: If images in float64 are to be attacked in bfloat16.
        """
        if self.is_reduced and x.dtype == torch.float64:
            raise ConfigurationError(
                "an attack engine in bf16 takes images in float32, got float64; use precision 32"
            )
        plan = self._plan(model, x)
        plan.refresh()
        with plan.swapped(), self._reduced(x.device):
            yield

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function in this engine's precision, with float32 results, where autocast is off."""
        if not self.is_reduced:
            return function

        def wrapped(x: Tensor, *args: Any) -> Any:
            with self._reduced(x.device):
                found = function(x, *args)
            return tuple(map(_widened, found)) if isinstance(found, tuple) else _widened(found)

        return wrapped

    def __repr__(self) -> str:
        """As it stands in results."""
        parts = [name for name in ("fold", "channels_last") if getattr(self, name)]
        parts += ["winograd"] if self.winograd and not self.is_reduced else []
        parts += [self.precision, *([f"compile={self.compile}"] if self.compile else [])]
        return f"AttackEngine({', '.join(parts)})"

    def _reduced(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if self.is_reduced else nullcontext()

    def _plan(self, model: nn.Module, x: Tensor) -> "_Plan":
        plan = self._plans.of.get(model)
        if plan is None or not plan.fits():
            pairs, choices = _tried_out(model, x, self)
            plan = _Plan(model, pairs, self, choices)
            _LOG.info("%s folds %d batch-norms", self, len(pairs))
            self._plans.of[model] = plan
        return plan


class _Plans:
    """Stand-ins by model; not copied or pickled with the engine."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
        self.full: AttackEngine | None = None

    def __deepcopy__(self, memo: Any) -> "_Plans":
        return _Plans()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plans, ()


class _Plan:
    """The stand-ins of one model."""

    def __init__(
        self, model: nn.Module, pairs: list[Pair], engine: AttackEngine, choices: dict[int, Choice]
    ) -> None:
        self.pairs = pairs
        self._dtype = torch.bfloat16 if engine.is_reduced else None
        self._layout = torch.channels_last if engine.channels_last else torch.contiguous_format
        paired = {id(pair.conv): pair for pair in pairs}
        is_other = engine.channels_last or engine.is_reduced
        self._sources = [
            paired.get(id(module)) or Pair(module)
            for module in model.modules()
            if type(module) is nn.Conv2d
            and (
                id(module) in paired
                or ((is_other or id(module) in choices) and not has_hooks(module))
            )
        ]
        self._convs = [_stand_in(conv, engine, choices.get(id(conv))) for conv, _ in self._sources]
        new: dict[int, nn.Module] = {id(pair.norm): _PassThrough(pair.norm) for pair in pairs}
        for (conv, _), stand_in in zip(self._sources, self._convs, strict=True):
            new[id(conv)] = stand_in
        self._slots = [
            (weakref.ref(parent), name, child, new[id(child)])
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None and id(child) in new
        ]
        self._compiled = Compiled(model, engine.compile)
        self._model = weakref.ref(model)
        self._settings = settings_of(model)

    def fits(self) -> bool:
        """Whether the model's modules, their settings and hooks are unchanged, stand-ins too."""
        is_there = all(
            (parent := ref()) is not None and parent._modules.get(name) is original
            for ref, name, original, _ in self._slots
        )
        are_alike = all(
            geometry_of(conv) == geometry_of(stand_in)
            for (conv, _), stand_in in zip(self._sources, self._convs, strict=True)
        )
        model = self._model()
        return is_there and are_alike and model is not None and settings_of(model) == self._settings

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Update the stand-ins' weights in place.

        Always: writes through ``.data`` (weight perturbation, averaging) do not change a tensor's
        version. It costs a fraction of a pass.
        """
        for source, conv in zip(self._sources, self._convs, strict=True):
            weight, bias = folded_weights(source)
            values = {"weight": weight, "bias": bias}
            if isinstance(conv, FactorConv2d) and takes_factors(weight):
                values = conv.prepared(weight, bias)
            for name in values.keys() | conv._parameters.keys():
                self._put(conv, name, values.get(name))

    def _put(self, conv: nn.Module, name: str, value: Tensor | None) -> None:
        kept = conv._parameters.get(name)
        if value is None:
            conv._parameters[name] = None
            return
        dtype = self._dtype or value.dtype
        if kept is None or kept.device != value.device or kept.dtype != dtype:
            layout = self._layout if value.ndim == 4 else torch.contiguous_format
            empty = torch.empty(value.shape, dtype=dtype, device=value.device, memory_format=layout)
            kept = nn.Parameter(empty, requires_grad=False)
            conv._parameters[name] = kept
        kept.copy_(value)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the stand-ins in place, and restore the originals at the end."""
        try:
            for ref, name, _, stand_in in self._slots:
                ref()._modules[name] = stand_in  # type: ignore[union-attr]  # checked by fits
            with self._compiled.used():
                yield
        finally:
            for ref, name, original, _ in self._slots:
                if (parent := ref()) is not None:
                    parent._modules[name] = original
            if not self._compiled.is_used:  # compiled graphs need the same memory every time
                for conv in self._convs:
                    conv._parameters.clear()


def _stand_in(conv: nn.Conv2d, engine: AttackEngine, choice: Choice | None) -> nn.Conv2d:
    """A convolution of the same geometry, without weights."""
    made: Any = copy.copy(conv)
    made._parameters = {}
    if choice is not None:
        made.__class__, planned = choice
        if choice[0] is ProductConv2d:
            made.maps = planned
        else:
            made.tile, made.is_contiguous = planned, not engine.channels_last
    elif engine.is_reduced:
        made.__class__ = _ReducedConv2d
    stand_in: nn.Conv2d = made.eval()
    return stand_in


class _ReducedConv2d(nn.Conv2d):
    """With weights in bfloat16, whose output has the input's type where autocast is off."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class _PassThrough(nn.Identity):
    """Replaces a folded norm, whose parameters and statistics can still be read."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["_norm"] = norm  # not a child
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_norm"], name)


def _widened(found: Any) -> Any:
    return found.float() if isinstance(found, Tensor) and found.is_floating_point() else found


def _tried_out(
    model: nn.Module, x: Tensor, engine: AttackEngine
) -> tuple[list[Pair], dict[int, Choice]]:
    """The pairs that can be folded, and how convolutions are computed, by their identity.

    Passes and tracing use a copy, since forward methods may change a module.
    """
    folds = engine.fold and any(isinstance(module, NORMS) for module in model.modules())
    has_choice = (
        (engine.channels_last or engine.winograd)
        and not engine.is_reduced
        and x.device.type == "cpu"
        and any(type(module) is nn.Conv2d for module in model.modules())
    )
    if not folds and not has_choice:
        return [], {}
    try:
        with aside(x.device):
            trial = copy.deepcopy(model)
    except Exception as error:  # a model may have parts of any kind
        _warn(model, f"it cannot be copied ({type(error).__name__}: {error})")
        return [], {}
    choices = choices_of(trial, x, engine.channels_last, engine.winograd) if has_choice else {}
    pairs = _pairs_of(model, trial, x) if folds else []
    return pairs, {id(model.get_submodule(name)): choice for name, choice in choices.items()}


def _pairs_of(model: nn.Module, trial: nn.Module, x: Tensor) -> list[Pair]:
    """The pairs that can be folded; none if the outputs of the copy then differ."""
    of = model.get_submodule
    try:
        with aside(x.device):
            copied = foldable(trial)
        names = {id(module): name for name, module in trial.named_modules()}
        pairs = [
            Pair(cast(nn.Conv2d, of(names[id(conv)])), of(names[id(norm)])) for conv, norm in copied
        ]
        is_skipped = not pairs or any(pair.norm.training for pair in pairs)
        is_equal = is_skipped or _is_equal(trial, copied, x[:2])
    except Exception as error:  # of anybody's forward method
        _warn(model, f"folding could not be tried out ({type(error).__name__}: {error})")
        return []
    for pair in pairs:
        check_mode(pair)
    if not is_equal:
        _warn(model, "folding its batch-norms changes what it computes")
    return pairs if is_equal else []


def _warn(model: nn.Module, reason: str) -> None:
    _LOG.warning("attacks use %s as it is: %s", type(model).__name__, reason)


def _is_equal(trial: nn.Module, pairs: list[Pair], x: Tensor) -> bool:
    """Whether folding leaves the outputs of a copy unchanged.

    The copy gets random statistics and scales: zeros and ones would hide an error.
    """
    with aside(x.device):
        generator = torch.Generator().manual_seed(0)
        for module in trial.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _randomise(module, generator)
        plan = _Plan(trial, pairs, AttackEngine(channels_last=False, winograd=False), {})

        def outputs(is_ascent: bool) -> list[Any]:
            torch.manual_seed(0)
            with torch.set_grad_enabled(is_ascent):
                return tree_leaves(trial(x.clone().requires_grad_(is_ascent).clone()))

        modes = (False, True) if x.is_floating_point() else (False,)  # forward may ask for it
        wanted = [leaf for mode in modes for leaf in outputs(mode)]
        plan.refresh()
        with plan.swapped():
            got = [leaf for mode in modes for leaf in outputs(mode)]
    leaves = [pair for pair in zip(wanted, got, strict=True) if isinstance(pair[0], Tensor)]
    return bool(leaves) and all(_is_close(one, other) for one, other in leaves)


@torch.no_grad()
def _is_close(wanted: Tensor, got: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    largest = wanted.abs().max().clamp_min(1e-6)
    return bool(torch.isfinite(wanted).all() and (wanted - got).abs().max() < 1e-3 * largest)


def _randomise(norm: Any, generator: torch.Generator) -> None:
    ranges = {"running_mean": (-0.3, 0.6), "running_var": (0.5, 1.0)}
    ranges |= {"weight": (0.5, 1.0), "bias": (-0.3, 0.6)}
    for name, (low, width) in ranges.items():
        if (tensor := getattr(norm, name)) is not None:
            tensor.copy_(low + width * torch.rand(tensor.shape, generator=generator))
