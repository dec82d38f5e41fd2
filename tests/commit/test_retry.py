"""After a conflict, the uploads of a transaction are kept for its retry, which sends no byte of them again."""

import os
import threading
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.commits import begin_reserved, cleaned_up, commit_reserved, reserve
from tests.support.counts import value
from tests.support.zeo_clients import operations, wait_for
from zodb_s3blobs.commit import kept as kept_module
from zodb_s3blobs.commit.pending import Pending

pytestmark = pytest.mark.usefixtures("no_pauses")

OID = p64(1)
MB = 1 << 20
SENDING = {"PutObject", "UploadPart", "CreateMultipartUpload"}

#: How a blob is sent -> s3-stage-threshold, and its bytes.
WAYS = {
    "plain": (1 << 30, os.urandom(MB)),
    "staged": (MB, os.urandom(MB)),
    "stream": (MB, os.urandom(9 * MB)),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


@pytest.fixture
def commits(way, open_commits):
    return open_commits(stage_threshold=way[0])


@pytest.fixture
def conflict(commits, send, new_file):
    """Sends a blob, at a reserved tid or only to its staging key, and aborts after a conflict."""

    def conflict(data, at="the tid", shared=False):
        pending = Pending(commits, shared)
        path = send(pending, OID, data)
        staged = pending.staged()
        if staged is not None:
            staged.wait()
        tid = None
        if at == "the tid":
            tid = reserve(pending)
            begin_reserved(commits, pending)
            pending.store(OID, path)
        pending.abort(conflict=True)
        return tid

    return conflict


@pytest.fixture
def is_kept(commits, new_file):
    return lambda data: commits.kept.find(new_file(data))[1] is not None


@pytest.fixture
def retry(commits, send):
    """Commits the same blob; returns its key."""

    def retry(data):
        pending = Pending(commits)
        path = send(pending, OID, data)
        staged = pending.staged()
        if staged is not None:
            staged.wait()
        reserve(pending)
        return commits.bucket.keys.key(OID, commit_reserved(commits, pending, {OID: path}))

    return retry


def reused(metrics):
    return tuple(value(metrics, f"s3blobs_uploads_reused_{what}") for what in ("total", "bytes_total"))


def test_a_retry_with_the_same_bytes_sends_none(s3, commits, way, conflict, is_kept, retry, stored, files, metrics):
    data = way[1]
    conflict(data)
    wait_for(lambda: is_kept(data))
    s3.forget()
    key = retry(data)
    assert not SENDING & set(operations(s3))
    assert operations(s3).count("CopyObject") == 1
    assert reused(metrics) == (1, len(data))
    commits.close()
    assert stored() == {key: data}
    assert commits.bucket.verify(*commits.bucket.keys.parse(key)).is_proven
    commits.cache.get(*commits.bucket.keys.parse(key)).release()
    assert files() == []


def test_a_retry_with_other_bytes_sends_them(s3, commits, way, conflict, is_kept, retry, stored, metrics):
    data = way[1]
    conflict(data)
    wait_for(lambda: is_kept(data))
    other = data[:-1] + bytes([data[-1] ^ 1])
    key = retry(other)
    assert reused(metrics) == (0, 0)
    commits.close()
    assert stored() == {key: other}


@pytest.mark.parametrize("way", [WAYS["staged"], WAYS["stream"]], ids=["staged", "stream"])
def test_what_is_only_staged_when_the_conflict_shows_is_kept_as_well(
    s3, commits, way, conflict, is_kept, retry, stored, metrics
):
    data = way[1]
    for _ in range(2):  # the second one has not sent anything itself
        conflict(data, at="its staging key")
        wait_for(lambda: is_kept(data))
    s3.forget()
    key = retry(data)
    assert not SENDING & set(operations(s3))
    assert reused(metrics) == (1, len(data))
    commits.close()
    assert stored() == {key: data}


def test_what_is_kept_is_deleted_when_its_time_is_over(
    s3, bucket_name, commits, way, conflict, is_kept, files, monkeypatch
):
    monkeypatch.setattr(kept_module, "KEPT_FOR", 0)
    conflict(way[1])
    wait_for(lambda: not s3.keys(bucket_name))
    assert not is_kept(way[1])
    assert files() == []


@pytest.fixture
def time_over(monkeypatch):
    """Lets the time of what has been kept first be over; no other time is over before."""

    class Timer:
        def __init__(self, seconds, expire):
            timers.append(expire)

        def start(self):
            pass

        cancel = start

    timers = []
    monkeypatch.setattr(kept_module, "threading", SimpleNamespace(Lock=threading.Lock, Timer=Timer))
    return lambda: timers.pop(0)()


@pytest.mark.parametrize("way", [WAYS["staged"]], ids=["staged"])
def test_nobody_is_told_of_what_has_been_deleted(s3, bucket_name, way, conflict, is_kept, files, time_over):
    data = way[1]
    conflict(data)
    wait_for(lambda: is_kept(data) and not files())
    conflict(data, at="its staging key")  # which has not sent anything itself
    wait_for(lambda: not files())
    time_over()
    wait_for(lambda: not s3.keys(bucket_name))
    assert not is_kept(data)


def test_what_is_kept_is_in_flight_until_it_has_been_deleted(commits, way, conflict, is_kept):
    tid = conflict(way[1])
    wait_for(lambda: is_kept(way[1]))
    assert commits.in_flight.is_wanted((OID, tid))
    commits.close()
    assert not commits.in_flight.is_wanted((OID, tid))


def test_the_files_of_what_is_kept_are_deleted_at_once(commits, way, conflict, is_kept, files):
    conflict(way[1])
    wait_for(lambda: is_kept(way[1]) and not files())


@pytest.mark.parametrize("way", [(0, b"data")], ids=["plain"])
def test_a_small_blob_is_not_kept(commits, way, conflict, is_kept, stored):
    conflict(way[1])
    cleaned_up(commits)
    assert stored() == {}
    assert not is_kept(way[1])


@pytest.mark.parametrize("way", [WAYS["plain"]], ids=["plain"])
def test_nothing_is_kept_where_other_processes_commit(commits, way, conflict, is_kept, files):
    conflict(way[1], shared=True)
    cleaned_up(commits)
    assert not is_kept(way[1])
    assert files() == []


@pytest.mark.parametrize("way", [WAYS["staged"]], ids=["staged"])
def test_what_was_kept_and_is_gone_is_sent_again(s3, bucket_name, commits, way, conflict, is_kept, retry, stored):
    data = way[1]
    conflict(data)
    wait_for(lambda: is_kept(data))
    for key in s3.keys(bucket_name):
        s3.client.delete_object(Bucket=bucket_name, Key=key)
    key = retry(data)
    commits.close()
    assert stored() == {key: data}
