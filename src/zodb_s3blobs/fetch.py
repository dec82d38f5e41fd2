"""Reads of blobs: from the cache, or one verified download per blob for any number of readers."""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import NamedTuple

from .blobdir import BlobDirectoryError
from .cache.files import Cache
from .cache.store import Pin
from .fallbacks import Fallbacks, Found
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

    ``concurrency``: the number of parallel downloads of small blobs, and of large ones; ``fallbacks``: where blobs are
    that the bucket does not deliver, closed together with this object; ``trouble`` returns why the bucket does not
    answer, None if it does, without waiting.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        metrics: Metrics,
        concurrency: int = 16,
        fallbacks: Fallbacks | None = None,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._bucket = bucket
        self._cache = cache
        self._metrics = metrics
        self._fallbacks = fallbacks or Fallbacks()
        self._replicas = self._fallbacks.in_s3()
        self._trouble = trouble
        # Pools of their own, so that slow downloads never delay a commit.
        self._workers = DaemonPool(concurrency, "s3blobs download")
        self._large = DaemonPool(concurrency, "s3blobs large download")
        # So that a fallback that does not answer delays no read from the bucket.
        self._elsewhere = DaemonPool(concurrency, "s3blobs fallback")
        self._hit_duration = metrics.load_duration.labels("hit")
        self._lock = threading.Lock()
        self._waiting: dict[Revision, list[_Reader]] = {}

    def request(self, oid: bytes, tid: bytes, source: bytes | None = None, owner: object = None) -> "Future[Pin]":
        """Return a future of the blob's complete and verified file, pinned in the cache; on a hit it is already done.

        Does not wait. The future fails with `BlobNotFound` if neither the bucket nor a fallback has the blob,
        `BucketError` if S3 fails, `BlobDirectoryError` if fallback-blob-dir cannot be read, and `CacheError` if the
        file cannot be written. The caller must release the pin.

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
        """Return whether the bucket may lack the committed blob (oid, tid), which then only a fallback has.

        What fallback-blob-dir has may not have been copied yet. With a fallback in S3 the bucket is asked, which waits
        for S3; else no request is sent.
        """
        try:
            if self._fallbacks.directories().look_up(oid, tid) is not None:
                return True
            # While the bucket is known not to answer, it is not asked: each link would wait for it.
            return bool(self._replicas) and (self._trouble() is not None or self._bucket.look_up(oid, tid) is None)
        except (BlobDirectoryError, BucketError):
            return True

    def close(self) -> None:
        """Refuse new downloads."""
        for pool in self._workers, self._large, self._elsewhere:
            pool.shutdown(wait=False)
        self._fallbacks.close()

    def _pass_on(self, pool: DaemonPool, owner: object, step: Callable[[], None]) -> None:
        """Let a thread of ``pool`` do the next ``step`` of a read, or do it here: readers must not wait forever."""
        try:
            pool.submit_all(owner, [step])
        except RuntimeError:  # no thread can be started, or closed
            step()

    def _begin(self, name: Revision, source: bytes, owner: object) -> None:
        """Take the blob from the cache if an earlier process left it there, or begin its download."""
        size = self._cache.unproven_size(*name)
        if size is None:
            self._open(name, source, owner)
        elif size <= _SMALL:
            self._prove(name, source, owner)
        else:
            self._pass_on(self._large, owner, functools.partial(self._prove, name, source, owner))

    def _prove(self, name: Revision, source: bytes, owner: object) -> None:
        try:
            pin = self._cache.prove(*name)
        except Exception as error:
            self._fail(name, error)
            return
        if pin is None:
            self._open(name, source, owner)
        else:
            self._answer_all(name, pin, "hit")

    def _open(self, name: Revision, source: bytes, owner: object) -> None:
        # While the bucket does not answer, each read would wait for it. A directory does not come first: nothing
        # verifies what it has.
        if self._replicas and self._bucket.last_answer[0] is not None and self._trouble() is not None:
            self._pass_on(self._elsewhere, owner, functools.partial(self._open_replica, name, source, owner))
        else:
            self._open_in_bucket(name, source, owner)

    def _open_replica(self, name: Revision, source: bytes, owner: object) -> None:
        """Ask the fallback in S3 first, then the bucket."""
        try:
            found = self._replicas.open(name.oid, source, BlobNotFound("The bucket has not been asked"))
        except Exception:
            self._pass_on(self._workers, owner, functools.partial(self._open_in_bucket, name, source, owner))
        else:
            self._go_on(name, source, owner, found, found.size)

    def _open_in_bucket(self, name: Revision, source: bytes, owner: object) -> None:
        """Request the blob, whose answer gives its size."""
        try:
            opened = self._bucket.open(name.oid, source)
        except (BlobNotFound, BucketError) as error:
            if self._fallbacks:
                self._pass_on(
                    self._elsewhere, owner, functools.partial(self._open_fallback, name, source, owner, error)
                )
            else:
                self._fail(name, error)
        except Exception as error:
            self._fail(name, error)
        else:
            self._go_on(name, source, owner, opened, opened.stored.size)

    def _open_fallback(self, name: Revision, source: bytes, owner: object, error: BlobNotFound | BucketError) -> None:
        """Ask the fallbacks for a blob that the bucket did not deliver because of ``error``."""
        try:
            found = self._fallbacks.open(name.oid, source, error)
        except Exception as failure:
            self._fail(name, failure)
        else:
            self._go_on(name, source, owner, found, found.size)

    def _go_on(self, name: Revision, source: bytes, owner: object, opened: Opened | Found, size: int) -> None:
        """Download the blob of ``size`` bytes, which is ``opened``; pass a large one on to the other pool."""
        if size <= _SMALL:
            self._finish(name, source, opened)
            return
        begun = opened if self._large.has_free_thread else None
        if begun is None:
            opened.close()  # do not keep the connection open meanwhile
        self._pass_on(self._large, owner, functools.partial(self._finish, name, source, begun))

    def _finish(self, name: Revision, source: bytes, begun: Opened | Found | None) -> None:
        try:
            pin = self._download(*name, source, begun)
        except BaseException as error:
            self._fail(name, error)
        else:
            self._answer_all(name, pin, "miss")

    def _fail(self, name: Revision, error: BaseException) -> None:
        for reader in self._end(name):
            self._metrics.load_duration.labels("error").observe(time.monotonic() - reader.asked)
            reader.future.set_exception(error)

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

    def _download(self, oid: bytes, tid: bytes, source: bytes, begun: Opened | Found | None) -> Pin:
        file = None
        try:
            file = self._cache.new_file()
            with self._cache.writing():
                stored = get(self._bucket, self._fallbacks, oid, source, file, begun)
            if stored is not None and stored.is_proven:
                file.digest = stored.digest
            return file.publish(oid, tid)
        except BaseException:
            if file is not None:
                file.discard()
            raise
        finally:
            if begun is not None:
                begun.close()


def get(
    bucket: Bucket,
    fallbacks: Fallbacks,
    oid: bytes,
    tid: bytes,
    file: Target,
    begun: Opened | Found | None = None,
) -> Stored | None:
    """Write blob (oid, tid) into the empty ``file``; return the metadata of its object, None if it was a file.

    ``begun``: the blob as the bucket or a fallback opened it, if one did; the caller closes it. Waits for S3; raises
    the errors of `Bucket.get` and `Fallbacks.open`.
    """
    if isinstance(begun, Found):
        return begun.copy(file)
    try:
        return bucket.get(oid, tid, file, begun)
    except (BlobNotFound, BucketError) as error:
        # A fallback's copy has the same bytes, so it also serves during an outage of the bucket.
        file.clear()
        with closing(fallbacks.open(oid, tid, error)) as found:
            return found.copy(file)


class _Reader(NamedTuple):
    """A request for a blob, made at ``asked``, a time by `time.monotonic`."""

    future: "Future[Pin]"
    asked: float
