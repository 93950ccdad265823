"""Kills, signals, full disks, lost ranks, several nodes: what is left is the undisturbed result.

Most of it carries the marker ``faults`` (``make test-faults``). Where a process is killed it is a
fork of this one, which starts at once, or a real command.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  (forks have it then)
import torch
import yaml

from common.classifier import RobustClassifier
from common.cli.runs import lock
from common.cli.start import main
from common.errors import RunDirectoryError

ROOT = Path(__file__).parents[1]

WITHIN = 300.0  # seconds that a process may take to end

MORE = """
data: {batch_size: 12, crop_padding: 1, train_limit: 60, val_limit: 40, test_limit: 50,
  eval_batch_size: 20}
adversary:
  attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 0.1, step_size: 0.05, steps: 2}}
weight_perturbation: {gamma: 0.01}
evaluation:
  suite:
    fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}, losses: ["*"]}
    pgd9:
      attack:
        class_path: common.attacks.pgd.PGD
        init_args: {eps: 0.1, step_size: 0.02, steps: 9, restarts: 3}
checkpoint: {every_n_train_steps: 2}
monitoring: {images: 0}
trainer:
  max_epochs: 4
  logger: true
  callbacks: [{class_path: common.callbacks.averaging.WarmUpAveraging}]
"""


def extended(text: str) -> str:
    """An experiment with more steps, and with everything that keeps a state between them."""
    settings = yaml.safe_load(text)
    settings["model"]["init_args"]["objective"] = "common.objectives.TRADES"
    for section, values in yaml.safe_load(MORE).items():
        settings.setdefault(section, {}).update(values)
    return yaml.safe_dump(settings)


@pytest.fixture
def config(tiny) -> Path:
    tiny.config.write_text(extended(tiny.text))
    return tiny.config


@pytest.fixture(scope="module")
def undisturbed(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """What an undisturbed run measures, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = folder / "tiny.yaml"
    file.write_text(extended(tiny_text))
    begun = time.monotonic()
    work = cli("reproduce", "--config", file, "--runs", folder)
    assert ended(forked(work, folder / "log")) == 0, (folder / "log").read_text()[-2000:]
    return metrics(folder / "paper_tiny/tiny/seed0"), time.monotonic() - begun


def forked(work: Callable[[], None], log: Path) -> int:
    """A process that does this and ends with the status a command would have."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    file = log.open("a", buffering=1)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # pytest's own would keep what is written
        faulthandler.dump_traceback_later(WITHIN - 10, file=file)  # where it hangs, if it does
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def cli(*arguments: str | Path) -> Callable[[], None]:
    return lambda: main([str(a) for a in arguments], package="paper_tiny")


def ended(pid: int, within: float = WITHIN) -> int:
    """The status of a child, negative for a signal; it is killed where it takes too long."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the process did not end within {within} s")


def metrics(run: Path) -> str:
    """The text of everything measured, and the digests of the weights, to the last bit."""
    result = json.loads((run / "results.json").read_text())
    digests = {label: entry["checkpoint_digest"] for label, entry in result["provenance"].items()}
    return json.dumps([result["checkpoints"], digests])


def is_done(run: Path) -> bool:
    try:
        return len(json.loads((run / "results.json").read_text())["checkpoints"]) == 2
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ kills


def kill_at_random(
    config: Path, undisturbed: tuple[str, float], kills: int, seed: int, signals: Sequence[int]
) -> None:
    """Kill ``reproduce`` so often, at random times; its result is that of an undisturbed run."""
    log, draw = config.with_name("log"), random.Random(seed)
    expected, whole = undisturbed[0], min(undisturbed[1], 8.0)  # far more on a busy machine
    run = Path("runs/paper_tiny/tiny/seed0")
    for _ in range(kills):
        if is_done(run):  # a new run, so that each kill hits one that is under way
            shutil.rmtree(run)
        pid = forked(cli("reproduce", "--config", config), log)
        time.sleep(draw.uniform(0.02, 0.9) * whole)
        number = draw.choice(signals)
        os.kill(pid, number)
        status = ended(pid)
        assert status in (0, -number, 128 + number, 1), log.read_text()[-2000:]
        assert status == 0 or not (status == 1 and number != signal.SIGINT)
        if is_done(run):
            assert metrics(run) == expected
    assert ended(forked(cli("reproduce", "--config", config), log)) == 0
    assert metrics(run) == expected
    assert not list(run.rglob("*.tmp"))


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1, 2])
def test_many_random_kills_change_no_number(
    config: Path, undisturbed: tuple[str, float], seed: int
) -> None:
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    kill_at_random(config, undisturbed, 20, seed, signals)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_stopped_row_is_not_a_finished_one(config: Path, number: int, times: int) -> None:
    """Lightning ends with status 0 or 1 then, and make would take the row for done."""
    log, run = config.with_name("log"), Path("runs/paper_tiny/tiny/seed0")
    pid = forked(cli("fit", "--config", config, "--trainer.max_epochs", "1000"), log)
    while not (run / "checkpoints/last.ckpt").exists():
        time.sleep(0.01)
    for _ in range(times):
        os.kill(pid, number)
        time.sleep(0.02)
    assert ended(pid) == 128 + number
    assert torch.load(run / "checkpoints/last.ckpt")["epoch"] < 1000


def interrupted(config: Path, number: int, method: str, call_number: int) -> Callable[[], None]:
    """``reproduce``, to which a signal comes before a method of the classifier runs."""

    def work() -> None:
        original, calls = getattr(RobustClassifier, method), []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            if len(calls) == call_number:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(RobustClassifier, method, wrapped)
        cli("reproduce", "--config", config, "--trainer.logger", "false")()

    return work


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_signals_save_the_run_and_tell_which_they_were(
    config: Path, undisturbed: tuple[str, float], number: int
) -> None:
    log, run = config.with_name("log"), Path("runs/paper_tiny/tiny/seed0")
    whole = ("reproduce", "--config", config, "--trainer.logger", "false")
    for method, call_number, saved in (
        ("training_step", 3, 3),
        ("training_step", 20, 20),  # the last of all
        ("validation_step", 2, 5),
        ("test_step", 1, 20),
    ):
        shutil.rmtree("runs", ignore_errors=True)
        assert ended(forked(interrupted(config, number, method, call_number), log)) == 128 + number
        assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == saved
        assert not (run / "results.json").exists()
        assert ended(forked(cli(*whole), log)) == 0
        assert metrics(run) == undisturbed[0]


def test_signals_that_were_ignored_stay_so(tiny) -> None:
    """As under nohup."""
    config, log, run = tiny.config, tiny.config.with_name("log"), tiny.run

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupted(config, signal.SIGHUP, "training_step", 2)()

    assert ended(forked(nohup, log)) == 0
    assert is_done(run)


# ------------------------------------------------------------------------------------------- locks


def test_a_lock_ends_with_its_owner_though_a_child_of_it_lives(tmp_path: Path) -> None:
    """As a data loader's worker does for some seconds after its parent was killed."""
    ready = tmp_path / "child"

    def own() -> None:
        held = lock(tmp_path / "run")
        child = os.fork()
        if child == 0:
            ready.with_suffix(".part").write_text(str(os.getpid()))
            ready.with_suffix(".part").rename(ready)
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        held.release()

    owner = forked(own, tmp_path / "log")
    while not ready.exists():
        time.sleep(0.01)
    child = int(ready.read_text())
    try:
        with pytest.raises(RunDirectoryError, match="another process is writing"):
            lock(tmp_path / "run")
        os.kill(owner, signal.SIGKILL)
        assert ended(owner) == -signal.SIGKILL
        os.kill(child, 0)  # it lives
        lock(tmp_path / "run").release()
    finally:
        os.kill(child, signal.SIGKILL)


# ----------------------------------------------------------------------------------- disk, memory


def test_a_full_disk_ends_a_run_in_one_line_and_it_resumes_with_room(tiny) -> None:
    """Files may only grow to a size that results need and checkpoints exceed."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        tiny("reproduce")

    told = tiny.config.with_name("told")
    assert ended(forked(limited, told)) == 2
    (line,) = [x for x in told.read_text().splitlines() if x.startswith("error:")]
    assert ".ckpt: File too large" in line
    assert "what was there before is kept" in line
    tiny("reproduce")
    tiny("reproduce", "--runs", "whole")
    assert metrics(tiny.run) == metrics(Path("whole", *tiny.run.parts[1:]))


@pytest.mark.faults
def test_a_small_file_system_ends_a_run_and_leaves_the_last_good_state(
    config: Path, undisturbed: tuple[str, float]
) -> None:
    folder = config.with_name("small")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        arguments = ("reproduce", "--config", config, "--runs", folder, "--trainer.logger", "false")
        told = config.with_name("told")
        assert ended(forked(cli(*arguments), told)) == 2
        assert "No space left on device" in told.read_text()
        run = folder / "paper_tiny/tiny/seed0"
        for path in run.rglob("*.ckpt"):
            assert torch.load(path)["state_dict"]
        again = subprocess.run(
            ["mount", "-o", "remount,size=10m", str(folder)], check=False, capture_output=True
        )
        assert again.returncode == 0
        assert ended(forked(cli(*arguments), told)) == 0
        assert metrics(run) == undisturbed[0]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --------------------------------------------------------------------------- ranks, nodes, machines


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "paper_cifs", "reproduce", "--config", str(config), *arguments]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], check=False, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.use_distributed_sampler",
       "false")  # fmt: skip


def wait_for(path: Path, job: subprocess.Popen[Any], within: float = 240.0) -> None:
    until = time.monotonic() + within
    while not path.exists():
        assert job.poll() is None, "it ended too soon"
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["a rank", "the first process"])
def test_a_killed_rank_ends_the_run_which_then_goes_on(config: Path, victim: str) -> None:
    long = ("--trainer.max_epochs", "20")
    run = Path("runs/paper_cifs/tiny/seed0")
    with Path("out").open("w") as out:
        job = subprocess.Popen(
            command(config, *TWO, *long), env=environment(), stdout=out, stderr=out
        )
    wait_for(run / "checkpoints/last.ckpt", job)
    ranks = descendants(job.pid)
    assert ranks
    os.kill(ranks[0] if victim == "a rank" else job.pid, signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    until = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < until, "a rank outlived the run"
        time.sleep(0.1)
    assert 0 < torch.load(run / "checkpoints/last.ckpt")["global_step"] < 100
    for runs in ("runs", "whole"):
        done = subprocess.run(
            command(config, *TWO, *long, "--runs", runs),
            env=environment(),
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(run) == metrics(Path("whole/paper_cifs/tiny/seed0"))


@pytest.mark.faults
def test_sigterm_stops_all_ranks_after_the_same_batch(config: Path) -> None:
    long = ("--trainer.max_epochs", "100000", "--checkpoint.every_n_train_steps", "100000")
    run = Path("runs/paper_cifs/tiny/seed0")
    with Path("out").open("w") as out:
        job = subprocess.Popen(
            command(config, *TWO, *long), env=environment(), stdout=out, stderr=out
        )
    wait_for(run / "checkpoints/last.ckpt", job)
    time.sleep(1.0)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 128 + signal.SIGTERM, Path("out").read_text()[-2000:]
    checkpoint = torch.load(run / "checkpoints/last.ckpt")
    assert checkpoint["epoch"] > 0
    assert len(checkpoint["random_states"]) == 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.faults
def test_two_nodes_that_torchrun_joins_measure_what_one_process_does(config: Path) -> None:
    """Also when they start at different times over a run directory that is there already."""
    port = free_port()
    arguments = ["-m", "paper_cifs", "reproduce", "--config", str(config), *TWO[2:]]
    settings = {"num_nodes": "2", "devices": "1", "precision": "32-true"}
    arguments += [f"--trainer.{name}={value}" for name, value in settings.items()]

    def node(rank: int) -> subprocess.Popen[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        joined = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr localhost"
        rendezvous = [*joined.split(), "--master_port", str(port)]
        return subprocess.Popen(
            [*torchrun, *rendezvous, *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    nodes = [node(0)]
    time.sleep(3.0)
    nodes.append(node(1))
    for job in nodes:
        out, _ = job.communicate(timeout=300)
        assert job.returncode == 0, out[-3000:]
    one = subprocess.run(
        command(config, "--runs", "one"), env=environment(), check=False, capture_output=True
    )
    assert one.returncode == 0
    name = "paper_cifs/tiny/seed0/checkpoints/last.ckpt"
    pair = [torch.load(Path(folder) / name)["state_dict"] for folder in ("runs", "one")]
    for key, value in pair[0].items():
        torch.testing.assert_close(value, pair[1][key], rtol=1e-3, atol=1e-4, msg=key)
    result = json.loads(Path("runs/paper_cifs/tiny/seed0/results.json").read_text())
    assert result["provenance"]["last"]["world_size"] == 2
    assert result["checkpoints"]["last"]["examples"] == 50
    assert [p.name for p in Path("runs/paper_cifs/tiny").iterdir()] == ["seed0"]
