"""A real Prometheus scrapes a real runzeo to which everything has happened: what is asked of it has an answer."""

import math
import os
import re
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
from ZODB.blob import Blob, FilesystemHelper
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, StorageError

from tests.support.alert_rules import GRAFANA, alert_expressions
from tests.support.dashboard_queries import dashboard_expressions
from tests.support.prometheus_server import PrometheusServer, program
from tests.support.speed import slow
from tests.support.zeo_clients import (
    blob,
    cached_path,
    commit_blob,
    commit_object,
    name_of,
    store_blob,
    wait_for,
    write,
)
from tests.support.zeo_server import ZEOServer
from zodb_s3blobs.s3.keys import Keys

pytestmark = slow

ROOT = Path(__file__).parents[2]
KB, MB, DAY = 1 << 10, 1 << 20, 24 * 3600
#: A few scrapes. Grafana would make it a minute at least, of a server that is scraped as seldom as usual.
RATE_INTERVAL = "15s"
#: No test can have the disk fail on every system.
NEVER = {"s3blobs_cache_errors_total"}
NAME = r"\b(?:s3blobs|zeo)_\w*[a-z]\b"


class Load:
    """Everything that can happen to a server whose metrics tell of it. `run` does it all; each step is one thing."""

    def __init__(self, s3, bucket, server, prometheus, blob_dir):
        self.s3, self.bucket, self.server, self.prometheus = s3, bucket, server, prometheus
        self.blob_dir = blob_dir
        self.db = server.db()
        self.client = server.client()
        self.background = ThreadPoolExecutor(5).submit

    def run(self):
        name = self.hits_and_misses()
        self.readers_that_join(name)
        self.a_damaged_file()
        self.evictions()
        self.damaged_and_missing_blobs(name)
        self.an_undo_and_a_conflict()
        self.a_retry_after_a_conflict()
        self.an_overtaken_reservation()
        self.failed_votes()
        self.retries()
        self.a_failed_cleanup()
        self.a_queue_for_the_lock()
        self.garbage_collections()
        self.a_link()
        self.db.close()

    def misbehave(self, operation, **fault):
        self.s3.misbehave(operation=operation, **fault)

    def cold(self, oid, tid):
        """A reader that finds the blob neither with itself nor in the server's cache."""
        cached_path(self.server, oid, tid).unlink(missing_ok=True)
        return self.server.client()

    def hits_and_misses(self):
        name = commit_blob(self.client, os.urandom(20 * KB))
        blob(self.server.client(), *name)
        blob(self.cold(*name), *name)
        return name

    def a_damaged_file(self):
        oid, tid = commit_blob(self.client, os.urandom(20 * KB))
        cached = cached_path(self.server, oid, tid)
        wait_for(cached.exists)
        os.truncate(cached, KB)
        blob(self.server.client(), oid, tid)

    def readers_that_join(self, name):
        self.misbehave("GetObject", hang=True)
        readers = [self.cold(*name), self.server.client()]
        answers = [self.background(blob, reader, *name) for reader in readers]
        self.prometheus.wait_for("s3blobs_download_waits_total > 0")
        self.s3.behave()
        for answer in answers:
            answer.result(60)

    def evictions(self):
        for _ in range(2):  # staged, and in parts
            commit_blob(self.client, os.urandom(5 * MB))
            commit_blob(self.client, os.urandom(9 * MB))

    def damaged_and_missing_blobs(self, name):
        self.misbehave("GetObject", flip=True, times=1)
        data = blob(self.cold(*name), *name)
        self.s3.client.put_object(Bucket=self.bucket, Key=Keys("1").key(*name), Body=data)  # as another tool does
        blob(self.cold(*name), *name)
        self.s3.client.delete_object(Bucket=self.bucket, Key=Keys("1").key(*name))
        with pytest.raises(POSKeyError):
            blob(self.cold(*name), *name)
        self.blob_dir.createPathForOID(name[0])
        path = Path(self.blob_dir.getBlobFilename(*name))
        path.symlink_to(path)
        with pytest.raises(StorageError):
            blob(self.cold(*name), *name)
        path.unlink()
        path.write_bytes(b"as it was before the move")
        assert blob(self.cold(*name), *name) == b"as it was before the move"

    def an_undo_and_a_conflict(self):
        write(self.db, "blob", b"one")
        write(self.db, "blob", b"two")
        self.undo()
        managers = transaction.TransactionManager(), transaction.TransactionManager()
        for manager in managers:
            with self.db.open(manager).root()["blob"].open("w") as file:
                file.write(b"three")
        managers[0].commit()
        with pytest.raises(ConflictError):
            managers[1].commit()
        for manager in managers:
            manager.abort()

    def a_retry_after_a_conflict(self):
        """Both add to the same object: that shows under the lock, when the blobs of both are in the bucket."""
        managers = transaction.TransactionManager(), transaction.TransactionManager()
        roots = [self.db.open(manager).root() for manager in managers]
        for number, root in enumerate(roots):
            root[f"new {number}"] = Blob(b"%d" % number * 1024 * KB)
        managers[0].commit()
        with pytest.raises(ConflictError):
            managers[1].commit()
        managers[1].abort()
        roots[1]["new 1"] = Blob(b"1" * 1024 * KB)
        managers[1].commit()
        for manager in managers:
            manager.abort()

    def an_overtaken_reservation(self):
        """Others commit while an upload hangs; when it has ended, its transaction commits with a later tid."""
        others = self.server.client()
        self.misbehave("PutObject", hang=True)
        self.s3.forget()
        first = self.background(commit_blob, self.client)
        self.s3.wait_for("PutObject")
        wait_for(lambda: commit_object(others) and self.prometheus.query("s3blobs_reservations_overtaken_total > 0"))
        self.s3.behave()
        first.result(60)

    def undo(self):
        """Undo the last transaction."""
        self.db.undo(self.db.undoLog(0, 1)[0]["id"])
        transaction.commit()

    def failed_votes(self):
        for operation, size, status, code in (
            ("PutObject", 100, 403, "AccessDenied"),
            ("PutObject", 5 * MB, 403, "AccessDenied"),  # staged
            ("UploadPart", 9 * MB, 403, "AccessDenied"),
            ("PutObject", 100, 500, "InternalError"),
            ("PutObject", 100, 503, "SlowDown"),
        ):
            self.misbehave(operation, status=status, code=code)
            with pytest.raises(StorageError):
                commit_blob(self.client, os.urandom(size))
            self.s3.behave()

    def retries(self):
        self.misbehave("PutObject", status=503, code="SlowDown", times=1)
        commit_blob(self.client)
        self.misbehave("PutObject", lose=True, times=1)
        commit_blob(self.client)

    def a_failed_cleanup(self):
        self.misbehave("DeleteObject", status=403, code="AccessDenied")
        txn = TransactionMetaData()
        self.client.tpc_begin(txn)
        store_blob(self.client, self.client.new_oid(), b"data", txn)
        self.client.tpc_vote(txn)
        self.client.tpc_abort(txn)
        self.prometheus.wait_for("s3blobs_cleanup_failures_total > 0")
        self.s3.behave()

    def a_queue_for_the_lock(self):
        """An undo waits for S3 while it holds the lock."""
        write(self.db, "blob", b"four")
        self.misbehave("CopyObject", hang=True)
        self.s3.forget()
        first = self.background(self.undo)
        self.s3.wait_for("CopyObject")
        second = self.background(commit_object, self.server.client())
        self.prometheus.wait_for("zeo_commit_lock_waiting > 0 and zeo_commit_lock_held_since_timestamp_seconds > 0")
        self.s3.behave()
        first.result(60)
        second.result(60)

    def garbage_collections(self):
        dead = [f"1/blobs/{number:x}/1.blob" for number in range(0x1000, 0x1020)]
        self.s3.put(self.bucket, [*dead, "1/blobs/no blob"])
        self.misbehave("DeleteObjects", status=403, code="AccessDenied")
        with pytest.raises(StorageError):
            self.db.pack()
        self.s3.behave()
        self.db.pack()

    def a_link(self):
        write(self.db, "linked", b"data")
        with self.db.transaction() as connection:
            assert self.db.storage._call("presigned_url", *name_of(connection.root()["linked"])) is not None


@pytest.fixture(scope="module")
def observed(running_s3, tmp_path_factory):
    """What is left when everything has happened: the Prometheus, a scrape, and when it began."""
    program("prometheus")
    running_s3.behave()
    running_s3.forget()
    bucket = running_s3.bucket(f"prometheus-{uuid.uuid4().hex}")
    blob_dir = FilesystemHelper(str(tmp_path_factory.mktemp("site") / "blobs"), "bushy")
    blob_dir.create()
    options = {"cache_size": "10MB", "s3_max_attempts": 2, "fallback_blob_dir": blob_dir.base_dir}
    options |= {"presigned_urls": "1h"}
    with ZEOServer(tmp_path_factory.mktemp("zeo"), running_s3, bucket, options=options, metrics=True) as server:
        # Each of these groups would wait a minute for its first turn.
        rules = (GRAFANA / "alerts.yml").read_text().replace("interval: 1m", "interval: 1s")
        arguments = [server.metrics_address], rules, long_ago(server.metrics_address)
        with PrometheusServer(tmp_path_factory.mktemp("prometheus"), *arguments) as prometheus:
            prometheus.wait_for("rate(s3blobs_s3_attempts_total[15s])")  # two scrapes before the first step
            [(_, began)] = prometheus.query("time()")
            try:
                Load(running_s3, bucket, server, prometheus, blob_dir).run()
            finally:
                running_s3.behave()
            prometheus.wait_for_scrape()
            yield SimpleNamespace(prometheus=prometheus, figures=server.metrics(), began=began)


def long_ago(address):
    """An old figure of this server, for the one alert that compares with last week."""
    labels = 'job="zeo",instance="{}:{}",storage="1"'.format(*address)
    return (
        "# TYPE s3blobs_gc_last_success_timestamp_seconds gauge\n"
        f"s3blobs_gc_last_success_timestamp_seconds{{{labels}}} 0 {time.time() - 9.5 * DAY}\n"
        "# EOF\n"
    )


@pytest.fixture
def prometheus(observed):
    return observed.prometheus


@pytest.fixture
def exported(observed):
    """The names of our metrics in a scrape; those of histograms as Prometheus has them, and as they are documented."""
    names = {name for name in observed.figures.names() if re.fullmatch(NAME, name)}
    return names, {re.sub("_(bucket|sum|count)$", "", name) for name in names}


# The scrape


def test_the_target_is_up_and_no_scrape_failed(observed):
    [target] = observed.prometheus.api("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert observed.prometheus.query("min(scrape_samples_scraped) > 300")


def test_promtool_has_no_objection_to_the_metrics(observed):
    arguments = [program("promtool"), "check", "metrics"]
    checked = subprocess.run(arguments, input=observed.figures.text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_scrape_tells_no_secret(observed):
    assert "test-secret" not in observed.figures.text


def test_every_counter_has_counted(observed):
    sums = {}
    for sample in observed.figures.samples:
        if re.fullmatch(NAME, sample.name) and sample.name.endswith(("_total", "_count")):
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    assert {name for name, value in sums.items() if not value} == NEVER


def test_what_is_over_is_no_longer_under_way(prometheus):
    for name in (
        "s3blobs_s3_inflight_operations",
        "s3blobs_staged_blobs",
        "s3blobs_staged_bytes",
        "s3blobs_cache_pinned_bytes",
        "s3blobs_gc_running",
        "zeo_active_transactions",
        "zeo_commit_lock_waiting",
        "zeo_commit_lock_held_since_timestamp_seconds",
    ):
        prometheus.wait_for(f"sum({name}) == 0")


@pytest.mark.parametrize(
    "truth",
    [
        "count(s3blobs_s3_operations_total == s3blobs_s3_operation_duration_seconds_count) == 11",
        "count(s3blobs_s3_operations_total <= s3blobs_s3_attempts_total) == 11",
        "sum(s3blobs_s3_operation_failures_total) <= sum(s3blobs_s3_attempt_failures_total)",
        "s3blobs_cache_requests_total == sum without (result) (s3blobs_load_duration_seconds_count)",
        's3blobs_cache_hits_total == ignoring (result) s3blobs_load_duration_seconds_count{result="hit"}',
        "s3blobs_upload_duration_seconds_count == s3blobs_upload_size_bytes_count",
        "s3blobs_download_duration_seconds_count == s3blobs_download_size_bytes_count",
        "s3blobs_transactions_voted_total == s3blobs_vote_duration_seconds_count",
        "s3blobs_reservations_overtaken_total <= s3blobs_reservations_total",
        "sum without (reason) (s3blobs_commit_lock_waits_total) <= s3blobs_commit_lock_held_duration_seconds_count",
        "s3blobs_cache_size_bytes <= s3blobs_cache_limit_bytes",
        "s3blobs_bucket_up == 1",
        's3blobs_gc_objects{state="unknown"} == 1',
        "abs(time() - s3blobs_gc_last_success_timestamp_seconds) < 600",
        "abs(time() - s3blobs_upload_last_success_timestamp_seconds) < 600",
        "abs(time() - s3blobs_cache_oldest_access_timestamp_seconds) < 600",
        "abs(time() - zeo_last_transaction_timestamp_seconds) < 600",
    ],
)
def test_figures_agree(prometheus, truth):
    prometheus.wait_for(truth, timeout=10)


# The dashboard


def test_every_query_of_the_dashboard_has_an_answer(observed):
    [(_, now)] = observed.prometheus.query("time()")
    silent = {}
    for where, expression in dashboard_expressions(RATE_INTERVAL):
        # A step beyond now, for what the last scrape brought.
        found = observed.prometheus.query_range(expression, observed.began, now + 1)
        if not any(math.isfinite(value) for _, values in found for value in values):
            silent[where] = expression
    assert silent == {}


def test_every_selector_of_dashboard_and_alerts_finds_series(prometheus):
    """Also those that another operand of the expression would hide."""
    expressions = [text for _, text in [*dashboard_expressions(RATE_INTERVAL), *alert_expressions()]]
    found = {found[0] for text in expressions for found in re.finditer(r"\b(?:\w+_\w+|up)\{[^}]*\}|" + NAME, text)}
    assert len(found) > 80
    assert {selector for selector in found if not prometheus.query(selector)} == set()


# The alerts


def test_prometheus_evaluates_all_rules(prometheus):
    def rules():
        return [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]

    wait_for(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert sorted(rule["name"] for rule in rules()) == sorted(name for name, _ in alert_expressions())
    assert [rule for rule in rules() if rule["health"] != "ok" or rule.get("lastError")] == []
    texts = [text for alert in prometheus.api("alerts")["alerts"] for text in alert["annotations"].values()]
    assert [text for text in texts if "error" in text and "template" in text] == []


def test_what_an_alert_compares_is_there(prometheus):
    """Each part of its expression: with `bool`, a comparison says 0 or 1 of every series instead of dropping some."""
    parts = [(name, part) for name, text in alert_expressions() for part in re.split(r"\bor\b", text)]
    silent = []
    for name, part in parts:
        assert part.count("(") == part.count(")"), "the test cannot take this one apart"
        compared = re.sub(r'"[^"]*"|\{[^}]*\}|==|!=|>=|<=|>|<', keep_all, part).strip()
        if not compared.startswith("absent(") and not prometheus.query(compared):
            silent.append((name, compared))
    assert silent == []


def keep_all(found):
    return found[0] if found[0][0] in '"{' else f"{found[0]} bool"


def test_what_has_happened_fires_at_once(prometheus):
    """And nothing else does: the others wait until it has gone on for a while."""
    expected = {
        "S3BlobsBlobMissing",
        "S3BlobsChecksumFailure",
        "S3BlobsCleanupFailures",
        "S3BlobsFallbackFails",
        "S3BlobsGCFailing",
        "S3BlobsS3AuthFailures",
        "S3BlobsVoteFailures",
    }

    def firing():
        return {labels["alertname"] for labels, _ in prometheus.query('ALERTS{alertstate="firing"}')}

    wait_for(lambda: firing() >= expected)
    assert firing() == expected


# The documentation


def documented():
    """The metrics in the table of grafana/README.md."""
    return set(re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "grafana" / "README.md").read_text()))


def test_every_metric_is_in_the_reference_and_the_reference_names_no_other(exported):
    _, families = exported
    assert {name for name in documented() if re.fullmatch(NAME, name)} == families


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "zeo-configs/README.md",
        "zeo-configs/OPERATIONS.md",
        "grafana/README.md",
        "grafana/alerts.yml",
        "grafana/zodb-s3blobs.json",
    ],
)
def test_every_metric_that_is_named_is_exported(exported, path):
    names, families = exported
    assert set(re.findall(NAME, (ROOT / path).read_text())) <= names | families
