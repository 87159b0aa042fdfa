"""The code is as docs/architecture.md says: every file in a room, imports that go up its table only, names that are there.

Belongs here: what can be told of the files as text. Does not belong here: what any of them does.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import zo_kernels as zk
from tests import mutants
from zo_kernels.optim.method import PARTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = {"zo_kernels": ROOT, "zo_finetune": ROOT / "python"}
FILES = [p.relative_to(ROOT).as_posix() for name, at in PACKAGES.items() for p in sorted((at / name).rglob("*.py"))]
LONGEST = {"zo_kernels/optim/": 520, "zo_kernels/views/": 520, "zo_kernels/optim/step.py": 600}  # lines


@functools.cache
def rooms() -> list[list[str]]:
    """The files and folders of each row of the table; a name without a folder is beside the one before it."""
    table = PAGE.split("## Rooms")[1].split("\n\n|")[1].split("\n\n")[0]
    found = []
    for row in table.splitlines()[2:]:
        folder, room = "", []
        for name in re.findall(r"`([^`]+)`", row.split("|")[2]):
            if (ROOT / name).exists():
                folder = name[: name.rstrip("/").rfind("/") + 1]
            else:
                name = folder + name
            room.append(name)
        found.append(room)
    return found


def room_of(file: str) -> list[int]:
    """The numbers of the rows that have it: by its own name, or by that of its folder."""
    named = [k for k, room in enumerate(rooms()) if file in room]
    return named or [k for k, room in enumerate(rooms()) if any(name.endswith("/") and file.startswith(name) for name in room)]


def module_file(module: str) -> str | None:
    """The file of a module of ours, or of a package."""
    at = PACKAGES.get(module.split(".")[0])
    for path in (at / f"{module.replace('.', '/')}.py", at / module.replace(".", "/") / "__init__.py") if at else ():
        if path.exists():
            return path.relative_to(ROOT).as_posix()
    return None


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    """Our files that these statements import as the module is loaded: not those of annotations alone."""
    for node in statements:
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if found := (module_file(f"{module}.{name}") if name else None) or module_file(module):
                yield found


@functools.cache
def imports() -> dict[str, set[str]]:
    return {file: set(imported(tree(file).body)) for file in FILES}


def test_every_file_is_in_one_room() -> None:
    assert {file: rows for file in FILES if len(rows := room_of(file)) != 1} == {}
    assert [name for room in rooms() for name in room if not (ROOT / name).exists()] == []


def test_imports_go_up_the_table() -> None:
    wrong = [f"{file} imports {other}" for file, others in imports().items() for other in others if room_of(other) > room_of(file)]
    assert wrong == []


def test_no_circle_of_imports() -> None:
    left = {file: others - {file} for file, others in imports().items()}
    while free := [file for file, others in left.items() if not others & left.keys()]:
        for file in free:
            del left[file]
    assert left == {}


def test_imports_stand_at_the_beginning() -> None:
    """In the optimizer's rooms and the views': one inside a function would hide a circle."""
    wrong = []
    for file in FILES:
        if file.startswith(("zo_kernels/optim/", "zo_kernels/views/", "zo_kernels/journal/")):
            inside = [n for n in ast.walk(tree(file)) if isinstance(n, (ast.Import, ast.ImportFrom)) and n not in tree(file).body]
            wrong += [f"{file}:{n.lineno}" for n in inside]
    assert wrong == []


def test_no_file_is_long() -> None:
    for file in FILES:
        if limits := [most for name, most in LONGEST.items() if file.startswith(name)]:
            lines = (ROOT / file).read_text().count("\n")
            assert lines <= limits[-1], f"{file} has {lines} lines"


def test_who_writes_files() -> None:
    writing = re.compile(r"\bos\.(p?write|f?truncate|replace|rename|unlink)\b|(?<![.\w])open\(|\.write_(text|bytes)\(")
    found = {file for file in FILES if file.startswith("zo_kernels/") and writing.search(ast.unparse(tree(file)))}
    assert found == {"zo_kernels/journal/writer.py", "zo_kernels/views/files.py"}


def test_the_page_names_what_is_there() -> None:
    """Each file that the page names, and each word of its code, occurs in the code."""
    sources = [p for folder in ("zo_kernels", "python", "csrc", "tests", "docs", "benchmarks") for p in (ROOT / folder).rglob("*")]
    files = {p.relative_to(ROOT).as_posix() for p in sources if p.is_file()}
    code = [p for p in sources if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and p != Path(__file__)]
    words = {word for p in code for word in re.findall(r"\w+", p.read_text())}
    for span in re.findall(r"`([^`\n]+)`", PAGE):
        if re.fullmatch(r"[\w./]+\.(py|h|cpp|cu|cuh|md)", span):
            assert any(f"/{file}".endswith(f"/{span}") for file in files), span
        elif "/" not in span and " " not in span:
            assert set(re.findall(r"[A-Za-z_]\w+", span)) <= words, span
    for link in re.findall(r"\]\(([\w.]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("what", PARTS)
def test_every_part_is_public_and_in_the_tables(what: str) -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    for part in PARTS[what]:
        assert getattr(zk, part.__name__) is part and part.__name__ in zk.__all__
        assert f"`{part.__name__}(" in text, part


def test_every_methods_name_is_public_and_in_the_table() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    for method in zk.optim.METHODS:
        assert getattr(zk, method.__name__) is method and method.__name__ in zk.__all__
        assert f"| `{method.__name__}` |" in text, method


def test_every_mutant_has_its_line() -> None:
    """A line that moves takes its mutant with it: one that does not apply kills nothing."""
    assert not [f"{m.file}: {m.wrong}" for m in mutants.outdated(mutants.MUTANTS)]
