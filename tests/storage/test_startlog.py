"""What a ZEO server that starts says about its own settings: a missing transaction-timeout."""

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
    """Makes a server, and returns what is said about it."""
    caplog.set_level(logging.DEBUG)
    with contextlib.ExitStack() as servers:

        def warnings(storage=None, **options):
            server = ZEO.StorageServer.StorageServer(
                None, {"main": MappingStorage() if storage is None else storage}, **options
            )
            for manager in server.lock_managers.values():
                servers.callback(getattr(manager.timeout, "stop", lambda: None))
            caplog.clear()
            startlog.check_transaction_timeout(server, "main")
            return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

        yield warnings


def test_a_server_without_transaction_timeout_is_warned(warnings):
    (sentence,) = warnings()
    assert sentence.startswith("Storage main: without transaction-timeout, ")
    assert "set transaction-timeout in the <zeo> section to 60 seconds or more" in sentence


def test_a_server_with_transaction_timeout_is_not_warned(warnings):
    assert warnings(transaction_timeout=30) == []


def test_a_server_at_which_nobody_commits_needs_none(warnings, tmp_path):
    assert warnings(read_only=True) == []
    FileStorage(str(tmp_path / "Data.fs")).close()
    with contextlib.closing(FileStorage(str(tmp_path / "Data.fs"), read_only=True)) as storage:
        assert warnings(storage) == []


def test_nothing_is_said_where_zeo_does_not_tell(caplog):
    storages = {"main": MappingStorage()}
    unknown = types.SimpleNamespace(timeout=types.SimpleNamespace())
    for more in {}, {"lock_managers": {"main": unknown}}:
        startlog.check_transaction_timeout(types.SimpleNamespace(read_only=False, storages=storages, **more), "main")
    assert not caplog.records


def test_runzeo_says_it_once_at_the_start(start):
    server = start(zeo={})
    warning = "WARNING zodb_s3blobs.zeo.startlog Storage 1: without transaction-timeout"
    wait_for(lambda: warning in server.output())  # it listens a moment before it says so
    assert server.output().count(warning) == 1


def test_runzeo_with_transaction_timeout_says_nothing_of_it(start):
    server = start(zeo={"transaction_timeout": 60})
    wait_for(lambda: "answered" in server.output())
    assert "transaction-timeout" not in server.output()


def test_runzeo_says_where_the_blobs_are_and_that_the_bucket_answered(start, s3, bucket_name):
    server = start()
    log = server.output()
    where = f"s3blobstorage 1 (cache-dir {server.cache_dir}): bucket {bucket_name}, prefix 1, endpoint {s3.url}"
    assert log.count(where) == 1
    assert log.count(f"Bucket {bucket_name} answered") == 1
