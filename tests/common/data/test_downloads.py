"""Files that are missing, altered, of another kind, archived or downloaded."""

import gzip
import pickle
import shutil
import socket
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets

from common import files
from common.data import downloads
from common.data.sources import (
    CIFAR10,
    CIFAR100,
    MNIST,
    SVHN,
    FashionMNIST,
    TinyImageNet,
)

DOWNLOADED = [CIFAR10, CIFAR100, SVHN, MNIST, FashionMNIST]


# ------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_without_files_one_line_says_what_to_do(
    cls, tmp_path, no_network, monkeypatch, error_of
) -> None:
    monkeypatch.setattr(FashionMNIST, "elsewhere", ())  # the package may be installed
    source = cls(root=str(tmp_path), download=False)
    for call in (source.prepare, lambda: source.load("train")):
        message = error_of(call)
        assert "--data.source.download true" in message
        assert str(tmp_path) in message
    assert no_network == []
    assert list(tmp_path.iterdir()) == []
    message = error_of(cls(root=str(tmp_path)).prepare)
    assert no_network  # it did try
    for words in (cls.spec.name, str(tmp_path), "connect to a network", *cls.archives):
        assert words in message
    assert not [path for path in tmp_path.iterdir() if path.name != ".download.lock"]


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_altered_file_is_named_with_both_remedies(cls, root, no_network, error_of) -> None:
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
def test_truncated_files_are_refused_even_unverified(cls, verify, root, error_of) -> None:
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = cls(root=str(root), verify=verify)
    message = error_of(lambda: source.load("train"))
    assert ("cannot be read" in message) == (not verify)
    assert str(root) in message


def rewrite(root: Path, **changes: object) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | changes))


NESTED: list[object] = [1]
for _ in range(40):  # 2^40 numbers for whoever unfolds it
    NESTED = [NESTED, NESTED]
NO_LABELS = (NESTED, [0.5] * 20, np.full(20, 0.5), "labels")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [10] * 20}, "expected 0 to 9"),
        ({"labels": [-1] * 20}, "expected 0 to 9"),
        ({"labels": [1] * 19}, "99 labels"),
        ({"data": np.zeros((20, 3072), dtype=np.float32)}, "expected uint8"),
        ({"data": np.zeros((20, 100), dtype=np.uint8)}, "cannot be read"),
        *(({"labels": labels}, "whole numbers") for labels in NO_LABELS),
    ],
)
def test_content_that_does_not_fit_is_refused(fake_cifar10, changes, reason, error_of) -> None:
    rewrite(fake_cifar10, **changes)
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert reason in error_of(lambda: source.load("train"))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import builtins; builtins.harm_was_done = True",)


def test_pickles_cannot_run_code(fake_cifar10, error_of) -> None:
    rewrite(fake_cifar10, filenames=Harmful())
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert "exec has no place" in error_of(lambda: source.load("train"))
    import builtins

    assert not hasattr(builtins, "harm_was_done")


# ------------------------------------------------------------------- folders as people have them


@pytest.mark.parametrize(
    ("content", "download", "verify"),
    [(b"", True, True), (b"garbage" * 99, False, True), (None, True, False)],
)
def test_a_damaged_archive_is_not_called_absent(
    tmp_path, no_network, content, download, verify, error_of
) -> None:
    path = tmp_path / "cifar-100-python.tar.gz"
    path.mkdir() if content is None else path.write_bytes(content)
    source = CIFAR100(str(tmp_path), download=download, verify=verify)
    message = error_of(source.prepare)
    assert f"{path} is there but damaged" in message
    assert no_network == []


@pytest.mark.parametrize("cls", DOWNLOADED)
@pytest.mark.parametrize("verify", [True, False])
def test_root_may_name_the_inner_folders(cls, verify, root) -> None:
    expected = cls(str(root)).load("test")
    inner = root
    for part in Path(cls.folder).parts:
        inner = inner / part
        source = cls(str(inner), verify=verify)
        source.prepare()
        assert torch.equal(source.load("test")[0], expected[0])


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_a_set_one_folder_below_is_named(cls, root, no_network, error_of) -> None:
    message = error_of(cls(str(root.parent), download=False).prepare)
    assert f"it is in {root}: set --data.source.root {root}" in message


@pytest.mark.parametrize("cls", [CIFAR10, MNIST, TinyImageNet])
def test_a_root_that_is_a_file_is_called_that(cls, tmp_path, error_of) -> None:
    path = tmp_path / "data"
    path.write_text("a file")
    for call in (cls(str(path)).prepare, lambda: cls(str(path)).load("test")):
        assert f"{path} is a file, expected the folder" in error_of(call)
    assert "is below a file" in error_of(cls(str(path / "data")).prepare)
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    assert "is not readable (No such file" in error_of(cls(str(tmp_path / "link")).prepare)


@pytest.mark.parametrize("cls", [CIFAR10, MNIST, TinyImageNet])
def test_folders_that_may_not_be_read_are_called_that(cls, public, stranger, error_of) -> None:
    root = public / "data"
    root.mkdir(mode=0)
    assert f"{root} is not readable (Permission denied)" in error_of(cls(str(root)).prepare)
    root.chmod(0o777)


def test_files_that_may_not_be_read_are_called_that(
    public, write_cifar10, stranger, no_network, error_of
) -> None:
    path = write_cifar10(public / "data") / "cifar-10-batches-py" / "data_batch_2"
    path.chmod(0)
    message = error_of(CIFAR10(str(public / "data"), verify=False).prepare)
    assert f"{path}, a file of CIFAR-10, is there but it is not readable" in message


def test_a_folder_that_may_not_be_written(
    public, write_cifar10, stranger, no_network, error_of
) -> None:
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
@pytest.mark.parametrize(
    ("content", "word", "verify"),
    [(b"", "empty (0 bytes)", True), (b"<html>", "web page", False), (None, "a folder", False)],
)
def test_a_file_that_is_something_else_is_called_that(
    cls, content, word, verify, root, no_network, error_of
) -> None:
    path = sorted(p for p in root.rglob("*") if p.is_file())[-1]
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    message = error_of(cls(str(root), verify=verify).prepare)
    assert "is there but it is" in message
    assert word in message
    assert no_network == []


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_a_half_copied_set_is_incomplete_and_not_absent(cls, root, no_network, error_of) -> None:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    files[-1].unlink()
    count = f"{len(files) - 1} of {len(files)} files are there"
    for settings in ({}, {"download": False}, {"verify": False}):
        no_network.clear()
        message = error_of(cls(str(root), **settings).prepare)
        assert f"{cls.spec.name} is not complete in {files[0].parent}" in message
        assert files[-1].name in message
        assert count in message
        assert bool(no_network) == (not settings)  # one's own set is not mixed with official files


def unpack(path: Path, name: str) -> None:
    content = gzip.decompress(path.read_bytes())
    path.unlink()
    (path.parent / name).parent.mkdir(exist_ok=True)
    (path.parent / name).write_bytes(content)


@pytest.mark.parametrize("spelling", ["{}-idx{}.gz", "{}.idx{}", "{}-idx{}/{}-idx{}"])
def test_unpacked_files_are_read_and_verified_where_their_content_is_known(
    fake_mnist, fake_fashion_mnist, spelling, error_of
) -> None:
    for cls, root in ((MNIST, fake_mnist), (FashionMNIST, fake_fashion_mnist)):
        expected = cls(str(root)).load("test")
        for path in (root / cls.folder).iterdir():
            stem, _, rest = path.name.removesuffix(".gz").partition("-idx")
            unpack(path, spelling.format(stem, rest, stem, rest))
        found = cls(str(root), verify=False).load("test")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    message = error_of(MNIST(str(fake_mnist)).prepare)
    only = "unpacked, and only the MD5 of train-images-idx3-ubyte.gz is known"
    assert (only in message) == ("gz" not in spelling)  # by its name it is packed, and altered
    source = FashionMNIST(str(fake_fashion_mnist))
    source.prepare()
    assert torch.equal(source.load("test")[0], expected[0])
    folder = fake_fashion_mnist / FashionMNIST.folder
    path = next(path for path in folder.rglob("*t10k-labels*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"\5")
    assert "SHA-256" in error_of(FashionMNIST(str(fake_fashion_mnist)).prepare)


def test_fashion_mnist_comes_from_the_system_package(
    fake_fashion_mnist, no_network, error_of
) -> None:
    source = FashionMNIST(str(fake_fashion_mnist))
    expected = source.load("train")
    raw, system = fake_fashion_mnist / FashionMNIST.folder, Path(FashionMNIST.elsewhere[0])
    raw.rename(system)
    for path in system.iterdir():  # packed in another way than torchvision's
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    path.rename(path.with_suffix(""))  # still packed
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


def test_files_that_unpack_to_far_more_are_refused(
    fake_mnist, monkeypatch, tmp_path, error_of
) -> None:
    from scipy.io import savemat

    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = fake_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">II", 2049, 10) + bytes(2**18)))
    content = {"X": np.zeros((32, 32, 3, 90), np.uint8), "y": np.ones((90, 1), np.uint8)}
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", content, do_compression=True)
    for source in (MNIST(str(fake_mnist), verify=False), SVHN(str(tmp_path), verify=False)):
        assert "more than 50 times" in error_of(lambda source=source: source.load("test"))


def test_files_of_another_kind(fake_svhn, fake_mnist, error_of) -> None:
    from scipy.io import savemat

    path = fake_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + b"\0" * 4))
    mnist = MNIST(root=str(fake_mnist), verify=False)
    assert "no IDX file of bytes" in error_of(lambda: mnist.load("train"))
    path = fake_svhn / "test_32x32.mat"
    source = SVHN(str(fake_svhn), verify=False)
    savemat(path, {"Z": np.zeros(3)})
    assert "there is no X in it, only Z" in error_of(lambda: source.load("test"))
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400))
    assert "version 7.3" in error_of(lambda: source.load("test"))


# ------------------------------------------------------------------------- archives


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


@pytest.mark.parametrize("download", [True, False])
def test_archive_put_there_by_hand_replaces_the_network(
    archived_cifar10, no_network, download
) -> None:
    archive, root = archived_cifar10
    shutil.copy(archive, root)
    source = CIFAR10(root=str(root), download=download)
    source.prepare()
    assert len(source.load("train")[0]) == 100
    assert no_network == []
    names = {".download.lock", "cifar-10-batches-py", archive.name}
    assert {path.name for path in root.iterdir()} == names


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


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_half_a_download_leaves_nothing_behind(
    archived_cifar10, is_interrupted, monkeypatch, error_of
) -> None:
    archive, root = archived_cifar10

    def fetch(url: str, fpath: str) -> None:
        Path(fpath).write_bytes(archive.read_bytes()[:1000])
        if is_interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    if is_interrupted:
        with pytest.raises(KeyboardInterrupt):
            CIFAR10(root=str(root)).prepare()
    else:
        assert "could not be downloaded" in error_of(CIFAR10(root=str(root)).prepare)
    assert {p.name for p in root.iterdir()} <= {".download.lock"}
