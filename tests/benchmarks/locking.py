"""How long does a blob keep the database of RelStorage locked? Run by hand; prints a Markdown table.

    S3BLOBS_TEST_ENDPOINT=http://127.0.0.1:7480 AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \
        python -m tests.benchmarks.locking [--size MIB] [--latency SECONDS] [--bandwidth MIB_PER_SECOND]

While one process commits a blob, another one on the same database commits small objects over and over: with the blob
staged before the lock is taken, with it uploaded under the lock, and into RelStorage's own shared blob directory. Needs
PostgreSQL; without an endpoint it starts the tests' own S3 server, which is moto and no match for a real one.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

from ZODB.config import storageFromString
from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.common import add_link, commit_blob, commit_object, random_file, s3
from tests.benchmarks.stall import SETTLE, shown
from tests.support.relstorage_databases import IMPORTS, Database

SECTION = """
<s3blobstorage>
  bucket-name {bucket}
  s3-prefix {prefix}
  s3-endpoint-url {endpoint}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-read-timeout 120s
  s3-stage-threshold {threshold}
  cache-dir {cache}
  {base}
</s3blobstorage>
"""


def measure(text, ready, stop, result):
    storage = storageFromString(text)
    oid, serial, times = storage.new_oid(), ZERO, []
    ready.set()
    while not stop.is_set():
        started = time.perf_counter()
        serial = commit_object(storage, oid, serial)
        times.append(time.perf_counter() - started)
        time.sleep(0.01)
    result.put(times)
    storage.close()


def run(name, kind, size, section):
    """One row; ``section(database, cache)`` is the configuration of a process."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        database = Database(kind, directory)
        storage = storageFromString(section(database, directory / "cache1"))
        ready, stop, result = multiprocessing.Event(), multiprocessing.Event(), multiprocessing.Queue()
        text = section(database, directory / "cache2")
        meter = multiprocessing.Process(target=measure, args=(text, ready, stop, result))
        meter.start()
        ready.wait()
        time.sleep(SETTLE)
        path = random_file(Path(storage.temporaryDirectory()) / "blob", size)
        started = time.perf_counter()
        commit_blob(storage, storage.new_oid(), path)
        took = time.perf_counter() - started
        stop.set()
        times = result.get()
        meter.join()
        storage.close()
    print(f"| {kind.partition('-')[0]} | {name} ({took:.1f} s) | {shown(times)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="of the blob, in MiB")
    add_link(parser)
    arguments = parser.parse_args()
    print("| database | a blob is committed | small commit p50 | p99 | max (ms) |")
    print("|---|---|---|---|---|", flush=True)
    with s3(arguments.latency, arguments.bandwidth) as service:
        for kind in "postgresql-free", "sqlite-free":
            for name, threshold in ("staged", "4MB"), ("uploaded under the lock", "0"):

                def ours(database, cache, threshold=threshold):
                    prefix = f"{Path(database.name).name}-{threshold}"
                    options = {**vars(service), "prefix": prefix, "threshold": threshold, "cache": cache}
                    return IMPORTS + SECTION.format(**options, base=database.section())

                run(name, kind, arguments.size, ours)

            def plain(database, cache):
                return IMPORTS + database.section(blob_dir=cache.with_name("blobs"), shared_blob_dir="true")

            run("shared blob-dir", kind, arguments.size, plain)


if __name__ == "__main__":
    main()
