"""What a network costs to train: memory of a step, and its time relative to another network.

Counts of parameters and multiply-accumulates are in :mod:`common.evaluation.measures`.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
) -> int:
    """Most bytes alive at once in a training step, in float32 with SGD and momentum.

    It is counted on tensors without storage, for the update and not the attack, and leaves out what
    an allocator or a convolution's workspace adds.

    Args:
        build: Makes the network.
        shape: Channels, height and width of an image.
        batch_size: Images in a step.
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
    """Times of steps relative to the step called ``base``, each timed once in every round.

    On a CPU it is the processor's time, which other processes disturb less than the clock; every
    second round runs in the opposite order.

    Raises:
        ConfigurationError: If there is no such base, or fewer than two rounds.
    """
    if base not in steps or rounds < 2:
        raise ConfigurationError(
            f"relative times need at least 2 rounds and a base among {', '.join(steps)}; got "
            f"{rounds} and {base!r}"
        )
    for step in [*steps.values()] * warm_up:
        step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for _ in range(rounds):
        taken = {name: timed(steps[name], device)[0] for name in names}
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken[base])
        names.reverse()
    spread = {name: quartiles(found) for name, found in ratios.items()}
    return {name: Ratio(median, low, high) for name, (low, median, high) in spread.items()}


def timed(step: Callable[[], object], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Processor time and time by the clock of one call, in seconds; on a GPU twice the latter.

    Other processes disturb processor time less than the clock. A GPU is synchronised around it.
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    clock, processor = time.perf_counter(), time.process_time()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    wall = time.perf_counter() - clock
    return (time.process_time() - processor if device.type == "cpu" else wall), wall


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def adversarial_training_step(
    net: nn.Module, attack: PGD, x: Tensor, y: Tensor
) -> Callable[[], None]:
    """One step of adversarial training as a function: the attack in eval mode, then the update.

    A copy of ``net`` is trained, at a learning rate of zero.
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
