"""Pools of daemon threads, and groups of their futures.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, so that one request to a
black-holed bucket keeps a server from stopping. These threads are daemons: they do not delay the end of the process.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, as_completed, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class DaemonPool(Executor):
    """A pool of at most ``max_workers`` daemon threads, started when needed, which run tasks in order.

    Any thread may call. The pool is an `Executor`, so that s3transfer and `concurrent.futures.wait` can use it.
    """

    def __init__(self, max_workers: int, name: str = "s3blobs") -> None:
        self._max_workers = max_workers
        self._name = name
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run ``fn(*args, **kwargs)`` in a worker; return its future. Raises RuntimeError after `shutdown`."""
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the {self._name} threads have been shut down")
            if self._idle <= len(self._tasks) and self._threads < self._max_workers:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._threads += 1
            self._tasks.append((future, lambda: fn(*args, **kwargs)))
            self._changed.notify()
        return future

    @property
    def has_free_thread(self) -> bool:
        """True if a task submitted now would start at once."""
        with self._changed:
            return self._idle > len(self._tasks) or self._threads < self._max_workers

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._tasks and not self._closed:
                    self._changed.wait()
                self._idle -= 1
                if not self._tasks:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                future, call = self._tasks.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # raised by the future, in the thread that waits for its result
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # A worker that waits for its next task must not keep the last one's data alive.
            del future, call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Refuse new tasks; if ``wait``, wait for the present ones, at most ``timeout`` seconds (None: no limit)."""
        with self._changed:
            self._closed = True
            if cancel_futures:
                for future, _ in self._tasks:
                    future.cancel()
                    future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` never returns
                self._tasks.clear()
            self._changed.notify_all()
            if wait:
                self._changed.wait_for(lambda: not self._threads, timeout)


def in_parallel(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Yield the result of ``work`` for each of ``items``, as soon as it is there; take only a few items ahead.

    The first error ends the iteration, after the tasks under way. A KeyboardInterrupt does not wait for them, because
    a silent service could delay their end for long.
    """
    pool = DaemonPool(threads)
    running: set[Future] = set()
    patient = True
    try:
        for item in items:
            running.add(pool.submit(work, item))
            if len(running) >= 2 * threads:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done]
        for future in as_completed(running):
            yield future.result()
    except KeyboardInterrupt:
        patient = False
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)


class Completion:
    """A group of ``futures`` with a common ``deadline``, a time by `time.monotonic`. Any thread may call.

    ``done`` completes when all ``futures`` have succeeded, or the first of them has failed; ``timeout_error`` is raised
    after the deadline.
    """

    def __init__(self, futures: list[Future], deadline: float, timeout_error: Exception) -> None:
        self.done: Future[None] = Future()
        self._deadline = deadline
        self._timeout_error = timeout_error
        self._left = len(futures)
        self._lock = threading.Lock()
        if not futures:
            self.done.set_result(None)
        for future in futures:
            future.add_done_callback(self._one_done)

    def _one_done(self, future: Future) -> None:
        error = CancelledError() if future.cancelled() else future.exception()
        with self._lock:
            self._left -= 1
            if self.done.done():
                return
            if error is not None:
                self.done.set_exception(error)
            elif not self._left:
                self.done.set_result(None)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; never negative."""
        return max(0.0, self._deadline - time.monotonic())

    def succeeded(self) -> bool:
        """Return whether all futures have succeeded."""
        return self.done.done() and self.done.exception() is None

    def check(self) -> None:
        """Raise the first failure, or ``timeout_error`` if futures are still running. Does not wait."""
        if not self.done.done():
            raise self._timeout_error
        self.done.result()

    def wait(self) -> None:
        """Wait for ``done`` until the deadline, then `check`."""
        wait([self.done], self.seconds_left)
        self.check()
