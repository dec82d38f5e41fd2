"""Large blobs are uploaded before the vote, to staging keys: which ones, and what is left of them."""

import os

import pytest
from ZODB.utils import p64

from tests.support.commits import Sending, begin, begin_reserved, cleaned_up, commit_reserved, reserve
from tests.support.speed import slow_after
from tests.support.zeo_clients import operations
from zodb_s3blobs.commit.pending import Pending
from zodb_s3blobs.s3.errors import BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, TID = p64(1), p64(3)
KEY = "blobs/1/3.blob"
MB = 1 << 20
#: More than one part: it is sent while it arrives.
LARGE = os.urandom(9 * MB)
#: So large that it is staged when it has arrived, with the threshold of `staging`.
MIDDLING = b"x" * 1000


@pytest.fixture
def staging(open_commits):
    """The services where every blob is staged."""
    return open_commits(stage_threshold=1)


@pytest.fixture
def no_parts(s3, bucket_name):
    """Whether the bucket has no part of an upload that is not complete."""
    return lambda: "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket_name)


def staged_puts(s3):
    return [request for request in s3.requests("PutObject") if "/staged/" in request.path]


# Which blobs are staged


@pytest.mark.parametrize(("count", "size"), slow_after(1, of=[(8, MB), (64, 3_000_000)], unpack=True))
def test_middling_blobs_are_staged_when_their_transaction_has_many_bytes(
    s3, bucket_name, open_commits, send, count, size
):
    commits = open_commits(stage_threshold=4 * MB)
    pending = Pending(commits)
    blobs = {p64(number): send(pending, p64(number), bytes(size)) for number in range(count)}
    pending.staged().wait()
    assert len(staged_puts(s3)) == count
    assert all(key.startswith("staged/") for key in s3.keys(bucket_name))
    reserve(pending)
    commit_reserved(commits, pending, blobs)
    cleaned_up(commits)
    assert len(s3.requests("PutObject")) == len(s3.requests("CopyObject")) == count
    assert all(key.startswith("blobs/") for key in s3.keys(bucket_name))


def test_thousands_of_small_blobs_are_not_staged(s3, open_commits, send):
    pending = Pending(open_commits(stage_threshold=4 * MB))
    for number in range(3000):
        send(pending, p64(number), bytes(4096))
    assert pending.staged() is None
    assert operations(s3) == []


def test_middling_blobs_are_not_staged_before_their_transaction_has_many_bytes(s3, open_commits, send):
    pending = Pending(open_commits(stage_threshold=4 * MB))
    for number in range(3):
        send(pending, p64(number), bytes(MB))
    assert pending.staged() is None
    assert operations(s3) == []


@pytest.mark.parametrize("reason", ["the threshold is 0", "the service cannot copy"])
def test_nothing_is_staged_where_it_is_turned_off_or_of_no_use(s3, open_commits, cache, reason):
    commits = open_commits(stage_threshold=0 if reason == "the threshold is 0" else 1)
    commits.bucket.can_copy = reason != "the service cannot copy"
    pending = Pending(commits)
    Sending(pending, cache).send(LARGE).end(OID)
    assert pending.staged() is None
    assert operations(s3) == []


# Staged when it has arrived


def test_what_is_staged_is_only_copied_and_then_deleted(s3, staging, new_file, stored):
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    commit.staged().wait()
    assert operations(s3) == ["PutObject"]
    assert [key.partition("/")[0] for key in stored()] == ["staged"]
    commit.vote(TID).wait()
    commit.finish()
    cleaned_up(staging)
    assert operations(s3) == ["PutObject", "CopyObject", "DeleteObject"]
    assert stored() == {KEY: MIDDLING}


def test_a_vote_that_does_not_wait_for_what_is_staged_copies_it_all_the_same(s3, staging, new_file, stored):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    uploads = commit.vote(TID)
    s3.wait_for("PutObject")
    s3.behave()
    uploads.wait()
    commit.finish()
    cleaned_up(staging)
    assert operations(s3) == ["PutObject", "CopyObject", "DeleteObject"]
    assert stored() == {KEY: MIDDLING}


def test_where_copying_fails_what_is_staged_is_uploaded_again(s3, staging, new_file, stored):
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    commit.staged().wait()
    commit.vote(TID).wait()
    commit.finish()
    cleaned_up(staging)
    assert stored() == {KEY: MIDDLING}


@pytest.mark.parametrize("votes", [True, False])
def test_an_abort_deletes_what_is_staged(staging, new_file, stored, files, votes):
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    commit.staged().wait()
    if votes:
        commit.vote(TID).wait()
    commit.abort()
    commit.abort()
    cleaned_up(staging)
    assert stored() == {}
    assert files() == []


def test_an_abort_deletes_what_is_still_being_staged(s3, staging, new_file, stored, files):
    s3.misbehave(operation="PutObject", hang=True)
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    s3.wait_for("PutObject")
    commit.abort()
    s3.behave()
    cleaned_up(staging)
    assert stored() == {}
    assert files() == []


def test_what_the_transaction_replaces_is_not_left_at_its_staging_key(staging, new_file, stored):
    commit = begin(staging)
    commit.store(OID, new_file(b"earlier"))
    commit.staged().wait()
    commit.store(OID, new_file(b"later"))
    commit.staged().wait()
    commit.vote(TID).wait()
    commit.finish()
    cleaned_up(staging)
    assert stored() == {KEY: b"later"}


def test_waiting_for_what_is_staged_ends_with_upload_timeout(s3, open_commits, new_file):
    commit = begin(open_commits(stage_threshold=1, timeout=1))
    s3.misbehave(operation="PutObject", hang=True)
    commit.store(OID, new_file(MIDDLING))
    with pytest.raises(BucketError, match=r"upload-timeout \(1 s\)"):
        commit.staged().wait()


def test_a_failed_upload_ends_the_waiting(s3, staging, new_file):
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    with pytest.raises(BucketError, match="AccessDenied"):
        commit.staged().wait()


def test_a_staged_object_is_this_servers_until_it_has_been_deleted(s3, bucket_name, staging, new_file):
    def is_live():
        (key,) = (key for key in s3.keys(bucket_name) if key.startswith("staged/"))
        return staging.staging.is_live(staging.bucket.keys.parse_staged(key))

    commit = begin(staging)
    commit.store(OID, new_file(MIDDLING))
    commit.staged().wait()
    assert is_live()
    s3.misbehave(operation="DeleteObject", hang=True)
    commit.abort()
    s3.wait_for("DeleteObject")
    assert is_live()
    assert not staging.staging.is_live("a" * 32)
    s3.behave()
    cleaned_up(staging)
    assert s3.keys(bucket_name) == []


# Sent while it arrives


def test_a_large_blob_is_sent_while_it_arrives_and_only_copied_at_its_tid(s3, staging, cache, cached, stored, no_parts):
    pending = Pending(staging)
    sending = Sending(pending, cache).send(LARGE[: 8 * MB])
    s3.wait_for("UploadPart")
    path = sending.send(LARGE[8 * MB :]).end(OID)
    pending.staged().wait()
    s3.forget()
    tid = reserve(pending)
    commit_reserved(staging, pending, {OID: path})
    cleaned_up(staging)
    assert operations(s3) == ["CopyObject", "DeleteObject"]
    assert stored() == {staging.bucket.keys.key(OID, tid): LARGE}
    assert staging.bucket.verify(OID, tid).is_proven
    assert cached(OID, tid) == LARGE
    assert no_parts()


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_a_blob_that_is_cut_off_in_the_middle_leaves_nothing(s3, staging, cache, send, stored, files, no_parts, end):
    pending = Pending(staging)
    sending = Sending(pending, cache).send(LARGE)
    s3.wait_for("UploadPart")
    sending.cut_off()
    path = send(pending, OID, b"data")
    tid = reserve(pending)
    if end == "finish":
        commit_reserved(staging, pending, {OID: path})
        cache.get(OID, tid).release()
    else:
        pending.abort()
    cleaned_up(staging)
    assert stored() == ({staging.bucket.keys.key(OID, tid): b"data"} if end == "finish" else {})
    assert no_parts()
    assert files() == []


def test_a_transaction_of_which_nothing_arrives_whole_leaves_nothing(s3, staging, cache, stored, files, no_parts):
    pending = Pending(staging)
    sending = Sending(pending, cache).send(LARGE)
    s3.wait_for("UploadPart")
    sending.cut_off()
    pending.abort()
    cleaned_up(staging)
    assert stored() == {}
    assert no_parts()
    assert files() == []


def test_a_second_round_does_not_send_a_large_blob_again(s3, staging, cache, stored):
    pending = Pending(staging)
    path = Sending(pending, cache).send(LARGE).end(OID)
    pending.staged().wait()
    reserve(pending)
    begin_reserved(staging, pending)
    pending.store(OID, path)
    pending.roll_back()
    s3.forget()
    pending.staged().wait()
    tid = reserve(pending)
    commit_reserved(staging, pending, {OID: path})
    cleaned_up(staging)
    assert sorted(operations(s3)) == ["CopyObject", "DeleteObject", "DeleteObject"]
    assert stored() == {staging.bucket.keys.key(OID, tid): LARGE}
