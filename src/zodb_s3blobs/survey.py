"""One pass over all blobs that a database names, many at a time, and what came of it."""

import datetime
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from persistent.timestamp import TimeStamp
from ZODB.blob import is_blob_record
from ZODB.utils import oid_repr, tid_repr

from .bucket import Bucket, BucketError
from .garbage import is_live
from .inventory import Inventory, Named
from .progress import showing
from .workers import in_parallel
from .zeoconf import Served

#: After how many failures in a row to give up: what the bucket refuses that often, it will refuse again.
_GIVE_UP_AFTER = 20


@dataclass(frozen=True)
class Outcome:
    """What was found of blob (oid, tid): one of the command's words for it, its bytes, and the trouble if there is."""

    oid: bytes
    tid: bytes
    word: str
    size: int = 0
    trouble: str = ""


def _moment(tid: bytes) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(TimeStamp(tid).timeTime(), datetime.timezone.utc)
    except (ValueError, OverflowError):
        return ""
    return f" of {moment:%Y-%m-%d %H:%M:%S} UTC"


@dataclass
class Report:
    """How many blobs there were of each word, their bytes, and those with trouble."""

    objects: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    troubles: list[Outcome] = field(default_factory=list)
    #: Why the work ended before all blobs were looked at, if it did.
    early_end: str = ""

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.objects[outcome.word] += 1
        self.sizes[outcome.word] += outcome.size
        if outcome.trouble:
            self.troubles.append(outcome)

    def retract(self, outcomes: Collection[Outcome]) -> None:
        """Those are no trouble any more, and no blobs of the database either."""
        for outcome in outcomes:
            self.objects[outcome.word] -= 1
            self.sizes[outcome.word] -= outcome.size
        retracted = set(outcomes)
        self.troubles = [outcome for outcome in self.troubles if outcome not in retracted]

    def check_complete(self) -> None:
        """Raise BucketError if not all blobs were looked at."""
        if self.early_end:
            raise BucketError(self.early_end)

    def show(self, meanings: dict[str, str], as_json: bool, where: Mapping[bytes, str] | None = None) -> None:
        """Print it; ``meanings``: what to say of each word, in the order of the lines.

        ``where``: oid -> path in the database, as far as that is known.
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
        print(f"{'':<10} {'objects':>14} {'bytes':>20}")
        for word, meaning in meanings.items():
            print(f"{word:<10} {self.objects[word]:>14,} {self.sizes[word]:>20,}  {meaning}")


class Survey:
    """The blobs of the storage that ``served`` names, as they are now. A context manager; belongs to one thread.

    The database is read once, from one end to the other, beside a running server.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        with ExitStack() as undo:
            #: The storage, opened read-only.
            self.storage = served.open_read_only()
            undo.callback(self.storage.close)
            self.inventory = Inventory()
            undo.callback(self.inventory.close)
            with (
                showing("Reading the database", "transactions") as progress,
                closing(self.storage.iterator()) as transactions,
            ):
                self.inventory.add_named(
                    (record.oid, record.tid)
                    for transaction in progress.over(transactions)
                    for record in transaction
                    if record.data and is_blob_record(record.data)
                )
            self._undo = undo.pop_all()

    def __enter__(self) -> "Survey":
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def list_bucket(self, bucket: Bucket) -> None:
        """Note what the bucket holds. What the database named before is there by now, if ever."""
        with showing("Listing the bucket", "objects") as progress:
            blobs = progress.over(bucket.list_blobs(lambda size: None))
            self.inventory.add_held((blob.oid, blob.tid, blob.size) for blob in blobs)

    def run(
        self, what: str, work: Callable[[Named], Outcome], threads: int, wanted: Callable[[Named], bool] | None = None
    ) -> Report:
        """What ``work``, in ``threads`` threads, finds of each blob, or of those that are ``wanted``.

        It ends early when the bucket fails again and again.
        """
        report = Report()
        failures = 0
        blobs: Iterable[Named] = self.inventory.named()
        if wanted is not None:
            blobs = filter(wanted, blobs)
        with (
            showing(what, "blobs", len(self.inventory) if wanted is None else None) as progress,
            closing(in_parallel(work, blobs, threads)) as outcomes,
        ):
            for outcome in outcomes:
                report.add(outcome)
                progress.step(outcome.size)
                failures = failures + 1 if outcome.word == "failed" else 0
                if failures == _GIVE_UP_AFTER:
                    report.early_end = f"{failures} blobs in a row failed, so the rest was not tried. {outcome.trouble}"
                    break
        self._look_again(report)
        return report

    def _look_again(self, report: Report) -> None:
        """What has been packed away since is not missing."""
        missing = [outcome for outcome in report.troubles if outcome.word == "missing"]
        if not missing:
            return
        with closing(self._served.open_read_only()) as storage:
            report.retract([one for one in missing if not is_live(storage, one.oid, one.tid)])
