"""What does moving in and out cost? Run by hand; prints a Markdown table. Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.moving [--blobs N] [--size BYTES]

A database of that many small blobs, each the only revision of its object, in a blob directory that a FileStorage made;
then migrate, verify and export, each in a process of its own. The memory is that process's at its highest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.serialize import ObjectWriter
from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.common import s3

MIB = 1 << 20
PER_TRANSACTION = 1000

_CONFIG = """
%import zodb_s3blobs
<zeo>
  address 127.0.0.1:1
</zeo>
<s3blobstorage 1>
  bucket-name {bucket}
  s3-endpoint-url {endpoint}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-read-timeout 120s
  cache-dir {dir}/cache
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""


def make_site(directory, blobs, size):
    """``Data.fs`` and ``blobs`` in the directory."""
    storage = FileStorage(str(directory / "Data.fs"), blob_dir=str(directory / "blobs"))
    path = directory / "blobs" / "tmp" / "new"
    record = ObjectWriter().serialize(Blob())
    for start in range(0, blobs, PER_TRANSACTION):
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        for _ in range(start, min(start + PER_TRANSACTION, blobs)):
            path.write_bytes(os.urandom(size))
            storage.storeBlob(storage.new_oid(), ZERO, record, str(path), "", txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
    storage.close()


def run(config, row, blobs, expected, *arguments):
    """Run the command; ``expected``: the one word under which it is to count all blobs."""
    line = [
        sys.executable,
        "-m",
        "zodb_s3blobs",
        arguments[0],
        "-C",
        str(config),
        "--json",
        *map(str, arguments[1:]),
    ]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(line, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, row
        output.seek(0)
        found = json.load(output)["found"]
    assert {word for word in found if found[word]["objects"]} == {expected}, found
    assert found[expected]["objects"] == blobs, found
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB
    cpu = used.ru_utime + used.ru_stime
    print(f"| {row} | {took:.1f} | {blobs / took:,.0f} | {cpu:.1f} | {peak:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blobs", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=1000, help="of each, in bytes")
    arguments = parser.parse_args()
    with s3() as service, tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_site(directory, arguments.blobs, arguments.size)
        config = directory / "zeo.conf"
        config.write_text(_CONFIG.format(**vars(service), dir=directory))
        migrate = ("migrate", "--from-blob-dir", directory / "blobs")
        export = ("export", "--to-blob-dir", directory / "exported")
        print(f"{arguments.blobs:,} blobs of {arguments.size:,} bytes\n")
        print("| command | seconds | blobs/s | seconds of CPU | highest resident memory (MiB) |")
        print("|---|---|---|---|---|", flush=True)
        for row, expected, command in (
            ("migrate", "copied", migrate),
            ("migrate again", "there", migrate),
            ("verify", "good", ("verify",)),
            ("verify --checksum", "good", ("verify", "--checksum")),
            ("export", "copied", export),
            ("export again", "there", export),
        ):
            run(config, row, arguments.blobs, expected, *command)


if __name__ == "__main__":
    main()
