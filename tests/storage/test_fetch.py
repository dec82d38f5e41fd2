"""Cold reads: one download however many ask, verified, into the cache."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.utils import p64

from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BlobNotFound, BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, TID = p64(1), p64(2)
DATA = os.urandom(1000)


@pytest.fixture
def blob(bucket, new_file, s3):
    """The blob (OID, TID) with DATA, in the bucket."""
    bucket.put(OID, TID, new_file(DATA))
    s3.forget()


@pytest.fixture
def open_fetcher(open_bucket):
    """Makes a `Fetcher` for a cache; keywords replace single settings of the bucket."""
    fetchers = []

    def make(cache, **changes):
        fetchers.append(Fetcher(open_bucket(**changes), cache, Metrics()))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()


@pytest.fixture
def fetcher(open_fetcher, cache):
    return open_fetcher(cache)


def read(pin):
    with pin as path, open(path, "rb") as file:
        return file.read()


def ask_at_once(fetcher, s3, count):
    """Ask for the blob in ``count`` threads, and let S3 answer when all have asked; returns the futures."""
    s3.misbehave(operation="GetObject", hang=True)
    everybody = threading.Barrier(count)

    def ask():
        everybody.wait()
        return fetcher.request(OID, TID)

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask) for _ in range(count)]
        requested = [future.result() for future in asked]
    s3.wait_for("GetObject")
    s3.behave()
    return requested


def files_in(directory):
    return [name for _, _, names in os.walk(directory) for name in names]


def test_a_cold_blob_is_read_from_the_bucket(s3, fetcher, blob):
    assert read(fetcher.fetch(OID, TID)) == DATA
    assert [request.operation for request in s3.requests()] == ["GetObject"]


def test_a_warm_blob_is_no_request(s3, fetcher, blob):
    fetcher.fetch(OID, TID).release()
    s3.forget()
    requested = fetcher.request(OID, TID)
    assert requested.done()
    assert read(requested.result()) == DATA
    assert s3.requests() == []


def test_many_who_ask_at_once_share_one_download(s3, fetcher, blob):
    requested = ask_at_once(fetcher, s3, 20)
    assert [read(future.result(10)) for future in requested] == [DATA] * 20
    assert len(s3.requests("GetObject")) == 1


def test_each_of_many_can_open_a_blob_that_is_larger_than_the_whole_cache(s3, open_fetcher, open_cache, blob):
    cache = open_cache(limit=len(DATA) - 1)
    requested = ask_at_once(open_fetcher(cache), s3, 20)
    assert [read(future.result(10)) for future in requested] == [DATA] * 20  # one after the other
    assert len(s3.requests("GetObject")) == 1
    assert cache.get(OID, TID) is None


def test_different_blobs_are_downloaded_in_parallel(s3, fetcher, bucket, new_file):
    for number in range(8):
        bucket.put(p64(number), TID, new_file(b"%d" % number))
    s3.misbehave(operation="GetObject", hang=True)
    requested = [fetcher.request(p64(number), TID) for number in range(8)]
    s3.wait_for("GetObject", 8)
    s3.behave()
    assert [read(future.result(10)) for future in requested] == [b"%d" % number for number in range(8)]


def test_a_small_blob_does_not_wait_for_large_ones(s3, open_bucket, cache, bucket, new_file, metrics):
    large = [p64(number) for number in range(10, 16)]
    for oid in large:
        bucket.put(oid, TID, new_file(os.urandom(PART + 1)))
    bucket.put(OID, TID, new_file(DATA))
    fetcher = Fetcher(open_bucket(), cache, metrics, concurrency=2)
    s3.forget()
    s3.misbehave(operation="GetObject", stall=True, times=len(large))
    waiting = [fetcher.request(oid, TID) for oid in large]
    s3.wait_for("GetObject", len(large))
    assert read(fetcher.fetch(OID, TID)) == DATA
    assert not any(request.done() for request in waiting)
    s3.behave()
    assert [len(read(request.result(30))) for request in waiting] == [PART + 1] * len(large)
    fetcher.close()


def test_asking_does_not_wait_for_s3(s3, fetcher, blob):
    s3.misbehave(operation="GetObject", hang=True)
    requested = fetcher.request(OID, TID)
    s3.wait_for("GetObject")
    assert not requested.done()
    s3.behave()
    assert read(requested.result(10)) == DATA


def test_a_failure_reaches_all_who_ask_and_the_next_one_tries_again(s3, open_fetcher, cache, blob):
    fetcher = open_fetcher(cache, s3_max_attempts=1)
    s3.misbehave(operation="GetObject", hang=True, status=500, code="InternalError", times=1)
    for future in ask_at_once(fetcher, s3, 20):
        with pytest.raises(BucketError, match="InternalError"):
            future.result(10)
    assert len(s3.requests("GetObject")) == 1
    assert read(fetcher.fetch(OID, TID)) == DATA


def test_an_absent_blob_is_not_found_until_it_is_there(fetcher, bucket, new_file):
    with pytest.raises(BlobNotFound):
        fetcher.fetch(OID, TID)
    bucket.put(OID, TID, new_file(DATA))
    assert read(fetcher.fetch(OID, TID)) == DATA


@pytest.mark.parametrize(
    "fault", [{"status": 503, "code": "SlowDown"}, {"truncate": 10}, {"flip": True}, {"lose": True}]
)
def test_a_download_that_fails_leaves_no_file(s3, open_fetcher, cache, blob, fault):
    s3.misbehave(operation="GetObject", **fault)
    before = files_in(cache.directory)
    with pytest.raises(BucketError):
        open_fetcher(cache, s3_max_attempts=2).fetch(OID, TID)
    assert len(s3.requests("GetObject")) == 2
    assert files_in(cache.directory) == before
    assert cache.get(OID, TID) is None


def test_a_large_download_whose_last_part_fails_leaves_no_file(s3, open_fetcher, cache, bucket, new_file):
    bucket.put(OID, TID, new_file(os.urandom(PART + 1)))
    s3.misbehave(operation="GetObject", times=1)
    s3.misbehave(operation="GetObject", status=500, code="InternalError")
    before = files_in(cache.directory)
    with pytest.raises(BucketError):
        open_fetcher(cache, s3_max_attempts=1).fetch(OID, TID)
    assert files_in(cache.directory) == before
    assert cache.get(OID, TID) is None


def test_nobody_sees_a_file_before_it_is_complete_and_verified(s3, open_fetcher, cache, blob):
    s3.misbehave(operation="GetObject", flip=True, times=1)
    s3.misbehave(operation="GetObject", hang=True)
    requested = open_fetcher(cache, s3_max_attempts=2).request(OID, TID)
    s3.wait_for("GetObject", 2)  # the damaged bytes have arrived, and been asked for again
    assert cache.get(OID, TID) is None
    s3.behave()
    assert read(requested.result(10)) == DATA


def test_a_fetched_file_is_read_only(fetcher, blob):
    with fetcher.fetch(OID, TID) as path:
        assert os.stat(path).st_mode & 0o222 == 0
