from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.corruptions import CIFAR10C, CORRUPTIONS
from common.errors import ConfigurationError, DataUnavailableError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(("fog",), per_severity=4)``: files in the published format, cut down."""

    def write(names: tuple[str, ...] = CORRUPTIONS, per_severity: int = 4) -> Path:
        folder = tmp_path / "CIFAR-10-C"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        n = 5 * per_severity
        for name in names:
            images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            np.save(folder / f"{name}.npy", images)
        np.save(folder / "labels.npy", np.tile(np.arange(per_severity, dtype=np.uint8) % 10, 5))
        return tmp_path

    return write


def test_the_names_are_those_of_the_published_files() -> None:
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 19
    assert "jpeg_compression" in CORRUPTIONS
    assert set(CORRUPTIONS) == {
        "brightness",
        "defocus_blur",
        "fog",
        "gaussian_blur",
        "glass_blur",
        "jpeg_compression",
        "motion_blur",
        "saturate",
        "snow",
        "speckle_noise",
        "contrast",
        "elastic_transform",
        "frost",
        "gaussian_noise",
        "impulse_noise",
        "pixelate",
        "shot_noise",
        "spatter",
        "zoom_blur",
    }


@pytest.mark.parametrize("size", [1, 7, 100])
def test_batches_are_the_file_in_its_order(write, size) -> None:
    root = write(("fog",))
    stored = np.load(root / "CIFAR-10-C" / "fog.npy")
    parts = list(CIFAR10C(root, verify=False).batches("fog", size))
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    assert x.dtype == torch.uint8
    assert x.shape == (20, 3, 32, 32)
    assert y.dtype == torch.int64
    assert torch.equal(x, torch.from_numpy(stored).permute(0, 3, 1, 2))
    assert y.tolist() == [0, 1, 2, 3] * 5
    assert all(len(labels) <= size for _, labels in parts)


def test_a_severity_is_a_block(write) -> None:
    data = CIFAR10C(write(("snow",)), verify=False)
    whole = torch.cat([x for x, _ in data.batches("snow")])
    for severity in range(1, 6):
        parts = list(data.batches("snow", 3, severity))
        block = torch.cat([x for x, _ in parts])
        assert torch.equal(block, whole[4 * severity - 4 : 4 * severity])
        assert torch.cat([y for _, y in parts]).tolist() == [0, 1, 2, 3]


def test_check_opens_all_and_counts(write) -> None:
    root = write()
    data = CIFAR10C(root, verify=False)
    assert data.check() == 20
    (root / "CIFAR-10-C" / "zoom_blur.npy").unlink()
    with pytest.raises(DataUnavailableError, match=r"zoom_blur\.npy is missing"):
        data.check()
    assert data.check(("fog",)) == 20


def test_missing_files_say_what_from_where_and_whereto(tmp_path) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        CIFAR10C(tmp_path).check()
    text = str(caught.value)
    assert "2535967" in text
    assert "19 corruptions" in text
    assert text.endswith(f"unpack it in {tmp_path}")
    assert "\n" not in text


def test_a_subset_has_to_be_asked_for(write) -> None:
    with pytest.raises(DataUnavailableError, match="expected 50,000 whole numbers"):
        CIFAR10C(write(("fog",))).check(("fog",))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((20, 3, 32, 32), np.uint8), "expected uint8"),
        (np.zeros((20, 32, 32, 3), np.float32), "expected uint8"),
        (np.zeros((15, 32, 32, 3), np.uint8), "expected uint8"),
        (np.array(3), "no array"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_other_files_are_refused(write, array, message) -> None:
    root = write(("fog",))
    np.save(root / "CIFAR-10-C" / "fog.npy", array, allow_pickle=True)
    with pytest.raises(DataUnavailableError, match=message):
        CIFAR10C(root, verify=False).check(("fog",))


def test_a_truncated_file_is_refused(write) -> None:
    path = write(("fog",)) / "CIFAR-10-C" / "fog.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataUnavailableError, match=r"fog\.npy cannot be read"):
        CIFAR10C(path.parents[1], verify=False).check(("fog",))


@pytest.mark.parametrize("labels", [np.arange(20), np.zeros(20), np.zeros(12, np.uint8)])
def test_labels_are_classes_of_five_blocks(write, labels) -> None:
    root = write(("fog",))
    np.save(root / "CIFAR-10-C" / "labels.npy", labels)
    with pytest.raises(DataUnavailableError, match=r"labels\.npy"):
        CIFAR10C(root, verify=False).check(("fog",))


def test_settings_out_of_range(write) -> None:
    data = CIFAR10C(write(("fog",)), verify=False)
    with pytest.raises(ConfigurationError, match="no corruption 'rain'; there are gaussian_noise"):
        list(data.batches("rain"))
    with pytest.raises(ConfigurationError, match="from 1 to 5, got 6"):
        list(data.batches("fog", severity=6))
    with pytest.raises(ConfigurationError, match="at least 1"):
        list(data.batches("fog", 0))


def test_root_may_name_the_folder_itself(write) -> None:
    root = write(("fog",))
    assert CIFAR10C(root / "CIFAR-10-C", verify=False).check(("fog",)) == 20


def test_an_archive_that_is_there_is_to_be_unpacked(tmp_path) -> None:
    archive = tmp_path / "CIFAR-10-C.tar"
    archive.touch()
    with pytest.raises(DataUnavailableError, match=rf"{archive} is there: unpack it in {tmp_path}"):
        CIFAR10C(tmp_path).check()
    with pytest.raises(DataUnavailableError, match="is a file, expected the folder"):
        CIFAR10C(archive).check()


@pytest.mark.parametrize("kind", ["npz", "empty", "folder", "page", "header"])
def test_a_file_of_another_kind_is_called_that(write, kind) -> None:
    root = write(("fog",))
    path = root / "CIFAR-10-C" / "fog.npy"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, x=np.zeros((20, 32, 32, 3), np.uint8))
    else:
        header = b"\x93NUMPY\1\0\xff\xff" + b"(" * 200_000
        path.write_bytes({"empty": b"", "page": b"<html>", "header": header}[kind])
    word = {"npz": "no array", "empty": "is empty", "folder": "is a folder", "page": "a web page",
            "header": "cannot be read"}[kind]  # fmt: skip
    with pytest.raises(DataUnavailableError, match=word) as caught:
        CIFAR10C(root, verify=False).check(("fog",))
    assert "\n" not in str(caught.value)
