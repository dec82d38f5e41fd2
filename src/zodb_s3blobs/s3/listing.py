"""The listing of a bucket's objects, and their deletion."""

import datetime
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..revision import Revision
from .errors import BlobNotFound, BucketError, NotDeleted, code_of, reason_of_answer
from .objects import Objects

logger = logging.getLogger(__name__)

_DELETE_BATCH = 1000  # the most keys that one DeleteObjects request may name
_PAGE = 200  # keys per listing request: while an answer is parsed, other threads wait for the interpreter

#: Codes that a request for one object would get as well: they do not prove that DeleteObjects is missing.
_NO_WORD_ON_BATCHES = {"NoSuchBucket", "InvalidBucketName", "RequestTimeTooSkewed"}

#: The storage classes of objects that must be restored before they can be read.
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}


@dataclass(frozen=True)
class Listed:
    """One blob that `Bucket.list_blobs` found; ``size`` in bytes."""

    oid: bytes
    tid: bytes
    size: int
    #: Whether the object must be restored before it can be read, by its storage class.
    archived: bool = False


@dataclass(frozen=True)
class ListedStaged:
    """One staged upload that `Bucket.list_staged` found; ``size`` in bytes, ``modified``: time of its completion."""

    name: str
    size: int
    modified: datetime.datetime


@dataclass(frozen=True)
class ListedUpload:
    """One incomplete multipart upload that `Bucket.list_uploads` found."""

    key: str
    upload_id: str
    begun: datetime.datetime


class Listing(Objects):
    """The listings of a bucket, and the deletion of its objects."""

    #: False once the service has shown that it cannot delete several objects with one request.
    _batch_delete = True

    def list_blobs(self, unknown: Callable[[int], None] = lambda size: None) -> Iterator[Listed]:
        """Yield all blobs in the order of their keys, with one request per 200 keys. Waits for S3; BucketError.

        Other objects below the prefix are skipped; ``unknown`` is called with the size in bytes of each.
        """
        for found in self._list(self.keys.blobs):
            name = self.keys.parse(found["Key"])
            if name is not None:
                yield Listed(*name, found["Size"], found.get("StorageClass") in _ARCHIVES)
            else:
                unknown(found["Size"])

    def list_tids(self, oid: bytes) -> Iterator[bytes]:
        """Yield the tids of all blobs of the object ``oid``. Waits for S3; BucketError."""
        for found in self._list(self.keys.of_object(oid)):
            name = self.keys.parse(found["Key"])
            if name is not None:
                yield name[1]

    def list_staged(self) -> Iterator[ListedStaged]:
        """Yield all staged uploads, of this server and others. Waits for S3; BucketError."""
        for found in self._list(self.keys.staged):
            name = self.keys.parse_staged(found["Key"])
            if name is not None:
                yield ListedStaged(name, found["Size"], found["LastModified"])

    def list_uploads(self) -> Iterator[ListedUpload]:
        """Yield all incomplete multipart uploads of blobs and to staging keys, of this server and others.

        Waits for S3; BucketError.
        """
        for found in self._list(self.keys.root, "list_multipart_uploads", "Uploads"):
            if self.keys.parse(found["Key"]) or self.keys.parse_staged(found["Key"]):
                yield ListedUpload(found["Key"], found["UploadId"], found["Initiated"])

    def _list(
        self, prefix: str, operation: str = "list_objects_v2", result: str = "Contents"
    ) -> Iterator[dict[str, Any]]:
        pages = iter(
            self._client.get_paginator(operation).paginate(
                Bucket=self.name, Prefix=prefix, PaginationConfig={"PageSize": _PAGE}
            )
        )
        while True:
            page = self._ask(f"list bucket {self.name}", lambda: next(pages, None))
            if page is None:
                return
            yield from page.get(result, ())

    def abort_upload(self, upload: ListedUpload) -> None:
        """Abort ``upload`` and delete its parts; no error if the upload has ended. Waits for S3; BucketError."""
        try:
            self._ask(
                f"abort an upload to {upload.key} of bucket {self.name}",
                lambda: self._client.abort_multipart_upload(
                    Bucket=self.name, Key=upload.key, UploadId=upload.upload_id
                ),
            )
        except BucketError as error:
            if error.code != "NoSuchUpload":
                raise

    def delete(self, blobs: Iterable[Revision]) -> None:
        """Delete the blobs (oid, tid), 1,000 per request; absent blobs are no error. Waits for S3.

        Tries all blobs, then raises NotDeleted if some failed; its text names the first of those.
        """
        self._delete([self.keys.key(oid, tid) for oid, tid in blobs])

    def delete_staged(self, names: Iterable[str]) -> None:
        """Delete the staged uploads ``names``, 1,000 per request; errors as in `delete`. Waits for S3."""
        self._delete([self.keys.staged_key(name) for name in names])

    def _delete(self, keys: list[str]) -> None:
        errors: dict[str, BucketError] = {}
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            errors |= self._delete_batch(batch) if self._batch_delete and len(batch) > 1 else self._delete_each(batch)
        if errors:
            first = next(iter(errors.values()))
            raise NotDeleted(
                f"{first}; {len(errors)} of {len(keys)} objects were not deleted", first, frozenset(errors)
            )

    def _delete_batch(self, keys: list[str]) -> dict[str, BucketError]:
        options = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = self._ask(
                f"delete objects of bucket {self.name}",
                lambda: self._client.delete_objects(Bucket=self.name, Delete=options),
            )
        except BucketError as error:
            # Some services have no DeleteObjects, or demand another checksum for it. A missing permission or a passing
            # failure does not prove either.
            if error.reason != "request" or error.code in _NO_WORD_ON_BATCHES:
                return dict.fromkeys(keys, error)
            logger.info("The service of bucket %s has no batch delete: deleting objects one by one", self.name)
            self._batch_delete = False
            return self._delete_each(keys)
        refused = {e["Key"]: code_of(e) for e in answer.get("Errors", ()) if e.get("Code") != "NoSuchKey"}
        return {
            key: BucketError(
                f"Could not delete {key!r} of bucket {self.name}: {code or 'no reason is given'}",
                code,
                reason_of_answer("DeleteObject", 400, code) or "request",
            )
            for key, code in refused.items()
        }

    def _delete_each(self, keys: list[str]) -> dict[str, BucketError]:
        futures = {key: self._parts.submit(self._delete_one, key) for key in keys}
        return {key: error for key, future in futures.items() if (error := future.result()) is not None}

    def _delete_one(self, key: str) -> BucketError | None:
        try:
            self._ask(
                f"delete {key} of bucket {self.name}",
                lambda: self._client.delete_object(Bucket=self.name, Key=key),
            )
        except BlobNotFound:
            pass
        except BucketError as error:
            return error
        return None
