"""Evaluation: the official AutoAttack alone against ours, and a hundred steps of PGD."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyautoattack
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loops import Task, bare, ours
from benchmarks.timing import interleaved
from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.evaluation.confirm import attacked, official
from common.evaluation.models import Victim
from common.evaluation.runner import run_steps
from common.evaluation.steps import Step
from common.evaluation.suite import SuiteEntry, steps_of
from common.networks.resnet import DigitsResNet

EPS = 0.1


def robust_digits(
    epochs: int = 6, seed: int = 0, engine: AttackEngine | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network after adversarial training on the embedded digits, and test images."""
    torch.manual_seed(seed)
    source = Digits()
    x_train, y_train = _floats(source.load("train"))
    x, y = _floats(source.load("test"))
    net = DigitsResNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attack = ours(Task(net, x, y, eps=EPS, step_size=EPS / 3, steps=5), engine)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(y_train)), 100):
            net.eval()
            x_adv = attack(net, x_train[rows], y_train[rows])
            net.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x_adv), y_train[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval(), x, y


def _floats(split: Any) -> tuple[Tensor, Tensor]:
    x, y = split
    return x.float() / 255.0, y.long()


def compare(examples: int, rounds: int) -> dict[str, Any]:
    """AutoAttack standard and PGD-100, verdict by verdict."""
    net, x, y = robust_digits()
    with torch.no_grad():
        clean = (net(x).argmax(1) == y).float().mean().item()
    return {
        "setting": f"DigitsResNet after PGD-5 training on 8x8 digits, clean accuracy {clean:.3f}; "
        f"AutoAttack on the first {examples} test images in linf eps {EPS}, PGD-100 on all "
        f"{len(y)} at a radius that breaks half of them",
        "examples": examples,
        "autoattack": _autoattack(net, x[:examples], y[:examples], rounds),
        "pgd100": _pgd100(net, x, y),
    }


def _autoattack(net: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    engines: dict[str, AttackEngine | None] = {
        "ours, no engine": None,
        "ours, folded, channels_last": AttackEngine(),
    }
    runs: dict[str, Callable[[], Tensor]] = {
        "official package alone": partial(_official, net, x, y)
    }
    entry = SuiteEntry(AutoAttack(EPS))
    for name, engine in engines.items():
        runs[name] = partial(_suite, net, x, y, entry, engine, "aa/square")
    # What suites do not do: see common.evaluation.suite.
    runs["bf16 first, float32 after it"] = partial(_reduced, net, x, y)
    return _measured(net, runs, "official package alone", rounds)


def _reduced(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    attack, engine = AutoAttack(EPS), AttackEngine(precision="bf16")
    model = Victim(net, 10).eval()
    steps = []
    for step in steps_of({"aa": SuiteEntry(attack)}, model, 10, 0):
        craft = partial(official, attack, str(step.settings["part"]), 0, None)
        steps.append(replace(step, run=partial(attacked, craft, step.threat, engine)))
    return _outcome(model, x, y, steps, "aa/square")


def _official(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """As its documentation says; verdicts from its images."""
    official = pyautoattack.AutoAttack(net, norm="Linf", eps=EPS, version="standard", seed=0)
    with torch.random.fork_rng():
        x_adv, _ = official.run_standard_evaluation(x, y, batch_size=250)
    with torch.no_grad():
        robust: Tensor = net(x_adv).argmax(1) == y
    return robust


def _pgd100(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    radius = _halving(net, x, y)
    attack = PGD(radius, radius / 10, 100, start="zero")

    def plain() -> Tensor:
        loop = bare(Task(net, x, y, eps=radius, step_size=radius / 10, steps=100))
        x_adv = loop(net, x, y)
        with torch.no_grad():
            robust: Tensor = net(x_adv).argmax(1) == y
        return robust

    def suite(engine: AttackEngine | None, is_compact: bool) -> Callable[[], Tensor]:
        entry = SuiteEntry(attack, until_broken=is_compact)
        return partial(_suite, net, x, y, entry, engine, "pgd/ce_f")

    runs = {
        "loop without compaction": plain,
        "ours, every step": suite(None, False),
        "ours, until broken": suite(None, True),
        "ours, until broken, folded": suite(AttackEngine(channels_last=False), True),
    }
    return _measured(net, runs, "loop without compaction", rounds=3) | {"eps": radius}


def _halving(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """A radius at which about half of the images withstand PGD-20."""
    low, high = 0.0, 0.5
    for _ in range(8):
        radius = (low + high) / 2
        loop = bare(Task(net, x, y, eps=radius, step_size=radius / 5, steps=20))
        with torch.no_grad():
            robust = (net(loop_images(loop, net, x, y)).argmax(1) == y).float().mean().item()
        low, high = (radius, high) if robust > 0.5 else (low, radius)
    return (low + high) / 2


def loop_images(loop: Any, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images of a loop, gradients switched on for it."""
    with torch.enable_grad():
        found: Tensor = loop(net, x, y)
    return found


def _suite(
    net: nn.Module, x: Tensor, y: Tensor, entry: SuiteEntry, engine: Any, key: str
) -> Tensor:
    """Through the whole of our evaluation, clean pass, bookkeeping and all."""
    model = Victim(net, 10).eval()
    steps = steps_of({key.partition("/")[0]: entry}, model, 10, 0, engine)
    return _outcome(model, x, y, steps, key)


def _outcome(model: nn.Module, x: Tensor, y: Tensor, steps: list[Step], key: str) -> Tensor:
    batch = {"x": x, "y": y, "index": torch.arange(len(y))}
    return run_steps(model, batch, steps, seed=0, batch_size=len(y)).correct[key]


def _measured(
    net: nn.Module, runs: dict[str, Callable[[], Tensor]], base: str, rounds: int
) -> dict[str, Any]:
    """Times, verdicts beside the base's, and how many images went through the network."""
    verdicts: dict[str, Tensor] = {}
    images = dict.fromkeys(runs, 0)

    def kept(name: str) -> Callable[[], None]:
        def run() -> None:
            images[name] = 0

            def count(module: nn.Module, args: Any) -> None:
                images[name] += len(args[0])

            with net.register_forward_pre_hook(count):
                verdicts[name] = runs[name]()

        return run

    begun = time.perf_counter()
    times = interleaved({name: kept(name) for name in runs}, base, rounds, warm_up=0)
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
    return {"rows": rows, "rounds": rounds, "seconds": time.perf_counter() - begun}
