"""How much do many clients get through? Run by hand; prints a Markdown table. Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.clients [--clients N] [--seconds S] [--size KIB] [--latency SECONDS] [--bandwidth MIB/S]

N stock ZEO clients in processes of their own, each of which commits blobs of the given size, or reads at random those
that were committed before, which it does not have itself: most are in the server's cache. The same with ZODB's own blob
directory on the same machine in the same run.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.common import RECORD, add_link, client, s3, zeo


def write(port, directory, size, seconds, result, started):
    storage = client(port, blob_dir=str(directory))
    data, names = os.urandom(size), []
    started.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        oid = storage.new_oid()
        path = directory / "tmp" / "blob"
        path.write_bytes(data)
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        storage.storeBlob(oid, ZERO, RECORD, str(path), "", transaction)
        storage.tpc_vote(transaction)
        names.append((oid, storage.tpc_finish(transaction)))
    result.put(names)
    storage.close()


def read(port, directory, names, seconds, result, started):
    storage = client(port, blob_dir=str(directory))
    done = []
    started.wait()
    end = time.monotonic() + seconds
    for name in random.sample(names, len(names)):
        if time.monotonic() > end:
            break
        storage.loadBlob(*name)
        done.append(name)
    result.put(done)
    storage.close()


def together(work, number, port, directory, *args):
    """What ``number`` processes did, all at the same time."""
    result, started = multiprocessing.Queue(), multiprocessing.Barrier(number)
    directory.mkdir()
    processes = [
        multiprocessing.Process(target=work, args=(port, directory / str(one), *args, result, started))
        for one in range(number)
    ]
    for process in processes:
        process.start()
    done = [name for _ in processes for name in result.get()]
    for process in processes:
        process.join()
    shutil.rmtree(directory)
    return done


def run(name, service, arguments):
    with tempfile.TemporaryDirectory() as directory, zeo(Path(directory), service) as port:
        directory = Path(directory)
        size, seconds = arguments.size << 10, arguments.seconds
        names = together(write, arguments.clients, port, directory / "writers", size, seconds)
        print(
            f"| {name} | commits | {len(names) / seconds:.0f} | {len(names) * size / seconds / (1 << 20):.1f} |",
            flush=True,
        )
        done = together(read, arguments.clients, port, directory / "readers", names, seconds)
        print(
            f"| {name} | reads | {len(done) / seconds:.0f} | {len(done) * size / seconds / (1 << 20):.1f} |", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--size", type=int, default=64, help="of a blob, in KiB")
    add_link(parser)
    arguments = parser.parse_args()
    print("| server | work | blobs/s | MiB/s |\n|---|---|---|---|", flush=True)
    with s3(arguments.latency, arguments.bandwidth) as service:
        run("s3blobs", service, arguments)
        run("blob-dir", None, arguments)


if __name__ == "__main__":
    main()
