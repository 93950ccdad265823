"""How a command ends: with its result, or with one line for the person at the keyboard."""

import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.callbacks.checkpointing import LastCheckpoint, SelectedCheckpoint
from common.callbacks.predictions import predictions_path
from common.callbacks.robust_evaluation import RobustEvaluation, label_of
from common.callbacks.run import RunTrainer
from common.errors import OUT_OF_MEMORY, RunDirectoryError, UserError, is_out_of_memory
from common.files import is_full, read_sealed_json


def reports(trainer: RunTrainer) -> list[str]:
    """What ``test`` found, as tables, one for each checkpoint."""
    found = [c.reports for c in trainer.callbacks if isinstance(c, RobustEvaluation)]
    return [report for each in found for report in each]


def confirmed(trainer: RunTrainer, subcommand: str) -> str:
    """The last line of a subcommand that succeeded, after a look at its result.

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
    return f"finished: {subcommand}" + (f", {os.path.relpath(paths[0])}" if paths else "")


def _results(trainer: RunTrainer, subcommand: str) -> list[Path]:
    """The files that a command makes, its result first, and those it depends on."""
    paths: list[Path] = []
    if subcommand not in ("fit", "reproduce") and trainer.ckpt_path:
        paths.append(Path(trainer.ckpt_path))
    for callback in trainer.callbacks:
        if subcommand in ("test", "reproduce") and isinstance(callback, RobustEvaluation):
            paths.insert(0, callback.results_path(trainer))
        if subcommand in ("fit", "reproduce") and isinstance(callback, LastCheckpoint):
            place = 0 if subcommand == "fit" else len(paths)
            paths.insert(place, Path(str(callback.dirpath), "last.ckpt"))
            paths.append(Path(trainer.default_root_dir) / "config.yaml")
        if subcommand in ("fit", "reproduce") and isinstance(callback, SelectedCheckpoint):
            selected = Path(callback.best_model_path)
            resumed = trainer.run.resumed_from
            # A run that goes on in another folder may have left behind what it had selected.
            folder = selected.parent if resumed is None else Path(resumed).parent
            if selected.name and selected.parent.resolve() == folder.resolve():
                paths.append(selected)
    return [predictions_path(trainer), *paths] if subcommand == "predict" else paths


_LOST_WORKER = re.compile(r"DataLoader worker .* (?:is killed|exited)|Pin memory thread exited")
_SHARED_MEMORY = re.compile(r"shared memory|insufficient shm|bus error|torch_shm", re.IGNORECASE)


def one_line(error: BaseException) -> str | None:
    """What happened and what to do about it; ``None`` for an error that is a program's mistake."""
    for cause in _causes(error):
        if isinstance(cause, UserError):  # also where closing a logger failed because of it
            return str(cause)
        if is_full(cause):
            return (
                f"{cause}; what was done so far is kept. Make room and run the same command again"
            )
        if line := _matching_line(_SHARED_MEMORY, cause):
            return (
                f"the processes that fetch batches have no shared memory left ({line}); the last "
                "checkpoint is kept. Set data.num_workers to 0, or give the machine more shared "
                "memory, and go on from the checkpoint"
            )
        if line := _matching_line(_LOST_WORKER, cause) or _lost_connection(cause):
            return (
                f"a process that fetches batches was lost ({line}), most often "
                "because the machine has no memory left; the last checkpoint is kept. Lower "
                "data.num_workers (0 fetches in this process) and go on from the checkpoint"
            )
        if is_out_of_memory(cause):
            line = _matching_line(OUT_OF_MEMORY, cause) or _first_line(cause)
            return (
                f"out of memory ({line}); the last checkpoint is kept. Lower data.batch_size (in "
                "evaluation data.eval_batch_size) or raise trainer.accumulate_grad_batches"
            )
    if isinstance(error, MisconfigurationException) or _is_lightnings(error):
        return _joined(error)
    if isinstance(error, ImportError):
        return f"{_joined(error)}; install what is missing, or choose a class that does without"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return (
            f"{where}{error.strerror}; if it was deleted meanwhile, run the same command again, "
            "else make it readable and writable or choose another place"
        )
    return None


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning itself refuses something: it has many words for a setting that is wrong."""
    is_refusal = isinstance(error, ValueError | TypeError | RuntimeError)
    return is_refusal and any(name.startswith("lightning.") for name in _modules(error)[-1:])


def _lost_connection(error: BaseException) -> str:
    """What was lost with a loader's worker that ended before it had answered; empty otherwise."""
    is_lost = isinstance(error, ConnectionError | EOFError)
    is_loading = any(name.startswith("torch.utils.data") for name in _modules(error))
    return type(error).__name__ if is_lost and is_loading else ""


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


def _matching_line(words: re.Pattern[str], error: BaseException) -> str:
    """The first line of an error of torch or the system that has the words; empty without one."""
    if not isinstance(error, RuntimeError | OSError | MemoryError):
        return ""
    lines = str(error).splitlines()
    return next((line.strip()[:200] for line in lines if words.search(line)), "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split())
