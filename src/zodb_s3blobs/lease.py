"""The owner lease: which database the prefix belongs to, and which server may delete from it.

Two databases on one prefix, such as production and a copy of it that still has production's settings, must never delete
each other's blobs. So a server writes an object beside the blobs that says whose they are, renews it, and collects
garbage only while it holds it. Whoever finds the lease of another database serves all the same, and never deletes.

The object names the database by its identity, and by its last transaction. A database takes a prefix back at once, and
one that another database had only when that is stopped, or has not been heard of for a while, and when it has exactly
that last transaction itself: then it is its successor, and neither a stranger, nor empty, nor an older state. All else
takes an explicit command (`adopt`). After it has taken a prefix over, a database only marks dead blobs for a week.

Several servers on one database, as RelStorage has them, hold the lease together.

Every write is conditional where the service can do that, and is read back everywhere. Ages are those that the service
tells: its own clock at the last write and now. A server that stops leaves the object behind, marked as stopped.

A full bucket takes no writes, and deleting dead blobs is the way to make room. So while it is full, the object that a
read shows to be this server's own is as good as a renewed one: another server has to write as well to take it.
"""

import json
import logging
import platform
import struct
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Protocol

from ZODB.utils import p64, tid_repr, u64, z64

from .errors import S3BlobsError
from .metrics import Metrics
from .s3.bucket import Bucket
from .s3.control import ControlObject
from .s3.errors import BucketError

logger = logging.getLogger(__name__)

FORMAT = 2

#: In seconds: how often a lease is renewed, and how old one is that nobody keeps any more.
RENEW_EVERY, STALE_AFTER = 300.0, 900.0

#: For how long, in seconds, after the last renewal the owner deletes. Less than `STALE_AFTER` by more than any request
#: takes, so that no deletion is still under way when another server takes a stale lease.
_TRUSTED_FOR = 600.0

#: How often, in seconds, a server without the lease looks whether it can have it.
_LOOK_EVERY = 60.0

#: How long, in seconds, the end of the server waits for the lease to be marked as stopped.
_RELEASE_TIMEOUT = 2.0

#: For how long a database that has taken a prefix over from another one deletes nothing.
PROBATION = timedelta(days=7)

#: How much of what the lease of another says is shown, in characters.
_LONGEST_SHOWN = 100


class NotOwner(S3BlobsError):
    """Nothing may be deleted; the message says who holds the prefix, or why that is not known."""


class Database(Protocol):
    """What the lease has to know of the database. It may be asked in any thread."""

    #: Whether other processes commit to it, and hold the lease as well.
    shared: bool

    def identity(self) -> str:
        """Return what tells it from all others and from its copies, as of now. May wait for a database server."""

    def was(self, identity: str) -> bool:
        """Return whether it can have had that ``identity`` before its server, or the machine, was started anew."""

    def last_transaction(self) -> bytes:
        """Return the tid of its last transaction."""

    def has_transaction(self, tid: bytes) -> bool:
        """Return whether it has the transaction with exactly that tid."""


class Lease:
    """This server's claim to the prefix of ``bucket``, on behalf of ``database``; any thread may call.

    ``metrics``: those of the storage; ``name``: what owner.json calls the storage.
    """

    def __init__(self, bucket: Bucket, database: Database, metrics: Metrics, name: str) -> None:
        self._bucket = bucket
        self._database = database
        self._identity = ""  # as of the last time it was asked
        self._metrics = metrics
        self._name = name
        self._owner = uuid.uuid4().hex
        self._started = _now()
        self._lock = threading.Lock()  # one at a time asks and writes
        self._renewed: tuple[float, float] | None = None  # monotonic and wall clock before the last renewal was sent
        self._predecessor = ""  # whose claim is held without being renewed, in a full bucket
        #: The transactions of which owner.json may name one as the last; none before it was read as this database's.
        self.claimed: set[bytes] = set()
        self._taken = ""  # when the database took the prefix over from another one
        self._on_probation = False
        self._refusal: str | None = None  # why it is not ours, as of the last look
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="s3blobs lease", daemon=True)

    def start(self) -> None:
        """Begin to ask for it and to keep it, in a thread of its own."""
        self._thread.start()

    def is_held(self) -> bool:
        """Whether the prefix is surely this server's at this moment. Does not wait."""
        renewed = self._renewed
        if renewed is None or self._ending.is_set():
            return False
        # Both, because neither tells everything: the one may stand still while a virtual machine sleeps, the other
        # may be set back.
        elapsed = max(time.monotonic() - renewed[0], time.time() - renewed[1])
        return elapsed < _TRUSTED_FOR

    def require(self) -> None:
        """Raise NotOwner unless it is held. Does not wait."""
        if not self.is_held():
            raise NotOwner(self._reason())

    def renew_now(self) -> None:
        """Renew it now. Waits for S3; raises NotOwner if another server holds it, BucketError if S3 fails."""
        self._renew()
        self.require()

    def verify(self) -> None:
        """Look whether it still is ours. Waits for S3; raises as `renew_now` does."""
        with self._lock:
            note = self._bucket.read_owner()
            claim = Claim.of(note)
            if note is None or not (self._is_ours(claim) or claim.owner == self._predecessor != ""):
                self._lost_to(note, _not_any_more(claim))
        self.require()

    @property
    def is_on_probation(self) -> bool:
        """Whether the database has the prefix from another one since less than a week, as of the last renewal.

        Then nothing is to be deleted that was the other's.
        """
        return self._on_probation

    def close(self) -> None:
        """Mark it as stopped, so that another server need not wait until it is stale. From here on it is not held.

        That others on this database are gone as well it cannot know: then it stays as it is.
        """
        kept = self._thread.is_alive()  # before it is told to end
        self._ending.set()
        if kept:
            release = threading.Thread(target=self._release, name="s3blobs lease release", daemon=True)
            release.start()
            release.join(_RELEASE_TIMEOUT)

    def _reason(self) -> str:
        if self._ending.is_set():
            return "this server is being stopped"
        return self._refusal or "this server could not renew its lease of the bucket in time"

    # In the lease's own thread, or in that of a garbage collection

    def _keep(self) -> None:
        while not self._ending.is_set():
            pause = _LOOK_EVERY
            try:
                self._renew()
                pause = RENEW_EVERY if self.is_held() else _LOOK_EVERY
            except BucketError as error:
                logger.warning("The owner lease could not be renewed: %s", error)
            except Exception:
                logger.exception("The owner lease could not be renewed")
            self._ending.wait(pause)

    def _renew(self) -> None:
        with self._lock:
            if self._ending.is_set():
                return
            before = time.monotonic(), time.time()
            self._identity = self._database.identity()
            note = self._bucket.read_owner()
            claim = Claim.of(note)
            if note is not None:
                refusal = why_not(note, self._identity, self._database, self._owner)
                if refusal is not None:
                    self._lost_to(note, refusal)
                    return
                if not self._is_ours(claim):
                    same = claim.database == self._identity or self._database.was(claim.database)
                    self._taken = claim.taken if same else note.now.isoformat(timespec="seconds")
            data = self._claim()
            self.claimed = {claim.tid, Claim.read(data).tid}  # the answer to the write may be lost
            try:
                self._bucket.write_owner(data, note)  # or somebody else does at the same moment
            except BucketError as error:
                if error.reason != "quota" or note is None or claim.database != self._identity:
                    raise
                logger.warning("The owner lease is held without renewing it. %s", error)
                data, self._predecessor = note.data, claim.owner
            written = self._bucket.read_owner()
            theirs = Claim.of(written)
            if written is None or not (written.data == data or self._is_ours(theirs)):
                self._lost_to(written, _not_any_more(theirs))
            elif written.data != data and note is not None and written.data == note.data:
                # Ours, but the one from before: it grows old.
                raise BucketError(f"Bucket {self._bucket.name} did not take {self._bucket.keys.owner}")
            else:
                self._renewed = before
                self.claimed = {theirs.tid}
                self._on_probation = self._taken != "" and written.now < _moment(self._taken) + PROBATION
                self._report(None)

    def _lost_to(self, note: ControlObject | None, refusal: str) -> None:
        self._renewed = None
        self._report(
            f"bucket {self._bucket.name} with this s3-prefix belongs to {Claim.of(note)}, as "
            f"{self._bucket.keys.owner} says. {refusal}"
        )

    def _is_ours(self, claim: "Claim") -> bool:
        # That of all servers of a database; and our own, if the database says something else since: it was restarted.
        return claim.owner == self._owner or (self._database.shared and claim.database == self._identity)

    def _report(self, refusal: str | None) -> None:
        before, self._refusal = self._refusal, refusal
        if refusal is not None and refusal != before:
            logger.critical("%s. Blobs are stored and served, but this server deletes none", refusal)
        elif refusal is None and before is not None:
            logger.warning("Bucket %s belongs to this server now: a pack deletes dead blobs again", self._bucket.name)
        self._metrics.bucket_owner_conflict.set(refusal is not None)
        self._metrics.bucket_owner_changed.set(_moment(self._taken).timestamp() if self._taken else 0)

    def _release(self) -> None:
        with self._lock:
            if self._database.shared:
                return  # others may hold it as well
            try:
                note = self._bucket.read_owner()
                if note is not None and Claim.of(note).owner == self._owner:
                    self._bucket.write_owner(self._claim(stopped=_now()), note)
            except BucketError as error:
                logger.warning("The owner lease is not marked as stopped: %s", error)

    def _claim(self, stopped: str = "") -> bytes:
        return claim_of(self._database, self._identity, self._owner, self._name, self._started, stopped, self._taken)


def claim_of(
    database: Database, identity: str, owner: str, storage: str, started: str, stopped: str, taken: str
) -> bytes:
    """Return what owner.json says, as of now. ``started``, ``stopped``, ``taken``: moments in ISO format, or ""."""
    last = f"{u64(database.last_transaction()):x}"
    claim = Claim(FORMAT, owner, platform.node(), storage, identity, last, started, _now(), stopped, taken)
    return json.dumps(asdict(claim), indent=2).encode()


def is_alive(note: ControlObject) -> bool:
    """Return whether the server that wrote ``note`` may still be running."""
    return not Claim.of(note).stopped and note.age <= STALE_AFTER


def why_not(note: ControlObject, identity: str, database: Database, owner: str = "") -> str | None:
    """Return why the ``database`` with that ``identity`` may not take the prefix that ``note`` claims; None if it may.

    ``owner``: what the server calls itself.
    """
    claim = Claim.of(note)
    if claim.format > FORMAT:
        return "A later version of this software wrote that, which may mean something else by it: use that one"
    if (owner and claim.owner == owner) or (database.shared and claim.database == identity):
        return None
    if identity and claim.database == identity:
        if claim.tid == z64 or database.has_transaction(claim.tid):
            return None
        return (
            f"This is that database, but it does not have its last transaction {tid_repr(claim.tid)} any more: was an "
            f"older state restored? If that is meant to be: {_ADOPT}"
        )
    if is_alive(note):
        return (
            "Two databases must never share a prefix: give this one another s3-prefix, or stop the other one. A "
            "successor, which has its last transaction, takes over at once then, or "
            f"{STALE_AFTER / 60:g} minutes after it was last heard of"
        )
    if database.was(claim.database) or (claim.tid != z64 and database.has_transaction(claim.tid)):
        return None
    if claim.tid == z64:
        return f"It does not say what the last transaction of its database was. If this one is to have it: {_ADOPT}"
    return (
        f"This database does not have the last transaction of that one, {tid_repr(claim.tid)}: it is another database, "
        f"an empty one, or an older state. Is this the right Data.fs, and its disk mounted? If it is to have the "
        f"prefix: {_ADOPT}"
    )


@dataclass(frozen=True)
class Standing:
    """Whose a prefix is, as one database sees it."""

    #: A sentence that tells.
    whose: str
    #: Whether the database has the prefix, or may take it.
    is_ours: bool


def standing(bucket: Bucket, database: Database, identity: str | None) -> Standing:
    """Return whose the prefix of ``bucket`` is. Waits for S3; BucketError.

    ``identity``: that of the ``database``, None if it has none yet.
    """
    note = bucket.read_owner()
    prefix = f"s3-prefix {bucket.keys.prefix!r} of bucket {bucket.name}"
    if note is None:
        return Standing(f"{prefix} belongs to no database yet", True)
    claim = Claim.of(note)
    refusal = why_not(note, identity or "", database)
    if refusal is not None:
        return Standing(f"{prefix} belongs to {claim}. {refusal}", False)
    whose = "this database" if claim.database == identity else f"{claim}, of which this database is the successor"
    return Standing(f"{prefix} belongs to {whose}", True)


_ADOPT = "`zodb-s3blobs adopt -C zeo.conf` gives it the prefix"


def _not_any_more(claim: "Claim") -> str:
    return "It was this server's until then" if claim.owner else "It is not this server's"


@dataclass
class Claim:
    """What owner.json says; ``tid``: of the last transaction that the database had when it was written."""

    format: int
    owner: str
    host: str
    storage: str
    database: str
    last: str
    started: str
    renewed: str
    stopped: str
    taken: str

    @classmethod
    def of(cls, note: ControlObject | None) -> "Claim":
        """Return what ``note`` says; none claims nothing."""
        return cls.read(note.data if note is not None else b"")

    @classmethod
    def read(cls, data: bytes) -> "Claim":
        """Return what ``data`` says; what makes no sense claims nothing, and can be taken when it is old."""
        fields = list(cls.__annotations__)[1:]
        try:
            said = json.loads(data)
            # Another format may have other fields.
            return cls(int(said["format"]), *(str(said.get(name, "")) for name in fields))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls(0, *("" for _ in fields))

    @property
    def tid(self) -> bytes:
        """The tid of the last transaction; that of none if it makes no sense."""
        try:
            return p64(int(self.last, 16))
        except (ValueError, OverflowError, struct.error):
            return z64

    def __str__(self) -> str:
        if not self.owner:
            return "a server that its owner.json does not tell"
        # Anybody may have written it who may write to the bucket: it is shown, on one line and in short.
        host, storage, started, database = (
            repr(text[:_LONGEST_SHOWN]) for text in (self.host, self.storage, self.started, self.database)
        )
        return f"the server on {host} (storage {storage}, started {started}, database {database})"


def _moment(text: str) -> datetime:
    """Return the moment that ``text`` names in ISO format; the far future if it names none, to be on the safe side."""
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime(9999, 1, 1, tzinfo=timezone.utc)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
