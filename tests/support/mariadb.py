"""A MariaDB server of the tests' own, on a socket in a temporary directory.

Needs MariaDB's programs (Debian's package ``mariadb-server``) and the driver PyMySQL.
"""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.support.accounts import account, as_account
from tests.support.zeo_server import free_address

#: The settings that the manual tells to make; the tests' servers have them.
CONFIG = Path(__file__).parents[2] / "zeo-configs" / "mariadb.cnf"

#: The account of applications, which may do all in their database and nothing with the server.
USER, PASSWORD = "zodb", "the-password-of-the-database"


def programs():
    """The path of each program, by name; None for what is not installed."""
    directories = f"{os.environ.get('PATH', '')}:/usr/sbin"
    names = "mariadbd", "mariadb-install-db", "mariadb-dump", "mariadb"
    return {name: shutil.which(name, path=directories) for name in names}


def missing():
    """Why no server can be started here; None if one can."""
    if None in programs().values():
        return "MariaDB is not installed (Debian's package mariadb-server)"
    if find_spec("pymysql") is None:
        return "PyMySQL is not installed (pip install PyMySQL)"
    if os.geteuid() == 0 and not account("mysql"):
        return "MariaDB does not run as root, and there is no account mysql for it"
    return None


class MariaDB:
    """A server; with `database` new databases.

    ``original``: a stopped one, of whose files it gets a copy. ``options``: more options of mariadbd.
    """

    product = "mariadb"

    def __init__(self, original=None, options=()):
        self._programs = programs()
        # Short: the path of a socket has 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="my", dir="/tmp"))
        self._numbers = itertools.count(1)
        self._config = self.directory / CONFIG.name  # where the server's account can read it
        self._config.write_text(CONFIG.read_text())
        self._config.chmod(0o644)
        self._as_whom = as_account("mysql", self.directory)
        self.directory.chmod(0o755)
        self._options = options
        self._process = None
        if original is not None:
            subprocess.run(["cp", "-a", original.data, self.data], check=True, timeout=120)
            return
        self._run(
            "mariadb-install-db",
            f"--datadir={self.data}",
            f"--tmpdir={self.directory}",  # servers that begin at the same time mix their files up in the system's
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=0",
        )

    @property
    def data(self):
        """The directory of its files."""
        return self.directory / "data"

    @property
    def socket(self):
        """The socket on which it listens."""
        return self.directory / "socket"

    def _run(self, program, *arguments, **options):
        command = [*self._as_whom, self._programs[program], "--no-defaults", *arguments]
        return subprocess.run(command, check=True, cwd="/", timeout=120, **{"stdout": subprocess.DEVNULL, **options})

    def start(self):
        """Start it, and wait until it answers."""
        command = [
            *self._as_whom,
            self._programs["mariadbd"],
            f"--defaults-file={self._config}",
            f"--datadir={self.data}",
            f"--tmpdir={self.directory}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'pid'}",
            f"--log-error={self.directory / 'log'}",
            "--skip-networking",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=0",
            "--max-connections=300",
            *self._options,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.05)

    def _answers(self):
        import pymysql

        try:
            self.execute(None, "SELECT 1")
        except pymysql.OperationalError:
            return False
        return True

    def copy(self, options=()):
        """Another server with all that this one has, which must be stopped; the other one is, too."""
        return MariaDB(self, options)

    def stop(self):
        """Stop it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(60)
            self._process = None

    def remove(self):
        """Stop it and remove its files."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def section(self, name):
        """The section of RelStorage's configuration that connects to the database ``name``."""
        lines = "\n".join(f" {key} {value}" for key, value in self.parameters(name).items())
        return f"<mysql>\n driver PyMySQL\n{lines}\n </mysql>"

    def parameters(self, name):
        """What RelStorage's adapter needs to connect to the database ``name``."""
        return {"unix_socket": str(self.socket), "user": USER, "passwd": PASSWORD, "db": name}

    def database(self, template=None):
        """The name of a new database, a copy of ``template`` if that is given."""
        name = f"test{next(self._numbers)}"
        self._create(name)
        if template:
            self._run("mariadb", *self._as_root, name, input=self.dump(template))
        return name

    def _create(self, name):
        self.execute(None, f"CREATE DATABASE {name}")
        self.execute(None, f"GRANT ALL ON {name}.* TO {USER}@localhost IDENTIFIED BY '{PASSWORD}'")

    def dump(self, name):
        """A dump of the database ``name``, with its procedures."""
        return self._run("mariadb-dump", *self._as_root, "--routines", name, stdout=subprocess.PIPE).stdout

    def restore(self, name, dump):
        """Put what ``dump`` has in the place of the database ``name``."""
        self.execute(None, f"DROP DATABASE {name}")
        self._create(name)
        self._run("mariadb", *self._as_root, name, input=dump)

    def make_anew(self, name, table):
        """Have the server make a table anew, with what it contains, later than it was made before."""
        before = self._made(name, table)
        while self._made(name, table) == before:  # in whole seconds
            self.execute(name, f"OPTIMIZE TABLE {table}")

    def _made(self, name, table):
        return self.execute(
            name,
            "SELECT create_time FROM information_schema.tables "
            f"WHERE table_schema = '{name}' AND table_name = '{table}'",
        )

    @property
    def _as_root(self):
        return f"--socket={self.socket}", "--user=root"

    def connections(self, name):
        """How many connections there are to the database ``name``."""
        return self.execute(None, f"SELECT count(*) FROM information_schema.processlist WHERE db = '{name}'")[0][0]

    def end_restoring(self, name):
        """End the connections that restore a transaction in the database ``name``; return how many these were."""
        found = self.execute(
            None,
            "SELECT id FROM information_schema.processlist "
            "JOIN information_schema.innodb_trx ON trx_mysql_thread_id = id "
            f"WHERE db = '{name}' AND trx_rows_locked > 0",
        )
        for [number] in found:
            self.execute(None, f"KILL {number}")
        return len(found)

    def execute(self, name, statement):
        """Run one statement in the database ``name``; return its rows."""
        import pymysql

        connection = pymysql.connect(unix_socket=str(self.socket), user="root", database=name, autocommit=True)
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()


class Primary(MariaDB):
    """A server that another one can replicate."""

    def __init__(self):
        self._address = free_address()
        host, port = self._address
        network = "--skip-networking=0", f"--bind-address={host}", f"--port={port}"
        super().__init__(options=["--server-id=1", "--log-bin=log", *network])

    def replica(self):
        """A running server that has replicated all that this one has, and goes on."""
        replica = MariaDB(options=["--server-id=2"])
        replica.start()
        host, port = self._address
        replica.execute(
            None,
            f"CHANGE MASTER TO MASTER_HOST = '{host}', MASTER_PORT = {port}, MASTER_USER = 'root', "
            "MASTER_USE_GTID = slave_pos",
        )
        replica.execute(None, "START SLAVE")
        [[position]] = self.execute(None, "SELECT @@gtid_binlog_pos")
        assert replica.execute(None, f"SELECT MASTER_GTID_WAIT('{position}', 60)") == ((0,),)
        return replica
