"""Pictures of an evaluation: curves, bars by class, confusion, and the examples themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from common.errors import check_choice
from common.evaluation.drawing import (
    accuracy_curve,
    adversarial_grid,
    confusion_matrix,
    per_class_bars,
)
from common.evaluation.images import Images
from common.results.lines import Outcomes
from common.results.outcomes import counts_as_attack, positions
from common.results.schema import CheckpointResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = bool | Literal["examples"]
"""Which pictures are drawn: all, none, or the adversarial examples alone."""
_AXES = {"eps": "eps", "steps": "steps", "level": "noise level"}


def check_pictures(name: str, which: object) -> None:
    """Raise a ConfigurationError if the setting of this name is no choice of pictures."""
    check_choice(name, which, Literal[True, False, "examples"])


def draw(
    result: CheckpointResult,
    outcomes: Outcomes,
    x: Tensor | Images,
    names: Sequence[str] | None = None,
    which: Pictures = True,
) -> dict[str, Figure]:
    """The pictures that are asked for and that the outcomes allow, by name.

    ``x`` are the clean images, ``(N, C, H, W)``, in the order of the outcomes; ``names`` those of
    the classes.
    """
    classes = len(result["clean"]["per_class"])
    names = names or [str(label) for label in range(classes)]
    pictures = curves(result) if which is True else {}
    if which is True and "worst" in result["metrics"]:
        rows = torch.tensor(positions(result, "worst"))  # all bars are about the same examples
        pictures["per_class"] = _bars(result, outcomes, rows, names[:classes])
        pictures["confusion"] = confusion_matrix(
            outcomes.confusion(classes, rows).numpy(),
            names[:classes],
            "under the attack that broke it first",
        )
    if which and (grid := _examples(outcomes, x, names)):
        pictures["examples"] = grid
    return pictures


def _bars(
    result: CheckpointResult, outcomes: Outcomes, rows: Tensor, labels: Sequence[str]
) -> Figure:
    """Accuracy by class on these rows: clean, under the two strongest attacks, at worst."""
    bars = {"clean": outcomes.correct["clean"]}
    counted = [name for name, attack in result["attacks"].items() if counts_as_attack(attack)]
    for name in sorted(counted, key=lambda name: _mean(outcomes.correct[name][rows]))[:2]:
        bars[name] = outcomes.correct[name]
    bars["worst case"] = ~outcomes.fell_to()[0] & bars["clean"]
    y = outcomes.y[rows]
    shares = {
        name: [_mean(correct[rows][y == label]) for label in range(len(labels))]
        for name, correct in bars.items()
    }
    return per_class_bars(shares, labels)


def curves(result: CheckpointResult) -> dict[str, Figure]:
    """Accuracy against radius, steps or noise level, for every sweep; from a result file alone."""
    points: dict[tuple[str, str], dict[str, dict[float, str]]] = {}
    attacks = result["attacks"]
    for name, attack in attacks.items():
        axes = [axis for axis in attack["at"] if axis in _AXES]
        if len(axes) != 1 or attack["at"].get("draw"):
            continue
        parts = name.split("/")
        is_noise = attack["kind"] == "noise"
        label = parts[0] if is_noise or "=" in parts[1] else parts[1]
        if attack["examples"] < result["examples"]:
            label += f", {attack['examples']} images"
        lines = points.setdefault(("noise" if is_noise else parts[0], axes[0]), {})
        lines.setdefault(label, {})[float(attack["at"][axes[0]])] = name
    pictures = {}
    for (entry, axis), lines in points.items():
        xs = sorted({at for line in lines.values() for at in line})
        series: dict[str, list[float]] = {label: [] for label in lines}
        bands: dict[str, list[tuple[float, float]]] = {label: [] for label in lines}
        for label, line in lines.items():
            for at in xs:
                share, low, high = float("nan"), float("nan"), float("nan")
                if at in line:
                    attack = attacks[line[at]]
                    share = attack["correct"] / attack["examples"]
                    low, high = result["intervals"][line[at]]
                series[label].append(share)
                bands[label].append((low, high))
        pictures[f"{entry}_{axis}"] = accuracy_curve(xs, series, _AXES[axis], intervals=bands)
    return pictures


def _mean(correct: Tensor) -> float:
    return correct.float().mean().item() if len(correct) else 0.0


def _examples(outcomes: Outcomes, x: Tensor | Images, names: Sequence[str]) -> Figure | None:
    """The smallest perturbation found for the first examples that fell.

    Those that fell within the threat model come first; an audit also breaks others beyond it.
    """
    norm, radius = "linf", float("inf")
    if outcomes.threat is not None:
        norm, radius = outcomes.threat.norm, outcomes.threat.radius
    best: dict[int, tuple[float, Tensor, int]] = {}
    for key, line in outcomes.lines.items():
        columns = outcomes.columns[key]
        if line.kind != "attack" or "x_adv" not in columns:
            continue
        for place, row in enumerate(outcomes.pictured.tolist()):
            distance, predicted = columns[norm][row].item(), int(columns["predicted"][row])
            is_broken = bool(outcomes.correct["clean"][row]) and predicted != outcomes.y[row]
            if is_broken and 0.0 < distance < best.get(row, (float("inf"),))[0]:
                best[row] = distance, columns["x_adv"][place], predicted
    rows = sorted(best, key=lambda row: (best[row][0] > radius * (1.0 + 1e-4), row))[:8]
    if not rows:
        return None
    distances, x_adv, predicted_adv = zip(*(best[row] for row in rows), strict=True)
    return adversarial_grid(
        x[rows],
        torch.stack(x_adv),
        outcomes.y[rows],
        outcomes.y[rows],
        torch.tensor(predicted_adv),
        names,
        {norm: torch.tensor(distances)},
    )
