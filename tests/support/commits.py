"""What tests do with the blobs of a transaction, in place of a storage or of the handler of a ZEO client."""

import os

from zodb_s3blobs.commit.pending import Pending
from zodb_s3blobs.s3.download import PART


def begin(commits, pending=None):
    """Begin a transaction without a reservation, as in process, or in the round after that of ``pending``."""
    pending = pending or Pending(commits)
    pending.begin("a transaction")
    return pending


def reserve(pending):
    """Reserve a tid, and store all blobs that have arrived; return the tid."""
    tid = pending.reserve().tid
    uploads = pending.store_reserved()
    if uploads is not None:
        uploads.wait()
    return tid


def begin_reserved(commits, pending):
    """Get the commit lock, and begin with the reserved tid; return the tid."""
    commits.tids.ready(pending.reservation)
    assert pending.reservation.turn.done() and commits.tids.holds(pending.reservation)
    pending.begin("a transaction")
    return commits.tids.begin(pending.reservation)


def commit_reserved(commits, pending, blobs):
    """Commit ``blobs``, oid -> filename, which have arrived and are stored at the reserved tid; return the tid."""
    tid = begin_reserved(commits, pending)
    for oid, filename in blobs.items():
        pending.store(oid, filename)
    assert pending.vote(tid) is None  # nothing waits for S3 with the commit lock
    pending.finish()
    return tid


def overtake(commits, pending):
    """Let another transaction take the reserved tid of ``pending`` away."""
    other = commits.tids.reserve()
    commits.tids.ready(other)
    commits.tids.overtake(other)
    commits.tids.release(other)
    assert pending.reservation.is_lost
    pending.lose_reservation()


def cleaned_up(commits):
    """Wait until all is done that transactions have left to do; nothing is cleaned up later."""
    for pool in commits.files, commits.cleaners:
        pool.shutdown()


class Sending:
    """A blob that a client sends; ``path``: of its file."""

    def __init__(self, pending, cache):
        self._pending = pending
        self._cache = cache
        self._descriptor, self.path = cache.new_temporary()
        self._size = 0
        self._stream = None

    def send(self, data):
        self._cache.write(self._descriptor, data)
        self._size += len(data)
        if self._stream is None and self._size >= PART:
            self._stream = self._pending.stream(self.path, self._size)
        if self._stream is not None:
            self._stream.grew_to(self._size)
        return self

    def end(self, oid):
        """The blob is that of ``oid``; return its path."""
        os.close(self._descriptor)
        if self._stream is not None:
            self._stream.complete()
        self._pending.arrive(oid, self.path, self._stream)
        return self.path

    def cut_off(self):
        """The rest does not come."""
        if self._stream is not None:
            self._pending.cut_off(self._stream)
        os.close(self._descriptor)
        os.unlink(self.path)
