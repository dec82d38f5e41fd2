"""The objects of ``zodb-s3blobs check``: all below a prefix of its own, so that all can be deleted again."""

import contextlib
import copy
import re
import ssl
import threading
import time
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ZODB.utils import p64

from ...config import S3BlobStorageFactory
from ...fallbacks import FallbackBucket
from ...localfile import LocalFile
from ...metrics import Metrics
from ...revision import Revision
from ...s3.bucket import Bucket
from ...s3.download import PART
from ...s3.errors import BlobNotFound, BucketError, TransferCancelled
from ...s3.keys import Keys
from ...s3.links import checked
from ...s3.listing import ListedUpload
from ...s3.objects import READ
from ..common import new_file

#: The codes of a BucketError for a missing permission.
FORBIDDEN = {"AccessDenied", "403"}

#: The age in seconds at which the objects of another check are deleted: that check cannot be under way any more.
FORMER_AGE = 24 * 3600

#: Values of `BucketError.reason` without a proper answer of the service.
_UNANSWERED = {"timeout", "connection", "server", "throttled", "foreign"}
#: Values of `BucketError.reason` after which the object certainly was not stored.
_REFUSED = {"auth", "quota", "archived", "request"}
#: Codes of requests that were not even sent.
_NEVER_SENT = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"}

#: For how many seconds a link is valid: clocks may be that far apart.
_VALIDITY = 900

_GIVE_UP_AFTER = 3
_MOST_PAGES = 100

#: Marker of the next page in the answer to a listing -> the option that requests that page.
_MARKERS = {
    "NextContinuationToken": "ContinuationToken",
    "NextKeyMarker": "KeyMarker",
    "NextUploadIdMarker": "UploadIdMarker",
    "NextVersionIdMarker": "VersionIdMarker",
}


class NotTried(Exception):
    """The check needs a capability that does not work; the message names it."""


@dataclass(frozen=True)
class WrongKey:
    """A key of the section that makes uploads fail; ``instead``: the value with which they work, or ""."""

    error: BucketError
    instead: str = ""


@dataclass
class Leftovers:
    """The objects and uploads that `Scratch.clean_up` could not, or perhaps could not, delete, each with its error."""

    there: dict[str, BucketError] = field(default_factory=dict)
    perhaps: dict[str, BucketError] = field(default_factory=dict)
    #: Reason why old versions of deleted objects stay behind, or "".
    versions: str = ""


@dataclass
class Former:
    """The leftovers of other checks: numbers of deleted and too young ones; those not deleted, each with its error."""

    deleted: int = 0
    young: int = 0
    kept: dict[str, BucketError] = field(default_factory=dict)


def is_answered(error: BucketError) -> bool:
    """Return whether the service gave a proper answer, which may be a refusal."""
    return error.reason not in _UNANSWERED


def is_refusal(error: BucketError) -> bool:
    """Return whether the service rejected the request itself, not the credentials, and is not down."""
    return is_answered(error) and error.code not in FORBIDDEN


class Scratch:
    """A prefix below that of ``section``, with all objects of the check; ``directory``: for local files.

    ``bucket`` sends the server's own requests. The methods wait for S3; they raise BucketError and BlobNotFound, and
    NotTried if `unwritable` or `unreadable` show that they would fail. Belongs to one thread at a time, except
    ``unwanted``, which any thread may set to break off uploads.
    """

    def __init__(self, section: S3BlobStorageFactory, directory: str) -> None:
        #: The common beginning of the roots of all checks.
        self._roots = f"{section.settings.s3_prefix}/check-".lstrip("/")
        #: The settings of the checks.
        self.settings = replace(section.settings, s3_prefix=f"{self._roots}{uuid.uuid4().hex}")
        self.section = section
        self._directory = directory
        self._files = self._blobs = self._silences = 0
        self._buckets: list[Bucket] = []
        self.bucket = self.open()
        #: The second bucket of the section, which is only read; None if the section has none.
        self.fallback = self._open_fallback()
        #: The errors that keep all blobs from being stored, and from being read, if known.
        self.unwritable: BucketError | None = None
        self.unreadable: BucketError | None = None
        #: The keys of the section that `settings` lacks, or has with another value, because uploads fail with them.
        self.wrong: dict[str, WrongKey] = {}
        #: Key of an object that may exist -> whether the service has confirmed that it was stored.
        self._objects: dict[str, bool] = {}
        #: The keys of unfinished uploads by their id.
        self.uploads: dict[str, str] = {}
        self._has_versions = False
        self._has_begun_parts = False
        #: The time by the clock of the service, if it sends one: that of this machine may be wrong.
        self._now = time.time()
        self.unwanted = threading.Event()

    def open(self, **changes: Any) -> Bucket:
        """Open and return the bucket with changed settings. Raises StartRefused."""
        section = copy.copy(self.section)
        section.settings = replace(self.settings, **changes)
        self._buckets.append(section.open_bucket(Metrics()))
        return self._buckets[-1]

    def _open_fallback(self) -> FallbackBucket | None:
        if self.section.fallback_settings is None:
            return None
        with contextlib.closing(self.section.open_bucket(Metrics())) as bucket:
            return self.section.open_fallback_bucket(bucket, Metrics())

    def use(self, **changes: Any) -> None:
        """Change the settings of all further requests."""
        self.bucket = self.open(**changes)
        self.settings = replace(self.settings, **changes)

    def close(self) -> None:
        """Close the connections of all buckets."""
        for bucket in self._buckets:
            bucket.close()
        if self.fallback is not None:
            self.fallback.close()

    # Storing

    @property
    def may_have_stored(self) -> bool:
        """True if the bucket may have an object or upload of this check, or one is on its way."""
        return bool(self._objects or self.uploads or self._has_begun_parts)

    def file(self, data: bytes = b"") -> LocalFile:
        """Return a new file with ``data`` in it."""
        self._files += 1
        return new_file(f"{self._directory}/{self._files}", data)

    def name(self, oid: bytes | None = None, tid: int = 1) -> Revision:
        """Return the name of a new blob, by default with a new oid."""
        self._blobs += oid is None
        return Revision(oid or p64(self._blobs), p64(tid))

    def key(self, name: Revision) -> str:
        """Return the key of the blob ``name``."""
        return self.bucket.keys.key(*name)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Record that a request in the body may store ``key``."""
        if self.unwritable is not None:
            raise NotTried("no blob can be stored")
        was_there = key in self._objects
        self._objects.setdefault(key, False)
        self.check_wanted()
        try:
            yield
        except BucketError as error:
            # An error without a code is our own, about an object that was stored.
            refused = error.code and error.reason in _REFUSED
            if not was_there and (refused or error.code in _NEVER_SENT):
                del self._objects[key]
            raise
        self._objects[key] = True

    def put(self, data: bytes, name: Revision | None = None, bucket: Bucket | None = None) -> Revision:
        """Upload a blob; return its name."""
        name = name or self.name()
        with self.writing(self.key(name)):
            self._has_begun_parts |= len(data) > PART
            (bucket or self.bucket).put(*name, self.file(data).path, self.check_wanted)
        return name

    def put_raw(self, key: str, data: bytes, **options: Any) -> dict[str, Any]:
        """Upload an object; return the answer."""
        options = {"Key": key, "Body": bytearray(data), **self.bucket.write_options, **options}
        with self.writing(key):
            return self.bucket.ask("put_object", **options)

    def begin_upload(self) -> ListedUpload:
        """Begin a multipart upload, and leave it unfinished; return it."""
        if self.unwritable is not None:
            raise NotTried("no blob can be stored")
        key = self.bucket.keys.staged_key(uuid.uuid4().hex)
        self._has_begun_parts = True
        self.check_wanted()
        answer = self.bucket.ask("create_multipart_upload", Key=key, **self.bucket.write_options)
        upload = ListedUpload(key, answer["UploadId"], datetime.now(timezone.utc))
        self.uploads[upload.upload_id] = key
        return upload

    def check_wanted(self, transferred: int = 0) -> None:
        """Raise TransferCancelled once `unwanted` is set; the ``progress`` of an upload."""
        if self.unwanted.is_set():
            raise TransferCancelled()

    # Reading

    def get(self, name: Revision, bucket: Bucket | None = None) -> bytes:
        """Download a blob; return its bytes."""
        if self.unreadable is not None:
            raise NotTried("no blob can be read")
        file = self.file()
        (bucket or self.bucket).get(*name, file)
        with open(file.path, "rb") as opened:
            return opened.read()

    def metadata(self, name: Revision) -> dict[str, str]:
        """Return the metadata of the blob ``name``."""
        return self.read("head_object", name)["Metadata"]

    def read(self, operation: str, name: Revision, **options: Any) -> dict[str, Any]:
        """Return the answer to another ``operation`` that reads the blob ``name``."""
        return self.bucket.ask(operation, Key=self.key(name), **self.bucket.read_options, **options)

    def is_there(self, name: Revision) -> bool:
        """Return whether the bucket has the blob ``name``."""
        try:
            self.read("head_object", name)
        except BlobNotFound:
            return False
        return True

    def follow_link(self, name: Revision, *wanted: Any) -> tuple[str, Message, bytes]:
        """Read the blob ``name`` by a link, as a browser does; return the host, and headers and bytes of the answer.

        ``wanted``: the content type, the file name and the disposition. Raises OSError, and HTTPException, if there is
        no answer, and HTTPError, which is an OSError, if the link is refused.
        """
        if self.unreadable is not None:
            raise NotTried("no blob can be read")
        url = self.bucket.signer().sign(checked(_VALIDITY, *name, *wanted))
        context = ssl.create_default_context()
        if self.settings.s3_ca_file:
            context.load_verify_locations(self.settings.s3_ca_file)
        with urllib.request.urlopen(url, timeout=self.settings.s3_read_timeout, context=context) as answer:
            return urlsplit(url).netloc, answer.headers, answer.read(READ)

    # Deleting

    def clean_up(self) -> Leftovers | None:
        """Delete all objects and uploads of this check; return the leftovers, None if nothing can have been stored."""
        root, left = self.bucket.keys.root, Leftovers()
        if not self.may_have_stored:
            return None
        listed_uploads = self._list("list_multipart_uploads", root, "Uploads") or ()
        uploads = {one["UploadId"]: one["Key"] for one in listed_uploads if "UploadId" in one}
        for upload_id, key in (self.uploads | uploads).items():
            trouble = self._abort(key, upload_id)
            if trouble:
                left.there[f"an unfinished upload to {key}"] = trouble
        listed = {one["Key"]: True for one in self._list("list_objects_v2", root, "Contents") or ()}
        for key, is_there in sorted((self._objects | listed).items()):
            trouble = self._delete(key)
            if trouble:
                (left.there if is_there else left.perhaps)[key] = trouble
        left.versions = self._delete_versions(root)
        still = self._list("list_objects_v2", root, "Contents")
        for one in still or ():
            still_listed = f"{one['Key']} was deleted, and is still listed"
            left.there.setdefault(one["Key"], BucketError(still_listed))
        if still is not None:
            left.perhaps.clear()
        return left

    def clean_up_former(self) -> Former:
        """Delete the objects and uploads of killed checks below the same s3-prefix; return the numbers."""
        former, newest = Former(), defaultdict[str, float](float)
        own = self.bucket.keys.root
        uploads = self._list("list_multipart_uploads", self._roots, "Uploads") or []
        objects = self._list("list_objects_v2", self._roots, "Contents") or []
        versions = self._list_versions(self._roots) if self._has_versions else []
        now = self._now
        items = [(one, self._root_of(one["Key"])) for one in uploads + objects + (versions or [])]
        for one, root in items:
            moment = one.get("LastModified") or one.get("Initiated")
            newest[root] = max(newest[root], moment.timestamp() if moment else now)
        for one, root in items:
            if root in ("", own):
                continue
            if now - newest[root] < FORMER_AGE:
                former.young += 1
                continue
            if "UploadId" in one:
                trouble = self._abort(one["Key"], one["UploadId"])
            else:
                trouble = self._delete(one["Key"], one.get("VersionId"))
            former.deleted += not trouble
            if trouble:
                former.kept[one["Key"]] = trouble
        return former

    def _root_of(self, key: str) -> str:
        """Return the root of the check that has stored ``key``, "" if ``key`` is not a check's."""
        match = re.match(f"{re.escape(self._roots)}[0-9a-f]{{32}}/", key)
        keys = Keys(match[0].rstrip("/")) if match else None
        if keys and (keys.parse(key) or keys.parse_staged(key) or key == keys.owner):
            return keys.root
        return ""

    def _delete(self, key: str, version: str | None = None) -> BucketError | None:
        """Delete an object, or one version of it; return the error, None on success."""
        answer = self._ask("delete_object", Key=key, **({"VersionId": version} if version else {}))
        if isinstance(answer, BucketError):
            return answer
        self._has_versions |= answer.get("VersionId", "null") != "null"
        return None

    def _abort(self, key: str, upload_id: str) -> BucketError | None:
        answer = self._ask("abort_multipart_upload", Key=key, UploadId=upload_id)
        return answer if isinstance(answer, BucketError) else None

    def _delete_versions(self, root: str) -> str:
        """Delete old versions, if the bucket keeps them; return the error, "" on success."""
        if not self._has_versions:
            return ""
        versions = self._list_versions(root)
        if not versions:
            return "they could not be listed"
        troubles = [self._delete(one["Key"], one["VersionId"]) for one in versions]
        return next((str(trouble) for trouble in troubles if trouble is not None), "")

    def _list_versions(self, prefix: str) -> list[dict[str, Any]] | None:
        return self._list("list_object_versions", prefix, "Versions", "DeleteMarkers")

    def _list(self, operation: str, prefix: str, *kinds: str) -> list[dict[str, Any]] | None:
        """Return the entries of a listing below ``prefix``; None if it fails."""
        found: list[dict[str, Any]] = []
        begin: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            answer = self._ask(operation, Prefix=prefix, **begin)
            if isinstance(answer, BucketError):
                return None
            # A service may ignore the prefix.
            found += [one for kind in kinds for one in answer.get(kind, ()) if one.get("Key", "").startswith(prefix)]
            before, begin = begin, {ask: answer[tell] for tell, ask in _MARKERS.items() if answer.get(tell)}
            if not answer.get("IsTruncated") or begin in ({}, before):
                break
        return found

    def _ask(self, operation: str, **options: Any) -> dict[str, Any] | BucketError:
        """Return the answer, or its error; after `_GIVE_UP_AFTER` requests without an answer, send none."""
        if self._silences >= _GIVE_UP_AFTER:
            return BucketError("the bucket does not answer any more")
        try:
            answer = self.bucket.ask(operation, **options)
        except BlobNotFound:
            answer = {}
        except BucketError as error:
            self._silences = 0 if is_answered(error) else self._silences + 1
            return {} if error.code == "NoSuchUpload" else error
        self._silences = 0
        self._now = time.time()
        with contextlib.suppress(KeyError, ValueError, TypeError):
            self._now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        return answer
