"""The errors of S3: boto3's errors translated into our own, each with its reason and the next step.

The place where an error is raised classifies it: every error of a call to boto3 is an error of S3, even if its Python
type is OSError, like botocore's timeouts. No local file is read or written inside such a call, so that an OSError of
this machine's disk cannot be mistaken for an error of S3; the one exception is `LocalError`.
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

#: The code of an error of the operating system: too many files are open.
_EMFILE = "EMFILE"


class BucketError(S3BlobsError):
    """A request to S3 failed. The message names the request, the object, the cause and the next step.

    ``code``: S3's code of the error, or the name of boto3's exception, or "". ``reason``: one of
    `metrics.S3_FAILURES`.
    """

    def __init__(self, message: str, code: str = "", reason: str = "request") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class NotDeleted(BucketError):
    """The objects ``keys`` could not be deleted."""

    def __init__(self, message: str, cause: BucketError, keys: frozenset[str]) -> None:
        super().__init__(message, cause.code, cause.reason)
        self.keys = keys


class BlobDamaged(BucketError):
    """The object differs from the stored blob in every read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "", "damaged")


class BlobMismatch(BucketError):
    """The bucket has another blob at the key of this one."""


class BlobNotFound(S3BlobsError, LookupError):
    """The bucket has no such blob."""


class TransferCancelled(S3BlobsError):
    """The caller of a transfer has cancelled it."""


class ForeignAnswer(botocore.exceptions.HTTPClientError):
    """The server that answered is not an S3 service; raised among botocore's own errors. ``status``: that of HTTP."""

    fmt = "the server that answered is not an S3 service"

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class LocalError(Exception):
    """A carrier of a local file's ``error`` through the libraries that read the file while they send it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def local_file() -> Iterator[None]:
    """Mark an OSError of the body as a local file's. For file operations that boto3 calls; `ask` removes the mark."""
    try:
        yield
    except OSError as error:
        raise LocalError(error) from None


def ask(what: str, call: Callable[[], T], hint: Callable[["BucketError"], str] = lambda error: "") -> T:
    """Return the result of ``call``, which only uses boto3; translate its errors.

    ``what``: the action for messages, as in "read KEY of bucket NAME"; ``hint`` returns a text to append to the message
    of an error. Waits for S3.

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
    # Outside the except clause, or the original error would be its context, and show up in tracebacks.
    raise failure


def _translated(error: Exception, what: str) -> Exception:
    """Return our own error for an ``error`` of boto3 or urllib3 during the action ``what``.

    Its message holds only S3's code and our own words: S3's messages may repeat access keys and signed strings.
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
    # The answer to HEAD has no body that could name a code. For other operations a bare 404 says nothing about the
    # object: it may come from a proxy, or mean that the bucket is missing. An operation on the bucket names no object.
    if operation in _ON_ONE_OBJECT and (code == "NoSuchKey" or (operation == "HeadObject" and code == "404")):
        return BlobNotFound(f"Could not {what}: there is no such object")
    reason = reason_of_answer(operation, status, code) or "request"
    advice = _ADVICE.get(code) or _advice_by_words(code) or _ADVICE_BY_REASON.get(reason, "")
    advice = advice.format(_PERMISSIONS.get(operation, "it"))
    return BucketError(f"Could not {what}: the service answered {code} (HTTP {status}){advice}", code, reason)


def _advice_by_words(code: str) -> str:
    return next((advice for words, advice in _ADVICE_BY_WORDS.items() if re.search(words, code)), "")


# Exceptions of boto3


def code_and_reason(error: BaseException) -> tuple[str, str]:
    """Return the code and the reason, one of `metrics.S3_FAILURES`, of an ``error`` raised instead of an answer."""
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


#: The exceptions of boto3 when it finds no credentials.
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

#: Errors of the connection, except those in `_TIMEOUTS`. Most are also OSErrors.
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
    # boto3 asked for new credentials, and those had expired as well. It has no error of its own for that.
    return isinstance(error, RuntimeError) and "refreshed credentials" in str(error)


def interruption(error: BaseException) -> BaseException | None:
    """Return the exception that ended a transfer from inside and made boto3 raise ``error``; None if there was none.

    botocore reports an exception of the body that it sends as a broken connection. The exception is a
    `TransferCancelled`, a `LocalError`, or the failure of another part of the transfer: a ClientError or
    CancelledError. An ``error`` that is a ClientError itself is returned as well.
    """
    for one in _chain(error):
        if isinstance(one, TransferCancelled | LocalError):
            return one
    nearest = error, error.__context__
    return next((one for one in nearest if isinstance(one, botocore.exceptions.ClientError | CancelledError)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and the exceptions that caused it."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            # botocore keeps the cause in kwargs, urllib3 in reason or among the arguments.
            kwargs = getattr(one, "kwargs", None)
            waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
            waiting.append(kwargs.get("error") if isinstance(kwargs, dict) else None)


def _cause(error: BaseException) -> str:
    """Return the cause of a failed connection in brackets, in our own words; "" if the error's name says enough."""
    for one in _chain(error):
        if isinstance(one, CertificateError) or getattr(one, "verify_code", None) in _OTHER_HOST:
            return _CERTIFICATE_OF_OTHERS
        if isinstance(one, ssl.SSLCertVerificationError):
            out_of_date = getattr(one, "verify_code", None) in _OUT_OF_DATE
            return _CERTIFICATE_OUT_OF_DATE if out_of_date else " (the certificate of the service is not trusted)"
        if isinstance(one, ssl.SSLError) and getattr(one, "reason", None) in _NO_TLS:
            return _WITHOUT_TLS
        if isinstance(one, socket.gaierror):
            return " (the host name is unknown)"
        if isinstance(one, ConnectionRefusedError):
            return " (the connection was refused)"
        if isinstance(one, ConnectionResetError | BrokenPipeError):
            return " (the connection was closed by the other side)"
        tunnel = re.match(r"Tunnel connection failed: (\d{3})\b", str(one)) if isinstance(one, OSError) else None
        if tunnel:
            return f" (the proxy answered {tunnel[1]})"
    return ""


_CERTIFICATE_OF_OTHERS = " (the certificate of the service is for another host name)"
_CERTIFICATE_OUT_OF_DATE = " (the certificate of the service has expired, or is not valid yet)"
_WITHOUT_TLS = " (the server there does not speak TLS)"

#: OpenSSL's verify_code of certificates for another name or address, and of those not yet or no longer valid.
_OTHER_HOST, _OUT_OF_DATE = (62, 64), (9, 10)
#: OpenSSL's names for the answer of a server that does not speak TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}


# Answers of S3


def code_of(error: Mapping[str, Any]) -> str:
    """Return S3's code from the error element of an answer; "" if there is none, or it does not look like a code.

    The code goes into logs and to terminals, where other text could pass for lines of ours.
    """
    code = str(error.get("Code") or "")
    return code if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", code) else ""


def reason_of_answer(operation: str, status: int, code: str) -> str | None:
    """Return the reason of a failure, one of `metrics.S3_FAILURES`; None if the answer is no failure.

    ``operation``: the operation's S3 name; ``status``: that of HTTP; ``code``: the result of `code_of`.
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

#: Codes of invalid credentials that S3 sends with another status than 401 or 403.
_AUTH = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}

#: Codes that come with status 403 for another reason than the credentials.
_NO_MATTER_OF_RIGHTS = {"SecondLevelDomainForbidden", "PathStyleDomainForbidden", "VirtualHostDomainRequired"}

_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}


# Advice: the next step for each error

_CREDENTIALS = "; check s3-access-key and s3-secret-key, or the credentials that boto3 finds"
_REGION = "; check s3-region and s3-endpoint-url"
_FORBIDDEN = "; the policy of the bucket or of the credentials (s3-access-key) forbids {}"
_IN_THE_HOST_NAME = "; the service wants the bucket in the host name: set s3-addressing-style virtual"
_NETWORK = "; check s3-endpoint-url and the network between this machine and the service"
_CERTIFICATE = (
    "; check s3-endpoint-url. For a certificate of a private authority, name the file of the authority's certificate "
    "with s3-ca-file (or AWS_CA_BUNDLE in the environment)"
)

#: Operation -> the permission that it needs.
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

#: Words for codes that say too little.
_WORDS = {NOT_S3: ForeignAnswer.fmt, "NoCredentials": "no credentials"}

#: Code of S3, or name of boto3's exception -> advice. `{}` is replaced by the missing permission.
_ADVICE = {
    NOT_S3: (
        " (it sent a web page, or an answer without S3's headers or elements): a maintenance page, a proxy or another "
        "web server may be there; check s3-endpoint-url"
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

#: Pattern of a part of S3's code -> advice; services differ in the rest of the code.
_ADVICE_BY_WORDS = {
    r"^KMS\.": "; check s3-sse-kms-key-id, and whether the credentials may use that key",
    "(?i)Encryption|^InvalidSSE|ServerSide": "; check s3-sse and s3-sse-customer-key",
    "(?i)StorageClass": "; check s3-storage-class",
    "^InvalidTag": "; check s3-tagging",
}

#: Result of `_cause` -> advice, which comes before all others.
_ADVICE_BY_CAUSE = {
    _CERTIFICATE_OF_OTHERS: "; check the host in s3-endpoint-url, and s3-addressing-style",
    _CERTIFICATE_OUT_OF_DATE: "; renew it, or check the clock of this machine",
    _WITHOUT_TLS: "; check the port in s3-endpoint-url, and whether it must begin with https://",
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

#: Error codes that retrying cannot fix -> the setting to check first.
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
