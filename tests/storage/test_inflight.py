"""The register of blobs in flight: committing and collecting never work on the same key."""

import threading

import pytest
from ZODB.utils import p64

from zodb_s3blobs.inflight import InFlight

TIMEOUT = 30
ME, ANOTHER = "me", "another"
ONE, TWO, THREE = [(p64(number), p64(7)) for number in (1, 2, 3)]


@pytest.fixture
def register():
    return InFlight()


def judging(register, name):
    """An event that is set once ``wait_until_judged(name)`` has returned in another thread."""
    judged = threading.Event()

    def judge():
        register.wait_until_judged(name, ME)
        judged.set()

    threading.Thread(target=judge, daemon=True).start()
    return judged


def test_deleting_leaves_out_what_is_being_committed(register):
    register.add_all([TWO], ME)
    with register.deleting([ONE, TWO, THREE]) as names:
        assert names == [ONE, THREE]


def test_a_transaction_wants_all_its_names_until_it_ends(register):
    names = [(p64(number), p64(7)) for number in range(1000)]
    register.add_all(iter(names), ME)
    with register.deleting(names) as free:
        assert free == []
    register.remove(names, ME)
    with register.deleting(names) as free:
        assert free == names


def test_another_revision_of_what_is_being_committed_may_be_deleted(register):
    oid, _ = ONE
    register.add_all([ONE], ME)
    with register.deleting([(oid, p64(6))]) as names:
        assert names == [(oid, p64(6))]


def test_what_is_no_longer_being_committed_may_be_deleted(register):
    register.add_all([ONE, TWO], ME)
    register.remove([ONE], ME)
    with register.deleting([ONE, TWO]) as names:
        assert names == [ONE]


def test_discarding_what_is_not_there_does_nothing(register):
    register.remove([ONE], ME)
    with register.deleting([ONE]) as names:
        assert names == [ONE]


def test_wait_until_judged_waits_while_the_name_is_being_deleted(register):
    with register.deleting([ONE]):
        judged = judging(register, ONE)
        assert not judged.wait(0.2)
    assert judged.wait(TIMEOUT)


def test_wait_until_judged_waits_though_the_name_was_added_after_the_deletion_had_begun(register):
    with register.deleting([ONE]) as names:
        register.add_all([ONE], ME)
        assert names == [ONE]
        judged = judging(register, ONE)
        assert not judged.wait(0.2)
    assert judged.wait(TIMEOUT)


def test_wait_until_judged_does_not_wait_while_others_are_being_deleted(register):
    register.add_all([TWO], ME)
    with register.deleting([ONE, TWO]):
        assert judging(register, TWO).wait(TIMEOUT)
        assert judging(register, THREE).wait(TIMEOUT)


def test_wait_until_judged_does_not_wait_for_ever_when_the_deletion_fails(register):
    with pytest.raises(ZeroDivisionError), register.deleting([ONE]):
        judged = judging(register, ONE)
        raise ZeroDivisionError
    assert judged.wait(TIMEOUT)


def test_everybody_who_waits_is_told(register):
    with register.deleting([ONE, TWO]):
        waiting = [judging(register, name) for name in (ONE, TWO, ONE)]
    assert all(judged.wait(TIMEOUT) for judged in waiting)


def test_what_two_transactions_want_is_kept_until_both_have_ended(register):
    register.add_all([ONE], ANOTHER)
    register.add_all([ONE], ME)
    register.remove([ONE], ME)
    with register.deleting([ONE]) as names:
        assert names == []
    register.remove([ONE], ANOTHER)
    with register.deleting([ONE]) as names:
        assert names == [ONE]


def test_wait_until_judged_does_not_wait_for_the_transaction_that_asks(register):
    register.add_all([ONE], ME)
    assert judging(register, ONE).wait(TIMEOUT)


def test_wait_until_judged_waits_for_the_cleanup_after_an_earlier_transaction(register):
    register.add_all([ONE], ANOTHER)
    register.add_all([ONE], ME)
    judged = judging(register, ONE)
    assert not judged.wait(0.2)
    register.remove([ONE], ANOTHER)
    assert judged.wait(TIMEOUT)


def test_wait_until_judged_does_not_wait_for_a_later_transaction(register):
    register.add_all([ONE], ME)
    register.add_all([ONE], ANOTHER)
    assert judging(register, ONE).wait(TIMEOUT)
