"""The servers of the demo: moto in this process, which records its requests, and a runzeo process."""

import collections
import contextlib
import http.client
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from ...s3.keys import OWNER

PACKAGE = Path(__file__).parents[2]
#: The configuration of the ZEO server, with values from the environment: see `ZEOServer`.
CONFIG = PACKAGE / "zeo-configs" / "quickstart.conf"

BUCKET = "zodb-demo"
ACCESS_KEY, SECRET_KEY = "demo", "demo-secret"  # made up: moto accepts everything

#: The requirement in the extra `demo` of pyproject.toml.
MOTO = "moto[s3,server]>=5"

#: How long, in seconds, the ZEO server may take to start, and to stop.
_START_TIMEOUT, _STOP_TIMEOUT = 30.0, 10.0

_LOG_LINES = 15


class DemoError(Exception):
    """A failure of the demo; the message is for the person who runs it."""


@dataclass(frozen=True)
class Request:
    """One request to S3; ``operation``: its name in S3."""

    operation: str
    key: str


class S3Server:
    """moto's S3 server in a thread, with an empty bucket, and a record of its requests. A context manager."""

    def __init__(self) -> None:
        try:
            from moto.server import DomainDispatcherApplication, create_backend_app
            from werkzeug.serving import WSGIRequestHandler, make_server
        except ImportError as error:
            raise DemoError(
                f"the S3 server of the demo is not installed ({error}): {sys.executable} -m pip install '{MOTO}'"
            ) from None

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open, as every S3 server does

            def log(self, *args: Any) -> None:
                """Drop werkzeug's log line: the demo prints the requests itself."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._server = make_server("127.0.0.1", 0, self._record, threaded=True, request_handler=Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _record(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # Recorded before the answer: once a blob has been read, all its requests are in the record. The requests of
        # the owner lease are left out.
        if not environ["PATH_INFO"].endswith(OWNER):
            self._requests.put(_request(environ))
        return self._app(environ, start_response)

    def __enter__(self) -> "S3Server":
        threading.Thread(target=self._server.serve_forever, name="demo S3", daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", self._server.server_port)
        connection.request("PUT", f"/{BUCKET}")
        status = connection.getresponse().status
        connection.close()
        if status != 200:
            raise DemoError(f"moto answered HTTP {status} to the request for a new bucket {BUCKET}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self) -> list[Request]:
        """Return the requests since the last call."""
        requests = []
        with contextlib.suppress(queue.Empty):
            while True:
                requests.append(self._requests.get_nowait())
        return requests

    def wait_for_request(self, timeout: float) -> Request | None:
        """Return the next request, or None if there is none for ``timeout`` seconds."""
        try:
            return self._requests.get(timeout=timeout)
        except queue.Empty:
            return None


def _request(environ: dict[str, Any]) -> Request:
    method = environ["REQUEST_METHOD"]
    key = environ["PATH_INFO"].lstrip("/").partition("/")[2]
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    copy = "HTTP_X_AMZ_COPY_SOURCE" in environ
    if "partNumber" in query:
        operation = "UploadPartCopy" if copy else "UploadPart"
    elif "uploadId" in query:
        operation = "CompleteMultipartUpload" if method == "POST" else "AbortMultipartUpload"
    elif "uploads" in query:
        operation = "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    elif "delete" in query:
        operation = "DeleteObjects"
    elif "list-type" in query:
        operation = "ListObjectsV2"
    elif not key:
        operation = f"{method.capitalize()}Bucket"
    else:
        operation = "CopyObject" if copy else f"{method.capitalize()}Object"
    return Request(operation, key)


class ZEOServer:
    """A ``runzeo`` process with the packaged configuration; leaving the context ends it."""

    def __init__(self, directory: Path, s3_url: str) -> None:
        directory.mkdir()
        self.cache = directory / "blobcache"  # the value of cache-dir in CONFIG
        self._log = directory / "runzeo.log"
        self.port, metrics_port = _free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self._process: subprocess.Popen[bytes] | None = None
        # INSTANCE_HOME would make runzeo write a pid file there.
        inherited = {name: value for name, value in os.environ.items() if name != "INSTANCE_HOME"}
        self._environment = {
            **inherited,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "S3BLOBS_ADDRESS": self.address,
            "S3BLOBS_METRICS_ADDRESS": f"127.0.0.1:{metrics_port}",
            "S3BLOBS_DIR": str(directory),
            "S3BLOBS_ENDPOINT": s3_url,
            "S3BLOBS_BUCKET": BUCKET,
            "S3BLOBS_ACCESS_KEY": ACCESS_KEY,
            "S3BLOBS_SECRET_KEY": SECRET_KEY,
        }

    def __enter__(self) -> "ZEOServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until its port answers."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ZEO.runzeo", "-C", str(CONFIG)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the demo only, which ends the server before S3
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while not _answers(self.port):
            if self.has_ended():
                raise DemoError(f"runzeo did not start. {self.last_log_lines()}")
            if time.monotonic() > deadline:
                raise DemoError(
                    f"runzeo does not answer on {self.address} after {_START_TIMEOUT:g} s. {self.last_log_lines()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the process, if there is one, and wait for its end."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def figures(self, names: Iterable[str]) -> dict[str, float]:
        """Return the metrics ``names``, each summed over its labels."""
        with build_opener(ProxyHandler({})).open(self.metrics_url, timeout=_STOP_TIMEOUT) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        sums: collections.Counter[str] = collections.Counter()
        for sample in (sample for family in families for sample in family.samples):
            sums[sample.name] += sample.value  # type: ignore[assignment]
        return {name: sums[name] for name in names}

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self._process is not None and self._process.poll() is not None

    def last_log_lines(self) -> str:
        """Return the last lines of the process's log, for an error message."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "The last lines of its log:\n\n" + "\n".join(f"  {line}" for line in lines)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:  # all at once, or they might get the same one
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            return bool(connection.recv(64))  # ZEO sends first; closing without reading would log an error there
    except OSError:
        return False
