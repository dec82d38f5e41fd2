"""Links in one process, without ZEO: of a FileStorage, of RelStorage, and with encryption by a key of one's own."""

import base64
import socket
import threading
import urllib.request

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import StorageError
from ZODB.utils import p64, z64

from tests.support.sites import put
from tests.support.speed import slow
from tests.support.zeo_clients import BLOB_RECORD, name_of
from tests.support.zeo_server import FILESTORAGE, SECTION

HOUR = {"presigned_urls": "1h"}


def follow(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.headers, answer.read()


@pytest.fixture
def open_storage(s3, bucket_name, tmp_path):
    """Opens a storage around a FileStorage; keywords are keys of its section."""
    opened = []

    def open_storage(endpoint=s3.url, **options):
        section = SECTION.format(
            name="1",
            bucket=bucket_name,
            endpoint=endpoint,
            dir=tmp_path,
            cache="cache",
            options="\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items()),
            base=FILESTORAGE.format(dir=tmp_path),
        )
        opened.append(storageFromString(f"%import zodb_s3blobs\n{section}"))
        return opened[-1]

    yield open_storage
    for storage in opened:
        storage.close()


def test_an_application_asks_the_storage_of_its_database(s3, open_storage):
    db = ZODB.DB(open_storage(**HOUR))
    put(db, "report", b"the report")
    s3.forget()
    with db.transaction() as connection:
        name = name_of(connection.root()["report"])
        url = db.storage.presigned_url(
            *name, content_type="text/plain", filename="a.txt", disposition="inline", seconds=60
        )
    assert s3.requests() == []
    headers, data = follow(url)
    assert data == b"the report"
    assert (headers["Content-Type"], headers["Content-Disposition"]) == ("text/plain", 'inline; filename="a.txt"')


def test_wrong_arguments_are_storage_errors_as_through_zeo(open_storage):
    storage = open_storage(**HOUR)
    with pytest.raises(StorageError, match="seconds of a link must be a number above 0, at most 3600"):
        storage.presigned_url(p64(1), p64(1), seconds=3601)
    with pytest.raises(StorageError, match="8 bytes each"):
        storage.presigned_url(1, p64(1))


def test_an_uncommitted_blob_has_no_link(open_storage, new_file):
    storage = open_storage(**HOUR)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.storeBlob(p64(1), z64, BLOB_RECORD, new_file(b"data"), "", txn)
    storage.tpc_vote(txn)
    tid = storage.base._tid
    assert storage.presigned_url(p64(1), tid) is None
    assert storage.tpc_finish(txn) == tid
    assert follow(storage.presigned_url(p64(1), tid))[1] == b"data"


@slow
def test_with_a_customer_key_there_is_no_link_and_the_log_says_why(tmp_path, open_storage, caplog, no_aws_settings):
    base = FileStorage(str(tmp_path / "Data.fs"))
    txn = TransactionMetaData()
    base.tpc_begin(txn)
    base.store(p64(1), z64, BLOB_RECORD, "", txn)
    base.tpc_vote(txn)
    tid = base.tpc_finish(txn)
    base.close()
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        endpoint = f"https://127.0.0.1:{nobody_listens.getsockname()[1]}"
        storage = open_storage(endpoint, s3_sse_customer_key=base64.b64encode(bytes(32)).decode(), **HOUR)
        assert storage.presigned_url(p64(1), tid) is None
        storage.close()
    assert "presigned-urls has no effect" in caplog.text


# RelStorage


def test_an_application_on_relstorage_asks_its_connection_or_its_database(s3, application):
    db, other = application.db(**HOUR), application.db(cache="other", **HOUR)
    with db.transaction() as connection:
        connection.root()["report"] = Blob(b"first")
    connection = db.open()
    first = name_of(connection.root()["report"])
    for storage in connection._storage, db.storage:
        assert follow(storage.presigned_url(*first, filename="a.txt"))[1] == b"first"
        assert storage.presigned_url(first[0], p64(1)) is None
        assert storage.presigned_url(z64, connection.root()._p_serial) is None
    assert other.storage.presigned_url(*first) is not None  # it has never polled
    with other.transaction() as another, another.root()["report"].open("w") as file:
        file.write(b"second")
    with other.transaction() as another:
        second = name_of(another.root()["report"])
    assert follow(db.storage.presigned_url(*second))[1] == b"second"  # what another process has committed
    transaction.abort()
    connection.close()
    db.close()
    other.close()


def test_threads_share_the_storage_of_a_database_on_relstorage(application):
    db = application.db(**HOUR)
    with db.transaction() as connection:
        connection.root()["report"] = Blob(b"data")
    with db.transaction() as connection:
        name = name_of(connection.root()["report"])
    urls = []

    def ask():
        for _ in range(5):
            urls.append(db.storage.presigned_url(*name))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(urls) == 40
    assert None not in urls
    db.close()
