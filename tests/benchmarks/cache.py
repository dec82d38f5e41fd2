"""What does a file cache of a million blobs cost? Run by hand; prints a Markdown table. Needs no S3.

    python -m tests.benchmarks.cache [--files N] [--directory DIR]

It makes N files of 1 KiB in the layout of the cache, as an earlier run would have left them, in a new directory below
DIR (default: where temporary files are); then it opens the cache, proves and looks up files in random order, and lets
it shrink. Meanwhile a thread looks how long it does not get its turn, as the event loop would.
"""

import argparse
import hashlib
import os
import random
import statistics
import tempfile
import threading
import time
from array import array
from pathlib import Path

from ZODB.utils import p64

from tests.benchmarks.common import MIB
from zodb_s3blobs.cache.directory import path_in
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.cache.journal import Journal, Record
from zodb_s3blobs.metrics import Metrics

SIZE = 1024
HITS, EVICTIONS = 100_000, 100_000


def resident():
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(directory, number):
    """Make the files, and the journal that tells of them."""
    Cache(directory, 0, Metrics()).close()
    journal = Journal(Path(directory, "index"))
    data = b"x" * SIZE
    digest = hashlib.sha256(data).digest()
    now = int(time.time())
    for start in range(0, number, 1000):
        oids = range(start, min(start + 1000, number))
        for oid in oids:
            path = path_in(directory, p64(oid), p64(oid + 1))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        journal.append([Record(p64(oid), p64(oid + 1), SIZE, now, digest) for oid in oids])
    journal.close()


class Watch:
    """A thread that wakes up every millisecond; `longest` is the longest time that it did not, in seconds."""

    def __init__(self):
        self.longest = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        last = time.perf_counter()
        while True:
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last - 0.001), now

    def read(self):
        """Return the longest pause since the last call."""
        longest, self.longest = self.longest, 0.0
        return longest


def measure(times, call, oids):
    """Call for each of ``oids``; note in ``times`` how many seconds it took."""
    for number, oid in enumerate(oids):
        began = time.perf_counter()
        call(p64(oid), p64(oid + 1)).release()
        times[number] = time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--directory", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        directory = os.path.join(root, "cache")
        started = time.perf_counter()
        fill(directory, arguments.files)
        print(f"made {arguments.files:,} files in {time.perf_counter() - started:.0f} s\n", flush=True)
        block = os.statvfs(directory).f_frsize
        watch = Watch()
        time.sleep(1)
        idle = watch.read()
        oids = array("q", random.sample(range(arguments.files), k=min(HITS, arguments.files)))
        proofs, hits = array("d", bytes(8 * len(oids))), array("d", bytes(8 * len(oids)))
        before = resident()
        started = time.perf_counter()
        cache = Cache(directory, arguments.files * block, Metrics())
        opened = time.perf_counter()
        cache.wait_until_read()
        read = time.perf_counter()
        memory, start_pause = resident() - before, watch.read()
        assert (len(cache), cache.size) == (arguments.files, arguments.files * block)
        measure(proofs, cache.prove, oids)
        measure(hits, cache.get, oids)
        used_memory, hit_pause = resident() - before, watch.read()
        evictions = min(EVICTIONS, arguments.files // 2)
        file = cache.new_file()  # whose publication makes it shrink
        os.truncate(file.path, evictions * block)
        file.digest = "00" * 32
        began = time.perf_counter()
        with file.publish(p64(arguments.files), p64(1)):
            published = time.perf_counter()
            while cache.size > cache.limit:
                time.sleep(0.001)
            evicted = time.perf_counter()
        eviction_pause = watch.read()
        cache.close()
        print("| | |\n|---|---|")
        print(f"| until it can be used | {1000 * (opened - started):.0f} ms |")
        print(f"| until all files are known | {read - started:.1f} s |")
        print(f"| memory | {memory / MIB:.0f} MiB, {memory / arguments.files:.0f} bytes a file |")
        print(f"| memory after {len(oids):,} were used twice | {used_memory / arguments.files:.0f} bytes a file |")
        print(f"| proof of a file of {SIZE} bytes, p50 | {1e6 * statistics.median(proofs):.0f} µs |")
        print(f"| hit, p50 | {1e6 * statistics.median(hits):.0f} µs |")
        print(f"| hit, p99 | {1e6 * statistics.quantiles(hits, n=100)[-1]:.0f} µs |")
        print(f"| publication that evicts {evictions:,} files | {1000 * (published - began):.1f} ms |")
        print(f"| eviction | {1e6 * (evicted - published) / evictions:.0f} µs a file |")
        pauses = " / ".join(f"{1000 * pause:.0f}" for pause in (idle, start_pause, hit_pause, eviction_pause))
        print(f"| longest pause of another thread: before / start / use / eviction | {pauses} ms |")
        print("\nremoving the files", flush=True)


if __name__ == "__main__":
    main()
