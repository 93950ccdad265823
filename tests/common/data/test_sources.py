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
    if cls in (CIFAR100, TinyImageNet):
        assert list(spec.class_names) == sorted(spec.class_names)
    assert not (tmp_path / "nothing").exists()


# ------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns() -> None:
    x_train, y_train = Digits().load("train")
    x_test, y_test = Digits().load("test")
    assert (len(x_train), len(x_test)) == (1097, 700)
    assert x_train.dtype == torch.uint8
    assert x_train.shape[1:] == (1, 8, 8)
    original = load_digits()
    expected = Counter(
        (int(label), np.round(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(original.images, original.target, strict=True)
    )
    found = Counter(
        (int(label), image.numpy().tobytes())
        for image, label in zip([*x_train, *x_test], [*y_train, *y_test], strict=True)
    )
    assert found == expected
    pixels = x_train.double() / 255
    assert Digits().spec.mean[0] == pytest.approx(pixels.mean().item(), abs=5e-5)
    assert Digits().spec.std[0] == pytest.approx(pixels.std(unbiased=False).item(), abs=5e-5)


def test_digits_test_split_is_stratified_and_fixed() -> None:
    x, y = Digits().load("test")
    everything = np.bincount(load_digits().target)
    assert np.abs(y.bincount().numpy() - everything * 700 / 1797).max() < 1
    assert torch.equal(Digits(12).load("test")[1], y)
    # A different split would make all published numbers incomparable.
    assert y[:12].tolist() == [3, 4, 6, 8, 9, 0, 2, 6, 8, 9, 0, 2]
    assert int(x.long().sum()) == 3_462_905


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


@pytest.mark.parametrize("count", [1, 7, 33, 61])
def test_split_has_the_size_asked_for_and_is_proportional(count) -> None:
    y = torch.arange(90) % 7
    rest, part = stratified_split(y, count, seed=3)
    assert len(part) == count
    assert sorted(rest.tolist() + part.tolist()) == list(range(90))
    assert torch.equal(part, part.sort().values)
    assert torch.equal(rest, rest.sort().values)
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


@pytest.mark.parametrize("cls", DOWNLOADED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_agrees_with_torchvision(cls, split, root, monkeypatch) -> None:
    reader, is_train = getattr(torchvision.datasets, cls.__name__), split == "train"
    if cls in (CIFAR10, CIFAR100):
        monkeypatch.setattr(reader, "_load_meta", lambda self: None)
        peer = reader(root, train=is_train)
        pixels, labels = peer.data.transpose(0, 3, 1, 2), peer.targets
    elif cls is SVHN:
        peer = reader(root, split=split)
        pixels, labels = peer.data, peer.labels
    else:
        peer = reader(root, train=is_train, download=True)
        pixels, labels = peer.data[:, None], peer.targets
    x, y = cls(root=str(root)).load(split)
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert x.shape[1:] == cls.spec.shape
    assert np.array_equal(x, pixels)
    assert np.array_equal(y, labels)
    assert set(y.tolist()) == set(range(cls.spec.num_classes))  # SVHN's file calls the digit 0 10


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_any_protocol_with_keys_as_text_or_bytes(fake_cifar10, protocol) -> None:
    expected = CIFAR10(root=str(fake_cifar10)).load("test")[0]
    path = fake_cifar10 / "cifar-10-batches-py" / "test_batch"
    entry = pickle.loads(path.read_bytes())
    if protocol == 5:
        entry = {key.encode(): value for key, value in entry.items()}
    path.write_bytes(pickle.dumps(entry, protocol=protocol))
    assert torch.equal(CIFAR10(root=str(fake_cifar10), verify=False).load("test")[0], expected)


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_complete_files_need_no_network_and_are_not_touched(cls, root, no_network) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    source = cls(root=str(root))
    source.prepare()
    source.load("train")
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
