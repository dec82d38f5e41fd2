"""Garbage collection: what the base cannot load any more goes, everything else stays."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError, ReadConflictError
from ZODB.utils import p64, u64, z64

from zodb_s3blobs.bucket import BucketError
from zodb_s3blobs.commit import Uploads
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.garbage import collect
from zodb_s3blobs.inflight import InFlight
from zodb_s3blobs.metrics import Metrics

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture(params=["FileStorage", "MappingStorage"])
def base(request, tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs")) if request.param == "FileStorage" else MappingStorage()
    yield base
    base.close()


@pytest.fixture
def commit(base):
    """Commits a record of ``oid``; returns the tid."""

    def commit(oid, serial=z64):
        transaction = TransactionMetaData()
        base.tpc_begin(transaction)
        base.store(oid, serial, b"a record", "", transaction)
        base.tpc_vote(transaction)
        return base.tpc_finish(transaction)

    return commit


@pytest.fixture
def put(s3, bucket, bucket_name):
    """Puts the blobs (oid, tid); returns their keys."""

    def put(*names):
        keys = [bucket.keys.key(oid, tid) for oid, tid in names]
        s3.put(bucket_name, keys)
        return keys

    return put


@pytest.fixture
def in_flight():
    return InFlight()


@pytest.fixture
def collect_garbage(bucket, cache, in_flight):
    """Collects the garbage of a base."""
    return lambda base: collect(base, bucket, cache, in_flight, Metrics())


class Base:
    """A base whose last tid is 100 and that can load what is in ``live``."""

    def __init__(self, *live):
        self.live = set(live)

    def lastTransaction(self):
        return p64(100)

    def loadSerial(self, oid, tid):
        if (oid, tid) not in self.live:
            raise POSKeyError(oid)
        return b"a record"


def earlier(tid):
    return p64(u64(tid) - 1)


def later(tid):
    return p64(u64(tid) + 1)


def test_exactly_the_dead_are_deleted(s3, bucket_name, base, commit, put, collect_garbage):
    first = commit(p64(1))
    second = commit(p64(1), first)
    other = commit(p64(2))
    live = put((p64(1), first), (p64(1), second), (p64(2), other))
    put((p64(1), earlier(first)), (p64(2), first), (p64(3), other))
    assert collect_garbage(base) == 3
    assert s3.keys(bucket_name) == sorted(live)


def test_a_packed_away_revision_is_dead(s3, bucket_name, base, commit, put, collect_garbage):
    root = commit(z64)
    put((z64, root))
    (current,) = put((z64, commit(z64, root)))
    base.pack(time.time() + 1, lambda record, oids=None: [])
    assert collect_garbage(base) == 1
    assert s3.keys(bucket_name) == [current]


def test_without_garbage_nothing_is_deleted(s3, base, commit, put, collect_garbage):
    put((p64(1), commit(p64(1))))
    assert collect_garbage(base) == 0
    assert [request.operation for request in s3.requests()] == ["ListObjects"]


def test_what_is_later_than_the_last_transaction_is_left_alone(s3, bucket_name, base, commit, put, collect_garbage):
    last = commit(p64(1))
    keys = put((p64(1), later(last)), (p64(9), later(last)))
    assert collect_garbage(base) == 0
    assert s3.keys(bucket_name) == keys


def test_an_empty_base_owns_nothing_and_deletes_nothing(s3, bucket_name, base, put, collect_garbage):
    keys = put((p64(1), p64(1)), (p64(2), p64(2)))
    assert collect_garbage(base) == 0
    assert s3.keys(bucket_name) == keys


def test_foreign_keys_are_left_alone(s3, bucket_name, put, collect_garbage):
    foreign = ["blobs/1/01.blob", "blobs/1/1.blob.bak", "blobs/README", "other/blobs/1/1.blob"]
    s3.put(bucket_name, foreign)
    put((p64(1), p64(1)))
    assert collect_garbage(Base()) == 1
    assert s3.keys(bucket_name) == foreign


def test_what_a_transaction_wants_is_left_alone(s3, bucket_name, put, in_flight, collect_garbage):
    (wanted,) = put((p64(1), p64(1)))
    put((p64(2), p64(1)))
    in_flight.add((p64(1), p64(1)), "a transaction")
    assert collect_garbage(Base()) == 1
    assert s3.keys(bucket_name) == [wanted]
    in_flight.discard([(p64(1), p64(1))], "a transaction")
    assert collect_garbage(Base()) == 1
    assert s3.keys(bucket_name) == []


def test_what_is_committed_after_it_was_found_dead_is_left_alone(s3, bucket_name, put, collect_garbage):
    restored, dead = (p64(1), p64(1)), (p64(2), p64(1))
    (kept, _) = put(restored, dead)

    class Restoring(Base):
        def loadSerial(self, oid, tid):
            if (oid, tid) == dead:
                self.live.add(restored)  # a transaction that restores it, from its begin to its finish
            return super().loadSerial(oid, tid)

    assert collect_garbage(Restoring()) == 1
    assert s3.keys(bucket_name) == [kept]


def test_a_restore_of_what_is_being_deleted_waits_and_uploads_it_again(s3, bucket_name, bucket, cache, put, new_file):
    (key,) = put((p64(1), p64(1)))
    uploads = Uploads(bucket, cache, Fetcher(bucket, cache, Metrics()).fetch, Metrics(), 4, 60)
    s3.misbehave(operation="DeleteObject", hang=True)
    with ThreadPoolExecutor() as pool:
        collecting = pool.submit(collect, Base(), bucket, cache, uploads.in_flight, Metrics())
        s3.wait_for("DeleteObject")
        restoring = uploads.begin(None, p64(101))
        restoring.restore(p64(1), p64(1), new_file(b"x"))
        s3.behave()
        restoring.vote().wait()
        restoring.finish()
        assert collecting.result() == 1
    assert s3.keys(bucket_name) == [key]
    uploads.close()


def test_an_error_of_the_base_stops_the_collection_before_anything_is_deleted(s3, bucket_name, put, collect_garbage):
    keys = put((p64(1), p64(1)), (p64(2), p64(1)), (p64(3), p64(1)))

    class Failing(Base):
        def loadSerial(self, oid, tid):
            if oid == p64(2):
                raise ReadConflictError("the base is in trouble")
            return super().loadSerial(oid, tid)

    with pytest.raises(ReadConflictError):
        collect_garbage(Failing())
    assert s3.keys(bucket_name) == keys


def test_a_thousand_dead_blobs_are_deleted_with_one_request(s3, bucket_name, put, collect_garbage):
    dead = [(p64(number), p64(1)) for number in range(1, 2002)]
    live = [(p64(number), p64(2)) for number in range(1, 2002, 100)]
    put(*dead)
    kept = put(*live)
    assert collect_garbage(Base(*live)) == 2001
    assert [request.operation for request in s3.requests() if "Delete" in request.operation] == [
        "DeleteObjects",
        "DeleteObjects",
        "DeleteObject",
    ]
    assert s3.keys(bucket_name) == sorted(kept)


@pytest.mark.parametrize("operation", ["ListObjects", "DeleteObjects"])
def test_when_s3_fails_half_way_what_is_live_stays_and_the_next_run_does_the_rest(
    s3, bucket_name, put, collect_garbage, operation
):
    put(*((p64(number), p64(1)) for number in range(1, 1501)))
    live = [(p64(number), p64(2)) for number in range(1, 1501, 100)]
    kept = put(*live)
    s3.misbehave(operation=operation, times=1)
    s3.misbehave(operation=operation, status=500, code="InternalError")
    with pytest.raises(BucketError, match="InternalError"):
        collect_garbage(Base(*live))
    left = s3.keys(bucket_name)
    assert set(kept) < set(left)
    s3.behave()
    assert collect_garbage(Base(*live)) == len(left) - len(kept)
    assert s3.keys(bucket_name) == sorted(kept)


def test_the_cached_files_of_deleted_blobs_go_too(bucket, cache, new_file, collect_garbage):
    fetcher = Fetcher(bucket, cache, Metrics())
    dead, live = (p64(1), p64(1)), (p64(1), p64(2))
    for name in (dead, live):
        bucket.put(*name, new_file(b"data"))
        fetcher.fetch(*name).release()
    collect_garbage(Base(live))
    assert cache.get(*dead) is None
    with cache.get(*live) as path, open(path, "rb") as file:
        assert file.read() == b"data"
