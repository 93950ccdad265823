"""What stands between the loop and the user: Lightning, imports, the command line."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loops import Task, candidate, ours
from benchmarks.timing import quartiles, timed
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.base import ImageSource, ImageSpec
from common.data.images import ImageDataModule
from common.data.loading import Batch, ImageDataset
from common.networks.resnet import ResNet, ResNet18
from common.objectives import AT

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "torch",
    "common.attacks.pgd",
    "common.evaluation",
    "common.results.tables",
    "common.cli.main",
)


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


class _TimedImages(ImageDataModule):
    """Images, and the processor time that fetching and augmenting them takes."""

    spent = 0.0

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        fetch = ImageDataset.__getitems__

        def timed_fetch(dataset: ImageDataset, indices: list[int]) -> Batch:
            begun = time.process_time()
            found = fetch(dataset, indices)
            self.spent += time.process_time() - begun
            return found

        kind = type("TimedDataset", (ImageDataset,), {"__getitems__": timed_fetch})
        assert self.train_set is not None
        self.train_set.__class__ = kind

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        begun = time.process_time()
        found = super().on_after_batch_transfer(batch, dataloader_idx)
        self.spent += time.process_time() - begun
        return found


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
        return [
            (after - before - own, (earlier + own) / 2)
            for before, after, own, earlier in zip(
                self._began[1:], self._began[2:], self._bare_s[1:], self._bare_s, strict=False
            )
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
    source = Noise(batch * (steps + 3))
    data = _TimedImages(
        source, batch_size=batch, val_size=batch, drop_last=True, crop_padding=4, flip=True
    )
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        callbacks=[beside], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    pairs = beside.pairs()
    lower, median, upper = quartiles([through / alone for through, alone in pairs])
    through = statistics.median(seconds for seconds, _ in pairs)
    return {
        "setting": f"{'small ResNet' if is_small else 'ResNet-18'}, batch {batch}, "
        f"PGD-{attack_steps}, loading, crop and flip included",
        "steps": len(pairs),
        "ratio": median,
        "lower": lower,
        "upper": upper,
        "bare_cpu_s": statistics.median(alone for _, alone in pairs),
        "data_share": data.spent / (len(pairs) + 2) / through,
    }


def imports(repeats: int = 3) -> dict[str, Any]:
    """Processor seconds of a fresh interpreter importing something, the interpreter's included."""
    return {
        name: min(_cpu([sys.executable, "-c", f"import {name}"]) for _ in range(repeats))
        for name in IMPORTS
    }


def command_line(repeats: int = 3) -> dict[str, Any]:
    """From the start of the command to the first optimiser step and to its end, in seconds."""
    found: dict[str, list[float]] = {"first_step_cpu_s": [], "first_step_wall_s": []}
    found |= {"whole_cpu_s": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            marker = Path(folder) / "first"
            command = [
                sys.executable, "-c", _FIRST_STEP, str(marker), str(time.time()), "fit",
                "--config", "paper_robustwrn/configs/digits_d3-1-1_sat.yaml", "--runs", folder,
                "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false",
            ]  # fmt: skip
            found["whole_cpu_s"].append(_cpu(command))
            cpu, wall = map(float, marker.read_text().split())
            found["first_step_cpu_s"].append(cpu)
            found["first_step_wall_s"].append(wall)
    return {name: min(values) for name, values in found.items()}


# Writes processor and wall time when the first step of the optimiser is over.
_FIRST_STEP = """
import sys, time
marker, begun = sys.argv[1], float(sys.argv[2])
sys.argv = ["paper_robustwrn", *sys.argv[3:]]
from common.cli.main import main
from common.classifier import RobustClassifier
def on_train_batch_end(self, *args):
    with open(marker, "w") as file:
        file.write(f"{time.process_time()} {time.time() - begun}")
RobustClassifier.on_train_batch_end = on_train_batch_end
main(package="paper_robustwrn")
"""


def _cpu(command: list[str]) -> float:
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr[-500:]}")
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
