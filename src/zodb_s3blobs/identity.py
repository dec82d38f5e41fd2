"""The identity of a database: what tells it from all others, and from its own copies.

It is a number in a file beside the database's own files, so that it lives as long as they do, whatever becomes of the
cache. A copy of the file is another file, on another file system or with another inode, and so another identity.
"""

import contextlib
import os
import struct
import uuid
from collections.abc import Iterable
from pathlib import Path

from ZODB.utils import p64, u64


class Identity:
    """The identity of the database whose file is ``database``; of one in memory, which ends with it, if that is None.

    Any thread may call. Raises the OSErrors of the disk.
    """

    def __init__(self, database: str | None) -> None:
        self._file = Path(f"{database}.s3blobs-id") if database is not None else None
        self._doubt = Path(f"{database}.s3blobs-doubt") if database is not None else None
        self._packed = Path(f"{database}.s3blobs-packed") if database is not None else None
        self._in_memory = f"in memory {uuid.uuid4().hex}"
        self._doubt_in_memory = False

    def make(self) -> str:
        """Return it; a database that has none is given one."""
        if self._file is not None and not self._number():  # a crash may leave an empty file
            with open(self._file, "w", encoding="ascii") as file:
                file.write(uuid.uuid4().hex)
                file.flush()
                os.fsync(file.fileno())
        return self.read() or ""

    def read(self) -> str | None:
        """Return it; None if the database has none yet. Nothing is written."""
        if self._file is None:
            return self._in_memory
        number = self._number()
        if not number:
            return None
        # Not the number of the device, which may be another after a restart of the machine.
        return f"{number} {os.statvfs(self._file).f_fsid:x}:{os.stat(self._file).st_ino:x}"

    def _number(self) -> str:
        assert self._file is not None
        try:
            return self._file.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return ""

    @property
    def packed_away(self) -> set[bytes]:
        """The tids of transactions that the database had before its last pack, which may have taken them away.

        It outlives the process.
        """
        try:
            lines = self._packed.read_text(encoding="ascii").split() if self._packed is not None else []
            return {p64(int(line, 16)) for line in lines}
        except (FileNotFoundError, ValueError, struct.error):
            return set()

    @packed_away.setter
    def packed_away(self, tids: Iterable[bytes]) -> None:
        if self._packed is not None:
            self._packed.write_text("\n".join(f"{u64(tid):x}" for tid in tids), encoding="ascii")

    @property
    def marks_are_doubtful(self) -> bool:
        """Whether a pack of the database may have killed blobs again whose old marks have not been taken away.

        It outlives the process.
        """
        return self._doubt.exists() if self._doubt is not None else self._doubt_in_memory

    @marks_are_doubtful.setter
    def marks_are_doubtful(self, doubtful: bool) -> None:
        self._doubt_in_memory = doubtful
        if self._doubt is None:
            return
        if doubtful:
            self._doubt.touch()
        else:
            with contextlib.suppress(FileNotFoundError):
                self._doubt.unlink()
