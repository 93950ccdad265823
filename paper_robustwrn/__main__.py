"""``python -m paper_robustwrn fit|validate|test|predict|reproduce|convert``."""

from functools import partial

from common.cli.start import main

run = partial(main, package="paper_robustwrn", commands={"convert": "paper_robustwrn.convert"})

if __name__ == "__main__":
    run()
