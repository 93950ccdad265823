"""Commands as jobs, with the executors of submitit that need no cluster."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli.submit import Command, main, submit
from common.errors import ConfigurationError

ROOT = Path(__file__).parents[3]


def test_each_line_is_a_job_and_runs_where_it_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = submit(["echo one > one", "", "  echo two > two\n"], "jobs", "debug")
    assert [job.result() for job in jobs] == [0, 0]
    assert Path("one").read_text() == "one\n"
    assert Path("two").read_text() == "two\n"


def test_a_failing_command_fails_its_job(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="status 3 from: exit 3"):
        Command("exit 3", tmp_path)()


def test_a_job_that_is_stopped_is_queued_again(tmp_path: Path) -> None:
    command = Command("true", tmp_path)
    assert command.checkpoint().function is command


@pytest.mark.parametrize(
    ("lines", "settings", "expected"),
    [
        ([], {}, "no command to submit"),
        (["true"], {"partition_of_slurm": "gpu"}, "partition_of_slurm"),
    ],
)
def test_what_cannot_be_submitted(
    tmp_path: Path, lines: list[str], settings: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        submit(lines, tmp_path, "debug", settings)


def test_a_setting_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["timeout_min"])
    assert "expected name=value, got 'timeout_min'" in capsys.readouterr().err


def test_a_slurm_array_has_one_task_per_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for sbatch, up to the batch file that SLURM would be given."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/batch\necho Submitted batch job 12\n')
    program.chmod(0o755)
    (program.parent / "srun").symlink_to(program)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    settings = {"timeout_min": 60, "slurm_partition": "gpu", "gpus_per_node": 1}
    jobs = submit(["echo a", "echo b", "echo c"], tmp_path / "jobs", "slurm", settings)
    assert [job.job_id for job in jobs] == ["12_0", "12_1", "12_2"]
    batch = (tmp_path / "batch").read_text()
    for line in ("--array=0-2", "--partition=gpu", "--time=60", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in batch


@pytest.mark.faults
def test_the_local_executor_runs_them_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "stdin", io.StringIO("echo $PPID > one\necho $PPID > two\nexit 1\n"))
    with pytest.raises(SystemExit, match="1 of 3 jobs failed"):
        main(["timeout_min=5", "--cluster", "local", "--wait"])
    assert len({Path("one").read_text(), Path("two").read_text(), str(os.getpid())}) == 3
    assert capsys.readouterr().out.count("output in") == 3


# ------------------------------------------------------------------------------- the batch template


def test_the_template_starts_one_task_per_device_and_passes_options_on(tmp_path: Path) -> None:
    template = ROOT / "common/configs/slurm.sbatch"
    assert subprocess.run(["bash", "-n", template], check=False).returncode == 0
    program = tmp_path / "srun"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    more = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "2"}
    environment = os.environ | more | {"SLURM_NTASKS_PER_NODE": "8"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", template, "paper_cifs", "a.yaml", "--seed_everything", "1"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    words = done.stdout.split("\n")[:-1]
    assert words[:5] == [
        "--kill-on-bad-exit=1",
        ".venv/bin/python",
        "-m",
        "paper_cifs",
        "reproduce",
    ]
    assert words[-2:] == ["--seed_everything", "1"]
    options = dict(zip(words[5:-2:2], words[6:-2:2], strict=True))
    assert options["--trainer.num_nodes"] == "2"
    assert options["--trainer.devices"] == "8"
    text = template.read_text()
    for line in ("--signal=SIGUSR1@", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}" in text
