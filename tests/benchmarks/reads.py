"""What does the read of a small blob cost? Run by hand; prints a Markdown table.

Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.reads [--size KIB] [--blobs N] [--clients N] [--seconds S] [--rounds N]

Stock ZEO clients in processes of their own read blobs that they do not have: warm (the server has them in its cache),
from ZODB's own blob directory, and cold (the server has to fetch them), beside raw boto3 in as many threads as the
server has. They take turns, so that whatever else the machine does slows down all of them. On a machine with few
processors the clients, and for cold reads the S3 service, take most of their time: the processor time of the server,
or of raw boto3, is what a change shows up in. So cold reads are measured once more for clients that take next to none
of it, since they decode the messages and keep nothing.

For cold reads each round has an empty cache and new clients, and nothing is deleted before the end: ext4 takes long to
create a file where many were deleted a moment ago.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.common import RECORD, Meter, add_link, client, empty_cache, s3, server
from tests.support.slow_client import SlowClient

_THREADS = 16  # the default of s3-concurrency

MORE = "The blobs do not last for so many seconds: use more of them"


def reads(port, directory, names):
    """Read these blobs in turns, and forget them."""
    with contextlib.closing(client(port, blob_dir=str(directory))) as storage:
        yield
        for name in itertools.cycle(names):
            os.unlink(storage.loadBlob(*name))
            yield


def first_reads(port, directory, names):
    """Read each of these blobs once."""
    with contextlib.closing(client(port, blob_dir=str(directory))) as storage:
        yield
        for name in names:
            storage.loadBlob(*name)
            yield
        raise AssertionError(MORE)


def commit(port, directory, blobs, size):
    """Commit so many blobs of ``size`` bytes; return their names."""
    names = []
    with contextlib.closing(client(port, blob_dir=str(directory))) as storage:
        while len(names) < blobs:
            oids = [storage.new_oid() for _ in range(min(100, blobs - len(names)))]
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            for oid in oids:
                path = Path(directory) / "tmp" / oid.hex()
                path.write_bytes(os.urandom(size))
                storage.storeBlob(oid, ZERO, RECORD, str(path), "", transaction)
            storage.tpc_vote(transaction)
            tid = storage.tpc_finish(transaction)
            names += [(oid, tid) for oid in oids]
    return names


def processor_time(pid):
    """The seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Tally:
    """The number of reads, the seconds that they took, and the processor time of who served them."""

    def __init__(self):
        self.count = self.seconds = self.processor = 0

    def add(self, count, seconds, processor):
        self.count += count
        self.seconds += seconds
        self.processor += processor

    @property
    def rate(self):
        return self.count / self.seconds

    @property
    def cost(self):
        """Milliseconds of processor time for each."""
        return 1000 * self.processor / self.count


def measure(tally, running, operation, names, directory, clients, seconds):
    """Let clients with new blob directories in ``directory`` do so with the server for so long."""
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        meters = [
            stack.enter_context(Meter(operation, running.address[1], directory / str(one), names[one::clients]))
            for one in range(clients)
        ]
        for meter in meters:
            meter.take()
        began, used = time.monotonic(), processor_time(running.pid)
        time.sleep(seconds)
        ended = time.monotonic()
        processor = processor_time(running.pid) - used
        count = sum(len(meter.take(began, ended)) for meter in meters)
    tally.add(count, ended - began, processor)


def _read_in_threads(pipe, readers, seconds):
    """For so long, let a thread for each of ``readers`` call a function with one name after the other."""

    def work(reader):
        read, names = reader
        for count, name in enumerate(names):
            if time.monotonic() > end:
                return count
            read(name)
        raise AssertionError(MORE)

    with ThreadPoolExecutor(len(readers)) as threads:
        began, used, end = time.monotonic(), time.process_time(), time.monotonic() + seconds
        count = sum(threads.map(work, readers))
        pipe.send((count, time.monotonic() - began, time.process_time() - used))


def _download(pipe, service, seconds):
    s3_client = service.client(max_pool_connections=_THREADS)
    pages = s3_client.get_paginator("list_objects_v2").paginate(Bucket=service.bucket, Prefix="blobs/")
    keys = [found["Key"] for page in pages for found in page["Contents"]]

    def read(key):
        s3_client.get_object(Bucket=service.bucket, Key=key)["Body"].read()

    _read_in_threads(pipe, [(read, itertools.cycle(keys[first::_THREADS])) for first in range(_THREADS)], seconds)


def _ask(pipe, address, names, clients, seconds):
    def reader(first):
        client = SlowClient(address)
        return lambda name: client.answer(client.call("sendBlob", *name)), names[first::clients]

    _read_in_threads(pipe, [reader(first) for first in range(clients)], seconds)


def _in_a_process(work, *args):
    pipe, its = multiprocessing.Pipe()
    process = multiprocessing.Process(target=work, args=(its, *args))
    process.start()
    result = pipe.recv()
    process.join()
    return result


def download(tally, service, seconds):
    """Let raw boto3 read all blobs in a process of its own."""
    tally.add(*_in_a_process(_download, service, seconds))


def ask(tally, running, names, clients, seconds):
    """Let clients that keep nothing, all in one process, read from a server for so long."""
    used = processor_time(running.pid)
    count, taken, _ = _in_a_process(_ask, running.address, names, clients, seconds)
    tally.add(count, taken, processor_time(running.pid) - used)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=50, help="of a blob, in KiB")
    parser.add_argument("--blobs", type=int, default=6000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    add_link(parser)
    arguments = parser.parse_args()
    size, clients, seconds = arguments.size << 10, arguments.clients, arguments.seconds
    warm, plain, cold, light, raw = Tally(), Tally(), Tally(), Tally(), Tally()
    with (
        s3(arguments.latency, arguments.bandwidth, real=True) as service,
        tempfile.TemporaryDirectory() as ours,
        tempfile.TemporaryDirectory() as theirs,
        server(theirs, None) as blob_dir,
    ):
        stored = commit(blob_dir.address[1], Path(theirs) / "writer", arguments.blobs, size)
        with server(ours, service, f"s3-concurrency {_THREADS}") as s3blobs:
            names = commit(s3blobs.address[1], Path(ours) / "writer", arguments.blobs, size)
            for number in range(arguments.rounds):
                measure(warm, s3blobs, reads, names, Path(ours) / f"warm-{number}", clients, seconds)
                measure(plain, blob_dir, reads, stored, Path(theirs) / f"warm-{number}", clients, seconds)
        for number in range(arguments.rounds):
            empty_cache(ours)
            with server(ours, service, f"s3-concurrency {_THREADS}") as s3blobs:
                measure(cold, s3blobs, first_reads, names, Path(ours) / f"cold-{number}", clients, seconds)
            empty_cache(ours)
            with server(ours, service, f"s3-concurrency {_THREADS}") as s3blobs:
                ask(light, s3blobs, names, clients, seconds)
            download(raw, service, seconds)
    print("| reads | blobs/s | processor time of the server for one, ms |\n|---|---|---|")
    for name, tally in {
        "warm, s3blobs": warm,
        "blob-dir": plain,
        "cold, s3blobs": cold,
        "cold, to clients that keep nothing": light,
        "raw boto3": raw,
    }.items():
        print(f"| {name} | {tally.rate:.0f} | {tally.cost:.2f} |")
    ratios = warm.rate / plain.rate, cold.rate / raw.rate, light.rate / raw.rate
    print("\nWarm to blob-dir: {:.2f}; cold to raw boto3: {:.2f}, to clients that keep nothing: {:.2f}".format(*ratios))


if __name__ == "__main__":
    main()
