"""The directory of the cache: its lock, its contents, and the path of each file.

    {directory}/tmp/                                   the temporary files of ZODB and ZEO
    {directory}/incoming/                              blobs on their way into the bucket or into the cache, and what
                                                       has been evicted but not yet deleted
    {directory}/blobs/{last byte of oid}/{oid}.{tid}.blob

The modification time of a file is the time of its last use, so that the order of eviction survives a restart.
"""

import errno
import itertools
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zc.lockfile

from .. import predecessor
from ..errors import S3BlobsError
from ..metrics import Metrics
from ..openfiles import RAISE_THEIR_NUMBER, TOO_MANY_FILES
from ..revision import Revision

logger = logging.getLogger(__name__)

#: The errors of a full disk or quota.
FULL = (errno.ENOSPC, errno.EDQUOT)

_LOCK_FILE = ".zodb-s3blobs.lock"

#: The folder of the cache directory that holds the blobs.
_BLOBS = "blobs"

#: Error of a write -> advice.
_ADVICE = {
    **dict.fromkeys(FULL, "free space on its disk or lower cache-size"),
    **dict.fromkeys(TOO_MANY_FILES, RAISE_THEIR_NUMBER),
    errno.EROFS: "find out why its file system is read-only, and mount it for writing",
    errno.ENOENT: "the directory or a part of it is missing: mount its disk, or restart the server, which recreates it",
}


class CacheDirectoryError(S3BlobsError, ValueError):
    """The cache directory cannot be used; the message says why, and what to do."""


class CacheError(S3BlobsError, OSError):
    """A file could not be written to the cache directory; the message says why, and what to do."""


def path_in(directory: str | os.PathLike[str], oid: bytes, tid: bytes) -> str:
    """Return the path that the blob's file has if the cache ``directory`` has it. A file at that path is complete."""
    return os.path.join(directory, _BLOBS, f"{oid[-1]:02x}", f"{oid.hex()}.{tid.hex()}.blob")


class CacheDirectory:
    """The directory at ``path``, made if missing, which belongs to this object alone until `close`.

    ``metrics``: those of the storage. Raises `CacheDirectoryError` if the directory cannot be written, belongs to
    another process, or is not a cache and not empty. Any thread may call.
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Metrics) -> None:
        self.path = Path(path).absolute()
        self.temporary = self.path / "tmp"
        self.incoming = self.path / "incoming"
        self._blobs = self.path / _BLOBS
        self._aside = itertools.count()
        self._metrics = metrics
        self._lock_file = self._take()
        try:
            self._prepare()
        except OSError as error:
            self._lock_file.close()
            raise CacheDirectoryError(f"{self.path} cannot be used: {error}") from error

    def _take(self) -> zc.lockfile.LockFile:
        """Make the directory, or refuse one that is not a cache; lock it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_foreign()
            return zc.lockfile.LockFile(str(self.path / _LOCK_FILE))
        except zc.lockfile.LockError:
            raise CacheDirectoryError(
                f"{self.path} is in use by another process; every storage of every process needs its own"
            ) from None
        except FileExistsError:
            raise CacheDirectoryError(f"{self.path} is not a directory") from None
        except OSError as error:
            raise CacheDirectoryError(f"{self.path} cannot be used: {error.strerror or error}") from error

    def _refuse_foreign(self) -> None:
        if predecessor.is_cache(self.path):
            raise CacheDirectoryError(
                f"{self.path} holds the cache of {predecessor.NAME}: name a new directory, and delete this one when "
                f"nothing uses it any more"
            )
        if not (self.path / _LOCK_FILE).exists():
            strangers = [name for name in os.listdir(self.path) if name != "lost+found"]
            if strangers:
                raise CacheDirectoryError(
                    f"{self.path} is not empty and is not a blob cache (it holds {sorted(strangers)[0]!r}): name an "
                    f"empty or new directory"
                )

    def _prepare(self) -> None:
        """Delete the temporary files of a crashed process, and make the folders. The caller holds the lock."""
        self._mode = stat.S_IMODE(self.path.stat().st_mode)
        for directory in (self.temporary, self.incoming):
            if directory.exists():
                shutil.rmtree(directory)
        for directory in (self.temporary, self.incoming, self._blobs):
            directory.mkdir(mode=self._mode, exist_ok=True)
        # Readable for all who may read the directory, and read-only, since a blob never changes.
        self._file_mode = stat.S_IMODE(self._blobs.stat().st_mode) & 0o444
        if self._mode & 0o007:
            logger.warning(
                "%s is open to every user of this machine, and so are the blobs in it: chmod o-rwx", self.path
            )

    def close(self) -> None:
        """Release the lock. Files stay."""
        self._lock_file.close()

    def file(self, name: Revision) -> str:
        """Return the path that the blob's file has if it is in the cache."""
        return path_in(self.path, *name)

    def found(self) -> list[tuple[Revision, int]]:
        """Return the files of earlier runs with their sizes, the least recently used first."""
        found = []
        for folder in self._entries(self._blobs):
            for entry in self._entries(folder.path):
                name = _parse(entry.name)
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if name is None or entry.path != self.file(name) or not stat.S_ISREG(status.st_mode):
                    logger.warning("Ignoring %s: it is not a file of the cache. Move it out of cache-dir", entry.path)
                else:
                    found.append((status.st_mtime_ns, name, status.st_size))
        found.sort()
        return [(name, size) for _, name, size in found]

    def _entries(self, directory: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                yield from entries
        except (FileNotFoundError, NotADirectoryError):
            pass  # evicted meanwhile, or not a folder of the cache
        except OSError as error:
            self._metrics.cache_errors.labels("read").inc()
            logger.error("Cannot read %s: %s; its files do not count towards cache-size", directory, error)

    def size_of(self, name: Revision) -> int | None:
        """Return the size in bytes of the blob's file; None if it is missing, unreadable, or not a regular file."""
        path = self.file(name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        except OSError as error:  # the blob is in the bucket as well
            self._metrics.cache_errors.labels("read").inc()
            logger.error("Cannot read %s: %s", path, error)
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def touch(self, filename: str) -> None:
        """Set the time of the last use of ``filename`` to now."""
        now = time.time_ns()
        try:
            os.utime(filename, ns=(now, now))
        except OSError:
            pass  # the file system is read-only: only the order of eviction after the next start suffers

    def last_use(self, name: Revision) -> float:
        """Return the time of the file's last use, in seconds since 1970; 0 if the file is missing."""
        try:
            return os.stat(self.file(name)).st_mtime
        except FileNotFoundError:
            return 0

    def protect(self, filename: str) -> None:
        """Set the mode of ``filename`` to that of files in the cache: read-only."""
        os.chmod(filename, self._file_mode)

    def move_in(self, filename: str, name: Revision) -> None:
        """Rename ``filename`` to the path of the blob's file."""
        path = self.file(name)
        os.makedirs(os.path.dirname(path), mode=self._mode, exist_ok=True)
        os.replace(filename, path)

    def put_aside(self, name: Revision) -> str | None:
        """Rename the blob's file, so that it is not in the cache any more; return its path. None if that fails."""
        aside = f"{self.incoming}/evicted.{next(self._aside)}"
        try:
            os.rename(self.file(name), aside)
        except OSError:
            return None
        return aside

    def delete(self, filename: str) -> None:
        """Delete ``filename`` if it exists; never raise."""
        try:
            os.unlink(filename)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._metrics.cache_errors.labels("delete").inc()
            logger.error("Cannot delete %s: %s", filename, error)

    def tidy(self, name: Revision) -> None:
        """Delete the folder of the blob's file if it is empty."""
        try:
            os.rmdir(os.path.dirname(self.file(name)))
        except OSError:
            pass  # other blobs are in it

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of the body, which writes files below the directory, into a CacheError."""
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            self._metrics.cache_errors.labels("write").inc()
            advice = _ADVICE.get(error.errno or 0, "check its permissions")
            raise CacheError(f"Cannot write to cache-dir {self.path}: {error.strerror}; {advice}") from error


def _parse(filename: str) -> Revision | None:
    parts = filename.split(".")
    try:
        oid, tid = bytes.fromhex(parts[0]), bytes.fromhex(parts[1])
    except (ValueError, IndexError):
        return None
    return Revision(oid, tid) if parts[2:] == ["blob"] and len(oid) == len(tid) == 8 else None
