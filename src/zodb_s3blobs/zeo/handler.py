"""The ZEO server hook: keeps every wait for S3 off the event loop.

A ZEO server is one event loop, and the stock handler of a client waits on it for blobs: while it does, all clients
stand still. When a server starts, each client handler that it makes from then on becomes, once its client has chosen
one of our storages, a subclass of its own type. No class is patched, and the handlers of other storages stay as they
are.

One rule keeps this simple: all calls of ZODB, ZEO and the base storage stay on the loop thread; only requests to S3
go to worker threads. Everything here runs on the loop thread unless it says otherwise.
"""

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, BinaryIO

import zope.event
from ZEO.asyncio.server import Delay
from ZEO.StorageServer import Serving, never_resolve_conflict
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IStorage
from ZODB.POSException import POSKeyError, StorageError

from ..bases.adapter import innermost
from ..monitoring import zeostats
from ..storage import S3BlobStorage
from . import errors, startlog
from .stop import Stop
from .voting import VotingHandler, is_id

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
        startlog.check_transaction_timeout(server, name)
        if getattr(server, "client_conflict_resolution", False):
            # ZEO sets this on the outermost storage, but it is the innermost one that resolves conflicts.
            innermost(blobs.base).tryToResolveConflict = never_resolve_conflict
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


class BlobHandler(VotingHandler):
    """The handler of a client of one of our storages; a mixin of the server's own handler class."""

    #: The blobs on their way to the client: the messages, and the file that they are read from.
    sending: list[tuple[Generator[tuple[str, tuple], None, None], BinaryIO]]
    #: When the last message of a blob was written to the connection, a reading of `time.monotonic`.
    blob_written = -math.inf

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
        self.drop_tempfile()
        self.cancel_answer()
        for messages, file in self.sending:  # or a deleted file would take its room until Python's garbage collection
            messages.close()
            file.close()
        super().notify_disconnected()

    # Reading

    def sendBlob(self, oid: bytes, serial: bytes) -> Any:
        """Send a cached blob at once, another when it has been fetched, whole and verified."""
        if not (is_id(oid) and is_id(serial)):
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

    def _pack_impl(self, time: float) -> None:
        """Pack in a thread, as ZEO does; the client is told of every end."""
        with errors.exceptions_only():
            super()._pack_impl(time)
