"""The order of tids: those reserved before the commit lock, and those given to transactions that commit meanwhile.

The key of a blob ends with its tid. A transaction with blobs *reserves* a tid, uploads its blobs to their final keys,
and only then asks for the commit lock. Others commit meanwhile with tids just below the earliest reservation that is
outstanding, so tids ascend in the order of commits. A reservation that keeps others waiting is *overtaken*: its
transaction loses the tid, reserves a later one, and copies its blobs there inside the bucket.

    last commit            others get these     reserved      reserved
    ----|---------------------|--|--|->............|.............|-----> tids

No storage checks the order of the tids that it is given, so `Tids.begin` does.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future

from ZODB.utils import newTid, p64, u64

from ..metrics import Metrics

#: How many times a transaction reserves a tid, before it uploads what is left with the commit lock.
ROUNDS = 3

#: How long, in seconds, a transaction whose blobs are stored waits for an earlier one, before it overtakes it; and how
#: long for a slow one. These times, and the next one, double with each reservation that the earlier one has lost.
GRACE, SLOW_GRACE = 0.2, 1.0

#: The age in seconds at which a reservation is overtaken by commits without blobs, because their tids lag behind the
#: clock by that age; and the age of a slow one, which would otherwise copy gigabytes again and again.
LONGEST, SLOW_LONGEST = 2.0, 8.0

# In ticks, the units of a tid; a millisecond has 71,582.
#: The room below a reservation for other transactions.
_ROOM = 1 << 14
#: The room below the reservation of a slow transaction.
_SLOW_ROOM = 1 << 20
#: The room between two reservations below the one of a slow transaction.
_STEP = 1 << 12


class Reservation:
    """A tid that a transaction is to commit with. Only `Tids` changes it."""

    def __init__(self, number: int, slow: bool, grace: float, expires: float) -> None:
        self.number = number
        self.tid = p64(number)
        #: Whether later transactions are likely to be ready before this one.
        self.slow = slow
        #: How long, in seconds, later transactions that are ready wait for this one.
        self.grace = grace
        #: The time, by the clock of `Tids`, from which commits without blobs overtake it.
        self.expires = expires
        #: When all blobs of the transaction were stored, by that clock; None before.
        self.ready_at: float | None = None
        #: Whether the transaction may no longer commit with the tid.
        self.is_lost = False
        #: Completes when the transaction may ask for the commit lock, or when it has lost the tid.
        self.turn: Future[None] = Future()

    @property
    def is_ready(self) -> bool:
        """True once all blobs of the transaction are stored."""
        return self.ready_at is not None


class Tids:
    """The tids of one storage, on the thread that commits: the event loop of the ZEO server.

    ``last_transaction`` returns the tid of the last transaction of the base; ``now`` returns the tid of this moment,
    as a number; ``clock`` returns seconds, by which reservations age.
    """

    def __init__(
        self,
        last_transaction: Callable[[], bytes],
        metrics: Metrics,
        now: Callable[[], int] = lambda: u64(newTid(None)),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._last_transaction = last_transaction
        self._metrics = metrics
        self._now = now
        self._clock = clock
        self._outstanding: list[Reservation] = []  # in the order of their tids
        self._last = 0  # the latest tid that a transaction has begun with
        self._used: set[int] = set()  # later than that, and not to be given again: their keys may not be deleted yet

    def reserve(self, slow: bool = False, earlier: int = 0) -> Reservation:
        """Reserve a tid that is later than all that were given.

        ``slow``: the uploads will take longer than those of others; ``earlier``: how many reservations the transaction
        has lost. A reservation that is not slow goes below those that are, so that it need not overtake them; but
        not below an old one, or tids would lag behind the clock by more and more.
        """
        place = len(self._outstanding)
        while not slow and place and self._lets_others_pass(self._outstanding[place - 1]):
            place -= 1
        number = self._number_at(place, slow)
        if number is None:  # there is no room below the slow ones any more
            for reservation in self._outstanding[place:]:
                self._lose(reservation)
            number = self._number_at(place, slow)
            assert number is not None
        patience = 2**earlier
        grace, longest = (SLOW_GRACE, SLOW_LONGEST) if slow else (GRACE, LONGEST)
        reservation = Reservation(number, slow, grace * patience, self._clock() + longest * patience)
        self._outstanding.insert(place, reservation)
        self._metrics.reservations.inc()
        return reservation

    def _lets_others_pass(self, reservation: Reservation) -> bool:
        return reservation.slow and not reservation.is_ready and not self._is_old(reservation)

    def _is_old(self, reservation: Reservation) -> bool:
        return self._clock() >= reservation.expires

    def _number_at(self, place: int, slow: bool) -> int | None:
        """Return a free number for a reservation at ``place`` among the outstanding ones; None if there is none."""
        # A transaction may have been restored with a tid that is later than those of reservations.
        floor = max(self._floor(), self._outstanding[place - 1].number if place else 0)
        if place == len(self._outstanding):
            return self._unused(max(self._now(), floor + (_SLOW_ROOM if slow else _ROOM)))
        ceiling = self._outstanding[place].number
        floor = max(floor, ceiling - _SLOW_ROOM)
        number = self._unused(floor + min(_STEP, (ceiling - floor) // 2))
        return number if floor < number < ceiling else None

    def _floor(self) -> int:
        return max(self._last, u64(self._last_transaction()))

    def _unused(self, number: int) -> int:
        while number in self._used:
            number += 1
        return number

    # The turn

    def ready(self, reservation: Reservation) -> None:
        """Note that all blobs of the transaction are stored: `Reservation.turn` completes when its turn has come."""
        reservation.ready_at = self._clock()
        self._give_turn()

    def overtake(self, reservation: Reservation) -> None:
        """Take the tids away from all earlier transactions that are not ready, if this one has waited long enough.

        None of them loses its tid before the wait was long enough for each: this one would have to wait all the same.
        """
        assert reservation.ready_at is not None
        waited = self._clock() - reservation.ready_at
        late = [each for each in self._outstanding[: self._outstanding.index(reservation)] if not each.is_ready]
        if all(waited >= each.grace for each in late):
            for each in late:
                self._lose(each)

    def release(self, reservation: Reservation) -> None:
        """End the reservation: the transaction has ended without it. A second call does nothing."""
        if reservation in self._outstanding:
            self._drop(reservation)

    def _lose(self, reservation: Reservation) -> None:
        self._metrics.reservations_overtaken.inc()
        self._drop(reservation)

    def _drop(self, reservation: Reservation) -> None:
        self._used.add(reservation.number)
        reservation.is_lost = True
        self._outstanding.remove(reservation)
        if not reservation.turn.done():
            reservation.turn.set_result(None)
        self._give_turn()

    def _give_turn(self) -> None:
        # One at a time: ZEO's lock manager does not keep the order of those that wait for the commit lock.
        if self._outstanding and self._outstanding[0].is_ready and not self._outstanding[0].turn.done():
            self._outstanding[0].turn.set_result(None)

    # With the commit lock

    def holds(self, reservation: Reservation) -> bool:
        """Return whether the transaction can commit with its tid now; it has lost the tid if not."""
        if not reservation.is_lost and reservation.number <= self._floor():
            self._lose(reservation)  # a transaction with a later tid was restored
        return not reservation.is_lost

    def begin(self, reservation: Reservation | None) -> bytes:
        """Return the tid with which the transaction that has the commit lock begins.

        ``reservation``: its own, which it `holds`; None for a transaction that has none.
        """
        assert reservation is None or reservation in self._outstanding[:1], "a reservation begins that has no turn"
        number = self._next() if reservation is None else reservation.number
        assert number > self._floor(), "a tid is not later than the last one"
        self._last = number
        self._used = {used for used in self._used if used > number}
        if reservation is not None:
            self._outstanding.pop(0)
            self._give_turn()
        return p64(number)

    def _next(self) -> int:
        """Return a tid later than the last one, and earlier than every reservation that is outstanding."""
        floor, now = self._floor(), self._now()
        while self._outstanding:
            first = self._outstanding[0]
            # Not just one tick after the last tid, which may be days old.
            number = self._unused(max(min(now, first.number - _ROOM), floor) + 1)
            if number < first.number and (first.is_ready or not self._is_old(first)):
                return number
            self._lose(first)
        return self._unused(max(now, floor + 1))
