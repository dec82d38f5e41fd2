"""A ZODB blob directory, as a FileStorage with a blob-dir has one: read where blobs come from, made where they go to.

The layouts are ZODB's (`ZODB.blob.FilesystemHelper`). Any thread may call.
"""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ZODB.blob import BLOB_SUFFIX, LAYOUT_MARKER, FilesystemHelper

_LAYOUTS = ("bushy", "lawn")
_READ = 1 << 20

#: What the names of our temporary files begin with, and when they are nobody's, in seconds.
_NEW = "s3blobs-"
_ABANDONED_AFTER = 86400


class Target(Protocol):
    """A file that a blob is written into."""

    def write_at(self, data: bytes, position: int) -> None: ...

    def clear(self) -> None: ...


class BlobDirectoryError(Exception):
    """The directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class BlobFile:
    """The file of one blob; ``size`` in bytes."""

    oid: bytes
    tid: bytes
    path: str
    size: int


class BlobDirectory:
    """The blob directory ``path``, which must be one already; `create` makes one. Raises `BlobDirectoryError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._helper = FilesystemHelper(path, _layout(path))
        self._identity = self._look()

    @classmethod
    def create(cls, path: str) -> "BlobDirectory":
        """The same; if there is nothing at ``path``, or an empty directory, it becomes a blob directory.

        It has all that a FileStorage needs to find the blobs: one takes any directory without a marker for a lawn.
        """
        try:
            if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
                FilesystemHelper(path, "bushy").create()
            directory = cls(path)
            directory._helper.create()
            directory._sweep()
        except OSError as error:
            raise BlobDirectoryError(f"cannot make the blob directory {path}: {error.strerror}") from None
        return directory

    def _sweep(self) -> None:
        """Delete what somebody who was killed left in the folder for temporary files, long enough ago."""
        with os.scandir(self._helper.temp_dir) as entries:
            for entry in entries:
                if entry.name.startswith(_NEW) and entry.stat().st_mtime < time.time() - _ABANDONED_AFTER:
                    os.unlink(entry.path)

    def _look(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise BlobDirectoryError(f"the blob directory {self.path} cannot be read: {error.strerror}") from None
        return found.st_dev, found.st_ino

    def find(self, oid: bytes, tid: bytes) -> str | None:
        """The path of the file of blob (oid, tid), None if there is none.

        Raises BlobDirectoryError if that cannot be told: the directory is not there any more, not mounted for one.
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
        """Write blob (oid, tid) into ``target``; False if there is no such blob. The errors are those of `find`."""
        path = self.find(oid, tid)
        if path is None:
            return False
        target.clear()
        position = 0
        for data in _chunks(path):
            target.write_at(data, position)
            position += len(data)
        return True

    def files(self, foreign: Callable[[str], None]) -> Iterator[BlobFile]:
        """All blobs, in no useful order; ``foreign`` is called with the path of any file that is none.

        What lies in its folder for temporary files, and files that begin with a dot, is passed over.
        """
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
                if entry.name.startswith(".") or entry.path == os.path.join(self.path, "tmp"):
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

    def _parse(self, path: str) -> tuple[bytes, bytes] | None:
        inside = os.path.join(self._helper.base_dir, os.path.relpath(path, self.path))
        try:
            oid, tid = self._helper.splitBlobFilename(inside)
        except ValueError:  # binascii.Error is one
            return None
        if oid is None or len(oid) != 8 or len(tid) != 8:
            return None
        # Only what ZODB itself would find there.
        return (oid, tid) if self._helper.getBlobFilename(oid, tid) == inside else None

    def new_file(self) -> "NewBlobFile":
        """An empty file that can become the file of a blob. Raises BlobDirectoryError."""
        try:
            fd, path = tempfile.mkstemp(BLOB_SUFFIX, _NEW, self._helper.temp_dir)
        except OSError as error:
            raise BlobDirectoryError(f"cannot write to {self._helper.temp_dir}: {error.strerror}") from None
        os.close(fd)
        return NewBlobFile(path, self._helper)


class NewBlobFile:
    """A file on its way into a blob directory; belongs to whoever made it, until `publish` or `discard`.

    Its methods raise the OSErrors of the disk.
    """

    def __init__(self, path: str, helper: FilesystemHelper) -> None:
        self.path = path
        self._helper = helper

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start. Several threads may write different places."""
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(data)

    def clear(self) -> None:
        """Make it empty again."""
        os.truncate(self.path, 0)

    def publish(self, oid: bytes, tid: bytes) -> None:
        """Make it the file of blob (oid, tid), whole on the disk and, as ZODB leaves it, read-only."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        # Not by the helper, which ends in an AssertionError when it cannot.
        folder = self._helper.getPathForOID(oid)
        os.makedirs(folder, exist_ok=True)
        os.chmod(self.path, stat.S_IRUSR | os.stat(folder).st_mode & (stat.S_IRGRP | stat.S_IROTH))
        os.rename(self.path, self._helper.getBlobFilename(oid, tid))

    def discard(self) -> None:
        """Delete it, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _chunks(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while data := file.read(_READ):
                yield data
    except OSError as error:
        raise BlobDirectoryError(f"the blob file {path} cannot be read: {error.strerror}") from None


def _layout(path: str) -> str:
    """The layout of the blob directory ``path``."""
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
            f"{path} is the blob cache of a ZEO client, which need not have all blobs: name the blob-dir of the server"
        )
    if layout not in _LAYOUTS:
        raise BlobDirectoryError(f"{path} is no ZODB blob directory: it has no blobs and no {LAYOUT_MARKER} file")
    return layout


def _guess(path: str) -> str:
    # ZODB takes anything without a marker for a lawn; but copies of bushy ones lose it where `*` leaves out dotfiles.
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if name.startswith("0x") and os.path.isdir(folder):
            inside = os.listdir(folder)
            # Of bytes only: there may be folders of other software, such as snapshots, in each.
            if any(one.startswith("0x") and os.path.isdir(os.path.join(folder, one)) for one in inside):
                return "bushy"
            if any(one.endswith(BLOB_SUFFIX) for one in inside):
                return "lawn"
    return ""
