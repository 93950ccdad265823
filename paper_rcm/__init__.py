"""RCM: adversarial robustness from the feature maps of convolutional layers.

Cong Xu, Wei Zhang, Jun Wang, Min Yang. *Understanding Adversarial Robustness from Feature Maps of
Convolutional Layers*. IEEE Transactions on Neural Networks and Learning Systems 36(3):4690-4702,
2025, doi 10.1109/TNNLS.2024.3360463, arXiv 2202.12435.

The larger a feature map before average pooling, the less its pooled feature moves under a
perturbation; before max pooling it is the other way round. So up-sampling the input, or striding
later, makes an existing network both more accurate and more robust, with no new parameter.
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
