"""What a scrape reads: the instruments of all storages of the process, and the process's own figures."""

import logging
import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from platform import python_version

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..metrics import Metrics

logger = logging.getLogger(__name__)


class Exporter:
    """A collector with a registry of its own, so that it gets in nobody's way. Any thread may call.

    Nothing that is collected can make a scrape fail: what cannot be read is left out, and logged once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: list[Metrics] = []
        self._unreadable: set[Collector] = set()
        self._build_info = BuildInfo()
        #: The lag of ZEO's event loop, when there is one.
        self.loop: Collector | None = None
        #: What prometheus_client is to serve.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(self)

    def add(self, metrics: Metrics) -> None:
        """Export the instruments of one more storage."""
        with self._lock:
            self._storages.append(metrics)
        metrics.exporter = self

    def remove(self, metrics: Metrics) -> bool:
        """Export them no longer; returns whether there are others left."""
        metrics.exporter = None
        with self._lock:
            self._storages.remove(metrics)
            return bool(self._storages)

    def storages(self) -> list[tuple[str, Metrics]]:
        """All storages with the values of their label: no two have the same, or Prometheus would refuse them all."""
        with self._lock:
            storages = list(self._storages)
        labelled: dict[str, Metrics] = {}
        for metrics in storages:
            number, label = 1, metrics.name
            while label in labelled:
                number += 1
                label = f"{metrics.name}-{number}"
            labelled[label] = metrics
        return list(labelled.items())

    def describe(self) -> list[Metric]:
        """Nothing: a registry that is told nothing does not collect everything just to know the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All figures; those of one name together, as the format wants it."""
        families: dict[str, Metric] = {}
        for labels, collector in self._collectors():
            for metric in self._read(collector):
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):  # twice as many series, which nobody asks for
                        family.samples.append(sample._replace(labels={**labels, **sample.labels}))
        return families.values()

    def _collectors(self) -> Iterator[tuple[dict[str, str], Collector]]:
        yield {}, self._build_info
        if self.loop is not None:
            yield {}, self.loop
        for label, metrics in self.storages():
            for collector in (*metrics.instruments, *metrics.zeo):
                yield {"storage": label}, collector

    def _read(self, collector: Collector) -> list[Metric]:
        try:
            return list(collector.collect())
        except Exception:
            if collector not in self._unreadable:
                self._unreadable.add(collector)
                logger.exception("A metric cannot be read and is left out from now on, as long as that is so")
            return []


class BuildInfo:
    """What the process runs."""

    def collect(self) -> Iterable[Metric]:
        """One series whose labels tell the versions."""
        packages = {"version": "zodb-s3blobs", "zeo": "ZEO", "zodb": "ZODB", "boto3": "boto3"}
        family = GaugeMetricFamily(
            "s3blobs_build_info", "The versions of what runs; always 1.", labels=[*packages, "python"]
        )
        family.add_metric([*map(metadata.version, packages.values()), python_version()], 1)
        yield family
