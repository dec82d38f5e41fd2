"""The diagnosis of a bucket that does not work, for ``zodb-s3blobs check``: tests which key of the section helps.

A key is named only if requests have succeeded without that key, or with another value.
"""

import socket
import ssl
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ...s3.errors import SETTING_FOR_ERROR, BlobNotFound, BucketError
from .scratch import FORBIDDEN, Scratch, WrongKey, is_answered

SMALL = b"This is a blob of zodb-s3blobs check."

#: Refusals that no other setting of the connection changes: the credentials are unknown, or the clock is wrong.
_OF_CREDENTIALS = {
    *("InvalidAccessKeyId", "NoCredentials", "AuthFailure", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
    *("CredentialRetrievalError", "TokenRetrievalError", "SSOError", "ProfileNotFound", "RequestTimeTooSkewed"),
}

#: Values of `BucketError.reason` that no optional key of an upload causes.
_OF_THE_MOMENT = {"timeout", "throttled", "quota"}

#: Optional key of an upload -> the changes that omit it, the smaller changes first.
_WITHOUT: dict[str, dict[str, Any]] = {
    "s3-sse-kms-key-id": {"s3_sse_kms_key_id": None},
    "s3-sse": {"s3_sse": None, "s3_sse_kms_key_id": None},
    "s3-sse-customer-key": {"s3_sse_customer_key": None},
    "s3-storage-class": {"s3_storage_class": None},
    "s3-tagging": {"s3_tagging": None},
}

#: Time limit in seconds of a connection that only identifies the server.
_LOOK = 5.0

_BY_REASON = {
    "server": "; the service, or a proxy before it, is out of order: see its log, or try again later",
    "throttled": "; the service, or a proxy before it, takes no more requests at the moment: try again later",
}


def reach(scratch: Scratch) -> str:
    """Test whether any check can succeed, and which keys make uploads fail: `Scratch.wrong`.

    Returns "", or the reason if the bucket exists and its policy forbids every request. Raises BucketError, with
    advice, if the bucket cannot be reached, or not with these credentials.
    """
    trouble = _trouble(scratch)
    if trouble is None:
        find_wrong_keys(scratch)
        return ""
    hopeless = trouble.code in _OF_CREDENTIALS or trouble.code in SETTING_FOR_ERROR.keys() - FORBIDDEN
    if is_answered(trouble) and not hopeless:
        # Perhaps only listing does not work.
        find_wrong_keys(scratch)
        refusal = scratch.unwritable
        if refusal is None or refusal.code != trouble.code:
            return ""
        trouble = BucketError(f"{trouble}. An upload is refused as well", trouble.code, trouble.reason)
    remedy = next(_remedies(scratch, trouble), "")
    if trouble.code in FORBIDDEN and not remedy:
        return (
            f"{trouble}: see whether the credentials (s3-access-key) are those for this "
            f"bucket, and have its policy allow them s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
            f"{_advice(trouble)}"
        )
    raise BucketError(f"{trouble}{remedy or _advice(trouble)}", trouble.code, trouble.reason)


def _trouble(scratch: Scratch, **changes: Any) -> BucketError | None:
    """Return the error of listing the bucket with changed settings, None on success."""
    scratch.check_wanted()
    try:
        (scratch.open(**changes) if changes else scratch.bucket).probe()
    except BucketError as error:
        return error
    return None


def _advice(trouble: BucketError) -> str:
    if trouble.code.isdigit() and is_answered(trouble):
        return (
            ". The answer has no error code, unlike those of S3: another web server, or a proxy, may answer at "
            "s3-endpoint-url"
        )
    return "" if "_PROXY names" in str(trouble) else _BY_REASON.get(trouble.reason, "")


# Remedies for a bucket that cannot be reached


def _remedies(scratch: Scratch, trouble: BucketError) -> Iterator[str]:
    """Yield remedies as sentences to append to ``trouble``."""
    if trouble.code in _OF_CREDENTIALS or trouble.code == "EMFILE":
        return
    quick = {
        "s3_max_attempts": 1,
        "s3_connect_timeout": min(scratch.settings.s3_connect_timeout, _LOOK),
        "s3_read_timeout": min(scratch.settings.s3_read_timeout, _LOOK),
    }
    for changes in _other_addresses(scratch, trouble):
        if _trouble(scratch, **changes, **quick) is None:
            said = " and ".join(f"{key.replace('_', '-')} {value}" for key, value in changes.items())
            yield f". It answers with {said}: set that"
    if trouble.reason in ("connection", "timeout", "foreign") or trouble.code.isdigit():
        yield from _other_protocol(scratch.bucket.endpoint_url)


def _other_addresses(scratch: Scratch, trouble: BucketError) -> Iterator[dict[str, str]]:
    """Yield changes of the settings that send requests to another host or path."""
    settings, url = scratch.settings, urlsplit(scratch.bucket.endpoint_url)
    name, host = settings.bucket_name, url.hostname or ""
    endpoints = []
    if settings.s3_endpoint_url and host.startswith(f"{name.lower()}."):
        endpoints.append(url._replace(netloc=url.netloc[len(name) + 1 :]))
    if settings.s3_endpoint_url and name in url.path.split("/"):
        path = "/".join(part for part in url.path.split("/") if part != name)
        endpoints.append(url._replace(path=path.rstrip("/")))
    for endpoint in endpoints:
        yield {"s3_endpoint_url": urlunsplit(endpoint)}
        yield {"s3_endpoint_url": urlunsplit(endpoint), "s3_addressing_style": "virtual"}
    style = settings.s3_addressing_style
    if style == "auto":  # boto3's own choice
        style = "path" if settings.s3_endpoint_url else "virtual"
    if style == "virtual":
        yield {"s3_addressing_style": "path"}
    elif not _is_address(host) and (is_answered(trouble) or trouble.reason == "foreign"):
        yield {"s3_addressing_style": "virtual"}


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def _other_protocol(endpoint: str) -> Iterator[str]:
    """Yield the remedy if the service speaks TLS and ``endpoint`` begins with http, or the other way round."""
    url = urlsplit(endpoint)
    place = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    speaks_tls = _speaks_tls(*place)
    if url.scheme == "http" and speaks_tls:
        yield f". Port {place[1]} speaks TLS: let s3-endpoint-url begin with https://"
    if url.scheme == "https" and not speaks_tls and _speaks_http(*place):
        yield f". Port {place[1]} speaks http without TLS: give s3-endpoint-url the port for TLS, or begin it with http://"


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no data is sent, and none is used
    try:
        with (
            socket.create_connection((host, port), _LOOK) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):
        return False


def _speaks_http(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _LOOK) as plain:
            plain.sendall(f"HEAD / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            return plain.recv(5, socket.MSG_WAITALL) == b"HTTP/"
    except (OSError, ValueError):
        return False


# Keys that make uploads fail


def find_wrong_keys(scratch: Scratch) -> None:
    """Store a blob and read it; if that fails, find the keys of the section without which it works.

    `Scratch.wrong` has these keys afterwards, and the settings omit them. If it fails in any case, the error is in
    `Scratch.unwritable` or `Scratch.unreadable`.
    """
    failure = _try(scratch)
    if failure is None:
        return
    if failure.error.reason not in _OF_THE_MOMENT and failure.error.code != "EMFILE":
        found = _one_wrong_key(scratch, failure.error) or _several_wrong_keys(scratch)
        if found is not None:
            if _try(scratch) is not None:  # or the error was a passing one
                changes, scratch.wrong = found
                scratch.use(**changes)
            return
    if failure.is_stored:
        scratch.unreadable = failure.error
    else:
        scratch.unwritable = failure.error


class _Failure:
    def __init__(self, error: BucketError, is_stored: bool) -> None:
        self.error = error
        self.is_stored = is_stored


def _try(scratch: Scratch, **changes: Any) -> _Failure | None:
    """Store a blob with changed settings and read it again; return the failure, None on success."""
    scratch.check_wanted()
    bucket = scratch.open(**changes) if changes else scratch.bucket
    name, is_stored = scratch.name(), False
    try:
        scratch.put(SMALL, name, bucket)
        is_stored = True
        scratch.get(name, bucket)
    except BucketError as error:
        return _Failure(error, is_stored)
    except BlobNotFound:
        pass  # the check "put and get" reports it
    return None


Found = tuple[dict[str, Any], dict[str, WrongKey]]


def _one_wrong_key(scratch: Scratch, error: BucketError) -> Found | None:
    """Return the changes of the settings with which uploads work, and the wrong key; None if no single key helps."""
    for key, instead, changes in _alternatives(scratch, error):
        if _try(scratch, **changes) is None:
            return changes, {key: WrongKey(error, instead)}
    return None


def _alternatives(scratch: Scratch, error: BucketError) -> Iterator[tuple[str, str, dict[str, Any]]]:
    checksums = _other_checksums(scratch)
    yield "s3-checksums", checksums, {"s3_checksums": checksums}
    for key in _in_use(scratch):
        yield key, "", _WITHOUT[key]
    if error.code in FORBIDDEN and not (scratch.settings.s3_sse or scratch.settings.s3_sse_customer_key):
        # A policy may forbid uploads that do not ask for encryption.
        for algorithm in "AES256", "aws:kms":
            yield "s3-sse", algorithm, {"s3_sse": algorithm}


def _other_checksums(scratch: Scratch) -> str:
    return "when_required" if scratch.settings.s3_checksums == "when_supported" else "when_supported"


def _in_use(scratch: Scratch) -> list[str]:
    return [key for key in _WITHOUT if getattr(scratch.settings, key.replace("-", "_"))]


def _several_wrong_keys(scratch: Scratch) -> Found | None:
    """Return the changes of the settings with which uploads work, and all wrong keys; None if none help."""
    keys = _in_use(scratch)
    without = {name: None for key in keys for name in _WITHOUT[key]}
    for checksums in scratch.settings.s3_checksums, _other_checksums(scratch):
        changes: dict[str, Any] = {**without, "s3_checksums": checksums}
        if keys and _try(scratch, **changes) is None:
            return _with_all_that_work(scratch, keys, changes)
    return None


def _with_all_that_work(scratch: Scratch, keys: list[str], changes: dict[str, Any]) -> Found:
    wrong: dict[str, WrongKey] = {}
    # s3-sse-kms-key-id needs s3-sse, so s3-sse comes first.
    candidates = {"s3-checksums": scratch.settings.s3_checksums, **dict.fromkeys(reversed(keys))}
    for key in candidates:
        name = key.replace("-", "_")
        trial = {**changes, name: getattr(scratch.settings, name)}
        if trial == changes or (key == "s3-sse-kms-key-id" and not changes["s3_sse"]):
            continue
        failure = _try(scratch, **trial)
        if failure is None:
            changes = trial
        else:
            wrong[key] = WrongKey(failure.error, changes["s3_checksums"] if key == "s3-checksums" else "")
    return changes, wrong
