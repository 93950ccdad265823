"""Whole files: what a full disk leaves, what a flipped bit is called."""

import io
import json
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.callbacks.checkpointing import SealedCheckpointIO
from common.checkpoints import load_checkpoint
from common.errors import CheckpointError, ConfigurationError, RunDirectoryError
from common.files import (
    check_writable,
    content_digest,
    damage_of,
    read_sealed_json,
    remove_leftovers,
    write_json_atomically,
    write_sealed,
    write_sealed_json,
    write_sealed_yaml,
    yaml_damage_of,
)
from common.results.store import read_result

ROOT = Path(__file__).parents[2]


def checkpoint(path: Path, size: int = 5) -> bytes:
    state = {"state_dict": {"weight": torch.arange(float(size))}, "epoch": 3}
    SealedCheckpointIO().save_checkpoint(state, path)
    return path.read_bytes()


def test_any_reader_reads_a_sealed_archive(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = checkpoint(path)
    assert damage_of(path) == ""
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(found["state_dict"]["weight"], torch.arange(5.0))
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(3))
    write_sealed(tmp_path / "a.npz", archive)
    assert np.load(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2]
    assert content[-71:-64] == b"sha256:"


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = checkpoint(path)
    assert len(content) > 1000
    for place in [*range(0, len(content) - 71, 20), *range(len(content) - 93, len(content))]:
        path.write_bytes(flipped(content, place, place % 8))
        assert damage_of(path), place
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read \(its bytes have the"):
        load_checkpoint(path)


@pytest.mark.parametrize("left", [0, 1, 70, 72, 500, -1, -71, -100])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, left: int) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint(path)[:left])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read"):
        load_checkpoint(path)
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    assert load_checkpoint(path)["state_dict"]["a"] == 1, "one without a digest is read as it is"


def test_what_is_no_archive_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no zip archive"):
        write_sealed(tmp_path / "a", io.BytesIO(b"text" * 20))
    assert not (tmp_path / "a").exists()


def flipped(content: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_a_flipped_bit_of_a_result_is_found(tmp_path: Path) -> None:
    """Every bit of a digit, letter or brace; blanks between them say nothing."""
    data: Any = read_result(next(iter(sorted(ROOT.glob("paper_*/results/*-seed*.json")))))
    data.pop("digest", None)
    data["digest"] = content_digest(data)
    path = tmp_path / "result.json"
    write_json_atomically(path, data)
    assert read_result(path)["digest"] == data["digest"]
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 60, replace=False).tolist():
        path.write_bytes(flipped(content, place, int(rng.integers(0, 7))))
        with suppress(ConfigurationError):
            found: Any = read_result(path)
            assert found == data, place  # a blank that became another one


def test_a_flipped_bit_of_a_report_is_found(tmp_path: Path) -> None:
    path, report = tmp_path / "analysis.json", {"id": "a", "value": 0.25, "lines": [["1", None]]}
    write_sealed_json(path, report)
    assert read_sealed_json(path) == report
    assert content_digest(report) == content_digest(dict(reversed(report.items())))
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, place % 7))
        with suppress(ValueError):  # a blank that became another one, or "digest" another key
            found = read_sealed_json(path)
            assert {key: found.get(key) for key in report} == report, place
    for text, expected in (("", "."), (content.decode()[:50], "."), ("[1]", "an object, got list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=expected):
            read_sealed_json(path)
    path.write_text('{"value": 0.5}')
    assert read_sealed_json(path) == {"value": 0.5}, "one without a digest is read as it is"


def test_a_damaged_configuration_is_found(tmp_path: Path) -> None:
    path, text = tmp_path / "config.yaml", "model:\n  lr: 0.1\n"
    write_sealed_yaml(path, text)
    assert path.read_text().partition("\n")[2] == text
    assert yaml_damage_of(path) == ""
    content = path.read_bytes()
    for left in range(len(content)):
        path.write_bytes(content[:left])
        if left == 0 or left >= 30:
            assert yaml_damage_of(path), left
    path.write_bytes(content.replace(b"0.1", b"0.3"))
    assert "after an edit take that line out" in yaml_damage_of(path)
    path.write_text("lr: 0.3\n")
    assert yaml_damage_of(path) == "", "one without a digest is read as it is"


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": float("nan")}, {"a": 2}])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, bad, monkeypatch) -> None:
    path = tmp_path / "result.json"
    write_json_atomically(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((TypeError, ValueError, RunDirectoryError)):
        write_json_atomically(path, bad)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "result.json", tmp_path):
        with pytest.raises(RunDirectoryError, match=r"cannot write .*; make"):
            check_writable(path)
    path = tmp_path / "new" / "folder" / "result.json"
    check_writable(path)
    assert not path.exists()
    previous = os.umask(0o022)
    write_json_atomically(path, {})
    os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it"


def test_what_killed_writers_leave_is_removed(tmp_path: Path) -> None:
    run, end = tmp_path / "seed0", "-ab12cd34.unfinished.tmp"
    foreign = [".notes.txt-ab12cd34.tmp", "a.tmp", f"deep/.results.json{end}", "results.json"]
    folders = ("", "checkpoints/", "figures/", "outcomes/0123456789abcdef/")
    ours = [f"{folder}.a{end}" for folder in folders]
    for name in foreign + ours:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    remove_leftovers(run)
    assert all((run / name).exists() for name in foreign + ours), "nothing says that it is a run"
    write_sealed_yaml(run / "config.yaml", "model: {}\n")
    (tmp_path / "link").symlink_to(run)
    remove_leftovers(tmp_path / "link")
    assert all((run / name).exists() for name in foreign + ours), "a link leads elsewhere"
    (run / "figures").rename(tmp_path / "elsewhere")
    (run / "figures").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(run)
    assert [name for name in ours if (run / name).exists()] == [f"figures/.a{end}"]
    assert all((run / name).exists() for name in foreign)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files, which needs no rights; in a child, for it cannot be lifted."""
    path = tmp_path / "last.ckpt"
    before = checkpoint(path)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            checkpoint(path, size=100_000)
        except RunDirectoryError as error:
            (tmp_path / "told").write_text(str(error))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    told = (tmp_path / "told").read_text()
    assert "cannot write" in told
    assert "MiB free); what was there before is kept" in told
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "told"]
