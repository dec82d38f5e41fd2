"""The metrics of S3, counted from the events of a boto3 client.

An operation is one call of the client: it begins with its first HTTP request, covers the repetitions, and ends with
the answer, or with the end of the body if the caller reads one. The handlers run in the threads that make the calls.
"""

import time
from collections.abc import Callable
from typing import Any

from botocore.utils import determine_content_length

from ..metrics import Metrics
from .errors import code_and_reason, code_of, interruption, reason_of_answer

#: Names of S3's operations -> the values of the label ``operation``.
_OPERATIONS = {
    "PutObject": "put",
    "GetObject": "get",
    "HeadObject": "head",
    "HeadBucket": "head",  # sent by boto3 itself, to find the bucket's region
    "CopyObject": "copy",
    "ListObjectsV2": "list",
    "DeleteObject": "delete",
    "DeleteObjects": "delete",
    "CreateMultipartUpload": "create_multipart",
    "UploadPart": "put_part",
    "UploadPartCopy": "copy_part",
    "CompleteMultipartUpload": "complete_multipart",
    "AbortMultipartUpload": "abort_multipart",
    "ListMultipartUploads": "list",
}

_KEY = "zodb-s3blobs"  # of our entry in boto3's context of a call

#: The reasons that mean: the service is unreachable, or refuses to work.
_UNANSWERED = {"timeout", "connection", "server", "throttled", "foreign"}


class S3Events:
    """The event handlers of one client. An operation that its caller cancels is not counted as a failure.

    ``pace`` is called with the size in bytes of each body: before a request is sent, and after bytes have arrived.
    """

    def __init__(self, client: Any, metrics: Metrics, pace: Callable[[int], None] | None = None) -> None:
        self._metrics = metrics
        self._pace = pace or (lambda size: None)
        #: Reason why the last operation had no proper answer, None if it had one; and its end by `time.monotonic`.
        self.last_answer: tuple[str | None, float] = "the bucket has not answered yet", time.monotonic()
        events = client.meta.events
        events.register_first("request-created.s3", self._request_created)
        events.register_last("response-received.s3", self._response_received)
        events.register_last("after-call.s3", self._after_call)
        events.register_last("after-call-error.s3", self._after_call_error)

    def _request_created(self, request: Any, operation_name: str, **kwargs: Any) -> None:
        operation = request.context.get(_KEY)
        if operation is None:
            name = _OPERATIONS.get(operation_name, operation_name)
            operation = request.context[_KEY] = _Operation(name, operation_name)
            self._metrics.s3_inflight.labels(name).inc()
        self._metrics.s3_attempts.labels(operation.name).inc()
        decoded = request.headers.get("X-Amz-Decoded-Content-Length")
        size = int(decoded or determine_content_length(request.body) or 0)
        # Before the request is signed: its signature holds for minutes only.
        self._pace(size)
        self._metrics.s3_sent_bytes.inc(size)

    def _response_received(
        self, response_dict: Any, parsed_response: Any, context: dict, exception: Exception | None, **kwargs: Any
    ) -> None:
        operation = context[_KEY]
        if exception is not None:
            if interruption(exception) is None:
                self._attempt_failed(operation, code_and_reason(exception)[1])
            return
        if isinstance(response_dict["body"], bytes):  # or it has not come yet
            self.received(len(response_dict["body"]))
        if _reason(operation, parsed_response) is not None:
            self._attempt_failed(operation, str(_status(parsed_response)))

    def _after_call(self, parsed: dict[str, Any], context: dict, **kwargs: Any) -> None:
        operation = context[_KEY]
        reason = _reason(operation, parsed)
        if reason is None and hasattr(parsed.get("Body"), "read"):
            parsed["Body"] = _Body(parsed["Body"], self, operation)
        else:
            self._ended(operation, reason, code_of(parsed.get("Error", {})))

    def _after_call_error(self, exception: Exception, context: dict, **kwargs: Any) -> None:
        operation = context.get(_KEY)
        if operation is None:
            pass  # the request could not even be made, so nothing was sent
        elif interruption(exception) is not None:
            self._over(operation)
        else:
            code, reason = code_and_reason(exception)
            self._ended(operation, reason, code, answered=False)

    def received(self, count: int) -> None:
        """Count ``count`` bytes read from a body; wait until they keep the limit."""
        self._metrics.s3_received_bytes.inc(count)
        self._pace(count)

    def body_ended(self, operation: "_Operation", error: BaseException | None) -> None:
        """Record the end of a body that was read or given up; ``error``: the reason if it failed."""
        if error is None:
            self._ended(operation, None)
        else:
            code, reason = code_and_reason(error)
            self._attempt_failed(operation, reason)
            self._ended(operation, reason, code)

    def _attempt_failed(self, operation: "_Operation", code: str) -> None:
        self._metrics.s3_attempt_failures.labels(operation.name, code).inc()

    def _ended(self, operation: "_Operation", reason: str | None, detail: str = "", answered: bool = True) -> None:
        if reason is not None:
            self._metrics.s3_operation_failures.labels(operation.name, reason).inc()
        unanswered = not answered or reason in _UNANSWERED
        trouble = f"the bucket did not answer ({operation.name}: {reason}, {detail})" if unanswered else None
        self.last_answer = trouble, time.monotonic()
        self._over(operation)

    def _over(self, operation: "_Operation") -> None:
        self._metrics.s3_inflight.labels(operation.name).dec()
        # Counted at the end, like failures, so that the share of failures never exceeds 1.
        self._metrics.s3_operations.labels(operation.name).inc()
        self._metrics.s3_operation_duration.labels(operation.name).observe(time.monotonic() - operation.started)


class _Operation:
    """One call of the client. ``name``: the value of the label ``operation``; ``s3_name``: the operation's S3 name."""

    def __init__(self, name: str, s3_name: str) -> None:
        self.name = name
        self.s3_name = s3_name
        self.started = time.monotonic()


class _Body:
    """The body of an answer with the methods that download.py uses; the reader must close it."""

    def __init__(self, body: Any, events: S3Events, operation: _Operation) -> None:
        self._body = body
        self._events = events
        self._operation: _Operation | None = operation

    def read(self, amount: int) -> bytes:
        try:
            data = self._body.read(amount)
        except BaseException as error:
            self._end(error)
            raise
        self._events.received(len(data))
        return data

    def close(self) -> None:
        try:
            self._body.close()
        finally:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        operation, self._operation = self._operation, None
        if operation is not None:
            self._events.body_ended(operation, error)


def _status(parsed: dict[str, Any]) -> int:
    return parsed["ResponseMetadata"]["HTTPStatusCode"]


def _reason(operation: _Operation, parsed: dict[str, Any]) -> str | None:
    return reason_of_answer(operation.s3_name, _status(parsed), code_of(parsed.get("Error", {})))
