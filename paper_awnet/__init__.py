"""AW-Net: filters that are rescaled for every image, by a router that looks at it.

Xingxing Wei, Shiji Zhao, Bo Li. *Revisiting the Trade-off between Accuracy and Robustness via
Weight Distribution of Filters*. IEEE Transactions on Pattern Analysis and Machine Intelligence,
2024, doi 10.1109/TPAMI.2024.3411035, arXiv 2306.03430.

A standard and a robust network have differently distributed filters, so one set of weights cannot
serve clean and adversarial images at once. A side network gives each image its own scale of every
filter, and its own mixture of two batch-norms.
"""
