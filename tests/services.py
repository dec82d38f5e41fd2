"""The S3 services that the acceptance tests run against: the tests' own, the same with faults, and any real one."""

import os
import uuid

import boto3
import botocore.config
import botocore.exceptions
import pytest
from s3server import S3Server

#: By name: the share of requests that meet a fault; None for the service at S3BLOBS_TEST_ENDPOINT.
SERVICES = {
    "moto": 0,
    "moto, when_supported": 0,
    "moto with 1 % faults": 0.01,
    "moto with 10 % faults": 0.1,
    "moto with 30 % faults": 0.3,
    "real": None,
    "real, when_supported": None,
    "real, SSE-C": None,
}


class Service:
    """One of them, with a bucket of its own. Use as a context manager.

    ``client``: a boto3 client that meets no fault; and what the section needs: ``endpoint``, ``access``, ``secret``,
    ``checksums`` and ``customer_key``, which is bytes or None.
    """

    def __init__(self, name, seed=0):
        self.rate = SERVICES[name]
        self._seed = seed
        self._own = None
        self.bucket = f"acceptance-{uuid.uuid4().hex[:12]}"
        self.checksums = "when_supported" if "when_supported" in name else "when_required"
        self.customer_key = os.urandom(32) if "SSE-C" in name else None
        if self.rate is None:
            self.endpoint = os.environ.get("S3BLOBS_TEST_ENDPOINT")
            if not self.endpoint:
                pytest.skip("S3BLOBS_TEST_ENDPOINT names no S3 service")
            if self.customer_key and not self.endpoint.startswith("https:"):
                pytest.skip("SSE-C needs TLS")
            self.access, self.secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
            self.client = self._client("when_required")
        else:
            self._own = S3Server()
            self.client, self.endpoint, self.access, self.secret = self._own.client, self._own.url, "test", "secret"

    def _client(self, checksums):
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=os.environ.get("AWS_REGION", "us-east-1"),
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            config=botocore.config.Config(s3={"addressing_style": "path"}, request_checksum_calculation=checksums),
        )

    def __enter__(self):
        self.client.create_bucket(Bucket=self.bucket)
        if self._own is None and self.checksums == "when_supported":
            try:
                self._client("when_supported").put_object(Bucket=self.bucket, Key="probe", Body=b"x")
            except botocore.exceptions.ClientError as error:
                self.__exit__()
                pytest.skip(f"the service does not understand these checksums: {error}")
        self.misbehave()
        return self

    def __exit__(self, *exc):
        self.behave()
        if self._own is not None:
            self._own.stop()
            return
        for key in self.keys(""):
            self.client.delete_object(Bucket=self.bucket, Key=key)
        self.client.delete_bucket(Bucket=self.bucket)
        self.client.close()

    def misbehave(self):
        """Be as bad as its name says."""
        if self.rate:
            self._own.plague(self.rate, self._seed)

    def behave(self):
        """Be good."""
        if self._own is not None:
            self._own.behave()

    def keys(self, prefix):
        """All keys that start so."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {found["Key"] for page in pages for found in page.get("Contents", ())}

    def read(self, key):
        """The bytes of an object."""
        return self.client.get_object(Bucket=self.bucket, Key=key, **self.encryption)["Body"].read()

    @property
    def encryption(self):
        """What requests of ``client`` for a blob have to say besides."""
        if self.customer_key is None:
            return {}
        return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": self.customer_key}
