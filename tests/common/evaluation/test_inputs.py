"""Images and labels of every usual form, and what is wrong with them in one line."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from common.data.subset import subset
from common.errors import ConfigurationError
from common.evaluation.inputs import collect

IMAGES = 40


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Images whose smallest and largest pixel are 0 and 1; labels of four classes in order."""
    x = torch.rand(IMAGES, 1, 8, 8)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0
    return x, torch.arange(IMAGES) * 4 // IMAGES


class Stream(IterableDataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


@pytest.mark.parametrize("limit", [None, 30])
def test_data_of_every_form_give_the_same_examples(data, limit) -> None:
    x, y = data
    rows = subset(y, limit)
    whole = TensorDataset(x, y)
    dicts = [{"x": x[:7], "y": y[:7]}, {"x": x[7:], "y": y[7:]}]
    parts = [(x[:3], y[:3]), (x[:0], y[:0]), (x[3:], y[3:])]
    loader = DataLoader(whole, batch_size=7)
    for given in (data, list(data), {"x": x, "y": y}, whole, loader, list(loader), dicts, parts):
        batch = collect(given, limit)
        assert batch["position"].tolist() == rows.tolist()
        assert torch.equal(batch["x"], x[rows])
        assert torch.equal(batch["y"], y[rows])
        assert batch["index"].tolist() == list(range(len(rows)))


def test_a_stream_gives_its_first_examples_and_says_so(data) -> None:
    x, y = data
    for given in (DataLoader(Stream(x, y), batch_size=7), iter(DataLoader(TensorDataset(x, y)))):
        with pytest.warns(UserWarning, match="20 examples taken are the first of a stream.*0, 1;"):
            batch = collect(given, 20)
        assert torch.equal(batch["x"], x[:20])
    with pytest.warns(UserWarning, match="another order every time"):
        collect(DataLoader(TensorDataset(x, y), shuffle=True), 30)


def test_rounding_errors_are_taken_away(data) -> None:
    x, y = data
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1e-8, 1.0000002
    for labels in (y, y.float(), y[:, None]):
        found = collect((x, labels))
        assert 0.0 <= found["x"].min() <= found["x"].max() <= 1.0
        assert torch.equal(found["y"], y)
    assert x.min() < 0.0


class Broken(Dataset):
    """Its third image cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == 2:
            raise OSError("image 2 is truncated")
        return torch.zeros(1, 8, 8), i


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x, y: ((x - 0.5) / 0.2, y), r"look normalised.*Normalize\(mean="),
        (lambda x, y: (2 * x - 1, y), "look normalised"),
        (lambda x, y: (x * 255, y), "look like bytes: divide them by 255"),
        (lambda x, y: ((x * 255).byte(), y), "got torch.uint8; divide bytes by 255"),
        (lambda x, y: (x.to_sparse(), y), "torch.sparse_coo"),
        (lambda x, y: (x.log(), y), "NaN or infinity"),
        (lambda x, y: (x[0], y), r"shape \(N, C, H, W\)"),
        (lambda x, y: (x * 1.3 - 0.1, y), "resampling.*overshoots.*clamp"),
        (lambda x, y: ((x * 255).round().clamp(0, 255) / 254, y), "bytes divided by 254"),
        (lambda x, y: ((x * 65535).round(), y), "16 bits"),
        (lambda x, y: (x - 0.13, y), "resampling.*or a mean was subtracted"),
        (lambda x, y: (x[:, :, :0], y), "none of them empty"),
        (lambda x, y: Broken(), "cannot be read: OSError: image 2 is truncated"),
        (lambda x, y: 3, "cannot be read: TypeError"),
        (lambda x, y: [(x[0], 1), (x[1], 2)], r"got images of the shape \(1, 8, 8\)"),
        (lambda x, y: (x, y, y), "got a Tensor"),
        (lambda x, y: [(x, y), (x[:, :, :4], y)], r"one shape, got \(1, 4, 8\), \(1, 8, 8\)"),
        (lambda x, y: (x, ["0"] * len(x)), "labels must be whole numbers, got"),
        (lambda x, y: (x, None), "labels must be whole numbers, got None"),
        (lambda x, y: (x, y + 0.5), "labels must be whole numbers"),
        (lambda x, y: (x, y - 1), "count from 0, found -1"),
        (lambda x, y: [("image", 3)], "ToTensor"),
        (lambda x, y: [], "no examples"),
        (lambda x, y: {"image": x, "label": y}, "dicts with x and y, got a dict"),
    ],
)
def test_data_that_cannot_be_used_are_named(data, make, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        collect(make(*data))
