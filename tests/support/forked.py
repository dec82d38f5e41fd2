"""Processes that begin with everything imported: in half the time, forked from a server that imports it once."""

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Before ZODB's own suites have tempfile make paths that are too long for a socket.
multiprocessing.util.get_temp_dir()


@functools.cache
def context():
    """Return the context of `multiprocessing` whose processes are forked so; the first call starts their server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.forked_imports"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13 that server does not get the path of this process, and says nothing of what is not there.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return found


class Forked:
    """A process that calls ``function(*arguments)`` and ends with the exit status that this returns.

    It has the environment and the directory of this process. ``stdout`` and ``stderr``: the paths of the files that it
    writes to; both may be the same. The methods are those of `subprocess.Popen`.
    """

    def __init__(self, function, *arguments, stdout, stderr):
        self._process = context().Process(
            target=_begin, args=(dict(os.environ), str(stdout), str(stderr), function, arguments), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _begin(environment, stdout, stderr, function, arguments):
    assert "tests.support.forked_imports" in sys.modules, "the server of such processes cannot import what they need"
    out = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out if stderr == stdout else os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(function(*arguments))


def runzeo(config):
    """Run ``runzeo -C config``."""
    import ZEO.runzeo

    sys.argv = ["runzeo", "-C", config]
    return ZEO.runzeo.main()


def command(arguments):
    """Run ``zodb-s3blobs`` with these arguments."""
    from zodb_s3blobs.cli import main

    sys.argv = ["zodb-s3blobs", *arguments]
    return main(arguments)
