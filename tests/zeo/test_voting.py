"""The commit lock never waits for S3, seen by stock clients of a stock runzeo."""

import os
import time

import pytest
import transaction
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, StorageError, UndoError
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import u64

from tests.support.counts import nonzero
from tests.support.speed import slow, slow_but
from tests.support.zeo_clients import (
    MB,
    RECORD,
    SOON,
    blob,
    commit_blob,
    commit_object,
    leftovers,
    operations,
    read,
    store_blob,
    wait_for,
    write,
)
from tests.support.zeo_server import scrape
from zodb_s3blobs.commit.kept import KEPT_FOR


@pytest.fixture
def server(start):
    return start(metrics=True)


def waited_with_the_lock(server):
    """How many transactions waited for S3 with the commit lock, by reason."""
    return nonzero(scrape(server.metrics_address), "s3blobs_commit_lock_waits_total")


def key(oid, tid):
    return f"1/blobs/{u64(oid):x}/{u64(tid):x}.blob"


def commit_while_hanging(s3, server, background, data=b"slow", operation="PutObject"):
    """A commit whose upload hangs; the next ones pass."""
    s3.forget()
    s3.misbehave(operation=operation, hang=True, times=1)
    answer = background(commit_blob, server.client(), data)
    s3.wait_for(operation)
    return answer


# Others commit meanwhile


def test_others_commit_while_s3_is_silent(s3, server, background):
    s3.misbehave(hang=True)
    slow = [background(commit_blob, server.client()) for _ in range(3)]
    s3.wait_for("PutObject", 3)
    other = server.client()
    started = time.monotonic()
    tids = [commit_object(other) for _ in range(20)]
    assert time.monotonic() - started < SOON
    assert not any(answer.done() for answer in slow)
    s3.behave()
    later = [answer.result(60)[1] for answer in slow]
    assert sorted(tids) == tids
    assert len({*tids, *later}) == 23
    assert waited_with_the_lock(server) == {}


def test_a_commit_without_blobs_is_older_than_the_reserved_tid_before_which_it_came(s3, server, background):
    slow = commit_while_hanging(s3, server, background)
    tid = commit_object(server.client())
    s3.behave()
    oid, later = slow.result(60)
    assert tid < later
    assert blob(server.client(), oid, later) == b"slow"
    assert operations(s3) == ["PutObject"]


def test_a_blob_that_is_stored_overtakes_one_that_is_not(s3, bucket_name, server, background):
    slow = commit_while_hanging(s3, server, background)
    oid, tid = commit_blob(server.client(), b"fast")
    s3.behave()
    other, later = slow.result(60)
    assert tid < later
    client = server.client()
    assert blob(client, oid, tid) == b"fast"
    assert blob(client, other, later) == b"slow"
    wait_for(lambda: sorted(s3.keys(bucket_name)) == sorted([key(oid, tid), key(other, later)]))
    # The slow one went to its first tid, and was copied to its second.
    assert sorted(operations(s3)) == ["CopyObject", "DeleteObject", "PutObject", "PutObject"]
    assert waited_with_the_lock(server) == {}


@slow
def test_where_copies_take_long_the_next_blob_is_copied_once(s3, server, background):
    """The first copy tells how long the next one takes, for which others let their tids lag behind the clock."""
    s3.misbehave(operation="CopyObject", latency=3)
    other, copies = server.client(), []
    for _ in range(2):
        s3.forget()
        large = background(commit_blob, server.client(), os.urandom(5 << 20))
        while not large.done():
            commit_object(other)
        large.result(60)
        copies.append(operations(s3).count("CopyObject"))
    assert copies == [2, 1]
    assert waited_with_the_lock(server) == {}


@slow
def test_who_is_overtaken_too_often_commits_with_the_lock_in_the_end(s3, bucket_name, server, background):
    """Its upload and each of its copies takes longer than others wait for it, which have many blobs each."""
    s3.misbehave(operation="PutObject", latency=3, times=1)
    s3.misbehave(operation="CopyObject", latency=5)
    late = background(commit_blob, server.client(), b"slow")
    s3.wait_for("PutObject")
    other, many = server.client(), {}
    while not late.done():
        txn, oids = TransactionMetaData(), [other.new_oid() for _ in range(40)]
        other.tpc_begin(txn)
        for oid in oids:
            store_blob(other, oid, b"fast", txn)
        other.tpc_vote(txn)
        many |= dict.fromkeys(oids, other.tpc_finish(txn))
    oid, tid = late.result(60)
    assert waited_with_the_lock(server) == {"overtaken": 1}
    assert operations(s3).count("CopyObject") == 3  # to its second and third tid, and to that of the lock
    assert blob(server.client(), oid, tid) == b"slow"
    wait_for(lambda: set(s3.keys(bucket_name)) == {key(*name) for name in [*many.items(), (oid, tid)]})


def test_after_a_client_has_vanished_before_the_lock_nothing_is_left(s3, bucket_name, server, background):
    s3.misbehave(operation="PutObject", hang=True)
    writer = server.client()
    slow = background(commit_blob, writer)
    s3.wait_for("PutObject")
    writer.close()
    with pytest.raises((ClientDisconnected, StorageError)):
        slow.result(60)
    s3.behave()
    oid, tid = commit_blob(server.client(), b"next")
    wait_for(lambda: s3.keys(bucket_name) == [key(oid, tid)])
    assert leftovers(server) == []


# What cannot be whole, and what comes later


def test_a_transaction_whose_blob_has_not_arrived_whole_is_refused(s3, bucket_name, server):
    """The stock server commits it without the blob."""
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(client.new_oid(), ZERO, RECORD, "", txn)
    client._async("storeBlobStart")
    client._async("storeBlobChunk", b"half")
    with pytest.raises(StorageError, match="has not arrived whole"):
        client.tpc_vote(txn)
    client.tpc_abort(txn)
    commit_blob(client)
    assert len(s3.keys(bucket_name)) == 1
    assert leftovers(server) == []


def undo_and_store(server, undo_first):
    """Commit a transaction that undoes the last change of a blob and stores it, in one order or the other."""
    db = server.db()
    write(db, "blob", b"one")
    write(db, "blob", b"two")
    with db.transaction() as connection:
        found = connection.root()["blob"]
        found._p_activate()
        oid, serial = found._p_oid, found._p_serial
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    steps = [
        lambda: client.undo(db.undoLog(0, 1)[0]["id"], txn),
        lambda: store_blob(client, oid, b"three", txn, serial),
    ]
    for step in steps if undo_first else reversed(steps):
        step()
    try:
        client.tpc_vote(txn)
    except UndoError:
        client.tpc_abort(txn)
        raise
    client.tpc_finish(txn)


def test_a_blob_that_is_stored_after_the_undo_wins(server):
    undo_and_store(server, undo_first=True)
    assert read(server.db(), "blob") == b"three"


def test_an_undo_after_a_blob_was_stored_is_refused_as_by_a_plain_filestorage(s3, bucket_name, server):
    with pytest.raises(UndoError):
        undo_and_store(server, undo_first=False)
    assert read(server.db(), "blob") == b"two"
    wait_for(lambda: len(s3.keys(bucket_name)) == 2 and not leftovers(server))


def test_of_two_blobs_of_one_object_in_a_transaction_the_later_one_wins(s3, bucket_name, server):
    client = server.client()
    oid, txn = client.new_oid(), TransactionMetaData()
    client.tpc_begin(txn)
    store_blob(client, oid, b"first" * MB, txn)
    store_blob(client, oid, b"second", txn)
    client.tpc_vote(txn)
    tid = client.tpc_finish(txn)
    assert blob(server.client(), oid, tid) == b"second"
    wait_for(lambda: s3.keys(bucket_name) == [key(oid, tid)] and not leftovers(server))


# Conflicts


class Account(Persistent):
    """Resolves conflicts, and says in which process."""

    value = 0
    resolved_by = None

    def _p_resolveConflict(self, old, saved, new):
        return {"value": saved["value"] + new["value"] - old.get("value", 0), "resolved_by": os.getpid()}


@pytest.mark.parametrize("at_the_client", [True, False])
def test_conflicts_are_resolved_where_the_option_says(start, at_the_client):
    server = start(zeo={"client_conflict_resolution": str(at_the_client).lower()})
    db = server.db()
    with db.transaction() as connection:
        connection.root()["account"] = Account()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    accounts = [database.open(manager).root() for database, manager in ((db, one), (server.db(), two))]
    for root in accounts:
        root["account"].value += 1
    accounts[1]["account"].blob = None
    one.commit()
    two.commit()
    with server.db().transaction() as connection:
        account = connection.root()["account"]
        assert account.value == 2
        assert (account.resolved_by == os.getpid()) == at_the_client


def test_the_blobs_of_a_second_vote_are_copied_and_not_sent_again(s3, bucket_name, start):
    server = start(zeo={"client_conflict_resolution": "true"})
    db = server.db()
    with db.transaction() as connection:
        connection.root()["account"] = Account()
        connection.root()["holder"] = PersistentMapping()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    first, second = db.open(one).root(), server.db().open(two).root()
    first["account"].value += 1
    second["account"].value += 1
    second["holder"]["blob"] = Blob(b"large" * MB)
    one.commit()
    s3.forget()
    two.commit()
    with server.db().transaction() as connection, connection.root()["holder"]["blob"].open() as file:
        assert file.read() == b"large" * MB
    sent = [operation for operation in operations(s3) if operation in ("PutObject", "CreateMultipartUpload")]
    assert sent == ["CreateMultipartUpload"] or sent == ["PutObject"]
    wait_for(lambda: len(s3.keys(bucket_name)) == 1 and not leftovers(server))


def test_a_conflict_over_a_blob_is_found_before_anything_is_sent(s3, server):
    client, other = server.client(), server.client()
    oid, _ = commit_blob(client, b"one")
    s3.forget()
    txn = TransactionMetaData()
    other.tpc_begin(txn)
    store_blob(other, oid, b"two", txn, ZERO[:-1] + b"\1")
    with pytest.raises(ConflictError):
        other.tpc_vote(txn)
    other.tpc_abort(txn)
    assert operations(s3) == []


def test_a_conflict_in_a_transaction_with_a_status_holds_up_nobody(background, server):
    """Such a transaction begins with a tid of the base's own, and so leaves the one that is reserved for it unused."""
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn, None, "p")
    oid, _ = commit_blob(server.client(), b"other")
    client.store(oid, ZERO, RECORD, "", txn)
    store_blob(client, client.new_oid(), b"data", txn)
    with pytest.raises(ConflictError):
        client.tpc_vote(txn)
    client.tpc_abort(txn)
    assert background(commit_blob, server.client()).result(SOON)


@pytest.mark.parametrize("at_the_client", slow_but(False, of=[False, True]))
def test_the_retry_after_a_conflict_sends_no_large_blob_again(s3, bucket_name, start, at_the_client):
    """A conflict over another object, which shows after the upload; the client is to resolve it, and cannot."""
    server = start(zeo={"client_conflict_resolution": str(at_the_client).lower()})
    client = server.client()
    oid = client.new_oid()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(oid, ZERO, zodb_pickle(Persistent()), "", txn)
    client.tpc_vote(txn)
    tid = client.tpc_finish(txn)
    data = os.urandom(12 * MB)
    kept_until = time.monotonic() + KEPT_FOR

    def commit(serial):
        txn = TransactionMetaData()
        client.tpc_begin(txn)
        new = client.new_oid()
        client.store(oid, serial, zodb_pickle(Persistent()), "", txn)
        store_blob(client, new, data, txn)
        try:
            client.tpc_vote(txn)
        except ConflictError:
            client.tpc_abort(txn)
            raise
        return new, client.tpc_finish(txn)

    with pytest.raises(ConflictError):
        commit(ZERO[:-1] + b"\1")
    wait_for(lambda: not leftovers(server))
    s3.forget()
    found = commit(tid)
    if time.monotonic() < kept_until:  # else the machine is so slow that the upload has been deleted, as it should
        assert {"UploadPart", "PutObject"}.isdisjoint(operations(s3))
    assert blob(server.client(), *found) == data
    assert key(*found) in s3.keys(bucket_name)


# Fairness


@slow
def test_a_small_commit_does_not_queue_behind_a_bulk_import(s3, server, background):
    client, other = server.client(), server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    for _ in range(1000):
        store_blob(client, client.new_oid(), os.urandom(100), txn)
    s3.misbehave(operation="PutObject", latency=0.2)
    vote = background(client.tpc_vote, txn)
    s3.wait_for("PutObject", 16)
    for _ in range(3):
        started = time.monotonic()
        commit_blob(other)
        assert time.monotonic() - started < 3
    assert not vote.done()
    s3.behave()
    vote.result(60)
    client.tpc_finish(txn)
