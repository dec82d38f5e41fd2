"""The bucket: put, get, copy, list and delete blobs, with checksums. The only file that imports boto3.

Every blob carries its SHA-256 in its object's metadata; it is checked on every download. Every method waits for S3
and so belongs on a worker thread, and may be called from any number of them at once. Errors are `BlobNotFound` for
what is truly absent and `BucketError` for all else; neither carries a botocore exception, whose text may repeat a
credential.
"""

import contextlib
import datetime
import functools
import hashlib
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import botocore.session
import botocore.utils
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber

from .keys import Keys
from .metrics import Metrics
from .s3events import S3Events, code_of, got_old_credentials
from .workers import DaemonPool

logger = logging.getLogger(__name__)

#: A blob up to this many bytes is read with one request; larger ones in parallel ranges of this size.
PART = 8 << 20

_SHA256 = "sha256"  # the name of the metadata entry, and the algorithm
_DELETE_BATCH = 1000  # the most keys that one DeleteObjects request may name
_PAGE = 200  # how many keys to ask for in a listing: while the answer is parsed, other threads have to wait
_COPY_LIMIT = 5 << 30  # larger objects cannot be copied in one request
_READ = 1 << 20
_MOST_MARKS = 1 << 30  # bytes of the object of the marks: ten million of them

_CONDITION_NOT_MET = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_NOT_UNDERSTOOD = {"InvalidArgument", "InvalidRequest", "400"}
_NOT_IMPLEMENTED = {"NotImplemented", "501", "MethodNotAllowed", "405"}
#: What they log at level debug repeats access keys, signatures and the key of SSE-C.
_TALKATIVE = ("boto3", "botocore", "s3transfer")

_BODY_ERRORS = (
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
)


Progress = Callable[[int], None]
T = TypeVar("T")


class BucketError(Exception):
    """S3 did not do what was asked; says what, on which object, and why. ``code``: what S3 called it, or ""."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class NotDeleted(BucketError):
    """Some objects could not be deleted: ``keys``."""

    def __init__(self, message: str, code: str, keys: frozenset[str]) -> None:
        super().__init__(message, code)
        self.keys = keys


class Damaged(BucketError):
    """The object is not what was stored, however often it is read."""


class Different(BucketError):
    """The bucket has another blob where this one should be."""


class BlobNotFound(LookupError):
    """The bucket has no such blob."""


class TransferCancelled(Exception):
    """The caller of a transfer does not want it any more."""


class Corrupt(Exception):
    """What arrived is not what was stored."""


@dataclass
class BucketSettings:
    """How to reach the bucket; the names are those of the configuration keys. Times in seconds, sizes in bytes."""

    bucket_name: str
    s3_prefix: str = ""
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_access_key: str | None = field(default=None, repr=False)
    s3_secret_key: str | None = field(default=None, repr=False)
    s3_use_ssl: bool = True
    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    s3_sse_customer_key: bytes | None = field(default=None, repr=False)
    s3_sse: str | None = None
    s3_sse_kms_key_id: str | None = None
    s3_storage_class: str | None = None
    s3_checksums: Literal["when_supported", "when_required"] = "when_required"
    s3_multipart_threshold: int = 8 << 20
    s3_concurrency: int = 16
    s3_connect_timeout: float = 5
    s3_read_timeout: float = 30
    s3_max_attempts: int = 3


class Sink(Protocol):
    """What the bytes of a blob are written into."""

    def write_at(self, data: bytes, position: int) -> None: ...


class Target(Sink, Protocol):
    """A file that a blob is written into, by several threads at once."""

    path: str

    def clear(self) -> None: ...


@dataclass(frozen=True)
class Listed:
    """One object that `Bucket.list_blobs` found and that is a blob; ``size`` in bytes."""

    oid: bytes
    tid: bytes
    size: int


@dataclass(frozen=True)
class ListedStaged:
    """One staged upload that `Bucket.list_staged` found; ``modified``: when it was completed."""

    name: str
    size: int
    modified: datetime.datetime


@dataclass(frozen=True)
class ListedUpload:
    """One upload in parts that `Bucket.list_uploads` found, and that has not been completed."""

    key: str
    upload_id: str
    begun: datetime.datetime


@dataclass(frozen=True)
class Note:
    """A small object beside the blobs; ``age``: seconds since it was written, by the clock of the service."""

    data: bytes
    age: float
    etag: str


class _Key(bytes):
    """A key that what shows the variables of a traceback does not show."""

    def __repr__(self) -> str:
        return "<a key>"


class Bucket:
    """The blobs below one prefix of one bucket. Making one sends no request."""

    def __init__(self, settings: BucketSettings, metrics: Metrics) -> None:
        self.name = settings.bucket_name
        self.keys = Keys(settings.s3_prefix)
        self._attempts = settings.s3_max_attempts
        self._multipart_threshold = settings.s3_multipart_threshold
        self._write_options: dict[str, Any] = {}
        self._key_options: dict[str, Any] = {}
        self._copy_source_key_options: dict[str, Any] = {}
        if settings.s3_sse_customer_key:
            algorithm, key = "AES256", _Key(settings.s3_sse_customer_key)
            self._key_options = {"SSECustomerAlgorithm": algorithm, "SSECustomerKey": key}
            self._copy_source_key_options = {
                "CopySourceSSECustomerAlgorithm": algorithm,
                "CopySourceSSECustomerKey": key,
            }
        if settings.s3_sse:
            self._write_options["ServerSideEncryption"] = settings.s3_sse
        if settings.s3_sse_kms_key_id:
            self._write_options["SSEKMSKeyId"] = settings.s3_sse_kms_key_id
        # Of what is written again and again, which other classes than the usual one would make dear.
        self._note_options = dict(self._write_options)
        if settings.s3_storage_class:
            self._write_options["StorageClass"] = settings.s3_storage_class
        #: What `ask` needs besides to read and to write as the other methods do.
        self.read_options, self.write_options = self._key_options, {**self._write_options, **self._key_options}
        self._client = _client(settings)
        self._metrics = metrics
        self._events = S3Events(self._client, metrics, TransferCancelled)
        #: Where requests go; without s3-endpoint-url, boto3 may have found another than Amazon's.
        self.endpoint_url: str = self._client.meta.endpoint_url
        pool_name = f"s3blobs {settings.bucket_name}"
        # Of its own: a part of a download must never wait for the download that waits for it.
        self._parts = DaemonPool(settings.s3_concurrency, f"{pool_name} part")
        self._transfers = TransferManager(
            self._client,
            TransferConfig(
                multipart_threshold=settings.s3_multipart_threshold,
                multipart_chunksize=PART,
                max_concurrency=settings.s3_concurrency,
                preferred_transfer_client="classic",
            ),
            executor_cls=functools.partial(DaemonPool, name=f"{pool_name} transfer"),  # type: ignore[arg-type]
        )
        self._batch_delete = True
        #: Whether, as far as is known, the service can copy.
        self.can_copy = True

    def close(self) -> None:
        """Take no more requests; those under way are left to their daemon threads."""
        self._parts.shutdown(wait=False, cancel_futures=True)
        # It waits for the transfers that it cancels, which a silent service can make a long time.
        # As a context manager: `shutdown` with cancel fails in some versions.
        closed = TransferCancelled("The bucket has been closed")
        threading.Thread(target=self._transfers.__exit__, args=(type(closed), closed, None), daemon=True).start()
        self._client.close()

    @property
    def last_answer(self) -> tuple[str | None, float]:
        """Why the last request was not answered, None if it was; and the reading of `time.monotonic` at that time."""
        return self._events.last_answer

    def probe(self) -> None:
        """Ask for one key: BucketError if bucket, credentials, permission to list or connection are not right."""
        _ask(
            f"list bucket {self.name}",
            lambda: self._client.list_objects_v2(Bucket=self.name, Prefix=self.keys.blobs, MaxKeys=1),
        )

    def ask(self, operation: str, **options: Any) -> dict[str, Any]:
        """The answer to one ``operation`` of boto3's client on this bucket, for what no other method tells.

        The body that it may have is bytes, at most 1 MiB. Raises BlobNotFound and BucketError.
        """

        def ask() -> dict[str, Any]:
            answer = getattr(self._client, operation)(Bucket=self.name, **options)
            if "Body" in answer:
                with contextlib.closing(answer["Body"]) as body:
                    answer["Body"] = body.read(_READ)
            return answer

        return _ask(f"{operation.replace('_', ' ')} {options.get('Key', '')}".rstrip() + f" in bucket {self.name}", ask)

    # Writing

    def put(self, oid: bytes, tid: bytes, filename: str, progress: Progress | None = None) -> None:
        """Store the bytes of ``filename`` as blob (oid, tid).

        ``progress`` is called with the number of bytes of each step, from several threads; the `TransferCancelled`
        that it may raise ends the upload and is raised here.
        """
        self._upload(self.keys.key(oid, tid), filename, progress)

    def put_staged(self, name: str, filename: str, progress: Progress | None = None) -> None:
        """The same to the staging key ``name``."""
        self._upload(self.keys.staged_key(name), filename, progress)

    def _upload(self, key: str, filename: str, progress: Progress | None) -> None:
        started = time.monotonic()
        self._put(key, filename, self._write_options, progress)
        self._metrics.upload_duration.observe(time.monotonic() - started)
        self._metrics.upload_size.observe(os.path.getsize(filename))
        self._metrics.upload_last_success.set_to_current_time()

    def _put(self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None = None) -> None:
        options = {"Metadata": self._metadata(filename), **write_options, **self._key_options}
        small = os.path.getsize(filename) < min(self._multipart_threshold, PART)
        put = self._put_small if small else self._put_large
        _ask(f"store {key} in bucket {self.name}", lambda: put(key, filename, options, progress))

    def _put_small(self, key: str, filename: str, options: dict[str, Any], progress: Progress | None) -> None:
        # From memory: a body with a read method, which botocore also makes of bytes, would make it send
        # `Expect: 100-continue` and wait one more round trip for the answer.
        with open(filename, "rb") as file:
            body = bytearray(file.read())
        if progress is not None:
            progress(0)
        answer = self._client.put_object(Bucket=self.name, Key=key, Body=body, **options)
        self._check_customer_key_used(answer)

    def _put_large(self, key: str, filename: str, options: dict[str, Any], progress: Progress | None) -> None:
        subscribers = [_Progress(progress)] if progress is not None else []
        self._transfers.upload(filename, self.name, key, options, subscribers).result()
        if self._key_options:
            self._check_customer_key_used(self._head(key))

    def _metadata(self, filename: str) -> dict[str, str]:
        return {_SHA256: _digest("sha256", filename)}

    def _check_customer_key_used(self, answer: dict[str, Any]) -> None:
        if self._key_options and not answer.get("SSECustomerAlgorithm"):
            # The blob is in the bucket in the clear; the abort of its transaction deletes it.
            raise BucketError(
                f"The service behind bucket {self.name} ignores s3-sse-customer-key and stores blobs unencrypted; "
                f"remove s3-sse-customer-key, or use s3-sse or a service that supports SSE-C"
            )

    def copy(self, oid: bytes, source_tid: bytes, tid: bytes) -> None:
        """Copy blob (oid, source_tid) to (oid, tid) inside the bucket, with its metadata.

        Raises BlobNotFound if there is no such source.
        """
        source = self.keys.key(oid, source_tid)
        head = self._head(source)
        self._copy(source, self.keys.key(oid, tid), head["ContentLength"], lambda: head["Metadata"])

    def publish_staged(self, name: str, oid: bytes, tid: bytes, filename: str) -> None:
        """Copy what `put_staged` stored at ``name`` from ``filename`` to blob (oid, tid): one request up to 5 GiB."""
        self._copy(
            self.keys.staged_key(name),
            self.keys.key(oid, tid),
            os.path.getsize(filename),
            lambda: self._metadata(filename),
        )

    def _copy(self, source: str, key: str, size: int, metadata: Callable[[], dict[str, str]]) -> None:
        place = {"Bucket": self.name, "Key": source}
        options = {**self._write_options, **self._key_options, **self._copy_source_key_options}

        def copy() -> None:
            if size <= _COPY_LIMIT:
                answer = self._client.copy_object(Bucket=self.name, Key=key, CopySource=place, **options)
                self._check_customer_key_used(answer)
            else:
                # s3transfer copies in parts, where older versions lose the metadata unless it is given again.
                self._transfers.copy(place, self.name, key, {**options, "Metadata": metadata()}).result()

        try:
            _ask(f"copy {source} to {key} in bucket {self.name}", copy)
        except BucketError as error:
            if error.code in _NOT_IMPLEMENTED:
                self.can_copy = False
            raise

    # Reading

    def has(self, oid: bytes, tid: bytes, filename: str) -> bool:
        """Whether blob (oid, tid) is in the bucket already; Different if it is there, but not as in ``filename``.

        Size and checksum tell, the size alone if the object carries no checksum.
        """
        key = self.keys.key(oid, tid)
        try:
            head = self._head(key)
        except BlobNotFound:
            return False
        name, expected = _checksum(head)
        if head["ContentLength"] != os.path.getsize(filename) or (expected and expected != _digest(name, filename)):
            raise Different(
                f"{key} in bucket {self.name} exists already and is another blob: "
                f"does another database use this s3-prefix? It was left as it is"
            )
        return True

    def _head(self, key: str) -> dict[str, Any]:
        return _ask(
            f"look up {key} in bucket {self.name}",
            lambda: self._client.head_object(Bucket=self.name, Key=key, **self._key_options),
        )

    def verify(self, oid: bytes, tid: bytes) -> int:
        """Read blob (oid, tid) and check it, without keeping it; return its size in bytes.

        Raises BlobNotFound, Damaged, or BucketError if S3 fails.
        """
        key = self.keys.key(oid, tid)
        return self._verified(key, lambda: self._digest(key))

    def get(self, oid: bytes, tid: bytes, file: Target) -> int:
        """Write blob (oid, tid) into the empty ``file``; return its size in bytes.

        One request for up to `PART` bytes, else parallel ranges. When it returns, size and checksum are right.
        Raises BlobNotFound, BucketError, or the OSError of a full disk.
        """
        started = time.monotonic()
        size = self._get_verified(self.keys.key(oid, tid), file)
        self._metrics.download_duration.observe(time.monotonic() - started)
        self._metrics.download_size.observe(size)
        return size

    def _get_verified(self, key: str, file: Target, most: int | None = None) -> int:
        def get() -> int:
            file.clear()
            return self._get(key, file, most)

        return self._verified(key, get)

    def _verified(self, key: str, read: Callable[[], int]) -> int:
        """What ``read`` returns, which raises Corrupt if what it read is not right; then it is called again."""
        what = f"read {key} of bucket {self.name}"
        for attempt in range(1, self._attempts + 1):
            try:
                return _ask(what, read)
            except Corrupt as error:
                self._metrics.download_checksum_failures.inc()
                logger.error("Could not %s: %s (attempt %d of %d)", what, error, attempt, self._attempts)
                damage = str(error)
        raise Damaged(f"Could not {what}: {damage}. The object is damaged or was changed; restore it from a backup")

    def _get(self, key: str, file: Target, most: int | None) -> int:
        first = self._open_range(key, 0, PART)
        size = first.total
        if most is not None and size > most:
            first.body.close()
            raise BucketError(f"{key} of bucket {self.name} is larger than {most} bytes: it is not ours; delete it")
        parts: list[Future] = []
        try:
            for start in range(first.length, size, PART):
                end = min(start + PART, size)
                parts.append(self._parts.submit(self._get_range, key, start, end, first.etag, file))
            self._get_range(key, 0, first.length, first.etag, file, opened=first)
            for part in parts:
                part.result()
        except BaseException:
            # The file is not to be touched any more once this has raised.
            for part in parts:
                part.cancel()
            for part in parts:
                if not part.cancelled():
                    part.exception()
            raise
        name, expected = first.checksum
        _check(first, os.path.getsize(file.path), _digest(name, file.path) if expected else "")
        return size

    def _digest(self, key: str) -> int:
        first = self._open_range(key, 0, PART)
        digest = _Digest(first.checksum[0])
        self._get_range(key, 0, first.length, first.etag, digest, opened=first)
        for start in range(first.length, first.total, PART):
            self._get_range(key, start, min(start + PART, first.total), first.etag, digest)
        _check(first, digest.size, digest.hexdigest())
        return digest.size

    def _get_range(self, key: str, start: int, end: int, etag: str, file: Sink, opened: "_Range | None" = None) -> None:
        """Write bytes start to end of the object to their place in the file; a broken body is asked for again.

        Here, because botocore's own retries end with the headers. What is wrong with the whole object is `get`'s.
        """
        for attempt in range(1, self._attempts + 1):
            answer = opened or self._open_range(key, start, end)
            opened = None
            if answer.etag != etag:
                answer.body.close()
                raise Corrupt("it was replaced while it was being read")
            try:
                position = start
                for chunk in iter(lambda: answer.body.read(_READ), b""):  # noqa: B023 (used up before the next one)
                    file.write_at(chunk, position)
                    position += len(chunk)
                if position != end:
                    raise Corrupt(f"{position - start} bytes of {end - start} arrived")
                return
            except botocore.exceptions.FlexibleChecksumError:
                raise Corrupt("it does not have the checksum that the service sent with it") from None
            except (*_BODY_ERRORS, Corrupt) as error:
                logger.warning("The answer for %s broke off (attempt %d): %s", key, attempt, type(error).__name__)
                if attempt == self._attempts:
                    raise
            finally:
                answer.body.close()

    def _open_range(self, key: str, start: int, end: int) -> "_Range":
        options = {"Bucket": self.name, "Key": key, **self._key_options}

        def get() -> dict[str, Any]:
            try:
                return self._client.get_object(Range=f"bytes={start}-{end - 1}", **options)
            except botocore.exceptions.ClientError as error:
                if start or error.response.get("Error", {}).get("Code") not in ("InvalidRange", "416"):
                    raise
            return self._client.get_object(**options)  # an empty object has no first byte to ask for

        answer = _ask(f"read {key} of bucket {self.name}", get)
        try:
            return self._range(answer, start)
        except BaseException:
            answer["Body"].close()
            raise

    @staticmethod
    def _range(answer: dict[str, Any], start: int) -> "_Range":
        length = answer["ContentLength"]
        total = length
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange") or "")
        if match:
            total = int(match[3])
        elif start:
            # The service ignores ranges and would send everything: only the first request may be answered so.
            raise Corrupt("the service answered one range with the whole object and another with a part")
        return _Range(answer["Body"], length, total, answer["ETag"], _checksum(answer))

    # Beside the blobs

    def read_owner(self) -> Note | None:
        """The object that says whose the prefix is, if there is one."""

        def read() -> Note:
            answer = self._client.get_object(Bucket=self.name, Key=self.keys.owner, **self._key_options)
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.timezone.utc)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read(_READ)
            return Note(data, (now - answer["LastModified"]).total_seconds(), answer["ETag"])

        try:
            return _ask(f"read {self.keys.owner} of bucket {self.name}", read)
        except BlobNotFound:
            return None

    def write_owner(self, data: bytes, instead_of: Note | None) -> None:
        """Write it, if it is still as in ``instead_of``, where the service can see to that; else whatever it is.

        Whether it was written, or another's was, `read_owner` tells.
        """

        def write(**condition: str) -> None:
            options = {"Body": bytearray(data), **condition, **self._note_options, **self._key_options}
            _ask(
                f"write {self.keys.owner} to bucket {self.name}",
                lambda: self._client.put_object(Bucket=self.name, Key=self.keys.owner, **options),
            )

        try:
            try:
                write(**({"IfNoneMatch": "*"} if instead_of is None else {"IfMatch": instead_of.etag}))
            except BucketError as error:
                if error.code not in _NOT_IMPLEMENTED | _NOT_UNDERSTOOD:
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
        try:
            _ask(
                f"delete {self.keys.owner} of bucket {self.name}",
                lambda: self._client.delete_object(Bucket=self.name, Key=self.keys.owner),
            )
        except BlobNotFound:
            pass

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
        self._put(self.keys.marks, filename, self._note_options)

    def delete_marks(self) -> None:
        """Delete it; it is no error if it is not there."""
        self._delete([self.keys.marks])

    # Listing and deleting

    def list_blobs(self, unknown: Callable[[int], None] = lambda size: None) -> Iterator[Listed]:
        """All blobs, in the order of their keys; a request per 1,000.

        What is not a blob of ours is left out; ``unknown`` is called with the size of each such object.
        """
        for found in self._list(self.keys.blobs):
            name = self.keys.parse(found["Key"])
            if name is not None:
                yield Listed(*name, found["Size"])
            else:
                unknown(found["Size"])

    def list_staged(self) -> Iterator[ListedStaged]:
        """All staged uploads, of this server and others."""
        for found in self._list(self.keys.staged):
            name = self.keys.parse_staged(found["Key"])
            if name is not None:
                yield ListedStaged(name, found["Size"], found["LastModified"])

    def list_uploads(self) -> Iterator[ListedUpload]:
        """All uploads in parts of blobs and to staging keys, of this server and others, that are not completed."""
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
            page = _ask(f"list bucket {self.name}", lambda: next(pages, None))
            if page is None:
                return
            yield from page.get(result, ())

    def abort_upload(self, upload: ListedUpload) -> None:
        """Delete the parts of ``upload``; it is no error if it is over."""
        try:
            _ask(
                f"abort an upload to {upload.key} of bucket {self.name}",
                lambda: self._client.abort_multipart_upload(
                    Bucket=self.name, Key=upload.key, UploadId=upload.upload_id
                ),
            )
        except BucketError as error:
            if error.code != "NoSuchUpload":
                raise

    def delete(self, blobs: Iterable[tuple[bytes, bytes]]) -> None:
        """Delete the blobs (oid, tid), 1,000 a request; absent ones are no error.

        Raises NotDeleted, which names the first that could not be deleted, after all were tried.
        """
        self._delete([self.keys.key(oid, tid) for oid, tid in blobs])

    def delete_staged(self, names: Iterable[str]) -> None:
        """The same for staged uploads."""
        self._delete([self.keys.staged_key(name) for name in names])

    def _delete(self, keys: list[str]) -> None:
        errors: dict[str, BucketError] = {}
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            errors |= self._delete_batch(batch) if self._batch_delete and len(batch) > 1 else self._delete_each(batch)
        if errors:
            first = next(iter(errors.values()))
            raise NotDeleted(
                f"{first}; {len(errors)} of {len(keys)} objects were not deleted", first.code, frozenset(errors)
            )

    def _delete_batch(self, keys: list[str]) -> dict[str, BucketError]:
        try:
            answer = self._client.delete_objects(
                Bucket=self.name, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        except botocore.exceptions.ClientError as error:
            failure = _bucket_error(error, f"delete objects of bucket {self.name}")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if isinstance(failure, BlobNotFound) or status not in (400, 405, 411, 501):
                return dict.fromkeys(keys, failure) if isinstance(failure, BucketError) else {}
            # Some services have no DeleteObjects, or want another checksum with it.
            logger.info("The service behind bucket %s has no batch delete: deleting one by one", self.name)
            self._batch_delete = False
            return self._delete_each(keys)
        except Exception as error:
            return dict.fromkeys(keys, _bucket_error(error, f"delete objects of bucket {self.name}"))
        refused = {e["Key"]: code_of(e) for e in answer.get("Errors", ()) if e.get("Code") != "NoSuchKey"}
        return {
            key: BucketError(f"Could not delete {key!r} of bucket {self.name}: {code or 'no reason is given'}", code)
            for key, code in refused.items()
        }

    def _delete_each(self, keys: list[str]) -> dict[str, BucketError]:
        futures = {key: self._parts.submit(self._client.delete_object, Bucket=self.name, Key=key) for key in keys}
        errors = {}
        for key, future in futures.items():
            error = future.exception()
            if error is not None:
                failure = _bucket_error(error, f"delete {key} of bucket {self.name}")
                if isinstance(failure, BucketError):
                    errors[key] = failure
        return errors


@dataclass
class _Range:
    """An answer whose body is still to be read."""

    body: Any
    length: int
    total: int
    etag: str
    checksum: tuple[str, str]


class _Progress(BaseSubscriber):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
        self._progress(bytes_transferred)


def _client(settings: BucketSettings) -> Any:
    config = botocore.config.Config(
        connect_timeout=settings.s3_connect_timeout,
        read_timeout=settings.s3_read_timeout,
        retries={"mode": "standard", "total_max_attempts": settings.s3_max_attempts},
        # Uploads, staged uploads, their parts, downloads and the parts of those each have a pool of threads.
        max_pool_connections=5 * settings.s3_concurrency,
        tcp_keepalive=True,
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        s3={"addressing_style": settings.s3_addressing_style},
    )
    for name in _TALKATIVE:
        talkative = logging.getLogger(name)
        talkative.setLevel(max(talkative.level, logging.INFO))
    session = botocore.session.get_session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
    client = _ask(
        f"set up the connection to bucket {settings.bucket_name}",
        lambda: boto3.session.Session(botocore_session=session).client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key,
            aws_secret_access_key=settings.s3_secret_key,
            use_ssl=settings.s3_use_ssl,
            config=config,
        ),
    )
    client.meta.events.register_first("needs-retry.s3", _give_up_if_cancelled)
    if settings.s3_checksums == "when_required":
        # The one checksum that every service understands and refuses a damaged body by.
        for operation in ("PutObject", "UploadPart", "DeleteObjects"):
            client.meta.events.register_last(f"before-call.s3.{operation}", _add_content_md5)
    return client


def _parse_timestamp(value: Any) -> datetime.datetime:
    # As botocore's, which takes two thirds of the time of a listing; in Python 3.10 the time zone may not be Z.
    with contextlib.suppress(AttributeError, ValueError):
        parsed = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
        if parsed.tzinfo is not None:
            return parsed
    return botocore.utils.parse_timestamp(value)


def _give_up_if_cancelled(caught_exception: BaseException | None = None, **kwargs: Any) -> None:
    # botocore takes what `_Progress` raises while a body is sent for a broken connection, and would try again.
    cause = caught_exception.__context__ if caught_exception is not None else None
    if isinstance(cause, TransferCancelled | botocore.exceptions.ClientError):  # the latter of another part
        raise cause


def _add_content_md5(params: dict[str, Any], **kwargs: Any) -> None:
    if params["body"] is not None:
        params["headers"].setdefault("Content-MD5", botocore.utils.calculate_md5(params["body"]))


class _Digest:
    """A `Sink` that keeps nothing but the checksum, of bytes that come in order."""

    def __init__(self, name: str) -> None:
        self._digest = hashlib.new(name, usedforsecurity=False)
        self.size = 0
        self.hexdigest = self._digest.hexdigest

    def write_at(self, data: bytes, position: int) -> None:
        # After an answer that broke off, what it brought comes again.
        self._digest.update(memoryview(data)[self.size - position :])
        self.size = max(self.size, position + len(data))


def _digest(name: str, filename: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with open(filename, "rb") as file:
        for chunk in iter(lambda: file.read(_READ), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(answer: dict[str, Any]) -> tuple[str, str]:
    """The algorithm and the hex digest of what an object that was got or looked up should hold; "" if unknown."""
    for name, value in answer["Metadata"].items():
        if name.lower() == _SHA256:  # some services capitalise it
            return _SHA256, value
    # An object that other software put there. Its ETag is its MD5 unless it is encrypted or came in parts.
    etag = answer["ETag"].strip('"')
    encrypted = answer.get("ServerSideEncryption") not in (None, "AES256") or answer.get("SSECustomerAlgorithm")
    return "md5", etag if re.fullmatch("[0-9a-f]{32}", etag) and not encrypted else ""


def _check(answer: _Range, size: int, digest: str) -> None:
    """Corrupt unless what was read has the size and the checksum, if there is one, that the object should have."""
    if size != answer.total:
        raise Corrupt(f"{size} bytes of {answer.total} arrived")
    name, expected = answer.checksum
    if expected and digest != expected:
        raise Corrupt(f"its {name} is {digest} and should be {expected[:64]!r}")


def _ask(what: str, call: Callable[[], T]) -> T:
    """What ``call`` returns; boto3's and urllib3's errors become ours, which say that ``what`` could not be done.

    OSErrors of this machine's disk, and errors that are ours already, pass.
    """
    try:
        return call()
    except _BODY_ERRORS as error:
        failure = _bucket_error(error, what)
    except (BucketError, BlobNotFound, Corrupt, TransferCancelled, OSError):
        raise
    except Exception as error:
        failure = _bucket_error(error, what)
    # Out of the except clauses, so that the original does not hang on it as its context, with all that it tells.
    raise failure


def _bucket_error(error: BaseException, what: str) -> Any:
    """The error to raise for what boto3 or urllib3 raised while it tried to do ``what``.

    Only S3's code and our own words go into it: S3's messages may repeat access keys and signed strings.
    """
    if isinstance(error, botocore.exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = code_of(error.response.get("Error", {})) or str(status)
        # The answer to HEAD has no body that could name a code. To anything else a bare 404 is no word on the
        # object: it may come from a proxy, or mean the bucket.
        if code == "NoSuchKey" or (error.operation_name == "HeadObject" and status == 404):
            return BlobNotFound(f"Could not {what}: there is no such object")
        advice = _ADVICE.get(code, "").format(_PERMISSIONS.get(error.operation_name, "it"))
        return BucketError(f"Could not {what}: the service answered {code} (HTTP {status}){advice}", code)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return BucketError(f"Could not {what}: no credentials{_ADVICE['NoCredentials']}", "NoCredentials")
    name = "ExpiredToken" if got_old_credentials(error) else type(error).__name__
    return BucketError(f"Could not {what}: {name}{_ADVICE.get(name, '')}", name)


_CREDENTIALS = "; check s3-access-key and s3-secret-key, or the credentials that boto3 finds"
_REGION = "; check s3-region and s3-endpoint-url"

#: What an operation has to be allowed.
_PERMISSIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "CopyObject": "s3:PutObject, or s3:GetObject of the source",
    "UploadPartCopy": "s3:PutObject, or s3:GetObject of the source",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}

#: What to do next, by the code of S3 or the name of what boto3 raised. In the place of {} comes the permission.
_ADVICE = {
    "NoSuchBucket": "; check bucket-name and s3-endpoint-url",
    "InvalidBucketName": "; check bucket-name",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "AuthFailure": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "NoCredentials": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "TokenRetrievalError": _CREDENTIALS,
    "AccessDenied": "; the policy of the bucket or of the credentials (s3-access-key) forbids {}",
    "403": "; the policy of the bucket or of the credentials (s3-access-key) forbids {}",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "InvalidRegionError": "; check s3-region, or AWS_REGION and AWS_DEFAULT_REGION in the environment",
    "ProfileNotFound": "; check AWS_PROFILE in the environment, or set s3-access-key and s3-secret-key",
    "EndpointResolutionError": "; check s3-endpoint-url and bucket-name",
    "ValueError": "; check s3-endpoint-url",
    "RequestTimeTooSkewed": "; check the clock of this machine",
    "InvalidStorageClass": "; check s3-storage-class",
    "MissingContentLength": "; set s3-checksums to when_required",
}

#: The codes that no waiting will cure, and the key whose value is to be looked at first.
MISCONFIGURED = {
    "NoSuchBucket": "bucket-name",
    "InvalidBucketName": "bucket-name",
    "ParamValidationError": "bucket-name",
    "InvalidAccessKeyId": "s3-access-key",
    "SignatureDoesNotMatch": "s3-secret-key",
    "AuthFailure": "s3-access-key",
    "InvalidToken": "s3-access-key",
    "NoCredentials": "s3-access-key",
    "AccessDenied": "s3-access-key",
    "403": "s3-access-key",
    "AuthorizationHeaderMalformed": "s3-region",
    "PermanentRedirect": "s3-region",
    "301": "s3-region",
    "InvalidRegionError": "s3-region",
    "ProfileNotFound": "s3-access-key",
    "EndpointResolutionError": "s3-endpoint-url",
    "ValueError": "s3-endpoint-url",
}
