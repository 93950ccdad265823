"""Processes that are forked from a server, beside those that a new interpreter would be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cli.workers import ending_with_this

ROWS = """
import sys
from pathlib import Path
from common.cli.workers import ending_with_this, start

if __name__ == "__main__":
    with ending_with_this():
        for name in sys.argv[1:]:
            process = start("row", [name], Path(name))
            process.join()
            print(process.exitcode)
"""
ROW = """
import json, os, sys
import torch

print(json.dumps({
    "argv": sys.argv[1:],
    "numbers": [torch.initial_seed(), int(torch.get_rng_state().sum())],
    "threads of the server": len(os.listdir(f"/proc/{os.getppid()}/task")),
    "saw CUDA": torch.cuda._is_in_bad_fork(),
}))
torch.manual_seed(7)
torch.set_num_threads(2)
torch.rand(500, 500) @ torch.rand(500, 500)  # OpenMP works after the fork
sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="new interpreters elsewhere")
def test_every_process_begins_alike_whatever_ran_before(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(ROWS)
    (tmp_path / "row.py").write_text(ROW)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "rows.py", "first", "second"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["3", "3"], done.stderr
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first", "second"))
    assert first.pop("argv") == ["first"]
    assert second.pop("argv") == ["second"]
    assert first == second
    assert first["threads of the server"] == 1
    assert not first["saw CUDA"]


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second would cut short what the first asked for."""
    kept, now = [], time.monotonic()

    def rows() -> None:
        with ending_with_this():
            with pytest.raises(SystemExit, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            kept.append("the first")
            monkeypatch.setattr(time, "monotonic", lambda: now + 60)
            os.kill(os.getpid(), signal.SIGTERM)
            kept.append("the last")

    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit, match="143"):
            rows()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert kept == ["the first"]
