"""The attacks of other libraries, with the task's settings; a missing library says why."""

import importlib
import importlib.metadata
import weakref
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.failures import reason
from benchmarks.loops import Attack, Build, Task


def torchattacks(task: Task) -> Attack:
    """torchattacks.PGD."""
    pgd = importlib.import_module("torchattacks").PGD
    settings = {"eps": task.eps, "alpha": task.step_size, "steps": task.steps}
    return lambda net, x, y: cast(Tensor, pgd(net, **settings, random_start=False)(x, y))


def foolbox(task: Task) -> Attack:
    """foolbox.attacks.LinfPGD."""
    library = importlib.import_module("foolbox")
    pgd = library.attacks.LinfPGD(abs_stepsize=task.step_size, steps=task.steps, random_start=False)

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = library.PyTorchModel(net, bounds=(0, 1), device=x.device)
        return cast(Tensor, pgd.run(model, x, y, epsilon=task.eps))

    return attack


def art(task: Task) -> Attack:
    """ProjectedGradientDescentPyTorch of adversarial-robustness-toolbox."""
    classification = importlib.import_module("art.estimators.classification")
    evasion = importlib.import_module("art.attacks.evasion")
    made: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if net not in made:
            with torch.no_grad():
                classes = net(x[:1]).shape[1]
            model = classification.PyTorchClassifier(
                net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
                device_type="gpu" if x.is_cuda else "cpu",
            )  # fmt: skip
            made[net] = evasion.ProjectedGradientDescentPyTorch(
                model, np.inf, task.eps, task.step_size, max_iter=task.steps, num_random_init=0,
                batch_size=len(x), verbose=False,
            )  # fmt: skip
        found = made[net].generate(x.cpu().numpy(), y.cpu().numpy())
        net.eval()
        return torch.from_numpy(found).to(x.device)

    return attack


PEERS: dict[str, Build] = {
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "adversarial-robustness-toolbox": art,
}
"""By the name of the distribution."""


def available(task: Task) -> tuple[dict[str, Build], dict[str, str]]:
    """The peers that work, by name and version, and why the others do not."""
    found: dict[str, Build] = {}
    missing: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            build(task)
            found[f"{name} {importlib.metadata.version(name)}"] = build
        except Exception as error:  # a library may fail to import in many ways
            missing[name] = reason(error)
    return found, missing
