"""The register of blobs in flight: what transactions are about to commit, and what garbage collection deletes.

Committing and deleting must never work on the same key at once. A new blob is safe by its tid, which is later than
any that the collection judges; a restored one carries an old tid, and what an abort deletes in the background may be
restored again meanwhile.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .revision import Revision


class InFlight:
    """The register; any thread may call. A ``holder`` is whatever stands for one transaction."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: dict[Revision, list[object]] = {}  # in the order in which they came
        self._deleting: frozenset[Revision] = frozenset()

    def add_all(self, names: Iterable[Revision], holder: object) -> None:
        """Register that the transaction ``holder``, which has not ended, wants each of ``names``."""
        with self._changed:
            for name in names:
                self._holders.setdefault(name, []).append(holder)

    def remove(self, names: Iterable[Revision], holder: object) -> None:
        """Remove ``names`` of the transaction ``holder``, which has ended and left nothing to clean up."""
        with self._changed:
            for name in names:
                holders = self._holders.get(name, [])
                if holder in holders:
                    holders.remove(holder)
                if not holders:
                    self._holders.pop(name, None)
            self._changed.notify_all()

    def is_wanted(self, name: Revision) -> bool:
        """Return whether a transaction wants ``name``."""
        with self._changed:
            return name in self._holders

    def wait_until_judged(self, name: Revision, holder: object) -> None:
        """Wait, in a worker, until no other thread is about to delete ``name``: only then is its existence certain.

        For a transaction that wants it: one that came earlier has been aborted and is still being cleaned up after.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: name not in self._deleting and self._holders.get(name, [holder])[0] is holder
            )

    @contextmanager
    def deleting(self, names: Iterable[Revision]) -> Iterator[list[Revision]]:
        """Yield those of ``names`` that no transaction wants; the body deletes them. For one thread at a time."""
        with self._changed:
            free = [name for name in names if name not in self._holders]
            self._deleting = frozenset(free)
        try:
            yield free
        finally:
            with self._changed:
                self._deleting = frozenset()
                self._changed.notify_all()
