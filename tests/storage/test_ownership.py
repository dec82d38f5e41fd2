"""Whose a prefix is: what operators do by mistake costs no blob. Real servers, stock clients, commands."""

import json
import shutil
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.POSException import StorageError

from tests.support.sites import Site, Tool, leave_unfinished
from tests.support.speed import slow_but
from tests.support.waiting import wait_for
from tests.support.zeo_server import SECTION, ZEOServer

OWNER = "1/owner.json"


def write(db, name, data):
    with db.transaction() as connection:
        connection.root()[name] = Blob(data)


def read(db, name):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


def remove(db, name):
    with db.transaction() as connection:
        del connection.root()[name]


class Place:
    """A directory with a database, and the server on it."""

    def __init__(self, directory, s3, bucket_name, **kwargs):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.server = ZEOServer(directory, s3, bucket_name, metrics=True, **kwargs)
        self._s3, self._bucket_name = s3, bucket_name

    def start(self):
        """Start the server, and wait until it has looked whose the prefix is; returns a database."""
        self._s3.forget()
        self.server.start()
        self._s3.wait_for("OwnerGetObject")
        wait_for(lambda: self.server.metrics().text)
        return self.server.db()

    def copy_from(self, other):
        """Have the database that another place has now."""
        for name in "Data.fs", "Data.fs.s3blobs-id":
            shutil.copy(other.directory / name, self.directory)

    @property
    def config(self):
        return self.directory / "zeo.conf"


@pytest.fixture
def place(s3, bucket_name, tmp_path):
    """Makes a `Place`, all of them on the same prefix."""
    places = []

    def place(name, **kwargs):
        places.append(Place(tmp_path / name, s3, bucket_name, **kwargs))
        return places[-1]

    yield place
    for one in places:
        one.server.__exit__()


@pytest.fixture
def claim(s3, bucket_name):
    """What owner.json says."""
    return lambda: json.loads(s3.client.get_object(Bucket=bucket_name, Key=OWNER)["Body"].read())


@pytest.fixture
def tool():
    tool = Tool()
    yield tool
    tool.kill()


def grow(db, names="abc"):
    for name in names:
        write(db, name, name.encode() * 100)


def check(db, names="abc"):
    assert {name: read(db, name) for name in names} == {name: name.encode() * 100 for name in names}


def test_a_copy_of_production_with_its_settings_deletes_nothing_of_it(place, claim):
    """Production stops for a moment, the copy takes the prefix, production goes on, and both pack."""
    production, staging = place("production"), place("staging")
    db = production.start()
    grow(db)
    wait_for(lambda: claim()["last"])
    production.server.stop()
    staging.copy_from(production)
    db = production.start()
    grow(db, "def")
    production.server.stop()
    db = staging.start()
    with pytest.raises(StorageError, match="does not have the last transaction"):
        db.pack()
    write(db, "of staging", b"data")
    staging.server.stop()
    db = production.start()
    db.pack()
    check(db, "abcdef")
    staging.start()
    with pytest.raises(StorageError, match="must never share a prefix"):
        staging.server.db().pack()
    production.server.stop()
    production.server.cache_name = "empty"
    check(production.start(), "abcdef")


def test_a_successor_only_marks_for_a_week_and_the_owner_that_returns_loses_nothing(place, s3, bucket_name, claim):
    """A copy that has everything takes the prefix while production is stopped."""
    production, copy = place("production"), place("copy")
    db = production.start()
    grow(db)
    production.server.stop()
    assert claim()["stopped"]
    copy.copy_from(production)
    db = copy.start()
    remove(db, "a")
    before = [key for key in s3.keys(bucket_name) if "/blobs/" in key]
    time.sleep(1.1)  # ZODB packs to a whole second
    db.pack()
    assert [key for key in s3.keys(bucket_name) if "/blobs/" in key] == before
    figures = copy.server.metrics()
    assert figures("s3blobs_bucket_owner_changed_timestamp_seconds", storage="1") == pytest.approx(time.time(), abs=120)
    assert figures("s3blobs_gc_objects", storage="1", state="retained") == 1
    db = production.start()
    wait_for(lambda: production.server.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 1)
    check(db)


def test_an_empty_database_deletes_nothing(place, s3, bucket_name, tmp_path):
    """As when the disk of Data.fs is not mounted."""
    production = place("production")
    db = production.start()
    grow(db)
    before = s3.keys(bucket_name)
    production.server.stop()
    shutil.move(production.directory, tmp_path / "unmounted")
    production.directory.mkdir()
    db = production.start()
    write(db, "new", b"data")
    with pytest.raises(StorageError, match=r"Is this the right Data\.fs, and its disk mounted"):
        db.pack()
    assert set(before) <= set(s3.keys(bucket_name))


def test_an_older_state_of_the_database_deletes_nothing(place, s3, bucket_name):
    """It was restored from a backup, perhaps by mistake."""
    production = place("production")
    db = production.start()
    grow(db)
    production.server.stop()
    backup = (production.directory / "Data.fs").read_bytes()
    db = production.start()
    grow(db, "de")
    production.server.stop()
    before = s3.keys(bucket_name)
    (production.directory / "Data.fs").write_bytes(backup)
    (production.directory / "Data.fs.index").unlink()
    db = production.start()
    write(db, "later", b"data")
    with pytest.raises(StorageError, match=r"older state restored.*zodb-s3blobs adopt"):
        db.pack()
    assert set(before) <= set(s3.keys(bucket_name))


@pytest.mark.parametrize("end", slow_but("stop", of=["stop", "kill"]))
def test_a_container_with_a_new_cache_dir_each_night_collects(place, s3, bucket_name, end):
    production = place("production")
    db = production.start()
    for night in range(3):
        write(db, "blob", b"data %d" % night)
        getattr(production.server, end)()
        production.server.cache_name = f"cache-{night}"
        db = production.start()
        time.sleep(1.1)  # ZODB packs to a whole second
        db.pack()
        assert len([key for key in s3.keys(bucket_name) if "/blobs/" in key]) == 1
        assert read(db, "blob") == b"data %d" % night


@pytest.mark.parametrize("outage", [False, True])
def test_a_pack_that_takes_the_named_transaction_away_does_not_cost_the_prefix(place, s3, bucket_name, claim, outage):
    """Also if S3 is down during the pack, and the server is killed before it is back."""
    production = place("production", options={"s3_max_attempts": 1})
    db = production.start()
    grow(db, "a")
    wait_for(lambda: claim()["owner"])
    for turn in range(3):
        write(db, "b", b"b%d" % turn)
    time.sleep(1.1)  # ZODB packs to a whole second
    if outage:
        s3.misbehave(operation=".*", status=403, code="AccessDenied")
        s3.misbehave(operation="Owner.*", status=403, code="AccessDenied")
        with pytest.raises(StorageError, match="was packed, but not all dead blobs"):
            db.pack()
    else:
        db.pack()
        for turn in range(3):
            write(db, "b", b"later %d" % turn)
        time.sleep(1.1)
        s3.misbehave(operation="ListObjects", hang=True)
        db.storage.pack(time.time(), wait=False)
        s3.wait_for("ListObjects")
    production.server.kill()
    s3.behave()
    db = production.start()
    db.pack()
    assert len([key for key in s3.keys(bucket_name) if "/blobs/" in key]) == 2
    check(db, "a")


def test_a_crash_in_the_middle_of_a_commit_does_not_cost_the_prefix(place, claim):
    """ZODB takes the transaction that it cuts off from Data.fs at the next start for the last one."""
    production = place("production")
    db = production.start()
    grow(db, "a")
    wait_for(lambda: claim()["owner"])
    production.server.kill()
    leave_unfinished(production.directory / "Data.fs")
    owner = claim()["owner"]
    production.start()
    wait_for(lambda: claim()["owner"] != owner)
    production.server.kill()
    db = production.start()
    db.pack()
    check(db, "a")


def test_a_server_that_never_read_whose_the_prefix_is_does_not_pack(place, s3):
    """The pack might take away the transaction by which the database is known."""
    production = place("production", options={"s3_max_attempts": 1})
    grow(production.start(), "a")
    production.server.kill()
    s3.misbehave(operation="Owner.*", status=403, code="AccessDenied")
    db = production.start()
    with pytest.raises(StorageError, match="was not packed"):
        db.pack()
    s3.behave()
    db.pack()
    check(db, "a")


def test_two_sections_of_one_server_on_one_prefix_stop_the_start(s3, bucket_name, tmp_path):
    def both(settings):
        first = {**settings, "name": "1", "cache": "one", "base": "<mappingstorage/>"}
        second = {**first, "cache": "two"}
        return SECTION.format(**first) + SECTION.format(**second).replace("<s3blobstorage 1>", "<s3blobstorage two>")

    server = ZEOServer(tmp_path, s3, bucket_name, storages=both)
    with pytest.raises(AssertionError):
        server.start()
    output = server.output()
    assert "Traceback" not in output
    assert "'1'" in output and "'two'" in output and "s3-prefix" in output


# Commands


def test_no_command_works_in_the_prefix_of_another_living_server(place, s3, bucket_name, tool, tmp_path, claim):
    production = place("production")
    grow(production.start())
    wait_for(lambda: claim()["owner"])
    site = Site(tmp_path)
    site.grow()  # later transactions than those of production
    config = site.configure(s3, bucket_name)
    before = s3.keys(bucket_name)
    _, err = tool("migrate", config, "--from-blob-dir", site.blob_dir, status=1)
    assert "belongs to the server on" in err and "must never share a prefix" in err
    out, err = tool("verify", config, status=3)
    assert "belongs to the server on" in err
    figures = {line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) > 2}
    assert (figures["dead"], figures["others"]) == ("0", "3")
    out, err = tool("gc", config, "--dry-run")
    assert "belongs to the server on" in err
    assert "belongs to another database" in out
    _, err = tool("export", config, "--to-blob-dir", site.directory / "new", status=3)
    assert "belongs to the server on" in err
    _, err = tool("adopt", config, "--yes", status=1)
    assert "stop that server first" in err
    assert s3.keys(bucket_name) == before


def test_commands_say_that_a_prefix_is_that_of_the_database(place, s3, bucket_name, tool, claim):
    production = place("production")
    grow(production.start())
    wait_for(lambda: claim()["owner"])
    _, err = tool("verify", production.config)
    assert "belongs to this database" in err
    out, _ = tool("adopt", production.config, "--yes")
    assert out == "Nothing to do: the prefix is this database's, or free for it.\n"


# adopt


@pytest.fixture
def restored(place, s3, bucket_name):
    """A database that was restored in an older state, without the blob "later"; its server does not run."""
    production = place("production")
    grow(production.start())
    production.server.stop()
    backup = (production.directory / "Data.fs").read_bytes()
    write(production.start(), "later", b"data")
    production.server.stop()
    (production.directory / "Data.fs").write_bytes(backup)
    (production.directory / "Data.fs.index").unlink()
    return production


def test_adopt_shows_whose_the_prefix_was_and_asks(restored, s3, bucket_name, tool, claim):
    before = claim()
    process = tool.begin("adopt", restored.config)
    out, err = process.communicate("n\n", timeout=60)
    assert process.returncode == 1, err
    assert "belongs to  the server on" in out
    assert "when it was stopped" in out
    assert "does not have the last transaction of that one" in out
    assert "This database has 3 of the blobs, and does not have 1." in out
    assert out.endswith("Adopt the prefix? [y/N] Nothing was changed.\n")
    assert claim() == before
    process = tool.begin("adopt", restored.config)
    out, err = process.communicate("y\n", timeout=60)
    assert process.returncode == 0, err
    assert claim()["database"] == before["database"]
    assert claim()["last"] < before["last"]


@pytest.mark.parametrize("running", [False, True])
def test_after_adopt_packs_only_mark_for_a_week(restored, s3, bucket_name, tool, running):
    keys = s3.keys(bucket_name)
    if running:
        db = restored.start()
        wait_for(lambda: restored.server.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 1)
    tool("adopt", restored.config, "--yes")
    if not running:
        db = restored.start()
    write(db, "now", b"data")
    db.pack()
    assert set(keys) <= set(s3.keys(bucket_name))
    figures = restored.server.metrics()
    assert figures("s3blobs_bucket_owner_conflict", storage="1") == 0
    assert figures("s3blobs_gc_objects", storage="1", state="retained") == 1
    check(db)


def test_adopt_tells_programs(restored, tool, claim):
    before = claim()
    out, _ = tool("adopt", restored.config, "--json", status=1)  # which cannot be asked
    told = json.loads(out)
    assert told["other_blobs"] == 1 and told["result"].startswith("Nothing was changed")
    assert claim() == before
    out, _ = tool("adopt", restored.config, "--yes", "--json")
    told = json.loads(out)
    assert told["blobs_of_this_database"] == 3
    assert told["other_blobs"] == 1
    assert told["has_its_last_transaction"] is False
    assert told["stopped"] is True


def test_adopt_leaves_what_a_later_version_wrote(restored, s3, bucket_name, tool):
    said = json.dumps({"format": 3, "owner": "later"}).encode()
    s3.client.put_object(Bucket=bucket_name, Key=OWNER, Body=said)
    s3.misbehave(operation="OwnerGetObject", headers={"Date": "Sat, 28 Nov 2099 07:00:00 GMT"})
    _, err = tool("adopt", restored.config, "--yes", status=1)
    assert "later version" in err
    s3.behave()
    assert s3.client.get_object(Bucket=bucket_name, Key=OWNER)["Body"].read() == said


def test_an_aborted_transaction_is_none_of_the_business_of_the_owner(place):
    """Staging without the prefix stores and reads its own blobs all the same."""
    production, staging = place("production"), place("staging")
    grow(production.start())
    db = staging.start()
    write(db, "own", b"data")
    connection = db.open(transaction.TransactionManager())
    connection.root()["aborted"] = Blob(b"data")
    connection.transaction_manager.abort()
    connection.close()
    assert read(db, "own") == b"data"
