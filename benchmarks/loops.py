"""Steps of adversarial training: the bare loop everything is compared with, and ours."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.modes import frozen

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network in eval mode, x, y) -> x_adv; linf, started at x so that all give the same images."""


@dataclass(frozen=True)
class Task:
    """What all candidates do: PGD on cross-entropy, then one step of SGD with momentum."""

    net: nn.Module
    x: Tensor
    y: Tensor
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10


def bare(task: Task, by_backward: bool = False) -> Attack:
    """The loop one writes by hand: input gradients only, no clones, no last forward pass.

    ``by_backward`` is the same with ``loss.backward()``, which computes every weight gradient too.
    """

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        lower, upper = (x - task.eps).clamp(min=0), (x + task.eps).clamp(max=1)
        x_adv = x
        for _ in range(task.steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(net(x_adv), y, reduction="sum")
            if by_backward:
                loss.backward()  # type: ignore[no-untyped-call]
                gradient = cast(Tensor, x_adv.grad)
            else:
                (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + task.step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, lower), upper)
        return x_adv

    return attack


def ours(task: Task, engine: AttackEngine | None = None) -> Attack:
    """The attack as training calls it."""
    pgd = PGD(task.eps, task.step_size, task.steps, start="zero")

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with frozen(net), nullcontext() if engine is None else engine.applied(net, x):
            return pgd(lambda z: cross_entropy(net(z), y), x)

    return attack


def one_graph(task: Task, engine: AttackEngine) -> Attack:
    """The engine's network with a whole attack step compiled: pass, gradient and projection."""

    def step(net: nn.Module, x_adv: Tensor, y: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda z: cross_entropy(net(z), y).sum())(x_adv)
        return torch.min(torch.max(x_adv + task.step_size * gradient.sign(), lower), upper)

    compiled = torch.compile(step, fullgraph=True)

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        lower, upper = (x - task.eps).clamp(min=0), (x + task.eps).clamp(max=1)
        x_adv = x
        with frozen(net), engine.applied(net, x):
            for _ in range(task.steps):
                x_adv = compiled(net, x_adv, y, lower, upper)
        return x_adv

    return attack


@dataclass
class Candidate:
    """A training step on a copy of the task's network."""

    task: Task
    attack: Attack
    net: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self) -> Tensor:
        """One step: the attack in eval mode, then the update."""
        x, y = self.task.x, self.task.y
        self.net.eval()
        x_adv = self.attack(self.net, x, y)
        self.net.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x_adv), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return x_adv

    def alive(self) -> list[Tensor]:
        """What is there between two steps: weights, statistics, their gradients, momentum."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        kept = [value for value in states if isinstance(value, Tensor)]
        return [*self.net.state_dict().values(), *gradients, *kept]

    def images(self) -> Tensor:
        """What the attack makes of the network as it is; weights and statistics stay."""
        self.net.eval()
        return self.attack(self.net, self.task.x, self.task.y).detach()


def candidate(task: Task, attack: Attack) -> Candidate:
    """Learning rate zero: all candidates go on attacking the same weights."""
    net = copy.deepcopy(task.net)
    is_fused = task.x.device.type == "cuda"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, fused=is_fused)
    return Candidate(task, attack, net, optimizer)
