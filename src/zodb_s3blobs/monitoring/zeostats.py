"""ZEO's own statistics, read from its server during a scrape, and the lag of its event loop.

The attributes that are read are private to ZEO. None is changed, and a scrape leaves out those that a future ZEO lacks.
"""

import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import z64

from ..metrics import LATENCIES
from .exporter import Exported

#: Seconds between two probes of the event loop.
_PROBE_EVERY = 1.0


def attach(server: Any, name: str, exported: Exported) -> None:
    """Add ZEO's statistics to ``exported``, a storage that ZEO's ``server`` serves as ``name`` from now on."""
    exported.name = name
    exported.zeo = _readings(server, name)
    if exported.exporter is not None:
        loop = event_loop_of(server)
        if loop is not None and getattr(exported.exporter.loop, "loop", None) is not loop:
            exported.exporter.loop = LoopLag(loop)


def event_loop_of(server: Any) -> AbstractEventLoop | None:
    """Return the event loop of ZEO's ``server``; None after its end, or if its acceptor is none of ZEO's own."""
    return getattr(server.acceptor, "event_loop", None)


class Reading:
    """A Prometheus collector of one value: a scrape calls ``read``."""

    def __init__(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        documentation: str,
        read: Callable[[], float],
    ) -> None:
        self._make = lambda: kind(name, documentation, value=float(read()))

    def collect(self) -> Iterable[Metric]:
        """Yield the metric with its present value."""
        yield self._make()


def _readings(server: Any, name: str) -> list[Collector]:
    # Looked up during each scrape: ZEO creates its statistics after it has registered the storage.
    def stats() -> Any:
        return server.stats[name]

    def last_transaction() -> float:
        tid = server.storages[name].lastTransaction()
        return TimeStamp(tid).timeTime() if tid != z64 else 0

    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    return [
        Reading(gauge, "zeo_connections", "Clients that are connected.", lambda: len(stats().connections)),
        Reading(counter, "zeo_loads_total", "Objects that were loaded; blobs do not count.", lambda: stats().loads),
        Reading(counter, "zeo_stores_total", "Objects that were stored; blobs do not count.", lambda: stats().stores),
        Reading(counter, "zeo_commits_total", "Transactions that were committed.", lambda: stats().commits),
        Reading(
            counter,
            "zeo_aborts_total",
            "Transactions that were aborted; failed votes mostly do not count.",
            lambda: stats().aborts,
        ),
        Reading(counter, "zeo_conflicts_total", "Votes that failed for a conflict.", lambda: stats().conflicts),
        Reading(
            gauge, "zeo_active_transactions", "Transactions that have begun and not ended.", lambda: stats().active_txns
        ),
        Reading(
            gauge,
            "zeo_commit_lock_held_since_timestamp_seconds",
            "When the commit lock was taken; 0 while it is free.",
            lambda: stats().lock_time or 0,
        ),
        Reading(
            gauge,
            "zeo_commit_lock_waiting",
            "Transactions that wait for the commit lock.",
            lambda: len(server.lock_managers[name].waiting),
        ),
        Reading(
            gauge,
            "zeo_last_transaction_timestamp_seconds",
            "When the last transaction was committed; 0 if none.",
            last_transaction,
        ),
    ]


class LoopLag:
    """A Prometheus collector of the delay until ZEO's event loop ``loop`` runs a task that was handed to it.

    A thread hands over a task once a second, and ends with the loop.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._since = 0.0
        self._answered = threading.Event()
        self._lag = Histogram(
            "zeo_event_loop_lag_seconds",
            "How long the event loop took to come to a task that was handed to it.",
            buckets=LATENCIES,
            registry=None,
        )
        threading.Thread(target=self._ask, name="s3blobs event loop probe", daemon=True).start()

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram of delays, and the time since which a task waits."""
        yield from self._lag.collect()
        yield GaugeMetricFamily(
            "zeo_event_loop_blocked_since_timestamp_seconds",
            "When a task was handed to the event loop that it has not come to yet; 0 if there is none.",
            value=self._since,
        )

    def _ask(self) -> None:
        while True:
            self._answered.clear()
            self._since = time.time()
            try:
                self.loop.call_soon_threadsafe(self._answer, time.monotonic())
            except RuntimeError:  # the loop has been closed
                break
            while not self._answered.wait(_PROBE_EVERY):
                if self.loop.is_closed():
                    break
            time.sleep(_PROBE_EVERY)
        self._since = 0.0

    def _answer(self, asked: float) -> None:
        # Runs on the event loop.
        self._lag.observe(time.monotonic() - asked)
        self._since = 0.0
        self._answered.set()
