"""The ``<s3blobstorage>`` section: what is refused and how it is said, what is accepted, and how the start goes."""

import base64
import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import traceback
from io import StringIO
from types import SimpleNamespace

import pytest
import transaction
import ZConfig
import ZODB
import ZODB.blob
import ZODB.config
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

from zodb_s3blobs import config as config_module
from zodb_s3blobs.config import StartRefused
from zodb_s3blobs.metrics import Metrics
from zodb_s3blobs.places import place_of

ACCESS_KEY = "AKIAOFTHISTEST"
SECRET_KEY = "secret-key-of-this-test"
CUSTOMER_KEY = base64.b64encode(b"customer key of this test, 32 by").decode()
TOKEN = "session/token+of==this-test"
SECRETS = (ACCESS_KEY, SECRET_KEY, CUSTOMER_KEY, TOKEN)

MAPPING = "<mappingstorage/>"
FILES = "<filestorage>\n path {dir}/Data.fs\n</filestorage>"


pytestmark = pytest.mark.usefixtures("no_aws_settings")


@pytest.fixture
def section(tmp_path):
    """Makes the text of a section around the section ``base``; keywords are its keys, with _ for -; None: left out."""

    def make(base=MAPPING, **keys):
        keys = {"bucket_name": "blobs", "cache_dir": "{dir}/cache", **keys}
        lines = [f"{key.replace('_', '-')} {value}" for key, value in keys.items() if value is not None]
        text = "\n".join(["%import zodb_s3blobs", "%import zc.zlibstorage", "<s3blobstorage>", *lines, base])
        return text.replace("{dir}", str(tmp_path)) + "\n</s3blobstorage>\n"

    return make


def read(text):
    """The factory that ZConfig makes of the text of a section."""
    config, _ = ZConfig.loadConfigFile(ZODB.config.getStorageSchema(), StringIO(text))
    return config.storage


def settings(text):
    return read(text).settings


@pytest.fixture
def refusal(caplog):
    """Calls a function that must raise ConfigurationError; returns its text, after looking for secrets everywhere."""
    caplog.set_level(logging.DEBUG)

    def call(function, *args, secrets=SECRETS):
        with pytest.raises(ZConfig.ConfigurationError) as caught:
            function(*args)
        shown = "".join([*everything_shown(caught.value), caplog.text])
        for secret in secrets:
            assert secret not in shown
        return str(caught.value)

    return call


def everything_shown(error):
    """All texts of an exception, of those before it in its chain, suppressed ones too, and the tracebacks."""
    seen = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            yield from (str(error), repr(error), repr(error.args), *traceback.format_exception(error))
            waiting += [error.__cause__, error.__context__]


# Bad values are refused when the configuration is read


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bucket-name", "two words"),
        ("bucket-name", "a/b"),
        ("bucket-name", "s3://bucket"),
        ("bucket-name", "b" * 256),
        ("bucket-name", "arn:aws:s3:eu-central-1:111122223333:accesspoint/two words"),
        ("s3-region", "somewhere in Europe"),
        ("s3-region", "eu_central_1"),
        ("s3-prefix", "a//b"),
        ("s3-prefix", "../b"),
        ("s3-prefix", "a/./b"),
        ("s3-endpoint-url", "minio.example.net:9000"),
        ("s3-endpoint-url", "ftp://minio.example.net"),
        ("s3-endpoint-url", "http://user:hunter2@minio.example.net"),
        ("s3-endpoint-url", "http://minio.example.net?region=x"),
        ("s3-endpoint-url", "http://minio example.net"),
        ("s3-endpoint-url", "http://minio.example.net:http"),
        ("s3-endpoint-url", "http://minio.example.net:99999"),
        ("s3-public-endpoint-url", "files.example.net"),
        ("s3-public-endpoint-url", "https://user:hunter2@files.example.net"),
        ("s3-public-endpoint-url", "https://files.example.net/?x"),
        ("presigned-urls", "one hour"),
        ("presigned-urls", "-1h"),
        ("presigned-urls", "8d"),
        ("presigned-urls", "604801s"),
        ("s3-use-ssl", "maybe"),
        ("s3-addressing-style", "virtuel"),
        ("s3-sse", "aes256"),
        ("s3-sse", "SSE-C"),
        ("s3-storage-class", "standard ia"),
        ("s3-tagging", "zope"),
        ("s3-tagging", "project: plone"),
        ("s3-tagging", "=zope"),
        ("s3-tagging", "team=zope&"),
        ("s3-tagging", "project=plone&&env=prod"),
        ("s3-tagging", "project=plone,env=prod;*"),
        ("s3-tagging", "project=%FF"),
        ("s3-tagging", "project=%0A"),
        ("s3-tagging", f"{'k' * 129}=v"),
        ("s3-tagging", f"k={'v' * 257}"),
        ("s3-tagging", "&".join(f"k{number}=v" for number in range(11))),
        ("s3-tagging", "project=plone&project=zope"),
        ("s3-tagging", "aws:project=plone"),
        ("s3-checksums", "always"),
        ("s3-multipart-threshold", "large"),
        ("s3-multipart-threshold", "1MB"),
        ("s3-multipart-threshold", "6GB"),
        ("s3-concurrency", "many"),
        ("s3-concurrency", "0"),
        ("s3-concurrency", "-1"),
        ("s3-connect-timeout", "soon"),
        ("s3-connect-timeout", "0"),
        ("s3-connect-timeout", "0.5"),
        ("s3-connect-timeout", "nan"),
        ("s3-connect-timeout", "-60"),
        ("s3-read-timeout", "1.5s"),
        ("s3-read-timeout", "0s"),
        ("s3-max-attempts", "twice"),
        ("s3-max-attempts", "0"),
        ("upload-timeout", "ten minutes"),
        ("upload-timeout", "0"),
        ("cache-size", "lots"),
        ("cache-size", "-1"),
        ("metrics-address", "zeo.example.net"),
        ("metrics-address", "zeo.example.net:"),
        ("metrics-address", "zeo.example.net:http"),
        ("metrics-address", "zeo.example.net:0"),
        ("metrics-address", "zeo.example.net:99999"),
        ("metrics-address", "zeo.example.net:8101/metrics"),
        ("metrics-address", "http://zeo.example.net:8101"),
        ("metrics-address", "http://zeo.example.net:8101/metrics"),
        ("metrics-address", "2001:db8::1:8101"),
        ("metrics-address", "two words"),
        ("metrics-address", "0"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_named(section, refusal, key, value):
    text = section(**{"s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY, key.replace("-", "_"): value})
    sentence = refusal(read, text)
    assert key in sentence
    assert "line -1" not in sentence
    if len(value) > 4:  # shorter ones are in the sentence by chance
        assert value not in sentence
        assert "hunter2" not in sentence


# What ZConfig takes without a word, and means something else by it


# The second bucket


def second(base=MAPPING, **keys):
    """A base with a ``<fallbackbucket>`` beside it; keywords are the keys of that section, with _ for -."""
    lines = [f"{key.replace('_', '-')} {value}" for key, value in {"bucket_name": "other", **keys}.items()]
    return "\n".join(["<fallbackbucket>", *lines, "</fallbackbucket>", base])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bucket-name", "two words"),
        ("s3-prefix", "a//b"),
        ("s3-region", "somewhere in Europe"),
        ("s3-region", "eu # the nearest"),
        ("s3-endpoint-url", "http://user:hunter2@minio.example.net"),
        ("s3-addressing-style", "virtuel"),
        ("s3-checksums", '"when_required"'),
        ("s3-ca-file", "~/ca.pem"),
        ("s3-access-key", ACCESS_KEY),
        ("s3-sse-customer-key", "short"),
    ],
)
def test_a_bad_value_of_the_second_bucket_is_refused_with_its_section_and_key_named(section, refusal, key, value):
    assert refusal(read, section(second(**{key.replace("-", "_"): value}))).startswith(f"<fallbackbucket> {key}")


@pytest.mark.parametrize(("key", "value"), [("s3-read-timeout", "soon"), ("s3-max-attempts", "0"), ("s3-use-ssl", "?")])
def test_a_bad_number_of_the_second_bucket_is_refused_with_its_line(section, refusal, key, value):
    text = section(second(**{key.replace("-", "_"): value}))
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith(key))
    said = refusal(read, text)
    assert said.startswith(f"{key} must be ") and f"(line {line})" in said


@pytest.mark.parametrize("key", ["cache-dir", "s3-storage-class", "s3-sse", "upload-timeout", "gc-retention"])
def test_the_second_bucket_has_no_key_that_is_for_writing(section, refusal, key):
    assert f"'{key}' is not a known key name" in refusal(read, section(second(**{key.replace("-", "_"): "x"})))


def test_the_second_bucket_needs_a_name_and_there_is_only_one(section, refusal):
    assert "bucket-name" in refusal(read, section(f"<fallbackbucket>\n</fallbackbucket>\n{MAPPING}"))
    assert "fallbackbucket" in refusal(read, section(second(second())))


def test_the_second_bucket_has_settings_of_its_own(section):
    around = {"s3_region": "eu-central-1", "s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY}
    inside = {
        "s3_prefix": "site1/",
        "s3_endpoint_url": "https://s3.example.net",
        "s3_sse_customer_key": CUSTOMER_KEY,
        "s3_read_timeout": "7s",
    }
    found = read(section(second(**inside), **around)).fallback_settings
    assert (found.bucket_name, found.s3_prefix, found.s3_endpoint_url) == ("other", "site1", "https://s3.example.net")
    assert (found.s3_region, found.s3_access_key, found.s3_secret_key) == (None, None, None)
    assert found.s3_sse_customer_key == base64.b64decode(CUSTOMER_KEY)
    assert (found.s3_read_timeout, found.s3_connect_timeout) == (7, 5)
    assert not any(secret in repr(found) for secret in SECRETS)
    assert read(section(**around)).fallback_settings is None


@pytest.mark.parametrize("key", ["upload-timeout", "gc-retention", "presigned-urls"])
def test_a_time_without_a_unit_is_refused(section, refusal, key):
    name = key.replace("-", "_")
    sentence = refusal(read, section(**{name: "30"}))
    assert key in sentence
    assert "a number alone would be seconds" in sentence
    read(section(**{name: "30s"}))


@pytest.mark.parametrize(("key", "value"), [("cache-size", "50"), ("cache-size", "30000"), ("s3-stage-threshold", "4")])
def test_a_size_that_was_meant_in_another_unit_is_refused(section, refusal, key, value):
    sentence = refusal(read, section(**{key.replace("-", "_"): value}))
    assert key in sentence
    assert "a number alone would be bytes" in sentence


@pytest.mark.parametrize(
    ("key", "value", "meaning"),
    [
        ("cache_size", "0", 0),
        ("cache_size", "1MB", 1 << 20),
        ("cache_size", "2000000", 2000000),
        ("s3_stage_threshold", "0", 0),
        ("s3_stage_threshold", "1kb", 1024),
        ("gc_retention", "0", 0),
        ("gc_retention", "0d", 0),
        ("gc_retention", "30D", 30 * 86400),
        ("presigned_urls", "0", 0),
        ("presigned_urls", "90m", 5400),
        ("presigned_urls", "7d", 7 * 86400),
    ],
)
def test_zero_and_what_has_a_unit_is_meant_as_it_is(section, key, value, meaning):
    assert getattr(read(section(**{key: value})).config, key) == meaning


TEXTS = {
    "bucket_name": "blobs",
    "s3_prefix": "site1",
    "s3_endpoint_url": "http://minio.example.net",
    "s3_public_endpoint_url": "https://files.example.net",
    "s3_region": "eu-central-1",
    "s3_ca_file": "/etc/ca.pem",
    "s3_addressing_style": "path",
    "s3_sse": "AES256",
    "s3_storage_class": "STANDARD_IA",
    "s3_tagging": "project=plone",
    "s3_checksums": "when_required",
    "cache_dir": "/var/cache/blobs",
    "fallback_blob_dir": "/var/blobs",
}


@pytest.mark.parametrize("key", [*TEXTS, "s3_sse_kms_key_id"])
def test_a_comment_behind_a_value_is_refused(section, refusal, key):
    value = TEXTS.get(key, "some-key")
    for text in f"{value} # the comment", f"{value} #", f"{value}\t# the comment", "# the comment":
        sentence = refusal(read, section(**{key: text}))
        assert key.replace("_", "-") in sentence
        assert "\t" in text or "put the comment on a line of its own" in sentence


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("quoted", ['"{}"', "'{}'", '{}"', "'{}"])
def test_quotes_around_a_value_are_refused(section, refusal, key, quoted):
    sentence = refusal(read, section(**{key: quoted.format(TEXTS[key])}))
    assert f"{key.replace('_', '-')} must be written without quotes" in sentence


@pytest.mark.parametrize("key", [*TEXTS, "s3_access_key", "s3_secret_key", "s3_session_token", "s3_sse_customer_key"])
@pytest.mark.parametrize("value", ["{}\n", "{}\r", "{}\x00", "{}\N{NO-BREAK SPACE}", " {}", "\x1b[1m{}", "{}\udcff"])
def test_what_cannot_be_seen_in_the_value_of_a_variable_is_refused(section, refusal, monkeypatch, key, value):
    # A file that is read into a variable ends with a line break.
    secret = "secret-of-this-variable"
    keys = {"s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY, key: "$(TEST_VALUE)"}
    monkeypatch.setattr(os, "environ", {**os.environ, "TEST_VALUE": value.format(TEXTS.get(key, secret))})
    sentence = refusal(read, section(**keys), secrets=(*SECRETS, secret))
    assert key.replace("_", "-") in sentence
    assert "environment variable" in sentence
    assert sentence.isprintable()


PATHS = ["s3_ca_file", "cache_dir", "fallback_blob_dir"]


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["~/cache", "~zeo/cache", "$$HOME/cache", "$${HOME}/cache", "/srv/$$(NAME)/cache"])
def test_a_path_that_only_a_shell_understands_is_refused(section, refusal, key, value):
    sentence = refusal(read, section(**{key: value}))
    assert f"{key.replace('_', '-')} must be the whole path" in sentence


@pytest.mark.parametrize("key", PATHS)
def test_a_path_means_the_same_in_every_directory(section, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    config = read(section(**{key: "some/directory"})).config
    monkeypatch.chdir("/")
    assert getattr(config, key) == str(tmp_path / "some" / "directory")


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["/Volumes/My Disk/c#1/it's", "/srv/a$$b/d\N{LATIN SMALL LETTER E WITH ACUTE}p\xf4t"])
def test_a_path_may_hold_what_paths_hold(section, key, value):
    assert getattr(read(section(**{key: value})).config, key) == value.replace("$$", "$")


@pytest.mark.parametrize(
    "value",
    ["my site", "a#b", "a'b", 'a"b', "a\\b", "a%2Fb", "a?b", "a&b", "<a>", "a*", "$$a", "a;b", "a{b}", "x" * 901],
)
def test_a_prefix_that_keys_cannot_begin_with_everywhere_is_refused(section, refusal, value):
    assert "s3-prefix must " in refusal(read, section(s3_prefix=value))


@pytest.mark.parametrize(
    "value", ["site1", "Site_1/env=prod/a.b-c", "team@example.net:app+1", "d\xe9p\xf4t", "x" * 900]
)
def test_a_prefix_that_every_service_takes_is_taken(section, value):
    assert settings(section(s3_prefix=value)).s3_prefix == value


@pytest.mark.parametrize(("value", "meaning"), [("site/one/", "site/one"), ("/", ""), ("", "")])
def test_a_slash_at_the_end_of_a_prefix_is_none(section, value, meaning):
    assert settings(section(s3_prefix=value)).s3_prefix == meaning


@pytest.mark.parametrize("value", ["/site1", "/site1/", "//site1"])
def test_a_prefix_that_begins_with_a_slash_is_refused_with_what_to_do_about_such_keys(section, refusal, value):
    sentence = refusal(read, section(s3_prefix=value))
    assert "s3-prefix must not begin with a slash" in sentence
    assert "1.2.1" in sentence
    assert "aws s3 cp --recursive s3://BUCKET//PREFIX/ s3://BUCKET/PREFIX/" in sentence


@pytest.mark.parametrize("key", ["bucket-name", "cache-dir"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_required_key_that_is_missing_or_empty_is_refused(section, refusal, key, value):
    assert key in refusal(read, section(**{key.replace("-", "_"): value}))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"s3_access_key": ACCESS_KEY}, ["s3-access-key", "s3-secret-key"]),
        ({"s3_secret_key": SECRET_KEY}, ["s3-access-key", "s3-secret-key"]),
        ({"s3_access_key": ACCESS_KEY, "s3_secret_key": ""}, ["s3-access-key", "s3-secret-key"]),
        ({"s3_session_token": TOKEN}, ["s3-session-token", "s3-access-key", "s3-secret-key"]),
        ({"s3_session_token": TOKEN, "s3_access_key": "", "s3_secret_key": ""}, ["s3-session-token"]),
        ({"s3_session_token": TOKEN, "s3_access_key": ACCESS_KEY}, ["s3-access-key", "s3-secret-key"]),
        ({"s3_sse_kms_key_id": "some-key"}, ["s3-sse-kms-key-id", "s3-sse"]),
        ({"s3_sse": "aws:kms", "s3_sse_kms_key_id": "two words"}, ["s3-sse-kms-key-id"]),
        ({"s3_sse": "AES256", "s3_sse_kms_key_id": "some-key"}, ["s3-sse-kms-key-id", "s3-sse"]),
        ({"s3_sse_customer_key": CUSTOMER_KEY, "s3_sse": "AES256"}, ["s3-sse-customer-key", "s3-sse"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(section, refusal, keys, named):
    sentence = refusal(read, section(**keys))
    assert all(key in sentence for key in named)


@pytest.mark.parametrize(
    "value",
    [
        "not base64, and secret",
        CUSTOMER_KEY[:-8],
        CUSTOMER_KEY + CUSTOMER_KEY,
        CUSTOMER_KEY.rstrip("="),
        base64.b64encode(b"only a few bytes").decode(),
        "\N{SNOWMAN}" * 44,
    ],
)
def test_a_customer_key_that_is_not_32_bytes_in_base64_is_refused_and_not_shown(section, refusal, value):
    assert "s3-sse-customer-key" in refusal(read, section(s3_sse_customer_key=value), secrets=(value,))


def test_an_unknown_key_is_refused(section, refusal):
    assert "s3-secretkey" in refusal(read, section(s3_secretkey=SECRET_KEY))


def test_a_section_without_a_storage_in_it_is_refused(section, refusal):
    assert "zodb.storage" in refusal(read, section(base=""))


def test_an_error_holds_no_section_full_of_secrets(section):
    # Tools that report errors show the attributes of an exception as well.
    text = section(s3_access_key=ACCESS_KEY, s3_secret_key=SECRET_KEY, s3_sse="nonsense")
    with pytest.raises(ZConfig.ConfigurationError) as caught:
        read(text)
    shown = " ".join(f"{value} {value!r}" for value in vars(caught.value).values())
    assert not any(secret in shown for secret in SECRETS)


# SSE-C needs TLS


@pytest.mark.parametrize("keys", [{"s3_endpoint_url": "http://s3.example.net"}, {"s3_use_ssl": "false"}])
def test_a_customer_key_is_refused_without_tls(section, refusal, keys):
    sentence = refusal(read, section(s3_sse_customer_key=CUSTOMER_KEY, **keys))
    assert "s3-sse-customer-key" in sentence
    assert "TLS" in sentence


@pytest.mark.parametrize("keys", [{}, {"s3_endpoint_url": "https://s3.example.net", "s3_use_ssl": "false"}])
def test_a_customer_key_is_accepted_with_tls(section, keys):
    key = settings(section(s3_sse_customer_key=CUSTOMER_KEY, **keys)).s3_sse_customer_key
    assert key == base64.b64decode(CUSTOMER_KEY)


def test_a_customer_key_is_refused_if_boto3_finds_an_endpoint_without_tls(section, refusal, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    factory = read(section(s3_access_key=ACCESS_KEY, s3_secret_key=SECRET_KEY, s3_sse_customer_key=CUSTOMER_KEY))
    assert "s3-sse-customer-key" in refusal(factory.open)
    assert s3.requests() == []


# What the section means


def test_defaults(section):
    factory = read(section())
    assert factory.config.cache_size == 1 << 30
    assert factory.config.upload_timeout == 600
    assert factory.config.metrics_address is None
    assert factory.config.presigned_urls == 0
    assert vars(factory.settings) == {
        "bucket_name": "blobs",
        "s3_prefix": "",
        "s3_endpoint_url": None,
        "s3_public_endpoint_url": None,
        "s3_region": None,
        "s3_access_key": None,
        "s3_secret_key": None,
        "s3_session_token": None,
        "s3_use_ssl": True,
        "s3_ca_file": None,
        "s3_addressing_style": "auto",
        "s3_sse_customer_key": None,
        "s3_sse": None,
        "s3_sse_kms_key_id": None,
        "s3_storage_class": None,
        "s3_tagging": None,
        "s3_checksums": "when_supported",
        "s3_multipart_threshold": 8 << 20,
        "s3_concurrency": 16,
        "s3_connect_timeout": 5,
        "s3_read_timeout": 30,
        "s3_max_attempts": 3,
        "copy_timeout": 120,
        "pace": None,
    }


@pytest.mark.parametrize(
    ("options", "seconds"),
    [({"upload_timeout": "30s"}, 30), ({"s3_read_timeout": "3m"}, 180), ({"upload_timeout": "1h"}, 120)],
)
def test_a_copy_has_a_time_limit_of_its_own_below_that_of_the_transaction(section, options, seconds):
    assert settings(section(**options)).copy_timeout == seconds


@pytest.mark.parametrize(
    ("content", "trouble"), [(None, "cannot be read: No such file"), (b"no certificate", "holds no certificates")]
)
def test_a_file_of_authorities_that_is_none_stops_the_start(section, tmp_path, content, trouble):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartRefused, match=f"^s3-ca-file: {path} {trouble}"):
        read(section(s3_ca_file=path)).open_bucket(Metrics())


@pytest.mark.parametrize(
    ("key", "value", "meaning"),
    [
        ("s3_prefix", "site/one/", "site/one"),
        ("s3_endpoint_url", "http://minio.example.net:9000", "http://minio.example.net:9000"),
        ("s3_endpoint_url", "https://[::1]:9000", "https://[::1]:9000"),
        ("s3_public_endpoint_url", "https://files.example.net/s3", "https://files.example.net/s3"),
        ("s3_region", "eu-central-1", "eu-central-1"),
        ("s3_use_ssl", "off", False),
        ("s3_addressing_style", "virtual", "virtual"),
        ("s3_sse", "aws:kms", "aws:kms"),
        ("s3_storage_class", "STANDARD_IA", "STANDARD_IA"),
        ("s3_tagging", "project=plone&env=prod", None),
        ("s3_tagging", "a+b=c%20d&empty=", "a%20b=c%20d&empty="),
        ("s3_tagging", "Ort=M\xfcnchen:/=+@.-_", "Ort=M%C3%BCnchen%3A%2F%3D%20%40.-_"),
        ("s3_tagging", f"{'k' * 128}={'v' * 256}", None),
        ("s3_checksums", "when_required", "when_required"),
        ("s3_multipart_threshold", "5GB", 5 << 30),
        ("s3_concurrency", "4", 4),
        ("s3_connect_timeout", "1m", 60),
        ("s3_max_attempts", "1", 1),
        ("bucket_name", "arn:aws:s3:eu-central-1:111122223333:accesspoint/blobs", None),
    ],
)
def test_a_value_is_taken_over(section, key, value, meaning):
    assert getattr(settings(section(**{key: value})), key) == (value if meaning is None else meaning)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("localhost:8101", ("localhost", 8101)),
        ("ZEO.example.net:8101", ("zeo.example.net", 8101)),
        ("192.0.2.1:65535", ("192.0.2.1", 65535)),
        ("[2001:db8::1]:8101", ("2001:db8::1", 8101)),
        ("0.0.0.0:8101", ("0.0.0.0", 8101)),
        (":8101", ("", 8101)),
        ("8101", ("", 8101)),
    ],
)
def test_a_metrics_address_is_a_host_and_a_port(section, value, meaning):
    assert read(section(metrics_address=value)).config.metrics_address == meaning


def test_an_empty_value_is_no_value(section):
    # What $(NAME) leaves when the variable is set but empty.
    optional = ("s3_prefix", "s3_endpoint_url", "s3_region", "s3_access_key", "s3_secret_key", "s3_sse_customer_key")
    more = ("s3_public_endpoint_url", "s3_sse", "s3_sse_kms_key_id", "s3_storage_class", "s3_checksums")
    last = ("s3_session_token", "s3_tagging")
    assert settings(section(**dict.fromkeys((*optional, *more, *last), ""))) == settings(section())


def test_a_session_token_goes_with_both_keys_and_is_shown_nowhere(section, s3, bucket_name):
    keys = {"s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY, "s3_session_token": TOKEN}
    factory = read(section(bucket_name=bucket_name, s3_endpoint_url=s3.url, s3_region="us-east-1", **keys))
    assert factory.settings.s3_session_token == TOKEN
    assert TOKEN not in repr(factory.settings)
    bucket = factory.open_bucket(Metrics())
    bucket.probe()
    bucket.close()
    (request,) = s3.requests("ListObjects")
    assert request.headers["x-amz-security-token"] == TOKEN


def test_checksums_that_every_service_understands_are_the_default_beside_an_endpoint(section):
    assert settings(section(s3_endpoint_url="https://s3.example.net")).s3_checksums == "when_required"


def test_values_come_from_the_environment(section, monkeypatch):
    monkeypatch.setenv("TEST_BUCKET", "from-the-environment")
    monkeypatch.setenv("TEST_ACCESS_KEY", ACCESS_KEY)
    monkeypatch.setenv("TEST_SECRET_KEY", "with $ and $(this)")  # is not looked at again
    read_settings = settings(
        section(bucket_name="$(TEST_BUCKET)", s3_access_key="$(TEST_ACCESS_KEY)", s3_secret_key="$(TEST_SECRET_KEY)")
    )
    assert read_settings.bucket_name == "from-the-environment"
    assert read_settings.s3_access_key == ACCESS_KEY
    assert read_settings.s3_secret_key == "with $ and $(this)"


def test_a_missing_environment_variable_is_named(section, refusal, monkeypatch):
    monkeypatch.delenv("TEST_SECRET_KEY", raising=False)
    text = section(s3_access_key=ACCESS_KEY, s3_secret_key="$(TEST_SECRET_KEY)")
    assert "TEST_SECRET_KEY" in refusal(read, text)


# The start


@pytest.fixture
def s3_section(section, s3, bucket_name):
    """As `section`, with a bucket that is there."""

    def make(base=MAPPING, **keys):
        there = {
            "bucket_name": bucket_name,
            "s3_endpoint_url": s3.url,
            "s3_access_key": ACCESS_KEY,
            "s3_secret_key": SECRET_KEY,
            "s3_max_attempts": "1",
        }
        return section(base, **{**there, **keys})

    return make


@pytest.fixture
def open_storage(s3_section):
    """Opens the storage of a section; closed after the test."""
    opened = []

    def make(base=MAPPING, **keys):
        opened.append(read(s3_section(base, **keys)).open())
        return opened[-1]

    yield make
    for storage in opened:
        storage.close()


def test_neither_repr_nor_log_shows_a_secret(open_storage, caplog, s3):
    caplog.set_level(logging.DEBUG)
    storage = open_storage()
    commit_blob(storage)
    assert s3.requests("PutObject")
    shown = caplog.text + repr(storage) + repr(storage._components)
    assert not any(secret in shown for secret in SECRETS)


def test_repr_of_the_settings_shows_no_secret(section):
    factory = read(section(s3_access_key=ACCESS_KEY, s3_secret_key=SECRET_KEY, s3_sse_customer_key=CUSTOMER_KEY))
    shown = f"{factory!r} {factory.settings!r} {factory.settings}"
    assert not any(secret in shown for secret in (*SECRETS, "customer key of this test"))


def test_an_unknown_bucket_stops_the_start(s3_section, refusal):
    assert refusal(read(s3_section(bucket_name="no-such-bucket")).open).startswith("bucket-name: ")


@pytest.mark.parametrize(
    ("status", "code", "key"),
    [
        (403, "InvalidAccessKeyId", "s3-access-key"),
        (403, "SignatureDoesNotMatch", "s3-secret-key"),
        (403, "AccessDenied", "s3-access-key"),
        (403, "", "s3-access-key"),
        (400, "AuthorizationHeaderMalformed", "s3-region"),
    ],
)
def test_refused_credentials_stop_the_start(s3_section, refusal, s3, status, code, key):
    # Services like to tell more than they should; with no code there is no text either.
    message = f"No good: {ACCESS_KEY} {SECRET_KEY} {CUSTOMER_KEY}" if code else ""
    s3.misbehave(status=status, code=code, message=message)
    sentence = refusal(read(s3_section()).open)
    assert sentence.startswith(f"{key}: ")
    assert "\n" not in sentence


def test_the_log_says_why_the_start_was_refused(s3_section, refusal, caplog):
    # The stderr of a daemon is read by nobody.
    sentence = refusal(read(s3_section(bucket_name="no-such-bucket")).open)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [sentence]


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"s3_concurrency": "0"}, "s3-concurrency"),
        ({"s3_sse": "nonsense"}, "s3-sse"),
        ({"bucket_name": "no-such-bucket"}, "bucket-name"),
    ],
)
def test_runzeo_says_it_in_one_sentence(s3_section, tmp_path, keys, key):
    eventlog = f"<eventlog>\n<logfile>\n path {tmp_path}/log\n</logfile>\n</eventlog>\n"
    (tmp_path / "zeo.conf").write_text(f"<zeo>\n address 127.0.0.1:0\n</zeo>\n{s3_section(**keys)}{eventlog}")
    runzeo = [sys.executable, "-m", "ZEO.runzeo", "-C", tmp_path / "zeo.conf"]
    done = subprocess.run(runzeo, capture_output=True, text=True, timeout=60)
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if "For help" not in line]
    assert len(said) == 1
    assert key in said[0]
    assert "line -1" not in said[0]


def test_no_credentials_at_all_stop_the_start(s3_section, refusal):
    assert "s3-access-key" in refusal(read(s3_section(s3_access_key=None, s3_secret_key=None)).open)


def test_a_region_that_is_none_stops_the_start(s3_section, refusal):
    assert "s3-region" in refusal(read(s3_section(s3_region="-europe-")).open)


def test_a_profile_that_does_not_exist_stops_the_start(s3_section, refusal, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    sentence = refusal(read(s3_section(s3_access_key=None, s3_secret_key=None)).open)
    assert "s3-access-key" in sentence
    assert "AWS_PROFILE" in sentence


def test_an_endpoint_that_is_down_does_not_stop_the_start(open_storage, caplog):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        storage = open_storage(s3_endpoint_url=f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
    assert "Starting anyway" in caplog.text
    assert objects_work(storage)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (502, "")])
def test_a_service_in_trouble_does_not_stop_the_start(open_storage, caplog, s3, status, code):
    s3.misbehave(status=status, code=code)
    storage = open_storage()
    assert "Starting anyway" in caplog.text
    assert objects_work(storage)


def test_a_service_that_does_not_answer_does_not_stop_the_start(open_storage, caplog, s3, monkeypatch):
    monkeypatch.setattr(config_module, "_PROBE_TIMEOUT", 0.2)
    s3.misbehave(hang=True)
    storage = open_storage()
    assert "did not answer within 0.2 s" in caplog.text
    assert objects_work(storage)


def test_the_start_logs_where_the_blobs_are_and_that_the_bucket_answered(
    open_storage, caplog, s3, bucket_name, tmp_path
):
    caplog.set_level(logging.INFO, "zodb_s3blobs.config")
    open_storage(s3_prefix="site1/")
    where, answered = [record.getMessage() for record in caplog.records if record.name == "zodb_s3blobs.config"]
    assert where == (
        f"s3blobstorage (cache-dir {tmp_path}/cache): bucket {bucket_name}, prefix site1, endpoint {s3.url}"
    )
    assert answered == f"Bucket {bucket_name} answered"


def test_nothing_is_said_of_a_bucket_that_did_not_answer_but_that_it_did_not(open_storage, caplog, s3, bucket_name):
    caplog.set_level(logging.INFO)
    s3.misbehave(status=503, code="SlowDown")
    open_storage()
    assert f"bucket {bucket_name}, prefix none" in caplog.text
    assert "Starting anyway" in caplog.text
    assert f"Bucket {bucket_name} answered" not in caplog.text


def test_the_log_shows_no_password_of_an_endpoint(section, bucket_name, s3, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "zodb_s3blobs.config")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url.replace("http://", "http://someone:hunter2@"))
    keys = {"bucket_name": bucket_name, "s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY}
    read(section(**keys)).open().close()
    assert f"endpoint {s3.url}" in caplog.text
    assert "hunter2" not in caplog.text


def objects_work(storage):
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["key"] = "value"
    with database.transaction() as connection:
        return connection.root()["key"] == "value"


def commit_blob(storage):
    """Commit a blob and read it again."""
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["blob"] = Blob(b"data")
    with database.transaction() as connection, connection.root()["blob"].open("c") as file:
        assert file.read() == b"data"


# The cache directory


def test_a_cache_directory_of_another_storage_is_refused(open_storage, s3_section, refusal):
    open_storage()
    assert refusal(read(s3_section(s3_prefix="another")).open).startswith("cache-dir: ")


def test_a_file_in_place_of_the_cache_directory_is_refused(s3_section, refusal, tmp_path):
    (tmp_path / "cache").write_text("something else")
    sentence = refusal(read(s3_section()).open)
    assert sentence.startswith("cache-dir: ")
    assert "not a directory" in sentence
    assert (tmp_path / "cache").read_text() == "something else"


def test_a_cache_directory_below_a_file_is_refused(s3_section, refusal, tmp_path):
    (tmp_path / "file").write_text("something else")
    assert refusal(read(s3_section(cache_dir="{dir}/file/cache")).open).startswith("cache-dir: ")


def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(s3_section, refusal, tmp_path):
    (tmp_path / "cache" / "tmp").mkdir(parents=True)
    (tmp_path / "cache" / "tmp" / "file").write_text("something else")
    assert refusal(read(s3_section()).open).startswith("cache-dir: ")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tmp"]
    assert (tmp_path / "cache" / "tmp" / "file").read_text() == "something else"


def test_a_cache_directory_is_made_with_all_above_it_and_only_for_its_owner(open_storage, tmp_path):
    open_storage(cache_dir="{dir}/new/directory/cache")
    assert (tmp_path / "new" / "directory" / "cache").stat().st_mode & 0o077 == 0


# What the earlier package of this name, zodb-s3blobs 1.2.1, leaves behind

#: Values of its sixteen keys, as its documentation writes them, without s3-endpoint-url and cache-dir.
EARLIER = {
    "bucket_name": "blobs",
    "s3_prefix": "site1",
    "s3_region": "eu-central-1",
    "s3_access_key": ACCESS_KEY,
    "s3_secret_key": SECRET_KEY,
    "s3_use_ssl": "true",
    "s3_addressing_style": "auto",
    "s3_sse_customer_key": CUSTOMER_KEY,
    "s3_connect_timeout": "60",
    "s3_read_timeout": "300",
    "s3_download_connect_timeout": "5",
    "s3_download_read_timeout": "10",
    "s3_download_max_attempts": "2",
    "cache_size": "1GB",
}

REPLACED = {
    "s3-download-connect-timeout": "s3-connect-timeout",
    "s3-download-read-timeout": "s3-read-timeout",
    "s3-download-max-attempts": "s3-max-attempts",
}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_section_of_1_2_1_with_all_its_keys_starts_and_warns(section, caplog):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        keys = {
            **EARLIER,
            "s3_endpoint_url": f"https://127.0.0.1:{nobody_listens.getsockname()[1]}",
            "cache_dir": "{dir}/cache",
        }
        assert len(keys) == 16
        factory = read(section(**keys))
        with contextlib.closing(factory.open()) as storage:
            assert objects_work(storage)
    assert (factory.settings.s3_connect_timeout, factory.settings.s3_read_timeout) == (60, 300)
    said = [line for line in warnings(caplog) if "1.2.1" in line]
    assert len(said) == 5
    for key, replacement in REPLACED.items():
        [line] = [line for line in said if f": {key} is a key of zodb-s3blobs 1.2.1" in line]
        assert f"{replacement} applies to downloads" in line
        assert f"Delete {key}" in line
    for key, seconds in ("s3-connect-timeout", 60), ("s3-read-timeout", 300):
        [line] = [line for line in said if f": {key} has no unit and means {seconds} seconds" in line]
        assert f"as in {seconds}s" in line


def test_a_section_of_1_2_1_keeps_its_blobs_in_the_bucket(s3_section, s3, bucket_name):
    keys = {key: value for key, value in EARLIER.items() if "timeout" in key or "download" in key}
    with contextlib.closing(read(s3_section(**keys)).open()) as storage:
        commit_blob(storage)
        assert len([key for key in s3.keys(bucket_name) if key.endswith(".blob")]) == 1


def test_a_section_without_keys_of_1_2_1_does_not_warn_of_it(open_storage, caplog):
    open_storage(s3_connect_timeout="60s", s3_read_timeout="5m")
    assert "1.2.1" not in caplog.text


@pytest.mark.parametrize("name", ["0/3f1c2d4e5a6b7c8.blob", "1a/3f1c2d4e5a6b7c8.blob", "ffffffffffffffff/1.blob"])
def test_a_cache_directory_of_1_2_1_is_refused_as_such_and_left_alone(s3_section, refusal, tmp_path, name):
    blob = tmp_path / "cache" / name
    blob.parent.mkdir(parents=True)
    blob.write_text("a blob")
    sentence = refusal(read(s3_section()).open)
    assert sentence.startswith(
        f"cache-dir: {tmp_path}/cache holds the cache of zodb-s3blobs 1.2.1: name a new directory"
    )
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [blob]


@pytest.mark.parametrize("name", ["1a/photo.blob", "01a/1.blob", "tmp/1.blob", "1a/1.blob.lock", "1.blob"])
def test_a_directory_that_looks_like_a_cache_of_1_2_1_but_is_none_is_not_called_one(
    s3_section, refusal, tmp_path, name
):
    (tmp_path / "cache" / name).parent.mkdir(parents=True)
    (tmp_path / "cache" / name).touch()
    assert "is not empty and is not a blob cache" in refusal(read(s3_section()).open)


def test_a_cache_directory_that_1_2_1_used_after_a_way_back_is_refused_as_well(
    open_storage, s3_section, refusal, tmp_path
):
    open_storage().close()
    (tmp_path / "cache" / "1a").mkdir()
    (tmp_path / "cache" / "1a" / "3f1c2d4e5a6b7c8.blob").touch()
    assert "holds the cache of zodb-s3blobs 1.2.1" in refusal(read(s3_section()).open)


# A bucket and a prefix belong to one section


def both(one, two, around="{}"):
    """The text of a configuration with the storages ``one`` and ``two``."""
    return "%import zodb_s3blobs\n%import zc.zlibstorage\n" + around.format(one + two)


@pytest.fixture
def named(s3_section):
    """The text of a named section without its imports."""

    def make(name, base=MAPPING, **keys):
        text = s3_section(base, **{"cache_dir": f"{{dir}}/cache-{name}", **keys})
        return "".join(text.partition("<s3blobstorage>")[1:]).replace("<s3blobstorage>", f"<s3blobstorage {name}>", 1)

    return make


@pytest.fixture
def open_both(closing):
    """Opens the storages of a configuration as runzeo does, one after the other."""
    schema = ZConfig.loadSchemaFile(
        StringIO(
            '<schema><import package="ZODB"/><multisection type="ZODB.storage" name="*" attribute="all"/></schema>'
        )
    )

    def open_both(text):
        config, _ = ZConfig.loadConfigFile(schema, StringIO(text))
        return [closing(factory.open()) for factory in config.all]

    return open_both


@pytest.fixture
def closing():
    """Closes what it is called with at the end of the test; returns it."""
    with contextlib.ExitStack() as opened:
        yield lambda storage: opened.enter_context(contextlib.closing(storage))


def is_refused_for_its_place(sentence, *names):
    assert sentence.startswith("s3-prefix: ")
    assert "give each a prefix of its own" in sentence
    for name in names:
        assert f"s3blobstorage {name} (cache-dir /" in sentence
    return True


@pytest.mark.parametrize(("first", "second"), [("", ""), ("site1", "site1"), ("site1/", "site1")])
def test_two_sections_with_one_bucket_and_prefix_stop_the_start_and_are_named(named, open_both, refusal, first, second):
    text = both(named("main", s3_prefix=first), named("archive", s3_prefix=second))
    assert is_refused_for_its_place(refusal(open_both, text), "main", "archive")


@pytest.mark.parametrize("keys", [{"s3_prefix": "site1"}, {"bucket_name": "another"}])
def test_two_sections_with_different_buckets_or_prefixes_are_opened(named, open_both, s3, keys):
    s3.bucket("another")
    assert len(open_both(both(named("main"), named("archive", **keys)))) == 2


def test_an_endpoint_is_the_same_however_it_is_spelt(named, open_both, refusal, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url.replace("http://", "HTTP://") + "/")
    text = both(named("main"), named("archive", s3_endpoint_url=None))
    assert is_refused_for_its_place(refusal(open_both, text), "main", "archive")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://S3.Example.net", "https://s3.example.net:443/", True),
        ("http://s3.example.net", "http://s3.example.net:80", True),
        ("http://[2001:DB8::1]:9000/s3", "http://[2001:db8::1]:9000/s3/", True),
        ("https://s3.amazonaws.com", "https://s3.eu-central-1.amazonaws.com", True),
        ("https://s3.example.net", "http://s3.example.net", False),
        ("https://s3.example.net", "https://s3.example.net:9000", False),
        ("https://s3.example.net/one", "https://s3.example.net/two", False),
        ("https://s3.example.net", "https://s3.example.com", False),
    ],
)
def test_how_endpoints_are_compared(section, one, other, same):
    def place(url):
        keys = {"s3_endpoint_url": url, "s3_region": "eu-central-1", "s3_access_key": "a", "s3_secret_key": "b"}
        with contextlib.closing(read(section(**keys)).open_bucket(Metrics())) as bucket:
            return place_of(bucket)

    assert (place(one) == place(other)) == same


def test_a_demostorage_around_two_sections_with_one_prefix_is_refused(named, open_both, refusal):
    inside = named("base"), named("changes")
    text = both(*inside, around="<demostorage 1>\n{}</demostorage>\n")
    assert is_refused_for_its_place(refusal(open_both, text), "base", "changes")


def test_sections_in_wrappers_are_told_apart_by_their_cache_directories(named, open_both, refusal):
    wrapped = [
        f"<zlibstorage {name}>\n{named(name).replace(f'<s3blobstorage {name}>', '<s3blobstorage>')}</zlibstorage>\n"
        for name in ("main", "archive")
    ]
    sentence = refusal(open_both, both(*wrapped))
    assert re.search(
        r"s3blobstorage \(cache-dir \S*/cache-main\) and s3blobstorage \(cache-dir \S*/cache-archive\)", sentence
    )


def test_a_section_that_was_closed_is_opened_again(named, open_both):
    text = both(named("main"), "")
    for _ in range(2):
        (storage,) = open_both(text)
        storage.close()


def test_a_section_whose_start_failed_holds_no_place(named, open_both, refusal, tmp_path):
    (tmp_path / "cache-main").write_text("something else")
    assert refusal(open_both, both(named("main"), "")).startswith("cache-dir: ")
    open_both(both(named("archive"), ""))


def test_a_refused_section_leaves_the_other_its_place(named, open_both, refusal):
    (storage,) = open_both(both(named("main"), ""))
    for _ in range(2):
        assert is_refused_for_its_place(refusal(open_both, both(named("archive"), "")), "main", "archive")
    storage.close()
    open_both(both(named("archive"), ""))


SQLITE = "<relstorage>\n keep-history false\n <sqlite3>\n data-dir {{dir}}/{}\n </sqlite3>\n</relstorage>"


def test_storages_of_one_relational_database_share_its_place(named, open_both, refusal):
    imports = "%import relstorage\n"
    one, two = named("main", SQLITE.format("sqlite")), named("again", SQLITE.format("sqlite"))
    storage, _ = open_both(imports + both(one, two))
    instance = storage.new_instance()  # of the same storage: no section of its own
    instance.release()
    instance.close()
    text = imports + both(named("another", SQLITE.format("another")), "")
    assert is_refused_for_its_place(refusal(open_both, text), "main", "another")
    assert is_refused_for_its_place(refusal(open_both, both(named("files", FILES), "")), "main", "files")


# The storage inside


BASES = {
    "filestorage": FILES,
    "mappingstorage": MAPPING,
    "demostorage": "<demostorage/>",
    "demostorage with base": f"<demostorage>\n{FILES}\n</demostorage>",
    "demostorage with base and changes": (
        "<demostorage>\n<mappingstorage base>\n</mappingstorage>\n"
        "<filestorage changes>\n path {dir}/changes.fs\n</filestorage>\n</demostorage>"
    ),
    "zlibstorage": f"<zlibstorage>\n{FILES}\n</zlibstorage>",
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_a_base_that_is_accepted_keeps_its_blobs_in_the_bucket(open_storage, s3, bucket_name, base):
    commit_blob(open_storage(base))
    assert re.fullmatch(r"blobs/[0-9a-f]+/[0-9a-f]+\.blob", "\n".join(s3.keys(bucket_name)))


def test_zlibstorage_around_it_is_accepted(s3_section, s3, bucket_name):
    imports, start, end = s3_section(FILES).partition("<s3blobstorage>")
    storage = read(f"{imports}<zlibstorage>\n{start}{end}</zlibstorage>\n").open()
    try:
        commit_blob(storage)
        assert len(s3.keys(bucket_name)) == 1
    finally:
        storage.close()


BLOB_FILES = "<filestorage>\n path {dir}/Data.fs\n blob-dir {dir}/blobs\n</filestorage>"

REFUSED_BASES = {
    "filestorage with blob-dir": (BLOB_FILES, "blob-dir"),
    "blobstorage": (f"<blobstorage>\n blob-dir {{dir}}/blobs\n {FILES}\n</blobstorage>", "blob-dir"),
    "demostorage around blobs": (f"<demostorage>\n{BLOB_FILES}\n</demostorage>", "blob-dir"),
    "zlibstorage around blobs": (f"<zlibstorage>\n{BLOB_FILES}\n</zlibstorage>", "blob-dir"),
    "itself": (
        "<s3blobstorage>\n bucket-name {bucket}\n s3-endpoint-url {url}\n s3-access-key a\n s3-secret-key b\n"
        " cache-dir {dir}/inner\n <mappingstorage/>\n</s3blobstorage>",
        "blob-dir",
    ),
    "zeoclient": ("<zeoclient>\n server localhost:1\n wait off\n</zeoclient>", "tid"),
}


@pytest.mark.parametrize(("base", "reason"), REFUSED_BASES.values(), ids=REFUSED_BASES.keys())
def test_a_base_that_does_not_fit_is_refused_in_one_sentence(s3_section, refusal, s3, bucket_name, base, reason):
    base = base.replace("{bucket}", bucket_name).replace("{url}", s3.url)
    sentence = refusal(read(s3_section(base)).open)
    assert sentence.startswith("s3blobstorage: ")
    assert reason in sentence
    assert "\n" not in sentence


class UnknownStorage:
    """A storage that is none of ZODB's, and says nothing about the tid it is committing."""

    closed = False

    def getName(self):
        return "unknown"

    def close(self):
        self.closed = True


class RelStorage(UnknownStorage):
    """What looks like RelStorage, on a kind of database such as Oracle."""

    _adapter = object()


RelStorage.__module__ = "relstorage.storage"


@pytest.mark.parametrize(
    ("base", "reason"), [(UnknownStorage(), "tid"), (RelStorage(), "sqlite3, postgresql or mysql")]
)
def test_a_storage_that_cannot_be_served_is_refused_and_closed(s3_section, refusal, base, reason):
    factory = read(s3_section())
    factory.config.base = SimpleNamespace(open=lambda: base)
    sentence = refusal(factory.open)
    assert sentence.startswith("s3blobstorage: ")
    assert reason in sentence
    assert "\n" not in sentence
    assert base.closed


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "cannot be opened: Is a directory; check the path"),
        (lambda path: path.write_bytes(b"This is no database."), "is not the file of a filestorage: correct the path"),
    ],
    ids=["a directory", "another file"],
)
def test_files_that_the_base_cannot_use_are_refused_in_one_sentence(s3_section, refusal, tmp_path, make, reason):
    path = tmp_path / "Data.fs"
    make(path)
    sentence = refusal(read(s3_section(FILES)).open)
    assert sentence.startswith(f"s3blobstorage: {path} {reason}")
    assert "\n" not in sentence


def test_a_database_that_another_process_has_open_is_refused_in_one_sentence(s3_section, refusal, tmp_path):
    with contextlib.closing(FileStorage(str(tmp_path / "Data.fs"))):
        sentence = refusal(read(s3_section(FILES)).open)
    assert sentence == (
        f"s3blobstorage: another process has the database open: Couldn't lock '{tmp_path}/Data.fs.lock'. Stop that "
        f"process first"
    )


def test_the_name_of_a_base_may_hold_anything(s3_section):
    # A name is shown in the refusal; it must not be mistaken for a format.
    factory = read(s3_section())
    factory.config.base = SimpleNamespace(open=lambda: MappingStorage("100% {}"))
    factory.open().close()


# After a start that failed nothing is left open


def opens_again(factory, tmp_path):
    FileStorage(str(tmp_path / "Data.fs")).close()  # LockError if somebody has it
    factory.open().close()
    return True


def test_everything_is_free_again_after_a_refused_bucket(s3_section, refusal, s3, tmp_path):
    factory = read(s3_section(FILES))
    s3.misbehave(status=403, code="AccessDenied")
    refusal(factory.open)
    s3.behave()
    assert opens_again(factory, tmp_path)


def test_everything_is_free_again_after_a_refused_cache_directory(s3_section, tmp_path):
    factory = read(s3_section(FILES))
    (tmp_path / "cache").write_text("something else")
    # The exception, and with it all its frames, lives on as it would in a process that reports it.
    with pytest.raises(ZConfig.ConfigurationError):
        factory.open()
    (tmp_path / "cache").unlink()
    assert opens_again(factory, tmp_path)


def test_everything_is_free_again_after_a_cache_directory_that_cannot_be_swept(s3_section, tmp_path):
    factory = read(s3_section(FILES))
    factory.open().close()
    (tmp_path / "cache" / "tmp").rmdir()
    (tmp_path / "cache" / "tmp").write_text("no directory")
    with pytest.raises(ZConfig.ConfigurationError) as caught:
        factory.open()
    assert str(caught.value).startswith("cache-dir: ")
    (tmp_path / "cache" / "tmp").unlink()
    assert opens_again(factory, tmp_path)


def test_everything_is_free_again_after_a_refused_base(s3_section, tmp_path):
    with pytest.raises(ZConfig.ConfigurationError):
        read(s3_section(BLOB_FILES)).open()
    assert opens_again(read(s3_section(FILES)), tmp_path)


def test_everything_is_free_again_after_a_base_that_does_not_open(s3_section, tmp_path):
    factory = read(s3_section(FILES))
    somebody = FileStorage(str(tmp_path / "Data.fs"))
    with pytest.raises(Exception, match="lock"):
        factory.open()
    somebody.close()
    assert opens_again(factory, tmp_path)


@pytest.fixture(autouse=True)
def no_transaction_left():
    yield
    transaction.abort()


@pytest.mark.parametrize("url", ["https://s3.example.net", "http://[::1]:9000/", "https://example.net/storage/v1/s3"])
def test_an_endpoint_may_have_a_port_and_a_path(section, url):
    assert read(section(s3_endpoint_url=url)).settings.s3_endpoint_url == url
