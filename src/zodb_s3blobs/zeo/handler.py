"""The ZEO server hook: keeps every wait for S3 off the event loop.

A ZEO server is one event loop, and the stock handler of a client waits on it for blobs: while it does, all clients
stand still. When a server starts, each client handler that it makes from then on becomes, once its client has chosen
one of our storages, a subclass of its own type. No class is patched, and the handlers of other storages stay as they
are.

One rule keeps this simple: all calls of ZODB, ZEO and the base storage stay on the loop thread; only requests to S3
go to worker threads. Everything here runs on the loop thread unless it says otherwise.
"""

import asyncio
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import zope.event
from ZEO.asyncio.server import Delay
from ZEO.StorageServer import Serving
from ZODB.blob import link_or_copy
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IStorage
from ZODB.POSException import POSKeyError, StorageError, StorageTransactionError

from ..monitoring import zeostats
from ..storage import S3BlobStorage
from ..vote import Vote
from ..workers import Completion
from . import errors, startlog
from .stop import Stop

if TYPE_CHECKING:
    from ZEO.StorageServer import ZEOStorage as _Stock
else:
    _Stock = object  # the class of the handler that is taken over comes second, see `_handler_class`

logger = logging.getLogger(__name__)

#: How many bytes of a blob go into one message to a client, as in ZEO.
_CHUNK = 59000


def install() -> None:
    """Have every ZEO server that starts in this process from now on looked at; a second call does nothing."""
    if _serving not in zope.event.subscribers:
        zope.event.subscribers.append(_serving)


def _serving(event: Any) -> None:
    """Hook into a server that has opened its storages and has no client yet."""
    if not isinstance(event, Serving):
        return
    server = event.server
    ours = {name: found for name, storage in server.storages.items() if (found := _find(name, storage)) is not None}
    if not ours:
        return
    for name, (blobs, _) in ours.items():
        if blobs.not_for_zeo is not None:
            raise _refused(name, blobs.not_for_zeo)
        zeostats.attach(server, name, blobs.exported)
        startlog.check_timeouts(server, name, blobs.upload_timeout)
    stop = Stop(server, ours)
    stop.on_signals()
    stock = server.create_client_handler

    def create_client_handler() -> Any:
        handler = stock()
        handler.register = functools.partial(_register, handler, handler.register, ours, stop)
        return handler

    server.create_client_handler = create_client_handler


def _find(name: str, storage: Any) -> "tuple[S3BlobStorage, type] | None":
    """Return the storage of ours that the server serves as ``storage``, and what its handlers get mixed in.

    Raises SystemExit if it is where its waits for S3 cannot be kept off the event loop.
    """
    # A wrapper around ours, such as zlibstorage, passes on attributes that it does not know.
    blobs = getattr(storage, "s3blobstorage", None)
    if blobs is not None:
        return blobs, BlobHandler
    if isinstance(storage, DemoStorage):
        below = getattr(storage.base, "s3blobstorage", None)
        if below is not None and not _hides_ours(storage.changes):
            return below, DemoHandler
    if _hides_ours(storage):
        raise _refused(
            name,
            f"it is inside a {type(storage).__name__}, whose clients would all wait whenever one of them waits for S3. "
            f"Put the s3blobstorage around it instead; only as the base of a demostorage, which stores into its "
            f"changes, it may be inside",
        )
    return None


def _hides_ours(storage: Any) -> bool:
    """Return whether ``storage`` is one of our storages, or has one in its attributes, or in theirs."""
    if isinstance(storage, S3BlobStorage):
        return True
    inside = [value for value in getattr(storage, "__dict__", {}).values() if IStorage.providedBy(value)]
    return any(value is not storage and _hides_ours(value) for value in inside)


def _refused(name: str, why: str) -> SystemExit:
    sentence = f"s3blobstorage {name!r}: {why}"
    logger.critical("%s", sentence)
    return SystemExit(sentence)


def _register(
    handler: Any,
    stock: Callable,
    ours: dict[str, tuple[S3BlobStorage, type]],
    stop: Stop,
    storage_id: str,
    read_only: bool,
) -> Any:
    """Do what ``stock``, the handler's own `register`, does, and take the client over if it has chosen one of ours."""
    if stop.begun:
        handler.connection.close()
        return None
    if storage_id not in ours:
        return stock(storage_id, read_only)
    errors.guard(handler.connection)
    result = stock(storage_id, read_only)
    blobs, mixin = ours[storage_id]
    stock_class: type = type(handler)
    handler.__class__ = _handler_class(mixin, stock_class)
    handler.bind_storage(blobs)
    return result


@functools.cache
def _handler_class(mixin: type, stock: type) -> type:
    return type(f"S3{mixin.__name__}", (mixin, stock), {})


def _when_found(handler: Any, requested: Future, oid: bytes, serial: bytes, send: Callable[[Future], None]) -> None:
    """Call ``send`` on the loop with ``requested``, when that is done, or with what was asked for instead of it."""

    def ask_again(requested: Future) -> None:
        try:
            repeated = handler.blobs.request_repeated(requested, oid, serial)
        except Exception as error:  # of the base
            requested = Future()
            requested.set_exception(error)
            repeated = None
        if repeated is None:
            send(requested)
        else:
            repeated.add_done_callback(lambda done: handler.call_soon_threadsafe(send, done))

    requested.add_done_callback(lambda done: handler.call_soon_threadsafe(ask_again, done))


class DemoHandler(_Stock):
    """The handler of a client of a demostorage that reads the blobs of one of our storages, in place of the stock one.

    It stores into its changes, which are none of our business.
    """

    blobs: S3BlobStorage
    storage: Any
    #: For `stop.Stop`, which waits for blobs that are being sent.
    sending = ()
    blob_written = -math.inf

    def bind_storage(self, blobs: S3BlobStorage) -> None:
        """Serve a client that has chosen a demostorage around ``blobs``."""
        self.blobs = blobs

    def sendBlob(self, oid: bytes, serial: bytes) -> Any:
        """Have a blob of our storage in the cache before the stock method asks for it."""
        stock = super().sendBlob
        if self._is_changed(oid, serial):
            return stock(oid, serial)
        delay = Delay()

        def send(requested: Future) -> None:
            try:
                errors.check(requested)
                with self.blobs.pinned(requested, oid, serial):
                    stock(oid, serial)
            except Exception:
                delay.error(sys.exc_info())
            else:
                delay.reply(None)

        _when_found(self, self.blobs.request_blob(oid, serial), oid, serial, send)
        return delay

    def _is_changed(self, oid: bytes, serial: bytes) -> bool:
        try:
            self.storage.changes.loadBlob(oid, serial)
        except (POSKeyError, AttributeError):  # the latter of changes that have no blobs yet
            return False
        return True


class BlobHandler(_Stock):
    """The handler of a client of one of our storages; a mixin of the server's own handler class."""

    blob_tempfile: Any
    blobs: S3BlobStorage
    #: The blobs on their way to the client: the messages, and the file that they are read from.
    sending: list[tuple[Generator[tuple[str, tuple], None, None], BinaryIO]]
    #: When the last message of a blob was written to the connection, a reading of `time.monotonic`.
    blob_written = -math.inf
    #: The call of vote that waits for uploads: staged ones before it has the commit lock, others with it.
    pending_vote: "_Pending | None" = None
    #: Why the transaction cannot be committed, found out where ZEO lets nobody tell the client: one of
    #: `metrics.VOTE_FAILURES`, and the sentence.
    deferred_error: tuple[str, str] | None = None
    #: The last vote of this client.
    voting: Vote

    def bind_storage(self, blobs: S3BlobStorage) -> None:
        """Serve a client that has chosen the storage ``blobs``, which the server may have in wrappers."""
        self.blobs = blobs
        self.sending = []
        stock_close = self.connection.close

        def close() -> Any:
            # Without this the commit lock would leak: ZEO forgets the handler when the server is the one to close,
            # as it does after transaction-timeout.
            result = stock_close()
            if self.connected:
                self.notify_disconnected()
            return result

        self.connection.close = close

    def notify_disconnected(self) -> None:
        """Clean up after a client that is gone, possibly in the middle of a blob."""
        self._drop_tempfile()
        pending, self.pending_vote = self.pending_vote, None
        if pending is not None:
            pending.timer.cancel()
        for messages, file in self.sending:  # or a deleted file would take its room until Python's garbage collection
            messages.close()
            file.close()
        super().notify_disconnected()

    def _drop_tempfile(self) -> None:
        if self.blob_tempfile is not None:
            fd, filename = self.blob_tempfile
            self.blob_tempfile = None
            os.close(fd)
            _unlink(filename)

    # Reading

    def sendBlob(self, oid: bytes, serial: bytes) -> Any:
        """Send a cached blob at once, another when it has been fetched, whole and verified."""
        if not (_is_id(oid) and _is_id(serial)):
            raise StorageError("The oid and the tid of a blob are 8 bytes each")
        pin = self.blobs.request_blob(oid, serial)
        if pin.done() and not pin.cancelled() and pin.exception() is None:
            return self._send(oid, serial, pin)
        delay = Delay()
        _when_found(self, pin, oid, serial, functools.partial(self._send_later, delay, oid, serial))
        return delay

    def _send_later(self, delay: Delay, oid: bytes, serial: bytes, pin: Future) -> None:
        try:
            self._send(oid, serial, pin)
        except Exception:
            delay.error(sys.exc_info())
        else:
            delay.reply(None)

    def _send(self, oid: bytes, serial: bytes, requested: Future) -> None:
        errors.check(requested)
        with self.blobs.pinned(requested, oid, serial) as path:
            file = open(path, "rb")  # noqa: SIM115 (closed when all of it has been sent)
        if self.connected:
            messages = self._messages(oid, serial, file)
            self.sending = [(sent, read) for sent, read in self.sending if not read.closed] + [(messages, file)]
            self.connection.call_async_iter(messages)
        else:
            file.close()

    def _messages(self, oid: bytes, serial: bytes, file: BinaryIO) -> Generator[tuple[str, tuple], None, None]:
        """Yield the messages that ZEO sends a client that has asked for a blob."""
        with file:
            yield "receiveBlobStart", (oid, serial)
            while chunk := self._read(file):
                yield "receiveBlobChunk", (oid, serial, chunk)
            yield "receiveBlobStop", (oid, serial)
        self.blob_written = time.monotonic()

    def _read(self, file: BinaryIO) -> bytes:
        try:
            return file.read(_CHUNK)
        except OSError:
            # The answer may be behind this in the queue of the connection, and then never get out of it.
            self.connection.loop.call_soon(self.connection.close)
            raise

    # Receiving blobs. The client sends these messages without waiting for answers: an exception would cut the
    # connection and tell nobody why, so the reason waits for the vote.

    def storeBlobStart(self) -> None:
        # The stock method makes no room where no more files can be had.
        assert self.blob_tempfile is None
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

    def storeBlobEnd(self, oid: bytes, serial: bytes, data: bytes, id: int) -> None:
        if self.deferred_error is None and not _is_id(oid):
            self.deferred_error = "client", "The oid of a blob is 8 bytes"
        if self.deferred_error is None:
            super().storeBlobEnd(oid, serial, data, id)
            self.blobs.staging.stage(self.blob_log[-1][-1])
        else:
            self._drop_tempfile()

    def storeBlobShared(self, oid: bytes, serial: bytes, data: bytes, filename: str, id: int) -> None:
        try:
            self.blobs.fshelper.getPathForOID(oid)
        except StorageError as error:
            self.deferred_error = "client", str(error)

    # Committing

    def vote(self, tid: int) -> Any:
        """Refuse what cannot be committed; else wait for staged uploads, then queue for the commit lock as in ZEO."""
        self._check_tid(tid, exc=StorageTransactionError)
        if self.deferred_error is not None:
            reason, sentence = self.deferred_error
            self.blobs.metrics.count_vote(None, reason)
            self.blobs.metrics.transactions_aborted.inc()
            raise StorageError(sentence)
        if self.pending_vote is not None:
            raise StorageTransactionError("Already voting")
        self.voting = self.blobs.new_vote()
        vote = super().vote
        staged = self.blobs.staging.waiting(filename for _, _, _, filename in self.blob_log)
        if staged is None:
            return vote(tid)

        def go_on() -> Any:
            if not staged.succeeded():
                self.blobs.metrics.transactions_aborted.inc()
                self._require(staged)
            return vote(tid)

        return self._reply_after(staged, go_on)

    def _vote(self, delay: Any = None) -> Any:
        """With the commit lock: the stock vote without its wait for S3, then answer when the uploads are done.

        ``locked`` is set by then, so that the lock stays with this client and others queue for it.
        """
        kept = self._link_blobs()
        try:
            result = self.blobs.vote_without_waiting(self.voting, functools.partial(super()._vote, delay))
        except Exception:
            _unlink_blobs(kept)
            raise
        if self.conflicts:
            # The client resolves them and votes again. ZEO would commit the records then, but no blobs.
            self.blob_log = kept
            return result
        _unlink_blobs(kept)
        uploads = self.voting.uploads
        if uploads is None:
            return result

        def end() -> Any:
            try:
                self._require(uploads)
            except Exception:
                self._abort_vote()
                raise
            self.voting.succeed()
            return result

        return end() if uploads.done.done() else self._reply_after(uploads, end)

    def _link_blobs(self) -> list[Any]:
        if not self.client_conflict_resolution:
            return []
        kept = []
        for oid, serial, data, filename in self.blob_log:
            link_or_copy(filename, f"{filename}.kept")
            kept.append((oid, serial, data, f"{filename}.kept"))
        return kept

    def _require(self, uploads: Completion) -> None:
        """Raise StorageError unless ``uploads`` have succeeded."""
        if uploads.done.done():
            errors.check(uploads.done)
        self.voting.require(uploads)

    def _abort_vote(self) -> None:
        """Abort the transaction, as the stock vote does when it fails."""
        logger.error("(%s) The blobs of a transaction could not be stored: it is aborted", self.log_label)
        self.storage.tpc_abort(self.transaction)
        self._clear_transaction()

    def _reply_after(self, uploads: Completion, reply: Callable[[], Any]) -> Delay:
        """Answer the call that is being handled with what ``reply`` returns, or raises.

        It is called when ``uploads`` have ended or must; not at all if the transaction ends meanwhile.
        """
        delay = Delay()

        def ended() -> None:
            if self.pending_vote is not pending:
                return
            self.pending_vote = None
            pending.timer.cancel()
            try:
                result = reply()
            except Exception:
                delay.error(sys.exc_info())
            else:
                delay.reply(result)

        pending = self.pending_vote = _Pending(delay, self.connection.loop.call_later(uploads.seconds_left, ended))
        uploads.done.add_done_callback(lambda done: self.call_soon_threadsafe(ended))
        return delay

    def tpc_finish(self, id: int) -> Any:
        """Refused until the vote has been answered."""
        if self.pending_vote is not None:
            raise StorageTransactionError("tpc_finish called before the vote has been answered")
        return super().tpc_finish(id)

    def _pack_impl(self, time: float) -> None:
        """Pack in a thread, as ZEO does; the client is told of every end."""
        with errors.exceptions_only():
            super()._pack_impl(time)

    def _clear_transaction(self) -> None:
        """Forget the transaction, at a finish, an abort or a disconnect."""
        pending, self.pending_vote = self.pending_vote, None
        if pending is not None:
            pending.timer.cancel()
            if self.connected:
                error = StorageTransactionError("The transaction was aborted before the vote has been answered")
                pending.delay.error((type(error), error, None))
        self.deferred_error = None
        self._drop_tempfile()
        for _, _, _, filename in self.blob_log:
            self.blobs.staging.cancel_for(filename)
        super()._clear_transaction()


class _Pending(NamedTuple):
    """A call of the client that waits for uploads."""

    delay: Delay
    timer: asyncio.TimerHandle


def _is_id(value: Any) -> bool:
    """Return whether the value that a client has sent can be an oid or a tid."""
    return type(value) is bytes and len(value) == 8


def _unlink_blobs(blob_log: list[Any]) -> None:
    for _, _, _, filename in blob_log:
        _unlink(filename)


def _unlink(filename: str) -> None:
    try:
        os.unlink(filename)
    except FileNotFoundError:
        pass
