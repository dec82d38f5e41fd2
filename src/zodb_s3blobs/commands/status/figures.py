"""The figures of one storage that ``status`` shows: as a dictionary for JSON, and as lines for people."""

import time
from collections.abc import Iterator
from typing import Any

from ...metrics import COMMIT_LOCK_WAITS, GC_STATES
from .looks import View

_WIDTH = 18


def collect(view: View, storage: str) -> dict[str, Any]:
    """Return the figures of ``storage`` at the last look of ``view``; counters count since its first look.

    Times are in seconds, moments in seconds since 1970, sizes in bytes; None is a figure that does not exist yet.
    """
    requests = view.counted("s3blobs_cache_requests_total")
    hits = view.counted("s3blobs_cache_hits_total")
    return {
        "storage": storage,
        "bucket": {
            "name": view.label("s3blobs_storage_info", "bucket"),
            "prefix": view.label("s3blobs_storage_info", "prefix"),
            "endpoint": view.label("s3blobs_storage_info", "endpoint"),
            "up": bool(view.now("s3blobs_bucket_up")),
            "trouble": view.last.troubles.get(storage),
        },
        "owner": {
            "conflict": bool(view.now("s3blobs_bucket_owner_conflict")),
            "changed": view.now("s3blobs_bucket_owner_changed_timestamp_seconds") or None,
        },
        "clients": int(view.now("zeo_connections")),
        "reads": {
            "requests": int(requests),
            "hits": int(hits),
            "hit_ratio": hits / requests if requests else None,
            "missing": int(view.counted("s3blobs_missing_blobs_total")),
            "damaged": int(view.counted("s3blobs_download_checksum_failures_total")),
            "from_fallback": int(view.counted("s3blobs_fallback_reads_total")),
        },
        "cache": {
            "files": int(view.now("s3blobs_cache_files")),
            "bytes": int(view.now("s3blobs_cache_size_bytes")),
            "limit_bytes": int(view.now("s3blobs_cache_limit_bytes")),
            "pinned_bytes": int(view.now("s3blobs_cache_pinned_bytes")),
            "free_disk_bytes": int(view.now("s3blobs_cache_filesystem_free_bytes")),
        },
        "commits": {
            "voted": int(view.counted("s3blobs_transactions_voted_total")),
            "failed": _by(view, "s3blobs_vote_failures_total", "reason"),
            "vote_p50": view.quantile(0.5, "s3blobs_vote_duration_seconds"),
            "vote_p99": view.quantile(0.99, "s3blobs_vote_duration_seconds"),
        },
        "commit_lock": {
            "held_since": view.now("zeo_commit_lock_held_since_timestamp_seconds") or None,
            "waiting": int(view.now("zeo_commit_lock_waiting")),
            "held_p50": view.quantile(0.5, "s3blobs_commit_lock_held_duration_seconds"),
            "held_p99": view.quantile(0.99, "s3blobs_commit_lock_held_duration_seconds"),
            "s3_waits": {
                reason: int(view.counted("s3blobs_commit_lock_waits_total", reason=reason))
                for reason in COMMIT_LOCK_WAITS
            },
        },
        "uploads": {
            "staged_blobs": int(view.now("s3blobs_staged_blobs")),
            "staged_bytes": int(view.now("s3blobs_staged_bytes")),
        },
        "s3": {
            "operations": int(view.counted("s3blobs_s3_operations_total")),
            "under_way": int(view.now("s3blobs_s3_inflight_operations")),
            "failures": _by(view, "s3blobs_s3_operation_failures_total", "reason"),
            "sent_bytes": int(view.counted("s3blobs_s3_sent_bytes_total")),
            "received_bytes": int(view.counted("s3blobs_s3_received_bytes_total")),
        },
        "gc": {
            "running": bool(view.now("s3blobs_gc_running")),
            "last_success": view.now("s3blobs_gc_last_success_timestamp_seconds") or None,
            "last_duration": view.now("s3blobs_gc_last_duration_seconds") or None,
            "failures": int(view.counted("s3blobs_gc_failures_total")),
            "objects": {state: int(view.now("s3blobs_gc_objects", state=state)) for state in GC_STATES},
            "bytes": {state: int(view.now("s3blobs_gc_bytes", state=state)) for state in GC_STATES},
        },
    }


def _by(view: View, name: str, label: str) -> dict[str, int]:
    """Return the counter ``name`` by the values of ``label``, without zeros."""
    counts = {value: int(view.counted(name, **{label: value})) for value in view.values_of(name, label)}
    return {value: count for value, count in counts.items() if count}


def summary(found: dict[str, Any]) -> str:
    """Return the figures ``found`` by `collect` in half a line."""
    ratio = found["reads"]["hit_ratio"]
    hits = "no reads" if ratio is None else f"{ratio:.0%} hits"
    bucket, staged = found["bucket"], found["uploads"]["staged_blobs"]
    answers = "answers" if bucket["up"] else "does not answer"
    return f"storage {found['storage']}: bucket {bucket['name']} {answers}, {hits}, {staged} blobs on their way"


def lines(found: dict[str, Any], now: float) -> Iterator[str]:
    """Yield the figures ``found`` by `collect` at the time ``now``, a line for each topic."""
    bucket, owner, reads, cache = found["bucket"], found["owner"], found["reads"], found["cache"]
    commits, lock, s3, gc = found["commits"], found["commit_lock"], found["s3"], found["gc"]
    prefix = f"prefix {bucket['prefix']}" if bucket["prefix"] else "no prefix"
    yield f"storage {found['storage']}: bucket {bucket['name']}, {prefix}, at {bucket['endpoint']}"
    yield _line("bucket", "answers" if bucket["up"] else f"unavailable: {bucket['trouble'] or 'it does not answer'}")
    yield _line("owner", _owner(owner))
    yield _line("clients", f"{found['clients']:,}")
    yield _line(
        "reads",
        f"{reads['requests']:,}",
        "" if reads["hit_ratio"] is None else f"{reads['hit_ratio']:.1%} from the cache",
        f"{reads['missing']:,} missing",
        f"{reads['damaged']:,} damaged",
        f"{reads['from_fallback']:,} from a fallback" if reads["from_fallback"] else "",
    )
    yield _line(
        "cache",
        f"{cache['files']:,} blobs",
        f"{_size(cache['bytes'])} of {_size(cache['limit_bytes'])}",
        f"{_size(cache['free_disk_bytes'])} of the disk free",
    )
    yield _line(
        "commits of blobs",
        f"{commits['voted']:,}",
        f"{sum(commits['failed'].values()):,} failed{_reasons(commits['failed'])}",
        _quantiles("vote", commits["vote_p50"], commits["vote_p99"]),
    )
    held = "free" if lock["held_since"] is None else f"held for {_span(now - lock['held_since'])}"
    yield _line(
        "commit lock", held, f"{lock['waiting']:,} wait", _quantiles("held", lock["held_p50"], lock["held_p99"])
    )
    yield _line("S3 with the lock", *(f"{number:,} {reason}" for reason, number in lock["s3_waits"].items()))
    uploads = found["uploads"]
    yield _line("on their way", f"{uploads['staged_blobs']:,} blobs", _size(uploads["staged_bytes"]))
    yield _line(
        "S3",
        f"{s3['operations']:,} calls",
        f"{sum(s3['failures'].values()):,} failed{_reasons(s3['failures'])}",
        f"{s3['under_way']:,} under way",
        f"{_size(s3['sent_bytes'])} sent",
        f"{_size(s3['received_bytes'])} received",
    )
    yield _line("last pack", *_collection(gc, now))


def _line(name: str, *parts: str) -> str:
    return f"  {name:<{_WIDTH}} {', '.join(part for part in parts if part)}"


def _owner(owner: dict[str, Any]) -> str:
    if owner["conflict"]:
        return "another database: this server deletes nothing (see its log)"
    changed = owner["changed"]
    return "this database" if changed is None else f"this database, which took the prefix over on {moment(changed)}"


def _collection(gc: dict[str, Any], now: float) -> Iterator[str]:
    if gc["running"]:
        yield "one is collecting garbage now"
    if gc["failures"]:
        yield f"{gc['failures']:,} failed"
    if gc["last_success"] is None:
        yield "none since the start of the server"
        return
    yield f"{_span(now - gc['last_success'])} ago"
    yield f"{_span(gc['last_duration'] or 0)} long"
    states = [state for state, number in gc["objects"].items() if number or state in ("live", "dead")]
    yield "found " + ", ".join(f"{gc['objects'][state]:,} {state} ({_size(gc['bytes'][state])})" for state in states)


def _reasons(counts: dict[str, int]) -> str:
    return f" ({', '.join(f'{number:,} {reason}' for reason, number in counts.items())})" if counts else ""


def _quantiles(what: str, middle: float | None, high: float | None) -> str:
    return "" if middle is None or high is None else f"{what} p50 {_span(middle)}, p99 {_span(high)}"


def _size(number: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"


def _span(seconds: float) -> str:
    """Return ``seconds`` in words, such as "12 ms", "40 s" or "3.5 d"."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    for unit, size in {"d": 86400, "h": 3600, "min": 60}.items():
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def moment(when: float) -> str:
    """Return a moment, in seconds since 1970, as a date and a time."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))
