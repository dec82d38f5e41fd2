"""An S3 server for tests: moto in a process of its own, with a request log and faults in front of it.

Run as a script it prints its port and serves until its standard input closes. `S3Server` starts it and talks to it:
what was asked of it, and how it is to misbehave, go through ``/_control``.
"""

import atexit
import functools
import io
import json
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import parse_qs

import boto3
import botocore.config

_OWN = "s3server"  # the user agent of an S3Server's own requests, which count for nothing and meet no fault


@dataclass
class Request:
    """One request as the server saw it.

    ``operation``: as S3 calls it; ``headers``: those that tell S3 what to do, in lower case; ``status``: None as long
    as there is no answer, as to a request that broke off.
    """

    operation: str
    path: str
    headers: dict[str, str]
    status: int | None


class S3Server:
    """A running server. Use as a context manager. ``client`` is a boto3 client whose requests are not logged."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self._behaves = True
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test-secret",
            config=botocore.config.Config(
                user_agent=_OWN, retries={"total_max_attempts": 5}, s3={"addressing_style": "path"}
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        """End the process; afterwards the port refuses connections."""
        self.client.close()
        self._process.kill()
        self._process.communicate()

    def _control(self, **message):
        request = urllib.request.Request(f"{self.url}/_control", json.dumps(message).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def requests(self, operation=None):
        """The requests since the last `forget`; those whose operation is ``operation``, if given.

        Those for the owner lease, which every storage makes in the background, have names of their own, such as
        OwnerGetObject, and have to be asked for.
        """
        log = [Request(*entry) for entry in self._control(do="log")]
        if operation is None:
            return [request for request in log if not request.operation.startswith("Owner")]
        return [request for request in log if request.operation == operation]

    def wait_for(self, operation, count=1, timeout=30):
        """Wait until ``count`` requests of ``operation`` have arrived, answered or not."""
        deadline = time.monotonic() + timeout
        while len(self.requests(operation)) < count:
            assert time.monotonic() < deadline, f"{count} {operation} did not arrive: {self.requests()}"
            time.sleep(0.01)

    def forget(self):
        """Empty the log."""
        self._control(do="forget")

    def misbehave(self, *, operation=".*", times=None, **fault):
        """Do so with the next ``times`` requests (None: all) whose operation matches the regular expression.

        Requests for the owner lease only match an expression that begins with Owner.

        Of several faults that match a request it meets the oldest; one that says nothing lets it pass.

        ``latency``: seconds before anything is done; ``hang``: do nothing before `behave`, and nothing at all if the
        client has given up by then; ``status``, ``code`` and ``message``: the error to answer with, without a body if
        there is no code; ``body``: one for that answer instead; ``ignore_range``: answer a ranged GET with everything;
        ``ignore_condition``: do a conditional PUT whatever is there; ``refuse_condition``: answer it with 501;
        ``misread_etag``: find that any If-Match is not met; ``headers``: header lines to answer with besides; ``lose``:
        do what is asked, then cut the connection; ``flip``: damage a byte of the answer's body; ``truncate``: cut the
        connection that many bytes before the end of the answer; ``reset``: cut it before anything is done; ``stall``:
        send the headers, then nothing before `behave` or the client gives up.
        """
        self._behaves = False
        self._control(do="misbehave", operation=operation, times=times, fault=fault)

    def plague(self, rate, seed=0):
        """Do so with the share ``rate`` of all requests, also those for the owner lease, each time in another way.

        Which ones, and how, follows from ``seed`` and the order in which they arrive; until `behave`.
        """
        self._behaves = False
        self._control(do="plague", rate=rate, seed=seed)

    def behave(self):
        """Misbehave no more; requests that hang go on."""
        if not self._behaves:
            self._control(do="behave")
            self._behaves = True

    def bucket(self, name):
        """Make a bucket."""
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket, keys):
        """Put an object of one byte at each of the ``keys``; thousands take a moment."""
        self._control(do="put", bucket=bucket, keys=list(keys))

    def keys(self, bucket):
        """All keys of a bucket but that of the owner lease."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return [key for key in keys if key.rpartition("/")[2] != "owner.json"]


@functools.cache
def shared():
    """Return the S3 server of this process, which ends with the process, for those who each make a bucket there."""
    server = S3Server()
    atexit.register(server.stop)
    return server


def _operation(method, path, query, headers):
    owner = "Owner" if path.endswith("/owner.json") else ""
    return owner + _operation_on_any(method, path, query, headers)


def _operation_on_any(method, path, query, headers):
    has_key = path.strip("/").count("/") > 0
    if method == "PUT" and "partNumber" in query:
        return "UploadPartCopy" if "x-amz-copy-source" in headers else "UploadPart"
    if method == "PUT" and has_key:
        return "CopyObject" if "x-amz-copy-source" in headers else "PutObject"
    if method == "POST":
        names = {"delete": "DeleteObjects", "uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload"}
        return next((names[name] for name in names if name in query), "POST")
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    if method == "GET" and not has_key:
        return "ListMultipartUploads" if "uploads" in query else "ListObjects"
    if method == "GET":
        return "GetObject"
    return "HeadObject" if method == "HEAD" and has_key else f"{method} bucket"


class _State:
    """The log and the faults. ``moto``: its S3 backend."""

    def __init__(self, moto):
        self.moto = moto
        self.lock = threading.Lock()
        self.log = []  # the fields of a Request
        self.faults = []  # [operation, times or None, fault]
        self.rate, self.random = 0, random.Random()
        self.behaving = threading.Event()

    def control(self, message):
        with self.lock:
            if message["do"] == "log":
                return list(self.log)
            if message["do"] == "forget":
                self.log = []
            elif message["do"] == "misbehave":
                self.faults.append([message["operation"], message["times"], message["fault"]])
            elif message["do"] == "plague":
                self.rate, self.random = message["rate"], random.Random(message["seed"])
            elif message["do"] == "behave":
                self.faults, self.rate = [], 0
                self.behaving.set()  # what hangs now
                self.behaving = threading.Event()
            elif message["do"] == "put":
                for key in message["keys"]:
                    self.moto.put_object(message["bucket"], key, b"x")
            return None

    def arrived(self, operation, path, headers):
        """Log a request; returns its entry, the fault it meets, and the event that ends a hang."""
        entry = [operation, path, headers, None]
        with self.lock:
            self.log.append(entry)
            for rule in self.faults:
                pattern, times, fault = rule
                meant = pattern.startswith("Owner") == operation.startswith("Owner")
                if times != 0 and meant and re.fullmatch(pattern, operation):
                    rule[1] = times and times - 1
                    return entry, fault, self.behaving
            if self.rate and self.random.random() < self.rate:
                return entry, self.random.choice(_PLAGUES), self.behaving
        return entry, {}, self.behaving


def _serve():
    import logging

    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.server import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server
    from werkzeug.test import run_wsgi_app

    moto = create_backend_app("s3")  # its dispatcher looks through a directory to find out which service is asked
    state = _State(get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"])
    one_at_a_time = threading.Lock()

    class Handler(WSGIRequestHandler):
        """Serves a connection and keeps it open after an answer, as S3 does; werkzeug's own method closes it."""

        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def run_wsgi(self):
            if self.path == "/_control":
                self.answer(200, [], json.dumps(state.control(json.loads(self.body()))).encode())
                return
            environ = self.make_environ()
            entry, fault, behaving = self.arrived(environ)
            body = self.body()
            if body is None:
                return
            if "latency" in fault:
                time.sleep(fault["latency"])
            if fault.get("reset"):
                # Without a word: what the client has sent is not acknowledged either.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            if fault.get("hang") and not self.hang(behaving):
                return
            if fault.get("ignore_range"):
                environ.pop("HTTP_RANGE", None)
            if fault.get("ignore_condition"):
                for name in _CONDITIONS:
                    environ.pop(name, None)
            if fault.get("refuse_condition") and any(name in environ for name in _CONDITIONS):
                fault = {**fault, "status": 501, "code": "NotImplemented"}
            if fault.get("misread_etag") and "HTTP_IF_MATCH" in environ:
                fault = {**fault, "status": 412, "code": "PreconditionFailed"}
            environ["wsgi.input"] = io.BytesIO(body)
            if "status" in fault:
                status, headers, body = fault["status"], [("Content-Type", "application/xml")], _error(fault)
            else:
                with one_at_a_time:  # or a listing fails when another thread deletes what it lists
                    chunks, line, headers = run_wsgi_app(moto, environ, buffered=True)
                status, body = int(line.split()[0]), b"".join(chunks)
            entry[3] = status
            if fault.get("lose"):
                self.close_connection = True
                return
            more = fault.get("headers", {})
            headers = [(n, v) for n, v in headers if n.lower() not in {name.lower() for name in more}]
            if fault.get("flip") and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            truncate = len(body) if fault.get("stall") else min(fault.get("truncate", 0), len(body))
            self.answer(status, [*headers, *more.items()], body, truncate)
            if fault.get("stall"):
                self.wfile.flush()
                self.hang(behaving)
                self.close_connection = True

        def arrived(self, environ):
            headers = {name.lower(): value for name, value in self.headers.items()}
            if headers.get("user-agent", "").startswith(_OWN):
                return [None] * 4, {}, None
            query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
            operation = _operation(self.command, environ["PATH_INFO"], query, headers)
            telling = {n: v for n, v in headers.items() if n.startswith("x-amz-") or n in _TELLING}
            return state.arrived(operation, environ["PATH_INFO"], telling)

        def body(self):
            """The body of the request; None if it broke off."""
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) == length:
                return body
            self.close_connection = True
            return None

        def hang(self, behaving):
            """Wait for ``behaving``; whether the client has waited too."""
            while not behaving.wait(0.02) and not self.client_is_gone():
                pass
            self.close_connection = self.client_is_gone()
            return not self.close_connection

        def answer(self, status, headers, body, truncate=0):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection") or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD" and status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: max(0, len(body) - truncate)])
            if truncate:
                self.close_connection = True

        def client_is_gone(self):
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = make_server("127.0.0.1", 0, moto, threaded=True, request_handler=Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


#: What `S3Server.plague` does.
_PLAGUES = [
    {"latency": 0.2},
    {"status": 500, "code": "InternalError"},
    {"status": 503, "code": "SlowDown"},
    {"reset": True},
    {"truncate": 7},
    {"flip": True},
    {"lose": True},
    {"hang": True},
    {"stall": True},
]

_CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")
_TELLING = ("content-md5", "content-length", "expect", "range")


def _error(fault):
    if "code" in fault:
        return f"<Error><Code>{fault['code']}</Code><Message>{fault.get('message', '')}</Message></Error>".encode()
    return fault.get("body", "").encode()


if __name__ == "__main__":
    _serve()
