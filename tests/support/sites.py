"""A site with a plain FileStorage and its blob directory, as there are many; and the commands that move its blobs."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import transaction
import ZODB
from ZODB.blob import Blob, is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64, z64

from tests.support.forked import Forked, Piped, command
from tests.support.zeo_server import CONFIG, FILESTORAGE, SECTION
from zodb_s3blobs.s3.keys import Keys

KEYS = Keys("1")  # s3-prefix is the name of the storage
SECRET = "test-secret"


def leave_unfinished(path):
    """Leave in the FileStorage's file ``path`` what a kill between vote and finish leaves there."""
    storage = FileStorage(str(path))
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(p64(1000), z64, b"data", "", txn)
    storage.tpc_vote(txn)
    left = path.read_bytes()
    storage.tpc_abort(txn)
    storage.close()
    path.write_bytes(left)


def put(db, name, data):
    """Commit ``data`` as the blob ``name`` of the root."""
    with db.transaction() as connection:
        blob = connection.root().setdefault(name, Blob())
        with blob.open("w") as file:
            file.write(data)


def get(db, name):
    with db.transaction() as connection, connection.root()[name].open() as file:
        return file.read()


def undo(db, number=0):
    """Undo the last transaction but ``number``."""
    db.undo(db.undoLog(0, 100)[number]["id"])
    transaction.commit()


def names(storage):
    """The (oid, tid) of every blob record of all revisions."""
    return [
        (record.oid, record.tid)
        for records in storage.iterator()
        for record in records
        if record.data and is_blob_record(record.data)
    ]


def contents(storage, blobs):
    """(oid, tid) -> bytes, as the storage loads them."""
    return {name: Path(storage.loadBlob(*name)).read_bytes() for name in blobs}


def tree(directory):
    """All that is in a directory: path -> mode, time of the last change, and bytes of a file."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None,
        )
        for path in [Path(directory), *Path(directory).rglob("*")]
    }


def break_disk(path):
    """Make the file unreadable, for root as well where the system has a file that is."""
    path = Path(path)
    if os.path.exists("/proc/self/mem"):
        path.unlink()
        path.symlink_to("/proc/self/mem")  # a regular file, whose first bytes are an error
    else:
        path.chmod(0)


class Site:
    """``Data.fs`` and ``blobs`` in ``directory``; ``wrap``: makes the storage that its database uses of a FileStorage.

    ``revisions`` is (oid, tid) -> bytes of all blobs that the database knows, as of the last `grow`.
    """

    def __init__(self, directory, layout="bushy", wrap=lambda storage: storage):
        self.directory = Path(directory)
        self.data_fs = self.directory / "Data.fs"
        self.blob_dir = self.directory / "blobs"
        FileStorage(str(self.data_fs)).close()  # a new one begins with an empty blob directory of its own layout
        self.blob_dir.mkdir()
        (self.blob_dir / ".layout").write_text(layout)
        self._wrap = wrap

    def open(self):
        """The storage, for whoever closes it."""
        return self._wrap(FileStorage(str(self.data_fs), blob_dir=str(self.blob_dir)))

    def grow(self, large=0, more=0):
        """Years of use: revisions, undo, pack, revisions, undo. ``large``: the size of one; ``more``: small ones."""
        db = ZODB.DB(self.open())
        for turn in range(3):
            for name in "one", "two", "empty":
                put(db, name, b"" if name == "empty" else f"{name} {turn} ".encode() * 50)
        undo(db)
        with db.transaction() as connection:
            del connection.root()["two"]
        db.pack()
        for turn in range(3):
            put(db, "one", f"one after pack {turn} ".encode() * 30)
        undo(db)  # the file of this revision is a copy
        put(db, "three", os.urandom(large or 3000))
        with db.transaction() as connection:
            for number in range(more):
                connection.root()[f"more {number}"] = Blob(f"number {number}".encode())
        db.close()
        self.note()

    def note(self):
        """Look again what the blobs are."""
        storage = self.open()
        self.revisions = contents(storage, names(storage))
        self._paths = {name: Path(storage.fshelper.getBlobFilename(*name)) for name in self.revisions}
        storage.close()

    def undone(self):
        """The (oid, tid) of the revisions that undos made, of which there is one at least."""
        items = self.revisions.items()
        found = [
            (oid, tid)
            for (oid, tid), data in items
            if any(oid == other and earlier < tid and data == old for (other, earlier), old in items)
        ]
        assert found
        return found

    def file(self, oid, tid):
        """The path of a blob's file."""
        return self._paths[oid, tid]

    def files(self):
        """The paths of all of them."""
        return list(self._paths.values())

    def keys(self):
        """The keys of all blobs, sorted."""
        return sorted(KEYS.key(*name) for name in self.revisions)

    def configure(self, s3, bucket, *, base=FILESTORAGE, wrapper="{}", imports="", **options):
        """Write the zeo.conf of a server that does not run; returns its path."""
        section = SECTION.format(
            name="1",
            bucket=bucket,
            endpoint=s3.url,
            dir=self.directory,
            cache="cache",
            options="\n".join(f"{key.replace('_', '-')} {value}" for key, value in options.items()),
            base=base.format(dir=self.directory),
        )
        path = self.directory / "new.conf"
        path.write_text(imports + CONFIG.format(port=1, dir=self.directory, zeo="", storages=wrapper.format(section)))
        return path


class Tool:
    """``zodb-s3blobs`` in processes of its own; a fixture ends what a test left running with `kill`."""

    def __init__(self):
        self._running = []

    def begin(self, name, config, *arguments, **options):
        """Start the command ``name``; ``options`` are those of Popen.

        With others than file descriptors it is a new interpreter; otherwise it has all imported as it begins.
        """
        line = [name, "-C", str(config), *map(str, arguments)]
        if options.keys() <= {"stdin", "stdout", "stderr"}:
            process = Piped(command, line, **options)
        else:
            line = [sys.executable, "-m", "zodb_s3blobs", *line]
            process = subprocess.Popen(
                line, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
            )
        self._running.append(process)
        return process

    def end(self, process, status=0):
        """Wait for the end of what was started; returns what it printed and what it said on stderr."""
        out, err = process.communicate(timeout=120)
        return self._checked(process.returncode, out, err, status)

    def _checked(self, returned, out, err, status):
        assert returned == status, (out, err)
        assert SECRET not in out + err
        assert "Traceback" not in err
        return out, err

    def __call__(self, name, config, *arguments, status=0):
        """Run the command ``name`` from the beginning to the end."""
        returned, out, err = run(name, "-C", str(config), *map(str, arguments))
        return self._checked(returned, out, err, status)

    def kill(self):
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.communicate()


def run(*arguments, hosts=None):
    """Run ``zodb-s3blobs`` in a process that has all imported; returns its exit status, stdout and stderr.

    ``hosts``: as `command`'s.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / name for name in ("out", "err")]
        process = Forked(command, arguments, hosts, stdout=files[0], stderr=files[1])
        try:
            process.wait(120)
        finally:
            process.kill()
        return process.returncode, *(file.read_text() for file in files)


def sentence(err):
    """The one line on stderr in which a command ends, without what is merely logged."""
    lines = [line for line in err.splitlines() if line and not line.startswith(("INFO:", "WARNING:"))]
    assert len(lines) == 1, err
    return lines[0]
