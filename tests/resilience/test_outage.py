"""The way to S3 breaks, in every way in which it can: what goes on, what fails and how it says so, and what follows.

Each on a real server with stock clients. No client waits for ever, and all is well as soon as the outage is over.
"""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.support.life import Life
from tests.support.link import OUTAGES, Link
from tests.support.sites import Site
from tests.support.speed import slow, slow_but
from tests.support.zeo_clients import blob, commit_blob, write
from tests.support.zeo_server import ZEOServer

#: A connection and an answer that do not come cost a second each, twice.
PATIENCE = {"s3_connect_timeout": "1s", "s3_read_timeout": "1s", "s3_max_attempts": 2}
#: Far above what they cost, in seconds, and far below for ever.
SOON = 20


@pytest.fixture
def link(s3):
    with Link(s3.url) as link:
        yield link


@pytest.fixture
def start(link, bucket_name, tmp_path):
    """Starts a server behind the link; keywords as `ZEOServer`'s."""
    servers = []

    def start(directory=tmp_path, options=PATIENCE, **kwargs):
        servers.append(ZEOServer(directory, link, bucket_name, options=options, metrics=True, **kwargs))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def live(start, s3, bucket_name):
    return Life(start(), s3, bucket_name)


def soon(work, *args):
    started = time.monotonic()
    result = work(*args)
    assert time.monotonic() - started < SOON
    return result


@pytest.mark.parametrize("outage", slow_but("silent to a SYN", "refused", of=OUTAGES))
def test_every_client_gets_its_answer_and_all_is_well_when_the_outage_is_over(live, link, outage):
    link.break_down(outage)
    assert "Could not store 1/blobs/" in soon(live.commit_fails)
    assert "Could not read 1/blobs/" in soon(live.cold_read_fails)
    assert "was packed, but not all dead blobs were deleted" in soon(live.pack_fails)
    live.check_objects_go_on()
    live.check_cached_blobs_go_on()
    figures = live.server.metrics()
    assert figures("s3blobs_bucket_up", storage="1") == 0
    assert figures("s3blobs_cache_errors_total", storage="1", operation="write") == 0
    live.check_nothing_is_lost()
    link.mend()
    live.check_all_is_well()


@pytest.mark.parametrize("outage", slow_but("refused", of=OUTAGES))
def test_a_server_that_starts_during_an_outage_serves_what_it_has(live, link, outage):
    live.server.stop()
    link.break_down(outage)
    live.server.start()
    output = live.server.output()
    assert "Traceback" not in output
    assert "Starting anyway" in output
    live.check_cached_blobs_go_on()
    live.check_objects_go_on()
    soon(live.cold_read_fails)
    link.mend()
    live.check_all_is_well()


@pytest.mark.parametrize("outage", slow_but("reset", of=OUTAGES))
def test_an_outage_in_the_middle_of_large_uploads_and_downloads_ends_them(live, link, s3, background, outage):
    db = live.server.db()
    large = b"large" * (4 << 20)
    write(db, "large", large)
    live.blobs["large"] = large
    with db.transaction() as connection:
        persistent = connection.root()["large"]
        persistent._p_activate()
        live.names["large"] = persistent._p_oid, persistent._p_serial
    live.cool("large")
    s3.forget()
    s3.misbehave(operation="GetObject|UploadPart", hang=True)
    reader, writer = live.server.client(), live.server.client()
    reading = background(live.fails, blob, reader, *live.names["large"])
    writing = background(live.fails, commit_blob, writer, large)
    s3.wait_for("GetObject")
    s3.wait_for("UploadPart")
    link.break_down(outage)
    reading.result(60)
    writing.result(60)
    live.check_objects_go_on()
    s3.behave()
    link.mend()
    live.check_all_is_well()


@pytest.mark.parametrize("outage", slow_but("silent after the handshake", of=OUTAGES))
def test_during_an_outage_reads_come_from_the_fallback(start, link, tmp_path, outage):
    site = Site(tmp_path)
    site.grow()
    server = start(options={**PATIENCE, "fallback_blob_dir": site.blob_dir})
    link.break_down(outage)
    client = server.client()
    for name, data in list(site.revisions.items())[:2]:  # each of them costs what the bucket costs
        assert soon(blob, client, *name) == data


#: A stock client as it is where only ZEO is installed: it tries to read a blob and to commit one, and tells the errors.
WITHOUT_BOTO3 = """
import sys
for name in "boto3", "botocore", "s3transfer", "urllib3", "zodb_s3blobs":
    sys.modules[name] = None
import transaction, ZODB
from ZEO.ClientStorage import ClientStorage
from ZODB.blob import Blob
port, directory, oid, tid = sys.argv[1:]
storage = ClientStorage(("127.0.0.1", int(port)), blob_dir=directory, wait_timeout=30)

def commit():
    with ZODB.DB(storage).transaction() as connection:
        connection.root()["blob"] = Blob(b"data")

for work in (lambda: storage.loadBlob(bytes.fromhex(oid), bytes.fromhex(tid)), commit):
    try:
        work()
    except Exception as error:
        print(type(error).__mro__[-4].__name__, str(error).replace(chr(10), " "))
"""


def errors_without_boto3(server, directory, name):
    """What such a client says of the blob ``name``, and of a commit."""
    arguments = [str(server.address[1]), str(directory), *(part.hex() for part in name)]
    command = [sys.executable, "-c", WITHOUT_BOTO3, *arguments]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert ran.returncode == 0
    return ran.stdout.splitlines()


@pytest.mark.parametrize("outage", slow_but("reset", of=OUTAGES))
def test_a_client_without_boto3_gets_an_answer_that_it_can_read(live, link, tmp_path, outage):
    link.break_down(outage)
    reading, committing = errors_without_boto3(live.server, tmp_path / "bare", live.names["cold"])
    assert "Could not read 1/blobs/" in reading and "StorageError" in reading
    assert "Could not store 1/blobs/" in committing and "StorageError" in committing


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://no-such-host.invalid", "the host name is unknown"),
        ("https://{address}", "the server there does not speak TLS"),
    ],
)
def test_a_client_without_boto3_is_told_what_is_wrong_with_the_way(s3, bucket_name, tmp_path, url, words):
    there = SimpleNamespace(url=url.format(address=s3.url.removeprefix("http://")))
    with ZEOServer(tmp_path, there, bucket_name, options={**PATIENCE, "s3_max_attempts": 1}) as server:
        errors = errors_without_boto3(server, tmp_path / "bare", (b"\0" * 8, b"\0" * 8))
        assert len(errors) == 2
        assert all(words in error and "StorageError" in error for error in errors)


@slow
def test_two_storages_of_which_one_has_an_outage_do_not_share_it(start, s3, link, bucket_name, tmp_path):
    (tmp_path / "other").mkdir()
    with ZEOServer(tmp_path / "other", SimpleNamespace(url=s3.url), bucket_name) as other:
        db = other.db()
        link.break_down("silent to a SYN")
        write(db, "blob", b"data")
