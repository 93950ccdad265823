"""Rows as jobs of a cluster: every line of standard input is a command, one task of a job array.

::

    make -s commands-cifs ON=cifar10 | python -m common.cli.submit timeout_min=1440 gpus_per_node=1

Settings are those of submitit's ``AutoExecutor`` (``slurm_partition=...``, ``cpus_per_task=...``,
``slurm_array_parallelism=8``): submitit writes the batch files, SLURM runs them.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigurationError, UserError

COUNTS = ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min")


class Command:
    """One line, run by a shell in the folder it was submitted from."""

    def __init__(self, line: str, folder: str | Path) -> None:
        self.line = line
        self.folder = str(folder)

    def __call__(self) -> int:
        """Run it; its output is the job's, and a RuntimeError makes the job a failed one."""
        print(self.line, flush=True)
        status = subprocess.run(self.line, shell=True, cwd=self.folder, check=False).returncode
        if status != 0:
            raise RuntimeError(f"status {status} from: {self.line}")
        return status

    def checkpoint(self) -> Any:
        """What submitit queues when the job is stopped: the same command, which resumes its row."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    lines: Iterable[str],
    folder: str | Path = "runs/jobs",
    cluster: str | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Any]:
    """Submit commands as one job array; returns submitit's jobs.

    Args:
        lines: Commands; empty lines are left out.
        folder: For batch files and the jobs' output.
        cluster: ``slurm``, ``local`` (processes of this machine, all at once) or ``debug``; by
            default SLURM where it is, else local.
        settings: Of submitit's ``AutoExecutor``.

    Raises:
        ConfigurationError: If there is no command, submitit is missing, or it refuses a
            setting, the folder or the cluster.
    """
    commands = [Command(line.strip(), Path.cwd()) for line in lines if line.strip()]
    if not commands:
        raise ConfigurationError("no command to submit; is ON= the beginning of a config's name?")
    for name, value in (settings or {}).items():
        if name.endswith(COUNTS) and isinstance(value, int) and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")
    try:
        import submitit
    except ImportError as error:
        raise ConfigurationError("submitit is not installed: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(folder=Path(folder), cluster=cluster)
        executor.update_parameters(**(settings or {}))
        return list(executor.map_array(Command.__call__, commands))
    except Exception as error:  # a setting meets arithmetic, files and other programs in there
        problem = " ".join(str(error).split()) or "no reason given"
        raise ConfigurationError(
            f"submitit refuses {settings or 'the jobs'} ({type(error).__name__}: {problem}); check "
            f"the settings, the cluster, and that {folder} can be written"
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Submit what standard input says; with ``--wait``, stay until all have ended."""
    parser = argparse.ArgumentParser(prog="python -m common.cli.submit", description=__doc__)
    parser.add_argument("settings", nargs="*", help="name=value, as submitit calls them")
    parser.add_argument("--folder", default="runs/jobs", help="batch files and output")
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"))
    parser.add_argument("--wait", action="store_true", help="stay until all jobs have ended")
    given = parser.parse_args(args)
    settings = {}
    for setting in given.settings:
        name, equals, value = setting.partition("=")
        if not equals:
            parser.error(f"expected name=value, got {setting!r}")
        try:
            settings[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            parser.error(f"{name} is no YAML value: {value!r} ({str(error).splitlines()[0]})")
    try:
        jobs = submit(sys.stdin, given.folder, given.cluster, settings)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    for job in jobs:
        print(f"job {job.job_id}: output in {job.paths.stdout}")
    if given.wait:
        failed = [job.job_id for job in jobs if job.exception() is not None]
        if failed:
            raise SystemExit(f"error: {len(failed)} of {len(jobs)} jobs failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
