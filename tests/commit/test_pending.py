"""The blobs of one transaction: in the bucket before the vote is over, in the cache after the finish, or gone."""

import os
import shutil
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.commits import begin, cleaned_up
from tests.support.zeo_clients import operations, wait_for
from zodb_s3blobs import workers
from zodb_s3blobs.cache.files import Incoming
from zodb_s3blobs.commit.pending import Pending
from zodb_s3blobs.s3.errors import BlobNotFound, BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, OLD_TID, TID = p64(1), p64(2), p64(3)
OLD_KEY, KEY = "blobs/1/2.blob", "blobs/1/3.blob"


# Before the vote is over


def test_small_blobs_are_uploaded_in_parallel_from_the_vote_on(s3, commits, new_file, stored):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    for number in range(16):
        commit.store(p64(number), new_file(b"%d" % number))
    assert operations(s3) == []
    uploads = commit.vote(TID)
    s3.wait_for("PutObject", 16)
    s3.behave()
    uploads.wait()
    assert stored() == {f"blobs/{number:x}/3.blob": b"%d" % number for number in range(16)}


def test_storing_takes_the_file_over(commits, new_file):
    filename = new_file(b"data")
    begin(commits).store(OID, filename)
    assert not os.path.exists(filename)


def test_neither_storing_nor_voting_waits_for_s3_but_the_end_of_the_vote_does(s3, commits, new_file, stored):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    waiting = commit.vote(TID)
    s3.wait_for("PutObject")
    assert not waiting.done.done()
    with pytest.raises(BucketError):
        waiting.check()
    s3.behave()
    waiting.wait()
    assert stored() == {KEY: b"data"}


def test_a_vote_without_blobs_is_over_at_once(s3, commits):
    assert begin(commits).vote(TID) is None
    assert operations(s3) == []


def test_a_failed_upload_fails_the_vote(s3, commits, new_file):
    s3.misbehave(operation="PutObject", times=3)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", times=1)
    commit = begin(commits)
    for number in range(8):
        commit.store(p64(number), new_file(b"data"))
    with pytest.raises(BucketError, match="AccessDenied"):
        commit.vote(TID).wait()


def test_a_failed_upload_fails_the_vote_though_others_still_hang(s3, commits, new_file):
    s3.misbehave(operation="PutObject", hang=True, times=1)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", times=1)
    commit = begin(commits)
    for number in range(2):
        commit.store(p64(number), new_file(b"data"))
    with pytest.raises(BucketError, match="AccessDenied"):
        commit.vote(TID).wait()
    assert sorted(request.status or 0 for request in s3.requests("PutObject")) == [0, 403]


def test_uploads_that_take_longer_than_upload_timeout_fail_the_vote(s3, open_commits, new_file):
    s3.misbehave(hang=True)
    commit = begin(open_commits(timeout=1))
    commit.store(OID, new_file(b"data"))
    started = time.monotonic()
    with pytest.raises(BucketError, match=r"upload-timeout \(1 s\)"):
        commit.vote(TID).wait()
    assert time.monotonic() - started < 10


@pytest.fixture
def later(monkeypatch):
    """Lets so many seconds pass, as far as a deadline can tell."""
    passed = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed))
    monkeypatch.setattr(workers, "time", clock)
    return passed.append


def test_upload_timeout_does_not_count_while_a_transaction_waits_for_the_many_slow_blobs_of_another(
    s3, open_commits, new_file, stored, later
):
    commits = open_commits(concurrency=4)
    s3.misbehave(operation="PutObject", hang=True, times=4)
    slow, quick = begin(commits), Pending(commits)
    for number in range(40):
        slow.store(p64(100 + number), new_file(b"data"))
    quick.store(OID, new_file(b"data"))
    uploads_of_slow = slow.vote(p64(4))
    s3.wait_for("PutObject", 4)
    uploads = quick.vote(TID)
    later(70)  # upload-timeout is 60
    with pytest.raises(BucketError, match="upload-timeout"):
        uploads_of_slow.wait()
    assert not uploads.is_over
    s3.behave()
    uploads.wait()
    assert KEY in {request.path.partition("/")[2].partition("/")[2] for request in s3.requests("PutObject")[:8]}
    slow.abort()
    quick.finish()
    cleaned_up(commits)
    assert stored() == {KEY: b"data"}


def test_of_two_blobs_for_one_object_the_later_is_committed(s3, commits, new_file, stored, cached):
    commit = begin(commits)
    commit.store(OID, new_file(b"earlier"))
    commit.store(OID, new_file(b"later"))
    commit.vote(TID).wait()
    commit.finish()
    assert operations(s3) == ["PutObject"]
    assert stored() == {KEY: b"later"}
    assert cached(OID, TID) == b"later"


def test_nobody_sees_what_the_transaction_itself_has_replaced(commits, new_file, cache, monkeypatch):
    published = []

    def publish(incoming, *name):
        with open(incoming.path, "rb") as file:
            published.append(file.read())
        return real(incoming, *name)

    real = Incoming.publish
    monkeypatch.setattr(Incoming, "publish", publish)
    commit = begin(commits)
    commit.store(OID, new_file(b"earlier"))
    commit.store(OID, new_file(b"later"))
    commit.vote(TID).wait()
    commit.finish()
    cache.get(OID, TID).release()
    assert published == [b"later"]


# Finish


def test_finish_publishes_in_the_cache_and_makes_no_request(s3, commits, new_file, cache, files):
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    assert cache.get(OID, TID) is None
    s3.forget()
    commit.finish()
    with cache.get(OID, TID) as path, open(path, "rb") as file:
        assert file.read() == b"data"
        assert os.fstat(file.fileno()).st_mode & 0o222 == 0
    assert operations(s3) == []
    assert files() == []


def test_finish_never_raises(commits, new_file, cache, stored):
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    shutil.rmtree(cache.directory)
    commit.finish()
    assert stored() == {KEY: b"data"}


def test_what_may_have_been_committed_stays_in_the_bucket(s3, commits, new_file, cache, stored, files):
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    commit.abandon()
    cleaned_up(commits)
    assert stored() == {KEY: b"data"}
    assert files() == []
    assert cache.get(OID, TID) is None


# Abort


def test_abort_deletes_what_was_uploaded(commits, new_file, stored, files, cache):
    commit = begin(commits)
    for number in range(3):
        commit.store(p64(number), new_file(b"data"))
    commit.vote(TID).wait()
    assert len(stored()) == 3
    commit.abort()
    cleaned_up(commits)
    assert stored() == {}
    assert files() == []
    assert cache.get(OID, TID) is None


def test_abort_deletes_what_was_uploaded_though_the_answer_was_lost(s3, open_commits, new_file, stored):
    commits = open_commits(s3_max_attempts=1)
    s3.misbehave(operation="PutObject", lose=True)
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    with pytest.raises(BucketError):
        commit.vote(TID).wait()
    assert stored() == {KEY: b"data"}
    commit.abort()
    cleaned_up(commits)
    assert stored() == {}


def test_abort_waits_for_nothing_and_deletes_what_is_still_being_uploaded(s3, commits, new_file, stored, files):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID)
    s3.wait_for("PutObject")
    commit.abort()
    s3.behave()
    cleaned_up(commits)
    assert operations(s3) == ["PutObject", "DeleteObject"]
    assert s3.requests("PutObject")[0].status == 200
    assert stored() == {}
    assert files() == []


def test_abort_leaves_out_uploads_that_have_not_begun(s3, commits, new_file, stored, files):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(commits)
    for number in range(40):
        commit.store(p64(number), new_file(b"data"))
    commit.vote(TID)
    s3.wait_for("PutObject", 16)
    commit.abort()
    s3.behave()
    cleaned_up(commits)
    assert len(s3.requests("PutObject")) == 16
    assert stored() == {}
    assert files() == []


def test_abort_without_blobs_makes_no_request(s3, commits):
    begin(commits).abort()
    cleaned_up(commits)
    assert operations(s3) == []


def test_the_files_of_aborted_transactions_do_not_wait_until_s3_answers(s3, commits, new_file, files):
    """In an outage, each try of a client would leave a file on the disk, which cached blobs have to make room for."""
    s3.misbehave(operation="DeleteObject", hang=True)
    for number in range(4):  # more than the threads that delete objects
        commit = begin(commits)
        commit.store(OID, new_file(b"data"))
        commit.vote(p64(number + 3)).wait()
        commit.abort()
    s3.wait_for("DeleteObject", 2)
    wait_for(lambda: files() == [])


def test_an_abort_whose_deletions_fail_is_over_all_the_same(s3, commits, new_file, files, caplog):
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied")
    commit = begin(commits)
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert "AccessDenied" in caplog.text
    assert files() == []
    with commits.in_flight.deleting([(OID, TID)]) as free:
        assert free == [(OID, TID)]


def test_a_blob_is_in_flight_until_its_transaction_has_ended_and_been_cleaned_up(s3, commits, new_file):
    def in_flight():
        with commits.in_flight.deleting([(OID, TID)]) as free:
            return not free

    finished = begin(commits)
    finished.store(OID, new_file(b"data"))
    uploads = finished.vote(TID)
    assert in_flight()
    uploads.wait()
    assert in_flight()
    finished.finish()
    assert not in_flight()
    aborted = begin(commits)
    aborted.store(OID, new_file(b"data"))
    aborted.vote(TID).wait()
    s3.misbehave(operation="DeleteObject", hang=True)
    aborted.abort()
    s3.wait_for("DeleteObject")
    assert in_flight()
    s3.behave()
    cleaned_up(commits)
    assert not in_flight()


# Restore


@pytest.fixture
def old(commits, new_file, s3):
    """A blob that is in the bucket already, at OLD_TID."""
    commits.bucket.put(OID, OLD_TID, new_file(b"old"))
    s3.forget()


def test_a_restored_blob_is_uploaded_to_its_old_key(commits, new_file, stored):
    commit = begin(commits)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote(TID).wait()
    commit.finish()
    assert stored() == {OLD_KEY: b"old"}


def test_a_restored_transaction_needs_no_tid_of_the_base(commits, new_file, stored):
    commit = begin(commits)  # RelStorage has none for it
    commit.begin_restoring(OLD_TID, nullcontext())
    commit.store(OID, new_file(b"old"))
    commit.vote(None).wait()
    commit.finish()
    assert stored() == {OLD_KEY: b"old"}


def test_what_is_there_already_is_not_uploaded_again(s3, commits, old, new_file, stored, cached):
    commit = begin(commits)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote(TID).wait()
    commit.finish()
    assert operations(s3) == ["HeadObject"]
    assert stored() == {OLD_KEY: b"old"}
    assert cached(OID, OLD_TID) == b"old"


def test_what_was_there_already_outlives_an_aborted_restore(commits, old, new_file, stored):
    commit = begin(commits)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.restore(p64(9), OLD_TID, new_file(b"new"))
    commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


def test_what_others_stored_outlives_an_aborted_restore(s3, commits, bucket_name, new_file, stored):
    s3.client.put_object(Bucket=bucket_name, Key=OLD_KEY, Body=b"old")  # without a checksum of ours
    commit = begin(commits)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


def test_restoring_over_another_blob_fails_and_leaves_that(commits, old, new_file, stored):
    commit = begin(commits)
    commit.restore(OID, OLD_TID, new_file(b"another"))
    with pytest.raises(BucketError, match="another blob"):
        commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


def test_a_restore_tried_again_is_not_deleted_by_the_abort_of_the_first(s3, commits, new_file, stored):
    first = begin(commits)
    first.restore(OID, OLD_TID, new_file(b"old"))
    first.vote(TID).wait()
    s3.misbehave(operation="DeleteObject", hang=True)
    first.abort()
    s3.wait_for("DeleteObject")
    second = begin(commits)
    second.restore(OID, OLD_TID, new_file(b"old"))
    waiting = second.vote(TID)
    assert not waiting.done.done()  # it must not rely on what the first still deletes
    s3.behave()
    waiting.wait()
    second.finish()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


def test_a_restore_tried_again_does_not_wait_for_one_that_waits_itself(open_commits, new_file, stored, monkeypatch):
    commits, waits = open_commits(timeout=5), threading.Event()
    wait = commits.in_flight.wait_until_judged
    monkeypatch.setattr(commits.in_flight, "wait_until_judged", lambda *args: waits.set() or wait(*args))
    with commits.in_flight.deleting([(OID, OLD_TID)]):  # by a garbage collection
        first = begin(commits)
        first.restore(OID, OLD_TID, new_file(b"old"))
        first.vote(TID)
        assert waits.wait(30)
        first.abort()
        second = begin(commits)
        second.restore(OID, OLD_TID, new_file(b"old"))
        uploads = second.vote(TID)
    uploads.wait()
    second.finish()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


# Undo


def test_an_undone_blob_is_copied_inside_the_bucket(s3, commits, old, stored):
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    commit.vote(TID).wait()
    commit.finish()
    assert operations(s3) == ["HeadObject", "CopyObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"old"}


def test_of_several_undos_the_last_holds(commits, old, new_file, stored):
    commits.bucket.put(OID, p64(1), new_file(b"older"))
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    commit.undo(OID, p64(1))
    commit.vote(TID).wait()
    assert stored()[KEY] == b"older"


@pytest.mark.parametrize(
    "fault", [{"status": 501, "code": "NotImplemented"}, {"status": 400, "code": "InvalidRequest"}]
)
def test_where_copying_fails_an_undone_blob_is_uploaded_again(s3, commits, old, stored, fault):
    s3.misbehave(operation="CopyObject", **fault)
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    commit.vote(TID).wait()
    assert operations(s3) == ["HeadObject", "CopyObject", "GetObject", "PutObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"old"}


def test_undoing_to_a_blob_that_is_not_there_fails_the_vote(commits, stored):
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    with pytest.raises(BlobNotFound, match=OLD_KEY):
        commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {}


def test_an_aborted_undo_deletes_its_copy(commits, old, stored):
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    commit.vote(TID).wait()
    assert KEY in stored()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {OLD_KEY: b"old"}


# Undo and store of one object


def test_an_undo_after_a_store_holds(s3, commits, old, new_file, stored):
    commit = begin(commits)
    commit.store(OID, new_file(b"new"))
    commit.undo(OID, OLD_TID)
    commit.vote(TID).wait()
    commit.finish()
    cleaned_up(commits)
    assert operations(s3) == ["HeadObject", "CopyObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"old"}


def test_a_store_after_an_undo_holds(s3, commits, old, new_file, stored):
    commit = begin(commits)
    commit.undo(OID, OLD_TID)
    commit.store(OID, new_file(b"new"))
    commit.vote(TID).wait()
    commit.finish()
    cleaned_up(commits)
    assert operations(s3) == ["PutObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"new"}


# Where other processes commit


def test_an_abort_leaves_what_may_be_that_of_another_process_to_a_pack(commits, new_file, stored, files):
    commit = begin(commits, Pending(commits, shared=True))
    commit.store(OID, new_file(b"data"))
    commit.vote(TID).wait()
    commit.abort()
    cleaned_up(commits)
    assert stored() == {KEY: b"data"}
    assert files() == []
