"""The commands on a database of RelStorage, which moves in from its own blob directory and out again."""

import json

import pytest
from ZODB.config import databaseFromString

from tests.support.relstorage_databases import IMPORTS
from tests.support.sites import get, put, tree


@pytest.fixture
def open_plain(database):
    """Opens the database as one with a blob directory of its own."""

    def open_plain(directory):
        section = database.section(blob_dir=directory, shared_blob_dir="true")
        return databaseFromString(f"{IMPORTS}<zodb>\n{section}\n</zodb>")

    return open_plain


@pytest.fixture
def blob_dir(open_plain, tmp_path):
    """The blob directory that the database has had so far, with two revisions of a blob, and another one."""
    db = open_plain(tmp_path / "blobs")
    for name, data in ("one", b"first"), ("one", b"second"), ("two", b"other"):
        put(db, name, data)
    db.close()
    return tmp_path / "blobs"


@pytest.fixture
def command(application, tool, tmp_path):
    """Runs a command with a zeo.conf that has the section; returns what it prints as JSON."""
    conf = tmp_path / "zeo.conf"
    section = application.config(cache="cache-of-commands")
    conf.write_text(f"{IMPORTS}<zeo>\n address localhost:8100\n</zeo>\n{section}")

    def command(name, *arguments):
        out, _ = tool(name, conf, "--json", *arguments)
        return json.loads(out)

    return command


@pytest.fixture
def blobs(application):
    """The keys of the blobs in the bucket."""
    return lambda: {key for key in application.s3.keys(application.bucket) if "/blobs/" in key}


def test_blobs_move_from_the_databases_own_directory_to_the_bucket_and_out_again(
    application, database, open_plain, blob_dir, command, blobs, tmp_path
):
    number = 3 if database.history else 2  # the first revision is nobody's any more in a history-free database
    before = tree(blob_dir)
    assert command("migrate", "--from-blob-dir", blob_dir)["found"]["copied"]["objects"] == number
    assert len(blobs()) == number
    assert tree(blob_dir) == before
    assert command("verify", "--checksum")["found"]["good"]["objects"] == number
    db = application.db()
    assert [get(db, "one"), get(db, "two")] == [b"second", b"other"]
    application.s3.wait_for("OwnerPutObject")
    # Beside a process of the application, which has the prefix now.
    assert command("migrate", "--from-blob-dir", blob_dir)["found"]["there"]["objects"] == number
    db.close()
    assert command("export", "--to-blob-dir", tmp_path / "out")["found"]["copied"]["objects"] == number
    db = open_plain(tmp_path / "out")
    assert [get(db, "one"), get(db, "two")] == [b"second", b"other"]
    db.close()


def test_gc_deletes_what_is_dead_beside_a_process_of_the_application(application, database, command, blobs):
    db = application.db()
    put(db, "one", b"first")
    old = blobs()
    put(db, "one", b"second")
    dead = set() if database.history else old
    application.s3.wait_for("OwnerPutObject")
    found = command("gc", "--dry-run")
    assert {one["key"] for one in found["would_delete"]} == dead
    assert found["refused"] is None
    assert blobs() >= old
    assert command("gc")["deleted_objects"] == len(dead)
    assert blobs() & old == old - dead
    assert get(db, "one") == b"second"
    put(db, "one", b"third")
    assert get(db, "one") == b"third"
    db.close()
