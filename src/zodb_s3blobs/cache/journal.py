"""The journal of the cache on disk, ``{cache-dir}/index``: which files it has, their checksums, and the order of use.

A file that is appended to. Each record has 64 bytes: the oid, the tid, the size of the file, the time of its last use,
its SHA-256, and a CRC-32 of all that. The last record of a blob counts, and the order of these records is the order of
use. A record with the size `REMOVED` tells that the file is gone.

Nothing waits until a record is on the disk. What a crash loses, tears or turns to nonsense costs no more than to fetch
some blobs again: files without a record are deleted, and no file is served that does not match its record.
"""

import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..revision import Revision

#: The size in the record of a file that is gone.
REMOVED = -1

_BODY = struct.Struct(">8s8sqI32s")
_SUMMARY = struct.Struct(">16sqI32x")  # the body without the checksum
_RECORD = struct.Struct(f">{_BODY.size}sI")  # with the CRC-32

#: The records that are read at once. In between, other threads run.
_CHUNK = 500

#: The pause after so many, in seconds.
PAUSE = 0.0001


class Record(NamedTuple):
    """A record of the journal: ``size`` in bytes, ``used`` in seconds since 1970, the SHA-256 ``digest``."""

    oid: bytes
    tid: bytes
    size: int
    used: int
    digest: bytes

    @property
    def name(self) -> Revision:
        """The blob."""
        return Revision(self.oid, self.tid)


#: A record in short: its number, the oid and tid in one, the size, the time of the last use.
Summary: TypeAlias = tuple[int, bytes, int, int]


class _File:
    """A file of records, of which the first has the number ``first``."""

    def __init__(self, path: Path, first: int, flags: int = 0) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        self.first = first
        # Behind a record that is torn, the next one is written over it.
        self.end = first + os.fstat(self._file).st_size // _RECORD.size

    def read(self, number: int, count: int) -> bytes:
        return os.pread(self._file, count * _RECORD.size, (number - self.first) * _RECORD.size)

    def append(self, data: bytes) -> None:
        view, position = memoryview(data), (self.end - self.first) * _RECORD.size
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written
        self.end += len(data) // _RECORD.size

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Journal:
    """The journal at ``path``, made if it is missing. Raises OSError.

    One thread at a time writes; any thread may `find`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _File(path, 1)
        self._former: _File | None = None  # after `replace`, until `forget_former`

    def __len__(self) -> int:
        """Return the number of records."""
        return self._file.end - self._file.first

    def read(self) -> Iterator[list[Summary]]:
        """Yield the records that are there now, some hundreds at a time; leave out nonsense. Raises OSError."""
        return self._read(self._file, self._file.first, self._file.end)

    def _read(self, file: _File, begin: int, end: int) -> Iterator[list[Summary]]:
        summary = _SUMMARY.unpack
        for first in range(begin, end, _CHUNK):
            data = file.read(first, min(_CHUNK, end - first))
            yield [(number, *summary(body)) for number, body in _whole(first, data)]
            time.sleep(PAUSE)

    def find(self, number: int) -> Record | None:
        """Return the record with the number that `append` returned; None if it cannot be read."""
        file, former = self._file, self._former
        if number < file.first and former is not None:
            file = former
        if not file.first <= number < file.end:
            return None
        try:
            data = file.read(number, 1)
        except OSError:
            return None
        for _, body in _whole(number, data):
            return Record._make(_BODY.unpack(body))
        return None

    def append(self, records: Iterable[Record]) -> int:
        """Append ``records``; return the number of the first one, which the others follow. Raises OSError."""
        number = self._file.end
        self._file.append(_packed(records))
        return number

    def replace(self, records: Iterable[list[Record]]) -> Iterator[list[Summary]]:
        """Let a new file with ``records`` take the place of the journal; then yield them, with their new numbers.

        Until `forget_former`, records are also found by their old numbers. Raises OSError before the first is yielded,
        and has then changed nothing.
        """
        path = self._path.with_name(f"{self._path.name}.new")
        file = _File(path, self._file.end, os.O_TRUNC)
        try:
            for some in records:
                file.append(_packed(some))
                time.sleep(PAUSE)
            file.sync()  # or a power cut could leave an empty file in place of the whole journal
            os.replace(path, self._path)
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        self._former, self._file = self._file, file
        yield from self._read(file, file.first, file.end)

    def forget_former(self) -> None:
        """Close the file that was there before `replace`."""
        former, self._former = self._former, None
        if former is not None:
            former.close()

    def close(self) -> None:
        """Close the file."""
        self.forget_former()
        self._file.close()


def _packed(records: Iterable[Record]) -> bytes:
    bodies = [_BODY.pack(*record) for record in records]
    return b"".join([_RECORD.pack(body, zlib.crc32(body)) for body in bodies])


def _whole(first: int, data: bytes) -> list[tuple[int, bytes]]:
    """Return the records in ``data`` that are no nonsense, with their numbers, of which that of the first is given."""
    whole = memoryview(data)[: len(data) // _RECORD.size * _RECORD.size]
    crc = zlib.crc32
    records = enumerate(_RECORD.iter_unpack(whole), first)
    return [(number, body) for number, (body, check) in records if crc(body) == check]
