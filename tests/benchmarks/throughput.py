"""How fast are blobs read? Run by hand; prints a Markdown table. Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.throughput [--size MIB] [--runs N] [--latency SECONDS] [--bandwidth MIB_PER_SECOND]

One stock ZEO client reads one blob that it does not have: cold (the server has to fetch it), warm (the server has it in
its cache), and from ZODB's own blob directory. Raw boto3 stores and downloads the same object, and the disk writes,
syncs and reads the same file: what there is to gain. Best of N runs each.
"""

import argparse
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from tests.benchmarks.common import MIB, add_link, client, commit_blob, empty_cache, random_file, s3, zeo


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read(port, directory, name):
    """Seconds that a client with an empty blob directory takes."""
    storage = client(port, blob_dir=str(Path(directory) / uuid.uuid4().hex))
    try:
        return timed(lambda: storage.loadBlob(*name))
    finally:
        storage.close()


def commit(port, directory, size):
    """Seconds that it takes, and the oid and tid of the blob."""
    storage = client(port, blob_dir=str(Path(directory) / "writer"))
    path = random_file(Path(directory) / "writer" / "tmp" / "blob", size)
    oid = storage.new_oid()
    tid = []
    seconds = timed(lambda: tid.append(commit_blob(storage, oid, path)))
    storage.close()
    return seconds, (oid, tid[0])


def write_and_sync(source, target):
    """A copy of the file, on the disk."""
    with open(source, "rb") as data, open(target, "wb") as copy:
        shutil.copyfileobj(data, copy, MIB)
        os.fsync(copy.fileno())


def read_from_disk(path):
    """All of the file, past what the system has in memory, where it can be told to forget that."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(MIB):
            pass


def run(service, size, runs):
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        with zeo(directory, service) as port:
            results["commit, s3blobs"], name = min(commit(port, directory, size) for _ in range(runs))
            results["warm read, s3blobs"] = min(read(port, directory, name) for _ in range(runs))
        cold = []
        for _ in range(runs):
            empty_cache(directory)
            with zeo(directory, service) as port:
                cold.append(read(port, directory, name))
        results["cold read, s3blobs"] = min(cold)
        s3_client = service.client()
        listed = s3_client.list_objects_v2(Bucket=service.bucket, Prefix="blobs/")["Contents"]
        target = Path(directory) / "raw"
        source = random_file(Path(directory) / "source", size)
        results["raw boto3 upload_file"] = min(
            timed(lambda: s3_client.upload_file(source, service.bucket, "raw")) for _ in range(runs)
        )
        results["raw boto3 download_file"] = min(
            timed(lambda: s3_client.download_file(service.bucket, listed[-1]["Key"], str(target))) for _ in range(runs)
        )
        results["disk, write and sync"] = min(timed(lambda: write_and_sync(source, target)) for _ in range(runs))
        results["disk, read"] = min(timed(lambda: read_from_disk(target)) for _ in range(runs))
    with tempfile.TemporaryDirectory() as directory, zeo(directory, None) as port:
        results["commit, blob-dir"], name = min(commit(port, directory, size) for _ in range(runs))
        results["read, blob-dir"] = min(read(port, directory, name) for _ in range(runs))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="of the blob, in MiB")
    parser.add_argument("--runs", type=int, default=3)
    add_link(parser)
    arguments = parser.parse_args()
    with s3(arguments.latency, arguments.bandwidth) as service:
        results = run(service, arguments.size, arguments.runs)
    print(f"| {arguments.size} MiB | seconds | MiB/s |\n|---|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | {seconds:.2f} | {arguments.size / seconds:.0f} |")


if __name__ == "__main__":
    main()
