"""The vote of a transaction with blobs: what it waits for, how it ends, and how that is counted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ZODB.POSException import StorageError

from .cache.directory import CacheError
from .commit.pending import TOO_LATE, Pending
from .errors import S3BlobsError
from .metrics import Metrics
from .s3.errors import BlobNotFound, BucketError
from .workers import Completion


class Vote:
    """A vote that begins now; ``metrics``: those of the storage. Belongs to the thread that votes.

    ``pending``: the blobs of the transaction, if they have arrived before it begins in the base.
    """

    def __init__(self, metrics: Metrics, pending: Pending | None = None) -> None:
        self.pending = pending
        #: The uploads of the transaction; None before the base has voted, and if the transaction has no blobs.
        self.uploads: Completion | None = None
        self._metrics = metrics
        self._began = time.monotonic()

    def wait(self, uploads: Completion) -> None:
        """Wait for ``uploads``. Raises StorageError, and counts the vote, if they fail or come too late."""
        with self._counting_failure():
            uploads.wait()

    def require(self, uploads: Completion) -> None:
        """Raise StorageError, and count the vote, unless ``uploads`` have succeeded. Does not wait."""
        with self._counting_failure():
            uploads.check()

    def fail(self, error: Exception) -> None:
        """Count the vote, which fails because of ``error``."""
        self._metrics.count_vote(self._seconds(), _reason(error))

    def succeed(self) -> None:
        """Count the vote, whose blobs are in the bucket."""
        self._metrics.count_vote(self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def _counting_failure(self) -> Iterator[None]:
        with as_storage_error():
            try:
                yield
            except Exception as error:
                self.fail(error)
                raise


def _reason(error: Exception) -> str:
    """Return one of `metrics.VOTE_FAILURES`."""
    if isinstance(error, BlobNotFound):
        return "missing"
    if isinstance(error, CacheError):
        return "cache"
    return "timeout" if isinstance(error, BucketError) and error.code == TOO_LATE else "bucket"


@contextmanager
def as_storage_error(introduction: str = "") -> Iterator[None]:
    """Turn an error of this package into a plain StorageError, which a ZEO client can decode and show."""
    try:
        yield
    except S3BlobsError as error:
        raise StorageError(f"{introduction}{error}") from None
