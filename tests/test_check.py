"""``zodb-s3blobs check`` in a process of its own: what it says of good and odd services, and that it leaves nothing."""

import base64
import datetime
import email.utils
import ipaddress
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from zeoserver import CONFIG, FILESTORAGE, SECTION, free_address

SECRET = "test-secret"
WRONG_MD5, WRONG_CRC32 = "AAAAAAAAAAAAAAAAAAAAAA==", "AAAAAA=="
ROWS = [
    *("checksums", "clock", "put and get", "metadata", "absent blobs", "damaged uploads", "encryption", "ranges"),
    *("multipart", "unfinished uploads", "list", "copy", "staging", "delete", "batch delete"),
    *("If-None-Match", "If-Match", "owner lease", "clean-up"),
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


def command(path, *arguments):
    return [sys.executable, "-m", "zodb_s3blobs.cli", "check", "-C", str(path), *arguments]


@pytest.fixture
def check(configure):
    """Runs ``zodb-s3blobs check``; returns the process that has ended."""

    def check(*arguments, status=0, **options):
        done = subprocess.run(command(configure(**options), *arguments), capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout + done.stderr
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
        assert result["will_do"] == all(one["state"] != "fails" for one in outcomes.values())
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
    assert (nothing, last, done.stderr) == ("", f"Bucket {bucket_name} will do", "")
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


def test_a_high_threshold_does_not_keep_multipart_from_being_tried(s3, good, check, left_as_it_was):
    check(s3_multipart_threshold="1GB")
    assert len(s3.requests("UploadPart")) == 3


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
    [
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
                "unfinished uploads": "it must allow s3:ListBucketMultipartUploads",
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
)
def test_what_the_server_can_do_without_is_worked_around(s3, good, odd, left_as_it_was, faults, expected):
    for operation, fault in faults.items():
        s3.misbehave(operation=operation, **fault)
    found = odd()
    assert states(found) == dict.fromkeys(expected, "worked around")
    for name, words in expected.items():
        assert words in found[name]["meaning"]
        assert found[name]["set"] == ("s3-stage-threshold 0" if name == "staging" else "")


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


def test_what_the_settings_do_without_is_not_needed(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="CopyObject|CreateMultipartUpload", **NOT_IMPLEMENTED)
    found = odd(s3_stage_threshold=0, s3_multipart_threshold="5GB")
    assert states(found) == {"copy": "worked around", "unfinished uploads": "worked around"}


# What fails


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (
            {
                "UploadPart": {"status": 400, "code": "InvalidPart"},
                "OwnerPutObject": {"status": 200},
                "DeleteObjects": ACCESS_DENIED,
                "HeadObject": {"headers": {"x-amz-meta-sha256": ""}},
            },
            {
                "multipart": "InvalidPart (HTTP 400); in one request it works",
                "owner lease": "no garbage would be collected",
                "batch delete": "it must allow s3:DeleteObject",
                "metadata": "does not come back",
                "copy": "not like the original",
            },
        ),
        (
            {
                "CreateMultipartUpload": ACCESS_DENIED,
                "DeleteObjects": {"status": 200, "body": "<DeleteResult/>"},
                "CopyObject": {"status": 200, "body": "<CopyObjectResult/>"},
                "OwnerGetObject": {"headers": {"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}},
            },
            {
                "multipart": "it must allow s3:PutObject",
                "unfinished uploads": "it must allow s3:PutObject",
                "batch delete": "are still there",
                "copy": "there is no such object",
                "staging": "there is no such object",
                "owner lease": "seconds old",
            },
        ),
    ],
)
def test_what_the_server_needs_fails(s3, good, odd, left_as_it_was, faults, expected):
    for operation, fault in faults.items():
        s3.misbehave(operation=operation, **fault)
    found = odd(status=3)
    assert states(found) == dict.fromkeys(expected, "fails")
    for name, words in expected.items():
        assert words in found[name]["meaning"]
        in_parts = name == "multipart" and "UploadPart" in faults
        assert found[name]["set"] == ("s3-multipart-threshold 5GB" if in_parts else "")


def test_an_abort_that_is_forbidden_fails(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="AbortMultipartUpload", times=1, **ACCESS_DENIED)
    s3.misbehave(operation="ListMultipartUploads", **ACCESS_DENIED)
    found = odd(status=3)
    assert states(found) == {"unfinished uploads": "fails"}
    assert "it must allow s3:AbortMultipartUpload" in found["unfinished uploads"]["meaning"]


def test_blobs_cannot_be_put(s3, odd, left_as_it_was):
    s3.misbehave(operation="PutObject", status=403, code="AccessDenied")
    found = odd(status=3)
    assert states(found).items() >= dict.fromkeys(["put and get", "metadata", "delete", "If-Match"], "fails").items()
    assert not found.keys() & {"multipart", "absent blobs", "owner lease", "clean-up"}  # the others are tried
    for outcome in found.values():
        assert "it must allow s3:PutObject" in outcome["meaning"]


def test_without_permission_to_list_absent_blobs_look_like_an_outage(meet, good, odd, left_as_it_was):
    meet("HeadObject", lambda request: request.status == 404, status=403)
    found = odd(status=3)
    assert states(found) == {"absent blobs": "fails"}
    assert "it must allow s3:ListBucket" in found["absent blobs"]["meaning"]


def test_what_cannot_be_listed_is_deleted_all_the_same(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="ListObjects", status=403, code="AccessDenied")
    found = odd(status=3)
    assert states(found) == {"list": "fails", "staging": "fails"}
    assert "it must allow s3:ListBucket" in found["list"]["meaning"]


def test_a_listing_that_loses_a_page_fails_and_so_does_s3_sse_that_is_not_applied(s3, good, odd, left_as_it_was):
    s3.misbehave(operation="HeadObject", headers={"x-amz-server-side-encryption": ""})
    s3.misbehave(operation="ListObjects", times=2)  # the first look, and the first page
    s3.misbehave(operation="ListObjects", times=1, status=200, body="<ListBucketResult/>")
    assert states(odd(s3_sse="AES256", status=3)) == {"encryption": "fails", "list": "fails"}


@pytest.mark.parametrize("apart", [300, -3600])
def test_the_clocks_are_compared(s3, odd, left_as_it_was, apart):
    date = email.utils.formatdate(time.time() + apart, usegmt=True)
    s3.misbehave(operation="PutObject", headers={"Date": date})
    found = odd(status=3)
    assert states(found) == {**MOTO, "clock": "worked around" if apart == 300 else "fails"}
    told = int(re.search(r"are (\d+) seconds apart", found["clock"]["meaning"])[1])
    assert abs(told - abs(apart)) < 60 and "NTP" in found["clock"]["meaning"]


def test_a_service_that_takes_damaged_uploads_needs_tls(odd, tls, left_as_it_was):
    found = odd(status=3)
    assert states(found) == MOTO and found["damaged uploads"]["set"] == "s3-endpoint-url https://..."
    assert states(odd(endpoint=tls)) == {**MOTO, "damaged uploads": "worked around"}


def test_the_checksums_by_which_damage_is_refused_are_named(meet, odd, left_as_it_was):
    crc = {"x-amz-checksum-crc32": WRONG_CRC32}
    meet("PutObject", lambda request: crc.items() <= request.headers.items(), status=400, code="BadDigest")
    found = odd(status=3)
    assert states(found) == MOTO
    assert found["damaged uploads"]["set"] == "s3-checksums when_supported"


def test_the_checksums_that_a_service_understands_are_named_and_used(s3, odd, left_as_it_was):
    s3.misbehave(operation="PutObject", times=1, status=411, code="MissingContentLength")
    found = odd(s3_checksums="when_supported", status=3)
    assert states(found) == {**MOTO, "checksums": "fails"}
    assert found["checksums"]["set"] == "s3-checksums when_required"
    assert "content-md5" in s3.requests("UploadPart")[0].headers


# Encryption


@pytest.fixture
def tls(s3, tmp_path_factory, monkeypatch):
    """The URL of the S3 server over TLS."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = directory / "certificate.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.setenv("AWS_CA_BUNDLE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        backend = ("127.0.0.1", int(s3.url.rpartition(":")[2]))
        threading.Thread(target=_relay_all, args=(listener, context, backend), daemon=True).start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def _relay_all(listener, context, backend):
    while True:
        try:
            client = listener.accept()[0]
        except OSError:
            return
        threading.Thread(target=_relay, args=(client, context, backend), daemon=True).start()


def _relay(client, context, backend):
    try:
        with context.wrap_socket(client, server_side=True) as near, socket.create_connection(backend) as far:
            while True:
                for source in [near] if near.pending() else select.select([near, far], [], [])[0]:
                    data = source.recv(1 << 20)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)
    except OSError:
        pass


CUSTOMER_KEY = base64.b64encode(bytes(range(32))).decode()


def test_a_service_that_ignores_the_customer_key_fails(odd, tls, left_as_it_was):
    found = odd(endpoint=tls, s3_sse_customer_key=CUSTOMER_KEY, status=3)
    assert "ignores s3-sse-customer-key" in found["encryption"]["meaning"]


def test_the_customer_key_must_be_needed_to_read(s3, odd, tls, left_as_it_was):
    s3.misbehave(
        operation="(Put|Copy|Head)Object", headers={"x-amz-server-side-encryption-customer-algorithm": "AES256"}
    )
    options = {"endpoint": tls, "s3_sse_customer_key": CUSTOMER_KEY}
    assert "can be read without s3-sse-customer-key" in odd(**options, status=3)["encryption"]["meaning"]
    has_key = ["x-amz-server-side-encryption-customer-key" in one.headers for one in s3.requests("GetObject")]
    assert has_key.count(False) == 1
    s3.misbehave(operation="GetObject", times=has_key.index(False))
    s3.misbehave(operation="GetObject", times=1, status=400, code="InvalidRequest")
    assert "encryption" not in odd(**options)


# No answer


def only_sentence(done):
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ({"status": 404, "code": "NoSuchBucket"}, "check bucket-name"),
        ({"status": 403, "code": "SignatureDoesNotMatch"}, "check s3-access-key and s3-secret-key"),
        ({"status": 403, "code": "RequestTimeTooSkewed"}, "check the clock of this machine"),
        ({"status": 503, "code": "SlowDown"}, "SlowDown"),
    ],
)
def test_a_bucket_that_cannot_be_used_at_all_is_one_sentence(s3, check, left_as_it_was, fault, advice):
    s3.misbehave(**fault)
    assert advice in only_sentence(check(status=1, s3_max_attempts=1))
    assert {request.operation for request in s3.requests()} == {"ListObjects"}


def test_a_service_that_is_not_there_is_one_sentence(check):
    url = "http://{}:{}".format(*free_address())
    assert "check s3-endpoint-url" in only_sentence(check(endpoint=url, status=1, s3_max_attempts=1))


def test_a_service_that_knows_no_host_names_of_buckets_is_named_with_the_key_to_set(s3, configure, left_as_it_was):
    path = configure(
        endpoint=s3.url.replace("127.0.0.1", "localhost"), s3_addressing_style="virtual", s3_max_attempts=1
    )
    script = (
        "import socket, sys; from zodb_s3blobs.cli import main; resolve = socket.getaddrinfo\n"
        "def only_localhost(host, *rest, **more):\n"
        "    if host == 'localhost': return resolve('127.0.0.1', *rest, **more)\n"
        "    raise socket.gaierror('no such host')\n"
        "socket.getaddrinfo = only_localhost; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "check", "-C", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "s3-addressing-style path" in only_sentence(done)


# However it ends


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


def test_what_could_not_be_deleted_is_told(s3, bucket_name, good, check, everything):
    s3.put(bucket_name, OTHERS)
    s3.misbehave(operation="DeleteObject", status=403, code="AccessDenied")
    done = check(status=3)
    for name in "delete", "clean-up":
        assert re.search(rf"^{name} +fails ", done.stdout, re.M)
    (count, prefix) = re.search(r"(\d+) objects or uploads are left below (\S+/): ", done.stdout).groups()
    left = [key for key, *_ in everything()[0] if key not in OTHERS]
    assert left and all(key.startswith(prefix) for key in left)
    assert int(count) >= len(left)
    assert set(OTHERS) <= {key for key, *_ in everything()[0]}


def test_what_is_listed_after_its_deletion_is_told(s3, good, odd):
    s3.misbehave(operation="DeleteObject", status=204)
    found = odd(status=3)
    assert states(found).keys() == {"delete", "clean-up"}
    assert "still listed" in found["clean-up"]["meaning"]


def test_a_service_that_falls_silent_is_not_asked_for_long(s3, odd):
    s3.misbehave(times=20)
    s3.misbehave(status=503, code="SlowDown")
    found = odd(status=3, s3_max_attempts=1)
    silent = [name for name, one in found.items() if "it was not tried" in one["meaning"]]
    assert len(silent) > 5 and "clean-up" in found
    assert len(s3.requests()) < 40


@pytest.mark.parametrize(
    ("number", "operation", "fault"),
    [
        (signal.SIGINT, "PutObject", {"latency": 2}),  # and is stored long after the interruption
        (signal.SIGTERM, "UploadPart", {"hang": True}),
        (signal.SIGINT, "CopyObject", {"hang": True}),
    ],
)
def test_whoever_interrupts_it_finds_the_bucket_as_it_was(s3, configure, left_as_it_was, number, operation, fault):
    s3.misbehave(operation=operation, **fault)
    process = subprocess.Popen(command(configure()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    s3.wait_for(operation)
    process.send_signal(number)
    s3.behave()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # All had ended, but for a part whose body broke off: the service has not stored that.
    assert {request.operation for request in s3.requests() if request.status is None} <= {"UploadPart"}
    (line,) = errors.splitlines()
    assert "nothing is left below 1/check-" in line


def test_whoever_reads_only_the_beginning_finds_the_bucket_as_it_was(s3, configure, left_as_it_was):
    s3.misbehave(operation="CopyObject", hang=True)
    process = subprocess.Popen(command(configure()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    s3.wait_for("CopyObject")
    process.stdout.close()
    s3.behave()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 1
