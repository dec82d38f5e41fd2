"""Which tests are slow: `pytest` leaves them out, `pytest -m slow` runs them."""

import pytest

#: Marks a test, a class or the parameter of a test as slow.
slow = pytest.mark.slow


def slow_but(*quick, of):
    """Return the values ``of`` as parameters for pytest, of which all but the ``quick`` ones are slow."""
    of = list(of)
    assert not set(quick) - set(of), f"{quick} are not among {of}"
    return [value if value in quick else pytest.param(value, marks=slow) for value in of]
