"""The crash test: kill -9 of the ZEO server, of its clients, and of the S3 server, at random moments.

    python -m tests.resilience.crash.crash --kills 300 [--seed 1]

A real runzeo, writers, readers and a packer in processes of their own, and an S3 server. In the place of the S3 server
a proxy in front of it is killed: see proxy.py. With S3BLOBS_TEST_ENDPOINT and credentials in the environment, that is
in front of that service, else of moto.

In each round all clients work, one to three processes are killed, and started again after a while. Then the clients
stop, and this is looked at (see `Crash.check`): what was acknowledged is there, nothing of what was not, no lock is
held, and nothing is left over. Which processes are killed and when follows from the seed, and so does what each client
does, as far as it does not depend on what it finds; how far each of them has come at that moment does not.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

from persistent.mapping import PersistentMapping  # noqa: E402
from ZODB.blob import Blob  # noqa: E402
from ZODB.FileStorage import FileStorage  # noqa: E402
from ZODB.POSException import StorageError  # noqa: E402

from tests.resilience.crash.client import WRONG, allowed, connect, content, is_whole, tokens  # noqa: E402
from tests.support.s3_services import Service  # noqa: E402
from tests.support.sites import names  # noqa: E402
from tests.support.zeo_server import ZEOServer, free_address  # noqa: E402
from zodb_s3blobs.commit.kept import KEPT_FOR  # noqa: E402
from zodb_s3blobs.s3.keys import Keys  # noqa: E402

WRITERS, READERS = 3, 2
CLIENTS = [*(f"writer {n}" for n in range(WRITERS)), *(f"reader {n}" for n in range(READERS)), "packer 0"]

#: Who is killed, and how often compared to others.
VICTIMS = {"server": 10, "s3": 8, **dict.fromkeys(CLIENTS, 2)}

#: How long, in seconds, what happens in the background may take: far longer than it does.
PATIENCE = 30

#: What belongs to a cache directory.
OWN = {"blobs", "incoming", "tmp", "index", "index.new", ".zodb-s3blobs.lock", ".zodb-s3blobs.id"}

KEYS = Keys("crash")

SECTION = """
<s3blobstorage 1>
  bucket-name {bucket}
  s3-prefix crash
  s3-endpoint-url {proxy}
  s3-region us-east-1
  s3-access-key {access}
  s3-secret-key {secret}
  s3-addressing-style path
  s3-stage-threshold 100KB
  s3-multipart-threshold 5MB
  gc-max-delete-percent 100
  cache-dir {cache}
  cache-size 2MB
  <filestorage>
    path {dir}/Data.fs
  </filestorage>
</s3blobstorage>
"""


@dataclass
class Round:
    """``victims``: who is killed, and how many seconds after the one before; ``down``: for how many seconds.

    ``start``: how many seconds after its start a server is killed that is to replace a killed one; 0: it is not.
    """

    victims: list[tuple[str, float]]
    down: float
    start: float


def schedule(seed, kills):
    """The rounds, ``kills`` kills together, not counting those of servers that have just been started."""
    chance = random.Random(f"schedule {seed}")
    rounds = []
    while kills:
        count = min(kills, chance.choice([1, 1, 2, 3]))
        kills -= count
        victims = []
        while len(victims) < count:
            (victim,) = chance.choices(list(VICTIMS), list(VICTIMS.values()))
            if victim not in victims:
                victims.append(victim)
        start = chance.uniform(0.3, 1.5) if "server" in victims and chance.random() < 0.3 else 0
        rounds.append(Round([(one, chance.uniform(0.05, 1)) for one in victims], chance.uniform(0, 0.5), start))
    return rounds


def wait_until(condition, what, patience=PATIENCE):
    """Wait until ``condition`` returns nothing any more; or AssertionError with what it returns."""
    deadline = time.monotonic() + patience
    while found := condition():
        assert time.monotonic() < deadline, f"{what}: {found}"
        time.sleep(0.05)


class Process:
    """A script of this directory that says in a line that it is ready, and can be killed."""

    def __init__(self, script, *arguments, log):
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / script), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self._log = log

    def line(self):
        """The next line that it prints."""
        out = self._process.stdout
        assert select.select([out], [], [], 2 * PATIENCE)[0], f"{self._process.args} says nothing"
        line = out.readline()
        assert line, f"{self._process.args} has ended, status {self._process.wait()}: {self._log.read_text()}"
        return line

    def tell(self, byte):
        """Write that to its standard input; it is no error if it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(byte)

    def kill(self):
        """kill -9. Returns its status if it had ended before."""
        ended = self._process.poll()
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        return ended


class Crash:
    """One run; use as a context manager. Everything it writes is below ``directory``.

    ``figures``: what was done and killed so far.
    """

    def __init__(self, directory, seed):
        self.directory = Path(directory)
        self.figures = Counter()
        self._seed = seed
        self._lives = Counter()
        self._clients = {}
        self._excused = set()  # what killed servers, and those without S3, have left in the bucket
        self._stack = contextlib.ExitStack()
        self._number = 0

    def __enter__(self):
        with self._stack:
            self._service = self._stack.enter_context(
                Service("real" if os.environ.get("S3BLOBS_TEST_ENDPOINT") else "moto")
            )
            self._proxy_port = free_address()[1]
            settings = {
                **vars(self._service),
                "proxy": f"http://127.0.0.1:{self._proxy_port}",
                "dir": self.directory,
            }
            self._stack.callback(self._abort_unfinished)  # or the bucket could not be deleted
            self._start_s3()
            self._stack.callback(lambda: self._proxy.kill())
            self._server = ZEOServer(
                self.directory,
                None,
                storages=lambda zeo: SECTION.format(**settings, cache=self.directory / zeo["cache"]),
            )
            self._stack.enter_context(self._server)
            with self._database() as db, db.transaction() as connection:
                for name in CLIENTS:
                    connection.root()[name] = PersistentMapping()
                connection.root()["checks"] = PersistentMapping()
            self._stack.callback(self._end_clients)
            for name in CLIENTS:
                self._start_client(name)
            self._stop_clients()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc):
        self._stack.close()

    # The processes

    def _start_s3(self):
        self._proxy = Process("proxy.py", self._proxy_port, self._service.endpoint, log=self.directory / "proxy.log")
        self._proxy.line()

    def _start_client(self, name):
        self._lives[name] += 1
        kind, number = name.split()
        self._clients[name] = Process(
            "client.py",
            *(kind, number, self._lives[name], self._seed, *self._server.address, self.directory),
            log=self.directory / f"{name}.log",
        )

    def _end_clients(self):
        for client in self._clients.values():
            client.kill()

    def _kill(self, victim):
        if victim == "server":
            self._server.kill()
        elif victim == "s3":
            self._proxy.kill()
        else:
            status = self._clients[victim].kill()
            assert status is None, self._last_word(victim, status)
            shutil.rmtree(self.directory / f"blobs of {victim}, {self._lives[victim]}", ignore_errors=True)

    def _start(self, victim):
        if victim == "server":
            self._server.start()
        elif victim == "s3":
            self._start_s3()
        else:
            self._start_client(victim)

    def _kill_starting(self, after):
        """Start a server, and kill it so many seconds later."""
        command = [sys.executable, "-m", "ZEO.runzeo", "-C", str(self.directory / "zeo.conf")]
        with open(self.directory / "output", "ab") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)
        time.sleep(after)
        assert server.poll() is None, self._server.output()
        server.kill()
        server.wait()
        self.figures["killed when it started: server"] += 1

    def _last_word(self, name, status):
        if status == WRONG:
            return f"{name}: " + (self.directory / name).read_text().splitlines()[-1]
        return f"{name} has ended, status {status}: {(self.directory / f'{name}.log').read_text()}"

    def _stop_clients(self):
        """Wait until all of them do nothing, and add up their figures."""
        for name, client in self._clients.items():
            try:
                self.figures.update(json.loads(client.line()))
            except AssertionError:
                raise AssertionError(self._last_word(name, client.kill())) from None

    @contextlib.contextmanager
    def _database(self):
        """A database on a client that is new in every respect."""
        blob_dir = tempfile.mkdtemp(dir=self.directory, prefix="blobs-")
        db = connect(self._server.address, blob_dir)
        try:
            yield db
        finally:
            db.close()
            shutil.rmtree(blob_dir)

    # What is done

    def run(self, kills, said=lambda sentence: None):
        """All of it: the rounds, with a check after each, and `finish`. ``said`` is told how far it is."""
        for number, one in enumerate(schedule(self._seed, kills), 1):
            victims = [victim for victim, _ in one.victims]
            said(f"round {number}: {', '.join(f'{victim} after {after:.2f} s' for victim, after in one.victims)}")
            self.round(one)
            self.check(server_or_s3=not {"server", "s3"}.isdisjoint(victims), packer="packer 0" in victims)
        self.finish()

    def round(self, one):
        """Let all clients work, kill, start again, and let them work on and stop."""
        for client in self._clients.values():
            client.tell(b"g")
        for victim, after in one.victims:
            time.sleep(after)
            self._kill(victim)
            self.figures[f"killed: {victim.split()[0]}"] += 1
        time.sleep(one.down)
        if one.start:
            self._kill_starting(one.start)
        for victim, _ in one.victims:
            self._start(victim)
        victims = {victim for victim, _ in one.victims}
        for name in victims.intersection(self._clients):
            self._clients[name].line()  # it is connected
            self._clients[name].tell(b"g")
        time.sleep(0.3)
        for client in self._clients.values():
            client.tell(b"s")
        self._stop_clients()

    def check(self, server_or_s3, packer):
        """While nobody does anything: AssertionError if something is not as it must be.

        ``server_or_s3``, ``packer``: whether one of them has been killed.
        """
        self._commit()
        with self._database() as db:
            if packer:
                self._pack(db)  # the server has gone on with the last one; if it met another, that has to be done again
            self._check_contents(db)
        self._check_cache()
        self._check_bucket(server_or_s3)

    def _commit(self):
        """Nobody holds the commit lock: a new client can commit blobs, which are read by another."""
        with ThreadPoolExecutor(1) as pool, self._database() as db:
            pool.submit(self._commit_with, db).result(PATIENCE)
        with self._database() as db, db.transaction() as connection:
            for entry in connection.root()["checks"].values():
                with entry["blob"].open() as file:
                    assert file.read() == content(entry["token"])

    def _commit_with(self, db):
        self._number += 1
        with db.transaction() as connection:
            for size in 1000, 200_000:
                token = f"check-{self._number}-{size}"
                entry = connection.root()["checks"].setdefault(str(size), PersistentMapping())
                entry["token"] = token
                with entry.setdefault("blob", Blob()).open("w") as file:
                    file.write(content(token))

    def _check_contents(self, db):
        """What each writer has been told is committed is there byte for byte, and nothing else of it is."""
        with db.transaction() as connection:
            for name in CLIENTS:
                mapping = connection.root()[name]
                states = allowed(self.directory / name)
                assert tokens(mapping) in states, f"{name}: the database has {tokens(mapping)}, and not one of {states}"
                for entry in mapping.values():
                    with entry["blob"].open() as file:
                        assert file.read() == content(entry["token"]), f"{name}: {entry['token']} is damaged"
                    self.figures["blobs compared"] += 1

    def _check_cache(self):
        """No temporary file stays, and what is in the cache is whole."""
        cache = self._server.cache_dir
        wait_until(lambda: [*os.listdir(cache / "tmp"), *os.listdir(cache / "incoming")], "temporary files stay")
        assert set(os.listdir(cache)) <= OWN
        for path in cache.glob("blobs/*/*"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                assert is_whole(path.read_bytes()), f"{path} is not whole"

    def _check_bucket(self, server_or_s3):
        """A server that lives, and whose S3 service does, leaves nothing behind, whatever its clients do."""
        if server_or_s3:
            self._excused = self._leftovers()
        else:
            # A new server hands out oids anew that clients still hold from the killed one. Two clients that create
            # objects with the same oid are in conflict, and the uploads of the loser are kept for its retry.
            patience = KEPT_FOR + PATIENCE
            wait_until(lambda: self._leftovers() - self._excused, "something stays in the bucket", patience)

    def _leftovers(self):
        """All keys that belong to no committed revision, and unfinished uploads."""
        storage = FileStorage(str(self.directory / "Data.fs"), read_only=True)
        try:
            committed = {KEYS.key(*name) for name in names(storage)}
        finally:
            storage.close()
        return self._service.keys("") - committed - {"crash/owner.json"} | self._unfinished()

    def _unfinished(self):
        """(key, upload id) of the unfinished uploads in parts."""
        answer = self._service.client.list_multipart_uploads(Bucket=self._service.bucket)
        return {(upload["Key"], upload["UploadId"]) for upload in answer.get("Uploads", ())}

    def _abort_unfinished(self):
        for key, number in self._unfinished():
            self._service.client.abort_multipart_upload(Bucket=self._service.bucket, Key=key, UploadId=number)

    def _pack(self, db):
        """Pack, as soon as no other pack is under way."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return db.pack()
            except StorageError as error:
                busy = "Already packing" in str(error) or "another pack is still" in str(error)
                assert busy and time.monotonic() < deadline, error
                time.sleep(0.1)

    def finish(self):
        """A last pack leaves exactly the live blobs, and what the manual says stays for a day."""
        self._commit()  # so that what is left of unfinished commits is older than the last transaction
        with self._database() as db:
            self._pack(db)
            with db.transaction() as connection:
                root = connection.root()
                live = {}
                for mapping in (root[name] for name in (*CLIENTS, "checks")):
                    for entry in mapping.values():
                        entry["blob"]._p_activate()
                        live[KEYS.key(entry["blob"]._p_oid, entry["blob"]._p_serial)] = content(entry["token"])
        blobs = self._service.keys("crash/blobs/")
        assert blobs == set(live), f"too many: {blobs - set(live)}, too few: {set(live) - blobs}"
        for key, data in live.items():
            assert self._service.read(key) == data, f"{key} is damaged"
        others = self._service.keys("") - blobs - {"crash/owner.json"}
        assert all(key.startswith("crash/staged/") for key in others), others
        left = others | self._unfinished()
        assert left <= self._excused, f"no killed server has left {left - self._excused}"
        self.figures["live blobs at the end"], self.figures["left for a day"] = len(live), len(left)

        self._server.stop()
        self._server.cache_name = "another cache"
        self._server.start()
        self.check(server_or_s3=True, packer=False)  # all of it comes from the bucket


def main():
    parser = argparse.ArgumentParser(description="Kill -9 everything, again and again, and look what is left.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what clients say when their server dies
    signal.signal(signal.SIGTERM, lambda *what: sys.exit(1))  # or the processes would stay
    directory = tempfile.mkdtemp(prefix="crash-")
    print(f"--kills {arguments.kills} --seed {arguments.seed}, in {directory}", flush=True)
    started = time.monotonic()
    with Crash(directory, arguments.seed) as crash:
        crash.run(
            arguments.kills, lambda sentence: print(f"{time.monotonic() - started:6.1f} s  {sentence}", flush=True)
        )
    shutil.rmtree(directory)
    for name, number in sorted(crash.figures.items()):
        print(f"{number:8}  {name}")


if __name__ == "__main__":
    main()
