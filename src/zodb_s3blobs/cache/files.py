"""The LRU file cache of committed blobs: pins, atomic publication, eviction.

The cache does not use S3 or ZODB. A file in the cache is named by its (oid, tid), is complete, and never changes. All
sizes are in bytes. Any thread may call; no method but `close` waits for more than a few file system calls. What takes
longer, many publications or the deletion of a large file, a thread does in the background.
"""

import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from ZODB.blob import rename_or_copy_blob

from ..metrics import Metrics
from ..revision import Revision
from ..workers import DaemonPool
from .directory import FULL, CacheDirectory, CacheError
from .index import Entry, LruIndex

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long, in seconds, a file stays after its path was handed out, so that the caller can open the file.
GRACE = 10.0

#: The most files that one call evicts, so that it does not hold up the event loop.
_EVICTED_AT_ONCE = 50

#: The least bytes of a file whose deletion takes so long that it would hold up the event loop.
_LARGE = 64 << 20

#: The pause after each step of work in the background, in seconds; or other threads would not get the lock in between.
_PAUSE = 0.0002

#: How long, in seconds, `Cache.close` waits for the work in the background.
_CLOSE_TIMEOUT = 2.0


class Pin:
    """A cached file that is not evicted before `release`; a context manager that returns its path."""

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
        """Allow the eviction of the file; a second call does nothing."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._cache._unpin(self._name, entry)

    @property
    def size(self) -> int:
        """Size of the file in bytes; only before `release`."""
        assert self._entry is not None
        return self._entry.size

    def again(self) -> "Pin":
        """Return another pin of this file; only before `release`."""
        assert self._entry is not None
        return self._cache._pin_again(self._name, self.path, self._entry)

    def release_later(self) -> str:
        """Release the pin `GRACE` seconds from now; return the path."""
        self._cache._release_later(self.again())
        self.release()
        return self.path


class Incoming:
    """A file that is not yet a blob of the cache: a download in progress, or a blob of an unfinished transaction.

    The caller that made the file owns it until `publish`, `Cache.publish_later` or `discard`. On a full disk its
    methods evict blobs to make room, and raise CacheError once there is nothing left to evict.
    """

    __slots__ = ("_cache", "path")

    def __init__(self, cache: "Cache", path: str) -> None:
        self.path = path
        self._cache = cache

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start. Several threads may write to different positions."""
        with self._cache.writing(), open(self.path, "r+b", buffering=0) as file:
            file.seek(position)
            self._cache.write(file.fileno(), data)

    def clear(self) -> None:
        """Truncate the file to zero bytes."""
        with self._cache.writing():
            os.truncate(self.path, 0)

    def sync(self) -> None:
        """Wait until the file's bytes are on the disk; or a power cut could leave half a file in the cache."""
        # Not retried on a full disk: the system may have dropped the bytes, and reports that error only once.
        with self._cache.writing(), open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def publish(self, oid: bytes, tid: bytes) -> Pin:
        """Move the file into the cache as blob (oid, tid); return its pin. The file must be complete and synced."""
        with self._cache.writing():
            return self._cache._publish(Revision(oid, tid), self.path)

    def discard(self) -> None:
        """Delete the file if it still exists, a large one in the background; never raise."""
        self._cache._discard(self.path)


class Cache:
    """The files of one cache directory, which belongs to this object alone until `close`.

    ``directory``: made if missing; ``limit``: the most bytes of files to keep; ``metrics``: those of the storage.
    Raises `directory.CacheDirectoryError` if the directory cannot be written, belongs to another process, or is not a
    cache and not empty.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._folder = CacheDirectory(directory, metrics)
        self.directory = self._folder.path
        self.temporary = self._folder.temporary
        self.limit = limit
        self._lock = threading.RLock()
        self._index = LruIndex(limit)
        self._pending: dict[Revision, Incoming] = {}  # what `publish_later` has taken, the next one first
        self._publishing = False  # True while the background publishes them
        self._publication_failed = False  # True after a failure, which is logged once for all that follow it
        self._background = DaemonPool(1, "s3blobs cache")
        self._evicting = False  # True while a thread evicts the files that one call left over
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
        """Add the files of earlier runs to the index."""
        found = self._folder.found()
        with self._lock:  # briefly: reads and commits wait meanwhile
            self._index.add_found(found)
        self._evict_rest()
        self._read.set()
        logger.info("The cache in %s holds %d blobs, %d bytes", self.directory, len(self), self.size)

    def wait_until_read(self, timeout: float | None = None) -> bool:
        """Wait until the index has the files of earlier runs; return False after ``timeout`` seconds."""
        return self._read.wait(timeout)

    def close(self) -> None:
        """Release the directory to other processes. Its files stay, and `get` still finds them.

        What `publish_later` has not published is discarded. Waits for the background, at most `_CLOSE_TIMEOUT` seconds;
        what is left then, the next start deletes.
        """
        with self._lock:
            self._closed = True
        self._background.shutdown(timeout=_CLOSE_TIMEOUT)
        self._background.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._pending.clear()
            self._folder.close()

    # Files

    def path(self, oid: bytes, tid: bytes) -> str:
        """Return the path that the blob's file has if it is in the cache."""
        return self._folder.file(Revision(oid, tid))

    def get(self, oid: bytes, tid: bytes) -> Pin | None:
        """Return the blob's file, pinned, or None if it is not in the cache."""
        name = Revision(oid, tid)
        with self._lock:
            if name in self._pending and not self._closed:
                pin = self._publish_pending(name)
                if pin is not None:
                    return pin
            size = self._folder.size_of(name)
            if size is None:
                self._index.remove(name)
                return None
            self._folder.touch(self.path(oid, tid))
            if name not in self._index:
                if self._index.is_complete:
                    # A file that the cache did not put here is not served.
                    return None
                self._index.put(name, size)
            return self._pin(name)

    def new_file(self) -> Incoming:
        """Create and return an empty file for a blob. Raises CacheError."""
        with self.writing():
            fd, path = self._when_full(lambda: tempfile.mkstemp(dir=self._folder.incoming), 1)
            os.close(fd)
        return Incoming(self, path)

    def new_temporary(self) -> tuple[int, str]:
        """Create an empty file in `temporary`; return its open descriptor and its path. Raises CacheError."""
        with self.writing():
            return self._when_full(lambda: tempfile.mkstemp(dir=self.temporary), 1)

    def adopt(self, filename: str) -> Incoming:
        """Move the complete file ``filename`` here; copy it from another file system. Raises CacheError."""
        incoming = self.new_file()
        try:
            with self.writing():
                size = os.path.getsize(filename)
                self._when_full(lambda: rename_or_copy_blob(filename, incoming.path, chmod=False), size)
        except BaseException:
            incoming.discard()
            raise
        return incoming

    def take(self, filename: str) -> Incoming:
        """Take over the complete file ``filename`` in `temporary`, where it lies: no call of the file system.

        From now on only the `Incoming` may write, rename or delete a file of that name. Raises ValueError if the file
        lies elsewhere, or deeper, where it could vanish with its directory: `adopt` such a file.
        """
        if os.path.dirname(filename) != str(self.temporary):
            raise ValueError(f"{filename} is not in {self.temporary}")
        return Incoming(self, filename)

    def publish_later(self, files: Mapping[Revision, Incoming]) -> None:
        """Publish ``files``, of committed blobs, in the background; never raise. They are no longer the caller's.

        `get` finds each of them from now on: it publishes what it is asked for. `path` exists, and `size` counts a
        file, when it has been published. A file that cannot be published is discarded, since it is in the bucket.
        """
        with self._lock:
            if self._closed:
                discarded = list(files.values())
            else:
                discarded = [
                    self._pending.pop(name)
                    for name, file in files.items()
                    if name in self._pending and self._pending[name].path != file.path
                ]
                self._pending.update(files)
                self._start_publishing()
        for file in discarded:
            file.discard()

    def writing(self) -> AbstractContextManager[None]:
        """Turn an OSError of the body, which writes files below `directory`, into a CacheError."""
        return self._folder.writing()

    def write(self, fd: int, data: bytes) -> None:
        """Write all of ``data`` to a file of this directory; evict blobs if the disk is full. Raises CacheError."""
        view = memoryview(data)
        with self.writing():
            while view:
                view = view[self._when_full(functools.partial(os.write, fd, view), len(view)) :]

    def remove(self, oid: bytes, tid: bytes) -> None:
        """Delete a dead blob from the cache; no error if the cache does not have it."""
        name = Revision(oid, tid)
        with self._lock:
            pending = self._pending.pop(name, None)
            self._remove(name)
        if pending is not None:
            pending.discard()

    @property
    def size(self) -> int:
        """Size of all files in the cache in bytes."""
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
                # Larger than the whole cache: keeping this file would evict every other one.
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
        with self._lock:  # to the end, so that no later timer overtakes this one and releases younger files first
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
            self._folder.touch(filename)  # its time is still that of its writing, perhaps on another machine
            self._folder.protect(filename)
            self._when_full(functools.partial(self._folder.move_in, filename, name), 1)
            self._index.put(name, size)  # if the cache had the blob: readers of the old file keep that file
            pin = self._pin(name)
            self._evict()
        return pin

    def _start_publishing(self) -> None:
        """Let the background publish what is pending. The caller holds the lock."""
        if self._publishing or not self._pending:
            return
        try:
            self._background.submit(self._publish_all_pending)
        except RuntimeError as error:  # no thread can be started
            logger.warning("Committed blobs are put into the cache when they are read, or later: %s", error)
        else:
            self._publishing = True

    def _publish_all_pending(self) -> None:
        while True:
            with self._lock:
                name = next(iter(self._pending), None)
                if name is None:
                    self._publishing = False
                    return
                if self._closed:
                    self._pending.pop(name).discard()
                    continue
                pin = self._publish_pending(name)
                if pin is not None:
                    pin.release()
            time.sleep(_PAUSE)

    def _publish_pending(self, name: Revision) -> Pin | None:
        """Publish one pending file; return its pin, or None if that fails. The caller holds the lock."""
        file = self._pending.pop(name)
        if name in self._index and not os.path.exists(file.path):
            return None  # it was published already
        try:
            pin = file.publish(*name)
        except Exception as error:
            if not self._publication_failed:
                logger.warning(
                    "A committed blob could not be put into the cache, and is read from the bucket: %s",
                    error,
                    exc_info=not isinstance(error, CacheError),
                )
            self._publication_failed = True
            file.discard()
            return None
        self._publication_failed = False
        return pin

    def _when_full(self, work: Callable[[], T], needed: int) -> T:
        """Return the result of ``work``; while the disk is full, evict at least ``needed`` bytes and call it again."""
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
                self._evict_one(*oldest, at_once=True)
                evicted = True
            return evicted

    def _evict(self) -> None:
        """Evict files until the limit is kept; beyond `_EVICTED_AT_ONCE` files, in a thread of its own.

        The caller holds the lock, and may be a thread that must not wait long.
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
            time.sleep(0.001)  # or other threads would not get the lock in between

    def _evict_some(self) -> None:
        for _ in range(_EVICTED_AT_ONCE):
            oldest = self._index.oldest() if self._is_over_limit() else None
            if oldest is None:
                return
            self._evict_one(*oldest)

    def _is_over_limit(self) -> bool:
        # After `close`, the directory may belong to another process.
        return not self._closed and self._index.is_over_limit()

    def _evict_one(self, name: Revision, size: int, at_once: bool = False) -> None:
        self._metrics.cache_evictions.inc()
        self._metrics.cache_evicted_bytes.inc(size)
        self._remove(name, at_once)

    def _remove(self, name: Revision, at_once: bool = False) -> None:
        """Remove a file; delete it ``at_once`` if its space is needed, else a large one in the background."""
        path = self._folder.file(name)
        aside = None if at_once or not _is_large(path) else self._folder.put_aside(name)
        if aside is None:
            self._folder.delete(path)
        else:
            self._discard(aside)
        self._index.remove(name)
        self._folder.tidy(name)

    def _discard(self, path: str) -> None:
        """Delete a file that is not in the index, a large one in the background."""
        if _is_large(path):
            try:
                self._background.submit(self._folder.delete, path)
                return
            except RuntimeError:
                pass  # closed, or no thread can be started
        self._folder.delete(path)


def _is_large(path: str) -> bool:
    try:
        return os.lstat(path).st_size >= _LARGE
    except OSError:
        return False
