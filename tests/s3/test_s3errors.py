"""Whatever boto3, botocore and urllib3 raise becomes an error of ours, classified by where it was raised."""

import errno
import pickle
import re
import socket
import ssl
import threading
from concurrent.futures import CancelledError

import botocore.exceptions
import pytest
import urllib3.exceptions

from zodb_s3blobs.metrics import S3_FAILURES
from zodb_s3blobs.s3.errors import (
    BlobNotFound,
    BucketError,
    LocalError,
    TransferCancelled,
    ask,
    local_file,
)


class Pool:
    """Something of a library, which cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()


def instance(cls):
    """An instance of an exception class, with a secret in it and something of a library hanging on it."""
    if issubclass(cls, botocore.exceptions.ClientError):
        return cls({"Error": {"Code": "SomeCode", "Message": "AKIASECRET"}}, "GetObject")
    error = cls.__new__(cls)
    Exception.__init__(error, "AKIASECRET", Pool())
    error.kwargs = {"error": OSError(errno.EIO, "AKIASECRET"), "request": Pool()}
    return error


def all_below(base):
    for cls in base.__subclasses__():
        yield cls
        yield from all_below(cls)


BOTOCORE = [
    value
    for value in vars(botocore.exceptions).values()
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == "botocore.exceptions"
]
URLLIB3 = [urllib3.exceptions.HTTPError, *all_below(urllib3.exceptions.HTTPError)]


def raised_for(error, what="read KEY of bucket NAME"):
    def call():
        raise error

    with pytest.raises(Exception) as caught:
        ask(what, call)
    return caught.value


def check_ours(error):
    assert type(error) is BucketError
    assert error.reason in S3_FAILURES
    assert str(error).startswith("Could not read KEY of bucket NAME: ")
    assert "AKIASECRET" not in str(error) + repr(error) + repr(vars(error))
    assert error.__context__ is None and error.__cause__ is None
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # nothing of a library hangs on it


@pytest.mark.parametrize("cls", BOTOCORE, ids=lambda cls: cls.__name__)
def test_every_exception_of_botocore_becomes_an_error_of_the_bucket(cls):
    check_ours(raised_for(instance(cls)))


@pytest.mark.parametrize("cls", sorted(set(URLLIB3), key=str), ids=lambda cls: cls.__name__)
def test_every_exception_of_urllib3_becomes_an_error_of_the_bucket(cls):
    check_ours(raised_for(instance(cls)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "AKIASECRET", "/a/file"),
        ConnectionResetError("AKIASECRET"),
        TimeoutError("AKIASECRET"),
        ssl.SSLError("AKIASECRET"),
        socket.gaierror("AKIASECRET"),
        RuntimeError("AKIASECRET"),
        KeyError("ETag"),
        RecursionError("AKIASECRET"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_python_raises_inside_is_an_error_of_the_bucket_as_well(error):
    check_ours(raised_for(error))


REASONS = {
    "timeout": ["ConnectTimeoutError", "ReadTimeoutError"],
    "connection": ["EndpointConnectionError", "ConnectionClosedError", "SSLError", "ProxyConnectionError"],
    "auth": ["NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"],
    "damaged": ["FlexibleChecksumError"],
}


@pytest.mark.parametrize(("reason", "name"), [(reason, name) for reason, names in REASONS.items() for name in names])
def test_the_reason_is_that_of_the_metrics(reason, name):
    assert raised_for(instance(getattr(botocore.exceptions, name))).reason == reason


def refused(status, code="", operation="GetObject"):
    answer = {"Error": {"Code": code, "Message": "AKIASECRET"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return raised_for(botocore.exceptions.ClientError(answer, operation))


@pytest.mark.parametrize(
    ("status", "code", "reason", "advice"),
    [
        (403, "AccessDenied", "auth", "forbids s3:GetObject"),
        (403, "SignatureDoesNotMatch", "auth", "s3-secret-key.*proxy.*Host"),
        (400, "ExpiredToken", "auth", "s3-access-key"),
        (403, "QuotaExceeded", "quota", "the bucket is full.*pack"),
        (507, "", "quota", "the bucket is full"),
        (400, "XMinioAdminBucketQuotaExceeded", "quota", "the bucket is full"),
        (403, "InvalidObjectState", "archived", "archived.*Restore"),
        (403, "SecondLevelDomainForbidden", "request", "s3-addressing-style virtual"),
        (413, "", "request", "413.*proxy.*client_max_body_size"),
        (503, "SlowDown", "throttled", ""),
        (429, "", "throttled", ""),
        (500, "InternalError", "server", ""),
        (408, "", "timeout", ""),
        (404, "NoSuchBucket", "request", "check bucket-name"),
    ],
)
def test_what_the_service_answers_has_its_reason_and_advice(status, code, reason, advice):
    error = refused(status, code)
    check_ours(error)
    assert error.reason == reason
    assert error.code == (code or str(status))
    assert re.search(advice, str(error))


def test_that_an_object_is_not_there_is_said_of_operations_on_one_object_alone():
    assert type(refused(404, "NoSuchKey")) is BlobNotFound
    assert type(refused(404, "", "HeadObject")) is BlobNotFound
    assert type(refused(404)) is BucketError
    for operation in "ListObjectsV2", "DeleteObjects", "ListMultipartUploads":
        error = refused(404, "NoSuchKey", operation)
        assert type(error) is BucketError
        assert "s3-endpoint-url must not contain the name of the bucket" in str(error)


def test_too_many_open_files_are_told_as_what_they_are():
    inside = urllib3.exceptions.NewConnectionError("connection", "no")
    inside.__cause__ = OSError(errno.EMFILE, "Too many open files")
    error = raised_for(botocore.exceptions.EndpointConnectionError(endpoint_url="url", error=inside))
    assert "EMFILE" in str(error) and "LimitNOFILE" in str(error)


def wrapped(error):
    """As botocore wraps what is raised while it reads a body that it sends."""
    try:
        try:
            raise error
        except Exception as inside:
            raise botocore.exceptions.HTTPClientError(error=inside)  # noqa: B904
    except botocore.exceptions.HTTPClientError as outside:
        return outside


def test_an_error_of_the_local_file_that_is_sent_is_that_error():
    def read():
        with local_file():
            raise FileNotFoundError(errno.ENOENT, "gone", "/a/file")

    with pytest.raises(LocalError) as caught:
        read()
    error = raised_for(wrapped(caught.value))
    assert type(error) is FileNotFoundError
    assert error.filename == "/a/file"


def test_what_ends_a_transfer_is_no_error_of_the_bucket():
    for error in TransferCancelled("x"), wrapped(TransferCancelled("x")), CancelledError(), wrapped(CancelledError()):
        assert type(raised_for(error)) is TransferCancelled


def test_what_another_part_of_a_transfer_failed_with_is_the_error():
    answer = {"Error": {"Code": "QuotaExceeded"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert raised_for(wrapped(botocore.exceptions.ClientError(answer, "UploadPart"))).reason == "quota"
