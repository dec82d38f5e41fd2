"""What the tests of commits share."""

import os
from pathlib import Path

import pytest

from tests.support.commits import Sending


@pytest.fixture
def stored(s3, bucket_name):
    """The bytes that the bucket has, by key."""

    def stored():
        keys = s3.keys(bucket_name)
        return {key: s3.client.get_object(Bucket=bucket_name, Key=key)["Body"].read() for key in keys}

    return stored


@pytest.fixture
def cached(cache):
    """The bytes of a blob that the cache serves at once."""

    def cached(oid, tid):
        with cache.get(oid, tid) as path:
            return Path(path).read_bytes()

    return cached


@pytest.fixture
def files(cache):
    """The files of blobs that are on their way."""
    return lambda: os.listdir(cache.directory / "incoming") + os.listdir(cache.temporary)


@pytest.fixture
def send(cache):
    """Sends a blob as a client of ZEO does, as the blob of ``oid``; returns its path."""
    return lambda pending, oid, data: Sending(pending, cache).send(data).end(oid)
