"""The errors of too many open files, for connections and cache files alike, and the advice for the operator."""

import errno
import logging
import math
import time

logger = logging.getLogger(__name__)

#: The errors for the limit of the process and for that of the whole system.
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

RAISE_THEIR_NUMBER = (
    "this process has too many open files: raise its limit (LimitNOFILE of a systemd unit, ulimit -n), or lower "
    "s3-concurrency"
)

#: Seconds between two lines of the log that say the same.
_PAUSE = 60.0


class Listener:
    """A socket that accepts connections, ``name`` in the log. Belongs to the thread that accepts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = -math.inf

    def explains(self, error: BaseException | None) -> bool:
        """Return whether a connection waits because of too many open files; log that, at most once in `_PAUSE`."""
        if not isinstance(error, OSError) or error.errno not in TOO_MANY_FILES:
            return False
        if time.monotonic() > self._told + _PAUSE:
            self._told = time.monotonic()
            logger.error("%s cannot accept a connection, which waits: %s", self._name, RAISE_THEIR_NUMBER)
        return True
