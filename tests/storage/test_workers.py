"""The pool of daemon threads, whose owners take turns, and waiting for futures until a deadline."""

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, wait
from types import SimpleNamespace

import pytest

from tests.support.waiting import wait_for
from zodb_s3blobs.workers import Completion, DaemonPool, Deadline

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
    wait_for(lambda: kept() is None)


def test_an_idle_worker_does_not_keep_the_result_of_its_last_task(pool):
    class Data:
        pass

    kept = weakref.ref(pool.submit(Data).result(TIMEOUT))
    wait_for(lambda: kept() is None)


def test_when_no_thread_can_be_started_the_task_is_refused_and_the_next_one_runs(pool, no_threads):
    ran = []
    with no_threads(), pytest.raises(RuntimeError, match="can't start"):
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
    wait_for(lambda: "threads that end" not in {thread.name for thread in threading.enumerate()})


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


# Turns


def tasks(order, owner, count):
    return [lambda number=number: order.append((owner, number)) for number in range(count)]


def test_owners_take_turns_and_the_tasks_of_one_start_in_order(pool, hanging):
    order = []
    futures = [future for owner in "abc" for future in pool.submit_all(owner, tasks(order, owner, 3))]
    hanging.set()
    assert not wait(futures, TIMEOUT).not_done
    assert order == [(owner, number) for number in range(3) for owner in "abc"]


def test_what_an_owner_adds_comes_after_what_it_has(pool, hanging):
    order = []
    first = pool.submit_all("a", tasks(order, "first", 2))
    other = pool.submit_all("b", tasks(order, "other", 3))
    second = pool.submit_all("a", tasks(order, "second", 1))
    hanging.set()
    wait([*first, *other, *second], TIMEOUT)
    assert order == [("first", 0), ("other", 0), ("first", 1), ("other", 1), ("second", 0), ("other", 2)]


@pytest.mark.parametrize("idle", [False, True], ids=["new threads", "idle threads"])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_owner_of_many_tasks_delays_anothers_by_no_more_than_those_under_way(threads, idle):
    started, go_on = threading.Semaphore(0), threading.Semaphore(0)
    pool = DaemonPool(threads)
    if idle:
        together = threading.Barrier(threads)
        wait(pool.submit_all("before", [together.wait] * threads), TIMEOUT)

    def task():
        started.release()
        assert go_on.acquire(timeout=TIMEOUT)

    many = pool.submit_all("import", [task] * 1000)
    for _ in range(threads):
        assert started.acquire(timeout=TIMEOUT)
    (single,) = pool.submit_all("other", [lambda: sum(future.done() for future in many)])
    go_on.release(threads)
    assert single.result(TIMEOUT) <= threads
    go_on.release(1000)
    assert not wait(many, TIMEOUT).not_done
    pool.shutdown()


def test_an_owner_with_many_tasks_has_its_turn_though_others_come_all_the_time(pool, hanging):
    order = []
    done = threading.Event()

    def come(number):
        order.append("new")
        if number < 20:
            pool.submit_all(object(), [lambda: come(number + 1)])
        else:
            done.set()

    many = pool.submit_all("import", [lambda: order.append("import")] * 10)
    pool.submit_all("first", [lambda: come(0)])
    hanging.set()
    assert done.wait(TIMEOUT)
    wait(many, TIMEOUT)
    assert order[:20] == ["import", "new"] * 10


def test_tasks_without_an_owner_share_with_those_that_have_one(pool, hanging):
    order = []
    futures = [pool.submit(order.append, number) for number in range(3)]
    futures += pool.submit_all("a", [lambda: order.append("a")])
    hanging.set()
    wait(futures, TIMEOUT)
    assert order == [0, "a", 1, 2]


def test_no_thread_starts_on_many_tasks_before_all_are_queued():
    pool = DaemonPool(4)
    ran = []

    def calls():
        for number in range(100):
            yield lambda number=number: ran.append(number)
            assert not ran

    futures = pool.submit_all("a", calls())
    assert len(futures) == 100
    assert not wait(futures, TIMEOUT).not_done
    assert sorted(ran) == list(range(100))
    pool.shutdown()


def test_many_tasks_use_all_threads():
    together = threading.Barrier(3)
    pool = DaemonPool(3)
    for _ in range(2):  # with threads that are started, and with idle ones
        for future in pool.submit_all("a", [lambda: together.wait(TIMEOUT)] * 3):
            future.result(TIMEOUT)
    pool.shutdown()


def test_of_many_tasks_none_is_taken_when_no_thread_can_be_started(pool, no_threads):
    ran = []
    with no_threads(), pytest.raises(RuntimeError, match="can't start"):
        pool.submit_all("a", [lambda: ran.append(1)] * 2)
    assert pool.submit(int, "5").result(TIMEOUT) == 5
    assert ran == []


def test_when_no_further_thread_can_be_started_those_that_are_there_do_the_tasks(no_threads):
    pool, end = DaemonPool(3), threading.Event()
    started = pool.submit(end.wait, TIMEOUT)
    with no_threads():
        futures = pool.submit_all("a", [lambda: 5] * 3)
    end.set()
    assert not wait([started, *futures], TIMEOUT).not_done
    pool.shutdown()


def test_no_tasks_start_no_thread():
    pool = DaemonPool(1, "never started")
    assert pool.submit_all("a", []) == []
    assert "never started" not in {thread.name for thread in threading.enumerate()}


def test_cancelled_tasks_take_no_turn(pool, hanging):
    order = []
    cancelled = pool.submit_all("a", tasks(order, "a", 100))
    futures = pool.submit_all("b", tasks(order, "b", 2))
    futures += pool.submit_all("c", tasks(order, "c", 2))
    assert all(future.cancel() for future in cancelled[:-1])
    hanging.set()
    assert not wait([*cancelled, *futures], TIMEOUT).not_done
    assert order == [("a", 99), ("b", 0), ("c", 0), ("b", 1), ("c", 1)]


def test_the_tasks_of_an_owner_may_all_be_cancelled(pool, hanging):
    cancelled = pool.submit_all("a", [int] * 3)
    assert all(future.cancel() for future in cancelled)
    future = pool.submit(int, "5")
    hanging.set()
    assert future.result(TIMEOUT) == 5
    assert not wait(cancelled, TIMEOUT).not_done


def test_shutdown_runs_or_cancels_the_tasks_of_all_owners(pool, hanging):
    futures = [future for owner in "ab" for future in pool.submit_all(owner, [int] * 3)]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="test pool threads have been shut down"):
        pool.submit_all("a", [int])
    assert not any(future.done() for future in futures)
    pool.shutdown(wait=False, cancel_futures=True)
    assert not wait(futures, TIMEOUT).not_done
    assert all(future.cancelled() for future in futures)


def test_what_is_called_when_shutdown_cancels_a_task_may_use_another_thread_and_the_pool(pool, hanging):
    refused = []

    def ask_elsewhere(future):
        asking = threading.Thread(target=lambda: refused.append(pool.has_free_thread))
        asking.start()
        asking.join(TIMEOUT)

    pool.submit(int).add_done_callback(ask_elsewhere)
    pool.shutdown(wait=False, cancel_futures=True)
    assert refused == [False]


# Deadlines


@pytest.fixture
def clock(monkeypatch):
    """The time by `time.monotonic`, which the test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("zodb_s3blobs.workers.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_deadline_counts_from_its_start(clock):
    deadline = Deadline(10)
    clock.now += 5
    assert deadline.seconds_left == 10
    deadline.start()
    clock.now += 4
    assert deadline.seconds_left == 6 and not deadline.is_over
    clock.now += 6
    assert deadline.seconds_left == 0 and deadline.is_over
    clock.now += 1
    assert deadline.seconds_left == 0 and deadline.is_over


def test_only_the_first_start_of_a_deadline_counts(clock):
    deadline = Deadline(10)
    deadline.start()
    clock.now += 4
    deadline.start()
    assert deadline.seconds_left == 6


def test_a_deadline_that_is_not_started_ends_after_twice_its_time(clock):
    deadline = Deadline(10)
    clock.now += 10
    assert deadline.seconds_left == 10
    clock.now += 7
    assert deadline.seconds_left == 3 and not deadline.is_over
    clock.now += 3
    assert deadline.seconds_left == 0 and deadline.is_over


def test_a_deadline_that_starts_late_has_its_whole_time(clock):
    deadline = Deadline(10)
    clock.now += 19
    deadline.start()
    assert deadline.seconds_left == 10


def test_a_deadline_that_is_over_does_not_start_again(clock):
    deadline = Deadline(10)
    clock.now += 20
    deadline.start()
    assert deadline.is_over


# Completions


def waiting(futures, seconds=TIMEOUT):
    deadline = Deadline(seconds)
    deadline.start()
    return Completion(futures, deadline, TimeoutError("too late"))


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
    waiting([], seconds=0).wait()


def test_waiting_for_what_is_done_already_is_done_even_after_the_deadline():
    future = Future()
    future.set_result("any")
    waiting([future], seconds=0).wait()


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
    assert waiting([Future()], seconds=0).seconds_left == 0


def test_waiting_counts_from_when_the_first_task_starts_and_not_while_it_queues(pool, hanging, clock):
    deadline = Deadline(10)
    end = Completion(pool.submit_all("me", [deadline.start, int]), deadline, TimeoutError("too late"))
    clock.now += 15
    assert not end.is_over and end.seconds_left == 5
    hanging.set()
    end.wait()
    assert end.seconds_left == 10 and end.is_over


def test_waiting_for_what_never_starts_ends_after_twice_the_time(pool, hanging):
    begin = time.monotonic()
    end = Completion(pool.submit_all("me", [int]), Deadline(0.1), TimeoutError("too late"))
    with pytest.raises(TimeoutError, match="too late"):
        end.wait()
    assert end.is_over
    assert 0.19 < time.monotonic() - begin < TIMEOUT


def test_waiting_ends_in_the_thread_that_waits_when_another_one_is_done(pool, hanging):
    end = waiting([pool.submit(int), pool.submit(int)])
    threading.Timer(0.1, hanging.set).start()
    end.wait()
    assert hanging.is_set()
    assert end.seconds_left > 0
