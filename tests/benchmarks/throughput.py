"""How fast are blobs read? Run by hand; prints a Markdown table. Endpoint and credentials as for stall.py.

    python tests/benchmarks/throughput.py [--size MIB] [--runs N] [--latency SECONDS] [--bandwidth MIB_PER_SECOND]

One stock ZEO client reads one blob that it does not have: cold (the server has to fetch it), warm (the server has it in
its cache), and from ZODB's own blob directory; raw boto3 downloads the same object to a file. Best of N runs each.
"""

import argparse
import tempfile
import time
import uuid
from pathlib import Path

from common import client, commit_blob, empty_cache, random_file, s3, zeo


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
    storage = client(port, blob_dir=str(Path(directory) / "writer"))
    path = random_file(Path(directory) / "writer" / "tmp" / "blob", size)
    oid = storage.new_oid()
    tid = []
    seconds = timed(lambda: tid.append(commit_blob(storage, oid, path)))
    storage.close()
    return (oid, tid[0]), seconds


def run(service, size, runs):
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        with zeo(directory, service) as port:
            name, results["commit, s3blobs"] = commit(port, directory, size)
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
        results["raw boto3 download_file"] = min(
            timed(lambda: s3_client.download_file(service.bucket, listed[-1]["Key"], str(target))) for _ in range(runs)
        )
    with tempfile.TemporaryDirectory() as directory, zeo(directory, None) as port:
        name, results["commit, blob-dir"] = commit(port, directory, size)
        results["read, blob-dir"] = min(read(port, directory, name) for _ in range(runs))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="of the blob, in MiB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0, help="round trip to S3, in seconds")
    parser.add_argument("--bandwidth", type=float, default=0, help="of the link to S3, in MiB per second")
    arguments = parser.parse_args()
    with s3(arguments.latency, arguments.bandwidth) as service:
        results = run(service, arguments.size, arguments.runs)
    print(f"| {arguments.size} MiB | seconds | MiB/s |\n|---|---|---|")
    for name, seconds in results.items():
        print(f"| {name} | {seconds:.2f} | {arguments.size / seconds:.0f} |")


if __name__ == "__main__":
    main()
