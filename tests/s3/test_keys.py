"""The key layout: a promise to the owner of the bucket."""

import random

import pytest
from ZODB.utils import p64, u64, z64

from zodb_s3blobs.s3.keys import Keys

LARGEST = b"\xff" * 8


@pytest.mark.parametrize(
    ("prefix", "oid", "tid", "key"),
    [
        ("", p64(0x1A), p64(0x3F00000000000B), "blobs/1a/3f00000000000b.blob"),
        ("", z64, z64, "blobs/0/0.blob"),
        ("", p64(1), LARGEST, "blobs/1/ffffffffffffffff.blob"),
        ("site", p64(0xABC), p64(0xDEF0), "site/blobs/abc/def0.blob"),
        ("some/site", p64(1), p64(2), "some/site/blobs/1/2.blob"),
    ],
)
def test_a_key_is_prefix_blobs_oid_tid_in_lower_case_hex_without_leading_zeros(prefix, oid, tid, key):
    assert Keys(prefix).key(oid, tid) == key


@pytest.mark.parametrize(("prefix", "blobs"), [("", "blobs/"), ("site", "site/blobs/"), ("a/b", "a/b/blobs/")])
def test_all_keys_start_with_what_is_to_be_listed(prefix, blobs):
    keys = Keys(prefix)
    assert keys.blobs == blobs
    assert keys.key(p64(1), p64(2)).startswith(blobs)


@pytest.mark.parametrize("prefix", ["", "site", "some/site", "blobs", "a.b+c"])
def test_a_key_parses_to_the_oid_and_tid_it_was_made_from(prefix):
    keys = Keys(prefix)
    numbers = random.Random(prefix)
    names = [(p64(numbers.getrandbits(bits)), p64(numbers.getrandbits(65 - bits))) for bits in range(1, 65)]
    for oid, tid in [*names, (z64, z64), (LARGEST, LARGEST)]:
        assert keys.parse(keys.key(oid, tid)) == (oid, tid)


def test_keys_of_different_blobs_differ():
    numbers = [p64(number) for number in (0, 1, 0x10, 0x11, 0x100, u64(LARGEST))]
    assert len({Keys().key(oid, tid) for oid in numbers for tid in numbers}) == len(numbers) ** 2


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("site/blobs/1A/2.blob", id="upper case oid"),
        pytest.param("site/blobs/1/2A.blob", id="upper case tid"),
        pytest.param("site/blobs/01/2.blob", id="leading zero in the oid"),
        pytest.param("site/blobs/1/02.blob", id="leading zero in the tid"),
        pytest.param("site/blobs/00/2.blob", id="zero twice"),
        pytest.param("site/blobs/10000000000000000/2.blob", id="oid of more than 8 bytes"),
        pytest.param("site/blobs/1/10000000000000000.blob", id="tid of more than 8 bytes"),
        pytest.param("site/blobs//2.blob", id="no oid"),
        pytest.param("site/blobs/1/.blob", id="no tid"),
        pytest.param("site/blobs/1g/2.blob", id="no hex"),
        pytest.param("site/blobs/0x1/2.blob", id="0x"),
        pytest.param("site/blobs/-1/2.blob", id="negative"),
        pytest.param("site/blobs/\u0661/2.blob", id="a digit that is not ASCII"),
        pytest.param("site/blobs/1/2", id="no suffix"),
        pytest.param("site/blobs/1/2.blob.bak", id="one more suffix"),
        pytest.param("site/blobs/1/2.blob\n", id="newline"),
        pytest.param("site/blobs/1/2.BLOB", id="upper case suffix"),
        pytest.param("site/blobs/1/2.txt", id="other suffix"),
        pytest.param("site/blobs/1/2xblob", id="no dot"),
        pytest.param("site/blobs/1/2/3.blob", id="folder in between"),
        pytest.param("site/blobs/2.blob", id="only one number"),
        pytest.param("site/blobs/", id="the folder itself"),
        pytest.param("site/staged/1/2.blob", id="other folder"),
        pytest.param("site/1/2.blob", id="no folder"),
        pytest.param("blobs/1/2.blob", id="no prefix"),
        pytest.param("other/blobs/1/2.blob", id="other prefix"),
        pytest.param("site2/blobs/1/2.blob", id="longer prefix"),
        pytest.param("my/site/blobs/1/2.blob", id="deeper prefix"),
        pytest.param("Site/blobs/1/2.blob", id="prefix in other case"),
        pytest.param("/site/blobs/1/2.blob", id="slash in front"),
        pytest.param("", id="empty"),
    ],
)
def test_a_key_that_is_not_ours_is_not_parsed(key):
    assert Keys("site").parse(key) is None


def test_keys_below_a_prefix_are_not_those_of_the_bucket_without_one():
    assert Keys("").parse(Keys("site").key(p64(1), p64(2))) is None
    assert Keys("").parse(Keys("blobs").key(p64(1), p64(2))) is None


# Staged uploads

NAME = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("prefix", "folder"), [("", "staged/"), ("site", "site/staged/"), ("a/blobs", "a/blobs/staged/")]
)
def test_staged_uploads_lie_beside_the_blobs(prefix, folder):
    keys = Keys(prefix)
    assert keys.staged == folder
    assert keys.staged_key(NAME) == folder + NAME
    assert keys.parse_staged(folder + NAME) == NAME


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(f"site/staged/{NAME.upper()}", id="upper case"),
        pytest.param(f"site/staged/{NAME[1:]}", id="too short"),
        pytest.param(f"site/staged/{NAME}0", id="too long"),
        pytest.param(f"site/staged/{NAME[1:]}g", id="no hex"),
        pytest.param(f"site/staged/{NAME}\n", id="newline"),
        pytest.param(f"site/staged/{NAME}/1", id="deeper"),
        pytest.param(f"site/staged/more/{NAME}", id="folder in between"),
        pytest.param(f"site/blobs/{NAME}", id="other folder"),
        pytest.param(f"staged/{NAME}", id="no prefix"),
        pytest.param(f"other/staged/{NAME}", id="other prefix"),
        pytest.param(NAME, id="no folder"),
        pytest.param("site/staged/", id="the folder itself"),
    ],
)
def test_a_key_that_is_no_staged_upload_of_ours_is_not_parsed(key):
    assert Keys("site").parse_staged(key) is None


@pytest.mark.parametrize("prefix", ["", "site"])
def test_no_key_is_both_a_blob_and_a_staged_upload(prefix):
    keys = Keys(prefix)
    assert keys.parse(keys.staged_key(NAME)) is None
    assert keys.parse_staged(keys.key(p64(1), p64(2))) is None
