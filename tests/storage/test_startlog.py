"""What a ZEO server that starts says about its own settings: transaction-timeout beside upload-timeout."""

import contextlib
import logging
import types

import pytest
import ZEO.StorageServer
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

from tests.support.zeo_clients import wait_for
from zodb_s3blobs.zeo import startlog


@pytest.fixture
def warnings(caplog):
    """Makes a server, and returns what is said about it where uploads may take ten minutes."""
    caplog.set_level(logging.DEBUG)
    with contextlib.ExitStack() as servers:

        def warnings(storage=None, **options):
            server = ZEO.StorageServer.StorageServer(
                None, {"main": MappingStorage() if storage is None else storage}, **options
            )
            for manager in server.lock_managers.values():
                servers.callback(getattr(manager.timeout, "stop", lambda: None))
            caplog.clear()
            startlog.check_timeouts(server, "main", 600)
            return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

        yield warnings


def test_a_server_without_transaction_timeout_is_warned(warnings):
    (sentence,) = warnings()
    assert sentence.startswith("Storage main: without transaction-timeout, ")
    assert "set transaction-timeout in the <zeo> section to 900" in sentence
    assert "upload-timeout (600 s)" in sentence


@pytest.mark.parametrize("timeout", [30, 600])
def test_a_transaction_timeout_that_is_not_above_upload_timeout_is_warned_of(warnings, timeout):
    (sentence,) = warnings(transaction_timeout=timeout)
    assert sentence.startswith(f"Storage main: with transaction-timeout {timeout}, ")
    assert "set transaction-timeout in the <zeo> section to 900" in sentence
    assert f"set upload-timeout below {timeout}s" in sentence


def test_a_transaction_timeout_above_upload_timeout_is_well(warnings):
    assert warnings(transaction_timeout=601) == []


def test_a_server_at_which_nobody_commits_needs_none(warnings, tmp_path):
    assert warnings(read_only=True) == []
    FileStorage(str(tmp_path / "Data.fs")).close()
    with contextlib.closing(FileStorage(str(tmp_path / "Data.fs"), read_only=True)) as storage:
        assert warnings(storage) == []


def test_nothing_is_said_where_zeo_does_not_tell(caplog):
    storages = {"main": MappingStorage()}
    unknown = types.SimpleNamespace(timeout=types.SimpleNamespace())
    for more in {}, {"lock_managers": {"main": unknown}}:
        startlog.check_timeouts(types.SimpleNamespace(read_only=False, storages=storages, **more), "main", 600)
    assert not caplog.records


@pytest.mark.parametrize(
    ("zeo", "said"),
    [({}, "without transaction-timeout"), ({"transaction_timeout": 60}, "with transaction-timeout 60"), (None, "")],
)
def test_runzeo_says_it_once_at_the_start(start, zeo, said):
    server = start(zeo={"transaction_timeout": 61} if zeo is None else zeo, options={"upload_timeout": "1m"})
    wait_for(lambda: said in server.output())  # it listens a moment before it says so
    log = server.output()
    assert log.count("transaction-timeout") == (2 if said else 0)  # twice in one sentence
    assert f"WARNING zodb_s3blobs.zeo.startlog Storage 1: {said}" in log or not said


def test_runzeo_says_where_the_blobs_are_and_that_the_bucket_answered(start, s3, bucket_name):
    server = start()
    log = server.output()
    where = f"s3blobstorage 1 (cache-dir {server.cache_dir}): bucket {bucket_name}, prefix 1, endpoint {s3.url}"
    assert log.count(where) == 1
    assert log.count(f"Bucket {bucket_name} answered") == 1
