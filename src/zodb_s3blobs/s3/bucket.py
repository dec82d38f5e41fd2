"""The bucket: put, get, copy, list and delete blobs, with checksums.

Every blob carries its SHA-256 in its object's metadata; it is checked on every download. Every method waits for S3
and so belongs on a worker thread, and may be called from any number of them at once. Errors are those of `s3errors`:
`BlobNotFound` for what is truly absent and `BucketError` for all else. An OSError is one of a local file.
"""

import contextlib
import datetime
import functools
import hashlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

import botocore.exceptions
from boto3.s3.transfer import TransferConfig
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber
from s3transfer.utils import OSUtils

from ..metrics import Metrics
from ..workers import DaemonPool
from .client import BucketSettings, Connection
from .errors import (
    BlobNotFound,
    BucketError,
    Damaged,
    Different,
    NotDeleted,
    TransferCancelled,
    code_of,
    local_file,
    reason_of_answer,
)
from .events import S3Events
from .keys import Keys

logger = logging.getLogger(__name__)

#: A blob up to this many bytes is read with one request; larger ones in parallel ranges of this size.
PART = 8 << 20

#: What is larger is copied in parts of this size, side by side: services write a copy at some 100 MB/s.
COPY_PART = 64 << 20

_SHA256 = "sha256"  # the name of the metadata entry, and the algorithm
_DELETE_BATCH = 1000  # the most keys that one DeleteObjects request may name
_PAGE = 200  # how many keys to ask for in a listing: while the answer is parsed, other threads have to wait
_COPY_LIMIT = 5 << 30  # larger objects cannot be copied in one request
_READ = 1 << 20
_MOST_MARKS = 1 << 30  # bytes of the object of the marks: ten million of them

_CONDITION_NOT_MET = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_NOT_UNDERSTOOD = {"InvalidArgument", "InvalidRequest", "400"}
_NOT_IMPLEMENTED = {"NotImplemented", "501", "MethodNotAllowed", "405"}
#: Codes of requests that could not be answered otherwise if they named one object.
_NO_WORD_ON_BATCHES = {"NoSuchBucket", "InvalidBucketName", "RequestTimeTooSkewed"}

#: The storage classes of objects that have to be restored before they can be read.
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}

Progress = Callable[[int], None]
T = TypeVar("T")


class Corrupt(Exception):
    """What arrived is not what was stored."""


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
    #: Whether its storage class says that it has to be restored before it can be read.
    archived: bool = False


@dataclass(frozen=True)
class Stored:
    """What the bucket tells of an object: ``size`` in bytes; ``digest`` in hex by ``algorithm``, "" if unknown."""

    size: int
    algorithm: str
    digest: str

    @property
    def is_proven(self) -> bool:
        """Whether the object carries the SHA-256 of what was stored.

        The MD5 that the service tells is that of the bytes as the service got them, from whomever.
        """
        return self.algorithm == _SHA256


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
    """A small object beside the blobs; ``written`` and ``now``: when that was, and is, by the clock of the service."""

    data: bytes
    written: datetime.datetime
    now: datetime.datetime
    etag: str

    @property
    def age(self) -> float:
        """How many seconds ago it was written."""
        return (self.now - self.written).total_seconds()


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
        # Of what is written again and again, or deleted soon: classes other than the usual one bill a month at least.
        self._short_lived_options = dict(self._write_options)
        if settings.s3_storage_class:
            self._write_options["StorageClass"] = settings.s3_storage_class
        #: What `ask` needs besides to read and to write as the other methods do.
        self.read_options, self.write_options = self._key_options, {**self._write_options, **self._key_options}
        self._connection = Connection(settings)
        self._client = self._connection.client
        self._metrics = metrics
        self._events = S3Events(self._client, metrics)
        self.endpoint_url: str = self._connection.endpoint_url
        pool_name = f"s3blobs {settings.bucket_name}"
        # Of its own: a part of a download must never wait for the download that waits for it.
        self._parts = DaemonPool(settings.s3_concurrency, f"{pool_name} part")
        transfers = functools.partial(self._transfer_manager, settings.s3_concurrency, f"{pool_name} transfer")
        self._uploads = transfers(settings.s3_multipart_threshold, PART)
        self._copies = transfers(COPY_PART, COPY_PART)
        self._batch_delete = True
        #: Whether, as far as is known, the service can copy.
        self.can_copy = True
        self._can_copy_parts = True
        self._etag_is_md5 = True  # of what is stored in one request

    def _transfer_manager(self, concurrency: int, pool_name: str, threshold: int, part: int) -> TransferManager:
        return TransferManager(
            self._client,
            TransferConfig(
                multipart_threshold=threshold,
                multipart_chunksize=part,
                max_concurrency=concurrency,
                preferred_transfer_client="classic",
            ),
            osutil=_LocalFiles(),
            executor_cls=functools.partial(DaemonPool, name=pool_name),  # type: ignore[arg-type]
        )

    def close(self) -> None:
        """Take no more requests; those under way are left to their daemon threads."""
        self._parts.shutdown(wait=False, cancel_futures=True)
        # It waits for the transfers that it cancels, which a silent service can make a long time.
        # As a context manager: `shutdown` with cancel fails in some versions.
        closed = TransferCancelled("The bucket has been closed")
        for transfers in self._uploads, self._copies:
            threading.Thread(target=transfers.__exit__, args=(type(closed), closed, None), daemon=True).start()
        self._connection.close()

    @property
    def last_answer(self) -> tuple[str | None, float]:
        """Why the last request was not answered, None if it was; and the reading of `time.monotonic` at that time."""
        return self._events.last_answer

    def probe(self) -> None:
        """Ask for one key: BucketError if bucket, credentials, permission to list or connection are not right."""
        self._ask(
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

        what = f"{operation.replace('_', ' ')} {options.get('Key', '')}".rstrip()
        return self._ask(f"{what} in bucket {self.name}", ask)

    # Writing

    def put(self, oid: bytes, tid: bytes, filename: str, progress: Progress | None = None) -> None:
        """Store the bytes of ``filename`` as blob (oid, tid).

        ``progress`` is called with the number of bytes of each step, from several threads; the `TransferCancelled`
        that it may raise ends the upload and is raised here.
        """
        self._upload(self.keys.key(oid, tid), filename, self._write_options, progress)

    def put_staged(self, name: str, filename: str, progress: Progress | None = None) -> str:
        """Store the bytes of ``filename`` at the staging key ``name``, as `put`; return their SHA-256 in hex."""
        return self._upload(self.keys.staged_key(name), filename, self._short_lived_options, progress)

    def _upload(self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None) -> str:
        started = time.monotonic()
        digest = self._put(key, filename, write_options, progress)
        self._metrics.upload_duration.observe(time.monotonic() - started)
        self._metrics.upload_size.observe(os.path.getsize(filename))
        self._metrics.upload_last_success.set_to_current_time()
        return digest

    def _put(self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None = None) -> str:
        digest = _digest(_SHA256, filename)
        options = {"Metadata": {_SHA256: digest}, **write_options, **self._key_options}
        small = os.path.getsize(filename) < min(self._multipart_threshold, PART)
        put = self._put_small if small else self._put_large
        put(f"store {key} in bucket {self.name}", key, filename, options, progress)
        return digest

    def _put_small(
        self, what: str, key: str, filename: str, options: dict[str, Any], progress: Progress | None
    ) -> None:
        # From memory: a body with a read method, which botocore also makes of bytes, would make it send
        # `Expect: 100-continue` and wait one more round trip for the answer.
        with open(filename, "rb") as file:
            body = bytearray(file.read())
        if progress is not None:
            progress(0)
        answer = self._ask(what, lambda: self._client.put_object(Bucket=self.name, Key=key, Body=body, **options))
        self._check_customer_key_used(answer, key)
        self._check_arrived(what, key, body, answer)

    def _check_arrived(self, what: str, key: str, body: bytearray, answer: dict[str, Any]) -> None:
        """Raise BucketError if the ETag that the service answers is an MD5, and not that of ``body``."""
        etag = _md5_of(answer)
        if not (self._etag_is_md5 and etag) or etag == hashlib.md5(body, usedforsecurity=False).hexdigest():
            return
        try:
            self._read_back(key)
        except Damaged:
            raise BucketError(
                f"Could not {what}: the service has stored other bytes than were sent; something between damages them",
                reason="damaged",
            ) from None
        logger.info("The service behind bucket %s does not make ETags of MD5: they are not compared", self.name)
        self._etag_is_md5 = False

    def _put_large(
        self, what: str, key: str, filename: str, options: dict[str, Any], progress: Progress | None
    ) -> None:
        subscribers = [_Progress(progress)] if progress is not None else []
        size = os.path.getsize(filename)
        self._transfer(
            what,
            key,
            size,
            options["Metadata"],
            lambda: self._uploads.upload(filename, self.name, key, options, subscribers),
        )

    def _transfer(self, what: str, key: str, size: int, metadata: dict[str, str], begin: Callable[[], Any]) -> None:
        """Wait for the transfer in parts that ``begin`` begins, of ``size`` bytes with ``metadata`` to ``key``."""
        try:
            self._ask(what, lambda: begin().result())
        except BucketError as error:
            # The answer to its completion was lost, perhaps, and the completion asked for again.
            if error.code != "NoSuchUpload" or not self._is_there(key, size, metadata):
                raise
        if self._key_options:
            self._check_customer_key_used({}, key)

    def _is_there(self, key: str, size: int, metadata: dict[str, str]) -> bool:
        try:
            head = self._head(key)
        except BlobNotFound:
            return False
        return head["ContentLength"] == size and _sha256_in(head["Metadata"]) == _sha256_in(metadata) != ""

    def _check_customer_key_used(self, answer: dict[str, Any], key: str) -> None:
        if not self._key_options or answer.get("SSECustomerAlgorithm"):
            return
        # Some services do not say so when they copy, and some say so of what is not encrypted. What is encrypted, none
        # of them tells anything of without the key.
        # (Not by HEAD, to whose refusal boto3 answers with requests for the region of the bucket.)
        look = functools.partial(self._client.get_object, Bucket=self.name, Key=key, Range="bytes=0-0")
        try:
            self._ask(f"read {key} of bucket {self.name} without its key", lambda: look()["Body"].close())
        except BucketError as error:
            if error.reason != "request":
                raise
        else:
            # The blob is in the bucket in the clear; the abort of its transaction deletes it.
            raise BucketError(
                f"The service behind bucket {self.name} ignores s3-sse-customer-key and stores blobs unencrypted; "
                f"remove s3-sse-customer-key, or use s3-sse or a service that supports SSE-C"
            )

    def copy(self, oid: bytes, source_tid: bytes, tid: bytes) -> None:
        """Copy blob (oid, source_tid) to (oid, tid) inside the bucket, with its metadata.

        Raises BlobNotFound if there is no such source. After a BucketError whose reason is "timeout" the service may
        still be copying.
        """
        source = self.keys.key(oid, source_tid)
        head = self._head(source)
        self._copy(source, self.keys.key(oid, tid), head["ContentLength"], head["Metadata"], head.get("ContentType"))

    def publish_staged(self, name: str, oid: bytes, tid: bytes, size: int, digest: str) -> None:
        """Copy what `put_staged` stored at ``name`` to blob (oid, tid). The errors are those of `copy`.

        ``size``: its bytes; ``digest``: what `put_staged` returned.
        """
        self._copy(self.keys.staged_key(name), self.keys.key(oid, tid), size, {_SHA256: digest})

    def _copy(
        self, source: str, key: str, size: int, metadata: dict[str, str], content_type: str | None = None
    ) -> None:
        what = f"copy {source} to {key} in bucket {self.name}"
        place = {"Bucket": self.name, "Key": source}
        # Some services lose the metadata of a copy, and with it the checksum, unless it is given again.
        options = {"Metadata": metadata, "MetadataDirective": "REPLACE"}
        options |= {"ContentType": content_type} if content_type else {}
        options |= {**self._write_options, **self._key_options, **self._copy_source_key_options}
        try:
            if size > COPY_PART and self._can_copy_parts:
                try:
                    begin = functools.partial(self._copies.copy, place, self.name, key, options)
                    self._transfer(what, key, size, metadata, begin)
                    return
                except BucketError as error:
                    if error.code not in _NOT_IMPLEMENTED or size > _COPY_LIMIT:
                        raise
                    self._can_copy_parts = False
            answer = self._ask(
                what, lambda: self._client.copy_object(Bucket=self.name, Key=key, CopySource=place, **options)
            )
            self._check_customer_key_used(answer, key)
        except BucketError as error:
            if error.code in _NOT_IMPLEMENTED:
                self.can_copy = False
            # It may have been done, and the answer lost.
            if error.reason != "connection" or not self._is_there(key, size, metadata):
                raise

    # Reading

    def look_up(self, oid: bytes, tid: bytes) -> Stored | None:
        """Return what the bucket tells of blob (oid, tid), None if it is not there."""
        try:
            return _stored(self._head(self.keys.key(oid, tid)))
        except BlobNotFound:
            return None

    def find(self, oid: bytes, tid: bytes, filename: str) -> Stored | None:
        """Return what the bucket tells of blob (oid, tid), None if it is not there.

        Raises Different if it is not the blob in ``filename``: size and checksum tell, the size alone if the object
        carries no checksum.
        """
        key = self.keys.key(oid, tid)
        stored = self.look_up(oid, tid)
        if stored is None:
            return None
        same = stored.size == os.path.getsize(filename)
        if not same or (stored.digest and stored.digest != _digest(stored.algorithm, filename)):
            raise self._different(key)
        return stored

    def prove(self, oid: bytes, tid: bytes, filename: str) -> None:
        """Give blob (oid, tid), which carries no SHA-256, that of ``filename``, by storing it again.

        Raises Different, and leaves it as it is, if its bytes are others.
        """
        key = self.keys.key(oid, tid)
        digest = _digest(_SHA256, filename)
        # Read twice before it is said: without a checksum, nothing else tells what was damaged on its way.
        if digest not in (self._read_back(key, _SHA256)[1] for _ in range(2)):
            raise self._different(key)
        self.put(oid, tid, filename)

    def _different(self, key: str) -> Different:
        return Different(
            f"{key} in bucket {self.name} exists already and is another blob: "
            f"does another database use this s3-prefix? It was left as it is"
        )

    def _head(self, key: str) -> dict[str, Any]:
        return self._ask(
            f"look up {key} in bucket {self.name}",
            lambda: self._client.head_object(Bucket=self.name, Key=key, **self._key_options),
        )

    def verify(self, oid: bytes, tid: bytes) -> Stored:
        """Read blob (oid, tid) and check it, without keeping it; return what it was checked by.

        Raises BlobNotFound, Damaged, or BucketError if S3 fails.
        """
        return self._read_back(self.keys.key(oid, tid))[0]

    def open(self, oid: bytes, tid: bytes) -> "Opened":
        """Ask for the first part of blob (oid, tid), for `get` to read. The caller closes what is returned.

        Raises BlobNotFound and BucketError.
        """
        return self._open_range(self.keys.key(oid, tid), 0, PART)

    def get(self, oid: bytes, tid: bytes, file: Target, opened: "Opened | None" = None) -> int:
        """Write blob (oid, tid) into the empty ``file``; return its size in bytes.

        ``opened``: what `open` returned, if it was called. One request for up to `PART` bytes, else parallel ranges.
        When it returns, size and checksum are right. Raises BlobNotFound, BucketError, or the OSError of a full disk.
        """
        started = opened.asked if opened is not None else time.monotonic()
        stored = self._get_verified(self.keys.key(oid, tid), file, opened=opened)
        self._metrics.download_duration.observe(time.monotonic() - started)
        self._metrics.download_size.observe(stored.size)
        if not stored.is_proven:
            self._metrics.download_unproven.inc()
        return stored.size

    def _get_verified(self, key: str, file: Target, most: int | None = None, opened: "Opened | None" = None) -> Stored:
        answers = [opened] if opened is not None else []

        def get() -> Stored:
            file.clear()
            return self._get(key, file, most, answers.pop() if answers else self._open_range(key, 0, PART))

        return self._verified(key, get)

    def _verified(self, key: str, read: Callable[[], Any]) -> Any:
        """Return what ``read`` returns, which raises Corrupt if what it read is not right; then it is called again."""
        what = f"read {key} of bucket {self.name}"
        for attempt in range(1, self._attempts + 1):
            try:
                return read()
            except Corrupt as error:
                self._metrics.download_checksum_failures.inc()
                logger.error("Could not %s: %s (attempt %d of %d)", what, error, attempt, self._attempts)
                damage = str(error)
        raise Damaged(f"Could not {what}: {damage}. The object is damaged or was changed; restore it from a backup")

    def _get(self, key: str, file: Target, most: int | None, first: "Opened") -> Stored:
        size = first.stored.size
        if most is not None and size > most:
            first.close()
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
        algorithm, expected = first.stored.algorithm, first.stored.digest
        _check(first.stored, os.path.getsize(file.path), _digest(algorithm, file.path) if expected else "")
        return first.stored

    def _read_back(self, key: str, algorithm: str = "") -> tuple[Stored, str]:
        """Read an object, check it, and keep nothing of it; return what it was checked by, and its digest in hex.

        ``algorithm``: of the digest, by default the one that it is checked by. The errors are those of `verify`.
        """

        def read() -> tuple[Stored, str]:
            first = self._open_range(key, 0, PART)
            stored = first.stored
            checked, wanted = _Digest(stored.algorithm), _Digest(algorithm or stored.algorithm)
            both = _Both(checked, wanted)
            self._get_range(key, 0, first.length, first.etag, both, opened=first)
            for start in range(first.length, stored.size, PART):
                self._get_range(key, start, min(start + PART, stored.size), first.etag, both)
            _check(stored, checked.size, checked.hexdigest())
            return stored, wanted.hexdigest()

        return self._verified(key, read)

    def _get_range(self, key: str, start: int, end: int, etag: str, file: Sink, opened: "Opened | None" = None) -> None:
        """Write bytes start to end of the object to their place in the file; a broken body is asked for again.

        Here, because the repetitions of a request end with the headers. What is wrong with the whole object is
        `_verified`'s.
        """
        for attempt in range(1, self._attempts + 1):
            answer = opened or self._open_range(key, start, end)
            opened = None
            try:
                if answer.etag != etag:
                    raise Corrupt("it was replaced while it was being read")
                failure = self._write(answer, start, end, file)
            finally:
                answer.close()
            if failure is None:
                return
            code = failure.code if isinstance(failure, BucketError) else type(failure).__name__
            logger.warning("The answer for %s broke off (attempt %d): %s", key, attempt, code)
            if attempt == self._attempts:
                raise failure

    def _write(self, answer: "Opened", start: int, end: int, file: Sink) -> BucketError | Corrupt | None:
        """Write the body of ``answer`` to its place in ``file``; return why it broke off, None if it did not."""
        position = start
        try:
            while chunk := self._ask(f"read {answer.key} of bucket {self.name}", lambda: answer.body.read(_READ)):
                file.write_at(chunk, position)
                position += len(chunk)
        except BucketError as error:
            if error.reason == "damaged":
                raise Corrupt("it does not have the checksum that the service sent with it") from None
            return error
        return None if position == end else Corrupt(f"{position - start} bytes of {end - start} arrived")

    def _open_range(self, key: str, start: int, end: int) -> "Opened":
        options = {"Bucket": self.name, "Key": key, **self._key_options}

        def get() -> dict[str, Any]:
            try:
                return self._client.get_object(Range=f"bytes={start}-{end - 1}", **options)
            except botocore.exceptions.ClientError as error:
                if start or error.response.get("Error", {}).get("Code") not in ("InvalidRange", "416"):
                    raise
            return self._client.get_object(**options)  # an empty object has no first byte to ask for

        asked = time.monotonic()
        answer = self._ask(f"read {key} of bucket {self.name}", get)
        stored, length = _stored(answer), answer["ContentLength"]
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange") or "")
        if match:
            stored = replace(stored, size=int(match[3]))
        elif start:
            # The service ignores ranges and would send everything: only the first request may be answered so.
            answer["Body"].close()
            raise Corrupt("the service answered one range with the whole object and another with a part")
        return Opened(key, answer["Body"], length, stored, answer.get("ETag", ""), asked)

    # Beside the blobs

    def read_owner(self) -> Note | None:
        """The object that says whose the prefix is, if there is one."""

        def read() -> Note:
            answer = self._client.get_object(Bucket=self.name, Key=self.keys.owner, **self._key_options)
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.datetime.now(datetime.timezone.utc)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read(_READ)
            return Note(data, answer["LastModified"], now, answer.get("ETag", ""))

        try:
            return self._ask(f"read {self.keys.owner} of bucket {self.name}", read)
        except BlobNotFound:
            return None

    def write_owner(self, data: bytes, instead_of: Note | None) -> None:
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

    # Listing and deleting

    def list_blobs(self, unknown: Callable[[int], None] = lambda size: None) -> Iterator[Listed]:
        """All blobs, in the order of their keys; a request per 1,000.

        What is not a blob of ours is left out; ``unknown`` is called with the size of each such object.
        """
        for found in self._list(self.keys.blobs):
            name = self.keys.parse(found["Key"])
            if name is not None:
                yield Listed(*name, found["Size"], found.get("StorageClass") in _ARCHIVES)
            else:
                unknown(found["Size"])

    def list_tids(self, oid: bytes) -> Iterator[bytes]:
        """Yield the tids of all blobs of the object ``oid``."""
        for found in self._list(self.keys.of_object(oid)):
            name = self.keys.parse(found["Key"])
            if name is not None:
                yield name[1]

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
            page = self._ask(f"list bucket {self.name}", lambda: next(pages, None))
            if page is None:
                return
            yield from page.get(result, ())

    def abort_upload(self, upload: ListedUpload) -> None:
        """Delete the parts of ``upload``; it is no error if it is over."""
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
            # Some services have no DeleteObjects, or want another checksum with it. That it is not allowed, or not
            # now, says nothing about that.
            if error.reason != "request" or error.code in _NO_WORD_ON_BATCHES:
                return dict.fromkeys(keys, error)
            logger.info("The service behind bucket %s has no batch delete: deleting one by one", self.name)
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

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        return self._connection.ask(what, call)


class Opened:
    """An answer whose body is still to be read. ``asked``: a reading of `time.monotonic`; ``length``: of the body."""

    def __init__(self, key: str, body: Any, length: int, stored: Stored, etag: str, asked: float) -> None:
        self.key = key
        self.body = body
        self.length = length
        #: What the answer tells of the whole object.
        self.stored = stored
        self.etag = etag
        self.asked = asked

    def close(self) -> None:
        """Give up what has not been read; a second call does nothing."""
        self.body.close()


class _LocalFiles(OSUtils):
    """The files that s3transfer sends: what goes wrong with them is no error of S3."""

    def open(self, filename: str, mode: str) -> Any:
        with local_file():
            return _LocalFile(filename, mode)


class _LocalFile(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        with local_file():
            return super().read(-1 if size is None else size)


class _Progress(BaseSubscriber):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
        self._progress(bytes_transferred)


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


class _Both:
    """A `Sink` that passes on what is written to two others."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write_at(self, data: bytes, position: int) -> None:
        for sink in self._sinks:
            sink.write_at(data, position)


def _digest(name: str, filename: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with open(filename, "rb") as file:
        for chunk in iter(lambda: file.read(_READ), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _stored(answer: dict[str, Any]) -> Stored:
    """Return what the answer to a GET or HEAD of an object tells of it."""
    size, sha256 = answer["ContentLength"], _sha256_in(answer["Metadata"])
    # What other software put there has none.
    return Stored(size, _SHA256, sha256) if sha256 else Stored(size, "md5", _md5_of(answer))


def _sha256_in(metadata: dict[str, str]) -> str:
    # Some services capitalise the name.
    return next((value for name, value in metadata.items() if name.lower() == _SHA256), "")


def _md5_of(answer: dict[str, Any]) -> str:
    """Return the MD5 of an object in hex, "" if its ETag is none: it came in parts, or is encrypted."""
    etag = answer.get("ETag", "").strip('"')
    encrypted = answer.get("ServerSideEncryption") not in (None, "AES256") or answer.get("SSECustomerAlgorithm")
    return etag if re.fullmatch("[0-9a-f]{32}", etag) and not encrypted else ""


def _check(stored: Stored, size: int, digest: str) -> None:
    """Raise Corrupt unless what was read has the size and the checksum, if there is one, of the object."""
    if size != stored.size:
        raise Corrupt(f"{size} bytes of {stored.size} arrived")
    if stored.digest and digest != stored.digest:
        raise Corrupt(f"its {stored.algorithm} is {digest} and should be {stored.digest[:64]!r}")
