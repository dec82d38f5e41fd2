"""Buckets of the earlier package, 1.2.1: a revision that an undo made has a record, and no object in the bucket.

Its bytes are those of the revision that the undo went back to, at the key of that one.
"""

import json
import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
import ZODB
import ZODB.config
from persistent.timestamp import TimeStamp
from zc.zlibstorage import ZlibStorage
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64, u64

from tests.support.fake_base import Base
from tests.support.sites import run
from tests.support.speed import slow
from tests.support.zeo_server import CONFIG, SECTION
from zodb_s3blobs.garbage import scan as scan_module
from zodb_s3blobs.s3.keys import Keys

pytestmark = pytest.mark.usefixtures("no_pauses")

KEYS = Keys("1")  # s3-prefix is the name of the storage
WELL, FAILED, DAMAGED, FALLBACK = 0, 1, 3, 6
READING = {"GetObject", "HeadObject", "ListObjects"}
PLAIN = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"
COMPRESSED = f"%import zc.zlibstorage\n<zlibstorage>\n{PLAIN}\n</zlibstorage>"


class Old:
    """A database, and its bucket, which `becomes_old` makes one as 1.2.1 leaves it.

    It has a blob that the tests write, and another one: where not one is live, a pack deletes nothing.

    ``revisions``: the tids of the blob; ``undone``: those of them that have been made by an undo.
    """

    def __init__(self, directory, s3, bucket):
        self.directory, self.bucket, self.s3 = directory, bucket, s3
        self.base, self.wrap = PLAIN, lambda storage: storage
        self.oid = None
        self.revisions, self.undone, self._opened = [], [], 0
        self._db = None

    def _section(self):
        return SECTION.format(
            name="1",
            bucket=self.bucket,
            endpoint=self.s3.url,
            dir=self.directory,
            cache=f"cache{self._opened}",
            options="",
            base=self.base.format(dir=self.directory),
        )

    @property
    def db(self):
        """Open from now on, with an empty cache."""
        if self._db is None:
            self._opened += 1
            storage = ZODB.config.storageFromString(f"%import zodb_s3blobs\n{self._section()}")
            self._db = ZODB.DB(self.wrap(storage))
        return self._db

    @property
    def storage(self):
        return self.db.storage

    def close(self):
        if self._db is not None:
            self._db.close()
            self._db = None

    def write(self, data):
        """Commit a revision."""
        if not self.revisions:
            with self.db.transaction() as connection:
                connection.root()["other"] = Blob(b"live")
        with self.db.transaction() as connection:
            root = connection.root()
            blob = root["blob"] if "blob" in root else root.setdefault("blob", Blob())
            with blob.open("w") as file:
                file.write(data)
        with self.db.transaction() as connection:
            self.oid = connection.root()["blob"]._p_oid
        return self._note()

    def undo(self, *numbers):
        """Undo, in one transaction, the last ones but ``numbers``."""
        log = self.db.undoLog(0, 20)
        self.db.undoMultiple([log[number]["id"] for number in numbers or (0,)])
        transaction.commit()
        self.undone.append(self._note())
        return self.undone[-1]

    def _note(self):
        self.revisions.append(self.storage.lastTransaction())
        return self.revisions[-1]

    def becomes_old(self):
        """The next to open it finds the objects that 1.2.1 would have stored."""
        self.close()
        client = self.s3.client
        for tid in self.revisions:
            place = {"Bucket": self.bucket, "Key": self.key(tid)}
            if tid in self.undone:
                client.delete_object(**place)
            elif self.key(tid) in self.keys():  # it stored no checksum
                client.put_object(Body=client.get_object(**place)["Body"].read(), **place)

    def key(self, tid):
        return KEYS.key(self.oid, tid)

    def keys(self):
        """The keys of all blobs in the bucket."""
        return [key for key in self.s3.keys(self.bucket) if KEYS.parse(key)]

    def held(self):
        """Which of the revisions have objects, by their numbers."""
        keys = self.keys()
        return [number for number, tid in enumerate(self.revisions) if self.key(tid) in keys]

    def read(self, tid):
        return Path(self.storage.loadBlob(self.oid, tid)).read_bytes()

    def value(self):
        with self.db.transaction() as connection, connection.root()["blob"].open() as file:
            return file.read()

    def pack(self, until=None):
        """Pack until now, or the revision ``until``."""
        self.db.pack(None if until is None else TimeStamp(until).timeTime() + 0.001)

    def verify(self, *arguments, status=WELL):
        """What ``zodb-s3blobs verify`` found: word -> objects; and the reasons."""
        result = json.loads(self.run(*arguments, "--json", status=status).stdout)
        found = {word: count["objects"] for word, count in result["found"].items() if count["objects"]}
        return found, [problem["reason"] for problem in result["problems"]]

    def run(self, *arguments, status):
        """Run it, beside the open database, if it is open."""
        conf = self.directory / "zeo.conf"
        conf.write_text(CONFIG.format(port=1, dir=self.directory, zeo="", storages=self._section()))
        returned, stdout, stderr = run("verify", "-C", str(conf), *arguments)
        assert returned == status, (stdout, stderr)
        return SimpleNamespace(stdout=stdout, stderr=stderr)


@pytest.fixture
def old(tmp_path, s3, bucket_name):
    old = Old(tmp_path, s3, bucket_name)
    yield old
    old.close()


@pytest.fixture
def undone(old):
    """Two revisions, and the undo of the second one."""
    old.write(b"one")
    old.write(b"two")
    old.undo()
    old.becomes_old()
    assert old.held() == [0, 1]
    return old


def next_moment(tid):
    while time.time() < TimeStamp(tid).timeTime() + 0.002:
        time.sleep(0.001)


# Reading


def test_an_undone_revision_is_read_from_the_one_that_it_repeats(undone, s3, caplog):
    assert undone.value() == b"one"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "verify --repair" in warning.getMessage()
    assert undone.key(undone.revisions[2]) in warning.getMessage()
    s3.forget()
    assert undone.value() == b"one"
    assert undone.read(undone.revisions[2]) == b"one"
    assert s3.requests() == []  # it is cached as any other blob
    assert undone.read(undone.revisions[1]) == b"two"


def test_it_takes_one_request_more_and_others_take_none_more(undone, s3):
    s3.forget()
    undone.read(undone.revisions[0])
    assert len(s3.requests("GetObject")) == 1
    undone.read(undone.revisions[2])
    assert len(s3.requests("GetObject")) == 3  # the second is not there


def test_an_undone_undo_has_the_bytes_that_were_undone(old):
    for data in b"one", b"two", b"three":
        old.write(data)
    old.undo()
    old.undo()
    old.undo(0, 1, 2)
    old.becomes_old()
    assert [old.read(tid) for tid in old.revisions] == [b"one", b"two", b"three", b"two", b"three", b"two"]
    assert old.value() == b"two"


def test_a_creation_that_was_undone_and_brought_back_is_read(old):
    first = old.write(b"one")
    removed = old.undo()
    old.undo()
    old.becomes_old()
    assert old.value() == b"one"
    with pytest.raises(POSKeyError):
        old.read(removed)
    assert old.read(first) == b"one"


def test_a_blob_that_is_missing_and_repeats_no_other_is_missing(old, s3):
    old.write(b"one")
    second = old.write(b"two")
    old.becomes_old()
    s3.client.delete_object(Bucket=old.bucket, Key=old.key(second))
    with pytest.raises(POSKeyError):
        old.read(second)


def test_what_it_repeats_may_be_missing_as_well(undone, s3):
    s3.client.delete_object(Bucket=undone.bucket, Key=undone.key(undone.revisions[0]))
    with pytest.raises(POSKeyError):
        undone.read(undone.revisions[2])


def test_an_outage_after_the_first_request_is_an_outage(undone, s3):
    s3.misbehave(operation="GetObject", times=1, latency=0)  # the first request is answered as it is
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    with pytest.raises(StorageError) as caught:
        undone.read(undone.revisions[2])
    assert type(caught.value) is StorageError


def test_an_undo_goes_back_to_a_revision_without_an_object(undone):
    undone.write(b"three")
    undone.undo()
    assert undone.value() == b"one"
    undone.close()
    assert undone.held() == [0, 1, 3, 4]
    assert undone.value() == b"one"


def test_clients_of_a_zeo_server_read_it(undone, start):
    server = start()
    client = server.client()
    assert Path(client.loadBlob(undone.oid, undone.revisions[2])).read_bytes() == b"one"
    with pytest.raises(POSKeyError):
        client.loadBlob(undone.oid, p64(u64(undone.revisions[2]) + 1))


def test_clients_of_a_demostorage_around_it_read_it(undone, start):
    server = start(storages=lambda settings: f"<demostorage 1>\n{SECTION.format(**settings)}</demostorage>")
    client = server.client()
    assert Path(client.loadBlob(undone.oid, undone.revisions[2])).read_bytes() == b"one"


# Packing


def test_a_pack_keeps_what_may_be_the_only_copy_and_reads_nothing_that_is_not_certain(undone, caplog):
    undone.pack()
    assert undone.held() == [0, 1]
    assert "keeps 2 blobs" in caplog.text and "verify --repair" in caplog.text
    with pytest.raises(POSKeyError):  # no record tells any more which of the two it is
        undone.value()
    undone.pack()
    assert undone.held() == [0, 1]


def test_a_pack_that_ends_before_the_undo_leaves_it_readable(undone):
    undone.pack(until=undone.revisions[1])
    assert undone.held() == [0, 1]
    undone.close()
    assert undone.value() == b"one"


def test_it_is_kept_as_well_for_a_revision_that_is_not_the_newest(undone):
    next_moment(undone.revisions[2])
    undone.write(b"three")
    undone.pack(until=undone.revisions[2])
    assert undone.held() == [0, 1, 3]
    undone.pack()  # the undone one goes, and with it what it needs
    assert undone.held() == [3]


@pytest.mark.parametrize("undos", [1, 2, 3])
def test_it_is_kept_after_several_undos(old, undos):
    for data in b"one", b"two", b"three":
        old.write(data)
    for _ in range(undos):
        old.undo()
    old.becomes_old()
    old.pack()
    assert old.held() == [0, 1, 2]


def test_it_is_kept_for_a_creation_that_was_brought_back(old):
    old.write(b"one")
    old.undo()
    old.undo()
    old.becomes_old()
    old.pack()
    assert old.held() == [0]


def test_a_creation_that_was_undone_keeps_nothing(old, caplog):
    old.write(b"one")
    old.undo()
    old.becomes_old()
    old.pack()
    assert old.held() == []
    assert "only copy" not in caplog.text


def test_it_is_kept_where_the_revisions_of_a_blob_are_judged_in_parts(old, monkeypatch):
    monkeypatch.setattr(scan_module, "_GROUP", 2)
    for number in range(5):
        old.write(b"%d" % number)
    old.undo()
    next_moment(old.revisions[-1])
    old.write(b"last")
    old.becomes_old()
    old.pack(until=old.revisions[-2])
    assert old.held() == [0, 1, 2, 3, 4, 6]


def test_parts_without_the_newest_revision_lose_their_dead_ones(old, monkeypatch, caplog):
    monkeypatch.setattr(scan_module, "_GROUP", 2)
    for number in range(7):
        old.write(b"%d" % number)
    old.pack()
    assert old.held() == [6]
    assert "only copy" not in caplog.text


def test_an_oid_that_a_crash_gave_to_another_object_keeps_no_blob(old, s3, caplog):
    old.write(b"one")
    root_tid = old.storage.load(p64(0))[1]
    s3.put(old.bucket, [KEYS.key(p64(0), p64(u64(root_tid) - 1))])
    assert len(old.keys()) == 3
    old.pack()
    assert old.held() == [0]
    assert len(old.keys()) == 2
    assert "only copy" not in caplog.text


def test_what_is_kept_does_not_pass_for_a_blob_of_the_database(s3, bucket_name, put, collector):
    """A database that is not the right one may have such revisions as well."""
    put((p64(1), p64(10)), (p64(2), p64(10)))
    assert collector().collect(Base((p64(1), p64(50)))) == 0
    assert len(s3.keys(bucket_name)) == 2
    put((p64(3), p64(10)))
    assert collector().collect(Base((p64(1), p64(50)), (p64(3), p64(10)))) == 1
    assert len(s3.keys(bucket_name)) == 2


@pytest.mark.parametrize(("base", "wrap"), [(COMPRESSED, lambda storage: storage), (PLAIN, ZlibStorage)])
def test_it_is_read_and_kept_where_records_are_compressed(old, base, wrap):
    old.base, old.wrap = base, wrap
    old.write(b"one")
    old.write(b"two")
    old.undo()
    old.becomes_old()
    assert old.value() == b"one"
    old.pack()
    assert old.held() == [0, 1]


def test_a_retention_marks_none_of_them(undone, s3, tmp_path):
    section = undone._section()
    undone._section = lambda: section.replace("cache-dir", "gc-retention 1d\n  cache-dir")
    undone.pack()
    assert undone.held() == [0, 1]
    assert not any(key.endswith("gc-marks.jsonl") for key in s3.keys(undone.bucket))


# Repairing


def test_verify_tells_it_and_repairs_it_and_then_all_is_ordinary(undone, s3):
    found, (reason,) = undone.verify(status=FALLBACK)
    assert found == {"good": 3, "undone": 1}
    assert undone.key(undone.revisions[2]) in reason and undone.key(undone.revisions[0]) in reason
    assert undone.held() == [0, 1]
    assert undone.verify("--repair") == ({"good": 3, "repaired": 1}, [])
    assert undone.held() == [0, 1, 2]
    assert undone.verify("--repair") == ({"good": 4}, [])
    undone.pack()
    assert undone.held() == [2]
    undone.close()
    assert undone.value() == b"one"


@slow
def test_all_undone_revisions_are_repaired_beside_the_open_database(old):
    for data in b"one", b"two":
        old.write(data)
    old.undo()
    old.undo()
    old.becomes_old()
    assert old.value() == b"two"
    assert old.verify("--repair")[0] == {"good": 3, "repaired": 2}
    objects = {tid: old.s3.client.get_object(Bucket=old.bucket, Key=old.key(tid)) for tid in old.revisions}
    assert [objects[tid]["Body"].read() for tid in old.revisions] == [b"one", b"two", b"one", b"two"]
    assert old.verify()[0] == {"good": 5}


@slow
def test_after_a_pack_verify_calls_it_missing_and_names_the_keys_that_may_have_its_bytes(undone):
    undone.pack()
    for arguments in (), ("--repair",):
        found, (reason,) = undone.verify(*arguments, status=DAMAGED)
        assert found == {"good": 1, "missing": 1}
        assert all(undone.key(tid) in reason for tid in undone.revisions)
    assert undone.held() == [0, 1]


@slow
def test_a_copy_that_is_refused_is_a_failure_and_the_next_repair_makes_it(undone, s3):
    s3.misbehave(operation="CopyObject", status=403, code="AccessDenied")
    found, (reason,) = undone.verify("--repair", status=FAILED)
    assert found == {"good": 3, "failed": 1}
    assert "AccessDenied" in reason
    s3.behave()
    assert undone.verify("--repair")[0] == {"good": 3, "repaired": 1}


@slow
def test_nothing_is_written_without_repair_and_no_more_than_the_copies_with_it(undone, s3):
    s3.forget()
    undone.verify(status=FALLBACK)
    undone.verify("--repair")
    undone.verify("--repair")
    written = [(request.operation, request.path) for request in s3.requests() if request.operation not in READING]
    assert written == [("CopyObject", f"/{undone.bucket}/{undone.key(undone.revisions[2])}")]


def test_a_blob_that_is_simply_missing_has_no_such_keys(old, s3):
    old.write(b"one")
    second = old.write(b"two")
    old.becomes_old()
    s3.client.delete_object(Bucket=old.bucket, Key=old.key(second))
    _, (reason,) = old.verify("--repair", status=DAMAGED)
    assert "undo" not in reason
    assert old.held() == [0]


def test_a_prefix_of_another_database_is_not_repaired(undone, tmp_path, s3):
    assert undone.value() == b"one"  # and the prefix is its own
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "Data.fs", tmp_path / "copy")
    copy = Old(tmp_path / "copy", s3, undone.bucket)
    assert "belongs to" in copy.run("--repair", status=FAILED).stderr
    assert undone.held() == [0, 1]
