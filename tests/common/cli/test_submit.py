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


def program(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script before all other programs of its name."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_each_line_is_a_job_and_runs_where_it_was_submitted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = submit(["echo one > one", "", "  echo two > two\n"], "jobs", "debug")
    assert [job.result() for job in jobs] == [0, 0]
    assert Path("one").read_text() + Path("two").read_text() == "one\ntwo\n"
    with pytest.raises(RuntimeError, match="status 3 from: exit 3"):
        Command("exit 3", tmp_path)()
    command = Command("true", tmp_path)
    assert command.checkpoint().function is command, "a job that is stopped is queued again"


def test_what_cannot_be_submitted(tmp_path: Path, capsys, monkeypatch) -> None:
    with pytest.raises(ConfigurationError, match="no command to submit"):
        submit([], tmp_path, "debug", {})
    with pytest.raises(ConfigurationError, match="partition_of_slurm"):
        submit(["true"], tmp_path, "debug", {"partition_of_slurm": "gpu"})
    for settings, told in (
        ({"timeout_min": "abc"}, "timeout_min.*abc"),
        ({"tasks_per_node": 0}, "tasks_per_node must be at least 1, got 0"),
        ({"debug_timeout_min": -1}, "debug_timeout_min must be at least 1, got -1"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            submit(["true"], tmp_path, "debug", settings)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"that .*file can be written"):
        submit(["true"], tmp_path / "file", "local")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match="srun"):
        submit(["true"], tmp_path, "slurm")
    with pytest.raises(SystemExit):
        main(["timeout_min"])
    assert "expected name=value, got 'timeout_min'" in capsys.readouterr().err


def test_a_slurm_array_has_one_task_per_line(tmp_path: Path, monkeypatch) -> None:
    """With a stand-in for sbatch, up to the batch file that SLURM would be given."""
    script = f'cp "$1" {tmp_path}/batch\necho Submitted batch job 12'
    for name in ("sbatch", "srun"):
        program(tmp_path / "bin" / name, script, monkeypatch)
    settings = {"timeout_min": 60, "slurm_partition": "gpu", "gpus_per_node": 1}
    jobs = submit(["echo a", "echo b", "echo c"], tmp_path / "jobs", "slurm", settings)
    assert [job.job_id for job in jobs] == ["12_0", "12_1", "12_2"]
    batch = (tmp_path / "batch").read_text()
    for line in ("--array=0-2", "--partition=gpu", "--time=60", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in batch


@pytest.mark.faults
def test_the_local_executor_runs_each_in_a_process(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "stdin", io.StringIO("echo $PPID > one\necho $PPID > two\nexit 1\n"))
    with pytest.raises(SystemExit, match="1 of 3 jobs failed"):
        main(["timeout_min=5", "--cluster", "local", "--wait"])
    assert len({Path("one").read_text(), Path("two").read_text(), str(os.getpid())}) == 3
    assert capsys.readouterr().out.count("output in") == 3


def test_the_template_starts_one_task_per_device_and_passes_options_on(
    tmp_path: Path, monkeypatch
) -> None:
    template = ROOT / "common/configs/slurm.sbatch"
    assert subprocess.run(["bash", "-n", template], check=False).returncode == 0
    program(tmp_path / "bin/srun", 'printf "%s\\n" "$@"', monkeypatch)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NUM_NODES": "2", "NTASKS_PER_NODE": "8"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = ["bash", template, "paper_cifs", "a.yaml", "--seed_everything", "1"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    program_words = ["python", "-m", "paper_cifs", "reproduce"]
    assert words[:5] == ["--kill-on-bad-exit=1", *program_words]
    assert words[-2:] == ["--seed_everything", "1"]
    options = dict(zip(words[5:-2:2], words[6:-2:2], strict=True))
    assert (options["--trainer.num_nodes"], options["--trainer.devices"]) == ("2", "8")
    text = template.read_text()
    for line in ("--signal=SIGUSR1@", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}" in text
