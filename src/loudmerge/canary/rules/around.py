"""The files around a test file, as far as they say whether its tests are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from loudmerge.canary.code.syntax import Module, parse


@dataclass(frozen=True)
class Around:
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


def _nothing(_: str) -> None:
    return None


NOWHERE = Around("", _nothing)
"""Of a file that stands alone."""
