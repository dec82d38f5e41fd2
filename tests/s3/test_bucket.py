"""The bucket layer: what it asks of S3, what it makes of the answers, and which error each failure becomes."""

import base64
import contextlib
import hashlib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.utils import p64

from tests.support.download_target import Target
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3 import upload as upload_module
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import SETTING_FOR_ERROR, BlobDamaged, BlobNotFound, BucketError, TransferCancelled
from zodb_s3blobs.s3.listing import Listed

pytestmark = pytest.mark.usefixtures("no_pauses")

OID, TID, OTHER_TID = p64(1), p64(2), p64(3)
KEY, OTHER_KEY = "blobs/1/2.blob", "blobs/1/3.blob"
CUSTOMER_KEY = b"a customer key that has 32 bytes"
ANSWERS_AS_IF_ENCRYPTED = {"x-amz-server-side-encryption-customer-algorithm": "AES256"}


@pytest.fixture
def read(tmp_path):
    """Reads a blob of a bucket; returns its bytes, and checks that they are as many as `get` says."""

    def read(bucket, tid=TID):
        target = Target(tmp_path / "target")
        size = bucket.get(OID, tid, target).size
        data = (tmp_path / "target").read_bytes()
        assert size == len(data)
        return data

    return read


@pytest.fixture
def put(bucket, new_file, s3):
    """Puts a blob with ``data``, by the bucket, and forgets the requests."""

    def put(data, tid=TID):
        bucket.put(OID, tid, new_file(data))
        s3.forget()

    return put


@pytest.fixture
def stored(s3, bucket_name):
    """What S3 has at a key: its bytes, and the rest of its answer."""

    def stored(key=KEY):
        answer = s3.client.get_object(Bucket=bucket_name, Key=key)
        return answer["Body"].read(), answer

    return stored


def operations(s3):
    return [request.operation for request in s3.requests()]


def md5(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


# Writing


@pytest.mark.parametrize("size", [0, 1, PART - 1])
def test_a_small_blob_is_put_with_one_request(s3, bucket, new_file, stored, size):
    data = os.urandom(size)
    bucket.put(OID, TID, new_file(data))
    assert operations(s3) == ["PutObject"]
    assert stored()[0] == data


def test_a_small_blob_is_sent_without_waiting_for_leave(s3, bucket, new_file):
    bucket.put(OID, TID, new_file(b"data"))
    assert "expect" not in s3.requests("PutObject")[0].headers


@pytest.mark.parametrize("size", [PART, PART + 1])
def test_a_large_blob_is_put_in_parts(s3, bucket, new_file, stored, size):
    data = os.urandom(size)
    bucket.put(OID, TID, new_file(data))
    parts = ["UploadPart"] * -(-size // PART)
    assert operations(s3) == ["CreateMultipartUpload", *parts, "CompleteMultipartUpload"]
    assert stored()[0] == data


def test_the_parts_of_a_large_blob_are_put_in_parallel(s3, bucket, new_file, stored):
    data = os.urandom(2 * PART + 1)
    s3.misbehave(operation="UploadPart", hang=True)
    with ThreadPoolExecutor() as pool:
        put = pool.submit(bucket.put, OID, TID, new_file(data))
        s3.wait_for("UploadPart", 3)
        s3.behave()
        put.result()
    assert stored()[0] == data


def test_a_large_blob_does_not_queue_behind_the_parts_of_a_larger_one(
    s3, open_bucket, new_file, background, monkeypatch
):
    """The time limit of its transaction runs meanwhile."""
    monkeypatch.setattr(upload_module, "PART", 5 << 20)
    bucket = open_bucket(s3_concurrency=1, s3_multipart_threshold=5 << 20)
    s3.misbehave(operation="UploadPart", latency=0.2)
    larger = background(bucket.put, OID, p64(1), new_file(bytes(50 << 20)))
    s3.wait_for("UploadPart")
    bucket.put(OID, p64(2), new_file(bytes(10 << 20)))
    assert not larger.done()
    larger.result(60)


def test_a_blob_below_the_multipart_threshold_is_put_with_one_request(s3, open_bucket, new_file, stored):
    data = os.urandom(PART + 1)
    open_bucket(s3_multipart_threshold=5 << 30).put(OID, TID, new_file(data))
    assert operations(s3) == ["PutObject"]
    assert stored()[0] == data


@pytest.mark.parametrize("size", [4, PART])
def test_the_sha256_of_a_blob_is_in_its_metadata(bucket, new_file, stored, size):
    data = os.urandom(size)
    bucket.put(OID, TID, new_file(data))
    assert stored()[1]["Metadata"] == {"sha256": hashlib.sha256(data).hexdigest()}


def test_a_blob_can_be_put_again(bucket, new_file, stored):
    for data in (b"first", b"second"):
        bucket.put(OID, TID, new_file(data))
    assert stored()[0] == b"second"


def test_when_required_bodies_carry_their_md5_and_no_crc(s3, open_bucket, new_file):
    bucket = open_bucket(s3_checksums="when_required")
    large = os.urandom(PART)
    bucket.put(OID, TID, new_file(b"small"))
    bucket.put(OID, OTHER_TID, new_file(large))
    for request, data in ((s3.requests("PutObject")[0], b"small"), (s3.requests("UploadPart")[0], large)):
        assert request.headers["content-md5"] == md5(data)
        assert "x-amz-checksum-crc32" not in request.headers
    bucket.delete([(OID, TID), (OID, OTHER_TID)])
    assert s3.requests("DeleteObjects")[0].headers["content-md5"]


def test_when_supported_bodies_carry_a_crc_and_no_md5(s3, open_bucket, new_file, read):
    bucket = open_bucket(s3_checksums="when_supported")
    bucket.put(OID, TID, new_file(b"small"))
    bucket.put(OID, OTHER_TID, new_file(os.urandom(PART)))
    for request in (s3.requests("PutObject")[0], s3.requests("UploadPart")[0]):
        assert request.headers["x-amz-checksum-crc32"]
        assert "content-md5" not in request.headers
    assert read(bucket) == b"small"


@pytest.mark.parametrize(
    ("changes", "header", "value"),
    [
        ({"s3_storage_class": "STANDARD_IA"}, "x-amz-storage-class", "STANDARD_IA"),
        ({"s3_sse": "AES256"}, "x-amz-server-side-encryption", "AES256"),
        ({"s3_sse": "aws:kms"}, "x-amz-server-side-encryption", "aws:kms"),
        (
            {"s3_sse": "aws:kms", "s3_sse_kms_key_id": "my-key"},
            "x-amz-server-side-encryption-aws-kms-key-id",
            "my-key",
        ),
    ],
)
def test_storage_class_and_encryption_go_with_every_new_object(s3, open_bucket, new_file, changes, header, value):
    bucket = open_bucket(**changes)
    bucket.put(OID, TID, new_file(b"small"))
    bucket.put(p64(9), TID, new_file(os.urandom(PART)))
    bucket.copy(OID, TID, OTHER_TID)
    for operation in ("PutObject", "CreateMultipartUpload", "CopyObject"):
        assert s3.requests(operation)[0].headers[header] == value


@pytest.mark.parametrize("size", [4, PART])
def test_an_upload_that_is_not_wanted_any_more_ends_and_leaves_nothing(s3, bucket, bucket_name, new_file, size):
    def progress(transferred):
        raise TransferCancelled()

    with pytest.raises(TransferCancelled):
        bucket.put(OID, TID, new_file(os.urandom(size)), progress)
    assert s3.keys(bucket_name) == []
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket_name)
    assert len(s3.requests("PutObject") + s3.requests("UploadPart")) <= 1  # it is not tried again


def test_progress_adds_up_to_the_size_of_the_blob(bucket, new_file):
    steps = []
    bucket.put(OID, TID, new_file(os.urandom(PART + 1)), steps.append)
    assert sum(steps) == PART + 1


def test_a_large_upload_that_fails_leaves_no_parts(s3, open_bucket, bucket_name, new_file):
    s3.misbehave(operation="UploadPart", status=403, code="AccessDenied")
    with pytest.raises(BucketError, match="AccessDenied"):
        open_bucket().put(OID, TID, new_file(os.urandom(PART)))
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket_name)


# Encryption with the customer's key. moto ignores it, as some services do.


@pytest.mark.parametrize("size", [4, PART])
def test_a_service_that_ignores_the_customer_key_is_refused(open_bucket, new_file, size):
    bucket = open_bucket(s3_sse_customer_key=CUSTOMER_KEY)
    with pytest.raises(BucketError, match="ignores s3-sse-customer-key"):
        bucket.put(OID, TID, new_file(os.urandom(size)))


def test_a_service_that_ignores_the_customer_key_on_a_copy_is_refused(open_bucket, put):
    put(b"data")
    with pytest.raises(BucketError, match="ignores s3-sse-customer-key"):
        open_bucket(s3_sse_customer_key=CUSTOMER_KEY).copy(OID, TID, OTHER_TID)


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_where_a_copy_does_not_say_that_it_is_encrypted_it_is_read_without_the_key(
    s3, open_bucket, new_file, is_encrypted
):
    bucket = open_bucket(s3_sse_customer_key=CUSTOMER_KEY)
    s3.misbehave(operation="PutObject", headers=ANSWERS_AS_IF_ENCRYPTED)
    bucket.put(OID, TID, new_file(b"data"))
    if is_encrypted:
        s3.misbehave(operation="GetObject", status=400, code="InvalidRequest")
        bucket.copy(OID, TID, OTHER_TID)
    else:
        with pytest.raises(BucketError, match="ignores s3-sse-customer-key"):
            bucket.copy(OID, TID, OTHER_TID)
    (tried,) = s3.requests("GetObject")
    assert tried.path.endswith(OTHER_KEY)
    assert "x-amz-server-side-encryption-customer-key" not in tried.headers


@pytest.mark.parametrize(
    ("status", "code", "key", "advice"),
    [
        (403, "AccessDenied", CUSTOMER_KEY, "s3-sse-customer-key is set, and must be the key with which that object"),
        (400, "InvalidRequest", CUSTOMER_KEY, "s3-sse-customer-key is set, and must be the key with which that object"),
        (400, "InvalidArgument", None, "If that object was stored with an s3-sse-customer-key, set that key"),
    ],
)
def test_the_refusal_of_an_object_that_another_key_encrypts_names_the_setting(
    s3, open_bucket, read, status, code, key, advice
):
    """What services answer to a wrong key looks like a missing permission, and to none like a wrong request."""
    s3.misbehave(status=status, code=code)
    bucket = open_bucket(s3_sse_customer_key=key)
    for reading in read, lambda bucket: bucket.look_up(OID, TID):
        with pytest.raises(BucketError, match=advice):
            reading(bucket)
    with pytest.raises(BucketError) as caught:
        bucket.probe()
    assert "s3-sse-customer-key" not in str(caught.value)


def test_the_customer_key_goes_with_every_request_for_a_blob(s3, open_bucket, new_file, read):
    s3.misbehave(operation="GetObject", status=400, code="InvalidRequest", times=1)  # the try to read without the key
    s3.misbehave(headers=ANSWERS_AS_IF_ENCRYPTED)
    bucket = open_bucket(s3_sse_customer_key=CUSTOMER_KEY)
    filename = new_file(b"data")
    bucket.put(OID, TID, filename)
    bucket.put(p64(9), TID, new_file(os.urandom(PART)))
    assert bucket.find(OID, TID, filename)
    bucket.copy(OID, TID, OTHER_TID)
    assert read(bucket) == b"data"
    for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "HeadObject", "CopyObject", "GetObject"):
        headers = s3.requests(operation)[-1].headers
        assert base64.b64decode(headers["x-amz-server-side-encryption-customer-key"]) == CUSTOMER_KEY
    copied = s3.requests("CopyObject")[0].headers
    assert base64.b64decode(copied["x-amz-copy-source-server-side-encryption-customer-key"]) == CUSTOMER_KEY


# Reading


@pytest.mark.parametrize("size", [1, PART - 1, PART])
def test_a_small_blob_is_read_with_one_request(s3, bucket, put, read, size):
    data = os.urandom(size)
    put(data)
    assert read(bucket) == data
    assert operations(s3) == ["GetObject"]


def test_an_empty_blob_is_read(bucket, put, read):
    put(b"")
    assert read(bucket) == b""


@pytest.mark.parametrize("size", [PART + 1, 2 * PART, 2 * PART + 1])
def test_a_large_blob_is_read_in_ranges(s3, bucket, put, read, size):
    data = os.urandom(size)
    put(data)
    assert read(bucket) == data
    assert operations(s3) == ["GetObject"] * -(-size // PART)


def test_the_ranges_of_a_large_blob_are_read_in_parallel(s3, bucket, put, read):
    data = os.urandom(2 * PART + 1)
    put(data)
    s3.misbehave(operation="GetObject", times=1)
    s3.misbehave(operation="GetObject", hang=True)
    with ThreadPoolExecutor() as pool:
        get = pool.submit(read, bucket)
        s3.wait_for("GetObject", 3)
        s3.behave()
        assert get.result() == data


def test_a_large_blob_is_not_read_behind_the_ranges_of_a_larger_one(s3, open_bucket, put, read, background, tmp_path):
    bucket, data = open_bucket(s3_concurrency=1), os.urandom(2 * PART)
    put(bytes(10 * PART))
    put(data, OTHER_TID)
    s3.misbehave(operation="GetObject", latency=0.2)
    larger = background(bucket.get, OID, TID, Target(tmp_path / "larger"))
    s3.wait_for("GetObject", 2)
    assert read(bucket, OTHER_TID) == data
    assert not larger.done()
    larger.result(60)


@pytest.mark.parametrize("size", [4, PART + 1])
def test_a_service_that_ignores_ranges_is_read_all_the_same(s3, bucket, put, read, size):
    data = os.urandom(size)
    put(data)
    s3.misbehave(ignore_range=True)
    assert read(bucket) == data
    assert operations(s3) == ["GetObject"]


def test_a_service_that_ignores_only_some_ranges_never_gives_wrong_bytes(s3, open_bucket, put, read):
    data = os.urandom(PART + 1)
    put(data)
    s3.misbehave(times=1)
    s3.misbehave(ignore_range=True, times=1)
    assert read(open_bucket(s3_max_attempts=2)) == data


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
@pytest.mark.parametrize("size", [4, PART + 1])
def test_damaged_bytes_are_asked_for_again(s3, open_bucket, new_file, read, size, checksums):
    bucket = open_bucket(s3_checksums=checksums)
    data = os.urandom(size)
    bucket.put(OID, TID, new_file(data))
    s3.forget()
    s3.misbehave(operation="GetObject", flip=True, times=1)
    assert read(bucket) == data
    assert len(s3.requests("GetObject")) > -(-size // PART)


def test_bytes_are_checked_that_are_damaged_after_an_answer_that_broke_off(s3, bucket, put, read):
    data = os.urandom(3 << 20)
    put(data)
    s3.misbehave(operation="GetObject", truncate=1, times=1)  # its first megabytes have arrived by then
    s3.misbehave(operation="GetObject", flip=True, times=1)
    assert read(bucket) == data
    assert len(s3.requests("GetObject")) == 3


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
@pytest.mark.parametrize("size", [4, PART + 1])
def test_an_object_that_stays_damaged_is_an_error_that_says_so(s3, open_bucket, new_file, read, size, checksums):
    bucket = open_bucket(s3_max_attempts=2, s3_checksums=checksums)
    bucket.put(OID, TID, new_file(os.urandom(size)))
    s3.forget()
    s3.misbehave(operation="GetObject", flip=True)
    with pytest.raises(BucketError, match=f"{KEY}.*damaged"):
        read(bucket)
    assert len(s3.requests("GetObject")) == 2 * -(-size // PART)


@pytest.mark.parametrize("good", [0, 1])
def test_a_body_that_breaks_off_is_asked_for_again(s3, bucket, put, read, good):
    data = os.urandom(PART + 1000)
    put(data)
    s3.misbehave(operation="GetObject", times=good)
    s3.misbehave(operation="GetObject", truncate=1, times=1)
    assert read(bucket) == data
    assert len(s3.requests("GetObject")) == 3


@pytest.mark.parametrize("size", [0, 1000, 2 * PART + 1000])
def test_a_blob_is_verified_without_being_kept(s3, bucket, put, size):
    put(os.urandom(size))
    s3.forget()
    assert bucket.verify(OID, TID).size == size
    assert operations(s3) == ["GetObject"] * (3 if size > PART else 2 if not size else 1)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("fault", [{"truncate": 1}, {"truncate": PART // 2}])
def test_what_a_broken_answer_brought_counts_once_for_the_checksum(s3, bucket, put, good, fault):
    put(os.urandom(PART + PART - 1))
    s3.misbehave(operation="GetObject", times=good)
    s3.misbehave(operation="GetObject", times=1, **fault)
    assert bucket.verify(OID, TID).size == PART + PART - 1


def test_a_blob_that_arrives_damaged_is_verified_again_and_one_that_stays_damaged_is_told(s3, bucket, put):
    put(os.urandom(PART + 1000))
    s3.misbehave(operation="GetObject", flip=True, times=1)
    assert bucket.verify(OID, TID).size == PART + 1000
    s3.misbehave(operation="GetObject", flip=True)
    with pytest.raises(BlobDamaged, match="restore it from a backup"):
        bucket.verify(OID, TID)


def test_a_blob_that_is_not_there_or_cannot_be_asked_for_is_not_damaged(s3, open_bucket, put):
    bucket = open_bucket(s3_max_attempts=1)
    with pytest.raises(BlobNotFound):
        bucket.verify(OID, TID)
    put(b"data")
    s3.misbehave(operation="GetObject", status=503, code="SlowDown")
    with pytest.raises(BucketError, match="SlowDown") as raised:
        bucket.verify(OID, TID)
    assert not isinstance(raised.value, BlobDamaged)


def test_a_body_that_always_breaks_off_is_an_error(s3, open_bucket, put, read):
    put(b"data")
    s3.misbehave(operation="GetObject", truncate=1)
    with pytest.raises(BucketError, match=KEY):
        read(open_bucket(s3_max_attempts=2))
    assert operations(s3) == ["GetObject", "GetObject"]


def test_an_object_that_is_replaced_between_two_ranges_is_read_again(s3, bucket, bucket_name, read, new_file):
    data = os.urandom(PART + 1)
    s3.client.upload_file(new_file(data), bucket_name, KEY)  # in parts: only its ETag can tell
    s3.misbehave(operation="GetObject", times=1)
    s3.misbehave(operation="GetObject", headers={"etag": '"another"'}, flip=True, times=1)
    assert read(bucket) == data


def test_nothing_is_left_of_a_longer_object_that_was_read_first(s3, bucket, put, read):
    put(b"data")
    longer = {"etag": '"another"', "x-amz-meta-sha256": "0" * 64}
    s3.misbehave(operation="GetObject", status=200, body="longer data", headers=longer, times=1)
    assert read(bucket) == b"data"


def test_a_checksum_whose_name_the_service_capitalises_is_checked_all_the_same(s3, open_bucket, bucket_name, read):
    s3.client.put_object(Bucket=bucket_name, Key=KEY, Body=b"data")
    s3.misbehave(operation="GetObject", headers={"X-Amz-Meta-Sha256": "0" * 64})
    with pytest.raises(BucketError, match=r"sha256.*damaged"):
        read(open_bucket(s3_max_attempts=1))


def test_an_object_that_others_stored_is_checked_by_its_md5(s3, open_bucket, bucket_name, read):
    s3.client.put_object(Bucket=bucket_name, Key=KEY, Body=b"data")
    bucket = open_bucket(s3_max_attempts=2)
    s3.misbehave(operation="GetObject", flip=True, times=1)
    assert read(bucket) == b"data"
    s3.misbehave(operation="GetObject", flip=True)
    with pytest.raises(BucketError, match=r"md5.*damaged"):
        read(bucket)


def test_an_object_that_others_stored_is_checked_by_its_size(s3, open_bucket, bucket_name, read, new_file):
    data = os.urandom(PART + 1)
    s3.client.upload_file(new_file(data), bucket_name, KEY)  # in parts: its ETag is no MD5
    s3.forget()
    bucket = open_bucket(s3_max_attempts=2)
    s3.misbehave(operation="GetObject", truncate=1, times=1)
    assert read(bucket) == data
    assert len(s3.requests("GetObject")) == 3


@pytest.mark.parametrize("encryption", [{"x-amz-server-side-encryption": "aws:kms"}, ANSWERS_AS_IF_ENCRYPTED])
def test_the_etag_of_an_encrypted_object_is_not_taken_for_its_md5(s3, bucket, bucket_name, read, encryption):
    s3.client.put_object(Bucket=bucket_name, Key=KEY, Body=b"data")
    s3.misbehave(headers={"etag": f'"{"0" * 32}"', **encryption})
    assert read(bucket) == b"data"


def test_a_full_disk_is_no_error_of_s3(bucket, put, tmp_path):
    class Full(Target):
        def write_at(self, data, position):
            raise OSError(28, "No space left on device")

    put(b"data")
    with pytest.raises(OSError, match="No space left"):
        bucket.get(OID, TID, Full(tmp_path / "target"))


# Absent or out of order


def test_an_absent_blob_is_not_found(s3, bucket, read):
    with pytest.raises(BlobNotFound, match=KEY):
        read(bucket)
    assert operations(s3) == ["GetObject"]


def test_a_404_that_does_not_name_the_key_is_an_error_and_not_an_absent_blob(s3, bucket, put, read):
    put(b"data")
    s3.misbehave(operation="GetObject", status=404)
    with pytest.raises(BucketError):
        read(bucket)
    assert operations(s3) == ["GetObject"]


def test_a_missing_bucket_is_an_error_that_names_the_setting(open_bucket, new_file, read):
    bucket = open_bucket(bucket_name="no-such-bucket")
    for ask in (
        bucket.probe,
        lambda: read(bucket),
        lambda: bucket.put(OID, TID, new_file(b"data")),
        lambda: list(bucket.list_blobs()),
        lambda: bucket.delete([(OID, TID)]),
        lambda: bucket.delete([(OID, TID), (OID, OTHER_TID)]),
    ):
        with pytest.raises(BucketError, match="check bucket-name") as raised:
            ask()
        assert raised.value.code == "NoSuchBucket"


@pytest.fixture
def ask(put, new_file, read):
    """Does one thing with a bucket, by the name of its request."""

    put(b"data")
    same = new_file(b"data")

    def ask(operation, bucket):
        return {
            "PutObject": lambda: bucket.put(OID, OTHER_TID, same),
            "GetObject": lambda: read(bucket),
            "HeadObject": lambda: bucket.find(OID, TID, same),
            "CopyObject": lambda: bucket.copy(OID, TID, OTHER_TID),
            "ListObjects": lambda: list(bucket.list_blobs()),
            "DeleteObject": lambda: bucket.delete([(OID, TID)]),
            "DeleteObjects": lambda: bucket.delete([(OID, TID), (OID, OTHER_TID)]),
        }[operation]()

    return ask


EVERYTHING = ["PutObject", "GetObject", "HeadObject", "CopyObject", "ListObjects", "DeleteObject", "DeleteObjects"]


@pytest.mark.parametrize("operation", EVERYTHING)
def test_a_passing_failure_is_tried_again(s3, open_bucket, ask, operation):
    s3.misbehave(operation=operation, status=500, code="InternalError", times=1)
    ask(operation, open_bucket(s3_max_attempts=2))
    assert [request.status // 100 for request in s3.requests(operation)] == [5, 2]


@pytest.mark.parametrize("operation", EVERYTHING)
def test_a_lasting_failure_is_tried_as_often_as_allowed_and_is_an_error(s3, open_bucket, ask, operation):
    s3.misbehave(operation=operation, status=503, code="SlowDown")
    with pytest.raises(BucketError, match="503"):
        ask(operation, open_bucket(s3_max_attempts=2))
    assert len(s3.requests(operation)) == 2


@pytest.mark.parametrize("operation", EVERYTHING)
def test_a_refusal_is_an_error_at_once(s3, bucket, ask, operation):
    s3.misbehave(operation=operation, status=403, code="AccessDenied")
    with pytest.raises(BucketError, match="403"):
        ask(operation, bucket)
    assert len(s3.requests(operation)) == 1


def test_a_put_whose_answer_is_lost_is_tried_again(s3, bucket, new_file, stored):
    s3.misbehave(operation="PutObject", lose=True, times=1)
    bucket.put(OID, TID, new_file(b"data"))
    assert operations(s3) == ["PutObject", "PutObject"]
    assert stored()[0] == b"data"


@pytest.mark.parametrize("operation", EVERYTHING)
def test_a_server_that_is_not_there_is_an_error(open_bucket, ask, operation):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        bucket = open_bucket(s3_endpoint_url=f"http://127.0.0.1:{nobody.getsockname()[1]}", s3_max_attempts=1)
        with pytest.raises(BucketError, match="EndpointConnectionError"):
            ask(operation, bucket)


def test_a_server_that_hangs_is_an_error_within_the_timeouts(s3, open_bucket, put, read):
    put(b"data")
    s3.misbehave(hang=True)
    started = time.monotonic()
    with pytest.raises(BucketError, match="ReadTimeoutError"):
        read(open_bucket(s3_read_timeout=1, s3_max_attempts=2))
    assert time.monotonic() - started < 20
    assert operations(s3) == ["GetObject", "GetObject"]


@pytest.mark.parametrize("operation", ["ListObjects", "DeleteObjects", "CopyObject"])
def test_an_answer_that_is_no_s3_is_an_error(s3, open_bucket, ask, operation):
    s3.misbehave(operation=operation, status=200, body="<html>Welcome to our network")
    with pytest.raises(BucketError):
        ask(operation, open_bucket(s3_max_attempts=1))


# Copying


def test_a_copy_has_the_bytes_and_the_metadata(s3, bucket, put, stored):
    put(b"data")
    bucket.copy(OID, TID, OTHER_TID)
    assert operations(s3) == ["HeadObject", "CopyObject"]
    (data, copy), (_, source) = stored(OTHER_KEY), stored(KEY)
    assert data == b"data"
    assert copy["Metadata"] == source["Metadata"] != {}


@pytest.fixture
def small_copies(monkeypatch):
    """Copy in parts of `PART` bytes what is larger than that."""
    monkeypatch.setattr(upload_module, "COPY_PART", PART)


def test_a_large_blob_is_copied_in_parts_side_by_side(small_copies, s3, open_bucket, put, stored):
    data = os.urandom(2 * PART + 1)
    put(data)
    s3.misbehave(operation="UploadPartCopy", latency=1)
    bucket = open_bucket()
    started = time.monotonic()
    bucket.copy(OID, TID, OTHER_TID)
    assert time.monotonic() - started < 2.5  # one after the other, they would take three seconds
    assert len(s3.requests("UploadPartCopy")) == 3
    assert not s3.requests("CopyObject")
    (copied, copy), (_, source) = stored(OTHER_KEY), stored(KEY)
    assert copied == data
    assert copy["Metadata"] == source["Metadata"] != {}


def test_a_copy_of_an_absent_blob_is_not_found(bucket):
    with pytest.raises(BlobNotFound, match=KEY):
        bucket.copy(OID, TID, OTHER_TID)


def test_a_blob_of_another_bucket_is_copied_if_it_is_still_the_one_that_was_found(s3, bucket, open_bucket, put, stored):
    put(b"data")
    other = open_bucket(s3_prefix="other")
    found = bucket.look_up(OID, TID)
    s3.forget()
    other.copy_from(bucket, OID, TID, found)
    (request,) = s3.requests()
    assert request.operation == "CopyObject"
    assert request.headers["x-amz-copy-source"] == f"{bucket.name}/{KEY}"
    assert request.headers["x-amz-copy-source-if-match"] == found.etag != ""
    assert stored(f"other/{KEY}")[0] == b"data"
    assert other.look_up(OID, TID) == found


def test_a_large_blob_of_another_bucket_is_copied_in_parts(small_copies, s3, bucket, open_bucket, put, stored):
    data = os.urandom(PART + 1)
    put(data)
    other = open_bucket(s3_prefix="other")
    found = bucket.look_up(OID, TID)
    other.copy_from(bucket, OID, TID, found)
    assert {one.headers["x-amz-copy-source-if-match"] for one in s3.requests("UploadPartCopy")} == {found.etag}
    assert stored(f"other/{KEY}")[0] == data
    assert other.look_up(OID, TID).digest == found.digest


def test_each_bucket_has_a_customer_key_of_its_own_in_a_copy(s3, open_bucket, put):
    put(b"data")
    other_key = b"another key that has 32 bytes...."[:32]
    s3.misbehave(headers=ANSWERS_AS_IF_ENCRYPTED)
    source, target = (
        open_bucket(s3_sse_customer_key=CUSTOMER_KEY),
        open_bucket(s3_prefix="other", s3_sse_customer_key=other_key),
    )
    target.copy_from(source, OID, TID, source.look_up(OID, TID))
    headers = s3.requests("CopyObject")[0].headers
    assert base64.b64decode(headers["x-amz-copy-source-server-side-encryption-customer-key"]) == CUSTOMER_KEY
    assert base64.b64decode(headers["x-amz-server-side-encryption-customer-key"]) == other_key


def test_an_error_of_a_copy_names_both_buckets(s3, bucket, open_bucket, put):
    put(b"data")
    other = open_bucket(s3_prefix="other")
    found = bucket.look_up(OID, TID)
    s3.misbehave(operation="CopyObject", status=403, code="AccessDenied")
    with pytest.raises(BucketError, match=f"Could not copy {KEY} of bucket {bucket.name} to other/{KEY} in bucket"):
        other.copy_from(bucket, OID, TID, found)


def test_a_copy_that_fails_after_the_answer_began_is_tried_again(s3, bucket, put, stored):
    put(b"data")
    s3.misbehave(operation="CopyObject", status=200, code="InternalError", times=1)
    bucket.copy(OID, TID, OTHER_TID)
    assert len(s3.requests("CopyObject")) == 2
    assert stored(OTHER_KEY)[0] == b"data"


# Listing and deleting


def test_a_listing_has_every_blob_on_any_number_of_pages(s3, bucket, bucket_name):
    s3.put(bucket_name, [f"blobs/{number:x}/2.blob" for number in range(1, 2051)])
    found = list(bucket.list_blobs())
    assert sorted(found, key=lambda listed: listed.oid) == [Listed(p64(n), p64(2), 1) for n in range(1, 2051)]
    assert operations(s3) == ["ListObjects"] * 11


def test_a_listing_leaves_out_what_is_no_blob_of_ours(s3, open_bucket, bucket_name):
    foreign = ["blobs/1/2", "blobs/01/2.blob", "blobs/1/2.blob.tmp", "blobs/1/G.blob", "1/2.blob", f"other/{KEY}"]
    s3.put(bucket_name, [*foreign, *(f"mine/{key}" for key in foreign), "minetoo/blobs/1/2.blob", KEY, f"mine/{KEY}"])
    for prefix in ("", "mine"):
        assert list(open_bucket(s3_prefix=prefix).list_blobs()) == [Listed(OID, TID, 1)]


def test_a_listing_that_fails_on_its_second_page_is_an_error(s3, open_bucket, bucket_name):
    s3.put(bucket_name, [f"blobs/{number:x}/2.blob" for number in range(1, 1002)])
    s3.misbehave(operation="ListObjects", times=1)
    s3.misbehave(operation="ListObjects", status=500, code="InternalError")
    found = open_bucket(s3_max_attempts=1).list_blobs()
    with pytest.raises(BucketError, match="InternalError"):
        list(found)


def blobs(count):
    return [(p64(number), TID) for number in range(1, count + 1)]


def keys_of(names):
    return [f"blobs/{int.from_bytes(oid, 'big'):x}/{int.from_bytes(tid, 'big'):x}.blob" for oid, tid in names]


def test_a_thousand_blobs_are_deleted_with_one_request(s3, bucket, bucket_name):
    s3.put(bucket_name, [*keys_of(blobs(2001)), OTHER_KEY])
    bucket.delete(blobs(2000))
    assert operations(s3) == ["DeleteObjects"] * 2
    assert s3.keys(bucket_name) == [OTHER_KEY, *keys_of(blobs(2001)[-1:])]


def test_deleting_nothing_is_no_request(s3, bucket):
    bucket.delete([])
    assert operations(s3) == []


@pytest.mark.parametrize("refusal", [(400, "InvalidRequest"), (405, "MethodNotAllowed"), (501, "NotImplemented")])
def test_where_there_is_no_batch_delete_blobs_are_deleted_one_by_one(s3, bucket, bucket_name, refusal):
    s3.put(bucket_name, [*keys_of(blobs(4)), OTHER_KEY])
    s3.misbehave(operation="DeleteObjects", status=refusal[0], code=refusal[1])
    bucket.delete(blobs(2))
    bucket.delete(blobs(4))
    assert operations(s3) == ["DeleteObjects"] + ["DeleteObject"] * 6  # found out once is enough
    assert s3.keys(bucket_name) == [OTHER_KEY]


@pytest.mark.parametrize("count", [1, 3])
def test_deleting_an_absent_blob_is_no_error(s3, bucket, bucket_name, count):
    s3.put(bucket_name, keys_of(blobs(count))[1:])
    bucket.delete(blobs(count))
    assert s3.keys(bucket_name) == []


@pytest.mark.parametrize("count", [1, 3])
def test_deleting_an_absent_blob_where_services_call_that_an_error_is_none(s3, bucket, count):
    s3.misbehave(operation="DeleteObject", status=404, code="NoSuchKey")
    failed = "".join(f"<Error><Key>{key}</Key><Code>NoSuchKey</Code></Error>" for key in keys_of(blobs(count)))
    s3.misbehave(operation="DeleteObjects", status=200, body=f"<DeleteResult>{failed}</DeleteResult>")
    bucket.delete(blobs(count))
    assert len(s3.requests()) == 1


def test_blobs_that_may_not_be_deleted_are_an_error_that_says_how_many(s3, bucket):
    s3.misbehave(operation="DeleteObjects", status=403, code="AccessDenied")
    with pytest.raises(BucketError, match=r"AccessDenied.*3 of 3 .* were not deleted") as raised:
        bucket.delete(blobs(3))
    assert raised.value.code == "AccessDenied"


def test_a_blob_of_a_batch_that_may_not_be_deleted_is_an_error_that_names_it(s3, bucket):
    refused = f"<DeleteResult><Error><Key>{KEY}</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    s3.misbehave(operation="DeleteObjects", status=200, body=refused)
    with pytest.raises(BucketError, match=f"{KEY}.*AccessDenied.*1 of 3 .* were not deleted") as raised:
        bucket.delete(blobs(3))
    assert raised.value.code == "AccessDenied"


def test_a_failed_delete_does_not_keep_the_others_from_being_tried(s3, bucket, bucket_name):
    s3.put(bucket_name, keys_of(blobs(1500)))
    s3.misbehave(operation="DeleteObjects", status=403, code="AccessDenied", times=1)
    with pytest.raises(BucketError, match=r"1000 of 1500 .* were not deleted"):
        bucket.delete(blobs(1500))
    assert sorted(s3.keys(bucket_name)) == sorted(keys_of(blobs(1000)))


def test_where_there_is_no_batch_delete_too_every_blob_is_tried(s3, bucket, bucket_name):
    s3.put(bucket_name, keys_of(blobs(3)))
    s3.misbehave(operation="DeleteObjects", status=501, code="NotImplemented")
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied", times=1)
    with pytest.raises(BucketError, match=r"1 of 3 .* were not deleted"):
        bucket.delete(blobs(3))
    assert len(s3.keys(bucket_name)) == 1


# Restoring


def test_find_tells_whether_the_blob_is_there(s3, bucket, new_file, put):
    filename = new_file(b"data")
    assert bucket.find(OID, TID, filename) is None
    put(b"data")
    assert bucket.find(OID, TID, filename) is not None
    assert operations(s3) == ["HeadObject"]


@pytest.mark.parametrize("other", [b"atad", b"longer data"])
def test_find_refuses_another_blob_at_the_same_key(bucket, new_file, put, stored, other):
    put(other)
    with pytest.raises(BucketError, match=f"{KEY}.*another blob.*s3-prefix"):
        bucket.find(OID, TID, new_file(b"data"))
    assert stored()[0] == other


@pytest.mark.parametrize("same", [True, False])
def test_find_checks_what_others_stored_by_its_md5(s3, bucket, bucket_name, new_file, same):
    s3.client.put_object(Bucket=bucket_name, Key=KEY, Body=b"data")
    if same:
        assert bucket.find(OID, TID, new_file(b"data")) is not None
    else:
        with pytest.raises(BucketError, match="another blob"):
            bucket.find(OID, TID, new_file(b"atad"))


# Staged uploads

NAME = "0123456789abcdef" * 2


@pytest.mark.parametrize("size", [4, PART + 1])
def test_a_staged_upload_becomes_a_blob_with_one_request(s3, bucket, new_file, read, stored, size):
    data = os.urandom(size)
    digest = bucket.put_staged(NAME, new_file(data))
    s3.forget()
    bucket.publish(bucket.keys.staged_key(NAME), OID, TID, size, digest)
    assert operations(s3) == ["CopyObject"]
    assert read(bucket) == data
    assert stored()[1]["Metadata"] == {"sha256": hashlib.sha256(data).hexdigest()}


def test_staged_uploads_lie_beside_the_blobs(s3, open_bucket, bucket_name, new_file):
    bucket = open_bucket(s3_prefix="mine")
    bucket.put_staged(NAME, new_file(b"data"))
    assert s3.keys(bucket_name) == [f"mine/staged/{NAME}"]
    assert list(bucket.list_blobs()) == []
    assert [found.name for found in bucket.list_staged()] == [NAME]
    bucket.delete_staged([NAME])
    assert s3.keys(bucket_name) == []


def test_a_listing_of_staged_uploads_leaves_out_what_is_none_of_ours(s3, bucket, bucket_name):
    s3.put(bucket_name, ["staged/readme", f"staged/{NAME}.bak", f"staged/{NAME[:-1]}", f"other/{NAME}"])
    assert list(bucket.list_staged()) == []


@pytest.mark.parametrize(
    ("status", "code", "can_copy"),
    [(501, "NotImplemented", False), (405, "MethodNotAllowed", False), (500, "InternalError", True)],
)
def test_a_service_that_cannot_copy_is_remembered(s3, open_bucket, put, status, code, can_copy):
    put(b"data")
    bucket = open_bucket(s3_max_attempts=1)
    s3.misbehave(operation="CopyObject", status=status, code=code)
    with pytest.raises(BucketError):
        bucket.copy(OID, TID, OTHER_TID)
    assert bucket.can_copy is can_copy


# Secrets, and what to do next


@contextlib.contextmanager
def raises_without(*texts):
    """A BucketError must be raised that has none of ``texts`` in it, nor in any error that it came from."""
    with pytest.raises(BucketError) as raised:
        yield raised
    todo = [raised.value]
    while todo:
        error = todo.pop()
        if error is not None:
            for text in texts:
                assert text not in f"{error} {error!r} {error.args} {vars(error)}"
            todo += [error.__cause__, error.__context__]


@pytest.mark.parametrize("operation", [*EVERYTHING, "CreateMultipartUpload"])
@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_no_error_repeats_what_s3_says_about_credentials(s3, open_bucket, new_file, ask, operation, code):
    s3.misbehave(operation=operation, status=403, code=code, message="AKIAEXAMPLE signed 5f3a of /bucket")
    bucket = open_bucket(s3_access_key="AKIAEXAMPLE", s3_secret_key="hush")
    with raises_without("AKIAEXAMPLE", "hush", "5f3a"):
        if operation == "CreateMultipartUpload":
            bucket.put(OID, OTHER_TID, new_file(os.urandom(PART)))
        else:
            ask(operation, bucket)


def test_the_settings_do_not_show_their_secrets(settings):
    secret = settings(s3_access_key="AKIAEXAMPLE", s3_secret_key="hush", s3_sse_customer_key=CUSTOMER_KEY)
    for text in ("AKIAEXAMPLE", "hush", repr(CUSTOMER_KEY)):
        assert text not in f"{secret!r} {secret}"


def test_a_bucket_sends_nothing_before_it_is_asked(s3, settings):
    Bucket(settings(), Metrics()).close()
    assert operations(s3) == []


def test_a_probe_of_a_good_bucket_is_one_request(s3, bucket):
    bucket.probe()
    assert operations(s3) == ["ListObjects"]


@pytest.mark.parametrize(
    ("status", "code", "key"),
    [
        (404, "NoSuchBucket", "bucket-name"),
        (403, "InvalidAccessKeyId", "s3-access-key"),
        (403, "SignatureDoesNotMatch", "s3-secret-key"),
        (403, "AccessDenied", "s3-access-key"),
        (400, "AuthorizationHeaderMalformed", "s3-region"),
    ],
)
def test_a_probe_tells_which_setting_is_wrong(s3, bucket, status, code, key):
    s3.misbehave(status=status, code=code)
    with pytest.raises(BucketError, match=f"{code}.*check|{code}.*forbids") as raised:
        bucket.probe()
    assert SETTING_FOR_ERROR[raised.value.code] == key


def test_a_probe_without_credentials_says_so(open_bucket, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BucketError, match="no credentials; check s3-access-key") as raised:
        open_bucket(s3_access_key=None, s3_secret_key=None).probe()
    assert SETTING_FOR_ERROR[raised.value.code] == "s3-access-key"


def test_a_probe_during_an_outage_blames_no_setting(s3, open_bucket):
    s3.misbehave(status=503, code="SlowDown")
    with pytest.raises(BucketError) as raised:
        open_bucket(s3_max_attempts=1).probe()
    assert raised.value.code not in SETTING_FOR_ERROR
