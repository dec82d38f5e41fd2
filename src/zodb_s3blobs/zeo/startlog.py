"""What a ZEO server that starts says in the log about its own settings, which no section can refuse."""

import logging
import math
from typing import Any

from ZEO.StorageServer import StubTimeoutThread

logger = logging.getLogger(__name__)

#: The least transaction-timeout that is recommended, as a multiple of upload-timeout: more than the uploads take time.
_ROOM = 1.5


def check_timeouts(server: Any, name: str, upload_timeout: float) -> None:
    """Warn if the transaction-timeout of ZEO's ``server`` does not go with the ``upload_timeout``, in seconds.

    ``name``: of the storage. Nothing is said of a server whose time limit cannot be found out.
    """
    if getattr(server, "read_only", False) or server.storages[name].isReadOnly():
        return  # nobody commits
    manager = getattr(server, "lock_managers", {}).get(name)
    thread = getattr(manager, "timeout", None)
    advice = (
        f"set transaction-timeout in the <zeo> section to {math.ceil(_ROOM * upload_timeout)}, or another number of "
        f"seconds above upload-timeout ({upload_timeout:g} s)"
    )
    if isinstance(thread, StubTimeoutThread):
        logger.warning(
            "Storage %s: without transaction-timeout, a client that hangs in a commit blocks all other writers for "
            "ever: %s",
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
