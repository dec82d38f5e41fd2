"""A small HTTP server in a thread, for services and things that are none which moto cannot be."""

import contextlib
import datetime
import hashlib
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class WebServer:
    """Answers every request with what ``answer`` returns for its method, path, headers and body. A context manager.

    That is a status, a dictionary of headers (None: leave it out), and a body. ``requests``: methods and paths so far;
    ``connections``: how many there have been; ``certificate``: a file with certificate and key, to talk TLS.
    """

    def __init__(self, answer, certificate=None):
        self.requests = []
        self.connections = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                server.connections += 1
                super().setup()

            def handle_one_request(self):
                with contextlib.suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def respond(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.requests.append((self.command, self.path))
                status, headers, data = answer(self.command, urlsplit(self.path).path, self.headers, body)
                self.send_response_only(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = respond

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()


class Objects:
    """Answers as a service that stores objects. ``store`` makes of the bytes sent those that are kept; ``etag`` of
    those the ETag."""

    def __init__(self, store=bytes, etag=lambda data: hashlib.md5(data).hexdigest()):
        self._store = store
        self._etag = etag
        self.kept = {}

    def __call__(self, method, path, headers, body):
        if method == "PUT":
            metadata = {name: value for name, value in headers.items() if name.lower().startswith("x-amz-meta")}
            self.kept[path] = self._store(body), metadata
            return 200, {"ETag": f'"{self._etag(body)}"'}, b""
        data, metadata = self.kept[path]
        size = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"} if "Range" in headers else {}
        return 206 if size else 200, {"ETag": f'"{self._etag(data)}"', **metadata, **size}, data


def make_certificate(path):
    """Write a certificate for 127.0.0.1 that signs itself, and its key, into the file ``path``; return that."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private authority")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return str(path)
