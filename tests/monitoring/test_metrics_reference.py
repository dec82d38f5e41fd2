"""The table of metrics in grafana/README.md is what is exported, word for word.

To renew it: ``python -m tests.monitoring.test_metrics_reference`` prints it.
"""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

from ZEO.monitor import StorageStats
from ZODB.utils import z64

from zodb_s3blobs.monitoring import zeostats
from zodb_s3blobs.monitoring.exporter import Exported, Exporter

README = Path(__file__).parents[2] / "grafana" / "README.md"


def reference():
    """The table, made from a scrape."""
    server = SimpleNamespace(
        stats={"1": StorageStats(connections=[])},
        lock_managers={"1": SimpleNamespace(waiting={})},
        storages={"1": SimpleNamespace(lastTransaction=lambda: z64)},
        acceptor=SimpleNamespace(event_loop=asyncio.new_event_loop()),
    )
    exporter, exported = Exporter(), Exported("1")
    exporter.add(exported)
    zeostats.attach(server, "1", exported)
    exported.metrics.storage_info.labels("bucket", "prefix", "endpoint").set(1)
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in exporter.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines.append(f"| `{name}` | {family.type} | {labels(family)} | {family.documentation} |")
    server.acceptor.event_loop.close()
    return "\n".join(lines) + "\n"


def labels(family):
    names = list(dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le"))
    return ", ".join(f"`{name}`" for name in names) or "none"


def test_the_reference_is_that_of_a_scrape():
    [table] = re.findall(r"(?ms)^\| metric \| type .*?\n(?!\|)", README.read_text())
    assert table.strip().splitlines() == reference().strip().splitlines()


if __name__ == "__main__":
    print(reference(), end="")
