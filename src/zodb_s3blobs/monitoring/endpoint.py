"""The HTTP endpoint of ``metrics-address``: one per process, for all its storages.

``/metrics`` for Prometheus; ``/-/healthy``: the process answers; ``/-/ready``: the storages are open and their buckets
answer; ``/`` links these three. HEAD is answered like GET without the body, for load balancers and monitors. Every
request has a thread of its own and ends after some seconds of silence, so that no client delays another.
"""

import contextlib
import io
import itertools
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import MetricsHandler

from ..errors import S3BlobsError
from ..openfiles import Listener
from .exporter import Exported, Exporter

logger = logging.getLogger(__name__)

#: How long, in seconds, a client may be silent, or not read its answer.
_SOCKET_TIMEOUT = 10.0

#: The most connections: each takes a file and a thread, which the server needs for its clients.
_MAX_CONNECTIONS = 64

#: Seconds before the next try to accept a connection for which there was no file.
_PAUSE = 1.0

#: Path -> description of the answer.
_PATHS = {
    "/metrics": "The metrics of this process and of its storages, in the format that Prometheus reads.",
    "/-/healthy": "200 as long as the process answers, whatever S3 does: for the decision on a restart.",
    "/-/ready": "200 while all storages are open and their buckets answer, else 503 and the reasons.",
}
_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>zodb-s3blobs</title>
</head>
<body>
<h1>zodb-s3blobs</h1>
<p>This process stores ZODB blobs in S3. It answers:</p>
<ul>
{items}
</ul>
</body>
</html>""".format(
    # Relative links, which hold behind a proxy that serves the page below a path of its own.
    items="\n".join(f'<li><a href="{path[1:]}">{path}</a>: {answer}</li>' for path, answer in _PATHS.items())
)

_lock = threading.Lock()
_endpoint: "_Endpoint | None" = None


class EndpointError(S3BlobsError):
    """The endpoint cannot be opened; the message says why, and what to do."""


def join(address: tuple[str, int], exported: Exported) -> None:
    """Export ``exported`` at ``address``, a host and a port, until `leave`.

    Raises EndpointError if the process cannot listen there, or already listens at another address.
    """
    global _endpoint
    with _lock:
        if _endpoint is None:
            _endpoint = _Endpoint(address)
        elif _endpoint.address != address:
            raise EndpointError(
                f"this process already serves its metrics at {_named(_endpoint.address)}; "
                f"name the same address in every section"
            )
        _endpoint.exporter.add(exported)


def leave(exported: Exported) -> None:
    """Stop exporting ``exported``; close the endpoint after the last one. No error if ``exported`` never joined."""
    global _endpoint
    with _lock:
        if (
            _endpoint is not None
            and exported.exporter is _endpoint.exporter
            and not _endpoint.exporter.remove(exported)
        ):
            _endpoint.close()
            _endpoint = None


class _Endpoint:
    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.exporter = Exporter()
        exporter = self.exporter

        class Handler(_Handler):
            registry = exporter.registry
            storages = staticmethod(exporter.storages)

        try:
            self._server = _server(address, Handler)
        except (OSError, UnicodeError) as error:  # UnicodeError if the host cannot be a name
            reason = getattr(error, "strerror", None) or error
            raise EndpointError(
                f"cannot listen on {_named(address)}: {reason}; name an address and a free port of this machine"
            ) from None
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="s3blobs metrics endpoint", daemon=True
        ).start()
        logger.info("Metrics are at http://%s/metrics", _named(address))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _server(address: tuple[str, int], handler: type) -> "_Server":
    host, port = address
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # IPv4 if the host has both: most scrapers resolve "localhost" to it.
    family, _, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)

    class Server(_Server):
        address_family = family

    return Server(where, handler)  # type: ignore[arg-type]


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's class, which looks up its own host name; the name service may take long to fail.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._connections: dict[int, socket.socket] = {}  # in the order of their arrival
        self._numbers = itertools.count()
        self._changing = threading.Lock()
        self._listener = Listener("The metrics endpoint")
        super().__init__(*args)

    def get_request(self) -> Any:
        """Accept a connection. While that is impossible, pause: `serve_forever` would try again without an end."""
        try:
            return super().get_request()
        except OSError as error:
            if self._listener.explains(error):
                time.sleep(_PAUSE)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; close the oldest one if there are more than `_MAX_CONNECTIONS`."""
        with self._changing:
            number = next(self._numbers)
            self._connections[number] = request
            if len(self._connections) > _MAX_CONNECTIONS:
                oldest = self._connections.pop(next(iter(self._connections)))
                with contextlib.suppress(OSError):  # the client has closed it
                    oldest.shutdown(socket.SHUT_RDWR)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changing:
                self._connections.pop(number, None)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("A request for metrics was not answered", exc_info=True)  # the client has gone


class _Handler(MetricsHandler):
    timeout = _SOCKET_TIMEOUT
    storages: Callable[[], list[tuple[str, Exported]]]

    def do_GET(self) -> None:
        """Answer a path, with Content-Length, by which a client detects an answer that was cut off."""
        connection, self.wfile = self.wfile, io.BytesIO()
        try:
            self._answer()
            body = self.wfile.getvalue()
        finally:
            self.wfile = connection
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_OPTIONS(self) -> None:
        """Send the allowed methods, like prometheus_client's own server."""
        self.send_response(200)
        self.send_header("Allow", "OPTIONS,GET,HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        """Send the headers, but not while `do_GET` collects the body, whose length is not known yet."""
        if not isinstance(self.wfile, io.BytesIO):
            super().end_headers()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if path == "/metrics":
            self.path = path  # without the query: if it names metrics, prometheus_client leaves out all of ours
            super().do_GET()
        elif path == "/-/healthy":
            self._say(200, "The process answers.")
        elif path == "/-/ready":
            troubles = [(label, exported.trouble()) for label, exported in self.storages()]
            reasons = [f"Storage {label}: {trouble}." for label, trouble in troubles if trouble is not None]
            self._say(503 if reasons else 200, "\n".join(reasons) or "All storages are open, and their buckets answer.")
        elif path == "/":
            self._say(200, _INDEX, "html")
        else:
            self._say(404, f"No such path. The page / describes what there is: {', '.join(_PATHS)}.")

    def _say(self, status: int, text: str, kind: str = "plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(f"{text}\n".encode())


def _named(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
