"""``python -m paper_awnet fit|validate|test|predict|reproduce``."""

from functools import partial

from common.cli.start import main

run = partial(main, package="paper_awnet")

if __name__ == "__main__":
    run()
