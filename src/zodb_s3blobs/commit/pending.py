"""The blobs of one transaction: their uploads, their publication in the cache, their deletion after an abort.

A blob is a file from its arrival on. Its upload to the final key, which ends with the tid, begins when the transaction
has a tid: one that is reserved before the commit lock, or the one that the base has given it. The vote waits until
every blob is in the bucket; the finish hands the files to the cache; a worker deletes uploads that are not committed.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from prometheus_client import Counter

from ..revision import Revision
from ..s3.download import PART
from ..s3.errors import BucketError, NotDeleted
from ..workers import Completion, DaemonPool, Deadline
from .kept import WORTH_KEEPING
from .services import CommitServices
from .staging import Staged
from .tids import LONGEST, Reservation
from .upload import Restoration, Storable, UndoCopy, Upload

logger = logging.getLogger(__name__)

#: The code of the BucketError that tells that upload-timeout is over.
TOO_LATE = "upload-timeout"


class Pending:
    """The blobs of one transaction between the arrival of the first and the end of the transaction.

    Called on the thread that commits; nothing here waits for S3. ``shared``: other processes commit to the same
    database.
    """

    def __init__(self, services: CommitServices, shared: bool = False) -> None:
        #: The transaction that the base is committing, while it is.
        self.transaction: Any = None
        #: The tid that the transaction has from before, if it is restored.
        self.restored: bytes | None = None
        #: The tid that is reserved for the transaction, and how many the transaction has lost.
        self.reservation: Reservation | None = None
        self.lost = 0
        self._services = services
        self._metrics = services.metrics
        self._shared = shared
        self._arrived: dict[str, Upload] = {}  # by filename: what the base has not stored yet
        self._filenames: dict[bytes, str] = {}  # oid -> the filename of what has arrived last
        self._stored: dict[bytes, Upload] = {}  # by oid: what is to be committed
        self._undone: dict[bytes, UndoCopy] = {}  # likewise
        self._given_up: list[Storable] = []
        self._cut_off: list[Staged] = []  # uploads of files that have not arrived whole
        self._bytes = 0  # of all blobs that have come
        self._large: list[Upload] = []  # what can be staged, once there are enough bytes
        self._futures: list[Future] = []
        self._in_flight: set[Revision] = set()
        self._deadline: Deadline | None = None
        self._until_end = ExitStack()
        self._has_ended = False

    # Arrival

    def stream(self, filename: str, size: int) -> Staged | None:
        """Start the upload of the file ``filename``, of which ``size`` bytes, at least 8 MiB, have arrived.

        Return None if it cannot be uploaded before its end has arrived, or is not large enough yet.
        """
        services = self._services
        if not services.copies or not services.bucket.can_stream or size < services.stage_threshold:
            return None
        return services.staging.stream(filename, size, self)

    def arrive(self, oid: bytes, filename: str, staged: Staged | None = None) -> None:
        """Take over the complete file ``filename``, which lies in the cache's directory, as the blob of ``oid``.

        ``staged``: what `stream` returned for the file. If the transaction has many bytes of blobs by now, the upload
        of large ones to staging keys begins.
        """
        if oid in self._filenames:
            self.drop(self._filenames[oid])
        upload = Upload(self._services, oid, self._services.cache.take(filename), staged)
        self._arrived[filename] = upload
        self._filenames[oid] = filename
        self._take(upload)

    def cut_off(self, staged: Staged) -> None:
        """Give up what `stream` returned: the end of the blob will not arrive."""
        staged.cancel()
        self._cut_off.append(staged)

    def _count(self, upload: Upload) -> None:
        self._metrics.staged_blobs.inc()
        self._metrics.staged_bytes.inc(upload.size)

    def _take(self, upload: Upload) -> None:
        """Count an upload that has been noted; stage it if that is due. Raises RuntimeError if no thread can do it."""
        self._count(upload)
        self._bytes += upload.size
        threshold = self._services.stage_threshold
        if upload.staged is None and threshold and upload.size >= min(WORTH_KEEPING, threshold):
            self._large.append(upload)
        if self._bytes >= threshold and self._services.copies:
            for each in self._large:
                each.staged = self._services.staging.stage(each.file.path, self)
            self._large.clear()

    def _uploads(self) -> list[Upload]:
        return [*self._arrived.values(), *self._stored.values()]

    def has_arrived(self, oid: bytes) -> bool:
        """Return whether a blob of ``oid`` has arrived and is not stored yet."""
        return oid in self._filenames

    def has(self, filename: str) -> bool:
        """Return whether the file has been taken over by `arrive` and is not stored yet."""
        return filename in self._arrived

    def drop(self, filename: str) -> None:
        """Give up the blob whose file is ``filename``: it is not committed."""
        upload = self._arrived.pop(filename)
        self._filenames.pop(upload.oid, None)
        self._give_up(upload)

    def _give_up(self, blob: Storable | None) -> None:
        if blob is not None:
            blob.cancel()
            self._given_up.append(blob)
            self._large = [upload for upload in self._large if upload is not blob]

    @property
    def has_blobs(self) -> bool:
        """True if there is anything to commit."""
        return bool(self._arrived or self._stored or self._undone)

    # Storing in the base

    def begin(self, transaction: Any) -> None:
        """Note that the base has begun to commit ``transaction``."""
        self.transaction = transaction

    def begin_restoring(self, tid: bytes, restoring: AbstractContextManager[None]) -> None:
        """Restore a transaction that another database committed at ``tid``; ``restoring`` is left at its end."""
        self._until_end.enter_context(restoring)
        self.restored = tid

    def store(self, oid: bytes, filename: str) -> None:
        """Commit the file ``filename`` as the blob of ``oid``; take the file over if it has not arrived by `arrive`.

        In a transaction that is restored it is as `restore`. Raises CacheError.
        """
        if self.restored is not None:  # whatever is committed at that tid is not written over
            if self.has(filename):
                self.drop(filename)
            self.restore(oid, self.restored, filename)
            return
        upload = self._arrived.pop(filename, None)
        self._filenames.pop(oid, None)
        if upload is not None:
            self._commit(upload)
            return
        upload = Upload(self._services, oid, self._services.cache.adopt(filename))
        self._commit(upload)
        self._take(upload)

    def restore(self, oid: bytes, tid: bytes, filename: str) -> None:
        """Take over the file of a blob that another database committed at ``tid``. Raises CacheError.

        What the bucket has already is neither uploaded again nor deleted by an abort.
        """
        upload = Restoration(self._services, oid, self._services.cache.adopt(filename), serial=tid)
        self._count(upload)
        self._commit(upload)

    def _commit(self, upload: Upload) -> None:
        """Let ``upload`` be what is committed: the later of two stores, or of undo and store, of an object wins."""
        self._give_up(self._undone.pop(upload.oid, None))
        self._give_up(self._stored.pop(upload.oid, None))
        self._stored[upload.oid] = upload

    def undo(self, oid: bytes, tid: bytes, repeated: bytes | None = None) -> None:
        """Let the blob of ``oid`` go back to what it was at ``tid``, whatever was stored for the object before.

        ``repeated``: the tid of the same blob at an earlier revision, which is taken if there is none at ``tid``.
        """
        self._give_up(self._stored.pop(oid, None))
        self._undone[oid] = UndoCopy(self._services, oid, tid, repeated)

    # The vote

    def staged(self) -> Completion | None:
        """Return the completion of the uploads to staging keys; None if there are none."""
        futures = [upload.staged.uploaded for upload in self._uploads() if upload.staged is not None]
        if not futures:
            return None
        deadline = self._begin_vote()
        deadline.start()
        return self._completion(futures, deadline)

    def _begin_vote(self) -> Deadline:
        if self._deadline is None:
            self._deadline = Deadline(self._services.timeout)
        return self._deadline

    def reserve(self) -> Reservation:
        """Reserve a tid for the transaction; return its reservation."""
        blobs = self._arrived.values()
        slow = len(blobs) > 2 * self._services.concurrency or any(
            blob.size >= PART or blob.likely_seconds > LONGEST / 2 for blob in blobs
        )
        self.reservation = self._services.tids.reserve(slow, self.lost)
        return self.reservation

    def store_reserved(self) -> Completion | None:
        """Start what is left to be done until every blob that has arrived is stored at the reserved tid; see `vote`."""
        assert self.reservation is not None
        return self._store_all(self._arrived.values(), self.reservation.tid, self.reservation)

    def lose_reservation(self) -> None:
        """Note that another transaction has overtaken this one, whose blobs need a later tid."""
        self.reservation = self._deadline = None  # the wait for its turn, or for the commit lock, does not count
        self.lost += 1

    def vote(self, tid: bytes | None) -> Completion | None:
        """Start what is left to be done until every blob is stored at ``tid``, that of the transaction.

        Return what is over when it is done, or None if there is nothing to do. It fails with BucketError, or
        BlobNotFound if what an undo goes back to is not there; the transaction is then to be aborted.
        """
        if not self._stored and not self._undone:
            return None
        tid = self.restored or tid  # RelStorage has none of its own for a transaction that is restored
        assert tid is not None, "the base voted without a tid"
        self._deadline = None  # the wait for the commit lock does not count
        return self._store_all([*self._stored.values(), *self._undone.values()], tid)

    def waits_for(self) -> str:
        """Return why the vote waits for S3 with the commit lock: one of `metrics.COMMIT_LOCK_WAITS`."""
        if self.restored is not None:
            return "restore"
        if self._undone:
            return "undo"
        return "overtaken" if self.lost else "base"

    def _store_all(
        self, blobs: Iterable[Storable], tid: bytes, reservation: Reservation | None = None
    ) -> Completion | None:
        names = {Revision(blob.oid, blob.serial or tid): blob for blob in blobs}
        missing = {name: blob for name, blob in names.items() if blob.stored != name}
        if not missing:
            return None
        deadline = self._begin_vote()
        new = missing.keys() - self._in_flight
        self._services.in_flight.add_all(new, self)
        self._in_flight |= new
        futures = []
        small = {name: blob for name, blob in missing.items() if blob.size < PART}
        large = {name: blob for name, blob in missing.items() if name not in small}
        for pool, part in (self._services.small, small), (self._services.large, large):
            calls = [partial(self._store, blob, name, deadline, reservation) for name, blob in part.items()]
            submitted = pool.submit_all(self, calls)
            futures += submitted
            self._futures += submitted
        return self._completion(futures, deadline)

    def _store(self, blob: Storable, name: Revision, deadline: Deadline, reservation: Reservation | None) -> None:
        deadline.start()
        # An aborted transaction may have had that tid, of a base in memory whose clock was set back: what the abort
        # deletes has to be gone first. Where a tid is restored, it may be that of blobs that a pack deletes.
        self._services.in_flight.wait_until_judged(name, self)
        if reservation is None or not reservation.is_lost:  # else what has not begun yet can go to the next tid
            blob.store(name)

    def _completion(self, futures: list[Future], deadline: Deadline) -> Completion:
        return Completion(
            futures,
            deadline,
            BucketError(
                f"Not all {len(futures)} blobs of the transaction were stored in bucket "
                f"{self._services.bucket.name} within upload-timeout ({self._services.timeout:g} s)",
                TOO_LATE,
            ),
        )

    # The end

    def finish(self) -> None:
        """Publish the blobs in the cache; makes no request and never raises."""
        if self._stored:
            self._services.cache.publish_later(
                {upload.stored: upload.file for upload in self._stored.values() if upload.stored is not None}
            )
        self._settle(self._metrics.transactions_finished)

    def abandon(self) -> None:
        """Leave every blob in the bucket: the base failed to finish, and whether it committed only it can say.

        The next pack, which asks it, keeps or deletes the blobs.
        """
        for upload in self._stored.values():
            upload.file.discard()
        self._settle(self._metrics.transactions_aborted)

    def _settle(self, counter: Counter) -> None:
        """End the transaction; leave what it may have committed, and delete the rest."""
        self._end(counter)
        blobs: list[Storable] = [*self._stored.values(), *self._undone.values()]
        committed = {blob.stored for blob in blobs if blob.stored is not None}
        left_over: list[Storable] = [*self._arrived.values(), *self._given_up]
        for blob in left_over:
            blob.cancel()
        self._in_flight -= committed
        self._services.in_flight.remove(committed, self)
        if left_over:
            self._in_background(self._services.files, self._discard, left_over)
        if left_over or self._cut_off or self._in_flight or any(upload.staged for upload in self._stored.values()):
            self._in_background(self._services.cleaners, self._clean_up, left_over, blobs)

    def roll_back(self) -> None:
        """Note that the base has aborted the transaction, which is going to be voted on once more."""
        self._release()
        self.transaction = self._deadline = None
        self.lost = 0
        for undone in self._undone.values():
            self._give_up(undone)
        self._undone.clear()
        for upload in self._stored.values():
            self._arrived[upload.file.path] = upload
            self._filenames[upload.oid] = upload.file.path
        self._stored.clear()

    def abort(self, conflict: bool = False) -> None:
        """Give up all blobs; a worker deletes what was uploaded. A second call does nothing.

        After a ``conflict``, large uploads are kept for a minute, for the client runs the transaction again; unless the
        next round has begun, and moves them.
        """
        if self._has_ended:
            return
        self._end(self._metrics.transactions_aborted)
        conflict = conflict and all(future.done() for future in self._futures)
        blobs: list[Storable] = [*self._uploads(), *self._undone.values(), *self._given_up]
        for blob in blobs:
            blob.cancel()
        for future in self._futures:
            future.cancel()
        kept = [upload for upload in self._uploads() if conflict and upload.is_worth_keeping()]
        if kept and not self._shared:
            self._in_background(self._services.files, self._keep, kept, blobs)
        elif blobs or self._cut_off:
            self._in_background(self._services.files, self._discard, blobs)
            self._in_background(self._services.cleaners, self._clean_up, blobs, [])

    def _end(self, counter: Counter) -> None:
        self._has_ended = True
        self._until_end.close()
        self._release()
        uploads = self._uploads() + [blob for blob in self._given_up if isinstance(blob, Upload)]
        if uploads or self._undone:
            counter.inc()
        self._metrics.staged_blobs.dec(len(uploads))
        self._metrics.staged_bytes.dec(sum(upload.size for upload in uploads))

    def _release(self) -> None:
        """Give up the reserved tid. The base may have begun with another one: that of a transaction with a status."""
        if self.reservation is not None:
            self._services.tids.release(self.reservation)
            self.reservation = None

    def _in_background(self, pool: DaemonPool, work: Callable[..., None], *args: Any) -> None:
        try:
            pool.submit(work, *args)
        except RuntimeError:
            pass  # closed: the next start deletes the files, a pack the objects

    # In a worker

    def _keep(self, kept: list[Upload], blobs: list[Storable]) -> None:
        """Keep the uploads ``kept`` for the retry; delete all ``blobs`` of the transaction later, their files now."""

        def clean_up() -> None:
            self._in_background(self._services.cleaners, self._clean_up, blobs, [])

        try:
            self._services.kept.keep(kept, clean_up)
        except OSError:  # a file cannot be read
            clean_up()
        self._discard(blobs)

    def _discard(self, blobs: list[Storable]) -> None:
        """Delete the files of ``blobs``. Uploads that are still under way fail: their results are not needed."""
        for blob in blobs:
            if isinstance(blob, Upload):
                blob.file.discard()

    def _clean_up(self, unneeded: list[Storable], committed: list[Storable]) -> None:
        """Delete the objects of all ``unneeded``, and what ``committed`` has left at earlier keys. Waits for S3."""
        uploads = [blob for blob in [*unneeded, *committed] if isinstance(blob, Upload)]
        staged = [upload.staged for upload in uploads if upload.staged is not None] + self._cut_off
        started = [future for future in self._futures if not future.cancelled()]
        wait([*started, *(each.uploaded for each in staged if not each.uploaded.cancelled())])
        # An upload that failed may have arrived all the same: its answer was lost. Where other processes commit, one
        # of them may have been given the same tid, if a clock was set back: there it is left to a pack.
        keys = set().union(*(blob.written for blob in unneeded)) if not self._shared else set()
        keys |= set().union(*(blob.written for blob in committed))
        keys -= {blob.stored for blob in committed}  # an undo may have replaced what was at its key
        try:
            self._delete(partial(self._services.bucket.delete, sorted(keys)), len(keys))
            self._delete(partial(self._services.staging.delete, staged), len(staged))
        finally:
            self._services.in_flight.remove(self._in_flight, self)

    def _delete(self, delete: Callable[[], None], count: int) -> None:
        try:
            if count:
                delete()
        except BucketError as error:
            self._metrics.cleanup_failures.inc(len(error.keys) if isinstance(error, NotDeleted) else count)
            logger.warning("After a transaction: %s. The next pack deletes them", error)
