"""The storages that `S3BlobStorage` can wrap: how one is opened, and the choice of its adapter.

The key of a blob ends with the tid of its transaction, and the blob must be in the bucket before the vote returns. So
the base must know the tid before it finishes the transaction.
"""

from collections.abc import Callable
from typing import Any

from ZODB.BaseStorage import BaseStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage

from .adapter import BaseAdapter, UnsuitableBase, innermost


def open_base(opening: Callable[[], Any]) -> Any:
    """Return the storage that ``opening`` opens.

    Raises `UnsuitableBase` if it cannot use its files, and LockError if another process has them open.
    """
    try:
        return opening()
    except FileStorageFormatError as error:
        raise UnsuitableBase(
            f"{error} is not the file of a filestorage: correct the path in its section, or restore the file"
        ) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise UnsuitableBase(
            f"{error.filename} cannot be opened: {error.strerror}; check the path in the section inside, and whether "
            f"this process's user may read and write there"
        ) from None


def adapter_for(base: Any) -> BaseAdapter:
    """Return the adapter for the storage ``base``.

    Raises `UnsuitableBase` if the base does not know the tid of a transaction in time, or stores blobs itself.
    """
    inside = innermost(base)
    relational = type(inside).__module__.startswith("relstorage.")
    # RelStorage's name contains the parameters of its connection to the database.
    name = type(base).__name__ if relational else f"{type(base).__name__} {base.getName()!r}"
    if _stores_blobs(base):
        raise UnsuitableBase(
            f"{name} stores blobs itself: remove blob-dir from its section, or the s3blobstorage around it"
        )
    if relational:
        from .relstorage import RelStorageAdapter  # it need not be installed

        return RelStorageAdapter(base, inside)
    holder = _tid_holder(inside)
    if holder is None:
        raise UnsuitableBase(
            f"{name} does not know the tid of a transaction before its end, but s3blobstorage needs the tid for the "
            f"keys of blobs: use a filestorage, mappingstorage, demostorage or relstorage, or a wrapper of one"
        )
    return BaseAdapter(base, holder)


def _stores_blobs(storage: Any) -> bool:
    if isinstance(storage, DemoStorage):
        # A demo storage without its own changes storage provides IBlobStorage, but stores no blob until the first one.
        temporary = isinstance(storage.changes, MappingStorage)
        return _stores_blobs(storage.base) or not (temporary or not _stores_blobs(storage.changes))
    return IBlobStorage.providedBy(storage)


def _tid_holder(storage: Any) -> Callable[[], Any] | None:
    if isinstance(storage, DemoStorage):
        # Looked up at each call: a demo storage may replace its changes storage.
        return (lambda: storage.changes) if _tid_holder(innermost(storage.changes)) else None
    return (lambda: storage) if isinstance(storage, BaseStorage | MappingStorage) else None
