"""Uploads, and copies inside the bucket: on success the blob is stored, with its checksum.

A blob that is still arriving is streamed to a staging key; its checksum is known at the end, and the copy that
publishes the blob stores it.
"""

import functools
import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber
from s3transfer.utils import OSUtils

from ..digest import SHA256, digest_of
from ..metrics import Metrics
from ..workers import DaemonPool
from .client import BucketSettings
from .download import PART, Downloads, Stored, md5_of, sha256_in
from .errors import NOT_IMPLEMENTED, BlobDamaged, BlobNotFound, BucketError, TransferCancelled, local_file

logger = logging.getLogger(__name__)

#: Larger objects are copied in parallel parts of this size in bytes: services write a copy at some 100 MB/s.
COPY_PART = 64 << 20

_COPY_LIMIT = 5 << 30  # larger objects cannot be copied in one request

#: The most streamed uploads at once. Each has a thread that waits for its bytes; further streams wait for a thread.
STREAMS = 64

#: The most parts of streamed uploads that are sent at once: these are in memory, and one more.
STREAM_PARTS = 8

#: The most bytes of a streamed upload: an upload has at most 10,000 parts, and here each has the same size.
STREAM_LIMIT = 10_000 * PART

Progress = Callable[[int], None]


class Body(Protocol):
    """A blob that is still arriving. One thread at a time waits and reads.

    Both methods raise TransferCancelled when the blob is given up; `read` raises the OSError of a local file.
    """

    def wait(self, size: int) -> None:
        """Wait until the next ``size`` bytes have arrived, or the last byte of the blob."""

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, after the same wait; fewer only at the end of the blob, none after it."""


class Uploads(Downloads):
    """The uploads to a bucket, and the copies inside it."""

    def __init__(self, settings: BucketSettings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._multipart_threshold = settings.s3_multipart_threshold
        self._uploads = self._transfer_manager(settings, settings.s3_multipart_threshold, PART)
        self._copies = self._transfer_manager(settings, COPY_PART, COPY_PART)
        # Of its own: streams of slow clients occupy its threads, and its parts the memory.
        self._streams = self._transfer_manager(
            settings,
            PART,
            PART,
            max_submission_concurrency=STREAMS,
            max_in_memory_upload_chunks=min(STREAM_PARTS, settings.s3_concurrency),
        )
        self._turn = threading.Lock()  # to have a part in memory that is not being sent yet
        # The C library keeps what a thread has freed for that thread: with parts allocated by each stream's own thread,
        # 16 streams took 320 MiB.
        self._reader = DaemonPool(1, f"s3blobs {self.name} reader")
        #: False once the service has shown that it cannot copy.
        self.can_copy = True
        self._can_copy_parts = True
        self._etag_is_md5 = True  # of objects stored in one request

    def _transfer_manager(self, settings: BucketSettings, threshold: int, part: int, **limits: int) -> TransferManager:
        return TransferManager(
            self._client,
            TransferConfig(
                multipart_threshold=threshold,
                multipart_chunksize=part,
                max_request_concurrency=settings.s3_concurrency,
                **limits,
            ),
            osutil=_LocalFiles(),
            executor_cls=functools.partial(_TransferPool, name=f"s3blobs {self.name} transfer"),  # type: ignore[arg-type]
        )

    def close(self) -> None:
        """Refuse new requests; daemon threads finish those under way."""
        super().close()
        # In threads: `__exit__` waits for the transfers that it cancels, and a silent service delays them for long.
        # Not by `shutdown` with cancel, which fails in some versions.
        closed = TransferCancelled("The bucket has been closed")

        def end(transfers: TransferManager) -> None:
            transfers.__exit__(type(closed), closed, None)
            if transfers is self._streams:
                self._reader.shutdown(wait=False)

        for transfers in self._uploads, self._copies, self._streams:
            threading.Thread(target=end, args=(transfers,), daemon=True).start()

    def put(self, oid: bytes, tid: bytes, filename: str, progress: Progress | None = None, digest: str = "") -> str:
        """Upload ``filename`` as blob (oid, tid); return its SHA-256 in hex, which is ``digest`` if that is given.

        Waits for S3; raises BucketError, or the OSError of the file.

        ``progress`` is called with the number of bytes of each step, from several threads. A `TransferCancelled` that
        it raises ends the upload and is raised here.
        """
        return self._upload(self.keys.key(oid, tid), filename, self._write_options, progress, digest)

    def put_staged(self, name: str, filename: str, progress: Progress | None = None) -> str:
        """Upload ``filename`` to the staging key ``name``, with `put`'s errors; return its SHA-256 in hex."""
        return self._upload(self.keys.staged_key(name), filename, self._short_lived_options, progress)

    @property
    def can_stream(self) -> bool:
        """True if `put_staged_stream` may be called: s3-multipart-threshold allows parts of `PART` bytes."""
        return self._multipart_threshold <= PART

    def put_staged_stream(self, name: str, body: Body, progress: Progress | None = None) -> str:
        """Upload ``body`` to the staging key ``name`` while it arrives; return its SHA-256 in hex.

        Waits for the end of ``body``, and for S3. Raises `put`'s errors; a failure of S3 shows when the next part, or
        the end, has arrived. ``name`` must be new: the object carries no checksum by which to know it.
        """
        key = self.keys.staged_key(name)
        what = f"store {key} in bucket {self.name}"
        options = {**self._short_lived_options, **self._key_options}
        stream = _Stream(what, body, self._turn, self._reader)
        subscribers = [stream, *_reporting(progress)]
        started = time.monotonic()
        try:
            self._transfer(
                what,
                key,
                lambda: self._streams.upload(stream, self.name, key, options, subscribers),
                lambda: self._is_there(key, stream.size),
            )
        finally:
            stream.end_turn()
        self._count_upload(time.monotonic() - started - stream.waited, stream.size)
        return stream.hexdigest()

    def _upload(
        self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None, digest: str = ""
    ) -> str:
        started, size = time.monotonic(), os.path.getsize(filename)
        digest = self._put(key, filename, size, write_options, progress, digest)
        self._count_upload(time.monotonic() - started, size)
        return digest

    def _count_upload(self, seconds: float, size: int) -> None:
        self._metrics.upload_duration.observe(seconds)
        self._metrics.upload_size.observe(size)
        self._metrics.upload_last_success.set_to_current_time()

    def _put(
        self,
        key: str,
        filename: str,
        size: int,
        write_options: dict[str, Any],
        progress: Progress | None = None,
        digest: str = "",
    ) -> str:
        digest = digest or digest_of(SHA256, filename)
        options = {"Metadata": {SHA256: digest}, **write_options, **self._key_options}
        put = self._put_small if size < min(self._multipart_threshold, PART) else self._put_large
        put(f"store {key} in bucket {self.name}", key, filename, size, options, progress)
        return digest

    def _put_small(
        self, what: str, key: str, filename: str, size: int, options: dict[str, Any], progress: Progress | None
    ) -> None:
        # From a bytearray: with a body that has a read method, which botocore also makes of bytes, it sends
        # `Expect: 100-continue` and waits one more round trip for the answer.
        body = bytearray(size)
        with open(filename, "rb", buffering=0) as file:
            file.readinto(body)
        if progress is not None:
            progress(0)
        answer = self._ask(what, lambda: self._client.put_object(Bucket=self.name, Key=key, Body=body, **options))
        self._check_customer_key_used(answer, key)
        self._check_arrived(what, key, body, answer)

    def _check_arrived(self, what: str, key: str, body: bytearray, answer: dict[str, Any]) -> None:
        """Raise BucketError if the ETag in ``answer`` is an MD5 and differs from that of ``body``."""
        etag = md5_of(answer)
        if not (self._etag_is_md5 and etag) or etag == hashlib.md5(body, usedforsecurity=False).hexdigest():
            return
        try:
            self._read_back(key)
        except BlobDamaged:
            raise BucketError(
                f"Could not {what}: the service stored other bytes than were sent; check the network and the proxies "
                f"in between",
                reason="damaged",
            ) from None
        logger.info("The ETags of bucket %s are not MD5 checksums: not comparing them", self.name)
        self._etag_is_md5 = False

    def _put_large(
        self, what: str, key: str, filename: str, size: int, options: dict[str, Any], progress: Progress | None
    ) -> None:
        self._transfer(
            what,
            key,
            lambda: self._uploads.upload(filename, self.name, key, options, _reporting(progress)),
            lambda: self._is_there(key, size, options["Metadata"]),
        )

    def _transfer(self, what: str, key: str, begin: Callable[[], Any], is_there: Callable[[], bool]) -> None:
        """Wait for the multipart transfer to ``key`` that ``begin`` starts. ``is_there`` asks S3 for its result."""
        try:
            self._ask(what, lambda: begin().result())
        except BucketError as error:
            # Perhaps the answer to the completion was lost, and the completion was sent again.
            if error.code != "NoSuchUpload" or not is_there():
                raise
        if self._key_options:
            self._check_customer_key_used({}, key)

    def _is_there(self, key: str, size: int, metadata: dict[str, str] | None = None) -> bool:
        """Return whether ``key`` has an object of ``size`` bytes, and with the SHA-256 in ``metadata`` if given."""
        try:
            head = self._head(key)
        except BlobNotFound:
            return False
        same = metadata is None or sha256_in(head["Metadata"]) == sha256_in(metadata) != ""
        return same and head["ContentLength"] == size

    def _check_customer_key_used(self, answer: dict[str, Any], key: str) -> None:
        if not self._key_options or answer.get("SSECustomerAlgorithm"):
            return
        # Some services omit that header when they copy, and some send it for objects that they do not encrypt. But no
        # service reads an encrypted object without its key.
        # (Not by HEAD: when it is refused, boto3 sends requests for the region of the bucket.)
        look = functools.partial(self._client.get_object, Bucket=self.name, Key=key, Range="bytes=0-0")
        try:
            self._ask(f"read {key} of bucket {self.name} without its key", lambda: look()["Body"].close())
        except BucketError as error:
            if error.reason != "request":
                raise
        else:
            # The bucket now has the blob unencrypted; the abort of its transaction deletes the blob.
            raise BucketError(
                f"The service behind bucket {self.name} ignores s3-sse-customer-key and stores blobs unencrypted; "
                f"remove s3-sse-customer-key, or use s3-sse or a service that supports SSE-C"
            )

    def copy(self, oid: bytes, source_tid: bytes, tid: bytes) -> None:
        """Copy blob (oid, source_tid) to (oid, tid) inside the bucket, with its metadata.

        Waits for S3. Raises BlobNotFound if the bucket does not have the source, and BucketError; if its reason is
        "timeout", the service may still be copying.
        """
        source = self.keys.key(oid, source_tid)
        head = self._head(source)
        self._copy(source, self.keys.key(oid, tid), head["ContentLength"], head["Metadata"], head.get("ContentType"))

    def publish(self, source: str, oid: bytes, tid: bytes, size: int, digest: str) -> None:
        """Copy the object with the key ``source`` to blob (oid, tid). Raises the errors of `copy`.

        ``size``: that of the blob in bytes; ``digest``: its SHA-256 in hex.
        """
        self._copy(source, self.keys.key(oid, tid), size, {SHA256: digest})

    def copy_from(self, other: Downloads, oid: bytes, tid: bytes, stored: Stored) -> None:
        """Copy blob (oid, tid) of the bucket ``other`` into this bucket, inside the service that both are at.

        ``stored``: the metadata of the source, which must be proven. The request is made with the credentials of this
        bucket. Raises the errors of `copy`; BucketError too if these may not read ``other``, or the source has changed.
        """
        source, metadata = other.keys.key(oid, tid), {SHA256: stored.digest}
        self._copy(source, self.keys.key(oid, tid), stored.size, metadata, of=other, etag=stored.etag)

    def _copy(
        self,
        source: str,
        key: str,
        size: int,
        metadata: dict[str, str],
        content_type: str | None = None,
        of: Downloads | None = None,
        etag: str = "",
    ) -> None:
        """Copy the object ``source`` of the bucket ``of``, by default this one; ``etag``: the one that it must have."""
        of = of or self
        elsewhere = f" of bucket {of.name}" if of is not self else ""
        what = f"copy {source}{elsewhere} to {key} in bucket {self.name}"
        place = {"Bucket": of.name, "Key": source}
        # Some services lose the metadata of a copy, and so the checksum, unless the request repeats it.
        options = {"Metadata": metadata, "MetadataDirective": "REPLACE"}
        options |= {"ContentType": content_type} if content_type else {}
        options |= {"CopySourceIfMatch": etag} if etag else {}
        options |= {**self._write_options, **self._key_options, **of._copy_source_key_options}
        try:
            if size > COPY_PART and self._can_copy_parts:
                try:
                    begin = functools.partial(self._copies.copy, place, self.name, key, options)
                    self._transfer(what, key, begin, functools.partial(self._is_there, key, size, metadata))
                    return
                except BucketError as error:
                    if error.code not in NOT_IMPLEMENTED or size > _COPY_LIMIT:
                        raise
                    self._can_copy_parts = False
            answer = self._ask(
                what, lambda: self._client.copy_object(Bucket=self.name, Key=key, CopySource=place, **options)
            )
            self._check_customer_key_used(answer, key)
        except BucketError as error:
            if error.code in NOT_IMPLEMENTED:
                self.can_copy = False
            # Perhaps the copy succeeded, and the answer was lost.
            if error.reason != "connection" or not self._is_there(key, size, metadata):
                raise


class _TransferPool(DaemonPool):
    """A pool for s3transfer, in which transfers take turns: a blob of two parts does not wait for one of thousands."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        # The tasks of one transfer still start in order, so those that wait for others of it hold nobody up.
        return self.submit_all(fn.transfer_id, [functools.partial(fn, *args, **kwargs)])[0]


class _LocalFiles(OSUtils):
    """The local files that s3transfer sends; their errors are marked, so that they do not pass for errors of S3."""

    def open(self, filename: str, mode: str) -> Any:
        with local_file():
            return _LocalFile(filename, mode)


class _LocalFile(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        with local_file():
            return super().read(-1 if size is None else size)


class _Stream(BaseSubscriber):
    """The ``body`` of a streamed upload as s3transfer reads it: in one thread, part after part.

    s3transfer takes a part that was read when few enough others are being sent. ``turn`` is held from the read until
    then, so that the parts of many streams do not wait in memory. A stream that waits for its bytes does not hold it.
    ``what``: the action for messages; ``reader``: the thread that reads.
    """

    def __init__(self, what: str, body: Body, turn: threading.Lock, reader: DaemonPool) -> None:
        self._what = what
        self._body = body
        self._reader = reader
        self._turn = turn
        self._has_turn = False
        self._transfer: Any = None
        self._digest = hashlib.new(SHA256, usedforsecurity=False)
        self.hexdigest = self._digest.hexdigest
        self.size = 0
        #: Seconds spent on waiting for ``body``.
        self.waited = 0.0

    def on_queued(self, future: Any, **kwargs: Any) -> None:
        self._transfer = future

    def read(self, size: int = -1) -> bytes:
        self.end_turn()  # s3transfer has taken the part before
        if size < 0:
            return b""  # s3transfer asks for the rest of a small blob, after it has read to the end
        started = time.monotonic()
        self._body.wait(size)
        self.waited += time.monotonic() - started
        self._turn.acquire()
        self._has_turn = True
        data = b""
        try:
            if self._transfer.done():
                raise TransferCancelled()  # the error of the part that failed came first, and is reported
            with local_file():
                data = self._reader.submit(self._body.read, size).result()
        finally:
            if not data:
                self.end_turn()
        if data and self.size >= STREAM_LIMIT:
            raise BucketError(
                f"Could not {self._what}: it is larger than {STREAM_LIMIT} bytes, the most that can be uploaded while "
                f"it arrives; set s3-multipart-threshold to more than {PART} bytes, and blobs are uploaded when they "
                f"have arrived"
            )
        self._digest.update(data)
        self.size += len(data)
        return data

    def end_turn(self) -> None:
        """Let another stream read a part, if this one has the turn."""
        if self._has_turn:
            self._has_turn = False
            self._turn.release()


def _reporting(progress: Progress | None) -> list[BaseSubscriber]:
    return [_Progress(progress)] if progress is not None else []


class _Progress(BaseSubscriber):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
        self._progress(bytes_transferred)
