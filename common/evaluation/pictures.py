"""Pictures of an evaluation: curves, bars by class, confusion, and the examples themselves."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.evaluation.drawing import (
    accuracy_curve,
    adversarial_grid,
    confusion_matrix,
    per_class_bars,
)
from common.evaluation.models import class_names
from common.results.lines import Outcomes
from common.results.outcomes import counts_as_attack, positions
from common.results.schema import AttackResult, CheckpointResult

_AXES = {"eps": "eps", "steps": "steps", "level": "noise level"}


def draw(
    result: CheckpointResult,
    outcomes: Outcomes,
    x: Tensor,
    names: Sequence[str] | None = None,
) -> dict[str, Figure]:
    """All pictures that the outcomes allow, by name.

    Args:
        result: The figures, as they are filed.
        outcomes: Of every example.
        x: The clean images, ``(N, C, H, W)``, in the order of the outcomes.
        names: Of the classes.
    """
    classes = len(result["clean"]["per_class"])
    labels = class_names(names, classes)[:classes]
    pictures = curves(result)
    if "worst" in result["metrics"]:
        rows = torch.tensor(positions(result, "worst"))  # all bars are about the same examples
        pictures["per_class"] = _bars(result, outcomes, rows, labels)
        pictures["confusion"] = confusion_matrix(
            _confusion(outcomes, classes, rows).numpy(),
            labels,
            "under the attack that broke it first",
        )
    if grid := _examples(outcomes, x, labels):
        pictures["examples"] = grid
    return pictures


def _bars(
    result: CheckpointResult, outcomes: Outcomes, rows: Tensor, labels: Sequence[str]
) -> Figure:
    """Accuracy by class: clean, under the two strongest attacks that met these rows, at worst."""
    bars = {"clean": outcomes.correct["clean"]}
    counted = [name for name, attack in result["attacks"].items() if counts_as_attack(attack)]
    for name in sorted(counted, key=lambda name: _mean(outcomes.correct[name][rows]))[:2]:
        bars[name] = outcomes.correct[name]
    bars["worst case"] = ~_fell_to(outcomes)[0] & bars["clean"]
    y = outcomes.y[rows]
    shares = {
        name: [_mean(correct[rows][y == label]) for label in range(len(labels))]
        for name, correct in bars.items()
    }
    return per_class_bars(shares, labels)


def curves(result: CheckpointResult) -> dict[str, Figure]:
    """Accuracy against radius, steps or noise level, for every sweep; from a result file alone."""
    points: dict[tuple[str, str], dict[str, dict[float, AttackResult]]] = {}
    total = result["examples"]
    for name, attack in result["attacks"].items():
        axes = [axis for axis in attack["at"] if axis in _AXES]
        if len(axes) != 1 or attack["at"].get("draw"):
            continue
        parts = name.split("/")
        entry = "noise" if attack["kind"] == "noise" else parts[0]
        label = parts[0] if attack["kind"] == "noise" or "=" in parts[1] else parts[1]
        if attack["examples"] < total:
            label += f", {attack['examples']} images"
        lines = points.setdefault((entry, axes[0]), {})
        lines.setdefault(label, {})[float(attack["at"][axes[0]])] = attack
    pictures = {}
    for (entry, axis), lines in points.items():
        xs = sorted({at for line in lines.values() for at in line})
        series, bands = {}, {}
        for label, line in lines.items():
            series[label] = [_share(line.get(at)) for at in xs]
            bands[label] = [_interval(result, line.get(at)) for at in xs]
        pictures[f"{entry}_{axis}"] = accuracy_curve(xs, series, _AXES[axis], intervals=bands)
    return pictures


def _share(attack: AttackResult | None) -> float:
    return float("nan") if attack is None else attack["correct"] / attack["examples"]


def _interval(result: CheckpointResult, attack: AttackResult | None) -> tuple[float, float]:
    name = next((name for name, other in result["attacks"].items() if other is attack), None)
    low, high = result["intervals"][name] if name else (float("nan"), float("nan"))
    return low, high


def _mean(correct: Tensor) -> float:
    return correct.float().mean().item() if len(correct) else 0.0


def _fell_to(outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """Which examples fell within the threat model, and what they were then taken for."""
    predicted = outcomes.columns["clean"]["predicted"].clone()
    fell = torch.zeros_like(outcomes.correct["clean"])
    for key, line in outcomes.lines.items():
        if line.counts and line.kind == "attack":
            broken = outcomes.correct["clean"] & outcomes.attacked[key] & ~outcomes.correct[key]
            first = broken & ~fell
            predicted = torch.where(first, outcomes.columns[key]["predicted"], predicted)
            fell |= broken
    return fell, predicted


def _confusion(outcomes: Outcomes, classes: int, rows: Tensor) -> Tensor:
    """How often label i was taken for class j, ``(K, K)``; the first break of an example counts."""
    predicted = _fell_to(outcomes)[1][rows]
    size = max(classes, int(predicted.max()) + 1)
    cells = torch.bincount(outcomes.y[rows] * size + predicted, minlength=size * size)
    return cells.view(size, size)[:classes, :classes]


def _examples(outcomes: Outcomes, x: Tensor, labels: Sequence[str]) -> Figure | None:
    """The smallest perturbation found for each of the first examples that fell."""
    norm = outcomes.threat.norm if outcomes.threat else "linf"
    best: dict[int, tuple[float, Tensor, int]] = {}
    for key in outcomes.lines:
        columns = outcomes.columns[key]
        if outcomes.lines[key].kind != "attack" or "x_adv" not in columns:
            continue
        for place, row in enumerate(outcomes.pictured.tolist()):
            distance = columns[norm][row].item()
            is_broken = bool(outcomes.correct["clean"][row]) and (
                columns["predicted"][row] != outcomes.y[row]
            )
            if is_broken and 0.0 < distance < best.get(row, (float("inf"),))[0]:
                found = (distance, columns["x_adv"][place], int(columns["predicted"][row]))
                best[row] = found
    rows = sorted(best)[:8]
    if not rows:
        return None
    return adversarial_grid(
        x[rows],
        torch.stack([best[row][1] for row in rows]),
        outcomes.y[rows],
        torch.tensor([best[row][2] for row in rows]),
        {norm: torch.tensor([best[row][0] for row in rows])},
        labels,
    )
