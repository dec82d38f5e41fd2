"""The blobs of one transaction: staged, uploaded, published or rolled back.

A blob that ZODB hands over becomes a staged file, and its upload to the final key starts at once in a worker. The
vote waits for the uploads; the finish renames the staged files into the cache; the abort leaves it to a worker to
delete what was uploaded. Until the finish, only the transaction's owner can know the tid that the key ends with.
"""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from prometheus_client import Counter

from .cache.files import Cache, Incoming, Pin
from .inflight import InFlight
from .metrics import Metrics
from .revision import Revision
from .s3.bucket import Bucket
from .s3.errors import BlobNotFound, BucketError, NotDeleted, TransferCancelled
from .staging import TOO_LATE, Staged, Staging
from .workers import Completion, DaemonPool, Deadline

logger = logging.getLogger(__name__)

#: How long, in seconds, `Uploads.close` waits for the deletion of what aborted transactions uploaded.
_CLOSE_TIMEOUT = 2.0


class Uploads:
    """The worker threads and the register of keys in flight that all transactions of one bucket share.

    ``fetch`` reads a blob through the cache; ``concurrency`` uploads go on at once; those of one transaction may
    take ``timeout`` seconds; blobs of at least ``stage_threshold`` bytes can be staged, none if it is 0.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        fetch: Callable[[bytes, bytes], Pin],
        metrics: Metrics,
        concurrency: int,
        timeout: float,
        stage_threshold: int = 0,
    ) -> None:
        self.bucket = bucket
        self.cache = cache
        self.fetch = fetch
        self.metrics = metrics
        self.timeout = timeout
        self.workers = DaemonPool(concurrency, "s3blobs upload")
        # Of its own, so that nobody's upload waits for the cleanup after somebody else's.
        self.cleaners = DaemonPool(2, "s3blobs cleanup")
        self.staging = Staging(bucket, self.cleaners, metrics, concurrency, timeout, stage_threshold)
        self.in_flight = InFlight()

    def begin(self, transaction: Any, tid: bytes | None, shared: bool = False) -> "Commit":
        """Return the commit of ``transaction`` at ``tid``; `Commit.finish` or `Commit.abort` must end it.

        Without a ``tid``, it is `Commit.vote` that is told. ``shared``: other processes commit to the same database.
        """
        return Commit(self, transaction, tid, shared)

    def close(self) -> None:
        """Give up what is queued, and wait a little for the cleanup after aborted transactions."""
        self.staging.close()
        self.workers.shutdown(wait=False, cancel_futures=True)
        self.cleaners.shutdown(timeout=_CLOSE_TIMEOUT)


class Commit:
    """The blobs of one transaction between its begin and its finish or abort.

    Called on the thread that commits; nothing here waits for S3.
    """

    def __init__(self, uploads: Uploads, transaction: Any, tid: bytes | None, shared: bool) -> None:
        self.transaction = transaction
        self.tid = tid
        self._shared = shared
        self._uploads = uploads
        self._metrics = uploads.metrics
        self._deadline = Deadline(uploads.timeout)
        self._blobs: list[_Blob] = []
        self._latest: dict[Revision, _Blob] = {}
        self._undone: dict[bytes, tuple[bytes, bytes | None]] = {}  # oid -> arguments of `undo`
        self._without_tid: dict[bytes, Incoming] = {}  # by oid: what has no key yet
        self._until_end = ExitStack()
        #: The tid that the transaction has from before, if it is restored.
        self.restored: bytes | None = None
        self._aborted = threading.Event()

    def begin_restoring(self, tid: bytes, restoring: AbstractContextManager[None]) -> None:
        """Restore a transaction that another database committed at ``tid``; ``restoring`` is left at its end."""
        self._until_end.enter_context(restoring)
        self.restored = tid

    def store(self, oid: bytes, filename: str) -> None:
        """Take the file ``filename`` over as the transaction's blob of ``oid`` and start its upload.

        What has been staged is already in the bucket and only copied. Without a tid a large blob is staged now, and
        the upload of others starts with the vote. In a transaction that is restored it is as `restore`.
        """
        if self.restored is not None:  # whatever is committed at that tid is not written over
            self._uploads.staging.cancel_for(filename)
            self.restore(oid, self.restored, filename)
            return
        file = self._uploads.cache.adopt(filename)
        if self.tid is not None:
            self._store(Revision(oid, self.tid), file, self._uploads.staging.claim(filename))
            return
        if oid in self._without_tid:
            self._drop(self._without_tid[oid])
        self._without_tid[oid] = file
        self._uploads.staging.stage(file.path)

    def _store(self, name: Revision, file: Incoming, staged: Staged | None) -> None:
        self._start(_Blob(name, file, staged), self._upload if staged is None else self._publish_staged)

    def _drop(self, file: Incoming) -> None:
        self._uploads.staging.cancel_for(file.path)
        file.discard()

    def restore(self, oid: bytes, tid: bytes, filename: str) -> None:
        """Take over and upload the file of a blob that another database committed at ``tid``.

        What the bucket has already is neither uploaded again nor deleted by an abort.
        """
        file = self._uploads.cache.adopt(filename)
        self._start(_Blob(Revision(oid, tid), file), self._upload_if_missing)

    def undo(self, oid: bytes, tid: bytes, repeated: bytes | None = None) -> None:
        """Let the blob of ``oid`` go back to what it was at ``tid``; of several calls for an oid the last holds.

        ``repeated``: the tid of the same blob at an earlier revision, which is taken if there is none at ``tid``.
        """
        self._undone[oid] = tid, repeated

    def staged(self) -> Completion | None:
        """Return the completion of all blobs that were staged without a tid; None if there are none."""
        return self._uploads.staging.waiting(file.path for file in self._without_tid.values())

    def vote(self, tid: bytes | None = None) -> Completion | None:
        """Start what is left to start; what is returned is over when every blob is in the bucket; None without blobs.

        ``tid``: the transaction's, if it was not known when it began. It fails with BucketError, or BlobNotFound if
        what an undo goes back to is not there; the transaction is then to be aborted.
        """
        if self.tid is None:
            self.tid = tid
        if self._without_tid or self._undone:
            assert self.tid is not None, "the base voted without a tid"
            for oid, file in self._without_tid.items():
                self._store(Revision(oid, self.tid), file, self._uploads.staging.claim(file.path))
            self._without_tid.clear()
            for oid, sources in self._undone.items():
                self._start(_Blob(Revision(oid, self.tid), None), self._copy, *sources)
        self._undone.clear()
        if not self._blobs:
            return None
        return Completion(
            [blob.future for blob in self._blobs],
            self._deadline,
            BucketError(
                f"Not all {len(self._blobs)} blobs of the transaction were stored in bucket "
                f"{self._uploads.bucket.name} within upload-timeout ({self._uploads.timeout:g} s)",
                TOO_LATE,
            ),
        )

    def finish(self) -> None:
        """Publish the blobs in the cache; makes no request and never raises."""
        for blob in self._blobs:
            if blob.file is not None:
                try:
                    if self._latest[blob.name] is blob:
                        blob.file.publish(*blob.name).release()
                except Exception:
                    # It is in the bucket, and committed: the next reader fetches it from there.
                    logger.exception("A committed blob could not be put into the cache")
                blob.file.discard()
        self._uploads.in_flight.remove(self._latest, self)
        self._ended(self._metrics.transactions_finished)

    def abandon(self) -> None:
        """Leave everything as it is: the base failed to finish, and whether it committed only it can say.

        The next pack, which asks it, keeps or deletes the blobs.
        """
        for blob in self._blobs:
            if blob.file is not None:
                blob.file.discard()
        self._uploads.in_flight.remove(self._latest, self)
        self._ended(self._metrics.transactions_aborted)

    def abort(self) -> None:
        """Give up all blobs; a worker deletes what was uploaded."""
        self._aborted.set()
        for file in self._without_tid.values():
            self._drop(file)
        for blob in self._blobs:
            blob.future.cancel()
        if self._blobs:
            try:
                self._uploads.cleaners.submit(self._clean_up)
            except RuntimeError:
                pass  # closed: the next start sweeps the files, the next pack the objects
        self._ended(self._metrics.transactions_aborted)

    def _ended(self, counter: Counter) -> None:
        self._until_end.close()
        if self._blobs or self._without_tid:
            counter.inc()
            self._metrics.staged_blobs.dec(len(self._blobs))
            self._metrics.staged_bytes.dec(sum(blob.size for blob in self._blobs))

    # In a worker

    def _start(self, blob: "_Blob", work: Callable[..., None], *args: Any) -> None:
        if not self._blobs:
            self._deadline = Deadline(self._uploads.timeout)
            self._deadline.start()
        before = self._latest.get(blob.name)
        if before is None:
            self._uploads.in_flight.add_all([blob.name], self)
        blob.future = self._uploads.workers.submit(self._run, blob, before, work, *args)
        self._latest[blob.name] = blob
        self._blobs.append(blob)
        self._metrics.staged_blobs.inc()
        self._metrics.staged_bytes.inc(blob.size)

    def _run(self, blob: "_Blob", before: "_Blob | None", work: Callable[..., None], *args: Any) -> None:
        if before is not None:
            # Stored twice by one transaction: the later one must win, so it must not overtake.
            before.future.exception()
        # A base in memory may give a tid again after an abort, if the clock was set back: what the abort deletes in the
        # background has to be gone first. Where a tid is restored, it may be that of blobs that a pack deletes.
        self._uploads.in_flight.wait_until_judged(blob.name, self)
        self._check_wanted()
        work(blob, *args)

    def _check_wanted(self, transferred: int = 0) -> None:
        if self._aborted.is_set():
            raise TransferCancelled()

    def _upload(self, blob: "_Blob") -> None:
        assert blob.file is not None
        blob.file.sync()
        blob.attempted = True
        self._uploads.bucket.put(*blob.name, blob.file.path, self._check_wanted)

    def _publish_staged(self, blob: "_Blob") -> None:
        assert blob.file is not None and blob.staged is not None
        try:
            digest = blob.staged.uploaded.result()
            blob.attempted = True
            self._uploads.bucket.publish_staged(blob.staged.name, *blob.name, blob.size, digest)
        except (BlobNotFound, BucketError) as error:
            _raise_timeout(error)
            logger.warning("%s; uploading it again instead", error)
            self._upload(blob)
        self._uploads.staging.release(blob.staged)

    def _upload_if_missing(self, blob: "_Blob") -> None:
        assert blob.file is not None
        if self._uploads.bucket.find(*blob.name, blob.file.path) is None:
            self._upload(blob)
        else:
            blob.file.sync()

    def _copy(self, blob: "_Blob", source: bytes, repeated: bytes | None = None) -> None:
        oid, tid = blob.name
        blob.attempted = True
        try:
            try:
                self._uploads.bucket.copy(oid, source, tid)
            except (BlobNotFound, BucketError) as error:
                # Some services cannot copy, or not what is encrypted. Or it is only in fallback-blob-dir.
                _raise_timeout(error)
                logger.warning("%s; uploading it again instead", error)
                self._check_wanted()
                with self._uploads.fetch(oid, source) as path:
                    self._uploads.bucket.put(oid, tid, path, self._check_wanted)
        except BlobNotFound:
            if repeated is not None:
                self._copy(blob, repeated)
                return
            self._metrics.missing_blobs.inc()
            raise

    def _clean_up(self) -> None:
        started = [blob.future for blob in self._blobs if not blob.future.cancelled()]
        wait(started)
        for blob in self._blobs:
            if blob.file is not None:
                blob.file.discard()
            if blob.staged is not None:
                self._uploads.staging.release(blob.staged)
        # An upload that failed may have arrived all the same: its answer was lost. Where other processes commit, one
        # of them may have been given the same tid, if a clock was set back: there it is left to a pack.
        uploaded = {blob.name for blob in self._blobs if blob.attempted and not self._shared}
        try:
            if uploaded:
                self._uploads.bucket.delete(sorted(uploaded))
        except (BlobNotFound, BucketError) as error:
            self._metrics.cleanup_failures.inc(len(error.keys) if isinstance(error, NotDeleted) else len(uploaded))
            logger.warning("After an aborted transaction: %s. The next pack deletes them", error)
        finally:
            self._uploads.in_flight.remove(self._latest, self)


def _raise_timeout(error: Exception) -> None:
    """Raise ``error`` if it is the silence of the service: another request under the commit lock would not help."""
    if isinstance(error, BucketError) and error.reason == "timeout":
        raise error


class _Blob:
    """One blob of a transaction; ``file`` is None for a copy inside the bucket."""

    future: Future

    def __init__(self, name: Revision, file: Incoming | None, staged: Staged | None = None) -> None:
        self.name = name
        self.file = file
        self.size = os.path.getsize(file.path) if file is not None else 0  # in bytes; a copy needs no room here
        self.staged = staged
        #: Whether its key may have been written.
        self.attempted = False
