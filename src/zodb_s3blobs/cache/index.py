"""The index of the cache: its files, their sizes, and the next one to evict."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ..revision import Revision


@dataclass
class Entry:
    """A pinned file: ``size`` in bytes, and how many pins it has."""

    size: int
    pins: int = 0


class LruIndex:
    """An index of files in the order of their last use, for at most ``limit`` bytes. It touches no disk.

    A pinned file is not evicted. One that is larger than the limit does not count while it is pinned: others must not
    go because of it. The files of earlier runs become known with `add_found`; until then, nothing is evicted.

    Not for several threads at once: the caller holds a lock.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: The bytes of all files.
        self.size = 0
        self._unused: OrderedDict[Revision, int] = OrderedDict()  # name -> size, least recent first
        self._pinned: dict[Revision, Entry] = {}
        self._oversized = 0  # bytes of the pinned files that are larger than the limit
        # Until `add_found`: what was removed meanwhile and must not be found again.
        self._removed: set[Revision] | None = set()

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._unused) + len(self._pinned)

    def __contains__(self, name: Revision) -> bool:
        """Return whether the file is in the index."""
        return name in self._unused or name in self._pinned

    @property
    def is_complete(self) -> bool:
        """True if the files of earlier runs are known."""
        return self._removed is None

    @property
    def pinned_bytes(self) -> int:
        """The bytes of all pinned files."""
        return sum(entry.size for entry in self._pinned.values())

    def add_found(self, found: Iterable[tuple[Revision, int]]) -> None:
        """Add the files of earlier runs, the least recently used first; those used since are newer than all of them."""
        index = OrderedDict(found)
        for name in (*(self._removed or ()), *self._unused, *self._pinned):
            index.pop(name, None)
        self.size += sum(index.values())
        index.update(self._unused)
        self._unused = index
        self._removed = None
        for name in [name for name, size in index.items() if size > self.limit]:
            index.move_to_end(name, last=False)  # the limit was larger once: evict them first

    def put(self, name: Revision, size: int) -> None:
        """Add a file, or note its new size, as the most recently used one."""
        entry = self._pinned.get(name)
        if entry is None:
            self.size += size - self._unused.pop(name, 0)
            self._unused[name] = size
        else:
            self.size += size - entry.size
            self._oversized += self._excess(size) - self._excess(entry.size)
            entry.size = size

    def pin(self, name: Revision) -> Entry:
        """Add a pin to a file of the index."""
        entry = self._pinned.get(name)
        if entry is None:
            entry = self._pinned[name] = Entry(self._unused.pop(name))
            self._oversized += self._excess(entry.size)
        entry.pins += 1
        return entry

    def unpin(self, name: Revision, entry: Entry) -> bool:
        """Take a pin away; return whether it was the last one of a file that is still in the index."""
        entry.pins -= 1
        if entry.pins or self._pinned.get(name) is not entry:  # still in use, or removed meanwhile
            return False
        del self._pinned[name]
        self._oversized -= self._excess(entry.size)
        self._unused[name] = entry.size
        return True

    def remove(self, name: Revision) -> None:
        """Remove a file; it is no error if it is not in the index."""
        if self._removed is not None:
            self._removed.add(name)
        self.size -= self._unused.pop(name, 0)
        entry = self._pinned.pop(name, None)
        if entry is not None:
            self.size -= entry.size
            self._oversized -= self._excess(entry.size)

    def oldest(self) -> tuple[Revision, int] | None:
        """Return the least recently used file that is not pinned, and its size; None if there is none."""
        return next(iter(self._unused.items()), None)

    def is_over_limit(self) -> bool:
        """Return whether the cache must evict a file, and can."""
        # Before all are known, the least recently used ones are not.
        return self.is_complete and bool(self._unused) and self.size - self._oversized > self.limit

    def _excess(self, size: int) -> int:
        """Return what a file adds to `_oversized` while it is pinned."""
        return size if size > self.limit else 0
