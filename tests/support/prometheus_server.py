"""A real Prometheus that scrapes what a test has started, and answers queries about it."""

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.support.zeo_server import free_address


def program(name):
    """The path of ``name``. Without it the test is skipped; in CI, where nobody would notice that, it fails."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed; it comes with Prometheus (Debian and Ubuntu: apt-get install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path


class QueryError(Exception):
    """Prometheus refused a query; the message is its own."""


class PrometheusServer:
    """One Prometheus with its data in ``directory``; use as a context manager.

    ``targets``: the addresses that it scrapes, once a second, as the job ``zeo``; ``rules``: the text of a file of
    rules, whose groups are evaluated once a second; ``history``: what it is to know from before its start, as text in
    the OpenMetrics format.
    """

    def __init__(self, directory, targets, rules=None, history=None):
        self.directory = Path(directory)
        self.address = free_address()
        self._config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "scrape_configs": [
                {"job_name": "zeo", "static_configs": [{"targets": ["{}:{}".format(*target) for target in targets]}]}
            ],
        }
        if rules is not None:
            (self.directory / "rules.yml").write_text(rules)
            self._config["rule_files"] = ["rules.yml"]
        self._history = history
        self._process = None

    def __enter__(self):
        config, data = self.directory / "prometheus.yml", self.directory / "data"
        config.write_text(json.dumps(self._config))  # JSON is YAML
        if self._history is not None:
            history = self.directory / "history"
            history.write_text(self._history)
            arguments = [program("promtool"), "tsdb", "create-blocks-from", "openmetrics", history, data]
            subprocess.run(arguments, check=True, capture_output=True, timeout=60)
        with open(self.directory / "output", "wb") as output:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={config}",
                    f"--storage.tsdb.path={data}",
                    "--storage.tsdb.retention.time=30d",
                    "--web.listen-address={}:{}".format(*self.address),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        self._process.kill()
        self._process.wait()

    def _wait_until_ready(self):
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), self._open("/-/ready"):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def output(self):
        """What it printed."""
        return (self.directory / "output").read_text()

    def _open(self, path, **form):
        data = urllib.parse.urlencode(form).encode() if form else None
        return urllib.request.urlopen("http://{}:{}{}".format(*self.address, path), data, timeout=60)

    def api(self, path, **form):
        """The data of the answer of ``/api/v1/{path}``; QueryError if there is none."""
        try:
            with self._open(f"/api/v1/{path}", **form) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{json.load(error)['error']}: {form}") from None

    def query(self, expression):
        """What ``expression`` is now: (labels, value) of each series; a number has no labels."""
        found = self.api("query", query=expression)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in found["result"]]

    def query_range(self, expression, start, end, step=1):
        """What it was each ``step`` seconds from ``start`` to ``end``: (labels, values) of each series."""
        found = self.api("query_range", query=expression, start=start, end=end, step=step)
        return [(series["metric"], [float(value) for _, value in series["values"]]) for series in found["result"]]

    def wait_for(self, expression, timeout=60):
        """Wait until ``expression`` is anything, and return that."""
        deadline = time.monotonic() + timeout
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"it did not come about in time: {expression}"
            time.sleep(0.1)
        return found

    def wait_for_scrape(self):
        """Wait until all targets have been scraped since this call."""
        [(_, now)] = self.query("time()")
        self.wait_for(f"min(timestamp(up)) > {now}")
