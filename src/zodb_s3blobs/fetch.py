"""Cold reads: one download per blob however many ask, verified before anybody sees it, into the cache."""

import threading
from concurrent.futures import Future

from .bucket import Bucket
from .cache import Cache, Pin


class Fetcher:
    """Reads blobs through the cache. Any thread may call; on a miss the caller waits for S3."""

    def __init__(self, bucket: Bucket, cache: Cache) -> None:
        self._bucket = bucket
        self._cache = cache
        self._lock = threading.Lock()
        self._downloads: dict[tuple[bytes, bytes], _Download] = {}

    def fetch(self, oid: bytes, tid: bytes) -> Pin:
        """The blob's complete and verified file, pinned in the cache.

        Raises `BlobNotFound` if the bucket has no such blob, `BucketError` if S3 does not answer as it should, and
        OSError if the file cannot be written.
        """
        name = oid, tid
        with self._lock:
            pin = self._cache.get(oid, tid)
            if pin is not None:
                return pin
            download = self._downloads.get(name)
            first = download is None
            if download is None:
                download = self._downloads[name] = _Download()
            else:
                download.waiting += 1
        if first:
            self._run(name, download)
        return download.pins.result().pop()

    def _run(self, name: tuple[bytes, bytes], download: "_Download") -> None:
        try:
            pin = self._download(*name)
        except BaseException as error:
            self._end(name)
            download.pins.set_exception(error)
        else:
            self._end(name)
            # Each who waits gets a pin of its own, so that the file cannot go before the last of them has opened
            # it, even if it is larger than the whole cache.
            download.pins.set_result([pin, *(pin.again() for _ in range(download.waiting))])

    def _end(self, name: tuple[bytes, bytes]) -> None:
        with self._lock:  # from here on nobody joins
            del self._downloads[name]

    def _download(self, oid: bytes, tid: bytes) -> Pin:
        file = self._cache.new_file()
        try:
            self._bucket.get(oid, tid, file)
            file.sync()
            return file.publish(oid, tid)
        except BaseException:
            file.discard()
            raise


class _Download:
    """One download under way, and how many wait for it besides the one who does it."""

    def __init__(self) -> None:
        self.waiting = 0
        self.pins: Future[list[Pin]] = Future()

