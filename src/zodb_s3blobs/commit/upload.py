"""A blob on its way to its final key: where its bytes are by now, and what has to be deleted at the end."""

import logging
import os
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..cache.files import Incoming
from ..revision import Revision
from ..s3.errors import BlobNotFound, BucketError
from .kept import WORTH_KEEPING
from .staging import Cancellable, Staged

if TYPE_CHECKING:
    from .services import CommitServices

logger = logging.getLogger(__name__)


class Storable(Cancellable, ABC):
    """A blob of ``oid`` that its transaction stores in the bucket. `store` runs in a worker, one call at a time.

    ``size``: in bytes, 0 for a copy inside the bucket; ``serial``: the tid that the blob has from before, if it is
    restored.
    """

    def __init__(self, services: "CommitServices", oid: bytes, size: int, serial: bytes | None = None) -> None:
        super().__init__()
        self.oid = oid
        self.size = size
        self.serial = serial
        #: Where the blob is now; None before `store` has succeeded.
        self.stored: Revision | None = None
        #: The final keys that may have been written.
        self.written: set[Revision] = set()
        self._services = services

    @abstractmethod
    def store(self, name: Revision) -> None:
        """Store the blob as ``name``. Raises BucketError, BlobNotFound, CacheError or OSError."""


class Upload(Storable):
    """The upload of one ``file``; ``staged``: its upload to a staging key, if that has begun."""

    def __init__(
        self,
        services: "CommitServices",
        oid: bytes,
        file: Incoming,
        staged: Staged | None = None,
        serial: bytes | None = None,
    ) -> None:
        super().__init__(services, oid, os.path.getsize(file.path), serial)
        self.file = file
        self.staged = staged
        #: The SHA-256 in hex; "" before it is known.
        self.digest = ""
        self._key: str | None = None  # of a whole copy in the bucket, which need not be sent again

    def store(self, name: Revision) -> None:
        """Store the blob as ``name``: copy it inside the bucket if it is there already, else send it."""
        self.check_wanted()
        bucket, started = self._services.bucket, time.monotonic()
        self.written.add(name)
        source = self._source()
        if source is not None and self._copied(source, name):
            self._services.last_copy = time.monotonic() - started
        else:
            self.digest = bucket.put(*name, self.file.path, self.check_wanted, self.digest)
            self._services.last_put = time.monotonic() - started
        self.stored, self._key, self.file.digest = name, bucket.keys.key(*name), self.digest

    @property
    def likely_seconds(self) -> float:
        """The seconds that the next `store` is likely to take, as many as the last one of its kind."""
        is_in_bucket = self._key is not None or self.staged is not None
        return self._services.last_copy if is_in_bucket else self._services.last_put

    def _source(self) -> str | None:
        """Return the key of a whole copy in the bucket; None if there is none."""
        if self._key is None and self.staged is not None:
            self.digest = self.staged.uploaded.result()
            self._key = self.staged.kept or self._services.bucket.keys.staged_key(self.staged.name)
        if self._key is None and self.size >= WORTH_KEEPING:
            self.digest, kept = self._services.kept.find(self.file.path)
            return kept
        return self._key

    def is_worth_keeping(self) -> bool:
        """Return whether `key` is the key of a large whole copy in the bucket. Not while `store` runs."""
        if self.size < WORTH_KEEPING:
            return False
        if self._key is None and self.staged is not None and self.staged.has_succeeded:
            self._source()
        return self._key is not None

    @property
    def key(self) -> str:
        """The key of a whole copy in the bucket; see `is_worth_keeping`."""
        assert self._key is not None
        return self._key

    def _copied(self, source: str, name: Revision) -> bool:
        """Return whether the service could copy the object ``source``."""
        if not self._services.copies:
            return False
        try:
            self._services.bucket.publish(source, *name, self.size, self.digest)
        except (BlobNotFound, BucketError) as error:
            _raise_timeout(error)
            logger.warning("%s; uploading it again instead", error)
            return False
        if source != self._key or (self.staged is not None and source == self.staged.kept):
            self._services.metrics.uploads_reused.inc()
            self._services.metrics.uploads_reused_bytes.inc(self.size)
        return True

    def cancel(self) -> None:
        """Let work that is under way end early."""
        super().cancel()
        if self.staged is not None:
            self.staged.cancel()


class Restoration(Upload):
    """The upload of a blob that another database committed: what the bucket has is not written over, nor deleted."""

    def store(self, name: Revision) -> None:
        """Store the blob as ``name`` unless the bucket has it."""
        self.check_wanted()
        found = self._services.bucket.find(*name, self.file.path)
        if found is None:
            super().store(name)
        else:
            self.stored, self.file.digest = name, found.sha256_of(self.file.path)


class UndoCopy(Storable):
    """The blob of ``oid`` goes back to what it was at ``source``, or else at ``repeated``: a copy inside the bucket."""

    def __init__(self, services: "CommitServices", oid: bytes, source: bytes, repeated: bytes | None) -> None:
        super().__init__(services, oid, 0)
        self._sources = [source] if repeated is None else [source, repeated]

    def store(self, name: Revision) -> None:
        """Copy the blob to ``name``; where the service cannot copy, read it and send it."""
        self.written.add(name)
        for number, source in enumerate(self._sources, 1):
            try:
                self._copy(source, name)
                break
            except BlobNotFound:
                if number == len(self._sources):
                    self._services.metrics.missing_blobs.inc()
                    raise
        self.stored = name

    def _copy(self, source: bytes, name: Revision) -> None:
        bucket = self._services.bucket
        self.check_wanted()
        try:
            bucket.copy(self.oid, source, name.tid)
        except (BlobNotFound, BucketError) as error:
            # Some services cannot copy, or not what is encrypted. Or it is only in a fallback.
            _raise_timeout(error)
            logger.warning("%s; uploading it again instead", error)
            self.check_wanted()
            with self._services.fetch(self.oid, source) as path:
                bucket.put(*name, path, self.check_wanted)


def _raise_timeout(error: Exception) -> None:
    """Raise ``error`` if it is the silence of the service: another request would not help."""
    if isinstance(error, BucketError) and error.reason == "timeout":
        raise error
