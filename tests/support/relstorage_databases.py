"""Databases of RelStorage: on SQLite, and on a PostgreSQL server of the tests' own; and storages on them."""

import atexit
import functools
import os
import shutil

import pytest
from ZODB.config import databaseFromString, storageFromString

from tests.support.postgresql import PostgreSQL, missing
from tests.support.speed import slow_but
from tests.support.zeo_server import SECTION

#: The databases that tests of both kinds and with and without history run on.
KINDS = ["sqlite-history", "sqlite-free", "postgresql-history", "postgresql-free"]


def kinds(*among):
    """Return these kinds as parameters: slow is what needs a PostgreSQL server, and a second kind on SQLite."""
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
def postgresql():
    """The server of this process; started when it is first asked for, removed with the process."""
    server = PostgreSQL()
    atexit.register(server.remove)
    server.start()
    return server


def needs(kind):
    """Skip the test where a database of this ``kind`` cannot be had; with CI set, it fails instead."""
    reason = missing() if kind.startswith("postgresql") else None
    if reason is not None and not os.environ.get("CI"):
        pytest.skip(reason)
    assert reason is None, reason


def keys(options):
    """The lines of a section that set ``options``, whose names have underscores."""
    return "\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())


class Database:
    """A new database; ``kind`` is one of `KINDS`.

    ``name``: the data-dir, or the name in the PostgreSQL server.
    """

    def __init__(self, kind, directory, name=None):
        self.kind = kind
        self.sqlite, self.history = kind.startswith("sqlite"), kind.endswith("history")
        self.directory = directory
        self.name = name or (str(directory / "sqlite") if self.sqlite else postgresql().database())

    def copy(self):
        """A copy of it that knows nothing of being one; nobody may use this one meanwhile."""
        if not self.sqlite:
            return Database(self.kind, self.directory, postgresql().database(template=self.name))
        shutil.copytree(self.name, self.name + "-copy")
        return Database(self.kind, self.directory, self.name + "-copy")

    def section(self, **options):
        """Its ``<relstorage>`` section; ``options``: more keys, with underscores."""
        if self.sqlite:
            adapter = f"<sqlite3>\n data-dir {self.name}\n </sqlite3>"
        else:
            adapter = f"<postgresql>\n driver psycopg2\n dsn {postgresql().dsn(self.name)}\n </postgresql>"
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
