"""(oid, tid) to object key and back.

The layout is a promise to the owner of the bucket and never changes::

    [{s3-prefix}/]blobs/{oid_hex}/{tid_hex}.blob

``oid_hex`` and ``tid_hex`` are the 8 bytes as a big-endian number in lower-case hex without leading zeros. Uploads
that have no tid yet lie beside them, below ``staged/``. Pure functions; any thread may call.
"""

import re

from ZODB.utils import p64, u64

from ..revision import Revision

FOLDER = "blobs/"
OWNER = "owner.json"
_NUMBER = r"0|[1-9a-f][0-9a-f]{0,15}"
_BLOB = re.compile(rf"({_NUMBER})/({_NUMBER})\.blob")


class Keys:
    """The keys below one prefix.

    ``prefix`` is the ``s3-prefix`` setting: without slashes at its ends, or empty.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        #: The beginning of every key.
        self.root = f"{prefix}/" if prefix else ""
        #: The beginning of the keys of blobs: the prefix to list.
        self.blobs = self.root + FOLDER
        #: The beginning of the keys of staged uploads.
        self.staged = self.root + "staged/"
        #: The key of the owner of the prefix, see lease.py.
        self.owner = self.root + OWNER
        #: The key of the marks of dead blobs, see marks.py.
        self.marks = self.root + "gc-marks.jsonl"

    def key(self, oid: bytes, tid: bytes) -> str:
        """Return the object key of the blob of object ``oid`` (8 bytes) at revision ``tid`` (8 bytes)."""
        return f"{self.of_object(oid)}{u64(tid):x}.blob"

    def of_object(self, oid: bytes) -> str:
        """Return the beginning of the keys of all blobs of object ``oid`` (8 bytes)."""
        return f"{self.blobs}{u64(oid):x}/"

    def parse(self, key: str) -> Revision | None:
        """Return the revision that ``key`` names, or None: then the key is not ours and must be left alone."""
        if not key.startswith(self.blobs):
            return None
        match = _BLOB.fullmatch(key, len(self.blobs))
        return Revision(p64(int(match[1], 16)), p64(int(match[2], 16))) if match else None

    def staged_key(self, name: str) -> str:
        """Return the object key of the staged upload ``name`` (32 hex digits)."""
        return self.staged + name

    def parse_staged(self, key: str) -> str | None:
        """Return the name of the staged upload at ``key``, or None: then the key is not ours and must be left alone."""
        name = key.removeprefix(self.staged)
        return name if key.startswith(self.staged) and re.fullmatch("[0-9a-f]{32}", name) else None
