"""What the test files share: one S3 server for all, a fresh bucket and a fresh cache directory for each test."""

import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import types
import unittest.mock
from concurrent.futures import ThreadPoolExecutor

import botocore.endpoint
import pytest
from ZODB.utils import z64

from tests.support import caches
from tests.support.fake_database import FakeDatabase
from tests.support.relstorage_databases import KINDS, Application, Database, kinds, needs
from tests.support.s3_server import S3Server
from tests.support.sites import Site, Tool
from tests.support.speed import slow
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.commit.services import CommitServices
from zodb_s3blobs.commit.tids import Tids
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.garbage.collector import Collector
from zodb_s3blobs.identity import Identity
from zodb_s3blobs.inflight import InFlight
from zodb_s3blobs.lease import Lease
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.client import BucketSettings

DAY = 24 * 3600

_numbers = itertools.count()


# The published tests of ZEO 5 import the backport of what is in the standard library.
sys.modules.setdefault("mock", unittest.mock)

# Whoever runs the tests in the background has them, and so what they start, ignore Ctrl-C and the end of the terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that a class with published ones calls slow: the methods themselves are other classes' as well."""
    for item in items:
        names = getattr(item.cls, "slow_tests", ()) if isinstance(item, pytest.Function) else ()
        if names is None or item.name in names:
            item.add_marker(slow)


@pytest.fixture(scope="session", autouse=True)
def filled_caches():
    with pytest.MonkeyPatch.context() as patch:
        caches.fill(patch.setattr)
        for name in "freeze", "unfreeze":  # or what is passed over would be looked at again after the first pack
            patch.setattr(gc, name, lambda: None)
        if "S3BLOBS_TEST_ENDPOINT" not in os.environ:
            # PyMySQL reads the certificates of all authorities for each connection: 17 milliseconds. Nothing here has
            # a certificate of theirs.
            patch.setenv("SSL_CERT_FILE", os.devnull)
        yield


@pytest.fixture
def no_pauses(monkeypatch):
    """Let boto3 try again at once: it pauses up to a second before the second attempt, and longer before others."""
    monkeypatch.setattr(botocore.endpoint, "time", types.SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="session")
def running_s3():
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(running_s3):
    """The S3 server: well-behaved, with an empty log."""
    running_s3.behave()
    running_s3.forget()
    yield running_s3
    running_s3.behave()


@pytest.fixture
def bucket_name(s3):
    """A bucket with nothing in it."""
    return s3.bucket(f"bucket-{next(_numbers)}")


@pytest.fixture(scope="session")
def running_other_s3():
    with S3Server() as server:
        yield server


@pytest.fixture
def other_s3(running_other_s3):
    """A second service, with a log and faults of its own."""
    running_other_s3.behave()
    running_other_s3.forget()
    yield running_other_s3
    running_other_s3.behave()


@pytest.fixture
def settings(s3, bucket_name):
    """Makes the `BucketSettings` of that bucket; keywords replace single ones."""

    def make(**changes):
        defaults = {
            "bucket_name": bucket_name,
            "s3_endpoint_url": s3.url,
            "s3_region": "us-east-1",
            "s3_access_key": "test",
            "s3_secret_key": "test-secret",
            "s3_read_timeout": 60,  # so long that what `hang` holds up is not tried again
        }
        return BucketSettings(**{**defaults, **changes})

    return make


@pytest.fixture
def metrics():
    """What the buckets and caches of a test count on."""
    return Metrics()


@pytest.fixture
def open_bucket(settings, metrics):
    """Makes a `Bucket`; keywords replace single settings."""
    buckets = []

    def make(**changes):
        buckets.append(Bucket(settings(**changes), metrics))
        return buckets[-1]

    yield make
    for bucket in buckets:
        bucket.close()


@pytest.fixture
def bucket(open_bucket):
    return open_bucket()


@pytest.fixture
def one_byte_blocks(monkeypatch):
    """A file system on which a file takes as many bytes as it has, and an empty one takes one byte."""
    monkeypatch.setattr("zodb_s3blobs.cache.directory.block_of", lambda path: 1)


@pytest.fixture
def open_cache(tmp_path, metrics):
    """Makes a `Cache` of ``limit`` bytes in a directory of its own."""
    caches = []

    def make(limit=100 << 20):
        caches.append(Cache(tmp_path / f"cache-{len(caches)}", limit, metrics))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def pytest_xdist_auto_num_workers(config):
    """One process more than there are processors: many tests wait for a server."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def cache(open_cache):
    return open_cache()


@pytest.fixture
def open_commits(open_bucket, cache, metrics):
    """Makes `CommitServices`; keywords replace single settings, of the bucket as well."""
    opened = []

    def make(timeout=60, stage_threshold=1 << 30, concurrency=16, **changes):
        bucket = open_bucket(**changes)
        fetcher = Fetcher(bucket, cache, metrics)
        # Each look at the clock is a minute later, so that a test can overtake without a wait.
        tids = Tids(lambda: z64, metrics, clock=itertools.count(step=60).__next__)
        commits = CommitServices(bucket, cache, fetcher.fetch, tids, metrics, concurrency, timeout, stage_threshold)
        opened.extend((fetcher, commits))
        return commits

    yield make
    for part in opened:
        part.close()


@pytest.fixture
def commits(open_commits):
    return open_commits()


@pytest.fixture
def put(s3, bucket, bucket_name):
    """Puts the blobs (oid, tid), of one byte each; returns their keys."""

    def put(*names):
        keys = [bucket.keys.key(oid, tid) for oid, tid in names]
        s3.put(bucket_name, keys)
        return keys

    return put


@pytest.fixture
def in_flight():
    return InFlight()


@pytest.fixture
def collector(open_bucket, cache, in_flight, metrics):
    """Makes a `Collector` that can have the lease; keywords replace single settings, of the bucket as well."""
    leases, identity = [], Identity(None)

    def make(commits=None, retention=0, max_delete_percent=100, **changes):
        bucket = open_bucket(**changes)
        registry = commits.in_flight if commits is not None else in_flight
        is_staged = commits.staging.is_live if commits is not None else lambda name: False
        lease = Lease(bucket, FakeDatabase(), metrics, "1")
        leases.append(lease)
        return Collector(
            bucket, cache, registry, is_staged, lease, metrics, retention, max_delete_percent, identity, DAY
        )

    yield make
    for lease in leases:
        lease.close()


@pytest.fixture
def no_threads(monkeypatch):
    """While the block lasts, no thread can be started."""

    def fail(thread):
        raise RuntimeError("can't start new thread")

    @contextlib.contextmanager
    def no_threads():
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", fail)
            yield

    return no_threads


@pytest.fixture
def new_file(tmp_path):
    """Makes a file with ``data`` in it; returns its path."""

    def make(data):
        path = tmp_path / f"file-{next(_numbers)}"
        path.write_bytes(data)
        return str(path)

    return make


# Real servers


@pytest.fixture
def start(s3, bucket_name, tmp_path):
    """Starts a server; keywords as `ZEOServer`'s."""
    servers = []

    def start(**kwargs):
        servers.append(ZEOServer(tmp_path, s3, bucket_name, **kwargs))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def site(tmp_path):
    """A site with a plain FileStorage, a blob directory and a history."""
    site = Site(tmp_path)
    site.grow()
    return site


@pytest.fixture
def tool():
    """Runs commands of zodb-s3blobs."""
    tool = Tool()
    yield tool
    tool.kill()


@pytest.fixture(params=kinds(*KINDS))
def database(request, tmp_path):
    """A new database of RelStorage, of each kind."""
    needs(request.param)
    return Database(request.param, tmp_path)


@pytest.fixture
def application(database, s3, bucket_name, tmp_path):
    """Opens storages on that database, with blobs in S3."""
    return Application(database, s3, bucket_name, tmp_path)


@pytest.fixture
def background(s3):
    """Runs a function in a thread; returns its future."""
    with ThreadPoolExecutor(30) as pool:
        yield pool.submit
        s3.behave()


@pytest.fixture
def no_aws_settings(monkeypatch, tmp_path):
    """Whatever this machine knows about AWS is none of the tests' business."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
