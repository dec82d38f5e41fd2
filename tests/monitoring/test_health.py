"""Whether the bucket answers: nobody waits to hear it, and what is heard is never old for long."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.waiting import wait_for
from zodb_s3blobs.monitoring import health as health_module
from zodb_s3blobs.monitoring.health import Health
from zodb_s3blobs.s3.errors import BucketError

pytestmark = pytest.mark.usefixtures("no_pauses")

#: Longer than an answer is believed, a good one and a bad one.
LONG_AFTER_GOOD, LONG_AFTER_BAD = 61, 6
UNANSWERED = "the bucket did not answer"


@pytest.fixture
def open_health(open_bucket):
    """Makes a `Health` and its bucket; keywords replace single settings of the bucket."""
    opened = []

    def make(**changes):
        bucket = open_bucket(**changes)
        opened.append(Health(bucket))
        return opened[-1], bucket

    yield make
    for health in opened:
        health.close()


@pytest.fixture
def after(monkeypatch):
    """Lets so many seconds pass, as far as a `Health` can tell."""

    def after(seconds):
        monkeypatch.setattr(health_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + seconds))

    return after


def ill(bucket, s3):
    """Have a request fail."""
    s3.misbehave(lose=True, times=1)
    with pytest.raises(BucketError):
        bucket.probe()
    s3.forget()


def probes(s3):
    return len(s3.requests("ListObjects"))


def test_before_the_first_request_nothing_is_known(open_health, s3):
    health, _ = open_health()
    assert "not answered yet" in health.trouble()


def test_what_was_never_asked_is_asked_after_a_while(open_health, s3, after):
    health, _ = open_health()
    after(LONG_AFTER_BAD)
    assert "not answered yet" in health.trouble()
    wait_for(lambda: health.trouble() is None)


@pytest.mark.parametrize("fault", [{}, {"status": 403, "code": "AccessDenied"}, {"status": 404, "code": "NoSuchKey"}])
def test_any_answer_of_any_request_is_a_sign_of_life(open_health, s3, new_file, fault):
    health, bucket = open_health(s3_max_attempts=1)
    if fault:
        s3.misbehave(operation="HeadObject", **fault)
    try:
        bucket.find(p64(1), p64(2), new_file(b"data"))
    except BucketError:
        assert fault
    assert health.trouble() is None


def test_a_failed_request_is_told_at_once(open_health, s3):
    health, bucket = open_health(s3_max_attempts=1)
    bucket.probe()
    assert health.trouble() is None
    ill(bucket, s3)
    assert health.trouble().startswith(UNANSWERED)


def test_a_young_answer_is_believed(open_health, s3, after):
    health, bucket = open_health(s3_max_attempts=1)
    bucket.probe()
    after(LONG_AFTER_GOOD - 2)
    assert health.trouble() is None
    ill(bucket, s3)
    after(LONG_AFTER_BAD - 2)
    assert health.trouble().startswith(UNANSWERED)
    # There is one thread for all probes: one of the two above would be seen before this one.
    after(LONG_AFTER_BAD)
    health.trouble()
    wait_for(lambda: bucket.last_answer[0] is None)
    assert probes(s3) == 1


def test_an_old_answer_is_renewed(open_health, s3, after):
    health, bucket = open_health(s3_max_attempts=1)
    bucket.probe()
    s3.misbehave(status=503, code="SlowDown")
    after(LONG_AFTER_GOOD)
    assert health.trouble() is None  # for this time
    wait_for(lambda: health.trouble() is not None)
    assert "throttled" in health.trouble()


def test_a_renewed_answer_is_young_again(open_health, s3, after):
    health, bucket = open_health()
    bucket.probe()
    _, first = bucket.last_answer
    s3.forget()
    after(LONG_AFTER_GOOD)
    assert health.trouble() is None
    wait_for(lambda: bucket.last_answer[1] > first)
    after(0)
    for _ in range(10):
        assert health.trouble() is None
    after(LONG_AFTER_GOOD)
    health.trouble()
    wait_for(lambda: probes(s3) == 2)


def test_recovery_is_seen_without_any_other_request(open_health, s3, after):
    health, bucket = open_health(s3_max_attempts=1)
    ill(bucket, s3)
    after(LONG_AFTER_BAD)
    assert health.trouble().startswith(UNANSWERED)
    wait_for(lambda: health.trouble() is None)


def test_an_outage_is_probed_again_and_again(open_health, s3, after):
    health, _ = open_health(s3_max_attempts=1)
    s3.misbehave(status=500, code="InternalError")
    after(LONG_AFTER_BAD)
    wait_for(lambda: health.trouble() is not None and probes(s3) >= 3)
    assert "server" in health.trouble()
    s3.behave()
    wait_for(lambda: health.trouble() is None)


def test_nobody_waits_for_a_probe_and_there_is_one_at_a_time(open_health, s3, after):
    health, _ = open_health(s3_max_attempts=1, s3_read_timeout=20)
    s3.misbehave(hang=True)
    after(LONG_AFTER_BAD)
    started = time.monotonic()
    health.trouble()
    assert time.monotonic() - started < 10
    s3.wait_for("ListObjects")
    with ThreadPoolExecutor(20) as pool:
        assert all("not answered yet" in trouble for trouble in pool.map(lambda _: health.trouble(), range(100)))
    assert time.monotonic() - started < 10
    assert probes(s3) == 1
    after(0)
    s3.behave()
    wait_for(lambda: health.trouble() is None)
    assert probes(s3) == 1  # nor did others queue


def test_when_it_has_been_closed_it_still_tells_what_it_knows(open_health, s3, after):
    """A scrape may be under way."""
    health, bucket = open_health()
    bucket.probe()
    s3.forget()
    health.close()
    after(LONG_AFTER_GOOD)
    for _ in range(2):
        assert health.trouble() is None
    assert probes(s3) == 0


def test_a_probe_for_which_no_thread_can_be_started_is_sent_later(s3, open_health, after, no_threads):
    health, bucket = open_health()
    bucket.probe()
    after(LONG_AFTER_GOOD)
    s3.forget()
    with no_threads():
        assert health.trouble() is None
    health.trouble()
    s3.wait_for("ListObjects")
