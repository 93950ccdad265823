"""Times of things done in turns, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Of one candidate over all rounds: the median and the quartiles of its time over the base's.

    ``cpu_s`` is the median processor time of one call, all threads, or the time of a GPU;
    ``wall_s`` the median time by the clock.
    """

    ratio: float
    lower: float
    upper: float
    cpu_s: float
    wall_s: float


def interleaved(
    steps: Mapping[str, Step], base: str, rounds: int, warm_up: int = 0, device: str = "cpu"
) -> dict[str, Timing]:
    """Call all candidates once per round, in alternating order, and compare within the rounds.

    The base begins a round and ends it, so that a machine that slows down meanwhile counts for it
    by half as it does for the others.
    """
    if base not in steps or rounds < 1:
        raise ValueError(f"need a base among {', '.join(steps)} and a round, got {base}, {rounds}")
    for step in [*steps.values()] * warm_up:
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
    cpu[base] = [(first + last) / 2 for first, last in zip(*[iter(cpu[base])] * 2, strict=True)]
    found = {}
    for name, spent_by_round in cpu.items():
        lower, median, upper = quartiles(np.divide(spent_by_round, cpu[base]))
        times = statistics.median(spent_by_round), statistics.median(wall[name])
        found[name] = Timing(median, lower, upper, *times)
    return found


def timed(step: Step, device: str = "cpu") -> tuple[float, float]:
    """Processor time and time by the clock of one call, in seconds; on a GPU twice the latter.

    Other processes disturb processor time less than the clock. A GPU is synchronised around it.
    """
    is_cpu = torch.device(device).type == "cpu"
    if not is_cpu:
        torch.accelerator.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    step()
    if not is_cpu:
        torch.accelerator.synchronize()
    wall = time.perf_counter() - clock
    return (time.process_time() - processor if is_cpu else wall), wall


def quartiles(values: npt.ArrayLike) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    lower, median, upper = np.quantile(np.asarray(values), (0.25, 0.5, 0.75)).tolist()
    return lower, median, upper


def exponent(times: Mapping[int, float], offset: float = 0.0) -> float:
    """The b of the power law time = a * (size + offset)^b that fits best on logarithmic axes."""
    sizes = np.add(list(times), offset)
    return float(np.polyfit(np.log(sizes), np.log(list(times.values())), 1)[0])
