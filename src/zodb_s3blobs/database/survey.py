"""A pass over all blobs that a database names, several at a time, and the report of its results."""

import datetime
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from persistent.timestamp import TimeStamp
from ZODB.blob import is_blob_record
from ZODB.FileStorage import FileStorage
from ZODB.utils import oid_repr, tid_repr, z64

from ..bases import adapter_for
from ..bases.adapter import RECOVER, DatabaseDamaged, is_live
from ..fallbacks import Fallbacks
from ..progress import showing
from ..revision import Revision
from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..workers import in_parallel
from .blob_index import Inventory, Named
from .zeoconf import Served

#: The number of failures in a row that ends the pass: the bucket would refuse the other blobs as well.
_GIVE_UP_AFTER = 20

#: The reasons of failures after which a probe of the bucket decides whether the pass goes on.
_OUTAGES = ("timeout", "connection", "foreign")

#: The columns of a terminal.
_WIDTH = 80


@dataclass(frozen=True)
class Outcome:
    """The result for blob (oid, tid): ``word``, one of the command's states; ``size`` in bytes; ``trouble`` or "".

    ``reason``: that of the BucketError of the blob, or "". ``copies``: the results for copies of the blob outside the
    bucket, with words of their own.
    """

    oid: bytes
    tid: bytes
    word: str
    size: int = 0
    trouble: str = ""
    reason: str = ""
    copies: tuple["Outcome", ...] = ()


def failure(oid: bytes, tid: bytes, size: int, error: BucketError, advice: str = "") -> Outcome:
    """Return the outcome of a blob of ``size`` bytes whose download or upload failed with ``error``.

    The word is "archived", with ``advice`` after the message of ``error``, or "failed".
    """
    if error.reason == "archived":
        return Outcome(oid, tid, "archived", size, f"{error}{advice}", error.reason)
    return Outcome(oid, tid, "failed", size, str(error), error.reason)


class _Warnings(logging.Filter):
    """A filter of FileStorage's warnings of damage that are caused by a transaction which a server is writing.

    ``storage`` gives the ends of the last whole transactions in its files at the time when it was opened.
    """

    def __init__(self, storage: Any) -> None:
        super().__init__()
        self._ends = dict(_ends(storage))
        #: The path of a file, and the position in it, from which on records of a transaction were left out.
        self.left_out: tuple[object, ...] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log ``record``."""
        if str(record.msg).startswith("%s data record exceeds") and isinstance(record.args, tuple):
            self.left_out = self.left_out or record.args  # the only sign of it
            return False
        if not str(record.msg).startswith("%s truncated") or not isinstance(record.args, tuple):
            return True
        path, position = record.args
        return not isinstance(position, int) or position < self._ends.get(str(path), position + 1)


def _ends(storage: Any) -> Iterator[tuple[str, int]]:
    """Yield the path and the size in bytes of each database file of ``storage``, inside its wrappers."""
    if isinstance(storage, FileStorage):
        yield os.path.abspath(storage.getName()), storage.getSize()
        return
    for name in "base", "changes":
        if (part := vars(storage).get(name)) is not None:
            yield from _ends(part)


@contextmanager
def _filtering(filter: _Warnings) -> Iterator[_Warnings]:
    log = logging.getLogger("ZODB.FileStorage")
    log.addFilter(filter)
    try:
        yield filter
    finally:
        log.removeFilter(filter)


def _moment(tid: bytes) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(TimeStamp(tid).timeTime(), datetime.timezone.utc)
    except (ValueError, OverflowError):
        return ""
    return f" of {moment:%Y-%m-%d %H:%M:%S} UTC"


@dataclass
class Report:
    """The number and bytes of the blobs by word, and the outcomes with trouble."""

    objects: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    troubles: list[Outcome] = field(default_factory=list)
    #: Reason why the work ended before all blobs were examined, or "".
    early_end: str = ""

    def add(self, outcome: Outcome) -> None:
        """Count ``outcome``."""
        self.objects[outcome.word] += 1
        self.sizes[outcome.word] += outcome.size
        if outcome.trouble:
            self.troubles.append(outcome)
        for copy in outcome.copies:
            self.add(copy)

    def retract(self, outcomes: Collection[Outcome]) -> None:
        """Remove ``outcomes`` of revisions that have been packed away since."""
        for outcome in outcomes:
            self.objects[outcome.word] -= 1
            self.sizes[outcome.word] -= outcome.size
        retracted = set(outcomes)
        self.troubles = [outcome for outcome in self.troubles if outcome not in retracted]

    def counts(self, words: Iterable[str], begin: str = "") -> str:
        """Return the numbers of blobs by word, such as "1 missing, 2 failed", after ``begin``; "" without blobs.

        Words without blobs are left out.
        """
        counts = ", ".join(f"{self.objects[word]:,} {word}" for word in words if self.objects[word])
        return counts and f"{begin}{counts}"

    def show(
        self, meanings: dict[str, str], verdict: str, as_json: bool, where: Mapping[bytes, str] | None = None
    ) -> None:
        """Print the report, with ``verdict`` as its last line.

        ``meanings``: word -> its explanation, in the order of the lines; ``where``: oid -> path in the database, if
        known.
        """
        where = where or {}
        if as_json:
            counts = {word: {"objects": self.objects[word], "bytes": self.sizes[word]} for word in meanings}
            problems = [
                {
                    "oid": oid_repr(one.oid),
                    "tid": tid_repr(one.tid),
                    "problem": one.word,
                    "reason": one.trouble,
                    "path": where.get(one.oid),
                }
                for one in self.troubles
            ]
            print(json.dumps({"found": counts, "problems": problems}, indent=1))
            return
        for one in self.troubles:
            place = f" at {where[one.oid]}" if one.oid in where else ""
            print(
                f"{one.word}: oid {oid_repr(one.oid)} tid {tid_repr(one.tid)}{_moment(one.tid)}{place}: {one.trouble}"
            )
        if self.troubles:
            print()
        for line in self._table(meanings):
            print(line)
        print(f"\n{verdict}")

    def _table(self, meanings: dict[str, str]) -> Iterator[str]:
        objects = {word: f"{self.objects[word]:,}" for word in meanings}
        sizes = {word: f"{self.sizes[word]:,}" for word in meanings}
        columns = [*meanings], ["objects", *objects.values()], ["bytes", *sizes.values()]
        first, second, third = (max(map(len, column)) for column in columns)
        yield f"{'':<{first}}  {'objects':>{second}}  {'bytes':>{third}}"
        for word, meaning in meanings.items():
            row = f"{word:<{first}}  {objects[word]:>{second}}  {sizes[word]:>{third}}  "
            yield from wrap(meaning, _WIDTH, initial_indent=row, subsequent_indent=" " * len(row))


class Survey:
    """The blobs that the storage ``served`` names now. A context manager; belongs to one thread.

    The database is read once, from one end to the other, beside a running server. Raises DatabaseDamaged.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        with ExitStack() as undo:
            #: The storage, opened read-only.
            self.storage = served.open_read_only()
            undo.callback(self.storage.close)
            warnings = undo.enter_context(_filtering(_Warnings(self.storage)))
            self.inventory = Inventory()
            undo.callback(self.inventory.close)
            with (
                showing("Reading the database", "transactions") as progress,
                closing(self.storage.iterator()) as transactions,
            ):
                self.inventory.add_named(
                    Revision(record.oid, record.tid)
                    for transaction in self._all(progress.over(transactions))
                    for record in transaction
                    if record.data and is_blob_record(record.data)
                )
            if warnings.left_out is not None:
                raise DatabaseDamaged(
                    "{} is damaged: records of a transaction, from position {} on, cannot be read. {}".format(
                        *warnings.left_out, RECOVER
                    )
                )
            self._undo = undo.pop_all()

    def _all(self, transactions: Iterable[Any]) -> Iterator[Any]:
        """Yield the ``transactions``; raise DatabaseDamaged if they end before the database does."""
        last = z64
        for transaction in transactions:
            last = transaction.tid
            yield transaction
        adapter_for(self.storage).require_whole(last)

    def __enter__(self) -> "Survey":
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def list_bucket(self, bucket: Bucket) -> None:
        """List the bucket into the inventory. Waits for S3; BucketError.

        The database was read before: a blob that it named must be in this listing.
        """
        with showing("Listing the bucket", "objects") as progress:
            self.inventory.add_held(progress.over(bucket.list_blobs()))

    def run(
        self,
        what: str,
        work: Callable[[Named], Outcome],
        places: Sequence[Bucket | Fallbacks],
        threads: int,
        blobs: Collection[Named] | None = None,
    ) -> Report:
        """Return the report of ``work`` on each blob, in ``threads`` threads; ``what``: its name for the progress bar.

        ``blobs``: which ones, by default all that the database names.

        The pass ends early when one of ``places`` does not answer, or after `_GIVE_UP_AFTER` failures in a row.
        """
        report = Report()
        failures = 0  # in a row
        with (
            showing(what, "blobs", len(self.inventory if blobs is None else blobs)) as progress,
            closing(in_parallel(work, self.inventory.named() if blobs is None else blobs, threads)) as outcomes,
        ):
            for outcome in outcomes:
                report.add(outcome)
                progress.step(outcome.size)
                # A damaged object says nothing about the others.
                failures = failures + 1 if outcome.word == "failed" and outcome.reason != "damaged" else 0
                if failures == _GIVE_UP_AFTER:
                    report.early_end = f"{failures} blobs in a row failed, so the rest was not tried. {outcome.trouble}"
                elif outcome.reason in _OUTAGES:
                    report.early_end = _outage(places)
                if report.early_end:
                    break
        self._look_again(report)
        return report

    def _look_again(self, report: Report) -> None:
        """Remove missing blobs from ``report`` that have been packed away since."""
        missing = [outcome for outcome in report.troubles if outcome.word == "missing"]
        if not missing:
            return
        with closing(self._served.open_read_only()) as storage:
            report.retract([one for one in missing if not is_live(storage, one.oid, one.tid)])


def _outage(places: Sequence[Bucket | Fallbacks]) -> str:
    """Return the reason to end the pass if one of ``places`` does not answer a probe, else ""."""
    for place in places:
        try:
            place.probe()
        except BucketError as error:
            if error.reason in _OUTAGES:
                return f"S3 does not answer, so the rest was not tried. {error}"
    return ""
