"""A planned stop: stock clients get the blobs that are being sent, nothing begins, and it takes bounded time."""

import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time

import pytest
import ZEO.tests
from ZEO.Exceptions import ClientDisconnected
from ZODB.Connection import TransactionMetaData
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle

from tests.support.slow_client import LARGE, SlowClient
from tests.support.speed import slow, slow_after, slow_but
from tests.support.zeo_clients import (
    MB,
    RECORD,
    SOON,
    blob,
    commit_blob,
    commit_object,
    leftovers,
    store_blob,
    uncache,
    wait_for,
)
from tests.support.zeo_server import SECTION

#: What the server says when it has waited for too long.
GAVE_UP = "the blobs being sent have not arrived at"


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def large(server):
    """The data of a large blob, and its (oid, tid)."""
    return store_large(server)


def store_large(server, **client):
    data = os.urandom(LARGE)
    return data, commit_blob(server.client(**client), data)


@pytest.fixture
def half(server, large):
    """A client in the middle of receiving it; it is the only one on whom the server waits."""
    with SlowClient(server.address) as client:
        client.begin_to_read(large)
        yield client


def interrupt(server, number=signal.SIGTERM):
    """Send it the signal, and wait until it waits for its clients."""
    server.signal(number)
    wait_for(lambda: "Stopping: waiting" in server.output())


def end(server):
    """Wait for its end; return its exit status."""
    status = server._process.wait(60)
    assert GAVE_UP not in server.output()
    return status


@pytest.fixture
def server_with(start, tmp_path, monkeypatch):
    """Starts a server in which this code runs before it opens its storages."""

    def start_with(code):
        package = tmp_path / "changed"
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(code))
        (package / "component.xml").write_text("<component/>")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        return start(storages=lambda settings: "%import changed\n" + SECTION.format(**settings))

    return start_with


# Blobs arrive whole

READER = """
    import hashlib, os, signal, ssl, sys, threading
    from ZEO.ClientStorage import ClientStorage
    from ZEO.Exceptions import ClientDisconnected

    host, port, blob_dir, oid, tid, certificates = sys.argv[1:]
    name = bytes.fromhex(oid), bytes.fromhex(tid)
    chunks = 0

    class Reader(ClientStorage):
        def receiveBlobChunk(self, *args):  # stops in the middle of the blob, like a process that gets no CPU
            global chunks
            chunks += 1
            if chunks == 20:
                os.kill(os.getpid(), signal.SIGSTOP)
            super().receiveBlobChunk(*args)

    context = None
    if certificates:
        context = ssl.create_default_context(cafile=f"{certificates}/server.pem")
        context.load_cert_chain(f"{certificates}/client.pem", f"{certificates}/client_key.pem")
        context.check_hostname = False
    client = Reader((host, int(port)), blob_dir=blob_dir, wait_timeout=30, min_disconnect_poll=0.1, ssl=context)

    def ask_without_end():
        try:
            while True:
                client._call("ping")
        except ClientDisconnected:
            pass

    def read():
        path = client.loadBlob(*name)
        with open(path, "rb") as file:
            print(hashlib.sha256(file.read()).hexdigest(), flush=True)
        os.unlink(path)

    others = [threading.Thread(target=ask_without_end) for _ in range(5)]
    for other in others:
        other.start()
    read()
    for other in others:
        other.join()
    sys.stdin.readline()
    read()
    client.close()
"""


@pytest.mark.parametrize("transport", slow_but("plain", of=["plain", "tls"]))
def test_a_stock_client_gets_the_whole_blob_and_goes_on_after_the_restart(start, tmp_path, transport):
    """It stands still when the signal comes, and its other threads never stop sending requests."""
    certificates = os.path.dirname(ZEO.tests.__file__) if transport == "tls" else ""
    server = start(zeo=tls(certificates))
    data, name = store_large(server, **({"ssl": context(certificates)} if certificates else {}))
    script = tmp_path / "reader.py"
    script.write_text(textwrap.dedent(READER))
    blob_dir = tmp_path / "blobs-of-the-reader"
    arguments = [*map(str, server.address), str(blob_dir), *(part.hex() for part in name), certificates]
    reader = subprocess.Popen(
        [sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        _, status = os.waitpid(reader.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        interrupt(server)
        reader.send_signal(signal.SIGCONT)
        expected = hashlib.sha256(data).hexdigest()
        assert reader.stdout.readline().strip() == expected
        assert end(server) == 0
        assert not list(blob_dir.rglob("*.dl"))
        server.start()
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline().strip() == expected
        assert reader.wait(60) == 0
    finally:
        reader.kill()
        reader.communicate()


def tls(certificates):
    lines = f"certificate {certificates}/server.pem\nkey {certificates}/server_key.pem\n"
    return {"<ssl>": f"\n{lines}authenticate {certificates}/client.pem\n</ssl>"} if certificates else {}


def context(certificates):
    context = ssl.create_default_context(cafile=f"{certificates}/server.pem")
    context.load_cert_chain(f"{certificates}/client.pem", f"{certificates}/client_key.pem")
    context.check_hostname = False
    return context


def test_the_connection_is_the_clients_to_close(server, large, half):
    """If the server did, what the client sends meanwhile could make it lose what it has not read yet."""
    interrupt(server)
    assert half.rest()[0] == large[0]
    for _ in range(100):
        half.call("ping")
        time.sleep(0.001)
    assert server._process.poll() is None
    half.__exit__()
    assert end(server) == 0


@pytest.mark.parametrize(
    "number, status", slow_after(1, of=[("SIGTERM", 0), ("SIGINT", 0), ("SIGHUP", 1)], unpack=True)
)
def test_runzeo_ends_as_it_does_on_every_signal(server, large, half, number, status):
    interrupt(server, getattr(signal, number))
    data, _ = half.rest()
    assert data == large[0]
    half.__exit__()
    assert end(server) == status
    assert f"terminated by {number}" in server.output() or f"restarted by {number}" in server.output()


@slow
def test_a_signal_in_the_middle_of_a_message_does_no_harm(server_with):
    """It comes while the server prepares a part of the blob; the stock server loses that, and may send what follows."""
    server = server_with("""
        import signal
        from zodb_s3blobs.zeo.sending import SentBlob

        read, parts = SentBlob._read, 0

        def read_interrupted(self, size):
            global parts
            parts += 1
            if parts == 100:
                signal.raise_signal(signal.SIGTERM)
            return read(self, size)

        SentBlob._read = read_interrupted
        """)
    data, name = store_large(server)
    with SlowClient(server.address) as client:
        number = client.call("sendBlob", *name)
        received, answers = client.rest()
    assert received == data
    assert answers == {number: None}
    assert end(server) == 0


def test_all_that_was_answered_arrives_and_what_is_asked_later_is_not_answered(server, large):
    other = server.client()
    before = other.lastTransaction()
    with SlowClient(server.address) as client:
        client.answer(client.call("tpc_begin", 7, b"", b"", {}, None, " "))
        client.async_("storea", client.answer(client.call("new_oids", 1))[0], ZERO, zodb_pickle(MinPO(1)), 7)
        client.answer(client.call("vote", 7))
        sent = client.begin_to_read(large)
        finished = client.call("tpc_finish", 7)
        wait_for(lambda: other._call("lastTransaction") != before)
        interrupt(server)
        client.call("lastTransaction")
        client.call("sendBlob", *large[1])
        client.async_("storeBlobChunk", bytes(MB))
        data, answers = client.rest()
    assert data == large[0]
    assert answers.keys() == {sent, finished}
    assert end(server) == 0
    server.start()
    assert server.client().lastTransaction() == answers[finished] > before


# Nothing begins


@slow
def test_clients_with_nothing_under_way_are_not_kept(start, tmp_path):
    def storages(settings):
        return SECTION.format(**settings) + f"<filestorage 2>\n path {tmp_path}/2.fs\n</filestorage>"

    server = start(storages=storages)
    large = store_large(server)
    idle, stock = server.client(wait_timeout=1), server.client(wait_timeout=1, storage="2")
    with SlowClient(server.address) as client:
        client.begin_to_read(large)
        interrupt(server)
        wait_for(lambda: not (idle.is_connected() or stock.is_connected()))
        for other in idle, stock:
            with pytest.raises(ClientDisconnected):
                other._call("lastTransaction")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, 30)
        assert client.rest()[0] == large[0]
    assert end(server) == 0


def test_transactions_that_have_not_been_finished_never_are(s3, bucket_name, server, half, background):
    """Neither one whose upload ends meanwhile, nor one that has voted, nor one that waits for the commit lock."""
    writer, voter, next_writer, watcher = (server.client(wait_timeout=1) for _ in range(4))
    wait_for(lambda: len(s3.keys(bucket_name)) == 1)  # the staged upload of the large blob is deleted after its commit
    before = watcher.lastTransaction(), s3.keys(bucket_name)
    s3.misbehave(operation="PutObject", hang=True)
    s3.forget()
    first = background(commit_blob, writer)
    s3.wait_for("PutObject")
    txn = TransactionMetaData()
    voter.tpc_begin(txn)
    voter.store(voter.new_oid(), ZERO, zodb_pickle(MinPO()), "", txn)
    voter.tpc_vote(txn)
    second = background(commit_object, next_writer)
    wait_for(lambda: watcher._call("server_status")["waiting"] == 1)
    interrupt(server)
    s3.behave()
    for commit in first, second:
        assert isinstance(commit.exception(60), ClientDisconnected)
    wait_for(lambda: s3.keys(bucket_name) == before[1])
    half.rest()
    half.__exit__()
    assert end(server) == 0
    server.start()
    assert (server.client().lastTransaction(), s3.keys(bucket_name)) == before
    assert leftovers(server) == []


def test_a_stop_leaves_nothing_of_a_transaction_that_has_voted(s3, bucket_name, server):
    """Nor does it leave the base locked, for which a pack would wait, and the end of the process for the pack."""
    client = server.client(wait_timeout=1)
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    store_blob(client, client.new_oid(), b"data", txn)
    client.tpc_vote(txn)
    assert len(s3.keys(bucket_name)) == 1
    assert server.stop() < SOON
    assert s3.keys(bucket_name) == []


@slow
def test_a_blob_that_is_still_being_fetched_is_not_begun(s3, server, large, half, background, tmp_path):
    name = commit_blob(server.client(), b"cold")
    uncache(server, *name)
    s3.misbehave(operation="GetObject", hang=True)
    reader = server.client(wait_timeout=1, blob_dir=str(tmp_path / "reader"))
    read = background(blob, reader, *name)
    s3.wait_for("GetObject")
    interrupt(server)
    s3.behave()
    assert isinstance(read.exception(60), ClientDisconnected)
    assert not list((tmp_path / "reader").rglob("*.dl"))
    half.rest()
    half.__exit__()
    assert end(server) == 0
    server.start()
    wait_for(reader.is_connected)
    assert blob(reader, *name) == b"cold"


# In bounded time


@slow
def test_a_client_that_takes_nothing_is_given_up(server_with):
    server = server_with("""
        from zodb_s3blobs.zeo import stop as zeostop

        zeostop.LONGEST = 1.0
        """)
    large = store_large(server)
    with SlowClient(server.address) as client:
        client.begin_to_read(large)
        assert 1 <= server.stop() < 1 + SOON
    assert server._process.returncode == 0
    assert f"Stopping: after 1 seconds, {GAVE_UP}" in server.output()


def test_the_second_signal_ends_at_once(server, half):
    interrupt(server)
    assert server.stop() < SOON
    assert end(server) == 0


def test_a_client_that_has_just_its_connection_is_not_waited_for(server):
    """It may be a machine that is gone without the server's knowledge."""
    commit_blob(server.client(), RECORD)
    with SlowClient(server.address):
        assert server.stop() < SOON
    assert end(server) == 0


def test_a_client_that_has_gone_is_not_waited_for(server, half):
    interrupt(server)
    started = time.monotonic()
    half.__exit__()
    assert end(server) == 0
    assert time.monotonic() - started < SOON
