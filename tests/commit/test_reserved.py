"""Blobs whose transaction reserves a tid: they are at their final keys before the commit lock is asked for."""

import pytest
from ZODB.utils import p64

from tests.support.commits import (
    begin,
    begin_reserved,
    cleaned_up,
    commit_reserved,
    overtake,
    reserve,
)
from tests.support.zeo_clients import operations
from zodb_s3blobs.commit.pending import Pending
from zodb_s3blobs.s3.errors import BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, OTHER_OID, OLD_TID = p64(1), p64(9), p64(2)
OLD_KEY = "blobs/1/2.blob"


@pytest.fixture
def pending(commits):
    return Pending(commits)


@pytest.fixture
def key(commits):
    return commits.bucket.keys.key


@pytest.fixture
def old(commits, new_file, s3):
    """A blob that is in the bucket already, at OLD_TID."""
    commits.bucket.put(OID, OLD_TID, new_file(b"old"))
    s3.forget()


@pytest.fixture
def is_wanted(commits):
    """Whether a collection leaves the blob alone."""

    def is_wanted(oid, tid):
        with commits.in_flight.deleting([(oid, tid)]) as free:
            return not free

    return is_wanted


def test_a_small_blob_takes_one_request_and_none_with_the_commit_lock(
    s3, commits, pending, send, key, stored, cached, files
):
    blobs = {p64(number): send(pending, p64(number), b"%d" % number) for number in range(16)}
    reserve(pending)
    assert operations(s3) == ["PutObject"] * 16
    tid = commit_reserved(commits, pending, blobs)
    cleaned_up(commits)
    assert operations(s3) == ["PutObject"] * 16
    assert stored() == {key(p64(number), tid): b"%d" % number for number in range(16)}
    for number in range(16):
        assert cached(p64(number), tid) == b"%d" % number
    assert files() == []


def test_what_has_arrived_stays_where_it_is_until_the_finish(commits, pending, send, files, cache):
    path = send(pending, OID, b"data")
    reserve(pending)
    begin_reserved(commits, pending)
    pending.store(OID, path)
    with open(path, "rb") as file:
        assert file.read() == b"data"


def test_what_is_stored_at_the_reserved_tid_is_not_in_flight_a_second_time(s3, commits, pending, send):
    path = send(pending, OID, b"data")
    s3.misbehave(operation="PutObject", hang=True)
    pending.reserve()
    uploads = pending.store_reserved()
    s3.wait_for("PutObject")
    s3.behave()
    uploads.wait()
    assert pending.store_reserved() is None
    commit_reserved(commits, pending, {OID: path})
    assert operations(s3) == ["PutObject"]


def test_of_two_blobs_that_arrive_for_one_object_the_later_is_sent(s3, commits, pending, send, key, stored, files):
    send(pending, OID, b"earlier")
    path = send(pending, OID, b"later")
    reserve(pending)
    tid = commit_reserved(commits, pending, {OID: path})
    cleaned_up(commits)
    assert operations(s3) == ["PutObject"]
    assert stored() == {key(OID, tid): b"later"}
    commits.cache.get(OID, tid).release()
    assert files() == []


def test_what_arrives_and_is_not_stored_is_deleted(commits, pending, send, key, stored, cache, files):
    path = send(pending, OID, b"data")
    send(pending, OTHER_OID, b"not committed")
    reserve(pending)
    assert len(stored()) == 2
    tid = commit_reserved(commits, pending, {OID: path})
    cleaned_up(commits)
    assert stored() == {key(OID, tid): b"data"}
    cache.get(OID, tid).release()
    assert files() == []
    assert cache.get(OTHER_OID, tid) is None


def test_a_failed_upload_fails_before_the_commit_lock_and_leaves_nothing(s3, commits, pending, send, stored, files):
    s3.misbehave(operation="PutObject", times=2)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", times=1)
    for number in range(8):
        send(pending, p64(number), b"data")
    with pytest.raises(BucketError, match="AccessDenied"):
        reserve(pending)
    pending.abort()
    cleaned_up(commits)
    assert stored() == {}
    assert files() == []


def test_an_abort_gives_the_reserved_tid_up_and_leaves_nothing(s3, commits, pending, send, stored, files):
    s3.misbehave(operation="PutObject", hang=True)
    send(pending, OID, b"data")
    pending.reserve()
    pending.store_reserved()
    other = commits.tids.reserve()
    commits.tids.ready(other)
    s3.wait_for("PutObject")
    assert not other.turn.done()
    pending.abort()
    assert other.turn.done() and not other.is_lost
    s3.behave()
    cleaned_up(commits)
    assert stored() == {}
    assert files() == []


# Overtaken


def test_an_overtaken_blob_is_copied_to_its_second_tid_and_its_first_key_deleted(
    s3, commits, pending, send, key, stored, cached
):
    path = send(pending, OID, b"data")
    first = reserve(pending)
    overtake(commits, pending)
    second = reserve(pending)
    assert second > first
    assert stored() == {key(OID, first): b"data", key(OID, second): b"data"}
    assert commit_reserved(commits, pending, {OID: path}) == second
    cleaned_up(commits)
    assert operations(s3) == ["PutObject", "CopyObject", "DeleteObject"]
    assert stored() == {key(OID, second): b"data"}
    assert cached(OID, second) == b"data"


def test_an_overtaken_blob_is_sent_again_where_the_service_cannot_copy(s3, commits, pending, send, key, stored):
    path = send(pending, OID, b"data")
    reserve(pending)
    overtake(commits, pending)
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    tid = reserve(pending)
    commit_reserved(commits, pending, {OID: path})
    cleaned_up(commits)
    assert operations(s3) == ["PutObject", "CopyObject", "PutObject", "DeleteObject"]
    assert stored() == {key(OID, tid): b"data"}


def test_who_is_overtaken_too_often_copies_with_the_commit_lock(s3, commits, pending, send, key, stored):
    path = send(pending, OID, b"data")
    reserve(pending)
    overtake(commits, pending)
    begin(commits, pending)
    tid = commits.tids.begin(None)
    pending.store(OID, path)
    uploads = pending.vote(tid)
    assert pending.waits_for() == "overtaken"
    uploads.wait()
    pending.finish()
    cleaned_up(commits)
    assert operations(s3) == ["PutObject", "CopyObject", "DeleteObject"]
    assert stored() == {key(OID, tid): b"data"}


def test_an_abort_deletes_the_keys_of_all_rounds(commits, pending, send, stored, files):
    send(pending, OID, b"data")
    reserve(pending)
    overtake(commits, pending)
    reserve(pending)
    assert len(stored()) == 2
    pending.abort()
    cleaned_up(commits)
    assert stored() == {}
    assert files() == []


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_the_keys_of_a_transaction_are_in_flight_until_they_have_been_cleaned_up(
    s3, commits, pending, send, is_wanted, end
):
    path = send(pending, OID, b"data")
    first = reserve(pending)
    assert is_wanted(OID, first)
    overtake(commits, pending)
    second = reserve(pending)
    assert is_wanted(OID, first) and is_wanted(OID, second)
    s3.misbehave(operation="DeleteObjects?", hang=True)
    if end == "finish":
        commit_reserved(commits, pending, {OID: path})
    else:
        pending.abort()
    s3.wait_for("DeleteObject" if end == "finish" else "DeleteObjects")
    assert is_wanted(OID, first)
    assert is_wanted(OID, second) == (end == "abort")
    s3.behave()
    cleaned_up(commits)
    assert not is_wanted(OID, first) and not is_wanted(OID, second)


# A second round, as after a conflict that the client resolves


def test_a_second_round_copies_and_does_not_send_again(s3, commits, pending, send, key, stored, cached):
    blobs = {oid: send(pending, oid, b"data") for oid in (OID, OTHER_OID)}
    reserve(pending)
    begin_reserved(commits, pending)
    pending.store(OID, blobs[OID])  # the base finds a conflict before it stores the other one
    pending.roll_back()
    reserve(pending)
    tid = commit_reserved(commits, pending, blobs)
    cleaned_up(commits)
    assert operations(s3)[:2] == ["PutObject"] * 2
    assert operations(s3)[2:4] == ["CopyObject"] * 2
    assert operations(s3)[4:] == ["DeleteObjects"]
    assert stored() == {key(oid, tid): b"data" for oid in blobs}
    assert cached(OID, tid) == b"data"


def test_what_a_second_round_replaces_is_not_committed(s3, commits, pending, send, key, stored):
    path = send(pending, OID, b"first")
    reserve(pending)
    begin_reserved(commits, pending)
    pending.store(OID, path)
    pending.roll_back()
    path = send(pending, OID, b"resolved")
    reserve(pending)
    tid = commit_reserved(commits, pending, {OID: path})
    cleaned_up(commits)
    assert operations(s3) == ["PutObject", "PutObject", "DeleteObject"]
    assert stored() == {key(OID, tid): b"resolved"}


# Undo


def test_an_undo_after_a_store_holds(s3, commits, pending, old, send, key, stored, metrics):
    path = send(pending, OID, b"new")
    reserve(pending)
    tid = begin_reserved(commits, pending)
    pending.store(OID, path)
    pending.undo(OID, OLD_TID)
    uploads = pending.vote(tid)
    assert pending.waits_for() == "undo"
    uploads.wait()
    pending.finish()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old", key(OID, tid): b"old"}


def test_an_undo_of_an_object_whose_blob_has_arrived_before_holds(commits, pending, old, send, key, stored):
    send(pending, OID, b"new")
    reserve(pending)
    tid = begin_reserved(commits, pending)
    pending.undo(OID, OLD_TID)  # and the handler leaves the store out
    pending.vote(tid).wait()
    pending.finish()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old", key(OID, tid): b"old"}


def test_a_store_after_an_undo_holds(s3, commits, pending, old, send, key, stored):
    path = send(pending, OID, b"new")
    reserve(pending)
    tid = begin_reserved(commits, pending)
    pending.undo(OID, OLD_TID)
    pending.store(OID, path)
    assert pending.vote(tid) is None
    pending.finish()
    cleaned_up(commits)
    assert operations(s3) == ["PutObject"]
    assert stored() == {OLD_KEY: b"old", key(OID, tid): b"new"}
