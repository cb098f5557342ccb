"""The folder list of CONTRIBUTING.md: every room is in it, and an import only goes down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SOURCE = CHECKOUT / "src" / "loudmerge"
ROOM = re.compile(r"`(\w+)(?:\.py|/)`")


def floors() -> dict[str, int]:
    """Each room's line of the table, counted from the lowest."""
    lines = (CHECKOUT / "CONTRIBUTING.md").read_text("utf-8").splitlines()
    first = lines.index("| room | holds |") + 2
    rows = [line.split("|")[1] for line in lines[first : lines.index("", first)]]
    return {room: floor for floor, row in enumerate(rows) for room in ROOM.findall(row)}


def imported(file: Path) -> Iterator[str]:
    """The rooms that a file imports when it is imported itself."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loudmerge."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "loudmerge":
            yield from (name.name for name in node.names)


FLOORS = floors()


def test_every_room_is_in_the_list_once() -> None:
    there = {
        path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__", "__main__"} == FLOORS.keys()


@pytest.mark.parametrize("room", FLOORS)
def test_an_import_only_goes_down(room: str) -> None:
    files = (
        [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").is_file() else sorted(SOURCE.glob(f"{room}/*.py"))
    )
    assert files
    up = {other for file in files for other in imported(file) if FLOORS.get(other, 0) > FLOORS[room]}
    assert up == set()
