"""The register of blobs in flight: what transactions are about to commit, and what garbage collection deletes.

Committing and deleting must never work on the same key at once. A new blob is safe by its tid, which is later than
any that the collection judges; a restored one carries an old tid, and what an abort deletes in the background may be
restored again meanwhile.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Name = tuple[bytes, bytes]  # (oid, tid)


class InFlight:
    """The register; any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: Counter[Name] = Counter()
        self._deleting: frozenset[Name] = frozenset()

    def add(self, name: Name) -> None:
        """A transaction that has not ended wants ``name``."""
        with self._changed:
            self._wanted[name] += 1

    def discard(self, names: Iterable[Name]) -> None:
        """The transaction that wanted ``names`` has ended, and all that was left of it has been cleaned up."""
        with self._changed:
            for name in names:
                self._wanted[name] -= 1
                if self._wanted[name] <= 0:
                    del self._wanted[name]
            self._changed.notify_all()

    def wait_until_judged(self, name: Name) -> None:
        """Wait, in a worker, until nobody else is about to delete ``name``: only then can it be told if it exists.

        For a transaction that wants it: any other one that still does has been aborted and is being cleaned up after.
        """
        with self._changed:
            self._changed.wait_for(lambda: name not in self._deleting and self._wanted[name] <= 1)

    @contextmanager
    def deleting(self, names: Iterable[Name]) -> Iterator[list[Name]]:
        """The ``names`` that no transaction wants, to be deleted in the body; for one thread at a time."""
        with self._changed:
            free = [name for name in names if name not in self._wanted]
            self._deleting = frozenset(free)
        try:
            yield free
        finally:
            with self._changed:
                self._deleting = frozenset()
                self._changed.notify_all()
