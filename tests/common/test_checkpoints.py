"""Where neighbouring experiments keep their checkpoints; files that are no checkpoints."""

import argparse
import bz2
import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from common import files
from common.checkpoints import checkpoint_beside, load_weights
from common.errors import CheckpointError


def test_a_neighbour_has_the_same_seed_and_no_version() -> None:
    for name in ("seed3", "seed3-v2"):
        run, expected = (
            Path("runs/paper_x/mine") / name,
            Path("runs/paper_x/other/seed3/checkpoints"),
        )
        assert checkpoint_beside(run, "other") == expected / "selected.ckpt"
        assert checkpoint_beside(str(run), "other", "last") == expected / "last.ckpt"


# ------------------------------------------------------------------------------- strange files


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Linear(2, 2), path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def bomb() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(2**20))
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html></html>", "a web page"),
        (b"<html><body>Sign in</body></html>", "a web page"),
        (gzip.compress(b"weights", mtime=0), "compressed by gzip"),
        (bz2.compress(b"weights"), "compressed by bzip2"),
        (lzma.compress(b"weights"), "compressed by xz"),
        (bytes(257) + b"ustar\0" + bytes(300), "a tar archive"),
        (b"PK\5\6" + bytes(18), "no file of torch.save"),
        (b"no weights", "no file of torch.save"),
        (bomb(), "more than 50 times"),
    ],
)
def test_a_file_is_called_what_it_is(
    tmp_path: Path, content: bytes, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ROOM", 2**16)
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert word in error_of(path)


def test_a_folder_is_called_that_and_a_missing_file_too(tmp_path: Path) -> None:
    assert "a folder, not a file" in error_of(tmp_path)
    (tmp_path / "a.ckpt").touch()
    assert "does not exist; beside it there is a.ckpt" in error_of(tmp_path / "b.ckpt")
    assert "does not exist" in error_of(tmp_path / "a.ckpt" / "b.ckpt")
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in error_of(tmp_path / "pipe")


def test_a_whole_module_is_named_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    message = error_of(path)
    assert "torch.nn.modules.linear.Linear" in message
    assert "model.state_dict()" in message
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert "TorchScript" in error_of(path)
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    assert "asks for torch.nn.modules.linear.Linear" in error_of(path)


def test_arguments_and_accuracies_beside_weights_are_read(tmp_path: Path) -> None:
    net, path = nn.Linear(2, 2), tmp_path / "model.pt"
    beside = {"args": argparse.Namespace(lr=0.1), "best_acc": np.float64(0.5), "epoch": 3}
    torch.save({"model": net.state_dict()} | beside, path)
    fresh = nn.Linear(2, 2)
    load_weights(fresh, path)
    assert torch.equal(fresh.weight, net.weight)


def test_safetensors(tmp_path: Path) -> None:
    path, net, fresh = tmp_path / "model.safetensors", nn.Linear(2, 2), nn.Linear(2, 2)
    safetensors.torch.save_file(net.state_dict(), path)
    load_weights(fresh, path)
    assert torch.equal(fresh.weight, net.weight)
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in error_of(path)
