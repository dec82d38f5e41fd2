"""What holds with any S3 service and whatever happens on the way: no wrong byte, nothing lost, nothing left behind.

The same tests run against the tests' own server, against the same one while a part of all requests meets a fault, and
against the service at S3BLOBS_TEST_ENDPOINT with the credentials in the environment. Where a service fails too often
for the client's own attempts, an operation may end with an error, and is done again here; it may not do harm.
"""

import base64
import os
import shutil
import threading
import uuid

import pytest
import transaction
from persistent.mapping import PersistentMapping
from services import SERVICES, Service
from target import Target
from zeoserver import ZEOServer
from ZODB.blob import Blob
from ZODB.POSException import StorageError
from ZODB.utils import p64

from zodb_s3blobs.bucket import PART, BlobNotFound, Bucket, BucketError, BucketSettings, Damaged
from zodb_s3blobs.metrics import Metrics

OID = p64(1)
SMALL, LARGE = 1000, 2 * PART + 12345


@pytest.fixture(params=SERVICES)
def service(request):
    with Service(request.param) as service:
        yield service


@pytest.fixture
def bucket(service, no_pauses):
    bucket = Bucket(
        BucketSettings(
            bucket_name=service.bucket,
            s3_prefix="prefix",
            s3_endpoint_url=service.endpoint,
            s3_region="us-east-1",
            s3_access_key=service.access,
            s3_secret_key=service.secret,
            s3_addressing_style="path",
            s3_checksums=service.checksums,
            s3_sse_customer_key=service.customer_key,
            s3_read_timeout=1 if service.rate else 30,
        ),
        Metrics(),
    )
    yield bucket
    bucket.close()


def insist(work, *args):
    """What ``work`` returns when it succeeds at last."""
    for _ in range(50):
        try:
            return work(*args)
        except BucketError as error:
            last = error
    raise AssertionError(f"it failed 50 times: {last}")


def unless_refused(bucket, copy, *args):
    """Skip the test if the service cannot copy what is encrypted: then blobs are uploaded again instead."""
    try:
        copy(*args)
    except BucketError as error:
        assert not bucket.can_copy
        pytest.skip(str(error))


@pytest.fixture
def read(bucket, tmp_path):
    def read(oid, tid):
        target = Target(tmp_path / "target")
        size = insist(bucket.get, oid, tid, target)
        data = (tmp_path / "target").read_bytes()
        assert size == len(data)
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
        assert insist(bucket.verify, OID, p64(number)) == size
        assert insist(bucket.has, OID, p64(number), file(data))


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
    if service.customer_key:
        unless_refused(bucket, bucket.copy, OID, p64(1), p64(2))
    insist(bucket.copy, OID, p64(1), p64(2))
    assert read(OID, p64(2)) == read(OID, p64(1)) == data
    with pytest.raises(BlobNotFound):
        insist(bucket.copy, OID, p64(8), p64(9))
    assert service.keys("prefix/blobs/") == {bucket.keys.key(OID, p64(1)), bucket.keys.key(OID, p64(2))}


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_was_staged_becomes_a_blob(service, bucket, file, read, size):
    data = os.urandom(size)
    name, path = uuid.uuid4().hex, file(data)
    insist(bucket.put_staged, name, path)
    if service.customer_key:
        unless_refused(bucket, bucket.publish_staged, name, OID, p64(1), path)
    insist(bucket.publish_staged, name, OID, p64(1), path)
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


def test_an_object_that_is_damaged_at_the_service_is_never_read(service, bucket, file, tmp_path):
    insist(bucket.put, OID, p64(1), file(b"data"))
    key = bucket.keys.key(OID, p64(1))
    metadata = service.client.head_object(Bucket=service.bucket, Key=key, **service.encryption)["Metadata"]
    options = {"Metadata": metadata, **service.encryption}
    service.client.put_object(Bucket=service.bucket, Key=key, Body=b"dare", **options)
    for _ in range(10):
        with pytest.raises(BucketError) as caught:
            bucket.get(OID, p64(1), Target(tmp_path / "target"))
    service.behave()
    with pytest.raises(Damaged):
        bucket.get(OID, p64(1), Target(tmp_path / "target"))
    assert caught


def test_one_of_two_who_want_the_lease_at_once_has_it(bucket):
    def write(data, instead_of=None):
        insist(bucket.write_owner, data, instead_of)
        return insist(bucket.read_owner)

    assert insist(bucket.read_owner) is None
    first = write(b"first")
    assert first.data == b"first"
    assert write(b"second").data == b"first"  # somebody was there before
    third = write(b"third", first)
    assert third.data == b"third"
    assert write(b"fourth", first).data == b"third"
    insist(bucket.delete_owner)
    assert insist(bucket.read_owner) is None


# End to end


SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-prefix prefix
  s3-endpoint-url {endpoint}
  s3-region us-east-1
  s3-access-key {access}
  s3-secret-key {secret}
  s3-addressing-style path
  s3-checksums {checksums}
  {encryption}
  s3-read-timeout {timeout}
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


@pytest.fixture
def server(service, tmp_path):
    """A runzeo with its blobs in ``service``, whose cache is too small for them."""
    key = service.customer_key and base64.b64encode(service.customer_key).decode()
    settings = {
        **vars(service),
        "encryption": f"s3-sse-customer-key {key}" if key else "",
        "timeout": "1s" if service.rate else "30s",
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
    db.pack()
    assert len(service.keys("prefix/blobs/")) == len(acknowledged)
    assert service.keys("prefix/") - service.keys("prefix/blobs/") == {"prefix/owner.json"}
