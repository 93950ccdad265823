"""Steps of adversarial training: the bare loop everything is compared with, and ours."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.compiled import CompileMode
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD
from common.modes import frozen

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network in eval mode, x, y) -> x_adv; linf, started at x so that all give the same images."""

Numerics = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Task:
    """What all candidates do: PGD on cross-entropy, then one step of SGD with momentum.

    ``numerics`` are those of attack and update (:func:`computed_in`); ``compile`` is the mode in
    which the network is compiled for both, if any.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    numerics: Numerics = "fp32"
    compile: CompileMode | None = None


Build = Callable[[Task], Attack]
"""Makes the attack with the settings of a task."""


@contextmanager
def computed_in(numerics: Numerics, device: str) -> Iterator[None]:
    """Float32 without or with a GPU's TF32 units, or autocast to bfloat16.

    torch's own default lies between the first two: TF32 in convolutions alone.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = numerics != "fp32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=numerics == "bf16"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def in_channels_last(task: Task) -> Task:
    """The same task with network and images in the layout ``NHWC``."""
    net = copy.deepcopy(task.net).to(memory_format=torch.channels_last)
    return replace(task, net=net, x=task.x.contiguous(memory_format=torch.channels_last))


def bare(task: Task, by_backward: bool = False) -> Attack:
    """The loop one writes by hand: input gradients only, no clones, no last forward pass.

    ``by_backward`` is the same with ``loss.backward()``, which computes every weight gradient too.
    So would a compiled network whose parameters are not frozen.
    """

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with nullcontext() if task.compile is None else frozen(net):
            return climbed(net, x, y)

    def climbed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
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
        with computed_in(self.task.numerics, x.device.type):
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
        with computed_in(self.task.numerics, self.task.x.device.type):
            return self.attack(self.net, self.task.x, self.task.y).detach()


def candidate(task: Task, attack: Attack) -> Candidate:
    """Learning rate zero: all candidates go on attacking the same weights."""
    net = copy.deepcopy(task.net)
    if task.compile is not None:
        net.compile(mode=task.compile)
    is_fused = task.x.device.type == "cuda"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, fused=is_fused)
    return Candidate(task, attack, net, optimizer)
