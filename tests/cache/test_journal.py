"""The journal stays short, and tells the next start what the cache has, whatever happens while it is rewritten."""

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ZODB.utils import p64

from tests.cache.test_damage import RECORD, TID, content, find, put, until
from zodb_s3blobs.cache import files, recorder
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.cache.journal import Journal
from zodb_s3blobs.metrics import Metrics

TIMEOUT = 30


@pytest.fixture
def start(tmp_path):
    """Starts a cache, in the same directory each time, and waits until it knows its files."""
    started = []

    def start(limit=10 << 20):
        started.append(Cache(tmp_path / "cache", limit, Metrics()))
        assert started[-1].wait_until_read(TIMEOUT)
        return started[-1]

    yield start
    for cache in started:
        cache.close()


@pytest.fixture
def often(monkeypatch):
    """Lets every use be written at once, and the journal be rewritten as soon as half of it is useless."""
    monkeypatch.setattr(recorder, "_BATCH", 1)
    monkeypatch.setattr(recorder, "_SLACK", 0)
    monkeypatch.setattr(recorder, "_STEP", 7)


def records(cache):
    return os.path.getsize(cache.directory / "index") // RECORD


def test_the_journal_has_at_most_twice_as_many_records_as_there_are_files(start, often):
    cache = start()
    for number in range(20):
        put(cache, number)
    for _ in range(30):
        for number in (3, 5, 7):
            find(cache, number)
        until(lambda: records(cache) <= 40)
    cache.close()
    assert records(cache) <= 40
    cache = start()
    assert [find(cache, number) for number in range(20)] == [content(number) for number in range(20)]


def test_many_uses_of_few_files_are_few_records(start):
    cache = start()
    for number in range(3):
        put(cache, number)
    for _ in range(10_000):
        cache.get(p64(1), TID).release()
    cache.close()
    assert records(cache) < 1100


def test_files_that_come_and_go_are_written_down_many_at_once(start, monkeypatch):
    monkeypatch.setattr(files, "_LOOK_EVERY", TIMEOUT)
    appended, append = [], Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, records: appended.append(0) or append(self, records))
    cache = start(limit=50 * 4096)
    for number in range(1000):
        put(cache, number)
    until(lambda: len(cache) <= 50)
    cache.close()
    assert records(cache) > 1000
    assert len(appended) <= 1 + 1950 // recorder._BATCH


def test_the_next_start_rewrites_a_journal_that_is_too_long(start, often, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_SLACK", 1000)
        cache = start()
        for number in range(100):
            put(cache, number)
            if number > 4:
                cache.remove(p64(number), TID)
        cache.close()
        assert records(cache) > 50
    cache = start()
    find(cache, 1)
    until(lambda: records(cache) <= 10)
    assert [find(cache, number) for number in range(5)] == [content(number) for number in range(5)]
    cache.close()
    assert len(start()) == 5


def test_the_order_is_the_same_after_the_journal_was_rewritten(start, often):
    block = os.statvfs("/tmp").f_frsize
    cache = start(limit=6 * block)
    for number in (1, 2, 3, 4, 5, 6):
        put(cache, number)
    for number in (1, 5, 3) * 20 + (2, 6, 4, 1, 5):
        find(cache, number)
    cache.close()
    cache = start(limit=6 * block)
    for number, oldest in zip(range(100, 106), (3, 2, 6, 4, 1, 5), strict=True):
        assert os.path.exists(cache.path(p64(oldest), TID))
        put(cache, number)
        assert not os.path.exists(cache.path(p64(oldest), TID))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_journal_that_cannot_be_rewritten_goes_on(start, often, monkeypatch, call):
    cache = start()
    for number in range(5):
        put(cache, number)
    replace, failed = getattr(os, call), threading.Event()

    def fail(path, *arguments):
        if call == "replace" and not str(path).endswith("index.new"):
            return replace(path, *arguments)
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, call, fail)
        while not failed.is_set():
            for number in range(5):
                find(cache, number)
        put(cache, 5)
        cache.close()
    assert not Path(cache.directory, "index.new").exists()
    cache = start()
    assert [find(cache, number) for number in range(6)] == [content(number) for number in range(6)]


def test_whatever_many_threads_do_while_the_journal_is_rewritten_the_next_start_knows(start, often, monkeypatch):
    rewritten = []
    forget = Journal.forget_former
    monkeypatch.setattr(Journal, "forget_former", lambda journal: (rewritten.append(1), forget(journal)))
    cache = start()

    def work(seed):
        chance = random.Random(seed)
        deadline = time.monotonic() + TIMEOUT
        while len(rewritten) < 6 and time.monotonic() < deadline:
            number = chance.randrange(24)
            action = chance.choice(("publish", "get", "get", "get", "remove"))
            if action == "publish":
                put(cache, number)
            elif action == "get":
                pin = cache.get(p64(number), TID)
                if pin is not None:
                    pin.release()
            else:
                cache.remove(p64(number), TID)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()
    there = {number for number in range(24) if cache.get(p64(number), TID) is not None}
    cache.close()
    assert len(rewritten) > 5
    cache = start()
    assert len(cache) == len(there)
    for number in range(24):
        assert find(cache, number) == (content(number) if number in there else None)


def test_what_a_killed_rewrite_left_is_no_harm(start):
    cache = start()
    put(cache, 1)
    cache.close()
    (cache.directory / "index.new").write_bytes(b"half")
    assert find(start(), 1) == content(1)
