"""``zodb-s3blobs export`` in processes of its own: what it makes, a plain FileStorage opens and reads byte for byte."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
from collections import Counter

import pytest
import ZODB
from ZODB.FileStorage import FileStorage
from ZODB.utils import oid_repr, tid_repr

from tests.support.sites import KEYS, Site, contents, get, names, put, sentence, tree, undo
from tests.support.speed import slow_after, slow_but

MIB = 1 << 20


@pytest.fixture
def fill(s3, bucket_name):
    """Puts the blobs (oid, tid) -> bytes into the bucket, as the server does."""

    def fill(revisions):
        for name, data in revisions.items():
            metadata = {"sha256": hashlib.sha256(data).hexdigest()}
            s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(*name), Body=data, Metadata=metadata)

    return fill


@pytest.fixture
def site(tmp_path, fill):
    """A site whose blobs are all in the bucket; what was its blob directory is at ``original`` now."""
    site = Site(tmp_path)
    site.grow()
    fill(site.revisions)
    site.blob_dir.rename(tmp_path / "original")
    return site


@pytest.fixture
def conf(site, s3, bucket_name):
    return site.configure(s3, bucket_name)


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def plain(site, out_dir, tmp_path):
    """Opens a plain FileStorage of a copy of Data.fs and what was exported."""
    opened = []

    def plain():
        (tmp_path / "copy").mkdir()
        shutil.copy(site.data_fs, tmp_path / "copy" / "Data.fs")
        opened.append(FileStorage(str(tmp_path / "copy" / "Data.fs"), blob_dir=str(out_dir)))
        return opened[-1]

    yield plain
    for storage in opened:
        storage.close()


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def operations(s3):
    return Counter(request.operation for request in s3.requests())


def exported(directory):
    """The blobs' files: path -> bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*.blob")
        if path.relative_to(directory).parts[0] != "tmp"
    }


def file_of(directory, oid, tid):
    (path,) = directory.rglob(f"{'/'.join(f'0x{byte:02x}' for byte in oid)}/0x{tid.hex()}.blob")
    return path


# The way back


def test_a_plain_filestorage_reads_every_revision_undoes_and_packs(s3, site, tool, conf, out_dir, plain, tmp_path):
    s3.forget()
    before = site.data_fs.read_bytes()
    out, _ = tool("export", conf, "--to-blob-dir", out_dir)
    number, size = len(site.revisions), sum(map(len, site.revisions.values()))
    assert re.search(rf"^copied +{number} +{size:,}  ", out, re.M)
    # To find out that an object is empty takes a second request.
    assert operations(s3) == {"GetObject": number + list(site.revisions.values()).count(b"")}
    assert site.data_fs.read_bytes() == before and not (tmp_path / "cache").exists()

    # As if it had never been away: names, bytes, and who may do what with them.
    original = tree(tmp_path / "original")
    assert {name: (mode, data) for name, (mode, _, data) in tree(out_dir).items()} == {
        name: (mode, data) for name, (mode, _, data) in original.items()
    }
    storage = plain()
    assert contents(storage, names(storage)) == site.revisions
    db = ZODB.DB(storage)
    assert get(db, "one") == b"one after pack 1 " * 30
    undo(db, 1)  # what was committed after it is another blob
    assert get(db, "one") == b"one after pack 2 " * 30
    put(db, "one", b"a new one")
    db.pack()
    assert get(db, "one") == b"a new one"
    assert len(exported(out_dir)) == len(names(storage)) < number
    db.close()


def test_a_site_moves_out_in_two_runs_of_which_the_second_copies_what_was_committed_meanwhile(
    s3, site, start, tool, out_dir, plain
):
    server = start()
    conf = server.directory / "zeo.conf"
    db = server.db()
    put(db, "new", b"committed to the bucket")
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"copied": len(site.revisions) + 1}
    put(db, "one", b"committed meanwhile")
    undo(db, 1)
    server.stop()
    s3.forget()
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out)["there"] == len(site.revisions) + 1
    assert operations(s3)["GetObject"] == counts(out)["copied"] == 1
    storage = plain()
    found = contents(storage, names(storage))
    assert found.items() > site.revisions.items()
    db = ZODB.DB(storage)
    assert get(db, "one") == b"committed meanwhile"
    db.close()


def test_a_lawn_stays_one(s3, site, tool, conf, out_dir, plain):
    out_dir.mkdir()
    (out_dir / ".layout").write_text("lawn")
    tool("export", conf, "--to-blob-dir", out_dir)
    assert (out_dir / "0x01").is_dir()
    storage = plain()
    assert contents(storage, names(storage)) == site.revisions


def test_a_directory_without_its_marker_gets_it_back_so_that_a_filestorage_finds_the_blobs(
    site, tool, conf, out_dir, plain
):
    tool("export", conf, "--to-blob-dir", out_dir)
    (out_dir / ".layout").unlink()
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"there": len(site.revisions)}
    storage = plain()
    assert contents(storage, names(storage)) == site.revisions


# Again


def test_what_is_there_and_right_is_not_read_again(s3, site, tool, conf, out_dir):
    tool("export", conf, "--to-blob-dir", out_dir)
    before = tree(out_dir)
    s3.forget()
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"there": len(site.revisions)}
    assert operations(s3) == {"HeadObject": len(site.revisions)}
    assert tree(out_dir) == before


@pytest.mark.parametrize("how", slow_but("changed", of=["truncated", "empty", "changed"]))
def test_a_file_that_is_not_what_the_bucket_has_is_replaced(s3, site, tool, conf, out_dir, how):
    tool("export", conf, "--to-blob-dir", out_dir)
    right = exported(out_dir)
    name = next(name for name, data in site.revisions.items() if data)
    path = file_of(out_dir, *name)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes({"truncated": data[:-1], "empty": b"", "changed": data[:-1] + b"?"}[how])
    out, err = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"there": len(site.revisions) - 1, "copied": 1}
    assert f"{path} differs from the object in the bucket" in err
    assert exported(out_dir) == right
    assert path.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("number", slow_but(signal.SIGKILL, of=[signal.SIGINT, signal.SIGKILL]))
def test_what_was_interrupted_goes_on_and_no_half_file_ever_has_a_blobs_name(
    s3, site, tool, bucket_name, fill, out_dir, tmp_path, plain, number
):
    (tmp_path / "original").rename(site.blob_dir)
    site.grow(large=20 * MIB)
    fill(site.revisions)
    site.blob_dir.rename(tmp_path / "original")
    large = next(name for name, data in site.revisions.items() if len(data) > MIB)
    before_it = {name: data for name, data in site.revisions.items() if name < large}
    requests = len(before_it) + list(before_it.values()).count(b"")
    conf = site.configure(s3, bucket_name, s3_concurrency=1, s3_read_timeout="120s")
    s3.forget()
    s3.misbehave(operation="GetObject", times=requests + 1)  # the first 8 MiB of the large one
    s3.misbehave(operation="GetObject", hang=True)
    exporting = tool.begin("export", conf, "--to-blob-dir", out_dir)
    s3.wait_for("GetObject", requests + 2)
    deadline = time.monotonic() + 30
    while not [path for path in (out_dir / "tmp").iterdir() if path.stat().st_size >= 8 * MIB]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    exporting.send_signal(number)
    out, err = exporting.communicate(timeout=30)  # less than the service would keep it
    assert out == "" and "Traceback" not in err
    if number == signal.SIGINT:
        assert exporting.returncode == 130
        assert "interrupted" in sentence(err)
    original = tmp_path / "original"
    assert exported(out_dir) == {
        str(file_of(original, *name).relative_to(original)): data for name, data in before_it.items()
    }
    s3.behave()
    s3.forget()
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"there": len(before_it), "copied": len(site.revisions) - len(before_it)}
    assert os.listdir(out_dir / "tmp") == []
    storage = plain()
    assert contents(storage, names(storage)) == site.revisions


def test_what_another_export_is_writing_stays_and_goes_when_that_is_killed(
    s3, site, tool, bucket_name, out_dir, tmp_path
):
    conf = site.configure(s3, bucket_name, s3_read_timeout="120s", s3_concurrency=1)
    s3.misbehave(operation="GetObject", times=1, hang=True)
    s3.forget()
    one = tool.begin("export", conf, "--to-blob-dir", out_dir)
    s3.wait_for("GetObject", 1)
    (being_written,) = os.listdir(out_dir / "tmp")
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert os.listdir(out_dir / "tmp") == [being_written]
    one.kill()
    one.communicate()
    s3.behave()
    tool("export", conf, "--to-blob-dir", out_dir)
    assert os.listdir(out_dir / "tmp") == []


def test_what_is_interrupted_leaves_no_temporary_file(s3, site, tool, bucket_name, out_dir):
    conf = site.configure(s3, bucket_name, s3_read_timeout="120s", s3_concurrency=2)
    s3.misbehave(operation="GetObject", hang=True)
    s3.forget()
    exporting = tool.begin("export", conf, "--to-blob-dir", out_dir)
    s3.wait_for("GetObject", 2)
    assert os.listdir(out_dir / "tmp")
    exporting.send_signal(signal.SIGINT)
    _, err = exporting.communicate(timeout=30)
    assert exporting.returncode == 130 and "Traceback" not in err
    assert os.listdir(out_dir / "tmp") == []


# Where the blobs come from


def test_what_only_the_fallback_has_is_exported_too_and_what_nothing_has_is_listed(
    s3, bucket_name, site, tool, out_dir, tmp_path
):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=tmp_path / "original")
    one, two, three, *_ = site.revisions
    for name in one, two:
        s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*name))
    for name in two, three:
        file_of(tmp_path / "original", *name).unlink()
    before = tree(tmp_path / "original")
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 1, "missing": 1}
    (problem,) = json.loads(out)["problems"]
    assert (problem["problem"], problem["oid"], problem["tid"]) == ("missing", oid_repr(two[0]), tid_repr(two[1]))
    assert KEYS.key(*two) in problem["reason"]
    assert sorted(exported(out_dir).values()) == sorted(data for name, data in site.revisions.items() if name != two)
    assert file_of(out_dir, *one).stat().st_mode & 0o777 == 0o444
    assert tree(tmp_path / "original") == before
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, status=3)
    assert re.search(rf"^missing: oid {oid_repr(two[0])} tid {tid_repr(two[1])} ", out, re.M)


def test_a_revision_that_an_undo_of_1_2_1_left_without_an_object_gets_the_bytes_that_it_repeats(
    s3, bucket_name, site, tool, conf, out_dir, plain
):
    for name in site.undone():
        s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*name))
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert json.loads(out)["found"]["copied"]["objects"] == len(site.revisions)
    assert contents(plain(), site.revisions) == site.revisions


def test_the_fallback_itself_gets_what_it_lacks_and_keeps_what_it_has(s3, bucket_name, site, tool, tmp_path):
    """Moving out again before everything has moved in."""
    original = tmp_path / "original"
    conf = site.configure(s3, bucket_name, fallback_blob_dir=original)
    new, damaged, only_here, *_ = (name for name, data in site.revisions.items() if data)
    s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*only_here))
    right = exported(original)
    file_of(original, *new).unlink()
    path = file_of(original, *damaged)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    kept = {name: entry for name, entry in tree(original).items() if name in right and entry[2] != b"damaged"}
    out, _ = tool("export", conf, "--to-blob-dir", original, "--json")
    assert counts(out) == {"there": len(site.revisions) - 2, "copied": 2}
    assert exported(original) == right
    assert tree(original).items() > kept.items()


def test_an_outage_of_the_bucket_is_no_reason_where_the_fallback_has_the_blobs(
    s3, bucket_name, site, tool, tmp_path, out_dir
):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=tmp_path / "original", s3_max_attempts=1)
    s3.misbehave(operation="GetObject", status=500, code="InternalError")
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert exported(out_dir) == exported(tmp_path / "original")


def test_a_fallback_that_is_not_there_stops_it_before_anything_is_made(s3, bucket_name, site, tool, out_dir, tmp_path):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=tmp_path / "elsewhere")
    out, err = tool("export", conf, "--to-blob-dir", out_dir, status=1)
    assert out == "" and str(tmp_path / "elsewhere") in sentence(err)
    assert not out_dir.exists()


@pytest.mark.parametrize("damage", slow_after(1, of=[{"flip": True}, {"truncate": 1}]))
def test_what_does_not_arrive_as_it_was_stored_is_not_put_into_the_directory(
    s3, bucket_name, site, tool, out_dir, damage
):
    conf = site.configure(s3, bucket_name, s3_max_attempts=1, s3_concurrency=1)
    in_order = sorted(site.revisions)
    number = next(number for number, name in enumerate(in_order) if site.revisions[name])
    s3.misbehave(operation="GetObject", times=number)
    s3.misbehave(operation="GetObject", times=1, **damage)
    out, _ = tool("export", conf, "--to-blob-dir", out_dir, "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 1, "failed": 1}
    (problem,) = json.loads(out)["problems"]
    assert (problem["oid"], problem["tid"]) == (oid_repr(in_order[number][0]), tid_repr(in_order[number][1]))
    assert KEYS.key(*in_order[number]) in problem["reason"]
    assert len(exported(out_dir)) == len(site.revisions) - 1
    assert os.listdir(out_dir / "tmp") == []
    tool("export", conf, "--to-blob-dir", out_dir)
    assert sorted(exported(out_dir).values()) == sorted(site.revisions.values())


def test_a_bucket_that_refuses_everything_is_asked_no_more_after_a_while(
    s3, bucket_name, site, tool, out_dir, tmp_path
):
    (tmp_path / "original").rename(site.blob_dir)
    site.grow(more=100)
    site.blob_dir.rename(tmp_path / "original")
    conf = site.configure(s3, bucket_name, s3_concurrency=2)
    s3.forget()
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied", message="test-secret")
    out, err = tool("export", conf, "--to-blob-dir", out_dir, status=1)
    line = sentence(err)
    assert int(re.search(r"(?m)^failed +(\d+) ", out)[1]) >= 20  # what has been found so far
    assert "AccessDenied" in line and "s3-access-key" in line
    assert 20 <= operations(s3)["GetObject"] < 30
    assert exported(out_dir) == {}


# Where they go to


def _below_a_file(path):
    path.write_bytes(b"")
    return path / "out"


def _other_content(path):
    (path / "home").mkdir(parents=True)
    return path


def _a_clients_cache(path):
    path.mkdir()
    (path / ".layout").write_text("zeocache")
    return path


@pytest.mark.parametrize("there", [["lost+found"], ["tmp"], ["lost+found", "tmp"]])
def test_a_new_file_system_is_as_good_as_an_empty_directory(site, tool, conf, out_dir, plain, there):
    for name in there:
        (out_dir / name).mkdir(parents=True)
    tool("export", conf, "--to-blob-dir", out_dir)
    assert exported(out_dir) == exported(site.directory / "original")
    storage = plain()
    assert contents(storage, names(storage)) == site.revisions
    db = ZODB.DB(storage)
    db.pack()
    assert len(exported(out_dir)) == len(names(storage))
    db.close()
    assert (out_dir / "lost+found").exists() == ("lost+found" in there)


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_is_refused(s3, site, tool, conf, value, tmp_path):
    """Of a shell variable that is not set."""
    before = tree(tmp_path)
    s3.forget()
    _, err = tool.end(tool.begin("export", conf, "--to-blob-dir", value), status=2)
    assert err.splitlines()[-1] == "zodb-s3blobs export: error: argument --to-blob-dir: is empty: name a directory"
    assert tree(tmp_path) == before and s3.requests() == []


@pytest.mark.parametrize("make", [_below_a_file, _other_content, _a_clients_cache])
def test_a_directory_that_will_not_do_is_refused_by_name_and_left_alone(s3, site, tool, conf, tmp_path, make):
    path = make(tmp_path / "directory")
    before = tree(tmp_path / "directory")
    s3.forget()
    out, err = tool("export", conf, "--to-blob-dir", path, status=1)
    assert out == "" and str(path) in sentence(err)
    assert tree(tmp_path / "directory") == before
    assert s3.requests() == []


@pytest.mark.parametrize("how", slow_but("full", of=["full", "in the way"]))
def test_a_disk_that_takes_no_more_ends_it_in_one_sentence_and_leaves_nothing_half(
    s3, bucket_name, fill, site, tool, out_dir, tmp_path, how
):
    (tmp_path / "original").rename(site.blob_dir)
    site.grow(large=9 * MIB)
    fill(site.revisions)
    conf = site.configure(s3, bucket_name)
    options = {}
    if how == "full":
        # A file cannot grow any more: the nearest to a full disk that does without one.
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    else:
        tool("export", conf, "--to-blob-dir", out_dir)
        shutil.rmtree(out_dir / "0x00")
        (out_dir / "0x00").write_bytes(b"in the way")
    out, err = tool.end(tool.begin("export", conf, "--to-blob-dir", out_dir, **options), status=1)
    line = sentence(err)
    assert out == "" and str(out_dir) in line
    assert os.strerror(errno.EFBIG if how == "full" else errno.ENOTDIR) in line
    assert exported(out_dir).items() <= exported(site.blob_dir).items()
    assert os.listdir(out_dir / "tmp") == []


def test_the_directory_is_to_be_named(tool, conf):
    process = tool.begin("export", conf)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--to-blob-dir" in err
