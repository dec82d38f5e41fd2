"""Reads of blobs: from the cache, or one verified download per blob for any number of readers."""

import functools
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

from .blobdir import BlobDirectory, BlobDirectoryError
from .cache.files import Cache
from .cache.store import Pin
from .metrics import Metrics
from .revision import Revision
from .s3.bucket import Bucket
from .s3.download import Opened, Stored, Target
from .s3.errors import BlobNotFound, BucketError
from .workers import DaemonPool

#: The most bytes of a small blob. Large blobs wait for each other in a pool of their own, which delays no small one.
_SMALL = 1 << 20


class Fetcher:
    """The reader of blobs through the cache. Any thread may call.

    ``concurrency``: the number of parallel downloads of small blobs, and of large ones; ``fallback``: a blob directory
    with blobs that the bucket does not have yet, or None.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        metrics: Metrics,
        concurrency: int = 16,
        fallback: BlobDirectory | None = None,
    ) -> None:
        self._bucket = bucket
        self._cache = cache
        self._metrics = metrics
        self._fallback = fallback
        # Pools of their own, so that slow downloads never delay a commit.
        self._workers = DaemonPool(concurrency, "s3blobs download")
        self._large = DaemonPool(concurrency, "s3blobs large download")
        self._hit_duration = metrics.load_duration.labels("hit")
        self._lock = threading.Lock()
        self._waiting: dict[Revision, list[_Reader]] = {}

    def request(self, oid: bytes, tid: bytes, source: bytes | None = None, owner: object = None) -> "Future[Pin]":
        """Return a future of the blob's complete and verified file, pinned in the cache; on a hit it is already done.

        Does not wait. The future fails with `BlobNotFound` if neither the bucket nor the fallback has the blob,
        `BucketError` if S3 fails, `BlobDirectoryError` if the fallback cannot be read, and `CacheError` if the file
        cannot be written. The caller must release the pin.

        ``source``: the tid of another revision with the same bytes, which is downloaded instead. ``owner``: who asks;
        owners have their turns at the workers, so that a client that wants one blob does not wait for all those of
        another.
        """
        name = Revision(oid, tid)
        reader = _Reader(Future(), time.monotonic())
        with self._lock:
            pin = self.cached(oid, tid)
            if pin is not None:
                reader.future.set_result(pin)
                return reader.future
            self._metrics.cache_requests.inc()
            if name in self._waiting:
                self._metrics.download_waits.inc()
                self._waiting[name].append(reader)
            else:
                self._workers.submit_all(owner, [functools.partial(self._begin, name, source or tid, owner)])
                self._waiting[name] = [reader]
        return reader.future

    def cached(self, oid: bytes, tid: bytes) -> Pin | None:
        """Return the blob's file, pinned, if it is in the cache; else None: the caller asks `request`.

        Such a hit takes no future and not the lock of the downloads.
        """
        asked = time.monotonic()
        pin = self._cache.get(oid, tid)
        if pin is not None:
            self._metrics.cache_requests.inc()
            self._metrics.cache_hits.inc()
            self._metrics.cache_hit_bytes.inc(pin.size)
            self._metrics.cache_requested_bytes.inc(pin.size)
            self._hit_duration.observe(time.monotonic() - asked)
        return pin

    def _answer(self, reader: "_Reader", pin: Pin, result: str) -> None:
        self._metrics.cache_requested_bytes.inc(pin.size)
        if result == "hit":
            self._metrics.cache_hits.inc()
            self._metrics.cache_hit_bytes.inc(pin.size)
        self._metrics.load_duration.labels(result).observe(time.monotonic() - reader.asked)
        reader.future.set_result(pin)

    def fetch(self, oid: bytes, tid: bytes) -> Pin:
        """Return the blob's file, pinned. Waits for S3; raises the errors of `request`."""
        return self.request(oid, tid).result()

    def may_lack(self, oid: bytes, tid: bytes) -> bool:
        """Return whether the bucket may lack the committed blob (oid, tid): the fallback has it, or cannot be read.

        Reads a directory; sends no request.
        """
        try:
            return self._fallback is not None and self._fallback.find(oid, tid) is not None
        except BlobDirectoryError:
            return True

    def close(self) -> None:
        """Refuse new downloads."""
        self._workers.shutdown(wait=False)
        self._large.shutdown(wait=False)

    def _begin(self, name: Revision, source: bytes, owner: object) -> None:
        """Take the blob from the cache if an earlier process left it there, or begin its download."""
        size = self._cache.unproven_size(*name)
        if size is None:
            self._open(name, source, owner)
        elif size <= _SMALL:
            self._prove(name, source, owner)
        else:
            self._large.submit_all(owner, [functools.partial(self._prove, name, source, owner)])

    def _prove(self, name: Revision, source: bytes, owner: object) -> None:
        try:
            pin = self._cache.prove(*name)
        except Exception as error:
            self._finish(name, source, error)
            return
        if pin is None:
            self._open(name, source, owner)
        else:
            self._answer_all(name, pin, "hit")

    def _open(self, name: Revision, source: bytes, owner: object) -> None:
        """Request the blob, whose answer gives its size; pass a large one on to the other pool."""
        try:
            opened = self._bucket.open(name[0], source)
        except Exception as error:
            self._finish(name, source, error)
            return
        if opened.stored.size <= _SMALL:
            self._finish(name, source, opened)
            return
        begun = opened if self._large.has_free_thread else None
        if begun is None:
            opened.close()  # do not keep the connection open meanwhile
        self._large.submit_all(owner, [functools.partial(self._finish, name, source, begun)])

    def _finish(self, name: Revision, source: bytes, begun: "Opened | Exception | None") -> None:
        try:
            pin = self._download(*name, source, begun)
        except BaseException as error:
            for reader in self._end(name):
                self._metrics.load_duration.labels("error").observe(time.monotonic() - reader.asked)
                reader.future.set_exception(error)
        else:
            self._answer_all(name, pin, "miss")

    def _answer_all(self, name: Revision, pin: Pin, result: str) -> None:
        first, *others = self._end(name)
        # Each reader gets a pin of its own, so that the file stays until the last one has opened it, even if the file
        # is larger than the whole cache. All pins are made before the first can be released.
        pins = [pin.again() for _ in others]
        self._answer(first, pin, result)
        for reader, again in zip(others, pins, strict=True):
            self._answer(reader, again, result)

    def _end(self, name: Revision) -> "list[_Reader]":
        with self._lock:  # from here on no reader can join
            return self._waiting.pop(name)

    def _download(self, oid: bytes, tid: bytes, source: bytes, begun: "Opened | Exception | None") -> Pin:
        file = None
        try:
            file = self._cache.new_file()
            with self._cache.writing():
                stored = get(self._bucket, self._fallback, oid, source, file, begun)
            if stored is None:
                self._metrics.fallback_reads.inc()
            elif stored.is_proven:
                file.digest = stored.digest
            return file.publish(oid, tid)
        except BaseException:
            if file is not None:
                file.discard()
            raise
        finally:
            if isinstance(begun, Opened):
                begun.close()


def get(
    bucket: Bucket,
    fallback: BlobDirectory | None,
    oid: bytes,
    tid: bytes,
    file: Target,
    begun: Opened | Exception | None = None,
) -> Stored | None:
    """Write blob (oid, tid) into the empty ``file``; return what the bucket has, None if it came from the fallback.

    ``begun``: the result or error of `Bucket.open`, if it was called. Waits for S3; raises the errors of `Bucket.get`
    and `BlobDirectory.copy`.
    """
    try:
        if isinstance(begun, Exception):
            raise begun
        return bucket.get(oid, tid, file, begun)
    except (BlobNotFound, BucketError):
        # The fallback's copy has the same bytes, so it also serves during an outage of the bucket.
        if fallback is None or not fallback.copy(oid, tid, file):
            raise
        return None


class _Reader(NamedTuple):
    """A request for a blob, made at ``asked``, a time by `time.monotonic`."""

    future: "Future[Pin]"
    asked: float
