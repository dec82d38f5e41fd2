"""Large blobs are uploaded ahead of the commit lock: what is staged, for how long, and what is swept."""

import os
import time
from types import SimpleNamespace

import pytest

from zodb_s3blobs import staging as staging_module
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.errors import BucketError
from zodb_s3blobs.staging import Staging
from zodb_s3blobs.workers import DaemonPool

THRESHOLD = 100
TIMEOUT = 30
DAY = 24 * 3600


@pytest.fixture
def open_staging(bucket):
    opened, cleaners = [], DaemonPool(2)

    def make(timeout=TIMEOUT, threshold=THRESHOLD):
        opened.append(Staging(bucket, cleaners, Metrics(), 4, timeout, threshold))
        return opened[-1]

    yield make
    for staging in opened:
        staging.close()
    cleaners.shutdown(timeout=TIMEOUT)


@pytest.fixture
def staging(open_staging):
    return open_staging()


@pytest.fixture
def large(new_file):
    return new_file(os.urandom(THRESHOLD))


@pytest.fixture
def after(monkeypatch):
    """Lets so many seconds pass, as far as the sweep can tell."""

    def after(seconds):
        clock = SimpleNamespace(time=lambda: time.time() + seconds, monotonic=time.monotonic)
        monkeypatch.setattr(staging_module, "time", clock)

    return after


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_large_file_is_uploaded_to_a_key_beside_the_blobs(s3, bucket_name, staging, large):
    staging.stage(large)
    staging.waiting([large]).wait()
    (key,) = s3.keys(bucket_name)
    assert key == f"staged/{staging.claim(large).name}"


def test_a_small_file_is_not_staged(s3, staging, new_file):
    small = new_file(os.urandom(THRESHOLD - 1))
    staging.stage(small)
    assert staging.waiting([small]) is None
    assert staging.claim(small) is None
    assert s3.requests() == []


def test_nothing_is_staged_if_the_threshold_is_0_or_the_service_cannot_copy(s3, bucket, open_staging, large):
    open_staging(threshold=0).stage(large)
    bucket.can_copy = False
    open_staging().stage(large)
    assert s3.requests() == []


def test_what_is_discarded_is_deleted_also_twice(s3, bucket_name, staging, large):
    staging.stage(large)
    staging.waiting([large]).wait()
    staged = staging.claim(large)
    staging.release(staged)
    staging.release(staged)
    until(lambda: not s3.keys(bucket_name))
    assert len(s3.requests("DeleteObject")) == 1


def test_what_is_forgotten_while_it_is_uploaded_is_deleted_afterwards(s3, bucket_name, staging, large):
    s3.misbehave(operation="PutObject", hang=True)
    staging.stage(large)
    s3.wait_for("PutObject")
    staging.cancel_for(large)
    staging.cancel_for(large)
    assert staging.waiting([large]) is None
    s3.behave()
    s3.wait_for("DeleteObject")
    until(lambda: not s3.keys(bucket_name))


def test_waiting_ends_with_upload_timeout(s3, open_staging, large):
    staging = open_staging(timeout=1)
    s3.misbehave(operation="PutObject", hang=True)
    staging.stage(large)
    with pytest.raises(BucketError, match=r"upload-timeout \(1 s\)"):
        staging.waiting([large]).wait()


def test_a_failed_upload_ends_the_waiting(s3, staging, large):
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    staging.stage(large)
    with pytest.raises(BucketError, match="AccessDenied"):
        staging.waiting([large]).wait()


def test_the_sweep_deletes_what_a_crashed_server_left_a_day_ago(s3, bucket_name, open_staging, large, after):
    crashed = open_staging()
    crashed.stage(large)
    crashed.waiting([large]).wait()
    staging = open_staging()
    after(DAY - 60)
    assert staging.sweep() == 0
    assert len(s3.keys(bucket_name)) == 1
    after(DAY + 60)
    assert staging.sweep() == 1
    assert s3.keys(bucket_name) == []


def test_the_sweep_leaves_alone_what_is_still_needed_however_old(s3, bucket_name, staging, large, after):
    staging.stage(large)
    staging.waiting([large]).wait()
    after(10 * DAY)
    assert staging.sweep() == 0
    staging.claim(large)  # being copied now
    assert staging.sweep() == 0
    assert len(s3.keys(bucket_name)) == 1


def test_the_sweep_waits_longer_if_an_upload_may_take_longer(s3, bucket_name, open_staging, large, after):
    crashed = open_staging()
    crashed.stage(large)
    crashed.waiting([large]).wait()
    staging = open_staging(timeout=DAY)
    after(DAY + 60)
    assert staging.sweep() == 0
    after(2 * DAY + 60)
    assert staging.sweep() == 1


def test_the_sweep_leaves_blobs_and_foreign_keys_alone(s3, bucket_name, staging, after):
    keys = {"blobs/1/1.blob", "staged/not-ours", f"other/staged/{'a' * 32}", "unrelated"}
    s3.put(bucket_name, [*keys, f"staged/{'a' * 32}"])
    after(2 * DAY)
    assert staging.sweep() == 1
    assert set(s3.keys(bucket_name)) == keys
