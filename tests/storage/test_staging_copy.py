"""A staging copy of production, as the manual describes it: a prefix of its own, and production is only read."""

import shutil

import pytest
from ZODB.POSException import POSKeyError

from tests.support.sites import get, put, undo
from tests.support.zeo_clients import wait_for
from tests.support.zeo_server import FILESTORAGE, SECTION, ZEOServer, fallback_bucket

BLOBS = {"one": b"one " * 300, "two": b"", "large": b"large" * (2 << 20)}
#: The requests that change nothing.
READING = {"GetObject", "HeadObject", "ListObjects", "ListMultipartUploads", "OwnerGetObject"}


def section(settings, prefix):
    return SECTION.format(**settings).replace("s3-prefix 1\n", f"s3-prefix {prefix}\n")


def objects(s3, bucket, prefix):
    """All objects below a prefix: key -> ETag, time of the last change, and bytes."""
    listed = s3.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", ())
    read = {one["Key"]: s3.client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in listed}
    return {one["Key"]: (one["ETag"], one["LastModified"], read[one["Key"]]) for one in listed}


@pytest.fixture
def production(s3, bucket_name, tmp_path):
    """The server of production, with blobs of some transactions."""
    (tmp_path / "production").mkdir()
    directory = tmp_path / "production"
    with ZEOServer(directory, s3, bucket_name, storages=lambda zeo: section(zeo, "production")) as server:
        db = server.db()
        for name, data in BLOBS.items():
            put(db, name, data)
        put(db, "one", b"the second revision")
        db.close()
        yield server


@pytest.fixture
def copy(s3, bucket_name, tmp_path, production):
    """Copies Data.fs with the files beside it, while production runs, and makes the server of the copy."""

    def copy():
        directory = tmp_path / "staging"
        directory.mkdir()
        for file in production.directory.glob("Data.fs*"):
            if not file.name.endswith(".lock"):
                shutil.copy(file, directory)
        return ZEOServer(
            directory,
            s3,
            bucket_name,
            base=FILESTORAGE + fallback_bucket(s3, bucket_name, "production"),
            storages=lambda settings: section(settings, "staging"),
            metrics=True,
        )

    return copy


def test_staging_reads_commits_and_packs_and_production_is_as_it_was(s3, bucket_name, production, copy, tmp_path):
    production.stop()  # or it renews its lease
    before = objects(s3, bucket_name, "production")
    assert len([key for key in before if key.endswith(".blob")]) == len(BLOBS) + 1
    s3.forget()
    with copy() as staging:
        db = staging.db()
        now = {**BLOBS, "one": b"the second revision"}
        assert {name: get(db, name) for name in now} == now
        put(db, "one", b"changed in staging")
        put(db, "new", b"made in staging")
        undo(db, 1)
        assert get(db, "one") == b"the second revision"
        with db.transaction() as connection:
            del connection.root()["large"]
        db.pack()
        assert get(db, "one") == b"the second revision"
        assert get(db, "new") == b"made in staging"
        figures = staging.metrics()
        assert figures("s3blobs_bucket_owner_conflict") == 0
        assert figures("s3blobs_gc_failures_total") == 0 and figures("s3blobs_gc_runs_total") == 1
        assert figures("s3blobs_gc_deleted_objects_total") == 1  # what was changed and undone in staging
        wait_for(lambda: "staging/owner.json" in objects(s3, bucket_name, "staging"))
    requests = [*s3.requests(), *s3.requests("OwnerPutObject"), *s3.requests("OwnerGetObject")]
    asked = {one.operation for one in requests if one.path.startswith(f"/{bucket_name}/production/")}
    assert asked and asked <= READING
    written = {one.path for one in requests if one.operation not in READING}
    assert all(path.startswith(f"/{bucket_name}/staging/") or path == f"/{bucket_name}" for path in written)
    assert objects(s3, bucket_name, "production") == before


def test_both_run_at_the_same_time_and_each_owns_its_prefix(s3, bucket_name, production, copy):
    with copy() as staging:
        mine, theirs = staging.db(), production.db()
        put(mine, "one", b"changed in staging")
        put(theirs, "one", b"changed in production")
        mine.pack()
        theirs.pack()
        assert get(mine, "one") == b"changed in staging"
        assert get(theirs, "one") == b"changed in production"
        owners = {
            prefix: s3.client.get_object(Bucket=bucket_name, Key=f"{prefix}/owner.json")["Body"].read()
            for prefix in ("production", "staging")
        }
        assert owners["production"] != owners["staging"]
        for server in production, staging:
            assert "belongs to" not in server.output()


def test_what_production_packs_away_is_gone_from_staging_as_well(production, copy):
    """So the manual has production keep dead blobs for as long as the copy lives."""
    with copy() as staging:
        theirs = production.db()
        put(theirs, "two", b"a new revision")
        theirs.pack()
        with pytest.raises(POSKeyError):
            get(staging.db(), "two")
        assert get(staging.db(), "large") == BLOBS["large"]
