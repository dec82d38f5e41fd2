"""Looks at a running server: the figures of one scrape, and those of earlier calls, which a file keeps."""

import contextlib
import json
import math
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ...errors import S3BlobsError

#: How long, in seconds, to wait for the server.
_TIMEOUT = 10.0

#: The most bytes of an answer that are read.
_MOST = 64 << 20

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0

#: Age in seconds up to which looks are kept -> the seconds between two of them: as many as the longest rule needs.
_SPACING = {30 * _MINUTE: 30.0, 7 * _HOUR: 10 * _MINUTE, 11 * _DAY: 12 * _HOUR}

Labels = frozenset[tuple[str, str]]


class NoAnswer(S3BlobsError):
    """The server does not answer; the message says where, and why."""


class StateError(S3BlobsError):
    """The state file cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class Look:
    """The figures at ``time``, in seconds since 1970: name of a series -> its labels -> its value.

    ``troubles``: storage -> the reason why it is not ready.
    """

    time: float
    series: dict[str, dict[Labels, float]]
    troubles: dict[str, str] = field(default_factory=dict)

    def storages(self) -> list[str]:
        """Return the values of the label ``storage``."""
        return sorted({v for found in self.series.values() for labels in found for n, v in labels if n == "storage"})

    def select(self, name: str, wanted: Labels) -> dict[Labels, float]:
        """Return the series ``name`` that have all ``wanted`` labels."""
        return {labels: value for labels, value in self.series.get(name, {}).items() if wanted <= labels}

    def label(self, name: str, label: str, wanted: Labels = frozenset()) -> str:
        """Return the value of ``label`` of the series ``name``, "" without one."""
        return next((dict(labels).get(label, "") for labels in self.select(name, wanted)), "")

    def at_start(self) -> "Look":
        """Return the look at the start of the server, when all counters were 0; of now if the start is unknown."""
        started = sum(self.select("process_start_time_seconds", frozenset()).values())
        return Look(
            min(started or self.time, self.time),
            {name: dict.fromkeys(found, 0.0) for name, found in self.series.items()},
        )


def look_at(address: str) -> Look:
    """Return the figures of the server whose metrics are at ``address``, as host:port. Raises NoAnswer."""
    try:
        series = _series(_get(address, "/metrics"))
        troubles = {}
        for line in _get(address, "/-/ready").splitlines():
            storage, separator, trouble = line.removeprefix("Storage ").partition(": ")
            if line.startswith("Storage ") and separator:
                troubles[storage] = trouble.rstrip(".")
    except OSError as error:
        cause = getattr(error, "reason", error)  # of a URLError
        reason = getattr(cause, "strerror", None) or cause
        raise NoAnswer(f"the server does not answer at metrics-address {address}: {reason}") from None
    return Look(time.time(), series, troubles)


def _series(text: str) -> dict[str, dict[Labels, float]]:
    """Return the series in ``text``, the answer of a metrics endpoint. Raises OSError if it is not one of ours."""
    series: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series[sample.name][frozenset(sample.labels.items())] = sample.value
    except ValueError:  # a web page
        series.clear()  # or the first part of an answer: what an alert needs may be in the other
    if not series.keys() >= {"s3blobs_build_info", "s3blobs_bucket_up"}:
        raise OSError("another server answers there, without metrics of zodb-s3blobs")
    return dict(series)


def _get(address: str, path: str) -> str:
    # Without proxies: those of the environment are for the way to S3.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=_TIMEOUT) as answer:
            return _text(answer)
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        with error:
            return _text(error)  # the reasons why it is not ready
    except (HTTPException, ValueError) as error:  # ValueError: bytes that are no text
        raise OSError(f"its answer cannot be read ({type(error).__name__})") from None


def _text(answer: Any) -> str:
    """Return the body of ``answer``. Raises OSError if it was cut off, and ValueError if it is no text."""
    body = answer.read(_MOST)
    length = answer.headers.get("Content-Length")
    if length is not None and length != str(len(body)):
        raise OSError("its answer was cut off")
    return body.decode()


class View:
    """The figures of one ``storage``, or of the server if that is None, at the last of ``looks``, the oldest first."""

    def __init__(self, looks: Sequence[Look], storage: str | None = None) -> None:
        self.looks = looks
        self.last = looks[-1]
        self.time = self.last.time
        self._labels: Labels = frozenset() if storage is None else frozenset({("storage", storage)})

    def has(self, name: str) -> bool:
        """Return whether the last look has the series ``name``."""
        return bool(self.last.select(name, self._labels))

    def now(self, name: str, **labels: str) -> float:
        """Return the sum of the series ``name`` with these ``labels``, 0 without one."""
        return sum(self.last.select(name, self._labels | labels.items()).values())

    def label(self, name: str, label: str) -> str:
        """Return the value of ``label`` of the series ``name``, "" without one."""
        return self.last.label(name, label, self._labels)

    def values_of(self, name: str, label: str) -> list[str]:
        """Return the values of ``label`` of the series ``name``."""
        return sorted({dict(labels).get(label, "") for labels in self.last.select(name, self._labels)})

    def most(self, name: str, seconds: float) -> float:
        """Return the largest value of the series ``name`` in the last ``seconds``."""
        looks = [look for look in self.looks if look.time >= self.time - seconds]
        return max(sum(look.select(name, self._labels).values()) for look in looks)

    def is_known_since(self, name: str, seconds: float) -> bool:
        """Return whether a look of at least ``seconds`` ago has the series ``name``."""
        return any(look.time <= self.time - seconds and look.select(name, self._labels) for look in self.looks)

    def counted(self, name: str, seconds: float = math.inf, /, **labels: str) -> float:
        """Return by how much the counters ``name`` have grown since the look of ``seconds`` ago, or the oldest one."""
        wanted = self._labels | labels.items()
        total = 0.0
        looks = self._since(seconds)
        for before, after in pairwise(looks):
            old = before.select(name, wanted)
            for key, value in after.select(name, wanted).items():
                begun = old.get(key, 0.0)
                total += value - begun if value >= begun else value  # less: the server was restarted
        return total

    def increase(self, name: str, seconds: float, /, **labels: str) -> float:
        """Return the mean growth of the counters ``name`` in ``seconds``, since the look of so long ago.

        0 if it is unknown since when they have grown, as where the system does not tell the start of the server.
        """
        span = self.time - self._since(seconds)[0].time
        if not span:
            return 0.0
        return self.counted(name, seconds, **labels) * (seconds / span if span > seconds else 1)

    def quantile(self, share: float, name: str) -> float | None:
        """Return the ``share`` quantile of the histogram ``name`` since the oldest look, as Prometheus estimates it.

        None if nothing was observed.
        """
        bounds: dict[float, str] = {float(text): text for text in self.values_of(f"{name}_bucket", "le") if text}
        counts = [(bound, self.counted(f"{name}_bucket", le=bounds[bound])) for bound in sorted(bounds)]
        if not counts or not counts[-1][1]:
            return None
        rank, below, lower = share * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= rank:
                if math.isinf(bound):
                    return lower
                return lower + (bound - lower) * (rank - below) / (count - below) if count > below else lower
            below, lower = count, bound
        return lower

    def _since(self, seconds: float) -> Sequence[Look]:
        """Return the looks from the last one that is at least ``seconds`` old, or from the first one."""
        old = [number for number, look in enumerate(self.looks) if look.time <= self.time - seconds]
        return self.looks[old[-1] if old else 0 :]


class History:
    """The looks of earlier calls at the server at ``address``, the oldest first, in the file ``path``.

    Few are kept: the older, the fewer. Not for several processes at once: the last one to save wins.
    """

    def __init__(self, path: str, address: str) -> None:
        self._path = path
        self._address = address
        self.looks: list[Look] = []

    @classmethod
    def load(cls, path: str, address: str) -> "History":
        """Return the history in the file ``path``, an empty one if there is no file. Raises StateError."""
        history = cls(path, address)
        try:
            with open(path, encoding="utf-8") as file:
                kept = json.load(file)
            history.looks = list(_unpacked(kept))
            of = kept["address"]
        except FileNotFoundError:
            return history
        except OSError as error:
            raise StateError(f"the state file {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StateError(
                f"{path} is not a state file of zodb-s3blobs status: name another file with --state, or delete it"
            ) from None
        if of != address:
            raise StateError(f"the state file {path} is of the server at {of}: name another file for {address}")
        return history

    def add(self, look: Look) -> None:
        """Add the last look, and drop those that no rule needs."""
        kept: list[Look] = []
        for one in self.looks:
            spacing = next((apart for age, apart in _SPACING.items() if look.time - one.time <= age), None)
            if spacing is not None and one.time < look.time and (not kept or one.time - kept[-1].time >= spacing):
                kept.append(one)
        self.looks = [*kept, look]

    def save(self) -> None:
        """Write the file, whole or not at all. Raises StateError."""
        directory = os.path.dirname(os.path.abspath(self._path))
        try:
            fd, path = tempfile.mkstemp(prefix=f".{os.path.basename(self._path)}.", dir=directory)
            try:
                with open(fd, "w", encoding="utf-8") as file:
                    json.dump({"address": self._address, **_packed(self.looks)}, file, separators=(",", ":"))
                os.replace(path, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise
        except OSError as error:
            raise StateError(f"the state file {self._path} cannot be written: {error.strerror}") from None


def _packed(looks: Sequence[Look]) -> dict[str, list]:
    """Return ``looks`` for JSON: the names of the series once, and for each look its time and the values of all."""
    keys = sorted(
        {
            (name, tuple(sorted(labels)))
            for look in looks
            for name, found in look.series.items()
            if name.startswith(("s3blobs_", "zeo_")) and not name.endswith("_bucket")
            for labels in found
        }
    )
    rows = [[look.time, *(look.series.get(name, {}).get(frozenset(labels)) for name, labels in keys)] for look in looks]
    return {"series": [[name, dict(labels)] for name, labels in keys], "looks": rows}


def _unpacked(kept: dict[str, list]) -> Iterator[Look]:
    keys = [(str(name), frozenset(labels.items())) for name, labels in kept["series"]]
    for moment, *values in kept["looks"]:
        series: dict[str, dict[Labels, float]] = defaultdict(dict)
        for (name, labels), value in zip(keys, values, strict=True):
            if value is not None:
                series[name][labels] = float(value)
        yield Look(float(moment), dict(series))
