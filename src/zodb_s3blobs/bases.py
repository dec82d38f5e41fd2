"""Which storages `S3BlobStorage` can wrap, and what it has to know of each kind of them that ZODB has no interface for.

The key of a blob ends with the tid of its transaction, and the blob must be in the bucket before the vote returns. So
the base has to tell the tid before it finishes the transaction.
"""

from base64 import decodebytes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import ZODB.blob
from ZODB.BaseStorage import BaseStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IBlobStorage, IMVCCStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError


class UnsuitableBase(ValueError):
    """The storage cannot be wrapped; the message says why and what to do."""


class Busy(Exception):
    """Another process does what excludes this; the message says what to do."""


class Revisions(Protocol):
    """What a database holds at the moment when it is asked, whatever has been read from it before."""

    #: Whether other processes commit to the database.
    shared: bool

    def lastTransaction(self) -> bytes:
        """The tid of the last transaction of any process."""

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        """The record of that revision. Raises POSKeyError if there is none."""

    def no_restores(self) -> AbstractContextManager[None]:
        """While it lasts no other process restores transactions, with tids from before. Raises Busy."""


class Kind:
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

    def committing_tid(self) -> bytes | None:
        """The tid of the transaction that is being committed; None as long as it has none."""
        return self._holder()._tid

    def expect_blobs(self) -> None:
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
        """While it lasts, transactions can be restored with tids from before. Raises Busy."""
        return nullcontext()

    @contextmanager
    def revisions(self) -> Iterator[Revisions]:
        """What the database holds; for the thread that enters."""
        if not IMVCCStorage.providedBy(self._storage):
            yield _Current(self._storage)
            return
        instance = self._storage.new_instance()
        try:
            yield _Current(instance, instance.poll_invalidations)
        finally:
            instance.release()

    def database(self) -> str | None:
        """What all processes on this database have in common and a copy of it has not, as of now; None: only this one.

        May wait for a database server; any thread may call.
        """
        return None


class _Current:
    """The `Revisions` of a storage of which this process sees all changes, after ``poll``."""

    shared = False

    def __init__(self, storage: Any, poll: Callable[[], Any] = lambda: None) -> None:
        self._storage = storage
        self._poll = poll

    def lastTransaction(self) -> bytes:
        self._poll()
        return self._storage.lastTransaction()

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        return self._storage.loadSerial(oid, tid)

    def no_restores(self) -> AbstractContextManager[None]:
        return nullcontext()


def kind_of(base: Any) -> Kind:
    """What kind of storage ``base`` is.

    Raises `UnsuitableBase` if it cannot tell the tid of a transaction in time, or stores blobs itself.
    """
    innermost = _innermost(base)
    relational = type(innermost).__module__.startswith("relstorage.")
    # RelStorage puts how it connects to the database into its name.
    name = type(base).__name__ if relational else f"{type(base).__name__} {base.getName()!r}"
    if _stores_blobs(base):
        raise UnsuitableBase(
            f"{name} stores blobs itself already: remove blob-dir from its section, or the s3blobstorage around it"
        )
    if relational:
        from .relstorage import RelStorageKind  # it need not be installed

        return RelStorageKind(base, innermost)
    holder = _tid_holder(innermost)
    if holder is None:
        raise UnsuitableBase(
            f"{name} cannot tell the tid of a transaction before it is finished, which s3blobstorage needs to name "
            f"the blobs in the bucket: use a filestorage, mappingstorage, demostorage or relstorage, or a wrapper of "
            f"one"
        )
    return Kind(base, holder)


def _stores_blobs(storage: Any) -> bool:
    if isinstance(storage, DemoStorage):
        # Without a changes storage of its own it offers blobs, but keeps none before it is asked to.
        temporary = isinstance(storage.changes, MappingStorage)
        return _stores_blobs(storage.base) or not (temporary or not _stores_blobs(storage.changes))
    return IBlobStorage.providedBy(storage)


def _innermost(storage: Any) -> Any:
    """What is in wrappers such as zlibstorage: what they do not have they take from their base."""
    while not isinstance(storage, BaseStorage | MappingStorage | DemoStorage):
        base = vars(storage).get("base")
        if base is None:
            break
        storage = base
    return storage


def _tid_holder(storage: Any) -> Callable[[], Any] | None:
    if isinstance(storage, DemoStorage):
        # Not now: a demo storage may replace its changes storage.
        return (lambda: storage.changes) if _tid_holder(_innermost(storage.changes)) else None
    return (lambda: storage) if isinstance(storage, BaseStorage | MappingStorage) else None
