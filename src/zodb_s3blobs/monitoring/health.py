"""Whether the bucket answers: what the last request told, or a probe where there was none for a while."""

import threading
import time

from ..s3.bucket import Bucket
from ..s3.errors import BucketError
from ..workers import DaemonPool

#: How old, in seconds, an answer may be before a probe is sent: while all is well, and while it is not.
_WELL, _ILL = 60.0, 5.0


class Health:
    """The health of ``bucket``. Any thread may call; nobody waits for S3."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._prober = DaemonPool(1, "s3blobs probe")
        self._probing = False
        self._closed = False

    def trouble(self) -> str | None:
        """Why the bucket is of no use at the moment, or None if it is well.

        That is asked from time to time by whoever watches the server, so an old answer is renewed for the next time.
        """
        trouble, heard = self._bucket.last_answer
        with self._lock:
            old = time.monotonic() - heard > (_WELL if trouble is None else _ILL)
            if old and not self._probing and not self._closed:
                self._probing = True
                self._prober.submit(self._probe)
        return trouble

    def _probe(self) -> None:
        try:
            self._bucket.probe()
        except BucketError:
            pass  # the bucket remembers
        finally:
            self._probing = False

    def close(self) -> None:
        """Send no more probes."""
        with self._lock:
            self._closed = True
        self._prober.shutdown(wait=False)
