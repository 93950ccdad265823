"""Where numbers stopped being numbers: asked only after it has happened."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from common.errors import DivergedError
from common.objectives import objective_of

_REMEDY = "Lower model.optimizer.lr, set trainer.gradient_clip_val, or train in 32-true precision"


class FiniteGuard:
    """Stops training where numbers stop being finite, on all processes together.

    The host waits for the device once per batch, for the loss, as it would for a check of the loss
    alone; what is watched in between (gradients, the attack) is looked at with it. The processes
    add their numbers up before they look, in the reduction that the logged loss needs anyway: NaN
    on one of them is NaN on all, so all stop at the same place instead of waiting for each other.
    """

    def __init__(self) -> None:
        self._watched: dict[str, Tensor] = {}
        self._names: list[str] = []  # of the parameters whose gradients are watched
        self._step = 0  # the optimiser step that used them

    def watch(self, name: str, value: Tensor) -> None:
        """Have numbers looked at with the next loss."""
        self._watched[name] = value.detach()

    def watch_gradients(self, module: LightningModule) -> None:
        """Watch the gradients that the optimiser is about to use."""
        self._names, norms = gradient_norms(module)
        self._step = module.global_step
        self.watch("gradient", norms)

    def check(
        self, module: LightningModule, loss: Tensor, batch: Mapping[str, Tensor], batch_idx: int
    ) -> Tensor:
        """The loss, averaged over the processes, once it and all that is watched is finite.

        Args:
            module: Whose ``objective`` is trained.
            loss: Of this process's batch.
            batch: What the loss was computed from.
            batch_idx: Its number within the epoch.

        Raises:
            DivergedError: If not, on every process alike: what, where, and at which step.
        """
        numbers = self._numbers(loss)
        mean = _reduced(module, numbers)
        if bool(torch.isfinite(mean).all()):
            self._watched.clear()
            return mean[0]
        raise DivergedError(
            _agreed(module, self._sentence(module, numbers, loss, batch, batch_idx))
        )

    def check_watched(self, module: LightningModule) -> None:
        """The same without a loss, at the end of an epoch.

        Raises:
            DivergedError: If something watched is not finite.
        """
        if not self._watched:
            return
        numbers = self._numbers(torch.zeros((), device=module.device))
        if not bool(torch.isfinite(_reduced(module, numbers)).all()):
            raise DivergedError(_agreed(module, self._sentence(module, numbers, None, {}, 0)))
        self._watched.clear()

    def _numbers(self, loss: Tensor) -> Tensor:
        """The loss and a sum for each thing watched, which is finite if all of it is."""
        kind = torch.promote_types(loss.dtype, torch.float32)
        sums = [value.sum().to(loss.device, kind) for value in self._watched.values()]
        return torch.stack([loss.detach().to(kind), *sums])

    # ---- words -------------------------------------------------------------------------------

    def _sentence(
        self,
        module: LightningModule,
        numbers: Tensor,
        loss: Tensor | None,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> str | None:
        """What went wrong in this process; ``None`` if it was another's numbers."""
        bad = [not bool(torch.isfinite(number)) for number in numbers]
        wrong = {name for name, is_bad in zip(["loss", *self._watched], bad, strict=True) if is_bad}
        where = ""
        if loss is not None:  # all processes look, because layers may talk to each other
            inputs = {key: batch[key] for key in ("x", "x_adv") if key in batch}
            fault = first_fault(module, lambda: _outer(module, dict(batch)), inputs)
            where = f"; the first that is not finite: {fault}" if fault else ""
        at = f"at epoch {module.current_epoch}, step {module.global_step} (batch {batch_idx})"
        kept = f"no step was taken with it and the last checkpoint is from before. {_REMEDY}"
        if "gradient" in wrong:
            names = bad_names(self._names, self._watched["gradient"])
            return (
                f"the gradient was not finite at epoch {module.current_epoch}, step {self._step}: "
                f"{len(names)} of {len(self._names)} parameters, the one nearest to the loss "
                f"{names[0]}; no checkpoint was written after it. {_REMEDY}"
            )
        if loss is not None and "loss" in wrong:
            return f"the training loss became {loss.item()} {at}{where}; {kept}"
        if "attack" in wrong:
            lost = int((~torch.isfinite(self._watched["attack"])).sum())
            return (
                f"the attack had no finite gradient for {lost} of "
                f"{len(self._watched['attack'])} examples {at}{where}; {kept}"
            )
        return f"{min(wrong)} was not finite {at}{where}; {kept}" if wrong else None


def _world_size(module: LightningModule) -> int:
    return 1 if module._trainer is None else module.trainer.world_size


def _reduced(module: LightningModule, numbers: Tensor) -> Tensor:
    """Their mean over the processes."""
    if _world_size(module) == 1:
        return numbers
    return cast(Tensor, module.trainer.strategy.reduce(numbers.clone(), reduce_op="mean"))


def _agreed(module: LightningModule, sentence: str | None) -> str:
    """The sentence of the first process that has one, with its rank."""
    size = _world_size(module)
    if size == 1:
        return sentence or "numbers stopped being finite"
    sentences: list[str | None] = [None] * size
    torch.distributed.all_gather_object(sentences, sentence)
    for rank, found in enumerate(sentences):
        if found is not None:
            return f"on rank {rank} of {size}: {found}"
    return f"the sum over {size} processes was not finite. {_REMEDY}"


def _outer(module: LightningModule, batch: dict[str, Tensor]) -> Tensor:
    return objective_of(module).outer(module, batch)


def first_fault(
    module: nn.Module, loss_fn: Callable[[], Tensor], inputs: Mapping[str, Tensor]
) -> str:
    """Name the first thing that is not finite, in the order things are computed.

    Parameters and buffers, then the batch, then the layers' outputs in a second forward pass, then
    the loss, then the gradients in a second backward pass, from the loss backwards. No pass is cut
    short, so that layers which talk to other processes do it equally often everywhere. Running
    statistics and random numbers move; this is for a run that ends.

    Args:
        module: Whose parameters, buffers and layers are looked at.
        loss_fn: The loss, computed anew.
        inputs: What the loss was computed from, by name.

    Returns:
        Words for a message; empty if this time everything is finite.
    """
    values: dict[str, Tensor] = {f"parameter {k}": v for k, v in module.named_parameters()}
    values |= {f"buffer {k}": v for k, v in module.named_buffers()}
    values |= {f"the batch's {k}": v for k, v in inputs.items()}
    found = [name for name, value in values.items() if not is_finite(value)]
    with torch.inference_mode(False), torch.enable_grad(), _recorded(module) as layers:
        loss = loss_fn()
        found += [f"output of {layer}" for layer in layers]
        if not is_finite(loss):
            found.append("the loss alone, every layer's output is finite")
        found += [f"gradient of {name}" for name in _bad_gradients(module, loss)]
    return found[0] if found else ""


def is_finite(value: Any) -> bool:
    """Whether all numbers of a tensor are finite; tensors in tuples, lists and dicts count."""
    if isinstance(value, Tensor):
        numbers = value.detach()
        return not numbers.is_floating_point() or bool(torch.isfinite(numbers).all())
    if isinstance(value, dict):
        return all(is_finite(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(is_finite(part) for part in value)
    return True


def bad_names(names: list[str], norms: Tensor) -> list[str]:
    """The names whose norm is not finite, the last first: nearest to the loss.

    Args:
        names: Of the parameters, in the order of the network.
        norms: Of their gradients, ``(len(names),)``.
    """
    finite = torch.isfinite(norms).tolist()
    return [name for name, fine in zip(names, finite, strict=True) if not fine][::-1]


def gradient_norms(module: nn.Module) -> tuple[list[str], Tensor]:
    """Names and l2 norms of the gradients there are; nothing waits for the device."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return [], torch.zeros(0)
    norms = torch._foreach_norm([gradient for _, gradient in named])
    return [name for name, _ in named], torch.stack([norm.float() for norm in norms])


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[str]]:
    """Names of layers with finite inputs and an output that is not, in the order they end."""
    found: list[str] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if is_finite(inputs) and not is_finite(output):
                found.append(f"{name} ({type(layer).__name__})")

        return hook

    handles = [
        layer.register_forward_hook(hook_for(name))
        for name, layer in module.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _bad_gradients(module: nn.Module, loss: Tensor) -> list[str]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not loss.requires_grad or not named:
        return []
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return [
        name
        for (name, _), gradient in reversed(list(zip(named, gradients, strict=True)))
        if gradient is not None and not is_finite(gradient)
    ]
