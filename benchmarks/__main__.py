"""``python -m benchmarks [SECTION ...] [--full] [--compile] [--device cuda]``.

Writes ``benchmarks/results/<name>.json`` and ``.md``, again whenever a section has found more;
sections that are not asked for stay as they were.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import accuracy, evaluation, overheads, report, training
from benchmarks.timing import Keep


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
    sections = given.sections or list(report.SECTIONS)
    for number, section in enumerate(sections, 1):
        print(f"{number} of {len(sections)}: {section}", flush=True)
        measure(section, given, partial(report.write, name, section, given.device))
    print((report.RESULTS / f"{name}.md").read_text(encoding="utf-8"))


def measure(section: str, given: argparse.Namespace, keep: Keep) -> None:
    """Measure a section; ``keep`` gets its findings so far whenever there are more."""
    if section == "training":
        rounds = given.rounds or (9 if given.full else 3)
        training.compare(given.batch, given.steps, rounds, given.compile, given.device, keep)
    elif section == "evaluation":
        examples = given.examples or (400 if given.full else 128)
        evaluation.compare(examples, given.rounds or (3 if given.full else 1), keep)
    elif section == "accuracy":
        accuracy.compare(10 if given.full else 5, 12, keep)
    elif section == "growth":
        training.growth(given.full, given.device, keep)
    else:
        overheads.compare(given.full, keep)


if __name__ == "__main__":
    main()
