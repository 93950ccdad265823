"""Evaluation: the official AutoAttack alone against ours, and a hundred steps of PGD."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pyautoattack
import torch
from torch import Tensor, nn

from benchmarks.loops import Candidate, Task, bare, ours
from benchmarks.timing import Keep, Timing, interleaved
from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.suite import SuiteEntry, steps_of
from common.networks.resnet import DigitsResNet

Run = Callable[[], Tensor]
"""An attack: which images withstand it, bool ``(N,)``."""

EPS = 0.1


def robust_digits(
    epochs: int = 6, seed: int = 0, engine: AttackEngine | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network after adversarial training on the embedded digits, and test images."""
    torch.manual_seed(seed)
    source = Digits()
    (x_train, y_train), (x, y) = (
        (x.float() / 255.0, y.long()) for x, y in (source.load("train"), source.load("test"))
    )
    net = DigitsResNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attack = ours(Task(net, x, y, eps=EPS, step_size=EPS / 3, steps=5), engine)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(y_train)), 100):
            task = Task(net, x_train[rows], y_train[rows])
            Candidate(task, attack, net, optimizer)()
    return net.eval(), x, y


def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the network classifies correctly, bool ``(N,)``."""
    with torch.no_grad():
        found: Tensor = net(x).argmax(1) == y
    return found


def compare(examples: int, rounds: int, keep: Keep) -> None:
    """AutoAttack standard and PGD-100, verdict by verdict."""
    net, x, y = robust_digits()
    clean = right(net, x, y).float().mean().item()
    found: dict[str, Any] = {
        "setting": f"DigitsResNet after PGD-5 training on 8x8 digits, clean accuracy {clean:.3f}; "
        f"AutoAttack on the first {examples} test images in linf eps {EPS}, PGD-100 on all "
        f"{len(y)} at a radius that breaks half of them",
        "examples": examples,
    }
    for key, runs, repeats in (
        ("autoattack", _autoattack(net, x[:examples], y[:examples]), rounds),
        ("pgd100", _pgd100(net, x, y), 3),
    ):
        print(f"{key}: {len(runs)} candidates, {repeats} round(s)", flush=True)

        def kept(part: dict[str, Any], key: str = key) -> None:
            found[key] = part
            keep(found)

        _measured(net, runs, repeats, kept)


def _autoattack(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Run]:
    entry = SuiteEntry(AutoAttack(EPS))
    return {
        "official package alone": lambda: right(net, autoattacked(net, x, y), y),
        "ours, no engine": partial(_suite, net, x, y, entry, "aa/square"),
        "ours, folded, channels_last": partial(
            _suite, net, x, y, entry, "aa/square", AttackEngine()
        ),
    }


def autoattacked(net: nn.Module, x: Tensor, y: Tensor, eps: float = EPS) -> Tensor:
    """Images of the official AutoAttack, called as its documentation says."""
    attack = pyautoattack.AutoAttack(
        net, norm="Linf", eps=eps, version="standard", seed=0, device=x.device
    )
    attack.verbose = False
    with torch.random.fork_rng():
        x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=250)[0]
    return x_adv


def _suite(
    net: nn.Module, x: Tensor, y: Tensor, entry: SuiteEntry, key: str, engine: Any = None
) -> Tensor:
    """Through the whole of our evaluation, clean pass, bookkeeping and all."""
    model = Victim(net, 10).eval()
    batch = {"x": x, "y": y, "index": torch.arange(len(y))}
    steps = steps_of({key.partition("/")[0]: entry}, model, 10, 0, engine)
    return run_steps(model, batch, steps, seed=0, batch_size=len(y)).correct[key]


def _pgd100(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Run]:
    """At a radius at which about half of the images withstand PGD-20."""

    def plain(eps: float, step_size: float, steps: int) -> Tensor:
        loop = bare(Task(net, x, y, eps=eps, step_size=step_size, steps=steps))
        return right(net, loop(net, x, y), y)

    low, high = 0.0, 0.5
    for _ in range(8):
        radius = (low + high) / 2
        is_weak = plain(radius, radius / 5, 20).float().mean() > 0.5
        low, high = (radius, high) if is_weak else (low, radius)
    radius = (low + high) / 2
    attack = PGD(radius, radius / 10, 100, start="zero")

    def suite(is_compact: bool, engine: AttackEngine | None = None) -> Run:
        entry = SuiteEntry(attack, until_broken=is_compact)
        return partial(_suite, net, x, y, entry, "pgd/ce_f", engine)

    return {
        "loop without compaction": partial(plain, radius, radius / 10, 100),
        "ours, every step": suite(False),
        "ours, until broken": suite(True),
        "ours, until broken, folded": suite(True, AttackEngine(channels_last=False)),
    }


def _measured(net: nn.Module, runs: dict[str, Run], rounds: int, keep: Keep) -> None:
    """Times, verdicts beside the first's, and how many images went through the network."""
    base = next(iter(runs))
    verdicts: dict[str, Tensor] = {}
    images, done = dict.fromkeys(runs, 0), itertools.count(1)

    def run(name: str) -> None:
        images[name] = 0

        def count(module: nn.Module, args: Any) -> None:
            images[name] += len(args[0])

        with net.register_forward_pre_hook(count):
            verdicts[name] = runs[name]()

    def kept(times: dict[str, Timing]) -> None:
        rows = {
            name: {
                **vars(timing),
                "images": images[name],
                "robust": int(verdicts[name].sum()),
                "broken_here_alone": int((verdicts[base] & ~verdicts[name]).sum()),
                "broken_there_alone": int((verdicts[name] & ~verdicts[base]).sum()),
            }
            for name, timing in times.items()
        }
        keep({"rows": rows, "rounds": next(done)})

    interleaved({name: partial(run, name) for name in runs}, base, rounds, keep=kept)
