"""A short run of one row per paper on the device, its verdicts compared with the CPU's."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.gpu.journal import Row
from benchmarks.gpu.parts import Measurements, Setting
from common.cli.rows import SMALL
from common.cli.workers import ended_by, start
from common.results.outcomes import figures
from common.results.store import read_result

STEMS = {
    "paper_rcm": "digits_122_max",
    "paper_cifs": "digits_resnet_cifs",
    "paper_robustwrn": "digits_d1-1-3_sat",
    "paper_awnet": "digits_awnet_mtard",
    "paper_wm": "digits_cnn3_smoothing",
}
SHORT = {"trainer.max_epochs": 3, "data.test_limit": 100}
SMOKE = {
    "trainer.max_epochs": 1, "data.train_limit": 130, "data.val_limit": 10, "data.test_limit": 4
}  # fmt: skip


def measurements(setting: Setting) -> Measurements:
    """A row of each paper."""
    for name, value in SMALL.items():
        os.environ.setdefault(name, value)
    return {stem: partial(_compared, setting, package, stem) for package, stem in STEMS.items()}


def command(package: str, words: Sequence[str], log: Path, until: float) -> float:
    """Run ``python -m package *words`` to its end; the seconds it took.

    Raises:
        RuntimeError: With the last line that it printed, if it failed or took too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    process = start(package, words, log)
    process.join(max(until - begun, 0.0))
    if process.exitcode == 0:
        return round(time.time() - begun, 1)
    process.terminate()
    process.join()
    status = process.exitcode
    raise RuntimeError(f"{ended_by(status) or last_line(log)} (status {status}, log in {log})")


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines or ["no output"])[-1]


def on_device(device: str) -> list[str]:
    """The options that choose one device."""
    accelerator = "gpu" if device == "cuda" else device
    return ["--trainer.accelerator", accelerator, "--trainer.devices", "1"]


def _compared(setting: Setting, package: str, stem: str) -> Row:
    """Train and test on the device; test the last checkpoint on the CPU, with the same attacks."""
    folder = setting.runs / "papers"
    run = folder / package / stem / "seed0"
    limits = SMOKE if setting.is_smoke else SHORT
    words = ["--config", stem, *(f"--{name}={value}" for name, value in limits.items())]
    words += ["--runs", str(folder), "--trainer.enable_progress_bar", "false"]
    there = command(
        package,
        ["reproduce", *words, *on_device(setting.device)],
        folder / f"{stem}-device.txt",
        setting.until,
    )
    beside = run / "on_cpu" / "results.json"  # outcomes beside the first results would be reused
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    here = command(
        package,
        ["test", *words, *last, "--evaluation.results", str(beside), *on_device("cpu")],
        folder / f"{stem}-cpu.txt",
        setting.until,
    )
    images, steps, differing = compared(run / "results.json", beside)
    apart = {row for rows in differing.values() for row in rows}
    listed = "; ".join(f"{name}: {rows}" for name, rows in differing.items())
    return {
        "images": images,
        "attacks": steps,
        "differing": differing,
        "device_s": there,
        "cpu_s": here,
        "summary": f"{len(apart)} of {images} images have another verdict on the CPU in one of "
        f"{steps} attacks" + (f" ({listed})" if listed else ""),
    }


def compared(one: Path, other: Path) -> tuple[int, int, dict[str, list[int]]]:
    """Images, attacks, and by attack the images with another outcome, of the last checkpoint."""
    entries = [read_result(path)["checkpoints"]["last"] for path in (one, other)]
    mine, its = (figures(entry["clean"], entry["attacks"]) for entry in entries)
    names = ["clean_acc", *entries[0]["attacks"], "worst"]
    differing: dict[str, list[int]] = {}
    for name in names:
        if name in mine and (bits := mine[name].bits) is not None:
            other_bits = its[name].bits
            assert other_bits is not None
            if rows := np.flatnonzero(bits != other_bits).tolist():
                differing[name] = rows
    return entries[0]["examples"], len(entries[0]["attacks"]), differing
