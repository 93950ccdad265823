"""What the installed torch can do, by its version; nothing else asks for one."""

import re
from collections.abc import Mapping
from typing import Any

import torch

TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])

DDP_BUFFERS = "forward_sync_buffers" if TORCH >= (2, 13) else "broadcast_buffers"
"""The argument of DDP that sends the first rank's buffers to all ranks before each forward pass.

The older one, if false, does not send them at the start either: there they are equal, since all
ranks build the network from one seed or one file.
"""

SAVES_SWA = TORCH >= (2, 13)
"""Whether SWALR keeps functions out of its state, so that checkpoints with it can be read."""

FAKES_CUDA = TORCH >= (2, 13)
"""Whether fake tensors on a GPU need no driver."""


def cpu_capabilities() -> Mapping[str, Any]:
    """Instruction sets of the processor by name; empty where torch does not tell."""
    return torch.cpu.get_capabilities() if TORCH >= (2, 13) else {}
