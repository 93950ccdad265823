"""The attacks of other libraries, with the task's settings; a missing library says why."""

import importlib
import importlib.metadata
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.loops import Attack, Task


def torchattacks(task: Task) -> Attack:
    """torchattacks.PGD."""
    library = importlib.import_module("torchattacks")

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        made = library.PGD(net, task.eps, task.step_size, task.steps, random_start=False)
        found: Tensor = made(x, y)
        return found

    return attack


def foolbox(task: Task) -> Attack:
    """foolbox.attacks.LinfPGD."""
    library = importlib.import_module("foolbox")
    pgd = library.attacks.LinfPGD(abs_stepsize=task.step_size, steps=task.steps, random_start=False)

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = library.PyTorchModel(net, bounds=(0, 1), device=x.device)
        found: Tensor = pgd.run(model, x, y, epsilon=task.eps)
        return found

    return attack


def art(task: Task) -> Attack:
    """ProjectedGradientDescentPyTorch of adversarial-robustness-toolbox."""
    classification = importlib.import_module("art.estimators.classification")
    evasion = importlib.import_module("art.attacks.evasion")

    made: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def build(net: nn.Module, x: Tensor) -> Any:
        with torch.no_grad():
            classes = net(x[:1]).shape[1]
        model = classification.PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
            device_type="gpu" if x.is_cuda else "cpu",
        )  # fmt: skip
        return evasion.ProjectedGradientDescentPyTorch(
            model, np.inf, task.eps, task.step_size, max_iter=task.steps, num_random_init=0,
            batch_size=len(x), verbose=False,
        )  # fmt: skip

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if net not in made:
            made[net] = build(net, x)
        found: Any = made[net].generate(x.cpu().numpy(), y.cpu().numpy())
        net.eval()
        return torch.from_numpy(found).to(x.device)

    return attack


PEERS: dict[str, tuple[str, Callable[[Task], Attack]]] = {
    "torchattacks": ("torchattacks", torchattacks),
    "foolbox": ("foolbox", foolbox),
    "adversarial-robustness-toolbox": ("adversarial-robustness-toolbox", art),
}


def available(task: Task) -> tuple[dict[str, Attack], dict[str, str]]:
    """The peers that can be imported, by name and version, and why the others cannot."""
    found: dict[str, Attack] = {}
    missing: dict[str, str] = {}
    for name, (distribution, build) in PEERS.items():
        try:
            attack = build(task)
            found[f"{name} {importlib.metadata.version(distribution)}"] = attack
        except Exception as error:  # a library may fail to import in many ways
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing
