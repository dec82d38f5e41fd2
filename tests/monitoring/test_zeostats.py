"""ZEO's own figures: those of a stock runzeo with stock clients, and those of a server whose loop is held up."""

import asyncio
import contextlib
import functools
import threading
import time
from types import SimpleNamespace

import pytest
import transaction
import ZODB.config
import zope.event
from ZEO.StorageServer import Serving, StorageServer
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import ZERO, zodb_pickle
from ZODB.TimeStamp import TimeStamp

from tests.support.speed import slow_but
from tests.support.zeo_clients import commit_blob, commit_object, load, wait_for
from tests.support.zeo_server import SECTION, free_address, scrape
from zodb_s3blobs.monitoring import zeostats

FIGURES = {
    "zeo_connections",
    "zeo_loads_total",
    "zeo_stores_total",
    "zeo_commits_total",
    "zeo_aborts_total",
    "zeo_conflicts_total",
    "zeo_active_transactions",
    "zeo_commit_lock_held_since_timestamp_seconds",
    "zeo_commit_lock_waiting",
    "zeo_last_transaction_timestamp_seconds",
}


@pytest.fixture
def start(start):
    """As for all tests, with an endpoint."""
    return functools.partial(start, metrics=True)


@pytest.fixture
def server(start):
    return start()


def begin(client):
    """A transaction of ``client`` with an object in it."""
    txn = TransactionMetaData()
    client.tpc_begin(txn)
    client.store(client.new_oid(), ZERO, zodb_pickle(MinPO("x")), "", txn)
    return txn


def becomes(server, value, name, **labels):
    """Wait until a figure has a value: ZEO's clients do not wait for all that they ask of the server."""
    labels = {"storage": "1", **labels}
    wait_for(lambda: server.metrics()(name, **labels) == value)


# What clients do


def test_all_figures_are_there_before_the_first_client(server):
    figures = server.metrics()
    assert {name: figures(name, storage="1") for name in FIGURES} == dict.fromkeys(FIGURES, 0)


def test_connections(server):
    first, _ = server.client(), server.client()
    becomes(server, 2, "zeo_connections")
    first.close()
    becomes(server, 1, "zeo_connections")


def test_loads(server):
    client = server.client()
    before = server.metrics()("zeo_loads_total")
    for _ in range(3):
        load(client)
    becomes(server, before + 3, "zeo_loads_total")


def test_stores_and_commits(server):
    client = server.client()
    for _ in range(3):
        commit_object(client)
    becomes(server, 3, "zeo_stores_total")
    becomes(server, 3, "zeo_commits_total")
    becomes(server, 0, "zeo_aborts_total")


def test_aborts(server):
    client = server.client()
    client.tpc_abort(begin(client))
    becomes(server, 1, "zeo_aborts_total")
    becomes(server, 0, "zeo_commits_total")
    voted = begin(client)
    client.tpc_vote(voted)
    client.tpc_abort(voted)
    becomes(server, 2, "zeo_aborts_total")
    becomes(server, 0, "zeo_commits_total")


def test_conflicts(server):
    databases = server.db(), server.db()
    managers = transaction.TransactionManager(), transaction.TransactionManager()
    for database, manager in zip(databases, managers, strict=True):
        root = database.open(manager).root()
        root["key"] = "value"
    managers[0].commit()
    with pytest.raises(ConflictError):
        managers[1].commit()
    managers[1].abort()
    becomes(server, 1, "zeo_conflicts_total")


def test_active_transactions(server):
    one, other = server.client(), server.client()
    becomes(server, 0, "zeo_active_transactions")
    txn = begin(one)
    begin(other)
    becomes(server, 2, "zeo_active_transactions")
    one.tpc_abort(txn)
    becomes(server, 1, "zeo_active_transactions")
    other.close()  # in the middle of it
    becomes(server, 0, "zeo_active_transactions")


def test_the_commit_lock(server, background):
    first, second = server.client(), server.client()
    holding, waiting = begin(first), begin(second)
    becomes(server, 0, "zeo_commit_lock_held_since_timestamp_seconds")
    started = time.time()
    first.tpc_vote(holding)
    since = server.metrics()("zeo_commit_lock_held_since_timestamp_seconds", storage="1")
    assert started - 1 <= since <= time.time() + 1
    becomes(server, 0, "zeo_commit_lock_waiting")
    vote = background(second.tpc_vote, waiting)
    becomes(server, 1, "zeo_commit_lock_waiting")
    assert server.metrics()("zeo_commit_lock_held_since_timestamp_seconds", storage="1") == since
    assert not vote.done()
    first.tpc_finish(holding)
    vote.result(60)
    becomes(server, 0, "zeo_commit_lock_waiting")
    assert server.metrics()("zeo_commit_lock_held_since_timestamp_seconds", storage="1") >= since
    second.tpc_finish(waiting)
    becomes(server, 0, "zeo_commit_lock_held_since_timestamp_seconds")


def test_the_commit_lock_from_the_vote_to_the_finish(server, background):
    client, txn = server.client(), TransactionMetaData()
    client.tpc_begin(txn)
    client.tpc_vote(txn)
    wait_for(lambda: server.metrics()("zeo_commit_lock_held_since_timestamp_seconds") > 0)
    queued = background(commit_object, server.client())
    becomes(server, 1, "zeo_commit_lock_waiting")
    client.tpc_finish(txn)
    queued.result(60)
    becomes(server, 0, "zeo_commit_lock_held_since_timestamp_seconds")
    held = server.metrics()("s3blobs_commit_lock_held_duration_seconds_count")
    assert held == 2


def test_the_commit_lock_is_free_while_a_blob_is_uploaded(s3, server, background):
    s3.misbehave(operation="PutObject", hang=True)
    slow = background(commit_blob, server.client())
    try:
        s3.wait_for("PutObject")
        assert server.metrics()("zeo_commit_lock_held_since_timestamp_seconds") == 0
    finally:
        s3.behave()
    slow.result(60)


def test_the_last_transaction(server):
    tid = commit_object(server.client())
    assert server.metrics()("zeo_last_transaction_timestamp_seconds") == pytest.approx(TimeStamp(tid).timeTime())
    server.stop()
    server.start()
    assert server.metrics()("zeo_last_transaction_timestamp_seconds") == pytest.approx(TimeStamp(tid).timeTime())
    assert server.metrics()("zeo_commits_total") == 0


# The label


@pytest.mark.parametrize("wrapper", slow_but("zlibstorage", of=["zlibstorage", "serverzlibstorage"]))
def test_a_storage_inside_another_has_the_name_that_zeo_serves(start, wrapper):
    server = start(storages=lambda settings: f"<{wrapper} outer>{SECTION.format(**settings)}</{wrapper}>")
    commit_blob(server.client(storage="outer"))
    figures = server.metrics()
    assert {sample.labels.get("storage") for sample in figures.samples} == {None, "outer"}
    assert figures("zeo_commits_total", storage="outer") == 1
    assert figures("s3blobs_upload_size_bytes_count", storage="outer") == 1


def test_two_storages_of_one_server(start):
    def storages(settings):
        another = settings | {"name": "2", "cache": "cache-2", "base": settings["base"].replace("Data.fs", "2.fs")}
        return SECTION.format(**settings) + SECTION.format(**another)

    server = start(storages=storages)
    client, _ = server.client(), server.client(storage="2")
    commit_blob(client)
    becomes(server, 1, "zeo_connections", storage="2")
    figures = server.metrics()
    assert figures.names(storage="1") == figures.names(storage="2") > FIGURES
    for name in "zeo_commits_total", "s3blobs_upload_size_bytes_count":
        assert figures(name, storage="1") == 1
        assert figures(name, storage="2") == 0
    assert figures("zeo_event_loop_lag_seconds_count") >= 0  # there is one for both


def test_storages_that_are_not_ours_are_left_out(start, tmp_path):
    plain = f"<filestorage 2>\n path {tmp_path}/2.fs\n</filestorage>"
    server = start(storages=lambda settings: SECTION.format(**settings) + plain)
    commit_object(server.client(storage="2", blob_dir=None))
    figures = server.metrics()
    assert {sample.labels.get("storage") for sample in figures.samples} == {None, "1"}
    assert figures("zeo_commits_total", storage="1") == 0


# The event loop


@pytest.fixture
def probes(monkeypatch):
    """Many probes a second."""
    monkeypatch.setattr(zeostats, "_PROBE_EVERY", 0.02)


@pytest.fixture
def serve(s3, bucket_name, tmp_path):
    """Starts a server in this process, whose figures are at its ``metrics_address``."""
    servers = []

    def serve():
        number = len(servers)
        metrics_address = free_address()
        section = SECTION.format(
            name="1",
            bucket=bucket_name,
            endpoint=s3.url,
            dir=tmp_path,
            cache=f"cache-{number}",
            options="metrics-address {}:{}".format(*metrics_address),
            base="<mappingstorage/>",
        )
        storage = ZODB.config.storageFromString(f"%import zodb_s3blobs\n{section}")
        server = StorageServer(("127.0.0.1", 0), {"1": storage})
        server.metrics = lambda: scrape(metrics_address)
        server.start_thread()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.close()


@contextlib.contextmanager
def blocked(server):
    """The event loop of ``server`` does nothing else."""
    begun, end = threading.Event(), threading.Event()

    def block():
        begun.set()
        end.wait(60)

    server.acceptor.event_loop.call_soon_threadsafe(block)
    try:
        assert begun.wait(60)
        yield
    finally:
        end.set()


def since(server):
    return server.metrics()("zeo_event_loop_blocked_since_timestamp_seconds")


def lags(server):
    return server.metrics()("zeo_event_loop_lag_seconds_count")


def probe_threads():
    return [thread for thread in threading.enumerate() if "event loop probe" in thread.name]


def test_a_runzeo_that_is_well_answers_again_and_again(server):
    wait_for(lambda: lags(server) >= 2)
    wait_for(lambda: since(server) == 0)
    figures = server.metrics()
    count = figures("zeo_event_loop_lag_seconds_count")
    assert figures("zeo_event_loop_lag_seconds_sum") < count * 10
    assert figures("zeo_event_loop_lag_seconds_bucket", le="+Inf") == count


def test_a_loop_that_is_well(serve, probes):
    server = serve()
    wait_for(lambda: lags(server) >= 5)
    wait_for(lambda: since(server) == 0)


def test_a_loop_that_is_blocked(serve, probes):
    server = serve()
    wait_for(lambda: lags(server) >= 1)
    with blocked(server):
        began = time.time()
        wait_for(lambda: since(server) > 0)
        count, first = lags(server), since(server)
        assert began - 60 < first <= time.time()
        time.sleep(0.3)  # many probes, if they were sent
        assert (lags(server), since(server)) == (count, first)
    wait_for(lambda: since(server) == 0)
    wait_for(lambda: lags(server) > count)
    figures = server.metrics()
    assert figures("zeo_event_loop_lag_seconds_sum") >= 0.3
    assert figures("zeo_event_loop_lag_seconds_bucket", le="0.25") < figures("zeo_event_loop_lag_seconds_count")


def test_what_s3_does_does_not_block_it(s3, server, background):
    s3.misbehave(hang=True)
    slow = background(commit_blob, server.client())
    try:
        s3.wait_for("PutObject")
        before = lags(server)
        wait_for(lambda: lags(server) >= before + 2)
        assert not slow.done()
    finally:
        s3.behave()
    slow.result(60)


def test_the_probe_ends_with_the_server(serve, probes):
    wait_for(lambda: not probe_threads())  # those of tests before this one
    server = serve()
    assert len(probe_threads()) == 1
    wait_for(lambda: lags(server) >= 1)
    server.close()
    wait_for(lambda: not probe_threads())


def test_the_probe_ends_with_a_server_that_is_closed_while_it_is_blocked(serve, probes):
    wait_for(lambda: not probe_threads())
    server = serve()
    with blocked(server):
        wait_for(lambda: since(server) > 0)
        server.close(join_timeout=0)
    wait_for(lambda: not probe_threads())


def test_the_probe_ends_with_a_loop_that_never_came_to_it(probes):
    wait_for(lambda: not probe_threads())
    loop = asyncio.new_event_loop()
    zeostats.LoopLag(loop)
    assert len(probe_threads()) == 1
    loop.close()
    wait_for(lambda: not probe_threads())


def test_a_second_server_has_its_own_loop(serve, probes):
    server = serve()
    wait_for(lambda: lags(server) >= 1)
    server.close()
    other = serve()
    wait_for(lambda: lags(other) >= 1)
    with blocked(other):
        wait_for(lambda: since(other) > 0)
    wait_for(lambda: since(other) == 0)


# Another ZEO may have less


@pytest.mark.parametrize(
    ("attribute", "missing"),
    [
        ("lock_managers", {"zeo_commit_lock_waiting"}),
        (
            "stats",
            FIGURES - {"zeo_commit_lock_waiting", "zeo_last_transaction_timestamp_seconds"},
        ),
        ("storages", {"zeo_last_transaction_timestamp_seconds"}),
    ],
)
def test_a_figure_that_zeo_does_not_have_is_left_out(serve, probes, attribute, missing):
    server = serve()
    wait_for(lambda: lags(server) >= 1)
    whole = server.metrics().names()
    kept = getattr(server, attribute)
    delattr(server, attribute)
    try:
        left = server.metrics().names()
    finally:
        setattr(server, attribute, kept)
    assert whole - left == missing
    assert left < whole


@pytest.mark.parametrize("value", [None, "many", len])
def test_a_figure_that_is_no_number_is_left_out(serve, value):
    server = serve()
    server.stats["1"].commits = value
    names = server.metrics().names(storage="1")
    assert "zeo_commits_total" not in names
    assert names > FIGURES - {"zeo_commits_total"}


@pytest.mark.parametrize("acceptor", [None, SimpleNamespace()])
def test_a_zeo_without_such_a_loop_starts_all_the_same(serve, acceptor):
    server = serve()
    storage = server.storages["1"]
    storage.exported.exporter.loop = None
    other = SimpleNamespace(
        storages={"other": storage},
        stats=server.stats,
        lock_managers=server.lock_managers,
        register_connection=lambda storage_id, handler: None,
        client_conflict_resolution=False,
        acceptor=acceptor,
    )
    zope.event.notify(Serving(other, address=None))
    names = server.metrics().names()
    assert "zeo_last_transaction_timestamp_seconds" in names
    assert "zeo_event_loop_lag_seconds_count" not in names
