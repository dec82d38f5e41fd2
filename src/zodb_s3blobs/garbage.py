"""Which revisions are dead, and their safe deletion.

After the base has been packed, everything it cannot load any more is garbage. The order is what makes that safe:
first the last committed tid is read, then the bucket is listed, and only keys up to that tid are judged. A
transaction that is still committing has a later tid; one that restores an old one is in the register of blobs in
flight.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from ZODB.POSException import POSKeyError

from .bucket import Bucket
from .cache import Cache
from .inflight import InFlight

logger = logging.getLogger(__name__)

#: After how many loads from the base to pause, and for how many seconds: other threads want it too.
_PAUSE_EVERY = 100
_PAUSE = 0.005

_DELETE_BATCH = 1000


def collect(base: Any, bucket: Bucket, cache: Cache, in_flight: InFlight) -> int:
    """Delete the blobs of ``bucket`` that ``base`` cannot load any more; return how many.

    ``base`` is the base storage, just packed. Takes as long as listing the bucket takes: to be called on a thread of
    its own, one at a time. Raises BucketError when S3 fails, and whatever the base raises besides POSKeyError; all
    that was deleted until then was dead.
    """
    last = base.lastTransaction()
    dead: list[tuple[bytes, bytes]] = []
    deleted = 0
    started = time.monotonic()

    def delete() -> int:
        with in_flight.deleting(dead) as free:
            # Judged again now that nobody can begin to restore them: one may have been restored since.
            names = [name for name in free if not _is_live(base.loadSerial, *name)]
            bucket.delete(names)
            for name in names:
                cache.remove(*name)
        dead.clear()
        return len(names)

    for number, found in enumerate(bucket.list_blobs(), 1):
        if number % _PAUSE_EVERY == 0:
            time.sleep(_PAUSE)
        if found.tid <= last and not _is_live(base.loadSerial, found.oid, found.tid):
            dead.append((found.oid, found.tid))
            if len(dead) == _DELETE_BATCH:
                deleted += delete()
    deleted += delete()
    logger.info("Deleted %d dead blobs of bucket %s in %.1f s", deleted, bucket.name, time.monotonic() - started)
    return deleted


def _is_live(load_serial: Callable[[bytes, bytes], bytes], oid: bytes, tid: bytes) -> bool:
    try:
        load_serial(oid, tid)
    except POSKeyError:
        return False
    return True
