"""``zodb-s3blobs migrate``: copy the blobs of a ZODB blob directory into the bucket.

Every revision that the database still knows is copied, and looked up at the bucket afterwards: size and checksum must
be right. What is there already is skipped after the same look. The directory is only read. The server may run; with
fallback-blob-dir in its section it serves the blobs that have not been copied yet.
"""

import argparse
import os
from contextlib import closing, suppress

from . import command, zeoconf
from .blobdir import BlobDirectory
from .bucket import Bucket, BucketError, Different
from .inventory import Named
from .metrics import Metrics
from .progress import showing
from .survey import Outcome, Survey

_MEANINGS = {
    "copied": "blobs of the database that were copied and checked",
    "there": "blobs that were in the bucket already, the same as in the directory",
    "new": "blobs that are in the bucket alone: committed since the server uses it",
    "missing": "blobs of the database that are neither in the directory nor in the bucket",
    "failed": "blobs that could not be copied",
    "different": "blobs that the bucket has already, but not as in the directory",
    "unreadable": "blobs whose files cannot be read",
    "unknown": "blobs of the directory that the database does not know: packed away, or another database's",
    "foreign": "files in the directory that are no blobs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``migrate``."""
    command.add_arguments(parser)
    parser.add_argument("--from-blob-dir", metavar="DIR", help="the blob directory, if it is not fallback-blob-dir")


def run(arguments: argparse.Namespace) -> int:
    """Run it: 0 if every blob of the database is in the bucket now."""
    return command.run("migrate", lambda: _migrate(arguments))


def _migrate(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    path = arguments.from_blob_dir or config.fallback_blob_dir
    if not path:
        raise zeoconf.ConfigurationError(
            "from where? Set fallback-blob-dir in the section, or name the blob directory with --from-blob-dir"
        )
    source = BlobDirectory(path)
    with closing(served.section.open_bucket(Metrics())) as bucket, Survey(served) as survey:
        survey.list_bucket(bucket)
        report = survey.run("Migrating", lambda blob: _copy(blob, source, bucket), config.s3_concurrency)
        with showing("Looking for other files", "files") as progress:

            def foreign(path: str) -> None:
                with suppress(OSError):  # it has gone since
                    report.add(Outcome(b"", b"", "foreign", os.lstat(path).st_size))

            for file in progress.over(source.files(foreign)):
                if not survey.inventory.is_named(file.oid, file.tid):
                    report.add(Outcome(file.oid, file.tid, "unknown", file.size))
    report.show(_MEANINGS, arguments.json)
    report.check_complete()
    return command.DAMAGED if report.troubles else command.WELL


def _copy(blob: Named, source: BlobDirectory, bucket: Bucket) -> Outcome:
    oid, tid = blob.oid, blob.tid
    key = bucket.keys.key(oid, tid)
    path = source.find(oid, tid)
    if path is None and blob.size is not None:
        return Outcome(oid, tid, "new", blob.size)
    missing = Outcome(oid, tid, "missing", trouble=f"neither {key} nor a file in {source.path}")
    if path is None:
        return missing
    size = 0
    try:
        size = os.path.getsize(path)
        if blob.size is not None and bucket.has(oid, tid, path):
            return Outcome(oid, tid, "there", size)
        bucket.put(oid, tid, path)
        if not _has_arrived(oid, tid, path, bucket):
            raise BucketError(f"{key} was stored, but bucket {bucket.name} does not have it as it was sent")
    except Different as error:
        return Outcome(oid, tid, "different", size, f"{error}. Or is {path} damaged?")
    except BucketError as error:
        return Outcome(oid, tid, "failed", size, str(error))
    except FileNotFoundError:
        return missing  # packed away since it was found, perhaps: that is looked up in the end
    except OSError as error:
        return Outcome(oid, tid, "unreadable", size, f"{path} cannot be read: {error.strerror}")
    return Outcome(oid, tid, "copied", size)


def _has_arrived(oid: bytes, tid: bytes, path: str, bucket: Bucket) -> bool:
    try:
        return bucket.has(oid, tid, path)
    except Different:
        return False
