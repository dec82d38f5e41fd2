"""Links to blobs in the bucket: which blobs have one, and where links are signed."""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

from .metrics import Metrics
from .s3.errors import BucketError
from .s3.links import LONGEST, Link, Signer, checked
from .workers import DaemonPool

logger = logging.getLogger(__name__)

#: Threads that sign. Signing takes a millisecond, except when credentials are renewed: the others wait for that too.
_THREADS = 2

#: Returns whether the database has blob (oid, serial).
HasBlob: TypeAlias = Callable[[bytes, bytes], bool]


class Linker:
    """The links that a storage gives. Any thread may call.

    ``signer``: None if the storage gives no links; ``longest``: the longest validity, in seconds; ``may_lack`` returns
    whether the bucket may lack the committed blob (oid, tid).
    """

    def __init__(
        self, signer: Signer | None, longest: int, may_lack: Callable[[bytes, bytes], bool], metrics: Metrics
    ) -> None:
        self._signer = signer
        self._longest = longest or LONGEST
        self._may_lack = may_lack
        self._metrics = metrics
        self._workers = DaemonPool(_THREADS, "s3blobs link")

    def url(self, has_blob: HasBlob, wanted: tuple) -> str | None:
        """Return a URL; None if the storage gives no links, or has no such blob, or the bucket may lack it.

        ``wanted``: the arguments of `s3.links.checked`. May wait for the disk of a fallback, for S3 if a fallback is
        there, and for new credentials. Raises LinkRefused for wrong arguments, even if the storage gives no links, and
        BucketError if there are no credentials.
        """
        return self._signed(self._checked(has_blob, wanted))

    def request(self, has_blob: HasBlob, wanted: tuple, owner: object) -> "Future[str | None]":
        """Return a future of what `url` returns, without waiting; ``owner``: who asks, since owners take turns.

        Calls ``has_blob``. Raises LinkRefused; the future may fail with BucketError.
        """
        return self._workers.submit_all(owner, [functools.partial(self._signed, self._checked(has_blob, wanted))])[0]

    def _checked(self, has_blob: HasBlob, wanted: tuple) -> Link | None:
        self._metrics.presigned_url_requests.inc()
        link = checked(self._longest, *wanted)
        return link if self._signer is not None and has_blob(link.oid, link.tid) else None

    def _signed(self, link: Link | None) -> str | None:
        if link is None or self._signer is None or self._may_lack(link.oid, link.tid):
            return None
        try:
            url = self._signer.sign(link)
        except BucketError as error:
            logger.error("%s", error)
            raise
        self._metrics.presigned_urls.inc()
        return url

    def close(self) -> None:
        """Refuse further requests."""
        self._workers.shutdown(wait=False)
