"""``python -m benchmarks.robustness fit|validate|test|predict|reproduce``."""

from functools import partial

from common.cli.start import main

run = partial(main, package="benchmarks.robustness")

if __name__ == "__main__":
    run()
