"""The commits of a ZEO client: their blobs are in the bucket before they ask for the commit lock.

The vote of a transaction with blobs is a coroutine on the event loop: it waits for uploads to staging keys, reserves a
tid, waits until all blobs are stored at it, and for its turn; only then does the stock vote queue for the commit lock.
With the lock nothing is left to be sent, except after an undo, for a transaction that was overtaken too often, and for
one with a tid of its own. The answer is a `Delay`. Everything here runs on the loop thread.
"""

import asyncio
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from ZEO.asyncio.server import Delay
from ZODB.POSException import ConflictError, POSKeyError, StorageError, StorageTransactionError
from ZODB.utils import z64

from ..commit.pending import Pending
from ..commit.staging import Staged
from ..commit.tids import GRACE, ROUNDS, Reservation
from ..openfiles import RAISE_THEIR_NUMBER, TOO_MANY_FILES
from ..s3.download import PART
from ..storage import S3BlobStorage
from ..vote import Vote
from ..workers import Completion
from . import errors

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ZEO.StorageServer import ZEOStorage as _Stock
else:
    _Stock = object  # the class of the handler that is taken over comes second, see `hook`


class VotingHandler(_Stock):
    """The part of a client's handler that receives and commits blobs; a mixin of the server's own handler class."""

    blob_tempfile: Any
    blob_log: list[tuple[bytes, bytes, bytes, str]]
    #: The bytes of the blob that is arriving, and its upload, if that has begun.
    blob_size = 0
    stream: Staged | None = None
    blobs: S3BlobStorage
    #: The blobs of the client's transaction; None without one.
    pending: Pending | None = None
    #: The call of vote that is being answered later.
    pending_vote: "_Answer | None" = None
    #: Why the transaction cannot be committed, found out where ZEO lets nobody tell the client: one of
    #: `metrics.VOTE_FAILURES`, and the sentence.
    deferred_error: tuple[str, str] | None = None
    #: The last vote of this client.
    voting: Vote
    #: When the client got the commit lock, a reading of `time.monotonic`; None while it does not have the lock.
    locked_since: float | None = None

    def tpc_begin(self, id: int, user: Any, description: Any, ext: Any, tid: Any = None, status: str = " ") -> None:
        try:
            super().tpc_begin(id, user, description, ext, tid, status)
        except OSError as error:  # it has a temporary file for the records; ZEO closes the connection
            if error.errno in TOO_MANY_FILES:
                logger.error("A client cannot begin a transaction: %s", RAISE_THEIR_NUMBER)
            raise
        if self.pending is None:
            self.pending = self.blobs.new_pending()

    # Receiving blobs. The client sends these messages without waiting for answers: an exception would cut the
    # connection and tell nobody why, so the reason waits for the vote.

    def storeBlobStart(self) -> None:
        # The stock method makes no room where no more files can be had.
        assert self.blob_tempfile is None
        self.blob_size = 0
        try:
            self.blob_tempfile = self.blobs.new_temporary()
        except StorageError as error:
            self.deferred_error = "cache", str(error)

    def storeBlobChunk(self, chunk: bytes) -> None:
        # The stock method does not notice when a nearly full disk takes only part of the chunk.
        if self.deferred_error is None:
            try:
                self.blobs.write_temporary(self.blob_tempfile[0], chunk)
            except StorageError as error:
                self.deferred_error = "cache", str(error)
                return
            self.blob_size += len(chunk)
            if self.stream is not None:
                self.stream.grew_to(self.blob_size)
            elif self.pending is not None and self.blob_size >= PART:
                self.stream = self.pending.stream(self.blob_tempfile[1], self.blob_size)

    def storeBlobEnd(self, oid: bytes, serial: bytes, data: bytes, id: int) -> None:
        if self.deferred_error is None and not is_id(oid):
            self.deferred_error = "client", "The oid of a blob is 8 bytes"
        if self.deferred_error is not None:
            self.drop_tempfile()
            return
        super().storeBlobEnd(oid, serial, data, id)
        assert self.pending is not None  # the stock method has found a transaction
        if self.pending.has_arrived(oid):  # an earlier one, which this one replaces
            self.blob_log = [stored for stored in self.blob_log if stored[0] != oid or stored is self.blob_log[-1]]
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.complete()
        self.pending.arrive(oid, self.blob_log[-1][-1], stream)

    def storeBlobShared(self, oid: bytes, serial: bytes, data: bytes, filename: str, id: int) -> None:
        try:
            self.blobs.fshelper.getPathForOID(oid)
        except StorageError as error:
            self.deferred_error = "client", str(error)

    def drop_tempfile(self) -> None:
        """Delete the file of a blob that has not arrived whole."""
        if self.blob_tempfile is not None:
            fd, filename = self.blob_tempfile
            self.blob_tempfile = None
            stream, self.stream = self.stream, None
            if stream is not None and self.pending is not None:
                self.pending.cut_off(stream)
            os.close(fd)
            try:
                os.unlink(filename)
            except FileNotFoundError:
                pass
            except OSError as error:  # the client may be gone: what follows must go on
                logger.warning("Cannot delete %s: %s; the next start of the server does", filename, error.strerror)

    # Before the commit lock

    def vote(self, tid: int) -> Any:
        """Refuse what cannot be committed; else store the blobs, then queue for the commit lock as in ZEO."""
        self._check_tid(tid, exc=StorageTransactionError)
        if self.deferred_error is None and self.blob_tempfile is not None:
            self.deferred_error = "client", "A blob of the transaction has not arrived whole: commit again"
        if self.deferred_error is not None:
            reason, sentence = self.deferred_error
            self.blobs.metrics.count_vote(None, reason)
            if self.pending is None or not self.pending.has_blobs:  # nor does its end count it
                self.blobs.metrics.transactions_aborted.inc()
            raise StorageError(sentence)
        if self.pending_vote is not None or self in self.lock_manager.waiting:
            raise StorageTransactionError("Already voting")
        self.voting = Vote(self.blobs.metrics, self.pending)
        if not self.blob_log or self.tid is not None:
            return super().vote(tid)
        return self._answer_later(functools.partial(self._store_blobs, tid))

    async def _store_blobs(self, tid: int) -> Any:
        """Store all blobs at a reserved tid; then return the result of the stock vote, which asks for the lock."""
        pending = self.pending
        assert pending is not None
        await self._completed(pending.staged())
        has_turn = not self.blobs.reserves_tids or self._conflicts()
        while not has_turn and pending.lost < ROUNDS:
            reservation = pending.reserve()
            await self._completed(pending.store_reserved())
            has_turn = await self._has_turn(reservation)
            if not has_turn:
                pending.lose_reservation()
        return super().vote(tid)

    def _conflicts(self) -> bool:
        """Return whether one of the blobs belongs to an object that has changed: the stock vote will refuse it."""
        return any(serial != z64 and self._current(oid) != serial for oid, serial, _, _ in self.blob_log)

    def _current(self, oid: bytes) -> bytes:
        try:
            return self.storage.getTid(oid)
        except POSKeyError:
            return z64

    async def _has_turn(self, reservation: Reservation) -> bool:
        """Wait until the transaction may ask for the commit lock; return False if it has lost its tid meanwhile."""
        tids = self.blobs.tids
        turn = asyncio.wrap_future(reservation.turn)
        tids.ready(reservation)
        while not reservation.turn.done():
            await asyncio.wait([turn], timeout=GRACE)
            if not reservation.turn.done():
                tids.overtake(reservation)
        return not reservation.is_lost

    async def _completed(self, uploads: Completion | None) -> None:
        """Wait for ``uploads``. Raises StorageError, and aborts the transaction, if they fail or come too late."""
        if uploads is None:
            return
        done = asyncio.wrap_future(uploads.done)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is `uploads` that tells
        while not uploads.is_over:
            await asyncio.wait([done], timeout=uploads.seconds_left)
        try:
            if uploads.done.done():
                errors.check(uploads.done)
            self.voting.require(uploads)
        except Exception:
            self.storage.tpc_abort(self.transaction)
            self._clear_transaction()
            raise

    # With the commit lock

    def _vote(self, delay: Any = None) -> Any:
        """Make the stock vote without waiting for S3; answer when everything is in the bucket.

        A transaction that was overtaken while it queued gives the lock back and reserves another tid.
        """
        pending = self.pending
        if not self.connected or pending is None:
            return super()._vote(delay)
        self.locked_since = time.monotonic()
        try:
            if pending.reservation is not None and not self.blobs.tids.holds(pending.reservation):
                pending.lose_reservation()
                return self._answer_later(functools.partial(self._store_blobs, self.transaction.id))
            return self._vote_with_lock(pending, delay)
        finally:
            if not self.locked:
                self._observe_lock()

    def _vote_with_lock(self, pending: Pending, delay: Any) -> Any:
        blob_log = list(self.blob_log)
        self.pending = None  # ended here and not by the stock vote
        try:
            stock = functools.partial(super()._vote, delay)
            result = self.blobs.vote_without_waiting(self.voting, stock)
        except BaseException as error:
            pending.abort(conflict=isinstance(error, ConflictError))
            raise
        self.pending = pending
        if self.conflicts:
            # The client resolves them and votes again.
            self.blob_log = blob_log
            return result
        if self.voting.uploads is None:
            if pending.has_blobs:
                self.voting.succeed()
            return result
        return self._answer_later(functools.partial(self._end_vote, self.voting.uploads, result))

    async def _end_vote(self, uploads: Completion, result: Any) -> Any:
        await self._completed(uploads)
        self.voting.succeed()
        return result

    # The answer, and the end

    def _answer_later(self, vote: Callable[[], Coroutine[Any, Any, Any]]) -> Delay:
        """Answer the call of vote with what ``vote`` returns or raises, unless the transaction ends before."""
        delay = _VoteAnswer()

        async def answer() -> None:
            try:
                result = await vote()
            except Exception:
                failure = sys.exc_info()
                self._forget(answering)
                delay.error(failure)
            except asyncio.CancelledError:
                raise
            except BaseException:
                self.connection.close()  # as when it leaves the stock handler: the lock must not stay with the client
                raise
            else:
                self._forget(answering)
                delay.reply(result)

        answering = self.pending_vote = _Answer(delay, self.connection.loop.create_task(answer()))
        return delay

    def cancel_answer(self) -> Delay | None:
        """Stop what the answer to a call of vote waits for; return the answer if the client still waits for it."""
        answering, self.pending_vote = self.pending_vote, None
        if answering is None or answering.task is asyncio.current_task(self.connection.loop):
            return None
        answering.task.cancel()
        return answering.delay

    def _forget(self, answering: "_Answer") -> None:
        if self.pending_vote is answering:
            self.pending_vote = None

    def tpc_finish(self, id: int) -> Any:
        """Refused until the vote has been answered."""
        if self.pending_vote is not None:
            raise StorageTransactionError("tpc_finish called before the vote has been answered")
        return super().tpc_finish(id)

    def _clear_transaction(self) -> None:
        """Forget the transaction, at a finish, an abort or a disconnect."""
        unanswered = self.cancel_answer()
        if unanswered is not None and self.connected:
            error = StorageTransactionError("The transaction was aborted before the vote has been answered")
            unanswered.error((type(error), error, None))
        self.deferred_error = None
        self.drop_tempfile()
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.abort(conflict=bool(self.conflicts))  # which the client could not resolve
        self.blob_log = []  # ZEO would delete its files, which belong to `pending`
        super()._clear_transaction()
        self._observe_lock()

    def _observe_lock(self) -> None:
        if self.locked_since is not None:
            self.blobs.metrics.commit_lock_held.observe(time.monotonic() - self.locked_since)
            self.locked_since = None


class _VoteAnswer(errors.Answer):
    what = "A transaction is aborted, because its vote fails"


class _Answer(NamedTuple):
    """An answer to a call of vote that is still to come."""

    delay: Delay
    task: asyncio.Task


def is_id(value: Any) -> bool:
    """Return whether the value that a client has sent can be an oid or a tid."""
    return type(value) is bytes and len(value) == 8
