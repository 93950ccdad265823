"""Data sets that torchvision downloads: finding their files, checking them, fetching them."""

import errno
import shutil
import socket
import tarfile
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from torch import Tensor

from common.data.base import Arrays, ImageSource, Split, as_tensors
from common.data.reading import check_folder, md5_of, one_line
from common.errors import DataUnavailableError, check_choice, listed
from common.files import strangeness_of

_NETWORK_TIMEOUT = 15.0  # seconds without an answer; torchvision sets no limit
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_OWN = "if it is your own or a subset, set --data.source.verify false"


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _extracted_inside() -> Iterator[None]:
    """Archives write inside their folder only; older torchvision does not ask for it."""
    kind: Any = tarfile.TarFile
    before = vars(kind)["extraction_filter"]
    kind.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        kind.extraction_filter = before


class DownloadedSource(ImageSource):
    """A data set that torchvision knows the address, the file names and the checksums of.

    Args:
        root: Folder that has, or will have, the files in torchvision's layout; or the inner folder
            of that layout, with the files straight in it.
        download: Whether missing files may be fetched. Nothing is ever overwritten. An official
            archive that is there is unpacked in any case.
        verify: Whether the files must be the official ones, by checksum. Switch it off for a
            subset or for images of your own in the same format; then only their form is checked.
    """

    dataset: ClassVar[Any]  # of torchvision
    folder: ClassVar[str]  # of the files, below root
    archives: ClassVar[tuple[str, ...]]  # what to put into root by hand, relative to it
    address: ClassVar[str]
    elsewhere: ClassVar[tuple[str, ...]] = ()  # folders of system packages that have the files
    package: ClassVar[str] = ""  # which package

    def __init__(self, root: str = "data", download: bool = True, verify: bool = True) -> None:
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.verify = verify
        self._paths: dict[str, Path] = {}

    @abstractmethod
    def _checksums(self) -> dict[str, str]:
        """Names of the files in the folder, with their official MD5."""

    def _fetch(self, folder: Path) -> None:
        """Lets torchvision fill ``folder``, using archives that are already there."""
        self.dataset(folder, download=True)

    @abstractmethod
    def _read(self, split: Split) -> Arrays:
        """Images ``(N, C, H, W)`` and labels ``(N,)`` as the files have them."""

    def _archive_checksums(self) -> dict[str, str]:
        """Names of archives in root that are not files of the set themselves, with their MD5."""
        return {}

    def _spellings(self, name: str) -> tuple[str, ...]:
        """Names under which a file may be there."""
        return (name,)

    def _problem(self, path: Path, name: str) -> str:
        """Why a file is not the official one; empty if it is."""
        official, found = self._checksums()[name], md5_of(path)
        size = path.stat().st_size
        return "" if found == official else f"{size:,} bytes, MD5 {found}, expected {official}"

    def prepare(self) -> None:
        """See :meth:`ImageSource.prepare`."""
        folder, missing = self._check()
        if not missing:
            return
        has_archives = self._check_archives()
        # Official files mixed with someone's own would be neither.
        is_own_subset = not self.verify and len(missing) < len(self._checksums())
        if is_own_subset or not (self.download or has_archives):
            raise self._missing(folder, missing)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (
                FileLock(self.root / ".download.lock"),
                _extracted_inside(),
                tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as temporary,
            ):
                folder, missing = self._check()  # another run may have fetched them meanwhile
                if missing:
                    self._fetch_into(folder, Path(temporary), missing)
        except DataUnavailableError:
            raise
        except Exception as error:  # sockets, servers, archives and disks fail in many ways
            way = (
                f"cannot be put there ({one_line(error)}): make the folder writable, or name "
                "another with --data.source.root"
                if getattr(error, "errno", None) in _NOT_WRITABLE
                else f"could not be downloaded from {self.address} ({one_line(error)}): connect "
                f"to a network, or put {listed(self.archives)} into {self.root} by hand"
            )
            raise DataUnavailableError(
                f"{self._lack(folder, missing)} and {way}{self._package_hint}"
            ) from error

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """See :meth:`ImageSource.load`."""
        check_choice("split", split, Split)
        folder, missing = self._check()
        if missing:
            raise self._missing(folder, missing)
        try:
            return as_tensors(*self._read(split), self.spec)
        except Exception as error:  # a damaged file can fail at any depth of its reader
            raise DataUnavailableError(
                f"the {split} split of {self.spec.name} in {folder} is there but cannot be read "
                f"({one_line(error)}): delete {listed(self._checksums())} there to have "
                "the official files downloaded again, or correct your own"
            ) from error

    def _folders(self) -> list[Path]:
        """Where the files may be, the usual place first."""
        parts = Path(self.folder).parts
        inner = [n for n in range(1, len(parts)) if self.root.parts[-n:] == parts[:n]]
        folders = [self.root.joinpath(*parts[n:]) for n in (0, *inner)]
        return [*dict.fromkeys([*folders, self.root]), *map(Path, self.elsewhere)]

    def _find(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """The files in a folder, by their official names, and what is strange about them."""
        found = {}
        for name in self._checksums():
            there = []
            for path in (folder / spelling for spelling in self._spellings(name)):
                strangeness = strangeness_of(path)
                is_packed = name.endswith(".gz") and strangeness.startswith("compressed by gzip")
                if strangeness != "missing":
                    there.append((path, "" if is_packed else strangeness))
            if there:
                found[name] = min(there, key=lambda item: bool(item[1]))
        return found

    def _worth(self, folder: Path, found: dict[str, tuple[Path, str]]) -> int:
        """How many files of the set a folder has; a system folder needs all."""
        count = sum(not strangeness for _, strangeness in found.values())
        is_ours = folder.is_relative_to(self.root)
        return count if is_ours or count == len(self._checksums()) else -1

    def _check(self) -> tuple[Path, list[str]]:
        """The folder of the files, and which are missing; altered ones are an error at once."""
        if self._paths:
            return next(iter(self._paths.values())).parent, []
        check_folder(self.root, self.spec.name)
        folders = {folder: self._find(folder) for folder in self._folders()}
        folder = max(folders, key=lambda folder: self._worth(folder, folders[folder]))
        found = folders[folder]
        for name, (path, strangeness) in found.items():
            if strangeness:
                raise DataUnavailableError(
                    f"{path}, a file of {self.spec.name}, is there but it is {strangeness}: put "
                    "the official file there, or delete it to have it downloaded again"
                )
            if self.verify and (problem := self._problem(path, name)):
                raise DataUnavailableError(
                    f"{path} is there but not the official {self.spec.name} file ({problem}): if "
                    f"it is truncated or damaged, delete it to have it downloaded again; {_OWN}"
                )
        missing = [name for name in self._checksums() if name not in found]
        if not missing:
            self._paths = {name: path for name, (path, _) in found.items()}
        return folder, missing

    def _check_archives(self) -> bool:
        """Whether all archives are there; a damaged one is an error at once."""
        official = self._archive_checksums()
        there = [name for name in official if strangeness_of(self.root / name) != "missing"]
        for name in there:
            path = self.root / name
            if path.is_file() and md5_of(path) == official[name]:
                continue
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else strangeness_of(path)
            raise DataUnavailableError(
                f"{path} is there but damaged, or not the official archive of {self.spec.name} "
                f"({size}, expected the MD5 {official[name]}): delete it to have it downloaded "
                f"again; if it holds your own images, unpack it in {self.root} and set "
                "--data.source.verify false"
            )
        return bool(official) and len(there) == len(official)

    @property
    def _package_hint(self) -> str:
        return f", or install the Debian package {self.package}" if self.package else ""

    def _lack(self, folder: Path, missing: list[str]) -> str:
        name, total = self.spec.name, len(self._checksums())
        if len(missing) < total:
            return (
                f"{name} is not complete in {folder}: {listed(missing, 2)} missing, "
                f"{total - len(missing)} of {total} files are there,"
            )
        return f"{name} is not in {self.root} ({listed(missing, 1)} missing{self._nearby()})"

    def _nearby(self) -> str:
        """A folder below the root that has the files."""
        try:
            below = sorted(path for path in self.root.iterdir() if path.is_dir())
        except OSError:
            return ""
        for path in below:
            other = type(self)(str(path), download=False, verify=False)
            if any(other._worth(folder, self._find(folder)) > 0 for folder in other._folders()):
                return f"; it is in {path}: set --data.source.root {path}"
        return ""

    def _missing(self, folder: Path, missing: list[str]) -> DataUnavailableError:
        way = (
            "set --data.source.download true, with a network or with "
            f"{listed(self.archives)} put into {self.root} by hand{self._package_hint}"
            if not self.download
            else f"put what is missing into {folder}"
            if not self.verify
            else "run prepare_data() first"
        )
        return DataUnavailableError(f"{self._lack(folder, missing).rstrip(',')}: {way}")

    def _fetch_into(self, folder: Path, temporary: Path, missing: list[str]) -> None:
        for name in self.archives:
            if (self.root / name).is_file():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / name, temporary / name)
        with _network_timeout():
            self._fetch(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in missing:
            (temporary / self.folder / name).replace(folder / name)
