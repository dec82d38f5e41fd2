"""s3-tagging: every request that makes an object has the tags, whoever makes it, and refusals name the key."""

import os

import pytest

from tests.support.gate import Gate, error
from zodb_s3blobs.s3 import upload
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BucketError

OID, TID, OTHER_TID = b"\0" * 7 + b"\1", b"\0" * 7 + b"\2", b"\0" * 7 + b"\3"
TAGS = "project=plone&env=prod%20%2B%20test"
MAKING = ("PutObject", "CopyObject", "CreateMultipartUpload", "OwnerPutObject")


def tags_of(s3, bucket_name, key):
    found = s3.client.get_object_tagging(Bucket=bucket_name, Key=key)["TagSet"]
    return {tag["Key"]: tag["Value"] for tag in found}


class Body:
    """A blob that has arrived."""

    def __init__(self, data):
        self._data = data

    def wait(self, size):
        pass

    def read(self, size):
        data, self._data = self._data[:size], self._data[size:]
        return data


def test_every_new_object_has_the_tags(s3, bucket_name, open_bucket, new_file, monkeypatch):
    monkeypatch.setattr(upload, "COPY_PART", PART)  # so that 9 MiB are copied in parts
    bucket = open_bucket(s3_tagging=TAGS)
    large = new_file(os.urandom(9 << 20))
    bucket.put(OID, TID, new_file(b"small"))
    bucket.put(OID, OTHER_TID, large)
    bucket.copy(OID, TID, b"\0" * 7 + b"\4")
    bucket.copy(OID, OTHER_TID, b"\0" * 7 + b"\5")
    digest = bucket.put_staged("a" * 32, large)
    bucket.publish(bucket.keys.staged_key("a" * 32), OID, b"\0" * 7 + b"\6", 9 << 20, digest)
    bucket.put_staged_stream("b" * 32, Body(os.urandom(9 << 20)))
    bucket.put_staged_stream("c" * 32, Body(b"small"))
    bucket.put_marks(new_file(b"marks"))
    bucket.write_owner(b"1", None)
    bucket.write_owner(b"2", bucket.read_owner())
    keys = [*s3.keys(bucket_name), bucket.keys.owner]
    assert len(keys) == 10
    for key in keys:
        assert tags_of(s3, bucket_name, key) == {"project": "plone", "env": "prod + test"}, key
    # With the request that makes it, as policies demand it.
    for operation in MAKING:
        made = s3.requests(operation)
        assert made and all(request.headers.get("x-amz-tagging") == TAGS for request in made), operation
    copies = s3.requests("CopyObject")
    assert all(request.headers["x-amz-tagging-directive"] == "REPLACE" for request in copies)


def test_a_copy_has_the_tags_of_today_and_not_those_of_its_source(s3, bucket_name, open_bucket, new_file):
    open_bucket(s3_tagging="a=1&b=2").put(OID, TID, new_file(b"data"))
    bucket = open_bucket(s3_tagging="c=3")
    bucket.copy(OID, TID, OTHER_TID)
    assert tags_of(s3, bucket_name, bucket.keys.key(OID, OTHER_TID)) == {"c": "3"}


def test_without_the_key_no_request_speaks_of_tags(s3, open_bucket, new_file):
    bucket = open_bucket()
    bucket.put(OID, TID, new_file(b"data"))
    bucket.copy(OID, TID, OTHER_TID)
    assert not any(name.startswith("x-amz-tagging") for request in s3.requests() for name in request.headers)


@pytest.mark.parametrize("size", [4, 9 << 20])
@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (501, "NotImplemented", "s3-tagging is set: remove it if the service does not know tags"),
        (400, "InvalidTag", "check s3-tagging"),
        (403, "AccessDenied", "forbids s3:PutObject. s3-tagging is set, so s3:PutObjectTagging is needed as well"),
    ],
)
def test_a_service_that_refuses_the_tags_is_told_with_the_key(s3, open_bucket, new_file, status, code, advice, size):
    def judge(ask):
        return error(status, code) if "x-amz-tagging" in ask.headers else None

    with Gate(s3.url, judge) as gate:
        bucket = open_bucket(s3_endpoint_url=gate.url, s3_tagging=TAGS)
        with pytest.raises(BucketError) as caught:
            bucket.put(OID, TID, new_file(b"x" * size))
    assert advice in str(caught.value)


def test_the_same_refusal_without_the_key_says_nothing_of_it(s3, open_bucket, new_file):
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    with pytest.raises(BucketError, match=r"forbids s3:PutObject$"):
        open_bucket().put(OID, TID, new_file(b"data"))
