"""Steps of PGD adversarial training: images per second, memory, share of the matrix peak."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.failures import OUT_OF_MEMORY
from benchmarks.gpu.journal import Row
from benchmarks.gpu.parts import Measurements, Setting
from benchmarks.loops import Numerics, Task, bare, in_channels_last, ours
from benchmarks.peak import peaks
from benchmarks.training import BACKWARD, BASE, Entry, measured, operations, task
from common.attacks.engine.network import AttackEngine, Precision
from common.networks.resnet import DigitsResNet, ResNet18
from common.networks.wide_resnet import WideResNet

NETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": ResNet18,
    "WRN-34-10": partial(WideResNet, 34, 10),
    "DigitsResNet": partial(DigitsResNet, in_channels=3),
}
NUMERICS: tuple[Numerics, ...] = ("fp32", "tf32", "bf16")
SMALL = (("ResNet-18", 128), ("ResNet-18", 512), ("WRN-34-10", 128))
LARGE = (("ResNet-18", 1024), ("WRN-34-10", 512), ("WRN-34-10", 1024))
SMOKE = (("DigitsResNet", 4),)
ROUNDS = 9
SECONDS = {False: 60.0, True: 240.0}
"""The most that the candidates of one measurement may take together, not compiled and compiled."""


def measurements(setting: Setting) -> Measurements:
    """The peaks; then the most useful first, since not all fit into the time."""
    small, large = (SMOKE, ()) if setting.is_smoke else (SMALL, LARGE)
    plan: list[tuple[tuple[str, int], Numerics, bool]] = [
        *product(small, NUMERICS, [False]),
        *product(small, NUMERICS[2:], [True]),
        *product(large, NUMERICS, [False]),
        *product(small, NUMERICS[:2], [True]),
        *product(large, NUMERICS[::-1], [True]),
    ]
    found: dict[str, Callable[[], Row]] = {"peaks": partial(_peaks, setting)}
    for (net, batch), numerics, is_compiled in plan:
        name = f"{net}, batch {batch}, {numerics}{', compiled' if is_compiled else ''}"
        found[name] = partial(_steps, setting, net, batch, numerics, is_compiled)
    return found


def _peaks(setting: Setting) -> Row:
    batch, seconds = (2, 0.0) if setting.is_smoke else (512, 0.1)
    found = peaks(setting.device, batch, NUMERICS, seconds)
    said = ", ".join(f"{name} {found[f'matmul {name}'] / 1000:.1f}" for name in NUMERICS)
    return {"gflops": found, "summary": f"matrix products in TFLOP/s: {said}"}


def _steps(setting: Setting, net: str, batch: int, numerics: Numerics, is_compiled: bool) -> Row:
    if is_compiled:
        import torch._dynamo as dynamo  # takes seconds, which only compiling needs

        torch.compiler.reset()  # graphs of other batches would make shapes dynamic
        dynamo.config.recompile_limit = 64  # all networks of a process are one function
    torch.manual_seed(0)
    made = task(NETS[net](), batch, 2 if setting.is_smoke else 10, setting.device)
    what = replace(made, numerics=numerics)
    candidates, missing = (compiled(what), {}) if is_compiled else eager(what)
    seconds = min(SECONDS[is_compiled], setting.seconds_left)
    rows, failed = measured(candidates, 1 if setting.is_smoke else ROUNDS, seconds)
    missing |= failed
    if not rows and any(why != OUT_OF_MEMORY for why in missing.values()):
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in missing.items()))
    needed = operations(what)
    for row in rows.values():
        row["tflops"] = needed / row["wall_s"] / 1e12
    return {
        "net": net,
        "batch": batch,
        "numerics": numerics,
        "rows": rows,
        "missing": missing,
        "summary": _summary(rows),
    }


def _summary(rows: dict[str, Any]) -> str:
    if not rows:
        return OUT_OF_MEMORY
    best = max(rows, key=lambda name: rows[name]["images_per_s"])
    base = f", {BASE} {rows[BASE]['images_per_s']:.0f}" if BASE in rows else ""
    return f"most images/s {rows[best]['images_per_s']:.0f} by {best}{base}"


def eager(what: Task) -> tuple[dict[str, Entry], dict[str, str]]:
    """What is not compiled, and the peers that are not there; peers compute in float32."""
    last = in_channels_last(what)
    found: dict[str, Entry] = {
        BASE: (what, bare),
        "ours": (what, ours),
        "ours, folded, channels_last": (last, _engine(what)),
        f"{BASE}, channels_last": (last, bare),
        "ours, folded, channels_last in the attack alone": (what, _engine(what)),
        "ours, channels_last": (last, ours),
        "ours, folded": (what, _engine(what, channels_last=False)),
    }
    if what.numerics != "fp32":
        return found, {}
    found[BACKWARD] = (what, partial(bare, by_backward=True))
    there, missing = peers.available(what)
    return found | {name: (what, build) for name, build in there.items()}, missing


def compiled(what: Task) -> dict[str, Entry]:
    """The bare loop with a compiled network, and ours with compiled attacks."""
    last = in_channels_last(what)
    found: dict[str, Entry] = {BASE: (what, bare)}
    for mode in ("default", "reduce-overhead"):
        entry = last, _engine(what, compile=mode)
        found[f"ours, folded, channels_last, compiled {mode}"] = entry
        entry = replace(last, compile=mode), bare
        found[f"{BASE}, channels_last, compiled {mode}"] = entry
    return found


def _engine(what: Task, **options: Any) -> Any:
    precision: Precision = "bf16" if what.numerics == "bf16" else "32"
    return partial(ours, engine=AttackEngine(precision=precision, **options))
