"""How fast the machine multiplies at best, and what a step needs."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.passes import Passes
from common.evaluation.measures import cost

# (channels, height and width) of the 3x3 convolutions in the stages of ResNet-18 at 32x32.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4))


def matmul_flops(dtype: torch.dtype, device: str, batch: int) -> float:
    """Floating-point operations per second of the best of some matrix products.

    Square ones, and those that the stages' convolutions would be as matrix products.
    """
    shapes = [(n, n, n) for n in (512, 1024, 2048)]
    shapes += [(batch * size**2, 9 * channels, channels) for channels, size in SHAPES[1:]]
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)
        seconds = _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        best = max(best, 2.0 * m * k * n / seconds)
    return best


def conv_flops(dtype: torch.dtype, device: str, batch: int, channels: int, size: int) -> float:
    """The same of the forward pass of a 3x3 convolution, in the faster of the two layouts."""
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(batch, channels, size, size, device=device).to(dtype)
        w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
        x, w = x.to(memory_format=layout), w.to(memory_format=layout)
        operations = 2.0 * batch * size**2 * channels**2 * 9
        seconds = _best(lambda x=x, w=w: F.conv2d(x, w, padding=1), device)  # type: ignore[misc]
        best = max(best, operations / seconds)
    return best


def peaks(device: str, batch: int) -> dict[str, float]:
    """GFLOP/s of matrix products and convolutions, float32 and bfloat16."""
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"matmul {name}"] = matmul_flops(dtype, device, batch) / 1e9
        for channels, size in SHAPES:
            flops = conv_flops(dtype, device, batch, channels, size)
            found[f"conv {channels}@{size}x{size} {name}"] = flops / 1e9
    return found


def flops_of(net: nn.Module, x: Tensor, passes: Passes) -> float:
    """Floating-point operations of ``passes`` over a batch, as if every one were needed.

    Those of convolutions and matrix products; a backward pass to the images and one to the weights
    cost as many as a forward pass each.
    """
    macs = cost(net, x[0])["macs"]
    return 2.0 * macs * len(x) * (passes.forward + passes.backward + passes.weight_gradient)


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def note(self, value: Any) -> None:
        """A tensor is there."""
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or key in self._known:
            return
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

    Counted tensor by tensor, so without an allocator's or a convolution's workspace. With those
    alive on a GPU it is what the allocator hands out beyond what others hold.
    """
    if any(tensor.is_cuda for tensor in alive):
        own = sum(tensor.untyped_storage().nbytes() for tensor in alive)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return int(torch.cuda.max_memory_allocated()) - before + own
    with _Alive() as tracker:
        for tensor in alive:
            tracker.note(tensor)
        step()
    return int(tracker.most)


def _best(step: Callable[[], object], device: str, budget: float = 0.4) -> float:
    """Shortest time of a call, processor time on a CPU."""
    is_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    step()
    best, begun = float("inf"), clock()
    while clock() - begun < budget:
        if not is_cpu:
            torch.accelerator.synchronize()
        start = clock()
        step()
        if not is_cpu:
            torch.accelerator.synchronize()
        best = min(best, clock() - start)
    return best
