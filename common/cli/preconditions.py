"""What a command needs beside its settings: a checkpoint, and the devices that it names."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigurationError
from common.files import check_torch_file
from common.packages import CONFIGS

NAMED = ("last", "selected", "best")
"""Values of ``--ckpt_path`` beside files; ``best`` is what was selected."""


def experiment_of(files: Sequence[Path]) -> str:
    """The stem of the first configuration that is no overlay."""
    own = (path.stem for path in files if path.resolve().parent != CONFIGS)
    return next(own, "unnamed")


def check_checkpoint(settings: Mapping[str, Any], package: str, files: Sequence[Path]) -> None:
    """Check that the checkpoint of a command can be a file of torch.save.

    Raises:
        CheckpointError: If it is missing or something else.
    """
    name, trainer = settings.get("ckpt_path"), settings.get("trainer") or {}
    if not isinstance(name, str) or not isinstance(trainer, Mapping):
        return
    if name not in NAMED:
        check_torch_file(Path(name).absolute())
        return
    experiment = settings.get("experiment") or experiment_of(files)
    seed = f"seed{settings.get('seed_everything')}"
    usual = Path(str(settings.get("runs", "runs")), package, str(experiment), seed)
    base = Path(trainer.get("default_root_dir") or usual)
    stem = "selected" if name == "best" else name
    path = base / "checkpoints" / f"{stem}.ckpt"
    if not any(
        (run / path.relative_to(base)).exists() for run in base.parent.glob(f"{base.name}*")
    ):
        raise CheckpointError(
            f"{path} does not exist; train first: python -m {package} fit --config {experiment}"
        )


def check_devices(settings: Mapping[str, Any]) -> None:
    """Check that there is the accelerator that is named, and a device for each process.

    Raises:
        ConfigurationError: If not.
    """
    trainer = settings.get("trainer")
    if not isinstance(trainer, Mapping):
        return
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that torchrun started
    is_one = processes > 1 and devices in ("auto", None) and accelerator in ("auto", "cpu", None)
    if accelerator not in ("gpu", "cuda", "mps") and not is_one:
        return
    import torch  # seconds, for these settings alone

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(accelerator, any(found.values())) and not is_one:
        raise ConfigurationError(
            f"trainer.accelerator is {accelerator} and torch finds none; give "
            "--trainer.accelerator cpu, or auto, which takes what is there"
        )
    if is_one and (accelerator == "cpu" or not any(found.values())):
        raise ConfigurationError(
            f"torchrun started {processes} processes and trainer.devices is {devices}, which is 1 "
            f"on a CPU; give --trainer.devices {processes}"
        )
