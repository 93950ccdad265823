import gzip
import os
import pickle
import shutil
import socket
import struct
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from common import files
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
from common.errors import ConfigurationError, DataUnavailableError

ALL = [Digits, CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST, TinyImageNet]
DOWNLOADED = [CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST]
FAKES = {
    CIFAR10: "fake_cifar10",
    CIFAR100: "fake_cifar100",
    SVHN: "fake_svhn",
    MNIST: "fake_mnist",
    FashionMNIST: "fake_fashion_mnist",
}


def error_of(call: Callable[[], object]) -> str:
    """The message of the DataUnavailableError that the call raises: always a single line."""
    with pytest.raises(DataUnavailableError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
def test_mnist_agrees_with_torchvision(cls, split, request) -> None:
    root = request.getfixturevalue(FAKES[cls])
    x, y = cls(root=str(root)).load(split)
    peer = getattr(torchvision.datasets, cls.__name__)(root, train=split == "train", download=True)
    assert torch.equal(x[:, 0], peer.data)
    assert torch.equal(y, peer.targets)


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_complete_files_need_no_network_and_are_not_touched(cls, request, no_network) -> None:
    root = request.getfixturevalue(FAKES[cls])
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


# ------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_without_files_and_network_one_line_says_what_to_do(cls, tmp_path, no_network) -> None:
    root = tmp_path / "data"
    message = error_of(cls(root=str(root)).prepare)
    assert no_network  # it did try
    assert cls.spec.name in message
    assert str(root) in message
    assert "connect to a network" in message
    assert all(name in message for name in cls.archives)
    assert not [path for path in root.iterdir() if path.name != ".download.lock"]


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_without_files_and_download(cls, tmp_path, no_network) -> None:
    source = cls(root=str(tmp_path), download=False)
    for call in (source.prepare, lambda: source.load("train")):
        message = error_of(call)
        assert "--data.source.download true" in message
        assert str(tmp_path) in message
    assert no_network == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_altered_file_is_named_with_both_remedies(cls, request, no_network) -> None:
    root = request.getfixturevalue(FAKES[cls])
    path = sorted(p for p in root.rglob("*") if p.is_file())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for call in (cls(root=str(root)).prepare, lambda: cls(root=str(root)).load("train")):
        message = error_of(call)
        assert str(path) in message
        assert "--data.source.verify false" in message
        assert "delete it" in message
    assert path.read_bytes() == content
    assert no_network == []


@pytest.mark.parametrize("cls", DOWNLOADED)
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_files_are_refused_even_unverified(cls, verify, request) -> None:
    root = request.getfixturevalue(FAKES[cls])
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = cls(root=str(root), verify=verify)
    message = error_of(lambda: source.load("train"))
    assert ("cannot be read" in message) == (not verify)
    assert str(root) in message


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_one_missing_file_of_an_own_set_is_not_mixed_with_official_ones(
    cls, request, no_network
) -> None:
    root = request.getfixturevalue(FAKES[cls])
    path = sorted(p for p in root.rglob("*") if p.is_file())[-1]
    path.unlink()
    message = error_of(cls(root=str(root), verify=False).prepare)
    assert path.name in message
    assert no_network == []


def test_own_subset_is_refused_with_the_flag_and_read_with_it(tmp_path, write_cifar10) -> None:
    root = write_cifar10(tmp_path / "data", per_batch=7)
    assert "--data.source.verify false" in error_of(CIFAR10(root=str(root)).prepare)
    source = CIFAR10(root=str(root), verify=False)
    source.prepare()
    assert len(source.load("train")[0]) == 35
    assert len(source.load("test")[0]) == 7


def rewrite(root: Path, **changes: object) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [10] * 20}, "expected 0 to 9"),
        ({"labels": [-1] * 20}, "expected 0 to 9"),
        ({"labels": [1] * 19}, "99 labels"),
        ({"data": np.zeros((20, 3072), dtype=np.float32)}, "expected uint8"),
        ({"data": np.zeros((20, 100), dtype=np.uint8)}, "cannot be read"),
    ],
)
def test_content_that_does_not_fit_is_refused(fake_cifar10, changes, reason) -> None:
    rewrite(fake_cifar10, **changes)
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert reason in error_of(lambda: source.load("train"))


def test_keys_as_bytes_are_understood(fake_cifar10) -> None:
    expected = CIFAR10(root=str(fake_cifar10)).load("train")
    path = fake_cifar10 / "cifar-10-batches-py" / "data_batch_1"
    entry = {k.encode(): v for k, v in pickle.loads(path.read_bytes()).items()}
    path.write_bytes(pickle.dumps(entry))
    found = CIFAR10(root=str(fake_cifar10), verify=False).load("train")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import builtins; builtins.harm_was_done = True",)


def test_pickles_cannot_run_code(fake_cifar10) -> None:
    rewrite(fake_cifar10, filenames=Harmful())
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert "exec has no place" in error_of(lambda: source.load("train"))
    import builtins

    assert not hasattr(builtins, "harm_was_done")


def test_idx_file_of_another_type_is_refused(fake_mnist) -> None:
    path = fake_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + b"\0" * 4))
    source = MNIST(root=str(fake_mnist), verify=False)
    assert "no IDX file of bytes" in error_of(lambda: source.load("train"))


def test_folder_that_cannot_be_made_is_an_error_of_the_data(tmp_path, no_network) -> None:
    (tmp_path / "data").write_text("a file is in the way")
    assert str(tmp_path / "data") in error_of(CIFAR10(root=str(tmp_path / "data")).prepare)


# ------------------------------------------------------------------------------------- download


@pytest.fixture
def archived_cifar10(
    fake_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """An archive that passes for the official one, and an empty root."""
    cls = torchvision.datasets.CIFAR10
    folder = fake_cifar10 / cls.base_folder
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": downloads.md5_of(folder / "batches.meta")})
    archive = tmp_path / cls.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=cls.base_folder)
    monkeypatch.setattr(cls, "tgz_md5", downloads.md5_of(archive))
    root = tmp_path / "empty"
    root.mkdir()
    return archive, root


def test_archive_put_there_by_hand_replaces_the_network(archived_cifar10, no_network) -> None:
    archive, root = archived_cifar10
    shutil.copy(archive, root)
    source = CIFAR10(root=str(root))
    source.prepare()
    assert len(source.load("train")[0]) == 100
    assert no_network == []
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == [
        "cifar-10-batches-py",
        archive.name,
    ]
    assert not list(root.glob(".download-*"))


def test_download_is_fetched_beside_and_moved_in_place(archived_cifar10, monkeypatch) -> None:
    archive, root = archived_cifar10
    timeouts = []

    def fetch(url: str, fpath: str) -> None:
        timeouts.append(socket.getdefaulttimeout())
        shutil.copy(archive, fpath)

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    source = CIFAR10(root=str(root))
    source.prepare()
    assert len(source.load("test")[0]) == 20
    assert timeouts == [pytest.approx(15.0)]  # a silent server is not waited for for ever
    assert socket.getdefaulttimeout() is None
    source.prepare()
    CIFAR10(root=str(root)).prepare()
    assert len(timeouts) == 1


def test_interrupted_download_leaves_nothing_behind(archived_cifar10, monkeypatch) -> None:
    archive, root = archived_cifar10

    def fetch(url: str, fpath: str) -> None:
        Path(fpath).write_bytes(archive.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    with pytest.raises(KeyboardInterrupt):
        CIFAR10(root=str(root)).prepare()
    assert {p.name for p in root.iterdir()} <= {".download.lock"}


def test_download_cut_short_is_an_error_of_the_data(archived_cifar10, monkeypatch) -> None:
    archive, root = archived_cifar10
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve",
        lambda url, fpath: Path(fpath).write_bytes(archive.read_bytes()[:1000]),
    )
    assert "could not be downloaded" in error_of(CIFAR10(root=str(root)).prepare)


# -------------------------------------------------------------------------------- Tiny-ImageNet


def test_tiny_imagenet_reads_the_folder(fake_tiny_imagenet) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    source.prepare()
    x, y = source.load("train")
    assert x.shape == (12, 3, 64, 64)
    # Classes in sorted order are 0, 32 and 199; their images come in turn.
    assert y.tolist() == [0, 32, 199] * 4
    red = [40 * k + 10 * i for i in range(4) for k in (1, 2, 0)]
    assert (x[:, 0].float().mean((1, 2)) - torch.tensor(red)).abs().max() < 3
    assert (x[:, 2].float() - 200).abs().max() < 5

    x, y = source.load("test")
    assert y.tolist() == [32, 32, 0, 0, 199, 199]  # as the annotations list them
    grey = [120, 100, 70, 50, 20, 0]
    assert (x.float().mean((1, 2, 3)) - torch.tensor(grey)).abs().max() < 3
    assert torch.equal(x[:, 0], x[:, 1])


def test_tiny_imagenet_decodes_once(fake_tiny_imagenet, monkeypatch) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    first = source.load("train")
    monkeypatch.setattr(TinyImageNet, "_decode", lambda *_: pytest.fail("decoded again"))
    second = source.load("train")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not list(fake_tiny_imagenet.glob(".decode-*"))


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_tiny_imagenet_mends_its_cache(fake_tiny_imagenet, content) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    expected = source.load("train")[0]
    cache = fake_tiny_imagenet / ".tiny-imagenet-200.train.decoded.pt"
    cache.write_bytes(cache.read_bytes()[:2000] if content is None else content)
    assert torch.equal(source.load("train")[0], expected)
    assert torch.equal(torch.load(cache)["x"], expected)


def test_tiny_imagenet_sees_a_changed_folder(fake_tiny_imagenet) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    before = source.load("train")[0]
    images = fake_tiny_imagenet / "tiny-imagenet-200" / "train" / "n01443537" / "images"
    (images / "n01443537_0.JPEG").rename(images / "n01443537_9.JPEG")
    after = source.load("train")[0]
    assert torch.equal(after[9], before[0])  # rank 3 of class 0
    (images / "n01443537_9.JPEG").unlink()
    assert len(source.load("train")[0]) == 11


def test_tiny_imagenet_works_where_nothing_can_be_written(fake_tiny_imagenet, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.warns(UserWarning, match="could not be kept"):
        x, _ = TinyImageNet(root=str(fake_tiny_imagenet), verify=False).load("train")
    assert len(x) == 12


def test_tiny_imagenet_missing_folder(tmp_path) -> None:
    message = error_of(TinyImageNet(root=str(tmp_path)).prepare)
    assert str(tmp_path / "tiny-imagenet-200") in message
    assert "tiny-imagenet-200.zip" in message


def test_tiny_imagenet_incomplete_folder(fake_tiny_imagenet) -> None:
    message = error_of(TinyImageNet(root=str(fake_tiny_imagenet)).prepare)
    assert "12 images of the train split, expected 100,000" in message
    assert "--data.source.verify false" in message


@pytest.mark.parametrize("damage", ["truncated", "size", "class", "annotation", "absent"])
def test_tiny_imagenet_names_damage(fake_tiny_imagenet, damage) -> None:
    from PIL import Image

    folder = fake_tiny_imagenet / "tiny-imagenet-200"
    image = folder / "val" / "images" / "val_3.JPEG"
    annotations = folder / "val" / "val_annotations.txt"
    split, expected = "test", str(image)
    if damage == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
    elif damage == "size":
        Image.new("RGB", (32, 64)).save(image)
    elif damage == "class":
        (folder / "train" / "n02124075").rename(folder / "train" / "n99999999")
        split, expected = "train", "n99999999"
    elif damage == "annotation":
        annotations.write_text(annotations.read_text() + "val_9.JPEG\n")
        expected = "damaged annotation"
    else:
        image.unlink()
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    assert expected in error_of(lambda: source.load(split))


# ------------------------------------------------------------------- folders as people have them


@pytest.fixture
def stranger() -> Iterator[None]:
    """The test runs without the permissions of root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that anybody may list and write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"<html>quota exceeded</html>", None])
def test_a_damaged_archive_is_not_called_absent(
    tmp_path, no_network, content, download, verify
) -> None:
    path = tmp_path / "cifar-100-python.tar.gz"
    path.mkdir() if content is None else path.write_bytes(content)
    source = CIFAR100(str(tmp_path), download=download, verify=verify)
    message = error_of(source.prepare)
    assert f"{path} is there but damaged" in message
    assert no_network == []


def test_an_archive_is_unpacked_without_downloading(archived_cifar10, no_network) -> None:
    archive, root = archived_cifar10
    shutil.copy(archive, root)
    source = CIFAR10(str(root), download=False)
    source.prepare()
    assert len(source.load("train")[0]) == 100


@pytest.mark.parametrize("cls", DOWNLOADED)
@pytest.mark.parametrize("verify", [True, False])
def test_root_may_name_the_inner_folders(cls, verify, request) -> None:
    root = request.getfixturevalue(FAKES[cls])
    expected = cls(str(root)).load("test")
    inner = root
    for part in Path(cls.folder).parts:
        inner = inner / part
        source = cls(str(inner), verify=verify)
        source.prepare()
        assert torch.equal(source.load("test")[0], expected[0])


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_a_set_one_folder_below_is_named(cls, request, no_network) -> None:
    root = request.getfixturevalue(FAKES[cls])
    message = error_of(cls(str(root.parent), download=False).prepare)
    assert f"it is in {root}: set --data.source.root {root}" in message


@pytest.mark.parametrize("cls", [*DOWNLOADED, TinyImageNet])
def test_a_root_that_is_a_file_is_called_that(cls, tmp_path) -> None:
    path = tmp_path / "data"
    path.write_text("a file")
    for call in (cls(str(path)).prepare, lambda: cls(str(path)).load("test")):
        assert f"{path} is a file, expected the folder" in error_of(call)


@pytest.mark.parametrize("cls", [CIFAR10, MNIST, TinyImageNet])
def test_folders_that_may_not_be_read_are_called_that(cls, public, stranger) -> None:
    root = public / "data"
    root.mkdir(mode=0)
    assert f"{root} is not readable (Permission denied)" in error_of(cls(str(root)).prepare)
    root.chmod(0o777)


def test_files_that_may_not_be_read_are_called_that(
    public, write_cifar10, stranger, no_network
) -> None:
    path = write_cifar10(public / "data") / "cifar-10-batches-py" / "data_batch_2"
    path.chmod(0)
    message = error_of(CIFAR10(str(public / "data"), verify=False).prepare)
    assert f"{path}, a file of CIFAR-10, is there but it is not readable" in message


def test_a_folder_that_may_not_be_written(public, write_cifar10, stranger, no_network) -> None:
    root = write_cifar10(public / "data")
    for path in (root, root / "cifar-10-batches-py"):
        path.chmod(0o555)
    source = CIFAR10(str(root), verify=False)
    source.prepare()
    assert len(source.load("test")[0]) == 20
    root.chmod(0o755)
    shutil.rmtree(root, ignore_errors=True)
    (public / "data").mkdir(mode=0o555, exist_ok=True)
    (public / "data").chmod(0o555)
    message = error_of(SVHN(str(root)).prepare)
    assert "cannot be put there" in message
    assert "make the folder writable" in message
    assert no_network == []


@pytest.mark.parametrize("cls", DOWNLOADED)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (None, "a folder, not a file"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(
    cls, verify, content, word, request, no_network
) -> None:
    root = request.getfixturevalue(FAKES[cls])
    path = sorted(p for p in root.rglob("*") if p.is_file())[-1]
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    message = error_of(cls(str(root), verify=verify).prepare)
    assert "is there but it is" in message
    assert word in message
    assert no_network == []


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_a_half_copied_set_is_incomplete_and_not_absent(cls, request, no_network) -> None:
    root = request.getfixturevalue(FAKES[cls])
    files = sorted(p for p in root.rglob("*") if p.is_file())
    files[-1].unlink()
    count = f"{len(files) - 1} of {len(files)} files are there"
    for download in (True, False):
        message = error_of(cls(str(root), download=download).prepare)
        assert f"{cls.spec.name} is not complete in {files[0].parent}" in message
        assert files[-1].name in message
        assert count in message


@pytest.mark.parametrize("cls", [CIFAR10, TinyImageNet])
def test_a_root_that_leads_nowhere(cls, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    assert "is not readable (No such file" in error_of(cls(str(tmp_path / "link")).prepare)
    (tmp_path / "file").touch()
    assert "is below a file" in error_of(cls(str(tmp_path / "file" / "data")).prepare)


def test_names_of_packed_files_may_lie(fake_fashion_mnist) -> None:
    expected = FashionMNIST(str(fake_fashion_mnist)).load("test")[0]
    one, other = sorted((fake_fashion_mnist / FashionMNIST.folder).glob("t10k*"))
    one.write_bytes(gzip.decompress(one.read_bytes()))  # as some browsers do
    other.rename(other.with_suffix(""))
    source = FashionMNIST(str(fake_fashion_mnist))
    source.prepare()
    assert torch.equal(source.load("test")[0], expected)


def unpack(path: Path, name: str) -> None:
    (path.parent / name).parent.mkdir(exist_ok=True)
    (path.parent / name).write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("spelling", ["{}-idx{}", "{}.idx{}", "{}-idx{}/{}-idx{}"])
def test_unpacked_files_are_read_and_verified_where_their_content_is_known(
    fake_mnist, fake_fashion_mnist, spelling
) -> None:
    for cls, root in ((MNIST, fake_mnist), (FashionMNIST, fake_fashion_mnist)):
        expected = cls(str(root)).load("test")
        for path in (root / cls.folder).iterdir():
            stem, _, rest = path.name.removesuffix(".gz").partition("-idx")
            unpack(path, spelling.format(stem, rest, stem, rest))
        found = cls(str(root), verify=False).load("test")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    message = error_of(MNIST(str(fake_mnist)).prepare)
    assert "is there" in message
    assert "unpacked, and only the MD5 of train-images-idx3-ubyte.gz is known" in message
    source = FashionMNIST(str(fake_fashion_mnist))
    source.prepare()
    assert torch.equal(source.load("test")[0], expected[0])
    path = next(p for p in fake_fashion_mnist.rglob("*t10k-labels*") if p.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"\5")
    assert "SHA-256" in error_of(FashionMNIST(str(fake_fashion_mnist)).prepare)


def test_fashion_mnist_comes_from_the_system_package(fake_fashion_mnist, no_network) -> None:
    source = FashionMNIST(str(fake_fashion_mnist))
    expected = source.load("train")
    raw, system = fake_fashion_mnist / FashionMNIST.folder, Path(FashionMNIST.elsewhere[0])
    raw.rename(system)
    for path in system.iterdir():  # packed in another way than torchvision's
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    source = FashionMNIST(str(fake_fashion_mnist), download=False)
    source.prepare()
    assert torch.equal(source.load("train")[0], expected[0])
    next(system.iterdir()).unlink()
    for download in (True, False):
        message = error_of(FashionMNIST(str(fake_fashion_mnist), download=download).prepare)
        assert "install the Debian package dataset-fashion-mnist" in message


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_the_package_is_official(tmp_path) -> None:
    source = FashionMNIST(str(tmp_path), download=False)
    source.prepare()
    x, y = source.load("train")
    assert x.shape == (60_000, 1, 28, 28)
    assert y.bincount().tolist() == [6000] * 10
    assert FashionMNIST.spec.mean[0] == pytest.approx(x.double().mean().item() / 255, abs=5e-5)


def test_packed_files_that_unpack_to_far_more_are_refused(fake_mnist, monkeypatch) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = fake_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">II", 2049, 10) + bytes(2**18)))
    source = MNIST(str(fake_mnist), verify=False)
    assert "more than 50 times as many" in error_of(lambda: source.load("test"))


def test_matlab_files_that_unpack_to_far_more_are_refused(fake_svhn, monkeypatch) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    from scipy.io import savemat

    content = {"X": np.zeros((32, 32, 3, 90), np.uint8), "y": np.ones((90, 1), np.uint8)}
    savemat(fake_svhn / "test_32x32.mat", content, do_compression=True)
    svhn = SVHN(str(fake_svhn), verify=False)
    assert "more than 50 times as many" in error_of(lambda: svhn.load("test"))


def test_labels_are_whole_numbers_in_a_flat_list(fake_cifar10) -> None:
    nested: list[object] = [1]
    for _ in range(40):  # 2^40 numbers for whoever unfolds it
        nested = [nested, nested]
    for labels in (nested, [0.5] * 20, np.full(20, 0.5), "labels"):
        rewrite(fake_cifar10, labels=labels)
        source = CIFAR10(str(fake_cifar10), verify=False)
        assert "whole numbers" in error_of(lambda source=source: source.load("train"))


def test_matlab_files_of_another_kind(fake_svhn) -> None:
    from scipy.io import savemat

    path = fake_svhn / "test_32x32.mat"
    source = SVHN(str(fake_svhn), verify=False)
    savemat(path, {"Z": np.zeros(3)})
    assert "there is no X in it, only Z" in error_of(lambda: source.load("test"))
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400))
    assert "version 7.3" in error_of(lambda: source.load("test"))


# ---------------------------------------------------------------- Tiny-ImageNet as people have it


def sort_validation(root: Path, layout: str) -> None:
    val = root / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        folder = val / wnid / ("images" if layout == "nested" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(folder / name)
    (val / "images").rmdir()


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("annotations", ["kept", "empty", "removed"])
def test_tiny_imagenet_with_sorted_validation_images(
    fake_tiny_imagenet, layout, annotations
) -> None:
    expected = TinyImageNet(str(fake_tiny_imagenet), verify=False).load("test")
    sort_validation(fake_tiny_imagenet, layout)
    path = fake_tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    if annotations == "empty":
        path.write_text("\n")
    elif annotations == "removed":
        path.unlink()
    found = TinyImageNet(str(fake_tiny_imagenet), verify=False).load("test")
    if annotations != "kept":  # by their numbers, which the annotations of the fixture reverse
        expected = (expected[0].flip(0), expected[1].flip(0))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_tiny_imagenet_with_flat_classes_and_other_files(fake_tiny_imagenet) -> None:
    expected = TinyImageNet(str(fake_tiny_imagenet), verify=False).load("train")
    train = fake_tiny_imagenet / "tiny-imagenet-200" / "train"
    (train / ".ipynb_checkpoints").mkdir()
    for folder in [p for p in train.iterdir() if not p.name.startswith(".")]:
        for path in (folder / "images").iterdir():
            path.rename(folder / path.name)
        (folder / "images").rmdir()
        (folder / "._a.JPEG").write_bytes(b"Mac")
        (folder / "boxes.txt").touch()
    found = TinyImageNet(str(fake_tiny_imagenet), verify=False).load("train")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("place", ["inner", "renamed", "twice"])
def test_tiny_imagenet_one_folder_deeper(fake_tiny_imagenet, place) -> None:
    expected = TinyImageNet(str(fake_tiny_imagenet), verify=False).load("test")[0]
    folder = fake_tiny_imagenet / "tiny-imagenet-200"
    root = folder if place == "inner" else fake_tiny_imagenet
    if place == "renamed":
        root = folder.rename(fake_tiny_imagenet / "tiny")
    elif place == "twice":
        folder.rename(fake_tiny_imagenet / "x")
        folder.mkdir()
        (fake_tiny_imagenet / "x").rename(folder / folder.name)
    assert torch.equal(TinyImageNet(str(root), verify=False).load("test")[0], expected)


def test_tiny_imagenet_without_labels_or_unpacked(fake_tiny_imagenet, tmp_path) -> None:
    path = fake_tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    source = TinyImageNet(str(fake_tiny_imagenet), verify=False)
    path.write_text("")
    assert f"{path} is empty" in error_of(lambda: source.load("test"))
    path.unlink()
    assert f"{path} is missing" in error_of(lambda: source.load("test"))
    shutil.rmtree(path.parent)
    assert "is not complete (val missing)" in error_of(lambda: source.load("test"))
    archive = tmp_path / "tiny-imagenet-200.zip"
    archive.write_bytes(b"PK\5\6" + bytes(18))
    assert f"{archive} is there but damaged" in error_of(TinyImageNet(str(tmp_path)).prepare)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("tiny-imagenet-200/wnids.txt", "")
    message = error_of(TinyImageNet(str(tmp_path)).prepare)
    assert f"{archive} is there but not unpacked: unzip" in message


@pytest.mark.parametrize("name", ["../../../secret.JPEG", "/etc/passwd", "..", "a/b.JPEG", ""])
def test_annotations_name_files_inside_the_folder(fake_tiny_imagenet, name) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(fake_tiny_imagenet / "secret.JPEG")
    path = fake_tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(f"{name}\tn01443537\t0\t0\t62\t62\n{path.read_text()}")
    source = TinyImageNet(str(fake_tiny_imagenet), verify=False)
    assert "is no name of a file in the folder" in error_of(lambda: source.load("test"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["eps", "png", "large", "huge", "empty", "lfs"])
def test_only_jpegs_of_the_right_size_are_decoded(fake_tiny_imagenet, kind, monkeypatch) -> None:
    from PIL import EpsImagePlugin, Image

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    path = fake_tiny_imagenet / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG"
    if kind == "png":
        Image.new("RGB", (64, 64)).save(path, format="PNG")
    elif kind == "large":
        Image.new("L", (5000, 4000)).save(path)
    elif kind == "huge":  # the header alone says so
        content = bytearray(path.read_bytes())
        start = content.index(b"\xff\xc0")
        content[start + 5 : start + 9] = struct.pack(">HH", 20_000, 20_000)
        path.write_bytes(content)
    else:
        path.write_bytes({"eps": EPS, "empty": b"", "lfs": b"version https://git-lfs"}[kind])
    word = {"large": "5000x4000, not 64x64", "huge": "400000000 pixels", "empty": "empty (0 bytes)",
            "lfs": "Git LFS", "eps": "cannot identify", "png": "cannot identify"}[kind]  # fmt: skip
    source = TinyImageNet(str(fake_tiny_imagenet), verify=False)
    message = error_of(lambda: source.load("test"))
    assert str(path) in message
    assert word in message
