"""The files around a test file, as far as they say whether its tests are run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from loudmerge.canary.code.syntax import Module, parse

PLACED = frozenset({"nodeid", "name", "originalname", "path", "fspath", "location"})
"""The attributes of a test of which a part is asked for, as in `"merge" in item.nodeid`."""
SHORTEST = 3
"""Characters of such a part: a shorter text is in every name."""


@dataclass(frozen=True)
class Surroundings:
    """path: the file's own. read: the text of another file of its source; None where there is none."""

    path: str
    read: Callable[[str], str | None]

    def conftests(self) -> list[tuple[PurePosixPath, Module]]:
        """(folder, content) of each conftest.py that pytest takes for the file, the outermost first."""
        found = []
        for folder in reversed(PurePosixPath(self.path).parents):
            text = self.read(str(folder / "conftest.py"))
            if text is not None:
                found.append((folder, parse(text, str(folder / "conftest.py"))))
        return found

    def lacks(self, name: str) -> bool:
        """Whether the source has the package that a module is of, and not the module."""
        root = name.partition(".")[0]
        for folder in ("", "src/"):
            if self.read(f"{folder}{root}/__init__.py") is not None:
                place = folder + name.replace(".", "/")
                return all(self.read(f"{place}{end}") is None for end in (".py", "/__init__.py"))
        return False


@dataclass(frozen=True)
class Subject:
    """A test as a conftest may name it. marks: their names."""

    name: str
    owner: str
    path: str
    marks: frozenset[str]

    def said(self, nodes: Iterable[ast.AST], module: Module) -> bool:
        """Whether some code is about it: by its name, its class's, its file's, or a mark of it."""
        parts = [part for node in nodes for part in ast.walk(node)]
        values = [module.value(part.id) for part in parts if isinstance(part, ast.Name)]
        parts += [part for value in values if value is not None for part in ast.walk(value)]
        texts = {part.value for part in parts if isinstance(part, ast.Constant)}
        whole = {self.name, self.owner, self.path, PurePosixPath(self.path).name} | self.marks
        asked = any(isinstance(part, ast.Attribute) and part.attr in PLACED for part in parts)
        place = f"{self.path}::{self.owner}::{self.name}"
        found = (one for one in texts if isinstance(one, str) and one)
        return any(one in whole or (asked and len(one) >= SHORTEST and one in place) for one in found)


def _nothing(_: str) -> None:
    return None


NOWHERE = Surroundings("", _nothing)
"""Of a file that stands alone."""
