"""The name of a blob: the revision of an object."""

from typing import NamedTuple


class Revision(NamedTuple):
    """A revision of an object: ``oid`` and ``tid``, 8 bytes each. Each revision of a blob has bytes of its own."""

    oid: bytes
    tid: bytes
