"""``zodb-s3blobs check`` in a process of its own: what it says of good and odd services, and that it leaves nothing."""

import base64
import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from tests.support.gate import Answer, Gate, certificate, error, page
from tests.support.sites import run
from tests.support.speed import slow, slow_after
from tests.support.zeo_server import CONFIG, FILESTORAGE, SECTION, free_address

SECRET = "test-secret"
WRONG_MD5, WRONG_CRC32 = "AAAAAAAAAAAAAAAAAAAAAA==", "AAAAAA=="
ROWS = [
    *("put and get", "checksums", "storage class", "tagging", "encryption", "clock", "metadata"),
    *("absent blobs", "damaged uploads", "ranges", "list", "delete", "batch delete", "multipart", "unfinished uploads"),
    *("copy", "staging", "If-None-Match", "If-Match", "owner lease", "links", "clean-up"),
]
OTHERS = ["1/blobs/1/2.blob", "1/owner.json", "1/check-mine", "blobs/1/2.blob"]


@pytest.fixture
def configure(tmp_path, s3, bucket_name):
    """Writes a zeo.conf; keywords are keys of the section. Returns its path."""

    def configure(endpoint=None, bucket=bucket_name, **options):
        section = SECTION.format(
            name="1",
            bucket=bucket,
            endpoint=endpoint or s3.url,
            dir=tmp_path,
            cache="cache",
            options="\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items()),
            base=FILESTORAGE.format(dir=tmp_path),
        )
        path = tmp_path / "zeo.conf"
        path.write_text(CONFIG.format(port=1, zeo="", dir=tmp_path, storages=section))
        return path

    return configure


@pytest.fixture
def check(configure):
    """Runs ``zodb-s3blobs check``; returns the process that has ended."""

    def check(*arguments, status=0, **options):
        returned, stdout, stderr = run("check", "-C", str(configure(**options)), *arguments)
        done = SimpleNamespace(stdout=stdout, stderr=stderr)
        assert returned == status, done.stdout + done.stderr
        assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
        return done

    return check


@pytest.fixture
def odd(check, bucket_name):
    """Runs it; returns the outcomes of all checks that do not simply work, by name."""

    def odd(**options):
        result = json.loads(check("--json", **options).stdout)
        assert result["bucket"] == bucket_name and [one["check"] for one in result["checks"]] == ROWS
        outcomes = {one.pop("check"): one for one in result["checks"]}
        assert result["passed"] == all(one["state"] in ("works", "worked around") for one in outcomes.values())
        return {name: one for name, one in outcomes.items() if one["state"] != "works"}

    return odd


def states(outcomes):
    return {name: one["state"] for name, one in outcomes.items()}


@pytest.fixture
def everything(s3, bucket_name):
    """All that is in the bucket: keys, ETags and times; versions; unfinished uploads."""

    def everything():
        ask = {"Bucket": bucket_name}
        objects = s3.client.list_objects_v2(**ask).get("Contents", ())
        versions = s3.client.list_object_versions(**ask)
        return (
            [(one["Key"], one["ETag"], one["LastModified"]) for one in objects],
            [one["Key"] for kind in ("Versions", "DeleteMarkers") for one in versions.get(kind, ())],
            [one["Key"] for one in s3.client.list_multipart_uploads(**ask).get("Uploads", ())],
        )

    return everything


@pytest.fixture
def left_as_it_was(s3, bucket_name, everything):
    """Whatever the test does, others' objects and uploads are in the bucket, and nothing but them afterwards."""
    s3.put(bucket_name, OTHERS)
    s3.client.create_multipart_upload(Bucket=bucket_name, Key="1/blobs/1/3.blob")
    before = everything()
    yield
    s3.behave()
    assert everything() == before


@pytest.fixture(scope="module")
def recorded():
    """The requests of a run on a well-behaved service, once there has been one."""
    return []


@pytest.fixture
def meet(s3, check, recorded):
    """Lets the first request of ``operation`` that is ``meant`` meet a fault, and those before it another."""
    met = Counter()

    def meet(operation, meant, meanwhile=None, **fault):
        if not recorded:
            check("--json", status=3)
            recorded.extend(s3.requests())
            s3.forget()
        requests = [request for request in recorded if request.operation == operation]
        before = [meant(request) for request in requests].index(True) - met[operation]
        if before:
            s3.misbehave(operation=operation, times=before, **(meanwhile or {}))
        s3.misbehave(operation=operation, times=1, **fault)
        met[operation] += before + 1

    return meet


@pytest.fixture
def good(meet):
    """Moto refuses a body with a wrong Content-MD5, and tells its time, as all real services do."""
    meet(
        "PutObject",
        lambda request: request.headers.get("content-md5") == WRONG_MD5,
        meanwhile={"headers": {"Date": email.utils.formatdate(usegmt=True)}},
        status=400,
        code="BadDigest",
    )


# What moto itself is found to be.
MOTO = {"clock": "worked around", "damaged uploads": "fails"}


# Good services


def test_all_works_on_a_good_service_and_no_other_key_is_touched(
    s3, good, check, left_as_it_was, bucket_name, tmp_path
):
    done = check()
    *table, nothing, last = done.stdout.splitlines()
    assert (nothing, last, done.stderr) == ("", f"Bucket {bucket_name} passed", "")
    assert len(table) == len(ROWS)
    for name, line in zip(ROWS, table, strict=True):
        assert re.match(rf"{name} +works  +\w", line)
    kinds = ["Put", "Get", "Head", "Delete", "Copy"]
    requests = s3.requests() + [one for kind in kinds for one in s3.requests(f"Owner{kind}Object")]
    touched = {one.path for one in requests if one.path.strip("/") != bucket_name}
    (prefix,) = {re.match(rf"/{bucket_name}/1/check-[0-9a-f]{{32}}/", path)[0] for path in touched}
    assert f"nothing is left below {prefix.removeprefix(f'/{bucket_name}/')}" in table[-1]
    assert len(s3.requests("UploadPart")) == 3
    assert "bytes=8388608-16777215" in [request.headers.get("range") for request in s3.requests("GetObject")]
    assert not {"Data.fs", "cache"} & set(os.listdir(tmp_path))


@slow
def test_a_high_threshold_does_not_keep_multipart_from_being_tried(s3, good, check, left_as_it_was):
    check(s3_multipart_threshold="1GB")
    assert len(s3.requests("UploadPart")) == 3


@slow
def test_nothing_stays_in_a_bucket_that_keeps_versions(s3, good, bucket_name, odd, everything):
    s3.client.put_bucket_versioning(Bucket=bucket_name, VersioningConfiguration={"Status": "Enabled"})
    s3.client.put_object(Bucket=bucket_name, Key=OTHERS[0])
    s3.client.delete_object(Bucket=bucket_name, Key=OTHERS[0])
    before = everything()
    assert len(before[1]) == 2
    assert odd(s3_sse="AES256") == {}
    assert everything() == before


# What is worked around, and what is not needed


NOT_IMPLEMENTED, ACCESS_DENIED = {"status": 501, "code": "NotImplemented"}, {"status": 403, "code": "AccessDenied"}


@pytest.mark.parametrize(
    ("faults", "expected"),
    slow_after(
        1,
        of=[
            (
                {
                    "GetObject": {"ignore_range": True},
                    "CopyObject": NOT_IMPLEMENTED,
                    "DeleteObjects": NOT_IMPLEMENTED,
                    "ListMultipartUploads": ACCESS_DENIED,
                    "PutObject": {"ignore_condition": True},
                    "OwnerPutObject": {"refuse_condition": True},
                },
                {
                    "ranges": "large blobs are read in one piece",
                    "copy": "blobs are uploaded again",
                    "staging": "large blobs are uploaded twice",
                    "batch delete": "deleted one by one",
                    "unfinished uploads": "forbids s3:ListBucketMultipartUploads",
                    "If-None-Match": "ignores it",
                    "If-Match": "ignores it",
                },
            ),
            (
                {
                    "DeleteObjects": {"status": 400, "code": "BadRequest"},
                    "ListMultipartUploads": {"status": 200, "body": "<ListMultipartUploadsResult/>"},
                    "PutObject": {"refuse_condition": True},
                    "OwnerPutObject": {"misread_etag": True},
                },
                {
                    "batch delete": "deleted one by one",
                    "unfinished uploads": "does not list them",
                    "If-None-Match": "NotImplemented",
                    "If-Match": "NotImplemented",
                },
            ),
        ],
        unpack=True,
    ),
)
def test_what_the_server_can_do_without_is_worked_around(s3, good, odd, left_as_it_was, faults, expected):
    for operation, fault in faults.items():
        s3.misbehave(operation=operation, **fault)
    found = odd()
    assert states(found) == dict.fromkeys(expected, "worked around")
    for name, words in expected.items():
        assert words in found[name]["meaning"]
        assert found[name]["set"] == ("s3-stage-threshold 0" if name == "staging" else "")


@slow
def test_an_etag_that_is_misread_and_a_name_in_other_letters_are_worked_around(
    s3, good, meet, odd, left_as_it_was, recorded
):
    puts = [request for request in recorded if request.operation == "PutObject"]
    meet("PutObject", lambda request: request is puts[-1], misread_etag=True)  # the last condition is met
    digests = [request.headers.get("x-amz-meta-sha256") for request in puts]
    digest = max(set(digests) - {None}, key=digests.count)
    s3.misbehave(operation="HeadObject", headers={"X-Amz-Meta-Sha256": digest})
    found = odd()
    assert states(found) == {"If-Match": "worked around", "metadata": "worked around"}
    assert "Ceph 16" in found["If-Match"]["meaning"]


@slow
def test_what_the_settings_do_without_is_not_needed(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="CopyObject|CreateMultipartUpload", **NOT_IMPLEMENTED)
    found = odd(s3_stage_threshold=0, s3_multipart_threshold="5GB")
    assert states(found) == {"copy": "worked around", "unfinished uploads": "worked around"}


# What fails


@pytest.mark.parametrize(
    ("faults", "expected"),
    slow_after(
        1,
        of=[
            (
                {
                    "UploadPart": {"status": 400, "code": "InvalidPart"},
                    "OwnerPutObject": {"status": 200, "headers": {"ETag": '"x"'}},
                    "DeleteObjects": ACCESS_DENIED,
                    "HeadObject": {"headers": {"x-amz-meta-sha256": ""}},
                },
                {
                    "multipart": "InvalidPart (HTTP 400); in one request it works",
                    "owner lease": "no garbage would be collected",
                    "batch delete": "forbids s3:DeleteObject",
                    "metadata": "does not come back",
                    "copy": "a copy loses the metadata",
                    "staging": "a copy loses the metadata",
                },
            ),
            (
                {
                    "CreateMultipartUpload": ACCESS_DENIED,
                    "DeleteObjects": {"status": 200, "body": "<DeleteResult/>"},
                    "CopyObject": {"status": 200, "body": "<CopyObjectResult><ETag>x</ETag></CopyObjectResult>"},
                    "OwnerGetObject": {"headers": {"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}},
                },
                {
                    "multipart": "forbids s3:PutObject",
                    "unfinished uploads": "the cause is that of multipart",
                    "batch delete": "are still there",
                    "copy": "confirms a copy, and does not have it",
                    "staging": "confirms a copy, and does not have it",
                    "owner lease": "seconds old",
                },
            ),
        ],
        unpack=True,
    ),
)
def test_what_the_server_needs_fails(s3, good, odd, left_as_it_was, faults, expected):
    for operation, fault in faults.items():
        s3.misbehave(operation=operation, **fault)
    found = odd(status=3)
    assert states(found) == dict.fromkeys(expected, "fails")
    for name, words in expected.items():
        assert words in found[name]["meaning"]
        in_parts = name == "multipart" and "UploadPart" in faults
        of_copies = "s3-stage-threshold 0" if name in ("copy", "staging") else ""
        assert found[name]["set"] == ("s3-multipart-threshold 5GB" if in_parts else of_copies)


def test_a_link_is_followed_to_the_public_endpoint(s3, good, check, left_as_it_was):
    with Gate(s3.url, lambda ask: None) as public:
        done = check(presigned_urls="1h", s3_public_endpoint_url=public.url)
    assert re.search(rf"links +works +links to {urlsplit(public.url).netloc} can be followed", done.stdout)
    [asked] = public.asked
    assert (asked.method, "authorization" in asked.headers) == ("GET", False)
    assert "X-Amz-Signature" not in done.stdout + done.stderr


def _without_headers_asked_for(ask):
    ask.path = re.sub(r"response-content-[^&]*&", "", ask.path)


@pytest.mark.parametrize(
    ("judge", "state", "words"),
    slow_after(
        2,
        of=[
            (None, "worked around", "no link can be followed from this machine (ConnectionRefusedError)"),
            (lambda ask: error(403, "SignatureDoesNotMatch"), "fails", "HTTP 403: check s3-public-endpoint-url"),
            (lambda ask: page(200), "fails", "a link leads to other bytes at "),
            (_without_headers_asked_for, "worked around", "ignores the content type or the file name"),
        ],
        unpack=True,
    ),
)
def test_what_is_wrong_with_links_is_told(s3, good, odd, left_as_it_was, judge, state, words):
    with Gate(s3.url, judge) as public:
        url = public.url if judge else "http://{}:{}".format(*free_address())
        found = odd(status=3 if state == "fails" else 0, presigned_urls="1h", s3_public_endpoint_url=url)
    assert states(found) == {"links": state}
    assert words in found["links"]["meaning"]


@slow
def test_an_abort_that_is_forbidden_fails(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="AbortMultipartUpload", times=1, **ACCESS_DENIED)
    s3.misbehave(operation="ListMultipartUploads", **ACCESS_DENIED)
    found = odd(status=3)
    assert states(found) == {"unfinished uploads": "fails"}
    assert "forbids s3:AbortMultipartUpload" in found["unfinished uploads"]["meaning"]


@slow
def test_without_permission_to_list_absent_blobs_look_like_an_outage(meet, good, odd, left_as_it_was):
    meet("HeadObject", lambda request: request.status == 404, status=403)
    found = odd(status=3)
    assert states(found) == {"absent blobs": "fails"}
    assert "must allow s3:ListBucket" in found["absent blobs"]["meaning"]


@slow
def test_what_cannot_be_listed_is_deleted_all_the_same(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="ListObjects", status=403, code="AccessDenied")
    found = odd(status=3)
    assert states(found) == {"list": "fails", "staging": "fails"}
    assert "forbids s3:ListBucket" in found["list"]["meaning"]
    assert found["staging"]["meaning"] == "the cause is that of list"


@slow
def test_a_listing_that_loses_a_page_fails_and_so_does_s3_sse_that_is_not_applied(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="HeadObject", headers={"x-amz-server-side-encryption": ""})
    s3.misbehave(operation="ListObjects", times=2)  # the first look, and the first page
    s3.misbehave(operation="ListObjects", times=1, status=200, body="<ListBucketResult/>")
    assert states(odd(s3_sse="AES256", status=3)) == {"encryption": "fails", "list": "fails"}


@pytest.mark.parametrize("apart", slow_after(1, of=[300, -3600]))
def test_the_clocks_are_compared(s3, odd, left_as_it_was, apart):
    date = email.utils.formatdate(time.time() + apart, usegmt=True)
    s3.misbehave(operation="PutObject", headers={"Date": date})
    found = odd(status=3)
    assert states(found) == {**MOTO, "clock": "worked around" if apart == 300 else "fails"}
    told = int(re.search(r"are (\d+) seconds apart", found["clock"]["meaning"])[1])
    assert abs(told - abs(apart)) < 60 and "NTP" in found["clock"]["meaning"]


@slow
def test_a_service_that_takes_damaged_uploads_needs_tls(odd, tls, left_as_it_was):
    found = odd(status=3)
    assert states(found) == MOTO and found["damaged uploads"]["set"] == "s3-endpoint-url https://..."
    assert states(odd(endpoint=tls)) == {**MOTO, "damaged uploads": "worked around"}


@slow
def test_the_checksums_by_which_damage_is_refused_are_named(meet, odd, left_as_it_was):
    crc = {"x-amz-checksum-crc32": WRONG_CRC32}
    meet("PutObject", lambda request: crc.items() <= request.headers.items(), status=400, code="BadDigest")
    found = odd(status=3)
    assert states(found) == MOTO
    assert found["damaged uploads"]["set"] == "s3-checksums when_supported"


@slow
def test_the_checksums_that_a_service_understands_are_named_and_used(s3, odd, left_as_it_was):
    def judge(ask):
        has_trailer = ask.method == "PUT" and "x-amz-sdk-checksum-algorithm" in ask.headers
        return error(411, "MissingContentLength") if has_trailer else None

    with Gate(s3.url, judge) as gate:
        found = odd(endpoint=gate.url, s3_checksums="when_supported", status=3)
    assert states(found) == {**MOTO, "checksums": "fails"}
    assert found["checksums"]["set"] == "s3-checksums when_required"
    assert "content-md5" in s3.requests("UploadPart")[0].headers


# Encryption


@pytest.fixture
def tls(s3, tmp_path, monkeypatch):
    """The URL of the S3 server over TLS."""
    context, pem = certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(pem))
    with Gate(s3.url, lambda ask: None, context) as gate:
        yield gate.url


CUSTOMER_KEY = base64.b64encode(bytes(range(32))).decode()


@slow
def test_a_service_that_ignores_the_customer_key_fails(odd, tls, left_as_it_was):
    found = odd(endpoint=tls, s3_sse_customer_key=CUSTOMER_KEY, status=3)
    assert "ignores s3-sse-customer-key" in found["encryption"]["meaning"]


# No answer


def only_sentence(done):
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("fault", "advice"),
    slow_after(
        2,
        of=[
            ({"status": 404, "code": "NoSuchBucket"}, "check bucket-name"),
            ({"status": 403, "code": "SignatureDoesNotMatch"}, "check s3-access-key and s3-secret-key"),
            ({"status": 403, "code": "RequestTimeTooSkewed"}, "check the clock of this machine"),
            ({"status": 503, "code": "SlowDown"}, "SlowDown"),
        ],
        unpack=True,
    ),
)
def test_a_bucket_that_cannot_be_used_at_all_is_one_sentence(s3, check, left_as_it_was, fault, advice):
    s3.misbehave(**fault)
    assert advice in only_sentence(check(status=1, s3_max_attempts=1))
    assert {request.operation for request in s3.requests()} == {"ListObjects"}


def test_a_service_that_is_not_there_is_one_sentence(check):
    url = "http://{}:{}".format(*free_address())
    assert "check s3-endpoint-url" in only_sentence(check(endpoint=url, status=1, s3_max_attempts=1))


def run_resolving(path, *hosts):
    """Run it where the names ``hosts``, and no others, are those of this machine."""
    returned, stdout, stderr = run("check", "-C", str(path), hosts=hosts)
    return SimpleNamespace(returncode=returned, stdout=stdout, stderr=stderr)


def test_a_service_that_knows_no_host_names_of_buckets_is_named_with_the_key_to_set(s3, configure, left_as_it_was):
    endpoint = s3.url.replace("127.0.0.1", "localhost")
    done = run_resolving(configure(endpoint=endpoint, s3_addressing_style="virtual", s3_max_attempts=1), "localhost")
    assert done.returncode == 1, done.stderr
    assert "s3-addressing-style path" in only_sentence(done)


@pytest.mark.parametrize(
    "answer",
    slow_after(
        3,
        of=[
            Answer(200, "<html>Welcome</html>", "text/html"),
            Answer(200, "<html>Welcome</html>", "text/html", headers=(("ETag", '"1"'),)),
            Answer(200),
            Answer(302, headers=(("Location", "https://login.example.com/"),)),
            Answer(302, "<html>Log in</html>", "text/html"),
            page(401),
            page(404),
            Answer(404, "404 page not found", "text/plain"),
            Answer(400, "Client sent something strange", "text/plain"),
            Answer(405),
        ],
    ),
)
def test_another_web_server_at_the_endpoint_is_one_sentence(check, answer):
    with Gate(None, lambda ask: answer) as gate:
        said = only_sentence(check(endpoint=gate.url, status=1, s3_max_attempts=1))
    assert "check s3-endpoint-url" in said or "at s3-endpoint-url" in said
    assert "web server" in said and len(gate.asked) < 12


def test_a_service_that_refuses_everything_is_one_row(s3, check, left_as_it_was):
    s3.misbehave(**ACCESS_DENIED)
    done = check(status=3)
    row, clean_up, _, last = done.stdout.splitlines()
    assert row.startswith("permissions        fails ") and "AccessDenied" in row and "s3-access-key" in row
    assert re.search("works +nothing was stored", clean_up) and last.endswith("did not pass: permissions")
    assert {request.operation for request in s3.requests()} == {"ListObjects", "PutObject"}


@pytest.mark.parametrize("code", slow_after(1, of=["ExpiredToken", "NotImplemented", "SomethingElse"]))
def test_a_service_that_refuses_everything_for_another_cause_is_one_sentence(s3, check, left_as_it_was, code):
    s3.misbehave(status=400, code=code)
    assert code in only_sentence(check(status=1, s3_max_attempts=1))


def test_an_endpoint_whose_path_contains_the_bucket_is_named_with_the_right_one(s3, check, bucket_name):
    endpoint = f"{s3.url}/{bucket_name}"
    said = only_sentence(check(endpoint=endpoint, status=1, s3_max_attempts=1))
    assert f"It answers with s3-endpoint-url {s3.url}: set that" in said


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_an_endpoint_whose_host_contains_the_bucket_is_named_with_the_right_one(s3, configure, bucket_name, style):
    def judge(ask):
        # The host of a bucket takes the whole path for a key.
        if ask.headers["host"].startswith(f"{bucket_name}."):
            if ask.path.startswith(f"/{bucket_name}"):
                return error(404, "NoSuchKey")
            ask.path = f"/{bucket_name}{ask.path}"
        elif style == "virtual":
            return error(403, "SecondLevelDomainForbidden")
        return None

    with Gate(s3.url, judge) as gate:
        path = configure(endpoint=f"http://{bucket_name}.s3.example.com:{gate.port}")
        said = only_sentence(run_resolving(path, "s3.example.com", f"{bucket_name}.s3.example.com"))
    assert "must not contain the name of the bucket" in said
    also = " and s3-addressing-style virtual" if style == "virtual" else ""
    assert f"It answers with s3-endpoint-url http://s3.example.com:{gate.port}{also}: set that" in said


@pytest.mark.parametrize(
    "code", slow_after(1, of=["SecondLevelDomainForbidden", "PathStyleDomainForbidden", "SomethingElse"])
)
def test_a_service_that_wants_the_bucket_in_the_host_name_is_named_with_the_key_to_set(
    s3, configure, bucket_name, code
):
    def judge(ask):
        if not ask.headers["host"].startswith(f"{bucket_name}."):
            return error(403, code)
        ask.path = f"/{bucket_name}{ask.path}"
        return None

    with Gate(s3.url, judge) as gate:
        path = configure(endpoint=f"http://s3.example.com:{gate.port}")
        done = run_resolving(path, f"{bucket_name}.s3.example.com", "s3.example.com")
        assert done.returncode == 1, done.stderr
        assert "It answers with s3-addressing-style virtual: set that" in only_sentence(done)
        done = run_resolving(path, "s3.example.com")
        assert code in only_sentence(done)
        if code != "SomethingElse":
            assert "set s3-addressing-style virtual" in done.stderr


def test_a_service_that_speaks_tls_at_an_endpoint_without_and_the_reverse(s3, check, tmp_path):
    context, _ = certificate(tmp_path)
    with Gate(s3.url, lambda ask: None, context) as gate:
        said = only_sentence(check(endpoint=f"http://127.0.0.1:{gate.port}", status=1, s3_max_attempts=1))
    assert f"Port {gate.port} speaks TLS: let s3-endpoint-url begin with https://" in said
    said = only_sentence(check(endpoint=s3.url.replace("http:", "https:"), status=1, s3_max_attempts=1))
    assert "speaks http without TLS" in said


def test_a_certificate_that_is_not_accepted_is_one_sentence_that_says_why(s3, check, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)

    def sentence(context, **options):
        with Gate(s3.url, lambda ask: None, context) as gate:
            return only_sentence(check(endpoint=gate.url, status=1, s3_max_attempts=1, **options))

    context, pem = certificate(tmp_path)
    assert "name the file of the authority's certificate with s3-ca-file" in sentence(context)
    _, other = certificate(tmp_path)
    assert "s3-ca-file is set, and the file does not hold that authority" in sentence(context, s3_ca_file=other)
    context, pem = certificate(tmp_path, "127.0.0.9")
    assert "for another host name" in sentence(context, s3_ca_file=pem)
    context, pem = certificate(tmp_path, days=-1)
    assert "has expired" in sentence(context, s3_ca_file=pem)


def test_a_proxy_of_the_environment_is_named(check, monkeypatch):
    for name in "http_proxy", "HTTP_PROXY":
        monkeypatch.setenv(name, "http://{}:{}".format(*free_address()))
    said = only_sentence(check(endpoint="http://s3.example.com", status=1, s3_max_attempts=1))
    assert "HTTP_PROXY" in said and "add s3.example.com to NO_PROXY" in said


def test_a_proxy_that_does_not_reach_the_service_is_named(check, monkeypatch):
    with Gate(None, lambda ask: page(503)) as gate:
        for name in "http_proxy", "HTTP_PROXY":
            monkeypatch.setenv(name, gate.url)
        assert "HTTP_PROXY" in only_sentence(check(endpoint="http://s3.example.com", status=1, s3_max_attempts=1))


# One cause for several checks


def rows(done):
    """The lines of the table, by their first column."""
    return {line[:18].rstrip(): line[19:] for line in done.stdout.partition("\n\n")[0].splitlines()}


@pytest.mark.parametrize(
    ("fault", "words"),
    slow_after(
        1,
        of=[
            (ACCESS_DENIED, "AccessDenied (HTTP 403); the policy of the bucket or of the credentials (s3-access-key)"),
            ({"status": 507, "code": "QuotaExceeded"}, "QuotaExceeded (HTTP 507); the bucket is full"),
            ({"status": 400, "code": "SomethingElse"}, "SomethingElse (HTTP 400)"),
            ({"status": 500, "code": "InternalError"}, "InternalError (HTTP 500)"),
            (
                {"status": 400, "code": "KMS.NotFoundException"},
                "KMS.NotFoundException (HTTP 400); check s3-sse-kms-key-id",
            ),
            ({"status": 400, "code": "InvalidEncryptionAlgorithmError"}, "AlgorithmError (HTTP 400); check s3-sse "),
        ],
        unpack=True,
    ),
)
def test_that_nothing_can_be_stored_is_said_once(s3, check, left_as_it_was, fault, words):
    s3.misbehave(operation="PutObject|CreateMultipartUpload", **fault)
    done = check(status=3, s3_max_attempts=1)
    found = rows(done)
    assert list(found) == [
        "put and get",
        "storage class",
        "tagging",
        "absent blobs",
        "links",
        "(not tried)",
        "clean-up",
    ]
    assert done.stdout.count(words) == 1 and words in found["put and get"]
    assert "no blob can be stored: checksums, encryption, clock, metadata, " in found["(not tried)"]
    assert done.stdout.splitlines()[-1].endswith("did not pass: put and get")
    assert fault["status"] >= 500 or found["clean-up"] == "works         nothing was stored"
    assert "fails" not in found["clean-up"]
    assert len(s3.requests("PutObject")) <= 4
    assert not s3.requests("CreateMultipartUpload")


def test_no_leftovers_are_claimed_where_nothing_was_stored(s3, check):
    s3.misbehave(operation="(Put|Delete)Object|ListObjects", **ACCESS_DENIED)
    s3.misbehave(operation="GetObject", status=404, code="NoSuchKey")
    assert rows(check(status=3))["clean-up"].endswith("nothing was stored")
    assert not s3.requests("DeleteObject")


def test_what_may_have_been_stored_is_claimed_only_as_that(s3, check):
    s3.misbehave(operation="PutObject", lose=True)
    s3.misbehave(operation="DeleteObject|ListMultipartUploads", **ACCESS_DENIED)
    s3.misbehave(operation="ListObjects", times=1)
    s3.misbehave(operation="ListObjects", **ACCESS_DENIED)
    found = rows(check(status=3, s3_max_attempts=1))["clean-up"]
    assert re.search(r"fails +\d+ objects may be left below 1/check-", found)


def test_that_nothing_can_be_read_is_said_once(s3, check, left_as_it_was):
    s3.misbehave(operation="(Get|Head)Object", **ACCESS_DENIED)
    done = check(status=3)
    found = rows(done)
    assert done.stdout.count("forbids s3:GetObject") == 1 and "forbids s3:GetObject" in found["put and get"]
    assert found["(same cause)"].startswith("fails         as put and get: encryption, metadata, absent blobs, ranges")
    assert "no blob can be read: multipart" in found["(not tried)"]
    assert "nothing is left" in found["clean-up"]


@slow
def test_that_nothing_can_be_deleted_is_said_once(s3, check):
    s3.misbehave(operation="DeleteObjects?", **ACCESS_DENIED)
    done = check(status=3)
    found = rows(done)
    assert "forbids s3:DeleteObject" in found["delete"]
    assert found["(same cause)"] == "fails         as delete: batch delete, staging"
    assert re.search(
        r"fails +\d+ objects or uploads are left below 1/check-\w+/; .*the cause is that of delete", found["clean-up"]
    )


# The keys that uploads cannot have


def refuses(**wanted):
    """A judge that refuses uploads with the headers ``wanted``, each of them with a code of its own."""

    def judge(ask):
        for name, (status, code) in wanted.items():
            is_upload = ask.method == "PUT" or ask.path.endswith("?uploads")
            if is_upload and f"x-amz-{name.replace('_', '-')}" in ask.headers:
                return error(status, code)
        return None

    return judge


@pytest.mark.parametrize(
    ("options", "judge", "expected"),
    slow_after(
        1,
        of=[
            (
                {"s3_storage_class": "NO_SUCH"},
                refuses(storage_class=(400, "InvalidStorageClass")),
                {"storage class": ["InvalidStorageClass", "it works without s3-storage-class", "remove the key"]},
            ),
            (
                {"s3_tagging": "project=plone"},
                refuses(tagging=(501, "NotImplemented")),
                {"tagging": ["NotImplemented", "it works without s3-tagging", "does not know tags"]},
            ),
            (
                {"s3_tagging": "project=plone", "s3_sse": "AES256"},
                refuses(tagging=(403, "AccessDenied")),
                {"tagging": ["AccessDenied", "it works without s3-tagging", "allow s3:PutObjectTagging"]},
            ),
            (
                {"s3_sse": "aws:kms", "s3_max_attempts": 1},
                refuses(server_side_encryption=(500, "InternalError")),
                {"encryption": ["InternalError (HTTP 500)", "it works without s3-sse"]},
            ),
            (
                {"s3_sse": "aws:kms", "s3_sse_kms_key_id": "none"},
                refuses(server_side_encryption_aws_kms_key_id=(400, "KMS.NotFoundException")),
                {"encryption": ["KMS.NotFoundException", "it works without s3-sse-kms-key-id", "kms:GenerateDataKey"]},
            ),
            (
                {"s3_sse": "AES256", "s3_storage_class": "NO_SUCH", "s3_checksums": "when_supported"},
                refuses(
                    storage_class=(400, "SomeCode"),
                    server_side_encryption=(501, "NotImplemented"),
                    sdk_checksum_algorithm=(411, "MissingContentLength"),
                ),
                {
                    "checksums": ["MissingContentLength", "uploads work with when_required"],
                    "encryption": ["NotImplemented", "it works without s3-sse"],
                    "storage class": ["SomeCode", "it works without s3-storage-class"],
                },
            ),
        ],
        unpack=True,
    ),
)
def test_a_key_without_which_uploads_work_is_named_and_left_out(s3, odd, left_as_it_was, options, judge, expected):
    with Gate(s3.url, judge) as gate:
        found = odd(endpoint=gate.url, status=3, **options)
    assert states(found) == {**MOTO, **dict.fromkeys(expected, "fails")}
    for name, words in expected.items():
        for word in words:
            assert word in found[name]["meaning"], found[name]["meaning"]


@slow
def test_a_trouble_that_passes_is_not_laid_on_a_key(s3, odd, left_as_it_was):
    s3.misbehave(operation="PutObject", times=1, status=500, code="InternalError")
    assert states(odd(s3_storage_class="STANDARD_IA", s3_max_attempts=1, status=3)) == MOTO


def test_what_a_service_sends_cannot_pass_for_a_line_of_ours(s3, check, left_as_it_was):
    s3.misbehave(operation="HeadObject", headers={"x-amz-server-side-encryption": "\x1b[2J\x1b[1mAES"})
    done = check(status=3)
    assert "\x1b" not in done.stdout and "?[2J?[1mAES" in rows(done)["encryption"]


@slow
def test_a_class_whose_objects_cannot_be_read_at_once_is_named(odd, left_as_it_was):
    found = odd(s3_storage_class="GLACIER", status=3)
    assert states(found) == {**MOTO, "storage class": "fails"}
    for words in "InvalidObjectState", "it works without s3-storage-class", "read at once":
        assert words in found["storage class"]["meaning"]


@slow
def test_a_class_that_the_service_ignores_is_told(s3, odd, left_as_it_was):
    s3.misbehave(operation="HeadObject", headers={"x-amz-storage-class": "STANDARD"})
    found = odd(s3_storage_class="STANDARD_IA", status=3)
    assert states(found) == {**MOTO, "storage class": "worked around"}
    assert "stores blobs as STANDARD" in found["storage class"]["meaning"]


def test_tags_are_read_back_and_a_service_that_drops_them_is_told(s3, odd, left_as_it_was):
    found = odd(s3_tagging="project=plone&env=a+b", status=3)
    assert states(found) == MOTO
    making = [one for name in ("PutObject", "CopyObject", "CreateMultipartUpload") for one in s3.requests(name)]
    assert all(request.headers["x-amz-tagging"] == "project=plone&env=a%20b" for request in making)

    def drop(ask):
        ask.headers.pop("x-amz-tagging", None)

    def drop_of_copies(ask):
        if "x-amz-copy-source" in ask.headers:
            drop(ask)

    with Gate(s3.url, drop_of_copies) as gate:  # as Ceph 16
        found = odd(endpoint=gate.url, s3_tagging="project=plone", status=3)
    assert found["tagging"]["meaning"] == "the service stores copies without the tags of s3-tagging"

    with Gate(s3.url, drop) as gate:
        found = odd(endpoint=gate.url, s3_tagging="project=plone", status=3)
    assert states(found) == {**MOTO, "tagging": "worked around"}
    assert found["tagging"]["meaning"] == "the service stores objects without the tags of s3-tagging"


@slow
def test_encryption_that_a_policy_demands_is_named(s3, odd, left_as_it_was):
    def judge(ask):
        demands = ask.method in ("PUT", "POST") and "uploadId" not in ask.path and "delete" not in ask.path
        if demands and ask.headers.get("x-amz-server-side-encryption") != "aws:kms":
            return error(403, "AccessDenied")
        return None

    with Gate(s3.url, judge) as gate:
        found = odd(endpoint=gate.url, status=3)
    assert states(found) == {**MOTO, "encryption": "fails"}
    assert found["encryption"]["set"] == "s3-sse aws:kms"


@slow
def test_a_customer_key_that_is_forbidden_is_named(s3, odd, left_as_it_was, tmp_path):
    context, pem = certificate(tmp_path)
    judge = refuses(server_side_encryption_customer_algorithm=(403, "AccessDenied"))
    with Gate(s3.url, judge, context) as gate:
        found = odd(endpoint=gate.url, s3_ca_file=pem, s3_sse_customer_key=CUSTOMER_KEY, status=3)
    assert states(found).items() >= {"encryption": "fails", "damaged uploads": "worked around"}.items()
    assert "it works without s3-sse-customer-key" in found["encryption"]["meaning"]
    assert found["encryption"]["meaning"].endswith("or use s3-sse")


@slow
def test_a_customer_key_must_be_needed_to_read(s3, odd, tmp_path):
    header, sse = (
        "x-amz-server-side-encryption-customer-",
        (("x-amz-server-side-encryption-customer-algorithm", "AES256"),),
    )
    context, pem = certificate(tmp_path)
    needed = True

    def judge(ask):
        if needed and ask.method == "GET" and "/blobs/" in ask.path and f"{header}key" not in ask.headers:
            return error(400, "InvalidRequest")
        return None

    s3.misbehave(operation="(Put|Copy|Head|Get)Object", headers=dict(sse))
    with Gate(s3.url, judge, context) as gate:
        options = {"endpoint": gate.url, "s3_ca_file": pem, "s3_sse_customer_key": CUSTOMER_KEY}
        assert "encryption" not in odd(**options)
        needed = False
        meaning = odd(**options, status=3)["encryption"]["meaning"]
    assert "s3-sse-customer-key" in meaning and ("not encrypted" in meaning or "unencrypted" in meaning)


# Proxies that limit the size of requests


@pytest.mark.parametrize(("early", "attempts"), slow_after(1, of=[(True, 1), (True, 3), (False, 1)], unpack=True))
def test_a_proxy_that_limits_the_size_of_requests_is_named(s3, check, left_as_it_was, early, attempts):
    def judge(ask):
        return page(413, early=early) if ask.length > 1 << 20 else None

    with Gate(s3.url, judge) as gate:
        done = check(endpoint=gate.url, status=3, s3_max_attempts=attempts)
    found = rows(done)
    assert (
        "413" in found["multipart"] and "proxy" in found["multipart"] and "client_max_body_size" in found["multipart"]
    )
    assert done.stdout.count("client_max_body_size") == 1
    assert found["(same cause)"].endswith("as multipart: staging")


@slow
def test_a_proxy_that_limits_requests_below_the_threshold_is_named_with_a_threshold(s3, odd, left_as_it_was):
    with Gate(s3.url, lambda ask: page(413) if ask.length > 10 << 20 else None) as gate:
        found = odd(endpoint=gate.url, status=3, s3_multipart_threshold="100MB")
    assert states(found) == {**MOTO, "multipart": "fails"}
    assert "413" in found["multipart"]["meaning"] and found["multipart"]["set"] == "s3-multipart-threshold 8MB"


@slow
def test_large_requests_that_are_cut_off_without_a_word_point_at_a_proxy(s3, check, left_as_it_was):
    s3.misbehave(operation="UploadPart", reset=True)
    found = rows(check(status=3, s3_max_attempts=1))["multipart"]
    assert "smaller blobs can be stored" in found and "proxy" in found


# Other checks


@slow
def test_what_a_killed_check_has_left_is_deleted_a_day_later(s3, configure, tool, check, bucket_name):
    s3.put(bucket_name, OTHERS)
    s3.misbehave(operation="CopyObject", hang=True)
    process = tool.begin("check", configure())
    s3.wait_for("CopyObject")
    process.kill()
    process.communicate()
    s3.behave()
    everything = s3.keys(bucket_name)
    left = [key for key in everything if re.match("1/check-[0-9a-f]{32}/", key)]
    assert left

    found = rows(check(status=3))["clean-up"]
    assert f"; {len(left)} objects and uploads of other checks were kept: they are less than a day old" in found
    assert s3.keys(bucket_name) == everything

    with Gate(s3.url, lambda ask: None, later=25 * 3600) as gate:
        found = rows(check(endpoint=gate.url, status=3))["clean-up"]
    assert f"; {len(left)} objects and uploads of earlier checks that had been killed were deleted" in found
    assert s3.keys(bucket_name) == [key for key in everything if key not in left]


@slow
def test_whoever_closes_the_terminal_finds_the_bucket_as_it_was(s3, configure, tool, left_as_it_was):
    s3.misbehave(operation="CopyObject", hang=True)
    process = tool.begin("check", configure())
    s3.wait_for("CopyObject")
    process.send_signal(signal.SIGHUP)
    s3.behave()
    assert "nothing is left below 1/check-" in process.communicate(timeout=60)[1]


@slow
def test_whoever_interrupts_it_before_it_has_stored_anything_need_not_wait(s3, configure, tool):
    s3.misbehave(operation="ListObjects", hang=True)
    process = tool.begin("check", configure())
    s3.wait_for("ListObjects")
    process.send_signal(signal.SIGINT)
    assert "the check ended early. nothing was stored" in process.communicate(timeout=5)[1]
    assert process.returncode == 130


@slow
def test_a_terminal_that_knows_only_ascii_gets_all_of_it(check, configure, bucket_name):
    path = configure()
    path.write_text(path.read_text().replace("s3-prefix 1", "s3-prefix d\u00e9p\u00f4t"), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "zodb_s3blobs", "check", "-C", path]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 3, done.stderr
    assert b"nothing is left below d\\xe9p\\xf4t/check-" in done.stdout


# However it ends


@slow
def test_others_keys_are_left_alone_even_if_a_listing_ignores_the_prefix(s3, bucket_name, check, left_as_it_was):
    (upload,) = s3.client.list_multipart_uploads(Bucket=bucket_name)["Uploads"]
    moment = "2020-01-01T00:00:00Z"
    objects = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>{moment}</LastModified></Contents>" for key in OTHERS
    )
    uploads = (
        f"<Upload><Key>{upload['Key']}</Key><UploadId>{upload['UploadId']}</UploadId>"
        f"<Initiated>{moment}</Initiated></Upload>"
    )
    for operation, kind, body in (
        ("ListObjects", "Bucket", objects),
        ("ListMultipartUploads", "MultipartUploads", uploads),
    ):
        s3.misbehave(operation=operation, status=200, body=f"<List{kind}Result>{body}</List{kind}Result>")
    check(status=3)
    paths = {one.path for one in s3.requests() if one.operation in ("DeleteObject", "AbortMultipartUpload")}
    assert paths and all("/1/check-" in path and not path.endswith("check-mine") for path in paths)


@slow
def test_what_could_not_be_deleted_is_told(s3, bucket_name, good, check, everything):
    s3.put(bucket_name, OTHERS)
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied")
    done = check(status=3)
    for name in "delete", "clean-up":
        assert re.search(rf"^{name} +fails ", done.stdout, re.M)
    (count, prefix) = re.search(r"(\d+) objects or uploads are left below (\S+/); ", done.stdout).groups()
    left = [key for key, *_ in everything()[0] if key not in OTHERS]
    assert left and all(key.startswith(prefix) for key in left)
    assert int(count) >= len(left)
    assert set(OTHERS) <= {key for key, *_ in everything()[0]}


@slow
def test_what_is_listed_after_its_deletion_is_told(s3, good, odd):
    s3.misbehave(operation="DeleteObject", status=204)
    found = odd(status=3)
    assert states(found).keys() == {"delete", "clean-up"}
    assert "still listed" in found["clean-up"]["meaning"]


def test_a_service_that_falls_silent_is_not_asked_for_long(s3, check):
    s3.misbehave(times=20)
    s3.misbehave(status=503, code="SlowDown")
    done = check(status=3, s3_max_attempts=1)
    (silent,) = re.findall(
        r"(?m)^\(not tried\) +- +the bucket does not answer any more \(SlowDown\): (.*)$", done.stdout
    )
    assert len(silent.split(", ")) > 5
    assert done.stdout.count("SlowDown (HTTP 503)") == 1
    assert len(s3.requests()) < 40


@pytest.mark.parametrize(
    ("number", "operation", "fault"),
    slow_after(
        1,
        of=[
            (signal.SIGINT, "PutObject", {"latency": 2}),  # and is stored long after the interruption
            (signal.SIGTERM, "UploadPart", {"hang": True}),
            (signal.SIGINT, "CopyObject", {"hang": True}),
        ],
        unpack=True,
    ),
)
def test_whoever_interrupts_it_finds_the_bucket_as_it_was(
    s3, configure, tool, left_as_it_was, number, operation, fault
):
    s3.misbehave(operation=operation, **fault)
    process = tool.begin("check", configure())
    s3.wait_for(operation)
    process.send_signal(number)
    s3.behave()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # All had ended, but for a part whose body broke off: the service has not stored that.
    assert {request.operation for request in s3.requests() if request.status is None} <= {"UploadPart"}
    (line,) = errors.splitlines()
    assert "nothing is left below 1/check-" in line


@slow
def test_whoever_reads_only_the_beginning_finds_the_bucket_as_it_was(s3, configure, tool, left_as_it_was):
    s3.misbehave(operation="CopyObject", hang=True)
    process = tool.begin("check", configure())
    s3.wait_for("CopyObject")
    process.stdout.close()
    s3.behave()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 1
