"""WM: a learned weight per position of a feature map, before a local filter (reconstruction).

Mohammed Amer, Tomás Maul. *Weight Map Layer for Noise and Adversarial Attack Robustness*.
arXiv 1905.00568, v1 May 2019, v2 December 2020.

A Weight Map layer multiplies a feature map by weights that belong to positions and sums or sharpens
the result locally. Its abstract says that two variants make CNNs more robust to noise and to
adversarial attacks at a similar clean accuracy. The method section was not available: this package
is a reconstruction that puts the claims of the abstract to a test, and no table of the paper.
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
