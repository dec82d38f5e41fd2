"""The blobs of one transaction: in the bucket before the vote is over, in the cache after the finish, or gone."""

import os
import shutil
import threading
import time

import pytest
from ZODB.utils import p64

from zodb_s3blobs.cache.files import Incoming
from zodb_s3blobs.commit import Uploads
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.errors import BlobNotFound, BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, OLD_TID, TID = p64(1), p64(2), p64(3)
OLD_KEY, KEY = "blobs/1/2.blob", "blobs/1/3.blob"


@pytest.fixture
def open_uploads(open_bucket, cache):
    """Makes an `Uploads`; keywords replace single settings of the bucket."""
    opened = []

    def make(timeout=60, stage_threshold=0, **changes):
        bucket = open_bucket(**changes)
        fetcher = Fetcher(bucket, cache, Metrics())
        opened.extend((fetcher, Uploads(bucket, cache, fetcher.fetch, Metrics(), 16, timeout, stage_threshold)))
        return opened[-1]

    yield make
    for part in opened:
        part.close()


@pytest.fixture
def uploads(open_uploads):
    return open_uploads()


@pytest.fixture
def stored(s3, bucket_name):
    """The bytes that the bucket has, by key."""

    def stored():
        keys = s3.keys(bucket_name)
        return {key: s3.client.get_object(Bucket=bucket_name, Key=key)["Body"].read() for key in keys}

    return stored


@pytest.fixture
def incoming(cache):
    """The staged files."""
    return lambda: os.listdir(cache.directory / "incoming")


def cleaned_up(uploads):
    """Wait until all is done that aborts have left to do."""
    uploads.cleaners.shutdown()


def arrives(s3, operation, count=1):
    """Whether ``count`` requests of ``operation`` arrive before long."""
    try:
        s3.wait_for(operation, count, timeout=0.5)
    except AssertionError:
        return False
    return True


def operations(s3):
    return [request.operation for request in s3.requests()]


# Before the vote is over


def test_uploads_begin_before_the_vote_and_run_in_parallel(s3, uploads, new_file, stored):
    s3.misbehave(operation="PutObject", hang=True)
    commit = uploads.begin(None, TID)
    for number in range(16):
        commit.store(p64(number), new_file(b"%d" % number))
    s3.wait_for("PutObject", 16)
    s3.behave()
    commit.vote().wait()
    assert stored() == {f"blobs/{number:x}/3.blob": b"%d" % number for number in range(16)}


def test_storing_takes_the_file_over(uploads, new_file):
    filename = new_file(b"data")
    uploads.begin(None, TID).store(OID, filename)
    assert not os.path.exists(filename)


def test_neither_storing_nor_voting_waits_for_s3_but_the_end_of_the_vote_does(s3, uploads, new_file, stored):
    s3.misbehave(operation="PutObject", hang=True)
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    waiting = commit.vote()
    s3.wait_for("PutObject")
    assert not waiting.done.done()
    with pytest.raises(BucketError):
        waiting.check()
    s3.behave()
    waiting.wait()
    assert stored() == {KEY: b"data"}


def test_a_vote_without_blobs_is_over_at_once(s3, uploads):
    assert uploads.begin(None, TID).vote() is None
    assert operations(s3) == []


def test_a_failed_upload_fails_the_vote(s3, uploads, new_file):
    s3.misbehave(operation="PutObject", times=3)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", times=1)
    commit = uploads.begin(None, TID)
    for number in range(8):
        commit.store(p64(number), new_file(b"data"))
    with pytest.raises(BucketError, match="AccessDenied"):
        commit.vote().wait()


def test_a_failed_upload_fails_the_vote_though_others_still_hang(s3, uploads, new_file):
    s3.misbehave(operation="PutObject", hang=True, times=1)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", times=1)
    commit = uploads.begin(None, TID)
    for number in range(2):
        commit.store(p64(number), new_file(b"data"))
    with pytest.raises(BucketError, match="AccessDenied"):
        commit.vote().wait()
    assert sorted(request.status or 0 for request in s3.requests("PutObject")) == [0, 403]


def test_uploads_that_take_longer_than_upload_timeout_fail_the_vote(s3, open_uploads, new_file):
    s3.misbehave(hang=True)
    commit = open_uploads(timeout=1).begin(None, TID)
    commit.store(OID, new_file(b"data"))
    started = time.monotonic()
    with pytest.raises(BucketError, match=r"upload-timeout \(1 s\)"):
        commit.vote().wait()
    assert time.monotonic() - started < 10


def test_of_two_blobs_for_one_object_the_later_is_committed(s3, uploads, new_file, stored, cache):
    s3.misbehave(operation="PutObject", hang=True, times=1)
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"earlier"))
    s3.wait_for("PutObject")
    commit.store(OID, new_file(b"later"))
    assert not arrives(s3, "PutObject", 2)
    s3.behave()
    commit.vote().wait()
    commit.finish()
    assert stored() == {KEY: b"later"}
    with cache.get(OID, TID) as path, open(path, "rb") as file:
        assert file.read() == b"later"


def test_nobody_sees_what_the_transaction_itself_has_replaced(uploads, new_file, monkeypatch):
    published = []

    def publish(incoming, *name):
        with open(incoming.path, "rb") as file:
            published.append(file.read())
        return real(incoming, *name)

    real = Incoming.publish
    monkeypatch.setattr(Incoming, "publish", publish)
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"earlier"))
    commit.store(OID, new_file(b"later"))
    commit.vote().wait()
    commit.finish()
    assert published == [b"later"]


# Staged uploads


@pytest.fixture
def stage(s3, new_file):
    """Stages a file with ``data``; returns its path once it is in the bucket."""

    def stage(uploads, data):
        filename = new_file(data)
        uploads.staging.stage(filename)
        uploads.staging.waiting([filename]).wait()
        s3.forget()
        return filename

    return stage


def test_what_is_staged_is_only_copied_and_then_deleted(s3, open_uploads, stage, stored):
    uploads = open_uploads(stage_threshold=1)
    commit = uploads.begin(None, TID)
    commit.store(OID, stage(uploads, b"data"))
    commit.vote().wait()
    commit.finish()
    cleaned_up(uploads)
    assert operations(s3) == ["CopyObject", "DeleteObject"]
    assert stored() == {KEY: b"data"}


def test_where_copying_fails_what_is_staged_is_uploaded_again(s3, open_uploads, stage, stored):
    uploads = open_uploads(stage_threshold=1)
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    commit = uploads.begin(None, TID)
    commit.store(OID, stage(uploads, b"data"))
    commit.vote().wait()
    commit.finish()
    cleaned_up(uploads)
    assert stored() == {KEY: b"data"}


def test_abort_deletes_what_is_staged_too(open_uploads, stage, stored, incoming):
    uploads = open_uploads(stage_threshold=1)
    commit = uploads.begin(None, TID)
    commit.store(OID, stage(uploads, b"data"))
    commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {}
    assert incoming() == []


def test_abort_before_the_vote_deletes_what_is_staged_too(s3, bucket_name, open_uploads, stage):
    uploads = open_uploads(stage_threshold=1)
    commit = uploads.begin(None, TID)
    commit.store(OID, stage(uploads, b"data"))
    commit.abort()
    deadline = time.monotonic() + 30
    while s3.keys(bucket_name):
        assert time.monotonic() < deadline, s3.keys(bucket_name)
        time.sleep(0.01)


# Finish


def test_finish_publishes_in_the_cache_and_makes_no_request(s3, uploads, new_file, cache, incoming):
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    commit.vote().wait()
    assert cache.get(OID, TID) is None
    s3.forget()
    commit.finish()
    with cache.get(OID, TID) as path, open(path, "rb") as file:
        assert file.read() == b"data"
        assert os.fstat(file.fileno()).st_mode & 0o222 == 0
    assert operations(s3) == []
    assert incoming() == []


def test_finish_never_raises(uploads, new_file, cache, stored):
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    commit.vote().wait()
    shutil.rmtree(cache.directory)
    commit.finish()
    assert stored() == {KEY: b"data"}


def test_what_may_have_been_committed_stays_in_the_bucket(s3, uploads, new_file, cache, stored, incoming):
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    commit.vote().wait()
    commit.abandon()
    cleaned_up(uploads)
    assert stored() == {KEY: b"data"}
    assert incoming() == []
    assert cache.get(OID, TID) is None


# Abort


def test_abort_deletes_what_was_uploaded(uploads, new_file, stored, incoming, cache):
    commit = uploads.begin(None, TID)
    for number in range(3):
        commit.store(p64(number), new_file(b"data"))
    commit.vote().wait()
    assert len(stored()) == 3
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {}
    assert incoming() == []
    assert cache.get(OID, TID) is None


def test_abort_deletes_what_was_uploaded_though_the_answer_was_lost(s3, open_uploads, new_file, stored):
    uploads = open_uploads(s3_max_attempts=1)
    s3.misbehave(operation="PutObject", lose=True)
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    with pytest.raises(BucketError):
        commit.vote().wait()
    assert stored() == {KEY: b"data"}
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {}


def test_abort_waits_for_nothing_and_deletes_what_is_still_being_uploaded(s3, uploads, new_file, stored, incoming):
    s3.misbehave(operation="PutObject", hang=True)
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    s3.wait_for("PutObject")
    started = time.monotonic()
    commit.abort()
    assert time.monotonic() - started < 5
    assert not arrives(s3, "DeleteObject")
    s3.behave()
    cleaned_up(uploads)
    assert operations(s3) == ["PutObject", "DeleteObject"]
    assert s3.requests("PutObject")[0].status == 200
    assert stored() == {}
    assert incoming() == []


def test_abort_leaves_out_uploads_that_have_not_begun(s3, uploads, new_file, stored, incoming):
    s3.misbehave(operation="PutObject", hang=True)
    commit = uploads.begin(None, TID)
    for number in range(40):
        commit.store(p64(number), new_file(b"data"))
    s3.wait_for("PutObject", 16)
    commit.abort()
    s3.behave()
    cleaned_up(uploads)
    assert len(s3.requests("PutObject")) == 16
    assert stored() == {}
    assert incoming() == []


def test_abort_without_blobs_makes_no_request(s3, uploads):
    uploads.begin(None, TID).abort()
    cleaned_up(uploads)
    assert operations(s3) == []


def test_an_abort_whose_deletions_fail_is_over_all_the_same(s3, uploads, new_file, incoming, caplog):
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied")
    commit = uploads.begin(None, TID)
    commit.store(OID, new_file(b"data"))
    commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert "AccessDenied" in caplog.text
    assert incoming() == []
    with uploads.in_flight.deleting([(OID, TID)]) as free:
        assert free == [(OID, TID)]


def test_a_blob_is_in_flight_until_its_transaction_has_ended_and_been_cleaned_up(s3, uploads, new_file):
    def in_flight():
        with uploads.in_flight.deleting([(OID, TID)]) as free:
            return not free

    finished = uploads.begin(None, TID)
    finished.store(OID, new_file(b"data"))
    assert in_flight()
    finished.vote().wait()
    assert in_flight()
    finished.finish()
    assert not in_flight()
    aborted = uploads.begin(None, TID)
    aborted.store(OID, new_file(b"data"))
    aborted.vote().wait()
    s3.misbehave(operation="DeleteObject", hang=True)
    aborted.abort()
    s3.wait_for("DeleteObject")
    assert in_flight()
    s3.behave()
    cleaned_up(uploads)
    assert not in_flight()


# Restore


@pytest.fixture
def old(uploads, new_file, s3):
    """A blob that is in the bucket already, at OLD_TID."""
    uploads.bucket.put(OID, OLD_TID, new_file(b"old"))
    s3.forget()


def test_a_restored_blob_is_uploaded_to_its_old_key(uploads, new_file, stored):
    commit = uploads.begin(None, TID)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote().wait()
    commit.finish()
    assert stored() == {OLD_KEY: b"old"}


def test_what_is_there_already_is_not_uploaded_again(s3, uploads, old, new_file, stored, cache):
    commit = uploads.begin(None, TID)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote().wait()
    commit.finish()
    assert operations(s3) == ["HeadObject"]
    assert stored() == {OLD_KEY: b"old"}
    with cache.get(OID, OLD_TID) as path, open(path, "rb") as file:
        assert file.read() == b"old"


def test_what_was_there_already_outlives_an_aborted_restore(uploads, old, new_file, stored):
    commit = uploads.begin(None, TID)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.restore(p64(9), OLD_TID, new_file(b"new"))
    commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}


def test_what_others_stored_outlives_an_aborted_restore(s3, uploads, bucket_name, new_file, stored):
    s3.client.put_object(Bucket=bucket_name, Key=OLD_KEY, Body=b"old")  # without a checksum of ours
    commit = uploads.begin(None, TID)
    commit.restore(OID, OLD_TID, new_file(b"old"))
    commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}


def test_restoring_over_another_blob_fails_and_leaves_that(uploads, old, new_file, stored):
    commit = uploads.begin(None, TID)
    commit.restore(OID, OLD_TID, new_file(b"another"))
    with pytest.raises(BucketError, match="another blob"):
        commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}


def test_a_restore_tried_again_is_not_deleted_by_the_abort_of_the_first(s3, uploads, new_file, stored):
    first = uploads.begin(None, TID)
    first.restore(OID, OLD_TID, new_file(b"old"))
    first.vote().wait()
    s3.misbehave(operation="DeleteObject", hang=True)
    first.abort()
    s3.wait_for("DeleteObject")
    second = uploads.begin(None, TID)
    second.restore(OID, OLD_TID, new_file(b"old"))
    waiting = second.vote()
    arrives(s3, "HeadObject", 2)  # or not: it must not rely on what the first still deletes
    s3.behave()
    waiting.wait()
    second.finish()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}


def test_a_restore_tried_again_does_not_wait_for_one_that_waits_itself(open_uploads, new_file, stored, monkeypatch):
    uploads, waits = open_uploads(timeout=5), threading.Event()
    wait = uploads.in_flight.wait_until_judged
    monkeypatch.setattr(uploads.in_flight, "wait_until_judged", lambda *args: waits.set() or wait(*args))
    with uploads.in_flight.deleting([(OID, OLD_TID)]):  # by a garbage collection
        first = uploads.begin(None, TID)
        first.restore(OID, OLD_TID, new_file(b"old"))
        assert waits.wait(30)
        first.abort()
        second = uploads.begin(None, TID)
        second.restore(OID, OLD_TID, new_file(b"old"))
    second.vote().wait()
    second.finish()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}


# Undo


def test_an_undone_blob_is_copied_inside_the_bucket(s3, uploads, old, stored):
    commit = uploads.begin(None, TID)
    commit.undo(OID, OLD_TID)
    commit.vote().wait()
    commit.finish()
    assert operations(s3) == ["HeadObject", "CopyObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"old"}


def test_of_several_undos_the_last_holds(uploads, old, new_file, stored):
    uploads.bucket.put(OID, p64(1), new_file(b"older"))
    commit = uploads.begin(None, TID)
    commit.undo(OID, OLD_TID)
    commit.undo(OID, p64(1))
    commit.vote().wait()
    assert stored()[KEY] == b"older"


@pytest.mark.parametrize(
    "fault", [{"status": 501, "code": "NotImplemented"}, {"status": 400, "code": "InvalidRequest"}]
)
def test_where_copying_fails_an_undone_blob_is_uploaded_again(s3, uploads, old, stored, fault):
    s3.misbehave(operation="CopyObject", **fault)
    commit = uploads.begin(None, TID)
    commit.undo(OID, OLD_TID)
    commit.vote().wait()
    assert operations(s3) == ["HeadObject", "CopyObject", "GetObject", "PutObject"]
    assert stored() == {OLD_KEY: b"old", KEY: b"old"}


def test_undoing_to_a_blob_that_is_not_there_fails_the_vote(uploads, stored):
    commit = uploads.begin(None, TID)
    commit.undo(OID, OLD_TID)
    with pytest.raises(BlobNotFound, match=OLD_KEY):
        commit.vote().wait()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {}


def test_an_aborted_undo_deletes_its_copy(uploads, old, stored):
    commit = uploads.begin(None, TID)
    commit.undo(OID, OLD_TID)
    commit.vote().wait()
    assert KEY in stored()
    commit.abort()
    cleaned_up(uploads)
    assert stored() == {OLD_KEY: b"old"}
