"""What figures of a GPU belong to."""

from typing import Any

import torch

from benchmarks.report import machine


def described(device: str) -> dict[str, Any]:
    """The processor and versions, and of a GPU its memory and libraries."""
    found = machine(device)
    if device != "cuda":
        return found
    about = torch.cuda.get_device_properties(0)
    return found | {
        "memory_gb": round(about.total_memory / 1e9, 1),
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
