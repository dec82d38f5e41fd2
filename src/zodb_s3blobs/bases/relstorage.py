"""RelStorage as the base. Only this file and `databases` use parts of RelStorage that ZODB's interfaces do not promise.

RelStorage chooses the tid when it finishes a transaction, unless the transaction has blobs in a shared directory: then
RelStorage locks the database at the end of the vote, and passes the tid to its blob helper. Our helper only requests
that. Several processes use one database, and no process knows all of its state: garbage collection reads the database
itself, and a lock in the database keeps other processes from restoring transactions meanwhile.

No class or module of RelStorage is changed. `TESTED` are the versions whose internals are known to work as used here.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

from relstorage.adapters.connections import StoreConnection
from relstorage.blobhelper import NoBlobHelper
from relstorage.storage.copy import Copy
from ZODB.POSException import POSKeyError, StorageTransactionError
from ZODB.utils import maxtid, p64, u64

from .adapter import BaseAdapter, DatabaseBusy, DatabaseView, UnsuitableBase, loadable_one_by_one
from .databases import SqlDatabase, database_of, lasting

#: The least version of RelStorage, and the first one that has not been tested.
TESTED = (4, 0), (4, 4)

#: How long, in seconds, to wait for another process that deletes some blobs, or restores one transaction.
_LOCK_TIMEOUT = 60.0


class RelStorageAdapter(BaseAdapter):
    """The adapter for the RelStorage ``relstorage``, which ``storage`` is or wraps. Raises `UnsuitableBase`."""

    shared = True
    not_for_zeo = (
        "ZEO cannot serve RelStorage: its clients would miss commits, and get conflicts as errors. Use the "
        "s3blobstorage in the configuration of the application (zope.conf), and as many processes as you like"
    )

    def __init__(self, storage: Any, relstorage: Any) -> None:
        _check_version()
        super().__init__(storage, lambda: relstorage)
        self._relstorage = relstorage
        self._database = database_of(relstorage._adapter)
        if not isinstance(relstorage.blobhelper, _TidBlobHelper):  # a new instance has it already
            self._database.require_supported()
            relstorage.blobhelper = _TidBlobHelper()

    def committing_tid(self) -> bytes | None:
        return self._relstorage.blobhelper.tid

    def mark_has_blobs(self) -> None:
        # Like RelStorage's own `storeBlob`; this makes the helper part of the transaction.
        self._relstorage._tpc_phase.shared_state.blobhelper.txn_has_blobs = True

    def undo(self, transaction_id: bytes, transaction: Any) -> tuple[Any, Iterator[tuple[bytes, bytes, bytes]]]:
        result = self._storage.undo(transaction_id, transaction)
        return result, self._undone()

    def _undone(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        for oid, tid in self._relstorage.blobhelper.undone:
            try:
                yield p64(oid), p64(tid), self._storage.loadSerial(p64(oid), p64(tid))
            except POSKeyError:
                pass  # the undone transaction created the object

    def copy(self, other: Any, destination: Any) -> None:
        if self._storage is not self._relstorage:
            # The wrapper has registered its encoding of records with RelStorage, whose `Copy` would encode them again.
            super().copy(other, destination)
            return
        # In a history-free database `Copy` copies current revisions only.
        Copy(destination, destination, destination).copyTransactionsFrom(other)

    def restoring(self) -> AbstractContextManager[None]:
        return _excluding(
            lambda: self._database.try_lock_in(self._relstorage._tpc_phase.shared_state.store_connection),
            "another process has been deleting dead blobs for a minute: restore again later",
        )

    @contextmanager
    def revisions(self) -> Iterator[DatabaseView]:
        # Not a load connection, which may go to a replica that lags behind.
        adapter = self._relstorage._adapter.new_instance()
        connection = StoreConnection(adapter.connmanager)
        try:
            yield SqlView(adapter, connection, self._database)
        finally:
            connection.drop()
            adapter.release()

    def identity(self) -> str:
        return self._database.identity()

    existing_identity = identity

    def was(self, identity: str) -> bool:
        return lasting(identity) == lasting(self.identity())

    def last_transaction(self) -> bytes:
        with self.revisions() as revisions:
            return revisions.lastTransaction()

    def has_transaction(self, tid: bytes) -> bool:
        instance = self._relstorage.new_instance()
        try:
            return any(transaction.tid == tid for transaction in instance.iterator(tid, tid))
        finally:
            instance.release()


class _TidBlobHelper(NoBlobHelper):
    """A blob helper of one RelStorage instance: it stores no blobs, and receives the tid of transactions with blobs."""

    NEEDS_DB_LOCK_TO_VOTE = True

    txn_has_blobs = False
    #: The tid, from the lock of the database to the end of the transaction.
    tid: bytes | None = None
    #: The revisions that the last undo of this transaction made current again: numbers of oid and tid.
    undone: list[tuple[int, int]] = []  # noqa: RUF012 (never changed, only replaced)

    def new_instance(self, adapter: Any) -> "_TidBlobHelper":
        return type(self)()

    def begin(self) -> None:
        self.__dict__.clear()

    abort = clear_temp = close = begin

    def vote(self, tid: bytes | None = None) -> None:
        if tid is None:
            raise StorageTransactionError("RelStorage has not locked the database, so the transaction has no tid yet")
        self.tid = tid

    def copy_undone(self, copied: list[tuple[int, int]], tid: bytes) -> None:
        self.undone, self.tid = copied, tid


class SqlView:
    """The `DatabaseView` of an SQL database, which sees the commits of all processes."""

    shared = True

    def __init__(self, adapter: Any, connection: Any, database: SqlDatabase) -> None:
        self._adapter = adapter
        self._connection = connection
        self._database = database

    def _cursor(self) -> Any:
        self._connection.rollback_quietly()  # ends the snapshot of earlier reads
        return self._connection.cursor

    def lastTransaction(self) -> bytes:
        return p64(self._adapter.txncontrol.get_tid(self._cursor()))

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        record = self._adapter.mover.load_revision(self._cursor(), u64(oid), u64(tid))
        if not record:
            raise POSKeyError(oid, tid)
        return record

    def loadable(self, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None] = lambda: None) -> set[bytes]:
        return loadable_one_by_one(self, oid, tids, pause)  # the database has an index

    def has_object(self, oid: bytes) -> bool:
        state, _ = self._adapter.mover.load_current(self._cursor(), u64(oid))
        return bool(state)

    def tids(self, oid: bytes, pause: Callable[[], None] = lambda: None) -> set[bytes]:
        tids: set[bytes] = set()
        before: int | None = u64(maxtid)
        while before is not None:
            state, before = self._adapter.mover.load_before(self._cursor(), u64(oid), before)
            if state:  # empty where the creation of the object has been undone
                tids.add(p64(before))
            pause()
        return tids

    def no_restores(self) -> AbstractContextManager[None]:
        return _excluding(
            self._database.try_lock,
            "another process has been restoring a transaction (copyTransactionsFrom, zodbconvert) or deleting dead "
            "blobs for a minute: pack again later",
        )


@contextmanager
def _excluding(try_lock: Callable[[], AbstractContextManager[bool]], refusal: str) -> Iterator[None]:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    with ExitStack() as stack:
        while not stack.enter_context(try_lock()):
            stack.close()
            if time.monotonic() > deadline:
                raise DatabaseBusy(refusal)
            time.sleep(0.05)
        yield


def _check_version() -> None:
    installed = version("RelStorage")
    least, untested = TESTED
    number = re.match(r"(\d+)\.(\d+)", installed)  # a suffix such as rc1 does not matter
    if number is None or not least <= (int(number[1]), int(number[2])) < untested:
        raise UnsuitableBase(
            f"s3blobstorage uses internals of RelStorage and works with versions from {least[0]}.{least[1]} to before "
            f"{untested[0]}.{untested[1]}; {installed} is installed: install one of those, or a newer zodb-s3blobs"
        )
