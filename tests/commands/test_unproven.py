"""Objects without SHA-256, as another tool copies blobs into a bucket: what the commands say of them, and do."""

import hashlib
import json
import re
from collections import Counter

import pytest

from tests.support.sites import KEYS
from tests.support.speed import slow, slow_but

WELL, FAILED, DAMAGED, GARBAGE, UNPROVEN = 0, 1, 3, 4, 5
MIB = 1 << 20


class Content:
    """What is in the bucket of a test."""

    def __init__(self, s3, bucket):
        self._client, self._bucket = s3.client, bucket

    def put(self, name, data):
        """Put an object without metadata, in one request."""
        self._client.put_object(Bucket=self._bucket, Key=KEYS.key(*name), Body=data)

    def put_in_parts(self, name, data):
        """Put it in parts, after which its ETag is no MD5."""
        place = {"Bucket": self._bucket, "Key": KEYS.key(*name)}
        upload = {**place, "UploadId": self._client.create_multipart_upload(**place)["UploadId"]}
        etag = self._client.upload_part(**upload, PartNumber=1, Body=data)["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
        self._client.complete_multipart_upload(**upload, MultipartUpload=parts)

    def put_proven(self, name, data):
        """Put it as this software does."""
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        self._client.put_object(Bucket=self._bucket, Key=KEYS.key(*name), Body=data, Metadata=metadata)

    def damage(self, name, data):
        """Have other bytes there, with the metadata of the right ones: as when a disk of the service fails."""
        metadata = {"sha256": self(name)[1]}
        self._client.put_object(Bucket=self._bucket, Key=KEYS.key(*name), Body=data, Metadata=metadata)

    def __call__(self, name):
        """The bytes of a blob's object, and the SHA-256 that it carries, None if it does not."""
        found = self._client.get_object(Bucket=self._bucket, Key=KEYS.key(*name))
        return found["Body"].read(), found["Metadata"].get("sha256")


@pytest.fixture
def content(s3, bucket_name):
    return Content(s3, bucket_name)


@pytest.fixture
def conf(site, s3, bucket_name):
    """A zeo.conf without a fallback: verify knows nothing but the bucket."""
    return site.configure(s3, bucket_name)


@pytest.fixture
def first(site):
    """The blob that is looked at first, of those that have any bytes."""
    return min(name for name, data in site.revisions.items() if data)


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def counts(out):
    """The numbers of objects in the JSON that was printed, without zeros."""
    return {word: found["objects"] for word, found in json.loads(out)["found"].items() if found["objects"]}


def meaning(word, out):
    """What the table says of ``word``, in one line."""
    lines = re.search(rf"^{word} +[\d,]+ +[\d,]+  (.*\n(?: +[^\s\d].*\n)*)", out, re.M)[1]
    return " ".join(lines.split())


def operations(s3):
    return Counter(request.operation for request in s3.requests())


# verify


def test_verify_with_checksums_counts_them_and_ends_with_a_status_of_their_own(site, content, tool, conf, first):
    for name, data in site.revisions.items():
        (content.put if name == first else content.put_proven)(name, data)
    out, _ = tool("verify", conf, "--checksum", "--json", status=UNPROVEN)
    assert counts(out) == {"good": len(site.revisions) - 1, "unproven": 1}
    found = json.loads(out)
    assert found["found"]["unproven"]["bytes"] == len(site.revisions[first])
    assert found["problems"] == []
    out, _ = tool("verify", conf, "--checksum", status=UNPROVEN)
    assert "SHA-256" in meaning("unproven", out) and "zodb-s3blobs migrate" in meaning("unproven", out)
    assert out.splitlines()[-1] == "No damage is known, but not all blobs carry a SHA-256: 1 unproven."
    assert "All is well" not in out


def test_verify_does_not_call_a_flipped_bit_good_that_nothing_can_tell(site, content, tool, conf, first):
    for name, data in site.revisions.items():
        content.put_proven(name, data)
    content.put_in_parts(first, flipped(site.revisions[first]))
    out, _ = tool("verify", conf, "--checksum", "--json", status=UNPROVEN)
    assert counts(out) == {"good": len(site.revisions) - 1, "unproven": 1}


def test_verify_finds_a_flipped_bit_by_the_md5_of_the_service(s3, site, content, tool, conf, first):
    for name, data in site.revisions.items():
        content.put(name, data)
    s3.misbehave(operation="GetObject", flip=True)
    out, _ = tool("verify", conf, "--checksum", "--json", status=DAMAGED)
    empty = list(site.revisions.values()).count(b"")
    assert counts(out) == {"damaged": len(site.revisions) - empty, "unproven": empty}


def test_verify_without_checksums_says_that_it_has_not_read_them(s3, site, content, tool, conf):
    for name, data in site.revisions.items():
        content.put(name, data)
    s3.forget()
    out, _ = tool("verify", conf)
    assert operations(s3) == {"ListObjects": 1}
    assert "not read" in meaning("good", out) and "sizes" in meaning("good", out)
    assert not re.search(r"^unproven ", out, re.M) and "SHA-256" not in meaning("good", out)
    assert out.splitlines()[-1] == "All is well as far as sizes tell (--checksum reads the blobs)."


def test_verify_with_checksums_says_so_when_all_is_well(site, content, tool, conf):
    for name, data in site.revisions.items():
        content.put_proven(name, data)
    out, _ = tool("verify", conf, "--checksum")
    assert "SHA-256" in meaning("good", out) and re.search(r"^unproven +0 +0  ", out, re.M)
    assert out.splitlines()[-1] == "All is well."
    out, _ = tool("verify", conf, "--checksum", "--sample", "2/3")
    assert out.splitlines()[-1] == "All is well as far as part 2 of 3 tells, which was read."


@slow
def test_the_worst_that_was_found_decides_the_exit_status(s3, bucket_name, site, content, tool, conf):
    """3 comes before 1, 1 before 5, and 5 before 4."""
    first, second, *_ = sorted(site.revisions)
    for name, data in site.revisions.items():
        content.put_proven(name, data)
    s3.put(bucket_name, ["1/blobs/999/3d0c0b0a0908070.blob"])
    number = len(site.revisions)

    def verdict(status):
        out, _ = tool("verify", conf, "--checksum", status=status)
        return out.splitlines()[-1]

    assert verdict(GARBAGE) == "All blobs are well; the next pack has work: 1 dead."
    content.put(first, site.revisions[first])
    assert verdict(UNPROVEN).endswith(": 1 unproven, 1 dead.")
    conf = site.configure(s3, bucket_name, s3_max_attempts=1, s3_concurrency=1)
    s3.misbehave(operation="GetObject", times=number - 1)
    s3.misbehave(operation="GetObject", times=1, status=500, code="InternalError")
    assert verdict(FAILED) == "Not well: 1 failed, 1 unproven, 1 dead."
    s3.behave()
    s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*second))
    s3.misbehave(operation="GetObject", times=number - 2)
    s3.misbehave(operation="GetObject", times=1, status=500, code="InternalError")
    assert verdict(DAMAGED) == "Not well: 1 missing, 1 failed, 1 unproven, 1 dead."


# migrate


def test_migrate_gives_them_their_checksum_and_then_all_is_well(s3, site, content, tool, conf):
    site.grow(large=9 * MIB)
    for number, (name, data) in enumerate(site.revisions.items()):
        (content.put_in_parts if number % 2 else content.put)(name, data)
    number = len(site.revisions)
    files = {path: path.read_bytes() for path in site.files()}
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir)
    assert re.search(rf"^proven +{number} +{sum(map(len, site.revisions.values())):,}  ", out, re.M)
    assert "SHA-256" in meaning("proven", out)
    assert out.splitlines()[-1] == "All blobs of the database are in the bucket."
    for name, data in site.revisions.items():
        assert content(name) == (data, hashlib.sha256(data).hexdigest())
    assert {path: path.read_bytes() for path in site.files()} == files
    out, _ = tool("verify", conf, "--checksum", "--json")
    assert counts(out) == {"good": number}
    s3.forget()
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json")
    assert counts(out) == {"there": number}
    assert operations(s3) == {"ListObjects": 1, "HeadObject": number}


@pytest.mark.parametrize("how", slow_but("put", of=["put", "put_in_parts"]))
def test_migrate_leaves_an_object_alone_that_has_the_size_and_other_bytes(s3, site, content, tool, conf, first, how):
    """Whether the object is damaged or the file, nobody can tell without a third copy."""
    damaged = flipped(site.revisions[first])
    getattr(content, how)(first, damaged)
    s3.forget()
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - 1, "different": 1}
    (problem,) = json.loads(out)["problems"]
    assert problem["problem"] == "different"
    assert KEYS.key(*first) in problem["reason"] and str(site.file(*first)) in problem["reason"]
    assert "the object or the file is damaged" in problem["reason"] and "s3-prefix" in problem["reason"]
    assert content(first) == (damaged, None)
    assert site.file(*first).read_bytes() == site.revisions[first]
    assert operations(s3)["PutObject"] == len(site.revisions) - 1
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, status=DAMAGED)
    assert out.splitlines()[-1] == "Not everything is in the bucket as it should be: 1 different."


def test_migrate_says_which_is_damaged_where_the_service_tells(s3, bucket_name, site, content, tool, first):
    """The MD5 is that of the file, and the bytes that the service sends have another."""
    content.put(first, site.revisions[first])
    conf = site.configure(s3, bucket_name, s3_max_attempts=1)
    s3.misbehave(operation="GetObject", flip=True)
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - 1, "different": 1}
    reason = json.loads(out)["problems"][0]["reason"]
    assert "The object is damaged" in reason and f"The file {site.file(*first)} matches the ETag" in reason
    assert content(first) == (site.revisions[first], None)


@slow
def test_migrate_copies_it_after_the_damaged_object_was_deleted(s3, bucket_name, site, content, tool, conf, first):
    content.put(first, flipped(site.revisions[first]))
    tool("migrate", conf, "--from-blob-dir", site.blob_dir, status=DAMAGED)
    s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*first))
    tool("migrate", conf, "--from-blob-dir", site.blob_dir)
    assert content(first)[0] == site.revisions[first]


def test_migrate_says_so_where_the_service_keeps_no_metadata(s3, site, tool, conf):
    s3.misbehave(operation="HeadObject", headers={"x-amz-meta-sha256": ""})
    for _ in range(2):
        out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, status=UNPROVEN)
        number = len(site.revisions)
        assert re.search(rf"^unproven +{number} ", out, re.M) and "service" in meaning("unproven", out)
        assert out.splitlines()[-1] == f"All blobs of the database are in the bucket; {number} unproven."


def test_an_object_that_goes_away_while_it_is_compared_is_copied_the_next_time(s3, site, content, tool, conf, first):
    content.put(first, site.revisions[first])
    s3.misbehave(operation="GetObject", times=1, status=404, code="NoSuchKey")
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - 1, "failed": 1}
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json")
    assert counts(out) == {"there": len(site.revisions) - 1, "proven": 1}


def test_a_bucket_that_fails_while_they_are_compared_keeps_what_it_has(s3, bucket_name, site, content, tool, first):
    content.put(first, site.revisions[first])
    conf = site.configure(s3, bucket_name, s3_max_attempts=1)
    s3.misbehave(operation="GetObject", times=1, status=500, code="InternalError")
    out, _ = tool("migrate", conf, "--from-blob-dir", site.blob_dir, "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - 1, "failed": 1}
    assert content(first) == (site.revisions[first], None)


# export


@slow
def test_export_counts_what_it_could_not_compare(site, content, tool, conf, first, tmp_path):
    for name, data in site.revisions.items():
        (content.put if name == first else content.put_proven)(name, data)
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out) == {"copied": len(site.revisions) - 1, "unproven": 1}
    assert json.loads(out)["problems"] == []
    out, _ = tool("export", conf, "--to-blob-dir", tmp_path / "again")
    assert "SHA-256" in meaning("unproven", out)
    assert out.splitlines()[-1] == f"All blobs of the database are in {tmp_path / 'again'}."


@slow
def test_what_was_exported_gives_a_bucket_its_checksums(site, content, tool, conf, tmp_path):
    """Without another copy: from now on damage shows."""
    for name, data in site.revisions.items():
        content.put(name, data)
    tool("export", conf, "--to-blob-dir", tmp_path / "out")
    tool("migrate", conf, "--from-blob-dir", tmp_path / "out")
    tool("verify", conf, "--checksum")


def test_a_file_that_cannot_be_read_where_it_is_exported_to_is_replaced(site, content, tool, conf, first, tmp_path):
    for name, data in site.revisions.items():
        content.put_proven(name, data)
    tool("export", conf, "--to-blob-dir", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob(f"*{first[0].hex()[-2:]}/0x{first[1].hex()}.blob")
    path.unlink()
    path.symlink_to("/proc/self/mem")
    out, err = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json")
    assert counts(out)["copied"] == 1 and f"{path} " in err
    assert not path.is_symlink() and path.read_bytes() == site.revisions[first]


@slow
def test_damage_is_no_outage_however_many_blobs_it_hits(s3, bucket_name, site, content, tool, tmp_path):
    site.grow(more=30)
    for name, data in site.revisions.items():
        content.put_proven(name, data)
    damaged = [name for name, data in site.revisions.items() if data]
    for name in damaged:
        content.damage(name, flipped(site.revisions[name]))
    conf = site.configure(s3, bucket_name, s3_max_attempts=1, s3_concurrency=1)
    out, err = tool("export", conf, "--to-blob-dir", tmp_path / "out", "--json", status=DAMAGED)
    assert counts(out) == {"copied": len(site.revisions) - len(damaged), "failed": len(damaged)}
    assert "in a row" not in err
