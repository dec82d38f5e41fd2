"""The scan of a bucket for dead blobs.

A scan judges each blob by the revisions that the database can load. It asks for all revisions of an object at once.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

from ZODB.blob import is_blob_record
from ZODB.POSException import POSKeyError

from ..bases.adapter import DatabaseView, revisions_of
from ..cache.files import Cache
from ..inflight import InFlight
from ..metrics import GC_STATES, Metrics
from ..revision import Revision
from ..s3.bucket import Bucket
from ..s3.listing import Listed
from . import marks
from .pace import Pace, throttled

T = TypeVar("T")

#: The most blobs of one object that are judged at once, and in memory.
_GROUP = 10_000

#: The number of blobs of lost objects that may always be deleted, whatever their share of the prefix.
_ALWAYS_DELETED = 100

#: The first byte of a pickle in a record: its protocol, or in old ones a tuple or a class.
_PICKLE_STARTS = (b"\x80", b"(", b"c")


@dataclass
class Tally:
    """The number and the total size of some objects."""

    objects: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more object, of ``size`` bytes."""
        self.objects += 1
        self.bytes += size


@dataclass
class Scan:
    """One reading of the bucket; it sorts blobs by state, one of `metrics.GC_STATES`.

    Dead blobs may be deleted now, retained ones later. ``retention``: in seconds; ``now``: seconds since 1970;
    ``pace``: by default, the scan does not pause.
    """

    base: DatabaseView
    bucket: Bucket
    in_flight: InFlight
    retention: float = 0
    marks: dict[bytes, int] = field(default_factory=dict)
    now: int = field(default_factory=lambda: int(time.time()))
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.found = {state: Tally() for state in GC_STATES}
        #: Dead blobs of objects that the database does not have either.
        self.orphans = Tally()
        #: Number of newer blobs that no transaction of this process explains.
        self.unexplained = 0
        #: Blobs that the database cannot load, counted as live because they may be the only copy.
        self.only_copies = Tally()
        #: Whether some live or newer blobs have marks.
        self.has_wrong_marks = False
        self._last = self.base.lastTransaction()

    def run(self) -> Iterator[tuple[Listed, str, int]]:
        """Yield each blob below the prefix, its state, and the time of its death. Waits for S3; BucketError.

        Revisions of an object that the bucket lists one after the other are judged together.
        """
        listed = throttled(self.bucket.list_blobs(self.found["unknown"].add), self.pace)
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
        """True if the bucket has blobs that the database can load; valid after the scan."""
        return self.found["live"].objects > self.only_copies.objects

    def refusal(self, max_delete_percent: int, recognised: bool = False) -> str | None:
        """Return the reason why the dead blobs must not be deleted, or None; valid after the scan.

        ``recognised``: whether the database could load blobs of the bucket right before it was packed.
        """
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
        if not self.has_live and not recognised:
            return (
                f"{dead.objects} of {ours} blobs in bucket {name} are dead, {dead.bytes} bytes, and not one is live: "
                f"none was deleted. Is this the database that belongs to s3-prefix {prefix!r}: the right Data.fs, and "
                f"its disk mounted? If it is, and you want to delete all of these blobs, delete the objects below "
                f"{self.bucket.keys.blobs} at the service; `zodb-s3blobs gc --dry-run` lists them"
            )
        if orphans.objects <= _ALWAYS_DELETED or orphans.objects * 100 <= max_delete_percent * ours:
            return None
        return (
            f"{orphans.objects} of {ours} blobs in bucket {name} are of objects that the database does not have any "
            f"more, {orphans.bytes} bytes: more than gc-max-delete-percent ({max_delete_percent}) allows, so no dead "
            f"blob was deleted. Is this the database that belongs to s3-prefix {prefix!r}? If it is, set "
            f"gc-max-delete-percent 100, restart and pack again; `zodb-s3blobs gc --dry-run` lists the dead blobs"
        )

    def _judge(self, blobs: list[Listed]) -> Iterator[tuple[Listed, str, int]]:
        """Yield ``blobs``, all of one object, with state and time of death, like `run`."""
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
                self.only_copies.add(blob.size)
                yield blob, "live", 0
            else:
                # A mark in the future, made while the clock was ahead, would prolong the retention.
                since = min(self.marks.get(blob.oid + blob.tid, self.now), self.now)
                is_due = self.now - since >= self.retention
                if is_due and not has_object:
                    self.orphans.add(blob.size)
                yield blob, "dead" if is_due else "retained", since

    def _newest_without_object(self, oid: bytes, after: bytes, held: set[bytes]) -> bytes | None:
        """Return the newest live revision of a blob, later than ``after``, without an object in the bucket; or None.

        ``held``: revisions that have objects. The revision may repeat the bytes of any earlier one: once the database
        has been packed, its record does not name that one.
        """
        tids = {tid for tid in self.base.tids(oid, self.pace.pause) if after < tid <= self._last} - held
        if not tids or not self._may_be_blob(oid, max(tids)):
            return None  # a crash before the commit of the blob has given its oid to another object
        # The bucket may have more than ``held``: the listing of very many revisions is judged in parts.
        tids.difference_update(self.bucket.list_tids(oid))
        return max(tids, default=None)

    def _may_be_blob(self, oid: bytes, tid: bytes) -> bool:
        """Return False if the revision certainly is not a blob; a compressed or encrypted record proves nothing."""
        try:
            record = self.base.loadSerial(oid, tid)
        except POSKeyError:  # another process packs
            return True
        return is_blob_record(record) or record[:1] not in _PICKLE_STARTS

    def _is_being_committed(self, blob: Listed) -> bool:
        return self.in_flight.is_wanted(Revision(blob.oid, blob.tid)) or blob.tid <= self.base.lastTransaction()


def _groups(items: Iterable[T], oid_of: Callable[[T], bytes]) -> Iterator[list[T]]:
    """Yield the ``items`` in lists of one object each, with at most `_GROUP` items per list."""
    for _, same in itertools.groupby(items, oid_of):
        while group := list(itertools.islice(same, _GROUP)):
            yield group


def live_names(base: DatabaseView, names: Iterable[Revision], pause: Callable[[], None]) -> Iterator[Revision]:
    """Yield the ``names`` that ``base`` can load, in their order; the names of one object must be consecutive."""
    for group in _groups(names, itemgetter(0)):
        live = base.loadable(group[0][0], [tid for _, tid in group], pause)
        yield from (name for name in group if name[1] in live)


def scan_beside_a_server(base: Any, bucket: Bucket, retention: float) -> Scan:
    """Return a scan for a process that commits nothing and has no cache, with the marks of the last run.

    ``retention``: in seconds. Waits for S3; BucketError.
    """
    if not retention:
        return Scan(revisions_of(base), bucket, InFlight())
    with tempfile.TemporaryDirectory() as directory:
        cache = Cache(directory, 0, Metrics())
        try:
            return Scan(revisions_of(base), bucket, InFlight(), retention, marks.fetch(bucket, cache))
        finally:
            cache.close()
