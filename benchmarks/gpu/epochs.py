"""Epochs of two rows on Fashion-MNIST by the real command, until the time is up; it resumes."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.failures import NO_TIME
from benchmarks.gpu.journal import DONE, SKIPPED, UNFINISHED, Row
from benchmarks.gpu.papers import SMOKE, last_line, on_device
from benchmarks.gpu.parts import Measurements, Setting
from common.checkpoints import load_checkpoint
from common.cli.workers import start
from common.data.sources import FashionMNIST
from common.errors import DataUnavailableError

PACKAGE = "paper_cifs"
STEMS = ("fashion_mnist_resnet10_plain", "fashion_mnist_resnet10_cifs")
BATCH = 128
STOPPING = 20.0
"""Seconds within which a run that was asked to stop has saved its checkpoint."""
SHORTEST = 30.0
"""Seconds that are worth a start."""


def measurements(setting: Setting) -> Measurements:
    """Both rows share the time that is left."""
    return {
        stem: partial(_trained, setting, stem, len(STEMS) - number)
        for number, stem in enumerate(STEMS)
    }


def _trained(setting: Setting, stem: str, waiting: int) -> Row:
    """Train until this row's share of the time is over; ``waiting`` rows share it."""
    try:
        FashionMNIST(download=False).prepare()
    except DataUnavailableError as error:
        return {"state": SKIPPED, "summary": str(error)}
    folder, seconds = setting.runs / "epochs", setting.seconds_left / waiting - STOPPING
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / PACKAGE / stem / "seed0" / "checkpoints" / "last.ckpt"
    before, log = progress(last), folder / f"{stem}.txt"
    if seconds < SHORTEST:
        return _row(before, UNFINISHED) if before else {"state": SKIPPED, "summary": NO_TIME}
    words = ["reproduce", "--config", stem, "--runs", str(folder), *on_device(setting.device)]
    words += ["--trainer.enable_progress_bar", "false", "--checkpoint.every_n_train_steps", "50"]
    if setting.is_smoke:
        words += [f"--{name}={value}" for name, value in SMOKE.items()]
    begun = time.time()
    is_finished = ended(words, log, seconds)
    seconds, found = time.time() - begun, progress(last)
    if not found:
        raise RuntimeError(f"no checkpoint was written in {seconds:.0f} s (log in {log})")
    rate = (found["steps"] - before.get("steps", 0)) * BATCH / seconds
    return _row(found | {"images_per_s": rate}, DONE if is_finished else UNFINISHED)


def _row(found: Row, state: str) -> Row:
    summary = f"{found['steps']} steps in all, {found['epochs']} whole epochs"
    if "best" in found:
        summary += f", best robust accuracy {100 * found['best']:.2f} %"
    if "images_per_s" in found:
        summary += f"; {found['images_per_s']:.0f} images/s, start and validation included"
    return found | {"state": state, "summary": summary}


def ended(words: list[str], log: Path, seconds: float) -> bool:
    """Run the command for so long, then ask it to stop; whether it had come to its end.

    Raises:
        RuntimeError: If it failed.
    """
    process = start(PACKAGE, words, log)
    process.join(max(seconds, 1.0))
    if process.exitcode is None:
        process.terminate()  # it saves a checkpoint after the batch
        process.join(STOPPING)
        process.kill()
        process.join()
        return False
    if process.exitcode != 0:
        raise RuntimeError(f"{last_line(log)} (log in {log})")
    return True


def progress(last: Path) -> dict[str, Any]:
    """Steps, whole epochs and best validation accuracy of a run; nothing before its first step."""
    if not last.is_file():
        return {}
    checkpoint = load_checkpoint(last)
    loop = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    found: dict[str, Any] = {
        "steps": int(checkpoint["global_step"]),
        "epochs": int(loop["processed"]),
    }
    for state in checkpoint["callbacks"].values():
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            found["best"] = float(state["best_model_score"])
    return found
