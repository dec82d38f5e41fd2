"""Since when dead blobs are dead: the object that lets garbage collection wait for ``gc-retention``.

One line of JSON for each dead blob, in an object beside the blobs::

    {"oid": "1f", "tid": "40d30c28a82b566", "dead_since": "2026-11-22T16:00:00+00:00"}

It is written anew by each garbage collection, with what is dead now: a blob that lives again loses its mark.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import TextIO

from ZODB.utils import p64, u64

from ..cache.files import Cache
from ..s3.bucket import Bucket
from ..s3.errors import BucketError

#: More than the longest line: somebody else's is not to be in memory as a whole.
_LONGEST_LINE = 1000


def lines(file: TextIO) -> Iterator[str]:
    """The lines of ``file``; of one that is too long to be a mark, pieces that are none."""
    return iter(lambda: file.readline(_LONGEST_LINE), "")


def read(lines: Iterable[str]) -> dict[bytes, int]:
    """oid + tid -> when it was first found dead, in seconds since 1970; ValueError names the line that makes no sense.

    Compact, because there may be a million.
    """
    marks: dict[bytes, int] = {}
    times: dict[str, int] = {}  # most are the same
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
    """Return the marks of the last run; the file they pass through is one of ``cache``. Waits for S3; BucketError."""
    file = cache.new_file()
    try:
        if not bucket.get_marks(file):
            return {}
        # What is not ASCII makes no sense, but must not end in another error than all else that makes none.
        with open(file.path, encoding="ascii", errors="replace") as opened:
            return read(lines(opened))
    except ValueError as error:
        raise BucketError(
            f"{bucket.keys.marks} of bucket {bucket.name}, which tells since when dead blobs are dead, cannot be read "
            f"({error}): restore it, or delete it and have gc-retention begin anew for all dead blobs"
        ) from None
    finally:
        file.discard()
