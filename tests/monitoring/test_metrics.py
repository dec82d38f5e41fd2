"""What the cache, the fetcher, the commits and the garbage collection count, and what a whole server does."""

import errno
import functools
import os
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import transaction
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, StorageError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import p64

from tests.support.commits import Sending, begin, cleaned_up, commit_reserved, overtake, reserve
from tests.support.counts import figures, nonzero, value
from tests.support.fake_base import Base
from tests.support.speed import slow_after
from tests.support.zeo_clients import uncache, wait_for
from zodb_s3blobs.cache import files as cache_module
from zodb_s3blobs.cache import store as store_module
from zodb_s3blobs.cache.directory import CacheError
from zodb_s3blobs.commit.pending import Pending
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.s3.errors import BlobNotFound, BucketError
from zodb_s3blobs.s3.keys import Keys

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, OLD_TID, TID = p64(1), p64(2), p64(3)
RECORD = zodb_pickle(Blob())
MB = 1 << 20

#: The gauges of what is under way: 0 as soon as nothing is.
UNDER_WAY = ("s3blobs_staged_blobs", "s3blobs_staged_bytes", "s3blobs_gc_running", "s3blobs_s3_inflight_operations")


def nothing_under_way(source):
    return not any(nonzero(source, name) for name in UNDER_WAY)


def about_now(timestamp):
    return time.time() - 60 < timestamp < time.time() + 1


# Cache


@pytest.fixture
def blob_in(new_file, one_byte_blocks):
    """Puts ``data`` into a cache as the blob (oid, TID); it is not pinned."""

    def blob_in(cache, oid, data):
        file = cache.adopt(new_file(data))
        file.publish(oid, TID).release()

    return blob_in


def cache_figures(metrics):
    names = ("size_bytes", "files", "pinned_bytes", "evictions_total", "evicted_bytes_total")
    return tuple(value(metrics, f"s3blobs_cache_{name}") for name in names)


def test_an_empty_cache_counts_nothing(open_cache, metrics):
    open_cache(limit=1000)
    assert cache_figures(metrics) == (0, 0, 0, 0, 0)
    assert value(metrics, "s3blobs_cache_limit_bytes") == 1000
    assert value(metrics, "s3blobs_cache_oldest_access_timestamp_seconds") == 0
    assert value(metrics, "s3blobs_cache_filesystem_free_bytes") > 0
    for operation in "read", "write", "delete":
        assert value(metrics, "s3blobs_cache_errors_total", operation=operation) == 0


def test_files_bytes_and_pins_follow_what_is_in_the_cache(open_cache, metrics, blob_in):
    cache = open_cache(limit=1000)
    blob_in(cache, OID, b"x" * 300)
    blob_in(cache, p64(2), b"x" * 200)
    assert cache_figures(metrics) == (500, 2, 0, 0, 0)
    pin = cache.get(OID, TID)
    again = pin.again()
    assert cache_figures(metrics) == (500, 2, 300, 0, 0)
    pin.release()
    assert cache_figures(metrics) == (500, 2, 300, 0, 0)
    again.release()
    assert cache_figures(metrics) == (500, 2, 0, 0, 0)
    cache.remove(OID, TID)  # dead, not evicted
    assert cache_figures(metrics) == (200, 1, 0, 0, 0)


def test_evictions_are_counted_with_their_bytes(open_cache, metrics, blob_in):
    cache = open_cache(limit=1000)
    assert cache.wait_until_read(30)  # nothing is evicted before
    for number in range(5):
        blob_in(cache, p64(number), b"x" * 400)
    assert cache_figures(metrics) == (800, 2, 0, 3, 1200)


def test_a_blob_that_is_larger_than_the_cache_is_evicted_once(open_cache, metrics, new_file, one_byte_blocks):
    cache = open_cache(limit=100)
    pin = cache.adopt(new_file(b"x" * 300)).publish(OID, TID)
    assert cache_figures(metrics) == (300, 1, 300, 0, 0)
    pin.release()
    assert cache_figures(metrics) == (0, 0, 0, 1, 300)


def test_the_same_blob_again_is_no_second_file(open_cache, metrics, blob_in):
    cache = open_cache(limit=1000)
    for _ in range(2):
        blob_in(cache, OID, b"x" * 300)
    assert cache_figures(metrics) == (300, 1, 0, 0, 0)


def test_the_oldest_access_is_that_of_the_blob_that_goes_next(open_cache, metrics, blob_in, monkeypatch):
    cache = open_cache()
    old, young = 1_000_000_500, 1_000_000_900
    now = [old]
    for module in cache_module, store_module:
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now[0], sleep=time.sleep))
    blob_in(cache, OID, b"old")
    now[0] = young
    blob_in(cache, p64(2), b"young")
    name = "s3blobs_cache_oldest_access_timestamp_seconds"
    assert value(metrics, name) == old
    now[0] += 100
    cache.get(OID, TID).release()
    assert value(metrics, name) == young


def test_a_file_that_cannot_be_written_is_an_error_once(cache, metrics, new_file, monkeypatch):
    file = cache.new_file()
    os.unlink(file.path)
    for call in "pwrite", "ftruncate":
        monkeypatch.setattr(os, call, Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    for write in lambda: file.write_at(b"data", 0), file.clear, lambda: file.publish(OID, TID):
        before = value(metrics, "s3blobs_cache_errors_total", operation="write")
        with pytest.raises(CacheError):
            write()
        assert value(metrics, "s3blobs_cache_errors_total", operation="write") == before + 1
    shutil.rmtree(cache.directory / "incoming")
    before = value(metrics, "s3blobs_cache_errors_total", operation="write")
    with pytest.raises(CacheError):
        cache.adopt(new_file(b"data"))
    assert nonzero(metrics, "s3blobs_cache_errors_total") == {"write": before + 1}


def test_a_file_that_cannot_be_deleted_is_an_error(cache, metrics, blob_in):
    blob_in(cache, OID, b"data")
    os.unlink(cache.path(OID, TID))
    os.mkdir(cache.path(OID, TID))
    cache.remove(OID, TID)
    assert nonzero(metrics, "s3blobs_cache_errors_total") == {"delete": 1}


# Fetch


@pytest.fixture
def open_fetcher(open_bucket, metrics):
    """Makes a `Fetcher` for a cache; keywords replace single settings of the bucket."""
    fetchers = []

    def make(cache, **changes):
        fetchers.append(Fetcher(open_bucket(**changes), cache, metrics))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()


@pytest.fixture
def fetcher(open_fetcher, cache):
    return open_fetcher(cache)


@pytest.fixture
def store(s3, bucket_name):
    """Puts a blob into the bucket, unseen by the figures."""
    return lambda data, oid=OID: s3.client.put_object(
        Bucket=bucket_name, Key=f"blobs/{int.from_bytes(oid, 'big'):x}/3.blob", Body=data
    )


def loads(metrics):
    return nonzero(metrics, "s3blobs_load_duration_seconds_count")


def requests_and_hits(metrics):
    names = ("requests", "hits", "requested_bytes", "hit_bytes")
    return tuple(value(metrics, f"s3blobs_cache_{name}_total") for name in names)


def downloads(metrics):
    names = ("duration_seconds_count", "size_bytes_count", "size_bytes_sum")
    return tuple(value(metrics, f"s3blobs_download_{name}") for name in names)


def test_a_miss_and_then_hits(fetcher, metrics, store):
    store(b"x" * 1000)
    fetcher.fetch(OID, TID).release()
    assert requests_and_hits(metrics) == (1, 0, 1000, 0)
    for _ in range(3):
        fetcher.fetch(OID, TID).release()
    assert requests_and_hits(metrics) == (4, 3, 4000, 3000)
    assert downloads(metrics) == (1, 1, 1000)
    assert loads(metrics) == {"miss": 1, "hit": 3}
    assert value(metrics, "s3blobs_download_waits_total") == 0
    assert value(metrics, "s3blobs_cache_pinned_bytes") == 0


def test_those_who_join_a_download_wait(one_byte_blocks, s3, fetcher, metrics, store):
    store(b"x" * 1000)
    s3.misbehave(operation="GetObject", hang=True)
    requested = [fetcher.request(OID, TID) for _ in range(5)]
    s3.wait_for("GetObject")
    assert value(metrics, "s3blobs_download_waits_total") == 4
    assert loads(metrics) == {}
    s3.behave()
    pins = [future.result(30) for future in requested]
    assert value(metrics, "s3blobs_cache_pinned_bytes") == 1000  # of one file
    for pin in pins:
        pin.release()
    assert requests_and_hits(metrics) == (5, 0, 5000, 0)
    assert downloads(metrics) == (1, 1, 1000)
    assert loads(metrics) == {"miss": 5}
    assert value(metrics, "s3blobs_cache_pinned_bytes") == 0


def test_the_wait_of_a_reader_is_measured(s3, fetcher, metrics, store):
    store(b"data")
    s3.misbehave(operation="GetObject", latency=0.3)
    fetcher.fetch(OID, TID).release()
    fetcher.fetch(OID, TID).release()
    assert value(metrics, "s3blobs_load_duration_seconds_sum", result="miss") >= 0.3
    assert value(metrics, "s3blobs_load_duration_seconds_sum", result="hit") < 0.3
    assert value(metrics, "s3blobs_download_duration_seconds_sum") >= 0.3


def test_what_cannot_be_read_is_asked_for_and_not_served(s3, open_fetcher, cache, metrics):
    fetcher = open_fetcher(cache, s3_max_attempts=1)
    with pytest.raises(BlobNotFound):
        fetcher.fetch(OID, TID)
    s3.misbehave(status=500, code="InternalError")
    with pytest.raises(BucketError):
        fetcher.fetch(OID, TID)
    assert loads(metrics) == {"error": 2}
    assert requests_and_hits(metrics) == (2, 0, 0, 0)
    assert downloads(metrics) == (0, 0, 0)


def test_an_error_is_the_wait_of_everybody_who_joined(s3, open_fetcher, cache, metrics):
    s3.misbehave(operation="GetObject", hang=True, status=500, code="InternalError")
    fetcher = open_fetcher(cache, s3_max_attempts=1)
    requested = [fetcher.request(OID, TID) for _ in range(3)]
    s3.wait_for("GetObject")
    s3.behave()
    for future in requested:
        assert isinstance(future.exception(30), BucketError)
    assert loads(metrics) == {"error": 3}


def test_checksum_failures_are_counted(s3, open_bucket, open_fetcher, cache, metrics, new_file):
    open_bucket().put(OID, TID, new_file(b"data"))
    fetcher = open_fetcher(cache, s3_max_attempts=3)
    s3.misbehave(operation="GetObject", flip=True, times=2)
    fetcher.fetch(OID, TID).release()
    assert value(metrics, "s3blobs_download_checksum_failures_total") == 2
    assert downloads(metrics) == (1, 1, 4)
    assert loads(metrics) == {"miss": 1}


def test_a_broken_connection_is_no_checksum_failure(s3, open_fetcher, cache, metrics, store):
    store(b"data")
    s3.misbehave(operation="GetObject", truncate=1, times=1)
    open_fetcher(cache, s3_max_attempts=2).fetch(OID, TID).release()
    assert value(metrics, "s3blobs_download_checksum_failures_total") == 0


def test_a_download_that_cannot_be_written_is_an_error(fetcher, cache, metrics, store):
    store(b"data")
    shutil.rmtree(cache.directory / "incoming")
    with pytest.raises(CacheError):
        fetcher.fetch(OID, TID)
    assert loads(metrics) == {"error": 1}
    assert nonzero(metrics, "s3blobs_cache_errors_total") == {"write": 1}


# Commits


def staged(source):
    return value(source, "s3blobs_staged_blobs"), value(source, "s3blobs_staged_bytes")


def ended(source):
    return tuple(value(source, f"s3blobs_transactions_{how}_total") for how in ("finished", "aborted"))


def uploaded(metrics):
    names = ("duration_seconds_count", "size_bytes_count", "size_bytes_sum")
    return tuple(value(metrics, f"s3blobs_upload_{name}") for name in names)


def test_uploads_are_counted_when_they_succeed(s3, open_commits, metrics, new_file):
    commits = open_commits(s3_max_attempts=1)
    assert value(metrics, "s3blobs_upload_last_success_timestamp_seconds") == 0
    commit = begin(commits)
    commit.store(OID, new_file(b"x" * 1000))
    commit.store(p64(2), new_file(b"x" * 10))
    commit.vote(TID).wait()
    assert uploaded(metrics) == (2, 2, 1010)
    assert about_now(value(metrics, "s3blobs_upload_last_success_timestamp_seconds"))
    commit.finish()
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    with pytest.raises(BucketError):
        commit.vote(TID).wait()
    commit.abort()
    assert uploaded(metrics) == (2, 2, 1010)


def test_what_is_stored_is_staged_until_the_finish(s3, commits, metrics, new_file):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    commit.store(OID, new_file(b"x" * 1000))
    commit.store(p64(2), new_file(b"x" * 10))
    assert staged(metrics) == (2, 1010)
    s3.behave()
    commit.vote(TID).wait()
    assert staged(metrics) == (2, 1010)
    assert ended(metrics) == (0, 0)
    commit.finish()
    assert ended(metrics) == (1, 0)
    assert nothing_under_way(metrics)


@pytest.mark.parametrize("fault", [{}, {"hang": True}, {"status": 403, "code": "AccessDenied"}, {"lose": True}])
def test_nothing_stays_staged_after_an_abort(s3, open_commits, metrics, new_file, fault):
    commits = open_commits(s3_max_attempts=1)
    s3.misbehave(operation="PutObject", **fault)
    commit = begin(commits)
    for number in range(20):
        commit.store(p64(number), new_file(b"data"))
    commit.vote(TID)
    s3.wait_for("PutObject")
    commit.abort()
    assert staged(metrics) == (0, 0)
    assert ended(metrics) == (0, 1)
    s3.behave()
    cleaned_up(commits)
    assert nothing_under_way(metrics)
    assert value(metrics, "s3blobs_cleanup_failures_total") == 0


def test_what_is_left_as_it_is_has_been_aborted(commits, metrics, new_file):
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    commit.abandon()
    assert ended(metrics) == (0, 1)
    assert nothing_under_way(metrics)


def test_a_finish_that_cannot_publish_is_a_finish(commits, metrics, new_file, cache):
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    shutil.rmtree(cache.directory / "incoming")
    commit.finish()
    assert ended(metrics) == (1, 0)
    wait_for(lambda: nonzero(metrics, "s3blobs_cache_errors_total") == {"write": 1})
    assert nothing_under_way(metrics)


def test_a_blob_that_is_stored_twice_is_staged_twice_and_gone_at_once(commits, metrics, new_file):
    commit = begin(commits)
    for data in b"earlier", b"later":
        commit.store(OID, new_file(data))
    assert staged(metrics) == (2, len(b"earlierlater"))
    commit.vote(TID).wait()
    commit.finish()
    assert nothing_under_way(metrics)


@pytest.mark.parametrize("end", ["finish", "abort", "abandon"])
def test_transactions_without_blobs_are_not_counted(commits, metrics, end):
    before = figures(metrics)
    commit = begin(commits)
    assert commit.vote(TID) is None
    getattr(commit, end)()
    after = figures(metrics)
    changing = "s3blobs_cache_filesystem_free_bytes"
    assert {k: v for k, v in after.items() if k[0] != changing} == {k: v for k, v in before.items() if k[0] != changing}


def test_what_an_undo_goes_back_to_and_is_not_there_is_missing(commits, metrics):
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    with pytest.raises(BlobNotFound):
        commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert value(metrics, "s3blobs_missing_blobs_total") == 1
    assert ended(metrics) == (0, 1)
    assert nothing_under_way(metrics)


def test_what_is_missing_is_counted_once_where_copying_fails_too(s3, commits, metrics, bucket_name, new_file):
    commits.bucket.put(OID, OLD_TID, new_file(b"data"))
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    s3.misbehave(operation="GetObject", status=404, code="NoSuchKey")
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    with pytest.raises(BlobNotFound):
        commit.vote(TID).wait()
    commit.abort()
    assert value(metrics, "s3blobs_missing_blobs_total") == 1


def test_a_blob_that_a_restore_finds_in_the_bucket_is_neither_missing_nor_an_upload(commits, metrics, new_file):
    for turn in range(2):
        commit = begin(commits)
        commit.restore(OID, OLD_TID, new_file(b"data"))
        assert staged(metrics) == (1, 4)
        commit.vote(TID).wait()
        commit.finish()
        assert uploaded(metrics) == (1, 1, 4), turn
    assert value(metrics, "s3blobs_missing_blobs_total") == 0
    assert nothing_under_way(metrics)


@pytest.mark.parametrize("blobs", [1, 3])
def test_cleanup_failures_count_each_object(s3, open_commits, metrics, new_file, blobs):
    commits = open_commits(s3_max_attempts=1)
    commit = begin(commits)
    for number in range(blobs):
        commit.store(p64(number), new_file(b"data"))
    commit.vote(TID).wait()
    s3.misbehave(operation="DeleteObjects?", status=500, code="InternalError")
    commit.abort()
    cleaned_up(commits)
    assert value(metrics, "s3blobs_cleanup_failures_total") == blobs


def test_cleanup_failures_count_only_those_objects_that_are_left(s3, open_commits, metrics, new_file):
    commits = open_commits(s3_max_attempts=1)
    commit = begin(commits)
    for number in range(3):
        commit.store(p64(number), new_file(b"data"))
    commit.vote(TID).wait()
    s3.misbehave(operation="DeleteObjects", status=501, code="NotImplemented")
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied", times=2)
    commit.abort()
    cleaned_up(commits)
    assert value(metrics, "s3blobs_cleanup_failures_total") == 2


# Staged uploads


def test_what_is_staged_before_the_vote_is_counted_once(open_commits, metrics, new_file):
    commits = open_commits(stage_threshold=1)
    commit = begin(commits)
    commit.store(OID, new_file(b"x" * 1000))
    assert staged(metrics) == (1, 1000)
    commit.staged().wait()
    assert uploaded(metrics) == (1, 1, 1000)
    assert staged(metrics) == (1, 1000)
    commit.vote(TID).wait()
    commit.finish()
    assert uploaded(metrics) == (1, 1, 1000)  # the copy is none
    assert ended(metrics) == (1, 0)
    assert staged(metrics) == (0, 0)
    cleaned_up(commits)
    assert nothing_under_way(metrics)


def test_what_arrives_before_its_transaction_begins_is_counted_once(commits, metrics, cache):
    pending = Pending(commits)
    path = Sending(pending, cache).send(b"x" * 1000).end(OID)
    assert staged(metrics) == (1, 1000)
    reserve(pending)
    overtake(commits, pending)
    reserve(pending)
    assert uploaded(metrics) == (1, 1, 1000)
    assert staged(metrics) == (1, 1000)
    commit_reserved(commits, pending, {OID: path})
    assert ended(metrics) == (1, 0)
    assert value(metrics, "s3blobs_reservations_total") == 3  # with that of who overtakes
    assert value(metrics, "s3blobs_reservations_overtaken_total") == 1
    cleaned_up(commits)
    assert nothing_under_way(metrics)


def test_what_is_dropped_before_the_vote_is_no_longer_staged(s3, open_commits, metrics, new_file):
    commits = open_commits(stage_threshold=1, s3_max_attempts=1)
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    s3.wait_for("PutObject")
    for _ in range(2):
        commit.abort()
        assert staged(metrics) == (0, 0)
        assert ended(metrics) == (0, 1)
    s3.behave()
    wait_for(lambda: nothing_under_way(metrics))


def test_a_staged_object_that_cannot_be_deleted_is_a_cleanup_failure(s3, open_commits, metrics, new_file):
    commits = open_commits(stage_threshold=1, s3_max_attempts=1)
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied")
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.staged().wait()
    commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert value(metrics, "s3blobs_cleanup_failures_total") == 2  # at its own key, and where it was staged


# Garbage collection


@pytest.fixture
def collect_garbage(collector):
    return lambda base, **changes: collector(**changes).collect(base)


def collected(metrics):
    names = ("runs", "failures", "scanned_objects", "deleted_objects", "deleted_bytes", "delete_failures")
    return tuple(value(metrics, f"s3blobs_gc_{name}_total") for name in names)


def test_before_the_first_collection_all_is_0(cache, metrics):
    assert collected(metrics) == (0, 0, 0, 0, 0, 0)
    for name in "running", "last_duration_seconds", "last_success_timestamp_seconds":
        assert value(metrics, f"s3blobs_gc_{name}") == 0
    for state in "live", "dead", "retained", "newer", "unknown":
        assert value(metrics, "s3blobs_gc_objects", state=state) == value(metrics, "s3blobs_gc_bytes", state=state) == 0


def test_a_collection_tells_what_it_found_and_what_it_deleted(s3, bucket_name, metrics, put, collect_garbage, store):
    live, dead = [(p64(n), p64(1)) for n in range(10, 13)], [(p64(n), p64(2)) for n in range(10, 12)]
    put(*live, *dead, (p64(10), p64(101)))
    store(b"x" * 1000)  # dead
    s3.put(bucket_name, ["blobs/a stranger", "elsewhere"])
    s3.client.put_object(Bucket=bucket_name, Key="blobs/another", Body=b"x" * 50)
    collect_garbage(Base(*live))
    assert collected(metrics) == (1, 0, 7, 3, 1002, 0)
    assert nonzero(metrics, "s3blobs_gc_objects") == {"live": 3, "dead": 3, "newer": 1, "unknown": 2}
    assert nonzero(metrics, "s3blobs_gc_bytes") == {"live": 3, "dead": 1002, "newer": 1, "unknown": 51}
    assert about_now(value(metrics, "s3blobs_gc_last_success_timestamp_seconds"))
    assert value(metrics, "s3blobs_gc_last_duration_seconds") > 0
    assert value(metrics, "s3blobs_gc_running") == 0
    collect_garbage(Base(*live))
    assert collected(metrics) == (2, 0, 11, 3, 1002, 0)
    assert nonzero(metrics, "s3blobs_gc_objects") == {"live": 3, "newer": 1, "unknown": 2}


def test_it_is_running_while_it_runs(s3, metrics, put, collect_garbage):
    s3.misbehave(operation="ListObjects", hang=True)
    with ThreadPoolExecutor() as pool:
        collecting = pool.submit(collect_garbage, Base())
        s3.wait_for("ListObjects")
        assert value(metrics, "s3blobs_gc_running") == 1
        assert collected(metrics)[:2] == (1, 0)
        s3.behave()
        collecting.result(30)
    assert nothing_under_way(metrics)


def test_a_failed_collection_is_a_failure_and_no_success(s3, metrics, put, collect_garbage):
    put((p64(1), p64(1)))
    collect_garbage(Base((p64(1), p64(1))))
    before = figures(metrics)
    s3.misbehave(operation="ListObjects", status=500, code="InternalError")
    with pytest.raises(BucketError):
        collect_garbage(Base(), s3_max_attempts=1)
    assert collected(metrics) == (2, 1, 1, 0, 0, 0)
    for name in "s3blobs_gc_last_success_timestamp_seconds", "s3blobs_gc_last_duration_seconds":
        assert value(metrics, name) == before[name,]
    assert nonzero(metrics, "s3blobs_gc_objects") == {"live": 1}  # as the last one that saw everything found it
    assert nothing_under_way(metrics)


def test_a_base_in_trouble_is_a_failure_too(metrics, put, collect_garbage):
    put((p64(1), p64(1)))

    class Failing(Base):
        def loadSerial(self, oid, tid):
            raise OSError("the base is in trouble")

    with pytest.raises(OSError, match="trouble"):
        collect_garbage(Failing())
    assert collected(metrics)[:2] == (1, 1)
    assert nothing_under_way(metrics)


#: A blob that lives, or nothing would be deleted.
LIVE = p64(99), p64(1)


def test_what_was_deleted_before_a_failure_is_counted(s3, metrics, put, collect_garbage):
    put(LIVE, *((p64(number), p64(1)) for number in range(3)))
    s3.misbehave(operation="DeleteObjects", status=501, code="NotImplemented")
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied", times=1)
    with pytest.raises(BucketError):
        collect_garbage(Base(LIVE))
    assert collected(metrics) == (1, 1, 4, 2, 2, 1)


def test_what_a_refused_batch_named_is_not_deleted(s3, metrics, put, collect_garbage):
    put(LIVE, *((p64(number), p64(1)) for number in range(3)))
    body = "<DeleteResult><Error><Key>blobs/1/1.blob</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    s3.misbehave(operation="DeleteObjects", status=200, body=body)
    with pytest.raises(BucketError):
        collect_garbage(Base(LIVE))
    assert collected(metrics) == (1, 1, 4, 2, 2, 1)


def test_what_a_transaction_wants_is_dead_but_not_deleted(metrics, put, in_flight, collect_garbage):
    put(LIVE, (p64(1), p64(1)), (p64(2), p64(1)))
    in_flight.add_all([(p64(1), p64(1))], "a transaction")
    collect_garbage(Base(LIVE))
    assert collected(metrics) == (1, 0, 3, 1, 1, 0)


# A whole server


@pytest.fixture
def start(start):
    """As for all tests, with an endpoint."""
    return functools.partial(start, metrics=True)


@pytest.fixture
def server(start):
    return start(options={"s3_max_attempts": 1})


def store_blob(client, oid, data, txn):
    path = os.path.join(client.temporaryDirectory(), os.urandom(4).hex())
    with open(path, "wb") as file:
        file.write(data)
    client.storeBlob(oid, ZERO, RECORD, path, "", txn)


def commit_blob(client, data=b"data"):
    """Returns (oid, tid)."""
    oid, txn = client.new_oid(), TransactionMetaData()
    client.tpc_begin(txn)
    try:
        store_blob(client, oid, data, txn)
        client.tpc_vote(txn)
        return oid, client.tpc_finish(txn)
    except BaseException:
        client.tpc_abort(txn)
        raise


def commit_object(client):
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(client.new_oid(), ZERO, zodb_pickle(MinPO("x")), "", txn)
    client.tpc_vote(txn)
    return client.tpc_finish(txn)


def votes(figures):
    """How many votes there were, and the reasons of those that failed."""
    voted = value(figures, "s3blobs_transactions_voted_total")
    refused_at_once = sum(
        value(figures, "s3blobs_vote_failures_total", reason=reason) for reason in ("cache", "client")
    )
    assert voted - refused_at_once <= value(figures, "s3blobs_vote_duration_seconds_count") <= voted
    return voted, nonzero(figures, "s3blobs_vote_failures_total")


def check_ends_quietly(server):
    wait_for(lambda: nothing_under_way(server.metrics()))


def test_a_server_counts_what_its_clients_do(s3, server):
    client = server.client()
    name = commit_blob(client, b"x" * 1000)
    commit_object(client)
    server.client().loadBlob(*name)
    seen = server.metrics()
    assert votes(seen) == (1, {})
    assert ended(seen) == (1, 0)
    assert requests_and_hits(seen) == (1, 1, 1000, 1000)
    assert uploaded(seen) == (1, 1, 1000)
    assert value(seen, "s3blobs_bucket_up") == 1
    assert nothing_under_way(seen)


def test_transactions_without_blobs_are_no_votes(server):
    client = server.client()
    commit_object(client)
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(client.new_oid(), ZERO, zodb_pickle(MinPO("x")), "", txn)
    client.tpc_vote(txn)
    client.tpc_abort(txn)
    seen = server.metrics()
    assert votes(seen) == (0, {})
    assert ended(seen) == (0, 0)


def test_the_duration_of_a_vote_is_that_of_its_uploads(s3, server, background):
    s3.misbehave(operation="PutObject", hang=True)
    commit = background(commit_blob, server.client())
    s3.wait_for("PutObject")
    seen = server.metrics()
    assert votes(seen) == (0, {})
    assert staged(seen) == (1, 4)
    assert nonzero(seen, "s3blobs_s3_inflight_operations") == {"put": 1}
    time.sleep(0.3)
    s3.behave()
    commit.result(30)
    assert value(server.metrics(), "s3blobs_vote_duration_seconds_sum") >= 0.3
    check_ends_quietly(server)


@pytest.mark.parametrize("size", [100, 5 * MB])
def test_a_refused_upload_is_a_failure_of_the_bucket(s3, server, size):
    """The large one fails before it has the commit lock, the small one with it."""
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    client = server.client()
    with pytest.raises(StorageError, match="AccessDenied"):
        commit_blob(client, os.urandom(size))
    assert votes(server.metrics()) == (1, {"bucket": 1})
    s3.behave()
    check_ends_quietly(server)
    commit_blob(client, os.urandom(size))
    seen = server.metrics()
    assert votes(seen) == (2, {"bucket": 1})
    assert value(seen, "s3blobs_transactions_finished_total") == 1


@pytest.mark.parametrize("size", slow_after(1, of=[100, 5 * MB]))
def test_an_upload_that_takes_too_long_is_a_timeout(s3, start, background, size):
    server = start(options={"upload_timeout": "2s", "s3_max_attempts": 1, "s3_read_timeout": "60s"})
    s3.misbehave(operation="PutObject", hang=True)
    with pytest.raises(StorageError, match="upload-timeout"):
        background(commit_blob, server.client(), os.urandom(size)).result(60)
    assert votes(server.metrics()) == (1, {"timeout": 1})
    assert value(server.metrics(), "s3blobs_vote_duration_seconds_sum") >= 1
    s3.behave()
    check_ends_quietly(server)


def test_an_undo_to_a_blob_that_is_gone_is_missing(s3, bucket_name, server):
    db = server.db()
    for data in b"one", b"two":
        with db.transaction() as connection:
            root = connection.root()
            if "blob" not in root:
                root["blob"] = Blob()
            with root["blob"].open("w") as file:
                file.write(data)
    (first, _) = sorted(s3.keys(bucket_name))
    s3.client.delete_object(Bucket=bucket_name, Key=first)
    uncache(server, *Keys("1").parse(first))
    manager = transaction.TransactionManager()
    db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
    with pytest.raises(StorageError, match="no such object"):
        manager.commit()
    manager.abort()
    seen = server.metrics()
    assert votes(seen) == (3, {"missing": 1})
    assert ended(seen) == (2, 1)
    assert value(seen, "s3blobs_missing_blobs_total") == 1
    check_ends_quietly(server)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets one process limit another")
def test_a_blob_that_cannot_be_received_is_a_failure_of_the_cache(server):
    client = server.client()
    commit_blob(client)
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (MB, hard))
    with pytest.raises(StorageError, match="cache-dir"):
        commit_blob(client, os.urandom(3 * MB))
    seen = server.metrics()
    assert votes(seen) == (2, {"cache": 1})
    assert nonzero(seen, "s3blobs_cache_errors_total") == {"write": 1}
    check_ends_quietly(server)


def test_a_blob_that_cannot_be_kept_is_a_failure_of_the_cache(server):
    client = server.client()
    shutil.rmtree(server.cache_dir / "tmp")
    with pytest.raises(StorageError, match="cache-dir"):
        commit_blob(client, os.urandom(5 * MB))
    seen = server.metrics()
    assert votes(seen) == (1, {"cache": 1})
    assert nonzero(seen, "s3blobs_cache_errors_total") == {"write": 1}
    check_ends_quietly(server)


def test_a_client_with_a_shared_blob_directory_is_a_failure_of_the_client(server, tmp_path):
    (tmp_path / "shared" / "tmp").mkdir(parents=True)
    client = server.client(shared_blob_dir=True, blob_dir=str(tmp_path / "shared"))
    with pytest.raises(StorageError, match="shared-blob-dir false"):
        commit_blob(client)
    commit_object(client)
    seen = server.metrics()
    assert votes(seen) == (1, {"client": 1})
    # The client has its answer a moment before the server is through with the transaction.
    wait_for(lambda: nothing_under_way(server.metrics()))


@pytest.mark.parametrize("size", slow_after(1, of=[100, 5 * MB]))
def test_nothing_stays_staged_when_a_client_disconnects_in_its_vote(s3, server, background, size):
    s3.misbehave(operation="PutObject", hang=True)
    client = server.client()
    commit = background(commit_blob, client, os.urandom(size))
    s3.wait_for("PutObject")
    assert staged(server.metrics()) == (1, size)
    client.close()
    assert commit.exception(60) is not None
    wait_for(lambda: staged(server.metrics()) == (0, 0))
    s3.behave()
    check_ends_quietly(server)
    seen = server.metrics()
    assert votes(seen)[1] == {}
    assert value(seen, "s3blobs_transactions_finished_total") == 0
    assert value(seen, "s3blobs_cleanup_failures_total") == 0


def test_nothing_stays_staged_when_a_client_disconnects_after_its_vote(server):
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    store_blob(client, client.new_oid(), b"data", txn)
    store_blob(client, client.new_oid(), os.urandom(5 * MB), txn)
    client.tpc_vote(txn)
    assert staged(server.metrics()) == (2, 4 + 5 * MB)
    client.close()
    wait_for(lambda: ended(server.metrics()) == (0, 1))
    check_ends_quietly(server)
    assert votes(server.metrics()) == (1, {})


@pytest.mark.parametrize("leave", ["abort", "disconnect"])
def test_nothing_stays_staged_when_a_transaction_ends_before_its_vote(s3, bucket_name, server, leave):
    client = server.client()
    client._call("tpc_begin", 1, b"", b"", {}, None, " ")
    client._async("storeBlobStart")
    client._async("storeBlobChunk", os.urandom(5 * MB))
    client._async("storeBlobEnd", client.new_oid(), ZERO, RECORD, 1)
    wait_for(lambda: staged(server.metrics()) == (1, 5 * MB))
    if leave == "abort":
        client._call("tpc_abort", 1)
    else:
        client.close()
    wait_for(lambda: not s3.keys(bucket_name))
    check_ends_quietly(server)
    seen = server.metrics()
    assert votes(seen) == (0, {})
    assert ended(seen) == (0, 1)


def test_nothing_stays_staged_after_a_conflict(server):
    db = server.db()
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"one")
    other = server.db()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    for manager, database, data in (one, db, b"winner"), (two, other, os.urandom(5 * MB)):
        with database.open(manager).root()["blob"].open("w") as file:
            file.write(data)
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    check_ends_quietly(server)
    seen = server.metrics()
    assert nonzero(seen, "s3blobs_vote_failures_total") == {}  # it did not fail because of the blobs
    assert value(seen, "s3blobs_transactions_finished_total") == 2


class Counter(Persistent):
    """Resolves its conflicts; the server cannot import it and so leaves that to the client."""

    value = 0

    def _p_resolveConflict(self, old, saved, new):
        return {"value": saved["value"] + new["value"] - old.get("value", 0)}


def test_nothing_stays_staged_when_a_client_resolves_a_conflict(start):
    server = start(zeo={"client_conflict_resolution": "true"})
    first = server.db()
    with first.transaction() as connection:
        connection.root()["counter"] = Counter()
        connection.root()["folder"] = PersistentMapping()
    second = server.db()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    root, other = first.open(one).root(), second.open(two).root()
    root["counter"].value += 1
    other["counter"].value += 1
    other["folder"]["blob"] = Blob(os.urandom(5 * MB))
    one.commit()
    two.commit()
    check_ends_quietly(server)
    seen = server.metrics()
    assert votes(seen) == (1, {})
    assert value(seen, "s3blobs_transactions_finished_total") == 1


def test_a_read_that_is_given_up_leaves_nothing_under_way(s3, server, background):
    name = commit_blob(server.client(), b"cold")
    server.stop()
    server.cache_name = "other"
    server.start()
    s3.misbehave(operation="GetObject", hang=True)
    client = server.client()
    read = background(client.loadBlob, *name)
    s3.wait_for("GetObject")
    assert nonzero(server.metrics(), "s3blobs_s3_inflight_operations") == {"get": 1}
    client.close()
    assert read.exception(60) is not None
    s3.behave()
    wait_for(lambda: value(server.metrics(), "s3blobs_cache_files") == 1)
    check_ends_quietly(server)
    wait_for(lambda: value(server.metrics(), "s3blobs_cache_pinned_bytes") == 0)


def test_a_missing_blob_is_one_that_a_record_names(s3, bucket_name, server):
    oid, tid = commit_blob(server.client())
    server.stop()
    server.cache_name = "other"
    server.start()
    client = server.client()
    s3.misbehave(operation="GetObject", status=500, code="InternalError", times=1)
    with pytest.raises(StorageError, match="InternalError"):
        client.loadBlob(oid, tid)
    with pytest.raises(POSKeyError):
        client.loadBlob(oid, p64(1))  # as a revision that has been packed away
    assert value(server.metrics(), "s3blobs_missing_blobs_total") == 0
    (key,) = s3.keys(bucket_name)
    s3.client.delete_object(Bucket=bucket_name, Key=key)
    with pytest.raises(POSKeyError):
        client.loadBlob(oid, tid)
    seen = server.metrics()
    assert value(seen, "s3blobs_missing_blobs_total") == 1
    assert loads(seen) == {"error": 3}
    check_ends_quietly(server)


def test_a_pack_is_a_collection(server):
    db = server.db()
    for data in b"one", b"two":
        with db.transaction() as connection:
            connection.root()["blob"] = Blob(data)
    db.pack()
    seen = server.metrics()
    assert collected(seen) == (1, 0, 2, 1, 3, 0)
    assert nonzero(seen, "s3blobs_gc_objects") == {"live": 1, "dead": 1}


def test_many_clients_at_once_leave_no_figure_behind(s3, server, background):
    """Whatever goes wrong with each of them, every gauge comes back and every vote is counted once."""
    s3.misbehave(operation="PutObject|CopyObject", status=403, code="AccessDenied", times=7)
    clients, errors, lock = [server.client() for _ in range(6)], [], threading.Lock()

    def work(client):
        for size in (10, 5 * MB, 1000):
            try:
                commit_blob(client, os.urandom(size))
            except StorageError as error:
                with lock:
                    errors.append(error)

    for done in [background(work, client) for client in clients]:
        done.result(120)
    check_ends_quietly(server)
    seen = server.metrics()
    voted, failures = votes(seen)
    assert voted == 18
    assert failures == {"bucket": len(errors)}
    assert value(seen, "s3blobs_transactions_finished_total") == 18 - len(errors)
