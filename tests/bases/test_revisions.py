"""What a base tells of all revisions of an object at once; it is what it tells of each of them."""

import base64
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from zc.zlibstorage import ZlibStorage
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import p64, u64, z64

from zodb_s3blobs.bases import adapter_for
from zodb_s3blobs.bases.adapter import is_live, revisions_of


@pytest.fixture(params=["FileStorage", "MappingStorage"])
def base(request, tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs")) if request.param == "FileStorage" else MappingStorage()
    yield base
    base.close()


def earlier(tid):
    return p64(u64(tid) - 1)


def later(tid):
    return p64(u64(tid) + 1)


class Counting(FileStorage):
    """Counts how many revisions are looked at."""

    headers = 0

    def _read_data_header(self, *args, **kwargs):
        self.headers += 1
        return super()._read_data_header(*args, **kwargs)


@pytest.fixture
def walked(monkeypatch):
    """The positions in Data.fs that were read outside of FileStorage itself."""
    walked = []

    def pread(fd, size, position):
        walked.append(position)
        return os_pread(fd, size, position)

    os_pread = os.pread
    monkeypatch.setattr(os, "pread", pread)
    return walked


def test_a_collection_reads_each_revision_of_an_object_no_more_than_a_few_times(
    s3, bucket_name, put, collector, tmp_path, walked
):
    base = Counting(str(tmp_path / "Data.fs"))
    live, dead = change(base, p64(1), 300), []
    kept = put(*((p64(1), tid) for tid in live))
    dead = put(*((p64(1), earlier(tid)) for tid in live))
    base.headers = 0
    with adapter_for(base).revisions() as revisions:
        assert collector().collect(revisions) == len(dead)
    assert s3.keys(bucket_name) == sorted(kept)
    assert len(walked) == 3 * len(live)  # to judge them, to look for revisions without a blob, and to delete them
    assert base.headers < 10
    base.close()


def change(base, oid, times, data=b"a record"):
    """Commits as many revisions of an object; returns their tids, the newest last."""
    tids = []
    for number in range(times):
        transaction = TransactionMetaData()
        base.tpc_begin(transaction)
        base.store(oid, tids[-1] if tids else z64, b"%s %d" % (data, number), "", transaction)
        base.tpc_vote(transaction)
        tids.append(base.tpc_finish(transaction))
    return tids


@pytest.fixture
def can_load(tmp_path):
    """Asks a base for all ``tids`` of an object at once, and makes sure that it is true of each."""

    def can_load(base, oid, tids, without=frozenset()):
        with adapter_for(base).revisions() as revisions:
            answer = revisions.loadable(oid, tids)
            assert answer == {tid for tid in tids if is_live(base, oid, tid)}
            assert {tid for tid in tids if revisions.loadable(oid, [tid])} == answer
            assert revisions.tids(oid) >= answer - without
        return answer

    return can_load


def test_what_is_loadable_at_once_is_loadable_one_by_one(base, can_load):
    tids = change(base, p64(1), 5)
    assert can_load(base, p64(1), [*tids, *map(earlier, tids), later(tids[-1])]) == set(tids)
    assert can_load(base, p64(1), tids[:1] + tids[3:]) == {tids[0], *tids[3:]}
    assert can_load(base, p64(1), list(map(earlier, tids))) == set()
    assert can_load(base, p64(2), tids) == set()
    with adapter_for(base).revisions() as revisions:
        assert [revisions.has_object(p64(oid)) for oid in (1, 2)] == [True, False]


def undo(base, tid):
    transaction = TransactionMetaData()
    base.tpc_begin(transaction)
    base.undo(base64.encodebytes(tid).rstrip(), transaction)
    base.tpc_vote(transaction)
    return base.tpc_finish(transaction)


def test_undone_and_deleted_revisions_are_loadable_as_one_by_one(tmp_path, can_load):
    base = FileStorage(str(tmp_path / "Data.fs"))
    first, second = change(base, p64(1), 2)
    changed_back = undo(base, second)
    undone = undo(base, changed_back), undo(base, second)
    tids = [first, second, changed_back, *undone]
    assert can_load(base, p64(1), tids) == set(tids)
    (created,) = change(base, p64(2), 1)
    removed = undo(base, created)
    created_again = undo(base, removed)
    assert can_load(base, p64(2), [created, removed, created_again]) == {created, created_again}
    transaction = TransactionMetaData()
    base.tpc_begin(transaction)
    base.deleteObject(p64(2), created_again, transaction)
    base.tpc_vote(transaction)
    deleted = base.tpc_finish(transaction)
    assert can_load(base, p64(2), [created, removed, created_again, deleted]) == {created, created_again}
    with adapter_for(base).revisions() as revisions:
        assert [revisions.has_object(p64(oid)) for oid in (1, 2)] == [True, False]
    base.close()


def test_a_restored_revision_that_is_older_than_the_one_before_is_loadable(tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs"))
    tids = change(base, p64(1), 3)
    transaction = TransactionMetaData()
    base.tpc_begin(transaction, earlier(tids[1]), " ")
    base.restore(p64(1), earlier(tids[1]), b"restored", "", None, transaction)
    base.tpc_vote(transaction)
    base.tpc_finish(transaction)
    with adapter_for(base).revisions() as revisions:
        tids.append(earlier(tids[1]))
        assert revisions.loadable(p64(1), tids) >= {tid for tid in tids if is_live(base, p64(1), tid)}
    base.close()


def test_a_demo_storage_has_the_revisions_of_both_its_storages(tmp_path, can_load, walked):
    inside = FileStorage(str(tmp_path / "Data.fs"))
    tids = change(inside, p64(1), 3)
    tids_of_another = change(inside, p64(2), 2)
    base = DemoStorage(base=inside, changes=FileStorage(str(tmp_path / "Changes.fs")))
    for serial in tids[-1:]:
        transaction = TransactionMetaData()
        base.tpc_begin(transaction)
        base.store(p64(1), serial, b"changed", "", transaction)
        base.tpc_vote(transaction)
        tids.append(base.tpc_finish(transaction))
    assert can_load(base, p64(1), [*tids, *map(earlier, tids)]) == set(tids)
    assert can_load(base, p64(2), [*tids, *tids_of_another]) == set(tids_of_another)
    assert walked
    base.close()


def test_a_zlibstorage_has_the_revisions_of_what_is_inside(tmp_path, can_load, walked):
    base = ZlibStorage(FileStorage(str(tmp_path / "Data.fs")))
    tids = change(base, p64(1), 5, data=b"x" * 1000)
    assert can_load(base, p64(1), [*tids, *map(earlier, tids)]) == set(tids)
    assert len(walked) == 10  # once for each question
    base.close()


def test_a_wrapper_that_is_not_known_is_asked_itself(tmp_path, can_load, walked):
    class Wrapper:
        """Has another revision."""

        def __init__(self, base):
            self.base = base

        def __getattr__(self, name):
            return getattr(self.base, name)

        def loadSerial(self, oid, tid):
            return b"its own" if tid == p64(1) else self.base.loadSerial(oid, tid)

    base = Wrapper(FileStorage(str(tmp_path / "Data.fs")))
    tids = change(base, p64(1), 3)
    assert can_load(base, p64(1), [p64(1), p64(2), *tids], without={p64(1)}) == {p64(1), *tids}
    assert walked == []
    base.close()


def test_other_threads_commit_and_pack_while_the_revisions_are_looked_through(tmp_path):
    """Neither takes a revision from what was there before."""
    base = FileStorage(str(tmp_path / "Data.fs"))
    tids = change(base, p64(1), 250)
    done = []

    def in_another_thread():
        done.append(len(done))
        with ThreadPoolExecutor() as pool:
            pool.submit(change, base, p64(1 + len(done)), 1).result(30)
            pool.submit(base.pack, time.time() + 1, lambda record, oids=None: [], gc=False).result(30)

    with adapter_for(base).revisions() as revisions:
        assert revisions.loadable(p64(1), [*tids, *map(earlier, tids)], in_another_thread) == set(tids)
        assert len(done) == 2
        assert revisions.loadable(p64(1), tids) == {tids[-1]}
    base.close()


def test_a_storage_opened_read_only_beside_another_that_packs_tells_what_it_sees_itself(tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs"))
    tids = change(base, p64(1), 5)
    beside = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    base.pack(time.time() + 1, lambda record, oids=None: [], gc=False)
    assert revisions_of(beside).loadable(p64(1), tids) == set(tids)
    beside.close()
    base.close()


def test_a_damaged_history_is_an_error_and_no_reason_to_delete(tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs"))
    other, tids = change(base, p64(2), 1), change(base, p64(1), 3)
    base._index[p64(1)] = base._index[p64(2)]
    with adapter_for(base).revisions() as revisions, pytest.raises(CorruptedDataError):
        revisions.loadable(p64(1), [*tids, *other])
    base.close()
