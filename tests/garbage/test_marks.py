"""Retention: a dead blob is marked first, and deleted when it has been dead for gc-retention."""

import io
import json
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.fake_base import Base
from zodb_s3blobs.garbage import marks
from zodb_s3blobs.garbage import scan as scan_module
from zodb_s3blobs.garbage.collector import CollectionRefused
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.errors import BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

MARKS = "gc-marks.jsonl"
DAY = 24 * 3600
RETENTION = 30 * DAY
#: 2026-11-22T16:00:00+00:00
START = 1795363200

DEAD, OTHER, LIVE = (p64(0x1F), p64(0x40)), (p64(2), p64(1)), (p64(3), p64(1))
#: One that always lives, or nothing would be deleted, and its key.
KEPT, KEPT_KEY = (p64(0xFFFF), p64(1)), "blobs/ffff/1.blob"


def others(keys):
    """All of ``keys`` but that of the blob that always lives."""
    return [key for key in keys if key != KEPT_KEY]


@pytest.fixture(autouse=True)
def kept(s3, bucket_name):
    """The bucket has the blob that always lives."""
    s3.put(bucket_name, [KEPT_KEY])


@pytest.fixture
def clock(monkeypatch):
    """The clock of the collections, which stands still; ``now`` is to be set."""
    clock = SimpleNamespace(
        now=START,
        monotonic=time.monotonic,
        sleep=time.sleep,
        thread_time=time.thread_time,
        process_time=time.process_time,
    )
    clock.time = lambda: clock.now
    monkeypatch.setattr(scan_module, "time", clock)
    return clock


@pytest.fixture
def collect(clock, collector):
    """Collects the garbage of a base, each time as a server that has just been started; keywords as `collector`'s."""

    def collect(base, retention=RETENTION, **changes):
        return collector(retention=retention, **changes).collect(base)

    return collect


@pytest.fixture
def read_object(s3, bucket_name):
    """The object of the marks as it is, by key of the blob: since when it is dead, in seconds since 1970."""

    def read_object():
        body = s3.client.get_object(Bucket=bucket_name, Key=MARKS)["Body"].read()
        read = map(json.loads, body.splitlines())
        return {
            f"blobs/{mark['oid']}/{mark['tid']}.blob": datetime.fromisoformat(mark["dead_since"]).timestamp()
            for mark in read
        }

    return read_object


@pytest.fixture
def write_object(s3, bucket_name):
    def write_object(data):
        s3.client.put_object(Bucket=bucket_name, Key=MARKS, Body=data)

    return write_object


@pytest.fixture
def blobs(s3, bucket_name):
    """The keys of the blobs that are there."""
    return lambda: [key for key in others(s3.keys(bucket_name)) if key.startswith("blobs/")]


def value(instrument):
    (sample,) = [sample for sample in instrument._samples() if sample.name != "_created"]
    return sample.value


def deletions(s3):
    return [request.path for request in s3.requests() if request.operation.startswith("Delete")]


# The object


def test_marks_are_read_as_they_were_written():
    file = io.StringIO()
    written = {p64(oid) + p64(tid): START + tid % 7 for oid, tid in [(0, 0), (1, 2), (2**64 - 1, 2**63)]}
    for name, since in written.items():
        marks.write(file, name[:8], name[8:], since)
    assert marks.read(io.StringIO(file.getvalue())) == written


def test_a_mark_is_a_line_of_readable_json():
    file = io.StringIO()
    marks.write(file, p64(0x1F), p64(0x40D30C28A82B566), START)
    assert file.getvalue() == '{"oid": "1f", "tid": "40d30c28a82b566", "dead_since": "2026-11-22T16:00:00+00:00"}\n'


def test_other_ways_to_write_the_same_moment_are_read():
    line = '{"dead_since": "2026-11-22T17:00:00.500000+01:00", "note": "by hand", "tid": "01", "oid": "A"}'
    assert marks.read([line]) == {p64(10) + p64(1): START}


def test_no_lines_are_no_marks():
    assert marks.read([]) == {}


GOOD = b'{"oid": "1f", "tid": "40", "dead_since": "2020-01-01T00:00:00+00:00"}\n'
UNREADABLE = {
    "half a line": GOOD[:30],
    "an empty line": b"\n",
    "no JSON": b"<html>\n",
    "not an object": b"[1]\n",
    "no moment": b'{"oid": "1f", "tid": "40"}\n',
    "a moment that is none": GOOD.replace(b"2020-01-01", b"yesterday-"),
    "a moment that is a number": b'{"oid": "1f", "tid": "40", "dead_since": 1795363200}\n',
    "a moment that is a list": b'{"oid": "1f", "tid": "40", "dead_since": []}\n',
    "an oid that is no number": GOOD.replace(b"1f", b"xx"),
    "an oid that is negative": GOOD.replace(b"1f", b"-1"),
    "an oid that is too large": GOOD.replace(b"1f", b"1" * 17),
    "an oid that is not ASCII": GOOD.replace(b"1f", "1ü".encode()),
    "bytes that are no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE)
def test_marks_that_cannot_be_read_delete_nothing_and_the_error_says_what_to_do(
    bucket_name, put, blobs, collect, write_object, s3, line
):
    keys = put(DEAD)
    write_object(GOOD + line)
    before = s3.client.get_object(Bucket=bucket_name, Key=MARKS)["Body"].read()
    with pytest.raises(BucketError, match=r"line 2.*delete it") as caught:
        collect(Base(KEPT))
    assert MARKS in str(caught.value) and bucket_name in str(caught.value)
    assert blobs() == keys
    assert s3.client.get_object(Bucket=bucket_name, Key=MARKS)["Body"].read() == before
    s3.client.delete_object(Bucket=bucket_name, Key=MARKS)  # as it says
    assert collect(Base(KEPT)) == 0
    assert blobs() == keys


def test_marks_that_are_damaged_on_their_way_are_asked_for_again(s3, put, clock, collect, read_object):
    (key,) = put(DEAD)
    collect(Base(KEPT))
    clock.now += DAY
    s3.misbehave(operation="GetObject", flip=True, times=1)
    assert collect(Base(KEPT)) == 0
    assert read_object() == {key: START}


# Retention


def test_a_dead_blob_is_only_marked_and_goes_when_the_retention_is_over(
    s3, metrics, put, blobs, clock, collect, read_object
):
    key, live = put(DEAD, LIVE)
    base = Base(KEPT, LIVE)
    assert collect(base) == 0
    assert read_object() == {key: START}
    assert value(metrics.gc_objects.labels("retained")) == 1
    for now in START + 1, START + RETENTION - 1:
        clock.now = now
        assert collect(base) == 0
    assert sorted(blobs()) == sorted([key, live])
    assert read_object() == {key: START}
    assert deletions(s3) == []
    clock.now = START + RETENTION
    assert collect(base) == 1
    assert blobs() == [live]
    assert value(metrics.gc_objects.labels("retained")) == 0
    assert value(metrics.gc_objects.labels("dead")) == 1


def test_each_blob_has_a_time_of_its_own(put, blobs, clock, collect, read_object):
    first, second = put(DEAD, OTHER)
    collect(Base(KEPT, OTHER))
    clock.now = START + 10 * DAY
    collect(Base(KEPT))
    assert read_object() == {first: START, second: START + 10 * DAY}
    clock.now = START + RETENTION
    assert collect(Base(KEPT)) == 1
    assert blobs() == [second]
    clock.now = START + 10 * DAY + RETENTION
    assert collect(Base(KEPT)) == 1
    assert blobs() == []


def test_the_mark_of_a_deleted_blob_is_gone_after_the_next_collection(put, clock, collect, read_object):
    put(DEAD)
    collect(Base(KEPT))
    clock.now = START + RETENTION
    collect(Base(KEPT))
    for _ in range(2):  # an object without a line is read, too
        collect(Base(KEPT))
        assert read_object() == {}


def test_a_blob_that_lives_again_loses_its_mark(put, blobs, clock, collect, read_object):
    """As after a Data.fs has been restored from a backup."""
    (key,) = put(DEAD)
    collect(Base(KEPT))
    clock.now = START + 10 * DAY
    collect(Base(KEPT, DEAD))
    assert read_object() == {}
    clock.now = START + 20 * DAY
    collect(Base(KEPT))
    assert read_object() == {key: START + 20 * DAY}
    clock.now = START + RETENTION
    assert collect(Base(KEPT)) == 0
    assert blobs() == [key]


def test_a_blob_that_is_newer_than_a_restored_database_loses_its_mark(put, blobs, clock, collect, read_object):
    (key,) = put(DEAD)
    collect(Base(KEPT))
    clock.now = START + RETENTION
    assert collect(Base(KEPT, last=0x3F)) == 0
    assert read_object() == {}
    assert collect(Base(KEPT)) == 0
    assert read_object() == {key: START + RETENTION}
    assert blobs() == [key]


def test_a_mark_of_the_future_counts_from_now_on(put, blobs, clock, collect, read_object):
    """The clock was ahead by years when the blob was found dead."""
    (key,) = put(DEAD)
    clock.now = START + 3650 * DAY
    collect(Base(KEPT))
    clock.now = START
    assert collect(Base(KEPT)) == 0
    assert read_object() == {key: START}
    clock.now = START + RETENTION - 1
    assert collect(Base(KEPT)) == 0
    clock.now = START + RETENTION
    assert collect(Base(KEPT)) == 1
    assert blobs() == []


def test_another_retention_holds_for_those_that_are_marked_already(put, blobs, clock, collect):
    (key,) = put(DEAD)
    collect(Base(KEPT), retention=RETENTION)
    clock.now = START + 2 * DAY
    assert collect(Base(KEPT), retention=3 * DAY) == 0
    assert blobs() == [key]
    assert collect(Base(KEPT), retention=2 * DAY) == 1


def test_a_retention_of_0_deletes_dead_blobs_and_marks(s3, bucket_name, put, collect):
    put(DEAD)
    collect(Base(KEPT))
    assert MARKS in others(s3.keys(bucket_name))
    assert collect(Base(KEPT), retention=0) == 1
    assert others(s3.keys(bucket_name)) == []


def test_without_retention_marks_are_neither_read_nor_written(s3, put, collect):
    put(DEAD)
    collect(Base(KEPT), retention=0)
    assert [request.operation for request in s3.requests() if request.path.endswith(MARKS)] == ["DeleteObject"]


def test_where_nothing_is_dead_no_marks_are_written(s3, bucket_name, put, collect):
    keys = put(LIVE)
    collect(Base(KEPT, LIVE))
    assert others(s3.keys(bucket_name)) == keys
    assert s3.requests("PutObject") == []


def test_foreign_and_newer_keys_are_not_marked(s3, bucket_name, put, clock, collect, read_object):
    key, newer = put(DEAD, (p64(1), p64(101)))
    s3.put(bucket_name, ["blobs/1/01.blob", "blobs/readme"])
    for clock.now in START, START + RETENTION - 1:
        collect(Base(KEPT))
        assert read_object() == {key: START}
    clock.now = START + RETENTION
    assert collect(Base(KEPT)) == 1
    assert others(s3.keys(bucket_name)) == sorted(["blobs/1/01.blob", "blobs/readme", newer, MARKS])


# Failures


ONE_REFUSED = "<DeleteResult><Error><Key>blobs/1f/40.blob</Key><Code>SlowDown</Code></Error></DeleteResult>"


@pytest.mark.parametrize("fault", [{"status": 500, "code": "InternalError"}, {"status": 200, "body": ONE_REFUSED}])
def test_what_could_not_be_deleted_keeps_its_mark_and_need_not_wait_again(
    s3, metrics, put, blobs, clock, collect, read_object, fault
):
    """All of a request, or one object of it."""
    keys = put(DEAD, OTHER)
    collect(Base(KEPT))
    clock.now = START + RETENTION
    s3.misbehave(operation="DeleteObjects", **fault)
    with pytest.raises(BucketError, match="were not deleted"):
        collect(Base(KEPT))
    failed = 2 if "code" in fault else 1
    assert value(metrics.gc_failures) == 1
    assert (value(metrics.gc_delete_failures), value(metrics.gc_deleted)) == (failed, 2 - failed)
    assert read_object() == dict.fromkeys(keys, START)
    s3.behave()
    left = blobs()
    assert keys[0] in left
    assert collect(Base(KEPT)) == len(left)
    assert blobs() == []


def test_a_kill_between_the_marks_and_the_deletion_costs_no_time(monkeypatch, put, blobs, clock, collect, read_object):
    class Killed(BaseException):
        pass

    def kill(bucket, names):
        raise Killed

    key, live = put(DEAD, LIVE)
    collect(Base(KEPT, LIVE))
    clock.now = START + RETENTION
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Bucket, "delete", kill)
        collect(Base(KEPT, LIVE))
    assert read_object() == {key: START}
    assert sorted(blobs()) == sorted([key, live])
    assert collect(Base(KEPT, LIVE)) == 1
    assert blobs() == [live]


@pytest.mark.parametrize("operation", ["GetObject", "PutObject"])
def test_without_its_marks_a_collection_deletes_nothing_and_the_next_one_goes_on(
    s3, put, blobs, clock, collect, read_object, operation
):
    (key,) = put(DEAD)
    collect(Base(KEPT))
    clock.now = START + RETENTION
    s3.misbehave(operation=operation, status=403, code="AccessDenied")
    with pytest.raises(BucketError, match=rf"{MARKS}.*AccessDenied"):
        collect(Base(KEPT))
    assert blobs() == [key]
    s3.behave()
    assert read_object() == {key: START}
    assert collect(Base(KEPT)) == 1


# A full bucket


@pytest.fixture
def fill(s3):
    """Has the service take nothing any more."""

    def fill():
        for operation in "PutObject", "OwnerPutObject":
            s3.misbehave(operation=operation, status=403, code="QuotaExceeded")

    return fill


def test_in_a_full_bucket_what_is_due_goes_and_what_is_not_stays(put, blobs, clock, collect, fill):
    _, young, unmarked = put(DEAD, OTHER, LIVE)
    collect(Base(KEPT, OTHER, LIVE))
    clock.now = START + 10 * DAY
    collect(Base(KEPT, LIVE))
    clock.now = START + RETENTION
    fill()
    assert collect(Base(KEPT)) == 1
    assert sorted(blobs()) == sorted([young, unmarked])


def test_in_a_full_bucket_marks_are_written_once_there_is_room(s3, put, clock, collect, read_object):
    _, young = put(DEAD, OTHER)
    collect(Base(KEPT, OTHER))
    clock.now = START + RETENTION
    s3.misbehave(operation="PutObject", status=507, code="InsufficientStorage", times=1)
    assert collect(Base(KEPT)) == 1
    assert read_object()[young] == START + RETENTION


def test_in_a_full_bucket_a_blob_that_lives_again_does_not_keep_its_mark(
    s3, bucket_name, put, blobs, clock, collect, fill
):
    """As after a Data.fs has been restored from a backup."""
    _, again = put(DEAD, OTHER)
    collect(Base(KEPT))
    clock.now = START + RETENTION
    fill()
    assert collect(Base(KEPT, OTHER)) == 1
    assert MARKS not in others(s3.keys(bucket_name))
    assert collect(Base(KEPT)) == 0  # it has just died
    assert blobs() == [again]


def test_in_a_full_bucket_a_blob_that_a_pack_kills_again_does_not_keep_its_mark(
    s3, bucket_name, put, blobs, clock, collector, fill
):
    (again,) = put(DEAD)
    collector(retention=RETENTION).collect(Base(KEPT))
    clock.now = START + RETENTION
    fill()
    packing = collector(retention=RETENTION)
    packing.before_pack(Base(KEPT, DEAD))
    assert packing.collect(Base(KEPT)) == 0
    assert blobs() == [again]
    assert MARKS not in others(s3.keys(bucket_name))


def test_what_the_valve_holds_back_keeps_its_mark(put, blobs, clock, collect, read_object):
    keys = put(*((p64(oid), p64(1)) for oid in range(1, 102)))
    collect(Base(KEPT), max_delete_percent=0)  # retained ones are nothing that it would hold back
    clock.now = START + RETENTION
    with pytest.raises(CollectionRefused, match="101 of 102"):
        collect(Base(KEPT), max_delete_percent=99)
    assert sorted(blobs()) == sorted(keys)
    assert read_object() == dict.fromkeys(keys, START)
    assert collect(Base(KEPT)) == 101
