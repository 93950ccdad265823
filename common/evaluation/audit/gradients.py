"""Whether gradients can be trusted, and ways around operations that cut or flatten them.

A defence that hides its gradients only looks robust to attacks that follow them (Athalye, Carlini &
Wagner 2018, "Obfuscated gradients give a false sense of security"). Forward passes in these
contexts have the values of the defence, and gradients through what it cuts or rounds.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.attacks.geometry import finite
from common.attacks.pgd import LossFn, input_gradient


class _Passed(torch.autograd.Function):
    """The value of one tensor, bit for bit, with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


_pass: Callable[[Tensor, Tensor], Tensor] = _Passed.apply


def eager() -> AbstractContextManager[Any]:
    """Compiled networks run as written, since their graphs hold for one mode and type."""
    is_compiled = "torch._dynamo" in sys.modules  # whose import takes seconds
    stance: Any = torch.compiler.set_stance if is_compiled else nullcontext
    context: AbstractContextManager[Any] = stance("force_eager")
    return context


def anchored(loss_fn: LossFn) -> LossFn:
    """The same loss with a zero gradient where it does not depend on x'.

    Attacks refuse such a loss as a mistake; in an audit it is a finding.
    """

    def loss(x: Tensor) -> Tensor:
        try:
            value = loss_fn(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # numpy takes no tensor that requires a gradient, say
            value = loss_fn(x.detach())
        return value + 0.0 * x.flatten(1).sum(dim=1)

    return loss


_ALIASES = (torch.Tensor.detach, torch.detach, vars(torch._C.TensorBase)["data"].__get__)
_COPIES = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
_ARRAYS = (torch.Tensor.numpy, torch.Tensor.__array__)


class _Undetached(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and not args[0]:
            return None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None or not first.requires_grad:
            source = args[1] if func is torch.Tensor.new_tensor else None
            if not (isinstance(source, Tensor) and source.requires_grad):
                return func(*args, **kwargs)
            first = source
        if func in _ALIASES:
            return first.view_as(first)  # writing into it still writes into the original
        if func in (torch.Tensor.detach_, torch.detach_):
            return first
        if func is torch.Tensor.requires_grad_ and first.grad_fn is not None:
            return first
        if func in _ARRAYS:
            return func(first.detach(), *args[1:], **kwargs)
        if func in _COPIES:
            copy = func(*args, **kwargs).detach()
            return _pass(first, copy) if copy.is_floating_point() else copy
        return func(*args, **kwargs)


@contextmanager
def undetached() -> Iterator[None]:
    """Forward passes inside ignore ``detach``, ``.data``, ``no_grad`` and ``inference_mode``.

    Values stay the same. Constants and integers still have no gradient. Pass ``x.clone()``: writing
    into the alias of a leaf fails.
    """

    def inference_mode(enabled: bool) -> Any:
        return nullcontext() if enabled else original(enabled)

    module: Any = torch._C
    original, before = module._InferenceMode, torch.is_grad_enabled()
    module._InferenceMode = inference_mode
    try:
        with eager(), _Undetached():
            yield
    finally:
        module._InferenceMode = original
        torch.set_grad_enabled(before)


_ROUNDING = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"}
_RISING, _FALLING = {"gt", "ge", "greater", "greater_equal"}, {"lt", "le", "less", "less_equal"}
_QUOTIENTS = {"floordiv", "floor_divide", "div", "divide", "true_divide"}


def _smooth(value: Any) -> Any:
    """The tensor that was cast to these integers; anything else is returned as it is."""
    return getattr(value, "_smooth", value) if isinstance(value, Tensor) else value


class _StraightThrough(TorchFunctionMode):
    """Identity gradients for rounding, comparisons and integers.

    A tensor of integers or booleans keeps the floating-point tensor it was made from. What is
    computed from it is computed from that one as well, and has that gradient if it is floating
    point.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        smooth = [_smooth(arg) for arg in args]
        is_cast = any(a is not b for a, b in zip(args, smooth, strict=True))
        source = next((t for t in smooth if isinstance(t, Tensor) and t.requires_grad), None)
        full_name = getattr(func, "__name__", "")
        name = full_name.strip("_")
        if source is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in _ROUNDING and full_name.endswith("_"):
            kept = source.clone()
            with torch.no_grad():
                value = func(args[0].clone(), *args[1:], **kwargs)
            return args[0].copy_(_pass(kept, value))
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out is args[0]:
            return out  # a shape, say, or written in place
        gradient = self._gradient(func, name, smooth, kwargs, source, out, is_cast)
        is_usable = isinstance(gradient, Tensor) and gradient.requires_grad
        if not is_usable or gradient.shape != out.shape:
            return out
        if out.is_floating_point():
            return _pass(gradient, out.detach())
        out._smooth = gradient  # type: ignore[attr-defined]
        return out

    @staticmethod
    def _gradient(
        func: Any,
        name: str,
        smooth: list[Any],
        kwargs: Any,
        source: Tensor,
        out: Tensor,
        is_cast: bool,
    ) -> Any:
        """A tensor with the gradient that ``out`` gets; ``None`` for its own."""
        if name in _ROUNDING:
            return source
        if name in _RISING | _FALLING and len(smooth) == 2:
            difference = smooth[0] - smooth[1]
            return difference if name in _RISING else -difference
        if name in _QUOTIENTS and (name.startswith("floor") or kwargs.get("rounding_mode")):
            return smooth[0] / smooth[1]
        if name == "where" and is_cast and len(smooth) == 3:
            return smooth[2] + (smooth[1] - smooth[2]) * smooth[0]
        if is_cast:
            try:
                return func(*smooth, **kwargs)
            except (RuntimeError, TypeError, IndexError):  # shifting bits, indexing
                return source
        return None if out.is_floating_point() else source


def _bridged(source: Any, output: Any) -> Any:
    """The output, with the input's gradient if its own vanishes."""
    if (
        isinstance(source, Tensor)
        and isinstance(output, Tensor)
        and source.shape == output.shape
        and output.is_floating_point()
        and source.requires_grad
        and torch.is_grad_enabled()
        and _is_cut(source, output)
    ):
        return _pass(source, output.detach())
    return output


def _is_cut(source: Tensor, output: Tensor) -> bool:
    """Whether the vector-Jacobian product of an arbitrary vector vanishes or is not finite."""
    if not output.requires_grad:
        return True
    vector = torch.arange(1, output.numel() + 1, device=output.device).cos().view_as(output)
    (product,) = torch.autograd.grad(
        output, source, vector.to(output), retain_graph=True, allow_unused=True
    )
    return product is None or not bool(finite(product).any())


def _bridge_functions(output: Any) -> None:
    """Let the custom autograd functions behind an output pass gradients on where theirs vanish."""
    nodes: list[Any] = [output.grad_fn] if isinstance(output, Tensor) and output.grad_fn else []
    while nodes:
        node = nodes.pop()
        if "bridged" in node.metadata:
            continue
        node.metadata["bridged"] = True
        nodes += [following for following, _ in node.next_functions if following is not None]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            node.register_hook(_passed_on)


def _passed_on(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
    """The gradient of a function's output for its first input, if all its own are zero."""
    if inputs[0] is None or outputs[0] is None or inputs[0].shape != outputs[0].shape:
        return None  # autograd does not let a hook replace None
    vanish = all(g is None or not bool(finite(g).any()) for g in inputs)
    return (outputs[0], *inputs[1:]) if vanish else None


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """Forward passes inside have identity gradients for steps (BPDA, Athalye et al. 2018, 4.1).

    Values stay the same. Covered are rounding, signs, comparisons and casts to integers and back;
    and in the modules of ``model``, if they keep the shape, custom autograd functions whose
    gradient vanishes and modules without parameters that cut it (a JPEG codec in numpy, say). Pass
    ``x.clone()``.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        for part in output if isinstance(output, tuple | list) else [output]:
            _bridge_functions(part)
        if inputs and next(module.parameters(), None) is None:
            return _bridged(inputs[0], output)
        return None

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if not type(module).__module__.startswith("torch.nn.")
    ]
    try:
        with eager(), _StraightThrough():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_double(model: Any) -> Iterator[None]:
    """Parameters and buffers in float64 inside the block; afterwards the same tensors as before."""
    every = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    tensors = [tensor for tensor in every if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        with eager():
            yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def gradient_norms(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Largest entry of each example's gradient, ``(N,)``; NaN where any is not finite."""
    gradient = input_gradient(anchored(loss_fn), x).flatten(1)
    is_finite = torch.isfinite(gradient).all(dim=1)
    return torch.where(is_finite, gradient.abs().amax(dim=1), torch.nan)


def directional_derivatives(
    loss_fn: LossFn, x: Tensor, signs: Tensor, h: float, own: bool = False
) -> tuple[Tensor, Tensor]:
    """What the gradient predicts along directions and central differences measure, ``(N, D)``.

    Images are moved into ``[h, 1 - h]`` first, with h the step per pixel: a defence may clip
    outside the box. Directions have entries 1 and -1, ``(D, N, ...)``; ``own`` adds the signs of
    the gradient, which outweigh the others.
    """
    x = x.detach().clamp(h, 1.0 - h)
    gradient = input_gradient(anchored(loss_fn), x)
    directions = [*signs, *([gradient.sign()] if own else [])]
    with torch.no_grad():
        ahead, behind = (
            # Clamped, since a sum that leaves the box by rounding is no valid image.
            [loss_fn((x + step * d).clamp(0.0, 1.0)) for d in directions]
            for step in (h, -h)
        )
        measured = [(a - b) / (2.0 * h) for a, b in zip(ahead, behind, strict=True)]
    predicted = [(gradient * d).flatten(1).sum(dim=1) for d in directions]
    return torch.stack(predicted, dim=1), torch.stack(measured, dim=1)


def cosine(predicted: Tensor, measured: Tensor) -> Tensor:
    """Cosine of predicted and measured derivatives, ``(N,)`` in [-1, 1].

    It is 0 without a finite gradient other than zero, and NaN where the loss is constant but has a
    gradient: that of a step function may still be worth following.
    """
    scale = torch.finfo(predicted.dtype).tiny
    p, m = (t / t.abs().amax(dim=1, keepdim=True).clamp_min(scale) for t in (predicted, measured))
    value = (p * m).sum(dim=1) / (p.norm(dim=1) * m.norm(dim=1)).clamp_min(scale)
    is_predicted = torch.isfinite(predicted).all(dim=1) & (predicted != 0.0).any(dim=1)
    is_flat = (measured == 0.0).all(dim=1)
    value = torch.where(is_flat, torch.nan, value.nan_to_num(0.0))
    return torch.where(is_predicted, value, 0.0)
