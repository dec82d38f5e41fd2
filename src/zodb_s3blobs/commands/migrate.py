"""``zodb-s3blobs migrate``: copy the blobs of a ZODB blob directory into the bucket.

Every revision that the database still has is copied, and looked up in the bucket afterwards: size and SHA-256 must be
right. Blobs that the bucket already has are skipped after that check. An object without SHA-256 (another tool copied
it, or the service lost its metadata) is read; if it has the bytes of the file, it is stored again, with its SHA-256.
The directory is only read. The server may run; with fallback-blob-dir in its section it serves the blobs that have not
been copied yet.

Exit status: 0 every blob of the database is in the bucket; 1 the work could not be done, or ended early; 3 some blobs
are not, or not as in the directory; 5 they are, but the service does not keep their SHA-256.
"""

import argparse
import os
from contextlib import closing, suppress

from ..blobdir import BlobDirectory
from ..database import zeoconf
from ..database.blob_index import Inventory, Named
from ..database.survey import Outcome, Report, Survey, failure
from ..metrics import Metrics
from ..progress import showing
from ..s3.bucket import Bucket
from ..s3.errors import BlobDamaged, BlobMismatch, BlobNotFound, BucketError
from . import common

_MEANINGS = {
    "copied": "blobs of the database that were copied and checked",
    "there": "were in the bucket already, as in the directory",
    "proven": "were in the bucket already, but without SHA-256: compared with the directory, and stored again with it",
    "unproven": "are in the bucket as in the directory, but the service does not keep their SHA-256",
    "new": "are in the bucket alone: committed since the server uses it",
    "missing": "are neither in the directory nor in the bucket",
    "different": "are in the bucket, but not as in the directory",
    "archived": "are in the bucket, without SHA-256, in an archive: restore them, so that they can be compared",
    "failed": "could not be copied",
    "unreadable": "their files cannot be read",
    "unknown": "blobs of the directory that the database does not know: packed away, or another database's",
    "foreign": "files in the directory that are no blobs",
}

#: The words of blobs that the bucket lacks, or does not have as the directory has them.
_TROUBLES = ("missing", "different", "archived", "failed", "unreadable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``migrate``."""
    common.add_arguments(parser)
    parser.add_argument(
        "--from-blob-dir",
        metavar="DIR",
        type=common.directory,
        help="the blob directory, if it is not fallback-blob-dir",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("migrate", lambda: _migrate(arguments))


def _migrate(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    path = arguments.from_blob_dir or config.fallback_blob_dir
    if not path:
        raise zeoconf.ConfigurationError(
            "no blob directory is given: set fallback-blob-dir in the section, or name it with --from-blob-dir"
        )
    source = BlobDirectory(path)
    with closing(served.section.open_bucket(Metrics())) as bucket, Survey(served) as survey:
        common.check_owner(bucket, survey.storage, must_be_ours=True)
        survey.list_bucket(bucket)
        report = survey.run("Migrating", lambda blob: _move(blob, source, bucket), bucket, config.s3_concurrency)
        if not report.early_end:
            _look_for_others(source, survey.inventory, report)
    status = common.conclude("migrate", report, _MEANINGS, _verdict(report), arguments.json)
    return common.EXIT_UNPROVEN if status == common.EXIT_OK and report.objects["unproven"] else status


def _look_for_others(source: BlobDirectory, inventory: Inventory, report: Report) -> None:
    """Add the files of ``source`` that are not blobs of the database to ``report``."""

    def foreign(path: str) -> None:
        with suppress(OSError):  # the file has been deleted since
            report.add(Outcome(b"", b"", "foreign", os.lstat(path).st_size))

    with showing("Looking for other files", "files") as progress:
        for file in progress.over(source.files(foreign)):
            if not inventory.is_named(file.oid, file.tid):
                report.add(Outcome(file.oid, file.tid, "unknown", file.size))


def _verdict(report: Report) -> str:
    counts = report.counts(_TROUBLES, ": ")
    if report.early_end:
        return f"Not finished{counts}."
    if report.troubles:
        return f"Not everything is in the bucket as it should be{counts}."
    return f"All blobs of the database are in the bucket{report.counts(['unproven'], '; ')}."


def _move(blob: Named, source: BlobDirectory, bucket: Bucket) -> Outcome:
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
        return Outcome(oid, tid, _store(blob, path, bucket), size)
    except BlobMismatch:
        trouble = (
            f"{key} in bucket {bucket.name} and {path} differ: the object or the file is damaged, or another database "
            f"uses this s3-prefix. Both were left as they are: delete the object, or replace the file, and run it again"
        )
        return Outcome(oid, tid, "different", size, trouble)
    except BlobDamaged as error:
        trouble = f"{error}. The file {path} matches the ETag of the object: delete the object, and run it again"
        return Outcome(oid, tid, "different", size, trouble)
    except BucketError as error:
        return failure(oid, tid, size, error)
    except BlobNotFound as error:  # deleted since it was found
        return Outcome(oid, tid, "failed", size, f"{error}; run it again")
    except FileNotFoundError:
        return missing  # perhaps packed away since it was found: the end of the pass checks that
    except OSError as error:
        return Outcome(oid, tid, "unreadable", size, f"{path} cannot be read: {error.strerror}")


def _store(blob: Named, path: str, bucket: Bucket) -> str:
    """Upload the file at ``path`` as ``blob``, unless the bucket has it; return the word for the result.

    Waits for S3. Raises BlobMismatch if the object has other bytes, BlobDamaged, BucketError, BlobNotFound, and the
    OSErrors of the file.
    """
    oid, tid = blob.oid, blob.tid
    stored = bucket.find(oid, tid, path) if blob.size is not None else None
    if stored is not None and stored.is_proven:
        return "there"
    if stored is None:
        bucket.put(oid, tid, path)
    else:
        bucket.prove(oid, tid, path)
    try:
        arrived = bucket.find(oid, tid, path)
    except BlobMismatch:
        arrived = None
    if arrived is None:
        raise BucketError(
            f"{bucket.keys.key(oid, tid)} was stored, but bucket {bucket.name} has other bytes or none: run it again"
        )
    if not arrived.is_proven:
        return "unproven"
    return "copied" if stored is None else "proven"
