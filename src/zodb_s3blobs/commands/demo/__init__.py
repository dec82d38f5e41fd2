"""``zodb-s3blobs demo``: show blobs on their way to S3 and back, on this machine and with nothing to set up.

Starts an S3 server (moto) and a ZEO server, commits files as blobs through one client, reads them through another,
compares every byte, and shows the requests to S3. Then it stays up for your own clients until Ctrl-C.
"""

import argparse
import collections
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ZEO
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.POSException import POSError

from ...s3.keys import FOLDER
from . import servers
from .servers import ACCESS_KEY, BUCKET, PACKAGE, SECRET_KEY, DemoError, Request, S3Server, ZEOServer

#: The size in bytes of the generated file: large enough for a multipart upload and ranged reads.
LARGE = 20 << 20

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
    """Run the demo; return 0 if every byte came back, else 1. Call this in the main thread, because of the signals."""
    try:
        with Signals() as signals, _own_environment(), _directory(arguments.dir) as directory:
            demo(directory, arguments.once, signals)
    except BrokenPipeError:
        raise  # stdout was closed, which cli.main handles
    except DemoError as error:
        return _failure(str(error))
    except OSError as error:
        return _failure(f"{error.filename or 'the demo'}: {error.strerror or error}")
    if arguments.dir is not None:
        _say(f"All files of the demo are in {arguments.dir}.")
    return 0


def demo(directory: Path, once: bool, signals: "Signals") -> None:
    """Run the whole demo in the empty ``directory``. Raises DemoError if a step fails."""
    files = sample_files(directory / "files")
    with S3Server() as s3, ZEOServer(directory / "server", s3.url) as server:
        _say("ZODB blobs in S3, through a ZEO server and two stock ZEO clients")
        _say()
        _say(f"  S3 server      {s3.url} (moto, in this process)")
        _say(f"  ZEO server     {server.address} (runzeo)")
        _say(f"  configuration  {servers.CONFIG}")
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
    """The read of one blob: its S3 requests, and the seconds until the client had the file."""

    requests: "list[Request]"
    seconds: float


def round_trip(directory: Path, files: list[Path], s3: "S3Server", server: "ZEOServer", signals: "Signals") -> None:
    """Commit ``files``, read them cold and warm, and print the requests of each step. Raises DemoError."""
    signals.check()
    s3.take()
    _say(f"1. Client 1 commits {len(files)} files as blobs. S3 receives:")
    commit(server, directory / "client-1", files)
    server.stop()  # completes the clean-up in the bucket
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
    _say(f"4. The server's metrics for Prometheus ({server.metrics_url}):")
    for metric, value in server.figures(_SHOWN).items():
        _say(f"   {metric:<40} {value:>12,.0f}")


def sample_files(directory: Path) -> list[Path]:
    """Make ``directory`` with copies of some files of this package, and a large one; return their paths."""
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
            connection.add(blob)  # before the bytes are written, so that they go to blob_dir
            with open(path, "rb") as source, blob.open("w") as target:
                shutil.copyfileobj(source, target)


def read(server: "ZEOServer", blob_dir: Path, files: list[Path], s3: "S3Server", how: str) -> dict[str, Read]:
    """Read the blobs through a client without cached blobs. Raises DemoError if one differs from its file."""
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
    """Return the position of the first byte in which two files differ, or None; a missing byte is a difference."""
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
    """Open a connection of a stock ZEO client; commit the changes of the body."""
    db = ZEO.DB(server.port, blob_dir=str(blob_dir))
    try:
        with db.transaction() as connection:
            yield connection
    finally:
        db.close()


# The output


def _show_table(files: list[Path], cold: dict[str, Read], warm: dict[str, Read]) -> dict[str, str]:
    """Print a line for each file; return file name -> key, taken from the requests of the cold read."""
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
    """Print the S3 requests as they arrive, until a signal arrives."""
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
    """Hide the user's AWS settings from the demo, and from moto in this process, during the body."""
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
    """Yield the directory of the demo's files: the ``wanted`` one, or a temporary one, deleted after the body."""
    if wanted is None:
        directory = Path(tempfile.mkdtemp(prefix="zodb-s3blobs-demo-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory)
    else:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            # The objects of an earlier demo are gone, so a database that needs them would not work.
            raise DemoError(f"{wanted} is not empty: name a new or empty directory")
        yield wanted.absolute()


class Signals:
    """A recorder of the signals that end the demo: a context manager, for the main thread.

    A signal does not raise an exception, which a library could lose, or which could interrupt the end of the servers.
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
        """Raise DemoError if a signal has arrived."""
        if self.received:
            raise DemoError("interrupted before every file was compared")
