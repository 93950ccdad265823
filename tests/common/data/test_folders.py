"""Tiny-ImageNet as it is published and as people have it."""

import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from common.data import folders
from common.data.sources import TinyImageNet
from common.errors import RunDirectoryError


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


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_tiny_imagenet_decodes_once_and_mends_its_cache(
    fake_tiny_imagenet, content, monkeypatch
) -> None:
    source = TinyImageNet(root=str(fake_tiny_imagenet), verify=False)
    expected = source.load("train")[0]
    cache = fake_tiny_imagenet / ".tiny-imagenet-200.train.decoded.pt"
    cache.write_bytes(cache.read_bytes()[:2000] if content is None else content)
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(source.load("train")[0], expected)
    assert torch.equal(torch.load(cache)["x"], expected)
    monkeypatch.setattr(TinyImageNet, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(source.load("train")[0], expected)


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
    def refuse(path: object, _: object) -> None:
        raise RunDirectoryError(f"cannot write {path}: read-only file system")

    monkeypatch.setattr(folders, "write_sealed", refuse)
    with pytest.warns(UserWarning, match="could not be kept"):
        x, _ = TinyImageNet(root=str(fake_tiny_imagenet), verify=False).load("train")
    assert len(x) == 12


@pytest.mark.parametrize("damage", ["truncated", "class", "annotation", "absent"])
def test_tiny_imagenet_names_damage(fake_tiny_imagenet, damage, error_of) -> None:
    folder = fake_tiny_imagenet / "tiny-imagenet-200"
    image = folder / "val" / "images" / "val_3.JPEG"
    annotations = folder / "val" / "val_annotations.txt"
    split, expected = "test", str(image)
    if damage == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
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


def sort_validation(root: Path, layout: str) -> None:
    val = root / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        folder = val / wnid / ("images" if layout == "nested" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(folder / name)
    (val / "images").rmdir()


@pytest.mark.parametrize(
    ("layout", "annotations"),
    [("nested", "kept"), ("flat", "kept"), ("nested", "empty"), ("flat", "removed")],
)
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


def test_tiny_imagenet_incomplete_or_not_unpacked(fake_tiny_imagenet, tmp_path, error_of) -> None:
    message = error_of(TinyImageNet(str(fake_tiny_imagenet)).prepare)
    assert "12 images of the train split, expected 100,000" in message
    assert "--data.source.verify false" in message
    message = error_of(TinyImageNet(str(tmp_path)).prepare)
    assert f"{tmp_path / 'tiny-imagenet-200'} is missing" in message
    assert "tiny-imagenet-200.zip" in message
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
def test_annotations_name_files_inside_the_folder(fake_tiny_imagenet, name, error_of) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(fake_tiny_imagenet / "secret.JPEG")
    path = fake_tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(f"{name}\tn01443537\t0\t0\t62\t62\n{path.read_text()}")
    source = TinyImageNet(str(fake_tiny_imagenet), verify=False)
    assert "is no name of a file in the folder" in error_of(lambda: source.load("test"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["eps", "png", "large", "huge", "empty", "lfs"])
def test_only_jpegs_of_the_right_size_are_decoded(
    fake_tiny_imagenet, kind, monkeypatch, error_of
) -> None:
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
