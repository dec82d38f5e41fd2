"""Blobs on their way to a client of a ZEO server: each is read from the cache when its turn has come.

The messages of a connection leave in the order in which they were queued. A blob that waits in that queue has a pin,
which keeps its file in the cache, and no open file; so a connection has one open file at most, however many blobs its
client asks for at the same time. Everything here runs on the loop thread.
"""

import errno
import logging
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ZODB.POSException import StorageError

from ..cache.files import Pin
from ..openfiles import RAISE_THEIR_NUMBER, TOO_MANY_FILES
from ..storage import S3BlobStorage
from . import errors

if TYPE_CHECKING:
    from ZEO.StorageServer import ZEOStorage as _Stock
else:
    _Stock = object  # the class of the handler that is taken over comes second, see `handler`

logger = logging.getLogger(__name__)

#: How many bytes of a blob go into one message to a client, as in ZEO.
CHUNK = 59000

#: The size in front of each message of ZEO.
_SIZE = struct.Struct(">I")


class SendingHandler(_Stock):
    """The part of a client's handler that sends blobs; a mixin of the server's own handler class."""

    blobs: S3BlobStorage
    #: The answers that are not complete: the blob is being fetched, waits for its turn, or is being sent.
    sending: "set[SentBlob]"
    #: When the last message of a blob was written to the connection, a reading of `time.monotonic`.
    blob_written = -math.inf

    def bind_storage(self, blobs: S3BlobStorage) -> None:
        """Serve a client that has chosen the storage ``blobs``, which the server may have in wrappers."""
        self.blobs = blobs
        self.sending = set()
        stock_close = self.connection.close

        def close() -> Any:
            # Without this pins, and a commit lock, would leak: ZEO forgets the handler when the server is the one to
            # close, as it does after transaction-timeout.
            result = stock_close()
            if self.connected:
                self.notify_disconnected()
            return result

        self.connection.close = close

    def notify_disconnected(self) -> None:
        """Give up what was on its way to a client that is gone."""
        for sent in list(self.sending):
            sent.give_up()
        super().notify_disconnected()


class SentBlob(errors.Answer):
    """The answer to a request for a blob: its messages and then the reply, or an error.

    A stock client keeps what it has of a blob that breaks off, and appends the next download to it. So nothing is sent
    before the file is open and its first bytes are read: until then, an error is an answer like any other. Where a file
    fails later, the blob is fetched again, and goes on from there.
    """

    what = "A blob cannot be sent"

    def __init__(self, handler: SendingHandler, oid: bytes, serial: bytes) -> None:
        self._handler = handler
        self._oid = oid
        self._serial = serial
        self._pin = handler.blobs.cached_blob(oid, serial)
        self._requested = handler.blobs.request_blob(oid, serial, handler) if self._pin is None else None
        self._file: int | None = None  # its descriptor
        self._position = 0  # the bytes that have been sent
        self._is_repeated = False  # True once the file had to be fetched again
        handler.sending.add(self)

    def set_sender(self, msgid: Any, protocol: Any) -> None:
        """Begin. ZEO calls this when the handler has returned the answer, which has no number before."""
        super().set_sender(msgid, protocol)
        self._transport = protocol.sm_protocol.transport
        if self._requested is None:
            self._begin()
        else:
            self._soon(self._requested, self._look_again)

    def give_up(self) -> None:
        """Close the file, and let the cache evict it."""
        self._handler.sending.discard(self)
        if self.protocol is None and self._requested is not None:
            # The client wanted no answer, and ZEO has dropped this one.
            self._requested.add_done_callback(_release)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        if self._pin is not None:
            self._pin.release()
        self._file = self._pin = None

    # The file

    def _soon(self, requested: Future, then: Callable[[Future], None]) -> None:
        """Call ``then`` on the loop when ``requested`` is done."""
        requested.add_done_callback(lambda done: self._handler.call_soon_threadsafe(then, done))

    def _look_again(self, requested: Future) -> None:
        """Take what was found, or what the revision repeats."""
        try:
            repeated = self._handler.blobs.request_repeated(requested, self._oid, self._serial)
        except Exception:  # of the base
            self._fail()
            return
        if repeated is None:
            self._found(requested)
        else:
            self._soon(repeated, self._found)

    def _found(self, requested: Future) -> None:
        try:
            errors.check(requested)
            self._pin = self._handler.blobs.pinned(requested, self._oid, self._serial)
        except Exception:
            self._fail()
        else:
            self._begin()

    def _begin(self) -> None:
        """Queue the blob, whose file has been found."""
        if self in self._handler.sending:
            self.protocol.write_message_iter(self._messages())
        else:  # the client is gone
            self._close()

    def _messages(self) -> Iterator[bytes]:
        """Yield the messages that ZEO sends a client that has asked for a blob, and the reply."""
        pin = self._pin
        if pin is None:
            return  # the client is gone
        name, size = (self._oid, self._serial), pin.size
        try:
            self._file = os.open(pin.path, os.O_RDONLY | os.O_CLOEXEC)  # closed by `give_up`
            chunk = self._read(size)
            if size == len(chunk):
                self._write_at_once(chunk)
                return
            if self._position == 0:
                yield self._message("receiveBlobStart", name)
            while chunk:
                self._position += len(chunk)
                yield self._message("receiveBlobChunk", (*name, chunk))
                self._pause_if_full()
                chunk = self._read(size)
        except OSError as error:
            self._fetch_again(pin, error)
            return
        if self._file is None:
            return  # the connection is being closed; the client must not take a part for the whole
        yield self._message("receiveBlobStop", name)
        yield self._end()

    def _read(self, size: int) -> bytes:
        """Return the next bytes of the blob of ``size`` bytes; none at its end, and after `give_up`."""
        if self._file is None:
            return b""
        wanted = min(CHUNK, size - self._position)
        data = os.pread(self._file, wanted, self._position)
        if len(data) < wanted:
            raise OSError(errno.EIO, "The file is shorter than the blob")
        return data

    # What is sent

    def _message(self, method: str, arguments: tuple) -> bytes:
        return self.protocol.encode(0, True, method, arguments)

    def _end(self) -> bytes:
        """Return the reply to a client that has got all of the blob."""
        self._handler.blob_written = time.monotonic()
        self.sent = "reply"
        self.give_up()
        return self.protocol.encode(self.msgid, 0, ".reply", None)

    def _write_at_once(self, data: bytes) -> None:
        """Send a small blob and the reply: one call of the system, which takes most of the time of a small read."""
        name = self._oid, self._serial
        messages = [self._message("receiveBlobStart", name), self._message("receiveBlobStop", name), self._end()]
        if data:
            messages.insert(1, self._message("receiveBlobChunk", (*name, data)))
        self._transport.writelines([part for message in messages for part in (_SIZE.pack(len(message)), message)])
        self._pause_if_full()

    def _pause_if_full(self) -> None:
        """Let the connection take no more messages while its client does not read those that it has."""
        # Setting the limits, here those that it has, compares them. Python 3.12.0 to 3.12.8, 3.13.0 and 3.13.1 forget
        # that after `writelines` (CVE-2024-12254), and would take all of a blob into memory, at once.
        self._transport.set_write_buffer_limits()

    # What fails

    def _fetch_again(self, pin: Pin, error: OSError) -> None:
        """Fetch the blob whose file cannot be read, and go on; fail if that was tried before, or cannot help."""
        blobs = self._handler.blobs
        blobs.metrics.cache_errors.labels("read").inc()
        too_many = error.errno in TOO_MANY_FILES
        advice = RAISE_THEIR_NUMBER if too_many else "the blob is in the bucket as well: read it again"
        sentence = f"Cannot read {pin.path}: {error.strerror}; {advice}"
        is_damaged = not too_many and self._is_still_there(pin.path, error)
        self._close()
        try:
            if too_many or self._is_repeated:
                raise StorageError(sentence)
            logger.warning("Cannot read %s: %s; the blob is fetched again", pin.path, error.strerror)
            self._is_repeated = True
            if is_damaged:
                blobs.uncache(self._oid, self._serial)
            requested = blobs.request_blob(self._oid, self._serial, self._handler)
        except Exception:
            self._fail()
        else:
            self._soon(requested, self._look_again)

    def _is_still_there(self, path: str, error: OSError) -> bool:
        """Return whether ``path`` is the file that could not be read, and not one that was fetched since."""
        if self._file is None:
            return error.errno != errno.ENOENT
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(path))
        except OSError:
            return False

    def _fail(self) -> None:
        """Answer with the error that is being handled; after the beginning of the blob, only the end of all helps."""
        self.give_up()
        if self._position == 0:
            self.error(sys.exc_info())
            return
        logger.error(
            "A blob broke off on its way to the client %s. Delete the *.dl files in its blob-dir before it goes on",
            self.protocol.get_peername(),
            exc_info=True,
        )
        # Not at once: the connection is writing messages.
        self.protocol.loop.call_soon(self.protocol.close)


def _release(requested: "Future[Pin]") -> None:
    if not requested.cancelled() and requested.exception() is None:
        requested.result().release()
