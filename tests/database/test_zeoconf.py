"""What the commands make of a zeo.conf: its encoding, and the database that it names."""

import json
from contextlib import closing

import pytest
from ZODB.FileStorage import FileIterator, FileStorage

from tests.support.sites import get, put, sentence
from tests.support.speed import slow_after, slow_but

DEMO = """
<demostorage>
  <filestorage base>
    path {dir}/Base.fs
  </filestorage>
  <filestorage changes>
    path {dir}/Changes.fs
  </filestorage>
</demostorage>
"""
WRAPPED_DEMO = """
<zlibstorage>
  <demostorage>
    <zlibstorage base>
      <filestorage>
        path {dir}/Base.fs
      </filestorage>
    </zlibstorage>
    <filestorage changes>
      path {dir}/Changes.fs
    </filestorage>
  </demostorage>
</zlibstorage>
"""
SQLITE = "%import relstorage\n<relstorage>\n<sqlite3>\n data-dir {dir}/gone\n</sqlite3>\n</relstorage>"
BASE = "<filestorage>\n path {dir}/Base.fs\n</filestorage>"
COMMANDS = [
    ["gc"],
    ["gc", "--dry-run"],
    ["verify"],
    ["migrate", "--from-blob-dir", "."],
    ["export", "--to-blob-dir", "x"],
    ["warm"],
]


# The encoding


@pytest.mark.parametrize("command", [["check"], *COMMANDS], ids=" ".join)
def test_a_file_in_another_encoding_is_refused_in_a_sentence(site, s3, bucket_name, tool, command):
    path = site.configure(s3, bucket_name)
    lines = path.read_text().count("\n") + 1
    path.write_bytes(path.read_bytes() + "# Ä\n".encode("latin-1"))
    name, *arguments = command
    _, err = tool(name, path, *arguments, status=1)
    assert sentence(err) == (
        f"zodb-s3blobs {name}: {path}, or a file that it includes, is not in UTF-8 (line {lines}): "
        f"save it in that encoding"
    )


# A demostorage


@pytest.fixture
def demo(start, s3, bucket_name):
    """Starts a server of a demostorage with a blob in its base and two in its changes; returns it."""

    def demo(base):
        server = start(base=BASE if base is DEMO else f"<zlibstorage>\n{BASE}\n</zlibstorage>")
        put(server.db(), "base", b"in the base")
        server.__exit__()
        s3.client.delete_object(Bucket=bucket_name, Key="1/owner.json")  # the demostorage is another database
        server = start(base=base)
        db = server.db()
        put(db, "base", b"written over in the changes")
        put(db, "changes", b"in the changes")
        return server

    return demo


@pytest.mark.parametrize("base", [DEMO, WRAPPED_DEMO], ids=["plain", "wrapped"])
@pytest.mark.parametrize("running", slow_but(False, of=[True, False]), ids=["beside the server", "without a server"])
def test_a_demostorage_of_two_files_is_verified_exported_and_migrated(
    demo, tool, tmp_path, s3, bucket_name, base, running
):
    server = demo(base)
    if not running:
        server.stop()
    config, keys = tmp_path / "zeo.conf", s3.keys(bucket_name)
    out, _ = tool("verify", config, "--checksum", "--json")
    found = json.loads(out)["found"]
    assert {word: count["objects"] for word, count in found.items() if count["objects"]} == {"good": 3}
    assert json.loads(tool("gc", config, "--dry-run", "--json")[0])["would_delete"] == []
    exported = tmp_path / "exported"
    assert "All blobs of the database" in tool("export", config, "--to-blob-dir", exported)[0]
    assert len(list(exported.rglob("*.blob"))) == 3
    for key in keys:
        if key.endswith(".blob"):
            s3.client.delete_object(Bucket=bucket_name, Key=key)
    tool("migrate", config, "--from-blob-dir", exported)
    assert [key for key in s3.keys(bucket_name) if key.endswith(".blob")] == [k for k in keys if k.endswith(".blob")]
    if not running:
        server.start()
    assert get(server.db(), "base") == b"written over in the changes"


@pytest.mark.parametrize("part", slow_but("Base.fs", of=["Base.fs", "Changes.fs"]))
def test_damage_in_a_part_of_a_demostorage_is_an_error(demo, tool, tmp_path, part):
    """What its iterator leaves out is not looked at."""
    demo(DEMO).stop()
    with closing(FileIterator(str(tmp_path / part))) as transactions:
        position = [transaction._tpos for transaction in transactions][1 if part == "Base.fs" else 0]
    data = bytearray((tmp_path / part).read_bytes())
    data[position + 16] = ord("c")  # as if that one had not been finished
    (tmp_path / part).write_bytes(data)
    _, err = tool("verify", tmp_path / "zeo.conf", status=1)
    assert f"{part} is damaged: the transactions after" in sentence(err)


@pytest.mark.parametrize(
    "base",
    slow_after(
        1,
        of=[
            "<demostorage/>",
            f"<demostorage>\n{BASE}\n</demostorage>",
            "<demostorage>\n<filestorage changes>\n path {dir}/Changes.fs\n</filestorage>\n</demostorage>",
            f"<demostorage>\n<mappingstorage changes/>\n{BASE}\n</demostorage>",
        ],
    ),
)
def test_a_demostorage_with_a_part_in_memory_cannot_be_read_by_another_process(start, tool, tmp_path, base):
    start(base=base)
    _, err = tool("verify", tmp_path / "zeo.conf", status=1)
    assert "only a filestorage can, by itself, in a wrapper, or as both base and changes of a demostorage" in sentence(
        err
    )


# A database that is not there


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("base", "missing"),
    slow_after(
        1,
        of=[
            ("<filestorage>\n path {dir}/Gone.fs\n</filestorage>", "Gone.fs"),
            ("<zlibstorage>\n<filestorage>\n path {dir}/Gone.fs\n</filestorage>\n</zlibstorage>", "Gone.fs"),
            (DEMO, "Base.fs"),
            (DEMO, "Changes.fs"),
            (WRAPPED_DEMO, "Base.fs"),
            (SQLITE, "gone/main.sqlite3"),
        ],
        unpack=True,
    ),
)
def test_no_command_makes_an_empty_database(site, s3, bucket_name, tool, tmp_path, monkeypatch, command, base, missing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".layout").write_text("bushy")
    for name in {"Base.fs", "Changes.fs"} - {missing}:
        FileStorage(str(tmp_path / name)).close()
    s3.put(bucket_name, ["1/blobs/1/1.blob"])
    name, *arguments = command
    before = {path.name for path in tmp_path.glob("*.fs*")}
    config = site.configure(s3, bucket_name, base=base)
    s3.forget()
    arguments = [tmp_path if one == "." else one for one in arguments]
    _, err = tool(name, config, *arguments, status=1)
    assert f"there is no database at {tmp_path}/{missing}: correct the path" in sentence(err)
    assert {path.name for path in tmp_path.glob("*.fs*")} == before
    assert not (tmp_path / "gone").exists()
    assert s3.requests() == []


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_a_file_that_is_no_database_is_named_in_a_sentence(site, s3, bucket_name, tool, tmp_path, command):
    config = site.configure(s3, bucket_name, base=BASE)
    (tmp_path / "Base.fs").write_text("This is no database.")
    _, err = tool(command, config, status=1)
    assert f"{tmp_path}/Base.fs is not the file of a filestorage" in sentence(err)


def test_a_configuration_without_the_section_is_named_in_a_sentence(tool, tmp_path):
    path = tmp_path / "other.conf"
    path.write_text("<zeo>\n address localhost:8100\n</zeo>\n<mappingstorage 1/>\n")
    _, err = tool("verify", path, status=1)
    assert f"{path} has no storage that is an <s3blobstorage>" in sentence(err)


@pytest.mark.parametrize("command", [["gc"], ["gc", "--dry-run"], ["verify"]], ids=" ".join)
def test_no_command_empties_a_database_that_is_to_be_made_anew(site, s3, bucket_name, tool, command):
    # `create true` makes a server begin with an empty one.
    base = "<filestorage>\n path {dir}/Data.fs\n create true\n</filestorage>"
    data = site.data_fs.read_bytes()
    name, *arguments = command
    tool(name, site.configure(s3, bucket_name, base=base), *arguments, status=3 if name == "verify" else 0)
    assert site.data_fs.read_bytes() == data
