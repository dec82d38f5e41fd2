"""What pyproject.toml promises: the version, the command, the extras, the license."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zodb_s3blobs
from zodb_s3blobs import cli
from zodb_s3blobs.commands.demo import servers

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).resolve()
while not (ROOT / "pyproject.toml").exists():
    ROOT = ROOT.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_version_is_newer_than_1_2_1_the_earlier_package_of_this_name():
    assert int(zodb_s3blobs.__version__.split(".")[0]) >= 2


def test_the_build_reads_the_version_where_the_package_has_it():
    assert PROJECT["dynamic"] == ["version"]
    text = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text()
    assert f'\n__version__ = "{zodb_s3blobs.__version__}"\n' in text


def test_the_changes_begin_with_the_version():
    changes = (ROOT / "CHANGES.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.M)[1] == zodb_s3blobs.__version__


def test_the_command_tells_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"zodb-s3blobs {zodb_s3blobs.__version__}\n"


def test_python_m_runs_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "zodb_s3blobs", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"zodb-s3blobs {zodb_s3blobs.__version__}\n", "")


def test_what_the_demo_says_to_install_is_what_its_extra_installs():
    assert PROJECT["optional-dependencies"]["demo"] == [servers.MOTO]


def test_the_license_has_the_form_of_today():
    assert PROJECT["license"] == "ZPL-2.1"
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    assert not [one for one in PROJECT["classifiers"] if one.startswith("License ::")]


def test_the_classifiers_begin_with_the_oldest_python_that_is_required():
    versions = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">=3.{versions[0]}"


def test_types_are_told_to_checkers():
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (Path(zodb_s3blobs.__file__).parent / "py.typed").exists()


def test_one_extra_brings_all_tools_of_a_developer():
    extra = PROJECT["optional-dependencies"]["dev"]
    assert {"ruff", "mypy"} <= set(extra)
    assert "zodb-s3blobs[test]" in extra
