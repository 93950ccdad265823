"""``python -m paper_awnet fit|validate|test|predict|reproduce``."""

from common.cli.main import main

if __name__ == "__main__":
    main(package="paper_awnet")
