"""An S3 service that costs next to no processor, so that what uses it can be measured on the same machine.

    python cannedservice.py KEYS_FILE LATENCY_SECONDS

prints the port on which it listens, and serves one bucket until its standard input closes. It lists the keys that the
file names, one a line in the order of their bytes, from answers that it has made before. Other objects, such as
owner.json, it keeps in memory. It knows no conditions, and takes no note of deletions.
"""

import hashlib
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

_ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;9dd4e461268c8034f5c8564e155c67a6&quot;</ETag><Size>1000</Size><StorageClass>STANDARD</StorageClass>"
    "</Contents>"
)
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<{0} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{1}</{0}>'


def _etag(body):
    return f'"{hashlib.md5(body).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of a server and of a garbage collection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    entries: ClassVar[list[bytes]] = []
    objects: ClassVar[dict[str, tuple[bytes, str]]] = {}
    latency = 0.0

    def _answer(self, status, body=b"", **headers):
        time.sleep(self.latency)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _asked(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        split = urlsplit(self.path)
        return split.path, parse_qs(split.query, keep_blank_values=True), body

    def do_GET(self):
        path, query, _ = self._asked()
        if path.strip("/").count("/") == 0:
            self._answer(200, self._listing(query))
        elif path in self.objects:
            body, modified = self.objects[path]
            self._answer(200, body, ETag=_etag(body), Last_Modified=modified)
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>No such key.</Message></Error>")

    do_HEAD = do_GET

    def _listing(self, query):
        if "uploads" in query:
            return _XML.format("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>").encode()
        is_blobs = query.get("prefix", [""])[0].endswith("blobs/")
        entries = self.entries if is_blobs else []
        start = int(query.get("continuation-token", ["0"])[0])
        stop = start + int(query.get("max-keys", ["1000"])[0])
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < len(entries) else ""
        head = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}"
        return _XML.format("ListBucketResult", head + b"".join(entries[start:stop]).decode()).encode()

    def do_PUT(self):
        path, _, body = self._asked()
        self.objects[path] = body, formatdate(usegmt=True)
        self._answer(200, ETag=_etag(body))

    def do_DELETE(self):
        path, _, _ = self._asked()
        self.objects.pop(path, None)
        self._answer(204)

    def do_POST(self):
        self._asked()
        self._answer(200, _XML.format("DeleteResult", "").encode())

    def log_message(self, *args):
        pass


def main(keys_file, latency):
    with open(keys_file) as lines:
        Handler.entries = [_ENTRY.format(line.rstrip()).encode() for line in lines]
    Handler.latency = float(latency)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
