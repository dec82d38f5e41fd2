"""The Prometheus instruments of one storage.

The other modules count on them, with or without an exporter, in any thread. Names, labels and units are a promise to
the users of dashboards and alerts: grafana/README.md lists them all.
"""

import itertools
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import Collector

#: The upper bounds of the histograms: in seconds, and in bytes from 4 KiB to 1 GiB.
LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = tuple(4096 * 4**power for power in range(10))

# The values of labels that are known in advance: their series are 0 from the start, so that the first failure is an
# increase. Prometheus does not see the step from no series to 1 as one.
S3_OPERATIONS = (
    "put", "get", "head", "copy", "list", "delete",
    "create_multipart", "put_part", "copy_part", "complete_multipart", "abort_multipart",
)  # fmt: skip
S3_FAILURES = (
    "auth", "quota", "archived", "throttled", "timeout", "connection", "server", "foreign", "request", "damaged",
)  # fmt: skip
S3_CODES = ("403", "429", "500", "503", "timeout", "connection", "damaged")
CACHE_OPERATIONS = ("read", "write", "delete")
LOAD_RESULTS = ("hit", "miss", "error")
COMMIT_LOCK_WAITS = ("undo", "overtaken", "restore", "base")
VOTE_FAILURES = ("bucket", "missing", "timeout", "cache", "client")
GC_STATES = ("live", "dead", "retained", "newer", "unknown")


class Metrics:
    """The instruments of one storage. None of them has the label ``storage``: the exporter adds it."""

    def __init__(self) -> None:
        #: All instruments, in the order of the reference.
        self.instruments: list[Collector] = []

        self._make_storage()
        self._make_cache()
        self._make_s3()
        self._make_transfers()
        self._make_commits()
        self._make_garbage()

    def for_second_bucket(self) -> "Metrics":
        """Return the instruments of a second bucket: the downloads of its blobs count here, its requests do not."""
        other = Metrics()
        other.download_duration, other.download_size = self.download_duration, self.download_size
        other.download_checksum_failures = self.download_checksum_failures
        other.download_unproven = self.download_unproven
        return other

    def count_vote(self, seconds: float | None, failure: str | None = None) -> None:
        """Count the vote of a transaction with blobs; ``failure`` is one of `VOTE_FAILURES`, None for a success.

        ``seconds``: how long it took, None if it was refused at once.
        """
        self.transactions_voted.inc()
        if seconds is not None:
            self.vote_duration.observe(seconds)
        if failure is not None:
            self.vote_failures.labels(failure).inc()

    def _make_storage(self) -> None:
        """Make the instruments of the storage and its bucket."""
        self.storage_info = self._gauge(
            "s3blobs_storage_info", "What the storage is set to; always 1.", bucket=(), prefix=(), endpoint=()
        )
        self.bucket_up = self._gauge(
            "s3blobs_bucket_up", "1 if the last request to the bucket, or the last probe, was answered."
        )

    def _make_cache(self) -> None:
        """Make the instruments of the cache."""
        self.cache_requests = self._counter("s3blobs_cache_requests_total", "Blobs that were asked for.")
        self.cache_hits = self._counter("s3blobs_cache_hits_total", "Blobs that were served from the cache.")
        self.cache_requested_bytes = self._counter(
            "s3blobs_cache_requested_bytes_total", "Bytes of the blobs that were asked for and served."
        )
        self.cache_hit_bytes = self._counter(
            "s3blobs_cache_hit_bytes_total", "Bytes of the blobs that were served from the cache."
        )
        self.cache_evictions = self._counter(
            "s3blobs_cache_evictions_total", "Blobs that left the cache to make room for others."
        )
        self.cache_evicted_bytes = self._counter(
            "s3blobs_cache_evicted_bytes_total", "Bytes of the blobs that left the cache to make room for others."
        )
        self.cache_size = self._gauge(
            "s3blobs_cache_size_bytes", "Bytes of disk that all blobs in the cache take, in whole blocks."
        )
        self.cache_limit = self._gauge("s3blobs_cache_limit_bytes", "The setting cache-size.")
        self.cache_files = self._gauge("s3blobs_cache_files", "Blobs in the cache.")
        self.cache_pinned = self._gauge(
            "s3blobs_cache_pinned_bytes",
            "Bytes of disk of the blobs in the cache that are being read and cannot be evicted.",
        )
        self.cache_oldest_access = self._gauge(
            "s3blobs_cache_oldest_access_timestamp_seconds",
            "When the blob that is next to be evicted was last used; 0 if there is none. Young means thrashing.",
        )
        self.cache_free = self._gauge(
            "s3blobs_cache_filesystem_free_bytes", "What the file system of cache-dir has left."
        )
        self.cache_errors = self._counter(
            "s3blobs_cache_errors_total", "Files of the cache that could not be used.", operation=CACHE_OPERATIONS
        )

        self.cache_damaged = self._counter(
            "s3blobs_cache_damaged_total",
            "Files of the cache that were not as they were written, and were fetched again.",
        )

    def _make_s3(self) -> None:
        """Make the instruments of calls of S3."""
        self.s3_operations = self._counter(
            "s3blobs_s3_operations_total",
            "Calls of S3 that have ended, each with all its attempts.",
            operation=S3_OPERATIONS,
        )
        self.s3_operation_failures = self._counter(
            "s3blobs_s3_operation_failures_total",
            "Calls of S3 that failed in the end. That an object is not there is no failure.",
            operation=S3_OPERATIONS,
            reason=S3_FAILURES,
        )
        self.s3_operation_duration = self._histogram(
            "s3blobs_s3_operation_duration_seconds",
            "How long a call of S3 took, with its retries and its body.",
            LATENCIES,
            operation=S3_OPERATIONS,
        )
        self.s3_attempts = self._counter("s3blobs_s3_attempts_total", "HTTP requests to S3.", operation=S3_OPERATIONS)
        self.s3_attempt_failures = self._counter(
            "s3blobs_s3_attempt_failures_total",
            "HTTP requests to S3 that failed, by HTTP status; or timeout, connection, damaged.",
            operation=S3_OPERATIONS,
            code=S3_CODES,
        )
        self.s3_sent_bytes = self._counter(
            "s3blobs_s3_sent_bytes_total", "Bytes of the bodies of all HTTP requests to S3."
        )
        self.s3_received_bytes = self._counter(
            "s3blobs_s3_received_bytes_total", "Bytes of the bodies of all answers of S3."
        )
        self.s3_inflight = self._gauge(
            "s3blobs_s3_inflight_operations", "Calls of S3 that are under way.", operation=S3_OPERATIONS
        )

    def _make_transfers(self) -> None:
        """Make the instruments of uploads, downloads and reads."""
        self.upload_duration = self._histogram(
            "s3blobs_upload_duration_seconds", "How long the upload of one blob took.", LATENCIES
        )
        self.upload_size = self._histogram("s3blobs_upload_size_bytes", "The sizes of the blobs uploaded.", SIZES)
        self.upload_last_success = self._gauge(
            "s3blobs_upload_last_success_timestamp_seconds", "When the last upload succeeded; 0 before the first."
        )
        self.download_duration = self._histogram(
            "s3blobs_download_duration_seconds", "How long the download of one blob took, verified.", LATENCIES
        )
        self.download_size = self._histogram("s3blobs_download_size_bytes", "The sizes of the blobs downloaded.", SIZES)
        self.download_waits = self._counter("s3blobs_download_waits_total", "Readers that joined a download under way.")
        self.download_checksum_failures = self._counter(
            "s3blobs_download_checksum_failures_total", "Downloads that did not have the blob's size and checksum."
        )
        self.download_unproven = self._counter(
            "s3blobs_download_unproven_total",
            "Downloads of objects without SHA-256, which were compared by their size, or by the ETag of the service.",
        )
        self.load_duration = self._histogram(
            "s3blobs_load_duration_seconds", "How long a reader waited for a blob.", LATENCIES, result=LOAD_RESULTS
        )
        self.missing_blobs = self._counter(
            "s3blobs_missing_blobs_total",
            "Blobs that a record names, that were asked for, and that the bucket does not have.",
        )
        self.fallback_reads = self._counter(
            "s3blobs_fallback_reads_total",
            "Blobs that came from fallback-blob-dir or fallbackbucket, because the bucket did not give them.",
        )
        self.fallback_failures = self._counter(
            "s3blobs_fallback_failures_total", "Reads of fallback-blob-dir or fallbackbucket that failed."
        )

        self.presigned_url_requests = self._counter(
            "s3blobs_presigned_url_requests_total", "Links to blobs that were asked for."
        )
        self.presigned_urls = self._counter(
            "s3blobs_presigned_urls_total", "Links to blobs that were given: signed, and not None."
        )

    def _make_commits(self) -> None:
        """Make the instruments of commits."""
        self.vote_duration = self._histogram(
            "s3blobs_vote_duration_seconds",
            "How long votes with blobs took, from vote to reply.",
            LATENCIES,
        )
        self.transactions_voted = self._counter(
            "s3blobs_transactions_voted_total", "Votes of transactions with blobs, successful or not."
        )
        self.vote_failures = self._counter(
            "s3blobs_vote_failures_total", "Votes that failed because of the blobs.", reason=VOTE_FAILURES
        )
        self.transactions_finished = self._counter(
            "s3blobs_transactions_finished_total", "Transactions with blobs that were committed."
        )
        self.transactions_aborted = self._counter(
            "s3blobs_transactions_aborted_total",
            "Transactions with blobs that were aborted, after a vote that failed or otherwise.",
        )
        self.reservations = self._counter(
            "s3blobs_reservations_total",
            "Tids that were reserved for transactions with blobs before they asked for the commit lock.",
        )
        self.reservations_overtaken = self._counter(
            "s3blobs_reservations_overtaken_total",
            "Reserved tids that were lost because other transactions did not wait.",
        )
        self.commit_lock_held = self._histogram(
            "s3blobs_commit_lock_held_duration_seconds",
            "How long transactions, with or without blobs, held the commit lock of the ZEO server.",
            LATENCIES,
        )
        self.commit_lock_waits = self._counter(
            "s3blobs_commit_lock_waits_total",
            "Transactions that waited for S3 while they held the commit lock, by reason.",
            reason=COMMIT_LOCK_WAITS,
        )
        self.uploads_reused = self._counter(
            "s3blobs_uploads_reused_total",
            "Blobs that a retry after a conflict copied inside the bucket instead of sending them again.",
        )
        self.uploads_reused_bytes = self._counter(
            "s3blobs_uploads_reused_bytes_total",
            "Bytes of the blobs that a retry after a conflict copied inside the bucket.",
        )
        self.cleanup_failures = self._counter(
            "s3blobs_cleanup_failures_total",
            "Uploads that nobody needs and that could not be deleted, as after an abort; a pack deletes them.",
        )
        self.staged_blobs = self._gauge("s3blobs_staged_blobs", "Blobs that have arrived and are not yet committed.")
        self.staged_bytes = self._gauge(
            "s3blobs_staged_bytes", "Bytes of the blobs that have arrived and are not yet committed."
        )

    def _make_garbage(self) -> None:
        """Make the instruments of garbage collection and the owner of the prefix."""
        self.gc_runs = self._counter("s3blobs_gc_runs_total", "Garbage collections that were begun.")
        self.gc_failures = self._counter("s3blobs_gc_failures_total", "Garbage collections that ended with an error.")
        self.gc_running = self._gauge("s3blobs_gc_running", "1 while garbage is being collected.")
        self.gc_last_duration = self._gauge(
            "s3blobs_gc_last_duration_seconds", "How long the last successful garbage collection took; 0 before it."
        )
        self.gc_last_success = self._gauge(
            "s3blobs_gc_last_success_timestamp_seconds",
            "When the last successful garbage collection ended; 0 before it.",
        )
        self.gc_scanned = self._counter("s3blobs_gc_scanned_objects_total", "Objects that were listed and judged.")
        self.gc_deleted = self._counter("s3blobs_gc_deleted_objects_total", "Dead blobs that were deleted.")
        self.gc_deleted_bytes = self._counter(
            "s3blobs_gc_deleted_bytes_total", "Bytes of the dead blobs that were deleted."
        )
        self.gc_delete_failures = self._counter(
            "s3blobs_gc_delete_failures_total", "Dead blobs that could not be deleted; the next pack tries again."
        )
        self.gc_objects = self._gauge(
            "s3blobs_gc_objects", "What the last garbage collection found: objects.", state=GC_STATES
        )
        self.gc_bytes = self._gauge(
            "s3blobs_gc_bytes", "What the last garbage collection found: bytes.", state=GC_STATES
        )
        self.bucket_owner_conflict = self._gauge(
            "s3blobs_bucket_owner_conflict", "1 while the prefix belongs to another database, and nothing is deleted."
        )
        self.bucket_owner_changed = self._gauge(
            "s3blobs_bucket_owner_changed_timestamp_seconds",
            "When this database took the prefix over from another one; 0 if it did not.",
        )

    def _counter(self, name: str, documentation: str, **labels: tuple[str, ...]) -> Counter:
        return self._add(Counter(name, documentation, labels, registry=None), labels)

    def _gauge(self, name: str, documentation: str, **labels: tuple[str, ...]) -> Gauge:
        return self._add(Gauge(name, documentation, labels, registry=None), labels)

    def _histogram(
        self, name: str, documentation: str, buckets: tuple[float, ...], **labels: tuple[str, ...]
    ) -> Histogram:
        return self._add(Histogram(name, documentation, labels, buckets=buckets, registry=None), labels)

    def _add(self, instrument: Any, labels: dict[str, tuple[str, ...]]) -> Any:
        for values in itertools.product(*labels.values()) if labels else ():
            instrument.labels(*values)
        self.instruments.append(instrument)
        return instrument
