"""What is particular to a base: all that `S3BlobStorage` has to know of it and that ZODB has no interface for."""

import os
import time
from base64 import decodebytes
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import ZODB.blob
from ZODB.BaseStorage import BaseStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import DATA_HDR_LEN, CorruptedError, DataHeader, DataHeaderFromString
from ZODB.interfaces import IMVCCStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import load_current, maxtid, oid_repr, p64, tid_repr, u64

from ..errors import S3BlobsError
from ..identity import Identity

#: The modules of wrappers that have exactly the revisions of their ``base``. All others are asked themselves.
_TRANSPARENT = {"zc.zlibstorage"}

#: How often to look for a transaction while another one is being written, and how many seconds to wait in between.
_TRIES, _PAUSE = 5, 0.1

#: After how many revisions to pause.
_PAUSE_EVERY = 100


class UnsuitableBase(S3BlobsError, ValueError):
    """The storage cannot be wrapped; the message says why and what to do."""


class DatabaseBusy(S3BlobsError):
    """Another process does what excludes this; the message says what to do."""


class DatabaseDamaged(S3BlobsError):
    """A part of the database cannot be read; the message says which part, and what to do."""


class DatabaseView(Protocol):
    """What a database holds at the moment when it is asked, whatever has been read from it before."""

    #: Whether other processes commit to the database.
    shared: bool

    def lastTransaction(self) -> bytes:
        """The tid of the last transaction of any process."""

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        """The record of that revision. Raises POSKeyError if there is none."""

    def loadable(self, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None] = lambda: None) -> set[bytes]:
        """Return at least those of ``tids`` at which `loadSerial` finds a record of the object.

        For many of them, this takes as long as for a few. ``pause`` is called now and then, and may sleep: other
        threads wait for nothing meanwhile.
        """

    def has_object(self, oid: bytes) -> bool:
        """Return whether the object has a current record."""

    def tids(self, oid: bytes, pause: Callable[[], None] = lambda: None) -> set[bytes]:
        """Return the tids of all revisions of the object that `loadSerial` finds; ``pause`` as in `loadable`."""

    def no_restores(self) -> AbstractContextManager[None]:
        """While it lasts no other process restores transactions, with tids from before. Raises DatabaseBusy."""


class BaseAdapter:
    """A storage that tells the tid when a transaction begins, and is this process's alone.

    ``storage``: the base; ``holder`` returns the storage in its wrappings that has the tid. Threads are the base's
    business, as in `S3BlobStorage`.
    """

    #: Whether other processes commit to the same database.
    shared = False
    #: Why a ZEO server cannot serve it.
    not_for_zeo: str | None = None

    def __init__(self, storage: Any, holder: Callable[[], Any]) -> None:
        self._storage = storage
        self._holder = holder
        #: That of the database's own files; of one in memory or behind a server, what is kept here ends with it.
        self.own_identity = Identity(_file_of(innermost(storage)))

    def committing_tid(self) -> bytes | None:
        """The tid of the transaction that is being committed; None as long as it has none."""
        return self._holder()._tid

    def mark_has_blobs(self) -> None:
        """The transaction that is being committed has blobs: its tid is needed at the end of the vote."""

    def undo(self, transaction_id: bytes, transaction: Any) -> tuple[Any, Iterator[tuple[bytes, bytes, bytes]]]:
        """The base's undo and its result; also the revisions that objects go back to: oid, tid and record."""
        result = self._storage.undo(transaction_id, transaction)
        _, oids = result
        return result, self._before(decodebytes(transaction_id + b"\n"), oids)

    def _before(self, undone: bytes, oids: list[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
        for oid in oids:
            try:
                before = self._storage.loadBefore(oid, undone)
            except POSKeyError:
                continue  # the undone transaction created the object
            if before is not None:
                yield oid, before[1], before[0]

    def copy(self, other: Any, destination: Any) -> None:
        """Copy the transactions of ``other``, with their blobs, to ``destination``, which is around the base."""
        ZODB.blob.copyTransactionsFromTo(other, destination)

    def restoring(self) -> AbstractContextManager[None]:
        """While it lasts, transactions can be restored with tids from before. Raises DatabaseBusy."""
        return nullcontext()

    @contextmanager
    def revisions(self) -> Iterator[DatabaseView]:
        """What the database holds; for the thread that enters."""
        if not IMVCCStorage.providedBy(self._storage):
            yield StorageView(self._storage)
            return
        instance = self._storage.new_instance()
        try:
            yield StorageView(instance, instance.poll_invalidations)
        finally:
            instance.release()

    # As `lease.Database`

    def identity(self) -> str:
        """Return what tells the database from all others and from its copies; one that has none yet is given one."""
        return self.own_identity.make()

    def was(self, identity: str) -> bool:
        """Return whether the database can have had that ``identity`` before a restart."""
        return False

    def last_transaction(self) -> bytes:
        """Return the tid of the last transaction that the database has, `z64` of none.

        That is not always what a FileStorage says: one that is started after a crash names the transaction that it has
        just cut off, and one that is packed a transaction of which the pack has left nothing.
        """
        last = self._storage.lastTransaction()
        for bits in range(0, 64, 4):  # how much is looked through grows
            tids = self._tids(p64(max(0, u64(last) - (1 << bits) + 1)), last)
            if tids is None:
                break
            if tids:
                return tids[-1]
        return last

    def has_transaction(self, tid: bytes) -> bool:
        """Return whether the database has the transaction with exactly that tid, or had it before a pack."""
        return tid in self.own_identity.packed_away or tid in (self._tids(tid, tid) or ())

    def require_whole(self, last: bytes) -> None:
        """Raise DatabaseDamaged if transactions after ``last``, the last one that an iterator gave, cannot be read.

        FileStorage's iterator ends without an error where it meets a damaged transaction.
        """
        storage = innermost(self._storage)
        newest = _newest_in_file(storage) if isinstance(storage, FileStorage) else None
        if newest is None or newest <= last:
            return
        tids = self._tids(last, newest)  # what has been committed meanwhile can be read
        if not tids or tids[-1] < newest:
            raise DatabaseDamaged(
                f"{storage.getName()} is damaged: the transactions after {tid_repr(last)}, up to {tid_repr(newest)}, "
                f"cannot be read. Restore it from a backup, or copy what can be read with ZODB's fsrecover"
            )

    def _tids(self, start: bytes, stop: bytes) -> list[bytes] | None:
        """Return the tids of the transactions from ``start`` to ``stop``, in order; None if they cannot be read."""
        for _ in range(_TRIES):
            try:
                return _tids(innermost(self._storage), start, stop)
            except (AttributeError, ValueError, CorruptedError):
                # FileStorage's iterator stumbles over a transaction that is just being written at the end of the file.
                time.sleep(_PAUSE)
        return None


class StorageView:
    """The `DatabaseView` of a storage of which this process sees all changes, after ``poll``."""

    shared = False

    def __init__(self, storage: Any, poll: Callable[[], Any] = lambda: None) -> None:
        self._storage = storage
        self._poll = poll

    def lastTransaction(self) -> bytes:
        self._poll()
        return self._storage.lastTransaction()

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        return self._storage.loadSerial(oid, tid)

    def loadable(self, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None] = lambda: None) -> set[bytes]:
        return _loadable(self._storage, oid, set(tids), pause)

    def has_object(self, oid: bytes) -> bool:
        try:
            load_current(self._storage, oid)
        except POSKeyError:
            return False
        return True

    def tids(self, oid: bytes, pause: Callable[[], None] = lambda: None) -> set[bytes]:
        return _tids_of(self._storage, oid, pause)

    def no_restores(self) -> AbstractContextManager[None]:
        return nullcontext()


def revisions_of(storage: Any) -> DatabaseView:
    """Return what a ``storage`` holds of which this process sees all changes, such as one opened read-only."""
    return StorageView(storage)


def is_live(revisions: Any, oid: bytes, tid: bytes) -> bool:
    """Return whether the storage, or `DatabaseView`, can load that revision."""
    try:
        revisions.loadSerial(oid, tid)
    except POSKeyError:
        return False
    return True


def loadable_one_by_one(revisions: Any, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None]) -> set[bytes]:
    """Return as `DatabaseView.loadable`, but exactly; by a `loadSerial` for each of ``tids``."""
    live = set()
    for number, tid in enumerate(tids, 1):
        if is_live(revisions, oid, tid):
            live.add(tid)
        if number % _PAUSE_EVERY == 0:
            pause()
    return live


def _loadable(storage: Any, oid: bytes, tids: set[bytes], pause: Callable[[], None]) -> set[bytes]:
    """As `DatabaseView.loadable`; where one walk through the history of the object can answer for all, that does."""
    inside, stock = _inside(storage)
    if stock is DemoStorage.loadSerial:
        live = _loadable(inside.changes, oid, tids, pause)
        return live | _loadable(inside.base, oid, tids - live, pause)
    if stock is FileStorage.loadSerial and len(tids) > 1:
        return _loadable_in_file(inside, oid, tids, pause)
    return loadable_one_by_one(storage, oid, tids, pause)


def _inside(storage: Any) -> tuple[Any, Any]:
    """Return the storage in transparent wrappers that has the revisions, and its `loadSerial`, which tells its kind."""
    while type(storage).__module__ in _TRANSPARENT:
        storage = storage.base
    return storage, getattr(type(storage), "loadSerial", None)


def _loadable_in_file(storage: Any, oid: bytes, tids: set[bytes], pause: Callable[[], None]) -> set[bytes]:
    """As `_loadable`, of a FileStorage.

    Its `loadSerial` and `history` walk from the newest revision on, and hold the storage's lock as long.
    """
    live: set[bytes] = set()
    undone: set[bytes] = set()
    try:
        with _records(storage, oid, pause) as records:
            for record, _ in records:
                if record.tid in tids:
                    (live if record.plen else undone).add(record.tid)
                    if len(live) == len(tids):
                        break
    except CorruptedError:
        return loadable_one_by_one(storage, oid, tids, pause)  # which says what is wrong
    # What an undo wrote has no data of its own: it goes back to that of another revision, or to none.
    return live | loadable_one_by_one(storage, oid, undone - live, pause)


def _tids_of(storage: Any, oid: bytes, pause: Callable[[], None]) -> set[bytes]:
    """As `DatabaseView.tids`."""
    inside, stock = _inside(storage)
    if stock is DemoStorage.loadSerial:
        return _tids_of(inside.changes, oid, pause) | _tids_of(inside.base, oid, pause)
    if stock is FileStorage.loadSerial:
        with _records(inside, oid, pause) as records:
            return {record.tid for record, with_data in records if with_data() is not None}
    tids: set[bytes] = set()
    before = maxtid
    try:
        while (found := storage.loadBefore(oid, before)) is not None:
            before = found[1]
            tids.add(before)
            if len(tids) % _PAUSE_EVERY == 0:
                pause()
    except POSKeyError:
        pass
    return tids


def repeated(storage: Any, oid: bytes, tid: bytes) -> bytes | None:
    """Return the tid of the earlier revision whose record, and so whose blob, that revision of ``storage`` repeats.

    An undo makes such revisions. None if the revision repeats no other one, and where nothing proves which one: only a
    FileStorage remembers it, and only until a pack.
    """
    inside, stock = _inside(storage)
    if stock is DemoStorage.loadSerial:
        return repeated(inside.changes, oid, tid) or repeated(inside.base, oid, tid)
    if stock is not FileStorage.loadSerial:
        return None
    with _records(inside, oid, lambda: None) as records:
        for record, with_data in records:
            if record.tid == tid:
                # The record that has the data is the one that was stored together with the blob.
                source = None if record.plen else with_data()
                return source.tid if source is not None else None
    return None


@contextmanager
def _records(
    storage: Any, oid: bytes, pause: Callable[[], None]
) -> Iterator[Iterator[tuple[DataHeader, Callable[[], DataHeader | None]]]]:
    """Walk through the records of an object in a FileStorage, from the newest on, without holding the storage's lock.

    Each comes with a function that returns the record which has its data: another one if an undo wrote it, None if
    that undid the creation of the object. Both raise CorruptedError. The file as it is now only grows, and one that a
    pack replaces can be read until it is closed.
    """
    with storage._lock:
        try:
            position = storage._lookup_pos(oid)
        except POSKeyError:
            position = 0
        file = os.dup(storage._file.fileno())
    try:
        yield _walk(file, oid, position, pause)
    finally:
        os.close(file)


def _walk(
    file: int, oid: bytes, position: int, pause: Callable[[], None]
) -> Iterator[tuple[DataHeader, Callable[[], DataHeader | None]]]:
    number = 0
    while position:
        record = _record(file, oid, position)
        yield record, partial(_with_data, file, record)
        position = record.prev
        number += 1
        if number % _PAUSE_EVERY == 0:
            pause()


def _with_data(file: int, record: DataHeader) -> DataHeader | None:
    while not record.plen:
        if not record.back:
            return None
        record = _record(file, record.oid, record.back)
    return record


def _record(file: int, oid: bytes, position: int) -> DataHeader:
    """Return the header of the record of ``oid`` at ``position``, with its backpointer."""
    data = os.pread(file, DATA_HDR_LEN + 8, position)
    if len(data) < DATA_HDR_LEN + 8:
        raise CorruptedError(f"A record of {oid_repr(oid)} is cut off", position)
    record = DataHeaderFromString(data[:DATA_HDR_LEN])
    if not record.plen:
        record.back = u64(data[DATA_HDR_LEN:])
    if record.oid != oid or max(record.prev, record.back) >= position:
        raise CorruptedError(f"There is no record of {oid_repr(oid)}", position)
    return record


def innermost(storage: Any) -> Any:
    """What is in wrappers such as zlibstorage: what they do not have they take from their base."""
    while not isinstance(storage, BaseStorage | MappingStorage | DemoStorage):
        base = vars(storage).get("base")
        if base is None:
            break
        storage = base
    return storage


def _tids(storage: Any, start: bytes, stop: bytes) -> list[bytes]:
    transactions = storage.iterator(start, stop)
    try:
        return [transaction.tid for transaction in transactions]
    finally:
        if hasattr(transactions, "close"):
            transactions.close()


def _newest_in_file(storage: FileStorage) -> bytes | None:
    """Return the tid of the transaction at the end of the file; None if another one is just being written there."""
    with closing(storage.iterator()) as transactions:
        try:
            end = transactions._file_size - 8
            length = transactions._read_num(end)
            return transactions._read_txn_header(end - length).tid if length <= end - 4 else None
        except (CorruptedError, OSError, ValueError):
            return None


def _file_of(storage: Any) -> str | None:
    """Return the file of the database; of a demostorage, that of what is stored into. None if it has none."""
    if isinstance(storage, DemoStorage):
        return _file_of(innermost(storage.changes))
    return os.path.abspath(storage.getName()) if isinstance(storage, FileStorage) else None
