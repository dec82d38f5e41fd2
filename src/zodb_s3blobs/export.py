"""``zodb-s3blobs export``: copy all blobs into a ZODB blob directory, the way back.

A filestorage with the same Data.fs and that directory as its blob-dir has every revision of every blob again. What is
in the directory already, and is the same as in the bucket, is skipped. The server may run; what it commits meanwhile,
the same command fetches later, best when the server has been stopped.
"""

import argparse
import logging
import os
from contextlib import closing

from . import command, fetch, zeoconf
from .blobdir import BlobDirectory, BlobDirectoryError
from .bucket import BlobNotFound, Bucket, BucketError, Different
from .inventory import Named
from .metrics import Metrics
from .survey import Outcome, Survey

logger = logging.getLogger(__name__)

_MEANINGS = {
    "copied": "blobs of the database that were copied and checked",
    "there": "blobs that were in the directory already",
    "missing": "blobs of the database that neither the bucket nor fallback-blob-dir has",
    "failed": "blobs that could not be read",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``export``."""
    command.add_arguments(parser)
    parser.add_argument(
        "--to-blob-dir", metavar="DIR", required=True, help="the blob directory; made if there is nothing yet"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it: 0 if every blob of the database is in the directory now."""
    return command.run("export", lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    fallback = served.section.open_fallback()
    with closing(served.section.open_bucket(Metrics())) as bucket, Survey(served) as survey:
        directory = BlobDirectory.create(arguments.to_blob_dir)
        report = survey.run("Exporting", lambda blob: _copy(blob, bucket, fallback, directory), config.s3_concurrency)
    report.show(_MEANINGS, arguments.json)
    report.check_complete()
    return command.DAMAGED if report.troubles else command.WELL


def _copy(blob: Named, bucket: Bucket, fallback: BlobDirectory | None, directory: BlobDirectory) -> Outcome:
    oid, tid = blob.oid, blob.tid
    try:
        path = directory.find(oid, tid)
        if path is not None and _is_right(blob, path, bucket):
            return Outcome(oid, tid, "there", os.path.getsize(path))
        file = directory.new_file()
        try:
            fetch.get(bucket, fallback, oid, tid, file)
            size = os.path.getsize(file.path)
            file.publish(oid, tid)
        finally:
            file.discard()
    except BlobNotFound as error:
        return Outcome(oid, tid, "missing", trouble=str(error))
    except BucketError as error:
        return Outcome(oid, tid, "failed", trouble=str(error))
    except OSError as error:
        raise BlobDirectoryError(
            f"cannot write to the blob directory {directory.path}: {error.strerror}. Afterwards, run it again"
        ) from None
    return Outcome(oid, tid, "copied", size)


def _is_right(blob: Named, path: str, bucket: Bucket) -> bool:
    """Whether the file is the blob, as far as the bucket can tell."""
    try:
        bucket.has(blob.oid, blob.tid, path)  # where it has none, the directory is the only one to have it
    except Different:
        logger.warning("%s is not what the bucket has, and is replaced", path)
        return False
    return True
