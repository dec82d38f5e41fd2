"""The index of the cache against a model of it: a list in the order of use."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.utils import p64

from zodb_s3blobs.cache import index as index_module
from zodb_s3blobs.cache.index import FoundFiles, LruIndex
from zodb_s3blobs.revision import Revision

LIMIT, BLOCK = 100, 10
NAMES = st.sampled_from([Revision(p64(number), p64(1)) for number in range(4)])
SIZES = st.sampled_from([0, 9, 10, 60, 91, 150])
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, SIZES),
    st.tuples(st.just("pin"), NAMES),
    st.tuples(st.just("unpin"), st.integers(0, 3)),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("record"), NAMES, st.integers(0, 2**40)),
    st.tuples(st.just("found"), st.lists(st.tuples(NAMES, st.one_of(st.just(-1), SIZES)))),
)


def on_disk(size):
    """The bytes that a file takes in whole blocks."""
    return max(BLOCK, (size + BLOCK - 1) // BLOCK * BLOCK)


class Model:
    """What the index must say, worked out anew each time from the files in the order of their use."""

    def __init__(self):
        self.sizes = {}  # in the order of use
        self.used = {}  # time of the last use
        self.records = {}
        self.proven = set()
        self.pins = []  # (name, entry)
        self.gone = set()
        self.complete = False

    def pinned(self):
        return {name for name, _ in self.pins}

    def unpinned(self):
        return [name for name in self.sizes if name not in self.pinned()]

    def counted(self):
        sizes = {name: on_disk(size) for name, size in self.sizes.items()}
        return sum(size for name, size in sizes.items() if size <= LIMIT or name not in self.pinned())

    def state(self, name):
        return self.sizes[name], self.used[name], self.records[name], name in self.proven


@pytest.fixture(params=[1, 2, 3, 43_690], scope="module", autouse=True)
def capacity(request):
    """The most files of one part of the order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_CAPACITY", request.param)
        yield


@given(st.lists(STEPS, max_size=40))
@settings(max_examples=200, deadline=None)
def test_it_says_what_a_list_in_the_order_of_use_says(steps):
    index, model = LruIndex(LIMIT, BLOCK), Model()
    for now, (kind, *arguments) in enumerate(steps, 1):
        if kind == "put":
            name, size = arguments
            index.put(name, size, now)
            if name not in model.pinned():
                model.sizes.pop(name, None)
            model.sizes[name], model.used[name], model.records[name] = size, now, 0
            model.proven.add(name)
        elif kind == "pin" and arguments[0] in model.sizes:
            model.pins.append((arguments[0], index.pin(arguments[0], now)))
            model.used[arguments[0]] = now
        elif kind == "unpin" and arguments[0] < len(model.pins):
            name, entry = model.pins.pop(arguments[0])
            last = name in model.sizes and name not in model.pinned()
            assert index.unpin(name, entry) is last
            if last:
                model.sizes[name] = model.sizes.pop(name)
        elif kind == "remove":
            (name,) = arguments
            index.remove(name)
            model.gone.add(name)
            model.sizes.pop(name, None)
            while name in dict(model.pins):  # whoever has it open goes on with it
                model.pins.remove(next(pin for pin in model.pins if pin[0] == name))
        elif kind == "record" and arguments[0] in model.sizes:
            name, record = arguments
            index.set_record(name, model.records[name] + 1, 77)  # it has another one
            index.set_record(name, model.records[name], record)
            model.records[name] = record
        elif kind == "found" and not model.complete:
            (found,) = arguments
            files = FoundFiles(BLOCK, LIMIT, len(found))
            records = [(number, b"".join(name), size, 1000 + number) for number, (name, size) in enumerate(found, 1)]
            files.add(records[:2])
            files.add(records[2:])
            index.add_found(files)
            earlier = {}
            for number, (name, size) in enumerate(found, 1):
                earlier.pop(name, None)
                if size >= 0 and on_disk(size) <= LIMIT:  # the limit was larger once: they are not known any more
                    earlier[name] = size, number
            for name in model.gone | set(model.sizes):
                earlier.pop(name, None)
            for name, (_, number) in earlier.items():
                model.used[name], model.records[name] = 1000 + number, number
                model.proven.discard(name)
            model.sizes = {name: size for name, (size, _) in earlier.items()} | model.sizes
            model.complete = True
        assert (len(index), index.size) == (len(model.sizes), sum(map(on_disk, model.sizes.values())))
        for name in model.sizes:
            entry = index.get(name)
            assert (entry.size, entry.used, entry.record, entry.is_proven) == model.state(name)
        assert not any(name in index for name in model.gone - set(model.sizes))
        pinned = model.pinned()
        assert set(index.pinned()) == pinned & set(model.sizes)
        assert index.pinned_bytes == sum(on_disk(size) for name, size in model.sizes.items() if name in pinned)
        in_order = [index_module.unpacked(*item)[0] for part in index.parts() for item in part.items()]
        assert in_order == model.unpinned()
        oldest = index.oldest()
        assert (oldest and oldest[0]) == next(iter(model.unpinned()), None)
        assert oldest is None or (oldest[1].size, oldest[1].used) == model.state(oldest[0])[:2]
        over = model.complete and bool(model.unpinned()) and model.counted() > LIMIT
        assert index.is_over_limit() is over


def test_the_order_of_thousands_takes_no_more_parts_than_it_needs(monkeypatch):
    monkeypatch.setattr(index_module, "_CAPACITY", 10)
    index = LruIndex(LIMIT, BLOCK)
    names = [Revision(p64(number), p64(1)) for number in range(1000)]
    hot, cold = names[:8], iter(names[8:])
    for name in hot:
        index.put(name, 1, 1)
    for turn, name in zip(range(4000), itertools.cycle(hot), strict=False):
        index.unpin(name, index.pin(name, turn))
        if turn % 9 == 0 and turn < 900 * 9:
            index.put(next(cold), 1, turn)
    assert len(index.parts()) < 4 * len(index) / 10
