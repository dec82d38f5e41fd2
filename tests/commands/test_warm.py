"""``zodb-s3blobs warm`` in processes of its own, beside a real server: what it fetches costs clients no S3 request."""

import json
import os
import shutil
import signal
import time

import pytest
from ZODB.blob import Blob

from tests.support.link import Link
from tests.support.sites import KEYS, get, put, sentence, undo
from tests.support.waiting import wait_for

TIMEOUT = 30
MIB = 1 << 20


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def content(number, size=3000):
    return b"%4d " % number * (size // 5)


def cached(server):
    """The sizes of the files that the server has in its cache."""
    return sorted(path.stat().st_size for path in server.cache_dir.glob("blobs/*/*.blob"))


def waiting(server):
    """The files that the command has left for the server."""
    return sorted((server.cache_dir / "warm").iterdir())


def is_taken_over(server):
    return not waiting(server)


def gets(s3):
    return len(s3.requests("GetObject"))


@pytest.fixture
def filled(start):
    """Starts a server with ``blobs`` name -> bytes, each of a transaction of its own, and stops it."""

    def filled(blobs, **options):
        server = start(options={"s3_read_timeout": "120s", **options}, metrics=True)
        db = server.db()
        for name, data in blobs.items():
            put(db, name, data)
        db.close()
        server.stop()
        return server

    return filled


@pytest.fixture
def lost(filled):
    """The same, and the cache is lost."""

    def lost(blobs, **options):
        server = filled(blobs, **options)
        shutil.rmtree(server.cache_dir)
        return server

    return lost


def conf(server):
    return server.directory / "zeo.conf"


BLOBS = {f"blob {number}": content(number) for number in range(12)} | {"empty": b"", "large": os.urandom(9 * MIB)}


def test_after_a_lost_disk_the_server_takes_over_what_was_fetched_and_reads_ask_the_bucket_for_nothing(s3, lost, tool):
    server = lost(BLOBS)
    server.start()
    db = server.db()
    put(db, "blob 0", b"a newer revision")
    wait_for(lambda: server.metrics()("s3blobs_cache_files") > 0)  # else it is published into what is being deleted
    shutil.rmtree(server.cache_dir / "blobs")
    out, _ = tool("warm", conf(server), "--json")
    assert counts(out) == {"fetched": len(BLOBS)}
    wait_for(lambda: is_taken_over(server))
    server.stop()
    server.start()
    s3.forget()
    db = server.db()
    for name, data in {**BLOBS, "blob 0": b"a newer revision"}.items():
        assert get(db, name) == data
    assert gets(s3) == 0


def test_a_stopped_server_takes_them_over_when_it_starts(s3, lost, tool):
    server = lost(BLOBS)
    out, _ = tool("warm", conf(server))
    assert out.splitlines()[-1] == "The cache has all of these blobs, or gets them from the server within seconds."
    assert len(waiting(server)) == len(BLOBS)
    server.start()
    wait_for(lambda: is_taken_over(server))
    assert cached(server) == sorted(map(len, BLOBS.values()))
    s3.forget()
    db = server.db()
    assert {name: get(db, name) for name in BLOBS} == BLOBS
    assert gets(s3) == 0
    assert f"Took over {len(BLOBS)} blobs" in server.output()


def test_only_the_current_revisions_are_fetched(s3, lost, tool):
    server = lost({"one": b"one"})
    server.start()
    db = server.db()
    put(db, "one", b"one again")
    put(db, "undone", b"never made")
    undo(db)
    server.stop()
    shutil.rmtree(server.cache_dir)
    out, _ = tool("warm", conf(server), "--json")
    assert counts(out) == {"fetched": 1}
    (file,) = waiting(server)
    assert file.read_bytes() == b"one again"


def test_it_fetches_the_newest_that_fit_below_the_size_and_ends(s3, lost, tool):
    server = lost({f"blob {number}": content(number, 30_000) for number in range(20)}, cache_size="1GB")
    s3.forget()
    out, _ = tool("warm", conf(server), "--size", "100KB", "--json")
    assert counts(out) == {"fetched": 3, "left": 17}
    contents = {file.read_bytes() for file in waiting(server)}
    assert contents == {content(number, 30_000) for number in (17, 18, 19)}
    # Again: nothing more.
    s3.forget()
    out, _ = tool("warm", conf(server), "--size", "100KB")
    assert "The cache has no room for more below 102,400 bytes: 17 left." in out
    assert not any("/blobs/" in request.path for request in s3.requests("GetObject"))


def test_cache_size_is_the_limit(lost, tool):
    server = lost({f"blob {number}": content(number, 300_000) for number in range(6)}, cache_size="1MB")
    out, _ = tool("warm", conf(server), "--size", "1GB", "--json")
    assert counts(out) == {"fetched": 3, "left": 3}
    server.start()
    wait_for(lambda: is_taken_over(server))
    assert len(cached(server)) == 3


def test_what_is_there_is_not_fetched_again(s3, filled, tool):
    server = filled(BLOBS)
    s3.forget()
    out, _ = tool("warm", conf(server), "--json")
    assert counts(out) == {"there": len(BLOBS)}
    assert gets(s3) <= 1  # owner.json


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_interrupted_goes_on(s3, lost, tool, number):
    server = lost({f"blob {number}": content(number) for number in range(8)}, s3_concurrency=1)
    s3.forget()
    s3.misbehave(operation="GetObject", times=4)
    s3.misbehave(operation="GetObject", hang=True)
    running = tool.begin("warm", conf(server))
    s3.wait_for("GetObject", 5)
    running.send_signal(number)
    out, err = running.communicate(timeout=TIMEOUT)
    assert out == "" and "Traceback" not in err
    if number == signal.SIGINT:
        assert running.returncode == 130
    s3.behave()
    done = [file for file in waiting(server) if file.name.endswith(".blob")]
    assert {file.read_bytes() for file in done} == {content(number) for number in range(8 - len(done), 8)}
    assert 2 <= len(done) <= 4
    out, _ = tool("warm", conf(server), "--json")
    assert counts(out) == {"there": len(done), "fetched": 8 - len(done)}


def test_only_what_is_under_a_path(s3, start, tool):
    server = start()
    db = server.db()
    with db.transaction() as connection:
        root = connection.root()
        for folder in "app", "apple":
            root[folder] = connection.root().__class__()
            for number in range(3):
                root[folder][f"file {number}"] = Blob(f"{folder} {number}".encode())
    db.close()
    server.stop()
    shutil.rmtree(server.cache_dir)
    out, _ = tool("warm", conf(server), "--under", "/app/", "--json")
    assert counts(out) == {"fetched": 3}
    assert {file.read_bytes() for file in waiting(server)} == {b"app 0", b"app 1", b"app 2"}
    out, _ = tool("warm", conf(server), "--under", "/apple/file 1", "--json")
    assert counts(out) == {"fetched": 1}
    _, err = tool("warm", conf(server), "--under", "/nowhere", status=1)
    assert "there is no blob at /nowhere or below it" in sentence(err)


def test_a_damaged_file_is_never_served(s3, lost, tool):
    blobs = {f"blob {number}": content(number) for number in range(4)}
    server = lost(blobs)
    tool("warm", conf(server))
    changed, cut, emptied, _ = waiting(server)
    changed.write_bytes(b"?" + changed.read_bytes()[1:])
    os.truncate(cut, 100)
    os.truncate(emptied, 0)
    server.start()
    wait_for(lambda: is_taken_over(server))
    s3.forget()
    db = server.db()
    assert {name: get(db, name) for name in blobs} == blobs
    assert gets(s3) == 3


def test_the_bandwidth_is_limited(lost, tool):
    server = lost({f"blob {number}": os.urandom(500_000) for number in range(4)})
    started = time.monotonic()
    out, _ = tool("warm", conf(server), "--max-bandwidth", "1MB", "--json")
    assert counts(out) == {"fetched": 4}
    assert time.monotonic() - started > 4 * 500_000 / MIB


def test_a_blob_that_the_bucket_does_not_have_is_listed_and_the_others_are_fetched(s3, bucket_name, lost, tool):
    server = lost(BLOBS)
    listed = s3.client.list_objects_v2(Bucket=bucket_name, Prefix="1/blobs/")["Contents"]
    key = listed[0]["Key"]
    s3.client.delete_object(Bucket=bucket_name, Key=key)
    out, _ = tool("warm", conf(server), status=3)
    assert f"{key} is not in bucket {bucket_name}" in out
    assert out.splitlines()[-1] == "Not all blobs could be fetched: 1 missing."
    assert len(waiting(server)) == len(BLOBS) - 1


def test_what_only_the_old_blob_directory_has_is_taken_from_there(s3, bucket_name, site, tool):
    number = len({oid for oid, _ in site.revisions})
    out, _ = tool("warm", site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir), "--json")
    assert counts(out)["fetched"] == number - counts(out).get("missing", 0)
    assert gets(s3) <= 1  # owner.json


@pytest.mark.parametrize("how", ["directory", "link", "missing"])
def test_files_that_cannot_be_written_end_it_in_a_sentence(s3, lost, tool, how, tmp_path):
    server = lost({"one": b"one"})
    if how == "missing":
        server.cache_dir.symlink_to(tmp_path / "nowhere" / "cache")
    else:
        server.cache_dir.mkdir()
        if how == "link":
            (server.cache_dir / "warm").symlink_to(tmp_path / "nowhere")
        else:
            (server.cache_dir / "warm").write_text("no folder")
    _, err = tool("warm", conf(server), status=1)
    assert f"Cannot write to cache-dir {server.cache_dir}" in sentence(err)


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_an_outage_ends_it_in_one_sentence(s3, bucket_name, site, tool, when):
    for name, data in site.revisions.items():
        s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(*name), Body=data)
    with Link(s3.url) as link:
        options = {"s3_connect_timeout": "1s", "s3_read_timeout": "1s", "s3_max_attempts": 1, "s3_concurrency": 1}
        path = site.configure(link, bucket_name, **options)
        if when == "from the start":
            link.break_down("reset")
            running = tool.begin("warm", path)
        else:
            s3.forget()
            s3.misbehave(operation="GetObject", latency=1.5)
            running = tool.begin("warm", path)
            s3.wait_for("GetObject", 2)
            link.break_down("reset")
        _, err = tool.end(running, status=1)
    assert f"bucket {bucket_name}" in sentence(err)


@pytest.mark.parametrize("option", ["--size", "--max-bandwidth"])
@pytest.mark.parametrize("value", ["0", "-1", "20", "many", ""])
def test_a_size_that_is_none_is_refused(site, s3, bucket_name, tool, option, value):
    _, err = tool("warm", site.configure(s3, bucket_name), f"{option}={value}", status=2)
    assert "must be a whole number with KB, MB or GB" in err


def test_a_directory_that_is_no_cache_is_left_alone(site, s3, bucket_name, tool, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "letters").write_text("mine")
    _, err = tool("warm", site.configure(s3, bucket_name), status=1)
    assert "is not empty and is not a blob cache" in sentence(err)
    assert os.listdir(tmp_path / "cache") == ["letters"]
