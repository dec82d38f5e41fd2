"""Objects that a lifecycle rule or a storage class has moved to an archive: what the commands say of them."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.sites import KEYS
from tests.support.speed import slow, slow_after
from zodb_s3blobs.cache.directory import path_in

WELL, FAILED, DAMAGED, GARBAGE, UNPROVEN = 0, 1, 3, 4, 5


class Content:
    """What is in the bucket of a test."""

    def __init__(self, s3, bucket):
        self._s3, self.bucket = s3, bucket

    def put(self, name, data, storage_class="STANDARD", sha256=True):
        metadata = {"sha256": hashlib.sha256(data).hexdigest()} if sha256 else {}
        place = {"Bucket": self.bucket, "Key": KEYS.key(*name)}
        self._s3.client.put_object(**place, Body=data, Metadata=metadata, StorageClass=storage_class)

    def restore(self, name):
        """Make a copy that can be read for a day."""
        self._s3.client.restore_object(Bucket=self.bucket, Key=KEYS.key(*name), RestoreRequest={"Days": 1})

    def list_as(self, storage_class):
        """Have the service list all objects so, the next time, whatever they are."""
        found = self._s3.client.list_objects_v2(Bucket=self.bucket, Prefix="1/blobs/")["Contents"]
        objects = "".join(
            f"<Contents><Key>{one['Key']}</Key><Size>{one['Size']}</Size><ETag>{one['ETag']}</ETag>"
            f"<StorageClass>{storage_class}</StorageClass></Contents>"
            for one in found
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
        self._s3.misbehave(operation="ListObjects", times=1, status=200, body=text)


@pytest.fixture
def content(s3, bucket_name):
    return Content(s3, bucket_name)


@pytest.fixture
def conf(site, s3, bucket_name):
    return site.configure(s3, bucket_name)


@pytest.fixture
def archived(site, content):
    """All blobs are in the bucket; returns the one that is in an archive."""
    archived = min(name for name, data in site.revisions.items() if data)
    for name, data in site.revisions.items():
        content.put(name, data, "GLACIER" if name == archived else "STANDARD")
    return archived


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def operations(s3):
    return Counter(request.operation for request in s3.requests())


@pytest.mark.parametrize("storage_class", ["GLACIER", "DEEP_ARCHIVE"])
@pytest.mark.parametrize("options", slow_after(1, of=[[], ["--checksum"]]))
def test_verify_lists_them_and_says_what_to_do(s3, site, content, tool, conf, archived, options, storage_class):
    content.put(archived, site.revisions[archived], storage_class)
    out, _ = tool("verify", conf, "--json", *options, status=DAMAGED)
    assert counts(out) == {"good": len(site.revisions) - 1, "archived": 1}
    (problem,) = json.loads(out)["problems"]
    assert problem["problem"] == "archived" and problem["path"]
    assert KEYS.key(*archived) in problem["reason"]
    assert "Restore it" in problem["reason"] and "lifecycle rule" in problem["reason"]
    s3.forget()
    out, _ = tool("verify", conf, *options, status=DAMAGED)
    assert re.search(rf"^archived +1 +{len(site.revisions[archived]):,}  ", out, re.M)
    assert out.splitlines()[-1] == "Not well: 1 archived."
    if not options:  # only the archived one is asked for
        assert operations(s3) == {"ListObjects": 1, "GetObject": 1}


def test_verify_names_the_copy_in_the_cache(site, tool, conf, archived):
    path = Path(path_in(str(site.directory / "cache"), *archived))
    path.parent.mkdir(parents=True)
    path.write_bytes(site.revisions[archived])
    out, _ = tool("verify", conf, "--json", status=DAMAGED)
    assert f"{path} is a copy" in json.loads(out)["problems"][0]["reason"]


def test_a_restored_copy_can_be_read_and_does_not_last(site, content, tool, conf, archived):
    content.restore(archived)
    for options in [], ["--checksum"]:
        out, _ = tool("verify", conf, "--json", *options, status=DAMAGED)
        (problem,) = json.loads(out)["problems"]
        assert problem["problem"] == "archived"
        assert "until it expires" in problem["reason"] and "another storage class" in problem["reason"]


def test_a_class_of_that_name_that_the_service_does_not_archive_is_no_trouble(s3, site, content, tool, conf):
    """Ceph lets administrators name a class of ordinary disks so; and an empty object has no first byte."""
    for name, data in site.revisions.items():
        content.put(name, data)
    for options in [], ["--checksum"]:
        content.list_as("GLACIER")
        out, _ = tool("verify", conf, "--json", *options)
        assert counts(out) == {"good": len(site.revisions)}


def test_what_only_reading_tells_is_found_with_checksums(s3, site, content, tool, conf):
    """Intelligent-Tiering moves objects to an archive, and lists them in its own class."""
    for name, data in site.revisions.items():
        content.put(name, data, "INTELLIGENT_TIERING")
    s3.misbehave(operation="GetObject", times=1, status=403, code="InvalidObjectState")
    out, _ = tool("verify", conf, "--json", "--checksum", status=DAMAGED)
    assert counts(out) == {"good": len(site.revisions) - 1, "archived": 1}


@slow
@pytest.mark.parametrize("command", ["verify", "export"])
def test_many_archived_blobs_are_no_outage(s3, bucket_name, site, content, tool, tmp_path, command):
    site.grow(more=30)
    for name, data in site.revisions.items():
        content.put(name, data, "GLACIER")
    conf = site.configure(s3, bucket_name, s3_concurrency=1)
    options = ["--checksum"] if command == "verify" else ["--to-blob-dir", tmp_path / "out"]
    out, err = tool(command, conf, "--json", *options, status=DAMAGED)
    assert counts(out) == {"archived": len(site.revisions)}
    assert "in a row" not in err


def test_export_lists_them_and_copies_the_others(site, tool, conf, archived, tmp_path):
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - 1, "archived": 1}
    assert "Restore it" in json.loads(out)["problems"][0]["reason"]
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", status=DAMAGED)
    assert out.splitlines()[-1] == f"Not all blobs of the database are in {tmp_path / 'out'}: 1 archived."


def test_export_takes_them_from_the_fallback(s3, bucket_name, site, tool, archived, tmp_path):
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir)
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out) == {"copied": len(site.revisions)}


def test_migrate_finds_them_there_by_their_checksum(site, tool, conf, archived):
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json")
    assert counts(out) == {"there": len(site.revisions)}


def test_migrate_cannot_compare_them_without_one(site, content, tool, conf, archived):
    content.put(archived, site.revisions[archived], "GLACIER", sha256=False)
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json", status=DAMAGED)
    assert counts(out) == {"there": len(site.revisions) - 1, "archived": 1}
    assert "Restore it" in json.loads(out)["problems"][0]["reason"]
