"""Where in a database an object is, as a path from the root object that a person can follow.

Records are read without the application: no class of theirs is imported or made, and none of their code runs.
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

#: The most names of steps to keep, since the ways to the blobs have much in common.
_REMEMBERED = 10_000

#: How many objects to look at, at most, for the top of what the root does not lead to.
_LOOKED_AT = 10_000

_LONGEST_NAME = 100

#: What a step to an object costs. A way costs as much as its steps, and of those that cost the same the shortest is
#: taken. One through an index is taken where no other leads to the object, however long the others are.
_AN_ITEM = 0
_BY_THE_WAY = 1  # by an attribute that is the object's own business, a number, or one that cannot be told
_AN_INDEX = 1_000_000

#: Names of what refers to objects that are elsewhere: Zope's component registries, catalogs, and the way back up.
_INDEXES = re.compile(
    r"_components|(.*_)?registrations|(.*_)?intids?|.*catalog|__parent__|aq_parent",
    re.IGNORECASE,
)

#: Names of the attributes in which containers keep their items; they are no part of a path that a person follows.
_OF_CONTAINERS = re.compile(r"_tree|_container|_data|_SampleContainer__data|_BTreeContainer__data")


def find(storage: Any, oids: Collection[bytes]) -> dict[bytes, str]:
    """oid -> its path from the root object, such as ``/app/folder/file/_blob``, for each of the ``oids`` that has one.

    The names are attributes and the keys of mappings and BTrees; what has no name, as an object whose holder cannot be
    read, is there with its oid. What the root does not lead to has a path from the topmost object that leads to it:
    ``[app.models.Folder 0x2a]/file/_blob``, and none if nothing leads to it. Only current revisions count.

    Of several ways to an object, that through the items of containers is taken, and not one through a catalog or
    another index (`_cost`); then the shortest.

    The database is read once, from one end to the other, if there are any ``oids``; what that brings is in a temporary
    file. Takes as long as that. Errors are the storage's own, but not for a record that makes no sense.
    """
    if not oids:
        return {}
    with closing(_Graph()) as graph:
        with (
            showing("Reading the database for paths", "transactions") as progress,
            # Not what has been committed since it was opened: it could not load that.
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
    """The oids of what the record ``data`` refers to; none if there is no object any more, or it makes no sense."""
    try:
        return referencesf(data) if data else []
    except Exception:
        return []


def _costs(data: bytes | None) -> dict[bytes, int]:
    """The oids of what the record ``data`` refers to, and what the steps there cost."""
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
    """What it costs to go by an attribute or item of that name."""
    if key is None or isinstance(key, bytes):
        return _AN_ITEM
    if not isinstance(key, str):
        return _BY_THE_WAY
    if _INDEXES.fullmatch(key):
        return _AN_INDEX
    return _BY_THE_WAY if key.startswith("_") and not _OF_CONTAINERS.fullmatch(key) else _AN_ITEM


class _Graph:
    """Which object refers to which, in a temporary file. Belongs to one thread, until `close`."""

    def __init__(self) -> None:
        # Each record has a number, which says which one of an object is the last; older ones are just not asked for.
        # So nothing of it is written but at the end of a table, and nothing is deleted.
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
        """Delete it."""
        self._tables.close()

    def add(self, records: Iterable[tuple[bytes, bytes, dict[bytes, int]]]) -> None:
        """The records of the database: oid, tid and `_costs`; of those of one oid the last holds."""
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
        """When ``oid`` got its current record."""
        return self._ask("SELECT tid FROM current WHERE oid = ?", oid)[0][0]

    def reach(self) -> None:
        """Go everywhere from the root: to what costs least first, and of that to the nearest."""
        with self._tables:
            self._tables.execute("INSERT INTO reached (oid) VALUES (?)", (z64,))
            cost, first = 0, 1
            while True:
                last = self._reach_items(first)
                # What is reached by now is not reached cheaper any more.
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
        """Go on, breadth first, from what was reached as number ``first`` and later; return the last number."""
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
        """After `reach`: the oids on the best way from the root to ``oid``; just this one if there is no way."""
        chain = [oid]
        while (found := self._ask("SELECT holder FROM reached WHERE oid = ?", chain[-1])) and found[0][0]:
            chain.append(found[0][0])
        return chain[::-1]

    def chain_without_root(self, oid: bytes) -> list[bytes]:
        """The same from an object that nothing refers to, or else from one that is far up."""
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
    """Looks into the records of ``storage`` for the names of what they refer to."""

    def __init__(self, storage: Any, tid: Callable[[bytes], bytes]) -> None:
        self._storage = storage
        self._tid = tid
        self.names = functools.lru_cache(_REMEMBERED)(self._names)

    def _names(self, holder: bytes, oid: bytes) -> tuple[str, ...]:
        """The names on the way from the object ``holder`` to ``oid``, which it refers to; none inside a BTree."""
        try:
            found = _search(self._read(holder)[1], oid)
        except Exception:  # whatever is wrong with it, and it may be anything: the rest of the path is right
            found = None
        if found is None:
            return (oid_repr(oid),)
        if len(found) == 1 and _OF_CONTAINERS.fullmatch(found[0]) and self.class_of(oid).startswith("BTrees."):
            return ()
        return found

    def class_of(self, oid: bytes) -> str:
        """The name of the class of ``oid``."""
        try:
            return _text(self._read(oid)[0])
        except Exception:
            return "object"

    def _read(self, oid: bytes) -> tuple[str, Any]:
        # By its tid, since a FileStorage takes the rest from the file of that name, which a pack may have replaced.
        return _read(self._storage.loadSerial(oid, self._tid(oid)))


class _Reference:
    """What stands for another object of the database in a state; ``oid`` is None if it is not an ordinary one."""

    def __init__(self, pid: Any) -> None:
        oid = pid[0] if isinstance(pid, tuple) else pid
        # As `referencesf` has it: lists are weak references, and those to other databases.
        self.oid = oid.encode("latin-1") if isinstance(oid, str) else oid if isinstance(oid, bytes) else None


class _StandIn:
    """What stands for an instance of any class in a state. It takes what an unpickler may do to one, and keeps it."""

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


#: The only classes that are what they are: by protocol 3 their items come as a list, whose positions would say nothing.
_SETS = {"set": set, "frozenset": frozenset}


class _Reader(pickle.Unpickler):
    """Reads a record: twice, its class and its state."""

    def find_class(self, module: str, name: str) -> type:
        if module in ("builtins", "__builtin__") and name in _SETS:
            return _SETS[name]
        return _stand_in(module, name)

    def persistent_load(self, pid: Any) -> _Reference:
        return _Reference(pid)


def _read(data: bytes) -> tuple[str, Any]:
    """The name of the class and the state of a record."""
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
    """The names on the best way from ``state`` to a reference to ``oid``; None if there is none."""
    ways = [_keys_on(way) for way, found in _ways(state) if found == oid]
    if not ways:
        return None
    best = min(ways, key=lambda keys: sum(map(_cost, keys)))  # the first of those that cost the same
    return tuple(map(_text, best))


def _ways(state: Any) -> Iterator[tuple[tuple, bytes]]:
    """Each reference in ``state``, the nearest first: the way to it, for `_keys_on`, and its oid."""
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
    """The attributes and keys on a way of `_ways`, without what has no name."""
    keys = []
    while way:
        way, key = way
        if key is not None:
            keys.append(key)
    return keys[::-1]


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What is in ``value``, each with its name, or None if it has none."""
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
    """The same of what an object gave for its state; its class does not tell how to read it, as nobody knows it."""
    if isinstance(state, dict):
        for name, value in state.items():
            # Of a PersistentMapping or PersistentList, or of a UserDict: nobody names it on the way to an item.
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
    """Of a BTree or one of its buckets.

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
    """A name for a person, on one line, in which a slash is none between two names."""
    if isinstance(key, bytes):
        key = key.decode("ascii", "backslashreplace")
    if isinstance(key, tuple):
        key = f"({', '.join(_text(part) for part in key)})"
    text = str(key) if isinstance(key, str | int | float | bool | None | _StandIn) else type(key).__name__
    text = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
    return text if text.isprintable() and "/" not in text and text else repr(text)
