"""``python -m paper_rcm fit|validate|test|predict|reproduce``, ``corruptions`` and ``costs``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["corruptions"]:
        from paper_rcm.corruptions import main as corruptions

        corruptions(sys.argv[2:])
    elif sys.argv[1:2] == ["costs"]:
        from paper_rcm.costs import main as costs

        sys.exit(costs(sys.argv[2:]))
    else:
        from common.cli.main import main

        main(package="paper_rcm")
