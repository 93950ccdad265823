"""The evaluation pipeline: a model, images and a suite of attacks give a report.

``evaluate``, ``python -m common.evaluation`` and the callback behind ``test`` use it, on one
process or many.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.engine.network import AttackEngine
from common.attacks.geometry import Norm
from common.attacks.randomness import seeded
from common.errors import ConfigurationError, UserError
from common.evaluation.audit.checks import Audit
from common.evaluation.claims import compare, read_claim
from common.evaluation.corruptions import mean_errors
from common.evaluation.drawing import save_figure
from common.evaluation.images import Examples
from common.evaluation.inputs import collect
from common.evaluation.journal import Journal, identity_of
from common.evaluation.measures import Measure, means
from common.evaluation.models import as_module, device_of
from common.evaluation.named_models import find_model
from common.evaluation.pictures import Pictures, check_pictures, draw
from common.evaluation.planning import Plan, plan
from common.evaluation.presets import Suite, chosen_threat, load_suite
from common.evaluation.progress import ConsoleProgress, Progress
from common.evaluation.report import Evaluation, with_findings
from common.evaluation.runner import Team, run_steps
from common.evaluation.saved import Saver
from common.evaluation.suite import SuiteEntry, ball_of, check_entries, check_suite
from common.files import check_writable
from common.limits import check_label
from common.results import provenance
from common.results.lines import Outcomes, Threat
from common.results.outcomes import checkpoint_entry
from common.results.store import check_mergeable, merge_result


@dataclass(frozen=True)
class Filing:
    """Where results are filed, and under which names.

    ``outcomes`` and ``figures`` are folders beside the result file. The label and ``at``
    (``epoch``, ``global_step``) are those of the checkpoint; the digest is that of the settings
    behind the weights. ``provenance`` is recorded beside versions, device and time.
    """

    results: Path
    experiment: str
    paper: str = "any"
    label: str = "model"
    at: Mapping[str, int] = field(default_factory=dict)
    config_digest: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pictures: Pictures = True

    def __post_init__(self) -> None:
        check_pictures("pictures", self.pictures)

    def beside(self, name: str) -> Path:
        """A folder beside the results: ``outcomes`` or ``figures``."""
        return self.results.parent / name

    def check(self, seed: int, remedy: str) -> None:
        """Refuse folders that cannot be written, or a file of other results."""
        check_writable(self.results)
        for folder in map(self.beside, ("outcomes", "figures")):
            if folder.exists():
                check_writable(folder / "any")
        check_mergeable(self.results, self.paper, self.experiment, seed, remedy)


def evaluate(
    model: str | nn.Module | Callable[[Tensor], Tensor],
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
    save_examples: bool = False,
    name: str = "model",
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str | None = None,
    progress: bool | Progress = True,
    engine: AttackEngine | None = None,
    measures: Mapping[str, Measure] | None = None,
    claim: str | Path | None = None,
) -> Evaluation:
    """Attack a model and report which examples withstand all attacks.

    The model keeps its modes, gradients and random state. RobustBench's models fit as they are.

    Args:
        model: Images in [0, 1], ``(N, C, H, W)``, to logits ``(N, K)``, in evaluation mode and
            float32, normalisation inside; a module, a function, or a name, see
            :func:`common.evaluation.named_models.find_model`. Suites can name the losses of its
            method ``adaptive_losses``. Without a gradient it is attacked by labels only.
        data: Tensors ``(x, y)``, a data set of ``(image, label)``, or a loader: see
            :func:`common.evaluation.inputs.collect`.
        suite: ``quick``, ``autoattack``, ``audit``, ``paper-...``, a YAML file, or attacks by name.
        eps: Radius of the threat model, pixels in [0, 1]; by default that of the suite, else 8/255.
            Radii and steps of ready suites follow it.
        norm: Norm of the threat model; by default that of the suite, else linf.
        audit: Whether to check for gradient masking too, by the suite's checks if it has any; or
            the checks themselves.
        num_classes: Of the data, to compare with the model's.
        class_names: For the pictures.
        examples: Number of examples, of all classes in proportion; by default all.
        output: Folder for results.json, pictures, and outcomes from which a killed evaluation
            resumes; by default nothing is written.
        save_examples: Whether to write the adversarial images of all examples to the folder
            ``adversarial`` in ``output``, see :mod:`common.evaluation.saved`.
        name: Under which results are filed.
        seed: Of the attacks.
        batch_size: Examples that are attacked together.
        device: Where the model is moved to; by default it stays.
        progress: Whether to show progress, or the object that receives it.
        engine: Computes the passes of attacks faster; the plain network judges.
        measures: Other numbers of the network, see :mod:`common.evaluation.measures`.
        claim: A ``model_info`` JSON file of RobustBench, whose accuracies are compared with ours.

    Raises:
        ConfigurationError: If model, data, suite or settings cannot give a meaningful result, or
            ``output`` holds another one; before the first attack.
        RunDirectoryError: If ``output`` cannot be written.
    """
    check_label(name, "the name of the results")
    _check_numbers(seed, batch_size=batch_size, examples=examples)
    ready = _ready(suite, eps, norm)
    filing = _filing(output, name, seed, save_examples)
    claimed = {} if claim is None else read_claim(claim, ready.threat)
    model = find_model(model)[0] if isinstance(model, str) else as_module(model)
    checks = audit if isinstance(audit, Audit) else ready.audit or (Audit() if audit else None)
    if checks is None and not ready.entries:
        check_suite(ready.entries, model)
    _check_unused(ready.entries, checks, engine)
    if device is not None:
        model = _moved(model, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with seeded(seed, torch.device("cpu")):  # a shuffled loader has one order for all models
            batch = collect(data, examples)
    evaluation = run(
        model,
        batch,
        ready.entries,
        ready.threat,
        audit=checks,
        measures=measures,
        engine=engine,
        seed=seed,
        batch_size=batch_size,
        num_classes=num_classes,
        class_names=class_names,
        filing=filing,
        save_examples=save_examples,
        progress=progress,
        remarks=[str(warning.message) for warning in caught],
    )
    evaluation.comparisons = compare(claimed, evaluation.result)
    return evaluation


def _ready(
    suite: str | Path | Mapping[str, SuiteEntry], eps: float | str | None, norm: Norm | None
) -> Suite:
    if not isinstance(suite, Mapping):
        return load_suite(suite, eps, norm)
    check_entries(suite)
    return Suite(suite, chosen_threat(ball_of(suite), eps, norm))


def _filing(output: str | Path | None, name: str, seed: int, save_examples: bool) -> Filing | None:
    if output is None:
        if save_examples:
            raise ConfigurationError("save_examples is True and there is no output; give a folder")
        return None
    filing = Filing(Path(output) / "results.json", name)
    filing.check(seed, "another output folder")
    return filing


def run(
    model: nn.Module,
    examples: Examples,
    suite: Mapping[str, SuiteEntry],
    threat: Threat | None,
    *,
    audit: Audit | None = None,
    measures: Mapping[str, Measure] | None = None,
    engine: AttackEngine | None = None,
    seed: int = 0,
    batch_size: int = 250,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    filing: Filing | None = None,
    save_examples: bool = False,
    progress: bool | Progress = True,
    remarks: Sequence[str] = (),
) -> Evaluation:
    """Check the model, run all steps, report and file; arguments as in :func:`evaluate`.

    ``examples`` has ``x``, ``y``, ``index`` and, for a part of the data, ``position``. Processes
    that ``torch.distributed`` joins share the work. All return the same; the first one writes,
    warns and shows progress.
    """
    begun = time.perf_counter()
    team, measures = Team.of_processes(), measures or {}
    _check_alike(team, model, examples, seed)
    planned = plan(
        model,
        examples,
        suite,
        threat,
        audit=audit,
        measures=measures,
        engine=engine,
        seed=seed,
        batch_size=batch_size,
        num_classes=num_classes,
    )
    known = [*remarks, *planned.remarks]
    _warn(team, [*known, *planned.checked.suspicions])
    journal, saver, data_digest = _keepers(filing, planned, examples, seed, save_examples, team)
    bar = ConsoleProgress(len(planned.steps) + 1)
    shown = progress if not isinstance(progress, bool) else bar if progress else None
    with bar.display, _blaming(planned.checked.state):
        outcomes = run_steps(
            planned.victim,
            examples,
            planned.steps,
            seed=seed,
            batch_size=batch_size,
            threat=threat,
            has_gradient=planned.checked.has_gradient,
            journal=journal,
            saver=saver,
            team=team,
            progress=shown if team.rank == 0 else None,
            remarks=known,
        )
    outcomes.depends_on_history &= not planned.is_random
    found = means(outcomes, measures) | mean_errors(suite, outcomes)
    evaluation = _reported(outcomes, planned, examples, audit, found, filing)
    _warn(team, [text for text in evaluation.result["remarks"] if text not in known])
    if filing is not None and team.rank == 0:
        if saver is not None:
            saver.finish(outcomes, evaluation.position)
        made_with = _made_with(planned.victim, filing, team, outcomes, engine, begun)
        _file(evaluation, filing, seed, {**made_with, "data_digest": data_digest})
        _draw(evaluation, filing, examples, class_names)
    return evaluation


def _check_alike(team: Team, model: nn.Module, examples: Examples, seed: int) -> None:
    """Refuse processes with another model, other examples or another seed than the first one."""
    if team.size == 1:
        return
    identities = team.gather(identity_of(model, examples, seed))
    for name in ("weights", "data", "seed"):
        if any(theirs[name] != identities[0][name] for theirs in identities):
            raise ConfigurationError(
                f"the {name} of the {team.size} processes differ, and they share one evaluation; "
                "give all of them the same weights, all the data (no DistributedSampler) and seed"
            )


def _keepers(
    filing: Filing | None,
    planned: Plan,
    examples: Examples,
    seed: int,
    save_examples: bool,
    team: Team,
) -> tuple[Journal, Saver | None, str]:
    """What keeps outcomes and, if they are asked for, adversarial images; digest of the images."""
    if filing is None:
        return Journal(), None, ""
    identity = identity_of(planned.victim, examples, seed, filing.config_digest)
    saver = None
    if save_examples:
        about = {key: identity[key] for key in ("weights", "data", "seed", "versions")}
        decisive = [identity, [[step.key, step.settings, step.threat] for step in planned.steps]]
        make = partial(
            Saver,
            filing.beside("adversarial"),
            decisive,
            examples,
            {"model": filing.experiment} | about,
        )
        saver = team.first(partial(make, is_first=True)) or make(is_first=False)
        identity["images"] = saver.token
    return Journal(filing.beside("outcomes"), identity), saver, identity["data"]


def _reported(
    outcomes: Outcomes,
    planned: Plan,
    examples: Examples,
    audit: Audit | None,
    measured: Mapping[str, float],
    filing: Filing | None,
) -> Evaluation:
    checked = planned.checked
    found = None if audit is None else audit.report(outcomes, checked.classes)
    result = checkpoint_entry(
        outcomes,
        audit=with_findings(found, outcomes, checked.state, checked.has_gradient),
        measures={**measured, **checked.cost},
        **(filing.at if filing is not None else {}),
    )
    if planned.left_out:
        result["not_run"] = list(planned.left_out)
    position = examples.get("position", torch.arange(len(outcomes.y)))
    warned = [*checked.suspicions, *result["remarks"]]
    return Evaluation(result, outcomes, warned, position)


def _file(evaluation: Evaluation, filing: Filing, seed: int, made_with: dict[str, Any]) -> None:
    merge_result(
        filing.results,
        paper=filing.paper,
        experiment=filing.experiment,
        seed=seed,
        label=filing.label,
        entry=evaluation.result,
        provenance=made_with | dict(filing.provenance),
    )


def _made_with(
    victim: nn.Module,
    filing: Filing,
    team: Team,
    outcomes: Outcomes,
    engine: AttackEngine | None,
    begun: float,
) -> dict[str, Any]:
    """The provenance of a result."""
    return provenance.collect(
        device=device_of(victim),
        world_size=team.size,
        precision="32-true",
        state_dict=victim.state_dict(),
        config_digest=filing.config_digest,
        wall_time_s=time.perf_counter() - begun,
        attack_seconds={key: cost.seconds for key, cost in outcomes.costs.items()},
        engine=engine,
    )


def _draw(
    evaluation: Evaluation, filing: Filing, examples: Examples, names: Sequence[str] | None
) -> None:
    found, x = evaluation.outcomes, examples["x"]
    evaluation.pictures = draw(evaluation.result, found, x, names, filing.pictures)
    for title, figure in evaluation.pictures.items():
        save_figure(figure, filing.beside("figures") / f"{filing.label}_{title}.png")


@contextmanager
def _blaming(state: str) -> Iterator[None]:
    """If a model with a state fails under attack, name the state in the error."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError) as error:
        if not state or isinstance(error, UserError):
            raise
        raise ConfigurationError(
            f"the model failed while it was attacked ({error!s:.200}), and {state}"
        ) from error


def _check_numbers(seed: Any, **counts: Any) -> None:
    for setting, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ConfigurationError(
                f"{setting} must be at least 1, got {count!r}; give a whole number"
            )
    if not isinstance(seed, int):
        raise ConfigurationError(f"seed must be a whole number, got {seed!r}")


def _moved(model: nn.Module, device: torch.device | str) -> nn.Module:
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it stores no values, so the weights would be lost")
        return model.to(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device {str(device)!r} cannot be used: {reason}") from error


def _warn(team: Team, texts: Sequence[str]) -> None:
    for text in texts if team.rank == 0 else ():
        warnings.warn(text, stacklevel=4)


def _check_unused(
    entries: Mapping[str, SuiteEntry], audit: Audit | None, engine: AttackEngine | None
) -> None:
    """Refuse settings that would change nothing for a model that is passed in."""
    parts = {f"the suite entry {name!r}": entry.checkpoints for name, entry in entries.items()}
    parts["the audit"] = None if audit is None else audit.checkpoints
    for name, labels in parts.items():
        if labels is not None:
            raise ConfigurationError(
                f"{name} is for the checkpoints {', '.join(labels)} of a run, and a model that is "
                "passed in is none; drop checkpoints"
            )
    if engine is not None and not any(entry.uses_engine for entry in entries.values()):
        raise ConfigurationError(
            "an engine computes the passes of attacks on the model, and the suite has none (noise, "
            "transfer and the audit go without); drop engine"
        )
