"""The ``<s3blobstorage>`` section: settings in, storage out.

Every invalid value is refused with the name of its key, if possible when the configuration is read. component.xml
describes the keys. No error repeats a value, which may be a secret.
"""

import base64
import binascii
import contextlib
import logging
import os
import re
import ssl
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any
from urllib.parse import urlsplit

import ZConfig
import ZConfig.datatypes
from ZODB.config import BaseConfig

from . import predecessor
from .bases import adapter_for
from .bases.adapter import UnsuitableBase
from .blobdir import BlobDirectory, BlobDirectoryError
from .cache.directory import CacheDirectoryError
from .cache.files import Cache
from .commit.services import CommitServices
from .commit.tids import Tids
from .fetch import Fetcher
from .garbage.collector import Collector
from .garbage.leftovers import abandoned_after
from .lease import Lease
from .metrics import Metrics
from .monitoring import endpoint
from .monitoring.exporter import Exported
from .monitoring.health import Health
from .places import Places, PlaceTaken, place_of
from .s3.bucket import Bucket
from .s3.client import BucketSettings
from .s3.errors import SETTING_FOR_ERROR, BucketError
from .storage import Components, S3BlobStorage
from .workers import DaemonPool
from .zeo import handler as zeo

logger = logging.getLogger(__name__)

#: How long, in seconds, the start waits for the bucket before it goes on without an answer.
_PROBE_TIMEOUT = 10.0

#: How long, in seconds, the service may take to copy 64 MiB inside the bucket, unless upload-timeout is less.
_COPY_TIMEOUT = 120.0

#: S3 allows 1024 bytes for a key; the names below the prefix, and those of a check, need the rest.
_LONGEST_PREFIX = 900

_MB = 1 << 20

_places = Places()


def _datatype(
    key: str, kind: str, form: str, least: float | None = None, most: float | None = None, zero: bool = False
) -> Callable[[str], Any]:
    """Return ZConfig's datatype ``kind``, limited to ``least`` to ``most``, or 0 if ``zero``.

    A time other than 0 needs a unit. The error names the key and not the value.
    """
    convert = ZConfig.datatypes.Registry().get(kind)

    def is_meant(text: str, value: Any) -> bool:
        if zero and value == 0:
            return True
        if kind == "time-interval" and text[-1:].isdigit():
            return False
        return (least is None or value >= least) and (most is None or value <= most)

    def datatype(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_meant(text, value):
            raise ValueError(f"{key} must be {form}")
        return value

    return datatype


def _timeout(key: str) -> Callable[[str], float]:
    """Return the datatype of a time of at least 1s; a number alone means seconds, for sections of 1.2.1."""
    with_unit = _datatype(key, "time-interval", "a time of at least 1s, such as 30s or 10m", 1)

    def datatype(text: str) -> float:
        seconds = predecessor.seconds_without_unit(text)
        return with_unit(text) if seconds is None or seconds < 1 else seconds

    return datatype


# The datatypes of component.xml
_BYTES, _SECONDS = "a number alone would be bytes", "a number alone would be seconds"
_TIME = f"a time with its unit, at least 1s, such as 30s or 10m: {_SECONDS}"
s3_use_ssl = _datatype("s3-use-ssl", "boolean", "true or false")
cache_size = _datatype("cache-size", "byte-size", f"0 or at least 1MB, such as 500MB or 20GB: {_BYTES}", _MB, zero=True)
s3_multipart_threshold = _datatype(
    "s3-multipart-threshold", "byte-size", "a number of bytes from 5MB to 5GB", 5 * _MB, 5 << 30
)
s3_concurrency = _datatype("s3-concurrency", "integer", "a whole number of at least 1", 1)
s3_connect_timeout = _timeout("s3-connect-timeout")
s3_read_timeout = _timeout("s3-read-timeout")
s3_max_attempts = _datatype("s3-max-attempts", "integer", "a whole number of at least 1", 1)
s3_stage_threshold = _datatype(
    "s3-stage-threshold", "byte-size", f"0 or at least 1KB, such as 4MB: {_BYTES}", 1 << 10, zero=True
)
gc_retention = _datatype(
    "gc-retention", "time-interval", f"0 or a time with its unit, such as 30d: {_SECONDS}", 1, zero=True
)
gc_max_delete_percent = _datatype("gc-max-delete-percent", "integer", "a whole number from 0 to 100", 0, 100)
upload_timeout = _datatype("upload-timeout", "time-interval", _TIME, 1)


def metrics_address(text: str) -> tuple[str, int] | None:
    """Return host ("": all addresses of this machine) and port; None for an empty text, as from an empty variable."""
    if not text:
        return None
    try:
        host, port = ZConfig.datatypes.Registry().get("inet-binding-address")(text)
    except ValueError:
        port = None
    if not port:
        raise ValueError("metrics-address must be host:port, such as localhost:8101")
    return host, port


class StartRefused(ZConfig.ConfigurationError, SystemExit):
    """A setting that turned out to be wrong when the storage was opened; the message names its key.

    A starting server does not catch this error. Since it is a SystemExit, it ends the process with one sentence on
    stderr instead of a traceback.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.code = sentence


class S3BlobStorageFactory(BaseConfig):
    """The datatype of the section; `open` makes the storage.

    Raises ZConfig.ConfigurationError for settings that are wrong for any bucket and disk. Not ValueError: ZConfig
    would attach the section, with its secrets, to the error that it makes of that, and add line -1.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _check_texts(config)
        for key in _PATHS:
            _make_absolute(config, key)
        self.settings = bucket_settings(config)
        if not config.cache_dir:
            raise ZConfig.ConfigurationError("cache-dir must name a directory")

    def open(self) -> S3BlobStorage:
        """Open the base and the storage around it.

        Raises `StartRefused` for a setting that turns out to be wrong. A bucket that does not answer is logged, and is
        no error. Waits for S3, for `_PROBE_TIMEOUT` seconds at most.
        """
        zeo.install()
        for sentence in predecessor.warnings(self.config):
            logger.warning("%s: %s", self._label, sentence)
        with contextlib.ExitStack() as undo:
            exported = Exported(self.name or "1")
            if self.config.metrics_address:
                self._export(exported)
                undo.callback(endpoint.leave, exported)
            bucket = self.open_bucket(exported.metrics)
            undo.callback(bucket.close)
            self._describe(bucket, exported.metrics)
            _probe(bucket)
            try:
                fallback = self.open_fallback()
            except BlobDirectoryError as error:
                raise _refuse(f"fallback-blob-dir: {error}") from None
            base = self.config.base.open()
            undo.callback(base.close)
            try:
                leave_place = _places.take(place_of(bucket), self._label, adapter_for(base))
                undo.callback(leave_place)
                storage = _assemble(self.config, base, bucket, fallback, exported, leave_place)
            except UnsuitableBase as error:
                raise _refuse(f"s3blobstorage: {error}") from None
            except PlaceTaken as error:
                raise _refuse(f"s3-prefix: {error}") from None
            except CacheDirectoryError as error:
                raise _refuse(f"cache-dir: {error}") from None
            undo.pop_all()
            return storage

    def _export(self, exported: Exported) -> None:
        try:
            endpoint.join(self.config.metrics_address, exported)
        except endpoint.EndpointError as error:
            raise _refuse(f"metrics-address: {error}") from None

    def open_fallback(self) -> BlobDirectory | None:
        """Return the directory ``fallback-blob-dir``, None without that key. Raises BlobDirectoryError."""
        return BlobDirectory(self.config.fallback_blob_dir) if self.config.fallback_blob_dir else None

    def open_bucket(self, metrics: Metrics) -> Bucket:
        """Return the bucket alone; sends no request. Raises `StartRefused`."""
        if self.settings.s3_ca_file:
            _check_ca_file(self.settings.s3_ca_file)
        try:
            bucket = Bucket(self.settings, metrics)
        except BucketError as error:
            raise _misconfigured(error) from None
        if self.settings.s3_sse_customer_key and not bucket.endpoint_url.startswith("https:"):
            bucket.close()
            raise _refuse(
                "s3-sse-customer-key sends the key with every request and so needs TLS, but boto3 found another "
                "endpoint in AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or its configuration file: set s3-endpoint-url "
                "to one with https://"
            )
        return bucket

    def _describe(self, bucket: Bucket, metrics: Metrics) -> None:
        url = urlsplit(bucket.endpoint_url)
        address = url.netloc.rpartition("@")[2]  # boto3 may have found an endpoint with a password
        endpoint_url, prefix = f"{url.scheme}://{address}{url.path}", self.settings.s3_prefix
        metrics.storage_info.labels(bucket.name, prefix, endpoint_url).set(1)
        logger.info("%s: bucket %s, prefix %s, endpoint %s", self._label, bucket.name, prefix or "none", endpoint_url)

    @property
    def _label(self) -> str:
        """Name of the section for messages, with its cache-dir; inside a wrapper the section itself has no name."""
        return f"s3blobstorage {self.name or ''}".rstrip() + f" (cache-dir {self.config.cache_dir})"


#: The keys that name a file or a directory.
_PATHS = ("s3-ca-file", "cache-dir", "fallback-blob-dir")

_SECRETS = ("s3-access-key", "s3-secret-key", "s3-sse-customer-key")


def _check_texts(config: Any) -> None:
    """Refuse comments, quotes and invisible characters, which ZConfig takes as part of a value."""
    for attribute in config.getSectionAttributes():
        key, value = attribute.replace("_", "-"), getattr(config, attribute)
        if not isinstance(value, str) or not value:
            continue
        if not value.isprintable() or value != value.strip():
            raise ZConfig.ConfigurationError(
                f"{key} begins or ends with a blank, or contains a line break or another invisible character: check "
                f"the environment variable or the file that it comes from"
            )
        if key in _SECRETS:
            continue  # any other character may be part of a secret
        if re.search(r"(^|\s)#", value):
            raise ZConfig.ConfigurationError(
                f"{key} has a comment behind its value, which ZConfig takes as part of the value: put the comment on a "
                f"line of its own"
            )
        if value[0] in "\"'" or value[-1] in "\"'":
            raise ZConfig.ConfigurationError(
                f"{key} must be written without quotes: ZConfig takes them as part of the value"
            )


def _make_absolute(config: Any, key: str) -> None:
    """Make the path ``key`` absolute, so that a later change of the working directory does not matter."""
    attribute = key.replace("-", "_")
    path = getattr(config, attribute)
    if path and (path.startswith("~") or re.search(r"(^|/)\$[\w({]", path)):
        raise ZConfig.ConfigurationError(
            f"{key} must be the whole path: ~ and $NAME are not replaced in it. ZConfig replaces $(NAME) by the "
            f"environment variable, as in $(HOME)/cache"
        )
    if path and not os.path.isabs(path):
        setattr(config, attribute, os.path.join(os.getcwd(), path))


def bucket_settings(config: Any) -> BucketSettings:
    """Return the checked S3 settings of the section; ConfigurationError names the key of the first invalid one."""
    endpoint = config.s3_endpoint_url
    if endpoint and not _is_endpoint(endpoint):
        raise ZConfig.ConfigurationError("s3-endpoint-url must be http(s)://host[:port][/path]")
    if not re.fullmatch(r"[a-zA-Z0-9.\-_]{1,255}|arn:[\w.:/-]+", config.bucket_name):
        raise ZConfig.ConfigurationError(
            "bucket-name is not the name of a bucket: letters, digits, dots, hyphens and underscores"
        )
    prefix = _prefix(config.s3_prefix)
    if config.s3_region and not re.fullmatch(r"[a-zA-Z0-9-]+", config.s3_region):
        raise ZConfig.ConfigurationError(
            "s3-region is not the name of a region: letters, digits and hyphens, such as eu-central-1"
        )
    if bool(config.s3_access_key) != bool(config.s3_secret_key):
        given, missing = ("access", "secret") if config.s3_access_key else ("secret", "access")
        raise ZConfig.ConfigurationError(f"s3-{given}-key is set, but s3-{missing}-key is not: set both or neither")
    _one_of("s3-addressing-style", config.s3_addressing_style, ("auto", "path", "virtual"))
    if config.s3_sse:
        _one_of("s3-sse", config.s3_sse, ("AES256", "aws:kms"))
    if config.s3_sse_kms_key_id and config.s3_sse != "aws:kms":
        raise ZConfig.ConfigurationError("s3-sse-kms-key-id needs s3-sse aws:kms")
    if " " in (config.s3_sse_kms_key_id or ""):
        raise ZConfig.ConfigurationError("s3-sse-kms-key-id must be the id, alias or ARN of a key, without blanks")
    checksums: Any = config.s3_checksums or ("when_required" if endpoint else "when_supported")
    _one_of("s3-checksums", checksums, ("when_supported", "when_required"))
    if config.s3_storage_class and not re.fullmatch("[A-Z0-9_]+", config.s3_storage_class):
        raise ZConfig.ConfigurationError("s3-storage-class must be a name in capitals, such as STANDARD_IA")
    tls = endpoint.startswith("https:") if endpoint else config.s3_use_ssl
    return BucketSettings(
        bucket_name=config.bucket_name,
        s3_prefix=prefix,
        s3_endpoint_url=endpoint or None,
        s3_region=config.s3_region or None,
        s3_access_key=config.s3_access_key or None,
        s3_secret_key=config.s3_secret_key or None,
        s3_use_ssl=config.s3_use_ssl,
        s3_ca_file=config.s3_ca_file or None,
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
        copy_timeout=min(max(_COPY_TIMEOUT, config.s3_read_timeout), config.upload_timeout),
    )


def _prefix(text: str) -> str:
    prefix = text.rstrip("/")
    if prefix.startswith("/"):
        raise ZConfig.ConfigurationError(
            "s3-prefix must not begin with a slash, since no key of this version does. zodb-s3blobs 1.2.1 "
            "wrote such keys: copy those objects to keys without the slash, for example with "
            "`aws s3 cp --recursive s3://BUCKET//PREFIX/ s3://BUCKET/PREFIX/`, and set s3-prefix to PREFIX"
        )
    if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
        raise ZConfig.ConfigurationError("s3-prefix must not contain empty, '.' or '..' parts")
    # Without characters that S3 advises against, or that services, proxies and policies interpret, and blanks.
    if not re.fullmatch(r"[\w./=@+:,~!()-]*", prefix):
        raise ZConfig.ConfigurationError(
            "s3-prefix must consist of letters, digits and the characters . _ - / = @ + : , ~ ! ( )"
        )
    if len(prefix.encode()) > _LONGEST_PREFIX:
        raise ZConfig.ConfigurationError(f"s3-prefix must not be longer than {_LONGEST_PREFIX} bytes")
    return prefix


def _customer_key(encoded: str | None, tls: bool, sse: str | None) -> bytes | None:
    if not encoded:
        return None
    if not tls:
        raise ZConfig.ConfigurationError(
            "s3-sse-customer-key sends the key with every request and so needs TLS: use an https:// s3-endpoint-url "
            "and s3-use-ssl true"
        )
    if sse:
        raise ZConfig.ConfigurationError("s3-sse-customer-key and s3-sse exclude each other: set one of them")
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ZConfig.ConfigurationError(
            "s3-sse-customer-key must be 32 bytes in base64, as `openssl rand -base64 32` makes them"
        )
    return key


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ZConfig.ConfigurationError(f"{name} must be one of {', '.join(allowed)}")


def _is_endpoint(url: str) -> bool:
    if not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?", url):
        return False
    try:
        return bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:  # the port is not a number, or out of range
        return False


def _check_ca_file(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise _refuse(f"s3-ca-file: {path} holds no certificates in PEM format") from None
    except OSError as error:
        raise _refuse(f"s3-ca-file: {path} cannot be read: {error.strerror}") from None


def _misconfigured(error: BucketError) -> StartRefused:
    return _refuse(f"{SETTING_FOR_ERROR.get(error.code, 's3blobstorage')}: {error}")


def _refuse(sentence: str) -> StartRefused:
    logger.critical("%s", sentence)  # the stderr of a daemon may be lost
    return StartRefused(sentence)


def _probe(bucket: Bucket) -> None:
    """Probe the bucket; raise StartRefused for a wrong setting, and only log what may be an outage."""
    worker = DaemonPool(1, "s3blobs probe")
    try:
        worker.submit(bucket.probe).result(_PROBE_TIMEOUT)
        logger.info("Bucket %s answered", bucket.name)
    except BucketError as error:
        if error.code in SETTING_FOR_ERROR:
            raise _misconfigured(error) from None
        logger.error("%s. Starting anyway: objects and cached blobs are served, other blobs fail", error)
    except FutureTimeout:
        logger.error(
            "Bucket %s did not answer within %g s. Starting anyway: objects and cached blobs are served, other blobs "
            "fail until the bucket answers",
            bucket.name,
            _PROBE_TIMEOUT,
        )
    finally:
        worker.shutdown(wait=False)


def _assemble(
    config: Any,
    base: Any,
    bucket: Bucket,
    fallback: BlobDirectory | None,
    exported: Exported,
    leave_place: Callable[[], None],
) -> S3BlobStorage:
    metrics = exported.metrics
    cache = Cache(config.cache_dir, config.cache_size, metrics)
    try:
        fetcher = Fetcher(bucket, cache, metrics, config.s3_concurrency, fallback)
        commits = CommitServices(
            bucket,
            cache,
            fetcher.fetch,
            Tids(base.lastTransaction, metrics),
            metrics,
            config.s3_concurrency,
            config.upload_timeout,
            config.s3_stage_threshold,
        )
        kind = adapter_for(base)
        lease = Lease(bucket, kind, metrics, exported.name)
        collector = Collector(
            bucket,
            cache,
            commits.in_flight,
            commits.staging.is_live,
            lease,
            metrics,
            config.gc_retention,
            config.gc_max_delete_percent,
            kind.own_identity,
            abandoned_after(config.upload_timeout),
        )
        health = Health(bucket)

        def close_watch() -> None:
            endpoint.leave(exported)
            leave_place()
            health.close()

        storage = S3BlobStorage(
            base, Components(bucket, cache, fetcher, commits, lease, collector, exported, close_watch)
        )
    except BaseException:
        cache.close()
        raise
    metrics.bucket_up.set_function(lambda: health.trouble() is None)
    exported.trouble = health.trouble
    if not base.isReadOnly():  # a read-only storage deletes nothing, and must not take the lease from a server
        lease.start()
    return storage
