"""``python -m paper_rcm fit|validate|test|predict|reproduce|corruptions|costs``."""

from functools import partial

from common.cli.start import main

commands = {"corruptions": "paper_rcm.corruptions", "costs": "paper_rcm.costs"}
run = partial(main, package="paper_rcm", commands=commands)

if __name__ == "__main__":
    run()
