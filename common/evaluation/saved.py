"""Adversarial images as files: written while an evaluation runs, checked when they are loaded.

A folder has ``x_adv.npy`` float32 ``(N, C, H, W)``, ``y.npy``, ``robust.npy``, ``position.npy`` (in
the data) and ``about.json``. An image is the one that broke the example first, else the last
attempt inside the ball, else the clean one.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.attacks.losses import margin
from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation.images import READ, Examples
from common.evaluation.inputs import collect
from common.evaluation.models import device_of
from common.evaluation.steps import in_ball, judged
from common.files import file_digest, read_sealed_json, write_bytes_atomically, write_sealed_json
from common.modes import frozen
from common.objectives import Batch
from common.results.lines import Columns, Outcomes, Threat

ABOUT, X_ADV = "about.json", "x_adv.npy"
ROUNDING = 1e-4
"""A verdict may differ where the margin is less than this share of the largest score."""


class Saver:
    """Writes the images of one evaluation; a killed one resumes in the same folder.

    Args:
        folder: Where they go; earlier images of another evaluation are replaced.
        identity: Plain values that decide all images.
        examples: Of the evaluation.
        about: Plain values that are stated beside the images.
        is_first: Whether this process prepares the folder; others open it afterwards.
    """

    def __init__(
        self,
        folder: Path,
        identity: Any,
        examples: Examples,
        about: Mapping[str, Any],
        is_first: bool,
    ) -> None:
        self.folder, self.about = folder, about
        text = json.dumps(identity, sort_keys=True, default=repr)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._bytes = 4 * int(np.prod(examples["x"].shape[1:]))
        if is_first:
            self._prepare(tuple(examples["x"].shape))
        self._state = read_sealed_json(folder / ABOUT)

    def _prepare(self, shape: tuple[int, ...]) -> None:
        about, path = self.folder / ABOUT, self.folder / X_ADV
        try:
            is_same = (
                read_sealed_json(about)["key"] == self.key and np.load(path, "r").shape == shape
            )
        except Exception:  # it is not there, or damaged in any way
            is_same = False
        if is_same:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, "w+", np.float32, shape)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._tell({"key": self.key, "token": secrets.token_hex(8), "is_filled": False})

    def _tell(self, state: Mapping[str, Any]) -> None:
        write_sealed_json(self.folder / ABOUT, state)

    @property
    def token(self) -> str:
        """Differs for every new set of files, so that no outcomes without images are reused."""
        return str(self._state["token"])

    @property
    def is_filled(self) -> bool:
        """Whether every image is there, clean or perturbed."""
        return bool(self._state["is_filled"])

    def fill(self, is_first: bool) -> None:
        """State that the clean images are written."""
        if not self.is_filled:
            self._state |= {"is_filled": True}
            if is_first:
                self._tell({key: self._state[key] for key in ("key", "token", "is_filled")})

    @cached_property
    def _offset(self) -> int:
        return int(np.load(self.folder / X_ADV, "r").offset)

    def write(self, rows: Tensor, x_adv: Tensor) -> None:
        """Put images in these rows."""
        try:
            with (self.folder / X_ADV).open("r+b", buffering=0) as file:
                for row, image in zip(rows.tolist(), x_adv.float().cpu().numpy(), strict=True):
                    os.pwrite(file.fileno(), image.tobytes(), self._offset + row * self._bytes)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def finish(self, outcomes: Outcomes, position: Tensor) -> None:
        """Write labels, verdicts and what the images are about."""
        robust = outcomes.correct["clean"].clone()
        for key, line in outcomes.lines.items():
            if line.counts:
                robust &= outcomes.correct[key] | ~outcomes.attacked[key]
        for name, values in (("y", outcomes.y), ("robust", robust), ("position", position)):
            _save(self.folder / f"{name}.npy", values.numpy())
        threat = outcomes.threat
        self._tell(
            {
                **{key: self._state[key] for key in ("key", "token", "is_filled")},
                **self.about,
                "examples": len(robust),
                "robust": int(robust.sum()),
                "norm": threat.norm if threat else None,
                "eps": threat.radius if threat else None,
                "x_adv_digest": file_digest(self.folder / X_ADV),
            }
        )


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    ``x_adv`` float32 ``(N, C, H, W)``, memory-mapped; ``y`` int64, ``robust`` bool and ``position``
    int64, ``(N,)``; ``about`` as in its file.
    """

    x_adv: NDArray[np.float32]
    y: Tensor
    robust: Tensor
    position: Tensor
    about: Mapping[str, Any]

    @property
    def threat(self) -> Threat | None:
        """The ball that the images are in."""
        return Threat(self.about["norm"], self.about["eps"]) if self.about["norm"] else None


def load_examples(
    folder: str | Path, model: nn.Module | None = None, data: Any = None, batch_size: int = READ
) -> Saved:
    """Load saved images and check that they are whole.

    Args:
        folder: Where an evaluation wrote them.
        model: The model they were made for, to check that all verdicts are the same.
        data: The data they were made of, to check that all images are in the ball.
        batch_size: Images per pass of the model.

    Raises:
        RunDirectoryError: If the folder is missing, not finished, or damaged.
        ConfigurationError: If model or data are others than those of the images.
    """
    folder = Path(folder)
    saved = _opened(folder)
    if file_digest(folder / X_ADV) != saved.about["x_adv_digest"]:
        raise RunDirectoryError(f"{folder / X_ADV} is damaged; make the images again")
    if data is not None:
        _check_data(saved, collect(data), folder)
    for begin in range(0, len(saved.y) if model is not None else 0, batch_size):
        rows = slice(begin, begin + batch_size)
        _check_verdicts(model, saved, rows)
    return saved


def _opened(folder: Path) -> Saved:
    try:
        about = read_sealed_json(folder / ABOUT)
        x_adv = np.load(folder / X_ADV, "r")
        names = ("y", "robust", "position")
        arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names}
        if {len(x_adv), *map(len, arrays.values())} != {
            about["examples"]
        } or x_adv.dtype != np.float32:
            raise ValueError("the files do not fit together")
        _ = about["norm"], about["x_adv_digest"]
    except Exception as error:  # damaged files fail at any depth of their readers
        raise RunDirectoryError(
            f"{folder} holds no finished adversarial images ({type(error).__name__}: {error}); "
            "make them with --save-examples, or run the same evaluation to its end"
        ) from error
    return Saved(x_adv, about=about, **arrays)


def _check_data(saved: Saved, examples: Examples, folder: Path) -> None:
    y = examples["y"]
    position = saved.position
    if int(position.max()) >= len(y) or not torch.equal(y[position], saved.y):
        raise ConfigurationError(
            f"the labels of {folder} are not those of the data; give the data it was made of"
        )
    outside = 0
    for rows in torch.split(torch.arange(len(position)), READ):
        x_adv = torch.from_numpy(saved.x_adv[rows.numpy()])
        outside += int((~in_ball(x_adv, examples["x"][position[rows]], saved.threat)).sum())
    if outside:
        raise _outside(outside, len(position), folder)


def _check_verdicts(model: Any, saved: Saved, rows: slice) -> None:
    y = saved.y[rows]
    device = device_of(model)
    with torch.no_grad(), frozen(model, "eval"):
        logits = model(torch.from_numpy(saved.x_adv[rows].copy()).to(device)).float().cpu()
    found = margin(logits, y)
    differs = ((found <= 0) != saved.robust[rows]) & (found.abs() > ROUNDING * logits.abs().amax(1))
    if differs.any():
        row = rows.start + int(differs.nonzero()[0])
        verdict = "robust" if saved.robust[row] else "broken"
        raise ConfigurationError(
            f"image {row} was saved as {verdict}, and this model says otherwise; give the model "
            f"{saved.about.get('model')!r} with the weights {saved.about.get('weights')}"
        )


class SavedExamples(Settings):
    """Shows the images that another evaluation saved to the model (a transfer attack).

    Args:
        folder: Where they were saved; the data must be the same.

    Raises:
        RunDirectoryError: If there are none.
        ConfigurationError: If they were made without a threat model; in use, if the labels differ
            or an image is outside the ball.
    """

    reach = float("inf")
    cost = 1

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        saved = _opened(self.folder)
        if saved.threat is None:
            raise ConfigurationError(f"{folder} was made without a threat model; attack with one")
        self.norm, self.eps = saved.threat.norm, saved.threat.radius
        self.y, self._digest = saved.y, saved.about["x_adv_digest"]
        self._row = {place: row for row, place in enumerate(saved.position.tolist())}

    def settings(self) -> dict[str, Any]:
        """With a digest of the images in place of their folder."""
        return super().settings() | {"folder": self._digest}

    def run(self, model: Any, batch: Batch, _: ExampleRandom) -> Columns:
        """Judge the images by the model."""
        x, y, threat = batch["x"], batch["y"], Threat(self.norm, self.eps)
        places = batch.get("position", batch["index"]).tolist()
        lacking = [place for place in places if place not in self._row]
        if lacking:
            raise ConfigurationError(
                f"{self.folder} has no image for the examples at {lacking[:5]} of the data; save "
                "those too, or evaluate fewer"
            )
        rows = [self._row[place] for place in places]
        if not torch.equal(self.y[rows], y.cpu()):
            raise ConfigurationError(
                f"the labels of {self.folder} are not those of the data; give the same data"
            )
        # Mapped anew, so that pages that were read do not stay in memory.
        x_adv = torch.from_numpy(np.load(self.folder / X_ADV, "r")[rows]).to(x.device)
        if outside := int((~in_ball(x_adv, x, threat)).sum()):
            raise _outside(outside, len(rows), self.folder)
        return judged(model, batch, x_adv, threat)


def _save(path: Path, values: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, values)
    write_bytes_atomically(path, content.getbuffer())


def _outside(count: int, n: int, folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{count} of {n} images of {folder} are outside the ball around the images of the data; "
        "give the data it was made of"
    )


def _unwritable(folder: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"adversarial images cannot be written to {folder} ({error.strerror}); make room, then run "
        "the same command again: what was done is kept"
    )
