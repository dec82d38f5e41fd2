"""A stock ``runzeo`` in a process of its own, with an ``<s3blobstorage>``, and stock clients of it."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import ZEO.ClientStorage
import ZODB
from prometheus_client.parser import text_string_to_metric_families

from tests.support.forked import Forked, runzeo

FILESTORAGE = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"
DEMO = """
<demostorage 1>
  {base}
  <filestorage changes>
    path {dir}/changes.fs
    blob-dir {dir}/changes
  </filestorage>
</demostorage>
"""

CONFIG = """
%import zodb_s3blobs
%import zc.zlibstorage
<zeo>
  address 127.0.0.1:{port}
  {zeo}
</zeo>
<eventlog>
  <logfile>
    path {dir}/zeo.log
  </logfile>
</eventlog>
{storages}
"""

SECTION = """
<s3blobstorage {name}>
  bucket-name {bucket}
  s3-prefix {name}
  s3-endpoint-url {endpoint}
  s3-access-key test
  s3-secret-key test-secret
  cache-dir {dir}/{cache}
  {options}
  {base}
</s3blobstorage>
"""

FALLBACK = """
<fallbackbucket>
  bucket-name {bucket}
  s3-prefix {prefix}
  s3-endpoint-url {endpoint}
  s3-access-key test
  s3-secret-key test-secret
  {options}
</fallbackbucket>
"""


def fallback_bucket(s3, bucket, prefix="1", **options):
    """The text of a ``<fallbackbucket>``; keywords are more of its keys. It goes beside the base of a section."""
    lines = "\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
    return FALLBACK.format(bucket=bucket, prefix=prefix, endpoint=s3.url, options=lines)


_random = random.SystemRandom()

#: A test that sets another one has the servers run some code as their interpreter starts.
_PYTHONPATH = os.environ.get("PYTHONPATH")


def free_address():
    """A host and a port that nobody listens at.

    The system gives none of these ports to a connection that goes out: it stays free until the test uses it, also
    while a test keeps it closed.
    """
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", _random.randrange(10_000, 32_000)))
            return probe.getsockname()


class Figures:
    """What a scrape returned: ``text``, and the values in it.

    Called with the name of a series and some of its labels, it returns the value of the one series that has these.
    """

    def __init__(self, text):
        self.text = text
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name, **labels):
        (value,) = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return value

    def names(self, **labels):
        """The names of the series that have these labels."""
        return {sample.name for sample in self.samples if labels.items() <= sample.labels.items()}


def scrape(address):
    """The `Figures` of the process that serves them at ``address``."""
    with urllib.request.urlopen("http://{}:{}/metrics".format(*address), timeout=60) as answer:
        return Figures(answer.read().decode())


class ZEOServer:
    """One server on a port that stays the same over restarts; use as a context manager.

    ``options`` and ``zeo``: more keys of the s3blobstorage and the zeo section; ``storages``: makes the text of the
    storage sections from the settings of the one that the other arguments describe; ``metrics``: whether the options
    are to have a metrics-address; ``stock``: whether to run a new interpreter, and not to fork one that has all
    imported.
    """

    def __init__(
        self,
        directory,
        s3,
        bucket=None,
        *,
        base=FILESTORAGE,
        options=None,
        zeo=None,
        storages=None,
        metrics=False,
        stock=False,
    ):
        self.directory = Path(directory)
        self.address = free_address()
        if metrics:
            self.metrics_address = free_address()
            options = {**(options or {}), "metrics_address": "{}:{}".format(*self.metrics_address)}
        self._clients = []
        self._process = None
        self.cache_name = "cache"
        self._stock = stock
        self._settings = {
            "name": "1",
            "bucket": bucket,
            "endpoint": getattr(s3, "url", None),
            "dir": directory,
            "options": "\n".join(f"{key.replace('_', '-')} {value}" for key, value in (options or {}).items()),
            "base": base.format(dir=directory),
        }
        self._zeo = "\n".join(f"{key.replace('_', '-')} {value}" for key, value in (zeo or {}).items())
        self._storages = storages or (lambda settings: SECTION.format(**settings))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        for client in self._clients:
            client.close()
        if self._process is not None:
            self.kill()

    @property
    def cache_dir(self):
        return self.directory / self.cache_name

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        """Start, and wait until it accepts clients."""
        config = self.directory / "zeo.conf"
        config.write_text(
            CONFIG.format(
                port=self.address[1],
                dir=self.directory,
                zeo=self._zeo,
                storages=self._storages({**self._settings, "cache": self.cache_name}),
            )
        )
        output = self.directory / "output"
        if self._stock or os.environ.get("PYTHONPATH") != _PYTHONPATH:
            with open(output, "wb") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ZEO.runzeo", "-C", str(config)], stdout=file, stderr=subprocess.STDOUT
                )
        else:
            self._process = Forked(runzeo, str(config), stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(self.address, 1).close()
                return
            except OSError:
                assert self._process.poll() is None, self.output()
                assert time.monotonic() < deadline, self.output()
                time.sleep(0.02)

    def stop(self):
        """SIGTERM; returns how many seconds it took to end."""
        started = time.monotonic()
        self._process.terminate()
        self._process.wait(60)
        return time.monotonic() - started

    def kill(self):
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def signal(self, number=signal.SIGTERM):
        self._process.send_signal(number)

    def output(self):
        """What it printed and logged."""
        log = self.directory / "zeo.log"
        return (self.directory / "output").read_text() + (log.read_text() if log.exists() else "")

    def client(self, **options):
        """A stock client, with a blob directory of its own."""
        blob_dir = self.directory / f"client-{len(self._clients)}"
        client = ZEO.ClientStorage.ClientStorage(
            self.address, **{"blob_dir": str(blob_dir), "wait_timeout": 30, "min_disconnect_poll": 0.1, **options}
        )
        self._clients.append(client)
        return client

    def db(self, **options):
        """A database on a client of its own."""
        return ZODB.DB(self.client(**options))

    def metrics(self):
        """The `Figures` of a scrape."""
        return scrape(self.metrics_address)

    def open_files(self):
        """The names of the files that the server has open in its cache directory; none where the system cannot tell."""
        names = []
        for link in Path(f"/proc/{self.pid}").glob("fd/*"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                names.append(os.readlink(link))
        return sorted(name for name in names if name.startswith(f"{self.cache_dir}/"))
