"""The leftovers of zodb-s3blobs 1.2.1, the earlier package of this name: keys of its section, and its cache.

Its buckets need no conversion: their layout is that of this package.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "zodb-s3blobs 1.2.1"

#: Key of 1.2.1 without effect -> key whose value applies to downloads now.
REPLACED = {
    "s3-download-connect-timeout": "s3-connect-timeout",
    "s3-download-read-timeout": "s3-read-timeout",
    "s3-download-max-attempts": "s3-max-attempts",
}

#: The keys whose values must have no unit in 1.2.1.
TIMEOUTS = ("s3-connect-timeout", "s3-read-timeout")

# An oid or a tid in the notation of 1.2.1.
_NUMBER = "(0|[1-9a-f][0-9a-f]{0,15})"


class SecondsWithoutUnit(float):
    """A time written as a number alone, as 1.2.1 demands."""


def seconds_without_unit(text: str) -> SecondsWithoutUnit | None:
    """Return the time in ``text`` if it is a number alone, else None."""
    return SecondsWithoutUnit(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text) else None


def warnings(config: Any) -> Iterator[str]:
    """Yield a sentence for each key of the section ``config`` that has another meaning in 1.2.1."""
    for key, replacement in REPLACED.items():
        if getattr(config, key.replace("-", "_")) is not None:
            yield (
                f"{key} is a key of {NAME} and has no effect: {replacement} applies to downloads as well as to "
                f"uploads. Delete {key}"
            )
    for key in TIMEOUTS:
        value = getattr(config, key.replace("-", "_"))
        if isinstance(value, SecondsWithoutUnit):
            yield (
                f"{key} has no unit and means {value:g} seconds, as with {NAME}; here it applies to downloads as well "
                f"as to uploads. Write the unit, as in {value:g}s, or delete {key} for the default"
            )


def is_cache(directory: Path) -> bool:
    """Return whether ``directory`` holds a cache of 1.2.1: files {oid}/{tid}.blob, in hexadecimal without zeros."""
    names = (f"{path.parent.name}/{path.name}" for path in directory.glob("*/*.blob"))
    return any(re.fullmatch(rf"{_NUMBER}/{_NUMBER}\.blob", name) for name in names)
