"""The recorder of the cache: it writes to the journal what happens to the files, and reads the journal at the start."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator

from ..metrics import Metrics
from ..revision import Revision
from .index import FoundFiles, LruIndex, unpacked
from .journal import PAUSE, REMOVED, Journal, Record

logger = logging.getLogger(__name__)

#: So many notes are written at once. What a crash loses of them is fetched again.
_BATCH = 256

#: The most notes to which a use is added: what waits longer to be written is not worth the memory.
_MOST_NOTES = 10_000

#: The most records that are written, or whose numbers are noted under the lock, at once.
_STEP = 500

#: How many records more than twice the number of files the journal may have.
_SLACK = 1000

_GONE = b""  # the note of a removed file


class Recorder:
    """The writer of ``journal`` for the files of ``index``, whose ``lock`` it takes.

    ``put``, ``used`` and ``removed`` only take a note, and are called with the lock, as `hurry` is. Whatever else reads
    or writes the journal: `load` at the start, `write` when it `is_due`, `add`, and `close`, by one thread at a time.
    """

    def __init__(self, journal: Journal, index: LruIndex, lock: threading.RLock, metrics: Metrics) -> None:
        self._journal = journal
        self._index = index
        self._lock = lock
        self._metrics = metrics
        # What has happened since the last `write`, the last thing last: the SHA-256 of what was published, `_GONE`,
        # or None for a use.
        self._notes: dict[Revision, bytes | None] = {}
        self.is_due = False
        self._has_failed = False
        self._least_compacted = 0  # records of the journal before which it is not compacted: it failed the last time
        self._is_finishing = False

    def put(self, name: Revision, digest: bytes) -> None:
        """Note that a file with the SHA-256 ``digest`` was published."""
        self._note(name, digest)

    def used(self, name: Revision) -> None:
        """Note that a file was used."""
        if len(self._notes) < _MOST_NOTES:
            self._note(name, self._notes.get(name))

    def removed(self, name: Revision) -> None:
        """Note that a file is gone."""
        self._note(name, _GONE)

    def _note(self, name: Revision, what: bytes | None) -> None:
        # A thread that wakes up for each file would cost as much as the file.
        self._notes.pop(name, None)
        self._notes[name] = what
        self.is_due = self.is_due or len(self._notes) >= _BATCH

    def hurry(self) -> None:
        """Let `write` be due if files have come or gone since it last was."""
        self.is_due = self.is_due or any(note is not None for note in self._notes.values())

    def add(self, name: Revision, size: int, used: int, digest: bytes) -> int:
        """Write down a file that was not there before; return the number of its record. Raises OSError.

        For the thread that calls `write`, with the lock.
        """
        self._notes.pop(name, None)
        return self._journal.append([Record(name.oid, name.tid, size, used, digest)])

    def digest(self, name: Revision, number: int) -> bytes | None:
        """Return the SHA-256 in the record with this number; None if the record cannot be read. Reads the disk."""
        record = self._journal.find(number)
        return record.digest if record is not None and record.name == name else None

    def load(self) -> FoundFiles:
        """Return the files of which the journal tells. Reads the disk."""
        found = FoundFiles(self._index.block, self._index.limit, len(self._journal))
        try:
            for summaries in self._journal.read():
                found.add(summaries)
        except OSError as error:
            self._metrics.cache_errors.labels("read").inc()
            logger.error("Cannot read the index of the cache: %s; what it does not tell of is fetched again", error)
        return found

    def write(self) -> None:
        """Write down what was noted. Never raises."""
        try:
            self._write_notes()
        except OSError as error:
            with self._lock:
                self._notes.clear()
                self.is_due = False
            if not self._has_failed:
                self._metrics.cache_errors.labels("write").inc()
                logger.warning("Cannot write the index of the cache: %s; the next start will miss some files", error)
            self._has_failed = True
            return
        self._has_failed = False
        least = max(2 * len(self._index) + _SLACK, self._least_compacted)
        if self._index.is_complete and len(self._journal) > least and not self._is_finishing:
            try:
                self._compact()
            except OSError as error:
                logger.info("Cannot compact the index of the cache: %s", error)
                self._least_compacted = 2 * len(self._journal)

    def finish(self) -> None:
        """Let the next `write` be the last one: it writes all that was noted, and takes no longer than that needs."""
        self._is_finishing = self.is_due = True

    def close(self) -> None:
        """Close the journal, without what was noted since the last `write`."""
        self._journal.close()

    def _write_notes(self, to_the_last: bool = False) -> None:
        """Write down what was noted, until not even a batch is left; when finishing, or ``to_the_last``, all."""
        while True:
            with self._lock:
                notes = {name: self._notes.pop(name) for name in list(itertools.islice(self._notes, _STEP))}
                self.is_due = len(self._notes) >= (1 if to_the_last or self._is_finishing else _BATCH)
                files = [(name, digest, self._index.get(name)) for name, digest in notes.items()]
            if not notes:
                return
            records, before = [], []
            for name, noted, entry in files:
                if noted == _GONE:
                    records.append(Record(name.oid, name.tid, REMOVED, 0, bytes(32)))
                    before.append(0)
                elif entry is not None:
                    digest = noted or self.digest(name, entry.record)
                    if digest is not None:
                        records.append(Record(name.oid, name.tid, entry.size, entry.used, digest))
                        before.append(entry.record)
            first = self._journal.append(records)
            with self._lock:
                for number, (record, earlier) in enumerate(zip(records, before, strict=True), first):
                    if record.size != REMOVED:
                        self._index.set_record(record.name, earlier, number)
                if not self.is_due:
                    return
            time.sleep(PAUSE)

    def _compact(self) -> None:
        """Write the journal anew, with one record for each file. It takes seconds for a million of them."""
        with self._lock:
            parts = self._index.parts()
            for name in self._index.pinned():
                self.used(name)
        try:
            for summaries in self._journal.replace(self._copies(parts)):
                with self._lock:
                    for number, both, _, _ in summaries:
                        name = Revision(both[:8], both[8:])
                        entry = self._index.get(name)
                        if entry is not None and entry.record:  # else it was published meanwhile
                            self._index.set_record(name, entry.record, number)
            # What was used or published meanwhile is noted: it may have escaped the copy, or have an older place there.
            self._write_notes(to_the_last=True)
        finally:
            self._journal.forget_former()

    def _copies(self, parts: list[dict[int, int]]) -> Iterator[list[Record]]:
        for part in parts:
            with self._lock:
                numbers = list(part)
            for start in range(0, len(numbers), _STEP):
                records = []
                if self._is_finishing:
                    raise OSError("the cache is being closed")
                for number in numbers[start : start + _STEP]:
                    state = part.get(number)
                    if state is None:
                        continue  # used or removed meanwhile
                    name, entry = unpacked(number, state)
                    record = self._journal.find(entry.record)
                    if record is not None and record.name == name:
                        records.append(record._replace(used=entry.used))
                yield records
