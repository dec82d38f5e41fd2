"""Cold reads: one download however many ask, verified, into the cache."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.utils import p64

from tests.support.counts import value
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.digest import digest_of
from zodb_s3blobs.fallbacks import FallbackBucket, Fallbacks
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


def test_when_no_thread_can_be_started_large_blobs_are_read_all_the_same(fetcher, bucket, blob, new_file, no_threads):
    fetcher.fetch(OID, TID).release()
    data = os.urandom(2 << 20)
    bucket.put(OID, p64(3), new_file(data))
    with no_threads():
        assert read(fetcher.request(OID, p64(3)).result(30)) == data


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


def flip(path):
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.write(bytes([DATA[0] ^ 1]))


DAMAGE = {
    "cut short": lambda path: os.truncate(path, 999),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, 1001),
    "a flipped bit": flip,
    "a directory": lambda path: (os.unlink(path), os.mkdir(path)),
    "deleted": os.unlink,
}


@pytest.fixture
def reopen(tmp_path, metrics):
    """Opens the cache of the same directory again, as after a restart."""
    opened = []

    def reopen():
        if opened:
            opened[-1].close()
        opened.append(Cache(tmp_path / "cache", 100 << 20, metrics))
        return opened[-1]

    yield reopen
    opened[-1].close()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("when", ["while it is served", "while the server is down"])
def test_a_damaged_file_is_fetched_again(s3, open_fetcher, reopen, blob, metrics, damage, when):
    cache = reopen()
    open_fetcher(cache).fetch(OID, TID).release()
    damage(cache.path(OID, TID))
    fetcher = open_fetcher(reopen() if when == "while the server is down" else cache)
    for _ in range(2):
        assert read(fetcher.request(OID, TID).result(10)) == DATA
    assert len(s3.requests("GetObject")) == 2
    assert value(metrics, "s3blobs_cache_damaged_total") == (0 if damage is os.unlink else 1)


@pytest.mark.parametrize("data", [DATA, os.urandom(2 << 20)], ids=["small", "large"])
def test_what_an_earlier_process_left_is_a_hit_after_a_worker_has_read_it(
    s3, open_bucket, reopen, bucket, new_file, metrics, data
):
    bucket.put(OID, TID, new_file(data))
    for _ in range(2):
        fetcher = Fetcher(open_bucket(), reopen(), metrics)
        requested = [fetcher.request(OID, TID) for _ in range(5)]
        assert [read(future.result(10)) for future in requested] == [data] * 5
        fetcher.close()
    assert value(metrics, "s3blobs_cache_hits_total") == 5
    assert value(metrics, "s3blobs_cache_hit_bytes_total") == 5 * len(data)
    assert sum(len(s3.requests(operation)) for operation in ("GetObject", "HeadObject")) == 1


def test_whoever_asks_does_not_read_the_file(open_fetcher, reopen, blob, monkeypatch):
    open_fetcher(reopen()).fetch(OID, TID).release()
    cache = reopen()
    assert cache.wait_until_read(10)
    go_on, readers = threading.Event(), []

    def slowly(*arguments):
        readers.append(threading.current_thread().name)
        assert go_on.wait(30)
        return digest_of(*arguments)

    monkeypatch.setattr("zodb_s3blobs.cache.store.digest_of", slowly)
    fetcher = open_fetcher(cache)
    requested = [fetcher.request(OID, TID) for _ in range(2)]
    assert not any(future.done() for future in requested)
    go_on.set()
    assert [read(future.result(10)) for future in requested] == [DATA] * 2
    assert readers == ["s3blobs download"]
    assert fetcher.request(OID, TID).done()


def test_an_object_without_sha256_is_compared_after_a_restart_as_well(
    s3, open_fetcher, reopen, metrics, bucket_name, bucket
):
    s3.client.put_object(Bucket=bucket_name, Key=bucket.keys.key(OID, TID), Body=DATA)
    s3.forget()
    cache = reopen()
    assert read(open_fetcher(cache).fetch(OID, TID)) == DATA
    cache = reopen()
    assert read(open_fetcher(cache).fetch(OID, TID)) == DATA
    assert len(s3.requests("GetObject")) == 1
    os.chmod(cache.path(OID, TID), 0o600)
    cache.close()
    flip(cache.path(OID, TID))
    assert read(open_fetcher(reopen()).fetch(OID, TID)) == DATA
    assert value(metrics, "s3blobs_cache_damaged_total") == 1


def test_a_fetched_file_is_read_only(fetcher, blob):
    with fetcher.fetch(OID, TID) as path:
        assert os.stat(path).st_mode & 0o222 == 0


# Fallbacks; test_fallback.py and test_fallback_bucket.py have them in a real server


@pytest.fixture
def beside(open_bucket, cache, metrics):
    """Makes a `Fetcher` with another prefix as its fallback; returns it and the bucket of that prefix."""
    fetchers = []

    def make(**keywords):
        other = open_bucket(s3_prefix="other")
        fallbacks = Fallbacks([FallbackBucket(other, metrics)])
        fetchers.append(Fetcher(open_bucket(), cache, metrics, fallbacks=fallbacks, **keywords))
        return fetchers[-1], other

    yield make
    for fetcher in fetchers:
        fetcher.close()


def test_whether_the_bucket_lacks_a_blob_is_asked_only_where_a_fallback_may_have_it(
    s3, fetcher, beside, bucket, new_file
):
    other_fetcher, other = beside()
    bucket.put(OID, TID, new_file(DATA))
    other.put(OID, p64(3), new_file(DATA))
    s3.forget()
    assert not fetcher.may_lack(OID, TID)
    assert s3.requests() == []
    assert not other_fetcher.may_lack(OID, TID)
    assert other_fetcher.may_lack(OID, p64(3))
    assert [request.operation for request in s3.requests()] == ["HeadObject"] * 2
    s3.misbehave(operation="HeadObject", status=403)
    assert other_fetcher.may_lack(OID, TID)


def test_large_blobs_of_a_fallback_wait_for_each_other_and_delay_no_small_one(s3, beside, new_file, metrics):
    fetcher, other = beside(concurrency=1)
    large = [p64(number) for number in range(10, 13)]
    for oid in large:
        other.put(oid, TID, new_file(os.urandom(PART + 1)))
    other.put(OID, TID, new_file(DATA))
    s3.forget()
    # Of the bucket, which has none, and of the fallback: the second part of the first large one does not arrive.
    s3.misbehave(operation="GetObject", times=2)
    s3.misbehave(operation="GetObject", times=1, stall=True)
    first = fetcher.request(large[0], TID)
    s3.wait_for("GetObject", 3)
    waiting = [fetcher.request(oid, TID) for oid in large[1:]]
    assert read(fetcher.fetch(OID, TID)) == DATA
    assert not any(future.done() for future in (first, *waiting))
    s3.behave()
    assert [len(read(future.result(30))) for future in (first, *waiting)] == [PART + 1] * 3
    assert value(metrics, "s3blobs_fallback_reads_total") == 4
