"""The plan of the package: imports point one way, and no file is longer than 500 lines."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import zodb_s3blobs

ROOT = Path(zodb_s3blobs.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

#: The layers, the lowest first. A module imports from lower layers and from its own package only.
LAYERS = [
    {
        "errors",
        "boot_id",
        "digest",
        "identity",
        "inflight",
        "localfile",
        "metrics",
        "openfiles",
        "predecessor",
        "progress",
        "revision",
        "workers",
    },
    {"blobdir", "cache", "inflight", "s3"},
    {"arriving", "bases", "fallbacks", "lease", "settings"},
    {"fetch", "linker", "places"},
    {"commit"},
    {"garbage", "monitoring", "vote"},
    {"storage"},
    {"zeo"},
    {"config"},
    {"database"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module(path): path for path in FILES}


def imports(path):
    """The modules of the package that a file imports, wherever in the file that is."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + tuple(node.module.split(".") if node.module else ())
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in MODULES else base


def test_no_file_is_longer_than_500_lines():
    assert {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 500} == {}


def test_no_import_goes_in_a_circle():
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join('.'.join(name) or 'zodb_s3blobs' for name in error.args[1])}")


def test_imports_point_from_higher_layers_to_lower_ones():
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert {name[0] for name in MODULES if name} == set(height)
    wrong = [
        f"{'.'.join(name)} imports {'.'.join(other)}"
        for name, path in MODULES.items()
        for other in imports(path)
        if name and other and other[0] != name[0] and height[other[0]] >= height[name[0]]
    ]
    assert wrong == []
