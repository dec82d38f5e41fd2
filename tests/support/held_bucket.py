"""A bucket in memory, as far as commits and packs use one, whose operations wait for a test to say how they end."""

import hashlib
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import SimpleNamespace

from zodb_s3blobs.revision import Revision
from zodb_s3blobs.s3.download import SHA256, Stored
from zodb_s3blobs.s3.errors import BlobMismatch, BlobNotFound, BucketError
from zodb_s3blobs.s3.keys import Keys
from zodb_s3blobs.s3.listing import Listed, ListedStaged

#: How an operation can end: it works; it fails; it works, and its answer is lost.
OUTCOMES = ("works", "fails", "loses its answer")


@dataclass
class Operation:
    """An operation that waits for its end; ``what`` sorts it among others."""

    what: tuple
    outcome: str | None = None


@dataclass
class Service:
    """The objects of a bucket, which outlive the servers that use it."""

    #: key -> bytes.
    objects: dict[str, bytes] = field(default_factory=dict)
    modified: dict[str, float] = field(default_factory=dict)
    copies: bool = True


class HeldBucket:
    """As `zodb_s3blobs.s3.bucket.Bucket`, for one server."""

    name = "held"
    can_stream = True

    def __init__(self, service):
        self.keys = Keys()
        self.can_copy = True
        self.service = service
        #: Whether operations wait; else they work at once.
        self.holds = False
        #: Whether a deletion has failed.
        self.left_something = False
        self._changed = threading.Condition()
        self._held = []
        self._closed = False

    def held(self):
        """The operations that wait, in an order that does not depend on threads."""
        with self._changed:
            return sorted(self._held, key=lambda operation: operation.what)

    def end(self, operation, outcome):
        with self._changed:
            operation.outcome = outcome
            self._held.remove(operation)
            self._changed.notify_all()

    def release(self):
        """Let all operations work, those that wait and those that come."""
        self.holds = False
        for operation in self.held():
            self.end(operation, "works")

    def stop(self, outcome):
        """Let the operations that wait end with ``outcome``, and all that come fail: the server is gone."""
        self._closed = True
        for operation in self.held():
            self.end(operation, outcome)

    def close(self):
        self._closed = True

    def _do(self, what, effect, progress=lambda count: None):
        operation = Operation(what)
        progress(0)
        with self._changed:
            if self._closed:
                operation.outcome = "fails"
            elif self.holds:
                self._held.append(operation)
                self._changed.wait_for(lambda: operation.outcome is not None)
            else:
                operation.outcome = "works"
            if operation.outcome == "works":
                progress(0)
            result = None if operation.outcome == "fails" else effect()
        if operation.outcome != "works":
            self.left_something |= what[0] == "delete"
            raise BucketError(f"The {what[0]} {operation.outcome}")
        return result

    def _write(self, key, data):
        self.service.objects[key] = data
        self.service.modified[key] = time.time()
        return hashlib.sha256(data).hexdigest()

    # Uploads

    def put(self, oid, tid, filename, progress=lambda count: None, digest=""):
        key = self.keys.key(oid, tid)
        return self._do(("put", key), lambda: self._write(key, _read(filename)), progress)

    def put_staged(self, name, filename, progress=lambda count: None):
        key = self.keys.staged_key(name)
        return self._do(("put", key), lambda: self._write(key, _read(filename)), progress)

    def put_staged_stream(self, name, body, progress=lambda count: None):
        data = b""
        while part := body.read(16):
            data += part
        key = self.keys.staged_key(name)
        return self._do(("put", key), lambda: self._write(key, data), progress)

    def publish(self, source, oid, tid, size, digest):
        self._copy(source, self.keys.key(oid, tid), size, digest)

    def copy(self, oid, source_tid, tid):
        self._copy(self.keys.key(oid, source_tid), self.keys.key(oid, tid))

    def _copy(self, source, key, size=None, digest=None):
        def copy():
            if not self.service.copies:
                self.can_copy = False
                raise BucketError("The service cannot copy", "NotImplemented")
            data = self._existing(source)
            assert size in (None, len(data)), "another size was expected"
            assert digest in (None, hashlib.sha256(data).hexdigest()), "another blob was expected"
            self._write(key, data)

        self._do(("copy", key), copy)

    # Reading

    def _existing(self, key):
        if key not in self.service.objects:
            raise BlobNotFound(f"There is no {key}")
        return self.service.objects[key]

    def find(self, oid, tid, filename):
        def find():
            data = self.service.objects.get(self.keys.key(oid, tid))
            if data is None:
                return None
            if data != _read(filename):
                raise BlobMismatch("another blob")
            return Stored(len(data), SHA256, hashlib.sha256(data).hexdigest())

        return self._do(("find", self.keys.key(oid, tid)), find)

    def open(self, oid, tid):
        key = self.keys.key(oid, tid)
        size = len(self._do(("get", key), lambda: self._existing(key)))
        return SimpleNamespace(stored=Stored(size, SHA256, ""), close=lambda: None)

    def get(self, oid, tid, file, opened=None):
        data = self._existing(self.keys.key(oid, tid))
        file.write_at(data, 0)
        return Stored(len(data), SHA256, hashlib.sha256(data).hexdigest())

    # Listing and deletion

    def list_blobs(self, unknown=lambda size: None):
        for key, data in sorted(self.service.objects.items()):
            name = self.keys.parse(key)
            if name is not None:
                yield Listed(*name, len(data))

    def list_tids(self, oid):
        yield from (blob.tid for blob in self.list_blobs() if blob.oid == oid)

    def list_staged(self):
        for key, data in sorted(self.service.objects.items()):
            name = self.keys.parse_staged(key)
            if name is not None:
                modified = datetime.fromtimestamp(self.service.modified[key], timezone.utc)
                yield ListedStaged(name, len(data), modified)

    def list_uploads(self):
        return iter(())

    def delete(self, blobs):
        self._delete([self.keys.key(*name) for name in blobs])

    def delete_staged(self, names):
        self._delete([self.keys.staged_key(name) for name in names])

    def _delete(self, keys):
        def delete():
            for key in keys:
                self.service.objects.pop(key, None)

        if keys:
            self._do(("delete", *sorted(keys)), delete)

    def delete_marks(self):
        pass

    def blobs(self):
        """Revision -> bytes."""
        found = ((self.keys.parse(key), data) for key, data in self.service.objects.copy().items())
        return {Revision(*name): data for name, data in found if name is not None}

    def staged(self):
        """The keys of staged uploads."""
        return {key for key in self.service.objects.copy() if self.keys.parse_staged(key) is not None}


def _read(filename):
    with open(filename, "rb") as file:
        return file.read()
