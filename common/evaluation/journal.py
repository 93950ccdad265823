"""Outcomes kept as they come, so that a killed evaluation goes on where it was.

One file for each step and chunk of examples, written under a temporary name and renamed. Files are
found by what decides their content (weights, code of the model and of the attacks, data, seed,
settings, which examples), so nothing stale is ever read, and a suite with one more attack finds
everything else done.
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import re
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common.attacks
import common.evaluation
from common.errors import RunDirectoryError
from common.evaluation.steps import Columns, Step
from common.files import damage_of, write_sealed, write_text_atomically
from common.objectives import Batch
from common.provenance import weights_digest

_NOT_THE_MODELS = {"torch", "torchvision", "lightning", "torchmetrics"}


class Journal:
    """The outcomes of one model on one set of examples.

    Args:
        folder: Where journals of all models are kept; ``None`` keeps nothing.
        identity: Plain values that decide every outcome: see :func:`identity_of`.

    Raises:
        RunDirectoryError: If the folder cannot be written.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder: Path | None = None
        if folder is None:
            return
        text = json.dumps(identity, indent=1, sort_keys=True, default=repr)
        self.folder = folder / _digest(text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"outcomes cannot be kept in {folder} ({error.strerror}); choose a writable folder"
            ) from error
        write_text_atomically(self.folder / "identity.json", text)

    def path(self, step: Step, index: Tensor) -> Path | None:
        """The file of a step's outcomes on these examples."""
        if self.folder is None:
            return None
        settings = json.dumps(step.settings, sort_keys=True, default=repr)
        examples = hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "_", step.key)
        return self.folder / f"{name}-{_digest(step.key + settings + examples)}.npz"

    def read(self, step: Step, index: Tensor) -> tuple[Columns, float] | None:
        """What was found out earlier, and in how many seconds; a damaged file is set aside."""
        path = self.path(step, index)
        if path is None or not path.is_file():
            return None
        try:
            if damage := damage_of(path):
                raise ValueError(damage)
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            seconds = arrays.pop("seconds").item()
            if not torch.equal(arrays.pop("index"), index):
                raise ValueError("it is about other examples")
        except Exception as error:  # a damaged archive fails at any depth of its reader
            warnings.warn(
                f"{path} is damaged ({error}); {step.key} runs again on its {len(index)} examples",
                stacklevel=2,
            )
            path.unlink(missing_ok=True)
            return None
        return arrays, seconds

    def write(self, step: Step, index: Tensor, columns: Columns, seconds: float) -> None:
        """Keep what was found out.

        Raises:
            RunDirectoryError: If it cannot be written.
        """
        path = self.path(step, index)
        if path is None:
            return
        arrays: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
        content = io.BytesIO()
        np.savez(content, index=index.numpy(), seconds=np.float64(seconds), **arrays)
        try:
            write_sealed(path, content)
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"{error}; then run the same command again: what was done is kept"
            ) from error


def identity_of(model: nn.Module, examples: Batch, seed: int, settings: Any = None) -> Any:
    """What decides the outcomes of every step, as plain values.

    Args:
        model: Its weights, plain attributes, and the source files of its classes count.
        examples: All of them.
        seed: Of the attacks.
        settings: Whatever else decides what the model computes, such as its configuration.
    """
    data = hashlib.sha256()
    for key in ("index", "y", "x"):
        data.update(np.ascontiguousarray(examples[key].numpy()).data)
    return {
        "weights": weights_digest(model.state_dict()),
        "structure": _digest(repr(model) + json.dumps(_attributes(model), default=repr)),
        "code": _code_digest(model),
        "data": data.hexdigest()[:16],
        "seed": seed,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack")},
        "device": next((p.device.type for p in model.parameters()), "cpu"),
    }


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Numbers and words that a module keeps outside its state dict: a temperature, a mode."""
    plain = (bool, int, float, str, tuple)
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key[0] != "_" and key != "training" and isinstance(value, plain)
    }


def _code_digest(model: nn.Module) -> str:
    """Digest of the source files behind the model's classes, the attacks and their judgement."""
    files = set(_own_files())
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in _NOT_THE_MODELS | sys.stdlib_module_names:
            continue
        try:
            files.add(Path(inspect.getfile(kind)))
        except (TypeError, OSError):  # defined at a prompt
            continue
    return _digest("".join(_file_digest(path) for path in sorted(files) if path.is_file()))


def _own_files() -> list[Path]:
    folders = [*common.attacks.__path__, *common.evaluation.__path__]
    return [path for folder in folders for path in Path(folder).glob("*.py")]


@cache
def _file_digest(path: Path) -> str:
    return _digest(path.read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
