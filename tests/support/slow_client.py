"""A ZEO client that takes what the server sends when the test wants it to."""

import socket

from ZEO.asyncio.marshal import decoder, encoder

from tests.support.zeo_clients import MB

#: Larger than what the kernel takes of it while its client takes nothing.
LARGE = 20 * MB


class SlowClient:
    """A client that says what it wants in ZEO's protocol, and takes what it is sent when the test wants it to."""

    def __init__(self, address, storage="1", connection=None):
        """``connection``: a socket that is connected already."""
        self._socket = connection or socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._socket.settimeout(60)
        if connection is None:
            self._socket.connect(address)
        self._number = 0
        #: The names of the messages about blobs that it has taken.
        self.received = []
        protocol = self._frame()
        self._encode, self._decode = encoder(protocol), decoder(protocol)
        self._write(protocol)
        self.answer(self.call("register", storage, False))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._socket.close()

    def call(self, name, *args):
        """Returns the number of the answer to come."""
        self._number += 1
        self._write(self._encode(self._number, False, name, args))
        return self._number

    def async_(self, name, *args):
        self._write(self._encode(0, True, name, args))

    def answer(self, number):
        """Take what comes before this answer, and return it."""
        return self._take(number)[1]

    def blob(self, number):
        """Take what comes before this answer; return the bytes of a blob in it."""
        return self._take(number)[0]

    def blobs(self, numbers):
        """Take what comes before these answers, in whatever order; return the blobs in it by oid."""
        chunks, missing = {}, set(numbers)
        while missing:
            received, is_error, name, content = self._message()
            if name == ".reply":
                assert not is_error, content
                missing.discard(received)
            elif name == "receiveBlobChunk":
                chunks.setdefault(content[0], []).append(content[2])
        return {oid: b"".join(data) for oid, data in chunks.items()}

    def _take(self, number):
        chunks = []
        while True:
            received, is_error, name, content = self._message()
            if name == ".reply" and received == number:
                assert not is_error, content
                return b"".join(chunks), content
            if name == "receiveBlobChunk":
                chunks.append(content[2])

    def _message(self):
        message = self._decode(self._frame())
        if message[2].startswith("receiveBlob"):
            self.received.append(message[2])
        return message

    def begin_to_read(self, large):
        """Ask for the blob, and take no more than the beginning. Returns the number of the answer to come."""
        number = self.call("sendBlob", *large[1])
        assert self._message()[2] == "receiveBlobStart"
        return number

    def rest(self):
        """Take everything there is until the server closes; return the blob in it, and the answers by number."""
        chunks, answers = [], {}
        while frame := self._frame():
            number, _, name, content = self._decode(frame)
            if name.startswith("receiveBlob"):
                self.received.append(name)
            if name == "receiveBlobChunk":
                chunks.append(content[2])
            elif name == ".reply":
                answers[number] = content
        return b"".join(chunks), answers

    def _write(self, message):
        self._socket.sendall(len(message).to_bytes(4, "big") + message)

    def _frame(self):
        size = self._bytes(4)
        return self._bytes(int.from_bytes(size, "big")) if size else b""

    def _bytes(self, count):
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                assert not data, "the connection ended in the middle of a message"
                return b""
            data += more
        return data
