"""The LRU file cache of committed blobs: index, limit, pins, atomic publication.

Knows nothing of S3 or ZODB. A file in the cache is named by its (oid, tid), is complete, and never changes:

    {directory}/tmp/                                   the temporary files of ZODB and ZEO
    {directory}/incoming/                              blobs on their way into the bucket or into the cache
    {directory}/blobs/{last byte of oid}/{oid}.{tid}.blob

The modification time of a file is the time of its last use: that is how the order survives a restart. All sizes
are in bytes. Every method may be called from any thread, and none waits for more than a few file system calls.
"""

import errno
import functools
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import zc.lockfile
from ZODB.blob import rename_or_copy_blob

from .. import predecessor
from ..errors import S3BlobsError
from ..metrics import Metrics
from ..openfiles import RAISE_THEIR_NUMBER, TOO_MANY_FILES

logger = logging.getLogger(__name__)

T = TypeVar("T")
Name = tuple[bytes, bytes]  # (oid, tid)

#: How long, in seconds, a file whose path was handed out stays, so that whoever asked can open it.
LEASE = 10.0

#: How many files one call evicts at most, so that it does not hold up the event loop.
_EVICTED_AT_ONCE = 50

_LOCK_FILE = ".zodb-s3blobs.lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What to do about a file that cannot be written.
_ADVICE = {
    **dict.fromkeys(_FULL, "free space on its disk or lower cache-size"),
    **dict.fromkeys(TOO_MANY_FILES, RAISE_THEIR_NUMBER),
    errno.EROFS: "look why its file system is read-only, and mount it for writing",
    errno.ENOENT: "it is gone, or a part of it: mount its disk, or restart the server, which makes it again",
}


class CacheDirectoryError(S3BlobsError, ValueError):
    """The cache directory cannot be used; the message says why and what to do."""


#: The folder of the cache directory that holds the blobs.
_BLOBS = "blobs"


class CacheError(S3BlobsError, OSError):
    """A file could not be written to the cache directory; the message says why and what to do."""


class Pin:
    """A cached file that is not evicted before `release`; a context manager that gives its path."""

    def __init__(self, cache: "Cache", name: Name, path: str, pinned: "_Pinned") -> None:
        self.path = path
        self._cache = cache
        self._name = name
        self._pinned: _Pinned | None = pinned

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the file go; a second call does nothing."""
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            self._cache._unpin(self._name, pinned)

    @property
    def size(self) -> int:
        """The bytes of the file; only before `release`."""
        assert self._pinned is not None
        return self._pinned.size

    def again(self) -> "Pin":
        """One more pin of the same file; only before `release`."""
        assert self._pinned is not None
        return self._cache._pin_again(self._name, self.path, self._pinned)

    def lease(self) -> str:
        """The path; the file stays `LEASE` seconds from now."""
        self._cache._lease(self.again())
        self.release()
        return self.path


class Incoming:
    """A file that is not yet a blob of the cache: being downloaded, or waiting for its transaction's end.

    Belongs to whoever made it, until `publish` or `discard`. On a full disk its methods evict blobs to make room,
    and raise CacheError once there is nothing left to evict.
    """

    def __init__(self, cache: "Cache", path: str) -> None:
        self.path = path
        self._cache = cache

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start. Several threads may write different places."""
        with self._cache.writing(), open(self.path, "r+b", buffering=0) as file:
            file.seek(position)
            self._cache.write(file.fileno(), data)

    def clear(self) -> None:
        """Make it empty again."""
        with self._cache.writing():
            os.truncate(self.path, 0)

    def sync(self) -> None:
        """Wait until its bytes are on the disk: or a power cut could leave half a file where only whole ones may be."""
        # Not tried again on a full disk: the system may have dropped what it could not write, and say so only once.
        with self._cache.writing(), open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def publish(self, oid: bytes, tid: bytes) -> Pin:
        """Make it the blob's file in the cache; returns that, pinned. The file must be complete and synced."""
        with self._cache.writing():
            return self._cache._publish((oid, tid), self.path)

    def discard(self) -> None:
        """Delete it, if it is still there; never raises."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._cache._metrics.cache_errors.labels("delete").inc()
            logger.error("Cannot delete %s: %s", self.path, error)


@dataclass
class _Pinned:
    size: int
    pins: int = 0


def path_in(directory: str | os.PathLike[str], oid: bytes, tid: bytes) -> str:
    """Where the blob's file is in the cache directory, if it is in the cache. A file there is whole."""
    return os.path.join(directory, _BLOBS, f"{oid[-1]:02x}", f"{oid.hex()}.{tid.hex()}.blob")


class Cache:
    """The files of one cache directory, which belongs to this object alone until `close`.

    ``directory``: made if missing; ``limit``: how many bytes of files to keep; ``metrics``: those of the storage.
    Raises `CacheDirectoryError` if the directory cannot be written, belongs to another process, or holds something
    else than a cache.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int, metrics: Metrics) -> None:
        self.directory = Path(directory).absolute()
        self.limit = limit
        self._metrics = metrics
        self.temporary = self.directory / "tmp"
        self._incoming = self.directory / "incoming"
        self._blobs = self.directory / _BLOBS
        self._lock = threading.RLock()
        self._unused: OrderedDict[Name, int] = OrderedDict()  # name -> size, least recent first
        self._pinned: dict[Name, _Pinned] = {}
        self._size = 0  # of all files
        self._oversized = 0  # of those among the pinned ones that are larger than the limit, and do not count for it
        self._evicting = False  # whether a thread is evicting what one call did not
        self._leases: deque[tuple[float, Pin]] = deque()
        self._lease_timer_runs = False
        # While the directory is still being read: what was removed meanwhile and must not be found again.
        self._removed_while_reading: set[Name] | None = set()
        self._read = threading.Event()
        self._closed = False
        self._take_directory()
        metrics.cache_limit.set(limit)
        metrics.cache_size.set_function(lambda: self._size)
        metrics.cache_files.set_function(lambda: len(self))
        metrics.cache_pinned.set_function(self._pinned_bytes)
        metrics.cache_oldest_access.set_function(self._oldest_access)
        metrics.cache_free.set_function(lambda: shutil.disk_usage(self.directory).free)
        threading.Thread(target=self._read_directory, name="s3blobs cache index", daemon=True).start()

    # The directory

    def _take_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if predecessor.is_cache(self.directory):
                raise CacheDirectoryError(
                    f"{self.directory} holds the cache of {predecessor.NAME}: name a new directory, and delete this "
                    f"one when nothing uses it any more"
                )
            if not (self.directory / _LOCK_FILE).exists():
                strangers = [name for name in os.listdir(self.directory) if name != "lost+found"]
                if strangers:
                    raise CacheDirectoryError(
                        f"{self.directory} holds files that are no blob cache ({sorted(strangers)[0]!r} for one); "
                        f"name an empty or new directory"
                    )
            self._lock_file = zc.lockfile.LockFile(str(self.directory / _LOCK_FILE))
        except zc.lockfile.LockError:
            raise CacheDirectoryError(
                f"{self.directory} is in use by another process; every storage of every process needs its own"
            ) from None
        except FileExistsError:
            raise CacheDirectoryError(f"{self.directory} is not a directory") from None
        except OSError as error:
            raise CacheDirectoryError(f"{self.directory} cannot be used: {error.strerror or error}") from error
        try:
            self._mode = stat.S_IMODE(self.directory.stat().st_mode)
            # What a crash left behind. Nobody is using it: the lock is ours.
            for directory in (self.temporary, self._incoming):
                if directory.exists():
                    shutil.rmtree(directory)
            for directory in (self.temporary, self._incoming, self._blobs):
                directory.mkdir(mode=self._mode, exist_ok=True)
            # Readable for those who may read the directory, writable for nobody.
            self._file_mode = stat.S_IMODE(self._blobs.stat().st_mode) & 0o444
            if self._mode & 0o007:
                logger.warning(
                    "%s is open to every user of this machine, and so are the blobs in it: chmod o-rwx", self.directory
                )
        except OSError as error:
            self._lock_file.close()
            raise CacheDirectoryError(f"{self.directory} cannot be used: {error}") from error

    def _read_directory(self) -> None:
        """Find the files of earlier runs; those used since the start are newer than all of them."""
        found = []
        for folder in _entries(self._blobs, self._metrics):
            for entry in _entries(folder.path, self._metrics):
                name = _parse(entry.name)
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if name is None or entry.path != self.path(*name) or not stat.S_ISREG(status.st_mode):
                    logger.warning("%s is no file of this cache and is left alone", entry.path)
                else:
                    found.append((status.st_mtime_ns, name, status.st_size))
        found.sort()
        index = OrderedDict((name, size) for _, name, size in found)
        with self._lock:  # for as short as can be: whoever reads or commits waits meanwhile
            for name in (*(self._removed_while_reading or ()), *self._unused, *self._pinned):
                index.pop(name, None)
            self._size += sum(index.values())
            index.update(self._unused)
            self._unused = index
            self._removed_while_reading = None
            for name in [name for name, size in index.items() if size > self.limit]:
                index.move_to_end(name, last=False)  # the limit was larger once: let them go first
        self._evict_rest()
        self._read.set()
        logger.info("The cache in %s holds %d blobs, %d bytes", self.directory, len(self), self.size)

    def wait_until_read(self, timeout: float | None = None) -> bool:
        """Wait until the files of earlier runs are all known; False if that took longer than ``timeout`` seconds."""
        return self._read.wait(timeout)

    def close(self) -> None:
        """Give up the directory. Files stay and can still be found by `get`."""
        with self._lock:
            self._closed = True
            self._lock_file.close()

    # Files

    def path(self, oid: bytes, tid: bytes) -> str:
        """Where the blob's file is if it is in the cache."""
        return path_in(self.directory, oid, tid)

    def get(self, oid: bytes, tid: bytes) -> Pin | None:
        """The blob's file, pinned, or None if it is not in the cache."""
        name = oid, tid
        path = self.path(oid, tid)
        with self._lock:
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                self._forget(name)
                return None
            except OSError as error:  # it is in the bucket as well
                self._metrics.cache_errors.labels("read").inc()
                logger.error("Cannot read %s: %s", path, error)
                self._forget(name)
                return None
            if not stat.S_ISREG(status.st_mode):
                return None  # as in `_read_directory`: what a link leads to is none of ours
            size = status.st_size
            self._touch(path)
            if name not in self._pinned and name not in self._unused:
                if self._removed_while_reading is None:
                    # Not ours to serve: a file that somebody else put here.
                    return None
                self._unused[name] = size
                self._size += size
            return self._pin(name, path)

    def new_file(self) -> Incoming:
        """An empty file to write a blob into."""
        with self.writing():
            fd, path = self._when_full(lambda: tempfile.mkstemp(dir=self._incoming), 1)
            os.close(fd)
        return Incoming(self, path)

    def new_temporary(self) -> tuple[int, str]:
        """An empty file in `temporary`, and its open descriptor; CacheError if there can be none."""
        with self.writing():
            return self._when_full(lambda: tempfile.mkstemp(dir=self.temporary), 1)

    def adopt(self, filename: str) -> Incoming:
        """Take the complete file ``filename`` over: a rename, or a copy if it is on another file system."""
        incoming = self.new_file()
        try:
            with self.writing():
                size = os.path.getsize(filename)
                self._when_full(lambda: rename_or_copy_blob(filename, incoming.path, chmod=False), size)
        except BaseException:
            incoming.discard()
            raise
        return incoming

    def write(self, fd: int, data: bytes) -> None:
        """Write all of ``data`` to a file of this directory, evicting blobs if the disk is full; or CacheError."""
        view = memoryview(data)
        with self.writing():
            while view:
                view = view[self._when_full(functools.partial(os.write, fd, view), len(view)) :]

    def remove(self, oid: bytes, tid: bytes) -> None:
        """Drop a blob that is dead; it is no error if it is not there."""
        with self._lock:
            self._unlink((oid, tid))

    @property
    def size(self) -> int:
        """The bytes of all files in the cache."""
        return self._size

    def __len__(self) -> int:
        """The number of files in the cache."""
        return len(self._unused) + len(self._pinned)

    def _pinned_bytes(self) -> int:
        with self._lock:
            return sum(pinned.size for pinned in self._pinned.values())

    def _oldest_access(self) -> float:
        with self._lock:
            name = next(iter(self._unused), None)
        try:
            return os.stat(self.path(*name)).st_mtime if name is not None else 0
        except FileNotFoundError:
            return 0  # evicted meanwhile

    # Pins

    def _pin(self, name: Name, path: str) -> Pin:
        pinned = self._pinned.get(name)
        if pinned is None:
            pinned = self._pinned[name] = _Pinned(self._unused.pop(name))
            self._oversized += self._excess(pinned.size)
        pinned.pins += 1
        return Pin(self, name, path, pinned)

    def _unpin(self, name: Name, pinned: _Pinned) -> None:
        with self._lock:
            pinned.pins -= 1
            if pinned.pins or self._pinned.get(name) is not pinned:  # still in use, or removed meanwhile
                return
            del self._pinned[name]
            self._oversized -= self._excess(pinned.size)
            self._unused[name] = pinned.size
            if pinned.size > self.limit and not self._closed:
                # Larger than the whole cache: read it may be, but not at the price of everything else.
                self._evict_one(name)
            else:
                self._evict()

    def _lease(self, pin: Pin) -> None:
        with self._lock:
            self._leases.append((time.monotonic() + LEASE, pin))
            if not self._lease_timer_runs:
                self._lease_timer_runs = True
                self._start_timer(LEASE)

    def _start_timer(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._end_leases)
        timer.daemon = True
        timer.start()

    def _end_leases(self) -> None:
        now = time.monotonic()
        with self._lock:  # to the end, so that no later timer can overtake and let younger files go first
            while self._leases and self._leases[0][0] <= now:
                self._leases.popleft()[1].release()
            self._lease_timer_runs = bool(self._leases)
            if self._leases:
                self._start_timer(self._leases[0][0] - now)

    def _pin_again(self, name: Name, path: str, pinned: _Pinned) -> Pin:
        with self._lock:
            pinned.pins += 1
        return Pin(self, name, path, pinned)

    # Publication, size and eviction

    def _publish(self, name: Name, filename: str) -> Pin:
        path = self.path(*name)
        with self._lock:
            if self._closed:
                raise CacheError(f"The cache in {self.directory} has been closed")
            size = os.stat(filename).st_size
            self._touch(filename)  # its times are those of its writing, wherever that was
            os.chmod(filename, self._file_mode)
            self._when_full(functools.partial(self._move, filename, path), 1)
            pinned = self._pinned.get(name)
            if pinned is None:
                self._size += size - self._unused.pop(name, 0)
                self._unused[name] = size
            else:  # the same bytes again: whoever reads the old file goes on with it
                self._size += size - pinned.size
                self._oversized += self._excess(size) - self._excess(pinned.size)
                pinned.size = size
            pin = self._pin(name, path)
            self._evict()
        return pin

    def _move(self, filename: str, path: str) -> None:
        os.makedirs(os.path.dirname(path), mode=self._mode, exist_ok=True)
        os.replace(filename, path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The body writes files below `directory`: an OSError becomes a CacheError."""
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            self._metrics.cache_errors.labels("write").inc()
            advice = _ADVICE.get(error.errno or 0, "check its permissions")
            raise CacheError(f"Cannot write to cache-dir {self.directory}: {error.strerror}; {advice}") from error

    def _when_full(self, work: Callable[[], T], needed: int) -> T:
        """Do ``work``; as long as it fails for a full disk, evict at least ``needed`` bytes and do it again."""
        while True:
            try:
                return work()
            except OSError as error:
                if error.errno not in _FULL or not self._make_room(needed):
                    raise
                logger.warning("The disk of %s is full: evicted blobs to make room", self.directory)

    def _excess(self, size: int) -> int:
        # What a file that is larger than the whole cache adds to `_oversized` while it is pinned.
        return size if size > self.limit else 0

    def _evict(self) -> None:
        """Evict until the limit is kept; if that takes many files, let a thread of its own evict the rest.

        The lock is held, perhaps by a thread that must not wait long.
        """
        self._evict_some()
        if self._is_over_limit() and not self._evicting:
            self._evicting = True
            threading.Thread(target=self._evict_rest, name="s3blobs cache eviction", daemon=True).start()

    def _evict_rest(self) -> None:
        while True:
            with self._lock:
                self._evict_some()
                if not self._is_over_limit():
                    self._evicting = False
                    return
            time.sleep(0.001)  # or the others would not get the lock in between

    def _evict_some(self) -> None:
        for _ in range(_EVICTED_AT_ONCE):
            if not self._is_over_limit():
                return
            self._evict_one(next(iter(self._unused)))

    def _evict_one(self, name: Name) -> None:
        self._metrics.cache_evictions.inc()
        self._metrics.cache_evicted_bytes.inc(self._unused[name])
        self._unlink(name)

    def _is_over_limit(self) -> bool:
        """Whether there is something to evict and it is to be evicted."""
        if self._removed_while_reading is not None or self._closed or not self._unused:
            # The least recently used ones are not yet known, or the directory may belong to another process by now.
            return False
        return self._size - self._oversized > self.limit

    def _touch(self, path: str) -> None:
        now = time.time_ns()
        try:
            os.utime(path, ns=(now, now))
        except OSError:
            pass  # read-only by now: only the order after the next start suffers

    def _make_room(self, needed: int) -> bool:
        with self._lock:
            target = self._size - needed
            evicted = False
            while self._size > target and self._unused:
                self._evict_one(next(iter(self._unused)))
                evicted = True
            return evicted

    def _unlink(self, name: Name) -> None:
        path = self.path(*name)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._metrics.cache_errors.labels("delete").inc()
            logger.error("Cannot evict %s from the cache: %s", path, error)
        self._forget(name)
        try:
            os.rmdir(os.path.dirname(path))
        except OSError:
            pass  # other blobs are in it

    def _forget(self, name: Name) -> None:
        if self._removed_while_reading is not None:
            self._removed_while_reading.add(name)
        self._size -= self._unused.pop(name, 0)
        pinned = self._pinned.pop(name, None)
        if pinned is not None:
            self._size -= pinned.size
            self._oversized -= self._excess(pinned.size)


def _parse(filename: str) -> Name | None:
    parts = filename.split(".")
    try:
        oid, tid = bytes.fromhex(parts[0]), bytes.fromhex(parts[1])
    except (ValueError, IndexError):
        return None
    return (oid, tid) if parts[2:] == ["blob"] and len(oid) == len(tid) == 8 else None


def _entries(directory: str | os.PathLike[str], metrics: Metrics) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        pass  # evicted meanwhile, or not ours
    except OSError as error:
        metrics.cache_errors.labels("read").inc()
        logger.error("Cannot read %s: %s; what is in it does not count towards cache-size", directory, error)
