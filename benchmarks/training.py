"""One step of PGD adversarial training: ours, peers, and the bare loop, which is 1."""

from dataclasses import asdict, replace
from statistics import harmonic_mean
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.loops import Attack, Candidate, Task, bare, candidate, one_graph, ours
from benchmarks.peak import Passes, counted, flops_of, memory_of, peaks
from benchmarks.timing import exponent, interleaved
from common.analysis.profiling import timed
from common.attacks.engine.network import AttackEngine
from common.networks.resnet import DigitsResNet, ResNet18
from common.networks.wide_resnet import WideResNet

BASE = "bare loop"
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


def attacks(what: Task, is_compiled: bool) -> tuple[dict[str, Attack], dict[str, str]]:
    """All candidates by name, and the peers that are not there."""
    engines = ENGINES | (COMPILED if is_compiled else {})
    found = {BASE: bare(what)} | {name: ours(what, engine) for name, engine in engines.items()}
    if is_compiled:
        found["ours, folded, channels_last, Winograd, one compiled graph per step"] = one_graph(
            what, AttackEngine()
        )
    found["loop with backward()"] = bare(what, by_backward=True)
    there, missing = peers.available(what)
    return found | there, missing


def compare(
    batch: int, steps: int, rounds: int, is_compiled: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Time, passes, memory and images of every candidate.

    Images and passes come first, of an attack of three steps: what disagrees there is no
    candidate, and longer ones amplify rounding.
    """
    torch.manual_seed(0)
    what = task(ResNet18(), batch, steps, device)
    found, missing = attacks(what, is_compiled)
    steps_of = {name: candidate(what, attack) for name, attack in found.items()}
    short = replace(what, steps=3)
    checked, _ = attacks(short, is_compiled)
    wanted = candidate(short, checked[BASE]).images()
    rows: dict[str, Any] = {}
    counts: dict[str, Passes] = {}
    for name, step in steps_of.items():
        tried = Candidate(short, checked[name], step.net, step.optimizer)
        difference = (tried.images() - wanted).abs()
        rows[name] = {
            "largest_difference": difference.max().item(),
            "pixels_apart": (difference > 1e-5).float().mean().item(),
        }
        if "compiled" not in name:
            with counted(step.net) as counts[name]:
                step()
            memory = memory_of(step, *step.alive())  # the second step has gradients of the first
            rows[name] |= {"passes": asdict(counts[name]), "peak_memory_mb": memory / 1e6}
    times = interleaved(steps_of, BASE, rounds, device=device)
    best = peaks(device, batch)
    base = steps_of[BASE]
    operations = flops_of(base.net, what.x, counts[BASE])
    for name, timing in times.items():
        precision = "bf16" if "bf16" in name else "fp32"
        rate = operations / (timing.cpu_s if device == "cpu" else timing.wall_s) / 1e9
        rows[name] |= asdict(timing) | {
            "useful_gflops": rate,
            "of_matmul_peak": rate / best[f"matmul {precision}"],
            # the stages have equally many operations
            "of_conv_peak": rate
            / harmonic_mean(v for k, v in best.items() if k[:4] == "conv" and precision in k),
            "images_per_s": batch / timing.wall_s,
        }
    for row in rows.values():
        if "peak_memory_mb" in row:
            row["memory_ratio"] = row["peak_memory_mb"] / rows[BASE]["peak_memory_mb"]
    return {
        "setting": f"ResNet-18, batch {batch} of 3x32x32, PGD-{steps} and one step of SGD",
        "rows": rows,
        "missing": missing,
        "peaks_gflops": best,
        "rounds": rounds,
    }


def growth(is_full: bool, device: str = "cpu") -> dict[str, Any]:
    """Time of our step against batch size, attack steps and network, with the exponents."""
    batches = (8, 16, 32, 64, 128, 256) if is_full else (8, 16, 32, 64)
    steps = (1, 3, 10, 30, 100) if is_full else (1, 3, 10, 30)

    def small() -> nn.Module:
        return DigitsResNet(in_channels=3)

    def seconds(net: nn.Module, batch: int, steps: int) -> float:
        what = task(net, batch, steps, device)
        step = candidate(what, ours(what))
        step()
        return min(timed(step, device)[0] for _ in range(3))

    by_batch = {n: seconds(small(), n, 10) for n in batches}
    by_steps = {k: seconds(small(), 32, k) for k in steps}
    nets: dict[str, Any] = {"DigitsResNet": small, "ResNet-18": ResNet18}
    if is_full:
        nets["WRN-34-10"] = lambda: WideResNet(34, 10)
    return {
        "setting": "our step without an engine; DigitsResNet on 3x32x32, batch 32, PGD-10 where "
        "not varied; networks at batch 8, PGD-3",
        "batch": {"seconds": by_batch, "exponent": exponent(by_batch)},
        # One step of the attack is beside the update, so its time grows with steps plus 1.5.
        "steps": {"seconds": by_steps, "exponent": exponent(by_steps, 1.5)},
        "network": {"seconds": {name: seconds(build(), 8, 3) for name, build in nets.items()}},
    }
