"""A blob that is still arriving from a client: its growing temporary file, for `Uploads.put_staged_stream` to read."""

import contextlib
import errno
import os
import threading

from .s3.errors import TransferCancelled


class Arriving:
    """The temporary file ``path`` that grows until `complete`. The constructor does not open the file.

    The thread that writes the file, such as the event loop, calls `grew_to`, `complete` and `cancel`, which do not
    wait. One worker at a time calls `wait` and `read`. The file is read by a descriptor of its own, so that it may be
    renamed or removed meanwhile; the descriptor is closed at the end of the file or by `cancel`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._size = 0
        self._wanted = 0
        self._complete = False
        self._cancelled = False
        self._position = 0
        self._descriptor: int | None = None
        self._reading = False

    def grew_to(self, size: int) -> None:
        """Take note that the first ``size`` bytes are in the file; nothing may be left in a buffer."""
        with self._changed:
            self._size = size
            if size >= self._wanted:
                self._changed.notify_all()

    def complete(self) -> None:
        """Take note that the last byte has arrived."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Give the blob up, and close the file. Does nothing when all has been read, or for a second time."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
            if not self._reading:
                self._close()

    def wait(self, size: int) -> None:
        """Wait until the next ``size`` bytes have arrived, or the last one. Raises TransferCancelled after `cancel`."""
        with self._changed:
            self._wait(size)

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, after the same wait; fewer only at the end of the blob, none after it.

        Raises TransferCancelled after `cancel`, and the OSError of the file.
        """
        with self._changed:
            self._wait(size)
            size = min(size, self._size - self._position)
            if not size:
                return b""
            self._reading = True  # nobody else closes the descriptor now, or its number could become another file's
        try:
            data = self._read(size)
        finally:
            with self._changed:
                self._reading = False
                if self._cancelled:
                    self._close()
        with self._changed:
            self._position += size
            if self._complete and self._position == self._size:
                self._close()
        return data

    def _wait(self, size: int) -> None:
        self._wanted = self._position + size
        while not (self._cancelled or self._complete or self._size >= self._wanted):
            self._changed.wait()
        if self._cancelled:
            raise TransferCancelled(f"{self._path} is not wanted any more")

    def _read(self, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._descriptor, size, self._position)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), self._position + len(data))
            if not more:
                raise OSError(errno.EIO, "The file is shorter than what has arrived", self._path)
            data += more
        return data

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # only read from
                os.close(self._descriptor)
            self._descriptor = None
