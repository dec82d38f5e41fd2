"""The owner lease: of all servers on one prefix, one may delete."""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import formatdate

import pytest
import ZODB.config
from bases import Base
from zeoserver import FILESTORAGE, ZEOServer
from ZODB.blob import Blob
from ZODB.POSException import StorageError
from ZODB.utils import p64

from zodb_s3blobs import garbage
from zodb_s3blobs import lease as lease_module
from zodb_s3blobs.bucket import BucketError
from zodb_s3blobs.cache import Cache
from zodb_s3blobs.garbage import Collector
from zodb_s3blobs.inflight import InFlight
from zodb_s3blobs.lease import RENEW_EVERY, STALE_AFTER, Lease, NotOwner
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.staging import Staging
from zodb_s3blobs.workers import DaemonPool

pytestmark = pytest.mark.usefixtures("no_pauses")

OWNER = "owner.json"
#: Far above what anything takes that does not wait for S3.
SOON = 20


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def new_lease(open_bucket):
    """Makes a `Lease` as a server with a ``home`` of its own has it; ``metrics`` is beside it."""
    leases = []

    def new_lease(home=None, bucket=None):
        lease = Lease(bucket or open_bucket(), home or f"home {len(leases)}", Metrics(f"storage {len(leases)}"))
        leases.append(lease)
        return lease

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
    another = dict.fromkeys(("owner", "host", "home", "storage", "started", "renewed"), "another")

    def write_owner(data=None):
        body = json.dumps({"format": 1, **another}).encode() if data is None else data
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
    monkeypatch.setattr(lease_module, "_LOOK_EVERY", 0.02)


def holds(lease):
    """Whether it does, says S3."""
    try:
        lease.confirm()
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
        lease.check()
    lease.confirm()
    assert lease.is_held()
    lease.check()
    assert conflict(lease) == 0
    assert len(s3.requests("OwnerPutObject")) == 1


def test_everybody_can_read_whose_it_is(new_lease, owner, monkeypatch):
    times = iter([f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 10)])
    monkeypatch.setattr(lease_module, "_now", lambda: next(times))
    lease = new_lease("a home")
    lease.confirm()
    first = owner()
    assert set(first) == {"format", "owner", "host", "home", "storage", "started", "renewed", "database"}
    assert first["format"] == 1
    assert first["home"] == "a home"
    assert first["storage"] == "storage 0"
    assert os.uname().nodename in first["host"]
    assert first["started"] == "2026-01-01T00:00:00+00:00"
    lease.confirm()
    second = owner()
    assert second.pop("renewed") > first.pop("renewed") > first["started"]
    assert second == first


def test_it_tells_the_times_in_utc_and_no_secret(new_lease, owner):
    before = datetime.now().astimezone()
    new_lease().confirm()
    for name in ("started", "renewed"):
        told = datetime.fromisoformat(owner()[name])
        assert told.utcoffset().total_seconds() == 0
        assert abs((told - before).total_seconds()) < 60
    assert "test-secret" not in json.dumps(owner())  # of the fixture `settings`
    assert "test" not in owner().values()


def test_two_servers_have_two_names(new_lease, owner):
    new_lease("a home").confirm()
    first = owner()["owner"]
    new_lease("a home").confirm()
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
    lease.confirm()
    lease.confirm()
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
    wait_until(lease.is_held)
    s3.misbehave(operation="OwnerGetObject", times=1, hang=True, status=403, code="AccessDenied")
    wait_until(lambda: None in [get.status for get in s3.requests("OwnerGetObject")])
    monkeypatch.setattr(lease_module, "RENEW_EVERY", 3600)
    s3.forget()
    s3.behave()
    s3.wait_for("OwnerPutObject")


def test_its_owner_renews_it_however_old_it_is(new_lease, pass_at_s3):
    lease = new_lease()
    lease.confirm()
    pass_at_s3(10 * STALE_AFTER)
    assert holds(lease)


def test_a_write_whose_answer_is_lost_counts(s3, new_lease):
    s3.misbehave(operation="OwnerPutObject", times=1, lose=True)
    assert holds(new_lease())
    assert [put.status for put in s3.requests("OwnerPutObject")] == [200, 412]


def test_a_renewal_that_the_service_did_not_take_is_none(s3, new_lease, clocks):
    """At the service the lease grows old, whatever its owner believes."""
    lease = new_lease()
    lease.confirm()
    s3.misbehave(operation="OwnerPutObject", status=412, code="PreconditionFailed")
    clocks.wall = clocks.monotonic = RENEW_EVERY
    with contextlib.suppress(BucketError):
        lease.confirm()
    assert lease.is_held()  # still, by the last one
    clocks.wall = clocks.monotonic = 601
    assert not lease.is_held()


def test_a_service_that_never_finds_the_object_as_it_is_takes_a_renewal_all_the_same(s3, new_lease, clocks):
    """As Ceph 16, which stumbles over the quotes of the ETag."""
    s3.misbehave(operation="OwnerPutObject", misread_etag=True)
    lease = new_lease()
    lease.confirm()
    clocks.wall = clocks.monotonic = RENEW_EVERY
    lease.confirm()
    clocks.wall = clocks.monotonic = 601
    assert lease.is_held()


@pytest.mark.parametrize("moved", ["wall", "monotonic"])
def test_it_is_trusted_for_ten_minutes_by_either_clock(new_lease, clocks, moved):
    lease = new_lease()
    lease.confirm()
    setattr(clocks, moved, 599)
    assert lease.is_held()
    setattr(clocks, moved, 601)
    assert not lease.is_held()
    with pytest.raises(NotOwner, match="could not renew"):
        lease.check()


def test_a_clock_that_is_set_back_prolongs_nothing(new_lease, clocks):
    lease = new_lease()
    lease.confirm()
    clocks.wall, clocks.monotonic = -3600, 601
    assert not lease.is_held()


def test_the_time_that_a_slow_service_takes_is_not_trusted(s3, new_lease, clocks):
    lease = new_lease()
    s3.misbehave(operation="OwnerPutObject", hang=True)
    with ThreadPoolExecutor() as pool:
        confirming = pool.submit(lease.confirm)
        s3.wait_for("OwnerPutObject")
        clocks.wall = clocks.monotonic = 601
        s3.behave()
        with pytest.raises(NotOwner):
            confirming.result()


def test_who_cannot_reach_s3_at_the_start_takes_it_later(s3, new_lease, hurried, caplog):
    s3.misbehave(operation="Owner.*", status=503, code="SlowDown")
    lease = new_lease()
    lease.start()
    wait_until(lambda: "could not be renewed" in caplog.text)
    assert not lease.is_held()
    with pytest.raises(BucketError):
        lease.confirm()
    assert conflict(lease) == 0
    s3.behave()
    wait_until(lease.is_held)


def test_a_service_that_is_away_for_a_moment_costs_nothing(s3, new_lease):
    lease = new_lease()
    lease.confirm()
    s3.misbehave(operation="Owner.*", status=403, code="AccessDenied")
    with pytest.raises(BucketError):
        lease.confirm()
    assert lease.is_held()


def test_who_deletes_the_object_by_hand_changes_nothing(s3, new_lease, bucket_name):
    lease = new_lease()
    lease.confirm()
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
    first.confirm()
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
    first.confirm()
    pass_at_s3(0)
    clocks.wall = clocks.monotonic = 10 * STALE_AFTER
    assert not holds(second)


def test_the_margin_between_trusted_and_stale_is_minutes():
    assert RENEW_EVERY < lease_module._TRUSTED_FOR <= STALE_AFTER - 300


@pytest.mark.parametrize("data", [{"format": 2}, {"format": 99, "owner": ["a"], "home": None}, {"format": "2"}])
def test_a_lease_of_a_later_version_is_never_taken(new_lease, write_owner, owner, pass_at_s3, data):
    write_owner(json.dumps(data).encode())
    pass_at_s3(1000 * STALE_AFTER)
    lease = new_lease()
    with pytest.raises(NotOwner, match="belongs to"):
        lease.confirm()
    assert owner() == data
    assert conflict(lease) == 1


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xfe", b"[]", b"null", b"{}", b'{"format": null}'])
def test_one_that_nobody_can_read_is_taken_when_it_is_stale(new_lease, write_owner, owner, pass_at_s3, data):
    write_owner(data)
    lease = new_lease()
    with pytest.raises(NotOwner, match="belongs to"):
        lease.confirm()
    pass_at_s3(STALE_AFTER + 30)
    assert holds(lease)
    assert owner()["format"] == 1


@pytest.mark.parametrize(
    ("home", "host", "taken"),
    [("same", "same", True), ("same", "other", False), ("other", "same", False)],
)
def test_the_one_of_its_own_dead_process_is_taken_back_at_once(new_lease, monkeypatch, home, host, taken):
    """And a copy of the directory on another machine, such as that of a virtual one, takes it from nobody."""
    monkeypatch.setattr(lease_module, "_host", lambda: "same")
    new_lease("same").confirm()
    monkeypatch.setattr(lease_module, "_host", lambda: host)
    assert holds(new_lease(home)) == taken


def test_the_home_stays_the_same_over_restarts(tmp_path):
    identities = set()
    for _ in range(3):
        cache = Cache(tmp_path / "cache", 0, Metrics())
        identities.add(cache.identity)
        cache.close()
    assert len(identities) == 1


def test_a_copy_of_the_cache_directory_is_another_home(tmp_path, new_lease):
    """A test server made of a copy of production, on the same machine."""
    cache = Cache(tmp_path / "cache", 0, Metrics())
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    copy = Cache(tmp_path / "copy", 0, Metrics())
    production, test = new_lease(cache.identity), new_lease(copy.identity)
    production.confirm()
    assert not holds(test)
    assert holds(production)
    cache.close()
    copy.close()


def test_a_crash_that_left_no_identity_is_survived(tmp_path):
    for content in ("", None):
        cache = Cache(tmp_path / "cache", 0, Metrics())
        cache.close()
        (file,) = (tmp_path / "cache").glob("*.id")
        file.unlink() if content is None else file.write_text(content)
        again = Cache(tmp_path / "cache", 0, Metrics())
        assert len(again.identity) > 30
        again.close()


# Losing it


def test_who_loses_it_says_so_once_and_who_gets_it_back_too(s3, new_lease, write_owner, pass_at_s3, hurried, caplog):
    lease = new_lease()
    lease.start()
    wait_until(lease.is_held)
    write_owner()
    wait_until(lambda: conflict(lease) == 1)
    assert not lease.is_held()
    s3.forget()
    s3.wait_for("OwnerGetObject", 5)
    criticals = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(criticals) == 1
    assert "belongs to the server on 'another'" in criticals[0]
    assert "deletes none" in criticals[0]
    with pytest.raises(NotOwner, match="another"):
        lease.check()
    caplog.clear()
    pass_at_s3(STALE_AFTER + 30)
    wait_until(lambda: conflict(lease) == 0)
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


# Giving it back


def owner_exists(s3, bucket_name):
    return any(found["Key"] == OWNER for found in s3.client.list_objects_v2(Bucket=bucket_name).get("Contents", ()))


def test_close_gives_it_back(s3, bucket_name, new_lease):
    first, second = new_lease(), new_lease()
    first.start()
    wait_until(first.is_held)
    first.close()
    assert not owner_exists(s3, bucket_name)
    assert holds(second)


def test_close_gives_it_back_however_threads_are_scheduled(s3, bucket_name, new_lease):
    lease = new_lease()
    lease.start()
    wait_until(lease.is_held)
    tell = lease._ending.set

    def tell_slowly():
        tell()
        lease._thread.join(SOON)

    lease._ending.set = tell_slowly
    lease.close()
    assert not owner_exists(s3, bucket_name)


def test_close_leaves_that_of_another(s3, new_lease, write_owner, owner):
    lease = new_lease()
    lease.start()
    wait_until(lease.is_held)
    write_owner()
    lease.close()
    assert owner()["owner"] == "another"
    assert s3.requests("OwnerDeleteObject") == []


def test_after_close_it_is_not_held(new_lease):
    """Whoever still deletes must stop: somebody else may have taken it already."""
    lease = new_lease()
    lease.start()
    wait_until(lease.is_held)
    lease.close()
    assert not lease.is_held()
    with pytest.raises(NotOwner, match="being stopped"):
        lease.confirm()


def test_a_lease_that_was_never_asked_for_is_closed_without_a_request(s3, new_lease):
    new_lease().close()
    assert s3.requests("OwnerGetObject") == []


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_close_does_not_wait_for_a_silent_s3(s3, new_lease, when):
    lease = new_lease()
    if when == "at the start":
        s3.misbehave(operation="Owner.*", hang=True)
        lease.start()
        s3.wait_for("OwnerGetObject")
    else:
        lease.start()
        wait_until(lease.is_held)
        s3.misbehave(operation="Owner.*", hang=True)
    started = time.monotonic()
    lease.close()
    assert time.monotonic() - started < SOON


def test_a_late_answer_to_the_giving_back_harms_nothing(s3, bucket_name, new_lease, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(lease_module, "_RELEASE_TIMEOUT", 0.01)
    lease = new_lease()
    lease.start()
    wait_until(lease.is_held)
    s3.forget()
    s3.misbehave(operation="OwnerGetObject", hang=True)
    lease.close()
    s3.wait_for("OwnerGetObject")
    lease._bucket.close()
    s3.behave()
    wait_until(lambda: raised or not owner_exists(s3, bucket_name))
    assert raised == []


# Garbage collection


@pytest.fixture
def dead(s3, bucket, bucket_name, monkeypatch):
    """25 dead blobs, of which 10 are deleted at once: their keys."""
    monkeypatch.setattr(garbage, "_DELETE_BATCH", 10)
    keys = sorted(bucket.keys.key(p64(number), p64(1)) for number in range(1, 26))
    s3.put(bucket_name, keys)
    return keys


@pytest.fixture
def collect(bucket, cache):
    """Collects garbage under a lease."""

    def collect(lease):
        staging = Staging(bucket, DaemonPool(1), Metrics(), 1, 60, 0)
        return Collector(bucket, cache, InFlight(), staging, lease, Metrics(), 0, 100).collect(Base())

    return collect


def test_who_holds_it_deletes(s3, bucket_name, dead, collect, new_lease):
    assert collect(new_lease()) == 25
    assert s3.keys(bucket_name) == []


def test_who_does_not_hold_it_does_not_even_list(s3, bucket_name, dead, collect, new_lease, write_owner):
    write_owner()
    with pytest.raises(NotOwner, match="another"):
        collect(new_lease())
    assert s3.requests() == []
    assert s3.keys(bucket_name) == dead


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
    assert s3.keys(bucket_name) == dead[20:]


def test_who_cannot_renew_it_stops_deleting(s3, bucket_name, dead, collect, new_lease, clocks):
    def lose():
        clocks.wall = 601

    assert "could not renew" in lose_it_in_the_middle(s3, lambda: collect(new_lease()), lose)
    assert s3.keys(bucket_name) == dead[20:]


def test_who_is_being_stopped_stops_deleting(s3, bucket_name, dead, collect, new_lease):
    lease = new_lease()
    lose_it_in_the_middle(s3, lambda: collect(lease), lease.close)
    assert s3.keys(bucket_name) == dead[20:]


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
    storage.close()  # would give back what had been asked for
    assert bool(s3.requests("OwnerGetObject")) != read_only
    assert not owner_exists(s3, bucket_name)


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
    wait_until(lambda: owner_id(s3, bucket_name))
    first_db = first.db()
    write(first_db, b"of the first")

    second = start("second")
    wait_until(lambda: second.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 1)
    assert "CRITICAL" in second.output()
    assert "Two servers must never share a prefix" in second.output()
    assert os.uname().nodename in second.output()
    db = second.db()
    for data in (b"old", b"of the second"):
        write(db, data)
    assert read(db) == b"of the second"
    keys = s3.keys(bucket_name)
    s3.forget()
    with pytest.raises(StorageError, match="Two servers must never share a prefix"):
        db.pack()
    assert deletions(s3) == []
    assert s3.keys(bucket_name) == keys
    assert second.metrics()("s3blobs_gc_failures_total", storage="1") == 1
    assert read(second.db()) == b"of the second"
    assert read(first.db()) == b"of the first"
    assert first.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 0


@pytest.mark.parametrize(
    ("end", "cache", "packs"),
    [("kill", "cache", True), ("stop", "another", True), ("kill", "another", False)],
)
def test_after_a_restart_the_first_pack_deletes_at_once(s3, bucket_name, start, end, cache, packs):
    """Unless a server that may still live has the lease, which a new machine cannot know."""
    server = start("server")
    db = server.db()
    for data in (b"old", b"new"):
        write(db, data)
    wait_until(lambda: owner_id(s3, bucket_name))
    before = owner_id(s3, bucket_name)
    getattr(server, end)()
    assert owner_id(s3, bucket_name) == (None if end == "stop" else before)
    server.cache_name = cache
    server.start()
    db = server.db()
    if packs:
        db.pack()
        assert owner_id(s3, bucket_name) not in (None, before)
    else:
        with pytest.raises(StorageError, match=before):
            db.pack()
        assert owner_id(s3, bucket_name) == before
    assert len(s3.keys(bucket_name)) == (1 if packs else 2)
    assert read(db) == b"new"


# Servers that share a database


@pytest.fixture
def of_database(open_bucket):
    """Makes the `Lease` of another server on ``database``: its name, or what tells it."""
    leases = []

    def of_database(database, home=None):
        ask = database if callable(database) else lambda: database
        number = len(leases)
        leases.append(Lease(open_bucket(), home or f"home {number}", Metrics(f"storage {number}"), ask))
        return leases[-1]

    yield of_database
    for lease in leases:
        lease.close()


def test_servers_on_one_database_hold_it_together(of_database):
    leases = [of_database("one") for _ in range(3)]
    for _ in range(2):
        for lease in leases:
            assert holds(lease)
            lease.look()
    assert [conflict(lease) for lease in leases] == [0, 0, 0]


def test_all_servers_on_a_database_delete(s3, bucket_name, dead, collect, of_database):
    first, second = of_database("one"), of_database("one")
    first.confirm()
    assert collect(second) == 25
    s3.put(bucket_name, dead)
    assert collect(first) == 25


@pytest.mark.parametrize("before", ["another", None])
def test_servers_on_another_database_do_not_hold_it(of_database, before, owner):
    first, second = of_database(before), of_database("one")
    first.confirm()
    assert owner()["database"] == (before or "")
    with pytest.raises(NotOwner, match="belongs to the server on"):
        second.confirm()
    assert conflict(second) == 1
    assert holds(first)


def test_servers_that_share_nothing_do_not_hold_what_a_database_has(of_database, new_lease):
    of_database("one").confirm()
    assert not holds(new_lease())


def test_owner_json_names_the_database(of_database, owner):
    first, second = of_database("one"), of_database("one")
    first.confirm()
    before = owner()
    second.confirm()
    after = owner()
    assert before["database"] == after["database"] == "one"
    assert before["owner"] != after["owner"]


@pytest.mark.parametrize("databases", [("one", "another"), ("one", None), (None, "one")])
def test_the_same_directory_is_no_claim_where_there_is_a_database(of_database, databases):
    """The others on the database live on, though the server that had the directory does not."""
    before, after = (of_database(database, home="same") for database in databases)
    before.confirm()
    assert not holds(after)


def test_one_without_the_name_of_a_database_is_of_a_single_server(s3, bucket_name, of_database, new_lease, owner):
    """As versions wrote it that knew of no database."""
    new_lease("same").confirm()
    said = owner()
    del said["database"]
    s3.client.put_object(Bucket=bucket_name, Key=OWNER, Body=json.dumps(said).encode())
    for lease in of_database("one"), of_database("one", home="same"), new_lease():
        assert not holds(lease)
    assert owner() == said
    assert holds(new_lease("same"))


@pytest.mark.parametrize("database", ["one", ["one"], None, 1])
def test_a_later_version_that_names_the_database_is_left_alone(of_database, write_owner, pass_at_s3, database):
    write_owner(json.dumps({"format": 2, "owner": "later", "database": database}).encode())
    pass_at_s3(1000 * STALE_AFTER)
    assert not holds(of_database("another"))


def test_a_stale_one_of_another_database_is_taken(s3, of_database, pass_at_s3):
    first, second = of_database("another"), of_database("one")
    first.confirm()
    pass_at_s3(STALE_AFTER + 30)
    assert holds(second)
    s3.behave()
    assert not holds(first)


def test_the_end_of_one_server_leaves_it_to_the_others_of_the_database(s3, of_database, owner):
    first, second = of_database("one"), of_database("one")
    first.start()
    wait_until(first.is_held)
    first.close()
    assert s3.requests("OwnerDeleteObject") == []
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

    of_database("one").confirm()
    script = of_database(ask)
    release = script._release
    script._release = lambda: (release(), released.set())
    script.start()
    assert asked.wait(SOON)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(script.close)
        wait_until(script._ending.is_set)
        answer.set()
        closing.result()
    script._thread.join(SOON)
    assert owner()["database"] == "one"
    assert s3.requests("OwnerDeleteObject") == []
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
        first.confirm()
    write = second._bucket.write_owner

    def overtaken(data, instead_of):
        monkeypatch.setattr(second._bucket, "write_owner", write)
        first.confirm()
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
    living.confirm()
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
        lease.confirm()
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
    wait_until(lease.is_held)
    assert holds(lease)
