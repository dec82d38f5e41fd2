"""`S3BlobStorage`: the ZODB contract of a storage whose blobs are in a bucket.

It says *when*; the parts it is made of say *how*. Object records are the base storage's business: every attribute
that is not defined here is the base's. The contracts are those of ZODB.interfaces: IBlobStorage,
IBlobStorageRestoreable, IStorage and IMVCCStorage.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import ZODB.blob
import zope.interface
from ZODB.interfaces import IBlobStorage, IBlobStorageRestoreable, IStorageRestoreable
from ZODB.POSException import POSKeyError, ReadOnlyError, StorageError, StorageTransactionError

from .bases import adapter_for
from .bases.adapter import is_live, repeated
from .cache.directory import CacheError
from .cache.files import Cache
from .cache.store import Pin
from .commit.pending import Pending
from .commit.services import CommitServices
from .commit.tids import Tids
from .fetch import Fetcher
from .garbage.apart import Apart
from .garbage.collector import Collector
from .lease import Lease
from .linker import Linker
from .metrics import Metrics
from .monitoring.exporter import Exported
from .s3.bucket import Bucket
from .s3.errors import BlobNotFound
from .vote import Vote, as_storage_error

logger = logging.getLogger(__name__)


@dataclass
class Components:
    """The parts that a storage and all its MVCC instances share."""

    bucket: Bucket
    cache: Cache
    fetcher: Fetcher
    linker: Linker
    commits: CommitServices
    lease: Lease
    collector: Collector
    exported: Exported
    #: Ends what watches them.
    close_watch: Callable[[], None]
    #: Where garbage is collected, so that a stop does not wait for S3.
    collections: Apart = field(default_factory=lambda: Apart("s3blobs pack"))

    def close(self) -> None:
        """Give up threads, connections and the cache directory."""
        self.collections.close()
        self.close_watch()
        self.fetcher.close()
        self.linker.close()
        self.commits.close()
        self.bucket.close()
        self.cache.close()


class S3BlobStorage:
    """A storage around ``base`` that keeps blobs in S3.

    ``components``: made by config.py; the storage closes them with itself. Raises `bases.UnsuitableBase`.

    Locking and threads are the base's: what ZODB may call from any thread may be called from any thread. Methods
    that say "waits for S3" belong on a worker thread where other clients must not wait.
    """

    def __init__(self, base: Any, components: Components) -> None:
        self.base = base
        self.fshelper = CacheFiles(components.cache)
        self._base_adapter = adapter_for(base)
        self._components = components
        self._owns_components = True
        self._pending: Pending | None = None  # the blobs of the transaction that the base is committing
        self._vote: Vote | None = None  # the one that is being made, and does not wait for the uploads
        self._untransform: Callable[[bytes], bytes] = lambda data: data
        self._has_read_repeated = False
        blobs = IBlobStorageRestoreable if IStorageRestoreable.providedBy(base) else IBlobStorage
        zope.interface.directlyProvides(self, blobs, zope.interface.providedBy(base))
        if hasattr(base, "undo"):  # RelStorage without history has none, and its callers look for that
            self.undo = self._undo

    def __getattr__(self, name: str) -> Any:
        if name == "before_instance":
            # RelStorage's would pass by its wrappers such as zlibstorage. Without it ZODB reads with `loadBefore`.
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"<S3BlobStorage {self._components.bucket.name!r} around {self.base!r}>"

    def close(self) -> None:
        """Close the base, and the parts unless they are another instance's. Waits at most seconds for S3."""
        with ExitStack() as last_to_first:
            if self._owns_components:
                last_to_first.callback(self._components.close)
            last_to_first.callback(self.base.close)
            if self._owns_components:
                last_to_first.callback(self._components.lease.close)  # it asks the base for its last transaction

    # Set up

    def registerDB(self, db: Any) -> None:
        """Remember how ``db`` decodes records (zlibstorage, encrypted ones), and tell the base of it."""
        self._untransform = db.untransform_record_data
        self.base.registerDB(db)
        if "copyTransactionsFrom" in vars(db):
            # RelStorage has put its own there, which passes by this storage and so by the blobs.
            db.copyTransactionsFrom = self.copyTransactionsFrom

    @property
    def not_for_zeo(self) -> str | None:
        """The reason why a ZEO server cannot serve the base; None if it can."""
        return self._base_adapter.not_for_zeo

    def new_instance(self) -> "S3BlobStorage":
        """IMVCCStorage: a storage around a new instance of the base, with the same parts."""
        return self._wrap(self.base.new_instance())

    def _wrap(self, base: Any) -> "S3BlobStorage":
        instance = type(self)(base, self._components)
        instance._owns_components = False
        instance._untransform = self._untransform
        return instance

    def release(self) -> None:
        """IMVCCStorage: this instance is no longer used; the base's turn."""
        self.base.release()

    # Two-phase commit

    def tpc_begin(self, transaction: Any, *args: Any, **kwargs: Any) -> None:
        """Begin a transaction; restore one if a tid is given, as in IStorageRestoreable. Raises StorageError."""
        arrived = self._vote.pending if self._vote is not None else None
        if arrived is not None and self.reserves_tids and not args and not kwargs:
            # Without a status: MappingStorage takes none.
            self.base.tpc_begin(transaction, self.tids.begin(arrived.reservation))
        else:
            self.base.tpc_begin(transaction, *args, **kwargs)
        if self._pending is not None:  # RelStorage gives a transaction up by itself when something fails
            self._end_aborted(self._pending)
        self._pending = arrived or Pending(self._components.commits, self._base_adapter.shared)
        self._pending.begin(transaction)
        restored = args[0] if args else kwargs.get("tid")
        if restored is not None:
            try:
                with as_storage_error():
                    self._pending.begin_restoring(restored, self._base_adapter.restoring())
            except BaseException:
                self.tpc_abort(transaction)
                raise

    def storeBlob(
        self, oid: bytes, oldserial: bytes, data: bytes, blobfilename: str, version: str, transaction: Any
    ) -> None:
        """Store the record in the base, and take the file over. The file is gone afterwards."""
        if version:
            raise ValueError("Versions are not supported")
        with self._consuming(blobfilename), as_storage_error():
            self.base.store(oid, oldserial, data, "", transaction)
            try:
                self._committing(transaction).store(oid, blobfilename)
            except CacheError as error:
                if self._vote is not None:  # ZEO stores the blobs that it has received when it votes
                    self._vote.fail(error)
                raise
            self._base_adapter.mark_has_blobs()

    def restoreBlob(
        self, oid: bytes, serial: bytes, data: bytes, blobfilename: str, prev_txn: bytes | None, transaction: Any
    ) -> None:
        """Store a blob that another database committed at ``serial``, with its record; see `storeBlob`."""
        with self._consuming(blobfilename), as_storage_error():
            self.base.restore(oid, serial, data, "", prev_txn, transaction)
            self._committing(transaction).restore(oid, serial, blobfilename)

    @contextmanager
    def _consuming(self, filename: str) -> Iterator[None]:
        """Delete the file if the body, which owns it, fails. A file that arrived before belongs to its `Pending`."""
        try:
            yield
        except BaseException:
            if self._pending is not None and self._pending.has(filename):
                raise
            try:
                ZODB.blob.remove_committed(filename)
            except OSError:
                pass  # it has been moved already
            raise

    def _undo(self, transaction_id: bytes, transaction: Any) -> Any:
        """Undo a transaction in the base; blobs go back together with their records."""
        if self._pending is not None and self._pending.restored is not None:  # what is at its tid would be written over
            raise StorageTransactionError("A transaction that is restored cannot undo another one")
        result, revisions = self._base_adapter.undo(transaction_id, transaction)
        for oid, tid, record in revisions:
            if self.is_blob_record(record):
                self._committing(transaction).undo(oid, tid, repeated(self.base, oid, tid))
        return result

    def tpc_vote(self, transaction: Any) -> Any:
        """Vote in the base and return its result when all blobs are in the bucket. Waits for S3.

        Raises StorageError if they are not: the transaction is then to be aborted, as after any failed vote.
        """
        vote = self._vote or Vote(self.metrics)
        pending = self._committing(transaction)
        staged = pending.staged() if self._vote is None else None
        if staged is not None:  # large blobs, so that the base locks its database for no more than a copy of them
            vote.wait(staged)
        result = self.base.tpc_vote(transaction)
        vote.uploads = pending.vote(self._base_adapter.committing_tid())
        if vote.uploads is not None:
            self.metrics.commit_lock_waits.labels(pending.waits_for()).inc()
            if self._vote is None:
                vote.wait(vote.uploads)
                vote.succeed()
        return result

    def new_pending(self) -> Pending:
        """Return what takes the blobs of a transaction before it begins in the base; `Pending.abort` must end it."""
        return Pending(self._components.commits, self._base_adapter.shared)

    @property
    def reserves_tids(self) -> bool:
        """True if the base takes the tid of a transaction, so that its blobs need not wait for the commit lock."""
        return self._base_adapter.takes_tid

    @property
    def tids(self) -> Tids:
        """The order of tids."""
        return self._components.commits.tids

    def vote_without_waiting(self, vote: Vote, call: Callable[[], Any]) -> Any:
        """Return what ``call`` returns: it begins and votes with the blobs of ``vote``, and does not wait for uploads.

        For the ZEO server, all of whose votes are on one thread. The caller waits for ``vote.uploads`` if there are
        any, and ends the vote and its blobs.
        """
        self._vote = vote
        try:
            return call()
        finally:
            self._vote = None

    def tpc_finish(self, transaction: Any, func: Callable[[bytes], Any] = lambda tid: None) -> Any:
        """Finish in the base and return its result. Sends no request and cannot fail because of blobs."""
        pending = self._detach(transaction)
        try:
            result = self.base.tpc_finish(transaction, func)
        except BaseException:
            if pending is not None:
                pending.abandon()
            raise
        if pending is not None:
            pending.finish()
        return result

    def tpc_abort(self, transaction: Any) -> None:
        """Abort in the base; delete what was uploaded in the background.

        ``transaction`` need not be the one that is being committed; then nothing happens.
        """
        pending = self._detach(transaction)
        try:
            self.base.tpc_abort(transaction)
        finally:
            if pending is not None:
                self._end_aborted(pending)

    def _end_aborted(self, pending: Pending) -> None:
        if self._vote is not None and pending is self._vote.pending:
            pending.roll_back()  # the caller ends it, or votes again
        else:
            pending.abort()

    def _committing(self, transaction: Any) -> Pending:
        if self._pending is None or self._pending.transaction is not transaction:
            raise StorageTransactionError("The storage is not committing this transaction")
        return self._pending

    def _detach(self, transaction: Any) -> Pending | None:
        # Before the base lets the next transaction begin, in whatever thread.
        pending = self._pending
        if pending is None or pending.transaction is not transaction:
            return None
        self._pending = None
        return pending

    def copyTransactionsFrom(self, other: Any) -> None:
        """Copy all transactions of the storage ``other``, with their blobs. Waits for S3."""
        try:
            self._base_adapter.copy(other, self)
        except BaseException:
            if self._pending is not None and self._pending.restored is not None:  # else another thread is committing
                self.tpc_abort(self._pending.transaction)
            raise

    # Reading

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        """Return the path of the blob's file, which stays for some seconds. Waits for S3 unless the blob is cached.

        Raises POSKeyError if there is no such blob, StorageError if S3 does not answer.
        """
        return self._fetch(oid, serial).release_later()

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> BinaryIO:
        """Return the blob's file, opened for reading, as a BlobFile of ``blob`` if that is given; see `loadBlob`."""
        with self._fetch(oid, serial) as path:
            return open(path, "rb") if blob is None else ZODB.blob.BlobFile(path, "r", blob)

    def cached_blob(self, oid: bytes, serial: bytes) -> Pin | None:
        """Return the blob's file, pinned, if it is in the cache; else None: the caller asks `request_blob`."""
        return self._components.fetcher.cached(oid, serial)

    def request_blob(self, oid: bytes, serial: bytes, owner: object = None) -> "Future[Pin]":
        """Ask for the blob's file without waiting; done at once if it is cached. `pinned` takes the answer.

        ``owner``: who asks; the downloads of several owners take turns.
        """
        return self._components.fetcher.request(oid, serial, owner=owner)

    def request_repeated(self, requested: "Future[Pin]", oid: bytes, serial: bytes) -> "Future[Pin] | None":
        """Ask again for the blob that `request_blob` has not found, if its revision repeats an earlier one.

        None if there is nothing to ask for. Waits until ``requested`` is done; `pinned` takes what is returned.
        """
        if requested.cancelled() or not isinstance(requested.exception(), BlobNotFound):
            return None
        source = repeated(self.base, oid, serial)
        if source is None:
            return None
        if not self._has_read_repeated:
            self._has_read_repeated = True
            logger.warning(
                "%s. It is read from the revision that it repeats: zodb-s3blobs 1.2.1 stored no object when a "
                "transaction was undone. Run `zodb-s3blobs verify --repair` before the next pack, after which nothing "
                "tells any more which revision that is",
                requested.exception(),
            )
        return self._components.fetcher.request(oid, serial, source)

    def pinned(self, requested: "Future[Pin]", oid: bytes, serial: bytes) -> Pin:
        """Return the file that `request_blob` asked for; the errors are those of `loadBlob`."""
        with as_storage_error():
            try:
                return requested.result()
            except BlobNotFound as error:
                # A client may have kept the record of a revision that has been packed away since.
                # So may a connection that is older than the pack have: what it sees is not what there is now.
                with self._base_adapter.revisions() as revisions:
                    lost = is_live(revisions, oid, serial)
                if lost:
                    self.metrics.missing_blobs.inc()
                    logger.error("A record names a blob that the bucket does not have. %s", error)
                raise POSKeyError(str(error), oid, serial) from None

    def uncache(self, oid: bytes, serial: bytes) -> None:
        """Delete the blob's file from the cache; the next request fetches the blob from the bucket."""
        self._components.cache.remove(oid, serial)

    def _fetch(self, oid: bytes, serial: bytes) -> Pin:
        requested = self.request_blob(oid, serial)
        return self.pinned(self.request_repeated(requested, oid, serial) or requested, oid, serial)

    def presigned_url(
        self,
        oid: bytes,
        serial: bytes,
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str | None = None,
        seconds: float | None = None,
    ) -> str | None:
        """Return a URL by which a browser can read the blob from S3 for ``seconds``, by default for presigned-urls.

        The answer of S3 has ``content_type``, and ``disposition`` ("inline" or "attachment") with ``filename``, in
        which unsafe characters are replaced. None: the database has no blob (oid, serial), the bucket may lack it, or
        the section gives no links. Waits for S3 if the section has a fallbackbucket, and else at most for new
        credentials. Any thread may call, except for an instance of `new_instance`. Raises StorageError for wrong
        arguments, and if there are no credentials.
        """
        wanted = oid, serial, content_type, filename, disposition, seconds
        with as_storage_error():
            return self._components.linker.url(self._has_blob, wanted)

    def request_presigned_url(self, owner: object, wanted: tuple) -> "Future[str | None]":
        """Ask for a link with the arguments ``wanted`` of `presigned_url`, without waiting; ``owner``: who asks.

        Raises the errors of `presigned_url` for wrong arguments. The future may fail with BucketError.
        """
        with as_storage_error():
            return self._components.linker.request(self._has_blob, wanted, owner)

    def _has_blob(self, oid: bytes, serial: bytes) -> bool:
        return self.is_blob_record(self._base_adapter.record(oid, serial, any_thread=self._owns_components))

    def is_blob_record(self, record: bytes | None) -> bool:
        """Return whether ``record``, as the base stores it, is that of a blob."""
        return bool(record) and ZODB.blob.is_blob_record(self._untransform(record or b""))

    @property
    def s3blobstorage(self) -> "S3BlobStorage":
        """This storage; how zeo.py finds it in wrappers that pass on attributes."""
        return self

    def temporaryDirectory(self) -> str:
        """Return the directory for blobs that are being written: on the cache's file system, so that none is copied."""
        return self.fshelper.temp_dir

    def new_temporary(self) -> tuple[int, str]:
        """Return an empty file in `temporaryDirectory`, and its open descriptor; see `write_temporary` for errors."""
        with as_storage_error():
            return self._components.cache.new_temporary()

    def write_temporary(self, fd: int, data: bytes) -> None:
        """Write all of ``data`` to a file of `temporaryDirectory`; on a full disk cached blobs make room for it.

        Raises StorageError when there is none.
        """
        with as_storage_error():
            self._components.cache.write(fd, data)

    @property
    def metrics(self) -> Metrics:
        """The instruments of this storage."""
        return self._components.exported.metrics

    @property
    def exported(self) -> Exported:
        """This storage, as scrapes and probes see it."""
        return self._components.exported

    # Pack

    def pack(self, pack_time: float, referencesf: Any, gc: bool | None = None, **options: Any) -> Any:
        """Pack the base, then delete the blobs it does not know any more. Waits for S3.

        ``options``: what else the pack of the base takes.

        Raises what the base's pack raises, and StorageError if the garbage collection fails; then the base is packed
        all the same, and the next pack collects what this one left. With a retention, it is not packed if the marks of
        dead blobs cannot be read.
        """
        if self.base.isReadOnly():
            raise ReadOnlyError()  # RelStorage would pack all the same
        if gc is not None:
            options["gc"] = gc
        with as_storage_error("The database was not packed. "):
            self._components.collections.call(self._before_pack)
        result = self.base.pack(pack_time, referencesf, **options)
        with as_storage_error("The database was packed, but not all dead blobs were deleted. "):
            self._components.collections.call(lambda: self.collect_garbage(gently=True))
        return result

    def _before_pack(self) -> None:
        with self._base_adapter.revisions() as revisions:
            self._components.collector.before_pack(revisions)

    def collect_garbage(self, gently: bool = False) -> int:
        """Delete the blobs that the base does not know any more; return their number. Waits for S3.

        ``gently``: leave the processor to clients. The errors are those of `garbage.Collector.collect`.
        """
        with self._base_adapter.revisions() as revisions:
            return self._components.collector.collect(revisions, gently)


class CacheFiles:
    """``fshelper``, as far as ZODB and ZEO use it of a storage that is not theirs."""

    def __init__(self, cache: Cache) -> None:
        self.base_dir = str(cache.directory)
        self.temp_dir = str(cache.temporary)
        #: (oid, tid) -> where the blob's file is while it is in the cache.
        self.getBlobFilename = cache.path

    def getPathForOID(self, oid: bytes, create: bool = False) -> str:
        """Raise StorageError: ZEO asks on behalf of clients that take the server's blob directory for their own."""
        raise StorageError(
            "A ZEO client with shared-blob-dir true cannot use blobs that are in S3: "
            "set shared-blob-dir false (and a blob-dir of its own) at the client"
        )
