"""The index of the cache against a model of it: a list in the order of use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from zodb_s3blobs.cache.index import LruIndex

LIMIT = 100
NAMES = st.sampled_from([(b"oid", bytes([number])) for number in range(4)])
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.sampled_from([10, 60, 150])),
    st.tuples(st.just("pin"), NAMES),
    st.tuples(st.just("unpin"), st.integers(0, 3)),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("found"), st.lists(st.tuples(NAMES, st.sampled_from([20, 200])), unique_by=lambda one: one[0])),
)


class Model:
    """What the index must say, worked out anew each time from the files in the order of their use."""

    def __init__(self):
        self.sizes = {}  # in the order of use
        self.pins = []  # (name, entry)
        self.gone = set()
        self.complete = False

    def unpinned(self):
        pinned = {name for name, _ in self.pins}
        return [(name, size) for name, size in self.sizes.items() if name not in pinned]

    def counted(self):
        pinned = {name for name, _ in self.pins}
        return sum(size for name, size in self.sizes.items() if size <= LIMIT or name not in pinned)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=300, deadline=None)
def test_it_says_what_a_list_in_the_order_of_use_says(steps):
    index, model = LruIndex(LIMIT), Model()
    for kind, *arguments in steps:
        if kind == "put":
            name, size = arguments
            index.put(name, size)
            if name not in {pinned for pinned, _ in model.pins}:
                model.sizes.pop(name, None)
            model.sizes[name] = size
        elif kind == "pin" and arguments[0] in model.sizes:
            model.pins.append((arguments[0], index.pin(arguments[0])))
        elif kind == "unpin" and arguments[0] < len(model.pins):
            name, entry = model.pins.pop(arguments[0])
            last = name in model.sizes and name not in {pinned for pinned, _ in model.pins}
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
        elif kind == "found" and not model.complete:
            (found,) = arguments
            index.add_found(found)
            earlier = {name: size for name, size in found if name not in model.gone and name not in model.sizes}
            known = {**earlier, **model.sizes}
            large = {name: size for name, size in reversed(known.items()) if size > LIMIT}
            model.sizes = {**large, **known}  # these go first
            model.complete = True
        assert (len(index), index.size) == (len(model.sizes), sum(model.sizes.values()))
        assert all(name in index for name in model.sizes)
        pinned = {name for name, _ in model.pins}
        assert index.pinned_bytes == sum(size for name, size in model.sizes.items() if name in pinned)
        assert index.oldest() == next(iter(model.unpinned()), None)
        over = model.complete and bool(model.unpinned()) and model.counted() > LIMIT
        assert index.is_over_limit() is over
