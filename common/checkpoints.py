"""Reading checkpoints of unknown origin, and naming what is wrong with them."""

import _codecs
import argparse
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import nn

from common.errors import CheckpointError
from common.files import check_torch_file, damage_of
from common.limits import check_name
from common.weights import find_weights

_SCALAR: Any = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1, 2
    np.dtype,
    *{type(np.dtype(t)) for t in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool)},
    _codecs.encode,  # makes bytes of old pickles' text
    argparse.Namespace,
]
"""What accuracies from numpy and arguments beside weights need; none of it runs code."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint, see :func:`read_content`.

    Raises:
        CheckpointError: If the file cannot be read or is no Lightning checkpoint.
    """
    checkpoint = read_content(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is no Lightning checkpoint (no state_dict in it); give a file from a run's "
            "checkpoints folder"
        )
    return cast(dict[str, Any], checkpoint)


def read_content(path: str | Path) -> Any:
    """What a file of torch.save, or of safetensors, holds, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: If the file is missing, damaged (its digest is checked if it has one),
            something else or holds code.
    """
    path = Path(path)
    check_torch_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if damage := damage_of(path):
            raise ValueError(damage)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail at any depth of its reader
        if code := re.search(r"GLOBAL (\S+)|TorchScript", str(error)):
            raise CheckpointError(
                f"the checkpoint {path} cannot be read: it asks for {code[1] or 'TorchScript'}, "
                "more than tensors and plain values, and nothing in it is executed; where you "
                "trust it, load it and save only model.state_dict()"
            ) from error
        first = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({first}); it is truncated, damaged or no file "
            "of torch.save or safetensors. Use another checkpoint of the run, or delete it and "
            "those beside it to train again"
        ) from error


def checkpoint_beside(run: str | Path, experiment: str, checkpoint: str = "selected") -> Path:
    """The checkpoint (``selected`` or ``last``) of another experiment with the same seed.

    Args:
        run: The run directory of this one, ``runs/<paper>/<experiment>/seed<k>[-v<n>]``.
        experiment: Name of the other.
        checkpoint: Its name.
    """
    run = Path(run)
    check_name(experiment, "the experiment to start or learn from")
    check_name(checkpoint, "its checkpoint")
    seed = run.name.split("-v")[0]
    return run.parent.parent / experiment / seed / "checkpoints" / f"{checkpoint}.ckpt"


def load_weights(model: nn.Module, path: str | Path, key: str | None = None) -> None:
    """Load the weights of a network from a file, under any wrapping.

    A state dict, bare or in the dictionaries of a checkpoint, of any precision, under any prefix;
    see :func:`common.weights.find_weights` and :func:`read_content`.

    Args:
        model: The network; it keeps its own precision.
        path: Of the file.
        key: Which weights to take if the file holds several sets for this network.

    Raises:
        CheckpointError: If the file cannot be read, does not determine the network completely, or
            holds more than one such set.
    """
    content = read_content(path)
    model.load_state_dict(find_weights(model.state_dict(), content, str(path), key))
