"""ZODB's blob directories: found and read in both layouts, made, refused, and gone while they are open."""

import errno
import fcntl
import os
import signal
import stat
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

from tests.support.sites import Site, break_disk, contents, names, tree
from zodb_s3blobs.blobdir import BlobDirectory, BlobDirectoryError

LAYOUTS = pytest.mark.parametrize("layout", ["bushy", "lawn"])
NOBODY = 65534


class Memory:
    """What a blob is written into."""

    def __init__(self, data=b""):
        self.data = bytearray(data)

    def write_at(self, data, position):
        self.data[position : position + len(data)] = data


@pytest.fixture
def site(tmp_path):
    """Makes a site that has grown; its blob directory has the ``layout``."""

    def make(layout="bushy", **options):
        site = Site(tmp_path, layout)
        site.grow(**options)
        return site

    return make


def found(directory):
    """What `files` finds: (oid, tid) -> bytes; and the foreign files, by their path in the directory."""
    foreign = []
    blobs = {}
    for file in directory.files(foreign.append):
        assert file.size == os.path.getsize(file.path)
        assert (file.oid, file.tid) not in blobs
        blobs[file.oid, file.tid] = Path(file.path).read_bytes()
    return blobs, sorted(os.path.relpath(path, directory.path) for path in foreign)


@contextmanager
def without_permission(path):
    """While this process may not read the directory ``path``."""
    if os.geteuid() == 0:
        path.chmod(0o700)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(0)
        try:
            yield
        finally:
            path.chmod(mode)


# Reading


@LAYOUTS
@pytest.mark.parametrize("marker", ["as it was", "lost"])
def test_every_revision_of_a_directory_that_a_filestorage_made_is_found_and_read(site, layout, marker):
    """Without .layout as well: copies of a directory made with `*` have none."""
    made = site(layout, large=3 << 20)
    assert (made.blob_dir / "0x01").exists() == (layout == "lawn")
    if marker == "lost":
        (made.blob_dir / ".layout").unlink()
    before = tree(made.blob_dir)
    directory = BlobDirectory(str(made.blob_dir))
    assert len(made.revisions) > 6
    for name, data in made.revisions.items():
        assert Path(directory.find(*name)).read_bytes() == data
        target = Memory()
        assert directory.copy(*name, target)
        assert target.data == data
    assert found(directory) == (made.revisions, [])
    assert tree(made.blob_dir) == before


@pytest.mark.parametrize("folder", ["@eaDir", ".snapshot", "lost+found"])
def test_a_lawn_without_its_marker_is_one_whatever_other_folders_are_in_it(site, folder):
    made = site("lawn")
    for file in made.files():
        (file.parent / folder).mkdir(exist_ok=True)
    (made.blob_dir / ".layout").unlink()
    directory = BlobDirectory(str(made.blob_dir))
    assert found(directory)[0] == made.revisions
    assert all(directory.find(*name) for name in made.revisions)


@LAYOUTS
def test_what_is_not_there_is_not_found(site, layout):
    made = site(layout)
    directory = BlobDirectory(str(made.blob_dir))
    (oid, tid), *_ = made.revisions
    for name in (oid, p64(1)), (p64(1 << 40), tid):
        target = Memory(b"as it was")
        assert directory.find(*name) is None
        assert not directory.copy(*name, target)
        assert target.data == b"as it was"
    # ZODB would not open that either.
    file = made.file(oid, tid)
    file.unlink()
    file.mkdir()
    assert directory.find(oid, tid) is None


@LAYOUTS
def test_a_blob_behind_a_symbolic_link_is_read(site, layout, tmp_path):
    """Large directories are spread over several disks like that."""
    made = site(layout)
    (oid, tid), *_ = made.revisions
    file = made.file(oid, tid)
    folder = file.parent
    folder.rename(tmp_path / "other disk")
    folder.symlink_to(tmp_path / "other disk")
    directory = BlobDirectory(str(made.blob_dir))
    target = Memory()
    assert directory.copy(oid, tid, target)
    assert target.data == made.revisions[oid, tid]


def test_what_is_no_blob_is_foreign_and_what_is_temporary_is_passed_over(site):
    made = site("bushy")
    *_, (oid, tid) = made.revisions
    file = made.file(oid, tid)
    folder = file.parent
    odd = [
        made.blob_dir / "README",
        made.blob_dir / file.name,  # of no object
        made.blob_dir / "0x00" / file.name,
        made.blob_dir / "0x00/0x00/0x00/0x00/0x00/0x00/0x00/0x00/0x00" / file.name,
        made.blob_dir / "0x0/0x0/0x0/0x0/0x0/0x0/0x0/0x1" / file.name,  # not ZODB's way to write it
        made.blob_dir / "0x01" / file.name,  # a lawn's
        made.blob_dir / "subfolder" / "tmp" / file.name,
        folder / f"{tid.hex().upper()}.blob",
        folder / f"{tid.hex()}.blob",
        folder / f"{file.name}.tmp",
        folder / file.name.replace(".blob", "xyz.tmp"),  # left over by a crash
        folder / "0xnothex.blob",
        folder / ".blob.blob" / "deep.blob",
        folder / "é.blob",
        folder / "0x000000000000000000000001.blob",
    ]
    for path in odd:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"foreign")
    with open(os.fsencode(folder) + b"/\xff\xfe.blob", "wb"):
        pass
    (folder / "link").symlink_to(folder)  # in a circle
    (folder / "dangling.blob").symlink_to(folder / "nowhere")
    for path in made.blob_dir / "tmp" / "BUSHY.blob", folder / ".nfs0001", made.blob_dir / ".DS_Store":
        path.write_bytes(b"temporary")
    expected = {str(path.relative_to(made.blob_dir)) for path in odd}
    expected -= {str((folder / ".blob.blob" / "deep.blob").relative_to(made.blob_dir))}  # in what begins with a dot
    links = {str((folder / name).relative_to(made.blob_dir)) for name in ("link", "dangling.blob")}
    bytes_name = os.path.relpath(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.blob"), made.blob_dir)
    blobs, foreign = found(BlobDirectory(str(made.blob_dir)))
    assert blobs == made.revisions
    assert set(foreign) == expected | links | {bytes_name}


def test_in_a_lawn_only_zodbs_own_names_are_blobs(site):
    made = site("lawn")
    (oid, tid), *_ = made.revisions
    file = made.file(oid, tid)
    odd = [
        made.blob_dir / file.name,
        made.blob_dir / file.parent.name.removeprefix("0x") / file.name,
        made.blob_dir / "0x00000000000000ab" / file.name,
        made.blob_dir / "folder" / file.name,
        file.parent / "0x01" / file.name,
        file.parent / "notes.txt",
    ]
    for path in odd:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"foreign")
    blobs, foreign = found(BlobDirectory(str(made.blob_dir)))
    assert blobs == made.revisions
    assert foreign == sorted(str(path.relative_to(made.blob_dir)) for path in odd)


@LAYOUTS
def test_what_is_packed_away_while_it_is_being_listed_is_no_error(site, layout):
    made = site(layout)
    files = BlobDirectory(str(made.blob_dir)).files(lambda path: None)
    first = next(files)
    for path in made.files():
        if str(path.parent) != os.path.dirname(first.path):
            path.unlink(missing_ok=True)
            if not os.listdir(path.parent):
                path.parent.rmdir()
    assert {file.oid for file in files} <= {first.oid}


# What cannot be used


def test_the_cache_of_a_zeo_client_is_refused(tmp_path):
    """test_fallback.py has one that a client has made."""
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / ".layout").write_text("zeocache")
    with pytest.raises(BlobDirectoryError, match="blob cache of a ZEO client") as caught:
        BlobDirectory(str(tmp_path / "client"))
    assert str(tmp_path / "client") in str(caught.value)


def _nothing(path):
    pass


def _a_file(path):
    path.write_bytes(b"data")


def _an_empty_directory(path):
    path.mkdir()


def _other_content(path):
    (path / "home").mkdir(parents=True)
    (path / "home" / "file.txt").write_bytes(b"data")


def _names_like_it(path):
    (path / "0xff").mkdir(parents=True)
    (path / "0x1f").write_bytes(b"data")
    (path / "0xff" / "file.txt").write_bytes(b"data")


def _another_tmp(path):
    (path / "tmp").mkdir(parents=True)
    (path / "tmp" / "letter.txt").write_bytes(b"data")


def _a_tmp_that_is_none(path):
    path.mkdir()
    (path / "tmp").write_bytes(b"data")


def _an_odd_marker(path):
    path.mkdir()
    (path / ".layout").write_bytes(b"\xff\x00 other software's")


def _a_marker_that_is_none(path):
    (path / ".layout").mkdir(parents=True)


def _a_circle(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    "make",
    [
        _nothing,
        _a_file,
        _an_empty_directory,
        _other_content,
        _names_like_it,
        _an_odd_marker,
        _a_marker_that_is_none,
        _a_circle,
    ],
)
def test_what_is_no_blob_directory_is_refused_by_name_and_left_alone(tmp_path, make):
    """An empty directory is where a file system is mounted that is not mounted now."""
    path = tmp_path / "directory"
    make(path)
    before = tree(tmp_path)
    with pytest.raises(BlobDirectoryError) as caught:
        BlobDirectory(str(path))
    assert str(path) in str(caught.value)
    assert tree(tmp_path) == before


def test_a_directory_that_may_not_be_read_is_an_error_and_not_an_empty_one(site, tmp_path):
    made = site()
    directory = BlobDirectory(str(made.blob_dir))
    (name, *_) = made.revisions
    with without_permission(tmp_path):
        for call in (
            lambda: BlobDirectory(str(made.blob_dir)),
            lambda: directory.find(*name),
            lambda: directory.find(p64(77), p64(77)),
            lambda: directory.copy(*name, Memory()),
            lambda: list(directory.files(lambda path: None)),
        ):
            with pytest.raises(BlobDirectoryError, match="Permission denied"):
                call()
    assert directory.find(*name)


@pytest.mark.parametrize("instead", ["nothing", "an empty directory", "a file", "another blob directory"])
def test_a_directory_that_is_gone_while_it_is_open_is_an_error_and_has_no_word_on_its_blobs(site, tmp_path, instead):
    """A file system that is not mounted any more."""
    made = site()
    directory = BlobDirectory(str(made.blob_dir))
    (name, *_) = made.revisions
    gone = tmp_path / "elsewhere"
    made.blob_dir.rename(gone)
    if instead == "an empty directory":
        made.blob_dir.mkdir()
    elif instead == "a file":
        made.blob_dir.write_bytes(b"")
    elif instead == "another blob directory":
        BlobDirectory.create(str(made.blob_dir))
    for call in (
        lambda: directory.find(*name),
        lambda: directory.find(p64(77), p64(77)),
        lambda: directory.copy(*name, Memory()),
    ):
        with pytest.raises(BlobDirectoryError) as caught:
            call()
        assert str(made.blob_dir) in str(caught.value)
    if made.blob_dir.exists():
        made.blob_dir.rename(tmp_path / "wrong")
    gone.rename(made.blob_dir)  # mounted again
    assert directory.find(*name)
    assert directory.find(p64(77), p64(77)) is None


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(site):
    made = site()
    (name, *_) = made.revisions
    file = made.file(*name)
    break_disk(file)
    with pytest.raises(BlobDirectoryError) as caught:
        BlobDirectory(str(made.blob_dir)).copy(*name, Memory())
    assert str(file) in str(caught.value)


def test_a_target_that_cannot_be_written_is_not_the_directorys_fault(site):
    made = site()
    (name,) = [name for name, data in made.revisions.items() if data][:1]

    class Full(Memory):
        def write_at(self, data, position):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        BlobDirectory(str(made.blob_dir)).copy(*name, Full())


# Making one


def make_blob(directory, oid, tid, data):
    file = directory.new_file()
    file.write_at(data[1:], 1)
    file.write_at(data[:1], 0)
    file.publish(oid, tid)
    file.discard()  # what is published stays
    return directory.find(oid, tid)


@pytest.mark.parametrize("place", ["nothing", "nothing/in/nothing", "empty"])
def test_a_new_one_is_zodbs_own_kind(tmp_path, place):
    path = tmp_path / place
    if place == "empty":
        path.mkdir()
    BlobDirectory.create(str(path))
    assert (path / ".layout").read_text() == "bushy"
    other = tmp_path / "zodbs"
    FileStorage(str(tmp_path / "Data.fs"), blob_dir=str(other)).close()
    assert {name: mode for name, (mode, *_) in tree(path).items()} == {
        name: mode for name, (mode, *_) in tree(other).items()
    }
    BlobDirectory.create(str(path))  # again


@LAYOUTS
def test_one_that_is_there_is_taken_as_it_is(site, layout):
    made = site(layout)
    before = tree(made.blob_dir)
    directory = BlobDirectory.create(str(made.blob_dir))
    assert found(directory)[0] == made.revisions
    assert tree(made.blob_dir) == before
    data = b"one more"
    path = make_blob(directory, p64(1 << 20), p64(5), data)
    storage = made.open()
    assert Path(storage.loadBlob(p64(1 << 20), p64(5))).samefile(path)
    storage.close()


@LAYOUTS
def test_one_whose_marker_and_tmp_were_lost_gets_them_so_that_a_filestorage_finds_the_blobs(site, layout):
    """A FileStorage takes any directory without a marker for a lawn."""
    made = site(layout)
    (made.blob_dir / ".layout").unlink()
    (made.blob_dir / "tmp").rmdir()
    directory = BlobDirectory.create(str(made.blob_dir))
    make_blob(directory, p64(1 << 20), p64(5), b"one more")
    storage = made.open()
    assert contents(storage, names(storage)) == made.revisions
    assert Path(storage.loadBlob(p64(1 << 20), p64(5))).read_bytes() == b"one more"
    storage.close()


@pytest.mark.parametrize(
    "make", [_a_file, _other_content, _another_tmp, _a_tmp_that_is_none, _names_like_it, _an_odd_marker, _a_circle]
)
def test_nothing_is_made_in_what_is_something_else(tmp_path, make):
    path = tmp_path / "directory"
    make(path)
    before = tree(tmp_path)
    with pytest.raises(BlobDirectoryError) as caught:
        BlobDirectory.create(str(path))
    assert str(path) in str(caught.value)
    assert tree(tmp_path) == before


def test_one_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BlobDirectoryError) as caught:
        BlobDirectory.create(str(tmp_path / "file" / "blobs"))
    assert str(tmp_path / "file" / "blobs") in str(caught.value)


def test_a_blob_appears_under_its_name_when_it_is_whole_and_as_zodb_would_leave_it(site, tmp_path):
    made = site()
    (name, *_) = made.revisions
    directory = BlobDirectory.create(str(tmp_path / "new"))
    file = directory.new_file()
    file.write_at(b"half", 0)
    assert directory.find(p64(1), p64(2)) is None
    assert found(directory) == ({}, [])
    file.clear()
    file.write_at(b"all of it", 0)
    file.publish(p64(1), p64(2))
    path = directory.find(p64(1), p64(2))
    assert Path(path).read_bytes() == b"all of it"
    assert os.stat(path).st_mode == made.file(*name).stat().st_mode
    assert os.listdir(tmp_path / "new" / "tmp") == []


def test_a_file_that_is_discarded_leaves_nothing(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "new"))
    before = sorted(tree(tmp_path / "new"))
    file = directory.new_file()
    file.write_at(b"data", 0)
    file.discard()
    file.discard()
    assert sorted(tree(tmp_path / "new")) == before


def test_a_directory_that_takes_no_more_files_is_an_error_that_names_it(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "new"))
    (tmp_path / "new" / "tmp").rmdir()
    with pytest.raises(BlobDirectoryError) as caught:
        directory.new_file()
    assert str(tmp_path / "new" / "tmp") in str(caught.value)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "new"))
    (tmp_path / "new" / "0x00").write_bytes(b"in the way")
    file = directory.new_file()
    with pytest.raises(OSError):
        file.publish(p64(1), p64(2))
    file.discard()
    assert os.listdir(tmp_path / "new" / "tmp") == []


def test_what_killed_runs_left_goes_at_once_and_what_is_being_written_stays(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    tmp = tmp_path / "blobs" / "tmp"
    (tmp / "s3blobs-killed.blob").write_bytes(b"half a blob")
    (tmp / "s3blobs-whole.blob").write_bytes(b"killed before it got its name")
    (tmp / "s3blobs-whole.blob").chmod(0o400)
    (tmp / "BUC-of-zodb.tmp").write_bytes(b"a client's")
    (tmp / "s3blobs-directory").mkdir()
    file = directory.new_file()
    file.write_at(b"half", 0)
    kept = {"BUC-of-zodb.tmp", "s3blobs-directory"}
    BlobDirectory(str(tmp_path / "blobs"))
    assert len(os.listdir(tmp)) == 5  # whoever only reads it deletes nothing
    BlobDirectory.create(str(tmp_path / "blobs"))
    assert set(os.listdir(tmp)) == {*kept, os.path.basename(file.path)}
    file.publish(p64(1), p64(2))
    assert Path(directory.find(p64(1), p64(2))).read_bytes() == b"half"
    file = directory.new_file()
    file.discard()
    assert set(os.listdir(tmp)) == kept


def test_a_file_of_a_process_that_was_killed_is_nobodys(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    pid = os.fork()
    if not pid:
        directory.new_file().write_at(b"half", 0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(os.listdir(tmp_path / "blobs" / "tmp")) == 1
    BlobDirectory.create(str(tmp_path / "blobs"))
    assert os.listdir(tmp_path / "blobs" / "tmp") == []


def test_where_nothing_can_be_locked_a_day_tells(tmp_path, monkeypatch):
    """Some network file systems."""

    def flock(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    tmp = tmp_path / "blobs" / "tmp"
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    for name, age in (("s3blobs-old.blob", 90_000), ("s3blobs-young.blob", 3600)):
        (tmp / name).write_bytes(b"half a blob")
        os.utime(tmp / name, (time.time() - age, time.time() - age))
    file = directory.new_file()
    BlobDirectory.create(str(tmp_path / "blobs"))
    assert sorted(os.listdir(tmp)) == sorted(["s3blobs-young.blob", os.path.basename(file.path)])


def test_a_file_that_was_taken_for_abandoned_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    tmp = tmp_path / "blobs" / "tmp"
    made = []

    def flock(fd, operation, real=fcntl.flock):
        if not made:
            made.extend(os.listdir(tmp))
            (tmp / made[0]).unlink()
        real(fd, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    file = directory.new_file()
    assert os.listdir(tmp) == [os.path.basename(file.path)] != made
    file.discard()


def test_what_is_not_published_when_it_is_closed_is_deleted(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    make_blob(directory, p64(1), p64(2), b"data")
    directory.new_file()
    directory.close()
    assert os.listdir(tmp_path / "blobs" / "tmp") == []
    assert directory.find(p64(1), p64(2))
    with pytest.raises(BlobDirectoryError, match="closed"):
        directory.new_file()
    assert os.listdir(tmp_path / "blobs" / "tmp") == []


def test_no_file_is_left_open(tmp_path):
    directory = BlobDirectory.create(str(tmp_path / "blobs"))
    before = len(os.listdir("/dev/fd"))
    for number in range(20):
        make_blob(directory, p64(number), p64(2), b"data")
        directory.new_file().discard()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("names", [["lost+found"], ["tmp"], ["lost+found", "tmp"], ["tmp/s3blobs-killed.blob"]])
def test_a_new_file_system_and_what_a_killed_run_left_are_as_an_empty_directory(tmp_path, names):
    path = tmp_path / "blobs"
    for name in names:
        (path / name).mkdir(parents=True)
        if "killed" in name:
            (path / name).rmdir()
            (path / name).write_bytes(b"half")
    directory = BlobDirectory.create(str(path))
    assert (path / ".layout").read_text() == "bushy" and os.listdir(path / "tmp") == []
    make_blob(directory, p64(1), p64(2), b"data")
    assert found(directory) == ({(p64(1), p64(2)): b"data"}, [])


def test_the_file_systems_own_directory_is_passed_over_even_where_it_may_not_be_read(tmp_path):
    path = tmp_path / "blobs"
    (path / "lost+found").mkdir(parents=True)
    (path / "lost+found" / "#123").write_bytes(b"lost")
    directory = BlobDirectory.create(str(path))
    assert found(directory) == ({}, [])
    assert (path / "lost+found" / "#123").exists()
