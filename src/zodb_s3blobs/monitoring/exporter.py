"""What a scrape reads: the instruments of all storages of the process, and the process's own figures."""

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
    """A storage, as scrapes and probes see it.

    ``name``: the value of the label ``storage``. A storage inside a wrapper such as zlibstorage learns it only when
    ZEO serves the wrapper.
    """

    name: str
    metrics: Metrics = field(default_factory=Metrics)
    #: ZEO's own figures of the storage.
    zeo: list[Collector] = field(default_factory=list)
    #: Returns why the storage cannot be used, or None if it can.
    trouble: Callable[[], str | None] = lambda: "it is still being opened"
    #: The exporter that reads it, if any does.
    exporter: "Exporter | None" = None


class Exporter:
    """A collector with a registry of its own, so that it gets in nobody's way. Any thread may call.

    Nothing that is collected can make a scrape fail: what cannot be read is left out, and logged once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: list[Exported] = []
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

    def add(self, exported: Exported) -> None:
        """Export the figures of one more storage."""
        with self._lock:
            self._storages.append(exported)
        exported.exporter = self

    def remove(self, exported: Exported) -> bool:
        """Export the figures of a storage no longer; return whether there are others left."""
        exported.exporter = None
        with self._lock:
            self._storages.remove(exported)
            return bool(self._storages)

    def storages(self) -> list[tuple[str, Exported]]:
        """All storages with the values of their label: no two have the same, or Prometheus would refuse them all."""
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
        for label, exported in self.storages():
            for collector in (*exported.metrics.instruments, *exported.zeo):
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
