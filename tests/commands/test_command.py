"""What all commands that read a zeo.conf have in common: what they print beside their results, and in which words."""

import json
import os
import resource
import subprocess
import sys

import pytest
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.utils import p64, u64

from tests.support.sites import KEYS, Site, put, sentence
from tests.support.speed import slow, slow_after, slow_but
from zodb_s3blobs.cache.directory import CacheDirectoryError, CacheError
from zodb_s3blobs.commands import common as command

COMMANDS = {
    "verify": [],
    "verify --checksum": ["--checksum"],
    "migrate": ["--from-blob-dir", "blobs"],
    "export": ["--to-blob-dir", "out"],
    "gc": ["--dry-run"],
    "adopt": ["--yes"],
    "warm": [],
}

#: As on a server whose locale nobody has set.
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    site.grow()
    return site


@pytest.fixture
def moved(site, tool, s3, bucket_name):
    """The zeo.conf of a site whose blobs have been copied into the bucket."""
    conf = site.configure(s3, bucket_name, gc_retention="30d")
    tool("migrate", conf, "--from-blob-dir", site.blob_dir)
    return conf


def arguments(site, name):
    """The command line for ``name``, without the zeo.conf."""
    line = [str(site.directory / one) if one in ("blobs", "out") else one for one in COMMANDS[name]]
    return name.split()[0], line


def being_written(site, tid):
    """Append the beginning of a transaction, as a server does that is just writing it."""
    with open(site.data_fs, "ab") as file:
        file.write(tid + p64(5000) + b" " + b"\0" * 6 + b"record")


# What is logged


@pytest.mark.parametrize("name", slow_after(2, of=COMMANDS))
def test_nothing_is_said_of_a_transaction_that_is_being_written_nor_of_a_scratch_cache(site, moved, tool, name):
    being_written(site, p64(u64(max(tid for _, tid in site.revisions)) + (1 << 20)))
    command, line = arguments(site, name)
    _, err = tool(command, moved, *line)
    assert "truncated" not in err and "The cache in" not in err and "WARNING" not in err
    assert all(line.startswith("INFO: ") for line in err.splitlines())


def test_damage_in_the_middle_of_the_database_is_said(site, moved, tool):
    tids = sorted({tid for _, tid in site.revisions})
    data = site.data_fs.read_bytes()
    position = data.index(tids[0])
    site.data_fs.write_bytes(data[: position + 8] + p64(1 << 40) + data[position + 16 :])
    _, err = tool("verify", moved, status=1)
    assert f"WARNING: {site.data_fs} truncated, possibly due to damaged records at {position}" in err
    assert f"zodb-s3blobs verify: {site.data_fs} is damaged" in err


def test_the_cache_logs_its_size_after_a_command_as_before(caplog, capsys):
    import logging

    logger = logging.getLogger("zodb_s3blobs.cache.files")
    before = logger.level
    assert command.run("verify", lambda: logger.getEffectiveLevel()) == logging.WARNING
    assert logger.level == before


# Words that a terminal does not know


@pytest.fixture
def umlauts(tmp_path, s3, bucket_name):
    """The zeo.conf of a database with a blob at a path that is not ASCII, which is missing; and the bytes of it."""
    site = Site(tmp_path)
    db = ZODB.DB(site.open())
    with db.transaction() as connection:
        connection.root()["Bücher"] = PersistentMapping({"höhe\u2192": Blob(b"data")})
    db.close()
    return site.configure(s3, bucket_name)


@slow
def test_a_path_with_umlauts_on_a_terminal_that_knows_only_ascii(umlauts, tool):
    out, _ = tool.end(tool.begin("verify", umlauts, env=ASCII), status=3)
    assert " at /B\\xfccher/h\\xf6he\\u2192: " in out
    assert out.splitlines()[-1] == "Not well: 1 missing."
    strict = {**ASCII, "PYTHONIOENCODING": "latin-1:strict"}
    out, _ = tool.end(tool.begin("verify", umlauts, env=strict, encoding="latin-1"), status=3)
    assert " at /Bücher/höhe\\u2192: " in out


def test_json_is_the_same_in_any_encoding(umlauts, tool):
    out, _ = tool.end(tool.begin("verify", umlauts, "--json", env=ASCII), status=3)
    assert json.loads(out)["problems"][0]["path"] == "/Bücher/höhe\u2192"


@slow
def test_an_error_with_umlauts_on_a_terminal_that_knows_only_ascii(umlauts, tool, tmp_path):
    for options in ["--to-blob-dir", str(tmp_path / "Data.fs" / "höhe")], ["--to-blob-dir", "höhe", "--ä"]:
        process = tool.begin("export", umlauts, *options, env=ASCII)
        _, err = tool.end(process, status=2 if "--ä" in options else 1)
        assert err.isascii() and "Traceback" not in err


# Temporary files


def limited(size):
    """For a process whose files cannot grow beyond ``size``: the nearest to a full disk that does without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FILLING = """
import sys
from ZODB.utils import p64
from zodb_s3blobs import cli
from zodb_s3blobs.commands import common as command
from zodb_s3blobs.database import blob_index as inventory
from zodb_s3blobs.database import object_paths as paths

def fill():
    if sys.argv[1] == "inventory":
        tables = inventory.Inventory()
        tables.add_named((p64(number), p64(number)) for number in range(300_000))
    else:
        tables = paths._Graph()
        tables.add((p64(number), p64(number), {p64(number + 1): 0}) for number in range(300_000))

sys.exit(command.run("verify", fill))
"""


@pytest.mark.parametrize("what", ["inventory", "paths"])
@pytest.mark.parametrize("variable", slow_but("TMPDIR", of=["TMPDIR", "SQLITE_TMPDIR", None]))
def test_a_full_disk_under_a_temporary_table_is_named(tmp_path, what, variable):
    env = {name: value for name, value in os.environ.items() if "TMPDIR" not in name}
    if variable:
        env[variable] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FILLING, what], env=env, preexec_fn=limited(1 << 16), capture_output=True, text=True
    )
    assert done.returncode == 1
    where = tmp_path if variable else "/var/tmp"
    line = sentence(done.stderr)
    assert (
        line.startswith(f"zodb-s3blobs verify: the temporary directory {where} cannot be used: ") and "TMPDIR" in line
    )


@pytest.mark.parametrize("name", slow_but("gc", of=["verify", "gc"]))
def test_where_there_is_no_room_for_any_temporary_file_it_is_said(site, moved, tool, name):
    command, line = arguments(site, name)
    out, err = tool.end(tool.begin(command, moved, *line, preexec_fn=limited(0)), status=1)
    assert out == ""
    line = sentence(err)
    assert "No usable temporary directory" in line and "/var/tmp" in line and "TMPDIR" in line and "Errno" not in line


def caused(error, number, *place):
    """``error`` as the cache raises it for what the system said."""
    error.__cause__ = OSError(number, os.strerror(number), *place)
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            caused(CacheDirectoryError("{tmp}/tmp1 cannot be used: [Errno 28] No space left"), 28, "{tmp}/tmp1/tmp"),
            "the temporary directory {tmp} cannot be used: {tmp}/tmp1/tmp: No space left on device. Make room there",
        ),
        (
            caused(CacheError("Cannot write to cache-dir {tmp}/tmp1: No space left"), 28),
            "the temporary directory {tmp} cannot be used: No space left on device. Make room there",
        ),
        (
            caused(CacheError("Cannot write to cache-dir /srv: No space; advice"), 28),
            "Cannot write to cache-dir /srv: No",
        ),
        (
            OSError(28, "No space left on device", "{tmp}/tmp1/x"),
            "the temporary directory {tmp} cannot be used: {tmp}/tmp1/x: No",
        ),
        (OSError(28, "No space left on device"), "the temporary directory {tmp} cannot be used: No space"),
        (OSError(28, "No space left on device", "/srv/x"), "/srv/x: No space left on device"),
        (OSError(13, "Permission denied", "{tmp}/site/Data.fs"), "{tmp}/site/Data.fs: Permission denied"),
        (OSError("Cannot write to somewhere"), "Cannot write to somewhere"),
    ],
)
def test_an_error_of_a_file_is_a_sentence(error, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for one in filter(None, (error, error.__cause__)):
        one.args = tuple(str(arg).format(tmp=tmp_path) if isinstance(arg, str) else arg for arg in one.args)
        if getattr(one, "filename", None):
            one.filename = one.filename.format(tmp=tmp_path)

    def work():
        raise error

    assert command.run("verify", work) == 1
    assert capsys.readouterr().err.startswith(f"zodb-s3blobs verify: {told.format(tmp=tmp_path)}")


# The last line


def last_line(out):
    return out.splitlines()[-1]


def test_the_last_line_says_whether_all_is_well(site, moved, tool, s3, bucket_name):
    def last(name, status=0):
        command, line = arguments(site, name)
        return last_line(tool(command, moved, *line, status=status)[0])

    assert last("verify").startswith("All is well as far as sizes tell")
    assert last("verify --checksum") == "All is well."
    assert last("migrate") == "All blobs of the database are in the bucket."
    assert last("export") == f"All blobs of the database are in {site.directory / 'out'}."
    assert last("gc") == "All is well: a pack deletes nothing."
    assert last("adopt") == "Nothing to do: the prefix is this database's, or free for it."
    s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*min(site.revisions)))
    assert last("verify", 3) == "Not well: 1 missing."
    for path in site.directory / "out", site.blob_dir:
        (file,) = path.rglob(site.file(*min(site.revisions)).name)
        file.unlink()
    assert last("migrate", 3) == "Not everything is in the bucket as it should be: 1 missing."
    assert last("export", 3) == f"Not all blobs of the database are in {site.directory / 'out'}: 1 missing."


def test_the_last_line_of_a_dry_run_says_how_much_would_go(s3, bucket_name, site, tool):
    conf = site.configure(s3, bucket_name, gc_max_delete_percent=100)
    tool("migrate", conf, "--from-blob-dir", site.blob_dir)
    db = ZODB.DB(site.open())
    put(db, "later", b"data")
    db.close()
    s3.put(bucket_name, [f"1/blobs/{number:x}/3d0c0b0a0908070.blob" for number in range(900, 903)])
    assert last_line(tool("gc", conf, "--dry-run")[0]) == "A pack would delete the 3 objects listed."
