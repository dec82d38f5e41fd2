"""The places in S3 of this process: two sections that store at one place would delete each other's blobs."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from .bases.adapter import BaseAdapter
from .errors import S3BlobsError
from .s3.objects import Objects

#: Endpoint, bucket and prefix.
Place = tuple[str, str, str]


class PlaceTaken(S3BlobsError):
    """Another section of this process already stores at this place; the message names both sections."""


@dataclass(eq=False)
class _Holder:
    place: Place
    label: str
    kind: BaseAdapter

    def may_share_with(self, other: "_Holder") -> bool:
        """Return whether both sections have one database, of a kind that several storages can have open."""
        return self.kind.shared and other.kind.shared and self.kind.identity() == other.kind.identity()


class Places:
    """The places of the open sections of this process. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: list[_Holder] = []

    def take(self, place: Place, label: str, kind: BaseAdapter) -> Callable[[], None]:
        """Take the ``place`` for the section ``label`` with the base ``kind``; return a function that gives it back.

        Raises PlaceTaken. May wait for a database server if two sections with RelStorage have one place.
        """
        holder = _Holder(place, label, kind)
        with self._lock:
            for other in self._holders:
                if other.place == place and not holder.may_share_with(other):
                    raise PlaceTaken(
                        f"{other.label} and {label} have the same bucket and prefix, so that each would delete the "
                        f"blobs of the other one as garbage: give each a prefix of its own"
                    )
            self._holders.append(holder)

        def give_back() -> None:
            with self._lock, contextlib.suppress(ValueError):  # a storage may be closed twice
                self._holders.remove(holder)

        return give_back


def place_of(bucket: Objects) -> Place:
    """Return the place of ``bucket`` and its prefix, equal for all spellings of its endpoint."""
    url = urlsplit(bucket.endpoint_url)
    host = (url.hostname or "").lower()
    if host.endswith(".amazonaws.com"):  # a bucket's name is unique among all regions
        return "amazonaws.com", bucket.name, bucket.keys.prefix
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return f"{url.scheme}://{host}:{port}{url.path.rstrip('/')}", bucket.name, bucket.keys.prefix
