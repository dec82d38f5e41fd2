"""The temporary file of a blob that is still arriving: who waits for what, and when the file is closed."""

import os
import threading

import pytest

from zodb_s3blobs.arriving import Arriving
from zodb_s3blobs.s3.errors import TransferCancelled

TIMEOUT = 30


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "arriving"
    path.touch()
    return path


@pytest.fixture
def arriving(path, background):
    # After `background`, or its threads would wait for the file for ever.
    arriving = Arriving(str(path))
    yield arriving
    arriving.cancel()


@pytest.fixture
def send(path, arriving):
    def send(data):
        with open(path, "ab") as file:
            file.write(data)
        arriving.grew_to(path.stat().st_size)

    return send


def is_open(path):
    return any(os.path.realpath(f"/proc/self/fd/{number}") == str(path) for number in os.listdir("/proc/self/fd"))


def test_what_has_arrived_is_read_in_order(arriving, send):
    send(b"abcde")
    assert arriving.read(2) == b"ab"
    assert arriving.read(3) == b"cde"


def test_the_end_gives_what_is_left_and_then_nothing(arriving, send):
    send(b"abcde")
    arriving.complete()
    assert arriving.read(3) == b"abc"
    assert arriving.read(3) == b"de"
    assert arriving.read(3) == b""
    arriving.wait(3)


def test_an_empty_blob_is_nothing(arriving):
    arriving.complete()
    assert arriving.read(3) == b""


def test_a_read_waits_until_as_many_bytes_have_arrived(arriving, send, background):
    read = background(arriving.read, 5)
    for byte in (b"a", b"b", b"c", b"d"):
        send(byte)
        assert not read.done()
    send(b"ef")
    assert read.result(TIMEOUT) == b"abcde"
    arriving.complete()
    assert arriving.read(5) == b"f"


def test_a_read_that_waits_gets_what_is_there_at_the_end(arriving, send, background):
    read = background(arriving.read, 5)
    send(b"ab")
    arriving.complete()
    assert read.result(TIMEOUT) == b"ab"


def test_a_wait_takes_nothing(arriving, send, background):
    waiting = background(arriving.wait, 2)
    send(b"ab")
    waiting.result(TIMEOUT)
    assert arriving.read(2) == b"ab"


@pytest.mark.parametrize("name", ["read", "wait"])
def test_a_blob_that_is_given_up_ends_the_waiting_now_and_later(arriving, send, background, name):
    waiting = background(getattr(arriving, name), 5)
    send(b"ab")
    arriving.cancel()
    with pytest.raises(TransferCancelled):
        waiting.result(TIMEOUT)
    with pytest.raises(TransferCancelled):
        getattr(arriving, name)(1)


def test_a_file_that_is_renamed_or_removed_is_read_to_its_end(arriving, send, path):
    send(b"abcde")
    assert arriving.read(2) == b"ab"
    path.rename(path.with_name("other"))
    path.with_name("other").unlink()
    arriving.complete()
    assert arriving.read(5) == b"cde"


def test_a_file_that_is_shorter_than_what_arrived_is_an_error(arriving):
    arriving.grew_to(3)
    with pytest.raises(OSError, match="shorter"):
        arriving.read(3)


def test_the_file_is_open_from_the_first_read_to_the_end(arriving, send, path):
    send(b"abc")
    assert not is_open(path)
    arriving.read(2)
    assert is_open(path)
    arriving.complete()
    arriving.read(2)
    assert not is_open(path)


def test_the_file_is_closed_when_the_blob_is_given_up(arriving, send, path):
    send(b"abc")
    arriving.read(2)
    arriving.cancel()
    arriving.cancel()
    assert not is_open(path)


def test_a_read_under_way_when_the_blob_is_given_up_closes_the_file_itself(
    arriving, send, path, background, monkeypatch
):
    reading, cancelled, pread = threading.Event(), threading.Event(), os.pread

    def slow_pread(*args):
        reading.set()
        assert cancelled.wait(TIMEOUT)
        return pread(*args)

    monkeypatch.setattr(os, "pread", slow_pread)
    send(b"abc")
    read = background(arriving.read, 3)
    assert reading.wait(TIMEOUT)
    arriving.cancel()
    assert is_open(path)
    cancelled.set()
    assert read.result(TIMEOUT) == b"abc"
    assert not is_open(path)


def test_a_blob_that_arrives_in_small_steps_is_read_whole(arriving, send, background):
    data = os.urandom(20_000)

    def read_all():
        return b"".join(iter(lambda: arriving.read(777), b""))

    everything = background(read_all)
    for start in range(0, len(data), 100):
        send(data[start : start + 100])
    arriving.complete()
    assert everything.result(TIMEOUT) == data
