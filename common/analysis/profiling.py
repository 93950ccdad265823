"""What a network costs to train: memory of a step, and its time relative to another network.

Counts of parameters and multiply-accumulates are in :mod:`common.evaluation.measures`. Costs that a
command measured lie in ``results/costs.json`` of a paper, by experiment, and tables show them
beside the accuracies.
"""

import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from common.attacks.losses import label_loss
from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.modes import frozen


def peak_memory(
    build: Callable[[], nn.Module],
    shape: Sequence[int],
    batch_size: int = 128,
    num_classes: int = 10,
) -> int:
    """Most bytes alive at once in a training step, in float32 with SGD and momentum.

    Counted tensor by tensor as the step makes and frees them, on tensors without storage: so the
    number is that of no device in particular, needs no memory, and leaves out what an allocator or
    a convolution's workspace adds. It is that of the update, whose graph is larger than that
    of an attack's step.

    Args:
        build: Makes the network.
        shape: Channels, height and width of an image.
        batch_size: How many images a step has.
        num_classes: How many classes.
    """
    with FakeTensorMode():
        net = build().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        x = torch.empty(batch_size, *shape)
        y = torch.zeros(batch_size, dtype=torch.long)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        step()  # momentum is there from the second step on
        tracker = MemTracker()
        tracker.track_external(net, optimizer, x, y)
        with tracker:
            step()
        snapshot = tracker.get_tracker_snapshot("peak")
    return sum(by_kind["Total"] for by_kind in snapshot.values())


class Ratio(NamedTuple):
    """Median and quartiles of a time relative to another one, round by round."""

    median: float
    lower: float
    upper: float


def relative_times(
    steps: Mapping[str, Callable[[], None]],
    base: str,
    rounds: int = 20,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, Ratio]:
    """Times of steps relative to one of them, all of them once in every round.

    On a CPU it is the processor's time, which other processes disturb less than the clock; every
    second round runs in the opposite order.

    Args:
        steps: What is timed, by name.
        base: Name of the one with ratio 1.
        rounds: How many, at least 2.
        warm_up: Calls of each beforehand that do not count.
        device: Where they run.

    Raises:
        ConfigurationError: If there is no such base, or fewer than two rounds.
    """
    if base not in steps or rounds < 2:
        raise ConfigurationError(
            f"relative times need at least 2 rounds and a base among {', '.join(steps)}; got "
            f"{rounds} and {base!r}"
        )
    device = torch.device(device)
    for step in steps.values():
        for _ in range(warm_up):
            step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        taken = {name: _timed(steps[name], device) for name in names}
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken[base])
        names.reverse()
    return {name: _quartiles(found) for name, found in ratios.items()}


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        begun = time.process_time()
        step()
        return time.process_time() - begun
    torch.accelerator.synchronize(device)
    begun = time.perf_counter()
    step()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - begun


def _quartiles(values: Sequence[float]) -> Ratio:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, lower, upper)


def adversarial_training_step(
    net: nn.Module, attack: PGD, x: Tensor, y: Tensor
) -> Callable[[], None]:
    """One step of adversarial training as a function: the attack in eval mode, then the update.

    Args:
        net: On the device of ``x``; a copy of it is trained, at a learning rate of zero.
        attack: Maximises cross-entropy.
        x: Images in [0, 1], ``(N, C, H, W)``.
        y: Labels, ``(N,)``.
    """
    trained = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0, momentum=0.9)
    generator = torch.Generator(x.device).manual_seed(0)

    def step() -> None:
        with frozen(trained):
            x_adv = attack(label_loss(trained, y), x, generator)
        optimizer.zero_grad()
        F.cross_entropy(trained(x_adv), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def device_name(device: torch.device | str) -> str:
    """Of a processor or graphics card, for costs that depend on it."""
    device = torch.device(device)
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
