"""Which revisions are dead, and their safe deletion.

After the base has been packed, everything it cannot load any more is garbage. What makes that safe:

- The order. First the last committed tid is read, then the bucket is listed, and only keys up to that tid are judged.
  A transaction that is still committing has a later tid; one that restores an old one is in the register of blobs in
  flight. Each blob is judged once more at the moment of its deletion.
- The only copy. The earlier package of this name, 1.2.1, uploaded nothing when a transaction was undone: the bytes of
  such a revision are at the key of an earlier one. Where a live revision has no object, all earlier ones are kept.
- The lease. Nothing is deleted while another server may hold the prefix.
- The retention. A dead blob is marked, and deleted when it has been dead for that long. While the lease is on
  probation, that is never.
- The valve. If not one blob is live, or many are of objects that the database does not have, the database is more
  likely to be the wrong one.
"""

import gc
import itertools
import logging
import math
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, BinaryIO, TextIO, TypeVar

from ZODB.blob import is_blob_record
from ZODB.POSException import POSKeyError

from ..bases.adapter import Revisions, revisions_of
from ..bases.adapter import is_live as is_live  # for storage.py and survey.py
from ..cache.files import Cache
from ..errors import S3BlobsError
from ..identity import Identity
from ..inflight import InFlight, Name
from ..lease import Lease, NotOwner
from ..metrics import GC_STATES, Metrics
from ..s3.bucket import Bucket
from ..s3.errors import BucketError, NotDeleted
from ..s3.listing import Listed, ListedUpload
from ..staging import Staging
from . import marks

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: After how many loads from the base to pause: others may want the interpreter.
_PAUSE_EVERY = 100

#: How many times as long as it uses the processor a gentle collection rests: on a quiet server, and on a busy one.
_RESTS = 3.0, 39.0

#: Up to how many seconds of processor other threads use between two pauses of a quiet server. A request takes more.
_QUIET = 0.0001

#: For how long, in seconds, a server counts as busy after a request: the next one of that client may come soon.
_BUSY_FOR = 0.25

#: For how long, in seconds, this thread may keep others waiting for the interpreter: several times for each request.
_SWITCH_INTERVAL = 0.00001

#: After how many objects to say in the log how far it is.
_PROGRESS_EVERY = 100_000

_DELETE_BATCH = 1000

#: How many blobs of one object are judged at once, and in memory.
_GROUP = 10_000

#: Up to how many blobs are deleted with their objects, whatever share of the prefix they are.
_ALWAYS_DELETED = 100

#: Up to how many blobs are deleted where not one is live. ZODB's own tests have no others, and so need more.
_DELETED_WITHOUT_A_LIVE_ONE = 0

#: How the pickle in a record begins, of whatever age: with its protocol, a tuple, or a class.
_PICKLE_STARTS = (b"\x80", b"(", b"c")

#: Not a reason to let a pack fail: some services cannot list or abort them, and each takes a permission of its own.
_UPLOADS_STAY = "Unfinished uploads of crashed servers stay behind. %s"

#: A dead blob in the file of those to be deleted: oid, tid and size.
_RECORD = struct.Struct(">8s8sQ")


class Refused(S3BlobsError):
    """Garbage was found and, for the blobs' sake, none of it deleted; the message says why and what to do."""


@dataclass
class Found:
    """What a scan found in one state: objects, and their bytes."""

    objects: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """One more object, of ``size`` bytes."""
        self.objects += 1
        self.bytes += size


class Pace:
    """The pace of a thread that computes much in a process whose other threads serve clients.

    The thread rests ``quiet`` times as long as it uses the processor; ``busy`` times while other threads use the
    processor, and for `_BUSY_FOR` seconds after.
    """

    def __init__(self, quiet: float = 0, busy: float = 0) -> None:
        self._quiet = quiet
        self._busy = busy
        self._busy_until = -math.inf
        self._others = self._used_by_others()
        self._begin()

    def _begin(self) -> None:
        self._used, self._began = time.thread_time(), time.monotonic()

    def _used_by_others(self) -> float:
        return time.process_time() - time.thread_time()

    def pause(self) -> None:
        """Sleep as long as is due: what the thread has waited for S3 counts. Call it often, in one thread only."""
        now, others = time.monotonic(), self._used_by_others()
        if others - self._others > _QUIET:  # since the last pause began: they mostly run while this thread sleeps
            self._busy_until = now + _BUSY_FOR
        self._others = others
        used = time.thread_time() - self._used
        waited = now - self._began - used
        rest = self._busy if now < self._busy_until else self._quiet
        time.sleep(max(0, used * rest - waited))
        self._begin()


@dataclass
class Scan:
    """What is in the bucket, by state; one of `metrics.GC_STATES`. The dead are to be deleted now, the retained later.

    ``retention``: in seconds; ``now``: since 1970; ``pace``: without one, it does not pause.
    """

    base: Revisions
    bucket: Bucket
    in_flight: InFlight
    retention: float = 0
    marks: dict[bytes, int] = field(default_factory=dict)
    now: int = field(default_factory=lambda: int(time.time()))
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.found = {state: Found() for state in GC_STATES}
        #: Those of the dead whose objects the database does not have either.
        self.orphans = Found()
        #: How many of the newer ones no transaction of this process explains.
        self.unexplained = 0
        #: How many blobs that the database does not have any more are taken for live, as perhaps the only copy.
        self.only_copies = 0
        #: Whether blobs have marks that are not dead.
        self.has_wrong_marks = False
        self._last = self.base.lastTransaction()

    def run(self) -> Iterator[tuple[Listed, str, int]]:
        """Yield each blob of ours, its state, and since when it is dead. Waits for S3; BucketError.

        The revisions of an object are judged together as far as the bucket lists them one after the other.
        """
        listed = _gently(self.bucket.list_blobs(self.found["unknown"].add), self.pace)
        for blobs in _groups(listed, attrgetter("oid")):
            for blob, state, since in self._judge(blobs):
                self.found[state].add(blob.size)
                if state == "newer" and not self._is_being_committed(blob):
                    self.unexplained += 1
                if state in ("live", "newer") and blob.oid + blob.tid in self.marks:
                    self.has_wrong_marks = True
                yield blob, state, since

    @property
    def has_live(self) -> bool:
        """Whether the bucket has blobs that the database can load; to be asked after the scan."""
        return self.found["live"].objects > self.only_copies

    def refusal(self, max_delete_percent: int) -> str | None:
        """After the scan: return why the dead blobs must not be deleted, None if they may."""
        dead, orphans = self.found["dead"], self.orphans
        ours = sum(found.objects for state, found in self.found.items() if state != "unknown")
        name, prefix = self.bucket.name, self.bucket.keys.prefix
        if not dead.objects:
            return None
        if not max_delete_percent:
            return (
                f"gc-max-delete-percent is 0, so none of the {dead.objects} dead blobs in bucket {name} is deleted, "
                f"{dead.bytes} bytes"
            )
        if not self.has_live and dead.objects > _DELETED_WITHOUT_A_LIVE_ONE:
            return (
                f"{dead.objects} of {ours} blobs in bucket {name} are dead, {dead.bytes} bytes, and not one is live: "
                f"none was deleted. Is this the database that belongs to s3-prefix {prefix!r}: the right Data.fs, and "
                f"its disk mounted? If it is, and is to have none of these blobs, delete the objects below "
                f"{self.bucket.keys.blobs} at the service; `zodb-s3blobs gc --dry-run` lists them"
            )
        if orphans.objects <= _ALWAYS_DELETED or orphans.objects * 100 <= max_delete_percent * ours:
            return None
        return (
            f"{orphans.objects} of {ours} blobs in bucket {name} are of objects that the database does not have any "
            f"more, {orphans.bytes} bytes: more than gc-max-delete-percent ({max_delete_percent}) allows, so no dead "
            f"blob was deleted. Is this the database that belongs to s3-prefix {prefix!r}? If it is, set "
            f"gc-max-delete-percent 100, restart and pack again; `zodb-s3blobs gc --dry-run` lists what would go"
        )

    def _judge(self, blobs: list[Listed]) -> Iterator[tuple[Listed, str, int]]:
        """Yield as `run`; all ``blobs`` are of one object."""
        oid = blobs[0].oid
        tids = [blob.tid for blob in blobs if blob.tid <= self._last]
        live = self.base.loadable(oid, tids, self.pace.pause) if tids else set()
        dead = set(tids) - live
        has_object = not dead or self.base.has_object(oid)
        lacking = self._newest_without_object(oid, min(dead), {blob.tid for blob in blobs}) if dead else None
        for blob in blobs:
            if blob.tid > self._last:
                yield blob, "newer", 0
            elif blob.tid in live:
                yield blob, "live", 0
            elif lacking is not None and blob.tid < lacking:
                self.only_copies += 1
                yield blob, "live", 0
            else:
                # A mark of the future, made while the clock was ahead, would keep it for as long as that.
                since = min(self.marks.get(blob.oid + blob.tid, self.now), self.now)
                is_due = self.now - since >= self.retention
                if is_due and not has_object:
                    self.orphans.add(blob.size)
                yield blob, "dead" if is_due else "retained", since

    def _newest_without_object(self, oid: bytes, after: bytes, held: set[bytes]) -> bytes | None:
        """Return the newest live revision of a blob that has no object in the bucket; None if there is none.

        ``after``: what is not newer does not count; ``held``: revisions that have objects. The revision may repeat any
        earlier one: its record does not tell which one once the database has been packed.
        """
        tids = {tid for tid in self.base.tids(oid, self.pace.pause) if after < tid <= self._last} - held
        if not tids or not self._may_be_blob(oid, max(tids)):
            return None  # a crash before the commit of the blob has given its oid to another object
        # The bucket may have more than ``held``: the listing of very many revisions is judged in parts.
        tids.difference_update(self.bucket.list_tids(oid))
        return max(tids, default=None)

    def _may_be_blob(self, oid: bytes, tid: bytes) -> bool:
        """Return False if that revision is no blob; a record that is compressed or encrypted does not tell."""
        try:
            record = self.base.loadSerial(oid, tid)
        except POSKeyError:  # another process packs
            return True
        return is_blob_record(record) or record[:1] not in _PICKLE_STARTS

    def _is_being_committed(self, blob: Listed) -> bool:
        return self.in_flight.is_wanted((blob.oid, blob.tid)) or blob.tid <= self.base.lastTransaction()


def _gently(items: Iterable[T], pace: Pace) -> Iterator[T]:
    """Yield ``items``, with pauses in between: each is to be asked of the base."""
    for number, item in enumerate(items, 1):
        if number % _PAUSE_EVERY == 0:
            pace.pause()
        yield item


def _groups(items: Iterable[T], oid_of: Callable[[T], bytes]) -> Iterator[list[T]]:
    """Yield the ``items`` in lists of one object each; what is too many for the memory, in several."""
    for _, same in itertools.groupby(items, oid_of):
        while group := list(itertools.islice(same, _GROUP)):
            yield group


def _live_names(base: Revisions, names: Iterable[Name], pause: Callable[[], None]) -> Iterator[Name]:
    """Yield those of ``names`` that ``base`` can load, in their order; those of an object are to be together."""
    for group in _groups(names, itemgetter(0)):
        live = base.loadable(group[0][0], [tid for _, tid in group], pause)
        yield from (name for name in group if name[1] in live)


_making_way_lock = threading.Lock()
_making_way_count = 0
_usual_switch_interval = 0.0


@contextmanager
def _making_way() -> Iterator[None]:
    """Let other threads, the event loop above all, have their turn soon while the body does much in Python.

    A thread that waits gets the interpreter after the switch interval, 5 ms if nothing else is said, and a request
    waits for it several times. Python's own garbage collector stops all threads while it looks at every object there
    is: those there are by now, it need not look at meanwhile.
    """
    global _making_way_count, _usual_switch_interval
    with _making_way_lock:  # several storages may collect at once
        if not _making_way_count:
            _usual_switch_interval = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual_switch_interval, _SWITCH_INTERVAL))
            gc.freeze()
        _making_way_count += 1
    try:
        yield
    finally:
        with _making_way_lock:
            _making_way_count -= 1
            if not _making_way_count:
                gc.unfreeze()
                sys.setswitchinterval(_usual_switch_interval)


class Collector:
    """Collects the garbage of one prefix.

    ``retention``: in seconds; ``max_delete_percent``: the largest share of the prefix that one run deletes together
    with their objects, 0 if it deletes nothing at all; ``identity``: where it is kept that the marks are doubtful.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache: Cache,
        in_flight: InFlight,
        staging: Staging,
        lease: Lease,
        metrics: Metrics,
        retention: float,
        max_delete_percent: int,
        identity: Identity,
    ) -> None:
        self._bucket = bucket
        self._cache = cache
        self._in_flight = in_flight
        self._staging = staging
        self._lease = lease
        self._metrics = metrics
        self._retention = retention
        self._max_delete_percent = max_delete_percent
        self._identity = identity
        self._running = threading.Lock()
        #: The marks that hold, while the bucket has none because it is too full for them.
        self._unwritten: dict[bytes, int] | None = None

    def before_pack(self, base: Revisions) -> None:
        """Take their marks from the blobs that ``base`` can load; to be called before ``base`` is packed.

        A restored database may have brought dead blobs back to life. They die again in the pack, and afterwards nobody
        can tell that they have lived meanwhile. Waits for S3. Then ``base`` must not be packed: BucketError if this
        server has not read owner.json yet, or if dead blobs are only marked at first. In the latter case also
        cache.CacheError, and for a database of several processes lease.NotOwner.
        """
        marking = self._retention or self._lease.is_on_probation
        try:
            self._lease.confirm()
            # The pack may take the transaction away that owner.json names; it is this database's all the same.
            self._identity.packed_away = self._lease.claimed
            marking = self._retention or self._lease.is_on_probation
            if marking:
                with _making_way():
                    self._unmark_live(base)
                return
        except NotOwner:
            if base.shared and marking:
                raise  # there is no place to keep the doubt that all its processes see
        except BucketError:
            if marking or not self._lease.claimed:
                raise
            self._identity.packed_away = self._lease.claimed
        # Marks are another's, who may not have them for ever; or those of an earlier setting, which go at the end of
        # the collection, if it comes to that.
        self._doubt_marks()

    def _unmark_live(self, base: Revisions) -> None:
        since, pace = self._marks(), Pace(*_RESTS)
        names = _gently(((name[:8], name[8:]) for name in since), pace)
        live = list(_live_names(base, names, pace.pause))
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
        """Return the marks that hold. Waits for S3; BucketError."""
        if self._unwritten is not None:
            return self._unwritten
        return {} if self._identity.marks_are_doubtful else read_marks(self._bucket, self._cache)

    def _doubt_marks(self) -> None:
        if not self._identity.marks_are_doubtful:
            self._identity.marks_are_doubtful = True

    def _trust_marks(self) -> None:
        """What is in the bucket is right."""
        self._unwritten = None
        if self._identity.marks_are_doubtful:
            self._identity.marks_are_doubtful = False

    def collect(self, base: Revisions, gently: bool = False) -> int:
        """Delete the blobs that ``base``, just packed, cannot load any more; return how many.

        Takes as long as listing the bucket takes: to be called on a thread of its own. ``gently``: leave most of the
        time to the other threads, which serve clients, and more of it while they do. Raises Refused, lease.NotOwner,
        bases.Busy, BucketError when S3 fails, and whatever the base raises besides POSKeyError; all that was deleted
        until then was dead, and the next run goes on.
        """
        if not self._running.acquire(blocking=False):
            raise Refused("another pack is still deleting dead blobs")
        try:
            with self._counting(), _making_way() if gently else nullcontext():
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

    def _collect(self, base: Revisions, pace: Pace) -> int:
        self._lease.confirm()
        started = time.monotonic()
        on_probation = self._lease.is_on_probation
        retention = math.inf if on_probation else self._retention
        # None to be read may be in the bucket all the same.
        replacing = self._identity.marks_are_doubtful
        scan = Scan(base, self._bucket, self._in_flight, retention, self._marks() if retention else {}, pace=pace)
        # On the disk: there may be a million.
        with (
            self._cache.writing(),
            tempfile.TemporaryFile(dir=self._cache.temporary) as dead,
            self._new_marks() as new_marks,
        ):
            self._scan(scan, dead, new_marks)
            replacing = replacing or bool(scan.marks)
            written = not retention or self._put_marks(new_marks, replacing)
            refusal = scan.refusal(self._max_delete_percent)
            if on_probation or not self._max_delete_percent:
                self._log_nothing_deleted(scan, on_probation)
                return 0
            if refusal is not None and not scan.has_live:
                # No error: where the last blob has been removed it is right, and the pack of the base stands.
                logger.warning("%s", refusal)
                return 0
            if refusal is not None:
                raise Refused(refusal)
            dead.seek(0)
            deleted = self._delete(base, dead, pace)
            if not written and not self._put_marks(new_marks, replacing) and scan.has_wrong_marks:
                logger.warning("gc-retention begins anew for all dead blobs")
                self._bucket.delete_marks()
                self._trust_marks()
        self._delete_leftovers()
        logger.info(
            "Deleted %d dead blobs of bucket %s in %.1f s; %d live ones, %d dead ones that are retained",
            deleted,
            self._bucket.name,
            time.monotonic() - started,
            scan.found["live"].objects,
            scan.found["retained"].objects,
        )
        return deleted

    def _log_nothing_deleted(self, scan: Scan, on_probation: bool) -> None:
        logger.info(
            "Bucket %s has %d live blobs and %d dead ones. Nothing was deleted: %s",
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
                # Those that go now, too: if they cannot be deleted, they need not wait again.
                marks.write(new_marks, blob.oid, blob.tid, since)
        if scan.unexplained:
            logger.warning(
                "Bucket %s has %d blobs that are newer than the last transaction of the database. Either the "
                "database was restored from a backup, or another database uses the same s3-prefix%s. They are "
                "left alone until the database has a later transaction than theirs; then a pack takes them for "
                "dead",
                self._bucket.name,
                scan.unexplained,
                ", or another process was about to commit them" if scan.base.shared else "",
            )
        if scan.only_copies:
            logger.warning(
                "Bucket %s keeps %d blobs that the database does not have any more: a later revision of each has no "
                "object, as zodb-s3blobs 1.2.1 leaves it after an undo, so they may be the only copy of its bytes. "
                "`zodb-s3blobs verify` lists such revisions, and `zodb-s3blobs verify --repair` gives them objects",
                self._bucket.name,
                scan.only_copies,
            )
        for state, found in scan.found.items():
            self._metrics.gc_objects.labels(state).set(found.objects)
            self._metrics.gc_bytes.labels(state).set(found.bytes)

    @contextmanager
    def _new_marks(self) -> Iterator[TextIO]:
        """Make a file for the marks from now on, which goes when the body ends."""
        new = self._cache.new_file()
        try:
            with open(new.path, "w", encoding="ascii") as file:
                yield file
        finally:
            new.discard()

    def _put_marks(self, file: TextIO, replacing: bool) -> bool:
        """Store the marks in ``file``; return False if the bucket is too full for them.

        ``replacing``: whether there are others so far, which have to go even if there are no new ones. Raises NotOwner
        and BucketError.
        """
        file.flush()
        self._lease.check()
        if replacing or os.path.getsize(file.name):
            try:
                self._bucket.put_marks(file.name)
            except BucketError as error:
                if error.reason != "quota":
                    raise
                # What is not marked is kept, and what was due before goes, which makes room.
                logger.warning("The marks of dead blobs could not be written. %s", error)
                return False
        self._trust_marks()
        return True

    def _delete(self, base: Revisions, dead: BinaryIO, pace: Pace) -> int:
        deleted = 0
        # Other processes may be waiting to restore something.
        pause = (lambda: None) if base.shared else pace.pause
        while records := dead.read(_RECORD.size * _DELETE_BATCH):
            sizes = {(oid, tid): size for oid, tid, size in _RECORD.iter_unpack(records)}
            with base.no_restores(), self._in_flight.deleting(sizes) as free:
                # Judged again now that nobody can begin to restore them: one may have been restored since.
                live = set(_live_names(base, free, pause))
                self._lease.look()
                deleted += self._delete_batch([name for name in free if name not in live], sizes)
            pace.pause()
        return deleted

    def _delete_batch(self, names: list[Name], sizes: dict[Name, int]) -> int:
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
        self._lease.look()
        if not self._retention:
            self._bucket.delete_marks()  # of an earlier setting: one day they would be wrong
            self._trust_marks()
        staged = self._staging.sweep()
        aborted = 0
        for upload in abandoned_uploads(self._bucket, self._staging.abandoned_after):
            if self._is_under_way(upload):
                continue
            self._lease.check()
            try:
                self._bucket.abort_upload(upload)
            except BucketError as error:
                logger.warning(_UPLOADS_STAY, error)
                break
            aborted += 1
        if staged or aborted:
            logger.info("Deleted %d staged and %d unfinished uploads of crashed servers", staged, aborted)

    def _is_under_way(self, upload: ListedUpload) -> bool:
        # Of this process, however old it seems to be: a clock may be wrong.
        name, staged = self._bucket.keys.parse(upload.key), self._bucket.keys.parse_staged(upload.key)
        return (name is not None and self._in_flight.is_wanted(name)) or self._staging.is_live(staged)


def read_marks(bucket: Bucket, cache: Cache) -> dict[bytes, int]:
    """The marks of the last run; the files they pass through are those of ``cache``. Waits for S3; BucketError."""
    file = cache.new_file()
    try:
        if not bucket.get_marks(file):
            return {}
        # What is not ASCII makes no sense, but must not end in another error than all else that makes none.
        with open(file.path, encoding="ascii", errors="replace") as opened:
            return marks.read(marks.lines(opened))
    except ValueError as error:
        raise BucketError(
            f"{bucket.keys.marks} of bucket {bucket.name}, which tells since when dead blobs are dead, cannot be read "
            f"({error}): restore it, or delete it and have gc-retention begin anew for all dead blobs"
        ) from None
    finally:
        file.discard()


def scan_beside_a_server(base: Any, bucket: Bucket, retention: float) -> Scan:
    """A scan by a process that commits nothing and has no cache; ``retention``: in seconds. Waits for S3; BucketError.

    Its ``marks`` are those of the last run.
    """
    if not retention:
        return Scan(revisions_of(base), bucket, InFlight())
    with tempfile.TemporaryDirectory() as directory:
        cache = Cache(directory, 0, Metrics())
        try:
            return Scan(revisions_of(base), bucket, InFlight(), retention, read_marks(bucket, cache))
        finally:
            cache.close()


def abandoned_uploads(bucket: Bucket, age: float) -> Iterator[ListedUpload]:
    """The uploads in parts that were begun more than ``age`` seconds ago: whoever did it lives no more."""
    before = time.time() - age
    try:
        for upload in bucket.list_uploads():
            if upload.begun.timestamp() < before:
                yield upload
    except BucketError as error:
        logger.warning(_UPLOADS_STAY, error)
