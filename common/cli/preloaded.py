"""What every row imports and reads: once, before rows are forked.

There is no code of papers and users here: it could use a GPU as it is imported, and no row could
after that.
"""
# ruff: noqa: F401

import matplotlib.backends.backend_agg
import sklearn.datasets
import torch.utils.tensorboard

import common.analysis.report
import common.cli.main
import common.networks.resnet
from common.cli.draft import check, drafted
from common.packages import CONFIGS

# Reads from their source what the classes of every row take, which is kept.
check(drafted([CONFIGS / "base.yaml"], []))
