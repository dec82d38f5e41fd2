"""Databases of RelStorage, on SQLite and on servers of the tests' own, PostgreSQL and MariaDB; and storages on them."""

import atexit
import functools
import os
import shutil

import pytest
from ZODB.config import databaseFromString, storageFromString

from tests.support import mariadb, postgresql
from tests.support.speed import slow_but
from tests.support.zeo_server import SECTION

#: The databases that tests of all kinds and with and without history run on.
KINDS = ["sqlite-history", "sqlite-free", "postgresql-history", "postgresql-free", "mariadb-free"]

_SERVERS = {"postgresql": (postgresql.PostgreSQL, postgresql.missing), "mariadb": (mariadb.MariaDB, mariadb.missing)}


def kinds(*among):
    """Return these kinds as parameters: slow is what needs a database server, and a second kind on SQLite."""
    first = next((kind for kind in among if kind.startswith("sqlite")), None)
    return slow_but(*filter(None, [first]), of=among)


IMPORTS = "%import zodb_s3blobs\n%import relstorage\n"

RELSTORAGE = """
  <relstorage>
    keep-history {keep_history}
    commit-lock-timeout 60
    {options}
    {adapter}
  </relstorage>
"""


@functools.cache
def server_of(product):
    """The server of this process for ``product``; started when it is first asked for, removed with the process."""
    cls, _ = _SERVERS[product]
    server = cls()
    atexit.register(server.remove)
    server.start()
    return server


def needs(kind):
    """Skip the test where a database of this ``kind`` cannot be had; with CI set, it fails instead."""
    _, missing = _SERVERS.get(kind.partition("-")[0], (None, lambda: None))
    reason = missing()
    if reason is not None and not os.environ.get("CI"):
        pytest.skip(reason)
    assert reason is None, reason


def keys(options):
    """The lines of a section that set ``options``, whose names have underscores."""
    return "\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())


class Database:
    """A new database; ``kind`` is one of `KINDS`.

    ``name``: the data-dir, or the name in the server. ``server``: one that is not this process's.
    """

    def __init__(self, kind, directory, name=None, server=None):
        self.kind = kind
        product, _, history = kind.partition("-")
        self.sqlite, self.history = product == "sqlite", history == "history"
        self.directory = directory
        self.server = None if self.sqlite else server or server_of(product)
        self.name = name or (str(directory / "sqlite") if self.sqlite else self.server.database())

    def copy(self):
        """A copy of it that knows nothing of being one; nobody may use this one meanwhile."""
        if not self.sqlite:
            return Database(self.kind, self.directory, self.server.database(template=self.name), self.server)
        shutil.copytree(self.name, self.name + "-copy")
        return Database(self.kind, self.directory, self.name + "-copy")

    def section(self, **options):
        """Its ``<relstorage>`` section; ``options``: more keys, with underscores."""
        adapter = f"<sqlite3>\n data-dir {self.name}\n </sqlite3>" if self.sqlite else self.server.section(self.name)
        return RELSTORAGE.format(keep_history=str(self.history).lower(), options=keys(options), adapter=adapter)


class Application:
    """What an application has: storages and databases with blobs in ``bucket`` of the server ``s3``."""

    def __init__(self, database, s3, bucket, directory):
        self.database, self.s3, self.bucket, self.directory = database, s3, bucket, directory

    def config(self, cache="cache", name="1", **options):
        """The ``<s3blobstorage>`` section around it."""
        return SECTION.format(
            name=name,
            bucket=self.bucket,
            endpoint=self.s3.url,
            dir=self.directory,
            cache=cache,
            options=keys(options),
            base=self.database.section(),
        )

    def storage(self, **options):
        """A storage that is opened from that section."""
        return storageFromString(IMPORTS + self.config(**options))

    def db(self, **options):
        """A ZODB.DB with such a storage."""
        return databaseFromString(f"{IMPORTS}<zodb>\n{self.config(**options)}\n</zodb>")
