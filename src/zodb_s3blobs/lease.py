"""The owner lease: which server may delete from the prefix.

Two databases on one prefix, such as a copy of production that still has production's settings, must never delete each
other's blobs. So a server writes an object beside the blobs that says whose they are, renews it, and collects garbage
only while it holds it. Whoever finds the lease of another that lives serves all the same, and never deletes.

Several servers on one database, as RelStorage has them, hold the lease together: it names the database.

Every write is conditional where the service can do that, and is read back everywhere. Ages are those that the service
tells: its own clock at the last write and now.
"""

import json
import logging
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from .bucket import Bucket, BucketError, Note
from .machine import boot_id
from .metrics import Metrics

logger = logging.getLogger(__name__)

_FORMAT = 1

#: In seconds: how often a lease is renewed, and how old one is that nobody keeps any more.
RENEW_EVERY, STALE_AFTER = 300.0, 900.0

#: For how long, in seconds, after the last renewal the owner deletes. Less than `STALE_AFTER` by more than any request
#: takes, so that no deletion is still under way when another server takes a stale lease.
_TRUSTED_FOR = 600.0

#: How often, in seconds, a server without the lease looks whether it can have it.
_LOOK_EVERY = 60.0

#: How long, in seconds, the end of the server waits for the lease to be given back.
_RELEASE_TIMEOUT = 2.0

#: How much of what the lease of another says is shown, in characters.
_LONGEST_SHOWN = 100


class NotOwner(Exception):
    """Nothing may be deleted; the message says who holds the prefix, or why that is not known."""


class Lease:
    """This server's claim to the prefix of ``bucket``; any thread may call.

    ``home``: what tells this server's directory from all others, of which no two processes use the same at once;
    ``metrics``: those of the storage; ``database`` tells what all servers on this database have in common, and a copy
    of it has not: they hold the lease together. None: this server is the only one.
    """

    def __init__(
        self, bucket: Bucket, home: str, metrics: Metrics, database: Callable[[], str | None] = lambda: None
    ) -> None:
        self._bucket = bucket
        self._home = home
        self._ask_database = database
        self._database: str | None = None  # as of the last time it was asked
        self._metrics = metrics
        self._owner = uuid.uuid4().hex
        self._started = _now()
        self._lock = threading.Lock()  # one at a time asks and writes
        self._renewed: tuple[float, float] | None = None  # monotonic and wall clock before the last renewal was sent
        self._other: str | None = None  # who has it, as of the last look
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

    def check(self) -> None:
        """Raise NotOwner unless it is held. Does not wait."""
        if not self.is_held():
            raise NotOwner(self._reason())

    def confirm(self) -> None:
        """Renew it now. Waits for S3; raises NotOwner if another server holds it, BucketError if S3 fails."""
        self._renew()
        self.check()

    def look(self) -> None:
        """Look whether it still is ours. Waits for S3; raises as `confirm` does."""
        with self._lock:
            note = self._bucket.read_owner()
            if note is None or not self._is_ours(_Claim.of(note)):
                self._lost_to(note)
        self.check()

    def close(self) -> None:
        """Give it back, so that another server need not wait until it is stale. From here on it is not held.

        That others on this database are gone as well it cannot know: then it stays behind.
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
        if self._other is not None:
            return (
                f"bucket {self._bucket.name} with this s3-prefix belongs to {self._other}, as "
                f"{self._bucket.keys.owner} says. Two servers must never share a prefix: give this one another "
                f"s3-prefix, or stop the other one. If that is gone for good, this one takes over "
                f"{STALE_AFTER / 60:g} minutes after it was last heard of"
            )
        return "this server could not renew its lease of the bucket in time"

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
            self._database = self._ask_database()
            note = self._bucket.read_owner()
            if note is not None and not self._may_take(note):
                self._lost_to(note)
                return
            claim = self._claim()
            self._bucket.write_owner(claim, note)  # or somebody else does at the same moment
            written = self._bucket.read_owner()
            if written is None or not self._is_ours(_Claim.of(written)):
                self._lost_to(written)
            elif written.data != claim and note is not None and written.data == note.data:
                # Ours, but the one from before: it grows old.
                raise BucketError(f"Bucket {self._bucket.name} did not take {self._bucket.keys.owner}")
            else:
                self._renewed = before
                self._tell(None)

    def _lost_to(self, note: Note | None) -> None:
        self._renewed = None
        self._tell("another server" if note is None else str(_Claim.of(note)))

    def _may_take(self, note: Note) -> bool:
        claim = _Claim.of(note)
        if self._is_ours(claim):
            return True
        if claim.format > _FORMAT:
            return False  # of a later version of this software, which may mean something else by it
        if note.age > STALE_AFTER:
            return True
        # That of the process which had our directory before: it is dead, or the directory were not ours. A copy of the
        # directory on another machine is not that process. Where a database has several servers, the others live on.
        return claim.home == self._home and claim.host == _host() and not (claim.database or self._database)

    def _is_ours(self, claim: "_Claim") -> bool:
        # Our own, too, if the database says something else since: it has been restarted.
        return claim.owner == self._owner or (self._database is not None and claim.database == self._database)

    def _tell(self, other: str | None) -> None:
        before, self._other = self._other, other
        if other is not None and other != before:
            logger.critical("%s. Blobs are stored and served, but this server deletes none", self._reason())
        elif other is None and before is not None:
            logger.warning("Bucket %s belongs to this server now: a pack deletes dead blobs again", self._bucket.name)
        self._metrics.bucket_owner_conflict.set(other is not None)

    def _release(self) -> None:
        with self._lock:
            if self._database is not None:
                return  # others may hold it as well; a renewal may have learnt that just now
            try:
                note = self._bucket.read_owner()
                if note is not None and _Claim.of(note).owner == self._owner:
                    self._bucket.delete_owner()
            except BucketError as error:
                logger.warning("The owner lease stays behind and is over in %g minutes: %s", STALE_AFTER / 60, error)

    def _claim(self) -> bytes:
        claim = _Claim(
            _FORMAT,
            self._owner,
            _host(),
            self._home,
            self._metrics.name,
            self._started,
            _now(),
            self._database or "",
        )
        return json.dumps(asdict(claim), indent=2).encode()


@dataclass
class _Claim:
    """What the lease's object says."""

    format: int
    owner: str
    host: str
    home: str
    storage: str
    started: str
    renewed: str
    database: str

    @classmethod
    def of(cls, note: Note) -> "_Claim":
        fields = list(cls.__annotations__)[1:]
        try:
            said = json.loads(note.data)
            # A later format may have other fields.
            return cls(int(said["format"]), *(str(said.get(name, "")) for name in fields))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls(0, *("" for _ in fields))  # it can be taken when it is old

    def __str__(self) -> str:
        if not self.owner:
            return "a server that its owner.json does not tell"
        # Anybody may have written it who may write to the bucket: it is shown, on one line and in short.
        host, storage, started, owner = (
            repr(text[:_LONGEST_SHOWN]) for text in (self.host, self.storage, self.started, self.owner)
        )
        return f"the server on {host} (storage {storage}, started {started}, owner {owner})"


def _host() -> str:
    """What tells this machine, as it runs now, from others."""
    return f"{platform.node()} {boot_id()}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
