"""``zodb-s3blobs adopt``: give a prefix of a bucket to this database, after another one had it.

The object owner.json beside the blobs names the database that owns the prefix. Another database, unless it is the
owner's successor, deletes nothing there until this command gives it the prefix. The command shows the owner, the time
when its server last renewed owner.json, and how many of the blobs this database has; then it asks. It deletes nothing,
and for a week afterwards packs only mark dead blobs. The server may run: it takes the prefix within a minute.
"""

import argparse
import json
import sys
import uuid
from contextlib import closing
from datetime import datetime
from typing import Any

from ..bases import adapter_for
from ..bases.adapter import BaseAdapter
from ..database import zeoconf
from ..garbage.scan import scan_beside_a_server
from ..lease import FORMAT, Claim, NotOwner, claim_of, is_alive, why_not
from ..metrics import Metrics
from ..progress import showing
from ..s3.bucket import Bucket
from ..s3.control import ControlObject
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``adopt``."""
    common.add_arguments(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask; with --json nobody is asked")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 if this database owns the prefix afterwards."""
    return common.run("adopt", lambda: _adopt(arguments))


def _adopt(arguments: argparse.Namespace) -> int:
    served = zeoconf.find(arguments.configure, arguments.storage)
    with closing(served.open_read_only()) as storage, closing(served.section.open_bucket(Metrics())) as bucket:
        kind = adapter_for(storage)
        note = bucket.read_owner()
        refusal = why_not(note, kind.existing_identity() or "", kind) if note is not None else None
        if note is None or refusal is None:
            return _say(arguments, bucket, "Nothing to do: the prefix is this database's, or free for it.")
        if Claim.of(note).format > FORMAT:
            raise NotOwner(refusal)
        if is_alive(note):
            raise NotOwner(
                f"the prefix belongs to {Claim.of(note)}, which renewed its claim {note.age:.0f} seconds ago: stop "
                f"that server first, or give this database another s3-prefix"
            )
        found = _look(kind, storage, bucket, note)
        if arguments.json and not arguments.yes:
            sentence = "Nothing was changed: add --yes to adopt the prefix."
            return _say(arguments, bucket, sentence, found, common.EXIT_ERROR)
        if not arguments.json:
            _show(found)
        if not arguments.yes and not _is_meant():
            return _say(arguments, bucket, "Nothing was changed.", status=common.EXIT_ERROR)
        take_prefix(kind, bucket, note, arguments.storage or served.section.name or "1")
    return _say(arguments, bucket, "The prefix belongs to this database now. Packs delete nothing for a week.", found)


def _look(kind: BaseAdapter, storage: Any, bucket: Bucket, note: ControlObject) -> dict[str, Any]:
    claim = Claim.of(note)
    scan = scan_beside_a_server(storage, bucket, 0)
    with showing("Listing the bucket", "objects") as progress:
        for _ in progress.over(scan.run()):
            pass
    counts = {state: scan.found[state].objects for state in ("live", "dead", "newer")}
    return {
        "bucket": bucket.name,
        "prefix": bucket.keys.prefix,
        "owner": str(claim),
        "last_heard": note.written.isoformat(timespec="seconds"),
        "stopped": bool(claim.stopped),
        "has_its_last_transaction": kind.has_transaction(claim.tid),
        "blobs_of_this_database": counts["live"],
        "other_blobs": counts["dead"] + counts["newer"],
    }


def _show(found: dict[str, Any]) -> None:
    heard = datetime.fromisoformat(found["last_heard"])
    print(f"Bucket {found['bucket']}, s3-prefix {found['prefix']!r}")
    print(f"belongs to  {found['owner']}")
    print(f"last heard  {heard:%Y-%m-%d %H:%M:%S} UTC{', when it was stopped' if found['stopped'] else ''}")
    has = "has" if found["has_its_last_transaction"] else "does not have"
    print(f"This database {has} the last transaction of that one.")
    ours, others = found["blobs_of_this_database"], found["other_blobs"]
    print(f"This database has {ours:,} of the blobs, and does not have {others:,}.")
    print("If it adopts the prefix, the next pack marks those as dead, and a pack after a week deletes them.")


def _is_meant() -> bool:
    print("Adopt the prefix? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def take_prefix(kind: BaseAdapter, bucket: Bucket, note: ControlObject, storage: str) -> None:
    """Replace ``note``, the owner.json of ``bucket``, by a claim of the database of ``kind``.

    ``storage``: name of the storage. Waits for S3; raises BucketError, and NotOwner if another server wrote owner.json
    meanwhile.
    """
    now = note.now.isoformat(timespec="seconds")
    data = claim_of(kind, kind.identity(), f"adopt {uuid.uuid4().hex}", storage, now, stopped=now, taken=now)
    bucket.write_owner(data, note)
    written = bucket.read_owner()
    if written is None or written.data != data:
        raise NotOwner(f"another server wrote {bucket.keys.owner} of bucket {bucket.name} meanwhile: run adopt again")


def _say(
    arguments: argparse.Namespace,
    bucket: Bucket,
    sentence: str,
    found: dict[str, Any] | None = None,
    status: int = common.EXIT_OK,
) -> int:
    if arguments.json:
        print(json.dumps({**(found or {"bucket": bucket.name}), "result": sentence}, indent=1))
    else:
        print(sentence)
    return status
