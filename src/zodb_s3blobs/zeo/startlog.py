"""Warnings in the log of a starting ZEO server about its own settings, which a storage's section cannot refuse."""

import logging
import math
from typing import Any

from ZEO.StorageServer import StubTimeoutThread

logger = logging.getLogger(__name__)

#: The recommended transaction-timeout as a multiple of upload-timeout: a commit takes more time than its uploads.
_ROOM = 1.5


def check_timeouts(server: Any, name: str, upload_timeout: float) -> None:
    """Warn if the transaction-timeout of ZEO's ``server`` does not fit ``upload_timeout``, in seconds.

    ``name``: that of the storage. Logs nothing if the transaction-timeout of the server cannot be read.
    """
    if getattr(server, "read_only", False) or server.storages[name].isReadOnly():
        return  # there are no commits
    manager = getattr(server, "lock_managers", {}).get(name)
    thread = getattr(manager, "timeout", None)
    advice = (
        f"set transaction-timeout in the <zeo> section to {math.ceil(_ROOM * upload_timeout)}, or another number of "
        f"seconds above upload-timeout ({upload_timeout:g} s)"
    )
    if isinstance(thread, StubTimeoutThread):
        logger.warning(
            "Storage %s: without transaction-timeout, a client that hangs in a commit blocks all other writers "
            "forever: %s",
            name,
            advice,
        )
        return
    limit = getattr(thread, "_timeout", None)
    if limit is not None and limit <= upload_timeout:
        logger.warning(
            "Storage %s: with transaction-timeout %g, clients lose their connection while their uploads go on: %s; or "
            "set upload-timeout below %gs",
            name,
            limit,
            advice,
            limit,
        )
