"""Writes zodb-s3blobs.json, the Grafana dashboard, beside itself: ``python grafana/dashboard.py``.

Change the dashboard here, never in the JSON: a test holds the two identical. "What the operator sees" below is the
table of rows, lines and panels; the panels of one line share its width.
"""

import json
import string
from pathlib import Path

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# --- PromQL -----------------------------------------------------------------------------------------------------------

#: What the servers themselves export has no storage label.
WITHOUT_STORAGE = ("up", "process_", "zeo_event_loop_", "s3blobs_build_info")
#: What a number is told apart by: storages, servers, or nothing. Panels of three kinds of numbers or more do not tell
#: storages apart: Grafana gives a legend three lines at most.
EACH = "instance, storage"
SERVER = "instance"
ALL = ""


def series(name, **labels):
    """A selector: the metric ``name``, for what is chosen at the top of the dashboard."""
    chosen = ["job", "instance"] if name.startswith(WITHOUT_STORAGE) else ["job", "instance", "storage"]
    matchers = [f'{label}=~"${label}"' for label in chosen] + [f'{label}="{value}"' for label, value in labels.items()]
    return f"{name}{{{', '.join(matchers)}}}"


def total(expr, by):
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


def gauge(name, by=EACH, **labels):
    return total(series(name, **labels), by)


def rate(name, by=EACH, **labels):
    """How much a counter grows in a second."""
    return total(f"rate({series(name, **labels)}[$__rate_interval])", by)


def increase(name, by=EACH, **labels):
    """How much a counter grows in one interval of the graph: what is rare reads better so than as a rate."""
    grown = total(f"increase({series(name, **labels)}[$__rate_interval])", by)
    return f"round({grown})"  # Prometheus extrapolates to what is between the scrapes


def share(part, whole, match=""):
    """``part`` of ``whole``, two rates; 0 while there is nothing to divide by, on an idle server.

    At most 1, even where the scrapes see the part before the whole that it belongs to.
    """
    return f"clamp_max({part} / {match}clamp_min({whole}, 1e-9), 1)"


def share_of_hits(hits, requests):
    """As ``share()``, the other way round: 1 while nobody asks."""
    return f"clamp_max(1 - ({requests} - {hits}) / clamp_min({requests}, 1e-9), 1)"


def quantile(q, name, by=EACH, **labels):
    return f"histogram_quantile({q}, {rate(name + '_bucket', f'{by}, le' if by else 'le', **labels)})"


def age(name):
    """Seconds since a timestamp, nothing while it is 0: it has not happened yet."""
    return f"max by ({EACH}) (time() - ({series(name)} > 0))"


def long_age(name):
    """As ``age()``, of what a restart forgets and Prometheus does not. It reads a lot: not for graphs."""
    return f"max by ({EACH}) (time() - (max_over_time({series(name)}[15d]) > 0))"


def lasting(name, by=EACH):
    """For how many seconds something had lasted when it was scraped, 0 if it had not begun.

    ``time()`` instead of ``timestamp()`` would let a moment that the scrape happened to see grow until the next one.
    """
    return f"max by ({by}) (clamp_min(timestamp({series(name)}) - {series(name)}, 0) * ({series(name)} > bool 0))"


def ours(expr):
    """Only the servers with a chosen storage: other jobs export process metrics, too, and "All" means all jobs."""
    return f"{expr} and on (job, instance) {series('s3blobs_storage_info')}"


# A server that is down exports nothing; that it is one of ours is known from the last week.
KNOWN = f"last_over_time({series('s3blobs_storage_info')}[7d])"
SERVERS_UP = f"({series('up')} and on (job, instance) {KNOWN})"
STORAGES_UP = f"max by ({EACH}) ({KNOWN} * on (job, instance) group_left () {series('up')})"

HIT_RATIO = share_of_hits(rate("s3blobs_cache_hits_total"), rate("s3blobs_cache_requests_total"))
HIT_BYTES_RATIO = share_of_hits(rate("s3blobs_cache_hit_bytes_total"), rate("s3blobs_cache_requested_bytes_total"))
# Nothing instead of NaN while there are none.
P99_VOTE = f"{quantile(0.99, 's3blobs_vote_duration_seconds')} >= 0"
P99_COLD_READ = f"{quantile(0.99, 's3blobs_load_duration_seconds', result='miss')} >= 0"
S3_FAILURES = share(rate("s3blobs_s3_operation_failures_total"), rate("s3blobs_s3_operations_total"))
S3_FAILURES_BY_REASON = share(
    rate("s3blobs_s3_operation_failures_total", "reason"),
    rate("s3blobs_s3_operations_total", ALL),
    "on () group_left () ",
)
RETRIES = share(rate("s3blobs_s3_attempt_failures_total", "operation"), rate("s3blobs_s3_attempts_total", "operation"))
MISSING_OR_DAMAGED = " + ".join(
    increase(f"s3blobs_{name}_total", ALL) for name in ("missing_blobs", "download_checksum_failures")
)
RUNNING_FOR = (  # with what is told of the storage and of its server as labels
    f"{series('s3blobs_storage_info')} * on (job, instance) group_left (version, zeo, zodb, boto3, python) "
    f"{series('s3blobs_build_info')} * on (job, instance) group_left () "
    f"(time() - {series('process_start_time_seconds')})"
)

# --- Panels -----------------------------------------------------------------------------------------------------------


def above(warning, critical):
    """Thresholds: yellow from ``warning``, red from ``critical`` on."""
    return [("green", None), ("yellow", warning), ("red", critical)]


def below(warning, critical):
    """Thresholds: yellow below ``warning``, red below ``critical``."""
    return [("red", None), ("yellow", critical), ("green", warning)]


HEALTHY = [("green", None)]
ANY = [("green", None), ("red", 1e-9)]
HITS = below(0.8, 0.5)
WRITE_TIME, READ_TIME, BLOCKED_TIME, LOCKED_TIME = above(10, 60), above(5, 30), above(1, 5), above(60, 120)
HELD_TIME = above(1, 10)
FAILED = above(0.05, 0.25)
GC_AGE = above(8 * 86400, 10 * 86400)
#: Texts and colours instead of numbers.
UP = {0: ("DOWN", "red"), 1: ("up", "green")}
OWNER = {0: ("one", "green"), 1: ("CONFLICT", "red")}

#: The labels that tables show, in this order, before their figures.
COLUMNS = {"instance": "Server", "storage": "Storage", "version": "Version", "bucket": "Bucket", "prefix": "Prefix"}
COLUMNS |= {"endpoint": "Endpoint", "zeo": "ZEO", "zodb": "ZODB", "boto3": "boto3", "python": "Python"}
#: Columns that need more than the others, in pixels.
WIDTHS = {"Server": 140, "Storage": 100, "Endpoint": 230}
ORGANIZED = {
    "excludeByName": {"Time": True, "job": True},
    "indexByName": {name: place for place, name in enumerate(COLUMNS)},
    "renameByName": COLUMNS,
}
#: The unit of what is whole numbers, few enough to be written out.
COUNT = "none"
#: How far an axis goes at least. Beside a line of zeros Grafana would draw one to 100, which is 10000% or 1.67 minutes.
SOFT_TOPS = {COUNT: 4, "short": 4, "ops": 0.1, "s": 0.01, "percentunit": 0.01, "bytes": 1024, "Bps": 1000}
#: What a garbage collection finds in the bucket.
STATES = {"live": "green", "dead": "orange", "retained": "blue", "newer": "yellow", "unknown": "red"}


def query(expr, legend="", by="{{instance}} {{storage}}", color=None):
    """One query of a panel. Its series are called ``legend`` and what tells them apart, ``by``."""
    special = {"color": {"mode": "fixed", "fixedColor": color}} if color else {}
    return {"expr": expr, "legend": f"{legend} {by}".strip(), "special": special}


def overall(expr, legend=""):
    """A query with one answer: nothing to tell apart."""
    return query(expr, legend, by="")


def on_the_right(unit, asked):
    """The query ``asked`` with an axis of its own, as it has another unit than its panel: a dashed line."""
    axis = {"unit": unit, "custom.axisPlacement": "right", "custom.axisSoftMax": SOFT_TOPS[unit]}
    line = {"custom.lineStyle": {"fill": "dash", "dash": [10, 10]}, "custom.fillOpacity": 0}
    whole = {"decimals": 0} if unit == COUNT else {}
    return {**asked, "special": {**axis, **whole, **line}}


def p50_p99(name):
    """Two queries: what is usual, and what the slowest of a hundred are."""
    return [query(quantile(q, name), f"p{100 * q:.0f}") for q in (0.5, 0.99)]


def overall_p50_p99(name, legend, **labels):
    """As `p50_p99`, of all together."""
    return [overall(quantile(q, name, ALL, **labels), f"p{100 * q:.0f} {legend}") for q in (0.5, 0.99)]


def by_state(name):
    """A query for each state of the objects in the bucket: each has its colour, the first is the lowest."""
    return [query(gauge(name, ALL, state=state), state, "", color) for state, color in STATES.items()]


def column(expr, title, unit="short", thresholds=HEALTHY, texts=None, width=None):
    """One query of a table. ``width``: in pixels, if it needs more than others in a narrow window."""
    special = {"displayName": title, "custom.cellOptions": {"type": "color-text"}, **figures(unit, thresholds, texts)}
    if width is not None:
        special["custom.width"] = width
    return {"expr": expr, "legend": "", "special": special}


def age_column(expr, title, thresholds=HEALTHY):
    """A column of times that may be "1.43 weeks" ago."""
    return column(expr, title, "s", thresholds, width=80)


def figures(unit, thresholds, texts):
    """How figures are shown. ``texts``: {value: (text, color)} instead of some of them."""
    options = {str(value): {"text": text, "color": color} for value, (text, color) in (texts or {}).items()}
    steps = [{"color": color, "value": value} for color, value in thresholds]
    return {
        "unit": unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [{"type": "value", "options": options}] if texts else [],
    }


def stat_options(calc, color, graph):
    return {
        "reduceOptions": {"calcs": [calc], "fields": "", "values": False},
        "colorMode": color,
        "graphMode": graph,
        "justifyMode": "auto",
        "orientation": "horizontal",
        "textMode": "auto",
        "wideLayout": False,  # the curve behind the figure, not beside it; for that they need 100 pixels of height
    }


LINES_OPTIONS = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}

#: For each kind: Grafana's type, the height, how it asks, its options.
KINDS = {
    "state": ("stat", 4, {"instant": True}, stat_options("lastNotNull", "background", "none")),
    "figure": ("stat", 5, {"range": True}, stat_options("lastNotNull", "value", "area")),
    "worst": ("stat", 4, {"range": True}, stat_options("max", "background", "area")),
    "lines": ("timeseries", 7, {"range": True}, LINES_OPTIONS),
    "stack": ("timeseries", 7, {"range": True}, LINES_OPTIONS),
    "table": ("table", 5, {"instant": True, "format": "table"}, {"showHeader": True, "cellHeight": "sm"}),
}


def style(kind, unit, thresholds):
    """What only this kind of panel has. Without minWidth, a column takes 150 pixels, and one has to scroll."""
    if kind == "table":
        return {"minWidth": 60, "wrapHeaderText": True}
    if kind not in ("lines", "stack"):
        return {}
    return {
        "axisSoftMax": SOFT_TOPS[unit],
        "drawStyle": "line",
        "fillOpacity": 40 if kind == "stack" else 8,
        "lineWidth": 0 if kind == "stack" else 1,  # in a stack, lines and points of zeros are a false edge
        "showPoints": "never" if kind == "stack" else "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if kind == "stack" else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if thresholds == HEALTHY else "dashed"},
    }


def override(matcher, which, special):
    """What is special about one query of a panel, or one column of a table."""
    properties = [{"id": key, "value": value} for key, value in special.items()]
    return {"matcher": {"id": matcher, "options": which}, "properties": properties}


def overrides(grafana_type, asked):
    """What is special in a panel. ``asked``: its queries and their letters."""
    special = [(ref, one["special"]) for ref, one in asked if one["special"]]
    if grafana_type != "table":
        return [override("byFrameRefID", ref, properties) for ref, properties in special]
    names = {ref: "Value" if len(asked) == 1 else f"Value #{ref}" for ref, _ in asked}  # so Grafana calls the columns
    widths = [override("byName", column, {"custom.width": width}) for column, width in WIDTHS.items()]
    return [*widths, *(override("byName", names[ref], properties) for ref, properties in special)]


def panel(title, unit, kind="lines", thresholds=HEALTHY, texts=None, empty="no data", top=None, width=0):
    """How a panel looks, without its place. What this gives is called with what it says, and with what it asks.

    ``empty``: shown where there is nothing to show. ``top``: the end of the axis, for what cannot be more.
    ``width``: of the 24 columns, if it is not to share them with the others in equal parts.
    """
    grafana_type, height, how, options = KINDS[kind]
    defaults = {
        **figures(unit, thresholds, texts),
        "min": 0,
        "noValue": empty,
        "color": {"mode": "palette-classic" if grafana_type == "timeseries" else "thresholds"},
        "custom": style(kind, unit, thresholds),
    }
    if unit == COUNT:
        defaults["decimals"] = 0
    if top is not None:
        defaults["max"] = top
        defaults["custom"].pop("axisSoftMax", None)  # Grafana would obey it instead
    result = {
        "type": grafana_type,
        "title": title,
        "datasource": DATASOURCE,
        "pluginVersion": "10.4.0",
        "gridPos": {"h": height, "w": width},
        "options": options,
    }
    if grafana_type == "table":
        result["transformations"] = [{"id": "merge", "options": {}}, {"id": "organize", "options": ORGANIZED}]

    def with_queries(description, *queries):
        asked = list(zip(string.ascii_uppercase, queries, strict=False))
        targets = [
            {"refId": ref, "datasource": DATASOURCE, "editorMode": "code", **how}
            | {"expr": one["expr"], "legendFormat": one["legend"]}
            for ref, one in asked
        ]
        shown = {"defaults": defaults, "overrides": overrides(grafana_type, asked)}
        return {**result, "description": description, "fieldConfig": shown, "targets": targets}

    return with_queries


def row(title, *lines):
    """A row: its title, and lines of panels."""
    return {"title": title, "lines": lines}


# --- What the operator sees -------------------------------------------------------------------------------------------

OVERVIEW = row(
    "Overview",
    [
        panel("Servers", COUNT, "state", texts=UP, empty="no server")(
            "Whether Prometheus reaches the metrics endpoint of every server. If DOWN: the table below says which. "
            "See whether the process runs, then its log; then metrics-address, firewall and scrape configuration.",
            overall(f"min({SERVERS_UP})"),
        ),
        panel("Bucket", COUNT, "state", texts=UP)(
            "Whether the last request to every bucket was answered. If DOWN: objects and cached blobs are still "
            "served, commits with blobs and cold reads fail. Row S3, Failures by reason, says why.",
            overall(f"min({series('s3blobs_bucket_up')})"),
        ),
        panel("Event loop blocked for", "s", "state", thresholds=BLOCKED_TIME)(
            "How long the event loop of a server has not answered; 0 is normal. Above a second: all its clients wait. "
            "Take a stack dump of the process before you restart it. See Event loop lag.",
            overall(f"max({lasting('zeo_event_loop_blocked_since_timestamp_seconds', SERVER)})"),
        ),
        panel("Commit lock held for", "s", "state", thresholds=LOCKED_TIME)(
            "How long the transaction that commits now has had the commit lock; nobody else can commit meanwhile. "
            "Above a minute: its client does not finish, or an undo waits for S3; see Commit lock and S3 under the "
            "commit lock. ZEO's transaction-timeout ends it at last.",
            overall(f"max({lasting('zeo_commit_lock_held_since_timestamp_seconds')})"),
        ),
        panel("Failed votes", COUNT, "worst", thresholds=ANY)(
            "Commits with blobs that were refused: the most in one interval of what is shown. Not 0: users got errors, "
            "and nothing was committed. Failures in row Commits and uploads has the reason.",
            overall(increase("s3blobs_vote_failures_total", ALL)),
        ),
    ],
    [
        panel("Cache hit ratio", "percentunit", "figure", thresholds=HITS, top=1)(
            "Share of blob reads that the cache served, in the worst storage; 100% while nobody reads. Low for a "
            "moment, where few read: nothing. Low after a restart with an empty cache: wait. Low for good: raise "
            "cache-size; row Reads and cache says by how much.",
            overall(f"min({HIT_RATIO})"),
        ),
        panel("Vote, p99", "s", "figure", thresholds=WRITE_TIME, empty="no votes")(
            "What 99 of 100 transactions with blobs stay below from vote to reply, in the worst storage. High: S3 is "
            "slow (row S3, Operation time), or the commits queue (Commit lock), or the blobs are large.",
            overall(f"max({P99_VOTE})"),
        ),
        panel("Cold read, p99", "s", "figure", thresholds=READ_TIME, empty="no cold reads")(
            "What 99 of 100 reads of a blob that is not in the cache stay below, in the worst storage. High: compare "
            "Sizes of blobs. Large ones take long; small ones that do mean a slow service or line.",
            overall(f"max({P99_COLD_READ})"),
        ),
        panel("S3 failures", "percentunit", "worst", thresholds=FAILED)(
            "Share of S3 operations that failed after all their tries, in the worst storage and at the worst moment "
            "shown. Not 0: row S3 has the reasons. A few are survived by trying again later; above 5% users notice.",
            overall(f"max({S3_FAILURES})"),
        ),
        panel("Missing or damaged blobs", COUNT, "worst", thresholds=ANY)(
            "Reads of a blob that the bucket does not have, or that arrived with a wrong checksum: the most in one "
            "interval of what is shown. Not 0: do not pack. The log names oid, tid and key: look for the object in "
            "older versions of the bucket or a backup.",
            overall(MISSING_OR_DAMAGED),
        ),
    ],
    [
        panel("Which server, which storage", "short", "table", empty="-")(
            "Each storage as it is now; failed and missing in the last interval. Find what is not green, choose its "
            "server and storage at the top, and go on with the row that belongs to the column. Owner CONFLICT: two "
            "servers write to the same bucket and prefix; stop one of them at once. Last GC long ago: see that the "
            "pack runs regularly; dead blobs cost money, nothing else. Cached: how many blobs the cache has; few after "
            "a restart mean that it has to fill again.",
            column(STORAGES_UP, "Up", texts=UP),
            column(gauge("s3blobs_bucket_up"), "Bucket", texts=UP),
            column(gauge("s3blobs_bucket_owner_conflict"), "Owner", texts=OWNER),
            column(HIT_RATIO, "Hits", "percentunit", HITS),
            column(gauge("s3blobs_cache_files"), "Cached"),
            column(P99_VOTE, "Vote p99", "s", WRITE_TIME),
            column(P99_COLD_READ, "Cold p99", "s", READ_TIME),
            column(S3_FAILURES, "S3 failed", "percentunit", FAILED),
            column(increase("s3blobs_vote_failures_total"), "Votes failed", thresholds=ANY),
            column(increase("s3blobs_missing_blobs_total"), "Missing", thresholds=ANY),
            age_column(age("zeo_last_transaction_timestamp_seconds"), "Last commit"),
            age_column(age("s3blobs_upload_last_success_timestamp_seconds"), "Last upload"),
            age_column(long_age("s3blobs_gc_last_success_timestamp_seconds"), "Last GC", GC_AGE),
            column(f"{gauge('s3blobs_gc_last_duration_seconds')} > 0", "GC took", "s"),
        ),
    ],
    [
        panel("Errors", COUNT)(
            "All that failed in all chosen storages, in one interval each; 0 is normal. The line that rises says which "
            "row to go to. Where several rise together, S3 operations are the cause and the others follow.",
            overall(increase("s3blobs_s3_operation_failures_total", ALL), "S3 operations"),
            overall(increase("s3blobs_vote_failures_total", ALL), "votes"),
            overall(increase("s3blobs_load_duration_seconds_count", ALL, result="error"), "reads"),
            overall(increase("s3blobs_cache_errors_total", ALL), "cache"),
            overall(increase("s3blobs_cleanup_failures_total", ALL), "cleaning up"),
            overall(increase("s3blobs_gc_failures_total", ALL), "garbage collections"),
        ),
    ],
)

CLIENTS = row(
    "Clients and event loop",
    [
        panel("Clients", COUNT)(
            "Connections of ZEO clients. A sudden drop: clients or the network went away, or the server cut them off; "
            "see the logs of both sides. A steady rise: clients that do not close their connections.",
            query(gauge("zeo_connections")),
        ),
        panel("Objects loaded and stored", "ops")(
            "Object records that clients load and store, without blobs. A jump of loads: client caches are cold or too "
            "small. None at all with clients connected: see the event loop.",
            query(rate("zeo_loads_total"), "loads"),
            query(rate("zeo_stores_total"), "stores"),
        ),
        panel("Transactions", "ops")(
            "All transactions of all chosen storages, with or without blobs. Many conflicts: several clients change "
            "the same object; find it in their logs. Failed votes are no aborts here: see Failed votes.",
            overall(rate("zeo_commits_total", ALL), "commits"),
            overall(rate("zeo_aborts_total", ALL), "aborts"),
            overall(rate("zeo_conflicts_total", ALL), "conflicts"),
        ),
    ],
    [
        panel("Event loop lag", "s", thresholds=BLOCKED_TIME)(
            "How long the event loop takes to get to something new, and how long it has been blocked, if it is: every "
            "request waits that long. Above a second: CPU, memory, the disk of the base storage, or a long conflict "
            "resolution; never S3, which has threads of its own.",
            query(quantile(0.5, "zeo_event_loop_lag_seconds", SERVER), "p50", "{{instance}}"),
            query(quantile(0.99, "zeo_event_loop_lag_seconds", SERVER), "p99", "{{instance}}"),
            query(lasting("zeo_event_loop_blocked_since_timestamp_seconds", SERVER), "blocked for", "{{instance}}"),
        ),
        panel("Commit queue", COUNT, thresholds=above(5, 20))(
            "Transactions that are open, and those of them that wait for the commit lock. A queue that does not empty: "
            "whoever has the lock is slow; see the next panel.",
            query(gauge("zeo_active_transactions"), "open"),
            query(gauge("zeo_commit_lock_waiting"), "waiting"),
        ),
        panel("Commit lock", "s", thresholds=LOCKED_TIME)(
            "How long the transaction that commits had held the lock when it was scraped; 0 when it was free. A line "
            "that climbs is one transaction: its client hangs, which transaction-timeout ends, or it is very large, or "
            "it waits for S3. Only an undo, and who was overtaken, does: see S3 under the commit lock.",
            query(lasting("zeo_commit_lock_held_since_timestamp_seconds"), "held for"),
        ),
    ],
)

COMMITS = row(
    "Commits and uploads",
    [
        panel("Vote time", "s", thresholds=WRITE_TIME)(
            "From vote to reply, for transactions with blobs: first the uploads, then the commit lock. High: if Upload "
            "time is high, too, S3 or the line is slow; if it is not, transactions queue: see Commit queue and "
            "Reserved tids.",
            *p50_p99("s3blobs_vote_duration_seconds"),
        ),
        panel("Transactions with blobs", "ops")(
            "Transactions with blobs of all chosen storages, the blobs that were uploaded, and those that a retry "
            "after a conflict did not have to send again. Finished well below voted: votes fail, see the next panel; "
            "or clients give up. No uploads although people commit files: clients do not reach the server. Many "
            "reused: many conflicts; see Transactions.",
            overall(rate("s3blobs_transactions_voted_total", ALL), "voted"),
            overall(rate("s3blobs_transactions_finished_total", ALL), "finished"),
            overall(rate("s3blobs_transactions_aborted_total", ALL), "aborted"),
            overall(rate("s3blobs_upload_duration_seconds_count", ALL), "blobs uploaded"),
            overall(rate("s3blobs_uploads_reused_total", ALL), "blobs reused"),
        ),
        panel("Failures", COUNT)(
            "Failed votes of all chosen storages by reason, and uploads that an abort could not delete; in one "
            "interval. bucket: S3 did not take a blob. timeout: upload-timeout was over. cache: see the disk of "
            "cache-dir. missing: an undo wants a blob that is gone. client: shared-blob-dir must be off. Cleaning up: "
            "the next pack deletes what is left.",
            query(increase("s3blobs_vote_failures_total", "reason"), by="{{reason}}"),
            overall(increase("s3blobs_cleanup_failures_total", ALL), "cleaning up"),
        ),
    ],
    [
        panel("Upload time", "s", thresholds=WRITE_TIME)(
            "How long the upload of one blob takes. High for blobs of the usual size: the service or the line is slow; "
            "see row S3. High for large ones: under ZEO, uploads end before the commit lock is taken, and hold up "
            "nobody else.",
            *p50_p99("s3blobs_upload_duration_seconds"),
        ),
        panel("Sizes of blobs", "bytes")(
            "Sizes of the blobs that are uploaded and downloaded, of all chosen storages, estimated. Much larger than "
            "usual: they explain long votes and cold reads; consider a larger cache-size.",
            *overall_p50_p99("s3blobs_upload_size_bytes", "upload"),
            *overall_p50_p99("s3blobs_download_size_bytes", "download"),
        ),
        panel("Not yet committed", "bytes")(
            "Blobs of all chosen storages that wait on the disk of the cache for the end of their transaction; they "
            "must fit there besides the cache. Dashed, on the right: how many they are. If it stays up: transactions "
            "hang, see Commit queue. Thousands of small ones: a vote takes long, as each is a request.",
            overall(gauge("s3blobs_staged_bytes", ALL), "bytes"),
            on_the_right(COUNT, overall(gauge("s3blobs_staged_blobs", ALL), "blobs")),
        ),
    ],
    [
        panel("Commit lock held", "s", thresholds=HELD_TIME)(
            "How long transactions, with or without blobs, hold the commit lock of the ZEO server; milliseconds are "
            "normal. High: if the next panel is not 0, they wait for S3; if it is, look at the disk of the base "
            "storage, and for clients that are slow between vote and finish.",
            *p50_p99("s3blobs_commit_lock_held_duration_seconds"),
        ),
        panel("S3 under the commit lock", "ops")(
            "Transactions of all chosen storages that waited for S3 while they held the commit lock, by reason. undo, "
            "restore: normal while somebody does it. base: normal with RelStorage and without ZEO. overtaken: 0 is "
            "normal. If it is not, S3 is too slow for what is committed at once: see Reserved tids and Operation time.",
            query(rate("s3blobs_commit_lock_waits_total", "reason"), by="{{reason}}"),
        ),
        panel("Reserved tids", "ops")(
            "Tids reserved for transactions with blobs, and those lost because others did not wait, of all chosen "
            "storages. Who lost its tid "
            "copies its blobs inside the bucket to a new one. A few overtaken: large blobs, which is normal. Nearly as "
            "many as reserved: uploads are slow, see Upload time.",
            overall(rate("s3blobs_reservations_total", ALL), "reserved"),
            overall(rate("s3blobs_reservations_overtaken_total", ALL), "overtaken"),
        ),
    ],
)

READS = row(
    "Reads and cache",
    [
        panel("Wait for a blob", "s", thresholds=READ_TIME)(
            "How long a reader waits for a blob, from the cache (hit) and from the bucket (miss), and the part of it "
            "that is the download, of all chosen storages. Slow downloads of blobs of the usual size: see Operation "
            "time in row S3. Misses slower than downloads: they wait for their turn, see In flight. Slow hits: the "
            "disk of cache-dir.",
            *overall_p50_p99("s3blobs_load_duration_seconds", "hit", result="hit"),
            *overall_p50_p99("s3blobs_load_duration_seconds", "miss", result="miss"),
            overall(quantile(0.99, "s3blobs_download_duration_seconds", ALL), "p99 download"),
        ),
        panel("Reads", "ops")(
            "Reads of blobs in all chosen storages, readers that joined a download under way, and blobs that came from "
            "fallback-blob-dir or fallbackbucket. Errors: the logs of the clients have them; see row S3. Many that "
            "join want the same new blob, which is fetched once. While fallback is not 0, a fallback is still needed.",
            query(rate("s3blobs_load_duration_seconds_count", "result"), by="{{result}}"),
            overall(rate("s3blobs_download_waits_total", ALL), "joined"),
            overall(rate("s3blobs_fallback_reads_total", ALL), "fallback"),
        ),
        panel("Faults of blobs and cache", COUNT)(
            "Blobs that the bucket does not have, wrong checksums, and failed operations on cache-dir, of all chosen "
            "storages in one interval. missing: do not pack; look for older versions in the bucket. checksum: a proxy "
            "or disk damages data. no checksum: read without one, as other software stored it. fallback: "
            "fallback-blob-dir or fallbackbucket could not be read; see the log. cache: the disk is full or broken, or "
            "the permissions are wrong. cache damaged: files that were not as they had been written, and were fetched "
            "again; a few after a power cut, else check the disk.",
            overall(increase("s3blobs_missing_blobs_total", ALL), "missing"),
            overall(increase("s3blobs_fallback_failures_total", ALL), "fallback"),
            overall(increase("s3blobs_download_checksum_failures_total", ALL), "checksum"),
            overall(increase("s3blobs_download_unproven_total", ALL), "no checksum"),
            query(increase("s3blobs_cache_errors_total", "operation"), "cache", "{{operation}}"),
            overall(increase("s3blobs_cache_damaged_total", ALL), "cache damaged"),
        ),
    ],
    [
        panel("Hit ratio", "percentunit", thresholds=HITS, top=1)(
            "Share of reads, and of their bytes, that the cache served; 100% while nobody reads. Reads high and bytes "
            "low: a few large blobs do not stay; raise cache-size. Both low: see Least recently used.",
            query(HIT_RATIO, "reads"),
            query(HIT_BYTES_RATIO, "bytes"),
        ),
        panel("Cache traffic", "Bps")(
            "Bytes that readers wanted, those that the caches had, and those that they threw out, of all chosen "
            "storages. Thrown out nearly as much as wanted: a cache is too small for what is read; see Hit ratio.",
            overall(rate("s3blobs_cache_requested_bytes_total", ALL), "wanted"),
            overall(rate("s3blobs_cache_hit_bytes_total", ALL), "served"),
            overall(rate("s3blobs_cache_evicted_bytes_total", ALL), "thrown out"),
        ),
        panel("Least recently used", "s", thresholds=below(86400, 3600))(
            "How long the blob that goes next has not been used: so far back the cache reaches. Minutes instead of "
            "days: the cache thrashes; raise cache-size until it covers a working day.",
            query(age("s3blobs_cache_oldest_access_timestamp_seconds")),
        ),
    ],
    [
        panel("Cache size", "bytes", width=12)(
            "The cache, its limit, and what is in use and cannot go now. Above the limit for long: pinned blobs, large "
            "or slowly read, keep it there, or files cannot be deleted; see Faults of blobs and cache, and the log.",
            query(gauge("s3blobs_cache_size_bytes"), "size"),
            query(gauge("s3blobs_cache_limit_bytes"), "limit"),
            query(gauge("s3blobs_cache_pinned_bytes"), "pinned"),
        ),
        panel("Free disk", "bytes")(
            "What is free on the disk of cache-dir. It must hold the rest of cache-size, and what is being committed "
            "or fetched. Nearly 0: lower cache-size and restart, or find what else fills the disk.",
            query(gauge("s3blobs_cache_filesystem_free_bytes")),
        ),
        panel("Links", "ops")(
            "Links to blobs that applications asked for, and those that they were given, with presigned-urls, in all "
            "chosen storages. Fewer given: a fallback has the blobs, a pack has removed them, the arguments are "
            "wrong, or the log says that there are no credentials. What is read by a link is in no other panel.",
            overall(rate("s3blobs_presigned_url_requests_total", ALL), "asked for"),
            overall(rate("s3blobs_presigned_urls_total", ALL), "given"),
        ),
    ],
)

S3 = row(
    "S3",
    [
        panel("Bucket by storage", COUNT, "figure", texts=UP, top=1, width=4)(
            "Whether the last request, or the probe when there was none, was answered; the curve is 1 or 0. If DOWN: "
            "the panels beside it say since when and why. Flapping: a service or line at its limit.",
            query(gauge("s3blobs_bucket_up")),
        ),
        panel("Operations", "ops")(
            "What all chosen storages ask of S3; the service charges for this. Many get: see the cache. Many list and "
            "delete: a garbage collection. Many head: copyTransactionsFrom, or undo.",
            query(rate("s3blobs_s3_operations_total", "operation"), by="{{operation}}"),
        ),
        panel("Failures by reason", "percentunit", thresholds=FAILED)(
            "Share of the operations of all chosen storages that failed after all their tries. auth: credentials or "
            "policy of the bucket. throttled: lower s3-concurrency, or ask for more. timeout, connection: network. "
            "server: the service. request: name of bucket or endpoint. damaged: something on the way changes data.",
            query(S3_FAILURES_BY_REASON, by="{{reason}}"),
        ),
    ],
    [
        panel("Operation time, p99", "s", thresholds=WRITE_TIME)(
            "How long the slowest of a hundred operations take, tries and bodies included. All high: the service or "
            "the line. Only get or put_part: large blobs. Steps of s3-read-timeout: answers that never came.",
            query(quantile(0.99, "s3blobs_s3_operation_duration_seconds", "operation"), by="{{operation}}"),
        ),
        panel("Operation time, p50", "s", thresholds=above(1, 10))(
            "How long an operation usually takes. p50 as ever and p99 high: single requests hang, see Failed tries. "
            "Both high: the service is slow for everybody, or far away.",
            query(quantile(0.5, "s3blobs_s3_operation_duration_seconds", "operation"), by="{{operation}}"),
        ),
        panel("In flight", COUNT)(
            "Operations under way. At s3-concurrency for long: others wait for their turn; raise it if the line and "
            "the service have room, and the machine memory.",
            query(gauge("s3blobs_s3_inflight_operations", "operation"), by="{{operation}}"),
        ),
    ],
    [
        panel("Retries", "percentunit", thresholds=above(0.1, 0.5))(
            "Share of the tries that failed, so that another was needed; 0 is normal. It rises before operations fail: "
            "the service is near its limit, or the network is bad. Above 10% see the next panel.",
            query(RETRIES, by="{{operation}}"),
        ),
        panel("Failed tries", COUNT)(
            "HTTP requests that failed, whether or not the next try helped, of all chosen storages in one interval. "
            "503 and 429: throttled. 403: credentials, or the clock of this machine. 500: the service. timeout and "
            "connection: network.",
            query(increase("s3blobs_s3_attempt_failures_total", "code"), by="{{code}}"),
        ),
        panel("Traffic", "Bps")(
            "Bytes sent to S3 and received from it, and those that a retry after a conflict did not have to send "
            "again, of all chosen storages. A flat top: the line is full, votes and cold reads take long. Received "
            "well above what readers want: blobs are fetched again and again, see Hit ratio.",
            overall(rate("s3blobs_s3_sent_bytes_total", ALL), "sent"),
            overall(rate("s3blobs_s3_received_bytes_total", ALL), "received"),
            overall(rate("s3blobs_uploads_reused_bytes_total", ALL), "not sent again"),
        ),
    ],
)

GARBAGE = row(
    "Garbage collection",
    [
        panel("Since the last success", "s", thresholds=GC_AGE, empty="none yet")(
            "Time since the last complete garbage collection. It keeps rising: the pack does not run, or fails; see "
            "Runs. None yet: since the server started.",
            query(age("s3blobs_gc_last_success_timestamp_seconds")),
        ),
        panel("Runs", COUNT)(
            "Garbage collections of all chosen storages, those that failed, in one interval, and how many run now. "
            "Failed: the log has the reason; the base is packed all the same. Pack again when it is gone.",
            overall(increase("s3blobs_gc_runs_total", ALL), "runs"),
            overall(increase("s3blobs_gc_failures_total", ALL), "failed"),
            overall(gauge("s3blobs_gc_running", ALL), "running"),
        ),
        panel("Scanned and deleted", "short")(
            "Objects that were looked at, deleted, and could not be deleted, of all chosen storages in one interval; "
            "dashed, on the right, the bytes that were deleted. "
            "Far more deleted than usual: is it the right database, and not an old copy of its Data.fs? Stop the pack "
            "if in doubt. Failed: see that the bucket's policy allows it.",
            overall(increase("s3blobs_gc_scanned_objects_total", ALL), "scanned"),
            overall(increase("s3blobs_gc_deleted_objects_total", ALL), "deleted"),
            overall(increase("s3blobs_gc_delete_failures_total", ALL), "failed"),
            on_the_right("bytes", overall(increase("s3blobs_gc_deleted_bytes_total", ALL), "bytes")),
        ),
    ],
    [
        panel("Objects in the bucket", "short", "stack")(
            "What the last garbage collection of each chosen storage found, before it deleted anything. live: in use. "
            "dead: what it deletes; failed in the panel above says if it could not. retained: dead, but kept for now. "
            "newer: than the last transaction, so kept. unknown: other keys, never touched. Live falls suddenly: is "
            "the right database being served?",
            *by_state("s3blobs_gc_objects"),
        ),
        panel("Bytes in the bucket", "bytes", "stack")(
            "The same in bytes: what the service charges for until dead ones are deleted, without older versions that "
            "a versioned bucket keeps. Much dead: pack more often. Much unknown: something else writes below the same "
            "prefix.",
            *by_state("s3blobs_gc_bytes"),
        ),
    ],
)

PROCESS = row(
    "Process",
    [
        panel("CPU", "percentunit", thresholds=above(0.8, 0.95))(
            "CPU of the server process; 100% is one core. Steadily near 100%: the event loop has no time left. Move a "
            "storage to a server of its own, or find the client that loads so much.",
            query(ours(rate("process_cpu_seconds_total", "job, instance")), by="{{instance}}"),
        ),
        panel("Memory", "bytes")(
            "Resident memory of the server process. It rises with the number of objects, clients and transfers, then "
            "levels off. If it never does: a leak; note the version below and report it.",
            query(ours(series("process_resident_memory_bytes")), by="{{instance}}"),
        ),
        panel("File descriptors", "percentunit", thresholds=above(0.8, 0.95), top=1)(
            "Open file descriptors, as a share of what the process may have. Above 80%: raise the limit (ulimit -n, "
            "LimitNOFILE), and see Clients whether connections pile up.",
            query(ours(f"{series('process_open_fds')} / {series('process_max_fds')}"), by="{{instance}}"),
        ),
    ],
    [
        panel("What runs where", COUNT, "table")(
            "What each storage runs on, and since when. Two lines with the same bucket and prefix, unless one was just "
            "moved: stop one of the servers at once, as each deletes the other's blobs. Different versions: an update "
            "that is not complete. Restarts that nobody made: see the log, and whether the kernel ended it for want of "
            "memory.",
            column(RUNNING_FOR, "Running for", "s"),
        ),
    ],
)

ROWS = [OVERVIEW, CLIENTS, COMMITS, READS, S3, GARBAGE, PROCESS]

# --- The dashboard ----------------------------------------------------------------------------------------------------


def placed(rows):
    """The panels of ``rows`` with an id and a place: 24 columns, one line below the other."""
    panels, y = [], 0

    def place(item, x, width, height):
        panels.append({**item, "id": len(panels) + 1, "gridPos": {"x": x, "y": y, "w": width, "h": height}})

    for section in rows:
        place({"type": "row", "title": section["title"], "collapsed": False, "panels": []}, 0, 24, 1)
        y += 1
        for line in section["lines"]:
            height, x = max(item["gridPos"]["h"] for item in line), 0
            for number, item in enumerate(line):
                width = item["gridPos"]["w"] or (24 - x) // (len(line) - number)
                place(item, x, width, height)
                x += width
            y += height
    return panels


def variable(name, label, chosen_before=()):
    """A query variable: the values of a label, among what the variables before it have left."""
    matchers = ", ".join(f'{other}=~"${other}"' for other in chosen_before)
    question = f"label_values(s3blobs_storage_info{f'{{{matchers}}}' if matchers else ''}, {name})"
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "definition": question,
        "query": {"query": question, "refId": name},
        "refresh": 2,  # on time range change
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "regex": "",
        "options": [],
    }


def annotation(name, color, expr, title, text):
    """A mark at each time that ``expr`` has had as its value, in milliseconds: exact, and however long the gap was."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": color,
        "expr": expr,
        "useValueForTime": True,
        "step": "60s",
        "titleFormat": title,
        "textFormat": text,
        "tagKeys": "instance,storage",
    }


DATASOURCE_VARIABLE = {
    "type": "datasource",
    "name": "datasource",
    "label": "Data source",
    "query": "prometheus",
    "refresh": 1,
    "multi": False,
    "includeAll": False,
    "current": {},
    "hide": 0,
    "regex": "",
    "options": [],
}

DASHBOARD = {
    "uid": "zodb-s3blobs",
    "title": "zodb-s3blobs",
    "description": "ZEO servers that keep their blobs in S3: is it well, and if not, where.",
    "tags": ["zodb", "zeo", "s3", "blobs"],
    "schemaVersion": 39,
    "version": 1,
    "editable": False,
    "graphTooltip": 1,  # shared crosshair
    "refresh": "30s",
    "time": {"from": "now-3h", "to": "now"},
    "timezone": "",
    "links": [],
    "templating": {
        "list": [
            DATASOURCE_VARIABLE,
            variable("job", "Job"),
            variable("instance", "Server", ["job"]),
            variable("storage", "Storage", ["job", "instance"]),
        ]
    },
    "annotations": {
        "list": [
            annotation(
                "Starts",
                "blue",
                ours(f"{series('process_start_time_seconds')} * 1000"),
                "Server started",
                "{{instance}}",
            ),
            annotation(
                "Garbage collections",
                "purple",
                f"{series('s3blobs_gc_last_success_timestamp_seconds')} * 1000 > 0",
                "Garbage collection done",
                "{{instance}} {{storage}}",
            ),
        ]
    },
    "panels": placed(ROWS),
}

if __name__ == "__main__":
    Path(__file__).with_name("zodb-s3blobs.json").write_text(
        json.dumps(DASHBOARD, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
