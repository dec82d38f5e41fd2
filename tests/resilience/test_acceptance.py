"""What holds with any S3 service and whatever happens on the way: no wrong byte, nothing lost, nothing left behind.

The same tests run against moto, against moto while a part of all requests meets a fault, against SeaweedFS over http
and https, and against the service at S3BLOBS_TEST_ENDPOINT with the credentials in the environment, if there is one.
Where a service fails too often for the client's own attempts, an operation may end with an error, and is done again
here; it may not do harm.

Services lack some of S3's capabilities. Assertions about a capability are skipped, with the reason, for a service that
lacks it. That a server works without the capability is asserted for every service.
"""

import base64
import os
import shutil
import threading
import uuid
from dataclasses import replace

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.POSException import StorageError
from ZODB.utils import p64

from tests.support import s3_services as services
from tests.support.download_target import Target
from tests.support.s3_services import CAPABILITIES, SERVICES, Service
from tests.support.speed import slow_but
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.bucket import Bucket
from zodb_s3blobs.s3.client import BucketSettings
from zodb_s3blobs.s3.download import PART
from zodb_s3blobs.s3.errors import BlobDamaged, BlobNotFound, BucketError

OID = p64(1)
SMALL, LARGE = 1000, 2 * PART + 12345


#: Without a real service that somebody names, there is nothing to skip.
AVAILABLE = [name for name in SERVICES if not name.startswith("real") or "S3BLOBS_TEST_ENDPOINT" in os.environ]


@pytest.fixture(params=slow_but("moto", of=AVAILABLE))
def unchecked_service(request):
    """Open a service, whether it has what its variant of the settings needs or not."""
    with Service(request.param) as service:
        yield service


@pytest.fixture
def service(unchecked_service):
    """Return a service that has what its variant of the settings needs."""
    if unchecked_service.setting:
        unchecked_service.needs(unchecked_service.setting)
    return unchecked_service


@pytest.fixture
def unchecked_settings(unchecked_service):
    return BucketSettings(
        bucket_name=unchecked_service.bucket,
        s3_prefix="prefix",
        s3_endpoint_url=unchecked_service.endpoint,
        s3_region=unchecked_service.region,
        s3_access_key=unchecked_service.access,
        s3_secret_key=unchecked_service.secret,
        s3_addressing_style="path",
        s3_ca_file=unchecked_service.ca,
        s3_checksums=unchecked_service.checksums,
        s3_sse_customer_key=unchecked_service.customer_key,
        # As the table of keys says of a service that fails on parts.
        s3_multipart_threshold=5 << 30 if unchecked_service.lacks("multipart") else 8 << 20,
        s3_read_timeout=1 if unchecked_service.rate else 30,
        copy_timeout=3 if unchecked_service.rate else 120,
    )


@pytest.fixture
def unchecked_bucket(unchecked_settings, no_pauses):
    bucket = Bucket(unchecked_settings, Metrics())
    yield bucket
    bucket.close()


@pytest.fixture
def bucket(service, unchecked_bucket):
    return unchecked_bucket


def insist(work, *args):
    """Call ``work`` until it succeeds, and return what it returns."""
    for _ in range(50):
        try:
            return work(*args)
        except BucketError as error:
            last = error
    raise AssertionError(f"it failed 50 times: {last}")


def insist_on_copy(service, bucket, copy, *args):
    """Call ``copy`` until it succeeds; skip the test if the service cannot: then blobs are uploaded again instead."""
    reason = service.lacks("copy") or (service.lacks("SSE-C copy") if service.customer_key else None)
    if reason is None:
        insist(copy, *args)
        return
    try:
        copy(*args)
    except BucketError as error:
        assert error.code != "NotImplemented" or not bucket.can_copy
        pytest.skip(f"copy: {reason}")


@pytest.fixture
def read(bucket, tmp_path):
    def read(oid, tid):
        target = Target(tmp_path / "target")
        stored = insist(bucket.get, oid, tid, target)
        data = (tmp_path / "target").read_bytes()
        assert stored.size == len(data)
        return data

    return read


@pytest.fixture
def file(tmp_path):
    def file(data):
        path = tmp_path / uuid.uuid4().hex
        path.write_bytes(data)
        return str(path)

    return file


@pytest.mark.parametrize("size", [0, SMALL, LARGE])
def test_what_was_put_is_there_and_is_read_back(service, bucket, file, read, size):
    for number in range(3):
        data = os.urandom(size)
        insist(bucket.put, OID, p64(number), file(data))
        assert service.read(bucket.keys.key(OID, p64(number))) == data
        assert read(OID, p64(number)) == data
        assert insist(bucket.verify, OID, p64(number)).size == size
        assert insist(bucket.find, OID, p64(number), file(data)) is not None


def test_what_is_put_again_is_what_is_read(service, bucket, file, read):
    for size in SMALL, LARGE, SMALL:
        data = os.urandom(size)
        insist(bucket.put, OID, p64(1), file(data))
        assert read(OID, p64(1)) == data


def test_what_is_not_there_is_not_found_and_what_is_there_is_never_missing(bucket, file, read):
    insist(bucket.put, OID, p64(1), file(b"data"))
    for _ in range(20):
        assert read(OID, p64(1)) == b"data"  # BlobNotFound would end the test
        with pytest.raises(BlobNotFound):
            read(OID, p64(2))
        with pytest.raises(BlobNotFound):
            insist(bucket.verify, OID, p64(2))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_copy_has_the_same_bytes(service, bucket, file, read, size):
    data = os.urandom(size)
    insist(bucket.put, OID, p64(1), file(data))
    insist_on_copy(service, bucket, bucket.copy, OID, p64(1), p64(2))
    assert read(OID, p64(2)) == read(OID, p64(1)) == data
    with pytest.raises(BlobNotFound):
        insist(bucket.copy, OID, p64(8), p64(9))
    assert service.keys("prefix/blobs/") == {bucket.keys.key(OID, p64(1)), bucket.keys.key(OID, p64(2))}


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_blob_of_another_place_at_the_service_is_copied(service, bucket, unchecked_settings, file, read, size):
    data = os.urandom(size)
    other = Bucket(replace(unchecked_settings, s3_prefix="other"), Metrics())
    insist(other.put, OID, p64(1), file(data))
    found = insist(other.look_up, OID, p64(1))
    insist_on_copy(service, bucket, bucket.copy_from, other, OID, p64(1), found)
    assert read(OID, p64(1)) == data
    assert insist(bucket.look_up, OID, p64(1)) == found
    assert service.keys("prefix/") == {bucket.keys.key(OID, p64(1))}
    other.close()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_was_staged_becomes_a_blob(service, bucket, file, read, size):
    data = os.urandom(size)
    name, path = uuid.uuid4().hex, file(data)
    digest = insist(bucket.put_staged, name, path)
    insist_on_copy(service, bucket, bucket.publish, bucket.keys.staged_key(name), OID, p64(1), size, digest)
    insist(bucket.delete_staged, [name])
    assert read(OID, p64(1)) == data
    assert service.keys("prefix/") == {bucket.keys.key(OID, p64(1))}


def test_a_listing_is_complete_and_right(bucket, file):
    names = {(p64(oid), p64(tid)) for oid in range(5) for tid in range(oid)}
    for oid, tid in names:
        insist(bucket.put, oid, tid, file(b"x" * (oid[-1] + 1)))
    for _ in range(10):
        listed = insist(lambda: list(bucket.list_blobs()))
        assert {(blob.oid, blob.tid): blob.size for blob in listed} == {name: name[0][-1] + 1 for name in names}


def test_what_was_deleted_is_gone_and_nothing_else(service, bucket, file):
    blobs = [(OID, p64(tid)) for tid in range(20)]
    for oid, tid in blobs:
        insist(bucket.put, oid, tid, file(b"data"))
    insist(bucket.delete, blobs[:15])
    assert service.keys("prefix/blobs/") == {bucket.keys.key(*blob) for blob in blobs[15:]}
    insist(bucket.delete, blobs[:1])  # what is not there any more


def test_an_upload_in_parts_that_nobody_completes_is_found_and_aborted(service, bucket):
    service.needs("multipart", "list of uploads")
    key = bucket.keys.key(OID, p64(1))
    begun = service.client.create_multipart_upload(Bucket=service.bucket, Key=key)["UploadId"]
    [found] = insist(lambda: list(bucket.list_uploads()))
    assert (found.key, found.upload_id) == (key, begun)
    insist(bucket.abort_upload, found)
    assert insist(lambda: list(bucket.list_uploads())) == []
    insist(bucket.abort_upload, found)  # what is not there any more


def test_an_object_that_is_damaged_at_the_service_is_never_read(service, bucket, file, tmp_path):
    service.needs("metadata")
    insist(bucket.put, OID, p64(1), file(b"data"))
    key = bucket.keys.key(OID, p64(1))
    metadata = service.client.head_object(Bucket=service.bucket, Key=key, **service.encryption)["Metadata"]
    options = {"Metadata": metadata, **service.encryption}
    service.client.put_object(Bucket=service.bucket, Key=key, Body=b"dare", **options)
    for _ in range(10):
        with pytest.raises(BucketError) as caught:
            bucket.get(OID, p64(1), Target(tmp_path / "target"))
    service.behave()
    with pytest.raises(BlobDamaged):
        bucket.get(OID, p64(1), Target(tmp_path / "target"))
    assert caught


@pytest.fixture
def write_owner(bucket):
    """Return a function that writes the lease and returns the lease that is there then."""

    def write(data, instead_of=None):
        insist(bucket.write_owner, data, instead_of)
        return insist(bucket.read_owner)

    return write


def test_the_lease_is_written_renewed_and_given_back(bucket, write_owner):
    for _ in range(2):
        assert insist(bucket.read_owner) is None
        first = write_owner(b"first")
        assert first.data == b"first"
        second = write_owner(b"second", first)
        assert second.data == b"second"
        assert write_owner(b"third", second).data == b"third"
        insist(bucket.delete_owner)
    assert insist(bucket.read_owner) is None


def test_the_first_of_two_who_want_the_lease_at_once_has_it(service, write_owner):
    service.needs("If-None-Match")
    assert write_owner(b"first").data == b"first"
    assert write_owner(b"second").data == b"first"


def test_the_first_of_two_who_take_a_lease_over_at_once_has_it(service, write_owner):
    service.needs("If-Match")
    stale = write_owner(b"stale")
    assert write_owner(b"first", stale).data == b"first"
    assert write_owner(b"second", stale).data == b"first"


@pytest.mark.parametrize(
    "unchecked_service",
    slow_but(of=[name for name in AVAILABLE if SERVICES[name] is None and ", " in name]),
    indirect=True,
)
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_setting_that_the_service_lacks_is_an_error_with_every_blob(unchecked_service, unchecked_bucket, file, size):
    reason = unchecked_service.lacks(unchecked_service.setting)
    for number in range(2):
        if reason is None:
            unchecked_bucket.put(OID, p64(number), file(b"x" * size))
        else:
            with pytest.raises(BucketError):
                unchecked_bucket.put(OID, p64(number), file(b"x" * size))


# End to end


SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-prefix prefix
  s3-endpoint-url {endpoint}
  s3-region {region}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-addressing-style path
  s3-checksums {checksums}
  {encryption}
  {authorities}
  s3-read-timeout {timeout}
  upload-timeout {upload_timeout}
  s3-stage-threshold 200KB
  cache-dir {cache}
  cache-size 1MB
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""
CLIENTS, COMMITS = 3, 12


def write(db, name, acknowledged):
    """Commit blobs as one client, some large, some over and over; note what was acknowledged."""
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    for number in range(COMMITS):
        key = f"{name} {number % 4}"
        data = os.urandom(300_000 if number % 3 == 0 else 3000)
        for _ in range(30):
            try:
                manager.begin()
                blobs = connection.root()[name]
                blobs[key] = blobs.get(key) or Blob()
                with blobs[key].open("w") as file:
                    file.write(data)
                manager.commit()
                acknowledged[key] = data
                break
            except StorageError:
                manager.abort()
    connection.close()


def contents(db):
    """key -> bytes."""
    with db.transaction() as connection:
        blobs = [item for name in map(str, range(CLIENTS)) for item in connection.root()[name].items()]
        return {key: blob.open().read() for key, blob in blobs}


def overwrite_and_undo(db, name, key):
    """Commit other bytes to a blob, and undo that: the blob before is copied inside the bucket, or uploaded again."""
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    with connection.root()[name][key].open("w") as file:
        file.write(b"a mistake")
    manager.commit()
    [mistake] = db.undoInfo(0, 1)
    db.undo(mistake["id"], manager.get())
    manager.commit()
    connection.close()


@pytest.fixture
def server(service, tmp_path):
    """A runzeo with its blobs in ``service``, whose cache is too small for them."""
    key = service.customer_key and base64.b64encode(service.customer_key).decode()
    settings = {
        **vars(service),
        "encryption": f"s3-sse-customer-key {key}" if key else "",
        "authorities": f"s3-ca-file {service.ca}" if service.ca else "",
        "timeout": "1s" if service.rate else "30s",
        "upload_timeout": "6s" if service.rate else "10m",  # as long as a copy that hangs is waited for
        "dir": tmp_path,
    }
    with ZEOServer(
        tmp_path, None, storages=lambda zeo: SECTION.format(**{**settings, "cache": tmp_path / zeo["cache"]})
    ) as server:
        yield server


def test_every_acknowledged_commit_is_read_back_and_nothing_is_left_of_others(service, server):
    with server.db().transaction() as connection:
        for number in range(CLIENTS):
            connection.root()[str(number)] = PersistentMapping()
    dbs = [server.db() for _ in range(CLIENTS)]  # now, or they would have to wait until they hear of that
    acknowledged = {}
    writers = [threading.Thread(target=write, args=(db, str(number), acknowledged)) for number, db in enumerate(dbs)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(acknowledged) == CLIENTS * 4

    server.stop()
    # All else has to stay: if a fault kept the server from giving its lease back, the directory tells whose it is.
    shutil.rmtree(server.cache_dir / "blobs")
    server.start()
    for _ in range(20):  # reads meet the faults as well
        try:
            found = contents(server.db())
            break
        except StorageError:
            pass
    assert found == acknowledged

    service.behave()
    db = server.db()
    assert contents(db) == acknowledged
    overwrite_and_undo(db, "0", "0 0")
    assert contents(db) == acknowledged
    db.pack()
    assert len(service.keys("prefix/blobs/")) == len(acknowledged)
    assert service.keys("prefix/") - service.keys("prefix/blobs/") == {"prefix/owner.json"}


# What a service lacks


@pytest.fixture
def incomplete(s3, monkeypatch):
    """Open a service that `s3` can deprive of capabilities, none of which have been probed yet."""
    monkeypatch.setenv("S3BLOBS_TEST_ENDPOINT", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.delenv("S3BLOBS_TEST_EXPECT", raising=False)
    monkeypatch.setattr(services, "_reasons", {})
    with Service("real") as service:
        s3.forget()
        yield service
        s3.behave()


#: Faults of the server, and the capabilities that are missing for each.
DEFECTS = {
    "ignores conditions": ({"ignore_condition": True}, {"If-None-Match", "If-Match"}),
    "refuses conditions": ({"refuse_condition": True}, {"If-None-Match", "If-Match"}),
    "meets no If-Match": ({"misread_etag": True}, set()),
    "has no CopyObject": ({"operation": "CopyObject", "status": 501, "code": "NotImplemented"}, {"copy"}),
    "keeps no metadata": ({"operation": "HeadObject", "headers": {"x-amz-meta-sha256": ""}}, {"metadata"}),
    "refuses parts": ({"operation": "UploadPart", "status": 400, "code": "BadRequest"}, {"multipart"}),
    "has no parts": (
        {"operation": "CreateMultipartUpload", "status": 405, "code": "MethodNotAllowed"},
        {"multipart", "list of uploads"},
    ),
    "lists no uploads": (
        {"operation": "ListMultipartUploads", "status": 501, "code": "NotImplemented"},
        {"list of uploads"},
    ),
    "nothing": ({"operation": "nothing"}, set()),
    "is overloaded": ({"status": 503, "code": "SlowDown"}, set()),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_a_service_lacks_is_found(incomplete, s3, no_pauses, defect):
    fault, lacking = DEFECTS[defect]
    s3.misbehave(**fault)
    found = {capability for capability in CAPABILITIES if incomplete.lacks(capability)}
    assert found == lacking | ({"SSE-C", "SSE-C copy"} if defect != "is overloaded" else set())  # moto has no SSE-C


def test_each_capability_is_probed_once(incomplete, s3):
    reasons = [incomplete.lacks(capability) for capability in CAPABILITIES]
    assert s3.requests()
    with Service("real") as another:
        s3.forget()
        assert [another.lacks(capability) for capability in CAPABILITIES] == reasons
        assert s3.requests() == []


def test_what_a_service_lacks_is_skipped_with_the_reason(incomplete, s3):
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    incomplete.needs("multipart")
    with pytest.raises(pytest.skip.Exception, match=r"copy: .*CopyObject.*NotImplemented"):
        incomplete.needs("multipart", "copy")


def test_what_a_service_is_known_to_have_is_not_skipped(incomplete, s3, monkeypatch):
    monkeypatch.setenv("S3BLOBS_TEST_EXPECT", "multipart, copy")
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    incomplete.needs("multipart")
    with pytest.raises(pytest.fail.Exception, match=r"copy.*NotImplemented"):
        incomplete.needs("copy")


def test_sse_c_that_a_service_is_known_to_have_is_not_skipped_without_tls(incomplete, monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="TLS"):
        Service("real, SSE-C")
    monkeypatch.setenv("S3BLOBS_TEST_EXPECT", "SSE-C")
    with pytest.raises(pytest.fail.Exception, match="TLS"):
        Service("real, SSE-C")


def test_an_expectation_that_means_nothing_is_an_error(incomplete, s3, monkeypatch):
    monkeypatch.setenv("S3BLOBS_TEST_EXPECT", "copying")
    s3.misbehave(operation="CopyObject", status=501, code="NotImplemented")
    with pytest.raises(AssertionError, match="copying"):
        incomplete.needs("copy")
