"""What ``zodb-s3blobs check`` stores: all below a prefix of its own, so that all of it can be deleted again."""

import contextlib
import copy
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ZODB.utils import p64

from .bucket import BlobNotFound, Bucket, BucketError, TransferCancelled
from .config import S3BlobStorageFactory
from .metrics import Metrics

Name = tuple[bytes, bytes]

#: The codes of a BucketError that mean: not allowed.
FORBIDDEN = {"AccessDenied", "403"}

#: What may stay behind where the bucket keeps versions.
VERSIONS = "old versions"

_GIVE_UP_AFTER = 3


class File:
    """A file of this machine to send from, or to read into."""

    def __init__(self, path: str, data: bytes = b"") -> None:
        self.path = path
        with open(path, "wb") as file:
            file.write(data)

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start."""
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(data)

    def clear(self) -> None:
        """Make it empty again."""
        os.truncate(self.path, 0)


class Scratch:
    """A prefix below that of ``section``, and all that is stored there; ``directory``: for files.

    Requests are made as the server makes them, by ``bucket``. They raise BucketError, which says which permission is
    missing, or BlobNotFound. Belongs to one thread at a time, but for ``unwanted``: once set, uploads break off.
    """

    def __init__(self, section: S3BlobStorageFactory, directory: str) -> None:
        prefix = f"{section.settings.s3_prefix}/check-{uuid.uuid4().hex}".lstrip("/")
        #: What the checks go by.
        self.settings = replace(section.settings, s3_prefix=prefix)
        self.section = section
        self._directory = directory
        self._files = self._blobs = self._silences = 0
        self._buckets: list[Bucket] = []
        self.bucket = self.open()
        #: All that there may be: keys, and the keys of unfinished uploads by their id.
        self.keys: set[str] = set()
        self.uploads: dict[str, str] = {}
        self._has_versions = False
        self.unwanted = threading.Event()

    def open(self, **changes: Any) -> Bucket:
        """The bucket with other settings. Raises StartRefused."""
        section = copy.copy(self.section)
        section.settings = replace(self.settings, **changes)
        self._buckets.append(section.open_bucket(Metrics()))
        return self._buckets[-1]

    def close(self) -> None:
        """Take no more requests."""
        for bucket in self._buckets:
            bucket.close()

    @property
    def is_answered(self) -> bool:
        """Whether the service gave a proper answer to the last request, were it a refusal."""
        return self.bucket.last_answer[0] is None

    def is_refusal(self, error: BucketError) -> bool:
        """Whether the service means what was asked for, and neither who asked for it nor that it is out of order."""
        return self.is_answered and error.code not in FORBIDDEN

    @contextlib.contextmanager
    def needing(self, permission: str) -> Iterator[None]:
        """For requests that need ``permission``."""
        try:
            yield
        except BucketError as error:
            if error.code not in FORBIDDEN:
                raise
            advice = f"it must allow {permission}"
            if self.settings.s3_sse_customer_key:
                advice += "; or it forbids s3-sse-customer-key, as AWS does for new buckets: s3-sse works there"
            elif self.settings.s3_sse == "aws:kms":
                advice += ", and for s3-sse-kms-key-id kms:GenerateDataKey and kms:Decrypt"
            raise BucketError(f"{error}; {advice}", error.code) from None

    # Storing

    def file(self, data: bytes = b"") -> File:
        """A new file with ``data`` in it."""
        self._files += 1
        return File(f"{self._directory}/{self._files}", data)

    def name(self, oid: bytes | None = None, tid: int = 1) -> Name:
        """The name of a blob that is not there, and may be from now on; by default with an oid of its own."""
        self._blobs += oid is None
        name = oid or p64(self._blobs), p64(tid)
        self.keys.add(self.key(name))
        return name

    def key(self, name: Name) -> str:
        """Its key."""
        return self.bucket.keys.key(*name)

    def put(self, data: bytes, name: Name | None = None, bucket: Bucket | None = None) -> Name:
        """Store a blob; returns its name."""
        name = name or self.name()
        with self.needing("s3:PutObject"):
            (bucket or self.bucket).put(*name, self.file(data).path, self.check_wanted)
        return name

    def put_raw(self, key: str, data: bytes, **options: Any) -> dict[str, Any]:
        """Store an object; returns the answer."""
        self.keys.add(key)
        options = {"Key": key, "Body": bytearray(data), **self.bucket.write_options, **options}
        with self.needing("s3:PutObject"):
            answer = self.bucket.ask("put_object", **options)
        self._has_versions |= answer.get("VersionId", "null") != "null"
        return answer

    def check_wanted(self, transferred: int = 0) -> None:
        """Raise TransferCancelled once it is all unwanted."""
        if self.unwanted.is_set():
            raise TransferCancelled()

    # Reading

    def get(self, name: Name) -> bytes:
        """The bytes of a blob."""
        file = self.file()
        with self.needing("s3:GetObject"):
            self.bucket.get(*name, file)
        with open(file.path, "rb") as opened:
            return opened.read()

    def metadata(self, name: Name) -> dict[str, str]:
        """Its metadata."""
        return self.read("head_object", name)["Metadata"]

    def read(self, operation: str, name: Name, **options: Any) -> dict[str, Any]:
        """The answer to another ``operation`` that reads it."""
        with self.needing("s3:GetObject"):
            return self.bucket.ask(operation, Key=self.key(name), **self.bucket.read_options, **options)

    def is_there(self, name: Name) -> bool:
        """Whether it is there."""
        try:
            self.read("head_object", name)
        except BlobNotFound:
            return False
        return True

    # Deleting

    def delete(self, names: Iterable[Name]) -> None:
        """Delete blobs."""
        with self.needing("s3:DeleteObject"):
            self.bucket.delete(names)

    def clean_up(self) -> dict[str, str]:
        """Delete everything; returns what stays behind, and why."""
        left: dict[str, str] = {}
        listed = self._list("list_multipart_uploads", "Uploads")
        for upload_id, key in (self.uploads | {one["UploadId"]: one["Key"] for one in listed}).items():
            self._delete(left, f"an unfinished upload to {key}", "abort_multipart_upload", Key=key, UploadId=upload_id)
        for key in sorted(self.keys | {one["Key"] for one in self._list("list_objects_v2", "Contents")}):
            self._delete(left, key, "delete_object", Key=key)
        if self._has_versions:
            versions = self._list("list_object_versions", "Versions", "DeleteMarkers")
            if not versions:
                left[VERSIONS] = "they could not be listed"
            for one in versions:
                self._delete(left, VERSIONS, "delete_object", Key=one["Key"], VersionId=one["VersionId"])
        for one in self._list("list_objects_v2", "Contents"):
            left.setdefault(one["Key"], "it was deleted, and is still listed")
        return left

    def _list(self, operation: str, *kinds: str) -> list[dict[str, Any]]:
        """What there is, as far as the service tells."""
        root = self.bucket.keys.root
        answer = self._ask(operation, Prefix=root)
        if isinstance(answer, str):
            return []
        # A service may ignore the prefix.
        return [one for kind in kinds for one in answer.get(kind, ()) if one["Key"].startswith(root)]

    def _delete(self, left: dict[str, str], what: str, operation: str, **options: Any) -> None:
        trouble = self._ask(operation, **options)
        if isinstance(trouble, str):
            left[what] = trouble

    def _ask(self, operation: str, **options: Any) -> dict[str, Any] | str:
        """The answer, or why there is none; not even asked for where none has come several times."""
        if self._silences < _GIVE_UP_AFTER:
            try:
                answer = self.bucket.ask(operation, **options)
            except (BucketError, BlobNotFound) as error:
                self._silences = 0 if self.is_answered else self._silences + 1
                return {} if isinstance(error, BlobNotFound) or error.code == "NoSuchUpload" else str(error)
            self._silences = 0
            return answer
        return "the bucket does not answer"
