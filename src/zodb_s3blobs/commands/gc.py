"""``zodb-s3blobs gc``: delete dead blobs without a pack, or with --dry-run only list them.

Blobs are dead if the database, in its current state, does not have their revisions: pack it first. With --dry-run
nothing is changed, and the server may run. Without --dry-run the server must not run: its own packs collect garbage.
"""

import argparse
import json
import logging
from contextlib import closing
from typing import Any

import zc.lockfile

from ..database import zeoconf
from ..garbage.leftovers import abandoned_after, abandoned_staged, abandoned_uploads
from ..garbage.scan import scan_beside_a_server
from ..metrics import Metrics
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gc``."""
    common.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, list what would be deleted")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 unless it failed."""
    return common.run("gc", lambda: _gc(arguments), logging.WARNING if arguments.dry_run else logging.INFO)


def _gc(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    if arguments.dry_run:
        _show(_dry_run(served), arguments.json)
    else:
        deleted = _collect(served)
        print(json.dumps({"deleted_objects": deleted}) if arguments.json else f"{deleted} dead blobs were deleted.")
    return common.EXIT_OK


def _collect(served: zeoconf.Served) -> int:
    served.check_database_exists()
    served.section.config.metrics_address = None  # a command is not scraped
    logging.getLogger("zodb_s3blobs.config").setLevel(logging.WARNING)  # without the lines of a server's start
    try:
        storage = served.section.open()
    except zc.lockfile.LockError:
        raise zeoconf.ConfigurationError(
            "the database is in use. Stop the server, or let it pack; --dry-run works beside it"
        ) from None
    try:
        if storage.isReadOnly():
            raise zeoconf.ConfigurationError("the storage inside s3blobstorage is read-only: it deletes nothing")
        return storage.collect_garbage()
    finally:
        storage.close()


def _dry_run(served: zeoconf.Served) -> dict[str, Any]:
    """Return what a pack would delete, and the state of all blobs. Waits for S3; BucketError."""
    config = served.section.config
    with closing(served.open_read_only()) as storage, closing(served.section.open_bucket(Metrics())) as bucket:
        is_ours = common.check_owner(bucket, storage)
        scan = scan_beside_a_server(storage, bucket, config.gc_retention)
        goes = [
            {"key": bucket.keys.key(blob.oid, blob.tid), "bytes": blob.size, "reason": "dead"}
            for blob, state, _ in scan.run()
            if state == "dead"
        ]
        age = abandoned_after(config.upload_timeout)
        for staged in abandoned_staged(bucket, age):
            goes.append({"key": bucket.keys.staged_key(staged.name), "bytes": staged.size, "reason": "staged"})
        for upload in abandoned_uploads(bucket, age):
            goes.append({"key": upload.key, "bytes": 0, "reason": "unfinished"})
    found = {state: {"objects": found.objects, "bytes": found.bytes} for state, found in scan.found.items()}
    refused = scan.refusal(config.gc_max_delete_percent) if is_ours else "the prefix belongs to another database"
    return {"would_delete": goes, "found": found, "refused": refused}


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
    print(f"\n{_verdict(result)}")


def _verdict(result: dict[str, Any]) -> str:
    if result["refused"]:
        return f"A pack would delete none of them: {result['refused']}"
    number = len(result["would_delete"])
    return f"A pack would delete the {number:,} objects listed." if number else "All is well: a pack deletes nothing."
