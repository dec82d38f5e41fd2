"""The errors of S3: what boto3 raises, told as our own errors, with the reason and what to do about it.

An error is classified by where it was raised: whatever comes out of a call to boto3 is an error of S3, also where its
Python type is OSError, as that of botocore's timeouts is. An OSError of this machine's disk cannot be mistaken for
one, because no local file is read or written inside such a call; the one exception is `LocalError`.
"""

import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, TypeVar

import botocore.exceptions
import urllib3.exceptions
from urllib3.util.ssl_match_hostname import CertificateError

from ..errors import S3BlobsError
from ..openfiles import RAISE_THEIR_NUMBER, TOO_MANY_FILES

T = TypeVar("T")

#: The code of a `ForeignAnswer`.
NOT_S3 = "NotS3"

#: The codes of a service that does not know the operation.
NOT_IMPLEMENTED = {"NotImplemented", "501", "MethodNotAllowed", "405"}

#: The code of what the operating system refuses because too many files are open.
_EMFILE = "EMFILE"


class BucketError(S3BlobsError):
    """S3 did not do what was asked. The message says what, on which object, why, and what to do.

    ``code``: what S3 calls the error, or the name of what boto3 raised, or "". ``reason``: one of
    `metrics.S3_FAILURES`.
    """

    def __init__(self, message: str, code: str = "", reason: str = "request") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class NotDeleted(BucketError):
    """Some objects could not be deleted: ``keys``."""

    def __init__(self, message: str, cause: BucketError, keys: frozenset[str]) -> None:
        super().__init__(message, cause.code, cause.reason)
        self.keys = keys


class BlobDamaged(BucketError):
    """The object is not what was stored, however often it is read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "", "damaged")


class BlobMismatch(BucketError):
    """The bucket has another blob where this one should be."""


class BlobNotFound(S3BlobsError, LookupError):
    """The bucket has no such blob."""


class TransferCancelled(S3BlobsError):
    """The caller of a transfer does not want it any more."""


class ForeignAnswer(botocore.exceptions.HTTPClientError):
    """Raised among botocore's own errors: what answered is no S3 service. ``status``: that of HTTP."""

    fmt = "what answered is no S3 service"

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class LocalError(Exception):
    """Carries an ``error`` of a local file through the libraries that read the file while they send it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def local_file() -> Iterator[None]:
    """Mark an OSError of the body as one of a local file. For bodies that boto3 calls; `ask` removes the mark."""
    try:
        yield
    except OSError as error:
        raise LocalError(error) from None


def ask(what: str, call: Callable[[], T], hint: Callable[["BucketError"], str] = lambda error: "") -> T:
    """Return what ``call``, which does nothing but use boto3, returns.

    ``what``: what it does, as in "read KEY of bucket NAME"; ``hint``: returns what the settings tell besides about an
    error, to be added to its message. Waits for S3.

    Raises BlobNotFound, BucketError, TransferCancelled, and the OSError of a local file that is being sent. None of
    them carries an error of boto3, whose text may repeat a credential.
    """
    try:
        return call()
    except (BucketError, BlobNotFound):
        raise
    except Exception as error:
        failure = _translated(error, what)
    if isinstance(failure, BucketError):
        failure.args = (f"{failure}{hint(failure)}",)
    # Out of the except clause, or the original would hang on it as its context, with all that it tells.
    raise failure


def _translated(error: Exception, what: str) -> Exception:
    """Return the error to raise for what boto3 or urllib3 raised while it tried to do ``what``.

    Only S3's code and our own words go into it: S3's messages may repeat access keys and signed strings.
    """
    inside = interruption(error)
    if isinstance(inside, LocalError):
        return inside.error
    if isinstance(inside, botocore.exceptions.ClientError):
        return _refused(inside, what)
    if inside is not None:
        return TransferCancelled(f"Could not {what}: it was cancelled")
    code, reason = code_and_reason(error)
    said, cause = _WORDS.get(code, code), _cause(error)
    advice = _ADVICE_BY_CAUSE.get(cause, _ADVICE.get(code, _ADVICE_BY_REASON.get(reason, "")))
    return BucketError(f"Could not {what}: {said}{cause}{advice}", code, reason)


def _refused(error: botocore.exceptions.ClientError, what: str) -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
    code = code_of(error.response.get("Error", {})) or str(status)
    operation = error.operation_name
    # The answer to HEAD has no body that could name a code. To anything else a bare 404 is no word on the object: it
    # may come from a proxy, or mean the bucket. An operation on the bucket is not about any object.
    if operation in _ON_ONE_OBJECT and (code == "NoSuchKey" or (operation == "HeadObject" and code == "404")):
        return BlobNotFound(f"Could not {what}: there is no such object")
    reason = reason_of_answer(operation, status, code) or "request"
    advice = _ADVICE.get(code) or _advice_by_words(code) or _ADVICE_BY_REASON.get(reason, "")
    advice = advice.format(_PERMISSIONS.get(operation, "it"))
    return BucketError(f"Could not {what}: the service answered {code} (HTTP {status}){advice}", code, reason)


def _advice_by_words(code: str) -> str:
    return next((advice for words, advice in _ADVICE_BY_WORDS.items() if re.search(words, code)), "")


# What boto3 raises


def code_and_reason(error: BaseException) -> tuple[str, str]:
    """Return the code and the reason, one of `metrics.S3_FAILURES`, of what was raised instead of an answer."""
    if isinstance(error, _NO_CREDENTIALS):
        return _no_credentials(error), "auth"
    if _got_old_credentials(error):
        return "ExpiredToken", "auth"
    if isinstance(error, ForeignAnswer):
        return NOT_S3, "foreign"
    if isinstance(error, botocore.exceptions.FlexibleChecksumError):
        return type(error).__name__, "damaged"
    if any(isinstance(one, OSError) and one.errno in TOO_MANY_FILES for one in _chain(error)):
        return _EMFILE, "connection"
    name = type(error).__name__
    if isinstance(error, _TIMEOUTS):
        return name, "timeout"
    return name, "connection" if isinstance(error, _CONNECTION) else "request"


#: What boto3 raises when there are no credentials to ask S3 with.
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOError,
)

_TIMEOUTS = (
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
    urllib3.exceptions.TimeoutError,
    TimeoutError,
)

#: Most are OSErrors besides. What is not in `_TIMEOUTS` as well.
_CONNECTION = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    OSError,
)


def _no_credentials(error: BaseException) -> str:
    names = botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError
    return "NoCredentials" if isinstance(error, names) else type(error).__name__


def _got_old_credentials(error: BaseException) -> bool:
    # boto3 has asked for new credentials, and those were over as well. It has no error of its own for that.
    return isinstance(error, RuntimeError) and "refreshed credentials" in str(error)


def interruption(error: BaseException) -> BaseException | None:
    """Return what was raised while boto3 read the body that it sent, and had it raise ``error``; None if nothing was.

    botocore takes it for a broken connection. It is a `TransferCancelled`, a `LocalError`, or what another part of the
    same transfer failed with: a ClientError or CancelledError. A ClientError that is itself raised is returned as well.
    """
    for one in _chain(error):
        if isinstance(one, TransferCancelled | LocalError):
            return one
    nearest = error, error.__context__
    return next((one for one in nearest if isinstance(one, botocore.exceptions.ClientError | CancelledError)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, and what it was raised for."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            # botocore keeps it in kwargs, urllib3 in reason or among the arguments.
            kwargs = getattr(one, "kwargs", None)
            waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
            waiting.append(kwargs.get("error") if isinstance(kwargs, dict) else None)


def _cause(error: BaseException) -> str:
    """Return why a connection failed, in brackets and in words of our own; "" where the name of the error says it."""
    for one in _chain(error):
        if isinstance(one, CertificateError) or getattr(one, "verify_code", None) in _OTHER_HOST:
            return _CERTIFICATE_OF_OTHERS
        if isinstance(one, ssl.SSLCertVerificationError):
            out_of_date = getattr(one, "verify_code", None) in _OUT_OF_DATE
            return _CERTIFICATE_OUT_OF_DATE if out_of_date else " (the certificate of the service is not trusted)"
        if isinstance(one, ssl.SSLError) and getattr(one, "reason", None) in _NO_TLS:
            return _WITHOUT_TLS
        if isinstance(one, socket.gaierror):
            return " (the name of the host is not known)"
        if isinstance(one, ConnectionRefusedError):
            return " (the connection was refused)"
        if isinstance(one, ConnectionResetError | BrokenPipeError):
            return " (the connection was closed by the other side)"
        tunnel = re.match(r"Tunnel connection failed: (\d{3})\b", str(one)) if isinstance(one, OSError) else None
        if tunnel:
            return f" (the proxy answered {tunnel[1]})"
    return ""


_CERTIFICATE_OF_OTHERS = " (the certificate of the service is for another host name)"
_CERTIFICATE_OUT_OF_DATE = " (the certificate of the service is not valid any more, or not yet)"
_WITHOUT_TLS = " (what listens there does not speak TLS)"

#: Of OpenSSL: the verify_code of certificates for another name or address, and of those not valid yet or any more.
_OTHER_HOST, _OUT_OF_DATE = (62, 64), (9, 10)
#: How OpenSSL calls the answer of what does not speak TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}


# What S3 answers


def code_of(error: Mapping[str, Any]) -> str:
    """Return S3's code in the part of an answer that tells an error; "" if there is none, or it is no code.

    It goes into logs and to terminals, where other text could pass for lines of ours.
    """
    code = str(error.get("Code") or "")
    return code if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", code) else ""


def reason_of_answer(operation: str, status: int, code: str) -> str | None:
    """Return why an answer is a failure, one of `metrics.S3_FAILURES`; None if it is none.

    ``operation``: its name in S3; ``status``: that of HTTP; ``code``: that of `code_of`.
    """
    if status < 300 or status in (412, 416):
        return None
    if operation in _ON_ONE_OBJECT and (code == "NoSuchKey" or (operation == "HeadObject" and status == 404)):
        return None
    if code in _THROTTLED or status == 429:
        return "throttled"
    if status == 507 or re.search("(?i)quota|StorageFull|InsufficientStorage", code):
        return "quota"
    if code in ("InvalidObjectState", "ObjectNotInActiveTierError"):
        return "archived"
    if (status in (401, 403) and code not in _NO_MATTER_OF_RIGHTS) or code in _AUTH:
        return "auth"
    if status == 503:
        return "throttled"
    if status == 408 or code == "RequestTimeout":
        return "timeout"
    return "server" if status >= 500 and status != 501 else "request"


_ON_ONE_OBJECT = {"GetObject", "HeadObject", "PutObject", "CopyObject", "DeleteObject", "UploadPartCopy"}

#: Codes that S3 gives with another status than 401 or 403.
_AUTH = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}

#: Codes that come with status 403, and not because of who asks.
_NO_MATTER_OF_RIGHTS = {"SecondLevelDomainForbidden", "PathStyleDomainForbidden", "VirtualHostDomainRequired"}

_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}


# What to do next

_CREDENTIALS = "; check s3-access-key and s3-secret-key, or the credentials that boto3 finds"
_REGION = "; check s3-region and s3-endpoint-url"
_FORBIDDEN = "; the policy of the bucket or of the credentials (s3-access-key) forbids {}"
_IN_THE_HOST_NAME = "; the service wants the bucket in the host name: set s3-addressing-style virtual"
_NETWORK = "; check s3-endpoint-url and the network between this machine and the service"
_CERTIFICATE = (
    "; check s3-endpoint-url. For a certificate of a private authority, name the file of the authority's certificate "
    "with s3-ca-file (or AWS_CA_BUNDLE in the environment)"
)

#: What an operation has to be allowed.
_PERMISSIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "CopyObject": "s3:PutObject, or s3:GetObject of the source",
    "UploadPartCopy": "s3:PutObject, or s3:GetObject of the source",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}

#: What to say for a code that is no word of its own.
_WORDS = {NOT_S3: ForeignAnswer.fmt, "NoCredentials": "no credentials"}

#: By the code of S3 or the name of what boto3 raised. In the place of {} comes the permission.
_ADVICE = {
    NOT_S3: (
        " (it sent a web page, or an answer without what S3 always sends): a maintenance page, a proxy or another web "
        "server may be there; check s3-endpoint-url"
    ),
    _EMFILE: f"; {RAISE_THEIR_NUMBER}",
    "NoSuchBucket": "; check bucket-name and s3-endpoint-url",
    "NoSuchKey": (
        "; the service took the name of the bucket for that of an object: s3-endpoint-url must not contain the name of "
        "the bucket"
    ),
    "404": "; check bucket-name and s3-endpoint-url",
    "InvalidBucketName": "; check bucket-name",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": (
        f"{_CREDENTIALS}. If they are right, look for a proxy before the service that changes the Host header or the "
        f"path of requests"
    ),
    "AuthFailure": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "NoCredentials": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "TokenRetrievalError": _CREDENTIALS,
    "AccessDenied": _FORBIDDEN,
    "403": _FORBIDDEN,
    "SecondLevelDomainForbidden": _IN_THE_HOST_NAME,
    "PathStyleDomainForbidden": _IN_THE_HOST_NAME,
    "VirtualHostDomainRequired": _IN_THE_HOST_NAME,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "InvalidRegionError": "; check s3-region, or AWS_REGION and AWS_DEFAULT_REGION in the environment",
    "ProfileNotFound": "; check AWS_PROFILE in the environment, or set s3-access-key and s3-secret-key",
    "EndpointResolutionError": "; check s3-endpoint-url and bucket-name",
    "ValueError": "; check s3-endpoint-url",
    "RequestTimeTooSkewed": "; check the clock of this machine",
    "InvalidStorageClass": "; check s3-storage-class",
    "MissingContentLength": "; set s3-checksums to when_required",
    "413": (
        "; a proxy before the service limits the size of requests, which must be at least s3-multipart-threshold and "
        "8 MiB: raise that limit (nginx: client_max_body_size)"
    ),
    "EntityTooLarge": "; the service takes no object, or no part of one, of that size: lower s3-multipart-threshold",
    "SSLError": _CERTIFICATE,
    "ProxyConnectionError": "",  # the hint names the variable of the environment
}

#: By a part of the code of S3; services differ in the rest.
_ADVICE_BY_WORDS = {
    r"^KMS\.": "; check s3-sse-kms-key-id, and whether the credentials may use that key",
    "(?i)Encryption|^InvalidSSE|ServerSide": "; check s3-sse and s3-sse-customer-key",
    "(?i)StorageClass": "; check s3-storage-class",
}

#: By what `_cause` returns, before all others.
_ADVICE_BY_CAUSE = {
    _CERTIFICATE_OF_OTHERS: "; check the host in s3-endpoint-url, and s3-addressing-style",
    _CERTIFICATE_OUT_OF_DATE: "; renew it, or check the clock of this machine",
    _WITHOUT_TLS: "; check the port in s3-endpoint-url, and whether it is to begin with https://",
}

_ADVICE_BY_REASON = {
    "quota": (
        "; the bucket is full: raise its quota, or delete content and pack the database, which makes room by deleting "
        "dead blobs"
    ),
    "archived": (
        "; the object is archived: a lifecycle rule, or a storage class with an archive tier, has moved it. Restore "
        "it, and end that rule for the blobs"
    ),
    "auth": _FORBIDDEN,
    "timeout": _NETWORK,
    "connection": _NETWORK,
}

#: The codes that no waiting will cure, and the key whose value is to be looked at first.
SETTING_FOR_ERROR = {
    "NoSuchBucket": "bucket-name",
    "InvalidBucketName": "bucket-name",
    "ParamValidationError": "bucket-name",
    "NoSuchKey": "s3-endpoint-url",
    "SecondLevelDomainForbidden": "s3-addressing-style",
    "PathStyleDomainForbidden": "s3-addressing-style",
    "VirtualHostDomainRequired": "s3-addressing-style",
    "InvalidAccessKeyId": "s3-access-key",
    "SignatureDoesNotMatch": "s3-secret-key",
    "AuthFailure": "s3-access-key",
    "InvalidToken": "s3-access-key",
    "NoCredentials": "s3-access-key",
    "AccessDenied": "s3-access-key",
    "403": "s3-access-key",
    "AuthorizationHeaderMalformed": "s3-region",
    "PermanentRedirect": "s3-region",
    "301": "s3-region",
    "InvalidRegionError": "s3-region",
    "ProfileNotFound": "s3-access-key",
    "EndpointResolutionError": "s3-endpoint-url",
    "ValueError": "s3-endpoint-url",
    "InvalidCABundle": "s3-ca-file",
}
