"""What the modules that run the published test suites of ZODB and ZEO share."""

import ctypes
import functools
import os
import sys
import unittest
import unittest.mock
from io import StringIO

import pytest
import ZConfig
import ZODB.config

from tests.support.s3_server import shared
from tests.support.speed import slow

BUCKET = "published-suites"


@functools.cache
def s3_server():
    """The S3 server of this process, with the bucket."""
    server = shared()
    server.bucket(BUCKET)
    return server


def key_prefix(name):
    """The prefix of the storage ``name`` of the test that is running.

    Upstream's tests run in a new directory each: its name makes a prefix that is new, and that stays when the test
    opens a storage again.
    """
    return f"{os.path.basename(os.getcwd())}/{name}"


def section(base, name, cache_dir):
    """An ``<s3blobstorage 1>`` section around the section ``base``; ``name``: of the storage within its test."""
    return f"""
        %import zodb_s3blobs
        <s3blobstorage 1>
          bucket-name {BUCKET}
          s3-prefix {key_prefix(name)}
          s3-endpoint-url {s3_server().url}
          s3-region us-east-1
          s3-access-key test
          s3-secret-key test-secret
          cache-dir {cache_dir}
          {base}
        </s3blobstorage>
        """


def s3_storage(open_base, name="data", cache_dir=None):
    """What the section makes of the storage that ``open_base()`` returns, which need not have a section."""
    text = section("<mappingstorage/>", name, cache_dir or f"{name}.cache")
    config, _ = ZConfig.loadConfigFile(ZODB.config.getStorageSchema(), StringIO(text))
    config.storage.config.base = _Opener(open_base)
    return config.storage.open()


class _Opener:
    def __init__(self, open_base):
        self.open = open_base


class Published:
    """A mix-in for upstream's test cases: pytest finds their ``check*`` methods as well as the ``test*`` ones.

    ZODB before version 6, and ZEO to this day, use the former. With ``long_tests = False`` a class leaves out those
    that upstream marks as long and does not run itself unless told to. ``slow_tests``: the names of the slow ones;
    None means all of them.
    """

    long_tests = True
    slow_tests = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            method = getattr(cls, name)
            if not cls.long_tests and getattr(method, "level", 1) > 1:
                setattr(cls, name, None)
            elif name.startswith("check") and callable(method):
                setattr(cls, f"test_{name}", method)


def names_of_tests(cls, *modules):
    """Return the names of the tests that the test case ``cls`` has from these ``modules`` of ZODB.tests."""
    names = {
        name
        for base in cls.__mro__
        if base.__module__.removeprefix("ZODB.tests.") in modules
        for name in vars(base)
        if name.startswith(("test", "check"))
    }
    return names | {f"test_{name}" for name in names if name.startswith("check")}


def parametrize(*, xfail=None, quick=(), **suites):
    """A decorator for a test with the parameter ``case``: it is called with each test of the ``suites``.

    ``xfail``: the ids of those that fail, and why; ``quick``: how the ids of those begin that are not slow.
    """
    reasons = dict(xfail or {})
    params = []
    for prefix, suite in suites.items():
        for test in _flat(suite):
            name = f"{prefix}-{_name(test)}"
            marks = [] if name.startswith(tuple(quick)) else [slow]
            if name in reasons:
                marks.append(pytest.mark.xfail(reason=reasons.pop(name), strict=True))
            params.append(pytest.param((suite, test), id=name, marks=marks))
    assert not reasons, f"there are no such tests: {sorted(reasons)}"
    return pytest.mark.parametrize("case", params)


def _flat(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flat(test)
        else:
            yield test


def _name(test):
    return os.path.basename(test.id()) if os.path.isabs(test.id()) else ".".join(test.id().split(".")[-2:])


def run(case):
    """Run one of the tests of `parametrize` as zope.testrunner would, and tell pytest of the outcome."""
    suite, test = case
    layer = getattr(suite, "layer", None)
    if layer is not None:
        layer.testSetUp()
    try:
        result = unittest.TestResult()
        test.run(result)
    finally:
        if layer is not None:
            layer.testTearDown()
    for _, text in result.errors + result.failures:
        pytest.fail(text, pytrace=False)
    for _, reason in result.skipped:
        pytest.skip(reason)


_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522


@pytest.fixture(autouse=True)
def file_permissions_hold():
    """Not even root may write a read-only file, which upstream's tests expect; for the modules to import."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each
    if libc.capget(header, before) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    reduced = (ctypes.c_uint32 * 6)(*before)
    reduced[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    _capset(libc, header, reduced)
    try:
        yield
    finally:
        _capset(libc, header, before)


def _capset(libc, header, data):
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")
