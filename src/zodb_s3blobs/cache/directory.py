"""The directory of the cache: its lock, its contents, and the path of each file.

    {directory}/tmp/                                   the temporary files of ZODB and ZEO
    {directory}/incoming/                              blobs on their way into the bucket or into the cache, and what
                                                       has been evicted but not yet deleted
    {directory}/index                                  which blobs it has, with their checksums: see journal.py
    {directory}/warm/                                  blobs that a command has fetched: see warmed.py
    {directory}/blobs/{last byte of oid}/{oid}.{tid}.blob

The modification time of a file follows from its name, so that a file that is changed afterwards, or replaced by
another, is seen without reading it.
"""

import errno
import itertools
import logging
import os
import shutil
import stat
import zlib
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

_INDEX = "index"

#: The folder of the cache directory with what `warm` has fetched.
WARM = "warm"

#: The names in a cache directory that a server has not used yet.
_BEFORE_USE = ("lost+found", WARM)

#: The largest block of a file system; what a network file system tells beyond it is how much it sends at once.
_LARGEST_BLOCK = 64 << 10

#: The earliest modification time of a file, in seconds: the beginning of 2000.
_EPOCH = 946_684_800

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


def blob_files(directory: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the files that the cache ``directory`` has, folder by folder. Raises OSError."""
    with os.scandir(os.path.join(directory, _BLOBS)) as folders:
        for folder in folders:
            try:
                with os.scandir(folder.path) as files:
                    yield from files
            except (FileNotFoundError, NotADirectoryError):
                pass  # evicted meanwhile, or not a folder of the cache


def refuse_foreign(path: Path) -> None:
    """Raise CacheDirectoryError if the directory ``path`` is neither a cache nor empty."""
    if predecessor.is_cache(path):
        raise CacheDirectoryError(
            f"{path} holds the cache of {predecessor.NAME}: name a new directory, and delete this one when nothing "
            f"uses it any more"
        )
    if not (path / _LOCK_FILE).exists():
        strangers = [name for name in os.listdir(path) if name not in _BEFORE_USE]
        if strangers:
            raise CacheDirectoryError(
                f"{path} is not empty and is not a blob cache (it holds {sorted(strangers)[0]!r}): name an empty or "
                f"new directory"
            )


def cannot_write(path: str | os.PathLike[str], error: OSError) -> CacheError:
    """Return the error of a failed write below the cache directory ``path``, with advice."""
    advice = _ADVICE.get(error.errno or 0, "check its permissions")
    return CacheError(f"Cannot write to cache-dir {path}: {error.strerror}; {advice}")


class CacheDirectory:
    """The directory at ``path``, made if missing, which belongs to this object alone until `close`.

    ``metrics``: those of the storage. Raises `CacheDirectoryError` if the directory cannot be written, belongs to
    another process, or is not a cache and not empty. Any thread may call.
    """

    def __init__(self, path: str | os.PathLike[str], metrics: Metrics) -> None:
        self.path = Path(path).absolute()
        self.temporary = self.path / "tmp"
        self.incoming = self.path / "incoming"
        self.index = self.path / _INDEX
        self._blobs = self.path / _BLOBS
        self._numbers = itertools.count()
        self._metrics = metrics
        self._lock_file = self._take()
        try:
            self._prepare()
        except OSError as error:
            self._lock_file.close()
            raise CacheDirectoryError(
                f"{self.path} cannot be used: {error.filename or self.path}: {error.strerror or error}; all of it must "
                f"belong to this process's user: correct that, or delete the directory"
            ) from error

    def _take(self) -> zc.lockfile.LockFile:
        """Make the directory, or refuse one that is not a cache; lock it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_foreign(self.path)
            return zc.lockfile.LockFile(str(self.path / _LOCK_FILE))
        except zc.lockfile.LockError:
            raise CacheDirectoryError(
                f"{self.path} is in use by another process, or by another section of this one: name a directory of its "
                f"own for each section of each process"
            ) from None
        except FileExistsError:
            raise CacheDirectoryError(f"{self.path} is not a directory") from None
        except OSError as error:
            raise CacheDirectoryError(
                f"{self.path} cannot be used: {error.strerror or error}; name a directory that this process's user may "
                f"make and write to"
            ) from error

    def _prepare(self) -> None:
        """Delete the temporary files of a crashed process, and make the folders. The caller holds the lock."""
        self._mode = stat.S_IMODE(self.path.stat().st_mode)
        for directory in (self.temporary, self.incoming):
            if directory.exists():
                shutil.rmtree(directory)
        for directory in (self.temporary, self.incoming, self._blobs):
            directory.mkdir(mode=self._mode, exist_ok=True)
        if self.index.is_symlink() or (self.index.exists() and not self.index.is_file()):
            os.rename(self.index, self.incoming / _INDEX)
        #: The bytes that each file takes a multiple of.
        self.block = block_of(self._blobs)
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

    def files(self) -> Iterator[list[Revision]]:
        """Yield the blobs whose files are there, folder by folder."""
        for folder in self._entries(self._blobs):
            found = []
            for entry in self._entries(folder.path):
                name = _parse(entry.name)
                if name is None or entry.path != self.file(name) or not entry.is_file(follow_symlinks=False):
                    logger.warning("Ignoring %s: it is not a file of the cache. Move it out of cache-dir", entry.path)
                else:
                    found.append(name)
            yield found

    def _entries(self, directory: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                yield from entries
        except (FileNotFoundError, NotADirectoryError):
            pass  # evicted meanwhile, or not a folder of the cache
        except OSError as error:
            self._metrics.cache_errors.labels("read").inc()
            logger.error("Cannot read %s: %s; files in it that nobody needs are not deleted", directory, error)

    def damage(self, name: Revision, size: int, is_marked: bool) -> str | None:
        """Return why the blob's file, of ``size`` bytes, must not be served; None if nothing speaks against it.

        ``is_marked``: `mark` was called. Does not read the file. Raises FileNotFoundError if it is missing.
        """
        try:
            status = os.lstat(self.file(name))
        except FileNotFoundError:
            raise
        except OSError as error:
            return str(error)
        if not stat.S_ISREG(status.st_mode):
            return "it is not a regular file"
        if status.st_size != size:
            return f"it has {status.st_size} bytes in place of {size}"
        if is_marked and status.st_mtime != _time_of(name):
            return "it was changed or replaced"
        if not status.st_mode & stat.S_IRUSR:
            return "it is not readable"
        return None

    def new_path(self) -> str:
        """Return a path for a blob on its way, where there is no file yet."""
        return f"{self.incoming}/new.{next(self._numbers)}"  # nobody else writes there, and each start empties it

    def mark(self, filename: str, name: Revision) -> None:
        """Give ``filename``, which has the right bytes, the mode and the modification time of the blob's file."""
        os.chmod(filename, self._file_mode)
        os.utime(filename, (_time_of(name), _time_of(name)))

    def move_in(self, filename: str, name: Revision) -> None:
        """Rename ``filename`` to the path of the blob's file."""
        path = self.file(name)
        try:
            os.replace(filename, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=self._mode, exist_ok=True)
            os.replace(filename, path)
        except IsADirectoryError:
            self.put_aside(name)
            os.replace(filename, path)

    def put_aside(self, name: Revision) -> str | None:
        """Rename the blob's file, so that it is not in the cache any more; return its path. None if that fails."""
        aside = f"{self.incoming}/evicted.{next(self._numbers)}"
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
            raise cannot_write(self.path, error) from error


def block_of(path: str | os.PathLike[str]) -> int:
    """Return the bytes that each file in the directory ``path`` takes a multiple of."""
    block = os.statvfs(path).f_frsize
    return block if 0 < block <= _LARGEST_BLOCK else 4096


def _time_of(name: Revision) -> int:
    # Even, as coarse file systems keep it.
    return _EPOCH + 2 * (zlib.crc32(name[0] + name[1]) >> 5)


def _parse(filename: str) -> Revision | None:
    parts = filename.split(".")
    try:
        oid, tid = bytes.fromhex(parts[0]), bytes.fromhex(parts[1])
    except (ValueError, IndexError):
        return None
    return Revision(oid, tid) if parts[2:] == ["blob"] and len(oid) == len(tid) == 8 else None
