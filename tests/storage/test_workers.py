"""The pool of daemon threads, and waiting for futures until a deadline."""

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, wait

import pytest

from zodb_s3blobs.workers import Completion, DaemonPool

TIMEOUT = 30


@pytest.fixture
def pool():
    pool = DaemonPool(1, "test pool")
    yield pool
    pool.shutdown(timeout=TIMEOUT)


@pytest.fixture
def hanging(pool):
    """What ends the task that keeps the pool's only thread."""
    started, end = threading.Event(), threading.Event()
    pool.submit(lambda: (started.set(), end.wait(TIMEOUT)))
    assert started.wait(TIMEOUT)
    yield end
    end.set()


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_task_gets_its_arguments_and_the_future_its_result(pool):
    future = pool.submit(lambda *args, **kwargs: (args, kwargs), 1, 2, fn=3)
    assert future.result(TIMEOUT) == ((1, 2), {"fn": 3})


def test_tasks_start_in_the_order_in_which_they_were_submitted(pool, hanging):
    order = []
    futures = [pool.submit(order.append, number) for number in range(50)]
    hanging.set()
    wait(futures, TIMEOUT)
    assert order == list(range(50))


def test_as_many_tasks_run_at_once_as_there_are_workers_and_no_more():
    together = threading.Barrier(3)  # is passed only if three run at once
    lock = threading.Lock()
    running = []
    most = 0

    def task(number):
        nonlocal most
        with lock:
            running.append(number)
            most = max(most, len(running))
        together.wait(TIMEOUT)
        with lock:
            running.remove(number)

    with DaemonPool(3) as pool:
        for future in [pool.submit(task, number) for number in range(30)]:
            future.result(TIMEOUT)
    assert most == 3


def test_a_task_that_hangs_does_not_hold_up_those_for_whom_there_is_a_worker():
    end = threading.Event()
    with DaemonPool(2) as pool:
        pool.submit(end.wait, TIMEOUT)
        try:
            assert [pool.submit(int, "5").result(TIMEOUT) for _ in range(5)] == [5] * 5
        finally:
            end.set()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_exception_reaches_the_future_and_the_worker_goes_on(pool, kind):
    def fail():
        raise kind("as told")

    error = pool.submit(fail).exception(TIMEOUT)
    assert type(error) is kind and str(error) == "as told"
    assert pool.submit(int, "5").result(TIMEOUT) == 5


def test_a_cancelled_task_is_not_run(pool, hanging):
    ran = []
    futures = [pool.submit(ran.append, number) for number in range(3)]
    assert futures[1].cancel()
    hanging.set()
    done, pending = wait(futures, TIMEOUT)
    assert done == set(futures) and not pending
    assert ran == [0, 2]
    with pytest.raises(CancelledError):
        futures[1].result(TIMEOUT)


def test_a_task_that_runs_cannot_be_cancelled(pool):
    started, end = threading.Event(), threading.Event()
    future = pool.submit(lambda: (started.set(), end.wait(TIMEOUT))[1])
    assert started.wait(TIMEOUT)
    assert not future.cancel()
    end.set()
    assert future.result(TIMEOUT) is True


def test_an_idle_worker_does_not_keep_the_arguments_of_its_last_task(pool):
    class Data:
        pass

    data = Data()
    kept = weakref.ref(data)
    pool.submit(id, data).result(TIMEOUT)
    del data
    until(lambda: kept() is None)


def test_an_idle_worker_does_not_keep_the_result_of_its_last_task(pool):
    class Data:
        pass

    kept = weakref.ref(pool.submit(Data).result(TIMEOUT))
    until(lambda: kept() is None)


def test_when_no_thread_can_be_started_the_task_is_refused_and_the_next_one_runs(pool, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    ran = []
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(ran.append, 1)
    assert pool.submit(int, "5").result(TIMEOUT) == 5
    assert ran == []


def test_shutdown_waits_for_what_was_submitted(pool, hanging):
    futures = [pool.submit(int, "5") for _ in range(3)]
    threading.Timer(0.1, hanging.set).start()
    pool.shutdown()
    assert [future.done() for future in futures] == [True] * 3


def test_shutdown_without_waiting_runs_what_was_submitted_all_the_same(pool, hanging):
    future = pool.submit(int, "5")
    pool.shutdown(wait=False)
    assert not future.done()
    hanging.set()
    assert future.result(TIMEOUT) == 5


def test_shutdown_may_cancel_what_is_queued(pool, hanging):
    ran = []
    futures = [pool.submit(ran.append, number) for number in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    assert wait(futures, TIMEOUT).done == set(futures)
    hanging.set()
    pool.shutdown()
    assert ran == []


@pytest.mark.timeout(TIMEOUT)
def test_shutdown_waits_no_longer_than_told_for_a_task_that_hangs(pool, hanging):
    queued = pool.submit(int, "5")
    pool.shutdown(timeout=0.1)
    assert not hanging.is_set() and not queued.done()


def test_shutdown_of_an_unused_or_idle_pool_ends_at_once(pool):
    DaemonPool(1).shutdown()
    pool.submit(int).result(TIMEOUT)
    pool.shutdown()
    pool.shutdown()


def test_after_shutdown_its_threads_are_gone():
    pool = DaemonPool(3, "threads that end")
    for future in [pool.submit(int) for _ in range(10)]:
        future.result(TIMEOUT)
    pool.shutdown()
    until(lambda: "threads that end" not in {thread.name for thread in threading.enumerate()})


def test_submit_after_shutdown_says_so(pool):
    pool.shutdown()
    with pytest.raises(RuntimeError, match="test pool threads have been shut down"):
        pool.submit(int)


def test_a_task_that_hangs_does_not_keep_the_process_from_ending():
    script = """
import threading
from zodb_s3blobs.workers import DaemonPool

started = threading.Event()
pool = DaemonPool(1)
pool.submit(lambda: (started.set(), threading.Event().wait()))
assert started.wait(30)
pool.submit(int)
print("the end")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


# Completions


def waiting(futures, seconds=TIMEOUT):
    return Completion(futures, time.monotonic() + seconds, TimeoutError("too late"))


def test_waiting_is_done_when_all_futures_are():
    futures = [Future(), Future()]
    end = waiting(futures)
    futures[1].set_result("any")
    assert not end.done.done()
    futures[0].set_result("other")
    assert end.done.done()
    end.check()
    end.wait()


def test_waiting_for_nothing_is_done():
    waiting([]).check()
    waiting([], seconds=-1).wait()


def test_waiting_for_what_is_done_already_is_done_even_after_the_deadline():
    future = Future()
    future.set_result("any")
    waiting([future], seconds=-1).wait()


def test_waiting_ends_with_the_first_failure_whatever_becomes_of_the_others():
    futures = [Future(), Future(), Future()]
    end = waiting(futures)
    futures[1].set_exception(ZeroDivisionError("first"))
    assert end.done.done()
    futures[0].set_exception(KeyError("second"))
    futures[2].set_result("any")
    for look in (end.check, end.wait):
        with pytest.raises(ZeroDivisionError, match="first"):
            look()


def test_waiting_ends_when_a_future_is_cancelled():
    futures = [Future(), Future()]
    end = waiting(futures)
    futures[0].cancel()
    with pytest.raises(CancelledError):
        end.check()


def test_a_check_before_the_end_is_the_error_for_being_too_late_and_does_not_wait():
    end = waiting([Future()])
    with pytest.raises(TimeoutError, match="too late"):
        end.check()
    assert end.seconds_left > 0


def test_waiting_is_over_at_the_deadline():
    begin = time.monotonic()
    end = waiting([Future()], seconds=0.1)
    with pytest.raises(TimeoutError, match="too late"):
        end.wait()
    assert 0.09 < time.monotonic() - begin < TIMEOUT


def test_after_the_deadline_no_seconds_are_left():
    assert waiting([Future()], seconds=-1).seconds_left == 0


def test_waiting_ends_in_the_thread_that_waits_when_another_one_is_done(pool, hanging):
    end = waiting([pool.submit(int), pool.submit(int)])
    threading.Timer(0.1, hanging.set).start()
    end.wait()
    assert hanging.is_set()
    assert end.seconds_left > 0
