"""The owner lease: of all servers on one prefix, one may delete."""

import contextlib
import json
import logging
import os
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import formatdate

import pytest
import ZODB.config
from ZODB.blob import Blob
from ZODB.POSException import StorageError
from ZODB.utils import p64

from tests.support.fake_base import Base
from tests.support.fake_database import FakeDatabase
from tests.support.speed import slow_but
from tests.support.waiting import wait_for
from tests.support.zeo_server import FILESTORAGE, ZEOServer
from zodb_s3blobs import lease as lease_module
from zodb_s3blobs.garbage import collector as garbage
from zodb_s3blobs.garbage.collector import Collector
from zodb_s3blobs.identity import Identity
from zodb_s3blobs.inflight import InFlight
from zodb_s3blobs.lease import RENEW_EVERY, STALE_AFTER, Lease, NotOwner
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.errors import BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OWNER = "owner.json"
#: A blob that always lives, or nothing would be deleted, and its key.
KEPT, KEPT_KEY = (p64(0xFFFF), p64(1)), "blobs/ffff/1.blob"
#: Far above what anything takes that does not wait for S3.
SOON = 20


def others(keys):
    """All of ``keys`` but that of the blob that always lives."""
    return [key for key in keys if key != KEPT_KEY]


@pytest.fixture
def new_lease(open_bucket):
    """Makes a `Lease` as a server with a database of its own has it. All of them have the transaction 1."""
    leases = []

    def new_lease(identity=None, bucket=None, tids=(1,)):
        database = FakeDatabase(identity or f"database {len(leases)}", tids)
        leases.append(Lease(bucket or open_bucket(), database, Metrics(), f"storage {len(leases)}"))
        return leases[-1]

    yield new_lease
    for lease in leases:
        lease.close()


@pytest.fixture
def owner(s3, bucket_name):
    """What the owner's object says."""
    return lambda: json.loads(s3.client.get_object(Bucket=bucket_name, Key=OWNER)["Body"].read())


@pytest.fixture
def write_owner(s3, bucket_name):
    """Writes the owner's object; that of another server, if nothing is given."""
    another = dict.fromkeys(("owner", "host", "database", "storage", "started", "renewed"), "another")

    def write_owner(data=None, **said):
        body = json.dumps({"format": 2, "last": "1", **another, **said}).encode() if data is None else data
        s3.client.put_object(Bucket=bucket_name, Key=OWNER, Body=body)

    return write_owner


@pytest.fixture
def pass_at_s3(s3):
    """Moves the clock of the service, and no other."""

    def pass_at_s3(seconds):
        s3.misbehave(operation="OwnerGetObject", headers={"Date": formatdate(time.time() + seconds, usegmt=True)})

    return pass_at_s3


@pytest.fixture
def clocks(monkeypatch):
    """The clocks of this machine, to be moved."""
    clocks = types.SimpleNamespace(wall=0, monotonic=0)
    now = time.time(), time.monotonic()
    moved = types.SimpleNamespace(time=lambda: now[0] + clocks.wall, monotonic=lambda: now[1] + clocks.monotonic)
    monkeypatch.setattr(lease_module, "time", moved)
    monkeypatch.setattr(lease_module, "_now", lambda: str(moved.time()))
    return clocks


@pytest.fixture
def hurried(monkeypatch):
    """A lease is renewed, and looked for, all the time."""
    monkeypatch.setattr(lease_module, "RENEW_EVERY", 0.02)
    monkeypatch.setattr(lease_module, "_RETRY_INTERVAL", 0.02)


def holds(lease):
    """Whether it does, says S3."""
    try:
        lease.renew_now()
    except NotOwner:
        assert not lease.is_held()
        return False
    assert lease.is_held()
    return True


def conflict(lease):
    return lease._metrics.bucket_owner_conflict._value.get()


# What it says


def test_who_finds_nobody_takes_it(s3, new_lease):
    lease = new_lease()
    assert not lease.is_held()
    with pytest.raises(NotOwner):
        lease.require()
    lease.renew_now()
    assert lease.is_held()
    lease.require()
    assert conflict(lease) == 0
    assert len(s3.requests("OwnerPutObject")) == 1


def test_everybody_can_read_whose_it_is(new_lease, owner, monkeypatch):
    times = iter([f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 10)])
    monkeypatch.setattr(lease_module, "_now", lambda: next(times))
    lease = new_lease("a database", tids=[1, 0x40D30C28A82B566])
    lease.renew_now()
    first = owner()
    assert first.keys() == lease_module.Claim.__annotations__.keys()
    assert first["format"] == 2
    assert first["database"] == "a database"
    assert first["last"] == "40d30c28a82b566"
    assert first["storage"] == "storage 0"
    assert os.uname().nodename in first["host"]
    assert first["started"] == "2026-01-01T00:00:00+00:00"
    lease.renew_now()
    second = owner()
    assert second.pop("renewed") > first.pop("renewed") > first["started"]
    assert second == first


def test_it_tells_the_times_in_utc_and_no_secret(new_lease, owner):
    before = datetime.now().astimezone()
    new_lease().renew_now()
    for name in ("started", "renewed"):
        told = datetime.fromisoformat(owner()[name])
        assert told.utcoffset().total_seconds() == 0
        assert abs((told - before).total_seconds()) < 60
    assert "test-secret" not in json.dumps(owner())  # of the fixture `settings`
    assert "test" not in owner().values()


def test_two_servers_have_two_names(new_lease, owner):
    new_lease("a database").renew_now()
    first = owner()["owner"]
    new_lease("a database").renew_now()
    assert owner()["owner"] != first


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({"s3_sse": "AES256"}, "x-amz-server-side-encryption"),
        ({"s3_sse": "aws:kms", "s3_sse_kms_key_id": "a-key"}, "x-amz-server-side-encryption-aws-kms-key-id"),
        ({"s3_sse_customer_key": b"k" * 32}, "x-amz-server-side-encryption-customer-key"),
    ],
)
def test_it_is_encrypted_as_blobs_are_but_not_of_their_storage_class(s3, new_lease, open_bucket, options, header):
    lease = new_lease(bucket=open_bucket(s3_storage_class="GLACIER_IR", **options))
    lease.renew_now()
    lease.renew_now()
    puts = s3.requests("OwnerPutObject")
    assert len(puts) == 2
    for put in puts:
        assert header in put.headers
        assert "x-amz-storage-class" not in put.headers
    if "customer" in header:
        assert all(header in get.headers for get in s3.requests("OwnerGetObject"))


# Keeping it


def test_it_is_renewed_again_and_again(s3, new_lease, hurried):
    lease = new_lease()
    lease.start()
    s3.wait_for("OwnerPutObject", 4)
    assert lease.is_held()


def test_a_renewal_that_failed_is_tried_again_soon(s3, new_lease, hurried, monkeypatch):
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    s3.misbehave(operation="OwnerGetObject", times=1, hang=True, status=403, code="AccessDenied")
    wait_for(lambda: None in [get.status for get in s3.requests("OwnerGetObject")])
    monkeypatch.setattr(lease_module, "RENEW_EVERY", 3600)
    s3.forget()
    s3.behave()
    s3.wait_for("OwnerPutObject")


def test_its_owner_renews_it_however_old_it_is(new_lease, pass_at_s3):
    lease = new_lease()
    lease.renew_now()
    pass_at_s3(10 * STALE_AFTER)
    assert holds(lease)


def test_a_write_whose_answer_is_lost_counts(s3, new_lease):
    s3.misbehave(operation="OwnerPutObject", times=1, lose=True)
    assert holds(new_lease())
    assert [put.status for put in s3.requests("OwnerPutObject")] == [200, 412]


def test_a_renewal_that_the_service_did_not_take_is_none(s3, new_lease, clocks):
    """At the service the lease grows old, whatever its owner believes."""
    lease = new_lease()
    lease.renew_now()
    s3.misbehave(operation="OwnerPutObject", status=412, code="PreconditionFailed")
    clocks.wall = clocks.monotonic = RENEW_EVERY
    with contextlib.suppress(BucketError):
        lease.renew_now()
    assert lease.is_held()  # still, by the last one
    clocks.wall = clocks.monotonic = 601
    assert not lease.is_held()


def test_a_service_that_never_finds_the_object_as_it_is_takes_a_renewal_all_the_same(s3, new_lease, clocks):
    """As Ceph 16, which stumbles over the quotes of the ETag."""
    s3.misbehave(operation="OwnerPutObject", misread_etag=True)
    lease = new_lease()
    lease.renew_now()
    clocks.wall = clocks.monotonic = RENEW_EVERY
    lease.renew_now()
    clocks.wall = clocks.monotonic = 601
    assert lease.is_held()


@pytest.mark.parametrize("moved", ["wall", "monotonic"])
def test_it_is_trusted_for_ten_minutes_by_either_clock(new_lease, clocks, moved):
    lease = new_lease()
    lease.renew_now()
    setattr(clocks, moved, 599)
    assert lease.is_held()
    setattr(clocks, moved, 601)
    assert not lease.is_held()
    with pytest.raises(NotOwner, match="could not renew"):
        lease.require()


def test_a_clock_that_is_set_back_prolongs_nothing(new_lease, clocks):
    lease = new_lease()
    lease.renew_now()
    clocks.wall, clocks.monotonic = -3600, 601
    assert not lease.is_held()


def test_the_time_that_a_slow_service_takes_is_not_trusted(s3, new_lease, clocks):
    lease = new_lease()
    s3.misbehave(operation="OwnerPutObject", hang=True)
    with ThreadPoolExecutor() as pool:
        confirming = pool.submit(lease.renew_now)
        s3.wait_for("OwnerPutObject")
        clocks.wall = clocks.monotonic = 601
        s3.behave()
        with pytest.raises(NotOwner):
            confirming.result()


def test_who_cannot_reach_s3_at_the_start_takes_it_later(s3, new_lease, hurried, caplog):
    s3.misbehave(operation="Owner.*", status=503, code="SlowDown")
    lease = new_lease()
    lease.start()
    wait_for(lambda: "could not be renewed" in caplog.text)
    assert not lease.is_held()
    with pytest.raises(BucketError):
        lease.renew_now()
    assert conflict(lease) == 0
    s3.behave()
    wait_for(lease.is_held)


def test_a_service_that_is_away_for_a_moment_costs_nothing(s3, new_lease):
    lease = new_lease()
    lease.renew_now()
    s3.misbehave(operation="Owner.*", status=403, code="AccessDenied")
    with pytest.raises(BucketError):
        lease.renew_now()
    assert lease.is_held()


def test_who_deletes_the_object_by_hand_changes_nothing(s3, new_lease, bucket_name):
    lease = new_lease()
    lease.renew_now()
    s3.client.delete_object(Bucket=bucket_name, Key=OWNER)
    assert holds(lease)


# Taking it from another


CONDITIONS = pytest.mark.parametrize("condition", [None, "refuse_condition", "ignore_condition", "misread_etag"])


@CONDITIONS
@pytest.mark.parametrize("stale", [False, True])
def test_of_two_that_look_at_the_same_moment_one_holds(
    s3, new_lease, write_owner, pass_at_s3, monkeypatch, condition, stale
):
    if condition:
        s3.misbehave(operation="OwnerPutObject", **{condition: True})
    if stale:
        write_owner()
        pass_at_s3(STALE_AFTER + 60)
    first, second = new_lease(), new_lease()
    write = second._bucket.write_owner

    def overtaken(data, instead_of):
        monkeypatch.setattr(second._bucket, "write_owner", write)
        assert holds(first)
        write(data, instead_of)

    monkeypatch.setattr(second._bucket, "write_owner", overtaken)
    second_holds = holds(second)
    assert second_holds == (condition in ("refuse_condition", "ignore_condition"))
    s3.behave()
    assert [holds(first), holds(second)] == [not second_holds, second_holds]


@CONDITIONS
def test_of_many_that_begin_at_once_one_holds(s3, new_lease, condition):
    if condition:
        s3.misbehave(operation="OwnerPutObject", **{condition: True})
    leases = [new_lease() for _ in range(8)]
    together = threading.Barrier(len(leases))

    def begin(lease):
        together.wait()
        holds(lease)

    with ThreadPoolExecutor(len(leases)) as pool:
        list(pool.map(begin, leases))
    assert [holds(lease) for lease in leases].count(True) == 1


def test_a_lease_is_stale_by_the_clock_of_the_service(new_lease, pass_at_s3, s3):
    first, second = new_lease(), new_lease()
    first.renew_now()
    assert not holds(second)
    pass_at_s3(STALE_AFTER - 30)
    assert not holds(second)
    s3.behave()
    pass_at_s3(STALE_AFTER + 30)
    assert holds(second)
    s3.behave()
    assert not holds(first)


def test_the_clock_of_this_machine_makes_none_stale(new_lease, pass_at_s3, clocks):
    first, second = new_lease(), new_lease()
    first.renew_now()
    pass_at_s3(0)
    clocks.wall = clocks.monotonic = 10 * STALE_AFTER
    assert not holds(second)


def test_the_margin_between_trusted_and_stale_is_minutes():
    assert RENEW_EVERY < lease_module._TRUSTED_FOR <= STALE_AFTER - 300


@pytest.mark.parametrize("data", [{"format": 3}, {"format": 99, "owner": ["a"], "database": None}, {"format": "3"}])
def test_a_lease_of_a_later_version_is_never_taken(new_lease, write_owner, owner, pass_at_s3, data):
    write_owner(json.dumps(data).encode())
    pass_at_s3(1000 * STALE_AFTER)
    lease = new_lease()
    with pytest.raises(NotOwner, match="belongs to"):
        lease.renew_now()
    assert owner() == data
    assert conflict(lease) == 1


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\xff\xfe", b"[]", b"null", b"{}", b'{"format": null}', b'{"format": 1, "owner": "old"}']
)
def test_one_that_nobody_can_read_is_not_taken(new_lease, write_owner, s3, bucket_name, pass_at_s3, data):
    write_owner(data)
    pass_at_s3(STALE_AFTER + 30)
    with pytest.raises(NotOwner, match=r"belongs to.*adopt"):
        new_lease().renew_now()
    assert s3.client.get_object(Bucket=bucket_name, Key=OWNER)["Body"].read() == data


# Which database it is


def test_a_database_takes_its_prefix_back_at_once(new_lease, owner):
    new_lease("database", tids=[1, 2]).renew_now()
    again = new_lease("database", tids=[1, 2, 3])
    assert holds(again)
    assert owner()["last"] == "3"
    assert not again.is_on_probation


def test_a_database_in_an_older_state_does_not_take_its_prefix_back(new_lease, pass_at_s3):
    """As after a restore from a backup."""
    new_lease("database", tids=[1, 2]).renew_now()
    pass_at_s3(1000 * STALE_AFTER)
    restored = new_lease("database", tids=[1])
    with pytest.raises(NotOwner, match=r"older state.*zodb-s3blobs adopt"):
        restored.renew_now()
    assert conflict(restored) == 1


STRANGERS = {"a stranger": [7], "an empty one": [], "an older state": [1], "a copy that has gone on by itself": [1, 3]}


@pytest.mark.parametrize("tids", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("end", ["stopped", "stale"])
def test_another_database_that_is_no_successor_never_takes_a_prefix(new_lease, pass_at_s3, tids, end):
    first = new_lease(tids=[1, 2])
    first.start()
    wait_for(first.is_held)
    if end == "stopped":
        first.close()
    pass_at_s3(1000 * STALE_AFTER)
    other = new_lease(tids=tids)
    with pytest.raises(NotOwner, match=r"does not have the last transaction.*Data\.fs.*zodb-s3blobs adopt"):
        other.renew_now()
    assert conflict(other) == 1


def test_a_successor_takes_a_prefix_when_its_owner_has_stopped(new_lease, owner):
    """As production does that was moved to another disk."""
    first = new_lease(tids=[1, 2])
    first.start()
    wait_for(first.is_held)
    successor = new_lease(tids=[1, 2])
    assert not holds(successor)
    first.close()
    assert holds(successor)
    assert owner()["taken"] != ""


def test_what_was_taken_from_another_database_is_on_probation_for_a_week(new_lease, owner, pass_at_s3, s3):
    first = new_lease("first", tids=[1, 2])
    first.start()
    wait_for(first.is_held)
    first.close()
    for _ in range(2):  # a restart changes nothing
        successor = new_lease("successor", tids=[1, 2])
        successor.renew_now()
        assert successor.is_on_probation
        assert successor._metrics.bucket_owner_changed._value.get() == pytest.approx(time.time(), abs=60)
    for days, on_probation in (6.9, True), (7.1, False):
        pass_at_s3(days * 86400)
        successor.renew_now()
        assert successor.is_on_probation == on_probation
        s3.behave()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_after_a_crash_of_the_machine_which_may_be_a_clone_of_a_machine_that_runs_packs_only_mark(
    new_lease, monkeypatch, end
):
    """A clone of a virtual machine has the same file system and inodes; only a clean stop tells that none runs."""
    first = new_lease("database", tids=[1, 2])
    first.start()
    wait_for(first.is_held)
    if end == "stop":
        first.close()
    again = new_lease("database", tids=[1, 2])
    monkeypatch.setattr("zodb_s3blobs.lease.boot_id", lambda: "another boot, or another machine")
    again.renew_now()
    assert again.is_held()
    assert again.is_on_probation == (end == "kill")


def test_the_rightful_owner_that_returns_does_not_take_it_from_a_successor_that_lives(new_lease):
    first = new_lease("first", tids=[1, 2])
    first.start()
    wait_for(first.is_held)
    first.close()
    copy = new_lease("copy", tids=[1, 2])
    copy.renew_now()
    returned = new_lease("first", tids=[1, 2])
    with pytest.raises(NotOwner, match="must never share a prefix"):
        returned.renew_now()
    assert conflict(returned) == 1


def test_what_a_database_never_had_from_another_is_not_on_probation(new_lease):
    lease = new_lease()
    lease.renew_now()
    assert not lease.is_on_probation
    assert lease._metrics.bucket_owner_changed._value.get() == 0


@pytest.mark.parametrize("taken", ["", "nonsense", "2026-01-01T00:00:00", "2026-01-01T00:00:00+00:00"])
def test_whatever_the_moment_of_the_takeover_says_nothing_is_deleted_too_early(new_lease, write_owner, taken):
    write_owner(database="database", taken=taken)
    lease = new_lease("database")
    lease.renew_now()
    assert lease.is_on_probation == (taken == "nonsense")


# Losing it


def test_who_loses_it_says_so_once_and_who_gets_it_back_too(s3, new_lease, write_owner, pass_at_s3, hurried, caplog):
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    write_owner()
    wait_for(lambda: conflict(lease) == 1)
    assert not lease.is_held()
    s3.forget()
    s3.wait_for("OwnerGetObject", 5)
    criticals = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(criticals) == 1
    assert "belongs to the server on 'another'" in criticals[0]
    assert "deletes none" in criticals[0]
    with pytest.raises(NotOwner, match="another"):
        lease.require()
    caplog.clear()
    pass_at_s3(STALE_AFTER + 30)
    wait_for(lambda: conflict(lease) == 0)
    assert lease.is_held()
    assert len([record for record in caplog.records if "belongs to this server now" in record.getMessage()]) == 1


def test_who_does_not_hold_it_writes_nothing(s3, new_lease, write_owner):
    write_owner()
    lease = new_lease()
    for _ in range(3):
        assert not holds(lease)
    assert s3.requests("OwnerPutObject") == []


def test_who_does_not_hold_it_looks_more_often_than_it_would_renew_it(s3, new_lease, write_owner, hurried, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_EVERY", 3600)
    write_owner()
    new_lease().start()
    s3.wait_for("OwnerGetObject", 3)


# A full bucket


@pytest.fixture
def fill(s3):
    """Has the service take no writes any more, nor those of owner.json."""

    def fill(status=403, code="QuotaExceeded"):
        for operation in "PutObject|CopyObject|UploadPart|CreateMultipartUpload", "OwnerPutObject":
            s3.misbehave(operation=operation, status=status, code=code)

    return fill


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "InsufficientStorage"), (400, "XQuota")])
def test_while_the_bucket_is_full_the_owner_keeps_it_by_reading_it(
    s3, bucket_name, dead, collect, new_lease, fill, clocks, status, code
):
    lease = new_lease()
    lease.renew_now()
    fill(status, code)
    clocks.wall = clocks.monotonic = STALE_AFTER * 100
    assert not lease.is_held()
    assert collect(lease) == 25
    assert others(s3.keys(bucket_name)) == []


def test_while_the_bucket_is_full_nobody_takes_what_is_another_servers(s3, bucket_name, dead, collect, new_lease, fill):
    new_lease().renew_now()
    fill()
    with pytest.raises(NotOwner):
        collect(new_lease())
    assert others(s3.keys(bucket_name)) == dead


def test_while_the_bucket_is_full_nobody_takes_what_nobody_keeps_any_more(
    s3, bucket_name, dead, collect, new_lease, fill, pass_at_s3
):
    new_lease().renew_now()
    fill()
    pass_at_s3(STALE_AFTER + 30)
    with pytest.raises(BucketError, match="the bucket is full"):
        collect(new_lease())
    assert others(s3.keys(bucket_name)) == dead


def test_while_the_bucket_is_full_a_server_that_is_started_again_keeps_it(dead, collect, new_lease, fill):
    before = new_lease("home")
    before.start()
    wait_for(before.is_held)
    fill()
    before.close()
    assert collect(new_lease("home")) == 25


def test_who_meets_another_owner_in_a_full_bucket_stops(s3, bucket_name, dead, collect, new_lease, write_owner, fill):
    lease = new_lease()
    lease.renew_now()
    write_owner()
    fill()
    with pytest.raises(NotOwner, match="another"):
        collect(lease)
    assert others(s3.keys(bucket_name)) == dead


# Its end


def owner_exists(s3, bucket_name):
    return any(found["Key"] == OWNER for found in s3.client.list_objects_v2(Bucket=bucket_name).get("Contents", ()))


def test_close_marks_it_as_stopped_and_another_may_take_it(new_lease, owner):
    first, second = new_lease(), new_lease()
    first.start()
    wait_for(first.is_held)
    assert owner()["stopped"] == ""
    before = owner()
    first.close()
    after = owner()
    assert after.pop("stopped") >= before.pop("stopped")
    assert {**after, "renewed": before["renewed"]} == before
    assert holds(second)
    assert owner()["stopped"] == ""


def test_close_marks_it_as_stopped_however_threads_are_scheduled(new_lease, owner):
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    tell = lease._ending.set

    def tell_slowly():
        tell()
        lease._thread.join(SOON)

    lease._ending.set = tell_slowly
    lease.close()
    assert owner()["stopped"]


def test_close_leaves_that_of_another(s3, new_lease, write_owner, owner):
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    write_owner()
    before = owner()
    lease.close()
    assert owner() == before


def test_after_close_it_is_not_held(new_lease):
    """Whoever still deletes must stop: somebody else may have taken it already."""
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    lease.close()
    assert not lease.is_held()
    with pytest.raises(NotOwner, match="being stopped"):
        lease.renew_now()


def test_a_lease_that_was_never_asked_for_is_closed_without_a_request(s3, new_lease):
    new_lease().close()
    assert s3.requests("OwnerGetObject") == []


@pytest.mark.parametrize("when", slow_but("later", of=["at the start", "later"]))
def test_close_does_not_wait_for_a_silent_s3(s3, new_lease, when):
    lease = new_lease()
    if when == "at the start":
        s3.misbehave(operation="Owner.*", hang=True)
        lease.start()
        s3.wait_for("OwnerGetObject")
    else:
        lease.start()
        wait_for(lease.is_held)
        s3.misbehave(operation="Owner.*", hang=True)
    started = time.monotonic()
    lease.close()
    assert time.monotonic() - started < SOON


def test_a_late_answer_to_the_end_harms_nothing(s3, new_lease, owner, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(lease_module, "_RELEASE_TIMEOUT", 0.01)
    lease = new_lease()
    lease.start()
    wait_for(lease.is_held)
    s3.forget()
    s3.misbehave(operation="OwnerGetObject", hang=True)
    lease.close()
    s3.wait_for("OwnerGetObject")
    lease._bucket.close()
    s3.behave()
    wait_for(lambda: raised or owner()["stopped"])
    assert raised == []


# Garbage collection


@pytest.fixture
def dead(s3, bucket, bucket_name, monkeypatch):
    """25 dead blobs, of which 10 are deleted at once: their keys."""
    monkeypatch.setattr(garbage, "_DELETE_BATCH", 10)
    keys = sorted(bucket.keys.key(p64(number), p64(1)) for number in range(1, 26))
    s3.put(bucket_name, [*keys, KEPT_KEY])
    return keys


@pytest.fixture
def collect(bucket, cache):
    """Collects garbage under a lease."""

    def collect(lease):
        parts = bucket, cache, InFlight(), lambda name: False, lease, Metrics()
        return Collector(*parts, 0, 100, Identity(None), 86400).collect(Base(KEPT))

    return collect


def test_who_holds_it_deletes(s3, bucket_name, dead, collect, new_lease):
    assert collect(new_lease()) == 25
    assert others(s3.keys(bucket_name)) == []


def test_who_does_not_hold_it_does_not_even_list(s3, bucket_name, dead, collect, new_lease, write_owner):
    write_owner()
    with pytest.raises(NotOwner, match="another"):
        collect(new_lease())
    assert s3.requests() == []
    assert others(s3.keys(bucket_name)) == dead


def test_who_cannot_tell_deletes_nothing(s3, bucket_name, dead, collect, new_lease):
    s3.misbehave(operation="Owner.*", status=503, code="SlowDown")
    with pytest.raises(BucketError):
        collect(new_lease())
    assert s3.requests() == []


def lose_it_in_the_middle(s3, collecting, lose, operation="DeleteObjects", number=2):
    """Do so while that request is under way: the second of three batches that are deleted."""
    s3.misbehave(operation=operation, times=number - 1)
    s3.misbehave(operation=operation, times=1, hang=True)
    with ThreadPoolExecutor() as pool:
        collection = pool.submit(collecting)
        s3.wait_for(operation, number)
        lose()
        s3.behave()
        with pytest.raises(NotOwner) as error:
            collection.result()
    return str(error.value)


def test_who_loses_it_to_another_stops_deleting(s3, bucket_name, dead, collect, new_lease, write_owner):
    assert "another" in lose_it_in_the_middle(s3, lambda: collect(new_lease()), write_owner)
    assert len(s3.requests("DeleteObjects")) == 2
    assert s3.requests("DeleteObject") == []
    assert others(s3.keys(bucket_name)) == dead[20:]


def test_who_cannot_renew_it_stops_deleting(s3, bucket_name, dead, collect, new_lease, clocks):
    def lose():
        clocks.wall = 601

    assert "could not renew" in lose_it_in_the_middle(s3, lambda: collect(new_lease()), lose)
    assert others(s3.keys(bucket_name)) == dead[20:]


def test_who_is_being_stopped_stops_deleting(s3, bucket_name, dead, collect, new_lease):
    lease = new_lease()
    lose_it_in_the_middle(s3, lambda: collect(lease), lease.close)
    assert others(s3.keys(bucket_name)) == dead[20:]


def test_who_loses_it_leaves_the_marks_and_staged_uploads_alone(s3, collect, new_lease, write_owner):
    lose_it_in_the_middle(s3, lambda: collect(new_lease()), write_owner, "ListObjects", 1)  # and nothing is dead
    assert [request.operation for request in s3.requests()] == ["ListObjects"]


# From outside


@pytest.mark.parametrize("read_only", [False, True])
def test_a_base_that_is_read_only_takes_none(s3, bucket_name, tmp_path, read_only):
    ZODB.config.storageFromString(FILESTORAGE.format(dir=tmp_path)).close()
    storage = ZODB.config.storageFromString(f"""
        %import zodb_s3blobs
        <s3blobstorage>
          bucket-name {bucket_name}
          s3-endpoint-url {s3.url}
          s3-access-key key
          s3-secret-key secret
          cache-dir {tmp_path}/cache
          <filestorage>
            path {tmp_path}/Data.fs
            read-only {read_only}
          </filestorage>
        </s3blobstorage>
        """)
    storage.close()
    assert bool(s3.requests("OwnerGetObject")) != read_only
    assert owner_exists(s3, bucket_name) != read_only


@pytest.fixture
def start(s3, bucket_name, tmp_path):
    """Starts a server with a database of its own, on the same prefix as all others."""
    with contextlib.ExitStack() as servers:

        def start(name):
            (tmp_path / name).mkdir()
            return servers.enter_context(ZEOServer(tmp_path / name, s3, bucket_name, metrics=True))

        yield start


def write(db, data):
    with db.transaction() as connection:
        root = connection.root()
        if "blob" not in root:
            root["blob"] = Blob()
        with root["blob"].open("w") as file:
            file.write(data)


def read(db):
    with db.transaction() as connection, connection.root()["blob"].open() as file:
        return file.read()


def owner_id(s3, bucket_name):
    try:
        return json.loads(s3.client.get_object(Bucket=bucket_name, Key=f"1/{OWNER}")["Body"].read())["owner"]
    except s3.client.exceptions.NoSuchKey:
        return None


def deletions(s3):
    return s3.requests("DeleteObjects") + s3.requests("DeleteObject")


def test_a_second_server_on_the_prefix_serves_and_deletes_nothing(s3, bucket_name, start):
    first = start("first")
    wait_for(lambda: owner_id(s3, bucket_name))
    first_db = first.db()
    write(first_db, b"of the first")

    second = start("second")
    wait_for(lambda: second.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 1)
    assert "CRITICAL" in second.output()
    assert "Two databases must never share a prefix" in second.output()
    assert os.uname().nodename in second.output()
    db = second.db()
    for data in (b"old", b"of the second"):
        write(db, data)
    assert read(db) == b"of the second"
    keys = s3.keys(bucket_name)
    s3.forget()
    with pytest.raises(StorageError, match="Two databases must never share a prefix"):
        db.pack()
    assert deletions(s3) == []
    assert s3.keys(bucket_name) == keys
    assert second.metrics()("s3blobs_gc_failures_total", storage="1") == 1
    assert read(second.db()) == b"of the second"
    assert read(first.db()) == b"of the first"
    assert first.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 0


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("cache", slow_but("cache", of=["cache", "another"]))
def test_after_a_restart_the_first_pack_deletes_at_once(s3, bucket_name, start, end, cache):
    """Also in a container, whose cache-dir is a new one each time."""
    server = start("server")
    db = server.db()
    for data in (b"old", b"new"):
        write(db, data)
    wait_for(lambda: owner_id(s3, bucket_name))
    before = owner_id(s3, bucket_name)
    getattr(server, end)()
    assert owner_id(s3, bucket_name) == before
    server.cache_name = cache
    server.start()
    db = server.db()
    db.pack()
    assert owner_id(s3, bucket_name) != before
    assert len(s3.keys(bucket_name)) == 1
    assert read(db) == b"new"


# Servers that share a database


@pytest.fixture
def of_database(open_bucket):
    """Makes the `Lease` of another server on ``database``: its name, or what tells it."""
    leases = []

    def of_database(database):
        number = len(leases)
        leases.append(Lease(open_bucket(), FakeDatabase(database, shared=True), Metrics(), f"storage {number}"))
        return leases[-1]

    yield of_database
    for lease in leases:
        lease.close()


def test_servers_on_one_database_hold_it_together(of_database):
    leases = [of_database("one") for _ in range(3)]
    for _ in range(2):
        for lease in leases:
            assert holds(lease)
            lease.verify()
    assert [conflict(lease) for lease in leases] == [0, 0, 0]


def test_all_servers_on_a_database_delete(s3, bucket_name, dead, collect, of_database):
    first, second = of_database("one"), of_database("one")
    first.renew_now()
    assert collect(second) == 25
    s3.put(bucket_name, dead)
    assert collect(first) == 25


def test_servers_on_another_database_do_not_hold_it(of_database, owner):
    first, second = of_database("another"), of_database("one")
    first.renew_now()
    assert owner()["database"] == "another"
    with pytest.raises(NotOwner, match="belongs to the server on"):
        second.renew_now()
    assert conflict(second) == 1
    assert holds(first)


def test_servers_that_share_nothing_do_not_hold_what_a_database_has(of_database, new_lease):
    of_database("one").renew_now()
    assert not holds(new_lease())


def test_owner_json_names_the_database(of_database, owner):
    first, second = of_database("one"), of_database("one")
    first.renew_now()
    before = owner()
    second.renew_now()
    after = owner()
    assert before["database"] == after["database"] == "one"
    assert before["owner"] != after["owner"]


@pytest.mark.parametrize("database", ["one", ["one"], None, 1])
def test_a_later_version_that_names_the_database_is_left_alone(of_database, write_owner, pass_at_s3, database):
    write_owner(json.dumps({"format": 3, "owner": "later", "database": database}).encode())
    pass_at_s3(1000 * STALE_AFTER)
    assert not holds(of_database("another"))


def test_a_stale_one_of_another_database_is_taken(s3, of_database, pass_at_s3):
    first, second = of_database("another"), of_database("one")
    first.renew_now()
    pass_at_s3(STALE_AFTER + 30)
    assert holds(second)
    s3.behave()
    assert not holds(first)


def test_the_end_of_one_server_leaves_it_to_the_others_of_the_database(s3, of_database, owner):
    first, second = of_database("one"), of_database("one")
    first.start()
    wait_for(first.is_held)
    first.close()
    assert owner()["stopped"] == ""
    assert owner()["database"] == "one"
    assert not first.is_held()
    assert not holds(of_database("copy"))
    assert holds(second)


def test_a_server_that_ends_while_it_asks_for_the_database_leaves_it_to_the_others(s3, of_database, owner):
    """A script is over before the database has said who it is."""
    asked, answer, released = threading.Event(), threading.Event(), threading.Event()

    def ask():
        asked.set()
        assert answer.wait(SOON)
        return "one"

    of_database("one").renew_now()
    script = of_database(ask)
    release = script._release
    script._release = lambda: (release(), released.set())
    script.start()
    assert asked.wait(SOON)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(script.close)
        wait_for(script._ending.is_set)
        answer.set()
        closing.result()
    script._thread.join(SOON)
    assert owner()["database"] == "one"
    assert owner()["stopped"] == ""
    assert not holds(of_database("copy"))


@CONDITIONS
@pytest.mark.parametrize("begun", [False, True])
def test_of_servers_on_one_database_that_renew_it_at_the_same_moment_all_hold(
    s3, of_database, monkeypatch, condition, begun
):
    if condition:
        s3.misbehave(operation="OwnerPutObject", **{condition: True})
    first, second = of_database("one"), of_database("one")
    if begun:
        first.renew_now()
    write = second._bucket.write_owner

    def overtaken(data, instead_of):
        monkeypatch.setattr(second._bucket, "write_owner", write)
        first.renew_now()
        write(data, instead_of)

    monkeypatch.setattr(second._bucket, "write_owner", overtaken)
    assert holds(second)
    assert first.is_held()
    assert conflict(first) == conflict(second) == 0


def test_of_many_on_two_databases_that_begin_at_once_those_of_one_hold(of_database):
    leases = [of_database(database) for database in ("one", "another") for _ in range(4)]
    together = threading.Barrier(len(leases))

    def begin(lease):
        together.wait()
        holds(lease)

    with ThreadPoolExecutor(len(leases)) as pool:
        list(pool.map(begin, leases))
    held = [holds(lease) for lease in leases]
    assert held in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4)


def test_a_database_that_is_restarted_is_still_that_of_the_server_which_lives(of_database, owner):
    """Others have to wait until that one has said so."""
    names = ["before"]
    living = of_database(lambda: names[-1])
    living.renew_now()
    names.append("after")
    late = of_database("after")
    assert not holds(late)
    assert holds(living)
    assert owner()["database"] == "after"
    assert holds(late)
    assert not holds(of_database("before"))


def test_a_database_that_does_not_say_who_it_is_gets_no_lease(s3, of_database):
    def ask():
        raise OSError("the database is away")

    lease = of_database(ask)
    with pytest.raises(OSError, match="away"):
        lease.renew_now()
    assert not lease.is_held()
    assert s3.requests("OwnerPutObject") == []


def test_a_database_that_is_away_for_a_moment_costs_nothing(of_database, hurried):
    answers = iter(["one", OSError("the database is away")])
    again = threading.Event()

    def ask():
        answer = next(answers, None)
        if answer is None:
            again.set()
            return "one"
        if isinstance(answer, OSError):
            raise answer
        return answer

    lease = of_database(ask)
    lease.start()
    assert again.wait(SOON)
    wait_for(lease.is_held)
    assert holds(lease)
