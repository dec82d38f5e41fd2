"""One process with its object records in a database of RelStorage and its blobs in S3."""

import contextlib
import gc as garbage
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
import ZODB
from BTrees.Length import Length
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorageRestoreable, IMVCCStorage, IStorageUndoable
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError, ReadOnlyHistoryError, StorageError
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import p64

from tests.support.mariadb import PASSWORD, MariaDB
from tests.support.postgresql import PostgreSQL
from tests.support.relstorage_databases import IMPORTS, Application, Database, keys, kinds, needs
from tests.support.sites import Site, contents, get, names, put, undo
from tests.support.speed import slow, slow_after, slow_but
from tests.support.zeo_server import CONFIG, SECTION, free_address
from zodb_s3blobs.s3.keys import Keys

pytestmark = pytest.mark.usefixtures("no_pauses")

KEYS = Keys("1")  # s3-prefix is the name of the storage
LARGE = os.urandom(1 << 20)  # as much as `STAGED` has it
STAGED = {"s3_stage_threshold": "1MB"}
ZLIB = "%import zc.zlibstorage\n" + IMPORTS


def on(*among):
    """Marks a test that runs on databases of these kinds."""
    return pytest.mark.parametrize("database", kinds(*among), indirect=True)


with_history = on("sqlite-history", "postgresql-history")
history_free = on("sqlite-free", "postgresql-free", "mariadb-free")
#: For what has nothing to do with history.
one_of_each = on("sqlite-history", "postgresql-free", "mariadb-free")
the_others = on("sqlite-free", "postgresql-history")
on_sqlite = on("sqlite-history")
on_a_server = on("postgresql-free", "mariadb-free")


@pytest.fixture
def closing():
    """Closes what it is called with at the end of the test; returns it."""
    with contextlib.ExitStack() as stack:
        yield lambda opened: stack.enter_context(contextlib.closing(opened))


@pytest.fixture
def open_db(application, closing):
    """Opens a ZODB.DB; ``options`` as `Application.config`'s."""
    return lambda **options: closing(application.db(**options))


@pytest.fixture
def open_storage(application, closing):
    """Opens a storage; ``options`` as `Application.config`'s."""
    return lambda **options: closing(application.storage(**options))


@pytest.fixture
def db(open_db):
    return open_db()


@pytest.fixture
def blobs(s3, application):
    """Key -> bytes of all blobs in the bucket; staged ones are not among them."""

    def blobs():
        found = [key for key in s3.keys(application.bucket) if key.startswith(KEYS.blobs)]
        return {key: s3.client.get_object(Bucket=application.bucket, Key=key)["Body"].read() for key in found}

    return blobs


@pytest.fixture
def tidy(s3, application, tmp_path):
    """Waits until there are neither temporary files in the cache directory nor staged objects."""

    def left(cache):
        staged = [key for key in s3.keys(application.bucket) if key.startswith(KEYS.staged)]
        return staged + [name for part in ("incoming", "tmp") for name in os.listdir(tmp_path / cache / part)]

    return lambda cache="cache": eventually(lambda: left(cache) == [], lambda: left(cache))


def eventually(condition, told=lambda: None):
    """Wait until ``condition`` holds; True, so that it can be asserted."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)
    return True


def operations(s3):
    return [request.operation for request in s3.requests()]


def name_of(db, name):
    """The (oid, tid) of the blob ``name`` of the root, as it is now."""
    with db.transaction() as connection:
        blob = connection.root()[name]
        blob._p_activate()
        return blob._p_oid, blob._p_serial


def keys_of(db, *names):
    """The keys of those blobs of the root, as they are now."""
    return {KEYS.key(*name_of(db, name)) for name in names}


def count(db):
    """Commit a change that has nothing to do with blobs."""
    with db.transaction() as connection:
        connection.root()["count"] = connection.root().get("count", 0) + 1


@pytest.fixture
def store(new_file):
    """Stores blobs, oid -> the bytes of each time it is stored, in one transaction of a storage; returns its tid."""

    def store(storage, stored, oldserial=ZERO):
        trans = TransactionMetaData()
        storage.tpc_begin(trans)
        for oid, files in stored.items():
            for data in files:
                storage.storeBlob(oid, oldserial, zodb_pickle(Blob()), new_file(data), "", trans)
        storage.tpc_vote(trans)
        return storage.tpc_finish(trans)

    return store


# Commit and read


def test_it_promises_what_relstorage_promises_and_blobs_besides(application, open_storage):
    storage = open_storage()
    assert IMVCCStorage.providedBy(storage)
    assert IBlobStorageRestoreable.providedBy(storage)
    assert IStorageUndoable.providedBy(storage) == application.database.history


def test_a_small_blob_is_one_put_and_read_from_the_cache(db, s3, blobs, tidy):
    s3.forget()
    put(db, "blob", b"small")
    assert get(db, "blob") == b"small"
    assert operations(s3) == ["PutObject"]
    assert blobs() == {KEYS.key(*name_of(db, "blob")): b"small"}
    assert tidy()


@one_of_each
def test_another_cache_gets_it_with_one_get(db, open_db, s3):
    put(db, "blob", b"small")
    other = open_db(cache="other")
    s3.forget()
    assert [get(other, "blob"), get(other, "blob")] == [b"small"] * 2
    assert operations(s3) == ["GetObject"]


def test_a_large_blob_is_staged_then_copied_and_then_deleted_where_it_was_staged(open_db, s3, blobs, tidy):
    db = open_db(**STAGED)
    s3.forget()
    put(db, "blob", LARGE)
    assert get(db, "blob") == LARGE
    assert tidy()
    assert operations(s3) == ["PutObject", "CopyObject", "DeleteObject"]
    assert KEYS.staged in s3.requests("PutObject")[0].path
    assert blobs() == {KEYS.key(*name_of(db, "blob")): LARGE}


@one_of_each
def test_what_is_staged_in_parts_is_the_same(open_db, s3, blobs):
    db = open_db(**STAGED)
    s3.forget()
    put(db, "blob", LARGE * 9)
    assert blobs() == {KEYS.key(*name_of(db, "blob")): LARGE * 9}
    assert operations(s3).count("UploadPart") == 2
    assert "CopyObject" in operations(s3)


@one_of_each
def test_without_a_stage_threshold_a_large_blob_is_one_put_too(open_db, s3, blobs):
    db = open_db(s3_stage_threshold="0")
    s3.forget()
    put(db, "blob", LARGE)
    assert blobs() == {KEYS.key(*name_of(db, "blob")): LARGE}
    assert operations(s3) == ["PutObject"]


@pytest.mark.parametrize(("operation", "size"), [("PutObject", 1), ("UploadPart", 9)])
@one_of_each
def test_nobody_waits_for_the_upload_of_a_large_blob(open_db, s3, background, operation, size):
    db = open_db(**STAGED)
    count(db)
    s3.misbehave(operation=operation, hang=True)
    large = background(put, db, "blob", LARGE * size)
    s3.wait_for(operation)
    with db.transaction() as connection:
        connection.add(Length(1))  # not the root, with which the other one would conflict
    assert s3.requests(operation)[0].status is None
    assert not large.done()
    s3.behave()
    large.result(60)
    assert get(db, "blob") == LARGE * size


@one_of_each
def test_an_empty_blob_and_many_in_one_transaction(db, open_db, blobs):
    committed = {str(number): b"%d" % number * number for number in range(20)}
    with db.transaction() as connection:
        for name, data in committed.items():
            connection.root()[name] = Blob(data)
    other = open_db(cache="other")
    assert {name: get(other, name) for name in committed} == committed
    assert len(blobs()) == 20


@one_of_each
def test_a_rolled_back_savepoint_takes_its_blobs_with_it(open_db, s3, blobs, tidy):
    db = open_db(**STAGED)
    s3.forget()
    with db.transaction() as connection:
        root = connection.root()
        root["kept"], root["changed"] = Blob(b"kept"), Blob(LARGE)
        savepoint = connection.transaction_manager.savepoint()
        root["dropped"] = Blob(LARGE[::-1])
        connection.transaction_manager.savepoint()
        with root["changed"].open("w") as file:
            file.write(b"changed")
        savepoint.rollback()
    assert (get(db, "kept"), get(db, "changed")) == (b"kept", LARGE)
    with db.transaction() as connection:
        assert "dropped" not in connection.root()
    assert sorted(blobs().values()) == sorted([b"kept", LARGE])
    assert tidy()
    assert len(s3.requests("PutObject")) == 2  # what was rolled back was never sent


@pytest.mark.parametrize("earlier", slow_but(LARGE, of=[b"earlier", LARGE]), ids=["small", "large"])
@pytest.mark.parametrize("later", [b"later", LARGE[::-1]], ids=["small", "large"])
@on_sqlite
def test_of_a_blob_stored_twice_in_one_transaction_the_later_one_stays(
    open_storage, store, blobs, tidy, earlier, later
):
    storage = open_storage(**STAGED)
    oid = storage.new_oid()
    tid = store(storage, {oid: [earlier, later]})
    assert Path(storage.loadBlob(oid, tid)).read_bytes() == later
    assert blobs() == {KEYS.key(oid, tid): later}
    assert tidy()


@slow
@the_others
def test_threads_commit_blobs_at_once(open_db, background, blobs, tidy):
    db = open_db(**STAGED)
    with db.transaction() as connection:
        connection.root()["blobs"] = [Blob() for number in range(5)]

    def commit(number):
        for turn in range(3):
            with db.transaction() as connection, connection.root()["blobs"][number].open("w") as file:
                file.write(b"%d %d" % (number, turn) + LARGE * (number % 2))

    for committed in [background(commit, number) for number in range(5)]:
        committed.result(60)
    with db.transaction() as connection:
        for number, blob in enumerate(connection.root()["blobs"]):
            with blob.open() as file:
                assert file.read() == b"%d 2" % number + LARGE * (number % 2)
    assert len(blobs()) == 20
    assert tidy()


# Conflicts


def two_connections(db):
    return [db.open(transaction_manager=transaction.TransactionManager(explicit=False)) for _ in range(2)]


@one_of_each
def test_a_conflict_over_a_blob_leaves_nothing_and_a_retry_succeeds(open_db, blobs, tidy):
    db = open_db(**STAGED)
    put(db, "blob", b"before")
    one, two = two_connections(db)
    for connection, data in (one, b"one"), (two, LARGE):
        with connection.root()["blob"].open("w") as file:
            file.write(data)
    one.transaction_manager.commit()
    before = blobs()
    with pytest.raises(ConflictError):
        two.transaction_manager.commit()
    two.transaction_manager.abort()
    assert tidy()
    assert blobs() == before
    with two.root()["blob"].open("w") as file:
        file.write(LARGE)
    two.transaction_manager.commit()
    assert get(db, "blob") == LARGE


@the_others
def test_a_resolved_conflict_commits_the_blobs_of_both(open_db, blobs, tidy):
    db = open_db(**STAGED)
    with db.transaction() as connection:
        connection.root().update(length=Length(), one=Blob(b""), two=Blob(b""))
    one, two = two_connections(db)
    for connection, name, data, number in (one, "one", b"one", 1), (two, "two", LARGE, 10):
        connection.root()["length"].change(number)
        with connection.root()[name].open("w") as file:
            file.write(data)
    one.transaction_manager.commit()
    two.transaction_manager.commit()
    assert (get(db, "one"), get(db, "two")) == (b"one", LARGE)
    with db.transaction() as connection:
        assert connection.root()["length"]() == 11
    assert sorted(blobs().values()) == sorted([b"", b"", b"one", LARGE])
    assert tidy()


@with_history
def test_what_relstorage_gave_up_leaves_nothing_when_the_next_transaction_begins(open_storage, store, blobs, tidy):
    storage = open_storage(**STAGED)
    oid = storage.new_oid()
    first = store(storage, {oid: [b"first"]})
    second = store(storage, {oid: [b"second"]}, first)
    with pytest.raises(ConflictError):
        store(storage, {oid: [LARGE]}, first)  # and nobody calls tpc_abort
    third = store(storage, {oid: [b"third"]}, second)
    assert tidy()
    revisions = {first: b"first", second: b"second", third: b"third"}
    assert blobs() == {KEYS.key(oid, tid): data for tid, data in revisions.items()}


# Transactions that fail


class Failing:
    """A data manager that comes after those of ZODB, and fails in ``phase``."""

    def __init__(self, phase, connection):
        self._phase = phase
        self.transaction_manager = connection.transaction_manager
        self.transaction_manager.get().join(self)

    def sortKey(self):
        return "~~~~"

    def _reached(self, phase):
        if phase == self._phase:
            raise RuntimeError(phase)

    def commit(self, trans):
        self._reached("commit")

    def tpc_vote(self, trans):
        self._reached("tpc_vote")

    def tpc_begin(self, trans):
        pass

    abort = tpc_finish = tpc_abort = tpc_begin


@slow
def test_another_data_manager_that_fails_after_the_vote_leaves_what_a_pack_removes(open_db, blobs, tidy, caplog):
    db, other = open_db(**STAGED), open_db(cache="other")
    put(db, "blob", b"before")
    kept = blobs()
    with pytest.raises(RuntimeError, match="tpc_vote"), db.transaction() as connection:
        for name, data in ("blob", LARGE), ("new", b"new"):
            connection.root().setdefault(name, Blob())
            with connection.root()[name].open("w") as file:
                file.write(data)
        Failing("tpc_vote", connection)
    for opened in db, other:
        assert get(opened, "blob") == b"before"
        with opened.transaction() as connection:
            assert "new" not in connection.root()
    assert tidy()
    put(db, "blob", LARGE[::-1])
    put(db, "new", b"new again")
    assert (get(other, "blob"), get(other, "new")) == (LARGE[::-1], b"new again")
    assert len(blobs()) == 5  # two of them belong to nobody
    db.pack()
    assert set(blobs()) == keys_of(db, "blob", "new")
    assert not set(kept) & set(blobs())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR and "s3blobs" in record.name]


@one_of_each
def test_a_transaction_aborted_before_the_vote_leaves_nothing(open_db, s3, blobs, tidy):
    db = open_db(**STAGED)
    put(db, "blob", b"before")
    kept = blobs()
    with pytest.raises(RuntimeError, match="commit"), db.transaction() as connection:
        with connection.root()["blob"].open("w") as file:
            file.write(LARGE)
        Failing("commit", connection)
    assert tidy()
    assert blobs() == kept
    assert get(db, "blob") == b"before"


FAILURES = {
    "small": (b"small", {}, {"status": 500, "code": "InternalError"}),
    "staging": (LARGE, {}, {"status": 500, "code": "InternalError"}),
    "timeout of small": (b"small", {"upload_timeout": "1s"}, {"hang": True}),
    "timeout of staging": (LARGE, {"upload_timeout": "1s"}, {"hang": True}),
}


@pytest.mark.parametrize(
    ("data", "options", "fault"), slow_after(2, of=FAILURES.values(), unpack=True), ids=FAILURES.keys()
)
@one_of_each
def test_an_upload_that_fails_fails_the_transaction_and_unlocks_the_database(open_db, s3, tidy, data, options, fault):
    db = open_db(**STAGED, **options)
    put(db, "blob", b"before")
    s3.misbehave(operation="PutObject", **fault)
    with pytest.raises(StorageError, match="upload-timeout" if options else "InternalError") as raised:
        put(db, "blob", data)
    assert type(raised.value) is StorageError
    began = time.monotonic()
    count(db)
    assert time.monotonic() - began < 20  # commit-lock-timeout is 60
    assert get(db, "blob") == b"before"
    s3.behave()
    assert tidy()
    put(db, "blob", data)
    assert get(db, "blob") == data


@one_of_each
def test_where_copying_fails_the_blob_is_uploaded_instead(open_db, s3, blobs, tidy):
    db = open_db(**STAGED)
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    put(db, "blob", LARGE)
    assert tidy()
    assert blobs() == {KEYS.key(*name_of(db, "blob")): LARGE}


@one_of_each
def test_where_copying_and_then_uploading_fail_the_transaction_fails(open_db, s3, blobs, tidy):
    db = open_db(**STAGED)
    count(db)
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    s3.misbehave(operation="PutObject", times=1)  # to its staging key
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    with pytest.raises(StorageError, match="InternalError"):
        put(db, "blob", LARGE)
    count(db)
    s3.behave()
    assert tidy()
    assert blobs() == {}


# Undo


@pytest.fixture
def written(open_db):
    """A database whose blob was "0" to "3", each a large one, in this order."""
    db = open_db(**STAGED)
    for number in range(4):
        put(db, "blob", b"%d" % number + LARGE)
    return db


@with_history
def test_undo_copies_the_blob_inside_the_bucket(written, open_db, s3, blobs):
    s3.forget()
    undo(written)
    assert "CopyObject" in operations(s3)
    assert not {"PutObject", "GetObject", "UploadPart"} & set(operations(s3))
    assert len(blobs()) == 5
    assert blobs()[KEYS.key(*name_of(written, "blob"))] == b"2" + LARGE
    for opened in written, open_db(cache="other"):
        assert get(opened, "blob") == b"2" + LARGE


@with_history
def test_several_undos_in_one_transaction_go_back_to_the_oldest(written, blobs):
    written.undoMultiple([entry["id"] for entry in written.undoLog(0, 2)])
    transaction.commit()
    assert get(written, "blob") == b"1" + LARGE
    assert len(blobs()) == 5


@with_history
def test_an_undo_can_be_undone(written):
    for expected in (b"2", b"3", b"2"):
        undo(written)
        assert get(written, "blob") == expected + LARGE


@on_sqlite
def test_after_an_undo_the_blob_can_be_changed_again(written):
    undo(written)
    put(written, "blob", b"new")
    assert get(written, "blob") == b"new"
    undo(written)
    assert get(written, "blob") == b"2" + LARGE


@with_history
def test_undoing_the_creation_of_a_blob_copies_nothing_and_can_be_undone(db, s3):
    count(db)
    put(db, "blob", b"data")
    name = name_of(db, "blob")
    s3.forget()
    undo(db)
    assert operations(s3) == []
    with db.transaction() as connection:
        assert "blob" not in connection.root()
        with pytest.raises(POSKeyError):
            connection.get(name[0])._p_activate()
    undo(db)
    assert get(db, "blob") == b"data"


@on_sqlite
def test_an_undo_where_copying_fails_uploads_the_blob(written, s3, blobs):
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    undo(written)
    assert blobs()[KEYS.key(*name_of(written, "blob"))] == b"2" + LARGE


@with_history
def test_an_undo_that_fails_fails_the_transaction_and_unlocks_the_database(written, s3, tidy):
    s3.misbehave(operation="CopyObject|PutObject", status=500, code="InternalError")
    with pytest.raises(StorageError, match="InternalError"):
        undo(written)
    transaction.abort()
    count(written)
    s3.behave()
    assert get(written, "blob") == b"3" + LARGE
    assert tidy()
    undo(written, 1)
    assert get(written, "blob") == b"2" + LARGE


@on_sqlite
def test_an_undo_of_what_has_no_bytes_any_more_fails(db, s3, application, open_db):
    put(db, "blob", b"before")
    key = KEYS.key(*name_of(db, "blob"))
    put(db, "blob", b"after")
    s3.client.delete_object(Bucket=application.bucket, Key=key)
    db.close()
    db = open_db(cache="empty")
    with pytest.raises(StorageError, match=key):
        undo(db)
    transaction.abort()
    assert get(db, "blob") == b"after"


# History


@with_history
def test_a_historical_connection_reads_the_old_blob_and_writes_nothing(written, open_db):
    entries = written.storage.iterator()
    tids = [records.tid for records in entries]
    entries.close()
    for opened in written, open_db(cache="other"):
        for number, tid in enumerate(tids[-4:]):
            connection = opened.open(at=tid)
            with connection.root()["blob"].open() as file:
                assert file.read() == b"%d" % number + LARGE
            connection.root()["new"] = Blob(b"new")
            with pytest.raises(ReadOnlyHistoryError):
                transaction.commit()
            transaction.abort()
            connection.close()
        connection = opened.open(before=tids[-4])
        assert "blob" not in connection.root()
        connection.close()


@with_history
def test_history_undo_log_and_iteration_tell_each_revision(written, blobs):
    oid, tid = name_of(written, "blob")
    history = written.storage.history(oid, size=10)
    assert history[0]["tid"] == tid
    assert len(history) == 4
    assert len(written.undoLog(0, 10)) >= 4
    assert {KEYS.key(*name) for name in names(written.storage)} == set(blobs())
    assert {data[:1] for data in contents(written.storage, names(written.storage)).values()} == set(
        map(bytes, zip(b"0123", strict=True))
    )


@history_free
def test_without_history_there_is_the_current_revision_and_no_undo(db):
    for number in range(2):
        put(db, "blob", b"%d" % number)
    assert not db.supportsUndo()
    assert names(db.storage) == [name_of(db, "blob")]
    assert [entry["tid"] for entry in db.storage.history(name_of(db, "blob")[0], size=10)] == [name_of(db, "blob")[1]]


# Reading only


def section(application, base, cache="cache", **options):
    """An ``<s3blobstorage>`` section around ``base``, otherwise as `Application.config`."""
    return SECTION.format(
        name="1",
        bucket=application.bucket,
        endpoint=application.s3.url,
        dir=application.directory,
        cache=cache,
        options=keys(options),
        base=base,
    )


@one_of_each
def test_a_read_only_database_serves_blobs_and_changes_nothing(db, application, closing, s3, tidy):
    put(db, "blob", b"data")
    blob = name_of(db, "blob")
    base = application.database.section(read_only="true")
    s3.wait_for("OwnerPutObject")  # of the first database
    s3.forget()
    storage = closing(storageFromString(IMPORTS + section(application, base, "reader")))
    reader = ZODB.DB(storage)
    assert get(reader, "blob") == b"data"
    with pytest.raises(ReadOnlyError):
        put(reader, "blob", b"changed")
    with pytest.raises(ReadOnlyError):
        reader.pack()
    assert tidy("reader")
    assert Path(storage.loadBlob(*blob)).read_bytes() == b"data"
    assert not {"PutObject", "DeleteObject", "DeleteObjects"} & set(operations(s3))
    assert s3.requests("OwnerPutObject") == []


@slow
@with_history
def test_where_an_undo_stored_no_object_a_pack_keeps_what_it_may_go_back_to(written, open_db, s3, blobs, application):
    """As in a bucket of 1.2.1. RelStorage does not note what an undo goes back to."""
    undo(written)
    before = set(blobs())
    undone = KEYS.key(*name_of(written, "blob"))
    s3.client.delete_object(Bucket=application.bucket, Key=undone)
    with pytest.raises(POSKeyError):
        get(open_db(cache="other"), "blob")
    written.pack()
    assert set(blobs()) == before - {undone}
    put(written, "blob", b"new")
    written.pack()
    assert set(blobs()) == keys_of(written, "blob")


# Pack


def packed_by(db):
    """Rewrite one blob of two, forget a third, and pack; the keys that are to be in the bucket if nothing is kept."""
    put(db, "same", b"same")
    put(db, "changed", b"before")
    put(db, "gone", b"gone")
    put(db, "changed", LARGE)
    with db.transaction() as connection:
        del connection.root()["gone"]
    db.pack()
    return keys_of(db, "same", "changed")


def test_after_a_pack_exactly_the_blobs_that_live_are_in_the_bucket(db, open_db, blobs):
    live = packed_by(db)
    assert set(blobs()) == live
    other = open_db(cache="other")
    assert (get(other, "same"), get(other, "changed")) == (b"same", LARGE)


@with_history
def test_what_was_overwritten_since_the_time_of_the_pack_stays(db, blobs):
    put(db, "blob", b"0")
    put(db, "blob", b"1")
    until = time.time()
    put(db, "blob", b"2")
    put(db, "blob", b"3")
    db.pack(until)
    assert sorted(blobs().values()) == [b"1", b"2", b"3"]
    undo(db)
    undo(db, 2)
    assert get(db, "blob") == b"1"


@history_free
def test_without_history_what_was_overwritten_goes_with_any_pack(db, blobs):
    put(db, "blob", b"0")
    until = time.time()
    put(db, "blob", b"1")
    db.pack(until)
    assert list(blobs().values()) == [b"1"]


@slow
@one_of_each
def test_gc_retention_keeps_dead_blobs(open_db, blobs, s3, application):
    db = open_db(gc_retention="30d")
    packed_by(db)
    assert sorted(blobs().values()) == sorted([b"same", b"before", b"gone", LARGE])
    assert KEYS.marks in s3.keys(application.bucket)
    db.close()
    db = open_db()
    db.pack()
    assert set(blobs()) == keys_of(db, "same", "changed")


@slow
def test_a_connection_older_than_a_pack_reads_what_still_lives(db, open_db, caplog):
    other = open_db(cache="other")
    put(db, "same", b"same")
    put(db, "blob", b"before")
    connection = other.open(transaction_manager=transaction.TransactionManager())
    blob, same = connection.root()["blob"], connection.root()["same"]
    put(db, "blob", b"after")
    db.pack()
    with same.open() as file:
        assert file.read() == b"same"
    with pytest.raises(POSKeyError):
        blob.open()
    connection.sync()
    with blob.open() as file:
        assert file.read() == b"after"
    # It is no loss of data, and nobody is to be called at night because of it.
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR and "s3blobs" in record.name]


@slow
@one_of_each
def test_a_pack_spares_what_is_being_committed(open_db, s3, background, blobs):
    db = open_db(**STAGED)
    put(db, "other", b"other")
    s3.misbehave(operation="PutObject", hang=True)
    committed = background(put, db, "blob", LARGE)
    s3.wait_for("PutObject")
    db.pack()
    s3.behave()
    committed.result(60)
    assert get(db, "blob") == LARGE
    assert set(blobs()) == keys_of(db, "other", "blob")


class Calling(Failing):
    """Calls ``function`` when the database has voted; nothing fails."""

    def __init__(self, function, connection):
        super().__init__(None, connection)
        self._function = function

    def tpc_vote(self, trans):
        self._function()


@the_others
def test_garbage_collection_beside_it_spares_what_has_been_voted_for(db, open_storage, blobs):
    put(db, "blob", b"before")
    beside = open_storage(cache="other")
    seen = []

    def collect():
        seen.append(len(blobs()))
        beside.collect_garbage()

    with db.transaction() as connection:
        connection.root()["new"] = Blob(b"new")
        Calling(collect, connection)
    assert seen == [2]
    assert set(blobs()) == keys_of(db, "blob", "new")


@on_a_server
def test_a_pack_whose_garbage_collection_fails_says_so_and_the_next_one_goes_on(db, s3, blobs):
    put(db, "blob", b"before")
    put(db, "blob", b"after")
    s3.misbehave(operation="ListObjects", status=500, code="InternalError")
    with pytest.raises(StorageError, match=r"The database was packed, but .* InternalError"):
        db.pack()
    s3.behave()
    count(db)
    db.pack()
    assert set(blobs()) == keys_of(db, "blob")


# RelStorage's own scripts


def script(module, *arguments, status=0):
    """Run a script of RelStorage to its end; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"relstorage.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    assert "test-secret" not in done.stdout
    return done.stdout


@slow
@the_others
def test_zodbpack_deletes_dead_blobs_beside_a_process_that_serves(db, application, blobs, tmp_path):
    config = tmp_path / "pack.conf"
    config.write_text(IMPORTS + application.config(cache="pack"))
    put(db, "blob", b"before")
    put(db, "blob", b"after")
    dead = len(blobs())
    if application.database.history:
        script("zodbpack", "--days=-1", "--prepack", config)
        assert len(blobs()) == dead
        script("zodbpack", "--days=-1", "--use-prepack-state", config)
    else:
        script("zodbpack", "--days=-1", config)
    assert set(blobs()) == keys_of(db, "blob")
    assert get(db, "blob") == b"after"


@slow
@on_sqlite
def test_zodbpack_checks_references_without_changing_anything(db, application, tmp_path):
    config = tmp_path / "pack.conf"
    config.write_text(IMPORTS + application.config(cache="pack"))
    put(db, "blob", b"data")
    script("zodbpack", "--check-refs-only", config)
    assert get(db, "blob") == b"data"
    assert len(names(db.storage)) == 1


def named(text, name):
    """The text of a section with that name, as the first one in it."""
    kind, rest = text.strip().removeprefix("<").split(">", 1)
    return f"<{kind.split()[0]} {name}>{rest}\n"


class Place:
    """Where a database and its blobs are; ``text`` is the section of its storage."""

    def __init__(self, text, directory):
        self.text, self.directory = text, directory

    def open(self):
        return storageFromString(ZLIB + self.text)

    def everything(self, current=False):
        """Each transaction: its tid and description, and each record: oid, tid, data and the bytes of a blob."""
        with contextlib.closing(self.open()) as storage:
            blobs = contents(storage, names(storage))
            found = {}
            for records in storage.iterator():
                about = (records.user, records.description, records.extension, records.status)
                for record in records:
                    name = record.oid, record.tid
                    found[name] = (about, record.data, blobs.get(name))
            if current:  # and without what is no part of a history-free database
                latest = {oid: max(tid for other, tid in found if other == oid) for oid, _ in found}
                return {name: found[name][1:] for name in latest.items()}
            return found


@pytest.fixture
def convert(tmp_path):
    """Runs zodbconvert from one `Place` to another; returns what it printed."""

    def convert(source, destination, *arguments, status=0):
        config = tmp_path / "convert.conf"
        config.write_text(ZLIB + named(source.text, "source") + named(destination.text, "destination"))
        return script("zodbconvert", *arguments, config, status=status)

    return convert


@pytest.fixture
def places(application, s3, tmp_path):
    """Where a database can be: a FileStorage as there are many, two others, and the database of RelStorage."""
    site = Site(tmp_path)
    site.grow()
    with contextlib.closing(ZODB.DB(site.open())) as db:
        put(db, "large", LARGE)
        with db.transaction() as connection:
            del connection.root()["three"]
        undo(db)  # a creation and a deletion that come to nothing
    back = tmp_path / "back"
    back.mkdir()
    files = "<filestorage>\n path {0}/Data.fs\n blob-dir {0}/blobs\n</filestorage>"
    in_s3 = section(application, f"<filestorage>\n path {tmp_path}/s3.fs\n</filestorage>", "files", **STAGED)
    return SimpleNamespace(
        files=Place(files.format(tmp_path), tmp_path),
        back=Place(files.format(back), back),
        s3_files=Place(in_s3.replace("s3-prefix 1", "s3-prefix files"), tmp_path),
        relstorage=Place(application.config(**STAGED), tmp_path),
    )


@slow
@the_others
def test_zodbconvert_moves_a_filestorage_in_and_out_with_all_its_blobs(places, convert, application, blobs):
    original = places.files.everything()
    assert len({data for _, _, data in original.values() if data is not None}) > 4
    convert(places.files, places.relstorage)
    if application.database.history:
        assert places.relstorage.everything() == original
        assert len(blobs()) == len([data for _, _, data in original.values() if data is not None])
    else:
        assert places.relstorage.everything(current=True) == places.files.everything(current=True)
    convert(places.relstorage, places.back)
    assert places.back.everything(current=True) == places.files.everything(current=True)
    if application.database.history:
        assert places.back.everything() == original


@slow
@on_sqlite
def test_zodbconvert_moves_between_two_databases_with_blobs_in_s3(places, convert, application):
    convert(places.files, places.s3_files)
    convert(places.s3_files, places.relstorage)
    (places.s3_files.directory / "s3.fs").unlink()
    convert(places.relstorage, places.s3_files)
    everything = [place.everything(current=True) for place in (places.files, places.s3_files, places.relstorage)]
    assert everything[0] == everything[1] == everything[2]
    if application.database.history:
        assert places.files.everything() == places.s3_files.everything() == places.relstorage.everything()


@on("postgresql-free")  # in MariaDB, clearing makes other tables, to which the prefix does not belong
def test_zodbconvert_refuses_a_destination_with_data_unless_it_is_to_be_cleared(places, convert, blobs):
    convert(places.files, places.relstorage)
    with contextlib.closing(ZODB.DB(places.relstorage.open())) as db:
        put(db, "more", b"more")
    assert "has data" in convert(places.files, places.relstorage, status=1)
    convert(places.files, places.relstorage, "--clear")
    assert places.relstorage.everything(current=True) == places.files.everything(current=True)
    with contextlib.closing(ZODB.DB(places.relstorage.open())) as db:
        put(db, "last", b"last")
        db.pack()
        assert b"more" not in blobs().values()
        assert {KEYS.key(*name) for name in names(db.storage)} == set(blobs())


@slow
@on_sqlite
def test_zodbconvert_goes_on_where_it_ended(places, convert):
    convert(places.files, places.relstorage, "--incremental")
    with contextlib.closing(ZODB.DB(places.files.open())) as db:
        put(db, "one", b"later")
        put(db, "later", LARGE[::-1])
    convert(places.files, places.relstorage, "--incremental")
    assert places.relstorage.everything(current=True) == places.files.everything(current=True)


# Restoring


@pytest.fixture
def restore(new_file):
    """Restores blobs, oid -> bytes, as of ``tid``, in one transaction of a storage; ``end`` is a method of it."""

    def restore(storage, tid, restored, end="tpc_finish"):
        trans = TransactionMetaData()
        storage.tpc_begin(trans, tid, " ")
        for oid, data in restored.items():
            storage.restoreBlob(oid, tid, zodb_pickle(Blob()), new_file(data), None, trans)
        storage.tpc_vote(trans)
        getattr(storage, end)(trans)

    return restore


OLD = p64(0x03B0000000000000)  # a tid of the year 2010 or so


@the_others
def test_a_restored_blob_is_that_of_the_serial_given(open_storage, restore, blobs, tidy, s3):
    storage = open_storage(**STAGED)
    oid = storage.new_oid()
    s3.forget()
    restore(storage, OLD, {oid: LARGE})
    assert Path(storage.loadBlob(oid, OLD)).read_bytes() == LARGE
    assert blobs() == {KEYS.key(oid, OLD): LARGE}
    assert operations(s3).count("PutObject") == 1
    assert tidy()


@one_of_each
def test_what_is_in_the_bucket_already_is_restored_without_an_upload(open_storage, restore, s3, blobs):
    storage = open_storage()
    oid = storage.new_oid()
    restore(storage, OLD, {oid: b"data"}, end="tpc_abort")
    assert blobs() == {KEYS.key(oid, OLD): b"data"}
    s3.forget()
    restore(storage, OLD, {oid: b"data"})
    assert s3.requests("PutObject") == []
    assert Path(storage.loadBlob(oid, OLD)).read_bytes() == b"data"


@one_of_each
def test_a_restore_whose_upload_fails_fails_and_can_be_repeated(open_storage, restore, s3, tidy):
    storage = open_storage()
    oid = storage.new_oid()
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    with pytest.raises(StorageError, match="InternalError"):
        restore(storage, OLD, {oid: b"data"})
    storage.tpc_abort(storage._pending.transaction)
    assert tidy()
    s3.behave()
    restore(storage, OLD, {oid: b"data"})
    assert Path(storage.loadBlob(oid, OLD)).read_bytes() == b"data"


@pytest.fixture
def source(tmp_path, closing):
    """A storage with a history, whose blobs are in files."""
    directory = tmp_path / "source"
    directory.mkdir()
    site = Site(directory)
    site.grow(large=len(LARGE))
    return closing(site.open())


def test_all_transactions_of_another_storage_can_be_copied_with_their_blobs(application, open_storage, source, tidy):
    storage = open_storage(**STAGED)
    storage.copyTransactionsFrom(source)
    copied, original = (contents(one, names(one)) for one in (storage, source))
    assert copied
    if application.database.history:
        assert copied == original
    else:
        db = ZODB.DB(source)
        assert get(db, "one") in copied.values()
        assert copied.items() <= original.items()
    assert tidy()


@slow
@one_of_each
def test_a_copy_that_fails_raises_leaves_nothing_and_can_be_repeated(application, open_storage, source, s3, tidy):
    storage = open_storage()
    s3.misbehave(operation="PutObject", times=2)
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    with pytest.raises(StorageError, match="InternalError"):
        storage.copyTransactionsFrom(source)
    s3.behave()
    assert tidy()
    storage.zap_all()
    storage.copyTransactionsFrom(source)
    assert contents(storage, names(storage)).items() <= contents(source, names(source)).items()


# zlibstorage


WRAPPED = {
    "inside": lambda application: section(
        application, f"<zlibstorage>\n{application.database.section()}\n</zlibstorage>", **STAGED
    ),
    "outside": lambda application: f"<zlibstorage>\n{application.config(**STAGED)}\n</zlibstorage>",
}


@pytest.mark.parametrize("where", slow_after(1, of=WRAPPED))
@one_of_each
def test_zlibstorage_is_no_obstacle(application, closing, blobs, where):
    text = ZLIB + WRAPPED[where](application)
    db = ZODB.DB(closing(storageFromString(text)))
    with db.transaction() as connection:
        connection.root()["text"] = "to be compressed " * 1000
    for data in (b"before", LARGE, b"after"):
        put(db, "blob", data)
    if application.database.history:
        undo(db)
        assert get(db, "blob") == LARGE
        connection = db.open(before=name_of(db, "blob")[1])
        with connection.root()["blob"].open() as file:
            assert file.read() == b"after"
        connection.close()
    current = get(db, "blob")
    assert contents(db.storage, names(db.storage))[name_of(db, "blob")] == current
    db.pack()
    assert blobs() == {KEYS.key(*name_of(db, "blob")): current}
    db.close()
    again = ZODB.DB(closing(storageFromString(text)))
    assert get(again, "blob") == current
    with again.transaction() as connection:
        assert connection.root()["text"] == "to be compressed " * 1000


@pytest.mark.parametrize("where", slow_after(1, of=WRAPPED))
@on_sqlite
def test_zlibstorage_takes_transactions_of_another_storage(application, closing, source, where):
    storage = closing(storageFromString(ZLIB + WRAPPED[where](application)))
    storage.copyTransactionsFrom(source)
    assert contents(storage, names(storage)) == contents(source, names(source))
    db, original = ZODB.DB(storage), ZODB.DB(source)
    assert get(db, "three") == get(original, "three")


# Life and death


@the_others
def test_a_database_can_be_closed_twice_and_opened_again(application):
    for _ in range(2):
        db = application.db()
        put(db, "blob", b"data")
        assert get(db, "blob") == b"data"
        db.close()
        db.close()


def connections_of(database):
    """How many connections the server has to it; 0 on SQLite, whose connections are open files."""
    return 0 if database.sqlite else database.server.connections(database.name)


def in_use(database):
    garbage.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), connections_of(database)


@slow
@one_of_each
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell what a process has open")
def test_released_instances_and_packs_leave_neither_threads_nor_files_nor_connections(application, store):
    with contextlib.closing(application.storage()) as storage:

        def use():
            instance = storage.new_instance()
            instance.poll_invalidations()
            oid = instance.new_oid()
            tid = store(instance, {oid: [b"data"]})
            with instance.openCommittedBlobFile(oid, tid) as file:
                assert file.read() == b"data"
            instance.release()
            storage.pack(None, lambda data: [])

        use()
        before = in_use(application.database)
        for _ in range(3):
            use()
        assert eventually(
            lambda: all(map(int.__le__, in_use(application.database), before)),
            lambda: (before, in_use(application.database)),
        )


@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell what a process has open")
@the_others
def test_a_closed_database_leaves_neither_threads_nor_files_nor_connections(application):
    def use():
        db = application.db()
        put(db, "blob", b"data")
        connections = [db.open(transaction_manager=transaction.TransactionManager()) for _ in range(3)]
        for connection in connections:
            with connection.root()["blob"].open() as file:
                assert file.read() == b"data"
            connection.close()
        db.pack()
        db.close()

    use()
    before = in_use(application.database)
    use()
    assert eventually(
        lambda: all(map(int.__le__, in_use(application.database), before)),
        lambda: (before, in_use(application.database)),
    )


# What cannot be served


def refused(text):
    """The sentence with which opening a storage is refused."""
    with pytest.raises(SystemExit) as raised:
        storageFromString(IMPORTS + text)
    sentence = str(raised.value)
    assert sentence.startswith("s3blobstorage: ")
    assert "\n" not in sentence
    assert raised.value.__cause__ is None
    return sentence


@pytest.mark.parametrize("shared", ["true", "false"])
@one_of_each
def test_a_relstorage_with_blobs_of_its_own_is_refused(application, tmp_path, shared):
    base = application.database.section(blob_dir=tmp_path / "blobs", shared_blob_dir=shared)
    assert "blob-dir" in refused(section(application, base))


@pytest.mark.parametrize("version", ["3.5.0", "4.4.0", "4.4b1", "4.10", "5"])
@on_sqlite
def test_a_version_of_relstorage_that_was_not_tested_is_refused(application, monkeypatch, version):
    monkeypatch.setattr("zodb_s3blobs.bases.relstorage.version", lambda name: version)
    assert version in refused(application.config())


@pytest.mark.parametrize("version", ["4.0.0", "4.3", "4.3.1.dev0", "4.3rc1"])
@on_sqlite
def test_versions_of_relstorage_that_were_tested_are_accepted(open_db, monkeypatch, version):
    monkeypatch.setattr("zodb_s3blobs.bases.relstorage.version", lambda name: version)
    put(open_db(), "blob", b"data")


@on_sqlite
def test_a_refused_relstorage_leaves_everything_free(application, monkeypatch, open_db):
    with monkeypatch.context() as patch:
        patch.setattr("zodb_s3blobs.bases.relstorage.version", lambda name: "99.0")
        refused(application.config())
    put(open_db(), "blob", b"data")


@one_of_each
def test_runzeo_refuses_to_serve_it_in_one_sentence(application, tmp_path):
    config = tmp_path / "zeo.conf"
    port = free_address()[1]
    storages = "%import relstorage\n" + application.config()
    config.write_text(CONFIG.format(port=port, dir=tmp_path, zeo="", storages=storages))
    done = subprocess.run(
        [sys.executable, "-m", "ZEO.runzeo", "-C", str(config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stdout + done.stderr + (tmp_path / "zeo.log").read_text()
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("s3blobstorage '1': ZEO cannot serve RelStorage")
    assert lines[0] in (tmp_path / "zeo.log").read_text()


@on_a_server
def test_the_password_of_the_database_is_told_nowhere(application, closing, caplog, s3, monkeypatch):
    caplog.set_level(logging.DEBUG, "zodb_s3blobs")
    if application.database.kind.startswith("postgresql"):  # asks for no password, and takes any
        real = PostgreSQL.dsn
        monkeypatch.setattr(PostgreSQL, "dsn", lambda self, name: f"{real(self, name)} password={PASSWORD}")
    assert PASSWORD in application.config()
    db = closing(application.db())
    put(db, "blob", b"before")
    put(db, "blob", b"after")
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    told = [repr(db.storage), str(db.storage)]
    with pytest.raises(StorageError) as raised:
        put(db, "blob", b"failed")
    told.append(str(raised.value))
    s3.behave()
    db.pack()
    with monkeypatch.context() as patch:
        patch.setattr("zodb_s3blobs.bases.relstorage.version", lambda name: "99.0")
        told.append(refused(application.config(cache="other")))
    told.append(
        refused(section(application, application.database.section(blob_dir=application.directory / "blobs"), "b"))
    )
    told.append(s3.client.get_object(Bucket=application.bucket, Key=KEYS.owner)["Body"].read().decode())
    told += [record.getMessage() for record in caplog.records if record.name.startswith("zodb_s3blobs")]
    assert PASSWORD not in "\n".join(told)


@slow
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--version=10.11.19-MariaDB", "takes MariaDB 10.11.19-MariaDB for a MySQL"),
        ("--version=5.7.44", "not with MySQL"),
        ("--sql-mode=", "make_tid_for_epoch"),
    ],
)
def test_a_server_that_relstorage_mistakes_or_that_was_not_tested_is_refused(s3, bucket_name, tmp_path, option, reason):
    needs("mariadb")
    server = MariaDB(options=[option])
    try:
        server.start()
        database = Database("mariadb-free", tmp_path, server=server)
        assert reason in refused(Application(database, s3, bucket_name, tmp_path).config())
    finally:
        server.remove()


@on("mariadb-free")
def test_a_database_with_history_is_refused_in_mariadb(application):
    """As one that an older MariaDB, which took RelStorage's tables, has left."""
    database = application.database
    for table in "transaction", "blob_chunk":
        database.server.execute(database.name, f"CREATE TABLE {table} (tid BIGINT UNSIGNED PRIMARY KEY)")
    base = database.section(create_schema="false").replace("keep-history false", "keep-history true")
    assert "keep-history false" in refused(section(application, base))
