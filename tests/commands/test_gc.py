"""``zodb-s3blobs gc`` in processes of its own, beside servers that run, that are dead, and that are others'."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64, z64

from tests.support.sites import run
from tests.support.speed import slow, slow_after, slow_but
from tests.support.zeo_server import SECTION

SECRET = "test-secret"
FILESTORAGE = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"
OLD = "3d0c0b0a0908070"  # a tid of long ago


@pytest.fixture
def gc(tmp_path):
    """Runs ``zodb-s3blobs gc`` with the zeo.conf of the servers; returns the process that has ended."""

    def gc(*arguments, config=tmp_path / "zeo.conf", status=0):
        returned, stdout, stderr = run("gc", "-C", str(config), *arguments)
        done = SimpleNamespace(stdout=stdout, stderr=stderr)
        assert returned == status, done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return gc


@pytest.fixture
def put(s3, bucket_name):
    """Puts dead blobs of one byte, below the prefix of the storage ``name``; returns their keys."""

    def put(count, name="1"):
        keys = [f"{name}/blobs/{number:x}/{OLD}.blob" for number in range(1, count + 1)]
        s3.put(bucket_name, keys)
        return keys

    return put


@pytest.fixture
def contents(s3, bucket_name):
    """All that is in the bucket but owner.json: key, ETag and when it was written."""

    def contents():
        found = s3.client.list_objects_v2(Bucket=bucket_name).get("Contents", ())
        return [
            (one["Key"], one["ETag"], one["LastModified"]) for one in found if not one["Key"].endswith("owner.json")
        ]

    return contents


def only_sentence(done):
    """The one sentence of a command that has failed, but for what FileStorage says when there is no index."""
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "Ignoring index" not in line]
    return line


def write(db, name, data):
    with db.transaction() as connection:
        blob = connection.root().setdefault(name, Blob())
        with blob.open("w") as file:
            file.write(data)


def read(db, name):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


def commit_object(path):
    """Commit an object to the database of nobody."""
    base = FileStorage(str(path))
    transaction = TransactionMetaData()
    base.tpc_begin(transaction)
    base.store(p64(1), z64, b"a record", "", transaction)
    base.tpc_vote(transaction)
    base.tpc_finish(transaction)
    base.close()


# --dry-run


def test_a_dry_run_beside_a_running_server_lists_what_would_go_and_changes_nothing(
    s3, bucket_name, start, gc, put, contents
):
    server = start()
    db = server.db()
    for data in b"one", b"two":
        write(db, "blob", data * 1000)
    dead = put(3)
    s3.put(bucket_name, ["1/blobs/README", "1/blobs/1/7fffffffffffffff.blob"])
    unfinished = f"1/staged/{'a' * 32}"
    s3.client.create_multipart_upload(Bucket=bucket_name, Key=unfinished)  # in 2010, says the server
    before, files = contents(), sorted(os.listdir(server.directory))
    s3.forget()

    result = json.loads(gc("--dry-run", "--json").stdout)
    assert result == {
        "would_delete": [
            *({"key": key, "bytes": 1, "reason": "dead"} for key in dead),
            {"key": unfinished, "bytes": 0, "reason": "unfinished"},
        ],
        "found": {
            "live": {"objects": 2, "bytes": 6000},
            "dead": {"objects": 3, "bytes": 3},
            "retained": {"objects": 0, "bytes": 0},
            "newer": {"objects": 1, "bytes": 1},
            "unknown": {"objects": 1, "bytes": 1},
        },
        "refused": None,
    }

    text = gc("--dry-run").stdout
    for key in dead:
        assert re.search(rf"^dead +1 {re.escape(key)}$", text, re.M)
    assert re.search(rf"^unfinished +0 {unfinished}$", text, re.M)
    for state, numbers in result["found"].items():
        assert re.search(rf"^{state} +{numbers['objects']:,} +{numbers['bytes']:,} ", text, re.M)

    requests = s3.requests() + [one for kind in ("Put", "Delete") for one in s3.requests(f"Owner{kind}Object")]
    assert {request.operation for request in requests} <= {"ListObjects", "ListMultipartUploads", "GET bucket"}
    assert contents() == before
    assert sorted(os.listdir(server.directory)) == files
    write(db, "blob", b"three")
    assert read(db, "blob") == b"three"
    db.pack()  # exactly what was said
    left = {key for key, *_ in contents()}
    assert not left & set(dead) and {"1/blobs/README", "1/blobs/1/7fffffffffffffff.blob"} < left


@pytest.mark.parametrize("dry_run", slow_after(1, of=[[], ["--dry-run"]]))
def test_the_log_of_the_server_is_left_alone(start, gc, put, dry_run):
    """Whoever runs the command may be another user, and must not make a log that the server cannot write."""
    server = start()
    put(3)
    server.stop()
    log = server.directory / "zeo.log"
    log.unlink()
    gc(*dry_run)
    assert not log.exists()


def test_a_dry_run_does_not_take_what_the_server_commits_meanwhile_for_another_databases(s3, start, gc, background):
    server = start()
    db = server.db()
    write(db, "blob", b"one")
    s3.misbehave(operation="ListObjects", hang=True)
    s3.forget()
    running = background(gc, "--dry-run", "--json")
    s3.wait_for("ListObjects")
    write(db, "blob", b"two")
    s3.behave()
    done = running.result()
    assert json.loads(done.stdout)["found"]["newer"]["objects"] == 1
    assert "newer than" not in done.stderr


def test_a_dry_run_counts_what_is_retained_and_leaves_the_marks_alone(start, gc, put, contents):
    server = start(options={"gc_retention": "30d", "gc_max_delete_percent": "100"})
    db = server.db()
    write(db, "blob", b"data")
    put(3)
    db.pack()
    put(5)
    before = contents()
    assert "1/gc-marks.jsonl" in {key for key, *_ in before}
    result = json.loads(gc("--dry-run", "--json").stdout)
    assert result["would_delete"] == []
    assert result["found"]["retained"] == {"objects": 5, "bytes": 5}
    assert contents() == before
    server.stop()
    config = server.directory / "zeo.conf"
    config.write_text(config.read_text().replace("gc-retention 30d", "gc-retention 1s"))
    deadline = time.monotonic() + 60
    while len(goes := json.loads(gc("--dry-run", "--json").stdout)["would_delete"]) < 3:
        assert time.monotonic() < deadline
    assert {one["reason"] for one in goes} == {"dead"} and len(goes) == 3
    assert contents() == before


def test_a_dry_run_lists_what_crashed_servers_left_staged(s3, start, gc):
    start()
    old, young = ((f"1/staged/{letter * 32}", year) for letter, year in (("a", 2010), ("b", 2100)))
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>7</Size><LastModified>{year}-01-01T00:00:00Z</LastModified></Contents>"
        for key, year in (old, young)
    )
    s3.misbehave(operation="ListObjects", times=1)  # the blobs
    s3.misbehave(operation="ListObjects", status=200, body=f"<ListBucketResult>{entries}</ListBucketResult>")
    result = json.loads(gc("--dry-run", "--json").stdout)
    assert result["would_delete"] == [{"key": old[0], "bytes": 7, "reason": "staged"}]


@pytest.mark.parametrize(
    "fault", slow_after(1, of=[{"status": 501, "code": "NotImplemented"}, {"status": 403, "code": "AccessDenied"}])
)
def test_a_dry_run_does_without_the_uploads_that_the_service_cannot_list(s3, start, gc, put, fault):
    start()
    put(1)
    s3.misbehave(operation="ListMultipartUploads", **fault)
    done = gc("--dry-run", "--json")
    assert json.loads(done.stdout)["found"]["newer"]["objects"] == 1  # than a database without a transaction
    assert "Unfinished uploads of crashed servers stay behind. Could not list bucket" in done.stderr


def test_a_dry_run_says_what_the_valve_would_do(start, gc, put):
    write(start().db(), "blob", b"data")
    put(150)
    result = json.loads(gc("--dry-run", "--json").stdout)
    assert len(result["would_delete"]) == 150
    assert result["refused"].startswith("149 of 151 blobs ") and "gc-max-delete-percent (50)" in result["refused"]
    assert "A pack would delete none of them: 149 of 151 blobs" in gc("--dry-run").stdout


def several(settings):
    wrapped = SECTION.format(**{**settings, "name": "two", "cache": "cache-two"}).replace(
        "<s3blobstorage two>", "<s3blobstorage>"
    )
    return "\n".join(
        [
            SECTION.format(**{**settings, "name": "one", "cache": "cache-one"}),
            f"<zlibstorage two>\n{wrapped}\n</zlibstorage>".replace("Data.fs", "Two.fs"),
            "<mappingstorage three>\n</mappingstorage>",
        ]
    )


def test_of_several_storages_one_is_to_be_named(start, gc, put):
    server = start(storages=several)
    write(server.db(storage="one"), "blob", b"data")
    two = server.db(storage="two")
    for _ in range(2):
        write(two, "blob", b"text " * 1000)
    put(1, "one")
    put(2, "two")
    for name, dead, live in ("one", 1, 1), ("two", 2, 2):
        result = json.loads(gc("--dry-run", "--json", "--storage", name).stdout)
        assert [one["key"] for one in result["would_delete"]] == put(dead, name)
        assert result["found"]["live"]["objects"] == live
    for arguments, why in (
        ([], "several storages with"),
        (["--storage", "three"], "no storage 'three' with"),
        (["--storage", "four"], "no storage 'four' with"),
    ):
        for dry_run in [], ["--dry-run"]:
            sentence = only_sentence(gc(*arguments, *dry_run, status=1))
            assert f"has {why}" in sentence and "with --storage: one, two" in sentence
    server.stop()
    assert gc("--storage", "two").stdout == "2 dead blobs were deleted.\n"
    assert json.loads(gc("--dry-run", "--json", "--storage", "one").stdout)["found"]["dead"]["objects"] == 1


@pytest.mark.parametrize(
    "wrapper",
    slow_after(
        1, of=["<zlibstorage>\n{}\n</zlibstorage>", "<zlibstorage>\n<zlibstorage>\n{}\n</zlibstorage>\n</zlibstorage>"]
    ),
)
def test_a_filestorage_in_a_wrapper_is_opened_beside_the_server(start, gc, put, wrapper):
    server = start(base=wrapper.format(FILESTORAGE))
    write(server.db(), "blob", b"data")
    put(1)
    found = json.loads(gc("--dry-run", "--json").stdout)["found"]
    assert (found["live"]["objects"], found["dead"]["objects"]) == (1, 1)


@pytest.mark.parametrize(
    "base",
    slow_after(
        1,
        of=[
            "<mappingstorage/>",
            "<demostorage>\n<filestorage changes>\n path {dir}/Data.fs\n</filestorage>\n</demostorage>",
            "<zlibstorage>\n<mappingstorage/>\n</zlibstorage>",
        ],
    ),
)
def test_what_cannot_be_opened_beside_the_server_is_refused(start, gc, put, contents, base):
    write(start(base=base).db(), "blob", b"data")
    put(1)
    before = contents()
    assert "only a filestorage can" in only_sentence(gc("--dry-run", status=1))
    assert contents() == before


# Without --dry-run


def test_beside_a_running_server_nothing_is_deleted(start, gc, put, contents):
    db = start().db()
    write(db, "blob", b"data")
    put(3)
    before = contents()
    sentence = only_sentence(gc(status=1))
    assert "in use" in sentence and "Stop the server" in sentence and "--dry-run" in sentence
    assert contents() == before
    write(db, "blob", b"more")


def test_beside_a_running_server_whose_base_takes_no_lock_nothing_is_deleted(start, gc, put, contents):
    """The cache directory is the server's all the same."""
    write(start(base="<mappingstorage/>").db(), "blob", b"data")
    put(3)
    before = contents()
    assert "cache-dir" in only_sentence(gc(status=1))
    assert contents() == before


@pytest.mark.parametrize("end", slow_but("kill", of=["stop", "kill"]))
def test_after_the_server_has_ended_dead_blobs_are_deleted(s3, bucket_name, start, gc, put, end):
    server = start(metrics=True)
    write(server.db(), "blob", b"data")
    put(3)
    getattr(server, end)()
    assert gc().stdout == "3 dead blobs were deleted.\n"
    (key,) = s3.keys(bucket_name)
    put(2)
    assert json.loads(gc("--json").stdout) == {"deleted_objects": 2}
    assert gc().stdout == "0 dead blobs were deleted.\n"
    assert s3.keys(bucket_name) == [key]
    server.start()
    assert read(server.db(), "blob") == b"data"


@slow
def test_while_another_host_holds_the_lease_nothing_is_deleted(s3, bucket_name, start, gc, put, contents):
    server = start()
    write(server.db(), "blob", b"data")
    server.stop()
    put(3)
    claim = {"format": 1, "owner": "x", "host": "elsewhere", "home": "y", "storage": "1", "started": "", "renewed": ""}
    s3.client.put_object(Bucket=bucket_name, Key="1/owner.json", Body=json.dumps(claim))
    before = contents()
    done = gc(status=1)
    assert done.stdout == ""
    assert "belongs to the server on 'elsewhere'" in done.stderr.splitlines()[-1]
    assert contents() == before
    assert len(json.loads(gc("--dry-run", "--json").stdout)["would_delete"]) == 3


def test_what_the_valve_holds_back_stays(start, gc, put, contents):
    server = start()
    write(server.db(), "blob", b"data")
    server.stop()
    put(150)
    before = contents()
    done = gc(status=1)
    assert done.stdout == ""
    assert "149 of 151 blobs" in done.stderr.splitlines()[-1]
    assert contents() == before
    config = server.directory / "zeo.conf"
    config.write_text(config.read_text().replace("<filestorage>", "gc-max-delete-percent 100\n<filestorage>"))
    assert gc().stdout == "150 dead blobs were deleted.\n"


def test_a_read_only_database_deletes_nothing(start, gc, put, contents):
    """It is locked by nobody, and another process may write to it."""
    server = start()
    write(server.db(), "blob", b"data")
    server.stop()
    put(3)
    config = server.directory / "zeo.conf"
    config.write_text(config.read_text().replace("Data.fs\n", "Data.fs\n read-only true\n"))
    before = contents()
    assert "is read-only" in gc(status=1).stderr.splitlines()[-1]
    assert contents() == before
    assert len(json.loads(gc("--dry-run", "--json").stdout)["would_delete"]) == 3


# What is wrong


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_configuration_file_that_is_not_there(gc, tmp_path, dry_run):
    sentence = only_sentence(gc(*dry_run, config=tmp_path / "none.conf", status=1))
    assert f"no file {tmp_path}/none.conf" in sentence


@slow
def test_a_data_fs_that_is_not_there_or_none(start, gc, tmp_path, contents):
    server = start()
    server.stop()
    (tmp_path / "Data.fs").write_bytes(b"no database at all, but long enough to be taken for one")
    for dry_run in [], ["--dry-run"]:
        assert f"{tmp_path}/Data.fs" in only_sentence(gc(*dry_run, status=1))
    (tmp_path / "Data.fs").unlink()
    assert f"{tmp_path}/Data.fs" in only_sentence(gc("--dry-run", status=1))
    assert not (tmp_path / "Data.fs").exists()


@pytest.mark.parametrize("dry_run", slow_after(1, of=[[], ["--dry-run"]]))
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (("gc-max-delete-percent 50", "gc-max-delete-percent 101"), "gc-max-delete-percent"),
        (("s3-access-key test\n", "\n"), "s3-access-key"),
        (("<zeo>", "<zeo"), "line"),
        (("<s3blobstorage 1>", "<mappingstorage 1>\n</mappingstorage>\n<s3blobstorage>\nx y"), "x"),
    ],
)
def test_a_configuration_that_runzeo_refuses_is_refused_in_its_words(start, gc, dry_run, changes, word):
    server = start(options={"gc_max_delete_percent": "50"})
    server.stop()
    config = server.directory / "zeo.conf"
    assert changes[0] in config.read_text()
    config.write_text(config.read_text().replace(*changes))
    assert f": {config}: " in (refusal := only_sentence(gc(*dry_run, status=1))) and word in refusal


def test_a_configuration_without_s3blobstorage(gc, tmp_path):
    config = tmp_path / "zeo.conf"
    config.write_text("<zeo>\n address 1\n</zeo>\n<mappingstorage 1>\n</mappingstorage>")
    assert str(config) in only_sentence(gc("--dry-run", status=1))


@pytest.mark.parametrize("dry_run", slow_after(1, of=[[], ["--dry-run"]]))
@pytest.mark.parametrize("operation", ["ListObjects", "GetObject"])
def test_a_bucket_that_does_not_answer_as_it_should(s3, start, gc, put, contents, operation, dry_run):
    server = start(options={"s3_max_attempts": 1, "gc_retention": "30d"})
    write(server.db(), "blob", b"data")
    server.stop()
    put(3)
    before = contents()
    # Not so soon that the server would not start either.
    s3.misbehave(operation=operation, times=0 if dry_run or operation == "GetObject" else 1)
    s3.misbehave(operation=operation, status=500, code="InternalError", message=SECRET)
    done = gc(*dry_run, status=1)
    assert done.stdout == ""
    assert "InternalError" in done.stderr.splitlines()[-1]
    assert contents() == before


# Kill -9


@slow
def test_a_kill_in_the_middle_of_a_collection_costs_nothing_that_lives(s3, bucket_name, start, put, background):
    server = start(options={"gc_max_delete_percent": "100"})
    db = server.db()
    for name in "one", "two":
        for turn in range(3):
            write(db, name, f"{name} {turn}".encode())
    put(1500)
    s3.misbehave(operation="DeleteObjects", times=1)
    s3.misbehave(operation="DeleteObjects", hang=True)
    packing = background(db.storage.pack, time.time())
    s3.wait_for("DeleteObjects", 2)
    server.signal(signal.SIGKILL)
    server.kill()
    s3.behave()
    assert packing.exception() is not None
    left = s3.keys(bucket_name)
    assert 2 < len(left) < 1502  # some had gone

    for file in server.cache_dir.glob("blobs/*/*.blob"):
        file.unlink()
    server.start()
    db = server.db()
    assert [read(db, name) for name in ("one", "two")] == [b"one 2", b"two 2"]
    db.pack()
    assert len(s3.keys(bucket_name)) == 2
    assert [read(db, name) for name in ("one", "two")] == [b"one 2", b"two 2"]
