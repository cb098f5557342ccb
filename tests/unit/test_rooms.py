"""The lists of CONTRIBUTING.md: what they name is there, every room is named, an import only goes down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SOURCE = CHECKOUT / "src" / "loudmerge"
ROOM = re.compile(r"`(\w+)(?:\.py|/)`")


def rows(head: str) -> dict[str, str]:
    """The table of this head: the first column of each row, and the second."""
    lines = (CHECKOUT / "CONTRIBUTING.md").read_text("utf-8").splitlines()
    first = lines.index(head) + 2
    return {row.split("|")[1]: row.split("|")[2] for row in lines[first : lines.index("", first)]}


def floors() -> dict[str, int]:
    """Each room's line of the table, counted from the lowest."""
    return {room: floor for floor, row in enumerate(ROWS) for room in ROOM.findall(row)}


def imported(file: Path) -> Iterator[str]:
    """The rooms that a file imports when it is imported itself."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loudmerge."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "loudmerge":
            yield from (name.name for name in node.names)


ROWS = rows("| room | holds |")
FLOORS = floors()


def test_every_room_is_in_the_list_once() -> None:
    there = {
        path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__", "__main__"} == FLOORS.keys()


@pytest.mark.parametrize("room", FLOORS)
def test_an_import_only_goes_down(room: str) -> None:
    file = SOURCE / f"{room}.py"
    files = [file] if file.is_file() else sorted((SOURCE / room).rglob("*.py"))
    assert files
    up = {other for file in files for other in imported(file) if FLOORS.get(other, 0) > FLOORS[room]}
    assert up == set()


@pytest.mark.parametrize("package", [room for room in FLOORS if (SOURCE / room).is_dir()])
def test_what_a_packages_row_names_is_in_it(package: str) -> None:
    there = {path.name for path in (SOURCE / package).rglob("*")}
    folders = {path.name for path in (SOURCE / package).iterdir() if (path / "__init__.py").is_file()}
    row = ROWS[f" `{package}/` "]
    assert {*re.findall(r"`(\w+\.py)`", row)} <= there
    assert folders <= {*re.findall(r"`(\w+)/`", row)}


def test_every_folder_that_is_listed_is_there() -> None:
    paths = [path for row in rows("| path | holds |") for path in re.findall(r"`(.+?)`", row)]
    assert len(paths) > 10
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []


def test_files_and_functions_are_as_short_as_the_style_asks() -> None:
    """kernel.py says itself why it is one file."""
    long = []
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text("utf-8")
        long += [file.name] if len(text.splitlines()) > 400 else []
        long += [
            f"{file.name}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and (node.end_lineno or 0) - node.lineno >= 50
        ]
    assert long == ["kernel.py"]
