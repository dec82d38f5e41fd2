"""The accounts of database servers, which do not run as root."""

import os
import pwd


def account(name):
    """The system's account ``name``; None if there is none."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def as_account(name, directory):
    """How a command begins that runs as ``name`` where this process is root's; ``directory`` becomes that account's."""
    if os.geteuid() != 0:
        return []
    found = account(name)
    os.chown(directory, found.pw_uid, found.pw_gid)
    return ["setpriv", f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--clear-groups"]
