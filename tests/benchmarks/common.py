"""What the benchmarks share: servers, clients, meters, an S3 endpoint, and a slow link to it."""

import contextlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

import boto3  # noqa: E402
import botocore.config  # noqa: E402
import ZEO.ClientStorage  # noqa: E402
from ZODB.blob import Blob  # noqa: E402
from ZODB.Connection import TransactionMetaData  # noqa: E402
from ZODB.tests.MinPO import MinPO  # noqa: E402
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle  # noqa: E402

from tests.support import seaweed  # noqa: E402
from tests.support.s3_server import S3Server  # noqa: E402
from tests.support.zeo_server import ZEOServer  # noqa: E402

MIB = 1 << 20
MAXIMUM = b"\x7f" + b"\xff" * 7  # no tid is later
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
  {options}
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

    def client(self, **config):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            config=botocore.config.Config(**config),
        )


def add_link(parser):
    """The options that are the arguments of `s3`."""
    parser.add_argument("--latency", type=float, default=0, help="round trip to S3, in seconds")
    parser.add_argument("--bandwidth", type=float, default=0, help="of the link to S3, in MiB per second")


@contextmanager
def s3(latency=0.0, bandwidth=0.0, real=False):
    """The service at S3BLOBS_TEST_ENDPOINT, or the tests' own, behind a link of so many seconds and MiB/s (0: none).

    ``real``: whether SeaweedFS, if it is installed, is better than the tests' own.
    """
    endpoint, own = os.environ.get("S3BLOBS_TEST_ENDPOINT"), None
    access = os.environ.get("AWS_ACCESS_KEY_ID", "test")
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "test-secret")
    if not endpoint and real and seaweed.program():
        endpoint, access, secret = seaweed.seaweed().http, seaweed.ACCESS, seaweed.SECRET
    elif not endpoint:
        own = S3Server()
        endpoint = own.url
    service = S3(endpoint, access, secret, f"benchmark-{uuid.uuid4().hex[:8]}")
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
def server(directory, service, options=""):
    """A runzeo in ``directory``, over the S3 ``service`` or, if that is None, a blob directory.

    ``options``: another line of the s3blobstorage section.
    """
    values = {**vars(service), "dir": directory, "options": options} if service else {"dir": directory}
    text = (_OURS if service else _PLAIN).format(**values)
    with ZEOServer(directory, service, storages=lambda settings: text) as running:
        yield running
        running.stop()


@contextmanager
def zeo(directory, service, options=""):
    """A `server`; gives its port."""
    with server(directory, service, options) as running:
        yield running.address[1]


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


class Meter:
    """A client in a process of its own that does one thing over and over; a context manager.

    ``operations(port, ...)`` is a generator, whose every step is one operation, and ``rest`` the seconds between two.
    The first one, for which it connects, is over when the block begins, and is not counted.
    """

    def __init__(self, operations, port, *arguments, rest=0.0):
        self._pipe, its = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_measure, args=(its, rest, operations, port, *arguments), daemon=True
        )

    def __enter__(self):
        self._process.start()
        self._answer()
        return self

    def take(self, since=0.0, until=float("inf")):
        """Return the seconds of each operation since the last call, once the one that is under way has ended.

        ``since`` and ``until``: times of `time.monotonic`. An operation counts if some of it lies between them.
        """
        self._pipe.send("take")
        return [ended - begun for begun, ended in self._answer() if ended > since and begun < until]

    def __exit__(self, *exc):
        with contextlib.suppress(OSError):  # it has failed
            self._pipe.send("end")
        self._process.join()

    def _answer(self):
        while not self._pipe.poll(0.1):
            assert self._process.is_alive(), "The client of a meter failed; see its traceback above."
        return self._pipe.recv()


def _measure(pipe, rest, operations, *arguments):
    times = []
    with contextlib.closing(operations(*arguments)) as steps:
        next(steps)
        pipe.send("ready")
        while True:
            if pipe.poll():
                if pipe.recv() == "end":
                    return
                pipe.send(times)
                times = []
            begun = time.monotonic()
            next(steps)
            times.append((begun, time.monotonic()))
            time.sleep(rest)


# Operations of a `Meter`.


def loads(port, oids):
    """Load these objects in turns."""
    with contextlib.closing(client(port)) as storage:
        for oid in itertools.cycle(oids):
            storage._call("loadBefore", oid, MAXIMUM)
            yield


def commits(port):
    """Commit a small object that nobody else writes."""
    with contextlib.closing(client(port)) as storage:
        oid, serial = storage.new_oid(), ZERO
        while True:
            serial = commit_object(storage, oid, serial)
            yield


def blob_commits(port, directory, size):
    """Commit a new blob of ``size`` bytes."""
    data = os.urandom(size)
    with contextlib.closing(client(port, blob_dir=str(directory))) as storage:
        while True:
            path = Path(directory) / "tmp" / "blob"
            path.write_bytes(data)
            commit_blob(storage, storage.new_oid(), str(path))
            yield
