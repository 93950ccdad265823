from functools import partial

import numpy as np
import pytest
import torch

from common.data.corruptions import CIFAR10C, CORRUPTIONS
from common.errors import ConfigurationError


@pytest.fixture
def write(tmp_path, write_cifar10c):
    return partial(write_cifar10c, tmp_path)


def test_the_names_are_those_of_the_published_files() -> None:
    names = (
        "brightness contrast defocus_blur elastic_transform fog frost gaussian_blur gaussian_noise "
        "glass_blur impulse_noise jpeg_compression motion_blur pixelate saturate shot_noise snow "
        "spatter speckle_noise zoom_blur"
    )
    assert sorted(CORRUPTIONS) == names.split()


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


def test_check_opens_all_and_counts(write, error_of) -> None:
    root = write()
    data = CIFAR10C(root, verify=False)
    assert data.check() == 20
    assert "expected 50,000 whole numbers" in error_of(CIFAR10C(root).check)
    (root / "CIFAR-10-C" / "zoom_blur.npy").unlink()
    assert "zoom_blur.npy is missing" in error_of(data.check)
    assert data.check(("fog",)) == CIFAR10C(data.folder, verify=False).check(("fog",)) == 20


def test_missing_files_say_what_from_where_and_whereto(tmp_path, error_of) -> None:
    message = error_of(CIFAR10C(tmp_path).check)
    assert "2535967" in message
    assert "19 corruptions" in message
    assert message.endswith(f"unpack it in {tmp_path}")
    archive = tmp_path / "CIFAR-10-C.tar"
    archive.touch()
    assert f"{archive} is there: unpack it in {tmp_path}" in error_of(CIFAR10C(tmp_path).check)
    assert "is a file, expected the folder" in error_of(CIFAR10C(archive).check)


@pytest.mark.parametrize("labels", [np.arange(20), np.zeros(20), np.zeros(12, np.uint8)])
def test_labels_are_classes_of_five_blocks(write, labels, error_of) -> None:
    data = CIFAR10C(write(("fog",)), verify=False)
    np.save(data.folder / "labels.npy", labels)
    assert "labels.npy" in error_of(lambda: data.check(("fog",)))


def test_settings_out_of_range(write) -> None:
    data = CIFAR10C(write(("fog",)), verify=False)
    with pytest.raises(ConfigurationError, match="no corruption 'rain'; there are gaussian_noise"):
        list(data.batches("rain"))
    with pytest.raises(ConfigurationError, match="from 1 to 5, got 6"):
        list(data.batches("fog", severity=6))
    with pytest.raises(ConfigurationError, match="at least 1"):
        list(data.batches("fog", 0))


IMAGES = np.zeros((20, 32, 32, 3), np.uint8)
HEADER = b"\x93NUMPY\1\0\xff\xff" + b"(" * 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES.transpose(0, 3, 1, 2), "expected uint8"),
        (IMAGES.astype(np.float32), "expected uint8"),
        (IMAGES[:15], "expected uint8"),
        (np.array(3), "no array"),
        (np.array([{}], dtype=object), "cannot be read"),
        ({"x": IMAGES}, "no array"),
        (HEADER, "cannot be read"),
        (HEADER[:8] + b"v\0{'descr': '|u1', 'fortran_order': False", "cannot be read"),
        (b"", "is empty"),
        (b"<html>", "a web page"),
        (None, "is a folder"),
    ],
)
def test_other_files_are_called_what_they_are(write, content, message, error_of) -> None:
    root = write(("fog",))
    path = root / "CIFAR-10-C" / "fog.npy"
    path.unlink()
    if content is None:
        path.mkdir()
    elif isinstance(content, dict):
        with path.open("wb") as file:
            np.savez(file, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    found = error_of(lambda: CIFAR10C(root, verify=False).check(("fog",)))
    assert f"{path} " in found
    assert message in found
