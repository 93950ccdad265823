"""``python -m paper_cifs fit|validate|test|predict|reproduce``."""

from functools import partial

from common.cli.start import main

run = partial(main, package="paper_cifs")

if __name__ == "__main__":
    run()
