"""``metrics-address``: what is answered there, that nobody holds it up, and how it comes and goes with the storages."""

import base64
import contextlib
import gzip
import http.client
import logging
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from io import StringIO
from types import SimpleNamespace
from urllib.parse import urljoin

import pytest
import ZConfig
import ZODB.config
from prometheus_client import Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from ZODB.MappingStorage import MappingStorage

from tests.support.speed import slow_but
from tests.support.waiting import wait_for
from tests.support.zeo_clients import load
from tests.support.zeo_server import Figures, ZEOServer, free_address, scrape
from zodb_s3blobs.monitoring import endpoint, health

ACCESS_KEY = "AKIAOFTHISTEST"
SECRET_KEY = "secret-key-of-this-test"
#: Far above what any answer takes, far below the patience of the endpoint in these tests.
SOON = 10


pytestmark = pytest.mark.usefixtures("no_aws_settings")


@pytest.fixture(autouse=True)
def no_endpoint_left():
    """Each test closes what it opens, and none is disturbed by one that does not."""
    yield
    left = endpoint._endpoint
    for _, exported in left.exporter.storages() if left else ():
        endpoint.leave(exported)
    assert left is None


@pytest.fixture
def address():
    return free_address()


@pytest.fixture
def section(s3, bucket_name, tmp_path, address):
    """Makes the text of a section; keywords are its keys, with _ for -; None: left out."""
    numbers = iter(range(100))

    def make(name="1", base="<mappingstorage/>", **keys):
        host, port = address
        defaults = {
            "bucket_name": bucket_name,
            "s3_prefix": name,
            "s3_endpoint_url": s3.url,
            "s3_access_key": ACCESS_KEY,
            "s3_secret_key": SECRET_KEY,
            "s3_max_attempts": 1,
            "cache_dir": tmp_path / f"cache-{next(numbers)}",
            "metrics_address": f"{host}:{port}",
        }
        keys = {**defaults, **keys}
        lines = [f"{key.replace('_', '-')} {value}" for key, value in keys.items() if value is not None]
        return "\n".join(["%import zodb_s3blobs", f"<s3blobstorage {name}>", *lines, base, "</s3blobstorage>\n"])

    return make


@pytest.fixture
def factory(section):
    """Makes the factory of a storage, as ZConfig does; arguments as `section`'s."""

    def make(*args, **keys):
        config, _ = ZConfig.loadConfigFile(ZODB.config.getStorageSchema(), StringIO(section(*args, **keys)))
        return config.storage

    return make


@pytest.fixture
def open_storage(factory):
    """Opens a storage; closed after the test."""
    with contextlib.ExitStack() as opened:

        def make(*args, **keys):
            storage = factory(*args, **keys).open()
            opened.callback(storage.close)
            return storage

        yield make


def ask(address, path="/metrics", method="GET", **headers):
    """The status, the headers and the body of an answer."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def say(address, path):
    """The status and the text of an answer."""
    status, _, body = ask(address, path)
    return status, body.decode()


def status(address, path):
    return say(address, path)[0]


def is_closed(address):
    try:
        socket.create_connection(address, 30).close()
    except ConnectionRefusedError:
        return True
    return False


# What is answered


def test_metrics(open_storage, address):
    open_storage("main")
    code, headers, body = ask(address, "/metrics")
    assert code == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    figures = Figures(body.decode())
    assert figures("s3blobs_bucket_up", storage="main") == 1
    assert figures("s3blobs_s3_operations_total", storage="main", operation="list") == 1
    assert "process_start_time_seconds" in figures.names()


def test_metrics_compressed(open_storage, address):
    open_storage()
    _, headers, body = ask(address, "/metrics", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert Figures(gzip.decompress(body).decode()).names() == scrape(address).names()


def test_metrics_as_openmetrics(open_storage, address):
    open_storage()
    _, headers, body = ask(address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(body.decode())
    assert {sample.name for family in families for sample in family.samples} == scrape(address).names()


def test_a_request_for_single_metrics_leaves_out_none_of_ours(open_storage, address):
    open_storage()
    _, _, body = ask(address, "/metrics?name[]=s3blobs_bucket_up")
    assert "s3blobs_bucket_up" in Figures(body.decode()).names()


@pytest.mark.parametrize("path", ["/favicon.ico", "/metrics/", "/-/", "/healthy", "/-/ready/x", "//x", "/%2e"])
def test_other_paths_are_not_there(open_storage, address, path):
    open_storage()
    code, text = say(address, path)
    assert code == 404
    assert "/metrics" in text
    assert " / " in text  # where the paths are described


class Page(HTMLParser):
    """The contents of a page: ``links``, ``texts`` by element, and ``loads``, what a browser fetches unasked.

    Raises AssertionError if the elements are not nested.
    """

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.declaration, self.links, self.loads, self.texts, self._open = None, [], [], {}, []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_decl(self, declaration):
        self.declaration = declaration

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("href", "src", "srcset", "style", "data", "action"):
                self.loads.append(value)
        if tag not in self.VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag][-1] += data


def test_the_front_page_links_what_there_is(open_storage, address):
    open_storage()
    code, headers, body = ask(address, "/")
    assert code == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    page = Page(body.decode("utf-8"))
    assert page.declaration == "DOCTYPE html"
    assert page.texts["title"] == page.texts["h1"] == ["zodb-s3blobs"]
    assert page.loads == []
    assert {urljoin("/", link) for link in page.links} == {"/metrics", "/-/healthy", "/-/ready"}
    assert all(status(address, urljoin("/", link)) == 200 for link in page.links)
    assert [text.endswith(".") for text in page.texts["li"]] == [True] * 3  # each says what it answers


def test_links_of_the_front_page_hold_below_another_path(open_storage, address):
    open_storage()
    links = Page(say(address, "/")[1]).links  # as a browser sees them through a proxy that serves it at /zeo/
    assert {urljoin("/zeo/", link) for link in links} == {"/zeo/metrics", "/zeo/-/healthy", "/zeo/-/ready"}


# Other methods


@pytest.fixture
def unchanging(monkeypatch):
    """Return a function that lets every later scrape return the figures of that moment."""

    def freeze():
        registry = endpoint._endpoint.exporter.registry
        families = list(registry.collect())
        monkeypatch.setattr(registry, "collect", lambda: families)

    return freeze


@pytest.mark.parametrize("path", ["/metrics", "/metrics?x=y", "/-/healthy", "/-/ready", "/", "/favicon.ico"])
@pytest.mark.parametrize("accepted", [{}, {"Accept": "application/openmetrics-text; version=1.0.0"}])
def test_head_is_answered_as_get_is_without_the_body(open_storage, address, unchanging, path, accepted):
    open_storage()
    unchanging()
    code, headers, body = ask(address, path, "GET", **accepted)
    head_code, head_headers, head_body = ask(address, path, "HEAD", **accepted)
    assert head_code == code == (404 if path == "/favicon.ico" else 200)
    del headers["Date"], head_headers["Date"]
    assert head_headers.items() == headers.items()
    assert int(headers["Content-Length"]) == len(body) > 0
    assert head_body == b""


def test_nothing_follows_the_headers_of_an_answer_to_head(open_storage, address):
    # An HTTP client does not even look at what follows.
    open_storage()
    for path in "/metrics", "/-/healthy", "/-/ready", "/", "/x":
        with socket.create_connection(address, 30) as connection:
            connection.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.0 ")
        assert answer.index(b"\r\n\r\n") == len(answer) - 4


def test_head_of_a_compressed_scrape(open_storage, address):
    open_storage()
    _, headers, body = ask(address, "/metrics", "HEAD", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert body == b""


def test_head_tells_that_a_storage_is_not_ready(open_storage, s3, address, monkeypatch):
    monkeypatch.setattr(health, "_PROBE_AFTER_ERROR", 0.1)
    for operation in ".*", "Owner.*":
        s3.misbehave(operation=operation, status=503, code="SlowDown")
    open_storage()
    assert ask(address, "/-/ready", "HEAD")[0] == 503
    assert ask(address, "/-/healthy", "HEAD")[0] == 200
    s3.behave()
    wait_for(lambda: ask(address, "/-/ready", "HEAD")[0] == 200)


@pytest.mark.parametrize("path", ["/metrics", "/-/ready", "/"])
def test_options_names_the_methods(open_storage, address, path):
    open_storage()
    code, headers, body = ask(address, path, "OPTIONS")
    assert code == 200
    assert headers["Allow"] == "OPTIONS,GET,HEAD"
    assert (headers["Content-Length"], body) == ("0", b"")


@pytest.mark.parametrize("path", ["/-/healthy?x=1", "/-/ready?", "/metrics?x=y"])
def test_a_query_does_no_harm(open_storage, address, path):
    open_storage()
    assert status(address, path) == 200


def test_nothing_can_be_changed(open_storage, address):
    open_storage()
    for method in "POST", "PUT", "DELETE":
        assert ask(address, "/metrics", method)[0] >= 400
    assert status(address, "/metrics") == 200


def test_nonsense_does_no_harm(open_storage, address, capfd):
    open_storage()
    for nonsense in b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02" * 100, b"GET //[ HTTP/1.0\r\n\r\n", b"x" * 100_000:
        with socket.create_connection(address, 30) as connection, contextlib.suppress(OSError):  # it is cut off
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
    assert status(address, "/metrics") == 200
    assert capfd.readouterr() == ("", "")


# Health


def test_it_is_healthy_but_not_ready_while_the_storage_is_being_opened(factory, address, background):
    opening, go_on = threading.Event(), threading.Event()

    def slow():
        opening.set()
        go_on.wait()
        return MappingStorage()

    slow_one = factory("main")
    slow_one.config.base = SimpleNamespace(open=slow)
    opened = background(slow_one.open)
    try:
        assert opening.wait(60)
        assert status(address, "/-/healthy") == 200
        assert say(address, "/-/ready") == (503, "Storage main: it is still being opened.\n")
        assert scrape(address)("s3blobs_build_info") == 1
    finally:
        go_on.set()
        storage = opened.result(60)
    try:
        assert status(address, "/-/ready") == 200
    finally:
        storage.close()


def test_it_starts_without_the_bucket_and_is_not_ready_until_it_answers(open_storage, s3, address, monkeypatch):
    monkeypatch.setattr(health, "_PROBE_AFTER_ERROR", 0.1)
    s3.misbehave(status=503, code="SlowDown")
    s3.misbehave(operation="Owner.*", status=503, code="SlowDown")
    open_storage("main")
    code, text = say(address, "/-/ready")
    assert code == 503
    assert text.startswith("Storage main: the bucket did not answer")
    assert status(address, "/-/healthy") == 200
    assert scrape(address)("s3blobs_bucket_up", storage="main") == 0
    s3.behave()
    wait_for(lambda: status(address, "/-/ready") == 200)
    assert scrape(address)("s3blobs_bucket_up", storage="main") == 1


@pytest.mark.parametrize("asks", slow_but("/-/ready", of=["/-/ready", "/metrics"]))
@pytest.mark.parametrize("fault", [{"status": 500, "code": "InternalError"}, {"lose": True}, {"hang": True}])
def test_it_notices_an_outage_and_its_end_without_any_traffic(open_storage, s3, address, monkeypatch, fault, asks):
    monkeypatch.setattr(health, "_PROBE_AFTER_OK", 0.1)
    monkeypatch.setattr(health, "_PROBE_AFTER_ERROR", 0.1)

    def ready():
        if asks == "/-/ready":
            return status(address, asks) == 200
        return scrape(address)("s3blobs_bucket_up") == 1

    open_storage(s3_read_timeout="1s")
    assert ready()
    s3.misbehave(**fault)
    wait_for(lambda: not ready())
    s3.behave()
    wait_for(ready)


def test_refused_credentials_are_an_answer(open_storage, s3, address, monkeypatch):
    # The bucket is there; that nobody may use it has metrics of its own.
    monkeypatch.setattr(health, "_PROBE_AFTER_OK", 0)
    open_storage()
    s3.forget()
    s3.misbehave(status=403, code="AccessDenied")
    assert status(address, "/-/ready") == 200
    s3.wait_for("ListObjects")
    wait_for(lambda: scrape(address)("s3blobs_s3_operation_failures_total", operation="list", reason="auth") > 0)
    assert status(address, "/-/ready") == 200


def test_a_silent_bucket_holds_up_no_answer_and_is_probed_by_one_request(open_storage, s3, address, monkeypatch):
    monkeypatch.setattr(health, "_PROBE_AFTER_OK", 0)
    open_storage()
    s3.forget()
    s3.misbehave(hang=True)
    started = time.monotonic()
    for _ in range(5):
        for path in "/-/ready", "/-/healthy", "/metrics":
            assert status(address, path) == 200
    assert time.monotonic() - started < SOON
    s3.wait_for("ListObjects")
    assert len(s3.requests()) == 1
    monkeypatch.setattr(health, "_PROBE_AFTER_OK", 60)
    s3.behave()
    time.sleep(0.3)  # in which others would follow
    assert len(s3.requests()) == 1


def test_to_be_healthy_takes_no_s3(open_storage, s3, address, monkeypatch):
    monkeypatch.setattr(health, "_PROBE_AFTER_OK", 0)
    storage = open_storage()
    s3.forget()
    for _ in range(5):
        assert status(address, "/-/healthy") == 200
    storage.close()
    assert s3.requests() == []


def test_all_storages_must_be_ready_and_those_that_are_not_are_named(open_storage, address):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        open_storage("good")
        open_storage("bad", s3_endpoint_url=f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        code, text = say(address, "/-/ready")
    assert code == 503
    assert "Storage bad: " in text
    assert "good" not in text


# Nobody holds up anybody


@pytest.fixture
def impatient(monkeypatch):
    """Returns how many seconds a client may be silent."""
    assert 1 < endpoint._Handler.timeout < 60
    monkeypatch.setattr(endpoint._Handler, "timeout", 1)
    return 1


def ends(connection):
    """Read until the other side ends the connection; returns how much there was."""
    length = 0
    with contextlib.suppress(ConnectionError):
        while received := connection.recv(1 << 16):
            length += len(received)
    return length


@pytest.mark.parametrize("said", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nAccept: "])
def test_silent_connections_hold_up_nobody_and_are_cut(open_storage, address, impatient, said):
    open_storage()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(30)]
        for connection in silent:
            connection.sendall(said)
        started = time.monotonic()
        for path in "/-/healthy", "/-/ready", "/metrics":
            assert status(address, path) == 200
        assert [ends(connection) for connection in silent] == [0] * 30
        assert time.monotonic() - started < impatient + SOON


def test_connections_that_do_not_read_hold_up_nobody_and_are_cut(open_storage, address, impatient):
    size = 20 << 20  # more than the kernel takes over
    open_storage().metrics.instruments.append(Gauge("s3blobs_talkative", "x" * size, registry=None))
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        lazy = []
        for _ in range(5):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            connection.settimeout(30)
            connection.connect(address)
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert connection.recv(1)
            lazy.append(connection)
        assert status(address, "/-/healthy") == 200
        assert len(ask(address, "/metrics")[2]) > size
        wait_for(lambda: set(threading.enumerate()) <= before)  # nobody waits for them any longer
        assert all(ends(connection) < size for connection in lazy)


def test_connections_that_vanish_leave_nothing_behind(open_storage, address, capfd):
    open_storage()
    before = set(threading.enumerate())
    for said in b"", b"GET /met", b"GET /metrics HTTP/1.0\r\n\r\n":
        for _ in range(10):
            with socket.create_connection(address, 30) as connection:
                connection.sendall(said)
    assert status(address, "/metrics") == 200
    wait_for(lambda: set(threading.enumerate()) <= before)
    assert capfd.readouterr() == ("", "")


def test_probes_that_connect_and_say_nothing_are_not_logged(s3, bucket_name, tmp_path):
    with ZEOServer(tmp_path, s3, bucket_name, metrics=True) as server:
        status(server.metrics_address, "/-/ready")
        before = server.output().splitlines()
        for _ in range(100):  # as load balancers do
            socket.create_connection(server.metrics_address, 30).close()
        assert ask(server.metrics_address, "/-/healthy", "HEAD")[0] == 200
        assert server.metrics()("s3blobs_bucket_up") == 1
        more = server.output().splitlines()[len(before) :]
        assert len(more) < 10 and not [line for line in more if "Traceback" in line or "metrics" in line], more


def test_many_scrapes_at_once(open_storage, address, background):
    open_storage()
    answers = [background(scrape, address) for _ in range(30)]
    assert all(answer.result(60)("s3blobs_bucket_up") == 1 for answer in answers)


def test_a_slow_figure_holds_up_only_the_scrape_that_asks_for_it(open_storage, address, background):
    reading, go_on = threading.Event(), threading.Event()

    def slow():
        reading.set()
        go_on.wait()
        return 1

    metrics = open_storage().metrics
    metrics.staged_blobs.set_function(slow)
    slow_scrape = background(scrape, address)
    try:
        assert reading.wait(60)
        assert status(address, "/-/healthy") == 200
        assert status(address, "/-/ready") == 200
        assert not slow_scrape.done()
    finally:
        go_on.set()
    assert slow_scrape.result(60)("s3blobs_staged_blobs") == 1


def test_scrapers_that_misbehave_hold_up_neither_zeo_nor_the_end_of_the_server(s3, bucket_name, tmp_path):
    with ZEOServer(tmp_path, s3, bucket_name, metrics=True) as server, contextlib.ExitStack() as stack:
        client = server.client()
        for said in b"", b"GET /metr", b"GET /metrics HTTP/1.0\r\n\r\n":
            for _ in range(20):
                connection = stack.enter_context(socket.create_connection(server.metrics_address, 30))
                connection.sendall(said)
        started = time.monotonic()
        for _ in range(10):
            load(client)
        assert server.metrics()("zeo_loads_total", storage="1") >= 10
        assert time.monotonic() - started < SOON
        assert server.stop() < SOON
        server.start()  # at the same address, though its connections are still there
        assert server.metrics()("zeo_loads_total", storage="1") == 0


# The address


@pytest.fixture
def refusal(caplog):
    """Calls a function that must refuse to start; returns its one sentence, which the log has too."""

    def call(function):
        with pytest.raises(ZConfig.ConfigurationError) as caught:
            function()
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [sentence]
        caplog.clear()
        return sentence

    return call


def test_a_port_in_use_stops_the_start(factory, refusal, address):
    with socket.socket() as other:
        other.bind(address)
        other.listen()
        sentence = refusal(factory().open)
    assert sentence.startswith("metrics-address: ")
    assert "{}:{}".format(*address) in sentence
    assert "in use" in sentence
    factory().open().close()


def test_a_port_in_use_stops_runzeo_with_one_sentence(section, address, tmp_path):
    eventlog = f"<eventlog>\n<logfile>\n path {tmp_path}/log\n</logfile>\n</eventlog>\n"
    (tmp_path / "zeo.conf").write_text(f"<zeo>\n address 127.0.0.1:0\n</zeo>\n{section()}{eventlog}")
    runzeo = [sys.executable, "-m", "ZEO.runzeo", "-C", tmp_path / "zeo.conf"]
    with socket.socket() as other:
        other.bind(address)
        other.listen()
        done = subprocess.run(runzeo, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    [said] = done.stderr.splitlines()
    assert said.startswith("metrics-address: ")
    assert said in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.1",  # of no machine
        "no-such-host.invalid",
        "two..dots",
        "x" * 64 + ".invalid",
        "300.0.0.1",
    ],
)
def test_a_host_that_is_not_this_machine_stops_the_start(factory, refusal, host):
    sentence = refusal(factory(metrics_address=f"{host}:8101").open)
    assert sentence.startswith("metrics-address: ")
    assert host in sentence
    assert endpoint._endpoint is None


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "0.0.0.0:{}", ":{}", "{}"])
def test_the_forms_of_an_address(open_storage, address, form):
    open_storage(metrics_address=form.format(address[1]))
    assert scrape(address)("s3blobs_bucket_up") == 1


def test_an_ipv6_address(open_storage):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    open_storage(metrics_address=f"[::1]:{port}")
    assert ask(("::1", port), "/-/healthy")[0] == 200
    assert is_closed(("127.0.0.1", port))


@pytest.mark.parametrize("turn", [list, reversed])
def test_a_name_with_both_kinds_of_addresses_means_the_ipv4_one(open_storage, address, monkeypatch, turn):
    def both(host, port, *args, **kwargs):
        if host != "both.example.net":
            return getaddrinfo(host, port, *args, **kwargs)
        found = [(socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
        return [(family, socket.SOCK_STREAM, 6, "", where) for family, where in turn(found)]

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", both)
    open_storage(metrics_address=f"both.example.net:{address[1]}")
    assert scrape(address)("s3blobs_bucket_up") == 1


def test_localhost_is_not_open_to_others(open_storage, address):
    open_storage(metrics_address=f"localhost:{address[1]}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no other address")
        own = route.getsockname()[0]
    assert not is_closed(address)
    assert is_closed((own, address[1]))


def test_without_an_address_there_is_no_endpoint(open_storage, address):
    before = set(threading.enumerate())
    storage = open_storage(metrics_address=None)
    assert is_closed(address)
    assert not [thread for thread in set(threading.enumerate()) - before if "metrics" in thread.name]
    assert storage.metrics.s3_operations.labels("list")._value.get() == 1


# Two storages, and the end


def test_two_storages_share_it(open_storage, address):
    one, two = open_storage("one"), open_storage("two")
    assert scrape(address)("s3blobs_bucket_up", storage="one") == 1
    assert scrape(address)("s3blobs_bucket_up", storage="two") == 1
    one.close()
    assert {sample.labels.get("storage") for sample in scrape(address).samples} == {None, "two"}
    assert status(address, "/-/ready") == 200
    two.close()
    assert is_closed(address)


def test_another_address_is_refused_and_does_not_disturb_the_first(open_storage, factory, refusal, address):
    open_storage("one")
    host, port = free_address()
    sentence = refusal(factory("two", metrics_address=f"{host}:{port}").open)
    assert sentence.startswith("metrics-address: ")
    assert "{}:{}".format(*address) in sentence
    assert is_closed((host, port))
    assert {sample.labels.get("storage") for sample in scrape(address).samples} == {None, "one"}


def test_storages_with_and_without_it(open_storage, address):
    exported, other = open_storage("one"), open_storage("two", metrics_address=None)
    other.close()
    assert scrape(address)("s3blobs_bucket_up", storage="one") == 1
    exported.close()
    assert is_closed(address)


def test_it_can_be_opened_again_at_once(factory, address):
    for number in range(5):
        storage = factory(str(number)).open()
        with socket.create_connection(address, 30):  # still there when it is closed
            assert scrape(address)("s3blobs_bucket_up", storage=str(number)) == 1
            storage.close()
            assert is_closed(address)


def test_a_storage_closed_twice_does_not_disturb_another(open_storage, address):
    one, _ = open_storage("one"), open_storage("two")
    one.close()
    with contextlib.suppress(Exception):
        one.close()
    assert scrape(address)("s3blobs_bucket_up", storage="two") == 1


def test_no_thread_is_left(factory, address):
    before = set(threading.enumerate())
    storage = factory().open()
    scrape(address)
    storage.close()
    wait_for(lambda: set(threading.enumerate()) <= before)


FAILURES = {
    "bucket": {"bucket_name": "no-such-bucket"},
    "region": {"s3_region": "-europe-"},
    "cache": {"cache_dir": "/dev/null/cache"},
    "base": {"base": "<zeoclient>\n server localhost:1\n wait off\n</zeoclient>"},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_fails_leaves_no_endpoint_behind(factory, refusal, address, failure):
    refusal(factory(**FAILURES[failure]).open)
    assert is_closed(address)
    factory().open().close()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_second_storage_that_fails_leaves_the_first_alone(open_storage, factory, refusal, address, failure):
    open_storage("one")
    refusal(factory("two", **FAILURES[failure]).open)
    assert {sample.labels.get("storage") for sample in scrape(address).samples} == {None, "one"}
    assert status(address, "/-/ready") == 200


# What nobody is to know


def everything_said(address):
    answers = [ask(address, path) for path in ("/metrics", "/-/ready", "/-/healthy", "/")]
    return "".join(f"{headers}{body.decode()}" for _, headers, body in answers)


def test_no_answer_holds_a_secret(open_storage, s3, address, caplog):
    caplog.set_level(logging.DEBUG)
    s3.misbehave(status=500, code="InternalError", message=f"{ACCESS_KEY} {SECRET_KEY}")
    open_storage()
    said = everything_said(address) + caplog.text
    assert "500" in said
    for secret in ACCESS_KEY, SECRET_KEY, "test-secret":
        assert secret not in said


def test_no_answer_holds_a_customer_key(open_storage, address):
    key = b"customer key of this test, 32 by"
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{nobody_listens.getsockname()[1]}"
        open_storage(s3_endpoint_url=url, s3_sse_customer_key=base64.b64encode(key).decode())
    said = everything_said(address)
    assert scrape(address)("s3blobs_storage_info", endpoint=url) == 1
    assert base64.b64encode(key).decode() not in said
    assert key.decode() not in said


def test_no_answer_holds_a_password_that_is_in_an_endpoint(open_storage, s3, address, monkeypatch):
    host = s3.url.removeprefix("http://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:hunter2@{host}")
    open_storage(s3_endpoint_url=None)
    said = everything_said(address)
    assert scrape(address)("s3blobs_storage_info", endpoint=s3.url) == 1
    for secret in "someone", "hunter2":
        assert secret not in said


def test_bucket_prefix_and_endpoint_are_in_one_series_only(open_storage, s3, bucket_name, address):
    open_storage(s3_prefix="some/prefix/")
    figures = scrape(address)
    assert figures("s3blobs_storage_info", bucket=bucket_name, prefix="some/prefix", endpoint=s3.url) == 1
    for known in bucket_name, "some/prefix", s3.url:
        lines = [line for line in figures.text.splitlines() if known in line]
        assert len(lines) == 1
        assert lines[0].startswith("s3blobs_storage_info{")
