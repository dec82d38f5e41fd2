"""The LRU file cache: accounting, order, limit, pins, leases, publication, its directory, start-up, and full disks."""

import contextlib
import errno
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import ZODB.utils
from ZODB.utils import p64, u64

from tests.support.waiting import wait_for
from zodb_s3blobs.cache import files as cache_module
from zodb_s3blobs.cache import store as store_module
from zodb_s3blobs.cache.directory import CacheDirectoryError, CacheError
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.cache.journal import Journal
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.revision import Revision

pytestmark = pytest.mark.usefixtures("one_byte_blocks")

TIMEOUT = 30

until = partial(wait_for, timeout=TIMEOUT)
TID = p64(0x1234)


@pytest.fixture
def start_cache(tmp_path):
    """Starts a cache, in the same directory each time, and waits until it knows its files."""
    started = []

    def start_cache(limit=1000, wait=True):
        started.append(Cache(tmp_path / "cache", limit, Metrics()))
        if wait:
            assert started[-1].wait_until_read(TIMEOUT)
        return started[-1]

    yield start_cache
    for cache in started:
        cache.close()


@pytest.fixture
def cache(start_cache):
    return start_cache()


def put(cache, number, size=100):
    """Publish a blob of ``size`` bytes whose oid is ``number``; returns it pinned."""
    file = cache.new_file()
    file.write_at(content(number, size), 0)
    return file.publish(p64(number), TID)


def fill(cache, *numbers, size=100):
    for number in numbers:
        put(cache, number, size).release()


def find(cache, number):
    """The blob, pinned; None if the cache does not have it."""
    return cache.get(p64(number), TID) or cache.prove(p64(number), TID)


def use(cache, *numbers):
    for number in numbers:
        find(cache, number).release()


def content(number, size=100):
    return bytes([number % 256]) * size


def path(cache, number):
    return Path(cache.path(p64(number), TID))


def files(directory):
    """Every file below ``directory``, and its bytes."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # deleted in the background meanwhile
                found[str(file.relative_to(directory))] = file.read_bytes()
    return found


def sizes_on_disk(cache):
    """The bytes that each file takes on the disk, by its oid as a number."""
    found = files(cache.directory / "blobs")
    return {int(Path(name).name.split(".")[0], 16): len(data) or 1 for name, data in found.items() if ".blob" in name}


def on_disk(cache):
    """The oids of the files on the disk, as numbers."""
    return set(sizes_on_disk(cache))


def check_accounting(cache):
    """``size`` and ``len`` are exactly what is on the disk."""
    sizes = sizes_on_disk(cache)
    assert (cache.size, len(cache)) == (sum(sizes.values()), len(sizes))


def evicted_in_order(cache):
    """The oids that were cached, in the order in which a new one takes their place."""
    before, order = on_disk(cache), []
    for number in range(1000, 1000 + len(before)):
        fill(cache, number)
        gone = before - on_disk(cache) - set(order)
        assert len(gone) == 1
        order.extend(gone)
    return order


# Files


def test_what_was_published_is_found(cache):
    oid = p64(7)
    file = cache.new_file()
    file.write_at(b"seven", 0)
    with file.publish(oid, TID) as published:
        assert Path(published).read_bytes() == b"seven"
    with cache.get(oid, TID) as found:
        assert found == published == cache.path(oid, TID)
        assert Path(found).read_bytes() == b"seven"


def test_other_objects_and_other_revisions_are_not_found(cache):
    fill(cache, 7)
    assert cache.get(p64(8), TID) is None
    assert cache.get(p64(7), p64(u64(TID) + 1)) is None


def test_a_file_is_where_the_documentation_says(cache):
    oid, tid = p64(0x0102A1), p64(0xB2)
    expected = cache.directory / "blobs" / "a1" / "00000000000102a1.00000000000000b2.blob"
    assert cache.path(oid, tid) == str(expected)
    cache.new_file().publish(oid, tid).release()
    assert expected.exists()


def test_the_parts_of_a_file_are_written_in_any_order_by_any_thread(cache):
    file = cache.new_file()
    with ThreadPoolExecutor(8) as threads:
        for write in [threads.submit(file.write_at, content(n, 10), 10 * n) for n in reversed(range(50))]:
            write.result()
    with file.publish(p64(1), TID) as published:
        assert Path(published).read_bytes() == b"".join(content(n, 10) for n in range(50))


def test_a_write_that_the_system_cuts_short_is_continued(cache, monkeypatch):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:3], position))
    file = cache.new_file()
    file.write_at(b"56789", 5)
    file.write_at(b"01234", 0)
    assert Path(file.path).read_bytes() == b"0123456789"
    with open(cache.temporary / "upload", "wb") as upload:
        cache.write(upload.fileno(), b"01234")
        cache.write(upload.fileno(), b"56789")
    assert (cache.temporary / "upload").read_bytes() == b"0123456789"


def test_a_file_can_be_begun_again(cache):
    file = cache.new_file()
    file.write_at(b"too much", 0)
    file.clear()
    file.write_at(b"new", 0)
    with file.publish(p64(1), TID) as published:
        assert Path(published).read_bytes() == b"new"


def test_a_discarded_file_leaves_nothing(cache):
    file = cache.new_file()
    file.write_at(b"data", 0)
    file.discard()
    file.discard()
    assert not Path(file.path).exists()
    assert (cache.size, len(cache), on_disk(cache)) == (0, 0, set())


def test_discarding_what_was_published_does_nothing(cache):
    file = cache.new_file()
    file.publish(p64(1), TID).release()
    file.discard()
    assert on_disk(cache) == {1}


def test_adopt_renames_the_file(cache, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"data")
    inode = source.stat().st_ino
    with cache.adopt(str(source)).publish(p64(1), TID) as published:
        assert not source.exists()
        assert (Path(published).stat().st_ino, Path(published).read_bytes()) == (inode, b"data")


def test_adopt_copies_the_file_from_another_file_system(cache, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"data")
    monkeypatch.setattr(os, "rename", failing(errno.EXDEV))
    with cache.adopt(str(source)).publish(p64(1), TID) as published:
        assert not source.exists()
        assert Path(published).read_bytes() == b"data"


def test_adopt_of_a_file_that_is_not_there_leaves_nothing(cache, tmp_path):
    with pytest.raises(CacheError):
        cache.adopt(str(tmp_path / "source"))
    assert files(cache.directory / "incoming") == {}


def temporary(cache, name="upload", data=b"data"):
    """A complete file in the cache's directory for temporary files."""
    path = cache.temporary / name
    path.write_bytes(data)
    return str(path)


def test_a_file_is_taken_over_where_it_lies(cache):
    source = temporary(cache)
    file = cache.take(source)
    assert file.path == source and os.path.exists(source)
    with file.publish(p64(1), TID) as published:
        assert Path(published).read_bytes() == b"data"
    assert files(cache.temporary) == files(cache.directory / "incoming") == {}


def test_a_file_that_was_taken_over_can_be_discarded(cache):
    cache.take(temporary(cache)).discard()
    assert files(cache.temporary) == {}


@pytest.mark.parametrize("folder", ["elsewhere", "cache/tmp/folder", "cache/blobs", "cache"])
def test_a_file_elsewhere_is_not_taken_over(cache, tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    source = tmp_path / folder / "upload"
    source.write_bytes(b"data")
    with pytest.raises(ValueError, match=r"upload is not in .*tmp"):
        cache.take(str(source))
    assert source.read_bytes() == b"data"


# Publication


@pytest.mark.parametrize("directory_mode", [0o700, 0o750, 0o755])
@pytest.mark.parametrize("source_mode", [0o600, 0o644, 0o666, 0o444])
def test_a_file_is_read_only_and_readable_for_those_who_may_read_the_directory(
    start_cache, tmp_path, directory_mode, source_mode
):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(directory_mode)
    source = tmp_path / "source"
    source.write_bytes(b"data")
    source.chmod(source_mode)
    umask = os.umask(0o022)
    try:
        with start_cache().adopt(str(source)).publish(p64(1), TID) as published:
            assert stat.S_IMODE(os.stat(os.path.dirname(published)).st_mode) == directory_mode
            assert stat.S_IMODE(os.stat(published).st_mode) == directory_mode & 0o444
    finally:
        os.umask(umask)


def test_a_new_directory_is_private(cache):
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


def test_a_reader_sees_whole_files_only_while_they_are_published_again_and_again(cache):
    fill(cache, 1)
    done = threading.Event()

    def read():
        sizes = set()
        while not done.is_set():
            data = path(cache, 1).read_bytes()
            assert data == content(1, len(data))
            sizes.add(len(data))
        return sizes

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        try:
            for size in [100, 200] * 100:
                fill(cache, 1, size=size)
        finally:
            done.set()
        assert reading.result() <= {100, 200}


def test_an_open_file_can_be_read_to_its_end_though_it_was_replaced_and_evicted(start_cache):
    cache = start_cache(limit=100)
    fill(cache, 1)
    with path(cache, 1).open("rb") as file:
        fill(cache, 1, size=50)
        fill(cache, 2)
        assert on_disk(cache) == {2}
        assert file.read() == content(1)


# Accounting


def test_size_and_len_follow_publishing_replacing_removing_and_evicting(start_cache):
    cache = start_cache(limit=300)
    assert (cache.size, len(cache)) == (0, 0)
    fill(cache, 1, size=100)
    assert (cache.size, len(cache)) == (100, 1)
    fill(cache, 2, size=0)
    assert (cache.size, len(cache)) == (101, 2)
    fill(cache, 1, size=30)
    assert (cache.size, len(cache)) == (31, 2)
    fill(cache, 1, size=120)
    assert (cache.size, len(cache)) == (121, 2)
    fill(cache, 3, size=150)
    assert (cache.size, len(cache)) == (271, 3)
    cache.remove(p64(1), TID)
    assert (cache.size, len(cache)) == (151, 2)
    cache.remove(p64(1), TID)
    assert (cache.size, len(cache)) == (151, 2)
    fill(cache, 4, size=200)
    assert (cache.size, len(cache)) == (200, 1)
    check_accounting(cache)


@pytest.mark.parametrize("size", [0, 50, 150, 1000, 1001])
def test_size_follows_replacing_what_is_pinned(cache, size):
    with put(cache, 1, 100):
        fill(cache, 1, size=size)
        assert (cache.size, len(cache)) == (size or 1, 1)
        check_accounting(cache)
    check_accounting(cache)


def test_size_follows_removing_what_is_pinned(cache):
    with put(cache, 1):
        cache.remove(p64(1), TID)
        assert (cache.size, len(cache), on_disk(cache)) == (0, 0, set())
    assert (cache.size, len(cache)) == (0, 0)


def test_what_was_removed_is_not_found(cache):
    fill(cache, 1, 2)
    cache.remove(p64(1), TID)
    assert cache.get(p64(1), TID) is None
    assert on_disk(cache) == {2}


def test_removing_what_is_not_there_does_nothing(cache):
    fill(cache, 1)
    cache.remove(p64(2), TID)
    assert on_disk(cache) == {1}
    check_accounting(cache)


def test_a_file_deleted_behind_the_caches_back_is_a_miss_and_size_follows(cache):
    fill(cache, 1, 2)
    path(cache, 1).unlink()
    assert cache.get(p64(1), TID) is None
    assert (cache.size, len(cache)) == (100, 1)
    fill(cache, 1)
    check_accounting(cache)


def test_a_pinned_file_deleted_behind_the_caches_back_is_a_miss_and_size_follows(cache):
    with put(cache, 1):
        path(cache, 1).unlink()
        assert cache.get(p64(1), TID) is None
        assert (cache.size, len(cache)) == (0, 0)
    assert (cache.size, len(cache)) == (0, 0)


def test_evicting_what_was_deleted_behind_the_caches_back_is_no_error(start_cache):
    cache = start_cache(limit=200)
    fill(cache, 1, 2)
    path(cache, 1).unlink()
    fill(cache, 3)
    assert on_disk(cache) == {2, 3}
    check_accounting(cache)


# Order and limit


def test_the_least_recently_used_goes_first(start_cache):
    cache = start_cache(limit=500)
    fill(cache, 1, 2, 3, 4, 5)
    use(cache, 3, 1, 3, 5)
    assert evicted_in_order(cache) == [2, 4, 1, 3, 5]


def test_publishing_again_is_a_use(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1, 2, 3)
    fill(cache, 1)
    assert evicted_in_order(cache) == [2, 3, 1]


def test_the_order_of_use_survives_a_restart(start_cache):
    cache = start_cache(limit=500)
    fill(cache, 1, 2, 3, 4, 5)
    use(cache, 3, 1, 5, 2, 4)
    cache.close()
    assert evicted_in_order(start_cache(limit=500)) == [3, 1, 5, 2, 4]


def test_what_was_used_since_the_restart_is_newer_than_all_before(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1, 2, 3)
    use(cache, 1, 2, 3)
    cache.close()
    cache = start_cache(limit=300)
    use(cache, 1)
    assert evicted_in_order(cache) == [2, 3, 1]


def test_a_full_cache_holds_exactly_its_limit(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1, 2, 3)
    assert cache.size == 300
    fill(cache, 4, size=1)
    assert on_disk(cache) == {2, 3, 4}
    check_accounting(cache)


def test_as_many_files_go_as_a_new_one_needs_and_no_more(start_cache):
    cache = start_cache(limit=500)
    fill(cache, 1, 2, 3, 4, 5)
    with put(cache, 6, size=201):
        assert on_disk(cache) == {4, 5, 6}
        check_accounting(cache)
    assert on_disk(cache) == {4, 5, 6}


def test_after_a_restart_everything_is_still_there_and_counted(start_cache):
    cache = start_cache()
    fill(cache, 1, 2, 300)
    cache.close()
    cache = start_cache()
    assert (cache.size, len(cache)) == (300, 3)
    with find(cache, 300) as found:
        assert Path(found).read_bytes() == content(300)


def test_a_smaller_limit_is_honoured_at_the_next_start(start_cache):
    cache = start_cache(limit=500)
    fill(cache, 1, 2, 3, 4, 5)
    use(cache, 2, 4, 1, 3, 5)
    cache.close()
    cache = start_cache(limit=250)
    assert on_disk(cache) == {3, 5}
    check_accounting(cache)


def test_what_was_pinned_at_the_end_does_not_exceed_the_limit_after_the_next_start(start_cache):
    cache = start_cache(limit=200)
    for number in (1, 2, 3, 4):
        put(cache, number)
    use(cache, 3, 1, 2, 4)
    cache.close()
    cache = start_cache(limit=200)
    assert on_disk(cache) == {2, 4}
    check_accounting(cache)


def test_files_larger_than_a_smaller_limit_go_at_the_next_start_and_push_nothing_out(start_cache):
    cache = start_cache(limit=1000)
    fill(cache, 1, size=50)
    fill(cache, 2, 3, size=300)
    cache.close()
    cache = start_cache(limit=100)
    assert len(cache) == 1
    until(lambda: on_disk(cache) == {1})
    check_accounting(cache)


def test_the_order_of_publication_survives_a_restart_however_old_the_files_are(start_cache, tmp_path):
    cache = start_cache(limit=300)
    source = tmp_path / "source"
    source.write_bytes(content(1))
    os.utime(source, (1, 1))
    fill(cache, 3, 2)
    cache.adopt(str(source)).publish(p64(1), TID).release()
    cache.close()
    assert evicted_in_order(start_cache(limit=300)) == [3, 2, 1]


# Pins


def test_a_pinned_file_is_not_evicted_while_it_is_pinned(start_cache):
    cache = start_cache(limit=200)
    pin = put(cache, 1)
    fill(cache, 2, 3, 4)
    assert on_disk(cache) == {1, 4}
    pin.release()
    fill(cache, 5, 6)
    assert on_disk(cache) == {5, 6}
    check_accounting(cache)


def test_pins_may_exceed_the_limit_which_is_restored_when_they_end(start_cache):
    cache = start_cache(limit=200)
    pins = [put(cache, number) for number in (1, 2, 3, 4)]
    assert cache.size == 400
    check_accounting(cache)
    for pin in pins:
        pin.release()
    assert on_disk(cache) == {3, 4}
    check_accounting(cache)


def test_a_file_is_pinned_until_its_last_pin_is_released(start_cache):
    cache = start_cache(limit=100)
    first = put(cache, 1)
    second = cache.get(p64(1), TID)
    third = first.again()
    assert first.path == second.path == third.path
    for pin in (first, second):
        pin.release()
        fill(cache, 2)
        assert on_disk(cache) == {1}
    third.release()
    fill(cache, 2)
    assert on_disk(cache) == {2}


def test_releasing_a_pin_twice_does_not_release_another(start_cache):
    cache = start_cache(limit=100)
    first, second = put(cache, 1), cache.get(p64(1), TID)
    first.release()
    first.release()
    fill(cache, 2)
    assert on_disk(cache) == {1}
    second.release()
    fill(cache, 2)
    assert on_disk(cache) == {2}


def test_a_pin_of_a_removed_file_does_not_release_the_file_that_was_published_after_it(start_cache):
    cache = start_cache(limit=100)
    old = put(cache, 1)
    cache.remove(p64(1), TID)
    new = put(cache, 1)
    old.release()
    fill(cache, 2)
    assert on_disk(cache) == {1}
    new.release()
    check_accounting(cache)


def test_a_pin_is_released_when_its_block_ends_however_it_ends(start_cache):
    cache = start_cache(limit=100)
    with pytest.raises(ZeroDivisionError), put(cache, 1):
        raise ZeroDivisionError
    fill(cache, 2)
    assert on_disk(cache) == {2}


# Blobs larger than the whole cache


def test_a_blob_larger_than_the_cache_is_readable_while_pinned_then_gone_and_pushes_nothing_out(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1, 2, 3)
    with put(cache, 4, size=301) as large:
        assert Path(large).read_bytes() == content(4, 301)
        with cache.get(p64(4), TID) as again:
            assert again == large
        assert Path(large).exists()
        check_accounting(cache)
    assert on_disk(cache) == {1, 2, 3}
    check_accounting(cache)


def test_the_limit_holds_for_the_others_while_a_larger_blob_is_pinned(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1, 2, 3)
    with put(cache, 4, size=1000):
        fill(cache, 5)
        assert on_disk(cache) == {2, 3, 4, 5}
        check_accounting(cache)
    assert on_disk(cache) == {2, 3, 5}


def test_a_blob_as_large_as_the_cache_stays(start_cache):
    cache = start_cache(limit=300)
    fill(cache, 1)
    fill(cache, 2, size=300)
    assert on_disk(cache) == {2}
    check_accounting(cache)


# Leases


def test_a_leased_file_stays_for_its_time_and_the_limit_is_restored_by_itself(start_cache, monkeypatch):
    monkeypatch.setattr(store_module, "GRACE", 0.3)
    cache = start_cache(limit=100)
    begin = time.monotonic()
    leased = [put(cache, number).release_later() for number in (1, 2, 3)]
    assert [Path(file).read_bytes() for file in leased] == [content(number) for number in (1, 2, 3)]
    until(lambda: cache.size <= 100)
    assert time.monotonic() - begin >= 0.3
    assert on_disk(cache) == {3}
    check_accounting(cache)


def test_leases_end_by_themselves_again_after_earlier_ones_have_ended(start_cache, monkeypatch):
    monkeypatch.setattr(store_module, "GRACE", 0.05)
    cache = start_cache(limit=100)
    for number in (1, 2, 3):
        put(cache, number).release_later()
        put(cache, number + 10).release_later()
        until(lambda: cache.size <= 100)


def test_leases_that_begin_when_no_thread_can_be_started_end_with_the_next_one(start_cache, monkeypatch, no_threads):
    monkeypatch.setattr(store_module, "GRACE", 0.05)
    cache = start_cache(limit=100)
    with no_threads():
        for number in (1, 2):
            put(cache, number).release_later()
    put(cache, 3).release_later()
    until(lambda: cache.size <= 100)
    check_accounting(cache)


def test_a_lease_is_counted_from_the_last_request(start_cache, monkeypatch):
    cache = start_cache(limit=100)
    monkeypatch.setattr(store_module, "GRACE", 0.3)
    put(cache, 1).release_later()
    put(cache, 2).release_later()
    monkeypatch.setattr(store_module, "GRACE", 2 * TIMEOUT)
    cache.get(p64(1), TID).release_later()
    until(lambda: cache.size <= 100)
    fill(cache, 3)
    assert on_disk(cache) == {1}
    check_accounting(cache)


def test_a_leased_blob_larger_than_the_cache_goes_by_itself(start_cache, monkeypatch):
    monkeypatch.setattr(store_module, "GRACE", 0.3)
    cache = start_cache(limit=100)
    fill(cache, 1)
    assert Path(put(cache, 2, size=101).release_later()).read_bytes() == content(2, 101)
    until(lambda: not path(cache, 2).exists())
    assert on_disk(cache) == {1}
    check_accounting(cache)


def test_a_leased_file_stays_though_the_pin_it_was_leased_with_is_released(start_cache):
    cache = start_cache(limit=100)
    pin = put(cache, 1)
    leased = pin.release_later()
    pin.release()
    fill(cache, 2)
    assert Path(leased).exists()


# The directory


def test_a_directory_that_another_process_uses_is_refused(cache):
    script = """
import sys
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.cache.directory import CacheDirectoryError
from zodb_s3blobs.metrics import Metrics

try:
    Cache(sys.argv[1], 1000, Metrics())
except CacheDirectoryError as error:
    print(error)
"""
    waiting = cache.new_file()
    done = subprocess.run(
        [sys.executable, "-c", script, cache.directory], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.stderr == ""
    assert str(cache.directory) in done.stdout
    assert "in use by another process" in done.stdout
    assert Path(waiting.path).exists()


def test_a_directory_that_this_process_uses_already_is_refused(cache):
    fill(cache, 1)
    waiting = cache.new_file()
    with pytest.raises(CacheDirectoryError, match="in use"):
        Cache(cache.directory, 1000, Metrics())
    waiting.publish(p64(2), TID).release()
    assert on_disk(cache) == {1, 2}


def test_a_directory_may_be_used_again_after_a_process_was_killed(start_cache, tmp_path):
    script = """
import os, signal, sys
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.metrics import Metrics

cache = Cache(sys.argv[1], 1000, Metrics())
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "cache"], timeout=TIMEOUT)
    assert done.returncode < 0
    fill(start_cache(), 1)


def test_a_directory_with_foreign_files_is_refused_and_left_as_it_is(tmp_path):
    foreign = {"thesis.txt": b"precious", "tmp/draft": b"dear", "incoming/letter": b"new", "blobs/01/photo": b"old"}
    for name, data in foreign.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheDirectoryError, match=r"is not empty and is not a blob cache .* name an empty or new"):
        Cache(tmp_path, 1000, Metrics())
    assert files(tmp_path) == foreign


def test_a_directory_whose_start_failed_may_be_used_again(start_cache, tmp_path):
    cache = start_cache()
    fill(cache, 1)
    cache.close()
    cache.temporary.rmdir()
    cache.temporary.symlink_to(tmp_path)
    with pytest.raises(CacheDirectoryError, match=f"{cache.directory} cannot be used: .*delete the directory"):
        start_cache()
    assert tmp_path.exists()
    cache.temporary.unlink()
    assert len(start_cache()) == 1


def test_an_empty_directory_and_the_root_of_a_file_system_are_accepted(start_cache, tmp_path):
    (tmp_path / "cache" / "lost+found").mkdir(parents=True)
    fill(start_cache(), 1)
    assert (tmp_path / "cache" / "lost+found").exists()


def test_what_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    for directory in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(CacheDirectoryError, match=rf"(?i){directory} .*not a directory"):
            Cache(directory, 1000, Metrics())
    assert files(tmp_path) == {"file": b"precious"}


def test_leftovers_of_a_crash_are_swept_at_the_start_and_blobs_are_not(start_cache):
    cache = start_cache()
    fill(cache, 1, 2)
    cache.new_file().write_at(b"half", 0)
    (cache.temporary / "folder").mkdir()
    (cache.temporary / "folder" / "upload").write_bytes(b"half")
    cache.close()
    cache = start_cache()
    assert list(cache.temporary.iterdir()) == []
    assert list((cache.directory / "incoming").iterdir()) == []
    assert on_disk(cache) == {1, 2}
    check_accounting(cache)


def test_unknown_files_among_the_blobs_are_left_alone(start_cache):
    cache = start_cache(limit=200)
    fill(cache, 1, 2)
    cache.close()
    blobs = cache.directory / "blobs"
    strangers = {
        "README": b"precious",
        "01/notes.txt": b"dear",
        "01/01.02.blob": b"too short",
        "01/one.two.blob": b"no number",
        f"{path(cache, 1).relative_to(blobs)}.bak": b"longer",
        "zz/deeper/file": b"far away",
        f"02/{path(cache, 1).name}": b"in another's folder",
        "0a/000000000000000A.0000000000001234.blob": b"upper case",
        f"05/{path(cache, 5).name}/file": b"a folder",
    }
    for name, data in strangers.items():
        (blobs / name).parent.mkdir(parents=True, exist_ok=True)
        (blobs / name).write_bytes(data)
    cache = start_cache(limit=200)
    assert (cache.size, len(cache)) == (200, 2)
    fill(cache, 3, 4)
    assert (cache.size, len(cache)) == (200, 2)
    for number in (3, 4):
        cache.remove(p64(number), TID)
    assert files(blobs) == strangers


def test_a_file_that_somebody_else_put_among_the_blobs_is_not_served(cache):
    path(cache, 1).parent.mkdir(exist_ok=True)
    path(cache, 1).write_bytes(b"from somewhere")
    assert find(cache, 1) is None
    fill(cache, 1)
    assert path(cache, 1).read_bytes() == content(1)


def test_files_are_still_found_after_close(start_cache):
    cache = start_cache()
    fill(cache, 1)
    pin = put(cache, 2)
    cache.close()
    with cache.get(p64(1), TID) as found:
        assert Path(found).read_bytes() == content(1)
    pin.release()
    assert cache.get(p64(3), TID) is None
    assert on_disk(cache) == {1, 2}


def test_what_is_released_after_close_evicts_nothing(start_cache):
    cache = start_cache(limit=100)
    pins = [put(cache, number, size) for number, size in ((1, 100), (2, 100), (3, 1000))]
    cache.close()
    for pin in pins:
        pin.release()
    assert on_disk(cache) == {1, 2, 3}


def test_nothing_is_published_after_close(start_cache):
    cache = start_cache()
    file = cache.new_file()
    cache.close()
    with pytest.raises(CacheError, match="has been closed"):
        file.publish(p64(1), TID)
    assert on_disk(cache) == set()


def test_a_folder_that_cannot_be_read_does_not_keep_the_limit_from_being_honoured(start_cache, monkeypatch):
    cache = start_cache(limit=200)
    fill(cache, 1, 2)
    cache.close()
    (cache.directory / "blobs" / "private").mkdir()
    scandir = os.scandir

    def refuse(directory):
        if str(directory).endswith("/private"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
        return scandir(directory)

    monkeypatch.setattr(os, "scandir", refuse)
    cache = start_cache(limit=200, wait=False)
    assert cache.wait_until_read(5)
    fill(cache, 3)
    assert cache.size == 200


# While the index is still being read


@pytest.fixture
def reopen_slowly(start_cache, monkeypatch):
    """Opens a cache that has read its index but cannot go on to use it; ``go()`` lets it, and waits for it."""
    seen, may_go_on = threading.Event(), threading.Event()
    read = Journal.read

    def slowly(self):
        yield from read(self)
        seen.set()
        may_go_on.wait(TIMEOUT)

    def reopen(cache):
        cache.close()
        monkeypatch.setattr(Journal, "read", slowly)
        cache = start_cache(cache.limit, wait=False)
        assert seen.wait(TIMEOUT)

        def go():
            may_go_on.set()
            assert cache.wait_until_read(TIMEOUT)

        return cache, go

    yield reopen
    may_go_on.set()


def test_what_is_new_is_served_while_the_index_is_being_read_and_a_worker_waits_for_the_rest(
    start_cache, reopen_slowly
):
    cache = start_cache()
    fill(cache, 1, 2)
    cache, go = reopen_slowly(cache)
    assert not cache.wait_until_read(0)
    assert cache.get(p64(1), TID) is None
    with put(cache, 3) as published:
        assert Path(published).read_bytes() == content(3)
    with cache.get(p64(3), TID) as found:
        assert found == published
    assert not cache.wait_until_read(0)
    with ThreadPoolExecutor(1) as threads:
        proven = threads.submit(cache.prove, p64(1), TID)
        go()
        with proven.result(TIMEOUT) as found:
            assert Path(found).read_bytes() == content(1)
    check_accounting(cache)


def test_what_happens_while_the_index_is_being_read_is_accounted_exactly(start_cache, reopen_slowly):
    cache = start_cache()
    fill(cache, 1, 2, 3, 4, 5, 6, 7)
    cache, go = reopen_slowly(cache)
    fill(cache, 1, 8, size=10)  # published again, and new
    pin = put(cache, 3, size=20)
    cache.remove(p64(4), TID)
    cache.remove(p64(5), TID)
    fill(cache, 5, size=20)
    path(cache, 6).unlink()
    go()
    assert find(cache, 6) is None
    assert on_disk(cache) == {1, 2, 3, 5, 7, 8}
    check_accounting(cache)
    pin.release()
    check_accounting(cache)


def test_what_was_removed_while_the_index_was_being_read_stays_removed(start_cache, reopen_slowly):
    cache = start_cache()
    fill(cache, 1, 2)
    cache, go = reopen_slowly(cache)
    cache.remove(p64(1), TID)
    cache.remove(p64(2), TID)
    go()
    assert find(cache, 1) is find(cache, 2) is None
    assert (cache.size, len(cache), on_disk(cache)) == (0, 0, set())
    cache.close()
    assert len(start_cache()) == 0


def test_once_the_index_is_read_the_limit_holds_and_what_was_used_meanwhile_is_newest(start_cache, reopen_slowly):
    cache = start_cache(limit=400)
    fill(cache, 1, 2, 3, 4)
    use(cache, 1, 3, 2, 4)
    cache, go = reopen_slowly(cache)
    fill(cache, 3, 5, 6)
    go()
    assert on_disk(cache) == {4, 3, 5, 6}
    check_accounting(cache)
    assert evicted_in_order(cache) == [4, 3, 5, 6]


def test_what_is_pinned_is_not_evicted_when_the_index_has_been_read(start_cache, reopen_slowly):
    cache = start_cache(limit=200)
    fill(cache, 1, 2)
    cache, go = reopen_slowly(cache)
    with put(cache, 1), put(cache, 3), put(cache, 4):
        go()
        assert on_disk(cache) == {1, 3, 4}
        check_accounting(cache)
    until(lambda: on_disk(cache) == {1, 3})
    check_accounting(cache)


def test_a_cache_that_is_closed_while_its_index_is_being_read_evicts_nothing(start_cache, reopen_slowly, caplog):
    cache = start_cache(limit=200)
    for number in (1, 2, 3):
        put(cache, number)
    put(cache, 4, size=500)
    cache, go = reopen_slowly(cache)
    cache.close()
    go()
    assert on_disk(cache) == {1, 2, 3, 4}
    assert not [record for record in caplog.records if record.levelname != "INFO"]


# Publication in the background


@pytest.fixture
def go_on(monkeypatch):
    """Lets the background publish more than one file when it is set."""
    go_on = threading.Event()
    clock = SimpleNamespace(sleep=lambda _: go_on.wait(TIMEOUT), time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(cache_module, "time", clock)
    yield go_on
    go_on.set()


def committed(cache, *numbers, size=100):
    """Complete files for `publish_later`."""
    return {
        Revision(p64(number), TID): cache.take(temporary(cache, f"upload{number}", content(number, size)))
        for number in numbers
    }


def leftovers(cache):
    return {**files(cache.temporary), **files(cache.directory / "incoming")}


def test_what_is_published_later_ends_in_the_cache(cache):
    cache.publish_later(committed(cache, 1, 2, 3))
    until(lambda: len(cache) == 3)
    assert on_disk(cache) == {1, 2, 3}
    assert path(cache, 2).read_bytes() == content(2)
    assert leftovers(cache) == {}
    check_accounting(cache)


def test_what_is_published_later_is_found_at_once(cache, go_on):
    cache.publish_later(committed(cache, *range(8)))
    until(lambda: len(cache) == 1)
    assert on_disk(cache) == {0}, "the rest waits for the background"
    check_accounting(cache)
    with cache.get(p64(5), TID) as found:
        assert found == str(path(cache, 5))
        assert Path(found).read_bytes() == content(5)
    assert on_disk(cache) == {0, 5}
    check_accounting(cache)
    go_on.set()
    until(lambda: len(cache) == 8)
    assert leftovers(cache) == {}
    check_accounting(cache)


def test_nothing_is_published_that_nobody_published(cache):
    cache.publish_later({})
    cache.publish_later(committed(cache, 1))
    until(lambda: len(cache) == 1)
    assert cache.get(p64(2), TID) is None


def test_several_transactions_publish_later(cache, go_on):
    for number in range(0, 9, 3):
        cache.publish_later(committed(cache, number, number + 1, number + 2))
    go_on.set()
    until(lambda: len(cache) == 9)
    cache.publish_later(committed(cache, 10))
    until(lambda: len(cache) == 10)
    check_accounting(cache)


def test_what_is_published_later_is_evicted_in_the_order_of_publication(start_cache):
    cache = start_cache(limit=300)
    cache.publish_later(committed(cache, 1, 2, 3, 4, 5))
    until(lambda: leftovers(cache) == {} and len(cache) == 3)
    assert evicted_in_order(cache) == [3, 4, 5]


def test_what_is_read_before_its_publication_is_used_at_that_time(start_cache, go_on):
    cache = start_cache(limit=400)
    cache.publish_later(committed(cache, 1, 2, 3, 4))
    until(lambda: len(cache) == 1)
    use(cache, 4)
    go_on.set()
    until(lambda: len(cache) == 4)
    assert evicted_in_order(cache) == [1, 4, 2, 3]


def test_a_blob_larger_than_the_cache_can_be_read_until_it_is_published(start_cache, go_on):
    cache = start_cache(limit=100)
    cache.publish_later(committed(cache, 1) | committed(cache, 2, size=1000))
    until(lambda: len(cache) == 1)
    with cache.get(p64(2), TID) as found:
        assert Path(found).read_bytes() == content(2, 1000)
    assert on_disk(cache) == {1}
    go_on.set()
    assert leftovers(cache) == {}
    check_accounting(cache)


def test_what_is_removed_before_its_publication_is_not_published(cache, go_on):
    cache.publish_later(committed(cache, 1, 2, 3))
    until(lambda: len(cache) == 1)
    cache.remove(p64(2), TID)
    assert cache.get(p64(2), TID) is None
    go_on.set()
    until(lambda: len(cache) == 2)
    assert on_disk(cache) == {1, 3}
    assert leftovers(cache) == {}


def test_publishing_the_same_files_twice_is_harmless(cache, go_on, caplog):
    files = committed(cache, 1, 2, 3)
    cache.publish_later(files)
    cache.publish_later(files)
    until(lambda: len(cache) == 1)
    files[Revision(p64(3), TID)].publish(p64(3), TID).release()
    go_on.set()
    until(lambda: len(cache) == 3)
    cache.publish_later(files)
    cache.publish_later(committed(cache, 4))
    until(lambda: len(cache) == 4)
    assert on_disk(cache) == {1, 2, 3, 4}
    assert caplog.messages == []
    check_accounting(cache)


def test_of_two_files_of_a_blob_one_is_published_and_the_other_discarded(cache, go_on):
    cache.publish_later(committed(cache, 1, 2))
    until(lambda: len(cache) == 1)
    second = cache.new_file()
    second.write_at(content(2), 0)
    cache.publish_later({Revision(p64(2), TID): second})
    go_on.set()
    until(lambda: len(cache) == 2)
    assert path(cache, 2).read_bytes() == content(2)
    assert leftovers(cache) == {}


def test_a_publication_that_fails_is_logged_once_and_its_files_are_discarded(cache, go_on, monkeypatch, caplog):
    cache.publish_later(committed(cache, *range(6)))
    until(lambda: len(cache) == 1)
    with monkeypatch.context() as broken:
        break_moving(broken, errno.EROFS, lambda: True)
        assert cache.get(p64(5), TID) is None
        go_on.set()
        until(lambda: leftovers(cache) == {})
    assert on_disk(cache) == {0}
    (message,) = [record.message for record in caplog.records if record.name == cache_module.__name__]
    assert message.startswith("A committed blob could not be put into the cache, and is read from the bucket: Cannot")
    assert "mount it for writing" in message
    cache.publish_later(committed(cache, 7))
    until(lambda: len(cache) == 2)
    check_accounting(cache)


def test_when_no_thread_can_be_started_files_are_published_when_they_are_read(cache, no_threads, caplog):
    with no_threads():
        cache.publish_later(committed(cache, 1, 2))
        use(cache, 1)
    assert "can't start new thread" in caplog.text
    assert on_disk(cache) == {1}
    cache.publish_later(committed(cache, 3))
    until(lambda: len(cache) == 3)


def test_close_publishes_nothing_more_and_leaves_nothing(cache, go_on):
    cache.publish_later(committed(cache, *range(100)))
    until(lambda: len(cache) == 1)
    threading.Timer(0.1, go_on.set).start()
    cache.close()
    assert on_disk(cache) == {0}
    assert leftovers(cache) == {}
    assert cache.get(p64(50), TID) is None


def test_what_is_handed_over_after_close_is_discarded(cache):
    files = committed(cache, 1, 2)
    cache.close()
    cache.publish_later(files)
    assert on_disk(cache) == set()
    assert leftovers(cache) == {}


@pytest.mark.timeout(TIMEOUT)
def test_close_does_not_wait_for_ever_and_the_next_start_sweeps_what_it_leaves(start_cache, go_on, monkeypatch):
    monkeypatch.setattr(cache_module, "_CLOSE_TIMEOUT", 0.1)
    cache = start_cache()
    cache.publish_later(committed(cache, 1, 2, 3))
    until(lambda: len(cache) == 1)
    cache.close()
    assert len(leftovers(cache)) == 2
    again = start_cache()
    assert leftovers(again) == {}
    go_on.set()
    until(lambda: on_disk(again) == set())  # it was not written down that the cache has it
    check_accounting(again)


# Large files


@pytest.fixture
def deleting(monkeypatch):
    """Lets the deletion of large files end when it is set."""
    go_on = threading.Event()
    unlink = os.unlink

    def slow_unlink(path, *args, **kwargs):
        if os.path.exists(path) and os.stat(path).st_size >= LARGE:
            assert go_on.wait(TIMEOUT)
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", slow_unlink)
    yield go_on
    go_on.set()


LARGE = 64 << 20


def put_large(cache, number):
    file = cache.new_file()
    os.truncate(file.path, LARGE)
    return file.publish(p64(number), TID)


@pytest.mark.timeout(TIMEOUT)
def test_nobody_waits_for_the_deletion_of_a_large_file_that_is_evicted(start_cache, deleting):
    cache = start_cache(limit=LARGE + 100)
    put_large(cache, 1).release()
    fill(cache, 2, 3)
    assert on_disk(cache) == {2, 3}
    assert cache.get(p64(1), TID) is None
    check_accounting(cache)
    put_large(cache, 1).release()
    cache.remove(p64(1), TID)
    assert cache.get(p64(1), TID) is None
    put_large(cache, 1).release()
    deleting.set()
    until(lambda: leftovers(cache) == {})
    with cache.get(p64(1), TID) as found:
        assert os.path.getsize(found) == LARGE
    check_accounting(cache)


@pytest.mark.timeout(TIMEOUT)
def test_nobody_waits_for_the_deletion_of_a_large_file_that_is_discarded(cache, deleting):
    file = cache.new_file()
    os.truncate(file.path, LARGE)
    file.discard()
    file.discard()
    deleting.set()
    until(lambda: leftovers(cache) == {})


@pytest.mark.timeout(TIMEOUT)
def test_a_large_file_is_read_to_its_end_though_it_is_deleted_meanwhile(start_cache):
    cache = start_cache(limit=LARGE)
    pin = put_large(cache, 1)
    with open(pin.path, "rb") as file:
        pin.release()
        fill(cache, 2)
        until(lambda: leftovers(cache) == {})
        assert sum(len(data) for data in iter(lambda: file.read(1 << 20), b"")) == LARGE


def test_a_large_file_that_cannot_be_put_aside_is_deleted_at_once(start_cache, monkeypatch):
    cache = start_cache(limit=LARGE)
    put_large(cache, 1).release()
    monkeypatch.setattr(os, "rename", failing(errno.ENOSPC))
    fill(cache, 2)
    assert on_disk(cache) == {2}
    assert leftovers(cache) == {}
    check_accounting(cache)


def test_on_a_full_disk_a_large_file_makes_room_at_once(start_cache, monkeypatch):
    cache = start_cache(limit=2 * LARGE)
    put_large(cache, 1).release()
    fill(cache, 2)
    file = cache.new_file()
    break_writing(
        monkeypatch, errno.ENOSPC, lambda: any(len(data) >= LARGE for data in files(cache.directory).values())
    )
    file.write_at(content(3), 0)
    assert on_disk(cache) == {2}


def test_close_waits_for_the_deletion_of_large_files(start_cache, deleting):
    cache = start_cache(limit=LARGE)
    put_large(cache, 1).release()
    fill(cache, 2)
    threading.Timer(0.1, deleting.set).start()
    cache.close()
    assert leftovers(cache) == {}


def test_a_large_file_is_discarded_after_close_too(cache):
    file = cache.new_file()
    os.truncate(file.path, LARGE)
    cache.close()
    file.discard()
    assert leftovers(cache) == {}


# Full disks


def failing(code, condition=lambda: True, call=None):
    """A function that fails with the error ``code`` while ``condition()``, and else does what ``call`` does."""

    def fail(*args, **kwargs):
        if condition():
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return fail


def break_moving(monkeypatch, code, condition):
    monkeypatch.setattr(os, "replace", failing(code, condition, os.replace))


def break_writing(monkeypatch, code, condition):
    monkeypatch.setattr(os, "write", failing(code, condition, os.write))
    monkeypatch.setattr(os, "pwrite", failing(code, condition, os.pwrite))


def break_creating(monkeypatch, code, condition):
    open_, fail = os.open, failing(code, condition, os.open)

    def create(path, flags, *args, **kwargs):
        return (fail if flags & os.O_CREAT else open_)(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", create)


def break_copying(monkeypatch, code, condition):
    monkeypatch.setattr(os, "rename", failing(errno.EXDEV))
    monkeypatch.setattr(ZODB.utils, "cp", failing(code, condition, ZODB.utils.cp))


BREAK = pytest.mark.parametrize("break_", [break_moving, break_writing, break_creating, break_copying])


def put_adopted(cache, number):
    """Publish a blob with everything that can be asked of the disk for it."""
    file = cache.new_file()
    file.write_at(content(number), 0)
    return cache.adopt(file.path).publish(p64(number), TID)


@BREAK
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_least_recently_used_make_room(cache, monkeypatch, break_, code):
    fill(cache, 1, 2, 3, 4)
    use(cache, 2, 3, 1, 4)
    break_(monkeypatch, code, lambda: path(cache, 3).exists())
    with put_adopted(cache, 5) as published:
        assert Path(published).read_bytes() == content(5)
    assert on_disk(cache) == {1, 4, 5}
    assert files(cache.directory / "incoming") == {}
    check_accounting(cache)


@BREAK
def test_on_a_disk_that_stays_full_the_error_names_the_directory_and_the_remedy(cache, monkeypatch, break_):
    fill(cache, 1, 2)
    pin = put(cache, 3)
    full = True
    break_(monkeypatch, errno.ENOSPC, lambda: full)
    with pytest.raises(CacheError, match=r"cache-dir .*; free space on its disk or lower cache-size") as error:
        put_adopted(cache, 4)
    assert str(cache.directory) in str(error.value)
    assert Path(pin.path).read_bytes() == content(3)
    assert on_disk(cache) == {3}
    check_accounting(cache)
    full = False
    pin.release()
    put_adopted(cache, 4).release()
    assert on_disk(cache) == {3, 4}
    check_accounting(cache)


def test_what_could_not_be_published_on_a_full_disk_can_be_published_later(cache, monkeypatch):
    file = cache.new_file()
    file.write_at(content(1), 0)
    full = True
    break_moving(monkeypatch, errno.ENOSPC, lambda: full)
    with pytest.raises(CacheError):
        file.publish(p64(1), TID)
    full = False
    with file.publish(p64(1), TID) as published:
        assert Path(published).read_bytes() == content(1)
    check_accounting(cache)


def test_a_write_to_a_temporary_file_makes_room_too(cache, monkeypatch):
    fill(cache, 1, 2)
    break_writing(monkeypatch, errno.ENOSPC, path(cache, 1).exists)
    with open(cache.temporary / "upload", "wb") as file:
        cache.write(file.fileno(), content(3))
    assert (cache.temporary / "upload").read_bytes() == content(3)
    assert on_disk(cache) == {2}
    check_accounting(cache)


def test_a_write_on_a_full_disk_evicts_what_it_needs_and_no_more(cache, monkeypatch):
    fill(cache, 1, 2, 3, 4)
    file = cache.new_file()
    break_writing(monkeypatch, errno.ENOSPC, path(cache, 1).exists)
    file.write_at(content(5, 201), 0)
    assert Path(file.path).read_bytes() == content(5, 201)
    assert on_disk(cache) == {4}
    check_accounting(cache)


@BREAK
def test_what_eviction_cannot_cure_evicts_nothing_and_says_so(cache, monkeypatch, break_):
    fill(cache, 1, 2)
    break_(monkeypatch, errno.EACCES, lambda: True)
    with pytest.raises(CacheError, match=r"cache-dir .*; check its permissions"):
        put_adopted(cache, 3)
    assert on_disk(cache) == {1, 2}
    check_accounting(cache)


# Many files, many threads


def test_a_hit_a_miss_and_an_eviction_cost_the_same_however_many_files_there_are(start_cache, monkeypatch):
    calls = Counter()

    def count(name):
        call = getattr(os, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)

    def costs(files):
        cache = start_cache(limit=100 * files)
        first, last, new, unknown = (number << 8 for number in (1, files, files + 1, files + 2))  # all in one folder
        fill(cache, *range(first, new, 1 << 8))
        found = []
        for work in (
            lambda: use(cache, last),
            lambda: cache.get(p64(unknown), TID),
            lambda: fill(cache, new),
            lambda: cache.remove(p64(new), TID),
        ):
            calls.clear()
            work()
            found.append(dict(calls))
        assert not path(cache, first).exists() and path(cache, last).exists()
        cache.close()
        return found

    for name in ("scandir", "listdir", "stat", "lstat", "utime", "mkdir", "replace", "rename", "unlink", "rmdir"):
        count(name)
    few, many = costs(3), costs(500)
    assert few == many
    assert all("unlink" in work for work in many[2:])
    assert not any(name in work for work in many for name in ("scandir", "listdir"))


def test_many_threads_leave_the_accounting_exact(start_cache):
    cache = start_cache(limit=300)

    def work(seed):
        chance = random.Random(seed)
        pins = []
        for _ in range(300):
            number = chance.randrange(16)
            action = chance.choice(("publish", "publish later", "get", "get", "get", "remove"))
            if action == "publish later":
                file = cache.new_file()
                file.write_at(content(number, chance.choice((0, 10, 40, 100, 400))), 0)
                cache.publish_later({Revision(p64(number), TID): file})
            elif action == "publish":
                pins.append(put(cache, number, chance.choice((0, 10, 40, 100, 400))))
            elif action == "get":
                pin = cache.get(p64(number), TID)
                if pin is not None:
                    pins.append(pin)
                    try:
                        data = Path(pin.path).read_bytes()
                    except FileNotFoundError:
                        pass  # removed by another thread
                    else:
                        assert data == content(number, len(data))
            else:
                cache.remove(p64(number), TID)
            while len(pins) > chance.randrange(4):
                pins.pop(chance.randrange(len(pins))).release()
        for pin in pins:
            pin.release()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(8)]:
            done.result()
    until(lambda: leftovers(cache) == {})
    until(lambda: cache.size <= 300)  # the last pin in the background is released
    check_accounting(cache)
    assert files(cache.directory / "incoming") == {}


# What many files cost


def test_many_evictions_at_once_do_not_hold_up_whoever_causes_them(start_cache, monkeypatch):
    go_on = threading.Event()
    clock = SimpleNamespace(sleep=lambda seconds: go_on.wait(TIMEOUT), time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(store_module, "time", clock)
    cache = start_cache(limit=2000)
    fill(cache, *range(2000), size=1)
    put(cache, 3000, size=2000)
    assert len(cache) > 1000, "one call evicted everything"
    go_on.set()
    until(lambda: len(cache) == 1)
    check_accounting(cache)
