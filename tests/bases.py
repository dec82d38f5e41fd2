"""A base storage of which a test says what it can load."""

from contextlib import nullcontext

from ZODB.POSException import POSKeyError
from ZODB.utils import p64


class Base:
    """Its last tid is ``last``, and it can load what is in ``live``. As `zodb_s3blobs.bases.Revisions`."""

    shared = False

    def __init__(self, *live, last=100):
        self.live = set(live)
        self.last = p64(last)

    def lastTransaction(self):
        return self.last

    def loadSerial(self, oid, tid):
        if (oid, tid) not in self.live:
            raise POSKeyError(oid)
        return b"a record"

    def no_restores(self):
        return nullcontext()
