"""A server in front of the S3 server of the tests that answers some requests itself: services and proxies of all kinds.

`Gate` asks a function about each request, by method, path and headers; `certificate` is for one that speaks TLS.
"""

import datetime
import email.utils
import http.client
import http.server
import ipaddress
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PAGE = "<html><head><title>{0}</title></head><body>{0}</body></html>"


@dataclass
class Ask:
    """A request, before its body has been read; ``headers``: in lower case."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def length(self):
        return int(self.headers.get("content-length", 0))


@dataclass
class Answer:
    """What to answer instead of passing a request on; ``early``: without reading its body, and close the connection."""

    status: int
    body: str = ""
    type: str = "application/xml"
    early: bool = False
    headers: tuple = ()


def error(status, code, **more):
    """The `Answer` of an S3 service that refuses."""
    return Answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>-</Message></Error>", **more)


def page(status, **more):
    """The `Answer` of a web server."""
    return Answer(status, PAGE.format(status), "text/html", **more)


class Gate:
    """A running server. Use as a context manager.

    ``judge`` gets an `Ask` and returns an `Answer`, or None for a request to be passed on to the server at ``url``, as
    the judge may have changed it. ``asked``: all requests so far; ``later``: by how many seconds its clock is fast; the
    answers that are passed on tell its time then.
    """

    def __init__(self, url, judge, tls=None, later=None):
        self.asked = asked = []
        backend = urlsplit(url).netloc if url else None

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except (OSError, ValueError):
                    self.close_connection = True

            def handle_expect_100(self):
                # The judge first: a proxy refuses before the body comes.
                return True

            def do_any(self):
                ask = Ask(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
                asked.append(Ask(ask.method, ask.path, dict(ask.headers)))
                answer = judge(ask)
                if answer is not None and answer.early:
                    self.close_connection = True
                    self.reply(answer)
                    return
                if ask.headers.get("expect") == "100-continue":
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = self.rfile.read(ask.length)
                if len(body) < ask.length:
                    self.close_connection = True
                    return
                if answer is not None:
                    self.reply(answer)
                    return
                # moto would take a bucket from the name of the host.
                dropped = "expect", "connection", "host"
                headers = {name: value for name, value in ask.headers.items() if name not in dropped}
                connection = http.client.HTTPConnection(backend)
                connection.request(ask.method, ask.path, body, headers)
                got = connection.getresponse()
                body = got.read()
                self.send_response_only(got.status)
                for name, value in got.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                if later is not None:
                    self.send_header("Date", email.utils.formatdate(time.time() + later, usegmt=True))
                self.end_headers()
                self.wfile.write(body)
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def reply(self, answer):
                body = b"" if self.command == "HEAD" else answer.body.encode()
                self.send_response_only(answer.status)
                if answer.body:
                    self.send_header("Content-Type", answer.type)
                self.send_header("Content-Length", str(len(body)))
                for name, value in answer.headers:
                    self.send_header(name, value)
                if self.close_connection:
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None
        if tls is not None:
            # The handshake belongs into the thread of the connection.
            listener = self._server.socket
            self._server.socket = tls.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
        scheme = "http" if tls is None else "https"
        self.port = self._server.server_port
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()


def certificate(directory, address="127.0.0.1", days=1):
    """Make a certificate of its own authority, that ends in ``days``; return a context for a `Gate`, and its file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(end - datetime.timedelta(9))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = directory / f"certificate-{made.serial_number}.pem"
    pem.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context, pem
