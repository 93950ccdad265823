"""Evaluation of anybody's model: the same attacks, worst case and audit as our own get."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.analysis.figures import save_figure
from common.attacks.decision import DecisionBased
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import Norm
from common.attacks.randomness import seeded
from common.errors import ConfigurationError, UserError
from common.evaluation.audit.checks import Audit
from common.evaluation.checks import check_model
from common.evaluation.findings import with_findings
from common.evaluation.inputs import collect
from common.evaluation.journal import Journal, identity_of
from common.evaluation.models import as_module, as_victim
from common.evaluation.pictures import draw
from common.evaluation.presets import Suite, chosen_threat, load_suite
from common.evaluation.progress import ConsoleProgress
from common.evaluation.runner import Progress, run_steps
from common.evaluation.steps import Outcomes, Step, Threat
from common.evaluation.suite import SuiteEntry, ball_of, check_entries, check_suite, steps_of
from common.files import check_writable
from common.limits import check_label
from common.results import provenance
from common.results.outcomes import checkpoint_entry, missing_worst, outcome_bits, positions
from common.results.schema import CheckpointResult
from common.results.store import check_mergeable, merge_result


@dataclass
class Evaluation:
    """What an evaluation found.

    Args:
        result: As in a result file: see :mod:`common.results.outcomes`.
        outcomes: Of every example.
        warnings: What looked suspicious, and what the figures do not say.
        position: Where in the data the examples are, ``(N,)``.
    """

    result: CheckpointResult
    outcomes: Outcomes
    warnings: list[str]
    position: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies in [0, 1] by name: ``clean_acc``, ``worst``, and of every attack."""
        return self.result["metrics"]

    @property
    def clean_acc(self) -> float:
        """Accuracy without an attack."""
        return self.metrics["clean_acc"]

    @property
    def robust_acc(self) -> float:
        """Accuracy in the worst case over all attacks within the threat model.

        It is about the examples :attr:`robust_index`: those that met every one of these attacks.

        Raises:
            ConfigurationError: If there is no worst case; the message says why.
        """
        self._check_worst()
        return self.metrics["worst"]

    @property
    def robust(self) -> Tensor:
        """Which of the examples :attr:`robust_index` withstood everything, bool ``(M,)``.

        Raises:
            ConfigurationError: As :attr:`robust_acc`.
        """
        self._check_worst()
        return torch.tensor(outcome_bits(self.result, "worst"))

    @property
    def robust_index(self) -> Tensor:
        """Positions in the data of the examples of the worst case, ``(M,)``.

        Raises:
            ConfigurationError: As :attr:`robust_acc`.
        """
        self._check_worst()
        return self.position[positions(self.result, "worst")]

    def _check_worst(self) -> None:
        if "worst" not in self.metrics:
            reason = missing_worst(self.result["clean"], self.result["attacks"])
            raise ConfigurationError(reason or "there is no worst case: nothing was attacked")

    @property
    def failed_checks(self) -> list[str]:
        """The checks of the audit that failed, as sentences."""
        checks = self.result["audit"]["checks"] if "audit" in self.result else []
        return [
            f"{check['question']} {check['detail']}"
            for check in checks
            if check["verdict"] == "fail"
        ]

    def table(self) -> Table:
        """Accuracies with their intervals, for a terminal."""
        threat = self.outcomes.threat
        about = f", {threat.norm} eps {threat.radius:.5g}" if threat else ""
        table = Table(title=f"{self.result['examples']} examples{about}")
        for title in ("attack", "examples", "accuracy %", "95 % interval"):
            table.add_column(title, justify="left" if title == "attack" else "right")
        named = ["clean_acc", *self.result["attacks"], "worst"]
        for name in (name for name in named if name in self.metrics):
            low, high = self.result["intervals"][name]
            accuracy = f"{100 * self.metrics[name]:.2f}"
            size = str(self.result["sizes"].get(name, self.result["examples"]))
            interval = f"{100 * low:.2f} to {100 * high:.2f}"
            table.add_row(name + self._note(name), size, accuracy, interval)
        return table

    def _note(self, name: str) -> str:
        """What to know of a row that does not count towards the worst case."""
        attack = self.result["attacks"].get(name)
        if attack is None or attack["counts"]:
            return ""
        if attack["kind"] == "noise":
            return " (noise)"
        if attack["norm"] is None or attack["eps"] is None:
            return " (outside: no ball)"
        return f" (outside: {attack['norm']} eps {attack['eps']:.5g})"

    @property
    def suspicions(self) -> list[str]:
        """The warnings, and the checks of the audit that failed."""
        return [*self.warnings, *(f"audit: {text}" for text in self.failed_checks)]

    def __str__(self) -> str:
        """The table, and what to be suspicious of."""
        console = Console(width=100)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get() + "".join(f"warning: {text}\n" for text in self.suspicions)


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    data: Any,
    suite: str | Path | Mapping[str, SuiteEntry] = "quick",
    *,
    eps: float | str | None = None,
    norm: Norm | None = None,
    audit: Audit | bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    examples: int | None = None,
    output: str | Path | None = None,
    name: str = "model",
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str | None = None,
    progress: bool | Progress = True,
    engine: AttackEngine | None = None,
) -> Evaluation:
    """Attack a model and report, example by example, what withstands everything.

    The model is left as it was: modes, gradients and random state. Models of RobustBench can be
    passed in as they are.

    Args:
        model: Images in [0, 1], ``(N, C, H, W)``, to logits ``(N, K)``, in evaluation mode and
            float32, normalisation inside; a plain function will do. If it has a method
            ``adaptive_losses``, suites can name its own losses. One without a gradient is attacked
            by what needs none, by labels alone among other things.
        data: Tensors ``(x, y)``, a data set of ``(image, label)``, or a loader: see
            :func:`common.evaluation.inputs.collect`.
        suite: ``quick``, ``autoattack``, ``audit``, ``paper-...``, a YAML file, or attacks by name.
        eps: Radius of the threat model, pixels in [0, 1]. By default that of the suite: the threat
            it states or the ball of its first attack, else 8/255. The radii and steps of ready
            suites follow it; a number in a suite is used as written, and does not count where it
            is outside.
        norm: Of the threat model; by default the suite's, else ``linf``.
        audit: Whether to check for gradient masking too, by the suite's checks if it has any, or
            the checks themselves.
        num_classes: How many classes the data have, to compare with the model's.
        class_names: For the pictures in ``output``.
        examples: Only so many, of all classes in proportion and the same for every model, see
            :func:`common.data.subset.subset`.
        output: A folder for ``results.json``, pictures, and outcomes as they come, from which a
            killed evaluation goes on; ``None`` writes nothing.
        name: Under which results are filed.
        seed: With an example's position, what random starts depend on.
        batch_size: How many examples are attacked together.
        device: Where to compute, and where the model is moved to; by default where it is.
        progress: Whether to show how far it is, or who is to be told.
        engine: Computes the attacks' passes faster; the plain network judges.

    Raises:
        ConfigurationError: If model, data or suite cannot give a figure that means something:
            images outside [0, 1], training mode, probabilities instead of logits, wrong number of
            classes, unknown suite or loss, another norm than the suite's, a setting that nothing
            would use; or if ``output`` holds another result. Found before the first attack.
        RunDirectoryError: If ``output`` cannot be written.
    """
    model = as_module(model)
    begun = time.perf_counter()
    check_label(name, "the name of the results")
    for setting, count in (("batch_size", batch_size), ("examples", examples)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ConfigurationError(
                f"{setting} must be at least 1, got {count!r}; give a whole number"
            )
    if not isinstance(seed, int):
        raise ConfigurationError(f"seed must be a whole number, got {seed!r}")
    if isinstance(suite, Mapping):
        check_entries(suite)
        ready = Suite(suite, chosen_threat(ball_of(suite), eps, norm))
    else:
        ready = load_suite(suite, eps, norm)
    entries, threat = ready.entries, ready.threat
    checks = audit if isinstance(audit, Audit) else ready.audit or (Audit() if audit else None)
    _check_unused(entries, engine)
    if device is not None:
        try:
            if torch.device(device).type == "meta":
                raise RuntimeError("it has no memory, so weights moved there would be lost")
            model = model.to(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"device {str(device)!r} cannot be used: {reason}") from error
    folder = None if output is None else Path(output)
    if folder is not None:
        for part in ("results.json", "figures/clean.png", "outcomes/part.npz"):
            check_writable(folder / part)
        check_mergeable(folder / "results.json", "any", name, seed, "another output folder")
    at = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    is_random_expected = any(
        entry.eot > 1 or getattr(entry.attack, "version", None) == "rand"
        for entry in entries.values()
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with seeded(seed, torch.device("cpu")):  # a shuffled loader has one order for all models
            batch = collect(data, examples)
        about_data = [str(warning.message) for warning in caught]
        caught.clear()
        checked = check_model(
            model,
            batch,
            num_classes,
            is_random_expected=is_random_expected,
            batch_size=batch_size,
            device=at,
        )
    classes = checked.classes
    suspicions = [str(warning.message) for warning in caught]
    victim = as_victim(model, classes)
    if entries or checks is None:
        check_suite(entries, victim)
    steps = steps_of(entries, victim, classes, seed, engine)
    left_out: list[str] = []
    known = about_data
    if not checked.has_gradient:
        steps, left_out = _without_gradient(steps, entries, threat, victim, classes, seed)
        known.append(_no_gradient(steps, left_out))
    for text in [*known, *suspicions]:
        warnings.warn(text, stacklevel=2)
    if checks is not None:
        steps += checks.steps(victim, threat, classes)
    journal = Journal(None, {})
    if folder is not None:
        journal = Journal(folder / "outcomes", identity_of(victim, batch, seed))
    with ConsoleProgress(len(steps) + 1) as bar:
        told = progress if not isinstance(progress, bool) else bar if progress else None
        try:
            outcomes = run_steps(
                victim,
                batch,
                steps,
                seed=seed,
                batch_size=batch_size,
                threat=threat,
                has_gradient=checked.has_gradient,
                journal=journal,
                progress=told,
                remarks=known,
            )
        except (RuntimeError, ValueError, LookupError) as error:
            if not checked.state or isinstance(error, UserError):
                raise
            raise ConfigurationError(
                f"the model failed while it was attacked ({error!s:.200}), and {checked.state}"
            ) from error
    outcomes.depends_on_history &= not is_random_expected
    found = None if checks is None else checks.report(outcomes, classes)
    result = checkpoint_entry(outcomes, audit=with_findings(found, outcomes, checked))
    if left_out:
        result["not_run"] = left_out
    for text in result["remarks"]:
        if text not in known:
            warnings.warn(text, stacklevel=2)
    evaluation = Evaluation(result, outcomes, [*suspicions, *result["remarks"]], batch["position"])
    if folder is not None:
        merge_result(
            folder / "results.json",
            paper="any",
            experiment=name,
            seed=seed,
            label="model",
            entry=result,
            provenance=provenance.collect(
                device=at,
                world_size=1,
                precision="32-true",
                state_dict=victim.state_dict(),
                config_digest="",
                wall_time_s=time.perf_counter() - begun,
                attack_seconds=outcomes.seconds,
                engine=engine,
            ),
        )
        for title, figure in draw(result, outcomes, batch["x"], class_names).items():
            save_figure(figure, folder / "figures" / f"{title}.png")
    return evaluation


def _without_gradient(
    steps: Sequence[Step],
    entries: Mapping[str, SuiteEntry],
    threat: Threat,
    victim: nn.Module,
    classes: int,
    seed: int,
) -> tuple[list[Step], list[str]]:
    """The steps that need no gradient, and the others; an attack by labels is always among them."""
    kept = [step for step in steps if not step.needs_gradient]
    left_out = [step.key for step in steps if step.needs_gradient]
    if left_out and not any(isinstance(e.attack, DecisionBased) for e in entries.values()):
        by_labels = SuiteEntry(DecisionBased(threat.radius, threat.norm), survivors_only=True)
        kept += steps_of({"black_box": by_labels}, victim, classes, seed)
    return kept, left_out


def _no_gradient(steps: Sequence[Step], left_out: Sequence[str]) -> str:
    if not left_out:
        return "the model has no gradient with respect to its images, which attacks could follow"
    ran = ", ".join(step.key for step in steps if step.kind == "attack")
    return (
        "the model has no gradient with respect to its images: accuracy is that under attacks "
        f"that need none ({ran}); {', '.join(left_out)} were not run"
    )


def _check_unused(entries: Mapping[str, SuiteEntry], engine: AttackEngine | None) -> None:
    """Refuse settings that would change nothing for a model that is passed in."""
    for name, entry in entries.items():
        if entry.checkpoints is not None:
            raise ConfigurationError(
                f"the suite entry {name!r} is for the checkpoints {', '.join(entry.checkpoints)} "
                "of a run, and a model that is passed in is none; drop checkpoints"
            )
    if engine is not None and not any(entry.uses_engine for entry in entries.values()):
        raise ConfigurationError(
            "an engine computes the passes of attacks on the model, and the suite has none (noise, "
            "transfer and the audit go without); drop engine"
        )
