"""``zodb-s3blobs migrate``: copy the blobs of a ZODB blob directory, or of another bucket, into the bucket.

It copies from fallback-blob-dir and fallbackbucket, whichever the section has, or from the directory that
--from-blob-dir names. Every revision that the database still has is copied, and looked up in the bucket afterwards:
size and SHA-256 must be right. Blobs that the bucket already has are skipped after that check. An object without
SHA-256 (another tool copied it, or the service lost its metadata) is read; if it has the bytes of the source, it is
stored again, with its SHA-256. Where both buckets are at one service, the service copies, if it lets the credentials of
the bucket read the other one; otherwise each blob is downloaded to the temporary directory and uploaded. The source is
only read. The server may run; with the fallback in its section it serves the blobs that have not been copied yet.

Exit status: 0 every blob of the database is in the bucket; 1 the work could not be done, or ended early; 3 some blobs
are not, or not as in the source; 5 they are, but the service does not keep their SHA-256.
"""

import argparse
import logging
import os
import tempfile
from contextlib import ExitStack, closing, suppress
from typing import Any

from ..bases.adapter import repeated
from ..blobdir import BlobDirectory
from ..database import zeoconf
from ..database.blob_index import Inventory, Named
from ..database.survey import Outcome, Report, Survey, failure
from ..fallbacks import Copy, FallbackBucket, FallbackDirectory, Fallbacks, Place
from ..metrics import Metrics
from ..places import place_of
from ..progress import showing
from ..s3.bucket import Bucket
from ..s3.download import Stored
from ..s3.errors import BlobDamaged, BlobMismatch, BlobNotFound, BucketError
from . import common

logger = logging.getLogger(__name__)

_MEANINGS = {
    "copied": "blobs of the database that were copied and checked",
    "there": "were in the bucket already, as in the source",
    "proven": "were in the bucket already, but without SHA-256: compared with the source, and stored again with it",
    "unproven": "are in the bucket as in the source, but the service does not keep their SHA-256",
    "new": "are in the bucket alone: committed since the server uses it",
    "missing": "are neither in the source nor in the bucket",
    "different": "are in the bucket, but not as in the source",
    "archived": "are in an archive, where they cannot be read: restore them, and run it again",
    "failed": "could not be copied",
    "unreadable": "their files cannot be read",
    "unknown": "blobs of the directory that the database does not know: packed away, or another database's",
    "foreign": "files in the directory that are no blobs",
}

#: The words of blobs that the bucket lacks, or does not have as the source has them.
_TROUBLES = ("missing", "different", "archived", "failed", "unreadable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``migrate``."""
    common.add_arguments(parser)
    parser.add_argument(
        "--from-blob-dir",
        metavar="DIR",
        type=common.directory,
        help="the blob directory, if the blobs are not to come from fallback-blob-dir or fallbackbucket",
    )
    common.add_max_bandwidth(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("migrate", lambda: _migrate(arguments))


def _migrate(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    threads = common.limit_bandwidth(served.section, arguments.max_bandwidth)
    metrics = Metrics()
    with ExitStack() as stack:
        bucket = stack.enter_context(closing(served.section.open_bucket(metrics)))
        if arguments.from_blob_dir:
            fallbacks = Fallbacks([FallbackDirectory(BlobDirectory(arguments.from_blob_dir), metrics)])
        else:
            fallbacks = served.section.open_fallbacks(bucket, metrics)
        stack.callback(fallbacks.close)
        if not fallbacks:
            raise zeoconf.ConfigurationError(
                "no blob directory is given: set fallback-blob-dir in the section, or name it with --from-blob-dir. To "
                "copy from another bucket: add a section <fallbackbucket>"
            )
        fallbacks.probe()
        survey = stack.enter_context(Survey(served))
        common.check_owner(bucket, survey.storage, must_be_ours=True)
        survey.list_bucket(bucket)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3blobs-migrate-"))
        work = _Move(survey.storage, bucket, fallbacks, directory)
        report = survey.run("Migrating", work, (bucket, fallbacks), threads)
        if not report.early_end:
            for place in fallbacks.places:
                if isinstance(place, FallbackDirectory):
                    _look_for_others(place.directory, survey.inventory, report)
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


class _Move:
    """The copy of one blob from the first of ``fallbacks`` that has it. Any thread may call.

    ``storage`` names the blobs; ``directory``: for temporary files.
    """

    def __init__(self, storage: Any, bucket: Bucket, fallbacks: Fallbacks, directory: str) -> None:
        self._storage = storage
        self._bucket = bucket
        self._fallbacks = fallbacks
        self._directory = directory
        #: The fallbacks from which the service can copy by itself; it may still refuse to.
        self._inside = {
            place
            for place in fallbacks.places
            if isinstance(place, FallbackBucket) and place_of(place.bucket)[0] == place_of(bucket)[0]
        }

    def __call__(self, blob: Named) -> Outcome:
        """Return the outcome of ``blob``. Waits for S3. Raises BlobDirectoryError, and OSError of a temporary file."""
        oid, tid = blob.oid, blob.tid
        try:
            found = self._fallbacks.look_up(oid, tid)
        except BucketError as error:
            return failure(oid, tid, blob.size or 0, error)
        if found is not None:
            return self._move(blob, *found)
        return Outcome(oid, tid, "new", blob.size) if blob.size is not None else self._missing(blob)

    def _missing(self, blob: Named) -> Outcome:
        name = blob.oid, blob.tid
        sources = " nor ".join(
            f"{place.bucket.keys.key(*name)} in bucket {place.bucket.name}"
            if isinstance(place, FallbackBucket)
            else f"a file in {place.directory.path}"
            for place in self._fallbacks.places
        )
        trouble = f"neither {self._bucket.keys.key(*name)} nor {sources}"
        if repeated(self._storage, *name) is not None:
            trouble += (
                "; an undo made it, for which zodb-s3blobs 1.2.1 stored no object: zodb-s3blobs verify --repair gives "
                "it one"
            )
        return Outcome(*name, "missing", trouble=trouble)

    def _move(self, blob: Named, place: Place, copy: Copy) -> Outcome:
        oid, tid = blob.oid, blob.tid
        key, size, where = self._bucket.keys.key(oid, tid), copy.size, copy.where
        kind = "file" if isinstance(place, FallbackDirectory) else "source"
        try:
            word = (
                self._from_bucket(blob, place, copy) if isinstance(place, FallbackBucket) else self._store(blob, where)
            )
            return Outcome(oid, tid, word, size)
        except BlobMismatch:
            trouble = (
                f"{key} in bucket {self._bucket.name} and {where} differ: the object or the {kind} is damaged, or "
                f"another database uses this s3-prefix. Both were left as they are: delete the object, or replace the "
                f"{kind}, and run it again"
            )
            return Outcome(oid, tid, "different", size, trouble)
        except BlobDamaged as error:
            trouble = f"{error}. The {kind} {where} matches the ETag of the object: delete the object, and run it again"
            return Outcome(oid, tid, "different", size, trouble)
        except BucketError as error:
            return failure(oid, tid, size, error)
        except BlobNotFound as error:  # deleted since it was found
            return Outcome(oid, tid, "failed", size, f"{error}; run it again")
        except OSError as error:
            if isinstance(place, FallbackBucket):
                raise  # the error of a temporary file
            if isinstance(error, FileNotFoundError):
                return self._missing(blob)  # perhaps packed away since it was found: the end of the pass checks that
            return Outcome(oid, tid, "unreadable", size, f"{where} cannot be read: {error.strerror}")

    def _from_bucket(self, blob: Named, place: FallbackBucket, copy: Copy) -> str:
        """Copy ``blob`` from ``place``, unless the bucket has it; return the word for the result. Errors: `_store`."""
        oid, tid = blob.oid, blob.tid
        assert copy.stored is not None
        there = self._bucket.look_up(oid, tid) if blob.size is not None else None
        if there is not None and there.is_proven:
            # Without a SHA-256 of the source, which only a download could give, the sizes are compared.
            if there.size != copy.size or (copy.stored.is_proven and there.digest != copy.stored.digest):
                raise BlobMismatch(f"{self._bucket.keys.key(oid, tid)} and {copy.where} differ")
            return "there"
        if there is None and copy.stored.is_proven and self._has_copied_inside(oid, tid, place, copy.stored):
            return "copied"
        file = common.new_file(f"{self._directory}/{oid.hex()}.{tid.hex()}")
        try:
            try:
                place.get(oid, tid, file)
            except BlobDamaged as error:
                raise BucketError(str(error), error.code, error.reason) from None
            return self._store(blob, file.path)
        finally:
            os.unlink(file.path)

    def _has_copied_inside(self, oid: bytes, tid: bytes, place: FallbackBucket, stored: Stored) -> bool:
        """Let the service copy the object with the metadata ``stored``; return False if it cannot, or may not.

        Waits for S3; BucketError.
        """
        if place not in self._inside:
            return False
        try:
            self._bucket.copy_from(place.bucket, oid, tid, stored)
            arrived = self._bucket.look_up(oid, tid)
        except BlobNotFound:
            return False
        except BucketError as error:
            if error.reason not in ("auth", "request"):
                raise
            refusal = str(error)
        else:
            if arrived == stored:
                return True
            refusal = f"{self._bucket.keys.key(oid, tid)} is a copy without the size and the SHA-256 of its source"
        if place in self._inside:
            logger.warning("%s. Blobs are downloaded and uploaded instead", refusal)
            self._inside.discard(place)
        return False

    def _store(self, blob: Named, path: str) -> str:
        """Upload the file at ``path`` as ``blob``, unless the bucket has it; return the word for the result.

        Waits for S3. Raises BlobMismatch if the object has other bytes, BlobDamaged, BucketError, BlobNotFound, and the
        OSErrors of the file.
        """
        oid, tid = blob.oid, blob.tid
        bucket = self._bucket
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
                f"{bucket.keys.key(oid, tid)} was stored, but bucket {bucket.name} has other bytes or none: run it "
                f"again"
            )
        if not arrived.is_proven:
            return "unproven"
        return "copied" if stored is None else "proven"
