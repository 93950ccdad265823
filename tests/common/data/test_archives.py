"""Archives that are downloaded, or put in place by hand."""

import pickle
import shutil
import socket
import tarfile
from pathlib import Path

import pytest
import torchvision.datasets

from common.data import downloads
from common.data.sources import CIFAR10


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


def test_download_cut_short_is_an_error_of_the_data(
    archived_cifar10, monkeypatch, error_of
) -> None:
    archive, root = archived_cifar10
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve",
        lambda url, fpath: Path(fpath).write_bytes(archive.read_bytes()[:1000]),
    )
    assert "could not be downloaded" in error_of(CIFAR10(root=str(root)).prepare)
