"""Large blobs are uploaded before the commit lock is asked for.

The key of a blob ends with its tid, which is known only under the commit lock. So that an upload does not make other
writers wait, a large blob goes to a staging key as soon as its last byte has arrived, and is copied to its own key by
the service itself, under the lock: one round trip, whatever its size. The staged object is deleted afterwards; what a
crash leaves behind, `Staging.sweep` finds.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from .metrics import Metrics
from .s3.bucket import Bucket
from .s3.errors import BucketError, TransferCancelled
from .s3.listing import ListedStaged
from .workers import Completion, DaemonPool, Deadline

logger = logging.getLogger(__name__)

#: The code of the BucketError that tells that upload-timeout is over.
TOO_LATE = "upload-timeout"

_ABANDONED = 24 * 3600.0


class Staged:
    """A file that is on its way to, or at, its staging key ``name``."""

    uploaded: Future[str]  # the SHA-256

    def __init__(self, filename: str, size: int, timeout: float) -> None:
        self.filename = filename
        self.size = size
        self.name = uuid.uuid4().hex
        self.deadline = Deadline(timeout)
        self.deadline.start()
        self.unwanted = threading.Event()


class Staging:
    """The staged files of one server.

    ``concurrency`` of them are uploaded at once, each transaction's within ``timeout`` seconds; files smaller than
    ``threshold`` bytes are not staged, none is if it is 0. ``cleaners`` delete what is no longer needed. Nothing but
    `sweep` waits for S3; any thread may call.
    """

    def __init__(
        self,
        bucket: Bucket,
        cleaners: DaemonPool,
        metrics: Metrics,
        concurrency: int,
        timeout: float,
        threshold: int,
    ) -> None:
        self._bucket = bucket
        self._cleaners = cleaners
        self._metrics = metrics
        self._timeout = timeout
        #: After how many seconds an upload belongs to nobody who still lives.
        self.abandoned_after = abandoned_after(timeout)
        self._threshold = threshold
        # Of its own: the small blobs of whoever holds the commit lock must not queue behind large ones.
        self._workers = DaemonPool(concurrency, "s3blobs staging")
        self._lock = threading.Lock()
        self._staged: dict[str, Staged] = {}  # by filename
        self._live: set[str] = set()  # the names that are not for `sweep`

    def stage(self, filename: str) -> None:
        """Start the upload of ``filename``, complete and not to be changed any more, if it is worth while."""
        if not self._threshold or not self._bucket.can_copy:
            return
        size = os.path.getsize(filename)
        if size < self._threshold:
            return
        staged = Staged(filename, size, self._timeout)
        self._metrics.staged_blobs.inc()
        self._metrics.staged_bytes.inc(size)
        with self._lock:
            self._live.add(staged.name)
            self._staged[filename] = staged
            staged.uploaded = self._workers.submit(self._upload, staged)

    def waiting(self, filenames: Iterable[str]) -> Completion | None:
        """Return the completion of those of ``filenames`` that have been staged; None if none has."""
        with self._lock:
            staged = [self._staged[filename] for filename in filenames if filename in self._staged]
        if not staged:
            return None
        return Completion(
            [one.uploaded for one in staged],
            min((one.deadline for one in staged), key=lambda deadline: deadline.seconds_left),
            BucketError(
                f"Not all of {len(staged)} large blobs were stored in bucket {self._bucket.name} within "
                f"upload-timeout ({self._timeout:g} s)",
                TOO_LATE,
            ),
        )

    def claim(self, filename: str) -> Staged | None:
        """Return the upload that was staged from ``filename``, if there is one; the caller must `release` it."""
        with self._lock:
            staged = self._staged.pop(filename, None)
        if staged is not None:
            self._metrics.staged_blobs.dec()
            self._metrics.staged_bytes.dec(staged.size)
        return staged

    def release(self, staged: Staged) -> None:
        """Stop the upload, and delete its object in the background. A second call does nothing."""
        with self._lock:
            if staged.unwanted.is_set():
                return
            staged.unwanted.set()
        staged.uploaded.cancel()
        staged.uploaded.add_done_callback(lambda uploaded: self._delete_later(staged))

    def cancel_for(self, filename: str) -> None:
        """Release the upload that was staged from ``filename``, if there is one: the file is not committed."""
        staged = self.claim(filename)
        if staged is not None:
            self.release(staged)

    def is_live(self, name: str | None) -> bool:
        """Return whether this server still needs the staged upload ``name``, or has yet to delete it."""
        with self._lock:
            return name in self._live

    def sweep(self) -> int:
        """Delete what crashed servers left behind, and return how much that was. Waits for S3; BucketError."""
        names = [found.name for found in abandoned(self._bucket, self.abandoned_after) if found.name not in self._live]
        self._bucket.delete_staged(names)
        return len(names)

    def close(self) -> None:
        """Start no more uploads."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    # In a worker

    def _upload(self, staged: Staged) -> str:
        def check_wanted(transferred: int = 0) -> None:
            if staged.unwanted.is_set():
                raise TransferCancelled()

        check_wanted()
        with open(staged.filename, "rb") as file:
            # It is to become a file of the cache: see `cache.Incoming.sync`. Here nobody waits for it.
            os.fsync(file.fileno())
        return self._bucket.put_staged(staged.name, staged.filename, check_wanted)

    def _delete_later(self, staged: Staged) -> None:
        try:
            self._cleaners.submit(self._delete, staged.name)
        except RuntimeError:
            pass  # closed: somebody's pack sweeps it

    def _delete(self, name: str) -> None:
        try:
            self._bucket.delete_staged([name])
        except BucketError as error:
            self._metrics.cleanup_failures.inc()
            logger.warning("A staged upload stays behind until a pack removes it: %s", error)
        finally:
            with self._lock:
                self._live.discard(name)


def abandoned(bucket: Bucket, age: float) -> Iterator[ListedStaged]:
    """Yield the staged objects that were completed more than ``age`` seconds ago. Waits for S3; BucketError."""
    before = time.time() - age
    return (found for found in bucket.list_staged() if found.modified.timestamp() < before)


def abandoned_after(timeout: float) -> float:
    """Return the age in seconds at which an upload is abandoned; those of a transaction may take ``timeout``."""
    return max(_ABANDONED, 2 * timeout)
