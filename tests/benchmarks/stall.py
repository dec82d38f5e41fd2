"""Does one client's blob hold up the others? Run by hand; prints a Markdown table.

    S3BLOBS_TEST_ENDPOINT=http://127.0.0.1:7480 AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \
        python -m tests.benchmarks.stall [--size MIB] [--latency SECONDS] [--bandwidth MIB_PER_SECOND]

A real runzeo, and clients in processes of their own. While one of them reads a cold blob, and while it commits one,
another loads an object over and over, and a third commits small objects. The same against ZODB's own blob directory
on the same machine in the same run, where "cold" is a client that does not have the blob yet; and as a control with raw
boto3 in a process of its own, which shows what an S3 server on the same machine takes away. Without an endpoint it
starts the tests' own S3 server, which is moto and no match for a real one.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.common import (
    Meter,
    add_link,
    client,
    commit_blob,
    commit_object,
    commits,
    empty_cache,
    loads,
    random_file,
    s3,
    zeo,
)

SETTLE = 1.0  # seconds of measuring before the work begins
IDLE = 5.0  # seconds


def during(port, oid, work):
    """Loads and small commits of two other clients while ``work`` goes on; returns both times, and the work's."""
    with Meter(loads, port, [oid], rest=0.001) as loading, Meter(commits, port, rest=0.01) as committing:
        time.sleep(SETTLE)
        started = time.perf_counter()
        work()
        took = time.perf_counter() - started
        return loading.take(), committing.take(), took


def shown(times):
    times = sorted(times)
    milliseconds = [1000 * value for value in (statistics.median(times), times[int(len(times) * 0.99)], times[-1])]
    return " | ".join(f"{value:.1f}" for value in milliseconds)


def raw_upload(service, path):
    """What a commit asks of S3, without a ZEO server."""
    client = service.client()
    client.upload_file(path, service.bucket, "raw")
    client.copy_object(Bucket=service.bucket, Key="raw-copy", CopySource={"Bucket": service.bucket, "Key": "raw"})


def in_a_process(function, *args):
    process = multiprocessing.Process(target=function, args=args)
    process.start()
    process.join()


def run(name, directory, service, size, control=None):
    rows = []
    directory = Path(directory)
    with zeo(directory, service) as port:
        storage = client(port, blob_dir=str(directory / "writer"))
        oid, blob_oid = storage.new_oid(), storage.new_oid()
        commit_object(storage, oid, ZERO)
        rows.append(("idle", during(port, oid, lambda: time.sleep(IDLE))))
        path, tid = random_file(directory / "writer" / "tmp" / "blob", size), []
        if control:
            work = during(port, oid, lambda: in_a_process(raw_upload, control, path))
            rows.append((f"raw boto3 stores {size} MiB", work))
        work = during(port, oid, lambda: tid.append(commit_blob(storage, blob_oid, path)))
        rows.append((f"commit of {size} MiB", work))
        storage.close()
    empty_cache(directory)
    with zeo(directory, service) as port:
        storage = client(port, blob_dir=str(directory / "reader"))
        work = during(port, oid, lambda: storage.loadBlob(blob_oid, tid[0]))
        rows.append((f"cold read of {size} MiB", work))
        storage.close()
    for row, (loading, committing, took) in rows:
        print(f"| {name} | {row} ({took:.1f} s) | {shown(loading)} | {shown(committing)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="of the blob, in MiB")
    add_link(parser)
    arguments = parser.parse_args()
    print("| server | meanwhile | load p50 | p99 | max (ms) | small commit p50 | p99 | max (ms) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with s3(arguments.latency, arguments.bandwidth) as service:
        with tempfile.TemporaryDirectory() as directory:
            run("s3blobs", directory, service, arguments.size)
        with tempfile.TemporaryDirectory() as directory:
            run("blob-dir", directory, None, arguments.size, control=service)


if __name__ == "__main__":
    main()
