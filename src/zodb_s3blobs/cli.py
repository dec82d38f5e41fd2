"""The ``zodb-s3blobs`` command: finds the subcommand and calls its module.

A subcommand is a module with

- a docstring, whose first line, after the colon, is its line in ``zodb-s3blobs --help``,
- ``add_arguments(parser)``, which declares its options,
- ``run(arguments)``, which does the work, prints an error as one sentence on stderr, and returns the exit status.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from . import __version__
from .commands import adopt, check, demo, export, gc, migrate, status, verify, warm

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "check": check,
    "status": status,
    "migrate": migrate,
    "verify": verify,
    "export": export,
    "gc": gc,
    "adopt": adopt,
    "warm": warm,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default that of the process; return the exit status."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may support ASCII only
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it. Without this, Python fails to flush it at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zodb-s3blobs", description="ZODB blobs in S3, served by ZEO.")
    parser.add_argument("--version", action="version", version=f"zodb-s3blobs {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n")
        summary = summary.partition(": ")[2]
        subparser = subparsers.add_parser(
            name,
            help=summary.rstrip("."),
            description=f"{summary[:1].upper()}{summary[1:]}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser
