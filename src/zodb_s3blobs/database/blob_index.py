"""The blobs that a database names and those that a bucket has, joined in a temporary file: there may be millions."""

import itertools
import sqlite3
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..revision import Revision
from ..s3.listing import Listed

_BATCH = 10_000


class Named(NamedTuple):
    """A blob that the database names, with the properties of its object from a listing of the bucket.

    ``size``: in bytes, None if there is no object; ``archived``: whether the object must be restored before it can be
    read. ``candidates``: if there is no object, the tids of earlier objects of the blob that the database does not
    name.
    """

    oid: bytes
    tid: bytes
    size: int | None
    archived: bool
    candidates: tuple[bytes, ...] = ()


_NAMED = """
    SELECT oid, tid, size, archived, CASE WHEN size IS NULL THEN (
        SELECT group_concat(hex(earlier.tid)) FROM held AS earlier
        WHERE earlier.oid = named.oid AND earlier.tid < named.tid
        AND NOT EXISTS (SELECT 1 FROM named AS known WHERE known.oid = earlier.oid AND known.tid = earlier.tid)
    ) END
    FROM named LEFT JOIN held USING (oid, tid)
"""

_NEWEST = """
    SELECT oid, tid, size, archived FROM (SELECT oid, max(tid) AS tid FROM named GROUP BY oid)
    LEFT JOIN held USING (oid, tid) ORDER BY tid DESC, oid
"""


class Inventory:
    """The blobs of a database and of a bucket. Belongs to one thread, until `close`."""

    def __init__(self) -> None:
        # SQLite keeps such a database in memory while it is small, then in a file that no other process can open.
        self._tables = sqlite3.connect("")
        for table in "named (oid BLOB, tid BLOB", "held (oid BLOB, tid BLOB, size INTEGER, archived INTEGER":
            self._tables.execute(f"CREATE TABLE {table}, PRIMARY KEY (oid, tid)) WITHOUT ROWID")

    def close(self) -> None:
        """Delete the temporary file."""
        self._tables.close()

    def add_named(self, blobs: Iterable[Revision]) -> None:
        """Add blobs (oid, tid) that the database names; a blob added twice counts once."""
        self._add("INSERT OR IGNORE INTO named VALUES (?, ?)", blobs)

    def add_held(self, blobs: Iterable[Listed]) -> None:
        """Add blobs that the bucket has."""
        rows = ((blob.oid, blob.tid, blob.size, blob.archived) for blob in blobs)
        self._add("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?)", rows)

    def _add(self, statement: str, rows: Iterable[tuple]) -> None:
        iterator = iter(rows)
        while batch := list(itertools.islice(iterator, _BATCH)):
            with self._tables:
                self._tables.executemany(statement, batch)

    def __len__(self) -> int:
        """Return the number of blobs that the database names."""
        return self._tables.execute("SELECT count(*) FROM named").fetchone()[0]

    def named(self) -> Iterator[Named]:
        """Yield all blobs that the database names, in the order of oid and tid."""
        for oid, tid, size, archived, candidates in self._tables.execute(_NAMED):
            tids = map(bytes.fromhex, sorted(candidates.split(","))) if candidates else ()
            yield Named(oid, tid, size, bool(archived), tuple(tids))

    def newest(self) -> Iterator[Named]:
        """Yield the last blob that the database names of each object, the newest first."""
        for oid, tid, size, archived in self._tables.execute(_NEWEST):
            yield Named(oid, tid, size, bool(archived))

    def is_named(self, oid: bytes, tid: bytes) -> bool:
        """Return whether the database names blob (oid, tid)."""
        found = self._tables.execute("SELECT 1 FROM named WHERE oid = ? AND tid = ?", (oid, tid))
        return found.fetchone() is not None
