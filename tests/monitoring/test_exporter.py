"""What a scrape of several storages looks like, and that nothing can make it fail."""

import logging
import subprocess
import sys
import threading
from importlib import metadata
from platform import python_version

import pytest
from prometheus_client import Gauge, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.support.promtool import promtool
from tests.support.speed import slow
from tests.support.zeo_server import Figures
from zodb_s3blobs.monitoring import exporter as exporter_module
from zodb_s3blobs.monitoring.exporter import Exported, Exporter
from zodb_s3blobs.monitoring.zeostats import Reading


@pytest.fixture
def exporter():
    return Exporter()


@pytest.fixture
def add(exporter):
    """Exports one more storage and returns it."""

    def add(name="1"):
        exported = Exported(name)
        exporter.add(exported)
        return exported

    return add


def scrape(exporter):
    return Figures(generate_latest(exporter.registry).decode())


def ours(figures):
    return {name for name in figures.names() if name.startswith("s3blobs_")} - {"s3blobs_build_info"}


def broken():
    raise RuntimeError("This figure cannot be read")


# What is exported


def test_every_series_of_a_storage_has_its_name_as_a_label(exporter, add):
    exported = add("one")
    exported.metrics.storage_info.labels("bucket", "prefix", "endpoint").set(1)
    exported.zeo = [Reading(GaugeMetricFamily, "zeo_something", "Something.", lambda: 7)]
    figures = scrape(exporter)
    of_storages = [
        sample
        for sample in figures.samples
        if sample.name.startswith(("s3blobs_", "zeo_")) and sample.name != "s3blobs_build_info"
    ]
    assert {sample.labels.get("storage") for sample in of_storages} == {"one"}
    assert figures("zeo_something", storage="one") == 7
    assert len({sample.name for sample in of_storages}) > 60


def test_what_belongs_to_no_storage_has_no_such_label(exporter, add):
    add()
    labels = [sample.labels for sample in scrape(exporter).samples if sample.name.startswith(("process_", "python_"))]
    assert labels
    assert not any("storage" in names for names in labels)


def test_values_and_other_labels_are_those_of_the_instruments(exporter, add):
    exported = add()
    exported.metrics.cache_hits.inc(3)
    exported.metrics.s3_attempt_failures.labels("put", "418").inc()
    exported.metrics.upload_duration.observe(0.3)
    figures = scrape(exporter)
    assert figures("s3blobs_cache_hits_total", storage="1") == 3
    assert figures("s3blobs_s3_attempt_failures_total", storage="1", operation="put", code="418") == 1
    assert figures("s3blobs_upload_duration_seconds_bucket", storage="1", le="0.5") == 1
    assert figures("s3blobs_upload_duration_seconds_bucket", storage="1", le="0.25") == 0
    assert figures("s3blobs_upload_duration_seconds_sum", storage="1") == 0.3


def test_a_name_that_becomes_known_later_is_the_label_from_then_on(exporter, add):
    exported = add()
    exported.name = "main"
    exported.metrics.cache_hits.inc()
    assert scrape(exporter)("s3blobs_cache_hits_total") == 1
    assert scrape(exporter)("s3blobs_cache_hits_total", storage="main") == 1


def test_a_label_with_special_characters_arrives_as_it_is(exporter, add):
    name = 'back\\slash "quoted" line\nbreak Ü'
    add(name)
    assert scrape(exporter)("s3blobs_bucket_up", storage=name) == 0


def test_storages_of_one_name_are_told_apart(exporter, add):
    # Prometheus refuses a whole scrape with a series that is in it twice.
    for number, name in enumerate(["1", "1", "1-2", "1", "1-2"]):
        add(name).metrics.cache_files.set(number)
    values = [
        (sample.labels["storage"], sample.value)
        for sample in scrape(exporter).samples
        if sample.name == "s3blobs_cache_files"
    ]
    assert len({label for label, _ in values}) == len(values) == 5
    assert dict(values)["1"] == 0
    assert sorted(value for _, value in values) == [0, 1, 2, 3, 4]


def test_no_created_series(exporter, add):
    exported = add()
    assert any(sample.name.endswith("_created") for sample in next(iter(exported.metrics.cache_hits.collect())).samples)
    assert not [name for name in scrape(exporter).names() if name.endswith("_created")]


def test_build_info_tells_what_runs(exporter):
    [sample] = [sample for sample in scrape(exporter).samples if sample.name == "s3blobs_build_info"]
    assert sample.value == 1
    assert sample.labels == {
        "version": metadata.version("zodb-s3blobs"),
        "zeo": metadata.version("ZEO"),
        "zodb": metadata.version("ZODB"),
        "boto3": metadata.version("boto3"),
        "python": python_version(),
    }


def test_the_process_is_exported_too(exporter):
    names = scrape(exporter).names()
    assert {"python_info", "python_gc_collections_total"} <= names
    if sys.platform == "linux":
        assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"} <= names


def test_a_storage_that_is_removed_is_exported_no_longer(exporter, add):
    one, two = add("one"), add("two")
    assert exporter.remove(one) is True
    assert {sample.labels.get("storage") for sample in scrape(exporter).samples} == {None, "two"}
    assert exporter.remove(two) is False
    assert not ours(scrape(exporter))


def test_two_exporters_are_independent(exporter, add):
    add()
    assert not ours(scrape(Exporter()))


# The formats


def test_the_families_of_one_name_come_together_with_one_help_and_one_type(exporter, add):
    add("one"), add("two")
    seen = []
    for line in scrape(exporter).text.splitlines():
        if line.startswith("# HELP "):
            seen.append(line.split()[2])
            types = 0
        elif line.startswith("# TYPE "):
            types += 1
            assert line.split()[2] == seen[-1]
        else:
            assert line.startswith(seen[-1])
            assert types == 1
    assert len(seen) == len(set(seen))
    assert all(len(scrape(exporter).names(storage=name)) > 60 for name in ("one", "two"))


@slow
def test_promtool_has_nothing_to_say_about_it(exporter, add):
    for name in "one", "two":
        exported = add(name)
        exported.metrics.storage_info.labels("bucket", "prefix", "endpoint").set(1)
        exported.zeo = [Reading(GaugeMetricFamily, "zeo_connections", "Clients.", lambda: 1)]
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=scrape(exporter).text, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_openmetrics_has_the_same_figures(exporter, add):
    for name in "one", "two":
        exported = add(name)
        exported.metrics.storage_info.labels("bucket", "prefix", "endpoint").set(1)
        exported.metrics.upload_duration.observe(2)
        exported.metrics.load_duration.labels("hit").observe(0.1)
    families = list(parse_openmetrics(openmetrics.generate_latest(exporter.registry).decode()))
    names = {sample.name for family in families for sample in family.samples}
    assert names == scrape(exporter).names()
    assert not any(name.endswith("_created") for name in names)


# Nothing makes a scrape fail


def test_what_cannot_be_read_is_left_out_and_the_rest_is_there(exporter, add):
    one, two = add("one"), add("two")
    for exported in one, two:
        exported.zeo = [
            Reading(GaugeMetricFamily, "zeo_first", "Something.", lambda: 1),
            Reading(GaugeMetricFamily, "zeo_second", "Something.", lambda: 2),
        ]
    whole = scrape(exporter)
    one.metrics.staged_bytes.set_function(broken)
    one.zeo[0] = Reading(GaugeMetricFamily, "zeo_first", "Something.", broken)
    left = scrape(exporter)
    assert whole.names(storage="one") - left.names(storage="one") == {"s3blobs_staged_bytes", "zeo_first"}
    assert left.names(storage="two") == whole.names(storage="two")
    assert left.names() == whole.names()


def test_a_figure_that_is_no_number_is_left_out(exporter, add):
    exported = add()
    exported.zeo = [Reading(GaugeMetricFamily, "zeo_first", "Something.", lambda: "many")]
    exported.metrics.staged_blobs.set_function(lambda: None)
    assert scrape(exporter).names() & {"zeo_first", "s3blobs_staged_blobs"} == set()
    assert scrape(exporter)("s3blobs_bucket_up", storage="1") == 0


def test_it_is_logged_once_for_each(exporter, add, caplog):
    exported = add()
    exported.metrics.staged_bytes.set_function(broken)
    exported.zeo = [Reading(GaugeMetricFamily, "zeo_first", "Something.", broken)]
    for _ in range(3):
        scrape(exporter)
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(records) == 2
    assert all("This figure cannot be read" in record.exc_text for record in records)


def test_it_is_exported_again_when_it_can_be_read_again(exporter, add):
    exported = add()
    exported.metrics.staged_bytes.set_function(broken)
    assert "s3blobs_staged_bytes" not in scrape(exporter).names()
    exported.metrics.staged_bytes.set_function(lambda: 5)
    assert scrape(exporter)("s3blobs_staged_bytes", storage="1") == 5


def test_versions_that_cannot_be_found_are_no_exception(exporter, add, monkeypatch, caplog):
    # Some pack everything into one file and leave out what tells the versions.
    def version(package):
        raise metadata.PackageNotFoundError(package)

    add()
    monkeypatch.setattr(exporter_module.metadata, "version", version)
    for _ in range(3):
        assert scrape(exporter)("s3blobs_bucket_up", storage="1") == 0
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


def test_a_loop_that_cannot_be_read_is_left_out(exporter, add):
    class Loop:
        def collect(self):
            yield Gauge("zeo_event_loop", "Something.", registry=None)
            broken()

    add()
    exporter.loop = Loop()
    assert scrape(exporter)("s3blobs_bucket_up", storage="1") == 0


def test_scrapes_while_storages_come_and_go_and_count(exporter, add):
    steady, end, failures = add("steady"), threading.Event(), []

    def repeat(function):
        try:
            while not end.wait(0.001):
                function()
        except Exception as error:
            failures.append(error)

    def come_and_go():
        exporter.remove(add("other"))

    def count():
        steady.metrics.cache_hits.inc()
        steady.metrics.s3_attempt_failures.labels("put", str(steady.metrics.cache_hits._value.get())).inc()
        steady.metrics.s3_attempt_failures.clear()

    threads = [threading.Thread(target=repeat, args=(function,)) for function in (come_and_go, come_and_go, count)]
    for thread in threads:
        thread.start()
    try:
        values = [scrape(exporter)("s3blobs_cache_hits_total", storage="steady") for _ in range(10)]
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert values == sorted(values)
    assert failures == []
