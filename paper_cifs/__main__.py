"""``python -m paper_cifs fit|validate|test|predict|reproduce``."""

from functools import partial

from common.cli.main import main

run = partial(main, package="paper_cifs")

if __name__ == "__main__":
    run()
