"""The exporter for scrapes: the instruments of all storages of the process, and the process's own metrics."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from platform import python_version

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Exported:
    """The part of a storage that scrapes and health checks read.

    ``name``: the value of the label ``storage``; inside a wrapper such as zlibstorage, it is set only when ZEO serves
    the wrapper.
    """

    name: str
    metrics: Metrics = field(default_factory=Metrics)
    #: The collectors of ZEO's own statistics for the storage.
    zeo: list[Collector] = field(default_factory=list)
    #: Returns the reason why the storage is not ready, or None if it is ready.
    trouble: Callable[[], str | None] = lambda: "it is still being opened"
    #: The exporter that this storage has joined, if any.
    exporter: "Exporter | None" = None


class Exporter:
    """A collector with a registry of its own, separate from an application's. Any thread may call.

    No collector can make a scrape fail: a metric that cannot be read is left out, and logged once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: list[Exported] = []
        self._unreadable: set[Collector] = set()
        self._build_info = BuildInfo()
        #: The lag of ZEO's event loop, when there is one.
        self.loop: Collector | None = None
        #: The registry for prometheus_client's handler.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(self)

    def add(self, exported: Exported) -> None:
        """Export the metrics of one more storage."""
        with self._lock:
            self._storages.append(exported)
        exported.exporter = self

    def remove(self, exported: Exported) -> bool:
        """Stop exporting the metrics of a storage; return whether others are left."""
        exported.exporter = None
        with self._lock:
            self._storages.remove(exported)
            return bool(self._storages)

    def storages(self) -> list[tuple[str, Exported]]:
        """Return all storages with unique values of their label: Prometheus rejects a scrape with duplicates."""
        with self._lock:
            storages = list(self._storages)
        labelled: dict[str, Exported] = {}
        for exported in storages:
            number, label = 1, exported.name
            while label in labelled:
                number += 1
                label = f"{exported.name}-{number}"
            labelled[label] = exported
        return list(labelled.items())

    def describe(self) -> list[Metric]:
        """Return no metrics, so that the registry does not collect all of them just to know their names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return all metrics, with the samples of one name together, as the format demands."""
        families: dict[str, Metric] = {}
        for labels, collector in self._collectors():
            for metric in self._read(collector):
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):  # unused, and would double the number of series
                        family.samples.append(sample._replace(labels={**labels, **sample.labels}))
        return families.values()

    def _collectors(self) -> Iterator[tuple[dict[str, str], Collector]]:
        yield {}, self._build_info
        if self.loop is not None:
            yield {}, self.loop
        for label, exported in self.storages():
            for collector in (*exported.metrics.instruments, *exported.zeo):
                yield {"storage": label}, collector

    def _read(self, collector: Collector) -> list[Metric]:
        try:
            return list(collector.collect())
        except Exception:
            if collector not in self._unreadable:
                self._unreadable.add(collector)
                logger.exception("A metric cannot be read: scrapes leave it out until it can")
            return []


class BuildInfo:
    """The collector of the installed versions."""

    def collect(self) -> Iterable[Metric]:
        """Yield one series whose labels are the versions."""
        packages = {"version": "zodb-s3blobs", "zeo": "ZEO", "zodb": "ZODB", "boto3": "boto3"}
        family = GaugeMetricFamily(
            "s3blobs_build_info", "The versions of what runs; always 1.", labels=[*packages, "python"]
        )
        family.add_metric([*map(metadata.version, packages.values()), python_version()], 1)
        yield family
