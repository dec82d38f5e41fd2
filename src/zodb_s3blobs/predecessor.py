"""What zodb-s3blobs 1.2.1, the earlier package of this name, leaves behind: keys of its section, and its cache.

Its buckets need nothing of this: they have the same layout.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "zodb-s3blobs 1.2.1"

#: The keys that have no effect any more, and those whose values hold for downloads now.
REPLACED = {
    "s3-download-connect-timeout": "s3-connect-timeout",
    "s3-download-read-timeout": "s3-read-timeout",
    "s3-download-max-attempts": "s3-max-attempts",
}

#: The keys whose values 1.2.1 takes without a unit only.
TIMEOUTS = ("s3-connect-timeout", "s3-read-timeout")

# An oid or a tid as 1.2.1 writes it.
_NUMBER = "(0|[1-9a-f][0-9a-f]{0,15})"


class SecondsWithoutUnit(float):
    """A time that was written as 1.2.1 demands: as a number alone."""


def seconds_without_unit(text: str) -> SecondsWithoutUnit | None:
    """Return the time ``text`` if it is a number alone, else None."""
    return SecondsWithoutUnit(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text) else None


def warnings(config: Any) -> Iterator[str]:
    """Yield a sentence for each key of the section ``config`` that 1.2.1 understands in another way."""
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
