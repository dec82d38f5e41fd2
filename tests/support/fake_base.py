"""A base storage of which a test says what it can load."""

from contextlib import nullcontext

from ZODB.POSException import POSKeyError
from ZODB.utils import p64


class Base:
    """Its last tid is ``last``, and it can load what is in ``live``. As `zodb_s3blobs.bases.adapter.DatabaseView`.

    ``objects``: the oids of others that it has, though not at any tid that a blob has.
    """

    def __init__(self, *live, last=100, objects=(), shared=False):
        self.live = set(live)
        self.last = p64(last)
        self.objects = set(objects)
        self.shared = shared
        #: For how many revisions of which object it was asked at once.
        self.asked = []

    def lastTransaction(self):
        return self.last

    def loadSerial(self, oid, tid):
        if (oid, tid) not in self.live:
            raise POSKeyError(oid)
        return b"a record"

    def loadable(self, oid, tids, pause=lambda: None):
        tids = set(tids)
        self.asked.append((oid, len(tids)))
        pause()
        return {tid for tid in tids if self._can_load(oid, tid)}

    def _can_load(self, oid, tid):
        try:
            self.loadSerial(oid, tid)
        except POSKeyError:
            return False
        return True

    def has_object(self, oid):
        return oid in self.objects or any(oid == known for known, _ in self.live)

    def tids(self, oid, pause=lambda: None):
        return {tid for known, tid in self.live if known == oid}

    def no_restores(self):
        return nullcontext()
