"""``zodb-s3blobs status`` in processes of its own, beside real servers: for people, for Nagios, and as JSON."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import threading

import pytest
from ZODB.POSException import POSKeyError, StorageError

from tests.support.sites import get, put, run, sentence
from tests.support.speed import slow
from tests.support.zeo_clients import wait_for
from tests.support.zeo_server import SECTION, ZEOServer, free_address

#: So that an outage is noticed soon.
IMPATIENT = {"s3_connect_timeout": "1s", "s3_read_timeout": "1s", "s3_max_attempts": 1}

OK, WARNING, CRITICAL, UNKNOWN = range(4)


def conf(server):
    return server.directory / "zeo.conf"


def where(server):
    return "{}:{}".format(*server.metrics_address)


@pytest.fixture
def status(tool):
    """Runs the command beside a server; returns the first line, and the rest as a dictionary of its lines by name."""

    def status(server, *arguments, expected=OK):
        out, err = tool("status", conf(server), *arguments, status=expected)
        assert err == ""
        first, *lines = out.splitlines()
        return first, {line[2:20].rstrip(): line[21:] for line in lines if line.startswith("  ")}

    return status


def report(tool, server, *arguments, expected=OK):
    out, err = tool("status", conf(server), "--json", *arguments, status=expected)
    assert err == ""
    return json.loads(out)


def shape(value):
    """The keys of all dictionaries in ``value``."""
    if isinstance(value, dict):
        return {key: shape(inside) for key, inside in value.items()}
    return [shape(inside) for inside in value[:1]] if isinstance(value, list) else None


def cold(server):
    """Forget all files of the cache."""
    for file in (server.cache_dir / "blobs").glob("*/*.blob"):
        file.unlink()


def grow(server):
    """Commit two blobs, and read one of them three times: once from the bucket."""
    db = server.db()
    put(db, "one", b"one")
    put(db, "two", b"two" * 1000)
    wait_for(lambda: server.metrics()("s3blobs_cache_files", storage="1") == 2)
    cold(server)
    for _ in range(3):
        db = server.db()
        assert get(db, "two") == b"two" * 1000
    return db


# A server that is well


def test_a_server_that_is_well_is_told_on_one_screen(start, bucket_name, status):
    server = start(metrics=True)
    grow(server)
    first, lines = status(server)
    assert first == f"OK - storage 1: bucket {bucket_name} answers, 67% hits, 0 blobs on their way"
    assert lines["bucket"] == "answers"
    assert lines["owner"] == "this database"
    assert lines["clients"] == "4"
    assert lines["reads"] == "3, 66.7% from the cache, 0 missing, 0 damaged"
    assert re.fullmatch(r"2 blobs, 8\.0 KiB of 1\.0 GiB, [\d.]+ [GT]iB of the disk free", lines["cache"])
    assert re.fullmatch(r"2, 0 failed, vote p50 [\d.]+ m?s, p99 [\d.]+ m?s", lines["commits of blobs"])
    assert re.fullmatch(r"free, 0 wait, held p50 [\d.]+ m?s, p99 [\d.]+ m?s", lines["commit lock"])
    assert lines["S3 with the lock"] == "0 undo, 0 overtaken, 0 restore, 0 base"
    assert lines["on their way"] == "0 blobs, 0 B"
    assert re.fullmatch(r"\d+ calls, 0 failed, 0 under way, [\d.]+ KiB sent, [\d.]+ KiB received", lines["S3"])
    assert lines["last pack"] == "none since the start of the server"


def test_the_last_pack_and_what_it_found_is_told(start, status):
    server = start(metrics=True)
    db = server.db()
    put(db, "one", b"one")
    put(db, "one", b"again")
    db.pack()
    _, lines = status(server)
    assert re.fullmatch(r".* ago, .* long, found 1 live \(5 B\), 1 dead \(3 B\)", lines["last pack"])


def test_a_collection_that_failed_is_a_warning(s3, start, status):
    server = start(metrics=True, options=IMPATIENT)
    db = server.db()
    put(db, "one", b"one")
    put(db, "one", b"again")
    s3.misbehave(operation="DeleteObjects?", status=400, code="InvalidRequest")
    with pytest.raises(Exception, match="not all dead blobs were deleted"):
        db.pack()
    s3.behave()
    first, lines = status(server, expected=WARNING)
    assert first == "WARNING - S3BlobsGCFailing: storage 1: 1 garbage collections ended with an error"
    assert lines["last pack"].startswith("1 failed, none since")


# Alerts


def test_an_outage_is_critical_and_over_when_the_bucket_answers_again(s3, bucket_name, start, status):
    server = start(metrics=True, options=IMPATIENT)
    db = grow(server)
    cold(server)
    s3.misbehave(reset=True)
    with pytest.raises(StorageError):
        get(server.db(), "one")
    first, lines = status(server, expected=CRITICAL)
    assert first.startswith("CRITICAL - S3BlobsBucketUnavailable: storage 1: the bucket does not answer")
    assert lines["bucket"].startswith("unavailable: the bucket did not answer (")
    assert re.match(r"\d+ calls, [1-9]\d* failed \([1-9]\d* connection\)", lines["S3"])
    s3.behave()
    db = server.db()
    assert get(db, "one") == b"one"
    first, _ = status(server)
    assert first.startswith(f"OK - storage 1: bucket {bucket_name} answers")


@slow
def test_a_prefix_of_another_database_is_critical(s3, bucket_name, tmp_path, status):
    (tmp_path / "second").mkdir()
    with (
        ZEOServer(tmp_path, s3, bucket_name) as first,
        ZEOServer(tmp_path / "second", s3, bucket_name, metrics=True) as second,
    ):
        put(first.db(), "one", b"one")
        wait_for(lambda: second.metrics()("s3blobs_bucket_owner_conflict", storage="1") == 1)
        line, lines = status(second, expected=CRITICAL)
    assert line.startswith("CRITICAL - S3BlobsOwnerConflict: storage 1: the prefix belongs to another database")
    assert lines["owner"].startswith("another database")


@slow
def test_a_missing_blob_and_a_refusal_are_critical_and_a_failed_commit_is_a_warning(s3, bucket_name, start, status):
    server = start(metrics=True, options=IMPATIENT)
    db = grow(server)
    s3.misbehave(operation="PutObject", times=1, status=400, code="InvalidRequest")
    with pytest.raises(StorageError):
        put(db, "three", b"three")
    first, lines = status(server, expected=WARNING)
    assert first == "WARNING - S3BlobsVoteFailures: storage 1: 1 commits failed because of blobs (bucket)"
    assert lines["commits of blobs"].startswith("3, 1 failed (1 bucket), ")
    for key in s3.keys(bucket_name):
        s3.client.delete_object(Bucket=bucket_name, Key=key)
    cold(server)
    with pytest.raises(POSKeyError):
        get(server.db(), "one")
    first, lines = status(server, expected=CRITICAL)
    assert first.startswith("CRITICAL - S3BlobsBlobMissing: storage 1: 1 reads of blobs that the bucket does not have")
    assert "; S3BlobsVoteFailures: storage 1: " in first
    assert ", 1 missing, " in lines["reads"]
    s3.misbehave(operation="GetObject", status=403, code="AccessDenied")
    with pytest.raises(StorageError):
        get(server.db(), "two")
    first, _ = status(server, expected=CRITICAL)
    assert "S3BlobsS3AuthFailures: storage 1: S3 refused 1 calls (get)" in first


def test_a_server_that_does_not_run_is_critical(start, tool):
    server = start(metrics=True)
    server.stop()
    out, err = tool("status", conf(server), status=CRITICAL)
    assert out == (
        f"CRITICAL - S3BlobsDown: the server does not answer at metrics-address {where(server)}: Connection refused\n"
    )
    assert err == ""
    found = report(tool, server, expected=CRITICAL)
    assert (found["status"], found["exit_status"], found["server"]["up"]) == ("CRITICAL", CRITICAL, False)
    assert [alert["alert"] for alert in found["alerts"]] == ["S3BlobsDown"]


def test_another_server_at_the_address_is_critical(s3):
    address = s3.url.removeprefix("http://")
    returned, out, _ = run("status", "--address", address)
    assert returned == CRITICAL
    assert out.startswith(f"CRITICAL - S3BlobsDown: the server does not answer at metrics-address {address}: ")


#: Metrics that end before those that an alert needs: in the middle of a line, or behind one.
CUT_OFF = b's3blobs_build_info{version="2"} 1\ns3blobs_bucket_up{storage="1"} 1\n'


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\xff",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + CUT_OFF,
        b"HTTP/1.1 200 OK\r\n\r\n" + CUT_OFF + b"s3blobs_cache_fi",
        b"HTTP/1.1 200 OK\r\n\r\n" + CUT_OFF.partition(b"\n")[0],
    ],
    ids=["empty", "ssh", "no text", "cut off", "cut off in a line", "without a storage"],
)
def test_what_is_no_http_at_the_address_is_critical(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        returned, out, err = run("status", "--address", f"127.0.0.1:{listener.getsockname()[1]}")
        listener.shutdown(socket.SHUT_RDWR)
    assert returned == CRITICAL, (out, err)
    assert out.startswith("CRITICAL - S3BlobsDown: the server does not answer at ")


# What cannot be found out


def test_without_metrics_address_it_says_what_to_set(start, tool):
    server = start()
    out, _ = tool("status", conf(server), status=UNKNOWN)
    (line,) = out.splitlines()
    assert line.startswith("UNKNOWN - the s3blobstorage section of storage 1 has no metrics-address")
    assert "set metrics-address localhost:8101 in it, and restart the server" in line
    assert shape(report(tool, server, expected=UNKNOWN)).keys() == SHAPE.keys()


def test_a_file_without_s3blobstorage_or_no_file_is_said(tmp_path, tool):
    plain = tmp_path / "plain.conf"
    plain.write_text(f"<zeo>\naddress 1\n</zeo>\n<filestorage 1>\npath {tmp_path}/Data.fs\n</filestorage>\n")
    out, _ = tool("status", plain, status=UNKNOWN)
    assert "has no storage with s3blobstorage" in out
    for path in tmp_path / "none.conf", tmp_path / ("too long" * 40):
        out, _ = tool("status", path, status=UNKNOWN)
        assert out.startswith("UNKNOWN - there is no file")
    plain.write_text("<zeo>\naddress 1\n</zeo>\n<s3blobstorage 1>\n")
    out, err = tool("status", plain, status=UNKNOWN)
    assert out.startswith(f"UNKNOWN - {plain}: ") and err == ""  # Nagios shows what is on stdout


def test_a_storage_that_the_server_does_not_have_is_said(start):
    server = start(metrics=True)
    returned, out, _ = run("status", "--address", where(server), "--storage", "other")
    assert returned == UNKNOWN
    assert f"the server at {where(server)} has no storage other, but 1" in out


@pytest.mark.parametrize(
    "line",
    [[], *(["--address", text] for text in ("localhost", ":8101", "http://a:1")), ["--address", "a:1", "--watch", "0"]],
)
def test_a_wrong_command_line_is_refused(line):
    returned, out, err = run("status", *line)
    assert returned == 2 and out == "" and "usage:" in err


# Which servers and storages


@slow
def test_each_storage_has_a_block_and_one_can_be_chosen(s3, bucket_name, tmp_path, tool):
    other = {"name": "other", "cache": "other", "base": f"<filestorage>\npath {tmp_path}/Other.fs\n</filestorage>"}

    def storages(settings):
        return SECTION.format(**settings) + SECTION.format(**{**settings, **other})

    with ZEOServer(tmp_path, s3, bucket_name, storages=storages, metrics=True) as server:
        put(server.db(), "one", b"one")
        out, _ = tool("status", conf(server))
        blocks = [line for line in out.splitlines() if line.startswith("storage ")]
        assert [line.split(",")[:2] for line in blocks] == [
            [f"storage {name}: bucket {bucket_name}", f" prefix {name}"] for name in ("1", "other")
        ]
        out, _ = tool("status", conf(server), "--storage", "other")
        assert "storage 1" not in out and "storage other: bucket" in out
        found = report(tool, server)["storages"]
        assert [(one["storage"], one["commits"]["voted"]) for one in found] == [("1", 1), ("other", 0)]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "localhost"])
def test_a_server_at_any_address_is_asked_at_this_machine(s3, bucket_name, tmp_path, tool, host):
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    _, port = free_address()
    shown = f"[{host}]:" if ":" in host else host and f"{host}:"
    with ZEOServer(tmp_path, s3, bucket_name, options={"metrics_address": f"{shown}{port}"}) as server:
        out, _ = tool("status", conf(server))
    assert f" answers at {'[::1]' if host == '::' else 'localhost'}:{port}, counters since " in out


def test_the_address_alone_is_enough_and_no_proxy_is_asked(start, monkeypatch):
    server = start(metrics=True)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    returned, out, _ = run("status", "--address", where(server))
    assert returned == OK and out.startswith("OK - storage 1")


# JSON

SHAPE = {
    "status": None,
    "exit_status": None,
    "summary": None,
    "time": None,
    "since": None,
    "server": {"address": None, "up": None, "started": None, "version": None},
    "alerts": [],
    "storages": [
        {
            "storage": None,
            "bucket": {"name": None, "prefix": None, "endpoint": None, "up": None, "trouble": None},
            "owner": {"conflict": None, "changed": None},
            "clients": None,
            "reads": dict.fromkeys(["requests", "hits", "hit_ratio", "missing", "damaged", "from_fallback"]),
            "cache": dict.fromkeys(["files", "bytes", "limit_bytes", "pinned_bytes", "free_disk_bytes"]),
            "commits": {"voted": None, "failed": {}, "vote_p50": None, "vote_p99": None},
            "commit_lock": {
                "held_since": None,
                "waiting": None,
                "held_p50": None,
                "held_p99": None,
                "s3_waits": dict.fromkeys(["undo", "overtaken", "restore", "base"]),
            },
            "uploads": {"staged_blobs": None, "staged_bytes": None},
            "s3": {
                "operations": None,
                "under_way": None,
                "failures": {},
                "sent_bytes": None,
                "received_bytes": None,
            },
            "gc": {
                "running": None,
                "last_success": None,
                "last_duration": None,
                "failures": None,
                "objects": dict.fromkeys(["live", "dead", "retained", "newer", "unknown"]),
                "bytes": dict.fromkeys(["live", "dead", "retained", "newer", "unknown"]),
            },
        }
    ],
}


def test_the_json_has_the_figures_of_a_scrape_under_names_that_stay(start, tool, bucket_name):
    server = start(metrics=True)
    grow(server)
    found = report(tool, server)
    assert shape(found) == SHAPE
    assert (found["status"], found["exit_status"], found["alerts"]) == ("OK", OK, [])
    (storage,) = found["storages"]
    figures = server.metrics()
    assert storage["bucket"]["name"] == bucket_name and storage["bucket"]["up"] is True
    assert storage["reads"]["requests"] == figures("s3blobs_cache_requests_total") == 3
    assert storage["reads"]["hit_ratio"] == pytest.approx(2 / 3)
    assert storage["cache"]["bytes"] == figures("s3blobs_cache_size_bytes")
    assert storage["commits"]["voted"] == 2 and 0 < storage["commits"]["vote_p50"] < storage["commits"]["vote_p99"]
    assert storage["s3"]["sent_bytes"] > 3003 and storage["gc"]["last_success"] is None


def test_the_json_of_an_alert_has_its_name_and_storage(s3, start, tool):
    server = start(metrics=True, options=IMPATIENT)
    s3.misbehave(operation="PutObject", times=1, status=400, code="InvalidRequest")
    with pytest.raises(StorageError):
        put(server.db(), "one", b"one")
    found = report(tool, server, expected=WARNING)
    assert found["alerts"] == [
        {
            "alert": "S3BlobsVoteFailures",
            "severity": "WARNING",
            "storage": "1",
            "pending": False,
            "meaning": "1 commits failed because of blobs (bucket)",
        }
    ]


# --watch


def blocks(process, number):
    """The next ``number`` screens of ``process``."""
    found = []
    for _ in range(number):
        lines = []
        while not (lines and lines[-1] == "" and lines[-2].startswith("  last pack")):
            line = process.stdout.readline()
            assert line, lines
            lines.append(line.rstrip("\n"))
        found.append(lines)
    return found


def test_it_watches_until_it_is_interrupted_and_counts_from_screen_to_screen(start, tool):
    server = start(metrics=True)
    grow(server)
    process = tool.begin("status", conf(server), "--watch", "0.5")
    (first,) = blocks(process, 1)
    assert first[0].startswith("OK - ")
    assert any(line.startswith("  reads              3, ") for line in first)
    get(server.db(), "one")
    seen = 0
    while not seen:
        (block,) = blocks(process, 1)
        (line,) = [line for line in block if line.startswith("  reads ")]
        seen = int(line.split()[1].rstrip(","))
    assert seen == 1
    process.send_signal(signal.SIGINT)
    out, err = tool.end(process)
    assert "\x1b" not in out and err == ""


def test_a_watch_goes_on_while_the_server_is_down(start, tool):
    server = start(metrics=True)
    process = tool.begin("status", conf(server), "--watch", "0.2", "--json")
    states = []

    def until(state):
        while not states or states[-1] != state:
            states.append(json.loads(process.stdout.readline())["status"])

    until("OK")
    server.stop()
    until("CRITICAL")
    server.start()
    until("OK")
    process.send_signal(signal.SIGINT)
    tool.end(process)


@slow
def test_on_a_terminal_a_watch_draws_one_screen_over_the_other(start, tool):
    server = start(metrics=True)
    ours, theirs = pty.openpty()
    process = tool.begin("status", conf(server), "--watch", "0.2", stdout=theirs)
    os.close(theirs)
    seen = b""
    while seen.count(b"\x1b[H\x1b[2J") < 3:
        seen += os.read(ours, 10_000)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # Linux's answer when the other end is closed
        while os.read(ours, 10_000):
            pass
    assert process.wait(30) == OK
    os.close(ours)


# --state


def aged(path, seconds):
    """Let all looks in the state file have been ``seconds`` earlier."""
    kept = json.loads(path.read_text())
    for look in kept["looks"]:
        look[0] -= seconds
    path.write_text(json.dumps(kept))


@slow
def test_with_a_state_file_an_event_counts_for_its_time_and_not_for_ever(s3, start, tool, tmp_path):
    server = start(metrics=True, options=IMPATIENT)
    state = tmp_path / "state"
    arguments = ["--state", state]
    assert report(tool, server, *arguments)["alerts"] == []
    s3.misbehave(operation="PutObject", times=1, status=400, code="InvalidRequest")
    with pytest.raises(StorageError):
        put(server.db(), "one", b"one")
    aged(state, 60)
    assert report(tool, server, *arguments, expected=WARNING)["alerts"][0]["alert"] == "S3BlobsVoteFailures"
    aged(state, 14 * 60)
    assert report(tool, server, *arguments, expected=WARNING)["alerts"][0]["alert"] == "S3BlobsVoteFailures"
    aged(state, 2 * 60)
    assert report(tool, server, *arguments)["alerts"] == []
    report(tool, server, expected=WARNING)  # without it: since the start
    # A restart begins all counters anew.
    server.stop()
    server.start()
    assert report(tool, server, *arguments)["alerts"] == []


def test_with_a_state_file_what_has_to_last_is_pending_first(s3, start, tool, tmp_path):
    server = start(metrics=True, options=IMPATIENT)
    put(server.db(), "one", b"one")
    state = tmp_path / "state"
    report(tool, server, "--state", state)
    wait_for(lambda: server.metrics()("s3blobs_cache_files", storage="1") == 1)
    cold(server)
    s3.misbehave(reset=True)
    with pytest.raises(StorageError):
        get(server.db(), "one")
    aged(state, 300)
    out, _ = tool("status", conf(server), "--state", state)
    assert re.match("OK - storage 1: bucket .* does not answer, ", out)
    assert out.splitlines()[1].startswith("pending S3BlobsBucketUnavailable: storage 1: ")
    aged(state, 125)
    out, _ = tool("status", conf(server), "--state", state, status=CRITICAL)
    assert out.startswith("CRITICAL - S3BlobsBucketUnavailable: storage 1: ")


@slow
def test_a_state_file_that_is_none_or_of_another_server_is_left_alone(start, tool, tmp_path):
    server = start(metrics=True)
    for text in "not JSON", "[]", '{"address": 1, "series": [], "looks": [[]]}', '{"series": [], "looks": []}':
        (tmp_path / "state").write_text(text)
        out, _ = tool("status", conf(server), "--state", tmp_path / "state", status=UNKNOWN)
        assert "is not a state file of zodb-s3blobs status: name another file" in out
        assert (tmp_path / "state").read_text() == text
    (tmp_path / "state").write_text('{"address": "other:1", "series": [], "looks": []}')
    out, _ = tool("status", conf(server), "--state", tmp_path / "state", status=UNKNOWN)
    assert "is of the server at other:1" in out
    out, _ = tool("status", conf(server), "--state", tmp_path / "nowhere" / "state", status=UNKNOWN)
    assert "cannot be written: No such file or directory" in out
    assert sentence(out)
