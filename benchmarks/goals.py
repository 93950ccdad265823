"""What we set ourselves, and how far it was reached on this machine: all read off the sections."""

from collections.abc import Callable
from typing import Any, NamedTuple

Whole = dict[str, Any]
"""All sections: ``{name: {"machine": ..., "found": ...}}``."""

ENGINE = "ours, folded, channels_last"
EAGER = f"{ENGINE}, Winograd"
COMPILED = f"{EAGER}, compiled"
BF16 = f"{ENGINE}, bf16"
BF16_COMPILED = f"{BF16}, compiled"
BACKWARD = ("foolbox", "adversarial-robustness-toolbox", "loop with backward()")


class Ratio(NamedTuple):
    """A median and the quartiles around it."""

    value: float
    lower: float
    upper: float


class Goal(NamedTuple):
    """A ratio and the bound it was to keep to."""

    what: str
    bound: float
    measured: Callable[[Whole], Ratio]
    """Raises KeyError where the section, or the candidate, was not measured."""
    is_least: bool = False
    """Whether the bound is a least value, and not a largest one."""
    excuse: Callable[[Whole], str | None] = lambda _: None
    """The measurement that shows why it cannot be reached here, in words."""

    def row(self, whole: Whole) -> list[str]:
        """Cells of the table."""
        limit = f"{'≥' if self.is_least else '≤'} {self.bound:g}"
        try:
            value = self.measured(whole)
        except KeyError:
            return [self.what, limit, "", "not measured"]
        median, *quartiles = (
            number >= self.bound if self.is_least else number <= self.bound for number in value
        )
        if median:
            verdict = "reached" if all(quartiles) else "reached, not by both quartiles"
        elif any(quartiles):
            verdict = "; ".join(filter(None, ["missed within the quartiles", self.excuse(whole)]))
        else:
            verdict = self.excuse(whole) or "not reached"
        return [self.what, limit, f"{value.value:.3f}", verdict]


def rows(whole: Whole) -> list[list[str]]:
    """Goal, bound, measured value and verdict, as text."""
    return [goal.row(whole) for goal in GOALS]


def _found(whole: Whole, section: str, *keys: str) -> Any:
    found = whole[section]["found"]
    for key in keys:
        found = found[key]
    return found


def _without_matrix_units(whole: Whole) -> str | None:
    """The bf16 goals presuppose a processor with units for matrices in it."""
    if whole["training"]["machine"]["bf16_units"] == "AMX":
        return None
    peaks = _found(whole, "training", "peaks_gflops")
    times = peaks["matmul bf16"] / peaks["matmul fp32"]
    return f"no AMX: bf16 multiplies {times:.1f} times as fast as fp32"


def _at(*keys: str) -> Callable[[Whole], Ratio]:
    """A timed row, or a number without quartiles, under some keys of a section's findings."""

    def measured(whole: Whole) -> Ratio:
        found = _found(whole, *keys)
        return _ratio(found) if isinstance(found, dict) else Ratio(found, found, found)

    return measured


def _ratio(row: dict[str, float]) -> Ratio:
    return Ratio(row["ratio"], row["lower"], row["upper"])


def _against(peers: tuple[str, ...], ours: str) -> Callable[[Whole], Ratio]:
    """How many times slower the fastest of some peers is than ours; quartiles at their worst."""

    def measured(whole: Whole) -> Ratio:
        table = _found(whole, "training", "rows")
        ratios = [_ratio(row) for name, row in table.items() if name.startswith(peers)]
        if not ratios:
            raise KeyError(peers)
        peer, own = min(ratios), _ratio(table[ours])
        return Ratio(peer.value / own.value, peer.lower / own.upper, peer.upper / own.lower)

    return measured


def _lightning(words: str) -> Callable[[Whole], Ratio]:
    def measured(whole: Whole) -> Ratio:
        for row in _found(whole, "overheads", "lightning"):
            if row["setting"].startswith(words):
                return _ratio(row)
        raise KeyError(words)

    return measured


def _disagreements(whole: Whole) -> Ratio:
    table = _found(whole, "evaluation", "autoattack", "rows").values()
    count = sum(row["broken_here_alone"] + row["broken_there_alone"] for row in table)
    return Ratio(count, count, count)


GOALS = (
    Goal("step through Lightning / our engine bare, batch 32, PGD-10", 1.03,
         _lightning("ResNet-18, batch 32, PGD-10")),
    Goal("the same, batch 128, one attack step", 1.02,
         _lightning("ResNet-18, batch 128, PGD-1,")),
    Goal("step in fp32 / bare loop", 0.93, _at("training", "rows", EAGER)),
    Goal("the same, compiled", 0.90, _at("training", "rows", COMPILED)),
    Goal("step in bf16 / bare loop", 0.28, _at("training", "rows", BF16),
         excuse=_without_matrix_units),
    Goal("the same, compiled", 0.18, _at("training", "rows", BF16_COMPILED),
         excuse=_without_matrix_units),
    Goal("loops with backward() / ours in fp32", 1.6, _against(BACKWARD, EAGER), True),
    Goal("the same, ours in bf16", 8.0, _against(BACKWARD, BF16), True, _without_matrix_units),
    Goal("torchattacks / ours in fp32", 1.08, _against(("torchattacks",), EAGER), True),
    Goal("the same, ours in bf16", 5.0, _against(("torchattacks",), BF16), True,
         _without_matrix_units),
    Goal("peak memory of a step / bare loop's", 1.1,
         _at("training", "rows", EAGER, "memory_ratio")),
    Goal("AutoAttack in fp32 / official package", 0.65,
         _at("evaluation", "autoattack", "rows", ENGINE)),
    Goal("verdicts of AutoAttack that differ", 0, _disagreements),
    Goal("PGD-100 / loop without compaction", 0.45,
         _at("evaluation", "pgd100", "rows", "ours, until broken, folded")),
    Goal("command line to the first step, seconds", 8.0,
         _at("overheads", "command_line", "first_step_wall_s")),
)  # fmt: skip
