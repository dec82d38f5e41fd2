"""The checks of the keys that go with each upload; as those in `checks`."""

import contextlib
from urllib.parse import parse_qsl

from ...revision import Revision
from ...s3.errors import BucketError
from .diagnosis import SMALL
from .outcome import Outcome, around, fails, works
from .scratch import Scratch, is_answered


def checksums(scratch: Scratch) -> Outcome:
    """Test ``s3-checksums``."""
    wrong = scratch.wrong.get("s3-checksums")
    if wrong is None:
        scratch.put(SMALL)
        return works(f"uploads with s3-checksums {scratch.settings.s3_checksums} are accepted")
    meaning = f"{wrong.error}; uploads work with {wrong.instead}, and the other checks use it"
    return fails(meaning, f"s3-checksums {wrong.instead}")


def storage_class(scratch: Scratch) -> Outcome:
    """Test ``s3-storage-class``."""
    wrong = scratch.wrong.get("s3-storage-class")
    if wrong is not None:
        return fails(
            f"{wrong.error}; it works without s3-storage-class, and the other checks go without: remove the key, or "
            f"give it a class that the service has, and whose objects can be read at once"
        )
    wanted = scratch.settings.s3_storage_class
    if not wanted:
        return works("s3-storage-class is not set")
    applied = scratch.read("head_object", scratch.put(SMALL)).get("StorageClass") or "STANDARD"
    if applied != wanted:
        return around(f"the service stores blobs as {applied} whatever s3-storage-class says")
    return works(f"s3-storage-class {wanted} is applied")


def tagging(scratch: Scratch) -> Outcome:
    """Test ``s3-tagging``: whether uploads are accepted, and objects and copies keep the tags."""
    wrong = scratch.wrong.get("s3-tagging")
    if wrong is not None:
        return fails(
            f"{wrong.error}; it works without s3-tagging, and the other checks go without: allow "
            f"s3:PutObjectTagging, or remove the key if the service does not know tags"
        )
    if not scratch.settings.s3_tagging:
        return works("s3-tagging is not set")
    wanted = dict(parse_qsl(scratch.settings.s3_tagging, keep_blank_values=True))
    stored = scratch.put(SMALL)
    copy = scratch.name(stored.oid, 2)
    names = {"objects": stored}
    with contextlib.suppress(BucketError), scratch.writing(scratch.key(copy)):  # the check "copy" reports it
        scratch.bucket.copy(*stored, copy.tid)
        names["copies"] = copy
    try:
        without = [kind for kind, name in names.items() if _tags(scratch, name) != wanted]
    except BucketError as error:
        if not is_answered(error):
            raise
        return works("uploads with s3-tagging are accepted; whether the tags are kept cannot be read")
    if without:
        return around(f"the service stores {without[0]} without the tags of s3-tagging")
    return works("new objects have the tags of s3-tagging")


def _tags(scratch: Scratch, name: Revision) -> dict[str, str]:
    try:
        tags = scratch.bucket.ask("get_object_tagging", Key=scratch.key(name)).get("TagSet", ())
    except BucketError as error:
        if error.code != "NoSuchTagSet":
            raise
        tags = ()
    return {one["Key"]: one["Value"] for one in tags}


_ABOUT_ENCRYPTION = {
    "s3-sse": "remove s3-sse, or set up that encryption at the service",
    "s3-sse-kms-key-id": (
        "name a key of KMS that exists, and that the credentials may use (kms:GenerateDataKey and kms:Decrypt)"
    ),
    "s3-sse-customer-key": (
        "a service or a policy may forbid it, as AWS does for new buckets: allow SSE-C there, or use s3-sse"
    ),
}


def encryption(scratch: Scratch) -> Outcome:
    """Test the keys of encryption, and that the service applies them."""
    for key, advice in _ABOUT_ENCRYPTION.items():
        wrong = scratch.wrong.get(key)
        if wrong is not None and wrong.instead:
            meaning = f"{wrong.error}; with {key} {wrong.instead} it works, and the other checks use it"
            return fails(f"{meaning}: a policy may demand that uploads ask for encryption", f"{key} {wrong.instead}")
        if wrong is not None:
            # An error without a code is our own, and has its own advice.
            more = f": {advice}" if wrong.error.code else ""
            return fails(f"{wrong.error}; it works without {key}, and the other checks go without{more}")
    settings = scratch.settings
    name = scratch.put(SMALL)  # fails if the service ignores s3-sse-customer-key
    head = scratch.read("head_object", name)
    if settings.s3_sse_customer_key:
        try:
            scratch.bucket.ask("get_object", Key=scratch.key(name))
        except BucketError as error:
            if not is_answered(error):
                raise
            return works("s3-sse-customer-key is applied: no blob can be read without the key")
        return fails("blobs can be read without s3-sse-customer-key, so they are not encrypted: use s3-sse")
    applied, kms_key = head.get("ServerSideEncryption"), settings.s3_sse_kms_key_id
    if settings.s3_sse and applied != settings.s3_sse:
        return fails(f"the service does not apply s3-sse {settings.s3_sse}, but {applied or 'no encryption'}")
    if kms_key and "alias/" not in kms_key and kms_key not in (head.get("SSEKMSKeyId") or ""):
        return fails("the service encrypts with another key than s3-sse-kms-key-id")
    if settings.s3_sse:
        return works(f"s3-sse {applied} is applied")
    return works(f"s3-sse is not set; the service reports {applied or 'no encryption'}")
