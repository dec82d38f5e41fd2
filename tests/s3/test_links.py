"""Links: what may be asked for, file names as RFC 6266 has them, and URLs that are signed without a request."""

import email.message
import re
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZPublisher.HTTPResponse import HTTPResponse

from zodb_s3blobs.s3.errors import BucketError
from zodb_s3blobs.s3.links import LONGEST, LinkRefused, checked, content_disposition

pytestmark = pytest.mark.usefixtures("no_aws_settings")

OID, TID = b"\0" * 7 + b"\x1f", b"\0\0\0\0\0\0\1\2"


def check(longest=3600, oid=OID, tid=TID, **wanted):
    return checked(longest, oid, tid, **wanted)


@pytest.fixture
def sign(open_bucket):
    """Signs a link of a bucket; returns its URL and the parameters in it. Keywords are settings of the bucket."""

    def sign(link=None, **changes):
        url = open_bucket(**changes).signer().sign(link or check())
        return url, {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}

    return sign


# File names


@pytest.mark.parametrize(
    ("filename", "header"),
    [
        ("report.pdf", 'attachment; filename="report.pdf"'),
        ("two words.tar.gz", 'attachment; filename="two words.tar.gz"'),
        ("it's; a, name=(1).pdf", 'attachment; filename="it\'s; a, name=(1).pdf"'),
        ("Übersicht.pdf", "attachment; filename=\"Ubersicht.pdf\"; filename*=UTF-8''%C3%9Cbersicht.pdf"),
        ("日本.txt", "attachment; filename=\"__.txt\"; filename*=UTF-8''%E6%97%A5%E6%9C%AC.txt"),
        ("€ 5.txt", "attachment; filename=\"_ 5.txt\"; filename*=UTF-8''%E2%82%AC%205.txt"),
        ("100%.txt", "attachment; filename=\"100_.txt\"; filename*=UTF-8''100%25.txt"),
        ('say "yes".txt', "attachment; filename=\"say _yes_.txt\"; filename*=UTF-8''say%20%22yes%22.txt"),
        ("a/b\\c.txt", 'attachment; filename="a_b_c.txt"'),
        ("../../etc/passwd", 'attachment; filename=".._.._etc_passwd"'),
        ("a\r\nSet-Cookie: x=y.txt", 'attachment; filename="a__Set-Cookie: x=y.txt"'),
        ("a\x00b\x7fc\x85d\u2028e.txt", 'attachment; filename="a_b_c_d_e.txt"'),
        ("lone \udc80 surrogate", 'attachment; filename="lone _ surrogate"'),
        ("photo\u202egpj.exe", 'attachment; filename="photo_gpj.exe"'),  # would be shown as photoexe.jpg
        ("\uff02full\uff0fwidth\uff3c\uff05.txt", None),  # decomposed, these are quote, slash, backslash and percent
        ("  spaces  ", 'attachment; filename="spaces"'),
    ],
)
def test_a_file_name_is_sent_as_rfc_6266_has_it(filename, header):
    made = content_disposition("attachment", filename)
    if header is not None:
        assert made == header
    check_header(made, "attachment")


@pytest.mark.parametrize("filename", ["", " ", ".", "..", " .. "])
def test_what_is_no_name_is_left_out_and_makes_no_page_of_an_attachment(filename):
    """Names of uploads are their uploaders', who must not decide that a browser shows the file and runs its scripts."""
    assert content_disposition("attachment", filename) == "attachment"
    assert content_disposition(None, filename) == "attachment"


def test_a_file_name_without_a_disposition_is_that_of_an_attachment():
    assert content_disposition(None, None) is None
    assert content_disposition(None, "a.pdf") == 'attachment; filename="a.pdf"'
    assert content_disposition("inline", "a.pdf") == 'inline; filename="a.pdf"'
    assert content_disposition("inline", None) == "inline"


@pytest.mark.parametrize("name", ["x" * 1_000_000, "ü" * 300, "日" * 100_000])
def test_a_long_name_is_cut_and_keeps_its_extension(name):
    made = content_disposition("attachment", f"{name}.pdf")
    assert len(made) < 1000
    for shown in names(made):
        assert shown.endswith(".pdf")
        assert 190 < len(shown.encode()) <= 200 or shown.startswith(("u", "_"))


def test_what_looks_like_a_long_extension_is_cut_as_well():
    [shown] = names(content_disposition("attachment", f"a.{'x' * 1000}"))
    assert shown == f"a.{'x' * 198}"


def names(header):
    """The names in a header: of the ASCII parameter, and of the other one if it has that."""
    [plain] = re.findall(r'; filename="([^"]*)"', header)
    return [plain, *(unquote(coded, errors="strict") for coded in re.findall(r"; filename\*=UTF-8''(\S+)$", header))]


def check_header(header, disposition):
    """It is one safe line of ASCII, and a parser finds a safe name in it."""
    assert re.fullmatch(rf"{disposition}; filename=\"[ !#$&-.0-~]*\"(; filename\*=UTF-8''[!#$&+.^_`|~%\w-]+)?", header)
    assert "\\" not in header
    for shown in names(header):
        assert shown.strip(".")
        assert not re.search(r"[/\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", shown)
    message = email.message.Message()
    message["Content-Disposition"] = header
    assert message.get_content_disposition() == disposition


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])), st.sampled_from([None, "inline", "attachment"]))
def test_no_text_breaks_the_header(filename, disposition):
    made = content_disposition(disposition, filename)
    if made != (disposition or "attachment"):
        check_header(made, disposition or "attachment")


# What may be asked for


def test_by_default_a_link_lasts_as_long_as_it_may_and_says_nothing_of_type_and_name():
    link = check(longest=600)
    assert (link.oid, link.tid, link.seconds, link.headers) == (OID, TID, 600, {})


@pytest.mark.parametrize(("seconds", "whole"), [(1, 1), (0.1, 1), (59.5, 60), (600, 600), (600.0, 600)])
def test_the_validity_is_rounded_up_to_seconds(seconds, whole):
    assert check(longest=600, seconds=seconds).seconds == whole


@pytest.mark.parametrize(
    "seconds", [0, -1, 600.5, 601, 10**400, float("nan"), float("inf"), float("-inf"), True, "60", b"60", [60], {}, 1j]
)
def test_another_validity_is_refused(seconds):
    with pytest.raises(
        LinkRefused, match="seconds of a link must be a number above 0, at most 600: see presigned-urls"
    ):
        check(longest=600, seconds=seconds)


@pytest.mark.parametrize(
    "content_type",
    [
        "image/png",
        "text/html; charset=utf-8",
        'a/b;c="d e"',
        "application/vnd.oasis.opendocument.text",
        "image/svg+xml",
    ],
)
def test_a_media_type_is_taken(content_type):
    assert check(content_type=content_type).headers == {"ResponseContentType": content_type}


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "text", "text/", "/plain", "text/plain ", "text /plain", "text/plain, image/png", "text/plain\n"),
        *(
            "text/plain\r\nSet-Cookie: a=b",
            "text/plain; a=\x00",
            "text/pläin",
            "text/plain; a=\udc80",
            "a/b;" + "c" * 200,
        ),
        *(b"text/plain", 1, ["text/plain"], {}),
    ],
)
def test_another_content_type_is_refused(content_type):
    with pytest.raises(LinkRefused, match="content_type of a link must be a media type") as caught:
        check(content_type=content_type)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("disposition", ["", "Inline", "attachment; filename=x", "form-data", b"inline", 1, [], {}])
def test_another_disposition_is_refused(disposition):
    with pytest.raises(LinkRefused, match='disposition of a link must be "inline" or "attachment"'):
        check(disposition=disposition)


@pytest.mark.parametrize("filename", [b"a.pdf", 1, ["a"], {}])
def test_a_file_name_that_is_no_text_is_refused(filename):
    with pytest.raises(LinkRefused, match="filename of a link must be a text"):
        check(filename=filename)


@pytest.mark.parametrize("number", [None, 1, "12345678", b"1234567", b"123456789", bytearray(8), [b"12345678"]])
@pytest.mark.parametrize("which", ["oid", "tid"])
def test_an_oid_or_a_serial_that_is_none_is_refused(which, number):
    with pytest.raises(LinkRefused, match="8 bytes each"):
        check(**{which: number})


# URLs


def test_a_url_is_signed_with_version_4_for_the_key_of_the_blob(sign, s3, bucket_name):
    url, parameters = sign(check(seconds=60), s3_prefix="site 1")
    assert url.startswith(f"{s3.url}/{bucket_name}/site%201/blobs/1f/102.blob?")
    assert parameters["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert (parameters["X-Amz-Expires"], parameters["X-Amz-SignedHeaders"]) == ("60", "host")
    assert parameters["X-Amz-Credential"].startswith("test/")
    assert "test-secret" not in url


def test_type_and_name_are_signed(sign):
    _, parameters = sign(check(content_type="text/plain", filename="ü.txt", disposition="inline"))
    assert parameters["response-content-type"] == "text/plain"
    assert parameters["response-content-disposition"] == "inline; filename=\"u.txt\"; filename*=UTF-8''%C3%BC.txt"


def test_no_request_is_made(sign, s3):
    for checksums in "when_required", "when_supported":
        sign(s3_checksums=checksums)
    assert s3.requests() == []


def test_a_link_leads_to_the_public_endpoint(sign, bucket_name):
    url, _ = sign(s3_public_endpoint_url="https://files.example.com/s3")
    assert url.startswith(f"https://files.example.com/s3/{bucket_name}/blobs/1f/102.blob?")
    url, _ = sign(s3_public_endpoint_url="https://files.example.com", s3_addressing_style="virtual")
    assert url.startswith(f"https://{bucket_name}.files.example.com/blobs/1f/102.blob?")


AMAZON = {"s3_endpoint_url": None, "s3_region": "eu-central-1", "bucket_name": "blobs"}


@pytest.mark.parametrize(
    ("changes", "host"),
    [
        ({}, "blobs.s3.eu-central-1.amazonaws.com"),  # and not s3.amazonaws.com, which does not know all regions
        ({"s3_region": "cn-north-1"}, "blobs.s3.cn-north-1.amazonaws.com.cn"),
        ({"s3_addressing_style": "path"}, "s3.eu-central-1.amazonaws.com"),
        ({"bucket_name": "with.dots"}, "s3.eu-central-1.amazonaws.com"),  # no certificate fits more subdomains
        (
            {
                "s3_endpoint_url": "https://vpce-1.s3.eu-central-1.vpce.amazonaws.com",
                "s3_public_endpoint_url": "https://s3.eu-central-1.amazonaws.com",
            },
            "blobs.s3.eu-central-1.amazonaws.com",
        ),
    ],
)
def test_a_link_to_amazon_leads_to_the_region_of_the_bucket(sign, changes, host):
    url, parameters = sign(**{**AMAZON, **changes})
    assert urlsplit(url).netloc == host
    assert f"/{changes.get('s3_region', 'eu-central-1')}/s3/" in parameters["X-Amz-Credential"]


@pytest.mark.parametrize("public", [None, "https://files.example.com"])
def test_a_link_gives_no_password_away_that_boto3_has_found(sign, s3, monkeypatch, public):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url.replace("http://", "http://someone:hunter2@"))
    url, _ = sign(s3_endpoint_url=None, s3_public_endpoint_url=public, s3_addressing_style="path")
    assert urlsplit(url).netloc == urlsplit(public or s3.url).netloc
    assert "hunter2" not in url and "someone" not in url


def test_zope_redirects_to_a_link_as_it_is(sign):
    """It quotes what it takes for unquoted."""
    for link in check(), check(content_type="text/plain; charset=utf-8", filename="Übersicht 100%.txt"):
        url, _ = sign(link, s3_prefix="a=1,b~c:d@e!(f)+g h")
        response = HTTPResponse()
        response.redirect(url)
        assert response.getHeader("Location") == url


def test_the_longest_validity_is_that_of_s3(sign):
    _, parameters = sign(check(longest=LONGEST))
    assert parameters["X-Amz-Expires"] == "604800"


def test_without_credentials_the_error_says_what_to_do(sign):
    with pytest.raises(
        BucketError, match=r"Could not sign a link to blobs/1f/102.blob of bucket .*: no credentials; check"
    ):
        sign(s3_access_key=None, s3_secret_key=None)
