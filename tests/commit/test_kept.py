"""Uploads that are kept for the retry after a conflict: what is found, by which bytes, and for how long."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from zodb_s3blobs.commit import kept as kept_module
from zodb_s3blobs.commit.kept import Kept
from zodb_s3blobs.s3.download import PART

TIMEOUT = 30
BEGINNING = bytes(PART)


@pytest.fixture
def kept():
    kept = Kept()
    yield kept
    kept.close()


@pytest.fixture
def keep(kept, monkeypatch):
    """Keeps an upload of each of ``files``, by key, for so many ``seconds``; returns an event: they are deleted."""

    def keep(files, seconds=3600.0):
        monkeypatch.setattr(kept_module, "KEPT_FOR", seconds)
        deleted = threading.Event()
        uploads = [
            SimpleNamespace(file=SimpleNamespace(path=path), digest=digest(path), key=key)
            for key, path in files.items()
        ]
        kept.keep(uploads, deleted.set)
        return deleted

    return keep


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_kept_upload_is_found_by_its_bytes(kept, keep, new_file):
    one, two = new_file(b"one"), new_file(b"two")
    deleted = keep({"key of one": one, "key of two": two})
    assert kept.find(new_file(b"one")) == (digest(one), "key of one")
    assert kept.find(new_file(b"two")) == (digest(two), "key of two")
    assert not deleted.is_set()


def test_other_bytes_find_nothing_and_their_digest_is_known(kept, keep, new_file):
    keep({"key": new_file(b"kept")})
    other = new_file(b"other")
    assert kept.find(other) == (digest(other), None)


def test_while_nothing_is_kept_no_file_is_read(kept, tmp_path):
    missing = str(tmp_path / "missing")
    assert kept.find(missing) == ("", None)
    assert not kept.has_beginning(missing)


def test_a_file_of_which_the_first_part_has_arrived_has_the_beginning_of_a_kept_one(kept, keep, new_file):
    keep({"key": new_file(BEGINNING + b"end")})
    assert kept.has_beginning(new_file(BEGINNING))
    assert kept.has_beginning(new_file(BEGINNING + b"another end"))
    assert not kept.has_beginning(new_file(BEGINNING[:-1] + b"x"))
    assert not kept.has_beginning(new_file(BEGINNING[:-1]))


def test_nothing_is_found_once_time_is_up(kept, keep, new_file):
    file = new_file(BEGINNING + b"end")
    assert keep({"key": file}, seconds=0.05).wait(TIMEOUT)
    assert kept.find(file) == ("", None)
    assert not kept.has_beginning(file)


def test_nothing_is_found_any_more_when_it_is_deleted(kept, monkeypatch, new_file):
    monkeypatch.setattr(kept_module, "KEPT_FOR", 0.05)
    file = new_file(b"data")
    found, deleted = [], threading.Event()

    def clean_up():
        found.append(kept.find(file))
        deleted.set()

    kept.keep([SimpleNamespace(file=SimpleNamespace(path=file), digest=digest(file), key="key")], clean_up)
    assert deleted.wait(TIMEOUT)
    assert found == [("", None)]


def test_each_is_kept_for_its_own_time(kept, keep, new_file):
    one, two, three = (new_file(data) for data in (b"one", b"two", b"three"))
    deleted = [keep({"1": one}, seconds=0.05), keep({"2": two}, seconds=0.1), keep({"3": three})]
    assert deleted[0].wait(TIMEOUT)
    assert deleted[1].wait(TIMEOUT)
    assert [kept.find(file)[1] for file in (one, two, three)] == [None, None, "3"]
    assert not deleted[2].is_set()


def test_after_a_pause_another_is_kept_for_its_time(kept, keep, new_file):
    for number in range(3):
        file = new_file(b"data")
        assert keep({f"{number}": file}, seconds=0.02).wait(TIMEOUT)
        assert kept.find(file) == ("", None)


def test_of_two_with_the_same_bytes_the_later_is_found_until_its_own_time_is_up(kept, keep, new_file):
    file = new_file(BEGINNING + b"end")
    earlier = keep({"earlier": file}, seconds=0.2)
    later = keep({"later": file})
    assert kept.find(file)[1] == "later"
    assert earlier.wait(TIMEOUT)
    assert kept.find(file)[1] == "later"
    assert kept.has_beginning(file)
    assert not later.is_set()


def test_the_beginning_of_two_is_found_until_the_time_of_the_later_is_up(kept, keep, new_file):
    one, two = new_file(BEGINNING + b"one"), new_file(BEGINNING + b"two")
    earlier = keep({"one": one}, seconds=0.2)
    keep({"two": two})
    assert earlier.wait(TIMEOUT)
    assert kept.has_beginning(one)
    assert [kept.find(one)[1], kept.find(two)[1]] == [None, "two"]


def test_a_key_that_is_deleted_is_not_found_though_a_later_transaction_has_kept_it_as_well(kept, keep, new_file):
    # Its blob was never copied from there: it met a conflict too, before it had a tid.
    file = new_file(b"data")
    earlier = keep({"key": file}, seconds=1.0)
    later = keep({"key": file})
    assert earlier.wait(TIMEOUT)
    assert kept.find(file)[1] is None
    assert not kept.has_beginning(file)
    assert not later.is_set()


def test_one_whose_deletion_fails_holds_up_no_other(kept, keep, monkeypatch, new_file):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(kept_module, "KEPT_FOR", 0.05)
    file = new_file(b"data")
    kept.keep([SimpleNamespace(file=SimpleNamespace(path=file), digest=digest(file), key="key")], lambda: 1 / 0)
    assert keep({"another": new_file(b"other data")}, seconds=0.05).wait(TIMEOUT)


def test_what_was_kept_when_no_thread_could_be_started_is_deleted_with_the_next(kept, keep, new_file, no_threads):
    with no_threads():
        deleted = keep({"one": new_file(b"one")}, seconds=0)
    assert not deleted.is_set()
    assert keep({"two": new_file(b"two")}, seconds=0).wait(TIMEOUT)
    assert deleted.wait(TIMEOUT)


def test_close_gives_all_of_them_up(kept, keep, new_file):
    one, two = new_file(BEGINNING + b"one"), new_file(BEGINNING + b"two")
    deleted = [keep({"one": one}), keep({"two": two})]
    kept.close()
    assert all(event.is_set() for event in deleted)
    assert kept.find(one) == ("", None)
    assert not kept.has_beginning(two)


def test_after_close_what_comes_is_given_up_at_once(kept, keep, new_file):
    keep({"one": new_file(b"one")})
    kept.close()
    file = new_file(b"two")
    assert keep({"two": file}).is_set()
    assert kept.find(file) == ("", None)
