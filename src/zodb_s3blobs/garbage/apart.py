"""The thread of a garbage collection, for which the end of the process does not wait.

ZEO packs in threads that are no daemons: the process would live until S3 answers.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from ..errors import S3BlobsError
from ..workers import DaemonPool

T = TypeVar("T")


class CallLeft(S3BlobsError):
    """The caller no longer waits for the result; the message says why."""


class Apart:
    """Calls that wait for S3, each in a daemon thread ``name``, which their callers leave alone at `close`.

    Any thread may call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._closed: Future[None] = Future()

    def call(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``, and raise its errors. Raises CallLeft at `close`; ``work`` goes on then."""
        pool = DaemonPool(1, self._name)
        try:
            result = pool.submit(work)
            wait([result, self._closed], return_when=FIRST_COMPLETED)
            if not result.done():
                raise CallLeft("The storage has been closed")
            return result.result()
        finally:
            pool.shutdown(wait=False)

    def close(self) -> None:
        """Let all callers go. A second call does nothing."""
        if not self._closed.done():
            self._closed.set_result(None)
