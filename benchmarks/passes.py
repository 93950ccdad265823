"""``python -m benchmarks.passes RUN [RUN ...]``: accuracy against the passes that it costs.

Attacks of growing cost on the same images of finished runs, in the ball of training or of
``--eps``: ours, the official AutoAttack, and the libraries that are installed. Writes
``benchmarks/results/passes.json`` after every network, and the tables and the figure made of it;
rows of other runs stay.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arguments import positive
from benchmarks.evaluation import autoattacked, right
from benchmarks.loops import Attack, Task
from benchmarks.peers import available
from benchmarks.report import RESULTS, Row, measured_on, table, write_blocks, write_row
from common.analysis.profiling import timed
from common.attacks.autoattack import AutoAttack
from common.attacks.engine.network import AttackEngine
from common.attacks.geometry import parse_radius
from common.attacks.pgd import PGD, Start
from common.data.subset import subset
from common.errors import UserError
from common.evaluation import Evaluation, evaluate
from common.evaluation.drawing import (
    CYCLE,
    MARKERS,
    blank_figure,
    save_figure,
    tidy_axes,
    tidy_log_axis,
)
from common.evaluation.models import Victim, load_run
from common.evaluation.passes import counted
from common.evaluation.suite import SuiteEntry
from common.limits import read_yaml
from common.modes import frozen

Verdicts = tuple[Tensor, Row]
"""Which images withstand, bool ``(N,)``; passes, and seconds of the processor or the GPU."""

FILE = RESULTS / "passes.json"
OFFICIAL = "official AutoAttack"
STRONG = "ours, suite strong"
STEPS = (10, 20, 50, 100)
RESTARTS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Attack the networks of runs, one by one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="directories of finished runs")
    parser.add_argument("--eps", help="radius in pixels of [0, 1]; by default that of training")
    parser.add_argument(
        "--examples", type=positive, default=200, help="test images, of all classes"
    )
    given = parser.parse_args(argv)
    try:
        eps = None if given.eps is None else parse_radius(given.eps)
        for number, run in enumerate(given.runs, 1):
            print(f"{number} of {len(given.runs)}: {run}", flush=True)
            rows = write_row(FILE, measured(Path(run), eps, given.examples))
            parts = {"curves": curves(rows), "verdicts": verdicts(rows)}
            write_blocks(RESULTS / "passes.md", parts)
            save_figure(drawn(rows), FILE.with_suffix(".png"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measured(run: Path, eps: float | None, examples: int) -> Row:
    """Verdicts and passes of all attacks on the last weights of a run, on the same test images."""
    model, data = load_run(run)
    settings = read_yaml(run / "config.yaml")
    if eps is None:
        eps = parse_radius(settings["adversary"]["attack"]["init_args"]["eps"])
    x, y = _images(data, examples)
    net = Victim(model, int(y.max()) + 1).eval()
    found: dict[str, Row] = {}
    held: dict[str, Tensor] = {}
    with frozen(net, "eval"):
        clean = right(net, x, y)
        attacks, missing = _attacks(net, x, y, eps)
        for name, attack in attacks.items():
            held[name], found[name] = attack()
            held[name] &= clean
            found[name]["robust"] = int(held[name].sum())
            print(f"  {held[name].sum()} of {len(y)} after {_passes(found[name]) / len(y):,.0f} "
                  f"passes per image: {name}", flush=True)  # fmt: skip
    return {
        "name": f"{settings['experiment'] or run.parent.name} {run.name}",
        "data": type(data.source).__name__,
        "eps": eps,
        "examples": len(y),
        "clean": int(clean.sum()),
        "attacks": found,
        "missing": missing,
        "broken_by_official_alone": _places(held[STRONG] & ~held[OFFICIAL]),
        "broken_by_strong_alone": _places(held[OFFICIAL] & ~held[STRONG]),
    }


def _attacks(
    net: nn.Module, x: Tensor, y: Tensor, eps: float
) -> tuple[dict[str, Callable[[], Verdicts]], dict[str, str]]:
    """Attacks by name: which images withstand, and the passes; and peers that are not there."""

    def climbed(steps: int, restarts: int = 1) -> dict[str, SuiteEntry]:
        start: Start = "zero" if restarts == 1 else "uniform"  # libraries start at x too
        attack = PGD(eps, steps=steps, start=start, restarts=restarts)
        return {"pgd": SuiteEntry(attack, survivors_only=True, until_broken=True)}

    apgd = AutoAttack(eps, version="custom", attacks=["apgd-ce", "apgd-t"])
    suites: dict[str, Any] = {f"ours, PGD-{n}": climbed(n) for n in STEPS}
    suites[f"ours, PGD-{STEPS[-1]} from {RESTARTS} starts"] = climbed(STEPS[-1], RESTARTS)
    suites["ours, APGD-CE and APGD-T"] = {"apgd": SuiteEntry(apgd, survivors_only=True)}
    suites[STRONG] = "strong"
    found: dict[str, Callable[[], Verdicts]] = {
        name: partial(ours, net, x, y, eps, suite) for name, suite in suites.items()
    }
    missing: dict[str, str] = {}
    for steps in (STEPS[1], STEPS[-1]):
        task = Task(net, x, y, eps=eps, step_size=2.5 * eps / steps, steps=steps)
        there, missing = available(task)
        for name, build in there.items():
            found[f"{name}, PGD-{steps}"] = partial(theirs, net, x, y, eps, build(task))
    found[OFFICIAL] = partial(official, net, x, y, eps)
    return found, missing


def ours(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    suite: Any = "strong",
    engine: AttackEngine | None = None,
) -> Verdicts:
    """Of one of our suites; the passes without those of the model check, whose number is fixed."""
    found: list[Evaluation] = []

    def run() -> None:
        data = x.cpu(), y.cpu()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # further attempts, whose passes are counted
            found.append(evaluate(net, data, suite, eps=eps, progress=False, engine=engine))

    seconds = timed(run, x.device)[0]
    costs = found[0].outcomes.costs.values()
    return found[0].robust, {
        "forward": sum(cost.forward for cost in costs),
        "backward": sum(cost.backward for cost in costs),
        "seconds": seconds,
    }


def theirs(net: nn.Module, x: Tensor, y: Tensor, eps: float, attack: Attack) -> Verdicts:
    """Of a library, from its images, which are checked; passes are counted with hooks."""
    found: list[Tensor] = []
    with torch.random.fork_rng(), counted(net) as passes:
        seconds = timed(lambda: found.append(attack(net, x, y)), x.device)[0]
        forward, backward, _ = passes.take()
    (x_adv,) = found
    if (x_adv - x).abs().max() > eps + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise RuntimeError(f"images of {attack} left the ball of radius {eps}")
    return right(net, x_adv, y), {"forward": forward, "backward": backward, "seconds": seconds}


def official(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Verdicts:
    """Of the official AutoAttack."""
    return theirs(net, x, y, eps, partial(autoattacked, eps=eps))


def _images(data: Any, examples: int) -> tuple[Tensor, Tensor]:
    images, labels = data.source.load("test")
    rows = subset(labels, examples)
    return images[rows].float() / 255.0, labels[rows].long()


def _places(broken: Tensor) -> list[int]:
    found: list[int] = broken.nonzero().flatten().tolist()
    return found


def _passes(found: Mapping[str, Any]) -> int:
    total: int = found["forward"] + found["backward"]
    return total


# ------------------------------------------------------------------------------ tables and figure


def curves(rows: Sequence[Row]) -> str:
    """Accuracy against passes: a table for each network on which all attacks were run."""
    parts = []
    for row in _complete(rows):
        cells = [
            [
                name,
                f"{100 * one['robust'] / row['examples']:.1f}",
                f"{_passes(one) / row['examples']:,.0f}",
                f"{one['seconds']:.1f}",
            ]
            for name, one in sorted(row["attacks"].items(), key=lambda item: _passes(item[1]))
        ]
        head = ["attack", "accuracy %", "passes per image", "CPU seconds"]
        parts += [
            f"**{row['name']}**, {row['data']}, linf eps {row['eps']:.3g}, {row['examples']} "
            f"images, clean accuracy {100 * row['clean'] / row['examples']:.1f} %:",
            "",
            *table(head, cells),
            "",
            *(f"- {name} did not run: {why}" for name, why in row["missing"].items()),
            *([""] if row["missing"] else []),
        ]
    return "\n".join([*parts, measured_on(_complete(rows))])


def verdicts(rows: Sequence[Row]) -> str:
    """The suite ``strong`` beside the official package: one row per network."""
    head = ["network", "data, eps", "images", "clean", "withstand autoattack", "withstand strong",
            "broken by autoattack alone", "broken by strong alone", "passes", "time"]  # fmt: skip
    lines = table(head, [_verdict_cells(row) for row in rows], words=(0, 1))
    return "\n".join([*lines, "", measured_on(rows)])


def _verdict_cells(row: Row) -> list[str]:
    official, strong = (row["attacks"][name] for name in (OFFICIAL, STRONG))
    alone = [row[f"broken_by_{name}_alone"] for name in ("official", "strong")]
    return [
        *(row["name"], f"{row['data']}, {row['eps']:.3g}", str(row["examples"]), str(row["clean"])),
        *(str(one["robust"]) for one in (official, strong)),
        *(f"{len(one)}: {', '.join(map(str, one))}" if one else "0" for one in alone),
        f"{_passes(strong) / _passes(official):.2f}",
        f"{strong['seconds'] / official['seconds']:.2f}",
    ]


def drawn(rows: Sequence[Row]) -> Any:
    """The table of accuracy against passes as a figure, a panel for each network."""
    known = _complete(rows)
    figure = blank_figure(4.2 * len(known), 3.4)
    for ax, row in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for name, one in row["attacks"].items():
            place = _passes(one) / row["examples"], 100 * one["robust"] / row["examples"]
            points.setdefault(name.partition(",")[0], []).append(place)
        for (by, places), colour, marker in zip(points.items(), CYCLE, MARKERS, strict=False):
            line = "-" if by == "ours" else ""
            ax.plot(*zip(*sorted(places), strict=True), marker=marker, linestyle=line,
                    color=colour, label=by, markersize=5)  # fmt: skip
        ax.set(title=row["name"], xscale="log", xlabel="passes per image, forward and backward")
        tidy_log_axis(ax.xaxis)
        tidy_axes(ax)
    figure.axes[0].set_ylabel("accuracy after the attack, %")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def _complete(rows: Sequence[Row]) -> list[Row]:
    """Rows with more attacks than the two of :func:`verdicts`."""
    return [row for row in rows if len(row["attacks"]) > 2]


if __name__ == "__main__":
    sys.exit(main())
