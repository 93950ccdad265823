"""Reading checkpoints without trusting them, and naming what is wrong with them."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from common.errors import CheckpointError
from common.files import damage_of, write_sealed


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, with their digest, and reads no damaged ones."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Replace the file at once.

        Raises:
            RunDirectoryError: If it cannot be written; the one before it is kept.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_sealed(path, content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Whatever was saved, on the CPU; nothing in the file is executed."""
        return cast(dict[str, Any], _read(Path(path)))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint on the CPU, tensors and plain values only.

    A file that carries its digest, as those of our runs do, is compared with it.

    Raises:
        CheckpointError: If the file is missing, damaged, holds code, or is no Lightning checkpoint.
    """
    path = Path(path)
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is no Lightning checkpoint (no state_dict in it); give a file from a run's "
            "checkpoints folder"
        )
    return cast(dict[str, Any], checkpoint)


def _read(path: Path) -> Any:
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        beside = f"; beside it there is {', '.join(found)}" if found else ""
        raise CheckpointError(f"the checkpoint {path} does not exist{beside}; check the path")
    try:
        if damage := damage_of(path):
            raise ValueError(damage)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({_first_sentence(error)}); it is "
            "truncated, damaged or holds more than tensors and plain values. Use another "
            "checkpoint of the run, or delete it and those beside it to train again"
        ) from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0][:120]


def checkpoint_beside(run: str | Path, experiment: str, checkpoint: str = "selected") -> Path:
    """Where a neighbouring experiment with the same seed keeps a checkpoint.

    Args:
        run: The run directory of this one, ``runs/<paper>/<experiment>/seed<k>[-v<n>]``.
        experiment: Name of the other.
        checkpoint: ``selected`` or ``last``.
    """
    run = Path(run)
    seed = run.name.split("-v")[0]
    return run.parent.parent / experiment / seed / "checkpoints" / f"{checkpoint}.ckpt"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file, whatever they are wrapped in.

    A state dict, or a checkpoint with one under ``state_dict``, ``model`` or ``net``; prefixes
    ``module.``, ``model.``, ``net.`` and ``_orig_mod.`` are taken off where the model has none.
    Nothing in the file is executed.

    Raises:
        CheckpointError: If the file cannot be read, or holds the weights of another network.
    """
    found = _read(Path(path))
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors)")
    own = model.state_dict()
    weights = dict(found)
    for prefix in ("_orig_mod.", "module.", "model.", "net."):
        if all(name.startswith(prefix) for name in weights) and not all(
            name.startswith(prefix) for name in own
        ):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    check_weights_fit(own, weights, str(path))
    model.load_state_dict(weights)


def check_weights_fit(own: Mapping[str, Tensor], other: Mapping[str, Tensor], origin: str) -> None:
    """Compare names and shapes of weights.

    Raises:
        CheckpointError: Naming the first tensors that are missing, unknown or of another shape.
    """
    missing = [name for name in own if name not in other]
    unknown = [name for name in other if name not in own]
    shapes = [
        f"{name} is {tuple(other[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    problems = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "misshapen"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{origin} holds the weights of another network: {'; '.join(problems)}. Give the "
            "config the checkpoint was trained with (config.yaml in its run directory)"
        )
