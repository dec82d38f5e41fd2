"""Cold reads: one download per blob for any number of readers, verified before it is published in the cache."""

import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

from .blobdir import BlobDirectory
from .cache.files import Cache, Pin
from .metrics import Metrics
from .revision import Revision
from .s3.bucket import Bucket
from .s3.download import Opened, Target
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
        self._lock = threading.Lock()
        self._waiting: dict[Revision, list[_Reader]] = {}

    def request(self, oid: bytes, tid: bytes, source: bytes | None = None) -> "Future[Pin]":
        """Return a future of the blob's complete and verified file, pinned in the cache; on a hit it is already done.

        Does not wait. The future fails with `BlobNotFound` if neither the bucket nor the fallback has the blob,
        `BucketError` if S3 fails, `BlobDirectoryError` if the fallback cannot be read, and `CacheError` if the file
        cannot be written. The caller must release the pin.

        ``source``: the tid of another revision with the same bytes, which is downloaded instead.
        """
        name = Revision(oid, tid)
        reader = _Reader(Future(), time.monotonic())
        self._metrics.cache_requests.inc()
        with self._lock:
            pin = self._cache.get(oid, tid)
            if pin is not None:
                self._metrics.cache_hits.inc()
                self._metrics.cache_hit_bytes.inc(pin.size)
                self._answer(reader, pin, "hit")
            elif name in self._waiting:
                self._metrics.download_waits.inc()
                self._waiting[name].append(reader)
            else:
                self._workers.submit(self._begin, name, source or tid)
                self._waiting[name] = [reader]
        return reader.future

    def _answer(self, reader: "_Reader", pin: Pin, result: str) -> None:
        self._metrics.cache_requested_bytes.inc(pin.size)
        self._metrics.load_duration.labels(result).observe(time.monotonic() - reader.asked)
        reader.future.set_result(pin)

    def fetch(self, oid: bytes, tid: bytes) -> Pin:
        """Return the blob's file, pinned. Waits for S3; raises the errors of `request`."""
        return self.request(oid, tid).result()

    def close(self) -> None:
        """Refuse new downloads."""
        self._workers.shutdown(wait=False)
        self._large.shutdown(wait=False)

    def _begin(self, name: Revision, source: bytes) -> None:
        """Request the blob, whose answer gives its size; pass a large one on to the other pool."""
        try:
            opened = self._bucket.open(name[0], source)
        except Exception as error:
            self._finish(name, source, error)
            return
        if opened.stored.size <= _SMALL:
            self._finish(name, source, opened)
        elif self._large.has_free_thread:
            self._large.submit(self._finish, name, source, opened)
        else:
            opened.close()  # no thread is free: do not keep the connection open meanwhile
            self._large.submit(self._finish, name, source, None)

    def _finish(self, name: Revision, source: bytes, begun: "Opened | Exception | None") -> None:
        try:
            pin = self._download(*name, source, begun)
        except BaseException as error:
            for reader in self._end(name):
                self._metrics.load_duration.labels("error").observe(time.monotonic() - reader.asked)
                reader.future.set_exception(error)
        else:
            first, *others = self._end(name)
            # Each reader gets a pin of its own, so that the file stays until the last one has opened it, even if the
            # file is larger than the whole cache. All pins are made before the first can be released.
            pins = [pin.again() for _ in others]
            self._answer(first, pin, "miss")
            for reader, again in zip(others, pins, strict=True):
                self._answer(reader, again, "miss")

    def _end(self, name: Revision) -> "list[_Reader]":
        with self._lock:  # from here on no reader can join
            return self._waiting.pop(name)

    def _download(self, oid: bytes, tid: bytes, source: bytes, begun: "Opened | Exception | None") -> Pin:
        file = None
        try:
            file = self._cache.new_file()
            if not get(self._bucket, self._fallback, oid, source, file, begun):
                self._metrics.fallback_reads.inc()
            file.sync()
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
) -> bool:
    """Write blob (oid, tid) into the empty ``file``; return True if it came from the bucket, False: from the fallback.

    ``begun``: the result or error of `Bucket.open`, if it was called. Waits for S3; raises the errors of `Bucket.get`
    and `BlobDirectory.copy`.
    """
    try:
        if isinstance(begun, Exception):
            raise begun
        bucket.get(oid, tid, file, begun)
    except (BlobNotFound, BucketError):
        # The fallback's copy has the same bytes, so it also serves during an outage of the bucket.
        if fallback is None or not fallback.copy(oid, tid, file):
            raise
        return False
    return True


class _Reader(NamedTuple):
    """A request for a blob, made at ``asked``, a time by `time.monotonic`."""

    future: "Future[Pin]"
    asked: float
