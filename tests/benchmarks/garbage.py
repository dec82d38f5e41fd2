"""What does garbage collection cost? Run by hand; prints Markdown tables. Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.garbage [--keys N] [--revisions N] [--objects N]

First a million keys, which a bucket in memory lists, and a FileStorage that can load half of them: seconds and memory.
Then the keys of one object with as many unpacked revisions as --revisions says, and of as many dead ones; meanwhile
another thread asks the FileStorage for its last transaction, as each commit does. Then a real runzeo and as many
objects as --objects says, half of them dead: how long a pack takes, and whether other clients notice. Nothing but the
garbage collection is measured: the base has nothing to pack.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import p64, u64

from tests.benchmarks.common import client, s3
from tests.benchmarks.stall import IDLE, during, in_a_process, shown
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.bases import adapter_for
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.garbage import collector as garbage
from zodb_s3blobs.garbage.collector import Collector
from zodb_s3blobs.identity import Identity
from zodb_s3blobs.inflight import InFlight
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.keys import Keys
from zodb_s3blobs.s3.listing import Listed

DAY = 86400
MIB = 1 << 20
PER_TRANSACTION = 1000

_SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-endpoint-url {endpoint}
  s3-access-key {access}
  s3-secret-key {secret}
  gc-retention {retention}
  cache-dir {dir}/cache
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""


def make_base(path, records):
    """A FileStorage with that many records, each the only revision of its object; returns their names, in order."""
    base = FileStorage(str(path))
    data, names = zodb_pickle(MinPO("x")), []
    for start in range(0, records, PER_TRANSACTION):
        txn = TransactionMetaData()
        base.tpc_begin(txn)
        oids = [base.new_oid() for _ in range(start, min(start + PER_TRANSACTION, records))]
        for oid in oids:
            base.store(oid, ZERO, data, "", txn)
        base.tpc_vote(txn)
        tid = base.tpc_finish(txn)
        names += [(oid, tid) for oid in oids]
    base.close()
    return names


def make_history(path, revisions):
    """A FileStorage with one object that has so many revisions; returns their names, in order."""
    base = FileStorage(str(path))
    data, oid, tid, names = zodb_pickle(MinPO("x")), base.new_oid(), ZERO, []
    for _ in range(revisions):
        txn = TransactionMetaData()
        base.tpc_begin(txn)
        base.store(oid, tid, data, "", txn)
        base.tpc_vote(txn)
        tid = base.tpc_finish(txn)
        names.append((oid, tid))
    base.close()
    return names


def dead_one(name):
    """An earlier revision of the same object, which nothing can load."""
    return name[0], p64(u64(name[1]) - 1)


# A million keys


class FakeBucket:
    """As many of Bucket's methods as a garbage collection calls, for each name a live and a dead blob."""

    name = "fake"
    keys = Keys()

    def __init__(self, names, marks):
        self._names = names
        self._marks = marks  # a path
        self.deleted = 0

    def list_blobs(self, unknown):
        for oid, tid in self._names:
            yield Listed(*dead_one((oid, tid)), 1000)
            yield Listed(oid, tid, 1000)

    def delete(self, names):
        self.deleted += len(names)

    def list_uploads(self):
        return ()

    def get_marks(self, file):
        if self._marks.exists():
            shutil.copy(self._marks, file.path)
        return self._marks.exists()

    def put_marks(self, filename):
        shutil.copy(filename, self._marks)

    def delete_marks(self):
        pass


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """A context manager that measures by how many bytes the process grows."""

    def __enter__(self):
        self.before = self.highest = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.02):
            self.highest = max(self.highest, resident())

    def __exit__(self, *exc):
        self._over.set()
        self._thread.join()
        self.grown = self.highest - self.before


@contextmanager
def new_collector(directory, names, retention):
    """Yields a collector, its bucket and the base, without a lease."""
    base = FileStorage(str(directory / "Data.fs"))
    cache = Cache(directory / "cache", 0, Metrics())
    bucket = FakeBucket(names, directory / "marks")
    lease = SimpleNamespace(confirm=lambda: None, check=lambda: None, look=lambda: None, is_on_probation=False)
    parts = bucket, cache, InFlight(), lambda name: False, lease, Metrics(), retention, 100, Identity(None), DAY
    with adapter_for(base).revisions() as revisions:
        yield Collector(*parts), bucket, revisions
    base.close()
    cache.close()


def collect_from_a_fake_bucket(directory, names, retention, row):
    """In a process of its own, so that it begins small; without pauses, which would be many times as long."""
    garbage._RESTS = 0, 0
    directory = Path(directory)
    with new_collector(directory, names, retention) as (collector, bucket, revisions):
        with Peak() as peak:
            started, cpu = time.perf_counter(), time.process_time()
            collector.before_pack(revisions)
            collector.collect(revisions)
            took, cpu = time.perf_counter() - started, time.process_time() - cpu
        marks = bucket._marks.stat().st_size if bucket._marks.exists() else 0
        print(
            f"| {row} | {2 * len(names):,} | {bucket.deleted:,} | {took:.1f} | {cpu:.1f} | {peak.grown / MIB:.0f} "
            f"| {marks / MIB:.0f} |",
            flush=True,
        )


def run_fake(keys):
    print("| gc-retention | keys | deleted | seconds | of CPU | more resident memory (MiB) | marks (MiB) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        names = make_base(Path(directory) / "Data.fs", keys // 2)
        for row, retention in (("none", 0), ("30d, first pack", 30 * DAY), ("30d, later pack", 30 * DAY)):
            in_a_process(collect_from_a_fake_bucket, directory, names, retention, row)
        marks = Path(directory) / "marks"
        _age(marks, 31 * DAY)
        in_a_process(collect_from_a_fake_bucket, directory, names, 30 * DAY, "30d, which are over")


def _age(marks, seconds):
    """Make the marks as old as if they had been made so many seconds ago."""
    moment = json.loads(marks.open().readline())["dead_since"]
    earlier = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - seconds))
    marks.write_text(marks.read_text().replace(moment, earlier))


# A single object


class Asking:
    """A context manager whose thread asks the base for its last transaction; ``longest`` is in seconds."""

    def __init__(self, base):
        self._base = base
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.longest = 0

    def __enter__(self):
        self._thread.start()
        return self

    def _ask(self):
        while not self._over.wait(0.001):
            started = time.perf_counter()
            self._base.lastTransaction()
            self.longest = max(self.longest, time.perf_counter() - started)

    def __exit__(self, *exc):
        self._over.set()
        self._thread.join()


def run_history(revisions):
    print("| revisions | keys | deleted | seconds | of CPU | longest wait for the FileStorage (ms) |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        names = make_history(directory / "Data.fs", revisions)
        with new_collector(directory, names, 0) as (collector, bucket, base), Asking(base) as asking:
            started, cpu = time.perf_counter(), time.thread_time()
            collector.collect(base, gently=True)
            took, cpu = time.perf_counter() - started, time.thread_time() - cpu
            print(
                f"| {revisions:,} | {2 * revisions:,} | {bucket.deleted:,} | {took:.1f} | {cpu:.2f} "
                f"| {1000 * asking.longest:.1f} |",
                flush=True,
            )


# Real objects


def put(service, keys):
    """An object of one byte at each of the keys."""
    if "S3BLOBS_TEST_ENDPOINT" not in os.environ:  # moto, which has a faster way
        for start in range(0, len(keys), 10_000):
            message = {"do": "put", "bucket": service.bucket, "keys": keys[start : start + 10_000]}
            urllib.request.urlopen(f"{service.endpoint}/_control", json.dumps(message).encode()).close()
        return
    raw = service.client()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: raw.put_object(Bucket=service.bucket, Key=key, Body=b"x"), keys))


def raw_list(service):
    """What a garbage collection asks of S3 at least."""
    pages = service.client().get_paginator("list_objects_v2").paginate(Bucket=service.bucket, Prefix="blobs/")
    print(f"(raw boto3 listed {sum(len(page.get('Contents', ())) for page in pages)} objects)", flush=True)


def raw_delete(service, keys):
    """The same of the deletion."""
    raw = service.client()
    for start in range(0, len(keys), 1000):
        objects = [{"Key": key} for key in keys[start : start + 1000]]
        raw.delete_objects(Bucket=service.bucket, Delete={"Objects": objects, "Quiet": True})


def run_real(service, objects):
    print("| gc-retention | meanwhile | load p50 | p99 | max (ms) | small commit p50 | p99 | max (ms) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        names = make_base(directory / "Data.fs", objects // 2)
        keys = [Keys().key(*name) for name in names]
        dead = [Keys().key(*dead_one(name)) for name in names[: objects // 2 - 100]]  # less than gc-max-delete-percent
        copies = [f"raw/{key}" for key in dead]
        put(service, keys + dead + copies)
        for retention in ("30d", "0"):
            text = _SECTION.format(**vars(service), dir=directory, retention=retention)
            with ZEOServer(directory, service, storages=lambda settings, text=text: text) as server:
                storage = client(server.address[1], wait=True)
                port, oid = server.address[1], names[0][0]

                def pack(storage=storage):
                    storage.pack(1)  # nothing is that old, so the base has nothing to do

                rows = [("idle", during(port, oid, lambda: time.sleep(IDLE)))]
                rows.append(("raw boto3 lists", during(port, oid, lambda: in_a_process(raw_list, service))))
                if retention == "0":
                    rows.append(
                        ("raw boto3 deletes", during(port, oid, lambda: in_a_process(raw_delete, service, copies)))
                    )
                rows.append(("garbage collection", during(port, oid, pack)))
                rows.append(("idle", during(port, oid, lambda: time.sleep(IDLE))))
                storage.close()
                server.stop()
            for row, (loads, commits, took) in rows:
                print(f"| {retention} | {row} ({took:.1f} s) | {shown(loads)} | {shown(commits)} |", flush=True)
        left = service.client().get_paginator("list_objects_v2").paginate(Bucket=service.bucket, Prefix="blobs/")
        assert sum(len(page.get("Contents", ())) for page in left) == len(keys)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=1_000_000, help="listed by a bucket in memory")
    parser.add_argument("--revisions", type=int, default=4000, help="of a single object")
    parser.add_argument("--objects", type=int, default=100_000, help="in a real bucket")
    arguments = parser.parse_args()
    if arguments.keys:
        run_fake(arguments.keys)
        print()
    if arguments.revisions:
        run_history(arguments.revisions)
        print()
    if arguments.objects:
        with s3() as service:
            run_real(service, arguments.objects)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main()
