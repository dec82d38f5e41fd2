"""``zodb-s3blobs warm``: fetch blobs into the cache before clients ask, after a move or a lost disk.

It fetches the current blobs of the database, the newest first, as many as the cache has room for. It puts them into
cache-dir/warm; the running server takes them over within seconds, and a stopped one when it starts. Warmed blobs are
the first to be evicted, and nothing is evicted because of them. What the cache has is not fetched again.

Exit status: 0 all was fetched that the cache has room for; 1 the work could not be done, or ended early; 3 some blobs
are missing, damaged or archived.
"""

import argparse
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ZODB.POSException import POSKeyError

from .. import fetch
from ..bases.adapter import repeated
from ..cache.directory import blob_files, block_of, cannot_write, path_in, refuse_foreign
from ..cache.index import on_disk
from ..cache.warmed import WarmFolder
from ..database import object_paths, zeoconf
from ..database.blob_index import Named
from ..database.survey import Outcome, Report, Survey, failure
from ..digest import SHA256, digest_of
from ..fallbacks import Fallbacks
from ..revision import Revision
from ..s3.bucket import Bucket
from ..s3.errors import BlobNotFound, BucketError
from . import common

_MEANINGS = {
    "fetched": "blobs that were fetched, for the server to take over",
    "there": "were in the cache already, or wait there for the server",
    "left": "larger than the room that the cache has left",
    "elsewhere": "not in the bucket, but clients can read them: zodb-s3blobs verify tells why",
    "missing": "neither in the bucket nor in a fallback",
    "archived": "in an archive: restore them, and run it again",
    "failed": "could not be read, or are damaged in the bucket",
}

#: The words of blobs that cannot be warmed.
_TROUBLES = ("missing", "archived", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``warm``."""
    common.add_arguments(parser)
    parser.add_argument(
        "--under",
        metavar="PATH",
        help="only blobs of the object at this path, and of those below it: as verify shows it, such as /app/folder",
    )
    parser.add_argument(
        "--size",
        metavar="SIZE",
        type=common.size,
        help="fill the cache up to this size, such as 20GB; never above cache-size",
    )
    common.add_max_bandwidth(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("warm", lambda: _warm(arguments))


def _warm(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    config = served.section.config
    threads = common.limit_bandwidth(served.section, arguments.max_bandwidth)
    limit = min(config.cache_size, arguments.size or config.cache_size)
    with common.opened(served.section) as (bucket, fallbacks), Survey(served) as survey:
        common.check_owner(bucket, survey.storage)
        survey.list_bucket(bucket)
        blobs = _current(survey)
        if arguments.under is not None:
            blobs = iter(_under(arguments.under, list(blobs), survey.storage))
        cache = _Cache.open(config.cache_dir)
        plan = _Plan.make(blobs, cache, limit)
        work = _Fetch(survey.storage, bucket, fallbacks, cache, plan.room)
        report = survey.run("Fetching", work, (bucket, fallbacks), threads, plan.blobs)
        report.objects.update(plan.others.objects)
        report.sizes.update(plan.others.sizes)
    return common.conclude("warm", report, _MEANINGS, _verdict(report, limit), arguments.json)


def _verdict(report: Report, limit: int) -> str:
    counts = report.counts(_TROUBLES, ": ")
    if report.early_end:
        return f"Not finished{counts}."
    if report.troubles:
        return f"Not all blobs could be fetched{counts}."
    if report.objects["left"]:
        return f"The cache has no room for more below {limit:,} bytes: {report.counts(['left'])}."
    elsewhere = report.counts(["elsewhere"], ", but for ")
    return f"The cache has all of these blobs, or gets them from the server within seconds{elsewhere}."


def _current(survey: Survey) -> Iterator[Named]:
    """Yield the blobs of the current revisions, the newest first."""
    for blob in survey.inventory.newest():
        try:
            if survey.storage.getTid(blob.oid) == blob.tid:
                yield blob
        except POSKeyError:
            pass  # its creation was undone


def _under(path: str, blobs: list[Named], storage: Any) -> list[Named]:
    """Return those of ``blobs`` whose object is at ``path`` or below it."""
    top = path.rstrip("/")
    paths = object_paths.find(storage, {blob.oid for blob in blobs})
    found = [blob for blob in blobs if f"{paths.get(blob.oid, '')}/".startswith(f"{top}/")]
    if not found:
        raise zeoconf.ConfigurationError(
            f"there is no blob at {path} or below it: write the path as zodb-s3blobs verify shows paths"
        )
    return found


@dataclass
class _Cache:
    """The cache directory at ``path``, read beside its server; ``size``: the bytes of disk that its files take.

    ``waiting``: the sizes of the blobs that wait for the server.
    """

    path: str
    folder: WarmFolder
    block: int
    size: int
    waiting: dict[Revision, int]

    @classmethod
    def open(cls, path: str) -> "_Cache":
        """Return the cache at ``path``, made if it is missing. Raises CacheDirectoryError and CacheError."""
        folder = WarmFolder(path)
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            refuse_foreign(Path(path))
            folder.make()
            cache = cls(path, folder, block_of(path), 0, {})
            # The folder first: what the server takes over meanwhile counts twice, and is not overlooked.
            for file in folder.files():
                if (size := _size_of(file.path)) is not None:
                    cache.waiting[file.name] = size
                    cache.size += on_disk(size, cache.block)
            try:
                for entry in blob_files(path):
                    cache.size += on_disk(_size_of(entry.path) or 0, cache.block)
            except FileNotFoundError:
                pass  # no server has used it yet
        except OSError as error:
            raise cannot_write(path, error) from error
        return cache

    def size_of(self, blob: Named) -> int | None:
        """Return the size of the blob's file; None if the cache does not have it."""
        size = self.waiting.get(Revision(blob.oid, blob.tid))
        return size if size is not None else _size_of(path_in(self.path, blob.oid, blob.tid))


def _size_of(path: str) -> int | None:
    """Return the size of the regular file at ``path``; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class _Room:
    """The ``size`` in bytes that the cache still has. Any thread may call."""

    def __init__(self, size: int, block: int) -> None:
        self._size = size
        self._block = block
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Take the room of a file of ``size`` bytes; return False if there is not so much."""
        needed = on_disk(size, self._block)
        with self._lock:
            if needed > self._size:
                return False
            self._size -= needed
            return True


@dataclass
class _Plan:
    """The ``blobs`` to fetch, and the report of the ``others``.

    ``room``: what is left for the blobs that the bucket lacks, whose sizes are not known yet.
    """

    blobs: list[Named]
    others: Report
    room: _Room

    @classmethod
    def make(cls, blobs: Iterator[Named], cache: _Cache, limit: int) -> "_Plan":
        """Choose of ``blobs`` those that the ``cache`` has room for below ``limit`` bytes, the first ones first."""
        plan = cls([], Report(), _Room(limit - cache.size, cache.block))
        for blob in blobs:
            size = cache.size_of(blob)
            if size is not None:
                plan.others.add(Outcome(blob.oid, blob.tid, "there", size))
            elif blob.size is None or plan.room.take(blob.size):
                plan.blobs.append(blob)
            else:
                plan.others.add(Outcome(blob.oid, blob.tid, "left", blob.size))
        return plan


@dataclass(frozen=True)
class _Fetch:
    """The download of one blob. Any thread may call."""

    storage: Any
    bucket: Bucket
    fallbacks: Fallbacks
    cache: _Cache
    room: _Room

    def __call__(self, blob: Named) -> Outcome:
        """Return the outcome of ``blob``. Waits for S3. Raises BlobDirectoryError."""
        oid, tid = blob.oid, blob.tid
        found = None
        try:
            if blob.size is None:
                lacking = BlobNotFound(f"{self.bucket.keys.key(oid, tid)} is not in bucket {self.bucket.name}")
                found = self.fallbacks.open(oid, tid, lacking)
                if not self.room.take(found.size):
                    return Outcome(oid, tid, "left", found.size)
            file = self.cache.folder.new_file()
            try:
                stored = fetch.get(self.bucket, self.fallbacks, oid, tid, file, found)
                size = os.path.getsize(file.path)
                digest = stored.sha256_of(file.path) if stored is not None else digest_of(SHA256, file.path)
                file.publish(Revision(oid, tid), digest)
            finally:
                file.discard()
        except BlobNotFound as error:
            if self._repeats(blob):
                return Outcome(oid, tid, "elsewhere")
            return Outcome(oid, tid, "missing", trouble=str(error))
        except BucketError as error:
            return failure(oid, tid, blob.size or 0, error)
        except OSError as error:
            raise cannot_write(self.cache.path, error) from error
        finally:
            if found is not None:
                found.close()
        return Outcome(oid, tid, "fetched", size)

    def _repeats(self, blob: Named) -> bool:
        """Return whether ``blob`` repeats an earlier revision that the bucket has: an undo by zodb-s3blobs 1.2.1."""
        source = repeated(self.storage, blob.oid, blob.tid) if blob.size is None else None
        return source is not None and self.bucket.look_up(blob.oid, source) is not None
