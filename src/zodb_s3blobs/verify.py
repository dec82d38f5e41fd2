"""``zodb-s3blobs verify``: prove that the database and the bucket belong together.

Every blob that the database names must be in the bucket, with the size of the copies in cache-dir and fallback-blob-dir
if there are any; --checksum reads it and compares its checksum. Every object in the bucket must be a blob that the
database names. Nothing is changed, and the server may run.

Exit status: 0 all is well; 1 it could not be found out; 3 blobs are missing or damaged; 4 none is, but dead objects are
in the bucket, which the next pack deletes.
"""

import argparse
import os
import re
import time
import zlib
from contextlib import closing

from . import command, paths, zeoconf
from .blobdir import BlobDirectory
from .bucket import BlobNotFound, Bucket, BucketError, Damaged
from .cache import path_in
from .garbage import scan_beside_a_server
from .inventory import Named
from .metrics import Metrics
from .progress import showing
from .survey import Outcome, Report, Survey

_MEANINGS = {
    "good": "blobs of the database that are in the bucket",
    "marked": "such blobs that an earlier pack had marked as dead: the database was restored, and they live again",
    "fallback": "blobs of the database that fallback-blob-dir alone has: zodb-s3blobs migrate copies them",
    "missing": "blobs of the database that are gone",
    "damaged": "blobs of the database that are not what was stored",
    "failed": "blobs that could not be read",
    "dead": "objects that the database does not know: the next pack deletes them",
    "retained": "the same that gc-retention keeps",
    "newer": "objects newer than the last transaction: being committed, or of another or a restored database",
    "unknown": "keys that are no blobs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``verify``."""
    command.add_arguments(parser)
    parser.add_argument("--checksum", action="store_true", help="read every blob and compare its checksum")
    parser.add_argument(
        "--sample",
        metavar="N/T",
        type=_sample,
        default=(1, 1),
        help="only the Nth of T parts of the blobs: $(date +%%d)/31 has checked all of them in a month",
    )


def _sample(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError("must be N/T, such as 1/30 for the first of thirty parts")
    return int(match[1]), int(match[2])


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status that is described above."""
    return command.run("verify", lambda: _verify(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    fallback = served.section.open_fallback()
    part, parts = arguments.sample
    with closing(served.section.open_bucket(Metrics())) as bucket, Survey(served) as survey:
        scan = scan_beside_a_server(survey.storage, bucket, config.gc_retention)
        with showing("Listing the bucket", "objects") as progress:
            survey.inventory.add_held((blob.oid, blob.tid, blob.size) for blob, _, _ in progress.over(scan.run()))
        report = survey.run(
            "Verifying",
            lambda blob: _look(
                blob, bucket, config.cache_dir, fallback, scan.marks.get(blob.oid + blob.tid), arguments.checksum
            ),
            config.s3_concurrency,
            (lambda blob: zlib.crc32(blob.oid + blob.tid) % parts == part - 1) if parts > 1 else None,
        )
        for state in ("dead", "retained", "newer", "unknown"):
            report.objects[state], report.sizes[state] = scan.found[state].objects, scan.found[state].bytes
        where = paths.find(survey.storage, {outcome.oid for outcome in report.troubles})
    report.show(_MEANINGS, arguments.json, where)
    report.check_complete()
    return _status(report)


def _status(report: Report) -> int:
    if report.objects["missing"] or report.objects["damaged"]:
        return command.DAMAGED
    if report.objects["failed"]:
        return command.FAILED
    return command.GARBAGE if report.objects["dead"] else command.WELL


def _look(
    blob: Named, bucket: Bucket, cache_dir: str, fallback: BlobDirectory | None, dead_since: int | None, checksum: bool
) -> Outcome:
    oid, tid = blob.oid, blob.tid
    key = bucket.keys.key(oid, tid)
    cached = path_in(cache_dir, oid, tid)
    kept = fallback.find(oid, tid) if fallback is not None else None
    if blob.size is None:
        if kept is not None:
            return Outcome(oid, tid, "fallback", os.path.getsize(kept))
        advice = f"; {cached} is a copy" if os.path.exists(cached) else ""
        return Outcome(oid, tid, "missing", trouble=f"{key} is not in bucket {bucket.name}{advice}")
    for path in filter(None, (cached, kept)):
        try:
            size = os.path.getsize(path)
        except FileNotFoundError:
            continue  # it is not in the cache, or no more
        if size != blob.size:
            return Outcome(oid, tid, "damaged", blob.size, f"{key} has {blob.size} bytes, but {path} has {size}")
    if checksum:
        try:
            bucket.verify(oid, tid)
        except BlobNotFound as error:
            return Outcome(oid, tid, "missing", trouble=str(error))
        except Damaged as error:
            return Outcome(oid, tid, "damaged", blob.size, str(error))
        except BucketError as error:
            return Outcome(oid, tid, "failed", blob.size, str(error))
    if dead_since is None:
        return Outcome(oid, tid, "good", blob.size)
    day = time.strftime("%Y-%m-%d", time.gmtime(dead_since))
    return Outcome(oid, tid, "marked", blob.size, f"{key} is there; the next pack takes away its mark of {day}")
