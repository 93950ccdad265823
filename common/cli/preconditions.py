"""What a command needs beside settings that exist: a seed, an end, a checkpoint and devices."""

import glob
import os
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from common.cli.draft import number_of
from common.errors import CheckpointError, ConfigurationError
from common.files import check_torch_file
from common.limits import LARGEST_SEED, MOST_JSON_BYTES
from common.packages import CONFIGS
from common.results.labels import LABELS
from common.settings import class_paths, type_name

LIGHTNING_VERSION = "pytorch-lightning_version"

NAMED = (*LABELS, "best")
"""Values of ``--ckpt_path`` beside files; ``best`` is what was selected."""


def experiment_of(files: Sequence[Path]) -> str:
    """The stem of the first configuration that is no overlay."""
    own = (path.stem for path in files if path.resolve().parent != CONFIGS)
    return next(own, "unnamed")


def check_seed(seed: Any) -> None:
    """Refuse what is no seed (Lightning would draw one), with a ConfigurationError."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ConfigurationError(
            f"seed_everything must be a whole number from 0 to {LARGEST_SEED}, got {seed}"
        )


def check_limits(trainer: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer under which training never ends, or never begins.

    Values may be as in a file or on the command line, numbers as text.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if number_of(trainer.get(name)) == 0:
            raise ConfigurationError(
                f"trainer.{name} is 0, so nothing would be trained; make it at least 1"
            )
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if number_of(value := trainer.get(name)) < 1:
            raise ConfigurationError(f"trainer.{name} must be at least 1, got {value}")
    if number_of(clip := trainer.get("gradient_clip_val")) < 0:
        raise ConfigurationError(
            f"trainer.gradient_clip_val must not be negative, got {clip}; null clips nothing"
        )
    named = class_paths(trainer.get("callbacks"))
    ends = any(type_name(path) in ("EarlyStopping", "Timer") for path in named)
    limits = [number_of(trainer.get(name)) for name in ("max_epochs", "max_steps")]
    if limits[0] == -1 and not limits[1] >= 0 and not (trainer.get("max_time") or ends):
        raise ConfigurationError(
            "trainer.max_epochs is -1, so training would never end; give trainer.max_epochs, "
            "max_steps or max_time, or a callback such as EarlyStopping"
        )


def check_checkpoint(settings: Mapping[str, Any], package: str, files: Sequence[Path]) -> None:
    """Check that the checkpoint of a command can be a file of torch.save.

    Raises:
        CheckpointError: If it is missing or something else.
    """
    name, trainer = settings.get("ckpt_path"), settings.get("trainer") or {}
    if not isinstance(name, str) or not isinstance(trainer, Mapping):
        return
    if name not in NAMED:
        path = Path(name).absolute()
        check_torch_file(path)
        check_version(path, _pickled(path))
        return
    experiment = settings.get("experiment") or experiment_of(files)
    seed = f"seed{settings.get('seed_everything')}"
    usual = Path(str(settings.get("runs", "runs")), package, str(experiment), seed)
    base = Path(trainer.get("default_root_dir") or usual)
    stem = "selected" if name == "best" else name
    path = base / "checkpoints" / f"{stem}.ckpt"
    if not any(
        (run / path.relative_to(base)).exists()
        for run in (base, *base.parent.glob(f"{glob.escape(base.name)}-v*"))
    ):
        raise CheckpointError(
            f"{path} does not exist; train first: python -m {package} fit --config {experiment}"
        )


def check_version(path: str | Path, keys: Container[Any]) -> None:
    """Check that Lightning wrote a checkpoint, or something that says so.

    Args:
        path: Of the checkpoint.
        keys: What it holds, as a mapping or pickled.

    Raises:
        CheckpointError: If not.
    """
    if (LIGHTNING_VERSION.encode() if isinstance(keys, bytes) else LIGHTNING_VERSION) not in keys:
        raise CheckpointError(
            f"the checkpoint {path} has no {LIGHTNING_VERSION}, which Lightning needs; give a file "
            "that a run has written, or evaluate its weights with python -m common.evaluation "
            "--model MODULE:FACTORY --weights FILE"
        )


def _pickled(path: Path) -> bytes:
    """The part of a checkpoint that names what it holds; the version itself if there is none."""
    try:
        with ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(name) as file:
                return file.read(MOST_JSON_BYTES)
    except (OSError, BadZipFile, StopIteration):
        return LIGHTNING_VERSION.encode()  # the trainer, which loads the file, says more


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
    found = _found() if _may_have_gpu() else {}
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


def _may_have_gpu() -> bool:
    """Whether torch has to be asked for a GPU: on Linux each needs a device file."""
    files = (Path("/dev", name) for name in ("nvidiactl", "kfd", "dxg"))
    return not sys.platform.startswith("linux") or any(path.exists() for path in files)


def _found() -> dict[str, bool]:
    import torch  # seconds, for these settings alone

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
