"""The databases that RelStorage keeps its records in: what no copy of a database has, and locks in it.

No class or module of RelStorage is changed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import zc.lockfile
from relstorage.adapters.mysql import MySQLAdapter
from relstorage.adapters.postgresql import PostgreSQLAdapter
from relstorage.adapters.sqlite.adapter import Sqlite3Adapter

from ..boot_id import boot_id
from .adapter import UnsuitableBase

#: The number of our lock in PostgreSQL. RelStorage's locks are in another number space.
_LOCK = "1395868226, 1"

#: The name of our lock in MariaDB, where all databases of a server share the names.
_NAMED_LOCK = "CONCAT('s3blobs.', MD5(DATABASE()))"

#: MariaDB's number of the error that a row lock was not granted in time.
_LOCK_WAIT_TIMEOUT = 1205


class SqlDatabase(Protocol):
    """A database of RelStorage. Any thread may call."""

    def require_supported(self) -> None:
        """Raise `UnsuitableBase` if the server of the database is not supported. Waits for the server."""
        return

    def identity(self) -> str:
        """Return the present identity, which no other database and no copy has."""

    def try_lock(self) -> AbstractContextManager[bool]:
        """Try to lock the database for the body, to delete; the value of the body says whether that succeeded."""

    def try_lock_in(self, connection: Any) -> AbstractContextManager[bool]:
        """Try to lock the database for the transaction of ``connection``, to restore; the value as of `try_lock`."""


def database_of(adapter: Any) -> SqlDatabase:
    """Return the database that RelStorage's ``adapter`` connects to. Raises `UnsuitableBase`."""
    if isinstance(adapter, PostgreSQLAdapter):
        return PostgreSQL(adapter)
    if isinstance(adapter, MySQLAdapter):
        return MariaDB(adapter)
    if isinstance(adapter, Sqlite3Adapter):
        return SQLite(adapter)
    raise UnsuitableBase(
        "s3blobstorage can wrap a relstorage with sqlite3, postgresql or mysql only: for other databases there is no "
        "reliable way yet to distinguish a database from a copy. Use one of these, or RelStorage's own blobs"
    )


def lasting(identity: str) -> str:
    """Return the part of ``identity`` that a restart, of a database server or of SQLite's machine, does not change."""
    return re.sub(
        r"(?<=PostgreSQL )started [^,]+, |(?<=MariaDB )on .*, (?=tables made )|(?<=SQLite )on [^,]+, ", "", identity
    )


class PostgreSQL(SqlDatabase):
    """Identity and locks of a PostgreSQL database. Any thread may call; each call opens its own connection."""

    def __init__(self, adapter: Any) -> None:
        self._connmanager = adapter.connmanager

    def identity(self) -> str:
        """Return an identity made of the server's start time, the database and the table in it.

        A copy on this server has other tables, and a copy on another server, even of the whole server, has another
        start time.
        """
        with self._cursor() as cursor:
            cursor.execute(
                "SELECT to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), "
                "oid, 'object_state'::regclass::oid FROM pg_database WHERE datname = current_database()"
            )
            started, database, table = cursor.fetchone()
        return f"PostgreSQL started {started}, database {database}, table {table}"

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Try to lock the database for the body; yield whether that succeeded."""
        with self._cursor() as cursor:
            cursor.execute(f"SELECT pg_try_advisory_lock({_LOCK})")
            [locked] = cursor.fetchone()
            # The session owns the lock until it ends. An idle transaction could be ended by the server.
            cursor.connection.commit()
            yield locked

    @contextmanager
    def try_lock_in(self, connection: Any) -> Iterator[bool]:
        """Try to lock the database until the transaction of ``connection`` ends; yield whether that succeeded.

        That transaction commits only if it still has the lock; another connection could lose the lock before.
        """
        connection.cursor.execute(f"SELECT pg_try_advisory_xact_lock({_LOCK})")
        [locked] = connection.cursor.fetchone()
        yield locked

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        connection, cursor = self._connmanager.open()
        try:
            yield cursor
        finally:
            self._connmanager.rollback_and_close(connection, cursor)


class MariaDB(SqlDatabase):
    """Identity and locks of a MariaDB database. Any thread may call; each call opens its own connection.

    Two locks keep restoring and deleting apart. A transaction that is restored has RelStorage's commit lock, which is a
    row lock, from its beginning to its end, and waits until the named lock is free. A deletion takes the named lock,
    which its session owns, and waits until the commit lock is free.
    """

    def __init__(self, adapter: Any) -> None:
        self._connmanager = adapter.connmanager
        self._versions = adapter.version_detector
        self._keeps_history = adapter.keep_history

    def require_supported(self) -> None:
        if self._keeps_history:
            raise UnsuitableBase(
                "RelStorage cannot create the tables of a history-preserving database in MariaDB: set keep-history "
                "false in this relstorage, or use postgresql"
            )
        with self._cursor() as cursor:
            version = self._versions.get_version(cursor)
            later = self._versions.requires_values_upsert_alias(cursor)
            # A procedure keeps the mode in which it was created.
            cursor.execute(
                "SELECT sql_mode FROM information_schema.routines "
                "WHERE routine_schema = DATABASE() AND routine_name = 'make_tid_for_epoch'"
            )
            [mode] = cursor.fetchone() or [""]
        if "MariaDB" not in version:
            raise UnsuitableBase(
                f"s3blobstorage has been tested with MariaDB and not with MySQL, and the server of this relstorage "
                f"reports version {version}: use MariaDB or postgresql"
            )
        if later:
            raise UnsuitableBase(
                f"RelStorage takes MariaDB {version} for a MySQL of that number, whose statements MariaDB refuses: set "
                f"version and sql_mode of the server as in zeo-configs/mariadb.cnf, and restart the server"
            )
        if "TIME_ROUND_FRACTIONAL" not in _text(mode):
            raise UnsuitableBase(
                "The procedure make_tid_for_epoch of this MariaDB database cuts seconds where RelStorage counts on "
                "rounding, so that some tids are a minute early: set sql_mode of the server as in "
                "zeo-configs/mariadb.cnf, restart the server, and drop the procedure, which RelStorage creates again"
            )

    def identity(self) -> str:
        """Return an identity made of the server, its start time, a table's creation time and the database's name.

        A copy on this server has another name or other tables, and a copy on another server, even of all its files,
        has another host, directory or start time.
        """
        with self._cursor() as cursor:
            # Both times of a statement are that of its beginning, so their difference is exact.
            cursor.execute(
                "SELECT FROM_UNIXTIME(UNIX_TIMESTAMP() - CAST(variable_value AS INTEGER)), @@hostname, @@datadir, "
                "(SELECT create_time FROM information_schema.tables "
                "WHERE table_schema = DATABASE() AND table_name = 'commit_row_lock'), DATABASE() "
                "FROM information_schema.global_status WHERE variable_name = 'UPTIME'"
            )
            started, host, directory, made, database = map(_text, cursor.fetchone())
        return f"MariaDB on {host} in {directory} started {started}, tables made {made}, database {database}"

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Try to lock the database for the body; yield whether that succeeded."""
        with self._cursor() as cursor:
            cursor.execute(f"SELECT GET_LOCK({_NAMED_LOCK}, 0)")
            [locked] = cursor.fetchone()
            yield bool(locked) and self._waited_for_commit_lock(cursor)

    def _waited_for_commit_lock(self, cursor: Any) -> bool:
        # Not for long: a transaction that is restored may be waiting for the named lock.
        cursor.execute("SET SESSION innodb_lock_wait_timeout = 5")
        try:
            cursor.execute("SELECT tid FROM commit_row_lock FOR UPDATE")
            cursor.fetchall()
        except self._connmanager.driver.lock_exceptions as error:
            if _LOCK_WAIT_TIMEOUT not in error.args:
                raise
            return False
        finally:
            cursor.connection.rollback()
        return True

    @contextmanager
    def try_lock_in(self, connection: Any) -> Iterator[bool]:
        """Try to lock the database until the transaction of ``connection`` ends; yield whether that succeeded."""
        connection.cursor.execute("SELECT tid FROM commit_row_lock FOR UPDATE")  # RelStorage has taken it already
        connection.cursor.fetchall()
        # The named lock is not kept: a deletion that begins from now on waits for the commit lock.
        connection.cursor.execute(f"SELECT GET_LOCK({_NAMED_LOCK}, 1)")
        [locked] = connection.cursor.fetchone()
        if locked:
            connection.cursor.execute(f"SELECT RELEASE_LOCK({_NAMED_LOCK})")
            connection.cursor.fetchall()
        yield bool(locked)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        connection, cursor = self._connmanager.open(isolation=self._connmanager.isolation_store)
        try:
            yield cursor
        finally:
            self._connmanager.rollback_and_close(connection, cursor)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)


class SQLite(SqlDatabase):
    """Identity and lock of an SQLite database, a file that only processes of one machine use."""

    def __init__(self, adapter: Any) -> None:
        self._path = adapter.connmanager.path

    def identity(self) -> str:
        """Return an identity made of this machine's boot, and the file's device and inode."""
        status = os.stat(self._path)
        return f"SQLite on {boot_id()}, device {status.st_dev}, inode {status.st_ino}"

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Try to lock the database for the body; yield whether that succeeded."""
        try:
            lock = zc.lockfile.LockFile(f"{self._path}.s3blobs.lock")
        except zc.lockfile.LockError:
            yield False
            return
        try:
            yield True
        finally:
            lock.close()

    def try_lock_in(self, connection: Any) -> AbstractContextManager[bool]:
        """Try to lock the database for the body. The lock need not be the connection's: both end with this process."""
        return self.try_lock()
