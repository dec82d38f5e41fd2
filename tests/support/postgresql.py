"""A PostgreSQL server of the tests' own, on a socket in a temporary directory.

Needs PostgreSQL's programs (Debian's package ``postgresql``) and the driver psycopg2.
"""

import glob
import itertools
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.support.accounts import account, as_account

PORT = 5432  # of the socket's name only: the server does not listen to the network


def programs():
    """The directory of PostgreSQL's programs, None if there is none."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), key=lambda path: float(path.split("/")[4]))
    path = found[-1] if found else shutil.which("postgres")
    return Path(path).parent if path else None


def missing():
    """Why no server can be started here; None if one can."""
    if programs() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if find_spec("psycopg2") is None:
        return "psycopg2 is not installed (pip install psycopg2-binary)"
    if os.geteuid() == 0 and not account("postgres"):
        return "PostgreSQL does not run as root, and there is no account postgres for it"
    return None


class PostgreSQL:
    """A running server; with `database` new databases.

    ``original``: a stopped one, of whose files it gets a copy.
    """

    product = "postgresql"

    def __init__(self, original=None):
        self._programs = programs()
        # Short: the path of a socket has 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        self._numbers = itertools.count(1)
        self._as_whom = as_account("postgres", self.directory)
        self.directory.chmod(0o755)
        if original is not None:
            subprocess.run(["cp", "-a", original._data, self._data], check=True, timeout=120)
            return
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", self._data)

    @property
    def _data(self):
        return self.directory / "data"

    def _run(self, program, *arguments):
        command = [*self._as_whom, self._programs / program, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)

    def start(self):
        """Start it, and wait until it answers."""
        options = (
            f"-c listen_addresses= -c unix_socket_directories={self.directory} -c fsync=off -c max_connections=300"
        )
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-l", self.directory / "log", "-o", options)

    def copy(self):
        """Another server with all that this one has, which must be stopped; the other one is, too."""
        return PostgreSQL(self)

    def stop(self):
        """Stop it at once."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", self._data)

    def remove(self):
        """Stop it and remove its files."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def dsn(self, name):
        """How to connect to the database ``name``."""
        return f"dbname={name} host={self.directory} port={PORT} user=postgres"

    def section(self, name):
        """The section of RelStorage's configuration that connects to the database ``name``."""
        return f"<postgresql>\n driver psycopg2\n dsn {self.dsn(name)}\n </postgresql>"

    def database(self, template=None):
        """The name of a new database, a copy of ``template`` if that is given."""
        name = f"test{next(self._numbers)}"
        self.execute("postgres", f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return name

    def connections(self, name):
        """How many connections there are to the database ``name``."""
        return self.execute("postgres", f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")[0][0]

    def end_restoring(self, name):
        """End the connections that restore a transaction in the database ``name``; return how many these were."""
        return self.execute(
            name,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks "
            "WHERE locktype = 'advisory' AND classid = 1395868226",
        )[0][0]

    def execute(self, name, statement):
        """Run one statement in the database ``name``; return its rows, if it has any."""
        import psycopg2

        connection = psycopg2.connect(self.dsn(name))
        try:
            connection.autocommit = True  # databases cannot be made in a transaction
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else None
        finally:
            connection.close()
