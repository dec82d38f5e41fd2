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

#: Loads from the base between two pauses, in which other threads get the interpreter.
_PAUSE_EVERY = 100

#: The most processor seconds that other threads of a quiet server use between two pauses. A request takes more.
_QUIET = 0.0001

#: How long, in seconds, a server counts as busy after a request: the client's next request may follow soon.
_BUSY_FOR = 0.25

#: How long, in seconds, this thread may keep others waiting for the interpreter; a request waits several times.
_SWITCH_INTERVAL = 0.00001


class Pace:
    """A limit of one thread's share of the processor, for the sake of the threads that serve clients.

    For each second of processor time the thread rests ``quiet`` seconds; ``busy`` seconds while other threads use the
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
        """Sleep off the processor time used since the last call, less the time waited for S3.

        Call this often, in one thread only.
        """
        now, others = time.monotonic(), self._used_by_others()
        if others - self._others > _QUIET:  # since the last pause began: others mostly run while this thread sleeps
            self._busy_until = now + _BUSY_FOR
        self._others = others
        used = time.thread_time() - self._used
        waited = now - self._began - used
        rest = self._busy if now < self._busy_until else self._quiet
        time.sleep(max(0, used * rest - waited))
        self._begin()


def throttled(items: Iterable[T], pace: Pace) -> Iterator[T]:
    """Yield ``items`` with pauses in between; the caller loads each from the base."""
    for number, item in enumerate(items, 1):
        if number % _PAUSE_EVERY == 0:
            pace.pause()
        yield item


_lock = threading.Lock()
_users = 0
_usual_switch_interval = 0.0


@contextmanager
def low_interpreter_priority() -> Iterator[None]:
    """Shorten the time for which the body, which computes much, keeps other threads waiting for the interpreter.

    A waiting thread gets the interpreter after the switch interval, 5 ms by default, and one request waits several
    times. Python's own garbage collector stops all threads while it examines every object; so the objects that exist
    now are exempted during the body. Any number of threads may enter at once.
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
