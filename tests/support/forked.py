"""Processes that begin with everything imported: in half the time, forked from a server that imports it once."""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.reduction
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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

    It has the environment and the directory of this process. ``stdin``, ``stdout`` and ``stderr``: the paths of files,
    or file descriptors; the last two may be the same. The methods are those of `subprocess.Popen`.
    """

    def __init__(self, function, *arguments, stdout, stderr, stdin=os.devnull):
        files = [_File(one) for one in (stdin, stdout, stderr)]
        self._process = context().Process(
            target=_begin, args=(dict(os.environ), files, function, arguments), daemon=True
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


class Piped(Forked):
    """A `Forked` whose input and output are text in pipes, but for those that a file descriptor is given for."""

    def __init__(self, function, *arguments, **given):
        with contextlib.ExitStack() as theirs:
            descriptors = {}
            for name in "stdin", "stdout", "stderr":
                if name in given:
                    descriptors[name] = given[name]
                    setattr(self, name, None)
                    continue
                read, write = os.pipe()
                ours, descriptors[name] = (write, read) if name == "stdin" else (read, write)
                theirs.callback(os.close, descriptors[name])
                setattr(self, name, os.fdopen(ours, "w" if name == "stdin" else "r"))
            super().__init__(function, *arguments, **descriptors)

    def communicate(self, text="", timeout=None):
        """Write ``text`` to its input, and wait for its end; returns what it wrote to stdout and stderr."""
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            try:
                with contextlib.suppress(BrokenPipeError), self.stdin:
                    self.stdin.write(text)
                self.wait(timeout)
            except BaseException:
                self.kill()
                raise
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        return tuple(one and one.result() for one in found)


class _File:
    """The path of a file, or a file descriptor of this process, that another process opens or gets as it starts."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        if isinstance(self.file, int):
            return _received, (multiprocessing.reduction.DupFd(self.file),)
        return _File, (str(self.file),)

    def put(self, number):
        """Make it the file descriptor ``number`` of this process."""
        mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = self.file if isinstance(self.file, int) else os.open(self.file, mode)
        os.dup2(opened, number)
        os.close(opened)


def _received(descriptor):
    return _File(descriptor.detach())


def _begin(environment, files, function, arguments):
    assert "tests.support.forked_imports" in sys.modules, "the server of such processes cannot import what they need"
    stdin, stdout, stderr = files
    stdin.put(0)
    stdout.put(1)
    if stderr.file == stdout.file:
        os.dup2(1, 2)
    else:
        stderr.put(2)
    # Those of the server know what kind of files it has there itself.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(function(*arguments))


def runzeo(config):
    """Run ``runzeo -C config``."""
    import ZEO.runzeo

    sys.argv = ["runzeo", "-C", config]
    return ZEO.runzeo.main()


def command(arguments, hosts=None):
    """Run ``zodb-s3blobs`` with these arguments. ``hosts``: the only names of hosts there are, all of this machine."""
    from zodb_s3blobs.cli import main

    resolve = socket.getaddrinfo

    def only_these(host, *rest, **more):
        if host in hosts:
            return resolve("127.0.0.1", *rest, **more)
        raise socket.gaierror("no such host")

    if hosts is not None:
        socket.getaddrinfo = only_these
    sys.argv = ["zodb-s3blobs", *arguments]
    return main(arguments)


def read_as_runzeo_does(config):
    """Print what ``runzeo -C config`` makes of the file, as JSON."""
    import ZEO.runzeo

    options = ZEO.runzeo.ZEOOptions()
    options.realize(["-C", config])

    def s3blobs(storage):
        inside = getattr(storage.config, "base", None)
        return [storage.config] if hasattr(storage, "settings") else s3blobs(inside) if inside else []

    found = [section for storage in options.storages for section in s3blobs(storage)]
    told = {
        "names": [storage.name for storage in options.storages],
        "transaction_timeout": options.transaction_timeout,
        "cache_dirs": [section.cache_dir for section in found],
        "metrics_addresses": [section.metrics_address for section in found],
        "keys_start_with": [[section.bucket_name, section.s3_prefix] for section in found],
        "logs": options.config_logger is not None,
    }
    print(json.dumps(told))
