"""Stops a run at the first loss, gradient or attack that is not finite, and names its place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn

from common.classifier import RobustClassifier
from common.errors import DivergedError
from common.objectives import Batch

_REMEDY = "Lower model.optimizer.lr, set trainer.gradient_clip_val, or train in 32-true precision"


class FiniteGuard(Callback):
    """Stops training at the first number that is not finite, on all processes together.

    The host waits for the device once per batch, before the backward pass: for the loss and for
    what was watched since (gradients, the attack). The numbers are summed over the processes
    first: NaN on one of them is NaN on all, so all stop at the same place.
    """

    def __init__(self) -> None:
        self._batch: Batch = {}
        self._batch_idx = 0
        self._names: list[str] = []  # of the parameters whose gradients are watched
        self._step = 0  # the optimiser step that used them

    def on_train_batch_start(self, _: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        """Remember what the loss is computed from."""
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, module: Any, loss: Tensor) -> None:
        """Check the loss and everything watched since the last one.

        Raises:
            DivergedError: On every process alike: what is not finite, where, at which step.
        """
        self._check(trainer, module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, *_: Any) -> None:
        """Watch the gradients; the scaler of fp16 skips infinite ones itself."""
        if trainer.precision != "16-mixed":
            self._names, norms = gradient_norms(module)
            self._step = module.global_step
            module.watch("gradient", norms)

    def on_train_batch_end(self, *args: Any) -> None:
        """Release the batch."""
        self._batch = {}

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        """Check the gradients of the last step before a checkpoint may be selected."""
        self._check(trainer, module, None)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """The same where there is no validation."""
        self._check(trainer, module, None)

    def _check(self, trainer: Trainer, module: RobustClassifier, loss: Tensor | None) -> None:
        values = {} if loss is None else {"loss": loss.detach()}
        values |= module.watched
        if not values:
            return
        # Each sum is finite if all of it is.
        kind = torch.promote_types(next(iter(values.values())).dtype, torch.float32)
        numbers = torch.stack([value.sum().to(module.device, kind) for value in values.values()])
        mean = numbers
        if trainer.world_size > 1:
            mean = cast(Tensor, trainer.strategy.reduce(numbers.clone(), reduce_op="mean"))
        if not bool(torch.isfinite(mean).all()):
            wrong = [
                name for name, ok in zip(values, torch.isfinite(numbers), strict=True) if not ok
            ]
            raise DivergedError(_agreed(trainer, self._sentence(trainer, module, wrong, loss)))
        module.watched.clear()

    def _sentence(
        self, trainer: Trainer, module: RobustClassifier, wrong: list[str], loss: Tensor | None
    ) -> str | None:
        """What went wrong in this process; ``None`` if it was another's numbers."""
        watched = module.watched
        where = ""
        if loss is not None:  # all processes look, because layers may talk to each other
            batch = self._batch
            inputs = {key: value for key, value in batch.items() if key in ("x", "x_adv")}
            with trainer.precision_plugin.train_step_context():
                fault = first_fault(
                    module, lambda: module.objective.outer(module, dict(batch)), inputs
                )
            where = f"; the first that is not finite: {fault}" if fault else ""
        at = (
            f"at epoch {trainer.current_epoch}, step {trainer.global_step} "
            f"(batch {self._batch_idx}){where}"
        )
        kept = f"no step was taken with it and the last checkpoint is from before. {_REMEDY}"
        if "gradient" in wrong:
            finite = torch.isfinite(watched["gradient"]).tolist()
            names = [name for name, fine in zip(self._names, finite, strict=True) if not fine]
            return (
                f"the gradient was not finite at epoch {trainer.current_epoch}, step {self._step}: "
                f"{len(names)} of {len(finite)} parameters, the one nearest to the loss "
                f"{names[-1]}; no checkpoint was written after it. {_REMEDY}"
            )
        if loss is not None and "loss" in wrong:
            return f"the training loss became {loss.item()} {at}; {kept}"
        if "attack" in wrong:
            lost = int((~torch.isfinite(watched["attack"])).sum())
            return (
                f"the attack had no finite gradient for {lost} of {len(watched['attack'])} "
                f"examples {at}; {kept}"
            )
        return f"{min(wrong)} was not finite {at}; {kept}" if wrong else None


def _agreed(trainer: Trainer, sentence: str | None) -> str:
    """The sentence of the first process that has one, with its rank."""
    size = trainer.world_size
    if size == 1:
        return sentence or "a number is not finite"
    sentences: list[str | None] = [None] * size
    torch.distributed.all_gather_object(sentences, sentence)
    for rank, found in enumerate(sentences):
        if found is not None:
            return f"on rank {rank} of {size}: {found}"
    return f"the sum over {size} processes was not finite. {_REMEDY}"


def first_fault(
    module: nn.Module, loss_fn: Callable[[], Tensor], inputs: Mapping[str, Tensor]
) -> str:
    """Name the first tensor that is not finite, in the order of computing.

    Parameters and buffers, the batch, the layers' outputs in a second forward pass, the loss, and
    the gradients in a second backward pass, from the loss backwards. All passes are complete, so
    that layers which communicate do so equally often on all processes. Running statistics and
    random numbers move; this is for a run that ends.

    Args:
        module: Whose parameters, buffers and layers are checked.
        loss_fn: Computes the loss again.
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
            found.append("only the loss, every layer's output is finite")
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if loss.requires_grad and trained:
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            named = list(zip(trained, gradients, strict=True))
            found += [f"gradient of {name}" for name, g in reversed(named) if not is_finite(g)]
    return found[0] if found else ""


def is_finite(value: Any) -> bool:
    """Whether all numbers of a tensor are finite; tensors in tuples, lists and dicts count."""
    if isinstance(value, Tensor):
        numbers = value.detach()
        return not numbers.is_floating_point() or bool(torch.isfinite(numbers).all())
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list | tuple) or all(map(is_finite, value))


def gradient_norms(module: nn.Module) -> tuple[list[str], Tensor]:
    """Names and l2 norms of the gradients there are; nothing waits for the device."""
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if not named:
        return [], torch.zeros(0)
    norms = torch._foreach_norm(list(named.values()))
    return list(named), torch.stack([norm.float() for norm in norms])


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[str]]:
    """Names of layers with finite inputs and an output that is not, in the order they end."""
    found: list[str] = []
    names = {layer: name for name, layer in module.named_modules() if name}

    def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
        if is_finite(inputs) and not is_finite(output):
            found.append(f"{names[layer]} ({type(layer).__name__})")

    handles = [layer.register_forward_hook(hook) for layer in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
