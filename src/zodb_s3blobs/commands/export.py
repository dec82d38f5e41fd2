"""``zodb-s3blobs export``: copy all blobs into a ZODB blob directory, the way back.

A filestorage with the same Data.fs and that directory as its blob-dir has every revision of every blob again. Blobs
that the directory already has, with the bytes in the bucket, are skipped. The server may run; run the command again for
blobs that it commits meanwhile, at last when the server has been stopped.

Exit status: 0 every blob of the database is in the directory; 1 the work could not be done, or ended early; 3 some
blobs are not.
"""

import argparse
import logging
import os
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .. import fetch
from ..bases.adapter import repeated
from ..blobdir import BlobDirectory, BlobDirectoryError, NewBlobFile
from ..database import zeoconf
from ..database.blob_index import Named
from ..database.survey import Outcome, Report, Survey, failure
from ..fallbacks import Fallbacks, Found
from ..s3.bucket import Bucket, is_of
from ..s3.download import Opened
from ..s3.errors import BlobNotFound, BucketError
from . import common

logger = logging.getLogger(__name__)

_MEANINGS = {
    "copied": "blobs of the database that were copied, and have the right SHA-256 unless fallback-blob-dir had them",
    "unproven": "were copied, but carry no SHA-256 in their bucket: compared by their size or MD5 alone",
    "there": "were in the directory already",
    "missing": "neither in the bucket nor in a fallback",
    "archived": "in an archive: restore them, and run it again",
    "failed": "could not be read, or are damaged in the bucket",
}

#: The words of blobs that the directory lacks.
_TROUBLES = ("missing", "archived", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``export``."""
    common.add_arguments(parser)
    parser.add_argument(
        "--to-blob-dir",
        metavar="DIR",
        type=common.directory,
        required=True,
        help="the blob directory; made if it is missing, or contains nothing but lost+found or tmp",
    )
    common.add_max_bandwidth(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("export", lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    threads = common.limit_bandwidth(served.section, arguments.max_bandwidth)
    with common.opened(served.section) as (bucket, fallbacks), Survey(served) as survey:
        common.check_owner(bucket, survey.storage)
        directory = BlobDirectory.create(arguments.to_blob_dir)
        with closing(directory):
            work = _Copy(survey.storage, bucket, fallbacks, directory)
            report = survey.run("Exporting", work, (bucket, fallbacks), threads)
    return common.conclude("export", report, _MEANINGS, _verdict(report, directory), arguments.json)


def _verdict(report: Report, directory: BlobDirectory) -> str:
    counts = report.counts(_TROUBLES, ": ")
    if report.early_end:
        return f"Not finished{counts}."
    if report.troubles:
        return f"Not all blobs of the database are in {directory.path}{counts}."
    return f"All blobs of the database are in {directory.path}."


@dataclass(frozen=True)
class _Copy:
    """The copy of one blob. Any thread may call."""

    storage: Any
    bucket: Bucket
    fallbacks: Fallbacks
    directory: BlobDirectory

    def __call__(self, blob: Named) -> Outcome:
        """Return the outcome of ``blob``. Waits for S3. Raises BlobDirectoryError."""
        oid, tid = blob.oid, blob.tid
        try:
            path = self.directory.find(oid, tid)
            if path is not None and self._is_right(blob, path):
                return Outcome(oid, tid, "there", os.path.getsize(path))
            file = self.directory.new_file()
            try:
                word, reason = self._fetch(oid, tid, file)
                size = os.path.getsize(file.path)
                file.publish(oid, tid)
            finally:
                file.discard()
        except BlobNotFound as error:
            return Outcome(oid, tid, "missing", trouble=str(error))
        except BucketError as error:
            return failure(oid, tid, 0, error)
        except OSError as error:
            raise BlobDirectoryError(
                f"cannot write to the blob directory {self.directory.path}: {error.strerror}. Make that possible, and "
                f"run the command again"
            ) from None
        return Outcome(oid, tid, word, size, reason=reason)

    def _is_right(self, blob: Named, path: str) -> bool:
        """Return whether the file at ``path`` is the blob, or no bucket has the blob. Waits for S3; BucketError."""
        stored = self.bucket.look_up(blob.oid, blob.tid)
        if stored is None and (found := self.fallbacks.in_s3().look_up(blob.oid, blob.tid)) is not None:
            stored = found[1].stored
        try:
            # If no bucket has the blob, the file may be the only copy.
            if stored is None or is_of(stored, path):
                return True
        except OSError as error:
            logger.warning("%s cannot be read (%s): replacing the file", path, error.strerror)
            return False
        logger.warning("%s differs from the object in the bucket: replacing the file", path)
        return False

    def _fetch(self, oid: bytes, tid: bytes, file: NewBlobFile) -> tuple[str, str]:
        """Write the blob into ``file``; return its word, and the reason of the bucket's failure, or "".

        Raises the errors of `fetch.get`.
        """
        begun: Opened | Found
        reason = ""
        try:
            begun = self.bucket.open(oid, tid)
        except (BlobNotFound, BucketError) as error:
            try:
                begun = self.fallbacks.open(oid, tid, error)
            except BlobNotFound:
                # An undo by zodb-s3blobs 1.2.1 stored no object: the server reads the one that it went back to.
                if (source := repeated(self.storage, oid, tid)) is None:
                    raise
                return self._fetch(oid, source, file)
            reason = getattr(error, "reason", "")
        with closing(begun):
            stored = fetch.get(self.bucket, self.fallbacks, oid, tid, file, begun)
        return "copied" if stored is None or stored.is_proven else "unproven", reason
