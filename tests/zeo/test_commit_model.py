"""Commits against a model: whatever clients, S3 and the clocks do, tids ascend, and what is acknowledged is there.

Hypothesis makes up histories of a ZEO server: clients that store, undo, restore, vote, finish, abort and vanish, each
at any moment; uploads that take long, fail, or lose their answers; conflicts, packs, stops, and clocks that jump. All
runs in one thread and by a clock of its own, so a history is the same each time. What is committed is told by the
base's own iterator.
"""

import os
import shutil
import time
from base64 import encodebytes
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from persistent import Persistent
from persistent.mapping import PersistentMapping
from zc.zlibstorage import ZlibStorage
from ZEO.asyncio.marshal import decoder, encoder
from ZEO.asyncio.server import ServerProtocol
from ZEO.StorageServer import Serving, StorageServer
from ZODB.blob import Blob
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSError
from ZODB.serialize import ObjectWriter, referencesf
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import p64, u64, z64

from tests.support.held_bucket import OUTCOMES, HeldBucket, Service
from tests.support.models import run_model
from tests.support.speed import slow_after
from tests.support.stepped import Clock, Loop, Workers
from zodb_s3blobs.bases import adapter_for
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.commit import kept, pending, staging, upload
from zodb_s3blobs.commit.services import CommitServices
from zodb_s3blobs.commit.tids import GRACE, LONGEST, ROUNDS, Tids
from zodb_s3blobs.fetch import Fetcher
from zodb_s3blobs.garbage.collector import Collector
from zodb_s3blobs.linker import Linker
from zodb_s3blobs.monitoring.exporter import Exported
from zodb_s3blobs.storage import Components, S3BlobStorage
from zodb_s3blobs.zeo import handler, voting

DAY = 86400
RECORD = ObjectWriter().serialize(Blob())  # an undo copies no blob of a record that is not pickled like this
TIMEOUT = 90.0
#: What is large, and what is worth keeping, in bytes; see the fixture `small_sizes`.
LARGE, WORTH_KEEPING = 64, 16
SIZES = {"small": 8, "middle": 24, "large": 100}

#: Why the base may refuse a transaction.
REFUSALS = {"ConflictError", "UndoError", "MultipleUndoErrors", "POSKeyError"}

BASES = ["file", "mapping", "zlib inside", "zlib around", "demo"]
CLIENTS = range(3)
#: Objects that all clients change: without blobs, and with.
OBJECTS, BLOBS = [p64(1), p64(2)], [p64(11), p64(12)]


@pytest.fixture
def small_sizes(monkeypatch):
    for module in pending, voting, kept:
        monkeypatch.setattr(module, "PART", LARGE)
    for module in pending, kept, upload:
        monkeypatch.setattr(module, "WORTH_KEEPING", WORTH_KEEPING)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def workers(monkeypatch):
    return Workers(monkeypatch)


class Lease:
    """The prefix is this server's."""

    claimed = frozenset()
    is_on_probation = False

    def renew_now(self):
        pass

    require = verify = close = renew_now


class Server:
    """A ZEO server without sockets."""

    def __init__(self, directory, kind, clients_resolve, service, clock, workers):
        self.loop = Loop(clock, workers)
        self.bucket = HeldBucket(service)
        base = self._base(kind, str(directory / "Data.fs"))
        self.storage = S3BlobStorage(base, self._parts(base, directory / "cache"))
        self.served = served = ZlibStorage(self.storage) if kind == "zlib around" else self.storage
        self.zeo = StorageServer(None, {"1": served}, client_conflict_resolution=clients_resolve)
        self.zeo.acceptor = SimpleNamespace(event_loop=self.loop, close=lambda: None)
        handler._serving(Serving(self.zeo))
        self.lock = self.zeo.lock_managers["1"]
        self.temporary = directory / "cache"
        self.metrics = self.storage.metrics

    def _base(self, kind, path):
        if kind == "mapping":
            return MappingStorage()
        if kind == "demo":
            return DemoStorage(base=MappingStorage(), changes=FileStorage(path))
        return ZlibStorage(FileStorage(path)) if kind == "zlib inside" else FileStorage(path)

    def _parts(self, base, directory):
        exported = Exported("1")
        metrics = exported.metrics
        cache = self.cache = Cache(directory, 1 << 30, metrics)
        fetcher = Fetcher(self.bucket, cache, metrics)
        tids = Tids(base.lastTransaction, metrics, clock=time.monotonic)
        commits = CommitServices(self.bucket, cache, fetcher.fetch, tids, metrics, 16, TIMEOUT, 32)
        identity = adapter_for(base).own_identity
        collector = Collector(
            self.bucket, cache, commits.in_flight, commits.staging.is_live, Lease(), metrics, 0, 100, identity, DAY
        )
        self.commits = commits
        linker = Linker(None, 0, fetcher.may_lack, metrics)
        return Components(self.bucket, cache, fetcher, linker, commits, Lease(), collector, exported, lambda: None)

    def waits_with_the_lock(self):
        """How many transactions waited for S3 with the commit lock, by reason."""
        found = Counter()
        for sample in self.metrics.commit_lock_waits.collect()[0].samples:
            if sample.name.endswith("_total"):
                found[sample.labels["reason"]] += int(sample.value)
        return found

    def revisions(self):
        """All (oid, tid) of the base with data, in the order of commits."""
        return [(record.oid, txn.tid) for txn in self.storage.base.iterator() for record in txn if record.data]

    def tids(self):
        return [txn.tid for txn in self.storage.base.iterator()]

    def leftovers(self):
        return os.listdir(self.temporary / "tmp") + os.listdir(self.temporary / "incoming")

    def close(self):
        self.loop.give_up()
        self.storage.close()


class Transport:
    """A connection to a client."""

    def __init__(self, loop):
        self._loop = loop
        self.protocol = None
        self.is_open = True

    def write(self, data):
        pass

    writelines = write

    def get_extra_info(self, name):
        return ("client", 0)

    def close(self):
        self.lose(None)

    abort = close

    def lose(self, error):
        if self.is_open:
            self.is_open = False
            self._loop.call_soon(self.protocol.connection_lost, error)


@dataclass
class Answer:
    """An answer that a client waits for."""

    is_there: bool = False
    error: object = None
    value: object = None


@dataclass
class Txn:
    """What a client has put into its transaction."""

    id: int
    restored: bytes | None = None
    blobs: dict = field(default_factory=dict)  # oid -> bytes
    undone: list = field(default_factory=list)  # tids
    stores: int = 0
    is_broken: bool = False  # half a blob has arrived
    met_failure: bool = False  # an operation has failed meanwhile, or has taken too long
    vote: Answer | None = None

    @property
    def state(self):
        if self.vote is None:
            return "begun"
        if not self.vote.is_there:
            return "voting"
        if self.vote.error is not None:
            return "failed"
        return "conflicting" if self.conflicts else "voted"

    @property
    def conflicts(self):
        """What the client is to resolve before it votes again."""
        return [found for found in self.vote.value or () if isinstance(found, dict)]


class Client:
    """A client of the server: the messages of a stock one."""

    _encode, _decode = staticmethod(encoder(b"Z5")), staticmethod(decoder(b"Z5"))

    def __init__(self, server):
        self._server = server
        self.txn = None
        self._answers = {}
        self._number = 0
        self.handler = server.zeo.create_client_handler()
        self.connection = ServerProtocol(server.loop, ("client", 0), self.handler, False)
        self._transport = Transport(server.loop)
        self._transport.protocol = self.connection
        self.connection.connection_made(self._transport)
        self.connection.write_message = self._receive
        self.connection.write_message_iter = lambda messages: [self._receive(message) for message in messages]
        self.connection._first_message(b"Z5")
        assert self.call("register", "1", False).error is None

    @property
    def is_connected(self):
        return self._transport.is_open

    def _receive(self, message):
        number, flag, name, value = self._decode(message)
        if name == ".reply" and self.is_connected:
            answer = self._answers.pop(number)
            answer.is_there = True
            answer.error, answer.value = (value, None) if flag else (None, value)

    def send(self, name, *args):
        self._deliver(0, True, name, args)

    def call(self, name, *args):
        self._number += 1
        answer = self._answers[self._number] = Answer()
        self._deliver(self._number, False, name, args)
        self._server.loop.settle()
        return answer

    def _deliver(self, *message):
        if self.is_connected:
            self._server.loop.call_soon(self.connection.message_received, self._encode(*message))

    def vanish(self):
        self._transport.lose(ConnectionResetError())
        self._server.loop.settle()

    def store_blob(self, oid, serial, data, end=True):
        self.send("storeBlobStart")
        for start in range(0, len(data), 70):
            self.send("storeBlobChunk", data[start : start + 70])
        if end:
            self.send("storeBlobEnd", oid, serial, RECORD, self.txn.id)
        self._server.loop.settle()


class Model(RuleBasedStateMachine):
    """The server, its clients, and what is known of each blob."""

    def __init__(self, directory, clock, workers):
        super().__init__()
        self.clock, self.workers = clock, workers
        self.directory = directory / f"example-{time.perf_counter_ns()}"
        self.directory.mkdir()
        self.server = None
        self.service = Service()
        self.data = {}  # (oid, tid) -> bytes of what was acknowledged
        self.history = {}  # oid -> [(tid, bytes or None)] in the order of commits
        self.committed = []  # the tids of transactions in the order of their acknowledgements, since the last pack
        self.newest = z64  # the latest tid
        self.number = 0
        self.new_oids = iter(range(1000, 10**6))
        self.staged_numbers = iter(range(10**6))
        self.may_pack = True  # not a FileStorage whose tids do not ascend
        self.may_leave = False  # whether something may be in the bucket that only a pack deletes
        staging.uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{next(self.staged_numbers):032x}"))

    @initialize(kind=st.sampled_from(BASES), copies=st.booleans(), clients_resolve=st.booleans())
    def start(self, kind="file", copies=True, clients_resolve=False):
        self.kind, self.clients_resolve = kind, clients_resolve
        self.service.copies = copies
        self.open()
        self.fill()

    def open(self):
        self.server = Server(self.directory, self.kind, self.clients_resolve, self.service, self.clock, self.workers)
        self.clients = [Client(self.server) for _ in CLIENTS]
        self.server.loop.settle()

    def fill(self):
        """Commit the root, which refers to all objects, and these."""
        client = self.clients[0]
        self.begin(client)
        root = PersistentMapping({oid: reference(oid) for oid in OBJECTS + BLOBS})
        client.send("storea", z64, z64, zodb_pickle(root), client.txn.id)
        for oid in OBJECTS:
            client.send("storea", oid, z64, self.new_record(), client.txn.id)
        for oid in BLOBS:
            client.txn.blobs[oid] = self.new_data("small")
            client.store_blob(oid, z64, client.txn.blobs[oid])
        client.txn.vote = client.call("vote", client.txn.id)
        self.finish_voted(client)

    def teardown(self):
        if self.server is not None:
            try:
                self.the_end()
            finally:
                self.server.bucket.stop("works")
                self.server.close()
        shutil.rmtree(self.directory)

    def new_data(self, size):
        self.number += 1
        return b"%08d" % self.number * (SIZES[size] // 8)

    def new_record(self):
        self.number += 1
        return zodb_pickle(MinPO(self.number))

    def serial(self, oid):
        try:
            return self.server.storage.getTid(oid)
        except POSError:
            return z64

    # Clients

    def begin(self, client, tid=None):
        self.number += 1
        client.txn = Txn(self.number, tid)
        client.send("tpc_begin", client.txn.id, b"", b"", {}, tid, " ")

    def storing(self, number):
        """The client, in a transaction that it has not voted on; None if it is busy otherwise."""
        client = self.clients[number]
        if client.txn is None:
            self.begin(client)
        return client if client.txn.state == "begun" and not client.txn.is_broken else None

    @rule(number=st.sampled_from(CLIENTS), oid=st.sampled_from(OBJECTS))
    def store_object(self, number, oid):
        client = self.storing(number)
        if client is not None and client.txn.restored is None:
            client.send("storea", oid, self.serial(oid), self.new_record(), client.txn.id)
            client.txn.stores += 1

    @rule(number=st.sampled_from(CLIENTS), oid=st.sampled_from([*BLOBS, None]), size=st.sampled_from(sorted(SIZES)))
    def store_blob(self, number, oid, size):
        client = self.storing(number)
        if client is not None:
            if oid is None or client.txn.restored is not None:
                oid = p64(next(self.new_oids))
            client.txn.blobs[oid] = data = self.new_data(size)
            client.store_blob(oid, self.serial(oid), data)

    @rule(number=st.sampled_from(CLIENTS))
    def store_half_a_blob(self, number):
        client = self.storing(number)
        if client is not None:
            client.txn.is_broken = True
            client.store_blob(p64(next(self.new_oids)), z64, self.new_data("large"), end=False)

    @precondition(lambda self: hasattr(self.server.storage, "undo") and len(self.committed) > 1)
    @rule(number=st.sampled_from(CLIENTS), which=st.integers(1, 3))
    def undo(self, number, which):
        client = self.storing(number)
        if client is not None and client.txn.restored is None and not client.txn.undone:
            tid = self.committed[1:][-which:][0]  # not the one with the root
            client.send("undoa", encodebytes(tid).rstrip(b"\n"), client.txn.id)
            client.txn.undone.append(tid)

    @precondition(lambda self: self.kind in ("file", "zlib inside", "zlib around"))
    @rule(number=st.sampled_from(CLIENTS), later=st.booleans(), size=st.sampled_from(sorted(SIZES)))
    def restore(self, number, later, size):
        client = self.clients[number]
        if client.txn is None:
            newest = u64(self.newest)
            self.number += 1
            self.may_pack &= later
            self.begin(client, p64(newest + (1 << 24) + self.number if later else newest - (1 << 30) + self.number))
            self.store_blob(number, None, size)

    @rule(number=st.sampled_from(CLIENTS))
    def vote(self, number):
        client = self.clients[number]
        if client.txn is not None and client.txn.state == "begun":
            lock_was_free = self.server.lock.locked is None
            client.txn.vote = client.call("vote", client.txn.id)
            if not client.txn.blobs and not client.txn.undone and lock_was_free:
                assert client.txn.vote.is_there, "a commit without blobs waits for something"

    @rule(number=st.sampled_from(CLIENTS))
    def vote_twice(self, number):
        """As no stock client does."""
        client = self.clients[number]
        if client.txn is not None and client.txn.state == "voting":
            answer = client.call("vote", client.txn.id)
            assert answer.error is not None, "a second vote is not refused"

    @rule(number=st.sampled_from(CLIENTS))
    def finish(self, number):
        client = self.clients[number]
        if client.txn is not None and client.txn.state == "voted":
            self.finish_voted(client)

    @rule(number=st.sampled_from(CLIENTS))
    def go_on(self, number):
        """The next step of a client that behaves."""
        client = self.clients[number]
        if client.txn is None:
            self.store_blob(number, None, "small")
        elif client.txn.state == "begun":
            self.vote(number)
        elif client.txn.state == "voted":
            self.finish_voted(client)
        elif client.txn.state == "conflicting":
            self.resolve(number)
        elif client.txn.state == "failed":
            self.abort(number)

    @rule(number=st.sampled_from(CLIENTS), size=st.sampled_from([None, *sorted(SIZES)]), finishes=st.booleans())
    def commit(self, number, size, finishes):
        """All that a client can do at once: of an object without a blob, or of a blob."""
        client = self.clients[number]
        if client.txn is None:
            if size is None:
                self.store_object(number, OBJECTS[0])
            else:
                self.store_blob(number, None, size)
            self.vote(number)
            if finishes:
                self.finish(number)

    @rule(number=st.sampled_from(CLIENTS), size=st.sampled_from(sorted(SIZES)))
    def commit_slowly(self, number, size):
        """The uploads wait, while those of others work."""
        bucket = self.server.bucket
        holds, bucket.holds = bucket.holds, True
        self.commit(number, size, finishes=False)
        bucket.holds = holds

    @rule(number=st.sampled_from(CLIENTS))
    def resolve(self, number):
        """As the clients do with client-conflict-resolution: they store what they have merged, and vote again."""
        client = self.clients[number]
        if client.txn is None or client.txn.state != "conflicting":
            return
        if any(found["oid"] not in OBJECTS for found in client.txn.conflicts):
            self.abort(number)
            return
        for found in client.txn.conflicts:
            client.send("storea", found["oid"], found["serials"][0], self.new_record(), client.txn.id)
        client.txn.vote = client.call("vote", client.txn.id)

    def finish_voted(self, client):
        txn, client.txn = client.txn, None
        answer = client.call("tpc_finish", txn.id)
        assert answer.is_there, "there is no answer to tpc_finish"
        assert answer.error is None, answer.error
        assert not txn.is_broken, "a transaction with half a blob is committed"
        tid = answer.value
        if txn.restored is None:
            assert tid > self.newest, "a tid is not later than the one of an earlier commit"
        else:
            assert tid == txn.restored
            self.may_pack &= tid > self.newest  # others may have committed since it began
        self.newest = max(tid, self.newest)
        self.committed.append(tid)
        undone = {}
        for source in txn.undone:
            for oid, revisions in self.history.items():
                place = next((place for place, (of, _) in enumerate(revisions) if of == source), None)
                if place is not None:
                    undone[oid] = revisions[place - 1][1] if place else None
        for oid, data in {**undone, **txn.blobs}.items():
            self.history.setdefault(oid, []).append((tid, data))
            if data is not None:
                self.data[oid, tid] = data

    @rule(number=st.sampled_from(CLIENTS))
    def abort(self, number):
        client = self.clients[number]
        if client.txn is not None:
            txn, client.txn = client.txn, None
            answer = client.call("tpc_abort", txn.id)
            assert answer.is_there or not client.is_connected

    @rule(number=st.sampled_from(CLIENTS))
    def vanish(self, number):
        self.clients[number].vanish()
        self.clients[number] = Client(self.server)

    @precondition(lambda self: self.server.lock.locked is not None)
    @rule()
    def transaction_timeout(self):
        """What ZEO does after it: the server closes the connection of the client with the commit lock."""
        locked = self.server.lock.locked
        locked.call_soon_threadsafe(locked.connection.close)
        self.server.loop.settle()
        self.connect_again()

    def connect_again(self):
        self.clients = [client if client.is_connected else Client(self.server) for client in self.clients]

    # S3

    @rule(holds=st.sampled_from([True, True, False]))
    def hold(self, holds):
        """Let the operations of the bucket wait from now on, or work at once."""
        self.server.bucket.holds = holds

    @precondition(lambda self: self.server.bucket.held())
    @rule(which=st.integers(0, 4), outcome=st.sampled_from(OUTCOMES))
    def end_operation(self, which, outcome):
        held = self.server.bucket.held()
        self.note_failure(outcome != "works")
        self.server.bucket.end(held[which % len(held)], outcome)
        self.server.loop.settle()

    def note_failure(self, failed):
        for client in self.clients:
            if client.txn is not None and failed:
                client.txn.met_failure = True

    @precondition(lambda self: self.server.bucket.held())
    @rule()
    def release(self):
        self.server.bucket.release()
        self.server.loop.settle()

    # Time, and the operator

    @rule(seconds=st.sampled_from([GRACE, GRACE, LONGEST, TIMEOUT + 1]))
    def wait(self, seconds):
        self.note_failure(seconds > TIMEOUT and self.server.bucket.held())
        self.server.loop.advance(seconds)

    @rule(seconds=st.sampled_from([-DAY, -1, 1, DAY]))
    def clock_jumps(self, seconds):
        self.clock.wall += seconds

    @rule()
    def kept_for_a_minute(self):
        """What a conflict has left is not kept any longer."""
        while self.server.commits.kept._due:
            self.server.commits.kept._expire()
            self.server.loop.settle()

    @rule()
    def pack(self):
        """In the thread of the test: while a transaction has the lock, only the blobs are collected."""
        holds, self.server.bucket.holds = self.server.bucket.holds, False
        try:
            if self.server.lock.locked is None and self.may_pack and self.kind != "demo":
                self.server.served.pack(time.time(), referencesf)
            else:
                self.server.storage.collect_garbage()
        except (POSError, ValueError) as error:  # the clock was set back
            assert "packed to a late" in str(error), error
        self.server.bucket.holds = holds
        self.server.loop.settle()
        left = set(self.server.revisions())
        self.data = {name: data for name, data in self.data.items() if name in left}
        self.committed = [tid for tid in self.committed if tid in self.server.tids()]

    @precondition(lambda self: self.kind != "mapping")
    @rule(outcome=st.sampled_from(OUTCOMES))
    def kill(self, outcome):
        """And start again; ``outcome``: of what is under way at the bucket."""
        self.server.bucket.stop(outcome)
        self.server.close()
        self.may_leave = True
        self.open()
        self.newest = self.server.storage.lastTransaction()

    # What must hold

    @invariant()
    def holds(self):
        if self.server is None:
            return
        self.server.loop.settle()
        self.let_time_pass()
        self.no_vote_fails_without_reason()
        self.what_is_acknowledged_is_there()
        self.the_lock_waits_for_nothing_else()
        bucket = self.server.bucket
        if not bucket.held() and not any(client.txn for client in self.clients):
            self.nothing_is_left()

    def let_time_pass(self):
        """Where the lock is free, every vote that does not wait for S3 is answered soon."""
        for _ in range(20 * ROUNDS):
            waiting = [client for client in self.clients if client.txn is not None and client.txn.state == "voting"]
            if self.server.lock.locked is not None or not any(map(self.needs_no_answer, waiting)):
                return
            self.server.loop.advance(GRACE)
        raise AssertionError("a vote hangs")

    def needs_no_answer(self, client):
        """Return whether the transaction waits for no answer of S3."""
        keys = [key for held in self.server.bucket.held() for key in held.what[1:]]
        own = [self.server.bucket.keys.of_object(oid) for oid in client.txn.blobs]
        if client.txn.undone or any(key.startswith(self.server.bucket.keys.staged) for key in keys):
            return not keys
        return not any(key.startswith(beginning) for key in keys for beginning in own)

    def no_vote_fails_without_reason(self):
        for client in self.clients:
            txn = client.txn
            if txn is not None and txn.state == "failed" and not (txn.is_broken or txn.met_failure):
                name, _ = txn.vote.error
                assert name.split(".")[-1] in REFUSALS, f"a vote fails without a reason: {txn.vote.error}"

    def what_is_acknowledged_is_there(self):
        revisions = self.server.revisions()
        blobs = self.server.bucket.blobs()
        known = {name for name in revisions if name[0] in self.history}
        assert known == self.data.keys(), "other blobs are committed than were acknowledged"
        for name, data in self.data.items():
            assert blobs.get(name) == data, f"{name} is not in the bucket as it was stored"
            pin = self.server.cache.get(*name)
            if pin is not None:
                with pin as path, open(path, "rb") as file:
                    assert file.read() == data, f"{name} is another one in the cache"
        tids = self.server.tids()
        assert tids == self.committed, "other transactions are committed than were acknowledged"

    def the_lock_waits_for_nothing_else(self):
        waits = self.server.waits_with_the_lock()
        assert not waits["base"]
        lost = self.server.metrics.reservations_overtaken._value.get()
        assert waits["overtaken"] * ROUNDS <= lost, "a transaction waits for S3 with the lock though it need not"
        locked = self.server.lock.locked
        if locked is not None:
            [client] = [client for client in self.clients if client.handler is locked]
            assert client.txn is not None, "a client without a transaction has the lock"
            assert client.txn.state in ("voting", "voted"), client.txn.state
            if client.txn.state == "voting":
                assert self.server.bucket.held(), "the client with the lock waits for nothing"

    def nothing_is_left(self):
        server = self.server
        assert server.lock.locked is None, "the lock is held by nobody"
        assert not server.lock.waiting
        assert not server.storage.tids._outstanding, "a reservation is left"
        assert server.metrics.staged_blobs._value.get() == 0
        assert server.metrics.staged_bytes._value.get() == 0
        if server.commits.kept._due:
            return
        assert server.commits.in_flight._holders == {}
        assert not server.commits.staging._live
        assert server.leftovers() == []
        if not self.may_leave and not server.bucket.left_something:
            assert server.bucket.blobs().keys() == self.data.keys(), "something is left in the bucket"
            assert not server.bucket.staged()

    def the_end(self):
        """Let S3 answer, and every client come to its end."""
        self.server.bucket.release()
        self.server.loop.settle()
        for _ in range(4 * len(self.clients)):
            self.let_time_pass()
            for number, client in enumerate(self.clients):
                if client.txn is not None and client.txn.state in ("begun", "conflicting", "failed"):
                    self.abort(number)
                elif client.txn is not None and client.txn.state == "voted":
                    self.finish_voted(client)
        assert not any(client.txn for client in self.clients), "a client waits for an answer"
        self.kept_for_a_minute()
        self.holds()
        # What failed operations have left, a pack deletes.
        self.clock.wall += 100 * DAY
        self.store_blob(0, BLOBS[0], "small")
        self.vote(0)
        self.finish_voted(self.clients[0])
        self.pack()
        self.may_leave = self.server.bucket.left_something = False
        self.holds()


def reference(oid):
    found = Persistent()
    found._p_oid = oid
    return found


@pytest.fixture
def model(tmp_path, clock, workers, small_sizes):
    """The model, for a history that a test makes up itself."""
    with mock.patch.object(staging, "uuid"):
        model = Model(tmp_path, clock, workers)
        yield model
        model.teardown()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("examples", "steps"),
    slow_after(1, of=[(30, 30), (int(os.environ.get("S3BLOBS_TEST_EXAMPLES", "400")), 60)], unpack=True),
)
def test_no_history_breaks_a_commit(tmp_path, clock, workers, small_sizes, examples, steps):
    with mock.patch.object(staging, "uuid"):
        run_model(lambda: Model(tmp_path, clock, workers), examples, steps)


def test_a_second_vote_while_the_first_queues_for_the_lock_is_refused_and_holds_up_nobody(model):
    """As no stock client does. Its reservation was lost, and all later commits with blobs waited for it."""
    model.start()
    model.store_object(0, OBJECTS[0])
    model.vote(0)
    model.store_blob(1, None, "small")
    model.vote(1)
    model.vote_twice(1)
    model.finish(0)
    model.holds()
    model.finish(1)
    model.holds()


def test_the_time_in_the_queue_for_the_lock_does_not_count_as_time_for_uploads(model):
    """The transaction has to be overtaken, or to undo something, so that it sends something after it got the lock."""
    model.start()
    model.store_blob(0, BLOBS[0], "small")
    model.vote(0)
    model.finish(0)
    model.store_object(0, OBJECTS[0])
    model.vote(0)
    model.undo(1, 1)
    model.store_blob(1, None, "small")
    model.vote(1)
    model.wait(TIMEOUT + 1)
    model.finish(0)
    model.holds()
    assert model.clients[1].txn.state == "voted"
    model.finish(1)
    model.holds()


def test_what_an_overtaken_upload_has_left_at_its_first_tid_is_deleted(model):
    model.start()
    model.commit_slowly(0, "small")
    model.commit(1, "small", finishes=True)
    model.holds()
    model.release()
    model.holds()
    model.finish(0)
    model.holds()
    assert model.server.metrics.reservations_overtaken._value.get() == 1
