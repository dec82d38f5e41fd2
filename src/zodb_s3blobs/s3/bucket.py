"""The bucket: put, get, copy, list and delete blobs, with checksums.

Every blob carries its SHA-256 in its object's metadata; every download checks it. Every method waits for S3 and so
belongs on a worker thread; any number of threads may call at once. Errors are those of `s3.errors`: `BlobNotFound`
for a blob that the bucket does not have, `BucketError` for every other failure of S3. An OSError concerns a local file.
"""

import os

from ..digest import SHA256, digest_of
from .control import ControlObjects
from .download import Stored
from .errors import BlobMismatch
from .links import Signer


class Bucket(ControlObjects):
    """The blobs below one prefix of one bucket. The constructor sends no request."""

    def find(self, oid: bytes, tid: bytes, filename: str) -> Stored | None:
        """Return size and checksum of blob (oid, tid), None if the bucket does not have the blob.

        Raises BlobMismatch if the object differs from ``filename`` in size or checksum; in size alone if the object
        carries no checksum.
        """
        stored = self.look_up(oid, tid)
        if stored is not None and not is_of(stored, filename):
            raise self._different(self.keys.key(oid, tid))
        return stored

    def prove(self, oid: bytes, tid: bytes, filename: str) -> None:
        """Add the SHA-256 that blob (oid, tid) lacks, by storing the blob again from ``filename``.

        Raises BlobMismatch, and leaves the object unchanged, if its bytes differ from the file's.
        """
        key = self.keys.key(oid, tid)
        digest = digest_of(SHA256, filename)
        # Read twice before the mismatch is reported: without a checksum, damage in transit looks like another blob.
        if digest not in (self._read_back(key, SHA256)[1] for _ in range(2)):
            raise self._different(key)
        self.put(oid, tid, filename)

    def signer(self) -> Signer:
        """Return a signer of links to the blobs; raises BucketError if boto3 rejects the settings.

        The links cannot be used with SSE-C, whose key would have to be sent with the request.
        """
        return Signer(self.name, self.keys, self._connection)

    def _different(self, key: str) -> BlobMismatch:
        return BlobMismatch(
            f"{key} in bucket {self.name} exists already and is another blob: "
            f"does another database use this s3-prefix? It was left as it is"
        )


def is_of(stored: Stored, filename: str) -> bool:
    """Return whether the object with the metadata ``stored`` is ``filename``, by its size, and its checksum if any."""
    if stored.size != os.path.getsize(filename):
        return False
    return not stored.digest or stored.digest == digest_of(stored.algorithm, filename)
