"""Files that are missing, altered or of another kind."""

import gzip
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files
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
def test_without_files_and_network_one_line_says_what_to_do(
    cls, tmp_path, no_network, error_of
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
def test_without_files_and_download(cls, tmp_path, no_network, error_of) -> None:
    source = cls(root=str(tmp_path), download=False)
    for call in (source.prepare, lambda: source.load("train")):
        message = error_of(call)
        assert "--data.source.download true" in message
        assert str(tmp_path) in message
    assert no_network == []
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("cls", DOWNLOADED)
def test_one_missing_file_of_an_own_set_is_not_mixed_with_official_ones(
    cls, root, no_network, error_of
) -> None:
    path = sorted(p for p in root.rglob("*") if p.is_file())[-1]
    path.unlink()
    message = error_of(cls(root=str(root), verify=False).prepare)
    assert path.name in message
    assert no_network == []


def test_own_subset_is_refused_with_the_flag_and_read_with_it(
    tmp_path, write_cifar10, error_of
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
def test_content_that_does_not_fit_is_refused(fake_cifar10, changes, reason, error_of) -> None:
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


def test_pickles_cannot_run_code(fake_cifar10, error_of) -> None:
    rewrite(fake_cifar10, filenames=Harmful())
    source = CIFAR10(root=str(fake_cifar10), verify=False)
    assert "exec has no place" in error_of(lambda: source.load("train"))
    import builtins

    assert not hasattr(builtins, "harm_was_done")


def test_idx_file_of_another_type_is_refused(fake_mnist, error_of) -> None:
    path = fake_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + b"\0" * 4))
    source = MNIST(root=str(fake_mnist), verify=False)
    assert "no IDX file of bytes" in error_of(lambda: source.load("train"))


def test_folder_that_cannot_be_made_is_an_error_of_the_data(tmp_path, no_network, error_of) -> None:
    (tmp_path / "data").write_text("a file is in the way")
    assert str(tmp_path / "data") in error_of(CIFAR10(root=str(tmp_path / "data")).prepare)


# ------------------------------------------------------------------- folders as people have them


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"<html>quota exceeded</html>", None])
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


@pytest.mark.parametrize("cls", [*DOWNLOADED, TinyImageNet])
def test_a_root_that_is_a_file_is_called_that(cls, tmp_path, error_of) -> None:
    path = tmp_path / "data"
    path.write_text("a file")
    for call in (cls(str(path)).prepare, lambda: cls(str(path)).load("test")):
        assert f"{path} is a file, expected the folder" in error_of(call)


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
    cls, verify, content, word, root, no_network, error_of
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
    for download in (True, False):
        message = error_of(cls(str(root), download=download).prepare)
        assert f"{cls.spec.name} is not complete in {files[0].parent}" in message
        assert files[-1].name in message
        assert count in message


@pytest.mark.parametrize("cls", [CIFAR10, TinyImageNet])
def test_a_root_that_leads_nowhere(cls, tmp_path, error_of) -> None:
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
    assert "is there" in message
    assert "unpacked, and only the MD5 of train-images-idx3-ubyte.gz is known" in message
    source = FashionMNIST(str(fake_fashion_mnist))
    source.prepare()
    assert torch.equal(source.load("test")[0], expected[0])
    path = next(p for p in fake_fashion_mnist.rglob("*t10k-labels*") if p.is_file())
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


def test_packed_files_that_unpack_to_far_more_are_refused(
    fake_mnist, monkeypatch, error_of
) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = fake_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">II", 2049, 10) + bytes(2**18)))
    source = MNIST(str(fake_mnist), verify=False)
    assert "more than 50 times as many" in error_of(lambda: source.load("test"))


def test_matlab_files_that_unpack_to_far_more_are_refused(fake_svhn, monkeypatch, error_of) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    from scipy.io import savemat

    content = {"X": np.zeros((32, 32, 3, 90), np.uint8), "y": np.ones((90, 1), np.uint8)}
    savemat(fake_svhn / "test_32x32.mat", content, do_compression=True)
    svhn = SVHN(str(fake_svhn), verify=False)
    assert "more than 50 times as many" in error_of(lambda: svhn.load("test"))


def test_labels_are_whole_numbers_in_a_flat_list(fake_cifar10, error_of) -> None:
    nested: list[object] = [1]
    for _ in range(40):  # 2^40 numbers for whoever unfolds it
        nested = [nested, nested]
    for labels in (nested, [0.5] * 20, np.full(20, 0.5), "labels"):
        rewrite(fake_cifar10, labels=labels)
        source = CIFAR10(str(fake_cifar10), verify=False)
        assert "whole numbers" in error_of(lambda source=source: source.load("train"))


def test_matlab_files_of_another_kind(fake_svhn, error_of) -> None:
    from scipy.io import savemat

    path = fake_svhn / "test_32x32.mat"
    source = SVHN(str(fake_svhn), verify=False)
    savemat(path, {"Z": np.zeros(3)})
    assert "there is no X in it, only Z" in error_of(lambda: source.load("test"))
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400))
    assert "version 7.3" in error_of(lambda: source.load("test"))
