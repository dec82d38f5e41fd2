"""What ``zodb-s3blobs warm`` leaves in the folder ``warm``: the cache takes it over, and evicts nothing for it."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from ZODB.utils import p64

from tests.cache.test_damage import find, put, until
from zodb_s3blobs.cache import files
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.cache.warmed import WarmFolder
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.revision import Revision

TID = p64(2)
SIZE = 1000
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(files, "_LOOK_EVERY", 0.05)


@pytest.fixture
def open_cache(tmp_path, one_byte_blocks):
    opened = []

    def open_cache(limit=100 * SIZE):
        for cache in opened:
            cache.close()
        opened.append(Cache(tmp_path / "cache", limit, Metrics()))
        return opened[-1]

    yield open_cache
    for cache in opened:
        cache.close()


def content(number):
    return b"%4d " % number * (SIZE // 5)


def warm(directory, number, tid=TID, data=None):
    """Leave the file of a blob in the folder, as the command does."""
    folder = WarmFolder(directory)
    os.makedirs(directory, exist_ok=True)
    folder.make()
    file = folder.new_file()
    file.write_at(content(number) if data is None else data, 0)
    file.publish(Revision(p64(number), tid), hashlib.sha256(content(number)).hexdigest())


def left(directory):
    return sorted(os.listdir(Path(directory) / "warm"))


def test_what_is_there_at_the_start_and_what_comes_later_is_taken_over(tmp_path, open_cache):
    warm(tmp_path / "cache", 1)
    cache = open_cache()
    until(lambda: len(cache) == 1)
    warm(tmp_path / "cache", 2)
    until(lambda: len(cache) == 2)
    assert left(cache.directory) == [] and cache.size == 2 * SIZE
    assert find(cache, 1) == content(1) and find(cache, 2) == content(2)


def test_it_is_compared_with_its_sha_256_before_its_first_use(tmp_path, open_cache):
    warm(tmp_path / "cache", 1)
    warm(tmp_path / "cache", 2, data=b"damaged")
    cache = open_cache()
    until(lambda: len(cache) == 2)
    assert cache.get(p64(1), TID) is None and cache.unproven_size(p64(1), TID) == SIZE
    assert find(cache, 1) == content(1)
    assert cache.get(p64(1), TID) is not None
    assert find(cache, 2) is None and len(cache) == 1


def test_the_next_start_knows_it(tmp_path, open_cache):
    cache = open_cache()
    for number in range(5):
        warm(tmp_path / "cache", number)
    until(lambda: len(cache) == 5)
    cache = open_cache()
    assert cache.wait_until_read(10)
    assert [find(cache, number) for number in range(5)] == [content(number) for number in range(5)]


def open_cache_with_two(open_cache, tmp_path, warmed):
    """A cache for five files that has two, and finds those that were ``warmed`` all at the same time."""
    cache = open_cache(limit=5 * SIZE)
    for number in range(2):
        put(cache, number)
    cache.close()
    for number in warmed:
        warm(tmp_path / "cache", number, tid=p64(number))
    return open_cache(limit=5 * SIZE)


def test_nothing_is_evicted_for_it_and_the_newest_come_first(tmp_path, open_cache):
    cache = open_cache_with_two(open_cache, tmp_path, range(10, 20))
    until(lambda: left(cache.directory) == [])
    assert all(os.path.exists(cache.path(p64(number), TID)) for number in range(2))
    assert [number for number in range(10, 20) if os.path.exists(cache.path(p64(number), p64(number)))] == [17, 18, 19]


def test_it_is_evicted_first_and_of_it_the_oldest(tmp_path, open_cache):
    cache = open_cache_with_two(open_cache, tmp_path, range(10, 13))
    until(lambda: len(cache) == 5)
    there = []
    for number in range(20, 23):
        put(cache, number)
        there.append([n for n in range(10, 13) if os.path.exists(cache.path(p64(n), p64(n)))])
    assert there == [[11, 12], [12], []]
    assert all(os.path.exists(cache.path(p64(number), TID)) for number in range(2))


def test_what_the_cache_has_already_is_deleted(tmp_path, open_cache):
    cache = open_cache()
    put(cache, 1)
    warm(tmp_path / "cache", 1, data=b"other bytes")
    until(lambda: left(cache.directory) == [])
    assert len(cache) == 1 and find(cache, 1) is not None


def test_foreign_files_stay_with_one_warning_and_leftovers_go_after_a_day(tmp_path, open_cache, caplog):
    folder = WarmFolder(tmp_path / "cache")
    os.makedirs(folder.path)
    for name in "letter", "0.0.blob", "new.old", "new.fresh":
        (folder.path / name).write_text(name)
    (folder.path / f"{1:016x}.{2:016x}.{3:064x}.blob").symlink_to("letter")
    os.utime(folder.path / "new.old", (time.time() - DAY - 60,) * 2)
    cache = open_cache()
    until(lambda: "new.old" not in left(cache.directory))
    for number in range(3):  # looks
        warm(tmp_path / "cache", number)
        until(lambda number=number: len(cache) == number + 1)
    assert left(cache.directory) == sorted(["letter", "0.0.blob", "new.fresh", f"{1:016x}.{2:016x}.{3:064x}.blob"])
    assert len([record for record in caplog.records if "Ignoring" in record.getMessage()]) == 3


def test_many_of_them_keep_their_order(open_cache, monkeypatch, tmp_path):
    monkeypatch.setattr("zodb_s3blobs.cache.index._CAPACITY", 3)
    for number in range(10, 20):
        warm(tmp_path / "cache", number, tid=p64(number))
    cache = open_cache(limit=10 * SIZE)
    until(lambda: len(cache) == 10)
    gone = []
    for number in range(10):
        put(cache, number)
        gone.append(next(n for n in range(10, 20) if n not in gone and not os.path.exists(cache.path(p64(n), p64(n)))))
    assert gone == list(range(10, 20))
    assert len(cache) == 10 and cache.size == 10 * SIZE
