"""The register of blobs in flight: what transactions are about to commit, and what garbage collection deletes.

Committing and collecting must never work on the same key. A new blob is safe by its tid, which is later than any
that the collection judges; a restored one carries an old tid, and an aborted one is deleted in the background.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Name = tuple[bytes, bytes]  # (oid, tid)


class InFlight:
    """The register; any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._committing: set[Name] = set()
        self._deleting: frozenset[Name] = frozenset()

    def add(self, name: Name) -> None:
        """A transaction that has not ended wants ``name``."""
        with self._changed:
            self._committing.add(name)

    def discard(self, names: Iterable[Name]) -> None:
        """The transaction has ended, and all that was left of it has been cleaned up."""
        with self._changed:
            self._committing.difference_update(names)

    def wait_until_judged(self, name: Name) -> None:
        """Wait, in a worker, while ``name`` is being deleted: until then nobody can say whether it exists."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._deleting)

    @contextmanager
    def deleting(self, names: Iterable[Name]) -> Iterator[list[Name]]:
        """The ``names`` that no transaction wants, to be deleted in the body; one thread at a time."""
        with self._changed:
            free = [name for name in names if name not in self._committing]
            self._deleting = frozenset(free)
        try:
            yield free
        finally:
            with self._changed:
                self._deleting = frozenset()
                self._changed.notify_all()
