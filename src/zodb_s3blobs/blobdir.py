"""A ZODB blob directory, like that of a FileStorage with blob-dir: read as a source of blobs, made for an export.

The layouts are ZODB's (`ZODB.blob.FilesystemHelper`). Any thread may call.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ZODB.blob import BLOB_SUFFIX, LAYOUT_MARKER, FilesystemHelper

from .errors import S3BlobsError
from .localfile import LocalFile
from .revision import Revision

_LAYOUTS = ("bushy", "lawn")
_READ = 1 << 20

#: Prefix of the names of our temporary files; and the age in seconds at which one is deleted if locks do not work.
_NEW = "s3blobs-"
_ABANDONED_AFTER = 86400

#: Names that count as empty in a new blob directory: the folder of a killed run, and that of the file system.
_TEMPORARY = "tmp"
_OF_FILE_SYSTEM = "lost+found"


class Target(Protocol):
    """A file that receives a blob."""

    def write_at(self, data: bytes, position: int) -> None: ...


class BlobDirectoryError(S3BlobsError):
    """The directory cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class BlobFile:
    """The file of one blob; ``size`` in bytes."""

    oid: bytes
    tid: bytes
    path: str
    size: int


class BlobDirectory:
    """The existing blob directory ``path``; `create` makes a new one. Raises `BlobDirectoryError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._helper = FilesystemHelper(path, _layout(path))
        self._identity = self._look()
        self._lock = threading.Lock()
        self._new: set[NewBlobFile] | None = set()

    @classmethod
    def create(cls, path: str) -> "BlobDirectory":
        """Return the blob directory ``path``; make it if ``path`` is missing or an empty directory.

        A new directory has the marker of its layout: a FileStorage treats any directory without a marker as a lawn. A
        new file system, and an unfinished blob directory of a killed run, count as empty. Unfinished files of killed
        runs are deleted.
        """
        try:
            if not os.path.lexists(path) or (os.path.isdir(path) and _is_empty(path)):
                FilesystemHelper(path, "bushy").create()
            directory = cls(path)
            directory._helper.create()
            directory._sweep()
        except OSError as error:
            raise BlobDirectoryError(f"cannot make the blob directory {path}: {error.strerror}") from None
        return directory

    def _sweep(self) -> None:
        """Delete the files of killed runs from the folder for temporary files."""
        with os.scandir(self._helper.temp_dir) as entries:
            for entry in entries:
                if entry.name.startswith(_NEW) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError, PermissionError):  # finished meanwhile, or of others
                        if _is_abandoned(entry.path):
                            os.unlink(entry.path)

    def close(self) -> None:
        """Delete the unpublished files, and refuse to make new ones."""
        with self._lock:
            files, self._new = self._new or (), None
        for file in files:
            file.discard()

    def _look(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise BlobDirectoryError(f"the blob directory {self.path} cannot be read: {error.strerror}") from None
        return found.st_dev, found.st_ino

    def find(self, oid: bytes, tid: bytes) -> str | None:
        """Return the path of the file of blob (oid, tid), None if there is none.

        Raises BlobDirectoryError if the directory cannot be read, for example because it is not mounted any more.
        """
        path = self._helper.getBlobFilename(oid, tid)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                return path
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise BlobDirectoryError(f"the blob file {path} cannot be read: {error.strerror}") from None
        if self._look() != self._identity:
            raise BlobDirectoryError(
                f"the blob directory {self.path} is not the one that was opened: is its file system still mounted?"
            )
        return None

    def copy(self, oid: bytes, tid: bytes, target: Target) -> bool:
        """Write blob (oid, tid) into the empty ``target``; return False if there is no such blob.

        Raises the errors of `find`.
        """
        path = self.find(oid, tid)
        if path is None:
            return False
        position = 0
        for data in _chunks(path):
            target.write_at(data, position)
            position += len(data)
        return True

    def files(self, foreign: Callable[[str], None]) -> Iterator[BlobFile]:
        """Yield all blobs, in no useful order; call ``foreign`` with the path of each file that is not a blob.

        The folder for temporary files, the file system's own folder, and names that begin with a dot are skipped.
        """
        passed_over = [os.path.join(self.path, name) for name in (_TEMPORARY, _OF_FILE_SYSTEM)]
        folders = [self.path]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name, reverse=True)
            except FileNotFoundError:
                continue  # packed away meanwhile
            except OSError as error:
                raise BlobDirectoryError(f"the blob directory {folder} cannot be read: {error.strerror}") from None
            for entry in found:
                if entry.name.startswith(".") or entry.path in passed_over:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                name = self._parse(entry.path)
                if name is None:
                    foreign(entry.path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield BlobFile(*name, entry.path, entry.stat().st_size)

    def _parse(self, path: str) -> Revision | None:
        inside = os.path.join(self._helper.base_dir, os.path.relpath(path, self.path))
        try:
            oid, tid = self._helper.splitBlobFilename(inside)
        except ValueError:  # binascii.Error is one
            return None
        if oid is None or len(oid) != 8 or len(tid) != 8:
            return None
        # Only if ZODB itself would find the blob at this path.
        return Revision(oid, tid) if self._helper.getBlobFilename(oid, tid) == inside else None

    def new_file(self) -> "NewBlobFile":
        """Return an empty file that can become the file of a blob. Raises BlobDirectoryError."""
        while True:
            try:
                fd, path = tempfile.mkstemp(BLOB_SUFFIX, _NEW, self._helper.temp_dir)
            except OSError as error:
                raise BlobDirectoryError(f"cannot write to {self._helper.temp_dir}: {error.strerror}") from None
            file = NewBlobFile(path, fd, self._helper)
            if file.is_there():
                break
            file.discard()  # another process deleted it as abandoned before it was locked
        with self._lock:
            if self._new is None:
                file.discard()
                raise BlobDirectoryError(f"the blob directory {self.path} has been closed")
            # Finished files are dropped here, so that a file needs no reference to this directory.
            self._new = {one for one in self._new if one.is_open} | {file}
        return file


class NewBlobFile(LocalFile):
    """A file on its way into a blob directory; the caller that made it owns it until `publish` or `discard`.

    While the file is open as ``fd``, it is locked, which shows other processes that it is not abandoned. The methods
    raise the OSErrors of the disk.
    """

    def __init__(self, path: str, fd: int, helper: FilesystemHelper) -> None:
        super().__init__(path)
        self._fd = fd
        self._helper = helper
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(fd, fcntl.LOCK_EX)

    @property
    def is_open(self) -> bool:
        """True until the file is published or discarded."""
        return self._fd >= 0

    def is_there(self) -> bool:
        """Return whether the file still has its name."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def publish(self, oid: bytes, tid: bytes) -> None:
        """Sync the file and move it to the path of blob (oid, tid), read-only like ZODB's own blob files."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        # Not by the helper, which raises an AssertionError if it cannot make the folder.
        folder = self._helper.getPathForOID(oid)
        os.makedirs(folder, exist_ok=True)
        os.chmod(self.path, stat.S_IRUSR | os.stat(folder).st_mode & (stat.S_IRGRP | stat.S_IROTH))
        os.rename(self.path, self._helper.getBlobFilename(oid, tid))
        self._close()

    def discard(self) -> None:
        """Delete the file if it still has its temporary name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _is_empty(path: str) -> bool:
    """Return whether the directory ``path`` counts as empty: see `BlobDirectory.create`."""
    names = set(os.listdir(path)) - {_OF_FILE_SYSTEM}
    temporary = os.path.join(path, _TEMPORARY)
    if names == {_TEMPORARY} and os.path.isdir(temporary):
        return all(name.startswith(_NEW) for name in os.listdir(temporary))
    return not names


def _is_abandoned(path: str) -> bool:
    """Return whether no process writes the temporary file at ``path`` any more."""
    try:
        fd = os.open(path, os.O_RDWR)  # NFS needs a writable descriptor for this kind of lock
    except PermissionError:
        fd = os.open(path, os.O_RDONLY)  # complete and read-only, about to be published
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return os.fstat(fd).st_mtime < time.time() - _ABANDONED_AFTER
    else:
        return True
    finally:
        os.close(fd)


def _chunks(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while data := file.read(_READ):
                yield data
    except OSError as error:
        raise BlobDirectoryError(f"the blob file {path} cannot be read: {error.strerror}") from None


def _layout(path: str) -> str:
    """Return the layout of the blob directory ``path``. Raises BlobDirectoryError."""
    try:
        if os.path.exists(marker := os.path.join(path, LAYOUT_MARKER)):
            with open(marker, encoding="ascii", errors="replace") as file:
                layout = file.read().strip()
        else:
            layout = _guess(path)
    except OSError as error:
        raise BlobDirectoryError(f"the blob directory {path} cannot be read: {error.strerror}") from None
    if layout == "zeocache":
        raise BlobDirectoryError(
            f"{path} is the blob cache of a ZEO client, which may lack blobs: name the blob-dir of the server"
        )
    if layout not in _LAYOUTS:
        raise BlobDirectoryError(
            f"{path} is not a ZODB blob directory: it has no blobs and no {LAYOUT_MARKER} file. Check the path, and "
            f"whether its file system is mounted"
        )
    return layout


def _guess(path: str) -> str:
    # ZODB treats any directory without a marker as a lawn; but a copy made with `*` lacks the marker, a dotfile.
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if name.startswith("0x") and os.path.isdir(folder):
            inside = os.listdir(folder)
            # Only folders named like bytes: other software, such as snapshots, may have its own folders here.
            if any(one.startswith("0x") and os.path.isdir(os.path.join(folder, one)) for one in inside):
                return "bushy"
            if any(one.endswith(BLOB_SUFFIX) for one in inside):
                return "lawn"
    return ""
