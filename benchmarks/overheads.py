"""What stands between the loop and the user: Lightning, imports, the command line."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loops import Task, candidate, ours
from benchmarks.timing import Keep
from common.analysis.profiling import quartiles, timed
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.base import ImageSource, ImageSpec
from common.data.images import ImageDataModule
from common.networks.resnet import ResNet, ResNet18
from common.objectives import AT

ROOT = Path(__file__).parent.parent


class Noise(ImageSource):
    """Random colour images of 32x32."""

    def __init__(self, n: int = 512) -> None:
        self.n = n
        self.spec = ImageSpec(
            "Noise", 10, (3, 32, 32), (0.5,) * 3, (0.29,) * 3, tuple("0123456789")
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (self.n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return x, torch.randint(10, (self.n,), generator=generator)


class _Beside(AdversarialTraining):
    """The callback, and after each of the trainer's steps the bare one; processor times of both."""

    def __init__(self, *args: Any, bare: Callable[[], object], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bare = bare
        self._began: list[float] = []
        self._bare_s: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._began.append(time.process_time())
        super().on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._bare_s.append(timed(self._bare)[0])

    def pairs(self) -> list[tuple[float, float]]:
        """The trainer's steps but the first and the last, hooks and loading included, and the bare.

        A bare step's time is the mean of those before and after the trainer's.
        """
        spent = zip(pairwise(self._began[1:]), pairwise(self._bare_s), strict=False)
        return [
            (after - before - own, (earlier + own) / 2) for (before, after), (earlier, own) in spent
        ]


def lightning(batch: int, attack_steps: int, steps: int, is_small: bool = False) -> dict[str, Any]:
    """A training step through Lightning relative to the same step called bare.

    In turns, step by step: one by the trainer, which also loads and augments its images, and one by
    a loop around our own attack and update, with the same options.
    """
    build = partial(ResNet, (1, 1, 1), (16, 32, 64), (1, 2, 2)) if is_small else ResNet18
    engine = AttackEngine(channels_last=False)
    torch.manual_seed(0)
    net = build()
    x, y = Noise(batch).load("train")
    task = Task(net.eval(), x.float() / 255.0, y, steps=attack_steps)
    bare = candidate(task, ours(task, engine))
    bare()
    beside = _Beside(PGD(8 / 255, 2 / 255, attack_steps, "zero"), engine=engine, bare=bare)
    torch.manual_seed(0)
    module = RobustClassifier(build(), AT(), partial(torch.optim.SGD, lr=0.0, momentum=0.9))
    data = ImageDataModule(
        Noise(batch * (steps + 3)), batch_size=batch, val_size=batch, drop_last=True,
        crop_padding=4, flip=True,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        callbacks=[beside], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    pairs = beside.pairs()
    lower, median, upper = quartiles([through / alone for through, alone in pairs])
    return {
        "setting": f"{'small ResNet' if is_small else 'ResNet-18'}, batch {batch}, "
        f"PGD-{attack_steps}, loading, crop and flip included",
        "steps": len(pairs),
        "ratio": median,
        "lower": lower,
        "upper": upper,
        "bare_cpu_s": statistics.median(alone for _, alone in pairs),
    }


def compare(is_full: bool, keep: Keep) -> None:
    """All overheads. With one step of attack what is beside the attack weighs most."""
    found: dict[str, Any] = {"lightning": []}
    settings = [(32, 10), (32, 10), (128, 1), *([(128, 10)] if is_full else [])]
    for number, (batch, attack_steps) in enumerate(settings):
        is_small = number == 0
        row = lightning(batch, attack_steps, 40 if is_small else 8, is_small)
        found["lightning"].append(row)
        print(f"  {row['setting']}: {row['ratio']:.3f}", flush=True)
        keep(found)
    found["command_line"] = command_line()
    keep(found)


def command_line(repeats: int = 3) -> dict[str, Any]:
    """From the start of the command to the first optimiser step and to its end, in seconds."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            marker = Path(folder) / "first"
            command = [
                sys.executable, "-c", _FIRST_STEP, str(marker), str(time.time()), "fit",
                "--config", "paper_robustwrn/configs/digits_d3-1-1_sat.yaml", "--runs", folder,
                "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false",
            ]  # fmt: skip
            whole = _cpu(command)
            found.append((*map(float, marker.read_text().split()), whole))
    names = ("first_step_cpu_s", "first_step_wall_s", "whole_cpu_s")
    return dict(zip(names, map(min, zip(*found, strict=True)), strict=True))


# Writes processor and wall time when the first step of the optimiser is over.
_FIRST_STEP = """
import sys, time
marker, begun = sys.argv[1], float(sys.argv[2])
sys.argv = ["paper_robustwrn", *sys.argv[3:]]
from common.cli.start import main
from common.classifier import RobustClassifier
def on_train_batch_end(self, *args):
    with open(marker, "w") as file:
        file.write(f"{time.process_time()} {time.time() - begun}")
RobustClassifier.on_train_batch_end = on_train_batch_end
main(package="paper_robustwrn")
"""


def _cpu(command: list[str]) -> float:
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr[-500:]}")
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
