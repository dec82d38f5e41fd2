"""A site on a ZEO server by which the effects of every trouble are measured."""

import pytest
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import u64

from tests.support.zeo_clients import (
    blob,
    commit_blob,
    commit_object,
    leftovers,
    load,
    operations,
    read,
    uncache,
    wait_for,
    write,
)


class Life:
    """A site on ``server``: what goes on whatever happens to blobs, and what it must have kept when that is over.

    It begins with a blob in the cache, one that only the bucket has, and one with a dead revision.
    """

    def __init__(self, server, s3, bucket_name):
        self.server, self.s3, self.bucket_name = server, s3, bucket_name
        self.blobs = {"warm": b"warm" * 100, "cold": b"cold" * 100, "old": b"second"}
        db = server.db()
        write(db, "warm", self.blobs["warm"])
        write(db, "cold", self.blobs["cold"])
        write(db, "old", b"first")
        write(db, "old", self.blobs["old"])
        with db.transaction() as connection:
            self.names = {name: name_of(connection.root()[name]) for name in self.blobs}
        self.cool("cold")
        self.kept = sorted(s3.keys(bucket_name))

    def cool(self, name):
        """Only the bucket has that blob from now on."""
        uncache(self.server, *self.names[name])

    def read(self, name):
        """As a client that has never seen it reads it."""
        return blob(self.server.client(), *self.names[name])

    def check_objects_go_on(self):
        client = self.server.client()
        load(client)
        commit_object(client)

    def check_cached_blobs_go_on(self):
        self.s3.forget()
        assert self.read("warm") == self.blobs["warm"]
        assert operations(self.s3) == []

    def fails(self, work, *args):
        """What the client is told: an error that is no POSKeyError, a sentence without a secret."""
        with pytest.raises(StorageError) as caught:
            work(*args)
        assert not isinstance(caught.value, POSKeyError)
        assert "test-secret" not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def commit_fails(self, data=b"data"):
        return self.fails(commit_blob, self.server.client(), data)

    def cold_read_fails(self):
        return self.fails(self.read, "cold")

    def pack_fails(self):
        return self.fails(self.server.db().pack)

    def check_nothing_is_lost(self, deleted=()):
        """The bucket has what it had before the trouble; something that failed may have left more."""
        assert {*self.kept} - {*deleted} <= {*self.s3.keys(self.bucket_name)}

    def check_all_is_well(self, pack_at=None):
        """Every acknowledged blob is there, all works, nothing stays behind, and a pack leaves exactly the live ones.

        ``pack_at``: the time to pack to, now if not given.
        """
        db = self.server.db()
        self.blobs["later"] = b"later"
        write(db, "later", self.blobs["later"])
        fresh = self.server.db()
        assert {name: read(fresh, name) for name in self.blobs} == self.blobs
        db.pack(pack_at)
        with fresh.transaction() as connection:
            live = {"1/blobs/{:x}/{:x}.blob".format(*map(u64, name_of(connection.root()[n]))) for n in self.blobs}
        assert set(self.s3.keys(self.bucket_name)) == live
        wait_for(lambda: leftovers(self.server) == [])
        fresh = self.server.db()
        assert {name: read(fresh, name) for name in self.blobs} == self.blobs


def name_of(persistent):
    persistent._p_activate()
    return persistent._p_oid, persistent._p_serial
