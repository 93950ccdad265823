"""``python -m paper_wm fit|validate|test|predict|reproduce``."""

from common.cli.main import main

if __name__ == "__main__":
    main(package="paper_wm")
