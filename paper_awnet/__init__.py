"""AW-Net: filters that are rescaled for every image, by a router that looks at it.

Xingxing Wei, Shiji Zhao, Bo Li. *Revisiting the Trade-off between Accuracy and Robustness via
Weight Distribution of Filters*. IEEE Transactions on Pattern Analysis and Machine Intelligence,
2024, doi 10.1109/TPAMI.2024.3411035, arXiv 2306.03430.

A standard and a robust network have differently distributed filters, so one set of weights cannot
serve clean and adversarial images at once. A side network gives each image its own scale of every
filter, and its own mixture of two batch-norms.
"""

import sys

try:
    from common import PROJECT  # noqa: F401
except ImportError as error:  # it names the file that was found instead
    line = (
        f"another common hides the one that {__name__} needs ({error}); rename it, run from "
        f"another folder, or use the command {__name__.replace('_', '-')}"
    )
    if sys.argv[:1] == ["-m"]:
        sys.exit(f"error: {line}")
    raise ImportError(line) from None
