"""Which revisions are dead, and their safe deletion.

After the base has been packed, everything it cannot load any more is garbage. The order is what makes that safe:
first the last committed tid is read, then the bucket is listed, and only keys up to that tid are judged. A
transaction that is still committing has a later tid; one that restores an old one is in the register of blobs in
flight.
"""

import logging
import time
from typing import Any

from ZODB.POSException import POSKeyError

from .bucket import Bucket, Listed, NotDeleted
from .cache import Cache
from .inflight import InFlight, Name
from .metrics import GC_STATES, Metrics

logger = logging.getLogger(__name__)

#: After how many loads from the base to pause, and for how many seconds: other threads want it too.
_PAUSE_EVERY = 100
_PAUSE = 0.005

_DELETE_BATCH = 1000


def collect(base: Any, bucket: Bucket, cache: Cache, in_flight: InFlight, metrics: Metrics) -> int:
    """Delete the blobs of ``bucket`` that ``base`` cannot load any more; return how many.

    ``base`` is the base storage, just packed. Takes as long as listing the bucket takes: to be called on a thread of
    its own, one at a time. Raises BucketError when S3 fails, and whatever the base raises besides POSKeyError; all
    that was deleted until then was dead.
    """
    metrics.gc_runs.inc()
    metrics.gc_running.set(1)
    started = time.monotonic()
    try:
        deleted = _Collection(base, bucket, cache, in_flight, metrics).run()
    except BaseException:
        metrics.gc_failures.inc()
        raise
    finally:
        metrics.gc_running.set(0)
    seconds = time.monotonic() - started
    metrics.gc_last_duration.set(seconds)
    metrics.gc_last_success.set_to_current_time()
    logger.info("Deleted %d dead blobs of bucket %s in %.1f s", deleted, bucket.name, seconds)
    return deleted


class _Collection:
    """One run."""

    def __init__(self, base: Any, bucket: Bucket, cache: Cache, in_flight: InFlight, metrics: Metrics) -> None:
        self._base = base
        self._bucket = bucket
        self._cache = cache
        self._in_flight = in_flight
        self._metrics = metrics
        self._last = base.lastTransaction()
        self._found = {state: _Found() for state in GC_STATES}
        self._deleted = 0

    def run(self) -> int:
        """Do it; returns how many blobs were deleted."""
        dead: list[Listed] = []
        for number, blob in enumerate(self._bucket.list_blobs(self._found["unknown"].add), 1):
            if number % _PAUSE_EVERY == 0:
                time.sleep(_PAUSE)
            self._metrics.gc_scanned.inc()
            state = self._judge(blob)
            self._found[state].add(blob.size)
            if state == "dead":
                dead.append(blob)
                if len(dead) == _DELETE_BATCH:
                    self._delete(dead)
                    dead.clear()
        self._delete(dead)
        for state, found in self._found.items():
            self._metrics.gc_objects.labels(state).set(found.objects)
            self._metrics.gc_bytes.labels(state).set(found.bytes)
        return self._deleted

    def _judge(self, blob: Listed) -> str:
        """One of `metrics.GC_STATES`."""
        if blob.tid > self._last:
            return "newer"
        return "live" if is_live(self._base, blob.oid, blob.tid) else "dead"

    def _delete(self, dead: list[Listed]) -> None:
        sizes = {(blob.oid, blob.tid): blob.size for blob in dead}
        with self._in_flight.deleting(sizes) as free:
            # Judged again now that nobody can begin to restore them: one may have been restored since.
            names = [name for name in free if not is_live(self._base, *name)]
            try:
                self._bucket.delete(names)
            except NotDeleted as error:
                left = [name for name in names if self._bucket.keys.key(*name) in error.keys]
                self._metrics.gc_delete_failures.inc(len(left))
                self._count_deleted(names, left, sizes)
                raise
            self._count_deleted(names, [], sizes)
            for name in names:
                self._cache.remove(*name)

    def _count_deleted(self, names: list[Name], left: list[Name], sizes: dict[Name, int]) -> None:
        deleted = set(names).difference(left)
        self._deleted += len(deleted)
        self._metrics.gc_deleted.inc(len(deleted))
        self._metrics.gc_deleted_bytes.inc(sum(sizes[name] for name in deleted))


class _Found:
    """What was found in one state."""

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0

    def add(self, size: int) -> None:
        """One more object, of ``size`` bytes."""
        self.objects += 1
        self.bytes += size


def is_live(base: Any, oid: bytes, tid: bytes) -> bool:
    """Whether ``base`` can still load that revision."""
    try:
        base.loadSerial(oid, tid)
    except POSKeyError:
        return False
    return True
