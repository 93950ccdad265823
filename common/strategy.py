"""Distributed data parallel training whose numbers do not depend on the number of devices."""

import signal
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from common.versions import DDP_BUFFERS


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


class DeviceInvariantDDP(DDPStrategy):
    """DDP for which one device or eight give the same parameters and the same verdicts.

    - Batch-norm is computed over the global batch: by torch's ``SyncBatchNorm`` on GPUs, by
      :class:`GlobalBatchNorm` elsewhere. Running statistics are then equal on all ranks before the
      next attack begins, and DDP need not broadcast buffers.
    - Gradient buckets are views, which saves one copy of the gradients.
    - Ranks wait ten hours for each other by default, because attacks end at different times.

    The data module divides the global batch and never pads the evaluation data; attacks and
    augmentation draw their noise per example.

    Importing this module makes it Lightning's ``ddp``, and ``auto`` with several devices. Takes the
    arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`.
    """

    def __init__(self, timeout: timedelta | None = timedelta(hours=10), **kwargs: Any) -> None:
        kwargs.setdefault("gradient_as_bucket_view", True)
        kwargs.setdefault(DDP_BUFFERS, False)
        super().__init__(timeout=timeout, **kwargs)

    def setup_environment(self) -> None:
        """Join the others; a process that Lightning started ends with the one that started it."""
        environment = self.cluster_environment
        if isinstance(environment, LightningEnvironment) and self.local_rank > 0:
            end_with_parent()
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Choose the batch-norm of this device before DDP wraps the module."""
        if self.root_device.type == "cuda":
            self._layer_sync = TorchSyncBatchNorm()
        else:
            self._layer_sync = GlobalBatchNormSync()
        super().setup(trainer)


class GlobalBatchNorm(_BatchNorm):
    """Batch-norm over the batches of all ranks, in two passes; ``SyncBatchNorm`` needs a GPU.

    The all-reduce is differentiable, so the gradient is that of batch-norm on the global batch.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)`` over everything but the channels."""
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = input.new_tensor([input.numel() / input.shape[1]])
        torch.distributed.all_reduce(count)
        mean = _SumOverRanks.apply(input.sum(dims)) / count
        centred = input - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None:
            seen = cast(Tensor, self.num_batches_tracked).add_(1)
            momentum = 1.0 / float(seen) if self.momentum is None else self.momentum
            with torch.no_grad():
                unbiased = variance * count / (count - 1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        normalised: Tensor = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised


class GlobalBatchNormSync(LayerSync):
    """Changes the class of batch-norm layers to :class:`GlobalBatchNorm`, and back."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise all batch-norm layers of ``model``."""
        for module in model.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.__dict__["_local_class"] = type(module)
                module.__class__ = GlobalBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give every layer its own class back."""
        for module in model.modules():
            if isinstance(module, GlobalBatchNorm):
                module.__class__ = module.__dict__.pop("_local_class")
        return model


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed, to free its device."""
    try:
        import ctypes

        ctypes.CDLL("libc.so.6", use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):  # not Linux
        return


_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
for _name, _start_method in _METHODS.items():
    StrategyRegistry.register(
        _name,
        DeviceInvariantDDP,
        description=f"device-invariant DDP with start_method {_start_method!r}",
        override=True,
        start_method=_start_method,
    )
