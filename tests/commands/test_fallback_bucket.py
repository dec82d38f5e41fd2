"""The commands of a section with a ``<fallbackbucket>``: what they do with blobs that only the second bucket has."""

import hashlib
import itertools
import json
import re
import signal
import time
from collections import Counter

import pytest
from ZODB.utils import oid_repr, tid_repr

from tests.support.sites import KEYS, contents, sentence, tree
from tests.support.speed import slow
from tests.support.waiting import wait_for
from tests.support.zeo_server import FILESTORAGE, fallback_bucket

NUMBERS = itertools.count()
#: The requests that change nothing.
READING = {"GetObject", "HeadObject", "ListObjects", "ListMultipartUploads", "OwnerGetObject"}


def store(s3, bucket, blobs, checksum=True):
    """Store ``blobs``, (oid, tid) -> bytes, as a server does; without ``checksum`` as other software does."""
    for name, data in blobs.items():
        metadata = {"sha256": hashlib.sha256(data).hexdigest()} if checksum else {}
        s3.client.put_object(Bucket=bucket, Key=KEYS.key(*name), Body=data, Metadata=metadata)


def damage(s3, bucket, name, site):
    """Let the bucket have other bytes of that blob than were stored."""
    metadata = {"sha256": hashlib.sha256(site.revisions[name]).hexdigest()}
    s3.client.put_object(Bucket=bucket, Key=KEYS.key(*name), Body=b"damaged", Metadata=metadata)


def stored(s3, bucket):
    """What is in a bucket: key -> bytes."""
    return {key: s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in s3.keys(bucket)}


def checksums(s3, bucket):
    """The SHA-256 that the objects of a bucket carry: key -> text."""
    return {key: s3.client.head_object(Bucket=bucket, Key=key)["Metadata"].get("sha256") for key in s3.keys(bucket)}


def objects(site):
    """What should be in the bucket: key -> bytes."""
    return {KEYS.key(*name): data for name, data in site.revisions.items()}


def sums(site):
    """What its objects should carry."""
    return {key: hashlib.sha256(data).hexdigest() for key, data in objects(site).items()}


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def operations(s3):
    return Counter(request.operation for request in s3.requests())


def written(s3, bucket):
    """The requests of the log that would change that bucket."""
    return [one for one in s3.requests() if one.path.startswith(f"/{bucket}/") and one.operation not in READING]


@pytest.fixture
def near(s3, site):
    """The second bucket, at the same service, with all blobs of the site."""
    bucket = s3.bucket(f"near-{next(NUMBERS)}")
    store(s3, bucket, site.revisions)
    return bucket


@pytest.fixture
def far(other_s3, site):
    """The same at another service."""
    bucket = other_s3.bucket(f"far-{next(NUMBERS)}")
    store(other_s3, bucket, site.revisions)
    return bucket


@pytest.fixture
def configure(s3, bucket_name, site):
    """Writes a zeo.conf with the second bucket ``bucket`` at ``there``; keywords are keys of the section."""

    def configure(there, bucket, of_other=None, **options):
        inside = fallback_bucket(there, bucket, **{"s3_max_attempts": 1, **(of_other or {})})
        return site.configure(s3, bucket_name, base=FILESTORAGE + inside, **options)

    return configure


# migrate


def test_inside_one_service_the_service_copies_and_what_is_there_is_not_copied_again(
    s3, bucket_name, site, near, configure, tool
):
    conf = configure(s3, near)
    number = len(site.revisions)
    s3.forget()
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"copied": number}
    assert stored(s3, bucket_name) == objects(site)
    assert checksums(s3, bucket_name) == sums(site)
    assert operations(s3) == {"ListObjects": 2, "HeadObject": 2 * number, "CopyObject": number}
    assert written(s3, near) == []
    s3.forget()
    out, _ = tool("migrate", conf)
    assert re.search(rf"^there +{number} ", out, re.M)
    assert operations(s3) == {"ListObjects": 2, "HeadObject": 2 * number}


@slow
def test_a_large_blob_is_copied_inside_the_service_in_parts(s3, bucket_name, site, near, configure, tool):
    site.grow(large=65 << 20)
    store(s3, near, site.revisions)
    s3.forget()
    out, _ = tool("migrate", configure(s3, near), "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert operations(s3)["UploadPartCopy"] == 2 and operations(s3)["PutObject"] == 0
    assert checksums(s3, bucket_name) == sums(site)
    assert stored(s3, bucket_name) == objects(site)


def test_between_two_services_each_blob_is_downloaded_and_uploaded(
    s3, bucket_name, other_s3, site, far, configure, tool, tmp_path, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    before = stored(other_s3, far)
    number = len(site.revisions)
    out, _ = tool("migrate", configure(other_s3, far), "--json")
    assert counts(out) == {"copied": number}
    assert stored(s3, bucket_name) == objects(site)
    assert checksums(s3, bucket_name) == sums(site)
    assert operations(s3)["PutObject"] == number and operations(s3)["CopyObject"] == 0
    assert set(operations(other_s3)) == {"ListObjects", "HeadObject", "GetObject"}
    assert stored(other_s3, far) == before
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [{"status": 403, "code": "AccessDenied"}, {"status": 501, "code": "NotImplemented"}],
    ids=["policy", "lack"],
)
def test_a_service_that_refuses_to_copy_is_asked_only_once(s3, bucket_name, site, near, configure, tool, fault):
    s3.misbehave(operation="CopyObject", **fault)
    out, err = tool("migrate", configure(s3, near, s3_concurrency=1), "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert stored(s3, bucket_name) == objects(site)
    assert operations(s3)["CopyObject"] == 1
    assert err.count("Blobs are downloaded and uploaded instead") == 1


def test_a_copy_that_lost_its_checksum_is_replaced_by_an_upload(s3, bucket_name, site, near, configure, tool):
    """Another object at the key, or a service that keeps no metadata when it copies."""
    s3.misbehave(operation="HeadObject", times=1)  # of the source
    s3.misbehave(operation="HeadObject", times=1, headers={"x-amz-meta-sha256": hashlib.sha256(b"other").hexdigest()})
    out, _ = tool("migrate", configure(s3, near, s3_concurrency=1), "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert operations(s3)["CopyObject"] == 1 and operations(s3)["PutObject"] == len(site.revisions)
    assert checksums(s3, bucket_name) == sums(site)


def test_objects_without_sha256_get_one(s3, bucket_name, site, near, configure, tool):
    store(s3, near, site.revisions, checksum=False)
    conf = configure(s3, near)
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert checksums(s3, bucket_name) == sums(site)
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"there": len(site.revisions)}


def test_objects_that_the_bucket_has_without_sha256_are_compared_and_get_one(
    s3, bucket_name, site, near, configure, tool
):
    store(s3, bucket_name, site.revisions, checksum=False)
    out, _ = tool("migrate", configure(s3, near), "--json")
    assert counts(out) == {"proven": len(site.revisions)}
    assert checksums(s3, bucket_name) == sums(site)


def test_what_is_different_new_or_missing_is_counted(s3, bucket_name, site, near, configure, tool):
    different, new, missing = [name for name, data in site.revisions.items() if data][:3]
    store(s3, bucket_name, {different: b"of another database", new: site.revisions[new]})
    for name in new, missing:
        s3.client.delete_object(Bucket=near, Key=KEYS.key(*name))
    out, _ = tool("migrate", configure(s3, near), "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 3, "different": 1, "new": 1, "missing": 1}
    problems = {(one["problem"], one["oid"], one["tid"]): one["reason"] for one in json.loads(out)["problems"]}
    for word, name in ("different", different), ("missing", missing):
        reason = problems[word, oid_repr(name[0]), tid_repr(name[1])]
        assert KEYS.key(*name) in reason and near in reason
    assert stored(s3, bucket_name)[KEYS.key(*different)] == b"of another database"


def test_a_damaged_source_is_not_copied(s3, other_s3, bucket_name, site, far, configure, tool):
    name = next(name for name, data in site.revisions.items() if data)
    damage(other_s3, far, name, site)
    out, _ = tool("migrate", configure(other_s3, far), "--json", status=3)
    assert counts(out) == {"copied": len(site.revisions) - 1, "failed": 1}
    (problem,) = json.loads(out)["problems"]
    assert "<fallbackbucket>" in problem["reason"] and KEYS.key(*name) in problem["reason"]
    assert KEYS.key(*name) not in stored(s3, bucket_name)


def test_the_directory_comes_first_and_the_second_bucket_has_the_rest(s3, bucket_name, site, near, configure, tool):
    before = tree(site.blob_dir)
    lacking = list(site.revisions)[:2]
    conf = configure(s3, near, fallback_blob_dir=site.blob_dir)
    files = {name: site.file(*name).read_bytes() for name in lacking}
    for name in lacking:
        site.file(*name).unlink()
    s3.forget()
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    assert stored(s3, bucket_name) == objects(site)
    assert operations(s3)["CopyObject"] == len(files) == len(before.keys() - tree(site.blob_dir).keys())


def test_a_second_bucket_that_cannot_be_read_makes_no_blob_a_missing_one(other_s3, site, far, configure, tool):
    other_s3.misbehave(operation="HeadObject", status=403, code="AccessDenied")
    out, _ = tool("migrate", configure(other_s3, far), "--json", status=3)
    assert counts(out) == {"failed": len(site.revisions)}
    assert all("<fallbackbucket>" in one["reason"] for one in json.loads(out)["problems"])


@slow
def test_what_was_interrupted_goes_on_where_it_stopped(s3, bucket_name, site, near, configure, tool):
    conf = configure(s3, near, s3_concurrency=2, s3_read_timeout="120s")
    s3.misbehave(operation="CopyObject", times=3)
    s3.misbehave(operation="CopyObject", hang=True)
    migrating = tool.begin("migrate", conf)
    s3.wait_for("CopyObject", 5)
    migrating.send_signal(signal.SIGKILL)
    migrating.communicate(timeout=30)
    s3.behave()
    there = len(stored(s3, bucket_name))
    out, _ = tool("migrate", conf, "--json")
    assert counts(out) == {"there": there, "copied": len(site.revisions) - there}
    assert stored(s3, bucket_name) == objects(site)


def test_a_service_moves_without_downtime(s3, bucket_name, other_s3, site, far, start, tool):
    """The server has been switched and restarted: it reads what has not been copied from the old service."""
    server = start(base=FILESTORAGE + fallback_bucket(other_s3, far))
    client = server.client()
    half = dict(list(site.revisions.items())[: len(site.revisions) // 2])
    assert contents(client, half) == half
    out, _ = tool("migrate", server.directory / "zeo.conf", "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    out, _ = tool("verify", server.directory / "zeo.conf", "--checksum", "--json")
    assert counts(out) == {"good": len(site.revisions)}
    server.stop()
    server = start()  # without the old service
    assert contents(server.client(blob_dir=str(server.directory / "another")), site.revisions) == site.revisions
    assert "fallbackbucket" not in (server.directory / "zeo.conf").read_text()


# verify


def test_verify_counts_what_only_the_second_bucket_has(s3, bucket_name, site, near, configure, tool):
    here, elsewhere = [name for name, data in site.revisions.items() if data][:2]
    store(s3, bucket_name, {here: site.revisions[here]})
    conf = configure(s3, near)
    out, _ = tool("verify", conf, "--json", status=6)
    assert counts(out) == {"good": 1, "fallbackbucket": len(site.revisions) - 1}
    assert json.loads(out)["problems"] == []
    out, _ = tool("verify", conf, status=6)
    number = len(site.revisions) - 1
    assert re.search(rf"^fallbackbucket +{number} .*fallbackbucket alone", out, re.M)
    assert out.splitlines()[-1] == (
        f"All blobs can be read, but the bucket lacks some, which zodb-s3blobs migrate copies: {number} fallbackbucket."
    )
    assert operations(s3)["GetObject"] == 0
    damage(s3, near, elsewhere, site)
    out, _ = tool("verify", conf, "--checksum", "--json", status=3)
    assert counts(out) == {"good": 1, "fallbackbucket": number - 1, "damaged": 1}
    [problem] = json.loads(out)["problems"]
    assert "<fallbackbucket>" in problem["reason"] and KEYS.key(*elsewhere) in problem["reason"]
    assert "is a copy" not in problem["reason"]
    s3.client.delete_object(Bucket=near, Key=KEYS.key(*elsewhere))
    out, _ = tool("verify", conf, "--checksum", "--json", status=3)
    assert counts(out) == {"good": 1, "fallbackbucket": number - 1, "missing": 1}
    assert written(s3, near) == []


def test_verify_tells_which_fallback_has_a_blob(s3, site, near, configure, tool):
    conf = configure(s3, near, fallback_blob_dir=site.blob_dir)
    gone, *others = site.revisions
    site.file(*gone).unlink()
    out, _ = tool("verify", conf, "--json", status=6)
    assert counts(out) == {"fallback": len(others), "fallbackbucket": 1}
    out, _ = tool("verify", conf, status=6)
    assert "which zodb-s3blobs migrate copies: " in out.splitlines()[-1]


def test_verify_calls_nothing_missing_while_the_second_bucket_cannot_be_read(other_s3, site, far, configure, tool):
    other_s3.misbehave(operation="HeadObject", status=403, code="AccessDenied")
    out, _ = tool("verify", configure(other_s3, far), "--json", status=1)
    assert counts(out) == {"failed": len(site.revisions)}
    assert all("<fallbackbucket>" in one["reason"] for one in json.loads(out)["problems"])


def test_an_undone_revision_of_1_2_1_in_the_second_bucket_is_not_lost(s3, bucket_name, site, near, configure, tool):
    """It has no object there: clients read the one of the revision that it repeats."""
    undone = site.undone()
    for name in undone:
        s3.client.delete_object(Bucket=near, Key=KEYS.key(*name))
    conf, others = configure(s3, near), len(site.revisions) - len(undone)
    out, _ = tool("verify", conf, "--repair", "--json", status=6)
    assert counts(out) == {"fallbackbucket": others, "undone": len(undone)}
    out, _ = tool("migrate", conf, "--json", status=3)
    assert counts(out) == {"copied": others, "missing": len(undone)}
    assert all("zodb-s3blobs verify --repair" in one["reason"] for one in json.loads(out)["problems"])
    out, _ = tool("verify", conf, "--repair", "--json")
    assert counts(out) == {"good": others, "repaired": len(undone)}
    assert stored(s3, bucket_name) == objects(site)


def test_a_second_bucket_that_falls_silent_is_not_waited_for_blob_by_blob(
    s3, bucket_name, other_s3, site, far, configure, tool
):
    """Between blobs that the bucket has: these do not hide that all others fail."""
    names = sorted(site.revisions)
    store(s3, bucket_name, {name: site.revisions[name] for name in names[::2]})
    other_s3.misbehave(operation="ListObjects", times=1)  # at the beginning it answers
    for operation in "HeadObject", "ListObjects":
        other_s3.misbehave(operation=operation, reset=True)
    out, err = tool("verify", configure(other_s3, far, s3_concurrency=1), "--json", status=1)
    assert "<fallbackbucket>: Could not list bucket" in err and "the rest was not tried" in err
    assert counts(out)["failed"] == 1


# export, warm, check


def test_export_reads_from_the_second_bucket(s3, site, near, configure, tool, tmp_path):
    conf = configure(s3, near)
    s3.forget()
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out) == {"copied": len(site.revisions)}
    files = sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.blob"))
    assert files == sorted(site.revisions.values())
    assert set(operations(s3)) <= READING
    # Again, over a file that is not what the second bucket has.
    damaged = next(path for path in (tmp_path / "out").rglob("*.blob") if path.stat().st_size)
    damaged.chmod(0o600)
    damaged.write_bytes(damaged.read_bytes()[::-1] + b"more")
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out) == {"copied": 1, "there": len(site.revisions) - 1}
    assert sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.blob")) == files


@slow
def test_the_bandwidth_of_the_second_bucket_is_limited_too(other_s3, site, far, configure, tool, tmp_path):
    site.grow(large=2_000_000)
    store(other_s3, far, site.revisions)
    started = time.monotonic()
    tool("export", configure(other_s3, far), "--to-blob-dir", tmp_path / "out", "--max-bandwidth", "1MB")
    assert time.monotonic() - started > 1.5


def test_export_says_what_carries_no_checksum_there(s3, site, near, configure, tool, tmp_path):
    store(s3, near, site.revisions, checksum=False)
    out, _ = tool("export", configure(s3, near), "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out) == {"unproven": len(site.revisions)}


def test_export_calls_nothing_missing_while_the_second_bucket_is_down(other_s3, site, far, configure, tool, tmp_path):
    other_s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    out, _ = tool("export", configure(other_s3, far), "--to-blob-dir", tmp_path / "out", "--json", status=3)
    assert counts(out) == {"failed": len(site.revisions)}


def current(site):
    """The last revisions of the objects that are still there: what `warm` fetches."""
    storage = site.open()
    names = {(oid, storage.getTid(oid)) for oid, _ in site.revisions}
    storage.close()
    return {name: data for name, data in site.revisions.items() if name in names}


def test_warm_fetches_from_the_second_bucket_and_reads_cost_nothing_then(s3, bucket_name, site, near, start, tool):
    blobs = current(site)
    server = start(base=FILESTORAGE + fallback_bucket(s3, near))
    server.stop()
    out, _ = tool("warm", server.directory / "zeo.conf", "--json")
    assert counts(out) == {"fetched": len(blobs)}
    server.start()
    wait_for(lambda: not any((server.cache_dir / "warm").iterdir()))
    s3.forget()
    assert contents(server.client(), blobs) == blobs
    assert operations(s3)["GetObject"] == 0


@slow
def test_warm_fetches_no_more_from_there_than_the_cache_has_room_for(s3, site, near, configure, tool):
    site.grow(large=3 << 20)
    store(s3, near, site.revisions)
    out, _ = tool("warm", configure(s3, near), "--size", "1MB", "--json")
    assert counts(out) == {"fetched": len(current(site)) - 1, "left": 1}


def check(tool, conf):
    """What it says of the second bucket. It fails in any case: this S3 server stores damaged uploads."""
    out, _ = tool("check", conf, "--json", status=3)
    return {one["check"]: one for one in json.loads(out)["checks"]}["fallback bucket"]


def test_check_reads_from_the_second_bucket_and_writes_nothing_there(s3, site, near, configure, tool):
    before = stored(s3, near)
    conf = configure(s3, near)
    assert check(tool, conf)["state"] == "works"
    assert written(s3, near) == []
    assert stored(s3, near) == before
    out, _ = tool("check", conf, status=3)
    assert re.search(rf"^fallback bucket +works +blobs below 1/blobs/ of bucket {near} ", out, re.M)


@slow
def test_check_says_that_there_is_nothing_or_what_is_forbidden(s3, other_s3, bucket_name, site, far, configure, tool):
    empty = other_s3.bucket(f"empty-{next(NUMBERS)}")
    found = check(tool, configure(other_s3, empty))
    assert found["state"] == "fails" and "check bucket-name and s3-prefix in fallbackbucket" in found["meaning"]
    other_s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    found = check(tool, configure(other_s3, far))
    assert found["state"] == "fails"
    assert "<fallbackbucket>" in found["meaning"] and "s3:GetObject" in found["meaning"]


@pytest.mark.parametrize("command", ["verify", "migrate", "check"])
def test_the_place_of_the_bucket_itself_is_refused(s3, bucket_name, site, configure, tool, command):
    _, err = tool(command, configure(s3, bucket_name), status=1)
    assert "<fallbackbucket>: it names the bucket and the s3-prefix of the section around it" in err


@slow
def test_without_a_second_bucket_there_is_no_such_check(s3, bucket_name, site, tool):
    out, _ = tool("check", site.configure(s3, bucket_name), "--json", status=3)
    assert "fallback bucket" not in {one["check"] for one in json.loads(out)["checks"]}


@pytest.mark.parametrize("command", ["verify", "migrate", "warm", "export"])
def test_a_bucket_that_does_not_exist_ends_it_in_one_sentence(other_s3, site, configure, tool, tmp_path, command):
    """To requests for an object the service answers as if only that object was missing."""
    more = ["--to-blob-dir", tmp_path / "out"] if command == "export" else []
    out, err = tool(command, configure(other_s3, "no-such-bucket"), *more, status=1)
    assert out == "" and sentence(err).startswith(f"zodb-s3blobs {command}: <fallbackbucket>: Could not list bucket")


def test_without_any_source_migrate_names_both(s3, bucket_name, site, tool):
    _, err = tool("migrate", site.configure(s3, bucket_name), status=1)
    assert "<fallbackbucket>" in sentence(err)
