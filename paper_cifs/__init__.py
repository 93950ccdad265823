"""CIFS: Channel-wise Importance-based Feature Selection.

Hanshu Yan, Jingfeng Zhang, Gang Niu, Jiashi Feng, Vincent Y. F. Tan, Masashi Sugiyama. *CIFS:
Improving Adversarial Robustness of CNNs via Channel-wise Importance-based Feature Selection*.
ICML 2021, PMLR 139:11693-11703, arXiv 2102.05311.

Adversarial training leaves channels over-activated that speak against the predicted class. CIFS
lets a small probe network make a raw prediction from the feature, asks how relevant each channel
is to it, and multiplies the channels by a non-negative mask that grows with that relevance.
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
