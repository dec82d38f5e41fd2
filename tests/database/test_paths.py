"""Where in a database an object is: databases of applications that are gone, and of all that holds objects in ZODB."""

import datetime
import io
import os
import pickle
import sys
import tracemalloc
import types
from collections import OrderedDict, defaultdict, deque

import pytest
import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from BTrees.LOBTree import LOBTree
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from persistent.wref import WeakRef
from zc.zlibstorage import ZlibStorage
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import oid_repr, p64

from tests.support.speed import slow
from zodb_s3blobs.database import object_paths as paths


def filestorage(path):
    """One that can be written and has a blob directory."""
    return FileStorage(str(path), blob_dir=f"{path}-blobs")


class Database:
    """A database that a test fills, and that is then looked at as ``zodb-s3blobs verify`` does."""

    def __init__(self, path):
        self._path = str(path)
        self._db = ZODB.DB(filestorage(self._path))
        self.connection = self._db.open()
        self.root = self.connection.root()

    def close(self):
        self.connection.transaction_manager.abort()
        self._db.close()

    def commit(self):
        transaction.commit()

    def pack(self):
        self._db.pack()

    def find(self, *objects, wrapper=lambda storage: storage):
        """The paths of ``objects`` in the database, None for those without."""
        self.commit()
        storage = wrapper(FileStorage(self._path, read_only=True))
        try:
            oids = [one if isinstance(one, bytes) else one._p_oid for one in objects]
            found = paths.find(storage, set(oids))
        finally:
            storage.close()
        assert set(found) <= set(oids)
        return [found.get(oid) for oid in oids]

    def store(self, oid, data):
        """Commit ``data``, whatever it is, as the record of ``oid``."""
        self.commit()
        storage, meta = self._db.storage, TransactionMetaData()
        serial = ZODB.utils.load_current(storage, oid)[1]
        storage.tpc_begin(meta)
        storage.store(oid, serial, data, "", meta)
        storage.tpc_vote(meta)
        storage.tpc_finish(meta)


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "Data.fs")
    yield database
    database.close()


class _Application(types.ModuleType):
    """An application whose code says so when it is run."""

    def __init__(self, ran):
        super().__init__("an_application")

        class Content(Persistent):
            def __init__(self, **attributes):
                self.__dict__.update(attributes)

            def __setstate__(self, state):
                ran.append("Content")
                super().__setstate__(state)

        class Plain:
            def __init__(self, **attributes):
                self.__dict__.update(attributes)

            def __setstate__(self, state):
                ran.append("Plain")
                self.__dict__.update(state)

        class Slots(Persistent):
            __slots__ = ("file", "other")

        class Called:
            def __init__(self, blob):
                self.blob = blob

            def __reduce__(self):
                return call, (self.blob,), {"blob": self.blob}

            def __setstate__(self, state):
                ran.append("Called")

        class Items(dict):
            def __setitem__(self, key, value):
                ran.append("Items")
                super().__setitem__(key, value)

        class Folder(OOBTree):
            max_leaf_size = max_internal_size = 4

        class Name(str):
            pass

        def call(blob):
            ran.append("call")
            return Called(blob)

        for one in (Content, Plain, Slots, Called, Items, Folder, Name, call):
            one.__module__, one.__qualname__ = self.__name__, one.__name__
            setattr(self, one.__name__, one)


@pytest.fixture
def ran():
    """What code of the application has run."""
    return []


@pytest.fixture
def app(monkeypatch, ran):
    """The module of an application; it can be imported."""
    module = _Application(ran)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


# Names


def test_a_path_has_the_names_of_keys_and_attributes_on_the_way_from_the_root(database, app):
    blob = Blob()
    report = app.Content(title="Report", file=app.Content(_blob=blob))
    folder = OOBTree({"report": report, "other": app.Content()})
    database.root["app"] = app.Content(folder=folder)
    found = database.find(blob, report, database.root)
    assert found == ["/app/folder/report/file/_blob", "/app/folder/report", "/"]


def test_of_all_the_ways_to_an_object_it_is_the_shortest_from_the_root(database, app):
    """So the parent of an object is no way to its neighbours."""
    blob, other = Blob(), Blob()
    root = app.Content()
    database.root["app"] = root
    root.far = app.Content(far=app.Content(__parent__=root, blob=blob))
    root.near = app.Content(blob=blob, __parent__=root)
    root.next = app.Content(__parent__=root, sibling=root.near, other=other)
    assert database.find(blob, other) == ["/app/near/blob", "/app/next/other"]


class Plone:
    """A site as Zope has them: folders in BTrees, and indexes of all sorts that refer to the same objects."""

    def __init__(self, database, app):
        self.database, self.app = database, app
        self.blobs = {}
        self.references = app.Content(refs=IOBTree(), ids=OOBTree())
        self.catalog = app.Content(_catalog=app.Content(data=OOBTree()))
        self.site = self.folder(
            portal_catalog=self.catalog,
            _components=app.Content(
                utilities=app.Content(_subscribers=[{"": self.references}]),
                _utility_registrations=PersistentMapping({("IIntIds", ""): (self.references, "", None)}),
            ),
        )
        database.root["Plone"] = self.site

    def folder(self, **attributes):
        return self.app.Content(_tree=OOBTree(), **attributes)

    def add(self, folder, name, content):
        """Put ``content`` into ``folder``, and into every index."""
        content.__dict__.update(__name__=name, __parent__=folder)
        content._p_changed = True
        folder._tree[name] = content
        number = len(self.references.refs)
        self.references.refs[number] = self.app.Content(object=content)
        self.catalog._catalog.data[number] = self.app.Plain(of=content)
        return content

    def add_file(self, folder, name):
        self.blobs[name] = Blob()
        return self.add(folder, name, self.app.Content(file=self.app.Content(_blob=self.blobs[name])))


def test_a_path_leads_through_folders_and_not_through_what_refers_to_everything(database, app):
    plone = Plone(database, app)
    folder = plone.site
    depth = ["a", "b", "c", "d", "e", "f", "g", "h"]
    for name in depth:
        folder = plone.add(folder, name, plone.folder())
    for number in range(200):
        plone.add_file(folder, f"f{number}")
    plone.add_file(plone.site, "top")
    assert database.find(plone.blobs["top"], folder) == ["/Plone/top/file/_blob", "/Plone/" + "/".join(depth)]
    assert database.find(*(plone.blobs[f"f{number}"] for number in range(200))) == [
        f"/Plone/{'/'.join(depth)}/f{number}/file/_blob" for number in range(200)
    ]


def test_what_only_an_index_leads_to_has_the_path_through_it(database, app):
    plone = Plone(database, app)
    plone.add_file(plone.site, "gone")
    del plone.site._tree["gone"]
    (found,) = database.find(plone.blobs["gone"])
    assert found == "/Plone/_components/utilities/_subscribers/0/''/refs/0/object/file/_blob"


@pytest.mark.parametrize(
    "index",
    [
        "_components",
        "_registrations",
        "portal_catalog",
        "uid_catalog",
        "Catalog",
        "catalog",
        "intids",
        "IntIds",
        "five_intids",
        "_private",
        "__annotations__",
    ],
)
def test_an_index_is_used_only_where_no_other_way_leads_there(database, app, index):
    blob, lost = Blob(), Blob()
    database.root["app"] = app.Content(**{index: PersistentMapping(a=blob, b=lost)})
    content = database.root["app"].folder = PersistentMapping()
    for number in range(20):
        content[f"n{number}"] = content = PersistentMapping()
    content["blob"] = blob
    expected = "/app/folder/" + "/".join(f"n{number}" for number in range(20)) + "/blob"
    assert database.find(blob, lost) == [expected, f"/app/{index}/b"]


def test_a_folder_of_an_index_is_better_than_two_indexes(database, app):
    blob = Blob()
    database.root["catalog"] = PersistentMapping(shoes=PersistentMapping(blob=blob))
    database.root["portal_catalog"] = app.Content(intids=blob)
    assert database.find(blob) == ["/catalog/shoes/blob"]


def test_a_number_is_no_name_of_an_item(database, app):
    blob = Blob()
    database.root["folder"] = PersistentMapping(file=PersistentMapping(blob=blob))
    database.root["numbers"] = IOBTree({7: blob})
    assert database.find(blob) == ["/folder/file/blob"]


def test_of_two_names_in_one_object_it_is_that_of_the_item(database, app):
    blob = Blob()
    database.root["app"] = app.Content(_first=blob, __parent__=blob, portal_catalog=[blob], file={"blob": blob})
    assert database.find(blob) == ["/app/file/blob"]


def test_a_parent_is_no_way_to_what_is_above_it(database, app):
    blob = Blob()
    holder = app.Content(blob=blob)
    database.root["near"] = app.Content(__parent__=holder)
    database.root["far"] = app.Content(a=app.Content(b=app.Content(c=holder)))
    assert database.find(blob) == ["/far/a/b/c/blob"]


@pytest.mark.parametrize("size", [1, 20, 40, 5000])
@pytest.mark.parametrize(("kind", "key"), [(OOBTree, "n{:05}".format), (IOBTree, int), (LOBTree, int)])
def test_a_btree_of_any_size_gives_the_key_and_nothing_else(database, app, kind, key, size):
    tree = kind({key(number): app.Content() for number in range(size)})
    database.root["tree"] = tree
    numbers = sorted({0, size // 2, size - 1})
    blobs = [Blob() for _ in numbers]
    for number, blob in zip(numbers, blobs, strict=True):
        tree[key(number)].blob = blob
    assert database.find(*blobs) == [f"/tree/{key(number)}/blob" for number in numbers]


def test_a_btree_that_holds_blobs_itself_or_in_plain_values_or_is_of_a_class_of_the_application(database, app):
    blobs = [Blob() for _ in range(3)]
    database.root["direct"] = OOBTree({(1, "one"): blobs[0]})
    database.root["plain"] = OOBTree({"key": {"files": [0, blobs[1]]}})
    database.root["own"] = app.Folder({number: blobs[2] if number == 50 else None for number in range(99)})
    assert database.find(*blobs) == ["/direct/(1, one)", "/plain/key/files/1", "/own/50"]


def test_a_btree_of_many_levels_gives_the_key_and_nothing_else(database, app):
    database.root["tree"] = tree = app.Folder({number: app.Content() for number in range(99)})
    blobs = [Blob() for _ in tree]
    for content, blob in zip(tree.values(), blobs, strict=True):
        content.blob = blob
    assert database.find(*blobs) == [f"/tree/{number}/blob" for number in range(99)]


def test_persistent_mappings_and_lists_give_keys_and_positions(database, app):
    blobs = [Blob() for _ in range(4)]
    database.root["mapping"] = PersistentMapping(a=PersistentMapping(b=blobs[0]))
    database.root["list"] = PersistentList([None, PersistentList([blobs[1]])])
    database.root["old"] = app.Content(_container={"key": blobs[2]})
    database.root["folder"] = app.Content(data=OOBTree({"key": blobs[3]}))
    assert database.find(*blobs) == ["/mapping/a/b", "/list/1/0", "/old/key", "/folder/data/key"]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda app, blob: {"a": {"b": [(0, blob)]}}, "a/b/0/1"),
        (lambda app, blob: app.Plain(field=app.Plain(blob=blob)), "field/blob"),
        (lambda app, blob: app.Items(key=blob), "key"),
        (lambda app, blob: OrderedDict(key=blob), "key"),
        (lambda app, blob: defaultdict(list, key=[blob]), "key/0"),
        (lambda app, blob: deque(["x", blob]), "1"),
        (lambda app, blob: deque([*range(2500), blob]), "2500"),
        (lambda app, blob: {blob}, ""),
        (lambda app, blob: frozenset([blob]), ""),
        (lambda app, blob: {(1, blob): None}, "1"),
        (lambda app, blob: app.Called(blob), "blob"),
    ],
    ids=["builtins", "plain", "dict", "ordered", "default", "deque", "long", "set", "frozenset", "key", "reduce"],
)
def test_what_is_in_the_same_record_is_on_the_way_too(database, app, make, path):
    blob = Blob()
    database.root["app"] = app.Content(value=make(app, blob))
    (found,) = database.find(blob)
    if path == "blob":  # it is the argument of the call and in the state: both are true
        assert found in ("/app/value/blob", "/app/value")
    else:
        assert found == "/app/value" + f"/{path}" * bool(path)


def test_a_reference_that_is_found_nowhere_in_the_state_has_no_name(database):
    """It may be among the arguments that an object is made with, while the state goes round in circles."""
    blob = Blob()
    database.root["made"], database.root["blob"] = made, _ = PersistentMapping(), blob
    database.commit()
    del database.root["blob"]
    circle = []
    circle.append(circle)
    database.store(made._p_oid, record((("any", "Class"), (Reference(blob),)), {"circle": circle}))
    assert database.find(blob) == [f"/made/{oid_repr(blob._p_oid)}"]


def test_slots_are_attributes(database, app):
    blobs = Blob(), Blob()
    database.root["slots"] = slots = app.Slots()
    slots.file, slots.other = blobs
    assert database.find(*blobs) == ["/slots/file", "/slots/other"]


def test_a_state_that_is_no_dictionary(database):
    blob = Blob()
    database.root["tuple"] = value = Persistent()
    database.root["blob"] = blob
    database.commit()
    del database.root["blob"]
    state = ((Reference(blob), "a", "b"), "c"), "d"
    database.store(value._p_oid, record(("any", "Class"), state))
    (found,) = database.find(blob)
    assert found is not None and found.startswith("/tuple")


def test_what_holds_itself_is_looked_at_once(database, app):
    blob, lost = Blob(), Blob()
    around = [{}]
    around[0]["again"] = around
    around.append(app.Plain(me=around, blob=blob))
    database.root["app"] = app.Content(around=around)
    database.root["app"].self = database.root["app"]
    database.root["lost"] = lost
    assert database.find(blob, lost) == ["/app/around/1/blob", "/lost"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("with space", "with space"),
        ("höhe", "höhe"),
        ("a/b", "'a/b'"),
        ("two\nlines\x1b[0m", r"'two\nlines\x1b[0m'"),
        ("\udc80", r"'\udc80'"),
        ("", "''"),
        ("x" * 1000, "x" * 100 + "..."),
        (b"bytes", "bytes"),
        (b"\xff", r"\xff"),
        (-1, "-1"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ((1, ("a", "b")), "(1, (a, b))"),
    ],
)
def test_any_key_is_a_name_on_one_line(database, key, name):
    database.root["app"] = PersistentMapping({key: (blob := Blob())})
    if key is None:
        assert database.find(blob)[0] in ("/app", "/app/None")
    else:
        assert database.find(blob) == [f"/app/{name}"]


def test_a_key_of_a_class_is_named_by_the_class_and_what_it_is_made_of(database, app):
    blobs = Blob(), Blob()
    database.root["app"] = PersistentMapping({app.Name("text"): blobs[0], datetime.date(2026, 1, 2): blobs[1]})
    one, two = database.find(*blobs)
    assert one.startswith("/app/") and "text" in one and "Name" in one
    assert two.startswith("/app/") and "date" in two


def test_many_objects_of_a_deep_database(database, app):
    blobs = []
    for number in range(30):
        content = database.root
        for depth in range(30):
            content[f"{number}-{depth}"] = content = PersistentMapping()
        content["blob"] = Blob()
        blobs.append(content["blob"])
    expected = ["/" + "/".join(f"{number}-{depth}" for depth in range(30)) + "/blob" for number in range(30)]
    assert database.find(*blobs) == expected


def test_a_chain_deeper_than_python_recurses(database):
    content = database.root
    for _ in range(3000):
        content["n"] = content = PersistentMapping()
    content["blob"] = blob = Blob()
    sys.setrecursionlimit(20_000)  # for the commit
    try:
        database.commit()
    finally:
        sys.setrecursionlimit(1000)
    assert database.find(blob) == ["/n" * 3000 + "/blob"]


# What counts


def test_only_what_is_there_now_counts(database, app):
    blob, gone = Blob(), Blob()
    database.root["first"] = app.Content(blob=blob)
    database.root["gone"] = app.Content(blob=gone)
    database.commit()
    database.root["app"] = app.Content(later=database.root.pop("first"))
    database.root["gone"].blob = None
    assert database.find(blob, gone) == ["/app/later/blob", None]


def test_an_undone_object_leads_nowhere(database, app):
    blob = Blob()
    database.root["first"] = app.Content(blob=blob)
    database.commit()
    database._db.undo(database._db.undoLog(0, 1)[0]["id"])
    assert database.find(blob) == [None]


def test_what_the_root_does_not_lead_to_has_a_path_from_the_top_of_what_does(database, app):
    blob = Blob()
    database.root["app"] = folder = app.Content(tree=OOBTree({"file": app.Content(_blob=blob)}))
    database.commit()
    del database.root["app"]
    top = f"[an_application.Content {oid_repr(folder._p_oid)}]"
    assert database.find(blob, folder) == [f"{top}/tree/file/_blob", None]


def test_of_several_tops_it_is_the_nearest(database, app):
    blob = Blob()
    database.root["app"] = app.Content(far=app.Content(blob=blob), near=app.Content(near=blob))
    database.commit()
    near = database.root["app"].near
    database.root["app"].near = None
    database.commit()
    del database.root["app"]
    assert database.find(blob) == [f"[an_application.Content {oid_repr(near._p_oid)}]/near"]


def test_without_a_top_it_is_some_object_that_leads_to_it(database, app):
    blob = Blob()
    database.root["app"] = one = app.Content(two=app.Content(blob=blob))
    one.two.one = one
    database.commit()
    del database.root["app"]
    (found,) = database.find(blob)
    assert found.startswith("[an_application.Content 0x") and found.endswith("]/two/blob")


def test_weak_references_and_those_to_other_databases_are_no_way(tmp_path):
    databases = {}
    one = ZODB.DB(filestorage(tmp_path / "one.fs"), databases=databases, database_name="one")
    two = ZODB.DB(filestorage(tmp_path / "two.fs"), databases=databases, database_name="two")
    connection = one.open()
    root, other = connection.root(), connection.get_connection("two").root()
    # Objects with the same oid in the two databases: the reference to one must not be taken for one to the other.
    root["own"], other["foreign"] = PersistentMapping(), PersistentMapping()
    blob = root["own"]["blob"] = Blob()
    foreign = other["foreign"]["blob"] = Blob()
    transaction.commit()
    assert foreign._p_oid == blob._p_oid
    root["a"] = foreign
    root["b"] = WeakRef(blob)
    transaction.commit()
    oid = blob._p_oid
    connection.close()
    one.close()
    two.close()
    storage = FileStorage(str(tmp_path / "one.fs"), read_only=True)
    assert paths.find(storage, [oid]) == {oid: "/own/blob"}
    storage.close()


def test_the_oldest_kind_of_weak_references_gives_no_name(database):
    blob = Blob()
    database.root["both"], database.root["blob"] = both, _ = PersistentMapping(), blob
    database.commit()
    del database.root["blob"]
    database.store(both._p_oid, record(("any", "Class"), {"weak": WeakReference(blob), "strong": Reference(blob)}))
    assert database.find(blob) == ["/both/strong"]


def test_an_oid_that_the_database_does_not_have_is_left_out(database):
    database.root["blob"] = blob = Blob()
    assert database.find(p64(12345), blob) == [None, "/blob"]


def test_a_database_without_a_root(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    assert paths.find(storage, [p64(1)]) == {}
    storage.close()


# What makes no sense


class Reference:
    """To be pickled as a reference to ``object``."""

    def __init__(self, object):
        self.oid = object._p_oid
        self.pid = self.oid, None


class WeakReference(Reference):
    """The same as it was done long ago."""

    def __init__(self, object):
        self.pid = [object._p_oid]


class Pickler(pickle.Pickler):
    def persistent_id(self, one):
        return one.pid if isinstance(one, Reference) else None


def record(*parts):
    """The record that consists of ``parts``."""
    file = io.BytesIO()
    pickler = Pickler(file, 3)
    for part in parts:
        pickler.dump(part)
    return file.getvalue()


#: Refers to the object whose oid is to be put in, then is no pickle any more but for `noload`, which makes nothing:
#: no such extension; a call of what cannot be called.
_MAKES_NO_SENSE = [b"\x82\xf3", b"K\x01)R"]


@pytest.mark.parametrize("end", _MAKES_NO_SENSE)
def test_an_object_whose_holder_cannot_be_read_is_named_by_its_oid(database, app, end):
    blob = Blob()
    database.root["app"] = holder = app.Content(inner=app.Content(blob=blob))
    database.commit()
    inner = holder.inner
    broken = record(("any", "Class")) + b"\x80\x03}(U\x05inner(U\x08" + inner._p_oid + b"NtQU\x01x" + end + b"u."
    database.store(holder._p_oid, broken)
    (found,) = database.find(blob)
    assert found == f"/app/{oid_repr(inner._p_oid)}/blob"


@pytest.mark.parametrize("data", [b"no pickle", record(("any", "Class")), record("x")[:-3], b"\x80\x03)."])
def test_a_record_that_makes_no_sense_keeps_nobody_from_the_others(database, app, data):
    blob, lost = Blob(), Blob()
    database.root["app"] = app.Content(blob=blob)
    database.root["lost"] = broken = app.Content(blob=lost)
    database.commit()
    database.store(broken._p_oid, data)
    assert database.find(blob, lost, broken) == ["/app/blob", None, "/lost"]


@pytest.mark.parametrize("top", [b"no pickle", None])
def test_a_top_of_which_the_class_is_unknown(database, app, top):
    blob = Blob()
    database.root["app"] = holder = app.Content(blob=blob)
    database.commit()
    oid = holder._p_oid
    del database.root["app"]
    meta = b"\x80\x03\x82\xf3." if top else record(None)
    database.store(oid, meta + b"\x80\x03}U\x04blob(U\x08" + blob._p_oid + b"NtQs.")
    (found,) = database.find(blob)
    assert found == f"[object {oid_repr(oid)}]/" + (oid_repr(blob._p_oid) if top else "blob")


# The application


def test_no_code_of_the_application_is_imported_or_runs(database, app, ran, monkeypatch):
    blobs = [Blob() for _ in range(5)]
    database.root["app"] = app.Content(
        plain=app.Plain(blob=blobs[0]), call=app.Called(blobs[1]), items=app.Items(key=blobs[2])
    )
    database.root["tree"] = app.Folder({"key": app.Content(blob=blobs[3])})
    database.root["slots"] = app.Slots()
    database.root["slots"].file = blobs[4]
    database.commit()
    assert pickle.loads(pickle.dumps(app.Plain(x=1))) and ran  # it would be noticed
    ran.clear()
    for importable in True, False:
        if not importable:
            monkeypatch.delitem(sys.modules, app.__name__)
        found = database.find(*blobs)
        assert found[0] == "/app/plain/blob" and found[1].startswith("/app/call")
        assert found[2:] == ["/app/items/key", "/tree/key/blob", "/slots/file"]
    assert ran == []


def test_what_a_record_calls_is_not_called(database, app, tmp_path):
    """As whoever can write to the database might have it do with a function that there is everywhere."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    blob = Blob()
    database.root["app"] = holder = PersistentMapping(blob=blob)
    database.commit()
    database.store(holder._p_oid, record(Evil(), {"evil": Evil(), "blob": Reference(blob)}))
    assert database.find(blob) == ["/app/blob"]
    assert not (tmp_path / "was here").exists()


# The storage


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_wrapper_whose_records_come_out_decoded(tmp_path, wrapped):
    path = str(tmp_path / "Data.fs")
    db = ZODB.DB(ZlibStorage(filestorage(path)))
    with db.transaction() as connection:
        connection.root()["text" * 100] = PersistentMapping({"text" * 100: Blob()})
    with db.transaction() as connection:
        oid = connection.root()["text" * 100]["text" * 100]._p_oid
    db.close()
    storage = FileStorage(path, read_only=True)
    wrapper = ZlibStorage(storage) if wrapped else storage
    expected = {oid: "/" + "text" * 25 + ".../" + "text" * 25 + "..."}
    assert paths.find(wrapper, [oid]) == (expected if wrapped else {})
    wrapper.close()


def test_a_database_that_is_packed_and_written_to_meanwhile(database, app):
    """As by a server, while a command has it open: it is looked at as it was then."""
    blob = Blob()
    database.root["app"] = app.Content(padding="x" * 100_000)
    database.commit()
    database.root["app"].padding = ""
    database.root["folder"] = app.Content(blob=blob)

    def meanwhile(storage):
        database.root["folder"].later = blob
        database.root["folder"].blob = None
        database.root["later"] = app.Content(blob=blob)
        database.commit()
        database.root["a"] = "x"
        return storage

    def packed(storage):
        database.pack()
        return storage

    assert database.find(blob, wrapper=packed) == ["/folder/blob"]
    assert database.find(blob, wrapper=meanwhile) == ["/folder/blob"]


def test_a_packed_database(database, app):
    blob = Blob()
    for number in range(5):
        database.root["app"] = app.Content(**{f"blob-{number}": blob})
        database.commit()
    database.pack()
    assert database.find(blob) == ["/app/blob-4"]


def test_other_storages_that_can_be_iterated():
    storage = DemoStorage(base=MappingStorage())
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root()["blob"] = PersistentMapping()
    with db.transaction() as connection:
        oid = connection.root()["blob"]._p_oid
    assert paths.find(storage, [oid]) == {oid: "/blob"}
    db.close()


class Counting:
    """A storage that counts how often it is asked."""

    def __init__(self, storage):
        self._storage = storage
        self.asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self._storage, name)


def test_nothing_is_read_when_nothing_is_asked():
    storage = Counting(None)
    assert paths.find(storage, set()) == {}
    assert storage.asked == []


def test_the_database_is_read_from_end_to_end_once_and_then_only_what_is_on_the_way(database, app):
    blobs = [Blob() for _ in range(100)]
    database.root["app"] = app.Content(**{f"c{number}": app.Content(blob=blob) for number, blob in enumerate(blobs)})
    database.root["other"] = OOBTree({number: app.Content() for number in range(100)})
    counting = []

    def wrapper(storage):
        counting.append(Counting(storage))
        return counting[0]

    assert database.find(*blobs, wrapper=wrapper) == [f"/app/c{number}/blob" for number in range(100)]
    asked = counting[0].asked
    assert asked.count("iterator") == 1
    assert asked.count("loadSerial") == 201  # the root once, and for each blob what has a part in no other path


@slow
def test_memory_does_not_grow_with_the_database():
    """The records come one after the other; what is kept of them is in a file."""
    count = 20_000
    some = types.SimpleNamespace()

    class Record:
        tid = p64(1)

        def __init__(self, number):
            self.oid = p64(number)
            state = {}
            for target in number + 1, number * 2 + 1, count - number:
                some._p_oid = p64(target)
                state[f"n{target}"] = Reference(some)
            self.data = record(("any", "Class"), state)

    class Generated:
        def lastTransaction(self):
            return p64(1)

        def iterator(self, start, stop):
            yield from ([Record(number)] for number in range(count + 1))

        def loadSerial(self, oid, tid):
            return Record(int.from_bytes(oid, "big")).data

    tracemalloc.start()
    try:
        found = paths.find(Generated(), [p64(count + 1)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == {p64(count + 1): f"/n{count}/n{count + 1}"}
    assert peak < 3 << 20
