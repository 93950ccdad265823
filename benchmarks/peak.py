"""What a step needs - passes, operations, memory - and how fast the machine multiplies at best."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.loops import Numerics, computed_in
from common.analysis.profiling import timed
from common.evaluation.measures import cost

# (channels, height and width) of the 3x3 convolutions in the stages of ResNet-18 at 32x32.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4))
SLOW = 5.0
"""GFLOP/s of a type that the processor has no units for. It is measured on single images and small
products, since others take minutes."""


@dataclass
class Passes:
    """How often a network ran."""

    forward: int = 0
    backward: int = 0
    weight_gradient: int = 0


@contextmanager
def counted(net: nn.Module) -> Iterator[Passes]:
    """Count passes through a network until the end of the block.

    Counted at its last linear layer, which every pass goes through and no attack engine replaces:
    calls, gradients of its output, and calls of ``backward`` that reach its weight.
    """
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    passes = Passes()

    def count(name: str, *_: object) -> None:
        setattr(passes, name, getattr(passes, name) + 1)

    def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        count("forward")
        if out.requires_grad:
            out.register_hook(partial(count, "backward"))  # type: ignore[no-untyped-call]

    required = head.weight.requires_grad
    head.weight.requires_grad_(True)
    weight = head.weight.register_hook(partial(count, "weight_gradient"))  # type: ignore[no-untyped-call]
    head.weight.requires_grad_(required)
    with weight, head.register_forward_hook(forward):
        yield passes


def flops_of(net: nn.Module, x: Tensor, passes: Passes) -> float:
    """Floating-point operations of ``passes`` over a batch, as if every one were needed.

    A backward pass to the images and one to the weights cost as many as a forward pass each.
    """
    macs = cost(net, x[0])["macs"]
    return 2.0 * macs * len(x) * (passes.forward + passes.backward + passes.weight_gradient)


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed.

    torch's MemTracker does the same, but refuses ``torch.autograd.grad``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known: set[int] = set()

    def note(self, value: Any) -> None:
        """A tensor is there."""
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key and key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map(self.note, out)
        return out


def memory_of(step: Callable[[], object], *alive: Tensor) -> int:
    """Most bytes of tensors alive at once in a step, those ``alive`` before it included.

    Counted tensor by tensor, so without an allocator's or a convolution's workspace.
    """
    tracker = _Alive()
    with tracker:
        for tensor in alive:
            tracker.note(tensor)
        step()
    return tracker.most


def reserved_from_here() -> Callable[[], int]:
    """Call it for the most bytes that torch has taken of the GPU since, beyond those it held.

    So workspaces, compiled graphs' own memory and what the allocator cannot fill count too.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    return lambda: torch.cuda.max_memory_reserved() - before


def peaks(
    device: str,
    batch: int,
    numerics: Iterable[Numerics] = ("fp32", "bf16"),
    seconds: float = 0.4,
) -> dict[str, float]:
    """GFLOP/s of matrix products and 3x3 convolutions, in the shortest call within ``seconds``.

    Matrix products are the best of square ones and those that the stages' convolutions would be;
    convolutions are in the faster of the two layouts.
    """
    found: dict[str, float] = {}
    for name in numerics:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with computed_in("fp32" if name == "bf16" else name, device):
            rates = _rates(device, batch, dtype, seconds)
            found |= {f"{key} {name}": rate for key, rate in rates.items()}
    return found


def _rates(device: str, batch: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    rate = partial(_rate, device=device, seconds=seconds)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def product(m: int, k: int, n: int) -> float:
        return rate(2 * m * k * n, partial(torch.matmul, random(m, k), random(k, n)))

    most, squares = product(512, 512, 512), [1024, 2048]
    if most < SLOW:
        batch, squares = 1, []
    squares += [4096, 8192] if device != "cpu" else []
    products = [(n, n, n) for n in squares]
    products += [(batch * size**2, 9 * channels, channels) for channels, size in SHAPES[1:]]
    found = {"matmul": max(most, *(product(*shape) for shape in products))}
    for channels, size in SHAPES:
        both = random(batch, channels, size, size), random(channels, channels, 3, 3)
        found[f"conv {channels}@{size}x{size}"] = max(
            rate(
                2 * batch * size**2 * channels**2 * 9,
                partial(F.conv2d, *(t.to(memory_format=layout) for t in both), padding=1),
            )
            for layout in (torch.contiguous_format, torch.channels_last)
        )
    return found


def _rate(operations: int, step: Callable[[], object], device: str, seconds: float) -> float:
    """Billions of operations per second."""
    step()
    best, spent = timed(step, device)[0], 0.0
    while spent < seconds:
        taken = timed(step, device)[0]
        best, spent = min(best, taken), spent + taken
    return operations / best / 1e9
