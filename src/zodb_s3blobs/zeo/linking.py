"""Links for the clients of a ZEO server: a method besides ZEO's own, which a stock client can call.

Everything here runs on the loop thread; links are signed in a worker.
"""

import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ZEO.asyncio.server import Delay
from ZODB.POSException import StorageError

from ..storage import S3BlobStorage
from ..vote import as_storage_error
from . import errors

if TYPE_CHECKING:
    from ZEO.StorageServer import ZEOStorage as _Stock
else:
    _Stock = object  # the class of the handler that is taken over comes second, see `handler`


class LinkingHandler(_Stock):
    """The part of a client's handler that answers with links; a mixin of the server's own handler class."""

    blobs: S3BlobStorage

    def admit_links(self) -> None:
        """Let this client call `presigned_url`; ZEO closes the connection of one that calls an unknown method."""
        # A new set: that of ZEO is shared by all connections.
        self.connection.methods = {*self.connection.methods, "presigned_url"}

    def presigned_url(
        self,
        oid: bytes,
        serial: bytes,
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str | None = None,
        seconds: float | None = None,
    ) -> Any:
        """Answer with the result of `S3BlobStorage.presigned_url`; the arguments may be anything."""
        return _AnsweredLink(self, (oid, serial, content_type, filename, disposition, seconds))


class _AnsweredLink(Delay):
    """The answer to a request for a link: a URL or None, or an error."""

    #: What is wrong with the arguments concerns the client alone; that there are no credentials is logged already.
    unlogged_exception_types = (*Delay.unlogged_exception_types, StorageError)

    def __init__(self, handler: LinkingHandler, wanted: tuple) -> None:
        self._handler = handler
        self._wanted = wanted

    def set_sender(self, msgid: Any, protocol: Any) -> None:
        """Begin. ZEO calls this when the handler has returned the answer, which has no number before."""
        super().set_sender(msgid, protocol)
        try:
            signed = self._handler.blobs.request_presigned_url(self._handler, self._wanted)
        except Exception:
            self.error(sys.exc_info())
        else:
            signed.add_done_callback(lambda done: self._handler.call_soon_threadsafe(self._reply, done))

    def _reply(self, signed: "Future[str | None]") -> None:
        if not self._handler.connected:
            return
        try:
            errors.check(signed)
            with as_storage_error():
                url = signed.result()
        except Exception:
            self.error(sys.exc_info())
        else:
            self.reply(url)
