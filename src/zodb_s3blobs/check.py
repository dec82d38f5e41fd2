"""``zodb-s3blobs check``: prove that a bucket and its credentials will do, before anybody relies on them.

Stores, reads, copies, lists and deletes a few blobs as the server does, below a prefix of their own, and shows what
works, what the server works around, and which key of the section to set. All of it is deleted again, and no other
object is touched: the server may run. No database is opened.

Exit status: 0 the bucket will do; 1 that could not be found out; 3 something that the server needs fails.
"""

import argparse
import base64
import json
import logging
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from . import command, zeoconf
from .bucket import MISCONFIGURED, PART, BlobNotFound, BucketError, ListedUpload
from .s3events import code_of
from .scratch import FORBIDDEN, VERSIONS, Scratch
from .workers import DaemonPool

_SMALL = b"This is a blob of zodb-s3blobs check."
_ONE_REQUEST = 5 << 30  # the largest s3-multipart-threshold: nothing larger goes into one request

#: How many seconds two clocks may be apart: what is no trouble yet, and what S3 refuses.
_APART, _TOO_FAR_APART = 60, 900

_NOT_MET = {"PreconditionFailed", "412"}


@dataclass(frozen=True)
class Outcome:
    """What a check found; ``set``: the key of the section that helps, with its value."""

    state: Literal["works", "worked around", "fails"]
    meaning: str
    set: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``check``."""
    command.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status that is described above."""
    return command.run("check", lambda: _run(arguments), logging.CRITICAL)  # the table tells what the log would


def _run(arguments: argparse.Namespace) -> int:
    section = zeoconf.find(arguments.configure, arguments.storage).section
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, it cleans up
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as directory, closing(Scratch(section, directory)) as scratch:
        _reach(scratch)
        try:
            for name, outcome in _outcomes(scratch):
                outcomes[name] = outcome
                if not arguments.json:
                    _show(name, outcome)
        except BaseException as error:
            print(f"zodb-s3blobs check: it ended early. {_clean_up(scratch).meaning}", file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):
                return 130
            raise
        outcomes["clean-up"] = _clean_up(scratch)
    failed = [name for name, outcome in outcomes.items() if outcome.state == "fails"]
    if arguments.json:
        checks = [{"check": name, **asdict(outcome)} for name, outcome in outcomes.items()]
        print(json.dumps({"bucket": scratch.bucket.name, "will_do": not failed, "checks": checks}, indent=1))
    else:
        _show("clean-up", outcomes["clean-up"])
        print(f"\nBucket {scratch.bucket.name} will {'not do: ' + ', '.join(failed) if failed else 'do'}")
    return command.DAMAGED if failed else command.WELL


def _show(name: str, outcome: Outcome) -> None:
    advice = f"; set {outcome.set}" if outcome.set else ""
    print(f"{name:<18} {outcome.state:<13} {outcome.meaning}{advice}", flush=True)


def _reach(scratch: Scratch) -> None:
    """Raise BucketError if no check can succeed."""
    trouble = _trouble(scratch)
    if trouble is not None and scratch.settings.s3_addressing_style != "path":
        scratch.bucket = scratch.open(s3_addressing_style="path")
        if _trouble(scratch) is None:
            raise BucketError(f"{trouble}. It answers to s3-addressing-style path: set that", trouble.code)
    if trouble is not None:
        raise BucketError(f"{trouble}{_UNREACHED.get(trouble.code, '')}", trouble.code)


_UNREACHED = {
    "EndpointConnectionError": "; check s3-endpoint-url and the network",
    "ConnectTimeoutError": "; check s3-endpoint-url and the network",
    "ReadTimeoutError": "; check s3-endpoint-url and the network",
    "SSLError": "; check s3-endpoint-url, and AWS_CA_BUNDLE in the environment for a certificate of your own",
}


def _trouble(scratch: Scratch) -> BucketError | None:
    """Why no check can succeed, if that is so."""
    try:
        scratch.bucket.probe()
    except BucketError as error:
        wrong = error.code in MISCONFIGURED.keys() - FORBIDDEN or error.code == "RequestTimeTooSkewed"
        return error if wrong or not scratch.is_answered else None
    return None


def _outcomes(scratch: Scratch) -> Iterator[tuple[str, Outcome]]:
    """The outcome of each check. However it ends, no check is under way any more."""
    # In a thread, so that Ctrl-C does not break a request off that the service carries out after the clean-up.
    worker = DaemonPool(1, "s3blobs check")
    silence = None
    try:
        for name, check in CHECKS.items():
            if silence is not None:
                yield name, _fails("it was not tried: the bucket does not answer any more")
                continue
            outcome = worker.submit(_outcome, check, scratch).result()
            yield name, outcome
            if outcome.state == "fails" and not scratch.is_answered:
                silence = worker.submit(_trouble, scratch).result()
    finally:
        scratch.unwanted.set()
        worker.shutdown()


def _outcome(check: "Check", scratch: Scratch) -> Outcome:
    try:
        outcome = check(scratch)
    except (BucketError, BlobNotFound) as error:
        outcome = _fails(str(error))
    except OSError:
        raise  # of this machine's disk
    except Exception as error:
        outcome = _fails(f"an answer of the service makes no sense ({type(error).__name__})")
    return replace(outcome, meaning=outcome.meaning.replace(scratch.bucket.keys.root, ""))


def _clean_up(scratch: Scratch) -> Outcome:
    root = scratch.bucket.keys.root
    try:
        left = scratch.clean_up()
    except KeyboardInterrupt:
        return _fails(f"what is left below {root} was not deleted: delete it yourself")
    if not left:
        return _works(f"nothing is left below {root}")
    (what, reason), *_ = left.items()
    if left.keys() == {VERSIONS}:
        return _around(f"the bucket keeps old versions of what was deleted below {root}: {reason}")
    return _fails(f"{len(left)} objects or uploads are left below {root}: delete them yourself; {what}: {reason}")


def _works(meaning: str) -> Outcome:
    return Outcome("works", meaning)


def _around(meaning: str, set: str = "") -> Outcome:
    return Outcome("worked around", meaning, set)


def _fails(meaning: str, set: str = "") -> Outcome:
    return Outcome("fails", meaning, set)


# The checks. What they raise fails.


def _checksums(scratch: Scratch) -> Outcome:
    configured = scratch.settings.s3_checksums
    try:
        scratch.put(_SMALL)
        return _works(f"uploads with s3-checksums {configured} are taken")
    except BucketError as error:
        if not scratch.is_refusal(error):
            raise
        failure = error
    other: Any = "when_required" if configured == "when_supported" else "when_supported"
    bucket = scratch.open(s3_checksums=other)
    try:
        scratch.put(_SMALL, bucket=bucket)
    except BucketError:
        raise failure from None
    # One wrong key is not to make all other checks fail.
    scratch.settings, scratch.bucket = replace(scratch.settings, s3_checksums=other), bucket
    return _fails(f"{failure}; {other} works, and the checks below use it", f"s3-checksums {other}")


def _clock(scratch: Scratch) -> Outcome:
    before = time.time()
    answer = scratch.put_raw(scratch.key(scratch.name()), _SMALL)
    after = time.time()
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if not date:
        return _around("the service does not tell its time; the clock of this machine is used")
    theirs = parsedate_to_datetime(date).timestamp()
    apart = max(before - theirs - 1, theirs - after, 0)  # fractions of a second are left out
    meaning = f"the clocks of the service and of this machine are {apart:.0f} seconds apart"
    if apart < _APART:
        return _works(meaning)
    advice = f"S3 refuses what is {_TOO_FAR_APART} seconds off: have NTP set the clock of this machine"
    return (_around if apart < _TOO_FAR_APART else _fails)(f"{meaning}; {advice}")


def _put_and_get(scratch: Scratch) -> Outcome:
    for data in b"", _SMALL:
        if scratch.get(scratch.put(data)) != data:
            return _fails(f"a blob of {len(data)} bytes comes back as another")
    return _works("small and empty blobs come back as they were stored")


def _metadata(scratch: Scratch) -> Outcome:
    metadata = scratch.metadata(scratch.put(_SMALL))
    if not _has_checksum(metadata):
        return _fails("x-amz-meta-sha256, by which a blob is checked when it is read, does not come back")
    if "sha256" not in metadata:
        return _around("the name of x-amz-meta-sha256 comes back in other letters; it is found all the same")
    return _works("the SHA-256 of a blob is kept with it")


def _has_checksum(metadata: dict[str, str]) -> bool:
    return any(name.lower() == "sha256" and len(value) == 64 for name, value in metadata.items())


def _absent(scratch: Scratch) -> Outcome:
    # Without that permission S3 answers 403, and a blob that is gone for good looks like an outage.
    with scratch.needing("s3:ListBucket"):
        for operation in "head_object", "get_object":
            try:
                scratch.bucket.ask(operation, Key=scratch.key(scratch.name()), **scratch.bucket.read_options)
            except BlobNotFound:
                continue
            return _fails("something comes back for a blob that was never stored")
    return _works("what is not there is told from what cannot be read")


def _damage(scratch: Scratch) -> Outcome:
    refused = {value: _is_refused(scratch, wrong) for value, wrong in _WRONG_CHECKSUMS.items()}
    if refused.pop(scratch.settings.s3_checksums):
        return _works("an upload that is damaged on its way is refused")
    meaning = "the service takes an upload that is damaged on its way"
    for value, is_refused in refused.items():
        if is_refused:
            return _fails(f"{meaning}, but not with {value}", f"s3-checksums {value}")
    if scratch.bucket.endpoint_url.startswith("https:"):
        return _around(f"{meaning}; TLS protects it")
    return _fails(f"{meaning}; TLS would protect it", "s3-endpoint-url https://...")


#: For each value of s3-checksums, a wrong one of the kind that goes with uploads.
_WRONG_CHECKSUMS = {
    "when_required": {"ContentMD5": base64.b64encode(bytes(16)).decode()},
    "when_supported": {"ChecksumCRC32": base64.b64encode(bytes(4)).decode()},
}


def _is_refused(scratch: Scratch, wrong: dict[str, str]) -> bool:
    try:
        scratch.put_raw(scratch.key(scratch.name()), _SMALL, **wrong)
    except BucketError as error:
        if not scratch.is_refusal(error):
            raise
        return True
    return False


def _encryption(scratch: Scratch) -> Outcome:
    settings = scratch.settings
    name = scratch.put(_SMALL)  # which fails if s3-sse-customer-key is ignored
    head = scratch.read("head_object", name)
    if settings.s3_sse_customer_key:
        try:
            scratch.bucket.ask("get_object", Key=scratch.key(name))
        except BucketError:
            if not scratch.is_answered:
                raise
            return _works("s3-sse-customer-key is applied: nothing can be read without the key")
        return _fails("blobs can be read without s3-sse-customer-key, so they are not encrypted; use s3-sse")
    applied, key = head.get("ServerSideEncryption"), settings.s3_sse_kms_key_id
    if settings.s3_sse and applied != settings.s3_sse:
        return _fails(f"the service does not apply s3-sse {settings.s3_sse}, but {applied or 'nothing'}")
    if key and "alias/" not in key and key not in (head.get("SSEKMSKeyId") or ""):
        return _fails("the service encrypts with another key than s3-sse-kms-key-id")
    if settings.s3_sse:
        return _works(f"s3-sse {applied} is applied")
    return _works(f"none is asked for; the service tells of {applied or 'none of its own'}")


def _ranges(scratch: Scratch) -> Outcome:
    answer = scratch.read("get_object", scratch.put(_SMALL), Range="bytes=1-3")
    if answer["Body"] == _SMALL:
        return _around("the whole blob comes for a part of it: large blobs are read in one piece")
    if answer["Body"] != _SMALL[1:4] or answer.get("ContentRange") != f"bytes 1-3/{len(_SMALL)}":
        return _fails("other bytes come than the part of a blob that was asked for")
    return _works("parts of a blob can be read")


def _multipart(scratch: Scratch) -> Outcome:
    threshold = scratch.settings.s3_multipart_threshold
    in_parts = threshold < _ONE_REQUEST
    data = random.Random(0).randbytes(2 * PART + 1)  # three parts, of which no two are alike
    # With a high threshold it takes a larger blob, with a lower one all else is the same.
    bucket = scratch.open(s3_multipart_threshold=PART) if len(data) < threshold and in_parts else scratch.bucket
    name = scratch.name()
    try:
        scratch.put(data, name, bucket)
    except BucketError as error:
        if not in_parts or not error.code or error.code in FORBIDDEN:
            raise
        scratch.put(data, name, scratch.open(s3_multipart_threshold=_ONE_REQUEST))
        return _fails(f"{error}; in one request it works", "s3-multipart-threshold 5GB")
    if scratch.get(name) != data:
        return _fails("a large blob comes back as another")
    return _works(f"a blob of {len(data) >> 20} MiB is stored in {'parts' if in_parts else 'one request'} and read")


def _unfinished(scratch: Scratch) -> Outcome:
    key = scratch.bucket.keys.staged_key(uuid.uuid4().hex)
    with scratch.needing("s3:PutObject"):
        try:
            answer = scratch.bucket.ask("create_multipart_upload", Key=key, **scratch.bucket.write_options)
        except BucketError as error:
            if scratch.settings.s3_multipart_threshold < _ONE_REQUEST:
                raise
            return _around(f"{error}; nothing is stored in parts below s3-multipart-threshold")
    upload = ListedUpload(key, answer["UploadId"], datetime.now(timezone.utc))
    scratch.uploads[upload.upload_id] = key

    def is_listed() -> bool:
        return upload.upload_id in [listed.upload_id for listed in scratch.bucket.list_uploads()]

    try:
        with scratch.needing("s3:ListBucketMultipartUploads"):
            trouble = "" if is_listed() else "the service does not list them"
    except BucketError as error:
        trouble = str(error)
    with scratch.needing("s3:AbortMultipartUpload"):
        scratch.bucket.abort_upload(upload)
    if not trouble and is_listed():
        return _fails("the parts of an upload that was aborted stay")
    del scratch.uploads[upload.upload_id]
    if trouble:
        return _around(f"{trouble}; have a lifecycle rule of the bucket abort those of crashed servers")
    return _works("unfinished uploads in parts are listed and aborted")


def _list(scratch: Scratch) -> Outcome:
    first = scratch.put(_SMALL)
    names = [first, *(scratch.put(_SMALL, scratch.name(first[0], tid)) for tid in range(2, 6))]
    wanted = [scratch.key(name) for name in names]
    found: list[str] = []
    page: dict[str, str] = {}
    with scratch.needing("s3:ListBucket"):
        while len(found) <= len(wanted):
            answer = scratch.bucket.ask("list_objects_v2", Prefix=wanted[0].rpartition("/")[0] + "/", MaxKeys=2, **page)
            found += [one["Key"] for one in answer.get("Contents", ())]
            if not answer.get("IsTruncated") or not answer.get("Contents"):
                break
            page = {"ContinuationToken": answer["NextContinuationToken"]}
        blobs = {(one.oid, one.tid): one.size for one in scratch.bucket.list_blobs()}
    if sorted(found) != wanted or any(blobs.get(name) != len(_SMALL) for name in names):
        return _fails("a listing of several pages does not have each blob once, which gc, verify and migrate rely on")
    return _works("listings of several pages have all blobs")


def _copy(scratch: Scratch) -> Outcome:
    oid, tid = scratch.put(_SMALL)
    copy = scratch.name(oid, 2)
    try:
        with scratch.needing("s3:GetObject and s3:PutObject"):
            scratch.bucket.copy(oid, tid, copy[1])
    except (BucketError, BlobNotFound) as error:
        return _around(f"{error}; blobs are uploaded again instead")
    if scratch.get(copy) != _SMALL or not _has_checksum(scratch.metadata(copy)):
        return _fails("a copy is not like the original")
    return _works("the service copies blobs with their metadata")


def _staging(scratch: Scratch) -> Outcome:
    if not scratch.section.config.s3_stage_threshold:
        return _works("s3-stage-threshold is 0, so it is not needed")
    staged, name, file = uuid.uuid4().hex, scratch.name(), scratch.file(_SMALL)
    scratch.keys.add(scratch.bucket.keys.staged_key(staged))
    with scratch.needing("s3:PutObject"):
        scratch.bucket.put_staged(staged, file.path, scratch.check_wanted)
    with scratch.needing("s3:ListBucket"):
        if staged not in [listed.name for listed in scratch.bucket.list_staged()]:
            return _fails("a staged upload is not listed, so those of crashed servers would stay")
    try:
        with scratch.needing("s3:GetObject and s3:PutObject"):
            scratch.bucket.publish_staged(staged, *name, file.path)
    except (BucketError, BlobNotFound) as error:
        return _around(f"{error}; large blobs are uploaded twice instead", "s3-stage-threshold 0")
    with scratch.needing("s3:DeleteObject"):
        scratch.bucket.delete_staged([staged])
    if scratch.get(name) != _SMALL:
        return _fails("a staged upload becomes another blob", "s3-stage-threshold 0")
    return _works("large blobs can be uploaded before the commit lock is taken")


def _delete(scratch: Scratch) -> Outcome:
    name = scratch.put(_SMALL)
    for _ in "present", "absent":
        scratch.delete([name])
        if scratch.is_there(name):
            return _fails("a blob that was deleted is still there")
    return _works("blobs are deleted")


def _batch_delete(scratch: Scratch) -> Outcome:
    names = [scratch.put(_SMALL) for _ in range(3)]
    keys = [{"Key": scratch.key(name)} for name in names]
    try:
        errors = scratch.bucket.ask("delete_objects", Delete={"Objects": keys, "Quiet": True}).get("Errors")
        trouble = f"the service answers {code_of(errors[0]) or 'an error'}" if errors else ""
    except BucketError as error:
        trouble = str(error)
    if trouble:
        scratch.delete(names)
    if any(scratch.is_there(name) for name in names):
        return _fails("blobs that were deleted together are still there")
    return _around(f"{trouble}; blobs are deleted one by one") if trouble else _works("blobs are deleted together")


def _if_none_match(scratch: Scratch) -> Outcome:
    key = scratch.key(scratch.name())
    scratch.put_raw(key, _SMALL)
    return _not_met(scratch, key, IfNoneMatch="*") or _works("what is there is not written over")


def _if_match(scratch: Scratch) -> Outcome:
    key = scratch.key(scratch.name())
    etag = scratch.put_raw(key, _SMALL)["ETag"]
    trouble = _not_met(scratch, key, IfMatch='"00000000000000000000000000000000"')
    if trouble is not None:
        return trouble
    try:
        scratch.put_raw(key, _SMALL, IfMatch=etag)
    except BucketError as error:
        if error.code not in _NOT_MET:
            raise
        return _around("the service takes no ETag for the right one, as Ceph 16; the owner lease is compared first")
    return _works("what has changed is not written over")


def _not_met(scratch: Scratch, key: str, **condition: str) -> Outcome | None:
    """None if the service does not write because of ``condition``, which is not met."""
    try:
        scratch.put_raw(key, _SMALL, **condition)
    except BucketError as error:
        if error.code in _NOT_MET:
            return None
        if not scratch.is_refusal(error):
            raise
        return _around(f"the service answers {error.code}; the owner lease is read back after each write")
    return _around("the service ignores it; the owner lease is read back after each write")


def _lease(scratch: Scratch) -> Outcome:
    bucket = scratch.bucket
    scratch.keys.add(bucket.keys.owner)
    with scratch.needing("s3:GetObject, s3:PutObject and s3:DeleteObject"):
        bucket.write_owner(b"1", None)
        first = bucket.read_owner()
        bucket.write_owner(b"2", first)
        second = bucket.read_owner()
        bucket.delete_owner()
        third = bucket.read_owner()
    if first is None or second is None or third is not None or (first.data, second.data) != (b"1", b"2"):
        return _fails("the owner lease does not come back as it was written, so no garbage would be collected")
    if not -_APART < second.age < _TOO_FAR_APART:
        return _fails(f"the service tells that the owner lease just written is {second.age:.0f} seconds old")
    return _works("the owner lease is written, renewed and given back")


Check = Callable[[Scratch], Outcome]

CHECKS: dict[str, Check] = {
    "checksums": _checksums,
    "clock": _clock,
    "put and get": _put_and_get,
    "metadata": _metadata,
    "absent blobs": _absent,
    "damaged uploads": _damage,
    "encryption": _encryption,
    "ranges": _ranges,
    "multipart": _multipart,
    "unfinished uploads": _unfinished,
    "list": _list,
    "copy": _copy,
    "staging": _staging,
    "delete": _delete,
    "batch delete": _batch_delete,
    "If-None-Match": _if_none_match,
    "If-Match": _if_match,
    "owner lease": _lease,
}
