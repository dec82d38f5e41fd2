"""Uploads that a conflict has made useless, kept for the retry.

When a transaction fails with a conflict, its client runs it again, mostly with the same blobs. So large uploads stay in
the bucket for a minute, and the retry copies those whose bytes it finds here, in place of sending the bytes again.
"""

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ..cache.files import Incoming
from ..digest import SHA256, digest_of
from ..s3.download import PART

#: The least bytes of a blob that is kept; to send a smaller one takes hardly longer than to copy it.
WORTH_KEEPING = 1 << 20

#: How long, in seconds, an upload is kept.
KEPT_FOR = 60.0


class WholeUpload(Protocol):
    """An upload that is in the bucket."""

    file: Incoming
    #: The SHA-256 in hex.
    digest: str

    @property
    def key(self) -> str:
        """The key of the object."""


class Kept:
    """The kept uploads of one server. Any thread may call; a worker where files are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}  # digest -> key
        self._beginnings: dict[str, str] = {}  # digest of the first part -> digest
        self._due: deque[tuple[float, set[str], Callable[[], None]]] = deque()  # keys
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def keep(self, uploads: Sequence[WholeUpload], clean_up: Callable[[], None]) -> None:
        """Keep ``uploads``, and call ``clean_up``, which deletes them, when time is up. Reads their files.

        After `close` it is called at once.
        """
        beginnings = {_beginning(upload.file.path): upload.digest for upload in uploads}
        with self._lock:
            if not self._is_closed:
                self._beginnings |= beginnings
                self._keys |= {upload.digest: upload.key for upload in uploads}
                self._due.append((time.monotonic() + KEPT_FOR, {upload.key for upload in uploads}, clean_up))
                if self._timer is None:
                    self._start_timer()
                return
        clean_up()

    def has_beginning(self, filename: str) -> bool:
        """Return whether a kept upload has the same first 8 MiB. Reads the file."""
        return bool(self._beginnings) and _beginning(filename) in self._beginnings

    def find(self, filename: str) -> tuple[str, str | None]:
        """Return the digest of the file and the key of its kept upload; "" and None if none is kept. Reads the file."""
        if not self._keys:
            return "", None
        digest = digest_of(SHA256, filename)
        return digest, self._keys.get(digest)

    def _start_timer(self) -> None:
        timer = threading.Timer(max(0.0, self._due[0][0] - time.monotonic()), self._expire)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread can be started: the next upload that is kept starts it
            timer.start()
            self._timer = timer

    def _expire(self) -> None:
        with self._lock:
            self._timer = None
            if not self._due:
                return
            # Also a key that a later transaction has kept as well, which found it here: its object goes now.
            _, deleted, clean_up = self._due.popleft()
            self._keys = {digest: key for digest, key in self._keys.items() if key not in deleted}
            self._beginnings = {start: digest for start, digest in self._beginnings.items() if digest in self._keys}
            if self._due:
                self._start_timer()
        clean_up()

    def close(self) -> None:
        """Give all of them up."""
        with self._lock:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
            due, self._due = self._due, deque()
            self._keys, self._beginnings = {}, {}
        for _, _, clean_up in due:
            clean_up()


def _beginning(filename: str) -> str:
    with open(filename, "rb") as file:
        return hashlib.sha256(file.read(PART)).hexdigest()
