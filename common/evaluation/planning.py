"""What an evaluation runs on a model, decided after the check of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from common.attacks.decision import DecisionBased
from common.attacks.engine.network import AttackEngine
from common.evaluation.audit.checks import Audit
from common.evaluation.corruptions import check_images
from common.evaluation.images import Examples
from common.evaluation.measures import Measure, measure_steps
from common.evaluation.model_check import Checked, check_model
from common.evaluation.models import as_victim, device_of
from common.evaluation.steps import Step
from common.evaluation.suite import SuiteEntry, check_suite, steps_of
from common.results.lines import Threat


@dataclass(frozen=True)
class Plan:
    """The steps on the victim.

    ``left_out`` are the keys of steps that need a gradient where there is none; ``remarks`` are
    sentences for the result; ``is_random`` says whether the suite expects random forward passes.
    """

    victim: nn.Module
    checked: Checked
    steps: Sequence[Step]
    remarks: Sequence[str]
    left_out: Sequence[str]
    is_random: bool


def plan(
    model: nn.Module,
    examples: Examples,
    suite: Mapping[str, SuiteEntry],
    threat: Threat | None,
    *,
    audit: Audit | None,
    measures: Mapping[str, Measure],
    engine: AttackEngine | None,
    seed: int,
    batch_size: int,
    num_classes: int | None,
) -> Plan:
    """Check the model and say what is run; arguments as in :func:`common.evaluation.evaluate`.

    Raises:
        ConfigurationError: If the model cannot give a meaningful result, or the suite does not fit
            it.
    """
    is_random = is_random_expected(suite)
    checked = check_model(
        model,
        examples,
        num_classes,
        is_random_expected=is_random,
        batch_size=batch_size,
        device=device_of(model),
    )
    victim = as_victim(model, checked.classes)
    if suite:  # a checkpoint that no entry names is measured without an attack
        check_suite(suite, victim)
    check_images(suite, examples)
    steps = steps_of(suite, victim, checked.classes, seed, engine)
    remarks, left_out = list[str](), list[str]()
    if not checked.has_gradient:
        steps, left_out, remark = _without_gradient(
            steps, suite, threat, victim, checked.classes, seed
        )
        remarks.append(remark)
    if audit is not None and threat is not None:
        steps += audit.steps(victim, threat, checked.classes)
    return Plan(victim, checked, [*steps, *measure_steps(measures)], remarks, left_out, is_random)


def is_random_expected(suite: Mapping[str, SuiteEntry]) -> bool:
    """Whether the suite averages over random forward passes."""
    return any(
        entry.eot > 1 or getattr(entry.attack, "version", None) == "rand"
        for entry in suite.values()
    )


def _without_gradient(
    steps: Sequence[Step],
    entries: Mapping[str, SuiteEntry],
    threat: Threat | None,
    victim: nn.Module,
    classes: int,
    seed: int,
) -> tuple[list[Step], list[str], str]:
    """The steps that need no gradient, with an attack by labels; the names of the others; why."""
    kept = [step for step in steps if not step.needs_gradient]
    left_out = [step.key for step in steps if step.needs_gradient]
    has_one = any(isinstance(entry.attack, DecisionBased) for entry in entries.values())
    if left_out and threat is not None and not has_one:
        by_labels = SuiteEntry(DecisionBased(threat.radius, threat.norm), survivors_only=True)
        kept += steps_of({"black_box": by_labels}, victim, classes, seed)
    remark = "the model has no gradient with respect to its images"
    if left_out:
        ran = ", ".join(step.key for step in kept if step.kind == "attack")
        remark += (
            f": accuracy is that under attacks that need none ({ran}); {', '.join(left_out)} were "
            "not run"
        )
    return kept, left_out, remark
