"""Downloads in parallel ranges, each verified before it is used.

Every blob carries its SHA-256 in its object's metadata; every download is compared with it.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import botocore.exceptions

from ..digest import SHA256, digest_of
from .errors import BlobDamaged, BlobNotFound, BucketError
from .objects import READ, Objects

logger = logging.getLogger(__name__)

#: A blob up to this many bytes is read with one request; larger ones in parallel ranges of this size.
PART = 8 << 20


class TransferCorrupt(Exception):
    """A download whose bytes differ from the stored ones; it is repeated."""


class Sink(Protocol):
    """A receiver of a blob's bytes."""

    def write_at(self, data: bytes, position: int) -> None: ...


class Target(Sink, Protocol):
    """A file that receives a blob, from several threads at once."""

    path: str

    def clear(self) -> None: ...


@dataclass(frozen=True)
class Stored:
    """The metadata of an object: ``size`` in bytes; ``digest`` in hex by ``algorithm``, "" if unknown; its ``etag``."""

    size: int
    algorithm: str
    digest: str
    etag: str = field(default="", compare=False)

    @property
    def is_proven(self) -> bool:
        """True if the object carries the SHA-256 that its uploader computed.

        An MD5 in the ETag proves less: the service computed it from the bytes that arrived.
        """
        return self.algorithm == SHA256

    def sha256_of(self, filename: str) -> str:
        """Return the SHA-256 of ``filename``, which has the bytes of the object; read the file if that carries none."""
        return self.digest if self.is_proven else digest_of(SHA256, filename)


class Downloads(Objects):
    """The downloads from a bucket."""

    def look_up(self, oid: bytes, tid: bytes) -> Stored | None:
        """Return size and checksum of blob (oid, tid), None if the bucket does not have the blob."""
        try:
            return stored_in(self._head(self.keys.key(oid, tid)))
        except BlobNotFound:
            return None

    def verify(self, oid: bytes, tid: bytes) -> Stored:
        """Read blob (oid, tid) and check it, without keeping it; return the size and checksum that matched.

        Raises BlobNotFound, BlobDamaged, or BucketError if S3 fails.
        """
        return self._read_back(self.keys.key(oid, tid))[0]

    def open(self, oid: bytes, tid: bytes) -> "Opened":
        """Request the first part of blob (oid, tid), for `get` to read. The caller closes the returned answer.

        Raises BlobNotFound and BucketError.
        """
        return self._open_range(self.keys.key(oid, tid), 0, PART)

    def get(self, oid: bytes, tid: bytes, file: Target, opened: "Opened | None" = None) -> Stored:
        """Write blob (oid, tid) into the empty ``file``; return its size and the checksum that it has.

        ``opened``: the answer that `open` returned, if it was called. Sends one request for up to `PART` bytes, else
        one per range, in parallel. On return, size and checksum are verified. Raises BlobNotFound, BucketError, or the
        OSError of a full disk.
        """
        started = opened.asked if opened is not None else time.monotonic()
        stored = self._get_verified(self.keys.key(oid, tid), file, opened=opened)
        self._metrics.download_duration.observe(time.monotonic() - started)
        self._metrics.download_size.observe(stored.size)
        if not stored.is_proven:
            self._metrics.download_unproven.inc()
        return stored

    def _get_verified(self, key: str, file: Target, most: int | None = None, opened: "Opened | None" = None) -> Stored:
        answers = [opened] if opened is not None else []

        def get() -> Stored:
            return self._get(key, file, most, answers.pop() if answers else self._open_range(key, 0, PART))

        return self._verified(key, get, file.clear)

    def _verified(self, key: str, read: Callable[[], Any], forget: Callable[[], None] = lambda: None) -> Any:
        """Return the result of ``read``. Call ``forget`` and read again after a TransferCorrupt; then BlobDamaged."""
        what = f"read {key} of bucket {self.name}"
        for attempt in range(1, self._attempts + 1):
            try:
                return read()
            except TransferCorrupt as error:
                self._metrics.download_checksum_failures.inc()
                logger.error("Could not %s: %s (attempt %d of %d)", what, error, attempt, self._attempts)
                damage = str(error)
                forget()
        raise BlobDamaged(f"Could not {what}: {damage}. The object is damaged or was changed; restore it from a backup")

    def _get(self, key: str, file: Target, most: int | None, first: "Opened") -> Stored:
        size = first.stored.size
        if most is not None and size > most:
            first.close()
            raise BucketError(f"{key} of bucket {self.name} is larger than {most} bytes: it is not ours; delete it")
        # What one thread reads in order is checked on its way; the parts of several threads, in their file.
        whole = _Digest(first.stored.algorithm) if first.length == size else None
        sink: Sink = file if whole is None else _Both(file, whole)
        parts: list[Future] = []
        try:
            ranges = ((start, min(start + PART, size)) for start in range(first.length, size, PART))
            # Downloads take turns: a blob of a few ranges does not wait for one of thousands.
            parts = self._parts.submit_all(first, [partial(self._get_range, key, *r, first.etag, file) for r in ranges])
            self._get_range(key, 0, first.length, first.etag, sink, opened=first)
            for part in parts:
                part.result()
        except BaseException:
            first.close()
            # Once this method has raised, no thread may write to the file any more.
            for part in parts:
                part.cancel()
            for part in parts:
                if not part.cancelled():
                    part.exception()
            raise
        if whole is not None:
            _check(first.stored, whole.size, whole.hexdigest())
        else:
            algorithm, expected = first.stored.algorithm, first.stored.digest
            _check(first.stored, os.path.getsize(file.path), digest_of(algorithm, file.path) if expected else "")
        return first.stored

    def _read_back(self, key: str, algorithm: str = "") -> tuple[Stored, str]:
        """Read an object and check it, without keeping it; return its metadata, and its digest in hex.

        ``algorithm``: that of the returned digest, by default that of the check. Raises the errors of `verify`.
        """

        def read() -> tuple[Stored, str]:
            first = self._open_range(key, 0, PART)
            stored = first.stored
            checked, wanted = _Digest(stored.algorithm), _Digest(algorithm or stored.algorithm)
            both = _Both(checked, wanted)
            self._get_range(key, 0, first.length, first.etag, both, opened=first)
            for start in range(first.length, stored.size, PART):
                self._get_range(key, start, min(start + PART, stored.size), first.etag, both)
            _check(stored, checked.size, checked.hexdigest())
            return stored, wanted.hexdigest()

        return self._verified(key, read)

    def _get_range(self, key: str, start: int, end: int, etag: str, file: Sink, opened: "Opened | None" = None) -> None:
        """Download bytes ``start`` to ``end`` of the object to their place in ``file``; retry a body that broke off.

        boto3 repeats a request only until the headers have arrived. `_verified` handles damage of the whole object.
        """
        for attempt in range(1, self._attempts + 1):
            answer = opened or self._open_range(key, start, end)
            opened = None
            try:
                if answer.etag != etag:
                    raise TransferCorrupt("it was replaced while it was being read")
                failure = self._write(answer, start, end, file)
            finally:
                answer.close()
            if failure is None:
                return
            code = failure.code if isinstance(failure, BucketError) else type(failure).__name__
            logger.warning("The answer for %s broke off (attempt %d): %s", key, attempt, code)
            if attempt == self._attempts:
                raise failure

    def _write(self, answer: "Opened", start: int, end: int, file: Sink) -> BucketError | TransferCorrupt | None:
        """Write the body of ``answer`` to its place in ``file``; return the error that broke it off, or None."""
        position = start
        try:
            while chunk := self._ask(f"read {answer.key} of bucket {self.name}", lambda: answer.body.read(READ)):
                file.write_at(chunk, position)
                position += len(chunk)
        except BucketError as error:
            if error.reason == "damaged":
                raise TransferCorrupt("it does not have the checksum that the service sent with it") from None
            return error
        return None if position == end else TransferCorrupt(f"{position - start} bytes of {end - start} arrived")

    def _open_range(self, key: str, start: int, end: int) -> "Opened":
        options = {"Bucket": self.name, "Key": key, **self._key_options}

        def get() -> dict[str, Any]:
            try:
                return self._client.get_object(Range=f"bytes={start}-{end - 1}", **options)
            except botocore.exceptions.ClientError as error:
                if start or error.response.get("Error", {}).get("Code") not in ("InvalidRange", "416"):
                    raise
            return self._client.get_object(**options)  # an empty object has no first byte to ask for

        asked = time.monotonic()
        answer = self._ask(f"read {key} of bucket {self.name}", get)
        stored, length = stored_in(answer), answer["ContentLength"]
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange") or "")
        if match:
            stored = replace(stored, size=int(match[3]))
        elif start:
            # The service ignores ranges and would send the whole object: acceptable for the first request only.
            answer["Body"].close()
            raise TransferCorrupt("the service answered one range with the whole object and another with a part")
        return Opened(key, answer["Body"], length, stored, answer.get("ETag", ""), asked)


class Opened:
    """An answer with an unread body of ``length`` bytes. ``asked``: time of the request by `time.monotonic`."""

    def __init__(self, key: str, body: Any, length: int, stored: Stored, etag: str, asked: float) -> None:
        self.key = key
        self.body = body
        self.length = length
        #: The metadata of the whole object.
        self.stored = stored
        self.etag = etag
        self.asked = asked

    def close(self) -> None:
        """Close the body and drop its unread bytes; a second call does nothing."""
        self.body.close()


class _Digest:
    """A `Sink` that computes the checksum of bytes that arrive in order, and keeps nothing else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._digest = hashlib.new(self._name, usedforsecurity=False)
        self.size = 0

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def write_at(self, data: bytes, position: int) -> None:
        # After an answer that broke off, the retry brings its bytes again: the first ones may replace others in a file.
        if position == 0:
            self._begin()
        self._digest.update(memoryview(data)[self.size - position :])
        self.size = max(self.size, position + len(data))


class _Both:
    """A `Sink` that passes its bytes on to other sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write_at(self, data: bytes, position: int) -> None:
        for sink in self._sinks:
            sink.write_at(data, position)


def stored_in(answer: dict[str, Any]) -> Stored:
    """Return the size and the checksum of an object from the answer to GET or HEAD."""
    size, sha256 = answer["ContentLength"], sha256_in(answer["Metadata"])
    # Objects stored by other software have no SHA-256.
    algorithm, digest = (SHA256, sha256) if sha256 else ("md5", md5_of(answer))
    return Stored(size, algorithm, digest, answer.get("ETag", ""))


def sha256_in(metadata: dict[str, str]) -> str:
    # Some services capitalise the name.
    return next((value for name, value in metadata.items() if name.lower() == SHA256), "")


def md5_of(answer: dict[str, Any]) -> str:
    """Return the MD5 of an object in hex, "" if its ETag is not an MD5: after a multipart upload, or if encrypted."""
    etag = answer.get("ETag", "").strip('"')
    encrypted = answer.get("ServerSideEncryption") not in (None, "AES256") or answer.get("SSECustomerAlgorithm")
    return etag if re.fullmatch("[0-9a-f]{32}", etag) and not encrypted else ""


def _check(stored: Stored, size: int, digest: str) -> None:
    """Raise TransferCorrupt unless the bytes read have the object's size, and its checksum if it has one."""
    if size != stored.size:
        raise TransferCorrupt(f"{size} bytes of {stored.size} arrived")
    if stored.digest and digest != stored.digest:
        raise TransferCorrupt(f"its {stored.algorithm} is {digest} and should be {stored.digest[:64]!r}")
