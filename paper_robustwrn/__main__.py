"""``python -m paper_robustwrn fit|validate|test|predict|reproduce|convert``."""

from common.cli.main import main

if __name__ == "__main__":
    main(package="paper_robustwrn", commands={"convert": "paper_robustwrn.convert"})
