"""What services, and what is no service, answer; what is asked for again; connections that are gone."""

import contextlib
import errno
import logging
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ZODB.utils import p64

from tests.support.web_server import Objects, WebServer, make_certificate
from zodb_s3blobs.s3 import client as s3client
from zodb_s3blobs.s3 import upload as upload_module
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BucketError

OID, TID, OTHER_TID = p64(1), p64(2), p64(3)
KEY, OTHER_KEY = "blobs/1/2.blob", "blobs/1/3.blob"
LARGE = 2 * PART + 1

quick = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def stored(s3, bucket_name):
    """The bytes and the metadata of an object."""

    def stored(key=KEY):
        answer = s3.client.get_object(Bucket=bucket_name, Key=key)
        return answer["Body"].read(), answer["Metadata"]

    return stored


def reason_of(call):
    with pytest.raises(BucketError) as caught:
        call()
    return caught.value.reason


# Answers that are none of S3


PAGES = {
    "nothing": "",
    "a page": "<!DOCTYPE html><html><body><br>Back soon",
    "a page that is XML": "<html><body><p>Back soon</p></body></html>",
}


@quick
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize(
    ("operation", "size"),
    [
        ("PutObject", 4),
        ("CreateMultipartUpload", LARGE),
        ("UploadPart", LARGE),
        ("CompleteMultipartUpload", LARGE),
    ],
)
def test_an_upload_that_is_answered_by_something_else_has_failed(
    s3, bucket_name, open_bucket, new_file, page, operation, size
):
    bucket, filename = open_bucket(s3_max_attempts=2), new_file(os.urandom(size))
    s3.misbehave(operation=operation, status=200, body=page)
    with pytest.raises(BucketError, match=f"{KEY}.*s3-endpoint-url") as caught:
        bucket.put(OID, TID, filename)
    assert caught.value.reason == "foreign"
    s3.behave()
    s3.misbehave(operation=operation, status=200, body=page, times=1)
    bucket.put(OID, TID, filename)  # the second time it is S3 that answers
    assert s3.keys(bucket_name) == [KEY]


@quick
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("size", [4, LARGE])
def test_a_copy_that_is_answered_by_something_else_has_failed(s3, open_bucket, new_file, monkeypatch, page, size):
    monkeypatch.setattr(upload_module, "COPY_PART", PART)
    bucket = open_bucket(s3_max_attempts=1)
    bucket.put(OID, TID, new_file(os.urandom(size)))
    for operation in "CopyObject", "UploadPartCopy":
        s3.misbehave(operation=operation, status=200, body=page)
    assert reason_of(lambda: bucket.copy(OID, TID, OTHER_TID)) == "foreign"


@quick
@pytest.mark.parametrize("page", list(PAGES.values())[1:], ids=list(PAGES)[1:])
def test_a_listing_or_a_deletion_that_is_answered_by_a_page_has_failed(s3, open_bucket, put, page):
    put((OID, TID), (OID, OTHER_TID))
    bucket = open_bucket(s3_max_attempts=1)
    for operation, call in {
        "ListObjects": lambda: list(bucket.list_blobs()),
        "DeleteObjects": lambda: bucket.delete([(OID, TID), (OID, OTHER_TID)]),
        "DeleteObject": lambda: bucket.delete([(OID, TID)]),
    }.items():
        s3.misbehave(operation=operation, status=200, body=page)
        assert reason_of(call) == "foreign"


PORTAL = b"<!DOCTYPE html><title>Welcome</title>"
STATIC = {"Content-Type": "text/html", "ETag": '"5f3-61a"', "Last-Modified": "Sat, 28 Nov 2026 06:00:00 GMT"}


@quick
@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 405])
@pytest.mark.parametrize("headers", [{"Content-Type": "text/html; charset=utf-8"}, STATIC])
def test_another_web_server_has_neither_blobs_nor_has_it_none(open_bucket, open_cache, new_file, status, headers):
    with WebServer(lambda *request: (status, headers, PORTAL)) as web:
        bucket, filename = open_bucket(s3_endpoint_url=web.url, s3_max_attempts=1), new_file(b"data")
        for call in (
            bucket.probe,
            lambda: bucket.get(OID, TID, open_cache().new_file()),
            lambda: bucket.verify(OID, TID),
            lambda: bucket.find(OID, TID, filename),
            lambda: bucket.copy(OID, TID, OTHER_TID),
            lambda: bucket.delete([(OID, TID)]),
            lambda: bucket.put(OID, TID, filename) if "ETag" not in headers else bucket.probe(),
            bucket.read_owner,
        ):
            with pytest.raises(BucketError, match=r"not an S3 service.*s3-endpoint-url") as caught:
                call()
            assert caught.value.reason == "foreign"


@quick
@pytest.mark.parametrize("status", [400, 404])
def test_an_error_in_plain_text_is_none_of_s3(open_bucket, status):
    with WebServer(lambda *request: (status, {"Content-Type": "text/plain; charset=utf-8"}, b"no such page")) as web:
        bucket = open_bucket(s3_endpoint_url=web.url, s3_max_attempts=1)
        for call in bucket.probe, lambda: bucket.delete([(OID, TID)]), bucket.read_owner:
            assert reason_of(call) == "foreign"


def test_an_object_without_etag_is_read_by_its_checksum(open_bucket, cache, new_file):
    objects = Objects()

    def answer(*request):
        status, headers, body = objects(*request)
        return status, {k: v for k, v in headers.items() if k != "ETag" or request[0] == "PUT"}, body

    with WebServer(answer) as web:
        bucket = open_bucket(s3_endpoint_url=web.url)
        bucket.put(OID, TID, new_file(b"data"))
        file = cache.new_file()
        assert bucket.get(OID, TID, file).size == 4
        assert Path(file.path).read_bytes() == b"data"


def test_an_answer_without_a_length_is_told_as_one_that_s3_cannot_have_given(open_bucket, cache, new_file):
    """A proxy that compresses leaves it out; without it nobody knows how large the blob is."""
    objects = Objects()

    def answer(*request):
        status, headers, body = objects(*request)
        without = {"Content-Length": None, "Connection": "close"} if request[0] in ("GET", "HEAD") else {}
        return status, {**headers, **without}, body

    with WebServer(answer) as web:
        bucket = open_bucket(s3_endpoint_url=web.url, s3_max_attempts=1)
        bucket.put(OID, TID, filename := new_file(b"data"))
        assert reason_of(lambda: bucket.get(OID, TID, cache.new_file())) == "foreign"
        assert reason_of(lambda: bucket.find(OID, TID, filename)) == "foreign"


# What arrives at the service


@quick
def test_a_small_upload_that_the_service_keeps_damaged_has_failed(open_bucket, new_file):
    with WebServer(Objects(store=lambda data: bytes([data[0] ^ 1]) + data[1:], etag=lambda data: "0" * 32)) as web:
        bucket = open_bucket(s3_endpoint_url=web.url)
        with pytest.raises(BucketError, match="other bytes than were sent") as caught:
            bucket.put(OID, TID, new_file(b"data"))
        assert caught.value.reason == "damaged"


def test_a_service_whose_etags_are_no_md5_is_asked_once_what_it_has(open_bucket, new_file):
    with WebServer(Objects(etag=lambda data: "0" * 32)) as web:
        bucket = open_bucket(s3_endpoint_url=web.url)
        for tid in range(3):
            bucket.put(OID, p64(tid), new_file(b"data"))
        assert [method for method, _ in web.requests] == ["PUT", "GET", "PUT", "PUT"]


def test_a_service_whose_etags_are_md5_is_not_asked_what_it_has(open_bucket, new_file):
    with WebServer(Objects()) as web:
        open_bucket(s3_endpoint_url=web.url).put(OID, TID, new_file(b"data"))
        assert [method for method, _ in web.requests] == ["PUT"]


# What is asked for again


PASSING = [
    *((status, "") for status in (408, 429, 500, 502, 503, 504, 520, 522, 524)),
    (409, "OperationAborted"),
    (400, "RequestTimeout"),
    (503, "SlowDown"),
]


@quick
@pytest.mark.parametrize(("status", "code"), PASSING)
def test_a_refusal_that_passes_is_asked_for_again(s3, bucket, new_file, open_cache, stored, status, code):
    fault = {"status": status, "code": code} if code else {"status": status, "body": "<html>later</html>"}
    s3.misbehave(operation="PutObject", times=1, **fault)
    bucket.put(OID, TID, new_file(b"data"))
    assert stored()[0] == b"data"
    s3.misbehave(operation="GetObject", times=1, **fault)
    assert bucket.get(OID, TID, open_cache().new_file()).size == 4


@quick
def test_an_outage_does_not_use_up_the_repetitions_of_what_comes_after_it(s3, open_bucket, new_file):
    bucket, filename = open_bucket(s3_max_attempts=3), new_file(b"data")
    s3.misbehave(status=503, code="SlowDown")
    for _ in range(200):
        with pytest.raises(BucketError):
            bucket.verify(OID, TID)
    s3.behave()
    for tid in range(20):
        s3.misbehave(operation="PutObject", status=503, code="SlowDown", times=2)
        bucket.put(OID, p64(tid), filename)
        s3.behave()


def test_between_two_tries_there_is_a_pause_that_grows(s3, open_bucket, monkeypatch):
    pauses = []
    monkeypatch.setattr("botocore.endpoint.time.sleep", pauses.append)
    monkeypatch.setattr("random.random", lambda: 1.0)
    s3.misbehave(status=503, code="SlowDown")
    with pytest.raises(BucketError):
        open_bucket(s3_max_attempts=7).probe()
    assert pauses == [1, 2, 4, 8, 16, 20]


def test_a_copy_may_take_longer_than_another_request(s3, open_bucket, put, stored):
    put((OID, TID))
    bucket = open_bucket(s3_read_timeout=0.5, copy_timeout=30)
    s3.misbehave(operation="CopyObject", latency=1.5)
    bucket.copy(OID, TID, OTHER_TID)
    assert len(s3.requests("CopyObject")) == 1
    assert stored(OTHER_KEY)[0] == stored(KEY)[0]


@quick
def test_a_copy_that_may_still_be_going_on_is_not_asked_for_again(s3, open_bucket, put):
    put((OID, TID))
    bucket = open_bucket(copy_timeout=0.5)
    s3.misbehave(operation="CopyObject", hang=True)
    assert reason_of(lambda: bucket.copy(OID, TID, OTHER_TID)) == "timeout"
    assert len(s3.requests("CopyObject")) == 1


@quick
@pytest.mark.parametrize("status", [408, 502, 504, 524])
def test_a_copy_for_which_a_proxy_did_not_wait_is_not_asked_for_again(s3, bucket, put, status):
    put((OID, TID))
    s3.misbehave(operation="CopyObject", status=status, body="<html>It took too long</html>")
    reason_of(lambda: bucket.copy(OID, TID, OTHER_TID))
    assert len(s3.requests("CopyObject")) == 1


@quick
@pytest.mark.parametrize("size", [4, LARGE])
def test_a_copy_whose_answer_is_lost_is_looked_up(s3, open_bucket, new_file, stored, monkeypatch, size):
    monkeypatch.setattr(upload_module, "COPY_PART", PART)
    bucket = open_bucket()
    bucket.put(OID, TID, new_file(os.urandom(size)))
    for operation in "CopyObject", "CompleteMultipartUpload":
        s3.misbehave(operation=operation, lose=True, times=1)
    s3.misbehave(operation="CompleteMultipartUpload", status=404, code="NoSuchUpload")
    bucket.copy(OID, TID, OTHER_TID)
    assert stored(OTHER_KEY) == stored(KEY)
    assert len(s3.requests("CopyObject")) == (size < PART)
    assert list(bucket.list_uploads()) == []


@quick
def test_a_completed_upload_whose_answer_is_lost_is_looked_up(s3, bucket, new_file, stored):
    data = os.urandom(LARGE)
    s3.misbehave(operation="CompleteMultipartUpload", lose=True, times=1)
    s3.misbehave(operation="CompleteMultipartUpload", status=404, code="NoSuchUpload")
    bucket.put(OID, TID, new_file(data))
    assert stored()[0] == data
    assert len(s3.requests("UploadPart")) == 3
    assert list(bucket.list_uploads()) == []


@quick
def test_an_upload_that_somebody_aborted_is_not_taken_for_completed(s3, bucket, bucket_name, new_file):
    s3.misbehave(operation="CompleteMultipartUpload", status=404, code="NoSuchUpload")
    with pytest.raises(BucketError, match="NoSuchUpload"):
        bucket.put(OID, TID, new_file(os.urandom(LARGE)))
    assert s3.keys(bucket_name) == []


def test_a_copy_keeps_the_checksum_where_the_service_loses_the_metadata_of_copies(open_bucket, new_file):
    """It sends it again, as the header tells."""
    sent = []
    objects = Objects()

    def answer(method, path, headers, body):
        if method == "PUT" and headers.get("x-amz-copy-source"):
            sent.append({name.lower(): value for name, value in headers.items()})
            return 200, {}, b"<CopyObjectResult><ETag>1</ETag></CopyObjectResult>"
        return objects(method, path, headers, body)

    with WebServer(answer) as web:
        bucket = open_bucket(s3_endpoint_url=web.url)
        bucket.put(OID, TID, new_file(b"data"))
        bucket.copy(OID, TID, OTHER_TID)
        digest = bucket.put_staged("a" * 32, new_file(b"data"))
        bucket.publish(bucket.keys.staged_key("a" * 32), OID, OTHER_TID, 4, digest)
    assert [headers["x-amz-meta-sha256"] for headers in sent] == [digest, digest]
    assert [headers["x-amz-metadata-directive"] for headers in sent] == ["REPLACE", "REPLACE"]


def test_staged_uploads_are_in_the_usual_class_and_blobs_in_that_of_the_setting(s3, bucket_name, open_bucket, new_file):
    bucket = open_bucket(s3_storage_class="STANDARD_IA")
    for name, size in ("a" * 32, 4), ("b" * 32, LARGE):
        digest = bucket.put_staged(name, new_file(b"d" * size))
        bucket.publish(bucket.keys.staged_key(name), OID, p64(size), size, digest)
    found = s3.client.list_objects_v2(Bucket=bucket_name)["Contents"]
    assert {one["Key"].split("/")[0]: one["StorageClass"] for one in found} == {
        "staged": "STANDARD",
        "blobs": "STANDARD_IA",
    }


# Reaching the service


@contextlib.contextmanager
def silent_port():
    """A port that does not answer to a SYN: nobody accepts there, and its backlog is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            assert client.connect_ex(listener.getsockname()) in (0, errno.EINPROGRESS)
        yield listener.getsockname()[1]


@quick
def test_a_host_that_does_not_answer_is_a_timeout_of_the_service(open_bucket, new_file):
    with silent_port() as port:
        bucket = open_bucket(s3_endpoint_url=f"http://127.0.0.1:{port}", s3_connect_timeout=0.2, s3_max_attempts=2)
        with pytest.raises(BucketError, match=f"Could not store {KEY}.*ConnectTimeoutError.*network") as caught:
            bucket.put(OID, TID, new_file(b"data"))
        assert caught.value.reason == "timeout"


@quick
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://no-such-host.invalid", "the host name is unknown"),
        ("https://{address}", "SSLError"),  # it talks no TLS there
    ],
)
def test_why_the_service_is_not_reached_is_said(s3, open_bucket, url, words):
    bucket = open_bucket(s3_endpoint_url=url.format(address=s3.url.removeprefix("http://")), s3_max_attempts=1)
    with pytest.raises(BucketError, match=f"{words}.*s3-endpoint-url") as caught:
        bucket.probe()
    assert caught.value.reason == "connection"


@quick
def test_a_proxy_of_the_environment_is_named(open_bucket, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for name in "HTTP_PROXY", "http_proxy":
            monkeypatch.setenv(name, f"http://user:hidden@127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(BucketError, match=r"HTTP_PROXY.*add 127\.0\.0\.1 to NO_PROXY") as caught:
            open_bucket(s3_max_attempts=1).probe()
        assert "hidden" not in str(caught.value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        open_bucket().probe()


@quick
def test_a_private_authority_is_trusted_if_it_is_named(open_bucket, new_file, tmp_path):
    certificate = make_certificate(tmp_path / "service.pem")
    with WebServer(Objects(), certificate) as web:
        with pytest.raises(BucketError, match=r"certificate of the service is not trusted.*s3-ca-file") as caught:
            open_bucket(s3_endpoint_url=web.url, s3_max_attempts=1).put(OID, TID, new_file(b"data"))
        assert caught.value.reason == "connection"
        open_bucket(s3_endpoint_url=web.url, s3_ca_file=certificate).put(OID, TID, new_file(b"data"))


@quick
@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_a_session_token_that_has_ended_is_named(s3, open_bucket, new_file, code):
    s3.misbehave(operation="PutObject", status=400, code=code)
    with pytest.raises(BucketError) as caught:
        open_bucket(s3_session_token="a-token").put(OID, TID, new_file(b"data"))
    assert "s3-session-token is set, and ends some hours after it was issued" in str(caught.value)
    assert caught.value.reason == "auth" and "a-token" not in str(caught.value)
    with pytest.raises(BucketError) as caught:
        open_bucket().put(OID, TID, new_file(b"data"))
    assert "s3-session-token" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["{url}/{bucket}", "{url}/x/{bucket}/"])
def test_the_name_of_the_bucket_in_the_endpoint_is_found(s3, bucket_name, open_bucket, endpoint):
    bucket = open_bucket(s3_endpoint_url=endpoint.format(url=s3.url, bucket=bucket_name), s3_max_attempts=1)
    with pytest.raises(BucketError, match=r"s3-endpoint-url.*the name of the bucket"):
        bucket.probe()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what the kernel does")
def test_connections_that_are_not_used_are_kept_alive(s3, bucket):
    bucket.probe()
    port = int(s3.url.rpartition(":")[2])
    probes = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        kind, ticks = fields[5].split(":")
        if int(fields[2].rpartition(":")[2], 16) == port and fields[3] == "01" and kind == "02":
            probes.append(int(ticks, 16) / os.sysconf("SC_CLK_TCK"))
    assert probes and max(probes) <= 61


def test_a_connection_that_has_been_idle_is_not_trusted(open_bucket, monkeypatch, new_file):
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(s3client, "time", clock)
    now = 1000.0
    with WebServer(Objects()) as web:
        bucket, filename = open_bucket(s3_endpoint_url=web.url), new_file(b"data")
        for _ in range(3):
            bucket.put(OID, TID, filename)
        assert web.connections == 1
        now += 61
        bucket.put(OID, TID, filename)
        assert web.connections == 2


# Logs


@pytest.mark.parametrize(("level", "expected"), [("DEBUG", "INFO"), ("INFO", "INFO"), ("WARNING", "WARNING")])
def test_the_loggers_of_boto3_say_no_more_than_others_and_never_debug(open_bucket, monkeypatch, level, expected):
    for name in "", "boto3", "botocore", "s3transfer":
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET if name else getattr(logging, level))
        logging.getLogger(name).manager._clear_cache()
    open_bucket()
    for name in "boto3", "botocore", "s3transfer":
        assert logging.getLevelName(logging.getLogger(name).getEffectiveLevel()) == expected
