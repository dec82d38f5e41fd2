"""Large blobs on their way to a staging key, which needs no tid.

The upload to a staging key begins as soon as there is something to send: before the end of a large blob has arrived.
When its transaction has a tid, the service itself copies the object to its final key. The staged object is deleted at
the end of the transaction; what a crash leaves behind, a pack deletes.
"""

import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future

from ..arriving import Arriving
from ..s3.bucket import Bucket
from ..s3.errors import TransferCancelled
from ..s3.upload import STREAMS
from ..workers import DaemonPool
from .kept import Kept


class Cancellable:
    """Work in other threads that can be called off."""

    def __init__(self) -> None:
        self._unwanted = threading.Event()

    def cancel(self) -> None:
        """Let work that is under way end early."""
        self._unwanted.set()

    def check_wanted(self, transferred: int = 0) -> None:
        """Raise TransferCancelled after `cancel`; a progress callback."""
        if self._unwanted.is_set():
            raise TransferCancelled()


class Staged(Cancellable):
    """An upload to the staging key ``name``; ``uploaded`` is the future of its SHA-256 in hex."""

    uploaded: Future[str]

    def __init__(self, arriving: Arriving | None = None) -> None:
        super().__init__()
        self.name = uuid.uuid4().hex
        #: The key of a kept upload with the same bytes, in place of which nothing was sent.
        self.kept: str | None = None
        self._arriving = arriving

    def grew_to(self, size: int) -> None:
        """Note that the first ``size`` bytes of the blob have arrived."""
        assert self._arriving is not None
        self._arriving.grew_to(size)

    def complete(self) -> None:
        """Note that the last byte of the blob has arrived."""
        assert self._arriving is not None
        self._arriving.complete()

    def cancel(self) -> None:
        """Let the upload end early."""
        super().cancel()
        if self._arriving is not None:
            self._arriving.cancel()
        self.uploaded.cancel()

    @property
    def has_succeeded(self) -> bool:
        """True if the bytes are in the bucket."""
        return self.uploaded.done() and not self.uploaded.cancelled() and self.uploaded.exception() is None


class Staging:
    """The uploads of one server to staging keys. Nothing here waits for S3 but `delete`; any thread may call.

    ``kept``: what need not be sent again; ``concurrency`` complete files are uploaded at once.
    """

    def __init__(self, bucket: Bucket, kept: Kept, concurrency: int) -> None:
        self._bucket = bucket
        self._kept = kept
        # Of their own: small blobs must not queue behind large ones, nor those behind a client that is slow.
        self._workers = DaemonPool(concurrency, "s3blobs staging")
        self._streams = DaemonPool(STREAMS, "s3blobs stream")
        self._lock = threading.Lock()
        self._live: set[str] = set()

    def stage(self, filename: str, owner: object) -> Staged:
        """Start the upload of the complete file ``filename`` for the transaction ``owner``."""
        staged = Staged()
        return self._start(staged, self._workers, owner, lambda: self._upload(staged, filename))

    def stream(self, filename: str, size: int, owner: object) -> Staged:
        """Start the upload of the file ``filename``, of which ``size`` bytes, at least 8 MiB, have arrived.

        The caller tells `Staged.grew_to` and `Staged.complete` of the rest.
        """
        arriving = Arriving(filename)
        arriving.grew_to(size)
        staged = Staged(arriving)
        return self._start(staged, self._streams, owner, lambda: self._stream(staged, arriving, filename))

    def _start(self, staged: Staged, pool: DaemonPool, owner: object, upload: Callable[[], str]) -> Staged:
        with self._lock:
            self._live.add(staged.name)
        [staged.uploaded] = pool.submit_all(owner, [upload])
        return staged

    def delete(self, staged: list[Staged]) -> None:
        """Delete the objects of uploads that have ended. Waits for S3; BucketError."""
        names = [upload.name for upload in staged]
        try:
            self._bucket.delete_staged(names)
        finally:
            with self._lock:
                self._live.difference_update(names)

    def is_live(self, name: str | None) -> bool:
        """Return whether this server still needs the staged object ``name``, or has yet to delete it."""
        with self._lock:
            return name in self._live

    def close(self) -> None:
        """Start no more uploads."""
        for pool in self._workers, self._streams:
            pool.shutdown(wait=False, cancel_futures=True)

    # In a worker

    def _upload(self, staged: Staged, filename: str) -> str:
        staged.check_wanted()
        digest, staged.kept = self._kept.find(filename)
        return digest if staged.kept else self._bucket.put_staged(staged.name, filename, staged.check_wanted)

    def _stream(self, staged: Staged, arriving: Arriving, filename: str) -> str:
        try:
            staged.check_wanted()
            if not self._kept.has_beginning(filename):
                return self._bucket.put_staged_stream(staged.name, arriving, staged.check_wanted)
            arriving.wait(sys.maxsize)  # to its end: probably nothing has to be sent
        finally:
            arriving.cancel()  # it is not read any more
        return self._upload(staged, filename)
