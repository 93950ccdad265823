"""Images that are read by rows: the same numbers as in memory, in bounded memory."""

import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, evaluate, images
from common.evaluation.images import Images, digest_of
from common.evaluation.inputs import collect

SUITE = {"pgd": SuiteEntry(PGD(0.03, steps=2))}


class Generated(Dataset):
    """Images that depend on their position alone; in bytes or not."""

    def __init__(self, n: int, shape: tuple[int, ...], in_bytes: bool = False) -> None:
        self.n, self.shape, self.in_bytes = n, shape, in_bytes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.rand(self.shape, generator=torch.Generator().manual_seed(i))
        return (x.mul(255).byte().float().div(255) if self.in_bytes else x), i % 4


class Stream(IterableDataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


class Augmented(Generated):
    """Draws random numbers."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(i)
        return (x + 0.01 * torch.rand(())).clamp(0, 1), y


class Changing(Generated):
    """Its last image is another one from some moment on."""

    is_changed = False

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(i)
        return (1 - x if self.is_changed and i == self.n - 1 else x), y


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(16, 4)).eval()  # fmt: skip


@pytest.mark.parametrize("in_bytes", [True, False])
@pytest.mark.filterwarnings("ignore:.*about chance")
def test_every_storage_gives_the_same_outcomes(monkeypatch, tmp_path, in_bytes: bool) -> None:
    data = Generated(150, (3, 16, 16), in_bytes)
    x = torch.stack([data[i][0] for i in range(len(data))])
    y = torch.arange(150) % 4
    expected = evaluate(network(), (x, y), SUITE, eps=0.03, progress=False, examples=100)
    monkeypatch.setattr(images, "IN_MEMORY", x[:70].numel() * 4)
    for given in (data, DataLoader(data, batch_size=13), Stream(data)):
        limit = None if isinstance(given, Stream) else 100
        kept = collect(given, limit)
        assert isinstance(kept["x"], Images)
        assert torch.equal(kept["x"][:], x[kept["position"]])
        assert digest_of(kept["x"]) == digest_of(x[kept["position"]])
        if limit:
            model, state = network(), torch.get_rng_state()
            found = evaluate(model, given, SUITE, eps=0.03, progress=False, examples=limit)
            assert torch.equal(torch.get_rng_state(), state)
            assert found.metrics == expected.metrics
            assert torch.equal(found.robust, expected.robust)


def test_images_that_are_others_at_every_reading(monkeypatch) -> None:
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    kept = collect(Augmented(20, (3, 8, 8)))["x"]
    assert torch.equal(kept[:], kept[:])
    data = Changing(20, (3, 8, 8))
    kept = collect(data)["x"]
    data.is_changed = True
    assert len(kept[:19]) == 19
    with pytest.raises(ConfigurationError, match="image 19 "):
        kept[torch.tensor([0, 19])]


def _peak_memory() -> int:
    """Bytes of memory of this process at most since the last reset."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through /proc")
@pytest.mark.parametrize(
    ("n", "form"),
    [
        (200, "saved"),
        pytest.param(200, "loader", marks=pytest.mark.slow),
        pytest.param(3000, "set", marks=pytest.mark.slow),
        pytest.param(3000, "loader", marks=pytest.mark.slow),
        pytest.param(3000, "saved", marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(monkeypatch, tmp_path, n: int, form: str) -> None:
    # glibc gives freed memory back at once: by default the peak varies by two batches of images.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        small, large = alone.submit(_peaks, n, form, tmp_path).result()
    # At most half of what the further images would take; other memory varies by less.
    assert large - small < min(80e6, (n - 32) * 3 * 224 * 224 * 4 / 2)


def _peaks(n: int, form: str, folder: Path) -> tuple[int, int]:
    """Peaks with 32 and with n images, in a process whose earlier memory is not that of tests."""
    images.IN_MEMORY = 2**22
    suite = {"fgsm": SuiteEntry(PGD(0.03, step_size=0.03, steps=1, start="zero"))}
    model = network()

    def peak(n: int) -> int:
        images._give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")
        data = Generated(n, (3, 224, 224))
        given = DataLoader(data, batch_size=32) if form == "loader" else data
        saving = {"output": folder / str(n), "save_examples": True} if form == "saved" else {}
        evaluate(model, given, suite, eps=0.03, batch_size=32, progress=False, **saving)
        return _peak_memory()

    peak(4)  # imports what is imported late
    return peak(32), peak(n)
