"""The fallbacks: places with blobs that the bucket does not have, or cannot deliver. They are only read.

``fallback-blob-dir`` is a directory, ``<fallbackbucket>`` a prefix of another bucket. Both have the bytes of the same
revisions, so that it does not matter who delivers a blob. Any thread may call. Every method waits for the disk or for
S3, and raises BlobDirectoryError or BucketError if the fallback cannot be read.
"""

import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .blobdir import BlobDirectory, BlobDirectoryError
from .metrics import Metrics
from .revision import Revision
from .s3.download import Downloads, Opened, Stored, Target
from .s3.errors import BlobNotFound, BucketError

logger = logging.getLogger(__name__)

#: The name of the section of the bucket, for messages.
SECTION = "<fallbackbucket>"


@dataclass(frozen=True)
class Found:
    """A blob that a fallback has, opened; ``size`` in bytes. The caller calls ``close``.

    ``copy`` writes the blob into an empty file, verified as far as the fallback has a checksum. It returns the
    metadata of the object, None if the fallback is a directory, and raises the errors of the fallback.
    """

    size: int
    copy: Callable[[Target], Stored | None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Copy:
    """A blob that a fallback has, looked up; ``where``: its path or its key, for messages; ``size`` in bytes.

    ``stored``: the metadata of the object, None if the blob is the file ``where``.
    """

    where: str
    size: int
    stored: Stored | None = None


class Fallback(ABC):
    """One place. ``metrics``: where its reads are counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._fails = False

    @abstractmethod
    def open(self, oid: bytes, tid: bytes) -> Found | None:
        """Return blob (oid, tid), opened; None if the fallback does not have it."""

    @abstractmethod
    def look_up(self, oid: bytes, tid: bytes) -> Copy | None:
        """Return where blob (oid, tid) is; None if the fallback does not have it."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Count and log failures of the body, which reads the fallback ``name``. The log has the first one in a row."""
        try:
            yield
        except (BlobDirectoryError, BucketError) as error:
            self._metrics.fallback_failures.inc()
            if not self._fails:
                self._fails = True
                logger.warning("Could not read from a fallback: %s", error)
            raise
        if self._fails:
            self._fails = False
            logger.warning("%s can be read again", name)


class FallbackDirectory(Fallback):
    """The blob ``directory`` as a fallback."""

    def __init__(self, directory: BlobDirectory, metrics: Metrics) -> None:
        super().__init__(metrics)
        self.directory = directory

    def open(self, oid: bytes, tid: bytes) -> Found | None:
        """Return blob (oid, tid); None if the directory does not have it."""
        copy = self.look_up(oid, tid)
        return Found(copy.size, functools.partial(self._copy, oid, tid), lambda: None) if copy is not None else None

    def _copy(self, oid: bytes, tid: bytes, file: Target) -> None:
        with self._reading("fallback-blob-dir"):
            if not self.directory.copy(oid, tid, file):
                raise BlobNotFound(f"The file of the blob in {self.directory.path} was deleted while it was to be read")
        self._metrics.fallback_reads.inc()

    def look_up(self, oid: bytes, tid: bytes) -> Copy | None:
        """Return the file of blob (oid, tid); None if the directory does not have it."""
        with self._reading("fallback-blob-dir"):
            path = self.directory.find(oid, tid)
            try:
                return Copy(path, os.path.getsize(path)) if path is not None else None
            except FileNotFoundError:
                return None  # packed away meanwhile
            except OSError as error:
                raise BlobDirectoryError(f"the blob file {path} cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Close the directory."""
        self.directory.close()


class FallbackBucket(Fallback):
    """The other ``bucket`` as a fallback. No method of a `Downloads` writes or deletes."""

    def __init__(self, bucket: Downloads, metrics: Metrics) -> None:
        super().__init__(metrics)
        self.bucket = bucket

    def open(self, oid: bytes, tid: bytes) -> Found | None:
        """Return blob (oid, tid), opened with one request; None if the bucket does not have it."""
        with self._reading_bucket():
            try:
                opened = self.bucket.open(oid, tid)
            except BlobNotFound:
                return None
        copy = functools.partial(self._copy, oid, tid, opened)
        return Found(opened.stored.size, copy, opened.close)

    def _copy(self, oid: bytes, tid: bytes, opened: Opened, file: Target) -> Stored:
        with self._reading_bucket():
            stored = self.bucket.get(oid, tid, file, opened)
        self._metrics.fallback_reads.inc()
        return stored

    def get(self, oid: bytes, tid: bytes, file: Target) -> Stored:
        """Write blob (oid, tid) into the empty ``file``; return the metadata of its object. Raises BlobNotFound too."""
        with self._reading_bucket():
            return self.bucket.get(oid, tid, file)

    def verify(self, oid: bytes, tid: bytes) -> None:
        """Read blob (oid, tid) and check it, without keeping it. Raises BlobNotFound too."""
        with self._reading_bucket():
            self.bucket.verify(oid, tid)

    def look_up(self, oid: bytes, tid: bytes) -> Copy | None:
        """Return the key of blob (oid, tid); None if the bucket does not have it."""
        with self._reading_bucket():
            stored = self.bucket.look_up(oid, tid)
        if stored is None:
            return None
        return Copy(f"{self.bucket.keys.key(oid, tid)} in bucket {self.bucket.name}", stored.size, stored)

    def probe(self) -> None:
        """List one key; raise BucketError if the bucket cannot be listed.

        A request for an object does not show that: the answer to HEAD is the same if there is no such bucket.
        """
        with self._reading_bucket():
            self.bucket.probe()

    def find_any(self) -> Revision | None:
        """Return the name of one of the bucket's blobs, found with one listing; None if there is none."""
        with self._reading_bucket():
            answer = self.bucket.ask("list_objects_v2", Prefix=self.bucket.keys.blobs, MaxKeys=10)
        names = (self.bucket.keys.parse(listed["Key"]) for listed in answer.get("Contents", ()))
        return next(filter(None, names), None)

    def close(self) -> None:
        """Close the connections."""
        self.bucket.close()

    @contextmanager
    def _reading_bucket(self) -> Iterator[None]:
        """Let the errors of the body name the section."""
        with self._reading(SECTION):
            try:
                yield
            except BucketError as error:
                error.args = (f"{SECTION}: {error}",)
                raise


#: One place. The two kinds are told apart where it matters that one of them is in S3.
Place = FallbackDirectory | FallbackBucket


class Fallbacks:
    """The ``places`` of a section, in the order in which they are asked."""

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self.places = tuple(places)

    def __bool__(self) -> bool:
        return bool(self.places)

    def directories(self) -> "Fallbacks":
        """Return the fallbacks on a disk: asking them costs next to nothing."""
        return Fallbacks([place for place in self.places if isinstance(place, FallbackDirectory)])

    def in_s3(self) -> "Fallbacks":
        """Return the fallbacks in S3, whose blobs are verified."""
        return Fallbacks([place for place in self.places if isinstance(place, FallbackBucket)])

    def open(self, oid: bytes, tid: bytes, error: BlobNotFound | BucketError) -> Found:
        """Return blob (oid, tid), opened; ``error``: why the bucket did not deliver it.

        Raises ``error`` if no fallback has the blob. If the bucket does not have it, and a fallback cannot be read, the
        blob may be there: then the error of that fallback.
        """
        failure: Exception = error
        for place in self.places:
            try:
                found = place.open(oid, tid)
            except (BlobDirectoryError, BucketError) as trouble:
                if isinstance(failure, BlobNotFound):
                    failure = trouble
                continue  # another one may have the blob
            if found is not None:
                return found
        raise failure

    def look_up(self, oid: bytes, tid: bytes) -> tuple[Place, Copy] | None:
        """Return the first place that has blob (oid, tid), and where; None if none has it.

        Raises the error of a place that cannot be read, unless another one has the blob.
        """
        failure: Exception | None = None
        for place in self.places:
            try:
                copy = place.look_up(oid, tid)
            except (BlobDirectoryError, BucketError) as trouble:
                failure = failure or trouble
                continue
            if copy is not None:
                return place, copy
        if failure is not None:
            raise failure
        return None

    def probe(self) -> None:
        """Raise BucketError if the second bucket cannot be listed."""
        for place in self.places:
            if isinstance(place, FallbackBucket):
                place.probe()

    def close(self) -> None:
        """Close all connections."""
        for place in self.places:
            place.close()
