"""What the commands that read a zeo.conf share: options, exit statuses, and the sentence in which an error ends."""

import argparse
import logging
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from ZODB.POSException import StorageError

from .blobdir import BlobDirectoryError
from .bucket import BucketError
from .config import StartRefused
from .garbage import Refused
from .lease import NotOwner
from .zeoconf import ConfigurationError

#: The work was done and all is well; it could not be done; blobs are missing or damaged; nothing but garbage was found.
WELL, FAILED, DAMAGED, GARBAGE = 0, 1, 3, 4

_EXPECTED = (
    ConfigurationError,
    BlobDirectoryError,
    BucketError,
    NotOwner,
    Refused,
    StorageError,
    OSError,
    sqlite3.Error,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that all of them have."""
    parser.add_argument("-C", "--configure", metavar="FILE", type=Path, required=True, help="the server's zeo.conf")
    parser.add_argument("--storage", metavar="NAME", help="which storage, where there are several")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(name: str, work: Callable[[], int], level: int = logging.INFO) -> int:
    """What ``work``, that of the command ``name``, returns; an error is said on stderr. Logs from ``level`` on."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        return work()
    except BrokenPipeError:
        raise
    except StartRefused:
        return FAILED  # its sentence has been logged
    except _EXPECTED as error:
        print(f"zodb-s3blobs {name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"zodb-s3blobs {name}: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
