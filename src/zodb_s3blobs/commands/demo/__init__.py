"""``zodb-s3blobs demo``: show blobs on their way to S3 and back, on this machine and with nothing to set up.

Starts an S3 server (moto) and a ZEO server, commits files as blobs through one client, reads them through another,
compares every byte, and shows what reached S3. Then it stays up for clients of yours until Ctrl-C.
"""

import argparse
import collections
import contextlib
import http.client
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import ProxyHandler, build_opener

import ZEO
from persistent.mapping import PersistentMapping
from prometheus_client.parser import text_string_to_metric_families
from ZODB.blob import Blob
from ZODB.POSException import POSError

from ...s3.keys import FOLDER, OWNER

PACKAGE = Path(__file__).parents[2]
#: What the ZEO server is started with; it takes its values from the environment, see `ZEOServer`.
CONFIG = PACKAGE / "zeo-configs" / "quickstart.conf"

BUCKET = "zodb-demo"
ACCESS_KEY, SECRET_KEY = "demo", "demo-secret"  # made up: moto accepts everything

#: What the extra `demo` of pyproject.toml installs.
MOTO = "moto[s3,server]>=5"

#: The size in bytes of the generated file: large enough for a multipart upload and ranged reads.
LARGE = 20 << 20

#: How long, in seconds, the ZEO server may take to start, and to stop.
_START_TIMEOUT, _STOP_TIMEOUT = 30.0, 10.0

_LOG_LINES = 15

#: The metrics that are shown.
_SHOWN = (
    "s3blobs_cache_requests_total",
    "s3blobs_cache_hits_total",
    "s3blobs_download_waits_total",
    "s3blobs_s3_operations_total",
    "s3blobs_s3_operation_failures_total",
    "s3blobs_s3_received_bytes_total",
    "s3blobs_cache_size_bytes",
    "zeo_loads_total",
)


class DemoError(Exception):
    """The demo has failed; the message is for the person who runs it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``demo``."""
    parser.add_argument("--once", action="store_true", help="end after the round trip instead of staying up")
    parser.add_argument(
        "--dir",
        metavar="DIR",
        type=Path,
        help="a new or empty directory for all files of the demo, which stays; by default a temporary one",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo: 0 if every byte came back, else 1. In the main thread, because of the signals."""
    try:
        with Signals() as signals, _own_environment(), _directory(arguments.dir) as directory:
            demo(directory, arguments.once, signals)
    except BrokenPipeError:
        raise  # not about a file: cli.main knows what to do
    except DemoError as error:
        return _failure(str(error))
    except OSError as error:
        return _failure(f"{error.filename or 'the demo'}: {error.strerror or error}")
    if arguments.dir is not None:
        _say(f"All files of the demo are in {arguments.dir}.")
    return 0


def demo(directory: Path, once: bool, signals: "Signals") -> None:
    """The whole demo in the empty ``directory``; DemoError if anything is not as it should be."""
    files = sample_files(directory / "files")
    with S3Server() as s3, ZEOServer(directory / "server", s3.url) as server:
        _say("ZODB blobs in S3, through a ZEO server and two stock ZEO clients")
        _say()
        _say(f"  S3 server      {s3.url} (moto, in this process)")
        _say(f"  ZEO server     {server.address} (runzeo)")
        _say(f"  configuration  {CONFIG}")
        _say(f"  files          {directory}")
        _say()
        server.start()
        try:
            round_trip(directory, files, s3, server, signals)
        except POSError as error:
            raise DemoError(f"{type(error).__name__}: {error}. {server.last_log_lines()}") from error
        if not (once or signals.received):
            _say_how_to_connect(directory, files, s3, server)
            _stay_up(s3, server, signals)


# The round trip


@dataclass
class Read:
    """How one blob was read: the S3 requests it took, and the seconds until its file was there."""

    requests: "list[Request]"
    seconds: float


def round_trip(directory: Path, files: list[Path], s3: "S3Server", server: "ZEOServer", signals: "Signals") -> None:
    """Commit ``files``, read them cold and warm, and show how that went; DemoError unless it went as it should."""
    signals.check()
    s3.take()
    _say(f"1. Client 1 commits {len(files)} files as blobs. S3 receives:")
    commit(server, directory / "client-1", files)
    server.stop()  # and with it, all that is still to be tidied up in the bucket
    written = s3.take()
    counts = collections.Counter(request.operation for request in written)
    shown = ", ".join(f"{count}_{operation}" for operation, count in counts.items())
    _say(textwrap.fill(shown, 77, initial_indent="   ", subsequent_indent="   ").replace("_", " "))

    signals.check()
    _say("2. The server restarts with an empty cache. Client 2 reads the blobs (cold).")
    shutil.rmtree(server.cache)
    server.start()
    cold = read(server, directory / "client-2", files, s3, "cold")

    signals.check()
    _say("3. Client 2 empties its own cache and reads them again (warm).")
    shutil.rmtree(directory / "client-2")
    warm = read(server, directory / "client-2", files, s3, "warm")

    _say()
    keys = _show_table(files, cold, warm)
    _say()
    for path in files:
        name = path.name
        if not cold[name].requests:
            raise DemoError(f"{name} was read without an S3 request although {server.cache} had been emptied")
        if not any(request.key == keys[name] for request in written):
            raise DemoError(f"{name} was read from the object {keys[name]}, which the commit did not write")
        if warm[name].requests:
            raise DemoError(f"{name} was read from S3 although the server should have it in its cache, {server.cache}")
    _say("Every byte that came back is the byte that was committed.")
    _say()
    _say(f"4. What its metrics say for Prometheus ({server.metrics_url}):")
    for metric, value in server.figures(_SHOWN).items():
        _say(f"   {metric:<40} {value:>12,.0f}")


def sample_files(directory: Path) -> list[Path]:
    """Make ``directory`` with copies of some files of this package, and a large one; returns their paths."""
    directory.mkdir()
    files = [Path(shutil.copy(PACKAGE / name, directory)) for name in ("s3/keys.py", "storage.py", "s3/bucket.py")]
    large = directory / "large.bin"
    large.write_bytes(os.urandom(LARGE))
    return [*files, large]


def commit(server: "ZEOServer", blob_dir: Path, files: list[Path]) -> None:
    """Commit ``files`` in one transaction as ``root.files[name]``."""
    with _client(server, blob_dir) as connection:
        connection.root.files = PersistentMapping()
        for path in files:
            blob = connection.root.files[path.name] = Blob()
            connection.add(blob)  # now, so that its bytes are written in blob_dir
            with open(path, "rb") as source, blob.open("w") as target:
                shutil.copyfileobj(source, target)


def read(server: "ZEOServer", blob_dir: Path, files: list[Path], s3: "S3Server", how: str) -> dict[str, Read]:
    """Read the blobs through a client that has none of them yet; DemoError if one is not as in ``files``."""
    reads = {}
    with _client(server, blob_dir) as connection:
        for path in files:
            blob = connection.root.files[path.name]
            s3.take()
            start = time.perf_counter()
            blob._p_activate()  # gets the file together with the object
            copy = Path(blob.committed())
            seconds = time.perf_counter() - start
            requests = [request for request in s3.take() if request.key.startswith(FOLDER)]
            reads[path.name] = Read(requests, seconds)
            difference = first_difference(path, copy)
            if difference is not None:
                raise DemoError(
                    f"The {how} read of {path.name} brought back other bytes than were committed: the blob "
                    f"({copy.stat().st_size:,} bytes) differs from {path} ({path.stat().st_size:,} bytes) "
                    f"at byte {difference:,}"
                )
    return reads


def first_difference(one: Path, other: Path) -> int | None:
    """The position of the first byte in which two files differ, or None; the end of the shorter one counts."""
    position = 0
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            chunks = first.read(1 << 20), second.read(1 << 20)
            if chunks[0] != chunks[1]:
                pairs = enumerate(zip(*chunks, strict=False))
                return position + next((at for at, (a, b) in pairs if a != b), min(map(len, chunks)))
            if not chunks[0]:
                return None
            position += len(chunks[0])


@contextlib.contextmanager
def _client(server: "ZEOServer", blob_dir: Path) -> Iterator[Any]:
    """The connection of a stock ZEO client; what is changed in the body is committed."""
    db = ZEO.DB(server.port, blob_dir=str(blob_dir))
    try:
        with db.transaction() as connection:
            yield connection
    finally:
        db.close()


# The two servers


@dataclass(frozen=True)
class Request:
    """One request as it reached S3; ``operation`` as S3 calls it."""

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
                """The demo shows the requests in its own way."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._server = make_server("127.0.0.1", 0, self._record, threaded=True, request_handler=Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _record(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # Before the answer: whoever has read a blob finds all its requests in the record. The server's lease of the
        # prefix is not what is to be shown.
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
            raise DemoError(f"moto answered HTTP {status} when it was to make the bucket {BUCKET}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self) -> list[Request]:
        """The requests since the last call."""
        requests = []
        with contextlib.suppress(queue.Empty):
            while True:
                requests.append(self._requests.get_nowait())
        return requests

    def wait_for_request(self, timeout: float) -> Request | None:
        """The next request, or None if there is none for ``timeout`` seconds."""
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
        self.cache = directory / "blobcache"  # as in CONFIG
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
                start_new_session=True,  # Ctrl-C is for the demo, which ends the server while S3 is still there
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
        """End the process, if there is one, and wait until it is gone."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def figures(self, names: Iterable[str]) -> dict[str, float]:
        """The metrics ``names``, each summed over its labels."""
        with build_opener(ProxyHandler({})).open(self.metrics_url, timeout=_STOP_TIMEOUT) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        sums: collections.Counter[str] = collections.Counter()
        for sample in (sample for family in families for sample in family.samples):
            sums[sample.name] += sample.value  # type: ignore[assignment]
        return {name: sums[name] for name in names}

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is not None and self._process.poll() is not None

    def last_log_lines(self) -> str:
        """What the process wrote last, for an error message."""
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
            return bool(connection.recv(64))  # ZEO speaks first; not to listen would be an error in its log
    except OSError:
        return False


# What the person at the terminal sees


def _show_table(files: list[Path], cold: dict[str, Read], warm: dict[str, Read]) -> dict[str, str]:
    """Print a line for each file; returns the key of each, which is the one that the cold read asked S3 for."""
    keys = {name: one.requests[0].key if one.requests else "?" for name, one in cold.items()}
    row = "{:<10} {:>7}  {:<28}  {:<14}  {}".format
    _say(row("", "", "", "cold:", "warm:"))
    _say(row("file", "size", f"key in bucket {BUCKET}", "S3 requests", "S3 requests"))
    for path in files:
        name = path.name
        _say(row(name, _size(path.stat().st_size), keys[name], _shown_read(cold[name]), _shown_read(warm[name])))
    _say("miss: the server fetches the blob from S3, a large one in parallel ranges;")
    _say("hit: the server has it in its cache.")
    return keys


def _shown_read(one: Read) -> str:
    count = len(one.requests)
    return f"{count} {'miss' if count else 'hit'} {one.seconds * 1000:4.0f} ms"


def _say_how_to_connect(directory: Path, files: list[Path], s3: S3Server, server: ZEOServer) -> None:
    _say(
        f"""
Everything stays up until Ctrl-C:

  ZEO server           {server.address}
  metrics              {server.metrics_url}
  S3 endpoint, bucket  {s3.url}, {BUCKET}
  S3 credentials       {ACCESS_KEY}, {SECRET_KEY} (made up)
  database, log        {directory / "server"}

To be a client too, start Python in another terminal:

  {sys.executable}

Paste these lines into it, and watch the new blob reach S3 here:

import ZEO
from ZODB.blob import Blob
conn = ZEO.connection({server.port}, blob_dir={str(directory / "client-3")!r})
conn.root.greeting = Blob(b"Hello from client 3")
conn.transaction_manager.commit()
print(conn.root.greeting.open().read().decode())

The last line prints the blob without an S3 request: the client has it.

S3 requests from now on:"""
    )


def _stay_up(s3: S3Server, server: ZEOServer, signals: "Signals") -> None:
    """Show the S3 requests as they come, until a signal does."""
    s3.take()
    while not signals.received:
        request = s3.wait_for_request(timeout=0.2)
        if request is not None:
            _say(f"  {time.strftime('%H:%M:%S')}  {request.operation}  {request.key}")
        if server.has_ended():
            raise DemoError(f"the ZEO server has ended. {server.last_log_lines()}")
    _say("\nStopping.")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _say(text: str = "") -> None:
    print(text, flush=True)


def _failure(sentence: str) -> int:
    sys.stdout.flush()
    print(f"zodb-s3blobs demo: {sentence}", file=sys.stderr)
    return 1


# Beginning and end


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """What the user has set up for Amazon S3 must neither get in the way, of moto in this process too, nor be used."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_"):
            del os.environ[name]
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    """The directory of the demo's files: the ``wanted`` one, or a temporary one that does not outlive the body."""
    if wanted is None:
        directory = Path(tempfile.mkdtemp(prefix="zodb-s3blobs-demo-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory)
    else:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            # The objects of an earlier demo are gone: a database that needs them is of no use.
            raise DemoError(f"{wanted} is not empty: name a new or empty directory")
        yield wanted.absolute()


class Signals:
    """Whether the demo has been asked to end: a context manager, for the main thread.

    No exception, which might strike in a library that loses it, or while the servers are being ended.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "Signals":
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, *args: object) -> None:
        self.received = True

    def check(self) -> None:
        """DemoError if the demo is to end before it has shown what it is to show."""
        if self.received:
            raise DemoError("interrupted before every file was compared")
