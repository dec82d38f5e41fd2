"""The settings of ``<s3blobstorage>`` and ``<fallbackbucket>``: datatypes, and what must hold for any bucket and disk.

component.xml describes the keys. Every invalid value is refused with the name of its key, if possible when the
configuration is read. No error repeats a value, which may be a secret.
"""

import base64
import binascii
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import ZConfig
import ZConfig.datatypes

from . import predecessor
from .s3.client import BucketSettings
from .s3.links import LONGEST

#: How long, in seconds, the service may take to copy 64 MiB inside the bucket, unless upload-timeout is less.
_COPY_TIMEOUT = 120.0

#: S3 allows 1024 bytes for a key; the names below the prefix, and those of a check, need the rest.
_LONGEST_PREFIX = 900

_MB = 1 << 20

#: What S3 allows as tags of an object.
_MOST_TAGS = 10
_TAG_KEY, _TAG_VALUE = re.compile(r"[\w .:/=+@-]{1,128}"), re.compile(r"[\w .:/=+@-]{0,256}")


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
_SIZE = "a whole number with KB, MB or GB, at least"
_TIME = f"a time with its unit, at least 1s, such as 30s or 10m: {_SECONDS}"
s3_use_ssl = _datatype("s3-use-ssl", "boolean", "true or false")
cache_size = _datatype("cache-size", "byte-size", f"0 or {_SIZE} 1MB, such as 500MB or 20GB: {_BYTES}", _MB, zero=True)
s3_multipart_threshold = _datatype(
    "s3-multipart-threshold", "byte-size", "a whole number with MB or GB, from 5MB to 5GB", 5 * _MB, 5 << 30
)
s3_concurrency = _datatype("s3-concurrency", "integer", "a whole number of at least 1", 1)
s3_connect_timeout = _timeout("s3-connect-timeout")
s3_read_timeout = _timeout("s3-read-timeout")
s3_max_attempts = _datatype("s3-max-attempts", "integer", "a whole number of at least 1", 1)
s3_stage_threshold = _datatype(
    "s3-stage-threshold", "byte-size", f"0 or {_SIZE} 1KB, such as 4MB: {_BYTES}", 1 << 10, zero=True
)
presigned_urls = _datatype(
    "presigned-urls",
    "time-interval",
    f"0 or a time with its unit, from 1s to 7d (the limit of S3), such as 1h: {_SECONDS}",
    1,
    LONGEST,
    zero=True,
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


#: The keys that name a file or a directory.
PATHS = ("s3-ca-file", "cache-dir", "fallback-blob-dir")

_SECRETS = ("s3-access-key", "s3-secret-key", "s3-session-token", "s3-sse-customer-key")


def check_texts(config: Any) -> None:
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


def make_absolute(config: Any, key: str) -> None:
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


def read_settings(config: Any) -> BucketSettings:
    """Return the checked settings of a bucket that is only read; ConfigurationError names the first invalid key."""
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
    if config.s3_session_token and not config.s3_access_key:
        raise ZConfig.ConfigurationError(
            "s3-session-token is set, but s3-access-key and s3-secret-key are not: set all three, or none, and boto3 "
            "finds and renews credentials by itself"
        )
    _one_of("s3-addressing-style", config.s3_addressing_style, ("auto", "path", "virtual"))
    checksums: Any = config.s3_checksums or ("when_required" if endpoint else "when_supported")
    _one_of("s3-checksums", checksums, ("when_supported", "when_required"))
    tls = endpoint.startswith("https:") if endpoint else config.s3_use_ssl
    return BucketSettings(
        bucket_name=config.bucket_name,
        s3_prefix=prefix,
        s3_endpoint_url=endpoint or None,
        s3_region=config.s3_region or None,
        s3_access_key=config.s3_access_key or None,
        s3_secret_key=config.s3_secret_key or None,
        s3_session_token=config.s3_session_token or None,
        s3_use_ssl=config.s3_use_ssl,
        s3_ca_file=config.s3_ca_file or None,
        s3_addressing_style=config.s3_addressing_style,
        s3_sse_customer_key=_customer_key(config.s3_sse_customer_key, tls),
        s3_checksums=checksums,
        s3_connect_timeout=config.s3_connect_timeout,
        s3_read_timeout=config.s3_read_timeout,
        s3_max_attempts=config.s3_max_attempts,
    )


def bucket_settings(config: Any) -> BucketSettings:
    """Return the checked S3 settings of the section; ConfigurationError names the key of the first invalid one."""
    settings = read_settings(config)
    if config.s3_public_endpoint_url and not _is_endpoint(config.s3_public_endpoint_url):
        raise ZConfig.ConfigurationError("s3-public-endpoint-url must be http(s)://host[:port][/path]")
    if config.s3_sse:
        _one_of("s3-sse", config.s3_sse, ("AES256", "aws:kms"))
        if settings.s3_sse_customer_key:
            raise ZConfig.ConfigurationError("s3-sse-customer-key and s3-sse exclude each other: set one of them")
    if config.s3_sse_kms_key_id and config.s3_sse != "aws:kms":
        raise ZConfig.ConfigurationError("s3-sse-kms-key-id needs s3-sse aws:kms")
    if " " in (config.s3_sse_kms_key_id or ""):
        raise ZConfig.ConfigurationError("s3-sse-kms-key-id must be the id, alias or ARN of a key, without blanks")
    if config.s3_storage_class and not re.fullmatch("[A-Z0-9_]+", config.s3_storage_class):
        raise ZConfig.ConfigurationError("s3-storage-class must be a name in capitals, such as STANDARD_IA")
    return replace(
        settings,
        s3_public_endpoint_url=config.s3_public_endpoint_url or None,
        s3_sse=config.s3_sse or None,
        s3_sse_kms_key_id=config.s3_sse_kms_key_id or None,
        s3_storage_class=config.s3_storage_class or None,
        s3_tagging=_tagging(config.s3_tagging),
        s3_multipart_threshold=config.s3_multipart_threshold,
        s3_concurrency=config.s3_concurrency,
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


def _customer_key(encoded: str | None, tls: bool) -> bytes | None:
    if not encoded:
        return None
    if not tls:
        raise ZConfig.ConfigurationError(
            "s3-sse-customer-key sends the key with every request and so needs TLS: use an https:// s3-endpoint-url "
            "and s3-use-ssl true"
        )
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ZConfig.ConfigurationError(
            "s3-sse-customer-key must be 32 bytes in base64, as `openssl rand -base64 32` makes them"
        )
    return key


def _tagging(text: str | None) -> str | None:
    """Return the tags in ``text`` as a URL query with all special characters encoded; None without tags."""
    if not text:
        return None
    try:
        tags = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        tags = []
    if not tags or not all(_TAG_KEY.fullmatch(key) and _TAG_VALUE.fullmatch(value) for key, value in tags):
        raise ZConfig.ConfigurationError(
            "s3-tagging must be in the form of a URL query, such as project=plone&env=prod: names of 1 to 128 and "
            "values of up to 256 characters, which are letters, digits, blanks (written +) and _ . : / = + - @ (= and "
            "+ written %3D and %2B)"
        )
    if len(tags) > _MOST_TAGS or len(dict(tags)) < len(tags):
        raise ZConfig.ConfigurationError(f"s3-tagging must have at most {_MOST_TAGS} tags, each with a name of its own")
    if any(key.lower().startswith("aws:") for key, _ in tags):
        raise ZConfig.ConfigurationError("s3-tagging must not have names that begin with aws:, which are Amazon's own")
    return urlencode(tags, quote_via=quote)


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
