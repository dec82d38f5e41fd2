"""Which tests are slow: `pytest` leaves them out, `pytest -m slow` runs them."""

import pytest

#: Marks a test, a class or a module as slow.
slow = pytest.mark.slow


def slow_but(*quick, of):
    """Return the values ``of`` for a parameter of a test, where all but the ``quick`` ones are slow."""
    of = list(of)
    assert all(value in of for value in quick), f"not all of {quick} are among {of}"
    return [value if value in quick else pytest.param(value, marks=slow) for value in of]


def slow_after(number, *, of, unpack=False):
    """Return the values ``of`` for a parameter of a test, where those after the first ``number`` are slow.

    ``unpack``: whether each of them is a tuple with the values of several parameters.
    """
    of = list(of)
    return of[:number] + [pytest.param(*(value if unpack else [value]), marks=slow) for value in of[number:]]
