"""Links through ZEO: a stock client asks for them, and plain HTTP reads the blob from the service itself."""

import base64
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import Blob
from ZODB.POSException import StorageError
from ZODB.utils import p64, z64

from tests.support.s3_services import SERVICES, Service
from tests.support.sites import put, undo
from tests.support.speed import slow
from tests.support.web_server import WebServer
from tests.support.zeo_clients import BLOB_RECORD, SOON, commit_blob, commit_object, load, name_of, operations, wait_for
from tests.support.zeo_server import DEMO, FILESTORAGE, SECTION, ZEOServer, fallback_bucket

REQUESTS, GIVEN = "s3blobs_presigned_url_requests_total", "s3blobs_presigned_urls_total"
HOUR = {"presigned_urls": "1h"}


def commit(client, data=b"data"):
    """Commit a blob; returns (oid, tid)."""
    return commit_blob(client, data, record=BLOB_RECORD)


def ask(client, oid, serial, *wanted):
    """Ask for a link, as an application does."""
    return client._call("presigned_url", oid, serial, *wanted)


def follow(url, ca=None, **headers):
    """Read what the link leads to, as a browser does; returns status, headers and bytes."""
    context = ssl.create_default_context(cafile=ca)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=60, context=context
        ) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.headers, refusal.read()


def counted(server):
    figures = server.metrics()
    return figures(REQUESTS), figures(GIVEN)


@pytest.fixture
def server(start):
    return start(options=HOUR, metrics=True)


# Links


@pytest.fixture
def link():
    """The function that the manual tells applications to keep."""
    manual = Path(__file__).parents[2] / "zeo-configs" / "LINKS.md"
    [function] = re.findall(r"(?ms)^```python\n(def link\(.*?)^```$", manual.read_text())
    namespace = {}
    exec(function, namespace)
    return namespace["link"]


@pytest.mark.parametrize("protocol", ["pickle", "msgpack"])
def test_a_link_leads_to_the_bytes_of_the_blob_with_type_and_name(s3, start, link, protocol):
    server = start(options=HOUR, metrics=True, zeo={"msgpack": "true"} if protocol == "msgpack" else None)
    with server.db().transaction() as connection:
        connection.root()["report"] = Blob(b"the report " * 1000)
    s3.forget()
    with server.db().transaction() as connection:
        url = link(connection.root()["report"], "text/plain", "Übersicht.txt", "attachment", 60)
    assert operations(s3) == []
    status, headers, data = follow(url)
    assert (status, data) == (200, b"the report " * 1000)
    assert headers["Content-Type"] == "text/plain"
    assert headers["Content-Disposition"] == (
        "attachment; filename=\"Ubersicht.txt\"; filename*=UTF-8''%C3%9Cbersicht.txt"
    )
    assert operations(s3) == ["GetObject"]
    assert counted(server) == (1, 1)
    assert server.metrics()("s3blobs_cache_requests_total") == 0  # the client did not fetch the file for that


def test_a_link_lasts_as_long_as_presigned_urls_says_or_less(server):
    name = commit(client := server.client())
    for seconds, expires in [((), "3600"), ((None,), "3600"), ((3600,), "3600"), ((59.5,), "60")]:
        query = parse_qs(
            urlsplit(ask(client, *name, None, None, None, *seconds) if seconds else ask(client, *name)).query
        )
        assert query["X-Amz-Expires"] == [expires]
        assert "response-content-type" not in query


def test_a_link_leads_to_the_public_endpoint(start):
    server = start(options={**HOUR, "s3_public_endpoint_url": "https://files.example.com"})
    name = commit(client := server.client())
    assert urlsplit(ask(client, *name)).netloc == "files.example.com"


def test_old_and_undone_revisions_have_links_until_a_pack(server):
    db, names = server.db(), []
    for change in b"first", b"second", None:
        if change is None:
            undo(db)
        else:
            put(db, "blob", change)
        with db.transaction() as connection:
            names.append(name_of(connection.root()["blob"]))
    assert len(set(names)) == 3
    assert [follow(ask(db.storage, *name))[2] for name in names] == [b"first", b"second", b"first"]
    db.pack()
    assert [ask(db.storage, *name) is not None for name in names] == [False, False, True]


@pytest.mark.parametrize("read_only", ["the client", "the storage"])
def test_a_client_that_only_reads_gets_links(start, read_only):
    server = start(options=HOUR)
    name = commit(server.client(), b"to be read")
    if read_only == "the storage":
        server.stop()
        server = start(options=HOUR, base=FILESTORAGE.replace("</", " read-only true\n</"))
    assert follow(ask(server.client(read_only=True), *name))[2] == b"to be read"


ZLIB = "<zlibstorage 1>\n {base}\n</zlibstorage>"


@pytest.mark.parametrize("outside", ["demostorage", "zlibstorage"])
def test_links_come_through_storages_around_ours(start, tmp_path, outside):
    production = start()
    name = commit(production.client(), b"of production")
    production.stop()
    around = DEMO if outside == "demostorage" else ZLIB
    server = start(options=HOUR, storages=lambda zeo: around.format(dir=tmp_path, base=SECTION.format(**zeo)))
    client = server.client()
    assert follow(ask(client, *name))[2] == b"of production"
    new = ask(client, *commit(client, b"new"))
    if outside == "demostorage":
        assert new is None  # it is in the changes, and not in the bucket
    else:
        assert follow(new)[2] == b"new"


# No link


def test_what_is_no_committed_blob_has_no_link(server):
    client = server.db().storage
    oid, tid = commit(client)
    assert ask(client, oid, tid) is not None
    for name in [
        (oid, p64(1)),
        (oid, b"\x7f" + b"\xff" * 7),
        (p64(1 << 40), tid),
        (z64, client.getTid(z64)),  # the root, which is no blob
    ]:
        assert ask(client, *name) is None
    assert counted(server) == (5, 1)


def test_without_presigned_urls_there_is_no_link(start):
    server = start(metrics=True)
    name = commit(client := server.client())
    assert ask(client, *name) is None
    assert counted(server) == (1, 0)
    with pytest.raises(StorageError, match="content_type"):  # as it would be with links
        ask(client, *name, "text")


def test_a_blob_that_may_be_in_the_fallback_alone_has_no_link(site, start):
    server = start(options={**HOUR, "fallback_blob_dir": site.blob_dir}, metrics=True)
    client = server.client()
    for name in site.revisions:
        assert ask(client, *name) is None
    new = commit(client, b"in the bucket")
    assert follow(ask(client, *new))[2] == b"in the bucket"
    site.blob_dir.rename(f"{site.blob_dir}-unmounted")
    assert ask(client, *new) is None  # nothing tells that it is not there


def test_a_blob_that_only_the_second_bucket_has_has_no_link(s3, site, start):
    inside = fallback_bucket(s3, s3.bucket(f"second-{uuid.uuid4().hex}"))
    server = start(base=FILESTORAGE + inside, options={**HOUR, "s3_max_attempts": 1}, metrics=True)
    client = server.client()
    assert ask(client, *next(iter(site.revisions))) is None
    s3.forget()
    new = commit(client, b"in the bucket")
    assert follow(ask(client, *new))[2] == b"in the bucket"
    assert len(s3.requests("HeadObject")) == 1
    for operation in ".*", "Owner.*":  # any answer would be a sign of life
        s3.misbehave(operation=operation, reset=True)
    assert ask(client, *new) is None  # nothing tells that it is there
    s3.forget()
    assert [ask(client, *new) for _ in range(3)] == [None] * 3
    assert s3.requests("HeadObject") == []  # or each link would wait for a bucket that does not answer
    s3.behave()
    commit(client, b"it answers again")
    assert follow(ask(client, *new))[2] == b"in the bucket"


# Wrong arguments

LARGE = "secret " * 20_000


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (("oid", 1), "8 bytes each"),
        (("oid", None), "8 bytes each"),
        (("oid", "12345678"), "8 bytes each"),
        (("serial", b"1234567"), "8 bytes each"),
        (("serial", [b"12345678"]), "8 bytes each"),
        (("content_type", "text/plain\r\nSet-Cookie: a=b"), "content_type of a link must be a media type"),
        (("content_type", LARGE), "content_type of a link must be a media type"),
        (("content_type", {"a": 1}), "content_type of a link must be a media type"),
        (("filename", b"name"), "filename of a link must be a text"),
        (("filename", [[]] * 5), "filename of a link must be a text"),
        (("disposition", LARGE), "disposition of a link must be"),
        (("disposition", {}), "disposition of a link must be"),
        (("seconds", 3601), "at most 3600: see presigned-urls"),
        (("seconds", 0), "above 0"),
        (("seconds", float("nan")), "above 0"),
        (("seconds", LARGE), "must be a number"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_a_wrong_argument_is_told_to_the_client_alone(shared_server, wanted, sentence):
    server, client, name = shared_server
    which, value = wanted
    arguments = dict.fromkeys(("oid", "serial", "content_type", "filename", "disposition", "seconds"))
    arguments.update(oid=name[0], serial=name[1])
    arguments[which] = value
    before = server.output()
    with pytest.raises(StorageError, match=sentence) as caught:
        ask(client, *arguments.values())
    assert not isinstance(caught.value, ClientDisconnected)
    assert "secret" not in str(caught.value)
    assert ask(client, *name) is not None
    assert server.output() == before


@pytest.fixture(scope="module")
def shared_server(running_s3, tmp_path_factory):
    """A server with links, a client, and a blob, for tests that leave them as they are."""
    running_s3.behave()
    bucket = running_s3.bucket("bucket-of-links")
    with ZEOServer(tmp_path_factory.mktemp("links"), running_s3, bucket, options=HOUR) as server:
        client = server.client()
        yield server, client, commit(client)


@pytest.mark.parametrize("arguments", [(), (b"12345678",), (b"12345678",) * 7])
def test_a_wrong_number_of_arguments_is_a_type_error(shared_server, arguments):
    _, client, name = shared_server
    with pytest.raises(TypeError, match="presigned_url"):
        client._call("presigned_url", *arguments)
    assert ask(client, *name) is not None


def test_a_long_file_name_is_cut(shared_server):
    _, client, name = shared_server
    url = ask(client, *name, None, "ü" * 5_000_000 + ".pdf")
    assert len(url) < 2500
    assert follow(url)[1]["Content-Disposition"].endswith(".pdf")


def test_a_call_that_wants_no_answer_does_no_harm(shared_server):
    _, client, name = shared_server
    client._async("presigned_url", *name)
    client._async("presigned_url", *name, "text")
    assert ask(client, *name) is not None


def test_other_methods_stay_forbidden(server):
    """The set of methods is that of ZEO, and this one."""
    client = server.client(wait_timeout=10)
    commit(client)
    with pytest.raises((ClientDisconnected, StorageError)):
        client._call("request_presigned_url", None, ())
    wait_for(lambda: "Invalid method, 'request_presigned_url'" in server.output())


# The event loop

NO_KEYS = "\n".join(line for line in SECTION.splitlines() if "access-key" not in line and "secret-key" not in line)


class Credentials:
    """Answers as the service from which containers get their credentials: each time new ones, that soon expire."""

    def __init__(self):
        self.status = 200
        self.go_on = threading.Event()
        self.go_on.set()
        self.waiting = threading.Event()

    def __call__(self, *request):
        if not self.go_on.is_set():
            self.waiting.set()
            self.go_on.wait(60)
        if self.status != 200:
            return self.status, {}, b""
        soon = datetime.now(timezone.utc) + timedelta(minutes=5)  # boto3 renews them from 10 minutes before the end
        keys = {"AccessKeyId": "test", "SecretAccessKey": "test-secret", "Token": "token-of-this-test"}
        return 200, {}, json.dumps({**keys, "Expiration": soon.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()


def test_a_link_that_waits_for_new_credentials_holds_up_nobody_else(start, no_aws_settings, monkeypatch, background):
    credentials = Credentials()
    with WebServer(credentials) as service:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.url)
        server = start(options=HOUR, stock=True, storages=lambda zeo: NO_KEYS.format(**zeo))
        client, other = server.client(), server.client()
        name = commit(client)
        assert parse_qs(urlsplit(ask(client, *name)).query)["X-Amz-Security-Token"] == ["token-of-this-test"]
        credentials.go_on.clear()
        asked = [background(ask, client, *name) for _ in range(10)]
        assert credentials.waiting.wait(60)
        began = time.monotonic()
        load(other)
        commit_object(other)
        load(client)  # the one that waits for its link as well
        assert time.monotonic() - began < SOON
        assert not any(one.done() for one in asked)
        vanishing = server.client()
        asked_in_vain = background(ask, vanishing, *name)
        vanishing.close()
        credentials.go_on.set()
        for one in asked:
            assert urlsplit(one.result(60)).path.endswith(".blob")
        with pytest.raises(ClientDisconnected):
            asked_in_vain.result(60)
        assert ask(other, *name) is not None
    assert "Traceback" not in server.output()


@slow
def test_without_new_credentials_the_client_and_the_log_get_a_sentence(start, no_aws_settings, monkeypatch):
    credentials = Credentials()
    with WebServer(credentials) as service:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.url)
        server = start(options=HOUR, stock=True, storages=lambda zeo: NO_KEYS.format(**zeo))
        name = commit(client := server.client())
        credentials.status = 403
        with pytest.raises(StorageError, match=r"Could not sign a link to .*; check s3-access-key") as caught:
            ask(client, *name)
    log = server.output()
    assert "ERROR zodb_s3blobs.linker Could not sign a link to" in log
    assert "test-secret" not in log + str(caught.value)


# Services that compare signatures

SERVICE_SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-prefix site=1,a~b
  s3-endpoint-url {endpoint}
  s3-region {region}
  s3-access-key {access}
  s3-secret-key {secret}
  s3-checksums {checksums}
  {more}
  cache-dir {dir}/cache
  presigned-urls 7d
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""

REAL = [
    name
    for name in SERVICES
    if not name.startswith("moto") and (not name.startswith("real") or "S3BLOBS_TEST_ENDPOINT" in os.environ)
]


@pytest.fixture(params=REAL)
def real(request, tmp_path):
    """A service that compares signatures, and a server with its blobs there."""
    with Service(request.param) as service:
        if service.setting:
            service.needs(service.setting)
        more = f"s3-ca-file {service.ca}" if service.ca else ""
        if service.customer_key:
            more += f"\ns3-sse-customer-key {base64.b64encode(service.customer_key).decode()}"
        text = SERVICE_SECTION.format(**{**vars(service), "more": more, "dir": tmp_path})
        with ZEOServer(tmp_path, None, storages=lambda zeo: text) as server:
            yield service, server


@slow
def test_a_real_service_takes_a_link_as_it_is_until_it_expires(real):
    service, server = real
    ca = service.ca or os.environ.get("AWS_CA_BUNDLE")
    client = server.client()
    data = os.urandom(100_000)
    name = commit(client, data)
    if service.customer_key:
        assert ask(client, *name) is None
        assert "presigned-urls has no effect" in server.output()
        return
    wanted = "text/plain; charset=utf-8", 'Übersicht; 100% "sicher".txt', "inline"
    url = ask(client, *name, *wanted)
    status, headers, found = follow(url, ca)
    assert (status, found) == (200, data)
    assert headers["Content-Type"] == wanted[0]
    assert headers["Content-Disposition"] == (
        'inline; filename="Ubersicht; 100_ _sicher_.txt"; '
        "filename*=UTF-8''%C3%9Cbersicht%3B%20100%25%20%22sicher%22.txt"
    )
    status, headers, found = follow(url, ca, Range="bytes=10-19")
    assert (status, found) == (206, data[10:20])
    # What is signed cannot be changed.
    assert follow(url.replace("text%2Fplain", "text%2Fhtml"), ca)[0] == 403
    assert follow(url.replace("X-Amz-Expires=604800", "X-Amz-Expires=604799"), ca)[0] == 403
    assert follow(url.partition("?")[0], ca)[0] == 403
    short = ask(client, *name, None, None, None, 1)
    wait_for(lambda: follow(short, ca)[0] == 403, timeout=60)
    assert follow(url, ca)[0] == 200
