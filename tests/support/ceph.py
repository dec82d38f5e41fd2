"""Ceph's object gateway on loopback, over http and https: a real S3 server for the acceptance tests.

    python -m tests.support.ceph COMMAND...

runs the command once for each of the two, with S3BLOBS_TEST_ENDPOINT and credentials in its environment, and ends with
the first exit status that is not 0. S3BLOBS_TEST_EXPECT names what Ceph has: tests that need one of these capabilities
are not skipped but fail if it is missing. Needs Debian's packages ceph-mon, ceph-osd, radosgw and openssl. One monitor,
one store of objects in memory, one gateway, no authentication between them: nothing but a test.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

from tests.support.s3_services import CAPABILITIES

ACCESS, SECRET = "ceph-access", "ceph-secret"

#: What Ceph 16, which is Debian 12's, lacks over http and over https; later versions have more.
LACKS = {"http": {"SSE-C", "SSE-C copy"}, "https": {"when_supported", "SSE-C copy"}}

CONFIG = """
[global]
fsid = {fsid}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms bind ipv6 = false
mon host = v2:127.0.0.1:{mon}/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {dir}
admin socket = {dir}/$name.asok
log file = {dir}/$name.log
crash dir = {dir}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 2
osd pool default pgp num = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 1
mon max pg per osd = 1000
mon data = {dir}/mon
osd data = {dir}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
osd class update on start = false
[mon.a]
mon addr = v2:127.0.0.1:{mon}/0
[client]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} ssl_certificate={dir}/tls.crt ssl_private_key={dir}/tls.key
rgw dynamic resharding = false
"""  # noqa: E501


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ceph:
    """A running gateway; use as a context manager. ``http`` and ``https``: its URLs; ``ca``: what to trust."""

    def __init__(self):
        self._dir = Path(tempfile.mkdtemp(prefix="ceph"))
        ports = {name: _free_port() for name in ("mon", "http", "https")}
        self.http, self.https = f"http://127.0.0.1:{ports['http']}", f"https://127.0.0.1:{ports['https']}"
        self.ca = self._dir / "tls.crt"
        self._fsid = str(uuid.uuid4())
        self._mon = ports["mon"]
        (self._dir / "ceph.conf").write_text(CONFIG.format(fsid=self._fsid, dir=self._dir, **ports))
        for name in "mon", "osd", "rgw":
            (self._dir / name).mkdir()
        self._environment = {**os.environ, "CEPH_CONF": str(self._dir / "ceph.conf")}
        self._processes = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _run(self, *command):
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
        return done.stdout

    def _serve(self, *command):
        output = open(self._dir / f"{command[0]}.out", "wb")  # noqa: SIM115 (the process has it)
        process = subprocess.Popen([*command, "-f"], env=self._environment, stdout=output, stderr=subprocess.STDOUT)
        self._processes.append(process)

    def _start(self):
        name = "subjectAltName=DNS:localhost,IP:127.0.0.1"
        key = ["-newkey", "rsa:2048", "-nodes", "-keyout", self._dir / "tls.key"]
        self._run(
            "openssl", "req", "-x509", *key, "-days", "2", "-subj", "/CN=localhost", "-addext", name, "-out", self.ca
        )
        monmap = self._dir / "monmap"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", f"[v2:127.0.0.1:{self._mon}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._serve("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "-i", "0")
        self._wait_for(lambda: "1 up" in self._run("ceph", "osd", "stat"))
        self._serve("radosgw", "-n", "client.rgw.a")
        self._wait_for(lambda: urllib.request.urlopen(self.http, timeout=5).status == 200)
        keys = [f"--access-key={ACCESS}", f"--secret-key={SECRET}"]
        self._run("radosgw-admin", "-n", "client.admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)

    def _wait_for(self, condition):
        deadline = time.monotonic() + 60
        while True:
            try:
                if condition():
                    return
            except (OSError, RuntimeError):
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, "Ceph did not start"
            time.sleep(0.2)


def main():
    with Ceph() as ceph:
        for endpoint in ceph.http, ceph.https:
            environment = {
                "S3BLOBS_TEST_ENDPOINT": endpoint,
                "AWS_ACCESS_KEY_ID": ACCESS,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_CA_BUNDLE": str(ceph.ca),
                "S3BLOBS_TEST_EXPECT": ",".join(sorted(set(CAPABILITIES) - LACKS[endpoint.partition(":")[0]])),
            }
            status = subprocess.run(sys.argv[1:], env={**os.environ, **environment}).returncode
            if status:
                sys.exit(status)


if __name__ == "__main__":
    main()
