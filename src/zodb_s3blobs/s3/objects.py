"""Requests on the objects below one prefix of a bucket: the base class of `bucket.Bucket`."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from ..metrics import Metrics
from ..workers import DaemonPool
from .client import BucketSettings, Connection
from .events import S3Events
from .keys import Keys

#: The most bytes that are read from a body at once.
READ = 1 << 20

T = TypeVar("T")


class _Key(bytes):
    """Bytes whose repr hides them, so that a traceback that prints variables does not leak the key."""

    def __repr__(self) -> str:
        return "<a key>"


class Objects:
    """The objects below one prefix of one bucket. The constructor sends no request."""

    def __init__(self, settings: BucketSettings, metrics: Metrics) -> None:
        self.name = settings.bucket_name
        self.keys = Keys(settings.s3_prefix)
        self._attempts = settings.s3_max_attempts
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
        # Staged uploads and control objects are soon deleted or overwritten; storage classes other than the standard
        # one bill each of them for a month at least.
        self._short_lived_options = dict(self._write_options)
        if settings.s3_storage_class:
            self._write_options["StorageClass"] = settings.s3_storage_class
        #: Options with which `ask` reads and writes objects as the other methods do.
        self.read_options, self.write_options = self._key_options, {**self._write_options, **self._key_options}
        self._connection = Connection(settings)
        self._client = self._connection.client
        self._metrics = metrics
        self._events = S3Events(self._client, metrics, settings.pace)
        self.endpoint_url: str = self._connection.endpoint_url
        pool_name = f"s3blobs {settings.bucket_name}"
        # A pool of its own: a part must never wait for the download that waits for that part.
        self._parts = DaemonPool(settings.s3_concurrency, f"{pool_name} part")

    def close(self) -> None:
        """Refuse new requests; daemon threads finish those under way."""
        self._parts.shutdown(wait=False, cancel_futures=True)
        self._connection.close()

    @property
    def last_answer(self) -> tuple[str | None, float]:
        """Reason why the last request had no answer, None if it had one; and its time by `time.monotonic`."""
        return self._events.last_answer

    def probe(self) -> None:
        """List one key; raise BucketError if bucket, credentials, permission to list or connection do not work."""
        self._ask(
            f"list bucket {self.name}",
            lambda: self._client.list_objects_v2(Bucket=self.name, Prefix=self.keys.blobs, MaxKeys=1),
        )

    def ask(self, operation: str, **options: Any) -> dict[str, Any]:
        """Return the answer to one ``operation`` of boto3's client on this bucket, for requests without a method here.

        A body is read into bytes, at most 1 MiB. Raises BlobNotFound and BucketError.
        """

        def ask() -> dict[str, Any]:
            answer = getattr(self._client, operation)(Bucket=self.name, **options)
            if "Body" in answer:
                with contextlib.closing(answer["Body"]) as body:
                    answer["Body"] = body.read(READ)
            return answer

        what = f"{operation.removesuffix('_v2').replace('_', ' ')} {options.get('Key', '')}".rstrip()
        return self._ask(f"{what} in bucket {self.name}", ask)

    def _head(self, key: str) -> dict[str, Any]:
        return self._ask(
            f"look up {key} in bucket {self.name}",
            lambda: self._client.head_object(Bucket=self.name, Key=key, **self._key_options),
        )

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        return self._connection.ask(what, call)
