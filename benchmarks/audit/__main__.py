"""``python -m benchmarks.audit``: measures the zoo and writes the table.

Writes ``benchmarks/results/audit.json`` and the table in ``benchmarks/README.md``; rows that are
not asked for stay as they were.
"""

import argparse
from collections.abc import Sequence

from benchmarks.audit.measure import measured
from benchmarks.audit.table import write
from benchmarks.audit.zoo import ZOO
from benchmarks.report import RESULTS, machine


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the networks one by one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=100)
    every = {case.name: case for case in ZOO}
    parser.add_argument("--only", nargs="+", choices=every, metavar="NAME", default=[*every])
    given = parser.parse_args(argv)
    cases = [every[name] for name in given.only]
    for case in cases:
        row = measured(case, given.examples)
        print(f"{case.name}: {', '.join(row['failed']) or 'not flagged'}", flush=True)
        text = write(row, given.examples, machine("cpu"), RESULTS / "audit.json")
    print(text)


if __name__ == "__main__":
    main()
