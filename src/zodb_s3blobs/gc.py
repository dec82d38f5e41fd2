"""``zodb-s3blobs gc``: delete dead blobs without a pack, or with --dry-run only list them.

Which blobs are dead, the database tells as it is: pack it first. With --dry-run nothing is changed, and the server may
run; without, it must not: its own packs collect garbage.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import zc.lockfile
from ZODB.POSException import StorageError

from . import zeoconf
from .bucket import BucketError
from .cache import Cache
from .config import S3BlobStorageFactory, StartRefused
from .garbage import Refused, Scan, abandoned_uploads, read_marks
from .inflight import InFlight
from .lease import NotOwner
from .metrics import Metrics
from .staging import abandoned, abandoned_after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gc``."""
    parser.add_argument("-C", "--configure", metavar="FILE", type=Path, required=True, help="the server's zeo.conf")
    parser.add_argument("--storage", metavar="NAME", help="which storage, where there are several")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, list what would go")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run it: 0 unless something failed."""
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING if arguments.dry_run else logging.INFO
    )
    try:
        section = zeoconf.find(arguments.configure, arguments.storage)
        if arguments.dry_run:
            _show(_dry_run(section), arguments.json)
        else:
            deleted = _collect(section)
            print(json.dumps({"deleted_objects": deleted}) if arguments.json else f"{deleted} dead blobs were deleted.")
    except BrokenPipeError:
        raise
    except StartRefused:
        return 1  # its sentence has been logged
    except (zeoconf.ConfigurationError, BucketError, NotOwner, Refused, StorageError, OSError) as error:
        print(f"zodb-s3blobs gc: {error}", file=sys.stderr)
        return 1
    except zc.lockfile.LockError:
        print(
            "zodb-s3blobs gc: the database is in use. Stop the server, or let it pack; --dry-run works beside it",
            file=sys.stderr,
        )
        return 1
    return 0


def _collect(section: S3BlobStorageFactory) -> int:
    section.config.metrics_address = None  # nobody scrapes a command
    storage = section.open()
    try:
        if storage.isReadOnly():
            raise zeoconf.ConfigurationError("the storage inside s3blobstorage is read-only: it deletes nothing")
        return storage.collect_garbage()
    finally:
        storage.close()


def _dry_run(section: S3BlobStorageFactory) -> dict[str, Any]:
    """What would go, and what there is."""
    with contextlib.ExitStack() as stack:
        base = zeoconf.open_base_read_only(section)
        stack.callback(base.close)
        bucket = section.open_bucket(Metrics())
        stack.callback(bucket.close)
        retention = section.config.gc_retention
        marks = {}
        if retention:
            with tempfile.TemporaryDirectory() as directory:
                cache = Cache(directory, 0, Metrics())
                marks = read_marks(bucket, cache)
                cache.close()
        scan = Scan(base, bucket, InFlight(), retention, marks)
        goes = [
            {"key": bucket.keys.key(blob.oid, blob.tid), "bytes": blob.size, "reason": "dead"}
            for blob, state, _ in scan.run()
            if state == "dead"
        ]
        age = abandoned_after(section.config.upload_timeout)
        for staged in abandoned(bucket, age):
            goes.append({"key": bucket.keys.staged_key(staged.name), "bytes": staged.size, "reason": "staged"})
        for upload in abandoned_uploads(bucket, age):
            goes.append({"key": upload.key, "bytes": 0, "reason": "unfinished"})
    found = {state: {"objects": found.objects, "bytes": found.bytes} for state, found in scan.found.items()}
    return {"would_delete": goes, "found": found, "refused": scan.refusal(section.config.gc_max_delete_percent)}


_MEANINGS = {
    "live": "blobs of the database",
    "dead": "blobs that would be deleted now",
    "retained": "dead blobs that gc-retention keeps",
    "newer": "newer than the last transaction: being committed, or of another or a restored database; never deleted",
    "unknown": "keys that are no blobs; never deleted",
}


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for one in result["would_delete"]:
        print(f"{one['reason']:<10} {one['bytes']:>14,} {one['key']}")
    if result["would_delete"]:
        print()
    print(f"{'':<10} {'objects':>14} {'bytes':>20}")
    for state, found in result["found"].items():
        print(f"{state:<10} {found['objects']:>14,} {found['bytes']:>20,}  {_MEANINGS[state]}")
    if result["refused"]:
        print(f"\nA pack would delete none of them: {result['refused']}")
