"""The ``<s3blobstorage>`` section: settings in, storage out.

settings.py reads the values of the keys. What turns out to be wrong when the storage is opened is refused with the name
of the key. No error repeats a value, which may be a secret.
"""

import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import zc.lockfile
import ZConfig
from ZODB.config import BaseConfig

from . import predecessor
from .bases import adapter_for, open_base
from .bases.adapter import UnsuitableBase
from .blobdir import BlobDirectory, BlobDirectoryError
from .cache.directory import CacheDirectoryError
from .cache.files import Cache
from .commit.services import CommitServices
from .commit.tids import Tids
from .fallbacks import SECTION, FallbackBucket, FallbackDirectory, Fallbacks, Place
from .fetch import Fetcher
from .garbage.collector import Collector
from .garbage.leftovers import abandoned_after
from .lease import Lease
from .linker import Linker
from .metrics import Metrics
from .monitoring import endpoint
from .monitoring.exporter import Exported
from .monitoring.health import Health
from .places import Places, PlaceTaken, place_of
from .s3.bucket import Bucket
from .s3.client import BucketSettings
from .s3.download import Downloads
from .s3.errors import SETTING_FOR_ERROR, BucketError
from .s3.links import Signer
from .s3.objects import Objects
from .settings import PATHS, bucket_settings, check_texts, make_absolute, read_settings
from .storage import Components, S3BlobStorage
from .workers import DaemonPool
from .zeo import handler as zeo

logger = logging.getLogger(__name__)

AnyBucket = TypeVar("AnyBucket", bound=Objects)

#: How long, in seconds, the start waits for the buckets before it goes on without an answer.
_PROBE_TIMEOUT = 10.0

_places = Places()


class StartRefused(ZConfig.ConfigurationError, SystemExit):
    """A setting that turned out to be wrong when the storage was opened; the message names its key.

    A starting server does not catch this error. Since it is a SystemExit, it ends the process with one sentence on
    stderr instead of a traceback.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.code = sentence


class DatabaseInUse(StartRefused, zc.lockfile.LockError):
    """Another process has the database of the section open."""


class S3BlobStorageFactory(BaseConfig):
    """The datatype of the section; `open` makes the storage.

    Raises ZConfig.ConfigurationError for settings that are wrong for any bucket and disk. Not ValueError: ZConfig
    would attach the section, with its secrets, to the error that it makes of that, and add line -1.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        check_texts(config)
        for key in PATHS:
            make_absolute(config, key)
        self.settings = bucket_settings(config)
        #: The settings of ``<fallbackbucket>``, None without that section.
        self.fallback_settings: BucketSettings | None = None
        if config.fallbackbucket is not None:
            with _naming_section():
                check_texts(config.fallbackbucket)
                make_absolute(config.fallbackbucket, "s3-ca-file")
                self.fallback_settings = read_settings(config.fallbackbucket)
        if not config.cache_dir:
            raise ZConfig.ConfigurationError("cache-dir must name a directory")

    def open(self) -> S3BlobStorage:
        """Open the base and the storage around it.

        Raises `StartRefused` for a setting that turns out to be wrong, `DatabaseInUse` among them. A bucket that does
        not answer is logged, and is no error. Waits for S3, for `_PROBE_TIMEOUT` seconds at most.
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
            try:
                fallbacks = self.open_fallbacks(bucket, exported.metrics)
            except BlobDirectoryError as error:
                raise _refuse(f"fallback-blob-dir: {error}") from None
            undo.callback(fallbacks.close)
            _probe(bucket, fallbacks)
            try:
                base = open_base(self.config.base.open)
                undo.callback(base.close)
                leave_place = _places.take(place_of(bucket), self._label, adapter_for(base))
                undo.callback(leave_place)
                storage = _assemble(self.config, base, bucket, fallbacks, exported, leave_place)
            except zc.lockfile.LockError as error:
                raise DatabaseInUse(
                    f"s3blobstorage: another process has the database open: {error}. Stop that process first"
                ) from None
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

    def open_fallbacks(self, bucket: Bucket, metrics: Metrics) -> Fallbacks:
        """Return the fallbacks of ``bucket``; sends no request. Raises `StartRefused` and BlobDirectoryError."""
        places: list[Place] = []
        if self.config.fallback_blob_dir:
            places.append(FallbackDirectory(BlobDirectory(self.config.fallback_blob_dir), metrics))
        if (other := self.open_fallback_bucket(bucket, metrics)) is not None:
            places.append(other)
        return Fallbacks(places)

    def open_fallback_bucket(self, bucket: Bucket, metrics: Metrics) -> FallbackBucket | None:
        """Return the second bucket beside ``bucket``, None without its section; sends no request. `StartRefused`."""
        if self.fallback_settings is None:
            return None
        settings = replace(self.fallback_settings, s3_concurrency=self.settings.s3_concurrency, pace=self.settings.pace)
        # Its requests are not those of the bucket, whose metrics and health tell of the bucket alone.
        other = _open(Downloads, settings, metrics.for_second_bucket(), f"{SECTION} ")
        if place_of(other) == place_of(bucket):
            other.close()
            raise _refuse(
                f"{SECTION}: it names the bucket and the s3-prefix of the section around it, so that it can add "
                f"nothing: give one of the two another s3-prefix or bucket-name, or remove the section {SECTION}"
            )
        return FallbackBucket(other, metrics)

    def open_bucket(self, metrics: Metrics) -> Bucket:
        """Return the bucket alone; sends no request. Raises `StartRefused`."""
        return _open(Bucket, self.settings, metrics)

    def _describe(self, bucket: Bucket, metrics: Metrics) -> None:
        endpoint_url = _endpoint(bucket)
        metrics.storage_info.labels(bucket.name, bucket.keys.prefix, endpoint_url).set(1)
        logger.info("%s: %s", self._label, _described(bucket))

    @property
    def _label(self) -> str:
        """Name of the section for messages, with its cache-dir; inside a wrapper the section itself has no name."""
        return f"s3blobstorage {self.name or ''}".rstrip() + f" (cache-dir {self.config.cache_dir})"


@contextlib.contextmanager
def _naming_section() -> Iterator[None]:
    """Let a ConfigurationError of the body name the section of the second bucket."""
    try:
        yield
    except ZConfig.ConfigurationError as error:
        raise ZConfig.ConfigurationError(f"{SECTION} {error}") from None


def _open(
    kind: Callable[[BucketSettings, Metrics], AnyBucket], settings: BucketSettings, metrics: Metrics, section: str = ""
) -> AnyBucket:
    """Return a bucket of ``kind``; sends no request. Raises `StartRefused`, whose sentence begins with ``section``."""
    if settings.s3_ca_file:
        _check_ca_file(settings.s3_ca_file, section)
    try:
        bucket = kind(settings, metrics)
    except BucketError as error:
        raise _misconfigured(error, section) from None
    if settings.s3_sse_customer_key and not bucket.endpoint_url.startswith("https:"):
        bucket.close()
        raise _refuse(
            f"{section}s3-sse-customer-key sends the key with every request and so needs TLS, but boto3 found another "
            f"endpoint in AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or its configuration file: set s3-endpoint-url "
            f"to one with https://"
        )
    return bucket


def _endpoint(bucket: Objects) -> str:
    """Return the address of the service without a password, which boto3 may have found in it."""
    url = urlsplit(bucket.endpoint_url)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _described(bucket: Objects) -> str:
    return f"bucket {bucket.name}, prefix {bucket.keys.prefix or 'none'}, endpoint {_endpoint(bucket)}"


def _check_ca_file(path: str, section: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise _refuse(f"{section}s3-ca-file: {path} holds no certificates in PEM format") from None
    except OSError as error:
        raise _refuse(f"{section}s3-ca-file: {path} cannot be read: {error.strerror}") from None


def _misconfigured(error: BucketError, section: str) -> StartRefused:
    key = SETTING_FOR_ERROR.get(error.code, "" if section else "s3blobstorage")
    return _refuse(f"{f'{section}{key}'.strip()}: {error}")


def _refuse(sentence: str) -> StartRefused:
    logger.critical("%s", sentence)  # the stderr of a daemon may be lost
    return StartRefused(sentence)


def _probe(bucket: Bucket, fallbacks: Fallbacks) -> None:
    """Probe the buckets; raise StartRefused for a wrong setting, and only log what may be an outage."""
    others = [place.bucket for place in fallbacks.places if isinstance(place, FallbackBucket)]
    worker = DaemonPool(1 + len(others), "s3blobs probe")
    deadline = time.monotonic() + _PROBE_TIMEOUT
    try:
        probes = [(probed, worker.submit(probed.probe)) for probed in (bucket, *others)]
        for probed, probe in probes:
            if probed is bucket:
                section, meanwhile = "", "objects and cached blobs are served, other blobs fail"
            else:
                section, meanwhile = f"{SECTION}: ", f"blobs that only {SECTION} has fail"
                logger.info("%s%s", section, _described(probed))
            try:
                probe.result(max(0.0, deadline - time.monotonic()))
                logger.info("%sBucket %s answered", section, probed.name)
            except BucketError as error:
                if error.code in SETTING_FOR_ERROR:
                    raise _misconfigured(error, "" if probed is bucket else f"{SECTION} ") from None
                logger.error("%s%s. Starting anyway: %s", section, error, meanwhile)
            except FutureTimeout:
                logger.error(
                    "%sBucket %s did not answer within %g s. Starting anyway: %s until the bucket answers",
                    section,
                    probed.name,
                    _PROBE_TIMEOUT,
                    meanwhile,
                )
    finally:
        worker.shutdown(wait=False)


def _assemble(
    config: Any,
    base: Any,
    bucket: Bucket,
    fallbacks: Fallbacks,
    exported: Exported,
    leave_place: Callable[[], None],
) -> S3BlobStorage:
    metrics = exported.metrics
    cache = Cache(config.cache_dir, config.cache_size, metrics)
    try:
        health = Health(bucket)
        fetcher = Fetcher(bucket, cache, metrics, config.s3_concurrency, fallbacks, health.trouble)
        linker = Linker(_signer(config, bucket), config.presigned_urls, fetcher.may_lack, metrics)
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

        def close_watch() -> None:
            endpoint.leave(exported)
            leave_place()
            health.close()

        storage = S3BlobStorage(
            base, Components(bucket, cache, fetcher, linker, commits, lease, collector, exported, close_watch)
        )
    except BaseException:
        cache.close()
        raise
    metrics.bucket_up.set_function(lambda: health.trouble() is None)
    exported.trouble = health.trouble
    if not base.isReadOnly():  # a read-only storage deletes nothing, and must not take the lease from a server
        lease.start()
    return storage


def _signer(config: Any, bucket: Bucket) -> Signer | None:
    """Return what signs the links to the blobs of ``bucket``, None if the section gives no links."""
    if not config.presigned_urls:
        return None
    if config.s3_sse_customer_key:
        logger.warning(
            "Bucket %s: presigned-urls has no effect, because a link cannot be followed without the key of "
            "s3-sse-customer-key",
            bucket.name,
        )
        return None
    try:
        return bucket.signer()
    except BucketError as error:
        raise _refuse(f"s3-public-endpoint-url: {error}") from None
