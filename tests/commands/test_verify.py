"""``zodb-s3blobs verify`` in processes of its own, beside servers that run and without one."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.FileStorage import FileIterator, FileStorage
from ZODB.FileStorage.format import TRANS_HDR_LEN
from ZODB.utils import oid_repr, tid_repr, u64

from tests.support.sites import break_disk, run
from tests.support.speed import slow, slow_after, slow_but
from tests.support.zeo_clients import leftovers, wait_for
from tests.support.zeo_server import CONFIG, SECTION, free_address
from zodb_s3blobs.cache.directory import path_in

SECRET = "test-secret"
FILESTORAGE = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"
OF_BLOBS = ["marked", "fallback", "fallbackbucket", "undone"]
OF_BLOBS += ["missing", "damaged", "different", "archived", "failed"]
WORDS = ["good", *OF_BLOBS, "dead", "others", "retained", "newer", "unknown", "copy"]
WORDS_WITH_CHECKSUM = ["good", "unproven", *WORDS[1:]]
WORDS_WITH_SAMPLE = ["good", "unread", *WORDS_WITH_CHECKSUM[1:]]
ALL_WORDS = WORDS, WORDS_WITH_CHECKSUM, WORDS_WITH_SAMPLE
OLD = "3d0c0b0a0908070"  # a tid of long ago
WELL, FAILED, USAGE, DAMAGED, GARBAGE, UNPROVEN, FALLBACK = 0, 1, 2, 3, 4, 5, 6


class Done:
    """``verify`` that has ended: its ``stdout`` and ``stderr``, and the exit status."""

    def __init__(self, status, stdout, stderr):
        self.status, self.stdout, self.stderr = status, stdout, stderr
        assert SECRET not in self.stdout + self.stderr
        assert "Traceback" not in self.stdout + self.stderr

    @property
    def found(self):
        """What --json counted: word -> objects, without those of which there are none."""
        result = json.loads(self.stdout)
        assert list(result) == ["found", "problems"] and list(result["found"]) in ALL_WORDS
        return {word: count["objects"] for word, count in result["found"].items() if count["objects"]}

    @property
    def problems(self):
        """What --json listed."""
        return json.loads(self.stdout)["problems"]

    @property
    def lines(self):
        """What it printed without --json: the lines before the table, and word -> (objects, bytes) of the table."""
        head, table = re.split(r"^ +objects +bytes\n", self.stdout, flags=re.M)
        table, last = table.split("\n\n")
        rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+)  \S.*$", table, re.M)
        assert [word for word, *_ in rows] in ALL_WORDS
        assert all(len(line) <= 80 for line in table.splitlines())
        assert head == "" or head.endswith("\n\n")
        assert last.count("\n") == 1 and last.endswith(".\n")
        numbers = {word: tuple(int(number.replace(",", "")) for number in row) for word, *row in rows}
        return head.splitlines()[:-1], numbers

    @property
    def verdict(self):
        """The last line of what it printed without --json."""
        return self.stdout.splitlines()[-1]

    def meaning(self, word):
        """What the table says of ``word``, in one line."""
        lines = re.search(rf"^{word} +[\d,]+ +[\d,]+  (.*\n(?: +[^\s\d].*\n)*)", self.stdout, re.M)[1]
        return " ".join(lines.split())

    @property
    def sentence(self):
        """The one on stderr, of a command that found nothing out, without what is merely logged."""
        assert self.stdout == ""
        lines = [line for line in self.stderr.splitlines() if not line.startswith(("INFO:", "WARNING:"))]
        (line,) = [line for line in lines if not line.startswith("ERROR: Could not read")]
        assert line.startswith("zodb-s3blobs verify: ")
        return line


@pytest.fixture
def verify(tmp_path):
    """Runs ``zodb-s3blobs verify`` with the zeo.conf of the servers, which has to end with ``status``."""

    def verify(*arguments, status=WELL):
        done = Done(*run("verify", "-C", str(tmp_path / "zeo.conf"), *arguments))
        assert done.status == status, (done.stdout, done.stderr)
        return done

    return verify


@pytest.fixture
def alone(tmp_path):
    """The same as somebody starts it: Python anew."""

    def alone(*arguments, status=WELL):
        command = [sys.executable, "-m", "zodb_s3blobs", "verify", "-C", str(tmp_path / "zeo.conf"), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        done = Done(process.returncode, process.stdout, process.stderr)
        assert done.status == status, (done.stdout, done.stderr)
        return done

    return alone


class Site:
    """A zeo.conf, and the database that it describes while this process, in place of a server, has it open."""

    def __init__(self, directory, s3, bucket):
        self.directory, self.bucket = directory, bucket
        self._s3, self._db = s3, None
        self.client = s3.client
        self.configure()

    def configure(self, *, base=FILESTORAGE, around="{}", endpoint=None, **options):
        """Write the zeo.conf; ``around``: what the section is in."""
        section = SECTION.format(
            name="1",
            bucket=self.bucket,
            endpoint=endpoint or self._s3.url,
            dir=self.directory,
            cache="cache",
            options="\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items()),
            base=base.format(dir=self.directory),
        )
        storages = around.format(section)
        self._storage = f"%import zodb_s3blobs\n%import zc.zlibstorage\n{storages}"
        (self.directory / "zeo.conf").write_text(CONFIG.format(port=1, dir=self.directory, zeo="", storages=storages))

    @property
    def db(self):
        """The database; open from now on."""
        if self._db is None:
            self._db = ZODB.DB(storageFromString(self._storage))
        return self._db

    def close(self):
        if self._db is not None:
            self._db.close()
            self._db = None

    def write(self, **blobs):
        """As `write`."""
        return write(self.db, **blobs)

    def object(self, blob):
        """Its bytes and metadata in the bucket."""
        found = self.client.get_object(Bucket=self.bucket, Key=blob.key)
        return found["Body"].read(), found["Metadata"]

    def replace(self, blob, data):
        """Have other bytes in the bucket, with the metadata of the right ones: as when a disk of the service fails."""
        metadata = self.object(blob)[1]
        assert metadata
        self.client.put_object(Bucket=self.bucket, Key=blob.key, Body=data, Metadata=metadata)

    def delete(self, *blobs):
        for blob in blobs:
            self.client.delete_object(Bucket=self.bucket, Key=blob.key)

    def put(self, count):
        """Put dead blobs of one byte."""
        self._s3.put(self.bucket, [f"1/blobs/{number:x}/{OLD}.blob" for number in range(1, count + 1)])

    def evict(self):
        """Have nothing in cache-dir."""
        self.close()
        shutil.rmtree(self.directory / "cache")


class Name:
    """A revision of a blob, and how it is called at the various places."""

    def __init__(self, blob):
        self.oid, self.tid = blob._p_oid, blob._p_serial
        self.key = f"1/blobs/{u64(self.oid):x}/{u64(self.tid):x}.blob"

    def problem(self, word, path):
        """What --json is to list, without the reason."""
        return {"oid": oid_repr(self.oid), "tid": tid_repr(self.tid), "problem": word, "path": path}


def write(db, **blobs):
    """Commit ``data`` as /folder/``name``/_blob for each of the blobs; returns the `Name` of each, or of the one."""
    with db.transaction() as connection:
        folder = connection.root().setdefault("folder", PersistentMapping())
        for name, data in blobs.items():
            blob = folder.setdefault(name, PersistentMapping()).setdefault("_blob", Blob())
            with blob.open("w") as file:
                file.write(data)
    with db.transaction() as connection:
        found = [connection.root()["folder"][name]["_blob"] for name in blobs]
        for blob in found:
            blob._p_activate()
        names = [Name(blob) for blob in found]
    return names if len(names) > 1 else names[0]


def without_reason(problems):
    return [{key: value for key, value in problem.items() if key != "reason"} for problem in problems]


@pytest.fixture
def site(tmp_path, s3, bucket_name):
    site = Site(tmp_path, s3, bucket_name)
    yield site
    site.close()


@pytest.fixture
def files(tmp_path):
    """All that is below the directory of a test but the clients' and the logs: path, when it was changed, bytes."""

    def files():
        found = {}
        for path in sorted(tmp_path.rglob("*")):
            inside = path.relative_to(tmp_path)
            if not inside.parts[0].startswith(("client", "zeo.log", "output")):
                status = path.stat()
                data = path.read_bytes() if path.is_file() else None
                found[str(inside)] = status.st_mtime_ns, status.st_ino, data
        return found

    return files


@pytest.fixture
def contents(s3, bucket_name):
    """All that is in the bucket: key, ETag and when it was written."""

    def contents():
        pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket_name)
        return [(one["Key"], one["ETag"], one["LastModified"]) for page in pages for one in page.get("Contents", ())]

    return contents


def requests(s3):
    """The names of all requests, those for the owner lease too."""
    owner = [f"Owner{operation}Object" for operation in ("Get", "Put", "Delete", "Head")]
    return [one.operation for one in s3.requests()] + [one for one in owner for _ in s3.requests(one)]


def copy_in_cache(site, blob):
    """The path of the file in cache-dir."""
    return Path(path_in(str(site.directory / "cache"), blob.oid, blob.tid))


def overwrite(path, data):
    path.chmod(0o600)
    path.write_bytes(data)


# Everything in order


def test_beside_a_running_server_all_is_well(start, verify, alone):
    server = start()
    db = server.db()
    one, _ = write(db, one=b"1" * 1000, two=b"")
    again = write(db, one=b"2" * 500)
    assert one.oid == again.oid and one.tid < again.tid
    problems, numbers = verify().lines
    assert problems == []
    assert numbers == {**dict.fromkeys(WORDS, (0, 0)), "good": (3, 1500)}
    done = alone("--json", "--checksum")
    assert json.loads(done.stdout)["found"]["good"] == {"objects": 3, "bytes": 1500}
    assert done.problems == []
    assert write(db, one=b"the server still commits").oid == one.oid


def test_without_a_server_and_without_a_blob_all_is_well(site, verify):
    site.db  # noqa: B018 (an empty database)
    site.close()
    assert verify("--json", "--checksum").found == {}


@pytest.mark.parametrize("size", slow_after(1, of=[8 << 20, (8 << 20) + 1]))
def test_blobs_that_are_read_in_several_requests_are_well(site, verify, size):
    large = site.write(large=os.urandom(size), small=b"x")[0]
    site.close()
    assert verify("--json", "--checksum").found == {"good": 2}
    data = site.object(large)[0]
    site.replace(large, data[:-1] + bytes([data[-1] ^ 1]))
    assert verify("--json", "--checksum", status=DAMAGED).found == {"good": 1, "damaged": 1}


# Missing


@pytest.mark.parametrize("options", [[], ["--checksum"]])
@pytest.mark.parametrize("cached", slow_but(True, of=[True, False]))
def test_a_missing_blob_is_named_by_oid_tid_and_path(site, verify, options, cached):
    site.write(other=b"other")
    old = site.write(report=b"old")
    new = site.write(report=b"new")
    if not cached:
        site.evict()
    site.delete(old)
    problems, numbers = verify(*options, status=DAMAGED).lines
    (line,) = problems
    assert line.startswith(f"missing: oid {oid_repr(old.oid)} tid {tid_repr(old.tid)} of 20")
    assert " UTC at /folder/report/_blob: " in line
    assert old.key in line and site.bucket in line
    copy = f"{site.directory}/cache/"
    assert ("is a copy" in line and copy in line) if cached else copy not in line
    assert numbers["missing"] == (1, 0) and numbers["good"] == (2, 8)

    site.delete(new)
    done = verify("--json", *options, status=DAMAGED)
    assert done.found == {"good": 1, "missing": 2}
    expected = [blob.problem("missing", "/folder/report/_blob") for blob in (old, new)]
    assert sorted(without_reason(done.problems), key=lambda one: one["tid"]) == expected
    assert all(blob["reason"] for blob in done.problems)


def test_a_missing_blob_that_nothing_leads_to_has_no_path(site, verify):
    lost = site.write(report=b"data")
    with site.db.transaction() as connection:
        del connection.root()["folder"]["report"]["_blob"]
    site.close()
    site.delete(lost)
    assert without_reason(verify("--json", status=DAMAGED).problems) == [lost.problem("missing", None)]
    (line,) = verify(status=DAMAGED).lines[0]
    assert " UTC: " in line


@slow
def test_all_missing_blobs_of_many_are_listed(site, verify):
    blobs = site.write(**{f"n{number:03}": b"x" * number for number in range(250)})
    site.close()
    site.delete(*blobs[::2])
    done = verify("--json", status=DAMAGED)
    assert done.found == {"good": 125, "missing": 125}
    expected = [blob.problem("missing", f"/folder/n{2 * index:03}/_blob") for index, blob in enumerate(blobs[::2])]
    assert sorted(without_reason(done.problems), key=lambda one: one["path"]) == expected


def test_of_a_bucket_that_is_empty_everything_is_missing(site, verify):
    blobs = site.write(one=b"1", two=b"2")
    site.close()
    site.delete(*blobs)
    assert verify("--json", status=DAMAGED).found == {"missing": 2}


# Damaged


def test_a_blob_of_another_size_than_the_copy_in_the_cache_is_read_and_found_damaged(start, site, verify):
    server = start()
    blob, _ = write(server.db(), report=b"data" * 100, other=b"other")
    site.replace(blob, b"short")
    (line,) = verify(status=DAMAGED).lines[0]
    assert line.startswith(f"damaged: oid {oid_repr(blob.oid)} tid {tid_repr(blob.tid)}")
    assert " at /folder/report/_blob: " in line and "The object is damaged" in line
    assert blob.key in line and f"{server.cache_dir}/blobs/" in line and line.endswith("is a copy of 400 bytes")
    done = verify("--json", status=DAMAGED)
    assert done.found == {"good": 1, "damaged": 1}
    assert without_reason(done.problems) == [blob.problem("damaged", "/folder/report/_blob")]


# Copies, which decide nothing


@pytest.mark.parametrize("options", [[], ["--checksum"], ["--checksum", "--sample", "1/1000"]])
@pytest.mark.parametrize("data", slow_but(b"dat", of=[b"", b"dat", b"data and more"]))
def test_a_cached_file_of_another_size_is_the_damaged_one(s3, site, verify, options, data):
    blob, _ = site.write(report=b"data", other=b"other")
    site.close()
    overwrite(copy_in_cache(site, blob), data)
    s3.forget()
    done = verify(*options)
    (line,) = done.lines[0]
    assert line.startswith(f"copy: oid {oid_repr(blob.oid)} tid {tid_repr(blob.tid)} ")
    assert f"{copy_in_cache(site, blob)} has {len(data)} bytes, but {blob.key} has 4 and the right SHA-256" in line
    assert "Delete it" in line
    assert done.lines[1]["copy"] == (1, len(data)) and done.lines[1]["damaged"] == (0, 0)
    assert done.verdict.startswith("All blobs are well") and done.verdict.endswith("not all copies of them: 1 copy.")
    if not options:
        assert s3.requests("GetObject") and len(s3.requests("GetObject")) == 1  # the object alone that it may be
    done = verify("--json", *options)
    assert done.found["copy"] == 1 and sum(done.found.values()) == 3
    assert without_reason(done.problems) == [blob.problem("copy", None)]


def _a_directory(path):
    path.unlink()
    path.mkdir()


def _a_circle(path):
    path.unlink()
    path.symlink_to(path)


def _a_link(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


def _a_file_above(path):
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


@pytest.mark.parametrize("options", [[], ["--checksum"]])
@pytest.mark.parametrize(
    "make", slow_but(_a_directory, break_disk, of=[_a_directory, _a_circle, _a_link, _a_file_above, break_disk])
)
def test_what_cannot_be_read_in_the_cache_says_nothing_of_the_blob(site, verify, options, make):
    blob = site.write(report=b"data")
    site.close()
    make(copy_in_cache(site, blob))
    done = verify("--json", *options)
    assert done.found == {"good": 1} and done.problems == []


@pytest.mark.parametrize("options", [[], ["--checksum"]])
def test_a_damaged_cached_file_and_an_object_without_sha256_are_called_so(site, verify, options):
    """Nothing tells which of the two is right, so neither is the object called well."""
    blob = site.write(report=b"data")
    site.close()
    site.client.put_object(Bucket=site.bucket, Key=blob.key, Body=b"data")
    overwrite(copy_in_cache(site, blob), b"dat")
    done = verify("--json", *options, status=UNPROVEN)
    assert done.found == {"unproven": 1}
    (problem,) = done.problems
    assert str(copy_in_cache(site, blob)) in problem["reason"] and "backup" in problem["reason"]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def migrating(site):
    """A site whose first blobs, ``one`` and ``two``, are in fallback-blob-dir alone, and its `Name`s of them."""
    blob_dir = site.directory / "old blobs"
    db = ZODB.DB(FileStorage(str(site.directory / "Data.fs"), blob_dir=str(blob_dir)))
    names = write(db, one=b"one", two=b"two" * 10)
    db.close()
    site.configure(fallback_blob_dir=blob_dir)
    return [*names, blob_dir]


def file_in(blob_dir, blob):
    """The path of the file of ``blob`` in ``blob_dir``, whose layout is bushy."""
    return blob_dir.joinpath(*(f"0x{byte:02x}" for byte in blob.oid), f"0x{blob.tid.hex()}.blob")


@pytest.mark.parametrize("options", [[], ["--checksum"]])
def test_what_only_the_fallback_has_can_be_read_and_has_a_status_of_its_own(site, migrating, verify, options):
    site.write(three=b"three")
    site.put(3)
    done = verify("--json", *options, status=FALLBACK)
    assert done.found == {"fallback": 2, "good": 1, "dead": 3}
    assert json.loads(done.stdout)["found"]["fallback"]["bytes"] == 33
    assert done.problems == []
    done = verify(*options, status=FALLBACK)
    assert re.search(r"^fallback +2 +33  .*zodb-s3blobs migrate", done.stdout, re.M)
    assert done.verdict == (
        "All blobs can be read, but the bucket lacks some, which zodb-s3blobs migrate copies: 2 fallback, 3 dead."
    )


def test_a_missing_blob_matters_more_than_what_only_the_fallback_has_and_that_more_than_no_checksum(
    site, migrating, verify
):
    three, four = site.write(three=b"three", four=b"four")
    site.close()
    site.client.put_object(Bucket=site.bucket, Key=three.key, Body=b"three")
    assert verify("--json", "--checksum", status=FALLBACK).found == {"fallback": 2, "unproven": 1, "good": 1}
    site.delete(four)
    assert verify("--json", "--checksum", status=DAMAGED).found == {"fallback": 2, "unproven": 1, "missing": 1}


def test_a_file_in_the_fallback_that_cannot_be_looked_at_is_no_raw_errno(site, migrating, verify):
    one, two, blob_dir = migrating
    site.client.put_object(Bucket=site.bucket, Key=one.key, Body=b"one", Metadata={"sha256": sha256(b"one")})
    for blob in one, two:
        path = file_in(blob_dir, blob)
        path.unlink()
        path.symlink_to(path)
    done = verify("--json", status=FAILED)
    assert done.found == {"good": 1, "failed": 1}
    (problem,) = done.problems
    assert two.key in problem["reason"] and f"{file_in(blob_dir, two)} cannot be read: Too many" in problem["reason"]


def test_what_neither_the_bucket_nor_the_fallback_has_is_missing(site, migrating, verify):
    one, two, blob_dir = migrating
    shutil.rmtree(blob_dir)
    other = ZODB.DB(FileStorage(str(site.directory / "Other.fs"), blob_dir=str(blob_dir)))
    other.close()
    done = verify("--json", status=DAMAGED)
    assert done.found == {"missing": 2}
    expected = [one.problem("missing", "/folder/one/_blob"), two.problem("missing", "/folder/two/_blob")]
    assert sorted(without_reason(done.problems), key=lambda problem: problem["path"]) == expected


@pytest.mark.parametrize("options", [[], ["--checksum"]])
def test_of_a_blob_of_another_size_than_in_the_fallback_the_sha256_tells_which_is_right(
    site, migrating, verify, options
):
    one, two, blob_dir = migrating
    for blob, data in (one, b"one"), (two, b"two" * 10):
        site.client.put_object(Bucket=site.bucket, Key=blob.key, Body=data, Metadata={"sha256": sha256(data)})
    overwrite(file_in(blob_dir, one), b"on")
    done = verify("--json", *options)
    assert done.found == {"good": 2, "copy": 1}
    (problem,) = done.problems
    assert problem["problem"] == "copy" and "trust the object" in problem["reason"]
    assert f"{file_in(blob_dir, one)} has 2 bytes, but {one.key} has 3 and the right SHA-256" in problem["reason"]

    site.replace(two, b"tw")
    done = verify("--json", *options, status=DAMAGED)
    assert done.found == {"good": 1, "damaged": 1, "copy": 1}
    (problem,) = [one for one in done.problems if one["problem"] == "damaged"]
    assert f"{file_in(blob_dir, two)} is a copy of 30 bytes" in problem["reason"]


@pytest.mark.parametrize("options", [[], ["--checksum"]])
def test_an_object_without_sha256_and_of_another_size_than_in_the_fallback_is_different(
    site, migrating, verify, options
):
    one, two, blob_dir = migrating
    site.client.put_object(Bucket=site.bucket, Key=one.key, Body=b"one")
    site.client.put_object(Bucket=site.bucket, Key=two.key, Body=b"tw")
    done = verify("--json", *options, status=DAMAGED)
    assert done.found == {"different": 1, "unproven" if options else "good": 1}
    assert without_reason(done.problems) == [two.problem("different", "/folder/two/_blob")]
    assert f"{two.key} has 2 bytes and no SHA-256, but {file_in(blob_dir, two)} has 30" in done.problems[0]["reason"]
    assert verify(*options, status=DAMAGED).verdict.startswith("Not well: 1 different")


def test_a_fallback_that_is_not_there_is_said_and_nothing_called_missing(site, migrating, verify):
    shutil.rmtree(migrating[-1])
    assert str(migrating[-1]) in verify(status=FAILED).sentence


def test_only_the_checksum_tells_of_damage_that_has_no_other_size_and_no_copy(site, verify):
    blob, _ = site.write(report=b"data", other=b"other")
    site.replace(blob, b"dat!")
    assert verify("--json").found == {"good": 2}  # with a copy of the same size
    site.evict()
    assert verify("--json").found == {"good": 2}
    done = verify("--json", "--checksum", status=DAMAGED)
    assert done.found == {"good": 1, "damaged": 1}
    assert without_reason(done.problems) == [blob.problem("damaged", "/folder/report/_blob")]
    assert blob.key in done.problems[0]["reason"] and "backup" in done.problems[0]["reason"]
    (line,) = verify("--checksum", status=DAMAGED).lines[0]
    assert line.startswith("damaged: ") and " at /folder/report/_blob: " in line


def test_a_truncated_object_is_found_by_its_checksum(site, verify):
    blobs = site.write(one=b"data" * 100, two=b"")
    site.evict()
    site.replace(blobs[0], b"data" * 99)
    site.replace(blobs[1], b"not empty")
    assert verify("--json").found == {"good": 2}
    assert verify("--json", "--checksum", status=DAMAGED).found == {"damaged": 2}


def test_what_is_damaged_on_the_way_is_asked_for_again_and_no_alarm(s3, site, verify):
    site.write(**{f"n{number}": b"data" * 100 for number in range(5)})
    site.evict()
    s3.misbehave(operation="GetObject", times=2, flip=True)
    s3.misbehave(operation="GetObject", times=2, truncate=7)
    s3.forget()
    done = verify("--json", "--checksum")
    assert done.found == {"good": 5} and done.problems == []
    assert len(s3.requests("GetObject")) > 5


def test_an_answer_that_breaks_off_is_no_alarm(s3, site, verify):
    site.write(large=os.urandom(3 << 20))
    s3.misbehave(operation="GetObject", times=1, truncate=7)
    s3.forget()
    assert verify("--json", "--checksum").found == {"good": 1}
    assert len(s3.requests("GetObject")) == 2


@slow
def test_what_is_damaged_always_is_asked_for_so_often_and_then_an_alarm(s3, site, verify):
    blob = site.write(one=b"data")
    site.configure(s3_max_attempts=3)
    site.evict()
    s3.misbehave(operation="GetObject", flip=True)
    s3.forget()
    done = verify("--json", "--checksum", status=DAMAGED)
    assert without_reason(done.problems) == [blob.problem("damaged", "/folder/one/_blob")]
    assert len(s3.requests("GetObject")) == 3


# Objects that are no blobs of the database


def test_dead_objects_are_counted_and_have_a_status_of_their_own(site, verify):
    site.write(one=b"data")
    site.close()
    site.put(3)
    done = verify("--json", status=GARBAGE)
    assert done.found == {"good": 1, "dead": 3} and done.problems == []
    assert verify(status=GARBAGE).lines[1]["dead"] == (3, 3)


def test_missing_blobs_matter_more_than_dead_objects(site, verify):
    blobs = site.write(one=b"data", two=b"data")
    site.close()
    site.put(3)
    site.delete(blobs[0])
    assert verify("--json", status=DAMAGED).found == {"good": 1, "missing": 1, "dead": 3}


def test_keys_that_are_no_blobs_are_counted_and_no_trouble(s3, site, bucket_name, verify):
    site.write(one=b"data")
    site.close()
    s3.put(bucket_name, ["1/blobs/README", "1/blobs/1/1.BLOB", "1/blobs/01/1.blob"])
    s3.put(bucket_name, ["1/other", "2/blobs/1/1.blob", "blobs/1/1.blob"])  # not ours at all
    assert verify("--json").found == {"good": 1, "unknown": 3}


def test_what_gc_retention_keeps_is_no_garbage_yet(start, site, verify):
    server = start(options={"gc_retention": "30d"})
    db = server.db()
    write(db, one=b"old")
    write(db, one=b"new")
    db.pack()
    assert verify("--json").found == {"good": 1, "retained": 1}
    assert verify().lines[1]["retained"] == (1, 3)


# A restored database


def test_of_an_older_database_what_came_later_is_newer_and_no_trouble(site, verify):
    site.write(one=b"old")
    site.close()
    shutil.copy(site.directory / "Data.fs", site.directory / "backup")
    site.write(one=b"new", two=b"new")
    site.close()
    os.replace(site.directory / "backup", site.directory / "Data.fs")
    (site.directory / "Data.fs.index").unlink()
    for _ in range(2):
        done = verify("--json", "--checksum")
        assert done.found == {"good": 1, "newer": 2} and done.problems == []


@slow
def test_of_a_restored_database_it_says_what_is_gone_for_good_and_what_is_merely_marked(start, site, verify):
    blobs = site.write(gone=b"gone", marked=b"marked", kept=b"kept")
    site.close()
    shutil.copy(site.directory / "Data.fs", site.directory / "backup")
    site.write(gone=b"new")
    site.db.pack()  # without a retention
    site.close()
    site.configure(gc_retention="30d")
    site.write(marked=b"new")
    site.db.pack()
    site.close()
    os.replace(site.directory / "backup", site.directory / "Data.fs")
    (site.directory / "Data.fs.index").unlink()

    for options in [], ["--checksum"]:
        done = verify("--json", *options, status=DAMAGED)
        assert done.found == {"good": 1, "marked": 1, "missing": 1, "newer": 2}
        assert json.loads(done.stdout)["found"]["marked"]["bytes"] == len(b"marked")
        assert sorted(without_reason(done.problems), key=lambda problem: problem["path"]) == [
            blobs[0].problem("missing", "/folder/gone/_blob"),
            blobs[1].problem("marked", "/folder/marked/_blob"),
        ]
    done = verify(status=DAMAGED)
    assert done.lines[1]["marked"] == (1, 6) and "restored" in done.meaning("marked")

    # The next pack takes the mark away.
    assert run("adopt", "-C", str(site.directory / "zeo.conf"), "--yes")[0] == 0
    site.db.pack()
    site.close()
    assert verify("--json", status=DAMAGED).found == {"good": 2, "missing": 1, "newer": 2}


@pytest.mark.parametrize(
    ("damage", "keeps_index"),
    # Without an index FileStorage itself refuses to open the file with a damaged record.
    [("length", True), ("length", False), ("status", True), ("status", False), ("record", True)],
)
def test_transactions_that_cannot_be_read_are_an_error(site, verify, damage, keeps_index):
    """ZODB's iterators end where a transaction or a record is damaged, and what comes after it is not looked at."""
    for number in range(5):
        site.write(**{f"blob{number}": b"data"})
    site.close()
    path = site.directory / "Data.fs"
    with closing(FileIterator(str(path))) as transactions:
        positions = [transaction._tpos for transaction in transactions]
    data = bytearray(path.read_bytes())
    middle = positions[len(positions) // 2]
    if damage == "length":
        data[middle + 8 : middle + 16] = b"\xff" * 8
    elif damage == "record":
        lengths = struct.unpack(">HHH", data[middle + 17 : middle + TRANS_HDR_LEN])
        first = middle + TRANS_HDR_LEN + sum(lengths)
        data[first + 24 : first + 32] = b"\xff" * 8  # the position of its transaction
    else:
        data[middle + 16] = ord("c")
    path.write_bytes(data)
    if not keeps_index:
        (site.directory / "Data.fs.index").unlink()
    sentence = verify(status=FAILED).sentence
    assert "Data.fs is damaged: " in sentence and "Restore it from a backup" in sentence


def test_a_marked_blob_that_is_damaged_is_damaged(site, verify):
    site.configure(gc_retention="30d")
    old = site.write(one=b"old")
    site.close()
    shutil.copy(site.directory / "Data.fs", site.directory / "backup")
    site.write(one=b"new")
    site.db.pack()
    site.evict()
    os.replace(site.directory / "backup", site.directory / "Data.fs")
    site.replace(old, b"bad")
    assert verify("--json").found == {"marked": 1, "newer": 1}
    assert verify("--json", "--checksum", status=DAMAGED).found == {"damaged": 1, "newer": 1}


# Samples


@slow
def test_all_parts_together_read_every_blob_once(s3, site, verify):
    blobs = site.write(**{f"n{number}": b"data" for number in range(60)})
    site.close()
    s3.forget()
    read = []
    for part in range(1, 5):
        done = verify("--json", "--checksum", "--sample", f"{part}/4")
        here = [request.path.partition("/1/")[2] for request in s3.requests("GetObject")]
        assert done.found == {"good": len(here), "unread": 60 - len(here)}
        assert 5 <= len(here) <= 25
        read += here
        s3.forget()
    assert sorted(read) == sorted(blob.key.partition("/")[2] for blob in blobs)


@slow
def test_the_part_of_a_blob_stays_the_same(s3, site, alone, verify):
    site.write(**{f"n{number}": b"data" for number in range(30)})
    site.close()
    runs = []
    for begin, sample in (alone, "2/3"), (verify, "2/3"), (verify, "02/03"), (verify, "5/3"):
        s3.forget()
        begin("--json", "--checksum", "--sample", sample)
        runs.append({request.path for request in s3.requests("GetObject")})
    assert runs[0] == runs[1] == runs[2] == runs[3] and 0 < len(runs[0]) < 30


@slow
def test_28_parts_are_all_read_in_any_month_and_every_day_is_valid(s3, site, verify):
    site.write(**{f"n{number}": b"data" for number in range(60)})
    site.close()
    read = {}
    for day in range(1, 32):
        s3.forget()
        verify("--json", "--checksum", "--sample", f"{day}/28")
        read[day] = {request.path for request in s3.requests("GetObject")}
    assert len(set().union(*(read[day] for day in range(1, 29)))) == 60
    assert [read[day] for day in (29, 30, 31)] == [read[day] for day in (1, 2, 3)]


@pytest.mark.parametrize("sample", slow_but("1/2", of=["1/2", "2/2"]))
def test_what_is_missing_or_of_another_size_is_found_whatever_part_is_read(site, verify, sample):
    blobs = site.write(**{f"n{number:02}": b"data" for number in range(30)})
    site.close()
    site.delete(*blobs[:10])
    for blob in blobs[10:20]:
        site.replace(blob, b"short")
    done = verify("--json", "--checksum", "--sample", sample, status=DAMAGED)
    assert done.found["missing"] == done.found["damaged"] == 10
    assert done.found["good"] + done.found["unread"] == 10
    assert {one["path"] for one in done.problems} == {f"/folder/n{number:02}/_blob" for number in range(20)}


def test_a_sample_says_what_it_tells(site, verify):
    site.write(**{f"n{number}": b"data" for number in range(30)})
    site.close()
    done = verify("--checksum", "--sample", "4/3")
    assert done.verdict == "All is well as far as part 1 of 3 tells, which was read."
    assert "only their sizes are known" in done.meaning("unread")


def test_a_sample_counts_dead_objects_all_the_same(site, verify):
    site.write(one=b"data")
    site.put(3)
    for part in 1, 2:
        assert verify("--json", "--checksum", "--sample", f"{part}/2", status=GARBAGE).found["dead"] == 3


def test_a_sample_of_what_is_not_read_is_refused(s3, site, verify):
    s3.forget()
    assert "--checksum" in verify("--sample", "1/2", status=FAILED).sentence
    assert requests(s3) == []


@pytest.mark.parametrize("sample", ["0/3", "-1/3", "1/0", "0/0", "1", "1/", "/3", "1/3/5", "a/b", "1.5/3", ""])
def test_a_sample_that_is_none_is_refused(site, verify, sample):
    done = verify("--sample", sample, status=USAGE)
    assert done.stdout == "" and "--sample" in done.stderr


# Output


def test_json_is_all_that_is_on_stdout(s3, site, verify):
    blobs = site.write(one=b"data", two=b"data")
    site.evict()
    site.delete(blobs[0])
    site.put(1)
    s3.misbehave(operation="GetObject", times=1, flip=True)  # which is logged
    done = verify("--json", "--checksum", status=DAMAGED)
    assert done.found == {"missing": 1, "good": 1, "dead": 1}
    (problem,) = done.problems
    assert set(problem) == {"oid", "tid", "problem", "reason", "path"}
    assert "Could not read" in done.stderr


def test_whoever_reads_no_more_ends_it(site, tool, tmp_path):
    site.delete(*site.write(**{f"n{number}": b"data" for number in range(30)}))
    read, written = os.pipe()
    os.close(read)
    process = tool.begin("verify", tmp_path / "zeo.conf", stdout=written)
    os.close(written)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == FAILED


# Outages


def test_a_bucket_that_is_not_there(site, verify):
    site.write(one=b"data")
    site.close()
    site.configure(endpoint="http://{}:{}".format(*free_address()), s3_max_attempts=1)
    assert f"of bucket {site.bucket}: EndpointConnectionError" in verify(status=FAILED).sentence


def test_an_outage_in_the_middle_of_the_listing_is_no_missing_blob(s3, site, verify):
    site.write(one=b"data")
    site.put(450)
    site.configure(s3_max_attempts=1)
    for options in [], ["--checksum", "--json"]:
        s3.behave()
        s3.misbehave(operation="ListObjects", times=2)
        s3.misbehave(operation="ListObjects", status=503, code="SlowDown", message=SECRET)
        s3.forget()
        assert "SlowDown" in verify(*options, status=FAILED).sentence
        assert len(s3.requests("ListObjects")) == 3


def test_an_outage_in_the_middle_of_reading_is_no_damaged_blob(s3, site, verify):
    site.write(**{f"n{number}": b"data" for number in range(60)})
    site.configure(s3_max_attempts=1, s3_concurrency=2)
    s3.misbehave(operation="GetObject", times=10)
    s3.misbehave(operation="GetObject", status=503, code="SlowDown", message=SECRET)
    s3.forget()
    done = verify("--checksum", status=FAILED)
    assert "in a row" in done.stderr and "SlowDown" in done.stderr.splitlines()[-1]
    (objects, _), (damaged, _) = done.lines[1]["failed"], done.lines[1]["damaged"]
    assert objects >= 20 and damaged == 0
    assert len(s3.requests("GetObject")) < 60  # it has given up


def test_a_blob_that_could_not_be_read_is_listed_and_the_others_are_read(s3, site, verify):
    site.write(**{f"n{number}": b"data" for number in range(40)})
    site.configure(s3_max_attempts=1)
    s3.misbehave(operation="GetObject", times=1, status=500, code="InternalError", message=SECRET)
    done = verify("--json", "--checksum", status=FAILED)
    assert done.found == {"good": 39, "failed": 1}
    (problem,) = done.problems
    assert problem["problem"] == "failed" and "InternalError" in problem["reason"]


def test_a_missing_blob_matters_more_than_one_that_could_not_be_read(s3, site, verify):
    blobs = site.write(one=b"data", two=b"data")
    site.configure(s3_max_attempts=1)
    site.delete(blobs[0])
    s3.misbehave(operation="GetObject", status=500, code="InternalError")
    assert verify("--json", "--checksum", status=DAMAGED).found == {"missing": 1, "failed": 1}


def test_a_gateway_that_answers_404_for_everything_makes_no_blob_missing(s3, site, verify):
    site.write(one=b"data")
    site.configure(s3_max_attempts=1)
    s3.misbehave(operation="GetObject", status=404, body="no such page")
    assert verify("--json", "--checksum", status=FAILED).found == {"failed": 1}


def test_marks_that_cannot_be_read_are_said(s3, site, verify):
    site.write(one=b"data")
    site.configure(s3_max_attempts=1, gc_retention="30d")
    s3.misbehave(operation="GetObject", status=500, code="InternalError")
    assert "gc-marks.jsonl" in verify(status=FAILED).sentence


# What the server does meanwhile


@pytest.mark.parametrize("operation", slow_but("GetObject", of=["ListObjects", "GetObject"]))
def test_what_is_committed_meanwhile_is_no_trouble(s3, start, verify, background, operation):
    db = start().db()
    write(db, one=b"data")
    s3.misbehave(operation=operation, times=1, hang=True)
    s3.forget()
    running = background(verify, "--json", "--checksum")
    s3.wait_for(operation)
    write(db, one=b"again", two=b"more")
    assert not running.done()
    s3.behave()
    done = running.result()
    assert done.found == ({"good": 1, "newer": 2} if operation == "ListObjects" else {"good": 1})


@pytest.mark.parametrize("operation", slow_but("GetObject", of=["ListObjects", "GetObject"]))
def test_what_is_packed_away_meanwhile_is_not_missing(s3, start, site, verify, background, operation):
    db = start().db()
    lost, _ = write(db, lost=b"lost", one=b"old")
    write(db, one=b"new")
    site.delete(lost)
    # The listing, and none of the pack's; or the reading of both blobs that are there.
    times = 1 if operation == "ListObjects" else 2
    s3.misbehave(operation=operation, times=times, hang=True)
    s3.forget()
    running = background(verify, "--json", "--checksum", status=DAMAGED)
    s3.wait_for(operation, times)
    db.pack()
    assert not running.done()
    s3.behave()
    done = running.result()
    assert done.found == {"good": 1, "missing": 1}
    assert without_reason(done.problems) == [lost.problem("missing", "/folder/lost/_blob")]  # that one really is


# Configurations

ZLIB = "<zlibstorage>\n{}\n</zlibstorage>"


@pytest.mark.parametrize(
    ("base", "around"),
    slow_after(
        1,
        of=[(ZLIB.format(FILESTORAGE), "{}"), (FILESTORAGE, ZLIB), (ZLIB.format(ZLIB.format(FILESTORAGE)), ZLIB)],
        unpack=True,
    ),
    ids=["inside", "around", "both"],
)
def test_a_filestorage_in_a_wrapper(site, verify, base, around):
    site.configure(base=base, around=around)
    name = "n" * 90  # so that records are compressed
    blobs = site.write(**{name: b"data", "other": b"other"})
    assert verify("--json", "--checksum").found == {"good": 2}
    site.close()
    site.delete(blobs[0])
    done = verify("--json", status=DAMAGED)
    assert done.found == {"good": 1, "missing": 1}
    assert without_reason(done.problems) == [blobs[0].problem("missing", f"/folder/{name}/_blob")]


@slow
def test_beside_a_server_with_wrappers(start, verify):
    server = start(base=ZLIB.format(FILESTORAGE), storages=lambda settings: ZLIB.format(SECTION.format(**settings)))
    write(server.db(), **{"n" * 90: b"data"})
    assert verify("--json", "--checksum").found == {"good": 1}


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
def test_what_cannot_be_opened_beside_the_server_is_refused(s3, site, verify, base):
    site.configure(base=base)
    s3.forget()
    assert "only a filestorage can" in verify(status=FAILED).sentence
    assert requests(s3) == []


@pytest.mark.parametrize("content", [None, b"no database at all, but long enough to be taken for one"])
def test_a_data_fs_that_is_not_there_or_none(site, verify, content):
    if content:
        (site.directory / "Data.fs").write_bytes(content)
    assert f"{site.directory}/Data.fs" in verify(status=FAILED).sentence
    assert (site.directory / "Data.fs").exists() == bool(content)


def test_a_configuration_that_is_not_there(site, verify):
    (site.directory / "zeo.conf").unlink()
    assert f"no file {site.directory}/zeo.conf" in verify(status=FAILED).sentence


def test_of_several_storages_one_is_to_be_named(s3, site, tmp_path, verify):
    config = (tmp_path / "zeo.conf").read_text()
    second = config[config.index("<s3blobstorage 1>") :].replace("storage 1>", "storage two>")
    for change in ("Data.fs", "Two.fs"), ("/cache", "/cache-two"), ("s3-prefix 1", "s3-prefix 2"):
        second = second.replace(*change)
    (tmp_path / "zeo.conf").write_text(config + second)
    for path in "Data.fs", "Two.fs":
        ZODB.DB(FileStorage(str(tmp_path / path))).close()
    s3.put(site.bucket, [f"2/blobs/1/{OLD}.blob"])
    assert "--storage: 1, two" in verify(status=FAILED).sentence
    assert verify("--json", "--storage", "1").found == {}
    assert verify("--json", "--storage", "two", status=GARBAGE).found == {"dead": 1}


# Nothing is changed


def test_nothing_is_written(s3, site, verify, files, contents):
    site.configure(gc_retention="30d")
    blobs = site.write(missing=b"data", damaged=b"data", good=b"data")
    site.write(good=b"more")
    site.db.pack()
    site.close()
    site.delete(blobs[0])
    site.replace(blobs[1], b"damage")
    site.put(3)
    before, bucket = files(), contents()
    assert any(name.startswith("cache/blobs/") for name in before) and "Data.fs" in before
    assert "1/gc-marks.jsonl" in {key for key, *_ in bucket}
    s3.forget()
    for options in [], ["--checksum", "--json"], ["--checksum", "--sample", "1/2"]:
        assert verify(*options, status=DAMAGED).stdout
    assert files() == before
    assert contents() == bucket
    assert set(requests(s3)) == {"ListObjects", "GetObject", "OwnerGetObject"}


@slow
def test_nothing_is_written_without_an_index_either(site, verify, files):
    """A FileStorage that opens a database without one makes it, to open faster the next time."""
    site.write(one=b"data")
    site.close()
    (site.directory / "Data.fs.index").unlink()
    before = files()
    verify("--checksum")
    assert files() == before


def test_nothing_is_written_beside_a_running_server(start, verify, files):
    server = start()
    write(server.db(), one=b"data")
    wait_for(lambda: (server.cache_dir / "index").stat().st_size and not leftovers(server))  # it is in the cache
    before = files()
    verify("--checksum")
    assert files() == before


def test_the_log_of_the_server_is_the_servers(site, verify):
    """Two processes that rotate one log file lose lines, and it may belong to another user."""
    site.configure(gc_retention="30d")
    site.write(one=b"data")
    site.close()
    verify("--checksum")
    assert not (site.directory / "zeo.log").exists()


# How much is asked


def test_the_bucket_is_listed_once_and_no_blob_asked_for(s3, site, verify):
    site.write(**{f"n{number}": b"data" for number in range(50)})
    site.evict()
    site.put(450)
    s3.forget()
    assert verify("--json", status=GARBAGE).found == {"good": 50, "dead": 450}
    assert requests(s3) == ["ListObjects"] * 3 + ["OwnerGetObject"]  # pages of 200


def test_with_checksums_every_blob_is_asked_for_once(s3, site, verify):
    site.write(**{f"n{number}": b"data" for number in range(50)})
    site.put(50)
    s3.forget()
    assert verify("--json", "--checksum", status=GARBAGE).found == {"good": 50, "dead": 50}
    assert sorted(requests(s3)) == ["GetObject"] * 50 + ["ListObjects", "OwnerGetObject"]
