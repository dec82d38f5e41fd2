"""The checks of ``zodb-s3blobs check``, one function each: their requests, and the texts of their outcomes.

A check gets a `Scratch` and returns an `Outcome`. A BucketError or BlobNotFound that it raises is a failure; it may
also raise NotTried.
"""

import base64
import random
import time
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.error import HTTPError

from ...revision import Revision
from ...s3.download import PART
from ...s3.errors import BlobNotFound, BucketError, code_of
from . import upload_keys
from .diagnosis import SMALL
from .outcome import Outcome, around, fails, works
from .scratch import FORBIDDEN, NotTried, Scratch, is_refusal

_ONE_REQUEST = 5 << 30  # the largest s3-multipart-threshold: nothing larger goes into one request

#: Seconds between two clocks: from the first on there is a warning, from the second on S3 refuses requests.
_APART, _TOO_FAR_APART = 60, 900

_NOT_MET = {"PreconditionFailed", "412"}


def _put_and_get(scratch: Scratch) -> Outcome:
    trouble = scratch.unwritable or scratch.unreadable
    if trouble is not None:
        raise trouble
    for data in b"", SMALL:
        name = scratch.put(data)
        try:
            if scratch.get(name) != data:
                return fails(f"a blob of {len(data)} bytes comes back with other bytes")
        except BlobNotFound:
            return fails("the service confirms that it has stored a blob, and does not have it afterwards")
    without = [f"{key} {wrong.instead}" if wrong.instead else f"no {key}" for key, wrong in scratch.wrong.items()]
    return works(
        "small and empty blobs come back as they were stored" + (", with " + ", ".join(without) if without else "")
    )


def _clock(scratch: Scratch) -> Outcome:
    before = time.time()
    answer = scratch.put_raw(scratch.key(scratch.name()), SMALL)
    after = time.time()
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if not date:
        return around("the service does not send its time; the clock of this machine is used")
    theirs = parsedate_to_datetime(date).timestamp()
    apart = max(before - theirs - 1, theirs - after, 0)  # fractions of a second are left out
    meaning = f"the clocks of the service and of this machine are {apart:.0f} seconds apart"
    if apart < _APART:
        return works(meaning)
    advice = f"S3 refuses requests that are {_TOO_FAR_APART} seconds off: have NTP set the clock of this machine"
    return (around if apart < _TOO_FAR_APART else fails)(f"{meaning}; {advice}")


def _metadata(scratch: Scratch) -> Outcome:
    metadata = scratch.metadata(scratch.put(SMALL))
    if not _has_checksum(metadata):
        return fails("x-amz-meta-sha256, the checksum by which every download is verified, does not come back")
    if "sha256" not in metadata:
        return around("the service changes the case of x-amz-meta-sha256; the server ignores case")
    return works("the SHA-256 of a blob is kept with it")


def _has_checksum(metadata: dict[str, str]) -> bool:
    return any(name.lower() == "sha256" and len(value) == 64 for name, value in metadata.items())


def _absent(scratch: Scratch) -> Outcome:
    for operation in "head_object", "get_object":
        try:
            scratch.bucket.ask(operation, Key=scratch.key(scratch.name()), **scratch.bucket.read_options)
        except BlobNotFound:
            continue
        except BucketError as error:
            if error.code not in FORBIDDEN or scratch.unreadable is not None:
                raise
            return fails(
                f"the service answers {error.code} for a blob that is not there, so that a missing blob looks like an "
                f"outage: the policy must allow s3:ListBucket of the bucket itself"
            )
        return fails("the service sends something for a blob that was never stored")
    return works("a missing blob is told from one that cannot be read")


def _damage(scratch: Scratch) -> Outcome:
    refused = {value: _is_refused(scratch, wrong) for value, wrong in _WRONG_CHECKSUMS.items()}
    if refused.pop(scratch.settings.s3_checksums):
        return works("an upload that was damaged on its way is refused")
    meaning = "the service stores an upload that was damaged on its way, without comparing the checksum sent with it"
    for value, is_refused in refused.items():
        if is_refused:
            return fails(f"{meaning}; with {value} it compares", f"s3-checksums {value}")
    if scratch.bucket.endpoint_url.startswith("https:"):
        return around(f"{meaning}; TLS protects uploads on their way")
    return fails(
        f"{meaning}. Over plain http, as here, it is good for trying out only; TLS would protect uploads on their way",
        "s3-endpoint-url https://...",
    )


#: Value of s3-checksums -> a wrong checksum of the kind that it adds to uploads.
_WRONG_CHECKSUMS = {
    "when_required": {"ContentMD5": base64.b64encode(bytes(16)).decode()},
    "when_supported": {"ChecksumCRC32": base64.b64encode(bytes(4)).decode()},
}


def _is_refused(scratch: Scratch, wrong: dict[str, str]) -> bool:
    try:
        scratch.put_raw(scratch.key(scratch.name()), SMALL, **wrong)
    except BucketError as error:
        if not is_refusal(error):
            raise
        return True
    return False


def _ranges(scratch: Scratch) -> Outcome:
    answer = scratch.read("get_object", scratch.put(SMALL), Range="bytes=1-3")
    if answer["Body"] == SMALL:
        return around("the service sends the whole blob for a part of it; large blobs are read in one piece")
    if answer["Body"] != SMALL[1:4] or answer.get("ContentRange") != f"bytes 1-3/{len(SMALL)}":
        return fails("the service sends other bytes than the part of a blob that was asked for")
    return works("parts of a blob can be read")


def _list(scratch: Scratch) -> Outcome:
    first = scratch.put(SMALL)
    names = [first, *(scratch.put(SMALL, scratch.name(first[0], tid)) for tid in range(2, 6))]
    wanted = [scratch.key(name) for name in names]
    blobs = {(one.oid, one.tid): one.size for one in scratch.bucket.list_blobs()}
    found: list[str] = []
    page: dict[str, str] = {}
    while len(found) <= len(wanted):
        answer = scratch.bucket.ask("list_objects_v2", Prefix=wanted[0].rpartition("/")[0] + "/", MaxKeys=2, **page)
        found += [one["Key"] for one in answer.get("Contents", ())]
        if not answer.get("IsTruncated") or not answer.get("Contents"):
            break
        page = {"ContinuationToken": answer["NextContinuationToken"]}
    if sorted(found) != wanted or any(blobs.get(name) != len(SMALL) for name in names):
        return fails("a listing of several pages lacks blobs or repeats them, and gc, verify and migrate rely on it")
    return works("listings of several pages have each blob once")


def _delete(scratch: Scratch) -> Outcome:
    name = scratch.put(SMALL)
    for _ in "present", "absent":
        scratch.bucket.delete([name])
        if scratch.is_there(name):
            return fails("a blob that was deleted is still there")
    return works("blobs are deleted")


def _batch_delete(scratch: Scratch) -> Outcome:
    names = [scratch.put(SMALL) for _ in range(3)]
    keys = [{"Key": scratch.key(name)} for name in names]
    try:
        errors = scratch.bucket.ask("delete_objects", Delete={"Objects": keys, "Quiet": True}).get("Errors")
        trouble = f"the service answers {code_of(errors[0]) or 'an error'}" if errors else ""
    except BucketError as error:
        trouble = str(error)
    if trouble:
        scratch.bucket.delete(names)
    if any(scratch.is_there(name) for name in names):
        return fails("blobs that were deleted together are still there")
    return around(f"{trouble}; blobs are deleted one by one") if trouble else works("blobs are deleted together")


#: Way to store a large blob -> the s3-multipart-threshold for it, as a number and as text.
_WAYS = {"in parts": (PART, "8MB"), "in one request": (_ONE_REQUEST, "5GB")}


def _multipart(scratch: Scratch) -> Outcome:
    threshold = scratch.settings.s3_multipart_threshold
    data = random.Random(0).randbytes(2 * PART + 1)  # three parts, of which no two are alike
    # Blobs between this size and the threshold are stored in one request, and larger ones in parts.
    ways = ["in parts"] if threshold < _ONE_REQUEST else []
    ways += ["in one request"] if len(data) < threshold else []
    for way in ways:
        error = _trouble_with_large(scratch, data, way)
        if error is None:
            continue
        other = "in one request" if way == "in parts" else "in parts"
        too_large = error.code == "413" and way == "in parts"  # one request would be larger still
        if is_refusal(error) and error.code and not too_large and _trouble_with_large(scratch, data, other) is None:
            return fails(f"{error}; {other} it works", f"s3-multipart-threshold {_WAYS[other][1]}")
        more = ""
        if error.reason == "connection":
            more = (
                "; smaller blobs can be stored: a proxy before the service may limit the size of requests (nginx: "
                "client_max_body_size)"
            )
        return fails(f"{error}{more}", error=error)
    return works(f"a blob of {len(data) >> 20} MiB is stored {' and '.join(ways)}, and read")


def _trouble_with_large(scratch: Scratch, data: bytes, way: str) -> BucketError | None:
    # A proxy may close the connection instead of reading a body that is too large; the second attempt gets its answer.
    attempts = max(2, scratch.settings.s3_max_attempts)
    bucket = scratch.open(s3_multipart_threshold=_WAYS[way][0], s3_max_attempts=attempts)
    try:
        name = scratch.put(data, bucket=bucket)
        if scratch.get(name) != data:
            return BucketError("a large blob comes back with other bytes")
    except BucketError as error:
        return error
    return None


def _unfinished(scratch: Scratch) -> Outcome:
    try:
        upload = scratch.begin_upload()
    except BucketError as error:
        if scratch.settings.s3_multipart_threshold < _ONE_REQUEST:
            raise
        return around("no blob below s3-multipart-threshold is stored in parts", error=error)

    def is_listed() -> bool:
        return upload.upload_id in [listed.upload_id for listed in scratch.bucket.list_uploads()]

    try:
        trouble = "" if is_listed() else "the service does not list them"
    except BucketError as error:
        trouble = str(error)
    scratch.bucket.abort_upload(upload)
    if not trouble and is_listed():
        return fails("the parts of an upload stay after it was aborted")
    del scratch.uploads[upload.upload_id]
    if trouble:
        return around(f"{trouble}; let a lifecycle rule of the bucket abort the unfinished uploads of crashed servers")
    return works("unfinished uploads in parts are listed and aborted")


def _copy(scratch: Scratch) -> Outcome:
    oid, tid = scratch.put(SMALL)
    copy = scratch.name(oid, 2)
    try:
        with scratch.writing(scratch.key(copy)):
            scratch.bucket.copy(oid, tid, copy[1])
    except BucketError as error:
        return around("blobs are uploaded again instead", error=error)
    return _trouble_of_copy(scratch, copy, SMALL) or works("the service copies blobs, and keeps the metadata sent")


def _trouble_of_copy(scratch: Scratch, copy: Revision, data: bytes) -> Outcome | None:
    """Return the failure of the blob ``copy``, which should have the bytes ``data``; None if it is right."""
    try:
        if scratch.get(copy) != data:
            return fails("a copy has other bytes than the original", "s3-stage-threshold 0")
        if not _has_checksum(scratch.metadata(copy)):
            return fails("a copy loses the metadata that is sent with the request", "s3-stage-threshold 0")
    except BlobNotFound:
        return fails("the service confirms a copy, and does not have it afterwards", "s3-stage-threshold 0")
    return None


def _staging(scratch: Scratch) -> Outcome:
    if not scratch.section.config.s3_stage_threshold:
        return works("s3-stage-threshold is 0, so that no upload is staged")
    data = random.Random(1).randbytes(2 << 20)  # above the limit of some proxies
    staged, name, file = uuid.uuid4().hex, scratch.name(), scratch.file(data)
    with scratch.writing(scratch.bucket.keys.staged_key(staged)):
        digest = scratch.bucket.put_staged(staged, file.path, scratch.check_wanted)
    if staged not in [listed.name for listed in scratch.bucket.list_staged()]:
        return fails("a staged upload is not listed, so that those of crashed servers would stay forever")
    try:
        with scratch.writing(scratch.key(name)):
            scratch.bucket.publish(scratch.bucket.keys.staged_key(staged), *name, len(data), digest)
    except BucketError as error:
        return around("large blobs are uploaded twice instead", "s3-stage-threshold 0", error)
    scratch.bucket.delete_staged([staged])
    return _trouble_of_copy(scratch, name, data) or works("large blobs are uploaded before the vote")


def _if_none_match(scratch: Scratch) -> Outcome:
    key = scratch.key(scratch.name())
    scratch.put_raw(key, SMALL)
    return _not_met(scratch, key, IfNoneMatch="*") or works("an object that is there is not overwritten")


def _if_match(scratch: Scratch) -> Outcome:
    key = scratch.key(scratch.name())
    etag = scratch.put_raw(key, SMALL)["ETag"]
    trouble = _not_met(scratch, key, IfMatch='"00000000000000000000000000000000"')
    if trouble is not None:
        return trouble
    try:
        scratch.put_raw(key, SMALL, IfMatch=etag)
    except BucketError as error:
        if error.code not in _NOT_MET:
            raise
        return around("the service finds no ETag right, as Ceph 16; the owner lease is read and compared first")
    return works("an object that has changed is not overwritten")


def _not_met(scratch: Scratch, key: str, **condition: str) -> Outcome | None:
    """Return None if the service refuses a write whose ``condition`` is not met, else the outcome."""
    try:
        scratch.put_raw(key, SMALL, **condition)
    except BucketError as error:
        if error.code in _NOT_MET:
            return None
        if not is_refusal(error):
            raise
        return around(f"the service answers {error.code}; the owner lease is read back after each write")
    return around("the service ignores it; the owner lease is read back after each write")


def _lease(scratch: Scratch) -> Outcome:
    bucket = scratch.bucket
    with scratch.writing(bucket.keys.owner):
        bucket.write_owner(b"1", None)
        first = bucket.read_owner()
        bucket.write_owner(b"2", first)
        second = bucket.read_owner()
        bucket.delete_owner()
        third = bucket.read_owner()
    if first is None or second is None or third is not None or (first.data, second.data) != (b"1", b"2"):
        return fails("the owner lease does not come back as it was written, so that no garbage would be collected")
    if not -_APART < second.age < _TOO_FAR_APART:
        return fails(f"the service says that the owner lease just written is {second.age:.0f} seconds old")
    return works("the owner lease is written, renewed and given back")


#: What a link asks for that the service answers with: content type, file name, disposition.
_WANTED = "text/x-check", "check.txt", "attachment"


def _links(scratch: Scratch) -> Outcome:
    if not scratch.section.config.presigned_urls:
        return works("presigned-urls is not set")
    if scratch.settings.s3_sse_customer_key:
        return around("no link can be followed without the key of s3-sse-customer-key: presigned-urls has no effect")
    name = scratch.put(SMALL)
    try:
        host, headers, data = scratch.follow_link(name, *_WANTED)
    except HTTPError as error:
        return fails(
            f"the answer to a link is HTTP {error.code}: check s3-public-endpoint-url, which must lead to the service "
            f"with host and path unchanged, and s3-region"
        )
    except (OSError, HTTPException) as error:
        reason = type(getattr(error, "reason", error)).__name__
        return around(f"no link can be followed from this machine ({reason}): try one in a browser")
    if data != SMALL:
        return fails(f"a link leads to other bytes at {host}: check s3-public-endpoint-url")
    if headers.get_content_type() != _WANTED[0] or headers.get_filename() != _WANTED[1]:
        return around("links can be followed, but the service ignores the content type or the file name in them")
    return works(f"links to {host} can be followed")


def _fallback_bucket(scratch: Scratch) -> Outcome:
    fallback = scratch.fallback
    if fallback is None:
        raise NotTried("the section has no fallbackbucket")
    where = f"below {fallback.bucket.keys.blobs} of bucket {fallback.bucket.name}"
    name = fallback.find_any()
    if name is None:
        return fails(f"there is no blob {where}: check bucket-name and s3-prefix in fallbackbucket")
    found = fallback.open(*name)
    if found is None:
        return fails(f"a blob {where} is listed, and cannot be found")
    found.close()
    return works(f"blobs {where} are listed and read")


Check = Callable[[Scratch], Outcome]

CHECKS: dict[str, Check] = {
    "put and get": _put_and_get,
    "checksums": upload_keys.checksums,
    "storage class": upload_keys.storage_class,
    "tagging": upload_keys.tagging,
    "encryption": upload_keys.encryption,
    "clock": _clock,
    "metadata": _metadata,
    "absent blobs": _absent,
    "damaged uploads": _damage,
    "ranges": _ranges,
    "list": _list,
    "delete": _delete,
    "batch delete": _batch_delete,
    "multipart": _multipart,
    "unfinished uploads": _unfinished,
    "copy": _copy,
    "staging": _staging,
    "If-None-Match": _if_none_match,
    "If-Match": _if_match,
    "owner lease": _lease,
    "links": _links,
    "fallback bucket": _fallback_bucket,
}
