"""Run directories: whose they are, locked, and set aside."""

from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from common.checkpoints import load_checkpoint
from common.errors import RunDirectoryError
from common.files import is_run, is_sealed, yaml_damage_of
from common.results.identity import Settings, run_differences, settings_in

OURS = (
    *("config.yaml", "results.json", "finished", "checkpoints", "outcomes", "figures"),
    *("events.out.tfevents.*", "hparams.yaml", "predictions*.csv", "results.json.unreadable*"),
)
"""What a run writes into its directory, apart from ``.lock`` and ``log.txt``, which stay open."""


def latest_of(base: Path) -> tuple[int, Path]:
    """The last of the runs ``seed0``, ``seed0-v1`` and so on: its number, 0 for the first one."""
    found = {path: path.name.removeprefix(f"{base.name}-v") for path in base.parent.glob("*-v*")}
    later = [(int(number), path) for path, number in found.items() if number.isdecimal()]
    return max(later, default=(0, base))


def check_is_ours(run: Path) -> None:
    """Refuse a folder with files that this program did not write and a run would replace."""
    saved, last = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    if is_sealed(saved) or is_sealed(last):
        return
    for path in (saved, last, last.with_name("selected.ckpt")):
        if path.exists():
            raise RunDirectoryError(
                f"{path} was not written by a run of this program, or is damaged, and this run "
                "would replace it; move it away, or choose another folder with --runs FOLDER or "
                "--trainer.default_root_dir FOLDER"
            )


def lock(run: Path, timeout: float = 0) -> FileLock:
    """Hold the run directory, made if it is missing, until this process ends.

    Waits ``timeout`` seconds for another process that holds it, -1 without limit; then, or if it
    cannot be written, raises a RunDirectoryError.
    """
    held = FileLock(run / ".lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            if timeout == 0:
                raise
            print(f"waiting for another process that is writing {run}", flush=True)
            held.acquire(timeout=timeout)
    except Timeout:
        raise RunDirectoryError(
            f"another process is writing {run}; wait for it, or give this run another folder "
            "with --runs FOLDER"
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"the run directory {run} cannot be written ({error.strerror}); choose another "
            "folder with --runs FOLDER"
        ) from error
    return held


def set_aside_if_other(run: Path, settings: Settings, is_given: bool) -> None:
    """Move the files of a run with other settings into another directory.

    Args:
        run: The run directory.
        settings: Of the run that is to begin.
        is_given: Whether the user chose the folder, which may then hold other files too: it is
            refused like a link, and like damaged files.
    """
    saved, last = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    if saved.exists() and (damage := yaml_damage_of(saved)):
        raise RunDirectoryError(
            f"{saved} is damaged: {damage}. If this run was made with the settings given now, "
            "delete the file, and the run is resumed; if not, move the run away or choose another "
            "folder with --runs FOLDER"
        )
    if not last.exists():  # nothing has been trained
        return
    if not list(run_differences(settings_in(load_checkpoint(last), last), settings)):
        return
    if is_given or not is_run(run):
        raise RunDirectoryError(
            f"{run} holds a run with other settings, and nothing is renamed in a folder that was "
            "given by --trainer.default_root_dir or is a link; choose another folder"
        )
    names = (run.with_name(f"{run.name}-replaced{number}") for number in count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    for item in [path for pattern in OURS for path in run.glob(pattern)]:
        item.rename(aside / item.name)
    (aside / "finished").unlink(missing_ok=True)
    print(f"{run} was made with other settings; it is now {aside}")
