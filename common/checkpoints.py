"""Reading checkpoints without trusting them, and naming what is wrong with them."""

import pickle
from pathlib import Path
from typing import Any, cast

import torch

from common.errors import CheckpointError


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint on the CPU, tensors and plain values only.

    Raises:
        CheckpointError: If the file is missing, damaged, holds code, or is no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        beside = f"; beside it there is {', '.join(found)}" if found else ""
        raise CheckpointError(f"the checkpoint {path} does not exist{beside}; check --ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({str(error).splitlines()[0][:120]}); it is "
            "truncated, damaged or holds more than tensors and plain values. Use another "
            "checkpoint of the run, or train again"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is no Lightning checkpoint (no state_dict in it); give a file from a run's "
            "checkpoints folder"
        )
    return cast(dict[str, Any], checkpoint)
