"""The paths of objects in a database, from the root object, in a form that a person can follow.

Records are read without the application: none of their classes is imported, and none of their code runs.
"""

import functools
import io
import itertools
import pickle
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from typing import Any

from ZODB.serialize import referencesf
from ZODB.utils import oid_repr, z64

from ..progress import showing

_BATCH = 1000

#: The number of steps whose names are cached, since the ways to the blobs have much in common.
_REMEMBERED = 10_000

#: The most objects that are examined for the topmost holder of an object that the root does not lead to.
_LOOKED_AT = 10_000

_LONGEST_NAME = 100

#: The cost of a step to an object. The cost of a way is the sum of its steps; of equally cheap ways the shortest is
#: taken. A way through an index is taken only if no other way leads to the object, however long that is.
_AN_ITEM = 0
_BY_THE_WAY = 1  # by a private attribute, a number, or an attribute that cannot be read
_AN_INDEX = 1_000_000

#: Names of references to objects with their place elsewhere: Zope's component registries, catalogs, and parents.
_INDEXES = re.compile(
    r"_components|(.*_)?registrations|(.*_)?intids?|.*catalog|__parent__|aq_parent",
    re.IGNORECASE,
)

#: Names of the attributes in which containers keep their items; paths leave them out.
_OF_CONTAINERS = re.compile(r"_tree|_container|_data|_SampleContainer__data|_BTreeContainer__data")


def find(storage: Any, oids: Collection[bytes]) -> dict[bytes, str]:
    """Return oid -> path from the root object, such as ``/app/folder/file/_blob``, for the ``oids`` that have one.

    The names are attributes and the keys of mappings and BTrees; an object without a name, for example because its
    holder cannot be read, appears with its oid. An object that the root does not lead to has a path from its topmost
    holder: ``[app.models.Folder 0x2a]/file/_blob``, and no path without a holder. Only current revisions count.

    Of several ways to an object, one through the items of containers is preferred to one through a catalog or another
    index (`_cost`), then the shortest.

    If there are any ``oids``, this reads the whole database once into a temporary file, and takes as long as that.
    Raises the storage's own errors; invalid records are skipped.
    """
    if not oids:
        return {}
    with closing(_Graph()) as graph:
        with (
            showing("Reading the database for paths", "transactions") as progress,
            # Not transactions committed since the storage was opened: it could not load their records.
            closing(storage.iterator(None, storage.lastTransaction())) as transactions,
        ):
            graph.add(
                (record.oid, record.tid, _costs(record.data))
                for transaction in progress.over(transactions)
                for record in transaction
            )
        graph.reach()
        steps = _Steps(storage, graph.tid)
        paths = {}
        for oid in oids:
            chain = graph.chain(oid)
            if chain[0] == z64:
                start = ""
            elif len(chain := graph.chain_without_root(oid)) > 1:
                start = f"[{steps.class_of(chain[0])} {oid_repr(chain[0])}]"
            else:
                continue
            names = (steps.names(*step) for step in itertools.pairwise(chain))
            paths[oid] = start + "".join(f"/{name}" for name in itertools.chain.from_iterable(names)) or "/"
        return paths


def _references(data: bytes | None) -> list[bytes]:
    """Return the oids that the record ``data`` refers to; none for a deleted object or an invalid record."""
    try:
        return referencesf(data) if data else []
    except Exception:
        return []


def _costs(data: bytes | None) -> dict[bytes, int]:
    """Return oid -> cost of the step, for the objects that the record ``data`` refers to."""
    references = _references(data)
    if not data or not references:
        return {}
    costs: dict[bytes, int] = {}
    try:
        for way, oid in _ways(_read(data)[1]):
            cost = sum(map(_cost, _keys_on(way)))
            costs[oid] = min(cost, costs.get(oid, cost))
    except Exception:  # as in `_Steps`
        costs = {}
    return {oid: costs.get(oid, _BY_THE_WAY) for oid in references}


def _cost(key: Any) -> int:
    """Return the cost of a step through the attribute or item ``key``."""
    if key is None or isinstance(key, bytes):
        return _AN_ITEM
    if not isinstance(key, str):
        return _BY_THE_WAY
    if _INDEXES.fullmatch(key):
        return _AN_INDEX
    return _BY_THE_WAY if key.startswith("_") and not _OF_CONTAINERS.fullmatch(key) else _AN_ITEM


class _Graph:
    """The references between objects, in a temporary file. Belongs to one thread, until `close`."""

    def __init__(self) -> None:
        # Each record has a number; queries use the latest record of an object only. So rows are only appended, and
        # none is deleted.
        self._tables = sqlite3.connect("")
        self._tables.executescript(
            """
            PRAGMA journal_mode = OFF;
            CREATE TABLE current (oid BLOB PRIMARY KEY, tid BLOB, record INTEGER) WITHOUT ROWID;
            CREATE TABLE refs (record INTEGER, oid BLOB, cost INTEGER, PRIMARY KEY (record, oid)) WITHOUT ROWID;
            CREATE TABLE reached (number INTEGER PRIMARY KEY, oid BLOB UNIQUE, holder BLOB);
            CREATE TABLE waiting (
                cost INTEGER, number INTEGER, oid BLOB, holder BLOB, PRIMARY KEY (cost, number, oid)
            ) WITHOUT ROWID;
            """
        )
        self._has_holders = False

    def close(self) -> None:
        """Delete the temporary file."""
        self._tables.close()

    def add(self, records: Iterable[tuple[bytes, bytes, dict[bytes, int]]]) -> None:
        """Add records: oid, tid and `_costs`; the last record of an oid is the current one."""
        numbered = enumerate(records)
        while batch := list(itertools.islice(numbered, _BATCH)):
            with self._tables:
                self._tables.executemany(
                    "INSERT OR REPLACE INTO current VALUES (?, ?, ?)",
                    ((oid, tid, number) for number, (oid, tid, _) in batch),
                )
                self._tables.executemany(
                    "INSERT INTO refs VALUES (?, ?, ?)",
                    ((number, oid, cost) for number, (_, _, costs) in batch for oid, cost in costs.items()),
                )

    def tid(self, oid: bytes) -> bytes:
        """Return the tid of the current record of ``oid``."""
        return self._ask("SELECT tid FROM current WHERE oid = ?", oid)[0][0]

    def reach(self) -> None:
        """Find the cheapest way from the root to every object, of equally cheap ways the shortest."""
        with self._tables:
            self._tables.execute("INSERT INTO reached (oid) VALUES (?)", (z64,))
            cost, first = 0, 1
            while True:
                last = self._reach_items(first)
                # No cheaper way to the objects reached so far can follow.
                self._tables.execute(
                    "INSERT OR IGNORE INTO waiting SELECT ? + refs.cost, reached.number, refs.oid, reached.oid"
                    " FROM reached CROSS JOIN current USING (oid) CROSS JOIN refs USING (record)"
                    " WHERE reached.number BETWEEN ? AND ? AND refs.cost > 0"
                    " AND NOT EXISTS (SELECT 1 FROM reached AS before WHERE before.oid = refs.oid)",
                    (cost, first, last),
                )
                (cost,) = self._ask("SELECT min(cost) FROM waiting")[0]
                if cost is None:
                    return
                first = last + 1
                self._tables.execute(
                    "INSERT OR IGNORE INTO reached (oid, holder) SELECT oid, holder FROM waiting"
                    " WHERE cost = ? ORDER BY number",
                    (cost,),
                )
                self._tables.execute("DELETE FROM waiting WHERE cost = ?", (cost,))

    def _reach_items(self, first: int) -> int:
        """Follow steps without cost, breadth first, from number ``first`` on; return the last number reached."""
        last = first - 1
        while True:
            first, last = last + 1, self._ask("SELECT max(number) FROM reached")[0][0]
            if first > last:
                return last
            self._tables.execute(
                "INSERT OR IGNORE INTO reached (oid, holder) SELECT refs.oid, reached.oid"
                " FROM reached CROSS JOIN current USING (oid) CROSS JOIN refs USING (record)"
                " WHERE number BETWEEN ? AND ? AND refs.cost = 0",
                (first, last),
            )

    def chain(self, oid: bytes) -> list[bytes]:
        """Return the oids on the best way from the root to ``oid``, only ``oid`` if there is none; after `reach`."""
        chain = [oid]
        while (found := self._ask("SELECT holder FROM reached WHERE oid = ?", chain[-1])) and found[0][0]:
            chain.append(found[0][0])
        return chain[::-1]

    def chain_without_root(self, oid: bytes) -> list[bytes]:
        """Return the oids on a way to ``oid`` from an object that no other refers to, or else from a distant holder."""
        if not self._has_holders:
            self._tables.execute("CREATE INDEX holders ON refs (oid)")
            self._tables.execute("CREATE INDEX objects ON current (record)")
            self._has_holders = True
        below: dict[bytes, bytes | None] = {oid: None}
        waiting = deque([oid])
        while waiting:
            top = waiting.popleft()
            holders = self._ask(
                "SELECT current.oid FROM refs JOIN current USING (record) WHERE refs.oid = ? LIMIT ?", top, _LOOKED_AT
            )
            if not holders or len(below) >= _LOOKED_AT:
                break
            for (holder,) in holders:
                if holder not in below:
                    below[holder] = top
                    waiting.append(holder)
        chain = [top]
        while (lower := below[chain[-1]]) is not None:
            chain.append(lower)
        return chain

    def _ask(self, statement: str, *values: Any) -> list[tuple]:
        return self._tables.execute(statement, values).fetchall()


class _Steps:
    """A reader of the names by which the records in ``storage`` refer to other objects."""

    def __init__(self, storage: Any, tid: Callable[[bytes], bytes]) -> None:
        self._storage = storage
        self._tid = tid
        self.names = functools.lru_cache(_REMEMBERED)(self._names)

    def _names(self, holder: bytes, oid: bytes) -> tuple[str, ...]:
        """Return the names on the way from ``holder`` to the object ``oid`` in it; none inside a BTree."""
        try:
            found = _search(self._read(holder)[1], oid)
        except Exception:  # an invalid record can raise anything; the rest of the path is still right
            found = None
        if found is None:
            return (oid_repr(oid),)
        if len(found) == 1 and _OF_CONTAINERS.fullmatch(found[0]) and self.class_of(oid).startswith("BTrees."):
            return ()
        return found

    def class_of(self, oid: bytes) -> str:
        """Return the name of the class of ``oid``, "object" if its record cannot be read."""
        try:
            return _text(self._read(oid)[0])
        except Exception:
            return "object"

    def _read(self, oid: bytes) -> tuple[str, Any]:
        # By tid: a FileStorage's `load` could read the file of its name, which a pack may have replaced.
        return _read(self._storage.loadSerial(oid, self._tid(oid)))


class _Reference:
    """A stand-in for a reference to another object in a state; ``oid`` is None unless the reference is ordinary."""

    def __init__(self, pid: Any) -> None:
        oid = pid[0] if isinstance(pid, tuple) else pid
        # Like `referencesf`: lists are weak references, or references to other databases.
        self.oid = oid.encode("latin-1") if isinstance(oid, str) else oid if isinstance(oid, bytes) else None


class _StandIn:
    """A stand-in for an instance of any class in a state; it keeps everything that an unpickler puts into it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        self = super().__new__(cls)
        self.parts_ = [(None, arg) for arg in args] + list(kwargs.items())
        self.length_ = 0
        return self

    parts_: list[tuple[Any, Any]]
    length_: int

    def __setstate__(self, state: Any) -> None:
        self.parts_ += _parts_of_state(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts_.append((key, value))

    def extend(self, values: Collection[Any]) -> None:
        self.parts_ += enumerate(values, self.length_)
        self.length_ += len(values)

    def add(self, value: Any) -> None:
        self.parts_.append((None, value))

    def __str__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(_text(part) for _, part in self.parts_)})"


@functools.lru_cache(_REMEMBERED)
def _stand_in(module: str, name: str) -> type:
    return type(name, (_StandIn,), {"__module__": module})


#: The only real classes: protocol 3 stores their items as a list, whose positions would be meaningless names.
_SETS = {"set": set, "frozenset": frozenset}


class _Reader(pickle.Unpickler):
    """A reader of a record, which consists of two pickles: the class and the state."""

    def find_class(self, module: str, name: str) -> type:
        if module in ("builtins", "__builtin__") and name in _SETS:
            return _SETS[name]
        return _stand_in(module, name)

    def persistent_load(self, pid: Any) -> _Reference:
        return _Reference(pid)


def _read(data: bytes) -> tuple[str, Any]:
    """Return the name of the class and the state in a record."""
    reader = _Reader(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
    meta = reader.load()
    while isinstance(meta, tuple) and meta and not isinstance(meta[0], str):
        meta = meta[0]  # with the arguments of __new__
    if isinstance(meta, type):
        name = f"{meta.__module__}.{meta.__qualname__}"
    else:
        name = ".".join(meta) if isinstance(meta, tuple) else "object"
    return name, reader.load()


def _search(state: Any, oid: bytes) -> tuple[str, ...] | None:
    """Return the names on the best way from ``state`` to a reference to ``oid``; None if there is none."""
    ways = [_keys_on(way) for way, found in _ways(state) if found == oid]
    if not ways:
        return None
    best = min(ways, key=lambda keys: sum(map(_cost, keys)))  # the first of equally cheap ones
    return tuple(map(_text, best))


def _ways(state: Any) -> Iterator[tuple[tuple, bytes]]:
    """Yield each reference in ``state``, the nearest first: the way to it, for `_keys_on`, and its oid."""
    waiting: deque[tuple[Any, Any]] = deque((((), key), part) for key, part in _parts_of_state(state))
    seen: set[int] = set()
    while waiting:
        way, part = waiting.popleft()
        if isinstance(part, _Reference):
            if part.oid is not None:
                yield way, part.oid
        elif id(part) not in seen:
            seen.add(id(part))
            waiting.extend(((way, key), inner) for key, inner in _parts(part))


def _keys_on(way: tuple) -> list[Any]:
    """Return the attributes and keys on a way of `_ways`, without steps that have no name."""
    keys = []
    while way:
        way, key = way
        if key is not None:
            keys.append(key)
    return keys[::-1]


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of ``value``, each with its name, or None if it has none."""
    if isinstance(value, dict):
        yield from value.items()
        yield from ((None, key) for key in value if not isinstance(key, str))
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, set | frozenset):
        yield from ((None, part) for part in value)
    elif isinstance(value, _StandIn):
        yield from value.parts_


def _parts_of_state(state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the named parts of an object's ``state``; its form is guessed, since the class is not loaded."""
    if isinstance(state, dict):
        for name, value in state.items():
            # In a PersistentMapping, PersistentList or UserDict, a path to an item does not name this attribute.
            inner = name in ("data", "_container") and isinstance(value, dict | list)
            yield (None if inner else name), value
    elif isinstance(state, tuple) and state and isinstance(state[0], tuple):
        yield from _parts_of_tree(state)
    elif isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict | None) for part in state):
        for part in state:  # of a class with __slots__
            yield from _parts_of_state(part)
    else:
        yield from _parts(state)


def _parts_of_tree(state: tuple) -> Iterator[tuple[Any, Any]]:
    """Yield the named parts of the ``state`` of a BTree or of one of its buckets.

    A bucket: ((key, value, key, value, ...), next bucket), the latter if there is one. A tree: ((child, key, child,
    ..., child), first bucket). A small tree: ((bucket,),), with the state of the bucket.
    """
    entries, *more = state
    if len(entries) == 1 and not more and isinstance(entries[0], tuple) and entries[0]:
        yield from _parts_of_state(entries[0])
    elif len(entries) % 2:
        yield from ((None, entry) for entry in entries)
    else:
        yield from zip(entries[::2], entries[1::2], strict=True)
    yield from ((None, part) for part in more)


def _text(key: Any) -> str:
    """Return a readable name for ``key``, on one line, quoted if it contains a slash."""
    if isinstance(key, bytes):
        key = key.decode("ascii", "backslashreplace")
    if isinstance(key, tuple):
        key = f"({', '.join(_text(part) for part in key)})"
    text = str(key) if isinstance(key, str | int | float | bool | None | _StandIn) else type(key).__name__
    text = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
    return text if text.isprintable() and "/" not in text and text else repr(text)
