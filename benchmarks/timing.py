"""Times of things done in turns, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Of one candidate over all rounds.

    Attributes:
        ratio: Median over the rounds of its time relative to the base's in the same round.
        lower: First quartile of those ratios.
        upper: Third quartile.
        cpu_s: Median processor time of one call, all threads; of the device on a GPU.
        wall_s: Median time by the clock.
    """

    ratio: float
    lower: float
    upper: float
    cpu_s: float
    wall_s: float


def interleaved(
    steps: Mapping[str, Step],
    base: str,
    rounds: int,
    warm_up: int = 1,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Call all candidates once per round, in alternating order, and compare within the rounds.

    The base begins a round and ends it, so that a machine that slows down meanwhile counts for it
    by half as it does for the others.

    On a CPU the ratio is that of processor time, which other processes disturb less than the clock;
    on a GPU it is that of the clock, with the device synchronised around each call.
    """
    if base not in steps:
        raise ValueError(f"the base {base!r} is none of {', '.join(steps)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for step in steps.values():
        for _ in range(warm_up):
            step()
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    others = [name for name in steps if name != base]
    for _ in range(rounds):
        for name in (base, *others, base):
            spent, passed = timed(steps[name], device)
            cpu[name].append(spent)
            wall[name].append(passed)
        others.reverse()
    bases = [(first + last) / 2 for first, last in _pairs(cpu[base])]
    spent_by = cpu | {base: bases}
    return {name: _timing(spent_by[name], bases, wall[name]) for name in steps}


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    """Neighbours in pairs."""
    return list(zip(values[::2], values[1::2], strict=True))


def timed(step: Step, device: str = "cpu") -> tuple[float, float]:
    """Processor time and time by the clock of one call, in seconds."""
    is_cpu = torch.device(device).type == "cpu"
    if not is_cpu:
        torch.accelerator.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    step()
    if not is_cpu:
        torch.accelerator.synchronize()
    wall = time.perf_counter() - clock
    return (time.process_time() - processor if is_cpu else wall), wall


def _timing(cpu: Sequence[float], base: Sequence[float], wall: Sequence[float]) -> Timing:
    ratios = [one / other for one, other in zip(cpu, base, strict=True)]
    lower, median, upper = quartiles(ratios)
    return Timing(median, lower, upper, statistics.median(cpu), statistics.median(wall))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The b of the power law time = a * size^b that fits best on logarithmic axes."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, times))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))
