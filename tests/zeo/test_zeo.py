"""The main job, from outside: a stock runzeo, stock clients, an S3 server; and S3 never stalls it."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import transaction
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, StorageError
from ZODB.tests.StorageTestBase import ZERO
from ZODB.utils import p64

from tests.support.speed import slow, slow_but
from tests.support.zeo_clients import (
    MB,
    RECORD,
    SOON,
    blob,
    commit_blob,
    commit_object,
    leftovers,
    load,
    operations,
    read,
    store_blob,
    uncache,
    wait_for,
    write,
)
from tests.support.zeo_server import DEMO, FILESTORAGE, SECTION, ZEOServer


@pytest.fixture
def server(start):
    return start()


# The main job


CLIENT = """
    import sys, transaction, ZEO, ZODB
    from ZODB.blob import Blob
    host, port, blob_dir, number = sys.argv[1:]
    db = ZEO.DB((host, int(port)), blob_dir=blob_dir, wait_timeout=30)
    for turn in range(5):
        data = f"{number}-{turn}".encode() * 1000
        for attempt in range(100):
            try:
                with db.transaction() as connection:
                    root = connection.root()
                    name = "blob-" + number
                    if name not in root:
                        root[name] = Blob()
                    with root[name].open("w") as file:
                        file.write(data)
                break
            except ZODB.POSException.ConflictError:
                pass
        with db.transaction() as connection, connection.root()[name].open() as file:
            assert file.read() == data
    db.close()
"""


def test_clients_in_other_processes_commit_read_overwrite_undo_and_pack(s3, bucket_name, start, tmp_path):
    server = start(stock=True)
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    arguments = [sys.executable, script, *map(str, server.address)]
    db = server.db()  # makes the root object
    clients = [subprocess.Popen([*arguments, str(tmp_path / f"process-{number}"), str(number)]) for number in range(4)]
    assert [client.wait(120) for client in clients] == [0, 0, 0, 0]
    for number in range(4):
        assert read(db, f"blob-{number}") == f"{number}-4".encode() * 1000
    write(db, "blob-0", b"overwritten")
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert read(db, "blob-0") == b"0-4" * 1000
    assert len(s3.keys(bucket_name)) == 22
    db.pack()
    assert len(s3.keys(bucket_name)) == 4
    for number in range(4):
        assert read(server.db(), f"blob-{number}") == f"{number}-4".encode() * 1000


def test_a_restart_with_an_empty_cache_loses_nothing(server):
    write(server.db(), "small", b"data")
    large = os.urandom(20 * MB)
    write(server.db(), "large", large)
    server.stop()
    server.cache_name = "other"
    server.start()
    db = server.db()
    assert read(db, "small") == b"data"
    assert read(db, "large") == large


def test_requests_at_the_server_are_as_promised(s3, server):
    client = server.client()
    s3.forget()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    oid = client.new_oid()
    store_blob(client, oid, b"data", txn)
    client.tpc_vote(txn)
    assert operations(s3) == ["PutObject"]
    tid = client.tpc_finish(txn)
    assert blob(server.client(), oid, tid) == b"data"
    assert operations(s3) == ["PutObject"]
    server.stop()
    server.cache_name = "other"
    server.start()
    s3.forget()
    for _ in range(3):
        assert blob(server.client(), oid, tid) == b"data"
    assert operations(s3) == ["GetObject"]


def test_fifty_small_blobs_at_100_ms_latency_vote_in_few_round_trips(s3, server):
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    for _ in range(50):
        store_blob(client, client.new_oid(), b"small", txn)
    s3.misbehave(latency=0.1)
    started = time.monotonic()
    client.tpc_vote(txn)
    # 50 in a row would take 5 s.
    assert time.monotonic() - started < 2.5
    client.tpc_finish(txn)


def test_a_missing_blob_is_a_poskeyerror_at_the_client_and_an_outage_is_not(s3, server):
    client = server.client()
    with pytest.raises(POSKeyError):
        client.loadBlob(p64(1), p64(1))
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    with pytest.raises(StorageError, match="AccessDenied") as caught:
        client.loadBlob(p64(1), p64(1))
    assert not isinstance(caught.value, POSKeyError)


@pytest.mark.parametrize("wrapper", slow_but("zlibstorage", of=["zlibstorage", "serverzlibstorage"]))
def test_wrapped_in_zlibstorage_it_does_not_stall_either(s3, start, background, wrapper):
    def storages(settings):
        return f"<{wrapper} 1>{SECTION.format(**settings)}</{wrapper}>"

    server = start(storages=storages)
    db, other = server.db(), server.client()
    write(db, "blob", b"first")
    s3.forget()
    s3.misbehave(operation="PutObject", hang=True)
    slow = background(write, db, "blob", b"second")
    s3.wait_for("PutObject")
    load(other)
    assert not slow.done()
    s3.behave()
    slow.result(60)
    assert read(server.db(), "blob") == b"second"


def test_other_storages_of_the_server_are_served_by_the_stock_handler(s3, start, background, tmp_path):
    def storages(settings):
        plain = f"<filestorage 2>\n path {tmp_path}/2.fs\n blob-dir {tmp_path}/2-blobs\n</filestorage>"
        return SECTION.format(**settings) + plain

    server = start(storages=storages)
    ours, plain = server.client(), server.client(storage="2")
    s3.misbehave(hang=True)
    slow = background(commit_blob, ours)
    s3.wait_for("PutObject")
    oid, tid = commit_blob(plain, b"plain")
    assert blob(server.client(storage="2"), oid, tid) == b"plain"
    s3.behave()
    slow.result(60)


# S3 never stalls the server


def test_a_cold_read_holds_up_nobody_else(s3, server, background):
    warm = commit_blob(server.client(), b"warm")
    cold_oid, cold_tid = commit_blob(server.client(), b"cold")
    uncache(server, cold_oid, cold_tid)
    s3.misbehave(hang=True)
    reader, other = server.client(), server.client()
    slow = background(blob, reader, cold_oid, cold_tid)
    s3.wait_for("GetObject")
    started = time.monotonic()
    load(other)
    commit_object(other)
    assert blob(other, *warm) == b"warm"
    load(reader)
    assert time.monotonic() - started < SOON
    assert not slow.done()
    s3.behave()
    assert slow.result(60) == b"cold"


def test_a_vote_holds_up_no_reader_and_no_writer(s3, server, background):
    warm = commit_blob(server.client(), b"warm")
    s3.forget()
    s3.misbehave(operation="PutObject", hang=True)
    writer, other = server.client(), server.client()
    slow = background(commit_blob, writer)
    s3.wait_for("PutObject")
    started = time.monotonic()
    earlier = commit_object(other)
    load(server.client())
    load(writer)
    assert blob(server.client(), *warm) == b"warm"
    assert time.monotonic() - started < SOON
    assert not slow.done()
    s3.behave()
    oid, tid = slow.result(60)
    assert earlier < tid
    assert blob(server.client(), oid, tid) == b"data"


def undo_last(db):
    manager = transaction.TransactionManager()
    db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
    manager.commit()


def begin_undo(s3, db, background):
    """Undo a change of a blob; return the future of it, which waits for S3 until it behaves."""
    write(db, "blob", b"one")
    write(db, "blob", b"two")
    s3.misbehave(operation="CopyObject", hang=True)
    undo = background(undo_last, db)
    s3.wait_for("CopyObject")
    return undo


def test_undo_copies_off_the_loop(s3, server, background):
    other = server.client()
    slow = begin_undo(s3, server.db(), background)
    load(other)
    assert not slow.done()
    s3.behave()
    slow.result(60)
    assert read(server.db(), "blob") == b"one"


def test_a_client_that_vanishes_while_an_undo_waits_for_s3_frees_the_lock_at_once(s3, bucket_name, server, background):
    db, other = server.db(), server.client()
    slow = begin_undo(s3, db, background)
    background(db.close)
    with pytest.raises((ClientDisconnected, StorageError)):
        slow.result(60)
    started = time.monotonic()
    commit_object(other)
    assert time.monotonic() - started < SOON
    s3.behave()
    wait_for(lambda: len(s3.keys(bucket_name)) == 2 and not leftovers(server))
    assert read(server.db(), "blob") == b"two"


def test_twenty_clients_that_want_one_cold_blob_make_one_download(s3, server, background):
    data = os.urandom(MB)
    oid, tid = commit_blob(server.client(), data)
    server.stop()
    server.cache_name = "other"
    server.start()
    clients = [server.client() for _ in range(20)]
    s3.forget()
    s3.misbehave(operation="GetObject", latency=1)
    answers = [background(blob, client, oid, tid) for client in clients]
    assert all(answer.result(60) == data for answer in answers)
    assert operations(s3) == ["GetObject"]


@slow
def test_slow_reads_do_not_hold_up_a_commit(s3, start, background):
    server = start(options={"s3_concurrency": 2})
    names = [commit_blob(server.client(), os.urandom(100)) for _ in range(6)]
    server.stop()
    server.cache_name = "other"
    server.start()
    s3.misbehave(operation="GetObject", hang=True)
    slow = [background(blob, server.client(), *name) for name in names]
    s3.wait_for("GetObject", 2)
    started = time.monotonic()
    commit_blob(server.client())
    assert time.monotonic() - started < SOON
    s3.behave()
    for answer in slow:
        answer.result(60)


# Failures


def test_a_failed_upload_aborts_the_transaction_with_a_clear_error_and_frees_the_lock(s3, bucket_name, server):
    client = server.client()
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    with pytest.raises(StorageError, match="AccessDenied"):
        commit_blob(client)
    commit_object(server.client())
    commit_object(client)
    s3.behave()
    oid, tid = commit_blob(client, b"again")
    assert blob(server.client(), oid, tid) == b"again"
    wait_for(lambda: not leftovers(server))
    assert len(s3.keys(bucket_name)) == 1


@pytest.mark.parametrize("size", slow_but(100, of=[100, 5 * MB]))
def test_a_black_hole_ends_within_upload_timeout_and_leaves_nothing(s3, bucket_name, start, background, size):
    server = start(options={"upload_timeout": "2s", "s3_read_timeout": "3s", "s3_max_attempts": 1})
    client, other = server.client(), server.client()
    commit_blob(client)
    before = server.open_files()
    s3.misbehave(hang=True)
    started = time.monotonic()
    slow = background(commit_blob, client, os.urandom(size))
    with pytest.raises(StorageError, match="upload-timeout"):
        slow.result(60)
    assert time.monotonic() - started < 2 + SOON
    commit_object(other)
    s3.behave()
    wait_for(lambda: not leftovers(server))
    wait_for(lambda: server.open_files() == before)
    wait_for(lambda: len(s3.keys(bucket_name)) == 1)
    commit_blob(client)


def test_the_lock_is_free_again_after_transaction_timeout(s3, start, background):
    """The stock server forgets the client whose connection it closes itself, and with it the lock."""
    server = start(zeo={"transaction_timeout": 1})
    client = server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    store_blob(client, client.new_oid(), b"data", txn)
    client.tpc_vote(txn)
    wait_for(lambda: "Transaction timeout" in server.output())
    started = time.monotonic()
    commit_object(server.client())
    assert time.monotonic() - started < SOON


def test_a_client_that_vanishes_in_the_middle_of_a_blob_leaves_no_file_behind(server):
    """The stock server keeps its temporary file, and has it open, for ever."""
    before = server.open_files()
    client = server.client()
    client._call("tpc_begin", 1, b"", b"", {}, None, " ")
    client._async("storeBlobStart")
    client._async("storeBlobChunk", b"half of it")
    wait_for(lambda: leftovers(server))
    client.close()
    wait_for(lambda: not leftovers(server) and server.open_files() == before)


class Counter(Persistent):
    """Resolves its conflicts; the server cannot import it and so leaves that to the client."""

    value = 0

    def _p_resolveConflict(self, old, saved, new):
        return {"value": saved["value"] + new["value"] - old.get("value", 0)}


def test_resolving_conflicts_at_the_client_keeps_the_blobs(start):
    """Under the stock server the record is committed and the blob is lost."""
    server = start(zeo={"client_conflict_resolution": "true"})
    first = server.db()
    with first.transaction() as connection:
        connection.root()["counter"] = Counter()
        connection.root()["folder"] = PersistentMapping()
    second = server.db()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    root, other = first.open(one).root(), second.open(two).root()
    root["counter"].value += 1
    other["counter"].value += 1
    other["folder"]["blob"] = Blob(b"not lost")
    one.commit()
    two.commit()
    with server.db().transaction() as connection:
        assert connection.root()["counter"].value == 2
        with connection.root()["folder"]["blob"].open() as file:
            assert file.read() == b"not lost"
    assert leftovers(server) == []


def test_a_conflict_over_a_blob_leaves_nothing_behind(s3, bucket_name, server):
    db = server.db()
    write(db, "blob", b"one")
    other = server.db()
    one, two = transaction.TransactionManager(), transaction.TransactionManager()
    for manager, database, data in (one, db, b"winner"), (two, other, b"loser" * 1000):
        with database.open(manager).root()["blob"].open("w") as file:
            file.write(data)
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert read(server.db(), "blob") == b"winner"
    wait_for(lambda: not leftovers(server) and len(s3.keys(bucket_name)) == 2)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets one process limit another")
def test_a_blob_that_cannot_be_written_fails_its_commit_with_a_clear_error(server):
    """The stock server cuts the connection, or commits what the disk took of it."""
    client = server.client()
    commit_blob(client)
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (MB, hard))
    with pytest.raises(StorageError, match=r"cache-dir.*File too large"):
        commit_blob(client, os.urandom(3 * MB))
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert leftovers(server) == []
    data = os.urandom(3 * MB)
    oid, tid = commit_blob(client, data)
    assert blob(server.client(), oid, tid) == data


def test_a_client_with_a_shared_blob_directory_is_told_at_its_commit(server, tmp_path):
    (tmp_path / "shared" / "tmp").mkdir(parents=True)
    client = server.client(shared_blob_dir=True, blob_dir=str(tmp_path / "shared"))
    with pytest.raises(StorageError, match="shared-blob-dir false"):
        commit_blob(client)
    commit_object(client)


@slow
def test_kill_9_of_clients_leaves_no_lock_and_no_file(s3, bucket_name, server, tmp_path):
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys, ZEO
            from ZODB.blob import Blob
            host, port, blob_dir = sys.argv[1:]
            db = ZEO.DB((host, int(port)), blob_dir=blob_dir, wait_timeout=30)
            print("ready", flush=True)
            while True:
                with db.transaction() as connection:
                    connection.root()[os.getpid()] = Blob(os.urandom(5 << 20))
            """)
    )
    db = server.db()
    with db.transaction() as connection:
        connection.root()["ready"] = True
    before = server.open_files()
    for number in range(8):
        arguments = [sys.executable, script, *map(str, server.address), str(tmp_path / f"process-{number}")]
        client = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert client.stdout.readline() == b"ready\n"
        time.sleep(0.05 * number)  # at another moment each time
        client.send_signal(signal.SIGKILL)
        client.communicate()
    started = time.monotonic()
    commit_object(server.client())
    assert time.monotonic() - started < SOON
    wait_for(lambda: not leftovers(server))
    wait_for(lambda: server.open_files() == before)
    wait_for(lambda: not [key for key in s3.keys(bucket_name) if "staged" in key])
    db.pack()
    with db.transaction() as connection:
        blobs = [value for value in connection.root().values() if isinstance(value, Blob)]
        for value in blobs:
            with value.open() as file:
                assert len(file.read()) == 5 * MB
    wait_for(lambda: len(s3.keys(bucket_name)) == len(blobs))


# Staging: other writers do not wait for an upload


def test_a_large_blob_is_uploaded_before_the_commit_lock_is_taken(s3, bucket_name, server, background):
    data = os.urandom(5 * MB)
    s3.misbehave(operation="PutObject", hang=True)
    slow = background(commit_blob, server.client(), data)
    s3.wait_for("PutObject")
    other = server.client()
    started = time.monotonic()
    commit_object(other)
    commit_object(other)
    assert time.monotonic() - started < SOON
    assert not slow.done()
    s3.behave()
    oid, tid = slow.result(60)
    assert blob(server.client(), oid, tid) == data
    assert operations(s3).count("PutObject") == 1
    assert operations(s3).count("CopyObject") == 1
    wait_for(lambda: all("/blobs/" in key for key in s3.keys(bucket_name)))


def test_a_staged_blob_keeps_its_checksum_and_survives_a_cold_read(s3, bucket_name, server):
    data = os.urandom(12 * MB)
    oid, tid = commit_blob(server.client(), data)
    (key,) = [key for key in s3.keys(bucket_name) if "/blobs/" in key]
    assert "sha256" in s3.client.head_object(Bucket=bucket_name, Key=key)["Metadata"]
    server.stop()
    server.cache_name = "other"
    server.start()
    assert blob(server.client(), oid, tid) == data


def test_staging_can_be_turned_off(s3, start):
    server = start(options={"s3_stage_threshold": 0})
    commit_blob(server.client(), os.urandom(5 * MB))
    assert operations(s3).count("PutObject") == 1
    assert "CopyObject" not in operations(s3)


def test_a_service_that_cannot_copy_gets_the_blob_again(s3, bucket_name, server):
    data = os.urandom(5 * MB)
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    oid, tid = commit_blob(server.client(), data)
    assert blob(server.client(), oid, tid) == data
    s3.forget()
    commit_blob(server.client(), data)
    assert operations(s3).count("PutObject") == 1  # it has learnt
    wait_for(lambda: all("/blobs/" in key for key in s3.keys(bucket_name)))


def test_a_failed_staged_upload_fails_the_vote_and_never_takes_the_lock(s3, bucket_name, server):
    client = server.client()
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    with pytest.raises(StorageError, match="AccessDenied"):
        commit_blob(client, os.urandom(5 * MB))
    s3.behave()
    wait_for(lambda: not leftovers(server) and not s3.keys(bucket_name))
    commit_blob(client, os.urandom(5 * MB))


def test_an_abort_before_the_vote_removes_what_was_staged(s3, bucket_name, server):
    client = server.client()
    txn = TransactionMetaData()
    client._call("tpc_begin", id(txn), b"", b"", {}, None, " ")
    client._async("storeBlobStart")
    for _ in range(5):
        client._async("storeBlobChunk", os.urandom(MB))
    client._async("storeBlobEnd", client.new_oid(), ZERO, RECORD, id(txn))
    wait_for(lambda: [key for key in s3.keys(bucket_name) if "/staged/" in key])
    client._call("tpc_abort", id(txn))
    wait_for(lambda: not s3.keys(bucket_name) and not leftovers(server))


def test_pack_leaves_young_staged_uploads_of_other_servers_alone(s3, bucket_name, server):
    db = server.db()
    write(db, "blob", b"data")
    s3.put(bucket_name, ["1/staged/" + "a" * 32, "1/staged/not ours"])
    db.pack()
    assert {"1/staged/" + "a" * 32, "1/staged/not ours"} <= set(s3.keys(bucket_name))


# Start and stop


@slow
def test_sigterm_ends_the_process_with_transfers_under_way(s3, server, background):
    name = commit_blob(server.client(), b"cold")
    server.stop()
    server.cache_name = "other"
    server.start()
    s3.forget()
    s3.misbehave(hang=True)
    slow = [
        background(commit_blob, server.client()),
        background(commit_blob, server.client(), os.urandom(20 * MB)),
        background(blob, server.client(), *name),
        background(server.client().pack),  # ZEO packs in a thread for which the process waits
    ]
    s3.wait_for("ListObjects")
    s3.wait_for("PutObject")
    s3.wait_for("GetObject")
    s3.wait_for("CreateMultipartUpload")
    assert server.stop() < 5 + SOON
    s3.behave()
    server.start()
    assert leftovers(server) == []
    assert blob(server.client(), *name) == b"cold"
    for answer in slow:
        answer.exception(60)


def test_an_outage_at_the_start_does_not_keep_the_server_down(s3, bucket_name, tmp_path):
    class Nowhere:
        url = "http://127.0.0.1:1"

    with ZEOServer(tmp_path, Nowhere, bucket_name, options={"s3_max_attempts": 1}) as server:
        commit_object(server.client())
        with pytest.raises(StorageError):
            commit_blob(server.client())
        assert re.search("Could not list bucket .* Starting anyway", server.output())


def test_the_log_and_the_errors_hold_no_secret(s3, start):
    server = start()
    s3.misbehave(operation="PutObject", status=403, code="InvalidAccessKeyId")
    with pytest.raises(StorageError) as caught:
        commit_blob(server.client())
    assert "InvalidAccessKeyId" in str(caught.value)
    for text in server.output(), str(caught.value):
        assert "test-secret" not in text


@pytest.mark.skipif(not os.path.exists("/proc"), reason="only /proc tells how many threads another process has")
def test_threads_of_the_server_are_bounded(server, background):
    for _ in range(3):
        for answer in [background(commit_blob, server.client(), os.urandom(1000)) for _ in range(20)]:
            answer.result(60)
    assert len(os.listdir(f"/proc/{server.pid}/task")) < 80


# Wrappers that hide the storage


READ_ONLY = FILESTORAGE.replace("</filestorage>", " read-only true\n</filestorage>")


@slow
def test_a_demostorage_reads_blobs_of_its_base_off_the_loop_and_keeps_its_own(
    s3, bucket_name, start, tmp_path, background
):
    production = start()
    old = commit_blob(production.client(), b"of production")
    production.stop()
    shutil.rmtree(production.cache_dir)

    def demo(settings):
        return DEMO.format(dir=tmp_path, base=SECTION.format(**settings))

    server = start(base=READ_ONLY, storages=demo)
    client, other = (server.client(blob_dir=str(tmp_path / name)) for name in ("reader", "other"))
    s3.forget()
    s3.misbehave(operation="GetObject", hang=True)
    reading = background(blob, client, *old)
    s3.wait_for("GetObject")
    load(other)
    commit_object(other)
    new = commit_blob(other, b"of staging")
    assert blob(server.client(), *new) == b"of staging"
    assert not reading.done()
    s3.behave()
    assert reading.result(60) == b"of production"
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    shutil.rmtree(server.cache_dir / "blobs")
    with pytest.raises(StorageError, match="AccessDenied"):
        blob(server.client(blob_dir=str(tmp_path / "third")), *old)
    assert {request.operation for request in s3.requests()} == {"GetObject"}


HIDDEN = {
    "as changes": """
        <demostorage 1>
          <mappingstorage base/>
          {ours}
        </demostorage>
        """,
    "below two": """
        <demostorage 1>
          <demostorage base>
            {ours}
          </demostorage>
        </demostorage>
        """,
}


@pytest.mark.parametrize("wrapped", HIDDEN.values(), ids=HIDDEN)
def test_a_wrapper_that_hides_the_storage_is_refused_at_the_start(s3, bucket_name, tmp_path, wrapped):
    def storages(settings):
        name = "changes" if "mappingstorage base" in wrapped else "base"
        return wrapped.format(ours=SECTION.format(**{**settings, "name": name, "base": "<mappingstorage/>"}))

    server = ZEOServer(tmp_path, s3, bucket_name, storages=storages)
    with contextlib.suppress(AssertionError):  # it listens before it knows what it serves
        server.start()
    wait_for(lambda: "Put the s3blobstorage around it instead" in server.output())
    assert server.stop() < 30
    assert "Traceback" not in server.output()
