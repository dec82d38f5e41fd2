"""What does a file cache of a million blobs cost? Run by hand; prints a Markdown table. Needs no S3.

    python -m tests.benchmarks.cache [--files N] [--directory DIR]

It makes N files of 1 KiB in the layout of the cache, as earlier runs would have left them, in a new directory below DIR
(default: where temporary files are); then it opens the cache, looks up files in random order, and lets it shrink.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from ZODB.utils import p64

from tests.benchmarks.common import MIB
from zodb_s3blobs.cache.directory import path_in
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.metrics import Metrics

SIZE = 1024
HITS, EVICTIONS = 100_000, 100_000


def resident():
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(directory, number):
    Cache(directory, 0, Metrics()).close()
    data = b"x" * SIZE
    for oid in range(number):
        path = path_in(directory, p64(oid), p64(oid + 1))
        try:
            file = open(path, "wb")  # noqa: SIM115
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "wb")  # noqa: SIM115
        with file:
            file.write(data)


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
        before = resident()
        started = time.perf_counter()
        cache = Cache(directory, arguments.files * SIZE, Metrics())
        opened = time.perf_counter()
        cache.wait_until_read()
        read = time.perf_counter()
        memory = resident() - before
        assert len(cache) == arguments.files
        times = []
        for oid in random.choices(range(arguments.files), k=min(HITS, arguments.files)):
            began = time.perf_counter()
            cache.get(p64(oid), p64(oid + 1)).release()
            times.append(time.perf_counter() - began)
        times.sort()
        evictions = min(EVICTIONS, arguments.files // 2)
        cache.limit = (arguments.files - evictions) * SIZE
        began = time.perf_counter()
        file = cache.new_file()  # whose publication makes it shrink
        file.write_at(b"x", 0)
        file.sync()
        file.publish(p64(arguments.files), p64(1)).release()
        while cache.size > cache.limit:
            time.sleep(0.001)
        took = time.perf_counter() - began
        cache.close()
        print("| | |\n|---|---|")
        print(f"| until it can be used | {1000 * (opened - started):.0f} ms |")
        print(f"| until all files are known | {read - started:.1f} s |")
        print(f"| memory | {memory / MIB:.0f} MiB, {memory / arguments.files:.0f} bytes a file |")
        print(f"| hit, p50 | {1e6 * statistics.median(times):.0f} µs |")
        print(f"| hit, p99 | {1e6 * times[int(len(times) * 0.99)]:.0f} µs |")
        print(f"| eviction | {1e6 * took / evictions:.0f} µs a file |")
        print("\nremoving the files", flush=True)


if __name__ == "__main__":
    main()
