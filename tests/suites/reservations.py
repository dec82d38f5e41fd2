"""What tids do to the transactions of the published suites: each fixture forces another way to a tid, every time.

For servers that are forked from this process, as those of ZEO's suites are where ``ZEO_PROCESS_TYPE`` says so.
"""

import itertools
import threading
import weakref

import pytest
from ZEO.StorageServer import ZEOStorage

from zodb_s3blobs.commit import tids
from zodb_s3blobs.commit.tids import ROUNDS, Tids
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.vote import Vote
from zodb_s3blobs.zeo import voting
from zodb_s3blobs.zeo.voting import VotingHandler

VARIANTS = "reserved", "overtaken", "passing", "late"


@pytest.fixture
def reserved(monkeypatch):
    """Every vote of a client reserves a tid, with or without blobs."""
    stock_vote = ZEOStorage.vote

    def vote(handler, id):
        # Called by our handler: before a reservation if there are no blobs, and after it.
        if not isinstance(handler, VotingHandler) or handler.pending_vote is not None or handler.tid is not None:
            return stock_vote(handler, id)
        return handler._answer_later(lambda: handler._store_blobs(id))

    monkeypatch.setenv("ZEO_PROCESS_TYPE", "fork")
    monkeypatch.setattr(ZEOStorage, "vote", vote)


def _lose(monkeypatch, rounds):
    """Take the first ``rounds`` reservations of each transaction away.

    In turn before its uploads are over, when it is ready, and when it has the commit lock.
    """
    points = itertools.cycle(["uploads", "ready", "lock"])
    doomed = {}
    stock_reserve, stock_ready, stock_holds = Tids.reserve, Tids.ready, Tids.holds

    def reserve(self, slow=False, earlier=0):
        reservation = stock_reserve(self, slow, earlier)
        if earlier < rounds:
            doomed[reservation] = next(points)
        lose_at("uploads", self, reservation)
        return reservation

    def ready(self, reservation):
        stock_ready(self, reservation)
        lose_at("ready", self, reservation)

    def holds(self, reservation):
        lose_at("lock", self, reservation)
        return stock_holds(self, reservation)

    def lose_at(point, tids, reservation):
        if doomed.get(reservation) == point:
            del doomed[reservation]
            tids.release(reservation)

    monkeypatch.setattr(Tids, "reserve", reserve)
    monkeypatch.setattr(Tids, "ready", ready)
    monkeypatch.setattr(Tids, "holds", holds)


@pytest.fixture
def overtaken(reserved, monkeypatch):
    """Each transaction reserves a tid and loses it, so that it reserves another one and copies its blobs."""
    _lose(monkeypatch, 1)


@pytest.fixture
def late(reserved, monkeypatch):
    """Each transaction loses all its reservations, and stores its blobs with the commit lock."""
    _lose(monkeypatch, ROUNDS)


@pytest.fixture
def passing(monkeypatch):
    """A reservation of nobody is outstanding all the time: every transaction gets a tid below it, or overtakes it."""
    slow = itertools.cycle([False, True])
    nobodys = {}  # by Tids
    stock_begin, stock_reserve = Tids.begin, Tids.reserve

    def stand_in_the_way(self):
        if self not in nobodys or nobodys[self].is_lost:
            nobodys[self] = stock_reserve(self, next(slow))

    def reserve(self, *args):
        stand_in_the_way(self)
        return stock_reserve(self, *args)

    def begin(self, reservation):
        if reservation is None:
            stand_in_the_way(self)
        return stock_begin(self, reservation)

    monkeypatch.setenv("ZEO_PROCESS_TYPE", "fork")
    for module in tids, voting:
        monkeypatch.setattr(module, "GRACE", 0.01)
    monkeypatch.setattr(tids, "SLOW_GRACE", 0.02)
    monkeypatch.setattr(Tids, "reserve", reserve)
    monkeypatch.setattr(Tids, "begin", begin)


@pytest.fixture
def begun(monkeypatch):
    """Every transaction begins in the base with a tid that it is given, as those of ZEO's clients do.

    For storages in this process, which otherwise leave the tid to the base. In turn it is reserved, or below a
    reservation of nobody.
    """
    # In memory a commit takes less time than this, so tids would lead the clock, which packs and histories go by.
    monkeypatch.setattr(tids, "_ROOM", 16)
    reserves = itertools.cycle([True, False])
    locks = weakref.WeakKeyDictionary()  # by Tids; the base takes its commit lock only after the tid was given
    stock_begin = S3BlobStorage.tpc_begin

    def is_committing(self, transaction):
        return self._pending is not None and self._pending.transaction is transaction

    def tpc_begin(self, transaction, *args, **kwargs):
        if is_committing(self, transaction):  # raises
            return stock_begin(self, transaction, *args, **kwargs)
        lock = locks.setdefault(self.tids, threading.Lock())
        lock.acquire()
        try:
            if args or kwargs:  # it has a tid of its own
                return stock_begin(self, transaction, *args, **kwargs)
            return begin(self, transaction)
        except BaseException:
            lock.release()
            raise

    def begin(self, transaction):
        pending, nobodys = self.new_pending(), None
        if next(reserves):
            pending.reserve()
        else:
            nobodys = self.tids.reserve()
        try:
            self.vote_without_waiting(Vote(self.metrics, pending), lambda: stock_begin(self, transaction))
        except BaseException:
            pending.abort()
            raise
        finally:
            if nobodys is not None:
                self.tids.release(nobodys)

    def unlocking(stock):
        def end(self, transaction, *args):
            ends = is_committing(self, transaction)
            try:
                return stock(self, transaction, *args)
            finally:
                if ends:
                    locks[self.tids].release()

        return end

    monkeypatch.setattr(S3BlobStorage, "tpc_begin", tpc_begin)
    monkeypatch.setattr(S3BlobStorage, "tpc_finish", unlocking(S3BlobStorage.tpc_finish))
    monkeypatch.setattr(S3BlobStorage, "tpc_abort", unlocking(S3BlobStorage.tpc_abort))
