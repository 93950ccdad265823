"""Writes the published results of papers as one page: ``python -m common.page paper_x``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, output_may_close
from common.page.site import write_page


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.page", description=__doc__)
    parser.add_argument("packages", nargs="+", metavar="package", help="for instance paper_cifs")
    parser.add_argument("--output", type=Path, default=Path("report") / "index.html")
    given = parser.parse_args(argv)
    try:
        write_page(given.output, given.packages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {given.output} ({given.output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
