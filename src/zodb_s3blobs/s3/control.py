"""The objects beside the blobs: owner.json, which says whose the prefix is, and the marks of dead blobs."""

import contextlib
import datetime
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from .download import Target
from .errors import NOT_IMPLEMENTED, BlobNotFound, BucketError
from .listing import Listing
from .objects import READ
from .upload import Uploads

_MOST_MARKS = 1 << 30  # bytes of the object of the marks: ten million of them

_CONDITION_NOT_MET = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_NOT_UNDERSTOOD = {"InvalidArgument", "InvalidRequest", "400"}


@dataclass(frozen=True)
class ControlObject:
    """A small object beside the blobs; ``written`` and ``now``: when that was, and is, by the clock of the service."""

    data: bytes
    written: datetime.datetime
    now: datetime.datetime
    etag: str

    @property
    def age(self) -> float:
        """How many seconds ago it was written."""
        return (self.now - self.written).total_seconds()


class ControlObjects(Uploads, Listing):
    """The objects beside the blobs of a bucket."""

    def read_owner(self) -> ControlObject | None:
        """The object that says whose the prefix is, if there is one."""

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
        """Write it, if it is still as in ``instead_of``, where the service can see to that; else whatever it is.

        Whether it was written, or another's was, `read_owner` tells.
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
            pass  # it has been deleted meanwhile: the condition is not met
        except BucketError as error:
            if error.code not in _CONDITION_NOT_MET:
                raise
            # Ceph 16 compares the ETag with its quotes to one without, and finds that it has changed always.
            now = instead_of and self.read_owner()
            if now and instead_of and (now.data, now.etag) == (instead_of.data, instead_of.etag):
                write()

    def delete_owner(self) -> None:
        """Delete it; it is no error if it is not there."""
        # Not by the pool: this is done while all is being closed.
        error = self._delete_one(self.keys.owner)
        if error is not None:
            raise error

    def get_marks(self, file: Target) -> bool:
        """Write the object of the marks into the empty ``file``, verified; False if there is none.

        BucketError if it is larger than any that was written by this software could be.
        """
        try:
            self._get_verified(self.keys.marks, file, _MOST_MARKS)
        except BlobNotFound:
            return False
        return True

    def put_marks(self, filename: str) -> None:
        """Store the bytes of ``filename`` as that object."""
        self._put(self.keys.marks, filename, self._short_lived_options)

    def delete_marks(self) -> None:
        """Delete it; it is no error if it is not there."""
        self._delete([self.keys.marks])
