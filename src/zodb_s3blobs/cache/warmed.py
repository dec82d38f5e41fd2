"""The folder ``{cache-dir}/warm/``: blobs that ``zodb-s3blobs warm`` fetches, and that the cache then takes over.

    {oid}.{tid}.{SHA-256}.blob    a whole blob
    new.*                         one that is being fetched

The numbers are in hexadecimal. The command writes there and touches nothing else of the cache; the cache moves or
deletes what is whole.
"""

import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ..localfile import LocalFile
from ..revision import Revision
from .directory import WARM

logger = logging.getLogger(__name__)

_NEW = "new."

#: The age in seconds at which an unfinished file is a leftover of a killed command.
_ABANDONED_AFTER = 24 * 3600

_WHOLE = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9a-f]{64})\.blob")


class WarmedFile(NamedTuple):
    """A whole blob ``name`` at ``path``, with the SHA-256 ``digest`` according to the name of the file."""

    path: str
    name: Revision
    digest: bytes


class WarmFolder:
    """The folder ``warm`` of the cache ``directory``, which may be missing."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory) / WARM
        self._complained: set[str] = set()

    def make(self) -> None:
        """Make the folder, open to those to whom the cache directory is. Raises OSError."""
        self.path.mkdir(mode=self.path.parent.stat().st_mode & 0o777, exist_ok=True)

    def files(self) -> list[WarmedFile]:
        """Return the whole blobs, the newest first; delete leftovers of killed commands. Never raises."""
        found = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    match = _WHOLE.fullmatch(entry.name)
                    if match and entry.is_file(follow_symlinks=False):
                        oid, tid, digest = map(bytes.fromhex, match.groups())
                        found.append(WarmedFile(entry.path, Revision(oid, tid), digest))
                    elif entry.name.startswith(_NEW):
                        _delete_if_abandoned(entry)
                    else:
                        self.complain(entry.path, "it is not a file of zodb-s3blobs warm. Move it out of cache-dir")
        except FileNotFoundError:
            pass  # nothing was warmed
        except OSError as error:
            self.complain(str(self.path), f"it cannot be read: {error.strerror}")
        return sorted(found, key=lambda file: file.name.tid, reverse=True)

    def complain(self, path: str, why: str) -> None:
        """Log once that ``path`` is left alone."""
        if path not in self._complained:
            self._complained.add(path)
            logger.warning("Ignoring %s: %s", path, why)

    def new_file(self) -> "NewWarmFile":
        """Create an empty file. Raises OSError."""
        fd, path = tempfile.mkstemp(prefix=_NEW, dir=self.path)
        os.close(fd)
        return NewWarmFile(path)


class NewWarmFile(LocalFile):
    """A file of a blob that is being fetched. The methods raise the OSErrors of the disk."""

    def publish(self, name: Revision, digest: str) -> None:
        """Let the cache take the file over, as the blob ``name`` with the SHA-256 ``digest`` in hex."""
        oid, tid = name
        os.rename(self.path, os.path.join(os.path.dirname(self.path), f"{oid.hex()}.{tid.hex()}.{digest}.blob"))

    def discard(self) -> None:
        """Delete the file unless it was published; never raise."""
        try:
            os.unlink(self.path)
        except OSError:
            pass


def _delete_if_abandoned(entry: os.DirEntry[str]) -> None:
    try:
        if entry.stat(follow_symlinks=False).st_mtime < time.time() - _ABANDONED_AFTER:
            os.unlink(entry.path)
    except OSError:
        pass  # gone meanwhile, or looked at again the next time
