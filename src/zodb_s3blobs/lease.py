"""The owner lease: which database the prefix belongs to, and which server may delete from it.

Two databases on one prefix, such as production and a copy of it that still has production's settings, must never delete
each other's blobs. So a server writes an object beside the blobs, owner.json, which names the owner of the prefix; it
renews owner.json, and collects garbage only while it holds this lease. A server that finds another database's lease
stores and serves blobs, and never deletes any.

owner.json names the database by its identity and by its last transaction. A database takes back its own prefix at once.
It takes another database's prefix only if that database's server has stopped, or has been silent for a while, and if it
has exactly that last transaction: then it is the successor, and not a foreign, empty or older database. Every other
case takes an explicit command (`adopt`). After a takeover, a database only marks dead blobs for a week.

Several servers on one database, as with RelStorage, hold the lease together.

Every write is conditional if the service supports that, and is always read back. Ages are differences of the service's
own clock: between the last write and now. A server that stops leaves owner.json behind, marked as stopped.

A full bucket refuses writes, and deleting dead blobs makes room. So while the bucket is full, owner.json counts as
renewed if a read shows that it is this server's own: another server could not write either to take the prefix.
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

from .boot_id import boot_id
from .errors import S3BlobsError
from .metrics import Metrics
from .s3.bucket import Bucket
from .s3.control import ControlObject
from .s3.errors import BucketError

logger = logging.getLogger(__name__)

FORMAT = 2

#: In seconds: the time between two renewals, and the age from which a lease counts as abandoned.
RENEW_EVERY, STALE_AFTER = 300.0, 900.0

#: How long, in seconds, the owner may delete after its last renewal. Less than `STALE_AFTER` by more than any request
#: takes, so that no deletion is still under way when another server takes a stale lease.
_TRUSTED_FOR = 600.0

#: Seconds between two attempts of a server without the lease to take it.
_RETRY_INTERVAL = 60.0

#: How long, in seconds, a stopping server waits for the write that marks the lease as stopped.
_RELEASE_TIMEOUT = 2.0

#: How long a database deletes nothing after it took the prefix over from another one.
PROBATION = timedelta(days=7)

#: The most characters of each field of owner.json that a message shows.
_LONGEST_SHOWN = 100


class NotOwner(S3BlobsError):
    """This server may not delete, because it does not hold the lease; the message names the owner, or the error."""


class Database(Protocol):
    """The view of the database that the lease needs. Any thread may call."""

    #: Whether other processes commit to the database, and hold the lease as well.
    shared: bool

    def identity(self) -> str:
        """Return the present identity of the database, which no other one and no copy has. May wait for its server."""

    def was(self, identity: str) -> bool:
        """Return whether the database can have had ``identity`` before a restart of its server or the machine."""

    def last_transaction(self) -> bytes:
        """Return the tid of the database's last transaction."""

    def has_transaction(self, tid: bytes) -> bool:
        """Return whether the database has the transaction with exactly this tid."""


class Lease:
    """This server's claim to the prefix of ``bucket``, on behalf of ``database``; any thread may call.

    ``metrics``: those of the storage; ``name``: the storage's name in owner.json.
    """

    def __init__(self, bucket: Bucket, database: Database, metrics: Metrics, name: str) -> None:
        self._bucket = bucket
        self._database = database
        self._identity = ""  # of the database, at the last renewal
        self._metrics = metrics
        self._name = name
        self._owner = uuid.uuid4().hex
        self._started = _now()
        self._lock = threading.Lock()  # one thread at a time reads and writes owner.json
        self._renewed: tuple[float, float] | None = None  # monotonic and wall clock before the last renewal was sent
        self._predecessor = ""  # the owner whose claim counts as this server's while a full bucket refuses a renewal
        #: Tids that owner.json may name as the last transaction; empty until it was read as this database's.
        self.claimed: set[bytes] = set()
        self._taken = ""  # time when the database took the prefix over from another one
        self._on_probation = False
        self._refusal: str | None = None  # why the lease was not ours at the last read
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="s3blobs lease", daemon=True)

    def start(self) -> None:
        """Start the thread that acquires and renews the lease."""
        self._thread.start()

    def is_held(self) -> bool:
        """Return whether this server certainly holds the lease now. Does not wait."""
        renewed = self._renewed
        if renewed is None or self._ending.is_set():
            return False
        # The maximum of both clocks: the monotonic one may stand still while a virtual machine sleeps, the wall clock
        # may be set back.
        elapsed = max(time.monotonic() - renewed[0], time.time() - renewed[1])
        return elapsed < _TRUSTED_FOR

    def require(self) -> None:
        """Raise NotOwner unless this server holds the lease. Does not wait."""
        if not self.is_held():
            raise NotOwner(self._reason())

    def renew_now(self) -> None:
        """Renew the lease. Waits for S3; raises NotOwner if another server holds the lease, BucketError if S3 fails."""
        self._renew()
        self.require()

    def verify(self) -> None:
        """Check against the bucket that this server still holds the lease. Waits for S3; NotOwner, BucketError."""
        with self._lock:
            note = self._bucket.read_owner()
            claim = Claim.of(note)
            if note is None or not (self._is_ours(claim) or claim.owner == self._predecessor != ""):
                self._lost_to(note, _not_any_more(claim))
        self.require()

    @property
    def is_on_probation(self) -> bool:
        """True if the database took the prefix over less than a week ago, as of the last renewal.

        During that time nothing that the other database may need must be deleted.
        """
        return self._on_probation

    def close(self) -> None:
        """Give up the lease and mark owner.json as stopped, so that a successor need not wait until it is stale.

        Waits for S3, for `_RELEASE_TIMEOUT` seconds at most. A shared lease is not marked, because other processes may
        still hold it.
        """
        kept = self._thread.is_alive()  # asked before the thread is told to end
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
            pause = _RETRY_INTERVAL
            try:
                self._renew()
                pause = RENEW_EVERY if self.is_held() else _RETRY_INTERVAL
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
                    # A clone of a whole virtual machine has the identity too, and its original may be running.
                    if same and not claim.may_run_elsewhere:
                        self._taken = claim.taken
                    else:
                        self._taken = note.now.isoformat(timespec="seconds")
            data = self._claim()
            self.claimed = {claim.tid, Claim.read(data).tid}  # the answer to the write may be lost
            try:
                self._bucket.write_owner(data, note)  # or another server does at the same moment
            except BucketError as error:
                if error.reason != "quota" or note is None or claim.database != self._identity:
                    raise
                logger.warning("The bucket is full: the owner lease is held without renewal. %s", error)
                data, self._predecessor = note.data, claim.owner
            written = self._bucket.read_owner()
            theirs = Claim.of(written)
            if written is None or not (written.data == data or self._is_ours(theirs)):
                self._lost_to(written, _not_any_more(theirs))
            elif written.data != data and note is not None and written.data == note.data:
                # owner.json is still ours, but was not renewed.
                raise BucketError(
                    f"Could not write {self._bucket.keys.owner} to bucket {self._bucket.name}: the service reported "
                    f"success, but kept the old object"
                )
            else:
                self._renewed = before
                self.claimed = {theirs.tid}
                self._on_probation = self._taken != "" and written.now < _moment(self._taken) + PROBATION
                self._report(None)

    def _lost_to(self, note: ControlObject | None, refusal: str) -> None:
        self._renewed = None
        self._report(
            f"s3-prefix {self._bucket.keys.prefix!r} of bucket {self._bucket.name} belongs to {Claim.of(note)}, "
            f"according to {self._bucket.keys.owner}. {refusal}"
        )

    def _is_ours(self, claim: "Claim") -> bool:
        # A shared lease belongs to all servers of the database; and our own claim stays ours if a restart of the
        # database has changed its identity.
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
                return  # other processes may still hold the lease
            try:
                note = self._bucket.read_owner()
                if note is not None and Claim.of(note).owner == self._owner:
                    self._bucket.write_owner(self._claim(stopped=_now()), note)
            except BucketError as error:
                logger.warning("The owner lease could not be marked as stopped: %s", error)

    def _claim(self, stopped: str = "") -> bytes:
        return claim_of(self._database, self._identity, self._owner, self._name, self._started, stopped, self._taken)


def claim_of(
    database: Database, identity: str, owner: str, storage: str, started: str, stopped: str, taken: str
) -> bytes:
    """Return the content of owner.json as of now. ``started``, ``stopped``, ``taken``: times in ISO format, or ""."""
    last = f"{u64(database.last_transaction()):x}"
    claim = Claim(FORMAT, owner, platform.node(), storage, identity, last, started, _now(), stopped, taken, boot_id())
    return json.dumps(asdict(claim), indent=2).encode()


def is_alive(note: ControlObject) -> bool:
    """Return whether the server that wrote ``note`` may still be running."""
    return not Claim.of(note).stopped and note.age <= STALE_AFTER


def why_not(note: ControlObject, identity: str, database: Database, owner: str = "") -> str | None:
    """Return why the ``database`` with this ``identity`` may not take the prefix that ``note`` claims; None if it may.

    ``owner``: the server's name for itself in owner.json.
    """
    claim = Claim.of(note)
    if claim.format > FORMAT:
        return "A later version of this software wrote that object, and this version cannot read it: use the later one"
    if (owner and claim.owner == owner) or (database.shared and claim.database == identity):
        return None
    if identity and claim.database == identity:
        if claim.tid == z64 or database.has_transaction(claim.tid):
            return None
        return (
            f"This is that database, but it does not have the last transaction {tid_repr(claim.tid)} any more: was an "
            f"older state restored? If so, and on purpose: {_ADOPT}"
        )
    if is_alive(note):
        return (
            "Two databases must never share a prefix: give this database another s3-prefix, or stop that server. A "
            "successor, which has the last transaction of that database, takes the prefix over at once after the stop, "
            f"or {STALE_AFTER / 60:g} minutes after the last renewal"
        )
    if database.was(claim.database) or (claim.tid != z64 and database.has_transaction(claim.tid)):
        return None
    if claim.tid == z64:
        return f"That object names no last transaction. If the prefix must belong to this database: {_ADOPT}"
    return (
        f"This database does not have the last transaction of that one, {tid_repr(claim.tid)}: it is another database, "
        f"an empty one, or an older state. Is this the right Data.fs, and its disk mounted? If the prefix must belong "
        f"to it: {_ADOPT}"
    )


@dataclass(frozen=True)
class Standing:
    """The ownership of a prefix from the point of view of one database."""

    #: A sentence that names the owner.
    whose: str
    #: Whether the database owns the prefix, or may take it.
    is_ours: bool


def standing(bucket: Bucket, database: Database, identity: str | None) -> Standing:
    """Return the ownership of the prefix of ``bucket``. Waits for S3; BucketError.

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
    """The content of owner.json; ``last``: the database's last transaction at the time of the write, in hexadecimal."""

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
    boot: str  # the `boot_id` of the server's machine

    @classmethod
    def of(cls, note: ControlObject | None) -> "Claim":
        """Return the claim in ``note``; an empty claim for None."""
        return cls.read(note.data if note is not None else b"")

    @classmethod
    def read(cls, data: bytes) -> "Claim":
        """Return the claim in ``data``; an empty claim for invalid data, whose prefix can be taken when it is old."""
        fields = list(cls.__annotations__)[1:]
        try:
            said = json.loads(data)
            # Another format may have other fields.
            return cls(int(said["format"]), *(str(said.get(name, "")) for name in fields))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls(0, *("" for _ in fields))

    @property
    def may_run_elsewhere(self) -> bool:
        """True if the server may still run, on another machine; or it ended in a crash of this machine."""
        return not self.stopped and self.boot not in ("", boot_id())

    @property
    def tid(self) -> bytes:
        """Tid of the last transaction; `z64` if the claim names none."""
        try:
            return p64(int(self.last, 16))
        except (ValueError, OverflowError, struct.error):
            return z64

    def __str__(self) -> str:
        if not self.owner:
            return "a server that owner.json does not name"
        # Any writer to the bucket may have written these texts: each is shown on one line, and shortened.
        host, storage, started, database = (
            repr(text[:_LONGEST_SHOWN]) for text in (self.host, self.storage, self.started, self.database)
        )
        return f"the server on {host} (storage {storage}, started {started}, database {database})"


def _moment(text: str) -> datetime:
    """Return the time that ``text`` gives in ISO format; the far future, which is safe, if it gives none."""
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime(9999, 1, 1, tzinfo=timezone.utc)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
