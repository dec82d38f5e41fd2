"""The commands' reader of the server's own zeo.conf."""

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from ZEO.runzeo import ZEOOptions

from ..bases import open_base
from ..config import S3BlobStorageFactory
from ..errors import S3BlobsError


class ConfigurationError(S3BlobsError):
    """The configuration does not fit the command; the message says why, and what to do."""


@dataclass
class Served:
    """A storage in a zeo.conf; ``section``: the ``<s3blobstorage>`` that it is or contains."""

    opener: Any
    section: S3BlobStorageFactory

    def open_read_only(self) -> Any:
        """Open and return the storage beside a running server, with all configured wrappers, but without blobs.

        Raises ConfigurationError and UnsuitableBase if that is impossible.
        """
        databases = list(_databases(self.section.config.base))
        if not all(hasattr(database, "read_only") for database in databases):
            raise ConfigurationError(
                "the storage inside s3blobstorage cannot be opened beside a running server: only a filestorage can, "
                "by itself, in a wrapper, or as both base and changes of a demostorage"
            )
        self.check_database_exists()
        for database in databases:
            database.read_only = True
        try:
            return open_base(lambda: self._open(self.opener))
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"the SQLite database inside s3blobstorage cannot be opened: {error}; check data-dir, and whether this "
                f"command's user may read and write there"
            ) from None

    def check_database_exists(self) -> None:
        """Raise ConfigurationError if a file of the database is missing: no command may create an empty one."""
        for database in _databases(self.section.config.base):
            path = _file_of(database)
            if path is None:
                continue
            if not os.path.exists(path):
                raise ConfigurationError(
                    f"there is no database at {path}: correct the path in the section inside s3blobstorage, or restore "
                    f"the file"
                )
            if hasattr(database, "create"):
                database.create = False  # `create true` would empty it

    def _open(self, opener: Any) -> Any:
        if opener is self.section:
            return opener.config.base.open()
        # A wrapper opens its base itself: replace the s3blobstorage inside by the base of that.
        inside = opener.config.base
        opener.config.base = SimpleNamespace(open=lambda: self._open(inside))
        try:
            return opener.open()
        finally:
            opener.config.base = inside


def find(path: Path, name: str | None = None) -> Served:
    """Return the storage ``name`` of the file ``path``, by default the only one with an ``<s3blobstorage>``.

    Raises ConfigurationError, with runzeo's own words if runzeo refuses the file.
    """
    ours = all_in(path)
    if name is None and len(ours) == 1:
        return next(iter(ours.values()))
    if name in ours:
        return ours[name]
    if not ours:
        raise ConfigurationError(
            f"{path} has no storage that is an <s3blobstorage>, by itself or in a wrapper such as zlibstorage: name "
            f"the zeo.conf of the server with -C"
        )
    wrong = "has several storages with" if name is None else f"has no storage {name!r} with an"
    raise ConfigurationError(f"{path} {wrong} <s3blobstorage>: name one of these with --storage: {', '.join(ours)}")


def all_in(path: Path) -> dict[str, Served]:
    """Return the storages of the file ``path`` with an ``<s3blobstorage>``, by their names. Raises `find`'s errors."""
    if not os.path.isfile(path):  # also if the directory may not be read
        raise ConfigurationError(f"there is no file {path} for this user: name the zeo.conf of the server with -C")
    options = _Options(path)
    try:
        options.realize(["-C", str(path)], doc="See runzeo --help.")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{path}, or a file that it includes, is not in UTF-8 (line {line}): save it in that encoding"
        ) from None
    found = {storage.name: (storage, _inside(storage)) for storage in options.storages}
    return {name: Served(opener, section) for name, (opener, section) in found.items() if section is not None}


class _Options(ZEOOptions):
    #: Commands do not write to the server's log: their user may lack the permission.
    logsectionname = None

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def usage(self, msg: object) -> NoReturn:
        """Raise ConfigurationError, in place of the end of the process: a monitor tells exit statuses apart."""
        raise ConfigurationError(f"{self._path}: {' '.join(str(msg).split())}")


def _inside(opener: Any) -> S3BlobStorageFactory | None:
    while opener is not None and not isinstance(opener, S3BlobStorageFactory):
        opener = getattr(opener.config, "base", None)
    return opener


def _file_of(database: Any) -> str | None:
    """Return the path of the file with the records of a filestorage or of RelStorage's SQLite; None for others."""
    adapter = getattr(database, "adapter", None)
    directory = getattr(adapter.config, "data_dir", None) if adapter is not None else None
    return os.path.join(directory, "main.sqlite3") if directory else getattr(database, "path", None)


def _databases(opener: Any) -> Iterator[Any]:
    """Yield the configurations of the storages with the records of ``opener``, without their wrappers.

    None stands for a part of a demostorage that has no section and is in the server's memory.
    """
    config = opener.config
    if hasattr(config, "factories"):  # a demostorage
        for factory in config.factories:
            yield from _databases(factory)
        yield from [None] * (2 - len(config.factories))
    elif getattr(config, "base", None) is not None:
        yield from _databases(config.base)
    else:
        yield config
