"""Do memory, files and threads of the server stay flat? Run by hand; prints a line every now and then.

    python -m tests.benchmarks.soak [--operations N] [--clients N]

Clients of a real runzeo commit, overwrite, read, abort and delete blobs, and the database is packed, N operations in
all; the server's cache is so small that it evicts all the time. Ends with an error if the server has more threads or
open files at the end than halfway, or a tenth more memory. Endpoint and credentials as for stall.py.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import transaction
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob

from tests.benchmarks.common import MIB, client, s3
from tests.support.zeo_server import ZEOServer

SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-endpoint-url {endpoint}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-stage-threshold 100KB
  cache-dir {dir}/cache
  cache-size 5MB
  gc-max-delete-percent 100
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""
NAMES = 50


def work(port, directory, name, counter, operations):
    db = ZODB.DB(client(port, blob_dir=directory, blob_cache_size=MIB))
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    chance = random.Random(name)
    while True:
        with counter.get_lock():
            if counter.value >= operations:
                break
            counter.value += 1
        blobs, key = connection.root()[name], chance.randrange(NAMES)
        what = chance.random()
        manager.begin()
        if what < 0.5 and key in blobs:
            blobs[key].open().close()
        elif what < 0.55:
            blobs.pop(key, None)
        else:
            blob = blobs.get(key) or Blob()
            with blob.open("w") as file:
                file.write(os.urandom(chance.choice((100, 4000, 4000, 150_000))))
            blobs[key] = blob
        if what > 0.95:
            manager.abort()
        else:
            manager.commit()
    connection.close()
    db.close()


def figures(pid):
    """Threads, open files, and MiB of memory of a process."""
    process = Path(f"/proc/{pid}")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir(process / "task")), len(os.listdir(process / "fd")), resident // MIB


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=4)
    arguments = parser.parse_args()
    with s3() as service, tempfile.TemporaryDirectory() as directory:
        text = SECTION.format(**vars(service), dir=directory)
        with ZEOServer(directory, service, storages=lambda settings: text) as server:
            packer, packed, halfway = server.db(), time.monotonic(), None
            with packer.transaction() as connection:
                for one in range(arguments.clients):
                    connection.root()[str(one)] = PersistentMapping()
            counter = multiprocessing.Value("q", 0)
            port = server.address[1]
            clients = [
                multiprocessing.Process(
                    target=work, args=(port, f"{directory}/client{one}", str(one), counter, arguments.operations)
                )
                for one in range(arguments.clients)
            ]
            for process in clients:
                process.start()
            print("operations  threads  files  MiB", flush=True)
            reported = 0
            while any(process.is_alive() for process in clients):
                time.sleep(1)
                if time.monotonic() - packed > 60:
                    packer.pack()
                    packed = time.monotonic()
                if counter.value >= reported + arguments.operations // 10:
                    reported = counter.value
                    found = figures(server.pid)
                    if reported >= arguments.operations // 2:
                        halfway = halfway or found
                    print("{:>10,}  {:>7}  {:>5}  {:>3}".format(reported, *found), flush=True)
            assert all(process.exitcode == 0 for process in clients), "a client failed"
            last = figures(server.pid)
            print("{:>10}  {:>7}  {:>5}  {:>3}".format("the end", *last))
            packer.close()
    if last[0] > halfway[0] or last[1] > halfway[1] + 5 or last[2] > 1.1 * halfway[2]:
        sys.exit("the server has grown")


if __name__ == "__main__":
    main()
