"""Do commits wait for S3? Run by hand; prints a Markdown table. Endpoint and credentials as for stall.py.

    python -m tests.benchmarks.commits [--only FIGURE ...] [--quick]

What other clients notice of a commit with blobs while S3 is far, near or silent, and what such a commit costs: a real
runzeo over S3, beside one with ZODB's own blob directory or raw boto3, on the same machine in the same run. Each client
is a process of its own. Without an endpoint it starts SeaweedFS if that is installed (`servers`), else moto, which is
no match for it. Rows with raw boto3 are controls, which show what S3 on the same machine takes away.

A pair of times is the median and the longest; the ratio of two pairs compares both. The rate of a large blob is the
best of some runs, and the longest load during a commit of many blobs the median of those during some commits.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.tests.StorageTestBase import ZERO

from tests.benchmarks.clients import together, write
from tests.benchmarks.common import (
    MIB,
    RECORD,
    Meter,
    blob_commits,
    client,
    commit_blob,
    commit_object,
    commits,
    loads,
    random_file,
    s3,
    zeo,
)
from tests.benchmarks.throughput import timed
from tests.support.counts import nonzero
from tests.support.link import Link
from tests.support.zeo_server import free_address, scrape

KIB = 1 << 10
SMALL = 64 * KIB  # bytes of a small blob
BETWEEN_LOADS, BETWEEN_COMMITS = 0.001, 0.01  # seconds
WRITERS = 16
LARGE = 256  # MiB
REQUESTS_OF = 20  # commits


@dataclass
class Effort:
    """How much is measured."""

    seconds: float
    runs: int


@contextlib.contextmanager
def server(service, options=""):
    """A `zeo` in a directory of its own; gives its port and this directory."""
    with tempfile.TemporaryDirectory() as directory, zeo(directory, service, options) as port:
        yield port, Path(directory)


def small_writer(port, directory):
    return Meter(blob_commits, port, directory, SMALL)


def bystander(port):
    return Meter(commits, port, rest=BETWEEN_COMMITS)


@contextlib.contextmanager
def loader(port):
    """A `Meter` that loads an object over and over."""
    with contextlib.closing(client(port)) as storage:
        oid = storage.new_oid()
        commit_object(storage, oid, ZERO)
    with Meter(loads, port, [oid], rest=BETWEEN_LOADS) as meter:
        yield meter


def taken_in(seconds, meter):
    """Return how long each operation took that began or ended in the next ``seconds``."""
    started = time.monotonic()
    time.sleep(seconds)
    return meter.take(started)


def raw_puts(service, size, seconds):
    """Return how many objects of ``size`` bytes `WRITERS` threads put per second, without a ZEO server."""
    raw_client = service.client(max_pool_connections=WRITERS)
    data, end = os.urandom(size), time.monotonic() + seconds

    def put(thread):
        done = 0
        while time.monotonic() < end:
            raw_client.put_object(Bucket=service.bucket, Key=f"raw/{thread}/{done}", Body=data)
            done += 1
        return done

    with ThreadPoolExecutor(WRITERS) as pool:
        return sum(pool.map(put, range(WRITERS))) / seconds


@contextlib.contextmanager
def raw_puts_beside(service, size):
    """Have a process do `raw_puts` while the block runs; without a service, nothing."""
    process = multiprocessing.Process(target=raw_puts, args=(service, size, 3600), daemon=True)
    if service:
        process.start()
    yield
    if service:
        process.terminate()
        process.join()


# An import: a transaction of many blobs


@dataclass
class Import:
    """The moments, of `time.monotonic`, at which a transaction of many blobs reached its steps."""

    begun: float
    voting: float
    voted: float
    finished: float


def import_blobs(port, directory, count, size, seconds, result):
    """Commit transactions of ``count`` blobs of ``size`` bytes for ``seconds``, at least one; send the `Import`s."""
    sources = [directory / f"source{number}" for number in range(count)]
    with contextlib.closing(client(port, blob_dir=str(directory))) as storage:
        data, done = os.urandom(size), []
        for number, source in enumerate(sources):
            source.write_bytes(number.to_bytes(8, "big") + data[8:])
        os.sync()  # or the servers' own fsync waits for these files
        while not done or done[-1].finished < done[0].begun + seconds:
            oids, paths = [], []
            for source in sources:
                oids.append(storage.new_oid())
                paths.append(directory / "tmp" / oids[-1].hex())
                paths[-1].hardlink_to(source)
            transaction = TransactionMetaData()
            moments = [time.monotonic()]
            storage.tpc_begin(transaction)
            for oid, path in zip(oids, paths, strict=True):
                storage.storeBlob(oid, ZERO, RECORD, str(path), "", transaction)
            moments.append(time.monotonic())
            storage.tpc_vote(transaction)
            moments.append(time.monotonic())
            storage.tpc_finish(transaction)
            moments.append(time.monotonic())
            done.append(Import(*moments))
    result.put(done)


def imports(port, directory, count, size, seconds=0):
    """Return the `Import` of each transaction that a client commits, one after the other, for ``seconds``."""
    result = multiprocessing.Queue()
    process = multiprocessing.Process(target=import_blobs, args=(port, directory, count, size, seconds, result))
    process.start()
    process.join()
    assert process.exitcode == 0, "The client that imports blobs failed; see its traceback above."
    return result.get()


def longest_load(service, runs, count, size, since, until, beside=None):
    """Return the longest load of another client between two moments of an import; the median of some imports.

    ``beside``: a service that takes `raw_puts` all the while.
    """
    longest = []
    with server(service) as (port, directory), loader(port) as loading, raw_puts_beside(beside, size):
        for number in range(runs):
            (one,) = imports(port, directory / f"import{number}", count, size)
            longest.append(max(loading.take(getattr(one, since), getattr(one, until))))
    return statistics.median(longest)


# Cells of the table


def pair(times):
    return statistics.median(times), max(times)


def shown(seconds):
    """Return a time, or a pair of them, in milliseconds."""
    values = seconds if isinstance(seconds, tuple) else (seconds,)
    return " / ".join(f"{1000 * value:,.{1 if value < 0.1 else 0}f}" for value in values)


def ratio(ours, other):
    """Return the ratio of two figures, or the ratios of two pairs."""
    pairs = zip(ours, other, strict=True) if isinstance(ours, tuple) else [(ours, other)]
    ratios = [one / another for one, another in pairs]
    return " / ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in ratios)


def row(figure, ours, other="", compared="", goal=""):
    print(f"| {figure} | {ours} | {other} | {compared} | {goal} |", flush=True)


# The figures


def measure_bystander(effort):
    def beside_two(port, directory):
        with small_writer(port, directory / "one"), small_writer(port, directory / "two"), bystander(port) as meter:
            return pair(taken_in(effort.seconds, meter))

    with s3(latency=0.5, real=True) as service, server(service) as (port, directory):
        with bystander(port) as meter:
            idle = pair(taken_in(effort.seconds / 2, meter))
        ours = beside_two(port, directory)
    with server(None) as (port, directory):
        with bystander(port) as meter:
            other_idle = pair(taken_in(effort.seconds / 2, meter))
        other = beside_two(port, directory)
    row("commit without blobs, idle: p50 / max (ms)", shown(idle), shown(other_idle))
    row(
        "the same beside two writers of 64 KiB, S3 at 500 ms",
        shown(ours),
        shown(other),
        f"{ratio(ours, idle)} of idle",
        "2 of idle",
    )


def measure_writers(effort):
    def rate(port, directory):
        done = together(write, WRITERS, port, directory / "writers", SMALL, effort.seconds)
        return len(done) / effort.seconds

    with s3(latency=0.02, real=True) as service:
        with server(service) as (port, directory):
            ours = rate(port, directory)
        raw = raw_puts(service, SMALL, effort.seconds / 2)
    with server(None) as (port, directory):
        other = rate(port, directory)
    row(
        f"{WRITERS} writers of 64 KiB, S3 at 20 ms: commits/s",
        f"{ours:.0f}",
        f"{other:.0f}",
        ratio(ours, other),
        "0.8",
    )
    row(f"the most that this S3 takes: put_object of raw boto3 in {WRITERS} threads, per second", "", f"{raw:.0f}")


def measure_large(effort):
    ours, raw = [], []
    with s3(real=True) as service, server(service) as (port, directory):
        raw_client = service.client()
        with contextlib.closing(client(port, blob_dir=str(directory / "writer"))) as storage:
            source, path = random_file(directory / "source", LARGE), directory / "writer" / "tmp" / "blob"
            for _ in range(effort.runs):
                raw.append(timed(lambda: raw_client.upload_file(source, service.bucket, "raw")))
                path.hardlink_to(source)
                ours.append(timed(lambda: commit_blob(storage, storage.new_oid(), str(path))))
    rates = LARGE / min(ours), LARGE / min(raw)
    row(
        f"commit of {LARGE} MiB beside raw boto3 upload_file: MiB/s",
        *(f"{rate:.0f} ({LARGE / rate:.2f} s)" for rate in rates),
        ratio(*rates),
        "0.9",
    )


def measure_many(effort):
    figure, size = "longest load of another client during {} of {:,} blobs of 4 KiB (ms)", 4 * KIB
    with s3(real=True) as service:
        vote = 3000, size, "voting", "voted"
        ours, other = (longest_load(one, effort.runs, *vote) for one in (service, None))
        control = longest_load(None, 1, *vote, beside=service)
        row(figure.format("the vote", vote[0]), shown(ours), shown(other), ratio(ours, other), "2")
        row("the same while raw boto3 puts such objects", "", shown(control), ratio(ours, control))
        whole = 5000, size, "begun", "finished"
        ours, other = (longest_load(one, effort.runs, *whole) for one in (service, None))
        row(figure.format("a whole commit", whole[0]), shown(ours), shown(other), ratio(ours, other), "2")


def measure_silent(effort):
    with s3(real=True) as service, Link(service.endpoint) as link:
        behind = dataclasses.replace(service, endpoint=link.url)
        with server(behind) as (port, directory), bystander(port) as meter:
            idle = pair(taken_in(effort.seconds / 2, meter))
            with small_writer(port, directory / "writer"):
                link.break_down("silent after the handshake")
                time.sleep(0.5)  # by then the request of the writer's commit is on its way
                started = time.monotonic()
                time.sleep(effort.seconds)
                link.mend()
                silent = pair(meter.take(started))
    row(
        f"commit without blobs while S3 is silent for {effort.seconds:.0f} s and a blob is committed: p50 / max (ms)",
        shown(silent),
        f"{shown(idle)} (s3blobs, idle)",
        f"{ratio(silent, idle)} of idle",
        "1 of idle",
    )


def measure_requests(effort):
    def requests():
        return nonzero(scrape(address), "s3blobs_s3_attempts_total")

    address = free_address()
    options = "metrics-address {}:{}".format(*address)
    with s3(real=True) as service, server(service, options) as (port, directory):
        writing = blob_commits(port, directory / "writer", SMALL)
        next(writing)  # which may find out what the service can do
        time.sleep(1)  # for what follows a commit in the background
        before = requests()
        for _ in range(REQUESTS_OF):
            next(writing)
        time.sleep(1)
        after = requests()
        writing.close()
    made = {name: (number - before.get(name, 0)) / REQUESTS_OF for name, number in after.items()}
    text = " + ".join(f"{number:g} {name.upper()}" for name, number in made.items() if number)
    row("requests to S3 that a commit of 64 KiB makes", text, goal="1 PUT")


def measure_import(effort):
    with s3(real=True) as service:
        for count, size, name in (64, 3 * MIB, "64 blobs of 3 MiB"), (1, 1 << 30, "one blob of 1 GiB"):
            compare_imports(service, count, size, effort, f"imports of {name}")


def compare_imports(service, count, size, effort, name):
    """Print what other clients notice of ``name``, imports that go on for equally long times on each server.

    The longest load of a long time is longer than that of a short one. The control is a blob directory while raw boto3
    stores such blobs: what an S3 service on the same machine takes away.
    """

    def beside(one, control=None):
        with (
            server(one) as (port, directory),
            loader(port) as loading,
            small_writer(port, directory / "writer") as meter,
            raw_puts_beside(control, min(size, 8 * MIB)),
        ):
            done = imports(port, directory / "import", count, size, 2 * effort.seconds)
            began, ended = done[0].begun, done[-1].finished
            took = statistics.median(each.finished - each.begun for each in done)
            return pair(loading.take(began, ended)), pair(meter.take(began, ended)), took

    figures = (
        (f"load of another client beside {name}: p50 / max (ms)", "2"),
        (f"commit of 64 KiB beside {name}: p50 / max (ms)", ""),
        (f"one of {name} (ms)", ""),
    )
    results = beside(service), beside(None), beside(None, control=service)
    for (figure, goal), ours, other, control in zip(figures, *results, strict=True):
        row(figure, shown(ours), shown(other), ratio(ours, other), goal)
        row("the same with a blob-dir, beside raw boto3", "", shown(control), ratio(ours, control))


FIGURES = {
    "bystander": measure_bystander,
    "writers": measure_writers,
    "large": measure_large,
    "many": measure_many,
    "silent": measure_silent,
    "requests": measure_requests,
    "import": measure_import,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE", help="of these: %(choices)s"
    )
    parser.add_argument("--quick", action="store_true", help="measure less, for a first look")
    arguments = parser.parse_args()
    print("| figure | s3blobs | blob-dir or raw boto3 | ratio | goal |\n|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        FIGURES[name](Effort(seconds=3, runs=1) if arguments.quick else Effort(seconds=8, runs=2))


if __name__ == "__main__":
    main()
