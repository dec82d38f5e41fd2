"""The outcome of a check of ``zodb-s3blobs check``."""

from dataclasses import dataclass
from typing import Literal

from ...s3.errors import BucketError


@dataclass(frozen=True)
class Outcome:
    """The result of a check; ``set``: the key of the section that helps, with its value.

    ``error``: the cause, and part of the ``meaning``; ``rest``: the other part of the meaning; ``same_as``: the earlier
    check that failed for the same cause.
    """

    state: Literal["works", "worked around", "fails", "not tried"]
    meaning: str
    set: str = ""
    error: BucketError | None = None
    rest: str = ""
    same_as: str = ""


def works(meaning: str) -> Outcome:
    """Return the outcome of a check that succeeded."""
    return Outcome("works", meaning)


def around(meaning: str, set: str = "", error: BucketError | None = None) -> Outcome:
    """Return the outcome of a check whose failure, because of ``error``, the server works around."""
    return Outcome("worked around", f"{error}; {meaning}" if error else meaning, set, error, meaning)


def fails(meaning: str, set: str = "", error: BucketError | None = None) -> Outcome:
    """Return the outcome of a check that failed; ``error``: the refusal of the service, if there was one."""
    return Outcome("fails", meaning, set, error)


def not_tried(meaning: str) -> Outcome:
    """Return the outcome of a check that could not be made; ``meaning``: the reason."""
    return Outcome("not tried", meaning)
