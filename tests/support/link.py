"""The way to S3, as a TCP proxy in this process that can break in the ways in which networks do."""

import contextlib
import socket
import threading

from tests.support.zeo_server import free_address

#: How the way can be broken.
OUTAGES = ("refused", "silent to a SYN", "silent after the handshake", "reset", "not what was expected")


class Link:
    """Passes connections to ``url`` on to the service at ``target``. Use as a context manager.

    `break_down` cuts all of them and keeps new ones from the service until `mend`.
    """

    def __init__(self, target):
        self._target = target
        self._outage = None
        self._sockets = []
        self._address = free_address()
        self.url = "http://{}:{}".format(*self._address)

    def __enter__(self):
        self._listen()
        return self

    def __exit__(self, *exc):
        self._close()

    def break_down(self, outage):
        """``outage``: one of `OUTAGES`."""
        self._close()
        self._outage = outage
        if outage == "silent to a SYN":
            listener = self._keep(self._bound())
            listener.listen(0)
            for _ in range(4):  # nobody accepts them, and the queue of the listener is full
                client = self._keep(socket.socket())
                client.setblocking(False)
                client.connect_ex(self._address)
        elif outage != "refused":
            self._listen()

    def mend(self):
        self._close()
        self._outage = None
        self._listen()

    def _bound(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(self._address)
        return listener

    def _keep(self, one):
        self._sockets.append(one)
        return one

    def _close(self):
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _listen(self):
        listener = self._keep(self._bound())
        listener.listen(64)
        threading.Thread(target=self._accept, args=(listener, self._outage), daemon=True).start()

    def _accept(self, listener, outage):
        with contextlib.suppress(OSError):  # it has been closed
            while True:
                client = self._keep(listener.accept()[0])
                threading.Thread(target=self._serve, args=(client, outage), daemon=True).start()

    def _serve(self, client, outage):
        with contextlib.suppress(OSError):
            if outage == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            elif outage == "not what was expected":
                client.sendall(b"\x16\x03\x01 no HTTP\r\n")
                client.close()
            elif outage is None:
                host, port = self._target.removeprefix("http://").split(":")
                service = self._keep(socket.create_connection((host, int(port))))
                for one, other in (client, service), (service, client):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in one, other:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
