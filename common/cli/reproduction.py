"""The tables of rows that have been made, and what differs from the published results.

``python -m common.cli.reproduction paper_cifs --on digits --seeds "0 1 2"`` prints them and writes
``runs/paper_cifs/tables.md``.
"""

import shlex
import sys
from collections.abc import Sequence

from common.cli.rows import Row, parser_of, results_folder, rows_of, split_options
from common.errors import UserError, output_may_close
from common.files import write_text_atomically
from common.packages import package_folder
from common.results.markdown import Sheet
from common.results.published import SAME, difference
from common.results.selection import parse_seeds
from common.results.store import read_result
from common.results.tables import print_tables, render_table


def beside_published(rows: Sequence[Row]) -> dict[Row, str]:
    """What differs from the published result of each row that has been made."""
    return {row: _difference(row) for row in rows if row.result.is_file()}


def _difference(row: Row) -> str:
    published = package_folder(row.package) / "results" / row.result.name
    if not published.is_file():
        return "not published"
    return difference(read_result(row.result), read_result(published))


def document(package: str, title: str, tables: str, found: dict[Row, str]) -> str:
    """The tables as a Markdown file of their own, with the figures that lie beside it."""
    lines = [[row.stem, str(row.seed), text] for row, text in found.items()]
    sheet = Sheet("Beside the published results", header=["row", "seed", "difference"], lines=lines)
    figures = [
        f"![{path.stem}](results/figures/{path.name})"
        for path in sorted((results_folder(package) / "figures").glob("*.png"))
    ]
    parts = [f"# {package}", title, *([sheet.to_markdown()] if lines else []), tables, *figures]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the tables; returns the exit status."""
    words, options = split_options(argv)
    given = parser_of("common.cli.reproduction", __doc__).parse_args(words)
    try:
        seeds = parse_seeds(given.seeds)
        rows = rows_of(given.package, given.on, seeds, options)
        stems = " ".join(dict.fromkeys(row.stem for row in rows))
        folder = results_folder(given.package)
        report = render_table(given.package, stems, seeds, folder=folder)
        found = beside_published(rows)
        title = f"ON={given.on!r} SEEDS={given.seeds!r} ARGS={shlex.join(options)!r}"
        path = folder.parent / "tables.md"
        write_text_atomically(path, document(given.package, title, report.markdown, found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    others = {row: text for row, text in found.items() if text != SAME}
    print_tables(report.compact or [f"{given.package}: no row has been run"])
    print(f"{len(found) - len(others)} of {len(found)} rows are the {SAME} as the published ones")
    for row, text in others.items():
        print(f"  {row}: {text}")
    if unmade := [str(row) for row in rows if row not in found]:
        print(f"not made: {', '.join(unmade)}")
    print(f"all tables: {path}; figures: {folder / 'figures'}")
    return 0


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
