"""``python -m paper_robustwrn fit|validate|test|predict|reproduce``, and ``convert``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        from paper_robustwrn.convert import main as convert

        convert(sys.argv[2:])
    else:
        from common.cli.main import main

        main(package="paper_robustwrn")
