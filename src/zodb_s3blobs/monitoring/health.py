"""The health of a bucket: the result of the last request, or of a probe if there was no request for a while."""

import threading
import time

from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..workers import DaemonPool

#: The age in seconds of the last answer from which a probe is sent: after a success, and after a failure.
_PROBE_AFTER_OK, _PROBE_AFTER_ERROR = 60.0, 5.0


class Health:
    """The health of ``bucket``. Any thread may call; no method waits for S3."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._prober = DaemonPool(1, "s3blobs probe")
        self._probing = False
        self._closed = False

    def trouble(self) -> str | None:
        """Return why the bucket is unusable, or None if it answers.

        If the last answer is old, start a probe in the background; the next call sees its result.
        """
        trouble, heard = self._bucket.last_answer
        with self._lock:
            old = time.monotonic() - heard > (_PROBE_AFTER_OK if trouble is None else _PROBE_AFTER_ERROR)
            if old and not self._probing and not self._closed:
                self._probing = True
                try:
                    self._prober.submit(self._probe)
                except RuntimeError:  # no thread can be started: the next call tries again
                    self._probing = False
        return trouble

    def _probe(self) -> None:
        try:
            self._bucket.probe()
        except BucketError:
            pass  # `Bucket.last_answer` has it
        finally:
            self._probing = False

    def close(self) -> None:
        """Stop sending probes."""
        with self._lock:
            self._closed = True
        self._prober.shutdown(wait=False)
