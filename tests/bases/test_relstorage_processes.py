"""Several processes on one database of RelStorage, each with its own cache: real ones, which are killed as well."""

import contextlib
import itertools
import json
import os
import time
import traceback
from pathlib import Path

import pytest
import transaction
import ZODB
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, StorageError
from ZODB.utils import load_current, p64, u64, z64

from tests.support.forked import context
from tests.support.mariadb import MariaDB, Primary
from tests.support.postgresql import PostgreSQL
from tests.support.relstorage_databases import IMPORTS, KINDS, Application, Database, kinds, needs
from tests.support.sites import KEYS, get, put
from tests.support.speed import slow, slow_but
from zodb_s3blobs.bases import relstorage
from zodb_s3blobs.garbage import collector as garbage

#: For what takes long, and differs by the kind of database at most, not by its history.
ONE_OF_EACH = pytest.mark.parametrize(
    "database", kinds("sqlite-history", "postgresql-free", "mariadb-free"), indirect=True
)
ON_A_SERVER = pytest.mark.parametrize("database", kinds("postgresql-history", "mariadb-free"), indirect=True)

#: A blob that is uploaded before the vote, to a staging key, with the options below.
LARGE = os.urandom(20000)
OPTIONS = {"s3_stage_threshold": 10000, "gc_max_delete_percent": 100}

OLD = p64(u64(b"\x03\xd0\xc0\xb0\xa0\x90\x80\x70"))  # a tid of long ago


# A process, and what it can be told


class Process:
    """A process with the database of ``config``, open; does what it is told, one after the other."""

    def __init__(self, config):
        self._pipe, theirs = context().Pipe()
        self._process = context().Process(target=_serve, args=(config, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.end()  # it has opened the database

    def begin(self, function, *args):
        """Call ``function`` there, with what a process has and ``args``; `end` waits for it."""
        self._pipe.send((function, args))

    def end(self):
        """The result of what was begun; what it raised there is raised here."""
        assert self._pipe.poll(120), "the process does not answer"
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result

    def says(self):
        """What the function that runs there says by `Here.say`; also what has ended it."""
        return self.end()

    def tell(self, what):
        """Answer `Here.ask`."""
        self._pipe.send(what)

    def __call__(self, function, *args):
        self.begin(function, *args)
        return self.end()

    def kill(self):
        """As ``kill -9``."""
        self._process.kill()
        self._process.join(60)
        self._pipe.close()

    def close(self):
        """End it properly."""
        if self._process.is_alive():
            self(_close)
            self._process.join(60)


class Here:
    """What a process has: ``db``, its ``storage``, ``connection`` if it keeps one open, and whatever it notes."""

    def __init__(self, db, pipe):
        self.db, self.storage, self._pipe = db, db.storage, pipe

    def say(self, what):
        self._pipe.send((what, None))

    def asked(self):
        """Whether to stop."""
        return self._pipe.poll()

    def ask(self):
        return self._pipe.recv()


def _serve(config, pipe):
    garbage._RESTS = 0, 0  # no client wants the interpreter while a pack deletes
    try:
        here = Here(databaseFromString(config), pipe)
    except Exception as error:
        pipe.send((None, StorageError(str(error))))
        return
    pipe.send((None, None))
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((function(here, *args), None))
            except Exception as error:
                traceback.print_exc()
                kind = ConflictError if isinstance(error, ConflictError) else StorageError
                pipe.send((None, kind(str(error))))
            if function is _close:
                return


def _close(here):
    here.db.close()


def write(here, name, data):
    put(here.db, name, data)


def read(here, name):
    return get(here.db, name)


def read_all(here):
    with here.db.transaction() as connection:
        return {name: blob.open().read() for name, blob in connection.root().items() if isinstance(blob, Blob)}


def live_keys(here):
    """The keys of the blobs that the root has, as of now."""
    with here.db.transaction() as connection:
        blobs = [blob for blob in connection.root().values() if isinstance(blob, Blob)]
        for blob in blobs:
            blob._p_activate()
        return sorted(KEYS.key(blob._p_oid, blob._p_serial) for blob in blobs)


def pack(here):
    here.db.pack(time.time() + 1)


def collect(here):
    return here.storage.collect_garbage()


def impatient(here):
    """Wait for other processes no longer than a second."""
    relstorage._LOCK_TIMEOUT = 1.0


def conflict_metric(here):
    (family,) = here.storage.metrics.bucket_owner_conflict.collect()
    (sample,) = family.samples
    assert sample.name == "s3blobs_bucket_owner_conflict"
    return sample.value


def open_connection(here):
    here.manager = transaction.TransactionManager()
    here.connection = here.db.open(here.manager)


def read_again(here, name):
    """In the open connection, after a sync."""
    here.manager.begin()
    with here.connection.root()[name].open() as file:
        return file.read()


def write_open(here, name, data):
    """In the open connection; not committed."""
    here.manager.begin()
    with here.connection.root()[name].open("w") as file:
        file.write(data)


def commit_open(here):
    try:
        here.manager.commit()
    except BaseException:
        here.manager.abort()
        raise


# Fixtures


@pytest.fixture
def start(application):
    """Starts a process on the database of ``application``; ``cache``: the name of its own."""
    with contextlib.ExitStack() as ends:
        numbers = itertools.count()

        def start(cache=None, of=application, **options):
            config = of.config(cache=cache or f"cache-{next(numbers)}", **options)
            process = Process(f"{IMPORTS}<zodb>\n{config}\n</zodb>")
            ends.callback(process.kill)
            return process

        yield start


@pytest.fixture
def pair(start):
    return start(), start()


@pytest.fixture
def blobs(s3, bucket_name):
    """The keys of all blobs in the bucket, without what is staged."""
    return lambda: sorted(key for key in s3.keys(bucket_name) if "/blobs/" in key)


@pytest.fixture
def pack_finally(start, blobs):
    """After a last commit and pack by ``process`` the bucket has exactly the live blobs: ``expected``, by name."""

    def pack_finally(process, expected):
        process(write, "the last", b"the last")  # later than whatever was left behind
        process(pack)
        assert blobs() == process(live_keys)
        # Of a process that has none of them in its cache.
        assert start()(read_all) == {**expected, "the last": b"the last"}

    return pack_finally


def owner(s3, bucket_name):
    return json.loads(s3.client.get_object(Bucket=bucket_name, Key="1/owner.json")["Body"].read())


# Commits


def test_processes_see_each_others_blobs_in_connections_that_stay_open(pair):
    first, second = pair
    first(write, "a", b"one")
    second(open_connection)
    first(open_connection)
    assert second(read_again, "a") == b"one"
    for number in range(3):
        data = os.urandom(1000)
        first(write, "a", data)
        assert second(read_again, "a") == data == first(read_again, "a")
        second(write, "a", data + b"2")
        second(write, f"new {number}", data)
        assert first(read_again, "a") == data + b"2" == second(read_again, "a")
        assert first(read_again, f"new {number}") == data


@ONE_OF_EACH
def test_who_comes_later_to_a_blob_conflicts_and_tries_again(pair, blobs, pack_finally):
    first, second = pair
    first(write, "a", b"one")
    for process in pair:
        process(open_connection)
        process(write_open, "a", b"of %d" % process.pid)
    first(commit_open)
    before = blobs()
    with pytest.raises(ConflictError):
        second(commit_open)
    assert second(read_again, "a") == b"of %d" % first.pid
    assert set(before) <= set(blobs())
    second(write_open, "a", b"again")
    second(commit_open)
    assert first(read_again, "a") == b"again"
    pack_finally(first, {"a": b"again"})


def append(here, name, data):
    """Append to a blob, however often another process does so at the same moment; how often that was."""
    manager = transaction.TransactionManager()
    attempts = 0
    while True:
        connection = here.db.open(manager)
        try:
            manager.begin()
            with connection.root()[name].open("a") as file:
                file.write(data)
            manager.commit()
            return attempts
        except ConflictError:
            manager.abort()
            attempts += 1
        finally:
            connection.close()


def append_lines(here, name, letter, count):
    return sum(append(here, name, letter + b"%d\n" % number) for number in range(count))


@slow
@ONE_OF_EACH
def test_processes_that_change_one_blob_at_the_same_time_lose_no_change(pair, pack_finally):
    first, second = pair
    first(write, "a", b"")
    for process, letter in zip(pair, (b"x", b"y"), strict=True):
        process.begin(append_lines, "a", letter, 10)
    conflicts = [process.end() for process in pair]
    lines = first(read, "a").split()
    for letter in b"x", b"y":
        assert [line for line in lines if line[:1] == letter] == [letter + b"%d" % number for number in range(10)]
    assert len(lines) == 20
    assert sum(conflicts), "nothing happened at the same time"
    pack_finally(second, {"a": b"\n".join(lines) + b"\n"})


def prepare_counter(here):
    with here.db.transaction() as connection:
        connection.root()["tree"], connection.root()["count"] = OOBTree(), Length()


def add_open(here, name, data):
    """Put a blob into the tree, and count it; not committed."""
    here.manager.begin()
    root = here.connection.root()
    root["tree"][name] = Blob(data)
    root["count"].change(1)


def read_tree(here):
    with here.db.transaction() as connection:
        root = connection.root()
        return root["count"](), {name: blob.open().read() for name, blob in root["tree"].items()}


def tree_keys(here):
    with here.db.transaction() as connection:
        blobs = list(connection.root()["tree"].values())
        for blob in blobs:
            blob._p_activate()
        return sorted(KEYS.key(blob._p_oid, blob._p_serial) for blob in blobs)


@slow
def test_conflicts_beside_a_blob_are_resolved(start, blobs):
    pair = first, second = start(**OPTIONS), start(**OPTIONS)
    first(prepare_counter)
    for process, name in zip(pair, "ab", strict=True):
        process(open_connection)
        process(add_open, name, LARGE + name.encode())
    first(commit_open)
    second(commit_open)
    expected = 2, {name: LARGE + name.encode() for name in "ab"}
    for process in pair:
        assert process(read_tree) == expected
    first(write, "the last", b"the last")
    second(pack)
    assert blobs() == sorted(second(tree_keys) + second(live_keys))
    assert start()(read_tree) == expected


# Packing meanwhile


def commit_all_the_time(here):
    """Until told to stop, commit new blobs and overwrite others; what was acknowledged, by name."""
    acknowledged = {}
    number = 0
    while not here.asked():
        name = f"{number % 7}"
        data = LARGE + b"%d" % number if number % 5 == 0 else b"%d" % number * 50
        put(here.db, name, data)
        acknowledged[name] = data
        if number % 4 == 3:
            with here.db.transaction() as connection:
                name = f"{number % 3}"
                if name in acknowledged:
                    del connection.root()[name]
                    del acknowledged[name]
        if number == 10:
            here.say("going on")
        number += 1
    here.ask()
    return acknowledged


@slow
def test_what_is_committed_while_another_process_packs_stays(s3, start, pack_finally):
    packer, committer = start(**OPTIONS), start(**OPTIONS)
    packer(write, "a", b"one")
    committer.begin(commit_all_the_time)
    assert committer.says() == "going on"
    s3.forget()
    for _ in range(3):
        packer(pack)
        committed = len(s3.requests("PutObject"))
        while len(s3.requests("PutObject")) < committed + 5:  # they go on
            time.sleep(0.01)
    deleted = len(s3.requests("DeleteObjects"))
    committer.tell("stop")
    expected = committer.end()
    assert deleted >= 3, "a pack had nothing to do"
    assert committer(read_all) == packer(read_all) == {**expected, "a": b"one"}
    pack_finally(packer, {**expected, "a": b"one"})


@pytest.fixture
def dead(s3, bucket_name):
    """Puts ``count`` dead blobs into the bucket; returns their keys."""

    def dead(count):
        keys = [KEYS.key(p64(1000 + number), OLD) for number in range(count)]
        s3.put(bucket_name, keys)
        return keys

    return dead


def test_garbage_collection_spares_what_another_process_has_voted_for(pair, blobs, start):
    """It is in the bucket, and no record in the database yet."""
    first, second = pair
    first(write, "a", b"one")
    first.begin(write_and_hold, "a", b"two")
    assert first.says() == "voted"
    (uncommitted,) = set(blobs()) - set(second(live_keys))
    second(collect)
    assert uncommitted in blobs()
    first.tell("go on")
    first.end()
    assert first(read, "a") == second(read, "a") == start()(read, "a") == b"two"


@ONE_OF_EACH
def test_two_processes_collect_garbage_at_the_same_moment(s3, pair, dead, blobs, pack_finally):
    for number, process in enumerate(pair):
        process(write, f"blob {number}", b"%d" % number)
    keys = dead(10)
    s3.forget()
    s3.misbehave(operation="ListObjects", hang=True)
    for process in pair:
        process.begin(collect)
    s3.wait_for("ListObjects", 2)
    s3.behave()
    for process in pair:
        process.end()
    assert not set(keys) & set(blobs())
    pack_finally(pair[1], {"blob 0": b"0", "blob 1": b"1"})


# Processes that are killed


class Hold:
    """A resource of a transaction that votes last: it says so, and waits to be told to go on."""

    def __init__(self, here):
        self._here = here

    def sortKey(self):
        return "~~~"

    def tpc_vote(self, txn):
        self._here.say("voted")
        self._here.ask()

    def tpc_begin(self, txn):
        pass

    commit = tpc_finish = tpc_abort = abort = tpc_begin


def write_and_hold(here, name, data):
    manager = transaction.TransactionManager()
    manager.begin()
    connection = here.db.open(manager)
    with connection.root().setdefault(name, Blob()).open("w") as file:
        file.write(data)
    manager.get().join(Hold(here))
    manager.commit()


@ONE_OF_EACH
@pytest.mark.parametrize(
    "operation", slow_but("CopyObject", of=["PutObject", "CopyObject", None]), ids=["uploading", "copying", "voted"]
)
def test_of_a_process_that_is_killed_in_a_vote_nothing_is_left(s3, start, blobs, pack_finally, operation):
    killed, other = start(**OPTIONS), start(**OPTIONS)
    other(write, "a", b"one")
    before = blobs()
    other(open_connection)
    s3.forget()
    data = LARGE if operation == "CopyObject" else b"never"
    if operation is None:
        killed.begin(write_and_hold, "a", data)
        assert killed.says() == "voted"
        assert len(blobs()) == 2, "the blob has not been uploaded"
    else:
        # Done all the same, when nobody waits for it any more.
        s3.misbehave(operation=operation, times=1, latency=1)
        killed.begin(write, "a", data)
        s3.wait_for(operation)
    assert other(read_again, "a") == b"one"
    killed.kill()
    assert other(read_again, "a") == b"one"
    began = time.monotonic()
    other(write, "a", b"two")
    assert time.monotonic() - began < 30  # of the 60 s of the database's commit-lock-timeout
    assert other(read_again, "a") == b"two"
    deadline = time.monotonic() + 30
    while len(blobs()) < 3:  # what it has left behind arrives
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert set(before) < set(blobs())
    pack_finally(other, {"a": b"two"})


@slow
@ONE_OF_EACH
def test_a_process_that_is_killed_while_it_packs_keeps_no_other_from_it(s3, pair, dead, pack_finally):
    killed, other = pair
    killed(write, "a", b"one")
    dead(5)
    s3.misbehave(operation="DeleteObjects", times=1, hang=True)
    killed.begin(pack)
    s3.wait_for("DeleteObjects")
    killed.kill()
    other(write, "b", b"two")
    pack_finally(other, {"a": b"one", "b": b"two"})


# Restores, with tids from before


def begin_restore(here, oid, data):
    """Restore a blob at the old tid, until before the end of the transaction."""
    record = load_current(here.storage, here.blob_oid)[0]
    here.transaction = TransactionMetaData()
    here.storage.tpc_begin(here.transaction, OLD, " ")
    try:
        path = Path(here.storage.temporaryDirectory(), "restored")
        path.write_bytes(data)
        here.storage.restoreBlob(oid, OLD, record, str(path), None, here.transaction)
        here.storage.tpc_vote(here.transaction)
    except BaseException:
        here.storage.tpc_abort(here.transaction)
        raise


def store_with_old_tid(here, oid, data):
    """The same of a blob that is stored, not restored."""
    record = load_current(here.storage, here.blob_oid)[0]
    here.transaction = TransactionMetaData()
    here.storage.tpc_begin(here.transaction, OLD, " ")
    path = Path(here.storage.temporaryDirectory(), "stored")
    path.write_bytes(data)
    here.storage.storeBlob(oid, z64, record, str(path), "", here.transaction)
    here.storage.tpc_vote(here.transaction)


def end_restore(here):
    here.storage.tpc_finish(here.transaction)


def abort_restore(here):
    here.storage.tpc_abort(here.transaction)


def restore(here, oid, data):
    begin_restore(here, oid, data)
    end_restore(here)


def note_blob(here, name):
    """Remember where there is the record of a blob."""
    with here.db.transaction() as connection:
        here.blob_oid = connection.root()[name]._p_oid


def load_restored(here, oid):
    return Path(here.storage.loadBlob(oid, OLD)).read_bytes()


OID = p64(5000)
RESTORED = b"restored " * 100


@pytest.fixture
def restoring(pair):
    """Two processes; the database has a transaction that is later than what is restored."""
    first, second = pair
    first(write, "a", b"one")
    first(note_blob, "a")
    second(impatient)
    return first, second


@slow
def test_garbage_collection_spares_what_another_process_is_about_to_restore(s3, restoring, blobs, start):
    first, second = restoring
    first(begin_restore, OID, RESTORED)
    assert KEYS.key(OID, OLD) in blobs()
    s3.forget()
    with pytest.raises(StorageError, match=r"restoring a transaction .* pack again later"):
        second(collect)
    assert s3.requests("DeleteObjects") == s3.requests("DeleteObject") == []
    first(end_restore)
    assert second(collect) == 0
    for process in first, second, start():
        assert process(load_restored, OID) == RESTORED


@slow
@ONE_OF_EACH
def test_garbage_collection_waits_for_a_restore_and_looks_again(s3, pair, blobs, start):
    first, second = pair
    first(write, "a", b"one")
    first(note_blob, "a")
    first(begin_restore, OID, RESTORED)
    s3.forget()
    second.begin(collect)
    s3.wait_for("OwnerGetObject", 2)
    s3.wait_for("ListObjects")
    first(end_restore)
    assert second.end() == 0
    assert start()(load_restored, OID) == RESTORED


@ONE_OF_EACH
@pytest.mark.parametrize("end", ["abort", "kill"])
def test_what_was_not_restored_after_all_is_garbage(restoring, blobs, pack_finally, end):
    first, second = restoring
    first(begin_restore, OID, RESTORED)
    if end == "kill":
        first.kill()
    else:
        first(abort_restore)
    assert KEYS.key(OID, OLD) in blobs()
    assert second(collect) == 1
    pack_finally(second, {"a": b"one"})


@slow
@ONE_OF_EACH
def test_a_restore_does_not_count_on_what_another_process_is_deleting(s3, restoring, put_restored, start):
    second, first = restoring  # the first one restores, and is impatient
    first(note_blob, "a")
    put_restored()
    s3.misbehave(operation="DeleteObjects", times=1, hang=True)
    second.begin(collect)
    s3.wait_for("DeleteObjects")
    with pytest.raises(StorageError, match=r"deleting dead blobs .* restore again later"):
        first(restore, OID, RESTORED)
    s3.behave()
    assert second.end() == 2
    first(restore, OID, RESTORED)
    assert start()(load_restored, OID) == RESTORED
    assert second(collect) == 0


@slow
@ONE_OF_EACH
def test_a_restore_waits_for_what_another_process_is_deleting(s3, pair, put_restored, start):
    first, second = pair
    first(write, "a", b"one")
    first(note_blob, "a")
    put_restored()
    s3.misbehave(operation="DeleteObjects", times=1, latency=2)
    second.begin(collect)
    s3.wait_for("DeleteObjects")
    first(restore, OID, RESTORED)
    assert second.end() == 2
    assert start()(load_restored, OID) == RESTORED


@pytest.fixture
def put_restored(s3, bucket_name):
    """Puts what is going to be restored into the bucket, as an earlier attempt left it behind; and another blob."""

    def put_restored():
        s3.put(bucket_name, [KEYS.key(p64(6000), OLD)])
        s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(OID, OLD), Body=RESTORED)

    return put_restored


@ON_A_SERVER
def test_who_loses_a_connection_to_the_database_while_restoring_loses_no_blob(database, restoring, start):
    """As with idle_in_transaction_session_timeout: the lock that is lost must not be missed by the commit."""
    first, second = restoring
    first(begin_restore, OID, RESTORED)
    assert database.server.end_restoring(database.name) == 1
    with contextlib.suppress(StorageError):
        second(collect)
    try:
        first(end_restore)
    except StorageError:
        return  # the whole transaction is lost
    assert start()(load_restored, OID) == RESTORED


@slow
@ONE_OF_EACH
def test_a_blob_that_is_stored_with_an_old_tid_is_spared_as_well(restoring, start):
    first, second = restoring
    first(store_with_old_tid, OID, RESTORED)
    with contextlib.suppress(StorageError):
        second(collect)
    first(end_restore)
    assert start()(load_restored, OID) == RESTORED


def copy_from(here, path):
    source = FileStorage(f"{path}/Data.fs", blob_dir=f"{path}/blobs", read_only=True)
    try:
        here.storage.copyTransactionsFrom(source)
    finally:
        source.close()


def source_blobs(path):
    """oid, tid and bytes of the blobs of a new FileStorage in ``path``; the current ones."""
    db = ZODB.DB(FileStorage(f"{path}/Data.fs", blob_dir=f"{path}/blobs"))
    for number in range(2):
        with db.transaction() as connection:
            for name in "xyz":
                blob = connection.root().setdefault(name, Blob())
                with blob.open("w") as file:
                    file.write(f"{name} {number} ".encode() * 100)
    with db.transaction() as connection:
        found = [connection.root()[name] for name in "xyz"]
        result = [(blob._p_oid, blob.open().read()) for blob in found]
        result = [(oid, blob._p_serial, data) for blob, (oid, data) in zip(found, result, strict=True)]
    db.close()
    return result


def load_all(here, names):
    return [Path(here.storage.loadBlob(oid, tid)).read_bytes() for oid, tid in names]


@slow
@ONE_OF_EACH
def test_a_database_is_copied_while_another_process_collects_garbage(s3, pair, tmp_path, start, blobs):
    first, second = pair
    expected = source_blobs(tmp_path)
    first(write, "a", b"one")  # later than all that is copied
    second(impatient)
    s3.forget()
    s3.misbehave(operation="PutObject", times=1)  # one of them arrives
    s3.misbehave(operation="PutObject", hang=True)
    first.begin(copy_from, str(tmp_path))
    s3.wait_for("PutObject", 2)
    deadline = time.monotonic() + 30
    while len(blobs()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StorageError, match="pack again later"):
        second(collect)
    s3.behave()
    for _ in range(3):
        with contextlib.suppress(StorageError):
            second(collect)
    first.end()
    second(collect)
    assert start()(load_all, [name[:2] for name in expected]) == [name[2] for name in expected]


# The owner lease


@slow
@ONE_OF_EACH
def test_all_processes_of_one_database_delete(pair, dead, blobs, s3, bucket_name):
    for number in range(2):
        for process in pair:
            process(write, "a", b"%d %d" % (process.pid, number))
            keys = dead(3)
            process(pack)
            assert not set(keys) & set(blobs())
            assert process(conflict_metric) == 0
            assert owner(s3, bucket_name)["database"]
    assert blobs() == pair[0](live_keys)


@pytest.fixture
def start_copy(s3, bucket_name, tmp_path, start):
    """Starts a process on the copy ``database``, with a cache of its own, on the same prefix."""
    return lambda database: start(of=Application(database, s3, bucket_name, tmp_path))


def refused(process):
    """That it is: what it says."""
    with pytest.raises(StorageError, match="Two databases must never share a prefix") as error:
        process(pack)
    assert os.uname().nodename in str(error.value)
    return str(error.value)


@slow
@ONE_OF_EACH
@pytest.mark.parametrize(
    "original_lives", slow_but(True, of=[True, False]), ids=["beside-the-original", "after-a-clean-end"]
)
def test_a_copy_of_the_database_deletes_nothing(
    database, s3, bucket_name, start, start_copy, dead, blobs, pack_finally, original_lives
):
    first = start("first")
    first(write, "a", b"one")
    first(write, "b", b"two")
    first(pack)
    first.close()  # or there could be no copy
    copied = database.copy()
    if original_lives:
        first = start("first")
        first(write, "a", b"three")
        first(pack)
    before = owner(s3, bucket_name)
    copy = start_copy(copied)
    copy(write, "d", b"old")
    copy(write, "d", b"of the copy")  # the other blobs are the original's, which may have deleted them
    dead(5)
    keys = blobs()
    s3.forget()
    assert before["database"][:100] in refused(copy)  # a message shows no more of it
    assert copy(conflict_metric) == 1
    assert s3.requests("DeleteObjects") == s3.requests("DeleteObject") == s3.requests("OwnerPutObject") == []
    assert blobs() == keys
    assert copy(read, "d") == b"of the copy"  # it is served all the same
    copy.close()
    assert owner(s3, bucket_name) == before
    if not original_lives:
        first = start("first")
    second = start()
    for process in first, second:
        process(write, "c", b"of the original")
        process(pack)
        assert process(conflict_metric) == 0
    pack_finally(second, {"a": b"three" if original_lives else b"one", "b": b"two", "c": b"of the original"})


# A database server that is restarted, or copied


@pytest.fixture(params=slow_but(of=[PostgreSQL, MariaDB]))
def server(request):
    """A database server that may be stopped; its copies go with it."""
    needs(request.param.product)
    with contextlib.ExitStack() as servers:
        server = request.param()
        servers.callback(server.remove)
        server.start()
        copy = server.copy

        def copied():
            copied = copy()
            servers.callback(copied.remove)
            return copied

        server.copy = copied
        yield server


@pytest.fixture
def on_server(tmp_path, server, start_on):
    """A database in that server, and what starts a process on it."""
    kind = next(kind for kind in KINDS if kind.startswith(server.product))
    database = Database(kind, tmp_path, server=server)
    return database, lambda cache: start_on(database, cache)


@pytest.fixture
def start_on(s3, bucket_name, tmp_path):
    """Starts a process on a database, as `start`."""
    with contextlib.ExitStack() as ends:

        def start_on(database, cache):
            config = Application(database, s3, bucket_name, tmp_path).config(cache=cache)
            process = Process(f"{IMPORTS}<zodb>\n{config}\n</zodb>")
            ends.callback(process.kill)
            return process

        yield start_on


def write_after_a_restart(here, name, data):
    """The first transactions find that their connections are gone."""
    for _ in range(5):
        try:
            return put(here.db, name, data)
        except Exception as error:
            transaction.abort()
            last = error
    raise last


@slow
def test_a_restart_of_the_database_server_takes_the_lease_from_no_living_process(
    server, on_server, s3, bucket_name, dead, blobs
):
    _, start = on_server
    living = start("living")
    living(write, "a", b"one")
    living(pack)
    before = owner(s3, bucket_name)
    server.stop()
    time.sleep(1)  # MariaDB tells its start in whole seconds
    server.start()
    # One that comes now cannot know whether it is the same database.
    late = start("late")
    late(write, "b", b"two")
    found = dead(3)
    refused(late)
    assert set(found) <= set(blobs())
    assert owner(s3, bucket_name) == before
    # The one that lived can.
    living(write_after_a_restart, "a", b"two")
    living(pack)
    assert not set(found) & set(blobs())
    assert living(conflict_metric) == 0
    assert owner(s3, bucket_name)["database"] != before["database"]
    found = dead(3)
    late(pack)
    assert not set(found) & set(blobs())
    assert late(conflict_metric) == 0
    assert late(read_all) == {"a": b"two", "b": b"two"}


@slow
def test_a_copy_of_the_whole_database_server_deletes_nothing(server, on_server, tmp_path, start_on, dead, blobs):
    database, start = on_server
    living = start("living")
    living(write, "a", b"one")
    living(pack)
    server.stop()
    copied = server.copy()
    server.start()
    copied.start()
    copy = start_on(Database(database.kind, tmp_path, database.name, copied), "copy")
    copy(write, "b", b"of the copy")
    found = dead(3)
    refused(copy)
    assert set(found) <= set(blobs())
    living(write_after_a_restart, "a", b"two")
    living(pack)
    assert not set(found) & set(blobs())
    dead(3)
    refused(copy)
    assert copy(conflict_metric) == 1
    assert set(found) <= set(blobs())
    assert living(read_all) == {"a": b"two"} == start("another")(read_all)


# MariaDB's own ways to a copy, and to other tables


ON_MARIADB = pytest.mark.parametrize("server", [MariaDB], indirect=True)


@pytest.fixture
def replicate(server):
    """Makes a replica of ``server``."""
    with contextlib.ExitStack() as replicas:

        def replicate():
            replica = server.replica()
            replicas.callback(replica.remove)
            return replica

        yield replicate


@slow
@pytest.mark.parametrize("server", [Primary], indirect=True)
def test_a_replica_of_the_database_server_deletes_nothing(on_server, replicate, tmp_path, start_on, dead, blobs):
    database, start = on_server
    living = start("living")
    living(write, "a", b"one")
    living(pack)
    promoted = start_on(Database(database.kind, tmp_path, database.name, replicate()), "promoted")
    assert promoted(read_all) == {"a": b"one"}
    found = dead(3)
    refused(promoted)
    assert set(found) <= set(blobs())
    living(write, "a", b"two")
    living(pack)
    assert not set(found) & set(blobs())


@slow
@ON_MARIADB
def test_an_older_state_in_the_place_of_the_database_deletes_nothing(server, on_server, dead, blobs):
    database, start = on_server
    process = start("process")
    process(write, "a", b"one")
    process(pack)
    dump = server.dump(database.name)
    process(write, "a", b"two")
    process.close()
    server.restore(database.name, dump)
    restored = start("restored")
    assert restored(read_all) == {"a": b"one"}
    restored(write, "b", b"later")
    kept = set(blobs()) | set(dead(3))
    refused(restored)
    assert kept <= set(blobs())


@slow
@ON_MARIADB
def test_a_table_that_is_made_anew_takes_the_lease_from_no_living_process(
    server, on_server, s3, bucket_name, dead, blobs
):
    """As OPTIMIZE TABLE does."""
    database, start = on_server
    living = start("living")
    living(write, "a", b"one")
    living(pack)
    before = owner(s3, bucket_name)["database"]
    server.make_anew(database.name, "commit_row_lock")
    late = start("late")
    late(write, "b", b"two")
    found = dead(3)
    refused(late)
    assert set(found) <= set(blobs())
    living(write, "a", b"two")
    living(pack)
    assert not set(found) & set(blobs())
    assert owner(s3, bucket_name)["database"] != before
    found = dead(3)
    late(pack)
    assert not set(found) & set(blobs())
    assert late(conflict_metric) == 0


@slow
@ON_MARIADB
def test_packs_and_maintenance_of_the_large_tables_change_no_identity(server, on_server, s3, bucket_name):
    database, start = on_server
    process = start("one")
    for number in range(3):
        process(write, "a", b"%d" % number)
    process(pack)
    before = owner(s3, bucket_name)["database"]
    process.close()
    for table in "object_state", "new_oid":
        server.make_anew(database.name, table)
    server.execute(database.name, "FLUSH TABLES")
    start("two")(pack)
    assert owner(s3, bucket_name)["database"] == before
