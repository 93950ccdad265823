import gzip
import pickle
import shutil
import socket
import struct
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from common.data import downloads
from common.data.base import ImageSource
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
def test_specification_needs_no_file(cls: type[ImageSource], tmp_path: Path) -> None:
    source = cls() if cls is Digits else cls(root=str(tmp_path / "nothing"))
    spec = source.spec
    assert len(spec.class_names) == len(set(spec.class_names)) == spec.num_classes
    assert len(spec.mean) == len(spec.std) == spec.shape[0]
    assert all(0 < value < 1 for value in spec.mean + spec.std)
    assert not (tmp_path / "nothing").exists()


def test_class_names_are_torchvisions() -> None:
    assert list(FashionMNIST.spec.class_names) == torchvision.datasets.FashionMNIST.classes
    # Labels of CIFAR-100 and Tiny-ImageNet follow the alphabet.
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
def test_split_has_the_size_asked_for_and_is_proportional(count: int) -> None:
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
def test_split_refuses_to_empty_a_class(labels: list[int], count: int) -> None:
    with pytest.raises(ConfigurationError, match="hold out fewer"):
        stratified_split(torch.tensor(labels), count, seed=0)


# ---------------------------------------------------------------------- reading official formats


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_pixels_and_order(fake_cifar10: Path, protocol: int) -> None:
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


def test_cifar10_agrees_with_torchvision(
    fake_cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    for split in ("train", "test"):
        peer = torchvision.datasets.CIFAR10(fake_cifar10, train=split == "train")
        x, y = CIFAR10(root=str(fake_cifar10)).load(split)
        assert np.array_equal(x.numpy(), peer.data.transpose(0, 3, 1, 2))
        assert y.tolist() == peer.targets


def test_cifar100_uses_fine_labels(fake_cifar100: Path) -> None:
    entry = pickle.loads((fake_cifar100 / "cifar-100-python" / "train").read_bytes())
    x, y = CIFAR100(root=str(fake_cifar100)).load("train")
    assert y.tolist() == entry["fine_labels"]
    assert np.array_equal(x.flatten(1).numpy(), entry["data"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_agrees_with_torchvision(fake_svhn: Path, split: str) -> None:
    peer = torchvision.datasets.SVHN(fake_svhn, split=split)
    x, y = SVHN(root=str(fake_svhn)).load(split)
    assert np.array_equal(x.numpy(), peer.data)
    assert y.tolist() == peer.labels.tolist()
    assert set(y.tolist()) == set(range(10))  # the file's label 10 is the digit 0


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_agrees_with_torchvision(
    cls: type[MNIST], split: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(FAKES[cls])
    x, y = cls(root=str(root)).load(split)
    peer = getattr(torchvision.datasets, cls.__name__)(root, train=split == "train", download=True)
    assert torch.equal(x[:, 0], peer.data)
    assert torch.equal(y, peer.targets)


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_complete_files_need_no_network_and_are_not_touched(
    cls: type[ImageSource], request: pytest.FixtureRequest, no_network: list[str]
) -> None:
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


def test_files_are_hashed_once(fake_cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, original = [], downloads.md5_of
    monkeypatch.setattr(downloads, "md5_of", lambda path: hashed.append(path) or original(path))
    source = CIFAR10(root=str(fake_cifar10))
    source.prepare()
    source.load("train")
    source.load("test")
    assert len(hashed) == 6


def test_relative_root_is_kept_when_the_process_moves(
    fake_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fake_cifar10.parent)
    source = CIFAR10(root="data")
    monkeypatch.chdir(Path("/"))
    assert len(source.load("test")[0]) == 20


# ------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_without_files_and_network_one_line_says_what_to_do(
    cls: type[ImageSource], tmp_path: Path, no_network: list[str]
) -> None:
    root = tmp_path / "data"
    message = error_of(cls(root=str(root)).prepare)
    assert no_network  # it did try
    assert cls.spec.name in message
    assert str(root) in message
    assert "connect to a network" in message
    assert all(name in message for name in cls.archives)
    assert not [path for path in root.iterdir() if path.name != ".download.lock"]


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_without_files_and_download(
    cls: type[ImageSource], tmp_path: Path, no_network: list[str]
) -> None:
    source = cls(root=str(tmp_path), download=False)
    for call in (source.prepare, lambda: source.load("train")):
        message = error_of(call)
        assert "--data.source.download true" in message
        assert str(tmp_path) in message
    assert no_network == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_altered_file_is_named_with_both_remedies(
    cls: type[ImageSource], request: pytest.FixtureRequest, no_network: list[str]
) -> None:
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
def test_truncated_files_are_refused_even_unverified(
    cls: type[ImageSource], verify: bool, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(FAKES[cls])
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = cls(root=str(root), verify=verify)
    message = error_of(lambda: source.load("train"))
    assert ("cannot be read" in message) == (not verify)
    assert str(root) in message


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_one_missing_file_of_an_own_set_is_not_mixed_with_official_ones(
    cls: type[ImageSource], request: pytest.FixtureRequest, no_network: list[str]
) -> None:
    root = request.getfixturevalue(FAKES[cls])
    path = sorted(p for p in root.rglob("*") if p.is_file())[-1]
    path.unlink()
    message = error_of(cls(root=str(root), verify=False).prepare)
    assert path.name in message
    assert no_network == []


def test_own_subset_is_refused_with_the_flag_and_read_with_it(
    tmp_path: Path, write_cifar10: Callable[..., Path]
) -> None:
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
def test_content_that_does_not_fit_is_refused(
    fake_cifar10: Path, changes: dict[str, object], reason: str
) -> None:
    rewrite(fake_cifar10, **changes)
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert reason in error_of(lambda: source.load("train"))


def test_keys_as_bytes_are_understood(fake_cifar10: Path) -> None:
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


def test_pickles_cannot_run_code(fake_cifar10: Path) -> None:
    rewrite(fake_cifar10, filenames=Harmful())
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert "exec has no place" in error_of(lambda: source.load("train"))
    import builtins

    assert not hasattr(builtins, "harm_was_done")


def test_idx_file_of_another_type_is_refused(fake_mnist: Path) -> None:
    path = fake_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + b"\0" * 4))
    source = MNIST(root=str(fake_mnist), verify=False)
    assert "no IDX file of bytes" in error_of(lambda: source.load("train"))


def test_folder_that_cannot_be_made_is_an_error_of_the_data(
    tmp_path: Path, no_network: list[str]
) -> None:
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


def test_archive_put_there_by_hand_replaces_the_network(
    archived_cifar10: tuple[Path, Path], no_network: list[str]
) -> None:
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


def test_download_is_fetched_beside_and_moved_in_place(
    archived_cifar10: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_interrupted_download_leaves_nothing_behind(
    archived_cifar10: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, root = archived_cifar10

    def fetch(url: str, fpath: str) -> None:
        Path(fpath).write_bytes(archive.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    with pytest.raises(KeyboardInterrupt):
        CIFAR10(root=str(root)).prepare()
    assert {p.name for p in root.iterdir()} <= {".download.lock"}


def test_download_cut_short_is_an_error_of_the_data(
    archived_cifar10: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, root = archived_cifar10
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve",
        lambda url, fpath: Path(fpath).write_bytes(archive.read_bytes()[:1000]),
    )
    assert "could not be downloaded" in error_of(CIFAR10(root=str(root)).prepare)


# -------------------------------------------------------------------------------- Tiny-ImageNet


def test_tiny_imagenet_reads_the_folder(fake_tiny_imagenet: Path) -> None:
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


def test_tiny_imagenet_decodes_once(
    fake_tiny_imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    first = source.load("train")
    monkeypatch.setattr(TinyImageNet, "_decode", lambda *_: pytest.fail("decoded again"))
    second = source.load("train")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not list(fake_tiny_imagenet.glob(".decode-*"))


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_tiny_imagenet_mends_its_cache(fake_tiny_imagenet: Path, content: bytes | None) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    expected = source.load("train")[0]
    cache = fake_tiny_imagenet / "tiny-imagenet-200.train.pt"
    cache.write_bytes(cache.read_bytes()[:2000] if content is None else content)
    assert torch.equal(source.load("train")[0], expected)
    assert torch.equal(torch.load(cache)["x"], expected)


def test_tiny_imagenet_sees_a_changed_folder(fake_tiny_imagenet: Path) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    before = source.load("train")[0]
    images = fake_tiny_imagenet / "tiny-imagenet-200" / "train" / "n01443537" / "images"
    (images / "n01443537_0.JPEG").rename(images / "n01443537_9.JPEG")
    after = source.load("train")[0]
    assert torch.equal(after[9], before[0])  # rank 3 of class 0
    (images / "n01443537_9.JPEG").unlink()
    assert len(source.load("train")[0]) == 11


def test_tiny_imagenet_works_where_nothing_can_be_written(
    fake_tiny_imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.warns(UserWarning, match="could not be kept"):
        x, _ = TinyImageNet(root=str(fake_tiny_imagenet), verify=False).load("train")
    assert len(x) == 12


def test_tiny_imagenet_missing_folder(tmp_path: Path) -> None:
    message = error_of(TinyImageNet(root=str(tmp_path)).prepare)
    assert str(tmp_path / "tiny-imagenet-200") in message
    assert "tiny-imagenet-200.zip" in message


def test_tiny_imagenet_incomplete_folder(fake_tiny_imagenet: Path) -> None:
    message = error_of(TinyImageNet(root=str(fake_tiny_imagenet)).prepare)
    assert "12 images of the train split, expected 100,000" in message
    assert "--data.source.verify false" in message


@pytest.mark.parametrize("damage", ["truncated", "size", "class", "annotation", "absent"])
def test_tiny_imagenet_names_damage(fake_tiny_imagenet: Path, damage: str) -> None:
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
