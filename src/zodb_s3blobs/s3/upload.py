"""Uploads, and copies inside the bucket: on success the blob is stored, with its checksum."""

import functools
import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from boto3.s3.transfer import TransferConfig
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber
from s3transfer.utils import OSUtils

from ..metrics import Metrics
from ..workers import DaemonPool
from .client import BucketSettings
from .download import PART, SHA256, Downloads, digest_of, md5_of, sha256_in
from .errors import NOT_IMPLEMENTED, BlobDamaged, BlobNotFound, BucketError, TransferCancelled, local_file

logger = logging.getLogger(__name__)

#: Larger objects are copied in parallel parts of this size in bytes: services write a copy at some 100 MB/s.
COPY_PART = 64 << 20

_COPY_LIMIT = 5 << 30  # larger objects cannot be copied in one request

Progress = Callable[[int], None]


class Uploads(Downloads):
    """The uploads to a bucket, and the copies inside it."""

    def __init__(self, settings: BucketSettings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._multipart_threshold = settings.s3_multipart_threshold
        transfers = functools.partial(self._transfer_manager, settings.s3_concurrency, f"s3blobs {self.name} transfer")
        self._uploads = transfers(settings.s3_multipart_threshold, PART)
        self._copies = transfers(COPY_PART, COPY_PART)
        #: False once the service has shown that it cannot copy.
        self.can_copy = True
        self._can_copy_parts = True
        self._etag_is_md5 = True  # of objects stored in one request

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
        """Refuse new requests; daemon threads finish those under way."""
        super().close()
        # In threads: `__exit__` waits for the transfers that it cancels, and a silent service delays them for long.
        # Not by `shutdown` with cancel, which fails in some versions.
        closed = TransferCancelled("The bucket has been closed")
        for transfers in self._uploads, self._copies:
            threading.Thread(target=transfers.__exit__, args=(type(closed), closed, None), daemon=True).start()

    def put(self, oid: bytes, tid: bytes, filename: str, progress: Progress | None = None) -> None:
        """Upload ``filename`` as blob (oid, tid). Waits for S3; raises BucketError, or the OSError of the file.

        ``progress`` is called with the number of bytes of each step, from several threads. A `TransferCancelled` that
        it raises ends the upload and is raised here.
        """
        self._upload(self.keys.key(oid, tid), filename, self._write_options, progress)

    def put_staged(self, name: str, filename: str, progress: Progress | None = None) -> str:
        """Upload ``filename`` to the staging key ``name``, with `put`'s errors; return its SHA-256 in hex."""
        return self._upload(self.keys.staged_key(name), filename, self._short_lived_options, progress)

    def _upload(self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None) -> str:
        started = time.monotonic()
        digest = self._put(key, filename, write_options, progress)
        self._metrics.upload_duration.observe(time.monotonic() - started)
        self._metrics.upload_size.observe(os.path.getsize(filename))
        self._metrics.upload_last_success.set_to_current_time()
        return digest

    def _put(self, key: str, filename: str, write_options: dict[str, Any], progress: Progress | None = None) -> str:
        digest = digest_of(SHA256, filename)
        options = {"Metadata": {SHA256: digest}, **write_options, **self._key_options}
        small = os.path.getsize(filename) < min(self._multipart_threshold, PART)
        put = self._put_small if small else self._put_large
        put(f"store {key} in bucket {self.name}", key, filename, options, progress)
        return digest

    def _put_small(
        self, what: str, key: str, filename: str, options: dict[str, Any], progress: Progress | None
    ) -> None:
        # From a bytearray: with a body that has a read method, which botocore also makes of bytes, it sends
        # `Expect: 100-continue` and waits one more round trip for the answer.
        with open(filename, "rb") as file:
            body = bytearray(file.read())
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
        """Wait for the multipart transfer that ``begin`` starts, of ``size`` bytes with ``metadata`` to ``key``."""
        try:
            self._ask(what, lambda: begin().result())
        except BucketError as error:
            # Perhaps the answer to the completion was lost, and the completion was sent again.
            if error.code != "NoSuchUpload" or not self._is_there(key, size, metadata):
                raise
        if self._key_options:
            self._check_customer_key_used({}, key)

    def _is_there(self, key: str, size: int, metadata: dict[str, str]) -> bool:
        try:
            head = self._head(key)
        except BlobNotFound:
            return False
        return head["ContentLength"] == size and sha256_in(head["Metadata"]) == sha256_in(metadata) != ""

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

    def publish_staged(self, name: str, oid: bytes, tid: bytes, size: int, digest: str) -> None:
        """Copy the staged upload ``name`` to blob (oid, tid). Raises the errors of `copy`.

        ``size``: that of the blob in bytes; ``digest``: the SHA-256 that `put_staged` returned.
        """
        self._copy(self.keys.staged_key(name), self.keys.key(oid, tid), size, {SHA256: digest})

    def _copy(
        self, source: str, key: str, size: int, metadata: dict[str, str], content_type: str | None = None
    ) -> None:
        what = f"copy {source} to {key} in bucket {self.name}"
        place = {"Bucket": self.name, "Key": source}
        # Some services lose the metadata of a copy, and so the checksum, unless the request repeats it.
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


class _LocalFiles(OSUtils):
    """The local files that s3transfer sends; their errors are marked, so that they do not pass for errors of S3."""

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
