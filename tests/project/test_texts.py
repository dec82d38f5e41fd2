"""The manuals are short where they have to be, and every link in them leads somewhere."""

import ast
import re
from pathlib import Path

import pytest

from zodb_s3blobs.cli import COMMANDS as COMMANDS_OF_CLI

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, *(ROOT / name for name in ("zeo-configs", "grafana", "src", "tests"))]
#: All texts, by their names in the repository.
TEXTS = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted(folder.glob("*.md"))}
#: What a person may copy into a shell or a configuration: code blocks of the texts, and files with commands in them.
COMMANDS = {
    **{name: "".join(re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```$", path.read_text())) for name, path in TEXTS.items()},
    **{
        str(path.relative_to(ROOT)): path.read_text()
        for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("zeo-configs/*.conf"), ROOT / ".ci" / "run"]
    },
}

#: How no docstring begins: with a pronoun, an article of a clause, or a reference to another docstring.
BANNED_OPENINGS = re.compile(
    r"(?:The same|One more|As|For|Of|What|Which|Who|Whose|Whether|Why|How|When|Where|While|If"
    r"|It|Its|That|Those|These|Here|There|Nothing|Neither|Not|To be)\b"
)
#: How the docstring of a function does not begin either: with a noun phrase in place of an imperative verb.
NOUN_PHRASES = re.compile(r"(?:The|A|An|All|Any|Both|Each|No|None|Some|This|Without)\b")
#: Idioms that hide the noun or the verb.
BANNED_WORDS = re.compile(
    r"\b(?:(?:whoever|whomever|as ever|for ever|will do|(?:is|are) to be|(?:no|some|any|every)body)\b|has not[.,;:)])",
    re.IGNORECASE,
)


def docstrings(path):
    """Yield the docstrings of the module ``path``: name, text, and whether a verb must begin it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
            is_property = any(name.endswith(("property", ".setter")) for name in decorators)
            yield getattr(node, "name", "module"), text, isinstance(node, ast.FunctionDef) and not is_property


def prose(path):
    """The text of ``path`` without its code blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text())


def anchors(path):
    """The anchors of the headings of ``path``, as they are made where the repository is shown."""
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", prose(path)):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).strip().replace(" ", "-")
        found.add(next(name for name in [anchor, *(f"{anchor}-{n}" for n in range(1, 99))] if name not in found))
    return found


def links(path):
    """The target and the title, or None, of each link in ``path`` that does not lead out of the repository."""
    found = re.findall(r'\]\(([^)\s]+)(?: "([^"]*)")?\)', prose(path))
    return [(target, title or None) for target, title in found if not re.match(r"\w+:", target)]


def test_the_readme_is_read_in_two_minutes():
    assert len(TEXTS["README.md"].read_text().splitlines()) <= 150


def test_the_first_screen_has_the_two_commands_and_no_third():
    """CI runs the second one as it stands there: see .ci/run."""
    first_screen = TEXTS["README.md"].read_text().partition("\n## ")[0]
    commands = "".join(re.findall(r"(?ms)^```sh\n(.*?)^```$", first_screen)).splitlines()
    assert len(commands) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install") for line in commands)
    assert re.fullmatch(r"python3 -m venv .*pytest", commands[1])
    assert "install -q" not in commands[0]  # pip works for most of a minute: it says on what


def test_the_table_of_files_is_complete():
    """In src/README.md: every module is there, and nothing else."""
    [text] = re.findall(r"(?ms)^## Files\n(.*?)^## ", TEXTS["src/README.md"].read_text())
    cells = re.findall(r"(?m)^\| (`.*?) \|", text)
    named = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    package = ROOT / "src" / "zodb_s3blobs"
    there = [
        str(path.relative_to(package))
        for path in [*package.rglob("*.py"), *package.rglob("*.xml")]
        if path.name != "__init__.py" or "def " in path.read_text()
    ]
    assert sorted(named) == sorted(there)


def test_the_table_of_commands_is_complete():
    [text] = re.findall(r"(?ms)^## Commands\n(.*?)^## ", TEXTS["zeo-configs/OPERATIONS.md"].read_text())
    assert set(re.findall(r"(?m)^\| `zodb-s3blobs (\w+)", text)) == set(COMMANDS_OF_CLI)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_to_a_file_and_a_heading(name):
    path = TEXTS[name]
    broken = []
    for target, _ in links(path):
        file, _, anchor = target.partition("#")
        leads_to = (path.parent / file).resolve() if file else path
        if not leads_to.exists() or (anchor and anchor not in anchors(leads_to)):
            broken.append(target)
    assert not broken


def test_every_text_can_be_reached_from_the_readme():
    reached, new = set(), {TEXTS["README.md"]}
    while new:
        reached |= new
        targets = {(path.parent / target.partition("#")[0]).resolve() for path in new for target, _ in links(path)}
        new = {path for path in targets if path.suffix == ".md"} - reached
    assert set(TEXTS.values()) <= reached


def test_every_promise_names_a_test_that_is_there():
    """The title of a link to a module of tests is the name of a test in it."""
    promises = TEXTS["README.md"].read_text().partition("## What you can rely on")[2].partition("\n## ")[0]
    found = re.findall(r'\]\((tests/[\w/]+\.py) "(\w+)"\)', promises)
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert rows and all("](tests/" in row for row in rows)
    assert len(found) == promises.count("](tests/")
    for file, test in found:
        assert f"def {test}(" in (ROOT / file).read_text(), (file, test)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_installs_the_earlier_project_of_this_name(name):
    """The package index has another zodb-s3blobs: this one is installed by a path, or its version is pinned."""
    assert not re.findall(r"(?m)pip\d? install [^\n]*(?<![\w./-])zodb-s3blobs(?![\w/-])", COMMANDS[name])
    if re.search(r"(?m)^eggs = [^\n]*zodb-s3blobs", COMMANDS[name]):
        assert re.search(r"(?m)^zodb-s3blobs = \d", COMMANDS[name])


def test_the_systemd_unit_keeps_data_from_others():
    [unit] = re.findall(r"(?ms)^```ini\n(\[Unit\].*?)^```$", TEXTS["zeo-configs/README.md"].read_text())
    assert "StateDirectory=" in unit
    assert "UMask=0077" in unit


def test_no_virtual_environment_gets_into_an_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", "venv", "build", "dist"} <= set(ignored)


def test_docstrings_begin_with_a_verb_or_a_noun():
    package = ROOT / "src" / "zodb_s3blobs"
    modules = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    wrong = [
        f"{module}, {name}: {text.splitlines()[0]}"
        for module in sorted(modules)
        for name, text, needs_verb in docstrings(modules[module])
        if BANNED_OPENINGS.match(text)
        or BANNED_WORDS.search(" ".join(text.split()))
        or (needs_verb and NOUN_PHRASES.match(text))
    ]
    assert not wrong, "\n".join(wrong)
