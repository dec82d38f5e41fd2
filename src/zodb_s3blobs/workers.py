"""Pools of daemon threads, and waiting for them.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, so that one request to a
black-holed bucket keeps a server from stopping. These threads are daemons: the process ends when it is told to.
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
    """At most ``max_workers`` daemon threads, started when needed, that run what is submitted in order.

    Any thread may call. An `Executor`, so that s3transfer and `concurrent.futures.wait` can use it.
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
        """Run ``fn(*args, **kwargs)`` in a worker; RuntimeError after `shutdown`."""
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
        """Whether what is submitted now would be begun at once."""
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
                except BaseException as error:  # whoever waits for the future is told, not this thread
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # A worker that waits for its next task must not keep the last one's data alive.
            del future, call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Take no more tasks, and wait for those there are: at most ``timeout`` seconds, None for ever."""
        with self._changed:
            self._closed = True
            if cancel_futures:
                for future, _ in self._tasks:
                    future.cancel()
                    future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` waits for it for ever
                self._tasks.clear()
            self._changed.notify_all()
            if wait:
                self._changed.wait_for(lambda: not self._threads, timeout)


def in_parallel(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """What ``work`` returns for each of the ``items``, as soon as it does; only a few of them are taken ahead.

    The first error ends it: what has begun is waited for, but not after a KeyboardInterrupt: a silent service
    can make that a long time.
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
    """For futures, until a deadline.

    ``done`` is done when all ``futures`` are, or the first of them has failed; ``deadline`` is a reading of
    `time.monotonic`, after which the error is ``timeout_error``. Any thread may call.
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
        """Until the deadline; never negative."""
        return max(0.0, self._deadline - time.monotonic())

    def succeeded(self) -> bool:
        """Whether the end has come, and is a good one."""
        return self.done.done() and self.done.exception() is None

    def check(self) -> None:
        """Without waiting: raise what failed, or ``timeout_error`` if the end has not come yet."""
        if not self.done.done():
            raise self._timeout_error
        self.done.result()

    def wait(self) -> None:
        """Wait for the end, then `check`."""
        wait([self.done], self.seconds_left)
        self.check()
