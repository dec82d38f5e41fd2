"""``<fallbackbucket>`` in a real server: what comes from the second bucket, and its outages."""

import hashlib
import itertools
import re

import pytest
import transaction
from ZEO.Exceptions import ServerException
from ZODB.config import storageFromString
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64

from tests.support.link import Link
from tests.support.sites import KEYS, contents, get, put, tree, undo
from tests.support.speed import slow, slow_but
from tests.support.zeo_clients import SOON, blob, leftovers, operations, wait_for
from tests.support.zeo_server import FILESTORAGE, ZEOServer, fallback_bucket

READS, FAILURES = "s3blobs_fallback_reads_total", "s3blobs_fallback_failures_total"
MISSING = "s3blobs_missing_blobs_total"
DIGITS = itertools.count()


@pytest.fixture
def other(other_s3, site):
    """The second bucket, at a service of its own, with all blobs of the site."""
    bucket = other_s3.bucket(f"production-{next(DIGITS)}")
    store(other_s3, bucket, site.revisions)
    return bucket


def store(s3, bucket, blobs):
    """Store ``blobs``, (oid, tid) -> bytes, as a server does."""
    for name, data in blobs.items():
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        s3.client.put_object(Bucket=bucket, Key=KEYS.key(*name), Body=data, Metadata=metadata)


@pytest.fixture
def switched(start, other_s3, other):
    """Starts the server with the second bucket; keywords are keys of the section, ``of_other`` those of the other."""

    def switched(s3=other_s3, bucket=other, of_other=None, **options):
        inside = fallback_bucket(s3, bucket, **{"s3_max_attempts": 1, **(of_other or {})})
        return start(base=FILESTORAGE + inside, options={"s3_max_attempts": 1, **options}, metrics=True)

    return switched


def new_client(server):
    """One that has nothing in its own cache."""
    return server.client(blob_dir=str(server.directory / f"client-{next(DIGITS)}-of-this-test"))


def new_db(server):
    return server.db(blob_dir=str(server.directory / f"client-{next(DIGITS)}-of-this-test"))


def empty_cache(server):
    wait_for(lambda: not leftovers(server))  # what has been committed gets into the cache a moment later
    for file in server.cache_dir.glob("blobs/*/*.blob"):
        file.unlink()


def everything(s3, bucket):
    """All that is in a bucket: key -> ETag and time."""
    return {one["Key"]: (one["ETag"], one["LastModified"]) for one in _listed(s3, bucket)}


def _listed(s3, bucket):
    return s3.client.list_objects_v2(Bucket=bucket).get("Contents", ())


def is_plain(error):
    """Whether the server raised a StorageError and nothing more special, whatever this ZEO makes of it."""
    return type(error) is StorageError or (
        type(error) is ServerException and error.args[0] == "ZODB.POSException.StorageError"
    )


def failure(client, name):
    """The text of the StorageError with which a read ends."""
    with pytest.raises(StorageError) as caught:
        client.loadBlob(*name)
    assert is_plain(caught.value)
    return str(caught.value)


# Reads


def test_blobs_of_the_second_bucket_are_read_through_the_cache_and_nothing_is_done_to_it(
    s3, bucket_name, other_s3, other, site, switched
):
    before = everything(other_s3, other)
    server = switched()
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    s3.forget()
    other_s3.forget()
    assert contents(new_client(server), [name]) == {name: data}
    assert (operations(s3), operations(other_s3)) == (["GetObject"], ["GetObject"])
    assert contents(new_client(server), [name]) == {name: data}
    assert (operations(s3), operations(other_s3)) == (["GetObject"], ["GetObject"])
    assert contents(new_client(server), site.revisions) == site.revisions
    figures = server.metrics()
    assert (figures(READS), figures(FAILURES), figures(MISSING)) == (len(site.revisions), 0, 0)
    # They are downloads, but no calls of the bucket.
    assert figures("s3blobs_download_size_bytes_count") == len(site.revisions)
    assert figures("s3blobs_download_duration_seconds_count") == len(site.revisions)
    assert figures("s3blobs_s3_received_bytes_total") < sum(map(len, site.revisions.values()))

    db = new_db(server)
    put(db, "one", b"a new revision of an old one")
    put(db, "new", b"a new one")
    db.pack()
    assert get(new_db(server), "one") == b"a new revision of an old one"
    server.stop()
    assert len(s3.keys(bucket_name)) == 2
    assert set(operations(other_s3)) == {"GetObject"}
    assert other_s3.requests("OwnerGetObject") == [] and other_s3.requests("OwnerPutObject") == []
    assert everything(other_s3, other) == before


def test_a_large_blob_comes_in_parts(s3, other_s3, other, site, switched):
    site.grow(large=9 << 20)
    store(other_s3, other, site.revisions)
    server = switched()
    name = max(site.revisions, key=lambda name: len(site.revisions[name]))
    other_s3.forget()
    assert contents(new_client(server), [name]) == {name: site.revisions[name]}
    assert operations(other_s3) == ["GetObject"] * 2


def test_what_the_bucket_has_comes_from_the_bucket(s3, bucket_name, other_s3, site, switched):
    server = switched()
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    store(s3, bucket_name, {name: data})
    other_s3.forget()
    assert contents(new_client(server), [name]) == {name: data}
    assert operations(other_s3) == []
    assert server.metrics()(READS) == 0


def test_the_directory_is_asked_before_the_second_bucket(other_s3, site, switched):
    server = switched(fallback_blob_dir=site.blob_dir)
    gone = next(iter(site.revisions))
    site.file(*gone).unlink()
    other_s3.forget()
    assert contents(new_client(server), site.revisions) == site.revisions
    assert [request.path.rpartition("1/blobs")[1:] for request in other_s3.requests()] == [
        ("1/blobs", KEYS.key(*gone).removeprefix("1/blobs"))
    ]
    assert server.metrics()(READS) == len(site.revisions)


def test_a_directory_that_cannot_be_read_keeps_nobody_from_the_second_bucket(site, switched, tmp_path):
    server = switched(fallback_blob_dir=site.blob_dir)
    site.blob_dir.rename(tmp_path / "elsewhere")
    name, data = next((name, data) for name, data in site.revisions.items() if data)
    assert contents(new_client(server), [name]) == {name: data}
    assert server.metrics()(FAILURES) == 1


def test_what_the_second_bucket_has_is_verified(other_s3, other, site, switched):
    server = switched()
    name = next(name for name, data in site.revisions.items() if data)
    metadata = {"sha256": hashlib.sha256(site.revisions[name]).hexdigest()}
    other_s3.client.put_object(Bucket=other, Key=KEYS.key(*name), Body=b"damaged", Metadata=metadata)
    said = failure(new_client(server), name)
    assert "<fallbackbucket>" in said and KEYS.key(*name) in said and "damaged" in said
    figures = server.metrics()
    assert (figures(MISSING), figures("s3blobs_download_checksum_failures_total")) == (0, 1)


def test_a_blob_that_neither_has_is_a_poskeyerror(other_s3, other, site, switched):
    server = switched()
    gone, *_ = site.revisions
    other_s3.client.delete_object(Bucket=other, Key=KEYS.key(*gone))
    for name in gone, (p64(77), p64(77)):
        with pytest.raises(POSKeyError):
            new_client(server).loadBlob(*name)
    figures = server.metrics()
    assert (figures(MISSING), figures(READS), figures(FAILURES)) == (1, 0, 0)


def test_undo_goes_back_to_a_blob_that_only_the_second_bucket_has(s3, bucket_name, other_s3, other, site, switched):
    before = everything(other_s3, other)
    server = switched()
    db = new_db(server)
    put(db, "one", b"over an old one")
    empty_cache(server)
    undo(db, 0)
    assert get(new_db(server), "one") == b"one after pack 1 " * 30
    empty_cache(server)
    reads = server.metrics()(READS)
    assert get(new_db(server), "one") == b"one after pack 1 " * 30
    assert server.metrics()(READS) == reads  # the bucket has a copy of its own
    assert len(s3.keys(bucket_name)) == 2
    assert everything(other_s3, other) == before


def test_an_undo_to_what_the_second_bucket_cannot_deliver_now_fails_and_is_no_loss(other_s3, site, switched):
    server = switched()
    db = new_db(server)
    put(db, "one", b"over an old one")
    empty_cache(server)
    other_s3.misbehave(status=503, code="SlowDown")
    with pytest.raises(StorageError, match="<fallbackbucket>"):
        undo(db, 0)
    transaction.abort()
    other_s3.behave()
    figures = server.metrics()
    assert figures("s3blobs_vote_failures_total", reason="bucket") == 1
    assert figures("s3blobs_vote_failures_total", reason="missing") == figures(MISSING) == 0
    assert get(new_db(server), "one") == b"over an old one"


# Outages of the second bucket


@pytest.mark.parametrize(
    "fault",
    slow_but(
        {"status": 403, "code": "AccessDenied"},
        of=[{"status": 403, "code": "AccessDenied"}, {"status": 500, "code": "InternalError"}, {"reset": True}],
    ),
)
def test_while_it_fails_no_blob_is_called_missing_and_all_is_well_afterwards(
    s3, bucket_name, other_s3, site, switched, fault
):
    server = switched()
    db = new_db(server)
    put(db, "new", b"in the bucket")
    empty_cache(server)
    other_s3.misbehave(**fault)
    client = new_client(server)
    for name in [name for name, data in site.revisions.items() if data][:2]:
        said = failure(client, name)
        assert "<fallbackbucket>" in said and KEYS.key(*name) in said
    figures = server.metrics()
    assert (figures(MISSING), figures(READS), figures(FAILURES)) == (0, 0, 2)
    assert figures("s3blobs_bucket_up") == 1
    assert sum(s.value for s in figures.samples if s.name == "s3blobs_s3_operation_failures_total") == 0
    assert get(new_db(server), "new") == b"in the bucket"
    put(db, "newer", b"commits go on")
    other_s3.behave()
    assert contents(client, site.revisions) == site.revisions  # without a restart
    output = server.output()
    assert output.count("Could not read from a fallback: ") == 1
    assert output.count("<fallbackbucket> can be read again") == 1


def test_a_silent_one_delays_no_read_from_the_bucket(s3, bucket_name, other_s3, site, switched, background):
    server = switched(s3_concurrency=1)
    db = new_db(server)
    put(db, "new", b"in the bucket")
    empty_cache(server)
    other_s3.misbehave(operation="GetObject", hang=True)
    names = [name for name, data in site.revisions.items() if data][:3]
    waiting = [background(blob, new_client(server), *name) for name in names]
    other_s3.wait_for("GetObject")
    assert get(new_db(server), "new") == b"in the bucket"
    assert not any(future.done() for future in waiting)
    other_s3.behave()
    assert [future.result(60) for future in waiting] == [site.revisions[name] for name in names]


# Outages of the bucket


def test_an_outage_of_the_bucket_keeps_nobody_from_the_blobs_of_the_second(s3, site, switched):
    server = switched()
    s3.misbehave(operation="GetObject", status=500, code="InternalError")
    assert contents(new_client(server), site.revisions) == site.revisions
    # Whether the bucket has this one, nobody can tell.
    said = failure(new_client(server), (p64(77), p64(77)))
    assert KEYS.key(p64(77), p64(77)) in said and "<fallbackbucket>" not in said
    assert server.metrics()(MISSING) == 0


@slow
def test_reads_go_on_without_the_bucket_once_it_is_known_to_be_silent(
    s3, bucket_name, other_s3, other, site, tmp_path, background
):
    """A region is down, and its copy in another one serves: each read would wait for as long as a request may take."""
    store(s3, bucket_name, site.revisions)
    with Link(s3.url) as link:
        inside = fallback_bucket(other_s3, other)
        options = {"s3_read_timeout": "3s", "s3_max_attempts": 1}
        server = ZEOServer(tmp_path, link, bucket_name, base=FILESTORAGE + inside, options=options, metrics=True)
        with server:
            link.break_down("silent after the handshake")
            first, *others = site.revisions
            assert 3 * len(others) > SOON  # what they would take, one after the other
            assert blob(new_client(server), *first) == site.revisions[first]
            client = new_client(server)
            reading = background(contents, client, others)
            assert reading.result(SOON) == {name: site.revisions[name] for name in others}
            link.mend()
            wait_for(lambda: server.metrics()("s3blobs_bucket_up") == 1)
            empty_cache(server)
            other_s3.forget()
            assert contents(new_client(server), site.revisions) == site.revisions
            assert operations(other_s3) == []


# The start


def refusal(server):
    """The one line on standard error of a server that does not start."""
    with pytest.raises(AssertionError):
        server.start()
    lines = (server.directory / "output").read_text().splitlines()
    (line,) = [line for line in lines if "Ignoring index" not in line]
    assert "Traceback" not in server.output()
    return line


def test_a_bucket_that_does_not_exist_stops_the_server_with_one_sentence(s3, bucket_name, other_s3, tmp_path):
    server = ZEOServer(tmp_path, s3, bucket_name, base=FILESTORAGE + fallback_bucket(other_s3, "no-such-bucket"))
    assert refusal(server).startswith("<fallbackbucket> bucket-name: Could not list bucket no-such-bucket: ")


def test_credentials_that_are_refused_stop_the_server_with_one_sentence(s3, bucket_name, other_s3, other, tmp_path):
    other_s3.misbehave(status=403, code="AccessDenied")
    server = ZEOServer(tmp_path, s3, bucket_name, base=FILESTORAGE + fallback_bucket(other_s3, other))
    line = refusal(server)
    assert line.startswith("<fallbackbucket> s3-access-key: ") and "s3:ListBucket" in line


@pytest.mark.parametrize("prefix", ["1", "1/"])
def test_the_place_of_the_bucket_itself_is_refused(s3, bucket_name, tmp_path, prefix):
    server = ZEOServer(tmp_path, s3, bucket_name, base=FILESTORAGE + fallback_bucket(s3, bucket_name, prefix))
    line = refusal(server)
    assert line.startswith("<fallbackbucket>: ") and "s3-prefix" in line


def test_another_prefix_of_the_same_bucket_is_another_place(s3, bucket_name, site, start):
    for name, data in site.revisions.items():
        s3.client.put_object(Bucket=bucket_name, Key=f"other/{KEYS.key(*name)}", Body=data)
    server = start(base=FILESTORAGE + fallback_bucket(s3, bucket_name, "other/1"))
    assert contents(new_client(server), site.revisions) == site.revisions


def test_an_outage_of_it_does_not_stop_the_start(other_s3, site, switched):
    other_s3.misbehave(status=503, code="SlowDown")
    server = switched()
    assert "Starting anyway: blobs that only <fallbackbucket> has" in server.output()
    other_s3.behave()
    assert contents(new_client(server), site.revisions) == site.revisions


def test_the_log_names_both_buckets(bucket_name, other_s3, other, switched):
    output = switched().output()
    assert re.search(rf"bucket {bucket_name}, prefix 1, ", output)
    assert f"<fallbackbucket>: bucket {other}, prefix 1, endpoint {other_s3.url}" in output
    assert f"<fallbackbucket>: Bucket {other} answered" in output


def test_without_zeo_it_is_the_same(s3, bucket_name, other_s3, other, site):
    conf = site.configure(s3, bucket_name, base=FILESTORAGE + fallback_bucket(other_s3, other))
    section = re.search(r"<s3blobstorage.*</s3blobstorage>", conf.read_text(), re.S)[0]
    before = tree(site.blob_dir)
    storage = storageFromString(f"%import zodb_s3blobs\n{section}")
    assert contents(storage, site.revisions) == site.revisions
    storage.close()
    assert tree(site.blob_dir) == before
