"""The boto3 client of one bucket: connections, time limits, repetitions, and answers that are not S3's.

Two of botocore's events are handled here: `before-send` sends every request over sessions of our own, which refuse
answers that S3 cannot have given, and `needs-retry` decides on repetitions.
"""

import contextlib
import datetime
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.session
import botocore.utils

from .errors import NOT_IMPLEMENTED, BucketError, ForeignAnswer, ask, code_and_reason, code_of, interruption

T = TypeVar("T")

#: Seconds without traffic after which firewalls, NAT and load balancers may have forgotten a connection. The kernel's
#: keepalive probes keep an unused connection known; an older one is no longer taken from the pool.
_IDLE = 60

#: Loggers whose debug messages repeat access keys, signatures and the key of SSE-C.
_LOGGERS_THAT_LEAK = ("boto3", "botocore", "s3transfer")

#: HTTP statuses of passing failures. 509 and 520 to 524 come from proxies in front of a service.
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504, 509, *range(520, 525)}
_PASSING_CODES = {"OperationAborted", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}

#: Requests that a service works on long after their connection is gone. They are not repeated while that work may
#: still be going on: after a connection that broke, or a proxy that stopped waiting.
_LONG_WORK = {"CopyObject", "UploadPartCopy"}
_STATUSES_OF_IMPATIENT_PROXIES = {408, 502, 504, *range(520, 525)}

#: The codes with which services refuse to read an object without its customer key, or with another one.
_OF_OTHER_KEYS = {"AccessDenied", "403", "InvalidRequest", "InvalidArgument", "400"}

#: The most seconds between two tries.
_LONGEST_PAUSE = 20.0


@dataclass
class BucketSettings:
    """The settings of a bucket, named like the configuration keys. Times in seconds, sizes in bytes."""

    bucket_name: str
    s3_prefix: str = ""
    s3_endpoint_url: str | None = None
    s3_public_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_access_key: str | None = field(default=None, repr=False)
    s3_secret_key: str | None = field(default=None, repr=False)
    s3_session_token: str | None = field(default=None, repr=False)
    s3_use_ssl: bool = True
    s3_ca_file: str | None = None
    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    s3_sse_customer_key: bytes | None = field(default=None, repr=False)
    s3_sse: str | None = None
    s3_sse_kms_key_id: str | None = None
    s3_storage_class: str | None = None
    #: The tags of new objects in the form of a URL query.
    s3_tagging: str | None = None
    s3_checksums: Literal["when_supported", "when_required"] = "when_required"
    s3_multipart_threshold: int = 8 << 20
    s3_concurrency: int = 16
    s3_connect_timeout: float = 5
    s3_read_timeout: float = 30
    s3_max_attempts: int = 3
    #: How long the service may take to copy up to 64 MiB inside the bucket; it is silent until it is done.
    copy_timeout: float = 120
    #: Called with the bytes of each transfer; waits as long as a limit demands. None: no limit.
    pace: Callable[[int], None] | None = None


class Connection:
    """A boto3 client, and `ask`, through which every call of the client goes. The constructor sends no request.

    Any thread may call. Raises BucketError if boto3 rejects the settings.
    """

    def __init__(self, settings: BucketSettings) -> None:
        self._settings = settings
        session = botocore.session.get_session()
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
        for name in _LOGGERS_THAT_LEAK:
            talkative = logging.getLogger(name)
            talkative.setLevel(max(talkative.getEffectiveLevel(), logging.INFO))
        self._what = f"set up the connection to bucket {settings.bucket_name}"
        self._boto3 = ask(self._what, lambda: boto3.session.Session(botocore_session=session))
        self.client = self._new_client(settings)
        #: The address of the service; without s3-endpoint-url, boto3 may have found another address than Amazon's.
        self.endpoint_url: str = self.client.meta.endpoint_url
        self._proxies = botocore.utils.get_environ_proxies(self.endpoint_url)
        verify = settings.s3_ca_file or session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        self._sessions = _Sessions(settings, verify or True, self._proxies, settings.s3_read_timeout)
        self._patient_sessions = _Sessions(settings, verify or True, self._proxies, settings.copy_timeout)
        events = self.client.meta.events
        events.register_first("before-send.s3", self._send)
        events.register_last("needs-retry.s3", _Repetitions(settings.s3_max_attempts).pause)
        if settings.s3_checksums == "when_required":
            # Every service understands this checksum, and refuses a damaged body because of it.
            for operation in ("PutObject", "UploadPart", "DeleteObjects"):
                events.register_last(f"before-call.s3.{operation}", _add_content_md5)
        if settings.s3_tagging:
            # Here, for every new object. s3transfer tags the result of a copy in parts only afterwards, which a policy
            # that demands tags refuses.
            tags = {"Tagging": settings.s3_tagging}
            for operation in "PutObject", "CreateMultipartUpload":
                events.register_first(f"before-parameter-build.s3.{operation}", _adding(tags))
            copied = {**tags, "TaggingDirective": "REPLACE"}
            events.register_first("before-parameter-build.s3.CopyObject", _adding(copied))

    def _new_client(self, settings: BucketSettings, signature: str | None = None) -> Any:
        return ask(self._what, lambda: _client(self._boto3, settings, signature))

    def new_signer(self) -> Any:
        """Return a boto3 client that signs links with the credentials of this one. The caller sends nothing with it.

        The links lead to s3-public-endpoint-url, or to the service itself.
        """
        public, style = self._settings.s3_public_endpoint_url, self._settings.s3_addressing_style
        url = urlsplit(public or self.endpoint_url)
        if style == "auto" and re.search(r"\.amazonaws\.com(\.cn)?$", url.hostname or ""):
            # By default boto3 signs links to s3.amazonaws.com, which knows neither new buckets nor all regions.
            style = "virtual"
        if "@" in url.netloc:  # a password, in an address that boto3 has found; no browser may get it
            public = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        settings = replace(
            self._settings,
            s3_endpoint_url=public or self._settings.s3_endpoint_url,
            s3_addressing_style=style,
            s3_checksums="when_required",
        )
        # boto3 signs links with version 2 otherwise, which many services and KMS refuse.
        return self._new_client(settings, "s3v4")

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Return the result of ``call``. Raises the errors of `errors.ask`, with hints from the settings."""
        return ask(what, call, self._hint)

    def _send(self, request: Any, event_name: str, **kwargs: Any) -> Any:
        operation = event_name.rpartition(".")[2]
        sessions = self._patient_sessions if operation in _LONG_WORK else self._sessions
        answer = sessions.current().send(request)
        check_answer(operation, answer)
        return answer

    def close(self) -> None:
        """Close the unused connections; a connection in use closes when its request ends."""
        self.client.close()
        self._sessions.close()
        self._patient_sessions.close()

    def _hint(self, error: BucketError) -> str:
        """Return the hint to append to the message of ``error``, or ""."""
        endpoint, bucket = urlsplit(self.endpoint_url), self._settings.bucket_name
        reasons = "timeout", "connection", "foreign", "server", "throttled"  # proxies answer 503 for an unknown host
        if error.reason in reasons and endpoint.scheme in self._proxies:
            variable = f"{endpoint.scheme.upper()}_PROXY"
            return (
                f". Requests go through the proxy that {variable} names in the environment: check that proxy, or add "
                f"{endpoint.hostname} to NO_PROXY"
            )
        if error.code == "SSLError" and self._settings.s3_ca_file and "is not trusted" in str(error):
            return ". s3-ca-file is set, and the file does not hold that authority"
        if error.code in _OF_OTHER_KEYS and str(error).startswith(("Could not read ", "Could not look up ")):
            if self._settings.s3_sse_customer_key:
                return ". s3-sse-customer-key is set, and must be the key with which that object was stored"
            if error.code not in ("AccessDenied", "403"):
                return ". If that object was stored with an s3-sse-customer-key, set that key"
        if self._settings.s3_tagging and "forbids s3:PutObject" in str(error):
            return ". s3-tagging is set, so s3:PutObjectTagging is needed as well"
        if self._settings.s3_tagging and error.code in NOT_IMPLEMENTED:
            return ". s3-tagging is set: remove it if the service does not know tags"
        if self._settings.s3_session_token and error.code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
            return ". s3-session-token is set, and ends some hours after it was issued: set all three anew, and restart"
        wrong_place = error.reason == "foreign" or error.code in ("NoSuchBucket", "404", "InvalidBucketName")
        inside = (endpoint.hostname or "").startswith(f"{bucket.lower()}.") or bucket in endpoint.path.split("/")
        if wrong_place and self._settings.s3_endpoint_url and inside:
            return ". s3-endpoint-url contains the name of the bucket: leave it out there"
        return ""


def _client(session: boto3.session.Session, settings: BucketSettings, signature: str | None) -> Any:
    config = botocore.config.Config(
        # botocore's own repetitions have a budget, which an outage uses up in seconds; after that they never resume.
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        s3={"addressing_style": settings.s3_addressing_style},
        signature_version=signature,
    )
    return session.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key,
        aws_session_token=settings.s3_session_token,
        use_ssl=settings.s3_use_ssl,
        config=config,
    )


class _Sessions:
    """A source of HTTP sessions that does not reuse connections which have been idle for long.

    A session has a pool of connections. A new session replaces it after `_IDLE` seconds, which costs a handshake for
    each connection. After another `_IDLE` seconds, when no request uses the old session any more, it is closed.
    """

    def __init__(
        self, settings: BucketSettings, verify: bool | str, proxies: dict[str, str], read_timeout: float
    ) -> None:
        self._make = lambda: botocore.httpsession.URLLib3Session(
            verify=verify,
            proxies=proxies,
            timeout=(settings.s3_connect_timeout, read_timeout),
            # Eight pools of threads send requests: uploads, staged uploads, their parts, streamed parts, copies, small
            # downloads, large downloads, and their parts.
            max_pool_connections=8 * settings.s3_concurrency,
            socket_options=_socket_options(),
        )
        self._lock = threading.Lock()
        self._made = time.monotonic()
        self._session = self._make()
        self._before: Any = None

    def current(self) -> Any:
        """Return the session for the next request."""
        with self._lock:
            if time.monotonic() - self._made > _IDLE:
                if self._before is not None:
                    self._before.close()
                self._before, self._session, self._made = self._session, self._make(), time.monotonic()
            return self._session

    def close(self) -> None:
        """Close the unused connections of all sessions."""
        with self._lock:
            for session in filter(None, (self._before, self._session)):
                session.close()


def _socket_options() -> list[tuple[int, int, int]]:
    """Return the options of each socket: send without delay; keepalive probes after `_IDLE` seconds, every 20 s."""
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # Linux, macOS
    tcp = {idle: _IDLE, getattr(socket, "TCP_KEEPINTVL", None): _IDLE // 3, getattr(socket, "TCP_KEEPCNT", None): 3}
    return [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, option, value) for option, value in tcp.items() if option is not None),
    ]


class _Repetitions:
    """The decision which requests are sent again, for botocore's event needs-retry. ``most``: attempts per request."""

    def __init__(self, most: int) -> None:
        self._most = most

    def pause(
        self, attempts: int, operation: Any, response: Any, caught_exception: Any, request_dict: Any, **kwargs: Any
    ) -> float | None:
        """Return the seconds to wait before the next attempt, None if the request must not be sent again.

        Raises the exception with which the caller of a transfer ended the transfer.
        """
        if caught_exception is not None:
            inside = interruption(caught_exception)
            if inside is not None:
                raise inside
            passing = _is_passing(caught_exception, operation.name)
            if isinstance(caught_exception, botocore.exceptions.ConnectionClosedError) and request_dict["body"]:
                # A proxy that limits the size of a body closes the connection without reading the body; its answer,
                # which gives the reason, is lost. So the next attempt asks before it sends the body.
                request_dict["headers"]["Expect"] = "100-continue"
        else:
            status, code = response[1]["ResponseMetadata"]["HTTPStatusCode"], code_of(response[1].get("Error", {}))
            passing = status in _PASSING_STATUSES or code in _PASSING_CODES
            if operation.name in _LONG_WORK and status in _STATUSES_OF_IMPATIENT_PROXIES:
                passing = False
        if not passing or attempts >= self._most:
            return None
        return min(_LONGEST_PAUSE, 2.0 ** (attempts - 1)) * random.random()


def _is_passing(error: Exception, operation: str) -> bool:
    """Return whether the next attempt may succeed after this one raised ``error``."""
    if isinstance(error, ForeignAnswer):
        return error.status < 300
    if operation in _LONG_WORK:
        never_arrived = botocore.exceptions.EndpointConnectionError, botocore.exceptions.ConnectTimeoutError
        return isinstance(error, never_arrived)
    return code_and_reason(error)[1] in ("timeout", "connection")


# Answers that S3 cannot have given

_REDIRECTIONS = {301, 302, 303, 307, 308}

#: Operation -> the sign of a successful answer of S3: an ETag among the headers, or an element in the body.
_WITH_ETAG = {"PutObject", "UploadPart"}
_ALWAYS_IN_THE_BODY = {
    "CopyObject": re.compile(rb"<(\w+:)?ETag>"),
    "UploadPartCopy": re.compile(rb"<(\w+:)?ETag>"),
    "CompleteMultipartUpload": re.compile(rb"<(\w+:)?ETag>"),
    "CreateMultipartUpload": re.compile(rb"<(\w+:)?UploadId>"),
    "ListObjectsV2": re.compile(rb"<(\w+:)?\w+Result[\s/>]"),
    "ListMultipartUploads": re.compile(rb"<(\w+:)?\w+Result[\s/>]"),
    "ListObjectVersions": re.compile(rb"<(\w+:)?\w+Result[\s/>]"),
}
_PAGE = re.compile(rb"(?i)\s*<(!doctype html|html)")
_ERROR = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(\w+:)?Error[\s>]")


def check_answer(operation: str, answer: Any) -> None:
    """Raise ForeignAnswer if the answer cannot come from S3.

    A maintenance page, a captive portal or another web server may answer every request with status 200, and a blob
    sent to it is lost. Status 5xx of a gateway, and a proxy's refusal of the size or rate of requests, are passed on.
    """
    status = answer.status_code
    if status in (408, 413, 429) or status >= 500:
        return
    if status in _REDIRECTIONS and operation == "HeadBucket" and "x-amz-bucket-region" not in answer.headers:
        answer.status_code = 404  # or boto3 looks for the bucket's region, gets this answer again, and never ends
        return
    streams = operation == "GetObject" and status < 300
    body = b"" if streams else answer.content
    if _is_success_of_s3(operation, answer.headers, body) if status < 300 else not _is_page(answer.headers, body):
        return
    if streams:
        answer.raw.close()
    raise ForeignAnswer(status)


def _is_success_of_s3(operation: str, headers: Any, body: bytes) -> bool:
    if operation in _WITH_ETAG:
        return "etag" in headers
    if operation in _ALWAYS_IN_THE_BODY:
        # botocore handles an error that S3 met after it had sent the status.
        return bool(_ALWAYS_IN_THE_BODY[operation].search(body) or _ERROR.match(body))
    if operation in ("GetObject", "HeadObject"):
        if "content-length" not in headers:
            return False
        # Not all services send an ETag, and not all blobs were stored by this package.
        ours = "x-amz-meta-sha256" in headers
        return ours or (not _is_page(headers, body) and ("etag" in headers or "last-modified" in headers))
    return not _is_page(headers, body)


def _is_page(headers: Any, body: bytes) -> bool:
    """Return whether the answer is a web page, or comes from another application."""
    if any(name.lower().startswith("x-amz") for name in headers):
        return False  # some services send errors and empty answers as HTML
    content_type = (headers.get("content-type") or "").lower()
    if content_type.startswith("text/plain") and body.strip() and not body.lstrip().startswith(b"<"):
        return True  # "404 page not found", as from a proxy: S3 answers in XML
    return content_type.startswith(("text/html", "application/xhtml", "application/json")) or bool(_PAGE.match(body))


def _adding(more: dict[str, str]) -> Callable[..., None]:
    """Return an event handler that adds ``more`` to the parameters of an operation."""

    def add(params: dict[str, Any], **kwargs: Any) -> None:
        params.update(more)

    return add


#: The forms of times in listings and in headers. Python 3.10 does not parse "Z".
_TIMES = lambda value: datetime.datetime.fromisoformat(value.replace("Z", "+00:00")), parsedate_to_datetime


def _parse_timestamp(value: Any) -> datetime.datetime:
    # Replaces botocore's parser, which takes two thirds of the time of a listing.
    for parse in _TIMES:
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            parsed = parse(value)
            if parsed.tzinfo is not None:
                return parsed
    return botocore.utils.parse_timestamp(value)


def _add_content_md5(params: dict[str, Any], **kwargs: Any) -> None:
    if params["body"] is not None:
        params["headers"].setdefault("Content-MD5", botocore.utils.calculate_md5(params["body"]))
