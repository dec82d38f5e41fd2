"""What tells this machine from others."""

import uuid
from pathlib import Path


def boot_id() -> str:
    """What tells this machine, as it runs now, from others; the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"
