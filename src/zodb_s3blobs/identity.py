"""The identity of a database, which no other database and no copy of this one has.

The identity is a number in a file beside the database's own files, so that it lives as long as they do, independently
of the cache. A copy of that file has another inode or another file system, and so gives another identity.
"""

import contextlib
import os
import struct
import uuid
from collections.abc import Iterable
from pathlib import Path

from ZODB.utils import p64, u64


class Identity:
    """The identity of the database in the file ``database``; None: of one in memory, kept in this object only.

    Any thread may call. Raises the OSErrors of the disk.
    """

    def __init__(self, database: str | None) -> None:
        self._file = Path(f"{database}.s3blobs-id") if database is not None else None
        self._doubt = Path(f"{database}.s3blobs-doubt") if database is not None else None
        self._packed = Path(f"{database}.s3blobs-packed") if database is not None else None
        self._in_memory = f"in memory {uuid.uuid4().hex}"
        self._doubt_in_memory = False

    def make(self) -> str:
        """Return the identity; create one for a database that has none."""
        if self._file is not None and not self._number():  # a crash may leave an empty file
            with open(self._file, "w", encoding="ascii") as file:
                file.write(uuid.uuid4().hex)
                file.flush()
                os.fsync(file.fileno())
        return self.read() or ""

    def read(self) -> str | None:
        """Return the identity; None if the database has none yet. Writes nothing."""
        if self._file is None:
            return self._in_memory
        number = self._number()
        if not number:
            return None
        # Not the number of the device, which may change when the machine restarts.
        return f"{number} {os.statvfs(self._file).f_fsid:x}:{os.stat(self._file).st_ino:x}"

    def _number(self) -> str:
        assert self._file is not None
        try:
            return self._file.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return ""

    @property
    def packed_away(self) -> set[bytes]:
        """Tids that owner.json may name and that the last pack may have removed from the database.

        The set outlives the process.
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
        """True if blobs may be dead again after they were live, and still have their old marks.

        The value outlives the process.
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
