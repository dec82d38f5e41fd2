"""Warnings in the log of a starting ZEO server about its own settings, which a storage's section cannot refuse."""

import logging
from typing import Any

from ZEO.StorageServer import StubTimeoutThread

logger = logging.getLogger(__name__)


def check_transaction_timeout(server: Any, name: str) -> None:
    """Warn if ZEO's ``server`` has no transaction-timeout. ``name``: that of the storage.

    Logs nothing if the setting of the server cannot be read, or if nothing can be committed.
    """
    if getattr(server, "read_only", False) or server.storages[name].isReadOnly():
        return
    manager = getattr(server, "lock_managers", {}).get(name)
    if isinstance(getattr(manager, "timeout", None), StubTimeoutThread):
        logger.warning(
            "Storage %s: without transaction-timeout, a client that hangs in a commit blocks all other writers "
            "forever: set transaction-timeout in the <zeo> section to 60 seconds or more. It need not cover uploads, "
            "which end before a transaction takes the commit lock",
            name,
        )
