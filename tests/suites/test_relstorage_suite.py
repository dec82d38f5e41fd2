"""RelStorage's published tests, and those of ZODB as RelStorage corrects them, run against S3BlobStorage around it.

The baseline is plain RelStorage with a shared blob directory: what passes there is not left out here.
"""

import functools
import itertools
import random
import sys
import tempfile
import unittest.mock
from pathlib import Path

import pytest
from relstorage.adapters.mysql import MySQLAdapter
from relstorage.adapters.postgresql import PostgreSQLAdapter
from relstorage.adapters.sqlite.adapter import Sqlite3Adapter
from relstorage.blobhelper.interfaces import IAuthoritativeBlobHelper
from relstorage.options import Options
from relstorage.storage import RelStorage
from relstorage.tests import hftestbase, hptestbase, packundo, reltestbase
from ZODB.tests import testblob as zodb_testblob
from zope.interface import implementer

from tests.suites.published import file_permissions_hold, parametrize, run, s3_storage, section  # noqa: F401
from tests.support.relstorage_databases import KINDS, Database, needs, server_of

# Only the tests of RelStorage's own blob cache, which are not run, use it: the random numbers of Python 2.
sys.modules.setdefault("random2", random)

from relstorage.tests.blob import testblob  # noqa: E402

_DRIVERS = {"sqlite": "sqlite3", "postgresql": "psycopg2", "mariadb": "PyMySQL"}
_HISTORY = [kind for kind in KINDS if kind.endswith("history")]
_FREE = [kind for kind in KINDS if kind.endswith("free")]

_numbers = itertools.count()


# Storages


def _database(kind, name):
    """The database ``name`` of the test that is running; on a server it has to be cleared first, as upstream does."""
    directory = Path(tempfile.gettempdir())  # upstream's tests have one of their own each
    where = str(directory / f"{name}.sqlite") if kind.startswith("sqlite") else _database_of_server(kind, name)
    return Database(kind, directory, where)


@functools.cache
def _database_of_server(kind, name):
    return server_of(kind.partition("-")[0]).database()


def _adapter(kind, name, options):
    database = _database(kind, name)
    if database.sqlite:
        return Sqlite3Adapter(data_dir=database.name, pragmas={}, options=options)
    if kind.startswith("postgresql"):
        return PostgreSQLAdapter(dsn=database.server.dsn(database.name), options=options)
    return MySQLAdapter(options=options, **database.server.parameters(database.name))


def _blobs_in_s3(storage, name, cache_dir=None):
    # Several storages of one test may use one database, as several processes do: each with a cache of its own.
    return s3_storage(lambda: storage, name, cache_dir or f"{name}-{next(_numbers)}.cache")


def _storage(kind, name, blob_dir, **options):
    """For the suites of which each test makes its storages itself."""
    driver = _DRIVERS[kind.split("-")[0]]
    options = Options(keep_history=kind in _HISTORY, driver=driver, commit_lock_timeout=10, **options)
    storage = RelStorage(_adapter(kind, name, options), name=name, options=options)
    storage.zap_all()
    return _blobs_in_s3(storage, name, blob_dir)


@implementer(IAuthoritativeBlobHelper)
class _BlobDirectory:
    """What upstream's tests ask a blob helper for: where the files are, and that old ones stay until a pack."""

    def __init__(self, storage):
        self.fshelper = storage.fshelper
        self.blob_dir = storage.fshelper.base_dir


def _storage_with_directory(kind, name, blob_dir, **options):
    storage = _storage(kind, name, blob_dir, **options)
    storage.blobhelper = _BlobDirectory(storage)
    return storage


# Blobs


def _zodb_blobs(kind):
    return zodb_testblob.storage_reusable_suite(
        "S3",
        functools.partial(_storage, kind),
        test_blob_storage_recovery=True,
        test_packing=True,
        test_undo=kind in _HISTORY,
    )


class _PackingWithoutHistory(testblob.TestBlobPackingHP):
    """Every pack deletes all revisions but the last; in RelStorage's directory they stay as long as the object."""

    __test__ = False  # by itself it has no storage

    def _pack_at_time_index(self, time_index=0, count_not_exist=0):
        super()._pack_at_time_index(time_index, max(count_not_exist, self.BLOB_REVISION_COUNT - 1))


def _relstorage_blobs(kind):
    # Left out: test_blob_cache, of RelStorage's own cache, which may evict a file as soon as it has handed out the
    # path; ours keeps it for some seconds, and test_cache.py tests its limit.
    with unittest.mock.patch.object(testblob, "TestBlobPackingHF", _PackingWithoutHistory):
        return testblob.storage_reusable_suite(
            "S3",
            functools.partial(_storage_with_directory, kind),
            test_blob_storage_recovery=True,
            test_packing=True,
            test_undo=kind in _HISTORY,
            keep_history=kind in _HISTORY,
            large_blob_size=20 << 20,
        )


_STRING_AS_SERIAL = (
    "ZODB's test stores with the serial '\\0'*8, a str, which RelStorage does not take, and expects the name of ZODB's "
    "own POSKeyError; RelStorage's TestBlobTransaction is that test without the two, and is run"
)
_NO_OLD_REVISIONS = "expects old blobs to outlive a pack, and there is no history; _PackingWithoutHistory is run"


# Both fail with plain RelStorage as well.
@parametrize(
    quick=["sqlite_history-S3", "sqlite_history-testblob"],
    sqlite_history=_zodb_blobs("sqlite-history"),
    sqlite_free=_zodb_blobs("sqlite-free"),
    sqlite_history_relstorage=_relstorage_blobs("sqlite-history"),
    sqlite_free_relstorage=_relstorage_blobs("sqlite-free"),
    xfail={
        "sqlite_history-blob_transaction_txt": _STRING_AS_SERIAL,
        "sqlite_free-blob_transaction_txt": _STRING_AS_SERIAL,
        "sqlite_free-blob_packing_txt": _NO_OLD_REVISIONS,
    },
)
def test_blobs_on_sqlite(case):
    _run(case)


# RelStorage's only, which are ZODB's with corrections, to save time. ZODB's own cannot all pass: blob_packing.txt packs
# to times of this process's clock, which upstream's tests set, and here the server's clock makes the tids.
@parametrize(
    postgresql_history_relstorage=_relstorage_blobs("postgresql-history"),
    postgresql_free_relstorage=_relstorage_blobs("postgresql-free"),
)
def test_blobs_on_postgresql(case):
    needs("postgresql")
    _run(case)


@parametrize(mariadb_free_relstorage=_relstorage_blobs("mariadb-free"))
def test_blobs_on_mariadb(case):
    needs("mariadb")
    _run(case)


def _run(case):
    try:
        run(case)
    finally:
        vars(case[1]).clear()  # pytest keeps the case, and that its storages


# Everything else


class _OnDatabase:
    """A mix-in for upstream's test cases: a database of ``kind``, and blobs in S3 where upstream makes a RelStorage."""

    kind = None

    @pytest.fixture(autouse=True)
    def _database_is_there(self):
        needs(self.kind)

    def make_adapter(self, options, db="data"):
        return _adapter(self.kind, db, options)

    def _wrap_storage(self, storage):
        return _blobs_in_s3(storage, "data")

    def _new_storage_client(self):
        return self.make_storage(zap=False)

    # What only the tests that are left out would use.

    def get_adapter_class(self):
        raise NotImplementedError

    get_adapter_zconfig = get_adapter_class

    def verify_adapter_from_zconfig(self, adapter):
        raise NotImplementedError


class _Converting(_OnDatabase):
    """The same for the tests of zodbconvert, which read a configuration file."""

    # The file names a cache directory, which belongs to one storage at a time.
    src_db_needs_closed_before_zodbconvert = True
    dest_db_needs_closed_before_zodbconvert = True

    def _cfg_relstorage(self, name, path, blob_dir):
        text = section(_database(self.kind, name).section(), name, blob_dir)
        return text.replace("%import zodb_s3blobs", "").replace("<s3blobstorage 1>", f"<s3blobstorage {name}>")

    def _cfg_header(self):
        return "%import zodb_s3blobs\n" + super()._cfg_header()


def _old_names(base):
    """A mix-in with ZODB's tests in ``base`` by the names before ZODB 6: RelStorage's corrections still have those."""
    tests = {}
    for cls in base.__mro__:
        if cls.__module__.startswith("ZODB.tests."):
            for name, test in vars(cls).items():
                if name.startswith("test"):
                    tests.setdefault(f"check{name.removeprefix('test')}", test)
    return type("OldNames", (), tests)


#: What is the database's own in what an S3BlobStorage adds: locks and tids at the vote, undo, connections of threads.
_ON_POSTGRESQL = ("ConflictResolution", "MTStorage", "TransactionalUndoStorage")


#: What is not slow.
_QUICK = ("ConflictResolution",)


def _test_case(kind, base, mixin, left_out):
    """A test case for pytest: upstream's ``base`` without the tests ``left_out``."""
    name = "Test" + "".join(part.title() for part in kind.split("-")) + base.__name__.removeprefix("Abstract")
    namespace = {
        "__module__": __name__,
        "kind": kind,
        "driver_name": _DRIVERS[kind.split("-")[0]],
        "keep_history": kind in _HISTORY,
    }
    cls = type(base)(name, (mixin, base, _old_names(base)), namespace)
    for old in left_out:
        assert callable(getattr(cls, old)), f"there is no such test: {old}"
        setattr(cls, old, None)
    for old in dir(cls):
        if old.startswith("check"):  # the same test, or its correction
            setattr(cls, f"test{old.removeprefix('check')}", getattr(cls, old))
    cls.slow_tests = None
    if kind == "sqlite-history" and base is hptestbase.HistoryPreservingRelStorageTests:
        cls.slow_tests = [f"test{old.removeprefix('check')}" for old in _beyond(_QUICK, base)]
    globals()[name] = cls


_LEFT_OUT = {
    "checkConfigureViaZConfig": "is of a <relstorage> with a blob-dir, which an s3blobstorage refuses",
    "check_race_external_invalidate_vs_disconnect": "opens hundreds of storages in a race against its time limit; "
    "RelStorage's own test cases skip it",
}
_LEFT_OUT_OF_CONVERTING = {
    "test_new_instance_still_zlib": "looks for zlibstorage's attributes in RelStorage as its base, and that is ours",
}


def _beyond(modules, base):
    """The names of the tests that are in none of the ``modules`` of ZODB.tests."""
    kept = [f"ZODB.tests.{module}" for module in modules]
    names = {name for cls in base.__mro__ if cls.__module__ in kept for name in vars(cls)}
    return {
        name
        for name in [*dir(base), *dir(_old_names(base))]
        if name.startswith("check") and not {name, f"test{name.removeprefix('check')}"} & names
    }


def _only_on_sqlite(base):
    return dict.fromkeys(_beyond(_ON_POSTGRESQL, base), "runs on SQLite, to save time")


for _kind in KINDS:
    if _kind.startswith("mariadb"):
        continue  # to save time, the blobs only
    if _kind in _HISTORY:
        _storage_tests = hptestbase.HistoryPreservingRelStorageTests
        _from_file, _to_file = hptestbase.HistoryPreservingFromFileStorage, hptestbase.HistoryPreservingToFileStorage
        _pack, _convert = packundo.HistoryPreservingTestPack, reltestbase.AbstractRSDestHPZodbConvertTests
    else:
        _storage_tests = hftestbase.HistoryFreeRelStorageTests
        _from_file, _to_file = hftestbase.HistoryFreeFromFileStorage, hftestbase.HistoryFreeToFileStorage
        _pack, _convert = packundo.HistoryFreeTestPack, reltestbase.AbstractRSDestHFZodbConvertTests
    _test_case(_kind, _from_file, _OnDatabase, {})
    _test_case(_kind, _to_file, _OnDatabase, {})
    _test_case(_kind, _convert, _Converting, _LEFT_OUT_OF_CONVERTING)
    if _kind.startswith("postgresql"):
        _test_case(_kind, _storage_tests, _OnDatabase, _LEFT_OUT | _only_on_sqlite(_storage_tests))
    else:
        _test_case(_kind, _storage_tests, _OnDatabase, _LEFT_OUT)
        _test_case(_kind, _pack, _OnDatabase, {})
        _test_case(_kind, reltestbase.AbstractRSSrcZodbConvertTests, _Converting, _LEFT_OUT_OF_CONVERTING)
