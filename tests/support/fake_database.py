"""A database of which a test says who it is and which transactions it has."""

from ZODB.utils import p64


class FakeDatabase:
    """As `zodb_s3blobs.lease.Database`. ``tids``: the numbers of its transactions."""

    def __init__(self, identity="a database", tids=(1,), shared=False):
        self.name = identity
        self.tids = set(tids)
        self.shared = shared

    def identity(self):
        return self.name() if callable(self.name) else self.name

    def was(self, identity):
        return False

    def last_transaction(self):
        return p64(max(self.tids, default=0))

    def has_transaction(self, tid):
        return tid in map(p64, self.tids)
