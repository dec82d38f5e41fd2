"""The index of the cache: its files, their sizes, and the next one to evict.

It is made for millions of files: the name and the state of a file are one integer each, in plain dictionaries, which
take about 130 bytes a file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..revision import Revision

#: The most files of one dictionary: what 2**16 slots hold. To make a larger one grow would stop all threads for long.
_CAPACITY = 43_690

_SIZE_BITS, _USED_BITS = 48, 32


@dataclass(slots=True)
class Entry:
    """The state of a file: ``size`` in bytes, and ``used``, the time of its last use in seconds since 1970.

    ``record``: the number of its record in the journal, 0 if it has none yet. ``is_proven``: its bytes are known to be
    right. ``pins``: how many it has.
    """

    size: int
    used: int
    record: int = 0
    is_proven: bool = True
    pins: int = 0


class FileOrder:
    """The files that no pin holds, in the order of their last use. Each takes whole blocks of ``block`` bytes.

    One large dictionary would stop all threads while it grows, and to find its first entry takes long when many have
    been taken out. So there are several in a row, the parts; neighbours that became small are merged.
    """

    def __init__(self, block: int = 1) -> None:
        self.block = block
        #: The bytes that the files take on the disk.
        self.size = 0
        self._oldest: dict[int, int] = {}  # used before all others; the least recently used is the last one
        self._parts: list[dict[int, int]] = [{}]  # the others, in the order of use
        self._room = _CAPACITY  # for so many files more in the last part

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._oldest) + sum(map(len, self._parts))

    def get(self, name: Revision) -> Entry | None:
        """Return the state of a file; None if it is not there."""
        number = _number(name)
        for part in (*reversed(self._parts), self._oldest):
            if number in part:
                return _unpack(part[number])
        return None

    def append(self, name: Revision, entry: Entry) -> None:
        """Add a file that is not there, as the most recently used one."""
        if not self._room:
            self._start_part()
        self._room -= 1
        self._parts[-1][_number(name)] = _pack(entry)
        self.size += on_disk(entry.size, self.block)

    def append_left(self, name: Revision, entry: Entry) -> None:
        """Add a file that is not there, as used before all others."""
        if len(self._oldest) >= _CAPACITY:
            self._parts.insert(0, self._turned())
            self._oldest = {}
        self._oldest[_number(name)] = _pack(entry)
        self.size += on_disk(entry.size, self.block)

    def pop(self, name: Revision) -> Entry | None:
        """Take a file out and return its state; None if it is not there."""
        number = _number(name)
        state = None
        for place in reversed(range(len(self._parts))):
            state = self._parts[place].pop(number, None)
            if state is not None:
                self._merge(place)
                break
        else:
            state = self._oldest.pop(number, None)
        if state is None:
            return None
        entry = _unpack(state)
        self.size -= on_disk(entry.size, self.block)
        return entry

    def set_record(self, name: Revision, entry: Entry, record: int) -> None:
        """Note the new number of the record of a file whose state is ``entry``."""
        number = _number(name)
        for part in (*self._parts, self._oldest):
            if number in part:
                entry.record = record
                part[number] = _pack(entry)

    def oldest(self) -> tuple[Revision, Entry] | None:
        """Return the least recently used file; None if there is none."""
        while not self._oldest:
            if len(self._parts) == 1:
                if not self._parts[0]:
                    return None
                self._start_part()
            # Of a dictionary only the last entry is found fast, however many were taken out before it.
            self._oldest = dict(reversed(self._parts.pop(0).items()))
        number, state = self._oldest.popitem()
        self._oldest[number] = state
        return _name(number), _unpack(state)

    def prepend(self, earlier: "FileOrder") -> None:
        """Take over the files of ``earlier``, none of which is here, as used before all others."""
        self._parts[:0] = [part for part in [*earlier.parts(), self._turned()] if part]
        self._oldest = {}
        self.size += earlier.size

    def parts(self) -> list[dict[int, int]]:
        """Return the dictionaries, in the order of use: the integers of the names and states of all files."""
        return [self._turned(), *self._parts]

    def _turned(self) -> dict[int, int]:
        return dict(reversed(self._oldest.items()))

    def _start_part(self) -> None:
        self._parts.append({})
        self._room = _CAPACITY

    def _merge(self, place: int) -> None:
        """Merge a part that has become smaller with a neighbour, if one can hold both; not with the last part."""
        for first in (place - 1, place):
            if 0 <= first < len(self._parts) - 2:
                earlier, later = self._parts[first : first + 2]
                if len(earlier) + len(later) <= _CAPACITY:
                    self._parts[first : first + 2] = [{**earlier, **later}]
                    return


class FoundFiles(FileOrder):
    """The files of earlier runs, of which about ``number`` records tell; without those of more than ``most`` bytes."""

    def __init__(self, block: int, most: int, number: int) -> None:
        super().__init__(block)
        self._most = most
        # A mark for each name that came: most names come once, and need not be looked for in every part.
        self._seen = bytearray(1 << (8 * number).bit_length())

    def add(self, summaries: Iterable[tuple[int, bytes, int, int]]) -> None:
        """Add what the next records tell: number, name, size in bytes, time of use. A negative size: it is gone."""
        # Millions of them at the start: few calls, and local variables.
        seen, mask, block, from_bytes = self._seen, len(self._seen) - 1, self.block, int.from_bytes
        part, room, blocks = self._parts[-1], self._room, 0
        for record, name, size, used in summaries:
            number = from_bytes(name, "big")
            mark = hash(number) & mask
            if seen[mark]:
                self.pop(_name(number))
            seen[mark] = 1
            taken = -(-size // block) or 1
            if size < 0 or taken * block > self._most:
                continue
            if not room:
                self._start_part()
                part, room = self._parts[-1], self._room
            room -= 1
            part[number] = (record << _SIZE_BITS + 1 | size) << _USED_BITS | used
            blocks += taken
        self._room = room
        self.size += blocks * block


class LruIndex:
    """An index of files in the order of their last use, for at most ``limit`` bytes of disk. It touches no disk.

    A file takes whole blocks of ``block`` bytes. A pinned file is not evicted. One that is larger than the limit does
    not count while it is pinned: others must not go because of it. The files of earlier runs become known with
    `add_found`; until then, nothing is evicted.

    Not for several threads at once: the caller holds a lock.
    """

    def __init__(self, limit: int, block: int = 1) -> None:
        self.limit = limit
        self.block = block
        #: The bytes of disk of all pinned files.
        self.pinned_bytes = 0
        self._unused = FileOrder(block)
        self._pinned: dict[Revision, Entry] = {}
        self._oversized = 0  # bytes of the pinned files that are larger than the limit
        # Until `add_found`: what was removed meanwhile and must not be found again.
        self._removed: set[Revision] | None = set()

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._unused) + len(self._pinned)

    def __contains__(self, name: Revision) -> bool:
        """Return whether the file is in the index."""
        return self.get(name) is not None

    @property
    def size(self) -> int:
        """The bytes of disk of all files."""
        return self._unused.size + self.pinned_bytes

    @property
    def is_complete(self) -> bool:
        """True if the files of earlier runs are known."""
        return self._removed is None

    def get(self, name: Revision) -> Entry | None:
        """Return the state of a file; None if it is not in the index."""
        return self._pinned.get(name) or self._unused.get(name)

    def add_found(self, found: FoundFiles) -> None:
        """Add the files of earlier runs; those used since are newer than all of them. ``found`` is no longer usable."""
        known = [_name(number) for part in self._unused.parts() for number in part]
        for name in (*(self._removed or ()), *known, *self._pinned):
            found.pop(name)
        self._unused.prepend(found)
        self._removed = None

    def put(self, name: Revision, size: int, used: int) -> None:
        """Add a file, or note its new size, as the most recently used one. Its bytes are known to be right."""
        entry = self._pinned.get(name)
        if entry is None:
            self._unused.pop(name)
            self._unused.append(name, Entry(size, used))
        else:
            self._count_pinned(entry, -1)
            entry.size, entry.used, entry.record, entry.is_proven = size, used, 0, True
            self._count_pinned(entry, 1)

    def put_oldest(self, name: Revision, size: int, used: int, record: int) -> None:
        """Add a file that is not there, as the least recently used one. Its bytes are not known to be right."""
        self._unused.append_left(name, Entry(size, used, record, is_proven=False))

    def pin(self, name: Revision, used: int) -> Entry:
        """Add a pin to a file of the index."""
        entry = self._pinned.get(name)
        if entry is None:
            entry = self._unused.pop(name)
            assert entry is not None
            self._pinned[name] = entry
            self._count_pinned(entry, 1)
        entry.used = used
        entry.pins += 1
        return entry

    def unpin(self, name: Revision, entry: Entry) -> bool:
        """Take a pin away; return whether it was the last one of a file that is still in the index."""
        entry.pins -= 1
        if entry.pins or self._pinned.get(name) is not entry:  # still in use, or removed meanwhile
            return False
        del self._pinned[name]
        self._count_pinned(entry, -1)
        self._unused.append(name, entry)
        return True

    def remove(self, name: Revision) -> None:
        """Remove a file; it is no error if it is not in the index."""
        if self._removed is not None:
            self._removed.add(name)
        entry = self._pinned.pop(name, None)
        if entry is not None:
            self._count_pinned(entry, -1)
        else:
            self._unused.pop(name)

    def set_record(self, name: Revision, before: int, record: int) -> None:
        """Note that ``record`` is the number of the file's record, if that was ``before`` until now."""
        pinned = self._pinned.get(name)
        entry = pinned or self._unused.get(name)
        if entry is None or entry.record != before:  # removed, or published again
            return
        if pinned is not None:
            pinned.record = record
        else:
            self._unused.set_record(name, entry, record)

    def parts(self) -> list[dict[int, int]]:
        """Return the integers of the files that are not pinned, some thousands at a time, in the order of use."""
        return self._unused.parts()

    def pinned(self) -> list[Revision]:
        """Return the files that are pinned."""
        return list(self._pinned)

    def oldest(self) -> tuple[Revision, Entry] | None:
        """Return the least recently used file that is not pinned; None if there is none."""
        return self._unused.oldest()

    def is_over_limit(self) -> bool:
        """Return whether the cache must evict a file, and can."""
        # Before all are known, the least recently used ones are not.
        return self.is_complete and len(self._unused) > 0 and self.size - self._oversized > self.limit

    def has_room(self, size: int) -> bool:
        """Return whether a file of ``size`` bytes more leaves all others where they are."""
        return self.is_complete and self.size - self._oversized + on_disk(size, self.block) <= self.limit

    def is_oversized(self, size: int) -> bool:
        """Return whether a file of ``size`` bytes is larger than the whole cache may be."""
        return on_disk(size, self.block) > self.limit

    def _count_pinned(self, entry: Entry, sign: int) -> None:
        size = on_disk(entry.size, self.block) * sign
        self.pinned_bytes += size
        if self.is_oversized(entry.size):
            self._oversized += size


def on_disk(size: int, block: int) -> int:
    """Return the bytes of disk that a file of ``size`` bytes takes, in whole blocks; an empty one takes one as well."""
    return max(1, -(-size // block)) * block


def _number(name: Revision) -> int:
    return int.from_bytes(name[0] + name[1], "big")


def _name(number: int) -> Revision:
    name = number.to_bytes(16, "big")
    return Revision(name[:8], name[8:])


def unpacked(number: int, state: int) -> tuple[Revision, Entry]:
    """Return the file of which ``number`` and ``state`` are the integers."""
    return _name(number), _unpack(state)


def _pack(entry: Entry) -> int:
    state = entry.record << 1 | entry.is_proven
    return (state << _SIZE_BITS | entry.size) << _USED_BITS | entry.used


def _unpack(state: int) -> Entry:
    used = state & (1 << _USED_BITS) - 1
    state >>= _USED_BITS
    size = state & (1 << _SIZE_BITS) - 1
    state >>= _SIZE_BITS
    return Entry(size, used, state >> 1, bool(state & 1))
