"""Which storages `S3BlobStorage` can wrap, and how each of them tells the tid of a committing transaction.

The key of a blob ends with the tid of its transaction, and the blob must be in the bucket before the vote returns.
So the base has to tell the tid between tpc_begin and tpc_vote, for which ZODB has no interface.
"""

from collections.abc import Callable
from typing import Any

from ZODB.BaseStorage import BaseStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage


class UnsuitableBase(ValueError):
    """The storage cannot be wrapped; the message says why and what to do."""


def committing_tid(base: Any) -> Callable[[], bytes]:
    """A function that tells the tid of the transaction which ``base`` is committing, between its begin and finish.

    Raises `UnsuitableBase` if ``base`` cannot tell it, stores blobs itself, or cannot be served.
    """
    name = f"{type(base).__name__} {base.getName()!r}"
    if type(base).__module__.startswith("relstorage."):
        raise UnsuitableBase(
            f"{name} cannot be wrapped by s3blobstorage: ZEO cannot serve RelStorage (it would miss commits and turn "
            f"conflicts into errors), and in-process use is not supported by this version"
        )
    if _stores_blobs(base):
        raise UnsuitableBase(
            f"{name} stores blobs itself already: remove blob-dir from its section, or the s3blobstorage around it"
        )
    holder = _tid_holder(base)
    if holder is None:
        raise UnsuitableBase(
            f"{name} cannot tell the tid of a transaction before it is finished, which s3blobstorage needs to name "
            f"the blobs in the bucket: use a filestorage, mappingstorage or demostorage, or a wrapper of one"
        )
    return lambda: holder()._tid


def _stores_blobs(storage: Any) -> bool:
    if isinstance(storage, DemoStorage):
        # Without a changes storage of its own it offers blobs, but keeps none before it is asked to.
        temporary = isinstance(storage.changes, MappingStorage)
        return _stores_blobs(storage.base) or not (temporary or not _stores_blobs(storage.changes))
    return IBlobStorage.providedBy(storage)


def _tid_holder(storage: Any) -> Callable[[], Any] | None:
    if isinstance(storage, DemoStorage):
        # Not now: a demo storage may replace its changes storage.
        return (lambda: storage.changes) if _tid_holder(storage.changes) else None
    if isinstance(storage, BaseStorage | MappingStorage):
        return lambda: storage
    # A wrapper such as zlibstorage: what it does not have it takes from its base.
    base = vars(storage).get("base")
    return _tid_holder(base) if base is not None else None
