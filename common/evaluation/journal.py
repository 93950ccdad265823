"""A journal of outcomes, from which a killed evaluation resumes.

One file for each step and chunk of examples, written atomically and found by what decides its
content: weights and signature of the model, code of the attacks, data, seed, settings, examples. So
no outdated file is read, and a suite with one more attack runs only that one.

Weights do not determine what a model computes: a normalisation may be in a list, a closure or
another file. Its scores do. A signature holds a few random projections of them for each example
and is compared with a tolerance, since rounding differs between threads and batch sizes.
"""

import hashlib
import importlib.metadata
import io
import itertools
import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common.attacks
import common.evaluation
from common.attacks.losses import label_loss
from common.attacks.pgd import input_gradient
from common.attacks.randomness import ExampleRandom
from common.errors import RunDirectoryError
from common.evaluation.audit.gradients import anchored
from common.evaluation.history import is_close
from common.evaluation.images import Examples, digest_of
from common.evaluation.models import device_of
from common.evaluation.steps import JUDGED, Step, judged
from common.files import damage_of, write_sealed, write_text_atomically
from common.objectives import Batch
from common.results import lines
from common.results.lines import Columns, Cost, Threat
from common.results.provenance import weights_digest

_FUNCTION = "function"
"""File of the signature of the model that a folder is about."""


class Journal:
    """The outcomes of one model on one set of examples; nothing is kept until it is opened.

    Args:
        folder: Of the journals of all models; ``None`` keeps nothing.
        identity: Plain values that decide every outcome: see :func:`identity_of`.

    Raises:
        RunDirectoryError: If the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None, identity: Any = None) -> None:
        self.folder: Path | None = None
        self._base: Path | None = None
        if folder is None:
            return
        self._text = json.dumps(identity, indent=1, sort_keys=True, default=repr)
        self._base = folder / _digest(self._text)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise RunDirectoryError(
                f"outcomes cannot be kept in {folder} ({error.strerror}); choose a writable folder"
            ) from error

    def chosen(self, signature: Columns) -> str | None:
        """The folder's name for a function with this signature.

        Functions with the same weights and other signatures get numbered folders.
        """
        if self._base is None:
            return None
        for number in itertools.count():
            folder = self._base.with_name(f"{self._base.name}{f'-{number}' if number else ''}")
            path, kept = folder / _FUNCTION, Columns()
            try:
                kept = _arrays(path)
            except Exception:  # a damaged archive fails at any depth of its reader
                if any(folder.glob("*.npz")):
                    continue
            if is_same(kept, signature):
                break
        folder.mkdir(exist_ok=True)
        write_text_atomically(folder / "identity.json", self._text)
        write_sealed(path, _archive(kept | signature))
        return folder.name

    def open(self, name: str | None) -> None:
        """Use the folder of this name."""
        if self._base is not None and name is not None:
            self.folder = self._base.with_name(name)

    def path(self, step: Step, index: Tensor) -> Path | None:
        """The file of a step's outcomes on these examples."""
        if self.folder is None:
            return None
        settings = json.dumps(step.settings, sort_keys=True, default=repr)
        examples = hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "_", step.key)
        return self.folder / f"{name}-{_digest(step.key + settings + examples)}.npz"

    def read(self, step: Step, index: Tensor) -> tuple[Columns, Cost] | None:
        """Earlier outcomes and their cost; a damaged file is deleted."""
        path = self.path(step, index)
        if path is None or not path.is_file():
            return None
        try:
            arrays = _arrays(path)
            seconds, *passes = arrays.pop("cost").tolist()
            if not torch.equal(arrays.pop("index"), index):
                raise ValueError("it is about other examples")
        except Exception as error:  # a damaged archive fails at any depth of its reader
            warnings.warn(
                f"{path} is damaged ({error}); {step.key} runs again on its {len(index)} examples",
                stacklevel=2,
            )
            path.unlink(missing_ok=True)
            return None
        return arrays, Cost(seconds, *map(int, passes))

    def write(self, step: Step, index: Tensor, columns: Columns, cost: Cost) -> None:
        """Keep outcomes; a RunDirectoryError if they cannot be written."""
        path = self.path(step, index)
        if path is None:
            return
        about = {"index": index, "cost": torch.tensor(cost, dtype=torch.float64)}
        try:
            write_sealed(path, _archive(about | columns))
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"{error}; then run the same command again: what was done is kept"
            ) from error


def identity_of(model: nn.Module, examples: Examples, seed: int, settings: Any = None) -> Any:
    """Plain values that decide the outcomes of every step, beside the function's signature.

    ``settings`` is what else may decide them, such as a digest of the configuration.
    """
    labels = [examples[key].tolist() for key in ("index", "y")]
    return {
        "weights": weights_digest(model.state_dict()),
        "code": _code_digest(),
        "data": _digest(f"{labels} {digest_of(examples['x'])}"),
        "seed": seed,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack")},
        "device": device_of(model).type,
    }


def _archive(columns: Columns) -> io.BytesIO:
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
    np.savez(content, **arrays)
    return content


def _arrays(path: Path) -> Columns:
    """What :func:`_archive` packed; any exception if the file is damaged."""
    if damage := damage_of(path):
        raise ValueError(damage)
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def _code_digest() -> str:
    """Digest of the source files of attacks and evaluation."""
    folders = [*common.attacks.__path__, *common.evaluation.__path__]
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    files.append(Path(lines.__file__))
    return _digest("".join(path.read_text(encoding="utf-8") for path in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


PROBED = 32
"""Number of examples, spread over all, that are also perturbed."""
TOLERANCES = {"gradient": 1e-3}
"""Largest difference in relation to the largest value; a gradient jumps where a ReLU turns."""
TOLERANCE = 2e-5


def projected(values: Tensor) -> Tensor:
    """Each example's values in four fixed random directions, ``(N, 4)`` float64."""
    flat = values.detach().flatten(1).double().cpu()
    generator = torch.Generator().manual_seed(flat.shape[1])
    return flat @ torch.randn(flat.shape[1], 4, generator=generator, dtype=torch.float64)


def clean_step() -> Step:
    """Outcomes without an attack, and projections of the scores."""

    def run(model: Any, batch: Batch, _: ExampleRandom) -> Columns:
        with torch.no_grad():
            logits = model(batch["x"])
        return judged(lambda _: logits, batch, batch["x"]) | {"scores": projected(logits)}

    return Step("clean", "clean", run, {}, scope="all", kind="probe", budget=JUDGED)


def probe_step(threat: Threat | None, networks: Mapping[str, nn.Module]) -> Step:
    """Scores of perturbed images, gradients, and every loss that is declared."""
    run = partial(_probe, threat, networks)
    return Step("probe", "probe", run, {}, scope="all", kind="probe")


def _probe(
    threat: Threat | None,
    networks: Mapping[str, nn.Module],
    model: Any,
    batch: Batch,
    _: ExampleRandom,
) -> Columns:
    x, y = batch["x"], batch["y"]
    points = _perturbed(x, threat)
    columns = {}
    with torch.no_grad():
        for name, network in {"scores": model, **networks}.items():
            scores = [projected(network(point)) for point in points]
            columns[name] = torch.cat(scores, dim=1)
    loss = anchored(label_loss(model, y))
    columns["gradient"] = projected(input_gradient(loss, points[0]))
    losses = dict(getattr(model, "adaptive_losses", dict)())
    if hasattr(model, "objective"):
        losses["model"] = model.objective.inner
    for name, inner in losses.items():
        try:
            with torch.no_grad():
                value = inner(model, batch)(points[0]).detach().double().cpu()
        except Exception:  # a loss that no suite may use must not stop the evaluation
            value = torch.full((len(y),), torch.nan, dtype=torch.float64)
        columns[f"loss/{name}"] = value
    return columns


def _perturbed(x: Tensor, threat: Threat | None) -> list[Tensor]:
    """Images with fixed noise of several sizes and both signs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape[1:], generator=generator).sign().to(x)
    size = 0.03 if threat is None else threat.per_pixel(x)
    factors = (size, -size, 4 * size, -4 * size, 0.3)
    return [(x + factor * noise).clamp(0.0, 1.0) for factor in factors]


def is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two signatures agree in everything that both have."""
    return all(
        is_close(one[name], other[name], TOLERANCES.get(name.rpartition("/")[2], TOLERANCE))
        for name in set(one) & set(other)
    )


def networks_of(steps: Sequence[Step]) -> dict[str, nn.Module]:
    """The other networks that steps use, by step and number."""
    return {
        f"{step.key}/{number}": network
        for step in steps
        for number, network in enumerate(step.networks)
    }
