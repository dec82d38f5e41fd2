"""The bucket: put, get, copy, list and delete blobs, with checksums.

Every blob carries its SHA-256 in its object's metadata; it is checked on every download. Every method waits for S3
and so belongs on a worker thread, and may be called from any number of them at once. Errors are those of `s3errors`:
`BlobNotFound` for what is truly absent and `BucketError` for all else. An OSError is one of a local file.
"""

import os

from .control import ControlObjects
from .download import SHA256, Stored, digest_of, stored_in
from .errors import BlobMismatch, BlobNotFound


class Bucket(ControlObjects):
    """The blobs below one prefix of one bucket. Making one sends no request."""

    def look_up(self, oid: bytes, tid: bytes) -> Stored | None:
        """Return what the bucket tells of blob (oid, tid), None if it is not there."""
        try:
            return stored_in(self._head(self.keys.key(oid, tid)))
        except BlobNotFound:
            return None

    def find(self, oid: bytes, tid: bytes, filename: str) -> Stored | None:
        """Return what the bucket tells of blob (oid, tid), None if it is not there.

        Raises BlobMismatch if it is not the blob in ``filename``: size and checksum tell, the size alone if the object
        carries no checksum.
        """
        key = self.keys.key(oid, tid)
        stored = self.look_up(oid, tid)
        if stored is None:
            return None
        same = stored.size == os.path.getsize(filename)
        if not same or (stored.digest and stored.digest != digest_of(stored.algorithm, filename)):
            raise self._different(key)
        return stored

    def prove(self, oid: bytes, tid: bytes, filename: str) -> None:
        """Give blob (oid, tid), which carries no SHA-256, that of ``filename``, by storing it again.

        Raises BlobMismatch, and leaves it as it is, if its bytes are others.
        """
        key = self.keys.key(oid, tid)
        digest = digest_of(SHA256, filename)
        # Read twice before it is said: without a checksum, nothing else tells what was damaged on its way.
        if digest not in (self._read_back(key, SHA256)[1] for _ in range(2)):
            raise self._different(key)
        self.put(oid, tid, filename)

    def _different(self, key: str) -> BlobMismatch:
        return BlobMismatch(
            f"{key} in bucket {self.name} exists already and is another blob: "
            f"does another database use this s3-prefix? It was left as it is"
        )
