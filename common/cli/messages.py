"""How a command ends: with its result, or with one line for the user."""

import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.predictions import predictions_path
from common.callbacks.resuming import RunTrainer
from common.callbacks.robust_evaluation import RobustEvaluation, label_of
from common.errors import OUT_OF_MEMORY, RunDirectoryError, UserError
from common.files import is_full, read_sealed_json


def confirmed(trainer: RunTrainer, subcommand: str) -> str:
    """The tables of ``test`` and the last line of a subcommand, after its result is checked.

    Raises:
        RunDirectoryError: If the result is not where it should be.
    """
    if trainer.fast_dev_run:
        return "finished: a trial run, which keeps nothing"
    paths = _results(trainer, subcommand)
    if lost := [path for path in paths if not path.is_file()]:
        raise RunDirectoryError(
            f"{subcommand} ended and {lost[0]} is not there: it was deleted, or the run ended "
            "before it was written. Run the same command again"
        )
    if subcommand in ("test", "reproduce") and (label := label_of(trainer)) not in (
        checkpoints := read_sealed_json(paths[0])["checkpoints"]
    ):
        raise RunDirectoryError(
            f"{subcommand} ended and {paths[0]} has no results of checkpoint {label!r}, only of "
            f"{', '.join(checkpoints)}; run the same command again"
        )
    evaluations = [c for c in trainer.callbacks if isinstance(c, RobustEvaluation)]
    tables = [report for evaluation in evaluations for report in evaluation.reports]
    where = f", {os.path.relpath(paths[0])}" if paths else ""
    return "\n".join([*tables, f"finished: {subcommand}{where}"])


def _results(trainer: RunTrainer, subcommand: str) -> list[Path]:
    """The files that a command makes, its result first, and those it depends on."""
    found: list[Path] = []
    if subcommand == "predict":
        found.append(predictions_path(trainer))
    if subcommand in ("test", "reproduce"):
        evaluations = (c for c in trainer.callbacks if isinstance(c, RobustEvaluation))
        found += [evaluation.results_path(trainer) for evaluation in evaluations]
    if subcommand not in ("fit", "reproduce"):
        return found + ([Path(trainer.ckpt_path)] if trainer.ckpt_path else [])
    for callback in trainer.callbacks:
        if isinstance(callback, LastCheckpoint):
            found.append(Path(str(callback.dirpath), "last.ckpt"))
            found.append(Path(trainer.default_root_dir) / "config.yaml")
    for callback in trainer.callbacks:
        if isinstance(callback, SelectedCheckpoint):
            selected, resumed = Path(callback.best_model_path), trainer.run.resumed_from
            # A run resumed in another folder may have selected a checkpoint in the old one.
            folder = selected.parent if resumed is None else Path(resumed).parent
            if selected.name and selected.parent.resolve() == folder.resolve():
                found.append(selected)
    return found


_RUN_OUT = {
    re.compile(r"shared memory|insufficient shm|bus error|torch_shm", re.IGNORECASE): (
        "the processes that fetch batches have no shared memory left ({}); the last checkpoint is "
        "kept. Set data.num_workers to 0, or give the machine more shared memory, and resume from "
        "the checkpoint"
    ),
    re.compile(r"DataLoader worker .* (?:is killed|exited)|Pin memory thread exited"): (
        "a process that fetches batches was lost ({}), most often because the machine has no "
        "memory left; the last checkpoint is kept. Lower data.num_workers (0 fetches in this "
        "process) and resume from the checkpoint"
    ),
    OUT_OF_MEMORY: (
        "out of memory ({}); the last checkpoint is kept. Lower data.batch_size (in evaluation "
        "data.eval_batch_size) or raise trainer.accumulate_grad_batches"
    ),
}
"""What torch or the system says, and what to do about it; ``{}`` is the line that says it."""


def one_line(error: BaseException) -> str | None:
    """What happened and what to do about it; ``None`` for a mistake of the program."""
    for cause in _causes(error):
        if isinstance(cause, UserError):  # also where closing a logger failed because of it
            return str(cause)
        if is_full(cause):
            return (
                f"{cause}; what was done so far is kept. Make room and run the same command again"
            )
        if isinstance(cause, MemoryError):
            return _RUN_OUT[OUT_OF_MEMORY].format(str(cause)[:200] or "MemoryError")
        text = _said(cause)
        for words, remedy in _RUN_OUT.items():
            if line := next((line for line in text.splitlines() if words.search(line)), ""):
                return remedy.format(line.strip()[:200])
    joined = " ".join(str(error).split())
    is_refusal = isinstance(error, ValueError | TypeError | RuntimeError)
    is_lightnings = is_refusal and any(m.startswith("lightning.") for m in _modules(error)[-1:])
    if isinstance(error, MisconfigurationException) or is_lightnings:
        return joined
    if isinstance(error, ImportError):
        return f"{joined}; install what is missing, or choose a class that does without"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return (
            f"{where}{error.strerror}; if it was deleted meanwhile, run the same command again, "
            "else make it readable and writable or choose another place"
        )
    return None


def _said(error: BaseException) -> str:
    """What torch or the system says in an error; empty for errors of others."""
    is_loading = any(name.startswith("torch.utils.data") for name in _modules(error))
    if isinstance(error, ConnectionError | EOFError) and is_loading:
        return f"DataLoader worker process exited: {type(error).__name__}"
    return str(error) if isinstance(error, RuntimeError | OSError) else ""


def _modules(error: BaseException) -> list[str]:
    """The modules an error went through, the one that raised it last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [str(frame.f_globals.get("__name__")) for frame, _ in frames]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those it was raised from or while handling."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        yield following
        seen.append(following)
        following = following.__cause__ or following.__context__
