"""``zodb-s3blobs migrate`` in processes of its own: beside servers, interrupted, and with all that can be wrong."""

import fcntl
import hashlib
import itertools
import json
import logging
import os
import pty
import re
import signal
import struct
import termios
from collections import Counter

import pytest
import ZODB
from ZODB.config import storageFromString
from ZODB.FileStorage import FileStorage
from ZODB.tests.hexstorage import HexStorage
from ZODB.utils import oid_repr, tid_repr

from tests.support.sites import KEYS, Site, break_disk, contents, get, names, put, sentence, tree, undo
from tests.support.speed import slow, slow_but
from tests.support.zeo_server import FILESTORAGE
from zodb_s3blobs import cli, progress

PLAIN = "<filestorage 1>\n path {dir}/Data.fs\n blob-dir {dir}/blobs\n</filestorage>"
DIGITS = itertools.count()


@pytest.fixture
def conf(site, s3, bucket_name):
    """The zeo.conf of a server that does not run, with the blob directory of the site as its fallback."""
    return site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir)


@pytest.fixture
def stored(s3, bucket_name):
    """What is in the bucket: key -> bytes."""

    def stored():
        return {
            key: s3.client.get_object(Bucket=bucket_name, Key=key)["Body"].read()
            for key in sorted(s3.keys(bucket_name))
        }

    return stored


def objects(site):
    """What should be in the bucket: key -> bytes."""
    return {KEYS.key(*name): data for name, data in site.revisions.items()}


def new_client(server, tmp_path):
    """One that has nothing in its own cache."""
    return server.client(blob_dir=str(tmp_path / f"client-{next(DIGITS)}-of-this-test"))


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def operations(s3):
    return Counter(request.operation for request in s3.requests())


def hold(s3, operation, after=0):
    """Let that many requests pass, and no more."""
    s3.misbehave(operation=operation, times=after)
    s3.misbehave(operation=operation, hang=True)


# Beside servers


def test_a_site_moves_without_downtime(s3, site, start, tool, tmp_path, stored):
    """The server has been switched and restarted: it reads and writes while the old blobs are copied."""
    site.grow(large=9 << 20)
    old = dict(site.revisions)
    before = tree(site.blob_dir)
    server = start(options={"fallback_blob_dir": site.blob_dir, "s3_read_timeout": "60s"})
    hold(s3, "PutObject|CreateMultipartUpload")
    migrating = tool.begin("migrate", server.directory / "zeo.conf", "--json")
    s3.wait_for("PutObject", 5)
    client = new_client(server, tmp_path)
    assert contents(client, old) == old
    s3.behave()
    out, _ = tool.end(migrating)
    assert counts(out) == {"copied": len(old)}
    assert stored() == objects(site)
    assert tree(site.blob_dir) == before

    db = server.db(blob_dir=str(tmp_path / "another"))
    put(db, "new", b"committed after the switch")
    out, _ = tool("migrate", server.directory / "zeo.conf", "--json")
    assert counts(out) == {"there": len(old), "new": 1}

    server.stop()
    site.blob_dir.rename(tmp_path / "in the attic")
    config = (server.directory / "zeo.conf").read_text()
    server = start(options={})
    assert "fallback-blob-dir" in config and "fallback-blob-dir" not in (server.directory / "zeo.conf").read_text()
    for file in server.cache_dir.glob("blobs/*/*.blob"):
        file.unlink()
    assert contents(new_client(server, tmp_path), old) == old
    db = server.db(blob_dir=str(tmp_path / "one more"))
    assert get(db, "one") == b"one after pack 1 " * 30
    undo(db, 2)  # after which only "three" and "new" were committed
    assert get(db, "one") == b"one after pack 2 " * 30
    db.pack()
    assert get(db, "one") == b"one after pack 2 " * 30
    assert get(db, "new") == b"committed after the switch"
    assert tree(tmp_path / "in the attic") == before


@slow
def test_most_of_it_can_be_copied_before_the_switch_beside_the_old_server(s3, site, start, tool, bucket_name, stored):
    server = start(storages=lambda settings: PLAIN.format(**settings))
    conf = site.configure(s3, bucket_name)
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert stored() == objects(site)
    db = server.db()
    put(db, "new", b"committed by the old server")
    s3.forget()
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json")
    assert counts(out) == {"there": len(site.revisions), "copied": 1}
    assert operations(s3)["PutObject"] == 1
    server.stop()
    site.note()
    assert stored() == objects(site)


@pytest.mark.parametrize("operation", slow_but("PutObject", of=["ListObjects", "PutObject"]))
def test_what_is_packed_away_meanwhile_is_not_missing(s3, site, tool, conf, operation):
    """ListObjects: before its file is looked for; PutObject: while it is being copied."""
    storage = site.open()
    db = ZODB.DB(storage)
    hold(s3, operation)
    migrating = tool.begin("migrate", conf, "--json")
    s3.wait_for(operation, 1 if operation == "ListObjects" else len(site.revisions))
    db.pack()
    left = names(storage)
    db.close()
    assert len(left) < len(site.revisions)
    s3.behave()
    out, _ = tool.end(migrating)
    assert counts(out) == {"copied": len(left)}
    assert json.loads(out)["problems"] == []


# What it does


def test_what_is_there_is_looked_at_and_not_sent_again(s3, site, tool, conf, stored):
    before = tree(site.blob_dir), site.data_fs.read_bytes()
    out, _ = tool("migrate", conf)
    number, size = len(site.revisions), sum(map(len, site.revisions.values()))
    assert re.search(rf"^copied +{number} +{size:,}  ", out, re.M)
    assert re.search(r"^missing +0 +0  ", out, re.M) and re.search(r"^failed +0 +0  ", out, re.M)
    assert stored() == objects(site)
    s3.forget()
    out, _ = tool("migrate", conf)
    assert re.search(rf"^there +{number} +{size:,}  ", out, re.M) and re.search(r"^copied +0 +0  ", out, re.M)
    assert operations(s3) == {"ListObjects": 1, "HeadObject": number}
    assert (tree(site.blob_dir), site.data_fs.read_bytes()) == before


def test_a_lawn_moves_as_well(s3, tmp_path, tool, bucket_name, stored):
    site = Site(tmp_path, "lawn")
    site.grow()
    tool("migrate", site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir))
    assert stored() == objects(site)


@pytest.mark.parametrize("place", slow_but("outside", of=["inside", "outside"]))
def test_blobs_are_known_where_a_wrapper_transforms_every_record(s3, tmp_path, tool, bucket_name, stored, place):
    site = Site(tmp_path, wrap=HexStorage)
    site.grow()
    settings = {
        "inside": {"base": f"<hexstorage>\n{FILESTORAGE}\n</hexstorage>"},
        "outside": {"wrapper": "<hexstorage 1>\n{}\n</hexstorage>"},
    }[place]
    conf = site.configure(s3, bucket_name, imports="%import ZODB.tests\n", fallback_blob_dir=site.blob_dir, **settings)
    if place == "outside":
        conf.write_text(conf.read_text().replace("<s3blobstorage 1>", "<s3blobstorage>"))
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert stored() == objects(site)


def test_files_that_the_database_does_not_know_are_counted_and_stay(s3, site, tool, conf, stored):
    (oid, tid), *_ = site.revisions
    folder = site.file(oid, tid).parent
    for number in range(3):
        (folder / f"0x03d0c0b0a090807{number}.blob").write_bytes(b"unknown")
    (folder / "README.txt").write_bytes(b"foreign")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "folder").symlink_to(site.directory)
    (site.blob_dir / "tmp" / "left.tmp").write_bytes(b"temporary")
    before = tree(site.blob_dir)
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"copied": len(site.revisions), "unknown": 3, "foreign": 3}
    assert json.loads(out)["found"]["unknown"]["bytes"] == 21
    assert stored() == objects(site)
    assert tree(site.blob_dir) == before


@pytest.mark.parametrize("number", slow_but(signal.SIGKILL, of=[signal.SIGINT, signal.SIGKILL]))
def test_what_was_interrupted_goes_on_where_it_stopped(s3, site, tool, bucket_name, stored, number):
    site.grow(more=10)
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_concurrency=2, s3_read_timeout="120s")
    hold(s3, "PutObject", after=5)
    migrating = tool.begin("migrate", conf)
    s3.wait_for("PutObject", 7)
    migrating.send_signal(number)
    out, err = migrating.communicate(timeout=30)  # less than the service would keep it
    assert out == "" and "Traceback" not in err
    if number == signal.SIGINT:
        assert migrating.returncode == 130
        assert "interrupted" in sentence(err)
    assert len(stored()) == 5
    assert stored().items() <= objects(site).items()
    s3.behave()
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"there": 5, "copied": len(site.revisions) - 5}
    assert stored() == objects(site)
    done = Counter(request.path for request in s3.requests("PutObject") if request.status == 200)
    assert set(done.values()) == {1} and len(done) == len(site.revisions)


@slow
def test_two_at_once_do_no_harm(s3, site, tool, conf, stored):
    before = tree(site.blob_dir)
    hold(s3, "PutObject")
    both = [tool.begin("migrate", conf, "--json") for _ in range(2)]
    s3.wait_for("PutObject", 2 * len(site.revisions))
    s3.behave()
    for one in both:
        out, _ = tool.end(one)
        assert counts(out) == {"copied": len(site.revisions)}
    assert stored() == objects(site)
    assert tree(site.blob_dir) == before


# What is wrong with files


def test_what_neither_has_is_listed_by_oid_and_tid_and_the_rest_is_copied(site, tool, conf, stored):
    gone = list(site.revisions)[1:3]
    for name in gone:
        site.file(*name).unlink()
    out, _ = tool("migrate", conf, "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 2, "missing": 2}
    problems = json.loads(out)["problems"]
    assert sorted((one["problem"], one["oid"], one["tid"]) for one in problems) == sorted(
        ("missing", oid_repr(oid), tid_repr(tid)) for oid, tid in gone
    )
    out, _ = tool("migrate", conf, status=3)
    for oid, tid in gone:
        assert re.search(rf"^missing: oid {oid_repr(oid)} tid {tid_repr(tid)} .*{KEYS.key(oid, tid)}", out, re.M)
    assert re.search(r"^missing +2 ", out, re.M)
    left = {key: data for key, data in objects(site).items() if key not in {KEYS.key(*name) for name in gone}}
    assert stored() == left


@pytest.mark.parametrize("how", ["shorter", "as long"])
def test_a_file_that_is_not_what_the_bucket_has_is_listed_and_the_object_stays(s3, site, tool, conf, stored, how):
    """A file that was truncated since it was copied, or another database's object in the way."""
    tool("migrate", conf)
    before = stored()
    name = next(name for name, data in site.revisions.items() if data)
    path = site.file(*name)
    data = site.revisions[name]
    path.chmod(0o600)
    path.write_bytes(data[:-1] if how == "shorter" else data[:-1] + b"?")
    s3.forget()
    out, _ = tool("migrate", conf, "--json", status=3)
    (problem,) = json.loads(out)["problems"]
    assert (problem["oid"], problem["tid"]) == (oid_repr(name[0]), tid_repr(name[1]))
    assert KEYS.key(*name) in problem["reason"] and str(path) in problem["reason"]
    assert counts(out)["there"] == len(site.revisions) - 1
    assert stored() == before
    assert "PutObject" not in operations(s3)


def test_files_that_cannot_be_read_do_not_keep_the_others_from_being_copied(s3, site, tool, bucket_name, stored):
    """However many are in a row: a bad region of a disk."""
    site.grow(more=50)
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_concurrency=1)
    in_order = sorted(site.revisions)
    bad = in_order[-40:-10]
    for name in bad:
        break_disk(site.file(*name))
    out, _ = tool("migrate", conf, "--json", status=3)
    problems = {(one["oid"], one["tid"]): one["reason"] for one in json.loads(out)["problems"]}
    assert problems.keys() == {(oid_repr(oid), tid_repr(tid)) for oid, tid in bad}
    for oid, tid in bad:
        assert str(site.file(oid, tid)) in problems[oid_repr(oid), tid_repr(tid)]
    assert stored() == {KEYS.key(*name): site.revisions[name] for name in in_order if name not in bad}


# What is wrong with the bucket


def test_a_bucket_that_refuses_everything_is_asked_no_more_after_a_while(s3, site, tool, bucket_name):
    site.grow(more=100)
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_concurrency=2)
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied", message="test-secret")
    out, err = tool("migrate", conf, status=1)
    assert int(re.search(r"(?m)^failed +(\d+) ", out)[1]) >= 20  # what has been found so far
    line = sentence(err)
    assert "AccessDenied" in line and "s3-access-key" in line
    assert 20 <= operations(s3)["PutObject"] < 30


@pytest.mark.parametrize("fault", [{"status": 403, "code": "AccessDenied"}, {"status": 404, "code": "NoSuchBucket"}])
def test_a_bucket_that_cannot_be_listed_is_an_error_in_one_sentence(s3, tool, conf, fault):
    s3.misbehave(operation="ListObjects", **fault)
    out, err = tool("migrate", conf, status=1)
    assert out == "" and fault["code"] in sentence(err)
    assert operations(s3).keys() == {"ListObjects"}


def test_what_failed_once_is_listed_and_the_next_run_copies_it(s3, site, tool, bucket_name, stored):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_max_attempts=1)
    s3.misbehave(operation="PutObject", times=2)
    s3.misbehave(operation="PutObject", times=1, status=500, code="InternalError")
    out, _ = tool("migrate", conf, "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 1, "failed": 1}
    (problem,) = json.loads(out)["problems"]
    assert "InternalError" in problem["reason"]
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"there": len(site.revisions) - 1, "copied": 1}
    assert stored() == objects(site)


@pytest.mark.parametrize(
    "fault",
    [
        {"headers": {"Content-Length": "1"}},
        {"headers": {"x-amz-meta-sha256": hashlib.sha256(b"other").hexdigest()}},
        {"status": 404},
        {"status": 500},
    ],
)
def test_what_the_bucket_does_not_have_as_it_was_sent_is_not_taken_for_copied(s3, site, tool, bucket_name, fault):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_max_attempts=1)
    s3.misbehave(operation="HeadObject", times=1, **fault)
    out, _ = tool("migrate", conf, "--json", status=3)
    (problem,) = json.loads(out)["problems"]
    assert re.search(r"1/blobs/[0-9a-f]+/[0-9a-f]+\.blob", problem["reason"])
    assert counts(out)["copied"] == len(site.revisions) - 1


def test_damage_on_the_way_is_not_blamed_on_another_database(s3, site, tool, conf):
    s3.misbehave(operation="HeadObject", times=1, headers={"Content-Length": "1"})
    out, _ = tool("migrate", conf, "--json", status=3)
    (problem,) = json.loads(out)["problems"]
    assert "another database" not in problem["reason"] and "was stored" in problem["reason"]


# What is wrong with the settings


def test_the_source_is_to_be_named(s3, site, tool, bucket_name):
    out, err = tool("migrate", site.configure(s3, bucket_name), status=1)
    assert out == "" and "fallback-blob-dir" in sentence(err) and "--from-blob-dir" in sentence(err)
    assert s3.requests() == []


@pytest.mark.parametrize("there", [None, "an empty directory"])
def test_a_source_that_is_no_blob_directory_is_refused_before_anything_is_asked_of_the_bucket(
    s3, site, tool, conf, tmp_path, there
):
    """Not mounted, say: that must not end in a report that all blobs are missing."""
    if there:
        (tmp_path / "elsewhere").mkdir()
    out, err = tool("migrate", conf, "--from-blob-dir", tmp_path / "elsewhere", status=1)
    assert out == "" and str(tmp_path / "elsewhere") in sentence(err)
    assert s3.requests() == []


def test_a_source_that_goes_away_meanwhile_is_an_error_and_no_blob_is_missing(s3, site, tool, conf, tmp_path):
    hold(s3, "ListObjects")
    migrating = tool.begin("migrate", conf)
    s3.wait_for("ListObjects")
    site.blob_dir.rename(tmp_path / "elsewhere")
    site.blob_dir.mkdir()
    s3.behave()
    out, err = tool.end(migrating, status=1)
    assert out == "" and str(site.blob_dir) in sentence(err) and "mounted" in sentence(err)


# How far it is


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(site, conf, caplog, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0)
    caplog.set_level(logging.INFO, "zodb_s3blobs")
    assert cli.main(["migrate", "-C", str(conf)]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "zodb_s3blobs.progress"]
    number = len(site.revisions)
    for wanted in (
        r"Reading the database: \d+ transactions, .*/s, .* so far",
        rf"Migrating: {number} of {number} blobs, 100%, [\d.k]+B, [\d.]+ blobs/s, .* left",
        rf"Looking for other files: {number} files, .*",
    ):
        assert any(re.fullmatch(wanted, line) for line in lines), (wanted, lines)
    assert not any("\r" in line or "\n" in line or "█" in line for line in lines)
    assert "Migrating" not in capsys.readouterr().out


def test_what_takes_no_time_logs_no_lines_but_whose_the_prefix_is(tool, conf):
    _, err = tool("migrate", conf)
    (line,) = err.splitlines()
    assert line.startswith("INFO: s3-prefix '1' of bucket ")


def test_an_empty_name_is_refused_and_does_not_mean_the_fallback(s3, tool, conf):
    s3.forget()
    _, err = tool.end(tool.begin("migrate", conf, "--from-blob-dir", ""), status=2)
    assert err.splitlines()[-1] == "zodb-s3blobs migrate: error: argument --from-blob-dir: is empty: name a directory"
    assert s3.requests() == []


def test_on_a_terminal_there_is_a_bar(s3, site, tool, conf):
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    migrating = tool.begin("migrate", conf, "--json", stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # what Linux says at the end
            break
        if not data:
            break
        shown += data
    os.close(ours)
    out, _ = migrating.communicate(timeout=60)
    assert migrating.returncode == 0
    assert counts(out) == {"copied": len(site.revisions)}
    text = shown.decode()
    assert re.search(r"Migrating: .*100%.*\|.*\d+/\d+.*blobs/s", text.replace("\r", "\n"))
    assert "Traceback" not in text


# Whole databases, in the way of zodbconvert


@pytest.mark.parametrize(
    ("wrapper", "place"),
    [(None, None), *itertools.product(["hexstorage", "zlibstorage"], ["inside", "outside"])],
)
def test_a_whole_database_is_copied_into_a_bucket_and_out_of_it(s3, tmp_path, bucket_name, site, wrapper, place):
    site.grow(large=9 << 20)
    base = "<filestorage>\n path {dir}/New.fs\n</filestorage>"
    text = site.configure(
        s3, bucket_name, base=f"<{wrapper}>\n{base}\n</{wrapper}>" if place == "inside" else base
    ).read_text()
    section = re.search(r"<s3blobstorage.*</s3blobstorage>", text, re.S)[0]
    if place == "outside":
        section = f"<{wrapper}>\n{section}\n</{wrapper}>"
    storage = storageFromString(f"%import zodb_s3blobs\n%import zc.zlibstorage\n%import ZODB.tests\n{section}")
    plain = site.open()
    storage.copyTransactionsFrom(plain)
    plain.close()
    assert sorted(s3.keys(bucket_name)) == site.keys()
    back = FileStorage(str(tmp_path / "Back.fs"), blob_dir=str(tmp_path / "back"))
    for file in (tmp_path / "cache" / "blobs").glob("*/*.blob"):
        file.unlink()
    back.copyTransactionsFrom(storage)
    for copy in storage, back:
        assert contents(copy, names(copy)) == site.revisions
        copy.close()
    # The same database, and not only the same blobs.
    source, copied = FileStorage(str(site.data_fs)), FileStorage(str(tmp_path / "Back.fs"))
    for one, other in zip(source.iterator(), copied.iterator(), strict=True):
        assert (one.tid, one.user, one.description) == (other.tid, other.user, other.description)
        assert [(r.oid, r.tid, r.data) for r in one] == [(r.oid, r.tid, r.data) for r in other]
    for storage in source, copied:
        storage.close()
