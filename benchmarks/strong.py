"""``python -m benchmarks.strong RUN [RUN ...]``: suite ``strong`` beside the official AutoAttack.

Both attack the same images of a finished run in the ball that it was trained with, or of
``--eps``. Writes ``benchmarks/results/strong.json`` after every network, and the table in
``benchmarks/README.md``; rows of other runs stay.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from torch import Tensor, nn

from benchmarks.evaluation import right
from benchmarks.report import RESULTS, machine, table
from common.analysis.profiling import timed
from common.attacks.engine.network import AttackEngine
from common.attacks.geometry import parse_radius
from common.data.subset import subset
from common.evaluation import Evaluation, evaluate
from common.evaluation.models import Victim, load_run
from common.evaluation.passes import counted
from common.files import write_json_atomically
from common.limits import read_json, read_yaml
from common.modes import frozen
from common.results.markdown import write_readme

Row = dict[str, Any]
BEGIN, END = "<!-- strong -->", "<!-- /strong -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the two on the networks of runs, one by one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strong", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="directories of finished runs")
    parser.add_argument("--eps", help="radius in pixels of [0, 1]; by default that of training")
    parser.add_argument("--examples", type=int, default=500, help="test images, of all classes")
    given = parser.parse_args(argv)
    for run in given.runs:
        row = compared(Path(run), given.eps, given.examples)
        text = write(row, RESULTS / "strong.json")
        print(f"{row['name']}: {row['strong']['robust']} of {row['examples']} withstand strong, "
              f"{row['official']['robust']} autoattack", flush=True)  # fmt: skip
    print(text)


def compared(run: Path, eps: str | None, examples: int) -> Row:
    """Verdicts and passes of both on the last weights of a run, on the same test images."""
    model, data = load_run(run)
    settings = read_yaml(run / "config.yaml")
    radius = parse_radius(eps or settings["adversary"]["attack"]["init_args"]["eps"])
    x, y = _images(data, examples)
    net = Victim(model, int(y.max()) + 1).eval()
    with frozen(net, "eval"):
        clean = right(net, x, y)
        theirs, mine = official(net, x, y, radius), ours(net, x, y, radius)
    broken = {"official": clean & ~theirs[0], "strong": clean & ~mine[0]}
    return {
        "name": f"{settings['experiment'] or run.parent.name} {run.name}",
        "data": type(data.source).__name__,
        "eps": radius,
        "examples": len(y),
        "clean": int(clean.sum()),
        "official": theirs[1] | {"robust": int(theirs[0].sum())},
        "strong": mine[1] | {"robust": int(mine[0].sum())},
        "broken_by_official_alone": _rows(broken["official"] & ~broken["strong"]),
        "broken_by_strong_alone": _rows(broken["strong"] & ~broken["official"]),
        "seconds": theirs[1]["seconds"] + mine[1]["seconds"],
    }


def _images(data: Any, examples: int) -> tuple[Tensor, Tensor]:
    images, labels = data.source.load("test")
    rows = subset(labels, examples)
    return images[rows].float() / 255.0, labels[rows].long()


def official(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Row]:
    """As the documentation of the package says; verdicts from its images, which are checked.

    Seconds are those of the processor, or of the GPU that the images are on.
    """
    attack = pyautoattack.AutoAttack(
        net, norm="Linf", eps=eps, version="standard", seed=0, device=x.device
    )
    attack.verbose = False
    found: list[Tensor] = []
    with torch.random.fork_rng(), counted(net) as passes:
        seconds = timed(
            lambda: found.append(attack.run_standard_evaluation(x, y, batch_size=250)[0]), x.device
        )[0]
        forward, backward, _ = passes.take()
    (x_adv,) = found
    if (x_adv - x).abs().max() > eps + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise RuntimeError("the official package left the ball")
    return right(net, x_adv, y), {"forward": forward, "backward": backward, "seconds": seconds}


def ours(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    suite: str = "strong",
    engine: AttackEngine | None = None,
) -> tuple[Tensor, Row]:
    """Verdicts and cost of one of our suites, timed as the official package is."""
    found: list[Evaluation] = []

    def run() -> None:
        data = x.cpu(), y.cpu()
        found.append(evaluate(net, data, suite, eps=eps, progress=False, engine=engine))

    seconds = timed(run, x.device)[0]
    costs = found[0].outcomes.costs.values()
    return found[0].robust, {
        "forward": sum(cost.forward for cost in costs),
        "backward": sum(cost.backward for cost in costs),
        "seconds": seconds,
    }


def _rows(broken: Tensor) -> list[int]:
    found: list[int] = broken.nonzero().flatten().tolist()
    return found


def write(row: Row, path: Path) -> str:
    """Put a row beside the others, as JSON and in the README of the benchmarks."""
    whole = read_json(path) if path.is_file() else {"rows": {}}
    whole["rows"][row["name"]] = row
    whole["machine"] = machine("cpu")
    write_json_atomically(path, whole)
    text = rendered(list(whole["rows"].values()))
    write_readme(path.parent.parent / "README.md", text, BEGIN, END)
    return text


def rendered(rows: Sequence[Row]) -> str:
    """One row per network, as Markdown."""
    head = ["network", "data, eps", "images", "clean", "withstand autoattack", "withstand strong",
            "broken by autoattack alone", "broken by strong alone", "passes", "time"]  # fmt: skip
    return "\n".join(table(head, [_cells(row) for row in rows], words=(0, 1)))


def _cells(row: Row) -> list[str]:
    alone = [row[f"broken_by_{name}_alone"] for name in ("official", "strong")]
    return [
        *(row["name"], f"{row['data']}, {row['eps']:.3g}", str(row["examples"]), str(row["clean"])),
        *(str(row[name]["robust"]) for name in ("official", "strong")),
        *(f"{len(one)}: {', '.join(map(str, one))}" if one else "0" for one in alone),
        f"{_passes(row['strong']) / _passes(row['official']):.2f}",
        f"{row['strong']['seconds'] / row['official']['seconds']:.2f}",
    ]


def _passes(found: Mapping[str, Any]) -> int:
    total: int = found["forward"] + found["backward"]
    return total


if __name__ == "__main__":
    main()
