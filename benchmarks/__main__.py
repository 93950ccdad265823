"""``python -m benchmarks [SECTION ...] [--full] [--compile] [--device cuda]``.

Writes ``benchmarks/results/<name>.json`` and ``.md``; sections that are not asked for stay as they
were.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import accuracy, evaluation, overheads, report, training


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sections and write them down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    parser.add_argument("sections", nargs="*", choices=[*report.SECTIONS, []], default=[])
    parser.add_argument("--full", action="store_true", help="more rounds, sizes and examples")
    parser.add_argument("--compile", action="store_true", help="compiled candidates as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--examples", type=int, help="of the evaluation")
    parser.add_argument("--name", help="of the files; by default that of the device")
    given = parser.parse_args(argv)
    name = given.name or torch.device(given.device).type
    for section in given.sections or report.SECTIONS:
        found = measured(section, given)
        path = report.write(name, section, found, given.device)
        print(f"{section}: written to {path}", flush=True)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def measured(section: str, given: argparse.Namespace) -> dict[str, Any]:
    """The findings of one section."""
    if section == "training":
        rounds = given.rounds or (9 if given.full else 3)
        return training.compare(given.batch, given.steps, rounds, given.compile, given.device)
    if section == "evaluation":
        examples = given.examples or (400 if given.full else 128)
        return evaluation.compare(examples, given.rounds or (3 if given.full else 1))
    if section == "accuracy":
        return accuracy.compare(seeds=10 if given.full else 5, epochs=12)
    if section == "growth":
        return training.growth(given.full, given.device)
    return overheads.compare(given.full)


if __name__ == "__main__":
    main()
