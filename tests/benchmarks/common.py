"""What the benchmarks share: servers, clients, an S3 endpoint, and a slow link to it."""

import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

import boto3  # noqa: E402
import ZEO.ClientStorage  # noqa: E402
from ZODB.blob import Blob  # noqa: E402
from ZODB.Connection import TransactionMetaData  # noqa: E402
from ZODB.tests.MinPO import MinPO  # noqa: E402
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle  # noqa: E402

from tests.support.s3_server import S3Server  # noqa: E402
from tests.support.zeo_server import ZEOServer  # noqa: E402

MIB = 1 << 20
RECORD = zodb_pickle(Blob())

_OURS = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-endpoint-url {endpoint}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-read-timeout 120s
  cache-dir {dir}/cache
  cache-size 10GB
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""

_PLAIN = """
<filestorage 1>
  path {dir}/Data.fs
  blob-dir {dir}/blobs
</filestorage>
"""


@dataclass
class S3:
    """An S3 service and a bucket of our own in it."""

    endpoint: str
    access: str
    secret: str
    bucket: str

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
        )


def add_link(parser):
    """The options that are the arguments of `s3`."""
    parser.add_argument("--latency", type=float, default=0, help="round trip to S3, in seconds")
    parser.add_argument("--bandwidth", type=float, default=0, help="of the link to S3, in MiB per second")


@contextmanager
def s3(latency=0.0, bandwidth=0.0):
    """The service at S3BLOBS_TEST_ENDPOINT, or the tests' own, behind a link of so many seconds and MiB/s (0: none)."""
    endpoint = os.environ.get("S3BLOBS_TEST_ENDPOINT")
    access = os.environ.get("AWS_ACCESS_KEY_ID", "test")
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "test-secret")
    own = None if endpoint else S3Server()
    service = S3(endpoint or own.url, access, secret, f"benchmark-{uuid.uuid4().hex[:8]}")
    service.client().create_bucket(Bucket=service.bucket)
    link = None
    if latency or bandwidth:
        target = service.endpoint.removeprefix("http://")
        link = subprocess.Popen(
            [sys.executable, str(HERE / "slowlink.py"), target, str(latency), str((bandwidth or 1e6) * MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        service.endpoint = f"http://127.0.0.1:{int(link.stdout.readline())}"
    try:
        yield service
    finally:
        if link:
            link.kill()
        if own:
            own.stop()


@contextmanager
def zeo(directory, service):
    """A runzeo in ``directory``, over the S3 ``service`` or, if that is None, a blob directory; gives its port."""
    text = _OURS.format(**vars(service), dir=directory) if service else _PLAIN.format(dir=directory)
    with ZEOServer(directory, service, storages=lambda settings: text) as server:
        yield server.address[1]
        server.stop()


def empty_cache(directory):
    """So that every blob is cold; while no server runs."""
    cache = Path(directory) / "cache"
    if cache.exists():
        cache.rename(Path(directory) / f"cache-{uuid.uuid4().hex}")


def client(port, **options):
    return ZEO.ClientStorage.ClientStorage(("127.0.0.1", port), wait_timeout=30, **options)


def random_file(path, size):
    """A file of ``size`` MiB; returns its path."""
    with open(path, "wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))
    return str(path)


def commit_object(storage, oid, serial):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(oid, serial, zodb_pickle(MinPO("x")), "", txn)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


def commit_blob(storage, oid, path):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.storeBlob(oid, ZERO, RECORD, path, "", txn)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)
