"""What tests do as clients of a ZEO server: commit and read objects and blobs, and wait for what follows."""

import contextlib
import os
import pickle
from pathlib import Path

from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.utils import z64

from tests.support.waiting import wait_for
from zodb_s3blobs.cache.directory import path_in

RECORD = zodb_pickle(Blob())
#: The record of a Blob as a ZODB.DB stores it. Only of this one does ZODB say that it is that of a blob.
BLOB_RECORD = pickle.dumps(Blob, 3) + pickle.dumps(None, 3)
MAXTID = b"\x7f" + b"\xff" * 7
MB = 1 << 20
#: Far above what anything takes that does not wait for S3, far below the faults of these tests.
SOON = 10


def write(db, name, data):
    with db.transaction() as connection:
        root = connection.root()
        if name not in root:
            root[name] = Blob()
        with root[name].open("w") as file:
            file.write(data)


def read(db, name):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


def load(client):
    """A load that goes to the server, whether or not there is a root object yet."""
    with contextlib.suppress(POSKeyError):
        client._call("loadBefore", z64, MAXTID)


def commit_object(client, value="x"):
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(client.new_oid(), ZERO, zodb_pickle(MinPO(value)), "", txn)
    client.tpc_vote(txn)
    return client.tpc_finish(txn)


def commit_blob(client, data=b"data", oid=None, record=RECORD):
    """Returns (oid, tid)."""
    oid = oid or client.new_oid()
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    try:
        store_blob(client, oid, data, txn, record=record)
        client.tpc_vote(txn)
        return oid, client.tpc_finish(txn)
    except BaseException:
        client.tpc_abort(txn)
        raise


def store_blob(client, oid, data, txn, serial=ZERO, record=RECORD):
    path = os.path.join(client.temporaryDirectory(), os.urandom(4).hex())
    with open(path, "wb") as file:
        file.write(data)
    client.storeBlob(oid, serial, record, path, "", txn)


def name_of(blob):
    """The oid and the serial of a Blob, which is not loaded: that would fetch its file."""
    return blob._p_oid, blob._p_jar._storage.load(blob._p_oid)[1]


def blob(client, oid, tid):
    with open(client.loadBlob(oid, tid), "rb") as file:
        return file.read()


def cached_path(server, oid, tid):
    """Where the blob's file is when the server has it in its cache."""
    return Path(path_in(server.cache_dir, oid, tid))


def uncache(server, oid, tid):
    """Let only the bucket have a blob that was committed: its file gets into the cache a moment after the commit."""
    path = cached_path(server, oid, tid)
    wait_for(path.exists)
    path.unlink()


def leftovers(server):
    return os.listdir(server.cache_dir / "tmp") + os.listdir(server.cache_dir / "incoming")


def operations(s3):
    return [request.operation for request in s3.requests()]
