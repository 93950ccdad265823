"""How long rows would take, printed by ``make plan-NAME``: work is counted, rates are measured.

A row's objects are built by the command line that would run it, on the meta device, where tensors
have a shape and no content. So nothing is allocated or read, and counting takes no compute.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import add
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.analysis.profiling import timed
from common.attacks.pgd import PGD
from common.attacks.settings import Budget
from common.callbacks.adversarial_training import AdversarialTraining
from common.callbacks.robust_evaluation import RobustEvaluation
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.cli.main import RobustCLI
from common.cli.rows import Row
from common.cli.start import checked
from common.evaluation.measures import measure_steps
from common.evaluation.steps import JUDGED, Step
from common.evaluation.suite import resolve_losses, steps_of
from common.modes import frozen
from common.objectives import Batch
from common.results.labels import LABELS
from common.results.provenance import device_name

Made = TypeVar("Made")

ENOUGH = 1e9
"""Multiply-accumulates of the images that a forward pass is timed on, at least one."""
ALLOWED = 3.0
"""Seconds in which rates are measured; later networks have that of the nearest in size."""


class Work(NamedTuple):
    """Multiply-accumulates of forward and of backward passes, and the number of operations."""

    forward: float = 0.0
    backward: float = 0.0
    operations: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """Both together."""
        return Work(*map(add, self, other))

    def times(self, factor: float) -> "Work":
        """So many times this work."""
        return Work(*(factor * part for part in self))


class Rate(NamedTuple):
    """Seconds per multiply-accumulate of each kind of pass, and the least per operation."""

    forward: float
    backward: float
    operation: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long work takes."""
        passes = self.forward * work.forward + self.backward * work.backward
        return max(passes, self.operation * work.operations)


ASSUMED = Rate(2e-13, 2e-13, 1e-5)
"""Of a GPU where there is none: half the float32 peak of an A100 (19.5 TFLOP/s)."""


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations; on a GPU each takes some microseconds to start."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _counted(step: Callable[[], Made]) -> tuple[Made, float, float]:
    """What a step returns, its multiply-accumulates and its operations."""
    with FlopCounterMode(display=False) as flops, _Operations() as operations:
        made = step()
    return made, flops.get_total_flops() / 2, operations.count


class Pass(NamedTuple):
    """Work of a forward pass and of its backward pass."""

    forward: Work
    backward: Work

    def of(self, budget: Budget) -> Work:
        """The work of so many passes."""
        return self.forward.times(budget.forward).plus(self.backward.times(budget.backward))


def count_pass(loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Pass:
    """The work of a loss, and of its gradient with respect to ``inputs``."""
    value, forward, operations = _counted(loss)
    total = value.sum()
    _, backward, more = _counted(lambda: torch.autograd.grad(total, inputs, allow_unused=True))
    return Pass(Work(forward, 0.0, operations), Work(0.0, backward, more))


def count_training_step(
    module: Any, batch: Batch, adversary: AdversarialTraining, outer_passes: int = 1
) -> Work:
    """The work of one training step: the attack by its budget, then the outer loss.

    Args:
        module: The classifier, on the meta device.
        batch: Of a training step, without ``x_adv``.
        adversary: With the attack.
        outer_passes: 2 with adversarial weight perturbation.
    """
    work, x = Work(), batch["x"]
    if adversary.attack is not None:
        with frozen(module, adversary.mode):
            loss, macs, operations = _counted(lambda: module.objective.inner(module, batch))
            x_adv = x.clone().requires_grad_()
            climbed = count_pass(lambda: loss(x_adv), [x_adv]).of(adversary.attack.budget)
        work = Work(macs, 0.0, operations).plus(climbed)
        batch = batch | {"x_adv": x}
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    outer = count_pass(lambda: module.objective.outer(module, batch), weights)
    return work.plus(outer.of(Budget(outer_passes, outer_passes)))


class _Unbuilt(RobustCLI):
    """The command line of a row, whose networks have no weights."""

    def instantiate_classes(self) -> None:
        with torch.device("meta"):
            super().instantiate_classes()

    def take(self, words: Sequence[str]) -> None:
        """Build the objects of other words: a new parser would take longer than all the rest."""
        self.words = list(words)
        self.parse_arguments(self.parser, self.words)
        self.before_instantiate_classes()
        self.instantiate_classes()

    def callback(self, kind: type[Made]) -> Made:
        """The callback of a class."""
        return next(one for one in self.trainer.callbacks if isinstance(one, kind))


class Effort(NamedTuple):
    """What a row would do.

    Attributes:
        training: With the validation after epochs.
        evaluation: Of both checkpoints, if no attack succeeds.
        macs: Multiply-accumulates of an image in a forward pass.
    """

    training: Work
    evaluation: Work
    macs: float


def count_row(cli: Any) -> Effort:
    """The work of the row that a command line has built."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    evaluation: RobustEvaluation = cli.callback(RobustEvaluation)
    images, size = data.counts(), data.eval_batch_size
    epochs, each = trainer.max_epochs, trainer.check_val_every_n_epoch
    validations = epochs // each
    perturbation = cli.callback(AdversarialWeightPerturbation)
    step = count_training_step(
        module,
        _batch(data),
        cli.callback(AdversarialTraining),
        outer_passes=2 if perturbation.gamma > 0 else 1,
    )
    trained = _limited(images["train"], data.batch_size, trainer.limit_train_batches)
    x = torch.empty(size, *data.shape, device="meta", requires_grad=True)
    with frozen(module):
        single = count_pass(lambda: module(x), [x])
    validated = _limited(images["val"], size, trainer.limit_val_batches) * validations
    tested = _limited(images["test"], size, trainer.limit_test_batches)
    budget = _validation(evaluation, module).times(validated)
    return Effort(
        step.times(epochs * trained / data.batch_size).plus(single.of(budget.times(1 / size))),
        single.of(
            _tests(evaluation, module, data.num_classes, tested, validations).times(1 / size)
        ),
        single.forward.forward / size,
    )


def _batch(data: Any) -> Batch:
    n = data.batch_size
    labels = torch.zeros(n, dtype=torch.long, device="meta")
    return {"x": torch.empty(n, *data.shape, device="meta"), "y": labels, "index": labels}


def _limited(images: int, batch_size: int, limit: int | float | None) -> float:
    """How many images the trainer takes from a split: a number of batches, or a fraction."""
    if limit is None:
        return images
    return limit * images if isinstance(limit, float) else min(images, limit * batch_size)


def _validation(evaluation: RobustEvaluation, module: Any) -> Budget:
    """Passes per image."""
    if evaluation.validation is None:
        return JUDGED
    losses = resolve_losses(evaluation.validation.losses, module)
    attack = cast(PGD, evaluation.validation.attack)
    return attack.budget.plus(JUDGED).times(len(losses)).plus(JUDGED)


def _tests(
    evaluation: RobustEvaluation, module: Any, num_classes: int, images: float, validations: int
) -> Budget:
    """Passes over all images, for the last checkpoint and the selected one.

    With one validation they are the same, and what has been run is not run again.
    """
    total = Budget()
    for label in LABELS[: max(min(validations, 2), 1)]:
        suite, audit = evaluation.for_checkpoint(label)
        steps: list[Step] = steps_of(suite, module, num_classes, 0, evaluation.engine)
        if audit is not None and evaluation.ball is not None:
            steps += audit.steps(module, evaluation.ball, num_classes)
        total = total.plus(JUDGED.times(2 * images))  # the accuracy without an attack, twice
        for step in [*steps, *measure_steps(evaluation.measures)]:
            passes = step.budget or Budget()
            total = total.plus(passes.times(min(step.examples or images, images)))
    return total


@dataclass
class Rates:
    """Rates of networks on a device."""

    device: torch.device
    _known: list[tuple[float, Rate]] = field(default_factory=list)
    _spent: float = 0.0

    def of(self, module: nn.Module, shape: Sequence[int], batch_size: int, macs: float) -> Rate:
        """The rate of a network, which gets arbitrary weights.

        Args:
            module: On the meta device, or with weights of no use.
            shape: Of an image.
            batch_size: Most images of a pass.
            macs: Multiply-accumulates per image.
        """
        nearest = min(self._known, key=lambda one: abs(math.log(one[0] / macs)), default=None)
        if nearest is not None and (nearest[0] == macs or self._spent > ALLOWED):
            return nearest[1]
        n = batch_size if self.device.type != "cpu" else int(min(max(ENOUGH / macs, 1), batch_size))
        _fill(module, self.device)
        x = torch.rand(n, *shape, device=self.device, requires_grad=True)

        def forward() -> None:
            with torch.no_grad():
                module(x)

        with frozen(module):
            before = self._least(forward)
            both = self._least(lambda: torch.autograd.grad(module(x).sum(), [x]))
        # A pass back to the images has as many multiply-accumulates as the one forward.
        rate = Rate(before / (n * macs), max(both - before, 0.0) / (n * macs))
        self._known.append((macs, rate))
        return rate

    def _least(self, step: Callable[[], object]) -> float:
        """The shorter of two rounds; on a CPU the processor time of one thread, shared by all.

        Threads that wait for each other while other processes run would take many times as long.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = [timed(step, self.device)[0] for _ in range(2)]
        finally:
            torch.set_num_threads(threads)
        self._spent += sum(found)
        return min(found) / (threads if self.device.type == "cpu" else 1)


def _fill(module: nn.Module, device: torch.device) -> None:
    """Give a network some weights: what they are takes no part in its time, unless they are 0."""
    module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)


class Times(NamedTuple):
    """Seconds of training and, at most, of evaluation."""

    training: float = 0.0
    evaluation: float = 0.0

    def __str__(self) -> str:
        """Both, as people read them."""
        return f"{duration(self.training):>9} {duration(self.evaluation):>9}"


def duration(seconds: float) -> str:
    """Minutes, hours or days, with two digits."""
    for unit, size in (("min", 60.0), ("h", 3600.0), ("days", 86400.0)):
        value = seconds / size
        if value < {"min": 99.5, "h": 47.5}.get(unit, math.inf):
            break
    if unit == "min" and value < 1:
        return "< 1 min"
    return f"{float(f'{value:.2g}'):g} {unit}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning and torch say as objects are built."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def estimates(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Times] | str]]:
    """Times of each row on the CPU and on a GPU; a reason where they are unknown."""
    cli: _Unbuilt | None = None
    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    known = [Rates(device) for device in devices]
    for row in rows:
        try:
            with _quiet():
                here = ("--trainer.accelerator=cpu", "--trainer.devices=1")  # as objects are built
                words = checked([*row.words, *here], row.package, {})[1:]
                if cli is None:
                    cli = _Unbuilt(row.package, words, run=False)
                else:
                    cli.take(words)
                effort, data = count_row(cli), cli.datamodule
                found = [
                    rates.of(cli.model, data.shape, data.batch_size, effort.macs) for rates in known
                ]
        except (Exception, SystemExit) as error:  # foreign code fails in any way
            yield row, (str(error).splitlines() or [type(error).__name__])[0]
            continue
        rates = found if len(found) == 2 else [*found, ASSUMED]
        times = [Times(r.seconds(effort.training), r.seconds(effort.evaluation)) for r in rates]
        yield row, times


def print_estimates(rows: Sequence[Row]) -> None:
    """A line for each config with the times of one seed, their sum, and what they assume."""
    seeds, total = Counter(row.stem for row in rows), [Times(), Times()]
    single = list({row.stem: row for row in rows}.values())
    width = max(len(stem) for stem in [*seeds, "without the unknown ones"])
    print(f"\n{'estimated time of one seed':{width}}  {'CPU':^19}   {'GPU':^19}")
    print(f"{'':{width}}  {' training  at most'}    {' training  at most'}")
    for row, times in estimates(single):
        if isinstance(times, str):
            print(f"{row.stem:{width}}  unknown: {times[:120]}", flush=True)
            continue
        print(f"{row.stem:{width}}  {times[0]}   {times[1]}", flush=True)
        for place, one in enumerate(times):
            count = seeds[row.stem]
            total[place] = Times(*(a + count * b for a, b in zip(total[place], one, strict=True)))
    print(f"{f'all {len(rows)} rows, one by one':{width}}  {total[0]}   {total[1]}")
    has_gpu = torch.cuda.is_available()
    card = f"{device_name('cuda')}, measured" if has_gpu else "an A100 at half its float32 peak"
    print(
        f"Work is counted, for float32 without an engine. CPU: {torch.get_num_threads()} threads, "
        f"each as fast as one alone, measured now. GPU: {card}"
        f"{'' if has_gpu else ', ASSUMED, not measured'}.\n"
        "The evaluation takes the time under 'at most' if no attack succeeds."
    )
