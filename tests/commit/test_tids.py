"""The order of tids: a case for each sentence of its contract, and a model that makes up histories of a server.

The clock, the seconds by which reservations age, and the base are fakes. `Model` looks at what `Tids` gives out, and
not at what it keeps; a failure prints the history.
"""

import os
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from persistent.TimeStamp import TimeStamp
from ZODB.utils import p64, u64

from tests.support.counts import value
from tests.support.models import run_model
from tests.support.speed import slow_after
from zodb_s3blobs.commit.tids import GRACE, LONGEST, SLOW_GRACE, SLOW_LONGEST, Tids
from zodb_s3blobs.metrics import Metrics

NOON = u64(TimeStamp(2026, 11, 28, 12, 0, 0).raw())

#: The ticks of a second.
SECOND = (1 << 32) // 60

#: How many ticks below the clock at the time of a reservation others may get a tid: 15 milliseconds for a reservation
#: below one of a slow transaction, one more for those without a reservation.
ROOM = 17 * SECOND // 1000


class World:
    """A base, a clock and the `Tids` between them."""

    def __init__(self):
        self.now = NOON
        self.seconds = 1000.0
        self.committed = NOON - SECOND  # the last transaction of the base
        self.metrics = Metrics()
        self.tids = Tids(lambda: p64(self.committed), self.metrics, lambda: self.now, lambda: self.seconds)

    def pass_time(self, seconds):
        self.seconds += seconds
        self.now += int(seconds * SECOND)

    def commit(self, reservation=None):
        """Commit a transaction; return the number of its tid."""
        self.committed = u64(self.tids.begin(reservation))
        return self.committed

    @property
    def overtaken(self):
        return value(self, "s3blobs_reservations_overtaken_total")

    @property
    def instruments(self):
        return self.metrics.instruments


@pytest.fixture
def world():
    return World()


@pytest.fixture
def tids(world):
    return world.tids


def has_turn(reservation):
    return reservation.turn.done() and not reservation.is_lost


# Without reservations


def test_the_tid_is_this_moment(world):
    assert world.commit() == NOON
    world.pass_time(5)
    assert world.commit() == world.now


@pytest.mark.parametrize("seconds", [0, 1, 86400])
def test_where_the_clock_was_set_back_tids_ascend_all_the_same(world, seconds):
    first = world.commit()
    world.now -= seconds * SECOND
    assert [world.commit() for _ in range(3)] == [first + 1, first + 2, first + 3]


def test_a_tid_is_later_than_the_last_transaction_of_the_base(world):
    world.committed = NOON + 3 * SECOND
    assert world.commit() == NOON + 3 * SECOND + 1


def test_an_aborted_transaction_leaves_its_tid_unused(world, tids):
    aborted = u64(tids.begin(None))
    assert world.commit() > aborted


# Reservations


def test_a_transaction_commits_with_the_tid_that_it_has_reserved(world, tids):
    reservation = tids.reserve()
    assert reservation.tid == p64(reservation.number)
    tids.ready(reservation)
    assert has_turn(reservation)
    assert tids.holds(reservation)
    assert tids.begin(reservation) == reservation.tid
    assert value(world, "s3blobs_reservations_total") == 1
    assert world.overtaken == 0


def test_a_reservation_is_of_this_moment(world, tids):
    assert tids.reserve().number == NOON


@pytest.mark.parametrize("slow", [False, True])
def test_reservations_ascend(tids, slow):
    numbers = [tids.reserve(slow).number for _ in range(100)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("idle", [0, 0.001, 5, 5 * 86400])
def test_a_thousand_transactions_commit_below_one_reservation(world, tids, slow, idle):
    world.commit()
    world.pass_time(idle)
    reservation = tids.reserve(slow)
    numbers = [world.commit() for _ in range(1000)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= world.now - ROOM  # though the last transaction is days old
    assert world.commit(ready(tids, reservation)) > numbers[-1]
    assert world.overtaken == 0


def ready(tids, reservation):
    tids.ready(reservation)
    assert has_turn(reservation)
    assert tids.holds(reservation)
    return reservation


def test_where_there_is_no_room_left_the_reservation_is_lost(world, tids):
    reservation = tids.reserve()
    tids.ready(reservation)
    world.committed = reservation.number - 3
    assert [world.commit(), world.commit()] == [reservation.number - 2, reservation.number - 1]
    assert tids.holds(reservation)
    assert world.commit() > reservation.number
    assert not tids.holds(reservation)
    assert world.overtaken == 1


def test_what_a_transaction_has_reserved_in_vain_is_given_to_nobody(world, tids):
    reservations = [tids.reserve() for _ in range(10)]
    for reservation in reservations:
        tids.release(reservation)
    given = [tids.reserve(), *(tids.reserve(slow=True) for _ in range(3))]
    assert not {each.number for each in given} & {each.number for each in reservations}
    for reservation in given:
        tids.release(reservation)
    world.now = reservations[0].number
    assert world.commit() not in {each.number for each in given + reservations}


def test_a_tid_that_was_reserved_in_vain_is_not_given_after_earlier_ones_have_begun(world, tids):
    first, second, third = tids.reserve(), tids.reserve(), tids.reserve()
    tids.release(second)
    tids.release(third)
    world.commit(ready(tids, first))
    world.now = second.number
    assert second.number < world.commit() < third.number
    world.now = third.number
    assert world.commit() > third.number


def test_a_second_release_does_nothing(world, tids):
    first, second = tids.reserve(), tids.reserve()
    tids.ready(first)
    tids.release(first)
    tids.release(first)
    world.commit(ready(tids, second))
    tids.release(second)
    assert world.overtaken == 0


# The turn


def test_a_transaction_has_its_turn_when_all_earlier_ones_have_begun_or_are_gone(world, tids):
    first, second, third = reservations = [tids.reserve() for _ in range(3)]
    for reservation in reversed(reservations):
        tids.ready(reservation)
    assert [has_turn(each) for each in reservations] == [True, False, False]
    world.commit(first)
    assert [second.turn.done(), third.turn.done()] == [True, False]
    tids.release(second)
    assert has_turn(third)


def test_who_overtakes_takes_the_tids_of_earlier_transactions_that_are_not_ready(world, tids):
    one, two, three, four, five = [tids.reserve() for _ in range(5)]
    tids.ready(two)
    tids.ready(four)
    world.pass_time(GRACE)
    tids.overtake(four)
    assert [each.is_lost for each in (one, two, three, four, five)] == [True, False, True, False, False]
    assert [each.turn.done() for each in (one, two, three, four, five)] == [True, True, True, False, False]
    assert world.overtaken == 2
    world.commit(two)
    assert has_turn(four)


@pytest.mark.parametrize(
    ("slow", "earlier", "grace"),
    [(False, 0, GRACE), (False, 2, 4 * GRACE), (True, 0, SLOW_GRACE), (True, 1, 2 * SLOW_GRACE)],
)
def test_a_transaction_waits_longer_for_slow_ones_and_for_those_that_have_lost_before(
    world, tids, slow, earlier, grace
):
    first, second = tids.reserve(slow, earlier), tids.reserve(slow)
    tids.ready(second)
    world.pass_time(grace - 0.01)
    tids.overtake(second)
    assert not first.is_lost
    world.pass_time(0.02)
    tids.overtake(second)
    assert first.is_lost
    assert has_turn(second)


def test_nobody_is_overtaken_by_a_transaction_that_has_to_wait_for_another_one_all_the_same(world, tids):
    fast, slow, last = tids.reserve(), tids.reserve(slow=True), tids.reserve(slow=True)
    tids.ready(last)
    world.pass_time(GRACE)
    tids.overtake(last)
    assert not fast.is_lost
    world.pass_time(SLOW_GRACE)
    tids.overtake(last)
    assert [fast.is_lost, slow.is_lost, has_turn(last)] == [True, True, True]


def test_who_has_lost_a_tid_reserves_a_later_one(world, tids):
    lost, other = tids.reserve(), tids.reserve()
    tids.ready(other)
    world.pass_time(GRACE)
    tids.overtake(other)
    tids.ready(lost)  # its uploads are over: too late
    assert not tids.holds(lost)
    again = tids.reserve(earlier=1)
    assert again.number > other.number > lost.number
    world.commit(other)
    world.commit(ready(tids, again))


def test_nobody_begins_with_a_lost_tid_nor_before_its_turn(world, tids):
    first, second = tids.reserve(), tids.reserve()
    with pytest.raises(AssertionError):
        tids.begin(second)
    tids.release(first)
    with pytest.raises(AssertionError):
        tids.begin(first)
    assert world.commit() < second.number  # as if nothing had been tried
    world.commit(ready(tids, second))
    with pytest.raises(AssertionError):
        tids.begin(second)


# Slow transactions


def test_a_fast_transaction_need_not_wait_for_slow_ones(world, tids):
    fast, slow, slower = tids.reserve(), tids.reserve(slow=True), tids.reserve(slow=True)
    later, last = tids.reserve(), tids.reserve()
    assert fast.number < later.number < last.number < slow.number < slower.number
    for reservation in (fast, later, last, slow, slower):
        world.commit(ready(tids, reservation))
    assert world.overtaken == 0


def test_a_slow_transaction_that_is_ready_lets_nobody_pass(world, tids):
    first, slow = tids.reserve(), tids.reserve(slow=True)
    tids.ready(slow)
    fast = tids.reserve()
    assert first.number < slow.number < fast.number


def test_a_slow_transaction_lets_nobody_pass_for_longer_than_it_may_keep_others_waiting(world, tids):
    slow = tids.reserve(slow=True)
    world.pass_time(SLOW_LONGEST)
    fast, slower = tids.reserve(), tids.reserve(slow=True)
    assert slow.number < fast.number == world.now
    assert fast.number < tids.reserve().number < slower.number
    # Tids would lag behind the clock by the age of the slow one, for as long as there is one fast one after the other.
    assert world.commit() >= world.now - ROOM
    assert slow.is_lost
    assert not fast.is_lost


def test_hundreds_of_fast_transactions_commit_below_a_slow_one(world, tids):
    slow = tids.reserve(slow=True)
    numbers = []
    for _ in range(200):
        fast = tids.reserve()
        numbers += [world.commit(), world.commit(ready(tids, fast))]
    assert numbers == sorted(set(numbers))
    assert world.commit(ready(tids, slow)) > numbers[-1]
    assert world.overtaken == 0


def test_where_there_is_no_room_below_a_slow_transaction_it_loses_its_tid(world, tids):
    slow = tids.reserve(slow=True)
    reservations = []
    for _ in range(300):
        lost = slow.is_lost
        reservations.append(tids.reserve())
        assert lost or slow.is_lost or reservations[-1].number < slow.number
    numbers = [reservation.number for reservation in reservations]
    assert numbers == sorted(set(numbers))
    assert 200 < len([number for number in numbers if number < slow.number]) < 300
    assert slow.is_lost
    assert world.overtaken == 1
    for reservation in reservations:
        world.commit(ready(tids, reservation))


# Age


@pytest.mark.parametrize(
    ("slow", "earlier", "seconds"),
    [(False, 0, 2), (False, 1, 4), (False, 2, 8), (True, 0, 8), (True, 1, 16), (True, 2, 32)],
)
def test_commits_without_blobs_overtake_an_old_reservation(world, tids, slow, earlier, seconds):
    reservation = tids.reserve(slow, earlier)
    world.pass_time(seconds - 0.1)
    assert world.commit() < reservation.number
    world.pass_time(0.1)
    assert world.commit() == world.now
    assert not tids.holds(reservation)
    assert reservation.turn.done()
    assert world.overtaken == 1


def test_nobody_overtakes_a_transaction_that_is_ready_because_of_its_age(world, tids):
    reservation = tids.reserve()
    tids.ready(reservation)
    world.pass_time(100)
    assert world.commit() < reservation.number
    world.commit(reservation)


def test_a_clock_that_was_set_does_not_age_a_reservation(world, tids):
    reservation = tids.reserve()
    world.now += 86400 * SECOND
    assert world.commit() < reservation.number
    world.now -= 2 * 86400 * SECOND
    assert world.commit() < reservation.number
    world.commit(ready(tids, reservation))


# Restored transactions


def test_after_a_restore_with_a_later_tid_reservations_are_lost(world, tids):
    first, second = tids.reserve(), tids.reserve()
    tids.ready(first)
    tids.ready(second)
    world.committed = NOON + SECOND
    assert not tids.holds(first)
    assert first.is_lost
    assert has_turn(second)
    assert not tids.holds(second)
    assert world.commit() == NOON + SECOND + 1


@pytest.mark.parametrize("slow", [False, True])
def test_a_reservation_is_later_than_a_restored_transaction(world, tids, slow):
    earlier, slow_one = tids.reserve(), tids.reserve(slow=True)
    world.committed = slow_one.number + SECOND
    reservation = tids.reserve(slow)
    assert reservation.number > world.committed
    tids.release(earlier)
    tids.release(slow_one)
    world.commit(ready(tids, reservation))


def test_after_a_restore_with_an_earlier_tid_tids_go_on_from_the_last_one(world, tids):
    last = world.commit()
    reservation = tids.reserve()
    world.committed = NOON - 86400 * SECOND
    world.now -= 3600 * SECOND
    assert last < world.commit() < reservation.number
    world.commit(ready(tids, reservation))


# Whatever happens


class Model(RuleBasedStateMachine):
    """A server whose transactions reserve, upload, overtake, commit and abort, with a clock that jumps."""

    #: Whether a reservation is taken from those that are outstanding, and which of them.
    ANY = st.integers(0, 100)

    def __init__(self):
        super().__init__()
        self.world = World()
        self.tids = self.world.tids
        self.last = 0  # the last tid that was given
        self.numbers = set()  # all that were given or reserved
        self.reservations = []  # all, of `SimpleNamespace`
        self.outstanding = []  # those that have not ended, by their tids

    def update(self, *ended):
        """Forget the reservations that have ended; return those that were lost."""
        lost = [each for each in self.outstanding if each.reservation.is_lost and each not in ended]
        self.outstanding = [each for each in self.outstanding if each not in ended and each not in lost]
        return lost

    @property
    def floor(self):
        return max(self.last, self.world.committed)

    def expired(self, each):
        return self.world.seconds >= each.reserved + (SLOW_LONGEST if each.slow else LONGEST) * 2**each.earlier

    def grace(self, each):
        return (SLOW_GRACE if each.slow else GRACE) * 2**each.earlier

    # Transactions with blobs

    @rule(number=st.integers(1, 4), slow=st.booleans(), earlier=st.sampled_from([0, 0, 1, 2]), are_ready=st.booleans())
    def reserve(self, number, slow, earlier, are_ready):
        """Reserve tids for transactions, whose uploads are over at once if they ``are_ready``."""
        new = [self.reserve_one(slow, earlier) for _ in range(number)]
        for each in new:
            if are_ready:
                self.get_ready(each)

    def reserve_one(self, slow, earlier):
        world = self.world
        reservation = self.tids.reserve(slow, earlier)
        number = reservation.number
        assert reservation.tid == p64(number)
        assert number > self.floor
        assert number not in self.numbers
        assert all(each.slow and not slow and not each.reservation.is_ready for each in self.update())
        after = [each for each in self.outstanding if each.reservation.number > number]
        for each in after:
            assert each.slow and not slow and not each.reservation.is_ready and not self.expired(each)
        # The tid is at most that earlier than the moment at which the oldest one that it has passed was reserved.
        moment = min([world.now, *(each.moment for each in after)])
        assert number >= moment - ROOM
        new = SimpleNamespace(
            reservation=reservation, slow=slow, earlier=earlier, reserved=world.seconds, moment=moment, is_ready=False
        )
        self.numbers.add(number)
        self.reservations.append(new)
        self.outstanding.insert(len(self.outstanding) - len(after), new)
        return new

    @precondition(lambda self: self.outstanding)
    @rule(which=ANY)
    def finish_uploads(self, which):
        self.get_ready(self.outstanding[which % len(self.outstanding)])

    def get_ready(self, each):
        each.is_ready, each.ready_at = True, self.world.seconds
        self.tids.ready(each.reservation)
        assert not self.update()

    @precondition(lambda self: any(each.is_ready for each in self.outstanding))
    @rule(which=ANY)
    def overtake(self, which):
        candidates = [each for each in self.outstanding if each.is_ready]
        each = candidates[which % len(candidates)]
        earlier = self.outstanding[: self.outstanding.index(each)]
        self.tids.overtake(each.reservation)
        late = [other for other in earlier if not other.is_ready]
        waited = self.world.seconds - each.ready_at
        assert self.update() == (late if all(waited >= self.grace(other) for other in late) else [])

    @precondition(lambda self: self.reservations)
    @rule(which=ANY)
    def release(self, which):
        """Abort the transaction; a second time, or after its commit, it does nothing."""
        each = self.reservations[-1 - which % len(self.reservations)]
        self.tids.release(each.reservation)
        assert not self.update(each)

    @precondition(lambda self: self.outstanding and self.outstanding[0].is_ready)
    @rule(aborts=st.booleans())
    def commit_reserved(self, aborts):
        first = self.outstanding[0]
        is_later = first.reservation.number > self.floor
        assert self.tids.holds(first.reservation) == is_later
        if not is_later:  # another one was restored
            assert self.update() == [first]
            return
        tid = self.tids.begin(first.reservation)
        assert not self.update(first)
        assert tid == first.reservation.tid
        assert u64(tid) >= first.moment - ROOM
        self.end(tid, aborts)

    # Others

    @rule(number=st.sampled_from([1, 1, 5]), aborts=st.booleans())
    def commit(self, number, aborts):
        """Commit transactions without a reservation: each gets a tid at once."""
        for _ in range(number):
            self.commit_one(aborts)

    def commit_one(self, aborts):
        had_reservations, floor, now = bool(self.outstanding), self.floor, self.world.now
        tid = self.tids.begin(None)
        for each in self.update():
            has_room = any(number not in self.numbers for number in range(floor + 1, each.reservation.number))
            assert not has_room or (not each.is_ready and self.expired(each))
        assert u64(tid) not in self.numbers
        self.numbers.add(u64(tid))
        if self.outstanding:
            first = self.outstanding[0]
            assert u64(tid) < first.reservation.number
            assert first.is_ready or not self.expired(first)
            assert u64(tid) >= min(now, first.moment) - ROOM
        else:
            assert u64(tid) >= now
        if not had_reservations and now > floor and now not in self.numbers - {u64(tid)}:
            assert u64(tid) == now
        self.end(tid, aborts)

    def end(self, tid, aborts):
        assert u64(tid) > self.floor
        self.last = u64(tid)
        if not aborts:
            self.world.committed = self.last

    def near(self, which, ticks):
        """A number near this moment, or near a tid that was reserved."""
        which %= len(self.reservations) + 1
        return ticks + (self.reservations[-which].reservation.number if which else self.world.now)

    @rule(which=ANY, ticks=st.sampled_from([-86400 * SECOND, -SECOND, -5, -2, -1, 0, 1, SECOND]))
    def restore(self, which, ticks):
        self.world.committed = self.near(which, ticks)

    @rule(which=ANY, ticks=st.sampled_from([-86400 * SECOND, -SECOND, -1, 0, 1, SECOND, 86400 * SECOND]))
    def set_clock(self, which, ticks):
        self.world.now = self.near(which, ticks)

    @rule(seconds=st.sampled_from([0.001, GRACE, SLOW_GRACE, LONGEST, SLOW_LONGEST, 20.0, 2 * 86400.0]))
    def pass_time(self, seconds):
        self.world.pass_time(seconds)

    # What always holds

    @invariant()
    def the_first_has_its_turn_when_it_is_ready(self):
        assert [each.reservation.turn.done() for each in self.outstanding] == [
            each.is_ready and each is self.outstanding[0] for each in self.outstanding
        ]

    @invariant()
    def reservations_ascend(self):
        numbers = [each.reservation.number for each in self.outstanding]
        assert numbers == sorted(set(numbers))

    @invariant()
    def who_has_lost_does_not_begin_and_does_not_wait(self):
        for each in self.reservations:
            if each.reservation.is_lost:
                assert not self.tids.holds(each.reservation)
                assert each.reservation.turn.done()

    def teardown(self):
        """Whoever is ready gets its turn in the end, also the last one."""
        if not self.outstanding:
            return
        last = self.outstanding[-1]
        self.get_ready(last)
        self.world.pass_time(4 * SLOW_GRACE)
        for _ in self.outstanding[:]:
            if not last.reservation.turn.done():
                self.tids.overtake(last.reservation)
                self.update()
                self.commit_reserved(aborts=False)
        assert last.reservation.turn.done()


@pytest.mark.parametrize(
    ("examples", "steps"),
    slow_after(1, of=[(80, 30), (int(os.environ.get("S3BLOBS_TEST_EXAMPLES", "1000")), 60)], unpack=True),
)
def test_no_history_breaks_the_order(examples, steps):
    run_model(Model, examples, steps)
