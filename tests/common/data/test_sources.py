"""Digits, the stratified split, and files in their official formats."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from common.data import downloads
from common.data.sources import (
    CIFAR10,
    CIFAR100,
    MNIST,
    SVHN,
    Digits,
    FashionMNIST,
    TinyImageNet,
    stratified_split,
)
from common.errors import ConfigurationError

ALL = [Digits, CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST, TinyImageNet]
DOWNLOADED = [CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST]


@pytest.mark.parametrize("cls", ALL)
def test_specification_needs_no_file(cls, tmp_path) -> None:
    source = cls() if cls is Digits else cls(root=str(tmp_path / "nothing"))
    spec = source.spec
    assert len(spec.class_names) == len(set(spec.class_names)) == spec.num_classes
    assert len(spec.mean) == len(spec.std) == spec.shape[0]
    assert all(0 < value < 1 for value in spec.mean + spec.std)
    assert not (tmp_path / "nothing").exists()


def test_labels_follow_the_alphabet() -> None:
    assert list(CIFAR100.spec.class_names) == sorted(CIFAR100.spec.class_names)
    assert list(TinyImageNet.spec.class_names) == sorted(TinyImageNet.spec.class_names)


# ------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns() -> None:
    x_train, y_train = Digits().load("train")
    x_test, y_test = Digits().load("test")
    assert (len(x_train), len(x_test)) == (1097, 700)
    assert x_train.dtype == torch.uint8
    assert x_train.shape[1:] == (1, 8, 8)
    original = load_digits()
    expected = Counter(
        (int(label), bytes(round(v * 255 / 16) for v in image.flatten()))
        for image, label in zip(original.images, original.target, strict=True)
    )
    found = Counter(
        (int(label), bytes(image.flatten().tolist()))
        for image, label in zip([*x_train, *x_test], [*y_train, *y_test], strict=True)
    )
    assert found == expected


def test_digits_test_split_is_stratified_and_fixed() -> None:
    x, y = Digits().load("test")
    everything = np.bincount(load_digits().target)
    assert np.abs(y.bincount().numpy() - everything * 700 / 1797).max() < 1
    assert torch.equal(Digits(12).load("test")[1], y)
    # A different split would make all published numbers incomparable.
    assert y[:12].tolist() == [3, 4, 6, 8, 9, 0, 2, 6, 8, 9, 0, 2]
    assert int(x.long().sum()) == 3_462_905


def test_digits_statistics_are_those_of_the_data() -> None:
    x = Digits().load("train")[0].double() / 255
    assert Digits().spec.mean[0] == pytest.approx(x.mean().item(), abs=5e-5)
    assert Digits().spec.std[0] == pytest.approx(x.std(unbiased=False).item(), abs=5e-5)


def test_digits_are_resized_by_the_triangle_filter() -> None:
    x, y = Digits().load("test")
    x = x[:, 0].double()
    large, y_large = Digits(16).load("test")
    assert large.shape == (700, 1, 16, 16)
    assert large.dtype == torch.uint8
    assert Digits(16).spec.shape == (1, 16, 16)
    assert torch.equal(y, y_large)
    # Doubling mixes neighbours 3:1 along each axis, with the border repeated.
    matrix = torch.zeros(16, 8, dtype=torch.float64)
    for i in range(16):
        near = i // 2
        far = min(max(near + (1 if i % 2 else -1), 0), 7)
        matrix[i, near] += 0.75
        matrix[i, far] += 0.25
    exact = matrix @ x @ matrix.T
    assert (large[:, 0].double() - exact).abs().max() <= 0.5 + 1e-6


def test_digits_can_shrink_and_refuse_no_size() -> None:
    assert Digits(4).load("train")[0].shape == (1097, 1, 4, 4)
    with pytest.raises(ConfigurationError, match="got 0"):
        Digits(0)


# ------------------------------------------------------------------------------ stratified split


def test_split_gives_each_class_its_share() -> None:
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    rest, part = stratified_split(y, 10, seed=0)
    assert y[part].bincount().tolist() == [5, 3, 2]
    assert sorted(rest.tolist() + part.tolist()) == list(range(100))
    assert part.tolist() == sorted(part.tolist())
    assert rest.tolist() == sorted(rest.tolist())


@pytest.mark.parametrize("count", [1, 7, 33, 61])
def test_split_has_the_size_asked_for_and_is_proportional(count) -> None:
    y = torch.arange(90) % 7
    rest, part = stratified_split(y, count, seed=3)
    assert len(part) == count
    assert len(rest) == 90 - count
    share = y.bincount() * count / 90
    assert (y[part].bincount(minlength=7) - share).abs().max() < 1


def test_split_depends_on_its_seed_alone() -> None:
    y = torch.arange(200) % 4
    first = stratified_split(y, 40, seed=0)[1]
    torch.manual_seed(99)
    assert torch.equal(stratified_split(y, 40, seed=0)[1], first)
    assert not torch.equal(stratified_split(y, 40, seed=1)[1], first)


def test_split_leaves_out_no_region() -> None:
    y = torch.zeros(10_000, dtype=torch.int64)
    part = stratified_split(y, 1000, seed=0)[1]
    quarters = torch.bincount(part // 2500, minlength=4)
    assert (quarters - 250).abs().max() < 60  # four standard deviations


@pytest.mark.parametrize(("labels", "count"), [([0, 0, 1, 1], 4), ([0, 0, 0, 1], 3), ([0, 1], 9)])
def test_split_refuses_to_empty_a_class(labels, count) -> None:
    with pytest.raises(ConfigurationError, match="hold out fewer"):
        stratified_split(torch.tensor(labels), count, seed=0)


# ---------------------------------------------------------------------- reading official formats


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_pixels_and_order(fake_cifar10, protocol) -> None:
    folder = fake_cifar10 / "cifar-10-batches-py"
    images, labels = [], []
    for i in range(1, 6):
        path = folder / f"data_batch_{i}"
        entry = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(entry, protocol=protocol))
        for row, label in zip(entry["data"], entry["labels"], strict=True):
            images.append([row[c * 1024 : (c + 1) * 1024].reshape(32, 32) for c in range(3)])
            labels.append(label)
    x, y = CIFAR10(root=str(fake_cifar10), verify=False).load("train")
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    assert np.array_equal(x.numpy(), np.array(images))
    assert y.tolist() == labels
    x_test, _ = CIFAR10(root=str(fake_cifar10), verify=False).load("test")
    assert x_test.shape == (20, 3, 32, 32)


def test_cifar10_agrees_with_torchvision(fake_cifar10, monkeypatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    for split in ("train", "test"):
        peer = torchvision.datasets.CIFAR10(fake_cifar10, train=split == "train")
        x, y = CIFAR10(root=str(fake_cifar10)).load(split)
        assert np.array_equal(x.numpy(), peer.data.transpose(0, 3, 1, 2))
        assert y.tolist() == peer.targets


def test_cifar100_uses_fine_labels(fake_cifar100) -> None:
    entry = pickle.loads((fake_cifar100 / "cifar-100-python" / "train").read_bytes())
    x, y = CIFAR100(root=str(fake_cifar100)).load("train")
    assert y.tolist() == entry["fine_labels"]
    assert np.array_equal(x.flatten(1).numpy(), entry["data"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_agrees_with_torchvision(fake_svhn, split) -> None:
    peer = torchvision.datasets.SVHN(fake_svhn, split=split)
    x, y = SVHN(root=str(fake_svhn)).load(split)
    assert np.array_equal(x.numpy(), peer.data)
    assert y.tolist() == peer.labels.tolist()
    assert set(y.tolist()) == set(range(10))  # the file's label 10 is the digit 0


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_agrees_with_torchvision(cls, split, root) -> None:
    x, y = cls(root=str(root)).load(split)
    peer = getattr(torchvision.datasets, cls.__name__)(root, train=split == "train", download=True)
    assert torch.equal(x[:, 0], peer.data)
    assert torch.equal(y, peer.targets)


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_complete_files_need_no_network_and_are_not_touched(cls, root, no_network) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    source = cls(root=str(root))
    source.prepare()
    for split in ("train", "test"):
        x, y = source.load(split)
        assert x.shape[1:] == source.spec.shape
        assert len(x) == len(y)
    assert no_network == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_files_are_hashed_once(fake_cifar10, monkeypatch) -> None:
    hashed, original = [], downloads.md5_of
    monkeypatch.setattr(downloads, "md5_of", lambda path: hashed.append(path) or original(path))
    source = CIFAR10(root=str(fake_cifar10))
    source.prepare()
    source.load("train")
    source.load("test")
    assert len(hashed) == 6


def test_relative_root_is_kept_when_the_process_moves(fake_cifar10, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(fake_cifar10.parent)
    source = CIFAR10(root="data")
    monkeypatch.chdir(Path("/"))
    assert len(source.load("test")[0]) == 20
