"""The common parts of the commands that read a zeo.conf: options, exit statuses, and errors as one sentence."""

import argparse
import errno
import logging
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ZConfig.datatypes import stock_datatypes
from ZODB.POSException import StorageError

from ..bases import adapter_for
from ..cache.directory import CacheDirectoryError
from ..config import S3BlobStorageFactory, StartRefused
from ..database.survey import Report
from ..errors import S3BlobsError
from ..fallbacks import Fallbacks
from ..lease import NotOwner, standing
from ..localfile import LocalFile
from ..metrics import Metrics
from ..s3.bandwidth import Bandwidth
from ..s3.bucket import Bucket

logger = logging.getLogger(__name__)

#: The bytes a second for which one connection is enough.
_OF_A_CONNECTION = 4 << 20

# The exit statuses; 2 is argparse's.
EXIT_OK = 0
EXIT_ERROR = 1  # the work could not be done
EXIT_DAMAGED = 3  # blobs are missing or damaged, or could not be copied
EXIT_GARBAGE = 4  # dead objects were found, and nothing worse
EXIT_UNPROVEN = 5  # blobs carry no SHA-256 in the bucket
FALLBACK = 6  # the bucket lacks blobs that clients can still read

#: The errors of a directory that cannot be written.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def opened(section: S3BlobStorageFactory) -> Iterator[tuple[Bucket, Fallbacks]]:
    """Open the bucket and the fallbacks of ``section`` for the body.

    Waits for S3. Raises StartRefused, BlobDirectoryError, and BucketError if the second bucket cannot be listed.
    """
    metrics = Metrics()
    with closing(section.open_bucket(metrics)) as bucket, closing(section.open_fallbacks(bucket, metrics)) as fallbacks:
        fallbacks.probe()
        yield bucket, fallbacks


def new_file(path: str, data: bytes = b"") -> LocalFile:
    """Return a new local file at ``path`` with ``data``, for an upload or a download."""
    with open(path, "wb") as file:
        file.write(data)
    return LocalFile(path)


def check_owner(bucket: Bucket, storage: Any, must_be_ours: bool = False) -> bool:
    """Log the owner of the prefix of ``bucket``; return whether the database in ``storage`` owns it or may take it.

    Waits for S3; BucketError. Raises NotOwner if another database owns the prefix and ``must_be_ours`` is set.
    """
    kind = adapter_for(storage)
    found = standing(bucket, kind, kind.existing_identity())
    if must_be_ours and not found.is_ours:
        raise NotOwner(found.whose)
    logger.log(logging.INFO if found.is_ours else logging.WARNING, "%s", found.whose)
    return found.is_ours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that all commands share."""
    parser.add_argument("-C", "--configure", metavar="FILE", type=Path, required=True, help="the server's zeo.conf")
    parser.add_argument("--storage", metavar="NAME", help="which storage, where there are several")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_max_bandwidth(parser: argparse.ArgumentParser) -> None:
    """Declare the option ``--max-bandwidth``."""
    parser.add_argument(
        "--max-bandwidth",
        metavar="SIZE",
        type=size,
        help="send and receive at most so many bytes a second, such as 20MB, all transfers together",
    )


def limit_bandwidth(section: S3BlobStorageFactory, rate: int | None) -> int:
    """Let all buckets that ``section`` opens from now on keep ``rate`` bytes a second together; None: no limit.

    Return how many transfers to make at a time.
    """
    if rate is not None:
        # Connections that wait for their turn for long are closed by the service.
        threads = min(section.settings.s3_concurrency, max(1, rate // _OF_A_CONNECTION))
        section.settings = replace(section.settings, pace=Bandwidth(rate), s3_concurrency=threads)
    return section.settings.s3_concurrency


def size(text: str) -> int:
    """Return ``text``, the value of an option, as a number of bytes, at least 1KB."""
    try:
        number = stock_datatypes["byte-size"](text)
    except ValueError:
        number = 0
    if number < 1 << 10:  # also a number without its unit, which would keep the command busy without end
        raise argparse.ArgumentTypeError("must be a whole number with KB, MB or GB, at least 1KB, such as 20MB")
    return number


def directory(text: str) -> str:
    """Return ``text``, the value of an option that names a directory."""
    if not text.strip():  # for example from a shell variable that is not set
        raise argparse.ArgumentTypeError("is empty: name a directory")
    return text


def run(name: str, work: Callable[[], int], level: int = logging.INFO) -> int:
    """Run ``work`` of the command ``name`` and return its exit status.

    Expected errors are printed to stderr; log records of ``level`` and above are printed too.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        with _without_size_of_cache():
            return work()
    except BrokenPipeError:
        raise
    except StartRefused:
        return EXIT_ERROR  # its sentence has been logged
    except sqlite3.Error as error:  # from the temporary file, the only SQLite database here
        complain(name, _of_temporary(_directory_of_sqlite(), str(error)))
        return EXIT_ERROR
    except (OSError, CacheDirectoryError) as error:
        complain(name, _of_machine(error))
        return EXIT_ERROR
    except (S3BlobsError, StorageError) as error:
        complain(name, str(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        complain(name, "interrupted; run the same command again, and it continues")
        return 130


def conclude(name: str, report: Report, meanings: dict[str, str], verdict: str, as_json: bool) -> int:
    """Show the ``report`` of the command ``name``; return the exit status of a command that copies blobs."""
    report.show(meanings, verdict, as_json)
    if report.early_end:
        complain(name, report.early_end)
        return EXIT_ERROR
    return EXIT_DAMAGED if report.troubles else EXIT_OK


def complain(name: str, sentence: str) -> None:
    """Print to stderr the reason why the command ``name`` did not do all of its work."""
    print(f"zodb-s3blobs {name}: {sentence}", file=sys.stderr)


@contextmanager
def _without_size_of_cache() -> Iterator[None]:
    """Suppress the log line about the size of a cache during the body: a command's own cache is empty."""
    cache = logging.getLogger("zodb_s3blobs.cache")
    before = cache.level
    cache.setLevel(logging.WARNING)
    try:
        yield
    finally:
        cache.setLevel(before)


def _of_machine(error: OSError | CacheDirectoryError) -> str:
    """Return the sentence for an error of a file of this machine, perhaps of a temporary one."""
    # The error of a scratch cache, which is in the temporary directory, has the system's error as its cause.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    trouble = str(getattr(cause, "strerror", None) or error)
    if trouble.startswith("No usable temporary directory"):
        return f"{trouble}: make room in one of them, or name another one with the environment variable TMPDIR"
    place = str(getattr(cause, "filename", None) or "")
    told = f"{place}: {trouble}" if place else trouble
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        return told
    inside = temporary + os.sep
    is_temporary = place.startswith(inside) if place else cause is error or inside in str(error)
    if getattr(cause, "errno", None) in _FULL and is_temporary:
        return _of_temporary(temporary, told)
    return told if cause is error else str(error)


def _of_temporary(path: str, trouble: str) -> str:
    return (
        f"the temporary directory {path} cannot be used: {trouble}. Make room there, or name another one with the "
        f"environment variable TMPDIR, and run the command again"
    )


def _directory_of_sqlite() -> str:
    """Return the directory of SQLite's temporary files, which without TMPDIR differs from Python's."""
    for name in os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp":
        if name and os.path.isdir(name) and os.access(name, os.W_OK | os.X_OK):
            return name
    return os.getcwd()
