"""Garbage collection against a model: whatever happens to a database, and in whatever order, no live blob is lost.

Hypothesis makes up histories of a database: commits, undos, packs, restarts, kills, failing buckets, restores from
backups, a disk that is not mounted, a move to another machine, a second section on the prefix, and a staging copy that
commits and packs as if the prefix were its own. What may be
deleted is told by the base's own iterator and by the clock, not by anything of garbage.py. `the_end` asks for the
opposite: that nothing dead stays.

The clock is moved by patching it. A failure prints the history, and is found again by the next run.
"""

import hashlib
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import pytest
import transaction
import ZODB
import ZODB.config
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ZODB.blob import Blob, is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSError, POSKeyError
from ZODB.serialize import ObjectWriter
from ZODB.utils import z64

from tests.support.models import run_model
from tests.support.speed import slow_after
from zodb_s3blobs import config, lease
from zodb_s3blobs.commands.adopt import take_prefix
from zodb_s3blobs.lease import why_not
from zodb_s3blobs.s3.keys import Keys

pytestmark = pytest.mark.usefixtures("no_pauses")

DAY = 86400
RECORD = ObjectWriter().serialize(Blob())
KEYS = Keys()
PLACES = st.sampled_from("abc")

#: The requests of a garbage collection, to fail or to be the last before a kill.
FAULTS = st.sampled_from(["OwnerGetObject", "GetObject", "ListObjects", "PutObject", "DeleteObjects?", ".*"])


class Killed(BaseException):
    """What ends the thread that was at work when its process was killed."""


@dataclass
class Backup:
    """A copy of Data.fs, what it can load, and when it was made."""

    path: str
    revisions: set
    time: float


class Server:
    """A storage and its database in a directory; `kill` leaves what a kill -9 would leave."""

    def __init__(self, directory, s3, bucket, retention, places=None):
        self.directory = directory
        self.places = places
        self._text = f"""
            %import zodb_s3blobs
            <s3blobstorage>
              bucket-name {bucket}
              s3-endpoint-url {s3.url}
              s3-access-key test
              s3-secret-key test-secret
              s3-max-attempts 1
              gc-retention {retention}s
              gc-max-delete-percent 100
              cache-dir {directory}/cache
              <filestorage>
                path {directory}/Data.fs
              </filestorage>
            </s3blobstorage>
            """
        self.open()

    def open(self):
        places = self.places or config.Places()  # a process of its own
        with mock.patch.object(config, "_places", places):
            self.storage = ZODB.config.storageFromString(self._text)
        self.process = places
        self.db = ZODB.DB(self.storage)
        client = self.storage._components.bucket._client
        client.meta.events.register_first("before-send.s3", self._sending)
        self._killed_after = None  # how many more requests

    def close(self):
        self.db.close()

    def kill(self):
        """Send no request more, write no byte more, give up the locks."""
        self._killed_after = 0
        base, parts = self.storage.base, self.storage._components
        with open(os.devnull, "r+b") as null:
            for file in (base._file, base._tfile):
                os.dup2(null.fileno(), file.fileno())
        base._lock_file.close()
        parts.lease._ending.set()
        parts.close_watch()
        parts.fetcher.close()
        parts.commits.close()
        parts.bucket.close()
        parts.cache.close()

    def kill_after(self, requests):
        """Kill it when it has sent that many more requests, not counting those for the lease."""
        self._killed_after = requests

    def _sending(self, request, **kwargs):
        if self._killed_after is not None:
            if not request.url.endswith("/owner.json"):
                self._killed_after -= 1
            if self._killed_after < 0:
                raise Killed
        self.on_request(request)

    def on_request(self, request):
        """Called before each request."""

    @contextmanager
    def transaction(self):
        """The root, in a transaction of its own that the end of the body commits."""
        manager = transaction.TransactionManager()
        connection = self.db.open(manager)
        try:
            manager.begin()
            yield connection.root()
            manager.commit()
        finally:
            manager.abort()
            connection.close()

    def revisions(self):
        """All (oid, tid) of blobs that the base can load."""
        return {
            (record.oid, record.tid)
            for txn in self.storage.base.iterator()
            for record in txn
            if record.data and is_blob_record(record.data)
        }

    def blob_file(self, data):
        path = os.path.join(self.storage.temporaryDirectory(), os.urandom(8).hex())
        with open(path, "wb") as file:
            file.write(data)
        return path


class Model(RuleBasedStateMachine):
    """The owner of the prefix, its backups and its staging copy; and what is known of each blob."""

    def __init__(self, s3, directory, clock):
        super().__init__()
        self.s3, self.clock = s3, clock
        self.directory = directory / f"example-{time.monotonic_ns()}"
        self.directory.mkdir()
        self.bucket = s3.bucket(self.directory.name)
        self.owner = self.staging = None
        self.backups = []
        self.data = {}  # (oid, tid) -> bytes of what the owner committed
        self.last_live = {}  # (oid, tid) -> when the owner's base could last load it
        self.lost = set()  # what was deleted, rightly, before an old backup that had it was restored
        self.keys = {}  # what was in the bucket after the last step: (oid, tid) -> ETag
        self.may_delete = False  # whether the last step was a pack of the owner
        self.unfinished = []  # transactions that end with the pack during which they voted
        self.number = 0

    @initialize(retention=st.sampled_from([0, 7 * DAY]), staging=st.booleans())
    def start(self, retention, staging):
        self.retention = retention
        (self.directory / "owner").mkdir()
        self.owner = self.serve("owner")
        self.commit({"a", "b"})
        self.back_up()
        if staging:
            self.copy_to_staging()

    def serve(self, name):
        return Server(self.directory / name, self.s3, self.bucket, self.retention)

    def teardown(self):
        self.s3.behave()
        for server in filter(None, (self.owner, self.staging)):
            server.close()
        shutil.rmtree(self.directory)

    def new_data(self):
        self.number += 1
        return b"%d" % self.number

    # The owner's clients

    @rule(places=st.sets(PLACES, min_size=1), removes=st.booleans(), packs=st.booleans())
    def change(self, places, removes, packs):
        if removes:
            with self.owner.transaction() as root:
                for place in places:
                    root.pop(place, None)
        else:
            self.commit(places)
        if packs:
            self.run_pack()

    def commit(self, places):
        data = {place: self.new_data() for place in places}
        self.write(self.owner, data)
        with self.owner.transaction() as root:
            for place in places:
                root[place]._p_activate()
                self.data[root[place]._p_oid, root[place]._p_serial] = data[place]

    def write(self, server, data):
        with server.transaction() as root:
            for place, content in data.items():
                try:
                    file = root.setdefault(place, Blob()).open("w")
                except POSKeyError:  # it is among the lost
                    root[place] = Blob()
                    file = root[place].open("w")
                with file:
                    file.write(content)

    @rule(which=st.integers(0, 2))
    def undo(self, which):
        before = self.owner.revisions()
        manager = transaction.TransactionManager()
        try:
            for entry in self.owner.db.undoLog(which, which + 1):
                if entry["description"] != "initial database creation":
                    self.owner.db.undo(entry["id"], manager.get())
            manager.commit()
        except POSError:  # later changes depend on it, or what it goes back to is lost
            manager.abort()
        for oid, tid in self.owner.revisions() - before:
            self.data[oid, tid] = self.undone(oid, tid)

    def undone(self, oid, tid):
        """What the record of the undo ``tid`` went back to, as the iterator tells it."""
        (back,) = {
            record.data_txn for txn in self.owner.storage.base.iterator(tid, tid) for record in txn if record.oid == oid
        }
        return self.data[oid, back]

    @rule(place=PLACES, loses_answer=st.booleans())
    def fail_to_commit(self, place, loses_answer):
        fault = {"lose": True} if loses_answer else {"status": 500, "code": "InternalError"}
        self.s3.misbehave(operation="PutObject", **fault)
        with pytest.raises(POSError):
            self.write(self.owner, {place: self.new_data()})
        self.s3.behave()

    # The operator

    @rule(days=st.sampled_from([0.1, 3, 8]))
    def wait(self, days):
        self.clock.offset += days * DAY

    @rule(days=st.sampled_from([0, 8]))
    def restart(self, days):
        self.owner.close()
        self.clock.offset += days * DAY
        self.owner.open()

    @precondition(lambda self: len(self.backups) < 4)
    @rule()
    def back_up(self):
        path = self.directory / f"backup-{len(self.backups)}"
        shutil.copy(self.owner.directory / "Data.fs", path)
        self.backups.append(Backup(path, self.owner.revisions() - self.lost, time.time()))

    @rule(which=st.integers(0, 3), packs=st.booleans(), adopts=st.booleans())
    def restore_backup(self, which, packs, adopts):
        backup = self.backups[which % len(self.backups)]
        self.owner.close()
        for suffix in (".index", ".old", ".tmp"):
            (self.owner.directory / f"Data.fs{suffix}").unlink(missing_ok=True)
        shutil.copy(backup.path, self.owner.directory / "Data.fs")
        self.owner.open()
        # What a younger backup may expect is among the invariants.
        self.lost |= self.owner.revisions() - self.keys.keys()
        if adopts:
            self.adopt()
        if packs:
            self.no_live_blob_is_lost()
            self.run_pack()

    @rule(places=st.sets(PLACES), packs=st.booleans())
    def start_without_the_disk(self, places, packs):
        """The disk with the database is not mounted: the server makes an empty one, which is used, and packed."""
        self.owner.close()
        directory, disk = self.owner.directory, self.directory / "disk"
        disk.mkdir()
        for path in directory.glob("Data.fs*"):
            path.rename(disk / path.name)
        self.owner.open()
        self.write(self.owner, {place: self.new_data() for place in places})
        if packs:
            with pytest.raises(POSError, match="belongs to"):
                self.owner.db.pack(time.time())
        self.owner.close()
        for path in directory.glob("Data.fs*"):
            path.unlink()
        for path in disk.iterdir():
            path.rename(directory / path.name)
        disk.rmdir()
        self.owner.open()

    @rule()
    def move(self):
        """To another machine, by copies of the files: the database is the successor of its own."""
        self.owner.close()
        for path in self.owner.directory.glob("Data.fs*"):
            copy = path.with_name("copy")
            shutil.copy(path, copy)
            copy.replace(path)
        self.owner.open()

    @rule()
    def start_a_second_section(self):
        """On the same prefix, in the same process."""
        (self.directory / "second").mkdir()
        with pytest.raises(config.StartRefused, match="s3-prefix"):
            Server(self.directory / "second", self.s3, self.bucket, self.retention, places=self.owner.process)
        shutil.rmtree(self.directory / "second")

    def adopt(self):
        """Give the prefix to the owner's database, as the command does, if it has it not."""
        bucket, kind = self.owner.storage._components.bucket, self.owner.storage._base_adapter
        note = bucket.read_owner()
        if note is not None and why_not(note, kind.identity(), kind, self.owner.storage._components.lease._owner):
            take_prefix(kind, bucket, note, "1")

    @rule(age=st.sampled_from([0, DAY]))
    def pack(self, age):
        self.run_pack(age)

    @rule(finishes=st.booleans())
    def pack_beside_a_commit(self, finishes):
        """While the bucket is listed a transaction stores a blob; it finishes at once, or after the pack."""
        self.run_pack(before_listing=lambda: self.store(new_oid=True, finishes=finishes))

    @rule(place=PLACES, finishes=st.booleans())
    def pack_beside_a_restore(self, place, finishes):
        """What has just been found dead is brought back, in a transaction that finishes at once or after the pack."""
        self.change({place}, removes=True, packs=False)
        self.run_pack(after_judging=lambda name: self.restore(*name, finishes))

    @rule(operation=FAULTS, loses_answer=st.booleans())
    def pack_with_a_failing_bucket(self, operation, loses_answer):
        fault = {"lose": True} if loses_answer else {"status": 503, "code": "SlowDown"}
        self.s3.misbehave(operation=operation, **fault)
        try:
            self.run_pack()
        except POSError:
            pass
        self.s3.behave()

    @rule(requests=st.integers(0, 7), staging_packs=st.booleans())
    def killed_in_a_pack(self, requests, staging_packs):
        self.owner.kill_after(requests)
        try:
            self.run_pack()
        except (Killed, POSError):
            pass
        self.kill_owner(staging_packs)

    @precondition(lambda self: self.keys)
    @rule(moment=st.sampled_from(["uploading", "voted", "finished"]), staging_packs=st.booleans())
    def killed_in_a_commit(self, moment, staging_packs):
        if moment == "uploading":
            self.owner.kill_after(0)
        try:
            self.store(new_oid=False, finishes=False)
        except (Killed, POSError):
            pass
        for name, data, txn in self.unfinished:
            if moment == "finished":
                self.owner.storage.base.tpc_finish(txn)
                self.data[name] = data
        self.unfinished = []
        self.kill_owner(staging_packs)

    def kill_owner(self, staging_packs):
        self.owner.kill()
        if staging_packs:
            self.pack_staging()
        self.owner.open()

    def run_pack(self, age=0, before_listing=None, after_judging=None):
        """Pack, and do something meanwhile: once before a list request, once with a blob that was found dead."""
        self.may_delete = True
        self.last_before = self.owner.storage.lastTransaction()
        base, packed, done = self.owner.storage.base, [], []
        load, pack = base.loadSerial, base.pack

        def pack_and_note(*args, **kwargs):
            try:
                return pack(*args, **kwargs)
            finally:
                packed.append(True)

        def load_and_act(oid, tid):
            try:
                return load(oid, tid)
            except POSKeyError:
                if after_judging and not done and after_judging((oid, tid)):
                    done.append(True)
                raise

        def on_request(request):
            if before_listing and packed and not done and "list-type=2" in request.url:
                done.append(True)
                before_listing()

        base.loadSerial, base.pack, self.owner.on_request = load_and_act, pack_and_note, on_request
        try:
            self.owner.db.pack(time.time() - age)
        except POSError as error:
            # As long as nothing lives, or an older state has not been given the prefix, nothing is deleted.
            if not re.search("not one is live|older state", str(error)):
                raise
        finally:
            del base.loadSerial, base.pack, self.owner.on_request
            if done:
                self.finish()

    def finish(self):
        """Finish what has voted."""
        for name, data, txn in self.unfinished:
            self.owner.storage.tpc_finish(txn)
            self.data[name] = data
        self.unfinished = []

    def store(self, new_oid, finishes):
        """A transaction with one blob: of a new object, or the next revision of one that there is."""
        storage = self.owner.storage
        oid, serial = storage.new_oid(), z64
        if not new_oid:
            current = sorted(self.owner.revisions())
            if not current:
                return
            oid = current[0][0]
            serial = storage.load(oid)[1]
        data = self.new_data()
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        storage.storeBlob(oid, serial, RECORD, self.owner.blob_file(data), "", txn)
        self.end(storage, txn, (oid, storage._base_adapter.committing_tid()), data, finishes)

    def restore(self, oid, tid, finishes):
        """A transaction that brings back a dead revision, as copyTransactionsFrom would."""
        storage = self.owner.storage
        data = self.data.get((oid, tid))
        if data is None or any(known == oid for known, _ in self.owner.revisions()):
            return False  # never committed; or FileStorage could not load what comes after it any more
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        storage.restoreBlob(oid, tid, RECORD, self.owner.blob_file(data), None, txn)
        self.end(storage, txn, (oid, tid), data, finishes)
        return True

    def end(self, storage, txn, name, data, finishes):
        try:
            storage.tpc_vote(txn)
        except BaseException:
            storage.tpc_abort(txn)
            raise
        self.unfinished.append((name, data, txn))
        if finishes:
            self.finish()

    # The copy

    @rule()
    def copy_to_staging(self):
        """Copy the owner's directory, with its cache, while the owner runs, and start a server on it."""
        if self.staging is not None:
            self.staging.close()
            shutil.rmtree(self.staging.directory)
        shutil.copytree(
            self.owner.directory,
            self.directory / "staging",
            ignore=shutil.ignore_patterns("incoming", "tmp", "Data.fs.*", "*.lock"),
        )
        (self.directory / "staging" / "cache" / ".zodb-s3blobs.lock").touch()
        self.staging = self.serve("staging")

    @precondition(lambda self: self.staging)
    @rule(places=st.sets(PLACES), removes=st.booleans(), packs=st.booleans())
    def use_staging(self, places, removes, packs):
        if removes:
            with self.staging.transaction() as root:
                root.clear()
        self.write(self.staging, {place: self.new_data() for place in places})
        if packs:
            self.pack_staging()

    def pack_staging(self):
        if self.staging is not None:
            with pytest.raises(POSError, match="belongs to"):
                self.staging.db.pack(time.time())

    # What must hold

    @invariant()
    def no_live_blob_is_lost(self):
        if self.owner is None:
            return
        now = time.time()
        before, self.keys = self.keys, self.listed()
        live = self.owner.revisions()
        for name in live - self.lost:
            assert name in self.keys, f"{KEYS.key(*name)} is live and gone"
            assert self.keys[name] == hashlib.md5(self.data[name]).hexdigest(), f"{KEYS.key(*name)} is not itself"
        self.lost -= self.keys.keys()
        for name in (before.keys() - self.keys.keys()) & self.data.keys():
            assert self.may_delete, f"{KEYS.key(*name)} was deleted, but not by a pack of the owner"
            assert name[1] <= self.last_before, f"{KEYS.key(*name)} was deleted though it is newer than the database"
            dead_for = now - self.last_live[name]
            assert dead_for >= self.retention - 2, f"{KEYS.key(*name)} was deleted after {dead_for} s"
        for backup in self.backups:
            if now - backup.time < self.retention - 2:
                assert backup.revisions <= self.keys.keys(), "a backup younger than the retention misses a blob"
        self.last_live.update(dict.fromkeys(live, now))
        self.may_delete = False

    def listed(self):
        answer = self.s3.client.list_objects_v2(Bucket=self.bucket, Prefix=KEYS.blobs)
        assert not answer["IsTruncated"]
        return {KEYS.parse(found["Key"]): found["ETag"].strip('"') for found in answer.get("Contents", ())}

    @rule()
    def the_end(self):
        """Whatever has happened: exactly what is live is left, and can be read with an empty cache."""
        self.commit({"a"})  # later than all that is dead
        self.owner.close()  # what it deletes in the background is deleted
        shutil.rmtree(self.owner.directory / "cache")
        self.owner.open()
        self.adopt()
        for _ in range(2 if self.retention else 1):
            self.run_pack()
            self.no_live_blob_is_lost()
            self.clock.offset += self.retention + 2
        live = self.owner.revisions() - self.lost
        assert self.keys.keys() == live
        for name in live:
            with self.owner.storage.openCommittedBlobFile(*name) as file:
                assert file.read() == self.data[name]


class Clock:
    """Tells the time, and goes ahead of it by ``offset`` seconds."""

    def __init__(self):
        self.offset = 0.0
        self._time = time.time

    def __call__(self):
        return self._time() + self.offset


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    # By the clock of the service, which goes on as it does: what follows from it is tested in test_lease.py.
    monkeypatch.setattr(lease, "PROBATION", timedelta(0))
    return clock


@pytest.fixture
def model(s3, tmp_path, clock):
    """The model, for a history that a test makes up itself."""
    model = Model(s3, tmp_path, clock)
    yield model
    model.teardown()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("examples", "steps"),
    slow_after(1, of=[(2, 10), (int(os.environ.get("S3BLOBS_TEST_EXAMPLES", "10")), 25)], unpack=True),
)
def test_no_history_loses_a_live_blob_or_keeps_a_dead_one(s3, tmp_path, clock, examples, steps):
    run_model(lambda: Model(s3, tmp_path, clock), examples, steps)


def test_a_blob_that_lived_again_is_retained_as_long_as_any_other(model):
    model.start(retention=7 * DAY, staging=False)
    model.change({"a"}, removes=True, packs=True)
    model.no_live_blob_is_lost()
    model.restore_backup(0, packs=False, adopts=True)  # from here on it is live
    model.no_live_blob_is_lost()
    model.wait(8)
    model.back_up()
    model.change({"a"}, removes=True, packs=True)
    model.no_live_blob_is_lost()
    model.restore_backup(1, packs=False, adopts=True)
    model.the_end()


def test_a_copy_of_the_server_on_the_same_machine_is_another_server(model):
    model.start(retention=0, staging=True)
    model.change({"c"}, removes=False, packs=False)
    model.use_staging({"a"}, removes=True, packs=True)
    model.no_live_blob_is_lost()
    model.the_end()
