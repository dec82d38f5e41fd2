"""The published suites of ZODB and ZEO, with every tid forced through reservations; see `reservations`."""

import pytest
import transaction
import ZODB
import ZODB.blob
from ZEO import _forker
from ZEO.ClientStorage import ClientStorage
from ZODB.tests import testblob
from ZODB.utils import newTid

from tests.suites import test_zeo_suite as zeo
from tests.suites import test_zodb_suite as zodb
from tests.suites.published import file_permissions_hold, parametrize, run, s3_server, section  # noqa: F401
from tests.suites.reservations import VARIANTS, begun, late, overtaken, passing, reserved  # noqa: F401
from tests.suites.test_zeo_suite import everything_deferred  # noqa: F401
from tests.support.counts import nonzero
from tests.support.speed import slow

#: They expect that a tid is later than the clock was before the commit, and that a commit leaves more than a tick after
#: the one before. Below a reservation that is outstanding neither holds.
_BY_THE_CLOCK = (
    "testLoadBefore",
    "testPackUnlinkedFromRoot",
    "testTransactionalUndoAfterPack",
    "testTransactionalUndoAfterPackWithObjectUnlinkFromRoot",
    "checkPackUndoLog",
    "test_checkPackUndoLog",
)


def _variant(suite, variant):
    """The test case ``suite`` under one of the variants."""
    name = f"{suite.__name__}{variant.title()}{'ThroughZEO' if suite.__module__ == zeo.__name__ else ''}"
    left_out = dict.fromkeys(_BY_THE_CLOCK if variant == "passing" else ())
    case = type(name, (suite,), {"__module__": __name__, "long_tests": False, **left_out})
    return slow(pytest.mark.usefixtures(variant)(case))


for suite, variants in {
    zeo.TestFileStorage: ["overtaken", "late", "passing"],
    zeo.TestMappingStorage: ["passing"],
    zeo.TestDemoStorage: ["overtaken"],
    zeo.TestClientConflictResolution: ["overtaken", "late"],
    zeo.TestFileStorageRecovery: ["passing"],
    zodb.TestFileStorage: ["begun"],
    zodb.TestMappingStorage: ["begun"],
    zodb.TestDemoStorage: ["begun"],
}.items():
    for variant in variants:
        case = _variant(suite, variant)
        globals()[case.__name__] = case
del suite, variant, variants, case


@pytest.mark.parametrize("variant", VARIANTS)
@parametrize(file=testblob.storage_reusable_suite("S3", zeo.ServedStorage))
def test_blobs_through_zeo(request, variant, case):
    request.getfixturevalue(variant)
    run(case)


@parametrize(zlib_outside=testblob.storage_reusable_suite("S3", zeo.ServedThroughZlib))
@pytest.mark.usefixtures("overtaken")
def test_blobs_through_zeo_and_zlib(case):
    run(case)


@parametrize(
    file=zodb.blob_suite(zodb.file_storage),
    mapping=zodb.blob_suite(zodb.mapping_storage, undo=False, recovery=False),
    demo=zodb.blob_suite(zodb.demo_storage, undo=False, recovery=False),
    zlib_inside=zodb.blob_suite(zodb.zlib_inside),
)
@pytest.mark.usefixtures("begun")
def test_blobs(case):
    run(case)


@slow
@pytest.mark.parametrize(
    ("variant", "reservations", "copies", "waits"),
    [
        ("reserved", 8, False, {}),
        ("overtaken", 16, True, {}),
        ("late", 24, True, {"overtaken": 6}),
        ("passing", None, False, {}),
    ],
)
def test_each_variant_does_what_it_says(request, monkeypatch, tmp_path, variant, reservations, copies, waits):
    request.getfixturevalue(variant)
    monkeypatch.chdir(tmp_path)
    # In a thread of this process.
    address, stop = _forker.start_zeo_server(section(zeo.FILE_STORAGE, "data", "server-cache"), threaded=True)
    request.addfinalizer(stop)
    metrics = _forker.last_server.server.storages["1"].metrics
    db = ZODB.DB(ClientStorage(address, blob_dir="client"))  # commits the root object
    request.addfinalizer(db.close)
    root = db.open().root()
    s3_server().forget()
    for number in range(6):
        root["blob"] = ZODB.blob.Blob(b"%d" % number)
        transaction.commit()
    clock = newTid(None)
    root["blob"] = None
    transaction.commit()
    assert len(s3_server().requests("PutObject")) == 6
    assert bool(s3_server().requests("CopyObject")) == copies
    assert nonzero(metrics, "s3blobs_commit_lock_waits_total") == waits
    if variant == "passing":
        assert root._p_serial < clock
    else:
        assert nonzero(metrics, "s3blobs_reservations_total") == {(): reservations}
