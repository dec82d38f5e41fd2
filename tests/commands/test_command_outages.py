"""The commands that read a whole bucket, when the service is not reached: from the start, or in the middle."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.support.link import OUTAGES, Link
from tests.support.sites import KEYS, sentence
from tests.support.speed import slow_but
from tests.support.zeo_server import free_address

#: So that nothing waits for long.
IMPATIENT = {"s3_connect_timeout": "1s", "s3_read_timeout": "1s", "s3_max_attempts": 1}

#: What each of them does to the bucket while it works.
WORK = {"migrate": "PutObject", "export": "GetObject", "verify": "GetObject"}


#: The ways in which a service is not reached.
WAYS = [*OUTAGES, "TLS", "proxy", "web page"]


@contextlib.contextmanager
def unreachable(how, s3):
    """Yield the ``url`` of a service that is not reached, and the environment ``env`` of the processes that try."""
    with Link(s3.url) as link:
        service = SimpleNamespace(url=link.url, env=dict(os.environ))
        if how == "TLS":
            service.url = s3.url.replace("http:", "https:")
        elif how == "proxy":
            service.env |= {"HTTP_PROXY": "http://{}:{}".format(*free_address()), "NO_PROXY": ""}
        elif how == "web page":
            s3.misbehave(status=200, body="<html>We will be back soon.</html>")
        else:
            link.break_down(how)
        yield service


@pytest.fixture
def arguments(tmp_path):
    """The options of each command, besides its zeo.conf."""
    return {
        "migrate": ["--from-blob-dir", tmp_path / "blobs"],
        "export": ["--to-blob-dir", tmp_path / "out"],
        "verify": ["--checksum"],
    }


@pytest.fixture
def prepared(s3, bucket_name, site):
    """Has in the bucket what a command needs there: nothing for ``migrate``, and all blobs for the others."""

    def prepared(command, more=0):
        site.grow(more=more)
        if command != "migrate":
            for name, data in site.revisions.items():
                metadata = {"sha256": hashlib.sha256(data).hexdigest()}
                s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(*name), Body=data, Metadata=metadata)

    return prepared


def counts(out):
    """The words of a table, and the numbers of their objects, without zeros."""
    rows = re.findall(r"^(\w+) +([\d,]+) +[\d,]+  \S", out, re.M)
    return {word: int(number.replace(",", "")) for word, number in rows if number != "0"}


def complaints(out, err):
    """What is printed, without what is merely logged."""
    return [line for line in (out + err).splitlines() if not line.startswith("INFO:")]


def blamed(out):
    """The lines that list blobs with trouble."""
    return [line for line in out.splitlines() if re.match(r"\w+: oid ", line)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("command", slow_but("verify", of=WORK))
def test_a_service_that_is_not_reached_is_said_in_one_sentence(
    s3, bucket_name, site, tool, prepared, arguments, command, how
):
    prepared(command)
    with unreachable(how, s3) as service:
        conf = site.configure(service, bucket_name, **IMPATIENT)
        if how == "proxy":  # for a process of its own environment
            out, err = tool.end(tool.begin(command, conf, *arguments[command], env=service.env), status=1)
        else:
            out, err = tool(command, conf, *arguments[command], status=1)
    line = sentence(err)
    assert f"bucket {bucket_name}" in line and "None" not in line
    assert "s3-endpoint-url" in line or "HTTP_PROXY" in line
    if (command, how) == ("export", "web page"):  # which says nothing of the owner; and nothing is listed
        assert "does not answer, so the rest was not tried" in line
    else:
        assert out == ""
    assert not any(str(site.directory) in line for line in complaints(out, err))


@pytest.mark.parametrize("how", slow_but("reset", of=["silent to a SYN", "reset"]))
@pytest.mark.parametrize("command", slow_but("export", of=WORK))
def test_a_service_that_goes_away_ends_it_early_and_no_file_is_blamed(
    s3, bucket_name, site, tool, prepared, arguments, command, how
):
    prepared(command, more=200)
    number = len(site.revisions)
    with Link(s3.url) as link:
        conf = site.configure(link, bucket_name, s3_concurrency=4, **IMPATIENT)
        s3.misbehave(operation=WORK[command], times=20)
        s3.misbehave(operation=WORK[command], latency=0.2)
        running = tool.begin(command, conf, *arguments[command])
        s3.wait_for(WORK[command], 25)
        link.break_down(how)
        out, err = tool.end(running, status=1)
    line = sentence(err)
    assert f"S3 does not answer, so the rest was not tried. Could not list bucket {bucket_name}: " in line
    found = counts(out)
    assert found.keys() == {"good" if command == "verify" else "copied", "failed"}
    assert 0 < found["failed"] <= 8 and sum(found.values()) < number
    assert out.splitlines()[-1] == f"Not finished: {found['failed']} failed."
    assert len(blamed(out)) == found["failed"]
    assert all(" in bucket " in line or " of bucket " in line for line in blamed(out))
    assert not any(str(site.directory) in line or "None" in line for line in complaints(out, err))

    s3.behave()
    s3.forget()
    out, _ = tool(command, site.configure(s3, bucket_name), *arguments[command])
    done = counts(out)
    if command == "verify":
        assert done == {"good": number}
    else:
        # What had begun when the service went away may have been done without an answer.
        assert done["there"] >= found["copied"] and sum(done.values()) == number
        assert len(s3.requests(WORK[command])) < number


@pytest.mark.parametrize("command", WORK)
def test_one_request_that_is_not_answered_is_no_outage(s3, bucket_name, site, tool, prepared, arguments, command):
    prepared(command)
    number = len(site.revisions)
    conf = site.configure(s3, bucket_name, **IMPATIENT)
    s3.misbehave(operation=WORK[command], times=1, reset=True)
    out, err = tool(command, conf, "--json", *arguments[command], status=1 if command == "verify" else 3)
    found = json.loads(out)["found"]
    assert found["failed"]["objects"] == 1
    assert found["good" if command == "verify" else "copied"]["objects"] == number - 1
    assert "does not answer" not in err


@pytest.mark.parametrize("command", slow_but("migrate", of=WORK))
def test_a_service_that_answers_all_but_the_blobs_is_given_up_after_some_of_them(
    s3, bucket_name, site, tool, prepared, arguments, command
):
    prepared(command, more=60)
    conf = site.configure(s3, bucket_name, s3_concurrency=2, **IMPATIENT)
    s3.misbehave(operation=WORK[command], reset=True)
    out, err = tool(command, conf, *arguments[command], status=1)
    assert "20 blobs in a row failed, so the rest was not tried" in sentence(err)
    assert counts(out) == {"failed": 20}
    assert 20 <= len(s3.requests(WORK[command])) < 30


def test_blobs_that_are_missing_matter_more_than_an_outage(s3, bucket_name, site, tool, prepared):
    prepared("verify")
    s3.client.delete_object(Bucket=bucket_name, Key=KEYS.key(*min(site.revisions)))
    s3.misbehave(operation="ListObjects", times=1)
    s3.misbehave(reset=True)
    conf = site.configure(s3, bucket_name, s3_concurrency=1, **IMPATIENT)
    out, err = tool("verify", conf, "--checksum", status=3)
    assert "does not answer" in sentence(err)
    assert counts(out) == {"missing": 1, "failed": 1}
    assert out.splitlines()[-1] == "Not finished: 1 missing, 1 failed."


def test_an_outage_is_asked_about_once(s3, bucket_name, site, tool, prepared, arguments):
    """Whether the bucket answers is found out by one request, and not by one for each blob."""
    prepared("export", more=60)
    conf = site.configure(s3, bucket_name, s3_concurrency=1, **IMPATIENT)
    s3.misbehave(operation="GetObject|ListObjects", reset=True)
    tool("export", conf, *arguments["export"], status=1)
    requests = Counter(request.operation for request in s3.requests())
    assert requests["ListObjects"] == 1 and requests["GetObject"] <= 3


def test_export_does_not_wait_for_every_blob_that_the_fallback_has(
    s3, bucket_name, site, tool, prepared, arguments, tmp_path
):
    """Each would be there after the time that a request takes to fail: of many blobs, days."""
    prepared("export", more=60)
    conf = site.configure(s3, bucket_name, fallback_blob_dir=site.blob_dir, s3_concurrency=1, **IMPATIENT)
    s3.misbehave(reset=True)
    out, err = tool("export", conf, *arguments["export"], status=1)
    assert f"S3 does not answer, so the rest was not tried. Could not list bucket {bucket_name}: " in sentence(err)
    assert counts(out) == {"copied": 1} and out.splitlines()[-1] == "Not finished."
    s3.behave()
    s3.misbehave(operation="GetObject", times=1, reset=True)
    out, _ = tool("export", conf, *arguments["export"])
    # What has begun is waited for, and not counted.
    found = counts(out)
    assert found["copied"] + found["there"] == len(site.revisions) and found["there"] <= 3
