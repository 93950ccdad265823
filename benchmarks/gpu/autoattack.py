"""AutoAttack and the suite ``strong``: seconds, passes and verdicts on one robust network."""

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import passes
from benchmarks.evaluation import right
from benchmarks.gpu.journal import Row
from benchmarks.gpu.parts import Measurements, Setting
from benchmarks.loops import Candidate, Task, computed_in, ours
from common.attacks.engine.network import AttackEngine
from common.checkpoints import load_weights
from common.data.sources import Digits
from common.data.subset import subset
from common.errors import CheckpointError
from common.files import write_sealed
from common.modes import frozen
from common.networks.resnet import DigitsResNet, ResNet18

EPS = {False: 0.1, True: 1.0}
"""Small runs break every image at once."""
EPOCHS = 12
IMAGES = 250  # a batch of both


def measurements(setting: Setting) -> Measurements:
    """Ours with the attack engine, the official package, ours without."""
    engine = AttackEngine()
    runs: dict[str, Callable[..., Any]] = {
        "suite autoattack, folded": partial(passes.ours, suite="autoattack", engine=engine),
        "suite strong, folded": partial(passes.ours, engine=engine),
        "official package": passes.official,
        "suite autoattack": partial(passes.ours, suite="autoattack"),
        "suite strong": passes.ours,
    }
    return {name: partial(_attacked, setting, run) for name, run in runs.items()}


def _attacked(setting: Setting, run: Callable[..., tuple[Tensor, Row]]) -> Row:
    net = network(setting)
    images, labels = Digits(_size(setting)).load("test")
    rows = subset(labels, 4 if setting.is_smoke else IMAGES)
    x = (images[rows].float() / 255.0).to(setting.device)
    y = labels[rows].to(setting.device)
    with computed_in("fp32", setting.device), frozen(net):
        clean = int(right(net, x, y).sum())
        held, cost = run(net, x, y, EPS[setting.is_smoke])
    robust = int(held.sum())
    total = cost["forward"] + cost["backward"]
    return {
        "network": type(net).__name__,
        "images": len(y),
        "clean": clean,
        "robust": robust,
        **{f"attack_{name}" if name == "seconds" else name: value for name, value in cost.items()},
        "summary": f"{robust} of {len(y)} withstand it ({clean} clean), {cost['seconds']:.1f} s, "
        f"{total:,} passes of images, {total / cost['seconds']:,.0f} a second",
    }


def _size(setting: Setting) -> int:
    return 8 if setting.is_smoke else 32


def network(setting: Setting) -> nn.Module:
    """A ResNet-18 after adversarial training on digits of 32x32; trained once."""
    size = "small" if setting.is_smoke else "whole"
    return _network(setting.device, setting.is_smoke, setting.runs / f"autoattack-{size}.pt")


@cache
def _network(device: str, is_smoke: bool, path: Path) -> nn.Module:
    torch.manual_seed(0)
    net = (DigitsResNet() if is_smoke else ResNet18(in_channels=1)).to(device)
    with suppress(CheckpointError):  # missing, damaged: it is trained again
        load_weights(net, path)
        return net.eval()
    images, labels = Digits(8 if is_smoke else 32).load("train")
    x, y = (images.float() / 255.0).to(device), labels.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    eps = EPS[False]
    whole = Task(net, x, y, eps=eps, step_size=eps / 3, steps=5, numerics="bf16")
    attack = ours(whole)
    for _ in range(1 if is_smoke else EPOCHS):
        for rows in torch.split(torch.randperm(len(y)).to(device), 100):
            Candidate(replace(whole, x=x[rows], y=y[rows]), attack, net, optimizer)()
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    write_sealed(path, content)
    return net.eval()
