"""The files that the cache has: pins, verification, eviction. `files.Cache` adds the ways in which they come."""

import errno
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ..digest import SHA256, digest_of
from ..metrics import Metrics
from ..revision import Revision
from ..workers import DaemonPool
from .directory import FULL, CacheDirectory, CacheDirectoryError
from .index import Entry, LruIndex
from .journal import Journal
from .recorder import Recorder

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long, in seconds, a file stays after its path was handed out, so that the caller can open the file.
GRACE = 10.0

#: The pause after each step of work in the background, in seconds; or other threads would not get the lock in between.
PAUSE = 0.0002

#: The files that are looked up between two such pauses.
_STEP = 100

#: The most files that one call evicts, so that it does not hold up the event loop.
_EVICTED_AT_ONCE = 8

#: The least bytes of a file whose deletion takes so long that it would hold up the event loop.
_LARGE = 64 << 20


class Pin:
    """A cached file that is not evicted before `release`; a context manager that returns its path."""

    def __init__(self, store: "FileStore", name: Revision, path: str, entry: Entry) -> None:
        self.path = path
        self._store = store
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
            self._store._unpin(self._name, entry)

    @property
    def size(self) -> int:
        """Size of the file in bytes; only before `release`."""
        assert self._entry is not None
        return self._entry.size

    def again(self) -> "Pin":
        """Return another pin of this file; only before `release`."""
        assert self._entry is not None
        return self._store._pin_again(self._name, self.path, self._entry)

    def release_later(self) -> str:
        """Release the pin `GRACE` seconds from now; return the path."""
        self._store._release_later(self.again())
        self.release()
        return self.path


class FileStore:
    """The files below ``directory``, which belongs to this object alone; the base of `files.Cache`."""

    def __init__(self, directory: str | os.PathLike[str], limit: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._folder = CacheDirectory(directory, metrics)
        self.directory = self._folder.path
        self.temporary = self._folder.temporary
        self.limit = limit
        self._lock = threading.RLock()
        self._index = LruIndex(limit, self._folder.block)
        try:
            journal = Journal(self._folder.index)
        except OSError as error:
            self._folder.close()
            raise CacheDirectoryError(f"{self._folder.index} cannot be used: {error.strerror}") from error
        self._recorder = Recorder(journal, self._index, self._lock, metrics)
        self._recording = False  # True while the background writes the journal
        self._background = DaemonPool(1, "s3blobs cache")
        self._evicting = False  # True while the background evicts the files that one call left over
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
        threading.Thread(target=self._begin, name="s3blobs cache index", daemon=True).start()

    def _begin(self) -> None:
        """Add the files of earlier runs to the index; delete those of which the journal does not tell."""
        found = self._recorder.load()
        with self._lock:  # briefly: reads and commits wait meanwhile
            self._index.add_found(found)
        del found
        self._evict_rest()
        self._read.set()
        logger.info("The cache in %s holds %d blobs, %d bytes on disk", self.directory, len(self), self.size)
        with self._lock:
            self._start_recording()  # the journal may be too long
        self._sweep()

    def _sweep(self) -> None:
        """Delete the files without an entry: of a cache without a journal, or whose records a crash lost."""
        deleted = 0
        for names in self._folder.files():
            for number, name in enumerate(names):
                with self._lock:  # nobody publishes the blob meanwhile
                    if self._closed:
                        return
                    unknown = name not in self._index
                    if unknown:
                        self._folder.delete(self._folder.file(name))
                        self._folder.tidy(name)
                deleted += unknown
                if unknown or number % _STEP == 0:
                    time.sleep(PAUSE)
        if deleted:
            logger.info(
                "Deleted %d files of %s that its index did not tell of: they are fetched again when they are needed",
                deleted,
                self.directory,
            )

    def wait_until_read(self, timeout: float | None = None) -> bool:
        """Wait until the index has the files of earlier runs; return False after ``timeout`` seconds."""
        return self._read.wait(timeout)

    def path(self, oid: bytes, tid: bytes) -> str:
        """Return the path that the blob's file has if it is in the cache."""
        return self._folder.file(Revision(oid, tid))

    @property
    def size(self) -> int:
        """The bytes of disk that all files in the cache take."""
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
        return oldest[1].used if oldest is not None else 0

    # Reading

    def get(self, oid: bytes, tid: bytes) -> Pin | None:
        """Return the blob's file, pinned, or None if it is not in the cache, or must be proven first: see `prove`.

        A file that is not as it was written is dropped.
        """
        name = Revision(oid, tid)
        with self._lock:
            entry = self._index.get(name)
            if entry is None or not entry.is_proven or not self._is_there(name, entry):
                return None
            return self._use(name)

    def unproven_size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes that `prove` would read; None if there is nothing to prove.

        Waits until the files of earlier runs are known: for a worker.
        """
        self._read.wait()
        with self._lock:
            entry = self._index.get(Revision(oid, tid))
            return entry.size if entry is not None and not entry.is_proven else None

    def prove(self, oid: bytes, tid: bytes) -> Pin | None:
        """Compare the blob's file, which an earlier process left, with its SHA-256; return it pinned.

        Returns None if it is not in the cache, or not as it was written, and then drops it. Reads the whole file: for a
        worker. From then on `get` returns the file.
        """
        self._read.wait()
        name = Revision(oid, tid)
        with self._lock:
            entry = self._index.get(name)
            if entry is None or not self._is_there(name, entry):
                return None
            pin = self._use(name)
            entry = self._index.get(name)
            assert entry is not None
        damage = self._compare(name, pin.path, entry)
        with self._lock:
            if self._index.get(name) is entry:  # nobody has removed it meanwhile
                if damage is None:
                    return pin
                self._drop(name, damage)
        pin.release()
        return None

    def _compare(self, name: Revision, path: str, entry: Entry) -> str | None:
        """Compare the file with its SHA-256, and note that it is proven; return why it must not be served."""
        expected = self._recorder.digest(name, entry.record)
        try:
            if expected is None or digest_of(SHA256, path) != expected.hex():
                return "it does not have its SHA-256"
            if self._folder.damage(name, entry.size, True) is not None:  # such as a copy of the directory
                self._folder.mark(path, name)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EPERM):
                return str(error)
            # The file cannot be marked: the bytes are right, and are compared again the next time.
        else:
            entry.is_proven = True
        return None

    def _use(self, name: Revision) -> Pin:
        """Return a pin of a file of the index. The caller holds the lock."""
        if not self._closed:
            self._recorder.used(name)
            self._start_recording()
        return self._pin(name)

    def _is_there(self, name: Revision, entry: Entry) -> bool:
        """Return whether the file is as it should be, as far as is seen from outside; drop it if it is not.

        The caller holds the lock.
        """
        try:
            damage = self._folder.damage(name, entry.size, entry.is_proven)
        except FileNotFoundError:
            self._forget(name)
            return False
        if damage is not None:
            self._drop(name, damage)
        return damage is None

    def _drop(self, name: Revision, damage: str) -> None:
        """Give up a file that is not as it was written. The caller holds the lock."""
        if self._closed:
            return
        self._metrics.cache_damaged.inc()
        logger.warning("Dropping %s: %s. The blob is fetched again", self._folder.file(name), damage)
        aside = self._folder.put_aside(name)
        if aside is not None and not os.path.isdir(aside):  # what is not ours to delete, the next start deletes
            self._discard(aside)
        self._forget(name)

    # Pins

    def _pin(self, name: Revision) -> Pin:
        return Pin(self, name, self._folder.file(name), self._index.pin(name, int(time.time())))

    def _unpin(self, name: Revision, entry: Entry) -> None:
        with self._lock:
            if not self._index.unpin(name, entry):
                return
            if self._index.is_oversized(entry.size) and not self._closed:
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
                self._start_timer(GRACE)

    def _start_timer(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._release_due)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # no thread can be started: the next pin that is released later starts it
            self._timer_runs = False
        else:
            self._timer_runs = True

    def _release_due(self) -> None:
        now = time.monotonic()
        with self._lock:  # to the end, so that no later timer overtakes this one and releases younger files first
            while self._due and self._due[0][0] <= now:
                self._due.popleft()[1].release()
            self._timer_runs = False
            if self._due:
                self._start_timer(self._due[0][0] - now)

    # The journal

    def _start_recording(self) -> None:
        """Let the background write the journal if that is due. The caller holds the lock."""
        if self._recorder.is_due and not self._recording:
            try:
                self._background.submit(self._record)
            except RuntimeError:
                pass  # closed, or no thread can be started: later, or what was noted is fetched again after a restart
            else:
                self._recording = True

    def _record(self) -> None:
        while True:
            self._recorder.write()
            with self._lock:
                if not self._recorder.is_due:
                    self._recording = False
                    return

    # Eviction

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
                self._evict_one(oldest[0], oldest[1].size, at_once=True)
                evicted = True
            return evicted

    def _evict(self) -> None:
        """Evict files until the limit is kept; beyond `_EVICTED_AT_ONCE` files, in the background.

        The caller holds the lock, and may be a thread that must not wait long.
        """
        self._evict_some()
        if self._is_over_limit() and not self._evicting:
            try:
                self._background.submit(self._evict_rest)
            except RuntimeError:
                pass  # no thread can be started: later calls evict the rest
            else:
                self._evicting = True

    def _evict_rest(self) -> None:
        while True:
            with self._lock:
                self._evict_some()
                if not self._is_over_limit():
                    self._evicting = False
                    return
            time.sleep(PAUSE)

    def _evict_some(self) -> None:
        for _ in range(_EVICTED_AT_ONCE):
            oldest = self._index.oldest() if self._is_over_limit() else None
            if oldest is None:
                return
            self._evict_one(oldest[0], oldest[1].size)

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
        self._forget(name)
        self._folder.tidy(name)

    def _forget(self, name: Revision) -> None:
        """Remove a file that is gone from the index."""
        if name in self._index or not self._index.is_complete:
            self._recorder.removed(name)
            self._start_recording()
        self._index.remove(name)

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
