"""The figures of S3, against a server that misbehaves: operations, attempts, failures, bytes, what is under way."""

import contextlib
import datetime
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.utils import p64

from tests.support.counts import figures, nonzero, value
from tests.support.download_target import Target
from tests.support.waiting import wait_for
from zodb_s3blobs.metrics import S3_CODES, S3_FAILURES, S3_OPERATIONS
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BlobNotFound, BucketError, TransferCancelled

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, TID, OTHER_TID = p64(1), p64(2), p64(3)

OPERATIONS = "s3blobs_s3_operations_total"
FAILURES = "s3blobs_s3_operation_failures_total"
DURATIONS = "s3blobs_s3_operation_duration_seconds_count"
ATTEMPTS = "s3blobs_s3_attempts_total"
ATTEMPT_FAILURES = "s3blobs_s3_attempt_failures_total"
INFLIGHT = "s3blobs_s3_inflight_operations"
SENT = "s3blobs_s3_sent_bytes_total"
RECEIVED = "s3blobs_s3_received_bytes_total"


@pytest.fixture
def target(tmp_path):
    return Target(tmp_path / "target")


@pytest.fixture
def store(s3, bucket_name):
    """Puts the blob (OID, TID) into the bucket, unseen by the figures; without a checksum in its metadata."""
    return lambda data: s3.client.put_object(Bucket=bucket_name, Key="blobs/1/2.blob", Body=data)


@pytest.fixture
def background(s3):
    """Runs a function in a thread; returns its future."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit
        s3.behave()


def error_body(code):
    return f"<Error><Code>{code}</Code><Message></Message></Error>"


def check_nothing_is_under_way(metrics):
    assert nonzero(metrics, INFLIGHT) == {}
    assert nonzero(metrics, DURATIONS) == nonzero(metrics, OPERATIONS)  # each has ended, once


# Operations and attempts


def test_everything_known_in_advance_is_0_from_the_start(bucket, metrics):
    known = figures(metrics)
    for operation in S3_OPERATIONS:
        for name in OPERATIONS, ATTEMPTS, INFLIGHT, DURATIONS:
            assert known[name, ("operation", operation)] == 0
        for reason in S3_FAILURES:
            assert known[FAILURES, ("operation", operation), ("reason", reason)] == 0
        for code in S3_CODES:
            assert known[ATTEMPT_FAILURES, ("code", code), ("operation", operation)] == 0
    assert known[SENT,] == known[RECEIVED,] == 0


def test_every_operation_is_counted_by_its_name(s3, bucket, metrics, new_file, target):
    bucket.put(OID, TID, new_file(b"data"))
    bucket.put(p64(9), TID, new_file(os.urandom(PART + 1)))
    bucket.get(OID, TID, target)
    bucket.find(OID, TID, new_file(b"data"))
    bucket.copy(OID, TID, OTHER_TID)
    list(bucket.list_blobs())
    bucket.delete([(OID, TID)])
    bucket.delete([(OID, OTHER_TID), (p64(9), TID)])
    expected = {
        "put": 1, "create_multipart": 1, "put_part": 2, "complete_multipart": 1, "get": 1, "head": 2, "copy": 1,
        "list": 1, "delete": 2,
    }  # fmt: skip
    assert nonzero(metrics, OPERATIONS) == expected
    assert nonzero(metrics, ATTEMPTS) == expected
    assert nonzero(metrics, FAILURES) == nonzero(metrics, ATTEMPT_FAILURES) == {}
    assert len(s3.requests()) == sum(expected.values())
    check_nothing_is_under_way(metrics)


def test_what_succeeds_in_the_end_is_no_failure(s3, bucket, metrics):
    s3.misbehave(status=500, code="InternalError", times=2)
    bucket.probe()
    assert nonzero(metrics, OPERATIONS) == {"list": 1}
    assert nonzero(metrics, ATTEMPTS) == {"list": 3}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("500", "list"): 2}
    assert nonzero(metrics, FAILURES) == {}
    assert bucket.last_answer[0] is None
    check_nothing_is_under_way(metrics)


def test_the_duration_of_an_operation_is_that_of_all_its_attempts(s3, bucket, metrics):
    s3.misbehave(latency=0.2, status=500, code="InternalError", times=1)
    s3.misbehave(latency=0.2, times=1)
    bucket.probe()
    assert value(metrics, "s3blobs_s3_operation_duration_seconds_sum", operation="list") >= 0.4


def test_an_error_in_the_body_of_a_good_answer_is_a_failure(s3, open_bucket, metrics, new_file):
    """S3 answers a copy before it has ended, and tells in the body how it did."""
    bucket = open_bucket(s3_max_attempts=2)
    bucket.put(OID, TID, new_file(b"data"))
    s3.misbehave(operation="CopyObject", status=200, code="InternalError")
    with pytest.raises(BucketError):
        bucket.copy(OID, TID, OTHER_TID)
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("500", "copy"): 2}
    assert nonzero(metrics, FAILURES) == {("copy", "server"): 1}
    check_nothing_is_under_way(metrics)


# Failures


UNANSWERED = "the bucket did not answer"


@pytest.mark.parametrize(
    ("fault", "code", "reason", "trouble"),
    [
        ({"status": 403, "code": "AccessDenied"}, "403", "auth", None),
        ({"status": 401}, "401", "auth", None),
        ({"status": 400, "code": "ExpiredToken"}, "400", "auth", None),
        ({"status": 503, "code": "SlowDown"}, "503", "throttled", UNANSWERED),
        ({"status": 429, "code": "TooManyRequests"}, "429", "throttled", UNANSWERED),
        ({"status": 500, "code": "InternalError"}, "500", "server", UNANSWERED),
        ({"status": 502, "body": "<html>a proxy"}, "502", "server", UNANSWERED),
        ({"status": 404, "code": "NoSuchBucket"}, "404", "request", None),
        ({"status": 404, "body": "a proxy"}, "404", "request", None),
        ({"lose": True}, "connection", "connection", UNANSWERED),
        ({"hang": True}, "timeout", "timeout", UNANSWERED),
    ],
)
@pytest.mark.parametrize("operation", ["list", "put", "get"])
def test_a_failure_is_counted_once_with_its_reason(
    s3, open_bucket, metrics, new_file, target, operation, fault, code, reason, trouble
):
    bucket = open_bucket(s3_max_attempts=2, s3_read_timeout=1 if "hang" in fault else 60)
    s3.misbehave(**fault)
    ask = {
        "list": bucket.probe,
        "put": lambda: bucket.put(OID, TID, new_file(b"data")),
        "get": lambda: bucket.get(OID, TID, target),
    }[operation]
    with pytest.raises(BucketError):
        ask()
    assert nonzero(metrics, OPERATIONS) == {operation: 1}
    assert nonzero(metrics, FAILURES) == {(operation, reason): 1}
    assert nonzero(metrics, ATTEMPTS) == {operation: len(s3.requests())}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {(code, operation): len(s3.requests())}
    assert (bucket.last_answer[0] or "").startswith(trouble or "")
    assert (bucket.last_answer[0] is None) == (trouble is None)
    check_nothing_is_under_way(metrics)


def test_where_nobody_listens_the_connection_fails(open_bucket, metrics):
    bucket = open_bucket(s3_endpoint_url="http://127.0.0.1:1", s3_max_attempts=2)
    with pytest.raises(BucketError):
        bucket.probe()
    assert nonzero(metrics, FAILURES) == {("list", "connection"): 1}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("connection", "list"): 2}
    assert bucket.last_answer[0].startswith(UNANSWERED)
    check_nothing_is_under_way(metrics)


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """Takes all credentials out of the environment; returns the path of the configuration file that boto3 reads."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path / "config"


def test_without_credentials_nothing_is_answered(aws, open_bucket, metrics):
    bucket = open_bucket(s3_access_key=None, s3_secret_key=None)
    with pytest.raises(BucketError, match="no credentials"):
        bucket.probe()
    assert nonzero(metrics, FAILURES) == {("list", "auth"): 1}
    assert bucket.last_answer[0] is not None
    check_nothing_is_under_way(metrics)


def test_credentials_that_cannot_be_renewed_are_no_matter_of_the_connection(aws, open_bucket, metrics, tmp_path):
    credentials = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c"}
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)
    (tmp_path / "once").write_text(json.dumps({**credentials, "Expiration": soon.isoformat()}))
    (tmp_path / "get").write_text(f"cat {tmp_path}/once && rm {tmp_path}/once")
    aws.write_text(f"[default]\ncredential_process = sh {tmp_path}/get\n")
    bucket = open_bucket(s3_access_key=None, s3_secret_key=None)
    with pytest.raises(BucketError, match="CredentialRetrievalError"):
        bucket.probe()
    assert nonzero(metrics, FAILURES) == {("list", "auth"): 1}
    assert bucket.last_answer[0] is not None
    check_nothing_is_under_way(metrics)


def test_that_an_object_is_not_there_is_no_failure(bucket, metrics, new_file, target):
    with pytest.raises(BlobNotFound):
        bucket.get(OID, TID, target)
    with pytest.raises(BlobNotFound):
        bucket.copy(OID, TID, OTHER_TID)
    assert not bucket.find(OID, TID, new_file(b"data"))
    assert nonzero(metrics, OPERATIONS) == {"get": 1, "head": 2}
    assert nonzero(metrics, FAILURES) == nonzero(metrics, ATTEMPT_FAILURES) == {}
    assert bucket.last_answer[0] is None
    check_nothing_is_under_way(metrics)


def test_that_an_empty_object_has_no_first_byte_is_no_failure(store, bucket, metrics, target):
    store(b"")
    assert bucket.get(OID, TID, target).size == 0
    assert nonzero(metrics, OPERATIONS) == {"get": 2}
    assert nonzero(metrics, FAILURES) == nonzero(metrics, ATTEMPT_FAILURES) == {}
    check_nothing_is_under_way(metrics)


def test_a_body_that_breaks_off_is_a_failure_of_its_operation(s3, store, open_bucket, metrics, target):
    store(b"data")
    bucket = open_bucket(s3_max_attempts=3)
    s3.misbehave(operation="GetObject", truncate=1, times=2)
    assert bucket.get(OID, TID, target).size == 4
    assert nonzero(metrics, OPERATIONS) == nonzero(metrics, ATTEMPTS) == {"get": 3}
    assert nonzero(metrics, FAILURES) == {("get", "connection"): 2}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("connection", "get"): 2}
    assert bucket.last_answer[0] is None
    check_nothing_is_under_way(metrics)


def test_when_the_last_body_breaks_off_the_bucket_has_not_answered(s3, store, open_bucket, metrics, target):
    store(b"data")
    bucket = open_bucket(s3_max_attempts=1)
    s3.misbehave(operation="GetObject", truncate=1)
    with pytest.raises(BucketError):
        bucket.get(OID, TID, target)
    assert bucket.last_answer[0].startswith(UNANSWERED)
    check_nothing_is_under_way(metrics)


def test_a_body_that_is_not_what_the_service_said_is_damaged(s3, open_bucket, metrics, new_file, target):
    bucket = open_bucket(s3_max_attempts=2, s3_checksums="when_supported")
    bucket.put(OID, TID, new_file(b"data"))
    s3.misbehave(operation="GetObject", headers={"x-amz-checksum-crc32": "AAAAAA=="})
    with pytest.raises(BucketError):
        bucket.get(OID, TID, target)
    assert nonzero(metrics, FAILURES) == {("get", "damaged"): 2}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("damaged", "get"): 2}
    assert bucket.last_answer[0] is None
    check_nothing_is_under_way(metrics)


def test_an_answer_that_is_none_of_s3_leaves_nothing_under_way(s3, bucket, metrics, target):
    s3.misbehave(operation="GetObject", status=200, body="<html>Welcome to this network")
    with pytest.raises(BucketError):
        bucket.get(OID, TID, target)
    check_nothing_is_under_way(metrics)


def test_a_request_to_another_region_has_no_name_of_its_own(s3, bucket, metrics):
    """boto3 looks for the region of a bucket with a request that is not in its own description of this one."""
    s3.misbehave(operation="ListObjects", status=301, code="PermanentRedirect")
    with pytest.raises(BucketError, match="PermanentRedirect"):
        bucket.probe()
    assert set(nonzero(metrics, OPERATIONS)) <= set(S3_OPERATIONS)
    assert ("list", "request") in nonzero(metrics, FAILURES)
    check_nothing_is_under_way(metrics)


# Bytes


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
@pytest.mark.parametrize("size", [0, 4, PART - 1])
def test_the_bytes_of_a_small_upload(open_bucket, metrics, new_file, size, checksums):
    open_bucket(s3_checksums=checksums).put(OID, TID, new_file(os.urandom(size)))
    assert value(metrics, SENT) == size
    assert value(metrics, RECEIVED) == 0


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
def test_the_bytes_of_an_upload_in_parts(s3, open_bucket, metrics, new_file, checksums):
    open_bucket(s3_checksums=checksums).put(OID, TID, new_file(os.urandom(PART + 1)))
    arrived = sum(int(request.headers.get("content-length", 0)) for request in s3.requests())
    assert value(metrics, SENT) == arrived > PART + 1


def test_the_bytes_of_every_attempt_are_sent(s3, bucket, metrics, new_file):
    s3.misbehave(status=500, code="InternalError", times=2)
    bucket.put(OID, TID, new_file(b"data"))
    assert value(metrics, SENT) == 3 * 4
    assert value(metrics, RECEIVED) == 2 * len(error_body("InternalError"))


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
@pytest.mark.parametrize("size", [1, PART, 2 * PART + 1])
def test_the_bytes_of_a_download(store, open_bucket, metrics, target, size, checksums):
    store(os.urandom(size))
    open_bucket(s3_checksums=checksums).get(OID, TID, target)
    assert value(metrics, RECEIVED) == size
    assert value(metrics, SENT) == 0


def test_the_bytes_of_an_error_and_of_a_list_are_received_once(s3, open_bucket, metrics, target):
    bucket = open_bucket(s3_max_attempts=1)
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    with pytest.raises(BucketError):
        bucket.get(OID, TID, target)
    assert value(metrics, RECEIVED) == len(error_body("AccessDenied"))
    listed = "<ListBucketResult></ListBucketResult>"
    s3.misbehave(operation="ListObjects", status=200, body=listed)
    assert list(bucket.list_blobs()) == []
    assert value(metrics, RECEIVED) == len(error_body("AccessDenied")) + len(listed)


# What is under way


def test_an_operation_is_under_way_until_it_is_answered(s3, bucket, metrics, new_file, background):
    s3.misbehave(operation="PutObject", hang=True)
    puts = [background(bucket.put, p64(number), TID, new_file(b"data")) for number in range(3)]
    s3.wait_for("PutObject", 3)
    assert nonzero(metrics, INFLIGHT) == {"put": 3}
    assert nonzero(metrics, DURATIONS) == {}
    s3.behave()
    for put in puts:
        put.result(30)
    check_nothing_is_under_way(metrics)


def test_a_download_is_under_way_until_its_body_has_been_read(store, bucket, metrics, tmp_path):
    store(b"data")
    seen = []

    def write():
        seen.append(nonzero(metrics, INFLIGHT))
        time.sleep(0.3)

    bucket.get(OID, TID, Target(tmp_path / "target", write))
    assert seen == [{"get": 1}]
    assert value(metrics, "s3blobs_s3_operation_duration_seconds_sum", operation="get") >= 0.3
    check_nothing_is_under_way(metrics)


@pytest.mark.parametrize("size", [4, 2 * PART + 1])
def test_a_body_that_nobody_wants_any_more_has_not_failed(store, bucket, metrics, tmp_path, size):
    store(os.urandom(size))

    def write():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        bucket.get(OID, TID, Target(tmp_path / "target", write))
    assert nonzero(metrics, FAILURES) == nonzero(metrics, ATTEMPT_FAILURES) == {}
    check_nothing_is_under_way(metrics)


def test_a_range_of_another_object_is_closed_unread(s3, store, open_bucket, metrics, target):
    store(os.urandom(PART + 1))
    s3.misbehave(operation="GetObject", times=1)
    s3.misbehave(operation="GetObject", headers={"etag": '"another"'}, times=1)
    open_bucket(s3_max_attempts=2).get(OID, TID, target)
    assert nonzero(metrics, FAILURES) == {}
    assert nonzero(metrics, OPERATIONS) == {"get": 4}
    check_nothing_is_under_way(metrics)


def test_a_cancelled_upload_is_no_failure(s3, bucket, metrics, new_file, background):
    def progress(transferred):
        raise TransferCancelled()

    s3.misbehave(operation="AbortMultipartUpload", hang=True)
    put = background(bucket.put, OID, TID, new_file(os.urandom(PART)), progress)
    s3.wait_for("AbortMultipartUpload")
    assert nonzero(metrics, INFLIGHT) == {"abort_multipart": 1}
    assert bucket.last_answer[0] is None  # that of the creation: no later operation has ended yet
    s3.behave()
    with pytest.raises(TransferCancelled):
        put.result(30)
    assert nonzero(metrics, FAILURES) == nonzero(metrics, ATTEMPT_FAILURES) == {}
    check_nothing_is_under_way(metrics)


def test_a_cancelled_upload_does_not_make_the_bucket_answer(s3, open_bucket, metrics, new_file, background):
    bucket = open_bucket(s3_max_attempts=1)

    def progress(transferred):
        s3.misbehave(operation="ListObjects", lose=True)
        with contextlib.suppress(BucketError):
            bucket.probe()
        s3.misbehave(operation="AbortMultipartUpload", hang=True)
        raise TransferCancelled()

    put = background(bucket.put, OID, TID, new_file(os.urandom(PART)), progress)
    s3.wait_for("AbortMultipartUpload")
    assert bucket.last_answer[0].startswith(UNANSWERED)
    s3.behave()
    with pytest.raises(TransferCancelled):
        put.result(30)
    check_nothing_is_under_way(metrics)


def test_parts_that_end_because_another_was_refused_have_not_failed(s3, open_bucket, metrics, new_file):
    bucket = open_bucket(s3_max_attempts=2)
    begun = []

    def progress(transferred):
        # The last part is one byte, and sent with one step. The large ones go on when it has been refused.
        begun.append(transferred)
        if transferred > 1:
            wait_for(lambda: nonzero(metrics, ATTEMPT_FAILURES))
            wait_for(lambda: value(metrics, INFLIGHT, operation="put_part") == 2)
            time.sleep(0.1)  # for s3transfer to hear of it as well

    s3.misbehave(operation="UploadPart", latency=2, status=403, code="AccessDenied")
    with pytest.raises(BucketError, match="AccessDenied"):
        bucket.put(OID, TID, new_file(os.urandom(2 * PART + 1)), progress)
    assert len(begun) >= 3  # all were being sent
    assert nonzero(metrics, FAILURES) == {("put_part", "auth"): 1}
    assert nonzero(metrics, ATTEMPT_FAILURES) == {("403", "put_part"): 1}
    check_nothing_is_under_way(metrics)


def test_closing_the_bucket_leaves_no_transfer_under_way(s3, bucket, metrics, new_file, background):
    s3.misbehave(operation="UploadPart", hang=True)
    put = background(bucket.put, OID, TID, new_file(os.urandom(2 * PART)))
    s3.wait_for("UploadPart", 2)
    assert nonzero(metrics, INFLIGHT) == {"put_part": 2}
    bucket.close()
    s3.behave()
    assert put.exception(30) is not None
    wait_for(lambda: nonzero(metrics, INFLIGHT) == {})
