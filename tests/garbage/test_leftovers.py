"""What crashed servers have left at staging keys is deleted, and nothing that a server still needs."""

import time
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.commits import begin
from tests.support.fake_base import Base
from zodb_s3blobs.garbage import leftovers
from zodb_s3blobs.garbage.leftovers import abandoned_after

DAY = 24 * 3600
STAGED = f"staged/{'a' * 32}"


@pytest.fixture
def after(monkeypatch):
    """Lets so many seconds pass, as far as the collection can tell."""

    def after(seconds):
        clock = SimpleNamespace(time=lambda: time.time() + seconds)
        monkeypatch.setattr(leftovers, "time", clock)

    return after


def test_what_a_crashed_server_left_a_day_ago_is_deleted(s3, bucket_name, collector, after):
    s3.put(bucket_name, [STAGED])
    after(DAY - 60)
    collector().collect(Base())
    assert s3.keys(bucket_name) == [STAGED]
    after(DAY + 60)
    collector().collect(Base())
    assert s3.keys(bucket_name) == []


def test_what_this_server_still_needs_is_left_alone_however_old(
    s3, bucket_name, open_commits, collector, new_file, after
):
    commits = open_commits(stage_threshold=1)
    commit = begin(commits)
    commit.store(p64(1), new_file(b"data"))
    commit.staged().wait()
    after(10 * DAY)
    collector(commits).collect(Base())
    (key,) = s3.keys(bucket_name)
    assert key.startswith("staged/")
    commit.abort()
    commits.cleaners.shutdown()
    assert s3.keys(bucket_name) == []


def test_it_is_left_alone_longer_if_an_upload_may_take_longer():
    assert abandoned_after(60) == DAY
    assert abandoned_after(DAY) == 2 * DAY


def test_blobs_and_foreign_keys_are_left_alone(s3, bucket_name, collector, after):
    keys = {"blobs/1/1.blob", "staged/not-ours", f"other/staged/{'a' * 32}", "unrelated"}
    s3.put(bucket_name, [*keys, STAGED])
    after(2 * DAY)
    collector().collect(Base((p64(1), p64(1))))
    assert set(s3.keys(bucket_name)) == keys
