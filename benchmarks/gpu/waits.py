"""Where the host waits for the device: nowhere in an attack, and in a training step where said."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.journal import Row
from benchmarks.gpu.papers import STEMS, on_device
from benchmarks.gpu.parts import ROOT, Measurements, Setting
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import MIM, PGD, FriendlyPGD
from common.cli.main import RobustCLI
from common.limits import read_yaml
from common.modes import frozen
from common.networks.resnet import DigitsResNet

MESSAGE = "called a synchronizing"
"""What CUDA's warnings have in common."""
QUESTIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
"""Operations whose result the host needs before it can go on."""


class _Questions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Warns on a CPU where CUDA would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in QUESTIONS:
            warnings.warn(f"{MESSAGE} operation, {func.name()}", stacklevel=1)
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts by place where the host waits, in the phases that are to be watched.

    On a GPU CUDA's own check tells; on a CPU the operations that would wait.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.phase = ""
        self.places: dict[str, Counter[str]] = {}

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Until the end of the block, count what happens in a phase."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._note  # type: ignore[assignment]
            asked: Any = _Questions
            with nullcontext() if self.device == "cuda" else asked():
                yield

    def enter(self, phase: str) -> str:
        """Begin a phase, ``""`` for what is not watched; the one before."""
        before, self.phase = self.phase, phase
        self.places.setdefault(phase, Counter())
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if phase else "default")
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase until the end of the block."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if self.phase and MESSAGE in str(message):
            self.places[self.phase][_caller() or f"{filename}:{lineno}"] += 1


def _caller() -> str:
    """The innermost line that belongs to no library."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if is_ours and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{line}"
    return ""


def measurements(setting: Setting) -> Measurements:
    """Attacks with several engines, and training steps of a row per paper."""
    training = {stem: partial(_training, setting, package, stem) for package, stem in STEMS.items()}
    return {"attacks": partial(_attacks, setting), **training}


def _found(waits: Waits, steps: int = 1) -> Row:
    """Fails where an attack waits; elsewhere waits are told."""
    inside, outside = (waits.places.get(phase, Counter()) for phase in ("attack", "step"))
    if inside:
        raise RuntimeError(f"an attack waits at {_listed(inside)}")
    told = f"; a training step waits {outside.total() / steps:g} times beside its attack"
    at = f" ({_listed(outside)})" if outside else ""
    summary = f"attacks wait nowhere{told if steps > 1 else ''}{at}"
    return {"places": dict(outside), "summary": summary}


def _listed(places: Counter[str]) -> str:
    return ", ".join(f"{place} {count}x" for place, count in places.most_common())


def _attacks(setting: Setting) -> Row:
    torch.manual_seed(0)
    net = DigitsResNet().eval().to(setting.device)
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    x, y = x.to(setting.device), y.to(setting.device)
    attacks = [PGD(0.1, 0.03, 3), PGD(0.5, 0.2, 3, norm="l2"), PGD(5.0, 1.0, 3, norm="l1"),
               PGD(0.1, 0.03, 3, restarts=2), MIM(0.1, steps=3),
               FriendlyPGD(0.1, 0.03, 3, tau={0: 1})]  # fmt: skip
    waits = Waits(setting.device)
    with waits.noticed(), frozen(net):
        for engine in (None, AttackEngine(), AttackEngine(precision="bf16")):
            for attack in attacks:
                for phase in ("", "attack"):  # the first call tries the engine out
                    _attack(net, x, y, attack, engine, waits, phase)
    return _found(waits) | {"attacks": [repr(attack) for attack in attacks]}


def _attack(
    net: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    engine: AttackEngine | None,
    waits: Waits,
    phase: str,
) -> None:
    generator = torch.Generator(x.device).manual_seed(0)
    with waits.during(phase), nullcontext() if engine is None else engine.applied(net, x):
        attack(
            lambda z: cross_entropy(net(z), y),
            x,
            generator,
            is_adversarial=lambda z: net(z).argmax(dim=1) != y,
        )


class Watched(Callback):
    """Watches two steps of the trainer, loading and logging included, but the first one."""

    steps = 2

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step before is over."""
        if batch_idx == 0:
            self.waits.enter("step")
        elif batch_idx == self.steps:
            self.waits.enter("")


def _training(setting: Setting, package: str, stem: str) -> Row:
    path = ROOT / package / "configs" / f"{stem}.yaml"
    words = ["--config", str(path), *on_device(setting.device)]
    words += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.default_root_dir", str(setting.runs / "waits" / stem)]
    words += ["--trainer.limit_val_batches", "0", "--trainer.enable_model_summary", "false"]
    words += ["--trainer.max_epochs", "1", "--trainer.max_steps", str(Watched.steps + 1)]
    words += ["--trainer.log_every_n_steps", "1000", "--warm_start.experiment", "null"]
    objective = read_yaml(path)["model"]["init_args"]["objective"]
    for name, value in (objective.get("init_args") or {}).items():
        if isinstance(value, dict) and "experiment" in value:  # a teacher, trained or not
            words += [f"--model.objective.{name}.as_it_is", "true"]
    cli = RobustCLI(package, words, run=False)
    waits = Waits(setting.device)
    adversary = cli.config_init["adversary"]
    original = adversary.on_train_batch_start

    def attacked(*args: Any) -> None:
        with waits.during("attack" if waits.phase else ""):
            original(*args)

    adversary.on_train_batch_start = attacked
    cli.trainer.callbacks.insert(0, Watched(waits))
    with waits.noticed():
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        finally:
            waits.enter("")
    return _found(waits, Watched.steps)
