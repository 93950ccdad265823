"""``python -m benchmarks.audit``: measures the zoo and writes the table.

Writes ``benchmarks/results/audit.json`` after every network, and the table in
``benchmarks/audit/README.md``; rows that are not asked for stay as they were.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.audit.measure import measured
from benchmarks.audit.table import rendered
from benchmarks.audit.zoo import ZOO
from benchmarks.report import RESULTS, write_blocks, write_row

README = Path(__file__).with_name("README.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the networks one by one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=100)
    every = {case.name: case for case in ZOO}
    parser.add_argument("--only", nargs="+", choices=every, metavar="NAME", default=[*every])
    given = parser.parse_args(argv)
    for number, name in enumerate(given.only, 1):
        row = measured(every[name], given.examples)
        failed = ", ".join(row["failed"]) or "not flagged"
        print(f"{number} of {len(given.only)}: {name}: {failed}", flush=True)
        rows = write_row(RESULTS / "audit.json", row)
        write_blocks(README, {"audit": rendered(rows)})


if __name__ == "__main__":
    main()
