"""The LRU file cache of committed blobs: pins, atomic publication, eviction.

Knows nothing of S3 or ZODB. A file in the cache is named by its (oid, tid), is complete, and never changes. All sizes
are in bytes. Every method may be called from any thread, and none waits for more than a few file system calls.
"""

import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from ZODB.blob import rename_or_copy_blob

from ..metrics import Metrics
from ..revision import Revision
from .directory import FULL, CacheDirectory, CacheError
from .index import Entry, LruIndex

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long, in seconds, a file whose path was handed out stays, so that whoever asked can open it.
GRACE = 10.0

#: How many files one call evicts at most, so that it does not hold up the event loop.
_EVICTED_AT_ONCE = 50


class Pin:
    """A cached file that is not evicted before `release`; a context manager that gives its path."""

    def __init__(self, cache: "Cache", name: Revision, path: str, entry: Entry) -> None:
        self.path = path
        self._cache = cache
        self._name = name
        self._entry: Entry | None = entry

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the file go; a second call does nothing."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._cache._unpin(self._name, entry)

    @property
    def size(self) -> int:
        """The bytes of the file; only before `release`."""
        assert self._entry is not None
        return self._entry.size

    def again(self) -> "Pin":
        """One more pin of the same file; only before `release`."""
        assert self._entry is not None
        return self._cache._pin_again(self._name, self.path, self._entry)

    def release_later(self) -> str:
        """Release the pin `GRACE` seconds from now; return the path."""
        self._cache._release_later(self.again())
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
            return self._cache._publish(Revision(oid, tid), self.path)

    def discard(self) -> None:
        """Delete it, if it is still there; never raises."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._cache._metrics.cache_errors.labels("delete").inc()
            logger.error("Cannot delete %s: %s", self.path, error)


class Cache:
    """The files of one cache directory, which belongs to this object alone until `close`.

    ``directory``: made if missing; ``limit``: how many bytes of files to keep; ``metrics``: those of the storage.
    Raises `directory.CacheDirectoryError` if the directory cannot be written, belongs to another process, or holds
    something else than a cache.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._folder = CacheDirectory(directory, metrics)
        self.directory = self._folder.path
        self.temporary = self._folder.temporary
        self.limit = limit
        self._lock = threading.RLock()
        self._index = LruIndex(limit)
        self._evicting = False  # whether a thread is evicting what one call did not
        self._due: deque[tuple[float, Pin]] = deque()
        self._timer_runs = False
        self._read = threading.Event()
        self._closed = False
        metrics.cache_limit.set(limit)
        metrics.cache_size.set_function(lambda: self.size)
        metrics.cache_files.set_function(lambda: len(self))
        metrics.cache_pinned.set_function(self._pinned_bytes)
        metrics.cache_oldest_access.set_function(self._oldest_access)
        metrics.cache_free.set_function(lambda: shutil.disk_usage(self.directory).free)
        threading.Thread(target=self._read_directory, name="s3blobs cache index", daemon=True).start()

    def _read_directory(self) -> None:
        """Find the files of earlier runs."""
        found = self._folder.found()
        with self._lock:  # for as short as can be: whoever reads or commits waits meanwhile
            self._index.add_found(found)
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
            self._folder.close()

    # Files

    def path(self, oid: bytes, tid: bytes) -> str:
        """Return where the blob's file is if it is in the cache."""
        return self._folder.file(Revision(oid, tid))

    def get(self, oid: bytes, tid: bytes) -> Pin | None:
        """Return the blob's file, pinned, or None if it is not in the cache."""
        name = Revision(oid, tid)
        with self._lock:
            size = self._folder.size_of(name)
            if size is None:
                self._index.remove(name)
                return None
            self._folder.touch(self.path(oid, tid))
            if name not in self._index:
                if self._index.is_complete:
                    # Not ours to serve: a file that somebody else put here.
                    return None
                self._index.put(name, size)
            return self._pin(name)

    def new_file(self) -> Incoming:
        """Make an empty file to write a blob into."""
        with self.writing():
            fd, path = self._when_full(lambda: tempfile.mkstemp(dir=self._folder.incoming), 1)
            os.close(fd)
        return Incoming(self, path)

    def new_temporary(self) -> tuple[int, str]:
        """Return an empty file in `temporary`, and its open descriptor; CacheError if there can be none."""
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

    def writing(self) -> AbstractContextManager[None]:
        """Turn an OSError of the body, which writes files below `directory`, into a CacheError."""
        return self._folder.writing()

    def write(self, fd: int, data: bytes) -> None:
        """Write all of ``data`` to a file of this directory, evicting blobs if the disk is full; or CacheError."""
        view = memoryview(data)
        with self.writing():
            while view:
                view = view[self._when_full(functools.partial(os.write, fd, view), len(view)) :]

    def remove(self, oid: bytes, tid: bytes) -> None:
        """Drop a blob that is dead; it is no error if it is not there."""
        with self._lock:
            self._remove(Revision(oid, tid))

    @property
    def size(self) -> int:
        """The bytes of all files in the cache."""
        return self._index.size

    def __len__(self) -> int:
        """Return the number of files in the cache."""
        return len(self._index)

    def _pinned_bytes(self) -> int:
        with self._lock:
            return self._index.pinned_bytes

    def _oldest_access(self) -> float:
        with self._lock:
            oldest = self._index.oldest()
        return self._folder.last_use(oldest[0]) if oldest is not None else 0

    # Pins

    def _pin(self, name: Revision) -> Pin:
        return Pin(self, name, self._folder.file(name), self._index.pin(name))

    def _unpin(self, name: Revision, entry: Entry) -> None:
        with self._lock:
            if not self._index.unpin(name, entry):
                return
            if entry.size > self.limit and not self._closed:
                # Larger than the whole cache: read it may be, but not at the price of everything else.
                self._evict_one(name, entry.size)
            else:
                self._evict()

    def _pin_again(self, name: Revision, path: str, entry: Entry) -> Pin:
        with self._lock:
            entry.pins += 1
        return Pin(self, name, path, entry)

    def _release_later(self, pin: Pin) -> None:
        with self._lock:
            self._due.append((time.monotonic() + GRACE, pin))
            if not self._timer_runs:
                self._timer_runs = True
                self._start_timer(GRACE)

    def _start_timer(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._release_due)
        timer.daemon = True
        timer.start()

    def _release_due(self) -> None:
        now = time.monotonic()
        with self._lock:  # to the end, so that no later timer can overtake and let younger files go first
            while self._due and self._due[0][0] <= now:
                self._due.popleft()[1].release()
            self._timer_runs = bool(self._due)
            if self._due:
                self._start_timer(self._due[0][0] - now)

    # Publication and eviction

    def _publish(self, name: Revision, filename: str) -> Pin:
        with self._lock:
            if self._closed:
                raise CacheError(f"The cache in {self.directory} has been closed")
            size = os.stat(filename).st_size
            self._folder.touch(filename)  # its times are those of its writing, wherever that was
            self._folder.protect(filename)
            self._when_full(functools.partial(self._folder.move_in, filename, name), 1)
            self._index.put(name, size)  # if it is the same blob again: whoever reads the old file goes on with it
            pin = self._pin(name)
            self._evict()
        return pin

    def _when_full(self, work: Callable[[], T], needed: int) -> T:
        """Do ``work``; as long as it fails for a full disk, evict at least ``needed`` bytes and do it again."""
        while True:
            try:
                return work()
            except OSError as error:
                if error.errno not in FULL or not self._make_room(needed):
                    raise
                logger.warning("The disk of %s is full: evicted blobs to make room", self.directory)

    def _make_room(self, needed: int) -> bool:
        with self._lock:
            target = self.size - needed
            evicted = False
            while self.size > target and (oldest := self._index.oldest()) is not None:
                self._evict_one(*oldest)
                evicted = True
            return evicted

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
            oldest = self._index.oldest() if self._is_over_limit() else None
            if oldest is None:
                return
            self._evict_one(*oldest)

    def _is_over_limit(self) -> bool:
        # After the end, the directory may belong to another process.
        return not self._closed and self._index.is_over_limit()

    def _evict_one(self, name: Revision, size: int) -> None:
        self._metrics.cache_evictions.inc()
        self._metrics.cache_evicted_bytes.inc(size)
        self._remove(name)

    def _remove(self, name: Revision) -> None:
        self._folder.delete(name)
        self._index.remove(name)
        self._folder.tidy(name)
