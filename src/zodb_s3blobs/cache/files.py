"""The LRU file cache of committed blobs: how files come into it. What becomes of them there is in store.py.

The cache does not use S3 or ZODB. A file in the cache is named by its (oid, tid), is complete, and never changes. It
counts with the blocks that it takes on the disk. Any thread may call; no method waits for more than a few file system
calls but `close`, `prove`, and `publish` of a file whose checksum is not known. What takes longer, many publications or
evictions, the deletion of a large file, the journal, a thread does in the background.

Nothing is synced. A file is served only if it is as it was written: what an earlier process left is compared with its
SHA-256 before its first use, and every file with its size and modification time at every use.
"""

import contextlib
import functools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from pathlib import Path

from ZODB.blob import rename_or_copy_blob

from ..digest import SHA256, digest_of
from ..metrics import Metrics
from ..revision import Revision
from .directory import CacheError
from .store import PAUSE, FileStore, Pin
from .warmed import WarmedFile, WarmFolder

logger = logging.getLogger(__name__)

#: The seconds between two looks for files that a command has fetched, and for what the journal does not tell yet.
_LOOK_EVERY = 3.0

#: How long, in seconds, `Cache.close` waits for the work in the background.
_CLOSE_TIMEOUT = 2.0


class Incoming:
    """A file that is not yet a blob of the cache: a download in progress, or a blob of an unfinished transaction.

    The caller that made the file owns it until `publish`, `Cache.publish_later` or `discard`. On a full disk its
    methods evict blobs to make room, and raise CacheError once there is nothing left to evict.
    """

    __slots__ = ("_cache", "digest", "path")

    def __init__(self, cache: "Cache", path: str) -> None:
        self.path = path
        #: The SHA-256 in hex, which whoever has it sets; "" if it is not known.
        self.digest = ""
        self._cache = cache

    def publish(self, oid: bytes, tid: bytes) -> Pin:
        """Move the file into the cache as blob (oid, tid); return its pin. The file must be complete.

        Reads the file if `digest` is not known.
        """
        # Not synced: what a power cut makes of the file does not have its SHA-256, and is not served.
        with self._cache.writing():
            digest = self.digest or digest_of(SHA256, self.path)
            return self._cache._publish(Revision(oid, tid), self.path, bytes.fromhex(digest))

    def discard(self) -> None:
        """Delete the file if it still exists, a large one in the background; never raise."""
        self._cache._discard(self.path)


class NewFile(Incoming):
    """A file that is being written; it is open until `publish` or `discard`."""

    __slots__ = ("_fd",)

    def __init__(self, cache: "Cache", path: str, fd: int) -> None:
        super().__init__(cache, path)
        self._fd: int | None = fd

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start. Several threads may write to different positions."""
        assert self._fd is not None
        self._cache.write(self._fd, data, position)

    def clear(self) -> None:
        """Truncate the file to zero bytes."""
        assert self._fd is not None
        with self._cache.writing():
            os.ftruncate(self._fd, 0)

    def publish(self, oid: bytes, tid: bytes) -> Pin:
        """Close the file, and move it into the cache as `Incoming.publish` does."""
        with self._cache.writing():
            self._close()
        return super().publish(oid, tid)

    def discard(self) -> None:
        """Close the file, and delete it as `Incoming.discard` does."""
        with contextlib.suppress(OSError):  # a network file system tells here of what it could not write
            self._close()
        super().discard()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Cache(FileStore):
    """The files of one cache directory, which belongs to this object alone until `close`.

    ``directory``: made if missing; ``limit``: the most bytes of disk for files; ``metrics``: those of the storage.
    Raises `directory.CacheDirectoryError` if the directory cannot be written, belongs to another process, or is not a
    cache and not empty.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int, metrics: Metrics) -> None:
        self._pending: dict[Revision, Incoming] = {}  # what `publish_later` has taken, the next one first
        self._publishing = False  # True while the background publishes them
        self._publication_failed = False  # True after a failure, which is logged once for all that follow it
        self._warmed = WarmFolder(Path(directory).absolute())
        self._closing = threading.Event()
        super().__init__(directory, limit, metrics)

    def _begin(self) -> None:
        """Find the files of earlier runs; then, every few seconds, take over those of `warm` and write the journal."""
        super()._begin()
        while not self._closing.is_set():
            self._take_over_warmed()
            with self._lock:
                self._recorder.hurry()
                self._start_recording()
            self._closing.wait(_LOOK_EVERY)

    def close(self) -> None:
        """Release the directory to other processes. Its files stay, and `get` still finds them.

        What `publish_later` has not published is discarded. Waits for the background, at most `_CLOSE_TIMEOUT` seconds;
        what is left then, the next start deletes.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._closing.set()
            self._recorder.finish()
            self._start_recording()  # what was noted last
        self._background.shutdown(timeout=_CLOSE_TIMEOUT)
        self._background.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._pending.clear()
            if self._read.is_set() and not self._recording:  # else a thread still reads or writes it
                self._recorder.close()
            self._folder.close()

    # Files

    def get(self, oid: bytes, tid: bytes) -> Pin | None:
        """Return the blob's file as `FileStore.get` does; publish it first if `publish_later` has taken it."""
        name = Revision(oid, tid)
        with self._lock:
            if name in self._pending and not self._closed:
                pin = self._publish_pending(name)
                if pin is not None:
                    return pin
            return super().get(oid, tid)

    def new_file(self) -> NewFile:
        """Create and return an empty file for a blob. Raises CacheError."""
        path = self._folder.new_path()
        with self.writing():
            fd = self._when_full(lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), 1)
        return NewFile(self, path, fd)

    def new_temporary(self) -> tuple[int, str]:
        """Create an empty file in `temporary`; return its open descriptor and its path. Raises CacheError."""
        with self.writing():
            return self._when_full(lambda: tempfile.mkstemp(dir=self.temporary), 1)

    def adopt(self, filename: str) -> Incoming:
        """Move the complete file ``filename`` here; copy it from another file system. Raises CacheError."""
        incoming = Incoming(self, self._folder.new_path())
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

    def write(self, fd: int, data: bytes, position: int | None = None) -> None:
        """Write all of ``data`` to a file of this directory; evict blobs if the disk is full. Raises CacheError.

        ``position``: the number of bytes in front of it; None: where the last write ended.
        """
        view, written = memoryview(data), 0
        with self.writing():
            while rest := view[written:]:
                if position is None:
                    write = functools.partial(os.write, fd, rest)
                else:
                    write = functools.partial(os.pwrite, fd, rest, position + written)
                written += self._when_full(write, len(rest))

    def remove(self, oid: bytes, tid: bytes) -> None:
        """Delete a dead blob from the cache; no error if the cache does not have it."""
        name = Revision(oid, tid)
        with self._lock:
            pending = self._pending.pop(name, None)
            self._remove(name)
        if pending is not None:
            pending.discard()

    # Publication

    def _publish(self, name: Revision, filename: str, digest: bytes) -> Pin:
        size = os.stat(filename).st_size
        self._folder.mark(filename, name)
        with self._lock:
            if self._closed:
                raise CacheError(f"The cache in {self.directory} has been closed")
            self._when_full(functools.partial(self._folder.move_in, filename, name), 1)
            # If the cache had the blob: readers of the old file keep that file.
            self._index.put(name, size, int(time.time()))
            self._recorder.put(name, digest)
            self._start_recording()
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
            time.sleep(PAUSE)

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

    # Files that `zodb-s3blobs warm` has fetched

    def _take_over_warmed(self) -> None:
        """Take over what is in the folder of `warm` now; each file has its turn in the background."""
        taken = 0
        for file in self._warmed.files():
            try:
                taken += self._background.submit(self._take_over, file).result()
            except (RuntimeError, CancelledError):
                return  # closed, or no thread can be started: the next look, or the next start, takes them over
            except FileNotFoundError:
                pass  # somebody has deleted it
            except OSError as error:
                self._warmed.complain(file.path, f"it cannot be moved into the cache: {error.strerror}")
        if taken:
            logger.info("Took over %d blobs that zodb-s3blobs warm has fetched into %s", taken, self._warmed.path)

    def _take_over(self, file: WarmedFile) -> bool:
        """Make the file one of the cache, the least recently used one, and return True; delete it without room for it.

        It is compared with its SHA-256 before its first use. Raises OSError. For the background, which writes the
        journal.
        """
        size = os.lstat(file.path).st_size
        with self._lock:
            if self._closed:
                return False
            entry = self._index.get(file.name)
            is_there = file.name in self._pending or (entry is not None and self._is_there(file.name, entry))
            if not is_there and self._index.has_room(size):
                oldest = self._index.oldest()
                used = oldest[1].used if oldest is not None else int(time.time())
                self._folder.move_in(file.path, file.name)
                try:
                    record = self._recorder.add(file.name, size, used, file.digest)
                except OSError:
                    self._folder.delete(self._folder.file(file.name))
                    raise
                self._index.put_oldest(file.name, size, used, record)
                return True
        self._folder.delete(file.path)
        return False
