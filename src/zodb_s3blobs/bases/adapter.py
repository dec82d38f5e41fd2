"""Adapters for the supported base storages: what `S3BlobStorage` needs and ZODB's interfaces do not cover."""

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
from ZODB.utils import load_current, maxtid, oid_repr, p64, tid_repr, u64, z64

from ..errors import S3BlobsError
from ..identity import Identity

#: The modules of wrappers that have exactly the revisions of their ``base``. Every other wrapper is asked itself.
_TRANSPARENT = {"zc.zlibstorage"}

#: Attempts to read transactions while another one is being written, and the seconds between two attempts.
_TRIES, _PAUSE = 5, 0.1

#: Revisions between two pauses.
_PAUSE_EVERY = 100

#: The advice for a database that is damaged.
RECOVER = "Restore it from a backup, or copy what can be read with ZODB's fsrecover"


class UnsuitableBase(S3BlobsError, ValueError):
    """The storage cannot be opened or wrapped; the message says why, and what to do."""


class DatabaseBusy(S3BlobsError):
    """Another process holds the lock that this operation needs; the message says what to do."""


class DatabaseDamaged(S3BlobsError):
    """A part of the database cannot be read; the message says which part, and what to do."""


class DatabaseView(Protocol):
    """A live view of a database: each call reads the present state."""

    #: Whether other processes commit to the database.
    shared: bool

    def lastTransaction(self) -> bytes:
        """Return the tid of the last transaction of any process."""

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        """Return the record of the revision. Raises POSKeyError if there is none."""

    def loadable(self, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None] = lambda: None) -> set[bytes]:
        """Return at least the ``tids`` at which `loadSerial` finds a record of the object.

        The time hardly depends on the number of ``tids``. ``pause`` is called now and then without a lock held, and
        may sleep.
        """

    def has_object(self, oid: bytes) -> bool:
        """Return whether the object has a current record."""

    def tids(self, oid: bytes, pause: Callable[[], None] = lambda: None) -> set[bytes]:
        """Return the tids of all revisions of the object that `loadSerial` finds; ``pause`` as in `loadable`."""

    def no_restores(self) -> AbstractContextManager[None]:
        """Keep other processes from restoring transactions, with their old tids, during the body. DatabaseBusy."""


class BaseAdapter:
    """The adapter for a storage that knows the tid when a transaction begins, and that only this process uses.

    ``storage``: the base; ``holder`` returns the wrapped storage that has the tid. A method may be called in the
    threads in which the base allows the methods that it uses.
    """

    #: Whether other processes commit to the same database.
    shared = False
    #: Whether `tpc_begin` of the base begins with the tid that it is given.
    takes_tid: bool
    #: Reason why a ZEO server cannot serve the base; None if it can.
    not_for_zeo: str | None = None

    def __init__(self, storage: Any, holder: Callable[[], Any]) -> None:
        self._storage = storage
        self._holder = holder
        self.takes_tid = _takes_tid(storage)
        #: The identity in the database's own files; for a database in memory or behind a server, kept in memory.
        self.own_identity = Identity(_file_of(innermost(storage)))

    def committing_tid(self) -> bytes | None:
        """Return the tid of the transaction that is being committed; None while it has none."""
        return self._holder()._tid

    def mark_has_blobs(self) -> None:
        """Record that the current transaction has blobs, and so needs its tid at the end of the vote."""

    def undo(self, transaction_id: bytes, transaction: Any) -> tuple[Any, Iterator[tuple[bytes, bytes, bytes]]]:
        """Undo a transaction in the base (IStorageUndoable); return the result, and the revisions now current again.

        The revisions are an iterator of oid, tid and record.
        """
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
        """Copy the transactions of ``other``, with their blobs, to ``destination``, the storage around the base."""
        ZODB.blob.copyTransactionsFromTo(other, destination)

    def restoring(self) -> AbstractContextManager[None]:
        """Allow restoring transactions, with their old tids, during the body. Raises DatabaseBusy."""
        return nullcontext()

    @contextmanager
    def revisions(self) -> Iterator[DatabaseView]:
        """Open a view of the database for the thread that enters."""
        if not IMVCCStorage.providedBy(self._storage):
            yield StorageView(self._storage)
            return
        instance = self._storage.new_instance()
        try:
            yield StorageView(instance, instance.poll_invalidations)
        finally:
            instance.release()

    def record(self, oid: bytes, tid: bytes, any_thread: bool) -> bytes | None:
        """Return the record of the committed revision (oid, tid), None if there is none.

        ``any_thread``: do not use the base itself if it belongs to one thread, and may show an old state.
        """
        needs_own = any_thread and IMVCCStorage.providedBy(self._storage)
        storage = self._storage.new_instance() if needs_own else self._storage
        try:
            return storage.loadSerial(oid, tid)
        except POSKeyError:
            return None
        finally:
            if needs_own:
                storage.release()

    # The protocol `lease.Database`

    def identity(self) -> str:
        """Return the identity of the database, which no other one and no copy has; create one if there is none yet."""
        return self.own_identity.make()

    def existing_identity(self) -> str | None:
        """Return the `identity`, None if the database has none yet. Writes nothing: for the commands."""
        return self.own_identity.read()

    def was(self, identity: str) -> bool:
        """Return whether the database can have had this ``identity`` before a restart."""
        return False

    def last_transaction(self) -> bytes:
        """Return the tid of the last transaction that the database really has, `z64` if it has none.

        A FileStorage's own `lastTransaction` may differ: after a crash it is the transaction that the start has cut
        off, and after a pack it may be a transaction that the pack has removed.
        """
        last = self._storage.lastTransaction()
        for bits in range(0, 64, 4):  # ever longer ranges of tids
            tids = self._tids(p64(max(0, u64(last) - (1 << bits) + 1)), last)
            if tids is None:
                break
            if tids:
                return tids[-1]
        return last

    def has_transaction(self, tid: bytes) -> bool:
        """Return whether the database has the transaction with exactly this tid, or had it before a pack."""
        return tid in self.own_identity.packed_away or tid in (self._tids(tid, tid) or ())

    def require_whole(self, last: bytes) -> None:
        """Raise DatabaseDamaged if transactions after ``last``, the last one that an iterator gave, cannot be read.

        FileStorage's iterator ends without an error where it meets a damaged transaction.
        """
        inside = innermost(self._storage)
        for storage in _files_in(inside):
            # The last one of a demostorage says nothing about its parts, which are therefore read once more.
            _require_whole(storage, last if storage is inside else z64)

    def _tids(self, start: bytes, stop: bytes) -> list[bytes] | None:
        return _readable_tids(innermost(self._storage), start, stop)


class StorageView:
    """The `DatabaseView` of a storage that shows this process all changes after ``poll``."""

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
    """Return the view of a ``storage`` that shows this process all changes, such as one opened read-only."""
    return StorageView(storage)


def is_live(revisions: Any, oid: bytes, tid: bytes) -> bool:
    """Return whether ``revisions``, a storage or a `DatabaseView`, can load the revision."""
    try:
        revisions.loadSerial(oid, tid)
    except POSKeyError:
        return False
    return True


def loadable_one_by_one(revisions: Any, oid: bytes, tids: Iterable[bytes], pause: Callable[[], None]) -> set[bytes]:
    """Return exactly the ``tids`` that can be loaded, by one `loadSerial` each. ``pause``: see `DatabaseView`."""
    live = set()
    for number, tid in enumerate(tids, 1):
        if is_live(revisions, oid, tid):
            live.add(tid)
        if number % _PAUSE_EVERY == 0:
            pause()
    return live


def _loadable(storage: Any, oid: bytes, tids: set[bytes], pause: Callable[[], None]) -> set[bytes]:
    """Return `DatabaseView.loadable`, by one walk through the object's history where the storage allows that."""
    inside, stock = _inside(storage)
    if stock is DemoStorage.loadSerial:
        live = _loadable(inside.changes, oid, tids, pause)
        return live | _loadable(inside.base, oid, tids - live, pause)
    if stock is FileStorage.loadSerial and len(tids) > 1:
        return _loadable_in_file(inside, oid, tids, pause)
    return loadable_one_by_one(storage, oid, tids, pause)


def _inside(storage: Any) -> tuple[Any, Any]:
    """Return the storage inside transparent wrappers, and its `loadSerial`, which identifies its kind."""
    while type(storage).__module__ in _TRANSPARENT:
        storage = storage.base
    return storage, getattr(type(storage), "loadSerial", None)


def _loadable_in_file(storage: Any, oid: bytes, tids: set[bytes], pause: Callable[[], None]) -> set[bytes]:
    """Return `_loadable` of a FileStorage, without its lock.

    FileStorage's own `loadSerial` and `history` walk from the newest revision on, and hold the lock all the time.
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
        return loadable_one_by_one(storage, oid, tids, pause)  # raises the storage's own error
    # A record written by an undo has no data of its own: it points back to another revision's data, or to none.
    return live | loadable_one_by_one(storage, oid, undone - live, pause)


def _tids_of(storage: Any, oid: bytes, pause: Callable[[], None]) -> set[bytes]:
    """Return `DatabaseView.tids` of a storage."""
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
    """Return the tid of the earlier revision whose record, and so whose blob, the revision (oid, tid) repeats.

    An undo makes such revisions. Returns None if the revision repeats no other one, or if the storage does not record
    which one: only a FileStorage does, and only until a pack.
    """
    inside, stock = _inside(storage)
    if stock is DemoStorage.loadSerial:
        return repeated(inside.changes, oid, tid) or repeated(inside.base, oid, tid)
    if stock is not FileStorage.loadSerial:
        return None
    with _records(inside, oid, lambda: None) as records:
        for record, with_data in records:
            if record.tid == tid:
                # The record with the data was stored together with the blob.
                source = None if record.plen else with_data()
                return source.tid if source is not None else None
    return None


@contextmanager
def _records(
    storage: Any, oid: bytes, pause: Callable[[], None]
) -> Iterator[Iterator[tuple[DataHeader, Callable[[], DataHeader | None]]]]:
    """Yield the records of an object in a FileStorage, the newest first, without holding the storage's lock.

    Each record comes with a function that returns the record with its data: another one if an undo wrote the record,
    None if the undo removed the object. Both raise CorruptedError. Reading without the lock is safe: the file only
    grows, and a file that a pack has replaced stays readable until it is closed.
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
    """Return the storage inside wrappers such as zlibstorage, which take missing attributes from their ``base``."""
    while not isinstance(storage, BaseStorage | MappingStorage | DemoStorage):
        base = vars(storage).get("base")
        if base is None:
            break
        storage = base
    return storage


def _readable_tids(storage: Any, start: bytes, stop: bytes) -> list[bytes] | None:
    """Return the tids of the transactions from ``start`` to ``stop``, in order; None if they cannot be read."""
    for _ in range(_TRIES):
        try:
            return _tids(storage, start, stop)
        except (AttributeError, ValueError, CorruptedError):
            # FileStorage's iterator fails at a transaction that is being written at the end of the file.
            time.sleep(_PAUSE)
    return None


def _tids(storage: Any, start: bytes, stop: bytes) -> list[bytes]:
    transactions = storage.iterator(start, stop)
    try:
        return [transaction.tid for transaction in transactions]
    finally:
        if hasattr(transactions, "close"):
            transactions.close()


def _takes_tid(storage: Any) -> bool:
    inside, _ = _inside(storage)
    if isinstance(inside, DemoStorage):
        return _takes_tid(inside.changes)
    return isinstance(inside, BaseStorage | MappingStorage)


def _files_in(storage: Any) -> Iterator[FileStorage]:
    """Yield the FileStorages that ``storage``, a result of `innermost`, consists of."""
    if isinstance(storage, DemoStorage):
        yield from _files_in(innermost(storage.base))
        yield from _files_in(innermost(storage.changes))
    elif isinstance(storage, FileStorage):
        yield storage


def _require_whole(storage: FileStorage, last: bytes) -> None:
    """Raise DatabaseDamaged if transactions in the file of ``storage`` after ``last`` cannot be read."""
    newest = _newest_in_file(storage)
    if newest is None or newest <= last:
        return
    tids = _readable_tids(storage, last, newest)  # what has been committed meanwhile can be read
    if not tids or tids[-1] < newest:
        readable = tids[-1] if tids else last
        raise DatabaseDamaged(
            f"{storage.getName()} is damaged: the transactions after {tid_repr(readable)}, up to "
            f"{tid_repr(newest)}, cannot be read. {RECOVER}"
        )


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
    """Return the file of the database, None if it has none; of a demostorage, the file of its changes."""
    if isinstance(storage, DemoStorage):
        return _file_of(innermost(storage.changes))
    return os.path.abspath(storage.getName()) if isinstance(storage, FileStorage) else None
