"""What do metrics cost? Run by hand; prints Markdown tables.

    python -m tests.benchmarks.metrics [--rounds N] [--reads N]

Two real runzeo, one with metrics-address, which a process scrapes once a second, 15 to 60 times as often as usual; one
without. One stock ZEO client of each reads a small blob that is in the server's cache and, each time anew, not with the
client; the two take turns, round after round, in changing order. The ratio of two rounds that follow one another is
that of the servers; as a control, that of two rounds of the same server, which shows what the machine alone does.

Both servers count, since nothing turns that off. What it costs is measured in this process: cache hits, with the
instruments and with some that do nothing. Then what a scrape of an idle server costs. No S3 is asked for anything.
"""

import argparse
import gzip
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from tests.benchmarks.common import client, commit_blob
from tests.support.s3_server import S3Server
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.metrics import Metrics

SIZE = 4096  # bytes
WARM_UP = 200  # reads
SCRAPES = 100


def scrape(address):
    """The bytes of the answer, compressed, as Prometheus asks for it."""
    request = urllib.request.Request("http://{}:{}/metrics".format(*address), headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def scrape_for_ever(address):
    while True:
        scrape(address)
        time.sleep(1)


class Reader:
    """A client of ``server`` that has committed a blob and reads it over and over."""

    def __init__(self, server):
        self._client = client(server.address[1], blob_dir=str(server.directory / "client"))
        path = server.directory / "client" / "tmp" / "blob"
        path.write_bytes(os.urandom(SIZE))
        self._oid = self._client.new_oid()
        self._tid = commit_blob(self._client, self._oid, str(path))
        self.rounds = []

    def read(self, count):
        """Seconds of each of ``count`` reads."""
        times = []
        for _ in range(count):
            # Or it would not ask the server.
            Path(self._client.fshelper.getBlobFilename(self._oid, self._tid)).unlink(missing_ok=True)
            started = time.perf_counter()
            self._client.loadBlob(self._oid, self._tid)
            times.append(time.perf_counter() - started)
        return times

    def close(self):
        self._client.close()


def take_turns(readers, rounds, reads):
    for reader in readers:
        reader.read(WARM_UP)
    for number in range(rounds):
        for reader in readers if number % 2 else readers[::-1]:
            reader.rounds.append(reader.read(reads))


def p99(times):
    return statistics.quantiles(times, n=100)[-1]


def p999(times):
    return statistics.quantiles(times, n=1000)[-1]


def shown(ratios):
    """Median, and the middle half."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compare(plain, scraped):
    """Prints the table of the reads."""
    print(f"| warm read of {SIZE >> 10} KiB | median (ms) | p99 (ms) | p99.9 (ms) |\n|---|---|---|---|")
    for name, reader in ("without metrics-address", plain), ("with it, scraped every second", scraped):
        times = [seconds for times in reader.rounds for seconds in times]
        figures = [f"{1000 * figure(times):.3f}" for figure in (statistics.median, p99, p999)]
        print(f"| {name} | {' | '.join(figures)} |")
    print("\n| ratio of two rounds: median (middle half) | of their medians | of their p99 |\n|---|---|---|")
    pairs = {
        "with / without": list(zip(scraped.rounds, plain.rounds, strict=True)),
        "control: without / without": list(zip(plain.rounds[1:], plain.rounds, strict=False)),
        "control: with / with": list(zip(scraped.rounds[1:], scraped.rounds, strict=False)),
    }
    for name, rounds in pairs.items():
        ratios = [[figure(one) / figure(other) for one, other in rounds] for figure in (statistics.median, p99)]
        print(f"| {name} | {shown(ratios[0])} | {shown(ratios[1])} |", flush=True)


class Nothing:
    """An instrument that does nothing."""

    def labels(self, *values):
        return self

    def inc(self, amount=1):
        pass

    def observe(self, amount):
        pass

    def set(self, value):
        pass

    def set_function(self, function):
        pass


def hit(directory, metrics):
    """Makes a function that has a fetcher answer from its cache."""
    cache = Cache(directory, 1 << 20, metrics)
    cache.wait_until_read()
    file = cache.new_file()
    file.write_at(os.urandom(SIZE), 0)
    file.publish(b"\0" * 8, b"\0" * 8).release()
    fetcher = Fetcher(None, cache, metrics)
    return lambda: fetcher.fetch(b"\0" * 8, b"\0" * 8).release()


def timed(call, count):
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def count_hits(directory, rounds, reads):
    """Prints what the instruments add to one hit."""
    silent = Metrics()
    for name, value in list(vars(silent).items()):
        if isinstance(value, Counter | Gauge | Histogram):
            setattr(silent, name, Nothing())
    calls = hit(directory / "counting", Metrics()), hit(directory / "silent", silent)
    for call in calls:
        timed(call, WARM_UP)
    counting, uncounted = (statistics.median(times) for times in zip(*_turns(calls, rounds, reads), strict=True))
    print("\n| cache hit inside the server | microseconds |\n|---|---|")
    print(f"| counted | {1e6 * counting:.1f} |\n| not counted | {1e6 * uncounted:.1f} |", flush=True)


def _turns(calls, rounds, reads):
    return [[timed(call, reads) for call in calls] for _ in range(rounds)]


def idle_scrapes(server):
    """Prints what one scrape costs."""
    before = server.metrics()("process_cpu_seconds_total")
    times = [timed(lambda: scrape(server.metrics_address), 1) for _ in range(SCRAPES)]
    cpu = (server.metrics()("process_cpu_seconds_total") - before) / (SCRAPES + 1)
    answer = scrape(server.metrics_address)
    print("\n| one scrape of an idle server with one storage | |\n|---|---|")
    print(f"| median, p99 | {1000 * statistics.median(times):.1f} ms, {1000 * p99(times):.1f} ms |")
    print(f"| CPU time of the server | {1000 * cpu:.1f} ms |")
    print(f"| series | {len(server.metrics().samples)} |")
    print(f"| bytes, compressed, and not | {len(answer)}, {len(gzip.decompress(answer))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="of each server")
    parser.add_argument("--reads", type=int, default=1000, help="of each round")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        s3 = stack.enter_context(S3Server())
        servers = []
        for name in "plain", "scraped":
            (directory / name).mkdir()
            made = ZEOServer(directory / name, s3, s3.bucket(name), metrics=name == "scraped")
            servers.append(stack.enter_context(made))
        scraper = multiprocessing.Process(target=scrape_for_ever, args=(servers[1].metrics_address,), daemon=True)
        scraper.start()
        readers = [Reader(server) for server in servers]
        take_turns(readers, arguments.rounds, arguments.reads)
        scraper.terminate()
        compare(*readers)
        for reader in readers:
            reader.close()
        count_hits(directory, arguments.rounds, arguments.reads)
        idle_scrapes(servers[1])


if __name__ == "__main__":
    main()
