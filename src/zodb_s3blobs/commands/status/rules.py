"""The alerts of ``status``: those of grafana/alerts.yml, by the same names, with the same limits and times.

Prometheus evaluates the rules over its history. Here they are evaluated over the looks that there are: with a state
file over those of earlier calls, without one over what has happened since the start of the server. Tests run the unit
tests of grafana/alerts.yml against both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .looks import Look, View

CRITICAL, WARNING = "CRITICAL", "WARNING"

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0

#: Yields a label, or "", and the sentence for each reason to alert.
Condition = Callable[[View], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Rule:
    """An alert, CRITICAL or WARNING; ``lasts``: for how many seconds ``condition`` must have been true.

    ``of_server``: whether it concerns the server and not one storage.
    """

    name: str
    severity: str
    condition: Condition
    lasts: float = 0
    of_server: bool = False
    #: Whether a single look says nothing: what it finds passes within a moment on a healthy server.
    needs_history: bool = False


@dataclass(frozen=True)
class Alert:
    """A reason to act. ``storage``: "" for the server; ``is_pending``: it does not last for long enough yet."""

    name: str
    severity: str
    storage: str
    sentence: str
    label: str = ""
    is_pending: bool = False


def find(looks: Sequence[Look], has_history: bool) -> list[Alert]:
    """Return the alerts at the last of ``looks``, the critical ones first; ``has_history``: whether rules wait."""
    found = []
    for storage in None, *looks[-1].storages():
        for rule in RULES:
            if rule.of_server != (storage is None) or (rule.needs_history and not has_history):
                continue
            for label, sentence in rule.condition(View(looks, storage)):
                pending = has_history and not _has_lasted(rule, looks, storage, label)
                found.append(Alert(rule.name, rule.severity, storage or "", sentence, label, pending))
    # A warning says nothing more where the critical alert of its name fires.
    worse = {(one.name, one.storage, one.label) for one in found if one.severity == CRITICAL and not one.is_pending}
    told = [one for one in found if one.severity == CRITICAL or (one.name, one.storage, one.label) not in worse]
    return sorted(told, key=lambda alert: (alert.is_pending, alert.severity != CRITICAL))


def _has_lasted(rule: Rule, looks: Sequence[Look], storage: str | None, label: str) -> bool:
    if not rule.lasts:
        return True
    for number in range(len(looks) - 1, 0, -1):
        earlier = View(looks[:number], storage)
        if label not in dict(rule.condition(earlier)):
            return False
        if earlier.time <= looks[-1].time - rule.lasts:
            return True
    return False


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _blocked(view: View) -> Iterator[tuple[str, str]]:
    since = view.now("zeo_event_loop_blocked_since_timestamp_seconds")
    if since > 0 and view.time - since > 30:
        yield "", f"the event loop has not answered for {view.time - since:.0f} s: all clients wait"


def _late(view: View) -> Iterator[tuple[str, str]]:
    share = view.increase("zeo_event_loop_lag_seconds_sum", 5 * _MINUTE) / (5 * _MINUTE)
    if share > 0.2:
        yield "", f"the event loop keeps its clients waiting {share:.0%} of the time"


def _events(name: str, label: str, seconds: float, sentence: str) -> Condition:
    """Return the condition that the counter ``name`` has grown in ``seconds``, for each value of ``label``."""

    def condition(view: View) -> Iterator[tuple[str, str]]:
        for value in view.values_of(name, label):
            wanted = {label: value} if label else {}
            number = view.counted(name, seconds, **wanted)
            if number > 0:
                yield value, sentence.format(f"{number:,.0f}", value)

    return condition


def _refused(reason: str, sentence: str) -> Condition:
    """Return the condition that S3 refused calls for ``reason`` in a quarter of an hour, for each operation."""

    def condition(view: View) -> Iterator[tuple[str, str]]:
        name = "s3blobs_s3_operation_failures_total"
        for operation in view.values_of(name, "operation"):
            number = view.counted(name, 15 * _MINUTE, operation=operation, reason=reason)
            if number > 0:
                yield operation, sentence.format(f"{number:,.0f}", operation)

    return condition


def _slow_uploads(view: View) -> Iterator[tuple[str, str]]:
    window = 10 * _MINUTE
    number = view.increase("s3blobs_upload_duration_seconds_count", window)
    if not number:
        return
    seconds = view.increase("s3blobs_upload_duration_seconds_sum", window) / number
    size = view.increase("s3blobs_upload_size_bytes_sum", window) / number
    if seconds > 5 + 2 * size / 2**20:
        yield "", f"one upload takes {seconds:.1f} s on average, for {size / 2**20:.1f} MiB"


def _lock_held(view: View) -> Iterator[tuple[str, str]]:
    since, waiting = view.now("zeo_commit_lock_held_since_timestamp_seconds"), view.now("zeo_commit_lock_waiting")
    if since > 0 and view.time - since > 120 and waiting > 0:
        yield "", f"one transaction has held the commit lock for {view.time - since:.0f} s, and {waiting:.0f} wait"


def _queue(view: View) -> Iterator[tuple[str, str]]:
    waiting = view.now("zeo_commit_lock_waiting")
    if waiting > 0:
        yield "", f"transactions always wait for the commit lock, now {waiting:.0f}"


def _s3_under_lock(view: View) -> Iterator[tuple[str, str]]:
    number = view.increase("s3blobs_commit_lock_waits_total", 10 * _MINUTE, reason="overtaken")
    if number > 5:
        yield "", f"{number:.0f} transactions in 10 minutes waited for S3 with the commit lock"


def _thrashing(view: View) -> Iterator[tuple[str, str]]:
    window = 30 * _MINUTE
    age = view.time - view.now("s3blobs_cache_oldest_access_timestamp_seconds")
    requests = view.increase("s3blobs_cache_requests_total", window)
    share = _share(view.increase("s3blobs_cache_hits_total", window), requests)
    if age < _HOUR and view.increase("s3blobs_cache_evictions_total", window) > 0 and requests > 100 and share < 0.8:
        yield "", f"the cache is too small: blobs leave it {age:.0f} s after their last use, and {share:.0%} are hits"


def _over_limit(view: View) -> Iterator[tuple[str, str]]:
    share = _share(view.now("s3blobs_cache_size_bytes"), view.now("s3blobs_cache_limit_bytes"))
    if share > 1.1:
        yield "", f"the cache has {share:.0%} of cache-size"


def _damaged(view: View) -> Iterator[tuple[str, str]]:
    number = view.increase("s3blobs_cache_damaged_total", 6 * _HOUR)
    if number > 5:
        yield "", f"{number:,.0f} files of the cache in 6 hours were not as the server had written them"


def _disk_nearly_full(view: View) -> Iterator[tuple[str, str]]:
    free, name = view.now("s3blobs_cache_filesystem_free_bytes"), "s3blobs_cache_filesystem_free_bytes"
    limit = min(max(0.05 * view.now("s3blobs_cache_limit_bytes"), 256 * 2**20), 5 * 2**30)
    if view.has(name) and free < limit:
        yield "", f"the disk of cache-dir has {free / 2**20:,.0f} MiB left"


def _disk_full(view: View) -> Iterator[tuple[str, str]]:
    name = "s3blobs_cache_filesystem_free_bytes"
    failures = view.counted("s3blobs_cache_errors_total", 15 * _MINUTE, operation="write")
    if failures > 0:
        yield "", f"{failures:,.0f} writes to cache-dir failed"
    elif view.has(name) and view.now(name) < 64 * 2**20:
        yield "", f"the disk of cache-dir is full: {view.now(name) / 2**20:,.0f} MiB are left"


def _unavailable(view: View) -> Iterator[tuple[str, str]]:
    if view.has("s3blobs_bucket_up") and not view.now("s3blobs_bucket_up"):
        yield "", "the bucket does not answer: commits of blobs fail, and reads of blobs that are not cached"


def _failing(share: float, least: int, window: float) -> Condition:
    """Return the condition that more than ``share`` of the calls, at least ``least``, of an operation fail."""

    def condition(view: View) -> Iterator[tuple[str, str]]:
        name = "s3blobs_s3_operation_failures_total"
        for operation in view.values_of(name, "operation"):
            failed = view.increase(name, window, operation=operation)
            all_calls = view.increase("s3blobs_s3_operations_total", window, operation=operation)
            if failed >= least and _share(failed, all_calls) > share:
                yield operation, f"{_share(failed, all_calls):.0%} of the calls of S3 ({operation}) fail"

    return condition


def _throttled(view: View) -> Iterator[tuple[str, str]]:
    window, name = 10 * _MINUTE, "s3blobs_s3_attempt_failures_total"
    refused = sum(view.increase(name, window, code=code) for code in ("429", "503"))
    share = _share(refused, view.increase("s3blobs_s3_attempts_total", window))
    if refused >= 5 and share > 0.05:
        yield "", f"{share:.0%} of the requests to S3 are answered with 429 or 503"


def _conflict(view: View) -> Iterator[tuple[str, str]]:
    if view.now("s3blobs_bucket_owner_conflict") > 0:
        yield (
            "",
            "the prefix belongs to another database, whose packs delete the blobs of this one",
        )


def _changed(view: View) -> Iterator[tuple[str, str]]:
    changed = view.now("s3blobs_bucket_owner_changed_timestamp_seconds")
    if changed > 0 and view.time - changed < 7 * _DAY:
        yield "", "this database has its prefix from another one for less than a week: packs only mark"


def _stale(view: View) -> Iterator[tuple[str, str]]:
    name = "s3blobs_gc_last_success_timestamp_seconds"
    if not view.has(name) or not view.is_known_since(name, 9 * _DAY):
        return
    if view.time - view.most(name, 10 * _DAY) > 10 * _DAY:
        yield "", "no pack has collected garbage for ten days"


def _deletion_spike(view: View) -> Iterator[tuple[str, str]]:
    window = 2 * _HOUR
    deleted = view.increase("s3blobs_gc_deleted_objects_total", window)
    share = _share(deleted, view.increase("s3blobs_gc_scanned_objects_total", window))
    if deleted > 100 and share > 0.25:
        yield "", f"a pack deletes {share:.0%} of the blobs: unless you know why, stop the server"


#: In the order of grafana/alerts.yml. S3BlobsDown is missing: without an answer there are no figures.
RULES = (
    Rule("S3BlobsEventLoopBlocked", CRITICAL, _blocked, of_server=True),
    Rule("S3BlobsEventLoopBlocked", WARNING, _late, 10 * _MINUTE, of_server=True),
    Rule(
        "S3BlobsVoteFailures",
        WARNING,
        _events("s3blobs_vote_failures_total", "reason", 15 * _MINUTE, "{} commits failed because of blobs ({})"),
    ),
    Rule("S3BlobsUploadSlow", WARNING, _slow_uploads, 15 * _MINUTE),
    Rule("S3BlobsCommitLockHeld", CRITICAL, _lock_held),
    Rule("S3BlobsCommitQueue", WARNING, _queue, 10 * _MINUTE, needs_history=True),
    Rule("S3BlobsS3UnderCommitLock", WARNING, _s3_under_lock, 15 * _MINUTE),
    Rule(
        "S3BlobsCleanupFailures",
        WARNING,
        _events("s3blobs_cleanup_failures_total", "", _HOUR, "{} uploads that nothing needs could not be deleted"),
    ),
    Rule(
        "S3BlobsBlobMissing",
        CRITICAL,
        _events("s3blobs_missing_blobs_total", "", _HOUR, "{} reads of blobs that the bucket does not have"),
    ),
    Rule(
        "S3BlobsFallbackFails",
        WARNING,
        _events("s3blobs_fallback_failures_total", "", 15 * _MINUTE, "{} reads of a fallback failed"),
    ),
    Rule(
        "S3BlobsChecksumFailure",
        CRITICAL,
        _events("s3blobs_download_checksum_failures_total", "", _HOUR, "{} downloads of blobs arrived damaged"),
    ),
    Rule("S3BlobsCacheThrashing", WARNING, _thrashing, 30 * _MINUTE),
    Rule("S3BlobsCacheOverLimit", WARNING, _over_limit, 30 * _MINUTE),
    Rule("S3BlobsCacheDamaged", WARNING, _damaged),
    Rule("S3BlobsCacheDiskFull", WARNING, _disk_nearly_full, 5 * _MINUTE),
    Rule("S3BlobsCacheDiskFull", CRITICAL, _disk_full, 2 * _MINUTE),
    Rule("S3BlobsBucketUnavailable", CRITICAL, _unavailable, 2 * _MINUTE),
    Rule("S3BlobsS3ErrorRate", WARNING, _failing(0.05, 3, 10 * _MINUTE), 15 * _MINUTE),
    Rule("S3BlobsS3ErrorRate", CRITICAL, _failing(0.25, 5, 5 * _MINUTE), 10 * _MINUTE),
    Rule("S3BlobsS3AuthFailures", CRITICAL, _refused("auth", "S3 refused {} calls ({}): credentials or permissions")),
    Rule("S3BlobsBucketFull", CRITICAL, _refused("quota", "the bucket is full: {} calls ({}) were refused")),
    Rule("S3BlobsBlobArchived", CRITICAL, _refused("archived", "blobs are archived: {} calls ({}) were refused")),
    Rule("S3BlobsS3Throttled", WARNING, _throttled, 15 * _MINUTE),
    Rule("S3BlobsOwnerConflict", CRITICAL, _conflict, 20 * _MINUTE),
    Rule("S3BlobsOwnerChanged", WARNING, _changed),
    Rule("S3BlobsGCStale", WARNING, _stale, _HOUR),
    Rule(
        "S3BlobsGCFailing",
        WARNING,
        _events("s3blobs_gc_failures_total", "", 6 * _HOUR, "{} garbage collections ended with an error"),
    ),
    Rule("S3BlobsGCDeletionSpike", CRITICAL, _deletion_spike),
)
