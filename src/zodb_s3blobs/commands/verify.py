"""``zodb-s3blobs verify``: prove that the database and the bucket belong together.

Every blob that the database names must be in the bucket, where clients can read it. Every object in the bucket must be
a blob that the database names. Without --checksum, verify compares sizes only, and reads just the blobs whose copies in
cache-dir or fallback-blob-dir have another size. --checksum reads every blob, one that only fallbackbucket has there,
and compares its SHA-256; with --sample it reads only some, and compares the sizes of all. A blob whose object carries
no SHA-256 (another tool copied it, or the service lost its metadata) is compared by its size, or by the MD5 in its
ETag, and is called unproven. Without --repair nothing is changed. The server may run.

A revision that an undo made has no object if the earlier package of this name, 1.2.1, served the database: its blob is
that of an earlier revision. Until the next pack, the database records which one; --repair copies the object of that
revision, and overwrites none.

Exit status, the first of these that applies: 3 blobs are missing, damaged, different or archived, so that clients
cannot read them, or may read wrong bytes; 1 the check could not be completed; 6 clients can read all blobs, but some
are only in fallback-blob-dir or fallbackbucket, or need --repair: the bucket does not have everything; 5 blobs are
unproven; 4 dead objects are in the bucket, which the next pack deletes; 0 all is well. Damaged copies in cache-dir and
fallback-blob-dir are listed, and do not change the status.
"""

import argparse
import os
import re
import stat
import time
import zlib
from dataclasses import dataclass
from typing import Any

from ..bases.adapter import repeated
from ..blobdir import BlobDirectoryError
from ..cache.directory import path_in
from ..database import object_paths, zeoconf
from ..database.blob_index import Named
from ..database.survey import Outcome, Report, Survey, failure
from ..fallbacks import Copy, FallbackDirectory, Fallbacks, Place
from ..garbage.scan import scan_beside_a_server
from ..progress import showing
from ..s3.bucket import Bucket
from ..s3.errors import BlobDamaged, BlobNotFound, BucketError
from . import common

_LISTED = {"good": "in the bucket; not read, so only their sizes are known"}

_CHECKED = {"good": "in the bucket, read, and their SHA-256 is right"}

_SAMPLED = {"unread": "in the bucket; of another part than the one that was read, so only their sizes are known"}

_REPAIRED = {"repaired": "had no object after an undo by zodb-s3blobs 1.2.1, and have a copy of their own now"}

_UNPROVEN = {
    "unproven": "in the bucket without SHA-256: damage may not show, they were compared by their size or MD5 alone. "
    "zodb-s3blobs migrate adds it to those that a blob directory has",
}

_MEANINGS = {
    "marked": "referenced blobs that carry a garbage mark (the database was restored); the next pack removes the mark",
    "fallback": "in fallback-blob-dir alone: zodb-s3blobs migrate copies them",
    "fallbackbucket": "in fallbackbucket alone: zodb-s3blobs migrate copies them",
    "undone": "without an object after an undo by zodb-s3blobs 1.2.1, and read from the revision that it went back to: "
    "zodb-s3blobs verify --repair copies them",
    "missing": "neither in the bucket nor in a fallback",
    "damaged": "with other bytes than were stored, in the bucket, or in fallbackbucket if only that has them",
    "different": "in the bucket without SHA-256, and of another size than in fallback-blob-dir: one of them is damaged",
    "archived": "in an archive, where clients cannot read them: restore them, and end the lifecycle rule or tier that "
    "moved them",
    "failed": "could not be read",
    "dead": "objects that the database does not know: the next pack deletes them",
    "others": "objects that the database does not know: the prefix belongs to another one",
    "retained": "such objects that gc-retention keeps",
    "newer": "objects newer than the last transaction: being committed, or of another or a restored database",
    "unknown": "keys that are no blobs",
    "copy": "files in cache-dir or fallback-blob-dir of another size than their object",
}

#: The words of blobs whose right bytes clients cannot get, or may not get.
_LOST = ("missing", "damaged", "different", "archived")

#: The words that exclude "all is well", the worst first.
_TROUBLES = (*_LOST, "failed", "fallback", "fallbackbucket", "undone", "unproven", "dead", "copy")

#: Word of blobs that clients can read though the bucket lacks them -> the command that copies them.
_CURES = {
    "fallback": "zodb-s3blobs migrate",
    "fallbackbucket": "zodb-s3blobs migrate",
    "undone": "zodb-s3blobs verify --repair",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``verify``."""
    common.add_arguments(parser)
    parser.add_argument("--checksum", action="store_true", help="read every blob and compare its checksum")
    parser.add_argument(
        "--sample",
        metavar="N/T",
        type=_sample,
        help="with --checksum: read only the Nth of T parts of the blobs, but look up all of them. N is at least 1, "
        "and counts from 1 again above T: $(date +%%d)/28 every night reads all of them in each month",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="give revisions that an undo by zodb-s3blobs 1.2.1 made the objects that they lack; before the first pack",
    )
    common.add_max_bandwidth(parser)


def _sample(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError("must be N/T, such as 1/28 for the first of 28 parts")
    parts = int(match[2])
    return (int(match[1]) - 1) % parts + 1, parts


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("verify", lambda: _verify(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.sample and not arguments.checksum:
        raise zeoconf.ConfigurationError(
            "--sample selects the blobs that --checksum reads: add --checksum, or omit --sample"
        )
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    threads = common.limit_bandwidth(served.section, arguments.max_bandwidth)
    with common.opened(served.section) as (bucket, fallbacks), Survey(served) as survey:
        is_ours = common.check_owner(bucket, survey.storage, must_be_ours=arguments.repair)
        scan = scan_beside_a_server(survey.storage, bucket, config.gc_retention)
        with showing("Listing the bucket", "objects") as progress:
            survey.inventory.add_held(blob for blob, _, _ in progress.over(scan.run()))
        look = _Look(
            survey.storage,
            bucket,
            config.cache_dir,
            fallbacks,
            scan.marks,
            arguments.checksum,
            arguments.sample or (1, 1),
            arguments.repair,
        )
        report = survey.run("Verifying", look, (bucket, fallbacks), threads)
        for state in ("dead", "retained", "newer", "unknown"):
            report.objects[state], report.sizes[state] = scan.found[state].objects, scan.found[state].bytes
        if not is_ours:  # seemingly dead blobs and perhaps-only copies belong to the other database
            report.objects["others"] = report.objects.pop("dead") + scan.only_copies.objects
            report.sizes["others"] = report.sizes.pop("dead") + scan.only_copies.bytes
        # Finding paths takes long, so it is left out for the victims of an outage, and for damaged copies.
        of_blobs = [
            one for one in report.troubles if one.word != "copy" and not (report.early_end and one.word == "failed")
        ]
        where = object_paths.find(survey.storage, {outcome.oid for outcome in of_blobs})
    report.show(_meanings(report, arguments), _verdict(report, arguments), arguments.json, where)
    if report.early_end:
        common.complain("verify", report.early_end)
    return _status(report)


def _meanings(report: Report, arguments: argparse.Namespace) -> dict[str, str]:
    meanings = dict(_CHECKED if arguments.checksum else _LISTED)
    if arguments.sample:
        meanings |= _SAMPLED
    if arguments.checksum or report.objects["unproven"]:
        meanings |= _UNPROVEN
    if arguments.repair:
        meanings |= _REPAIRED
    return meanings | _MEANINGS


def _status(report: Report) -> int:
    objects = report.objects
    if any(objects[word] for word in _LOST):
        return common.EXIT_DAMAGED
    if objects["failed"] or report.early_end:
        return common.EXIT_ERROR
    if any(objects[word] for word in _CURES):
        return common.FALLBACK
    if objects["unproven"]:
        return common.EXIT_UNPROVEN
    return common.EXIT_GARBAGE if objects["dead"] else common.EXIT_OK


def _verdict(report: Report, arguments: argparse.Namespace) -> str:
    status, counts = _status(report), report.counts(_TROUBLES, ": ")
    if report.early_end:
        return f"Not finished{counts}."
    if status in (common.EXIT_DAMAGED, common.EXIT_ERROR):
        return f"Not well{counts}."
    if status == common.FALLBACK:
        cures = list(dict.fromkeys(cure for word, cure in _CURES.items() if report.objects[word]))
        copy = "copies" if len(cures) == 1 else "copy"
        return f"All blobs can be read, but the bucket lacks some, which {' and '.join(cures)} {copy}{counts}."
    if status == common.EXIT_UNPROVEN:
        return f"No damage is known, but not all blobs carry a SHA-256{counts}."
    basis = _basis(arguments)
    if status == common.EXIT_GARBAGE:
        return f"All blobs are well{basis}; the next pack has work{counts}."
    if counts:
        return f"All blobs are well{basis}, but not all copies of them{counts}."
    return f"All is well{basis}."


def _basis(arguments: argparse.Namespace) -> str:
    if not arguments.checksum:
        return " as far as sizes tell (--checksum reads the blobs)"
    return " as far as part {} of {} tells, which was read".format(*arguments.sample) if arguments.sample else ""


@dataclass(frozen=True)
class _Look:
    """The verification of one blob. ``marks``: those of the last pack; ``sample``: the part to read, as N of T.

    ``repair``: whether to give revisions that an undo made the objects that they lack.

    Only the database and the bucket decide the outcome; a copy of another size only causes a closer look. Any thread
    may call.
    """

    storage: Any
    bucket: Bucket
    cache_dir: str
    fallbacks: Fallbacks
    marks: dict[bytes, int]
    checksum: bool
    sample: tuple[int, int]
    repair: bool

    def __call__(self, blob: Named) -> Outcome:
        """Return the outcome of ``blob``. Waits for S3."""
        oid, tid = blob.oid, blob.tid
        cached = _regular_file(path_in(self.cache_dir, oid, tid))
        try:
            place, kept = self._in_fallback(blob) or (None, None)
        except (BlobDirectoryError, BucketError) as error:
            if blob.size is None:
                trouble, reason = f"{self._missing(blob)}; {error}", getattr(error, "reason", "")
                return Outcome(oid, tid, "failed", trouble=trouble, reason=reason)
            place = kept = None
        advice = _advice(blob, cached or (kept if blob.size is not None else None))
        try:
            if blob.size is not None:
                return self._in_bucket(blob, blob.size, cached, kept, advice)
            if place is not None and kept is not None:
                return self._elsewhere(blob, place, kept)
            return self._undone(blob) or self._lost(blob, advice)
        except BlobNotFound as error:
            return Outcome(oid, tid, "missing", trouble=f"{error}{advice}")
        except BlobDamaged as error:
            return Outcome(oid, tid, "damaged", blob.size or 0, f"{error}{advice}")
        except BucketError as error:
            return failure(oid, tid, blob.size or 0, error, advice)

    def _in_fallback(self, blob: Named) -> tuple[Place, Copy] | None:
        """Return which fallback has ``blob``, and where. One in S3 is asked only for what the bucket lacks."""
        asked = self.fallbacks if blob.size is None else self.fallbacks.directories()
        return asked.look_up(blob.oid, blob.tid)

    def _elsewhere(self, blob: Named, place: Place, kept: Copy) -> Outcome:
        """Return the outcome of a ``blob`` that only the fallback ``place`` has. Raises the errors of `Bucket.verify`.

        Nothing tells whether a file of the directory is right.
        """
        if isinstance(place, FallbackDirectory):
            return Outcome(blob.oid, blob.tid, "fallback", kept.size)
        if self.checksum and self._is_in_sample(blob):
            place.verify(blob.oid, blob.tid)
        return Outcome(blob.oid, blob.tid, "fallbackbucket", kept.size)

    def _missing(self, blob: Named) -> str:
        return f"{self.bucket.keys.key(blob.oid, blob.tid)} is not in bucket {self.bucket.name}"

    def _undone(self, blob: Named) -> Outcome | None:
        """Return the outcome of a ``blob`` that repeats an earlier revision that is there; None if it does not.

        Raises BlobNotFound, BucketError and BlobDirectoryError.
        """
        source = repeated(self.storage, blob.oid, blob.tid)
        if source is None:
            return None
        stored = self.bucket.look_up(blob.oid, source)
        if stored is not None:
            if self.repair:
                self._copy(blob, source, stored.size)
                return Outcome(blob.oid, blob.tid, "repaired", stored.size)
            where, size = self.bucket.keys.key(blob.oid, source), stored.size
        elif (found := self.fallbacks.look_up(blob.oid, source)) is not None:
            where, size = f"{found[1].where}, which zodb-s3blobs migrate copies first", found[1].size
        else:
            return None
        return Outcome(blob.oid, blob.tid, "undone", size, f"{self._missing(blob)}; its bytes are those of {where}")

    def _copy(self, blob: Named, source: bytes, size: int) -> None:
        """Copy the object of the revision ``source``, of ``size`` bytes, to ``blob``, unless ``blob`` has one now."""
        arrived = self.bucket.look_up(blob.oid, blob.tid)
        if arrived is None:
            self.bucket.copy(blob.oid, source, blob.tid)
            arrived = self.bucket.look_up(blob.oid, blob.tid)
        if arrived is None or arrived.size != size:
            key = self.bucket.keys.key(blob.oid, blob.tid)
            raise BucketError(
                f"{key} should be a copy of {self.bucket.keys.key(blob.oid, source)}, but bucket {self.bucket.name} "
                f"does not have it with the same size: compare both objects"
            )

    def _lost(self, blob: Named, advice: str) -> Outcome:
        """Return the outcome of a ``blob`` that is nowhere."""
        if blob.candidates:
            keys = ", ".join(self.bucket.keys.key(blob.oid, tid) for tid in blob.candidates)
            advice += (
                f"; if an undo by zodb-s3blobs 1.2.1 made this revision, its bytes are those of one of {keys}, but the "
                f"pack since then removed the record of which one: compare them, and copy the right one to the missing "
                f"key"
            )
        return Outcome(blob.oid, blob.tid, "missing", trouble=f"{self._missing(blob)}{advice}")

    def _in_bucket(self, blob: Named, size: int, cached: Copy | None, kept: Copy | None, advice: str) -> Outcome:
        """Return the outcome of ``blob``, whose object has ``size`` bytes. Raises the errors of `Bucket.verify`."""
        oid, tid = blob.oid, blob.tid
        key = self.bucket.keys.key(oid, tid)
        if blob.archived and _is_restored_for_a_while(key, size, self.bucket):
            trouble = (
                f"{key} is archived, and its restored copy can be read until it expires. Copy it to another storage "
                f"class, and end the lifecycle rule{advice}"
            )
            return Outcome(oid, tid, "archived", size, trouble)
        other_cached = cached if cached is not None and cached.size != size else None
        other_kept = kept if kept is not None and kept.size != size else None
        is_read = bool(other_cached or other_kept) or (self.checksum and self._is_in_sample(blob))
        if is_read and not self.bucket.verify(oid, tid).is_proven:
            return _of_unproven(blob, f"{key} has {size} bytes and no SHA-256", other_cached, other_kept)
        copies = []
        if other_cached is not None:
            trouble = "the file is damaged. Delete it: the server fetches the blob again"
            copies.append(_of_copy(blob, key, other_cached, trouble))
        if other_kept is not None:
            trouble = "trust the object. The file is damaged, or of another database"
            copies.append(_of_copy(blob, key, other_kept, trouble))
        if (dead_since := self.marks.get(oid + tid)) is not None:
            day = time.strftime("%Y-%m-%d", time.gmtime(dead_since))
            trouble = f"{key} exists; the next pack removes its mark of {day}"
            return Outcome(oid, tid, "marked", size, trouble, copies=tuple(copies))
        word = "good" if is_read or not self.checksum else "unread"
        return Outcome(oid, tid, word, size, copies=tuple(copies))

    def _is_in_sample(self, blob: Named) -> bool:
        part, parts = self.sample
        return zlib.crc32(blob.oid + blob.tid) % parts == part - 1


def _of_unproven(blob: Named, fact: str, cached: Copy | None, kept: Copy | None) -> Outcome:
    """Return the outcome of a ``blob`` whose object carries no SHA-256; ``cached``, ``kept``: copies of other sizes."""
    size = blob.size or 0
    which = "one of the two is damaged, and nothing shows which: compare both with a backup"
    if kept is not None:
        trouble = f"{fact}, but {kept.where} has {kept.size} bytes: {which}"
        return Outcome(blob.oid, blob.tid, "different", size, trouble)
    trouble = f"{fact}, but {cached.where} in cache-dir has {cached.size} bytes: {which}" if cached is not None else ""
    return Outcome(blob.oid, blob.tid, "unproven", size, trouble)


def _of_copy(blob: Named, key: str, copy: Copy, trouble: str) -> Outcome:
    """Return the outcome of a ``copy`` whose size differs from that of the object, which is proven."""
    reason = f"{copy.where} has {copy.size} bytes, but {key} has {blob.size} and the right SHA-256: {trouble}"
    return Outcome(blob.oid, blob.tid, "copy", copy.size, reason)


def _advice(blob: Named, copy: Copy | None) -> str:
    """Return the advice about a ``copy`` of a ``blob`` that the bucket does not deliver; "" without a copy."""
    if copy is None:
        return ""
    size = f" of {copy.size} bytes" if copy.size != blob.size else ""
    return f"; {copy.where} is a copy{size}"


def _regular_file(path: str) -> Copy | None:
    """Return the regular file at ``path``; None if it is missing, unreadable, or not a regular file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return Copy(path, found.st_size) if stat.S_ISREG(found.st_mode) else None


def _is_restored_for_a_while(key: str, size: int, bucket: Bucket) -> bool:
    """Return whether an object of an archive class can be read from a restored copy that expires.

    Raises BucketError with the reason "archived" if the object must be restored first. Some services do not archive
    objects of such a class: then the object can be read like any other.
    """
    first_byte = {"Range": "bytes=0-0"} if size else {}
    return "Restore" in bucket.ask("get_object", Key=key, **first_byte, **bucket.read_options)
