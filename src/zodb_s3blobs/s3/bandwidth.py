"""A limit of the bytes a second of all transfers together."""

import threading
import time
from collections.abc import Callable


class Bandwidth:
    """A limit of ``rate`` bytes a second, for uploads and downloads together. Any thread may call.

    ``clock`` and ``sleep``: those of `time`, in seconds.
    """

    def __init__(
        self, rate: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def __call__(self, size: int) -> None:
        """Wait until ``size`` bytes more keep the limit: before they are sent, or after they have arrived."""
        with self._lock:
            self._free_at = max(self._free_at, self._clock()) + size / self._rate
            pause = self._free_at - self._clock()
        if pause > 0:
            self._sleep(pause)
