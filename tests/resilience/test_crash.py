"""Nothing that was acknowledged is lost when processes are killed, and nothing else stays. The long mode: crash.py."""

import os
import subprocess
import sys

import pytest
from ZODB.blob import Blob

from tests.resilience.crash.crash import CLIENTS, Crash, schedule, wait_until
from tests.support.speed import slow

SEED, KILLS = 27, 12
KINDS = {"server", "s3", *(name.split()[0] for name in CLIENTS)}


def victims(seed, kills):
    return [victim for one in schedule(seed, kills) for victim, _ in one.victims]


@slow
def test_after_every_kill_all_that_was_acknowledged_is_there_and_nothing_else(tmp_path):
    print(f"python -m tests.resilience.crash.crash --kills {KILLS} --seed {SEED}")
    with Crash(tmp_path, SEED) as crash:
        crash.run(KILLS, print)
    print(crash.figures)
    assert sum(number for name, number in crash.figures.items() if name.startswith("killed:")) == KILLS
    for figure in *(f"killed: {kind}" for kind in KINDS), "committed: store", "read", "packed", "blobs compared":
        assert crash.figures[figure] > 0, figure


def test_who_is_killed_and_when_follows_from_the_seed():
    assert schedule(1, 500) == schedule(1, 500) != schedule(2, 500)
    assert len(victims(1, 500)) == 500
    assert set(victims(1, 500)) == {"server", "s3", *CLIENTS}


# It stands still at the first bytes of a blob.
STUCK = """
import os, signal, sys, ZEO, ZEO.ClientStorage
ZEO.ClientStorage.ClientStorage.receiveBlobChunk = lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP)
with ZEO.DB(("127.0.0.1", int(sys.argv[1])), blob_dir=sys.argv[2]).transaction() as connection:
    connection.root()["blob"].open().read()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell which files are open")
def test_the_file_of_a_blob_is_closed_when_the_client_that_it_was_sent_to_is_killed(start, tmp_path):
    server = start()
    with server.db().transaction() as connection:
        connection.root()["blob"] = Blob(os.urandom(20_000_000))  # more than the buffers of the connection hold
    others = server.open_files()
    client = subprocess.Popen([sys.executable, "-c", STUCK, str(server.address[1]), str(tmp_path / "stuck")])
    try:
        wait_until(lambda: server.open_files() == others, "the blob is not being sent")
    finally:
        client.kill()
        client.wait()
    wait_until(lambda: server.open_files() != others, "the file stays open")
