"""The objects beside the blobs: owner.json, which names the owner of the prefix, and the marks of dead blobs."""

import contextlib
import datetime
import os
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from .download import Target
from .errors import NOT_IMPLEMENTED, BlobNotFound, BucketError
from .listing import Listing
from .objects import READ
from .upload import Uploads

_MAX_MARKS_BYTES = 1 << 30  # bytes of the object of the marks: ten million of them

_CONDITION_NOT_MET = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_NOT_UNDERSTOOD = {"InvalidArgument", "InvalidRequest", "400"}


@dataclass(frozen=True)
class ControlObject:
    """A small object beside the blobs; ``written``, ``now``: times of its last write and of the read, by S3."""

    data: bytes
    written: datetime.datetime
    now: datetime.datetime
    etag: str

    @property
    def age(self) -> float:
        """Seconds from the object's last write to the read."""
        return (self.now - self.written).total_seconds()


class ControlObjects(Uploads, Listing):
    """The objects beside the blobs of a bucket."""

    def read_owner(self) -> ControlObject | None:
        """Return owner.json, None if the bucket does not have it. Waits for S3; BucketError."""

        def read() -> ControlObject:
            answer = self._client.get_object(Bucket=self.name, Key=self.keys.owner, **self._key_options)
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.timezone.utc)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read(READ)
            return ControlObject(data, answer["LastModified"], now, answer.get("ETag", ""))

        try:
            return self._ask(f"read {self.keys.owner} of bucket {self.name}", read)
        except BlobNotFound:
            return None

    def write_owner(self, data: bytes, instead_of: ControlObject | None) -> None:
        """Write owner.json, provided that it is still as in ``instead_of``, or missing if that is None.

        A service without conditional writes overwrites whatever is there. Call `read_owner` to learn whose write
        succeeded. Waits for S3; BucketError.
        """

        def write(**condition: str) -> None:
            options = {"Body": bytearray(data), **condition, **self._short_lived_options, **self._key_options}
            self._ask(
                f"write {self.keys.owner} to bucket {self.name}",
                lambda: self._client.put_object(Bucket=self.name, Key=self.keys.owner, **options),
            )

        try:
            try:
                write(**({"IfNoneMatch": "*"} if instead_of is None else {"IfMatch": instead_of.etag}))
            except BucketError as error:
                if error.code not in NOT_IMPLEMENTED | _NOT_UNDERSTOOD:
                    raise
                write()
        except BlobNotFound:
            pass  # owner.json has been deleted meanwhile: the condition is not met
        except BucketError as error:
            if error.code not in _CONDITION_NOT_MET:
                raise
            # Ceph 16 compares an ETag with quotes to one without, and so always finds that owner.json has changed.
            now = instead_of and self.read_owner()
            if now and instead_of and (now.data, now.etag) == (instead_of.data, instead_of.etag):
                write()

    def delete_owner(self) -> None:
        """Delete owner.json; no error if the bucket does not have it. Waits for S3; BucketError."""
        # Not by the pool, which may be closed already.
        error = self._delete_one(self.keys.owner)
        if error is not None:
            raise error

    def get_marks(self, file: Target) -> bool:
        """Download the marks into the empty ``file`` and verify them; return False if the bucket has no marks.

        Waits for S3. Raises BucketError, also if the object is larger than this software writes it.
        """
        try:
            self._get_verified(self.keys.marks, file, _MAX_MARKS_BYTES)
        except BlobNotFound:
            return False
        return True

    def put_marks(self, filename: str) -> None:
        """Upload the marks in ``filename``. Waits for S3; BucketError."""
        self._put(self.keys.marks, filename, os.path.getsize(filename), self._short_lived_options)

    def delete_marks(self) -> None:
        """Delete the marks; no error if the bucket has none. Waits for S3; BucketError."""
        self._delete([self.keys.marks])
