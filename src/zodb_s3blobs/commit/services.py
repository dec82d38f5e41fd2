"""The parts that all transactions of one bucket share: threads, registers of keys and uploads, the order of tids."""

from collections.abc import Callable

from ..cache.files import Cache
from ..cache.store import Pin
from ..inflight import InFlight
from ..metrics import Metrics
from ..s3.bucket import Bucket
from ..workers import DaemonPool
from .kept import Kept
from .staging import Staging
from .tids import Tids

#: How long, in seconds, `CommitServices.close` waits for the deletion of the files of aborted transactions, and then
#: of what they uploaded.
_CLOSE_TIMEOUT = 2.0


class CommitServices:
    """The shared parts of all commits to one bucket.

    ``fetch`` reads a blob through the cache; ``tids``: the tids of the storage; ``concurrency`` uploads go on at once;
    those of one transaction may take ``timeout`` seconds; blobs of a transaction that has at least ``stage_threshold``
    bytes of them are uploaded before its vote, none if that is 0.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        fetch: Callable[[bytes, bytes], Pin],
        tids: Tids,
        metrics: Metrics,
        concurrency: int,
        timeout: float,
        stage_threshold: int = 0,
    ) -> None:
        self.bucket = bucket
        self.cache = cache
        self.fetch = fetch
        self.tids = tids
        self.metrics = metrics
        self.concurrency = concurrency
        self.timeout = timeout
        self.stage_threshold = stage_threshold
        # Transactions take turns in each pool. Large blobs have one of their own, so that no small one waits for them.
        self.small = DaemonPool(concurrency, "s3blobs upload")
        self.large = DaemonPool(concurrency, "s3blobs large upload")
        # Of its own, so that no upload waits for the cleanup after another transaction.
        self.cleaners = DaemonPool(2, "s3blobs cleanup")
        # Of its own, so that the disk does not fill up with files that nobody needs while S3 is silent.
        self.files = DaemonPool(1, "s3blobs files")
        #: How long, in seconds, the last upload and the last copy to a final key took, and the next is likely to take.
        self.last_put = self.last_copy = 0.0
        self.kept = Kept()
        self.staging = Staging(bucket, self.kept, concurrency)
        self.in_flight = InFlight()

    @property
    def copies(self) -> bool:
        """True if blobs may be copied inside the bucket: the service can, and ``stage_threshold`` is not 0."""
        return bool(self.stage_threshold) and self.bucket.can_copy

    def close(self) -> None:
        """Give up what is queued, and wait a little for the cleanup after aborted transactions."""
        self.kept.close()
        self.staging.close()
        for pool in self.small, self.large:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self.files, self.cleaners:  # the former may have work for the latter
            pool.shutdown(timeout=_CLOSE_TIMEOUT)
