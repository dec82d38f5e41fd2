"""The planned end of a ZEO server: blobs that are being sent arrive whole.

When its connection ends in the middle of a blob, a stock client keeps the part that it has, and appends the next
download to it: from then on it reads wrong bytes. So the signals that end runzeo wait here until what was on its way
has arrived.

ZEO's own way would be an exception that the signal's handler raises wherever the main thread happens to be: in the
middle of a message, or of the base storage's work. What is written to a client after that makes no sense. Here the
handler only makes a note for the event loop, and is called again when everything has an end.
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

logger = logging.getLogger(__name__)

#: How many seconds a stop may wait for clients. One that takes nothing, a process that was stopped, must not keep the
#: server from its end.
LONGEST = 30.0

#: How many seconds pass before the connections are looked at again.
_PAUSE = 0.02

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """The end of ``server``, a ZEO StorageServer; ``names``: those of its storages that are ours.

    On the loop thread, except for the handler of the signals.
    """

    def __init__(self, server: Any, names: Collection[str]) -> None:
        #: Whether a signal has arrived: no request is served any more.
        self.begun = False
        self._server = server
        self._names = names
        self._departures: list[_Departure] = []
        self._deadline = 0.0

    def on_signals(self) -> None:
        """Put this before what the program does on the signals that end it; runzeo has set that up by now.

        Where it does nothing of its own there is nothing to wait with, nor where the server runs in another thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                signal.signal(number, self._before(handler))

    def _before(self, end: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        def handler(number: int, frame: Any) -> None:
            loop = getattr(self._server.acceptor, "event_loop", None)  # there is no acceptor after the end
            if self.begun or loop is None or not _runs_here(loop):
                end(number, frame)  # the second signal, or nobody has been served
                return
            self.begun = True
            loop.call_soon_threadsafe(go_on, self._begin, loop, number)

        def go_on(step: Callable[[], bool], loop: Any, number: int) -> None:
            try:
                must_wait = step()
            except Exception:
                logger.exception("Stopping at once")
                must_wait = False
            if must_wait:
                loop.call_later(_PAUSE, go_on, self._look, loop, number)
            else:
                end(number, None)

        return handler

    def _begin(self) -> bool:
        """Take no more requests. Return whether there is anything to wait for."""
        self._deadline = time.monotonic() + LONGEST
        self._server.acceptor.server.close()
        self._departures = list(self._see_off())
        waited_for = self._under_way()
        if waited_for:
            logger.info(
                "Stopping: waiting for up to %g seconds until what is being sent has arrived at %s",
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
        """Help the connections to their end. Return whether one of them, and time, is left."""
        for departure in self._departures:
            departure.go_on()
        left = self._under_way()
        if left and time.monotonic() >= self._deadline:
            logger.warning(
                "Stopping: after %g seconds, what is being sent has not arrived at %s. "
                "Delete the *.dl files in the blob-dir of these clients before they go on",
                LONGEST,
                _clients(left),
            )
            return False
        return bool(left)


class _Departure:
    """The end of the connection of a `handler.BlobHandler`: what is on its way arrives, and nothing else."""

    def __init__(self, handler: Any) -> None:
        connection = handler.connection
        self.peer = connection.get_peername()
        self._handler = handler
        self._transport = connection.sm_protocol.transport
        self._all_written = False
        self._was_quiet = False
        self._all_sent = False
        # What has arrived must be read: if there is anything left when the socket is closed, the kernel resets the
        # connection, and the client loses what it has not read yet.
        connection.sm_protocol.set_receive(_ignore)
        connection.write_message_iter(self._last())
        connection.write_message = connection.write_message_iter = _ignore

    def _last(self) -> Iterator[bytes]:
        """Note that all messages before this one, which is none, have left the connection's queue."""
        self._all_written = True
        yield from ()

    def is_under_way(self) -> bool:
        """Whether the client is to be waited for.

        Not if it only has a connection: it may be a stopped process, or a machine that was turned off.
        """
        sent_lately = self._handler.blob_written > time.monotonic() - LONGEST
        return bool(self._handler.connected and (sent_lately or self._is_unsent()))

    def _is_unsent(self) -> bool:
        return bool(not self._all_written or self._transport.get_write_buffer_size() or _in_kernel(self._transport))

    def go_on(self) -> None:
        """Tell the client that nothing will follow, once it has been sent everything: when it has read all, it closes.

        Closing the connection here could make the client lose the end of a blob, if it is sending just then.
        """
        if self._all_sent or not self._handler.connected:
            return
        # Under TLS there is a buffer that nobody can see, but it is empty if twice the kernel has nothing to send.
        quiet = not self._is_unsent()
        if quiet and self._was_quiet:
            self._all_sent = True
            _end_sending(self._transport)
        self._was_quiet = quiet


def _runs_here(loop: Any) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _ignore(message: Any) -> None:
    """Neither what is received nor what was to be sent is of use any more."""


def _in_kernel(transport: Any) -> int:
    """Return how many bytes the kernel has not got rid of yet, 0 where it cannot tell."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", answer)[0]


def _end_sending(transport: Any) -> None:
    # asyncio has this for some transports only.
    try:
        with transport.get_extra_info("socket").dup() as sending:
            sending.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the client was faster


def _clients(departures: list[_Departure]) -> str:
    return ", ".join(str(departure.peer) for departure in departures)
