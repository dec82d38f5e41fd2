"""The pace of garbage collection in a process whose other threads serve clients."""

import gc
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

#: After how many loads from the base to pause: others may want the interpreter.
_PAUSE_EVERY = 100

#: Up to how many seconds of processor other threads use between two pauses of a quiet server. A request takes more.
_QUIET = 0.0001

#: For how long, in seconds, a server counts as busy after a request: the next one of that client may come soon.
_BUSY_FOR = 0.25

#: For how long, in seconds, this thread may keep others waiting for the interpreter: several times for each request.
_SWITCH_INTERVAL = 0.00001


class Pace:
    """The pace of a thread that computes much in a process whose other threads serve clients.

    The thread rests ``quiet`` times as long as it uses the processor; ``busy`` times while other threads use the
    processor, and for `_BUSY_FOR` seconds after.
    """

    def __init__(self, quiet: float = 0, busy: float = 0) -> None:
        self._quiet = quiet
        self._busy = busy
        self._busy_until = -math.inf
        self._others = self._used_by_others()
        self._begin()

    def _begin(self) -> None:
        self._used, self._began = time.thread_time(), time.monotonic()

    def _used_by_others(self) -> float:
        return time.process_time() - time.thread_time()

    def pause(self) -> None:
        """Sleep as long as is due: what the thread has waited for S3 counts. Call it often, in one thread only."""
        now, others = time.monotonic(), self._used_by_others()
        if others - self._others > _QUIET:  # since the last pause began: they mostly run while this thread sleeps
            self._busy_until = now + _BUSY_FOR
        self._others = others
        used = time.thread_time() - self._used
        waited = now - self._began - used
        rest = self._busy if now < self._busy_until else self._quiet
        time.sleep(max(0, used * rest - waited))
        self._begin()


def throttled(items: Iterable[T], pace: Pace) -> Iterator[T]:
    """Yield ``items``, with pauses in between: each is to be asked of the base."""
    for number, item in enumerate(items, 1):
        if number % _PAUSE_EVERY == 0:
            pace.pause()
        yield item


_lock = threading.Lock()
_users = 0
_usual_switch_interval = 0.0


@contextmanager
def low_interpreter_priority() -> Iterator[None]:
    """Let other threads, the event loop above all, have their turn soon while the body does much in Python.

    A thread that waits gets the interpreter after the switch interval, 5 ms if nothing else is said, and a request
    waits for it several times. Python's own garbage collector stops all threads while it looks at every object there
    is: those there are by now, it need not look at meanwhile.
    """
    global _users, _usual_switch_interval
    with _lock:  # several storages may collect at once
        if not _users:
            _usual_switch_interval = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual_switch_interval, _SWITCH_INTERVAL))
            gc.freeze()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                gc.unfreeze()
                sys.setswitchinterval(_usual_switch_interval)
