"""Time, threads and an event loop that a test drives step by step, so that a history of a server is the same each time.

`Clock` moves when the test says so. `Workers` knows when every thread of the package waits for something. `Loop` runs
what is ready, and waits for nothing.
"""

import asyncio
import threading
import time
from collections import Counter

#: The beginning of the names of the package's threads.
OURS = "s3blobs"

#: How long, in real seconds, the threads may work before the test fails.
_LONGEST = 60


class Clock:
    """The clocks of the process. ``wall`` is what `time.time` is ahead of the monotonic one, by which timers go."""

    def __init__(self, monkeypatch):
        self.wall = time.time() // 1 - 1000
        self._now = 1000.0
        monkeypatch.setattr(time, "monotonic", self.monotonic)
        monkeypatch.setattr(time, "time", lambda: self.wall + self._now)

    def monotonic(self):
        return self._now

    def advance(self, seconds):
        self._now += seconds


class Workers:
    """The threads of the package."""

    def __init__(self, monkeypatch):
        self._others = set(threading.enumerate())  # of earlier tests, whose servers have ended
        self._waiting = {}  # thread -> the condition that it waits for
        self._wakings = 0
        wait = threading.Condition.wait

        def noted_wait(condition, timeout=None):
            thread = threading.current_thread()
            self._waiting[thread] = condition
            try:
                return wait(condition, timeout)
            finally:
                self._wakings += 1
                del self._waiting[thread]

        monkeypatch.setattr(threading.Condition, "wait", noted_wait)

    def are_at_rest(self):
        """Return whether every thread waits, and none has been woken."""
        wakings, waiting = self._wakings, self._waiting.copy()
        alive = [thread for thread in set(threading.enumerate()) - self._others if thread.name.startswith(OURS)]
        return (
            all(thread in waiting for thread in alive)
            and all(len(condition._waiters) == count for condition, count in Counter(waiting.values()).items())
            and wakings == self._wakings
        )


class Loop(asyncio.SelectorEventLoop):
    """An event loop by the time of ``clock``, beside ``workers``."""

    def __init__(self, clock, workers):
        super().__init__()
        self.time = clock.monotonic
        self._clock = clock
        self._workers = workers

    def settle(self):
        """Run what is ready, until there is nothing more to do before time goes on."""
        deadline = time.perf_counter() + _LONGEST
        while True:
            while self._has_work():
                self.call_soon(self.stop)
                self.run_forever()
            if self._workers.are_at_rest() and not self._has_work():
                return
            assert time.perf_counter() < deadline, "the threads do not come to rest"
            time.sleep(0.00005)

    def _has_work(self):
        return bool(self._ready) or any(
            timer._when <= self._clock.monotonic() for timer in self._scheduled if not timer._cancelled
        )

    def advance(self, seconds):
        """Let time go on."""
        self._clock.advance(seconds)
        self.settle()

    def give_up(self):
        """Cancel all tasks, and close."""
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.settle()
        self.close()
