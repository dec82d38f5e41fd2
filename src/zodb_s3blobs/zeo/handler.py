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
from typing import Any

import zope.event
from ZEO.StorageServer import Serving, never_resolve_conflict
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IStorage
from ZODB.POSException import POSKeyError, StorageError

from ..bases.adapter import innermost
from ..monitoring import zeostats
from ..openfiles import Listener
from ..storage import S3BlobStorage
from . import errors, startlog
from .linking import LinkingHandler
from .sending import SendingHandler, SentBlob
from .stop import Stop
from .voting import VotingHandler, is_id

logger = logging.getLogger(__name__)


def install() -> None:
    """Hook into every ZEO server that starts in this process from now on; a second call does nothing."""
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
        if server.client_conflict_resolution:
            # ZEO sets this on the outermost storage, but it is the innermost one that resolves conflicts.
            innermost(blobs.base).tryToResolveConflict = never_resolve_conflict
    loop = zeostats.event_loop_of(server)
    if loop is not None:
        _explain_refusals(loop)
    stop = Stop(server, ours)
    stop.on_signals()
    stock = server.register_connection

    def register_connection(storage_id: str, handler: Any) -> Any:
        if stop.begun:
            handler.connection.close()
        if storage_id in ours:
            _take_over(handler, *ours[storage_id])
        return stock(storage_id, handler)

    # Not the making of handlers: clients that were waiting for the server have theirs already.
    server.register_connection = register_connection


def _explain_refusals(loop: Any) -> None:
    """Have the log say what to do when no more clients can be accepted; asyncio tries again every second."""
    listener = Listener("The ZEO server")

    def handle(loop: Any, context: dict[str, Any]) -> None:
        if "socket" not in context or not listener.explains(context.get("exception")):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


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


def _take_over(handler: Any, blobs: S3BlobStorage, mixin: type) -> None:
    """Serve the client of ``handler``, which has chosen the storage ``blobs``, in place of the stock handler."""
    errors.guard(handler.connection)
    stock_class: type = type(handler)
    handler.__class__ = _handler_class(mixin, stock_class)
    handler.bind_storage(blobs)
    handler.admit_links()


@functools.cache
def _handler_class(mixin: type, stock: type) -> type:
    return type(f"S3{mixin.__name__}", (mixin, stock), {})


class DemoHandler(SendingHandler, LinkingHandler):
    """The handler of a client of a demostorage that reads the blobs of one of our storages, in place of the stock one.

    It stores into its changes, which are none of our business; blobs of the changes have no links.
    """

    storage: Any

    def sendBlob(self, oid: bytes, serial: bytes) -> Any:
        """Send a blob of the changes as in ZEO, and one of our storage as `BlobHandler` does."""
        if self._is_changed(oid, serial):
            return super().sendBlob(oid, serial)
        return SentBlob(self, oid, serial)

    def _is_changed(self, oid: bytes, serial: bytes) -> bool:
        try:
            self.storage.changes.loadBlob(oid, serial)
        except (POSKeyError, AttributeError):  # the latter of changes that have no blobs yet
            return False
        return True


class BlobHandler(SendingHandler, VotingHandler, LinkingHandler):
    """The handler of a client of one of our storages; a mixin of the server's own handler class."""

    def notify_disconnected(self) -> None:
        """Clean up after a client that is gone, possibly in the middle of a blob."""
        self.drop_tempfile()
        self.cancel_answer()
        super().notify_disconnected()

    def sendBlob(self, oid: bytes, serial: bytes) -> Any:
        """Send a cached blob at once, another when it has been fetched, whole and verified."""
        if not (is_id(oid) and is_id(serial)):
            raise StorageError("The oid and the tid of a blob are 8 bytes each")
        return SentBlob(self, oid, serial)

    def _pack_impl(self, time: float) -> None:
        """Pack in a thread, as ZEO does; the client is told of every end."""
        with errors.exceptions_only():
            super()._pack_impl(time)
