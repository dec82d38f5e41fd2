"""A collection has a thread of its own, which its caller leaves alone when the storage is closed."""

import threading

import pytest

from zodb_s3blobs.garbage.apart import Apart, CallLeft

TIMEOUT = 30


def test_a_call_apart_returns_the_result_and_raises_the_errors_of_its_work():
    apart = Apart("apart")
    assert apart.call(lambda: threading.current_thread().name) == "apart"
    with pytest.raises(ZeroDivisionError):
        apart.call(lambda: 1 / 0)


def test_at_the_end_the_caller_is_let_go_and_its_work_goes_on():
    apart, end, ended = Apart("apart"), threading.Event(), threading.Event()
    threading.Timer(0.1, apart.close).start()
    with pytest.raises(CallLeft):
        apart.call(lambda: end.wait(TIMEOUT) and ended.set())
    end.set()
    assert ended.wait(TIMEOUT)
    apart.close()
