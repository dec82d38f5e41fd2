"""The identity of the running machine."""

import uuid
from pathlib import Path


def boot_id() -> str:
    """Return a text that identifies this machine until its next boot, equal in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"
