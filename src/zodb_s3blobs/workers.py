"""Pools of daemon threads, and groups of their futures.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, so that one request to a
black-holed bucket keeps a server from stopping. These threads are daemons: they do not delay the end of the process.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, as_completed, wait
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_Task: TypeAlias = tuple[Future, Callable[[], Any]]


class DaemonPool(Executor):
    """A pool of at most ``max_workers`` daemon threads, started when needed, which owners of tasks share in turns.

    The tasks of one owner start in order. An owner that comes anew has its turn before the one that had the last turn,
    so that it waits for no more than the tasks under way, however many another one has queued.

    Any thread may call. The pool is an `Executor`, so that s3transfer and `concurrent.futures.wait` can use it.
    """

    def __init__(self, max_workers: int, name: str = "s3blobs") -> None:
        self._max_workers = max_workers
        self._name = name
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # notified when a thread has ended
        self._queues: OrderedDict[object, deque[_Task]] = OrderedDict()  # by owner, the next one to have its turn first
        self._latest: object = None  # the owner that had the last turn, if it has more tasks: the last of the queues
        self._idle: list[_IdleWorker] = []  # not empty only while nothing is queued
        self._threads = 0
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run ``fn(*args, **kwargs)`` in a worker; return its future. Raises RuntimeError after `shutdown`.

        All such tasks have one owner, the pool itself.
        """
        return self.submit_all(self, [lambda: fn(*args, **kwargs)])[0]

    def submit_all(self, owner: object, calls: Iterable[Callable[[], Any]]) -> list[Future]:
        """Run each of ``calls`` in a worker, for the hashable ``owner``; return their futures. All or none is taken.

        No thread wakes up before all are queued: many threads that start one by one would keep the interpreter from
        the thread that calls. Raises RuntimeError after `shutdown`, and if not even one thread can be started.
        """
        tasks: deque[_Task] = deque((Future(), call) for call in calls)
        futures = [future for future, _ in tasks]
        if not tasks:
            return []
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the {self._name} threads have been shut down")
            for _ in range(min(len(tasks) - len(self._idle), self._max_workers - self._threads)):
                try:
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                except RuntimeError:  # no more can be had
                    if not self._threads:
                        raise
                    break
                self._threads += 1
            # A worker that waits gets its task in its hand: one that woke up to look for it would wait for this lock.
            woken = [self._idle.pop() for _ in range(min(len(tasks), len(self._idle)))]
            for worker in woken:
                worker.task = tasks.popleft()
                worker.task[0].set_running_or_notify_cancel()
            if tasks:
                self._queue(owner, tasks)
                if woken:
                    self._latest = owner
        for worker in woken:
            worker.awake.set()
        return futures

    @property
    def has_free_thread(self) -> bool:
        """True if a task submitted now would start at once."""
        with self._lock:
            return bool(self._idle) or self._threads < self._max_workers

    def _queue(self, owner: object, tasks: deque[_Task]) -> None:
        if owner not in self._queues:
            self._queues[owner] = deque()
            if self._latest in self._queues:
                self._queues.move_to_end(self._latest)
        self._queues[owner].extend(tasks)

    def _take(self) -> "_Task | None":
        """Return the task whose turn it is, now running; None if there is none. The caller holds the lock."""
        while self._queues:
            owner, queue = next(iter(self._queues.items()))
            task = None
            while queue and task is None:
                future, call = queue.popleft()
                if future.set_running_or_notify_cancel():
                    task = future, call
            if queue:
                self._queues.move_to_end(owner)
                self._latest = owner
            else:
                del self._queues[owner]
                self._latest = None
            if task is not None:
                return task
        return None

    def _work(self) -> None:
        while (task := self._next()) is not None:
            future, call = task
            try:
                result = call()
            except BaseException as error:  # raised by the future, in the thread that waits for its result
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            # A worker that waits for its next task must not keep the last one's data alive.
            del task, future, call
        with self._ended:
            self._threads -= 1
            self._ended.notify_all()

    def _next(self) -> "_Task | None":
        """Return the next task, or None after `shutdown`; wait for it."""
        with self._lock:
            task = self._take()
            if task is not None or self._closed:
                return task
            worker = _IdleWorker()
            self._idle.append(worker)
        worker.awake.wait()
        return worker.task

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Refuse new tasks; if ``wait``, wait for the present ones, at most ``timeout`` seconds (None: no limit)."""
        cancelled: list[_Task] = []
        with self._lock:
            self._closed = True
            if cancel_futures:
                cancelled = [task for queue in self._queues.values() for task in queue]
                self._queues.clear()
            for worker in self._idle:
                worker.awake.set()
            self._idle.clear()
        for future, _ in cancelled:  # without the lock, since it calls back
            future.cancel()
            future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` never returns
        if wait:
            with self._ended:
                self._ended.wait_for(lambda: not self._threads, timeout)


class _IdleWorker:
    """A thread of a pool that waits for ``task``, which is there when ``awake`` is set; None after `shutdown`."""

    def __init__(self) -> None:
        self.task: _Task | None = None
        self.awake = threading.Event()


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


class Deadline:
    """The end of ``timeout`` seconds of work, which count from its start and not while it queues. Any thread may call.

    Work that does not start is over after twice the timeout, so that every wait ends. What is over stays so.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._latest_start = time.monotonic() + timeout
        self._started: float | None = None

    def start(self) -> None:
        """Start to count, in the first task when it begins; only the first call counts."""
        with self._lock:
            if self._started is None and not self.is_over:
                self._started = time.monotonic()

    @property
    def seconds_left(self) -> float:
        """Seconds until the end, at most; never negative. Before the start, look again when they are over."""
        now = time.monotonic()
        if self._started is not None:
            return max(0.0, self._started + self.timeout - now)
        return max(0.0, min(self.timeout, self._latest_start + self.timeout - now))

    @property
    def is_over(self) -> bool:
        """True after the end."""
        return not self.seconds_left


class Completion:
    """A group of ``futures`` with a common ``deadline``. Any thread may call.

    ``done`` completes when all ``futures`` have succeeded, or the first of them has failed; ``timeout_error`` is raised
    after the deadline. The deadline is started by the tasks.
    """

    def __init__(self, futures: list[Future], deadline: Deadline, timeout_error: Exception) -> None:
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
        """The `Deadline.seconds_left`."""
        return self._deadline.seconds_left

    @property
    def is_over(self) -> bool:
        """True if there is nothing more to wait for: ``done`` is complete, or the deadline is over."""
        return self.done.done() or self._deadline.is_over

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
        while not self.is_over:  # the deadline may have started meanwhile
            wait([self.done], self.seconds_left)
        self.check()
