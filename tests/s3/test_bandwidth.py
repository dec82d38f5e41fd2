"""The limit of bytes a second: by a clock of the test, and by what a bucket counts on it."""

import os
import threading

import pytest

from tests.support.download_target import Target
from zodb_s3blobs.s3.bandwidth import Bandwidth
from zodb_s3blobs.s3.download import PART

OID, TID, OTHER_TID = b"\0" * 7 + b"\1", b"\0" * 7 + b"\2", b"\0" * 7 + b"\3"


class Clock:
    """A time that passes only while a thread sleeps; sleeps of several threads overlap."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_bytes_take_as_long_as_the_limit_says():
    clock = Clock()
    pace = Bandwidth(1000, clock, clock.sleep)
    for size in 500, 0, 1500, 1, 999:
        pace(size)
    assert clock.now - 100 == pytest.approx(3)


def test_time_without_transfers_is_not_made_up_for():
    clock = Clock()
    pace = Bandwidth(1000, clock, clock.sleep)
    pace(1000)
    clock.now += 3600
    pace(5000)
    assert clock.now - 100 == pytest.approx(3606)


def test_all_threads_share_one_limit():
    """Whatever their number: the longest sleep is that of all bytes."""
    slept = []
    pace = Bandwidth(1000, lambda: 100.0, slept.append)
    threads = [threading.Thread(target=pace, args=(1000,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8])


@pytest.fixture
def counted(open_bucket, metrics):
    """A bucket, and the sizes that it counts on its limit."""
    sizes = []
    return open_bucket(pace=sizes.append), sizes


def moved(metrics):
    """The bytes that metrics count, sent and received."""
    return [
        int(sample.value)
        for counter in (metrics.s3_sent_bytes, metrics.s3_received_bytes)
        for sample in next(iter(counter.collect())).samples
        if sample.name.endswith("_total")
    ]


@pytest.mark.parametrize("size", [5, PART + 5])
def test_uploads_count_before_they_are_sent_and_downloads_when_they_have_arrived(
    s3, counted, metrics, new_file, tmp_path, size
):
    bucket, sizes = counted
    data = os.urandom(size)
    bucket.put(OID, TID, new_file(data))
    sent, _ = moved(metrics)
    assert size <= sum(sizes) < size + 2000 and sent >= size
    sizes.clear()
    target = Target(tmp_path / "target")
    bucket.get(OID, TID, target)
    assert sum(sizes) == size
    sizes.clear()
    bucket.verify(OID, TID)
    assert sum(sizes) == size
    sizes.clear()
    bucket.copy(OID, TID, OTHER_TID)
    assert sum(sizes) < 1000  # the service has the bytes


def test_what_is_sent_again_counts_again(s3, counted, new_file, no_pauses):
    bucket, sizes = counted
    s3.misbehave(operation="PutObject", times=2, status=500, code="InternalError")
    bucket.put(OID, TID, new_file(b"x" * 5000))
    assert sizes.count(5000) == 3


def test_nothing_is_sent_before_its_time(s3, open_bucket, new_file):
    asked, go = threading.Event(), threading.Event()

    def pace(size):
        if size >= 5000:
            asked.set()
            assert go.wait(30)

    bucket = open_bucket(pace=pace)
    thread = threading.Thread(target=bucket.put, args=(OID, TID, new_file(b"x" * 5000)))
    thread.start()
    assert asked.wait(30)
    assert s3.requests("PutObject") == []
    go.set()
    thread.join()
    assert len(s3.requests("PutObject")) == 1
