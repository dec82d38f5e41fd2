"""``zodb-s3blobs check``: test whether a bucket and its credentials are fit for the server.

Stores, reads, copies, lists and deletes a few blobs as the server does, below a prefix of their own. Shows for each
capability whether it works, whether the server works around it, and which key of the section to set. All these objects
are deleted again, as are those of checks that were killed more than a day ago. No other object is touched: the server
may run. No database is opened. Of fallbackbucket, keys are listed and one blob is opened; nothing is written there.

Exit status: 0 the bucket passed; 1 the test could not be completed; 3 something that the server needs fails.
"""

import argparse
import json
import logging
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from ...database import zeoconf
from ...s3.errors import BlobNotFound, BucketError
from ...workers import DaemonPool
from .. import common
from .checks import CHECKS, Check
from .diagnosis import reach
from .outcome import Outcome, around, fails, not_tried, works
from .scratch import NotTried, Scratch, is_answered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``check``."""
    common.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status described above."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may support ASCII only
    return common.run("check", lambda: _run(arguments), logging.CRITICAL)  # the table replaces the log


def _run(arguments: argparse.Namespace) -> int:
    section = zeoconf.find(arguments.configure, arguments.storage).section
    for number in signal.SIGTERM, signal.SIGHUP:  # clean up after these signals too
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    report = _Report(arguments.json)
    with tempfile.TemporaryDirectory() as directory, closing(Scratch(section, directory)) as scratch:
        # In a thread, so that Ctrl-C does not break off a request that the service completes after the clean-up.
        worker = DaemonPool(1, "s3blobs check")
        try:
            try:
                for name, outcome in _outcomes(scratch, worker):
                    report.add(name, outcome)
            finally:
                scratch.unwanted.set()
                worker.shutdown(wait=scratch.may_have_stored)
        except BaseException as error:
            left = _clean_up(scratch, with_former=False)
            if isinstance(error, BucketError):
                if left.state == "fails":
                    print(f"zodb-s3blobs check: {left.meaning}", file=sys.stderr)
                raise
            print(f"zodb-s3blobs check: the check ended early. {left.meaning}", file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):
                return 130
            raise
        report.add("clean-up", _clean_up(scratch, with_former=not report.is_hopeless))
    return common.EXIT_OK if report.conclude(scratch.bucket.name) else common.EXIT_DAMAGED


class _Report:
    """The outcomes of the checks, each shown at once, but each cause only once."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._outcomes: dict[str, Outcome] = {}
        #: Cause of an error -> the first check with that error, and whether the check failed.
        self._causes: dict[str, tuple[str, bool]] = {}

    @property
    def is_hopeless(self) -> bool:
        """True if the bucket's policy forbids every request."""
        return "permissions" in self._outcomes

    def add(self, name: str, outcome: Outcome) -> None:
        """Add and show the outcome of the check ``name``; that of the clean-up comes last."""
        if outcome.error is not None:
            cause = _cause(outcome.error)
            first, is_failure = self._causes.get(cause, ("", False))
            if first and is_failure and name != "clean-up":
                meaning = f"the cause is that of {first}"
                outcome = replace(outcome, state="fails", meaning=meaning, set="", same_as=first)
            elif first and outcome.rest:
                outcome = replace(outcome, meaning=f"{outcome.rest}; the cause is that of {first}")
            else:
                self._causes[cause] = name, outcome.state == "fails"
        self._outcomes[name] = outcome
        if self._as_json:
            return
        if name == "clean-up":
            self._show_others()
        if outcome.state != "not tried" and not outcome.same_as:
            advice = f"; set {outcome.set}" if outcome.set else ""
            _show(name, outcome.state, f"{outcome.meaning}{advice}")

    def _show_others(self) -> None:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, outcome in self._outcomes.items():
            if outcome.same_as:
                groups.setdefault(("(same cause)", "fails", f"as {outcome.same_as}"), []).append(name)
            elif outcome.state == "not tried":
                groups.setdefault(("(not tried)", "-", outcome.meaning), []).append(name)
        for (what, state, meaning), names in groups.items():
            _show(what, state, f"{meaning}: {', '.join(names)}")

    def conclude(self, bucket: str) -> bool:
        """Print whether the bucket has passed, and return it."""
        failed = [name for name, outcome in self._outcomes.items() if outcome.state == "fails"]
        passed = not failed and all(outcome.state != "not tried" for outcome in self._outcomes.values())
        if self._as_json:
            checks = [
                {"check": name, "state": outcome.state, "meaning": outcome.meaning, "set": outcome.set}
                for name, outcome in self._outcomes.items()
            ]
            print(json.dumps({"bucket": bucket, "passed": passed, "checks": checks}, indent=1))
        else:
            print(f"\nBucket {bucket} {'passed' if passed else 'did not pass: ' + ', '.join(failed)}")
        return passed


def _show(name: str, state: str, meaning: str) -> None:
    # Texts of the service go into this line; they must not pass for lines of ours, or control the terminal.
    line = f"{name:<18} {state:<13} {meaning}"
    print("".join(character if character.isprintable() else "?" for character in line), flush=True)


def _cause(error: BucketError) -> str:
    """Return the part of ``error`` that is equal for one cause: without the object, and mostly without the request."""
    match = re.fullmatch(r"Could not (\w+).*? bucket [^:]+: (.*)", str(error), re.DOTALL)
    verb, said = match.groups() if match else ("", str(error))
    permission = re.search(r"forbids s3:(\w+)", said)
    if permission:
        return permission[1]
    # The answer to HEAD has no error code.
    return f"{verb}: {said}" if is_answered(error) else re.sub(r"answered \S+ \(", "answered (", said)


def _outcomes(scratch: Scratch, worker: DaemonPool) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of each check. Raises BucketError if none can succeed."""
    refusal = worker.submit(reach, scratch).result()
    if refusal:
        yield "permissions", fails(refusal)
        return
    silence = ""
    for name, check in CHECKS.items():
        if name == "fallback bucket" and scratch.fallback is None:
            continue
        if silence:
            yield name, not_tried(silence)
            continue
        outcome = worker.submit(_outcome, check, scratch).result()
        yield name, outcome
        if outcome.state == "fails" and outcome.error is not None and not is_answered(outcome.error):
            silence = worker.submit(_silence, scratch).result()


def _silence(scratch: Scratch) -> str:
    """Return a sentence if the bucket does not answer any more, else ""."""
    try:
        scratch.bucket.probe()
    except BucketError as error:
        return "" if is_answered(error) else f"the bucket does not answer any more ({error.code})"
    return ""


def _outcome(check: Check, scratch: Scratch) -> Outcome:
    try:
        outcome = check(scratch)
    except NotTried as error:
        outcome = not_tried(str(error))
    except BucketError as error:
        outcome = fails(str(error), error=error)
    except BlobNotFound as error:
        outcome = fails(str(error))
    except OSError:
        raise  # an error of this machine's disk
    except Exception as error:
        outcome = fails(f"an answer of the service cannot be interpreted ({type(error).__name__})")
    return replace(outcome, meaning=outcome.meaning.replace(scratch.bucket.keys.root, ""))


def _clean_up(scratch: Scratch, with_former: bool) -> Outcome:
    root = scratch.bucket.keys.root
    later = "delete them, or run check again after a day, which deletes the objects of earlier checks"
    try:
        left = scratch.clean_up()
        former = scratch.clean_up_former() if with_former else None
    except KeyboardInterrupt:
        return fails(f"the objects below {root} were not all deleted; {later}")
    said = []
    if former is not None and former.deleted:
        said.append(f"{former.deleted} objects and uploads of earlier checks that had been killed were deleted")
    if former is not None and former.young:
        said.append(f"{former.young} objects and uploads of other checks were kept: they are less than a day old")
    more = "".join(f"; {sentence}" for sentence in said)
    if left is None:
        return works(f"nothing was stored{more}")
    if left.there:
        return _left(left.there, f"objects or uploads are left below {root}; {later}{more}")
    if left.perhaps:
        return _left(left.perhaps, f"objects may be left below {root}; {later}{more}")
    if left.versions:
        return around(f"the bucket keeps old versions of deleted objects below {root}: {left.versions}{more}")
    if former is not None and former.kept:
        return _left(former.kept, f"objects or uploads of earlier checks are left{more}")
    return works(f"nothing is left below {root}{more}")


def _left(what: dict[str, BucketError], meaning: str) -> Outcome:
    error = next(iter(what.values()))
    rest = f"{len(what)} {meaning}"
    return Outcome("fails", f"{rest}. {error}", error=error, rest=rest)
