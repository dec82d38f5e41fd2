"""The planned end of a ZEO server: blobs that are being sent arrive whole, and no transaction is left half done.

When its connection ends in the middle of a blob, a stock client keeps the part that it has, and appends the next
download to it: from then on it reads wrong bytes. So the signals that end runzeo wait here until the messages under
way have arrived.

ZEO's own handler raises an exception wherever the main thread is at that moment: in the middle of a message, or of the
base storage's work. Data written to a client after that is garbage. The handler here only schedules the end on the
event loop, and ZEO's handler is called when all messages have been sent.

Transactions that are still under way then are aborted. Else their uploads would stay in the bucket until a pack, and
the base would stay locked: a pack that waits for that lock would keep the process alive forever.
"""

import asyncio
import fcntl
import logging
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ..monitoring.zeostats import event_loop_of

logger = logging.getLogger(__name__)

#: The most seconds that a stop waits for clients. A client that reads nothing, such as a suspended process, must not
#: keep the server from its end.
LONGEST = 30.0

#: Seconds between two checks of the connections.
_PAUSE = 0.02

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """The end of ``server``, a ZEO StorageServer; ``names``: those of its s3blobstorages.

    The methods run on the event loop's thread, except the signal handler.
    """

    def __init__(self, server: Any, names: Collection[str]) -> None:
        #: True once a signal has arrived; from then on no request is served.
        self.begun = False
        self._server = server
        self._names = names
        self._departures: list[_Departure] = []
        self._deadline = 0.0

    def on_signals(self) -> None:
        """Install a handler that runs before the program's own handlers of the signals that end it.

        Call this after runzeo has set its handlers. Does nothing for signals without a handler, or in another thread
        than the main one.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, self._before(handler))

    def _before(self, end: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        def handler(number: int, frame: Any) -> None:
            loop = event_loop_of(self._server)
            if self.begun or loop is None or not _runs_here(loop):
                end(number, frame)  # the second signal, or no client has been served yet
                return
            self.begun = True
            loop.call_soon_threadsafe(go_on, self._begin, loop, number)

        def go_on(step: Callable[[], bool], loop: Any, number: int) -> None:
            try:
                must_wait = step()
            except Exception:
                logger.exception("Stopping at once: waiting for the clients failed")
                must_wait = False
            if must_wait:
                loop.call_later(_PAUSE, go_on, self._look, loop, number)
            else:
                end(number, None)

        return handler

    def _begin(self) -> bool:
        """Refuse new requests; return whether the stop must wait."""
        self._deadline = time.monotonic() + LONGEST
        self._server.acceptor.server.close()
        self._departures = list(self._see_off())
        waited_for = self._under_way()
        if waited_for:
            logger.info(
                "Stopping: waiting for up to %g seconds until the blobs being sent have arrived at %s",
                LONGEST,
                _clients(waited_for),
            )
        return self._look()

    def _see_off(self) -> "Iterator[_Departure]":
        for handlers in self._server.zeo_storages_by_storage_id.values():
            for handler in list(handlers):
                if handler.storage_id in self._names:
                    yield _Departure(handler)
                else:
                    handler.connection.close()

    def _under_way(self) -> "list[_Departure]":
        return [departure for departure in self._departures if departure.is_under_way()]

    def _look(self) -> bool:
        """Continue the end of each connection; return whether the stop must wait longer."""
        for departure in self._departures:
            departure.go_on()
        left = self._under_way()
        if left and time.monotonic() < self._deadline:
            return True
        if left:
            logger.warning(
                "Stopping: after %g seconds, the blobs being sent have not arrived at %s. "
                "Delete the *.dl files in the blob-dir of these clients before they go on",
                LONGEST,
                _clients(left),
            )
        for departure in self._departures:
            departure.abort()
        return False


class _Departure:
    """The end of the connection of a `handler.BlobHandler`: messages under way arrive, and no others are sent."""

    def __init__(self, handler: Any) -> None:
        connection = handler.connection
        self.peer = connection.get_peername()
        self._handler = handler
        self._transport = connection.sm_protocol.transport
        self._all_written = False
        self._was_quiet = False
        self._all_sent = False
        # Data from the client must still be read: if any is left when the socket is closed, the kernel resets the
        # connection, and the client loses the data that it has not read yet.
        connection.sm_protocol.set_receive(_ignore)
        connection.write_message_iter(self._last())
        connection.write_message = connection.write_message_iter = _ignore

    def _last(self) -> Iterator[bytes]:
        """Record that all messages have left the connection's queue; yield no message."""
        self._all_written = True
        yield from ()

    def is_under_way(self) -> bool:
        """Return whether the stop must wait for this client.

        An idle connection is no reason to wait: its client may be a suspended process, or a machine that is off.
        """
        sent_lately = self._handler.blob_written > time.monotonic() - LONGEST
        return bool(self._handler.connected and (sent_lately or self._is_unsent()))

    def _is_unsent(self) -> bool:
        return bool(not self._all_written or self._transport.get_write_buffer_size() or _in_kernel(self._transport))

    def go_on(self) -> None:
        """Shut down the sending side once all data is sent; the client reads the rest, and then closes.

        Closing the connection here could make the client lose the end of a blob, if it is sending at that moment.
        """
        if self._all_sent or not self._handler.connected:
            return
        # TLS has another buffer, which cannot be read, but it is empty if the kernel has nothing to send twice.
        quiet = not self._is_unsent()
        if quiet and self._was_quiet:
            self._all_sent = True
            _end_sending(self._transport)
        self._was_quiet = quiet

    def abort(self) -> None:
        """Abort the transaction that the client has begun: its uploads are deleted, and the base is unlocked."""
        if self._handler.transaction is not None:
            self._handler.tpc_abort(self._handler.transaction.id)


def _runs_here(loop: Any) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _ignore(message: Any) -> None:
    """Drop a ``message`` that was received, or would be sent, after the end."""


def _in_kernel(transport: Any) -> int:
    """Return the number of unsent bytes in the kernel's buffer, 0 if the system does not report it."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", answer)[0]


def _end_sending(transport: Any) -> None:
    # Not by asyncio, which can shut down the sending side of some transports only.
    try:
        with transport.get_extra_info("socket").dup() as sending:
            sending.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the client has closed the connection


def _clients(departures: list[_Departure]) -> str:
    return ", ".join(str(departure.peer) for departure in departures)
