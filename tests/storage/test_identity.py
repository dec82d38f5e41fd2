"""The identity of a database: it stays over restarts, and a copy of the database has another one."""

import os
import shutil
import time

import pytest
import ZODB
from persistent.mapping import PersistentMapping
from zc.zlibstorage import ZlibStorage
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.serialize import referencesf
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64, z64

from tests.support.sites import leave_unfinished
from zodb_s3blobs.bases import adapter_for
from zodb_s3blobs.identity import Identity


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "production" / "Data.fs"
    path.parent.mkdir()
    path.touch()
    return path


def test_it_stays_the_same_over_restarts(database):
    assert len({Identity(str(database)).make() for _ in range(3)}) == 1
    assert Identity(str(database)).read() == Identity(str(database)).make()


def test_a_database_has_none_before_it_is_given_one(database):
    assert Identity(str(database)).read() is None
    assert os.listdir(database.parent) == ["Data.fs"]


def test_a_copy_of_the_database_has_another(database, tmp_path):
    identity = Identity(str(database)).make()
    copy = shutil.copytree(database.parent, tmp_path / "copy") / "Data.fs"
    assert Identity(str(copy)).read() not in (None, identity)
    assert Identity(str(copy)).make() != identity


def test_a_database_that_is_moved_keeps_it(database, tmp_path):
    identity = Identity(str(database)).make()
    database.parent.rename(tmp_path / "moved")
    assert Identity(str(tmp_path / "moved" / "Data.fs")).make() == identity


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_crash_that_left_nothing_of_use_is_survived(database, content):
    (database.parent / "Data.fs.s3blobs-id").write_bytes(content)
    assert len(Identity(str(database)).make()) > 3
    assert Identity(str(database)).make() == Identity(str(database)).read()


def test_one_in_memory_ends_with_the_process():
    first, second = Identity(None), Identity(None)
    assert first.make() == first.read() != second.make()


def test_doubt_about_marks_outlives_the_process(database):
    assert not Identity(str(database)).marks_are_doubtful
    Identity(str(database)).marks_are_doubtful = True
    assert Identity(str(database)).marks_are_doubtful
    for _ in range(2):
        Identity(str(database)).marks_are_doubtful = False
        assert not Identity(str(database)).marks_are_doubtful


def test_what_a_pack_may_have_taken_away_is_remembered(database):
    assert Identity(str(database)).packed_away == set()
    for tids in {b"\0" * 7 + b"\1"}, {b"\3\xd0" + b"\xff" * 6, b"\0" * 7 + b"\2"}:
        Identity(str(database)).packed_away = tids
        assert Identity(str(database)).packed_away == tids
    (database.parent / "Data.fs.s3blobs-packed").write_text("nonsense")
    assert Identity(str(database)).packed_away == set()


# What the bases have


def test_it_lies_beside_the_file_of_the_database_however_that_is_wrapped(tmp_path):
    path = str(tmp_path / "Data.fs")
    identities = set()
    for wrap in (lambda base: base), ZlibStorage, lambda base: DemoStorage(base=MappingStorage(), changes=base):
        storage = wrap(FileStorage(path))
        identities.add(adapter_for(storage).identity())
        storage.close()
    assert len(identities) == 1
    assert (tmp_path / "Data.fs.s3blobs-id").exists()


def test_a_demostorage_with_changes_in_memory_is_not_the_database_below_it(tmp_path):
    base = FileStorage(str(tmp_path / "Data.fs"))
    below = adapter_for(base).identity()
    assert adapter_for(DemoStorage(base=base)).identity() != below
    base.close()


@pytest.mark.parametrize(
    "make",
    [MappingStorage, lambda: DemoStorage(base=MappingStorage()), None],
    ids=["mappingstorage", "demostorage", "filestorage"],
)
def test_a_base_knows_which_transactions_it_has(tmp_path, make):
    storage = make() if make is not None else ZlibStorage(FileStorage(str(tmp_path / "Data.fs")))
    kind = adapter_for(storage)
    assert kind.last_transaction() == z64
    db = ZODB.DB(storage)
    tids = [kind.last_transaction()]
    for number in range(3):
        with db.transaction() as connection:
            connection.root()["number"] = number
        tids.append(kind.last_transaction())
    assert all(kind.has_transaction(tid) for tid in tids)
    assert not kind.has_transaction(tids[0][:-1] + bytes([tids[0][-1] ^ 1]))
    assert not kind.has_transaction(b"\xff" * 8)
    db.close()


def commit(storage, oid, data, serial=z64):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(oid, serial, data, "", txn)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


def test_the_last_transaction_is_one_that_the_database_still_has_after_a_crash(tmp_path):
    path = tmp_path / "Data.fs"
    storage = FileStorage(str(path))
    last = commit(storage, z64, b"data")
    assert adapter_for(storage).last_transaction() == last
    storage.close()
    leave_unfinished(path)
    storage = FileStorage(str(path))
    assert storage.lastTransaction() > last  # ZODB names what it has just cut off
    assert adapter_for(storage).last_transaction() == last
    storage.close()


def test_the_last_transaction_is_one_that_the_database_still_has_after_a_pack(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    with ZODB.DB(storage).transaction() as connection:
        connection.root()["number"] = 1
    last = storage.lastTransaction()
    unreachable = commit(storage, p64(100), zodb_pickle(PersistentMapping()))
    storage.pack(time.time() + 1, referencesf)
    assert storage.lastTransaction() == unreachable
    kind = adapter_for(storage)
    assert kind.last_transaction() == last
    assert kind.has_transaction(last) and not kind.has_transaction(unreachable)
    storage.close()
