"""Links: URLs with a signature, by which a web browser reads one blob from the service itself, without credentials.

A `Link` is what was asked for, checked; a `Signer` makes the URL of it. Signing sends no request.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ..errors import S3BlobsError
from .client import Connection
from .errors import ask
from .keys import Keys

#: The most seconds for which S3 accepts a signature of version 4.
LONGEST = 7 * 86400

_DISPOSITIONS = (None, "inline", "attachment")
_MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+( ?;[\x20-\x7e]*)?", re.ASCII)
_LONGEST_MEDIA_TYPE = 200

#: The most bytes of a file name in UTF-8. File systems take 255, and browsers append numbers.
_LONGEST_NAME = 200
#: The most characters of the end of a file name that is an extension.
_LONGEST_EXTENSION = 20

#: What no file name may contain: separators of paths; control characters; characters that change the direction in
#: which the name is shown, so that its extension appears to be another one; and what UTF-8 cannot encode.
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: What no quoted ASCII name may contain besides: its own end, and what some browsers decode.
_UNSAFE_QUOTED = re.compile(r'["%/\\\x00-\x1f\x7f]')
#: What RFC 8187 leaves as it is, besides letters and digits.
_ATTR_CHARS = "!#$&+-.^_`|~"


class LinkRefused(S3BlobsError):
    """No link can have what was asked for; the message names the argument, and not its value."""


@dataclass(frozen=True)
class Link:
    """A link to blob (oid, tid), valid for ``seconds``; ``headers``: those of the answer, as boto3 names them."""

    oid: bytes
    tid: bytes
    seconds: int
    headers: dict[str, str]


def checked(
    longest: int,
    oid: Any,
    tid: Any,
    content_type: Any = None,
    filename: Any = None,
    disposition: Any = None,
    seconds: Any = None,
) -> Link:
    """Return the `Link` of arguments that may come from anywhere. Raises LinkRefused.

    ``filename`` may be any text: what is unsafe in it is replaced. ``seconds``: above 0 and at most ``longest``, by
    default ``longest``.
    """
    if not all(type(number) is bytes and len(number) == 8 for number in (oid, tid)):
        raise LinkRefused("The oid and the serial of a link are 8 bytes each")
    if content_type is not None and not _is_media_type(content_type):
        raise LinkRefused("The content_type of a link must be a media type, such as image/png, in ASCII")
    if filename is not None and not isinstance(filename, str):
        raise LinkRefused("The filename of a link must be a text")
    if disposition not in _DISPOSITIONS:
        raise LinkRefused('The disposition of a link must be "inline" or "attachment"')
    if seconds is None:
        seconds = longest
    # A comparison with nan is always false.
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds <= longest:
        raise LinkRefused(f"The seconds of a link must be a number above 0, at most {longest}: see presigned-urls")
    headers = {
        "ResponseContentType": content_type,
        "ResponseContentDisposition": content_disposition(disposition, filename),
    }
    return Link(oid, tid, math.ceil(seconds), {name: value for name, value in headers.items() if value})


def _is_media_type(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_MEDIA_TYPE and bool(_MEDIA_TYPE.fullmatch(value))


def content_disposition(disposition: str | None, filename: str | None) -> str | None:
    """Return the value of the header Content-Disposition (RFC 6266), in ASCII; None if there is nothing to say.

    A file name without a disposition is that of an attachment, even if no name is left of it.
    """
    if filename is None:
        return disposition
    disposition = disposition or "attachment"
    name = _safe(filename)
    if not name:
        return disposition
    plain = _ascii(name)
    value = f'{disposition}; filename="{plain}"'
    return value if plain == name else f"{value}; filename*=UTF-8''{quote(name, safe=_ATTR_CHARS)}"


def _safe(filename: str) -> str:
    """Return ``filename`` without what is unsafe, shortened, with its extension; "" if no name is left."""
    if len(filename) > 2 * _LONGEST_NAME:
        filename = filename[:_LONGEST_NAME] + filename[-_LONGEST_NAME:]
    name = _UNSAFE.sub("_", filename).strip()
    if not name.strip("."):
        return ""
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > _LONGEST_EXTENSION:
        stem, dot, extension = name, "", ""
    room = _LONGEST_NAME - len(f"{dot}{extension}".encode())
    return f"{stem.encode()[:room].decode(errors='ignore')}{dot}{extension}"


def _ascii(name: str) -> str:
    """Return ``name`` for browsers that read only ASCII: without accents, and with _ for all that ASCII lacks."""
    decomposed = unicodedata.normalize("NFKD", name)
    plain = "".join("_" if not one.isascii() else one for one in decomposed if not unicodedata.combining(one))
    return _UNSAFE_QUOTED.sub("_", plain)  # afterwards: some characters are decomposed into these


class Signer:
    """The signer of links to the blobs of bucket ``name``. The constructor sends no request. Any thread may call."""

    def __init__(self, name: str, keys: Keys, connection: Connection) -> None:
        self._name = name
        self._keys = keys
        self._client = connection.new_signer()

    def sign(self, link: Link) -> str:
        """Return the URL of ``link``; the bucket need not have the blob.

        Sends no request to S3, but may wait for credentials, which boto3 renews before they expire. Raises BucketError.
        """
        key = self._keys.key(link.oid, link.tid)
        parameters = {"Bucket": self._name, "Key": key, **link.headers}
        return ask(
            f"sign a link to {key} of bucket {self._name}",
            lambda: self._client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=link.seconds),
        )
