"""Files that hold the old or the new content at every moment, never half of it, and their digests.

A sealed file carries the SHA-256 of its content: checkpoints and arrays in the comment of their zip
archive, JSON in its last key ``digest``, YAML in a first comment. A file without one is read as it
is. Files that cannot be written raise :class:`RunDirectoryError`; the one before is kept.
"""

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, RunDirectoryError
from common.limits import read_json

_UNFINISHED = ".unfinished.tmp"
_SEAL = b"sha256:"
_YAML_SEAL = b"# SHA-256 of the lines below: "
_SEAL_LENGTH = len(_SEAL) + 64
_END, _END_LENGTH = b"PK\x05\x06", 22  # the record a zip archive ends with, but for its comment
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json_atomically(path: str | Path, data: Mapping[str, Any]) -> None:
    """As :func:`write_bytes_atomically`, as JSON with a line per key and a list on one line.

    Raises:
        TypeError, ValueError: If ``data`` is not JSON (NaN is not); nothing is touched then.
    """
    write_text_atomically(path, _to_json(data) + "\n")


def write_text_atomically(path: str | Path, text: str) -> None:
    """As :func:`write_bytes_atomically`, in UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | Path, *parts: bytes | memoryview) -> None:
    """Replace a file at once by the given parts; its folder is made if it is missing."""
    path = Path(path)
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_writable(path: str | Path) -> None:
    """Make sure that a file can be written later, without touching it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    remedy = f"make {path.parent} a writable folder with free space, or choose another file"
    reason = error.strerror or str(error)
    if is_full(error):
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB free"
        except OSError:
            free = "free space unknown"
        reason += f" ({free})"
        remedy = "what was there before is kept. Make room and run the same command again"
    return RunDirectoryError(f"cannot write {path}: {reason}; {remedy}")


def is_full(error: BaseException) -> bool:
    """Whether the disk, a quota or the largest file size is exhausted."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


# ----------------------------------------------------------------------------------- strange files

_ROOM = 2**28  # bytes that any compressed file may unpack to
_PAGE = "a web page (the download asked for something first; fetch it in a browser)"
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer and not the file itself (run git lfs pull)",
    b"\x1f\x8b": "compressed by gzip (unpack it)",
    b"BZh": "compressed by bzip2 (unpack it)",
    b"\xfd7zXZ\0": "compressed by xz (unpack it)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (unpack it)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it)",
    b"Rar!\x1a\x07": "a RAR archive (unpack it)",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}


def strangeness_of(path: str | Path) -> str:
    """What a file evidently is instead of data or weights; empty if nothing stands out.

    It may be ``"missing"``, a folder or a device, not readable, empty, a Git LFS pointer, a web
    page, compressed, or an archive that unpacks to far more than images or weights would.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            return "a folder, not a file" if stat.S_ISDIR(mode) else "no regular file"
        with Path(path).open("rb") as file:
            head = file.read(512)
            if head.startswith(b"PK"):
                return expansion_of(sum(e.file_size for e in zipfile.ZipFile(file).filelist), path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except zipfile.BadZipFile:
        return ""  # truncated: its reader says so
    except OSError as error:
        return f"not readable ({error.strerror or error})"
    if not head:
        return "empty (0 bytes)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning) or text.startswith(beginning):
            return name
    return "a tar archive (unpack it)" if head[257:262] == b"ustar" else ""


def check_torch_file(path: Path) -> None:
    """Check that a file can be one of torch.save, or of safetensors.

    Raises:
        CheckpointError: If it is missing, or something else.
    """
    if strangeness := strangeness_of(path):
        if strangeness == "missing":
            found = sorted(p.name for p in path.parent.glob("*.ckpt"))
            beside = f"; beside it there is {', '.join(found)}" if found else ""
            raise CheckpointError(f"the checkpoint {path} does not exist{beside}; check the path")
        problem = f"it is {strangeness}"
    else:
        with path.open("rb") as file:
            begin = file.read(20)
        if path.suffix == ".safetensors" or begin.startswith((b"PK", b"\x80")):
            return
        problem = f"it begins with {begin!r}, so it is no file of torch.save"
    raise CheckpointError(
        f"the checkpoint {path} cannot be read: {problem}; give a checkpoint of a run"
    )


def most_unpacked(path: str | Path) -> int:
    """Bytes that a file may unpack to: images and weights compress at most a few times."""
    return max(_ROOM, 50 * Path(path).stat().st_size)


def expansion_of(unpacked: int, path: str | Path) -> str:
    """What is wrong if a compressed file unpacks to this many bytes; empty if nothing is."""
    if unpacked <= most_unpacked(path):
        return ""
    size = Path(path).stat().st_size
    return f"{size:,} bytes that unpack to {unpacked:,} or more, more than 50 times as many"


# ---------------------------------------------------------------------------------------- digests


def write_sealed(path: str | Path, archive: io.BytesIO) -> None:
    """Write a zip archive, as torch and numpy make them, with its digest as its comment.

    Every reader of such archives still reads it, and :func:`damage_of` finds a single flipped bit.

    Raises:
        ValueError: If it is no zip archive without a comment.
    """
    content = archive.getbuffer()
    if bytes(content[-_END_LENGTH:][:4]) != _END or bytes(content[-2:]) != b"\0\0":
        raise ValueError(f"what is to be written to {path} is no zip archive without a comment")
    content[-2:] = _SEAL_LENGTH.to_bytes(2, "little")
    write_bytes_atomically(path, content, _SEAL + hashlib.sha256(content).hexdigest().encode())


def damage_of(path: str | Path) -> str:
    """What is wrong with a sealed archive; empty if it is whole, or was never sealed.

    Raises:
        OSError: If it cannot be read.
    """
    with Path(path).open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _END_LENGTH - _SEAL_LENGTH, 0))
        end = file.read()
    place = end.rfind(_END)
    comment = end[place + _END_LENGTH :]
    if 0 <= place <= len(end) - _END_LENGTH:
        expected = int.from_bytes(end[place + _END_LENGTH - 2 :][:2], "little")
        if len(comment) != expected:
            return f"{len(comment)} bytes follow the archive, {expected} were written"
        if expected == _SEAL_LENGTH and not comment.startswith(_SEAL):
            return "the bytes that follow the archive are damaged"
    seal = end[-_SEAL_LENGTH:]
    if not seal.startswith(_SEAL):
        return ""
    found = hashlib.sha256(memoryview(Path(path).read_bytes())[:-_SEAL_LENGTH]).hexdigest()
    written = seal[len(_SEAL) :].decode(errors="replace")
    if found == written:
        return ""
    return f"its bytes have the SHA-256 {found[:12]}..., it was written with {written[:12]}..."


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, independent of spaces and the order of keys."""
    try:
        # NaN is refused where it is written.
        text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """As :func:`write_json_atomically`, with the digest of the other keys as the last one."""
    written = json.loads(_to_json(data))
    write_json_atomically(path, written | {"digest": content_digest(written)})


def read_sealed_json(path: str | Path) -> dict[str, Any]:
    """What a JSON file holds, without its digest.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON object, or not what was written.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    expected = data.pop("digest", None)
    if expected is not None and expected != (found := content_digest(data)):
        raise ValueError(
            f"its digest is {str(expected)[:12]}..., its content has {found[:12]}...: it was "
            "damaged, or edited without taking the digest out"
        )
    return data


def write_sealed_yaml(path: str | Path, text: str) -> None:
    """As :func:`write_text_atomically`, with the text's digest in a comment before it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text_atomically(path, f"{_YAML_SEAL.decode()}{digest}\n{text}")


def yaml_damage_of(path: str | Path) -> str:
    """What is wrong with a YAML file; empty if it is whole, or was never sealed.

    Raises:
        OSError: If it cannot be read.
    """
    content = Path(path).read_bytes()
    if not content:
        return "it is empty"
    if not content.startswith(_YAML_SEAL):
        return ""
    seal, _, text = content.removeprefix(_YAML_SEAL).partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() == seal:
        return ""
    return "it does not have the SHA-256 that its first line says; after an edit take that line out"


# ------------------------------------------------------------------------------- run directories


def is_sealed(path: str | Path) -> bool:
    """Whether a checkpoint or ``config.yaml`` carries a digest."""
    try:
        with Path(path).open("rb") as file:
            if file.read(len(_YAML_SEAL)) == _YAML_SEAL:
                return True
            file.seek(max(file.seek(0, os.SEEK_END) - _SEAL_LENGTH, 0))
            return file.read().startswith(_SEAL)
    except OSError:
        return False


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run directory that this program wrote, and no link to one."""
    folder = Path(folder)
    made = (folder / "config.yaml", folder / "checkpoints" / "last.ckpt")
    return not folder.is_symlink() and any(map(is_sealed, made))


def remove_leftovers(run: str | Path) -> None:
    """Delete temporary files of killed writers in a run directory that no other process writes."""
    run = Path(run)
    for path in run.rglob(f".*{_UNFINISHED}") if is_run(run) else ():  # follows no links
        part = path.relative_to(run).parts[0]
        if part in (path.name, "checkpoints", "figures", "outcomes"):
            path.unlink(missing_ok=True)


def _to_json(data: Any, indent: str = "") -> str:
    if not isinstance(data, Mapping) or not data:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    lines = (
        f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_to_json(value, inner)}"
        for key, value in data.items()
    )
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
