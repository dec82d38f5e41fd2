"""How fast is a pack's garbage collection, and do clients notice? Run by hand; prints a Markdown table.

    python -m tests.benchmarks.pace [--keys N] [--rounds N] [--latency SECONDS]

A real runzeo, and an S3 service that costs next to no processor: it lists so many keys, half of them dead. First a
pack while nobody else asks for anything. Then packs while a client in a process of its own loads an object over and
over, often in some rows and now and then in others; between them the loads of as many seconds without a pack, in the
same run: their p99 is what the ratio compares to. The minutes and the seconds of the server's processor, which those
of serving the client are part of, are those that a million keys would take. Where other things run on the machine,
`chrt -r 5` in front keeps them out of the p99.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.common import HERE, S3, Meter, client, loads
from tests.benchmarks.garbage import _SECTION, dead_one, make_base
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.s3.keys import Keys

#: What the clients do, and how many seconds there are between two loads of each.
_CLIENTS = ("1 ms apart", 0.001), ("5 ms apart", 0.005), ("20 ms apart", 0.02)


@contextmanager
def canned_service(directory, keys, latency):
    """An `S3` whose bucket lists ``keys``."""
    file = directory / "keys"
    file.write_text("".join(f"{key}\n" for key in sorted(keys)))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "cannedservice.py"), str(file), str(latency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield S3(f"http://127.0.0.1:{int(process.stdout.readline())}", "test", "test-secret", "canned")
    process.stdin.close()
    process.wait()


def percentile(times, share):
    return sorted(times)[int(len(times) * share)] * 1000


def cpu_of(pid):
    """The seconds of processor that the process ``pid`` has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def row(name, keys, took, cpu, idle=None, busy=None):
    minutes = took / keys * 1e6 / 60
    cells = [name, f"{minutes:.1f}", f"{cpu / keys * 1e6:.0f}"]
    if idle:
        for share in 0.5, 0.99:
            cells += [f"{percentile(idle, share):.2f}", f"{percentile(busy, share):.2f}"]
        cells += [f"{percentile(busy, 0.99) / percentile(idle, 0.99):.2f}", f"{len(busy):,}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def run(keys, rounds, latency, retention):
    print("| loads | minutes | CPU s | p50 idle | pack | p99 idle (ms) | pack | ratio | loads |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        names = make_base(directory / "Data.fs", keys // 2)
        listed = [Keys().key(*name) for name in names] + [Keys().key(*dead_one(name)) for name in names]
        with canned_service(directory, listed, latency) as service:
            text = _SECTION.format(**vars(service), dir=directory, retention=retention)
            with ZEOServer(directory, service, storages=lambda settings: text) as server:
                storage = client(server.address[1], wait=True)

                def pack():
                    started, cpu = time.perf_counter(), cpu_of(server.pid)
                    storage.pack(1)  # nothing is that old, so the base has nothing to do
                    return time.perf_counter() - started, cpu_of(server.pid) - cpu

                pack()  # the first one makes connections, and with gc-retention all marks
                row("none", keys, *pack())
                oids = [oid for oid, _ in names[:: max(1, len(names) // 1000)]]
                for name, rest in _CLIENTS if rounds else ():
                    with Meter(loads, server.address[1], oids, rest=rest) as meter:
                        time.sleep(1)
                        meter.take()
                        idle, busy, costs = [], [], []
                        for _ in range(rounds):
                            time.sleep(statistics.mean(took for took, _ in costs) if costs else 5)
                            idle += meter.take()
                            costs.append(pack())
                            busy += meter.take()
                        time.sleep(5)
                        idle += meter.take()
                        row(name, keys, *(statistics.mean(cost) for cost in zip(*costs, strict=True)), idle, busy)
                storage.close()
                server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=50_000, help="in the bucket")
    parser.add_argument("--rounds", type=int, default=2, help="packs for each client; 0: only the quiet one")
    parser.add_argument("--latency", type=float, default=0.02, help="of each answer of the service, in seconds")
    parser.add_argument("--retention", default="0", help="gc-retention; 0 deletes, anything else marks")
    arguments = parser.parse_args()
    run(arguments.keys, arguments.rounds, arguments.latency, arguments.retention)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main()
