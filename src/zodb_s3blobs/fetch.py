"""Cold reads: one download per blob however many ask, verified before anybody sees it, into the cache."""

import threading
from concurrent.futures import Future

from .bucket import Bucket
from .cache import Cache, Pin
from .workers import DaemonPool


class Fetcher:
    """Reads blobs through the cache; ``concurrency`` downloads go on at once. Any thread may call."""

    def __init__(self, bucket: Bucket, cache: Cache, concurrency: int = 16) -> None:
        self._bucket = bucket
        self._cache = cache
        # Not those of the uploads: slow reads must not hold up whoever holds the commit lock.
        self._workers = DaemonPool(concurrency, "s3blobs download")
        self._lock = threading.Lock()
        self._waiting: dict[tuple[bytes, bytes], list[Future[Pin]]] = {}

    def request(self, oid: bytes, tid: bytes) -> "Future[Pin]":
        """The blob's complete and verified file, pinned in the cache; on a hit the future is done already.

        Does not wait. The future fails with `BlobNotFound` if the bucket has no such blob, `BucketError` if S3 does
        not answer as it should, and `CacheError` if the file cannot be written. Whoever asks must release the pin.
        """
        name = oid, tid
        future: Future[Pin] = Future()
        with self._lock:
            pin = self._cache.get(oid, tid)
            if pin is not None:
                future.set_result(pin)
            elif name in self._waiting:
                self._waiting[name].append(future)
            else:
                self._workers.submit(self._run, name)
                self._waiting[name] = [future]
        return future

    def fetch(self, oid: bytes, tid: bytes) -> Pin:
        """As `request`, but wait for it."""
        return self.request(oid, tid).result()

    def close(self) -> None:
        """Start no more downloads."""
        self._workers.shutdown(wait=False)

    def _run(self, name: tuple[bytes, bytes]) -> None:
        try:
            pin = self._download(*name)
        except BaseException as error:
            for future in self._end(name):
                future.set_exception(error)
        else:
            first, *others = self._end(name)
            # Each gets a pin of its own, so that the file cannot go before the last of them has opened it, even if
            # it is larger than the whole cache. All are made before the first can be released.
            pins = [pin.again() for _ in others]
            first.set_result(pin)
            for future, again in zip(others, pins, strict=True):
                future.set_result(again)

    def _end(self, name: tuple[bytes, bytes]) -> "list[Future[Pin]]":
        with self._lock:  # from here on nobody joins
            return self._waiting.pop(name)

    def _download(self, oid: bytes, tid: bytes) -> Pin:
        file = self._cache.new_file()
        try:
            self._bucket.get(oid, tid, file)
            file.sync()
            return file.publish(oid, tid)
        except BaseException:
            file.discard()
            raise
