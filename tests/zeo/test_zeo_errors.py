"""Whatever goes wrong in the server, a client is answered, with an exception that it can decode without boto3."""

import asyncio
import contextlib
import errno
import inspect
import json
import os
import re
import socket
import string
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future

import botocore.exceptions
import pytest
import urllib3
import urllib3.exceptions
import ZEO.asyncio.client
import ZODB.config
import zope.event
from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ServerException
from ZEO.StorageServer import Serving, StorageServer, run_in_thread
from ZODB.POSException import (
    BTreesConflictError,
    ConflictError,
    MultipleUndoErrors,
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    TransactionTooLargeError,
    UndoError,
)
from ZODB.utils import p64, u64

from tests.support.slow_client import LARGE, SlowClient
from tests.support.speed import slow
from tests.support.zeo_clients import blob, commit_blob, load, uncache
from zodb_s3blobs.blobdir import BlobDirectoryError
from zodb_s3blobs.workers import Completion, Deadline
from zodb_s3blobs.zeo import errors as zeoerrors

OID, TID = p64(1), p64(2)
SECRET = "an-access-key-that-nobody-is-to-see"


class Unsendable:
    """What cannot be pickled, and would tell a secret."""

    def __init__(self):
        self.lock = threading.Lock()

    def __repr__(self):
        return SECRET


class CrowdedConflict(ConflictError):
    """As the errors of RelStorage: nothing that a client knows."""


class LostKey(POSKeyError):
    pass


class FullDisk(StorageError):
    pass


class NotMapped(KeyError):
    pass


# What a client is sent


def seen_by_a_client(error):
    """The exception that a stock client makes of what it is sent for ``error``, and raises."""
    name, content = zeoerrors.plain(error)
    assert zeoerrors.is_plain(content)
    factory = ZEO.asyncio.client.exc_factories.get(name)
    return factory(name, content) if factory else ServerException(name, content)


def with_attributes(error, **attributes):
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def test_the_classes_that_clients_make_again_are_zeos():
    names = {f"{kind.__module__}.{kind.__name__}" for kind in zeoerrors.REMADE}
    assert names == {name for name in ZEO.asyncio.client.exc_factories if not name.startswith("exceptions.")}


@pytest.mark.parametrize(
    "error",
    [
        POSKeyError(OID),
        POSKeyError("No blob file", OID, TID),
        ReadOnlyError(),
        StorageTransactionError(None, 7),
        ConflictError("a message", oid=OID, serials=(TID, OID)),
        ReadConflictError(oid=OID, serials=(TID, OID)),
        BTreesConflictError(1, 2, 3, 1),
        MultipleUndoErrors([(OID, "a reason")]),
        KeyError("name"),
        TypeError("what", 3),
    ],
    ids=repr,
)
def test_errors_that_clients_know_arrive_as_they_are(error, caplog):
    seen = seen_by_a_client(error)
    assert type(seen) is type(error)
    assert (str(seen), vars(seen)) == (str(error), vars(error))
    assert not caplog.records


@pytest.mark.parametrize(
    "error",
    [StorageError("a sentence"), UndoError("a reason", OID), TransactionTooLargeError(1 << 40)],
    ids=repr,
)
def test_other_errors_of_zodb_arrive_with_their_names_and_all_they_say(error, caplog):
    assert zeoerrors.plain(error) == (f"ZODB.POSException.{type(error).__name__}", vars(error) or error.args)
    assert not caplog.records


def test_errors_derived_from_known_ones_arrive_as_these(caplog):
    error = CrowdedConflict("a message", oid=OID, serials=(TID, OID))
    seen = seen_by_a_client(with_attributes(error, more=Unsendable()))
    assert type(seen) is ConflictError  # so that the transaction is tried again
    assert (seen.message, seen.oid, seen.serials) == ("a message", OID, (TID, OID))
    seen = seen_by_a_client(with_attributes(LostKey(OID), more=Unsendable()))
    assert type(seen) is POSKeyError
    assert seen.args == (OID,)
    assert not caplog.records


def test_attributes_do_not_take_the_place_of_arguments():
    """A stock server sends a KeyError with a note as KeyError('__notes__')."""
    seen = seen_by_a_client(with_attributes(KeyError("name"), __notes__=["from somewhere"]))
    assert seen.args == ("name",)


def test_the_reasons_of_undo_errors_arrive_as_their_texts(caplog):
    """FileStorage's are exceptions, which no client can show that speaks msgpack."""
    error = MultipleUndoErrors([(OID, UndoError("a reason", OID))])
    assert str(seen_by_a_client(error)) == str(error)
    assert not caplog.records


@pytest.mark.parametrize(
    "error, text",
    [
        (FullDisk("no room"), "FullDisk: no room"),
        (BlobDirectoryError("It is not there"), "BlobDirectoryError: It is not there"),
        (FileNotFoundError(2, "No such file", "/a/path"), "FileNotFoundError: [Errno 2] No such file: '/a/path'"),
        (OSError("http://user:password@host"), "builtins.OSError in the server; the server's log has more"),
        (NotMapped("x"), "test_zeo_errors.NotMapped in the server; the server's log has more"),
        (ValueError("x"), "builtins.ValueError in the server; the server's log has more"),
        (StorageError(ValueError("x")), "ZODB.POSException.StorageError in the server; the server's log has more"),
        (with_attributes(StorageError("x"), lock=Unsendable()), "StorageError: x"),
        (MultipleUndoErrors([(OID, ValueError("x"))]), "MultipleUndoErrors in the server"),
        (with_attributes(MultipleUndoErrors([(OID, "x")]), _errs=[]), "MultipleUndoErrors"),
        (ConflictError.__new__(ConflictError), "ConflictError in the server"),
        (asyncio.CancelledError(), "CancelledError in the server"),
    ],
    ids=repr,
)
def test_anything_else_arrives_as_a_storage_error_and_is_logged_with_its_traceback(error, text, caplog):
    try:
        raise error from KeyError("its cause")
    except BaseException as caught:
        name, content = zeoerrors.plain(caught)
    assert name == "ZODB.POSException.StorageError"
    assert [type(item) for item in content] == [str]
    assert text in content[0]
    (record,) = caplog.records
    assert record.exc_info[1] is error
    assert "test_zeo_errors.py" in caplog.text


class Name(str):
    pass


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(1 << 63), (1 << 64) - 1, 1.5, "text \u20ac", b"\xff", (), [1, (b"x", [None])], {"a": {"b": [1]}}],
    ids=repr,
)
def test_plain_values(value):
    assert zeoerrors.is_plain(value)


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Name("text"),
        ValueError(),
        ValueError,
        {1},
        bytearray(b"x"),
        1 << 64,  # msgpack
        -(1 << 63) - 1,
        "\udc80",
        {1: 2},
        {(1, 2): 3},
        {"a": Unsendable()},
        [1, (2, [Name("text")])],
        endless(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_some_client_cannot_decode_is_not_plain(value):
    assert not zeoerrors.is_plain(value)


# From the server to a client without boto3

CLIENT = """
    import json, sys

    for name in "boto3", "botocore", "s3transfer", "urllib3", "requests", "zodb_s3blobs":
        sys.modules[name] = None  # as if it was not installed

    from ZEO.ClientStorage import ClientStorage
    from ZODB.Connection import TransactionMetaData
    from ZODB.POSException import StorageError
    from ZODB.utils import p64

    port, blob_dir, *jobs = sys.argv[1:]
    client = ClientStorage(("127.0.0.1", int(port)), blob_dir=blob_dir, wait_timeout=30)

    def vote(way, number):
        txn = TransactionMetaData(description=f"{way} {number}")
        client.tpc_begin(txn)
        try:
            client.tpc_vote(txn)
        finally:
            client.tpc_abort(txn)

    calls = {
        "read": lambda number: client.loadBlob(p64(number), p64(1)),
        "late read": lambda number: client.loadBlob(p64(number), p64(2)),
        "vote": lambda number: vote("vote", number),
        "late-vote": lambda number: vote("late-vote", number),
        "pack": lambda number: client.pack(float(number), wait=True),
    }
    for job in jobs:
        way, count = job.split(":")
        for number in range(int(count)):
            try:
                calls[way](number)
            except Exception as error:
                answer = [isinstance(error, StorageError), type(error).__name__, *error.args]
            else:
                answer = None
            print(json.dumps([way, number, answer]), flush=True)
    client.close()
"""

WAYS = ("read", "late read", "vote", "late-vote", "pack")


def classes(module):
    found = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    return [kind for kind in found if issubclass(kind, Exception)]


def made(kind, value):
    """An instance in whose every corner there is ``value``."""
    fields = [name for _, name, _, _ in string.Formatter().parse(getattr(kind, "fmt", "")) if name]
    attempts = [
        lambda: kind(**dict.fromkeys(fields, value)),
        lambda: kind({"Error": {"Code": value, "Message": value}}, value),
        *(lambda count=count: kind(*[value] * count) for count in range(1, 5)),
        lambda: kind(7, 9),
        lambda: kind(Answer(), "length"),
        lambda: kind("utf-8", b"x", 0, 1, "reason"),
    ]
    for attempt in attempts:
        try:
            error = attempt()
            str(error)
        except (TypeError, KeyError, AttributeError, ValueError):
            continue
        error.args = (*error.args, value)
        error.hidden = value
        return error
    raise AssertionError(f"{kind} cannot be made")


class Answer:
    """What urllib3 wants to have got."""

    length_remaining = 1

    def tell(self):
        return 1


BUILTIN = [OSError, FileNotFoundError, UnicodeDecodeError, RecursionError, SystemError, MemoryError, AssertionError]

#: Each with what no server can pickle, and with what no client can decode that has no urllib3.
FOREIGN = [
    made(kind, value)
    for kind in [*classes(botocore.exceptions), *classes(urllib3.exceptions), *BUILTIN]
    for value in [Unsendable(), urllib3.Timeout(1), urllib3.HTTPConnectionPool("localhost")]
]

#: ZEO catches none of these.
UNCAUGHT = [asyncio.CancelledError(), SystemExit(1), KeyboardInterrupt(), GeneratorExit()]


@pytest.fixture
def storage(s3, bucket_name, tmp_path):
    storage = ZODB.config.storageFromString(f"""
        %import zodb_s3blobs
        <s3blobstorage>
          bucket-name {bucket_name}
          s3-endpoint-url {s3.url}
          s3-access-key test
          s3-secret-key test-secret
          cache-dir {tmp_path}/cache
          <mappingstorage/>
        </s3blobstorage>
        """)
    yield storage
    storage.close()


@pytest.fixture(params=["pickle", "msgpack"])
def address(request, storage):
    """Of a server with that storage, which runs in a thread."""
    if request.param == "msgpack":
        pytest.importorskip("msgpack")
    server = StorageServer(("127.0.0.1", 0), {"1": storage}, msgpack=request.param == "msgpack")
    server.start_thread()
    yield server.addr
    server.close()


@pytest.fixture
def client(address, tmp_path):
    client = ClientStorage(address, blob_dir=str(tmp_path / "client"), wait_timeout=30, min_disconnect_poll=0.1)
    yield client
    client.close()


def fail(storage, errors):
    """Let the storage fail with these, in all the ways that `CLIENT` asks for."""

    def late(error):
        future = Future()
        threading.Timer(0.001, future.set_exception, [error]).start()
        return future

    def request_blob(oid, serial, owner):
        if serial == p64(1):
            raise errors[u64(oid)]
        return late(errors[u64(oid)])

    def number_of(transaction, way):
        wanted, _, number = transaction.description.decode().partition(" ")
        return int(number) if wanted == way else None

    def tpc_vote(transaction):
        number = number_of(transaction, "vote")
        if number is not None:
            raise errors[number]
        voting.append(transaction)

    def vote_without_waiting(vote, call):
        result = stock_vote(vote, call)
        number = number_of(voting.pop(), "late-vote")
        vote.uploads = Completion([late(errors[number])], Deadline(60), StorageError("too late"))
        return result

    def pack(pack_time, referencesf):
        raise errors[int(pack_time)]

    voting = []
    stock_vote = storage.vote_without_waiting
    for function in request_blob, tpc_vote, vote_without_waiting, pack:
        setattr(storage, function.__name__, function)


def answers(address, tmp_path, *jobs):
    """What a client process is answered, by way and number."""
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    arguments = [sys.executable, str(script), str(address[1]), str(tmp_path / "blobs"), *jobs]
    process = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, timeout=100)
    assert process.returncode == 0
    return {(way, number): answer for way, number, answer in map(json.loads, process.stdout.splitlines())}


@slow
def test_every_error_of_boto3_reaches_a_client_that_has_no_boto3(address, storage, tmp_path, caplog):
    caplog.handler.setFormatter(_NoTracebacks())  # of thousands of errors
    fail(storage, FOREIGN)
    received = answers(address, tmp_path, *(f"{way}:{len(FOREIGN)}" for way in WAYS))
    assert len(received) == len(FOREIGN) * len(WAYS) > 1000
    for (way, number), answer in received.items():
        kind = type(FOREIGN[number])
        is_storage_error, name, sent_name, (text,) = answer
        assert (is_storage_error, name, sent_name) == (True, "ServerException", "ZODB.POSException.StorageError"), way
        assert kind.__name__ in text
        assert SECRET not in text


class _NoTracebacks:
    def format(self, record):
        return record.getMessage()


def test_a_client_that_waited_for_the_server_is_served_like_the_others(s3, storage, tmp_path):
    """It is connected before the storage's section learns of the server."""
    ours, its = socket.socketpair()

    def connect(event):
        if isinstance(event, Serving):
            loop = event.server.acceptor.event_loop
            loop.run_until_complete(loop.connect_accepted_socket(event.server.acceptor.factory, its))

    zope.event.subscribers.insert(0, connect)
    try:
        server = StorageServer(("127.0.0.1", 0), {"1": storage})
    finally:
        zope.event.subscribers.remove(connect)
    server.start_thread()
    try:
        with (
            contextlib.closing(ClientStorage(server.addr, blob_dir=str(tmp_path / "client"), wait_timeout=30)) as other,
            SlowClient(None, connection=ours) as early,
        ):
            name = commit_blob(other, b"data")
            storage.uncache(*name)
            s3.misbehave(operation="GetObject", hang=True)
            asked = early.call("sendBlob", *name)
            s3.wait_for("GetObject", 1)
            load(other)  # which answers although S3 does not
            s3.behave()
            assert early.blob(asked) == b"data"
    finally:
        server.close()


def test_an_outage_is_one_line_of_the_log_for_each_request_that_it_fails(s3, start):
    server = start(options={"s3_max_attempts": 1})
    client = server.client()
    name = commit_blob(client, b"data")
    uncache(server, *name)
    s3.misbehave(operation="(Get|Put)Object", status=503)
    other = server.client(blob_dir=str(server.directory / "other"))
    for request in lambda: other.loadBlob(*name), lambda: commit_blob(client, b"more"):
        with pytest.raises(StorageError, match="the service answered"):
            request()
    s3.behave()
    lines = [line for line in server.output().splitlines() if "the service answered" in line]
    assert [re.search(r"errors (.*?) \(client .*?\): (Could not \w+)", line).groups() for line in lines] == [
        ("A blob cannot be sent", "Could not read"),
        ("A transaction is aborted, because its vote fails", "Could not store"),
    ]
    assert "Traceback" not in server.output()


def test_what_is_no_exception_does_not_leave_a_client_waiting(address, storage, tmp_path):
    fail(storage, UNCAUGHT)
    received = answers(address, tmp_path, *(f"{way}:{len(UNCAUGHT)}" for way in ("late read", "late-vote", "pack")))
    assert len(received) == 3 * len(UNCAUGHT)
    for (_, number), (is_storage_error, name, _, (text,)) in received.items():
        assert is_storage_error and name == "ServerException"
        assert type(UNCAUGHT[number]).__name__ in text


def test_a_download_that_was_cancelled_is_an_error(client, storage):
    def request_blob(oid, serial, owner):
        future = Future()
        threading.Timer(0.001, future.cancel).start()
        return future

    storage.request_blob = request_blob
    with pytest.raises(StorageError, match="CancelledError"):
        client.loadBlob(OID, TID)


# Replies


def test_a_reply_that_cannot_be_sent_is_an_error_and_the_connection_goes_on(client, storage):
    storage.history = lambda oid, size: [Unsendable()]
    with pytest.raises(StorageError, match="cannot send its reply"):
        client.history(OID)
    load(client)


def test_so_it_is_behind_a_blob_in_the_queue_of_the_connection(address, storage, client):
    """A stock server goes through the reply there as if it was a number of messages, and then stands still."""
    data = os.urandom(LARGE)
    name = commit_blob(client, data)
    storage.history = lambda oid, size: [b"no message", Unsendable()]
    with SlowClient(address) as slow:
        sent = slow.call("sendBlob", *name)
        failed = slow.call("history", OID, 1)
        last = slow.call("lastTransaction")
        assert slow.answer(sent) is None
        with pytest.raises(AssertionError, match="cannot send its reply"):
            slow.answer(failed)
        assert slow.answer(last) == name[1]


def test_so_it_is_when_it_comes_from_a_thread(client, storage):
    storage.history = lambda oid, size: run_in_thread(Unsendable)
    with pytest.raises(StorageError, match="cannot send its reply"):
        client.history(OID)
    load(client)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that can be opened and not read")
@pytest.mark.parametrize("ways", [["cached_blob"], ["cached_blob", "pinned"]])
def test_a_blob_that_cannot_be_read_is_fetched_again_and_leaves_nobody_waiting(address, storage, client, ways):
    data = os.urandom(LARGE)
    name = commit_blob(client, data)
    for way in ways:
        _break_files(storage, way)
    with SlowClient(address) as slow:
        number = slow.call("sendBlob", *name)
        if "pinned" in ways:
            with pytest.raises(AssertionError, match=f"Cannot read /proc/self/mem: {os.strerror(errno.EIO)}"):
                slow.answer(number)
            assert slow.received == []
        else:
            assert slow.blob(number) == data
        slow.answer(slow.call("ping"))
    storage.__dict__.pop("cached_blob")
    storage.__dict__.pop("pinned", None)
    assert len(blob(client, *name)) == LARGE


def _break_files(storage, way):
    """Let the method return files that can be opened and not read."""
    stock = getattr(storage, way)

    def broken(*arguments):
        pin = stock(*arguments)
        if pin is not None:
            pin.path = "/proc/self/mem"
        return pin

    setattr(storage, way, broken)
