"""`zodb-s3blobs demo`: what it promises to the person who runs it, and what it leaves behind."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import ZEO

from tests.support.speed import slow
from zodb_s3blobs import cli
from zodb_s3blobs.commands import demo
from zodb_s3blobs.commands.demo import servers

PACKAGE = demo.PACKAGE
COMMAND = [sys.executable, "-m", "zodb_s3blobs", "demo"]
ROW = r"{name} +[\d.]+ [kM]B +blobs/[0-9a-f]+/[0-9a-f]+\.blob +{cold} miss +\d+ ms +0 hit +\d+ ms"


@pytest.fixture
def environment(tmp_path):
    """The demo's temporary directory goes into tmp_path; what points elsewhere must not disturb it."""
    (tmp_path / "tmp").mkdir()
    return {
        **os.environ,
        "TMPDIR": str(tmp_path / "tmp"),
        "AWS_PROFILE": "no-such-profile",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_SECRET_ACCESS_KEY": "a-real-secret",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "INSTANCE_HOME": str(tmp_path),
    }


@pytest.fixture
def small(monkeypatch):
    """A demo in this process without the large file."""
    monkeypatch.setattr(demo, "LARGE", 1000)


@pytest.fixture
def changed_config(monkeypatch, tmp_path):
    """Lets a demo in this process start its ZEO server with another configuration."""

    def change(old, new):
        config = servers.CONFIG.read_text()
        assert old in config
        (tmp_path / "changed.conf").write_text(config.replace(old, new))
        monkeypatch.setattr(servers, "CONFIG", tmp_path / "changed.conf")

    return change


@pytest.fixture
def start(environment):
    """Starts the command in a process of its own, which does not outlive the test."""
    processes = []

    def run(*options):
        command = [*COMMAND, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return processes[-1]

    yield run
    for process in processes:
        servers = children(process.pid)
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
        for pid in servers:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def staying(start):
    """A demo that stays up: the process, and what it has printed until then."""
    process = start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("S3 requests from now on"):
            break
    return process, "".join(lines)


def children(pid):
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [map(int, line.split()) for line in listing.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def refuses(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# The round trip


def test_once_shows_the_round_trip_and_ends_with_0(environment, tmp_path):
    ended = subprocess.run([*COMMAND, "--once"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    for requests in "3 PutObject", "1 CreateMultipartUpload", "3 UploadPart", "1 CompleteMultipartUpload":
        assert requests in ended.stdout
    for name, cold in ("keys.py", 1), ("storage.py", 1), ("bucket.py", 1), ("large.bin", 3):
        assert re.search(ROW.format(name=re.escape(name), cold=cold), ended.stdout), name
    assert "Every byte that came back is the byte that was committed." in ended.stdout
    for metric, value in ("s3blobs_cache_requests_total", 8), ("s3blobs_cache_hits_total", 4):
        assert re.search(rf"{metric} +{value}\n", ended.stdout), metric
    assert "a-real-secret" not in ended.stdout
    assert os.listdir(tmp_path / "tmp") == []
    assert os.listdir(tmp_path) == ["tmp"]  # no pid file in INSTANCE_HOME


@slow
def test_the_output_fits_a_terminal_of_80_columns(small, capsys):
    assert cli.main(["demo", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and str(servers.CONFIG) not in line] == []


@slow
def test_other_bytes_than_were_committed_end_it_with_1(small, capsys, monkeypatch):
    commit = demo.commit

    def commit_and_change_a_byte(server, blob_dir, files):
        commit(server, blob_dir, files)
        original = bytearray(files[1].read_bytes())
        original[123] ^= 1
        files[1].write_bytes(original)

    monkeypatch.setattr(demo, "commit", commit_and_change_a_byte)
    assert cli.main(["demo", "--once"]) == 1
    output = capsys.readouterr()
    assert "The cold read of storage.py brought back other bytes than were committed" in output.err
    assert "at byte 123\n" in output.err
    assert "Every byte" not in output.out


@slow
def test_a_read_that_is_not_what_the_table_calls_it_ends_it_with_1(small, capsys, changed_config):
    changed_config("cache-size 1GB", "cache-size 0")
    assert cli.main(["demo", "--once"]) == 1
    assert "keys.py was read from S3 although the server should have it in its cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    "one, other, position",
    [
        (b"", b"", None),
        (b"abc", b"abc", None),
        (b"abc", b"abd", 2),
        (b"abc", b"ab", 2),
        (b"", b"a", 0),
        (b"x" * (1 << 20) + b"ab", b"x" * (1 << 20) + b"ac", (1 << 20) + 1),
        (b"x" * (1 << 20), b"x" * (1 << 20) + b"a", 1 << 20),
    ],
)
def test_first_difference(tmp_path, one, other, position):
    (tmp_path / "one").write_bytes(one)
    (tmp_path / "other").write_bytes(other)
    assert demo.first_difference(tmp_path / "one", tmp_path / "other") == position


# Staying up


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stays_up_for_other_clients_until_a_signal(staying, environment, tmp_path, number):
    process, output = staying
    port = int(re.search(r"ZEO server +127\.0\.0\.1:(\d+)", output)[1])
    s3_port = int(re.search(r"S3 endpoint, bucket +http://127\.0\.0\.1:(\d+), zodb-demo", output)[1])

    db = ZEO.DB(port, blob_dir=str(tmp_path / "client"))
    with db.transaction() as connection:
        for name in "keys.py", "storage.py", "bucket.py":
            with connection.root.files[name].open() as file:
                assert file.read() == next(PACKAGE.rglob(name)).read_bytes()
    db.close()
    servers = children(process.pid)
    assert servers
    process.send_signal(number)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "\nStopping.\n", "")  # and no S3 requests
    assert [pid for pid in servers if exists(pid)] == []
    assert refuses(port)
    assert refuses(s3_port)
    assert os.listdir(tmp_path / "tmp") == []


@slow
def test_it_shows_what_reaches_s3(staying, tmp_path):
    process, output = staying
    db = ZEO.DB(int(re.search(r"ZEO server +127\.0\.0\.1:(\d+)", output)[1]), blob_dir=str(tmp_path / "client"))
    with db.transaction() as connection, connection.root.files["keys.py"].open("w") as file:
        file.write(b"new")
    db.close()
    assert re.fullmatch(r"  \d\d:\d\d:\d\d  PutObject  blobs/[0-9a-f]+/[0-9a-f]+\.blob\n", process.stdout.readline())


@slow
def test_what_one_is_told_to_paste_makes_a_line_appear(staying, environment):
    process, output = staying
    snippet = re.search(r"^import ZEO\n.*?\n(?=\n)", output, re.M | re.S)[0]
    ran = subprocess.run([sys.executable, "-i"], input=snippet, env=environment, capture_output=True, text=True)
    assert ran.stdout == "Hello from client 3\n"
    assert "Traceback" not in ran.stderr
    assert re.fullmatch(r"  \d\d:\d\d:\d\d  PutObject  blobs/[0-9a-f]+/[0-9a-f]+\.blob\n", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("\nStopping.\n", "")  # one request, and none by the read


@slow
def test_requests_of_a_pack_are_called_as_s3_calls_them(staying, tmp_path):
    process, output = staying
    db = ZEO.DB(int(re.search(r"ZEO server +127\.0\.0\.1:(\d+)", output)[1]), blob_dir=str(tmp_path / "client"))
    with db.transaction() as connection:
        del connection.root.files["large.bin"]
    db.pack()
    db.close()
    process.send_signal(signal.SIGINT)
    lines, _ = process.communicate(timeout=30)
    operations = re.findall(r"^  \d\d:\d\d:\d\d  (\w+)", lines, re.M)
    assert {"ListObjectsV2", "ListMultipartUploads", "DeleteObject"} <= set(operations)
    assert "CreateMultipartUpload" not in operations


@slow
def test_it_says_when_the_zeo_server_is_gone(staying, tmp_path):
    process, _ = staying
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "zodb-s3blobs demo: the ZEO server has ended. The last lines of its log:" in errors
    assert "terminated by SIGTERM" in errors
    assert os.listdir(tmp_path / "tmp") == []


@slow
def test_a_signal_before_all_is_compared_ends_it_with_1_and_leaves_nothing(start, tmp_path):
    process = start()
    assert any(line.startswith("1.") for line in process.stdout)  # the ZEO server is up
    servers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == "zodb-s3blobs demo: interrupted before every file was compared\n"
    assert [pid for pid in servers if exists(pid)] == []
    assert os.listdir(tmp_path / "tmp") == []


# The directory


@slow
def test_a_named_directory_stays(small, capsys, tmp_path):
    directory = tmp_path / "new" / "demo"
    assert cli.main(["demo", "--once", "--dir", str(directory)]) == 0
    assert (directory / "server" / "Data.fs").exists()
    assert (directory / "server" / "runzeo.log").exists()
    assert f"All files of the demo are in {directory}." in capsys.readouterr().out


def test_a_directory_in_use_is_refused(capsys, tmp_path):
    (tmp_path / "mine").touch()
    assert cli.main(["demo", "--once", "--dir", str(tmp_path)]) == 1
    assert "is not empty: name a new or empty directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


def test_a_directory_that_cannot_be_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--once", "--dir", str(tmp_path / "file" / "demo")]) == 1
    assert capsys.readouterr().err == f"zodb-s3blobs demo: {tmp_path}/file/demo: Not a directory\n"


# Errors


def test_without_moto_it_says_what_to_install(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moto.server", None)
    assert cli.main(["demo", "--once"]) == 1
    errors = capsys.readouterr().err
    assert errors.endswith(f": {sys.executable} -m pip install 'moto[s3,server]>=5'\n")
    assert errors.count("\n") == 1


def test_a_zeo_server_that_does_not_start_shows_its_log(small, capsys, changed_config):
    changed_config("bucket-name $(S3BLOBS_BUCKET)", "bucket-name no-such-bucket")
    assert cli.main(["demo", "--once"]) == 1
    errors = capsys.readouterr().err
    assert "zodb-s3blobs demo: runzeo did not start. The last lines of its log:" in errors
    assert "bucket-name: Could not list bucket no-such-bucket: the service answered NoSuchBucket" in errors


# The command


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert re.search(r"^ +demo +show blobs", capsys.readouterr().out, re.M)


def test_without_a_command_it_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(start, tmp_path):
    process = start("--once")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1
    assert os.listdir(tmp_path / "tmp") == []
