"""The files in zeo-configs/ are accepted by the software they are for, and what the manuals say of keys is true."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml  # PyYAML: moto[s3,server], which the test extra asks for, requires it
from Zope2.Startup.options import ZopeWSGIOptions

import zodb_s3blobs
from tests.support.forked import Piped, read_as_runzeo_does
from tests.support.relstorage_databases import needs, server_of
from tests.support.speed import slow
from tests.support.zeo_server import free_address

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "zeo-configs"
MANUAL = (CONFIGS / "README.md").read_text()
TEXTS = [ROOT / "README.md", ROOT / "CHANGES.md", ROOT / "grafana" / "README.md", *sorted(CONFIGS.iterdir())]
PACKAGE = Path(zodb_s3blobs.__file__).parent

#: What each file of a ZEO server serves.
SERVERS = {
    "quickstart.conf": ["1"],
    "aws.conf": ["1"],
    "minio.conf": ["1"],
    "ceph.conf": ["1"],
    "several-storages.conf": ["main", "archive"],
    "zlib.conf": ["1"],
    "encrypted.conf": ["1"],
    "staging.conf": ["1"],
}
CLIENTS = ["client-zope.conf", "zope-relstorage.conf"]
#: Those that a server in production starts from.
PRODUCTION = [name for name in SERVERS if name != "quickstart.conf"]

ENVIRONMENT = {
    "S3BLOBS_ADDRESS": "localhost:8100",
    "S3BLOBS_METRICS_ADDRESS": "localhost:8101",
    "S3BLOBS_ENDPOINT": "http://localhost:9000",
    "S3BLOBS_BUCKET": "blobs",
    "S3BLOBS_ACCESS_KEY": "access",
    "S3BLOBS_SECRET_KEY": "secret",
    "S3BLOBS_CUSTOMER_KEY": "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=",
}


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S3BLOBS_DIR", str(tmp_path))


@pytest.fixture
def read_as_runzeo(environment, tmp_path):
    """Reads the text of a configuration in a process of its own, where ZEO may set up logging as it likes."""

    def read(text):
        path = tmp_path / "zeo.conf"
        path.write_text(text)
        process = Piped(read_as_runzeo_does, str(path))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        return json.loads(out)

    return read


def installed(text, directory):
    """The text with the directory changed in which everything is."""
    text = re.sub(r"(?m)^( *)%define instance .*$", rf"\1%define instance {directory}", text)
    return text.replace("/var/lib/zeo", str(directory))


def test_every_file_is_tested_here():
    assert sorted(path.name for path in CONFIGS.glob("*.conf")) == sorted([*SERVERS, *CLIENTS])


def test_the_table_of_the_manual_has_every_file():
    named = [re.findall(r"\]\(([\w.-]+)\)", row[0])[0] for row in table(part_of_manual("## Which file for what"))]
    assert sorted(named) == sorted(path.name for path in CONFIGS.iterdir() if path.suffix in (".conf", ".cnf", ".yaml"))


def test_the_files_are_part_of_the_package():
    assert (PACKAGE / "zeo-configs" / "quickstart.conf").is_file()


@pytest.mark.parametrize("name", SERVERS)
def test_runzeo_accepts_a_server_file(read_as_runzeo, tmp_path, name):
    read = read_as_runzeo(installed((CONFIGS / name).read_text(), tmp_path))
    assert read["names"] == SERVERS[name]
    assert read["logs"]
    # What must not be shared
    assert len(set(read["cache_dirs"])) == len(SERVERS[name])
    assert len(set(map(tuple, read["keys_start_with"]))) == len(SERVERS[name])
    # What must be
    assert read["metrics_addresses"] == [["localhost", 8101]] * len(SERVERS[name])


@pytest.mark.parametrize("name", PRODUCTION)
def test_a_production_file_keeps_databases_apart(read_as_runzeo, tmp_path, name):
    read = read_as_runzeo(installed((CONFIGS / name).read_text(), tmp_path))
    assert all(prefix for _, prefix in read["keys_start_with"])


@pytest.mark.parametrize("name", PRODUCTION)
def test_a_production_file_frees_the_commit_lock_of_clients_that_hang(read_as_runzeo, tmp_path, name):
    read = read_as_runzeo(installed((CONFIGS / name).read_text(), tmp_path))
    assert read["transaction_timeout"] >= 60


def test_a_stock_zope_conf_with_the_client_section_is_accepted(tmp_path):
    """The section takes the place of the <zodb_db main> that mkwsgiinstance writes."""
    instance = tmp_path / "instance"
    make = [Path(sys.executable).with_name("mkwsgiinstance"), "--dir", instance, "--user", "admin:secret"]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    conf = instance / "etc" / "zope.conf"
    section = (CONFIGS / "client-zope.conf").read_text()
    stock = conf.read_text()
    pasted, count = re.subn(r"(?ms)^<zodb_db main>\n.*?^</zodb_db>\n", lambda _: section, stock)
    assert count == 1
    conf.write_text(pasted)
    [database] = ZopeWSGIOptions(str(conf))().configroot.databases
    client = database.config.storage.config
    assert database.name == "main"
    assert client.storage == "1"
    assert Path(client.blob_dir) == instance / "var" / "blobcache"
    assert client.blob_cache_size
    assert client.shared_blob_dir is False


def test_the_compose_file_makes_what_the_manual_connects_to():
    services = yaml.safe_load((CONFIGS / "compose.yaml").read_text())["services"]
    variables = dict(re.findall(r"(S3BLOBS_\w+)=(\S+)", part_of_manual("### MinIO for development")))
    minio = services["minio"]
    assert f"127.0.0.1:{variables['S3BLOBS_ENDPOINT'].rpartition(':')[2]}:9000" in minio["ports"]
    assert all(port.startswith("127.0.0.1:") for port in minio["ports"])
    assert minio["environment"] == {
        "MINIO_ROOT_USER": variables["S3BLOBS_ACCESS_KEY"],
        "MINIO_ROOT_PASSWORD": variables["S3BLOBS_SECRET_KEY"],
    }
    assert f"minio/{variables['S3BLOBS_BUCKET']};" in services["bucket"]["entrypoint"][-1]
    text = (CONFIGS / "quickstart.conf").read_text()
    assert set(re.findall(r"^[^#\n]*\$\((\w+)\)", text, re.MULTILINE)) == set(variables)


#: What two Zope processes do with a blob. ``app`` is there when zconsole runs a script.
WRITE_IN_ZOPE = """
import transaction
from ZODB.blob import Blob
app._p_jar.root()["blob"] = Blob(b"written by Zope")
transaction.commit()
"""
READ_IN_ZOPE = """
with app._p_jar.root()["blob"].open() as file:
    print(file.read().decode())
"""


@slow
def test_zope_runs_the_relstorage_file_in_several_processes(s3, bucket_name, tmp_path):
    needs("postgresql-free")
    (tmp_path / "zope").mkdir()
    shared = {
        "INSTANCE_HOME": str(tmp_path / "zope"),
        "ZODB_DSN": server_of("postgresql").dsn(server_of("postgresql").database()),
        "S3BLOBS_ENDPOINT": s3.url,
        "S3BLOBS_BUCKET": bucket_name,
        "S3BLOBS_ACCESS_KEY": "access",
        "S3BLOBS_SECRET_KEY": "secret",
    }

    def run(script, number):
        path = tmp_path / f"script{number}.py"
        path.write_text(script)
        host, port = free_address()
        own = {"S3BLOBS_CACHE_DIR": str(tmp_path / f"cache{number}"), "S3BLOBS_METRICS_ADDRESS": f"{host}:{port}"}
        zconsole = Path(sys.executable).with_name("zconsole")
        command = [zconsole, "run", CONFIGS / "zope-relstorage.conf", path]
        environment = {**os.environ, **shared, **own}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(WRITE_IN_ZOPE, 1)
    assert run(READ_IN_ZOPE, 2) == "written by Zope\n"
    assert [key.split("/")[:2] for key in s3.keys(bucket_name) if key.endswith(".blob")] == [["site1", "blobs"]]


# What is said of the keys


def keys(section="s3blobstorage"):
    """The keys of a section in component.xml, each with its default as the manual's table shows it."""
    sections = {found.get("name"): found for found in ElementTree.parse(PACKAGE / "component.xml").iter("sectiontype")}
    extended = sections[section].get("extends")
    inherited = keys(extended) if extended else {}
    return inherited | {key.get("name"): _default(key) for key in sections[section].findall("key")}


def _default(key):
    if key.get("required") == "yes":
        return "required"
    return f"`{key.get('default')}`" if key.get("default") else "none"


def part_of_manual(heading):
    """The text below ``heading``, up to the next heading of the same level or a higher one."""
    level = heading.split()[0]
    [text] = re.findall(rf"(?ms)^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", MANUAL)
    return text


def table(text):
    """The rows of the first table in ``text``, without its head."""
    [lines] = re.findall(r"(?s)\A.*?((?:^\|[^\n]*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]]


def test_the_table_of_the_manual_has_every_key_with_its_default_and_a_meaning():
    rows = table(part_of_manual("## All keys"))
    assert {name.strip("`"): default for name, default, _ in rows} == keys()
    assert [name.strip("`") for name, _, _ in rows] == list(keys())
    assert all(meaning for _, _, meaning in rows)


def test_the_keys_of_the_second_bucket_are_the_first_of_the_table():
    text = part_of_manual("### A second bucket to read from")
    first, last = re.search(r"Its keys are those of the table above from `([\w-]+)` to `([\w-]+)`", text).groups()
    names = list(keys())
    assert names[names.index(first) : names.index(last) + 1] == list(keys("fallbackbucket"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_a_key_that_is_spoken_of_exists(path):
    spoken_of = re.findall(r"\b(?<![-.#])(?:s3-[a-z-]*[a-z]|cache-dir|upload-[a-z]+)\b(?!-\*)", path.read_text())
    assert not set(spoken_of) - set(keys())


#: The configurations in the texts that are whole, by file.
WHOLE = [
    pytest.param(text, id=f"{path.name}-{number}")
    for path in TEXTS
    for number, text in enumerate(re.findall(r"(?ms)^ *```conf\n(.*?)^ *```$", path.read_text()))
    if "<zeo>" in text
]


@pytest.mark.parametrize("text", WHOLE)
def test_runzeo_accepts_a_configuration_of_the_manuals(read_as_runzeo, tmp_path, text):
    for directory in re.findall(r"\$instance/(.*)/", text):
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
    read = read_as_runzeo(installed(text, tmp_path))
    assert read["names"]
    if "<s3blobstorage" in text and "read-only" not in text:
        assert read["transaction_timeout"] >= 60


def test_the_policy_of_the_second_bucket_is_json_and_allows_nothing_but_reading():
    [text] = re.findall(r"(?ms)^```json\n(.*?)^```$", part_of_manual("### A second bucket to read from"))
    actions = {action for statement in json.loads(text)["Statement"] for action in statement["Action"]}
    assert actions == {"s3:ListBucket", "s3:GetObject"}


def test_the_bucket_policy_of_the_manual_is_json_and_explains_each_action():
    [text] = re.findall(r"(?ms)^```json\n(.*?)^```$", part_of_manual("## Bucket policy"))
    actions = {action for statement in json.loads(text)["Statement"] for action in statement["Action"]}
    explained = {cells[0].strip("`") for cells in table(part_of_manual("## Bucket policy"))}
    assert actions == explained
