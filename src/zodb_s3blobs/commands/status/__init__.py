"""``zodb-s3blobs status``: show on one screen how a running server is, and whether it needs attention.

It reads the figures at metrics-address; the server must run. Its first line is for Nagios and Icinga: OK, WARNING,
CRITICAL or UNKNOWN, and the alerts by the names that they have in grafana/alerts.yml. Counters are those since the
start of the server; with --watch, from the second screen on, those since the screen before.

Without --state, an event such as a failed commit counts as long as the server runs, what is so at the moment counts at
once, and rates are those since the start, which hide what has begun of late. With --state FILE, which keeps the figures
of earlier calls, events, rates and times count as in grafana/alerts.yml.

Exit status: 0 all is well; 1 a warning: look at it in working hours; 2 critical, or the server does not answer; 3 the
state could not be found out, for example because metrics-address is not set.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...database import zeoconf
from ...errors import S3BlobsError
from .. import common
from . import figures
from .looks import History, Look, NoAnswer, View, look_at
from .rules import CRITICAL, WARNING, Alert, find

OK, UNKNOWN = "OK", "UNKNOWN"

#: The states of Nagios, and the exit statuses that it knows them by.
_EXIT = {OK: 0, WARNING: 1, CRITICAL: 2, UNKNOWN: 3}

#: Seconds between two screens of --watch.
_EVERY = 5.0

_CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``status``."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-C", "--configure", metavar="FILE", type=Path, help="the server's zeo.conf")
    where.add_argument(
        "--address",
        metavar="HOST:PORT",
        type=_address,
        help="the metrics-address of the server, for an account that may not read its zeo.conf",
    )
    parser.add_argument("--storage", metavar="NAME", help="only this storage")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch, a line for each screen")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=_EVERY,
        help=f"show it again every SECONDS ({_EVERY:g}), until Ctrl-C",
    )
    parser.add_argument(
        "--state", metavar="FILE", type=Path, help="keep the figures of earlier calls in this file; one for each server"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("must be a number of seconds from 0.1 to 86400, such as 5")
    return seconds


def _address(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not separator or not host or "/" in host or not port.isdecimal():
        raise argparse.ArgumentTypeError("must be host:port, such as localhost:8101")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    return common.run("status", lambda: _status(arguments))


def _status(arguments: argparse.Namespace) -> int:
    report = _report(UNKNOWN, "nothing was found out")
    before: Look | None = None
    try:
        address = arguments.address or _configured_address(arguments)
        history = History.load(arguments.state, address) if arguments.state else None
        while True:
            report, before = _look(address, arguments.storage, before, history)
            _show(report, arguments)
            if arguments.watch is None:
                break
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        if arguments.watch is None:
            raise
    except S3BlobsError as error:
        report = _report(UNKNOWN, str(error))
        _show(report, arguments)
    return report["exit_status"]


def _configured_address(arguments: argparse.Namespace) -> str:
    """Return the metrics-address of the zeo.conf, as host:port to connect to. Raises ConfigurationError."""
    path, storage = arguments.configure, arguments.storage
    served = zeoconf.all_in(path) if storage is None else {storage: zeoconf.find(path, storage)}
    if not served:
        raise zeoconf.ConfigurationError(f"{path} has no storage with s3blobstorage: name the zeo.conf of the server")
    for name, one in served.items():
        if one.section.config.metrics_address is None:
            raise zeoconf.ConfigurationError(
                f"the s3blobstorage section of storage {name} has no metrics-address, at which status reads the "
                f"figures: set metrics-address localhost:8101 in it, and restart the server"
            )
    # All sections of a process name the same address.
    host, port = next(iter(served.values())).section.config.metrics_address
    if host in ("", "0.0.0.0"):
        host = "localhost"
    return f"[{host if host != '::' else '::1'}]:{port}" if ":" in host else f"{host}:{port}"


def _look(
    address: str, storage: str | None, before: Look | None, history: History | None
) -> tuple[dict[str, Any], Look | None]:
    """Return the report on the server at ``address``, and the look for the next call.

    ``storage``: the only one to report on, or None; ``before``: the last look, or None. Raises ConfigurationError and
    StateError.
    """
    try:
        look = look_at(address)
    except NoAnswer as error:
        down = Alert("S3BlobsDown", CRITICAL, "", str(error))
        return _report(CRITICAL, f"{down.name}: {error}", address, alerts=[down]), None
    storages = look.storages()
    if storage is not None and storage not in storages:
        raise zeoconf.ConfigurationError(
            f"the server at {address} has no storage {storage}, but {', '.join(storages) or 'none'}: was it started "
            f"with this file?"
        )
    start = look.at_start()
    if history is None:
        alerts = find([start, look], has_history=False)
    else:
        history.add(look)
        history.save()
        alerts = find(history.looks, has_history=True)
    alerts = [alert for alert in alerts if storage is None or alert.storage in ("", storage)]
    acute = [alert for alert in alerts if not alert.is_pending]
    found = [figures.collect(View([before or start, look], name), name) for name in storages if storage in (None, name)]
    state = acute[0].severity if acute else OK  # the critical ones come first
    summary = "; ".join(map(_named, acute)) or "; ".join(map(figures.summary, found))
    version = look.label("s3blobs_build_info", "version")
    since = (before or start).time
    return _report(state, summary, address, look.time, since, start.time, version, alerts, found), look


def _report(
    state: str,
    summary: str,
    address: str | None = None,
    now: float | None = None,
    since: float | None = None,
    started: float | None = None,
    version: str | None = None,
    alerts: Sequence[Alert] = (),
    storages: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the report as JSON has it. Moments in seconds since 1970; ``since``: from when counters are counted."""
    return {
        "status": state,
        "exit_status": _EXIT[state],
        "summary": summary,
        "time": now,
        "since": since,
        "server": {"address": address, "up": now is not None, "started": started, "version": version},
        "alerts": [
            {
                "alert": alert.name,
                "severity": alert.severity,
                "storage": alert.storage or None,
                "pending": alert.is_pending,
                "meaning": alert.sentence,
            }
            for alert in alerts
        ],
        "storages": list(storages),
    }


def _named(alert: Alert) -> str:
    return f"{alert.name}: {f'storage {alert.storage}: ' if alert.storage else ''}{alert.sentence}"


def _show(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(report, indent=None if arguments.watch else 1), flush=True)
        return
    if arguments.watch is not None and sys.stdout.isatty():
        print(_CLEAR, end="")
    for line in _lines(report):
        # Texts of the service may be among them; they must not control the terminal.
        print("".join(character if character.isprintable() else "?" for character in line))
    if arguments.watch is not None:
        print()
    sys.stdout.flush()


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the screen; the first line is that of Nagios, in which | would begin its performance data."""
    yield f"{report['status']} - {report['summary'].replace('|', '/')}"
    acute = [alert for alert in report["alerts"] if not alert["pending"]]
    for alert in report["alerts"]:
        if acute == [alert]:
            continue  # the first line has it
        severity = "pending" if alert["pending"] else alert["severity"]
        where = f"storage {alert['storage']}: " if alert["storage"] else ""
        yield f"{severity} {alert['alert']}: {where}{alert['meaning']}"
    server = report["server"]
    if not server["up"]:
        return
    yield ""
    yield (
        f"{figures.moment(report['time'])}: zodb-s3blobs {server['version']} answers at {server['address']}, "
        f"counters since {figures.moment(report['since'])}"
    )
    for found in report["storages"]:
        yield ""
        yield from figures.lines(found, report["time"])
