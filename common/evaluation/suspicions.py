"""What outcomes themselves say against trusting them."""

from collections.abc import Iterator

from common.evaluation.steps import Outcomes

FEW = 10
"""Fewer images classified correctly say nothing when none of them falls."""


def suspicions(outcomes: Outcomes) -> list[str]:
    """Reasons to doubt that the figures are those of the model, as sentences."""
    return [*_without_gradient(outcomes), *_nothing_found(outcomes)]


def _without_gradient(outcomes: Outcomes) -> Iterator[str]:
    what = {
        "unmoved": "gradients vanish or are not finite",
        "distorted": "the scores are squashed at the end of the model, which distorts gradients",
    }
    for name, text in what.items():
        counts = {
            key: int(columns[name].sum())
            for key, columns in outcomes.columns.items()
            if name in columns
        }
        if found := [f"{key} for {count}" for key, count in counts.items() if count]:
            yield (
                f"{text}: an attack got no usable direction for examples that withstood it "
                f"({', '.join(found)} of {len(outcomes.y)}). They were attacked again, through the "
                "scores before squashing, through what the model cuts or rounds, and by labels "
                "alone; an evaluation that lacks this overestimates the model's robustness"
            )


def _nothing_found(outcomes: Outcomes) -> list[str]:
    within = [key for key, line in outcomes.lines.items() if line.counts and line.kind == "attack"]
    is_right = outcomes.correct["clean"]
    met = [int((is_right & outcomes.attacked[key]).sum()) for key in within]
    if max(met, default=0) < FEW or any(
        (is_right & ~outcomes.correct[key]).any() for key in within
    ):
        return []
    return [
        f"none of the attacks ({', '.join(within)}) found a single adversarial example among the "
        f"{int(is_right.sum())} images classified correctly; this is suspicious in itself: the "
        "radius may be too small to mean anything, or the attacks fail (gradient masking)"
    ]
