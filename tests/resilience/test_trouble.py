"""What an operator may meet: a full or read-only disk, a deleted cache-dir, wrong clocks, old credentials, a policy.

Each on a real server with stock clients: what goes on, what fails and how it says so, that nothing is lost or deleted,
and that it works again when the trouble is over. OPERATIONS.md ("By cause") promises what is tested here.
"""

import contextlib
import datetime
import errno
import http.client
import http.server
import json
import os
import re
import shutil
import subprocess
import textwrap
import threading
import time

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64

from tests.support.life import Life, name_of
from tests.support.speed import slow, slow_after
from tests.support.zeo_clients import (
    MB,
    blob,
    commit_blob,
    leftovers,
    operations,
    read,
    wait_for,
    write,
)
from tests.support.zeo_server import SECTION, ZEOServer
from zodb_s3blobs.bases import adapter_for

DAY = 24 * 3600


# What every trouble is measured by


@pytest.fixture
def live(s3, bucket_name, start):
    """Starts a server, with keywords as `ZEOServer`'s, and a `Life` on it."""

    def live(**kwargs):
        return Life(start(metrics=True, **kwargs), s3, bucket_name)

    return live


def figure(server, name, **labels):
    return server.metrics()(name, **labels)


# The disk of cache-dir


class SmallDisk:
    """A file system of its own for cache-dir, which can be filled and made read-only."""

    def __init__(self, directory, options):
        self.directory = directory
        directory.mkdir()
        try:
            self._mount("-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs")
        except FileNotFoundError:
            pytest.skip("a disk of its own for cache-dir takes the command mount")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a disk of its own for cache-dir takes the right to mount one: {error.stderr.strip()}")

    def _mount(self, *arguments):
        subprocess.run(["mount", *arguments, str(self.directory)], capture_output=True, text=True, check=True)

    @contextlib.contextmanager
    def read_only(self):
        """Nothing can be written while the body runs."""
        # The file system itself cannot become read-only while the lock file is open; so it is mounted over itself.
        self._mount("--bind", str(self.directory))
        self._mount("-o", "remount,bind,ro")
        try:
            yield
        finally:
            self.unmount()

    def fill(self):
        """Let other files take all that is left: the bytes, and the files that it can have."""
        with open(self.directory / "others", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def fill_inodes(self):
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (self.directory / f"other-{number}").touch()

    def free(self):
        for path in self.directory.glob("other*"):
            path.unlink()

    @contextlib.contextmanager
    def gone(self):
        """It is not mounted while the body runs."""
        mount_point = self.directory.with_name("mount point")
        mount_point.mkdir()
        self._mount("--bind", str(mount_point))
        try:
            yield
        finally:
            self.unmount()
        assert os.listdir(mount_point) == []

    def unmount(self):
        subprocess.run(["umount", "-l", str(self.directory)], capture_output=True)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a `SmallDisk` for cache-dir."""
    disks = []

    def make(options="size=8m"):
        disks.append(SmallDisk(tmp_path / "cache", options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.unmount()


def test_on_a_full_disk_only_what_needs_room_fails_until_there_is_some(small_disk, live):
    disk = small_disk()
    life = live()
    disk.fill()
    life.check_cached_blobs_go_on()
    life.check_objects_go_on()
    sentence = life.commit_fails(os.urandom(9 * MB))
    assert (
        f"Cannot write to cache-dir {life.server.cache_dir}: No space left on device; "
        f"free space on its disk or lower cache-size"
    ) in sentence
    assert leftovers(life.server) == []
    life.check_nothing_is_lost()
    assert figure(life.server, "s3blobs_vote_failures_total", reason="cache") == 1
    assert figure(life.server, "s3blobs_cache_errors_total", operation="write") >= 1
    assert figure(life.server, "s3blobs_cache_filesystem_free_bytes") < MB
    disk.fill()  # what the cached blobs have given back
    sentence = life.cold_read_fails()
    assert "cache-dir" in sentence and "free space on its disk" in sentence
    life.check_objects_go_on()
    disk.free()
    life.check_all_is_well()


def test_on_a_full_disk_cached_blobs_make_room_for_others(small_disk, live):
    disk = small_disk()
    life = live()
    client = life.server.client()
    cached = [commit_blob(client, os.urandom(MB)) for _ in range(4)]
    disk.fill()
    data = os.urandom(2 * MB)
    name = commit_blob(client, data)
    assert blob(life.server.client(), *name) == data
    assert figure(life.server, "s3blobs_vote_failures_total", reason="cache") == 0
    disk.free()
    assert len(blob(life.server.client(), *cached[0])) == MB


@slow
def test_on_a_disk_that_takes_no_more_files_cached_blobs_make_room_too(small_disk, live):
    disk = small_disk("size=8m,nr_inodes=40")
    life = live()
    disk.fill_inodes()
    client = life.server.client()
    for turn in range(3):
        oid, tid = commit_blob(client, b"data %d" % turn)
        assert blob(life.server.client(), oid, tid) == b"data %d" % turn
    disk.free()
    life.check_objects_go_on()
    assert life.read("warm") == life.blobs["warm"]


@contextlib.contextmanager
def _modes_without_writing(directory):
    modes = {path: path.stat().st_mode for path in (directory, *directory.rglob("*")) if path.is_dir()}
    for path in modes:
        path.chmod(0o500)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


#: Root may write wherever it likes, unless it gives that right up.
OBEY_MODES = """
    import ctypes, sys
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
"""


@pytest.fixture
def at_start(monkeypatch, tmp_path):
    """Has the servers run some Python first."""

    def at_start(code):
        directory = tmp_path / "site"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]))

    return at_start


@pytest.fixture(params=["modes", "mount"])
def read_only(request, tmp_path, small_disk, at_start):
    """While its context lasts, nobody can write to cache-dir; by its permissions, or because it is mounted so."""
    if request.param == "mount":
        return small_disk().read_only, errno.EROFS
    if os.geteuid() == 0:
        if not hasattr(os, "memfd_create"):
            pytest.skip("root may write wherever it likes, and only Linux lets it give that right up")
        at_start(OBEY_MODES)
    return lambda: _modes_without_writing(tmp_path / "cache"), errno.EACCES


def test_a_read_only_cache_dir_serves_what_it_has(read_only, live):
    context, code = read_only
    life = live()
    with context():
        life.check_cached_blobs_go_on()
        life.check_objects_go_on()
        for sentence in life.commit_fails(), life.cold_read_fails(), life.pack_fails():
            assert re.search(
                rf"Cannot write to cache-dir {life.server.cache_dir}: {os.strerror(code)}; \w+ ", sentence
            ), sentence
        life.check_nothing_is_lost()
        life.check_cached_blobs_go_on()
        assert figure(life.server, "s3blobs_vote_failures_total", reason="cache") == 1
        assert figure(life.server, "s3blobs_cache_errors_total", operation="write") >= 3
    life.check_all_is_well()


def test_a_client_that_vanishes_from_a_read_only_cache_dir_leaves_no_handler(read_only, live):
    """Its temporary file cannot be deleted; what else it had is given back, and the next start deletes the file."""
    context, _ = read_only
    life = live()
    server = life.server
    before, connections = server.open_files(), figure(server, "zeo_connections")
    client = server.client()
    client._call("tpc_begin", 1, b"", b"", {}, None, " ")
    client._async("storeBlobStart")
    client._async("storeBlobChunk", b"half of it")
    wait_for(lambda: leftovers(server))
    with context():
        client.close()
        wait_for(lambda: figure(server, "zeo_connections") == connections)
        wait_for(lambda: server.open_files() == before)
        assert figure(server, "zeo_active_transactions") == 0
        life.check_objects_go_on()
    server.stop()
    server.start()
    life.check_all_is_well()


def test_a_cache_dir_that_is_read_only_at_the_start_stops_it(read_only, live):
    context, code = read_only
    life = live()
    life.server.stop()
    with context(), pytest.raises(AssertionError, match=f"cache-dir: .*{os.strerror(code)}"):
        life.server.start()
    life.server.start()
    life.check_all_is_well()


def test_cached_blobs_that_are_deleted_under_the_server_are_fetched_again(live):
    life = live()
    shutil.rmtree(life.server.cache_dir / "blobs")
    for name in "warm", "cold":
        assert life.read(name) == life.blobs[name]
    life.check_all_is_well()


def test_a_cache_dir_that_is_deleted_under_the_server_takes_a_restart(live):
    life = live()
    shutil.rmtree(life.server.cache_dir)
    life.check_objects_go_on()
    for sentence in life.commit_fails(), life.fails(life.read, "warm"), life.cold_read_fails(), life.pack_fails():
        assert re.search(rf"cache-dir {life.server.cache_dir}: No such file or directory; .*restart", sentence), (
            sentence
        )
    life.check_nothing_is_lost()
    life.check_objects_go_on()
    assert figure(life.server, "s3blobs_vote_failures_total", reason="cache") == 1
    assert figure(life.server, "s3blobs_cache_errors_total", operation="write") >= 4
    assert not life.server.cache_dir.exists()  # it may have been a mount: what was below it is not to be filled
    life.server.stop()
    life.server.start()
    life.check_all_is_well()


@slow
def test_a_disk_of_cache_dir_that_goes_away_and_comes_back_takes_no_restart(small_disk, live):
    disk = small_disk()
    life = live()
    with disk.gone():
        for sentence in life.commit_fails(), life.fails(life.read, "warm"):
            assert f"Cannot write to cache-dir {life.server.cache_dir}: No such file or directory" in sentence
        life.check_objects_go_on()
    life.check_all_is_well()


# Clocks


class Clock:
    """The clock of the servers that are started from now on."""

    CODE = """
        import time
        _time, _time_ns = time.time, time.time_ns

        def _ahead():
            with open({path!r}) as file:
                return int(file.read())

        time.time = lambda: _time() + _ahead()
        time.time_ns = lambda: _time_ns() + _ahead() * 10**9
    """

    def __init__(self, path):
        self._path = path
        self.move(0)

    @property
    def code(self):
        return self.CODE.format(path=str(self._path))

    def move(self, seconds):
        """Let them be that much ahead."""
        new = self._path.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._path)


@pytest.fixture
def clock(tmp_path, at_start):
    clock = Clock(tmp_path / "ahead")
    at_start(clock.code)
    return clock


@pytest.mark.parametrize("jump", slow_after(1, of=[400 * DAY, -400 * DAY]))
def test_a_clock_that_jumps_and_is_set_right_again_costs_no_blob(clock, live, jump):
    life = live()
    clock.move(jump)
    db = life.server.db()
    write(db, "jumped", b"jumped")
    life.blobs["jumped"] = b"jumped"
    life.check_cached_blobs_go_on()
    assert life.read("cold") == life.blobs["cold"]
    db.pack(time.time() + jump)
    # The dead revision is from before the pack by the one clock, and after it by the other.
    dead = 1 if jump > 0 else 0
    assert figure(life.server, "s3blobs_gc_deleted_objects_total") == dead
    clock.move(0)
    tids = [commit_blob(life.server.client())[1] for _ in range(2)]
    assert tids[0] < tids[1]
    with db.transaction() as connection:
        assert name_of(connection.root()["jumped"])[1] < tids[0]
    life.check_all_is_well(pack_at=time.time() + max(0, jump) + 60)
    assert figure(life.server, "s3blobs_bucket_owner_conflict") == 0
    life.server.stop()
    life.server.start()
    assert ("in the future" in life.server.output()) == (jump > 0)
    life.check_all_is_well(pack_at=time.time() + max(0, jump) + 60)
    assert figure(life.server, "s3blobs_bucket_owner_conflict") == 0


@slow
def test_after_a_clock_was_ahead_dead_blobs_are_retained_from_now_on(clock, live, s3, bucket_name):
    life = live(options={"gc_retention": "30d"})
    clock.move(400 * DAY)
    life.server.db().pack()  # marks the dead one, in the future
    clock.move(0)
    life.server.db().pack()
    life.check_nothing_is_lost()
    clock.move(29 * DAY)
    life.server.db().pack()
    life.check_nothing_is_lost()
    clock.move(31 * DAY)
    life.server.db().pack()
    assert len(s3.keys(bucket_name)) == len(life.kept) - 1 + 1  # without the dead one, with gc-marks.jsonl
    assert {name: read(life.server.db(), name) for name in life.blobs} == life.blobs


@slow
def test_a_server_whose_clock_is_ahead_takes_the_prefix_of_no_other(clock, live, s3, bucket_name, tmp_path):
    life = live()
    clock.move(400 * DAY)  # the other one, which lives, reads it too, and renews its lease at 10 minutes only
    (tmp_path / "copy").mkdir()
    with ZEOServer(tmp_path / "copy", s3, bucket_name) as copy:
        db = copy.db()
        write(db, "its own", b"its own")
        with pytest.raises(StorageError, match="belongs to the server on"):
            db.pack()
    clock.move(0)
    life.check_nothing_is_lost()
    assert figure(life.server, "s3blobs_bucket_owner_conflict") == 0


@slow
def test_a_pack_leaves_uploads_under_way_alone_however_old_a_clock_makes_them(live, s3, background):
    """Moto says of each that it began in 2010, as a clock that is years ahead would make it."""
    life = live()
    data = os.urandom(9 * MB)
    s3.misbehave(operation="UploadPart", hang=True)
    slow = background(commit_blob, life.server.client(), data)
    s3.wait_for("UploadPart", 2)
    life.server.db().pack()
    s3.behave()
    assert blob(life.server.client(), *slow.result(60)) == data
    assert "AbortMultipartUpload" not in operations(s3)


def test_a_pack_aborts_an_upload_to_the_key_of_a_blob_once_its_transaction_is_over(
    s3, bucket, bucket_name, collector, in_flight
):
    name = p64(1), p64(1)
    s3.client.create_multipart_upload(Bucket=bucket_name, Key=bucket.keys.key(*name))
    transaction = object()
    in_flight.add_all([name], transaction)
    garbage = collector()
    with adapter_for(MappingStorage()).revisions() as revisions:
        garbage.collect(revisions)
        assert len(list(bucket.list_uploads())) == 1
        in_flight.remove([name], transaction)
        garbage.collect(revisions)
    assert list(bucket.list_uploads()) == []


def test_a_service_that_finds_the_clock_wrong_is_an_outage_that_says_so(live, s3):
    life = live()
    s3.misbehave(status=403, code="RequestTimeTooSkewed")
    s3.misbehave(operation="Owner.*", status=403, code="RequestTimeTooSkewed")
    for sentence in life.commit_fails(), life.cold_read_fails(), life.pack_fails():
        assert "RequestTimeTooSkewed" in sentence and "check the clock of this machine" in sentence
    life.check_objects_go_on()
    life.check_cached_blobs_go_on()
    life.check_nothing_is_lost()
    s3.behave()
    life.check_all_is_well()


# Credentials


class Gate:
    """In front of the S3 server ``s3``: it answers ExpiredToken to whoever has other access keys than ``accepted``."""

    def __init__(self, s3, accepted):
        self.accepted, self.refused = set(accepted), []
        gate = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                key = re.search(r"Credential=(\w+)/", self.headers.get("Authorization", ""))
                if key is None or key[1] not in gate.accepted:
                    gate.refused.append(self.path)
                    self.answer(400, {}, b"<Error><Code>ExpiredToken</Code><Message>test-secret</Message></Error>")
                    return
                service = http.client.HTTPConnection(s3.url.removeprefix("http://"), timeout=60)
                with contextlib.closing(service):
                    headers = {n: v for n, v in self.headers.items() if n.lower() not in ("expect", "connection")}
                    service.request(self.command, self.path, body, headers)
                    answer = service.getresponse()
                    self.answer(answer.status, dict(answer.getheaders()), answer.read())

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def answer(self, status, headers, body):
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection") or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD" and status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gate(s3):
    gate = Gate(s3, {"first"})
    yield gate
    gate.close()


class Credentials:
    """What boto3 finds: a program that tells credentials, and how long they hold."""

    def __init__(self, tmp_path):
        self._path = tmp_path / "credentials.json"
        (tmp_path / "no-config").write_text(f"[default]\ncredential_process = cat {self._path}\n")
        self.give("first")

    def give(self, key, minutes=5):
        """boto3 asks again when they hold for less than ten minutes."""
        until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes)
        keys = {"AccessKeyId": key, "SecretAccessKey": "test-secret", "SessionToken": "token-of-test"}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"Version": 1, **keys, "Expiration": until.isoformat()}))
        new.replace(self._path)

    def fail(self):
        self._path.unlink()


@pytest.fixture
def credentials(no_aws_settings, tmp_path):
    return Credentials(tmp_path)


@pytest.fixture
def behind_the_gate(live, gate):
    """A `Life` whose server asks S3 through the gate; ``keys``: what its section says instead of keys."""

    def make(keys=""):
        own = "s3-access-key test\n  s3-secret-key test-secret"
        assert own in SECTION
        section = SECTION.replace(own, keys)
        return live(storages=lambda settings: section.format(**{**settings, "endpoint": gate.url}))

    return make


def test_credentials_that_expire_are_renewed_without_a_restart(behind_the_gate, gate, credentials):
    life = behind_the_gate()
    for number in range(3):
        key = f"key{number}"
        gate.accepted.add(key)
        credentials.give(key)
        write(life.server.db(), f"with {key}", b"data")
        life.blobs[f"with {key}"] = b"data"
        gate.accepted = {key}
    assert life.read("cold") == life.blobs["cold"]
    life.check_all_is_well()
    assert gate.refused == []


@pytest.mark.parametrize("trouble", slow_after(1, of=["no answer", "old ones"]))
def test_when_credentials_cannot_be_renewed_the_error_says_so_and_it_goes_on_when_they_can(
    behind_the_gate, gate, credentials, trouble
):
    life = behind_the_gate()
    if trouble == "no answer":
        credentials.fail()
    else:
        credentials.give("first", minutes=-1)
    life.check_objects_go_on()
    for sentence in life.commit_fails(), life.cold_read_fails(), life.pack_fails():
        assert "check s3-access-key and s3-secret-key, or the credentials that boto3 finds" in sentence, sentence
        assert "token-of-test" not in sentence
    for operation in "put", "get":
        assert figure(life.server, "s3blobs_s3_operation_failures_total", operation=operation, reason="auth") >= 1
    life.check_cached_blobs_go_on()
    life.check_nothing_is_lost()
    gate.accepted = {"second"}
    credentials.give("second")
    life.check_all_is_well()


@slow
def test_what_s3_calls_expired_before_its_time_works_again_with_the_next_ones(behind_the_gate, gate, credentials):
    life = behind_the_gate()
    gate.accepted = {"second"}
    for sentence in life.commit_fails(), life.cold_read_fails(), life.pack_fails():
        assert "ExpiredToken" in sentence and "the credentials that boto3 finds" in sentence
    assert figure(life.server, "s3blobs_s3_operation_failures_total", operation="put", reason="auth") >= 1
    assert figure(life.server, "s3blobs_s3_operation_failures_total", operation="get", reason="auth") >= 1
    life.check_objects_go_on()
    life.check_cached_blobs_go_on()
    credentials.give("second")
    life.check_all_is_well()


@slow
def test_keys_of_the_section_that_expire_are_named_and_take_a_restart(behind_the_gate, gate, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_TEST", "first")
    life = behind_the_gate("s3-access-key $(KEY_OF_TEST)\n s3-secret-key test-secret")
    gate.accepted = {"second"}
    for sentence in life.commit_fails(), life.cold_read_fails():
        assert "ExpiredToken" in sentence and "check s3-access-key and s3-secret-key" in sentence
    life.check_objects_go_on()
    life.check_cached_blobs_go_on()
    life.check_nothing_is_lost()
    monkeypatch.setenv("KEY_OF_TEST", "second")
    life.server.stop()
    life.server.start()
    life.check_all_is_well()


# A policy that denies

#: A permission -> the operations that need it, and those of them that show it in the metrics.
POLICIES = {
    "s3:GetObject": ("GetObject|HeadObject", "get"),
    "s3:PutObject": ("PutObject|CreateMultipartUpload|UploadPart|CompleteMultipartUpload|CopyObject", "put"),
    "s3:DeleteObject": ("DeleteObjects?", "delete"),
    "s3:ListBucket": ("ListObjects", "list"),
}


@pytest.mark.parametrize("permission", slow_after(1, of=POLICIES))
def test_a_policy_that_denies_one_permission_stops_only_what_needs_it(live, s3, permission):
    operation, label = POLICIES[permission]
    life = live()
    for name in operation, "|".join(f"Owner{one}" for one in operation.split("|")):
        s3.misbehave(operation=name, status=403, code="AccessDenied", message="test-secret")
    life.check_objects_go_on()
    life.check_cached_blobs_go_on()
    sentences = []
    if permission == "s3:PutObject":
        sentences += [life.commit_fails(), life.commit_fails(os.urandom(5 * MB)), life.commit_fails(bytes(9 * MB))]
    else:
        write(life.server.db(), "meanwhile", b"meanwhile")
        life.blobs["meanwhile"] = b"meanwhile"
    if permission == "s3:GetObject":
        sentences.append(life.cold_read_fails())
    else:
        assert life.read("cold") == life.blobs["cold"]
    sentences.append(life.pack_fails())
    assert "The database was packed, but not all dead blobs were deleted. " in sentences[-1]
    for sentence in sentences:
        assert "AccessDenied (HTTP 403); the policy of the bucket or of the credentials (s3-access-key)" in sentence
        assert re.search(rf"forbids {permission}\b", sentence), sentence
    life.check_nothing_is_lost()
    seen = life.server.metrics()
    assert seen("s3blobs_s3_operation_failures_total", operation=label, reason="auth") >= 1
    assert seen("s3blobs_gc_failures_total") == 1 and seen("s3blobs_gc_deleted_objects_total") == 0
    assert seen("s3blobs_missing_blobs_total") == 0
    s3.behave()
    life.check_all_is_well()


def test_what_an_abort_may_not_delete_is_counted_and_the_next_pack_deletes_it(live, s3, bucket_name):
    life = live(options={"s3_max_attempts": "1"})
    s3.misbehave(operation="DeleteObjects?", status=403, code="AccessDenied")
    s3.misbehave(operation="PutObject", lose=True)
    life.commit_fails()
    wait_for(lambda: figure(life.server, "s3blobs_cleanup_failures_total") == 1)
    assert re.search("After a transaction: .*AccessDenied.* The next pack deletes them", life.server.output())
    assert len(s3.keys(bucket_name)) == len(life.kept) + 1
    s3.behave()
    life.check_all_is_well()


def test_a_blob_that_is_not_there_is_no_refusal_and_a_refusal_no_blob_that_is_not_there(live, s3):
    """Without s3:ListBucket Amazon S3 answers 403 instead of 404."""
    life = live()
    with pytest.raises(POSKeyError):
        blob(life.server.client(), p64(999), p64(1))
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    life.fails(blob, life.server.client(), p64(999), p64(1))
