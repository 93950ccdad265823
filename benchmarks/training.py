"""One step of PGD adversarial training: ours, peers, and the bare loop, which is 1."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from statistics import harmonic_mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.failures import NO_TIME, reason
from benchmarks.loops import Build, Candidate, Task, bare, candidate, ours
from benchmarks.peak import Passes, counted, flops_of, memory_of, peaks, reserved_from_here
from benchmarks.timing import Keep, Timing, exponent, interleaved, shown
from common.analysis.profiling import timed
from common.attacks.engine.network import AttackEngine
from common.networks.resnet import DigitsResNet, ResNet18
from common.networks.wide_resnet import WideResNet

Entry = tuple[Task, Build]

BASE = "bare loop"
BACKWARD = "loop with backward()"
ENGINES = {
    "ours, no engine": None,
    "ours, folded": AttackEngine(channels_last=False, winograd=False),
    "ours, folded, channels_last": AttackEngine(winograd=False),
    "ours, folded, channels_last, Winograd": AttackEngine(),
    "ours, folded, bf16": AttackEngine(channels_last=False, precision="bf16"),
    "ours, folded, channels_last, bf16": AttackEngine(precision="bf16"),
}
COMPILED = {
    "ours, folded, channels_last, compiled": AttackEngine(compile="default", winograd=False),
    "ours, folded, channels_last, Winograd, compiled": AttackEngine(compile="default"),
    "ours, folded, channels_last, bf16, compiled": AttackEngine(
        precision="bf16", compile="default"
    ),
}


def task(net: nn.Module, batch: int, steps: int, device: str = "cpu") -> Task:
    """Random images for a network with the statistics of one that has been trained."""
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    for _ in range(3):  # the running statistics of a fresh one are zeros and ones
        net.train()(x[:16])
    return Task(net.eval().to(device), x.to(device), y.to(device), steps=steps)


def entries(what: Task, is_compiled: bool) -> tuple[dict[str, Entry], dict[str, str]]:
    """All candidates by name, and the peers that are not there."""
    engines = ENGINES | (COMPILED if is_compiled else {})
    builds: dict[str, Build] = {BASE: bare}
    builds |= {name: partial(ours, engine=engine) for name, engine in engines.items()}
    there, missing = peers.available(what)
    builds |= {BACKWARD: partial(bare, by_backward=True), **there}
    return {name: (what, build) for name, build in builds.items()}, missing


def measured(
    candidates: Mapping[str, Entry],
    rounds: int,
    seconds: float = math.inf,
    say: Callable[[str], None] = shown,
    keep: Callable[[dict[str, Any], dict[str, str]], None] = lambda *_: None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Images, passes, memory and time of candidates relative to the first; and why some have none.

    Images and passes come first, of an attack of three steps: what disagrees there is no
    candidate, and longer ones amplify rounding. One that fails, or needs more memory than there is,
    stops none of the others. Candidates that have not been tried when 0.6 of ``seconds`` are over
    are left out. ``say`` gets lines of progress, ``keep`` rows and reasons after every round.
    """
    begun = time.monotonic()
    base = next(iter(candidates))
    steps: dict[str, Candidate] = {}
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    wanted: Tensor | None = None
    for number, (name, (task, build)) in enumerate(candidates.items(), 1):
        if number > 1 and time.monotonic() - begun > 0.6 * seconds:
            missing[name] = NO_TIME
            continue
        say(f"  {number} of {len(candidates)}: {name}")
        try:
            steps[name], rows[name], images = _tried(task, build, wanted, "compiled" in name)
            wanted = images if name == base else wanted
        except Exception as error:  # of peers and compilers in many ways
            missing[name] = reason(error)
        if name in missing:
            say(f"    {missing[name]}")
            _free()

    def found(times: Mapping[str, Timing]) -> dict[str, Any]:
        there = {name: times[name] for name in times if name not in missing}
        return {name: _row(rows, there, name, base) for name in there}

    left = seconds - (time.monotonic() - begun)
    times = _timed(steps, missing, base, rounds, left, say, lambda t: keep(found(t), missing))
    for name, row in (timed_rows := found(times)).items():
        say(f"  {row['images_per_s']:9.1f} images/s: {name}")
    return timed_rows, missing


def _row(
    tried: Mapping[str, Any], times: Mapping[str, Timing], name: str, base: str
) -> dict[str, Any]:
    row: dict[str, Any] = tried[name] | asdict(times[name])
    row["images_per_s"] = row.pop("images") / row["wall_s"]
    if base not in times:
        return {key: value for key, value in row.items() if key not in Timing.RELATIVE}
    if "peak_memory_mb" in row:
        row["memory_ratio"] = row["peak_memory_mb"] / tried[base]["peak_memory_mb"]
    return row


def _tried(
    task: Task, build: Build, wanted: Tensor | None, is_compiled: bool
) -> tuple[Candidate, dict[str, Any], Tensor]:
    """A candidate that has made two steps, what they needed, and its images."""
    reserved = reserved_from_here() if task.x.is_cuda else None
    step = candidate(task, build(task))
    short = replace(task, steps=min(task.steps, 3))
    images = Candidate(short, build(short), step.net, step.optimizer).images()
    difference = (images - (images if wanted is None else wanted)).abs()
    row: dict[str, Any] = {
        "images": len(task.x),
        "largest_difference": difference.max().item(),
        "pixels_apart": (difference > 1e-5).float().mean().item(),
    }
    if is_compiled:  # hooks would change what is compiled
        step()
    else:
        with counted(step.net) as passes:
            step()
        row["passes"] = asdict(passes)
    if reserved is not None:
        step()
        row["peak_memory_mb"] = reserved() / 1e6
    elif not is_compiled:  # the second step has gradients of the first
        row["peak_memory_mb"] = memory_of(step, *step.alive()) / 1e6
    return step, row, images


def _timed(
    steps: Mapping[str, Candidate],
    missing: dict[str, str],
    base: str,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Timing]], None],
) -> dict[str, Timing]:
    """Times of the steps; one that fails meanwhile becomes missing, and its times say nothing."""

    def guarded(name: str) -> None:
        if name in missing:
            return
        try:
            steps[name]()
        except RuntimeError as error:  # memory that others hold
            missing[name] = reason(error)

    if not steps:
        return {}
    device = next(iter(steps.values())).task.x.device.type
    return interleaved(
        {name: partial(guarded, name) for name in steps},
        base if base in steps else next(iter(steps)),
        rounds,
        device,
        seconds,
        say,
        keep,
    )


def _free() -> None:
    """Give back what a candidate that failed has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def operations(task: Task) -> float:
    """Floating-point operations of a step of the bare loop."""
    return flops_of(task.net, task.x, Passes(task.steps + 1, task.steps + 1, 1))


def compare(
    batch: int, steps: int, rounds: int, is_compiled: bool, device: str, keep: Keep
) -> None:
    """Time, passes, memory and images of every candidate."""
    torch.manual_seed(0)
    what = task(ResNet18(), batch, steps, device)
    setting = f"ResNet-18, batch {batch} of 3x32x32, PGD-{steps} and one step of SGD"
    print(f"{setting}; {rounds} rounds, after a trial of each candidate", flush=True)
    candidates, absent = entries(what, is_compiled)
    best = peaks(device, batch)
    needed = operations(what)

    def of_peak(name: str, row: dict[str, Any]) -> dict[str, Any]:
        precision = "bf16" if "bf16" in name else "fp32"
        rate = needed / row["cpu_s" if device == "cpu" else "wall_s"] / 1e9
        # the stages have equally many operations
        convolutions = [v for k, v in best.items() if k[:4] == "conv" and precision in k]
        return row | {
            "useful_gflops": rate,
            "of_matmul_peak": rate / best[f"matmul {precision}"],
            "of_conv_peak": rate / harmonic_mean(convolutions),
        }

    done = itertools.count(1)

    def kept(rows: dict[str, Any], failed: dict[str, str]) -> None:
        keep(
            {
                "setting": setting,
                "rows": {name: of_peak(name, row) for name, row in rows.items()},
                "missing": absent | failed,
                "peaks_gflops": best,
                "rounds": next(done),
            }
        )

    measured(candidates, rounds, keep=kept)


def growth(is_full: bool, device: str, keep: Keep) -> None:
    """Time of our step against batch size, attack steps and network, with the exponents."""
    batches = (8, 16, 32, 64, 128, 256) if is_full else (8, 16, 32, 64)
    steps = (1, 3, 10, 30, 100) if is_full else (1, 3, 10, 30)
    small = partial(DigitsResNet, in_channels=3)
    nets: dict[str, Callable[[], nn.Module]] = {"DigitsResNet": small, "ResNet-18": ResNet18}
    if is_full:
        nets["WRN-34-10"] = partial(WideResNet, 34, 10)
    # One step of the attack is beside the update, so its time grows with steps plus 1.5.
    axes: dict[str, tuple[float, dict[Any, tuple[Callable[[], nn.Module], int, int]]]] = {
        "batch": (0.0, {n: (small, n, 10) for n in batches}),
        "steps": (1.5, {k: (small, 32, k) for k in steps}),
        "network": (math.nan, {name: (build, 8, 3) for name, build in nets.items()}),
    }
    found: dict[str, Any] = {
        "setting": "our step without an engine; DigitsResNet on 3x32x32, batch 32, PGD-10 where "
        "not varied; networks at batch 8, PGD-3"
    }
    for axis, (offset, sizes) in axes.items():
        times: dict[Any, float] = {}
        for size, (build, batch, count) in sizes.items():
            what = task(build(), batch, count, device)
            step = candidate(what, ours(what))
            step()
            times[size] = min(timed(step, device)[0] for _ in range(3))
            print(f"  {axis} {size}: {times[size]:.3g} s", flush=True)
            found[axis] = {"seconds": times}
            if offset >= 0 and len(times) > 1:
                found[axis]["exponent"] = exponent(times, offset)
            keep(found)
