"""The ``<s3blobstorage>`` section: settings in, storage out.

Every bad value is refused with the name of its key, when the configuration is read as far as that can be told then.
The keys are described in component.xml. Values are never repeated in an error: one of them may be a secret.
"""

import base64
import binascii
import logging
import re
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import ZConfig
from ZODB.config import BaseConfig

from . import zeo
from .bases import UnsuitableBase
from .bucket import MISCONFIGURED, Bucket, BucketError, BucketSettings
from .cache import Cache, CacheDirectoryError
from .commit import Uploads
from .fetch import Fetcher
from .storage import Parts, S3BlobStorage
from .workers import DaemonPool

logger = logging.getLogger(__name__)

#: How long, in seconds, the start waits for the bucket before it goes on without.
_PROBE_TIMEOUT = 10.0

_MB = 1 << 20


class S3BlobStorageFactory(BaseConfig):
    """The datatype of the section; `open` makes the storage.

    Raises ValueError, which ZConfig turns into an error that names file and line, for settings that are wrong
    whatever the bucket and the disk are like.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.settings = bucket_settings(config)
        if not config.cache_dir:
            raise ValueError("cache-dir must name a directory")
        _at_least("cache-size", config.cache_size, 0)
        _at_least("s3-stage-threshold", config.s3_stage_threshold, 0)
        _at_least("upload-timeout", config.upload_timeout, 1)

    def open(self) -> S3BlobStorage:
        """Open the base and the storage around it.

        Raises ZConfig.ConfigurationError for a setting that turns out wrong; an S3 that does not answer is logged
        and no error.
        """
        zeo.install()
        bucket = Bucket(self.settings)
        try:
            _probe(bucket)
            base = self.config.base.open()
        except BaseException:
            bucket.close()
            raise
        try:
            return _assemble(self.config, base, bucket)
        except BaseException as error:
            base.close()
            bucket.close()
            if isinstance(error, UnsuitableBase):
                raise ZConfig.ConfigurationError(f"s3blobstorage: {error}") from None
            if isinstance(error, CacheDirectoryError):
                raise ZConfig.ConfigurationError(f"cache-dir: {error}") from None
            raise


def bucket_settings(config: Any) -> BucketSettings:
    """The settings of the section that concern S3, checked; ValueError names the key of the first bad one."""
    endpoint = config.s3_endpoint_url
    if endpoint and not re.fullmatch(r"https?://[^/\s@]+/?", endpoint):
        raise ValueError("s3-endpoint-url must be http://host[:port] or https://host[:port]")
    if not re.fullmatch(r"[a-zA-Z0-9.\-_]{1,255}", config.bucket_name) and not config.bucket_name.startswith("arn:"):
        raise ValueError("bucket-name is not the name of a bucket: letters, digits, dots, hyphens and underscores")
    if any(part in ("", ".", "..") for part in config.s3_prefix.strip("/").split("/")) and config.s3_prefix.strip("/"):
        raise ValueError("s3-prefix must not contain empty, '.' or '..' parts")
    if bool(config.s3_access_key) != bool(config.s3_secret_key):
        given, missing = ("access", "secret") if config.s3_access_key else ("secret", "access")
        raise ValueError(f"s3-{given}-key is set, but s3-{missing}-key is not: set both or neither")
    _one_of("s3-addressing-style", config.s3_addressing_style, ("auto", "path", "virtual"))
    if config.s3_sse is not None:
        _one_of("s3-sse", config.s3_sse, ("AES256", "aws:kms"))
    if config.s3_sse_kms_key_id and config.s3_sse != "aws:kms":
        raise ValueError("s3-sse-kms-key-id needs s3-sse aws:kms")
    checksums: Any = config.s3_checksums or ("when_required" if endpoint else "when_supported")
    _one_of("s3-checksums", checksums, ("when_supported", "when_required"))
    if not 5 * _MB <= config.s3_multipart_threshold <= 5 << 30:
        raise ValueError("s3-multipart-threshold must be from 5MB to 5GB")
    _at_least("s3-concurrency", config.s3_concurrency, 1)
    _at_least("s3-connect-timeout", config.s3_connect_timeout, 1)
    _at_least("s3-read-timeout", config.s3_read_timeout, 1)
    _at_least("s3-max-attempts", config.s3_max_attempts, 1)
    tls = endpoint.startswith("https:") if endpoint else config.s3_use_ssl
    return BucketSettings(
        bucket_name=config.bucket_name,
        s3_prefix=config.s3_prefix.strip("/"),
        s3_endpoint_url=endpoint or None,
        s3_region=config.s3_region or None,
        s3_access_key=config.s3_access_key or None,
        s3_secret_key=config.s3_secret_key or None,
        s3_use_ssl=config.s3_use_ssl,
        s3_addressing_style=config.s3_addressing_style,
        s3_sse_customer_key=_customer_key(config.s3_sse_customer_key, tls, config.s3_sse),
        s3_sse=config.s3_sse or None,
        s3_sse_kms_key_id=config.s3_sse_kms_key_id or None,
        s3_storage_class=config.s3_storage_class or None,
        s3_checksums=checksums,
        s3_multipart_threshold=config.s3_multipart_threshold,
        s3_concurrency=config.s3_concurrency,
        s3_connect_timeout=config.s3_connect_timeout,
        s3_read_timeout=config.s3_read_timeout,
        s3_max_attempts=config.s3_max_attempts,
    )


def _customer_key(encoded: str | None, tls: bool, sse: str | None) -> bytes | None:
    if not encoded:
        return None
    if not tls:
        raise ValueError(
            "s3-sse-customer-key sends the key with every request and so needs TLS: use an https:// s3-endpoint-url "
            "and s3-use-ssl true"
        )
    if sse:
        raise ValueError("s3-sse-customer-key and s3-sse exclude each other: set one of them")
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError("s3-sse-customer-key must be 32 bytes in base64, as `openssl rand -base64 32` makes them")
    return key


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}")


def _probe(bucket: Bucket) -> None:
    """Stop what can never work; let what may be an outage pass."""
    worker = DaemonPool(1, "s3blobs probe")
    try:
        worker.submit(bucket.probe).result(_PROBE_TIMEOUT)
    except BucketError as error:
        key = MISCONFIGURED.get(error.code)
        if key is not None:
            raise ZConfig.ConfigurationError(f"{key}: {error}") from None
        logger.error("%s. Starting all the same: objects and cached blobs are served, other blobs fail", error)
    except FutureTimeout:
        logger.error(
            "Bucket %s did not answer within %g s. Starting all the same: objects and cached blobs are served, other "
            "blobs fail until it does",
            bucket.name,
            _PROBE_TIMEOUT,
        )
    finally:
        worker.shutdown(wait=False)


def _assemble(config: Any, base: Any, bucket: Bucket) -> S3BlobStorage:
    cache = Cache(config.cache_dir, config.cache_size)
    try:
        fetcher = Fetcher(bucket, cache, config.s3_concurrency)
        uploads = Uploads(
            bucket,
            cache,
            fetcher.fetch,
            config.s3_concurrency,
            config.upload_timeout,
            config.s3_stage_threshold,
        )
        return S3BlobStorage(base, Parts(bucket, cache, fetcher, uploads))
    except BaseException:
        cache.close()
        raise
