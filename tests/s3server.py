"""An S3 server for tests: moto in a process of its own, with a request log and faults in front of it.

Run as a script it prints its port and serves until its standard input closes. `S3Server` starts it and talks to it:
what was asked of it, and how it is to misbehave, go through ``/_control``.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import parse_qs

import boto3
import botocore.config


@dataclass
class Request:
    """One request as the server saw it; ``operation`` as S3 calls it."""

    operation: str
    path: str
    status: int


class S3Server:
    """A running server. Use as a context manager."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test-secret",
            config=botocore.config.Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        """End the process; afterwards the port refuses connections."""
        self._process.kill()
        self._process.communicate()

    def _control(self, **message):
        request = urllib.request.Request(f"{self.url}/_control", json.dumps(message).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def requests(self, operation=None):
        """The requests since the last `forget`, those of ``operation`` if given, leaving out this object's own."""
        log = [Request(*entry) for entry in self._control(do="log")]
        return [request for request in log if operation in (None, request.operation)]

    def forget(self):
        """Empty the log."""
        self._control(do="forget")

    def misbehave(self, *, operation=".*", latency=0.0, status=None, code="", hang=False, times=None, **more):
        """Do so with the next ``times`` requests (None: all) whose operation matches the regular expression.

        ``latency``: seconds before the answer; ``status`` and ``code``: the error to answer with; ``hang``: never
        answer; ``truncate``: bytes of the body to leave out; ``flip``: damage a byte of the body; ``lose``: do what
        is asked, then cut the connection; ``ignore_range``: answer a ranged GET with everything.
        """
        fault = {"operation": operation, "latency": latency, "status": status, "code": code, "hang": hang, **more}
        self._control(do="misbehave", fault=fault, times=times)

    def behave(self):
        """Misbehave no more."""
        self._control(do="behave")

    def bucket(self, name):
        """Make a bucket."""
        self._own(self.client.create_bucket, Bucket=name)
        return name

    def keys(self, bucket):
        """All keys of a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return self._own(lambda: [found["Key"] for page in pages for found in page.get("Contents", ())])

    def _own(self, call, *args, **kwargs):
        log = self._control(do="log")
        try:
            return call(*args, **kwargs)
        finally:
            self._control(do="restore", log=log)


def _operation(environ):
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    has_key = environ["PATH_INFO"].strip("/").count("/") > 0
    if method == "PUT" and "partNumber" in query:
        return "UploadPartCopy" if "HTTP_X_AMZ_COPY_SOURCE" in environ else "UploadPart"
    if method == "PUT" and has_key:
        return "CopyObject" if "HTTP_X_AMZ_COPY_SOURCE" in environ else "PutObject"
    if method == "POST":
        names = {"delete": "DeleteObjects", "uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload"}
        return next((names[name] for name in names if name in query), "POST")
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    if method == "GET":
        return "GetObject" if has_key else "ListObjects"
    return "HeadObject" if method == "HEAD" and has_key else f"{method} bucket"


class _Front:
    """The WSGI application in front of moto."""

    def __init__(self, app):
        self._app = app
        self._lock = threading.Lock()
        self._log = []
        self._faults = []  # [times or None, fault]

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == "/_control":
            return self._control(environ, start_response)
        operation = _operation(environ)
        fault = self._fault(operation)
        if fault.get("ignore_range"):
            environ.pop("HTTP_RANGE", None)
        if fault.get("latency"):
            time.sleep(fault["latency"])
        if fault.get("hang"):
            threading.Event().wait()
        answer = []
        if fault.get("status"):
            body = [f"<Error><Code>{fault['code']}</Code><Message>as told</Message></Error>".encode()]
            answer = [f"{fault['status']} as told", [("Content-Type", "application/xml")]]
        else:
            body = list(self._app(environ, lambda status, headers, exc_info=None: answer.extend((status, headers))))
        with self._lock:
            self._log.append((operation, environ["PATH_INFO"], int(answer[0].split()[0])))
        if fault.get("lose"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        whole = b"".join(body)
        if fault.get("flip") and whole:
            whole = bytes([whole[0] ^ 1]) + whole[1:]
        if fault.get("truncate"):
            start_response(answer[0], answer[1])
            environ["werkzeug.socket"]
            return [whole[: -fault["truncate"]]]
        start_response(answer[0], answer[1])
        return [whole]

    def _fault(self, operation):
        with self._lock:
            for entry in self._faults:
                times, fault = entry
                if times != 0 and re.fullmatch(fault["operation"], operation):
                    if times is not None:
                        entry[0] -= 1
                    return fault
        return {}

    def _control(self, environ, start_response):
        message = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with self._lock:
            if message["do"] == "forget":
                self._log.clear()
            elif message["do"] == "restore":
                self._log[:] = [tuple(entry) for entry in message["log"]]
            elif message["do"] == "misbehave":
                self._faults.append([message["times"], message["fault"]])
            elif message["do"] == "behave":
                self._faults.clear()
            body = json.dumps(self._log if message["do"] == "log" else None).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def _serve():
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # keeps connections open, as every S3 server does
    app = _Front(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
