"""A blob is uploaded to its staging key while it arrives: in parts, beside others, without a trace if it ends early."""

import base64
import hashlib
import os
import threading
import time
from concurrent.futures import wait

import pytest
from ZODB.utils import p64

from tests.support.waiting import wait_for
from zodb_s3blobs.arriving import Arriving
from zodb_s3blobs.s3 import upload as upload_module
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BucketError, TransferCancelled

pytestmark = pytest.mark.usefixtures("no_pauses")

TIMEOUT = 60
OID, TID = p64(1), p64(2)
KEY = "blobs/1/2.blob"
NAME = "0123456789abcdef" * 2
STAGED = f"staged/{NAME}"
CUSTOMER_KEY = b"a customer key that has 32 bytes"
ANSWERS_AS_IF_ENCRYPTED = {"x-amz-server-side-encryption-customer-algorithm": "AES256"}


class Client:
    """A client that sends a blob. ``body``: the blob as it arrives."""

    def __init__(self, path):
        path.touch()
        self._path = path
        self.body = Arriving(str(path))

    def send(self, data):
        with open(self._path, "ab") as file:
            file.write(data)
        self.body.grew_to(self._path.stat().st_size)

    def end(self):
        self.body.complete()


@pytest.fixture
def new_client(background, tmp_path):
    # After `background`, or its threads would wait for the clients for ever.
    clients = []

    def make():
        clients.append(Client(tmp_path / f"arriving-{len(clients)}"))
        return clients[-1]

    yield make
    for client in clients:
        client.body.cancel()


@pytest.fixture
def client(new_client):
    return new_client()


@pytest.fixture
def stored(s3, bucket_name):
    """What S3 has at a key: its bytes, and its metadata."""

    def stored(key=STAGED):
        answer = s3.client.get_object(Bucket=bucket_name, Key=key)
        return answer["Body"].read(), answer["Metadata"]

    return stored


@pytest.fixture
def nothing_left(s3, bucket_name):
    """Asserts that the bucket has neither an object nor an upload that has not ended."""

    def nothing_left():
        assert s3.keys(bucket_name) == []
        assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket_name)

    return nothing_left


def operations(s3):
    return [request.operation for request in s3.requests()]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# What arrives


@pytest.mark.parametrize("size", [0, 1, PART - 1])
def test_a_small_blob_is_put_with_one_request(s3, bucket, client, stored, size):
    data = os.urandom(size)
    client.send(data)
    client.end()
    assert bucket.put_staged_stream(NAME, client.body) == sha256(data)
    assert operations(s3) == ["PutObject"]
    assert stored() == (data, {})


@pytest.mark.parametrize("size", [PART, PART + 1, 3 * PART])
def test_a_large_blob_is_put_in_parts(s3, bucket, client, stored, size):
    data = os.urandom(size)
    client.send(data)
    client.end()
    assert bucket.put_staged_stream(NAME, client.body) == sha256(data)
    parts = ["UploadPart"] * -(-size // PART)
    assert operations(s3) == ["CreateMultipartUpload", *parts, "CompleteMultipartUpload"]
    assert stored() == (data, {})


def test_parts_are_sent_before_the_end_has_arrived(s3, bucket, client, background, stored):
    data = os.urandom(2 * PART + 1)
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(data[: PART - 1])
    client.send(data[PART - 1 : PART + 1])
    s3.wait_for("UploadPart", 1)
    client.send(data[PART + 1 : -1])
    s3.wait_for("UploadPart", 2)
    assert not put.done()
    client.send(data[-1:])
    client.end()
    assert put.result(TIMEOUT) == sha256(data)
    assert len(s3.requests("UploadPart")) == 3
    assert stored()[0] == data


def test_the_parts_are_put_in_parallel(s3, bucket, client, background, stored):
    data = os.urandom(3 * PART)
    s3.misbehave(operation="UploadPart", hang=True)
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(data)
    s3.wait_for("UploadPart", 3)
    s3.behave()
    client.end()
    assert put.result(TIMEOUT) == sha256(data)
    assert stored()[0] == data


def test_the_bodies_carry_their_md5(s3, bucket, client):
    data = os.urandom(PART)
    client.send(data)
    client.end()
    bucket.put_staged_stream(NAME, client.body)
    expected = base64.b64encode(hashlib.md5(data).digest()).decode()
    assert s3.requests("UploadPart")[0].headers["content-md5"] == expected


def test_the_object_is_encrypted_and_has_the_usual_storage_class(s3, open_bucket, client):
    client.send(bytes(PART))
    client.end()
    open_bucket(s3_sse="AES256", s3_storage_class="STANDARD_IA").put_staged_stream(NAME, client.body)
    headers = s3.requests("CreateMultipartUpload")[0].headers
    assert headers["x-amz-server-side-encryption"] == "AES256"
    assert "x-amz-storage-class" not in headers


def test_progress_adds_up_to_the_size_of_the_blob(bucket, client):
    steps = []
    client.send(bytes(PART + 1))
    client.end()
    bucket.put_staged_stream(NAME, client.body, steps.append)
    assert sum(steps) == PART + 1


def test_the_metrics_count_the_blob_and_not_the_time_in_which_the_client_was_slow(bucket, metrics):
    class Slow:
        def wait(self, size):
            time.sleep(2)

        def read(self, size):
            return b"data"

    bucket.put_staged_stream(NAME, Slow())
    values = {
        sample.name: sample.value
        for instrument in (metrics.upload_size, metrics.upload_duration)
        for family in instrument.collect()
        for sample in family.samples
    }
    assert values["s3blobs_upload_size_bytes_sum"] == 4
    assert values["s3blobs_upload_duration_seconds_count"] == 1
    assert values["s3blobs_upload_duration_seconds_sum"] < 2


# Publication


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_copy_that_publishes_the_blob_stores_its_sha256(monkeypatch, s3, open_bucket, client, stored, in_parts):
    if in_parts:
        monkeypatch.setattr(upload_module, "COPY_PART", PART)
    bucket = open_bucket()
    data = os.urandom(2 * PART + 1)
    client.send(data)
    client.end()
    digest = bucket.put_staged_stream(NAME, client.body)
    bucket.publish(bucket.keys.staged_key(NAME), OID, TID, len(data), digest)
    assert stored(KEY) == (data, {"sha256": sha256(data)})
    assert len(s3.requests("UploadPartCopy")) == (3 if in_parts else 0)
    assert bucket.verify(OID, TID).is_proven


# Which buckets can


@pytest.mark.parametrize(("threshold", "can_stream"), [(5 << 20, True), (PART, True), (PART + 1, False)])
def test_a_bucket_can_stream_if_parts_of_that_size_are_allowed(open_bucket, threshold, can_stream):
    assert open_bucket(s3_multipart_threshold=threshold).can_stream is can_stream


def test_a_blob_that_is_larger_than_an_upload_can_be_is_refused(monkeypatch, open_bucket, client, nothing_left):
    monkeypatch.setattr(upload_module, "STREAM_LIMIT", 2 * PART)
    bucket = open_bucket()
    client.send(bytes(2 * PART + 1))
    client.end()
    with pytest.raises(BucketError, match="s3-multipart-threshold"):
        bucket.put_staged_stream(NAME, client.body)
    nothing_left()


# The end before the end


@pytest.mark.parametrize("sent", [0, PART - 1, 2 * PART + 1])
def test_a_blob_that_is_given_up_leaves_nothing(s3, bucket, client, background, nothing_left, sent):
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(bytes(sent))
    s3.wait_for("UploadPart", sent // PART)
    client.body.cancel()
    with pytest.raises(TransferCancelled):
        put.result(TIMEOUT)
    nothing_left()
    assert not s3.requests("PutObject")


def test_a_blob_that_is_given_up_while_a_part_is_on_its_way_leaves_nothing(
    s3, bucket, client, background, nothing_left
):
    s3.misbehave(operation="UploadPart", latency=0.5)
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(bytes(PART))
    s3.wait_for("UploadPart")
    client.body.cancel()
    with pytest.raises(TransferCancelled):
        put.result(TIMEOUT)
    nothing_left()


def test_progress_can_end_the_upload(bucket, client, nothing_left):
    def progress(transferred):
        raise TransferCancelled()

    client.send(bytes(PART))
    client.end()
    with pytest.raises(TransferCancelled):
        bucket.put_staged_stream(NAME, client.body, progress)
    nothing_left()


def test_a_closed_bucket_ends_the_upload(s3, bucket, client, background):
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(bytes(PART))
    s3.wait_for("UploadPart")
    bucket.close()
    client.send(bytes(PART))
    with pytest.raises(TransferCancelled):
        put.result(TIMEOUT)


# Failures


@pytest.mark.parametrize(
    ("fault", "reason"),
    [({"reset": True}, "connection"), ({"status": 500, "code": "InternalError"}, "server")],
)
def test_an_outage_in_the_middle_shows_before_the_end_and_leaves_nothing(
    s3, open_bucket, client, background, nothing_left, fault, reason
):
    bucket = open_bucket(s3_max_attempts=2)
    put = background(bucket.put_staged_stream, NAME, client.body)
    client.send(bytes(PART))
    wait_for(lambda: [request.status for request in s3.requests("UploadPart")] == [200])
    s3.misbehave(operation="UploadPart", **fault)
    client.send(bytes(PART))
    s3.wait_for("UploadPart", 3)
    for _ in range(20):  # the failure may still be on its way while a part is read
        client.send(bytes(PART))
        if wait([put], 0.5).done:
            break
    with pytest.raises(BucketError, match=STAGED) as caught:
        put.result(TIMEOUT)
    assert caught.value.reason == reason
    s3.behave()
    nothing_left()


def test_a_service_that_refuses_is_an_error(s3, bucket, client):
    s3.misbehave(operation="CreateMultipartUpload", status=403, code="AccessDenied")
    client.send(bytes(PART))
    client.end()
    with pytest.raises(BucketError, match="AccessDenied") as caught:
        bucket.put_staged_stream(NAME, client.body)
    assert caught.value.reason == "auth"
    assert not s3.requests("UploadPart")


def test_a_part_that_fails_once_is_sent_again(s3, bucket, client, stored):
    s3.misbehave(operation="UploadPart", status=500, code="InternalError", times=1)
    data = os.urandom(PART + 1)
    client.send(data)
    client.end()
    assert bucket.put_staged_stream(NAME, client.body) == sha256(data)
    assert len(s3.requests("UploadPart")) == 3
    assert stored()[0] == data


def test_an_upload_is_known_to_have_ended_when_the_answer_is_lost(s3, bucket, client, stored):
    s3.misbehave(operation="CompleteMultipartUpload", lose=True, times=1)
    s3.misbehave(operation="CompleteMultipartUpload", status=404, code="NoSuchUpload")
    data = os.urandom(PART)
    client.send(data)
    client.end()
    assert bucket.put_staged_stream(NAME, client.body) == sha256(data)
    assert stored()[0] == data


def test_an_upload_that_somebody_else_ended_is_an_error(s3, bucket, client):
    s3.misbehave(operation="CompleteMultipartUpload", status=404, code="NoSuchUpload")
    client.send(bytes(PART))
    client.end()
    with pytest.raises(BucketError, match="NoSuchUpload"):
        bucket.put_staged_stream(NAME, client.body)


def test_a_file_that_cannot_be_read_is_no_failure_of_s3(bucket, tmp_path, nothing_left):
    body = Arriving(str(tmp_path / "absent"))
    body.grew_to(PART)
    with pytest.raises(FileNotFoundError):
        bucket.put_staged_stream(NAME, body)
    nothing_left()


# Encryption with the customer's key. moto ignores it, as some services do.


def test_the_customer_key_goes_with_every_request(s3, open_bucket, client):
    s3.misbehave(operation="GetObject", status=400, code="InvalidRequest", times=1)  # the try to read without the key
    s3.misbehave(headers=ANSWERS_AS_IF_ENCRYPTED)
    client.send(bytes(PART))
    client.end()
    open_bucket(s3_sse_customer_key=CUSTOMER_KEY).put_staged_stream(NAME, client.body)
    for operation in ("CreateMultipartUpload", "UploadPart"):
        headers = s3.requests(operation)[0].headers
        assert base64.b64decode(headers["x-amz-server-side-encryption-customer-key"]) == CUSTOMER_KEY


@pytest.mark.parametrize("size", [4, PART])
def test_a_service_that_ignores_the_customer_key_is_refused(open_bucket, client, size):
    client.send(bytes(size))
    client.end()
    with pytest.raises(BucketError, match="ignores s3-sse-customer-key"):
        open_bucket(s3_sse_customer_key=CUSTOMER_KEY).put_staged_stream(NAME, client.body)


# Many at once


def test_slow_clients_do_not_hold_up_another_one(s3, open_bucket, new_client, background):
    bucket = open_bucket(s3_concurrency=1)
    slow = [new_client() for _ in range(20)]
    puts = [background(bucket.put_staged_stream, f"{number:032x}", one.body) for number, one in enumerate(slow)]
    for one in slow[:10]:
        one.send(bytes(PART))
    s3.wait_for("UploadPart", 10)
    for one in slow:
        one.send(b"part")
    client, data = new_client(), os.urandom(2 * PART + 1)
    client.send(data)
    client.end()
    assert background(bucket.put_staged_stream, NAME, client.body).result(TIMEOUT) == sha256(data)
    assert not any(put.done() for put in puts)


def test_many_streams_arrive_whole(open_bucket, new_client, background, stored):
    bucket = open_bucket(s3_concurrency=2)
    blobs = {f"{number:032x}": os.urandom(PART + 1 + number * PART // 4) for number in range(8)}
    clients = {name: new_client() for name in blobs}
    puts = {name: background(bucket.put_staged_stream, name, clients[name].body) for name in blobs}
    step = PART // 2 + 1
    for start in range(0, max(map(len, blobs.values())), step):
        for name, data in blobs.items():
            clients[name].send(data[start : start + step])
    for name, data in blobs.items():
        clients[name].end()
        assert puts[name].result(TIMEOUT) == sha256(data)
        assert stored(f"staged/{name}")[0] == data


def test_a_silent_service_does_not_fill_the_memory_with_parts(s3, open_bucket, background):
    lock, waits, reads = threading.Lock(), [], []

    class Endless:
        ended = False

        def wait(self, size):
            with lock:
                waits.append(size)

        def read(self, size):
            if self.ended:
                raise TransferCancelled()
            with lock:
                reads.append(size)
            return bytes(size)

    bucket, bodies = open_bucket(s3_concurrency=2), [Endless() for _ in range(4)]
    s3.misbehave(operation="UploadPart", hang=True)
    puts = [background(bucket.put_staged_stream, f"{number:032x}", body) for number, body in enumerate(bodies)]
    try:
        # Two parts are being sent and one is about to be. The other three streams could read, and do not.
        wait_for(lambda: len(waits) >= 6)
        s3.wait_for("UploadPart", 2)
        assert len(reads) == 3
    finally:
        for body in bodies:
            body.ended = True
        s3.behave()
    for put in puts:
        with pytest.raises(TransferCancelled):
            put.result(TIMEOUT)
