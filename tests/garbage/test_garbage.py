"""Garbage collection: what the base cannot load any more goes, everything else stays."""

import json
import logging
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import ZODB
import ZODB.config
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ReadConflictError, StorageError
from ZODB.utils import p64, u64, z64

from tests.support.commits import begin
from tests.support.fake_base import Base
from tests.support.speed import slow, slow_after, slow_but
from zodb_s3blobs.bases import adapter_for
from zodb_s3blobs.cache.directory import CacheError
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.garbage import pace as pace_module
from zodb_s3blobs.garbage import scan as scan_module
from zodb_s3blobs.garbage.collector import CollectionRefused, Collector
from zodb_s3blobs.garbage.scan import scan_beside_a_server
from zodb_s3blobs.identity import Identity
from zodb_s3blobs.lease import NotOwner
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.errors import BucketError

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
def collect_garbage(collector):
    """Collects the garbage of a storage, or of what a test says that it holds."""

    def collect(base):
        if isinstance(base, Base):
            return collector().collect(base)
        with adapter_for(base).revisions() as revisions:
            return collector().collect(revisions)

    return collect


MARKS = "gc-marks.jsonl"
MONTH = 30 * 86400

#: Without it, it would not be believed that all others are dead.
LIVE = (p64(0xFFF), p64(1))


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


@slow
def test_a_gentle_collection_leaves_most_of_the_time_to_others(put, collector):
    names = [(p64(number), p64(1)) for number in range(1, 1001)]
    put(*names)
    collect = collector().collect
    collect(Base(*names))  # what is done for the first time takes longer
    began, computed = time.monotonic(), time.thread_time()
    assert collect(Base(*names), gently=True) == 0
    took, computed = time.monotonic() - began, time.thread_time() - computed
    assert took > 3 * computed


class Clock:
    """The clocks of a process in which another thread serves a request of 0.3 ms after each ``interval`` seconds."""

    def __init__(self, interval):
        self.interval = interval
        self.now = self.used = self.slept = 0.0

    def time(self):
        return time.time()

    def monotonic(self):
        return self.now

    def thread_time(self):
        return self.used

    def process_time(self):
        return self.used + self.now // self.interval * 0.0003

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds

    def compute(self, seconds):
        self.now += seconds
        self.used += seconds


class SlowBase(Base):
    """A base that computes for 1 ms when it is asked."""

    def __init__(self, clock, *live):
        super().__init__(*live)
        self.clock = clock

    def loadable(self, *args):
        self.clock.compute(0.001)
        return super().loadable(*args)


@pytest.mark.parametrize(
    ("gently", "interval", "least", "most"),
    [
        pytest.param(False, 0.001, 0, 0, id="not gently"),
        pytest.param(True, math.inf, 2, 4, id="nobody"),
        pytest.param(True, 1.0, 2, 6, id="a request now and then"),
        pytest.param(True, 0.2, 35, 40, id="a client that reads slowly"),
        pytest.param(True, 0.001, 35, 40, id="many requests"),
    ],
)
def test_a_gentle_collection_rests_little_on_a_quiet_server_and_more_while_it_serves(
    put, collector, monkeypatch, gently, interval, least, most
):
    names = [(p64(number), p64(1)) for number in range(1, 1001)]
    put(*names)
    clock = Clock(interval)
    monkeypatch.setattr(pace_module, "time", clock)
    assert collector().collect(SlowBase(clock, *names), gently=gently) == 0
    assert least <= clock.slept / clock.used <= most


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
    assert [request.operation for request in s3.requests()] == [
        "ListObjects",
        "DeleteObject",  # the marks
        "ListObjects",  # what is staged
        "ListMultipartUploads",
    ]


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
    kept = put(LIVE)
    put((p64(1), p64(1)))
    assert collect_garbage(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == sorted(foreign + kept)


def test_what_a_transaction_wants_is_left_alone(s3, bucket_name, put, in_flight, collect_garbage):
    (wanted, live) = put((p64(1), p64(1)), LIVE)
    put((p64(2), p64(1)))
    in_flight.add_all([(p64(1), p64(1))], "a transaction")
    assert collect_garbage(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == sorted([wanted, live])
    in_flight.remove([(p64(1), p64(1))], "a transaction")
    assert collect_garbage(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == [live]


def test_what_is_committed_after_it_was_found_dead_is_left_alone(s3, bucket_name, put, collect_garbage):
    restored, dead = (p64(1), p64(1)), (p64(2), p64(1))
    *kept, _ = put(LIVE, restored, dead)

    class Restoring(Base):
        def loadSerial(self, oid, tid):
            if (oid, tid) == dead:
                self.live.add(restored)  # a transaction that restores it, from its begin to its finish
            return super().loadSerial(oid, tid)

    assert collect_garbage(Restoring(LIVE)) == 1
    assert s3.keys(bucket_name) == sorted(kept)


def test_a_restore_of_what_is_being_deleted_waits_and_uploads_it_again(
    s3, bucket_name, commits, collector, put, new_file
):
    key, live = put((p64(1), p64(1)), LIVE)
    s3.misbehave(operation="DeleteObject", hang=True)
    with ThreadPoolExecutor() as pool:
        collecting = pool.submit(collector(commits).collect, Base(LIVE))
        s3.wait_for("DeleteObject")
        restoring = begin(commits)
        restoring.restore(p64(1), p64(1), new_file(b"x"))
        uploads = restoring.vote(p64(101))
        s3.behave()
        uploads.wait()
        restoring.finish()
        assert collecting.result() == 1
    assert s3.keys(bucket_name) == sorted([key, live])


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


@slow
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
        "DeleteObject",  # the marks
    ]
    assert s3.keys(bucket_name) == sorted(kept)


@pytest.mark.parametrize("operation", slow_but("DeleteObjects", of=["ListObjects", "DeleteObjects"]))
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


def value(instrument):
    (sample,) = [sample for sample in instrument._samples() if sample.name != "_created"]
    return sample.value


def found(metrics):
    """What the last collection found: objects by state, and bytes by state; without zeros."""
    return tuple(
        {sample.labels["state"]: sample.value for sample in gauge._samples() if sample.value}
        for gauge in (metrics.gc_objects, metrics.gc_bytes)
    )


def deletions(s3):
    return [request.path for request in s3.requests() if request.operation.startswith(("Delete", "Abort"))]


def infos(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.INFO and record.name == "zodb_s3blobs.garbage.collector"
    ]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What an object's many revisions cost


def revisions(oid, count):
    return [(oid, p64(number)) for number in range(1, count + 1)]


def test_all_revisions_of_an_object_are_judged_at_once(s3, bucket_name, put, collector):
    many, few = revisions(p64(1), 50), revisions(p64(2), 3)
    kept = put(*many[:20], *few)
    put(*many[20:], (p64(3), p64(1)))
    base = Base(*many[:20], *few)
    assert collector().collect(base) == 31
    assert s3.keys(bucket_name) == sorted(kept)
    scanned, again = base.asked[:3], base.asked[3:]
    assert scanned == [(p64(1), 50), (p64(2), 3), (p64(3), 1)]
    assert again == [(p64(1), 30), (p64(3), 1)]  # those that are to be deleted


def test_more_revisions_than_memory_is_to_hold_are_judged_in_parts(
    s3, bucket_name, put, collector, monkeypatch, metrics
):
    monkeypatch.setattr(scan_module, "_GROUP", 4)
    names = revisions(p64(1), 10)
    kept = put(*names[::2])
    put(*names[1::2])
    base = Base(*names[::2])
    assert collector(max_delete_percent=1).collect(base) == 5
    assert [count for _, count in base.asked] == [4, 4, 2, 4, 1]
    assert s3.keys(bucket_name) == sorted(kept)
    assert found(metrics)[0] == {"live": 5, "dead": 5}


@pytest.mark.parametrize("retention", [0, 30 * 86400])
def test_a_bucket_that_lists_its_keys_in_any_order_loses_nothing(
    s3, bucket_name, put, collector, monkeypatch, retention, after
):
    names = [name for oid in (1, 2, 3) for name in revisions(p64(oid), 4)]
    kept = put(*names[::2])
    put(*names[1::2])
    list_blobs = Bucket.list_blobs

    def shuffled(bucket, unknown=lambda size: None):
        listed = sorted(list_blobs(bucket, unknown), key=lambda blob: (blob.tid, blob.oid))
        return iter(listed)

    monkeypatch.setattr(Bucket, "list_blobs", shuffled)
    packing = collector(retention=retention)
    for seconds in (0, 30 * 86400) if retention else (0,):
        after(seconds)
        packing.before_pack(Base(*names[::2]))
        deleted = packing.collect(Base(*names[::2]))
    assert deleted == 6
    assert [key for key in s3.keys(bucket_name) if key.startswith("blobs/")] == sorted(kept)


def test_a_pack_asks_for_all_marks_of_an_object_at_once(put, collector):
    many = revisions(p64(1), 50)
    put(LIVE, *many)
    packing = collector(retention=MONTH)
    packing.collect(Base(LIVE))
    base = Base(LIVE, *many[:10])
    packing.before_pack(base)
    assert base.asked[-1] == (p64(1), 50)


# Probation


@pytest.fixture
def packing(bucket, cache, in_flight, metrics, identity):
    """Makes a `Collector` that has the lease, in the state that a test says."""

    def packing(retention=0, percent=100, **state):
        lease = FakeLease(**state)
        return Collector(
            bucket, cache, in_flight, lambda name: False, lease, metrics, retention, percent, identity, 86400
        )

    return packing


@pytest.fixture
def identity(tmp_path):
    return Identity(str(tmp_path / "a database"))


class FakeLease:
    """As much of `Lease` as a `Collector` uses."""

    def __init__(self, is_on_probation=False, owner=True):
        self.is_on_probation = is_on_probation
        self.claimed = {p64(1)} if owner else set()
        self._owner = owner

    def require(self):
        if not self._owner:
            raise NotOwner("it belongs to another")

    renew_now = verify = require


@pytest.fixture
def marked(s3, bucket_name):
    """The keys of the blobs that have marks, and the days since 1970 when they began; None without the object."""

    def marked():
        if MARKS not in s3.keys(bucket_name):
            return None
        lines = s3.client.get_object(Bucket=bucket_name, Key=MARKS)["Body"].read().splitlines()
        return {
            f"blobs/{mark['oid']}/{mark['tid']}.blob": datetime.fromisoformat(mark["dead_since"]).timestamp() // 86400
            for mark in map(json.loads, lines)
        }

    return marked


@pytest.mark.parametrize("retention", [0, 1, 30 * 86400])
def test_on_probation_dead_blobs_are_only_marked_and_one_line_says_until_when(
    s3, bucket_name, put, packing, marked, after, caplog, metrics, retention
):
    caplog.set_level(logging.INFO)
    _, dead = put(LIVE, (p64(1), p64(1)))
    s3.put(bucket_name, [f"staged/{'a' * 32}"])
    s3.client.create_multipart_upload(Bucket=bucket_name, Key="blobs/1/1.blob")  # in 2010, says the server
    keys = s3.keys(bucket_name)
    for days in 0, 100:
        after(days * 86400)
        collector = packing(retention, is_on_probation=True)
        collector.before_pack(Base(LIVE))
        caplog.clear()
        assert collector.collect(Base(LIVE), gently=True) == 0
        assert s3.keys(bucket_name) == sorted([*keys, MARKS])
        assert marked() == {dead: today()}
        assert found(metrics)[0] == {"live": 1, "retained": 1}
        (line,) = infos(caplog)
        assert "1 live and 1 dead blobs" in line
        assert "until a week after this database took the s3-prefix over" in line
    assert deletions(s3) == []
    assert (value(metrics.gc_failures), value(metrics.gc_deleted)) == (0, 0)


def today():
    return time.time() // 86400


def test_when_the_probation_is_over_a_retention_of_0_deletes_all_that_is_dead(s3, bucket_name, put, packing, identity):
    live, _ = put(LIVE, (p64(1), p64(1)))
    packing(is_on_probation=True).collect(Base(LIVE))
    put((p64(2), p64(1)))
    collector = packing()
    collector.before_pack(Base(LIVE))
    assert collector.collect(Base(LIVE)) == 2
    assert s3.keys(bucket_name) == [live]
    assert not identity.marks_are_doubtful


def test_the_probation_counts_for_the_retention(s3, bucket_name, put, packing, after):
    live, _ = put(LIVE, (p64(1), p64(1)))
    packing(is_on_probation=True).collect(Base(LIVE))
    after(MONTH)
    assert packing(MONTH).collect(Base(LIVE)) == 1
    assert live in s3.keys(bucket_name)


def test_what_a_pack_on_probation_kills_again_begins_anew(put, packing, marked, after):
    _, dead = put(LIVE, (p64(1), p64(1)))
    packing(is_on_probation=True).collect(Base(LIVE))
    after(10 * 86400)
    collector = packing(is_on_probation=True)
    collector.before_pack(Base(LIVE, (p64(1), p64(1))))  # restored from a backup
    assert marked() == {}
    collector.collect(Base(LIVE))
    assert marked() == {dead: today() + 10}


def test_on_probation_not_one_live_blob_is_no_error(s3, bucket_name, put, packing):
    (dead,) = put((p64(1), p64(1)))
    assert packing(is_on_probation=True).collect(Base()) == 0
    assert s3.keys(bucket_name) == [dead, MARKS]


# Marks that may be wrong


def test_without_retention_the_marks_of_an_earlier_setting_are_doubtful_until_they_are_deleted(
    s3, put, packing, marked, identity, after
):
    _, again = put(LIVE, (p64(1), p64(1)))
    packing(MONTH).collect(Base(LIVE))
    collector = packing()
    s3.forget()
    collector.before_pack(Base(LIVE, (p64(1), p64(1))))
    assert [request.operation for request in s3.requests()] == ["ListObjects"]  # it reads no marks
    assert identity.marks_are_doubtful
    s3.misbehave(operation="ListObjects", status=403, code="AccessDenied")
    with pytest.raises(BucketError):
        collector.collect(Base(LIVE))
    s3.behave()
    assert identity.marks_are_doubtful and marked() is not None
    after(MONTH)  # the server is restarted, with another setting
    assert packing(MONTH).collect(Base(LIVE)) == 0
    assert not identity.marks_are_doubtful
    assert marked() == {again: today() + 30}


def test_the_doubt_ends_with_the_marks(put, packing, marked, identity):
    put(LIVE)
    collector = packing()
    collector.before_pack(Base(LIVE))
    collector.collect(Base(LIVE))
    assert marked() is None
    assert not identity.marks_are_doubtful


def test_with_a_largest_share_of_0_the_marks_stay_and_stay_doubtful(put, packing, marked, identity):
    put(LIVE, (p64(1), p64(1)))
    packing(MONTH).collect(Base(LIVE))
    collector = packing(percent=0)
    collector.before_pack(Base(LIVE))
    collector.collect(Base(LIVE))
    assert marked() is not None
    assert identity.marks_are_doubtful


def test_doubtful_marks_are_written_over_even_if_nothing_is_dead_any_more(put, packing, marked, identity):
    names = LIVE, (p64(1), p64(1))
    put(*names)
    packing(MONTH).collect(Base(LIVE))
    identity.marks_are_doubtful = True
    packing(MONTH).collect(Base(*names))
    assert marked() == {}
    assert not identity.marks_are_doubtful


@pytest.mark.parametrize(("operation", "error"), [("GetObject", BucketError), ("PutObject", BucketError)])
def test_if_the_marks_cannot_be_seen_to_the_database_must_not_be_packed(
    s3, put, packing, marked, identity, operation, error
):
    put(LIVE, (p64(1), p64(1)))
    packing(MONTH).collect(Base(LIVE))
    before = marked()
    collector = packing(MONTH)
    s3.misbehave(operation=operation, status=403, code="AccessDenied")
    with pytest.raises(error, match="AccessDenied"):
        collector.before_pack(Base(LIVE, (p64(1), p64(1))))
    s3.behave()
    assert marked() == before
    assert not identity.marks_are_doubtful


def test_a_full_disk_is_a_reason_not_to_pack_as_well(cache, packing, monkeypatch):
    def fail():
        raise CacheError("no room")

    monkeypatch.setattr(cache, "new_file", fail)
    with pytest.raises(CacheError, match="no room"):
        packing(MONTH).before_pack(Base())


def test_while_another_has_the_prefix_a_pack_makes_the_marks_doubtful(s3, put, packing, marked, identity, after):
    _, dead = put(LIVE, (p64(1), p64(1)))
    packing(MONTH).collect(Base(LIVE))
    other = packing(MONTH, owner=False)
    other.before_pack(Base(LIVE, (p64(1), p64(1))))
    assert identity.marks_are_doubtful
    with pytest.raises(NotOwner):
        other.collect(Base(LIVE))
    assert identity.marks_are_doubtful
    after(MONTH)
    assert packing(MONTH).collect(Base(LIVE)) == 0
    assert marked() == {dead: today() + 30}


def test_while_another_has_the_prefix_a_database_of_several_processes_is_not_packed(packing, identity):
    with pytest.raises(NotOwner):
        packing(MONTH, owner=False).before_pack(Base(shared=True))
    assert not identity.marks_are_doubtful


def test_in_a_full_bucket_what_lives_again_loses_its_mark_before_the_pack_and_the_rest_keeps_theirs(
    s3, bucket_name, put, packing, marked, after
):
    live, again, _ = put(LIVE, (p64(1), p64(1)), (p64(2), p64(1)))
    packing(MONTH).collect(Base(LIVE))
    after(MONTH)
    s3.misbehave(operation="PutObject", status=403, code="QuotaExceeded")
    collector = packing(MONTH)
    collector.before_pack(Base(LIVE, (p64(1), p64(1))))
    assert marked() is None  # a crash now, and the retention would begin anew
    assert collector.collect(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == sorted([live, again])
    s3.behave()
    assert collector.collect(Base(LIVE)) == 0
    assert marked() == {again: today() + 30}


# Newer than the database


def test_newer_blobs_are_counted_and_one_warning_says_what_they_mean(s3, bucket_name, put, collector, caplog, metrics):
    keys = put((p64(1), p64(101)), (p64(2), p64(102)), (p64(3), p64(2**63)), LIVE)
    put((p64(1), p64(1)))
    assert collector().collect(Base(LIVE)) == 1
    assert sorted(s3.keys(bucket_name)) == sorted(keys)
    assert found(metrics) == ({"newer": 3, "dead": 1, "live": 1},) * 2
    (warning,) = warnings(caplog)
    assert f"{bucket_name} has 3 blobs that are newer" in warning
    for words in (
        "restored from a backup",
        "another database",
        "s3-prefix",
        "until the database has a later transaction",
    ):
        assert words in warning


def test_a_transaction_under_way_is_no_reason_to_warn(s3, bucket_name, put, in_flight, collector, caplog, metrics):
    newer = (p64(1), p64(101))
    keys = put(newer)
    in_flight.add_all([newer], "a transaction")
    assert collector().collect(Base()) == 0
    assert found(metrics) == ({"newer": 1}, {"newer": 1})
    assert s3.keys(bucket_name) == keys
    assert warnings(caplog) == []


def test_a_transaction_that_finishes_meanwhile_is_no_reason_to_warn(s3, bucket_name, put, collector, caplog):
    keys = put((p64(1), p64(50)), (p64(2), p64(101)))

    class Committing(Base):
        last = p64(100)

        def lastTransaction(self):
            return self.last

        def loadSerial(self, oid, tid):
            self.last = p64(101)
            return super().loadSerial(oid, tid)

    assert collector().collect(Committing((p64(1), p64(50)))) == 0
    assert s3.keys(bucket_name) == keys
    assert warnings(caplog) == []


# The valve


@pytest.mark.parametrize(
    ("dead", "live", "foreign", "percent", "refused"),
    slow_after(
        3,
        of=[
            (100, 1, 0, 1, False),  # so few always go
            (101, 101, 0, 50, False),  # exactly
            (102, 101, 0, 50, True),
            (101, 1, 0, 1, True),
            (101, 100, 0, 50, True),
            (101, 100, 50, 50, True),  # foreign keys make it no smaller a part
            (101, 1, 0, 99, True),
            (101, 1, 0, 100, False),
            (101, 909, 0, 10, False),
            (102, 909, 0, 10, True),
        ],
        unpack=True,
    ),
)
def test_the_valve(s3, bucket_name, put, collector, dead, live, foreign, percent, refused, metrics):
    goes = [(p64(number), p64(1)) for number in range(dead)]
    stays = [(p64(dead + number), p64(1)) for number in range(live)]
    keys = put(*goes, *stays)
    s3.put(bucket_name, [f"blobs/{number}" for number in range(foreign)])
    collect = collector(max_delete_percent=percent).collect
    if refused:
        with pytest.raises(
            CollectionRefused, match=f"^{dead} of {dead + live} blobs in bucket {bucket_name} are of objects"
        ):
            collect(Base(*stays))
        assert len(s3.keys(bucket_name)) == len(keys) + foreign
        assert not deletions(s3)
    else:
        assert collect(Base(*stays)) == dead
        assert len(s3.keys(bucket_name)) == live + foreign
    assert value(metrics.gc_failures) == refused
    assert value(metrics.gc_running) == 0
    assert (value(metrics.gc_last_success) == 0) == refused
    assert value(metrics.gc_deleted) == value(metrics.gc_deleted_bytes) == (0 if refused else dead)
    states = {"dead": dead, "live": live, "unknown": foreign}
    assert found(metrics) == ({state: number for state, number in states.items() if number},) * 2


def test_the_valve_names_the_key_and_the_command_that_go_on(put, collector):
    put(LIVE, *((p64(number), p64(1)) for number in range(101)))
    with pytest.raises(CollectionRefused) as caught:
        collector(max_delete_percent=50).collect(Base(LIVE))
    for word in "101 bytes", "gc-max-delete-percent (50)", "gc-max-delete-percent 100", "zodb-s3blobs gc --dry-run":
        assert word in str(caught.value)


def test_superseded_revisions_of_objects_that_live_do_not_close_the_valve(s3, bucket_name, put, collector):
    """The first pack after months of edits."""
    live = [(p64(number), p64(9)) for number in range(4)]
    kept = put(*live)
    put(*((p64(number % 4), p64(10 + number)) for number in range(40)), *((p64(0), p64(50 + n)) for n in range(400)))
    assert collector(max_delete_percent=1).collect(Base(*live, last=1000)) == 440
    assert s3.keys(bucket_name) == sorted(kept)


def test_objects_that_have_lost_all_blobs_in_the_bucket_but_exist_do_not_close_the_valve(put, collector):
    put(LIVE, *((p64(number), p64(1)) for number in range(200)))
    base = Base(LIVE, objects=[p64(number) for number in range(200)])
    assert collector(max_delete_percent=1).collect(base) == 200


def test_superseded_revisions_make_the_share_of_the_others_smaller(put, collector):
    superseded = [(LIVE[0], p64(2 + number)) for number in range(101)]
    put(LIVE, *superseded, *((p64(number), p64(1)) for number in range(101)))
    with pytest.raises(CollectionRefused, match=r"^101 of 203 blobs .* 101 bytes"):
        collector(max_delete_percent=49).collect(Base(LIVE, last=1000))
    assert collector(max_delete_percent=50).collect(Base(LIVE, last=1000)) == 202


def test_dead_blobs_that_are_retained_do_not_close_the_valve(s3, put, collector, after, caplog):
    put(LIVE, *((p64(number), p64(1)) for number in range(101)))
    assert collector(retention=MONTH, max_delete_percent=1).collect(Base(LIVE)) == 0
    after(MONTH)
    with pytest.raises(CollectionRefused, match="101 of 102"):
        collector(retention=MONTH, max_delete_percent=1).collect(Base(LIVE))


@pytest.mark.parametrize("retention", [0, 30 * 86400])
def test_with_a_largest_share_of_0_nothing_is_deleted_and_one_line_says_so(
    s3, bucket_name, put, collector, caplog, metrics, retention
):
    caplog.set_level(logging.INFO)
    put(LIVE, (p64(1), p64(1)), (LIVE[0], p64(2)))
    s3.put(bucket_name, [f"staged/{'a' * 32}"])
    s3.client.create_multipart_upload(Bucket=bucket_name, Key="blobs/1/1.blob")  # in 2010, says the server
    keys = s3.keys(bucket_name)
    collect = collector(retention=retention, max_delete_percent=0).collect
    assert collect(Base(LIVE)) == 0
    assert set(s3.keys(bucket_name)) - set(keys) == ({"gc-marks.jsonl"} if retention else set())
    assert deletions(s3) == []
    assert (value(metrics.gc_failures), value(metrics.gc_deleted)) == (0, 0)
    assert found(metrics)[0] == {"live": 1, "retained" if retention else "dead": 2}
    (line,) = infos(caplog)
    assert "1 live and 2 dead blobs" in line and "gc-max-delete-percent is 0" in line


def test_with_a_largest_share_of_0_not_one_live_blob_is_no_error(s3, bucket_name, put, collector):
    keys = put((p64(1), p64(1)))
    assert collector(max_delete_percent=0).collect(Base()) == 0
    assert s3.keys(bucket_name) == keys


@pytest.mark.parametrize("dead", [1, 101])
@pytest.mark.parametrize("retention", [0, 30 * 86400])
def test_where_not_one_blob_is_live_none_is_deleted(
    s3, bucket_name, put, collector, after, dead, retention, metrics, caplog
):
    newer = (p64(1), p64(101))
    keys = put(newer, *((p64(number), p64(1)) for number in range(dead)))
    s3.put(bucket_name, ["blobs/README"])
    base = Base(objects=[p64(0)])
    if retention:
        collector(retention=retention).collect(base)  # as long as none is due, there is nothing to refuse
        after(retention)
    assert collector(retention=retention).collect(base) == 0
    (message,) = [text for text in caplog.messages if text.startswith(f"{dead} of {dead + 1} blobs in bucket")]
    for words in "not one is live", "right Data.fs", "disk mounted", "delete the objects below blobs/ at the service":
        assert words in message
    assert set(keys) < set(s3.keys(bucket_name))
    assert deletions(s3) == []
    assert (value(metrics.gc_failures), value(metrics.gc_deleted)) == (0, 0)


def test_what_a_pack_would_say_a_dry_run_tells_in_the_same_words(bucket, put, collector, caplog):
    put((p64(1), p64(1)), (p64(2), p64(1)))
    base = MappingStorage()
    for percent in 50, 100:
        assert dry_run(base, bucket).refusal(percent) is None  # without a transaction it owns none
    transaction = TransactionMetaData()
    base.tpc_begin(transaction)
    base.store(p64(9), z64, b"a record", "", transaction)
    base.tpc_vote(transaction)
    base.tpc_finish(transaction)
    with adapter_for(base).revisions() as revisions:
        assert collector().collect(revisions) == 0
    assert dry_run(base, bucket).refusal(100) in caplog.messages
    assert "gc-max-delete-percent is 0" in dry_run(base, bucket).refusal(0)


def dry_run(base, bucket):
    """Returns the scan, which is over."""
    scan = scan_beside_a_server(base, bucket, 0)
    list(scan.run())
    return scan


# One at a time


def test_a_second_collection_meanwhile_is_refused_and_the_first_one_goes_on(s3, bucket_name, put, collector, metrics):
    put((p64(1), p64(1)), LIVE)
    collect = collector().collect
    s3.misbehave(operation="ListObjects", hang=True)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(collect, Base(LIVE))
        s3.wait_for("ListObjects")
        with pytest.raises(CollectionRefused, match="another pack"):
            collect(Base(LIVE))
        s3.behave()
        assert first.result() == 1
    assert (value(metrics.gc_runs), value(metrics.gc_failures)) == (1, 0)
    assert collect(Base(LIVE)) == 0


# What is not the blobs'


def test_keys_beside_and_below_the_prefix_that_are_not_ours_are_left_alone(s3, bucket_name, collector, metrics):
    foreign = [
        "blobs/1/1.blob",
        "gc-marks.jsonl",
        "site/a-blobs/1/1.blob",
        "site/a/blobs",
        "site/a/blobs.txt",
        "site/a/blobs/",
        "site/a/blobs/1/",
        "site/a/blobs/1/1.BLOB",
        "site/a/blobs/1/1.blob/1",
        "site/a/blobs/blobs/1/1.blob",
        "site/a/blobs/1F/1.blob",
        "site/a/blobs/00/1.blob",
        "site/a/blobs/11111111111111111/1.blob",
        "site/a/report.pdf",
        "site/a/staged/ours-not",
        "site/b/blobs/1/1.blob",
    ]
    live = "site/a/blobs/fff/1.blob"
    s3.put(bucket_name, [*foreign, "site/a/blobs/1/1.blob", live])
    assert collector(s3_prefix="site/a").collect(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == sorted([*foreign, live])
    below = [key for key in foreign if key.startswith("site/a/blobs/")]
    assert found(metrics) == ({"dead": 1, "live": 1, "unknown": len(below)},) * 2


# Leftovers


def uploads_answer(*uploads):
    """What a service answers that has these uploads: key, id, and when each was begun."""
    inside = "".join(
        f"<Upload><Key>{key}</Key><UploadId>{name}</UploadId><Initiated>{begun.isoformat()}</Initiated></Upload>"
        for key, name, begun in uploads
    )
    return {"status": 200, "body": f"<ListMultipartUploadsResult>{inside}</ListMultipartUploadsResult>"}


@pytest.fixture
def begin_upload(s3, bucket_name):
    """Begins an upload in parts; the server says of each that it was begun in 2010."""

    def begin_upload(key):
        upload = s3.client.create_multipart_upload(Bucket=bucket_name, Key=key)["UploadId"]
        s3.client.upload_part(Bucket=bucket_name, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
        return upload

    return begin_upload


@pytest.fixture
def uploads(s3, bucket_name):
    """The keys of the uploads that are not completed."""
    return lambda: sorted(
        found["Key"] for found in s3.client.list_multipart_uploads(Bucket=bucket_name).get("Uploads", ())
    )


def test_old_unfinished_uploads_of_ours_are_aborted(begin_upload, uploads, collect_garbage):
    ours = ["blobs/1/1.blob", f"staged/{'a' * 32}"]
    foreign = ["blobs/README", "other/blobs/1/1.blob", "staged/b", "video.mp4"]
    for key in [*ours, *foreign, *ours]:
        begin_upload(key)
    assert uploads() == sorted([*ours, *foreign, *ours])
    collect_garbage(Base())
    assert uploads() == sorted(foreign)


def test_an_unfinished_upload_is_kept_for_a_day(s3, collect_garbage):
    """That of a large blob which is on its way now, above all."""
    now = time.time()
    young, old = (datetime.fromtimestamp(now - age, timezone.utc) for age in (86400 - 600, 86400 + 600))
    s3.misbehave(
        operation="ListMultipartUploads",
        **uploads_answer(("blobs/1/1.blob", "young", young), ("blobs/2/1.blob", "old", old)),
    )
    collect_garbage(Base())
    assert [request.path.rpartition("/blobs/")[2] for request in s3.requests("AbortMultipartUpload")] == ["2/1.blob"]


def test_an_upload_that_is_over_when_it_is_to_be_aborted_is_no_error(s3, put, caplog, collect_garbage):
    put((p64(1), p64(1)), LIVE)
    old = datetime(2010, 1, 1, tzinfo=timezone.utc)
    s3.misbehave(operation="ListMultipartUploads", **uploads_answer(("blobs/1/1.blob", "no-such-upload", old)))
    assert collect_garbage(Base(LIVE)) == 1
    assert [request.status for request in s3.requests("AbortMultipartUpload")] == [404]
    assert warnings(caplog) == []


@pytest.mark.parametrize("operation", ["ListMultipartUploads", "AbortMultipartUpload"])
@pytest.mark.parametrize("fault", [{"status": 501, "code": "NotImplemented"}, {"status": 403, "code": "AccessDenied"}])
def test_where_uploads_cannot_be_listed_or_aborted_the_rest_is_done_and_one_warning_tells(
    s3, bucket_name, put, begin_upload, collector, caplog, operation, fault, metrics
):
    """Either takes a permission of its own, which a pack has done without until now."""
    live, _ = put(LIVE, (p64(1), p64(1)))
    for _ in range(2):
        begin_upload("blobs/1/1.blob")
    s3.misbehave(operation=operation, **fault)
    assert collector().collect(Base(LIVE)) == 1
    assert s3.keys(bucket_name) == [live]
    assert value(metrics.gc_failures) == 0
    (warning,) = warnings(caplog)
    assert "Unfinished uploads of crashed servers stay behind" in warning and fault["code"] in warning


def test_when_staged_objects_cannot_be_deleted_the_collection_says_so(
    s3, bucket_name, put, collector, monkeypatch, metrics
):
    live, _ = put(LIVE, (p64(1), p64(1)))
    s3.put(bucket_name, [f"staged/{'a' * 32}", f"staged/{'b' * 32}"])
    later = SimpleNamespace(time=lambda: time.time() + 2 * 86400, monotonic=time.monotonic)
    monkeypatch.setattr("zodb_s3blobs.garbage.leftovers.time", later)
    s3.misbehave(operation="DeleteObjects", status=500, code="InternalError")
    with pytest.raises(BucketError, match="InternalError"):
        collector().collect(Base(LIVE))
    assert value(metrics.gc_failures) == 1
    assert value(metrics.gc_deleted) == 1  # the dead blob
    s3.behave()
    collector().collect(Base(LIVE))
    assert s3.keys(bucket_name) == [live]


# Real databases


FILESTORAGE = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"


@pytest.fixture
def open_db(s3, bucket_name, tmp_path):
    """Opens a database with an empty cache; a second call, after close, opens the same one."""
    opened = []

    def open_db(base=FILESTORAGE, before="", after="", **options):
        more = "\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
        storage = ZODB.config.storageFromString(f"""
            %import zodb_s3blobs
            %import zc.zlibstorage
            {before}
            <s3blobstorage>
              bucket-name {bucket_name}
              s3-endpoint-url {s3.url}
              s3-access-key key
              s3-secret-key secret
              s3-prefix main
              cache-dir {tmp_path}/cache{len(opened)}
              {more}
              {base.format(dir=tmp_path)}
            </s3blobstorage>
            {after}
            """)
        opened.append(ZODB.DB(storage))
        return opened[-1]

    yield open_db
    for db in opened:
        db.close()


@pytest.fixture
def blobs(s3, bucket_name):
    """The (oid, tid) of the blobs in the bucket."""

    def blobs():
        names = [key[len("main/blobs/") : -len(".blob")] for key in s3.keys(bucket_name) if "/blobs/" in key]
        return {tuple(p64(int(number, 16)) for number in name.split("/")) for name in names}

    return blobs


@pytest.fixture
def adopt(s3, bucket_name):
    """Lets the next database that is opened have the prefix at once, whatever had it before."""
    return lambda: s3.client.delete_object(Bucket=bucket_name, Key="main/owner.json")


@pytest.fixture
def after(monkeypatch):
    """Lets so many seconds pass, as far as garbage collections can tell."""

    def after(seconds):
        clock = SimpleNamespace(
            time=lambda: time.time() + seconds,
            monotonic=time.monotonic,
            thread_time=time.thread_time,
            process_time=time.process_time,
            sleep=time.sleep,
        )
        monkeypatch.setattr(scan_module, "time", clock)

    return after


def write(db, name, data):
    """Commits ``data`` as the blob ``name`` of the root; returns its oid and tid."""
    with db.transaction() as connection:
        blob = connection.root().setdefault(name, Blob())
        with blob.open("w") as file:
            file.write(data)
    with db.transaction() as connection:
        blob = connection.root()[name]
        blob._p_activate()
        return blob._p_oid, blob._p_serial


def remove(db, name):
    with db.transaction() as connection:
        del connection.root()[name]


def read(db, name):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


BASES = {
    "FileStorage": {},
    "FileStorage without GC": {"base": "<filestorage>\n path {dir}/Data.fs\n pack-gc false\n</filestorage>"},
    "MappingStorage": {"base": "<mappingstorage/>"},
    "DemoStorage": {"base": "<demostorage/>"},
    "zlib inside": {"base": f"<zlibstorage>\n{FILESTORAGE}\n</zlibstorage>"},
    "zlib outside": {"before": "<zlibstorage>", "after": "</zlibstorage>"},
}


@pytest.mark.parametrize("base", BASES)
def test_a_pack_leaves_exactly_what_every_base_still_knows(s3, bucket_name, open_db, blobs, base):
    db = open_db(**BASES[base])
    untouched = write(db, "untouched", b"0")
    revisions = [write(db, "blob", data) for data in (b"one", b"two")]
    early = write(db, "removed early", b"1")
    remove(db, "removed early")
    time.sleep(0.01)
    pack_time = time.time()
    time.sleep(0.01)
    late = write(db, "removed late", b"2")
    revisions += [write(db, "blob", data) for data in (b"three", b"four")]
    remove(db, "removed late")
    assert blobs() == {untouched, early, late, *revisions}
    # It does not look for what nothing refers to.
    kept = {early} if base == "FileStorage without GC" else set()
    db.pack(pack_time)
    assert blobs() == {untouched, late, *revisions[1:]} | kept
    for oid, tid in blobs():
        db.storage.loadBlob(oid, tid)
    time.sleep(0.01)
    db.pack()
    if kept:
        kept.add(late)
    assert blobs() == {untouched, revisions[-1]} | kept
    assert (read(db, "blob"), read(db, "untouched")) == (b"four", b"0")


def test_after_an_external_gc_exactly_what_it_deleted_goes(open_db, blobs):
    db = open_db(**BASES["FileStorage without GC"])
    kept, gone, also_gone = (write(db, name, name.encode()) for name in ("kept", "gone", "also gone"))
    unreachable = write(db, "unreachable", b"but not deleted")
    for name in "gone", "also gone", "unreachable":
        remove(db, name)
    db.pack()
    assert blobs() == {kept, gone, also_gone, unreachable}
    transaction = TransactionMetaData()
    db.storage.tpc_begin(transaction)
    for oid, serial in (gone, also_gone):
        db.storage.deleteObject(oid, serial, transaction)
    db.storage.tpc_vote(transaction)
    db.storage.tpc_finish(transaction)
    db.pack()
    assert blobs() == {kept, unreachable}


def test_a_demo_storage_keeps_the_blobs_of_its_base(open_db, blobs, adopt):
    db = open_db()
    base = [write(db, "blob", b"old"), write(db, "blob", b"base"), write(db, "kept", b"kept")]
    db.close()
    adopt()
    db = open_db("""
        <demostorage>
          <filestorage base>
            path {dir}/Data.fs
            read-only true
          </filestorage>
          <filestorage changes>
            path {dir}/Changes.fs
          </filestorage>
        </demostorage>""")
    new = [write(db, "blob", b"changed"), write(db, "blob", b"changed again")]
    assert blobs() == {*base, *new}
    # As far as ZODB can: DemoStorage.pack fails with changes that were given to it, and with a base that has objects.
    db.storage.changes.pack(time.time(), db.references, gc=False)
    assert db.storage.collect_garbage() == 1
    assert blobs() == {*base, new[1]}
    assert (read(db, "blob"), read(db, "kept")) == (b"changed again", b"kept")


@pytest.mark.parametrize("blobs_before", [1, 101])
def test_an_empty_database_on_the_prefix_of_another_deletes_nothing(
    s3, bucket_name, open_db, blobs, blobs_before, caplog
):
    s3.put(bucket_name, [f"main/blobs/{number:x}/3d0c0b0a0908070.blob" for number in range(2, 2 + blobs_before)])
    db = open_db(gc_max_delete_percent=100)  # with a root object, and so a last transaction
    db.pack()
    assert f"{blobs_before} of {blobs_before} blobs" in caplog.text and "not one is live" in caplog.text
    assert len(blobs()) == blobs_before


@pytest.mark.parametrize("blobs_before", [100, 101])
def test_a_small_database_on_the_prefix_of_another_deletes_no_more_than_the_valve_lets_through(
    s3, bucket_name, open_db, blobs, blobs_before
):
    s3.put(bucket_name, [f"main/blobs/{number:x}/3d0c0b0a0908070.blob" for number in range(9, 9 + blobs_before)])
    db = open_db()
    live = write(db, "blob", b"its own")
    if blobs_before == 100:
        db.pack()
        assert blobs() == {live}
    else:
        with pytest.raises(StorageError, match=r"was packed.* 101 of 102 blobs .*gc-max-delete-percent"):
            db.pack()
        assert len(blobs()) == blobs_before + 1


def test_the_first_pack_after_many_changes_is_not_refused(open_db, blobs):
    db = open_db(gc_max_delete_percent=1)
    last = [write(db, "blob", b"%d" % number) for number in range(102)][-1]
    db.pack()
    assert blobs() == {last}


def test_a_database_restored_from_a_backup_younger_than_the_retention_finds_all_its_blobs(
    open_db, blobs, tmp_path, after, adopt
):
    db = open_db(gc_retention="30d", gc_max_delete_percent=100)
    kept, changed, removed = (write(db, name, name.encode()) for name in ("kept", "changed", "removed"))
    shutil.copy(tmp_path / "Data.fs", tmp_path / "backup")
    changed_since = write(db, "changed", b"since")
    new = write(db, "new", b"new")
    remove(db, "removed")
    for days in 0, 10, 20, 29:
        after(days * 86400)
        db.pack()
        assert blobs() == {kept, changed, removed, changed_since, new}
    db.close()

    shutil.copy(tmp_path / "backup", tmp_path / "Data.fs")
    (tmp_path / "Data.fs.index").unlink()
    adopt()
    db = open_db(gc_retention="30d", gc_max_delete_percent=100)
    names = "kept", "changed", "removed"
    assert [read(db, name) for name in names] == [name.encode() for name in names]
    after(29 * 86400)
    db.pack()
    assert blobs() == {kept, changed, removed, changed_since, new}
    after(31 * 86400)  # what lives again has lost its mark, and what the backup does not know has just got one
    write(db, "kept", b"still there")
    db.pack()
    assert {kept, changed, removed, changed_since, new} < blobs()
    after(62 * 86400)
    db.pack()
    assert not {kept, changed_since, new} & blobs()
    assert [read(db, name) for name in names] == [b"still there", b"changed", b"removed"]


def test_without_retention_blobs_newer_than_a_restored_database_stay_and_are_warned_of(
    open_db, blobs, tmp_path, caplog, adopt
):
    db = open_db()
    kept, changed = (write(db, name, name.encode()) for name in ("kept", "changed"))
    shutil.copy(tmp_path / "Data.fs", tmp_path / "backup")
    newer = write(db, "changed", b"since"), write(db, "new", b"new")
    shutil.copy(tmp_path / "Data.fs", tmp_path / "later")
    db.close()

    shutil.copy(tmp_path / "backup", tmp_path / "Data.fs")
    (tmp_path / "Data.fs.index").unlink()
    adopt()
    db = open_db()
    caplog.clear()
    db.pack()
    assert blobs() == {kept, changed, *newer}
    assert [read(db, name) for name in ("kept", "changed")] == [b"kept", b"changed"]
    (warning,) = [warning for warning in warnings(caplog) if "newer" in warning]
    assert "2 blobs" in warning
    db.close()

    # It was the wrong backup: with the right one everything is there.
    shutil.copy(tmp_path / "later", tmp_path / "Data.fs")
    db = open_db()
    assert [read(db, name) for name in ("kept", "changed", "new")] == [b"kept", b"since", b"new"]


@pytest.mark.parametrize(
    ("operation", "retention"),
    [("ListObjects", "0"), ("DeleteObjects", "0"), ("OwnerGetObject", "0"), ("PutObject", "30d")],
)
def test_the_pack_stands_whatever_fails_after_it_and_the_next_one_goes_on(
    s3, open_db, blobs, after, tmp_path, operation, retention
):
    db = open_db(gc_retention=retention, s3_max_attempts=1)
    last = [write(db, "blob", data) for data in (b"one", b"two", b"three")][-1]
    if retention != "0":
        db.pack()
        write(db, "another", b"so that there is something to pack")
        after(MONTH)
    everything, size = blobs(), os.path.getsize(tmp_path / "Data.fs")
    s3.misbehave(operation=operation, status=403, code="AccessDenied")
    with pytest.raises(StorageError, match=r"The database was packed, but .*AccessDenied") as caught:
        db.pack()
    assert type(caught.value) is StorageError  # what a ZEO client can decode
    assert blobs() == everything
    assert retention != "0" or os.path.getsize(tmp_path / "Data.fs") < size
    assert read(db, "blob") == b"three"
    s3.behave()
    db.pack()
    assert blobs() == {last} | ({name for name in everything if name[0] != last[0]})
    assert read(db, "blob") == b"three"


@pytest.mark.parametrize("operation", ["OwnerGetObject", "GetObject"])
def test_the_database_is_not_packed_before_its_marks_are_seen_to(s3, open_db, blobs, after, tmp_path, operation):
    """They would be older than they should, and after a restart nobody would know."""
    db = open_db(gc_retention="30d", s3_max_attempts=1)
    for data in b"one", b"two", b"three":
        last = write(db, "blob", data)
    db.pack()
    write(db, "blob", b"four")
    after(MONTH)
    size = os.path.getsize(tmp_path / "Data.fs")
    s3.misbehave(operation=operation, status=403, code="AccessDenied")
    with pytest.raises(StorageError, match=r"AccessDenied") as caught:
        db.pack()
    assert type(caught.value) is StorageError  # what a ZEO client can decode
    assert os.path.getsize(tmp_path / "Data.fs") == size
    s3.behave()
    db.pack()
    assert os.path.getsize(tmp_path / "Data.fs") < size
    assert last in blobs() and len(blobs()) == 2  # the third one has just died, the first two were due
    assert read(db, "blob") == b"four"


def test_the_last_blob_of_a_database_goes_with_the_pack_that_kills_it(put, collector, s3, bucket_name):
    put((p64(1), p64(1)), (p64(2), p64(1)))
    packing = collector()
    packing.before_pack(Base((p64(2), p64(1))))  # it is known to be the right database
    assert packing.collect(Base()) == 2
    put((p64(3), p64(1)))
    assert packing.collect(Base()) == 0  # without such a pack, nobody knows


def test_a_database_that_knows_no_blob_of_the_bucket_before_a_pack_either_deletes_none(put, collector):
    put((p64(1), p64(1)), (p64(2), p64(1)))
    packing = collector()
    packing.before_pack(Base())
    assert packing.collect(Base()) == 0
