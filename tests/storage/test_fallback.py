"""``fallback-blob-dir`` in a real server: a site switches its zeo.conf, restarts once, and has all its blobs."""

import itertools
import re
from hashlib import sha256

import pytest
import transaction
from ZEO.Exceptions import ServerException
from ZODB.config import storageFromString
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64

from tests.support.sites import KEYS, Site, break_disk, contents, get, put, tree, undo
from tests.support.speed import slow_but
from tests.support.zeo_clients import leftovers, operations, wait_for
from tests.support.zeo_server import ZEOServer

PLAIN = "<filestorage 1>\n path {dir}/Data.fs\n blob-dir {dir}/blobs\n</filestorage>"
READS = "s3blobs_fallback_reads_total"
DIGITS = itertools.count()


@pytest.fixture
def switched(site, start):
    """Starts the server with the blob directory as its fallback; more options as keywords."""

    def switched(site=site, **options):
        return start(options={"fallback_blob_dir": site.blob_dir, "s3_max_attempts": 1, **options}, metrics=True)

    return switched


def new_client(server):
    """One that has nothing in its own cache."""
    return server.client(blob_dir=str(server.directory / f"client-{next(DIGITS)}-of-this-test"))


def new_db(server):
    return server.db(blob_dir=str(server.directory / f"client-{next(DIGITS)}-of-this-test"))


def is_plain(error):
    """Whether the server raised a StorageError and nothing more special, whatever this ZEO makes of it."""
    return type(error) is StorageError or (
        type(error) is ServerException and error.args[0] == "ZODB.POSException.StorageError"
    )


def empty_cache(server):
    wait_for(lambda: not leftovers(server))  # what has been committed gets into the cache a moment later
    for file in server.cache_dir.glob("blobs/*/*.blob"):
        file.unlink()


# The switch


@pytest.mark.parametrize("layout", slow_but("bushy", of=["bushy", "lawn"]))
def test_a_site_switches_its_configuration_and_restarts_once(s3, bucket_name, tmp_path, start, layout):
    site = Site(tmp_path, layout)
    site.grow(large=9 << 20)
    old_server = start(storages=lambda settings: PLAIN.format(**settings))
    put(new_db(old_server), "last", b"the last one on disk")
    old_server.stop()
    site.note()
    before = tree(site.blob_dir)

    server = start(options={"fallback_blob_dir": site.blob_dir}, metrics=True)
    assert contents(new_client(server), site.revisions) == site.revisions
    assert server.metrics()(READS) == len(site.revisions)
    assert s3.keys(bucket_name) == []
    db = new_db(server)
    put(db, "new", b"the first one in the bucket")
    put(db, "one", b"a new revision of an old one")
    assert len(s3.keys(bucket_name)) == 2
    other = new_db(server)
    assert get(other, "new") == b"the first one in the bucket"
    assert get(other, "one") == b"a new revision of an old one"
    assert get(other, "last") == b"the last one on disk"
    assert tree(site.blob_dir) == before


def test_the_second_read_is_a_hit_in_the_cache(s3, site, switched):
    server = switched()
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    s3.forget()
    assert contents(new_client(server), [name]) == {name: data}
    assert operations(s3) == ["GetObject"]
    figures = server.metrics()
    assert (figures(READS), figures("s3blobs_cache_hits_total")) == (1, 0)
    assert contents(new_client(server), [name]) == {name: data}
    assert operations(s3) == ["GetObject"]
    figures = server.metrics()
    assert (figures(READS), figures("s3blobs_cache_hits_total")) == (1, 1)


def test_what_the_bucket_has_comes_from_the_bucket(s3, bucket_name, site, switched):
    """The directory may be older, or damaged."""
    server = switched()
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(*name), Body=data)
    path = site.file(*name)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert contents(new_client(server), [name]) == {name: data}
    assert server.metrics()(READS) == 0


@pytest.mark.parametrize("fault", [{"truncate": 10}, None], ids=["breaks off", "is damaged"])
def test_nothing_is_left_of_what_the_bucket_delivered_before_the_directory(s3, bucket_name, site, switched, fault):
    """What is there under the key of the blob is longer than the blob."""
    server = switched()
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    s3.client.put_object(
        Bucket=bucket_name, Key=KEYS.key(*name), Body=bytes(3 << 20), Metadata={"sha256": sha256(data).hexdigest()}
    )
    if fault is not None:
        s3.misbehave(operation="GetObject", **fault)
    assert contents(new_client(server), [name]) == {name: data}
    assert server.metrics()(READS) == 1


# Undo and pack


def test_undo_goes_back_to_a_blob_that_only_the_fallback_has(s3, bucket_name, site, switched):
    before = tree(site.blob_dir)
    server = switched()
    db = new_db(server)
    put(db, "three", b"over an old one")
    old = get(db, "one")
    put(db, "one", b"over another one")
    undo(db, 0)
    assert get(db, "one") == old == b"one after pack 1 " * 30
    undo(db, 2)
    assert get(db, "three") == site.revisions[max(site.revisions)]
    undo(db, 5)  # from the time before the switch: an undo of its own
    assert get(db, "one") == b"one after pack 2 " * 30
    empty_cache(server)
    server.stop()
    server.start()
    db = new_db(server)
    assert get(db, "one") == b"one after pack 2 " * 30
    assert get(db, "three") == site.revisions[max(site.revisions)]
    # What was undone to is in the bucket: the fallback is not needed for it any more.
    assert server.metrics()(READS) == 0
    assert len(s3.keys(bucket_name)) == 5
    assert tree(site.blob_dir) == before


def test_undo_to_a_blob_that_nobody_has_fails_and_changes_nothing(site, switched):
    server = switched()
    db = new_db(server)
    now = get(db, "one")
    put(db, "one", b"over it")
    for name in [name for name, data in site.revisions.items() if data == now]:  # the last repeats another
        site.file(*name).unlink()
    empty_cache(server)
    db.undo(db.undoLog(0, 1)[0]["id"])
    with pytest.raises(StorageError, match="no such object"):
        transaction.commit()
    transaction.abort()
    assert get(db, "one") == b"over it"


def test_a_pack_deletes_what_is_dead_in_the_bucket_and_nothing_in_the_fallback(s3, bucket_name, site, switched):
    before = tree(site.blob_dir)
    server = switched(gc_max_delete_percent=100)
    db = new_db(server)
    for data in b"first", b"second":
        put(db, "new", data)
    assert len(s3.keys(bucket_name)) == 2
    db.pack()
    assert len(s3.keys(bucket_name)) == 1
    empty_cache(server)
    db = new_db(server)
    assert get(db, "new") == b"second"
    assert get(db, "one") == b"one after pack 1 " * 30
    assert tree(site.blob_dir) == before


# What is missing, and what merely does not answer


def test_a_blob_that_neither_has_is_a_poskeyerror(site, switched):
    server = switched()
    gone, *_ = site.revisions
    site.file(*gone).unlink()
    for name in gone, (p64(77), p64(77)):
        with pytest.raises(POSKeyError):
            new_client(server).loadBlob(*name)
    assert server.metrics()("s3blobs_missing_blobs_total") == 1
    assert server.metrics()(READS) == 0


def test_an_outage_of_the_bucket_keeps_nobody_from_old_blobs(s3, site, switched):
    server = switched()
    gone, *others = site.revisions
    site.file(*gone).unlink()
    for fault in {"status": 500, "code": "InternalError"}, {"status": 403, "code": "AccessDenied"}, {"lose": True}:
        s3.misbehave(operation="GetObject", **fault)
        client = new_client(server)
        assert contents(client, others) == {name: site.revisions[name] for name in others}
        # Whether the bucket has this one, nobody can tell.
        with pytest.raises(StorageError) as caught:
            client.loadBlob(*gone)
        assert is_plain(caught.value)
        assert KEYS.key(*gone) in str(caught.value)
        s3.behave()
        empty_cache(server)
    assert server.metrics()("s3blobs_missing_blobs_total") == 0


@pytest.mark.parametrize("instead", ["nothing", "an empty directory"])
def test_a_directory_that_is_not_mounted_any_more_makes_no_blob_a_missing_one(
    s3, bucket_name, site, switched, tmp_path, instead
):
    server = switched()
    db = new_db(server)
    put(db, "new", b"in the bucket")
    site.blob_dir.rename(tmp_path / "elsewhere")
    if instead != "nothing":
        site.blob_dir.mkdir()
    client = new_client(server)
    for name in [*site.revisions][:2]:
        with pytest.raises(StorageError) as caught:
            client.loadBlob(*name)
        assert is_plain(caught.value)
        assert str(site.blob_dir) in str(caught.value)
    figures = server.metrics()
    assert figures("s3blobs_missing_blobs_total") == 0 and figures(READS) == 0
    empty_cache(server)
    assert get(new_db(server), "new") == b"in the bucket"
    put(db, "newer", b"commits go on")
    if instead != "nothing":
        site.blob_dir.rmdir()
    (tmp_path / "elsewhere").rename(site.blob_dir)
    assert contents(new_client(server), site.revisions) == site.revisions  # without a restart


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(site, switched):
    server = switched()
    name = next(name for name, data in site.revisions.items() if data)
    file = site.file(*name)
    break_disk(file)
    with pytest.raises(StorageError) as caught:
        new_client(server).loadBlob(*name)
    assert is_plain(caught.value)
    assert str(file) in str(caught.value)
    assert not list(server.cache_dir.glob("blobs/*/*.blob"))


# Settings that are wrong


def refusal(server):
    """The one line on standard error of a server that does not start."""
    with pytest.raises(AssertionError):
        server.start()
    lines = (server.directory / "output").read_text().splitlines()
    (line,) = [line for line in lines if "Ignoring index" not in line]
    return line


def _missing(path):
    pass


def _empty(path):
    path.mkdir()


@pytest.mark.parametrize("make", [_missing, _empty])
def test_a_wrong_directory_stops_the_server_with_one_sentence(s3, bucket_name, site, tmp_path, make):
    """An empty one is where the file system should be mounted; test_blobdir.py has more of them."""
    path = tmp_path / "wrong"
    make(path)
    server = ZEOServer(tmp_path, s3, bucket_name, options={"fallback_blob_dir": path})
    line = refusal(server)
    assert "fallback-blob-dir" in line and str(path) in line
    assert "Traceback" not in server.output()


def test_the_cache_of_a_client_is_refused(s3, bucket_name, site, start, tmp_path):
    server = start(storages=lambda settings: PLAIN.format(**settings))
    client = server.client(blob_dir=str(tmp_path / "of-a-client"))
    name = next(iter(site.revisions))
    contents(client, [name])
    client.close()
    server.stop()
    line = refusal(ZEOServer(tmp_path, s3, bucket_name, options={"fallback_blob_dir": tmp_path / "of-a-client"}))
    assert re.search(r"fallback-blob-dir: .*of-a-client is the blob cache of a ZEO client", line)


def test_a_base_with_its_own_blob_directory_is_still_refused_beside_a_fallback(s3, bucket_name, site, tmp_path):
    base = "<filestorage>\n path {dir}/Data.fs\n blob-dir {dir}/blobs\n</filestorage>"
    server = ZEOServer(tmp_path, s3, bucket_name, base=base, options={"fallback_blob_dir": site.blob_dir})
    before = tree(site.blob_dir)
    assert "blob-dir" in refusal(server)
    assert tree(site.blob_dir) == before


def test_without_it_there_is_none(start, site):
    with pytest.raises(POSKeyError):
        new_client(start()).loadBlob(*next(iter(site.revisions)))


def test_without_zeo_it_is_the_same(s3, bucket_name, site):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir)
    section = re.search(r"<s3blobstorage.*</s3blobstorage>", conf.read_text(), re.S)[0]
    storage = storageFromString(f"%import zodb_s3blobs\n{section}")
    assert contents(storage, site.revisions) == site.revisions
    storage.close()
