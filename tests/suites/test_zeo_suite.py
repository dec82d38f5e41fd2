"""ZEO's published tests, run against a stock ZEO server with an <s3blobstorage> section and stock clients."""

import os
import threading
import unittest.mock
from concurrent.futures import Future

import pytest
import zope.testing.setupstack
from ZEO.ClientStorage import ClientStorage
from ZEO.tests import forker, testZEO
from ZODB.tests import PackableStorage, testblob

from tests.suites.published import (  # noqa: F401
    BUCKET,
    Published,
    file_permissions_hold,
    key_prefix,
    names_of_tests,
    parametrize,
    run,
    s3_server,
    section,
)
from tests.support.speed import slow
from zodb_s3blobs import fetch, workers
from zodb_s3blobs.commit import pending
from zodb_s3blobs.s3.keys import Keys

FILE_STORAGE = """
    <filestorage>
      path Data.fs
    </filestorage>
    """


@pytest.fixture
def everything_deferred(monkeypatch):
    """Every vote and every read of a blob is answered later, even if there is nothing to wait for.

    For servers that are forked from this process, as those of the suite are on Linux.
    """

    class SlowCompletion(workers.Completion):
        def __init__(self, futures, *args):
            super().__init__([*futures, _later(Future())], *args)

    def request(self, oid, tid):
        future = Future()
        fetch.Fetcher.stock_request(self, oid, tid).add_done_callback(lambda done: _later(future, done))
        return future

    monkeypatch.setattr(fetch.Fetcher, "stock_request", fetch.Fetcher.request, raising=False)
    monkeypatch.setattr(fetch.Fetcher, "request", request)
    monkeypatch.setattr(pending, "Completion", SlowCompletion)


def _later(future, done=None):
    """Let ``future`` end soon, and as ``done`` did."""

    def end():
        error = done and done.exception()
        if error:
            future.set_exception(error)
        else:
            future.set_result(done and done.result())

    threading.Timer(0.002, end).start()
    return future


@pytest.mark.usefixtures("everything_deferred")
class TestFileStorage(Published, testZEO.FileStorageTests, testZEO.CommonBlobTests):
    #: The races, and what a FileStorage without ZEO shows by default.
    slow_tests = names_of_tests(
        testZEO.FileStorageTests,
        *("ConflictResolution", "IteratorStorage", "MTStorage", "PackableStorage", "RevisionStorage"),
        *("Synchronization", "TransactionalUndoStorage", "racetest"),
    )
    _expected_interfaces = (
        ("ZODB.interfaces", "IBlobStorageRestoreable"),
        ("ZODB.interfaces", "IBlobStorage"),
        *testZEO.FileStorageTests._expected_interfaces,
    )

    def getConfig(self):
        return section(FILE_STORAGE, "data", "server-cache")

    def checkStoreAndLoadBlob(self):
        # Upstream looks for the server's blob in a blob directory; let it find there what is in the bucket.
        os.mkdir(self.blobdir)

        class Layout:
            @staticmethod
            def getBlobFilePath(oid, tid):
                key = Keys(key_prefix("data")).key(oid, tid)
                s3_server().client.download_file(BUCKET, key, os.path.join(self.blobdir, "from bucket"))
                return "from bucket"

        with unittest.mock.patch("ZODB.blob.BushyLayout", Layout):
            testZEO.BlobAdaptedFileStorageTests.checkStoreAndLoadBlob(self)


@slow
class TestMappingStorage(Published, testZEO.MappingStorageTests, testZEO.CommonBlobTests):
    long_tests = False  # half a minute each, and about the client; TestFileStorage runs them

    def getConfig(self):
        return section("<mappingstorage/>", "data", "server-cache")


@slow
class TestDemoStorage(Published, testZEO.DemoStorageTests, testZEO.CommonBlobTests):
    long_tests = False

    def getConfig(self):
        return section(f"<demostorage>{FILE_STORAGE}</demostorage>", "data", "server-cache")


class TestClientConflictResolution(Published, testZEO.ClientConflictResolutionTests):
    def getConfig(self):
        return section("<mappingstorage/>", "data", "server-cache")


@slow
class TestFileStorageRecovery(Published, testZEO.FileStorageRecoveryTests):
    _servers_wanted = 0

    def getConfig(self):
        self._servers_wanted += 1
        name = f"data-{self._servers_wanted}"
        return section(FILE_STORAGE.replace("Data", name), name, f"{name}.cache")


class ServedStorage(testZEO.ServerManagingClientStorage):
    """A client storage that brings its server."""

    wrapper = "{}"

    def __init__(self, name, blob_dir, options=""):
        self.globs = {}
        base = f"""
            <filestorage>
              path {name}.fs
              {options}
            </filestorage>
            """
        config = self.wrapper.format(section(base, name, f"server-{blob_dir}"))
        addr, stop = forker.start_zeo_server(config)
        zope.testing.setupstack.register(self, stop)
        ClientStorage.__init__(self, addr, blob_dir=blob_dir)


class ServedThroughZlib(ServedStorage):
    wrapper = "%import zc.zlibstorage\n<zlibstorage 1>{}</zlibstorage>"


class ServedForExternalGC(ServedStorage, testZEO.ServerManagingClientStorageForIExternalGCTest):
    pass


@parametrize(
    quick=["file-"],
    file=testblob.storage_reusable_suite("S3", ServedStorage),
    zlib_outside=testblob.storage_reusable_suite("S3", ServedThroughZlib),
    external_gc=PackableStorage.IExternalGC_suite(lambda: ServedForExternalGC("data", "blobs", "pack-gc false")),
)
def test_blobs(case):
    run(case)
