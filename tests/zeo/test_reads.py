"""Reads of many blobs at a time: few open files, errors that say what to do, nothing left of clients that vanish."""

import contextlib
import multiprocessing
import os
import resource
import socket
import threading

import pytest
import ZEO.ClientStorage
from ZEO.Exceptions import ClientDisconnected
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import StorageError
from ZODB.utils import u64

from tests.support.slow_client import LARGE, SlowClient
from tests.support.speed import slow, slow_but
from tests.support.zeo_clients import (
    MB,
    blob,
    commit_blob,
    leftovers,
    load,
    store_blob,
    uncache,
    wait_for,
)

pytestmark = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux lets one process limit another, and counts its files"
)

#: The size of blobs that wait in the queue of a connection behind a large one.
QUEUED = 75 * 4096  # whole blocks of the disk


@pytest.fixture
def server(start):
    return start(metrics=True, options={"s3_concurrency": 8})


@contextlib.contextmanager
def open_files_limited(server, limit):
    """While the context lasts, the server may have no more than ``limit`` files."""
    _, hard = before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)


def no_more_open_files(server):
    """Every number below this limit is taken."""
    return open_files_limited(server, 3)


def store(client, count, size):
    """Commit so many blobs; return their names and bytes."""
    return {commit_blob(client, data): data for data in (os.urandom(size) for _ in range(count))}


def cool(server, names):
    for name in names:
        uncache(server, *name)


def cached(server):
    """The cached files that the server has open."""
    return [name for name in server.open_files() if "/blobs/" in name]


def check_nothing_is_left(server, connections):
    """Nothing that clients made the server hold is left, but for these connections."""
    wait_for(lambda: server.metrics()("zeo_connections") == connections)
    wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == 0)
    wait_for(lambda: not cached(server) and not leftovers(server))


# Open files


def _read_all(address, directory, names, threads, failed):
    client = ZEO.ClientStorage.ClientStorage(address, blob_dir=directory, wait_timeout=30)

    def read(mine):
        for name, data in mine:
            try:
                assert blob(client, *name) == data
            except Exception as error:
                failed.put(f"{type(error).__name__}: {error}")

    readers = [threading.Thread(target=read, args=(names[one::threads],)) for one in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    client.close()
    failed.put(None)


@pytest.mark.parametrize("temperature", ["warm", "cold"])
@pytest.mark.parametrize("clients", slow_but(12, of=[1, 12]))
def test_a_hundred_open_files_are_enough_for_180_reads_at_a_time(server, tmp_path, clients, temperature):
    names = store(server.client(), 180, 60_000)
    if temperature == "cold":
        cool(server, names)
    context = multiprocessing.get_context("fork")
    failed = context.SimpleQueue()
    shares = [list(names.items())[one::clients] for one in range(clients)]
    with open_files_limited(server, 100):
        processes = [
            context.Process(
                target=_read_all, args=(server.address, str(tmp_path / f"reader-{one}"), share, len(share), failed)
            )
            for one, share in enumerate(shares)
        ]
        for process in processes:
            process.start()
        errors, ended = [], 0
        while ended < clients:
            error = failed.get()
            ended += error is None
            errors += [error] if error else []
        for process in processes:
            process.join()
    assert errors == []


def test_so_they_are_for_180_reads_that_wait_until_the_client_takes_them(server):
    client = server.client()
    large, name = commit_blob(client, os.urandom(LARGE)), commit_blob(client, os.urandom(1000))
    with open_files_limited(server, 100), SlowClient(server.address) as slow:
        slow.begin_to_read((None, large))
        for number in [slow.call("sendBlob", *name) for _ in range(180)]:
            assert slow.answer(number) is None
    check_nothing_is_left(server, 1)


def test_what_waits_for_its_turn_has_no_file_open_and_stays_in_the_cache(s3, start):
    server = start(metrics=True, options={"cache_size": MB})
    client = server.client()
    large, queued = commit_blob(client, os.urandom(LARGE)), store(client, 20, QUEUED)
    s3.forget()
    with SlowClient(server.address) as slow:
        first = slow.begin_to_read((None, large))
        others = [slow.call("sendBlob", *name) for name in queued]
        wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == LARGE + 20 * QUEUED)
        assert len(cached(server)) == 1
        commit_blob(client, os.urandom(MB))  # others do not push them out
        fetched = len(s3.requests("GetObject"))
        assert fetched > 0  # the cache cannot keep them all
        slow.answer(first)
        assert slow.blobs(others) == {oid: data for (oid, _), data in queued.items()}
        assert len(s3.requests("GetObject")) == fetched
    check_nothing_is_left(server, 1)


def test_too_many_open_files_are_an_answer_that_says_so_and_leave_no_part_of_the_blob(server):
    client, other = server.client(), server.client()
    (warm, data), (cold, _) = store(client, 2, 60_000).items()
    cool(server, [cold])
    with SlowClient(server.address) as slow:
        with no_more_open_files(server):
            for name in warm, cold:
                number = slow.call("sendBlob", *name)
                with pytest.raises(AssertionError, match="this process has too many open files"):
                    slow.blob(number)
            assert slow.received == []
            with pytest.raises(StorageError, match="LimitNOFILE"):
                blob(other, *warm)
        assert slow.blob(slow.call("sendBlob", *warm)) == data
    assert blob(other, *warm) == data
    blob(other, *cold)
    check_nothing_is_left(server, 2)


def test_so_they_are_for_a_blob_whose_turn_comes_late(server):
    client = server.client()
    large, late = commit_blob(client, os.urandom(LARGE)), commit_blob(client, os.urandom(QUEUED))
    with SlowClient(server.address) as slow:
        first = slow.begin_to_read((None, large))
        last = slow.call("sendBlob", *late)
        wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == LARGE + QUEUED)
        with no_more_open_files(server):
            assert slow.answer(first) is None
            with pytest.raises(AssertionError, match="LimitNOFILE"):
                slow.blob(last)
        assert len(slow.blob(slow.call("sendBlob", *late))) == QUEUED
    check_nothing_is_left(server, 1)


@slow
def test_a_commit_that_finds_too_many_open_files_fails_and_says_so(server):
    """A transaction that has begun has a file for its records, without which ZEO can only close the connection."""
    client, late = server.client(), server.client()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client._call("ping")
    with no_more_open_files(server):
        store_blob(client, client.new_oid(), b"data", txn)
        with pytest.raises(StorageError, match="LimitNOFILE"):
            client.tpc_vote(txn)
        client.tpc_abort(txn)
        with pytest.raises(ClientDisconnected):
            commit_blob(late)
        assert "A client cannot begin a transaction: this process has too many open files" in server.output()
    commit_blob(client)
    wait_for(late.is_connected)
    commit_blob(late)
    check_nothing_is_left(server, 2)


def test_a_client_that_cannot_be_accepted_waits_and_the_log_says_why(server):
    load(server.client())
    with contextlib.ExitStack() as stack:
        with no_more_open_files(server):
            waiting = [stack.enter_context(socket.create_connection(server.address, 30)) for _ in range(3)]
            waiting.append(stack.enter_context(socket.create_connection(server.metrics_address, 30)))
            wait_for(lambda: "The ZEO server cannot accept a connection" in server.output())
            wait_for(lambda: "The metrics endpoint cannot accept a connection" in server.output())
        assert waiting[0].recv(4) == b"\0\0\0\x02"  # the announcement of the protocol follows
    assert server.output().count("LimitNOFILE") == 2
    assert "system resource" not in server.output()


# Files that fail


def test_a_file_that_vanishes_before_its_turn_is_fetched_again(server):
    client = server.client()
    large, (name, data) = commit_blob(client, os.urandom(LARGE)), next(iter(store(client, 1, QUEUED).items()))
    with SlowClient(server.address) as slow:
        first = slow.begin_to_read((None, large))
        last = slow.call("sendBlob", *name)
        wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == LARGE + QUEUED)
        cool(server, [name])
        slow.answer(first)
        assert slow.blob(last) == data
    check_nothing_is_left(server, 1)


def test_a_blob_that_was_packed_away_before_its_turn_is_a_poskeyerror(s3, bucket_name, server):
    client = server.client()
    large, name = commit_blob(client, os.urandom(LARGE)), commit_blob(client, os.urandom(QUEUED))
    with SlowClient(server.address) as slow:
        first = slow.begin_to_read((None, large))
        last = slow.call("sendBlob", *name)
        wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == LARGE + QUEUED)
        cool(server, [name])
        (key,) = [key for key in s3.keys(bucket_name) if key.endswith(f"{u64(name[1]):x}.blob")]
        s3.client.delete_object(Bucket=bucket_name, Key=key)
        slow.answer(first)
        with pytest.raises(AssertionError, match="POSKeyError"):
            slow.blob(last)
        slow.answer(slow.call("ping"))


def test_a_file_that_is_cut_short_while_it_is_sent_is_fetched_and_the_client_gets_the_rest(server):
    client = server.client()
    ((name, data),) = store(client, 1, LARGE).items()
    with SlowClient(server.address) as slow, SlowClient(server.address) as other:
        readers = {slow: slow.begin_to_read((None, name)), other: other.begin_to_read((None, name))}
        (path,) = set(cached(server))
        os.chmod(path, 0o600)
        os.truncate(path, LARGE // 2)
        for reader, number in readers.items():
            assert reader.blob(number) == data
    check_nothing_is_left(server, 1)


def test_when_the_rest_cannot_be_had_the_connection_ends_and_the_log_names_the_client(s3, server):
    client = server.client()
    ((name, _),) = store(client, 1, LARGE).items()
    with SlowClient(server.address) as slow:
        slow.begin_to_read((None, name))
        (path,) = set(cached(server))
        os.chmod(path, 0o600)
        os.truncate(path, LARGE // 2)
        s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
        slow.rest()  # has an end
    assert "Delete the *.dl files in its blob-dir" in server.output()
    check_nothing_is_left(server, 1)


# Clients that vanish


def test_a_client_that_vanishes_while_it_is_sent_blobs_leaves_nothing(server):
    client = server.client()
    names = [*store(client, 1, LARGE), *store(client, 20, QUEUED)]
    with SlowClient(server.address) as slow:
        for name in names:
            slow.call("sendBlob", *name)
        slow.async_("sendBlob", *names[-1])  # which no stock client does
        wait_for(lambda: server.metrics()("s3blobs_cache_pinned_bytes") == LARGE + 20 * QUEUED)
        wait_for(lambda: len(cached(server)) == 1)
    check_nothing_is_left(server, 1)
    load(client)


def test_a_client_that_vanishes_while_its_blobs_are_fetched_leaves_nothing(s3, server):
    client = server.client()
    names = store(client, 3, 1000)
    cool(server, names)
    s3.misbehave(operation="GetObject", hang=True)
    with SlowClient(server.address) as slow:
        for name in names:
            slow.call("sendBlob", *name)
        slow.async_("sendBlob", *next(iter(names)))
        s3.wait_for("GetObject", 3)
    wait_for(lambda: server.metrics()("zeo_connections") == 1)
    s3.behave()
    wait_for(lambda: server.metrics()("s3blobs_cache_files") == 3)
    check_nothing_is_left(server, 1)


def test_a_server_that_closes_the_connection_in_the_middle_of_a_blob_ends_no_blob_early(server):
    client = server.client()
    ((name, _),) = store(client, 1, LARGE).items()
    with SlowClient(server.address) as slow:
        slow.begin_to_read((None, name))
        slow.async_("nothing_like_it")  # ZEO closes the connection of who asks for what there is not
        wait_for(lambda: server.metrics()("zeo_connections") == 1)
        received, answers = slow.rest()
        assert len(received) < LARGE
        assert not answers and "receiveBlobStop" not in slow.received
    check_nothing_is_left(server, 1)


def test_small_blobs_of_one_client_do_not_wait_for_all_those_of_another(s3, start):
    server = start(options={"s3_concurrency": 1})
    client = server.client()
    names = list(store(client, 30, 1000))
    cool(server, names)
    s3.forget()
    s3.misbehave(operation="GetObject", hang=True, times=1)
    with SlowClient(server.address) as greedy, SlowClient(server.address) as modest:
        for name in names[:-1]:
            greedy.call("sendBlob", *name)
        s3.wait_for("GetObject")
        number = modest.call("sendBlob", *names[-1])
        modest.answer(modest.call("ping"))
        s3.behave()
        modest.answer(number)
        asked = [request.path for request in s3.requests("GetObject")]
    place = next(place for place, path in enumerate(asked) if f"{u64(names[-1][0]):x}/" in path)
    assert place <= 2
