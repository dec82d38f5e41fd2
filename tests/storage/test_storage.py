"""The ZODB contract of the storage, where wrappers go wrong (see also the published suites)."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
import ZODB
import ZODB.blob
import ZODB.config
from zc.zlibstorage import ZlibStorage
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import (
    IBlobStorage,
    IBlobStorageRestoreable,
    IExternalGC,
    IStorageCurrentRecordIteration,
    IStorageIteration,
    IStorageRestoreable,
    IStorageUndoable,
)
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, POSKeyError, StorageError, StorageTransactionError
from ZODB.tests.hexstorage import HexStorage
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import p64

from tests.support.waiting import wait_for
from zodb_s3blobs.cache import files as cache_module
from zodb_s3blobs.s3.keys import Keys

FILESTORAGE = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"


@pytest.fixture
def open_storage(s3, bucket_name, tmp_path):
    """Opens the storage; a second call, after close, opens the same one with an empty cache."""
    opened = []

    def open_storage(base=FILESTORAGE, name="main", prefix="", **options):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        more = "\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
        storage = ZODB.config.storageFromString(f"""
            %import zodb_s3blobs
            %import zc.zlibstorage
            %import ZODB.tests
            <s3blobstorage>
              bucket-name {bucket_name}
              s3-endpoint-url {s3.url}
              s3-access-key key
              s3-secret-key secret
              s3-prefix {prefix or name}
              cache-dir {directory}/cache{len(opened)}
              {more}
              {base.format(dir=directory)}
            </s3blobstorage>
            """)
        s3.forget()
        opened.append(storage)
        return storage

    yield open_storage
    for storage in opened:
        storage.close()


@pytest.fixture
def storage(open_storage):
    return open_storage()


RECORD = zodb_pickle(Blob())


def blob_file(storage, data):
    path = os.path.join(storage.temporaryDirectory(), os.urandom(4).hex())
    with open(path, "wb") as file:
        file.write(data)
    return path


def begin(storage, oid, data, serial=ZERO):
    """A transaction that has stored ``data`` as the blob of ``oid``, not yet voted."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.storeBlob(oid, serial, RECORD, blob_file(storage, data), "", txn)
    return txn


def commit(storage, oid, data, serial=ZERO):
    txn = begin(storage, oid, data, serial)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


def read(storage, oid, serial):
    with storage.openCommittedBlobFile(oid, serial) as file:
        return file.read()


def incoming(storage):
    cache_dir = storage.fshelper.base_dir
    return os.listdir(os.path.join(cache_dir, "incoming")) + os.listdir(storage.temporaryDirectory())


def operations(s3):
    return [request.operation for request in s3.requests()]


# Requests: what an operator pays for


def test_a_small_blob_costs_one_put_and_nothing_else(s3, storage):
    oid = storage.new_oid()
    txn = begin(storage, oid, b"small")
    storage.tpc_vote(txn)
    assert operations(s3) == ["PutObject"]
    s3.forget()
    tid = storage.tpc_finish(txn)
    assert read(storage, oid, tid) == b"small"
    assert operations(s3) == []


def test_a_cold_read_of_a_small_blob_costs_one_get_and_a_warm_one_nothing(s3, open_storage):
    storage = open_storage()
    oid = storage.new_oid()
    tid = commit(storage, oid, b"small")
    storage.close()
    storage = open_storage()
    assert read(storage, oid, tid) == b"small"
    assert operations(s3) == ["GetObject"]
    assert read(storage, oid, tid) == b"small"
    with open(storage.loadBlob(oid, tid), "rb") as file:
        assert file.read() == b"small"
    assert operations(s3) == ["GetObject"]


# Two-phase commit


def test_the_blob_is_in_the_bucket_under_its_documented_key_before_the_vote_returns(s3, bucket_name, storage):
    txn = begin(storage, p64(0x1F), b"data")
    storage.tpc_vote(txn)
    (key,) = s3.keys(bucket_name)
    tid = storage.tpc_finish(txn)
    assert key == f"main/blobs/1f/{int.from_bytes(tid, 'big'):x}.blob"


def test_the_vote_returns_what_the_base_returned(open_storage):
    storage = open_storage()
    resolved = [p64(1)]
    storage.base.tpc_vote = lambda transaction: resolved
    txn = begin(storage, storage.new_oid(), b"data")
    assert storage.tpc_vote(txn) is resolved


def test_a_failed_upload_fails_the_vote_and_the_abort_leaves_nothing(s3, bucket_name, storage):
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    oid = storage.new_oid()
    txn = begin(storage, oid, b"data")
    with pytest.raises(StorageError, match="AccessDenied") as caught:
        storage.tpc_vote(txn)
    assert type(caught.value) is StorageError  # what a ZEO client can decode
    storage.tpc_abort(txn)
    s3.behave()
    wait_for(lambda: not incoming(storage))
    assert s3.keys(bucket_name) == []
    tid = commit(storage, oid, b"again")
    assert read(storage, oid, tid) == b"again"


def test_an_abort_deletes_what_was_uploaded_in_the_background(s3, bucket_name, storage):
    txn = begin(storage, storage.new_oid(), b"data")
    storage.tpc_vote(txn)
    assert len(s3.keys(bucket_name)) == 1
    storage.tpc_abort(txn)
    wait_for(lambda: not s3.keys(bucket_name))
    wait_for(lambda: not incoming(storage))


def test_an_abort_does_not_wait_for_s3(s3, storage):
    s3.misbehave(latency=20)
    txn = begin(storage, storage.new_oid(), b"data")
    aborter = threading.Thread(target=storage.tpc_abort, args=(txn,), daemon=True)
    aborter.start()
    aborter.join(10)
    assert not aborter.is_alive()


def test_the_abort_of_another_transaction_changes_nothing(storage):
    oid = storage.new_oid()
    txn = begin(storage, oid, b"mine")
    storage.tpc_abort(TransactionMetaData())
    storage.tpc_vote(txn)
    storage.tpc_abort(TransactionMetaData())
    tid = storage.tpc_finish(txn)
    assert read(storage, oid, tid) == b"mine"


def test_a_blob_for_another_transaction_is_refused(storage):
    txn = begin(storage, storage.new_oid(), b"mine")
    other = blob_file(storage, b"other")
    with pytest.raises(StorageTransactionError):
        storage.storeBlob(storage.new_oid(), ZERO, RECORD, other, "", TransactionMetaData())
    assert not os.path.exists(other)
    storage.tpc_abort(txn)


def test_concurrent_transactions_each_keep_their_own_blobs(s3, bucket_name, storage):
    """Thread after thread takes the commit lock; half of them abort, and nobody else's blob goes with theirs."""
    committed, failures = {}, []

    def work(number):
        try:
            for turn in range(6):
                oid, data = storage.new_oid(), f"{number}-{turn}".encode()
                txn = begin(storage, oid, data)
                storage.tpc_vote(txn)
                if turn % 2:
                    storage.tpc_abort(txn)
                else:
                    committed[oid, storage.tpc_finish(txn)] = data
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    wait_for(lambda: len(s3.keys(bucket_name)) == len(committed) == 18)
    for (oid, tid), data in committed.items():
        assert read(storage, oid, tid) == data


def test_uncommitted_bytes_are_visible_to_nobody_and_the_old_revision_to_everybody(storage):
    oid = storage.new_oid()
    old = commit(storage, oid, b"old")
    txn = begin(storage, oid, b"new", old)
    storage.tpc_vote(txn)
    assert read(storage, oid, old) == b"old"
    assert storage.load(oid)[1] == old
    new = storage.tpc_finish(txn)
    assert (read(storage, oid, old), read(storage, oid, new)) == (b"old", b"new")


def test_a_conflict_takes_the_file_and_uploads_nothing(s3, bucket_name, storage):
    oid = storage.new_oid()
    commit(storage, oid, b"first")
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    path = blob_file(storage, b"second")
    with pytest.raises(ConflictError):
        storage.storeBlob(oid, p64(1), RECORD, path, "", txn)
    storage.tpc_abort(txn)
    assert not os.path.exists(path)
    assert len(s3.keys(bucket_name)) == 1


def test_finish_succeeds_whatever_happens_to_the_cache(s3, open_storage, monkeypatch):
    storage = open_storage()
    oid = storage.new_oid()
    txn = begin(storage, oid, b"data")
    storage.tpc_vote(txn)

    def broken(*args):
        raise OSError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "replace", broken)
        tid = storage.tpc_finish(txn)
        wait_for(lambda: incoming(storage) == [])
    assert read(storage, oid, tid) == b"data"
    assert operations(s3) == ["PutObject", "GetObject"]


def test_a_finish_that_fails_in_the_base_deletes_nothing(s3, bucket_name, storage):
    """Only the base knows whether it committed; the next pack asks it."""
    txn = begin(storage, storage.new_oid(), b"data")
    storage.tpc_vote(txn)

    def fail(tid):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        storage.tpc_finish(txn, fail)
    storage.tpc_abort(txn)
    assert incoming(storage) == []
    assert len(s3.keys(bucket_name)) == 1


def test_a_commit_without_blobs_makes_no_request_and_works_while_s3_is_down(s3, storage):
    s3.misbehave(hang=True)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(storage.new_oid(), ZERO, zodb_pickle(MinPO(1)), "", txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
    s3.behave()
    assert operations(s3) == []


def test_finish_passes_the_tid_to_its_callback(open_storage):
    for base in FILESTORAGE, "<mappingstorage/>", "<demostorage/>":
        storage = open_storage(base, name=base.strip("<").split("storage")[0])
        told = []
        txn = begin(storage, storage.new_oid(), b"data")
        storage.tpc_vote(txn)
        assert told == []
        tid = storage.tpc_finish(txn, told.append)
        assert told == [tid]


# Reading


def test_a_missing_blob_is_a_poskeyerror_and_an_outage_is_not(s3, open_storage):
    storage = open_storage(s3_max_attempts=1)
    with pytest.raises(POSKeyError):
        storage.loadBlob(p64(1), p64(1))
    for fault in {"status": 500, "code": "InternalError"}, {"status": 404, "code": "NoSuchBucket"}, {"status": 403}:
        s3.misbehave(operation="GetObject", **fault)
        with pytest.raises(StorageError) as caught:
            storage.loadBlob(p64(1), p64(1))
        assert type(caught.value) is StorageError
        assert "blobs/1/1.blob" in str(caught.value)
        s3.behave()


def test_a_blob_larger_than_the_whole_cache_reads_and_leaves_the_limit_alone(open_storage):
    storage = open_storage(cache_size="1MB")
    oid = storage.new_oid()
    data = os.urandom(2 << 20)
    tid = commit(storage, oid, data)
    assert read(storage, oid, tid) == data
    assert not os.path.exists(storage.fshelper.getBlobFilename(oid, tid))


def test_a_path_that_was_handed_out_can_be_opened_although_the_cache_is_full(open_storage):
    storage = open_storage(cache_size="1MB")
    blobs = {}
    for _ in range(5):
        oid, data = storage.new_oid(), os.urandom(900_000)
        blobs[oid, commit(storage, oid, data)] = data
    paths = {storage.loadBlob(*name): data for name, data in blobs.items()}
    for path, data in paths.items():
        with open(path, "rb") as file:
            assert file.read() == data


def test_a_committed_file_is_a_blobfile_for_a_blob_and_cannot_be_written(storage):
    oid = storage.new_oid()
    tid = commit(storage, oid, b"data")
    with storage.openCommittedBlobFile(oid, tid, Blob()) as file:
        assert isinstance(file, ZODB.blob.BlobFile)
        assert file.read() == b"data"
    assert os.stat(storage.loadBlob(oid, tid)).st_mode & 0o222 == 0


# Undo


@pytest.fixture
def db(storage):
    db = ZODB.DB(storage)
    yield db
    db.close()


def write(db, data, name="blob"):
    with db.transaction() as connection:
        root = connection.root()
        if name not in root:
            root[name] = Blob()
        with root[name].open("w") as file:
            file.write(data)


def value(db, name="blob"):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


def undo(db, *numbers):
    log = db.undoLog(0, 20)
    db.undoMultiple([log[number]["id"] for number in numbers])
    transaction.commit()


def test_undo_brings_the_earlier_blob_back_by_a_copy_inside_the_bucket(s3, db):
    write(db, b"one")
    write(db, b"two")
    s3.forget()
    undo(db, 0)
    assert "CopyObject" in operations(s3)
    assert "PutObject" not in operations(s3)
    assert value(db) == b"one"
    undo(db, 0)
    assert value(db) == b"two"


def test_several_undos_in_one_transaction_end_where_the_last_one_leads(db):
    for data in b"one", b"two", b"three":
        write(db, data)
    undo(db, 0, 1)
    assert value(db) == b"one"


def test_undo_of_the_creation_copies_nothing_and_redo_brings_the_blob_back(s3, db):
    write(db, b"one", "other")
    write(db, b"data")
    s3.forget()
    undo(db, 0)
    assert operations(s3) == []
    with db.transaction() as connection:
        assert "blob" not in connection.root()
    undo(db, 0)
    assert value(db) == b"data"


def test_undo_survives_pack_of_what_it_was_copied_from(db):
    write(db, b"one")
    write(db, b"two")
    undo(db, 0)
    db.pack()
    assert value(db) == b"one"


def test_undo_to_a_blob_that_is_gone_fails_and_changes_nothing(s3, bucket_name, db):
    write(db, b"one")
    (first,) = s3.keys(bucket_name)
    write(db, b"two")
    s3.client.delete_object(Bucket=bucket_name, Key=first)
    cached = db.storage.fshelper.getBlobFilename(*Keys("main").parse(first))
    os.unlink(cached)
    db.undo(db.undoLog(0, 1)[0]["id"])
    with pytest.raises(StorageError, match="no such object"):
        transaction.commit()
    transaction.abort()
    assert value(db) == b"two"


def test_undo_to_a_blob_that_only_the_cache_has_brings_it_back(s3, bucket_name, db):
    write(db, b"one")
    (first,) = s3.keys(bucket_name)
    write(db, b"two")
    s3.client.delete_object(Bucket=bucket_name, Key=first)
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert value(db) == b"one"


# Moving between storages


def test_copy_transactions_from_a_plain_blob_directory_and_back(open_storage, tmp_path):
    plain = FileStorage(str(tmp_path / "plain.fs"), blob_dir=str(tmp_path / "plain-blobs"))
    db = ZODB.DB(plain)
    for data in b"one", b"two":
        write(db, data)
    storage = open_storage()
    storage.copyTransactionsFrom(plain)
    back = FileStorage(str(tmp_path / "back.fs"), blob_dir=str(tmp_path / "back-blobs"))
    back.copyTransactionsFrom(storage)
    for copy in storage, back:
        for original, copied in zip(plain.iterator(), copy.iterator(), strict=True):
            assert original.tid == copied.tid
            for record in original:
                if ZODB.blob.is_blob_record(record.data):
                    name = record.oid, record.tid
                    assert Path(plain.loadBlob(*name)).read_bytes() == Path(copy.loadBlob(*name)).read_bytes()
    db.close()
    back.close()


def test_an_aborted_restore_keeps_the_object_that_was_there(s3, bucket_name, open_storage):
    source = open_storage(name="one", prefix="shared")
    oid = source.new_oid()
    tid = commit(source, oid, b"precious")
    source.close()  # two storages of one process cannot have the same prefix
    copy = open_storage(name="two", prefix="shared")
    txn = TransactionMetaData()
    copy.tpc_begin(txn, tid, " ")
    copy.restoreBlob(oid, tid, RECORD, blob_file(copy, b"precious"), None, txn)
    copy.tpc_vote(txn)
    copy.tpc_abort(txn)
    wait_for(lambda: not incoming(copy))
    (key,) = s3.keys(bucket_name)
    assert s3.client.get_object(Bucket=bucket_name, Key=key)["Body"].read() == b"precious"


def test_a_failed_copy_releases_the_commit_lock(s3, open_storage, tmp_path):
    plain = FileStorage(str(tmp_path / "plain.fs"), blob_dir=str(tmp_path / "plain-blobs"))
    db = ZODB.DB(plain)
    write(db, b"one")
    storage = open_storage(s3_max_attempts=1)
    s3.misbehave(operation="PutObject", status=500, code="InternalError")
    with pytest.raises(StorageError):
        storage.copyTransactionsFrom(plain)
    s3.behave()
    storage.copyTransactionsFrom(plain)
    db.close()


def test_a_copy_that_fails_aborts_no_transaction_of_another_thread(storage):
    oid = storage.new_oid()
    txn = begin(storage, oid, b"data")
    with pytest.raises(AttributeError):
        storage.copyTransactionsFrom("no storage")
    storage.tpc_vote(txn)
    assert read(storage, oid, storage.tpc_finish(txn)) == b"data"


# Pack


def test_pack_deletes_dead_revisions_and_keeps_live_ones(s3, bucket_name, db):
    write(db, b"kept", "kept")
    for data in b"one", b"two", b"three":
        write(db, data)
    assert len(s3.keys(bucket_name)) == 4
    db.pack()
    assert len(s3.keys(bucket_name)) == 2
    assert (value(db), value(db, "kept")) == (b"three", b"kept")
    with db.transaction() as connection:
        del connection.root()["blob"]
    db.pack()
    assert len(s3.keys(bucket_name)) == 1
    assert value(db, "kept") == b"kept"


def test_pack_keeps_what_a_transaction_has_uploaded_and_not_finished(s3, bucket_name, storage):
    commit(storage, storage.new_oid(), b"garbage: nothing refers to it")
    txn = begin(storage, storage.new_oid(), b"in flight")
    storage.tpc_vote(txn)
    # The base cannot be packed now; the collection can run at any time.
    storage.collect_garbage()
    storage.tpc_finish(txn)
    assert len(s3.keys(bucket_name)) == 2


def test_pack_passes_gc_on_and_works_without(open_storage):
    asked = []
    storage = open_storage()
    storage.base.pack = lambda *args, **kwargs: asked.append(kwargs)
    for kwargs in {}, {"gc": None}, {"gc": False}, {"gc": True}:
        storage.pack(0, None, **kwargs)
    assert asked == [{}, {}, {"gc": False}, {"gc": True}]


def test_the_pack_stands_when_the_bucket_fails_and_the_next_one_goes_on(s3, bucket_name, db):
    for data in b"one", b"two":
        write(db, data)
    s3.misbehave(operation="ListObjects", status=403, code="AccessDenied")
    with pytest.raises(StorageError, match="was packed"):
        db.pack()
    s3.behave()
    assert value(db) == b"two"
    db.pack()
    assert len(s3.keys(bucket_name)) == 1


# Wrappers, interfaces, instances


@pytest.mark.parametrize("wrapper", ["zlibstorage", "hexstorage"])
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_records_that_a_wrapper_transforms_are_known_as_blobs(s3, bucket_name, open_storage, wrapper, place):
    """hexstorage transforms every record; zlibstorage only those that get smaller."""
    wrapped = open_storage(f"<{wrapper}>\n{FILESTORAGE}\n</{wrapper}>" if place == "inside" else FILESTORAGE)
    if place == "outside":
        wrapped = {"zlibstorage": ZlibStorage, "hexstorage": HexStorage}[wrapper](wrapped)
    db = ZODB.DB(wrapped)
    for data in b"one", b"two", b"three":
        write(db, data)
    undo(db, 0)
    assert value(db) == b"two"
    db.pack()
    assert value(db) == b"two"
    assert len(s3.keys(bucket_name)) == 1
    db.close()


def test_all_interfaces_of_the_base_are_provided_and_those_of_blob_storages(open_storage):
    storage = open_storage()
    for interface in (
        IBlobStorage,
        IBlobStorageRestoreable,
        IStorageRestoreable,
        IStorageIteration,
        IStorageUndoable,
        IStorageCurrentRecordIteration,
        IExternalGC,
    ):
        assert interface.providedBy(storage), interface
    memory = open_storage("<mappingstorage/>", name="memory")
    assert IBlobStorage.providedBy(memory)
    assert not IBlobStorageRestoreable.providedBy(memory)
    assert not IStorageUndoable.providedBy(memory)


def test_instances_of_an_mvcc_base_share_bucket_and_cache(s3, open_storage):
    from ZODB.tests.MVCCMappingStorage import MVCCMappingStorage

    from zodb_s3blobs.storage import S3BlobStorage

    storage = open_storage("<mappingstorage/>")
    mvcc = S3BlobStorage(MVCCMappingStorage(), storage._components)
    one, two = mvcc.new_instance(), mvcc.new_instance()
    oid = one.new_oid()
    tid = commit(one, oid, b"data")
    s3.forget()
    assert read(two, oid, tid) == b"data"
    one.release()
    one.close()
    assert read(two, oid, tid) == b"data"
    assert operations(s3) == []


def test_a_demo_storage_over_a_read_only_one_reads_the_blobs_of_both(open_storage):
    base = open_storage(name="base")
    db = ZODB.DB(base)
    write(db, b"base")
    db.close()
    demo = open_storage(
        """
        <demostorage>
          <filestorage base>
            path {dir}/../base/Data.fs
            read-only true
          </filestorage>
          <mappingstorage changes/>
        </demostorage>""",
        name="demo",
        prefix="base",
    )
    db = ZODB.DB(demo)
    assert value(db) == b"base"
    write(db, b"changed")
    assert value(db) == b"changed"
    db.close()


def test_external_garbage_collection_takes_the_blob_at_the_next_pack(s3, bucket_name, open_storage):
    storage = open_storage("<filestorage>\n path {dir}/Data.fs\n pack-gc false\n</filestorage>")
    db = ZODB.DB(storage)
    write(db, b"data")
    with db.transaction() as connection:
        oid = connection.root()["blob"]._p_oid
        del connection.root()["blob"]
    write(db, b"that lives")
    _, serial = storage.load(oid)
    db.pack()
    assert len(s3.keys(bucket_name)) == 2
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.deleteObject(oid, serial, txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
    db.pack()
    assert len(s3.keys(bucket_name)) == 1
    db.close()


def test_a_client_with_a_shared_blob_directory_is_told_what_to_do(storage):
    with pytest.raises(StorageError, match="shared-blob-dir false"):
        storage.fshelper.getPathForOID(p64(1))


def test_savepoints_keep_their_blobs(db):
    with db.transaction() as connection:
        blob = connection.root()["blob"] = Blob(b"first")
        savepoint = connection.transaction_manager.savepoint()
        with blob.open("w") as file:
            file.write(b"second")
        savepoint.rollback()
    assert value(db) == b"first"


def test_a_read_only_base_refuses_writes_and_serves_reads(open_storage):
    storage = open_storage()
    oid = storage.new_oid()
    tid = commit(storage, oid, b"data")
    storage.close()
    storage = open_storage("<filestorage>\n path {dir}/Data.fs\n read-only true\n</filestorage>")
    assert storage.isReadOnly()
    assert read(storage, oid, tid) == b"data"
    with pytest.raises(ZODB.POSException.ReadOnlyError):
        storage.tpc_begin(TransactionMetaData())


def test_mappingstorage_keeps_its_own_transactions_blobs(open_storage):
    storage = open_storage("<mappingstorage/>")
    assert isinstance(storage.base, MappingStorage)
    oid = storage.new_oid()
    first = commit(storage, oid, b"one")
    second = commit(storage, oid, b"two", first)
    assert (read(storage, oid, first), read(storage, oid, second)) == (b"one", b"two")


def test_a_tid_that_is_given_twice_does_not_cost_the_second_blob(open_storage, s3, bucket_name, monkeypatch):
    """A base in memory gives a tid again if the clock is set back after an abort, which deletes in the background."""
    storage = open_storage("<mappingstorage/>")
    now = time.time()
    monkeypatch.setattr("ZODB.utils.time", SimpleNamespace(time=lambda: now, gmtime=time.gmtime))
    txn = begin(storage, p64(1), b"first")
    storage.tpc_vote(txn)
    blobs = [key for key in s3.keys(bucket_name) if "/blobs/" in key]
    s3.misbehave(operation="DeleteObject", hang=True)
    storage.tpc_abort(txn)
    s3.wait_for("DeleteObject")
    txn = begin(storage, p64(1), b"second")
    with ThreadPoolExecutor(1) as pool:
        vote = pool.submit(storage.tpc_vote, txn)
        with contextlib.suppress(AssertionError):  # it must not be stored before the deletion, which would hit it
            s3.wait_for("PutObject", 2, timeout=1)
        s3.behave()
        vote.result(60)
    storage.tpc_finish(txn)
    storage.close()  # what is deleted in the background is deleted
    assert [key for key in s3.keys(bucket_name) if "/blobs/" in key] == blobs  # the tid is the same
    assert s3.client.get_object(Bucket=bucket_name, Key=blobs[0])["Body"].read() == b"second"
