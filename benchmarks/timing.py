"""Times of things done in turns, so that what disturbs the machine disturbs all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from common.analysis.profiling import quartiles, timed

Step = Callable[[], object]
Keep = Callable[[dict[str, Any]], None]
"""Gets what was found so far, whenever there is more."""


def shown(text: str) -> None:
    """Print a line at once, in files too."""
    print(text, flush=True)


@dataclass(frozen=True)
class Timing:
    """Of one candidate over all rounds: the median and the quartiles of its time over the base's.

    ``cpu_s`` is the median processor time of one call, all threads, or the time of a GPU;
    ``wall_s`` the median time by the clock.
    """

    RELATIVE: ClassVar = ("ratio", "lower", "upper")

    ratio: float
    lower: float
    upper: float
    cpu_s: float
    wall_s: float


def interleaved(
    steps: Mapping[str, Step],
    base: str,
    rounds: int,
    device: str = "cpu",
    seconds: float = math.inf,
    say: Callable[[str], None] = shown,
    keep: Callable[[dict[str, Timing]], None] = lambda _: None,
) -> dict[str, Timing]:
    """Call all candidates once per round, in alternating order, and compare within the rounds.

    The base begins a round and ends it, so that a machine that slows down meanwhile counts for it
    by half as it does for the others. No round but the first begins when ``seconds`` are over.
    ``say`` gets a line for every call, ``keep`` the times after every round.
    """
    if base not in steps or rounds < 1:
        raise ValueError(f"need a base among {', '.join(steps)} and a round, got {base}, {rounds}")
    until = time.monotonic() + seconds
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    others = [name for name in steps if name != base]
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in (base, *others, base):
            spent, passed = timed(steps[name], device)
            cpu[name].append(spent)
            wall[name].append(passed)
            say(f"  round {number + 1} of {rounds}, {passed:.2f} s: {name}")
        others.reverse()
        found = _timings(cpu, wall, base)
        keep(found)
    return found


def _timings(
    cpu: Mapping[str, list[float]], wall: Mapping[str, list[float]], base: str
) -> dict[str, Timing]:
    """Of the seconds of all calls; of the base there are two in each round."""
    found = {}
    by_round = {
        name: np.reshape(spent, (-1, 1 + (name == base))).mean(1) for name, spent in cpu.items()
    }
    for name, spent_by_round in by_round.items():
        lower, median, upper = quartiles((spent_by_round / by_round[base]).tolist())
        times = float(np.median(spent_by_round)), statistics.median(wall[name])
        found[name] = Timing(median, lower, upper, *times)
    return found


def exponent(times: Mapping[int, float], offset: float = 0.0) -> float:
    """The b of the power law time = a * (size + offset)^b that fits best on logarithmic axes."""
    sizes = np.add(list(times), offset)
    return float(np.polyfit(np.log(sizes), np.log(list(times.values())), 1)[0])
