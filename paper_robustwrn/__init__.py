"""Robust WRN: where a wide residual network should keep its capacity.

Hanxun Huang, Yisen Wang, Sarah Erfani, Quanquan Gu, James Bailey, Xingjun Ma. *Exploring
Architectural Ingredients of Adversarially Robust Deep Neural Networks*. NeurIPS 2021 (Advances 34,
pp. 5545-5559), arXiv 2110.03825.

More parameters do not by themselves make an adversarially trained network more robust. Taking
width or depth from the last stage and keeping it in the early ones does: at one budget of
parameters there is a best distribution over the stages, and WRN-34-R is what it gives.
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
