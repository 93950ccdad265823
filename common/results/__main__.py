"""What result files say together.

``python -m common.results compare a.json b.json`` compares them image by image; ``python -m
common.results costs FOLDER`` sets costs of training beside accuracies.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, UserError, output_may_close
from common.results.costs import cost_sheets
from common.results.markdown import one_line
from common.results.outcomes import is_audit, worst_over
from common.results.paired import Named, Paired, obstacle, paired
from common.results.statistics import holm
from common.results.store import read_result
from common.results.tables import print_tables

COMPARE = (
    "Compare result files image by image, each with the first: the difference in points, the exact "
    "McNemar test, and which images only one gets right. The files are those of papers and those "
    "that an evaluation writes. They are refused if threat model, images or suite differ."
)

COSTS = (
    "Print what training took (seconds per epoch, peak memory) beside clean, PGD-20, AutoAttack "
    "and worst-case accuracy, for every experiment of a folder of results, as Markdown."
)


def compare(
    paths: Sequence[str], metrics: Sequence[str] = (), checkpoint: str | None = None
) -> list[Table | str]:
    """Tables and lines of the first result file beside each of the others.

    Args:
        paths: At least two result files.
        metrics: Only these; by default all that every file has, but for those that repeat another
            one of their entry, such as the union of a single loss.
        checkpoint: Of every file; by default ``last``, or the only one.

    Raises:
        ConfigurationError: If a file is no result or is given twice, or they cannot be compared.
    """
    if len(paths) < 2:
        raise ConfigurationError(f"there is only {paths[0]}; give at least two result files")
    resolved = [Path(path).resolve() for path in paths]
    if twice := next((path for path in paths if resolved.count(Path(path).resolve()) > 1), None):
        raise ConfigurationError(f"{twice} is given twice; a file says nothing beside itself")
    first, *others = (_read(path, checkpoint) for path in paths)
    for other in others:
        if reason := obstacle(first, other, metrics):
            raise ConfigurationError(f"cannot compare: {one_line(reason)}")
    found = _shown([paired(first.entry, other.entry) for other in others], metrics)
    if unpaired := [name for name in metrics if not all(name in pairs for pairs in found)]:
        raise ConfigurationError(
            f"{', '.join(unpaired)} has no outcome per image: it is the lowest of several "
            "accuracies or a mean; compare one of its losses, or its union if it has one"
        )
    parts: list[Table | str] = []
    for i, (other, pairs) in enumerate(zip(others, found, strict=True)):
        adjusted = {
            name: holm([one[name].p for one in found])[i] for name in pairs if len(found) > 1
        }
        parts += _beside(first, other, pairs, adjusted)
    return parts


def _read(path: str, label: str | None) -> Named:
    result = read_result(path)
    known = list(result["checkpoints"])
    label = label or ("last" if "last" in known else known[0] if len(known) == 1 else "")
    if label not in known:
        raise ConfigurationError(
            f"{path} has the checkpoints {one_line(', '.join(known))}; choose one with --checkpoint"
        )
    data = result["provenance"][label].get("data_digest")
    return Named(path, result["checkpoints"][label], data)


def _shown(
    found: Sequence[Mapping[str, Paired]], metrics: Sequence[str]
) -> list[dict[str, Paired]]:
    """The metrics asked for; by default those of the suite that repeat no other in all pairs."""
    names = [name for name in found[0] if all(name in pairs for pairs in found)]
    if metrics:
        kept = [name for name in names if name in metrics]
    else:
        kept = []
        for name in names:
            entry = name.partition("/")[0].removesuffix("_union")
            beside = [other for other in kept if other.partition("/")[0] == entry]
            is_repeated = any(all(one[k] == one[name] for one in found) for k in beside)
            if not (is_audit(name) or name.endswith("_clean") or is_repeated):
                kept.append(name)
    return [{name: pairs[name] for name in kept} for pairs in found]


def _beside(
    first: Named, second: Named, pairs: Mapping[str, Paired], adjusted: Mapping[str, float]
) -> list[Table | str]:
    """What is printed about two files."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("metric", overflow="fold")
    titles = ["images", "A %", "B %", "A - B", "only A / B", "p"]
    for title in titles + ["Holm"] * bool(adjusted):
        table.add_column(title, justify="right", no_wrap=True)
    for name, pair in pairs.items():
        numbers = [f"{100 * pair.first:.2f}", f"{100 * pair.second:.2f}", f"{pair.difference:+.2f}"]
        counts = f"{len(pair.only_first)} / {len(pair.only_second)}"
        p_values = [f"{p:.2g}" for p in (pair.p, adjusted.get(name)) if p is not None]
        table.add_row(Text(one_line(name)), str(pair.size), *numbers, counts, *p_values)
    return [f"A: {first.name}\nB: {second.name}", table, *_notes(first, second, pairs)]


def _notes(first: Named, second: Named, pairs: Mapping[str, Paired]) -> Iterator[str]:
    """Attacks that only one had, and the images that only one gets right."""
    attacks = [set(worst_over(one.entry["clean"], one.entry["attacks"])) for one in (first, second)]
    for letter, more in (("A", attacks[0] - attacks[1]), ("B", attacks[1] - attacks[0])):
        if "worst" in pairs and more:
            yield f"The worst case of {letter} is also over {one_line(', '.join(sorted(more)))}"
    for name, pair in pairs.items():
        if name == "worst" or "worst" not in pairs:
            for letter, only in (("A", pair.only_first), ("B", pair.only_second)):
                images = ", ".join(map(str, only)) or "none"
                yield f"{one_line(name)}, images that only {letter} gets right: {images}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the subcommand finds; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.results", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{compare,costs}")
    command = commands.add_parser("compare", help="result files", description=COMPARE)
    command.add_argument("files", nargs="+", metavar="file.json", help="at least two")
    command.add_argument("--metric", action="append", default=[], metavar="NAME", help="only this")
    command.add_argument("--checkpoint", help="of every file; by default last, or the only one")
    command.set_defaults(
        run=lambda given: print_tables(compare(given.files, given.metric, given.checkpoint))
    )
    command = commands.add_parser("costs", help="a folder of results", description=COSTS)
    command.add_argument("folder", help="for instance paper_cifs/results")
    command.add_argument("--checkpoint", default="last", help="last or selected; by default last")
    command.set_defaults(
        run=lambda given: print(
            *(sheet.to_markdown() for sheet in cost_sheets(given.folder, given.checkpoint)),
            sep="\n\n",
        )
    )
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
