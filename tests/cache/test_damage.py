"""A file of the cache that is not as it was written is never served: it is dropped, counted, and fetched again."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ZODB.utils import p64

from tests.support.counts import value
from tests.support.waiting import wait_for
from zodb_s3blobs.cache.directory import blob_files
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.metrics import Metrics

TIMEOUT = 30

until = partial(wait_for, timeout=TIMEOUT)
TID = p64(2)
RECORD = 64  # bytes of a record of the journal


def content(number):
    return b"%4d " % number * 200


def put(cache, number):
    file = cache.new_file()
    file.write_at(content(number), 0)
    file.publish(p64(number), TID).release()


def find(cache, number):
    """The bytes of the blob; None if the cache does not have it."""
    pin = cache.get(p64(number), TID) or cache.prove(p64(number), TID)
    if pin is None:
        return None
    with pin as path:
        return Path(path).read_bytes()


def path(cache, number):
    return Path(cache.path(p64(number), TID))


def on_disk(directory):
    """The oids of the files in the cache, as numbers."""
    return {int(file.name.split(".")[0], 16) for file in blob_files(directory)}


@pytest.fixture
def start(tmp_path):
    """Starts a cache, in the same directory each time, and waits until it knows its files; with metrics of its own."""
    started = []

    def start(limit=1 << 20):
        metrics = Metrics()
        started.append(Cache(tmp_path / "cache", limit, metrics))
        assert started[-1].wait_until_read(TIMEOUT)
        started[-1].damaged = lambda: value(metrics, "s3blobs_cache_damaged_total")
        return started[-1]

    yield start
    for cache in started:
        cache.close()


# Damage


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


def flip(path):
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(500)
        byte = file.read(1)[0]
        file.seek(500)
        file.write(bytes([byte ^ 4]))


def cut(path, size):
    path.chmod(0o600)
    os.truncate(path, size)


def make_directory(path):
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"precious")


def link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def append(path):
    path.chmod(0o600)
    with path.open("ab") as file:
        file.write(b"x")


def exchange(path):
    """Put the file of another blob, which is as long, in its place."""
    other = path.parent.parent / "02" / path.name.replace("01.", "02.", 1)
    os.replace(other, path)


DAMAGE = {
    "cut short": lambda path: cut(path, 999),
    "empty": lambda path: cut(path, 0),
    "all zeros": lambda path: replace(path, bytes(1000)),
    "longer": append,
    "a flipped bit": flip,
    "replaced": lambda path: replace(path, content(7)),
    "another blob's file": exchange,
    "unreadable": lambda path: path.chmod(0),
    "a directory": make_directory,
    "a link": link,
}


@pytest.fixture(params=DAMAGE)
def damage(request):
    return DAMAGE[request.param]


def check_dropped(cache, caplog):
    """Blob 1 is not served, counted and logged once, and can be put into the cache again; blob 3 is as it was."""
    before = cache.damaged()
    assert find(cache, 1) is None
    assert cache.damaged() == before + 1
    assert find(cache, 1) is None
    assert cache.damaged() == before + 1
    [message] = [record.message for record in caplog.records if record.message.startswith("Dropping ")]
    assert message.startswith(f"Dropping {cache.path(p64(1), TID)}: ") and "fetched again" in message
    assert len(cache) == 2
    put(cache, 1)
    assert find(cache, 1) == content(1)
    assert find(cache, 3) == content(3)
    assert cache.damaged() == before + 1


def test_what_is_damaged_while_the_server_is_down_is_not_served(start, damage, caplog):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    damage(path(cache, 1))
    check_dropped(start(), caplog)


def test_what_is_damaged_while_it_is_served_is_not_served_any_more(start, damage, caplog):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    assert find(cache, 1) == content(1)
    damage(path(cache, 1))
    check_dropped(cache, caplog)


def test_what_is_damaged_after_it_was_proven_is_not_served_any_more(start, damage, caplog):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    cache = start()
    assert find(cache, 1) == content(1)
    damage(path(cache, 1))
    check_dropped(cache, caplog)


def test_a_flipped_bit_is_found_though_the_times_of_the_file_are_as_before(start, caplog):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    before = path(cache, 1).stat()
    flip(path(cache, 1))
    os.utime(path(cache, 1), ns=(before.st_atime_ns, before.st_mtime_ns))
    check_dropped(start(), caplog)


def test_who_reads_a_file_that_is_dropped_reads_it_to_its_end(start):
    cache = start()
    put(cache, 1)
    with cache.get(p64(1), TID) as reading, open(reading, "rb") as file:
        path(cache, 1).unlink()
        path(cache, 1).write_bytes(content(1))
        assert cache.get(p64(1), TID) is None
        assert file.read() == content(1)
    assert len(cache) == 0


def test_a_file_that_is_missing_is_no_damage(start):
    cache = start()
    put(cache, 1)
    put(cache, 2)
    path(cache, 2).unlink()
    assert find(cache, 2) is None
    cache.close()
    path(cache, 1).unlink()
    cache = start()
    assert find(cache, 1) is None
    assert (cache.damaged(), len(cache), cache.size) == (0, 0, 0)


def test_a_copy_of_the_directory_is_as_good(start, tmp_path):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    (tmp_path / "cache").rename(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "cache", copy_function=shutil.copyfile)
    cache = start()
    for _ in range(2):
        assert [find(cache, number) for number in (1, 2, 3)] == [content(number) for number in (1, 2, 3)]
    assert cache.get(p64(1), TID) is not None, "it is proven"
    assert cache.damaged() == 0


def test_a_file_is_compared_once(start, monkeypatch):
    cache = start()
    put(cache, 1)
    cache.close()
    cache = start()
    assert cache.get(p64(1), TID) is None
    assert cache.unproven_size(p64(1), TID) == 1000
    assert find(cache, 1) == content(1)
    assert cache.unproven_size(p64(1), TID) is None
    with cache.get(p64(1), TID) as found:
        assert Path(found).read_bytes() == content(1)
    put(cache, 2)
    assert cache.unproven_size(p64(2), TID) is None, "this process has written it"


# The journal


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The directory of a cache of four blobs, of which one was published twice, and one was removed."""
    directory = tmp_path_factory.mktemp("template") / "cache"
    cache = Cache(directory, 1 << 20, Metrics())
    for number in (1, 2, 3, 4, 5, 2):
        put(cache, number)
    cache.remove(p64(4), TID)
    cache.close()
    assert (directory / "index").stat().st_size % RECORD == 0
    return directory


def nonsense(data):
    """Strategies for what can become of the bytes of a file."""
    place = st.integers(0, len(data))
    return st.one_of(
        place.map(lambda end: data[:end]),
        st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=9).map(lambda bits: flipped(data, bits)),
        st.tuples(place, st.binary(max_size=100)).map(lambda new: data[: new[0]] + new[1] + data[new[0] :]),
        st.tuples(place, place).map(lambda cut: data[: min(cut)] + bytes(max(cut) - min(cut)) + data[max(cut) :]),
        st.permutations([data[at : at + RECORD] for at in range(0, len(data), RECORD)]).map(b"".join),
        st.binary(max_size=300),
    )


def flipped(data, bits):
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_whatever_becomes_of_the_journal_no_wrong_byte_is_served_and_the_start_does_not_fail(template, tmp_path, draw):
    directory = tmp_path / "cache"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(template, directory)
    index = directory / "index"
    index.write_bytes(draw.draw(nonsense(index.read_bytes())))
    metrics = Metrics()
    cache = Cache(directory, 1 << 20, metrics)
    try:
        for number in range(1, 6):
            assert find(cache, number) in (None, content(number))
        assert value(metrics, "s3blobs_cache_damaged_total") == 0
        for number in range(1, 6):
            put(cache, number)
            assert find(cache, number) == content(number)
    finally:
        cache.close()
    cache = Cache(directory, 1 << 20, Metrics())
    try:
        assert [find(cache, number) for number in range(1, 6)] == [content(number) for number in range(1, 6)]
    finally:
        cache.close()


def test_what_the_journal_does_not_tell_of_is_deleted(start, caplog):
    caplog.set_level("INFO")
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    (cache.directory / "index").unlink()  # as of an earlier version
    cache = start()
    assert find(cache, 1) is None
    put(cache, 2)
    until(lambda: on_disk(cache.directory) == {2} and "Deleted" in caplog.text)
    assert find(cache, 2) == content(2)
    assert len(cache) == 1


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/etc/passwd"), os.mkfifo])
def test_what_is_no_file_in_place_of_the_journal_does_no_harm(start, make):
    cache = start()
    put(cache, 1)
    cache.close()
    (cache.directory / "index").unlink()
    make(cache.directory / "index")
    cache = start()
    put(cache, 2)
    cache.close()
    assert (cache.directory / "index").is_file()
    assert find(start(), 2) == content(2)


def fail(*arguments):
    raise OSError(30, "Read-only file system")


def test_a_directory_that_becomes_read_only_is_served_and_said_once(start, monkeypatch, caplog):
    cache = start()
    for number in (1, 2, 3):
        put(cache, number)
    cache.close()
    cache = start()
    with monkeypatch.context() as readonly:
        for call in "pwrite", "utime", "chmod", "unlink", "rename", "replace", "rmdir":
            readonly.setattr(os, call, fail)
        for _ in range(400):
            assert [find(cache, number) for number in (1, 2, 3)] == [content(number) for number in (1, 2, 3)]
            cache.get(p64(1), TID).release()
        cache.close()
    assert len([record for record in caplog.records if "Cannot write the index" in record.message]) == 1
    cache = start()
    assert [find(cache, number) for number in (1, 2, 3)] == [content(number) for number in (1, 2, 3)]
    assert cache.damaged() == 0


# Kills and power cuts

PUBLISH = """
import os, sys, time
from pathlib import Path
from tests.cache.test_damage import TID, content, find, put
from zodb_s3blobs.cache import files
from zodb_s3blobs.metrics import Metrics

files._LOOK_EVERY = 0.05
cache = files.Cache(sys.argv[1], 1 << 20, Metrics())
cache.wait_until_read()
index = Path(sys.argv[1], "index")
for number in range(1, 9):
    put(cache, number)
while index.stat().st_size < 64 * 8:
    time.sleep(0.01)
for number in (3, 1):
    find(cache, number)
put(cache, 9)  # with which the uses before it are written
while index.stat().st_size < 64 * 11:
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def killed(tmp_path):
    """The directory of a cache whose process was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISH, tmp_path / "cache"], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout.readline() == b"ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return tmp_path / "cache"


def test_after_a_kill_all_is_there_in_the_order_of_use(killed, start):
    block = os.statvfs(killed).f_frsize
    cache = start(limit=9 * block)
    assert (len(cache), cache.size) == (9, 9 * block)
    order = []
    for number in range(100, 109):
        before = on_disk(killed)
        put(cache, number)
        order.extend(before - on_disk(killed))
    assert order == [2, 4, 5, 6, 7, 8, 3, 1, 9]


@pytest.mark.parametrize("lost", [0, 30, 64, 64 * 4 + 10, 64 * 11])
def test_what_a_power_cut_leaves_of_files_that_nobody_synced_is_never_served(killed, start, lost):
    index = killed / "index"
    os.truncate(index, index.stat().st_size - lost)
    files = sorted((killed / "blobs").rglob("*.blob"))
    for file, size in zip(files[:6], (0, 1, 512, 999, 1000, 1000), strict=True):
        replace(file, bytes(size))
    cache = start()
    for number in range(1, 7):
        assert find(cache, number) is None
    for number in range(7, 10):
        assert find(cache, number) in (None, content(number))
    assert lost or (find(cache, 7), cache.damaged()) == (content(7), 6)


# Blocks


def test_a_file_counts_with_the_blocks_that_it_takes(start):
    cache = start()
    block = os.statvfs(cache.directory).f_frsize
    for size, blocks in (0, 1), (1, 1), (block, 1), (block + 1, 2):
        before = cache.size
        file = cache.new_file()
        file.write_at(bytes(size), 0)
        with file.publish(p64(size), TID) as published:
            assert cache.size - before == blocks * block >= os.stat(published).st_blocks * 512
        assert os.path.getsize(published) == size
    size = cache.size
    cache.close()
    assert start().size == size


def test_many_small_files_do_not_take_more_disk_than_the_limit(start):
    block = os.statvfs("/tmp").f_frsize
    cache = start(limit=10 * block)
    for number in range(30):
        put(cache, number)
    until(lambda: cache.size <= 10 * block)
    assert len(on_disk(cache.directory)) == len(cache) == 10
