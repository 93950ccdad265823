"""``python -m benchmarks [SECTION ...] [--full] [--compile] [--device cuda]``.

Writes ``benchmarks/results/<name>.json`` and ``.md``, again whenever a section has found more;
sections that are not asked for stay as they were. Without a section it measures all that the given
options are for.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import accuracy, evaluation, overheads, report, training
from benchmarks.arguments import positive, usable
from benchmarks.timing import Keep
from common.errors import ConfigurationError, UserError

OPTIONS: dict[str, tuple[str, ...]] = {
    "training": ("compile", "device", "batch", "steps", "rounds"),
    "evaluation": ("rounds", "examples"),
    "accuracy": (),
    "overheads": (),
    "growth": ("device",),
}
"""The sections, and what can be said of each beside ``--full`` and ``--name``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the sections and write them down; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(OPTIONS))
    parser.add_argument(
        "--full", action="store_true", help="more rounds, sizes, examples, compiled too"
    )
    parser.add_argument("--compile", action="store_true", help="compiled candidates as well")
    parser.add_argument("--device", type=usable, help="by default cpu")
    parser.add_argument("--batch", type=positive, help="by default 32")
    parser.add_argument("--steps", type=positive, help="of the attack, by default 10")
    parser.add_argument("--rounds", type=positive)
    parser.add_argument("--examples", type=positive, help="of the evaluation")
    parser.add_argument("--name", help="of the files; by default that of the device")
    given = parser.parse_args(argv)
    try:
        sections = chosen(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = given.device or "cpu"
    name = given.name or torch.device(device).type
    for number, section in enumerate(sections, 1):
        print(f"{number} of {len(sections)}: {section}", flush=True)
        measure(section, given, device, partial(report.write, name, section, device))
    print((report.RESULTS / f"{name}.md").read_text(encoding="utf-8"))
    return 0


def chosen(given: argparse.Namespace) -> list[str]:
    """The sections to measure.

    Raises:
        ConfigurationError: If there is no such section, or an option is for another one.
    """
    names = {option for options in OPTIONS.values() for option in options}
    said = {name for name in names if getattr(given, name)}
    sections: list[str] = given.sections or [
        section for section, options in OPTIONS.items() if said.issubset(options)
    ]
    if unknown := [section for section in sections if section not in OPTIONS]:
        raise ConfigurationError(
            f"there is no section {unknown[0]!r}; the sections are {', '.join(OPTIONS)}"
        )
    if not sections:
        raise ConfigurationError(
            f"no section takes {' and '.join(f'--{name}' for name in sorted(said))} together"
        )
    for section in sections:
        for option in sorted(said.difference(OPTIONS[section])):
            raise ConfigurationError(
                f"{section} takes no --{option}; leave it out, or measure "
                f"{' or '.join(s for s, options in OPTIONS.items() if option in options)}"
            )
    return sections


def measure(section: str, given: argparse.Namespace, device: str, keep: Keep) -> None:
    """Measure a section; ``keep`` gets its findings so far whenever there are more."""
    if section == "training":
        rounds = given.rounds or (9 if given.full else 3)
        batch, steps = given.batch or 32, given.steps or 10
        training.compare(batch, steps, rounds, given.compile or given.full, device, keep)
    elif section == "evaluation":
        examples = given.examples or (400 if given.full else 128)
        evaluation.compare(examples, given.rounds or (3 if given.full else 1), keep)
    elif section == "accuracy":
        accuracy.compare(10 if given.full else 5, 12, keep)
    elif section == "growth":
        training.growth(given.full, device, keep)
    else:
        overheads.compare(given.full, keep)


if __name__ == "__main__":
    sys.exit(main())
