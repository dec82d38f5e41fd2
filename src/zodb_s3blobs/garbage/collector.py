"""The safe deletion of dead blobs.

A blob is dead if the packed base cannot load its revision. Five safeguards protect live blobs:

- The order. The collection reads the last committed tid, then lists the bucket, and judges only keys up to that tid.
  A transaction that is still committing has a later tid; a blob that is being restored with an old tid is in the
  register of blobs in flight. Each blob is judged again at the moment of its deletion.
- The only copy. The earlier package of this name, 1.2.1, uploads nothing when a transaction is undone: the bytes of
  such a revision are at the key of an earlier one. Where a live revision has no object, all earlier ones are kept.
- The lease. Nothing is deleted while another server may hold the prefix.
- The retention. A dead blob is marked, and deleted when it has been dead for gc-retention; while the lease is on
  probation, dead blobs are only marked.
- The deletion limit. If no blob is live and none was before the pack, or many blobs are of objects that the database
  does not have, it is more likely that this is the wrong database.
"""

import itertools
import logging
import math
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO, TextIO

from ..bases.adapter import DatabaseView
from ..cache.files import Cache
from ..errors import S3BlobsError
from ..identity import Identity
from ..inflight import InFlight
from ..lease import Lease, NotOwner
from ..metrics import Metrics
from ..revision import Revision
from ..s3.bucket import Bucket
from ..s3.errors import BucketError, NotDeleted
from ..s3.listing import ListedUpload
from . import marks
from .leftovers import UPLOADS_STAY, abandoned_staged, abandoned_uploads
from .pace import Pace, low_interpreter_priority, throttled
from .scan import Scan, live_names

logger = logging.getLogger(__name__)

#: Seconds that a gentle collection rests for each second of processor time: on a quiet server, and on a busy one.
_RESTS = 3.0, 39.0

#: Objects between two lines of progress in the log.
_PROGRESS_EVERY = 100_000

_DELETE_BATCH = 1000

#: The number of blobs in the bucket of which a database must be able to load one before a pack. Not more than a page.
_WITNESSES = 200

#: A blob in the file of dead blobs: oid, tid and size.
_RECORD = struct.Struct(">8s8sQ")


class CollectionRefused(S3BlobsError):
    """A collection deleted nothing, to protect live blobs; the message says why, and what to do."""


class Collector:
    """The garbage collector of one prefix.

    ``retention``: in seconds; ``max_delete_percent``: the largest share of the prefix that may be dead blobs of objects
    which the database does not have, above which a run refuses to delete; 0: delete nothing; ``identity``: remembers
    that the marks are doubtful; ``is_staged`` tells whether this server still needs the staged object with a name;
    ``abandoned_after``: the age in seconds from which uploads of others are leftovers.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        in_flight: InFlight,
        is_staged: Callable[[str | None], bool],
        lease: Lease,
        metrics: Metrics,
        retention: float,
        max_delete_percent: int,
        identity: Identity,
        abandoned_after: float,
    ) -> None:
        self._bucket = bucket
        self._cache = cache
        self._in_flight = in_flight
        self._is_staged = is_staged
        self._abandoned_after = abandoned_after
        self._lease = lease
        self._metrics = metrics
        self._retention = retention
        self._max_delete_percent = max_delete_percent
        self._identity = identity
        self._running = threading.Lock()
        self._is_recognised = False  # whether the database could load a blob of the bucket right before its last pack
        #: The valid marks, while the bucket is too full to store them.
        self._unwritten: dict[bytes, int] | None = None

    def before_pack(self, base: DatabaseView) -> None:
        """Remove the marks of blobs that ``base`` can load. Call this before ``base`` is packed; waits for S3.

        After a restore of the database, dead blobs may be live again. If the pack kills them once more, their old marks
        would shorten their retention. If this method raises, ``base`` must not be packed. A failure of S3 raises
        BucketError if this server has never read owner.json, or if dead blobs are marked before they are deleted; in
        the latter case there may also be a cache.CacheError, and for a database of several processes lease.NotOwner.
        """
        marking = self._retention or self._lease.is_on_probation
        try:
            self._lease.renew_now()
            # The pack may remove the transaction that owner.json names; the database must still recognise its tid.
            self._identity.packed_away = self._lease.claimed
            self._is_recognised = self._recognises(base)
            marking = self._retention or self._lease.is_on_probation
            if marking:
                with low_interpreter_priority():
                    self._unmark_live(base)
                return
        except NotOwner:
            if base.shared and marking:
                raise  # there is no place for the doubt that all processes of the database can read
        except BucketError:
            if marking or not self._lease.claimed:
                raise
            self._identity.packed_away = self._lease.claimed
        # The marks are another database's, which may hold the prefix for some time only; or those of an earlier
        # gc-retention, which are deleted at the end of the collection if the collection gets there.
        self._doubt_marks()

    def _recognises(self, base: DatabaseView) -> bool:
        """Return whether ``base`` can load one of the first blobs in the bucket: then it is not a wrong database."""
        first = itertools.islice(self._bucket.list_blobs(), _WITNESSES)
        names = (Revision(blob.oid, blob.tid) for blob in first)
        try:
            return next(live_names(base, names, lambda: None), None) is not None
        except BucketError:
            return False

    def _unmark_live(self, base: DatabaseView) -> None:
        since, pace = self._marks(), Pace(*_RESTS)
        names = throttled((Revision(name[:8], name[8:]) for name in since), pace)
        live = list(live_names(base, names, pace.pause))
        if not live:
            return
        for oid, tid in live:
            del since[oid + tid]
        with self._new_marks() as file:
            for name in since:
                marks.write(file, name[:8], name[8:], since[name])
            if not self._put_marks(file, replacing=True):
                self._bucket.delete_marks()
                self._unwritten = since

    def _marks(self) -> dict[bytes, int]:
        """Return the valid marks. Waits for S3; BucketError."""
        if self._unwritten is not None:
            return self._unwritten
        return {} if self._identity.marks_are_doubtful else marks.fetch(self._bucket, self._cache)

    def _doubt_marks(self) -> None:
        if not self._identity.marks_are_doubtful:
            self._identity.marks_are_doubtful = True

    def _trust_marks(self) -> None:
        """Record that the marks in the bucket are valid."""
        self._unwritten = None
        if self._identity.marks_are_doubtful:
            self._identity.marks_are_doubtful = False

    def collect(self, base: DatabaseView, gently: bool = False) -> int:
        """Delete the dead blobs of the packed ``base``; return their number.

        Takes at least as long as listing the bucket: call it in a thread of its own. ``gently``: leave most of the
        processor to the threads that serve clients. Raises CollectionRefused, lease.NotOwner, bases.DatabaseBusy,
        BucketError when S3 fails, and any error of the base except POSKeyError. After an error, only dead blobs have
        been deleted, and the next run continues.
        """
        if not self._running.acquire(blocking=False):
            raise CollectionRefused("another pack is still deleting dead blobs")
        try:
            with self._counting(), low_interpreter_priority() if gently else nullcontext():
                return self._collect(base, Pace(*_RESTS) if gently else Pace())
        finally:
            self._running.release()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self._metrics.gc_runs.inc()
        self._metrics.gc_running.set(1)
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self._metrics.gc_failures.inc()
            raise
        finally:
            self._metrics.gc_running.set(0)
        self._metrics.gc_last_duration.set(time.monotonic() - started)
        self._metrics.gc_last_success.set_to_current_time()

    def _collect(self, base: DatabaseView, pace: Pace) -> int:
        self._lease.renew_now()
        started = time.monotonic()
        on_probation = self._lease.is_on_probation
        recognised, self._is_recognised = self._is_recognised, False
        retention = math.inf if on_probation else self._retention
        # Doubtful marks are not read, but the bucket has them.
        replacing = self._identity.marks_are_doubtful
        scan = Scan(base, self._bucket, self._in_flight, retention, self._marks() if retention else {}, pace=pace)
        # In a file: there may be a million dead blobs.
        with (
            self._cache.writing(),
            tempfile.TemporaryFile(dir=self._cache.temporary) as dead,
            self._new_marks() as new_marks,
        ):
            self._scan(scan, dead, new_marks)
            replacing = replacing or bool(scan.marks)
            written = not retention or self._put_marks(new_marks, replacing)
            refusal = scan.refusal(self._max_delete_percent, recognised)
            if on_probation or not self._max_delete_percent:
                self._log_nothing_deleted(scan, on_probation)
                return 0
            if refusal is not None and not scan.has_live and not recognised:
                # No error: perhaps the last blob of the database was removed on purpose, and the base has been packed.
                logger.warning("%s", refusal)
                return 0
            if refusal is not None:
                raise CollectionRefused(refusal)
            dead.seek(0)
            deleted = self._delete(base, dead, pace)
            if not written and not self._put_marks(new_marks, replacing) and scan.has_wrong_marks:
                logger.warning(
                    "The marks in bucket %s could not be updated and are deleted: gc-retention begins anew for all "
                    "dead blobs",
                    self._bucket.name,
                )
                self._bucket.delete_marks()
                self._trust_marks()
        self._delete_leftovers()
        logger.info(
            "Deleted %d dead blobs of bucket %s in %.1f s; kept %d live and %d retained dead blobs",
            deleted,
            self._bucket.name,
            time.monotonic() - started,
            scan.found["live"].objects,
            scan.found["retained"].objects,
        )
        return deleted

    def _log_nothing_deleted(self, scan: Scan, on_probation: bool) -> None:
        logger.info(
            "Bucket %s has %d live and %d dead blobs. Nothing was deleted: %s",
            self._bucket.name,
            scan.found["live"].objects,
            scan.found["dead"].objects + scan.found["retained"].objects,
            "until a week after this database took the s3-prefix over from another one, dead blobs are only marked"
            if on_probation
            else "gc-max-delete-percent is 0",
        )

    def _scan(self, scan: Scan, dead: BinaryIO, new_marks: TextIO) -> None:
        for number, (blob, state, since) in enumerate(scan.run(), 1):
            self._metrics.gc_scanned.inc()
            if number % _PROGRESS_EVERY == 0:
                logger.info("Garbage collection in bucket %s: %d objects so far", self._bucket.name, number)
            if state == "dead":
                dead.write(_RECORD.pack(blob.oid, blob.tid, blob.size))
            if state in ("dead", "retained"):
                # Blobs deleted now are marked too: if their deletion fails, they need not wait again.
                marks.write(new_marks, blob.oid, blob.tid, since)
        if scan.unexplained:
            logger.warning(
                "Bucket %s has %d blobs that are newer than the last transaction of the database. Either the "
                "database was restored from a backup, or another database uses the same s3-prefix%s. They are "
                "kept until the database has a later transaction than theirs; after that, a pack treats them as "
                "dead. If another database uses the prefix, give it another s3-prefix before that",
                self._bucket.name,
                scan.unexplained,
                ", or another process was about to commit them" if scan.base.shared else "",
            )
        if scan.only_copies.objects:
            logger.warning(
                "Bucket %s keeps %d blobs that the database does not have any more: a later revision of each has no "
                "object, as after an undo with zodb-s3blobs 1.2.1, so they may be the only copy of its bytes. "
                "`zodb-s3blobs verify` lists such revisions, and `zodb-s3blobs verify --repair` gives them objects",
                self._bucket.name,
                scan.only_copies.objects,
            )
        for state, found in scan.found.items():
            self._metrics.gc_objects.labels(state).set(found.objects)
            self._metrics.gc_bytes.labels(state).set(found.bytes)

    @contextmanager
    def _new_marks(self) -> Iterator[TextIO]:
        """Open a temporary file for the new marks; delete it at the end of the body."""
        new = self._cache.new_file()
        try:
            with open(new.path, "w", encoding="ascii") as file:
                yield file
        finally:
            new.discard()

    def _put_marks(self, file: TextIO, replacing: bool) -> bool:
        """Upload the marks in ``file``; return False if the bucket is too full for them.

        ``replacing``: whether the bucket has older marks, which even an empty ``file`` must replace. Raises NotOwner
        and BucketError.
        """
        file.flush()
        self._lease.require()
        if replacing or os.path.getsize(file.name):
            try:
                self._bucket.put_marks(file.name)
            except BucketError as error:
                if error.reason != "quota":
                    raise
                # Unmarked blobs are kept, and blobs with older marks can still be deleted, which makes room.
                logger.warning("The marks of dead blobs could not be written. %s", error)
                return False
        self._trust_marks()
        return True

    def _delete(self, base: DatabaseView, dead: BinaryIO, pace: Pace) -> int:
        deleted = 0
        # No pauses while other processes may be waiting to restore transactions.
        pause = (lambda: None) if base.shared else pace.pause
        while records := dead.read(_RECORD.size * _DELETE_BATCH):
            sizes = {Revision(oid, tid): size for oid, tid, size in _RECORD.iter_unpack(records)}
            with base.no_restores(), self._in_flight.deleting(sizes) as free:
                # Judged again now that no transaction can restore them: one may have been restored since the scan.
                live = set(live_names(base, free, pause))
                self._lease.verify()
                deleted += self._delete_batch([name for name in free if name not in live], sizes)
            pace.pause()
        return deleted

    def _delete_batch(self, names: list[Revision], sizes: dict[Revision, int]) -> int:
        failure: NotDeleted | None = None
        gone = names
        try:
            self._bucket.delete(names)
        except NotDeleted as error:
            failure = error
            gone = [name for name in names if self._bucket.keys.key(*name) not in error.keys]
        for name in gone:
            self._cache.remove(*name)
        self._metrics.gc_deleted.inc(len(gone))
        self._metrics.gc_deleted_bytes.inc(sum(sizes[name] for name in gone))
        if failure is not None:
            self._metrics.gc_delete_failures.inc(len(failure.keys))
            raise failure
        return len(gone)

    def _delete_leftovers(self) -> None:
        self._lease.verify()
        if not self._retention:
            self._bucket.delete_marks()  # left by an earlier gc-retention, and not kept up to date any more
            self._trust_marks()
        found = abandoned_staged(self._bucket, self._abandoned_after)
        staged = [left.name for left in found if not self._is_staged(left.name)]
        self._bucket.delete_staged(staged)
        aborted = 0
        for upload in abandoned_uploads(self._bucket, self._abandoned_after):
            if self._is_under_way(upload):
                continue
            self._lease.require()
            try:
                self._bucket.abort_upload(upload)
            except BucketError as error:
                logger.warning(UPLOADS_STAY, error)
                break
            aborted += 1
        if staged or aborted:
            logger.info("Deleted %d staged and %d unfinished uploads of crashed servers", len(staged), aborted)

    def _is_under_way(self, upload: ListedUpload) -> bool:
        # Uploads of this process are never aborted, even if they seem old: a clock may be wrong.
        name, staged = self._bucket.keys.parse(upload.key), self._bucket.keys.parse_staged(upload.key)
        return (name is not None and self._in_flight.is_wanted(name)) or self._is_staged(staged)
