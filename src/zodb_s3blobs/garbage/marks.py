"""The marks of dead blobs: the object that lets garbage collection wait for ``gc-retention``.

One line of JSON for each dead blob, in an object beside the blobs::

    {"oid": "1f", "tid": "40d30c28a82b566", "dead_since": "2026-11-22T16:00:00+00:00"}

Each garbage collection rewrites the object with the blobs that are dead now: a blob that is live again loses its mark.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import TextIO

from ZODB.utils import p64, u64

from ..cache.files import Cache
from ..s3.bucket import Bucket
from ..s3.errors import BucketError

#: More than the longest line, in characters: an object of other software may be one huge line.
_LONGEST_LINE = 1000


def lines(file: TextIO) -> Iterator[str]:
    """Return an iterator over the lines of ``file``, with lines that are too long for a mark cut into pieces."""
    return iter(lambda: file.readline(_LONGEST_LINE), "")


def read(lines: Iterable[str]) -> dict[bytes, int]:
    """Return oid + tid -> time when a collection first found the blob dead, in seconds since 1970.

    The result is compact, because there may be a million marks. Raises ValueError, which names the invalid line.
    """
    marks: dict[bytes, int] = {}
    times: dict[str, int] = {}  # most marks have equal times
    for number, line in enumerate(lines, 1):
        try:
            mark = json.loads(line)
            name = p64(int(mark["oid"], 16)) + p64(int(mark["tid"], 16))
            since = mark["dead_since"]
            if since not in times:
                times[since] = int(datetime.fromisoformat(since).timestamp())
        except Exception as error:
            raise ValueError(f"line {number}") from error
        marks[name] = times[since]
    return marks


def write(file: TextIO, oid: bytes, tid: bytes, since: int) -> None:
    """Append the mark of one blob."""
    moment = datetime.fromtimestamp(since, timezone.utc).isoformat()
    file.write(json.dumps({"oid": f"{u64(oid):x}", "tid": f"{u64(tid):x}", "dead_since": moment}) + "\n")


def fetch(bucket: Bucket, cache: Cache) -> dict[bytes, int]:
    """Return the marks of the last run, downloaded through a file of ``cache``. Waits for S3; BucketError."""
    file = cache.new_file()
    try:
        if not bucket.get_marks(file):
            return {}
        # Bytes outside ASCII are replaced, so that they raise the same ValueError as any other invalid line.
        with open(file.path, encoding="ascii", errors="replace") as opened:
            return read(lines(opened))
    except ValueError as error:
        raise BucketError(
            f"Could not read {bucket.keys.marks} of bucket {bucket.name}, the marks of dead blobs ({error}): restore "
            f"that object, or delete it, which lets gc-retention begin anew for all dead blobs"
        ) from None
    finally:
        file.discard()
