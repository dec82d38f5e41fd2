"""What comes from outside, read with an attacker's eyes: clients, the bucket, the service, the disk, the network.

ZEO believes its clients and the database believes its bucket (Security in zeo-configs/OPERATIONS.md). What is tested
is what holds all the same: nothing from outside becomes a path, a key or a line of the log that is not meant, nothing
of it takes the memory or the files that the server needs for others, and no secret comes out.
"""

import base64
import contextlib
import json
import logging
import os
import socket
import stat
import sys
import time
import traceback
import tracemalloc
from email.utils import formatdate
from pathlib import Path

import pytest
import ZODB.config
from prometheus_client.parser import text_string_to_metric_families
from ZEO.asyncio.marshal import encoder
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError
from ZODB.tests.StorageTestBase import ZERO
from ZODB.utils import p64, z64

from tests.support.fake_base import Base
from tests.support.fake_database import FakeDatabase
from tests.support.speed import slow
from tests.support.zeo_clients import RECORD, blob, commit_blob, commit_object, leftovers, wait_for
from tests.support.zeo_server import ZEOServer, free_address
from zodb_s3blobs.blobdir import BlobDirectory
from zodb_s3blobs.cache.directory import CacheDirectoryError, path_in
from zodb_s3blobs.cache.files import Cache
from zodb_s3blobs.commands import demo
from zodb_s3blobs.database import object_paths as paths
from zodb_s3blobs.garbage import marks
from zodb_s3blobs.lease import STALE_AFTER, Lease, NotOwner
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.s3.errors import BlobDamaged, BlobNotFound, BucketError

pytestmark = pytest.mark.usefixtures("no_aws_settings", "no_pauses")

ACCESS_KEY = "AKIAOFTHESECURITYTEST"
SECRET_KEY = "secret-key-of-the-security-test"
CUSTOMER_KEY = b"customer key of a security test."
#: In all the forms in which it could come out.
TOKEN = "session-token-of-the-security-test"
SECRETS = (ACCESS_KEY, SECRET_KEY, CUSTOMER_KEY.decode(), base64.b64encode(CUSTOMER_KEY).decode(), TOKEN)

OID, TID = p64(1), p64(2)
#: What would move the cursor, forge a line of the log, or hide what comes after it.
EVIL = "x\n2026-01-01 CRITICAL forged\x1b[2J\x9b2K\u202e"
#: Longer than any sentence for an operator.
TOO_LONG = 1500


def is_harmless(text):
    """Whether it is one short line that does nothing to a terminal."""
    return text.isprintable() and len(text) < TOO_LONG


def said(caplog):
    """The messages that were logged by us."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("zodb_s3blobs")]


@pytest.fixture
def open_storage(s3, bucket_name, tmp_path):
    """Opens a storage; keywords are keys of its section, with _ for -."""
    with contextlib.ExitStack() as opened:

        def make(**keys):
            keys = {"cache_dir": tmp_path / "cache", "s3_prefix": "", **keys}
            lines = "\n".join(f"{key.replace('_', '-')} {value}" for key, value in keys.items())
            storage = ZODB.config.storageFromString(f"""
                %import zodb_s3blobs
                <s3blobstorage>
                  bucket-name {bucket_name}
                  s3-endpoint-url {s3.url}
                  s3-access-key {ACCESS_KEY}
                  s3-secret-key {SECRET_KEY}
                  {lines}
                  <filestorage>
                    path {tmp_path}/Data.fs
                  </filestorage>
                </s3blobstorage>
                """)
            opened.callback(storage.close)
            return storage

        yield make


@pytest.fixture
def open_mask():
    """Whatever is made is for everybody, unless somebody sees to that."""
    before = os.umask(0)
    yield
    os.umask(before)


def commit(storage, data, oid=OID, tid=None):
    """Commit a blob; with ``tid``, once more as that transaction. Returns its tid."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn, *([tid] if tid else []))
    try:
        path = os.path.join(storage.temporaryDirectory(), os.urandom(4).hex())
        Path(path).write_bytes(data)
        storage.storeBlob(oid, tid or ZERO, RECORD, path, "", txn)
        storage.tpc_vote(txn)
        return storage.tpc_finish(txn)
    except BaseException:
        storage.tpc_abort(txn)
        raise


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


# Clients: ZEO asks nobody for a password, and does as it is told. That is no reason to do what makes no sense.


@pytest.fixture(scope="module")
def server(running_s3, tmp_path_factory):
    """One server for all tests of clients: whatever they do, it goes on."""
    running_s3.behave()
    bucket = running_s3.bucket(f"security-{os.urandom(8).hex()}")  # a process may start it more than once
    with ZEOServer(tmp_path_factory.mktemp("server"), running_s3, bucket, metrics=True) as one:
        one.bucket = bucket
        yield one


ODD_IDS = {
    "nothing": b"",
    "too short": b"\0" * 7,
    "too long": b"\0" * 9,
    "a path": b"../../../../../../etc/passwd",
    "longer than a name of a file can be": b"\1" * 5000,
    "text": "12345678",
    "a number": 1,
    "none": None,
    "a list": [1, 2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("odd", ODD_IDS.values(), ids=ODD_IDS)
@pytest.mark.parametrize("place", ["oid", "tid"])
def test_what_cannot_be_an_oid_or_a_tid_becomes_neither_a_path_nor_a_key(s3, server, odd, place):
    client = server.client()
    name = commit_blob(client, b"data")
    s3.forget()
    logged = len(server.output())
    errors = server.metrics()("s3blobs_cache_errors_total", operation="read")
    with pytest.raises(Exception, match="8 bytes"):
        client._call("sendBlob", *((odd, name[1]) if place == "oid" else (name[0], odd)))
    assert s3.requests("GetObject") == []  # others may be those of the server's own, for the lease
    wait_for(lambda: leftovers(server) == [])
    assert server.metrics()("s3blobs_cache_errors_total", operation="read") == errors
    assert all(len(line) < TOO_LONG for line in server.output()[logged:].splitlines())
    assert blob(client, *name) == b"data"


@pytest.mark.parametrize("odd", [b"", b"\0" * 7, b"\xff" * 9, b"../../x"])
def test_a_blob_of_no_object_is_refused_and_nothing_of_it_stays(s3, server, odd):
    client = server.client()
    keys = s3.keys(server.bucket)
    txn = TransactionMetaData()
    client._call("tpc_begin", id(txn), b"", b"", {}, None, " ")
    client._async("storeBlobStart")
    client._async("storeBlobChunk", b"data")
    client._async("storeBlobEnd", odd, ZERO, RECORD, id(txn))
    with pytest.raises(StorageError, match="8 bytes"):
        client._call("vote", id(txn))
    client._call("tpc_abort", id(txn))
    wait_for(lambda: leftovers(server) == [])
    assert s3.keys(server.bucket) == keys
    commit_object(client)
    oid = client.new_oid()
    assert len(oid) == 8


@pytest.mark.parametrize("filename", ["../../victim.tmp", "/{victim}", "{victim}", "x.tmp", "..\\victim.tmp", "\0.tmp"])
def test_no_client_names_a_file_of_the_server(server, tmp_path, filename):
    victim = tmp_path / "victim.tmp"
    victim.write_bytes(b"not for ZEO")
    client = server.client()
    txn = TransactionMetaData()
    client._call("tpc_begin", id(txn), b"", b"", {}, None, " ")
    client._async("storeBlobShared", OID, ZERO, RECORD, filename.format(victim=victim), id(txn))
    with pytest.raises(StorageError, match="shared-blob-dir"):
        client._call("vote", id(txn))
    client._call("tpc_abort", id(txn))
    assert victim.read_bytes() == b"not for ZEO"


OUT_OF_ORDER = {
    "a chunk of nothing": [("storeBlobChunk", b"data")],
    "the end of nothing": [("storeBlobEnd", OID, ZERO, RECORD, 1)],
    "a blob without a transaction": [
        ("storeBlobStart",), ("storeBlobChunk", b"data"), ("storeBlobEnd", OID, ZERO, RECORD, 1)
    ],
    "two blobs at once": [("storeBlobStart",), ("storeBlobStart",)],
    "a chunk that is no bytes": [("storeBlobStart",), ("storeBlobChunk", 10**6)],
    "a chunk that is text": [("storeBlobStart",), ("storeBlobChunk", "text")],
    "a chunk too much": [("storeBlobStart",), ("storeBlobChunk", b"a", b"b")],
    "the blob of another transaction": [
        ("tpc_begin", 1, b"", b"", {}, None, " "), ("storeBlobStart",), ("storeBlobEnd", OID, ZERO, RECORD, 2)
    ],
    "what is no message": [("bind_storage", None)],
    "what is ours alone": [("_send", OID, TID, None)],
}  # fmt: skip


@pytest.mark.parametrize("messages", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_messages_out_of_order_end_the_connection_and_nothing_else(server, messages):
    other = server.client()
    with socket.create_connection(server.address, 30) as connection:
        encode = encoder(b"Z5")
        sent = [b"Z5", encode(1, False, "register", ("1", False))]
        sent += [encode(0, True, name, args) for name, *args in messages]
        connection.sendall(b"".join(len(message).to_bytes(4, "big") + message for message in sent))
        while connection.recv(1 << 16):
            pass  # to the end, which the server has to make
    wait_for(lambda: leftovers(server) == [])
    name = commit_blob(other, b"of the others")
    assert blob(other, *name) == b"of the others"


@pytest.mark.parametrize("call", ["vote", "tpc_finish"])
def test_a_commit_that_was_not_begun_takes_no_lock(server, call):
    client, other = server.client(), server.client()
    with contextlib.suppress(StorageError):
        client._call(call, 12345)
    client._call("tpc_begin", 7, b"", b"", {}, None, " ")
    with pytest.raises(Exception):  # noqa: B017 (ZEO's own, an assertion)
        client._call("tpc_finish", 7)
    commit_object(other)


def test_a_transaction_that_gives_itself_a_tid_writes_over_no_blob(s3, open_storage):
    storage = open_storage()
    tid = commit(storage, b"committed")
    with pytest.raises(StorageError, match="another blob"):
        commit(storage, b"forged", tid=tid)
    storage.close()
    again = open_storage(cache_dir=f"{storage.fshelper.base_dir}-2")
    assert Path(again.loadBlob(OID, tid)).read_bytes() == b"committed"


def test_an_undo_that_gives_itself_a_tid_writes_over_no_blob(s3, open_storage):
    storage = open_storage()
    commit(storage, b"first")
    tid = storage.lastTransaction()
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    path = os.path.join(storage.temporaryDirectory(), "second")
    Path(path).write_bytes(b"second")
    storage.storeBlob(OID, tid, RECORD, path, "", txn)
    storage.tpc_vote(txn)
    tid = storage.tpc_finish(txn)
    last = storage.undoLog(0, 1)[0]["id"]
    storage.tpc_begin(txn, tid)
    with pytest.raises(StorageError):
        storage.undo(last, txn)
        storage.tpc_vote(txn)
    storage.tpc_abort(txn)
    storage.close()
    again = open_storage(cache_dir=f"{storage.fshelper.base_dir}-2")
    assert Path(again.loadBlob(OID, tid)).read_bytes() == b"second"


# The bucket: others may write to it, and the service may be anything


def test_what_only_looks_like_a_key_is_neither_listed_nor_deleted(s3, bucket_name, bucket, collector, put, caplog):
    caplog.set_level(logging.DEBUG)
    odd = [
        "blobs/1/2.blob\n", "blobs/1/2.blob\x1b[2J", "blobs/../owner.txt", "blobs/1/../1/2.blob", "blobs//2.blob",
        "blobs/01/2.blob", "blobs/1/02.blob", "blobs/A/2.blob", "blobs/1/2.BLOB", "blobs/1/2.blob/3",
        "blobs/10000000000000000/1.blob", "blobs/-1/2.blob", "blobs/+1/2.blob", "blobs/1_0/2.blob", "blobs/0x1/2.blob",
        "blobs/\u0661/2.blob", "blobs/\uff11/2.blob", "blobs/1/2.blob?versionId=1", "blobs/ 1/2.blob", "blobs/1/2",
        "staged/" + "A" * 32, "staged/../blobs/1/2.blob", "staged/" + "a" * 32 + "\n", "blobs/" + "f" * 900,
    ]  # fmt: skip
    live = p64(7), TID
    _, key = put((OID, TID), live)
    s3.put(bucket_name, odd)
    assert set(odd) < set(s3.keys(bucket_name))
    assert {(found.oid, found.tid) for found in bucket.list_blobs()} == {(OID, TID), live}
    assert list(bucket.list_staged()) == []
    assert collector().collect(Base(live)) == 1
    assert sorted(s3.keys(bucket_name)) == sorted([*odd, key])
    assert all(map(is_harmless, said(caplog)))


@pytest.mark.parametrize("code", [EVIL.replace("\x1b", ""), "Internal Error", "x" * 100_000, ""])
@pytest.mark.parametrize("status", [400, 500])
def test_an_error_code_that_is_none_is_not_repeated(s3, open_bucket, new_file, caplog, code, status):
    caplog.set_level(logging.DEBUG)
    bucket = open_bucket(s3_max_attempts=1)
    s3.misbehave(status=status, code=code)
    path = new_file(b"data")
    for call in (bucket.probe, lambda: bucket.put(OID, TID, path), lambda: bucket.delete([(OID, TID), (TID, OID)])):
        with pytest.raises(BucketError) as caught:
            call()
        assert is_harmless(str(caught.value)) and str(status) in str(caught.value)
        assert is_harmless(bucket.last_answer[0] or "")
    assert all(map(is_harmless, said(caplog)))


def test_an_object_that_could_not_be_deleted_is_named_in_one_line(s3, bucket, put):
    put((OID, TID), (TID, OID))
    body = f"<DeleteResult><Error><Key>{EVIL}</Key><Code>{EVIL}</Code></Error></DeleteResult>".replace("\x1b", "")
    s3.misbehave(operation="DeleteObjects", status=200, body=body)
    with pytest.raises(BucketError) as caught:
        bucket.delete([(OID, TID), (TID, OID)])
    assert is_harmless(str(caught.value))


@pytest.mark.parametrize("value", ["\x1b]0;owned\x07", "A" * 2000, "\x9b2K", "a\r\n CRITICAL forged"])
def test_a_checksum_that_is_none_fails_and_is_not_repeated_as_it_is(s3, bucket, open_cache, put, caplog, value):
    put((OID, TID))
    s3.misbehave(operation="GetObject", headers={"x-amz-meta-sha256": value})
    with pytest.raises(BlobDamaged) as caught:
        bucket.get(OID, TID, open_cache().new_file())
    assert is_harmless(str(caught.value))
    assert all(map(is_harmless, said(caplog)))


ANOTHER = dict.fromkeys(("owner", "host", "home", "storage", "started", "renewed", "database"), EVIL)
HOSTILE_OWNERS = {
    "nested too deep": b"[" * 500_000,
    "nested deep in a field": b'{"format": 1, "owner": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "a version that is no number": b'{"format": NaN}',
    "an infinite version": b'{"format": 1e999}',
    "a version of a million digits": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "lines for the log": json.dumps({"format": 1, **ANOTHER}).encode(),
    "what no terminal can show": b'{"format": 1, "owner": "\\ud800", "started": "\\u001b[2J"}',
    "long fields": json.dumps({"format": 1, **dict.fromkeys(ANOTHER, "x" * 100_000)}).encode(),
    "other types": b'{"format": "1", "owner": {"a": [1]}, "host": null, "started": 1e9}',
    "more than is read": b" " * (20 << 20) + b'{"format": 1}',
    "no text": b"\xff\xfe\x00" * 1000,
}


@pytest.mark.parametrize("data", HOSTILE_OWNERS.values(), ids=HOSTILE_OWNERS)
def test_whatever_owner_json_says_it_keeps_the_prefix(s3, bucket_name, bucket, caplog, data):
    s3.client.put_object(Bucket=bucket_name, Key="owner.json", Body=data)
    lease = Lease(bucket, FakeDatabase(), Metrics(), "1")
    tracemalloc.start()
    try:
        with pytest.raises(NotOwner) as caught:
            lease.renew_now()
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert is_harmless(str(caught.value))
    assert all(map(is_harmless, said(caplog)))
    date = formatdate(time.time() + STALE_AFTER + 60, usegmt=True)
    s3.misbehave(operation="OwnerGetObject", headers={"Date": date})
    with pytest.raises(NotOwner, match="zodb-s3blobs adopt"):
        lease.renew_now()


def marks_object(s3, bucket_name, data):
    s3.client.put_object(Bucket=bucket_name, Key="gc-marks.jsonl", Body=data)


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b'{"oid": "' + EVIL.encode() + b'"}', b'{"oid": 1e999}'], ids=["deep", "evil", "infinite"]
)
def test_marks_of_somebody_else_are_not_repeated_in_the_error(s3, bucket_name, bucket, cache, caplog, data):
    marks_object(s3, bucket_name, data)
    with pytest.raises(BucketError, match=r"line 1.*delete it") as caught:
        marks.fetch(bucket, cache)
    assert is_harmless(str(caught.value))
    assert all(map(is_harmless, said(caplog)))


def test_a_line_of_the_marks_without_an_end_is_not_read_into_memory(s3, bucket_name, bucket, cache):
    marks_object(s3, bucket_name, b" " * (30 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BucketError, match="delete it"):
            marks.fetch(bucket, cache)
        assert tracemalloc.get_traced_memory()[1] < 15 << 20
    finally:
        tracemalloc.stop()


def test_marks_that_would_fill_the_disk_are_not_even_fetched(s3, bucket_name, bucket, cache):
    marks_object(s3, bucket_name, b"x")
    claimed = 20 << 30
    s3.misbehave(operation="GetObject", headers={"Content-Range": f"bytes 0-0/{claimed}"})
    s3.forget()
    with pytest.raises(BucketError, match=r"gc-marks.jsonl.*larger than.*delete it"):
        marks.fetch(bucket, cache)
    assert len(s3.requests("GetObject")) == 1
    assert os.listdir(cache.directory / "incoming") == []


# Secrets


def everything_about(error):
    """What a tool that reports errors could show: the text, and the variables of all our frames."""
    shown = ["".join(traceback.format_exception(error))]
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "/zodb_s3blobs/" in frame.f_code.co_filename:
                shown.append(repr(frame.f_locals))
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


FAULTS = {
    "refused": {"status": 403, "code": "SignatureDoesNotMatch", "message": " ".join(SECRETS[:2] + SECRETS[3:])},
    "a redirect": {"status": 301, "code": "PermanentRedirect", "message": " ".join(SECRETS[:2])},
    "not XML": {"status": 400, "body": " ".join(SECRETS)},
    "broken": {"status": 500, "code": "InternalError"},
    "no answer": {"reset": True},
    "a lost answer": {"lose": True},
    "half an answer": {"truncate": 3},
    "a damaged answer": {"flip": True},
    "an odd header": {"headers": {"ETag": "odd", "x-amz-meta-sha256": "odd"}},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_failure_shows_a_secret(s3, bucket_name, open_bucket, open_cache, new_file, caplog, capfd, fault):
    caplog.set_level(logging.DEBUG)  # the root logger's, as somebody has set it who looks for something else
    bucket = open_bucket(
        s3_access_key=ACCESS_KEY,
        s3_secret_key=SECRET_KEY,
        s3_session_token=TOKEN,
        s3_sse_customer_key=CUSTOMER_KEY,
        s3_max_attempts=1,
    )
    small, large = new_file(b"data"), new_file(os.urandom(9 << 20))
    target = open_cache().new_file()
    s3.client.put_object(
        Bucket=bucket_name, Key=bucket.keys.key(OID, TID), Body=b"data", SSECustomerAlgorithm="AES256",
        SSECustomerKey=CUSTOMER_KEY,
    )  # fmt: skip
    for pattern in ".*", "Owner.*":
        s3.misbehave(operation=pattern, **fault)
    shown = []
    for call in (
        bucket.probe,
        lambda: bucket.put(OID, TID, small),
        lambda: bucket.put(OID, TID, large),
        lambda: bucket.put_staged("a" * 32, small),
        lambda: bucket.publish(bucket.keys.staged_key("a" * 32), OID, TID, 4, "0" * 64),
        lambda: bucket.get(OID, TID, target),
        lambda: bucket.verify(OID, TID),
        lambda: bucket.find(OID, TID, small),
        lambda: bucket.copy(OID, TID, OID),
        lambda: bucket.delete([(OID, TID), (TID, OID)]),
        lambda: bucket.write_owner(b"{}", None),
        bucket.read_owner,
        lambda: list(bucket.list_blobs()),
        lambda: bucket.ask("get_object", Key="x", **bucket.read_options),
    ):
        try:
            call()
        except (BucketError, BlobNotFound) as error:
            shown.append(everything_about(error))
    assert shown
    shown += [repr(bucket), repr(vars(bucket)), str(bucket.last_answer), caplog.text, *capfd.readouterr()]
    for secret in SECRETS:
        assert not any(secret in text for text in shown)


def test_a_server_with_trouble_tells_nobody_a_secret(s3, bucket_name, tmp_path):
    options = {"s3_read_timeout": "1s", "s3_max_attempts": 1}
    with ZEOServer(tmp_path, s3, bucket_name, metrics=True, options=options) as server:
        client = server.client()
        s3.misbehave(status=403, code="SignatureDoesNotMatch", message="test-secret AWS test:test-secret")
        with pytest.raises(StorageError) as caught:
            commit_blob(client)
        told = [str(caught.value), server.output(), server.metrics().text]
        told += [answer(server.metrics_address, path) for path in ("/-/ready", "/-/healthy", "/", "/metrics?name[]=x")]
        server.stop()
        told.append(server.output())
    assert not any("test-secret" in text for text in told)


# The endpoint of the metrics: whoever can reach it may ask


def answer(address, path):
    """All that comes back for a GET."""
    with socket.create_connection(address, 30) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: evil.example\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


@pytest.mark.parametrize("path", ["/<script>alert(1)</script>", "/metrics/../../etc/passwd", "/%0d%0aX-Evil:%201"])
def test_the_endpoint_repeats_nothing_that_it_was_asked(open_storage, path):
    address = free_address()
    open_storage(metrics_address="{}:{}".format(*address))
    said = answer(address, path)
    assert " 404 " in said.splitlines()[0]
    assert not any(word in said for word in ("script", "passwd", "Evil", "evil.example"))


def test_whatever_a_label_holds_the_figures_stay_the_figures(open_storage):
    address = free_address()
    prefix = 'a"b\\c"} 1 s3blobs_bucket_up{storage="forged"} 1'  # refused by the section
    info = open_storage(metrics_address="{}:{}".format(*address)).metrics.storage_info
    info.clear()
    info.labels("a bucket", prefix, "an endpoint").set(1)
    body = answer(address, "/metrics").partition("\r\n\r\n")[2]
    samples = [sample for family in text_string_to_metric_families(body) for sample in family.samples]
    (info,) = [sample.labels for sample in samples if sample.name == "s3blobs_storage_info"]
    assert info["prefix"] == prefix
    assert {sample.labels["storage"] for sample in samples if "storage" in sample.labels} == {"1"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the open files of a process in /proc")
def test_connections_to_the_endpoint_do_not_use_up_what_the_server_needs(s3, bucket_name, tmp_path):
    with ZEOServer(tmp_path, s3, bucket_name, metrics=True) as server, contextlib.ExitStack() as stack:
        client = server.client()

        def files():
            return len(os.listdir(f"/proc/{server.pid}/fd"))

        before = files()
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(server.metrics_address, 30))
            connection.sendall(b"GET /metr")  # and no more
        assert server.metrics()("s3blobs_bucket_up") == 1  # those that came before are in nobody's way
        wait_for(lambda: files() < before + 100, timeout=5)  # long before they are cut for their silence
        assert blob(client, *commit_blob(client, b"data")) == b"data"


# The disk: blobs are private


def test_a_new_cache_directory_is_for_its_owner_alone_whatever_the_umask_is(s3, open_storage, open_mask, background):
    storage = open_storage()
    committed = commit(storage, b"data", p64(7))
    s3.forget()
    s3.misbehave(operation="PutObject", hang=True)
    under_way = background(commit, storage, b"on its way")
    s3.wait_for("PutObject")
    top = Path(storage.fshelper.base_dir)
    (incoming,) = (top / "incoming").iterdir()
    assert incoming.read_bytes() == b"on its way"
    assert mode(top) == 0o700
    folders = [path for path in top.rglob("*") if path.is_dir()]
    assert {mode(path) for path in folders} == {0o700}
    assert mode(storage.fshelper.getBlobFilename(p64(7), committed)) == 0o400
    s3.behave()
    under_way.result(60)


def test_what_is_fetched_and_what_zeo_receives_is_for_the_owner_alone(s3, put, open_cache, bucket, open_mask):
    put((OID, TID))
    cache = open_cache()
    file = cache.new_file()
    assert mode(file.path) == 0o600
    bucket.get(OID, TID, file)
    assert mode(file.path) == 0o600
    with file.publish(OID, TID) as path:
        assert mode(path) == 0o400


@pytest.mark.parametrize("open_to, warned", [(0o700, False), (0o750, False), (0o755, True), (0o777, True)])
def test_a_cache_directory_that_is_open_to_everybody_is_told_of(tmp_path, caplog, open_to, warned):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(open_to)
    Cache(tmp_path / "cache", 1000, Metrics()).close()
    assert ["chmod o-rwx" in text for text in said(caplog) if "every user" in text] == [True] * warned


@pytest.mark.parametrize("folder", ["tmp", "incoming"])
def test_a_link_in_place_of_a_folder_of_the_cache_costs_nobody_a_file(tmp_path, folder):
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "file").write_bytes(b"dear")
    Cache(tmp_path / "cache", 1000, Metrics()).close()
    (tmp_path / "cache" / folder).rmdir()
    (tmp_path / "cache" / folder).symlink_to(victim)
    with pytest.raises(CacheDirectoryError):
        Cache(tmp_path / "cache", 1000, Metrics())
    assert (victim / "file").read_bytes() == b"dear"


def test_a_link_among_the_blobs_is_not_served(tmp_path):
    (tmp_path / "private").write_bytes(b"not for clients")
    cache = Cache(tmp_path / "cache", 1 << 20, Metrics())
    try:
        for write in b"not for clients", b"a blob":
            file = cache.new_file()
            file.write_at(write, 0)
            file.publish(OID, TID).release()
            path = Path(path_in(tmp_path / "cache", OID, TID))
            path.unlink()
            path.symlink_to(tmp_path / "private")
            assert cache.get(OID, TID) is cache.prove(OID, TID) is None
        before = os.stat(tmp_path / "private").st_mtime_ns
    finally:
        cache.close()
    path.symlink_to(tmp_path / "private")
    cache = Cache(tmp_path / "cache", 1 << 20, Metrics())
    try:
        assert cache.get(OID, TID) is cache.prove(OID, TID) is None
        assert os.stat(tmp_path / "private").st_mtime_ns == before
        assert (tmp_path / "private").read_bytes() == b"not for clients"
    finally:
        cache.close()


@pytest.mark.parametrize("umask, readable", [(0o077, 0), (0o027, 0o040), (0o022, 0o044)])
def test_an_exported_blob_is_for_those_for_whom_its_folder_is(tmp_path, umask, readable):
    before = os.umask(umask)
    try:
        directory = BlobDirectory.create(str(tmp_path / "blobs"))
        file = directory.new_file()
        file.write_at(b"data", 0)
        assert mode(file.path) == 0o600
        file.publish(OID, TID)
    finally:
        os.umask(before)
    assert mode(directory.find(OID, TID)) == 0o400 | readable


# The commands


def test_the_name_of_a_class_in_the_database_is_shown_in_one_line():
    storage = MappingStorage()
    records = {
        z64: b"cpersistent.mapping\nPersistentMapping\n.}.",
        p64(5): b"capp\nEvil\x1b[2J"
        + b"x" * 1000
        + b"\n.}X\x04\x00\x00\x00fileU\x08\x00\x00\x00\x00\x00\x00\x00\x06Qs.",
        p64(6): b"cZODB.blob\nBlob\n.N.",
    }
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    for oid, record in records.items():
        storage.store(oid, z64, record, "", txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
    (path,) = paths.find(storage, {p64(6)}).values()
    assert path.startswith("[") and path.endswith("/file")
    assert path.isprintable() and len(path) < 300


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is an address of every Linux alone")
def test_the_demo_listens_on_the_loopback_address_alone(tmp_path):
    with demo._own_environment(), demo.S3Server() as s3, demo.ZEOServer(tmp_path / "server", s3.url) as server:
        server.start()
        for port in (
            int(url.rpartition(":")[2].partition("/")[0]) for url in (s3.url, server.address, server.metrics_url)
        ):
            socket.create_connection(("127.0.0.1", port), 10).close()
            with pytest.raises(ConnectionRefusedError):
                # Whoever listens on all addresses answers here as well.
                socket.create_connection(("127.0.0.2", port), 10).close()
    assert mode(tmp_path / "server" / "blobcache") == 0o700
