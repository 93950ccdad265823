"""``python -m paper_rcm fit|validate|test|predict|reproduce|corruptions|costs``."""

from common.cli.main import main

if __name__ == "__main__":
    commands = {"corruptions": "paper_rcm.corruptions", "costs": "paper_rcm.costs"}
    main(package="paper_rcm", commands=commands)
