"""Uploads and copies inside the bucket: what they report as stored is stored, with its checksum."""

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

#: What is larger is copied in parts of this size, side by side: services write a copy at some 100 MB/s.
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
        super().close()
        # It waits for the transfers that it cancels, which a silent service can make a long time.
        # As a context manager: `shutdown` with cancel fails in some versions.
        closed = TransferCancelled("The bucket has been closed")
        for transfers in self._uploads, self._copies:
            threading.Thread(target=transfers.__exit__, args=(type(closed), closed, None), daemon=True).start()

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
        digest = digest_of(SHA256, filename)
        options = {"Metadata": {SHA256: digest}, **write_options, **self._key_options}
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
        etag = md5_of(answer)
        if not (self._etag_is_md5 and etag) or etag == hashlib.md5(body, usedforsecurity=False).hexdigest():
            return
        try:
            self._read_back(key)
        except BlobDamaged:
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
        return head["ContentLength"] == size and sha256_in(head["Metadata"]) == sha256_in(metadata) != ""

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
        self._copy(self.keys.staged_key(name), self.keys.key(oid, tid), size, {SHA256: digest})

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
            # It may have been done, and the answer lost.
            if error.reason != "connection" or not self._is_there(key, size, metadata):
                raise


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
