"""What a result was made with: commit, versions, device, weights."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import PROJECT

CODE = (
    *(":(top,glob)common/**/*.py", ":(top,glob)common/**/*.yaml"),
    *(":(top,glob)paper_*/**/*.py", ":(top,glob)paper_*/configs/**"),
    *(":(top,glob)benchmarks/robustness/*.py", ":(top,glob)benchmarks/robustness/configs/**"),
)
"""What decides a number, as git names files; results and texts are not among it."""

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "pyautoattack", "scikit-learn")


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values; the file format has no influence."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_changes(folder: Path = Path(__file__).parent) -> list[str] | None:
    """Files of code and configs that are not as committed, new ones too; ``None`` without git."""
    words = ("status", "--porcelain", "--untracked-files=all", "--no-renames", "--", *CODE)
    status = _git(*words, folder=folder)
    return None if status is None else [line[3:].strip('"') for line in status.splitlines()]


def _git(*arguments: str, folder: Path = Path(__file__).parent) -> str | None:
    try:
        done = subprocess.run(
            # A process that is killed while it holds the lock of the index would leave it behind.
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()


def device_name(device: torch.device | str) -> str:
    """Name of a graphics card, or of a processor and its instruction set: times depend on them."""
    if torch.device(device).type != "cpu":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def is_tracked() -> bool:
    """Whether this code belongs to the git repository around it, as that of a checkout does.

    An environment inside the repository of another project does not.
    """
    return _git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _version() -> str | None:
    try:
        return version(PROJECT)
    except PackageNotFoundError:  # a checkout on the path
        return None


def collect(
    device: torch.device,
    world_size: int,
    precision: str,
    state_dict: Mapping[str, Tensor],
    config_digest: str,
    wall_time_s: float,
    attack_seconds: Mapping[str, float],
    engine: object = None,
) -> dict[str, Any]:
    """Everything about a result that may differ between two runs giving the same numbers."""
    changes = code_changes() if is_tracked() else None
    return {
        "commit": None if changes is None else _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {
            PROJECT: _version(),
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "device": f"{device.type} ({device_name(device)})",
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "precision": precision,
        **({} if engine is None else {"engine": repr(engine)}),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32),
        "checkpoint_digest": weights_digest(state_dict),
        "config_digest": config_digest,
        "wall_time_s": round(wall_time_s, 2),
        "attack_seconds": {key: round(value, 2) for key, value in attack_seconds.items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
